//! Kernels for x86-64: the portable ones compiled for wider registers, and integer products written out.
//!
//! One of the crate's few files with `unsafe`: functions here need instructions that [`kernels`] has asked the CPU for.
#![allow(unsafe_code)]
// Registers are named by their numbers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::panels::{LANES, LineF32, LineI8, MAX_VECTORS, PanelsI8};
use super::portable::{self, Ring, Sums, chains};
use super::{Isa, Kernels, PanelsF32};

/// The kernels of `isa` if the CPU has all that they use.
pub fn kernels(isa: Isa) -> Option<&'static Kernels> {
    let avx2 = is_x86_feature_detected!("avx2");
    match isa {
        Isa::Avx2 if avx2 => Some(&avx2::KERNELS),
        Isa::AvxVnni if avx2 && is_x86_feature_detected!("avxvnni") => Some(&avxvnni::KERNELS),
        Isa::Avx512Vnni
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni") =>
        {
            Some(&avx512vnni::KERNELS)
        }
        _ => None,
    }
}

/// A module of the portable kernels compiled with `$features`, its `gemm_i8` made of `$tile`s of up to `$rows` rows.
macro_rules! kernels {
    ($module:ident, $isa:expr, $features:literal, $gemm_i8:ident, $sums:ident) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn gemm_f32(w: &PanelsF32, x: &[f32], scales: &[f32], out: &mut [f32]) {
                portable::gemm_f32::<$sums>(w, x, scales, out);
            }
            #[target_feature(enable = $features)]
            fn quantize(x: &[f32], out: &mut [i8]) -> f32 {
                portable::quantize(x, out)
            }
            #[target_feature(enable = $features)]
            fn inverse_rms(x: &[f32]) -> f32 {
                portable::inverse_rms(x)
            }
            #[target_feature(enable = $features)]
            fn silu(x: &mut [f32]) {
                portable::silu(x);
            }
            #[target_feature(enable = $features)]
            fn swiglu(up: &[f32], gated: &mut [f32]) {
                portable::swiglu(up, gated);
            }
            #[target_feature(enable = $features)]
            fn normalize_and_rotate(heads: &mut [f32], angles: &[f32], factor: f32) {
                portable::normalize_and_rotate(heads, angles, factor);
            }
            #[target_feature(enable = $features)]
            fn attend(q: &[f32], ring: Ring, scores: &mut [f32], out: &mut [f32]) {
                portable::attend::<$sums>(q, ring, scores, out);
            }
            #[target_feature(enable = $features)]
            fn dot(a: &[f32], b: &[f32]) -> f32 {
                portable::dot_f32(a, b)
            }
            #[target_feature(enable = $features)]
            fn levinson(
                r: &[f64],
                order: usize,
                falling: &mut [f64],
                forward: &mut [f64],
                backward: &mut [f64],
            ) -> f64 {
                portable::levinson(r, order, falling, forward, backward)
            }

            // SAFETY of every call below: `kernels` hands this table out only when the CPU has the features.
            pub static KERNELS: Kernels = Kernels {
                isa: $isa,
                gemm_i8: |w, a, scales, out| unsafe { $gemm_i8(w, a, scales, out) },
                gemm_f32: |w, x, scales, out| unsafe { gemm_f32(w, x, scales, out) },
                quantize: |x, out| unsafe { quantize(x, out) },
                inverse_rms: |x| unsafe { inverse_rms(x) },
                silu: |x| unsafe { silu(x) },
                swiglu: |up, gated| unsafe { swiglu(up, gated) },
                normalize_and_rotate: |heads, angles, factor| unsafe { normalize_and_rotate(heads, angles, factor) },
                attend: |q, ring, scores, out| unsafe { attend(q, ring, scores, out) },
                dot: |a, b| unsafe { dot(a, b) },
                levinson: |r, order, falling, forward, backward| unsafe {
                    levinson(r, order, falling, forward, backward)
                },
            };
        }
    };
}

kernels!(avx2, Isa::Avx2, "avx2", gemm_i8_avx2, Avx);
kernels!(avxvnni, Isa::AvxVnni, "avx2,avxvnni", gemm_i8_avxvnni, Avx);
kernels!(avx512vnni, Isa::Avx512Vnni, "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", gemm_i8_avx512vnni, Avx512);

