//! Training: recordings -> tokens -> codebooks, plan transformer and wave transformer -> one checkpoint.
//!
//! Nothing here is used for generation; training and engines meet only through [`crate::checkpoint`] (calibration, the
//! last step, listens to an engine play).

pub mod adapt;
pub mod calibrate;
pub mod dataset;
pub mod group;
pub mod grow;
pub(crate) mod hash;
pub mod lesson;
pub mod optimizer;
pub mod plan;
pub mod refine;
pub mod resume;
pub mod scene;
pub mod schedule;
mod settings;
pub mod watch;
pub mod wave;
pub mod workers;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::corpus::{CorpusError, Findings};
use crate::engine::EngineError;
use crate::forecast::ForecastError;
use crate::metrics::Adherence;
use crate::model::Model;
use crate::model::config::ConfigError;
use crate::model::params::{Params, ParamsError};
use crate::plan::{PlanError, ResidualQuantizer, Spectrum};
use dataset::{Dataset, Sources};
use group::{Alone, Group};
use optimizer::AdamW;
use resume::{Identity, StateFolder};
pub use settings::{Part, Start, TrainSettings};
use watch::{History, Watch};
use workers::Workers;

/// Why training stopped without a model.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("no usable audio among {n_files} files: every piece needs at least {least_s:.1} s of sound")]
    NoData { n_files: usize, least_s: f64 },
    #[error(
        "the longest piece has {longest_s:.1} s, and the model's windows alone take {least_s:.1} s before what it learns from; give longer ones, or a \
         preset of shorter windows"
    )]
    TooShort { longest_s: f64, least_s: f64 },
    #[error("interrupted before the first step; the same command goes on")]
    Interrupted,
    #[error(transparent)]
    Corpus(#[from] CorpusError),
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
    #[error("{folder}: holds the state of another training run (what differs: {what}); repeat that run's command to finish \
             it, or forget it with --afresh", folder = folder.display())]
    OtherRun { folder: PathBuf, what: String },
    #[error("{file}: is of no training run, whose state would go there; move it away, or give another output",
            file = file.display())]
    NoState { file: PathBuf },
    #[error("{folder}: another process trains this model now; wait for it, or give another output", folder = folder.display())]
    Busy { folder: PathBuf },
    #[error("{folder}: the state of training cannot be read or written ({source})", folder = folder.display())]
    State { folder: PathBuf, source: std::io::Error },
    #[error("a batch of {batch} cannot be shared by {size} processes that train on GPUs: each needs a part of it")]
    Batch { batch: usize, size: usize },
    #[error("the threads that draw excerpts have stopped")]
    NoItems,
    #[error("the best weights so far do not fit the model (tensor '{0}')")]
    Best(String),
    #[error(
        "the processes were not given the same to train (what differs: {what}); all of them need the same files and options"
    )]
    Ranks { what: String },
    #[error("what another process sent cannot be read")]
    Message(#[from] serde_json::Error),
    #[error("{path}: the picture cannot be written ({source})", path = path.display())]
    Picture { path: PathBuf, source: std::io::Error },
    #[error("starting worker threads")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Progress, told as it happens; returning `Break` ends training early with a whole checkpoint.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TrainEvent {
    /// A file that could not be used, and why.
    Skipped {
        path: PathBuf,
        why: String,
    },
    /// Files that are not in a corpus are decoded.
    Reading {
        done: usize,
        total: usize,
    },
    /// Something begins that may take minutes.
    Doing {
        what: &'static str,
    },
    /// All that there is: hours for training and validation, and how it sounds.
    Data {
        train_files: usize,
        train_hours: f64,
        validation_files: usize,
        validation_hours: f64,
        sound: Findings,
    },
    /// Codebooks fitted; what quantising leaves, dB rms.
    Codebooks {
        error_db: f32,
    },
    /// The plan transformer's map that refines frames was fitted.
    Refined(refine::Refined),
    /// A killed run goes on: so many steps are already made.
    Resumed {
        part: Part,
        step: usize,
        finished: bool,
        /// Least on held-out pieces so far.
        best_bits: Option<f64>,
    },
    /// After every step: `bits` per frame (plan) or per sample (wave) of its batch, the gradient's norm; a step is
    /// skipped, and the weights stay, when these are no numbers.
    Step {
        part: Part,
        step: usize,
        done: f64,
        bits: f64,
        norm: f64,
        learning_rate: f64,
        skipped: bool,
        /// Frames or samples seen, and how many hours of sound they are.
        units: u64,
        hours: f64,
        units_per_s: f64,
        /// Of this part, with the time of killed runs.
        elapsed_s: f64,
    },
    /// On held-out pieces, by the averaged weights (`bits`; whether they are the best so far) and by those of the last step.
    Validation {
        part: Part,
        step: usize,
        bits: f64,
        raw_bits: f64,
        best: bool,
    },
    /// The averaged weights played a scene, always the same, by the recording's plan: how far from it that is.
    FreeRun {
        part: Part,
        step: usize,
        adherence_db: f32,
        bias_db: f32,
    },
    /// A state or model that could not be written; training goes on.
    NotSaved {
        why: String,
    },
    /// One setting tried in free run.
    Calibration(calibrate::Tried),
    Saved {
        path: PathBuf,
    },
}

