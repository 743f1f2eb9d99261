//! Turns a signal into another with the same spectrum and envelope that goes its own way.

use serde::{Deserialize, Serialize};

/// Delays of the stages, milliseconds: no whole multiples of each other, short enough that an attack stays one.
const DELAYS_MS: [f64; 4] = [6.7, 4.7, 3.1, 1.9];
/// How much longer they are from one signal to the next, and from stage to stage of these.
const SPREAD: [f64; 2] = [0.23, 0.07];
/// Of the stages, by turns positive and negative; their product is what comes through at once.
const GAIN: f32 = 0.5;

/// All-pass filters one after the other (M. R. Schroeder, "Natural sounding artificial reverberation", 1962).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decorrelator {
    stages: Vec<Stage>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stage {
    line: Vec<f32>,
    at: usize,
    gain: f32,
}

impl Decorrelator {
    /// The `index`-th of those for signals at `sample_rate` Hz, at rest.
    pub fn new(index: usize, sample_rate: u32) -> Self {
        let stage = |(i, ms): (usize, f64)| {
            let longer = 1.0 + SPREAD[0] * index as f64 + SPREAD[1] * (index * i) as f64;
            let n = (1e-3 * ms * longer * f64::from(sample_rate)) as usize;
            let gain = if (index + i).is_multiple_of(2) { GAIN } else { -GAIN };
            Stage { line: vec![0.0; n.max(1)], at: 0, gain }
        };
        Self { stages: DELAYS_MS.into_iter().enumerate().map(stage).collect() }
    }

    /// The sample for the next one of the signal.
    pub fn next(&mut self, sample: f32) -> f32 {
        self.stages.iter_mut().fold(sample, |x, stage| stage.next(x))
    }

    /// Whether it can go on where `other` would.
    pub fn is_like(&self, other: &Self) -> bool {
        self.stages.len() == other.stages.len()
            && self
                .stages
                .iter()
                .zip(&other.stages)
                .all(|(a, b)| a.line.len() == b.line.len() && a.gain == b.gain && a.at < a.line.len())
    }
}

impl Stage {
    fn next(&mut self, x: f32) -> f32 {
        let old = self.line[self.at];
        let kept = x - self.gain * old;
        self.line[self.at] = kept;
        self.at = (self.at + 1) % self.line.len();
        old + self.gain * kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{correlation, rms};
    use crate::rng::Rng;

    #[test]
    fn power_stays_and_nothing_of_the_signal_or_of_each_other_is_left() {
        let mut rng = Rng::new(4);
        let noise: Vec<f32> = (0..44_100).map(|_| rng.normal()).collect();
        let other = |index| {
            let mut decorrelator = Decorrelator::new(index, 44_100);
            noise.iter().map(|&x| decorrelator.next(x)).collect::<Vec<f32>>()
        };
        let all = [noise.clone(), other(0), other(1), other(5)];
        for (i, a) in all.iter().enumerate() {
            assert!((rms(a) - 1.0).abs() < 0.03, "{i}: {}", rms(a));
            for (j, b) in all.iter().enumerate().skip(i + 1) {
                assert!(correlation(a, b).abs() < 0.1, "{i}, {j}: {}", correlation(a, b));
            }
        }
    }
}