/// [`Sums`] with the lanes of a line in `$parts` registers.
macro_rules! sums {
    ($name:ident, $parts:literal, $zero:ident, $splat:ident, $load:ident, $multiply:ident, $add:ident, $store:ident) => {
        /// Only used in functions compiled for its registers.
        struct $name;

        impl Sums for $name {
            #[inline(always)]
            fn sum<const V: usize>(weights: &[f32], rows: &[LineF32], stride: usize) -> [[f32; LANES]; V] {
                assert!(weights.is_empty() || rows.len() >= (weights.len() - 1) * stride + V);
                let mut out = [[0.0; LANES]; V];
                // SAFETY: the tables that name this type are handed out where the CPU has its registers, and the assertion
                // above keeps every row inside `rows`.
                unsafe {
                    let (mut even, mut odd) = ([[$zero(); $parts]; V], [[$zero(); $parts]; V]);
                    let mut row = rows.as_ptr().cast::<f32>();
                    let (pairs, rest) = weights.as_chunks::<2>();
                    for &[first, second] in pairs {
                        let (first, second) = ($splat(first), $splat(second));
                        for v in 0..V {
                            for part in 0..$parts {
                                let x = $load(row.add(v * LANES + part * LANES / $parts));
                                even[v][part] = $add(even[v][part], $multiply(first, x));
                            }
                        }
                        row = row.wrapping_add(stride * LANES);
                        let sums = if chains(V) == 2 { &mut odd } else { &mut even };
                        for v in 0..V {
                            for part in 0..$parts {
                                let x = $load(row.add(v * LANES + part * LANES / $parts));
                                sums[v][part] = $add(sums[v][part], $multiply(second, x));
                            }
                        }
                        row = row.wrapping_add(stride * LANES);
                    }
                    if let &[weight] = rest {
                        let weight = $splat(weight);
                        for v in 0..V {
                            for part in 0..$parts {
                                let x = $load(row.add(v * LANES + part * LANES / $parts));
                                even[v][part] = $add(even[v][part], $multiply(weight, x));
                            }
                        }
                    }
                    for v in 0..V {
                        for part in 0..$parts {
                            let sum = $add(even[v][part], odd[v][part]);
                            $store(out[v].as_mut_ptr().add(part * LANES / $parts), sum);
                        }
                    }
                }
                out
            }
        }
    };
}

sums!(Avx, 2, _mm256_setzero_ps, _mm256_set1_ps, _mm256_load_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_storeu_ps);
sums!(Avx512, 1, _mm512_setzero_ps, _mm512_set1_ps, _mm512_load_ps, _mm512_mul_ps, _mm512_add_ps, _mm512_storeu_ps);

/// The rows `r..r + M` of quantised inputs, each `4 * groups` long.
fn rows<const M: usize>(a: &[i8], depth: usize, r: usize) -> [&[[i8; 4]]; M] {
    std::array::from_fn(|i| a[(r + i) * depth..(r + i + 1) * depth].as_chunks::<4>().0)
}

/// Walks rows and panels: calls `$tile::<V, M>(lines, stride, groups, rows, first output)` for M rows and at most `$most` vectors.
macro_rules! gemm_i8 {
    ($name:ident, $features:literal, $tile:ident, $most:literal, [$($m:literal),*]) => {
        #[target_feature(enable = $features)]
        fn $name(w: &PanelsI8, a: &[i8], scales: &[f32], out: &mut [f32]) {
            let depth = 4 * w.groups;
            let mut r = 0;
            while r < scales.len() {
                $(
                    if scales.len() - r >= $m {
                        let rows = rows::<$m>(a, depth, r);
                        for panel in &w.panels {
                            let lines = &w.lines[panel.at..panel.at + w.groups * panel.vectors];
                            let mut v = 0;
                            while v < panel.vectors {
                                let first = panel.first + v * LANES;
                                let n = (panel.vectors - v).min($most);
                                let mut sums = [[[0i32; LANES]; MAX_VECTORS]; $m];
                                let offsets = &w.offsets[first..];
                                match n {
                                    1 => $tile::<1, $m>(&lines[v..], panel.vectors, rows, offsets, &mut sums),
                                    2 => $tile::<2, $m>(&lines[v..], panel.vectors, rows, offsets, &mut sums),
                                    3 => $tile::<3, $m>(&lines[v..], panel.vectors, rows, offsets, &mut sums),
                                    4 => $tile::<4, $m>(&lines[v..], panel.vectors, rows, offsets, &mut sums),
                                    5 => $tile::<5, $m>(&lines[v..], panel.vectors, rows, offsets, &mut sums),
                                    _ => $tile::<6, $m>(&lines[v..], panel.vectors, rows, offsets, &mut sums),
                                }
                                for (i, sums) in sums.iter().enumerate() {
                                    let out = &mut out[(r + i) * w.n_out..(r + i + 1) * w.n_out];
                                    portable::store_i8(w, first, &sums[..n], scales[r + i], out);
                                }
                                v += n;
                            }
                        }
                        r += $m;
                        continue;
                    }
                )*
            }
        }
    };
}

gemm_i8!(gemm_i8_avx2, "avx2", tile_avx2, 3, [1]);
gemm_i8!(gemm_i8_avxvnni, "avx2,avxvnni", tile_avxvnni, 3, [2, 1]);
gemm_i8!(gemm_i8_avx512vnni, "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", tile_avx512vnni, 6, [4, 1]);

