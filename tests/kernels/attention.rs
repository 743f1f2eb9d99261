//! attention_window.cu: forward and backward against the definition.

use wavegen::rng::Rng;

use crate::emulator::{Emulator, Schedule, close, from_bytes, named, normal, to_bytes, unwritten};
use crate::launch::{AttentionArgs, AttentionShape, Element, HEAD_DIMS, LaunchError};

/// What attention reads: layouts as in kernels/args.cuh.
#[derive(Clone)]
struct Inputs {
    shape: AttentionShape,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    d_o: Vec<f64>,
}

/// What it gives.
#[derive(Default)]
struct Outputs {
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Inputs {
    fn random(shape: AttentionShape, element: Element, rng: &mut Rng) -> Self {
        let rows = shape.batch * shape.len * shape.head_dim;
        let mut draw = |heads| normal(rows * heads, element, rng);
        let (q, d_o) = (draw(shape.n_heads), draw(shape.n_heads));
        Self { shape, q, k: draw(shape.n_kv_heads), v: draw(shape.n_kv_heads), d_o }
    }
}

/// The definition, in f64, one score after the other.
fn attention(inputs: &Inputs) -> Outputs {
    let Inputs { shape, q, k, v, d_o } = inputs;
    let AttentionShape { batch, n_heads, n_kv_heads, len, head_dim, window, .. } = *shape;
    let scale = (head_dim as f64).sqrt().recip();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let zeros = |x: &[f64]| vec![0.0; x.len()];
    let mut out =
        Outputs { o: zeros(q), dq: zeros(q), dk: zeros(k), dv: zeros(v), lse: vec![0.0; batch * n_heads * len] };
    for head in 0..batch * n_heads {
        let kv_head = head / n_heads * n_kv_heads + head % n_heads / (n_heads / n_kv_heads);
        for i in 0..len {
            let row = |at: usize| at * head_dim..(at + 1) * head_dim;
            let query = row(head * len + i);
            let seen = (i + 1).saturating_sub(window)..i + 1;
            let key = |j: usize| row(kv_head * len + j);
            let scores: Vec<f64> = seen.clone().map(|j| scale * dot(&q[query.clone()], &k[key(j)])).collect();
            let highest = scores.iter().copied().fold(f64::MIN, f64::max);
            let lse = highest + scores.iter().map(|s| (s - highest).exp()).sum::<f64>().ln();
            out.lse[head * len + i] = lse;
            let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
            for (p, j) in p.iter().zip(seen.clone()) {
                for (o, v) in out.o[query.clone()].iter_mut().zip(&v[key(j)]) {
                    *o += p * v;
                }
            }
            let delta = dot(&d_o[query.clone()], &out.o[query.clone()]);
            for (p, j) in p.iter().zip(seen) {
                let ds = scale * p * (dot(&d_o[query.clone()], &v[key(j)]) - delta);
                for d in 0..head_dim {
                    let (query, key) = (query.start + d, key(j).start + d);
                    out.dq[query] += ds * k[key];
                    out.dk[key] += ds * q[query];
                    out.dv[key] += p * d_o[query];
                }
            }
        }
    }
    out
}

/// Outputs `[batch, n_heads, len, head_dim]` as `[batch, len, n_heads, head_dim]`, or back.
fn joined(x: &[f64], shape: &AttentionShape, forth: bool) -> Vec<f64> {
    let AttentionShape { n_heads, len, head_dim, .. } = *shape;
    let mut out = vec![0.0; x.len()];
    for (i, row) in x.chunks(head_dim).enumerate() {
        let (batch, rest) = (i / (n_heads * len), i % (n_heads * len));
        let to = if forth { rest % len * n_heads + rest / len } else { rest % n_heads * len + rest / n_heads };
        out[(batch * n_heads * len + to) * head_dim..][..head_dim].copy_from_slice(row);
    }
    out
}

/// The three kernels one after the other.
fn emulated(emulator: &Emulator, inputs: &Inputs, element: Element, schedule: Schedule) -> Result<Outputs, String> {
    let shape = inputs.shape;
    let n_rows = shape.batch * shape.n_heads * shape.len;
    let empty = |like: &[f64]| unwritten(like.len(), element);
    let mut buffers = [
        to_bytes(&inputs.q, element),
        to_bytes(&inputs.k, element),
        to_bytes(&inputs.v, element),
        empty(&inputs.q),
        unwritten(n_rows, Element::F32),
        to_bytes(&if shape.joined { joined(&inputs.d_o, &shape, true) } else { inputs.d_o.clone() }, element),
        unwritten(n_rows, Element::F32),
        empty(&inputs.q),
        empty(&inputs.k),
        empty(&inputs.v),
    ];
    let args = AttentionArgs {
        q: 1,
        k: 2,
        v: 3,
        o: 4,
        lse: 5,
        d_o: 6,
        delta: 7,
        dq: 8,
        dk: 9,
        dv: 10,
        ..shape.args().map_err(|e| e.to_string())?
    };
    for launch in [shape.forward(element), shape.backward_queries(element), shape.backward_keys(element)] {
        emulator.run(&launch, &args, buffers.len() as u32, &mut buffers, schedule)?;
    }
    let values = |i: usize| from_bytes(&buffers[i], element);
    Ok(Outputs {
        o: if shape.joined { joined(&values(3), &shape, false) } else { values(3) },
        lse: from_bytes(&buffers[4], Element::F32),
        dq: values(7),
        dk: values(8),
        dv: values(9),
    })
}

fn compare(got: &Outputs, expected: &Outputs, element: Element) -> Result<(), String> {
    let tolerance = if element == Element::F32 { 3e-6 } else { 1e-2 };
    close("o", &got.o, &expected.o, tolerance)?;
    close("lse", &got.lse, &expected.lse, 1e-5)?;
    close("dq", &got.dq, &expected.dq, tolerance)?;
    close("dk", &got.dk, &expected.dk, tolerance)?;
    close("dv", &got.dv, &expected.dv, tolerance)
}

fn check(emulator: &Emulator, inputs: &Inputs, element: Element, schedule: Schedule) -> Result<(), String> {
    let got = emulated(emulator, inputs, element, schedule)?;
    compare(&got, &attention(inputs), element)
}

/// Two and a half tiles of queries, windows across their borders, two queries' heads to a key's.
const WITH_BORDERS: AttentionShape =
    AttentionShape { batch: 1, n_heads: 2, n_kv_heads: 1, len: 80, head_dim: 48, window: 40, joined: false };

#[test]
fn attention_equals_its_definition_for_random_shapes_and_schedules() {
    let Some(emulator) = Emulator::of("attention_window.cu") else { return };
    let mut rng = Rng::new(61);
    for round in 0..4 {
        for head_dim in HEAD_DIMS {
            for element in [Element::F32, Element::Bf16] {
                let n_kv_heads = 1 + rng.below(2);
                let len = 1 + rng.below(110);
                let shape = AttentionShape {
                    batch: 1 + rng.below(2),
                    n_heads: n_kv_heads * (1 + rng.below(2)),
                    n_kv_heads,
                    len,
                    head_dim,
                    window: 1 + rng.below(len + 20),
                    joined: rng.below(2) == 0,
                };
                let inputs = Inputs::random(shape, element, &mut rng);
                check(&emulator, &inputs, element, Schedule::seeded(round))
                    .unwrap_or_else(|e| panic!("{shape:?}, {element:?}, seed {round}: {e}"));
            }
        }
    }
}

#[test]
fn every_schedule_gives_the_same_bits() {
    let Some(emulator) = Emulator::program("attention_window.cu") else { return };
    let inputs = Inputs::random(WITH_BORDERS, Element::F32, &mut Rng::new(62));
    let outputs = |seed| emulated(&emulator, &inputs, Element::F32, Schedule::seeded(seed)).unwrap();
    let first = outputs(0);
    for seed in 1..4 {
        let other = outputs(seed);
        for (a, b) in [(&first.o, &other.o), (&first.dq, &other.dq), (&first.dk, &other.dk), (&first.dv, &other.dv)] {
            assert_eq!(a, b, "seed {seed}");
        }
    }
}

#[test]
fn a_barrier_that_is_left_out_is_noticed() {
    let Some(emulator) = Emulator::program("attention_window.cu") else { return };
    let inputs = Inputs::random(WITH_BORDERS, Element::F32, &mut Rng::new(63));
    let expected = attention(&inputs);
    let barriers = emulator.barriers();
    assert_eq!(barriers.len(), 9);
    for left_out in barriers {
        let passes = |seed| {
            let schedule = Schedule { left_out, ..Schedule::seeded(seed) };
            emulated(&emulator, &inputs, Element::F32, schedule)
                .and_then(|got| compare(&got, &expected, Element::F32))
                .is_ok()
        };
        assert!(!(1..5).all(passes), "nobody misses {}", named(left_out));
    }
}

#[test]
fn too_little_shared_memory_is_noticed() {
    let Some(emulator) = Emulator::program("attention_window.cu") else { return };
    let inputs = Inputs::random(WITH_BORDERS, Element::F32, &mut Rng::new(64));
    let schedule = Schedule { short_by: 64, ..Schedule::default() };
    let error = emulated(&emulator, &inputs, Element::F32, schedule).err().unwrap();
    assert!(error.contains("wrote beyond its shared memory"), "{error}");
}

#[test]
fn the_definitions_gradients_are_those_of_finite_differences() {
    let shape = AttentionShape { batch: 1, n_heads: 2, n_kv_heads: 1, len: 9, head_dim: 32, window: 4, joined: false };
    let inputs = Inputs::random(shape, Element::F32, &mut Rng::new(65));
    let loss = |inputs: &Inputs| attention(inputs).o.iter().zip(&inputs.d_o).map(|(o, d)| o * d).sum::<f64>();
    let gradients = attention(&inputs);
    const STEP: f64 = 1e-5;
    let part = |inputs: &mut Inputs, i: usize, by: f64| {
        let n = inputs.q.len();
        let m = inputs.k.len();
        let at = if i < n {
            &mut inputs.q[i]
        } else if i < n + m {
            &mut inputs.k[i - n]
        } else {
            &mut inputs.v[i - n - m]
        };
        *at += by;
    };
    let all: Vec<f64> = [gradients.dq, gradients.dk, gradients.dv].concat();
    for (i, gradient) in all.iter().enumerate().step_by(7) {
        let (mut above, mut under) = (inputs.clone(), inputs.clone());
        part(&mut above, i, STEP);
        part(&mut under, i, -STEP);
        let slope = (loss(&above) - loss(&under)) / (2.0 * STEP);
        assert!((slope - gradient).abs() < 1e-8, "input {i}: {gradient}, slope {slope}");
    }
}

#[test]
fn shapes_that_no_kernel_serves_are_refused() {
    let refused = |shape: AttentionShape| shape.args().err();
    assert_eq!(refused(AttentionShape { head_dim: 40, ..WITH_BORDERS }), Some(LaunchError::HeadDim(40)));
    let heads = LaunchError::Heads { n_heads: 3, n_kv_heads: 2 };
    assert_eq!(refused(AttentionShape { n_heads: 3, n_kv_heads: 2, ..WITH_BORDERS }), Some(heads));
    for empty in [
        AttentionShape { batch: 0, ..WITH_BORDERS },
        AttentionShape { len: 0, ..WITH_BORDERS },
        AttentionShape { window: 0, ..WITH_BORDERS },
        AttentionShape { n_kv_heads: 0, ..WITH_BORDERS },
    ] {
        assert!(matches!(refused(empty), Some(LaunchError::Size { got: 0, .. })), "{empty:?}");
    }
    assert_eq!(AttentionShape { window: usize::MAX, ..WITH_BORDERS }.args().unwrap().window, 80);
}
