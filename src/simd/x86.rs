//! Kernels for x86-64: the portable ones compiled for wider registers, and integer products written out.
//!
//! One of the crate's few files with `unsafe`: functions here need instructions that [`kernels`] has asked the CPU for.
#![allow(unsafe_code)]
// Registers are named by their numbers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::panels::{LANES, LineF32, LineI8, PanelsI8};
use super::portable::{self, Ring, RingsI8, Sums, WholeSums, chains};
use super::{Isa, Kernels, Loop, PanelsF32};

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

/// Runs a loop compiled for the registers of `isa`, which is [`Isa::chosen`].
pub(super) fn run<L: Loop>(isa: Isa, task: L) -> L::Out {
    #[target_feature(enable = "avx2")]
    fn avx2<L: Loop>(task: L) -> L::Out {
        task.run()
    }
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512<L: Loop>(task: L) -> L::Out {
        task.run()
    }
    // SAFETY: only sets that `kernels` has found on this CPU are ever chosen.
    match isa {
        Isa::Avx512Vnni => unsafe { avx512(task) },
        Isa::Avx2 | Isa::AvxVnni => unsafe { avx2(task) },
        _ => task.run(),
    }
}

/// A module of the portable kernels compiled with `$features`, on these sums.
macro_rules! kernels {
    ($module:ident, $isa:expr, $features:literal, $sums:ident, $whole_sums:ident) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn gemm_i8(w: &PanelsI8, a: &[i8], scales: &[f32], out: &mut [f32]) {
                portable::gemm_i8::<$whole_sums>(w, a, scales, out);
            }
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
            fn attend_i8(
                q: &[i8],
                q_scale: f32,
                rings: RingsI8,
                scores: &mut [f32],
                digits: &mut [i8],
                out: &mut [f32],
            ) {
                portable::attend_i8::<$whole_sums>(q, q_scale, rings, scores, digits, out);
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
                gemm_i8: |w, a, scales, out| unsafe { gemm_i8(w, a, scales, out) },
                gemm_f32: |w, x, scales, out| unsafe { gemm_f32(w, x, scales, out) },
                quantize: |x, out| unsafe { quantize(x, out) },
                inverse_rms: |x| unsafe { inverse_rms(x) },
                silu: |x| unsafe { silu(x) },
                swiglu: |up, gated| unsafe { swiglu(up, gated) },
                normalize_and_rotate: |heads, angles, factor| unsafe { normalize_and_rotate(heads, angles, factor) },
                attend: |q, ring, scores, out| unsafe { attend(q, ring, scores, out) },
                attend_i8: |q, q_scale, rings, scores, digits, out| unsafe {
                    attend_i8(q, q_scale, rings, scores, digits, out)
                },
                dot: |a, b| unsafe { dot(a, b) },
                levinson: |r, order, falling, forward, backward| unsafe {
                    levinson(r, order, falling, forward, backward)
                },
            };
        }
    };
}

kernels!(avx2, Isa::Avx2, "avx2", Avx, Avx);
kernels!(avxvnni, Isa::AvxVnni, "avx2,avxvnni", Avx, AvxVnni);
kernels!(avx512vnni, Isa::Avx512Vnni, "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", Avx512, Avx512);

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

/// Flips the sign of four bytes: adds 128 to each.
const SIGNS: i32 = i32::from_le_bytes([0x80; 4]);

/// `sum + a . w` by fours. `vpmaddubsw` wants one side unsigned: |a| there and the sign of a on w; |a| |w| <= 127^2 twice
/// stays below 2^15.
macro_rules! add_products_avx2 {
    ($sum:expr, $a:expr, $w:expr) => {{
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8($a), _mm256_sign_epi8($w, $a));
        _mm256_add_epi32($sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }};
}

