//! Turns the end of a signal into a guess of what comes next, by linear prediction.

use crate::audio::{AudioError, resample};

/// Most coefficients of the predictor.
const ORDER: usize = 128;
/// Most samples that the predictor is estimated from.
const ESTIMATE: usize = 4096;
/// How far a resampler's filter looks ahead, with room, in samples at the lower rate.
const FILTER_REACH: u64 = 1024;

/// The next `n` samples of the signal that ends with `samples`, by Burg's linear prediction (order up to 128).
///
/// The predictor is stable, so the guess rings on and dies away; a filter that runs over it sees no edge.
pub fn extrapolate(samples: &[f32], n: usize) -> Vec<f32> {
    let known: Vec<f64> = samples[samples.len().saturating_sub(ESTIMATE)..].iter().map(|&x| f64::from(x)).collect();
    let coefficients = burg(&known, ORDER.min(known.len() / 3));
    let mut signal = known;
    for _ in 0..n {
        let next: f64 = coefficients.iter().zip(signal.iter().rev()).map(|(a, x)| a * x).sum();
        signal.push(next);
    }
    signal[signal.len() - n..].iter().map(|&x| x as f32).collect()
}

/// Samples at `from` Hz at `to` Hz instead, as if they went on after their end: where they stop, the filter would see an edge, and bend
/// the last of them.
///
/// # Errors
/// Rates that cannot be resampled.
pub fn resample_end(samples: &[f32], from: u32, to: u32) -> Result<Vec<f32>, AudioError> {
    let (f, t) = (u64::from(from), u64::from(to));
    let reach = (FILTER_REACH * f).div_ceil(f.min(t).max(1)) as usize;
    let going_on = [samples, &extrapolate(samples, reach)].concat();
    let mut resampled = resample(&going_on, from, to)?;
    resampled.truncate((samples.len() as u64 * t).div_ceil(f.max(1)) as usize);
    Ok(resampled)
}

/// Predictor coefficients by Burg's method (J. P. Burg, "Maximum entropy spectral analysis", 1967): the next sample is
/// the sum of `coefficients[i]` times the sample `i + 1` before it.
fn burg(samples: &[f64], order: usize) -> Vec<f64> {
    let mut forward = samples.to_vec();
    let mut backward = samples.to_vec();
    let mut coefficients: Vec<f64> = Vec::with_capacity(order);
    for m in 0..order {
        // Errors of order m: forward[t] and backward[t - 1] meet at t.
        let (mut cross, mut energy) = (0.0, 0.0);
        for t in m + 1..samples.len() {
            cross += forward[t] * backward[t - 1];
            energy += forward[t] * forward[t] + backward[t - 1] * backward[t - 1];
        }
        if energy <= 1e-20 {
            break;
        }
        let reflection = 2.0 * cross / energy;
        let reversed: Vec<f64> = coefficients.iter().rev().copied().collect();
        for (a, r) in coefficients.iter_mut().zip(&reversed) {
            *a -= reflection * r;
        }
        coefficients.push(reflection);
        for t in (m + 1..samples.len()).rev() {
            let (f, b) = (forward[t], backward[t - 1]);
            forward[t] = f - reflection * b;
            backward[t] = b - reflection * f;
        }
    }
    coefficients
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_samples_are_not_bent() {
        for hz in [440.0, 3000.0] {
            let sine = |i: usize, rate: f64| (0.3 * (std::f64::consts::TAU * hz * i as f64 / rate).sin()) as f32;
            for (from, to) in [(44_100, 48_000), (48_000, 44_100), (44_100, 16_000), (8000, 48_000)] {
                let known: Vec<f32> = (0..from as usize + 3).map(|i| sine(i, f64::from(from))).collect();
                let resampled = resample_end(&known, from, to).unwrap();
                assert_eq!(resampled.len(), (known.len() * to as usize).div_ceil(from as usize), "{from} to {to} Hz");
                for (i, x) in resampled.iter().enumerate().skip(to as usize / 2) {
                    let exact = sine(i, f64::from(to));
                    assert!((x - exact).abs() < 3e-3, "{hz} Hz from {from} to {to} Hz, {i}: {x} for {exact}");
                }
            }
        }
    }

    #[test]
    fn a_chord_rings_on_in_phase() {
        let chord = |i: usize| {
            let t = i as f32;
            0.3 * (0.05 * t).sin() + 0.2 * (0.11 * t + 1.0).cos() + 0.1 * (0.7 * t).sin()
        };
        let known: Vec<f32> = (0..4096).map(chord).collect();
        for (i, x) in extrapolate(&known, 600).iter().enumerate() {
            assert!((x - chord(4096 + i)).abs() < 0.02, "sample {i}: {x} for {}", chord(4096 + i));
        }
    }

    #[test]
    fn silence_and_nothing_stay_silent_and_guesses_stay_bounded() {
        assert_eq!(extrapolate(&[0.0; 1000], 3), [0.0; 3]);
        assert_eq!(extrapolate(&[], 3), [0.0; 3]);
        assert_eq!(extrapolate(&[0.5], 3), [0.0; 3]);
        let steps: Vec<f32> = (0..5000).map(|i| if i % 700 < 350 { 0.9 } else { -0.9 }).collect();
        assert!(extrapolate(&steps, 5000).iter().all(|x| x.abs() < 3.0));
    }
}
