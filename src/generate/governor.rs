//! Turns what a continuation does, frame by frame, into alarms: it went silent, noisy, stuck, too loud, too soft or astray.
//!
//! A [`Governor`] knows the prompt's habits and compares the running surprisal and entropy of the plan, the level, the spectral
//! flatness and the leading band against them. What is done about an alarm is the path's business: it goes back to a
//! snapshot and takes other uniforms. A governor is a pure function of what it heard, so the same seed gives the same bytes.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::habits::{Habits, Heard, Lead, MEMORY_S, NOISE_S, QUIET_DB, SURPRISE_S, mean, mean_level};
use crate::codec::Token;
use crate::engine::{Engine, EngineError, PlanDraw};
use crate::metrics::{SILENCE_DB, power_db};
use crate::plan::{PlanError, Spectrum};

/// Silence is an alarm after this long, or after half as long again as the prompt was ever quiet, seconds.
const SILENCE_S: f32 = 1.5;
/// One band may lead undiminished for this long, or half as long again as it ever did in the prompt, seconds.
const STUCK_S: f32 = 3.0;
/// Flatness above the prompt's flattest second, dB; only where it is loud enough to be more than the end of a note.
const NOISE_DB: f32 = 12.0;
/// Sound less flat than this is no noise, however clean the prompt was: the flattest seconds of recordings of piano have -21 to
/// -14 dB, white noise -0.7.
const LEAST_NOISE_DB: f32 = -10.0;
const LOUD_DB: f32 = 12.0;
/// Level over [`MEMORY_S`] above the loudest and below the softest such stretch of the prompt, dB.
const DRIFT_DB: [f32; 2] = [6.0, 12.0];
/// Two frames this far above the prompt's loudest are a burst, dB.
const BURST_DB: f32 = 6.0;
/// So are two frames this far above the loudest that the plan asked for within its analysis' window, dB.
const OVER_PLAN_DB: f32 = 9.0;
/// Mean entropy or surprisal of the plan above the most that the prompt needed over as long a stretch, as a factor.
const ASTRAY: f32 = 1.6;
/// Mean entropy below this share of what the prompt's plan costs: the same is played for ever.
const LOOP: f32 = 0.1;
/// Tries at one place before it is let pass.
const TRIES: u32 = 8;
/// Seconds without an alarm after which a place counts as passed; and for how long a lost one is left alone.
const PASSED_S: f32 = 4.0;
/// Seconds before the trouble began that the first try goes back to; each further try goes as far again.
const RUN_UP_S: f32 = 0.25;

/// Why a governor intervenes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alarm {
    /// Nothing is heard for longer than the prompt ever paused.
    Silence,
    /// The spectrum is flatter than anything in the prompt.
    Noise,
    /// One band leads and does not die away.
    StuckTone,
    /// Louder at once than anything in the prompt, or than its plan.
    Burst,
    /// Over seconds louder or softer than the prompt.
    LevelDrift,
    /// The plan is less certain, or less likely, than the prompt's ever was.
    Astray,
    /// The plan has hardly a choice any more.
    Loop,
}

impl std::fmt::Display for Alarm {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Silence => "silence",
            Self::Noise => "noise",
            Self::StuckTone => "stuck tone",
            Self::Burst => "burst",
            Self::LevelDrift => "level drift",
            Self::Astray => "astray",
            Self::Loop => "loop",
        })
    }
}

/// An alarm and what was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intervention {
    /// Seconds after the join at which it was noticed.
    pub at_s: f64,
    /// Seconds after the join from where other uniforms were taken.
    pub from_s: f64,
    /// What was noticed.
    pub alarm: Alarm,
    /// The first, second ... try at this place.
    pub attempt: u32,
}

/// Watches one continuation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Governor {
    habits: Habits,
    frames_per_second: f32,
    /// The last frames, oldest first.
    heard: VecDeque<Heard>,
    /// The last samples, for the spectrum.
    samples: Vec<f32>,
    /// Levels that the last plan frames asked for, as many as a window spans, dB.
    asked: VecDeque<f32>,
    /// Frames in a row that were louder than all of these.
    over_plan: u32,
    /// Quiet frames in a row.
    quiet: u32,
    lead: Lead,
    /// Frames heard.
    n_frames: u64,
    tries: Tries,
}

