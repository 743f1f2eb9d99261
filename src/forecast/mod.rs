//! Turns past samples, and a plan frame, into linear forecasts of the next sample.
//!
//! `past`: backward-adaptive linear prediction, coefficients from the samples before (as ITU-T G.728 has them).
//! `planned`: prediction with the coefficients of the spectrum that the plan frame describes, which `sharp` makes as
//! sharp as the sound was, around the `tones` that go on from the past. Neither is trained.

mod forecaster;
mod history;
mod lpc;
mod past;
mod planned;
mod sharp;
mod tones;

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use crate::plan::{PlanConfig, PlanError, Spectrum};

#[cfg(feature = "cuda")]
pub(crate) use forecaster::check_frames;
pub(crate) use forecaster::listen;
pub use forecaster::{CpuForecaster, Forecaster};
pub use lpc::{Prediction, autocorrelation, levinson};
pub use past::PastForecast;
pub use planned::PlannedForecast;
pub(crate) use planned::PlannedPast;
pub(crate) use tones::lobe as tones_lobe;

/// What is played is held to this before it is clipped to a token: 12 dB over full scale.
pub const MOST_SAMPLE: f32 = 4.0;

/// Place of the forecast from the past where both are listed.
pub const PAST: usize = 0;
/// Place of the forecast from the plan there.
pub const PLANNED: usize = 1;

/// What the forecasts are computed from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForecastConfig {
    /// Coefficients of the forecast from the past.
    pub order: usize,
    /// Samples that these coefficients are computed from.
    pub past_window: usize,
    /// New coefficients after this many samples; divides the plan's hop.
    pub past_hop: usize,
    /// Coefficients of the forecast from the plan.
    pub planned_order: usize,
    /// Standard deviation by which the planned spectrum is blurred, Hz.
    pub lag_window_hz: f64,
    /// Steps of the deconvolution that takes the analysis' blur out of the planned spectrum; 0 leaves it in.
    pub deconvolution: usize,
    /// Whether lines of the planned spectrum go on as tones with the phases of the past, and only the rest is predicted.
    pub tones: bool,
    /// Whether the model is told what the forecast from the past left over of the last sample to a step of 16 bits; else in bins of mu-law.
    pub fine_residual: bool,
}

impl Default for ForecastConfig {
    fn default() -> Self {
        Self {
            order: 256,
            past_window: 4096,
            past_hop: 64,
            planned_order: 256,
            lag_window_hz: 4.0,
            deconvolution: 0,
            tones: false,
            fine_residual: false,
        }
    }
}

impl ForecastConfig {
    /// Checks the settings against each other and against the plan that the forecasts will follow.
    ///
    /// # Errors
    /// Names the first setting that cannot be.
    pub fn validate(&self, plan: &PlanConfig) -> Result<(), ForecastError> {
        self.validate_alone()?;
        if !plan.hop.is_multiple_of(self.past_hop) {
            return Err(ForecastError::Hop { past_hop: self.past_hop, plan_hop: plan.hop });
        }
        if self.planned_order > plan.window / 2 {
            return Err(PlanError::Order { order: self.planned_order, window: plan.window }.into());
        }
        if self.tones && plan.window > self.past_window {
            return Err(ForecastError::TonesWindow { past_window: self.past_window, plan_window: plan.window });
        }
        Ok(())
    }

    /// Plan frames that have to be heard before a frame whose forecasts shall be those of a stream that has heard everything.
    pub(crate) fn frames_before(&self, plan: &PlanConfig) -> usize {
        let tones = if self.tones { self.tones_before(plan.hop) + plan.window.div_ceil(plan.hop) } else { 0 };
        tones.max(self.past_window.div_ceil(plan.hop))
    }

    /// Plan frames before a frame whose tones its forecasts follow from: what tones left over of the last `planned_order` samples,
    /// and how those of one frame more fade out.
    pub(crate) fn tones_before(&self, hop: usize) -> usize {
        if self.tones { self.planned_order.div_ceil(hop) + 1 } else { 0 }
    }

