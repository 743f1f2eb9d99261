//! Makes the forecasts of whole training excerpts with kernels/forecast.cu, for many threads at once.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, ValidAsZeroBits,
};
use candle_core::{Device, DeviceLocation};
use ndarray::ArrayView2;

use super::kernels::Kernels;
use super::launch::{
    ForecastShape, LaunchError, LeftArgs, LevinsonArgs, PastAutocorrelationArgs, PlanGrid, PlannedAutocorrelationArgs,
    PredictArgs, ToneTables, TonesArgs,
};
use crate::forecast::{ForecastConfig, ForecastError, Forecaster, Forecasts, PastForecast, check_frames};
use crate::plan::{PlanError, Spectrum};

/// [`CpuForecaster`](crate::forecast::CpuForecaster)'s forecasts, to rounding, made on a GPU. Every call has a stream of its own,
/// beside that of the device's tensors.
pub struct GpuForecaster {
    config: ForecastConfig,
    hop: usize,
    silent_frame: Vec<f32>,
    tables: Tables,
    /// Those that no thread is using.
    lanes: Mutex<Vec<Lane>>,
    context: Arc<CudaContext>,
}

/// What all lanes read.
struct Tables {
    grid: PlanGrid,
    /// The rest on the GPU, as [`PlanGrid`] and kernels/args.cuh have it.
    places: CudaSlice<i32>,
    numbers: CudaSlice<f64>,
    window: CudaSlice<f64>,
    lag_window: CudaSlice<f64>,
    /// The plan's window and what [`ToneTables`] says of it, if there are tones.
    tones: Option<[CudaSlice<f64>; 2]>,
}

/// A stream and its memory; of one thread at a time.
struct Lane {
    kernels: Kernels,
    /// Lets the thread sleep until the stream has come to it.
    done: CudaEvent,
    heard: CudaSlice<f32>,
    bands: CudaSlice<f32>,
    past: Room,
    planned: Room,
    tones: TonesRoom,
}

/// What a forecast goes through, block by block; layouts in kernels/args.cuh.
struct Room {
    r: CudaSlice<f64>,
    coefficients: CudaSlice<f32>,
    log_scale: CudaSlice<f32>,
    forecasts: CudaSlice<f32>,
}

/// What the tones of a plan go through; layouts in kernels/args.cuh.
struct TonesRoom {
    lines: CudaSlice<f32>,
    now: CudaSlice<f32>,
    later: CudaSlice<f32>,
    tones: CudaSlice<f32>,
    left: CudaSlice<f32>,
}

impl From<DriverError> for ForecastError {
    fn from(error: DriverError) -> Self {
        gpu(error)
    }
}

impl From<LaunchError> for ForecastError {
    fn from(error: LaunchError) -> Self {
        gpu(error)
    }
}

fn gpu(reason: impl Display) -> ForecastError {
    ForecastError::Gpu { reason: reason.to_string() }
}

impl GpuForecaster {
    /// # Errors
    /// When the settings cannot be, or not on this device: it has no kernels, or too little memory per block.
    pub fn new(device: &Device, spectrum: &Spectrum, config: &ForecastConfig) -> Result<Self, ForecastError> {
        config.validate_alone()?;
        let hop = spectrum.hop();
        if !hop.is_multiple_of(config.past_hop) {
            return Err(ForecastError::Hop { past_hop: config.past_hop, plan_hop: hop });
        }
        let (past_window, plan_window) = (config.past_window, spectrum.window_len());
        if config.tones && plan_window > past_window {
            return Err(ForecastError::TonesWindow { past_window, plan_window });
        }
        let DeviceLocation::Cuda { gpu_id } = device.location() else { return Err(gpu("the device is the CPU")) };
        let grid = PlanGrid::new(spectrum, config.deconvolution)?;
        // The device's context under a book-keeping of its own. A second stream in the device's own would make every tensor
        // operation record events and wait for them.
        let context = CudaContext::new(gpu_id)?;
        // SAFETY: lanes use their memory on their own stream alone. Tables are written before any other stream is told of them, and
        // only read afterwards; they are freed when no call is in progress, and no call ends before its stream has.
        unsafe { context.disable_event_tracking() };
        let lane = Lane::new(&context)?;
        let stream = lane.kernels.stream();
        let lag_window: Vec<f64> = spectrum.lag_window(config.planned_order, config.lag_window_hz).collect();
        let tones = if config.tones {
            let ToneTables { window, lobe } = ToneTables::new(spectrum, grid.n_bins);
            Some([stream.clone_htod(&window)?, stream.clone_htod(&lobe)?])
        } else {
            None
        };
        let tables = Tables {
            tones,
            places: stream.clone_htod(&grid.places)?,
            numbers: stream.clone_htod(&grid.numbers)?,
            window: stream.clone_htod(&PastForecast::window(config.past_window))?,
            lag_window: stream.clone_htod(&lag_window)?,
            grid,
        };
        stream.synchronize()?;
        let made = Self {
            config: config.clone(),
            hop,
            silent_frame: spectrum.silent_frame(),
            tables,
            lanes: Mutex::new(vec![lane]),
            context,
        };
        // A frame of silence, so that what this GPU cannot do is known now.
        let silence = ArrayView2::from_shape((1, spectrum.n_bands()), &made.silent_frame).map_err(gpu)?;
        made.forecasts(&vec![0.0; hop], 0, silence)?;
        Ok(made)
    }

