//! Turns the end of a signal into a guess of what comes next, by linear prediction.

/// Most coefficients of the predictor.
const ORDER: usize = 128;
/// Most samples that the predictor is estimated from.
const ESTIMATE: usize = 4096;

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
