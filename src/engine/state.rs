//! A stream's state as bytes that every engine can write and read, so that a session may change engines.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::{EngineError, state_error};
use crate::codec::{N_CODES, Token};
use crate::forecast::{PastForecast, PlannedForecast};
use crate::model::config::ModelConfig;
use crate::model::wave_transformer::PLAN_FRAMES;
use crate::sampler::Drive;

/// Names inside a saved state.
const HIDDEN: &str = "plan.hidden";
const COUNTERS: &str = "counters";

/// Everything that a stream remembers between two plan frames.
pub struct SavedStream {
    pub counters: Counters,
    /// Hidden state of the plan transformer after the last frame, `[dim]`; `None` before the first.
    pub hidden: Option<Vec<f32>>,
    /// Ring caches: `plan.<block>` and `wave.<tier>.<block>`.
    pub caches: BTreeMap<String, SavedCache>,
}

/// The part that is not tensors.
#[derive(Clone, Serialize, Deserialize)]
pub struct Counters {
    /// Plan frames so far.
    pub plan_pos: u64,
    /// Samples so far.
    pub n: u64,
    /// The last tokens that some tier reads.
    pub tokens: Vec<Token>,
    /// Residual code of the last sample.
    pub residual_code: Token,
    /// The last plan frames, oldest first.
    pub plan: Vec<Vec<f32>>,
    pub past: PastForecast,
    pub planned: PlannedForecast,
    pub drive: Drive,
}

/// Keys and values of one block; the position p lies in slot p mod window.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedCache {
    /// `[n_heads, window, head_dim]`
    pub shape: [usize; 3],
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

/// Names and shapes of a model's caches.
fn cache_shapes(config: &ModelConfig) -> BTreeMap<String, [usize; 3]> {
    let plan = &config.plan_transformer;
    let plan_shape = [plan.n_heads, plan.window, plan.dim / plan.n_heads];
    let mut shapes: BTreeMap<_, _> = (0..plan.n_layers).map(|i| (plan_cache(i), plan_shape)).collect();
    for (i, tier) in config.wave_transformer.tiers.iter().enumerate() {
        let shape = [tier.n_heads, tier.window, tier.dim / tier.n_heads];
        shapes.extend((0..tier.n_layers).map(|j| (wave_cache(i, j), shape)));
    }
    shapes
}

/// Name of a block's cache in the plan transformer.
pub fn plan_cache(block: usize) -> String {
    format!("plan.{block}")
}

/// Name of a block's cache in a tier of the wave transformer.
pub fn wave_cache(tier: usize, block: usize) -> String {
    format!("wave.{tier}.{block}")
}

/// No stream gets so far: 2,000 years of samples.
const LAST_POSITION: u64 = 1 << 50;

impl SavedStream {
    pub fn to_bytes(&self) -> Result<Vec<u8>, EngineError> {
        let bytes = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        let mut tensors = Vec::new();
        for (name, cache) in &self.caches {
            tensors.push((format!("{name}.keys"), cache.shape.to_vec(), bytes(&cache.keys)));
            tensors.push((format!("{name}.values"), cache.shape.to_vec(), bytes(&cache.values)));
        }
        if let Some(hidden) = &self.hidden {
            tensors.push((HIDDEN.to_owned(), vec![hidden.len()], bytes(hidden)));
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(state_error)?;
        let counters = serde_json::to_string(&self.counters).map_err(state_error)?;
        safetensors::serialize(views, Some(HashMap::from([(COUNTERS.to_owned(), counters)]))).map_err(state_error)
    }

    /// # Errors
    /// When the bytes are damaged, or of a model with other sizes.
    pub fn from_bytes(bytes: &[u8], config: &ModelConfig, n_bands: usize) -> Result<Self, EngineError> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(state_error)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let counters: Counters = serde_json::from_str(metadata.get(COUNTERS).map(String::as_str).unwrap_or_default())
            .map_err(state_error)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(state_error)?;
        let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>, EngineError> {
            let view = tensors.tensor(name).map_err(state_error)?;
            if view.shape() != shape || view.dtype() != Dtype::F32 {
                return Err(EngineError::State(format!("'{name}' has shape {:?}, expected {shape:?}", view.shape())));
            }
            let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            match values.iter().all(|v| v.is_finite()) {
                true => Ok(values),
                false => Err(EngineError::State(format!("'{name}' holds values that are not finite"))),
            }
        };
        let caches = cache_shapes(config)
            .into_iter()
            .map(|(name, shape)| {
                let (keys, values) = (read(&format!("{name}.keys"), &shape)?, read(&format!("{name}.values"), &shape)?);
                Ok((name, SavedCache { shape, keys, values }))
            })
            .collect::<Result<_, EngineError>>()?;
        let hidden = match tensors.names().contains(&HIDDEN) {
            true => Some(read(HIDDEN, &[config.plan_transformer.dim])?),
            false => None,
        };
        super::expect("tokens of history", config.wave_transformer.history(), counters.tokens.len())?;
        super::expect("plan frames", PLAN_FRAMES, counters.plan.len())?;
        for frame in &counters.plan {
            super::expect("plan bands", n_bands, frame.len())?;
        }
        super::check_tokens(config, &counters.tokens)?;
        if [counters.past.config(), counters.planned.config()] != [&config.forecast; 2] {
            return Err(state_error("forecasts of another model"));
        }
        if counters.plan_pos.max(counters.n) > LAST_POSITION {
            return Err(state_error(format!("frame {}, sample {}", counters.plan_pos, counters.n)));
        }
        if usize::from(counters.residual_code) >= N_CODES {
            return Err(state_error(format!("residual code {}", counters.residual_code)));
        }
        Ok(Self { counters, hidden, caches })
    }
}
