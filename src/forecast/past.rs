//! Turns past samples into a forecast of the next: linear prediction whose coefficients come from the past alone.

use std::f64::consts::FRAC_PI_2;

use serde::{Deserialize, Serialize};

use super::history::History;
use super::lpc::{Recursion, predict};
use super::{ForecastConfig, ForecastError, check_length};
use crate::plan::fourier::{Fourier, Workspace, quick_len};
use crate::simd::Kernels;

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
    kernels: &'static Kernels,
}

impl PastForecast {
    /// White noise that keeps the predictor finite: relative to the power, and absolute.
    pub const WHITE: (f64, f64) = (1e-7, 1e-6);

    /// The window over the last `n` samples: rises as a sine, falls as a cosine towards the latest.
    pub fn window(n: usize) -> Vec<f64> {
        let fall = n / FALLING_PART;
        let ramp = |n: usize| (0..n).map(move |i| FRAC_PI_2 * (i as f64 + 0.5) / n as f64);
        ramp(n - fall).map(f64::sin).chain(ramp(fall).map(f64::cos)).collect()
    }

    /// What it is computed from.
    pub(crate) fn config(&self) -> &ForecastConfig {
        &self.config
    }

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
            kernels: Kernels::chosen(),
        })
    }

    /// A forecast that has heard `samples`, the last `past_window + past_hop` of a stream that new coefficients are due in.
    ///
    /// # Errors
    /// When the settings cannot be, or there are more or fewer samples.
    pub(crate) fn after(config: &ForecastConfig, samples: Vec<f32>) -> Result<Self, ForecastError> {
        check_length("samples", config.past_window + config.past_hop, samples.len())?;
        Ok(Self { history: samples.into(), outdated: true, ..Self::new(config)? })
    }

    /// What [`after`](Self::after) takes; `None` between two renewals of the coefficients.
    pub(crate) fn heard(&self) -> Option<&[f32]> {
        (self.age == 0).then(|| self.history.recent(self.history.keep(), 0))
    }

    /// Computes with these kernels instead of the machine's best; the results are the same.
    pub fn with_kernels(self, kernels: &'static Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// The forecast of the next sample, in [-1, 1].
    pub fn forecast(&mut self) -> f32 {
        if self.outdated {
            let window = self.history.recent(self.config.past_window, self.age);
            self.estimator.estimate(window, self.kernels, &mut self.coefficients);
            self.outdated = false;
        }
        predict(&self.coefficients, self.history.recent(self.config.order, 0), self.kernels).clamp(-1.0, 1.0)
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
        Ok(Self { config, history, coefficients, age, outdated, estimator, kernels: Kernels::chosen() })
    }
}

/// The coefficients of a window of samples.
#[derive(Clone)]
struct Estimator {
    order: usize,
    recursion: Recursion,
    window: Vec<f64>,
    fourier: Fourier,
    work: Workspace,
}

