//! The mixture's negative log-likelihood: all of a sample's bounds, bins and logarithms in one pass, side by side for many
//! samples.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::super::config::N_FORECASTS;
use super::super::head::{LEAST_BIN, Targets};
use super::{Values, gradient, values, width};
use crate::sampler::{MAX_LOG_SCALE, MAX_OFFSET};
use crate::simd::{portable, wide_loop};

/// [`super::Ops::nll`]
pub fn nll(head: &Tensor, targets: &Targets) -> Result<Tensor> {
    head.contiguous()?.apply_op1(MixtureNll { targets: targets.clone() })
}

struct MixtureNll {
    targets: Targets,
}

/// Samples that are computed side by side.
const LANES: usize = 64;
type Lane = [f32; LANES];

/// What is known of [`LANES`] samples, a row for every component.
struct Room {
    head: Vec<Lane>, // weights, offsets, log scales: three per component
    forecasts: [Lane; N_FORECASTS],
    units: [Lane; N_FORECASTS],
    low: Lane,
    high: Lane,
    offset: Vec<Lane>,  // tanh of the bounded offset
    scale: Vec<Lane>,   // tanh of the bounded log scale
    inverse: Vec<Lane>, // 1 / scale
    a: Vec<Lane>,       // the bin's edges in scales from the mean
    b: Vec<Lane>,
    bin: Vec<Lane>, // a - b, of the edges themselves: small beside a and b where tokens are fine
    term: Vec<Lane>,
    /// Largest of the terms and weights, and the sum of exponentials beside it.
    top: [Lane; 2],
    sum: [Lane; 2],
    out: Lane,
}

impl Room {
    fn new(k: usize) -> Box<Self> {
        let lanes = |n| vec![[0.0; LANES]; n];
        let zero = [0.0; LANES];
        Box::new(Self {
            head: lanes(3 * k),
            forecasts: [zero; N_FORECASTS],
            units: [[1.0; LANES]; N_FORECASTS],
            low: zero,
            high: zero,
            offset: lanes(k),
            scale: lanes(k),
            inverse: lanes(k),
            a: lanes(k),
            b: lanes(k),
            bin: lanes(k),
            term: lanes(k),
            top: [zero; 2],
            sum: [zero; 2],
            out: zero,
        })
    }

    /// Takes up to [`LANES`] samples from `first` on.
    fn load(&mut self, head: &[f32], targets: &Targets, first: usize) {
        for (i, row) in head.chunks_exact(self.head.len()).enumerate() {
            self.head.iter_mut().zip(row).for_each(|(lane, &x)| lane[i] = x);
            for f in 0..N_FORECASTS {
                self.forecasts[f][i] = targets.forecasts[(first + i) * N_FORECASTS + f];
                self.units[f][i] = targets.units[(first + i) * N_FORECASTS + f];
            }
            (self.low[i], self.high[i]) = (targets.low[first + i], targets.high[first + i]);
        }
    }
}

/// ln(sigmoid(x)) without overflow on either side; NaN where x is.
#[inline(always)]
fn log_sigmoid(x: f32) -> f32 {
    0.5 * (x - x.abs()) - portable::ln(1.0 + portable::exp(-x.abs()))
}

/// The distance of a bin's edges, as far as f32 can be trusted with it.
#[inline(always)]
fn bin(distance: f32) -> f32 {
    if distance > -LEAST_BIN { -LEAST_BIN } else { distance }
}

/// 1 - e^x of a bin's x, which the tokens of 16 bits bring so near to 0 that the difference would have few digits left.
#[inline(always)]
fn mass(x: f32) -> f32 {
    let series = -x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))));
    let difference = 1.0 - portable::exp(x);
    if x > -0.1 { series } else { difference }
}

/// ln of the sum of exponentials of lanes; `top` and `sum` are left for gradients.
#[inline(always)]
fn log_sum_exp(lanes: &[Lane], top: &mut Lane, sum: &mut Lane, out: &mut Lane) {
    *top = lanes[0];
    for lane in &lanes[1..] {
        for i in 0..LANES {
            top[i] = if lane[i] > top[i] { lane[i] } else { top[i] };
        }
    }
    *sum = [0.0; LANES];
    for lane in lanes {
        for i in 0..LANES {
            sum[i] += portable::exp(lane[i] - top[i]);
        }
    }
    for i in 0..LANES {
        out[i] = top[i] + portable::ln(sum[i]);
    }
}

