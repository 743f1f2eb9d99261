//! Resamples a recorded note by any ratio: band-limited interpolation with a Kaiser-windowed sinc.
//!
//! Changing the rate and shifting the pitch are one step here, so a note is filtered once and nothing aliases
//! into the lower 97 % of the new band. (The library's resampler takes whole rates; a semitone is no ratio of them.) Method: J. O. Smith, "Digital Audio Resampling"; window: Kaiser 1974.

/// Table rows between two input samples; between rows the kernel is interpolated linearly (error below -100 dB).
const N_PHASES: usize = 256;
/// Kaiser window for 80 dB of stop band.
const BETA: f64 = 7.857;
/// Pass band and stop band edges as fractions of the narrower Nyquist frequency.
const PASS: f64 = 0.935;
const STOP: f64 = 1.03;

/// A resampler for one ratio.
pub struct Resampler {
    /// Input samples per output sample.
    step: f64,
    /// Row `p` holds the kernel for a position `p / N_PHASES` after an input sample. // [N_PHASES + 1, n_taps]
    kernels: Vec<f32>,
    n_taps: usize,
}

impl Resampler {
    /// `step` input samples become one output sample.
    pub fn new(step: f64) -> Self {
        let band = (1.0 / step).min(1.0);
        let cutoff = band * (PASS + STOP) / 2.0;
        // Kaiser's formula for the length at 80 dB, rounded up to whole vectors.
        let n_taps = ((80.0 - 7.95) / (2.285 * std::f64::consts::PI * band * (STOP - PASS))).ceil() as usize;
        let n_taps = n_taps.next_multiple_of(16);
        let half = n_taps as f64 / 2.0;
        let mut kernels = Vec::with_capacity((N_PHASES + 1) * n_taps);
        for phase in 0..=N_PHASES {
            let fraction = phase as f64 / N_PHASES as f64;
            kernels.extend((0..n_taps).map(|tap| {
                let x = tap as f64 - (half - 1.0) - fraction;
                let window = (1.0 - (x / half).powi(2)).max(0.0).sqrt();
                (cutoff * sinc(cutoff * x) * bessel_i0(BETA * window) / bessel_i0(BETA)) as f32
            }));
        }
        Self { step, kernels, n_taps }
    }

    /// The samples at the new rate; output `i` lies at input position `i * step`.
    pub fn resample(&self, samples: &[f32]) -> Vec<f32> {
        let before = self.n_taps / 2 - 1;
        let mut padded = vec![0.0; before];
        padded.extend_from_slice(samples);
        padded.resize(before + samples.len() + self.n_taps, 0.0);
        let n_out = (samples.len() as f64 / self.step).ceil() as usize;
        (0..n_out)
            .map(|i| {
                let position = i as f64 * self.step;
                let phase = position.fract() * N_PHASES as f64;
                let row = &self.kernels[phase as usize * self.n_taps..][..2 * self.n_taps];
                let (near, far) = row.split_at(self.n_taps);
                dot_between(&padded[position as usize..][..self.n_taps], near, far, phase.fract() as f32)
            })
            .collect()
    }
}

/// Dot product of `x` with the row a `fraction` of the way from `near` to `far`.
fn dot_between(x: &[f32], near: &[f32], far: &[f32], fraction: f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    for ((x, near), far) in x.chunks_exact(LANES).zip(near.chunks_exact(LANES)).zip(far.chunks_exact(LANES)) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * (near[lane] + fraction * (far[lane] - near[lane]));
        }
    }
    sums.iter().sum()
}

fn sinc(x: f64) -> f64 {
    let angle = std::f64::consts::PI * x;
    if angle.abs() < 1e-9 { 1.0 } else { angle.sin() / angle }
}

/// Modified Bessel function of the first kind and order 0, by its power series.
fn bessel_i0(x: f64) -> f64 {
    let (mut sum, mut term) = (1.0, 1.0);
    for k in 1..60 {
        term *= (x / (2.0 * f64::from(k))).powi(2);
        sum += term;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(hz: f64, rate: f64, n: usize) -> Vec<f32> {
        (0..n).map(|i| (std::f64::consts::TAU * hz / rate * i as f64).sin() as f32).collect()
    }

    fn rms(samples: &[f32]) -> f64 {
        (samples.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / samples.len() as f64).sqrt()
    }

    #[test]
    fn a_tone_moves_by_the_ratio_and_keeps_its_level() {
        for semitones in [-1.0, 0.0, 1.0] {
            let ratio = 2f64.powf(semitones / 12.0);
            let shifted = Resampler::new(44_100.0 * ratio / 16_000.0).resample(&tone(1000.0, 44_100.0, 22_050));
            let wanted = tone(1000.0 * ratio, 16_000.0, shifted.len());
            let error: Vec<f32> = shifted.iter().zip(&wanted).map(|(a, b)| a - b).collect();
            let middle = 400..shifted.len() - 400;
            let error_db = 20.0 * (rms(&error[middle.clone()]) / rms(&wanted[middle])).log10();
            assert!(error_db < -70.0, "{semitones} semitones: {error_db:.1} dB");
        }
    }

    #[test]
    fn what_lies_above_the_new_band_is_gone() {
        for hz in [8_300.0, 9_000.0, 12_000.0, 20_000.0] {
            let output = Resampler::new(44_100.0 / 16_000.0).resample(&tone(hz, 44_100.0, 44_100));
            let level_db = 20.0 * rms(&output[400..output.len() - 400]).log10();
            assert!(level_db < -75.0, "{hz} Hz: {level_db:.1} dB");
        }
    }
}
