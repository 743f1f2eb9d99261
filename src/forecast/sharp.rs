//! Turns plan frames into a spectrum as sharp as the sound was before the plan's analysis blurred it.
//!
//! The analysis sees a partial through its window, 16 Hz wide, and the bands are no finer: noise of just that spectrum is
//! breath, and a rumble in the bass. What lies under it is found again by Richardson-Lucy deconvolution. A sharp line rings
//! on for long after its note was damped; so where the plan falls, its spectrum stays as it is.

use std::sync::Arc;

use super::{ForecastConfig, ForecastError};
use crate::plan::fourier::Workspace;
use crate::plan::response::Response;
use crate::plan::spectrum::UNITS_PER_NEPER;
use crate::plan::{PlanError, Spectrum};

/// Steps before the spectrum that is kept for bands that fall.
const BLUNT_STEPS: usize = 1;
/// A band that falls by this much in a frame, nepers of power, begins to lose its sharpness (1.7 dB) ...
const FALL: f64 = 0.4;
/// ... and has none left when it falls by this much more (4.3 dB).
const FALL_OVER: f64 = 1.0;

/// Sharpens plan frames, in room of its own.
#[derive(Clone)]
pub(super) struct Sharpener {
    response: Arc<Response>,
    steps: usize,
    order: usize,
    lag_window_hz: f64,
    work: Workspace,
    /// `[n_bands]`
    planned: Vec<f64>,
    falls: Vec<f64>,
    /// `[n_bins]`
    blunt: Vec<f64>,
    back: Vec<f64>,
    lags: Vec<f64>,
}

impl Sharpener {
    pub fn new(spectrum: &Spectrum, config: &ForecastConfig) -> Self {
        let response = spectrum.response();
        let work = response.grid.fourier.workspace();
        Self {
            steps: config.deconvolution,
            order: config.planned_order,
            lag_window_hz: config.lag_window_hz,
            planned: Vec::with_capacity(spectrum.n_bands()),
            falls: Vec::with_capacity(spectrum.n_bands()),
            blunt: vec![0.0; work.power.len()],
            back: vec![0.0; work.power.len()],
            lags: Vec::with_capacity(config.planned_order + 1),
            work,
            response,
        }
    }

    /// Autocorrelation of the sound of the plan frame `bands` after the frame `before`, lags `0..=planned_order`, per sample:
    /// as [`Spectrum::autocorrelation`] of the bands alone.
    ///
    /// # Errors
    /// When these are no frames of `spectrum`.
    pub fn autocorrelation(
        &mut self,
        spectrum: &Spectrum,
        before: &[f32],
        bands: &[f32],
    ) -> Result<&[f64], ForecastError> {
        for frame in [before, bands] {
            if frame.len() != spectrum.n_bands() {
                return Err(PlanError::BandCount { expected: spectrum.n_bands(), got: frame.len() }.into());
            }
        }
        let Self { response, work, planned, falls, blunt, back, .. } = self;
        let nepers = |band: f32| f64::from(band) / UNITS_PER_NEPER;
        planned.clear();
        planned.extend(bands.iter().copied().map(nepers));
        for (power, ln) in work.power.iter_mut().zip(response.grid.interpolate(planned)) {
            *power = ln.exp();
        }
        planned.iter_mut().for_each(|ln| *ln = ln.exp());
        for step in 0..self.steps {
            if step == BLUNT_STEPS {
                blunt.copy_from_slice(&work.power);
            }
            response.sharpen(&mut work.power, planned, back);
        }
        if self.steps > BLUNT_STEPS {
            falls.clear();
            let fall =
                |(&before, &now): (&f32, &f32)| ((nepers(before) - nepers(now) - FALL) / FALL_OVER).clamp(0.0, 1.0);
            falls.extend(before.iter().zip(bands).map(fall));
            for ((power, blunt), fall) in work.power.iter_mut().zip(&*blunt).zip(response.grid.interpolate(falls)) {
                *power += fall * (blunt - *power);
            }
        }
        response.grid.fourier.autocorrelation(work);
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
        ForecastConfig { planned_order: 512, lag_window_hz: 1.0, deconvolution: 20, ..ForecastConfig::default() }
    }

