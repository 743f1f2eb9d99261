//! Turns tokens and their plan into the wave transformer's inputs and targets: the same for training, scoring and
//! prefill.

use std::ops::Range;

use candle_core::{Device, Tensor};
use ndarray::{ArrayView2, s};

use super::config::{ModelConfig, N_FORECASTS};
use super::features::{N_FEATURES, N_TOKEN_VALUES, features, residual_code, token_values};
use super::head::Targets;
use super::wave_transformer::{PLAN_FRAMES, WaveInputs, WaveTransformer};
use crate::codec::Token;
use crate::forecast::{ForecastError, Forecasts, PastForecast, PlannedForecast, listen};
use crate::plan::Spectrum;

/// A whole piece of music, as long as its plan.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// What comes.
    pub tokens: &'a [Token],
    /// What the model hears of it: the same, or with noise.
    pub heard: &'a [Token],
    /// `[frames, n_bands]`
    pub plan: ArrayView2<'a, f32>,
    pub spectrum: &'a Spectrum,
}

/// One excerpt of whole plan frames as plain data; several of the same length make a batch.
#[derive(Clone, Debug)]
pub struct Excerpt {
    hop: usize,
    codes: Vec<u32>,          // [history + time]
    values: Vec<f32>,         // [history + time, N_TOKEN_VALUES]
    features: Vec<f32>,       // [time, N_FEATURES]
    past_codes: Vec<u32>,     // [time]
    residual_codes: Vec<u32>, // [time + 1]: of the sample before; the last one belongs to the sample after
    plan: Vec<f32>,           // [2 + frames, n_bands]
    pub targets: Targets,
}

impl Excerpt {
    /// Reads the plan frames `frames` of a piece; `history` is the wave transformer's.
    ///
    /// `past` and `planned` are new, and are left where the excerpt ends.
    pub fn read(
        config: &ModelConfig,
        history: usize,
        piece: &Piece,
        frames: Range<usize>,
        past: &mut PastForecast,
        planned: &mut PlannedForecast,
    ) -> Result<Self, ForecastError> {
        let hop = config.plan.hop;
        // Before the excerpt only the forecasts listen, until they have heard all that they follow from.
        let begin = frames.start.saturating_sub(config.forecast.frames_before(&config.plan));
        let heard = config.codec.decode_all(&piece.heard[begin * hop..frames.end * hop]);
        let plan = piece.plan.slice(s![begin..frames.end, ..]);
        let forecasts = listen(past, planned, piece.spectrum, &heard, frames.start - begin, plan)?;
        Ok(Self::of(config, history, piece, frames, &forecasts))
    }

    /// The plan frames `frames` of a piece, with the `forecasts` of their samples; `history` is the wave transformer's.
    ///
    /// # Panics
    /// When there are more or fewer forecasts than samples.
    pub fn of(
        config: &ModelConfig,
        history: usize,
        piece: &Piece,
        frames: Range<usize>,
        forecasts: &Forecasts,
    ) -> Self {
        let codec = &config.codec;
        let hop = config.plan.hop;
        let heard = piece.heard;
        let time = frames.len() * hop;
        let Forecasts { past, planned, log_scale } = forecasts;
        assert_eq!([past.len(), planned.len(), log_scale.len()], [time; 3], "forecasts of {time} samples");
        let begin = frames.start * hop;
        let silence = codec.silence();
        let before = (0..history).map(|i| (begin + i).checked_sub(history).map_or(silence, |at| heard[at]));
        let seen = before.chain(heard[begin..begin + time].iter().copied());
        let mut excerpt = Self {
            hop,
            codes: seen.clone().map(|token| codec.code(token).into()).collect(),
            values: seen.flat_map(|token| token_values(token, codec)).collect(),
            features: Vec::with_capacity(time * N_FEATURES),
            past_codes: Vec::with_capacity(time),
            residual_codes: Vec::with_capacity(time + 1),
            plan: Vec::with_capacity((PLAN_FRAMES - 1 + frames.len()) * piece.plan.ncols()),
            targets: Targets::default(),
        };
        let silent_frame = piece.spectrum.silent_frame();
        for i in 0..PLAN_FRAMES - 1 + frames.len() {
            match (frames.start + i).checked_sub(PLAN_FRAMES - 1) {
                Some(frame) => excerpt.plan.extend(piece.plan.row(frame)),
                None => excerpt.plan.extend(&silent_frame),
            }
        }
        let mut residual = 0;
        for n in 0..time {
            let forecasts: [f32; N_FORECASTS] = [past[n], planned[n]];
            let (values, past_code) = features(forecasts, log_scale[n], codec);
            excerpt.features.extend(values);
            excerpt.past_codes.push(past_code.into());
            excerpt.residual_codes.push(u32::from(residual));
            excerpt.targets.push(piece.tokens[begin + n], forecasts, log_scale[n], codec);
            residual = residual_code(heard[begin + n], past[n], past_code, config);
        }
        excerpt.residual_codes.push(u32::from(residual));
        excerpt
    }

