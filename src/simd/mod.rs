//! The inner loops of prediction and decoding, compiled for the instruction sets of the machine; which one is chosen at run time.
//!
//! All instruction sets give the same bits: see [`portable`], which is the specification of each kernel.

#[cfg(target_arch = "aarch64")]
mod neon;
pub mod panels;
pub mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use panels::{PanelsF32, PanelsI8};
use portable::{Plain, Ring, RingsI8};

/// Environment variable that forces an instruction set by name, for tests and reports.
pub const ISA_VARIABLE: &str = "WAVEGEN_ISA";

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What the compiler's baseline has; the specification.
    Scalar,
    /// x86-64 with AVX2.
    Avx2,
    /// AVX2 and the 256-bit dot products of AVX-VNNI.
    AvxVnni,
    /// AVX-512 (F, BW, DQ, VL) and its dot products (VNNI).
    Avx512Vnni,
    /// 64-bit ARM.
    Neon,
}

impl Isa {
    /// All there are, slowest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni];

    /// Those that this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|&isa| Kernels::of(isa).is_some()).collect()
    }

    /// The one to use: `WAVEGEN_ISA`'s where it names one that the machine has, else the fastest.
    pub fn chosen() -> Isa {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let available = Self::available();
            let forced = std::env::var(ISA_VARIABLE).ok().and_then(|name| Isa::from_name(&name));
            match forced.filter(|isa| available.contains(isa)) {
                Some(isa) => isa,
                None => available.last().copied().unwrap_or(Isa::Scalar),
            }
        })
    }

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Neon => "neon",
        }
    }

    /// The one of this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Isa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }
}

/// `(autocorrelation, order, room, forward coefficients, backward coefficients) -> residual power`
type Levinson = fn(&[f64], usize, &mut [f64], &mut [f64], &mut [f64]) -> f64;

/// `(rounded queries, what one of them is worth, rings, room for scores, room for digits, out)`
type AttendI8 = fn(&[i8], f32, RingsI8, &mut [f32], &mut [i8], &mut [f32]);

/// The kernels of one instruction set; [`portable`] says what each computes.
pub struct Kernels {
    pub isa: Isa,
    pub gemm_i8: fn(&PanelsI8, &[i8], &[f32], &mut [f32]),
    pub gemm_f32: fn(&PanelsF32, &[f32], &[f32], &mut [f32]),
    pub quantize: fn(&[f32], &mut [i8]) -> f32,
    pub inverse_rms: fn(&[f32]) -> f32,
    pub silu: fn(&mut [f32]),
    pub swiglu: fn(&[f32], &mut [f32]),
    pub normalize_and_rotate: fn(&mut [f32], &[f32], f32),
    pub attend: fn(&[f32], Ring, &mut [f32], &mut [f32]),
    pub attend_i8: AttendI8,
    pub dot: fn(&[f32], &[f32]) -> f32,
    pub levinson: Levinson,
}

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    gemm_i8: |w, a, scales, out| portable::gemm_i8::<Plain>(w, a, scales, out),
    gemm_f32: |w, x, scales, out| portable::gemm_f32::<Plain>(w, x, scales, out),
    quantize: |x, out| portable::quantize(x, out),
    inverse_rms: |x| portable::inverse_rms(x),
    silu: |x| portable::silu(x),
    swiglu: |up, gated| portable::swiglu(up, gated),
    normalize_and_rotate: |heads, angles, factor| portable::normalize_and_rotate(heads, angles, factor),
    attend: |q, ring, scores, out| portable::attend::<Plain>(q, ring, scores, out),
    attend_i8: |q, q_scale, rings, scores, digits, out| {
        portable::attend_i8::<Plain>(q, q_scale, rings, scores, digits, out)
    },
    dot: |a, b| portable::dot_f32(a, b),
    levinson: |r, order, falling, forward, backward| portable::levinson(r, order, falling, forward, backward),
};

impl Kernels {
    /// The kernels of `isa`, if this machine can run them.
    pub fn of(isa: Isa) -> Option<&'static Kernels> {
        match isa {
            Isa::Scalar => Some(&SCALAR),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni => x86::kernels(isa),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Some(&neon::KERNELS),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }

    /// Those of [`Isa::chosen`].
    pub fn chosen() -> &'static Kernels {
        Self::of(Isa::chosen()).unwrap_or(&SCALAR)
    }
}

/// A loop over plain slices that [`widest`] compiles for the machine's registers; `wide_loop` writes it.
pub trait Loop {
    type Out;

    /// To be marked `#[inline(always)]`, as all that it calls.
    fn run(self) -> Self::Out;
}

/// Runs a loop compiled for [`Isa::chosen`]. Sums without fixed lanes stay in order and nothing is fused, so every instruction set
/// gives the same bits.
pub fn widest<L: Loop>(task: L) -> L::Out {
    match set_of_loops() {
        #[cfg(target_arch = "x86_64")]
        isa @ (Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni) => x86::run(isa, task),
        _ => task.run(),
    }
}

#[cfg(not(test))]
fn set_of_loops() -> Isa {
    Isa::chosen()
}

/// [`Isa::chosen`], or what [`with_loops_of`] says.
#[cfg(test)]
fn set_of_loops() -> Isa {
    LOOPS_OF.get().unwrap_or_else(Isa::chosen)
}

#[cfg(test)]
thread_local! {
    static LOOPS_OF: std::cell::Cell<Option<Isa>> = const { std::cell::Cell::new(None) };
}

/// Calls `compute` with this thread's loops compiled for `isa`, one of [`Isa::available`].
#[cfg(test)]
pub(crate) fn with_loops_of<T>(isa: Isa, compute: impl FnOnce() -> T) -> T {
    LOOPS_OF.set(Some(isa).filter(|isa| Isa::available().contains(isa)));
    let result = compute();
    LOOPS_OF.set(None);
    result
}

/// Defines a function whose body is compiled for the machine's registers ([`widest`]). References in its arguments have the
/// lifetime `'a`.
macro_rules! wide_loop {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $vis fn $name<'a>($($arg: $type),*) {
            struct Task<'a>($($type,)* std::marker::PhantomData<&'a ()>);
            impl<'a> $crate::simd::Loop for Task<'a> {
                type Out = ();
                #[inline(always)]
                fn run(self) {
                    let Self($($arg,)* _) = self;
                    $body
                }
            }
            $crate::simd::widest(Task($($arg,)* std::marker::PhantomData));
        }
    };
}
pub(crate) use wide_loop;

