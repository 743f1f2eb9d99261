//! Launches of kernels/forecast.cu.

use super::tones::tones_room;
use super::{Launch, LaunchError, MAX_GRID_YZ, PlanGrid, WARP, shared, within};

/// Arguments of `forecast_past_autocorrelation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PastAutocorrelationArgs {
    pub samples: u64,
    pub window: u64,
    pub r: u64,
    pub white_relative: f64,
    pub white_absolute: f64,
    pub len: i32,
    pub window_len: i32,
    pub hop: i32,
    pub first_block: i32,
    pub n_blocks: i32,
    pub order: i32,
}
const _: () = assert!(size_of::<PastAutocorrelationArgs>() == 64);

/// Arguments of `forecast_planned_autocorrelation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PlannedAutocorrelationArgs {
    pub bands: u64,
    pub places: u64,
    pub numbers: u64,
    pub lag_window: u64,
    pub r: u64,
    pub lines: u64,
    pub white_relative: f64,
    pub white_absolute: f64,
    pub n_blocks: i32,
    pub n_bands: i32,
    pub n_bins: i32,
    pub order: i32,
    pub deconvolution: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<PlannedAutocorrelationArgs>() == 88);

/// Arguments of `forecast_tones`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TonesArgs {
    pub samples: u64,
    pub lines: u64,
    pub places: u64,
    pub numbers: u64,
    pub window: u64,
    pub lobe: u64,
    pub now: u64,
    pub later: u64,
    pub len: i32,
    pub hop: i32,
    pub first_block: i32,
    pub n_blocks: i32,
    pub n_bands: i32,
    pub n_bins: i32,
    pub window_len: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<TonesArgs>() == 96);

/// Arguments of `forecast_left`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeftArgs {
    pub samples: u64,
    pub now: u64,
    pub later: u64,
    pub tones: u64,
    pub left: u64,
    pub len: i32,
    pub hop: i32,
    pub first_block: i32,
    pub n_blocks: i32,
}
const _: () = assert!(size_of::<LeftArgs>() == 56);

/// Arguments of `forecast_levinson`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LevinsonArgs {
    pub r: u64,
    pub samples: u64,
    pub coefficients: u64,
    pub log_scale: u64,
    pub n: i32,
    pub order: i32,
    pub len: i32,
    pub hop: i32,
    pub first_block: i32,
    pub n_blocks: i32,
}
const _: () = assert!(size_of::<LevinsonArgs>() == 56);

/// Arguments of `forecast_predict`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PredictArgs {
    pub samples: u64,
    pub coefficients: u64,
    pub tones: u64,
    pub forecasts: u64,
    pub len: i32,
    pub hop: i32,
    pub first_block: i32,
    pub n_blocks: i32,
    pub order: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<PredictArgs>() == 56);

/// Forecasts of excerpts: new coefficients every `hop` samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForecastShape {
    pub batch: usize,
    /// Samples of an excerpt, with those before the first forecast.
    pub len: usize,
    /// Blocks of `hop` samples at the start that no forecast is made for.
    pub first_block: usize,
    pub hop: usize,
    pub order: usize,
}

/// As in forecast.cu.
const PARTS: usize = 4;
const QUAD: usize = 4;
const LEVINSON_WARPS: usize = 4;
const PREDICT_THREADS: usize = 256;
const MAX_THREADS: usize = 1024;
const PLANNED_THREADS: usize = 512;

impl ForecastShape {
    /// Blocks of an excerpt that forecasts are made for; the last may be cut short.
    pub fn n_blocks(&self) -> usize {
        (self.len - self.first_block * self.hop).div_ceil(self.hop)
    }

    /// Samples of an excerpt that forecasts are made for.
    pub fn n_forecasts(&self) -> usize {
        self.len - self.first_block * self.hop
    }

    fn check(&self) -> Result<(), LaunchError> {
        within("batch", self.batch, MAX_GRID_YZ)?;
        within("length", self.len, i32::MAX as usize / 2)?;
        within("hop", self.hop, self.len)?;
        within("first block", self.first_block + 1, self.len.div_ceil(self.hop))?;
        within("order", self.order, i32::MAX as usize / 2)?;
        Ok(())
    }

    /// Autocorrelations of the `window_len` samples before each block.
    pub fn past_autocorrelation(
        &self,
        window_len: usize,
        (white_relative, white_absolute): (f64, f64),
    ) -> Result<(Launch, PastAutocorrelationArgs), LaunchError> {
        self.check()?;
        let window = within("window", window_len, i32::MAX as usize / 2)?;
        let lag_quads = self.order / QUAD + 1;
        let columns = window_len.div_ceil(QUAD) + lag_quads + 1;
        let threads = (PARTS * lag_quads).next_multiple_of(WARP).min(MAX_THREADS);
        let launch = Launch {
            kernel: "forecast_past_autocorrelation".to_string(),
            grid: [self.n_blocks() as u32, self.batch as u32, 1],
            threads: threads as u32,
            shared_bytes: shared("autocorrelation", size_of::<f64>() * QUAD * (columns + PARTS * lag_quads))?,
            cluster: 0,
        };
        let args = PastAutocorrelationArgs {
            white_relative,
            white_absolute,
            len: self.len as i32,
            window_len: window,
            hop: self.hop as i32,
            first_block: self.first_block as i32,
            n_blocks: self.n_blocks() as i32,
            order: self.order as i32,
            ..PastAutocorrelationArgs::default()
        };
        Ok((launch, args))
    }

