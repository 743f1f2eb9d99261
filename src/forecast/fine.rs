//! Turns a plan frame and the samples before it into one spectrum: the frame's bands with the fine structure of the past.
//!
//! Bands are a quarter tone wide and say how strong a sound is, not at which frequency in them it lies; noise through their
//! spectrum is breath. What was played last says it: within each band the past's spectrum gives the form, the plan the
//! power. A band in which nothing has sounded yet has no form, and the plan's alone remains.

use std::sync::Arc;

use super::past::PastForecast;
use super::{ForecastConfig, ForecastError};
use crate::plan::fourier::{Workspace, quick_len};
use crate::plan::spectrum::{FLOOR, Grid, UNITS_PER_NEPER};
use crate::plan::{PlanError, Spectrum};

/// A line stands at most this far above the mean of its band, nepers of power (12 dB).
const MOST: f64 = 2.76;

/// Spectra over a grid fine enough for the past's window, and room to make them in.
#[derive(Clone)]
pub(super) struct FineStructure {
    grid: Arc<Grid>,
    /// Over the past's samples, of the energy of the plan's.
    window: Vec<f64>,
    exponent: f64,
    order: usize,
    lag_window_hz: f64,
    work: Workspace,
    /// ln power of each band.
    planned: Vec<f64>,
    found: Vec<f64>,
    lags: Vec<f64>,
}

impl FineStructure {
    pub fn new(spectrum: &Spectrum, config: &ForecastConfig) -> Self {
        let mut window = PastForecast::window(config.past_window);
        let energy: f64 = window.iter().map(|w| w * w).sum();
        window.iter_mut().for_each(|w| *w *= (spectrum.energy() / energy).sqrt());
        // Long enough that the lags asked for do not wrap round.
        let grid = spectrum.grid(quick_len(config.past_window + config.planned_order));
        Self {
            window,
            exponent: config.fine_structure,
            order: config.planned_order,
            lag_window_hz: config.lag_window_hz,
            work: grid.fourier.workspace(),
            planned: Vec::with_capacity(spectrum.n_bands()),
            found: Vec::with_capacity(spectrum.n_bands()),
            lags: Vec::with_capacity(config.planned_order + 1),
            grid,
        }
    }

