//! Fits the generation settings in free run: nearest to the recordings, as tonal and as loud as they are.
//!
//! Every setting is judged at its own level, the one at which it is neither louder nor softer than planned: more grain is louder, and
//! who fits one after the other creeps along a valley. In the end the level is fitted to plans of the model's own, by which it
//! will play: their flicker is another than that of codebooks.
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
/// Levels that a model may be given.
const LEVELS_DB: std::ops::RangeInclusive<f32> = -6.0..=3.0;
/// How often the level of a setting is corrected at most, and what needs no correction.
const CORRECTIONS: usize = 2;
const NEAR_DB: f32 = 0.1;

/// One setting, at its level, and how it played.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tried {
    #[serde(flatten)]
    pub settings: GenerationSettings,
    pub plan: Follow,
    /// From the plan.
    pub adherence_db: f32,
    pub bias_db: f32,
    /// How much more powerful than planned.
    pub louder_db: f32,
    /// By their plans.
    pub recordings: Option<Compared>,
    /// The best of its pass so far.
    pub chosen: bool,
}

/// What was played beside the recordings.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Compared {
    /// [`log_mel_distance_db`](crate::metrics::log_mel_distance_db).
    pub distance_db: f32,
    /// How much more tonal it was, dB.
    pub tonality_db: f32,
}

impl Tried {
    /// What is to be small: distance, tonality gained or lost, and what its level leaves: by power, where what is loud counts, and by
    /// bands, where what is soft does too.
    pub fn error_db(&self) -> f32 {
        let compared = |Compared { distance_db, tonality_db }| distance_db.hypot(tonality_db);
        self.recordings.map_or(0.0, compared).hypot(self.bias_db).hypot(self.louder_db)
    }

    /// How much too loud it is: the level at which both are least is a dB lower for each dB of this.
    fn excess_db(&self) -> f32 {
        0.5 * (self.bias_db + self.louder_db)
    }
}

