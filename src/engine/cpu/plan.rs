//! The plan transformer over [`super::stack`]: frames in, logits of the next frame's tokens out.

use super::linear::{Linear, LinearWork, Source, add, sized};
use super::stack::{Rows, Stack, StackShape, StackState, StackWork, Successive};
use crate::engine::EngineError;
use crate::model::config::ModelConfig;
use crate::model::plan_transformer::REFINE;
use crate::plan::{PlanError, PlanFrame, ResidualQuantizer};
use crate::sampler::{LogitSampler, PlanDraw, PlanSampling};
use crate::simd::Kernels;

/// Frames that are read at a time.
const CHUNK: usize = 32;

/// Weights.
pub struct PlanTransformer {
    dim: usize,
    n_entries: usize,
    /// Per codebook `[n_entries, dim]`.
    embeddings: Vec<Vec<f32>>,
    bands: Linear,
    stack: Stack,
    /// Gain of the last norm.
    gain: Vec<f32>,
    /// Per codebook but the last `[n_entries, dim]`.
    given: Vec<Vec<f32>>,
    heads: Vec<[Linear; 2]>,
    refine: Option<Linear>,
}

/// What a stream remembers of its plan.
#[derive(Clone)]
pub struct PlanState {
    pub stack: StackState,
    /// Frames so far.
    pub pos: u64,
    /// After the last frame, `[dim]`; only valid when `pos > 0`.
    pub hidden: Vec<f32>,
}

/// Room for a pass.
#[derive(Default)]
pub struct PlanWork {
    stack: StackWork,
    linear: LinearWork,
    x: Vec<f32>,
    inner: Vec<f32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
    sampler: LogitSampler,
    codes: Vec<u16>,
    bands: Vec<f32>,
}

/// A stream whose next frame is drawn: how, from which uniforms and where to.
pub struct PlanTurn<'a> {
    /// Has read a frame at least.
    pub state: &'a mut PlanState,
    pub sampling: &'a PlanSampling,
    /// `[n_codebooks]`
    pub uniforms: &'a [f32],
    pub frame: &'a mut PlanFrame,
    pub draw: &'a mut PlanDraw,
}

/// The next position of every stream.
struct Streams<'s, 'a>(&'s mut [PlanTurn<'a>]);

impl Rows for Streams<'_, '_> {
    fn row(&mut self, r: usize) -> (&mut StackState, u64) {
        let state = &mut *self.0[r].state;
        (&mut state.stack, state.pos)
    }
}

impl PlanTransformer {
    pub fn new(source: &Source, config: &ModelConfig) -> Result<Self, EngineError> {
        let c = &config.plan_transformer;
        let n_codebooks = config.plan.n_codebooks;
        let table = |q: usize, name: &str| source.under(q).values(name);
        Ok(Self {
            dim: c.dim,
            n_entries: config.plan.n_entries,
            embeddings: (0..n_codebooks).map(|q| table(q, "embedding")).collect::<Result<_, EngineError>>()?,
            bands: source.linear("bands")?,
            stack: Stack::new(
                source,
                StackShape { dim: c.dim, n_layers: c.n_layers, n_heads: c.n_heads, window: c.window },
            )?,
            gain: source.values("norm")?,
            given: (1..n_codebooks).map(|q| table(q - 1, "given")).collect::<Result<_, EngineError>>()?,
            heads: (0..n_codebooks)
                .map(|q| Ok([source.under(q).linear("head_in")?, source.under(q).linear("head_out")?]))
                .collect::<Result<_, EngineError>>()?,
            refine: if c.refine { Some(source.linear(REFINE)?) } else { None },
        })
    }

    pub fn new_state(&self) -> PlanState {
        PlanState { stack: self.stack.new_state(), pos: 0, hidden: vec![0.0; self.dim] }
    }

