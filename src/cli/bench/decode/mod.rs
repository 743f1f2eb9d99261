//! `wavegen bench decode`: turns engines, instruction sets, models and batch sizes into samples per second.
//!
//! Every case first plays two frames that are compared with the scalar engine's; then all cases of a model are measured
//! in turn, round after round, so that whatever else the machine does falls on all of them. Figures by the clock are medians of
//! rounds; processor time comes in ticks of 10 ms, too coarse for a round, and is summed over all of them.

mod report;

use std::time::Instant;

use anyhow::Result;
use wavegen::checkpoint::Checkpoint;
use wavegen::codec::Token;
use wavegen::engine::Engine;
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::model::config::ModelConfig;
use wavegen::plan::PlanFrame;
use wavegen::simd::Isa;

use super::super::Outcome;
use super::super::check::{Distance, chords, costs, draws, play, play_in_lockstep};
use super::super::common::{ModelArgs, Talk, Usage, catch_interrupt, interrupted, seconds};
use super::super::memory;
use super::gpu;
use super::machine::{Machine, cpu_seconds};
use report::{CaseReport, ModelReport, Quantiles, Report};

/// Plan frames that every case plays first: to warm up, and to be compared.
const CHECKED_FRAMES: usize = 2;
/// Plan frames that the reference engine plays in a round: it is slow, and its time per sample hardly varies.
const REFERENCE_FRAMES: usize = 8;
/// Seconds of sound in a round unless told otherwise: of five rounds' processor time a tick is about 1 % or less.
const SECONDS: f64 = 3.0;
/// Seconds of prompt.
const PROMPT_S: f64 = 2.0;
/// Seconds that distributions are compared over.
const COMPARED_S: f64 = 1.0;
/// Most that distributions may differ, mean absolute bits per sample.
const MOST_F32_BITS: f64 = 0.002;
const MOST_INT8_BITS: f64 = 0.1;

/// How fast every engine plays on this machine
///
/// One core unless candle takes more. Models beside the given one are presets with random weights. Times of single steps
/// count what a plan frame costs to its first sample; they are those of streams that play alone.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen bench decode
  wavegen bench decode --engine cuda --rounds 11 --json > gpu.json
  wavegen bench decode --presets none --batches 1,4,16 --rounds 11
  wavegen bench decode --model my.safetensors --isas avx2 --json > decode.json")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What computes: the CPU's engines and the reference, or a GPU
    #[arg(long, value_enum, default_value = "cpu")]
    engine: Engines,
    /// Presets to measure beside the model, with random weights; `none` for none [default: small,base]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    presets: Option<Vec<String>>,
    /// Instruction sets [default: all that this machine has but `scalar`, which takes minutes]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = isa)]
    isas: Option<Vec<Isa>>,
    /// Streams that play in lockstep [default: 1,8; on a GPU 1,16,256,2048]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=4096))]
    batches: Option<Vec<u16>>,
    /// Seconds of sound in a round, all streams together [default: 3]
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Rounds; figures by the clock are medians over them, those of processor time sums
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Leave the reference engine out
    #[arg(long)]
    no_reference: bool,
    #[command(flatten)]
    talk: Talk,
}

/// Whose engines are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Engines {
    Cpu,
    /// With the model and the preset `base`, and neither --presets, --isas, --seconds nor --no-reference; without a GPU it says so
    Cuda,
}

fn isa(name: &str) -> Result<Isa, String> {
    let available = Isa::available();
    let found = Isa::from_name(name).filter(|isa| available.contains(isa));
    let names: Vec<&str> = available.into_iter().map(Isa::name).collect();
    found.ok_or_else(|| format!("this machine has {}", names.join(", ")))
}

enum Streams {
    Cpu(Vec<CpuEngine>),
    Reference(Box<ReferenceEngine>),
}

struct Case {
    engine: &'static str,
    isa: Option<Isa>,
    streams: Streams,
    memory: Option<u64>,
    prepare_ms: f64,
    prefill_ms: f64,
    tokens_as_scalar: Option<bool>,
    distance: Option<Distance>,
    /// Samples per second, one value a round.
    rounds: Vec<f64>,
    /// Of all rounds.
    n_samples: usize,
    core_s: Option<f64>,
    steps_us: Vec<f64>,
    frame: usize,
}