    /// Checks the settings against each other.
    pub(crate) fn validate_alone(&self) -> Result<(), ForecastError> {
        let Self { order, past_window, past_hop, planned_order, lag_window_hz, deconvolution, tones, fine_residual: _ } =
            *self;
        if order == 0 || order >= past_window {
            return Err(ForecastError::Order { order, past_window });
        }
        if past_hop == 0 || past_hop > past_window {
            return Err(ForecastError::PastHop { past_hop, past_window });
        }
        if planned_order == 0 {
            return Err(ForecastError::PlannedOrder);
        }
        if !(lag_window_hz >= 0.0 && lag_window_hz.is_finite()) {
            return Err(ForecastError::LagWindow { lag_window_hz });
        }
        if deconvolution > MOST_STEPS {
            return Err(ForecastError::Deconvolution { steps: deconvolution });
        }
        if tones && deconvolution == 0 {
            return Err(ForecastError::Tones);
        }
        Ok(())
    }
}

/// More only sharpens noise.
const MOST_STEPS: usize = 1000;

/// Why no forecast can be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ForecastError {
    /// More coefficients than samples to compute them from.
    #[error("forecast order {order}: expected at least 1 and less than the window of {past_window} samples")]
    Order {
        /// Coefficients.
        order: usize,
        /// Samples.
        past_window: usize,
    },
    /// Coefficients that are never, or too rarely, renewed.
    #[error("forecast hop {past_hop}: expected at least 1 and at most the window of {past_window} samples")]
    PastHop {
        /// Samples between new coefficients.
        past_hop: usize,
        /// Samples that they are computed from.
        past_window: usize,
    },
    /// New coefficients would fall at other places in each plan frame.
    #[error("forecast hop {past_hop} does not divide the plan's hop {plan_hop}")]
    Hop {
        /// Samples between new coefficients.
        past_hop: usize,
        /// Samples per plan frame.
        plan_hop: usize,
    },
    /// No coefficients from the plan.
    #[error("forecast order from the plan: expected at least 1, got 0")]
    PlannedOrder,
    /// A blur that is no number of Hz.
    #[error("forecast lag window of {lag_window_hz} Hz: expected a finite number of at least 0")]
    LagWindow {
        /// The width given.
        lag_window_hz: f64,
    },
    /// A deconvolution that would take seconds a frame.
    #[error("deconvolution of {steps} steps: expected at most {MOST_STEPS}")]
    Deconvolution {
        /// Steps given.
        steps: usize,
    },
    /// Lines that are too blurred to be tones.
    #[error("tones: expected a deconvolution of the planned spectrum, got 0 steps")]
    Tones,
    /// Less memory than tones are found in.
    #[error("tones: the forecast's window of {past_window} samples is shorter than the plan's of {plan_window}")]
    TonesWindow {
        /// Samples that the forecast from the past is computed from.
        past_window: usize,
        /// Samples that a plan frame is computed from.
        plan_window: usize,
    },
    /// A plan that ends before the samples do.
    #[error("{got} plan frames for {n_samples} samples, expected {expected}")]
    FrameCount {
        /// Frames that the samples need.
        expected: usize,
        /// Frames given.
        got: usize,
        /// Samples given.
        n_samples: usize,
    },
    /// A state whose parts do not go together.
    #[error("damaged forecast state: {got} {what}, expected {expected}")]
    State {
        /// The part.
        what: &'static str,
        /// Its length by the settings.
        expected: usize,
        /// Its length.
        got: usize,
    },
    /// The GPU, or what it can do, does not suffice.
    #[error("forecasts on the GPU: {reason}")]
    Gpu {
        /// In the words of the driver, or of the launch that cannot be.
        reason: String,
    },
    /// The plan does not serve for prediction.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Whether a part of a saved state has the length that its settings give it.
fn check_length(what: &'static str, expected: usize, got: usize) -> Result<(), ForecastError> {
    if got == expected { Ok(()) } else { Err(ForecastError::State { what, expected, got }) }
}

/// The forecasts of every sample of an excerpt, each from the samples before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forecasts {
    /// From the past, `[n_samples]`, in [-1, 1].
    pub past: Vec<f32>,
    /// From the plan, `[n_samples]`, in [-1, 1].
    pub planned: Vec<f32>,
    /// ln of the mean |residual| that the plan implies, `[n_samples]`.
    pub log_scale: Vec<f32>,
}

