//! Turns samples into the statistics by which two collections of music are compared: timbre, onsets, rhythm, harmony.
//!
//! Nothing here needs a reference that is aligned in time: a continuation may play other notes than the recording did, and
//! is still judged by whether it moves like music.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use serde::Serialize;

use super::{correlation, median};
use crate::plan::fourier::{Fourier, Workspace};

/// Samples per frame of timbre and onsets at 16 kHz: 64 ms.
const FRAME: usize = 1024;
const HOP: usize = 256;
/// Samples per frame of harmony: lines 8 Hz apart are told from each other at 16 kHz.
const LONG_FRAME: usize = 4096;
const LONG_HOP: usize = 1024;
const N_MELS: usize = 64;
/// Added to a mel band's power, full scale squared, before its logarithm (-80 dB).
const MEL_FLOOR: f64 = 1e-8;
/// Range in which partials say what is played, Hz.
const CHROMA_HZ: std::ops::Range<f64> = 100.0..5000.0;
/// An onset is a peak of the rise, dB a frame on the average of all mel bands, that its surroundings stay below by this much.
const ONSET_DB: f32 = 1.5;
/// Frames before and after that an onset has to lead, 48 ms, and from which its surroundings are taken, 0.5 s.
const ONSET_LEADS: usize = 3;
const ONSET_AROUND: usize = 31;
/// Seconds in which a rhythm is looked for, and after which it may come again.
const RHYTHM_S: f32 = 4.0;
const BEAT_S: std::ops::Range<f32> = 0.2..1.5;
/// Long frames that a theme is told by, 2 s, and from one of those that are looked for to the next.
const THEME: usize = 31;
const THEME_STEP: usize = 8;
/// Long frames between two chroma vectors that are compared: 256 ms.
const CHROMA_LAG: usize = 4;

/// Statistics of one clip, means over its frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Music {
    /// Centre of gravity of the power spectrum, Hz.
    pub centroid_hz: f32,
    /// Geometric over arithmetic mean of the power spectrum, dB: white noise -2.5, music below -30.
    pub flatness_db: f32,
    /// Peaks of the spectral flux a second.
    pub onsets_per_s: f32,
    /// Entropy of the shares that the 12 pitch classes have in the power, bits: one note 0, all alike 3.6.
    pub chroma_bits: f32,
    /// Cosine distance of these shares to those 256 ms later: held chords 0.
    pub chroma_flux: f32,
    /// How regularly things begin: the peak of the autocorrelation of the spectral flux over 0.2 to 1.5 s, mean over stretches of 4 s; 1:
    /// like a clock; 0 where there is no such stretch.
    pub pulse: f32,
}

/// How much of what was before is in what comes after, means over its stretches of 4 s. Music need not stay where it was: the recordings'
/// own tell how much it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Kinship {
    /// Correlation of the autocorrelations of the spectral flux: 1 where the beat is kept.
    pub beat: f32,
    /// Cosine of the mean shares of pitch classes: 1 where the same notes sound.
    pub harmony: f32,
    /// How much of it was there before, in the prompt or since: of each 2 s the correlation with those earlier ones that are most like
    /// it, of what pitch classes sound frame by frame; 1 where all comes again note for note.
    pub themes: f32,
}

