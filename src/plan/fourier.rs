//! Turns real blocks into power spectra, and power spectra into autocorrelations, in f64.

use std::sync::Arc;

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

const OWN_WORKSPACE: &str = "a workspace goes with the transform that made it";

/// A transform of one length, shared by threads; each thread has its own [`Workspace`].
#[derive(Clone)]
pub(crate) struct Fourier {
    forward: Arc<dyn RealToComplex<f64>>,
    inverse: Arc<dyn ComplexToReal<f64>>,
}

/// The buffers of a transform of length n.
#[derive(Clone)]
pub(crate) struct Workspace {
    /// n samples, or n lags.
    pub block: Vec<f64>,
    /// `|X|^2` of the n / 2 + 1 bins.
    pub power: Vec<f64>,
    /// X, of which `power` was taken; lost by `autocorrelation`.
    pub bins: Vec<Complex<f64>>,
    scratch: Vec<Complex<f64>>,
}

impl Fourier {
    /// A transform of blocks of `len` samples, `len >= 1`.
    pub fn new(len: usize) -> Self {
        let mut planner = RealFftPlanner::new();
        Self { forward: planner.plan_fft_forward(len), inverse: planner.plan_fft_inverse(len) }
    }

    /// Buffers for this transform, all zero.
    pub fn workspace(&self) -> Workspace {
        let bins = self.forward.make_output_vec();
        Workspace {
            block: self.forward.make_input_vec(),
            power: vec![0.0; bins.len()],
            scratch: vec![Complex::default(); self.forward.get_scratch_len().max(self.inverse.get_scratch_len())],
            bins,
        }
    }

    /// `work.power[j] = |sum_t block[t] exp(-2 pi i j t / n)|^2`; the block is lost.
    pub fn power(&self, work: &mut Workspace) {
        let Workspace { block, power, bins, scratch } = work;
        self.forward.process_with_scratch(block, bins, scratch).expect(OWN_WORKSPACE);
        for (power, bin) in power.iter_mut().zip(bins) {
            *power = bin.norm_sqr();
        }
    }

    /// `work.block[k]` = circular autocorrelation at lag k, of the signal whose `work.power` it is.
    pub fn autocorrelation(&self, work: &mut Workspace) {
        let Workspace { block, power, bins, scratch } = work;
        let scale = 1.0 / block.len() as f64;
        for (bin, power) in bins.iter_mut().zip(power) {
            *bin = Complex::new(*power * scale, 0.0);
        }
        self.inverse.process_with_scratch(bins, block, scratch).expect(OWN_WORKSPACE);
    }
}

/// The smallest length of at least `len` that is quick to transform: a multiple of 16 with no prime factor above 3.
pub(crate) fn quick_len(len: usize) -> usize {
    let mut quick = len.max(16).next_power_of_two();
    let mut threes = 3;
    while threes < quick {
        let twos = len.div_ceil(threes).max(16).next_power_of_two();
        quick = quick.min(twos * threes);
        threes *= 3;
    }
    quick
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_lengths_are_close() {
        assert_eq!((quick_len(1), quick_len(4352), quick_len(4096), quick_len(130)), (16, 4608, 4096, 144));
    }

    #[test]
    fn autocorrelation_is_that_of_the_block() {
        let fourier = Fourier::new(24);
        let mut work = fourier.workspace();
        let block: Vec<f64> = (0..24).map(|i| ((i * i) % 7) as f64 - 2.0).collect();
        work.block.copy_from_slice(&block);
        fourier.power(&mut work);
        fourier.autocorrelation(&mut work);
        for (lag, &r) in work.block.iter().enumerate() {
            let plain: f64 = (0..24).map(|t| block[t] * block[(t + 24 - lag) % 24]).sum();
            assert!((r - plain).abs() < 1e-9, "lag {lag}: {r}, expected {plain}");
        }
    }
}
