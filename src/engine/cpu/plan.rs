//! The plan transformer over [`super::stack`]: frames in, logits of the next frame's tokens out.

use ndarray::{Array2, ArrayView2};

use super::linear::{Linear, Source, add, sized};
use super::stack::{Stack, StackShape, StackState, StackWork, Successive};
use crate::engine::EngineError;
use crate::model::config::ModelConfig;
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
    linear: super::linear::LinearWork,
    x: Vec<f32>,
    inner: Vec<f32>,
    hidden: Vec<f32>,
}

impl PlanTransformer {
    pub fn new(source: &Source, config: &ModelConfig) -> Result<Self, EngineError> {
        let c = &config.plan_transformer;
        let n_codebooks = config.plan.n_codebooks;
        let table = |q: usize, name: &str| Ok(source.under(q).values(name)?.to_vec());
        Ok(Self {
            dim: c.dim,
            n_entries: config.plan.n_entries,
            embeddings: (0..n_codebooks).map(|q| table(q, "embedding")).collect::<Result<_, EngineError>>()?,
            bands: source.exact("bands", None)?,
            stack: Stack::new(
                source,
                StackShape { dim: c.dim, n_layers: c.n_layers, n_heads: c.n_heads, window: c.window },
            )?,
            gain: source.values("norm")?.to_vec(),
            given: (1..n_codebooks).map(|q| table(q - 1, "given")).collect::<Result<_, EngineError>>()?,
            heads: (0..n_codebooks)
                .map(|q| Ok([source.under(q).exact("head_in", None)?, source.under(q).exact("head_out", None)?]))
                .collect::<Result<_, EngineError>>()?,
        })
    }

    pub fn new_state(&self) -> PlanState {
        PlanState { stack: self.stack.new_state(), pos: 0, hidden: vec![0.0; self.dim] }
    }

    /// Reads frames: tokens `[frames, n_codebooks]`, centred decoded bands `[frames, n_bands]`. `each` is told of every
    /// frame's hidden state.
    pub fn read(
        &self,
        kernels: &Kernels,
        state: &mut PlanState,
        codes: ArrayView2<u16>,
        bands: ArrayView2<f32>,
        work: &mut PlanWork,
        mut each: impl FnMut(usize, &[f32], &mut PlanWork),
    ) {
        for first in (0..codes.nrows()).step_by(CHUNK) {
            let n = CHUNK.min(codes.nrows() - first);
            let mut hidden = std::mem::take(&mut work.hidden);
            {
                let x = sized(&mut work.x, n * self.dim);
                let inner = sized(&mut work.inner, n * bands.ncols());
                inner.iter_mut().zip(bands.rows().into_iter().skip(first).take(n).flatten()).for_each(|(y, &b)| *y = b);
                self.bands.forward(kernels, inner, false, &mut work.linear, x);
                for (x, codes) in x.chunks_exact_mut(self.dim).zip(codes.rows().into_iter().skip(first)) {
                    for (table, &code) in self.embeddings.iter().zip(codes) {
                        let row = &table[usize::from(code) * self.dim..][..self.dim];
                        x.iter_mut().zip(row).for_each(|(x, e)| *x += 0.5 * e);
                    }
                }
                self.stack.forward(kernels, x, &mut Successive(&mut state.stack, state.pos), &mut work.stack);
                let hidden = sized(&mut hidden, n * self.dim);
                for (x, hidden) in x.chunks_exact(self.dim).zip(hidden.chunks_exact_mut(self.dim)) {
                    let scale = (kernels.inverse_rms)(x);
                    for ((h, x), gain) in hidden.iter_mut().zip(x).zip(&self.gain) {
                        *h = x * scale * gain;
                    }
                }
            }
            state.pos += n as u64;
            for (i, hidden) in hidden.chunks_exact(self.dim).take(n).enumerate() {
                each(first + i, hidden, work);
            }
            state.hidden.copy_from_slice(&hidden[(n - 1) * self.dim..n * self.dim]);
            work.hidden = hidden;
        }
    }

    /// Logits of codebook `given.len()` of the frame after `hidden`, given that frame's tokens so far.
    pub fn logits(&self, kernels: &Kernels, hidden: &[f32], given: &[u16], work: &mut PlanWork, out: &mut Vec<f32>) {
        let PlanWork { linear, x, inner, .. } = work;
        let x = sized(x, self.dim);
        x.copy_from_slice(hidden);
        for (table, &code) in self.given.iter().zip(given) {
            add(x, &table[usize::from(code) * self.dim..][..self.dim]);
        }
        let [first, second] = &self.heads[given.len()];
        let inner = sized(inner, first.n_out());
        first.forward(kernels, x, false, linear, inner);
        (kernels.silu)(inner);
        second.forward(kernels, inner, false, linear, sized(out, self.n_entries));
    }

    /// -ln P of the frames 1.. given those before, in nats per frame.
    pub fn nll(&self, kernels: &Kernels, codes: &Array2<u16>, bands: ArrayView2<f32>, work: &mut PlanWork) -> Vec<f32> {
        let (mut out, mut logits) = (Vec::new(), Vec::new());
        self.read(kernels, &mut self.new_state(), codes.view(), bands, work, |i, hidden, work| {
            if i + 1 < codes.nrows() {
                let next = codes.row(i + 1).to_vec();
                let mut nats = 0.0;
                for q in 0..next.len() {
                    self.logits(kernels, hidden, &next[..q], work, &mut logits);
                    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let total: f64 = logits.iter().map(|l| f64::from(l - most).exp()).sum();
                    nats += total.ln() - f64::from(logits[usize::from(next[q])] - most);
                }
                out.push(nats as f32);
            }
        });
        out
    }
}
