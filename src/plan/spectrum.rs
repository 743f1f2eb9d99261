//! Turns samples into band powers, one frame per hop, and band powers into the autocorrelation they imply.

use std::f64::consts::{FRAC_PI_2, TAU};
use std::sync::{Arc, OnceLock};

use ndarray::Array2;
use rayon::prelude::*;

use super::fourier::{Fourier, Workspace};
use super::response::Response;
use super::{PlanConfig, PlanError};

/// dB per unit of a band: bands are `ln(power) / 4`.
pub const DB_PER_UNIT: f32 = 4.0 * 4.343;

pub(crate) const UNITS_PER_NEPER: f64 = 0.25;
/// Added to a band's power before its logarithm.
pub(crate) const FLOOR: f64 = 1e-4;
/// Bands are a quarter tone apart, or a bin of the transform where that is more.
const BANDS_PER_OCTAVE: f64 = 24.0;

/// The plan's analysis: triangular bands over the power spectrum of the `window` samples that end with a frame.
#[derive(Clone)]
pub struct Spectrum {
    sample_rate: u32,
    hop: usize,
    /// Rises as a sine until the frame's hop begins, falls as a cosine over it.
    window: Vec<f64>,
    /// Energy of the window.
    energy: f64,
    /// Hz.
    centres: Vec<f64>,
    grid: Grid,
    /// Made when first asked for.
    response: Arc<OnceLock<Arc<Response>>>,
}

/// The bands over the bins of a transform of one length.
#[derive(Clone)]
pub(crate) struct Grid {
    /// Per band: its first bin and the weights from there on, which sum to 1.
    bands: Vec<(usize, Vec<f64>)>,
    /// Per bin: the two bands it lies between and the weight of the upper one.
    pub bins: Vec<(usize, usize, f64)>,
    pub fourier: Fourier,
}

impl Grid {
    /// Of a transform of `len` samples at `sample_rate` Hz; the lowest band reaches `step_hz` below its centre.
    fn new(centres: &[f64], step_hz: f64, sample_rate: f64, len: usize) -> Self {
        let (bin_hz, n_bins) = (sample_rate / len as f64, len / 2 + 1);
        Self {
            bands: (0..centres.len()).map(|band| triangle(centres, step_hz, band, bin_hz, n_bins)).collect(),
            bins: (0..n_bins).map(|bin| neighbours(centres, bin as f64 * bin_hz)).collect(),
            fourier: Fourier::new(len),
        }
    }

    /// Per band: its first bin and the weights from there on.
    pub fn bands(&self) -> &[(usize, Vec<f64>)] {
        &self.bands
    }

    /// Mean power of each band, from the power of each bin.
    pub fn powers(&self, bins: &[f64]) -> impl Iterator<Item = f64> {
        let mean = |(first, weights): &(usize, Vec<f64>)| weights.iter().zip(&bins[*first..]).map(|(w, p)| w * p).sum();
        self.bands.iter().map(mean)
    }

    /// For each bin what lies between two values of bands, linear over ln f.
    pub fn interpolate(&self, bands: &[f64]) -> impl Iterator<Item = f64> {
        self.bins.iter().map(|&(below, above, weight)| bands[below] * (1.0 - weight) + bands[above] * weight)
    }
}

impl Spectrum {
    /// White noise that keeps the predictor of a plan finite: relative to the power, and absolute.
    pub const WHITE: (f64, f64) = (1e-7, 1e-8);

    /// The analysis of sound at `sample_rate` Hz.
    ///
    /// # Errors
    /// When the settings cannot be, see [`PlanConfig::validate`].
    pub fn new(sample_rate: u32, config: &PlanConfig) -> Result<Self, PlanError> {
        config.validate(sample_rate)?;
        let (rise, hop) = (config.window - config.hop, config.hop);
        let ramp = |n: usize| (0..n).map(move |i| FRAC_PI_2 * (i as f64 + 0.5) / n as f64);
        let window: Vec<f64> = ramp(rise).map(f64::sin).chain(ramp(hop).map(f64::cos)).collect();
        let bin_hz = f64::from(sample_rate) / config.window as f64;
        let centres = band_centres(config, bin_hz);
        Ok(Self {
            sample_rate,
            hop,
            energy: window.iter().map(|w| w * w).sum(),
            grid: Grid::new(&centres, bin_hz, sample_rate.into(), window.len()),
            window,
            centres,
            response: Arc::default(),
        })
    }

