//! `wavegen selftest`: turns a machine and a model into a table of what holds on it.

use anyhow::{Result, ensure};
use serde::Serialize;
use wavegen::checkpoint::Checkpoint;
use wavegen::codec::{Codec, Token};
use wavegen::engine::Engine;
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::simd::Isa;

use super::Outcome;
use super::check::{Distance, chords, costs, play, play_in_lockstep};
use super::common::{ModelArgs, Talk, catch_interrupt, interrupted, print};

/// Plan frames that are played where the result is compared: about a second.
const PLAYED_FRAMES: usize = 31;
/// Plan frames whose cost is compared.
const SCORED_FRAMES: usize = 31;
/// Plan frames of prompt.
const PROMPT_FRAMES: usize = 31;
/// Most that 32-bit engines may differ, mean absolute bits per sample.
const MOST_F32_BITS: f64 = 0.002;
/// Most bits per sample that 8-bit weights may cost.
const MOST_INT8_BITS: f64 = 0.02;
/// Streams that play in lockstep.
const BATCH: usize = 3;
/// Characters of a hash that are shown.
const SHOWN: usize = 16;

/// Check on this machine that the engines agree and keep their promises
///
/// Exit code 1 if anything does not hold. The hash of a generated second is the same on all instruction sets of a machine;
/// machines of another kind may differ in the last bit of the forecasts' Fourier transforms, and then in the hash.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen selftest
  wavegen selftest --model my.safetensors --json")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct Report {
    model: String,
    fingerprint: String,
    passed: bool,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Check {
    name: String,
    passed: bool,
    detail: String,
}

/// Gives what it found, or what does not hold.
type Test<'a> = Box<dyn Fn() -> Result<String> + 'a>;

/// What the checks share.
struct Bench<'a> {
    checkpoint: &'a Checkpoint,
    prompt: Vec<Token>,
    scored: Vec<Token>,
    hop: usize,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let checkpoint = args.model.load()?;
    let config = &checkpoint.config;
    let hop = config.plan.hop;
    let bench = Bench {
        checkpoint: &checkpoint,
        prompt: chords(&config.codec, PROMPT_FRAMES * hop),
        scored: chords(&config.codec, SCORED_FRAMES * hop),
        hop,
    };
    catch_interrupt();
    let fingerprint = checkpoint.fingerprint();
    let mut report = Report { model: config.name.clone(), fingerprint, passed: true, checks: Vec::new() };
    if !args.talk.json {
        print(&format!("model '{}', {}", report.model, &report.fingerprint[..SHOWN]))?;
    }
    let mut checks: Vec<(String, Test)> = vec![
        ("codec: there and back".into(), Box::new(|| codec_round_trip(&config.codec))),
        ("step = parallel, cpu-f32 and reference".into(), Box::new(|| bench.steps_and_parallel())),
        ("cpu-f32: as the reference".into(), Box::new(|| bench.distance(Precision::F32))),
        ("cpu: as the reference".into(), Box::new(|| bench.distance(Precision::Int8))),
        ("causality: cpu".into(), Box::new(|| bench.causality(&mut bench.cpu(Isa::chosen(), Precision::Int8)?, 0.0))),
        (
            "causality: reference".into(),
            Box::new(|| bench.causality(&mut ReferenceEngine::new(bench.checkpoint)?, 1e-3)),
        ),
        ("saved and restored = without a pause".into(), Box::new(|| bench.pause())),
        ("streams together = alone".into(), Box::new(|| bench.together())),
    ];
    for precision in [Precision::Int8, Precision::F32] {
        let engine = if precision == Precision::Int8 { "cpu" } else { "cpu-f32" };
        let scalar = bench.second(Isa::Scalar, precision)?;
        for isa in Isa::available() {
            let (bench, scalar) = (&bench, scalar.clone());
            let name = format!("{engine} on {}: a second as on scalar", isa.name());
            checks.push((name, Box::new(move || bench.as_scalar(isa, precision, &scalar))));
        }
    }
    for (name, check) in checks {
        if interrupted() {
            return Ok(Outcome::Interrupted);
        }
        let (passed, detail) = match check() {
            Ok(detail) => (true, detail),
            Err(error) => (false, super::common::one_line(&error)),
        };
        if !args.talk.json {
            print(&format!("{} {name:<44} {detail}", if passed { "ok    " } else { "FAILED" }))?;
        }
        report.passed &= passed;
        report.checks.push(Check { name, passed, detail });
    }
    args.talk.json(&report, false)?;
    Ok(if report.passed { Outcome::Done } else { Outcome::Failed })
}