/// Receives [`TrainEvent`]s.
pub type Observer<'a> = dyn FnMut(TrainEvent) -> ControlFlow<()> + 'a;

/// Trains a model and leaves it in `settings.output`.
///
/// Killed at any moment and called again with the same settings and data, it goes on with the same losses, where the budget is
/// steps: of a time they depend on how fast the steps are.
pub fn train(settings: &TrainSettings, observe: &mut Observer) -> Result<Checkpoint, TrainError> {
    train_in(&Alone, settings, observe)
}

/// [`train`] as one of a group of processes, all with the same settings and files.
///
/// Each computes its share of every batch and validation; the losses are those of one process, to rounding. Only rank 0
/// writes; it decodes plain files before the others read them, beside the output. Every rank is told the same losses, and
/// ends when the observer of any of them breaks.
pub fn train_in(group: &dyn Group, settings: &TrainSettings, observe: &mut Observer) -> Result<Checkpoint, TrainError> {
    let config = settings.config();
    config.validate()?;
    let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan)?;
    if group.is_first() {
        StateFolder::check(&settings.output)?;
    }
    let mut data = open_data(group, settings, &spectrum, observe)?;
    let identity = settings.identity(&data);
    compare(group, &settings.course(&identity))?;
    let folder = StateFolder::open(group, &settings.output, &identity, settings.afresh)?;
    let mut checkpoint = match &settings.start {
        Start::From(checkpoint) => Checkpoint::clone(checkpoint),
        Start::Refitted { model, books, was } => {
            let quantizer = folder.codebooks(|| data.refit_codebooks(books, was, &config.plan, settings.seed))?;
            let mut grown = Checkpoint { quantizer, ..Checkpoint::clone(model) };
            grow::inherit(&mut grown, books);
            grown
        }
        Start::New(_) => {
            let quantizer = folder.codebooks(|| data.fit_codebooks(&config.plan, settings.seed))?;
            Checkpoint { quantizer, ..Checkpoint::untrained(config.clone(), settings.seed)? }
        }
    };
    checkpoint.quantizer = checkpoint.quantizer.with_hysteresis(&config.plan);
    checkpoint.notes.extend(settings.notes.clone());
    let run_up = config.run_up();
    if settings.parts.contains(&Part::Wave) && data.longest() <= run_up {
        let seconds = |frames| frames as f64 * spectrum.hop() as f64 / f64::from(config.codec.sample_rate);
        return Err(TrainError::TooShort { longest_s: seconds(data.longest()), least_s: seconds(run_up) });
    }
    begin(group, "reading all samples once, to check them", observe)?;
    data.check()?;
    let mut params = Params::new(settings.seed).on(&settings.device, settings.inner);
    let model = Model::new(&mut params, config, spectrum.n_bands())?;
    let vars = params.into_vars();
    let quantizer = checkpoint.quantizer.clone();
    let watches = settings.pictures && group.is_first();
    let watch = watches.then(|| Watch::new(&data, &settings.output)).transpose()?;
    let (mut plan_history, mut wave_history) = (History::new(), History::new());
    let mut going = ControlFlow::Continue(());
    for &part in &settings.parts {
        let (finished, refines) = (folder.is_finished(part)?, part == Part::Plan && config.plan_transformer.refine);
        let known = if finished && refines { folder.refined()? } else { None };
        if part == Part::Plan && (!finished || (refines && known.is_none())) {
            begin(group, "encoding the plans", observe)?;
            let error_db = data.encode_plans(&quantizer)?;
            let _ = observe(TrainEvent::Codebooks { error_db });
        }
        let mut optimizer = AdamW::of_part(part, &vars, &checkpoint.weights)?;
        let keeper = Keeper {
            settings,
            group,
            checkpoint: &mut checkpoint,
            watch: &watch,
            plan: &mut plan_history,
            wave: &mut wave_history,
        };
        let mut run = Run {
            settings,
            group,
            data: &data,
            quantizer: &quantizer,
            model: &model,
            folder: &folder,
            observe,
            keeper,
        };
        going = match part {
            Part::Plan => plan::train(&mut run, &mut optimizer)?,
            Part::Wave => wave::train(&mut run, &mut optimizer)?,
        };
        checkpoint.take(&optimizer)?;
        let fitted = match known {
            None if refines => {
                let _ = observe(TrainEvent::Doing { what: "fitting the map that refines plan frames" });
                let fit = || refine::fit(&checkpoint, &data, &Workers::new(settings.threads.max(1))?);
                // The others wait asleep.
                let fitted = group.of_first(group.is_first().then(fit).transpose()?)?;
                if let Some(fitted) = &fitted {
                    let _ = observe(TrainEvent::Refined(fitted.refined));
                    if going.is_continue() {
                        lesson::warn(folder.save_refined(fitted), observe);
                    }
                }
                fitted
            }
            known => known,
        };
        if let Some(fitted) = fitted {
            checkpoint.weights.extend(fitted.weights(spectrum.n_bands())?);
        }
        if going.is_break() {
            break;
        }
    }
    if going.is_continue() && settings.calibrate && settings.parts.contains(&Part::Wave) {
        let mut watch = |event| {
            let flow = observe(event);
            if flow.is_break() {
                going = ControlFlow::Break(());
            }
            flow
        };
        checkpoint.generation = group.of_first(match group.is_first() {
            true => calibrate::calibrate(&checkpoint, &data, calibrate::EXCERPTS, &mut watch)?,
            false => checkpoint.generation,
        })?;
    }
    if group.is_first() {
        checkpoint.save(&settings.output, settings.precision)?;
        if going.is_continue() {
            folder.remove()?;
        }
        let _ = observe(TrainEvent::Saved { path: settings.output.clone() });
    }
    Ok(checkpoint)
}

