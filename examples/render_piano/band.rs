//! Who plays: one instrument, or for each voice of a piece one of many, perhaps with drums.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::bank::Bank;
use crate::midi::{Note, Performance};
use crate::random::Random;
use crate::synth::{self, Pedal};

/// How loud a voice of a band is at least, and drums from and to, dB against the loudest voice.
const SOFTEST_DB: f64 = -10.0;
const DRUMS_DB: [f64; 2] = [-10.0, 3.0];
/// Share of pieces with a beat that have drums.
const DRUMMED: f64 = 0.7;
/// A piece of one voice alone is two from here on up and below: middle C.
const UPPER_KEY: i32 = 60;
/// Steps of a bar of four beats, and how likely a drum falls on each against the first.
const STRENGTHS: [f64; 16] = [1.0, 0.15, 0.4, 0.15, 0.7, 0.15, 0.4, 0.2, 0.9, 0.15, 0.4, 0.15, 0.7, 0.2, 0.5, 0.25];
const STEPS_PER_BEAT: usize = 4;
/// A step is played otherwise than in the other bars so often.
const CHANGES: f64 = 0.06;
/// No beat is shorter than this: those of a closed silence fall together, in seconds.
const SHORTEST_BEAT_S: f64 = 0.1;
/// A hit lasts this long, in seconds, unless the drum is hit again.
const HIT_S: f64 = 2.0;

/// The recordings that pieces are played with.
pub struct Band {
    instruments: Vec<Bank>,
    drums: Vec<Bank>,
}

impl Band {
    /// `folder` holds an instrument's notes, or folders of them; of these, what has a name that begins with `drums` is drums.
    ///
    /// # Errors
    /// A folder cannot be read or has no recording.
    pub fn open(folder: &Path, sample_rate: u32) -> Result<Self> {
        let reading = || format!("reading {}", folder.display());
        let entries: Vec<_> = std::fs::read_dir(folder).and_then(Iterator::collect).with_context(reading)?;
        let mut folders: Vec<_> = entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        if folders.is_empty() {
            return Ok(Self { instruments: vec![Bank::open(folder, sample_rate)?], drums: Vec::new() });
        }
        folders.sort();
        let is_drums = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("drums"));
        let (drums, instruments): (Vec<_>, Vec<_>) = folders.into_iter().partition(|path| is_drums(path));
        if instruments.is_empty() {
            bail!("{}: no instrument beside the drums", folder.display());
        }
        let open =
            |paths: Vec<PathBuf>| paths.iter().map(|path| Bank::open(path, sample_rate)).collect::<Result<Vec<_>>>();
        Ok(Self { instruments: open(instruments)?, drums: open(drums)? })
    }

    /// Sounds of the performance in `excerpt_s` (seconds), one channel. Who plays, and how loud, is drawn where there are several.
    ///
    /// # Errors
    /// A recording that cannot be decoded.
    pub fn play(
        &self,
        performance: &Performance,
        pedal: Pedal,
        excerpt_s: std::ops::Range<f64>,
        random: &mut Random,
    ) -> Result<Vec<f32>> {
        if let [alone] = &self.instruments[..] {
            return synth::play(performance, alone, pedal, excerpt_s);
        }
        let mut mix = Vec::new();
        for voice in voices(performance) {
            let bank = &self.instruments[random.below(self.instruments.len())];
            let level_db = random.between(SOFTEST_DB, 0.0);
            add(&mut mix, &synth::play(&voice, bank, pedal, excerpt_s.clone())?, level_db);
        }
        if !self.drums.is_empty() && !performance.beats_s.is_empty() && random.unit() < DRUMMED {
            let bank = &self.drums[random.below(self.drums.len())];
            let hits = pattern(&performance.beats_s, &bank.recorded_keys(), random);
            let level_db = random.between(DRUMS_DB[0], DRUMS_DB[1]);
            add(&mut mix, &synth::play(&hits, bank, Pedal::Switch, excerpt_s)?, level_db);
        }
        Ok(mix)
    }
}

/// Each voice as a performance; one alone as two, its upper and its lower keys.
fn voices(performance: &Performance) -> Vec<Performance> {
    let mut names: Vec<usize> = performance.notes.iter().map(|note| note.voice).collect();
    names.sort_unstable();
    names.dedup();
    let is_of = |note: &Note, voice: usize| match names.len() {
        1 => (note.key < UPPER_KEY) == (voice == 1),
        _ => note.voice == names[voice],
    };
    let part = |voice| Performance {
        notes: performance.notes.iter().filter(|note| is_of(note, voice)).cloned().collect(),
        ..performance.clone()
    };
    (0..names.len().max(2)).map(part).filter(|part| !part.notes.is_empty()).collect()
}

