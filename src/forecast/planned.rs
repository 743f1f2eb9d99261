//! Turns past samples and a plan frame into a forecast of the next sample, and into the size of its error.

use serde::{Deserialize, Serialize};

use super::fine::FineStructure;
use super::history::History;
use super::lpc::{Recursion, predict};
use super::{ForecastConfig, ForecastError, check_length};
use crate::plan::{Autocorrelation, Spectrum};
use crate::simd::Kernels;
use crate::simd::portable::exp;

/// Mean of |x| of a residual, as a part of its root mean square; between a Laplacian's (0.71) and a Gaussian's (0.8).
const MEAN_TO_RMS: f64 = 0.7;
const LEAST_SCALE: f64 = 1e-4;

/// Linear prediction of a stream by the spectrum that the current plan frame describes, with the fine structure of the
/// stream's own past where the settings say so.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "State", into = "State")]
pub struct PlannedForecast {
    config: ForecastConfig,
    history: History,
    /// `[order]`, the latest sample's last.
    coefficients: Vec<f32>,
    log_scale: f32,
    recursion: Recursion,
    autocorrelation: Autocorrelation,
    /// Made with the first frame.
    fine: Option<FineStructure>,
    kernels: &'static Kernels,
}

impl PlannedForecast {
    /// The forecast of a stream's first sample, before which there is silence; [`begin_frame`](Self::begin_frame)
    /// comes next.
    ///
    /// # Errors
    /// When the settings cannot be.
    pub fn new(config: &ForecastConfig) -> Result<Self, ForecastError> {
        config.validate_alone()?;
        Ok(Self {
            config: config.clone(),
            history: History::new(config.planned_memory()),
            coefficients: vec![0.0; config.planned_order],
            log_scale: LEAST_SCALE.ln() as f32,
            recursion: Recursion::new(config.planned_order),
            autocorrelation: Autocorrelation::default(),
            fine: None,
            kernels: Kernels::chosen(),
        })
    }

    /// A forecast that has heard `samples`, the last ones of a stream; [`begin_frame`](Self::begin_frame) comes next.
    ///
    /// # Errors
    /// When the settings cannot be, or there are more or fewer samples.
    pub(crate) fn after(config: &ForecastConfig, samples: Vec<f32>) -> Result<Self, ForecastError> {
        check_length("samples", config.planned_memory(), samples.len())?;
        Ok(Self { history: samples.into(), ..Self::new(config)? })
    }

    /// What [`after`](Self::after) takes.
    pub(crate) fn heard(&self) -> &[f32] {
        self.history.recent(self.history.keep(), 0)
    }

    /// Computes with these kernels instead of the machine's best; the results are the same.
    pub fn with_kernels(self, kernels: &'static Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// From here on samples follow the plan frame `bands`, `[n_bands]`.
    ///
    /// # Errors
    /// When `bands` is no frame of `spectrum`, or its window too short for the order.
    pub fn begin_frame(&mut self, spectrum: &Spectrum, bands: &[f32]) -> Result<(), ForecastError> {
        let ForecastConfig { planned_order: order, lag_window_hz, fine_structure, past_window, .. } = self.config;
        let r = if fine_structure > 0.0 {
            let fine = self.fine.get_or_insert_with(|| FineStructure::new(spectrum, &self.config));
            fine.autocorrelation(spectrum, bands, self.history.recent(past_window, 0))?
        } else {
            spectrum.autocorrelation_into(bands, order, lag_window_hz, &mut self.autocorrelation)?
        };
        let residual_power = self.recursion.solve(r, self.kernels);
        self.coefficients.iter_mut().zip(self.recursion.rising()).for_each(|(c, a)| *c = a);
        self.log_scale = (residual_power.sqrt() * MEAN_TO_RMS + LEAST_SCALE).ln() as f32;
        Ok(())
    }

    /// The forecast of the next sample, in [-1, 1].
    pub fn forecast(&mut self) -> f32 {
        predict(&self.coefficients, self.history.recent(self.config.planned_order, 0), self.kernels)
    }

    /// ln of the mean |residual| that the frame implies.
    pub fn log_scale(&self) -> f32 {
        self.log_scale
    }

    /// Root mean square of the residual that the frame implies.
    pub fn residual_rms(&self) -> f32 {
        exp(self.log_scale) / MEAN_TO_RMS as f32
    }

    /// What the next sample was.
    pub fn push(&mut self, sample: f32) {
        self.history.push(sample);
    }
}

/// What a [`PlannedForecast`] is saved as.
#[derive(Serialize, Deserialize)]
struct State {
    config: ForecastConfig,
    history: History,
    coefficients: Vec<f32>,
    log_scale: f32,
}

impl From<PlannedForecast> for State {
    fn from(from: PlannedForecast) -> Self {
        let PlannedForecast { config, history, coefficients, log_scale, .. } = from;
        Self { config, history, coefficients, log_scale }
    }
}

impl TryFrom<State> for PlannedForecast {
    type Error = ForecastError;

    fn try_from(state: State) -> Result<Self, ForecastError> {
        let State { config, history, coefficients, log_scale } = state;
        check_length("samples", config.planned_memory(), history.keep())?;
        check_length("coefficients", config.planned_order, coefficients.len())?;
        Ok(Self { history, coefficients, log_scale, ..Self::new(&config)? })
    }
}
