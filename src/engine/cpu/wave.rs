//! The wave transformer over [`super::stack`]: one step per sample, for one or several streams in lockstep.

use super::linear::{Linear, LinearWork, Source, add, sized};
use super::stack::{Rows, Stack, StackShape, StackState, StackWork, Successive};
use crate::codec::{Codec, Token};
use crate::engine::EngineError;
use crate::model::config::{ModelConfig, N_FORECASTS, WaveTransformerConfig};
use crate::model::features::{N_FEATURES, N_TOKEN_VALUES, token_values};
use crate::model::wave_transformer::PLAN_FRAMES;
use crate::simd::Kernels;
use crate::simd::portable::tanh;

struct Tier {
    hop: usize,
    /// Tokens before the step that it reads.
    seen: usize,
    input: Linear,
    plan_in: Linear,
    stack: Stack,
    /// To the sub-steps of the next tier; `None` for the last.
    down: Option<Linear>,
}

/// Weights.
pub struct WaveTransformer {
    config: WaveTransformerConfig,
    plan_hop: usize,
    codec: Codec,
    /// A code's vector, `[N_CODES, token_dim]`.
    codes: Vec<f32>,
    plan_mlp: [Linear; 2],
    planned_scales: [Linear; 2],
    tiers: Vec<Tier>,
    feature_in: Linear,
    /// `[N_CODES, dim of the sample tier]`
    past_code_in: Vec<f32>,
    residual_code_in: Vec<f32>,
    head: Linear,
    shortcut: [Linear; 3],
}

/// What a stream remembers between samples.
#[derive(Clone)]
pub struct WaveState {
    /// Samples so far.
    pub n: u64,
    /// The last tokens that some tier reads, oldest first.
    pub tokens: Vec<Token>,
    /// Residual code of the last sample.
    pub residual_code: Token,
    /// The last plan frames, oldest first.
    pub plan: Vec<Vec<f32>>,
    pub stacks: Vec<StackState>,
    /// What each tier adds in this plan frame, `[dim]`.
    planned: Vec<Vec<f32>>,
    /// Planned log scales, `[slices, n_components]`.
    scales: Vec<f32>,
    /// What each tier but the last handed to the next, `[sub-steps, dim of the next]`.
    handed: Vec<Vec<f32>>,
}

/// Room for a step.
#[derive(Default)]
pub struct WaveWork {
    stack: StackWork,
    linear: LinearWork,
    input: Vec<f32>,
    x: Vec<f32>,
    added: Vec<f32>,
    inner: [Vec<f32>; 2],
}

/// A stream that takes part in a step.
pub struct Step<'a> {
    pub state: &'a mut WaveState,
    pub forecasts: [f32; N_FORECASTS],
    pub features: [f32; N_FEATURES],
    pub past_code: Token,
}

impl<'a> Step<'a> {
    /// The next step of a stream; its forecasts and features are set before [`WaveTransformer::step`].
    pub fn new(state: &'a mut WaveState) -> Self {
        Self { state, forecasts: [0.0; N_FORECASTS], features: [0.0; N_FEATURES], past_code: 0 }
    }
}

/// The same tier of every stream.
struct Streams<'s, 'a> {
    tier: usize,
    hop: u64,
    steps: &'s mut [Step<'a>],
}

impl Rows for Streams<'_, '_> {
    fn row(&mut self, r: usize) -> (&mut StackState, u64) {
        let state = &mut *self.steps[r].state;
        (&mut state.stacks[self.tier], state.n / self.hop)
    }
}

impl WaveTransformer {
    pub fn new(source: &Source, config: &ModelConfig) -> Result<Self, EngineError> {
        let wave = config.wave_transformer.clone();
        let mut tiers = Vec::new();
        for (i, tier) in wave.tiers.iter().enumerate() {
            let source = source.under("tiers").under(i);
            let shape =
                StackShape { dim: tier.dim, n_layers: tier.n_layers, n_heads: tier.n_heads, window: tier.window };
            tiers.push(Tier {
                hop: tier.hop,
                seen: if tier.hop > 1 { tier.hop } else { wave.taps },
                input: source.linear("input")?,
                plan_in: source.linear("plan_in")?,
                stack: Stack::new(&source, shape)?,
                down: if i + 1 < wave.tiers.len() { Some(source.linear("down")?) } else { None },
            });
        }
        Ok(Self {
            plan_hop: config.plan.hop,
            codec: config.codec.clone(),
            codes: source.values("token_embedding")?,
            plan_mlp: [source.linear("plan_mlp.0")?, source.linear("plan_mlp.1")?],
            planned_scales: [source.linear("planned_scales.0")?, source.linear("planned_scales.1")?],
            tiers,
            feature_in: source.linear("feature_in")?,
            past_code_in: source.values("past_code_in")?,
            residual_code_in: source.values("residual_code_in")?,
            head: source.linear("head")?,
            shortcut: [source.linear("shortcut.0")?, source.linear("shortcut.1")?, source.linear("shortcut.2")?],
            config: wave,
        })
    }