/// Hits of a drawn pattern of one bar, over and over.
fn pattern(beats_s: &[f64], drums: &[i32], random: &mut Random) -> Performance {
    let mut hits = Performance::default();
    for &key in drums {
        let (density, loudness) = (random.between(0.0, 1.0).powi(2) * 1.6, random.between(40.0, 120.0));
        let pattern = STRENGTHS.map(|strength| random.unit() < density * strength);
        for (beat, pair) in beats_s.windows(2).enumerate().filter(|(_, pair)| pair[1] - pair[0] > SHORTEST_BEAT_S) {
            for step in 0..STEPS_PER_BEAT {
                let in_bar = (beat * STEPS_PER_BEAT + step) % STRENGTHS.len();
                if pattern[in_bar] != (random.unit() < CHANGES) {
                    let share = step as f64 / STEPS_PER_BEAT as f64;
                    let on_s = pair[0] + share * (pair[1] - pair[0]);
                    let velocity =
                        (loudness * (0.6 + 0.4 * STRENGTHS[in_bar]) + 8.0 * random.jitter()).clamp(1.0, 127.0);
                    hits.notes.push(Note { on_s, off_s: on_s + HIT_S, key, velocity, voice: 0 });
                }
            }
        }
    }
    hits.notes.sort_by(|a, b| a.on_s.total_cmp(&b.on_s));
    hits
}

/// Adds a voice at a level against the others, root mean square.
fn add(mix: &mut Vec<f32>, voice: &[f32], level_db: f64) {
    let power = voice.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / voice.len().max(1) as f64;
    let gain = (10f64.powf(level_db / 20.0) / power.max(1e-20).sqrt()) as f32;
    mix.resize(mix.len().max(voice.len()), 0.0);
    mix.iter_mut().zip(voice).for_each(|(mix, x)| *mix += gain * x);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bank::tests::small_bank;

    fn note(on_s: f64, key: i32, voice: usize) -> Note {
        Note { on_s, off_s: on_s + 0.4, key, velocity: 80.0, voice }
    }

    #[test]
    fn one_voice_becomes_two_and_more_stay_what_they_are() {
        let of = |notes: &[(i32, usize)]| {
            let notes = notes.iter().map(|&(key, voice)| note(0.0, key, voice)).collect();
            let parts = voices(&Performance { notes, ..Performance::default() });
            parts.iter().map(|part| part.notes.iter().map(|note| note.key).collect()).collect::<Vec<Vec<_>>>()
        };
        assert_eq!(of(&[(48, 3), (60, 3), (72, 3)]), [vec![60, 72], vec![48]]);
        assert_eq!(of(&[(72, 3), (76, 3)]), [vec![72, 76]]);
        assert_eq!(of(&[(48, 1), (72, 0), (50, 1)]), [vec![72], vec![48, 50]]);
    }

    #[test]
    fn drums_fall_on_parts_of_beats_and_mostly_where_they_fell_before() {
        let beats_s: Vec<f64> = (0..400).map(|beat| 0.5 * f64::from(beat)).collect();
        let hits = pattern(&beats_s, &[36, 38, 42], &mut Random::new(3, "piece"));
        let step = |hit: &Note| (hit.on_s / 0.125).round() as usize;
        assert!(hits.notes.iter().all(|hit| (hit.on_s - 0.125 * step(hit) as f64).abs() < 1e-9));
        for key in [36, 38, 42] {
            let mut counts = [0; 16];
            hits.notes.iter().filter(|hit| hit.key == key).for_each(|hit| counts[step(hit) % 16] += 1);
            assert!(counts.iter().all(|&count| !(20..80).contains(&count)), "{key}: {counts:?}");
        }
    }

    #[test]
    fn a_folder_of_folders_is_a_band_with_drums() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["one", "two", "drums-1"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            small_bank(&folder.path().join(name));
        }
        let band = Band::open(folder.path(), 16_000).unwrap();
        assert_eq!((band.instruments.len(), band.drums.len()), (2, 1));
        let beats_s = (0..8).map(|beat| 0.5 * f64::from(beat)).collect();
        let performance =
            Performance { notes: vec![note(0.1, 60, 0), note(1.0, 57, 1)], beats_s, ..Performance::default() };
        let played = |seed| {
            let played = band.play(&performance, Pedal::Switch, 0.0..3.0, &mut Random::new(seed, "piece")).unwrap();
            assert_eq!(played.len(), 48_000);
            assert!(played.iter().all(|x| x.is_finite()) && played.iter().any(|x| x.abs() > 0.1));
            played
        };
        assert!(played(1) == played(1) && played(1) != played(2));
    }
}