pub fn run(args: &Args) -> Result<Outcome> {
    if args.engine == Engines::Cuda {
        let Args { model, batches, rounds, talk, presets, isas, seconds, no_reference, engine: _ } = args;
        let unused = [
            ("--presets", presets.is_some()),
            ("--isas", isas.is_some()),
            ("--seconds", seconds.is_some()),
            ("--no-reference", *no_reference),
        ];
        if let Some((option, _)) = unused.into_iter().find(|(_, given)| *given) {
            return Err(Usage(format!("{option} is for --engine cpu; leave it out")).into());
        }
        return gpu::generation(&gpu::Generation { model, batches: batches.as_deref(), rounds: *rounds, talk });
    }
    let mut models = vec![args.model.load()?];
    let presets = args.presets.clone().unwrap_or_else(|| ["small", "base"].map(String::from).into());
    for name in presets.iter().filter(|name| *name != "none") {
        let config = ModelConfig::preset(name).map_err(|e| Usage(e.to_string()))?;
        models.push(Checkpoint::untrained(ModelConfig { name: format!("{name}, random"), ..config }, 1)?);
    }
    catch_interrupt();
    let isas = args.isas.clone().unwrap_or_else(|| match Isa::available() {
        all if all.len() > 1 => all[1..].to_vec(),
        all => all,
    });
    let machine = Machine::measure(&isas);
    let mut report = Report {
        machine,
        version: env!("CARGO_PKG_VERSION"),
        seconds: args.seconds.unwrap_or(SECONDS),
        rounds: args.rounds,
        models: Vec::new(),
    };
    for checkpoint in &models {
        let Some(model) = measure_model(args, checkpoint, &isas, &report)? else {
            return Ok(Outcome::Interrupted);
        };
        report.models.push(model);
    }
    if !args.talk.json {
        report.print()?;
    }
    args.talk.json(&report, false)?;
    let passed = report.models.iter().flat_map(|model| &model.cases).all(|case| case.passed);
    Ok(if passed { Outcome::Done } else { Outcome::Failed })
}