/// Integer sums of V vectors of outputs for M rows: `sums[m][v][lane] = sum_k a[m][k] w[k, v, lane]`.
///
/// `vpmaddubsw` wants one side unsigned: |a| there and the sign of a on w. |a| |w| <= 127^2 twice stays below 2^15.
#[target_feature(enable = "avx2")]
fn tile_avx2<const V: usize, const M: usize>(
    lines: &[LineI8],
    stride: usize,
    rows: [&[[i8; 4]]; M],
    _: &[i32],
    sums: &mut [[[i32; LANES]; MAX_VECTORS]; M],
) {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[[_mm256_setzero_si256(); 2]; V]; M];
    for (g, lines) in lines.chunks(stride).enumerate() {
        for m in 0..M {
            let a = _mm256_set1_epi32(i32::from_le_bytes(rows[m][g].map(|x| x as u8)));
            let size = _mm256_abs_epi8(a);
            for v in 0..V {
                for half in 0..2 {
                    // SAFETY: a line is 64 bytes.
                    let w = unsafe { _mm256_load_si256(lines[v].0.as_ptr().add(32 * half).cast()) };
                    let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w, a));
                    acc[m][v][half] = _mm256_add_epi32(acc[m][v][half], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    for m in 0..M {
        for v in 0..V {
            for half in 0..2 {
                // SAFETY: 8 of the 16 lanes.
                unsafe { _mm256_storeu_si256(sums[m][v].as_mut_ptr().add(8 * half).cast(), acc[m][v][half]) };
            }
        }
    }
}

/// Flips the sign of four bytes: adds 128 to each.
const SIGNS: i32 = i32::from_le_bytes([0x80; 4]);

/// As [`tile_avx2`] with `vpdpbusd`, which wants a unsigned: a + 128, made good by starting from -128 sum(w).
#[target_feature(enable = "avx2,avxvnni")]
fn tile_avxvnni<const V: usize, const M: usize>(
    lines: &[LineI8],
    stride: usize,
    rows: [&[[i8; 4]]; M],
    offsets: &[i32],
    sums: &mut [[[i32; LANES]; MAX_VECTORS]; M],
) {
    let mut acc = [[[_mm256_setzero_si256(); 2]; V]; M];
    for row in &mut acc {
        for (v, acc) in row.iter_mut().enumerate() {
            for (half, acc) in acc.iter_mut().enumerate() {
                let from = &offsets[v * LANES + 8 * half..][..8];
                // SAFETY: 8 numbers.
                *acc = unsafe { _mm256_loadu_si256(from.as_ptr().cast()) };
            }
        }
    }
    for (g, lines) in lines.chunks(stride).enumerate() {
        for m in 0..M {
            let a = _mm256_set1_epi32(i32::from_le_bytes(rows[m][g].map(|x| x as u8)) ^ SIGNS);
            for v in 0..V {
                for half in 0..2 {
                    // SAFETY: a line is 64 bytes.
                    let w = unsafe { _mm256_load_si256(lines[v].0.as_ptr().add(32 * half).cast()) };
                    acc[m][v][half] = _mm256_dpbusd_avx_epi32(acc[m][v][half], a, w);
                }
            }
        }
    }
    for m in 0..M {
        for v in 0..V {
            for half in 0..2 {
                // SAFETY: 8 of the 16 lanes.
                unsafe { _mm256_storeu_si256(sums[m][v].as_mut_ptr().add(8 * half).cast(), acc[m][v][half]) };
            }
        }
    }
}

/// As [`tile_avxvnni`], 16 lanes at a time.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile_avx512vnni<const V: usize, const M: usize>(
    lines: &[LineI8],
    stride: usize,
    rows: [&[[i8; 4]]; M],
    offsets: &[i32],
    sums: &mut [[[i32; LANES]; MAX_VECTORS]; M],
) {
    let mut acc = [[_mm512_setzero_si512(); V]; M];
    for row in &mut acc {
        for (v, acc) in row.iter_mut().enumerate() {
            let from = &offsets[v * LANES..][..LANES];
            // SAFETY: 16 numbers.
            *acc = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
        }
    }
    for (g, lines) in lines.chunks(stride).enumerate() {
        let mut a = [_mm512_setzero_si512(); M];
        for m in 0..M {
            a[m] = _mm512_set1_epi32(i32::from_le_bytes(rows[m][g].map(|x| x as u8)) ^ SIGNS);
        }
        for v in 0..V {
            // SAFETY: a line is 64 bytes.
            let w = unsafe { _mm512_load_si512(lines[v].0.as_ptr().cast()) };
            for m in 0..M {
                acc[m][v] = _mm512_dpbusd_epi32(acc[m][v], a[m], w);
            }
        }
    }
    for m in 0..M {
        for v in 0..V {
            // SAFETY: 16 lanes.
            unsafe { _mm512_storeu_si512(sums[m][v].as_mut_ptr().cast(), acc[m][v]) };
        }
    }
}
