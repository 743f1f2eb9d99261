//! Portable kernels: the specification, in plain loops over fixed lanes that every instruction set can follow bit for bit.
//!
//! Sums run in [`LANES`] interleaved lanes, multiplications and additions are separate (never fused), integers are exact:
//! so compiling these functions for wider registers changes speed and not one bit of the result.

use super::panels::{
    LANES, LineF32, LineI8, MAX_VECTORS, Panel, PanelsF32, PanelsI8, ROUNDING, SMALLEST, factor, larger, unit, whole,
};
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

/// ln x to 2 units in the last place for a positive, normal x; NaN for anything else. The polynomial is that of Moshier's
/// Cephes (logf).
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // x = m 2^n with m in [sqrt(1/2), sqrt(2)).
    let n = (x.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()) as i32) >> 23;
    let r = f32::from_bits(x.to_bits().wrapping_sub((n << 23) as u32)) - 1.0;
    let n = n as f32;
    let mut p = 7.037_683_6e-2;
    p = p * r - 1.151_461e-1;
    p = p * r + 1.167_699_9e-1;
    p = p * r - 1.242_014_1e-1;
    p = p * r + 1.424_932_3e-1;
    p = p * r - 1.666_805_8e-1;
    p = p * r + 2.000_071_5e-1;
    p = p * r - 2.499_999_4e-1;
    p = p * r + 3.333_333e-1;
    let square = r * r;
    let tail = p * r * square + n * LN_2_LOW - 0.5 * square;
    let ln = r + tail + n * LN_2_HIGH;
    if x >= f32::MIN_POSITIVE { ln } else { f32::NAN }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum in [`LANES`] lanes.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for block in blocks {
        for i in 0..LANES {
            lanes[i] += block[i];
        }
    }
    rest.iter().fold(fold(lanes, |a, b| a + b), |sum, x| sum + x)
}

/// tanh(x) to 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
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

/// Rounds x to whole numbers of -127..=127 in `out` (as long as `x`; what lies beyond is set to 0) and returns what one is
/// worth, so that every rounded value is an f32 and rounds to itself.
#[inline(always)]
pub fn quantize(x: &[f32], out: &mut [i8]) -> f32 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut most = [0.0f32; LANES];
    for block in blocks {
        for i in 0..LANES {
            most[i] = larger(block[i].abs(), most[i]);
        }
    }
    let most = rest.iter().fold(fold(most, larger), |most, x| larger(x.abs(), most));
    let factor = factor(most);
    let (out, padding) = out.split_at_mut(x.len());
    for (q, &x) in out.iter_mut().zip(x) {
        *q = whole(x * factor);
    }
    if !padding.is_empty() {
        padding.fill(0);
    }
    unit(most)
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

/// The specification of [`Sums`] and [`WholeSums`].
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
    let scale = 1.0 / exponentials(scores, ring.filled);
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

