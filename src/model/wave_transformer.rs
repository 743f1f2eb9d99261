//! The wave transformer: tiers of decreasing hop give the distribution of each sample from the samples before it, the
//! plan and two forecasts.
//!
//! Tier i makes one step per `hop_i` samples, sees the samples before its step and the plan frame that it lies in, and
//! hands a vector per sub-step down to tier i + 1. The last tier has hop 1 and feeds the mixture head.

use candle_core::{D, Device, Result, Tensor};

use super::block::{Block, KvCache, Linear, RmsNorm, matrix};
use super::config::{ModelConfig, WaveTransformerConfig};
use super::features::{N_FEATURES, N_TOKEN_VALUES, token_values};
use super::ops::Ops;
use super::params::{Init, Params, ParamsError};
use crate::codec::{Codec, N_CODES, Token};

/// Plan frames that the model sees at a time: the current one and the two before it.
pub const PLAN_FRAMES: usize = 3;

struct Tier {
    hop: usize,
    input: Tensor,   // (hop (or taps) * token width, dim)
    plan_in: Linear, // plan_dim -> dim
    blocks: Vec<Block>,
    down: Option<Linear>, // dim -> sub-steps * dim of the next tier
}

/// Weights of all tiers and the head.
pub struct WaveTransformer {
    config: WaveTransformerConfig,
    plan_hop: usize,
    codec: Codec,
    token_embedding: Tensor, // (N_CODES, token_dim)
    plan_mlp: [Linear; 2],   // PLAN_FRAMES * n_bands -> plan_dim -> plan_dim
    tiers: Vec<Tier>,
    feature_in: Linear,       // N_FEATURES -> dim of the sample tier
    past_code_in: Tensor,     // (N_CODES, dim)
    residual_code_in: Tensor, // (N_CODES, dim)
    norm: RmsNorm,
    head: Linear,                // dim -> 3 * n_components
    shortcut: [Linear; 3],       // N_FEATURES -> shortcut_dim -> shortcut_dim -> 3 * n_components
    planned_scales: [Linear; 2], // plan_dim -> slice_dim -> slices * n_components
    ops: &'static Ops,
}

/// Inputs of a batch of excerpts, on the CPU; all codes are u32.
pub struct WaveInputs {
    /// `[batch, history + time]`: codes of [`WaveTransformer::history`] tokens before the excerpt, then of its own.
    pub token_codes: Tensor,
    /// `[batch, history + time, N_TOKEN_VALUES]`: their values.
    pub token_values: Tensor,
    /// `[batch, time, N_FEATURES]`
    pub features: Tensor,
    /// `[batch, time]`: the bin of the forecast from the past.
    pub past_codes: Tensor,
    /// `[batch, time]`: the residual code of the sample before.
    pub residual_codes: Tensor,
    /// `[batch, 2 + time / plan hop, n_bands]`: two frames before the excerpt, then its own.
    pub plan: Tensor,
}

/// What the model says of a plan frame: one vector per tier, and the planned scales of each slice.
struct Planned {
    tiers: Vec<Tensor>, // per tier [batch, frames, dim]
    scales: Tensor,     // [batch, frames, slices, n_components]
}

/// Everything that changes while samples are generated one by one.
pub struct WaveState {
    /// Samples so far.
    pub n: u64,
    /// Ring caches by tier and block.
    pub caches: Vec<Vec<KvCache>>,
    /// The last [`WaveTransformer::history`] tokens.
    pub tokens: Vec<Token>,
    /// Residual code of the last sample.
    pub residual_code: Token,
    /// Vectors handed down to tier i + 1, `[1, sub-steps, dim]`; empty before the first step.
    pub handed: Vec<Option<Tensor>>,
    /// The last plan frames, oldest first, each `[n_bands]`.
    pub plan: Vec<Vec<f32>>,
    /// What the model derives from the plan frames, remade when a state is restored.
    frame: Option<FrameView>,
}

impl WaveState {
    /// The plan frame that the last samples lie in.
    pub fn last_frame(&self) -> &[f32] {
        self.plan.last().map_or(&[], Vec::as_slice)
    }
}

