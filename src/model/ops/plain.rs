//! The operations as they read, composed of candle's own, with candle's gradients; [`super::Ops`] says what each computes.

use candle_core::{D, Device, Result, Tensor};

use super::super::config::N_FORECASTS;
use super::super::head::{LEAST_BIN, Targets};
use crate::sampler::{MAX_LOG_SCALE, MAX_OFFSET};

const NORM_EPS: f64 = 1e-6;
const ROPE_BASE: f64 = 10_000.0;

fn rms_normalize(x: &Tensor) -> Result<Tensor> {
    let power = (x.sqr()?.mean_keepdim(D::Minus1)? + NORM_EPS)?;
    x.broadcast_div(&power.sqrt()?)
}

pub fn rms_norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    rms_normalize(x)?.broadcast_mul(gain)
}

/// `x weight` for any leading dimensions.
fn matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (inputs, outputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    x.reshape(((), inputs))?.matmul(weight)?.reshape(shape)
}

pub fn norm_linear(x: &Tensor, gain: &Tensor, weight: &Tensor) -> Result<Tensor> {
    matmul(&rms_norm(x, gain)?, weight)
}

pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    matmul(x, weight)?.broadcast_add(bias)
}

pub fn silu_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    linear(x, weight, bias)?.silu()
}

pub fn add_linear(residual: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    residual + matmul(x, weight)?.reshape(residual.shape())?
}

pub fn add_swiglu_linear(residual: &Tensor, up: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let hidden = up.dim(D::Minus1)? / 2;
    let gate = up.narrow(D::Minus1, 0, hidden)?;
    let value = up.narrow(D::Minus1, hidden, hidden)?;
    add_linear(residual, &(gate.silu()? * value)?, weight)
}

/// Angles of rotary position embedding (Su et al., 2021) for positions `start..start + len`: cosines and sines,
/// each `[len, head_dim / 2]`. Angles are reduced in f64, so that positions may grow without bound.
pub fn rope_values(start: u64, len: usize, head_dim: usize) -> (Vec<f32>, Vec<f32>) {
    let half = head_dim / 2;
    let frequencies: Vec<f64> = (0..half).map(|i| ROPE_BASE.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    let (mut cos, mut sin) = (Vec::with_capacity(len * half), Vec::with_capacity(len * half));
    for pos in start..start + len as u64 {
        for frequency in &frequencies {
            let angle = pos as f64 * frequency;
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
    }
    (cos, sin)
}

/// [`rope_values`] as tensors.
fn rope_table(start: u64, len: usize, head_dim: usize) -> Result<(Tensor, Tensor)> {
    let (cos, sin) = rope_values(start, len, head_dim);
    let shape = (len, head_dim / 2);
    Ok((Tensor::from_vec(cos, shape, &Device::Cpu)?, Tensor::from_vec(sin, shape, &Device::Cpu)?))
}

/// Rotates the first half of the features against the second: `[batch, n_heads, len, head_dim]`.
fn rope(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let rotated_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let rotated_b = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Tensor::cat(&[rotated_a, rotated_b], D::Minus1)
}

/// `[batch, len, 3 * dim]` -> queries and keys, normalised and rotated to `start..`, and values: each `[batch, n_heads, len,
/// head_dim]`.
pub fn split_heads(qkv: &Tensor, n_heads: usize, start: u64) -> Result<[Tensor; 3]> {
    let (batch, len, width) = qkv.dims3()?;
    let (dim, head_dim) = (width / 3, width / 3 / n_heads);
    let part =
        |i: usize| qkv.narrow(2, i * dim, dim)?.reshape((batch, len, n_heads, head_dim))?.transpose(1, 2)?.contiguous();
    let (cos, sin) = rope_table(start, len, head_dim)?;
    let angles = (cos.to_device(qkv.device())?, sin.to_device(qkv.device())?);
    Ok([rope(&rms_normalize(&part(0)?)?, &angles)?, rope(&rms_normalize(&part(1)?)?, &angles)?, part(2)?])
}

/// `[batch, n_heads, len, head_dim]` -> `[batch, len, dim]`
pub fn join_heads(heads: &Tensor) -> Result<Tensor> {
    let (batch, n_heads, len, head_dim) = heads.dims4()?;
    heads.transpose(1, 2)?.contiguous()?.reshape((batch, len, n_heads * head_dim))
}

pub fn attention(qkv: &Tensor, n_heads: usize, window: usize) -> Result<Tensor> {
    let [q, k, v] = split_heads(qkv, n_heads, 0)?;
    let (batch, _, len, head_dim) = q.dims4()?;
    let window = window.min(len);
    let n_blocks = len.div_ceil(window);
    let padding = n_blocks * window - len;
    // Queries in blocks of `window`; each block sees its own keys and those of the block before it.
    let rows = batch * n_heads;
    let blocks =
        |t: &Tensor| -> Result<Tensor> { t.pad_with_zeros(2, 0, padding)?.reshape((rows, n_blocks, window, head_dim)) };
    let (q, k, v) = (blocks(&q)?, blocks(&k)?, blocks(&v)?);
    let attended = if n_blocks == 1 {
        attend(&q, &k, &v, &mask(window, window, |i, j| j <= i)?.to_device(qkv.device())?)?
    } else {
        let with_previous = |t: &Tensor| -> Result<Tensor> {
            let previous = t.narrow(1, 0, n_blocks - 1)?.pad_with_zeros(1, 1, 0)?;
            Tensor::cat(&[&previous, t], 2)
        };
        // Nothing lies before the first block; query i of a later one sees the `window` keys that end with its own.
        let first = mask(window, 2 * window, |i, j| j >= window && j <= i + window)?;
        let later = mask(window, 2 * window, |i, j| j > i && j <= i + window)?;
        let later = later.unsqueeze(0)?.broadcast_as((n_blocks - 1, window, 2 * window))?.contiguous()?;
        let masks = Tensor::cat(&[first.unsqueeze(0)?, later], 0)?;
        attend(&q, &with_previous(&k)?, &with_previous(&v)?, &masks.to_device(qkv.device())?)?
    };
    join_heads(&attended.reshape((batch, n_heads, n_blocks * window, head_dim))?.narrow(2, 0, len)?)
}

/// Softmax attention of blocks: q `[rows, n, i, d]`, k and v `[rows, n, j, d]`, mask `[i, j]` or `[n, i, j]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let head_dim = q.dim(D::Minus1)?;
    let scores = (q.contiguous()?.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
    candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?.matmul(&v.contiguous()?)
}

/// Additive mask of queries that see some keys.
fn mask(queries: usize, keys: usize, sees: impl Fn(usize, usize) -> bool) -> Result<Tensor> {
    let values = (0..queries * keys).map(|at| if sees(at / keys, at % keys) { 0.0f32 } else { -1e4 }).collect();
    Tensor::from_vec(values, (queries, keys), &Device::Cpu)
}

pub fn spread(table: &Tensor, len: usize) -> Result<Tensor> {
    let (batch, frames, period, dim) = table.dims4()?;
    let times = len / (frames * period);
    table.unsqueeze(2)?.broadcast_as((batch, frames, times, period, dim))?.reshape((batch, len, dim))
}

pub fn gather_add(x: &Tensor, table: &Tensor, codes: &[u32]) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let rows = x.elem_count() / dim;
    let codes = Tensor::new(codes, x.device())?;
    let selected = table.index_select(&codes, 0)?.reshape((rows, (), dim))?.sum(1)?;
    x + selected.reshape(x.shape())?
}

/// `limit tanh(x / limit)`
fn bounded(x: &Tensor, limit: f32) -> Result<Tensor> {
    (x / f64::from(limit))?.tanh()? * f64::from(limit)
}

pub fn bound_scales(head: &Tensor, bias: &Tensor, planned: &Tensor, limit: f32) -> Result<Tensor> {
    let (batch, time, _) = head.dims3()?;
    let (_, frames, slices, k) = planned.dims4()?;
    let head = head.broadcast_add(bias)?;
    let free = head.narrow(2, 2 * k, k)?.contiguous()?.reshape((batch, frames, slices, (), k))?;
    let scales = bounded(&free, limit)?.broadcast_add(&planned.unsqueeze(3)?)?.reshape((batch, time, k))?;
    Tensor::cat(&[&head.narrow(2, 0, 2 * k)?.contiguous()?, &scales], 2)
}

/// ln(sigmoid(x)) without overflow on either side.
fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let least = x.minimum(0.0)?;
    let tail = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    least - tail
}

