//! Causal sliding-window attention from packed queries, keys and values: QK-norm, RoPE, scores and mean, block by block of
//! queries, so that memory grows with the length and not with its square.
//!
//! Queries and keys are normalised, so scores are at most sqrt(head_dim) and their exponentials need no largest one beside them.
//! The backward pass computes the weights again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::matmul::{Matrix, MatrixMut, multiply, multiply_add};
use super::{Values, gradient, in_chunks, plain, values};
use crate::simd::{portable, wide_loop};

/// [`super::Ops::attention`]
pub fn attention(qkv: &Tensor, n_heads: usize, window: usize) -> Result<Tensor> {
    qkv.contiguous()?.apply_op1(Attention { n_heads, window })
}

/// Cosines and sines of each position, `[len, head_dim]`: [`plain::rope_table`] side by side. Kept from call to call.
pub(crate) fn rope_angles(len: usize, head_dim: usize) -> Arc<Vec<f32>> {
    static KEPT: Mutex<BTreeMap<usize, Arc<Vec<f32>>>> = Mutex::new(BTreeMap::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let angles = kept.entry(head_dim).or_default();
    if angles.len() < len * head_dim {
        let (cos, sin) = plain::rope_values(0, len, head_dim);
        let rows = cos.chunks_exact(head_dim / 2).zip(sin.chunks_exact(head_dim / 2));
        *angles = Arc::new(rows.flat_map(|(cos, sin)| cos.iter().chain(sin)).copied().collect());
    }
    angles.clone()
}

pub(super) struct Attention {
    pub n_heads: usize,
    pub window: usize,
}

/// Sizes of a call; rows are those of all excerpts.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    len: usize,
    dim: usize,
    n_heads: usize,
    head_dim: usize,
    window: usize,
    /// Queries of a block: few enough that most of its scores are of visible keys.
    block: usize,
}

/// A block of queries of one excerpt and the keys that it sees.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    queries: usize,
    first_key: usize,
    keys: usize,
}

impl Sizes {
    /// Width of a row of queries, keys and values.
    fn packed(&self) -> usize {
        3 * self.dim
    }

    /// Most keys that a block sees.
    fn most_keys(&self) -> usize {
        (self.window - 1).saturating_add(self.block).min(self.len)
    }

    fn at(&self, i: usize) -> Block {
        let first = i * self.block;
        let queries = self.block.min(self.len - first);
        let first_key = (first + 1).saturating_sub(self.window);
        Block { first, queries, first_key, keys: first + queries - first_key }
    }

    fn key_heads<'a>(&self, qkv: &'a [f32], angles: &'a [f32]) -> Heads<'a> {
        let &Self { dim, head_dim, .. } = self;
        Heads { rows: &qkv[dim..], stride: self.packed(), dim, angles, head_dim, factor: 1.0 }
    }

    /// Queries from position `first` on, to be divided for scores.
    fn query_heads<'a>(&self, first: usize, qkv: &'a [f32], angles: &'a [f32]) -> Heads<'a> {
        let &Self { dim, head_dim, .. } = self;
        let (rows, angles) = (&qkv[first * self.packed()..], &angles[first * head_dim..]);
        Heads { rows, stride: self.packed(), dim, angles, head_dim, factor: 1.0 / (head_dim as f32).sqrt() }
    }
}

/// Rows of heads side by side that are to be normalised and rotated.
#[derive(Clone, Copy)]
struct Heads<'a> {
    rows: &'a [f32],
    /// From row to row.
    stride: usize,
    dim: usize,
    /// Of every row, `[rows, head_dim]`.
    angles: &'a [f32],
    head_dim: usize,
    factor: f32,
}

wide_loop! {
    /// Heads, normalised, rotated and multiplied by their factor, to rows of `to`, one after the other.
    fn normalize(heads: Heads<'a>, to: &'a mut [f32]) {
        let Heads { rows, stride, dim, angles, head_dim, factor } = heads;
        for ((row, angles), to) in rows.chunks(stride).zip(angles.chunks_exact(head_dim)).zip(to.chunks_exact_mut(dim)) {
            to.copy_from_slice(&row[..dim]);
            portable::normalize_and_rotate(to, angles, factor);
        }
    }
}

