//! Turns a place in a recording into what a model plays there by itself, beside what the recording does.

use ndarray::{Array2, ArrayView1, ArrayView2, s};
use serde::Serialize;

use super::TrainError;
use super::dataset::{Dataset, Recording};
use crate::codec::{Codec, Token};
use crate::engine::{Engine, UNIFORMS_PER_SAMPLE};
use crate::metrics::{Adherence, Track, adherence, level_drift, log_mel_distance_db, tonality_db};
use crate::plan::{PlanError, PlanFrame, Spectrum};
use crate::rng::Rng;

/// A prompt, and the plan of what comes after it.
pub struct Scene {
    /// Prompt and what comes after it.
    tokens: Vec<Token>,
    /// Plan frames of the prompt.
    join: usize,
    /// The recording's samples after the prompt.
    sound: Vec<f32>,
    /// Analysis of the recording from the prompt's begin on, `[frames, n_bands]`.
    pub recording: Array2<f32>,
}

/// Where the plan of what is played comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Follow {
    /// The recording's, through the codebooks, as the model takes it.
    Recording,
    /// The model's own.
    Own,
}

/// What a model played.
pub struct Played {
    /// Analysis of prompt and continuation, `[frames, n_bands]`.
    pub heard: Array2<f32>,
    /// The plan of the continuation.
    planned: Array2<f32>,
    /// The continuation.
    sound: Vec<f32>,
}

impl Scene {
    /// `prompt` and then `played` plan frames of a piece from the frame `first` on.
    pub fn cut(
        data: &Dataset,
        piece: &Recording,
        first: usize,
        (prompt, played): (usize, usize),
    ) -> Result<Self, TrainError> {
        let hop = data.spectrum.hop();
        let end = first + prompt + played;
        let tokens = piece.tokens(first * hop..end * hop, 1.0, &data.codec)?;
        let mut sound = data.codec.decode_all(&tokens);
        let recording = data.spectrum.analyse(&sound);
        sound.drain(..prompt * hop);
        Ok(Self { tokens, join: prompt, sound, recording })
    }

    /// Plan frames of the prompt.
    pub fn join(&self) -> usize {
        self.join
    }

    /// How far what was played lies from what the recording does, dB: [`log_mel_distance_db`].
    pub fn distance_db(&self, played: &Played, sample_rate: u32) -> f32 {
        log_mel_distance_db(&played.sound, &self.sound, sample_rate)
    }

    /// How much more tonal than the recording what was played is, dB: [`tonality_db`].
    pub fn tonality_gained_db(&self, played: &Played) -> f32 {
        let after = s![self.join.., ..];
        tonality_db(played.heard.slice(after)) - tonality_db(self.recording.slice(after))
    }

    /// Plays on after the prompt; the same seed, the same sound.
    pub fn play(
        &self,
        engine: &mut dyn Engine,
        follow: Follow,
        seed: u64,
        spectrum: &Spectrum,
        codec: &Codec,
    ) -> Result<Played, TrainError> {
        let mut tokens = self.tokens[..self.join * spectrum.hop()].to_vec();
        engine.prefill(&tokens)?;
        let plan = engine.plan_of(&self.tokens)?;
        let mut rng = Rng::new(seed);
        let mut planned = Array2::zeros((0, spectrum.n_bands()));
        let mut played = vec![0; spectrum.hop()];
        for given in &plan[self.join..] {
            let mut frame = PlanFrame::default();
            if follow == Follow::Own {
                let uniforms: Vec<f32> = given.tokens.iter().map(|_| rng.uniform()).collect();
                engine.next_plan(&uniforms, &mut frame)?;
            } else {
                frame.clone_from(given);
            }
            let uniforms: Vec<f32> = (0..UNIFORMS_PER_SAMPLE * played.len()).map(|_| rng.uniform()).collect();
            engine.render(&frame, &uniforms, &mut played)?;
            tokens.extend_from_slice(&played);
            planned.push_row(ArrayView1::from(&frame.bands)).map_err(candle_core::Error::wrap)?;
        }
        let mut sound = codec.decode_all(&tokens);
        let heard = spectrum.analyse(&sound);
        sound.drain(..self.join * spectrum.hop());
        Ok(Played { heard, planned, sound })
    }
}

impl Played {
    /// How far the continuation is from its plan.
    pub fn adherence(&self) -> Adherence {
        adherence(self.continuation(), self.planned.view())
    }

    /// How much louder the continuation is than planned, dB: by its power, so what is loud counts.
    pub fn louder_db(&self, spectrum: &Spectrum) -> Result<f32, PlanError> {
        let per_second = spectrum.sample_rate() as f32 / spectrum.hop() as f32;
        let heard = Track::new(self.continuation().to_owned(), spectrum)?;
        let planned = Track::new(self.planned.clone(), spectrum)?;
        Ok(level_drift(&heard.level_db, &planned.level_db, per_second).median_db)
    }

    fn continuation(&self) -> ArrayView2<'_, f32> {
        let first = self.heard.nrows() - self.planned.nrows();
        self.heard.slice(s![first.., ..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{DB_PER_UNIT, PlanConfig};

    #[test]
    fn what_is_played_louder_than_planned_is_told_by_its_power() {
        let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
        // Most bands soft, a few loud: the soft ones hardly have any power.
        let planned = Array2::from_shape_fn((48, spectrum.n_bands()), |(_, b)| if b < 8 { 0.0 } else { -4.0 });
        let played = |loud: f32, soft: f32| {
            let heard = Array2::from_shape_fn((60, spectrum.n_bands()), |(frame, b)| match (frame < 12, b < 8) {
                (true, _) => 3.0,
                (false, true) => loud,
                (false, false) => -4.0 + soft,
            });
            Played { heard, planned: planned.clone(), sound: Vec::new() }
        };
        for (loud, soft) in [(0.0, 0.0), (0.5, 0.5), (-0.25, -0.25)] {
            let db = played(loud, soft).louder_db(&spectrum).unwrap();
            assert!((db - loud * DB_PER_UNIT).abs() < 0.02, "{db} for {loud} units");
        }
        let of = played(0.5, -0.5);
        assert!(of.louder_db(&spectrum).unwrap() > 0.8 * 0.5 * DB_PER_UNIT && of.adherence().bias_db < 0.0);
    }
}
