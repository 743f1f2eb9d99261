//! The transformers, in candle: the readable truth that training uses and the fast engines are tested against.

pub mod block;
pub mod config;
pub mod excerpt;
pub mod features;
pub mod head;
pub mod ops;
pub mod params;
pub mod plan_transformer;
pub mod rounding;
pub mod wave_transformer;

use config::ModelConfig;
use params::{Params, ParamsError};
use plan_transformer::PlanTransformer;
use wave_transformer::WaveTransformer;

/// Both transformers of a checkpoint.
pub struct Model {
    pub plan: PlanTransformer,
    pub wave: WaveTransformer,
}

impl Model {
    /// Tensor names begin with `plan.` and `wave.`; `n_bands` is the plan's.
    pub fn new(params: &mut Params, config: &ModelConfig, n_bands: usize) -> Result<Self, ParamsError> {
        Ok(Self {
            plan: params.under("plan", |params| PlanTransformer::new(params, config, n_bands))?,
            wave: params.under("wave", |params| WaveTransformer::new(params, config, n_bands))?,
        })
    }
}
