//! Turns a plan's analysis into the tables that kernels/planned_spectrum.cuh reads.

use std::f64::consts::TAU;

use super::LaunchError;
use crate::plan::Spectrum;

/// The bins of the spectrum that a plan frame describes, and what the analysis sees of them; layouts in kernels/args.cuh.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanGrid {
    pub n_bands: usize,
    pub n_bins: usize,
    pub places: Vec<i32>,
    pub numbers: Vec<f64>,
}

impl PlanGrid {
    /// For plans that are sharpened in `deconvolution` steps.
    ///
    /// # Errors
    /// When the kernels cannot transform spectra of the plan's window.
    pub fn new(spectrum: &Spectrum, deconvolution: usize) -> Result<Self, LaunchError> {
        let window = spectrum.window_len();
        let response = (deconvolution > 0).then(|| spectrum.response());
        let bins = response.as_ref().map_or(spectrum.interpolation(), |response| &response.grid.bins);
        let n = 2 * (bins.len() - 1);
        if !only_twos_and_threes(n / 2) {
            return Err(LaunchError::Window(window));
        }
        let mut places: Vec<i32> = bins.iter().flat_map(|&(below, above, _)| [below as i32, above as i32]).collect();
        let mut numbers: Vec<f64> = bins.iter().map(|bin| bin.2).collect();
        let turn = |j: usize| {
            let (sin, cos) = (-TAU * j as f64 / n as f64).sin_cos();
            [cos, sin]
        };
        let turns = (0..n).flat_map(turn);
        match &response {
            Some(response) => {
                let mut weights: Vec<f64> = Vec::new();
                for (first, row) in &response.rows {
                    places.extend([*first as i32, weights.len() as i32]);
                    weights.extend(row);
                }
                places.extend([0, weights.len() as i32]);
                let sees =
                    |bin: usize| move |(first, row): &(usize, Vec<f64>)| (*first..first + row.len()).contains(&bin);
                for bin in 0..bins.len() {
                    // Bands rise, so those that see a bin are neighbours.
                    let first = response.rows.iter().position(sees(bin)).unwrap_or(0);
                    let end = response.rows.iter().rposition(sees(bin)).map_or(first, |last| last + 1);
                    places.extend([first as i32, end as i32]);
                }
                numbers.extend(&response.per_column);
                numbers.extend(turns);
                numbers.extend(weights);
                numbers.push(spectrum.own_share());
            }
            None => {
                numbers.extend(bins.iter().map(|_| 0.0));
                numbers.extend(turns);
            }
        }
        Ok(Self { n_bands: spectrum.n_bands(), n_bins: bins.len(), places, numbers })
    }

    /// f64 of shared memory that a `PlannedSpectrum` takes.
    pub(super) fn room(n_bins: usize, n_bands: usize) -> usize {
        n_bins.next_multiple_of(2) + (2 * (n_bins - 1)).max(n_bins + 2 * n_bands)
    }
}

fn only_twos_and_threes(mut n: usize) -> bool {
    for factor in [2, 3] {
        while n > 0 && n.is_multiple_of(factor) {
            n /= factor;
        }
    }
    n == 1
}