    /// This analysis as a linear map of spectra twice as fine as its own transform.
    pub(crate) fn response(&self) -> Arc<Response> {
        let make = || {
            let step_hz = f64::from(self.sample_rate) / self.window.len() as f64;
            let grid = Grid::new(&self.centres, step_hz, self.sample_rate.into(), 2 * self.window.len());
            Arc::new(Response::new(grid, &self.window))
        };
        self.response.get_or_init(make).clone()
    }

    /// Bands per frame.
    pub fn n_bands(&self) -> usize {
        self.centres.len()
    }

    /// Centre of each band, Hz, rising.
    pub fn centres_hz(&self) -> &[f64] {
        &self.centres
    }

    /// Samples per frame.
    pub fn hop(&self) -> usize {
        self.hop
    }

    /// Of the window's energy, what lies on a frame's own samples.
    pub(crate) fn own_share(&self) -> f64 {
        let first = self.window.len() - self.hop;
        self.window[first..].iter().map(|w| w * w).sum::<f64>() / self.energy
    }

    /// Samples a second, Hz.
    pub fn sample_rate(&self) -> u32 {
        self.sample_rate
    }

    /// The plan of mono samples: `[samples.len() / hop, n_bands]`, `ln(power + 1e-4) / 4`.
    ///
    /// Frame k is a function of the samples before `(k + 1) * hop` only; before the first there is silence.
    pub fn analyse(&self, samples: &[f32]) -> Array2<f32> {
        let mut plan = Array2::zeros((samples.len() / self.hop, self.n_bands()));
        if let Some(rows) = plan.as_slice_mut() {
            rows.par_chunks_exact_mut(self.n_bands()).enumerate().for_each_init(
                || self.grid.fourier.workspace(),
                |work, (frame, bands)| self.analyse_frame(&samples[..(frame + 1) * self.hop], work, bands),
            );
        }
        plan
    }

    /// What the samples of a frame are multiplied with, `[window_len]`.
    pub(crate) fn window(&self) -> &[f64] {
        &self.window
    }

    /// Energy of the window.
    pub(crate) fn energy(&self) -> f64 {
        self.energy
    }

    /// Samples that a frame is computed from.
    pub fn window_len(&self) -> usize {
        self.window.len()
    }

    /// Plan frames that a window spans.
    pub fn window_frames(&self) -> usize {
        self.window_len().div_ceil(self.hop())
    }

    /// The plan frame that ends with the samples `heard`, `[n_bands]`; before them there is silence.
    pub fn analyse_last(&self, heard: &[f32]) -> Vec<f32> {
        let mut bands = vec![0.0; self.n_bands()];
        self.analyse_frame(heard, &mut self.grid.fourier.workspace(), &mut bands);
        bands
    }

    /// The plan frame of silence, `[n_bands]`.
    pub fn silent_frame(&self) -> Vec<f32> {
        vec![(FLOOR.ln() * UNITS_PER_NEPER) as f32; self.n_bands()]
    }

    /// The frame that ends with `heard`.
    fn analyse_frame(&self, heard: &[f32], work: &mut Workspace, bands: &mut [f32]) {
        let recent = &heard[heard.len().saturating_sub(self.window.len())..];
        let (silent, sounding) = work.block.split_at_mut(self.window.len() - recent.len());
        silent.fill(0.0);
        let window = &self.window[silent.len()..];
        for ((y, &x), w) in sounding.iter_mut().zip(recent).zip(window) {
            *y = f64::from(x) * w;
        }
        self.grid.fourier.power(work);
        for (band, power) in bands.iter_mut().zip(self.grid.powers(&work.power)) {
            *band = ((power + FLOOR).ln() * UNITS_PER_NEPER) as f32;
        }
    }

