//! `wavegen bench train`: turns whole steps of training into samples and frames per second, beside the same steps composed of
//! candle's own operations.
//!
//! Both first compute the loss and the gradients of the same items, which are compared. Then they take turns, round after
//! round, so that whatever else the machine does falls on both; processor time says what a step costs where cores are shared.
#![allow(clippy::result_large_err, reason = "training's error is the library's, and nothing here is called often")]

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use serde::Serialize;
use wavegen::checkpoint::Checkpoint;
use wavegen::model::Model;
use wavegen::model::config::ModelConfig;
use wavegen::model::ops::Ops;
use wavegen::model::params::Params;
use wavegen::plan::Spectrum;
use wavegen::rng::Rng;
use wavegen::train::optimizer::AdamW;
use wavegen::train::workers::Workers;
use wavegen::train::{Part, TrainError};

use super::super::Outcome;
use super::super::check::chords;
use super::super::common::{Talk, Usage, catch_interrupt, interrupted, print};
use super::items::{Frames, Item, Source};
use super::machine::{Machine, cpu_seconds, gemm_gmac_s};

/// Seconds of sound that excerpts are drawn from.
const SOUND_S: f64 = 20.0;
/// Plan frames of an item that is measured, as in training, and of one that is compared.
const MEASURED: Frames = Frames { wave: 32, plan: 512 };
const COMPARED: Frames = Frames { wave: 6, plan: 48 };
/// How far losses and gradients may lie apart, relative.
const MOST_APART: f64 = 1e-3;
/// Multiply-adds of forward and backward pass together, in those of the forward pass.
const PASSES: f64 = 3.0;

/// How fast training is on this machine
///
/// A step: items drawn from synthetic sound, loss, gradients, AdamW. Random weights.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen bench train
  wavegen bench train --preset small --threads 2 --rounds 11 --json > train.json")]
pub struct Args {
    /// Sizes of the model: tiny, small, base, or a .toml file
    #[arg(long, default_value = "base")]
    preset: String,
    /// Worker threads; each computes whole items
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Rounds; figures are medians over them
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Contexts per step of the plan transformer
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1000))]
    plan_batch: u16,
    /// Excerpts per step of the wave transformer
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    wave_batch: u16,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    version: &'static str,
    preset: String,
    threads: u16,
    rounds: u16,
    /// Square matrix products by the same library, one thread, 10^9 multiply-adds/s: best of every round.
    gemm_gmac_s: Spread,
    parts: Vec<PartReport>,
}

#[derive(Serialize)]
struct PartReport {
    part: Part,
    /// Samples or frames.
    unit: &'static str,
    batch: usize,
    fused: CaseReport,
    plain: CaseReport,
    /// What plain takes, over what fused takes, round by round: processor time, wall time.
    cpu_speedup: Option<Spread>,
    wall_speedup: Spread,
    agreement: Agreement,
    passed: bool,
}

#[derive(Serialize)]
struct CaseReport {
    units_per_s: Spread,
    /// Processor time per unit, of all threads; `None` where the system does not say.
    cpu_us: Option<Spread>,
    /// Multiply-adds of the matrices (three passes) per second of processor time, 10^9.
    gmac_s: Option<f64>,
}

/// Relative distances of fused and plain.
#[derive(Clone, Copy, Serialize)]
struct Agreement {
    loss: f64,
    gradients: f64,
}

#[derive(Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
        Self { median: at(values.len() / 2), least: at(0), most: at(values.len().saturating_sub(1)) }
    }
}

/// A model that is trained, and what it took.
struct Learner {
    model: Model,
    ops: &'static Ops,
    vars: BTreeMap<String, Var>,
}

impl Learner {
    fn new(config: &ModelConfig, n_bands: usize, params: Params) -> Result<Self> {
        let mut params = params;
        let model = Model::new(&mut params, config, n_bands)?;
        let (ops, vars) = (params.ops(), params.into_vars());
        // Heads begin at zero, and no gradient passes them.
        let mut rng = Rng::new(2);
        for var in vars.values() {
            let noise = (0..var.elem_count()).map(|_| 0.02 * rng.normal());
            let noise = Tensor::from_iter(noise, &Device::Cpu)?.reshape(var.shape())?;
            var.set(&(var.as_tensor() + noise)?)?;
        }
        Ok(Self { model, ops, vars })
    }

    fn optimizer(&self, part: Part) -> Result<AdamW> {
        let of_part = self.vars.iter().filter(|(name, _)| name.split('.').next() == Some(part.name()));
        Ok(AdamW::new(of_part.map(|(name, var)| (name.clone(), var.clone())).collect())?)
    }