    /// A stream before its first sample, after frames like `silent`.
    pub fn new_state(&self, silent: &[f32]) -> WaveState {
        WaveState {
            n: 0,
            tokens: vec![self.codec.silence(); self.config.history()],
            residual_code: 0,
            plan: vec![silent.to_vec(); PLAN_FRAMES],
            stacks: self.tiers.iter().map(|t| t.stack.new_state()).collect(),
            planned: self.tiers.iter().map(|t| vec![0.0; t.stack.shape.dim]).collect(),
            scales: vec![0.0; self.config.slices * self.config.n_components()],
            handed: self.tiers.iter().map(|t| vec![0.0; t.down.as_ref().map_or(0, Linear::n_out)]).collect(),
        }
    }

    /// Frames before the end of a prompt of `n_frames` that tiers are read from, so that the caches are those of a stream that read
    /// everything: per tier its first frame, the sample tier's being the first that is read sample by sample. None lies before
    /// `first`.
    pub fn first_frames(&self, n_frames: usize, first: usize) -> Vec<usize> {
        let mut from = n_frames;
        let mut all: Vec<usize> = self
            .tiers
            .iter()
            .rev()
            .map(|tier| {
                let StackShape { window, n_layers, .. } = tier.stack.shape;
                let reach = (window * n_layers * tier.hop).div_ceil(self.plan_hop);
                from = from.saturating_sub(reach).max(first).min(n_frames.saturating_sub(1));
                from
            })
            .collect();
        all.reverse();
        all
    }

    /// Shifts a plan frame in; the next `plan hop` samples lie in it.
    pub fn begin_frame(&self, kernels: &Kernels, state: &mut WaveState, bands: &[f32], work: &mut WaveWork) {
        state.plan.rotate_left(1);
        if let Some(newest) = state.plan.last_mut() {
            newest.copy_from_slice(bands);
        }
        let [older, old, current] = [&state.plan[0], &state.plan[1], &state.plan[2]];
        let n = bands.len();
        let seen = sized(&mut work.input, PLAN_FRAMES * n);
        for i in 0..n {
            seen[i] = current[i];
            seen[n + i] = 2.0 * (current[i] - old[i]);
            seen[2 * n + i] = 2.0 * (old[i] - older[i]);
        }
        let [first, second] = &mut work.inner;
        let hidden = sized(first, self.plan_mlp[0].n_out());
        self.plan_mlp[0].forward(kernels, seen, false, &mut work.linear, hidden);
        (kernels.silu)(hidden);
        let vector = sized(second, self.plan_mlp[1].n_out());
        self.plan_mlp[1].forward(kernels, hidden, false, &mut work.linear, vector);
        (kernels.silu)(vector);
        for (tier, planned) in self.tiers.iter().zip(&mut state.planned) {
            tier.plan_in.forward(kernels, vector, false, &mut work.linear, planned);
        }
        let hidden = sized(first, self.planned_scales[0].n_out());
        self.planned_scales[0].forward(kernels, vector, false, &mut work.linear, hidden);
        (kernels.silu)(hidden);
        self.planned_scales[1].forward(kernels, hidden, false, &mut work.linear, &mut state.scales);
    }

    /// The embedded tokens before step `step` of a tier into `out`, `[seen, token width]`.
    fn embed(&self, tokens: &[Token], out: &mut [f32]) {
        let width = self.config.token_dim;
        for (out, &token) in out.chunks_exact_mut(width + N_TOKEN_VALUES).zip(tokens) {
            let (vector, values) = out.split_at_mut(width);
            vector.copy_from_slice(&self.codes[usize::from(self.codec.code(token)) * width..][..width]);
            values.copy_from_slice(&token_values(token, &self.codec));
        }
    }

    /// The first `n_tiers` tiers, none of which is the sample tier, over one plan frame, [`begin_frame`](Self::begin_frame) having
    /// come first: the caches are left as sample by sample steps leave them. `tokens`: [`WaveTransformerConfig::history`] tokens
    /// before the frame, then the frame's.
    pub fn read_frame(
        &self,
        kernels: &Kernels,
        state: &mut WaveState,
        tokens: &[Token],
        n_tiers: usize,
        work: &mut WaveWork,
    ) {
        let history = self.config.history();
        let WaveWork { stack, linear, input, x, added, .. } = work;
        for (i, tier) in self.tiers.iter().enumerate().take(n_tiers) {
            let Some(down) = &tier.down else { break };
            let (steps, dim) = (self.plan_hop / tier.hop, tier.stack.shape.dim);
            let width = tier.input.n_in();
            let rows = sized(input, steps * width);
            for (step, row) in rows.chunks_exact_mut(width).enumerate() {
                let end = history + step * tier.hop;
                self.embed(&tokens[end - tier.seen..end], row);
            }
            let x = sized(x, steps * dim);
            tier.input.forward(kernels, rows, false, linear, x);
            for x in x.chunks_exact_mut(dim) {
                add(x, &state.planned[i]);
            }
            if i > 0 {
                add(x, added);
            }
            let pos = state.n / tier.hop as u64;
            tier.stack.forward(kernels, x, &mut Successive(&mut state.stacks[i], pos), stack);
            down.forward(kernels, x, false, linear, sized(added, steps * down.n_out()));
        }
        state.tokens.copy_from_slice(&tokens[tokens.len() - history..]);
        state.n += self.plan_hop as u64;
    }

