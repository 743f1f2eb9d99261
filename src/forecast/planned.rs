//! Turns past samples and a plan frame into a forecast of the next sample, and into the size of its error.

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};

use super::history::History;
use super::lpc::{Recursion, predict};
use super::sharp::Sharpener;
use super::tones::{self, Tones};
use super::{ForecastConfig, ForecastError, MOST_SAMPLE, check_length};
use crate::plan::{Autocorrelation, Spectrum};
use crate::simd::Kernels;
use crate::simd::portable::exp;

/// Mean of |x| of a residual, as a part of its root mean square; between a Laplacian's (0.71) and a Gaussian's (0.8).
const MEAN_TO_RMS: f64 = 0.7;
const LEAST_SCALE: f64 = 1e-4;

/// A sound louder than planned by this much, nepers of power, is damped (3 dB).
const TOO_LOUD: f64 = 0.7;
/// Louder than this (38 dB) makes no difference.
const LOUDEST: f64 = 8.0;
/// Samples in which damping takes a neper of power for each that a sound is too loud.
const DAMPING_TIME: f64 = 170.0;

/// By what the poles of a forecast shrink after the samples `heard` where the power `planned` was asked for: a sharp line whose note
/// was damped would ring on for longer than the note.
fn damping(heard: &[f32], planned: f64) -> f32 {
    let power = heard.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / heard.len() as f64;
    let surplus = ((power / planned).ln() - TOO_LOUD).clamp(0.0, LOUDEST);
    (-surplus / (2.0 * DAMPING_TIME)).exp() as f32
}

/// Linear prediction of a stream by the spectrum that the current plan frame describes.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "State", into = "State")]
pub struct PlannedForecast {
    config: ForecastConfig,
    /// What the tones left over of the samples.
    history: History,
    tones: Option<Tones>,
    /// `[order]`, the latest sample's last.
    coefficients: Vec<f32>,
    log_scale: f32,
    recursion: Recursion,
    autocorrelation: Autocorrelation,
    /// Made with the first frame.
    sharpener: Option<Sharpener>,
    kernels: &'static Kernels,
}

impl PlannedForecast {
    /// What it is computed from.
    pub(crate) fn config(&self) -> &ForecastConfig {
        &self.config
    }

    /// The forecast of a stream's first sample, before which there is silence; [`begin_frame`](Self::begin_frame)
    /// comes next.
    ///
    /// # Errors
    /// When the settings cannot be.
    pub fn new(config: &ForecastConfig) -> Result<Self, ForecastError> {
        config.validate_alone()?;
        Ok(Self {
            config: config.clone(),
            history: History::new(config.planned_order),
            tones: config.tones.then(|| Tones::new(config.past_window)),
            coefficients: vec![0.0; config.planned_order],
            log_scale: LEAST_SCALE.ln() as f32,
            recursion: Recursion::new(config.planned_order),
            autocorrelation: Autocorrelation::default(),
            sharpener: None,
            kernels: Kernels::chosen(),
        })
    }

    /// A forecast after a past; [`begin_frame`](Self::begin_frame) comes next.
    ///
    /// # Errors
    /// When the settings cannot be, or there are more or fewer samples.
    pub(crate) fn after(config: &ForecastConfig, past: PlannedPast) -> Result<Self, ForecastError> {
        let PlannedPast { left, heard, rest } = past;
        let tones = config.tones.then(|| tones::State { heard: heard.into(), rest });
        let Self { coefficients, log_scale, .. } = Self::new(config)?;
        State { config: config.clone(), history: left.into(), tones, coefficients, log_scale }.try_into()
    }

    /// What [`after`](Self::after) takes.
    pub(crate) fn heard(&self) -> PlannedPast {
        let (heard, rest) = self.tones.clone().map_or_else(Default::default, |tones| {
            let tones::State { heard, rest } = tones.into();
            (heard.into(), rest)
        });
        PlannedPast { left: self.history.clone().into(), heard, rest }
    }

    /// Hears `samples`, whole frames of `plan`, `[frames, n_bands]`, without a forecast: the plan is followed only as far as
    /// forecasts after it follow from that.
    ///
    /// # Errors
    /// As [`begin_frame`](Self::begin_frame).
    pub(crate) fn hear(
        &mut self,
        spectrum: &Spectrum,
        samples: &[f32],
        plan: ArrayView2<f32>,
    ) -> Result<(), ForecastError> {
        let followed = plan.nrows().saturating_sub(self.config.tones_before(spectrum.hop()));
        for (frame, samples) in samples.chunks(spectrum.hop()).enumerate() {
            if frame >= followed {
                let bands =
                    |frame: Option<usize>| frame.map_or_else(|| spectrum.silent_frame(), |k| plan.row(k).to_vec());
                self.begin_frame(spectrum, &bands(frame.checked_sub(1)), &bands(Some(frame)))?;
            }
            samples.iter().for_each(|&sample| self.push(sample));
        }
        Ok(())
    }

