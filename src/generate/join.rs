//! Turns the end of a prompt and what is played after it into what the join sounds like.

use serde::Serialize;

use crate::audio::Clip;
use crate::metrics::{level_db, median, rms, spectral_distance_db};
use crate::plan::{PlanConfig, Spectrum};

/// Seconds on each side of the join that its level is taken from.
const LEVEL_S: f64 = 0.25;
/// Seconds at the end of the prompt that the join is measured against.
const OWN_S: f64 = 10.0;
/// Length of a spectrum, seconds: the model's plan has 0.128.
const SPECTRUM_S: f64 = 0.128;
/// Highest band of these spectra, Hz: what every model hears.
const HIGHEST_HZ: f64 = 7700.0;

/// Frames at the end of the prompt that the join is measured against.
pub(super) fn own_frames(clip: &Clip) -> usize {
    (OWN_S * f64::from(clip.sample_rate)) as usize
}

pub(super) fn level_frames(clip: &Clip) -> usize {
    ((LEVEL_S * f64::from(clip.sample_rate)) as usize).max(1)
}

/// What the join sounds like, each figure beside the prompt's own habit. `None`: too little audio to say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SeamReport {
    /// Step from the prompt's last sample to the next one in units of its root-mean-square step; worst channel.
    pub jump: f32,
    /// Level of the first quarter second after the join against the last one before it, dB.
    pub level_change_db: Option<f32>,
    /// Root mean square of such changes inside the prompt, dB.
    pub own_level_change_db: Option<f32>,
    /// Distance of the spectra just after and just before the join, dB rms over bands up to 7.7 kHz.
    pub spectral_distance_db: Option<f32>,
    /// Median of such distances inside the prompt, dB.
    pub own_spectral_distance_db: Option<f32>,
}

impl SeamReport {
    /// Compares the end of `prompt` with the interleaved frames `after` it; `None` if either is empty.
    pub fn measure(prompt: &Clip, after: &[f32]) -> Option<Self> {
        let channels = prompt.channels;
        if prompt.samples.is_empty() || after.is_empty() {
            return None;
        }
        let own = &prompt.samples[prompt.samples.len().saturating_sub(own_frames(prompt) * channels)..];
        let jump = (0..channels).map(|c| jump(own, after, channels, c)).fold(0.0, f32::max);

        let window = level_frames(prompt) * channels;
        let before: Vec<f32> = own.rchunks_exact(window).map(level_db).collect();
        let level_change_db = before.first().zip(after.chunks_exact(window).next()).map(|(b, a)| level_db(a) - b);
        let changes: Vec<f32> = before.windows(2).map(|pair| pair[0] - pair[1]).collect();

        let own_mono = Clip { samples: own.to_vec(), ..*prompt }.downmix();
        let after_mono = Clip { samples: after.to_vec(), ..*prompt }.downmix();
        let (own_distance, distance) = spectral_distances(&own_mono, &after_mono, prompt.sample_rate);
        Some(Self {
            jump,
            level_change_db,
            own_level_change_db: (!changes.is_empty()).then(|| rms(&changes)),
            spectral_distance_db: distance,
            own_spectral_distance_db: own_distance,
        })
    }
}

fn jump(own: &[f32], after: &[f32], channels: usize, c: usize) -> f32 {
    let samples: Vec<f32> = own.iter().skip(c).step_by(channels).copied().collect();
    let steps: Vec<f32> = samples.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let step = after[c] - samples[samples.len() - 1];
    // One step of 16 bits: below it a prompt has no habit.
    step.abs() / rms(&steps).max(1.0 / 32768.0)
}

/// Median distance of neighbouring spectra in `own`, and the distance over the join between `own` and `after`.
fn spectral_distances(own: &[f32], after: &[f32], sample_rate: u32) -> (Option<f32>, Option<f32>) {
    // Neighbours do not overlap: a window is PARTS hops.
    const PARTS: usize = 4;
    let hop = ((SPECTRUM_S * f64::from(sample_rate)) as usize / PARTS).max(1);
    let highest_hz = HIGHEST_HZ.min(0.48 * f64::from(sample_rate));
    let config = PlanConfig { hop, window: PARTS * hop, highest_hz, ..PlanConfig::default() };
    let Ok(spectrum) = Spectrum::new(sample_rate, &config) else { return (None, None) };
    let before = spectrum.analyse(&own[own.len() % hop..]);
    let after = spectrum.analyse(after);
    // Spectra that saw a whole window.
    let neighbours: Vec<f32> =
        (2 * PARTS - 1..before.nrows()).map(|k| spectral_distance_db(before.row(k - PARTS), before.row(k))).collect();
    let at_join = (before.nrows() >= PARTS && after.nrows() >= PARTS)
        .then(|| spectral_distance_db(before.row(before.nrows() - 1), after.row(PARTS - 1)));
    ((!neighbours.is_empty()).then(|| median(&neighbours)), at_join)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chord at 16 kHz.
    fn chord(n: usize) -> Vec<f32> {
        let tone = |hz: f32, i: usize| (std::f32::consts::TAU * hz * i as f32 / 16_000.0).sin();
        (0..n).map(|i| 0.2 * tone(440.0, i) + 0.1 * tone(1320.5, i)).collect()
    }

    #[test]
    fn the_report_tells_a_click_and_a_drop_from_a_good_join() {
        let all = chord(32_000);
        let (prompt, after) = all.split_at(16_000);
        let prompt = Clip { samples: prompt.to_vec(), channels: 1, sample_rate: 16_000 };
        let good = SeamReport::measure(&prompt, after).unwrap();
        let own = good.own_spectral_distance_db.unwrap();
        assert!(good.jump < 3.0 && good.spectral_distance_db.unwrap() < own + 1.0, "{good:?}");
        let shifted: Vec<f32> = after.iter().map(|x| 0.1 * x + 0.5).collect();
        let bad = SeamReport::measure(&prompt, &shifted).unwrap();
        assert!(bad.jump > 5.0 && bad.spectral_distance_db.unwrap() > own + 5.0, "{bad:?}");
        let soft: Vec<f32> = after.iter().map(|x| 0.1 * x).collect();
        let drop = SeamReport::measure(&prompt, &soft).unwrap().level_change_db.unwrap();
        assert!((drop + 20.0).abs() < 0.5, "{drop}");
    }

    #[test]
    fn a_prompt_of_one_sample_has_a_report_with_gaps() {
        let report = SeamReport::measure(&Clip { samples: vec![0.1], channels: 1, sample_rate: 8000 }, &[0.1]).unwrap();
        assert_eq!((report.jump, report.level_change_db, report.spectral_distance_db), (0.0, None, None));
    }
}
