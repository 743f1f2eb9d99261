//! Portable kernels: the specification, in plain loops over fixed lanes that every instruction set can follow bit for bit.
//!
//! Sums run in [`LANES`] interleaved lanes, multiplications and additions are separate (never fused), integers are exact:
//! so compiling these functions for wider registers changes speed and not one bit of the result.

use super::panels::{LANES, LineF32, MAX_VECTORS, PanelsF32, PanelsI8, ROUNDING};
use crate::dot::dot;

const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Score of a slot that holds no position.
const MASKED: f32 = -1e30;
const NORM_EPSILON: f32 = 1e-6;

/// e^x to 2 units in the last place; x is held to [-87, 88].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDING;
    let n = shifted - ROUNDING;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    // Taylor's polynomial does as well as any on [-ln 2 / 2, ln 2 / 2] in f32.
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUNDING.to_bits()) << 23;
    f32::from_bits(p.to_bits().wrapping_add(exponent))
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of squares.
#[inline(always)]
pub fn sum_squares(x: &[f32]) -> f32 {
    dot::<f32, LANES>(x, x)
}

/// `x * 127 / max|x|`, rounded, into `out` (as long as `x`; what lies beyond is set to 0); returns `max|x| / 127`.
#[inline(always)]
pub fn quantize(x: &[f32], out: &mut [i8]) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut most = [0.0f32; LANES];
    for block in blocks {
        for i in 0..LANES {
            most[i] = most[i].max(block[i].abs());
        }
    }
    let most = rest.iter().fold(fold(most, f32::max), |most, x| most.max(x.abs()));
    let factor = if most > 0.0 { 127.0 / most } else { 0.0 };
    for (q, &x) in out.iter_mut().zip(x) {
        // The low byte of the rounded sum is the whole number in two's complement.
        *q = (x * factor + ROUNDING).to_bits() as i8;
    }
    out[x.len()..].fill(0);
    most / 127.0
}