/// What was tried at the place where it is; survives going back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Tries {
    n: u32,
    /// Frame of the last alarm that was acted on.
    last: u64,
    /// Alarms before this frame are let pass.
    deaf_until: u64,
}

impl Governor {
    /// A governor that knows the habits of `prompt`, samples as the model hears them. The engine tells how likely it finds the
    /// prompt's plan; give it its context only afterwards.
    ///
    /// # Errors
    /// The engine's own.
    pub fn new(engine: &mut dyn Engine, spectrum: &Spectrum, prompt: &[Token]) -> Result<Self, EngineError> {
        let frames_per_second = spectrum.sample_rate() as f32 / spectrum.hop() as f32;
        // The frame grid ends with the prompt.
        let prompt = &prompt[prompt.len() % spectrum.hop()..];
        let samples = engine.config().codec.decode_all(prompt);
        let surprisals = if (prompt.len() / spectrum.hop()) < 2 { Vec::new() } else { engine.score_plan(prompt)? };
        let habits = Habits::of(&samples, &surprisals, spectrum, frames_per_second);
        let samples = samples[samples.len().saturating_sub(spectrum.window_len())..].to_vec();
        // The first windows still hear the prompt.
        let asked = VecDeque::from([power_db(&spectrum.analyse_last(&samples), spectrum)?]);
        Ok(Self {
            habits,
            frames_per_second,
            heard: VecDeque::new(),
            samples,
            asked,
            over_plan: 0,
            quiet: 0,
            lead: Lead::default(),
            n_frames: 0,
            tries: Tries::default(),
        })
    }

    /// Mean surprisal of the prompt's plan frames, nats; what is usual where the prompt is too short to say.
    pub fn prompt_surprisal(&self) -> f32 {
        self.habits.surprisal
    }

    fn frames(&self, seconds: f32) -> usize {
        ((seconds * self.frames_per_second).round() as usize).max(2)
    }

    /// Hears one more frame of samples, played by the plan frame `plan`; tells what is wrong, whether or not anything is to be
    /// done about it.
    ///
    /// # Errors
    /// When `plan` is no frame of `spectrum`.
    pub fn hear(
        &mut self,
        samples: &[f32],
        plan: &[f32],
        draw: PlanDraw,
        spectrum: &Spectrum,
    ) -> Result<Option<Alarm>, PlanError> {
        self.samples.extend_from_slice(samples);
        let surplus = self.samples.len().saturating_sub(spectrum.window_len());
        self.samples.drain(..surplus);
        let bands = spectrum.analyse_last(&self.samples);
        let heard = Heard::new(samples, &bands, draw);
        if self.asked.len() == spectrum.window_frames() {
            self.asked.pop_front();
        }
        self.asked.push_back(power_db(plan, spectrum)?);
        let asked = self.asked.iter().copied().fold(SILENCE_DB, f32::max);
        let audible = heard.level_db > self.habits.level_db - QUIET_DB;
        let over = audible && power_db(&bands, spectrum)? > asked + OVER_PLAN_DB;
        self.over_plan = if over { self.over_plan + 1 } else { 0 };
        self.n_frames += 1;
        self.quiet = if heard.level_db < self.habits.level_db - QUIET_DB { self.quiet + 1 } else { 0 };
        self.lead.push(&heard);
        if self.heard.len() == self.frames(MEMORY_S) {
            self.heard.pop_front();
        }
        self.heard.push_back(heard);
        Ok(self.alarm())
    }

    /// Judges only what comes from now on: what was heard was not of the model's choice.
    pub(super) fn forget(&mut self) {
        self.heard.clear();
        (self.over_plan, self.quiet, self.lead) = (0, 0, Lead::default());
    }

    /// Forgets what was tried: another way was asked for.
    pub(super) fn start_afresh(&mut self) {
        self.tries = Tries::default();
    }

    fn last(&self, seconds: f32) -> Option<impl Iterator<Item = &Heard> + Clone> {
        let first = self.heard.len().checked_sub(self.frames(seconds))?;
        Some(self.heard.range(first..))
    }

