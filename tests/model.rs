//! Properties that every wave and plan transformer must have: causality, step path = parallel path, real gradients.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use ndarray::Array2;
use wavegen::codec::{Quantizer, Token};
use wavegen::forecast::{PAST, PastForecast, PlannedForecast};
use wavegen::model::Model;
use wavegen::model::config::{ModelConfig, TierConfig};
use wavegen::model::excerpt::{Excerpt, Piece};
use wavegen::model::features::{features, residual_code};
use wavegen::model::head::{self, Targets};
use wavegen::model::params::Params;
use wavegen::model::wave_transformer::WaveTransformer;
use wavegen::plan::Spectrum;
use wavegen::rng::Rng;
use wavegen::sampler::Mixture;

fn spectrum_of(config: &ModelConfig) -> Spectrum {
    Spectrum::new(config.codec.sample_rate, &config.plan).unwrap()
}

/// A model whose every tensor is random: the zeros of a new head would hide mistakes.
fn random_model(config: &ModelConfig, seed: u64) -> (Model, BTreeMap<String, Var>) {
    with_random_zeros(config, Params::new(seed), seed)
}

fn with_random_zeros(config: &ModelConfig, mut params: Params, seed: u64) -> (Model, BTreeMap<String, Var>) {
    let model = Model::new(&mut params, config, spectrum_of(config).n_bands()).unwrap();
    let vars = params.into_vars();
    let mut rng = Rng::new(seed + 1);
    for (name, var) in &vars {
        if name.contains("head.") || name.contains("shortcut.2") || name.contains("planned_scales.1") {
            let noise: Vec<f32> = (0..var.elem_count()).map(|_| 0.3 * rng.normal()).collect();
            let noise = Tensor::from_vec(noise, var.dims(), &Device::Cpu).unwrap();
            var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
        }
    }
    (model, vars)
}

/// Configurations with one to four tiers and odd sizes, some whose plans are sharpened, two with tones, one with tokens of 16 bits.
fn presets() -> Vec<ModelConfig> {
    let tiny = ModelConfig::preset("tiny").unwrap();
    let tier = |hop, dim, n_layers, n_heads, window| TierConfig { hop, dim, n_layers, n_heads, window };
    let with = |tiers| {
        let mut config = tiny.clone();
        config.wave_transformer.tiers = tiers;
        config.validate().unwrap();
        config
    };
    let mut sharp = tiny.clone();
    sharp.forecast.deconvolution = 7;
    let mut tones = sharp.clone();
    tones.forecast.tones = true;
    tones.forecast.past_window = 2048;
    let mut fine = tones.clone();
    fine.codec.quantizer = Quantizer::Pcm16;
    fine.forecast.fine_residual = true;
    vec![
        tiny.clone(),
        sharp,
        tones,
        fine,
        with(vec![tier(1, 16, 2, 2, 24)]),
        with(vec![tier(128, 24, 1, 3, 5), tier(16, 16, 2, 2, 7), tier(4, 16, 1, 1, 9), tier(1, 8, 1, 2, 33)]),
    ]
}

fn music(config: &ModelConfig, n_frames: usize, seed: u64) -> Vec<Token> {
    let mut rng = Rng::new(seed);
    let n = n_frames * config.plan.hop;
    let sample = |i: usize, noise: f32| 0.2 * (i as f32 * 0.11).sin() + 0.1 * (i as f32 * 0.273).sin() + 0.01 * noise;
    let samples: Vec<f32> = (0..n).map(|i| sample(i, rng.normal())).collect();
    config.codec.encode_all(&samples)
}

fn plan_of(config: &ModelConfig, tokens: &[Token]) -> Array2<f32> {
    spectrum_of(config).analyse(&config.codec.decode_all(tokens))
}

