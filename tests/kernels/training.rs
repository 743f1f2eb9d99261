//! training.cu: values against the definition in f64, gradients against its finite differences.

use candle_core::{Device, Tensor};
use wavegen::codec::{Codec, Quantizer};
use wavegen::model::head::{self, Targets};
use wavegen::model::ops::plain::rope_values;
use wavegen::rng::Rng;
use wavegen::sampler::{MAX_LOG_SCALE, MAX_OFFSET};

use crate::emulator::{Emulator, Schedule, close, from_bytes, named, normal, to_bytes, unwritten};
use crate::launch::{
    AdamwArgs, AddArgs, ColumnSumsArgs, CrossEntropyArgs, CrossEntropyShape, Element, GatherArgs, GatherShape,
    HeadsShape, LaunchError, MixtureNllArgs, MixtureShape, NormShape, RmsNormArgs, SiluArgs, SiluShape, SplitHeadsArgs,
    SwigluArgs, SwigluShape, adamw, add,
};

const FILE: &str = "training.cu";
const BOTH: [Element; 2] = [Element::F32, Element::Bf16];

/// Of values and of gradients.
fn tolerance(element: Element) -> f64 {
    if element == Element::F32 { 2e-5 } else { 1e-2 }
}

/// Gradient of `loss` at `x`, by central differences.
fn slopes(x: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            let mut with = |value| {
                x[i] = value;
                loss(&x)
            };
            let slope = (with(at + STEP) - with(at - STEP)) / (2.0 * STEP);
            x[i] = at;
            slope
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

// RMSNorm ------------------------------------------------------------------------------------------------------------

fn rms_norm(x: &[f64], gain: Option<&[f64]>) -> Vec<f64> {
    let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).sqrt();
    x.iter().enumerate().map(|(i, x)| x / rms * gain.map_or(1.0, |gain| gain[i])).collect()
}

fn check_rms_norm(
    emulator: &Emulator,
    shape: NormShape,
    with_gain: bool,
    element: Element,
    schedule: Schedule,
    rng: &mut Rng,
) -> Result<(), String> {
    let NormShape { rows, dim } = shape;
    let (x, d_y, gain) =
        (normal(rows * dim, Element::F32, rng), normal(rows * dim, element, rng), normal(dim, Element::F32, rng));
    let mut buffers = [
        to_bytes(&x, Element::F32),
        to_bytes(&gain, Element::F32),
        unwritten(rows * dim, element),
        unwritten(rows, Element::F32),
        to_bytes(&d_y, element),
        unwritten(rows * dim, Element::F32),
        unwritten(shape.parts() * dim, Element::F32),
        unwritten(dim, Element::F32),
    ];
    let gain_at = u64::from(with_gain) * 2;
    let args = shape.args().map_err(|e| e.to_string())?;
    let args = RmsNormArgs { x: 1, gain: gain_at, y: 3, inverse_rms: 4, d_y: 5, d_x: 6, d_gain_parts: 7, ..args };
    for launch in [shape.forward(element), shape.backward(element), shape.backward_gain(element)] {
        emulator.run(&launch, &args, 7, &mut buffers, schedule)?;
    }
    let (launch, sums) = shape.sum_parts();
    emulator.run(&launch, &ColumnSumsArgs { parts: 7, sums: 8, ..sums }, 2, &mut buffers, schedule)?;

    let gain_used = with_gain.then_some(gain.as_slice());
    let row = |values: &[f64], i: usize| values[i * dim..(i + 1) * dim].to_vec();
    let by_row = |f: &dyn Fn(usize) -> Vec<f64>| (0..rows).flat_map(f).collect::<Vec<_>>();
    let y = by_row(&|i| rms_norm(&row(&x, i), gain_used));
    close("y", &from_bytes(&buffers[2], element), &y, tolerance(element))?;
    let d_x = by_row(&|i| slopes(&row(&x, i), |x| dot(&rms_norm(x, gain_used), &row(&d_y, i))));
    close("d_x", &from_bytes(&buffers[5], Element::F32), &d_x, tolerance(Element::F32))?;
    let d_gain: Vec<f64> =
        slopes(&gain, |gain| (0..rows).map(|i| dot(&rms_norm(&row(&x, i), Some(gain)), &row(&d_y, i))).sum());
    close("d_gain", &from_bytes(&buffers[7], Element::F32), &d_gain, 2e-5)
}