/// Constants of one plan frame on the step path.
struct FrameView {
    plan: Vec<Tensor>, // per tier (1, 1, dim)
    scales: Tensor,    // (slices, n_components)
}

impl WaveTransformer {
    pub fn new(params: &mut Params, config: &ModelConfig, n_bands: usize) -> std::result::Result<Self, ParamsError> {
        let wave = config.wave_transformer.clone();
        let width = wave.token_dim + N_TOKEN_VALUES;
        let sample_dim = wave.tiers.last().map_or(0, |t| t.dim);
        let biased = |params: &mut Params, name: &str, inputs, outputs| {
            Linear::new(params, name, inputs, outputs, Init::Linear, Init::Zeros)
        };
        let mut tiers = Vec::with_capacity(wave.tiers.len());
        for (i, tier) in wave.tiers.iter().enumerate() {
            let built = params.under("tiers", |params| {
                params.under(i, |params| {
                    let seen = if tier.hop > 1 { tier.hop } else { wave.taps };
                    let input = matrix(params, "input", seen * width, tier.dim)?;
                    let plan_in = biased(params, "plan_in", wave.plan_dim, tier.dim)?;
                    let blocks = (0..tier.n_layers)
                        .map(|j| {
                            params.under("blocks", |p| {
                                p.under(j, |p| Block::new(p, tier.dim, tier.n_heads, tier.window, wave.hidden_multiple))
                            })
                        })
                        .collect::<std::result::Result<_, _>>()?;
                    let down = match wave.tiers.get(i + 1) {
                        Some(next) => Some(biased(params, "down", tier.dim, tier.hop / next.hop * next.dim)?),
                        None => None,
                    };
                    Ok::<_, ParamsError>(Tier { hop: tier.hop, input, plan_in, blocks, down })
                })
            })?;
            tiers.push(built);
        }
        let zero = |params: &mut Params, name: &str, inputs, outputs| {
            Linear::new(params, name, inputs, outputs, Init::Zeros, Init::Zeros)
        };
        let code_table = |params: &mut Params, name: &str| params.get(name, &[N_CODES, sample_dim], Init::Normal(0.02));
        let scales_ramp = Init::Ramp { from: -1.2, to: 1.5, period: wave.components };
        Ok(Self {
            plan_hop: config.plan.hop,
            codec: config.codec.clone(),
            token_embedding: params.get("token_embedding", &[N_CODES, wave.token_dim], Init::Normal(0.3))?,
            plan_mlp: [
                biased(params, "plan_mlp.0", PLAN_FRAMES * n_bands, wave.plan_dim)?,
                biased(params, "plan_mlp.1", wave.plan_dim, wave.plan_dim)?,
            ],
            tiers,
            feature_in: biased(params, "feature_in", N_FEATURES, sample_dim)?,
            past_code_in: code_table(params, "past_code_in")?,
            residual_code_in: code_table(params, "residual_code_in")?,
            norm: RmsNorm::new(params, "norm", sample_dim)?,
            head: zero(params, "head", sample_dim, wave.head_dim())?,
            shortcut: [
                biased(params, "shortcut.0", N_FEATURES, wave.shortcut_dim)?,
                biased(params, "shortcut.1", wave.shortcut_dim, wave.shortcut_dim)?,
                zero(params, "shortcut.2", wave.shortcut_dim, wave.head_dim())?,
            ],
            planned_scales: [
                biased(params, "planned_scales.0", wave.plan_dim, wave.slice_dim)?,
                Linear::new(
                    params,
                    "planned_scales.1",
                    wave.slice_dim,
                    wave.slices * wave.n_components(),
                    Init::Zeros,
                    scales_ramp,
                )?,
            ],
            config: wave,
            ops: params.ops(),
        })
    }

    /// Tokens before a step that some tier reads.
    pub fn history(&self) -> usize {
        self.config.history()
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.token_embedding.device()
    }

    /// Tokens `[.., n]` as codes and values `[.., n, N_TOKEN_VALUES]` -> `[.., n, token width]`: the codes' vectors, then the values.
    fn embed(&self, codes: &[u32], values: &Tensor) -> Result<Tensor> {
        let table = self.token_embedding.pad_with_zeros(D::Minus1, 0, N_TOKEN_VALUES)?;
        let values = values.pad_with_zeros(D::Minus1, self.config.token_dim, 0)?;
        (self.ops.gather_add)(&values, &table, codes)
    }

