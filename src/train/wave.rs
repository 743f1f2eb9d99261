//! Trains the wave transformer on excerpts: negative log-likelihood of the next token, bits per sample.

use std::ops::{ControlFlow, Range};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::dataset::{Dataset, Pick, Recording};
use super::lesson::Lesson;
use super::optimizer::AdamW;
use super::{Part, Run, TrainError};
use crate::codec::{Quantizer, Token};
use crate::forecast::{CpuForecaster, ForecastConfig, ForecastError, Forecaster};
use crate::model::config::ModelConfig;
use crate::model::excerpt::{Excerpt, Piece};
use crate::model::head::{self, Targets};
use crate::model::wave_transformer::{WaveInputs, WaveTransformer};
use crate::plan::{ResidualQuantizer, Spectrum};
use crate::rng::Rng;

/// Plan frames of an excerpt; about a second.
pub(super) const EXCERPT: usize = 32;
/// Share of the excerpts whose history is noisy, whose plan is quantised, and that are digital silence from one place
/// to another, as between the takes and under the fades of real recordings.
const NOISY: f32 = 0.5;
const QUANTISED: f32 = 0.7;
const SILENCED: f32 = 0.05;
/// Most rms of a noisy history's noise, in bins of mu-law.
const MOST_NOISE: f32 = 1.0;
/// Gain of an excerpt, dB, drawn evenly.
const GAIN_DB: (f32, f32) = (-12.0, 2.0);
/// Places per validation, frames scored at each after [`WARM`] frames that are only read.
const PLACES: usize = 6;
pub(super) const WARM: usize = 8;
/// Steps between validations.
const VALIDATE: usize = 250;

/// Rms of a noisy history's noise in bins of mu-law, for a uniform draw: even by its logarithm, from where it begins to move tokens.
fn noise(quantizer: Quantizer, uniform: f32) -> f32 {
    let least: f32 = match quantizer {
        Quantizer::Mulaw8 => 0.3,
        Quantizer::Pcm16 => 0.02,
    };
    least * (MOST_NOISE / least).powf(uniform)
}

/// Makes [`SILENCED`] of all excerpts silent from one place to another.
fn silence_some(tokens: &mut [Token], silence: Token, rng: &mut Rng) {
    if rng.uniform() < SILENCED {
        let (a, b) = (rng.below(tokens.len()), rng.below(tokens.len()));
        tokens[a.min(b)..a.max(b)].fill(silence);
    }
}

/// Trains until the budget is spent; the averages then hold the result.
pub fn train(run: &mut Run, optimizer: &mut AdamW) -> Result<ControlFlow<()>, TrainError> {
    let model = &run.model.wave;
    let config = run.settings.config();
    let forecaster = forecaster(&run.settings.device, &run.data.spectrum, &config.forecast)?;
    let maker = Maker {
        config,
        data: run.data,
        quantizer: run.quantizer,
        forecaster: &*forecaster,
        history: model.history(),
        speed_variation: run.settings.speed_variation,
    };
    let held_out = maker.held_out()?;
    let warm = WARM * config.plan.hop;
    let lesson = Lesson {
        part: Part::Wave,
        learning_rate: run.settings.wave_learning_rate,
        batch: run.settings.wave_batch,
        validate_every: VALIDATE,
        draw: &|rng| maker.draw(rng),
        join: &|excerpts| Ok(Batch::of(&excerpts, model)?),
        loss: &|batch| batch.nll(model)?.mean_all(),
        units: |batch| batch.targets.low.len(),
        validate: &|workers, group| {
            let means = workers.map(&group.mine(0..held_out.len()), |&place| {
                let excerpt = &held_out[place];
                let scored = nll(model, excerpt)?.narrow(0, warm, excerpt.n_samples() - warm)?;
                Ok(f64::from(scored.mean_all()?.to_scalar::<f32>()?))
            })?;
            Ok((means.iter().sum(), means.len()))
        },
    };
    lesson.teach(run, optimizer)
}

/// Makes the forecasts where the model is trained.
fn forecaster<'a>(
    device: &Device,
    spectrum: &'a Spectrum,
    config: &'a ForecastConfig,
) -> Result<Box<dyn Forecaster + 'a>, ForecastError> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Ok(Box::new(crate::cuda::GpuForecaster::new(device, spectrum, config)?)),
        _ => Ok(Box::new(CpuForecaster { spectrum, config })),
    }
}

/// Excerpts of the same length, on the CPU.
struct Batch {
    inputs: WaveInputs,
    codes: Vec<u32>,
    targets: Targets,
}

impl Batch {
    fn of(excerpts: &[Excerpt], model: &WaveTransformer) -> candle_core::Result<Self> {
        let inputs = Excerpt::batch(excerpts)?;
        let codes = model.codes(&inputs)?;
        Ok(Self { inputs, codes, targets: Targets::joined(excerpts.iter().map(|excerpt| &excerpt.targets)) })
    }

    /// -ln P of the samples, one excerpt after the other, in nats.
    fn nll(&self, model: &WaveTransformer) -> candle_core::Result<Tensor> {
        head::nll(&model.forward_coded(&self.inputs, &self.codes)?, &self.targets)
    }
}

