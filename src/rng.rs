//! Turns seeds into uniforms: by counter for generation, in sequence for training.

use serde::{Deserialize, Serialize};

/// What a uniform decides; streams of different kinds are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A plan token; `t` counts plan tokens.
    Plan = 0,
    /// A sample's token; `t` counts samples.
    Wave = 1,
    /// White noise through the planned filter, the training-free floor; `t` counts samples.
    Noise = 2,
    /// Treble that no model hears; `t` counts bins of its spectra.
    Treble = 3,
}

/// A uniform in (0, 1), a pure function of its arguments, so that a session resumed at any `t` draws the same.
///
/// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with `seed` as its key
/// and (`t`, `stream`, `kind`) as its counter.
pub fn uniform(seed: u64, stream: u32, kind: Kind, t: u64) -> f32 {
    let bits = philox([t as u32, (t >> 32) as u32, stream, kind as u32], [seed as u32, (seed >> 32) as u32]);
    open_unit(bits[0])
}

/// 23 random bits and half of a step: the widest grid that f32 holds exactly and that touches neither 0 nor 1.
fn open_unit(bits: u32) -> f32 {
    const STEP: f32 = 1.0 / (1u32 << 23) as f32;
    ((bits >> 9) as f32 + 0.5) * STEP
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// A sequence of random numbers (SplitMix64) whose state is one number, for checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A uniform in (0, 1).
    pub fn uniform(&mut self) -> f32 {
        open_unit((self.next_u64() >> 32) as u32)
    }

    /// A whole number in `0..n`; 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Puts `all` into random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i + 1));
        }
    }

    /// A standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f32::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_meets_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn uniforms_never_touch_zero_or_one() {
        assert!(open_unit(0) > 0.0);
        assert!(open_unit(u32::MAX) < 1.0);
    }

    #[test]
    fn every_part_of_the_counter_counts() {
        let base = uniform(1, 2, Kind::Plan, 3);
        assert_eq!(base, uniform(1, 2, Kind::Plan, 3));
        for other in [
            uniform(2, 2, Kind::Plan, 3),
            uniform(1 | 1 << 32, 2, Kind::Plan, 3),
            uniform(1, 3, Kind::Plan, 3),
            uniform(1, 2, Kind::Wave, 3),
            uniform(1, 2, Kind::Plan, 4),
            uniform(1, 2, Kind::Plan, 3 | 1 << 32),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let n = 100_000;
        let counted: f32 = (0..n).map(|t| uniform(7, 0, Kind::Wave, t)).sum::<f32>() / n as f32;
        assert!((counted - 0.5).abs() < 0.005, "{counted}");
        let mut rng = Rng::new(7);
        let draws: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f32>() / n as f32;
        let power = draws.iter().map(|x| x * x).sum::<f32>() / n as f32;
        assert!(mean.abs() < 0.02 && (power - 1.0).abs() < 0.02, "mean {mean}, power {power}");
        let mut counts = [0usize; 5];
        (0..n).for_each(|_| counts[rng.below(5)] += 1);
        assert!(counts.iter().all(|&count| count.abs_diff(20_000) < 1_000), "{counts:?}");
        assert_eq!(rng.below(0), 0);
    }
}