fn excerpt(config: &ModelConfig, model: &Model, tokens: &[Token], plan: &Array2<f32>) -> Excerpt {
    let spectrum = spectrum_of(config);
    let piece = Piece { tokens, heard: tokens, plan: plan.view(), spectrum: &spectrum };
    let mut past = PastForecast::new(&config.forecast).unwrap();
    let mut planned = PlannedForecast::new(&config.forecast).unwrap();
    Excerpt::read(config, model.wave.history(), &piece, 0..plan.nrows(), &mut past, &mut planned).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Head outputs and forecasts of every sample, flat.
fn distributions(config: &ModelConfig, model: &Model, tokens: &[Token], plan: &Array2<f32>) -> (Vec<f32>, Vec<f32>) {
    let excerpt = excerpt(config, model, tokens, plan);
    (flat(&model.wave.forward(&excerpt.inputs().unwrap()).unwrap()), excerpt.targets.forecasts)
}

#[test]
fn the_base_preset_has_a_plan_transformer_of_twelve_million_parameters_and_more() {
    let config = ModelConfig::preset("base").unwrap();
    let mut params = Params::new(1);
    Model::new(&mut params, &config, spectrum_of(&config).n_bands()).unwrap();
    let vars = params.into_vars();
    let n: usize = vars.iter().filter(|(name, _)| name.starts_with("plan.")).map(|(_, var)| var.elem_count()).sum();
    assert!((12_000_000..13_000_000).contains(&n), "{n}");
}

#[test]
fn no_distribution_moves_at_or_before_a_changed_sample() {
    for (i, config) in presets().iter().enumerate() {
        let (model, _) = random_model(config, 7 + i as u64);
        let width = config.wave_transformer.head_dim();
        let tokens = music(config, 2, 3);
        let plan = plan_of(config, &tokens);
        let before = distributions(config, &model, &tokens, &plan);
        for t in [0, 1, 63, 64, 500, 777, 1022] {
            let mut changed = tokens.clone();
            changed[t] ^= 0x55;
            let after = distributions(config, &model, &changed, &plan);
            let (head, forecasts) = ((t + 1) * width, (t + 1) * 2);
            assert_eq!(before.0[..head], after.0[..head], "preset {i}, sample {t}: head");
            assert_eq!(before.1[..forecasts], after.1[..forecasts], "preset {i}, sample {t}: forecasts");
            assert_ne!(before.0[head..], after.0[head..], "preset {i}: sample {t} is not seen at all");
        }
    }
}

#[test]
fn nothing_moves_before_a_changed_plan_frame() {
    for (i, config) in presets().iter().enumerate() {
        let (model, _) = random_model(config, 17 + i as u64);
        let width = config.wave_transformer.head_dim() * config.plan.hop;
        let tokens = music(config, 4, 5);
        let plan = plan_of(config, &tokens);
        let before = distributions(config, &model, &tokens, &plan).0;
        for k in 0..4 {
            let mut changed = plan.clone();
            changed.row_mut(k).mapv_inplace(|v| v + 0.3);
            let after = distributions(config, &model, &tokens, &changed).0;
            assert_eq!(before[..k * width], after[..k * width], "preset {i}, frame {k}");
            assert_ne!(before[k * width..(k + 1) * width], after[k * width..(k + 1) * width], "preset {i}, frame {k}");
        }
    }
}

#[test]
fn step_path_equals_parallel_path_over_ring_wraps() {
    for (i, config) in presets().iter().enumerate() {
        let (model, _) = random_model(config, 27 + i as u64);
        let tokens = music(config, 5, 9);
        let plan = plan_of(config, &tokens);
        let spectrum = spectrum_of(config);
        let parallel = distributions(config, &model, &tokens, &plan).0;
        let width = config.wave_transformer.head_dim();
        let wraps = config.wave_transformer.tiers.iter().map(|t| tokens.len() / t.hop / t.window);
        assert!(wraps.max().unwrap() > 1, "the rings never wrap");
        let mut state = model.wave.new_state(&spectrum.silent_frame()).unwrap();
        let mut past = PastForecast::new(&config.forecast).unwrap();
        let mut planned = PlannedForecast::new(&config.forecast).unwrap();
        let mut worst = 0.0f32;
        for (t, &token) in tokens.iter().enumerate() {
            if t % config.plan.hop == 0 {
                let bands = plan.row(t / config.plan.hop).to_vec();
                planned.begin_frame(&spectrum, state.last_frame(), &bands).unwrap();
                model.wave.begin_frame(&mut state, &bands).unwrap();
            }
            let forecasts = [past.forecast(), planned.forecast()];
            let (features, code) = features(forecasts, planned.log_scale(), &config.codec);
            let head = model.wave.step(&mut state, &features, code).unwrap();
            worst = head.iter().zip(&parallel[t * width..]).fold(worst, |w, (a, b)| w.max((a - b).abs()));
            let sample = config.codec.decode(token);
            past.push(sample);
            planned.push(sample);
            WaveTransformer::push(&mut state, token, residual_code(token, forecasts[PAST], code, config));
        }
        assert!(worst < 2e-4, "preset {i}: head outputs differ by {worst}");
    }
}

#[test]
fn steps_after_a_prefill_equal_the_parallel_path() {
    for (i, config) in presets().iter().enumerate() {
        let (model, _) = random_model(config, 37 + i as u64);
        let (hop, history) = (config.plan.hop, model.wave.history());
        let tokens = music(config, 4, 9);
        let plan = plan_of(config, &tokens);
        let spectrum = spectrum_of(config);
        let parallel = distributions(config, &model, &tokens, &plan).0;
        let width = config.wave_transformer.head_dim();
        let read = 3;
        let piece = Piece { tokens: &tokens, heard: &tokens, plan: plan.view(), spectrum: &spectrum };
        let mut past = PastForecast::new(&config.forecast).unwrap();
        let mut planned = PlannedForecast::new(&config.forecast).unwrap();
        let context = Excerpt::read(config, history, &piece, 0..read, &mut past, &mut planned).unwrap();
        let mut state = model.wave.new_state(&spectrum.silent_frame()).unwrap();
        model.wave.prefill(&context.inputs().unwrap(), &mut state).unwrap();
        state.tokens = tokens[read * hop - history..read * hop].to_vec();
        state.residual_code = context.last_residual();
        state.plan = (0..read).map(|k| plan.row(k).to_vec()).collect();
        let bands = plan.row(read).to_vec();
        planned.begin_frame(&spectrum, state.last_frame(), &bands).unwrap();
        model.wave.begin_frame(&mut state, &bands).unwrap();
        for (t, &token) in tokens.iter().enumerate().skip(read * hop) {
            let forecasts = [past.forecast(), planned.forecast()];
            let (features, code) = features(forecasts, planned.log_scale(), &config.codec);
            let head = model.wave.step(&mut state, &features, code).unwrap();
            for (a, b) in head.iter().zip(&parallel[t * width..]) {
                assert!((a - b).abs() < 2e-4, "preset {i}, sample {t}: {a} and {b}");
            }
            past.push(config.codec.decode(token));
            planned.push(config.codec.decode(token));
            WaveTransformer::push(&mut state, token, residual_code(token, forecasts[PAST], code, config));
        }
    }
}

/// Random plan tokens `[1, frames, n_codebooks]` and bands `[1, frames, n_bands]`.
fn random_plan(config: &ModelConfig, frames: usize, seed: u64) -> (Tensor, Tensor) {
    let mut rng = Rng::new(seed);
    let (books, n_bands) = (config.plan.n_codebooks, spectrum_of(config).n_bands());
    let codes: Vec<u32> = (0..frames * books).map(|_| rng.below(config.plan.n_entries) as u32).collect();
    let values: Vec<f32> = (0..frames * n_bands).map(|_| rng.normal()).collect();
    (
        Tensor::from_vec(codes, (1, frames, books), &Device::Cpu).unwrap(),
        Tensor::from_vec(values, (1, frames, n_bands), &Device::Cpu).unwrap(),
    )
}

#[test]
fn plan_transformer_steps_equal_its_parallel_path() {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.plan_transformer.window = 6;
    let (model, _) = random_model(&config, 4);
    let frames = 20;
    let (tokens, bands) = random_plan(&config, frames, 1);
    let part = |t: &Tensor, from, len| t.narrow(1, from, len).unwrap().contiguous().unwrap();
    let whole = model.plan.forward(&tokens, &bands, None).unwrap();
    for read in [0, 1, 9] {
        let mut caches = model.plan.empty_caches().unwrap();
        if read > 0 {
            let last = model.plan.prefill(&part(&tokens, 0, read), &part(&bands, 0, read), &mut caches).unwrap();
            assert!(worst(&last, &part(&whole, read - 1, 1)) < 1e-4, "prefill of {read}");
        }
        for k in read..frames {
            let step = model.plan.step(&part(&tokens, k, 1), &part(&bands, k, 1), &mut caches, k as u64).unwrap();
            assert!(worst(&step, &part(&whole, k, 1)) < 1e-4, "after a prefill of {read}, frame {k}");
        }
    }
}

#[test]
fn the_plan_transformer_sees_nothing_of_the_frames_to_come() {
    let config = ModelConfig::preset("tiny").unwrap();
    let (model, _) = random_model(&config, 4);
    let (tokens, bands) = random_plan(&config, 12, 1);
    let (other_tokens, other_bands) = random_plan(&config, 12, 2);
    let part = |t: &Tensor, from, len| t.narrow(1, from, len).unwrap().contiguous().unwrap();
    let mixed = |a: &Tensor, b: &Tensor| Tensor::cat(&[part(a, 0, 7), part(b, 7, 5)], 1).unwrap();
    let before = model.plan.nll(&tokens, &bands, None).unwrap();
    let after = model.plan.nll(&mixed(&tokens, &other_tokens), &mixed(&bands, &other_bands), None).unwrap();
    // Entry k of the loss is frame k + 1 given frames 0..=k.
    assert_eq!(worst(&before.narrow(1, 0, 6).unwrap(), &after.narrow(1, 0, 6).unwrap()), 0.0);
    assert!(worst(&before, &after) > 0.0);
}

#[test]
fn the_candle_likelihood_is_that_of_the_scalar_mixture() {
    for quantizer in [Quantizer::Mulaw8, Quantizer::Pcm16] {
        let mut config = ModelConfig::preset("tiny").unwrap();
        config.codec.quantizer = quantizer;
        candle_likelihood_is_that_of_the_scalar_mixture(config);
    }
}

fn candle_likelihood_is_that_of_the_scalar_mixture(config: ModelConfig) {
    let (model, _) = random_model(&config, 3);
    let tokens = music(&config, 2, 1);
    let plan = plan_of(&config, &tokens);
    let spectrum = spectrum_of(&config);
    let excerpt = excerpt(&config, &model, &tokens, &plan);
    let out = model.wave.forward(&excerpt.inputs().unwrap()).unwrap();
    let nll = flat(&head::nll(&out, &excerpt.targets).unwrap());
    let heads = flat(&out);
    let width = config.wave_transformer.head_dim();
    let mut planned = PlannedForecast::new(&config.forecast).unwrap();
    let mut before = spectrum.silent_frame();
    for (t, &token) in tokens.iter().enumerate() {
        if t % config.plan.hop == 0 {
            let bands = plan.row(t / config.plan.hop).to_vec();
            planned.begin_frame(&spectrum, &before, &bands).unwrap();
            before = bands;
        }
        let forecasts = [excerpt.targets.forecasts[2 * t], excerpt.targets.forecasts[2 * t + 1]];
        let mixture = Mixture::from_head(&heads[t * width..][..width], forecasts, planned.log_scale(), &config.codec);
        let exact = -mixture.log_prob(token, &config.codec);
        let error = (exact - f64::from(nll[t])).abs();
        assert!(error < 2e-3 * (1.0 + exact), "sample {t}: {exact} against {}", nll[t]);
    }
}

#[test]
fn excerpts_and_contexts_have_the_likelihoods_together_that_they_have_alone() {
    let config = ModelConfig::preset("tiny").unwrap();
    let (model, _) = random_model(&config, 4);
    let excerpts: Vec<Excerpt> = (1..4)
        .map(|seed| {
            let tokens = music(&config, 2, seed);
            excerpt(&config, &model, &tokens, &plan_of(&config, &tokens))
        })
        .collect();
    let nll = |excerpts: &[Excerpt]| {
        let targets = Targets::joined(excerpts.iter().map(|excerpt| &excerpt.targets));
        flat(&head::nll(&model.wave.forward(&Excerpt::batch(excerpts).unwrap()).unwrap(), &targets).unwrap())
    };
    let alone: Vec<f32> = excerpts.chunks(1).flat_map(nll).collect();
    let together = nll(&excerpts);
    assert_eq!(together.len(), alone.len());
    assert!(together.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs())));
    let longer = music(&config, 3, 9);
    let longer = excerpt(&config, &model, &longer, &plan_of(&config, &longer));
    assert!(Excerpt::batch(&[excerpts[0].clone(), longer]).is_err());

    let contexts = [5, 6].map(|seed| random_plan(&config, 40, seed));
    let (tokens, bands) = (
        Tensor::cat(&[&contexts[0].0, &contexts[1].0], 0).unwrap(),
        Tensor::cat(&[&contexts[0].1, &contexts[1].1], 0).unwrap(),
    );
    let alone: Vec<f32> =
        contexts.iter().flat_map(|(tokens, bands)| flat(&model.plan.nll(tokens, bands, None).unwrap())).collect();
    let together = flat(&model.plan.nll(&tokens, &bands, None).unwrap());
    assert!(together.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs())));
}

