//! The CPU engine against the reference engine, against itself on every instruction set, and streams beside each other.

use wavegen::checkpoint::Checkpoint;
use wavegen::codec::{Quantizer, Token};
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::forecast::ForecastConfig;
use wavegen::model::config::{GenerationSettings, ModelConfig, TierConfig};
use wavegen::model::plan_transformer::is_fitted;
use wavegen::plan::PlanFrame;
use wavegen::rng::{Kind, Rng, uniform};
use wavegen::sampler::PlanSampling;
use wavegen::simd::Isa;

const F32: CpuOptions = CpuOptions { isa: Isa::Scalar, precision: Precision::F32 };

/// Random weights whose last layers are not zero, so that the history matters.
fn lively(config: ModelConfig, seed: u64) -> Checkpoint {
    let mut checkpoint = Checkpoint::untrained(config, seed).unwrap();
    let mut rng = Rng::new(seed);
    for (_, weights) in checkpoint.weights.iter_mut().filter(|(name, _)| name.starts_with("wave.") || is_fitted(name)) {
        weights.change(|all| all.mapv_inplace(|w| w + 0.05 * rng.normal()));
    }
    checkpoint.generation = GenerationSettings { grain: 0.9, past: 0.5, offset: 0.3, level_db: -1.5 };
    checkpoint
}

fn tiny(seed: u64) -> Checkpoint {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.forecast = ForecastConfig { deconvolution: 2, tones: true, past_window: 2048, ..config.forecast };
    config.plan_transformer.refine = true;
    lively(config, seed)
}

fn music(checkpoint: &Checkpoint, n: usize) -> Vec<Token> {
    let sample = |i: usize| 0.2 * (i as f32 * 0.11).sin() + 0.1 * (i as f32 * 0.273).sin();
    checkpoint.config.codec.encode_all(&(0..n).map(sample).collect::<Vec<_>>())
}

fn uniforms(stream: u32, kind: Kind, frame: usize, n: usize) -> Vec<f32> {
    (frame * n..(frame + 1) * n).map(|t| uniform(7, stream, kind, t as u64)).collect()
}

/// Plays frames `frames`, under their own plan or `given`.
fn play(
    engine: &mut dyn Engine,
    frames: std::ops::Range<usize>,
    stream: u32,
    given: Option<&[PlanFrame]>,
) -> (Vec<PlanFrame>, Vec<Token>) {
    let (hop, books) = (engine.config().plan.hop, engine.config().plan.n_codebooks);
    let (mut plan, mut tokens) = (Vec::new(), Vec::new());
    for k in frames {
        let mut frame = PlanFrame::default();
        engine.next_plan(&uniforms(stream, Kind::Plan, k, books), &mut frame).unwrap();
        let mut out = vec![0; hop];
        let follows = given.map_or(&frame, |plans| &plans[k]);
        engine.render(follows, &uniforms(stream, Kind::Wave, k, UNIFORMS_PER_SAMPLE * hop), &mut out).unwrap();
        plan.push(frame);
        tokens.extend(out);
    }
    (plan, tokens)
}

#[test]
fn sound_is_as_much_softer_than_its_plan_as_the_settings_say() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let prompt = music(&checkpoint, 16_000);
    let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
    // The prompt's last frame, on and on.
    let bands = checkpoint.spectrum().unwrap().analyse_last(&checkpoint.config.codec.decode_all(&prompt));
    let plans: Vec<_> = (0..30).map(|_| PlanFrame { bands: bands.clone(), ..PlanFrame::default() }).collect();
    let mut power_db = |level_db| {
        engine.prefill(&prompt).unwrap();
        engine.set_sampling(PlanSampling::default(), GenerationSettings { level_db, ..checkpoint.generation });
        let (_, tokens) = play(&mut engine, 0..plans.len(), 0, Some(&plans));
        let sound = checkpoint.config.codec.decode_all(&tokens[tokens.len() / 2..]);
        10.0 * (sound.iter().map(|x| x * x).sum::<f32>() / sound.len() as f32).log10()
    };
    let difference = power_db(-6.0) - power_db(0.0);
    assert!((difference + 6.0).abs() < 1.5, "{difference} dB");
}

