//! forecast.cu against src/forecast: past and planned forecasts of whole excerpts.

use ndarray::Array2;
use wavegen::forecast::{ForecastConfig, Forecasts, PastForecast, autocorrelation, forecasts, levinson};
use wavegen::plan::{PlanConfig, Spectrum};
use wavegen::rng::Rng;

use crate::emulator::{Emulator, Schedule, close, from_bytes, named, unwritten};
use crate::launch::{
    Element, ForecastShape, LaunchError, LeftArgs, LevinsonArgs, PastAutocorrelationArgs, PlanGrid,
    PlannedAutocorrelationArgs, PredictArgs, ToneTables, TonesArgs,
};

const FILE: &str = "forecast.cu";
const BATCH: usize = 2;

/// Chords that begin somewhere, in noise; their plan, one frame per hop, also for the last piece of a hop, which is planned too soft.
pub struct Excerpt {
    pub samples: Vec<f32>,
    pub plan: Array2<f32>,
}

/// What is forecast, and from which hop of the plan on.
struct Case {
    spectrum: Spectrum,
    config: ForecastConfig,
    excerpts: Vec<Excerpt>,
    first: usize,
}

impl Case {
    fn new(plan: &PlanConfig, config: ForecastConfig, len: usize, first: usize, rng: &mut Rng) -> Self {
        let spectrum = Spectrum::new(16_000, plan).unwrap();
        let excerpts = (0..BATCH).map(|_| excerpt(len, &spectrum, rng)).collect();
        Self { spectrum, config, excerpts, first }
    }
}

pub fn excerpt(len: usize, spectrum: &Spectrum, rng: &mut Rng) -> Excerpt {
    let (onset, hz, noise) = (rng.below(len), 100.0 + 900.0 * rng.uniform(), 0.03 * rng.uniform());
    let tone = |n: usize, hz: f32| (n as f32 * hz * std::f32::consts::TAU / 16_000.0).sin();
    let mut samples: Vec<f32> = (0..len.next_multiple_of(spectrum.hop()))
        .map(|n| if n < onset { 0.0 } else { 0.2 * tone(n, hz) + 0.1 * tone(n, 1.5 * hz) + noise * rng.normal() })
        .collect();
    let mut plan = spectrum.analyse(&samples);
    if let Some(mut last) = plan.rows_mut().into_iter().next_back() {
        let by = [1.0, 3.0][rng.below(2)];
        last.iter_mut().for_each(|band| *band -= by);
    }
    samples.truncate(len);
    Excerpt { samples, plan }
}

