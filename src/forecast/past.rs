//! Turns past samples into a forecast of the next: linear prediction whose coefficients come from the past alone.

use std::f64::consts::FRAC_PI_2;

use serde::{Deserialize, Serialize};

use super::history::History;
use super::lpc::{levinson, predict};
use super::{ForecastConfig, ForecastError, check_length};
use crate::plan::fourier::{Fourier, Workspace, quick_len};

/// White noise that keeps the predictor finite: relative to the power, and absolute.
const WHITE: (f64, f64) = (1e-7, 1e-6);
/// The part of the window that falls, towards the latest sample.
const FALLING_PART: usize = 16;

/// Backward-adaptive linear prediction of a stream, after ITU-T G.728: new coefficients every `past_hop` samples,
/// counted from the stream's start, from the `past_window` samples before. Bounded memory.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "State", into = "State")]
pub struct PastForecast {
    config: ForecastConfig,
    /// The estimator's window, and the samples since it ended.
    history: History,
    /// `[order]`, the latest sample's last.
    coefficients: Vec<f32>,
    /// Samples since the coefficients' window ended.
    age: usize,
    /// The coefficients are those of an earlier window; computed when first asked for.
    outdated: bool,
    estimator: Estimator,
}

impl PastForecast {
    /// The forecast of a stream's first sample, before which there is silence.
    ///
    /// # Errors
    /// When the settings cannot be.
    pub fn new(config: &ForecastConfig) -> Result<Self, ForecastError> {
        config.validate_alone()?;
        Ok(Self {
            config: config.clone(),
            history: History::new(config.past_window + config.past_hop),
            coefficients: vec![0.0; config.order],
            age: 0,
            outdated: false,
            estimator: Estimator::new(config),
        })
    }

    /// The forecast of the next sample, in [-1, 1].
    pub fn forecast(&mut self) -> f32 {
        if self.outdated {
            let window = self.history.recent(self.config.past_window, self.age);
            self.coefficients = self.estimator.estimate(window);
            self.outdated = false;
        }
        predict(&self.coefficients, self.history.recent(self.config.order, 0))
    }

    /// What the next sample was. Cheap without a forecast in between: coefficients that nobody asks for are not
    /// computed.
    pub fn push(&mut self, sample: f32) {
        self.history.push(sample);
        self.age += 1;
        if self.age == self.config.past_hop {
            self.age = 0;
            self.outdated = true;
        }
    }
}

/// What a [`PastForecast`] is saved as.
#[derive(Serialize, Deserialize)]
struct State {
    config: ForecastConfig,
    history: History,
    coefficients: Vec<f32>,
    age: usize,
    outdated: bool,
}

impl From<PastForecast> for State {
    fn from(from: PastForecast) -> Self {
        let PastForecast { config, history, coefficients, age, outdated, .. } = from;
        Self { config, history, coefficients, age, outdated }
    }
}

impl TryFrom<State> for PastForecast {
    type Error = ForecastError;

    fn try_from(state: State) -> Result<Self, ForecastError> {
        let State { config, history, coefficients, age, outdated } = state;
        config.validate_alone()?;
        check_length("samples", config.past_window + config.past_hop, history.keep())?;
        check_length("coefficients", config.order, coefficients.len())?;
        check_length("samples of age", age.min(config.past_hop - 1), age)?;
        let estimator = Estimator::new(&config);
        Ok(Self { config, history, coefficients, age, outdated, estimator })
    }
}

/// The coefficients of a window of samples.
#[derive(Clone)]
struct Estimator {
    order: usize,
    window: Vec<f64>,
    fourier: Fourier,
    work: Workspace,
}

impl Estimator {
    fn new(config: &ForecastConfig) -> Self {
        let n = config.past_window;
        let fall = n / FALLING_PART;
        let ramp = |n: usize| (0..n).map(move |i| FRAC_PI_2 * (i as f64 + 0.5) / n as f64);
        // Long enough that the lags asked for do not wrap round.
        let fourier = Fourier::new(quick_len(n + config.order));
        Self {
            order: config.order,
            window: ramp(n - fall).map(f64::sin).chain(ramp(fall).map(f64::cos)).collect(),
            work: fourier.workspace(),
            fourier,
        }
    }

    /// Autocorrelation of the `past_window` samples under the window, in `work.block[..=order]`, through the
    /// power spectrum.
    fn autocorrelation(&mut self, samples: &[f32]) -> &mut [f64] {
        let (sounding, rest) = self.work.block.split_at_mut(self.window.len());
        for ((y, &x), w) in sounding.iter_mut().zip(samples).zip(&self.window) {
            *y = f64::from(x) * w;
        }
        rest.fill(0.0);
        self.fourier.power(&mut self.work);
        self.fourier.autocorrelation(&mut self.work);
        &mut self.work.block[..=self.order]
    }

    /// Coefficients for what follows `samples`, `[past_window]`; the latest sample's last.
    fn estimate(&mut self, samples: &[f32]) -> Vec<f32> {
        let order = self.order;
        let r = self.autocorrelation(samples);
        r[0] = r[0] * (1.0 + WHITE.0) + WHITE.1;
        let mut coefficients = levinson(r, order).coefficients;
        coefficients.reverse();
        coefficients
    }
}