#[inline(always)]
fn silu_of(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x sigmoid(x)` in place.
#[inline(always)]
pub fn silu(x: &mut [f32]) {
    for x in x {
        *x = silu_of(*x);
    }
}

/// `gated[i] = silu(gate[i]) * value[i]`; `up` = [gate | value].
#[inline(always)]
pub fn swiglu(up: &[f32], gated: &mut [f32]) {
    let (gate, value) = up.split_at(gated.len());
    for ((y, &g), &v) in gated.iter_mut().zip(gate).zip(value) {
        *y = silu_of(g) * v;
    }
}

/// Divides each head by its root mean square, rotates its first half against its second by `angles` = [cosines |
/// sines], `[head_dim]`, and multiplies it by `factor`.
#[inline(always)]
pub fn normalize_and_rotate(heads: &mut [f32], angles: &[f32], factor: f32) {
    let head_dim = angles.len();
    let (cos, sin) = angles.split_at(head_dim / 2);
    for head in heads.chunks_exact_mut(head_dim) {
        let power = sum_squares(head) / head_dim as f32 + NORM_EPSILON;
        let scale = factor / power.sqrt();
        let (a, b) = head.split_at_mut(head_dim / 2);
        for (((a, b), &c), &s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            let (x, y) = (*a * scale, *b * scale);
            *a = x * c - y * s;
            *b = x * s + y * c;
        }
    }
}

/// `1 / rms(x)`.
#[inline(always)]
pub fn inverse_rms(x: &[f32]) -> f32 {
    1.0 / (sum_squares(x) / x.len() as f32 + NORM_EPSILON).sqrt()
}

/// The one sum that matrices of floats and attention are made of.
pub trait Sums {
    /// `sum_k weights[k] rows[k * stride..][..V]`, lane by lane. Up to 3 lines, those with even and odd k are summed apart, so
    /// that sums need not wait for each other.
    fn sum<const V: usize>(weights: &[f32], rows: &[LineF32], stride: usize) -> [[f32; LANES]; V];
}

/// The specification of [`Sums`].
pub struct Plain;

impl Sums for Plain {
    #[inline(always)]
    fn sum<const V: usize>(weights: &[f32], rows: &[LineF32], stride: usize) -> [[f32; LANES]; V] {
        let n_chains = chains(V);
        let mut sums = [[[0.0; LANES]; V]; 2];
        for (k, &weight) in weights.iter().enumerate() {
            for (sums, row) in sums[k % n_chains].iter_mut().zip(&rows[k * stride..][..V]) {
                for (sum, x) in sums.iter_mut().zip(row.0) {
                    *sum += weight * x;
                }
            }
        }
        let [mut even, odd] = sums;
        for (even, odd) in even.as_flattened_mut().iter_mut().zip(odd.as_flattened()) {
            *even += odd;
        }
        even
    }
}

/// Sums side by side in [`Sums::sum`] of `vectors` lines.
#[inline(always)]
pub const fn chains(vectors: usize) -> usize {
    if vectors <= 3 { 2 } else { 1 }
}

/// Where [`attend`] finds the ring of one head: keys `[head_dim, stride]` (slots beside each other), values `[slots,
/// value_stride]`; strides are in lines, padding is 0.
#[derive(Clone, Copy)]
pub struct Ring<'a> {
    pub keys: &'a [LineF32],
    pub values: &'a [LineF32],
    pub stride: usize,
    pub value_stride: usize,
    /// Slots that hold a position: the first so many.
    pub filled: usize,
}

/// Softmax attention of one query (`[head_dim]`, already divided by sqrt(head_dim)) over a ring; `scores` has room for `stride`
/// lines.
#[inline(always)]
pub fn attend<S: Sums>(q: &[f32], ring: Ring, scores: &mut [f32], out: &mut [f32]) {
    let used = ring.filled.div_ceil(LANES);
    let scores = &mut scores[..used * LANES];
    let mut at = 0;
    while at < used {
        let (keys, scores) = (&ring.keys[at..], &mut scores[at * LANES..]);
        let n = match used - at {
            1 => copy(&S::sum::<1>(q, keys, ring.stride), 1.0, scores),
            2 | 3 => copy(&S::sum::<2>(q, keys, ring.stride), 1.0, scores),
            _ => copy(&S::sum::<4>(q, keys, ring.stride), 1.0, scores),
        };
        at += n;
    }
    scores[ring.filled..].fill(MASKED);
    let mut most = [MASKED; LANES];
    let (blocks, _) = scores.as_chunks_mut::<LANES>();
    for block in &*blocks {
        for i in 0..LANES {
            most[i] = most[i].max(block[i]);
        }
    }
    let most = fold(most, f32::max);
    let mut sums = [0.0; LANES];
    for block in blocks {
        for i in 0..LANES {
            block[i] = exp(block[i] - most);
            sums[i] += block[i];
        }
    }
    let scale = 1.0 / fold(sums, |a, b| a + b);
    let weights = &scores[..ring.filled];
    let mut at = 0;
    while at * LANES < out.len() {
        let (values, out) = (&ring.values[at..], &mut out[at * LANES..]);
        let n = match out.len().div_ceil(LANES) {
            1 => copy(&S::sum::<1>(weights, values, ring.value_stride), scale, out),
            2 => copy(&S::sum::<2>(weights, values, ring.value_stride), scale, out),
            3 => copy(&S::sum::<3>(weights, values, ring.value_stride), scale, out),
            _ => copy(&S::sum::<4>(weights, values, ring.value_stride), scale, out),
        };
        at += n;
    }
}

/// `out = scale * sums`, as far as there is room; returns the number of lines.
#[inline(always)]
fn copy<const V: usize>(sums: &[[f32; LANES]; V], scale: f32, out: &mut [f32]) -> usize {
    for (y, sum) in out.iter_mut().zip(sums.as_flattened()) {
        *y = sum * scale;
    }
    V
}

/// `out[r, j] = row_scales[r] * sum_k x[r, k] w[k, j]`, x `[rows, n_in]`, out `[rows, n_out]`.
#[inline(always)]
pub fn gemm_f32<S: Sums>(w: &PanelsF32, x: &[f32], row_scales: &[f32], out: &mut [f32]) {
    for ((x, &scale), out) in x.chunks_exact(w.n_in).zip(row_scales).zip(out.chunks_exact_mut(w.n_out)) {
        for panel in &w.panels {
            let lines = &w.lines[panel.at..panel.at + w.n_in * panel.vectors];
            let out = &mut out[panel.first..];
            match panel.vectors {
                1 => copy(&S::sum::<1>(x, lines, 1), scale, out),
                2 => copy(&S::sum::<2>(x, lines, 2), scale, out),
                3 => copy(&S::sum::<3>(x, lines, 3), scale, out),
                4 => copy(&S::sum::<4>(x, lines, 4), scale, out),
                5 => copy(&S::sum::<5>(x, lines, 5), scale, out),
                _ => copy(&S::sum::<MAX_VECTORS>(x, lines, MAX_VECTORS), scale, out),
            };
        }
    }
}

/// `out[r, j] = row_scales[r] * scales[j] * sum_k a[r, k] w[k, j]`, a `[rows, 4 * groups]`, out `[rows, n_out]`.
#[inline(always)]
pub fn gemm_i8(w: &PanelsI8, a: &[i8], row_scales: &[f32], out: &mut [f32]) {
    for ((a, &scale), out) in a.chunks_exact(4 * w.groups).zip(row_scales).zip(out.chunks_exact_mut(w.n_out)) {
        for panel in &w.panels {
            let mut sums = [[0i32; LANES]; MAX_VECTORS];
            let lines = &w.lines[panel.at..panel.at + w.groups * panel.vectors];
            for (a, lines) in a.as_chunks::<4>().0.iter().zip(lines.chunks_exact(panel.vectors)) {
                for (sums, line) in sums.iter_mut().zip(lines) {
                    for (sum, w) in sums.iter_mut().zip(line.0.as_chunks::<4>().0) {
                        *sum += (0..4).map(|t| i32::from(a[t]) * i32::from(w[t])).sum::<i32>();
                    }
                }
            }
            store_i8(w, panel.first, &sums[..panel.vectors], scale, out);
        }
    }
}

/// Integer sums of the outputs from `first` on, scaled, into a row of outputs.
#[inline(always)]
pub fn store_i8(w: &PanelsI8, first: usize, sums: &[[i32; LANES]], row_scale: f32, out: &mut [f32]) {
    for ((y, &sum), &scale) in out[first..].iter_mut().zip(sums.as_flattened()).zip(&w.scales[first..]) {
        *y = sum as f32 * (scale * row_scale);
    }
}

/// The Levinson-Durbin recursion (see [`crate::forecast::levinson`]): `r` and all buffers hold `order + 1` or more; leaves a_1, ...,
/// a_order in `forward[..order]`, the same turned round in `backward[..order]`, and returns the residual power.
#[inline(always)]
pub fn levinson(r: &[f64], order: usize, falling: &mut [f64], forward: &mut [f64], backward: &mut [f64]) -> f64 {
    let (falling, forward, backward) = (&mut falling[..=order], &mut forward[..order], &mut backward[..order]);
    for (lag, falling) in falling.iter_mut().rev().enumerate() {
        *falling = r[lag]; // falling[order - lag] = r[lag]
    }
    forward.fill(0.0);
    backward.fill(0.0);
    // After k steps: forward[..k] = a_1 ... a_k, and the same backwards: backward[order - k..] = a_k ... a_1.
    // Keeping both makes every loop below run forwards through memory.
    let mut power = r[0];
    for k in 0..order {
        // Also leaves when the power is not a number.
        if power.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
            break;
        }
        let reflection = (r[k + 1] - dot::<f64, 8>(&forward[..k], &falling[order - k..])) / power;
        for (a, b) in forward[..k].iter_mut().zip(&mut backward[order - k..]) {
            (*a, *b) = (*a - reflection * *b, *b - reflection * *a);
        }
        forward[k] = reflection;
        backward[order - k - 1] = reflection;
        power *= 1.0 - reflection * reflection;
    }
    power
}