/// Turns scores (whole lines) into e^(score - the largest), 0 from `filled` on; returns their sum.
#[inline(always)]
fn exponentials(scores: &mut [f32], filled: usize) -> f32 {
    scores[filled..].fill(MASKED);
    let mut most = [MASKED; LANES];
    let (blocks, _) = scores.as_chunks_mut::<LANES>();
    for block in &*blocks {
        for i in 0..LANES {
            most[i] = larger(block[i], most[i]);
        }
    }
    let most = fold(most, larger);
    let mut sums = [0.0; LANES];
    for block in blocks {
        for i in 0..LANES {
            block[i] = exp(block[i] - most);
            sums[i] += block[i];
        }
    }
    fold(sums, |a, b| a + b)
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
    for panel in &w.panels {
        let lines = &w.lines[panel.at..panel.at + w.n_in * panel.vectors];
        for ((x, &scale), out) in x.chunks_exact(w.n_in).zip(row_scales).zip(out.chunks_exact_mut(w.n_out)) {
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

/// The sum of whole numbers that matrices and attention are made of: exact, so every order of it is the same.
pub trait WholeSums {
    /// Most rows that one call takes, and most vectors of outputs for all of its rows together: as there are registers.
    const ROWS: usize;
    const SUMS: usize;

    /// `sums[m][v][lane] = sum_k rows[m][k] w[k][v][lane]`: four k side by side in a line, `stride` lines from group to group.
    /// `offsets`: `-128 sum_k w[k][v][lane]`, for instructions that take unsigned rows.
    fn sum<const V: usize, const M: usize>(
        lines: &[LineI8],
        stride: usize,
        rows: [&[[i8; 4]]; M],
        offsets: &[i32],
        sums: &mut [[[i32; LANES]; V]; M],
    );

    /// `sums[i] * (scales[i] * row_scale)`
    #[inline(always)]
    fn scale(sums: &[i32; LANES], scales: &[f32; LANES], row_scale: f32) -> [f32; LANES] {
        std::array::from_fn(|i| sums[i] as f32 * (scales[i] * row_scale))
    }
}

impl WholeSums for Plain {
    const ROWS: usize = 1;
    const SUMS: usize = MAX_VECTORS;

    #[inline(always)]
    fn sum<const V: usize, const M: usize>(
        lines: &[LineI8],
        stride: usize,
        rows: [&[[i8; 4]]; M],
        _: &[i32],
        sums: &mut [[[i32; LANES]; V]; M],
    ) {
        *sums = [[[0; LANES]; V]; M];
        for (row, sums) in rows.iter().zip(sums) {
            for (a, lines) in row.iter().zip(lines.chunks(stride)) {
                for (sums, line) in sums.iter_mut().zip(lines) {
                    for (sum, w) in sums.iter_mut().zip(line.0.as_chunks::<4>().0) {
                        *sum += (0..4).map(|t| i32::from(a[t]) * i32::from(w[t])).sum::<i32>();
                    }
                }
            }
        }
    }
}

/// Where [`whole_sums`] leaves its results.
trait Take {
    /// Sums of a row, of the vectors from `first` on.
    fn take<S: WholeSums, const V: usize>(&mut self, row: usize, first: usize, sums: &[[i32; LANES]; V]);
}

/// All sums over `stride` vectors of outputs or the first `vectors` of them.
#[inline(always)]
fn whole_sums<S: WholeSums, const M: usize>(
    lines: &[LineI8],
    stride: usize,
    vectors: usize,
    rows: [&[[i8; 4]]; M],
    offsets: &[i32],
    mut results: impl Take,
) {
    let mut at = 0;
    while at < vectors {
        let (lines, offsets) = (&lines[at..], &offsets[at * LANES..]);
        macro_rules! take {
            ($n:literal) => {{
                let mut sums = [[[0; LANES]; $n]; M];
                S::sum::<$n, M>(lines, stride, rows, offsets, &mut sums);
                for (m, sums) in sums.iter().enumerate() {
                    results.take::<S, $n>(m, at, sums);
                }
                at += $n;
            }};
        }
        match (vectors - at).min(S::SUMS / M) {
            1 => take!(1),
            2 => take!(2),
            3 => take!(3),
            4 => take!(4),
            5 => take!(5),
            _ => take!(6),
        }
    }
}

/// `out[row, lane] = row_scales[row] * scales[lane] * sum` as far as rows are `width` wide, `row_stride` from row to row; scales are
/// whole lines.
struct Scaled<'a> {
    scales: &'a [f32],
    row_scales: &'a [f32],
    out: &'a mut [f32],
    width: usize,
    row_stride: usize,
}

impl Take for Scaled<'_> {
    #[inline(always)]
    fn take<S: WholeSums, const V: usize>(&mut self, row: usize, first: usize, sums: &[[i32; LANES]; V]) {
        let row_scale = self.row_scales[row];
        let out = &mut self.out[row * self.row_stride..][first * LANES..self.width];
        let scales = &self.scales.as_chunks::<LANES>().0[first..];
        if let (Some(out), Some(scales)) = (out.as_chunks_mut().0.first_chunk_mut::<V>(), scales.first_chunk::<V>()) {
            // Sums stay in registers.
            for v in 0..V {
                out[v] = S::scale(&sums[v], &scales[v], row_scale);
            }
            return;
        }
        for ((sums, scales), out) in sums.iter().zip(scales).zip(out.chunks_mut(LANES)) {
            let scaled = S::scale(sums, scales, row_scale);
            out.iter_mut().zip(scaled).for_each(|(out, scaled)| *out = scaled);
        }
    }
}

/// `out[lane] += row_scales[row] * sum`.
struct Added<'a> {
    row_scales: [f32; 2],
    out: &'a mut [f32],
}

