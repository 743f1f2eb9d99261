//! The level that models know: one gain brings a recording there, its inverse brings the continuation back.

use crate::metrics;

/// Root mean square that a recording is brought to, unless its peak would pass [`PEAK`].
const RMS: f32 = 0.1;
const PEAK: f32 = 0.95;
/// Quieter than this there is nothing to continue: below one step of 24-bit audio.
const SILENCE: f32 = 1e-7;

/// The gain that brings `samples` to the level models are trained at; `None` for silence.
pub fn gain(samples: &[f32]) -> Option<f32> {
    let peak = metrics::peak(samples);
    (peak > SILENCE).then(|| (RMS / metrics::rms(samples)).min(PEAK / peak))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gain_reaches_the_level_but_never_clips() {
        let steady = vec![0.02f32; 100];
        assert!((gain(&steady).unwrap() * 0.02 - RMS).abs() < 1e-6);
        let mut peaky = vec![0.0f32; 10_000];
        peaky[5] = 0.5;
        assert!((gain(&peaky).unwrap() * 0.5 - PEAK).abs() < 1e-6);
        assert_eq!(gain(&[0.0; 50]), None);
        assert_eq!(gain(&[]), None);
    }
}