    /// Residual code of the excerpt's last sample.
    pub fn last_residual(&self) -> Token {
        self.residual_codes.last().map_or(0, |&code| code as Token)
    }

    /// Samples.
    pub fn n_samples(&self) -> usize {
        self.past_codes.len()
    }

    /// As a batch of one.
    pub fn inputs(&self) -> candle_core::Result<WaveInputs> {
        Self::batch(std::slice::from_ref(self))
    }

    /// Excerpts of the same length.
    pub fn batch(excerpts: &[Self]) -> candle_core::Result<WaveInputs> {
        let n = excerpts.len();
        let joined = |part: fn(&Self) -> &[f32], width: usize| {
            let values: Vec<f32> = excerpts.iter().flat_map(part).copied().collect();
            Tensor::from_vec(values, (n, (), width), &Device::Cpu)
        };
        let codes = |part: fn(&Self) -> &[u32]| {
            let codes: Vec<u32> = excerpts.iter().flat_map(part).copied().collect();
            Tensor::from_vec(codes, (n, ()), &Device::Cpu)
        };
        let (time, hop) = excerpts.first().map_or((0, 1), |first| (first.n_samples(), first.hop));
        if excerpts.iter().any(|excerpt| excerpt.n_samples() != time) {
            candle_core::bail!("a batch of excerpts that differ in length");
        }
        let frames = time / hop + PLAN_FRAMES - 1;
        let n_bands = excerpts.first().map_or(0, |first| first.plan.len()) / frames.max(1);
        Ok(WaveInputs {
            token_codes: codes(|e| &e.codes)?,
            token_values: joined(|e| &e.values, N_TOKEN_VALUES)?,
            features: joined(|e| &e.features, N_FEATURES)?,
            past_codes: codes(|e| &e.past_codes)?,
            residual_codes: codes(|e| &e.residual_codes[..e.n_samples()])?,
            plan: joined(|e| &e.plan, n_bands)?,
        })
    }
}

/// Excerpts of the same length as one, on the CPU, with what the wave transformer looks up of them.
pub struct Batch {
    inputs: WaveInputs,
    codes: Vec<u32>,
    pub targets: Targets,
}

impl Batch {
    /// # Errors
    /// When the excerpts differ in length.
    pub fn of(excerpts: &[Excerpt], model: &WaveTransformer) -> candle_core::Result<Self> {
        let inputs = Excerpt::batch(excerpts)?;
        let codes = model.codes(&inputs)?;
        Ok(Self { inputs, codes, targets: Targets::joined(excerpts.iter().map(|excerpt| &excerpt.targets)) })
    }

    /// Head outputs, as [`WaveTransformer::forward`] gives them.
    pub fn forward(&self, model: &WaveTransformer) -> candle_core::Result<Tensor> {
        model.forward_coded(&self.inputs, &self.codes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::{CpuForecaster, Forecaster};
    use crate::rng::Rng;

    #[test]
    fn an_excerpt_is_the_same_with_forecasts_from_elsewhere() {
        let config = ModelConfig::preset("tiny").unwrap();
        let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan).unwrap();
        let mut rng = Rng::new(31);
        let samples: Vec<f32> =
            (0..14 * config.plan.hop).map(|n| 0.3 * (n as f32 * 0.13).sin() + 0.01 * rng.normal()).collect();
        let tokens = config.codec.encode_all(&samples);
        let heard: Vec<Token> =
            tokens.iter().map(|&token| token.saturating_add(rng.below(2) as Token).min(255)).collect();
        let plan = spectrum.analyse(&samples);
        let piece = Piece { tokens: &tokens, heard: &heard, plan: plan.view(), spectrum: &spectrum };
        let forecaster = CpuForecaster { spectrum: &spectrum, config: &config.forecast };
        for frames in [0..3, 2..14, 11..14] {
            let (mut past, mut planned) =
                (PastForecast::new(&config.forecast).unwrap(), PlannedForecast::new(&config.forecast).unwrap());
            let read = Excerpt::read(&config, 40, &piece, frames.clone(), &mut past, &mut planned).unwrap();
            // All that came before is listened to, not only what the forecasts need.
            let heard = config.codec.decode_all(&heard[..frames.end * config.plan.hop]);
            let forecasts = forecaster.forecasts(&heard, frames.start, plan.view()).unwrap();
            let made = Excerpt::of(&config, 40, &piece, frames.clone(), &forecasts);
            assert!(format!("{made:?}") == format!("{read:?}"), "frames {frames:?}");
        }
    }
}