/// Opens the data: rank 0 decodes plain files while the others wait, who then find them prepared.
///
/// # Errors
/// Interrupted on any rank is interrupted on all of them.
fn open_data(
    group: &dyn Group,
    settings: &TrainSettings,
    spectrum: &Spectrum,
    observe: &mut Observer,
) -> Result<Dataset, TrainError> {
    let state = StateFolder::beside(&settings.output);
    let sources = Sources {
        inputs: &settings.files,
        state: &state,
        seed: settings.seed,
        validation_share: settings.validation_share,
        most: settings.most_pieces,
        threads: settings.threads,
    };
    let mut open = || match Dataset::open(&sources, &settings.config().codec, spectrum, observe) {
        Err(TrainError::Interrupted) => Ok(None),
        opened => opened.map(Some),
    };
    let mut data = None;
    if group.is_first() {
        let mut opened = open();
        if settings.afresh && opened.is_err() {
            // The audio that the forgotten run left may be of another rate.
            let _ = StateFolder::remove_audio(&state);
            opened = open();
        }
        if let Err(TrainError::NoData { .. }) = opened {
            let _ = StateFolder::remove_audio(&state);
        }
        data = opened?;
    }
    if group.of_first(data.is_some())? && !group.is_first() {
        data = open()?;
    }
    let interrupted = group.any(data.is_none());
    data.filter(|_| !interrupted).ok_or(TrainError::Interrupted)
}