    /// Head outputs `[streams, 3 * n_components]` of the next sample of streams that stand at the same place of their plan
    /// frames; [`begin_frame`](Self::begin_frame) came first.
    pub fn step(&self, kernels: &Kernels, steps: &mut [Step], work: &mut WaveWork, out: &mut [f32]) {
        let Some(n) = steps.first().map(|s| s.state.n) else { return };
        let WaveWork { stack, linear, input, x, added, inner } = work;
        let last = self.tiers.len() - 1;
        for (i, tier) in self.tiers.iter().enumerate() {
            if !n.is_multiple_of(tier.hop as u64) {
                continue;
            }
            let (width, dim) = (tier.input.n_in(), tier.stack.shape.dim);
            let rows = sized(input, steps.len() * width);
            for (step, row) in steps.iter().zip(rows.chunks_exact_mut(width)) {
                self.embed(&step.state.tokens[step.state.tokens.len() - tier.seen..], row);
            }
            let x = sized(x, steps.len() * dim);
            tier.input.forward(kernels, rows, false, linear, x);
            if i == last {
                let features = sized(input, steps.len() * N_FEATURES);
                for (step, row) in steps.iter().zip(features.chunks_exact_mut(N_FEATURES)) {
                    row.copy_from_slice(&step.features);
                }
                let added = sized(added, steps.len() * dim);
                self.feature_in.forward(kernels, features, false, linear, added);
                add(x, added);
            }
            for (step, x) in steps.iter().zip(x.chunks_exact_mut(dim)) {
                if i == last {
                    add(x, &self.past_code_in[usize::from(step.past_code) * dim..][..dim]);
                    add(x, &self.residual_code_in[usize::from(step.state.residual_code) * dim..][..dim]);
                }
                add(x, &step.state.planned[i]);
                if i > 0 {
                    let handed = &step.state.handed[i - 1];
                    let sub_step = (step.state.n / tier.hop as u64) as usize % (handed.len() / dim);
                    add(x, &handed[sub_step * dim..][..dim]);
                }
            }
            let mut streams = Streams { tier: i, hop: tier.hop as u64, steps };
            tier.stack.forward(kernels, x, &mut streams, stack);
            if let Some(down) = &tier.down {
                let handed = sized(added, steps.len() * down.n_out());
                down.forward(kernels, x, false, linear, handed);
                for (step, handed) in steps.iter_mut().zip(handed.chunks_exact(down.n_out())) {
                    step.state.handed[i].copy_from_slice(handed);
                }
            }
        }
        self.head.forward(kernels, x, true, linear, out);
        let features = &input[..steps.len() * N_FEATURES];
        let [first, second] = inner;
        let hidden = sized(first, steps.len() * self.config.shortcut_dim);
        self.shortcut[0].forward(kernels, features, false, linear, hidden);
        (kernels.silu)(hidden);
        let deeper = sized(second, steps.len() * self.config.shortcut_dim);
        self.shortcut[1].forward(kernels, hidden, false, linear, deeper);
        (kernels.silu)(deeper);
        let short = sized(first, out.len());
        self.shortcut[2].forward(kernels, deeper, false, linear, short);
        add(out, short);
        let n_components = self.config.n_components();
        let limit = self.config.own_scale;
        let slice = n as usize % self.plan_hop / (self.plan_hop / self.config.slices);
        for (step, out) in steps.iter().zip(out.chunks_exact_mut(3 * n_components)) {
            let planned = &step.state.scales[slice * n_components..][..n_components];
            for (scale, planned) in out[2 * n_components..].iter_mut().zip(planned) {
                *scale = tanh(*scale / limit) * limit + planned;
            }
        }
    }
}

impl WaveState {
    /// The plan frame that the last samples lie in.
    pub fn last_frame(&self) -> &[f32] {
        self.plan.last().map_or(&[], Vec::as_slice)
    }

    /// Tells the stream which token came, and its residual code.
    pub fn push(&mut self, token: Token, residual_code: Token) {
        self.tokens.rotate_left(1);
        if let Some(newest) = self.tokens.last_mut() {
            *newest = token;
        }
        self.residual_code = residual_code;
        self.n += 1;
    }
}
