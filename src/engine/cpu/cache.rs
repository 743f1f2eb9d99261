//! Ring caches of attention: keys and values of the last positions of a stream, laid out for the kernels, in the engine's precision.

use super::Precision;
use super::linear::sized;
use super::stack::StackShape;
use crate::engine::state::SavedCache;
use crate::simd::Kernels;
use crate::simd::panels::{GROUP, LANES, LineF32, LineI8};
use crate::simd::portable::{Ring, RingsI8};

/// Keys and values of one block.
#[derive(Clone)]
pub struct Cache {
    shape: StackShape,
    store: Store,
}

#[derive(Clone)]
enum Store {
    F32(CacheF32),
    I8(CacheI8),
}

/// In lines: keys `[n_heads, head_dim, stride]`, slots beside each other; values `[n_heads, window, value_stride]`, features
/// beside each other.
#[derive(Clone)]
struct CacheF32 {
    keys: Vec<LineF32>,
    values: Vec<LineF32>,
}

/// In whole numbers with a scale per slot for all heads: keys `[n_heads, head_dim / 4, stride]`, values `[n_heads, window / 4,
/// value_stride]`; [`RingsI8`] has the layout.
#[derive(Clone)]
struct CacheI8 {
    keys: Vec<LineI8>,
    key_scales: Vec<f32>,
    /// `[n_heads, slots]`
    key_offsets: Vec<i32>,
    values: Vec<LineI8>,
    value_scales: Vec<f32>,
    /// `[n_heads, features]`
    value_offsets: Vec<i32>,
}

/// Room for attention.
#[derive(Default)]
pub struct CacheWork {
    scores: Vec<f32>,
    digits: Vec<i8>,
    rounded: Vec<i8>,
    q: Vec<i8>,
}

/// Lines from feature to feature of the keys, and from slot to slot (or group of slots) of the values.
fn strides(shape: StackShape) -> (usize, usize) {
    (shape.window.div_ceil(LANES), shape.head_dim().div_ceil(LANES))
}

impl Cache {
    pub fn new(shape: StackShape, precision: Precision) -> Self {
        let (stride, value_stride) = strides(shape);
        let (n_heads, head_dim) = (shape.n_heads, shape.head_dim());
        let store = match precision {
            Precision::F32 => Store::F32(CacheF32 {
                keys: vec![LineF32::ZERO; n_heads * head_dim * stride],
                values: vec![LineF32::ZERO; n_heads * shape.window * value_stride],
            }),
            Precision::Int8 => Store::I8(CacheI8 {
                keys: vec![LineI8::ZERO; n_heads * head_dim.div_ceil(GROUP) * stride],
                key_scales: vec![0.0; stride * LANES],
                key_offsets: vec![0; n_heads * stride * LANES],
                values: vec![LineI8::ZERO; n_heads * shape.window.div_ceil(GROUP) * value_stride],
                value_scales: vec![0.0; stride * LANES],
                value_offsets: vec![0; n_heads * value_stride * LANES],
            }),
        };
        Self { shape, store }
    }