    /// Mean nats per unit.
    fn loss(&self, item: &Item) -> candle_core::Result<Tensor> {
        match item {
            Item::Wave(excerpt) => {
                let head = self.model.wave.forward(&excerpt.inputs()?)?;
                (self.ops.nll)(&head, &excerpt.targets)?.mean_all()
            }
            Item::Plan { tokens, bands, dropout } => self.model.plan.nll(tokens, bands, Some(dropout))?.mean_all(),
        }
    }

    fn gradients(&self, item: &Item) -> Result<(f32, GradStore), TrainError> {
        let loss = self.loss(item)?;
        Ok((loss.to_scalar()?, loss.backward()?))
    }
}

/// Seconds that one step took.
#[derive(Clone, Copy)]
struct Took {
    wall: f64,
    cpu: Option<f64>,
}

/// What is measured: one part, one way to compute it.
struct Case<'a> {
    learner: &'a Learner,
    optimizer: AdamW,
    took: Vec<Took>,
}

impl<'a> Case<'a> {
    fn new(learner: &'a Learner, part: Part) -> Result<Self> {
        Ok(Self { learner, optimizer: learner.optimizer(part)?, took: Vec::new() })
    }

    /// One step, as training makes it.
    fn round(&mut self, source: &Source, part: Part, batch: usize, workers: &Workers, threads: usize) -> Result<()> {
        let (before, begun) = (cpu_seconds(), Instant::now());
        let first = self.took.len() * batch;
        let items: Vec<usize> = (first..first + batch).collect();
        for group in items.chunks(threads) {
            let results = workers.map(group, |&item| {
                let item = source.draw(part, MEASURED, &mut Rng::new(item as u64))?;
                Ok(self.learner.gradients(&item)?.1)
            })?;
            for gradients in results {
                self.optimizer.add(&gradients, 1)?;
            }
        }
        self.optimizer.step(1e-4, true)?;
        let cpu = cpu_seconds().zip(before).map(|(after, before)| after - before);
        self.took.push(Took { wall: begun.elapsed().as_secs_f64(), cpu });
        Ok(())
    }

    fn report(&self, units: usize, multiply_adds: f64) -> CaseReport {
        let units = units as f64;
        let cpu: Option<Vec<f64>> = self.took.iter().map(|took| Some(1e6 * took.cpu? / units)).collect();
        let cpu_us = cpu.map(Spread::of);
        CaseReport {
            units_per_s: Spread::of(self.took.iter().map(|took| units / took.wall).collect()),
            cpu_us,
            gmac_s: cpu_us.map(|us| PASSES * multiply_adds / us.median / 1e3),
        }
    }
}

