//! Sizes of a model: what a preset file or a checkpoint's metadata says, checked; no tensor library here.

use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::forecast::ForecastConfig;
use crate::plan::{DB_PER_UNIT, PlanConfig};

/// Number of linear forecasts that the mixture head stands on: one from the past, one from the plan.
pub const N_FORECASTS: usize = 2;

/// Everything that fixes the shapes and the meaning of a model's weights.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Name of the preset it came from.
    pub name: String,
    pub codec: Codec,
    pub plan: PlanConfig,
    pub forecast: ForecastConfig,
    pub plan_transformer: PlanTransformerConfig,
    pub wave_transformer: WaveTransformerConfig,
}

/// Plan frames of a training context, where pieces are long enough: 16 s. What lies further back was never attended to in training, and is
/// worse than nothing.
pub const PLAN_CONTEXT: usize = 512;

/// Plan frames that an engine reads into the wave transformer of a prompt, however long: more than the attention windows of the presets hold.
pub(crate) const WAVE_CONTEXT: usize = 32;

/// Numbers that the attention of one stream remembers as keys at most, and as many as values.
const LARGEST_CACHE: usize = 1 << 26;

/// The causal language model over plan frames.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanTransformerConfig {
    /// Width of the residual stream.
    pub dim: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    /// Attention window in plan frames, [`PLAN_CONTEXT`] at most.
    pub window: usize,
    /// Hidden width of the SwiGLU as a multiple of `dim`.
    pub hidden_multiple: usize,
    /// Share of the input features dropped in training.
    pub dropout: f32,
    /// Whether what it has read says more of a frame than the codebooks' sum: a linear map of its state, fitted after training.
    pub refine: bool,
}

impl Default for PlanTransformerConfig {
    fn default() -> Self {
        Self {
            dim: 320,
            n_layers: 5,
            n_heads: 5,
            window: PLAN_CONTEXT,
            hidden_multiple: 3,
            dropout: 0.1,
            refine: false,
        }
    }
}

impl PlanTransformerConfig {
    /// Multiply-adds per plan frame of its matrices (attention scores not counted).
    pub fn multiply_adds_per_frame(&self, plan: &PlanConfig, n_bands: usize) -> f64 {
        let dim = self.dim as f64;
        let block = (4 + 3 * self.hidden_multiple) as f64 * dim * dim;
        let head = dim * dim + dim * plan.n_entries as f64;
        n_bands as f64 * dim + self.n_layers as f64 * block + plan.n_codebooks as f64 * head
    }
}

/// One tier of the wave transformer: one step per `hop` samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierConfig {
    /// Samples per step; the last tier has 1.
    pub hop: usize,
    pub dim: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    /// Attention window in steps of this tier.
    pub window: usize,
}

/// The multi-scale model of single samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WaveTransformerConfig {
    /// From the coarsest to the sample tier.
    pub tiers: Vec<TierConfig>,
    /// Hidden width of each SwiGLU as a multiple of the tier's `dim`.
    pub hidden_multiple: usize,
    /// Tokens before the step that the sample tier sees directly.
    pub taps: usize,
    /// Width of a token's learned embedding (its companded and linear value are appended).
    pub token_dim: usize,
    /// Width of the vector made from the last three plan frames.
    pub plan_dim: usize,
    /// Logistic components around each forecast.
    pub components: usize,
    /// Scale vectors per plan frame.
    pub slices: usize,
    /// Hidden width of the network from plan vector to scales.
    pub slice_dim: usize,
    /// How far (nats) the history may move a component's scale away from the planned one.
    pub own_scale: f32,
    /// Hidden width of the network from forecast features straight to the head.
    pub shortcut_dim: usize,
}

impl Default for WaveTransformerConfig {
    fn default() -> Self {
        let tier = |hop, dim, n_layers, n_heads, window| TierConfig { hop, dim, n_layers, n_heads, window };
        Self {
            tiers: vec![tier(64, 256, 4, 4, 128), tier(8, 192, 3, 3, 128), tier(1, 96, 2, 2, 32)],
            hidden_multiple: 3,
            taps: 8,
            token_dim: 16,
            plan_dim: 384,
            components: 3,
            slices: 8,
            slice_dim: 128,
            own_scale: 0.35,
            shortcut_dim: 96,
        }
    }
}

impl WaveTransformerConfig {
    /// Tokens before a step that some tier reads.
    pub fn history(&self) -> usize {
        self.tiers.iter().map(|t| t.hop).max().unwrap_or(1).max(self.taps)
    }