impl Take for Added<'_> {
    #[inline(always)]
    fn take<S: WholeSums, const V: usize>(&mut self, row: usize, first: usize, sums: &[[i32; LANES]; V]) {
        let scale = self.row_scales[row];
        let out = &mut self.out[first * LANES..];
        if let Some(out) = out.as_chunks_mut::<LANES>().0.first_chunk_mut::<V>() {
            for v in 0..V {
                let added = S::scale(&sums[v], &[1.0; LANES], scale);
                (0..LANES).for_each(|i| out[v][i] += added[i]);
            }
            return;
        }
        for (sums, out) in sums.iter().zip(out.chunks_mut(LANES)) {
            let added = S::scale(sums, &[1.0; LANES], scale);
            out.iter_mut().zip(added).for_each(|(out, added)| *out += added);
        }
    }
}

/// `out[r, j] = row_scales[r] * scales[j] * sum_k a[r, k] w[k, j]`, a `[rows, 4 * groups]`, out `[rows, n_out]`.
#[inline(always)]
pub fn gemm_i8<S: WholeSums>(w: &PanelsI8, a: &[i8], row_scales: &[f32], out: &mut [f32]) {
    // All rows take a panel before the next one comes: it is read from far away once.
    for panel in &w.panels {
        let mut r = 0;
        while r < row_scales.len() {
            r += match row_scales.len() - r {
                4.. if S::ROWS >= 4 => gemm_i8_rows::<S, 4>(w, panel, a, row_scales, r, out),
                2.. if S::ROWS >= 2 => gemm_i8_rows::<S, 2>(w, panel, a, row_scales, r, out),
                _ => gemm_i8_rows::<S, 1>(w, panel, a, row_scales, r, out),
            };
        }
    }
}

/// [`gemm_i8`] for one panel and the rows `r..r + M`; returns M.
#[inline(always)]
fn gemm_i8_rows<S: WholeSums, const M: usize>(
    w: &PanelsI8,
    panel: &Panel,
    a: &[i8],
    row_scales: &[f32],
    r: usize,
    out: &mut [f32],
) -> usize {
    let lines = &w.lines[panel.at..panel.at + w.groups * panel.vectors];
    let depth = 4 * w.groups;
    let rows = std::array::from_fn(|m| a[(r + m) * depth..(r + m + 1) * depth].as_chunks::<4>().0);
    let results = Scaled {
        scales: &w.scales[panel.first..],
        row_scales: &row_scales[r..],
        out: &mut out[r * w.n_out + panel.first..],
        width: w.n_out - panel.first,
        row_stride: w.n_out,
    };
    whole_sums::<S, M>(lines, panel.vectors, panel.vectors, rows, &w.offsets[panel.first..], results);
    M
}

/// Where [`attend_i8`] finds the rings of all heads, in whole numbers with a scale per slot: keys `[n_heads, head_dim / 4, stride]`
/// lines of [`LANES`] slots, values `[n_heads, slots / 4, value_stride]` lines of [`LANES`] features. Padding and slots that hold
/// no position are 0. Offsets: see [`WholeSums::sum`].
#[derive(Clone, Copy)]
pub struct RingsI8<'a> {
    pub keys: &'a [LineI8],
    /// Per slot, `[stride * LANES]`.
    pub key_scales: &'a [f32],
    /// Per slot, `[n_heads, stride * LANES]`.
    pub key_offsets: &'a [i32],
    pub values: &'a [LineI8],
    /// Per slot, `[stride * LANES]`.
    pub value_scales: &'a [f32],
    /// Per feature, `[n_heads, value_stride * LANES]`.
    pub value_offsets: &'a [i32],
    pub stride: usize,
    pub value_stride: usize,
    /// Slots that hold a position: the first so many.
    pub filled: usize,
}

/// Values of a digit of attention's weights, of which each has two.
const DIGIT: u32 = 128;

