//! The parts of a step that are not matrices, and whole steps, on every instruction set of the machine, `scalar` (the
//! specification) first; each checks its result against it before it is timed.
//!
//! `cargo bench --bench step`; `cargo test` runs each once.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use wavegen::checkpoint::Checkpoint;
use wavegen::codec::{Codec, Token};
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::forecast::{ForecastConfig, PastForecast, PlannedForecast};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::plan::{PlanConfig, PlanFrame, Spectrum};
use wavegen::rng::Rng;
use wavegen::sampler::Mixture;
use wavegen::simd::{Isa, Kernels};

fn main() {
    divan::main();
}

fn isas() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

fn isa(name: &str) -> Isa {
    Isa::from_name(name).expect("one of `isas`")
}

fn kernels(name: &str) -> &'static Kernels {
    Kernels::of(isa(name)).expect("one of `isas`")
}

fn sound(n: usize) -> Vec<f32> {
    let mut rng = Rng::new(1);
    (0..n).map(|i| 0.3 * (i as f32 * 0.1).sin() + 0.01 * rng.normal()).collect()
}

/// As the presets `small` and `base` have them.
fn forecast_config() -> ForecastConfig {
    ForecastConfig {
        planned_order: 512,
        lag_window_hz: 1.0,
        deconvolution: 20,
        tones: true,
        ..ForecastConfig::default()
    }
}

/// Samples between two renewals of the coefficients, one of which is counted. Items: samples.
#[divan::bench(args = isas())]
fn forecast_from_the_past(bencher: Bencher, isa: &str) {
    let samples = sound(5000);
    let of = |isa: &str| {
        let mut forecast = PastForecast::new(&forecast_config()).unwrap().with_kernels(kernels(isa));
        samples.iter().for_each(|&sample| forecast.push(sample));
        forecast
    };
    let hop = |forecast: &mut PastForecast| -> f32 {
        let step = |&sample: &f32| {
            let next = forecast.forecast();
            forecast.push(sample);
            next
        };
        samples[..64].iter().map(step).sum()
    };
    let mut forecast = of(isa);
    assert_eq!(hop(&mut forecast), hop(&mut of("scalar")), "{isa}");
    bencher.counter(ItemsCount::new(64usize)).bench_local(|| hop(black_box(&mut forecast)));
}

/// Coefficients and tones of a plan frame, and the coefficients alone. Items: samples that they serve.
#[divan::bench(args = isas(), consts = [true, false])]
fn forecast_from_the_plan_begins<const TONES: bool>(bencher: Bencher, isa: &str) {
    let spectrum = Spectrum::new(16_000, &PlanConfig::default()).unwrap();
    let samples = sound(5000);
    let bands = spectrum.analyse_last(&samples);
    let begin = |forecast: &mut PlannedForecast| {
        forecast.begin_frame(&spectrum, &bands, &bands).unwrap();
        forecast.forecast()
    };
    let of = |isa: &str| {
        let config = ForecastConfig { tones: TONES, ..forecast_config() };
        let mut forecast = PlannedForecast::new(&config).unwrap().with_kernels(kernels(isa));
        samples.iter().for_each(|&sample| forecast.push(sample));
        forecast
    };
    let mut forecast = of(isa);
    assert_eq!(begin(&mut forecast), begin(&mut of("scalar")), "{isa}");
    bencher.counter(ItemsCount::new(spectrum.hop())).bench_local(|| begin(black_box(&mut forecast)));
}

/// From the head's numbers to a token; the same code on every instruction set.
#[divan::bench]
fn sampler(bencher: Bencher) {
    let codec = Codec::default();
    let head: Vec<f32> = (0..18).map(|i| (i as f32 * 0.9).sin()).collect();
    let settings = GenerationSettings { grain: 1.0, past: 0.5, offset: 0.5, level_db: 0.0 };
    let mut mixture = Mixture::default();
    let mut draw = |u: f32| -> Token {
        mixture.set(black_box(&head), [0.1, 0.12], -4.0, &codec);
        codec.encode(mixture.draw([u, 1.0 - u], &settings))
    };
    let drawn: Vec<Token> = (1..100).map(|i| draw(i as f32 / 100.0)).collect();
    let middle = codec.encode(0.11);
    assert!(drawn.iter().all(|token| token.abs_diff(middle) < 40), "{drawn:?} lie far from {middle}");
    bencher.bench_local(|| draw(black_box(0.3)));
}

/// A plan frame of a model with random weights, planned and rendered. Items: samples.
fn frame(bencher: Bencher, isa_name: &str, preset: &str) {
    let checkpoint = Checkpoint::untrained(ModelConfig::preset(preset).unwrap(), 1).unwrap();
    let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
    let prompt = checkpoint.config.codec.encode_all(&sound(4096));
    let of = |isa: Isa| {
        let mut engine = CpuEngine::new(&checkpoint, &CpuOptions { isa, precision: Precision::Int8 }).unwrap();
        engine.prefill(&prompt).unwrap();
        engine
    };
    let (plan_draws, wave_draws) = (vec![0.5; books], vec![0.4; UNIFORMS_PER_SAMPLE * hop]);
    let play = |engine: &mut CpuEngine, plan: &mut PlanFrame, out: &mut [Token]| {
        engine.next_plan(&plan_draws, plan).unwrap();
        engine.render(plan, &wave_draws, out).unwrap();
    };
    let (mut plan, mut out, mut expected) = (PlanFrame::default(), vec![0; hop], vec![0; hop]);
    play(&mut of(Isa::Scalar), &mut plan, &mut expected);
    let mut engine = of(isa(isa_name));
    play(&mut engine, &mut plan, &mut out);
    assert_eq!(out, expected, "{isa_name}, {preset}");
    bencher.counter(ItemsCount::new(hop)).bench_local(|| {
        play(&mut engine, &mut plan, &mut out);
        black_box(&out);
    });
}

/// All but `scalar`, which would take minutes.
fn fast_isas() -> Vec<&'static str> {
    let all = isas();
    if all.len() > 1 { all[1..].to_vec() } else { all }
}

#[divan::bench(args = fast_isas(), sample_count = 20, sample_size = 1)]
fn steps_of_small(bencher: Bencher, isa: &str) {
    frame(bencher, isa, "small");
}

#[divan::bench(args = fast_isas(), sample_count = 20, sample_size = 1)]
fn steps_of_base(bencher: Bencher, isa: &str) {
    frame(bencher, isa, "base");
}