pub fn nll(head: &Tensor, targets: &Targets) -> Result<Tensor> {
    let n = targets.low.len();
    let of_forecasts = |v: &[f32]| Tensor::from_slice(v, (n, N_FORECASTS, 1), head.device());
    let of_samples = |v: &[f32]| Tensor::from_slice(v, (n, 1, 1), head.device());
    let (forecasts, units) = (of_forecasts(&targets.forecasts)?, of_forecasts(&targets.units)?);
    let (low, high) = (of_samples(&targets.low)?, of_samples(&targets.high)?);
    let k = head.dim(D::Minus1)? / 3;
    let head = head.reshape((n, 3, k))?;
    let part = |i: usize| head.narrow(1, i, 1)?.squeeze(1)?.contiguous();
    let grouped = |t: Tensor| t.reshape((n, N_FORECASTS, k / N_FORECASTS));
    let weights = part(0)?;
    let log_weights = grouped(weights.broadcast_sub(&weights.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?)?;
    let offsets = grouped(bounded(&part(1)?, MAX_OFFSET)?)?;
    let log_scales = grouped(bounded(&part(2)?, MAX_LOG_SCALE)?)?;
    let moved = offsets.broadcast_mul(&units)?;
    let inverse_scales = log_scales.neg()?.exp()?.broadcast_div(&units)?;
    // First without the forecast, which may lie a million scales from 0 and a few from the bin.
    let a = (low.broadcast_sub(&forecasts)?.broadcast_sub(&moved)? * &inverse_scales)?;
    let b = (high.broadcast_sub(&forecasts)?.broadcast_sub(&moved)? * &inverse_scales)?;
    let difference = low.broadcast_sub(&high)?.broadcast_mul(&inverse_scales)?.minimum(-f64::from(LEAST_BIN))?;
    // 1 - e^x as -2 t / (1 - t) with t = tanh(x / 2), which keeps its digits near 0.
    let t = (difference / 2.0)?.tanh()?;
    let bin = ((&t * -2.0)? / (1.0 - t)?)?.log()?;
    let terms = (((log_weights + log_sigmoid(&b)?)? + log_sigmoid(&a.neg()?)?)? + bin)?;
    terms.reshape((n, k))?.log_sum_exp(D::Minus1)?.neg()
}

pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let rows = targets.len();
    let logits = logits.reshape((rows, ()))?;
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    logits.log_sum_exp(D::Minus1)? - logits.gather(&targets, 1)?.squeeze(1)?
}
