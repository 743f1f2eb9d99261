//! `wavegen bench train`: turns whole steps of training into samples and frames per second, beside the same steps composed of
//! candle's own operations.
//!
//! Both first compute the loss and the gradients of the same items, which are compared. Then they take turns, round after
//! round, so that whatever else the machine does falls on both; processor time says what a step costs where cores are shared.
//!
//! On a GPU a step is all items at once, drawn before its time begins, as training draws them ahead on the CPU. There candle's own
//! operations are the CPU's, and only compared; what to hold the rates against is `benches/peers/train.py --device cuda`.
#![allow(clippy::result_large_err, reason = "training's error is the library's, and nothing here is called often")]

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use serde::Serialize;
use wavegen::checkpoint::Checkpoint;
use wavegen::model::Model;
use wavegen::model::config::ModelConfig;
use wavegen::model::ops::{Inner, Ops};
use wavegen::model::params::Params;
use wavegen::plan::Spectrum;
use wavegen::rng::Rng;
use wavegen::train::optimizer::AdamW;
use wavegen::train::workers::Workers;
use wavegen::train::{Part, TrainError};

use super::super::Outcome;
use super::super::check::chords;
use super::super::common::{Talk, Usage, catch_interrupt, interrupted, print};
use super::super::device::DeviceKind;
use super::gpu::nothing_measured;
use super::items::{Frames, Items, Source};
use super::machine::{Machine, cpu_seconds, gemm_gmac_s};

/// Seconds of sound that excerpts are drawn from.
const SOUND_S: f64 = 20.0;
/// Plan frames of an item that is measured, as in training, and of one that is compared.
const MEASURED: Frames = Frames { wave: 32, plan: 512 };
const COMPARED: Frames = Frames { wave: 6, plan: 48 };
/// How far losses and gradients may lie apart, relative: in f32, where products round their factors to 10 bits (TF32), and where
/// activations are rounded to 7 (bf16).
const MOST_APART: f64 = 1e-3;
const MOST_TF32_APART: f64 = 1e-2;
const MOST_BF16_APART: f64 = 5e-2;
/// Multiply-adds of forward and backward pass together, in those of the forward pass.
const PASSES: f64 = 3.0;

/// How fast training is on this machine
///
/// A step: items drawn from synthetic sound, loss, gradients, AdamW. Random weights.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen bench train
  wavegen bench train --preset small --threads 2 --rounds 11 --json > train.json
  wavegen bench train --device cuda --bf16 --wave-batch 16 --plan-batch 32")]
pub struct Args {
    /// Sizes of the model: tiny, small, base, or a .toml file
    #[arg(long, default_value = "base")]
    preset: String,
    /// What computes; `cuda` needs a program built for it and an NVIDIA GPU, and wants batches of 16 or more
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// As `train --bf16`
    #[arg(long)]
    bf16: bool,
    /// Worker threads on the CPU; each computes whole items
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
    device: &'static str,
    threads: u16,
    rounds: u16,
    /// Square matrix products by the same library in the elements of a block's, one thread, 10^9 multiply-adds/s: best of every round.
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
    /// Only where it runs on the same device.
    plain: Option<CaseReport>,
    /// What plain takes, over what fused takes, round by round: processor time, wall time.
    cpu_speedup: Option<Spread>,
    wall_speedup: Option<Spread>,
    agreement: Agreement,
    passed: bool,
}

#[derive(Serialize)]
struct CaseReport {
    units_per_s: Spread,
    /// Processor time per unit, of all threads; `None` where the system does not say.
    cpu_us: Option<Spread>,
    /// Multiply-adds of the matrices (three passes) per second, 10^9: of processor time, on a GPU by the clock.
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
    device: Device,
    vars: BTreeMap<String, Var>,
}

impl Learner {
    fn new(config: &ModelConfig, n_bands: usize, params: Params) -> Result<Self> {
        let mut params = params;
        let model = Model::new(&mut params, config, n_bands)?;
        let (ops, device) = (params.ops(), params.device().clone());
        let vars = params.into_vars();
        // Heads begin at zero, and no gradient passes them.
        let mut rng = Rng::new(2);
        for var in vars.values() {
            let noise = (0..var.elem_count()).map(|_| 0.02 * rng.normal());
            let noise = Tensor::from_iter(noise, &device)?.reshape(var.shape())?;
            var.set(&(var.as_tensor() + noise)?)?;
        }
        Ok(Self { model, ops, device, vars })
    }

