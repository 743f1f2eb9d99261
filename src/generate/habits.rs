//! Turns a prompt into what a continuation is compared with, and frames into what is compared.

use serde::{Deserialize, Serialize};

use crate::engine::PlanDraw;
use crate::metrics::{SILENCE_DB, flatness_db, leader, level_db};
use crate::plan::{DB_PER_UNIT, Spectrum};

/// Prompts shorter than this have no habits; the model's usual ones stand in.
const SHORTEST_S: f32 = 1.0;
/// Seconds of frames that a governor remembers, and over which it judges the level.
pub const MEMORY_S: f32 = 4.0;
/// Seconds over which flatness is judged.
pub const NOISE_S: f32 = 1.0;
/// Seconds over which surprisal and entropy are judged.
pub const SURPRISE_S: f32 = 2.0;
/// Frames this far below the prompt's level are quiet, dB.
pub const QUIET_DB: f32 = 30.0;
/// A leading band that has fallen this far dies away and is not stuck, dB.
const DYING_DB: f32 = 3.0;

/// What a prompt does, as far as it tells what a continuation should not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Habits {
    /// Level of the whole, dB.
    pub level_db: f32,
    /// The loudest frame, dB.
    pub loudest_db: f32,
    /// Levels of the softest and the loudest stretch of [`MEMORY_S`], dB.
    pub stretch_db: [f32; 2],
    /// Most frames in a row that were quiet.
    pub quiet: u32,
    /// Most frames that one band led undiminished.
    pub lead: u32,
    /// Flatness of the flattest [`NOISE_S`], dB.
    pub flatness_db: f32,
    /// Mean surprisal of a plan frame, nats.
    pub surprisal: f32,
    /// The most over [`SURPRISE_S`].
    pub most_surprisal: f32,
}

/// One frame as heard.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Heard {
    pub level_db: f32,
    pub flatness_db: f32,
    /// The loudest band and its level.
    pub leader: u16,
    pub leader_db: f32,
    pub draw: PlanDraw,
}

impl Heard {
    pub fn new(samples: &[f32], bands: &[f32], draw: PlanDraw) -> Self {
        let leader = leader(bands.into());
        Self {
            level_db: level_db(samples),
            flatness_db: flatness_db(bands.into()),
            leader: leader as u16,
            leader_db: bands.get(leader).copied().unwrap_or_default() * DB_PER_UNIT,
            draw,
        }
    }
}

/// How long one band has led undiminished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lead {
    pub band: u16,
    pub most_db: f32,
    pub frames: u32,
}

impl Lead {
    pub fn push(&mut self, heard: &Heard) {
        let goes_on = heard.leader.abs_diff(self.band) <= 1 && heard.leader_db > self.most_db - DYING_DB;
        *self = if goes_on {
            Self { most_db: self.most_db.max(heard.leader_db), frames: self.frames + 1, ..*self }
        } else {
            Self { band: heard.leader, most_db: heard.leader_db, frames: 1 }
        };
    }
}

impl Habits {
    /// `surprisals`: of all plan frames but the first.
    pub fn of(samples: &[f32], surprisals: &[f32], spectrum: &Spectrum, frames_per_second: f32) -> Self {
        let frames = |seconds: f32| ((seconds * frames_per_second) as usize).max(2);
        let hop = spectrum.hop();
        let levels: Vec<f32> = samples.chunks_exact(hop).map(level_db).collect();
        if levels.len() < frames(SHORTEST_S) || level_db(samples) < SILENCE_DB + 60.0 {
            return Self::USUAL;
        }
        let bands = spectrum.analyse(samples);
        let draw = PlanDraw::default();
        let heard: Vec<Heard> = bands
            .outer_iter()
            .zip(samples.chunks_exact(hop))
            .map(|(bands, samples)| Heard::new(samples, &bands.to_vec(), draw))
            .collect();
        let level = mean_level(levels.iter().copied());
        let (mut lead, mut longest_lead) = (Lead::default(), 0);
        for frame in heard.iter().filter(|frame| frame.level_db > level - QUIET_DB) {
            lead.push(frame);
            longest_lead = longest_lead.max(lead.frames);
        }
        let (mut quiet, mut longest_quiet) = (0, 0);
        for frame in &heard {
            quiet = if frame.level_db < level - QUIET_DB { quiet + 1 } else { 0 };
            longest_quiet = longest_quiet.max(quiet);
        }
        let highest = |of: &dyn Fn(&[Heard]) -> f32, seconds: f32| {
            let long = frames(seconds).min(heard.len());
            heard.windows(long).map(of).fold(f32::NEG_INFINITY, f32::max)
        };
        let stretch =
            |sign: f32| sign * highest(&|window| sign * mean_level(window.iter().map(|f| f.level_db)), MEMORY_S);
        // The analysis of the first frames looks back into silence.
        let flatness_db = highest(&|window| mean(window.iter().map(|f| f.flatness_db)), NOISE_S);
        let surprisal = if surprisals.is_empty() { Self::USUAL.surprisal } else { mean(surprisals.iter().copied()) };
        let long = frames(SURPRISE_S).min(surprisals.len().max(1));
        let most_surprisal = surprisals.windows(long).map(|w| mean(w.iter().copied())).fold(surprisal, f32::max);
        Self {
            level_db: level,
            loudest_db: levels.iter().copied().fold(SILENCE_DB, f32::max),
            stretch_db: [stretch(-1.0), stretch(1.0)],
            quiet: longest_quiet,
            lead: longest_lead,
            flatness_db,
            surprisal,
            most_surprisal,
        }
    }

    /// Of a model that was trained at the usual level, where there is no prompt to ask: generous.
    const USUAL: Self = Self {
        level_db: -20.0,
        loudest_db: -6.0,
        stretch_db: [-35.0, -14.0],
        quiet: 60,
        lead: 60,
        flatness_db: -16.0,
        surprisal: 5.0,
        most_surprisal: 10.0,
    };
}

pub fn mean(values: impl Iterator<Item = f32>) -> f32 {
    let (n, sum) = values.fold((0usize, 0.0f64), |(n, sum), x| (n + 1, sum + f64::from(x)));
    (sum / n.max(1) as f64) as f32
}

/// Level of frames of equal length in dB: the mean of their powers.
pub fn mean_level(levels_db: impl Iterator<Item = f32>) -> f32 {
    let (n, power) =
        levels_db.fold((0usize, 0.0f64), |(n, power), db| (n + 1, power + 10f64.powf(f64::from(db) / 10.0)));
    (10.0 * (power / n.max(1) as f64).max(1e-12).log10()) as f32
}
