//! Turns plan frames and samples into the numbers that generated audio is judged by.
//!
//! Pure functions: nothing here knows about models, engines or files. Levels and distances are in dB.

mod music;

use ndarray::{Array2, ArrayView1, ArrayView2, Axis, Slice};
use serde::Serialize;

use crate::plan::{DB_PER_UNIT, PlanError, Spectrum};

pub use music::{Kinship, Music, Timbre, kinship, log_mel_distance_db, music, pitch_class};

/// Bands that carry the tone in [`tonality_db`].
const STRONGEST: usize = 12;
/// Level of digital silence.
pub const SILENCE_DB: f32 = -120.0;

/// Level of `samples` in dB against full scale (a square wave of 1.0 has 0 dB); never below [`SILENCE_DB`].
pub fn level_db(samples: &[f32]) -> f32 {
    let power = samples.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / samples.len().max(1) as f64;
    ((10.0 * power.max(1e-12).log10()) as f32).max(SILENCE_DB)
}

/// Root mean square of `samples`; 0 when there are none.
pub fn rms(samples: &[f32]) -> f32 {
    (samples.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / samples.len().max(1) as f64).sqrt() as f32
}

/// Largest magnitude in `samples`.
pub fn peak(samples: &[f32]) -> f32 {
    samples.iter().fold(0.0, |top, x| top.max(x.abs()))
}

/// Pearson's correlation of as many values of both; 0 where one of them does not vary.
pub fn correlation(a: &[f32], b: &[f32]) -> f32 {
    let mean = |x: &[f32]| x.iter().sum::<f32>() / x.len().max(1) as f32;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    let scale = f32::sqrt(aa * bb);
    if scale > f32::MIN_POSITIVE { ab / scale } else { 0.0 }
}

/// The middle value (the mean of the two middle ones); 0 for none.
pub fn median(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, half) if n % 2 == 1 => sorted[half],
        (_, half) => 0.5 * (sorted[half - 1] + sorted[half]),
    }
}

/// Level of the sound that a plan frame's `bands` describe, dB against full scale; of silence -70, the floor of bands.
///
/// # Errors
/// When these are no frame of `spectrum`.
pub fn power_db(bands: &[f32], spectrum: &Spectrum) -> Result<f32, PlanError> {
    let power = spectrum.autocorrelation(bands, 0, 0.0)?[0];
    Ok(((10.0 * power.max(1e-12).log10()) as f32).max(SILENCE_DB))
}

/// How far the mean of a plan frame's bands in dB lies below their power's: white noise about 0, a tone far below.
pub fn flatness_db(bands: ArrayView1<f32>) -> f32 {
    let n = bands.len().max(1) as f64;
    // A band holds ln(power) / 4.
    let power = bands.iter().map(|&band| (4.0 * f64::from(band)).exp()).sum::<f64>() / n;
    let mean = bands.iter().map(|&band| f64::from(band)).sum::<f64>() / n;
    (mean * f64::from(DB_PER_UNIT) - 10.0 * power.max(1e-12).log10()) as f32
}

/// The loudest band of a plan frame, of equals the last.
pub fn leader(bands: ArrayView1<f32>) -> usize {
    (0..bands.len()).max_by(|&a, &b| bands[a].total_cmp(&bands[b])).unwrap_or(0)
}

/// Plan frames with the level that each stands for.
#[derive(Clone, Debug)]
pub struct Track {
    /// `[n_frames, n_bands]`, plan units.
    pub bands: Array2<f32>,
    /// Level of each frame, dB against full scale.
    pub level_db: Vec<f32>,
}

impl Track {
    /// From plan frames, `[n_frames, n_bands]`.
    ///
    /// # Errors
    /// When these are no frames of `spectrum`.
    pub fn new(bands: Array2<f32>, spectrum: &Spectrum) -> Result<Self, PlanError> {
        let level = |frame: ArrayView1<f32>| power_db(&frame.to_vec(), spectrum);
        let level_db = bands.outer_iter().map(level).collect::<Result<_, PlanError>>()?;
        Ok(Self { bands, level_db })
    }