/// Renders one frame.
fn render(engine: &mut CpuEngine, plan: &PlanFrame, stream: u32, frame: usize) -> Vec<Token> {
    let mut out = vec![0; engine.config().plan.hop];
    engine.render(plan, &uniforms(stream, Kind::Wave, frame, UNIFORMS_PER_SAMPLE * out.len()), &mut out).unwrap();
    out
}

/// Frame by frame from the same state: the same plan, and the same tokens until a draw falls on an edge, between two bins or two
/// components (from there on the streams are different ones).
fn assert_plays_like(cpu: &mut CpuEngine, reference: &mut ReferenceEngine, n_frames: usize, what: &str) {
    let hop = cpu.config().plan.hop;
    let mut equal = 0;
    for k in 0..n_frames {
        if k > 0 {
            cpu.restore(&reference.save().unwrap()).unwrap();
        }
        let (plan, tokens) = play(cpu, k..k + 1, 0, None);
        let (expected_plan, expected) = play(reference, k..k + 1, 0, None);
        assert!(plan[0].tokens == expected_plan[0].tokens, "{what}, frame {k}: another plan");
        let at = tokens.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(hop);
        equal += at;
    }
    assert!(equal > n_frames * hop / 2, "{what}: only {equal} samples are equal");
}

#[test]
fn in_f32_it_plays_the_reference_engines_tokens_over_many_ring_wraps() {
    let checkpoint = tiny(1);
    let mut reference = ReferenceEngine::new(&checkpoint).unwrap();
    let mut cpu = CpuEngine::new(&checkpoint, &F32).unwrap();
    let prompt = music(&checkpoint, 5000);
    for engine in [&mut reference as &mut dyn Engine, &mut cpu] {
        let mut plan = engine.prefill(&prompt).unwrap();
        let padded = [vec![checkpoint.config.codec.silence(); 120], prompt.clone()].concat();
        assert_eq!(plan, engine.plan_of(&padded).unwrap());
        let as_read = engine.save().unwrap();
        plan.iter_mut().for_each(|frame| frame.bands[3] += 0.2);
        engine.heard_as(&plan[plan.len() - 2..]).unwrap();
        assert!(engine.save().unwrap() != as_read && engine.plan_of(&padded).unwrap() != plan);
    }
    assert_plays_like(&mut cpu, &mut reference, 6, "tiny");
    let tokens = play(&mut cpu, 6..7, 0, None).1;
    assert!(tokens.iter().collect::<std::collections::HashSet<_>>().len() > 20, "nothing is heard: {tokens:?}");
}

#[test]
fn in_f32_it_plays_the_reference_engines_tokens_with_the_models_inside_the_program() {
    for name in Checkpoint::INSIDE {
        let checkpoint = Checkpoint::named(name.as_ref()).unwrap();
        let mut reference = ReferenceEngine::new(&checkpoint).unwrap();
        let options = CpuOptions { precision: Precision::F32, ..Default::default() };
        let mut cpu = CpuEngine::new(&checkpoint, &options).unwrap();
        let prompt = music(&checkpoint, 20_000);
        reference.prefill(&prompt).unwrap();
        cpu.prefill(&prompt).unwrap();
        assert_plays_like(&mut cpu, &mut reference, 4, name);
    }
}

#[test]
fn the_small_model_plays_the_built_in_models_plans() {
    let [large, small] = Checkpoint::INSIDE.map(|name| Checkpoint::named(name.as_ref()).unwrap());
    assert!(2 * small.n_weights("wave.") < large.n_weights("wave."));
    assert_eq!(small.config.codec, large.config.codec);
    let prompt = music(&large, 9000);
    let [(plan, large), (same, small)] = [large, small].map(|checkpoint| {
        let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
        engine.prefill(&prompt).unwrap();
        play(&mut engine, 0..3, 0, None)
    });
    assert!(plan == same && large != small);
}

