//! Turns a spectrum finer than a plan's bands into the bands that the plan's analysis would find, and back.

use super::spectrum::Grid;

/// What reaches a band through the window's skirts is followed this far, bins of the plan's own transform.
const REACH: usize = 18;

/// The plan's analysis as a linear map: mean power of each band, of sound with the power `s[j]` at bin j of a grid.
///
/// `bands = A s`; a row of A is the band's triangle, widened by the power response of the analysis' window. Rows sum to 1.
pub(crate) struct Response {
    pub grid: Grid,
    /// Per band: its first bin and the weights from there on.
    pub rows: Vec<(usize, Vec<f64>)>,
    /// 1 / sums of A's columns; 0 where no band reaches.
    pub per_column: Vec<f64>,
}

impl Response {
    /// Of bands over `grid`, analysed under `window`.
    pub fn new(grid: Grid, window: &[f64]) -> Self {
        let mut work = grid.fourier.workspace();
        work.block.fill(0.0);
        work.block[..window.len()].copy_from_slice(window);
        grid.fourier.power(&mut work);
        let n_bins = work.power.len();
        let skirt = &work.power[..n_bins.min(REACH * work.block.len() / window.len() + 1)];
        let reach = skirt.len() - 1;
        let row = |(first, triangle): &(usize, Vec<f64>)| {
            let from = first.saturating_sub(reach);
            let mut weights = vec![0.0; (first + triangle.len() + reach).min(n_bins) - from];
            for (bin, share) in triangle.iter().enumerate() {
                for (at, weight) in weights.iter_mut().enumerate() {
                    *weight += share * skirt.get((from + at).abs_diff(first + bin)).unwrap_or(&0.0);
                }
            }
            let sum: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
            (from, weights)
        };
        let rows: Vec<_> = grid.bands().iter().map(row).collect();
        let mut per_column = vec![0.0; n_bins];
        for (first, weights) in &rows {
            per_column[*first..].iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
        }
        per_column.iter_mut().filter(|sum| **sum > 0.0).for_each(|sum| *sum = sum.recip());
        Self { grid, rows, per_column }
    }

    /// One step towards the spectrum whose bands are `planned`: `s *= A^T (planned / A s) / A^T 1` (Richardson, 1972;
    /// Lucy, 1974). Powers stay positive, and a line that its neighbours see only through the window's skirts becomes
    /// narrower with every step. `back` is room, `[n_bins]`.
    pub fn sharpen(&self, s: &mut [f64], planned: &[f64], back: &mut [f64]) {
        back.fill(0.0);
        for ((first, weights), planned) in self.rows.iter().zip(planned) {
            let ratio = planned / (dot(weights, &s[*first..]) + f64::MIN_POSITIVE);
            back[*first..].iter_mut().zip(weights).for_each(|(back, w)| *back += ratio * w);
        }
        for ((s, back), per_column) in s.iter_mut().zip(back).zip(&self.per_column) {
            *s *= *back * per_column;
        }
    }

    #[cfg(test)]
    pub fn bands_of(&self, s: &[f64]) -> Vec<f64> {
        self.rows.iter().map(|(first, weights)| dot(weights, &s[*first..])).collect()
    }
}

/// In eight sums, so that it is quick and the same on every machine.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b[..a.len()].chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}