#[cfg(test)]
mod tests {
    use super::panels::{GROUP, LANES, LineF32, LineI8};
    use super::*;
    use crate::rng::Rng;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..n).map(|_| rng.normal()).collect()
    }

    /// Every set but the specification itself.
    fn fast() -> Vec<&'static Kernels> {
        Isa::available().into_iter().skip(1).filter_map(Kernels::of).collect()
    }

    proptest! {
        #[test]
        fn integer_maps_are_exact_on_every_instruction_set_and_in_every_batch(
            n_in in 1usize..200, n_out in 1usize..300, rows in 1usize..10, seed in 0u64..1000,
        ) {
            let w = PanelsI8::pack(&numbers(n_in * n_out, seed), n_out);
            let x = numbers(n_in * rows, seed + 1);
            let mut a = vec![0i8; rows * 4 * w.groups];
            let scales: Vec<f32> = x.chunks(n_in).zip(a.chunks_mut(4 * w.groups))
                .map(|(x, a)| portable::quantize(x, a)).collect();
            let mut expected = vec![0.0; rows * n_out];
            for (r, row) in expected.chunks_mut(n_out).enumerate() {
                portable::gemm_i8::<Plain>(&w, &a[r * 4 * w.groups..][..4 * w.groups], &scales[r..=r], row);
            }
            for kernels in Isa::available().into_iter().filter_map(Kernels::of) {
                let mut out = vec![9.0; rows * n_out];
                (kernels.gemm_i8)(&w, &a, &scales, &mut out);
                prop_assert_eq!(&out, &expected, "{:?}", kernels.isa);
            }
        }

        #[test]
        fn float_kernels_are_the_same_bits_on_every_instruction_set(
            n in 1usize..300, n_out in 1usize..130, rows in 1usize..4, filled in 1usize..80, seed in 0u64..1000,
        ) {
            let (x, y) = (numbers(n * rows, seed), numbers(n * n_out, seed + 1));
            let w = PanelsF32::pack(&y, n_out);
            let run = |k: &Kernels| {
                let mut out = vec![vec![0.0; rows * n_out]];
                let row_scales = numbers(rows, seed + 2);
                (k.gemm_f32)(&w, &x, &row_scales, &mut out[0]);
                for (r, row) in out[0].chunks(n_out).enumerate() {
                    let mut alone = vec![0.0; n_out];
                    (k.gemm_f32)(&w, &x[r * n..(r + 1) * n], &row_scales[r..=r], &mut alone);
                    assert_eq!(row, alone, "row {r} of {rows}");
                }
                out.push(vec![(k.inverse_rms)(&x), (k.dot)(&x, &y)]);
                let mut q = vec![0; x.len() + 5];
                out.push(vec![(k.quantize)(&x, &mut q)]);
                out.push(q.iter().map(|&q| f32::from(q)).collect());
                out.push(x.clone());
                (k.silu)(&mut out[4]);
                let half = x.len() / 2;
                out.push(vec![0.0; half]);
                (k.swiglu)(&x[..2 * half], &mut out[5]);
                let head_dim = 2 * n.div_ceil(4);
                let mut heads = numbers(2 * head_dim, seed + 3);
                (k.normalize_and_rotate)(&mut heads, &numbers(head_dim, seed + 4), 0.3);
                let lines = |n: usize, seed: u64| -> Vec<LineF32> {
                    numbers(16 * n, seed).as_chunks::<16>().0.iter().map(|&line| LineF32(line)).collect()
                };
                let (stride, value_stride) = (5, head_dim.div_ceil(16));
                let (keys, values) = (lines(head_dim * stride, seed + 5), lines(80 * value_stride, seed + 6));
                let ring = Ring { keys: &keys, values: &values, stride, value_stride, filled };
                out.push(vec![0.0; head_dim]);
                (k.attend)(&heads[..head_dim], ring, &mut vec![0.0; 16 * stride], &mut out[6]);
                out.push(heads);
                let r: Vec<f64> = (0..n).map(|lag| f64::from(0.9f32.powi(lag as i32)) + if lag == 0 { 0.1 } else { 0.0 }).collect();
                let mut buffers = [vec![0.0; n], vec![0.0; n], vec![0.0; n]];
                let [falling, forward, backward] = &mut buffers;
                let power = (k.levinson)(&r, n - 1, falling, forward, backward);
                out.push(forward.iter().chain([&power]).map(|&x| x as f32).collect());
                out.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect::<Vec<Vec<u32>>>()
            };
            let expected = run(&SCALAR);
            for kernels in fast() {
                prop_assert_eq!(&run(kernels), &expected, "{:?}", kernels.isa);
            }
        }
    }

    proptest! {
        #[test]
        fn attention_in_whole_numbers_is_the_same_bits_on_every_instruction_set(
            n_heads in 1usize..4, head_dim in 1usize..100, window in 1usize..200, part in 0.0f64..1.0, seed in 0u64..1000,
        ) {
            let filled = 1 + (part * (window - 1) as f64) as usize;
            let (stride, value_stride) = (window.div_ceil(LANES), head_dim.div_ceil(LANES));
            let (key_groups, value_groups) = (head_dim.div_ceil(GROUP), window.div_ceil(GROUP));
            let mut keys = vec![LineI8::ZERO; n_heads * key_groups * stride];
            let mut values = vec![LineI8::ZERO; n_heads * value_groups * value_stride];
            let mut key_offsets = vec![0; n_heads * stride * LANES];
            let mut value_offsets = vec![0; n_heads * value_stride * LANES];
            let mut rng = Rng::new(seed);
            let mut whole = || (rng.uniform() * 254.9 - 127.0) as i8;
            for (h, slot, d) in (0..n_heads * filled * head_dim).map(|i| (i / filled / head_dim, i / head_dim % filled, i % head_dim)) {
                let (k, v) = (whole(), whole());
                keys[(h * key_groups + d / GROUP) * stride + slot / LANES].0[slot % LANES * GROUP + d % GROUP] = k;
                values[(h * value_groups + slot / GROUP) * value_stride + d / LANES].0[d % LANES * GROUP + slot % GROUP] = v;
                key_offsets[h * stride * LANES + slot] -= 128 * i32::from(k);
                value_offsets[h * value_stride * LANES + d] -= 128 * i32::from(v);
            }
            let scales = |seed| numbers(stride * LANES, seed).iter().map(|x| 0.01 + x.abs()).collect::<Vec<f32>>();
            let (key_scales, value_scales) = (scales(seed + 1), scales(seed + 2));
            let rings = RingsI8 {
                keys: &keys, key_scales: &key_scales, key_offsets: &key_offsets,
                values: &values, value_scales: &value_scales, value_offsets: &value_offsets,
                stride, value_stride, filled,
            };
            let mut q = vec![0; n_heads * head_dim.next_multiple_of(GROUP)];
            for (h, q) in q.chunks_exact_mut(head_dim.next_multiple_of(GROUP)).enumerate() {
                portable::quantize(&numbers(head_dim, seed + 3 + h as u64), q);
            }
            let run = |k: &Kernels| {
                let mut out = vec![9.0; n_heads * head_dim];
                let mut scores = vec![0.0; n_heads * stride * LANES];
                let mut digits = vec![0; 2 * n_heads * stride * LANES];
                (k.attend_i8)(&q, 1e-4, rings, &mut scores, &mut digits, &mut out);
                out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let expected = run(&SCALAR);
            for kernels in fast() {
                prop_assert_eq!(&run(kernels), &expected, "{:?}", kernels.isa);
            }
        }
    }

    #[test]
    fn the_largest_whole_numbers_do_not_saturate() {
        for (w, x) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
            let panels = PanelsI8::pack(&vec![w; 1000 * 33], 33);
            let mut a = vec![0; 1000];
            let scale = portable::quantize(&vec![x; 1000], &mut a);
            for kernels in Isa::available().into_iter().filter_map(Kernels::of) {
                let mut out = vec![0.0; 33];
                (kernels.gemm_i8)(&panels, &a, &[scale], &mut out);
                assert!(out.iter().all(|y| (y - 1000.0 * w * x).abs() < 2e-2), "{:?}: {out:?}", kernels.isa);
            }
        }
    }

    #[test]
    fn maps_multiply() {
        let (n_in, n_out) = (37, 21);
        let (w, x) = (numbers(n_in * n_out, 1), numbers(n_in, 2));
        let exact: Vec<f64> =
            (0..n_out).map(|j| (0..n_in).map(|k| f64::from(x[k]) * f64::from(w[k * n_out + j])).sum()).collect();
        let mut out = vec![0.0; n_out];
        portable::gemm_f32::<Plain>(&PanelsF32::pack(&w, n_out), &x, &[2.0], &mut out);
        assert!(out.iter().zip(&exact).all(|(y, e)| (f64::from(*y) - 2.0 * e).abs() < 1e-4));
        let panels = PanelsI8::pack(&w, n_out);
        let mut a = vec![0; 4 * panels.groups];
        let scale = portable::quantize(&x, &mut a);
        portable::gemm_i8::<Plain>(&panels, &a, &[scale], &mut out);
        assert!(out.iter().zip(&exact).all(|(y, e)| (f64::from(*y) - e).abs() < 0.25), "{out:?}, {exact:?}");
    }

    #[test]
    fn names_are_read_back() {
        for isa in Isa::ALL {
            assert_eq!(Isa::from_name(isa.name()), Some(isa));
        }
        assert_eq!(Isa::from_name("mmx"), None);
        assert_eq!(Isa::available()[0], Isa::Scalar);
    }
}
