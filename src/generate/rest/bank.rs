//! Turns a signal into short spectra in bands and back: a filter bank whose bands above what a model hears repeat those below.

use std::f32::consts::PI;
use std::ops::Range;
use std::sync::Arc;

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

/// Length of a spectrum, seconds: short enough for attacks, long enough for bands as narrow as hearing's at the bottom.
const FRAME_S: f64 = 0.016;
/// Of a model's highest frequency, what it can be trusted to fill.
const FILLED: f64 = 15.0 / 16.0;
/// Lower edges of bands, Hz, about as wide as the ear's (E. Zwicker, 1961), two spectral lines at least.
const EDGES_HZ: [f64; 24] = [
    0.0, 150.0, 300.0, 450.0, 600.0, 770.0, 920.0, 1080.0, 1270.0, 1480.0, 1720.0, 2000.0, 2320.0, 2700.0, 3150.0,
    3700.0, 4400.0, 5300.0, 6400.0, 9000.0, 11_000.0, 13_500.0, 16_000.0, 19_000.0,
];
/// Lower edges of what the levels of the rest are told by, as shares of what the model fills.
const GROUPS: [f64; 6] = [0.0, 0.067, 0.133, 0.267, 0.533, 0.747];

/// Sine windows on both sides that overlap by half: without change in between, what goes in comes out (Princen and Bradley, 1986).
pub struct Bank {
    window: Vec<f32>,
    /// Lines of each band; the first `n_filled` are what the model fills.
    bands: Vec<Range<usize>>,
    n_filled: usize,
    /// The first line above them, and how far lines are moved up at a time: by an even number, so that they go on from frame to frame.
    top: usize,
    shift: usize,
    groups: Vec<Range<usize>>,
    forward: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
}

/// Half a frame's spectrum, `n / 2 + 1` lines.
pub type Lines = Vec<Complex<f32>>;

impl Bank {
    /// For signals at `sample_rate` Hz of which a model at `model_rate` Hz fills the lower part.
    pub fn new(sample_rate: u32, model_rate: u32) -> Self {
        let rate = f64::from(sample_rate);
        let n = 4 * ((FRAME_S * rate / 4.0).round() as usize).max(4);
        let line = |hz: f64| ((hz * n as f64 / rate).round() as usize).min(n / 2 + 1);
        let top_hz = FILLED * 0.5 * f64::from(model_rate);
        let top = line(top_hz);
        let edges: Vec<usize> = EDGES_HZ.into_iter().map(line).collect();
        let mut bands = split(0..top, &edges);
        let n_filled = bands.len();
        bands.extend(split(top..n / 2 + 1, &edges));
        let starts: Vec<usize> = GROUPS.iter().map(|share| line(share * top_hz)).collect();
        let mut planner = RealFftPlanner::new();
        Self {
            window: (0..n).map(|i| (PI * (i as f32 + 0.5) / n as f32).sin()).collect(),
            bands,
            n_filled,
            top,
            shift: (top / 4 * 2).max(2),
            groups: split(0..top, &starts),
            forward: planner.plan_fft_forward(n),
            inverse: planner.plan_fft_inverse(n),
        }
    }

    /// Samples that a spectrum is of.
    pub fn n(&self) -> usize {
        self.window.len()
    }

    /// Samples from one spectrum to the next.
    pub fn hop(&self) -> usize {
        self.n() / 2
    }

    /// The bands, rising, each with whether the model fills it.
    pub fn bands(&self) -> impl Iterator<Item = (Range<usize>, bool)> {
        self.bands.iter().enumerate().map(|(i, lines)| (lines.clone(), i < self.n_filled))
    }

    /// Number of bands.
    pub fn n_bands(&self) -> usize {
        self.bands.len()
    }

    /// The spectrum of a frame of [`Self::n`] samples.
    pub fn analyse(&self, samples: &[f32]) -> Lines {
        let mut frame: Vec<f32> = samples.iter().zip(&self.window).map(|(x, w)| x * w).collect();
        let mut lines = self.forward.make_output_vec();
        // Fails for wrong lengths only, and these are the plan's own.
        let _ = self.forward.process(&mut frame, &mut lines);
        lines
    }

