//! Turns samples into the same played faster or slower, pitch and all, at any speed.
//!
//! For training excerpts of a second, each at a speed of its own: a short filter computed where it is needed. Whole files
//! between fixed rates are [`super::resample`](mod@super::resample)'s work.

use std::f64::consts::PI;

/// Zero crossings of the windowed sinc on either side.
const CROSSINGS: f64 = 16.0;

/// Samples that `n` samples at `speed` times the speed are made of.
pub fn samples_needed(n: usize, speed: f64) -> usize {
    (n as f64 * speed).ceil() as usize + (CROSSINGS * speed.max(1.0)).ceil() as usize
}

/// Output i is the band-limited signal at sample `i * speed`; beyond its ends it is taken as zero. Faster than 1, what the
/// rate cannot hold any more is filtered out: passes up to 0.85 of half the rate, -6 dB there where it ends.
///
/// A sinc under a Hann window, as in J. O. Smith, "Digital Audio Resampling Home Page" (2002).
pub fn play(samples: &[f32], speed: f64, n: usize) -> Vec<f32> {
    let cutoff = speed.max(1.0).recip();
    let reach = CROSSINGS / cutoff;
    (0..n)
        .map(|i| {
            let at = i as f64 * speed;
            let first = (at - reach).ceil().max(0.0) as usize;
            let end = ((at + reach).floor() as usize + 1).min(samples.len());
            let heard = samples.get(first..end).unwrap_or_default();
            let sum: f64 = heard.iter().zip(first..).map(|(&x, j)| f64::from(x) * kernel(at - j as f64, cutoff)).sum();
            sum as f32
        })
        .collect()
}

fn kernel(distance: f64, cutoff: f64) -> f64 {
    let turn = PI * distance * cutoff;
    let sinc = if turn.abs() < 1e-9 { 1.0 } else { turn.sin() / turn };
    let window = 0.5 + 0.5 * (turn / CROSSINGS).cos();
    cutoff * sinc * window
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(n: usize, turns_per_sample: f64) -> Vec<f32> {
        (0..n).map(|i| (2.0 * PI * turns_per_sample * i as f64).sin() as f32).collect()
    }

    #[test]
    fn a_sine_becomes_one_of_the_other_pitch() {
        for speed in [0.8, 0.97, 1.03, 1.25, 2.0] {
            for pitch in [0.01, 0.1, 0.3] {
                let n = 400;
                let out = play(&sine(samples_needed(n, speed), pitch), speed, n);
                let wanted = if pitch * speed < 0.4 { sine(n, pitch * speed) } else { vec![0.0; n] };
                // Away from the beginning, before which there is silence.
                let error = out.iter().zip(&wanted).skip(40).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error < 0.01, "pitch {pitch} at speed {speed}: off by {error}");
            }
        }
    }

    #[test]
    fn at_its_own_speed_nothing_changes() {
        let samples = sine(300, 0.123);
        let out = play(&samples, 1.0, 300);
        assert!(samples.iter().zip(&out).all(|(a, b)| (a - b).abs() < 1e-6));
        assert_eq!(play(&[], 1.1, 3), [0.0; 3]);
    }
}