    /// What frames begin as: tokens `[frames, n_codebooks]`, centred decoded bands `[frames, n_bands]` into x `[frames, dim]`.
    fn embed(&self, kernels: &Kernels, codes: &[u16], bands: &[f32], linear: &mut LinearWork, x: &mut [f32]) {
        self.bands.forward(kernels, bands, false, linear, x);
        for (x, codes) in x.chunks_exact_mut(self.dim).zip(codes.chunks_exact(self.embeddings.len())) {
            for (table, &code) in self.embeddings.iter().zip(codes) {
                let row = &table[usize::from(code) * self.dim..][..self.dim];
                x.iter_mut().zip(row).for_each(|(x, e)| *x += 0.5 * e);
            }
        }
    }

    /// The last norm of x into `hidden`, both `[frames, dim]`.
    fn normalize(&self, kernels: &Kernels, x: &[f32], hidden: &mut [f32]) {
        for (x, hidden) in x.chunks_exact(self.dim).zip(hidden.chunks_exact_mut(self.dim)) {
            let scale = (kernels.inverse_rms)(x);
            for ((h, x), gain) in hidden.iter_mut().zip(x).zip(&self.gain) {
                *h = x * scale * gain;
            }
        }
    }

    /// Reads successive frames of a stream: tokens `[frames, n_codebooks]`, centred decoded bands `[frames, n_bands]`. `each` is
    /// told of every frame's hidden state.
    pub fn read(
        &self,
        kernels: &Kernels,
        state: &mut PlanState,
        codes: &[u16],
        bands: &[f32],
        work: &mut PlanWork,
        mut each: impl FnMut(usize, &[f32], &mut PlanWork),
    ) {
        let chunks = codes.chunks(CHUNK * self.embeddings.len()).zip(bands.chunks(CHUNK * self.bands.n_in()));
        for (chunk, (codes, bands)) in chunks.enumerate() {
            let n = bands.len() / self.bands.n_in();
            let mut hidden = std::mem::take(&mut work.hidden);
            let x = sized(&mut work.x, n * self.dim);
            self.embed(kernels, codes, bands, &mut work.linear, x);
            self.stack.forward(kernels, x, &mut Successive(&mut state.stack, state.pos), &mut work.stack);
            self.normalize(kernels, x, sized(&mut hidden, n * self.dim));
            state.pos += n as u64;
            for (i, hidden) in hidden.chunks_exact(self.dim).take(n).enumerate() {
                each(chunk * CHUNK + i, hidden, work);
            }
            state.hidden.copy_from_slice(&hidden[(n - 1) * self.dim..n * self.dim]);
            work.hidden = hidden;
        }
    }

    /// Adds to a frame's bands, `[n_bands]`, what it is taken for beyond them by who has read it, `hidden`.
    fn refine(
        &self,
        kernels: &Kernels,
        centred: &[f32],
        hidden: &[f32],
        bands: &mut [f32],
        linear: &mut LinearWork,
        room: &mut Vec<f32>,
    ) {
        let Some(refine) = &self.refine else { return };
        let (seen, out) = sized(room, refine.n_in() + refine.n_out()).split_at_mut(refine.n_in());
        seen[..centred.len()].copy_from_slice(centred);
        seen[centred.len()..].copy_from_slice(hidden);
        refine.forward(kernels, seen, false, linear, out);
        add(bands, out);
    }

    /// [`read`](Self::read), after which `bands`, `[frames, n_bands]`, are refined; `centred` are the same as they were.
    pub fn read_refined(
        &self,
        kernels: &Kernels,
        state: &mut PlanState,
        codes: &[u16],
        centred: &[f32],
        bands: &mut [f32],
        work: &mut PlanWork,
    ) {
        let n_bands = self.bands.n_in();
        self.read(kernels, state, codes, centred, work, |i, hidden, work| {
            let frame = i * n_bands..(i + 1) * n_bands;
            let PlanWork { linear, inner, .. } = work;
            self.refine(kernels, &centred[frame.clone()], hidden, &mut bands[frame], linear, inner);
        });
    }