wide_loop! {
    /// From gradients `d` of what [`normalize`] gives, one row after the other, those of the heads, to rows of `to` with
    /// their stride.
    fn normalize_backward(heads: Heads<'a>, d: &'a mut [f32], to: &'a mut [f32]) {
        let Heads { rows, stride, dim, angles, head_dim, factor } = heads;
        let places = d.chunks_exact_mut(dim).zip(to.chunks_mut(stride));
        for ((row, angles), (d, to)) in rows.chunks(stride).zip(angles.chunks_exact(head_dim)).zip(places) {
            let (cos, sin) = angles.split_at(head_dim / 2);
            let places = d.chunks_exact_mut(head_dim).zip(to[..dim].chunks_exact_mut(head_dim));
            for (x, (d, to)) in row[..dim].chunks_exact(head_dim).zip(places) {
                let inverse = portable::inverse_rms(x);
                let (a, b) = d.split_at_mut(head_dim / 2);
                for (((a, b), &c), &s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                    (*a, *b) = ((*a * c + *b * s) * factor, (*b * c - *a * s) * factor);
                }
                let along = portable::dot_f32(x, d) * inverse * inverse / head_dim as f32;
                for ((to, &d), &x) in to.iter_mut().zip(&*d).zip(x) {
                    *to = (d - along * x) * inverse;
                }
            }
        }
    }
}

wide_loop! {
    /// Turns rows of scores into exponentials where a query sees the key, into 0 elsewhere; `inverse` are 1 over their sums.
    /// The first row sees keys before `end`, the next one another, each the last `window` of these.
    fn weigh(scores: &'a mut [f32], keys: usize, end: usize, window: usize, inverse: &'a mut [f32]) {
        for (i, (row, inverse)) in scores.chunks_exact_mut(keys).zip(inverse).enumerate() {
            let (begin, end) = ((end + i).saturating_sub(window), end + i);
            row[..begin].fill(0.0);
            row[end..].fill(0.0);
            let seen = &mut row[begin..end];
            for x in seen.iter_mut() {
                *x = portable::exp(*x);
            }
            *inverse = 1.0 / portable::sum(seen);
        }
    }
}

wide_loop! {
    /// `row[..dim] *= factor` of rows `stride` apart.
    fn scale_rows(rows: &'a mut [f32], stride: usize, dim: usize, factors: &'a [f32]) {
        for (row, &factor) in rows.chunks_mut(stride).zip(factors) {
            row[..dim].iter_mut().for_each(|x| *x *= factor);
        }
    }
}

wide_loop! {
    /// Gradients `d` of weights become those of scores: `weight (d - sum weight d)`.
    fn weigh_backward(weights: &'a [f32], d: &'a mut [f32], keys: usize) {
        for (weights, d) in weights.chunks_exact(keys).zip(d.chunks_exact_mut(keys)) {
            let mean = portable::dot_f32(weights, d);
            for (d, &weight) in d.iter_mut().zip(weights) {
                *d = weight * (*d - mean);
            }
        }
    }
}

impl Attention {
    fn sizes(&self, shape: &Shape) -> Result<Sizes> {
        let (batch, len, packed) = shape.dims3()?;
        let (dim, head_dim) = (packed / 3, packed / 3 / self.n_heads.max(1));
        if self.window == 0 || head_dim == 0 || head_dim % 2 == 1 || 3 * head_dim * self.n_heads != packed || len == 0 {
            bail!("attention: {shape:?} for {} heads, window {}", self.n_heads, self.window);
        }
        let block = self.window.clamp(32, 64);
        Ok(Sizes { batch, len, dim, n_heads: self.n_heads, head_dim, window: self.window, block })
    }

    /// Keys of an excerpt, normalised and rotated, `[len, dim]`.
    fn keys(sizes: &Sizes, qkv: &[f32], angles: &[f32]) -> Vec<f32> {
        let mut keys = vec![0.0; sizes.len * sizes.dim];
        normalize(sizes.key_heads(qkv, angles), &mut keys);
        keys
    }
}

/// Columns of one head of a block's rows from `row` on.
fn head_of(values: &[f32], row: usize, rows: usize, stride: usize, column: usize, head_dim: usize) -> Matrix<'_> {
    Matrix::strided(&values[row * stride + column..], rows, head_dim, stride)
}