    fn alarm(&self) -> Option<Alarm> {
        let habits = &self.habits;
        let longer = |seconds: f32, own: u32| self.frames(seconds).max(own as usize * 3 / 2) as u32;
        if self.quiet >= longer(SILENCE_S, habits.quiet) {
            return Some(Alarm::Silence);
        }
        let too_loud = |f: &Heard| f.level_db > habits.loudest_db + BURST_DB;
        if self.over_plan >= 2 || (self.heard.len() >= 2 && self.heard.iter().rev().take(2).all(too_loud)) {
            return Some(Alarm::Burst);
        }
        if self.quiet == 0
            && let Some(last) = self.last(NOISE_S)
            && mean_level(last.clone().map(|f| f.level_db)) > habits.level_db - LOUD_DB
            && mean(last.map(|f| f.flatness_db)) > (habits.flatness_db + NOISE_DB).max(LEAST_NOISE_DB)
        {
            return Some(Alarm::Noise);
        }
        if self.quiet == 0 && self.lead.frames >= longer(STUCK_S, habits.lead) {
            return Some(Alarm::StuckTone);
        }
        if let Some(last) = self.last(SURPRISE_S) {
            let (surprisal, entropy) =
                (mean(last.clone().map(|f| f.draw.surprisal)), mean(last.map(|f| f.draw.entropy)));
            if surprisal.max(entropy) > ASTRAY * habits.most_surprisal {
                return Some(Alarm::Astray);
            }
            if entropy < LOOP * habits.surprisal {
                return Some(Alarm::Loop);
            }
        }
        if let Some(last) = self.last(MEMORY_S) {
            let level = mean_level(last.map(|f| f.level_db));
            let [softest, loudest] = habits.stretch_db;
            if level > loudest + DRIFT_DB[0] || level < softest - DRIFT_DB[1] {
                return Some(Alarm::LevelDrift);
            }
        }
        None
    }

    /// Decides about an alarm at the last frame: from which frame on to play otherwise, and the how-many-th try it is.
    /// `None`: this place has had its tries.
    pub(super) fn decide(&mut self, alarm: Alarm) -> Option<(u64, u32)> {
        let now = self.n_frames;
        if now < self.tries.deaf_until {
            return None;
        }
        let passed = self.frames(PASSED_S) as u64;
        if now > self.tries.last + passed {
            self.tries.n = 0;
        }
        if self.tries.n == TRIES {
            self.tries = Tries { n: 0, last: now, deaf_until: now + passed };
            return None;
        }
        self.tries.n += 1;
        self.tries.last = now;
        let lasted = match alarm {
            Alarm::Silence => self.quiet as usize,
            Alarm::StuckTone => self.lead.frames as usize,
            Alarm::Noise => self.frames(NOISE_S),
            Alarm::Burst => 2,
            Alarm::LevelDrift => self.frames(MEMORY_S),
            Alarm::Astray | Alarm::Loop => self.frames(SURPRISE_S),
        };
        let run_up = self.frames(RUN_UP_S) * self.tries.n as usize;
        Some((now.saturating_sub((lasted + run_up) as u64), self.tries.n))
    }

