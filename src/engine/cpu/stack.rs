//! A stack of transformer blocks (pre-norm, QK-norm, RoPE, sliding window, SwiGLU) with ring caches, any number of rows at once.

use rayon::prelude::*;

use super::Precision;
use super::cache::{Cache, CacheWork};
use super::linear::{Linear, LinearWork, Source, add, sized};
use crate::engine::EngineError;
use crate::engine::state::SavedCache;
use crate::simd::Kernels;

const ROPE_BASE: f64 = 10_000.0;
/// Positions whose angles are kept; those of multiples of it are computed when they come.
const ROPE_LOW: u64 = 64;

struct Block {
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
}

/// Sizes of a stack.
#[derive(Clone, Copy)]
pub struct StackShape {
    pub dim: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    /// Positions that attention sees.
    pub window: usize,
}

impl StackShape {
    pub fn head_dim(&self) -> usize {
        self.dim / self.n_heads
    }
}

/// Weights of the blocks.
pub struct Stack {
    pub shape: StackShape,
    /// Of the blocks and of what they remember.
    precision: Precision,
    blocks: Vec<Block>,
    /// Cosines and sines of the positions `0..ROPE_LOW`, `[ROPE_LOW, head_dim]`.
    angles: Vec<f32>,
}

/// Ring caches of a stream.
#[derive(Clone)]
pub struct StackState {
    caches: Vec<Cache>,
    /// Angles of the last multiple of [`ROPE_LOW`] that was asked for, and which.
    high: (u64, Vec<f32>),
}

/// Room for a pass.
#[derive(Default)]
pub struct StackWork {
    linear: LinearWork,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    up: Vec<f32>,
    gated: Vec<f32>,
    added: Vec<f32>,
    cache: CacheWork,
    angles: Vec<f32>,
}

/// The caches that the rows of a pass belong to, and their positions.
pub trait Rows {
    fn row(&mut self, r: usize) -> (&mut StackState, u64);
}

/// Successive positions of one stream, from this one on.
pub struct Successive<'a>(pub &'a mut StackState, pub u64);

impl Rows for Successive<'_> {
    fn row(&mut self, r: usize) -> (&mut StackState, u64) {
        (self.0, self.1 + r as u64)
    }
}

impl StackState {
    /// One per block.
    pub fn save(&self) -> impl Iterator<Item = SavedCache> + '_ {
        self.caches.iter().map(Cache::save)
    }

    /// From caches of this stack's shape, one per block.
    pub fn restore<'s>(&mut self, kernels: &Kernels, saved: impl Iterator<Item = &'s SavedCache>) {
        for (cache, saved) in self.caches.iter_mut().zip(saved) {
            cache.restore(kernels, saved);
        }
    }
}

impl Stack {
    /// `source` holds `blocks.0`, `blocks.1`, ...
    pub fn new(source: &Source, shape: StackShape) -> Result<Self, EngineError> {
        let block = |i: usize| {
            let source = source.under("blocks").under(i);
            Ok(Block {
                qkv: source.linear("qkv")?,
                out: source.linear("out")?,
                up: source.linear("up")?,
                down: source.linear("down")?,
            })
        };
        let blocks = (0..shape.n_layers).into_par_iter().map(block).collect::<Result<_, EngineError>>()?;
        let mut angles = vec![0.0; ROPE_LOW as usize * shape.head_dim()];
        for (pos, angles) in angles.chunks_exact_mut(shape.head_dim()).enumerate() {
            rotations(pos as u64, angles);
        }
        Ok(Self { shape, precision: source.precision, blocks, angles })
    }

    /// Before the first position.
    pub fn new_state(&self) -> StackState {
        let cache = Cache::new(self.shape, self.precision);
        StackState { caches: vec![cache; self.shape.n_layers], high: (u64::MAX, vec![0.0; self.shape.head_dim()]) }
    }

    /// The residual stream x `[rows, dim]` through all blocks; every row's keys and values are left in its caches.
    pub fn forward(&self, kernels: &Kernels, x: &mut [f32], rows: &mut dyn Rows, work: &mut StackWork) {
        let StackShape { dim, window, .. } = self.shape;
        let head_dim = self.shape.head_dim();
        let n = x.len() / dim;
        let StackWork { linear, qkv, attended, up, gated, added, cache: cache_work, angles } = work;
        for (r, angles) in sized(angles, n * head_dim).chunks_exact_mut(head_dim).enumerate() {
            let (state, pos) = rows.row(r);
            self.rotate_to(pos, &mut state.high, angles);
        }
        let to_unit = 1.0 / (head_dim as f32).sqrt();
        for (i, block) in self.blocks.iter().enumerate() {
            let qkv = sized(qkv, n * 3 * dim);
            block.qkv.forward(kernels, x, true, linear, qkv);
            let attended = sized(attended, n * dim);
            for (r, (qkv, attended)) in qkv.chunks_exact_mut(3 * dim).zip(attended.chunks_exact_mut(dim)).enumerate() {
                let (state, pos) = rows.row(r);
                let angles = &angles[r * head_dim..(r + 1) * head_dim];
                let (q, kv) = qkv.split_at_mut(dim);
                let (k, v) = kv.split_at_mut(dim);
                (kernels.normalize_and_rotate)(q, angles, to_unit);
                (kernels.normalize_and_rotate)(k, angles, 1.0);
                let cache = &mut state.caches[i];
                cache.write(kernels, (pos % window as u64) as usize, k, v, cache_work);
                cache.attend(kernels, q, (pos + 1).min(window as u64) as usize, cache_work, attended);
            }
            let added = sized(added, n * dim);
            block.out.forward(kernels, attended, false, linear, added);
            add(x, added);
            let up = sized(up, n * block.up.n_out());
            block.up.forward(kernels, x, true, linear, up);
            let hidden = block.down.n_in();
            let gated = sized(gated, n * hidden);
            for (up, gated) in up.chunks_exact(2 * hidden).zip(gated.chunks_exact_mut(hidden)) {
                (kernels.swiglu)(up, gated);
            }
            block.down.forward(kernels, gated, false, linear, added);
            add(x, added);
        }
    }

    /// Cosines and sines at `pos`: those of the multiple of [`ROPE_LOW`] below, turned on by the rest. Angles are
    /// reduced in f64, so that positions may grow without bound.
    fn rotate_to(&self, pos: u64, high: &mut (u64, Vec<f32>), out: &mut [f32]) {
        let base = pos - pos % ROPE_LOW;
        if high.0 != base {
            rotations(base, &mut high.1);
            high.0 = base;
        }
        let head_dim = out.len();
        let low = &self.angles[(pos - base) as usize * head_dim..][..head_dim];
        let ((cos_a, sin_a), (cos_b, sin_b)) = (high.1.split_at(head_dim / 2), low.split_at(head_dim / 2));
        let (cos, sin) = out.split_at_mut(head_dim / 2);
        for i in 0..head_dim / 2 {
            cos[i] = cos_a[i] * cos_b[i] - sin_a[i] * sin_b[i];
            sin[i] = sin_a[i] * cos_b[i] + cos_a[i] * sin_b[i];
        }
    }
}

/// Cosines, then sines, of the angles of rotary position embedding (Su et al., 2021) at `pos`, `[head_dim]`.
fn rotations(pos: u64, out: &mut [f32]) {
    let head_dim = out.len();
    let (cos, sin) = out.split_at_mut(head_dim / 2);
    for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
        let angle = pos as f64 * ROPE_BASE.powf(-2.0 * i as f64 / head_dim as f64);
        (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
    }
}