#[test]
fn odd_sizes_have_the_reference_engines_distributions_on_every_instruction_set() {
    let tier = |hop, dim, n_layers, n_heads, window| TierConfig { hop, dim, n_layers, n_heads, window };
    for (seed, tiers) in [
        vec![tier(32, 20, 2, 2, 5), tier(1, 36, 3, 3, 21)],
        vec![tier(128, 18, 1, 1, 33), tier(16, 68, 1, 2, 7), tier(4, 10, 1, 1, 3), tier(1, 12, 2, 2, 18)],
        vec![tier(1, 100, 1, 2, 70)],
    ]
    .into_iter()
    .enumerate()
    {
        let mut config = ModelConfig::preset("tiny").unwrap();
        config.wave_transformer.tiers = tiers;
        config.wave_transformer.token_dim = 5;
        config.wave_transformer.taps = 3;
        config.wave_transformer.components = 2;
        config.wave_transformer.plan_dim = 27;
        config.wave_transformer.shortcut_dim = 7;
        config.plan_transformer.dim = 44;
        config.plan_transformer.n_heads = 1;
        config.plan_transformer.window = 9;
        config.plan.n_codebooks = 3;
        config.plan.n_entries = 11;
        config.forecast.deconvolution = 3 * seed;
        config.forecast.tones = seed > 0;
        config.forecast.past_window = 2048;
        config.codec.quantizer = if seed == 1 { Quantizer::Pcm16 } else { Quantizer::Mulaw8 };
        config.forecast.fine_residual = seed == 1;
        config.validate().unwrap();
        let checkpoint = lively(config, seed as u64 + 5);
        let mut reference = ReferenceEngine::new(&checkpoint).unwrap();
        let prompt = music(&checkpoint, 7000);
        let mut cpu = CpuEngine::new(&checkpoint, &F32).unwrap();
        let heard = &prompt[..6 * 512];
        let (mut nll, mut expected) = (vec![0.0; heard.len()], vec![0.0; heard.len()]);
        cpu.score(heard, &mut nll).unwrap();
        reference.score(heard, &mut expected).unwrap();
        let worst = nll.iter().zip(&expected).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(worst < 2e-3, "sizes {seed}: {worst} nats");
        for precision in [Precision::F32, Precision::Int8] {
            let played = |isa| {
                let mut cpu = CpuEngine::new(&checkpoint, &CpuOptions { isa, precision }).unwrap();
                cpu.prefill(&prompt).unwrap();
                play(&mut cpu, 0..2, 0, None)
            };
            let expected = played(Isa::Scalar);
            for isa in Isa::available() {
                assert!(played(isa) == expected, "sizes {seed}, {precision:?} on {isa:?}");
            }
        }
    }
}

#[test]
fn every_instruction_set_plays_the_same_tokens() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let played: Vec<_> = Isa::available()
        .into_iter()
        .map(|isa| {
            let mut engine = CpuEngine::new(&checkpoint, &CpuOptions { isa, precision: Precision::Int8 }).unwrap();
            engine.prefill(&music(&checkpoint, 9000)).unwrap();
            play(&mut engine, 0..3, 0, None)
        })
        .collect();
    assert!(played.iter().all(|p| *p == played[0]));
}

