//! Trains the wave transformer on excerpts: negative log-likelihood of the next token, bits per sample.

use std::ops::{ControlFlow, Range};

use candle_core::{Device, Tensor};
use ndarray::s;
use rayon::prelude::*;

use super::dataset::{Dataset, Pick, Recording};
use super::lesson::Lesson;
use super::optimizer::AdamW;
use super::{Part, Run, TrainError, plan};
use crate::codec::{Quantizer, Token};
use crate::forecast::{CpuForecaster, ForecastConfig, ForecastError, Forecaster};
use crate::model::config::ModelConfig;
use crate::model::excerpt::{Batch, Excerpt, Piece};
use crate::model::head;
use crate::model::plan_transformer::PlanTransformer;
use crate::model::wave_transformer::WaveTransformer;
use crate::plan::{ResidualQuantizer, Spectrum};
use crate::rng::Rng;

/// Plan frames of an excerpt; about a second.
pub(super) const EXCERPT: usize = 32;
/// Frames that a plan transformer which refines them reads before those of an excerpt's forecasts, where the piece has them.
const READ: usize = 64;
/// Share of the excerpts whose history is noisy, whose plan is one as generated, and that are digital silence from one place
/// to another, as between the takes and under the fades of real recordings.
const NOISY: f32 = 0.1;
const AS_READ: f32 = 0.7;
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
    let reader = run.keeper.checkpoint.model()?.plan;
    let maker = Maker {
        config,
        data: run.data,
        quantizer: run.quantizer,
        reader: &reader,
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
        length: Excerpt::n_samples,
        join: &|excerpts| Ok(Batch::of(&excerpts, model)?),
        loss: &|batch| nll_of(model, batch)?.mean_all(),
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

/// -ln P of a batch's samples, one excerpt after the other, in nats.
fn nll_of(model: &WaveTransformer, batch: &Batch) -> candle_core::Result<Tensor> {
    head::nll(&batch.forward(model)?, &batch.targets)
}

/// -ln P of an excerpt's samples, `[n_samples]`, in nats.
pub(super) fn nll(model: &WaveTransformer, excerpt: &Excerpt) -> candle_core::Result<Tensor> {
    nll_of(model, &Batch::of(std::slice::from_ref(excerpt), model)?)
}

/// Makes excerpts of recordings.
pub(super) struct Maker<'a> {
    pub config: &'a ModelConfig,
    pub data: &'a Dataset,
    pub quantizer: &'a ResidualQuantizer,
    /// On the CPU; reads the plans.
    pub reader: &'a PlanTransformer,
    /// By the dataset's spectrum and the model's settings.
    pub forecaster: &'a dyn Forecaster,
    pub history: usize,
    pub speed_variation: f64,
}