    /// `[batch, frames + 2, n_bands]` -> views of `frames` frames.
    fn planned(&self, plan: &Tensor) -> Result<Planned> {
        let (batch, all, _) = plan.dims3()?;
        let frames = all + 1 - PLAN_FRAMES;
        let at = |i: usize| plan.narrow(1, i, frames);
        let (older, old, current) = (at(0)?, at(1)?, at(2)?);
        let changes = [((&current - &old)? * 2.0)?, ((&old - &older)? * 2.0)?];
        let seen = Tensor::cat(&[&current, &changes[0], &changes[1]], D::Minus1)?;
        let vector = self.plan_mlp[1].forward_silu(&self.plan_mlp[0].forward_silu(&seen)?)?;
        let scales = self.planned_scales[1].forward(&self.planned_scales[0].forward_silu(&vector)?)?;
        Ok(Planned {
            tiers: self.tiers.iter().map(|t| t.plan_in.forward(&vector)).collect::<Result<_>>()?,
            scales: scales.reshape((batch, frames, self.config.slices, self.config.n_components()))?,
        })
    }

    /// The head outputs of the sample tier's result x, `[batch, time, dim]`; planned scales `[batch, frames, slices,
    /// n_components]`, each for as many samples.
    fn finish(&self, x: &Tensor, features: &Tensor, planned: &Tensor) -> Result<Tensor> {
        let Ops { norm_linear, add_linear, bound_scales, .. } = self.ops;
        let [first, second, last] = &self.shortcut;
        let shortcut = second.forward_silu(&first.forward_silu(features)?)?;
        let out = add_linear(&norm_linear(x, &self.norm.gain, &self.head.weight)?, &shortcut, &last.weight)?;
        bound_scales(&out, &(&self.head.bias + &last.bias)?, planned, self.config.own_scale)
    }

    /// All that the sample tier adds up by codes: for every tap a code's part of the tier's input map, `[taps * N_CODES,
    /// dim]`, then the codes of the forecast from the past and of the residual. `by_tap`: the map, `[taps, token width, dim]`.
    fn code_table(&self, by_tap: &Tensor) -> Result<Tensor> {
        let (codes, width) = self.token_embedding.dims2()?;
        let (taps, _, dim) = by_tap.dims3()?;
        let vectors = self.token_embedding.unsqueeze(0)?.broadcast_as((taps, codes, width))?;
        let by_tap = vectors.matmul(&by_tap.narrow(1, 0, width)?.contiguous()?)?.reshape((taps * codes, dim))?;
        Tensor::cat(&[&by_tap, &self.past_code_in, &self.residual_code_in], 0)
    }

    /// What the sample tier takes as numbers, and the map for it: the features, and the values of the tokens of every tap.
    fn number_map(&self, features: &Tensor, values: &Tensor, by_tap: &Tensor) -> Result<(Tensor, Tensor)> {
        let (history, time) = (self.history(), features.dim(1)?);
        let (taps, _, dim) = by_tap.dims3()?;
        let mut numbers = vec![features.clone()];
        for tap in 0..taps {
            numbers.push(values.narrow(1, history - taps + tap, time)?);
        }
        let of_values =
            by_tap.narrow(1, self.config.token_dim, N_TOKEN_VALUES)?.reshape((taps * N_TOKEN_VALUES, dim))?;
        Ok((Tensor::cat(&numbers, D::Minus1)?, Tensor::cat(&[&self.feature_in.weight, &of_values], 0)?))
    }

    /// Rows of the table of all codes that the sample tier adds up for each sample, in order of batch and time.
    pub fn codes(&self, inputs: &WaveInputs) -> Result<Vec<u32>> {
        let (history, taps) = (self.history(), self.config.taps);
        let tokens = inputs.token_codes.to_vec2::<u32>()?;
        let (past, residual) = (inputs.past_codes.to_vec2::<u32>()?, inputs.residual_codes.to_vec2::<u32>()?);
        let mut codes = Vec::with_capacity(inputs.past_codes.elem_count() * (taps + 2));
        for ((tokens, past), residual) in tokens.iter().zip(&past).zip(&residual) {
            for (seen, (past, residual)) in tokens[history - taps..].windows(taps).zip(past.iter().zip(residual)) {
                let all = seen.iter().chain([past, residual]);
                codes.extend(all.zip(0..).map(|(code, table)| table * N_CODES as u32 + code));
            }
        }
        Ok(codes)
    }

