//! The reference engine's contract: determinism, prompts of any length, saved states, honest scores.

use wavegen::checkpoint::Checkpoint;
use wavegen::codec::Token;
use wavegen::engine::cpu::{CpuEngine, CpuOptions};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::forecast::ForecastConfig;
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::plan::PlanFrame;
use wavegen::rng::Rng;
use wavegen::sampler::PlanSampling;

fn engine(seed: u64) -> ReferenceEngine {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.forecast = ForecastConfig { deconvolution: 2, tones: true, past_window: 2048, ..config.forecast };
    let checkpoint = Checkpoint::untrained(config, seed).unwrap();
    ReferenceEngine::new(&checkpoint).unwrap()
}

fn music(n: usize) -> Vec<Token> {
    let sample = |i: usize| 0.2 * (i as f32 * 0.11).sin() + 0.1 * (i as f32 * 0.273).sin();
    ModelConfig::default().codec.encode_all(&(0..n).map(sample).collect::<Vec<_>>())
}

fn play(engine: &mut ReferenceEngine, n_frames: usize, rng: &mut Rng) -> (Vec<PlanFrame>, Vec<Token>) {
    let (hop, books) = (engine.config().plan.hop, engine.config().plan.n_codebooks);
    let (mut plan, mut tokens) = (Vec::new(), Vec::new());
    for _ in 0..n_frames {
        let mut frame = PlanFrame::default();
        let uniforms: Vec<f32> = (0..books).map(|_| rng.uniform()).collect();
        engine.next_plan(&uniforms, &mut frame).unwrap();
        let uniforms: Vec<f32> = (0..UNIFORMS_PER_SAMPLE * hop).map(|_| rng.uniform()).collect();
        let mut out = vec![0; hop];
        engine.render(&frame, &uniforms, &mut out).unwrap();
        plan.push(frame);
        tokens.extend(out);
    }
    (plan, tokens)
}

#[test]
fn a_restored_state_goes_on_with_the_same_tokens() {
    let mut one = engine(6);
    one.prefill(&music(1024)).unwrap();
    let mut rng = Rng::new(3);
    play(&mut one, 1, &mut rng);
    let state = one.save().unwrap();
    let mut rngs = [rng.clone(), rng.clone()];
    let expected = play(&mut one, 2, &mut rng);
    let mut other = engine(6);
    other.restore(&state).unwrap();
    assert_eq!(play(&mut other, 2, &mut rngs[0]), expected, "in another engine");
    one.restore(&state).unwrap();
    assert_eq!(play(&mut one, 2, &mut rngs[1]), expected, "back in time");
}

