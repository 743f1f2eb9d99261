//! Turns a recording, and what a model hears of it, into how the rest of it follows from what the model hears.

use std::ops::Range;

use ndarray::{Array1, Array2, Axis};
use realfft::num_complex::Complex;
use serde::{Deserialize, Serialize};

use super::bank::{Bank, Lines, inner, power};
use super::decorrelator::Decorrelator;
use crate::audio::Clip;
use crate::cholesky;

/// Frames that are too few to learn from.
const LEAST_FRAMES: usize = 8;
/// Added to the squares of the features' deviations (nepers of power): as many frames of one neper that say that levels do not move.
const RIDGE: f64 = 30.0;
/// What channels do not share of their rests is rounding's below this share of the power of all.
const ROUNDING: f64 = 1e-6;
/// Mean logarithm of a line's power over the mean power, for white noise: minus Euler's constant.
const NOISE_FLATNESS: f64 = -0.5772;
/// A rest is at most so many times as powerful as the recording ever had it in a frame.
const MOST: f64 = 4.0;

/// How a recording's rest follows from what a model hears of it.
///
/// In a band that the model fills, each channel's rest is a multiple of what the model hears, and something beside it that
/// has a constant covariance between channels and a level that follows the levels of groups of bands (ridge regression of logarithms). In a band above, the
/// first is missing, and what the second is made of is the top of what the model hears, moved up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    pub(super) channels: usize,
    /// Least, mean and greatest value of each feature.
    features: Vec<[f32; 3]>,
    pub(super) bands: Vec<BandFit>,
}

/// Of one band.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BandFit {
    /// Factor of what the model hears, for each channel.
    pub(super) along: Vec<f32>,
    /// Factors of the bases for each channel, `[channels, channels]`, row by row.
    pub(super) mix: Vec<f32>,
    /// Logarithm of the factor of the mix's power: at the features' means, and by each feature.
    level: f32,
    slopes: Vec<f32>,
    /// Share of noise in the bases' power.
    pub(super) noise: f32,
    /// Greatest power of the channels together.
    most: f32,
}

/// A band of a frame.
struct Seen {
    /// Power of each basis.
    bases: Vec<f64>,
    /// Power of the rests of all channels together.
    rest: f64,
    /// Products of the channels' rests and the first basis.
    along: Vec<f64>,
}

/// A band over all frames.
struct Sums {
    frames: Vec<Seen>,
    /// Products of the channels' rests, `[channels, channels]`.
    products: Array2<f64>,
    /// Logarithms of the flatness of the rests, in the mean of the channels, and of what they would be made of, summed over frames; of bands that the model
    /// does not fill.
    flatness: [f64; 2],
}

/// The signals that rests are made of: what the model hears, and as many that go their own ways as there are channels.
pub fn bases(decorrelators: &mut [Decorrelator], sample: f32) -> impl Iterator<Item = f32> {
    std::iter::once(sample).chain(decorrelators.iter_mut().map(move |d| d.next(sample)))
}

/// The decorrelators for so many channels, at rest.
pub fn decorrelators(channels: usize, sample_rate: u32) -> Vec<Decorrelator> {
    (0..channels).map(|index| Decorrelator::new(index, sample_rate)).collect()
}

