//! Fits the generation settings in free run: nearest to the recording, with bias near 0.
//!
//! The level is the one at which nothing is louder or softer than planned; the others are nearest to the recording at that level. In
//! the end the level is fitted to plans of the model's own, by which it will play: their flicker is another than that of codebooks.
//!
//! Likelihood cannot choose them (the scale that is likeliest under real history is too large where a forecast
//! follows its own noise), so held-out excerpts are played with their true plan and compared with what the recording does. Bands of
//! the plan's window cannot: it hears 128 ms at once, and hardly whether notes begin sharply.

use rayon::prelude::*;
use serde::Serialize;

use super::dataset::Dataset;
use super::scene::{Follow, Scene};
use super::{Observer, TrainError, TrainEvent};
use crate::checkpoint::Checkpoint;
use crate::engine::Engine;
use crate::engine::cpu::{CpuEngine, CpuOptions};
use crate::metrics::Adherence;
use crate::model::config::GenerationSettings;
use crate::sampler::PlanSampling;

/// Excerpts played per setting, where nobody says otherwise.
pub const EXCERPTS: usize = 4;
/// Frames heard before and played of each.
const PROMPT: usize = 24;
const PLAYED: usize = 48;
/// Values tried, one setting after the other, the others held at the best so far.
const GRAINS: [f32; 6] = [0.7, 0.8, 0.9, 1.0, 1.1, 1.2];
const OFFSETS: [f32; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
const PASTS: [f32; 4] = [0.0, 0.1, 0.25, 0.5];
const LEVELS_DB: [f32; 7] = [0.0, -0.4, -0.8, -1.2, -1.6, -2.0, -2.4];

/// One setting and how it played.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tried {
    #[serde(flatten)]
    pub settings: GenerationSettings,
    pub plan: Follow,
    /// From the recording, by its plan: [`log_mel_distance_db`](crate::metrics::log_mel_distance_db).
    pub distance_db: Option<f32>,
    /// From the plan.
    pub adherence_db: f32,
    pub bias_db: f32,
    /// The best of its pass so far.
    pub chosen: bool,
}

impl Tried {
    /// What is to be small: the distance, and any bias.
    pub fn error_db(&self) -> f32 {
        self.distance_db.unwrap_or(0.0).hypot(self.bias_db)
    }
}

impl std::fmt::Display for Tried {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { settings, distance_db, adherence_db, bias_db, chosen, .. } = self;
        let GenerationSettings { grain, past, offset, level_db } = settings;
        let best = if *chosen { ", best so far" } else { "" };
        let distance = distance_db.map_or("own plans".to_owned(), |db| format!("{db:.2} dB from the recording"));
        write!(
            f,
            "grain {grain:.2} past {past:.2} offset {offset:.2} level {level_db:+.1} dB: {distance}, adherence {adherence_db:.2} dB, bias {bias_db:+.2} dB{best}"
        )
    }
}