#[test]
fn rms_norm_equals_its_definition() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(81);
    for (round, element) in (0..8).flat_map(|round| BOTH.map(|element| (round, element))) {
        let shape = NormShape { rows: 1 + rng.below(40), dim: 1 + rng.below(70) };
        check_rms_norm(&emulator, shape, round % 2 == 0, element, Schedule::seeded(round), &mut rng)
            .unwrap_or_else(|e| panic!("{shape:?}, {element:?}, seed {round}: {e}"));
    }
    // Several parts.
    let shape = NormShape { rows: 600, dim: 3 };
    assert_eq!(shape.parts(), 3);
    check_rms_norm(&emulator, shape, true, Element::F32, Schedule::seeded(1), &mut rng).unwrap();
}

// SwiGLU -------------------------------------------------------------------------------------------------------------

fn swiglu(up: &[f64]) -> Vec<f64> {
    let (gates, values) = up.split_at(up.len() / 2);
    gates.iter().zip(values).map(|(gate, value)| gate / (1.0 + (-gate).exp()) * value).collect()
}

#[test]
fn swiglu_equals_its_definition() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(82);
    for (round, element) in (0..6).flat_map(|round| BOTH.map(|element| (round, element))) {
        let shape = SwigluShape { rows: 1 + rng.below(9), hidden: 1 + rng.below(60) };
        let SwigluShape { rows, hidden } = shape;
        let (up, d_y) = (normal(2 * rows * hidden, element, &mut rng), normal(rows * hidden, element, &mut rng));
        let mut buffers = [
            to_bytes(&up, element),
            unwritten(rows * hidden, element),
            to_bytes(&d_y, element),
            unwritten(2 * rows * hidden, element),
        ];
        let args = SwigluArgs { up: 1, y: 2, d_y: 3, d_up: 4, ..shape.args().unwrap() };
        for launch in [shape.forward(element), shape.backward(element)] {
            emulator.run(&launch, &args, 4, &mut buffers, Schedule::seeded(round)).unwrap();
        }
        let expected: Vec<f64> = up.chunks(2 * hidden).flat_map(swiglu).collect();
        let d_up: Vec<f64> = up
            .chunks(2 * hidden)
            .zip(d_y.chunks(hidden))
            .flat_map(|(up, d_y)| slopes(up, |up| dot(&swiglu(up), d_y)))
            .collect();
        close("y", &from_bytes(&buffers[1], element), &expected, tolerance(element))
            .and_then(|()| close("d_up", &from_bytes(&buffers[3], element), &d_up, tolerance(element)))
            .unwrap_or_else(|e| panic!("{shape:?}, {element:?}, seed {round}: {e}"));
    }
}

// SiLU ---------------------------------------------------------------------------------------------------------------