    /// Whole excerpts: head outputs `[batch, time, 3 * n_components]`; time is a multiple of the plan's hop.
    pub fn forward(&self, inputs: &WaveInputs) -> Result<Tensor> {
        self.forward_coded(inputs, &self.codes(inputs)?)
    }

    /// [`WaveTransformer::forward`] with the codes looked up before.
    pub fn forward_coded(&self, inputs: &WaveInputs, codes: &[u32]) -> Result<Tensor> {
        self.run(inputs, codes, None)
    }

    /// Reads an excerpt (batch 1) as a new stream's first samples: head outputs as [`WaveTransformer::forward`] gives
    /// them, and the state as `time` steps would leave it. `tokens` and `residual_code` are the caller's to set.
    pub fn prefill(&self, inputs: &WaveInputs, state: &mut WaveState) -> Result<Tensor> {
        state.n = inputs.features.dim(1)? as u64;
        self.run(inputs, &self.codes(inputs)?, Some(&mut state.caches))
    }

    fn run(&self, inputs: &WaveInputs, codes: &[u32], mut caches: Option<&mut Vec<Vec<KvCache>>>) -> Result<Tensor> {
        let Ops { add_linear, spread, gather_add, .. } = self.ops;
        let (batch, time, _) = inputs.features.dims3()?;
        let planned = self.planned(&inputs.plan.to_device(self.device())?)?;
        let features = inputs.features.to_device(self.device())?;
        let values = inputs.token_values.to_device(self.device())?;
        let mut x: Option<Tensor> = None;
        let mut above: Option<(&Tier, &Linear)> = None;
        for (i, (tier, plan)) in self.tiers.iter().zip(&planned.tiers).enumerate() {
            let steps = time / tier.hop;
            let dim = plan.dim(2)?;
            // What all steps of a plan frame, or all sub-steps of a step above, have in common.
            let mut common = plan.unsqueeze(2)?;
            if let Some((above, down)) = above {
                common = common.broadcast_add(&down.bias.reshape((1, 1, above.hop / tier.hop, dim))?)?;
            }
            if tier.hop == 1 {
                common = common.broadcast_add(&self.feature_in.bias)?;
            }
            let mut z = spread(&common, steps)?;
            if tier.hop > 1 {
                let first = self.history() - tier.hop;
                let codes: Vec<u32> = inputs.token_codes.narrow(1, first, time)?.flatten_all()?.to_vec1()?;
                let seen = self.embed(&codes, &values.narrow(1, first, time)?)?.reshape((batch, steps, ()))?;
                z = add_linear(&z, &seen, &tier.input)?;
            } else {
                let by_tap = tier.input.reshape((self.config.taps, (), dim))?;
                z = gather_add(&z, &self.code_table(&by_tap)?, codes)?;
                let (numbers, weight) = self.number_map(&features, &values, &by_tap)?;
                z = add_linear(&z, &numbers, &weight)?;
            }
            if let (Some(x), Some((_, down))) = (&x, above) {
                z = add_linear(&z, x, &down.weight)?;
            }
            z = match &mut caches {
                None => Block::forward_all(&tier.blocks, &z)?,
                Some(caches) => {
                    let mut blocks = tier.blocks.iter().zip(&mut caches[i]);
                    blocks.try_fold(z, |z, (block, cache)| block.forward(&z, Some(cache)))?
                }
            };
            above = tier.down.as_ref().map(|down| (tier, down));
            x = Some(z);
        }
        let Some(x) = x else { candle_core::bail!("a wave transformer without tiers") };
        self.finish(&x, &features, &planned.scales)
    }

    /// Width of the tier below the one with this hop.
    fn next_dim(&self, hop: usize) -> usize {
        self.config.tiers.iter().find(|t| t.hop < hop).map_or(1, |t| t.dim)
    }