/// All cases of a model; `None` when interrupted.
fn measure_model(args: &Args, checkpoint: &Checkpoint, isas: &[Isa], report: &Report) -> Result<Option<ModelReport>> {
    let config = &checkpoint.config;
    let rate = f64::from(config.codec.sample_rate);
    let prompt = chords(&config.codec, (PROMPT_S * rate) as usize);
    let compared_frames = (COMPARED_S * rate / config.plan.hop as f64) as usize;
    let compared = chords(&config.codec, compared_frames * config.plan.hop);
    let mut reference = Case::reference(checkpoint, &prompt)?;
    let exact = match &mut reference.streams {
        Streams::Reference(engine) => costs(engine.as_mut(), &compared)?,
        Streams::Cpu(_) => Vec::new(),
    };
    reference.prefill(&prompt)?;
    let batches = args.batches.as_deref().unwrap_or(&[1, 8]);
    let mut cases = Vec::new();
    for precision in [Precision::Int8, Precision::F32] {
        let mut scalar = CpuEngine::new(checkpoint, &CpuOptions { isa: Isa::Scalar, precision })?;
        scalar.prefill(&prompt)?;
        let begun = scalar.snapshot()?;
        let most_streams = batches.iter().copied().max().unwrap_or(1);
        let alone = (0..most_streams.into()).map(|stream| {
            scalar.rewind(&begun)?;
            play(&mut scalar, stream, 0..CHECKED_FRAMES)
        });
        let expected = alone.collect::<Result<Vec<_>>>()?;
        for &isa in isas {
            for &batch in batches {
                if interrupted() {
                    return Ok(None);
                }
                let mut case = Case::cpu(checkpoint, isa, precision, batch.into())?;
                case.distance = Some(case.distance(&exact, &compared)?);
                case.prefill(&prompt)?;
                case.tokens_as_scalar = Some(case.begin()? == expected[..batch.into()]);
                cases.push(case);
            }
        }
    }
    if !args.no_reference {
        cases.push(reference);
    }
    let n_frames = (report.seconds * rate / config.plan.hop as f64).round() as usize;
    let bar = args.talk.bar(u64::from(args.rounds) * cases.len() as u64, "{bar:40} {msg} {percent} %, {eta} left");
    bar.set_message(config.name.clone());
    for _ in 0..args.rounds {
        for case in &mut cases {
            if interrupted() {
                return Ok(None);
            }
            case.round(n_frames)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let reference_speed = cases.iter().find(|case| case.isa.is_none()).map(Case::speed);
    Ok(Some(ModelReport {
        name: config.name.clone(),
        multiply_adds: config.wave_transformer.multiply_adds_per_sample(),
        plan_parameters: checkpoint.n_weights("plan."),
        wave_parameters: checkpoint.n_weights("wave."),
        cases: cases.into_iter().map(|case| case.report(checkpoint, &report.machine, reference_speed)).collect(),
    }))
}

impl Case {
    fn new(engine: &'static str, isa: Option<Isa>, make: impl FnOnce() -> Result<Streams>) -> Result<Self> {
        let (before, begun) = (memory::resident(), Instant::now());
        let streams = make()?;
        let prepare_ms = 1e3 * begun.elapsed().as_secs_f64();
        let memory = memory::resident().zip(before).map(|(after, before)| after.saturating_sub(before));
        Ok(Self {
            engine,
            isa,
            streams,
            memory,
            prepare_ms,
            prefill_ms: 0.0,
            tokens_as_scalar: None,
            distance: None,
            rounds: Vec::new(),
            n_samples: 0,
            core_s: Some(0.0),
            steps_us: Vec::new(),
            frame: 0,
        })
    }

    fn cpu(checkpoint: &Checkpoint, isa: Isa, precision: Precision, batch: usize) -> Result<Self> {
        let name = match precision {
            Precision::Int8 => "cpu",
            Precision::F32 => "cpu-f32",
        };
        Self::new(name, Some(isa), || {
            let engine = CpuEngine::new(checkpoint, &CpuOptions { isa, precision })?;
            Ok(Streams::Cpu(if batch == 1 { vec![engine] } else { engine.fork_in_lockstep(batch)? }))
        })
    }

    fn reference(checkpoint: &Checkpoint, prompt: &[Token]) -> Result<Self> {
        let mut case =
            Self::new("reference", None, || Ok(Streams::Reference(Box::new(ReferenceEngine::new(checkpoint)?))))?;
        case.prefill(prompt)?;
        Ok(case)
    }

    /// Brings all streams to the end of `prompt`.
    fn prefill(&mut self, prompt: &[Token]) -> Result<()> {
        let begun = Instant::now();
        let state = match &mut self.streams {
            Streams::Reference(engine) => {
                engine.prefill(prompt)?;
                Vec::new()
            }
            Streams::Cpu(engines) => {
                engines[0].prefill(prompt)?;
                engines[0].save()?
            }
        };
        self.prefill_ms = 1e3 * begun.elapsed().as_secs_f64();
        if let Streams::Cpu(engines) = &mut self.streams {
            engines[1..].iter_mut().try_for_each(|engine| engine.restore(&state))?;
        }
        self.frame = 0;
        Ok(())
    }

    fn distance(&mut self, exact: &[f32], compared: &[Token]) -> Result<Distance> {
        match &mut self.streams {
            Streams::Cpu(engines) => Ok(Distance::between(exact, &costs(&mut engines[0], compared)?)),
            Streams::Reference(engine) => Ok(Distance::between(exact, &costs(engine.as_mut(), compared)?)),
        }
    }

    /// The first frames, as the case is measured; tokens per stream.
    fn begin(&mut self) -> Result<Vec<Vec<Token>>> {
        self.frame = CHECKED_FRAMES;
        match &mut self.streams {
            Streams::Cpu(engines) => play_in_lockstep(engines, 0..CHECKED_FRAMES),
            Streams::Reference(engine) => Ok(vec![play(engine.as_mut(), 0, 0..CHECKED_FRAMES)?]),
        }
    }

    /// Plays `n_frames` of all streams together, at least one of each; the reference engine [`REFERENCE_FRAMES`].
    fn round(&mut self, n_frames: usize) -> Result<()> {
        let (begun, core_begun) = (Instant::now(), cpu_seconds());
        let n_samples = match &mut self.streams {
            Streams::Reference(engine) => {
                let last = self.frame + REFERENCE_FRAMES;
                let played = play(engine.as_mut(), 0, self.frame..last)?.len();
                self.frame = last;
                played
            }
            Streams::Cpu(engines) => {
                let last = self.frame + (n_frames / engines.len()).max(1);
                let played = if engines.len() == 1 {
                    play_timed(&mut engines[0], self.frame..last, &mut self.steps_us)?
                } else {
                    play_in_lockstep(engines, self.frame..last)?.iter().map(Vec::len).sum()
                };
                self.frame = last;
                played
            }
        };
        self.rounds.push(n_samples as f64 / begun.elapsed().as_secs_f64());
        self.n_samples += n_samples;
        let core_s = cpu_seconds().zip(core_begun).map(|(now, begun)| now - begun);
        self.core_s = self.core_s.zip(core_s).map(|(sum, round)| sum + round);
        Ok(())
    }

    /// Samples per second of processor time; `None` where none was counted.
    fn core_speed(&self) -> Option<f64> {
        self.core_s.filter(|&seconds| seconds > 0.0).map(|seconds| self.n_samples as f64 / seconds)
    }

    /// Samples per second of processor time, or of the clock's where there is no other.
    fn speed(&self) -> f64 {
        self.core_speed().unwrap_or_else(|| median(&self.rounds))
    }

    fn report(self, checkpoint: &Checkpoint, machine: &Machine, reference_speed: Option<f64>) -> CaseReport {
        let config = &checkpoint.config;
        let int8 = self.engine == "cpu";
        let samples_per_s = median(&self.rounds);
        let gmac_s = self.speed() * config.wave_transformer.multiply_adds_per_sample() / 1e9;
        let limit = if int8 { MOST_INT8_BITS } else { MOST_F32_BITS };
        CaseReport {
            engine: self.engine,
            isa: self.isa.map(Isa::name),
            batch: match &self.streams {
                Streams::Cpu(engines) => engines.len(),
                Streams::Reference(_) => 1,
            },
            samples_per_s,
            samples_per_s_range: [
                self.rounds.iter().copied().fold(f64::INFINITY, f64::min),
                self.rounds.iter().copied().fold(0.0, f64::max),
            ],
            x_real_time: samples_per_s / f64::from(config.codec.sample_rate),
            core_s: self.core_s,
            x_core: self.core_speed().map(|speed| speed / f64::from(config.codec.sample_rate)),
            x_reference: reference_speed.filter(|_| self.isa.is_some()).map(|speed| self.speed() / speed),
            step_us: Quantiles::of(self.steps_us),
            gmac_s,
            of_peak: self.isa.and_then(|isa| machine.peak(isa, int8)).map(|peak| gmac_s / peak),
            memory_mb: self.memory.map(|bytes| bytes as f64 / 1e6),
            prepare_ms: self.prepare_ms,
            prefill_ms: self.prefill_ms,
            tokens_as_scalar: self.tokens_as_scalar,
            passed: self.tokens_as_scalar != Some(false)
                && self.distance.is_none_or(|distance| distance.mean_abs_bits <= limit),
            distance: self.distance,
        }
    }
}

/// Plays and takes the time of every step; a frame's plan counts to its first step. Gives the number of samples.
fn play_timed(engine: &mut CpuEngine, frames: std::ops::Range<usize>, steps_us: &mut Vec<f64>) -> Result<usize> {
    let mut plan = PlanFrame::default();
    let mut played = 0;
    for frame in frames {
        let (plan_draws, wave_draws) = draws(engine, 0, frame);
        let mut begun = Instant::now();
        engine.next_plan(&plan_draws, &mut plan)?;
        engine.begin_frame(&plan.bands)?;
        for &uniforms in wave_draws.as_chunks().0 {
            engine.next_token(uniforms)?;
            let now = Instant::now();
            steps_us.push(1e6 * (now - begun).as_secs_f64());
            begun = now;
            played += 1;
        }
    }
    Ok(played)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}