/// Plays `excerpts` excerpts with the checkpoint's own settings and with others, and chooses; every try is reported.
///
/// Without a piece of 2.3 s the settings stay.
pub fn calibrate(
    checkpoint: &Checkpoint,
    data: &Dataset,
    excerpts: usize,
    observe: &mut Observer,
) -> Result<GenerationSettings, TrainError> {
    let scenes = scenes(data, excerpts)?;
    let mut best = checkpoint.generation;
    if scenes.is_empty() {
        return Ok(best);
    }
    let mut tried: Vec<Tried> = Vec::new();
    let grains = |b: GenerationSettings| GRAINS.map(|grain| GenerationSettings { grain, ..b }).to_vec();
    let offsets = |b: GenerationSettings| OFFSETS.map(|offset| GenerationSettings { offset, ..b }).to_vec();
    let pasts = |b: GenerationSettings| PASTS.map(|past| GenerationSettings { past, ..b }).to_vec();
    let levels = |b: GenerationSettings| LEVELS_DB.map(|level_db| GenerationSettings { level_db, ..b }).to_vec();
    let off_level = |tried: &Tried| tried.bias_db.abs();
    let passes: [Pass; 6] = [
        (Follow::Recording, &levels, &off_level),
        (Follow::Recording, &grains, &Tried::error_db),
        (Follow::Recording, &offsets, &Tried::error_db),
        (Follow::Recording, &pasts, &Tried::error_db),
        (Follow::Recording, &grains, &Tried::error_db),
        (Follow::Own, &levels, &off_level),
    ];
    for (plan, candidates, error) in passes {
        let mut least = f32::INFINITY;
        for settings in std::iter::once(best).chain(candidates(best)) {
            let known = tried.iter().find(|tried| (tried.settings, tried.plan) == (settings, plan)).copied();
            let mut now = match known {
                Some(known) => known,
                None => {
                    let (Adherence { rms_db, bias_db }, distance) = play(checkpoint, data, &scenes, settings, plan)?;
                    let distance_db = (plan == Follow::Recording).then_some(distance);
                    Tried { settings, plan, distance_db, adherence_db: rms_db, bias_db, chosen: false }
                }
            };
            now.chosen = error(&now) < least;
            if now.chosen {
                (least, best) = (error(&now), settings);
            }
            if known.is_none() {
                tried.push(now);
                if observe(TrainEvent::Calibration(now)).is_break() {
                    return Ok(best);
                }
            }
        }
    }
    Ok(best)
}

/// The plans played, the settings to try, given the best so far, and what is to be small.
type Pass<'a> = (Follow, &'a dyn Fn(GenerationSettings) -> Vec<GenerationSettings>, &'a dyn Fn(&Tried) -> f32);

/// Excerpts at even distances in the pieces to judge by.
fn scenes(data: &Dataset, excerpts: usize) -> Result<Vec<Scene>, TrainError> {
    let hop = data.spectrum.hop();
    let long = PROMPT + PLAYED;
    let mut pieces: Vec<_> = data.judges().iter().filter(|r| r.n_frames(hop) >= long).collect();
    if pieces.is_empty() {
        pieces = data.train.iter().filter(|r| r.n_frames(hop) >= long).collect();
    }
    (0..if pieces.is_empty() { 0 } else { excerpts })
        .map(|i| {
            let piece = pieces[i % pieces.len()];
            let first = (piece.n_frames(hop) - long) * (2 * i + 1) / (2 * excerpts);
            Scene::cut(data, piece, first, (PROMPT, PLAYED))
        })
        .collect()
}

/// Adherence and distance from the recordings, dB, over all scenes, which are played side by side (the distance says something
/// where the plans are the recordings').
pub(super) fn play(
    checkpoint: &Checkpoint,
    data: &Dataset,
    scenes: &[Scene],
    settings: GenerationSettings,
    plan: Follow,
) -> Result<(Adherence, f32), TrainError> {
    let engine = CpuEngine::new(checkpoint, &CpuOptions::default())?;
    let results: Vec<(Adherence, f32)> = scenes
        .par_iter()
        .enumerate()
        .map(|(i, scene)| {
            let mut engine = engine.fork()?;
            engine.set_sampling(PlanSampling::default(), settings);
            let played = scene.play(&mut engine, plan, i as u64, &data.spectrum, &data.codec)?;
            Ok((played.adherence(), scene.distance_db(&played, data.codec.sample_rate)))
        })
        .collect::<Result<_, TrainError>>()?;
    let n = results.len().max(1) as f32;
    let rms = |of: fn(&(Adherence, f32)) -> f32| (results.iter().map(|r| of(r).powi(2)).sum::<f32>() / n).sqrt();
    let bias_db = results.iter().map(|(adherence, _)| adherence.bias_db).sum::<f32>() / n;
    Ok((Adherence { rms_db: rms(|(adherence, _)| adherence.rms_db), bias_db }, rms(|(_, distance)| *distance)))
}