fn head_of_mut(
    values: &mut [f32],
    row: usize,
    rows: usize,
    stride: usize,
    column: usize,
    head_dim: usize,
) -> MatrixMut<'_> {
    MatrixMut::strided(&mut values[row * stride + column..], rows, head_dim, stride)
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(layout.shape())?;
        let Sizes { batch, len, dim, n_heads, head_dim, window, block } = sizes;
        let (packed, most_keys) = (sizes.packed(), sizes.most_keys());
        let angles = rope_angles(len, head_dim);
        let mut out = vec![0.0; batch * len * dim];
        let excerpts = values(qkv, layout)?.chunks_exact(len * packed).zip(out.chunks_exact_mut(len * dim));
        for (qkv, out) in excerpts {
            let keys = Self::keys(&sizes, qkv, &angles);
            in_chunks(out, block * dim, block * (dim + most_keys + 1), |room, i, out| {
                let at = sizes.at(i);
                let (queries, room) = room.split_at_mut(block * dim);
                let (scores, inverse) = room.split_at_mut(block * most_keys);
                let (scores, inverse) = (&mut scores[..at.queries * at.keys], &mut inverse[..at.queries]);
                normalize(sizes.query_heads(at.first, qkv, &angles), &mut queries[..at.queries * dim]);
                for h in 0..n_heads {
                    let column = h * head_dim;
                    let q = head_of(queries, 0, at.queries, dim, column, head_dim);
                    let k = head_of(&keys, at.first_key, at.keys, dim, column, head_dim);
                    let v = head_of(qkv, at.first_key, at.keys, packed, 2 * dim + column, head_dim);
                    multiply(q, k.t(), MatrixMut::new(scores, at.keys));
                    weigh(scores, at.keys, at.first + 1 - at.first_key, window, inverse);
                    let weights = Matrix::new(scores, at.keys);
                    multiply(weights, v, head_of_mut(out, 0, at.queries, dim, column, head_dim));
                    scale_rows(&mut out[column..], dim, head_dim, inverse);
                }
            });
        }
        Ok((CpuStorage::F32(out), (batch, len, dim).into()))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let sizes = self.sizes(qkv.shape())?;
        let Sizes { len, dim, n_heads, head_dim, window, block, .. } = sizes;
        let (packed, most_keys) = (sizes.packed(), sizes.most_keys());
        let angles = rope_angles(len, head_dim);
        let dy = dy.contiguous()?;
        let mut dqkv = vec![0.0; qkv.elem_count()];
        {
            let (qkv, dy) = (Values::of(qkv)?, Values::of(&dy)?);
            let (mut queries, mut dqueries) = (vec![0.0; block * dim], vec![0.0; block * dim]);
            let (mut scores, mut dscores) = (vec![0.0; block * most_keys], vec![0.0; block * most_keys]);
            let (mut inverse, mut dkeys) = (vec![0.0; block], vec![0.0; len * dim]);
            let excerpts = qkv.chunks_exact(len * packed).zip(dqkv.chunks_exact_mut(len * packed));
            for ((qkv, dqkv), dy) in excerpts.zip(dy.chunks_exact(len * dim)) {
                let keys = Self::keys(&sizes, qkv, &angles);
                dkeys.fill(0.0);
                for i in 0..len.div_ceil(block) {
                    let at = sizes.at(i);
                    let (queries, dqueries) = (&mut queries[..at.queries * dim], &mut dqueries[..at.queries * dim]);
                    let n = at.queries * at.keys;
                    let (scores, dscores, inverse) = (&mut scores[..n], &mut dscores[..n], &mut inverse[..at.queries]);
                    let heads = sizes.query_heads(at.first, qkv, &angles);
                    normalize(heads, queries);
                    for h in 0..n_heads {
                        let column = h * head_dim;
                        let q = head_of(queries, 0, at.queries, dim, column, head_dim);
                        let k = head_of(&keys, at.first_key, at.keys, dim, column, head_dim);
                        let v = head_of(qkv, at.first_key, at.keys, packed, 2 * dim + column, head_dim);
                        let d_out = head_of(dy, at.first, at.queries, dim, column, head_dim);
                        multiply(q, k.t(), MatrixMut::new(scores, at.keys));
                        weigh(scores, at.keys, at.first + 1 - at.first_key, window, inverse);
                        scale_rows(scores, at.keys, at.keys, inverse);
                        let weights = Matrix::new(scores, at.keys);
                        let dv = head_of_mut(dqkv, at.first_key, at.keys, packed, 2 * dim + column, head_dim);
                        multiply_add(weights.t(), d_out, dv);
                        multiply(d_out, v.t(), MatrixMut::new(dscores, at.keys));
                        weigh_backward(scores, dscores, at.keys);
                        let dscores = Matrix::new(dscores, at.keys);
                        multiply(dscores, k, head_of_mut(dqueries, 0, at.queries, dim, column, head_dim));
                        let dk = head_of_mut(&mut dkeys, at.first_key, at.keys, dim, column, head_dim);
                        multiply_add(dscores.t(), q, dk);
                    }
                    normalize_backward(heads, dqueries, &mut dqkv[at.first * packed..]);
                }
                normalize_backward(sizes.key_heads(qkv, &angles), &mut dkeys, &mut dqkv[dim..]);
            }
        }
        gradient(dqkv, qkv)
    }
}