    /// From the frames of `samples` after those of `context`, which the first ones look back into.
    ///
    /// `context` must end on the frame grid that `samples` continue; what does not fill a last frame is left out.
    ///
    /// # Errors
    /// None in practice: `spectrum` takes its own frames.
    pub fn analyse(context: &[f32], samples: &[f32], spectrum: &Spectrum) -> Result<Self, PlanError> {
        let hop = spectrum.hop();
        let whole = context.len() / hop * hop;
        let heard: Vec<f32> = context[context.len() - whole..].iter().chain(samples).copied().collect();
        let bands = spectrum.analyse(&heard);
        Self::new(bands.slice_axis(Axis(0), Slice::from(whole / hop..)).to_owned(), spectrum)
    }

    pub fn n_frames(&self) -> usize {
        self.level_db.len()
    }
}

/// How far audio is from the plan that drove it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Adherence {
    /// Root mean square over frames and bands.
    pub rms_db: f32,
    /// Mean: positive when the audio is louder than planned.
    pub bias_db: f32,
}

/// Compares re-analysed audio with its plan, both `[n_frames, n_bands]`; frames that only one has are left out.
pub fn adherence(heard: ArrayView2<f32>, planned: ArrayView2<f32>) -> Adherence {
    let n = heard.nrows().min(planned.nrows());
    let first = Slice::from(..n);
    let difference = (&heard.slice_axis(Axis(0), first) - &planned.slice_axis(Axis(0), first))
        .mapv(|d| f64::from(d) * f64::from(DB_PER_UNIT));
    let count = difference.len().max(1) as f64;
    Adherence {
        rms_db: (difference.mapv(|d| d * d).sum() / count).sqrt() as f32,
        bias_db: (difference.sum() / count) as f32,
    }
}

/// How far the twelve strongest bands stand above the median band, averaged over frames: music 25 to 30, noise under 10.
pub fn tonality_db(bands: ArrayView2<f32>) -> f32 {
    let frame_tonality = |frame: ArrayView1<f32>| {
        let mut sorted = frame.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let strongest = &sorted[..STRONGEST.min(sorted.len())];
        strongest.iter().sum::<f32>() / strongest.len().max(1) as f32 - median(&sorted)
    };
    bands.outer_iter().map(frame_tonality).sum::<f32>() / bands.nrows().max(1) as f32 * DB_PER_UNIT
}

/// Level of audio against a reference over time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LevelDrift {
    /// Difference in the level of each second, dB.
    pub seconds_db: Vec<f32>,
    /// Their median.
    pub median_db: f32,
    /// The one furthest from 0.
    pub worst_db: f32,
}

/// Compares levels per second. `heard_db` and `reference_db` hold one level per frame of `1 / frames_per_second` s;
/// seconds in which the reference is below -60 dB say nothing about level and are left out.
pub fn level_drift(heard_db: &[f32], reference_db: &[f32], frames_per_second: f32) -> LevelDrift {
    let n = heard_db.len().min(reference_db.len());
    let chunk = (frames_per_second.round() as usize).max(1);
    let mean_level = |levels: &[f32]| {
        let power: f32 = levels.iter().map(|db| 10f32.powf(db / 10.0)).sum::<f32>() / levels.len() as f32;
        10.0 * power.max(1e-12).log10()
    };
    let seconds_db: Vec<f32> = heard_db[..n]
        .chunks(chunk)
        .zip(reference_db[..n].chunks(chunk))
        .filter(|(_, reference)| 2 * reference.len() >= chunk)
        .map(|(heard, reference)| (mean_level(heard), mean_level(reference)))
        .filter(|(_, reference)| *reference > -60.0)
        .map(|(heard, reference)| heard - reference)
        .collect();
    let worst_db = seconds_db.iter().fold(0.0f32, |worst, &d| if d.abs() > worst.abs() { d } else { worst });
    LevelDrift { median_db: median(&seconds_db), worst_db, seconds_db }
}

/// A way in which free-running generation breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// For a second the output is more than [`COLLAPSE_DB`] below an audible plan.
    Collapse,
    /// For two frames the output is more than [`BURST_DB`] above all that its plan asked for within a window.
    Burst,
    /// For a second the output's spectrum is flatter than its plan's by more than [`NOISE_DB`].
    Noise,
    /// For a second one band leads the spectrum and lies more than [`STUCK_DB`] above its plan.
    StuckTone,
    /// More than one sample in a thousand lies within 0.3 dB of full scale.
    Clipping,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Collapse => "collapse",
            Self::Burst => "burst",
            Self::Noise => "noise",
            Self::StuckTone => "stuck tone",
            Self::Clipping => "clipping",
        })
    }
}

