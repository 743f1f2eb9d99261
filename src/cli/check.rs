//! Turns engines into what they play and how far apart they are: what `bench` and `selftest` rest on.

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
pub fn play(engine: &mut dyn Engine, stream: u32, frames: std::ops::Range<usize>) -> Result<Vec<Token>> {
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

/// Plays `frames` plan frames with all engines side by side, engine i as stream i; tokens per stream.
pub fn play_together(engines: &mut [CpuEngine], frames: std::ops::Range<usize>) -> Result<Vec<Vec<Token>>> {
    let mut played = vec![Vec::new(); engines.len()];
    for frame in frames {
        let mut plans = vec![PlanFrame::default(); engines.len()];
        let (plan_draws, wave_draws): (Vec<_>, Vec<_>) =
            (0..).zip(&*engines).map(|(stream, engine)| draws(engine, stream, frame)).unzip();
        let mut out: Vec<Vec<Token>> = engines.iter().map(|engine| vec![0; engine.config().plan.hop]).collect();
        let mut together: Vec<_> = engines.iter_mut().collect();
        CpuEngine::plan_together(&mut together, &plan_draws, &mut plans)?;
        CpuEngine::render_together(&mut together, &plans, &wave_draws, &mut out)?;
        played.iter_mut().zip(out).for_each(|(all, new)| all.extend(new));
    }
    Ok(played)
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