impl Maker<'_> {
    /// A training excerpt of any piece, speed, gain and noise.
    pub fn draw(&self, rng: &mut Rng) -> Result<Excerpt, TrainError> {
        let hop = self.config.plan.hop;
        let before = self.config.run_up();
        let Pick { recording, first, frames, speed } = self.data.pick(before, EXCERPT, self.speed_variation, rng);
        let gain = 10.0f32.powf((GAIN_DB.0 + (GAIN_DB.1 - GAIN_DB.0) * rng.uniform()) / 20.0);
        let as_read = rng.uniform() < AS_READ;
        let codec = &self.config.codec;
        let noise = if rng.uniform() < NOISY { noise(codec.quantizer, rng.uniform()) } else { 0.0 };
        let read = self.read((first as f64 / speed) as usize);
        let begin = first * hop - ((read * hop) as f64 * speed).ceil() as usize;
        let mut tokens = recording.tokens_at(begin, (read + before + frames) * hop, speed, gain, codec)?;
        silence_some(&mut tokens, codec.silence(), rng);
        let mut hear = |&t: &Token| match noise {
            0.0 => t,
            noise => codec.moved(t, noise * rng.normal()),
        };
        let heard: Vec<Token> = tokens.iter().map(&mut hear).collect();
        self.excerpt(&tokens, &heard, read + before, as_read)
    }

    /// Excerpts of held-out pieces, with clean history and the plan as the model reads it.
    fn held_out(&self) -> Result<Vec<Excerpt>, TrainError> {
        let run_up = self.config.run_up();
        let long = run_up + EXCERPT;
        let places = self.data.places(&self.data.validation, long, PLACES);
        places.into_par_iter().map(|(piece, first)| self.clean(piece, first + run_up..first + long)).collect()
    }

    /// The plan frames `frames` of a piece, with clean history and the plan as the model reads it.
    pub fn clean(&self, piece: &Recording, frames: Range<usize>) -> Result<Excerpt, TrainError> {
        let hop = self.config.plan.hop;
        let run_up = self.config.run_up();
        let before = run_up + self.read(frames.start - run_up);
        let tokens = piece.tokens((frames.start - before) * hop..frames.end * hop, 1.0, &self.config.codec)?;
        self.excerpt(&tokens, &tokens, before, true)
    }

    /// Plan frames before those of the run-up that are read of `available` ones.
    fn read(&self, available: usize) -> usize {
        if self.reader.refines() { READ.min(available) } else { 0 }
    }

    /// Everything after `before` plan frames, the run-up at least.
    fn excerpt(&self, tokens: &[Token], heard: &[Token], before: usize, as_read: bool) -> Result<Excerpt, TrainError> {
        let spectrum = &self.data.spectrum;
        let codec = &self.config.codec;
        let mut plan = spectrum.analyse(&codec.decode_all(tokens));
        if as_read {
            plan = plan::as_read(self.reader, self.quantizer, plan.view())?;
        }
        let run_up = self.config.run_up();
        let first = before - run_up;
        let (tokens, heard) = (&tokens[first * spectrum.hop()..], &heard[first * spectrum.hop()..]);
        let plan = plan.slice(s![first.., ..]);
        let frames = run_up..plan.nrows();
        let forecasts = self.forecaster.forecasts(&codec.decode_all(heard), frames.start, plan)?;
        let piece = Piece { tokens, heard, plan, spectrum };
        Ok(Excerpt::of(self.config, self.history, &piece, frames, &forecasts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::corpus::Facts;
    use crate::engine::Engine;
    use crate::engine::reference::ReferenceEngine;
    use crate::model::plan_transformer::is_fitted;
    use crate::model::wave_transformer::PLAN_FRAMES;

    #[test]
    fn an_excerpts_plan_is_what_the_engine_reads() {
        let mut config = ModelConfig::preset("tiny").unwrap();
        config.plan_transformer.refine = true;
        let mut checkpoint = Checkpoint::untrained(config.clone(), 2).unwrap();
        let mut rng = Rng::new(4);
        for (name, weight) in &mut checkpoint.weights {
            if is_fitted(name) {
                *weight = ndarray::Array::from_shape_simple_fn(weight.shape(), || 0.05 * rng.normal()).into();
            }
        }
        let hop = config.plan.hop;
        let samples = (0..150 * hop).map(|_| (2000.0 * rng.normal()) as i16).collect();
        let piece = Recording::in_memory(samples, &Facts::default());
        let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan).unwrap();
        let data = Dataset { train: vec![], validation: vec![], codec: config.codec.clone(), spectrum };
        let model = checkpoint.model().unwrap();
        let maker = Maker {
            config: &config,
            data: &data,
            quantizer: &checkpoint.quantizer,
            reader: &model.plan,
            forecaster: &CpuForecaster { spectrum: &data.spectrum, config: &config.forecast },
            history: model.wave.history(),
            speed_variation: 0.0,
        };
        // With fewer frames before it than are read, with more, and with none.
        let run_up = config.run_up();
        for first in [run_up + 20, 120, run_up] {
            let excerpt = maker.clean(&piece, first..first + 3).unwrap();
            let begin = (first - run_up).saturating_sub(READ);
            let heard = piece.tokens(begin * hop..(first + 3) * hop, 1.0, &config.codec).unwrap();
            let read = ReferenceEngine::new(&checkpoint).unwrap().plan_of(&heard).unwrap();
            let frames = &read[first - begin - (PLAN_FRAMES - 1)..];
            let plan = excerpt.inputs().unwrap().plan.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let far = frames
                .iter()
                .flat_map(|frame| &frame.bands)
                .zip(&plan)
                .fold(0.0f32, |far, (a, b)| far.max((a - b).abs()));
            assert!(frames.len() * frames[0].bands.len() == plan.len() && far < 1e-4, "from {first}: {far}");
        }
    }

    #[test]
    fn an_excerpts_forecasts_are_those_of_who_has_heard_everything() {
        let mut config = ModelConfig::preset("tiny").unwrap();
        (config.forecast.tones, config.forecast.deconvolution) = (true, 4);
        config.forecast.past_window = config.plan.window;
        config.forecast.planned_order = config.plan.window / 2;
        config.validate().unwrap();
        let checkpoint = Checkpoint::untrained(config.clone(), 2).unwrap();
        let hop = config.plan.hop;
        let mut rng = Rng::new(4);
        let tone = |t: usize| 8000.0 * (t as f32 * 0.09).sin();
        let samples = (0..64 * hop).map(|t| (tone(t) + 200.0 * rng.normal()) as i16).collect();
        let piece = Recording::in_memory(samples, &Facts::default());
        let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan).unwrap();
        let data = Dataset { train: vec![], validation: vec![], codec: config.codec.clone(), spectrum };
        let model = checkpoint.model().unwrap();
        let forecaster = CpuForecaster { spectrum: &data.spectrum, config: &config.forecast };
        let maker = Maker {
            config: &config,
            data: &data,
            quantizer: &checkpoint.quantizer,
            reader: &model.plan,
            forecaster: &forecaster,
            history: model.wave.history(),
            speed_variation: 0.0,
        };
        let frames = 40..43;
        let tokens = piece.tokens(0..frames.end * hop, 1.0, &config.codec).unwrap();
        let heard = config.codec.decode_all(&tokens);
        let plan = plan::as_read(&model.plan, &checkpoint.quantizer, data.spectrum.analyse(&heard).view()).unwrap();
        let forecasts = forecaster.forecasts(&heard, frames.start, plan.view()).unwrap();
        let whole = Piece { tokens: &tokens, heard: &tokens, plan: plan.view(), spectrum: &data.spectrum };
        let expected = Excerpt::of(&config, maker.history, &whole, frames.clone(), &forecasts);
        let excerpt = maker.clean(&piece, frames).unwrap();
        assert!(format!("{excerpt:?}") == format!("{expected:?}"));
    }

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