/// See [`Failure::Collapse`].
pub const COLLAPSE_DB: f32 = 20.0;
/// See [`Failure::Burst`].
pub const BURST_DB: f32 = 12.0;
/// See [`Failure::Noise`].
pub const NOISE_DB: f32 = 12.0;
/// See [`Failure::StuckTone`].
pub const STUCK_DB: f32 = 15.0;
/// A plan below this level asks for nothing, dB against full scale.
const AUDIBLE_DB: f32 = -55.0;
/// Within 0.3 dB of full scale: the outermost mu-law codes decode to 0.978.
const CLIPPED: f32 = 0.97;

/// What went wrong in one continuation: `heard` re-analysed by `spectrum` from `samples`, which were rendered after `planned`.
pub fn failures(samples: &[f32], heard: &Track, planned: &Track, spectrum: &Spectrum) -> Vec<Failure> {
    let n = heard.n_frames().min(planned.n_frames());
    let second = ((spectrum.sample_rate() as f32 / spectrum.hop() as f32).round() as usize).max(2);
    let window = spectrum.window_frames();
    let runs = |long: usize, holds: &dyn Fn(usize) -> bool| longest_run(n, holds) >= long;
    let above = |k: usize| heard.level_db[k] - planned.level_db[k];
    let leaders: Vec<usize> = heard.bands.rows().into_iter().take(n).map(leader).collect();
    let stuck = |k: usize| {
        let band = leaders[k];
        let over = (heard.bands[[k, band]] - planned.bands[[k, band]]) * DB_PER_UNIT;
        over > STUCK_DB && (k == 0 || leaders[k - 1] == band)
    };
    let mut found = Vec::new();
    if runs(second, &|k| planned.level_db[k] > AUDIBLE_DB && above(k) < -COLLAPSE_DB) {
        found.push(Failure::Collapse);
    }
    // A frame's analysis still hears the frames before it, which may have been loud by plan; the first ones hear the prompt.
    let asked =
        |k: usize| planned.level_db[k.saturating_sub(window - 1)..=k].iter().copied().fold(SILENCE_DB, f32::max);
    let knows = |k: usize| k + 1 >= window;
    if runs(2, &|k| knows(k) && heard.level_db[k] > AUDIBLE_DB && heard.level_db[k] - asked(k) > BURST_DB) {
        found.push(Failure::Burst);
    }
    if runs(second, &|k| {
        heard.level_db[k] > AUDIBLE_DB && flatness_db(heard.bands.row(k)) - flatness_db(planned.bands.row(k)) > NOISE_DB
    }) {
        found.push(Failure::Noise);
    }
    if runs(second, &stuck) {
        found.push(Failure::StuckTone);
    }
    let clipped = samples.iter().filter(|x| x.abs() > CLIPPED).count();
    if clipped * 1000 > samples.len() {
        found.push(Failure::Clipping);
    }
    found
}