    /// Computes with these kernels instead of the machine's best; the results are the same.
    pub fn with_kernels(self, kernels: &'static Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// From here on samples follow the plan frame `bands`, `[n_bands]`, which follows the frame `before`.
    ///
    /// # Errors
    /// When these are no frames of `spectrum`, or its window too short for the order.
    pub fn begin_frame(&mut self, spectrum: &Spectrum, before: &[f32], bands: &[f32]) -> Result<(), ForecastError> {
        let ForecastConfig { planned_order: order, lag_window_hz, deconvolution, .. } = self.config;
        let (r, damping) = if deconvolution > 0 {
            let sharpener = self.sharpener.get_or_insert_with(|| Sharpener::new(spectrum, &self.config));
            sharpener.sharpen(spectrum, before, bands)?;
            if let Some(tones) = &mut self.tones {
                tones.fits(spectrum)?;
                tones.begin(spectrum, sharpener);
            }
            let r = sharpener.autocorrelation(spectrum);
            (r, damping(self.history.recent(order, 0), r[0]))
        } else {
            (spectrum.autocorrelation_into(bands, order, lag_window_hz, &mut self.autocorrelation)?, 1.0)
        };
        let residual_power = self.recursion.solve(r, self.kernels);
        let mut factor = 1.0;
        for (c, a) in self.coefficients.iter_mut().rev().zip(self.recursion.rising().rev()) {
            factor *= damping;
            *c = a * factor;
        }
        self.log_scale = (residual_power.sqrt() * MEAN_TO_RMS + LEAST_SCALE).ln() as f32;
        Ok(())
    }

    /// The forecast of the next sample, in [-1, 1].
    pub fn forecast(&self) -> f32 {
        self.expected().clamp(-1.0, 1.0)
    }

    /// The same as far as [`MOST_SAMPLE`] to either side. What is played follows this: a sharp filter that hears clipped samples takes
    /// what was clipped for new sound, rings with it, and is clipped again.
    pub fn expected(&self) -> f32 {
        let rest = predict(&self.coefficients, self.history.recent(self.config.planned_order, 0), self.kernels);
        (self.tones.as_ref().map_or(0.0, Tones::next) + rest).clamp(-MOST_SAMPLE, MOST_SAMPLE)
    }

    /// ln of the mean |residual| that the frame implies.
    pub fn log_scale(&self) -> f32 {
        self.log_scale
    }

    /// Root mean square of the residual that the frame implies; what holds the logarithm is no part of it.
    pub fn residual_rms(&self) -> f32 {
        (exp(self.log_scale) - LEAST_SCALE as f32).max(0.0) / MEAN_TO_RMS as f32
    }

    /// What the next sample was.
    pub fn push(&mut self, sample: f32) {
        let tone = self.tones.as_mut().map_or(0.0, |tones| tones.push(sample));
        self.history.push(sample - tone);
    }
}

/// What a [`PlannedForecast`] remembers between two plan frames.
pub(crate) struct PlannedPast {
    /// What the tones left over of the last samples, `[planned_order]`.
    pub left: Vec<f32>,
    /// The last samples, `[past_window]`; nothing without tones.
    pub heard: Vec<f32>,
    /// How the tones would go on, `[hop]`; nothing without tones or before the first frame.
    pub rest: Vec<f32>,
}

/// What a [`PlannedForecast`] is saved as.
#[derive(Serialize, Deserialize)]
struct State {
    config: ForecastConfig,
    history: History,
    tones: Option<tones::State>,
    coefficients: Vec<f32>,
    log_scale: f32,
}

impl From<PlannedForecast> for State {
    fn from(from: PlannedForecast) -> Self {
        let PlannedForecast { config, history, tones, coefficients, log_scale, .. } = from;
        Self { config, history, tones: tones.map(Into::into), coefficients, log_scale }
    }
}

impl TryFrom<State> for PlannedForecast {
    type Error = ForecastError;

    fn try_from(state: State) -> Result<Self, ForecastError> {
        let State { config, history, tones, coefficients, log_scale } = state;
        check_length("samples", config.planned_order, history.keep())?;
        check_length("coefficients", config.planned_order, coefficients.len())?;
        let tones = tones.map(Tones::from);
        check_length(
            "samples for tones",
            if config.tones { config.past_window } else { 0 },
            tones.as_ref().map_or(0, Tones::keep),
        )?;
        Ok(Self { history, tones, coefficients, log_scale, ..Self::new(&config)? })
    }
}
