//! Turns an autocorrelation into the coefficients of a linear prediction (Levinson-Durbin), and applies them.

use crate::simd::Kernels;

/// A linear prediction `x[n] ~ sum_k coefficients[k] x[n - 1 - k]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// `[order]`, the latest sample's first.
    pub coefficients: Vec<f32>,
    /// Mean power of what the prediction leaves over, in the autocorrelation's units.
    pub residual_power: f64,
}

/// Autocorrelation of a block at lags `0..=order`: the plain definition, which the fast paths are tested against.
pub fn autocorrelation(block: &[f64], order: usize) -> Vec<f64> {
    (0..=order).map(|lag| block.iter().skip(lag).zip(block).map(|(x, y)| x * y).sum()).collect()
}

/// The prediction of least squared error for a signal with autocorrelation `r` (lags `0..=order`), by the
/// Levinson-Durbin recursion in f64. Where `r` is not positive definite the recursion stops early and the
/// remaining coefficients are 0.
///
/// # Panics
/// If `r` has fewer than `order + 1` lags.
pub fn levinson(r: &[f64], order: usize) -> Prediction {
    let mut recursion = Recursion::new(order);
    let residual_power = recursion.solve(&r[..=order], Kernels::chosen());
    let coefficients = recursion.rising().rev().collect();
    Prediction { coefficients, residual_power }
}

/// The Levinson-Durbin recursion with room to work in.
#[derive(Clone, Debug)]
pub(super) struct Recursion {
    order: usize,
    falling: Vec<f64>,
    forward: Vec<f64>,
    backward: Vec<f64>,
}

impl Recursion {
    pub fn new(order: usize) -> Self {
        let buffer = vec![0.0; order + 1];
        Self { order, falling: buffer.clone(), forward: buffer.clone(), backward: buffer }
    }

    /// Solves for the autocorrelation `r` (lags `0..=order`); returns the power of the residual.
    pub fn solve(&mut self, r: &[f64], kernels: &Kernels) -> f64 {
        let Self { order, falling, forward, backward } = self;
        let power = (kernels.levinson)(r, *order, falling, forward, backward);
        power.max(0.0) // also 0 when it is not a number
    }

    /// The coefficients found, the latest sample's last.
    pub fn rising(&self) -> impl DoubleEndedIterator<Item = f32> + '_ {
        self.backward[..self.order].iter().map(|&a| a as f32)
    }
}

/// The forecast after `recent`, `[order]` samples in the order of time, by coefficients turned round the same way
/// (the latest sample's last); 0 when it is not a number.
pub(super) fn predict(rising: &[f32], recent: &[f32], kernels: &Kernels) -> f32 {
    let forecast = (kernels.dot)(rising, recent);
    if forecast.is_nan() { 0.0 } else { forecast }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Solves the normal equations `sum_j r[|i - j|] a[j] = r[i + 1]` by Gaussian elimination with pivoting.
    fn solve_normal_equations(r: &[f64], order: usize) -> Vec<f64> {
        let mut rows: Vec<Vec<f64>> =
            (0..order).map(|i| (0..order).map(|j| r[i.abs_diff(j)]).chain([r[i + 1]]).collect()).collect();
        for i in 0..order {
            let pivot = (i..order).max_by(|&a, &b| rows[a][i].abs().total_cmp(&rows[b][i].abs())).unwrap();
            rows.swap(i, pivot);
            let row = rows[i].clone();
            for other in (0..order).filter(|&j| j != i) {
                let factor = rows[other][i] / row[i];
                rows[other].iter_mut().zip(&row).for_each(|(x, y)| *x -= factor * y);
            }
        }
        (0..order).map(|i| rows[i][order] / rows[i][i]).collect()
    }

    #[test]
    fn a_known_process_is_found_again() {
        // x[n] = 1.6 x[n-1] - 0.8 x[n-2] + e: r[1] = 1.6 / 1.8 r[0], then the process's own recursion.
        let mut r = vec![1.0, 1.6 / 1.8];
        for lag in 2..=20 {
            r.push(1.6 * r[lag - 1] - 0.8 * r[lag - 2]);
        }
        let prediction = levinson(&r, 20);
        for (k, &a) in prediction.coefficients.iter().enumerate() {
            let expected = [1.6, -0.8].get(k).copied().unwrap_or(0.0);
            assert!((a - expected).abs() < 1e-6, "coefficient {k}: {a}, expected {expected}");
        }
        let innovation = r[0] - 1.6 * r[1] + 0.8 * r[2];
        assert!((prediction.residual_power - innovation).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_autocorrelation_gives_no_forecast() {
        for r in [[0.0; 5], [f64::NAN; 5], [-1.0, 0.5, 0.0, 0.0, 0.0]] {
            let prediction = levinson(&r, 4);
            assert_eq!(prediction, Prediction { coefficients: vec![0.0; 4], residual_power: 0.0 }, "{r:?}");
        }
        assert_eq!(levinson(&[2.0], 0).residual_power, 2.0);
        assert_eq!(predict(&[1.0], &[f32::NAN], Kernels::chosen()), 0.0);
    }

    proptest! {
        #[test]
        fn recursion_equals_the_direct_solution(block in prop::collection::vec(-1f64..1.0, 80), order in 1usize..40) {
            let mut r = autocorrelation(&block, order);
            r[0] += 1e-3;
            let prediction = levinson(&r, order);
            let direct = solve_normal_equations(&r, order);
            for (k, (&a, &b)) in prediction.coefficients.iter().zip(&direct).enumerate() {
                prop_assert!((f64::from(a) - b).abs() < 1e-6 * (1.0 + b.abs()), "coefficient {k}: {a}, expected {b}");
            }
            let power = r[0] - direct.iter().zip(&r[1..]).map(|(a, r)| a * r).sum::<f64>();
            prop_assert!((prediction.residual_power - power).abs() < 1e-9 * r[0]);
        }
    }
}