/// As [`attend`] for all heads in whole numbers: queries `[n_heads, head_dim]` that [`quantize`] has rounded (each padded to whole
/// groups of four) and what one of them is worth; weights of the softmax are rounded to `DIGIT`^2 steps of the largest. Per head,
/// `scores` has room for `stride` lines and `digits` for two rows of as many.
#[inline(always)]
pub fn attend_i8<S: WholeSums>(
    q: &[i8],
    q_scale: f32,
    rings: RingsI8,
    scores: &mut [f32],
    digits: &mut [i8],
    out: &mut [f32],
) {
    let RingsI8 { stride, value_stride, filled, .. } = rings;
    let n_heads = rings.key_offsets.len() / (stride * LANES);
    let used = filled.div_ceil(LANES);
    let width = used * LANES;
    // Head after head in each of three passes, so that none waits for the results of another.
    let queries = q.chunks_exact(q.len() / n_heads);
    let keys = rings.keys.chunks_exact(rings.keys.len() / n_heads).zip(rings.key_offsets.chunks_exact(stride * LANES));
    for ((q, (keys, offsets)), scores) in queries.zip(keys).zip(scores.chunks_exact_mut(width)) {
        let results =
            Scaled { scales: rings.key_scales, row_scales: &[q_scale], out: scores, width, row_stride: width };
        whole_sums::<S, 1>(keys, stride, used, [q.as_chunks().0], offsets, results);
    }
    let rows = scores.chunks_exact_mut(width).zip(digits.chunks_exact_mut(2 * width)).take(n_heads);
    for (scores, digits) in rows {
        // The first score's place is free once all are digits.
        scores[0] = weights_in_digits(scores, filled, rings.value_scales, digits);
    }
    let values = rings.values.chunks_exact(rings.values.len() / n_heads);
    let values = values.zip(rings.value_offsets.chunks_exact(value_stride * LANES));
    let weights = scores.chunks_exact(width).zip(digits.chunks_exact(2 * width));
    let head_dim = out.len() / n_heads;
    for (((values, offsets), (scores, digits)), out) in values.zip(weights).zip(out.chunks_exact_mut(head_dim)) {
        let (high, low) = digits.split_at(width);
        let n_groups = filled.div_ceil(4);
        let rows = [&high.as_chunks().0[..n_groups], &low.as_chunks().0[..n_groups]];
        out.fill(0.0);
        let results = Added { row_scales: [scores[0] * DIGIT as f32, scores[0]], out };
        whole_sums::<S, 2>(values, value_stride, head_dim.div_ceil(LANES), rows, offsets, results);
    }
}

/// Turns scores (whole lines, the first `filled` of them valid) into the softmax's weights, each multiplied with its value's
/// scale, in two rows of digits; returns what a step of them is worth.
#[inline(always)]
fn weights_in_digits(scores: &mut [f32], filled: usize, value_scales: &[f32], digits: &mut [i8]) -> f32 {
    const STEPS: f32 = (DIGIT * DIGIT - 1) as f32;
    let total = exponentials(scores, filled);
    let mut most = [0.0f32; LANES];
    let (blocks, _) = scores.as_chunks_mut::<LANES>();
    for (block, scales) in blocks.iter_mut().zip(value_scales.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            block[i] *= scales[i];
            most[i] = larger(block[i], most[i]);
        }
    }
    let most = fold(most, larger);
    let factor = if most > SMALLEST { STEPS / most } else { 0.0 };
    let (high, low) = digits.split_at_mut(scores.len());
    let lines = high.as_chunks_mut::<LANES>().0.iter_mut().zip(low.as_chunks_mut::<LANES>().0);
    for (scores, (high, low)) in scores.as_chunks::<LANES>().0.iter().zip(lines) {
        let steps: [u32; LANES] = std::array::from_fn(|i| (scores[i] * factor + ROUNDING).to_bits());
        *high = std::array::from_fn(|i| (steps[i] / DIGIT % DIGIT) as i8);
        *low = std::array::from_fn(|i| (steps[i] % DIGIT) as i8);
    }
    most / (STEPS * total)
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
    fn ln_is_exact_to_a_few_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in 0..200_000u32 {
            let x = f32::from_bits(0x0080_0000 + i * 10_000);
            let exact = f64::from(x).ln();
            worst = worst.max((f64::from(ln(x)) - exact).abs() / exact.abs().max(0.1));
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert!([0.0, -1.0, f32::NAN].into_iter().all(|x| ln(x).is_nan()));
    }

    #[test]
    fn exp_is_exact_to_a_few_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 4e-7, "exp({x})");
        }
        assert!(exp(-1e30) < 1.7e-38 && exp(1e30).is_finite());
        for i in -3000..3000 {
            let x = i as f32 / 100.0;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2e-7, "tanh({x})");
        }
        assert_eq!((tanh(-1e30), tanh(0.0), tanh(1e30)), (-1.0, 0.0, 1.0));
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