#[test]
fn silu_equals_its_definition() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(91);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    // Several parts; several blocks of columns.
    for (round, [rows, dim]) in [[1, 1], [5, 33], [700, 3], [9, 100]].into_iter().enumerate() {
        let shape = SiluShape { rows, dim };
        let [z, d_y] = [(); 2].map(|()| normal(rows * dim, Element::F32, &mut rng));
        let bias = normal(dim, Element::F32, &mut rng);
        let empty = |n| unwritten(n, Element::F32);
        let mut buffers = [
            to_bytes(&z, Element::F32),
            to_bytes(&bias, Element::F32),
            empty(rows * dim),
            to_bytes(&d_y, Element::F32),
            empty(rows * dim),
            empty(shape.parts() * dim),
            empty(dim),
        ];
        let args = SiluArgs { z: 1, bias: 2, y: 3, d_y: 4, d_z: 5, d_bias_parts: 6, ..shape.args().unwrap() };
        for launch in [shape.forward(), shape.backward(), shape.backward_bias()] {
            emulator.run(&launch, &args, 6, &mut buffers, Schedule::seeded(round as u64)).unwrap();
        }
        let (launch, sums) = shape.sum_parts();
        let sums = ColumnSumsArgs { parts: 6, sums: 7, ..sums };
        emulator.run(&launch, &sums, 2, &mut buffers, Schedule::seeded(round as u64)).unwrap();
        let x: Vec<f64> = z.iter().enumerate().map(|(i, z)| z + bias[i % dim]).collect();
        let y: Vec<f64> = x.iter().copied().map(silu).collect();
        let d_z: Vec<f64> = x.iter().zip(&d_y).map(|(&x, d)| slopes(&[x], |x| d * silu(x[0]))[0]).collect();
        let d_bias: Vec<f64> = (0..dim).map(|column| d_z.iter().skip(column).step_by(dim).sum()).collect();
        for (what, i, expected) in [("y", 2, y), ("d_z", 4, d_z), ("d_bias", 6, d_bias)] {
            close(what, &from_bytes(&buffers[i], Element::F32), &expected, tolerance(Element::F32))
                .unwrap_or_else(|e| panic!("{shape:?}: {e}"));
        }
    }
}

// Cross-entropy ------------------------------------------------------------------------------------------------------

fn cross_entropy(logits: &[f64], target: usize) -> f64 {
    let highest = logits.iter().copied().fold(f64::MIN, f64::max);
    highest + logits.iter().map(|x| (x - highest).exp()).sum::<f64>().ln() - logits[target]
}

#[test]
fn cross_entropy_equals_its_definition() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(83);
    for (round, element) in (0..6).flat_map(|round| BOTH.map(|element| (round, element))) {
        let shape = CrossEntropyShape { rows: 1 + rng.below(9), classes: 1 + rng.below(100) };
        let CrossEntropyShape { rows, classes } = shape;
        let logits: Vec<f64> = normal(rows * classes, element, &mut rng).iter().map(|x| 4.0 * x).collect();
        let targets: Vec<usize> = (0..rows).map(|_| rng.below(classes)).collect();
        let d_nll = normal(rows, Element::F32, &mut rng);
        let mut buffers = [
            to_bytes(&logits, element),
            targets.iter().flat_map(|&t| (t as u32).to_le_bytes()).collect(),
            unwritten(rows, Element::F32),
            unwritten(rows, Element::F32),
            to_bytes(&d_nll, Element::F32),
            unwritten(rows * classes, element),
        ];
        let args =
            CrossEntropyArgs { logits: 1, targets: 2, nll: 3, lse: 4, d_nll: 5, d_logits: 6, ..shape.args().unwrap() };
        for launch in [shape.forward(element), shape.backward(element)] {
            emulator.run(&launch, &args, 6, &mut buffers, Schedule::seeded(round)).unwrap();
        }
        let each = || logits.chunks(classes).zip(&targets);
        let expected: Vec<f64> = each().map(|(logits, &target)| cross_entropy(logits, target)).collect();
        let d_logits: Vec<f64> = each()
            .zip(&d_nll)
            .flat_map(|((logits, &target), d_nll)| slopes(logits, |logits| d_nll * cross_entropy(logits, target)))
            .collect();
        close("nll", &from_bytes(&buffers[2], Element::F32), &expected, 2e-6)
            .and_then(|()| close("d_logits", &from_bytes(&buffers[5], element), &d_logits, tolerance(element)))
            .unwrap_or_else(|e| panic!("{shape:?}, {element:?}, seed {round}: {e}"));
    }
}

#[test]
fn a_target_that_is_no_class_is_no_number() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let shape = CrossEntropyShape { rows: 1, classes: 3 };
    let mut buffers = [
        to_bytes(&[0.0; 3], Element::F32),
        3u32.to_le_bytes().to_vec(),
        unwritten(1, Element::F32),
        unwritten(1, Element::F32),
    ];
    let args = CrossEntropyArgs { logits: 1, targets: 2, nll: 3, lse: 4, ..shape.args().unwrap() };
    emulator.run(&shape.forward(Element::F32), &args, 6, &mut buffers, Schedule::default()).unwrap();
    assert!(from_bytes(&buffers[2], Element::F32)[0].is_nan());
}