    /// Logistic components of the whole mixture.
    pub fn n_components(&self) -> usize {
        N_FORECASTS * self.components
    }

    /// Values the head emits per sample: log weight, mean offset and log scale of each component.
    pub fn head_dim(&self) -> usize {
        3 * self.n_components()
    }

    /// Multiply-adds per sample of the wave transformer's matrices (attention scores not counted).
    pub fn multiply_adds_per_sample(&self) -> f64 {
        self.tier_multiply_adds_per_sample().iter().sum()
    }

    /// The same, tier by tier; the last one's with the head.
    pub fn tier_multiply_adds_per_sample(&self) -> Vec<f64> {
        let token = (self.token_dim + 2) as f64;
        let of_tier = |(i, tier): (usize, &TierConfig)| {
            let dim = tier.dim as f64;
            let inputs = if tier.hop > 1 { tier.hop } else { self.taps } as f64 * token;
            let block = (4 + 3 * self.hidden_multiple) as f64 * dim * dim;
            let mut step = inputs * dim + tier.n_layers as f64 * block;
            if let Some(next) = self.tiers.get(i + 1) {
                step += dim * (tier.hop / next.hop * next.dim) as f64;
            } else {
                step += dim * self.head_dim() as f64;
            }
            step / tier.hop as f64
        };
        self.tiers.iter().enumerate().map(of_tier).collect()
    }
}

/// Why a configuration cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{0}")]
    Invalid(String),
    #[error("unknown preset '{0}': there are {names}, or give a .toml file", names = PRESET_NAMES.join(", "))]
    UnknownPreset(String),
    #[error("reading the preset")]
    Io(#[from] std::io::Error),
    #[error("parsing the preset: {0}")]
    Toml(#[from] toml::de::Error),
}

/// Names of the presets inside the program.
pub const PRESET_NAMES: [&str; 3] = ["tiny", "small", "base"];

impl ModelConfig {
    /// A preset by name (`tiny`, `small`, `base`) or from a `.toml` file; unset fields inherit the defaults.
    pub fn preset(name_or_path: &str) -> Result<Self, ConfigError> {
        let text = match name_or_path {
            "tiny" => include_str!("../../models/tiny.toml").to_owned(),
            "small" => include_str!("../../models/small.toml").to_owned(),
            "base" => include_str!("../../models/base.toml").to_owned(),
            path if path.ends_with(".toml") => std::fs::read_to_string(path)?,
            other => return Err(ConfigError::UnknownPreset(other.to_owned())),
        };
        let config: Self = toml::from_str(&text)?;
        config.validate()?;
        Ok(config)
    }

    /// Plan frames before an excerpt that its forecasts and its plan's window hear.
    pub fn run_up(&self) -> usize {
        self.forecast.frames_before(&self.plan).max(self.plan.window.div_ceil(self.plan.hop))
    }

    /// Checks that all parts fit each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |message: String| Err(ConfigError::Invalid(message));
        check_sizes("", &serde_json::to_value(self).map_err(|e| ConfigError::Invalid(e.to_string()))?)?;
        self.plan.validate(self.codec.sample_rate).map_err(|e| ConfigError::Invalid(e.to_string()))?;
        self.forecast.validate(&self.plan).map_err(|e| ConfigError::Invalid(e.to_string()))?;
        let plan = &self.plan_transformer;
        check_heads("plan transformer", plan.dim, plan.n_heads)?;
        if plan.window > PLAN_CONTEXT {
            return fail(format!(
                "plan transformer: a window of {} frames is more than the {PLAN_CONTEXT} that training hears at once; \
                 give {PLAN_CONTEXT} at most",
                plan.window
            ));
        }
        if plan.window == 0 || plan.n_layers == 0 || plan.hidden_multiple == 0 {
            return fail("plan transformer: window, n_layers and hidden_multiple must be at least 1".into());
        }
        if !(0.0..1.0).contains(&plan.dropout) {
            return fail(format!("plan transformer: dropout must lie in [0, 1), got {}", plan.dropout));
        }
        let wave = &self.wave_transformer;
        let sizes = [wave.taps, wave.token_dim, wave.plan_dim, wave.components, wave.slices, wave.slice_dim];
        if sizes.contains(&0) || wave.shortcut_dim == 0 || wave.hidden_multiple == 0 {
            return fail("wave transformer: every size must be at least 1".into());
        }
        if !self.plan.hop.is_multiple_of(wave.slices) {
            return fail(format!("{} slices do not divide the plan's hop of {}", wave.slices, self.plan.hop));
        }
        if !wave.own_scale.is_finite() || wave.own_scale <= 0.0 {
            return fail(format!("own_scale must be positive and finite, got {}", wave.own_scale));
        }
        if wave.tiers.last().is_none_or(|t| t.hop != 1) {
            return fail("wave transformer: the last tier must have hop 1".into());
        }
        let mut hop_above = self.plan.hop;
        for (i, tier) in wave.tiers.iter().enumerate() {
            check_heads(&format!("tier {i}"), tier.dim, tier.n_heads)?;
            if tier.hop == 0 || !hop_above.is_multiple_of(tier.hop) || (i > 0 && tier.hop == hop_above) {
                return fail(format!("tier {i}: hop {} must divide {hop_above} and be smaller", tier.hop));
            }
            if tier.window == 0 || tier.n_layers == 0 {
                return fail(format!("tier {i}: window and n_layers must be at least 1"));
            }
            hop_above = tier.hop;
        }
        let of_tier = |t: &TierConfig| t.n_layers.saturating_mul(t.window * t.dim);
        let cache = wave.tiers.iter().map(of_tier).fold(0, usize::saturating_add);
        let cache = cache.saturating_add(plan.n_layers.saturating_mul(plan.window * plan.dim));
        if cache > LARGEST_CACHE {
            return fail(format!("attention would remember {cache} keys' features a stream, {LARGEST_CACHE} at most"));
        }
        Ok(())
    }
}

