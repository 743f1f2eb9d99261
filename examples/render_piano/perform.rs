//! Changes how a performance is played: humanising, tempo, transposition, silences, and which part of it.
use crate::midi::Performance;
use crate::random::Random;

/// Onsets move by at most this when humanised, in seconds.
const ONSET_JITTER_S: f64 = 0.012;
/// Velocities move by at most this when humanised, note by note.
const VELOCITY_JITTER: f64 = 8.0;
/// ... and by at most this over phrases.
const DYNAMICS: f64 = 14.0;
/// The tempo swings by at most this fraction over phrases.
const RUBATO: f64 = 0.08;
/// A held note no longer counts as sounding after this time, in seconds.
const AUDIBLE_S: f64 = 6.0;
/// Lowest and highest key of a piano.
pub const KEYS: std::ops::RangeInclusive<i32> = 21..=108;

/// A slow curve in [-1, 1]: sines with periods of a phrase (5 to 25 s), their phases drawn.
struct SlowCurve {
    /// (amplitude, angular frequency, phase)
    waves: [(f64, f64, f64); 3],
}

impl SlowCurve {
    fn new(random: &mut Random) -> Self {
        let mut wave = |amplitude, low_s, high_s| {
            let omega = std::f64::consts::TAU / random.between(low_s, high_s);
            (amplitude, omega, random.between(0.0, std::f64::consts::TAU))
        };
        Self { waves: [wave(0.5, 12.0, 25.0), wave(0.3, 7.0, 12.0), wave(0.2, 4.0, 7.0)] }
    }

    fn at(&self, time_s: f64) -> f64 {
        self.waves.iter().map(|(a, w, phase)| a * (w * time_s + phase).sin()).sum()
    }

    /// Integral of the curve from 0 to `time_s`.
    fn integral(&self, time_s: f64) -> f64 {
        self.waves.iter().map(|(a, w, phase)| a / w * (phase.cos() - (w * time_s + phase).cos())).sum()
    }
}

impl Performance {
    /// Moves every event in time; `map` must not decrease.
    fn map_time(&mut self, map: impl Fn(f64) -> f64) {
        for note in &mut self.notes {
            note.on_s = map(note.on_s);
            note.off_s = map(note.off_s);
        }
        for pedal in &mut self.pedal {
            pedal.time_s = map(pedal.time_s);
        }
        self.beats_s.iter_mut().for_each(|beat_s| *beat_s = map(*beat_s));
    }

    /// Plays a score as a hand would: a slow tempo curve, slow dynamics, small deviations note by note.
    pub fn humanise(&mut self, random: &mut Random) {
        let tempo = SlowCurve::new(random);
        let dynamics = SlowCurve::new(random);
        self.map_time(|time_s| time_s + RUBATO * tempo.integral(time_s));
        for note in &mut self.notes {
            let shift = (ONSET_JITTER_S * random.jitter()).max(-note.on_s);
            // The key comes up with its own small deviation, later than it went down.
            note.off_s = (note.off_s + ONSET_JITTER_S * random.jitter()).max(note.on_s + shift + 0.02);
            let louder = VELOCITY_JITTER * random.jitter() + DYNAMICS * dynamics.at(note.on_s);
            note.on_s += shift;
            note.velocity = (note.velocity + louder).clamp(1.0, 127.0);
        }
        self.notes.sort_by(|a, b| a.on_s.total_cmp(&b.on_s));
    }

    /// Plays `factor` times as fast.
    pub fn scale_tempo(&mut self, factor: f64) {
        self.map_time(|time_s| time_s / factor);
    }

    /// Moves all notes by `semitones`; drops those that leave the keyboard and says how many they were.
    pub fn transpose(&mut self, semitones: i32) -> usize {
        let n_before = self.notes.len();
        for note in &mut self.notes {
            note.key += semitones;
        }
        self.notes.retain(|note| KEYS.contains(&note.key));
        n_before - self.notes.len()
    }