impl std::fmt::Display for Tried {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { settings, adherence_db, bias_db, louder_db, recordings, chosen, .. } = self;
        let GenerationSettings { grain, past, offset, level_db } = settings;
        let best = if *chosen { ", best so far" } else { "" };
        let compared = |Compared { distance_db, tonality_db }| {
            format!("{distance_db:.2} dB from the recordings, tonality {tonality_db:+.2} dB")
        };
        let compared = recordings.map_or("own plans".to_owned(), compared);
        write!(
            f,
            "grain {grain:.2} past {past:.2} offset {offset:.2} level {level_db:+.1} dB: {compared}, adherence {adherence_db:.2} dB, bias {bias_db:+.2} dB, {louder_db:+.2} dB louder{best}"
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
    let as_it_is = |_: GenerationSettings| Vec::new();
    let passes: [Pass; 5] = [
        (Follow::Recording, &grains),
        (Follow::Recording, &offsets),
        (Follow::Recording, &pasts),
        (Follow::Recording, &grains),
        (Follow::Own, &as_it_is),
    ];
    for (plan, candidates) in passes {
        let mut least = f32::INFINITY;
        for settings in std::iter::once(best).chain(candidates(best)) {
            let but_for_level = |s: GenerationSettings| GenerationSettings { level_db: 0.0, ..s };
            let same = |t: &&Tried| t.plan == plan && but_for_level(t.settings) == but_for_level(settings);
            let known = tried.iter().find(same).copied();
            let mut now = match known {
                Some(known) => known,
                None => at_its_level(settings, |settings| {
                    let Heard { adherence, louder_db, compared } = play(checkpoint, data, &scenes, settings, plan)?;
                    let Adherence { rms_db: adherence_db, bias_db } = adherence;
                    let recordings = (plan == Follow::Recording).then_some(compared);
                    Ok(Tried { settings, plan, adherence_db, bias_db, louder_db, recordings, chosen: false })
                })?,
            };
            now.chosen = now.error_db() < least;
            if now.chosen {
                (least, best) = (now.error_db(), now.settings);
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

/// The plans played, and the settings to try, given the best so far.
type Pass<'a> = (Follow, &'a dyn Fn(GenerationSettings) -> Vec<GenerationSettings>);

/// Plays at the level of `settings` and at better ones: a dB more of it is about a dB louder.
fn at_its_level(
    settings: GenerationSettings,
    mut play: impl FnMut(GenerationSettings) -> Result<Tried, TrainError>,
) -> Result<Tried, TrainError> {
    let mut best = play(settings)?;
    for _ in 0..CORRECTIONS {
        let level_db = ((best.settings.level_db - best.excess_db()) * 10.0).round() / 10.0;
        let level_db = level_db.clamp(*LEVELS_DB.start(), *LEVELS_DB.end());
        if best.excess_db().abs() <= NEAR_DB || level_db == best.settings.level_db {
            break;
        }
        let now = play(GenerationSettings { level_db, ..settings })?;
        if now.excess_db().abs() >= best.excess_db().abs() {
            break;
        }
        best = now;
    }
    Ok(best)
}

/// Excerpts at even distances in the pieces to judge by.
fn scenes(data: &Dataset, excerpts: usize) -> Result<Vec<Scene>, TrainError> {
    let places = |pieces| data.places(pieces, PROMPT + PLAYED, excerpts);
    let mut chosen = places(data.judges());
    if chosen.is_empty() {
        chosen = places(&data.train);
    }
    chosen.into_iter().map(|(piece, first)| Scene::cut(data, piece, first, (PROMPT, PLAYED))).collect()
}

/// How something was played, in the mean.
pub(super) struct Heard {
    pub adherence: Adherence,
    louder_db: f32,
    /// Says something where the plans are the recordings'.
    compared: Compared,
}

/// Plays all scenes, side by side.
pub(super) fn play(
    checkpoint: &Checkpoint,
    data: &Dataset,
    scenes: &[Scene],
    settings: GenerationSettings,
    plan: Follow,
) -> Result<Heard, TrainError> {
    let engine = CpuEngine::new(checkpoint, &CpuOptions::default())?;
    let results: Vec<Heard> = scenes
        .par_iter()
        .enumerate()
        .map(|(i, scene)| {
            let mut engine = engine.fork()?;
            engine.set_sampling(PlanSampling::default(), settings);
            let played = scene.play(&mut engine, plan, i as u64, &data.spectrum, &data.codec)?;
            let distance_db = scene.distance_db(&played, data.codec.sample_rate);
            let compared = Compared { distance_db, tonality_db: scene.tonality_gained_db(&played) };
            let louder_db = played.louder_db(&data.spectrum)?;
            Ok(Heard { adherence: played.adherence(), louder_db, compared })
        })
        .collect::<Result<_, TrainError>>()?;
    let mean = |of: fn(&Heard) -> f32| results.iter().map(of).sum::<f32>() / results.len().max(1) as f32;
    let mean_square = |of: fn(&Heard) -> f32| {
        (results.iter().map(|heard| of(heard).powi(2)).sum::<f32>() / results.len().max(1) as f32).sqrt()
    };
    Ok(Heard {
        adherence: Adherence { rms_db: mean_square(|h| h.adherence.rms_db), bias_db: mean(|h| h.adherence.bias_db) },
        louder_db: mean(|h| h.louder_db),
        compared: Compared {
            distance_db: mean_square(|h| h.compared.distance_db),
            tonality_db: mean(|h| h.compared.tonality_db),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_settings_level_makes_it_as_loud_as_planned_where_it_can() {
        let levelled = |excess_at: &dyn Fn(f32) -> f32| {
            let mut played = Vec::new();
            let settings = GenerationSettings { level_db: -0.4, ..GenerationSettings::default() };
            let play = |settings: GenerationSettings| {
                played.push(settings.level_db);
                // Too loud where it is loud, too soft where it is soft.
                let excess_db = excess_at(settings.level_db);
                let (bias_db, louder_db) = (excess_db - 2.0, excess_db + 2.0);
                let (plan, recordings) = (Follow::Own, None);
                Ok(Tried { settings, plan, adherence_db: 0.0, bias_db, louder_db, recordings, chosen: false })
            };
            let best = at_its_level(settings, play).unwrap().settings.level_db;
            (best, played)
        };
        assert_eq!(levelled(&|_| 0.1), (-0.4, vec![-0.4]));
        assert_eq!(levelled(&|level| 1.3 + level), (-1.3, vec![-0.4, -1.3]));
        // Half as steep, against the end, and the wrong way.
        assert_eq!(levelled(&|level| 1.0 + 0.5 * level), (-1.6, vec![-0.4, -1.2, -1.6]));
        assert_eq!(levelled(&|_| 20.0), (-0.4, vec![-0.4, -6.0]));
        assert_eq!(levelled(&|level| -level), (-0.4, vec![-0.4, -0.8]));
    }
}