fn f64s(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// Both forecasts of all excerpts.
fn emulated(emulator: &Emulator, case: &Case, schedule: Schedule) -> Result<Vec<Forecasts>, String> {
    let Case { spectrum, config, excerpts, first } = case;
    let (first, hop) = (*first, spectrum.hop());
    let len = excerpts[0].samples.len();
    let samples = f32s(excerpts.iter().flat_map(|e| e.samples.clone()));
    let past = ForecastShape {
        batch: excerpts.len(),
        len,
        first_block: first * hop / config.past_hop,
        hop: config.past_hop,
        order: config.order,
    };
    // Frames that tones are followed for, though nothing is forecast in them.
    let before = if config.tones { first.min(config.planned_order.div_ceil(hop) + 1) } else { 0 };
    let first = first - before;
    let planned = ForecastShape { first_block: first, hop, order: config.planned_order, ..past };

    let n_r = past.batch * past.n_blocks() * (past.order + 1);
    let (launch, args) =
        past.past_autocorrelation(config.past_window, PastForecast::WHITE).map_err(|e| e.to_string())?;
    let mut buffers =
        [samples.clone(), f64s(&PastForecast::window(config.past_window)), unwritten(2 * n_r, Element::F32)];
    emulator.run(
        &launch,
        &PastAutocorrelationArgs { samples: 1, window: 2, r: 3, ..args },
        3,
        &mut buffers,
        schedule,
    )?;
    let [.., r] = buffers;
    let (past_forecasts, _) = solved(emulator, &past, r, &samples, None, false, schedule)?;

    let grid = PlanGrid::new(spectrum, config.deconvolution).map_err(|e| e.to_string())?;
    let n_frames = planned.n_blocks();
    let silence = spectrum.silent_frame();
    // With the frame before the first.
    let bands = excerpts.iter().flat_map(|e| {
        let all = silence.iter().copied().chain(e.plan.iter().copied());
        all.skip(first * spectrum.n_bands()).take((n_frames + 1) * spectrum.n_bands())
    });
    let (launch, args) =
        planned.planned_autocorrelation(&grid, config.deconvolution, Spectrum::WHITE).map_err(|e| e.to_string())?;
    let mut buffers = [
        f32s(bands),
        grid.places.iter().flat_map(|place| place.to_le_bytes()).collect(),
        f64s(&grid.numbers),
        f64s(&spectrum.lag_window(planned.order, config.lag_window_hz).collect::<Vec<_>>()),
        unwritten(2 * planned.batch * n_frames * (planned.order + 1), Element::F32),
        unwritten(planned.batch * n_frames * grid.n_bins, Element::F32),
    ];
    let lines = if config.tones { 6 } else { 0 };
    let args = PlannedAutocorrelationArgs { bands: 1, places: 2, numbers: 3, lag_window: 4, r: 5, lines, ..args };
    emulator.run(&launch, &args, 6, &mut buffers, schedule)?;
    let [_, places, numbers, _, r, lines] = buffers;
    let damped = config.deconvolution > 0;
    let (left, tones) = match config.tones {
        true => {
            let (tones, left) =
                left(emulator, spectrum, &grid, &planned, [&samples, &lines, &places, &numbers], schedule)?;
            (left, Some(tones))
        }
        false => (samples, None),
    };
    let (planned_forecasts, log_scales) = solved(emulator, &planned, r, &left, tones, damped, schedule)?;

    let of_excerpt = planned_forecasts.chunks(planned.n_forecasts()).map(|forecasts| &forecasts[before * hop..]);
    let per_excerpt = past_forecasts.chunks(past.n_forecasts()).zip(of_excerpt);
    let of_frames = log_scales.chunks(n_frames);
    Ok(per_excerpt
        .zip(of_frames)
        .map(|((past, planned), scales)| Forecasts {
            past: past.to_vec(),
            planned: planned.to_vec(),
            log_scale: (0..past.len()).map(|n| scales[before + n / hop]).collect(),
        })
        .collect())
}

/// Samples and lines (and a grid's places and numbers) -> tones of all samples, and what they leave over.
fn left(
    emulator: &Emulator,
    spectrum: &Spectrum,
    grid: &PlanGrid,
    shape: &ForecastShape,
    [samples, lines, places, numbers]: [&Vec<u8>; 4],
    schedule: Schedule,
) -> Result<(Vec<u8>, Vec<u8>), String> {
    let tables = ToneTables::new(spectrum, grid.n_bins);
    let (launch, args) = shape.tones(grid, tables.window.len()).map_err(|e| e.to_string())?;
    let of_blocks = unwritten(shape.batch * shape.n_blocks() * shape.hop, Element::F32);
    let [samples, lines, places, numbers] = [samples, lines, places, numbers].map(Clone::clone);
    let (window, lobe) = (f64s(&tables.window), f64s(&tables.lobe));
    let mut buffers = [samples.clone(), lines, places, numbers, window, lobe, of_blocks.clone(), of_blocks];
    let args = TonesArgs { samples: 1, lines: 2, places: 3, numbers: 4, window: 5, lobe: 6, now: 7, later: 8, ..args };
    emulator.run(&launch, &args, 8, &mut buffers, schedule)?;
    let [.., now, later] = buffers;
    let (launch, args) = shape.left().map_err(|e| e.to_string())?;
    let of_samples = unwritten(shape.batch * shape.len, Element::F32);
    let mut buffers = [samples, now, later, of_samples.clone(), of_samples];
    let args = LeftArgs { samples: 1, now: 2, later: 3, tones: 4, left: 5, ..args };
    emulator.run(&launch, &args, 5, &mut buffers, schedule)?;
    let [.., tones, left] = buffers;
    Ok((tones, left))
}

/// Autocorrelations -> forecasts of all excerpts, one after the other, and log scales of all blocks.
fn solved(
    emulator: &Emulator,
    shape: &ForecastShape,
    r: Vec<u8>,
    samples: &[u8],
    tones: Option<Vec<u8>>,
    damped: bool,
    schedule: Schedule,
) -> Result<(Vec<f32>, Vec<f32>), String> {
    let (launch, args) = shape.levinson().map_err(|e| e.to_string())?;
    let n = shape.batch * shape.n_blocks();
    let mut buffers = [r, samples.to_vec(), unwritten(n * shape.order, Element::F32), unwritten(n, Element::F32)];
    let args = LevinsonArgs { r: 1, samples: if damped { 2 } else { 0 }, coefficients: 3, log_scale: 4, ..args };
    emulator.run(&launch, &args, 4, &mut buffers, schedule)?;
    let [.., coefficients, log_scale] = buffers;
    let (launch, args) = shape.predict().map_err(|e| e.to_string())?;
    let of_tones = if tones.is_some() { 4 } else { 0 };
    let forecasts = unwritten(shape.batch * shape.n_forecasts(), Element::F32);
    let mut buffers = [samples.to_vec(), coefficients, forecasts, tones.unwrap_or_default()];
    let args = PredictArgs { samples: 1, coefficients: 2, forecasts: 3, tones: of_tones, ..args };
    emulator.run(&launch, &args, 4, &mut buffers, schedule)?;
    let single = |bytes: &[u8]| from_bytes(bytes, Element::F32).into_iter().map(|x| x as f32).collect();
    Ok((single(&buffers[2]), single(&log_scale)))
}

/// Forecasts against those `expected` of an excerpt's samples from sample `begin` on.
pub fn compare(got: &Forecasts, expected: &Forecasts, begin: usize) -> Result<(), String> {
    let pairs = [
        ("past", &got.past, &expected.past),
        ("planned", &got.planned, &expected.planned),
        ("log scale", &got.log_scale, &expected.log_scale),
    ];
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    pairs.into_iter().try_for_each(|(what, got, expected)| close(what, &wide(got), &wide(&expected[begin..]), 3e-6))
}

fn check(emulator: &Emulator, case: &Case, schedule: Schedule) -> Result<(), String> {
    let got = emulated(emulator, case, schedule)?;
    let Case { spectrum, config, excerpts, first } = case;
    for (excerpt, got) in excerpts.iter().zip(&got) {
        let expected = forecasts(&excerpt.samples, excerpt.plan.view(), spectrum, config).unwrap();
        compare(got, &expected, first * spectrum.hop())?;
    }
    Ok(())
}

fn plan() -> PlanConfig {
    PlanConfig { hop: 128, window: 512, ..PlanConfig::default() }
}

fn small(deconvolution: usize, rng: &mut Rng) -> Case {
    let config = ForecastConfig {
        order: 24,
        past_window: 512,
        past_hop: 32,
        planned_order: 40,
        deconvolution,
        tones: deconvolution > 0,
        ..ForecastConfig::default()
    };
    Case::new(&plan(), config, 430, 0, rng)
}

#[test]
fn forecasts_equal_those_of_the_library_for_random_settings_and_schedules() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let mut rng = Rng::new(71);
    for round in 0..8 {
        let len = 129 + rng.below(600);
        let tones = rng.below(2) == 1;
        let past_window = if tones { 512 } else { 200 } + rng.below(400);
        let config = ForecastConfig {
            order: 1 + rng.below(100),
            past_window,
            past_hop: [16, 32, 64][rng.below(3)],
            planned_order: 1 + rng.below(200),
            lag_window_hz: f64::from(rng.uniform()) * 5.0,
            deconvolution: usize::from(tones) + rng.below(4) * rng.below(5),
            tones,
            fine_residual: false,
        };
        let case = Case::new(&plan(), config, len, rng.below(len / 128), &mut rng);
        check(&emulator, &case, Schedule::seeded(round))
            .unwrap_or_else(|e| panic!("{:?}, {len} samples from hop {}, seed {round}: {e}", case.config, case.first));
    }
}