impl Fit {
    /// From a recording and, frame by frame, what a model hears of it, which goes to channel `c` times `gains[c]`.
    /// `None`: too short, or silent.
    pub fn new(clip: &Clip, heard: &[f32], gains: &[f32], model_rate: u32) -> Option<Self> {
        let bank = Bank::new(clip.sample_rate, model_rate);
        let channels = clip.channels;
        let sums = || Sums { frames: Vec::new(), products: Array2::zeros([channels; 2]), flatness: [0.0; 2] };
        let mut bands: Vec<Sums> = bank.bands().map(|_| sums()).collect();
        let mut features = Vec::new();
        let mut decorrelators = decorrelators(channels, clip.sample_rate);
        let mut last = vec![Vec::with_capacity(bank.n()); channels + 1];
        for (end, &x) in (1..=clip.n_frames()).zip(heard) {
            last.iter_mut().zip(bases(&mut decorrelators, x)).for_each(|(basis, x)| basis.push(x));
            if last[0].len() < bank.n() {
                continue;
            }
            let mut bases: Vec<Lines> = last.iter().map(|samples| bank.analyse(samples)).collect();
            last.iter_mut().for_each(|samples| drop(samples.drain(..bank.hop())));
            if power(&bases[0]) < bank.silence() {
                continue;
            }
            features.push(bank.features(&bases[0]));
            bases.iter_mut().for_each(|lines| bank.replicate(lines));
            let frame = end - bank.n()..end;
            let of = |c: usize| clip.samples[frame.start * channels..].iter().skip(c).step_by(channels);
            let rest = |(c, gain)| of(c).zip(&heard[frame.clone()]).map(|(x, y)| x - gain * y).collect::<Vec<f32>>();
            let rests: Vec<Lines> = gains.iter().enumerate().map(rest).map(|samples| bank.analyse(&samples)).collect();
            for (sums, (lines, filled)) in bands.iter_mut().zip(bank.bands()) {
                sums.add(&bases, &rests, lines, filled);
            }
        }
        if features.len() < LEAST_FRAMES {
            return None;
        }
        let n = features.len() as f64;
        let range = |i: usize| {
            let values = || features.iter().map(|frame| frame[i]);
            [values().fold(f64::MAX, f64::min), values().sum::<f64>() / n, values().fold(f64::MIN, f64::max)]
        };
        let ranges: Vec<[f64; 3]> = (0..features[0].len()).map(range).collect();
        let deviations = Array2::from_shape_fn((features.len(), ranges.len()), |(t, i)| features[t][i] - ranges[i][1]);
        let silence = bank.silence();
        let fits = bands.iter().zip(bank.bands()).map(|(sums, (_, filled))| sums.fit(filled, &deviations, silence));
        Some(Self {
            channels,
            bands: fits.collect(),
            features: ranges.iter().map(|range| range.map(|x| x as f32)).collect(),
        })
    }

    /// How far features lie from their means, held to where the recording had them.
    pub(super) fn deviations(&self, features: &[f64]) -> Vec<f32> {
        let held = |(&x, &[least, mean, most]): (&f64, &[f32; 3])| (x as f32).clamp(least, most) - mean;
        features.iter().zip(&self.features).map(held).collect()
    }

    /// Whether it is of so many channels, and for such spectra.
    pub(super) fn fits(&self, channels: usize, bank: &Bank) -> bool {
        let n_features = bank.features(&vec![Default::default(); bank.hop() + 1]).len();
        self.channels == channels
            && self.bands.len() == bank.n_bands()
            && self.features.len() == n_features
            && self.features.iter().all(|[least, _, most]| least <= most)
            && self.bands.iter().all(|band| {
                band.along.len() == channels
                    && band.mix.len() == channels * channels
                    && band.slopes.len() == n_features
                    && (0.0..=1.0).contains(&band.noise)
            })
    }
}

impl BandFit {
    /// Factors of [`Self::along`] and of [`Self::mix`] in a frame whose features deviate so, given the powers of the bases.
    pub(super) fn gains(&self, deviations: &[f32], first: f64, bases: &[f64]) -> (f32, f32) {
        let square = |x: f32| f64::from(x * x);
        let level = self.level + self.slopes.iter().zip(deviations).map(|(a, b)| a * b).sum::<f32>();
        let gain = f64::from(0.5 * level).exp();
        let along: f64 = self.along.iter().map(|&x| square(x)).sum();
        let mixed: f64 =
            self.mix.chunks_exact(bases.len()).flat_map(|row| row.iter().zip(bases)).map(|(&x, p)| square(x) * p).sum();
        let power = along * first + gain * gain * mixed;
        let held = (MOST * f64::from(self.most) / power.max(f64::MIN_POSITIVE)).sqrt().min(1.0);
        (held as f32, (held * gain) as f32)
    }
}

impl Sums {
    fn add(&mut self, bases: &[Lines], rests: &[Lines], lines: Range<usize>, filled: bool) {
        let of = |spectrum: &Lines| power(&spectrum[lines.clone()]);
        let product = |a: &Lines, b: &Lines| inner(&a[lines.clone()], &b[lines.clone()]);
        for ((i, j), sum) in self.products.indexed_iter_mut() {
            *sum += product(&rests[i], &rests[j]);
        }
        if !filled {
            self.flatness[0] +=
                rests.iter().map(|rest| log_flatness(&rest[lines.clone()])).sum::<f64>() / rests.len() as f64;
            self.flatness[1] += log_flatness(&bases[0][lines.clone()]);
        }
        self.frames.push(Seen {
            bases: bases.iter().map(of).collect(),
            rest: rests.iter().map(of).sum(),
            along: rests.iter().map(|rest| product(rest, &bases[0])).collect(),
        });
    }