    fn optimizer(&self, part: Part) -> Result<AdamW> {
        let of_part = self.vars.iter().filter(|(name, _)| name.split('.').next() == Some(part.name()));
        Ok(AdamW::new(of_part.map(|(name, var)| (name.clone(), var.clone())).collect())?)
    }

    /// Mean nats per unit.
    fn loss(&self, items: &Items) -> candle_core::Result<Tensor> {
        match items {
            Items::Wave(batch) => (self.ops.nll)(&batch.forward(&self.model.wave)?, &batch.targets)?.mean_all(),
            Items::Plan { tokens, bands, dropout } => {
                let (bands, dropout) = (bands.to_device(&self.device)?, dropout.to_device(&self.device)?);
                self.model.plan.nll(tokens, &bands, Some(&dropout))?.mean_all()
            }
        }
    }

    fn gradients(&self, items: &Items) -> Result<(f32, GradStore), TrainError> {
        let loss = self.loss(items)?;
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
        let first = self.took.len() * batch;
        let numbers: Vec<usize> = (first..first + batch).collect();
        let drawn = if self.learner.device.is_cpu() { None } else { Some(source.draw(part, MEASURED, &numbers)?) };
        let (before, begun) = (cpu_seconds(), Instant::now());
        if let Some(items) = drawn {
            self.optimizer.add(&self.learner.gradients(&items)?.1, batch)?;
        } else {
            for group in numbers.chunks(threads) {
                let results = workers.map(group, |&number| {
                    let item = source.draw(part, MEASURED, &[number])?;
                    Ok(self.learner.gradients(&item)?.1)
                })?;
                for gradients in results {
                    self.optimizer.add(&gradients, 1)?;
                }
            }
        }
        self.optimizer.step(1e-4, true)?;
        self.learner.device.synchronize()?;
        let cpu = cpu_seconds().zip(before).map(|(after, before)| after - before);
        self.took.push(Took { wall: begun.elapsed().as_secs_f64(), cpu });
        Ok(())
    }

    fn report(&self, units: usize, multiply_adds: f64) -> CaseReport {
        let units = units as f64;
        let cpu: Option<Vec<f64>> = self.took.iter().map(|took| Some(1e6 * took.cpu? / units)).collect();
        let cpu_us = cpu.map(Spread::of);
        let units_per_s = Spread::of(self.took.iter().map(|took| units / took.wall).collect());
        let busy_us =
            if self.learner.device.is_cpu() { cpu_us.map(|us| us.median) } else { Some(1e6 / units_per_s.median) };
        CaseReport { units_per_s, cpu_us, gmac_s: busy_us.map(|us| PASSES * multiply_adds / us / 1e3) }
    }
}