/// Losses of both transformers, and the gradient of every parameter.
fn losses_and_gradients(config: &ModelConfig, params: Params) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let nll = params.ops().nll;
    let (model, vars) = with_random_zeros(config, params, 13);
    let tokens = music(config, 2, 2);
    let excerpt = excerpt(config, &model, &tokens, &plan_of(config, &tokens));
    let (plan_tokens, bands) = random_plan(config, 40, 5);
    let head = model.wave.forward(&excerpt.inputs().unwrap()).unwrap();
    let wave = nll(&head, &excerpt.targets).unwrap().mean_all().unwrap();
    let plan = model.plan.nll(&plan_tokens, &bands, None).unwrap().mean_all().unwrap();
    let gradients = (&wave + &plan).unwrap().backward().unwrap();
    let of = |var: &Var| flat(gradients.get(var.as_tensor()).unwrap());
    (flat(&Tensor::stack(&[wave, plan], 0).unwrap()), vars.iter().map(|(name, var)| (name.clone(), of(var))).collect())
}

#[test]
fn fused_models_have_the_losses_and_gradients_of_plain_ones() {
    for (i, config) in presets().iter().enumerate() {
        let (losses, gradients) = losses_and_gradients(config, Params::new(7));
        let (expected_losses, expected) = losses_and_gradients(config, Params::new(7).plain());
        for (a, b) in losses.iter().zip(&expected_losses) {
            assert!((a / b - 1.0).abs() < 1e-5, "preset {i}: {losses:?} {expected_losses:?}");
        }
        for (name, expected) in &expected {
            let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(largest > 0.0, "preset {i}, {name}: the gradient is zero");
            for (a, b) in gradients[name].iter().zip(expected) {
                assert!((a - b).abs() <= 1e-3 * largest, "preset {i}, {name}: {a} for {b}, the largest is {largest}");
            }
        }
    }
}

