//! The trainer learns: a sine, overfitted by the smallest model, is predicted and continued.

use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use candle_core::Device;
use ndarray::{Axis, s};
use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::codec::Quantizer;
use wavegen::engine::reference::ReferenceEngine;
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::model::ops::Inner;
use wavegen::plan::PlanFrame;
use wavegen::rng::Rng;
use wavegen::sampler::PlanSampling;
use wavegen::train::grow::{Fate, grow};
use wavegen::train::refine::Refined;
use wavegen::train::resume::StateFolder;
use wavegen::train::schedule::{Budget, Schedule};
use wavegen::train::{Part, Start, TrainError, TrainEvent, TrainSettings, train};

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
        start: Start::New(ModelConfig::preset("tiny").unwrap().into()),
        parts: vec![Part::Plan, Part::Wave],
        files: vec![],
        output: directory.join("model.safetensors"),
        afresh: false,
        precision: Precision::F32,
        budget: Budget::Steps(steps),
        seed: 1,
        device: Device::Cpu,
        inner: Inner::F32,
        threads: 2,
        plan_batch: 4,
        wave_batch: 2,
        plan_learning_rate: 3e-3,
        wave_learning_rate: 5e-3,
        schedule: Schedule::default(),
        validation_share: 0.1,
        speed_variation: 0.0,
        plan_noise_db: 0.0,
        validate_every: None,
        save_every: Duration::from_secs(40),
        patience: None,
        calibrate: false,
        pictures: false,
        most_pieces: None,
        notes: [("licence".to_owned(), "CC0".to_owned())].into(),
    }
}