    /// `deviations` of the features: `[n_frames, n_features]`.
    fn fit(&self, filled: bool, deviations: &Array2<f64>, silence: f64) -> BandFit {
        let channels = self.products.nrows();
        let sum = |of: &dyn Fn(&Seen) -> f64| self.frames.iter().map(of).sum::<f64>();
        let first_power = sum(&|seen| seen.bases[0]);
        let along = Array1::from_shape_fn(channels, |c| {
            if filled { sum(&|seen| seen.along[c]) / (first_power + silence) } else { 0.0 }
        });
        // What is beside it, and a root of that: as many bases as there are channels, each of power one.
        let beside = |(i, j): (usize, usize)| self.products[[i, j]] - along[i] * along[j] * first_power;
        let covariance = Array2::from_shape_fn([channels; 2], beside);
        let least = ROUNDING * covariance.diag().sum().max(silence);
        let mut mix = cholesky::factor(covariance, least);
        let skipped = usize::from(filled);
        for (j, mut column) in mix.columns_mut().into_iter().enumerate() {
            column /= (sum(&|seen| seen.bases[j + skipped]) + silence).sqrt();
        }
        let shares: Vec<f64> = mix.columns().into_iter().map(|column| column.dot(&column)).collect();
        let made = |seen: &Seen| shares.iter().zip(&seen.bases[skipped..]).map(|(a, b)| a * b).sum::<f64>();
        let own = |seen: &Seen| {
            let products: f64 = along.iter().zip(&seen.along).map(|(a, b)| a * b).sum();
            (seen.rest - 2.0 * products + along.dot(&along) * seen.bases[0]).max(0.0)
        };
        let n = self.frames.len() as f64;
        // A frame counts by its amplitude: what is loud is to be right.
        let weights = Array1::from_iter(self.frames.iter().map(|seen| (own(seen) + silence).sqrt()));
        let weights = &weights * (n / weights.sum());
        let ratio = |seen: &Seen| ((own(seen) + silence) / (made(seen) + silence)).ln();
        let ratios = Array1::from_iter(self.frames.iter().map(ratio));
        let about = deviations - &(weights.dot(deviations) / n);
        let ratios = &ratios - weights.dot(&ratios) / n;
        let mut squares = about.t().dot(&(&about * &weights.view().insert_axis(Axis(1))));
        squares.diag_mut().iter_mut().for_each(|x| *x += RIDGE);
        let products = about.t().dot(&(ratios * weights));
        let slopes = cholesky::solve(squares, products.insert_axis(Axis(1))).remove_axis(Axis(1));
        let factors = deviations.dot(&slopes).mapv(f64::exp);
        let told: f64 = self.frames.iter().zip(&factors).map(|(seen, factor)| factor * made(seen)).sum();
        let [rests, bases] = self.flatness.map(|sum| sum / n);
        BandFit {
            along: along.iter().map(|&x| x as f32).collect(),
            mix: mix.iter().map(|&x| x as f32).collect(),
            level: ((sum(&own) + silence) / (told + silence)).ln() as f32,
            slopes: slopes.iter().map(|&x| x as f32).collect(),
            // Noise of a share fills the valleys of a spectrum up to that share.
            noise: if filled || bases >= rests { 0.0 } else { (rests - NOISE_FLATNESS).exp().min(1.0) as f32 },
            most: self.frames.iter().map(|seen| seen.rest).fold(0.0, f64::max) as f32,
        }
    }
}

/// Logarithm of the ratio of the geometric and the arithmetic mean of lines' powers (spectral flatness); 0 for silence.
fn log_flatness(lines: &[Complex<f32>]) -> f64 {
    let mean = power(lines) / lines.len() as f64;
    if mean < f64::from(f32::MIN_POSITIVE) {
        return 0.0;
    }
    lines.iter().map(|z| (f64::from(z.norm_sqr()) / mean + 1e-6).ln()).sum::<f64>() / lines.len() as f64
}
