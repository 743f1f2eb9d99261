//! Makes both forecasts of every sample of an excerpt that is known from beginning to end.

use ndarray::{ArrayView2, s};

use super::{ForecastConfig, ForecastError, Forecasts, PastForecast, PlannedForecast};
use crate::plan::Spectrum;

/// Makes the forecasts of whole excerpts, for several threads at once.
pub trait Forecaster: Sync {
    /// Both forecasts of each sample of `heard` from plan frame `first` on. Samples before it are only listened to; before them
    /// there is silence. `plan` is `[frames, n_bands]`, one frame per hop of `heard`, the last of which may be cut short.
    ///
    /// # Errors
    /// When the settings cannot be or the plan is too short or of other bands than the spectrum's.
    fn forecasts(&self, heard: &[f32], first: usize, plan: ArrayView2<f32>) -> Result<Forecasts, ForecastError>;
}

/// The forecasts of [`PastForecast`] and [`PlannedForecast`], sample by sample.
#[derive(Clone, Copy)]
pub struct CpuForecaster<'a> {
    /// Whose frames plans are made of.
    pub spectrum: &'a Spectrum,
    /// Of both forecasts.
    pub config: &'a ForecastConfig,
}

impl Forecaster for CpuForecaster<'_> {
    fn forecasts(&self, heard: &[f32], first: usize, plan: ArrayView2<f32>) -> Result<Forecasts, ForecastError> {
        let (mut past, mut planned) = (PastForecast::new(self.config)?, PlannedForecast::new(self.config)?);
        listen(&mut past, &mut planned, self.spectrum, heard, first, plan)
    }
}

/// [`Forecaster::forecasts`] by two streams at the beginning of a plan frame, which are left where `heard` ends.
pub(crate) fn listen(
    past: &mut PastForecast,
    planned: &mut PlannedForecast,
    spectrum: &Spectrum,
    heard: &[f32],
    first: usize,
    plan: ArrayView2<f32>,
) -> Result<Forecasts, ForecastError> {
    let hop = spectrum.hop();
    check_frames(heard.len(), hop, plan)?;
    let (before, heard) = heard.split_at(heard.len().min(first * hop));
    before.iter().for_each(|&sample| past.push(sample));
    planned.hear(spectrum, before, plan.slice(s![..before.len().div_ceil(hop), ..]))?;
    let mut out = Forecasts::default();
    out.past.reserve_exact(heard.len());
    out.planned.reserve_exact(heard.len());
    out.log_scale.reserve_exact(heard.len());
    let mut frames = plan.outer_iter().skip(first.saturating_sub(1)).map(|bands| bands.to_vec());
    let mut before = if first == 0 { spectrum.silent_frame() } else { frames.next().unwrap_or_default() };
    for (samples, bands) in heard.chunks(hop).zip(frames) {
        planned.begin_frame(spectrum, &before, &bands)?;
        before = bands;
        for &sample in samples {
            out.past.push(past.forecast());
            out.planned.push(planned.forecast());
            past.push(sample);
            planned.push(sample);
        }
        out.log_scale.resize(out.past.len(), planned.log_scale());
    }
    Ok(out)
}

/// Whether there is a plan frame for each hop of the samples.
pub(crate) fn check_frames(n_samples: usize, hop: usize, plan: ArrayView2<f32>) -> Result<(), ForecastError> {
    let expected = n_samples.div_ceil(hop);
    match plan.nrows() {
        got if got < expected => Err(ForecastError::FrameCount { expected, got, n_samples }),
        _ => Ok(()),
    }
}