/// Tells what may take minutes.
///
/// # Errors
/// Interrupted on any rank is interrupted on all of them.
fn begin(group: &dyn Group, what: &'static str, observe: &mut Observer) -> Result<(), TrainError> {
    let interrupted = observe(TrainEvent::Doing { what }).is_break();
    if group.any(interrupted) { Err(TrainError::Interrupted) } else { Ok(()) }
}

/// Makes sure, on every rank, that all ranks train the same.
fn compare(group: &dyn Group, identity: &Identity) -> Result<(), TrainError> {
    let first = group.of_first(identity.clone())?;
    let mut differing: Vec<f64> =
        identity.iter().map(|(name, value)| f64::from(u8::from(first.get(name) != Some(value)))).collect();
    group.sum_f64(&mut differing);
    let names: Vec<&str> =
        identity.keys().zip(differing).filter(|(_, ranks)| *ranks > 0.0).map(|(name, _)| name.as_str()).collect();
    match names.is_empty() {
        true => Ok(()),
        false => Err(TrainError::Ranks { what: names.join(", ") }),
    }
}

/// `OUTPUT.what`, for a model OUTPUT or OUTPUT.safetensors.
fn beside(output: &Path, what: &str) -> PathBuf {
    let model = output.extension().is_some_and(|extension| extension == "safetensors");
    let mut path = if model { output.with_extension("") } else { output.to_path_buf() }.into_os_string();
    path.push(".");
    path.push(what);
    path.into()
}

impl Checkpoint {
    fn take(&mut self, optimizer: &AdamW) -> Result<(), TrainError> {
        self.weights.extend(optimizer.averages()?);
        Ok(())
    }
}

/// Keeps the model that comes of it, and shows it.
pub struct Keeper<'a> {
    settings: &'a TrainSettings,
    group: &'a dyn Group,
    checkpoint: &'a mut Checkpoint,
    /// On rank 0 only.
    watch: &'a Option<Watch>,
    plan: &'a mut History,
    wave: &'a mut History,
}

impl Keeper<'_> {
    /// Takes the averaged weights, which are the best so far; rank 0 writes the model.
    pub fn keep(&mut self, optimizer: &AdamW) -> Result<(), TrainError> {
        self.checkpoint.take(optimizer)?;
        match self.group.is_first() {
            true => Ok(self.checkpoint.save(&self.settings.output, self.settings.precision)?),
            false => Ok(()),
        }
    }

    /// Remembers what evaluations of a part found.
    pub fn recall(&mut self, part: Part, history: &History) {
        match part {
            Part::Plan => self.plan.clone_from(history),
            Part::Wave => self.wave.clone_from(history),
        }
    }

    /// Draws the losses and lets the averaged weights play, on rank 0; how near they come to a plan, where something can be
    /// played.
    pub fn show(&self, part: Part, step: usize, optimizer: &AdamW) -> Result<Option<Adherence>, TrainError> {
        let Some(watch) = self.watch else { return Ok(None) };
        watch.draw_losses(self.plan, self.wave)?;
        let mut now = self.checkpoint.clone();
        now.take(optimizer)?;
        watch.listen(&now, part, step)
    }
}

/// What every part of training works with.
pub struct Run<'a, 'o> {
    pub settings: &'a TrainSettings,
    pub group: &'a dyn Group,
    pub data: &'a Dataset,
    pub quantizer: &'a ResidualQuantizer,
    pub model: &'a Model,
    pub folder: &'a StateFolder<'a>,
    pub observe: &'a mut Observer<'o>,
    pub keeper: Keeper<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_of_different_names_have_states_of_different_names() {
        let named = |output: &str| beside(Path::new(output), "training").to_string_lossy().into_owned();
        assert_eq!(["a/m.safetensors", "a/m.v1", "m"].map(named), ["a/m.training", "a/m.v1.training", "m.training"]);
    }
}