    /// Where it was at an earlier frame, with what has been tried since.
    pub(super) fn rewound(earlier: &Self, now: &Self) -> Self {
        Self { tries: now.tries, ..earlier.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::engine::cpu::{CpuEngine, CpuOptions};
    use crate::model::config::ModelConfig;
    use crate::plan::DB_PER_UNIT;
    use crate::rng::Rng;

    const HOP: usize = 512;

    /// Notes of half a second that die away.
    fn notes(seconds: f32, amplitude: f32) -> Vec<f32> {
        let note = |i: usize| [220.0, 330.0, 262.0, 392.0, 294.0][i / 8000 % 5];
        (0..(16_000.0 * seconds) as usize)
            .map(|i| {
                let age = (i % 8000) as f32 / 16_000.0;
                amplitude * (-3.0 * age).exp() * (std::f32::consts::TAU * note(i) * i as f32 / 16_000.0).sin()
            })
            .collect()
    }

    fn noise(n: usize, amplitude: f32) -> Vec<f32> {
        let mut rng = Rng::new(1);
        (0..n).map(|_| amplitude * rng.normal()).collect()
    }

    /// A governor that has heard eight seconds of notes, and usual draws.
    fn governor() -> (Governor, Spectrum, PlanDraw) {
        governor_after(&notes(8.0, 0.3))
    }

    fn governor_after(prompt: &[f32]) -> (Governor, Spectrum, PlanDraw) {
        let checkpoint = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap();
        let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
        let spectrum = checkpoint.spectrum().unwrap();
        let prompt = checkpoint.config.codec.encode_all(prompt);
        let governor = Governor::new(&mut engine, &spectrum, &prompt).unwrap();
        let usual = governor.habits.surprisal;
        (governor, spectrum, PlanDraw { surprisal: usual, entropy: usual })
    }

    /// Hears a frame whose plan asked for anything.
    fn heard(governor: &mut Governor, frame: &[f32], draw: PlanDraw, spectrum: &Spectrum) -> Option<Alarm> {
        governor.hear(frame, &vec![2.0; spectrum.n_bands()], draw, spectrum).unwrap()
    }

    /// What is thought of these samples after two seconds of more notes, and after how many seconds.
    fn alarm_at(samples: &[f32], draw: impl Fn(PlanDraw) -> PlanDraw) -> Option<(Alarm, f32)> {
        let (mut governor, spectrum, usual) = governor();
        for frame in notes(2.0, 0.3).chunks_exact(HOP) {
            assert_eq!(heard(&mut governor, frame, usual, &spectrum), None);
        }
        samples.chunks_exact(HOP).enumerate().find_map(|(i, frame)| {
            heard(&mut governor, frame, draw(usual), &spectrum).map(|alarm| (alarm, (i * HOP) as f32 / 16_000.0))
        })
    }

    #[test]
    fn a_prompt_that_ends_loud_is_no_burst_of_what_is_soft_after_it() {
        let notes = notes(8.2, 0.3);
        let (mut governor, spectrum, usual) = governor_after(&notes[..8 * 16_000 + 512]);
        let soft: Vec<f32> = (0..64 * HOP).map(|i| 0.02 * (0.1 * i as f32).sin()).collect();
        let plan = spectrum.analyse(&soft).row(40).to_vec();
        for (i, frame) in soft.chunks_exact(HOP).take(16).enumerate() {
            assert_eq!(governor.hear(frame, &plan, usual, &spectrum).unwrap(), None, "frame {i}");
        }
        // Later as loud as the prompt's end was.
        let loud = notes[..4 * HOP].chunks_exact(HOP);
        let alarms: Vec<_> = loud.map(|frame| governor.hear(frame, &plan, usual, &spectrum).unwrap()).collect();
        assert!(alarms.contains(&Some(Alarm::Burst)), "{alarms:?}");
    }

    #[test]
    fn music_like_the_prompt_raises_no_alarm() {
        assert_eq!(alarm_at(&notes(12.0, 0.25), |usual| usual), None);
        assert_eq!(alarm_at(&notes(12.0, 0.4), |usual| usual), None);
    }

    #[test]
    fn what_was_played_before_the_end_of_a_prompt_is_its_habit_too() {
        let prompt = [notes(10.0, 0.3), noise(16_000 * 25, 0.003)].concat();
        let (mut governor, spectrum, usual) = governor_after(&prompt);
        for (i, frame) in notes(6.0, 0.3).chunks_exact(HOP).enumerate() {
            assert_eq!(heard(&mut governor, frame, usual, &spectrum), None, "frame {i}");
        }
    }

    /// Many partials are flatter than one, which is all that the prompt had.
    #[test]
    fn a_richer_sound_than_the_prompts_is_no_noise() {
        let mut rng = Rng::new(4);
        let rich: Vec<f32> = (0..16_000 * 6)
            .map(|i| {
                let (age, t) = ((i % 8000) as f32 / 16_000.0, i as f32 / 16_000.0);
                let partials =
                    (1..32).map(|k| (std::f32::consts::TAU * 220.0 * k as f32 * t).sin() / (k as f32).sqrt());
                0.07 * (-3.0 * age).exp() * partials.sum::<f32>() + 3e-4 * rng.normal()
            })
            .collect();
        let (governor, spectrum, _) = governor();
        let flatness = |samples: &[f32]| {
            Heard::new(&samples[samples.len() - HOP..], &spectrum.analyse_last(samples), PlanDraw::default())
                .flatness_db
        };
        let (far, noise) = (flatness(&rich[..40 * HOP]), flatness(&noise(40 * HOP, 0.05)));
        assert!(far > governor.habits.flatness_db + NOISE_DB && noise > LEAST_NOISE_DB, "{far} and {noise} dB");
        assert_eq!(alarm_at(&rich, |usual| usual), None);
    }

    #[test]
    fn each_failure_raises_its_alarm_in_time() {
        let n = 16_000 * 8;
        let tone: Vec<f32> = (0..n).map(|i| 0.15 * (i as f32 * 0.2).sin()).collect();
        let soft = notes(8.0, 0.3 * 10f32.powf(-20.0 / 20.0));
        for (samples, expected, within_s) in [
            (vec![0.0; n], Alarm::Silence, 1.6),
            (noise(n, 0.05), Alarm::Noise, 1.5),
            (noise(n, 0.9), Alarm::Burst, 0.1),
            (tone, Alarm::StuckTone, 4.5),
            (soft, Alarm::LevelDrift, 4.5),
        ] {
            let (alarm, at_s) = alarm_at(&samples, |usual| usual).unwrap();
            assert_eq!(alarm, expected, "after {at_s} s");
            assert!(at_s <= within_s, "{alarm} only after {at_s} s");
        }
        let times = |factor: f32| {
            move |usual: PlanDraw| PlanDraw { surprisal: factor * usual.surprisal, entropy: factor * usual.entropy }
        };
        assert_eq!(alarm_at(&notes(4.0, 0.3), times(3.0)).unwrap().0, Alarm::Astray);
        assert_eq!(alarm_at(&notes(4.0, 0.3), times(0.01)).unwrap().0, Alarm::Loop);
    }

    /// A held frame has neither surprisal nor entropy, and may be silent or loud for as long as somebody likes.
    #[test]
    fn what_was_given_is_forgotten() {
        let (mut governor, spectrum, usual) = governor();
        for given in [vec![0.0; HOP], noise(HOP, 0.9)] {
            for _ in 0..160 {
                heard(&mut governor, &given, PlanDraw::default(), &spectrum);
                governor.forget();
            }
            for (i, frame) in notes(4.0, 0.3).chunks_exact(HOP).enumerate().skip(4) {
                assert_eq!(heard(&mut governor, frame, usual, &spectrum), None, "frame {i}");
            }
        }
    }

    #[test]
    fn what_is_louder_than_planned_is_a_burst_though_the_prompt_was_as_loud() {
        let (mut governor, spectrum, usual) = governor();
        let frame = &notes(0.5, 0.3)[..HOP];
        let plan = spectrum.analyse_last(&frame.repeat(4));
        let softer: Vec<f32> = plan.iter().map(|band| band - 20.0 / DB_PER_UNIT).collect();
        for _ in 0..8 {
            assert_eq!(governor.hear(frame, &plan, usual, &spectrum), Ok(None));
        }
        // A plan that has just fallen still rings in its own analysis.
        let thought: Vec<_> = (0..6).map(|_| governor.hear(frame, &softer, usual, &spectrum).unwrap()).collect();
        assert_eq!(thought, [None, None, None, None, Some(Alarm::Burst), Some(Alarm::Burst)]);
    }

    #[test]
    fn a_place_is_tried_a_few_times_from_further_and_further_back_and_then_let_pass() {
        let (mut governor, spectrum, usual) = governor();
        let silence = vec![0.0; HOP];
        let mut froms = Vec::new();
        let alarms = (0..400).filter(|_| heard(&mut governor, &silence, usual, &spectrum).is_some()).count();
        assert!(alarms > 300);
        while let Some((from, attempt)) = governor.decide(Alarm::Silence) {
            froms.push(from);
            assert_eq!(attempt as usize, froms.len());
        }
        assert_eq!(froms.len() as u32, TRIES);
        assert!(froms.windows(2).all(|pair| pair[1] <= pair[0]), "{froms:?}");
        assert_eq!(governor.decide(Alarm::Silence), None, "it is left alone for a while");
        let alarms = (0..400).filter(|_| heard(&mut governor, &silence, usual, &spectrum).is_some()).count();
        assert_eq!(alarms, 400);
        assert!(governor.decide(Alarm::Silence).is_some(), "and then tried again");
    }
}