    /// Per bin of the spectrum that a frame's bands describe: the two bands that it lies between and the weight of the
    /// upper one.
    pub fn interpolation(&self) -> &[(usize, usize, f64)] {
        &self.grid.bins
    }

    /// What lags `0..=order` of a frame's spectrum are multiplied with: a Gaussian that blurs the spectrum by
    /// `lag_window_hz`, and the part of a sample in the window's energy.
    pub fn lag_window(&self, order: usize, lag_window_hz: f64) -> impl Iterator<Item = f64> {
        let blur = TAU * lag_window_hz / f64::from(self.sample_rate);
        (0..=order).map(move |lag| (-0.5 * (blur * lag as f64).powi(2)).exp() / self.energy)
    }

    /// Autocorrelation of the sound that a frame's bands describe, lags `0..=order`, per sample.
    ///
    /// ln power is interpolated between bands over ln f; `lag_window_hz` blurs the spectrum by a Gaussian of this
    /// standard deviation; a trace of white noise keeps the result positive definite.
    ///
    /// # Errors
    /// When `bands` is no frame of this plan, or the window determines fewer than `order` lags.
    pub fn autocorrelation(&self, bands: &[f32], order: usize, lag_window_hz: f64) -> Result<Vec<f64>, PlanError> {
        let mut room = Autocorrelation::default();
        self.autocorrelation_into(bands, order, lag_window_hz, &mut room)?;
        Ok(room.lags)
    }

    /// [`autocorrelation`](Self::autocorrelation) in room that is there already.
    pub(crate) fn autocorrelation_into<'a>(
        &self,
        bands: &[f32],
        order: usize,
        lag_window_hz: f64,
        room: &'a mut Autocorrelation,
    ) -> Result<&'a [f64], PlanError> {
        if bands.len() != self.n_bands() {
            return Err(PlanError::BandCount { expected: self.n_bands(), got: bands.len() });
        }
        if order > self.window.len() / 2 {
            return Err(PlanError::Order { order, window: self.window.len() });
        }
        let Autocorrelation { work, lags } = room;
        let work = match work {
            Some(work) if work.block.len() == self.window.len() => work,
            _ => work.insert(self.grid.fourier.workspace()),
        };
        for (power, &(below, above, weight)) in work.power.iter_mut().zip(&self.grid.bins) {
            let band = f64::from(bands[below]) * (1.0 - weight) + f64::from(bands[above]) * weight;
            *power = (band / UNITS_PER_NEPER).exp();
        }
        self.grid.fourier.autocorrelation(work);
        self.lags_into(&work.block, order, lag_window_hz, lags);
        Ok(lags)
    }

    /// Lags `0..=order` of a transform's autocorrelation, blurred and per sample, with the trace of white noise.
    pub(crate) fn lags_into(&self, r: &[f64], order: usize, lag_window_hz: f64, lags: &mut Vec<f64>) {
        lags.clear();
        lags.extend(self.lag_window(order, lag_window_hz).zip(r).map(|(w, r)| w * r));
        lags[0] = lags[0] * (1.0 + Self::WHITE.0) + Self::WHITE.1;
    }
}

/// Room for [`Spectrum::autocorrelation_into`], of whatever spectrum.
#[derive(Clone, Default)]
pub(crate) struct Autocorrelation {
    work: Option<Workspace>,
    lags: Vec<f64>,
}

/// Centres of the bands, Hz.
fn band_centres(config: &PlanConfig, bin_hz: f64) -> Vec<f64> {
    let spacing = BANDS_PER_OCTAVE.recip().exp2();
    std::iter::successors(Some(config.lowest_hz), |&hz| Some((hz * spacing).max(hz + bin_hz)))
        .take_while(|&hz| hz < config.highest_hz)
        .collect()
}