    /// The frame of a spectrum, to be added to those before and after it half a frame apart.
    pub fn synthesise(&self, mut lines: Lines) -> Vec<f32> {
        let last = lines.len() - 1;
        (lines[0].im, lines[last].im) = (0.0, 0.0);
        let mut frame = self.inverse.make_output_vec();
        let _ = self.inverse.process(&mut lines, &mut frame);
        let scale = 1.0 / self.n() as f32;
        frame.iter_mut().zip(&self.window).for_each(|(x, w)| *x *= w * scale);
        frame
    }

    /// Fills the lines that the model does not with those below, moved up as often as it takes (spectral band replication, Dietz et al., 2002).
    pub fn replicate(&self, lines: &mut Lines) {
        for k in self.top..lines.len() {
            lines[k] = lines[k - self.shift];
        }
    }

    /// What the levels of a rest are told by: logarithms of power in groups of bands that the model fills.
    pub fn features(&self, lines: &Lines) -> Vec<f64> {
        self.groups.iter().map(|group| (power(&lines[group.clone()]) + self.silence()).ln()).collect()
    }

    /// A power of lines below which there is nothing to hear: about -120 dB of full scale.
    pub fn silence(&self) -> f64 {
        1e-12 * (self.n() * self.n()) as f64
    }
}

/// `range` cut at those of `edges` that leave two lines or more on both sides.
fn split(range: Range<usize>, edges: &[usize]) -> Vec<Range<usize>> {
    let mut starts = vec![range.start];
    for &edge in edges {
        if edge >= starts[starts.len() - 1] + 2 && edge + 2 <= range.end {
            starts.push(edge);
        }
    }
    let ends = starts[1..].iter().copied().chain([range.end]);
    starts.iter().copied().zip(ends).map(|(start, end)| start..end).filter(|lines| !lines.is_empty()).collect()
}

/// Sum of squares.
pub fn power(lines: &[Complex<f32>]) -> f64 {
    lines.iter().map(|z| f64::from(z.norm_sqr())).sum()
}

/// Sum of products; real, since gains are.
pub fn inner(a: &[Complex<f32>], b: &[Complex<f32>]) -> f64 {
    let product = |x: f32, y: f32| f64::from(x) * f64::from(y);
    a.iter().zip(b).map(|(a, b)| product(a.re, b.re) + product(a.im, b.im)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn bands_lie_side_by_side_at_every_rate() {
        for (sample_rate, model_rate) in [
            (1000, 16_000),
            (8000, 16_000),
            (11_025, 16_000),
            (16_000, 16_000),
            (22_050, 16_000),
            (44_100, 16_000),
            (384_000, 16_000),
            (48_000, 24_000),
            (44_100, 8000),
        ] {
            let bank = Bank::new(sample_rate, model_rate);
            let mut end = 0;
            for (lines, _) in bank.bands() {
                assert_eq!(lines.start, end, "{sample_rate} Hz");
                end = lines.end;
            }
            assert_eq!(end, bank.n() / 2 + 1, "{sample_rate} Hz");
            let filled_hz = bank.top as f64 * f64::from(sample_rate) / bank.n() as f64;
            let expected = FILLED * 0.5 * f64::from(model_rate);
            assert!(bank.top == end || (filled_hz / expected - 1.0).abs() < 0.01, "{sample_rate} Hz: {filled_hz} Hz");
            let mut lines: Lines = (0..end).map(|k| Complex::new(k as f32, 0.0)).collect();
            bank.replicate(&mut lines);
            assert!(lines.iter().all(|line| (line.re as usize) < bank.top), "{sample_rate} Hz: {lines:?}");
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut rng = Rng::new(5);
        let bank = Bank::new(44_100, 16_000);
        let (n, hop) = (bank.n(), bank.hop());
        let samples: Vec<f32> = (0..4 * n).map(|_| rng.normal()).collect();
        let mut back = vec![0.0; samples.len()];
        for start in (0..=samples.len() - n).step_by(hop) {
            let frame = bank.synthesise(bank.analyse(&samples[start..start + n]));
            back[start..start + n].iter_mut().zip(frame).for_each(|(sum, x)| *sum += x);
        }
        for (i, (x, y)) in samples.iter().zip(&back).enumerate().skip(hop).take(samples.len() - 2 * hop) {
            assert!((x - y).abs() < 1e-4, "sample {i}: {x} and {y}");
        }
    }
}