/// The statistics of `samples` at `sample_rate` Hz; zeros when there are fewer than 4096 of them.
pub fn music(samples: &[f32], sample_rate: u32) -> Music {
    if samples.len() < LONG_FRAME {
        return Music::default();
    }
    let bin_hz = f64::from(sample_rate) / FRAME as f64;
    let (mut centroids, mut flatnesses) = (Vec::new(), Vec::new());
    frames(samples, FRAME, HOP, |power| {
        let total: f64 = power.iter().sum::<f64>() + f64::MIN_POSITIVE;
        if total <= MEL_FLOOR * power.len() as f64 {
            return; // Silence is neither dull nor flat.
        }
        let moment: f64 = power.iter().enumerate().map(|(bin, p)| bin as f64 * bin_hz * p).sum();
        let log_mean = power.iter().map(|p| (p + MEL_FLOOR).ln()).sum::<f64>() / power.len() as f64;
        centroids.push((moment / total) as f32);
        flatnesses.push((4.343 * (log_mean - (total / power.len() as f64 + MEL_FLOOR).ln())) as f32);
    });
    let (chroma, flux) = (chroma(samples, sample_rate), flux(log_mel(samples, sample_rate).view()));
    let n = chroma.nrows();
    let bits = |shares: &[f32]| shares.iter().filter(|s| **s > 0.0).fold(0.0, |bits, s| bits - s * s.log2());
    let sounds = |k: &usize| chroma.row(*k).sum() > 0.0;
    let change = |k: usize| 1.0 - cosine(chroma.row(k), chroma.row(k + CHROMA_LAG));
    let changing = (0..n.saturating_sub(CHROMA_LAG)).filter(|k| sounds(k) && sounds(&(k + CHROMA_LAG)));
    Music {
        centroid_hz: mean(&centroids),
        flatness_db: mean(&flatnesses),
        onsets_per_s: onsets(&flux).len() as f32 / (samples.len() as f32 / sample_rate as f32),
        chroma_bits: mean(&(0..n).filter(sounds).map(|k| bits(&chroma.row(k).to_vec())).collect::<Vec<_>>()),
        chroma_flux: mean(&changing.map(change).collect::<Vec<_>>()),
        pulse: mean(&rhythms(&flux, sample_rate).iter().map(|r| peak(r)).collect::<Vec<_>>()),
    }
}

/// What `after` has of `before`, both at `sample_rate` Hz; zeros when one of them is shorter than 4 s.
pub fn kinship(before: &[f32], after: &[f32], sample_rate: u32) -> Kinship {
    let rhythms_of = |samples: &[f32]| rhythms(&flux(log_mel(samples, sample_rate).view()), sample_rate);
    let long = (RHYTHM_S * sample_rate as f32) as usize;
    let end = &before[before.len().saturating_sub(long)..];
    let (Some(rhythm), true) = (rhythms_of(end).pop(), after.len() >= long) else { return Kinship::default() };
    let shares = |samples: &[f32]| chroma(samples, sample_rate).mean_axis(Axis(0)).unwrap_or_default();
    let notes = shares(end);
    let kin = |stretch: &[f32]| cosine(shares(stretch).view(), notes.view());
    Kinship {
        beat: mean(&rhythms_of(after).iter().map(|r| correlation(r, &rhythm)).collect::<Vec<_>>()),
        harmony: mean(&after.chunks_exact(long).map(kin).collect::<Vec<_>>()),
        themes: themes(chroma(&[before, after].concat(), sample_rate), before.len().div_ceil(LONG_HOP)),
    }
}

/// How much of what the frames of `chroma` have from `first` on was there before.
fn themes(mut chroma: Array2<f32>, first: usize) -> f32 {
    // As vectors whose products say how alike chords are, whatever is common to all of them.
    chroma.mapv_inplace(f32::sqrt);
    let common = chroma.mean_axis(Axis(0)).unwrap_or_default();
    for mut row in chroma.rows_mut() {
        if row.sum() == 0.0 {
            continue; // Silence is like nothing, not even like silence.
        }
        row -= &common;
        row /= row.dot(&row).sqrt().max(f32::MIN_POSITIVE);
    }
    let at = |k: usize| chroma.slice(s![k..k + THEME, ..]);
    let like = |k: usize, before: usize| (&at(k) * &at(before)).sum() / THEME as f32;
    let last = (chroma.nrows() + 1).saturating_sub(THEME);
    let again = |k: usize| (0..=k - THEME).map(|before| like(k, before)).fold(-1.0, f32::max);
    mean(&(first.max(THEME)..last).step_by(THEME_STEP).map(again).collect::<Vec<_>>())
}

/// How far two sounds of one length are apart: root mean square of the difference of their log-mel spectrograms, dB; 0 when they are
/// shorter than 64 ms.
pub fn log_mel_distance_db(a: &[f32], b: &[f32], sample_rate: u32) -> f32 {
    let n = a.len().min(b.len());
    let difference = log_mel(&a[..n], sample_rate) - log_mel(&b[..n], sample_rate);
    4.343 * difference.mapv(|d| d * d).mean().unwrap_or(0.0).sqrt()
}