#[test]
fn forecasts_equal_those_of_the_library_at_the_presets_settings() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    for (deconvolution, tones) in [(0, false), (20, false), (20, true)] {
        let config = ForecastConfig {
            planned_order: 512,
            lag_window_hz: 1.0,
            deconvolution,
            tones,
            fine_residual: false,
            ..ForecastConfig::default()
        };
        let case = Case::new(&PlanConfig::default(), config, 11 * 512, 8, &mut Rng::new(74));
        check(&emulator, &case, Schedule::seeded(5))
            .unwrap_or_else(|e| panic!("{deconvolution} steps, tones: {tones}: {e}"));
    }
}

#[test]
fn the_recursion_stops_where_nothing_is_positive_definite() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    let shape = ForecastShape { batch: 1, len: 5, first_block: 0, hop: 1, order: 4 };
    let block: Vec<f64> = (0..40).map(|i| f64::from(i * i % 17) - 8.0).collect();
    let problems = [
        vec![0.0; 5],
        vec![f64::NAN; 5],
        vec![-1.0, 0.5, 0.0, 0.0, 0.0],
        vec![1.0, 2.0, 0.0, 0.0, 0.0],
        autocorrelation(&block, 4),
    ];
    let (launch, args) = shape.levinson().unwrap();
    let mut buffers = [f64s(&problems.concat()), unwritten(20, Element::F32), unwritten(5, Element::F32)];
    let args = LevinsonArgs { r: 1, coefficients: 2, log_scale: 3, ..args };
    emulator.run(&launch, &args, 4, &mut buffers, Schedule::seeded(1)).unwrap();
    let coefficients = from_bytes(&buffers[1], Element::F32);
    let scales = from_bytes(&buffers[2], Element::F32);
    for (i, r) in problems.iter().enumerate() {
        let expected = levinson(r, 4);
        let wide: Vec<f64> = expected.coefficients.iter().map(|&x| f64::from(x)).collect();
        close("coefficients", &coefficients[4 * i..4 * (i + 1)], &wide, 1e-7).unwrap();
        let scale = (expected.residual_power.sqrt() * 0.7 + 1e-4).ln();
        assert!((scales[i] - scale).abs() < 1e-6, "{r:?}: {}, expected {scale}", scales[i]);
    }
}

