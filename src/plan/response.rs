//! Turns a spectrum finer than a plan's bands into the bands that the plan's analysis would find, and back.

use super::spectrum::Grid;

/// What reaches a band through the window's skirts is followed this far, bins of the plan's own transform.
const REACH: usize = 18;

/// The plan's analysis as a linear map: mean power of each band, of sound with the power `s[j]` at bin j of a grid.
///
/// `bands = A s`; a row of A is the band's triangle over the grid, widened by the power response of the analysis' window. Rows sum to 1.
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

#[cfg(test)]
mod tests {
    use super::super::spectrum::FLOOR;
    use super::super::{PlanConfig, Spectrum};
    use super::*;
    use crate::rng::Rng;

    fn spectrum() -> Spectrum {
        Spectrum::new(16_000, &PlanConfig::default()).unwrap()
    }

    /// The whole map, `[n_bands][n_bins]`.
    fn dense(response: &Response) -> Vec<Vec<f64>> {
        let row = |(first, weights): &(usize, Vec<f64>)| {
            let mut row = vec![0.0; response.per_column.len()];
            row[*first..*first + weights.len()].copy_from_slice(weights);
            row
        };
        response.rows.iter().map(row).collect()
    }

    #[test]
    fn a_column_is_what_the_analysis_finds_of_a_tone() {
        let spectrum = spectrum();
        let a = dense(&spectrum.response());
        for bin in [40, 113, 226, 511, 1333] {
            let turn = std::f64::consts::TAU * bin as f64 / 4096.0;
            let tone: Vec<f32> = (0..2048).map(|t| (0.5 * (turn * f64::from(t) + 0.3).sin()) as f32).collect();
            let found: Vec<f64> =
                spectrum.analyse_last(&tone).iter().map(|&band| f64::from(4.0 * band).exp() - FLOOR).collect();
            let column: Vec<f64> = a.iter().map(|row| row[bin]).collect();
            let (total, sum): (f64, f64) = (found.iter().sum(), column.iter().sum());
            let off: f64 = found.iter().zip(&column).map(|(f, c)| (f / total - c / sum).abs()).sum();
            // The triangles are those of the finer grid: a tenth of a line's power may fall into other bands.
            assert!(0.5 * off < 0.1, "bin {bin}: {off}");
        }
    }

    #[test]
    fn a_step_is_that_of_the_plain_formula() {
        let response = spectrum().response();
        let (a, mut rng) = (dense(&response), Rng::new(8));
        let mut s: Vec<f64> = (0..response.per_column.len()).map(|_| f64::from(rng.uniform())).collect();
        let planned: Vec<f64> = a.iter().map(|_| f64::from(4.0 * rng.normal()).exp()).collect();
        let seen: Vec<f64> = a.iter().map(|row| row.iter().zip(&s).map(|(a, s)| a * s).sum()).collect();
        let plain: Vec<f64> = (0..s.len())
            .map(|j| {
                let back: f64 = a.iter().zip(planned.iter().zip(&seen)).map(|(row, (p, seen))| row[j] * p / seen).sum();
                s[j] * back / a.iter().map(|row| row[j]).sum::<f64>()
            })
            .collect();
        let mut back = vec![0.0; s.len()];
        response.sharpen(&mut s, &planned, &mut back);
        for (bin, (fast, plain)) in s.iter().zip(&plain).enumerate() {
            assert!((fast - plain).abs() <= 1e-12 * plain, "bin {bin}: {fast}, expected {plain}");
        }
    }
}