    /// Keys and values `[n_heads, head_dim]` of the position that takes `slot`.
    pub fn write(&mut self, kernels: &Kernels, slot: usize, keys: &[f32], values: &[f32], work: &mut CacheWork) {
        let (stride, value_stride) = strides(self.shape);
        let head_dim = self.shape.head_dim();
        match &mut self.store {
            Store::F32(cache) => {
                for (key, ring) in keys.iter().zip(cache.keys.chunks_exact_mut(stride)) {
                    ring[slot / LANES].0[slot % LANES] = *key;
                }
                let rings = cache.values.chunks_exact_mut(self.shape.window * value_stride);
                for (value, ring) in values.chunks_exact(head_dim).zip(rings) {
                    for (line, value) in ring[slot * value_stride..].iter_mut().zip(value.chunks(LANES)) {
                        line.0[..value.len()].copy_from_slice(value);
                    }
                }
            }
            Store::I8(cache) => {
                let rounded = &mut work.rounded;
                rounded.resize(keys.len(), 0);
                cache.key_scales[slot] = (kernels.quantize)(keys, rounded);
                let rings = cache.keys.chunks_exact_mut(head_dim.div_ceil(GROUP) * stride);
                let offsets = cache.key_offsets.chunks_exact_mut(stride * LANES);
                for ((key, ring), offsets) in rounded.chunks_exact(head_dim).zip(rings).zip(offsets) {
                    offsets[slot] = -128 * key.iter().map(|&k| i32::from(k)).sum::<i32>();
                    let (groups, rest) = key.as_chunks::<GROUP>();
                    let mut lines = ring.chunks_exact_mut(stride).map(|lines| &mut lines[slot / LANES].0);
                    for (group, line) in groups.iter().zip(&mut lines) {
                        line.as_chunks_mut::<GROUP>().0[slot % LANES] = *group;
                    }
                    if let Some(line) = lines.next() {
                        line[slot % LANES * GROUP..][..rest.len()].copy_from_slice(rest);
                    }
                }
                cache.value_scales[slot] = (kernels.quantize)(values, rounded);
                let rings = cache.values.chunks_exact_mut(self.shape.window.div_ceil(GROUP) * value_stride);
                let offsets = cache.value_offsets.chunks_exact_mut(value_stride * LANES);
                for ((value, ring), offsets) in rounded.chunks_exact(head_dim).zip(rings).zip(offsets) {
                    let lines = ring[slot / GROUP * value_stride..].iter_mut();
                    for ((value, line), offsets) in value.chunks(LANES).zip(lines).zip(offsets.chunks_mut(LANES)) {
                        let lanes = line.0.as_chunks_mut::<GROUP>().0;
                        for ((lane, &new), offset) in lanes.iter_mut().zip(value).zip(offsets) {
                            let old = std::mem::replace(&mut lane[slot % GROUP], new);
                            *offset += 128 * (i32::from(old) - i32::from(new));
                        }
                    }
                }
            }
        }
    }