#[test]
fn scores_are_the_reference_engines_and_whole_numbers_cost_little() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let tokens = music(&checkpoint, 16 * 512);
    let mut expected = vec![0.0; tokens.len()];
    let mut reference = ReferenceEngine::new(&checkpoint).unwrap();
    reference.score(&tokens, &mut expected).unwrap();
    let plan = reference.score_plan(&tokens).unwrap();
    for (precision, most, most_mean) in [(Precision::F32, 2e-3, 1e-5), (Precision::Int8, 2.0, 0.02)] {
        let mut cpu = CpuEngine::new(&checkpoint, &CpuOptions { precision, ..Default::default() }).unwrap();
        let mut nll = vec![0.0; tokens.len()];
        cpu.score(&tokens, &mut nll).unwrap();
        let differences: Vec<f32> = nll.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        let worst = differences.iter().fold(0.0f32, |worst, d| worst.max(d.abs()));
        assert!(worst < most && mean.abs() < most_mean, "{precision:?}: mean {mean}, worst {worst} nats");
        let plan_nll = cpu.score_plan(&tokens).unwrap();
        let plan_worst = plan_nll.iter().zip(&plan).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
        assert!(plan_worst < most, "{precision:?}: {plan_worst} nats a frame");
    }
}

#[test]
fn a_model_stored_in_whole_numbers_plays_the_same_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let stored = |checkpoint: &Checkpoint, precision| {
        let path = directory.path().join("model.safetensors");
        checkpoint.save(&path, precision).unwrap();
        Checkpoint::load(&path).unwrap()
    };
    let mut lively = tiny(7);
    for (_, gains) in lively.weights.iter_mut().filter(|(name, _)| name.ends_with("_norm")) {
        gains.change(|gains| gains.iter_mut().enumerate().for_each(|(i, gain)| *gain += 0.1 * (i as f32).sin()));
    }
    // What is not rounded to whole numbers is rounded to half precision.
    let half = stored(&lively, wavegen::checkpoint::Precision::F16);
    let whole = stored(&half, wavegen::checkpoint::Precision::Int8);
    let played = [half, whole].map(|checkpoint| {
        let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
        engine.prefill(&music(&checkpoint, 9000)).unwrap();
        play(&mut engine, 0..3, 0, None)
    });
    assert!(played[0] == played[1]);
}

#[test]
fn streams_in_lockstep_play_what_they_play_alone_and_leave_when_they_like() {
    let checkpoint = &tiny(5);
    let mut first = CpuEngine::new(checkpoint, &CpuOptions::default()).unwrap();
    for n_streams in [1, 2, 5, 8] {
        assert_lockstep_is_alone(checkpoint, &mut first, n_streams);
    }
}

