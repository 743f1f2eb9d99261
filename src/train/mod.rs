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
pub mod resume;
pub mod scene;
pub mod schedule;
pub mod watch;
pub mod wave;
pub mod workers;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::Device;
use serde::Serialize;

use crate::checkpoint::{Checkpoint, CheckpointError, Precision};
use crate::codec::Codec;
use crate::corpus::{CorpusError, Findings};
use crate::engine::EngineError;
use crate::forecast::ForecastError;
use crate::metrics::Adherence;
use crate::model::Model;
use crate::model::config::{ConfigError, ModelConfig};
use crate::model::params::{Params, ParamsError};
use crate::plan::{PlanError, ResidualQuantizer, Spectrum};
use dataset::{Dataset, Sources};
use group::{Alone, Group};
use hash::Hash;
use optimizer::AdamW;
use resume::{Identity, StateFolder};
use schedule::{Budget, PLAN_SHARE, Schedule};
use watch::{History, Watch};

/// Why training stopped without a model.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("no usable audio among {n_files} files: every piece needs at least {least_s:.1} s of sound")]
    NoData { n_files: usize, least_s: f64 },
    #[error("interrupted while reading the recordings; the same command goes on")]
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

/// What to train, on what, for how long.
#[derive(Clone, Debug)]
pub struct TrainSettings {
    pub start: Start,
    /// What is trained, in this order.
    pub parts: Vec<Part>,
    /// Audio files of any kind, folders of them, corpora made by [`prepare`](crate::corpus::prepare()).
    pub files: Vec<PathBuf>,
    /// Where the checkpoint goes; it is rewritten whenever validation has improved. The state that a killed run goes on
    /// from lies beside it ([`resume`]) until training is over.
    pub output: PathBuf,
    /// Forget the state of an unfinished run.
    pub afresh: bool,
    pub precision: Precision,
    pub budget: Budget,
    pub seed: u64,
    /// What computes: the CPU or a GPU (feature `cuda`), which the threads then draw excerpts for.
    pub device: Device,
    /// Worker threads; each computes its share of every batch.
    pub threads: usize,
    /// Contexts or excerpts per step, over all processes.
    pub plan_batch: usize,
    pub wave_batch: usize,
    pub schedule: Schedule,
    /// Peak learning rates.
    pub plan_learning_rate: f64,
    pub wave_learning_rate: f64,
    /// Share of the files that is held out, at least one when there are two or more.
    pub validation_share: f64,
    /// Excerpts are played faster or slower by up to this share, pitch and all.
    pub speed_variation: f64,
    /// Steps between validations; `None`: what suits the part.
    pub validate_every: Option<usize>,
    /// Time between states on disk, which is what a kill costs at most.
    pub save_every: Duration,
    /// A part ends early after this many validations without gain.
    pub patience: Option<usize>,
    /// Fit the generation settings in free run at the end (minutes with the reference engine), or leave them.
    pub calibrate: bool,
    /// Draw losses and a free run at each evaluation, beside the output.
    pub pictures: bool,
    /// Use only so many pieces: for a dry run.
    pub most_pieces: Option<usize>,
    /// For people, kept in the checkpoint.
    pub notes: BTreeMap<String, String>,
}

/// What training begins with.
#[derive(Clone, Debug)]
pub enum Start {
    /// New weights, a pure function of the seed, and codebooks fitted to the data.
    New(Box<ModelConfig>),
    /// Weights, codebooks and generation settings of a model.
    From(Box<Checkpoint>),
    /// The same, but the codebooks are [translated](ResidualQuantizer::translated) from those of a model that heard through the
    /// codec `was`, and [refined](ResidualQuantizer::refined) to as many as `model` has.
    Refitted { model: Box<Checkpoint>, books: Box<ResidualQuantizer>, was: Codec },
}

impl TrainSettings {
    pub fn config(&self) -> &ModelConfig {
        match &self.start {
            Start::New(config) => config,
            Start::From(checkpoint) | Start::Refitted { model: checkpoint, .. } => &checkpoint.config,
        }
    }

    /// A part's share of a time budget.
    pub fn share(&self, part: Part) -> f64 {
        match (self.parts.len(), part) {
            (..2, _) => 1.0,
            (_, Part::Plan) => PLAN_SHARE,
            (_, Part::Wave) => 1.0 - PLAN_SHARE,
        }
    }