/// No number of a configuration is larger: what follows from a damaged one is refused before memory is asked for.
const LARGEST: f64 = (1 << 17) as f64;

/// Checks every number in `value`, which is called `name`.
fn check_sizes(name: &str, value: &serde_json::Value) -> Result<(), ConfigError> {
    use serde_json::Value;
    let within = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    match value {
        Value::Object(fields) => fields.iter().try_for_each(|(key, value)| check_sizes(&within(key), value)),
        Value::Array(items) => {
            items.iter().enumerate().try_for_each(|(i, item)| check_sizes(&within(&i.to_string()), item))
        }
        Value::Number(number) if number.as_f64().is_some_and(|number| number > LARGEST) => {
            Err(ConfigError::Invalid(format!("{name} is {number}, and nothing may be more than {LARGEST}")))
        }
        _ => Ok(()),
    }
}

fn check_heads(what: &str, dim: usize, n_heads: usize) -> Result<(), ConfigError> {
    if n_heads == 0 || dim == 0 || !dim.is_multiple_of(2 * n_heads) {
        return Err(ConfigError::Invalid(format!(
            "{what}: dim {dim} must be an even number of features for each of {n_heads} heads"
        )));
    }
    Ok(())
}

/// The numbers that turn the most likely model into the one that sounds right; fitted in free run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationSettings {
    /// Factor on what is added to the forecast, whose power the plan gives.
    pub grain: f32,
    /// Factor on the weights of the components around the forecast from the past.
    pub past: f32,
    /// Factor on the learned offset of the components' means.
    pub offset: f32,
    /// Added to the planned power of what is played, dB: plans through the codebooks flicker, and the forecast takes that for notes.
    pub level_db: f32,
}

impl GenerationSettings {
    /// A planned band as it is played, both in plan units.
    pub fn played(&self, band: f32) -> f32 {
        band + self.level_db / DB_PER_UNIT
    }
}

impl Default for GenerationSettings {
    fn default() -> Self {
        Self { grain: 1.0, past: 0.0, offset: 0.0, level_db: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid() {
        for name in PRESET_NAMES {
            let config = ModelConfig::preset(name).unwrap();
            assert_eq!(config.name, name);
        }
    }

    #[test]
    fn a_tier_that_does_not_divide_the_one_above_is_refused() {
        let mut config = ModelConfig::preset("tiny").unwrap();
        config.wave_transformer.tiers[0].hop = 7;
        assert!(config.validate().unwrap_err().to_string().contains("hop 7"));
    }

    #[test]
    fn sizes_beyond_measure_are_refused_by_name() {
        let mut config = ModelConfig::preset("tiny").unwrap();
        config.wave_transformer.tiers[1].window = 1 << 40;
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains("wave_transformer.tiers.1.window is 1099511627776"), "{message}");
    }

    #[test]
    fn the_base_preset_costs_half_a_million_multiply_adds() {
        let cost = ModelConfig::preset("base").unwrap().wave_transformer.multiply_adds_per_sample();
        assert!((0.45e6..0.6e6).contains(&cost), "{cost}");
    }
}
