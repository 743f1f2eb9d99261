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

/// Bytes of `Tone` in kernels/tones.cuh, and the parts that tones are cut into.
const TONE_BYTES: usize = 32;
const PARTS: usize = 4;

/// Bytes of shared memory in which tones are found and summed: the past, transformed, or sums over two frames, and a tone for every
/// other bin at most.
pub(super) fn tones_room(n_bins: usize, hop: usize) -> usize {
    size_of::<f64>() * (2 * (n_bins - 1)).max(PARTS * 2 * hop) + TONE_BYTES * (n_bins - 1) / 2
}