    /// What the losses depend on, short of the budget: a finished run may be given more of it.
    fn identity(&self, data: &Dataset) -> Identity {
        let names = |parts: &[Part]| parts.iter().map(|part| part.name()).collect::<Vec<_>>().join(" ");
        let start = match &self.start {
            Start::New(_) => "new".to_owned(),
            Start::From(checkpoint) | Start::Refitted { model: checkpoint, .. } => {
                let weights = checkpoint.weights.values().flat_map(|weight| weight.values().into_owned());
                let all = weights.chain(checkpoint.quantizer.books.iter().copied());
                format!("{:016x}", Hash::new().words(all.map(|w| w.to_bits().into())).value())
            }
        };
        [
            ("data", format!("{:016x}", data.hash())),
            ("model", serde_json::to_string(self.config()).unwrap_or_default()),
            ("init", start),
            ("parts", names(&self.parts)),
            ("seed", self.seed.to_string()),
            ("plan batch", self.plan_batch.to_string()),
            ("wave batch", self.wave_batch.to_string()),
            ("schedule", format!("{:?}", self.schedule)),
            ("plan learning rate", self.plan_learning_rate.to_string()),
            ("wave learning rate", self.wave_learning_rate.to_string()),
            ("speed variation", self.speed_variation.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// That, and what may change when a run goes on later but not between its processes.
    fn course(&self, identity: &Identity) -> Identity {
        let more = [
            ("minutes or steps", format!("{:?}", self.budget)),
            ("validations", format!("{:?}", self.validate_every)),
            ("patience", format!("{:?}", self.patience)),
            ("time between states", format!("{:?}", self.save_every)),
            ("calibration", self.calibrate.to_string()),
        ];
        let more = more.map(|(name, value)| (name.to_owned(), value));
        identity.clone().into_iter().chain(more).collect()
    }
}

/// One of the two transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Plan,
    Wave,
}

impl Part {
    /// `plan` or `wave`, as the names of its weights begin.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plan => "plan",
            Self::Wave => "wave",
        }
    }
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
    /// A killed run goes on: so many steps are already made.
    Resumed {
        part: Part,
        step: usize,
        finished: bool,
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
/// Killed at any moment and called again with the same settings and data, it goes on with the same losses.
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
    let mut data = open_data(group, settings, &spectrum, observe)?;
    let identity = settings.identity(&data);
    compare(group, &settings.course(&identity))?;
    let folder = StateFolder::open(group, &settings.output, &identity, settings.afresh)?;
    let mut checkpoint = match &settings.start {
        Start::From(checkpoint) => Checkpoint::clone(checkpoint),
        Start::Refitted { model, books, was } => {
            let n = config.plan.n_codebooks;
            let quantizer = folder.codebooks(|| data.refit_codebooks(books, was, n, settings.seed))?;
            Checkpoint { quantizer, ..Checkpoint::clone(model) }
        }
        Start::New(_) => {
            let quantizer = folder.codebooks(|| data.fit_codebooks(&config.plan, settings.seed))?;
            Checkpoint { quantizer, ..Checkpoint::untrained(config.clone(), settings.seed)? }
        }
    };
    checkpoint.notes.extend(settings.notes.clone());
    let error_db = data.encode_plans(&checkpoint.quantizer)?;
    let _ = observe(TrainEvent::Codebooks { error_db });
    let mut params = Params::new(settings.seed).on(&settings.device);
    let model = Model::new(&mut params, config, spectrum.n_bands())?;
    let vars = params.into_vars();
    let quantizer = checkpoint.quantizer.clone();
    let watches = settings.pictures && group.is_first();
    let watch = watches.then(|| Watch::new(&data, &quantizer, &settings.output)).transpose()?;
    let (mut plan_history, mut wave_history) = (History::new(), History::new());
    let mut going = ControlFlow::Continue(());
    for &part in &settings.parts {
        let of_part = vars.iter().filter(|(name, _)| name.split('.').next() == Some(part.name()));
        let mut optimizer = AdamW::new(of_part.map(|(name, var)| (name.clone(), var.clone())).collect())?;
        optimizer.begin_from(&checkpoint.weights).map_err(TrainError::Best)?;
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
        if going.is_break() {
            break;
        }
    }
    if going.is_continue() && settings.calibrate && settings.parts.contains(&Part::Wave) {
        checkpoint.generation = group.of_first(match group.is_first() {
            true => calibrate::calibrate(&checkpoint, &data, calibrate::EXCERPTS, observe)?,
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
    let sources = Sources {
        inputs: &settings.files,
        spool: &StateFolder::audio(&settings.output),
        seed: settings.seed,
        validation_share: Some(settings.validation_share),
        most: settings.most_pieces,
        threads: settings.threads,
    };
    let mut open = || match Dataset::open(&sources, &settings.config().codec, spectrum, observe) {
        Err(TrainError::Interrupted) => Ok(None),
        opened => opened.map(Some),
    };
    let mut data = None;
    if group.is_first() {
        let opened = open();
        if let Err(TrainError::NoData { .. }) = opened {
            StateFolder::remove_audio(&settings.output);
        }
        data = opened?;
    }
    if group.of_first(data.is_some())? && !group.is_first() {
        data = open()?;
    }
    let interrupted = group.any(data.is_none());
    data.filter(|_| !interrupted).ok_or(TrainError::Interrupted)
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