    /// Softmax attention of `q` `[n_heads, head_dim]` (already divided by sqrt(head_dim)) over the first `filled` slots.
    pub fn attend(&self, kernels: &Kernels, q: &[f32], filled: usize, work: &mut CacheWork, out: &mut [f32]) {
        let (stride, value_stride) = strides(self.shape);
        let head_dim = self.shape.head_dim();
        let CacheWork { scores, digits, rounded, q: padded } = work;
        let scores = sized(scores, self.shape.n_heads * stride * LANES);
        match &self.store {
            Store::F32(cache) => {
                let rows = q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim));
                let values = cache.values.chunks_exact(self.shape.window * value_stride);
                let rings = cache.keys.chunks_exact(head_dim * stride).zip(values);
                for ((q, out), (keys, values)) in rows.zip(rings) {
                    (kernels.attend)(q, Ring { keys, values, stride, value_stride, filled }, scores, out);
                }
            }
            Store::I8(cache) => {
                let n_heads = self.shape.n_heads;
                let depth = head_dim.next_multiple_of(GROUP);
                digits.resize(2 * n_heads * stride * LANES, 0);
                rounded.resize(q.len(), 0);
                let q_scale = (kernels.quantize)(q, rounded);
                padded.resize(n_heads * depth, 0);
                for (padded, q) in padded.chunks_exact_mut(depth).zip(rounded.chunks_exact(head_dim)) {
                    padded[..head_dim].copy_from_slice(q);
                    padded[head_dim..].fill(0);
                }
                let rings = RingsI8 {
                    keys: &cache.keys,
                    key_scales: &cache.key_scales,
                    key_offsets: &cache.key_offsets,
                    values: &cache.values,
                    value_scales: &cache.value_scales,
                    value_offsets: &cache.value_offsets,
                    stride,
                    value_stride,
                    filled,
                };
                (kernels.attend_i8)(padded, q_scale, rings, scores, digits, out);
            }
        }
    }

    /// In the engine-neutral layout, `[n_heads, window, head_dim]`.
    pub fn save(&self) -> SavedCache {
        let (stride, value_stride) = strides(self.shape);
        let (n_heads, window, head_dim) = (self.shape.n_heads, self.shape.window, self.shape.head_dim());
        let each = |at: &dyn Fn(usize, usize, usize) -> f32| -> Vec<f32> {
            let value = |i: usize| at(i / head_dim / window, i / head_dim % window, i % head_dim);
            (0..n_heads * window * head_dim).map(value).collect()
        };
        let (keys, values) = match &self.store {
            Store::F32(cache) => (
                each(&|h, slot, d| cache.keys[(h * head_dim + d) * stride + slot / LANES].0[slot % LANES]),
                each(&|h, slot, d| cache.values[(h * window + slot) * value_stride + d / LANES].0[d % LANES]),
            ),
            Store::I8(cache) => (
                each(&|h, slot, d| {
                    let line = &cache.keys[(h * head_dim.div_ceil(GROUP) + d / GROUP) * stride + slot / LANES];
                    f32::from(line.0[slot % LANES * GROUP + d % GROUP]) * cache.key_scales[slot]
                }),
                each(&|h, slot, d| {
                    let group = h * window.div_ceil(GROUP) + slot / GROUP;
                    let line = &cache.values[group * value_stride + d / LANES];
                    f32::from(line.0[d % LANES * GROUP + slot % GROUP]) * cache.value_scales[slot]
                }),
            ),
        };
        SavedCache { shape: [n_heads, window, head_dim], keys, values }
    }

    /// From a cache of this one's shape. Whole numbers that were saved come back as they were.
    pub fn restore(&mut self, kernels: &Kernels, saved: &SavedCache) {
        let row = self.shape.dim;
        let (window, head_dim) = (self.shape.window, self.shape.head_dim());
        let (mut keys, mut values) = (vec![0.0; row], vec![0.0; row]);
        let mut work = CacheWork::default();
        for slot in 0..window {
            for h in 0..self.shape.n_heads {
                let from = (h * window + slot) * head_dim;
                keys[h * head_dim..(h + 1) * head_dim].copy_from_slice(&saved.keys[from..from + head_dim]);
                values[h * head_dim..(h + 1) * head_dim].copy_from_slice(&saved.values[from..from + head_dim]);
            }
            self.write(kernels, slot, &keys, &values, &mut work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use proptest::prelude::*;

    fn filled(shape: StackShape, precision: Precision, n: usize, seed: u64) -> Cache {
        let (kernels, mut work, mut rng) = (Kernels::chosen(), CacheWork::default(), Rng::new(seed));
        let mut cache = Cache::new(shape, precision);
        for pos in 0..n {
            let mut row = || -> Vec<f32> { (0..shape.dim).map(|_| rng.normal()).collect() };
            let (keys, values) = (row(), row());
            cache.write(kernels, pos % shape.window, &keys, &values, &mut work);
        }
        cache
    }

    proptest! {
        #[test]
        fn a_cache_of_whole_numbers_attends_as_one_of_floats_does(
            n_heads in 1usize..4, half in 1usize..40, window in 1usize..80, n in 1usize..200, seed in 0u64..1000,
        ) {
            let shape = StackShape { dim: 2 * half * n_heads, n_layers: 1, n_heads, window };
            let attended = [Precision::F32, Precision::Int8].map(|precision| {
                let cache = filled(shape, precision, n, seed);
                let mut rng = Rng::new(seed + 1);
                let q: Vec<f32> = (0..shape.dim).map(|_| rng.normal() / (shape.head_dim() as f32).sqrt()).collect();
                let mut out = vec![9.0; shape.dim];
                cache.attend(Kernels::chosen(), &q, n.min(window), &mut CacheWork::default(), &mut out);
                out
            });
            for (exact, rounded) in attended[0].iter().zip(&attended[1]) {
                prop_assert!((exact - rounded).abs() < 0.08, "{exact} is {rounded}");
            }
        }

        #[test]
        fn a_saved_cache_comes_back_bit_for_bit(
            n_heads in 1usize..4, half in 1usize..40, window in 1usize..40, n in 0usize..100, seed in 0u64..1000,
        ) {
            let shape = StackShape { dim: 2 * half * n_heads, n_layers: 1, n_heads, window };
            for precision in [Precision::F32, Precision::Int8] {
                let cache = filled(shape, precision, n, seed);
                let mut other = filled(shape, precision, 17, seed + 1);
                other.restore(Kernels::chosen(), &cache.save());
                let (a, b) = (cache.save(), other.save());
                prop_assert_eq!((a.keys, a.values), (b.keys, b.values));
                if let (Store::I8(a), Store::I8(b)) = (&cache.store, &other.store) {
                    prop_assert_eq!((&a.key_scales, &a.value_scales), (&b.key_scales, &b.value_scales));
                    prop_assert_eq!((&a.key_offsets, &a.value_offsets), (&b.key_offsets, &b.value_offsets));
                }
            }
        }
    }
}