wide_loop! {
    /// Negative log-likelihoods of the room's samples.
    fn forward(room: &'a mut Room) {
        let k = room.a.len();
        let (weights, rest) = room.head.split_at(k);
        let (offsets, log_scales) = rest.split_at(k);
        for c in 0..k {
            let f = c * N_FORECASTS / k;
            let (forecast, unit) = (&room.forecasts[f], &room.units[f]);
            let (offset, scale, inverse) = (&mut room.offset[c], &mut room.scale[c], &mut room.inverse[c]);
            for i in 0..LANES {
                offset[i] = portable::tanh(offsets[c][i] * (1.0 / MAX_OFFSET));
                scale[i] = portable::tanh(log_scales[c][i] * (1.0 / MAX_LOG_SCALE));
                inverse[i] = portable::exp(-MAX_LOG_SCALE * scale[i]) / unit[i];
            }
            let (a, b, bins, term) = (&mut room.a[c], &mut room.b[c], &mut room.bin[c], &mut room.term[c]);
            for i in 0..LANES {
                // First without the forecast, which may lie a million scales from 0 and a few from the bin.
                let moved = MAX_OFFSET * offset[i] * unit[i];
                a[i] = (room.low[i] - forecast[i] - moved) * inverse[i];
                b[i] = (room.high[i] - forecast[i] - moved) * inverse[i];
                bins[i] = (room.low[i] - room.high[i]) * inverse[i];
            }
            for i in 0..LANES {
                let mass = portable::ln(mass(bin(bins[i])));
                term[i] = weights[c][i] + log_sigmoid(b[i]) + log_sigmoid(-a[i]) + mass;
            }
        }
        let mut log_total = [0.0; LANES];
        log_sum_exp(weights, &mut room.top[0], &mut room.sum[0], &mut log_total);
        log_sum_exp(&room.term, &mut room.top[1], &mut room.sum[1], &mut room.out);
        for (out, log_total) in room.out.iter_mut().zip(log_total) {
            *out = log_total - *out;
        }
    }
}

wide_loop! {
    /// After [`forward`]: the head becomes its gradient; `room.out` are those of the likelihoods.
    fn backward(room: &'a mut Room) {
        let k = room.a.len();
        let (weights, rest) = room.head.split_at_mut(k);
        let (offsets, log_scales) = rest.split_at_mut(k);
        for c in 0..k {
            let unit = &room.units[c * N_FORECASTS / k];
            let (offset, scale, inverse) = (&room.offset[c], &room.scale[c], &room.inverse[c]);
            let (a, b, bins, term, d) = (&room.a[c], &room.b[c], &room.bin[c], &room.term[c], &room.out);
            for i in 0..LANES {
                let share = d[i] * portable::exp(term[i] - room.top[1][i]) / room.sum[1][i];
                let weight = d[i] * portable::exp(weights[c][i] - room.top[0][i]) / room.sum[0][i];
                weights[c][i] = weight - share;
                // What ln P gains by moving an edge up: of the upper one alone, of the lower one alone, of both together.
                let (above, below) = (portable::sigmoid(-b[i]), portable::sigmoid(a[i]));
                let outside = mass(bin(bins[i]));
                let between = if bins[i] > -LEAST_BIN { 0.0 } else { (1.0 - outside) / outside };
                let mean = share * (above - below) * inverse[i];
                offsets[c][i] = mean * unit[i] * (1.0 - offset[i] * offset[i]);
                let log_scale = share * (above * b[i] - below * a[i] - between * bins[i]);
                log_scales[c][i] = log_scale * (1.0 - scale[i] * scale[i]);
            }
        }
    }
}

impl MixtureNll {
    /// Calls `then` with every [`LANES`] samples after [`forward`] of them: the room, the first one, how many there are.
    fn each(&self, head: &[f32], k: usize, mut then: impl FnMut(&mut Room, usize, usize)) {
        let mut room = Room::new(k);
        for (block, head) in head.chunks(LANES * 3 * k).enumerate() {
            room.load(head, &self.targets, block * LANES);
            forward(&mut room);
            then(&mut room, block * LANES, head.len() / (3 * k));
        }
    }
}

impl CustomOp1 for MixtureNll {
    fn name(&self) -> &'static str {
        "mixture_nll"
    }

    fn cpu_fwd(&self, head: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (width, head) = (width(layout)?, values(head, layout)?);
        let n = self.targets.low.len();
        if !width.is_multiple_of(3 * N_FORECASTS) || head.len() != n * width {
            bail!("mixture_nll: {:?} and {n} targets", layout.shape());
        }
        let mut out = vec![0.0; n];
        self.each(head, width / 3, |room, first, n| out[first..first + n].copy_from_slice(&room.out[..n]));
        Ok((CpuStorage::F32(out), n.into()))
    }

    fn bwd(&self, head: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let mut dhead = vec![0.0; head.elem_count()];
        let width = head.elem_count() / self.targets.low.len().max(1);
        {
            let dy = Values::of(&dy)?;
            self.each(&Values::of(head)?, width / 3, |room, first, n| {
                room.out[..n].copy_from_slice(&dy[first..first + n]);
                backward(room);
                for (i, row) in dhead[first * width..].chunks_exact_mut(width).take(n).enumerate() {
                    row.iter_mut().zip(&room.head).for_each(|(d, lane)| *d = lane[i]);
                }
            });
        }
        gradient(dhead, head)
    }
}