impl Agreement {
    fn between(fused: &Learner, plain: &Learner, part: Part, item: &Item) -> Result<Self> {
        let (loss, gradients) = fused.gradients(item)?;
        let (exact, exact_gradients) = plain.gradients(item)?;
        let (mut apart, mut power) = (0.0, 0.0);
        for (name, var) in plain.vars.iter().filter(|(name, _)| name.starts_with(part.name())) {
            let (Some(a), Some(b)) = (gradients.get(&fused.vars[name]), exact_gradients.get(var)) else { continue };
            apart += f64::from((a - b)?.sqr()?.sum_all()?.to_scalar::<f32>()?);
            power += f64::from(b.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(Self { loss: f64::from((loss - exact).abs() / exact.abs()), gradients: (apart / power).sqrt() })
    }
}

pub fn run(args: &Args) -> Result<Outcome> {
    let config = ModelConfig::preset(&args.preset).map_err(|e| Usage(e.to_string()))?;
    config.validate()?;
    catch_interrupt()?;
    let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan)?;
    let n_bands = spectrum.n_bands();
    let fused = Learner::new(&config, n_bands, Params::new(1))?;
    let plain = Learner::new(&config, n_bands, Params::new(1).plain())?;
    let source = Source {
        config: &config,
        quantizer: &Checkpoint::untrained(config.clone(), 1)?.quantizer,
        spectrum,
        sound: chords(&config.codec, (SOUND_S * f64::from(config.codec.sample_rate)) as usize),
        history: fused.model.wave.history(),
    };
    let threads = usize::from(args.threads);
    let workers = Workers::new(threads)?;
    let (mut gemm, mut parts) = (Vec::new(), Vec::new());
    for (part, batch) in [(Part::Wave, args.wave_batch.into()), (Part::Plan, args.plan_batch.into())] {
        let item = source.draw(part, COMPARED, &mut Rng::new(0))?;
        let agreement = Agreement::between(&fused, &plain, part, &item)?;
        let mut cases = [Case::new(&fused, part)?, Case::new(&plain, part)?];
        // The first round warms up and is not counted.
        for round in 0..=args.rounds {
            for case in &mut cases {
                if interrupted() {
                    return Ok(Outcome::Interrupted);
                }
                case.round(&source, part, batch, &workers, threads)?;
                if round == 0 {
                    case.took.clear();
                }
            }
            gemm.push(workers.map(&[()], |()| Ok(gemm_gmac_s()?))?[0]);
        }
        parts.push(PartReport::new(part, batch, (&config, n_bands), &cases, agreement));
    }
    let report = Report {
        machine: Machine::measure(&[]),
        version: env!("CARGO_PKG_VERSION"),
        preset: config.name.clone(),
        threads: args.threads,
        rounds: args.rounds,
        gemm_gmac_s: Spread::of(gemm),
        parts,
    };
    if !args.talk.json {
        report.print()?;
    }
    args.talk.json(&report, false)?;
    Ok(if report.parts.iter().all(|part| part.passed) { Outcome::Done } else { Outcome::Failed })
}

impl PartReport {
    fn new(
        part: Part,
        batch: usize,
        (config, n_bands): (&ModelConfig, usize),
        cases: &[Case; 2],
        agreement: Agreement,
    ) -> Self {
        let (unit, units, multiply_adds) = match part {
            Part::Wave => {
                ("sample", MEASURED.wave * config.plan.hop, config.wave_transformer.multiply_adds_per_sample())
            }
            Part::Plan => {
                let multiply_adds = config.plan_transformer.multiply_adds_per_frame(&config.plan, n_bands);
                ("frame", MEASURED.plan, multiply_adds)
            }
        };
        let [fused, plain] = cases;
        let speedups = |of: &dyn Fn(&Took) -> Option<f64>| -> Option<Spread> {
            let ratios: Option<Vec<f64>> =
                fused.took.iter().zip(&plain.took).map(|(fused, plain)| Some(of(plain)? / of(fused)?)).collect();
            ratios.map(Spread::of)
        };
        Self {
            part,
            unit,
            batch,
            fused: fused.report(batch * units, multiply_adds),
            plain: plain.report(batch * units, multiply_adds),
            cpu_speedup: speedups(&|took| took.cpu),
            wall_speedup: speedups(&|took| Some(took.wall)).unwrap_or(Spread::of(Vec::new())),
            agreement,
            passed: agreement.loss < MOST_APART && agreement.gradients < MOST_APART,
        }
    }

    fn print(&self) -> Result<()> {
        let Self { part, unit, batch, agreement, .. } = self;
        print("")?;
        print(&format!(
            "{} transformer, {batch} items a step; fused and plain apart: loss {:.1e}, gradients {:.1e}  {}",
            part.name(),
            agreement.loss,
            agreement.gradients,
            if self.passed { "ok" } else { "FAILED" }
        ))?;
        for (name, case) in [("fused", &self.fused), ("plain", &self.plain)] {
            let rate = case.units_per_s;
            print(&format!("  {name}  {:8.0} {unit}s/s ({:.0} to {:.0})", rate.median, rate.least, rate.most))?;
            if let (Some(cpu), Some(gmac_s)) = (case.cpu_us, case.gmac_s) {
                print(&format!(
                    "         {:8.1} us of processor time a {unit} ({:.1} to {:.1}), {gmac_s:.1} GMAC/s",
                    cpu.median, cpu.least, cpu.most
                ))?;
            }
        }
        let times = |spread: Spread| format!("x {:.2} ({:.2} to {:.2})", spread.median, spread.least, spread.most);
        let cpu = self.cpu_speedup.map_or(String::new(), |cpu| format!("{} in processor time, ", times(cpu)));
        Ok(print(&format!("  fused is {cpu}{} by the clock", times(self.wall_speedup)))?)
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        let Machine { cpu, cores, load, .. } = &self.machine;
        let load = load.map_or(String::new(), |load| format!(", load {load:.1}"));
        print(&format!("{cpu}, {cores} cores{load}"))?;
        print(&format!(
            "preset {}, threads {}, medians of {} rounds (least to most); matrix products alone {:.1} GMAC/s a thread ({:.1} to {:.1})",
            self.preset,
            self.threads,
            self.rounds,
            self.gemm_gmac_s.median,
            self.gemm_gmac_s.least,
            self.gemm_gmac_s.most
        ))?;
        self.parts.iter().try_for_each(PartReport::print)
    }
}
