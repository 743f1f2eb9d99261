//! Plays a performance on a bank: strings, dampers and pedal.
use std::collections::HashMap;
use std::ops::Range;

use anyhow::Result;

use crate::bank::Bank;
use crate::midi::{Note, PedalMove, Performance};

/// The highest key with a damper (E6); strings above it ring on.
const LAST_DAMPED_KEY: i32 = 88;
/// Time constant of a string that is struck again: the hammer stops most of the old vibration.
const RESTRIKE_TAU_S: f64 = 0.04;
/// A voice ends when its damping has taken it this far down.
const SILENT: f64 = 1e-4;
/// No recording is longer than this, in seconds: earlier strikes cannot be heard in an excerpt.
const LONGEST_S: f64 = 30.0;

/// How the pedal's position lifts the dampers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Pedal {
    /// Fully at 64 and above, not at all below.
    #[default]
    Switch,
    /// Little by little between 32 and 96 (half pedalling).
    Gradual,
}

impl Pedal {
    /// How much of the dampers' effect is left, 0 to 1.
    fn damping(self, value: u8) -> f64 {
        match self {
            Self::Switch => f64::from(u8::from(value < 64)),
            Self::Gradual => ((96.0 - f64::from(value)) / 64.0).clamp(0.0, 1.0).powi(2),
        }
    }
}

/// Time constant of a damper on the string of `key`: heavy bass strings need longer.
fn damper_tau_s(key: i32) -> f64 {
    0.22 * 2f64.powf(f64::from(21 - key) / 30.0)
}

/// From `from_s` on, a voice that stands at `gain` decays at `rate` (1/s) beyond its recording's own decay.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stretch {
    from_s: f64,
    gain: f64,
    rate: f64,
}

/// The damping of one note over time, in seconds of the performance; the last stretch ends at the returned time.
fn envelope(note: &Note, struck_again_s: Option<f64>, moves: &[PedalMove], pedal: Pedal) -> (Vec<Stretch>, f64) {
    let mut changes = vec![(note.on_s, 0.0)];
    let again_s = struck_again_s.unwrap_or(f64::INFINITY);
    if note.key <= LAST_DAMPED_KEY && note.off_s < again_s {
        let tau_s = damper_tau_s(note.key);
        let first = moves.partition_point(|pedal| pedal.time_s <= note.off_s);
        let value = first.checked_sub(1).map_or(0, |index| moves[index].value);
        changes.push((note.off_s, pedal.damping(value) / tau_s));
        let later = moves[first..].iter().take_while(|pedal| pedal.time_s < again_s);
        changes.extend(later.map(|step| (step.time_s, pedal.damping(step.value) / tau_s)));
    }
    if again_s.is_finite() {
        changes.push((again_s, 1.0 / RESTRIKE_TAU_S));
    }
    let mut stretches: Vec<Stretch> = Vec::with_capacity(changes.len());
    for (from_s, rate) in changes {
        let gain = match stretches.last() {
            None => 1.0,
            Some(then) => {
                let gain = then.gain * (-then.rate * (from_s - then.from_s)).exp();
                if gain < SILENT {
                    break;
                }
                gain
            }
        };
        stretches.push(Stretch { from_s, gain, rate });
    }
    let end_s = match stretches.last() {
        Some(last) if last.rate > 0.0 => last.from_s + (last.gain / SILENT).ln() / last.rate,
        _ => f64::INFINITY,
    };
    (stretches, end_s)
}

/// Sounds of the performance in `excerpt_s` (seconds), at the bank's rate; one channel, level as recorded.
///
/// # Errors
/// A recording that cannot be decoded.
pub fn play(performance: &Performance, bank: &Bank, pedal: Pedal, excerpt_s: Range<f64>) -> Result<Vec<f32>> {
    let rate = f64::from(bank.sample_rate());
    let at = |time_s: f64| ((time_s - excerpt_s.start) * rate).round() as i64;
    let mut output = vec![0.0f32; at(excerpt_s.end).max(0) as usize];
    let mut next_strike_s: HashMap<i32, f64> = HashMap::new();
    let mut voices = Vec::with_capacity(performance.notes.len());
    for note in performance.notes.iter().rev() {
        voices.push((note, next_strike_s.insert(note.key, note.on_s)));
    }
    for (note, struck_again_s) in voices.into_iter().rev() {
        if note.on_s >= excerpt_s.end || note.on_s + LONGEST_S < excerpt_s.start {
            continue;
        }
        let (stretches, end_s) = envelope(note, struck_again_s, &performance.pedal, pedal);
        for part in bank.strike(note.key, note.velocity)? {
            let onset = at(note.on_s) + part.shift;
            for (index, stretch) in stretches.iter().enumerate() {
                let until_s = stretches.get(index + 1).map_or(end_s, |next| next.from_s);
                // Samples of the output that this stretch of this recording covers.
                let recorded_until = onset + part.samples.len() as i64;
                let until = if until_s.is_finite() { at(until_s).min(recorded_until) } else { recorded_until };
                let until = until.min(output.len() as i64);
                let from = at(stretch.from_s).max(onset).max(0);
                if from >= until {
                    continue;
                }
                let recording = &part.samples[(from - onset) as usize..(until - onset) as usize];
                let passed_s = (from - at(stretch.from_s)) as f64 / rate;
                let gain = f64::from(part.gain) * stretch.gain * (-stretch.rate * passed_s).exp();
                mix(&mut output[from as usize..until as usize], recording, gain, (-stretch.rate / rate).exp());
            }
        }
    }
    Ok(output)
}

