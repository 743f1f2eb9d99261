//! Meets the small golden vectors that tests/golden/make_golden.py wrote with the torch experiment.
//!
//! signals.safetensors, of two chords at 16 kHz: `tokens` [n], `plan` [n / 512, 148], `past` and `planned` [n] (order
//! 256, lag window 4 Hz), `log_scale` [n / 512], `planned_sharp` and `log_scale_sharp` (order 512, 1 Hz).
//! head.safetensors, of some of these samples: `head` [rows, 18], `forecasts` [rows, 2], `log_scale` and `tokens`
//! [rows], and what they mean: `log_weights`, `means`, `scales` [rows, 6], `nll` [rows] in nats.

use std::path::Path;

use safetensors::SafeTensors;
use wavegen::codec::{Codec, Token};
use wavegen::forecast::{ForecastConfig, forecasts};
use wavegen::plan::{PlanConfig, Spectrum};
use wavegen::sampler::Mixture;

/// One file of golden arrays.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        Self(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
    }

    fn tokens(&self) -> Vec<Token> {
        self.bytes("tokens").as_chunks().0.iter().map(|&word| Token::from_le_bytes(word)).collect()
    }

    fn bytes(&self, name: &str) -> &[u8] {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data()
    }
}

/// Fails where `got` is further than `tolerance` from `expected`, and prints the furthest.
fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let far = |i: &usize| (got[*i] - expected[*i]).abs();
    let worst = (0..got.len()).max_by(|a, b| far(a).total_cmp(&far(b))).expect("not empty");
    println!("{what}: furthest {:e} at {worst} ({} for {})", far(&worst), got[worst], expected[worst]);
    assert!(far(&worst) <= tolerance, "{what}[{worst}] is {}, expected {}", got[worst], expected[worst]);
}

#[test]
fn plan_meets_the_reference() {
    let golden = Golden::open("signals.safetensors");
    let codec = Codec::default();
    let spectrum = Spectrum::new(codec.sample_rate, &PlanConfig::default()).unwrap();
    let plan = spectrum.analyse(&codec.decode_all(&golden.tokens()));
    assert_close("plan", &plan.into_raw_vec_and_offset().0, &golden.floats("plan"), 2e-6);
}

#[test]
fn forecasts_meet_the_reference() {
    let golden = Golden::open("signals.safetensors");
    let codec = Codec::default();
    let spectrum = Spectrum::new(codec.sample_rate, &PlanConfig::default()).unwrap();
    let samples = codec.decode_all(&golden.tokens());
    let plan = spectrum.analyse(&samples);
    let per_frame = |log_scale: &[f32]| log_scale.iter().copied().step_by(spectrum.hop()).collect::<Vec<_>>();

    let plain = forecasts(&samples, plan.view(), &spectrum, &ForecastConfig::default()).unwrap();
    // The reference sums the autocorrelation of the past in f32.
    assert_close("past", &plain.past, &golden.floats("past"), 2e-4);
    assert_close("planned", &plain.planned, &golden.floats("planned"), 2e-6);
    assert_close("log scale", &per_frame(&plain.log_scale), &golden.floats("log_scale"), 2e-6);

    let config = ForecastConfig { planned_order: 512, lag_window_hz: 1.0, ..ForecastConfig::default() };
    let sharp = forecasts(&samples, plan.view(), &spectrum, &config).unwrap();
    assert_close("planned, order 512", &sharp.planned, &golden.floats("planned_sharp"), 2e-6);
    assert_close("log scale, order 512", &per_frame(&sharp.log_scale), &golden.floats("log_scale_sharp"), 2e-6);
}

#[test]
fn head_meets_the_reference() {
    let golden = Golden::open("head.safetensors");
    let codec = Codec::default();
    let (head, pairs, log_scale) = (golden.floats("head"), golden.floats("forecasts"), golden.floats("log_scale"));
    let (mut log_weights, mut means, mut scales, mut nll) = (vec![], vec![], vec![], vec![]);
    let rows = head.chunks_exact(18).zip(pairs.as_chunks().0).zip(&log_scale).zip(golden.tokens());
    for (((head, &forecasts), &log_scale), token) in rows {
        let mixture = Mixture::from_head(head, forecasts, log_scale, &codec);
        log_weights.extend(&mixture.log_weights);
        means.extend(&mixture.means);
        scales.extend(mixture.scales.iter().map(|scale| scale.ln()));
        nll.push(-mixture.log_prob(token, &codec) as f32);
    }
    let expected_nll = golden.floats("nll");
    assert_close("log weights", &log_weights, &golden.floats("log_weights"), 5e-6);
    assert_close("means", &means, &golden.floats("means"), 1e-6);
    let expected_scales: Vec<f32> = golden.floats("scales").iter().map(|scale| scale.ln()).collect();
    assert_close("log scales", &scales, &expected_scales, 5e-6);
    // Far from the mean the likelihood is large and rounding with it.
    let relative = |nll: &[f32]| nll.iter().zip(&expected_nll).map(|(x, y)| x / y.max(1.0)).collect::<Vec<_>>();
    assert_close("nll", &relative(&nll), &relative(&expected_nll), 5e-6);
}