// Mixture of logistics -----------------------------------------------------------------------------------------------

/// Head outputs and targets as in training, among them wide and narrow units and the outermost bins.
struct Mixtures {
    shape: MixtureShape,
    head: Vec<f64>,
    targets: Targets,
    d_nll: Vec<f64>,
}

impl Mixtures {
    fn random(shape: MixtureShape, rng: &mut Rng) -> Self {
        let mulaw = Codec::default();
        let pcm = Codec { quantizer: Quantizer::Pcm16, ..mulaw.clone() };
        let mut targets = Targets::default();
        for i in 0..shape.n {
            let codec = if i % 2 == 0 { &mulaw } else { &pcm };
            let sample = (0.4 * rng.normal()).clamp(-1.2, 1.2);
            let near = |rng: &mut Rng| (sample + 0.05 * rng.normal()).clamp(-1.0, 1.0);
            let forecasts = [near(rng), near(rng)];
            targets.push(codec.encode(sample), forecasts, -6.0 + 4.0 * rng.uniform(), codec);
        }
        let head = normal(3 * shape.components * shape.n, Element::F32, rng);
        Self { shape, head, targets, d_nll: normal(shape.n, Element::F32, rng) }
    }

    /// The definition for one sample, in f64.
    fn nll(&self, sample: usize, head: &[f64]) -> f64 {
        let k = self.shape.components;
        let log_sigmoid = |x: f64| x.min(0.0) - (-x.abs()).exp().ln_1p();
        let log_sum_exp = |x: &[f64]| {
            let highest = x.iter().copied().fold(f64::MIN, f64::max);
            highest + x.iter().map(|x| (x - highest).exp()).sum::<f64>().ln()
        };
        let of = |v: &[f32], i: usize| f64::from(v[i]);
        let terms: Vec<f64> = (0..k)
            .map(|c| {
                let at = 2 * sample + c / (k / 2);
                let (forecast, unit) = (of(&self.targets.forecasts, at), of(&self.targets.units, at));
                let bounded = |x: f64, limit: f32| (x / f64::from(limit)).tanh() * f64::from(limit);
                let mean = forecast + unit * bounded(head[k + c], MAX_OFFSET);
                let scale = unit * bounded(head[2 * k + c], MAX_LOG_SCALE).exp();
                let a = (of(&self.targets.low, sample) - mean) / scale;
                let b = (of(&self.targets.high, sample) - mean) / scale;
                head[c] + log_sigmoid(b) + log_sigmoid(-a) + (-(a - b).min(-1e-6).exp_m1()).ln()
            })
            .collect();
        log_sum_exp(&head[..k]) - log_sum_exp(&terms)
    }

    /// nll and d_head of the kernels.
    fn emulated(&self, emulator: &Emulator, schedule: Schedule) -> Result<[Vec<f64>; 2], String> {
        let wide = |x: &[f32]| to_bytes(&x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), Element::F32);
        let Targets { forecasts, units, low, high } = &self.targets;
        let mut buffers = [
            to_bytes(&self.head, Element::F32),
            wide(forecasts),
            wide(units),
            wide(low),
            wide(high),
            unwritten(self.shape.n, Element::F32),
            to_bytes(&self.d_nll, Element::F32),
            unwritten(self.head.len(), Element::F32),
        ];
        let args = MixtureNllArgs {
            head: 1,
            forecasts: 2,
            units: 3,
            low: 4,
            high: 5,
            nll: 6,
            d_nll: 7,
            d_head: 8,
            ..self.shape.args().map_err(|e| e.to_string())?
        };
        for launch in [self.shape.forward(), self.shape.backward()] {
            emulator.run(&launch.map_err(|e| e.to_string())?, &args, 8, &mut buffers, schedule)?;
        }
        Ok([5, 7].map(|i| from_bytes(&buffers[i], Element::F32)))
    }

    fn check(&self, emulator: &Emulator, schedule: Schedule) -> Result<(), String> {
        let [nll, d_head] = self.emulated(emulator, schedule)?;
        let heads = || self.head.chunks(3 * self.shape.components).enumerate();
        let expected: Vec<f64> = heads().map(|(i, head)| self.nll(i, head)).collect();
        close("nll", &nll, &expected, 2e-5)?;
        let slopes: Vec<f64> =
            heads().flat_map(|(i, head)| slopes(head, |head| self.d_nll[i] * self.nll(i, head))).collect();
        close("d_head", &d_head, &slopes, 2e-5)
    }
}

