//! Turns the level of what was played, beside the level that the plan asked for, into a factor on the grain.
//!
//! The scales that a model learned under real history are right for real history: in free run a piece may come out a few
//! dB too loud or too soft. The plan says how loud it should be, so a slow loop holds the output to it, and a brake damps
//! what goes on sounding where the plan falls silent.

use crate::metrics::power_db;
use crate::plan::{PlanError, Spectrum};

/// Share of a frame's error that the correction takes over: a time constant of half a second at 32 ms a frame.
const RATE: f32 = 0.06;
/// Share of the correction that a frame keeps.
const MEMORY: f32 = 0.985;
/// The correction lies within +-this, dB.
const MOST_DB: f32 = 9.0;
/// A frame's error counts as at most this, dB.
const MOST_ERROR_DB: f32 = 12.0;
/// A frame that is louder than planned by more than this, dB, softens the next one by what lies above, up to a limit.
const BRAKE_FROM_DB: f32 = 3.0;
const MOST_BRAKE_DB: f32 = 12.0;
/// Plan frames below this level say nothing about level, dB.
const AUDIBLE_DB: f32 = -55.0;

/// Follows one stream.
pub struct Leveller {
    spectrum: Spectrum,
    /// The samples that the next frame's analysis looks back into.
    recent: Vec<f32>,
    correction_db: f32,
    brake_db: f32,
}

impl Leveller {
    /// `context` is what was heard before, at the model's level.
    pub fn new(spectrum: Spectrum, context: &[f32]) -> Self {
        let keep = spectrum.window_len() - spectrum.hop();
        let mut recent = vec![0.0; keep.saturating_sub(context.len())];
        recent.extend_from_slice(&context[context.len().saturating_sub(keep)..]);
        Self { spectrum, recent, correction_db: 0.0, brake_db: 0.0 }
    }

    /// The factor on the grain of the next frame.
    pub fn factor(&self) -> f32 {
        10.0f32.powf((self.correction_db - self.brake_db) / 20.0)
    }

    /// Takes note of a frame: the bands that it was to have, and its samples (`hop`).
    ///
    /// # Errors
    /// When `bands` is no frame of the plan.
    pub fn heard(&mut self, bands: &[f32], samples: &[f32]) -> Result<(), PlanError> {
        self.recent.extend_from_slice(samples);
        let played = self.spectrum.analyse_last(&self.recent);
        self.recent.drain(..samples.len());
        let planned_db = power_db(bands, &self.spectrum)?;
        if planned_db > AUDIBLE_DB {
            let error = (planned_db - power_db(&played, &self.spectrum)?).clamp(-MOST_ERROR_DB, MOST_ERROR_DB);
            self.brake_db = (-error - BRAKE_FROM_DB).clamp(0.0, MOST_BRAKE_DB);
            self.correction_db = (MEMORY * self.correction_db + RATE * error).clamp(-MOST_DB, MOST_DB);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanConfig;

    fn tone(range: std::ops::Range<usize>, level: f32) -> Vec<f32> {
        range.map(|i| level * (i as f32 * 0.3).sin()).collect()
    }

    #[test]
    fn too_loud_lowers_the_grain_too_soft_raises_it_and_right_leaves_it() {
        let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
        let wanted = spectrum.analyse_last(&tone(0..4096, 0.1));
        for (level, expected) in [(0.2, -1.0), (0.05, 1.0), (0.1, 0.0)] {
            let mut leveller = Leveller::new(spectrum.clone(), &tone(0..4096, level));
            for start in (4096..24_576).step_by(512) {
                leveller.heard(&wanted, &tone(start..start + 512, level)).unwrap();
            }
            let correction = 20.0 * leveller.factor().log10();
            assert!(
                (correction * expected >= 0.0) && correction.abs() <= MOST_DB + MOST_BRAKE_DB,
                "level {level}: {correction} dB"
            );
            assert_eq!(correction.abs() > 1.0, expected != 0.0, "level {level}: {correction} dB");
        }
    }

    #[test]
    fn silence_in_the_plan_changes_nothing() {
        let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
        let mut leveller = Leveller::new(spectrum.clone(), &[]);
        leveller.heard(&spectrum.silent_frame(), &tone(0..512, 0.5)).unwrap();
        assert_eq!(leveller.factor(), 1.0);
    }
}
