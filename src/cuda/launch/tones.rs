//! Turns a plan's window into the tables that kernels/tones.cuh reads.

use crate::forecast::tones_lobe;
use crate::plan::Spectrum;

/// How tones are found in the past; layouts in kernels/args.cuh.
#[derive(Clone, Debug, PartialEq)]
pub struct ToneTables {
    /// The plan's window.
    pub window: Vec<f64>,
    /// Its transform around a line, and what a line's bins say of its power.
    pub lobe: Vec<f64>,
}

impl ToneTables {
    /// For plans of `spectrum` over `n_bins` bins.
    pub fn new(spectrum: &Spectrum, n_bins: usize) -> Self {
        let n = 2 * (n_bins - 1);
        let lobe = tones_lobe(spectrum.window(), n);
        let of_bins = 2.0 / (spectrum.energy() * n as f64);
        Self {
            window: spectrum.window().to_vec(),
            lobe: lobe.iter().flat_map(|z| [z.re, z.im]).chain([of_bins]).collect(),
        }
    }
}

/// Bytes of `Tone` in kernels/tones.cuh.
const TONE_BYTES: usize = 24;

/// Bytes of shared memory in which tones are found: the past, transformed, and a tone for every other bin at most.
pub(super) fn tones_room(n_bins: usize) -> usize {
    (2 * size_of::<f64>() + TONE_BYTES / 2) * (n_bins - 1)
}