/// Log-mel spectrogram, nepers of power, `[n_frames, 64]`: frames of 1024 samples under a Hann window, 256 apart, triangles
/// equally spaced in mel (O'Shaughnessy, 1987) up to half the sample rate.
fn log_mel(samples: &[f32], sample_rate: u32) -> Array2<f32> {
    let mel = |hz: f64| 1127.0 * (1.0 + hz / 700.0).ln();
    let hz = |mel: f64| 700.0 * ((mel / 1127.0).exp() - 1.0);
    let bin_hz = f64::from(sample_rate) / FRAME as f64;
    let top = mel(f64::from(sample_rate) / 2.0);
    let edges: Vec<f64> = (0..N_MELS + 2).map(|i| hz(top * i as f64 / (N_MELS + 1) as f64)).collect();
    let triangle = |band: usize| -> Vec<(usize, f64)> {
        let [low, centre, high] = [edges[band], edges[band + 1], edges[band + 2]];
        let weight = |f: f64| ((f - low) / (centre - low)).min((high - f) / (high - centre));
        let within = (0..=FRAME / 2).map(|bin| (bin, weight(bin as f64 * bin_hz))).filter(|(_, w)| *w > 0.0);
        let weights: Vec<_> = within.collect();
        // Narrower than a bin and between two: the nearest one.
        if weights.is_empty() { vec![((centre / bin_hz).round() as usize, 1.0)] } else { weights }
    };
    let bands: Vec<Vec<(usize, f64)>> = (0..N_MELS).map(triangle).collect();
    let mut rows = Vec::new();
    frames(samples, FRAME, HOP, |power| {
        let band = |weights: &Vec<(usize, f64)>| {
            let sum: f64 = weights.iter().map(|(bin, w)| w * power[*bin]).sum();
            (sum / weights.iter().map(|(_, w)| w).sum::<f64>() + MEL_FLOOR).ln() as f32
        };
        rows.extend(bands.iter().map(band));
    });
    let n = rows.len() / N_MELS;
    Array2::from_shape_vec((n, N_MELS), rows).unwrap_or_default()
}

/// First and second moments of log-mel frames: what is kept of a collection of clips.
#[derive(Clone, Debug)]
pub struct Timbre {
    n_frames: usize,
    /// `[64]`
    sum: Array1<f64>,
    /// `[64, 64]`
    products: Array2<f64>,
}

impl Default for Timbre {
    fn default() -> Self {
        Self::of_frames(Array2::zeros((0, N_MELS)).view())
    }
}

impl Timbre {
    /// Of `samples` at `sample_rate` Hz.
    pub fn of(samples: &[f32], sample_rate: u32) -> Self {
        Self::of_frames(log_mel(samples, sample_rate).view())
    }

    fn of_frames(frames: ArrayView2<f32>) -> Self {
        let frames = frames.mapv(f64::from);
        Self { n_frames: frames.nrows(), sum: frames.sum_axis(Axis(0)), products: frames.t().dot(&frames) }
    }

    /// The two together.
    pub fn add(&mut self, other: &Self) {
        self.n_frames += other.n_frames;
        self.sum += &other.sum;
        self.products += &other.products;
    }

    /// Frechet distance of the two, each taken for a Gaussian (Dowson and Landau, 1982; over log-mel frames in place of an
    /// embedding's, after Kilgour et al., 2019): `|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`, nepers of power squared.
    pub fn distance(&self, other: &Self) -> f64 {
        let ((mean_a, cov_a), (mean_b, cov_b)) = (self.moments(), other.moments());
        let offset = (&mean_a - &mean_b).mapv(|d| d * d).sum();
        // tr (C C')^(1/2) is the sum of the roots of the eigenvalues of R C' R with R = C^(1/2), which is symmetric.
        let (values, vectors) = symmetric_eigen(cov_a.clone());
        let root = vectors.dot(&Array2::from_diag(&values.mapv(|v| v.max(0.0).sqrt()))).dot(&vectors.t());
        let (values, _) = symmetric_eigen(root.dot(&cov_b).dot(&root));
        let cross: f64 = values.iter().map(|v| v.max(0.0).sqrt()).sum();
        (offset + cov_a.diag().sum() + cov_b.diag().sum() - 2.0 * cross).max(0.0)
    }

    /// Mean and covariance.
    fn moments(&self) -> (Array1<f64>, Array2<f64>) {
        let n = self.n_frames.max(1) as f64;
        let mean = &self.sum / n;
        let column = mean.view().insert_axis(Axis(1));
        let covariance = &self.products / n - column.dot(&column.t());
        (mean, covariance)
    }
}

