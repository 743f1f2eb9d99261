//! Turns engines into what they play and how far apart they are: what `bench` and `selftest` rest on.

use std::ops::Range;
use std::panic::resume_unwind;
use std::thread;

use anyhow::Result;
use wavegen::codec::{Codec, Token};
use wavegen::engine::cpu::CpuEngine;
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::plan::PlanFrame;
use wavegen::rng::{Kind, uniform};

/// Tokens of struck chords that die away: something that every model has an opinion on.
pub fn chords(codec: &Codec, n: usize) -> Vec<Token> {
    let rate = f64::from(codec.sample_rate);
    let sample = |i: usize| {
        let t = i as f64 / rate;
        let (chord, since) = ((2.0 * t) as usize, t % 0.5);
        let root = 110.0 * [1.0, 1.5, 4.0 / 3.0, 1.25][chord % 4];
        let partial = |k: usize| (std::f64::consts::TAU * root * k as f64 * since).sin() / (k * k) as f64;
        (0.2 * (-4.0 * since).exp() * (1..=8).map(partial).sum::<f64>()) as f32
    };
    (0..n).map(|i| codec.encode(sample(i))).collect()
}

/// The numbers that decide plan frame `frame` of `stream`: its plan tokens and its samples.
pub fn draws(engine: &dyn Engine, stream: u32, frame: usize) -> (Vec<f32>, Vec<f32>) {
    let plan = &engine.config().plan;
    let numbers = |kind, n: usize| (frame * n..(frame + 1) * n).map(|t| uniform(0, stream, kind, t as u64)).collect();
    (numbers(Kind::Plan, plan.n_codebooks), numbers(Kind::Wave, UNIFORMS_PER_SAMPLE * plan.hop))
}

/// Plays `frames` plan frames of `stream`, one engine alone.
pub fn play(engine: &mut dyn Engine, stream: u32, frames: Range<usize>) -> Result<Vec<Token>> {
    let hop = engine.config().plan.hop;
    let (mut plan, mut tokens) = (PlanFrame::default(), Vec::new());
    for frame in frames {
        let (plan_draws, wave_draws) = draws(engine, stream, frame);
        engine.next_plan(&plan_draws, &mut plan)?;
        let first = tokens.len();
        tokens.resize(first + hop, 0);
        engine.render(&plan, &wave_draws, &mut tokens[first..])?;
    }
    Ok(tokens)
}

/// Plays `frames` plan frames with `engines` that are in lockstep, each on a thread of its own, engine i as stream i; tokens per stream.
pub fn play_in_lockstep(engines: &mut Vec<CpuEngine>, frames: Range<usize>) -> Result<Vec<Vec<Token>>> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(engines.drain(..))
            .map(|(stream, mut engine)| {
                let frames = frames.clone();
                // An engine that fails is dropped with its thread, and the others do not wait for it.
                scope.spawn(move || play(&mut engine, stream, frames).map(|tokens| (engine, tokens)))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                let (engine, tokens) = thread.join().unwrap_or_else(|panic| resume_unwind(panic))?;
                engines.push(engine);
                Ok(tokens)
            })
            .collect()
    })
}

/// How far two engines' distributions are apart, teacher-forced, in bits per sample.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Distance {
    /// What the second engine needs more than the first.
    pub bits: f64,
    /// Mean of the absolute difference, sample by sample.
    pub mean_abs_bits: f64,
}

impl Distance {
    /// From costs of the same samples, in nats.
    pub fn between(first: &[f32], second: &[f32]) -> Self {
        let n = first.len().max(1) as f64 * std::f64::consts::LN_2;
        let differences = first.iter().zip(second).map(|(&a, &b)| f64::from(b) - f64::from(a));
        Self { bits: differences.clone().sum::<f64>() / n, mean_abs_bits: differences.map(f64::abs).sum::<f64>() / n }
    }
}

/// -ln P of each of `tokens` (whole plan frames), in nats.
pub fn costs(engine: &mut dyn Engine, tokens: &[Token]) -> Result<Vec<f32>> {
    let mut nats = vec![0.0; tokens.len()];
    engine.score(tokens, &mut nats)?;
    Ok(nats)
}