fn assert_lockstep_is_alone(checkpoint: &Checkpoint, first: &mut CpuEngine, n_streams: usize) {
    let n_frames = |i: usize| 3 + i % 3;
    let given = |i: usize| (i == 2).then(|| PlanFrame { tokens: vec![], bands: vec![-1.0; 148] });
    let together: Vec<Vec<Token>> = std::thread::scope(|scope| {
        let engines = first.fork_in_lockstep(n_streams).unwrap().into_iter().enumerate();
        let threads: Vec<_> = engines
            .map(|(i, mut engine)| {
                scope.spawn(move || {
                    engine.prefill(&music(checkpoint, 2000 + 700 * i)).unwrap();
                    // One stream follows a plan of its own at first, and renders while the others draw theirs.
                    given(i)
                        .map_or_else(Vec::new, |plan| render(&mut engine, &plan, i as u32, 9))
                        .into_iter()
                        .chain(play(&mut engine, 0..n_frames(i), i as u32, None).1)
                        .collect()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (i, tokens) in together.into_iter().enumerate() {
        first.prefill(&music(checkpoint, 2000 + 700 * i)).unwrap();
        let mut alone = given(i).map_or_else(Vec::new, |plan| render(first, &plan, i as u32, 9));
        alone.extend(play(first, 0..n_frames(i), i as u32, None).1);
        assert!(alone == tokens, "stream {i} of {n_streams}");
    }
}

#[test]
fn states_go_from_engine_to_engine() {
    let checkpoint = tiny(4);
    let mut cpu = CpuEngine::new(&checkpoint, &F32).unwrap();
    let mut reference = ReferenceEngine::new(&checkpoint).unwrap();
    cpu.prefill(&music(&checkpoint, 3000)).unwrap();
    play(&mut cpu, 0..2, 0, None);
    let state = cpu.save().unwrap();
    let expected = play(&mut cpu, 2..4, 0, None);
    cpu.restore(&state).unwrap();
    assert!(cpu.save().unwrap() == state);
    assert!(play(&mut cpu, 2..4, 0, None) == expected, "back in time");
    cpu.restore(&state).unwrap();
    reference.restore(&state).unwrap();
    assert!(reference.save().unwrap() == state);
    assert_plays_like(&mut cpu, &mut reference, 2, "restored");
    assert!(cpu.restore(&state[..state.len() / 2]).is_err());
    let mut other = CpuEngine::new(&Checkpoint::built_in().unwrap(), &F32).unwrap();
    assert!(other.restore(&state).is_err());
}

#[test]
fn reading_a_prompt_at_once_leaves_what_reading_it_frame_by_frame_leaves() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
    let tokens = music(&checkpoint, 12 * 512);
    engine.prefill(&tokens).unwrap();
    let at_once = engine.save().unwrap();
    engine.score(&tokens, &mut vec![0.0; tokens.len()]).unwrap();
    let step_by_step = engine.save().unwrap();
    // Scoring leaves the plan transformer alone; what the wave transformer remembers is the same.
    let wave = |state: &[u8]| -> Vec<(String, Vec<u8>)> {
        let tensors = safetensors::SafeTensors::deserialize(state).unwrap();
        let mut all: Vec<_> = tensors.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect();
        all.retain(|(name, _)| name.starts_with("wave."));
        all.sort();
        all
    };
    assert!(wave(&at_once).len() > 6);
    assert!(wave(&at_once) == wave(&step_by_step));
}

#[test]
fn an_instruction_set_that_is_not_there_and_damaged_input_are_refused() {
    let checkpoint = tiny(5);
    if let Some(isa) = Isa::ALL.into_iter().find(|isa| !Isa::available().contains(isa)) {
        assert!(CpuEngine::new(&checkpoint, &CpuOptions { isa, ..F32 }).is_err());
    }
    let mut engine = CpuEngine::new(&checkpoint, &F32).unwrap();
    assert!(engine.prefill(&[0, 256]).is_err());
    let mut out = vec![0; 511];
    assert!(engine.render(&PlanFrame::default(), &[], &mut out).is_err());
    assert!(engine.begin_frame(&[0.0; 3]).is_err());
}

#[test]
fn what_the_plan_transformer_takes_frames_for_is_the_reference_engines() {
    let checkpoint = tiny(21);
    let prompt = music(&checkpoint, 9 * 512);
    let mut reference = ReferenceEngine::new(&checkpoint).unwrap();
    let mut cpu = CpuEngine::new(&checkpoint, &F32).unwrap();
    let close = |a: &PlanFrame, b: &PlanFrame| {
        assert_eq!(a.tokens, b.tokens);
        let worst = a.bands.iter().zip(&b.bands).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst < 1e-3, "{worst}");
        let decoded = checkpoint.quantizer.decode(&a.tokens).unwrap();
        assert!(a.bands.iter().zip(&decoded).any(|(a, b)| (a - b).abs() > 0.01), "nothing is refined");
    };
    let (ours, theirs) = (cpu.plan_of(&prompt).unwrap(), reference.plan_of(&prompt).unwrap());
    assert_eq!(ours.len(), 9);
    ours.iter().zip(&theirs).for_each(|(a, b)| close(a, b));
    // Frames that are drawn are those that are read.
    cpu.prefill(&prompt[..4 * 512]).unwrap();
    reference.prefill(&prompt[..4 * 512]).unwrap();
    for frame in 0..3 {
        let (mut a, mut b) = (PlanFrame::default(), PlanFrame::default());
        let uniforms = uniforms(0, Kind::Plan, frame, checkpoint.config.plan.n_codebooks);
        cpu.next_plan(&uniforms, &mut a).unwrap();
        reference.next_plan(&uniforms, &mut b).unwrap();
        close(&a, &b);
    }
}