/// The pitch class of a frequency, in semitones above A, where partials say what is played.
pub fn pitch_class(hz: f64) -> Option<usize> {
    CHROMA_HZ.contains(&hz).then(|| (12.0 * (hz / 27.5).log2()).round() as usize % 12)
}

/// Shares of the 12 pitch classes in the power of each frame, from A upwards, `[n_frames, 12]`.
fn chroma(samples: &[f32], sample_rate: u32) -> Array2<f32> {
    let bin_hz = f64::from(sample_rate) / LONG_FRAME as f64;
    let classes: Vec<Option<usize>> = (0..=LONG_FRAME / 2).map(|bin| pitch_class(bin as f64 * bin_hz)).collect();
    let mut rows = Vec::new();
    frames(samples, LONG_FRAME, LONG_HOP, |power| {
        let mut shares = [0.0; 12];
        for (class, power) in classes.iter().zip(power) {
            if let Some(class) = class {
                shares[*class] += power;
            }
        }
        let total = shares.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        rows.extend(shares.iter().map(|share| (share / total) as f32));
    });
    let n = rows.len() / 12;
    Array2::from_shape_vec((n, 12), rows).unwrap_or_default()
}

/// Spectral flux: by how much the mel bands of each frame rise, dB on their average.
fn flux(log_mel: ArrayView2<f32>) -> Vec<f32> {
    let rise = |k: usize| {
        let before = log_mel.row(k.saturating_sub(1));
        4.343 * log_mel.row(k).iter().zip(before).map(|(now, before)| (now - before).max(0.0)).sum::<f32>()
            / N_MELS as f32
    };
    (0..log_mel.nrows()).map(rise).collect()
}

/// The autocorrelation of spectral flux over [`BEAT_S`] in each stretch of [`RHYTHM_S`].
fn rhythms(flux: &[f32], sample_rate: u32) -> Vec<Vec<f32>> {
    let frames = |seconds: f32| (seconds * sample_rate as f32 / HOP as f32) as usize;
    let lags = frames(BEAT_S.start)..frames(BEAT_S.end);
    // The last frame of 4 s begins before their end.
    let long = frames(RHYTHM_S) - FRAME / HOP;
    let of = |flux: &[f32]| lags.clone().map(|lag| correlation(&flux[lag..], &flux[..flux.len() - lag])).collect();
    flux.chunks_exact(long).map(of).collect()
}

fn peak(rhythm: &[f32]) -> f32 {
    rhythm.iter().copied().fold(0.0, f32::max)
}

fn cosine(a: ArrayView1<f32>, b: ArrayView1<f32>) -> f32 {
    a.dot(&b) / (a.dot(&a) * b.dot(&b)).sqrt().max(f32::MIN_POSITIVE)
}

/// Frames of a spectral flux in which something begins.
fn onsets(flux: &[f32]) -> Vec<usize> {
    let around = |k: usize, reach: usize| &flux[k.saturating_sub(reach)..(k + reach + 1).min(flux.len())];
    let leads = |k: usize| {
        let neighbours = around(k, ONSET_LEADS);
        // Of equals the first one.
        let first = k - k.saturating_sub(ONSET_LEADS);
        neighbours[..first].iter().all(|f| *f < flux[k]) && neighbours[first..].iter().all(|f| *f <= flux[k])
    };
    (0..flux.len()).filter(|&k| leads(k) && flux[k] > median(around(k, ONSET_AROUND)) + ONSET_DB).collect()
}

/// Gives `each` the power spectrum of every frame of `len` samples under a Hann window, `[len / 2 + 1]`, full scale squared.
fn frames(samples: &[f32], len: usize, hop: usize, mut each: impl FnMut(&[f64])) {
    let fourier = Fourier::new(len);
    let mut work: Workspace = fourier.workspace();
    let hann = |i: usize| 0.5 - 0.5 * (std::f64::consts::TAU * i as f64 / len as f64).cos();
    let window: Vec<f64> = (0..len).map(hann).collect();
    let energy: f64 = window.iter().map(|w| w * w).sum();
    for frame in samples.windows(len).step_by(hop) {
        for ((y, x), w) in work.block.iter_mut().zip(frame).zip(&window) {
            *y = f64::from(*x) * w;
        }
        fourier.power(&mut work);
        work.power.iter_mut().for_each(|p| *p /= energy);
        each(&work.power);
    }
}