impl Agreement {
    fn between(fused: &Learner, plain: &Learner, part: Part, items: &Items) -> Result<Self> {
        let (loss, gradients) = fused.gradients(items)?;
        let (exact, exact_gradients) = plain.gradients(items)?;
        let (mut apart, mut power) = (0.0, 0.0);
        for (name, var) in plain.vars.iter().filter(|(name, _)| name.starts_with(part.name())) {
            let (a, b) = match (gradients.get(&fused.vars[name]), exact_gradients.get(var)) {
                (Some(a), Some(b)) => (a, b),
                (None, None) => continue,
                (Some(_), None) => bail!("{name}: only fused has a gradient"),
                (None, Some(_)) => bail!("{name}: only plain has a gradient"),
            };
            apart += f64::from((a.to_device(b.device())? - b)?.sqr()?.sum_all()?.to_scalar::<f32>()?);
            power += f64::from(b.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(Self { loss: f64::from((loss - exact).abs() / exact.abs()), gradients: (apart / power).sqrt() })
    }
}

pub fn run(args: &Args) -> Result<Outcome> {
    let device = match args.device.open() {
        Ok(device) => device,
        Err(e) => return nothing_measured(&args.talk, e),
    };
    let (inner, element, most_apart) = match (device.is_cpu(), args.bf16) {
        (true, false) => (Inner::F32, DType::F32, MOST_APART),
        (true, true) => return Err(Usage("--bf16 is for --device cuda: the CPU trains in f32".into()).into()),
        (false, false) => (Inner::F32, DType::F32, MOST_TF32_APART),
        (false, true) => (Inner::Bf16, DType::BF16, MOST_BF16_APART),
    };
    let config = ModelConfig::preset(&args.preset).map_err(|e| Usage(e.to_string()))?;
    config.validate()?;
    catch_interrupt();
    let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan)?;
    let n_bands = spectrum.n_bands();
    let fused = Learner::new(&config, n_bands, Params::new(1).on(&device, inner))?;
    let plain = Learner::new(&config, n_bands, Params::new(1).plain())?;
    let source = Source {
        config: &config,
        quantizer: &Checkpoint::untrained(config.clone(), 1)?.quantizer,
        spectrum,
        sound: chords(&config.codec, (SOUND_S * f64::from(config.codec.sample_rate)) as usize),
        wave: &fused.model.wave,
    };
    let threads = usize::from(args.threads);
    let workers = Workers::new(threads)?;
    let (mut gemm, mut parts) = (Vec::new(), Vec::new());
    for (part, batch) in [(Part::Wave, args.wave_batch.into()), (Part::Plan, args.plan_batch.into())] {
        let agreement = Agreement::between(&fused, &plain, part, &source.draw(part, COMPARED, &[0])?)?;
        let mut cases = vec![Case::new(&fused, part)?];
        if device.is_cpu() {
            cases.push(Case::new(&plain, part)?);
        }
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
            gemm.push(workers.map(&[()], |()| Ok(gemm_gmac_s(&device, element)?))?[0]);
        }
        parts.push(PartReport::new(part, batch, (&config, n_bands), &cases, agreement, most_apart));
    }
    let report = Report {
        machine: Machine::measure(&[]),
        version: env!("CARGO_PKG_VERSION"),
        preset: config.name.clone(),
        device: args.device.name(args.bf16),
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
        cases: &[Case],
        agreement: Agreement,
        most_apart: f64,
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
        let (fused, plain) = (&cases[0], cases.get(1));
        let speedups = |of: &dyn Fn(&Took) -> Option<f64>| -> Option<Spread> {
            let pairs = fused.took.iter().zip(&plain?.took);
            pairs.map(|(fused, plain)| Some(of(plain)? / of(fused)?)).collect::<Option<_>>().map(Spread::of)
        };
        Self {
            part,
            unit,
            batch,
            fused: fused.report(batch * units, multiply_adds),
            plain: plain.map(|plain| plain.report(batch * units, multiply_adds)),
            cpu_speedup: speedups(&|took| took.cpu),
            wall_speedup: speedups(&|took| Some(took.wall)),
            agreement,
            passed: agreement.loss < most_apart && agreement.gradients < most_apart,
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
        for (name, case) in [("fused", Some(&self.fused)), ("plain", self.plain.as_ref())] {
            let Some(case) = case else { continue };
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
        let Some(wall) = self.wall_speedup else { return Ok(()) };
        Ok(print(&format!("  fused is {cpu}{} by the clock", times(wall)))?)
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        let Machine { cpu, cores, load, .. } = &self.machine;
        let load = load.map_or(String::new(), |load| format!(", load {load:.1}"));
        print(&format!("{cpu}, {cores} cores{load}"))?;
        print(&format!(
            "preset {}, {}, threads {}, medians of {} rounds (least to most); matrix products alone {:.1} GMAC/s a thread ({:.1} to {:.1})",
            self.preset,
            self.device,
            self.threads,
            self.rounds,
            self.gemm_gmac_s.median,
            self.gemm_gmac_s.least,
            self.gemm_gmac_s.most
        ))?;
        self.parts.iter().try_for_each(PartReport::print)
    }
}