/// -ln P of an excerpt's samples, `[n_samples]`, in nats.
pub(super) fn nll(model: &WaveTransformer, excerpt: &Excerpt) -> candle_core::Result<Tensor> {
    Batch::of(std::slice::from_ref(excerpt), model)?.nll(model)
}

/// Makes excerpts of recordings.
pub(super) struct Maker<'a> {
    pub config: &'a ModelConfig,
    pub data: &'a Dataset,
    pub quantizer: &'a ResidualQuantizer,
    /// By the dataset's spectrum and the model's settings.
    pub forecaster: &'a dyn Forecaster,
    pub history: usize,
    pub speed_variation: f64,
}

impl Maker<'_> {
    /// A training excerpt of any piece, speed, gain and noise.
    pub fn draw(&self, rng: &mut Rng) -> Result<Excerpt, TrainError> {
        let hop = self.config.plan.hop;
        let before = self.run_up();
        let frames = EXCERPT.min(self.data.longest().saturating_sub(before));
        let Pick { recording, first, speed } = self.data.pick(before + frames, self.speed_variation, rng);
        let gain = 10.0f32.powf((GAIN_DB.0 + (GAIN_DB.1 - GAIN_DB.0) * rng.uniform()) / 20.0);
        let quantised = rng.uniform() < QUANTISED;
        let codec = &self.config.codec;
        let noise = if rng.uniform() < NOISY { noise(codec.quantizer, rng.uniform()) } else { 0.0 };
        let mut tokens = recording.tokens_at(first * hop, (before + frames) * hop, speed, gain, codec)?;
        silence_some(&mut tokens, codec.silence(), rng);
        let mut hear = |&t: &Token| match noise {
            0.0 => t,
            noise => codec.moved(t, noise * rng.normal()),
        };
        let heard: Vec<Token> = tokens.iter().map(&mut hear).collect();
        self.excerpt(&tokens, &heard, quantised)
    }

    /// Excerpts of held-out pieces, with clean history and the plan as codebooks give it (what is generated by is refined, and a little nearer to the exact one).
    fn held_out(&self) -> Result<Vec<Excerpt>, TrainError> {
        let hop = self.config.plan.hop;
        let long = self.run_up() + EXCERPT;
        let pieces: Vec<&Recording> = self.data.validation.iter().filter(|r| r.n_frames(hop) >= long).collect();
        (0..if pieces.is_empty() { 0 } else { PLACES })
            .into_par_iter()
            .map(|i| {
                let piece = pieces[i % pieces.len()];
                let first = (piece.n_frames(hop) - long) * (2 * i + 1) / (2 * PLACES);
                self.clean(piece, first + self.run_up()..first + long)
            })
            .collect()
    }

    /// The plan frames `frames` of a piece, with clean history and the plan as codebooks give it (what is generated by is refined, and a little nearer to the exact one).
    pub fn clean(&self, piece: &Recording, frames: Range<usize>) -> Result<Excerpt, TrainError> {
        let hop = self.config.plan.hop;
        let tokens = piece.tokens((frames.start - self.run_up()) * hop..frames.end * hop, 1.0, &self.config.codec)?;
        self.excerpt(&tokens, &tokens, true)
    }

    /// Plan frames before an excerpt that the forecasts and the plan's window need.
    pub fn run_up(&self) -> usize {
        self.config.forecast.past_window.max(self.config.plan.window).div_ceil(self.config.plan.hop)
    }

    /// Everything after the run-up.
    fn excerpt(&self, tokens: &[Token], heard: &[Token], quantised: bool) -> Result<Excerpt, TrainError> {
        let spectrum = &self.data.spectrum;
        let mut plan = spectrum.analyse(&self.config.codec.decode_all(tokens));
        if quantised {
            plan = self.quantizer.decode_all(self.quantizer.encode_all(plan.view())?.view())?;
        }
        let frames = self.run_up()..plan.nrows();
        let forecasts = self.forecaster.forecasts(&self.config.codec.decode_all(heard), frames.start, plan.view())?;
        let piece = Piece { tokens, heard, plan: plan.view(), spectrum };
        Ok(Excerpt::of(self.config, self.history, &piece, frames, &forecasts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_excerpt_in_twenty_is_silent_somewhere() {
        let mut rng = Rng::new(5);
        let mut silenced = 0;
        for _ in 0..4000 {
            let mut tokens = [9; 300];
            silence_some(&mut tokens, 7, &mut rng);
            let edges = tokens.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(edges <= 2 && tokens.iter().all(|token| [7, 9].contains(token)));
            silenced += usize::from(tokens.contains(&7));
        }
        assert!((150..250).contains(&silenced), "{silenced} of 4000");
    }

    #[test]
    fn noise_moves_tokens_by_a_code_at_most_and_fine_ones_also_by_little() {
        for (quantizer, least) in [(Quantizer::Mulaw8, 0.3), (Quantizer::Pcm16, 0.02)] {
            let [low, middle, high] = [0.0, 0.5, 1.0].map(|uniform| noise(quantizer, uniform));
            assert_eq!((low, high), (least, MOST_NOISE));
            assert!((middle * middle - low * high).abs() < 1e-6);
        }
    }
}