#[test]
fn mixture_likelihood_equals_its_definition() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(84);
    for round in 0..6 {
        let shape = MixtureShape { n: 1 + rng.below(300), components: 2 * (1 + rng.below(4)) };
        Mixtures::random(shape, &mut rng)
            .check(&emulator, Schedule::seeded(round))
            .unwrap_or_else(|e| panic!("{shape:?}, seed {round}: {e}"));
    }
}

#[test]
fn mixture_likelihood_equals_the_models() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let shape = MixtureShape { n: 200, components: 6 };
    let mixtures = Mixtures::random(shape, &mut Rng::new(85));
    let head: Vec<f32> = mixtures.head.iter().map(|&x| x as f32).collect();
    let head = Tensor::from_vec(head, (1, shape.n, 18), &Device::Cpu).unwrap();
    let expected = head::nll(&head, &mixtures.targets).unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
    let [nll, _] = mixtures.emulated(&emulator, Schedule::seeded(1)).unwrap();
    close("nll", &nll, &expected, 1e-4).unwrap();
}

// Queries, keys and values -------------------------------------------------------------------------------------------

/// A vector, RMS-normalised and turned to a position.
fn rotated(x: &[f64], position: usize) -> Vec<f64> {
    let (n, half) = (rms_norm(x, None), x.len() / 2);
    let turn = |i: usize| (position as f64 * 10_000f64.powf(-2.0 * i as f64 / x.len() as f64)).sin_cos();
    let low = (0..half).map(|i| n[i] * turn(i).1 - n[i + half] * turn(i).0);
    let high = (0..half).map(|i| n[i] * turn(i).0 + n[i + half] * turn(i).1);
    low.chain(high).collect()
}

/// Cosines and sines of positions, `[len, head_dim]`.
fn turns(len: usize, head_dim: usize) -> Vec<f64> {
    let (cos, sin) = rope_values(0, len, head_dim);
    let rows = cos.chunks(head_dim / 2).zip(sin.chunks(head_dim / 2));
    rows.flat_map(|(cos, sin)| cos.iter().chain(sin)).map(|&x| x.into()).collect()
}

#[test]
fn heads_are_split_normalised_and_rotated() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(87);
    for (round, element) in (0..8).flat_map(|round| BOTH.map(|element| (round, element))) {
        let shape = HeadsShape {
            batch: 1 + rng.below(3),
            len: 1 + rng.below(7),
            n_heads: 1 + rng.below(4),
            head_dim: 2 * (1 + rng.below(64)),
        };
        let HeadsShape { batch, len, n_heads, head_dim } = shape;
        let dim = n_heads * head_dim;
        let qkv = normal(batch * len * 3 * dim, element, &mut rng);
        let d: Vec<Vec<f64>> = (0..3).map(|_| normal(batch * len * dim, element, &mut rng)).collect();
        let empty = |n| unwritten(n, element);
        let wide = |x: &[f64]| to_bytes(x, element);
        let mut buffers = [
            wide(&qkv),
            empty(batch * len * dim),
            empty(batch * len * dim),
            empty(batch * len * dim),
            wide(&d[0]),
            wide(&d[1]),
            wide(&d[2]),
            empty(qkv.len()),
            to_bytes(&turns(len, head_dim), Element::F32),
        ];
        let args = shape.args().unwrap();
        let args = SplitHeadsArgs { qkv: 1, q: 2, k: 3, v: 4, d_q: 5, d_k: 6, d_v: 7, d_qkv: 8, turns: 9, ..args };
        for launch in [shape.forward(element), shape.backward(element)] {
            emulator.run(&launch, &args, 9, &mut buffers, Schedule::seeded(round)).unwrap();
        }
        let got = |i: usize| from_bytes(&buffers[i], element);
        let mut expected = vec![vec![0.0; batch * len * dim]; 3];
        let mut d_qkv = vec![0.0; qkv.len()];
        for (row, part, head) in
            (0..batch * len).flat_map(|row| (0..3).flat_map(move |p| (0..n_heads).map(move |h| (row, p, h))))
        {
            let from = row * 3 * dim + part * dim + head * head_dim;
            let to = (((row / len) * n_heads + head) * len + row % len) * head_dim;
            let (x, d) = (&qkv[from..from + head_dim], &d[part][to..to + head_dim]);
            let of = |x: &[f64]| if part < 2 { rotated(x, row % len) } else { x.to_vec() };
            expected[part][to..to + head_dim].copy_from_slice(&of(x));
            d_qkv[from..from + head_dim].copy_from_slice(&slopes(x, |x| dot(&of(x), d)));
        }
        for (i, expected) in expected.iter().enumerate() {
            close("q, k, v", &got(1 + i), expected, tolerance(element))
                .unwrap_or_else(|e| panic!("{shape:?}, {element:?}, {i}: {e}"));
        }
        close("d_qkv", &got(7), &d_qkv, tolerance(element)).unwrap_or_else(|e| panic!("{shape:?}, {element:?}: {e}"));
    }
}

