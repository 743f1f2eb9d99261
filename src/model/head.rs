//! The mixture-of-logistics head over whole excerpts: head outputs -> negative log-likelihood of tokens, in candle.
//!
//! [`crate::sampler::Mixture`] is the same distribution for one sample, and its oracle.

use candle_core::{Result, Tensor};

use super::config::N_FORECASTS;
use super::ops::{self, Inner};
use crate::codec::{Codec, Token};
use crate::sampler::unit_scale;

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
    /// Of several excerpts, one after the other.
    pub fn joined<'a>(all: impl Iterator<Item = &'a Self>) -> Self {
        let mut joined = Self::default();
        for targets in all {
            joined.forecasts.extend(&targets.forecasts);
            joined.units.extend(&targets.units);
            joined.low.extend(&targets.low);
            joined.high.extend(&targets.high);
        }
        joined
    }

    /// Appends one sample.
    pub fn push(&mut self, token: Token, forecasts: [f32; N_FORECASTS], log_scale: f32, codec: &Codec) {
        self.forecasts.extend(forecasts);
        self.units.extend(forecasts.map(|p| unit_scale(p, log_scale, codec)));
        self.low.push(codec.edge(token.into()));
        self.high.push(codec.edge(usize::from(token) + 1));
    }
}

/// Least distance of a bin's edges in scales that the f32 logarithm is trusted with.
pub(super) const LEAST_BIN: f32 = 1e-6;

/// Head outputs `[..., 3 * n_components]` of n samples -> -ln P(token), `[n]`, in nats.
pub fn nll(head: &Tensor, targets: &Targets) -> Result<Tensor> {
    (ops::of(head.device(), Inner::F32).nll)(head, targets)
}
