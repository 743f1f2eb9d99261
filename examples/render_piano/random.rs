//! Random numbers that depend on a seed and a name alone, never on threads or on the order of files.

/// The SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014): 64 bits of state, equally good from any seed.
pub struct Random {
    state: u64,
}

impl Random {
    /// A generator for one purpose (`name`) under one `seed`.
    pub fn new(seed: u64, name: &str) -> Self {
        let mut random = Self { state: seed };
        let mixed = random.bits();
        random.state = mixed ^ hash(name);
        random
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        scatter(self.state)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Uniform among the numbers below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }

    /// Triangular in (-1, 1), most often near 0.
    pub fn jitter(&mut self) -> f64 {
        self.unit() + self.unit() - 1.0
    }
}

/// SplitMix64's finaliser: every bit of the input moves every bit of the output.
fn scatter(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash of a name that is the same on every machine and in every version: FNV-1a, then scattered, because FNV alone
/// gives names that differ in their last letters neighbouring values.
pub fn hash(name: &str) -> u64 {
    scatter(
        name.bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_name_draw_the_same_numbers() {
        let draw = |seed, name| {
            let mut random = Random::new(seed, name);
            (0..8).map(|_| random.unit()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        assert!(draw(3, "c").iter().all(|u| (0.0..1.0).contains(u)));
    }
}