fn mean(values: &[f32]) -> f32 {
    // The sum of nothing is -0.0.
    values.iter().fold(0.0, |sum, x| sum + x) / values.len().max(1) as f32
}

/// Eigenvalues and, in columns, eigenvectors of a symmetric matrix, by cyclic Jacobi rotations (Golub and Van Loan, 8.5).
fn symmetric_eigen(mut a: Array2<f64>) -> (Array1<f64>, Array2<f64>) {
    const MOST_SWEEPS: usize = 30;
    let n = a.nrows();
    let mut vectors = Array2::eye(n);
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..MOST_SWEEPS {
        let off: f64 = a.indexed_iter().filter(|((i, j), _)| i != j).map(|(_, x)| x * x).sum();
        if off <= 1e-22 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[[p, q]] == 0.0 {
                    continue;
                }
                let tau = (a[[q, q]] - a[[p, p]]) / (2.0 * a[[p, q]]);
                let t = tau.signum() / (tau.abs() + (1.0 + tau * tau).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[[k, p]], a[[k, q]]);
                    (a[[k, p]], a[[k, q]]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[[p, k]], a[[q, k]]);
                    (a[[p, k]], a[[q, k]]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (vectors[[k, p]], vectors[[k, q]]);
                    (vectors[[k, p]], vectors[[k, q]]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    (a.diag().to_owned(), vectors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    const RATE: u32 = 16_000;

    /// Notes of these pitches, each of `seconds`, that begin at once and decay.
    fn notes(pitches: &[f32], seconds: f32) -> Vec<f32> {
        let n = (seconds * RATE as f32) as usize;
        let sample = |hz: f32, i: usize| {
            let t = i as f32 / RATE as f32;
            let partial = |k: f32| (std::f32::consts::TAU * hz * k * t).sin() / k;
            0.2 * (-3.0 * t).exp() * (1..5).map(|k| partial(k as f32)).sum::<f32>()
        };
        pitches.iter().flat_map(|&hz| (0..n).map(move |i| sample(hz, i))).collect()
    }

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..n).map(|_| 0.1 * rng.normal()).collect()
    }

    #[test]
    fn notes_are_counted() {
        let scale: Vec<f32> = (0..16).map(|i| 220.0 * 2f32.powf(i as f32 / 12.0)).collect();
        let found = music(&notes(&scale, 0.25), RATE);
        // The first one has no frame before it.
        assert!((found.onsets_per_s - 4.0).abs() < 0.6, "{found:?}");
        assert_eq!(music(&notes(&[220.0], 4.0), RATE).onsets_per_s, 0.0);
    }

    #[test]
    fn a_steady_beat_has_a_pulse_and_keeps_it() {
        let mut rng = Rng::new(7);
        let steady = |seconds: f32| notes(&[220.0; 32], seconds)[..8 * RATE as usize].to_vec();
        let (at_four, at_three) = (steady(0.25), steady(1.0 / 3.0));
        let restless: Vec<f32> =
            (0..40).flat_map(|_| notes(&[220.0], 0.1 + 0.4 * rng.uniform())).take(8 * RATE as usize).collect();
        let [clock, free] = [&at_four, &restless].map(|sound| music(sound, RATE).pulse);
        assert!(clock > 0.8 && free < 0.6 * clock, "{clock} {free}");
        let [same, other, none] = [&at_four, &at_three, &restless].map(|sound| kinship(&at_four, sound, RATE).beat);
        assert!(same > 0.95 && other < 0.5 && none < 0.5, "{same} {other} {none}");
        assert_eq!(
            (music(&at_four[..50_000], RATE).pulse, kinship(&at_four[..50_000], &at_four, RATE)),
            (0.0, Kinship::default())
        );
    }

    #[test]
    fn the_same_notes_are_kin() {
        let line = |first: f32| {
            notes(&[0, 4, 7, 4].repeat(8).iter().map(|i| first * 2f32.powf(*i as f32 / 12.0)).collect::<Vec<_>>(), 0.25)
        };
        let [same, other] = [220.0, 311.1].map(|first| kinship(&line(220.0), &line(first), RATE).harmony);
        assert!(same > 0.98 && other < 0.6, "{same} {other}");
    }

    #[test]
    fn what_comes_again_is_told_from_what_is_new() {
        let mut rng = Rng::new(9);
        let mut melody = || {
            let pitches: Vec<f32> = (0..20).map(|_| 220.0 * 2f32.powf(rng.below(12) as f32 / 12.0)).collect();
            notes(&pitches, 0.25)
        };
        let (theme, other) = (melody(), melody());
        let [again, anew] = [&theme, &other].map(|after| kinship(&theme, after, RATE).themes);
        assert!(again > 0.9 && anew < 0.6, "{again} {anew}");
        let pause = vec![0.0; theme.len()];
        assert!(kinship(&[&theme[..], &pause].concat(), &pause, RATE).themes < 0.1);
    }

    #[test]
    fn a_held_note_has_little_flux_and_few_classes_and_a_scale_has_more() {
        let held = music(&notes(&[440.0], 2.0), RATE);
        let scale: Vec<f32> = (0..8).map(|i| 440.0 * 2f32.powf(i as f32 / 12.0)).collect();
        let moving = music(&notes(&scale, 0.25), RATE);
        let all = music(&noise(32_000, 1), RATE);
        assert!(held.chroma_flux < 0.05 && moving.chroma_flux > 0.3, "{held:?} {moving:?}");
        assert!(held.chroma_bits < 1.5 && all.chroma_bits > 3.3, "{held:?} {all:?}");
    }

    #[test]
    fn noise_is_flat_and_bright_and_a_tone_is_neither() {
        let (noise, tone) = (music(&noise(16_000, 2), RATE), music(&notes(&[440.0], 1.0), RATE));
        assert!((noise.flatness_db + 2.5).abs() < 0.3 && (noise.centroid_hz - 4000.0).abs() < 200.0, "{noise:?}");
        assert!(tone.flatness_db < -25.0 && tone.centroid_hz < 800.0, "{tone:?}");
        assert_eq!(music(&[0.1; 100], RATE), Music::default());
    }

    #[test]
    fn the_distance_of_gaussians_is_known() {
        let mut rng = Rng::new(3);
        let mut draw = |n: usize, mean: f32, scale: f32| {
            Timbre::of_frames(Array2::from_shape_fn((n, 3), |_| mean + scale * rng.normal()).view())
        };
        let (a, b) = (draw(40_000, 0.0, 1.0), draw(40_000, 2.0, 3.0));
        // Three dimensions: 3 * (2^2 + (3 - 1)^2).
        assert!((a.distance(&b) - 24.0).abs() < 0.8);
        assert!(a.distance(&a) < 1e-9);
    }

    #[test]
    fn clips_together_are_one_collection() {
        let all = noise(40_960, 6);
        let (mut first, second) = (Timbre::of(&all[..20_480], RATE), Timbre::of(&all[20_480..], RATE));
        first.add(&second);
        let (together, apart) = (first.distance(&Timbre::of(&all, RATE)), first.distance(&second));
        assert!(together < 0.3 * apart, "{together} {apart}");
    }

    #[test]
    fn eigenvalues_make_the_matrix_again() {
        let mut rng = Rng::new(4);
        let x = Array2::from_shape_fn((20, 12), |_| f64::from(rng.normal()));
        let a = x.t().dot(&x);
        let (values, vectors) = symmetric_eigen(a.clone());
        let again = vectors.dot(&Array2::from_diag(&values)).dot(&vectors.t());
        assert!((&a - &again).iter().all(|d| d.abs() < 1e-9));
    }

    #[test]
    fn mel_bands_see_where_a_tone_lies() {
        let loudest = |hz: f32| {
            let mel = log_mel(&notes(&[hz], 0.5), RATE);
            let row = mel.row(5).to_vec();
            (0..N_MELS).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
        };
        assert!(loudest(200.0) < loudest(400.0) && loudest(400.0) < loudest(1600.0));
    }

    #[test]
    fn a_sound_twice_as_loud_is_six_db_away() {
        let mut rng = crate::rng::Rng::new(4);
        let sound: Vec<f32> = (0..8000).map(|_| 0.1 * rng.normal()).collect();
        let louder: Vec<f32> = sound.iter().map(|x| 2.0 * x).collect();
        assert!((log_mel_distance_db(&sound, &louder, 16_000) - 6.02).abs() < 0.01);
        assert_eq!(log_mel_distance_db(&sound, &sound, 16_000), 0.0);
        assert_eq!(log_mel_distance_db(&sound[..100], &louder, 16_000), 0.0);
    }
}
