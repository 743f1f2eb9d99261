//! `wavegen train --dry-run`: turns the settings of a training run into what it will take, by making a few of its steps.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use wavegen::atomic::Folder;
use wavegen::checkpoint::Checkpoint;
use wavegen::corpus::Corpus;
use wavegen::corpus::prepare::find;
use wavegen::metrics::median;
use wavegen::model::config::ModelConfig;
use wavegen::plan::Spectrum;
use wavegen::train::resume::StateFolder;
use wavegen::train::schedule::Budget;
use wavegen::train::{Part, Start, TrainError, TrainEvent, TrainSettings, train};

use super::common::{Refused, Talk, interrupted, print};
use super::{Outcome, memory};

/// Steps made of each part, and pieces that they are made on.
const STEPS: usize = 6;
const PIECES: usize = 4;
/// Copies of the frames that codebooks are fitted to, and most frames.
const FITTED_COPIES: u64 = 2;
const FITTED_FRAMES: f64 = 60_000.0;

/// What a run will take.
#[derive(Serialize)]
struct Prediction {
    preset: String,
    parameters: usize,
    plan_parameters: usize,
    /// By tier, coarse to fine, then what belongs to none.
    tier_parameters: Vec<usize>,
    shared_parameters: usize,
    plan_multiply_adds_per_sample: f64,
    /// By tier, coarse to fine; their sum is what a sample of the wave transformer takes.
    tier_multiply_adds_per_sample: Vec<f64>,
    /// Files that are not in a corpus.
    files: usize,
    /// Of all data; what is not in a corpus is taken to be as long as what was looked into, and audio as often.
    hours: f64,
    /// By part: seconds per step, steps, seconds. An evaluation is part of none.
    times: BTreeMap<&'static str, PartTime>,
    /// Where the system tells.
    memory_bytes: Option<u64>,
}

#[derive(Clone, Copy, Serialize)]
struct PartTime {
    seconds_per_step: f64,
    steps: u64,
    seconds: f64,
}

