//! The mixture-of-logistics head over whole excerpts: head outputs -> negative log-likelihood of tokens, in candle.
//!
//! [`crate::sampler::Mixture`] is the same distribution for one sample, and its oracle.

use candle_core::{D, Result, Tensor};

use super::config::N_FORECASTS;
use crate::codec::{Codec, Token};
use crate::sampler::{MAX_LOG_SCALE, MAX_OFFSET, unit_scale};

/// What the likelihood needs to know of each sample besides the head's output; plain data made beside the model.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    /// Forecasts, `[n, 2]`.
    pub forecasts: Vec<f32>,
    /// Unit of offsets and scales around each forecast, `[n, 2]`.
    pub units: Vec<f32>,
    /// Lower and upper edge of the bin of the token that came, `[n]` each.
    pub low: Vec<f32>,
    pub high: Vec<f32>,
}

impl Targets {
    /// Appends one sample.
    pub fn push(&mut self, token: Token, forecasts: [f32; N_FORECASTS], log_scale: f32, codec: &Codec) {
        self.forecasts.extend(forecasts);
        self.units.extend(forecasts.map(|p| unit_scale(p, log_scale, codec)));
        self.low.push(codec.edge(token.into()));
        self.high.push(codec.edge(usize::from(token) + 1));
    }

    fn tensors(&self) -> Result<[Tensor; 4]> {
        let device = &candle_core::Device::Cpu;
        let n = self.low.len();
        let per_forecast = |v: &[f32]| Tensor::from_slice(v, (n, N_FORECASTS, 1), device);
        let per_sample = |v: &[f32]| Tensor::from_slice(v, (n, 1, 1), device);
        Ok([
            per_forecast(&self.forecasts)?,
            per_forecast(&self.units)?,
            per_sample(&self.low)?,
            per_sample(&self.high)?,
        ])
    }
}

/// Least distance of a bin's edges in scales that the f32 logarithm is trusted with.
const LEAST_BIN: f64 = 1e-6;

/// ln(sigmoid(x)) without overflow on either side.
fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let least = x.minimum(0.0)?;
    let tail = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    least - tail
}

/// Head outputs `[..., 3 * n_components]` of n samples -> -ln P(token), `[n]`, in nats.
pub fn nll(head: &Tensor, targets: &Targets) -> Result<Tensor> {
    let [forecasts, units, low, high] = targets.tensors()?;
    let n = targets.low.len();
    let k = head.dim(D::Minus1)? / 3;
    let head = head.reshape((n, 3, k))?;
    let part = |i: usize| head.narrow(1, i, 1)?.squeeze(1)?.contiguous();
    let grouped = |t: Tensor| t.reshape((n, N_FORECASTS, k / N_FORECASTS));
    let weights = part(0)?;
    let log_weights = grouped(weights.broadcast_sub(&weights.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?)?;
    let bounded = |t: Tensor, limit: f64| (t / limit)?.tanh()? * limit;
    let offsets = grouped(bounded(part(1)?, f64::from(MAX_OFFSET))?)?;
    let log_scales = grouped(bounded(part(2)?, f64::from(MAX_LOG_SCALE))?)?;
    let means = offsets.broadcast_mul(&units)?.broadcast_add(&forecasts)?;
    let inverse_scales = log_scales.neg()?.exp()?.broadcast_div(&units)?;
    let a = (low.broadcast_sub(&means)? * &inverse_scales)?;
    let b = (high.broadcast_sub(&means)? * &inverse_scales)?;
    let difference = (&a - &b)?.minimum(-LEAST_BIN)?;
    let bin = (difference.exp()?.neg()? + 1.0)?.log()?;
    let terms = (((log_weights + log_sigmoid(&b)?)? + log_sigmoid(&a.neg()?)?)? + bin)?;
    terms.reshape((n, k))?.log_sum_exp(D::Minus1)?.neg()
}