/// Both forecasts of each sample, before the first of which there is silence: bit for bit what [`PastForecast`]
/// and [`PlannedForecast`] give one after the other. `plan` is `[frames, n_bands]`, one frame per hop of the
/// samples, the last of which may be cut short.
///
/// # Errors
/// When the settings cannot be or the plan is too short or of other bands than `spectrum`'s.
pub fn forecasts(
    samples: &[f32],
    plan: ArrayView2<f32>,
    spectrum: &Spectrum,
    config: &ForecastConfig,
) -> Result<Forecasts, ForecastError> {
    CpuForecaster { spectrum, config }.forecasts(samples, 0, plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use ndarray::Array2;

    fn spectrum() -> Spectrum {
        let config = PlanConfig { hop: 128, window: 512, ..PlanConfig::default() };
        Spectrum::new(16_000, &config).unwrap()
    }

    fn config() -> ForecastConfig {
        ForecastConfig {
            order: 24,
            past_window: 512,
            past_hop: 32,
            planned_order: 40,
            lag_window_hz: 4.0,
            deconvolution: 0,
            tones: false,
            fine_residual: false,
        }
    }

    /// Two notes in noise, and their plan, whose last frame is cut short.
    fn excerpt(n_samples: usize) -> (Vec<f32>, Array2<f32>) {
        let mut rng = Rng::new(6);
        let tone = |n: usize, hz: f32| (n as f32 * hz * std::f32::consts::TAU / 16_000.0).sin();
        let sample = |n| 0.2 * tone(n, 440.0) + 0.2 * tone(n, 660.0) + 0.02 * rng.normal();
        let samples: Vec<f32> = (0..n_samples.next_multiple_of(128)).map(sample).collect();
        let plan = spectrum().analyse(&samples);
        (samples[..n_samples].to_vec(), plan)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn whole_excerpt_equals_the_streams_bit_for_bit() {
        let (samples, plan) = excerpt(2000);
        let whole = forecasts(&samples, plan.view(), &spectrum(), &config()).unwrap();
        let mut past = PastForecast::new(&config()).unwrap();
        let mut planned = PlannedForecast::new(&config()).unwrap();
        let mut streamed = Forecasts::default();
        let mut before = spectrum().silent_frame();
        for (n, &sample) in samples.iter().enumerate() {
            if n % 128 == 0 {
                // Saved and restored between frames, as sessions are.
                planned = serde_json::from_str(&serde_json::to_string(&planned).unwrap()).unwrap();
                let bands = plan.row(n / 128).to_vec();
                planned.begin_frame(&spectrum(), &before, &bands).unwrap();
                before = bands;
            }
            streamed.past.push(past.forecast());
            streamed.planned.push(planned.forecast());
            streamed.log_scale.push(planned.log_scale());
            past.push(sample);
            planned.push(sample);
        }
        assert_eq!(bits(&whole.past), bits(&streamed.past));
        assert_eq!(bits(&whole.planned), bits(&streamed.planned));
        assert_eq!(bits(&whole.log_scale), bits(&streamed.log_scale));
    }

    #[test]
    fn what_is_only_listened_to_changes_no_forecast_after_it() {
        let (samples, plan) = excerpt(2000);
        for config in [config(), ForecastConfig { deconvolution: 3, tones: true, ..config() }] {
            let spectrum = spectrum();
            let forecaster = CpuForecaster { spectrum: &spectrum, config: &config };
            let whole = forecaster.forecasts(&samples, 0, plan.view()).unwrap();
            for first in [1, 6, 15, 16, 99] {
                let part = forecaster.forecasts(&samples, first, plan.view()).unwrap();
                let begin = samples.len().min(128 * first);
                assert_eq!(bits(&whole.past[begin..]), bits(&part.past), "from frame {first}");
                assert_eq!(bits(&whole.planned[begin..]), bits(&part.planned), "from frame {first}");
                assert_eq!(bits(&whole.log_scale[begin..]), bits(&part.log_scale), "from frame {first}");
            }
        }
    }

    #[test]
    fn a_sample_moves_only_the_forecasts_after_it() {
        let (samples, plan) = excerpt(1600);
        let before = forecasts(&samples, plan.view(), &spectrum(), &config()).unwrap();
        for t in [0, 31, 32, 700, 1023, 1598] {
            let mut changed = samples.clone();
            changed[t] += 0.25;
            let after = forecasts(&changed, plan.view(), &spectrum(), &config()).unwrap();
            assert_eq!(before.log_scale, after.log_scale, "sample {t}");
            for (before, after) in [(&before.past, &after.past), (&before.planned, &after.planned)] {
                assert_eq!(bits(&before[..=t]), bits(&after[..=t]), "sample {t}");
            }
            assert_ne!(before.planned[t + 1], after.planned[t + 1], "sample {t}");
        }
    }

    #[test]
    fn a_plan_frame_moves_only_its_own_samples() {
        let (samples, plan) = excerpt(1600);
        let before = forecasts(&samples, plan.view(), &spectrum(), &config()).unwrap();
        for frame in [0, 4, 12] {
            let mut changed = plan.clone();
            changed[[frame, 3]] += 1.0;
            let after = forecasts(&samples, changed.view(), &spectrum(), &config()).unwrap();
            assert_eq!(before.past, after.past);
            for n in 0..samples.len() {
                let moved = before.log_scale[n] != after.log_scale[n] || before.planned[n] != after.planned[n];
                assert_eq!(moved, n / 128 == frame, "frame {frame}, sample {n}");
            }
        }
    }

    #[test]
    fn forecasts_of_steady_notes_leave_little_over() {
        let (samples, plan) = excerpt(8000);
        let whole = forecasts(&samples, plan.view(), &spectrum(), &config()).unwrap();
        let power = |forecast: &[f32]| (4000..8000).map(|n| (samples[n] - forecast[n]).powi(2)).sum::<f32>() / 4000.0;
        let silence = power(&[0.0; 8000]);
        assert!(power(&whole.past) < 0.05 * silence && power(&whole.planned) < 0.3 * silence);
        // The planned scale is the size of what the planned forecast leaves over, within a factor of two.
        let mean_error = (4000..8000).map(|n| (samples[n] - whole.planned[n]).abs()).sum::<f32>() / 4000.0;
        let off = whole.log_scale[6000] - mean_error.ln();
        assert!(off.abs() < 0.7, "{off}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_values() {
        let (default, plan) = (ForecastConfig::default(), PlanConfig::default());
        assert_eq!(default.validate(&plan), Ok(()));
        for (bad, said) in [
            (ForecastConfig { order: 4096, ..default.clone() }, "order 4096"),
            (ForecastConfig { order: 0, ..default.clone() }, "order 0"),
            (ForecastConfig { past_hop: 0, ..default.clone() }, "hop 0"),
            (ForecastConfig { planned_order: 0, ..default.clone() }, "got 0"),
            (ForecastConfig { lag_window_hz: f64::NAN, ..default.clone() }, "NaN"),
        ] {
            let message = bad.validate(&plan).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
            assert!(PastForecast::new(&bad).is_err() && PlannedForecast::new(&bad).is_err());
        }
        for (bad, said) in [
            (ForecastConfig { past_hop: 96, ..default.clone() }, "hop 96 does not divide the plan's hop 512"),
            (ForecastConfig { planned_order: 1025, ..default.clone() }, "order 1025"),
            (ForecastConfig { tones: true, ..default.clone() }, "got 0 steps"),
            (
                ForecastConfig { tones: true, deconvolution: 1, past_window: 1024, ..default.clone() },
                "the plan's of 2048",
            ),
        ] {
            let message = bad.validate(&plan).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
        let (samples, plan) = excerpt(1600);
        let short = forecasts(&samples, plan.slice_axis(ndarray::Axis(0), (..12).into()), &spectrum(), &config());
        assert_eq!(short, Err(ForecastError::FrameCount { expected: 13, got: 12, n_samples: 1600 }));
        let narrow = forecasts(&samples, plan.slice_axis(ndarray::Axis(1), (1..).into()), &spectrum(), &config());
        assert!(matches!(narrow, Err(ForecastError::Plan(PlanError::BandCount { .. }))));
        assert_eq!(forecasts(&[], plan.view(), &spectrum(), &config()), Ok(Forecasts::default()));
    }
}