#[test]
fn a_sine_is_overfitted_and_continued() {
    let directory = tempfile::tempdir().unwrap();
    let mut settings = TrainSettings { validate_every: Some(1), ..settings(directory.path(), 20) };
    // Of different lengths: what sounds the same is used once.
    for (name, seconds) in [("one.wav", 5), ("two.wav", 6)] {
        let path = directory.path().join(name);
        write_wav(&path, &sine(seconds * SAMPLE_RATE as usize, 440.0));
        settings.files.push(path);
    }
    settings.files.push(directory.path().join("missing.wav"));
    let (mut held_out, mut skipped) = (Vec::new(), 0);
    let checkpoint = train(&settings, &mut |event| {
        match event {
            TrainEvent::Validation { part: Part::Wave, bits, .. } => held_out.push(bits),
            TrainEvent::Skipped { .. } => skipped += 1,
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(skipped, 1, "the missing file is reported");
    let (first, last) = (held_out[0], *held_out.last().unwrap());
    // The forecasts alone, which is where it begins, need few: its tokens without context hold more than 6 bits each.
    assert!(last < 0.95 * first, "bits per sample went from {first} to {last}");
    // The checkpoint on disk is the one that was returned.
    let stored = Checkpoint::load(&settings.output).unwrap();
    assert_eq!(stored.weights, checkpoint.weights);
    assert_eq!(stored.notes["licence"], "CC0");

    let mut engine = ReferenceEngine::new(&stored).unwrap();
    // Nothing in a sine is left to chance: the forecast from the past may lead.
    engine.set_sampling(
        PlanSampling::default(),
        GenerationSettings { grain: 0.5, past: 1.0, offset: 1.0, level_db: 0.0 },
    );
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
    let one = trained(1);
    // Two that draw ahead for five, and more than there are items in a batch.
    assert!([2, 5].into_iter().all(|threads| trained(threads) == one));
}

#[test]
fn pieces_shorter_than_the_windows_are_refused_before_training() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_melody(&path, 5, 1);
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.forecast.past_window = 131_072;
    let settings =
        TrainSettings { start: Start::New(config.into()), files: vec![path], ..settings(directory.path(), 2) };
    let said = train(&settings, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(said.contains("the longest piece has") && said.contains("8.2 s"), "{said}");
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

/// A file of a wandering tone, so that there is something to learn.
fn write_melody(path: &Path, seconds: usize, seed: u64) {
    let mut rng = Rng::new(seed);
    let (mut phase, mut hz) = (0.0f32, 300.0f32);
    let samples: Vec<f32> = (0..seconds * SAMPLE_RATE as usize)
        .map(|i| {
            if i % 4000 == 0 {
                hz = 200.0 + 400.0 * rng.uniform();
            }
            phase = (phase + hz / SAMPLE_RATE as f32).fract();
            0.2 * (std::f32::consts::TAU * phase).sin() + 0.01 * rng.normal()
        })
        .collect();
    write_wav(path, &samples);
}

/// `(part, step) -> bits` of every step in a log, and its number of lines; a step seen twice must be the same twice.
fn steps(log: &Path) -> std::collections::BTreeMap<(String, u64), f64> {
    let mut steps = std::collections::BTreeMap::new();
    for line in std::fs::read_to_string(log).unwrap_or_default().lines() {
        // The last line of a killed process may be cut.
        let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        if event["event"] == "step" {
            let key = (event["part"].as_str().unwrap().to_owned(), event["step"].as_u64().unwrap());
            let bits = event["bits"].as_f64().unwrap();
            assert_eq!(*steps.entry(key.clone()).or_insert(bits), bits, "{key:?}");
        }
    }
    steps
}

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_happened() {
    let directory = tempfile::tempdir().unwrap();
    for (i, name) in ["a.wav", "b.wav", "c.wav"].into_iter().enumerate() {
        write_melody(&directory.path().join(name), 4, i as u64);
    }
    let wavegen = |output: &str, log: &str| {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("wavegen"));
        command.current_dir(directory.path()).args(["train", "a.wav", "b.wav", "c.wav", "--preset", "tiny"]);
        command.args(["-o", output, "--log", log, "--steps", "8", "--validate-every", "3", "--save-every", "0"]);
        command.args(["--no-calibration", "--quiet"]).stderr(Stdio::inherit());
        command
    };
    assert!(wavegen("whole.safetensors", "whole.jsonl").status().unwrap().success());
    let whole = steps(&directory.path().join("whole.jsonl"));
    assert_eq!(whole.len(), 16);
    let log = directory.path().join("killed.jsonl");
    for (part, step) in [("plan", 2), ("plan", 7), ("wave", 4)] {
        let mut child = wavegen("killed.safetensors", "killed.jsonl").spawn().unwrap();
        while !steps(&log).contains_key(&(part.to_owned(), step)) {
            assert!(child.try_wait().unwrap().is_none(), "ended before {part} step {step}");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // Overwriting a model is no reason to forget what was learned.
    let n_beginnings = || std::fs::read_to_string(&log).unwrap().matches(r#""part":"plan","step":1,"#).count();
    let before = n_beginnings();
    assert!(before > 0);
    assert!(wavegen("killed.safetensors", "killed.jsonl").arg("--force").status().unwrap().success());
    assert_eq!(n_beginnings(), before);
    assert_eq!(steps(&log), whole);
    let model = |name: &str| Checkpoint::load(&directory.path().join(name)).unwrap().weights;
    assert_eq!(model("killed.safetensors"), model("whole.safetensors"));
    assert!(!StateFolder::beside(&directory.path().join("killed.safetensors")).exists(), "nothing is left behind");
    // What is finished is not overwritten by accident.
    assert!(!wavegen("killed.safetensors", "killed.jsonl").status().unwrap().success());
}

#[test]
fn an_unfinished_run_is_only_taken_up_by_the_same_settings_and_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_melody(&path, 4, 1);
    let first = TrainSettings { files: vec![path.clone()], ..settings(directory.path(), 50) };
    train(&first, &mut |event| match event {
        TrainEvent::Step { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .unwrap();
    let go =
        |settings: &TrainSettings| train(settings, &mut |_| ControlFlow::Continue(())).err().map(|e| e.to_string());
    let other = TrainSettings { seed: 2, plan_learning_rate: 1e-3, ..first.clone() };
    let error = go(&other).unwrap();
    assert!(error.contains("seed") && error.contains("plan learning rate") && error.contains("--afresh"), "{error}");
    write_melody(&path, 4, 2);
    let error = go(&first).unwrap();
    assert!(error.contains("data"), "{error}");
    assert_eq!(go(&TrainSettings { afresh: true, budget: Budget::Steps(1), ..first }), None);
}

#[test]
fn what_no_run_has_written_is_neither_taken_for_its_state_nor_removed_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_melody(&path, 4, 1);
    let settings = TrainSettings { files: vec![path], ..settings(directory.path(), 2) };
    let folder = StateFolder::beside(&settings.output);
    std::fs::create_dir_all(folder.join("audio")).unwrap();
    // A folder of recordings whose name happens to be that of the state.
    for name in ["notes.txt", "audio/song.wav"] {
        std::fs::write(folder.join(name), "mine").unwrap();
        for afresh in [false, true] {
            let settings = TrainSettings { afresh, ..settings.clone() };
            let error = train(&settings, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("of no training run"), "{error}");
        }
        assert_eq!(std::fs::read(folder.join(name)).unwrap(), b"mine");
        std::fs::remove_file(folder.join(name)).unwrap();
    }
    train(&settings, &mut |event| match event {
        TrainEvent::Step { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .unwrap();
    assert!(StateFolder::holds_run(&settings.output));
    // Something that was put there meanwhile, and what a kill left of a state.
    for name in ["notes.txt", ".wavegen-abc.part"] {
        std::fs::write(folder.join(name), "mine").unwrap();
    }
    train(&settings, &mut |_| ControlFlow::Continue(())).unwrap();
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["notes.txt"]);
}

#[test]
fn a_run_among_its_recordings_does_not_learn_from_its_own_state() {
    let directory = tempfile::tempdir().unwrap();
    write_melody(&directory.path().join("one.wav"), 4, 1);
    write_melody(&directory.path().join("two.wav"), 4, 2);
    let settings = TrainSettings { files: vec![directory.path().into()], ..settings(directory.path(), 2) };
    let started = |stop: fn(&TrainEvent) -> bool| {
        let mut skipped = Vec::new();
        let trained = train(&settings, &mut |event| {
            let flow = if stop(&event) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            if let TrainEvent::Skipped { path, .. } = event {
                skipped.push(path);
            }
            flow
        });
        (trained.is_ok(), skipped)
    };
    assert_eq!(started(|event| matches!(event, TrainEvent::Reading { .. })), (false, vec![]));
    assert_eq!(started(|event| matches!(event, TrainEvent::Step { .. })), (true, vec![]));
    assert_eq!(started(|_| false), (true, vec![settings.output.clone()]));
}

#[test]
fn one_part_can_be_trained_on_from_a_model() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_melody(&path, 4, 1);
    let base = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 9).unwrap();
    let settings = TrainSettings {
        start: Start::From(Box::new(base.clone())),
        parts: vec![Part::Plan],
        files: vec![path],
        ..settings(directory.path(), 2)
    };
    let tuned = train(&settings, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(tuned.quantizer, base.quantizer);
    assert_eq!(tuned.generation, base.generation);
    for (name, weights) in &base.weights {
        assert_eq!(&tuned.weights[name] == weights, name.starts_with("wave."), "{name}");
    }
}

#[test]
fn a_model_of_mulaw_goes_on_in_16_bits_and_with_more_and_larger_codebooks() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.wav");
    write_melody(&path, 8, 1);
    let files = vec![path];
    let first = TrainSettings { files: files.clone(), ..settings(directory.path(), 2) };
    let old = train(&first, &mut |_| ControlFlow::Continue(())).unwrap();
    let mut config = old.config.clone();
    config.codec.quantizer = Quantizer::Pcm16;
    config.plan.n_codebooks += 1;
    config.plan.n_entries += 4;
    let (model, fates) = grow(&old, &config, 1).unwrap();
    assert_eq!(fates.map(|(_, fate)| fate), [Fate::Grown, Fate::Moved]);
    let second = TrainSettings {
        start: Start::Refitted {
            model: model.into(),
            books: old.quantizer.clone().into(),
            was: old.config.codec.clone(),
        },
        files,
        output: directory.path().join("second.safetensors"),
        ..settings(directory.path(), 2)
    };
    let new = train(&second, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(new.config, config);
    assert_eq!(new.quantizer.mean, old.quantizer.mean);
    let (known, entries, _) = old.quantizer.books.dim();
    let translated = new.quantizer.books.slice(s![..known, ..entries, ..]);
    assert!(
        translated != old.quantizer.books && new.quantizer.books.slice(s![known.., .., ..]).iter().any(|x| *x != 0.0)
    );
    // After two steps a new entry still means about what the nearest old one does.
    for (q, parents) in new.quantizer.parents(entries).enumerate().take(known) {
        let table = new.weights[&format!("plan.{q}.embedding")].floats().into_owned();
        for (i, parent) in parents.into_iter().enumerate() {
            let apart = &table.index_axis(Axis(0), entries + i) - &table.index_axis(Axis(0), parent);
            assert!(apart.iter().all(|x| x.abs() < 0.05), "codebook {q}, new entry {i}: {apart}");
        }
    }
    let stored = Checkpoint::load(&second.output).unwrap();
    assert_eq!((stored.config, stored.quantizer), (config, new.quantizer));
}

#[test]
fn after_the_plan_transformer_the_map_that_refines_frames_is_fitted() {
    let directory = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..4).map(|i| directory.path().join(format!("{i}.wav"))).collect();
    files.iter().zip(1..).for_each(|(path, seed)| write_melody(path, 60, seed));
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.plan_transformer.refine = true;
    let settings = TrainSettings {
        start: Start::New(config.into()),
        files,
        validation_share: 0.3,
        parts: vec![Part::Plan],
        ..settings(directory.path(), 3)
    };
    let mut refined = None;
    let model = train(&settings, &mut |event| {
        if let TrainEvent::Refined(found) = event {
            refined = Some(found);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let refined: Refined = refined.unwrap();
    assert!(refined.refined_db < refined.decoded_db, "{refined:?}");
    assert!(model.weights["plan.refine.weight"].values().iter().any(|&w| w != 0.0));
    // It is kept: who goes on in the other part needs neither it nor the plans again.
    let both = TrainSettings {
        parts: vec![Part::Plan, Part::Wave],
        output: directory.path().join("both.safetensors"),
        ..settings.clone()
    };
    train(&both, &mut |event| match event {
        TrainEvent::Step { part: Part::Wave, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .unwrap();
    let went_on = train(&both, &mut |event| {
        assert!(!matches!(event, TrainEvent::Refined(_) | TrainEvent::Codebooks { .. }), "{event:?}");
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(went_on.weights["plan.refine.weight"], model.weights["plan.refine.weight"]);
    // No step of another training moves it.
    let more = TrainSettings {
        start: Start::From(model.clone().into()),
        parts: vec![Part::Wave],
        output: directory.path().join("more.safetensors"),
        ..settings
    };
    let more = train(&more, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(more.weights["plan.refine.weight"], model.weights["plan.refine.weight"]);
}

#[test]
fn a_wave_transformer_alone_is_calibrated_even_where_all_held_out_pieces_are_short() {
    let directory = tempfile::tempdir().unwrap();
    let files = [directory.path().join("long.wav"), directory.path().join("short.wav")];
    write_melody(&files[0], 8, 1);
    // Long enough to be used, too short to be played to.
    write_wav(&files[1], &sine(34_000, 440.0));
    let held_out_short = (0..8).any(|seed| {
        let mut held_out_s = 0.0;
        let settings = TrainSettings {
            parts: vec![Part::Wave],
            files: files.to_vec(),
            seed,
            calibrate: true,
            output: directory.path().join(format!("{seed}.safetensors")),
            ..settings(directory.path(), 1)
        };
        let mut tried = 0;
        train(&settings, &mut |event| {
            match event {
                TrainEvent::Data { validation_hours, .. } => held_out_s = 3600.0 * validation_hours,
                TrainEvent::Calibration(_) => tried += 1,
                _ => {}
            }
            if tried == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(tried, 2);
        (1.0..2.3).contains(&held_out_s)
    });
    assert!(held_out_short);
}

#[test]
fn training_that_does_not_gain_stops_early_with_the_best_model() {
    let directory = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..3).map(|i| directory.path().join(format!("{i}.wav"))).collect();
    files.iter().zip(0..).for_each(|(path, seed)| write_melody(path, 4, seed));
    let settings = TrainSettings {
        parts: vec![Part::Wave],
        files,
        wave_learning_rate: 0.5,
        validate_every: Some(2),
        patience: Some(2),
        ..settings(directory.path(), 10_000)
    };
    let mut judged = Vec::new();
    let returned = train(&settings, &mut |event| {
        if let TrainEvent::Validation { bits, .. } = event {
            judged.push(bits);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let least = judged.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(judged.len() < 100 && judged[judged.len() - 1] > least && judged[judged.len() - 3] == least, "{judged:?}");
    assert_eq!(Checkpoint::load(&settings.output).unwrap().weights, returned.weights);
    // Who ends it where it has become worse gets the best model too.
    let by_hand = TrainSettings { output: directory.path().join("ended.safetensors"), patience: None, ..settings };
    let mut left = judged.len();
    let ended = train(&by_hand, &mut |event| {
        left -= usize::from(matches!(event, TrainEvent::Validation { .. }));
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(ended.weights, returned.weights);
    // And who ends it before it is judged again, the best that was judged.
    let until = |end: fn(&TrainEvent) -> bool, name: &str| {
        let settings = TrainSettings { output: directory.path().join(name), ..by_hand.clone() };
        let stop = &mut |event| if end(&event) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        train(&settings, stop).unwrap().weights
    };
    let judged = until(|event| matches!(event, TrainEvent::Validation { .. }), "judged.safetensors");
    assert_eq!(until(|event| matches!(event, TrainEvent::Step { step: 3, .. }), "later.safetensors"), judged);
}