// Embeddings ---------------------------------------------------------------------------------------------------------

#[test]
fn embeddings_are_added_and_their_gradients_gathered() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(88);
    let shapes = (0..6).map(|_| [1 + rng.below(40), 1 + rng.below(90), 1 + rng.below(4), 1 + rng.below(20)]);
    // Several parts; several groups of entries and of columns.
    let shapes: Vec<_> = shapes.chain([[1100, 3, 2, 5], [300, 70, 2, 130]]).collect();
    for [rows, dim, n_tables, entries] in shapes {
        let shape = GatherShape { rows, dim, n_tables, entries };
        let x = normal(rows * dim, Element::F32, &mut rng);
        let table = normal(shape.table_len(), Element::F32, &mut rng);
        let d_y = normal(rows * dim, Element::F32, &mut rng);
        let codes: Vec<usize> = (0..rows * n_tables).map(|i| i % n_tables * entries + rng.below(entries)).collect();
        let mut buffers = [
            to_bytes(&x, Element::F32),
            to_bytes(&table, Element::F32),
            codes.iter().flat_map(|&code| (code as u32).to_le_bytes()).collect(),
            unwritten(rows * dim, Element::F32),
            to_bytes(&d_y, Element::F32),
            unwritten(shape.parts() * shape.table_len(), Element::F32),
            unwritten(shape.table_len(), Element::F32),
        ];
        let args = shape.args().unwrap();
        let args = GatherArgs { x: 1, table: 2, codes: 3, y: 4, d_y: 5, d_table_parts: 6, ..args };
        for launch in [shape.forward(), shape.backward()] {
            emulator.run(&launch, &args, 6, &mut buffers, Schedule::seeded(rows as u64)).unwrap();
        }
        let (launch, sums) = shape.sum_parts();
        let sums = ColumnSumsArgs { parts: 6, sums: 7, ..sums };
        emulator.run(&launch, &sums, 2, &mut buffers, Schedule::default()).unwrap();
        let (mut y, mut d_table) = (x, vec![0.0; shape.table_len()]);
        for (i, &code) in codes.iter().enumerate() {
            for column in 0..dim {
                y[i / n_tables * dim + column] += table[code * dim + column];
                d_table[code * dim + column] += d_y[i / n_tables * dim + column];
            }
        }
        close("y", &from_bytes(&buffers[3], Element::F32), &y, 2e-6)
            .and_then(|()| close("d_table", &from_bytes(&buffers[6], Element::F32), &d_table, 2e-6))
            .unwrap_or_else(|e| panic!("{shape:?}: {e}"));
    }
}

// Sums ---------------------------------------------------------------------------------------------------------------

