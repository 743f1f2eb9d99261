//! Fits the three generation settings in free run: least plan adherence error, with bias near 0.
//!
//! Likelihood cannot choose them (the scale that is likeliest under real history is too large where a forecast
//! follows its own noise), so held-out excerpts are played with their true plan and analysed again.

use ndarray::s;
use rayon::prelude::*;

use super::dataset::Dataset;
use super::{Observer, TrainError, TrainEvent};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::engine::cpu::{CpuEngine, CpuOptions};
use crate::engine::{Engine, UNIFORMS_PER_SAMPLE};
use crate::metrics::{Adherence, adherence};
use crate::model::config::GenerationSettings;
use crate::plan::PlanFrame;
use crate::rng::Rng;
use crate::sampler::PlanSampling;

/// Excerpts played per setting, frames heard before and played of each.
const EXCERPTS: usize = 4;
const PROMPT: usize = 24;
const PLAYED: usize = 48;
/// Values tried, one setting after the other, the others held at the best so far.
const GRAINS: [f32; 6] = [0.7, 0.8, 0.9, 1.0, 1.1, 1.2];
const OFFSETS: [f32; 4] = [0.0, 0.1, 0.25, 0.5];
const PASTS: [f32; 3] = [0.0, 0.05, 0.15];

struct Scene {
    prompt: Vec<Token>,
    plan: Vec<PlanFrame>,
}

/// Plays and chooses; every try is reported.
pub fn calibrate(
    checkpoint: &Checkpoint,
    data: &Dataset,
    observe: &mut Observer,
) -> Result<GenerationSettings, TrainError> {
    let scenes = scenes(checkpoint, data)?;
    let mut best = GenerationSettings::default();
    let mut best_error = f32::INFINITY;
    let mut tried: Vec<GenerationSettings> = Vec::new();
    let mut attempt = |settings: GenerationSettings, best: &mut GenerationSettings| -> Result<bool, TrainError> {
        if tried.contains(&settings) {
            return Ok(true);
        }
        tried.push(settings);
        let Adherence { rms_db, bias_db } = play(checkpoint, data, &scenes, settings)?;
        let error = rms_db.hypot(bias_db);
        let chosen = error < best_error;
        if chosen {
            (best_error, *best) = (error, settings);
        }
        let event = TrainEvent::Calibration { settings, adherence_db: rms_db, bias_db, chosen };
        Ok(observe(event).is_continue())
    };
    let grains = |b: GenerationSettings| GRAINS.map(|grain| GenerationSettings { grain, ..b }).to_vec();
    let offsets = |b: GenerationSettings| OFFSETS.map(|offset| GenerationSettings { offset, ..b }).to_vec();
    let pasts = |b: GenerationSettings| PASTS.map(|past| GenerationSettings { past, ..b }).to_vec();
    let passes: [&dyn Fn(GenerationSettings) -> Vec<GenerationSettings>; 4] = [&grains, &offsets, &pasts, &grains];
    for candidates in passes {
        for settings in candidates(best) {
            if !attempt(settings, &mut best)? {
                return Ok(best);
            }
        }
    }
    Ok(best)
}

/// Excerpts at even distances in the held-out pieces.
fn scenes(checkpoint: &Checkpoint, data: &Dataset) -> Result<Vec<Scene>, TrainError> {
    let hop = data.spectrum.hop();
    let long = PROMPT + PLAYED;
    let mut pieces: Vec<_> = data.judges().iter().filter(|r| r.n_frames(hop) >= long).collect();
    if pieces.is_empty() {
        pieces = data.train.iter().filter(|r| r.n_frames(hop) >= long).collect();
    }
    (0..if pieces.is_empty() { 0 } else { EXCERPTS })
        .map(|i| {
            let piece = pieces[i % pieces.len()];
            let first = (piece.n_frames(hop) - long) * (2 * i + 1) / (2 * EXCERPTS);
            let codes = piece.plan_tokens.slice(s![first + PROMPT..first + long, ..]);
            let plan = codes
                .rows()
                .into_iter()
                .map(|row| {
                    let tokens = row.to_vec();
                    Ok(PlanFrame { bands: checkpoint.quantizer.decode(&tokens)?, tokens })
                })
                .collect::<Result<_, TrainError>>()?;
            let prompt = piece.tokens(first * hop..(first + PROMPT) * hop, 1.0, &data.codec)?;
            Ok(Scene { prompt, plan })
        })
        .collect()
}

/// Adherence over all scenes.
fn play(
    checkpoint: &Checkpoint,
    data: &Dataset,
    scenes: &[Scene],
    settings: GenerationSettings,
) -> Result<Adherence, TrainError> {
    let hop = data.spectrum.hop();
    let engine = CpuEngine::new(checkpoint, &CpuOptions::default())?;
    let results: Vec<Adherence> = scenes
        .par_iter()
        .enumerate()
        .map(|(i, scene)| {
            let mut engine = engine.fork()?;
            engine.set_sampling(PlanSampling::default(), settings);
            engine.prefill(&scene.prompt)?;
            let mut rng = Rng::new(i as u64);
            let mut tokens = scene.prompt.clone();
            let mut played = vec![0; hop];
            for frame in &scene.plan {
                let uniforms: Vec<f32> = (0..UNIFORMS_PER_SAMPLE * hop).map(|_| rng.uniform()).collect();
                engine.render(frame, &uniforms, &mut played)?;
                tokens.extend_from_slice(&played);
            }
            let heard = data.spectrum.analyse(&data.codec.decode_all(&tokens));
            let wanted: Vec<f32> = scene.plan.iter().flat_map(|frame| frame.bands.iter().copied()).collect();
            let wanted = ndarray::ArrayView2::from_shape((scene.plan.len(), data.spectrum.n_bands()), &wanted)
                .map_err(candle_core::Error::wrap)?;
            Ok(adherence(heard.slice(s![PROMPT.., ..]), wanted))
        })
        .collect::<Result<_, TrainError>>()?;
    let n = results.len().max(1) as f32;
    Ok(Adherence {
        rms_db: (results.iter().map(|a| a.rms_db.powi(2)).sum::<f32>() / n).sqrt(),
        bias_db: results.iter().map(|a| a.bias_db).sum::<f32>() / n,
    })
}