/// Every token comes back, and every value within a step of its token's.
fn codec_round_trip(codec: &Codec) -> Result<String> {
    for token in 0..codec.levels() {
        let back = codec.encode(codec.decode(token as Token));
        ensure!(usize::from(back) == token, "token {token} comes back as {back}");
    }
    let mut worst = 0.0f32;
    for i in -10_000..=10_000 {
        let x = i as f32 / 10_000.0;
        worst = worst.max((codec.decode(codec.encode(x)) - x).abs() / codec.bin_width(x));
    }
    ensure!(worst <= 1.0, "a value is off by {worst} steps");
    Ok(format!("{} tokens, values within {worst:.2} steps", codec.levels()))
}

impl Bench<'_> {
    fn cpu(&self, isa: Isa, precision: Precision) -> Result<CpuEngine> {
        Ok(CpuEngine::new(self.checkpoint, &CpuOptions { isa, precision })?)
    }

    /// What the reference engine plays in steps costs it in parallel what it costs the CPU engine in steps.
    fn steps_and_parallel(&self) -> Result<String> {
        let mut reference = ReferenceEngine::new(self.checkpoint)?;
        reference.prefill(&self.prompt)?;
        let mut tokens = self.prompt.clone();
        tokens.extend(play(&mut reference, 0, 0..4)?);
        let parallel = costs(&mut reference, &tokens)?;
        let steps = costs(&mut self.cpu(Isa::Scalar, Precision::F32)?, &tokens)?;
        let Distance { mean_abs_bits, .. } = Distance::between(&parallel, &steps);
        ensure!(mean_abs_bits <= MOST_F32_BITS, "{mean_abs_bits:.5} bits per sample apart");
        Ok(format!("{mean_abs_bits:.5} bits per sample apart"))
    }

    fn distance(&self, precision: Precision) -> Result<String> {
        let exact = costs(&mut ReferenceEngine::new(self.checkpoint)?, &self.scored)?;
        let other = costs(&mut self.cpu(Isa::chosen(), precision)?, &self.scored)?;
        let distance = Distance::between(&exact, &other);
        let text = format!("{:+.5} bits per sample, {:.5} in the mean", distance.bits, distance.mean_abs_bits);
        let holds = match precision {
            Precision::F32 => distance.mean_abs_bits <= MOST_F32_BITS,
            Precision::Int8 => distance.bits <= MOST_INT8_BITS,
        };
        ensure!(holds, "{text}");
        Ok(text)
    }

    /// No frame's cost depends on a frame after it.
    fn causality(&self, engine: &mut dyn Engine, tolerance: f32) -> Result<String> {
        let n = SCORED_FRAMES / 2 * self.hop;
        let mut changed = self.scored.clone();
        changed[n..].reverse();
        ensure!(changed != self.scored, "nothing to change");
        let (before, after) = (costs(engine, &self.scored)?, costs(engine, &changed)?);
        for (t, (a, b)) in before[..n].iter().zip(&after[..n]).enumerate() {
            ensure!((a - b).abs() <= tolerance, "sample {t} costs {a} or {b} nats as sample {n} on is changed");
        }
        ensure!(before[n..] != after[n..], "a change changes nothing");
        Ok(format!("{n} samples do not hear what comes after"))
    }

    fn pause(&self) -> Result<String> {
        let mut engine = self.cpu(Isa::chosen(), Precision::Int8)?;
        engine.prefill(&self.prompt)?;
        play(&mut engine, 0, 0..3)?;
        let state = engine.save()?;
        let whole = play(&mut engine, 0, 3..6)?;
        let mut other = engine.fork()?;
        other.restore(&state)?;
        ensure!(play(&mut other, 0, 3..6)? == whole, "the same stream went on otherwise");
        Ok(format!("{} bytes of state", state.len()))
    }

    fn together(&self) -> Result<String> {
        let mut one = self.cpu(Isa::chosen(), Precision::Int8)?;
        let mut engines = one.fork_in_lockstep(BATCH)?;
        let mut alone = Vec::new();
        for (stream, engine) in (0..).zip(&mut engines) {
            one.prefill(&self.prompt)?;
            alone.push(play(&mut one, stream, 0..4)?);
            engine.prefill(&self.prompt)?;
        }
        ensure!(play_in_lockstep(&mut engines, 0..4)? == alone, "a stream plays otherwise beside others");
        Ok(format!("{BATCH} streams"))
    }

    /// What the first stream plays after the prompt, about a second.
    fn second(&self, isa: Isa, precision: Precision) -> Result<Vec<Token>> {
        let mut engine = self.cpu(isa, precision)?;
        engine.prefill(&self.prompt)?;
        play(&mut engine, 0, 0..PLAYED_FRAMES)
    }

    fn as_scalar(&self, isa: Isa, precision: Precision, scalar: &[Token]) -> Result<String> {
        let tokens = self.second(isa, precision)?;
        let first = tokens.iter().zip(scalar).position(|(a, b)| a != b);
        ensure!(first.is_none(), "another token at sample {}", first.unwrap_or_default());
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        Ok(format!("hash {}", &blake3::hash(&bytes).to_hex()[..SHOWN]))
    }
}
