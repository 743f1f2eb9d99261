//! The inner loops of a step on every instruction set of the machine, `scalar` (the specification) first; each checks its
//! result against it before it is timed.
//!
//! `cargo bench --bench kernels`; `cargo test` runs each once.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use wavegen::rng::Rng;
use wavegen::simd::panels::{GROUP, LANES, LineI8, PanelsF32, PanelsI8};
use wavegen::simd::portable::RingsI8;
use wavegen::simd::{Isa, Kernels};

fn main() {
    divan::main();
}

fn isas() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

fn kernels(isa: &str) -> &'static Kernels {
    Isa::from_name(isa).and_then(Kernels::of).expect("one of `isas`")
}

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.normal()).collect()
}

/// Times `run`, which leaves its result in a vector of `n`, after comparing the result with the scalar kernel's.
fn against_scalar(bencher: Bencher, isa: &str, n: usize, items: usize, mut run: impl FnMut(&Kernels, &mut [f32])) {
    let (measured, mut out, mut expected) = (kernels(isa), vec![9.0; n], vec![0.0; n]);
    run(measured, &mut out);
    run(kernels("scalar"), &mut expected);
    assert_eq!(out, expected, "{isa}");
    bencher.counter(ItemsCount::new(items)).bench_local(|| {
        run(black_box(measured), &mut out);
        black_box(&out);
    });
}

/// A matrix of a preset's block times one vector in 8 bits, its rounding included. Items: multiply-adds.
mod gemv_i8 {
    use super::*;

    fn gemv(bencher: Bencher, isa: &str, n_in: usize, n_out: usize, rows: usize) {
        let w = PanelsI8::pack(&numbers(n_in * n_out, 1), n_out);
        let x = numbers(rows * n_in, 2);
        let depth = GROUP * w.groups;
        let (mut a, mut scales) = (vec![0; rows * depth], vec![0.0; rows]);
        against_scalar(bencher, isa, rows * n_out, rows * n_in * n_out, |kernels, out| {
            for ((x, a), scale) in x.chunks(n_in).zip(a.chunks_mut(depth)).zip(&mut scales) {
                *scale = (kernels.quantize)(x, a);
            }
            (kernels.gemm_i8)(&w, &a, &scales, out);
        });
    }

    #[divan::bench(args = isas())]
    fn sample_tier_96_to_576(bencher: Bencher, isa: &str) {
        gemv(bencher, isa, 96, 576, 1);
    }

    #[divan::bench(args = isas())]
    fn middle_tier_192_to_1152(bencher: Bencher, isa: &str) {
        gemv(bencher, isa, 192, 1152, 1);
    }

    #[divan::bench(args = isas())]
    fn plan_384_to_2304(bencher: Bencher, isa: &str) {
        gemv(bencher, isa, 384, 2304, 1);
    }

    #[divan::bench(args = isas())]
    fn sample_tier_of_8_streams(bencher: Bencher, isa: &str) {
        gemv(bencher, isa, 96, 576, 8);
    }
}

/// The head's map in f32. Items: multiply-adds.
#[divan::bench(args = isas())]
fn gemv_f32_96_to_18(bencher: Bencher, isa: &str) {
    let w = PanelsF32::pack(&numbers(96 * 18, 1), 18);
    let x = numbers(96, 2);
    against_scalar(bencher, isa, 18, 96 * 18, |kernels, out| (kernels.gemm_f32)(&w, &x, &[1.0], out));
}

/// All heads over full rings, in 8 bits. Items: positions of a head.
mod attention_i8 {
    use super::*;

    fn attention(bencher: Bencher, isa: &str, n_heads: usize, head_dim: usize, window: usize) {
        let (stride, value_stride) = (window.div_ceil(LANES), head_dim.div_ceil(LANES));
        let mut rng = Rng::new(3);
        let mut lines = |n: usize| -> Vec<LineI8> {
            let mut whole = || (rng.uniform() * 254.9 - 127.0) as i8;
            (0..n).map(|_| LineI8(std::array::from_fn(|_| whole()))).collect()
        };
        let (keys, values) =
            (lines(n_heads * head_dim / GROUP * stride), lines(n_heads * window / GROUP * value_stride));
        let sums = |lines: &[LineI8], stride: usize| -> Vec<i32> {
            let of = |at: usize, lane: usize| -> i32 {
                let group = lines
                    .iter()
                    .skip(at)
                    .step_by(stride)
                    .flat_map(move |line| line.0[GROUP * lane..].iter().take(GROUP));
                -128 * group.map(|&x| i32::from(x)).sum::<i32>()
            };
            (0..stride * LANES).map(|i| of(i / LANES, i % LANES)).collect()
        };
        let heads = |lines: &[LineI8], stride: usize| -> Vec<i32> {
            lines.chunks_exact(lines.len() / n_heads).flat_map(|lines| sums(lines, stride)).collect()
        };
        let (key_offsets, value_offsets) = (heads(&keys, stride), heads(&values, value_stride));
        let scales: Vec<f32> = numbers(stride * LANES, 4).iter().map(|x| 0.01 + x.abs()).collect();
        let rings = RingsI8 {
            keys: &keys,
            key_scales: &scales,
            key_offsets: &key_offsets,
            values: &values,
            value_scales: &scales,
            value_offsets: &value_offsets,
            stride,
            value_stride,
            filled: window,
        };
        let q: Vec<i8> = (0..n_heads * head_dim).map(|i| (i * 37 % 255) as u8 as i8).collect();
        let (mut scores, mut digits) = (vec![0.0; n_heads * stride * LANES], vec![0; 2 * n_heads * stride * LANES]);
        against_scalar(bencher, isa, n_heads * head_dim, n_heads * window, |kernels, out| {
            (kernels.attend_i8)(&q, 1e-4, rings, &mut scores, &mut digits, out);
        });
    }

    #[divan::bench(args = isas())]
    fn sample_tier_2_of_48_by_32(bencher: Bencher, isa: &str) {
        attention(bencher, isa, 2, 48, 32);
    }

    #[divan::bench(args = isas())]
    fn middle_tier_5_of_32_by_128(bencher: Bencher, isa: &str) {
        attention(bencher, isa, 5, 32, 128);
    }

    #[divan::bench(args = isas())]
    fn plan_6_of_64_by_512(bencher: Bencher, isa: &str) {
        attention(bencher, isa, 6, 64, 512);
    }
}

/// A feed-forward's gate. Items: values.
#[divan::bench(args = isas())]
fn swiglu_288(bencher: Bencher, isa: &str) {
    let up = numbers(576, 1);
    against_scalar(bencher, isa, 288, 288, |kernels, out| (kernels.swiglu)(&up, out));
}