#[test]
fn samples_that_are_no_numbers_give_no_forecast() {
    let Some(emulator) = Emulator::of(FILE) else { return };
    for deconvolution in [0, 3] {
        let mut case = small(deconvolution, &mut Rng::new(72));
        case.excerpts[1].samples[200] = f32::NAN;
        check(&emulator, &case, Schedule::seeded(3)).unwrap_or_else(|e| panic!("{deconvolution} steps: {e}"));
    }
}

#[test]
fn a_barrier_that_is_left_out_is_noticed() {
    let Some(emulator) = Emulator::program(FILE) else { return };
    let case = small(3, &mut Rng::new(73));
    let barriers = emulator.barriers();
    assert_eq!(barriers.len(), 20);
    for left_out in barriers {
        let passes = |seed| check(&emulator, &case, Schedule { left_out, ..Schedule::seeded(seed) }).is_ok();
        assert!(!(1..5).all(passes), "nobody misses {}", named(left_out));
    }
}

#[test]
fn settings_beyond_the_kernels_are_refused() {
    let shape = ForecastShape { batch: 1, len: 100_000, first_block: 0, hop: 64, order: 256 };
    assert!(matches!(shape.past_autocorrelation(30_000, PastForecast::WHITE), Err(LaunchError::Shared { .. })));
    let of_window = |window| {
        let spectrum = Spectrum::new(16_000, &PlanConfig { window, ..PlanConfig::default() }).unwrap();
        PlanGrid::new(&spectrum, 20)
    };
    assert!(of_window(1536).is_ok());
    assert!(matches!(of_window(2050), Err(LaunchError::Window(2050))));
    let grid = PlanGrid { n_bins: 256, ..of_window(2048).unwrap() };
    assert!(matches!(shape.planned_autocorrelation(&grid, 20, Spectrum::WHITE), Err(LaunchError::Size { .. })));
    assert!(ForecastShape { first_block: 2000, ..shape }.predict().is_err());
    assert!(ForecastShape { hop: 0, ..shape }.levinson().is_err());
}