    /// A lane to use, which [`give_back`](Self::give_back) takes; there are as many as were ever used at once.
    fn lane(&self) -> Result<Lane, ForecastError> {
        let free = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.map_or_else(|| Ok(Lane::new(&self.context)?), Ok)
    }

    fn give_back(&self, lane: Lane) {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
    }
}

impl Forecaster for GpuForecaster {
    fn forecasts(&self, heard: &[f32], first: usize, plan: ArrayView2<f32>) -> Result<Forecasts, ForecastError> {
        check_frames(heard.len(), self.hop, plan)?;
        let n_bands = self.silent_frame.len();
        if plan.ncols() != n_bands {
            return Err(PlanError::BandCount { expected: n_bands, got: plan.ncols() }.into());
        }
        if heard.len() <= first * self.hop {
            return Ok(Forecasts::default());
        }
        let config = &self.config;
        let past = ForecastShape {
            batch: 1,
            len: heard.len(),
            first_block: first * self.hop / config.past_hop,
            hop: config.past_hop,
            order: config.order,
        };
        // Tones are followed through some frames more.
        let before = first.min(config.tones_before(self.hop));
        let first_block = first - before;
        let planned = ForecastShape { first_block, hop: self.hop, order: config.planned_order, ..past };
        // With the frame before the first.
        let bands = self.silent_frame.iter().chain(plan.iter()).skip(first_block * n_bands);
        let bands: Vec<f32> = bands.take((planned.n_blocks() + 1) * n_bands).copied().collect();
        let mut lane = self.lane()?;
        let queued = lane.queue(&self.tables, config, [&past, &planned], heard, &bands);
        // Nothing is freed that the stream still needs, whatever went wrong.
        let waited = lane.wait();
        queued?;
        waited?;
        let read = |room: &Room, skip: usize| -> Result<Vec<f32>, DriverError> {
            lane.kernels.stream().clone_dtoh(&room.forecasts.slice(skip..skip + past.n_forecasts()))
        };
        let forecasts = [read(&lane.past, 0), read(&lane.planned, before * self.hop)];
        let log_scale = lane.kernels.stream().clone_dtoh(&lane.planned.log_scale.slice(..planned.n_blocks()));
        lane.kernels.stream().synchronize()?;
        self.give_back(lane);
        let [past, planned] = forecasts;
        let (past, planned, log_scale) = (past?, planned?, log_scale?);
        let log_scale = (0..past.len()).map(|n| log_scale[before + n / self.hop]).collect();
        Ok(Forecasts { past, planned, log_scale })
    }
}

impl Lane {
    fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let stream = context.new_stream()?;
        // The driver makes no empty memory.
        Ok(Self {
            done: context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?,
            heard: stream.alloc_zeros(1)?,
            bands: stream.alloc_zeros(1)?,
            past: Room::new(&stream)?,
            planned: Room::new(&stream)?,
            tones: TonesRoom::new(&stream)?,
            kernels: Kernels::on(stream)?,
        })
    }

    /// Sends what both forecasts are made of, and launches all kernels; returns before they have run.
    fn queue(
        &mut self,
        tables: &Tables,
        config: &ForecastConfig,
        [past, planned]: [&ForecastShape; 2],
        heard: &[f32],
        bands: &[f32],
    ) -> Result<(), ForecastError> {
        let Self { kernels, heard: on_gpu, bands: bands_on_gpu, past: past_room, planned: planned_room, tones, .. } =
            self;
        let stream = kernels.stream();
        write(stream, heard, on_gpu)?;
        write(stream, bands, bands_on_gpu)?;
        past_room.make(past)?;
        planned_room.make(planned)?;
        let at = Addresses(stream);
        let samples = at.of(on_gpu);

        let (launch, args) = past.past_autocorrelation(config.past_window, PastForecast::WHITE)?;
        let args = PastAutocorrelationArgs { samples, window: at.of(&tables.window), r: at.of(&past_room.r), ..args };
        // SAFETY: the sizes are those of the shape, by `write`, `make` and `GpuForecaster::new`; the caller waits for the stream
        // before any of it is freed.
        unsafe { kernels.launch(&launch, &args) }?;
        past_room.solve(kernels, past, samples, 0, false)?;

        if tables.tones.is_some() {
            tones.make(planned, tables.grid.n_bins)?;
        }
        let (launch, args) = planned.planned_autocorrelation(&tables.grid, config.deconvolution, Spectrum::WHITE)?;
        let args = PlannedAutocorrelationArgs {
            bands: at.of(bands_on_gpu),
            places: at.of(&tables.places),
            numbers: at.of(&tables.numbers),
            lag_window: at.of(&tables.lag_window),
            r: at.of(&planned_room.r),
            lines: if tables.tones.is_some() { at.of(&tones.lines) } else { 0 },
            ..args
        };
        // SAFETY: likewise.
        unsafe { kernels.launch(&launch, &args) }?;
        let (left, of_tones) = match &tables.tones {
            Some(of_window) => tones.find(kernels, planned, tables, of_window, samples)?,
            None => (samples, 0),
        };
        // Sharp lines ring on; what was heard too loud is damped.
        planned_room.solve(kernels, planned, left, of_tones, config.deconvolution > 0)
    }

    /// Waits for the stream, asleep: whoever draws excerpts has other work for the core.
    fn wait(&self) -> Result<(), DriverError> {
        self.done.record(self.kernels.stream())?;
        self.done.synchronize()
    }
}