/// Weights of a band: a triangle over the bins between its neighbours' centres (the lowest: `step_hz` below), of sum 1.
fn triangle(centres: &[f64], step_hz: f64, band: usize, bin_hz: f64, n_bins: usize) -> (usize, Vec<f64>) {
    let centre = centres[band];
    let low = if band == 0 { centre - step_hz } else { centres[band - 1] };
    let high = centres.get(band + 1).copied().unwrap_or(centre * 1.03);
    let weight = |bin: usize| {
        let hz = bin as f64 * bin_hz;
        ((hz - low) / (centre - low)).min((high - hz) / (high - centre)).max(0.0)
    };
    let bins = (low / bin_hz).max(0.0) as usize..n_bins.min((high / bin_hz) as usize + 1);
    let inside: Vec<(usize, f64)> = bins.map(|bin| (bin, weight(bin))).filter(|&(_, weight)| weight > 0.0).collect();
    let sum: f64 = inside.iter().map(|(_, weight)| weight).sum();
    match inside.first() {
        Some(&(first, _)) => (first, inside.iter().map(|(_, weight)| weight / sum).collect()),
        // Narrower than a bin and between two: the nearest one.
        None => (((centre / bin_hz).round() as usize).min(n_bins - 1), vec![1.0]),
    }
}