    /// Lets the first note begin at `lead_in_s`, and shortens silences longer than `max_gap_s` to it. Says how many
    /// seconds went.
    pub fn close_gaps(&mut self, lead_in_s: f64, max_gap_s: f64) -> f64 {
        // (until when events keep their distance, how much earlier they come)
        let mut cuts: Vec<(f64, f64)> = Vec::new();
        let mut removed_s = self.notes.first().map_or(0.0, |note| note.on_s - lead_in_s);
        let mut sounding_until_s = f64::INFINITY;
        for note in &self.notes {
            let excess_s = note.on_s - sounding_until_s - max_gap_s;
            if excess_s > 0.0 {
                cuts.push((note.on_s - excess_s, removed_s));
                removed_s += excess_s;
            }
            let ends_s = note.off_s.min(note.on_s + AUDIBLE_S);
            sounding_until_s = if sounding_until_s.is_finite() { sounding_until_s.max(ends_s) } else { ends_s };
        }
        let total_s = removed_s;
        cuts.push((f64::INFINITY, removed_s));
        self.map_time(|time_s| {
            let index = cuts.partition_point(|(until_s, _)| *until_s < time_s);
            let earliest_s = if index == 0 { 0.0 } else { cuts[index - 1].0 - cuts[index - 1].1 };
            (time_s - cuts[index].1).max(earliest_s)
        });
        total_s
    }

    /// When the last key comes up, in seconds.
    pub fn duration_s(&self) -> f64 {
        self.notes.iter().map(|note| note.off_s).fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::midi::{Note, PedalMove};

    fn play(times: &[(f64, f64)]) -> Performance {
        let note = |&(on_s, off_s)| Note { on_s, off_s, key: 60, velocity: 64.0, voice: 0 };
        Performance { notes: times.iter().map(note).collect(), ..Performance::default() }
    }

    fn times(performance: &Performance) -> Vec<(f64, f64)> {
        performance.notes.iter().map(|note| (note.on_s, note.off_s)).collect()
    }

    #[test]
    fn long_silences_close_and_short_ones_stay() {
        let mut performance = play(&[(10.0, 11.0), (14.0, 15.0), (100.0, 101.0), (102.0, 103.0)]);
        performance.pedal = vec![
            PedalMove { time_s: 2.0, value: 127 },
            PedalMove { time_s: 50.0, value: 0 },
            PedalMove { time_s: 101.5, value: 127 },
        ];
        let removed_s = performance.close_gaps(0.5, 4.0);
        assert_eq!(times(&performance), [(0.5, 1.5), (4.5, 5.5), (9.5, 10.5), (11.5, 12.5)]);
        let pedal: Vec<_> = performance.pedal.iter().map(|pedal| pedal.time_s).collect();
        assert_eq!(pedal, [0.0, 9.5, 11.0]);
        assert_eq!(removed_s, 90.5);
    }

    #[test]
    fn a_note_held_for_minutes_is_silence_too() {
        let mut performance = play(&[(0.0, 300.0), (200.0, 201.0)]);
        performance.close_gaps(0.0, 4.0);
        assert_eq!(times(&performance)[1], (AUDIBLE_S + 4.0, AUDIBLE_S + 5.0));
    }

    #[test]
    fn humanising_keeps_order_and_bounds() {
        let score: Vec<_> = (0..400).map(|i| (0.25 * f64::from(i), 0.25 * f64::from(i) + 0.2)).collect();
        let mut performance = play(&score);
        performance.humanise(&mut Random::new(5, "piece"));
        let mut velocities = Vec::new();
        for (index, note) in performance.notes.iter().enumerate() {
            assert!(note.on_s >= 0.0 && note.off_s > note.on_s, "note {index}: {note:?}");
            velocities.push(note.velocity);
        }
        let farthest = velocities.iter().map(|v| (v - 64.0).abs()).fold(0.0, f64::max);
        assert!(farthest > 4.0 && farthest <= VELOCITY_JITTER + DYNAMICS, "{farthest}");
        let gaps: Vec<_> = performance.notes.windows(2).map(|pair| pair[1].on_s - pair[0].on_s).collect();
        let mean_s = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((mean_s / 0.25 - 1.0).abs() < RUBATO, "{mean_s}");
        let mut again = play(&score);
        again.humanise(&mut Random::new(5, "piece"));
        assert_eq!(again, performance);
    }

    #[test]
    fn transposition_drops_and_counts_what_leaves_the_keyboard() {
        let mut performance = play(&[(0.0, 1.0), (1.0, 2.0)]);
        performance.notes[1].key = 107;
        assert_eq!(performance.transpose(3), 1);
        assert_eq!(performance.notes[0].key, 63);
    }
}
