//! Every fused operation against its plain composition, results and gradients, and against finite differences.

use candle_core::{Device, Result, Tensor, Var};
use wavegen::codec::Codec;
use wavegen::codec::Quantizer::{self, Mulaw8, Pcm16};
use wavegen::model::head::Targets;
use wavegen::model::ops::{FUSED, Ops, PLAIN};
use wavegen::rng::Rng;

/// What is compared: an operation of some inputs, all of which want a gradient.
type Compute<'a> = &'a dyn Fn(&Ops, &[Tensor]) -> Result<Tensor>;

fn var(shape: &[usize], spread: f32, rng: &mut Rng) -> Var {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| spread * rng.normal()).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn codes(n: usize, below: usize, rng: &mut Rng) -> Vec<u32> {
    (0..n).map(|_| rng.below(below) as u32).collect()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn tensors(vars: &[Var]) -> Vec<Tensor> {
    vars.iter().map(|var| var.as_tensor().clone()).collect()
}

/// Fails where values are further apart than `tolerance` of the largest.
fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (flat(got), flat(expected));
    let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
        let apart = (a - b).abs();
        assert!(apart <= tolerance * largest, "{what}[{i}]: {a} for {b}, the largest is {largest}");
    }
}

/// The operation, the weighted sum of its results, and the gradients of this sum.
fn run(ops: &Ops, vars: &[Var], compute: Compute, seed: u64) -> (Tensor, Vec<Tensor>) {
    let y = compute(ops, &tensors(vars)).unwrap();
    let weights = var(y.dims(), 1.0, &mut Rng::new(seed));
    let gradients = (&y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    let all = vars.iter().map(|var| gradients.get(var.as_tensor()).expect("a gradient").clone()).collect();
    (y.detach(), all)
}

/// Compares results, gradients, and the slopes in random directions.
fn check(what: &str, vars: &[Var], compute: Compute) {
    let (y, gradients) = run(&FUSED, vars, compute, 77);
    let (expected, expected_gradients) = run(&PLAIN, vars, compute, 77);
    assert_close(&format!("{what}: results"), &y, &expected, 1e-5);
    for (i, (got, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
        assert!(flat(expected).iter().any(|&g| g != 0.0), "{what}: the gradient of input {i} is zero");
        assert_close(&format!("{what}: gradient of input {i}"), got, expected, 3e-5);
    }
    let weights = flat(var(y.dims(), 1.0, &mut Rng::new(77)).as_tensor());
    let sum_at = |vars: &[Tensor]| -> f64 {
        let y = flat(&compute(&FUSED, vars).unwrap());
        y.iter().zip(&weights).map(|(&y, &w)| f64::from(y) * f64::from(w)).sum()
    };
    let here = tensors(vars);
    for (i, gradient) in gradients.iter().enumerate() {
        // Uphill, so that the slope stands out of the rounding.
        let gradient = flat(gradient);
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let step = 2e-4 * (here[i].elem_count() as f64).sqrt().min(30.0);
        let moved = |by: f64| {
            let mut there = here.clone();
            let values = flat(&here[i]).iter().zip(&gradient).map(|(x, g)| x + (by / norm) as f32 * g).collect();
            there[i] = Tensor::from_vec(values, here[i].dims(), &Device::Cpu).unwrap();
            sum_at(&there)
        };
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        assert!((slope / norm - 1.0).abs() < 0.02, "{what}: input {i} has slope {slope}, its gradient {norm}");
    }
}

#[test]
fn rms_norm_is_its_composition() {
    for (shape, dim) in [(vec![1, 1], 1), (vec![2, 67], 48), (vec![300], 17), (vec![1, 5, 3], 96)] {
        let mut rng = Rng::new(dim as u64);
        let shape: Vec<usize> = shape.into_iter().chain([dim]).collect();
        if dim == 1 {
            continue; // The gradient of x / |x| is 0.
        }
        let vars = [var(&shape, 2.0, &mut rng), var(&[dim], 1.0, &mut rng)];
        check(&format!("rms_norm {shape:?}"), &vars, &|ops, x| (ops.rms_norm)(&x[0], &x[1]));
    }
}

#[test]
fn linear_maps_are_their_compositions() {
    for (rows, inputs, outputs) in [(1, 3, 2), (7, 96, 18), (128, 12, 96), (300, 33, 41), (129, 2, 1)] {
        let mut rng = Rng::new(rows as u64);
        let what = |name: &str| format!("{name} {rows} x {inputs} x {outputs}");
        let x = var(&[1, rows, inputs], 1.0, &mut rng);
        let weight = var(&[inputs, outputs], 0.3, &mut rng);
        let vars = [x.clone(), weight.clone(), var(&[outputs], 1.0, &mut rng)];
        check(&what("linear"), &vars, &|ops, x| (ops.linear)(&x[0], &x[1], &x[2]));
        check(&what("silu_linear"), &vars, &|ops, x| (ops.silu_linear)(&x[0], &x[1], &x[2]));
        let vars = [x.clone(), var(&[inputs], 1.0, &mut rng), weight.clone()];
        check(&what("norm_linear"), &vars, &|ops, x| (ops.norm_linear)(&x[0], &x[1], &x[2]));
        // The residual may be shaped otherwise.
        let vars = [var(&[outputs, rows], 1.0, &mut rng), x, weight];
        check(&what("add_linear"), &vars, &|ops, x| (ops.add_linear)(&x[0], &x[1], &x[2]));
    }
}

#[test]
fn gated_maps_are_their_composition() {
    for (rows, hidden, dim) in [(1, 1, 2), (3, 288, 96), (130, 37, 16), (257, 6, 5)] {
        let mut rng = Rng::new(rows as u64);
        let vars = [
            var(&[1, rows, dim], 1.0, &mut rng),
            var(&[1, rows, 2 * hidden], 2.0, &mut rng),
            var(&[hidden, dim], 0.3, &mut rng),
        ];
        let compute = |ops: &Ops, x: &[Tensor]| (ops.add_swiglu_linear)(&x[0], &x[1], &x[2]);
        check(&format!("add_swiglu_linear {rows} x {hidden} x {dim}"), &vars, &compute);
    }
}

#[test]
fn attention_is_its_composition() {
    // Batch, length, heads, size of a head, window: windows of 1, longer than the sequence, and that do not divide it.
    for (batch, len, n_heads, head_dim, window) in [
        (1, 2, 1, 2, 1),
        (1, 1, 2, 4, 5),
        (2, 9, 2, 6, 4),
        (2, 100, 3, 8, 7),
        (1, 200, 2, 48, 32),
        (3, 131, 2, 12, 33),
        (1, 150, 1, 64, 1024),
        (1, 300, 3, 64, 128),
        (2, 64, 1, 16, 64),
    ] {
        let mut rng = Rng::new((len * window) as u64);
        let qkv = var(&[batch, len, 3 * n_heads * head_dim], 1.5, &mut rng);
        let what = format!("attention {batch} x {len} x {n_heads} x {head_dim}, window {window}");
        check(&what, &[qkv], &|ops, x| (ops.attention)(&x[0], n_heads, window));
    }
}

#[test]
fn spreading_and_gathering_are_their_compositions() {
    for (batch, frames, period, times, dim) in [(1, 1, 1, 1, 3), (2, 3, 4, 5, 16), (1, 2, 8, 64, 7)] {
        let mut rng = Rng::new(dim as u64);
        let len = frames * period * times;
        let table = var(&[batch, frames, period, dim], 1.0, &mut rng);
        check(&format!("spread {table:?} to {len}"), &[table], &|ops, x| (ops.spread)(&x[0], len));
        let vars = [var(&[batch, len, dim], 1.0, &mut rng), var(&[11, dim], 1.0, &mut rng)];
        let codes = codes(batch * len * 3, 11, &mut rng);
        check(&format!("gather_add {len}"), &vars, &|ops, x| (ops.gather_add)(&x[0], &x[1], &codes));
    }
}

#[test]
fn bounded_scales_are_their_composition() {
    for (batch, frames, slices, times, k) in [(1, 1, 1, 1, 2), (2, 3, 2, 5, 6), (1, 2, 8, 64, 4)] {
        let mut rng = Rng::new(k as u64);
        let vars = [
            var(&[batch, frames * slices * times, 3 * k], 0.3, &mut rng),
            var(&[3 * k], 0.3, &mut rng),
            var(&[batch, frames, slices, k], 1.0, &mut rng),
        ];
        let compute = |ops: &Ops, x: &[Tensor]| (ops.bound_scales)(&x[0], &x[1], &x[2], 0.35);
        check(&format!("bound_scales {batch} x {frames} x {slices} x {times} x {k}"), &vars, &compute);
    }
}

/// Targets near the forecasts, in the outermost bins, and anywhere.
fn targets(n: usize, quantizer: Quantizer, rng: &mut Rng) -> Targets {
    let codec = Codec { quantizer, ..Codec::default() };
    let last = (codec.levels() - 1) as u16;
    let mut targets = Targets::default();
    for i in 0..n {
        let forecasts = [0.3 * rng.normal(), 0.3 * rng.normal()].map(|p| p.clamp(-1.0, 1.0));
        let token = match i % 4 {
            0 => codec.encode(forecasts[1] + 0.01 * rng.normal()),
            1 => codec.encode(0.2 * rng.normal()),
            2 => last * (i as u16 / 4 % 2),
            _ => rng.below(codec.levels()) as u16,
        };
        targets.push(token, forecasts, -4.0 + rng.normal(), &codec);
    }
    targets
}

#[test]
fn the_mixture_is_its_composition() {
    for (n, k, quantizer) in [(1, 2, Mulaw8), (64, 6, Mulaw8), (201, 6, Mulaw8), (65, 4, Mulaw8), (150, 6, Pcm16)] {
        let mut rng = Rng::new(n as u64);
        let targets = targets(n, quantizer, &mut rng);
        let head = var(&[1, n, 3 * k], 1.0, &mut rng);
        check(&format!("nll of {n} x {k}"), &[head], &|ops, x| (ops.nll)(&x[0], &targets));
    }
}

#[test]
fn cross_entropy_is_its_composition() {
    for (rows, n) in [(1, 2), (3, 256), (130, 33)] {
        let mut rng = Rng::new(rows as u64);
        let targets = codes(rows, n, &mut rng);
        let logits = var(&[1, rows, n], 3.0, &mut rng);
        let compute = |ops: &Ops, x: &[Tensor]| (ops.cross_entropy)(&x[0], &targets);
        check(&format!("cross_entropy {rows} x {n}"), &[logits], &compute);
    }
}

#[test]
fn results_are_the_same_bits_for_any_number_of_threads() {
    let mut rng = Rng::new(5);
    let (len, dim) = (700, 24);
    let x = var(&[1, len, dim], 1.0, &mut rng);
    let (gain, qkv, up) =
        (var(&[dim], 1.0, &mut rng), var(&[dim, 3 * dim], 0.3, &mut rng), var(&[dim, 4 * dim], 0.3, &mut rng));
    let down = var(&[2 * dim, dim], 0.3, &mut rng);
    let block = || {
        let (x, ops) = (x.as_tensor(), &FUSED);
        let attended = (ops.attention)(&(ops.norm_linear)(x, &gain, &qkv).unwrap(), 2, 48).unwrap();
        let up = (ops.norm_linear)(&attended, &gain, &up).unwrap();
        let y = (ops.add_swiglu_linear)(x, &up, &down).unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        (flat(&y), flat(gradients.get(x).unwrap()), flat(gradients.get(&qkv).unwrap()))
    };
    let in_pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(block);
    let alone = in_pool(1);
    for threads in [2, 3] {
        assert!(in_pool(threads) == alone, "{threads} threads");
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut rng = Rng::new(1);
    let targets = targets(70, Mulaw8, &mut rng);
    for at in 0..18 {
        let mut values = flat(var(&[70, 18], 1.0, &mut rng).as_tensor());
        values[3 * 18 + at] = f32::NAN;
        let head = Var::from_tensor(&Tensor::from_vec(values, (70, 18), &Device::Cpu).unwrap()).unwrap();
        let nll = (FUSED.nll)(&head, &targets).unwrap();
        assert!(flat(&nll)[3].is_nan(), "output {at}");
        let logits = head.reshape((70, 18)).unwrap();
        assert!(flat(&(FUSED.cross_entropy)(&logits, &[1; 70]).unwrap())[3].is_nan(), "logit {at}");
    }
}

#[test]
fn sizes_that_do_not_match_are_refused() {
    let mut rng = Rng::new(1);
    let mut t = |shape: &[usize]| var(shape, 1.0, &mut rng).as_tensor().clone();
    let ops = &FUSED;
    assert!((ops.rms_norm)(&t(&[2, 4]), &t(&[3])).is_err());
    assert!((ops.norm_linear)(&t(&[2, 4]), &t(&[4]), &t(&[3, 5])).is_err());
    assert!((ops.linear)(&t(&[2, 4]), &t(&[4, 5]), &t(&[4])).is_err());
    assert!((ops.add_linear)(&t(&[2, 4]), &t(&[2, 3]), &t(&[3, 5])).is_err());
    assert!((ops.add_swiglu_linear)(&t(&[2, 4]), &t(&[2, 6]), &t(&[2, 4])).is_err());
    assert!((ops.attention)(&t(&[1, 4, 18]), 2, 4).is_err());
    assert!((ops.attention)(&t(&[1, 4, 24]), 2, 0).is_err());
    assert!((ops.spread)(&t(&[1, 2, 3, 4]), 7).is_err());
    assert!((ops.gather_add)(&t(&[2, 4]), &t(&[3, 4]), &[0, 1, 2]).is_err());
    assert!((ops.gather_add)(&t(&[2, 4]), &t(&[3, 4]), &[0, 3]).is_err());
    assert!((ops.bound_scales)(&t(&[1, 4, 6]), &t(&[6]), &t(&[1, 3, 1, 2]), 0.3).is_err());
    assert!((ops.nll)(&t(&[3, 6]), &targets(2, Mulaw8, &mut Rng::new(1))).is_err());
    assert!((ops.cross_entropy)(&t(&[2, 4]), &[0, 4]).is_err());
}