    /// Autocorrelations of the plan frames of all blocks, sharpened in `deconvolution` steps.
    pub fn planned_autocorrelation(
        &self,
        &PlanGrid { n_bands, n_bins, .. }: &PlanGrid,
        deconvolution: usize,
        (white_relative, white_absolute): (f64, f64),
    ) -> Result<(Launch, PlannedAutocorrelationArgs), LaunchError> {
        self.check()?;
        within("order", self.order, n_bins.saturating_sub(1))?;
        let launch = Launch {
            kernel: "forecast_planned_autocorrelation".to_string(),
            grid: [self.n_blocks() as u32, self.batch as u32, 1],
            threads: PLANNED_THREADS as u32,
            shared_bytes: shared("planned autocorrelation", size_of::<f64>() * PlanGrid::room(n_bins, n_bands))?,
            cluster: 0,
        };
        let args = PlannedAutocorrelationArgs {
            white_relative,
            white_absolute,
            n_blocks: self.n_blocks() as i32,
            n_bands: n_bands as i32,
            n_bins: n_bins as i32,
            order: self.order as i32,
            deconvolution: within("deconvolution", deconvolution + 1, i32::MAX as usize)? - 1,
            ..PlannedAutocorrelationArgs::default()
        };
        Ok((launch, args))
    }

    /// The tones of all blocks' lines, in the past under a plan's window of `window_len` samples.
    pub fn tones(
        &self,
        &PlanGrid { n_bands, n_bins, .. }: &PlanGrid,
        window_len: usize,
    ) -> Result<(Launch, TonesArgs), LaunchError> {
        self.check()?;
        let launch = Launch {
            kernel: "forecast_tones".to_string(),
            grid: [self.n_blocks() as u32, self.batch as u32, 1],
            threads: PLANNED_THREADS as u32,
            shared_bytes: shared("tones", tones_room(n_bins, self.hop))?,
            cluster: 0,
        };
        let args = TonesArgs {
            len: self.len as i32,
            hop: self.hop as i32,
            first_block: self.first_block as i32,
            n_blocks: self.n_blocks() as i32,
            n_bands: n_bands as i32,
            n_bins: n_bins as i32,
            window_len: within("window", window_len, 2 * (n_bins - 1))?,
            ..TonesArgs::default()
        };
        Ok((launch, args))
    }

    /// What they leave over of the samples.
    pub fn left(&self) -> Result<(Launch, LeftArgs), LaunchError> {
        self.check()?;
        let launch = Launch {
            kernel: "forecast_left".to_string(),
            grid: [self.len.div_ceil(PREDICT_THREADS) as u32, self.batch as u32, 1],
            threads: PREDICT_THREADS as u32,
            shared_bytes: 0,
            cluster: 0,
        };
        let args = LeftArgs {
            len: self.len as i32,
            hop: self.hop as i32,
            first_block: self.first_block as i32,
            n_blocks: self.n_blocks() as i32,
            ..LeftArgs::default()
        };
        Ok((launch, args))
    }

    /// Coefficients of all blocks.
    pub fn levinson(&self) -> Result<(Launch, LevinsonArgs), LaunchError> {
        self.check()?;
        let n = self.batch * self.n_blocks();
        let launch = Launch {
            kernel: "forecast_levinson".to_string(),
            grid: [n.div_ceil(LEVINSON_WARPS) as u32, 1, 1],
            threads: (LEVINSON_WARPS * WARP) as u32,
            shared_bytes: shared("recursion", size_of::<f64>() * LEVINSON_WARPS * (2 * self.order + 1))?,
            cluster: 0,
        };
        let args = LevinsonArgs {
            n: n as i32,
            order: self.order as i32,
            len: self.len as i32,
            hop: self.hop as i32,
            first_block: self.first_block as i32,
            n_blocks: self.n_blocks() as i32,
            ..LevinsonArgs::default()
        };
        Ok((launch, args))
    }

    /// Forecasts with them.
    pub fn predict(&self) -> Result<(Launch, PredictArgs), LaunchError> {
        self.check()?;
        let launch = Launch {
            kernel: "forecast_predict".to_string(),
            grid: [self.n_forecasts().div_ceil(PREDICT_THREADS) as u32, self.batch as u32, 1],
            threads: PREDICT_THREADS as u32,
            shared_bytes: shared("prediction", size_of::<f32>() * (self.order + PREDICT_THREADS))?,
            cluster: 0,
        };
        let args = PredictArgs {
            len: self.len as i32,
            hop: self.hop as i32,
            first_block: self.first_block as i32,
            n_blocks: self.n_blocks() as i32,
            order: self.order as i32,
            ..PredictArgs::default()
        };
        Ok((launch, args))
    }
}