/// Makes a few steps in a temporary folder and says what all of them will take.
pub fn run(settings: &TrainSettings, talk: &Talk) -> Result<Outcome> {
    let folder = Folder::new().context("making a temporary folder")?;
    let found = find(&settings.files, &StateFolder::beside(&settings.output));
    let probe = TrainSettings {
        files: [&found.files[..], &found.corpora].concat(),
        output: folder.path().join("probe.safetensors"),
        budget: Budget::Steps(STEPS),
        most_pieces: Some(PIECES),
        calibrate: false,
        afresh: true,
        ..settings.clone()
    };
    talk.note(&format!("making {STEPS} steps of each part on {PIECES} pieces at most, in a temporary folder"));
    let mut seconds: BTreeMap<&'static str, Vec<f32>> = BTreeMap::new();
    let (mut last, mut mean_hours, mut looked_into, mut skipped) = (Instant::now(), 0.0, 0, 0);
    let mut refused = Refused::default();
    let probed = train(&probe, &mut |event| {
        match event {
            TrainEvent::Reading { .. } => looked_into += 1,
            TrainEvent::Skipped { why, .. } => {
                skipped += 1;
                refused.tell(&why, talk);
            }
            TrainEvent::Data { train_files, train_hours, validation_files, validation_hours, .. } => {
                mean_hours = (train_hours + validation_hours) / (train_files + validation_files).max(1) as f64;
            }
            TrainEvent::Step { part, .. } => seconds.entry(part.name()).or_default().push(last.elapsed().as_secs_f32()),
            _ => {}
        }
        last = Instant::now();
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if interrupted() || matches!(probed, Err(TrainError::Interrupted)) {
        return Ok(Outcome::Interrupted);
    }
    probed?;
    refused.summarise(talk);
    let corpora = found.corpora.iter().map(|folder| Corpus::open(folder)).collect::<Result<Vec<_>, _>>()?;
    let files = found.files.len();
    let usable = 1.0 - f64::from(skipped) / f64::from(looked_into).max(1.0);
    let hours = corpora.iter().map(Corpus::hours).sum::<f64>() + files as f64 * usable.max(0.0) * mean_hours;
    let spectrum = Spectrum::new(settings.config().codec.sample_rate, &settings.config().plan)?;
    let fitting = fitting(settings, spectrum.n_bands(), hours);
    let prediction = Prediction {
        times: times(settings, &seconds),
        memory_bytes: memory::peak().map(|peak| peak.max(fitting)),
        files,
        hours,
        ..sizes(settings.config())?
    };
    if !talk.json {
        prediction.print(settings)?;
    }
    talk.json(&prediction, false)?;
    Ok(Outcome::Done)
}

/// What depends neither on the machine nor on the data.
fn sizes(config: &ModelConfig) -> Result<Prediction> {
    let model = Checkpoint::untrained(config.clone(), 0)?;
    let wave = &config.wave_transformer;
    let tier_parameters: Vec<usize> =
        (0..wave.tiers.len()).map(|i| model.n_weights(&format!("wave.tiers.{i}."))).collect();
    let frame = config.plan_transformer.multiply_adds_per_frame(&config.plan, model.quantizer.n_bands());
    Ok(Prediction {
        preset: config.name.clone(),
        parameters: model.n_weights(""),
        plan_parameters: model.n_weights("plan."),
        shared_parameters: model.n_weights("wave.") - tier_parameters.iter().sum::<usize>(),
        tier_parameters,
        plan_multiply_adds_per_sample: frame / config.plan.hop as f64,
        tier_multiply_adds_per_sample: wave.tier_multiply_adds_per_sample(),
        files: 0,
        hours: 0.0,
        times: BTreeMap::new(),
        memory_bytes: None,
    })
}

fn times(settings: &TrainSettings, seconds: &BTreeMap<&'static str, Vec<f32>>) -> BTreeMap<&'static str, PartTime> {
    let time = |(&part, steps): (&&'static str, &Vec<f32>)| {
        // The first one waits for its excerpts and warms up.
        let seconds_per_step = f64::from(median(&steps[1.min(steps.len() - 1)..]));
        let share = if part == Part::Plan.name() { Part::Plan } else { Part::Wave };
        let (steps, seconds) = match settings.budget {
            Budget::Steps(steps) => (steps as u64, steps as f64 * seconds_per_step),
            Budget::Time(time) => {
                let seconds = time.as_secs_f64() * settings.share(share);
                ((seconds / seconds_per_step.max(1e-9)) as u64, seconds)
            }
        };
        (part, PartTime { seconds_per_step, steps, seconds })
    };
    seconds.iter().map(time).collect()
}

/// Bytes that fitting the codebooks to all of the data takes, beside what the program takes anyway.
fn fitting(settings: &TrainSettings, n_bands: usize, hours: f64) -> u64 {
    if let Start::From(_) = settings.start {
        return 0;
    }
    let config = settings.config();
    let per_hour = 3600.0 * f64::from(config.codec.sample_rate) / config.plan.hop as f64;
    let frames = FITTED_FRAMES.min(per_hour * hours);
    FITTED_COPIES * frames as u64 * n_bands as u64 * 4
}

impl Prediction {
    fn print(&self, settings: &TrainSettings) -> Result<()> {
        let millions = |n: usize| format!("{:.3} M", n as f64 / 1e6);
        let adds = |n: f64| format!("{:.4} M", n / 1e6);
        print(&format!("{:14} {:>12} {:>26}", self.preset, "parameters", "multiply-adds per sample"))?;
        let row = |name: &str, n: usize, work: String| print(&format!("  {name:12} {:>12} {work:>26}", millions(n)));
        row("plan", self.plan_parameters, adds(self.plan_multiply_adds_per_sample))?;
        let tiers = &settings.config().wave_transformer.tiers;
        for (i, tier) in tiers.iter().enumerate() {
            let work = adds(self.tier_multiply_adds_per_sample[i]);
            row(&format!("wave, hop {}", tier.hop), self.tier_parameters[i], work)?;
        }
        row("wave, shared", self.shared_parameters, String::new())?;
        let work = self.plan_multiply_adds_per_sample + self.tier_multiply_adds_per_sample.iter().sum::<f64>();
        row("all", self.parameters, adds(work))?;
        let guess =
            if self.files > 0 { format!(", guessed: {} files are in no corpus", self.files) } else { String::new() };
        print(&format!("data           {:.2} h{guess}", self.hours))?;
        for (part, time) in &self.times {
            print(&format!(
                "time, {part:8} {:.3} s per step (median of {} steps made here), {} steps, {}",
                time.seconds_per_step,
                STEPS - 1,
                time.steps,
                indicatif::HumanDuration(Duration::from_secs_f64(time.seconds.clamp(0.0, 1e9)))
            ))?;
        }
        match self.memory_bytes {
            Some(bytes) => print(&format!("memory         {} (measured in these steps)", memory::text(bytes)))?,
            None => print("memory         not measured: this system does not tell")?,
        }
        Ok(())
    }
}
