//! Turns plan frames into a spectrum as sharp as the sound was before the plan's analysis blurred it.
//!
//! The analysis sees a partial through its window, 16 Hz wide, and the bands are no finer: noise of just that spectrum is
//! breath, and a rumble in the bass. What lies under it is found again by Richardson-Lucy deconvolution. A sharp line rings
//! on for long after its note was damped; so where the plan falls, its spectrum stays as it is.
//!
//! The window is several frames long, so that a note that begins comes up slowly. What the frame itself must have added is the
//! difference to the frame before, as far as neighbouring bands agree: see [`steepen`].

use std::sync::Arc;

use super::{ForecastConfig, ForecastError};
use crate::plan::fourier::Workspace;
use crate::plan::response::Response;
use crate::plan::spectrum::{FLOOR, UNITS_PER_NEPER};
use crate::plan::{PlanError, Spectrum};

/// Steps before the spectrum that is kept for bands that fall.
const BLUNT_STEPS: usize = 1;
/// A band that falls by this much in a frame, nepers of power, begins to lose its sharpness (1.7 dB) ...
const FALL: f64 = 0.4;
/// ... and has none left when it falls by this much more (4.3 dB).
const FALL_OVER: f64 = 1.0;
/// Least and most of a band's power that the frame itself may have, as factors.
const OWN_POWER: [f64; 2] = [0.5, 4.0];
/// Bands on either side that have a say in how much more or less it is.
const AGREEING: usize = 7;

/// The plan's floor, which the analysis adds to every band's power, is taken off again; this part of it stays at least (-85 dBFS
/// of white noise; the prediction adds -80).
const LEAST_OVER_FLOOR: f64 = 0.03;

/// Sharpens plan frames, in room of its own.
#[derive(Clone)]
pub(super) struct Sharpener {
    response: Arc<Response>,
    steps: usize,
    order: usize,
    lag_window_hz: f64,
    work: Workspace,
    /// `[n_bands]`: nepers, steepened, and powers.
    bands: Vec<f64>,
    planned: Vec<f64>,
    falls: Vec<f64>,
    own: Vec<f64>,
    /// Of the window's energy, what lies on the frame itself.
    own_share: f64,
    /// `[n_bins]`
    blunt: Vec<f64>,
    back: Vec<f64>,
    lags: Vec<f64>,
}

/// The spectrum of a plan frame.
pub(super) struct Sharpened<'a> {
    pub response: &'a Response,
    /// Nepers of power, `[n_bands]`.
    pub bands: &'a [f64],
    /// On the grid of the response, `[n_bins]`; the prediction's, so that what is taken out is not predicted.
    pub power: &'a mut [f64],
}

impl Sharpener {
    pub fn new(spectrum: &Spectrum, config: &ForecastConfig) -> Self {
        let response = spectrum.response();
        let work = response.grid.fourier.workspace();
        Self {
            steps: config.deconvolution,
            order: config.planned_order,
            lag_window_hz: config.lag_window_hz,
            bands: Vec::with_capacity(spectrum.n_bands()),
            planned: Vec::with_capacity(spectrum.n_bands()),
            falls: Vec::with_capacity(spectrum.n_bands()),
            own: Vec::with_capacity(spectrum.n_bands()),
            own_share: spectrum.own_share(),
            blunt: vec![0.0; work.power.len()],
            back: vec![0.0; work.power.len()],
            lags: Vec::with_capacity(config.planned_order + 1),
            work,
            response,
        }
    }