    fn spectrum() -> Spectrum {
        Spectrum::new(16_000, &PlanConfig::default()).unwrap()
    }

    fn tone(hz: f64, n: usize) -> Vec<f32> {
        (0..n).map(|t| (0.2 * (std::f64::consts::TAU * hz * t as f64 / 16_000.0).sin()) as f32).collect()
    }

    /// What is left of the power at the longest lags: the sharper a line, the longer it knows itself.
    fn memory(r: &[f64]) -> f64 {
        r[480..].iter().fold(0.0f64, |top, r| top.max(r.abs())) / r[0]
    }

    fn sharp(before: &[f32], bands: &[f32]) -> Vec<f64> {
        Sharpener::new(&spectrum(), &config()).autocorrelation(&spectrum(), before, bands).unwrap().to_vec()
    }

    #[test]
    fn a_tone_is_sharper_than_the_plan_alone_and_as_loud_as_it_was() {
        for hz in [87.3, 440.0, 1000.0] {
            let bands = spectrum().analyse_last(&tone(hz, 4096));
            let alone = spectrum().autocorrelation(&bands, 512, 1.0).unwrap();
            let r = sharp(&bands, &bands);
            assert!(memory(&r) > memory(&alone) + 0.15, "{hz} Hz: {} {}", memory(&r), memory(&alone));
            assert!((r[0] / 0.02).ln().abs() < 0.05, "{hz} Hz: power {}, by the bands alone {}", r[0], alone[0]);
        }
    }

    #[test]
    fn the_plan_finds_its_own_bands_again() {
        let spectrum = spectrum();
        let (response, mut rng) = (spectrum.response(), Rng::new(5));
        let chord: Vec<f32> =
            tone(220.0, 4096).iter().zip(tone(277.2, 4096)).map(|(a, b)| a + b + 0.001 * rng.normal()).collect();
        let planned: Vec<f64> =
            spectrum.analyse_last(&chord).iter().map(|&band| (f64::from(band) / UNITS_PER_NEPER).exp()).collect();
        let mut s = vec![1.0; response.grid.fourier.workspace().power.len()];
        let mut back = s.clone();
        for _ in 0..100 {
            response.sharpen(&mut s, &planned, &mut back);
        }
        let errors: Vec<f64> =
            response.bands_of(&s).iter().zip(&planned).map(|(a, b)| (a / b).ln().abs() * 4.343).collect();
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        assert!(mean < 0.5, "{mean} dB, {errors:.1?}");
    }

    #[test]
    fn a_flat_plan_stays_flat() {
        let flat = vec![0.5; spectrum().n_bands()];
        let alone = spectrum().autocorrelation(&flat, 512, 1.0).unwrap();
        let r = sharp(&flat, &flat);
        assert!(r.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 0.02 * alone[0]));
    }

    #[test]
    fn a_note_that_is_damped_loses_its_sharpness() {
        let bands = spectrum().analyse_last(&tone(440.0, 4096));
        let louder: Vec<f32> = bands.iter().map(|band| band + 0.5).collect();
        let (steady, falling) = (memory(&sharp(&bands, &bands)), memory(&sharp(&louder, &bands)));
        assert!(1.0 - steady < 0.5 * (1.0 - falling), "{steady} {falling}");
        // A note that begins keeps it.
        let softer: Vec<f32> = bands.iter().map(|band| band - 0.5).collect();
        assert_eq!(sharp(&softer, &bands), sharp(&bands, &bands));
    }

    #[test]
    fn frames_of_another_plan_are_refused() {
        let (spectrum, right) = (spectrum(), vec![0.0; spectrum().n_bands()]);
        for (before, bands) in [(&right[..], &[0.0; 3][..]), (&[0.0; 3], &right)] {
            let mut sharpener = Sharpener::new(&spectrum, &config());
            let refused = sharpener.autocorrelation(&spectrum, before, bands);
            assert!(matches!(refused, Err(ForecastError::Plan(PlanError::BandCount { got: 3, .. }))));
        }
    }
}