/// Adds `samples` times a gain that falls by `factor` from sample to sample.
fn mix(output: &mut [f32], samples: &[f32], gain: f64, factor: f64) {
    if factor == 1.0 {
        let gain = gain as f32;
        for (output, sample) in output.iter_mut().zip(samples) {
            *output += gain * sample;
        }
        return;
    }
    let mut gain = gain;
    for (output, sample) in output.iter_mut().zip(samples) {
        *output += gain as f32 * sample;
        gain *= factor;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bank::tests::small_bank;

    fn note(on_s: f64, off_s: f64, key: i32) -> Note {
        Note { on_s, off_s, key, velocity: 80.0, voice: 0 }
    }

    fn press(time_s: f64, value: u8) -> PedalMove {
        PedalMove { time_s, value }
    }

    fn gain_at(time_s: f64, (stretches, _): &(Vec<Stretch>, f64)) -> f64 {
        let stretch = stretches.iter().rev().find(|stretch| stretch.from_s <= time_s).unwrap();
        stretch.gain * (-stretch.rate * (time_s - stretch.from_s)).exp()
    }

    #[test]
    fn a_damper_stops_a_released_note_sooner_in_the_treble() {
        let bass = envelope(&note(0.0, 1.0, 30), None, &[], Pedal::Switch);
        let treble = envelope(&note(0.0, 1.0, 80), None, &[], Pedal::Switch);
        assert_eq!(gain_at(0.99, &bass), 1.0);
        assert!(gain_at(1.1, &treble) < gain_at(1.1, &bass) && gain_at(1.1, &bass) < 0.7);
        assert!(treble.1 < bass.1 && bass.1 < 4.0);
    }

    #[test]
    fn strings_above_e6_have_no_damper() {
        assert_eq!(envelope(&note(0.0, 1.0, 89), None, &[], Pedal::Switch).1, f64::INFINITY);
        assert!(envelope(&note(0.0, 1.0, 88), None, &[], Pedal::Switch).1 < 2.0);
    }

    #[test]
    fn the_pedal_holds_a_released_note_until_it_comes_up() {
        let moves = [press(0.5, 127), press(3.0, 0)];
        let held = envelope(&note(0.0, 1.0, 60), None, &moves, Pedal::Switch);
        assert_eq!(gain_at(2.9, &held), 1.0);
        assert!(gain_at(3.3, &held) < 0.1);
    }

    #[test]
    fn a_pedal_pressed_soon_after_the_release_catches_the_rest() {
        let moves = [press(1.05, 127)];
        let caught = envelope(&note(0.0, 1.0, 60), None, &moves, Pedal::Switch);
        let rest = gain_at(1.05, &caught);
        assert!((0.2..0.9).contains(&rest), "{rest}");
        assert_eq!(gain_at(8.0, &caught), rest);
    }

    #[test]
    fn half_a_pedal_damps_a_little() {
        let at = |value| gain_at(1.3, &envelope(&note(0.0, 1.0, 60), None, &[press(0.0, value)], Pedal::Gradual));
        assert!(at(0) < at(50) && at(50) < at(64) && at(64) < at(80) && at(80) < at(100));
        assert_eq!(at(100), 1.0);
    }

    #[test]
    fn a_second_strike_takes_over_even_under_the_pedal() {
        let again = envelope(&note(0.0, 1.0, 60), Some(2.0), &[press(0.0, 127)], Pedal::Switch);
        assert_eq!(gain_at(2.0, &again), 1.0);
        assert!(again.1 < 2.5, "{}", again.1);
    }

    #[test]
    fn an_excerpt_is_a_part_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        small_bank(folder.path());
        let bank = Bank::open(folder.path(), 16_000).unwrap();
        let performance = Performance {
            notes: vec![note(0.1, 0.5, 57), note(0.3, 1.4, 60), note(0.9, 1.0, 57), note(1.2, 1.6, 63)],
            pedal: vec![press(0.2, 127), press(1.1, 0)],
            ..Performance::default()
        };
        let whole = play(&performance, &bank, Pedal::Switch, 0.0..2.0).unwrap();
        let part = play(&performance, &bank, Pedal::Switch, 1.0..2.0).unwrap();
        assert_eq!(whole.len(), 32_000);
        for (index, (a, b)) in whole[16_000..].iter().zip(&part).enumerate() {
            assert!((a - b).abs() < 1e-6, "sample {index}: {a} and {b}");
        }
        assert!(part[..1000].iter().any(|x| x.abs() > 0.01), "earlier notes ring into the excerpt");
    }
}
