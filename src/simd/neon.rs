//! Kernels for 64-bit ARM: the portable ones, whose loops the compiler turns into NEON, and integer products written out.
//!
//! One of the crate's few files with `unsafe`. Its tests pass in an emulator (qemu); never run on such a machine by its authors.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

use super::panels::{LANES, LineI8, MAX_VECTORS};
use super::portable::{self, Plain, WholeSums};
use super::{Isa, Kernels};

pub static KERNELS: Kernels = Kernels {
    isa: Isa::Neon,
    gemm_i8: |w, a, scales, out| portable::gemm_i8::<Neon>(w, a, scales, out),
    gemm_f32: |w, x, scales, out| portable::gemm_f32::<Plain>(w, x, scales, out),
    quantize: |x, out| portable::quantize(x, out),
    inverse_rms: |x| portable::inverse_rms(x),
    silu: |x| portable::silu(x),
    swiglu: |up, gated| portable::swiglu(up, gated),
    normalize_and_rotate: |heads, angles, factor| portable::normalize_and_rotate(heads, angles, factor),
    attend: |q, ring, scores, out| portable::attend::<Plain>(q, ring, scores, out),
    attend_i8: |q, q_scale, rings, scores, digits, out| {
        portable::attend_i8::<Neon>(q, q_scale, rings, scores, digits, out)
    },
    dot: |a, b| portable::dot_f32(a, b),
    levinson: |r, order, falling, forward, backward| portable::levinson(r, order, falling, forward, backward),
};

/// Whole sums on NEON registers.
struct Neon;

impl WholeSums for Neon {
    const ROWS: usize = 1;
    const SUMS: usize = MAX_VECTORS;

    /// Products of 8 bits in 16, two of which fit, then pairs of pairs in 32.
    #[inline(always)]
    fn sum<const V: usize, const M: usize>(
        lines: &[LineI8],
        stride: usize,
        rows: [&[[i8; 4]]; M],
        _: &[i32],
        sums: &mut [[[i32; LANES]; V]; M],
    ) {
        for (row, sums) in rows.into_iter().zip(sums) {
            for (v, sums) in sums.iter_mut().enumerate() {
                // SAFETY: NEON is part of the architecture; a line is 64 bytes, a row of sums 16 numbers.
                unsafe {
                    let mut acc = [vdupq_n_s32(0); 4];
                    for (a, line) in row.iter().zip(lines[v..].iter().step_by(stride)) {
                        let a = vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(a.map(|x| x as u8))));
                        for (part, acc) in acc.iter_mut().enumerate() {
                            let w = vld1q_s8(line.0.as_ptr().add(16 * part));
                            let low = vmull_s8(vget_low_s8(a), vget_low_s8(w));
                            let high = vmull_high_s8(a, w);
                            *acc = vpadalq_s16(*acc, vpaddq_s16(low, high));
                        }
                    }
                    for (part, acc) in acc.into_iter().enumerate() {
                        vst1q_s32(sums.as_mut_ptr().add(4 * part), acc);
                    }
                }
            }
        }
    }
}