#[test]
fn plans_ahead_are_those_that_come_and_change_nothing() {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.plan_transformer.refine = true;
    let checkpoint = Checkpoint::untrained(config, 6).unwrap();
    let engines: [Box<dyn Engine>; 2] = [
        Box::new(ReferenceEngine::new(&checkpoint).unwrap()),
        Box::new(CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap()),
    ];
    for mut engine in engines {
        let books = engine.config().plan.n_codebooks;
        let mut rng = Rng::new(8);
        let mut way = |frames: usize| (0..frames * books).map(|_| rng.uniform()).collect::<Vec<f32>>();
        engine.prefill(&music(5000)).unwrap();
        let ways = [way(6), way(6), way(6)];
        let ahead = engine.plan_ahead(&ways).unwrap();
        let here = engine.snapshot().unwrap();
        for (uniforms, ahead) in ways.iter().zip(ahead) {
            let plan: Vec<PlanFrame> = uniforms
                .chunks_exact(books)
                .map(|uniforms| {
                    let mut frame = PlanFrame::default();
                    engine.next_plan(uniforms, &mut frame).unwrap();
                    frame
                })
                .collect();
            assert_eq!(plan, ahead);
            engine.rewind(&here).unwrap();
        }
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut one = engine(6);
    one.prefill(&music(512)).unwrap();
    let state = one.save().unwrap();
    assert!(one.restore(b"nonsense").is_err());
    assert!(one.restore(&state[..state.len() / 2]).is_err());
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.plan_transformer.window = 32;
    let mut stranger = ReferenceEngine::new(&Checkpoint::untrained(config, 1).unwrap()).unwrap();
    assert!(stranger.restore(&state).is_err());
}

#[test]
fn prompts_of_any_length_are_continued() {
    let mut engine = engine(9);
    let hop = engine.config().plan.hop;
    for n in [0, 1, 7, hop - 1, hop, hop + 1] {
        engine.prefill(&music(n)).unwrap();
        let (_, tokens) = play(&mut engine, 1, &mut Rng::new(1));
        assert_eq!(tokens.len(), hop, "prompt of {n}");
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let mut engine = engine(9);
    assert!(engine.prefill(&[300]).is_err(), "a token outside the vocabulary");
    assert!(engine.next_plan(&[0.5], &mut PlanFrame::default()).is_err(), "too few uniforms");
    let frame = PlanFrame { tokens: vec![], bands: vec![0.0; 3] };
    assert!(engine.render(&frame, &[0.5; 1024], &mut [0; 512]).is_err(), "too few bands");
    assert!(engine.score(&music(7), &mut [0.0; 7]).is_err(), "not whole frames");
}

#[test]
fn same_uniforms_same_tokens_and_settings_matter() {
    let tokens = |settings: GenerationSettings, temperature: f32| {
        let mut engine = engine(5);
        engine.set_sampling(PlanSampling { temperature, ..PlanSampling::default() }, settings);
        engine.prefill(&music(512)).unwrap();
        play(&mut engine, 1, &mut Rng::new(8))
    };
    let usual = GenerationSettings::default();
    assert_eq!(tokens(usual, 1.0), tokens(usual, 1.0));
    assert_ne!(tokens(usual, 1.0).1, tokens(GenerationSettings { grain: 0.3, ..usual }, 1.0).1);
    assert_ne!(tokens(usual, 1.0).0, tokens(usual, 0.0).0);
}

#[test]
fn scores_do_not_depend_on_what_comes_after() {
    let mut engine = engine(11);
    let hop = engine.config().plan.hop;
    let tokens = music(3 * hop);
    let (mut long, mut short) = (vec![0.0; 3 * hop], vec![0.0; 2 * hop]);
    engine.score(&tokens, &mut long).unwrap();
    engine.score(&tokens[..2 * hop], &mut short).unwrap();
    for (t, (a, b)) in long.iter().zip(&short).enumerate() {
        assert!((a - b).abs() < 1e-3, "sample {t}: {a} and {b}");
    }
    assert_eq!(engine.score_plan(&tokens).unwrap().len(), 2);
}

#[test]
fn sampled_tokens_cost_what_the_distribution_says() {
    // With all factors 1 the engine draws from the very distribution that it scores: the mean cost of what it drew is
    // the distribution's entropy, far under the 8 bits of nonsense.
    let mut engine = engine(12);
    let hop = engine.config().plan.hop;
    let whole = GenerationSettings { grain: 1.0, past: 1.0, offset: 1.0, level_db: 0.0 };
    engine.set_sampling(PlanSampling::default(), whole);
    let prompt = music(4 * hop);
    engine.prefill(&prompt).unwrap();
    let (_, drawn) = play(&mut engine, 2, &mut Rng::new(4));
    let mut tokens = prompt;
    tokens.extend(drawn);
    let mut nll = vec![0.0; tokens.len()];
    engine.score(&tokens, &mut nll).unwrap();
    let bits = nll[4 * hop..].iter().sum::<f32>() / (2 * hop) as f32 / std::f32::consts::LN_2;
    assert!((0.0..7.0).contains(&bits), "{bits} bits per sample");
}