impl Room {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        Ok(Self {
            r: stream.alloc_zeros(1)?,
            coefficients: stream.alloc_zeros(1)?,
            log_scale: stream.alloc_zeros(1)?,
            forecasts: stream.alloc_zeros(1)?,
        })
    }

    fn make(&mut self, shape: &ForecastShape) -> Result<(), DriverError> {
        grow(&mut self.r, shape.n_blocks() * (shape.order + 1))?;
        grow(&mut self.coefficients, shape.n_blocks() * shape.order)?;
        grow(&mut self.log_scale, shape.n_blocks())?;
        grow(&mut self.forecasts, shape.n_forecasts())
    }

    /// Autocorrelations -> forecasts, `tones` (if not 0) added, and log scales of all blocks.
    fn solve(
        &self,
        kernels: &Kernels,
        shape: &ForecastShape,
        samples: u64,
        tones: u64,
        damped: bool,
    ) -> Result<(), ForecastError> {
        let at = Addresses(kernels.stream());
        let coefficients = at.of(&self.coefficients);
        let (launch, args) = shape.levinson()?;
        let args = LevinsonArgs {
            r: at.of(&self.r),
            samples: if damped { samples } else { 0 },
            coefficients,
            log_scale: at.of(&self.log_scale),
            ..args
        };
        // SAFETY: as in `Lane::queue`.
        unsafe { kernels.launch(&launch, &args) }?;
        let (launch, args) = shape.predict()?;
        let args = PredictArgs { samples, coefficients, tones, forecasts: at.of(&self.forecasts), ..args };
        // SAFETY: likewise.
        unsafe { kernels.launch(&launch, &args) }?;
        Ok(())
    }
}

impl TonesRoom {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        Ok(Self {
            lines: stream.alloc_zeros(1)?,
            now: stream.alloc_zeros(1)?,
            later: stream.alloc_zeros(1)?,
            tones: stream.alloc_zeros(1)?,
            left: stream.alloc_zeros(1)?,
        })
    }

    fn make(&mut self, shape: &ForecastShape, n_bins: usize) -> Result<(), DriverError> {
        grow(&mut self.lines, shape.n_blocks() * n_bins)?;
        grow(&mut self.now, shape.n_blocks() * shape.hop)?;
        grow(&mut self.later, shape.n_blocks() * shape.hop)?;
        grow(&mut self.tones, shape.len)?;
        grow(&mut self.left, shape.len)
    }

    /// Lines -> what tones leave over of the samples, and the tones: where they lie.
    fn find(
        &self,
        kernels: &Kernels,
        shape: &ForecastShape,
        tables: &Tables,
        [window, lobe]: &[CudaSlice<f64>; 2],
        samples: u64,
    ) -> Result<(u64, u64), ForecastError> {
        let at = Addresses(kernels.stream());
        let [now, later, tones, left] = [&self.now, &self.later, &self.tones, &self.left].map(|memory| at.of(memory));
        let (launch, args) = shape.tones(&tables.grid, window.len())?;
        let args = TonesArgs {
            samples,
            lines: at.of(&self.lines),
            places: at.of(&tables.places),
            numbers: at.of(&tables.numbers),
            window: at.of(window),
            lobe: at.of(lobe),
            now,
            later,
            ..args
        };
        // SAFETY: as in `Lane::queue`.
        unsafe { kernels.launch(&launch, &args) }?;
        let (launch, args) = shape.left()?;
        let args = LeftArgs { samples, now, later, tones, left, ..args };
        // SAFETY: likewise.
        unsafe { kernels.launch(&launch, &args) }?;
        Ok((left, tones))
    }
}

/// Where memory lies, for kernels on this stream.
struct Addresses<'a>(&'a CudaStream);

impl Addresses<'_> {
    /// No guard has to outlive the launch: nothing is tracked.
    fn of<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(self.0).0
    }
}

/// Copies `values` to the beginning of memory that is made longer if need be.
fn write(stream: &Arc<CudaStream>, values: &[f32], memory: &mut CudaSlice<f32>) -> Result<(), DriverError> {
    grow(memory, values.len())?;
    stream.memcpy_htod(values, memory)
}

/// Memory for at least `len` values; what was in shorter one is lost.
fn grow<T: DeviceRepr + ValidAsZeroBits>(memory: &mut CudaSlice<T>, len: usize) -> Result<(), DriverError> {
    if memory.len() < len {
        *memory = memory.stream().clone().alloc_zeros(len)?;
    }
    Ok(())
}