#[test]
fn every_parameter_has_the_gradient_that_finite_differences_show() {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.wave_transformer.tiers.remove(0);
    let (model, vars) = random_model(&config, 13);
    let tokens = music(&config, 1, 2);
    let plan = plan_of(&config, &tokens);
    let excerpt = excerpt(&config, &model, &tokens, &plan);
    let inputs = excerpt.inputs().unwrap();
    let (plan_tokens, bands) = random_plan(&config, 6, 5);
    let loss = || {
        let wave = head::nll(&model.wave.forward(&inputs).unwrap(), &excerpt.targets).unwrap().mean_all().unwrap();
        let plan = model.plan.nll(&plan_tokens, &bands, None).unwrap().mean_all().unwrap();
        (wave + plan).unwrap()
    };
    let gradients = loss().backward().unwrap();
    for (name, var) in &vars {
        let gradient = gradients.get(var.as_tensor()).unwrap_or_else(|| panic!("{name} has no gradient"));
        let gradient = flat(gradient);
        let (at, &steepest) = gradient.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap();
        assert!(steepest != 0.0, "{name}: the gradient is zero");
        let original = var.as_tensor().copy().unwrap();
        let values = flat(&original);
        let moved = |by: f32| {
            let mut values = values.clone();
            values[at] += by;
            var.set(&Tensor::from_vec(values, original.dims(), &Device::Cpu).unwrap()).unwrap();
            f64::from(loss().to_scalar::<f32>().unwrap())
        };
        // Moves the loss by far more than its rounding, but little on the scale of its curvature.
        let step = (2e-3 / steepest.abs()).clamp(1e-4, 0.05);
        let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
        var.set(&original).unwrap();
        let error = (slope - f64::from(steepest)).abs();
        assert!(error < 0.08 * f64::from(steepest.abs()) + 3e-4, "{name}[{at}]: gradient {steepest}, slope {slope}");
    }
}
