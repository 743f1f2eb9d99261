//! Turns an autocorrelation into the coefficients of a linear prediction (Levinson-Durbin), and applies them.

use crate::dot::dot;

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
    let falling: Vec<f64> = r[..=order].iter().rev().copied().collect(); // falling[order - lag] = r[lag]
    // After k steps: forward[..k] = a_1 ... a_k, and the same backwards: backward[order - k..] = a_k ... a_1.
    // Keeping both makes every loop below run forwards through memory.
    let mut forward = vec![0.0; order];
    let mut backward = vec![0.0; order];
    let mut power = r[0];
    for k in 0..order {
        // Also leaves when the power is not a number.
        if power.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
            break;
        }
        let reflection = (r[k + 1] - dot::<f64, 8>(&forward[..k], &falling[order - k..])) / power;
        for (a, b) in forward[..k].iter_mut().zip(&mut backward[order - k..]) {
            (*a, *b) = (*a - reflection * *b, *b - reflection * *a);
        }
        forward[k] = reflection;
        backward[order - k - 1] = reflection;
        power *= 1.0 - reflection * reflection;
    }
    Prediction {
        coefficients: forward.into_iter().map(|a| a as f32).collect(),
        residual_power: power.max(0.0), // also 0 when it is not a number
    }
}

/// The forecast after `recent`, `[order]` samples in the order of time, by coefficients turned round the same way
/// (the latest sample's last), held to [-1, 1]; 0 when it is not a number.
pub(super) fn predict(rising: &[f32], recent: &[f32]) -> f32 {
    let forecast = dot::<f32, 16>(rising, recent);
    if forecast.is_nan() { 0.0 } else { forecast.clamp(-1.0, 1.0) }
}
