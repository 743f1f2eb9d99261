//! Training: recordings -> tokens -> codebooks, plan transformer and wave transformer -> one checkpoint.
//!
//! Nothing here is used for generation; training and engines meet only through [`crate::checkpoint`] (calibration, the
//! last step, listens to an engine play).

pub mod calibrate;
pub mod dataset;
pub mod lesson;
pub mod optimizer;
pub mod plan;
pub mod schedule;
pub mod wave;
pub mod workers;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use crate::audio::AudioError;
use crate::checkpoint::{Checkpoint, CheckpointError, Precision, arrays};
use crate::engine::EngineError;
use crate::forecast::ForecastError;
use crate::model::Model;
use crate::model::config::{ConfigError, GenerationSettings, ModelConfig};
use crate::model::params::{Params, ParamsError};
use crate::plan::{PlanError, ResidualQuantizer, Spectrum};
use dataset::Dataset;
use optimizer::AdamW;
use schedule::Budget;

/// Why training stopped without a model.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("no usable audio among {n_files} files: every piece needs at least {least_s:.1} s of sound")]
    NoData { n_files: usize, least_s: f64 },
    #[error(transparent)]
    Audio(#[from] AudioError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the plan")]
    Plan(#[from] PlanError),
    #[error("the forecasts")]
    Forecast(#[from] ForecastError),
    #[error("building the model")]
    Params(#[from] ParamsError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("playing for calibration")]
    Engine(#[from] EngineError),
    #[error("computing a step")]
    Tensor(#[from] candle_core::Error),
    #[error("the loss is not a number any more at step {step}; lower the learning rate or look at the data")]
    Diverged { step: usize },
    #[error("the thread that makes excerpts has died")]
    Thread,
    #[error("starting worker threads")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// What to train, on what, for how long.
#[derive(Clone, Debug)]
pub struct TrainSettings {
    pub config: ModelConfig,
    /// Audio files of any kind.
    pub files: Vec<PathBuf>,
    /// Where the checkpoint goes; it is rewritten at every evaluation.
    pub output: PathBuf,
    pub precision: Precision,
    pub budget: Budget,
    pub seed: u64,
    /// Worker threads; each computes its share of every batch.
    pub threads: usize,
    /// Peak learning rates.
    pub plan_learning_rate: f64,
    pub wave_learning_rate: f64,
    /// Share of the files that is held out, at least one when there are two or more.
    pub validation_share: f64,
    /// Fit the generation settings in free run at the end (minutes with the reference engine), or leave the defaults.
    pub calibrate: bool,
    /// For people, kept in the checkpoint.
    pub notes: BTreeMap<String, String>,
}

/// Which transformer an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Plan,
    Wave,
}

/// Progress, told as it happens; returning `Break` ends training early with a whole checkpoint.
#[derive(Clone, Debug)]
pub enum TrainEvent {
    /// A file that could not be used, and why.
    Skipped {
        path: PathBuf,
        why: String,
    },
    /// Files read: hours for training and validation.
    Data {
        train_files: usize,
        train_hours: f64,
        validation_files: usize,
        validation_hours: f64,
    },
    /// Codebooks fitted; what quantising leaves, dB rms.
    Codebooks {
        error_db: f32,
    },
    /// `bits` per frame (plan) or per sample (wave), averaged over the last steps.
    Step {
        part: Part,
        step: usize,
        done: f64,
        bits: f64,
        units_per_s: f64,
        elapsed: Duration,
    },
    /// On held-out pieces.
    Validation {
        part: Part,
        step: usize,
        bits: f64,
    },
    /// One setting tried in free run.
    Calibration {
        settings: GenerationSettings,
        adherence_db: f32,
        bias_db: f32,
        chosen: bool,
    },
    Saved {
        path: PathBuf,
    },
}

/// Receives [`TrainEvent`]s.
pub type Observer<'a> = dyn FnMut(TrainEvent) -> ControlFlow<()> + 'a;

/// Trains a model from nothing and leaves it in `settings.output`.
pub fn train(settings: &TrainSettings, observe: &mut Observer) -> Result<Checkpoint, TrainError> {
    settings.config.validate()?;
    let spectrum = Spectrum::new(settings.config.codec.sample_rate, &settings.config.plan)?;
    let mut data = Dataset::read(settings, &spectrum, observe)?;
    let quantizer = data.fit_codebooks(&settings.config.plan, settings.seed, observe)?;
    let mut params = Params::new(settings.seed);
    let model = Model::new(&mut params, &settings.config, spectrum.n_bands())?;
    let vars = params.into_vars();
    let mut run = Run { settings, spectrum: &spectrum, data: &data, quantizer: &quantizer, model: &model, observe };
    let (plan_vars, wave_vars) = vars.into_iter().partition(|(name, _)| name.starts_with("plan."));
    let (mut plan_optimizer, mut wave_optimizer) = (AdamW::new(plan_vars)?, AdamW::new(wave_vars)?);
    let mut going = plan::train(&mut run, &mut plan_optimizer)?;
    let snapshot = |plan: &AdamW, wave: &AdamW| -> Result<Checkpoint, TrainError> {
        let tensors: Vec<_> = plan.averages().chain(wave.averages()).collect();
        Ok(Checkpoint {
            config: settings.config.clone(),
            generation: GenerationSettings::default(),
            quantizer: quantizer.clone(),
            weights: arrays(tensors.iter().map(|(name, tensor)| (*name, *tensor)))?,
            notes: settings.notes.clone(),
        })
    };
    if going.is_continue() {
        going = wave::train(&mut run, &mut wave_optimizer, &mut |wave| {
            snapshot(&plan_optimizer, wave)?.save(&settings.output, settings.precision)?;
            Ok(())
        })?;
    }
    let mut checkpoint = snapshot(&plan_optimizer, &wave_optimizer)?;
    if going.is_continue() && settings.calibrate {
        checkpoint.generation = calibrate::calibrate(&checkpoint, &data, run.observe)?;
    }
    checkpoint.save(&settings.output, settings.precision)?;
    let _ = observe(TrainEvent::Saved { path: settings.output.clone() });
    Ok(checkpoint)
}

/// What every part of training works with.
pub struct Run<'a, 'o> {
    pub settings: &'a TrainSettings,
    pub spectrum: &'a Spectrum,
    pub data: &'a Dataset,
    pub quantizer: &'a ResidualQuantizer,
    pub model: &'a Model,
    pub observe: &'a mut Observer<'o>,
}
