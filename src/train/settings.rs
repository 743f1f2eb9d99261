//! How to train, and what two runs must have in common to be one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::Device;
use serde::Serialize;

use super::dataset::Dataset;
use super::hash::Hash;
use super::resume::Identity;
use super::schedule::{Budget, PLAN_SHARE, Schedule};
use crate::checkpoint::{Checkpoint, Precision};
use crate::codec::Codec;
use crate::model::config::ModelConfig;
use crate::model::ops::Inner;
use crate::plan::ResidualQuantizer;

/// What to train, on what, for how long.
#[derive(Clone, Debug)]
pub struct TrainSettings {
    pub start: Start,
    /// What is trained, in this order.
    pub parts: Vec<Part>,
    /// Audio files of any kind, folders of them, corpora made by [`prepare`](crate::corpus::prepare()).
    pub files: Vec<PathBuf>,
    /// Where the checkpoint goes; it is rewritten whenever validation has improved. The state that a killed run goes on
    /// from lies beside it ([`resume`](super::resume)) until training is over.
    pub output: PathBuf,
    /// Forget the state of an unfinished run.
    pub afresh: bool,
    pub precision: Precision,
    pub budget: Budget,
    pub seed: u64,
    /// What computes: the CPU or a GPU (feature `cuda`), which the threads then draw excerpts for.
    pub device: Device,
    /// What a GPU keeps between the maps of a block.
    pub inner: Inner,
    /// Worker threads; each computes its share of every batch.
    pub threads: usize,
    /// Contexts or excerpts per step, over all processes.
    pub plan_batch: usize,
    pub wave_batch: usize,
    pub schedule: Schedule,
    /// Peak learning rates.
    pub plan_learning_rate: f64,
    pub wave_learning_rate: f64,
    /// Share of the sound that is held out, at least one of two or more pieces; 0 for none.
    pub validation_share: f64,
    /// Excerpts are played faster or slower by up to this share, pitch and all.
    pub speed_variation: f64,
    /// Most rms of the white noise on the bands that the plan transformer hears in most of its contexts, dB.
    pub plan_noise_db: f32,
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

    /// What the losses depend on but for the budget, of which an unfinished part may be given more, and for what computes them, by
    /// which they differ in rounding.
    pub(super) fn identity(&self, data: &Dataset) -> Identity {
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
            ("plan noise", self.plan_noise_db.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// That, and what may change when a run goes on later but not between its processes.
    pub(super) fn course(&self, identity: &Identity) -> Identity {
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
