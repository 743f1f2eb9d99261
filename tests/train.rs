//! The trainer learns: a sine, overfitted by the smallest model, is predicted and continued.

use std::ops::ControlFlow;
use std::path::Path;

use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::plan::PlanFrame;
use wavegen::rng::Rng;
use wavegen::sampler::PlanSampling;
use wavegen::train::schedule::Budget;
use wavegen::train::{Part, TrainError, TrainEvent, TrainSettings, train};

const SAMPLE_RATE: u32 = 16_000;

fn sine(n: usize, hz: f32) -> Vec<f32> {
    (0..n).map(|i| 0.14 * (std::f32::consts::TAU * hz * i as f32 / SAMPLE_RATE as f32).sin()).collect()
}

fn write_wav(path: &Path, samples: &[f32]) {
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: SAMPLE_RATE,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut writer = hound::WavWriter::create(path, spec).unwrap();
    samples.iter().for_each(|x| writer.write_sample((x * 32767.0) as i16).unwrap());
    writer.finalize().unwrap();
}

fn settings(directory: &Path, steps: usize) -> TrainSettings {
    TrainSettings {
        config: ModelConfig::preset("tiny").unwrap(),
        files: vec![],
        output: directory.join("model.safetensors"),
        precision: Precision::F32,
        budget: Budget::Steps(steps),
        seed: 1,
        threads: 2,
        plan_learning_rate: 3e-3,
        wave_learning_rate: 5e-3,
        validation_share: 0.1,
        calibrate: false,
        notes: [("licence".to_owned(), "CC0".to_owned())].into(),
    }
}

#[test]
fn a_sine_is_overfitted_and_continued() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = settings(directory.path(), 20);
    for name in ["one.wav", "two.wav"] {
        let path = directory.path().join(name);
        write_wav(&path, &sine(5 * SAMPLE_RATE as usize, 440.0));
        settings.files.push(path);
    }
    settings.files.push(directory.path().join("missing.wav"));
    let (mut steps, mut held_out, mut skipped) = (Vec::new(), Vec::new(), 0);
    let checkpoint = train(&settings, &mut |event| {
        match event {
            TrainEvent::Step { part: Part::Wave, bits, .. } => steps.push(bits),
            TrainEvent::Validation { part: Part::Wave, bits, .. } => held_out.push(bits),
            TrainEvent::Skipped { .. } => skipped += 1,
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(skipped, 1, "the missing file is reported");
    let (first, last) = (steps[0], *held_out.last().unwrap());
    // Its tokens alone, without context, hold more than 6 bits each.
    assert!(last < 1.35 && last < 0.85 * first, "bits per sample went from {first} to {last}");
    // The checkpoint on disk is the one that was returned.
    let stored = Checkpoint::load(&settings.output).unwrap();
    assert_eq!(stored.weights, checkpoint.weights);
    assert_eq!(stored.notes["licence"], "CC0");

    let mut engine = ReferenceEngine::new(&stored).unwrap();
    // Nothing in a sine is left to chance: the forecast from the past may lead.
    engine.set_sampling(PlanSampling::default(), GenerationSettings { grain: 0.5, past: 1.0, offset: 1.0 });
    let codec = stored.config.codec.clone();
    engine.prefill(&codec.encode_all(&sine(SAMPLE_RATE as usize, 440.0))).unwrap();
    let mut rng = Rng::new(5);
    let mut played = Vec::new();
    for _ in 0..8 {
        let mut frame = PlanFrame::default();
        let uniforms: Vec<f32> = (0..stored.config.plan.n_codebooks).map(|_| rng.uniform()).collect();
        engine.next_plan(&uniforms, &mut frame).unwrap();
        let hop = stored.config.plan.hop;
        let uniforms: Vec<f32> = (0..UNIFORMS_PER_SAMPLE * hop).map(|_| rng.uniform()).collect();
        let mut tokens = vec![0; hop];
        engine.render(&frame, &uniforms, &mut tokens).unwrap();
        played.extend(codec.decode_all(&tokens));
    }
    // Share of a block's power that a 440 Hz sine of any phase holds, on average.
    let turn = |i: usize| std::f32::consts::TAU * 440.0 * i as f32 / SAMPLE_RATE as f32;
    let shares = played.chunks_exact(256).map(|block| {
        let dot = |wave: fn(f32) -> f32| block.iter().enumerate().map(|(i, x)| x * wave(turn(i))).sum::<f32>();
        let power: f32 = block.iter().map(|x| x * x).sum();
        (dot(f32::cos).powi(2) + dot(f32::sin).powi(2)) * 2.0 / (256.0 * power)
    });
    let share = shares.sum::<f32>() / (played.len() / 256) as f32;
    assert!(share > 0.6, "440 Hz holds {share} of the continuation's power");
}

#[test]
fn the_same_seed_trains_the_same_model_whatever_the_threads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_wav(&path, &sine(4 * SAMPLE_RATE as usize, 300.0));
    let trained = |threads| {
        let settings = TrainSettings { files: vec![path.clone()], threads, ..settings(directory.path(), 2) };
        train(&settings, &mut |_| ControlFlow::Continue(())).unwrap().weights
    };
    assert_eq!(trained(1), trained(2));
}

#[test]
fn training_on_nothing_is_an_error_that_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("noise.txt");
    std::fs::write(&path, "this is no audio").unwrap();
    let settings = TrainSettings { files: vec![path], ..settings(directory.path(), 2) };
    let error = train(&settings, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, TrainError::NoData { n_files: 1, .. }), "{error}");
    assert!(!settings.output.exists());
}

#[test]
fn training_that_is_stopped_leaves_a_whole_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_wav(&path, &sine(4 * SAMPLE_RATE as usize, 300.0));
    let settings = TrainSettings { files: vec![path], ..settings(directory.path(), 1000) };
    let stop_at_wave = &mut |event| match event {
        TrainEvent::Step { part: Part::Wave, .. } => ControlFlow::Break(()),
        TrainEvent::Step { step, .. } if step >= 10 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    train(&settings, stop_at_wave).unwrap();
    Checkpoint::load(&settings.output).unwrap();
}