/// Sum of products in [`LANES`] lanes.
#[inline(always)]
pub fn dot_f32(a: &[f32], b: &[f32]) -> f32 {
    dot::<f32, LANES>(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_a_few_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 4e-7, "exp({x})");
        }
        assert!(exp(-1e30) < 1.7e-38 && exp(1e30).is_finite());
    }

    #[test]
    fn quantized_values_are_the_nearest_and_padding_is_zero() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut q = vec![9; 40];
        let scale = quantize(&x, &mut q);
        assert_eq!(&q[37..], [0, 0, 0]);
        assert_eq!(q.iter().map(|q| q.unsigned_abs()).max(), Some(127));
        for (&q, &x) in q.iter().zip(&x) {
            assert!((f32::from(q) * scale - x).abs() <= 0.501 * scale, "{x}");
        }
        assert_eq!((quantize(&[0.0; 5], &mut q[..5]), &q[..5]), (0.0, &[0i8; 5][..]));
    }

    #[test]
    fn attention_is_the_softmax_mean_of_the_filled_slots() {
        for (head_dim, window, filled) in [(5, 7, 3), (48, 32, 32), (64, 130, 129), (17, 1, 1), (96, 70, 70)] {
            let (stride, value_stride) = (usize::div_ceil(window, LANES), usize::div_ceil(head_dim, LANES));
            let value = |i: usize| ((i * i) as f32 * 0.37).sin();
            let mut keys = vec![LineF32::ZERO; head_dim * stride];
            let mut values = vec![LineF32::ZERO; window * value_stride];
            for slot in 0..filled {
                for d in 0..head_dim {
                    keys[d * stride + slot / LANES].0[slot % LANES] = value(slot * 31 + d);
                    values[slot * value_stride + d / LANES].0[d % LANES] = value(slot * 17 + 3 * d + 1);
                }
            }
            let q: Vec<f32> = (0..head_dim).map(|d| value(d + 5)).collect();
            let ring = Ring { keys: &keys, values: &values, stride, value_stride, filled };
            let mut out = vec![0.0; head_dim];
            attend::<Plain>(&q, ring, &mut vec![0.0; stride * LANES], &mut out);
            let scores: Vec<f64> = (0..filled)
                .map(|s| {
                    (0..head_dim)
                        .map(|d| f64::from(q[d] * keys[d * stride + s / LANES].0[s % LANES]))
                        .sum::<f64>()
                        .exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            for (d, &y) in out.iter().enumerate() {
                let at = |s: usize| f64::from(values[s * value_stride + d / LANES].0[d % LANES]);
                let mean = (0..filled).map(|s| scores[s] * at(s)).sum::<f64>() / total;
                assert!((f64::from(y) - mean).abs() < 1e-5, "{head_dim} {window} {filled}: {y}, expected {mean}");
            }
        }
    }
}