#[test]
fn values_are_added() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(90);
    for (n, element) in [1, 127, 300].into_iter().flat_map(|n| BOTH.map(|element| (n, element))) {
        let (x, z) = (normal(n, Element::F32, &mut rng), normal(n, element, &mut rng));
        let mut buffers = [to_bytes(&x, Element::F32), to_bytes(&z, element), unwritten(n, Element::F32)];
        let (launch, args) = add(n, element).unwrap();
        // In place where what is added is f32.
        let y = if element == Element::F32 { 2 } else { 3 };
        emulator.run(&launch, &AddArgs { x: 1, z: 2, y, ..args }, 3, &mut buffers, Schedule::default()).unwrap();
        let sums: Vec<f64> = x.iter().zip(&z).map(|(x, z)| x + z).collect();
        close("sums", &from_bytes(&buffers[y as usize - 1], Element::F32), &sums, 1e-6).unwrap();
    }
}

// AdamW --------------------------------------------------------------------------------------------------------------

#[test]
fn a_step_of_the_optimizer_is_that_of_the_paper() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(89);
    let n = 300;
    let [weights, gradients, means, averages] = [(); 4].map(|()| normal(n, Element::F32, &mut rng));
    let squares: Vec<f64> = normal(n, Element::F32, &mut rng).iter().map(|x| f64::from((x * x) as f32)).collect();
    let (launch, args) = adamw(n).unwrap();
    let args = AdamwArgs { gradient: 0.5, rate: 0.01, square: 1.5, decay: 0.9, average: 0.25, ..args };
    let args = AdamwArgs { weights: 1, gradients: 2, means: 3, squares: 4, averages: 5, ..args };
    let mut buffers = [&weights, &gradients, &means, &squares, &averages].map(|x| to_bytes(x, Element::F32));
    emulator.run(&launch, &args, 5, &mut buffers, Schedule::default()).unwrap();
    let mut expected = [vec![], vec![], vec![], vec![]];
    for i in 0..n {
        let gradient = 0.5 * gradients[i];
        let mean = 0.9 * means[i] + 0.1 * gradient;
        let square = 0.95 * squares[i] + 0.05 * gradient * gradient;
        let weight = 0.9 * weights[i] - 0.01 * mean / ((1.5 * square).sqrt() + 1e-8);
        let average = 0.75 * averages[i] + 0.25 * weight;
        expected.iter_mut().zip([weight, mean, square, average]).for_each(|(all, x)| all.push(x));
    }
    for (at, expected) in [0, 2, 3, 4].into_iter().zip(expected) {
        close("weights, means, squares, averages", &from_bytes(&buffers[at], Element::F32), &expected, 1e-5).unwrap();
    }
}

// All ----------------------------------------------------------------------------------------------------------------

#[test]
fn a_barrier_that_is_left_out_is_noticed() {
    let Some(emulator) = Emulator::program(FILE) else { return };
    let mut rng = Rng::new(86);
    let mixtures = Mixtures::random(MixtureShape { n: 150, components: 4 }, &mut rng);
    let barriers = emulator.barriers();
    assert_eq!(barriers.len(), 4);
    for left_out in barriers {
        let mut passes = |seed| {
            let schedule = Schedule { left_out, ..Schedule::seeded(seed) };
            let shape = NormShape { rows: 40, dim: 40 };
            mixtures.check(&emulator, schedule).is_ok()
                && check_rms_norm(&emulator, shape, true, Element::F32, schedule, &mut rng).is_ok()
        };
        assert!(!(1..5).all(&mut passes), "nobody misses {}", named(left_out));
    }
}

#[test]
fn sizes_that_no_kernel_serves_are_refused() {
    assert_eq!(MixtureShape { n: 1, components: 5 }.args(), Err(LaunchError::Components(5)));
    assert!(MixtureShape { n: 0, components: 4 }.args().is_err());
    assert!(matches!(MixtureShape { n: 1, components: 1000 }.forward(), Err(LaunchError::Shared { .. })));
    assert!(NormShape { rows: 0, dim: 4 }.args().is_err());
    assert!(SwigluShape { rows: 1 << 40, hidden: 4 }.args().is_err());
    assert!(CrossEntropyShape { rows: 1, classes: 0 }.args().is_err());
}