    /// Finds the spectrum of the sound of the plan frame `bands` after the frame `before`: [`sharpened`](Self::sharpened).
    ///
    /// # Errors
    /// When these are no frames of `spectrum`.
    pub fn sharpen(&mut self, spectrum: &Spectrum, before: &[f32], bands: &[f32]) -> Result<(), ForecastError> {
        for frame in [before, bands] {
            if frame.len() != spectrum.n_bands() {
                return Err(PlanError::BandCount { expected: spectrum.n_bands(), got: frame.len() }.into());
            }
        }
        let Self { response, work, bands: steep, planned, falls, own, blunt, back, .. } = self;
        let nepers = |band: f32| f64::from(band) / UNITS_PER_NEPER;
        steep.clear();
        steep.extend(bands.iter().copied().map(nepers));
        falls.clear();
        falls.extend(before.iter().zip(&*steep).map(|(&before, now)| nepers(before) - now));
        steepen(steep, falls, self.own_share, own);
        steep.iter_mut().for_each(|ln| *ln = (ln.exp() - FLOOR).max(LEAST_OVER_FLOOR * FLOOR).ln());
        for (power, ln) in work.power.iter_mut().zip(response.grid.interpolate(steep)) {
            *power = ln.exp();
        }
        planned.clear();
        planned.extend(steep.iter().map(|ln| ln.exp()));
        for step in 0..self.steps {
            if step == BLUNT_STEPS {
                blunt.copy_from_slice(&work.power);
            }
            response.sharpen(&mut work.power, planned, back);
        }
        if self.steps > BLUNT_STEPS {
            falls.iter_mut().for_each(|fall| *fall = ((*fall - FALL) / FALL_OVER).clamp(0.0, 1.0));
            for ((power, blunt), fall) in work.power.iter_mut().zip(&*blunt).zip(response.grid.interpolate(falls)) {
                *power += fall * (blunt - *power);
            }
        }
        Ok(())
    }

    /// What [`sharpen`](Self::sharpen) found.
    pub fn sharpened(&mut self) -> Sharpened<'_> {
        Sharpened { response: &self.response, bands: &self.bands, power: &mut self.work.power }
    }

    /// Autocorrelation of that spectrum, lags `0..=planned_order`, per sample: as [`Spectrum::autocorrelation`] of the bands alone.
    pub fn autocorrelation(&mut self, spectrum: &Spectrum) -> &[f64] {
        self.response.grid.fourier.autocorrelation(&mut self.work);
        spectrum.lags_into(&self.work.block, self.order, self.lag_window_hz, &mut self.lags);
        &self.lags
    }
}