impl Estimator {
    fn new(config: &ForecastConfig) -> Self {
        let n = config.past_window;
        // Long enough that the lags asked for do not wrap round.
        let fourier = Fourier::new(quick_len(n + config.order));
        Self {
            order: config.order,
            recursion: Recursion::new(config.order),
            window: PastForecast::window(n),
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
    fn estimate(&mut self, samples: &[f32], kernels: &Kernels, coefficients: &mut [f32]) {
        self.autocorrelation(samples);
        let r = &mut self.work.block[..=self.order];
        r[0] = r[0] * (1.0 + PastForecast::WHITE.0) + PastForecast::WHITE.1;
        self.recursion.solve(r, kernels);
        coefficients.iter_mut().zip(self.recursion.rising()).for_each(|(c, a)| *c = a);
    }
}

#[cfg(test)]
mod tests {
    use super::super::lpc::autocorrelation;
    use super::*;
    use crate::rng::Rng;

    fn small() -> ForecastConfig {
        ForecastConfig { order: 12, past_window: 192, past_hop: 16, ..ForecastConfig::default() }
    }

    fn noise(n: usize) -> Vec<f32> {
        let mut rng = Rng::new(4);
        (0..n).map(|_| 0.3 * rng.normal()).collect()
    }

    #[test]
    fn fast_autocorrelation_equals_the_definition() {
        for config in [small(), ForecastConfig::default(), ForecastConfig { order: 99, past_window: 100, ..small() }] {
            let mut estimator = Estimator::new(&config);
            let samples = noise(config.past_window);
            let windowed: Vec<f64> = samples.iter().zip(&estimator.window).map(|(&x, w)| f64::from(x) * w).collect();
            let direct = autocorrelation(&windowed, config.order);
            for (lag, (fast, direct)) in estimator.autocorrelation(&samples).iter().zip(&direct).enumerate() {
                let error = (*fast - direct).abs() / windowed.iter().map(|x| x * x).sum::<f64>();
                assert!(error < 1e-14, "window {}, lag {lag}: {fast}, expected {direct}", config.past_window);
            }
        }
    }

    #[test]
    fn coefficients_are_those_of_the_window_before_the_last_hop() {
        let config = small();
        let samples = noise(1000);
        let mut stream = PastForecast::new(&config).unwrap();
        for (n, &sample) in samples.iter().enumerate() {
            let got = stream.forecast();
            stream.push(sample);
            // The definition, without stream, transform or recursion's state.
            let end = n - n % config.past_hop;
            let at = |t: usize, end: usize| (end + t).checked_sub(192).map_or(0.0, |t| f64::from(samples[t]));
            let window = |i: usize| match i {
                0..180 => (FRAC_PI_2 * (i as f64 + 0.5) / 180.0).sin(),
                _ => (FRAC_PI_2 * (i as f64 - 180.0 + 0.5) / 12.0).cos(),
            };
            let block: Vec<f64> = (0..192).map(|i| at(i, end) * window(i)).collect();
            let mut r = autocorrelation(&block, config.order);
            r[0] = r[0] * (1.0 + 1e-7) + 1e-6;
            let coefficients = crate::forecast::levinson(&r, config.order).coefficients;
            let expected: f64 = coefficients.iter().enumerate().map(|(k, &a)| f64::from(a) * at(191 - k, n)).sum();
            assert!((f64::from(got) - expected).abs() < 1e-5, "sample {n}: {got}, expected {expected}");
        }
    }

    #[test]
    fn a_process_is_forecast_down_to_its_innovation() {
        let mut rng = Rng::new(8);
        let mut samples = vec![0.0f32; 2];
        for n in 2..12_000 {
            let next = 1.6 * samples[n - 1] - 0.8 * samples[n - 2] + 0.01 * rng.normal();
            samples.push(next);
        }
        let config = ForecastConfig { order: 16, past_window: 2048, ..ForecastConfig::default() };
        let mut stream = PastForecast::new(&config).unwrap();
        let errors: Vec<f32> = samples
            .iter()
            .map(|&sample| {
                let error = sample - stream.forecast();
                stream.push(sample);
                error
            })
            .collect();
        let power = errors[4000..].iter().map(|e| e * e).sum::<f32>() / 8000.0;
        assert!((0.95e-4..1.06e-4).contains(&power), "{power}");
    }

    #[test]
    fn a_restored_stream_goes_on_bit_for_bit() {
        let samples = noise(3000);
        let mut stream = PastForecast::new(&small()).unwrap();
        // Pushed without a forecast: coefficients are computed when first asked for.
        let mut late = stream.clone();
        samples[..1399].iter().for_each(|&sample| late.push(sample));
        for (n, &sample) in samples.iter().enumerate() {
            let forecast = stream.forecast();
            if n >= 1399 {
                assert_eq!(late.forecast().to_bits(), forecast.to_bits(), "sample {n}");
                late.push(sample);
            }
            stream.push(sample);
            if n % 97 == 0 {
                let saved = serde_json::to_string(&stream).unwrap();
                stream = serde_json::from_str(&saved).unwrap();
                assert_eq!(serde_json::to_string(&stream).unwrap(), saved, "sample {n}");
            }
        }
    }

    #[test]
    fn a_damaged_state_is_refused() {
        let stream = PastForecast::new(&small()).unwrap();
        for (part, damage) in [
            ("history", serde_json::json!([0.0])),
            ("coefficients", serde_json::json!([])),
            ("age", serde_json::json!(16)),
        ] {
            let mut state = serde_json::to_value(&stream).unwrap();
            state[part] = damage;
            let error = serde_json::from_value::<PastForecast>(state).err().expect(part).to_string();
            assert!(error.contains("damaged forecast state"), "{part}: {error}");
        }
    }

    #[test]
    fn samples_that_are_no_numbers_pass() {
        let mut stream = PastForecast::new(&small()).unwrap();
        stream.push(f32::NAN);
        for sample in noise(1000) {
            assert!(stream.forecast().abs() <= 1.0);
            stream.push(sample);
        }
        assert_ne!(stream.forecast(), 0.0);
    }
}