/// The bands that a bin lies between, and how far towards the upper one it is over ln f.
fn neighbours(centres: &[f64], hz: f64) -> (usize, usize, f64) {
    let hz = hz.max(1.0);
    match centres.partition_point(|&centre| centre < hz) {
        0 => (0, 0, 0.0),
        above if above == centres.len() => (above - 1, above - 1, 0.0),
        above => {
            let (low, high) = (centres[above - 1].ln(), centres[above].ln());
            (above - 1, above, (hz.ln() - low) / (high - low))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..n).map(|_| 0.1 * rng.normal()).collect()
    }

    fn small() -> PlanConfig {
        PlanConfig { hop: 48, window: 256, lowest_hz: 100.0, highest_hz: 7000.0, ..PlanConfig::default() }
    }

    #[test]
    fn default_plan_has_148_bands() {
        let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
        assert_eq!((spectrum.n_bands(), spectrum.hop()), (148, 512));
    }

    #[test]
    fn bands_are_weighted_means_of_a_plain_dft() {
        let (config, rate) = (small(), 16_000);
        let spectrum = Spectrum::new(rate, &config).unwrap();
        let samples = noise(10 * config.hop + 5, 1);
        let plan = spectrum.analyse(&samples);
        assert_eq!(plan.dim(), (10, spectrum.n_bands()));
        let bin_hz = f64::from(rate) / config.window as f64;
        let centres = band_centres(&config, bin_hz);
        for (frame, band) in [(0, 0), (0, 7), (3, 1), (9, 20), (9, spectrum.n_bands() - 1)] {
            let end = (frame + 1) * config.hop;
            let power = |bin: usize| {
                let (mut re, mut im) = (0.0, 0.0);
                for i in 0..config.window {
                    let Some(t) = (end + i).checked_sub(config.window) else {
                        continue;
                    };
                    let rise = config.window - config.hop;
                    let window = if i < rise {
                        (FRAC_PI_2 * (i as f64 + 0.5) / rise as f64).sin()
                    } else {
                        (FRAC_PI_2 * ((i - rise) as f64 + 0.5) / config.hop as f64).cos()
                    };
                    let angle = TAU * (bin * i) as f64 / config.window as f64;
                    re += window * f64::from(samples[t]) * angle.cos();
                    im -= window * f64::from(samples[t]) * angle.sin();
                }
                re * re + im * im
            };
            let low = if band > 0 { centres[band - 1] } else { centres[0] - bin_hz };
            let high = *centres.get(band + 1).unwrap_or(&(centres[band] * 1.03));
            let (mut sum, mut weights) = (0.0, 0.0);
            for bin in 0..=config.window / 2 {
                let hz = bin as f64 * bin_hz;
                let up = (hz - low) / (centres[band] - low);
                let down = (high - hz) / (high - centres[band]);
                let weight = up.min(down).max(0.0);
                sum += weight * power(bin);
                weights += weight;
            }
            let expected = (sum / weights + 1e-4).ln() / 4.0;
            let got = f64::from(plan[[frame, band]]);
            assert!((got - expected).abs() < 1e-6, "frame {frame}, band {band}: {got}, expected {expected}");
        }
    }

    #[test]
    fn a_frame_hears_nothing_after_its_end() {
        let spectrum = Spectrum::new(16_000, &small()).unwrap();
        let hop = spectrum.hop();
        let samples = noise(12 * hop, 2);
        let before = spectrum.analyse(&samples);
        for t in [0, 5 * hop - 1, 5 * hop, 7 * hop + 13] {
            let mut changed = samples.clone();
            changed[t] += 0.5;
            let after = spectrum.analyse(&changed);
            for frame in 0..12 {
                let same = before.row(frame) == after.row(frame);
                let hears = frame == t / hop || (frame > t / hop && (frame + 1) * hop <= t + 256);
                assert_eq!(same, !hears, "sample {t}, frame {frame}");
            }
        }
    }

    #[test]
    fn a_longer_excerpt_begins_with_the_plan_of_a_shorter() {
        let spectrum = Spectrum::new(16_000, &small()).unwrap();
        let samples = noise(500, 3);
        let (all, some) = (spectrum.analyse(&samples), spectrum.analyse(&samples[..301]));
        assert_eq!(some, all.slice_axis(ndarray::Axis(0), (..6).into()));
        assert_eq!(spectrum.analyse(&[]).dim(), (0, spectrum.n_bands()));
    }

    #[test]
    fn autocorrelation_is_the_cosine_sum_of_the_bins() {
        let (config, rate) = (small(), 16_000);
        let spectrum = Spectrum::new(rate, &config).unwrap();
        let bands: Vec<f32> = (0..spectrum.n_bands()).map(|i| (i as f32 * 0.7).sin() - 0.5).collect();
        let bin_hz = f64::from(rate) / config.window as f64;
        let centres = band_centres(&config, bin_hz);
        let log_power = |hz: f64| {
            let above = centres.iter().position(|&centre| centre >= hz).unwrap_or(centres.len());
            let at = |band: usize| 4.0 * f64::from(bands[band]);
            if above == 0 || above == centres.len() {
                return at(above.min(centres.len() - 1));
            }
            let part = (hz / centres[above - 1]).ln() / (centres[above] / centres[above - 1]).ln();
            at(above - 1) * (1.0 - part) + at(above) * part
        };
        let n = config.window;
        let got = spectrum.autocorrelation(&bands, 40, 30.0).unwrap();
        for (lag, &got) in got.iter().enumerate() {
            let bin = |j: usize| log_power((j.min(n - j) as f64 * bin_hz).max(1.0)).exp();
            let sum: f64 = (0..n).map(|j| bin(j) * (TAU * (j * lag) as f64 / n as f64).cos()).sum();
            let blur = (-0.5 * (TAU * 30.0 * lag as f64 / f64::from(rate)).powi(2)).exp();
            let mut expected = sum / n as f64 / spectrum.energy * blur;
            if lag == 0 {
                expected = expected * (1.0 + 1e-7) + 1e-8;
            }
            assert!((got - expected).abs() < 1e-12, "lag {lag}: {got}, expected {expected}");
        }
    }

    #[test]
    fn frames_of_another_plan_are_refused() {
        let spectrum = Spectrum::new(16_000, &small()).unwrap();
        let n_bands = spectrum.n_bands();
        let too_few = spectrum.autocorrelation(&vec![0.0; n_bands - 1], 16, 4.0);
        assert_eq!(too_few, Err(PlanError::BandCount { expected: n_bands, got: n_bands - 1 }));
        let too_many_lags = spectrum.autocorrelation(&vec![0.0; n_bands], 129, 4.0);
        assert_eq!(too_many_lags, Err(PlanError::Order { order: 129, window: 256 }));
        assert!(Spectrum::new(8_000, &PlanConfig::default()).is_err());
    }
}