fn longest_run(n: usize, holds: &dyn Fn(usize) -> bool) -> usize {
    let (mut longest, mut run) = (0, 0);
    for k in 0..n {
        run = if holds(k) { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

/// Entropy of a histogram in bits per symbol: what a memoryless code fitted to the data itself would need.
pub fn entropy_bits(counts: &[u64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let share = |&count: &u64| count as f64 / total as f64;
    counts.iter().filter(|&&count| count > 0).map(|count| -share(count) * share(count).log2()).sum()
}

/// Root-mean-square distance of two spectra in dB; both hold plan units.
pub fn spectral_distance_db(a: ArrayView1<f32>, b: ArrayView1<f32>) -> f32 {
    adherence(a.insert_axis(Axis(0)), b.insert_axis(Axis(0))).rms_db
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanConfig;

    fn spectrum() -> Spectrum {
        Spectrum::new(16_000, &PlanConfig::default()).unwrap()
    }

    fn tone(n: usize, hz: f32, amplitude: f32) -> Vec<f32> {
        (0..n).map(|i| amplitude * (std::f32::consts::TAU * hz * i as f32 / 16_000.0).sin()).collect()
    }

    fn noise(n: usize, amplitude: f32) -> Vec<f32> {
        let mut state = 1u32;
        let step = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            amplitude * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..n).map(step).collect()
    }

    fn track(samples: &[f32]) -> Track {
        Track::analyse(&[], samples, &spectrum()).unwrap()
    }

    #[test]
    fn a_sine_has_the_level_of_its_rms() {
        assert!((level_db(&tone(16_000, 1000.0, 1.0)) + 3.01).abs() < 0.01);
        assert_eq!(level_db(&[0.0; 10]), SILENCE_DB);
        assert_eq!(level_db(&[]), SILENCE_DB);
    }

    #[test]
    fn audio_adheres_to_its_own_plan_and_a_louder_copy_is_biased() {
        let quiet = track(&noise(16_000, 0.05));
        let loud = track(&noise(16_000, 0.1));
        assert_eq!(adherence(quiet.bands.view(), quiet.bands.view()).rms_db, 0.0);
        let difference = adherence(loud.bands.view(), quiet.bands.view());
        assert!((difference.bias_db - 6.02).abs() < 0.1, "{difference:?}");
        assert!((difference.rms_db - 6.02).abs() < 0.1, "{difference:?}");
    }

    #[test]
    fn a_chord_is_tonal_and_noise_is_not() {
        let chord: Vec<f32> =
            tone(16_000, 440.0, 0.1).iter().zip(tone(16_000, 660.0, 0.1)).map(|(a, b)| a + b).collect();
        let (music, hiss) =
            (tonality_db(track(&chord).bands.view()), tonality_db(track(&noise(16_000, 0.1)).bands.view()));
        assert!(music > 20.0 && hiss < 10.0, "chord {music}, noise {hiss}");
    }

    #[test]
    fn context_gives_the_first_frames_their_past() {
        let all = tone(8192, 500.0, 0.2);
        let whole = track(&all);
        let split = Track::analyse(&all[..4096], &all[4096..], &spectrum()).unwrap();
        assert_eq!(split.bands, whole.bands.slice_axis(Axis(0), Slice::from(8..)));
    }

    #[test]
    fn good_audio_has_no_failures() {
        let samples = tone(48_000, 440.0, 0.1);
        let it = track(&samples);
        assert_eq!(failures(&samples, &it, &it, &spectrum()), []);
    }

    #[test]
    fn each_failure_is_told_from_the_others() {
        let planned_samples = tone(48_000, 440.0, 0.05);
        let planned = track(&planned_samples);
        let found = |samples: &[f32]| failures(samples, &track(samples), &planned, &spectrum());
        assert_eq!(found(&tone(48_000, 440.0, 0.0004)), [Failure::Collapse]);
        let mut burst = planned_samples.clone();
        burst[20_000..23_000].copy_from_slice(&tone(3000, 440.0, 0.5));
        assert_eq!(found(&burst), [Failure::Burst]);
        let after_a_loud_prompt = Track::analyse(&tone(4096, 440.0, 0.5), &planned_samples, &spectrum()).unwrap();
        assert_eq!(failures(&planned_samples, &after_a_loud_prompt, &planned, &spectrum()), []);
        let noisy: Vec<f32> = planned_samples.iter().zip(noise(48_000, 0.05)).map(|(a, b)| a + b).collect();
        assert_eq!(found(&noisy), [Failure::Noise]);
        let stuck: Vec<f32> = planned_samples.iter().zip(tone(48_000, 1200.0, 0.12)).map(|(a, b)| a + b).collect();
        assert_eq!(found(&stuck), [Failure::StuckTone]);
        assert!(found(&tone(48_000, 440.0, 1.0)).contains(&Failure::Clipping));
    }

    #[test]
    fn drift_is_per_second_and_ignores_silence() {
        let reference = [[-20.0; 4], [-90.0; 4], [-30.0; 4]].concat();
        let heard = [[-19.0; 4], [-20.0; 4], [-33.0; 4]].concat();
        let drift = level_drift(&heard, &reference, 4.0);
        assert_eq!(drift.seconds_db.len(), 2);
        assert!((drift.worst_db + 3.0).abs() < 1e-3 && (drift.median_db + 1.0).abs() < 1e-3, "{drift:?}");
    }

    #[test]
    fn entropy_of_four_equal_symbols_is_two_bits() {
        assert!((entropy_bits(&[5, 5, 5, 5, 0]) - 2.0).abs() < 1e-12);
        assert_eq!(entropy_bits(&[]), 0.0);
    }
}