    /// Autocorrelation of the sound that follows `past`, `[past_window]`, by the plan frame `bands`, lags `0..=planned_order`, per
    /// sample: as [`Spectrum::autocorrelation`] of the bands alone.
    ///
    /// # Errors
    /// When `bands` is no frame of `spectrum`.
    pub fn autocorrelation(
        &mut self,
        spectrum: &Spectrum,
        bands: &[f32],
        past: &[f32],
    ) -> Result<&[f64], ForecastError> {
        if bands.len() != spectrum.n_bands() {
            return Err(PlanError::BandCount { expected: spectrum.n_bands(), got: bands.len() }.into());
        }
        let Self { grid, window, exponent, work, planned, found, .. } = self;
        let (sounding, rest) = work.block.split_at_mut(window.len());
        for ((y, &x), w) in sounding.iter_mut().zip(past).zip(&*window) {
            *y = f64::from(x) * w;
        }
        rest.fill(0.0);
        grid.fourier.power(work);
        planned.clear();
        planned.extend(bands.iter().map(|&band| f64::from(band) / UNITS_PER_NEPER));
        let read = |bins: &[f64], found: &mut Vec<f64>| {
            found.clear();
            found.extend(grid.powers(bins).map(|power| (power + FLOOR).ln()));
        };
        read(&work.power, found);
        let means = grid.interpolate(planned).zip(grid.interpolate(found));
        for (power, (planned, past)) in work.power.iter_mut().zip(means) {
            let form = ((*power + FLOOR).ln() - past).min(MOST);
            *power = (planned + *exponent * form).exp();
        }
        // The form has moved the bands' power; put it back.
        read(&work.power, found);
        found.iter_mut().zip(&*planned).for_each(|(found, planned)| *found = planned - *found);
        for (power, surplus) in work.power.iter_mut().zip(grid.interpolate(found)) {
            *power *= surplus.exp();
        }
        grid.fourier.autocorrelation(work);
        spectrum.lags_into(&work.block, self.order, self.lag_window_hz, &mut self.lags);
        Ok(&self.lags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanConfig;
    use crate::rng::Rng;

    fn config() -> ForecastConfig {
        ForecastConfig { planned_order: 512, lag_window_hz: 1.0, fine_structure: 0.75, ..ForecastConfig::default() }
    }

    fn spectrum() -> Spectrum {
        Spectrum::new(16_000, &PlanConfig::default()).unwrap()
    }

    fn tone(hz: f64, n: usize) -> Vec<f32> {
        (0..n).map(|t| (0.2 * (std::f64::consts::TAU * hz * t as f64 / 16_000.0).sin()) as f32).collect()
    }

    /// Power at `hz` by the lags `r`.
    fn power_at(r: &[f64], hz: f64) -> f64 {
        let angle = |lag: usize| (std::f64::consts::TAU * hz * lag as f64 / 16_000.0).cos();
        r[0] + 2.0 * (1..r.len()).map(|lag| (1.0 - lag as f64 / r.len() as f64) * r[lag] * angle(lag)).sum::<f64>()
    }

    #[test]
    fn a_line_of_the_past_is_sharper_than_the_plan_alone() {
        let (spectrum, config, past) = (spectrum(), config(), tone(1000.0, 4096));
        let bands = spectrum.analyse_last(&past);
        let mut fine = FineStructure::new(&spectrum, &config);
        let with = fine.autocorrelation(&spectrum, &bands, &past).unwrap().to_vec();
        let alone = spectrum.autocorrelation(&bands, config.planned_order, config.lag_window_hz).unwrap();
        let contrast = |r: &[f64]| power_at(r, 1000.0) / power_at(r, 1040.0);
        assert!(contrast(&with) > 2.0 * contrast(&alone), "{} {}", contrast(&with), contrast(&alone));
        // The plan still says how much there is; its own bands are too wide to say it of a line.
        assert!((with[0] / 0.02).ln().abs() < 0.1, "{} {}", with[0], alone[0]);
    }

    #[test]
    fn after_silence_the_plan_alone_remains() {
        let (spectrum, config) = (spectrum(), config());
        let mut rng = Rng::new(5);
        let bands: Vec<f32> = (0..spectrum.n_bands()).map(|_| rng.uniform() - 1.0).collect();
        let mut fine = FineStructure::new(&spectrum, &config);
        let with = fine.autocorrelation(&spectrum, &bands, &[0.0; 4096]).unwrap().to_vec();
        let alone = spectrum.autocorrelation(&bands, config.planned_order, config.lag_window_hz).unwrap();
        // Bands of noise are not smooth: putting their power back moves them a little.
        assert!((with[0] / alone[0]).ln().abs() < 0.2, "{} {}", with[0], alone[0]);
        let flat = vec![0.5; spectrum.n_bands()];
        let with = fine.autocorrelation(&spectrum, &flat, &[0.0; 4096]).unwrap().to_vec();
        let alone = spectrum.autocorrelation(&flat, config.planned_order, config.lag_window_hz).unwrap();
        assert!(with.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-3 * alone[0]));
    }

    #[test]
    fn bands_keep_the_power_that_the_plan_gives_them() {
        let (spectrum, config) = (spectrum(), config());
        let past: Vec<f32> = tone(440.0, 4096).iter().zip(tone(2500.0, 4096)).map(|(a, b)| a + 0.1 * b).collect();
        let mut rng = Rng::new(6);
        let other: Vec<f32> = (0..2048).map(|_| 0.05 * rng.normal()).collect();
        let bands = spectrum.analyse_last(&other);
        let mut fine = FineStructure::new(&spectrum, &config);
        fine.autocorrelation(&spectrum, &bands, &past).unwrap();
        let errors: Vec<f64> = fine.found.iter().map(|surplus| surplus.abs()).collect();
        // What was put back is bounded: a line may hold all of a band's power, not more.
        assert!(errors.iter().all(|e| *e < MOST), "{errors:?}");
    }

    #[test]
    fn a_frame_of_another_plan_is_refused() {
        let mut fine = FineStructure::new(&spectrum(), &config());
        let refused = fine.autocorrelation(&spectrum(), &[0.0; 3], &[0.0; 4096]);
        assert!(matches!(refused, Err(ForecastError::Plan(PlanError::BandCount { got: 3, .. }))));
    }
}