/// Turns the power of bands under a window, nepers, into that of the frame at its end, on which lies `own_share` of the window's
/// energy. `falls`: nepers by which the frame before was louder; all before that frame is taken to be as it.
///
/// With powers p and p' of the frame and of what was before, the window has seen `s = w p + (1 - w) p'`, and before `p'`. How p differs
/// from s is a mean over neighbouring bands, for notes begin in many at once, and the plan's rounding does not.
fn steepen(planned: &mut [f64], falls: &[f64], own_share: f64, own: &mut Vec<f64>) {
    let [least, most] = OWN_POWER;
    own.clear();
    own.extend(falls.iter().map(|fall| ((1.0 - (1.0 - own_share) * fall.exp()) / own_share).clamp(least, most).ln()));
    let reach = AGREEING as isize;
    let last = own.len().saturating_sub(1) as isize;
    for (band, planned) in planned.iter_mut().enumerate() {
        let weighted = |d: isize| (reach + 1 - d.abs()) as f64 * own[(band as isize + d).clamp(0, last) as usize];
        *planned += (-reach..=reach).map(weighted).sum::<f64>() / ((reach + 1) * (reach + 1)) as f64;
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
        let mut sharpener = Sharpener::new(&spectrum(), &config());
        sharpener.sharpen(&spectrum(), before, bands).unwrap();
        sharpener.autocorrelation(&spectrum()).to_vec()
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
    fn what_the_analysis_adds_to_every_band_is_not_heard() {
        let spectrum = spectrum();
        let silent = spectrum.silent_frame();
        let alone = spectrum.autocorrelation(&silent, 512, 1.0).unwrap()[0];
        let silence = sharp(&silent, &silent)[0];
        assert!(silence < 0.15 * alone, "silence has a power of {silence}, with the floor {alone}");
        // As loud as the floor.
        let mut rng = Rng::new(9);
        let noise: Vec<f32> = (0..64 * 512).map(|_| 3.1e-4 * rng.normal()).collect();
        let plan = spectrum.analyse(&noise);
        let heard: f64 =
            plan.rows().into_iter().skip(8).map(|bands| sharp(&bands.to_vec(), &bands.to_vec())[0]).sum::<f64>() / 56.0;
        let power = noise[8 * 512..].iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / (56.0 * 512.0);
        // The logarithm's mean lies below the mean's.
        assert!((0.4..1.3).contains(&(heard / power)), "noise of {power} is heard as {heard}");
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
        let beginning = memory(&sharp(&softer, &bands));
        assert!((beginning - steady).abs() < 0.01, "{beginning} {steady}");
    }

    #[test]
    fn noise_that_begins_or_ends_has_its_power_from_the_first_frame_on() {
        let spectrum = spectrum();
        let mut rng = Rng::new(9);
        let mut noise = |n: usize, amplitude: f32| -> Vec<f32> { (0..n).map(|_| amplitude * rng.normal()).collect() };
        for (before, after) in [(0.03, 0.1), (0.1, 0.1), (0.1, 0.08)] {
            let mut mean = [0.0; 2];
            for _ in 0..20 {
                let sound = [noise(4096, before), noise(512, after)].concat();
                let plan = spectrum.analyse(&sound);
                let [old, new] = [plan.row(7).to_vec(), plan.row(8).to_vec()];
                mean[0] += sharp(&old, &new)[0] / 20.0;
                mean[1] += spectrum.autocorrelation(&new, 512, 1.0).unwrap()[0] / 20.0;
            }
            let db = |power: f64| 10.0 * (power / f64::from(after * after)).log10();
            let [steep, alone] = mean.map(db);
            assert!(steep.abs() < 1.2, "{before} to {after}: {steep} dB");
            assert!(before == after || steep.abs() < alone.abs(), "{before} to {after}: {steep} dB, alone {alone}");
        }
    }

    #[test]
    fn one_band_alone_is_not_believed() {
        let flat = vec![0.5f32; spectrum().n_bands()];
        let mut one = flat.clone();
        one[60] += 0.3;
        let (mut planned, mut own) =
            (one.iter().map(|&band| f64::from(band) / UNITS_PER_NEPER).collect::<Vec<_>>(), Vec::new());
        let falls: Vec<f64> = flat.iter().zip(&one).map(|(a, b)| f64::from(a - b) / UNITS_PER_NEPER).collect();
        let was = planned.clone();
        steepen(&mut planned, &falls, 0.25, &mut own);
        let most = 4.0f64.ln();
        assert!(planned[60] - was[60] < most / 8.0 + 1e-9 && planned[60] > was[60]);
        assert_eq!(planned[..50], was[..50]);
        // All together are.
        let falls = vec![-1.2; falls.len()];
        let mut all = was.clone();
        steepen(&mut all, &falls, 0.25, &mut own);
        let expected = (1.0 + 3.0 * (1.0 - (-1.2f64).exp())).ln();
        assert!(all.iter().zip(&was).all(|(a, b)| (a - b - expected).abs() < 1e-9));
    }

    #[test]
    fn frames_of_another_plan_are_refused() {
        let (spectrum, right) = (spectrum(), vec![0.0; spectrum().n_bands()]);
        for (before, bands) in [(&right[..], &[0.0; 3][..]), (&[0.0; 3], &right)] {
            let mut sharpener = Sharpener::new(&spectrum, &config());
            let refused = sharpener.sharpen(&spectrum, before, bands);
            assert!(matches!(refused, Err(ForecastError::Plan(PlanError::BandCount { got: 3, .. }))));
        }
    }
}