    /// A stream before its first sample: silence so far, with these two plan frames before the first.
    pub fn new_state(&self, silent_bands: &[f32]) -> Result<WaveState> {
        Ok(WaveState {
            n: 0,
            caches: self
                .tiers
                .iter()
                .map(|t| t.blocks.iter().map(Block::empty_cache).collect())
                .collect::<Result<_>>()?,
            tokens: vec![self.codec.silence(); self.history()],
            residual_code: 0,
            handed: vec![None; self.tiers.len()],
            plan: vec![silent_bands.to_vec(); PLAN_FRAMES],
            frame: None,
        })
    }

    /// Shifts a plan frame in; the next `plan hop` samples lie in it.
    pub fn begin_frame(&self, state: &mut WaveState, bands: &[f32]) -> Result<()> {
        state.plan.remove(0);
        state.plan.push(bands.to_vec());
        self.look_at_plan(state)
    }

    /// Remakes what the model derives from the state's plan frames.
    pub fn look_at_plan(&self, state: &mut WaveState) -> Result<()> {
        let plan = Tensor::from_vec(state.plan.concat(), (1, PLAN_FRAMES, state.plan[0].len()), &Device::Cpu)?;
        let planned = self.planned(&plan)?;
        let scales = planned.scales.squeeze(0)?.squeeze(0)?;
        state.frame = Some(FrameView { plan: planned.tiers, scales });
        Ok(())
    }

    /// Head outputs `[3 * n_components]` for the next sample; `begin_frame` came first.
    pub fn step(&self, state: &mut WaveState, features: &[f32; N_FEATURES], past_code: Token) -> Result<Vec<f32>> {
        let Some(frame) = &state.frame else {
            candle_core::bail!("a sample was asked for before its plan frame");
        };
        let device = &Device::Cpu;
        let features = Tensor::from_slice(features, (1, 1, N_FEATURES), device)?;
        let mut x = features.clone();
        for (i, tier) in self.tiers.iter().enumerate() {
            if !state.n.is_multiple_of(tier.hop as u64) {
                continue;
            }
            let seen = if tier.hop > 1 { tier.hop } else { self.config.taps };
            let tokens = &state.tokens[state.tokens.len() - seen..];
            let codes: Vec<u32> = tokens.iter().map(|&token| self.codec.code(token).into()).collect();
            let values: Vec<f32> = tokens.iter().flat_map(|&token| token_values(token, &self.codec)).collect();
            let values = Tensor::from_vec(values, (seen, N_TOKEN_VALUES), device)?;
            let seen = self.embed(&codes, &values)?.reshape((1, 1, ()))?;
            let mut z = (self.ops.add_linear)(&frame.plan[i], &seen, &tier.input)?;
            if tier.hop == 1 {
                z = (z + self.feature_in.forward(&features)?)?;
                for (table, code) in [(&self.past_code_in, past_code), (&self.residual_code_in, state.residual_code)] {
                    z = (z + table.narrow(0, code.into(), 1)?.unsqueeze(0)?)?;
                }
            }
            if let Some(handed) = i.checked_sub(1).and_then(|above| state.handed[above].as_ref()) {
                let sub_step = state.n / tier.hop as u64 % handed.dim(1)? as u64;
                z = (z + handed.narrow(1, sub_step as usize, 1)?)?;
            }
            let pos = state.n / tier.hop as u64;
            for (block, cache) in tier.blocks.iter().zip(&mut state.caches[i]) {
                z = block.step(&z, cache, pos)?;
            }
            if let Some(down) = &tier.down {
                state.handed[i] = Some(down.forward(&z)?.reshape((1, (), self.next_dim(tier.hop)))?);
            }
            x = z;
        }
        let slice = state.n as usize % self.plan_hop / (self.plan_hop / self.config.slices);
        let scales = frame.scales.narrow(0, slice, 1)?.reshape((1, 1, 1, ()))?;
        self.finish(&x, &features, &scales)?.flatten_all()?.to_vec1()
    }

    /// Tells the state which token came, and its residual code.
    pub fn push(state: &mut WaveState, token: Token, residual_code: Token) {
        state.tokens.remove(0);
        state.tokens.push(token);
        state.residual_code = residual_code;
        state.n += 1;
    }
}