    /// Draws the next frame of every stream and reads it, each weight read once for all of them.
    ///
    /// # Errors
    /// None where `quantizer` is the model's own.
    pub fn draw(
        &self,
        kernels: &Kernels,
        quantizer: &ResidualQuantizer,
        turns: &mut [PlanTurn],
        work: &mut PlanWork,
    ) -> Result<(), PlanError> {
        let (n, n_codebooks, n_bands) = (turns.len(), self.heads.len(), self.bands.n_in());
        for turn in &mut *turns {
            *turn.draw = PlanDraw::default();
            turn.frame.tokens.clear();
        }
        for q in 0..n_codebooks {
            let x = sized(&mut work.x, n * self.dim);
            for (x, turn) in x.chunks_exact_mut(self.dim).zip(&*turns) {
                self.begin_logits(&turn.state.hidden, &turn.frame.tokens, x);
            }
            self.logits(kernels, q, n, work);
            for (turn, logits) in turns.iter_mut().zip(work.logits.chunks_exact(self.n_entries)) {
                let token = work.sampler.sample(logits, turn.uniforms[q], turn.sampling);
                turn.draw.add(logits, token);
                turn.frame.tokens.push(token as u16);
            }
        }
        let PlanWork { stack, linear, x, inner, hidden, codes, bands, .. } = work;
        codes.clear();
        let bands = sized(bands, n * n_bands);
        for (turn, bands) in turns.iter_mut().zip(bands.chunks_exact_mut(n_bands)) {
            quantizer.decode_into(&turn.frame.tokens, &mut turn.frame.bands)?;
            codes.extend_from_slice(&turn.frame.tokens);
            for ((centred, x), mean) in bands.iter_mut().zip(&turn.frame.bands).zip(&quantizer.mean) {
                *centred = x - mean;
            }
        }
        let x = sized(x, n * self.dim);
        self.embed(kernels, codes, bands, linear, x);
        self.stack.forward(kernels, x, &mut Streams(turns), stack);
        let hidden = sized(hidden, n * self.dim);
        self.normalize(kernels, x, hidden);
        for ((turn, hidden), centred) in
            turns.iter_mut().zip(hidden.chunks_exact(self.dim)).zip(bands.chunks_exact(n_bands))
        {
            turn.state.pos += 1;
            turn.state.hidden.copy_from_slice(hidden);
            self.refine(kernels, centred, hidden, &mut turn.frame.bands, linear, inner);
        }
        Ok(())
    }

    /// What logits of codebook `given.len()` of the frame after `hidden` begin as, given that frame's tokens so far; `[dim]`.
    fn begin_logits(&self, hidden: &[f32], given: &[u16], x: &mut [f32]) {
        x.copy_from_slice(hidden);
        for (table, &code) in self.given.iter().zip(given) {
            add(x, &table[usize::from(code) * self.dim..][..self.dim]);
        }
    }

    /// Logits of codebook `q` of as many frames as [`begin_logits`](Self::begin_logits) has left in `work.x`, into
    /// `work.logits`, `[frames, n_entries]`.
    fn logits(&self, kernels: &Kernels, q: usize, n: usize, work: &mut PlanWork) {
        let PlanWork { linear, x, inner, logits, .. } = work;
        let [first, second] = &self.heads[q];
        let inner = sized(inner, n * first.n_out());
        first.forward(kernels, &x[..n * self.dim], false, linear, inner);
        (kernels.silu)(inner);
        second.forward(kernels, inner, false, linear, sized(logits, n * self.n_entries));
    }

    /// -ln P of the frames 1.. given those before, in nats per frame; shapes as for [`read`](Self::read).
    pub fn nll(&self, kernels: &Kernels, codes: &[u16], bands: &[f32], work: &mut PlanWork) -> Vec<f32> {
        let mut out = Vec::new();
        let n_codebooks = self.heads.len();
        self.read(kernels, &mut self.new_state(), codes, bands, work, |i, hidden, work| {
            let Some(next) = codes.chunks_exact(n_codebooks).nth(i + 1) else { return };
            let mut nats = 0.0;
            for q in 0..n_codebooks {
                self.begin_logits(hidden, &next[..q], sized(&mut work.x, self.dim));
                self.logits(kernels, q, 1, work);
                let logits = &work.logits;
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = logits.iter().map(|l| f64::from(l - most).exp()).sum();
                nats += total.ln() - f64::from(logits[usize::from(next[q])] - most);
            }
            out.push(nats as f32);
        });
        out
    }
}