/// [`WholeSums`] on 256-bit registers, two to a vector. `$offset` says whether sums start from the offsets and inputs have 128
/// added: `vpdpbusd` wants them unsigned.
macro_rules! whole_sums_256 {
    ($name:ident, $rows:literal, $offset:literal, $add:ident) => {
        impl WholeSums for $name {
            const ROWS: usize = $rows;
            const SUMS: usize = 6;

            #[inline(always)]
            fn sum<const V: usize, const M: usize>(
                lines: &[LineI8],
                stride: usize,
                rows: [&[[i8; 4]]; M],
                offsets: &[i32],
                sums: &mut [[[i32; LANES]; V]; M],
            ) {
                let n_groups = rows[0].len();
                assert!(n_groups == 0 || lines.len() >= (n_groups - 1) * stride + V);
                assert!(offsets.len() >= V * LANES && rows.iter().all(|row| row.len() == n_groups));
                // SAFETY: as for `Sums`; the assertions keep all reads inside.
                unsafe {
                    let mut acc = [[[_mm256_setzero_si256(); 2]; V]; M];
                    if $offset {
                        for m in 0..M {
                            for v in 0..V {
                                for half in 0..2 {
                                    acc[m][v][half] =
                                        _mm256_loadu_si256(offsets.as_ptr().add(v * LANES + 8 * half).cast());
                                }
                            }
                        }
                    }
                    let mut line = lines.as_ptr().cast::<__m256i>();
                    for g in 0..n_groups {
                        for m in 0..M {
                            let a = rows[m].get_unchecked(g).map(|x| x as u8);
                            let a = _mm256_set1_epi32(i32::from_le_bytes(a) ^ if $offset { SIGNS } else { 0 });
                            for v in 0..V {
                                for half in 0..2 {
                                    let w = _mm256_load_si256(line.add(2 * v + half));
                                    acc[m][v][half] = $add!(acc[m][v][half], a, w);
                                }
                            }
                        }
                        line = line.wrapping_add(2 * stride);
                    }
                    for m in 0..M {
                        for v in 0..V {
                            for half in 0..2 {
                                _mm256_storeu_si256(sums[m][v].as_mut_ptr().add(8 * half).cast(), acc[m][v][half]);
                            }
                        }
                    }
                }
            }

            #[inline(always)]
            fn scale(sums: &[i32; LANES], scales: &[f32; LANES], row_scale: f32) -> [f32; LANES] {
                let mut out = [0.0; LANES];
                // SAFETY: as for `Sums`; a line is two registers.
                unsafe {
                    for half in [0, LANES / 2] {
                        let scales =
                            _mm256_mul_ps(_mm256_loadu_ps(scales.as_ptr().add(half)), _mm256_set1_ps(row_scale));
                        let sums = _mm256_cvtepi32_ps(_mm256_loadu_si256(sums.as_ptr().add(half).cast()));
                        _mm256_storeu_ps(out.as_mut_ptr().add(half), _mm256_mul_ps(sums, scales));
                    }
                }
                out
            }
        }
    };
}

macro_rules! add_products_avxvnni {
    ($sum:expr, $a:expr, $w:expr) => {
        _mm256_dpbusd_avx_epi32($sum, $a, $w)
    };
}

/// Only used in functions compiled for its registers.
struct AvxVnni;

whole_sums_256!(Avx, 1, false, add_products_avx2);
whole_sums_256!(AvxVnni, 2, true, add_products_avxvnni);

impl WholeSums for Avx512 {
    const ROWS: usize = 4;
    const SUMS: usize = 24;

    #[inline(always)]
    fn sum<const V: usize, const M: usize>(
        lines: &[LineI8],
        stride: usize,
        rows: [&[[i8; 4]]; M],
        offsets: &[i32],
        sums: &mut [[[i32; LANES]; V]; M],
    ) {
        let n_groups = rows[0].len();
        assert!(n_groups == 0 || lines.len() >= (n_groups - 1) * stride + V);
        assert!(offsets.len() >= V * LANES && rows.iter().all(|row| row.len() == n_groups));
        // SAFETY: as for `Sums`; the assertions keep all reads inside.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); V]; M];
            for m in 0..M {
                for v in 0..V {
                    acc[m][v] = _mm512_loadu_si512(offsets.as_ptr().add(v * LANES).cast());
                }
            }
            let mut line = lines.as_ptr().cast::<__m512i>();
            for g in 0..n_groups {
                let mut a = [_mm512_setzero_si512(); M];
                for m in 0..M {
                    let inputs = rows[m].get_unchecked(g).map(|x| x as u8);
                    a[m] = _mm512_set1_epi32(i32::from_le_bytes(inputs) ^ SIGNS);
                }
                for v in 0..V {
                    let w = _mm512_load_si512(line.add(v));
                    for m in 0..M {
                        acc[m][v] = _mm512_dpbusd_epi32(acc[m][v], a[m], w);
                    }
                }
                line = line.wrapping_add(stride);
            }
            for m in 0..M {
                for v in 0..V {
                    _mm512_storeu_si512(sums[m][v].as_mut_ptr().cast(), acc[m][v]);
                }
            }
        }
    }

    #[inline(always)]
    fn scale(sums: &[i32; LANES], scales: &[f32; LANES], row_scale: f32) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: as for `Sums`; a line is one register.
        unsafe {
            let scales = _mm512_mul_ps(_mm512_loadu_ps(scales.as_ptr()), _mm512_set1_ps(row_scale));
            let sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.as_ptr().cast()));
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(sums, scales));
        }
        out
    }
}
