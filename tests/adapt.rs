//! `wavegen adapt`: helps where it can, and where it can't the model stays what it was. With the smallest model, untrained.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use tempfile::TempDir;
use wavegen::audio::AudioSource;
use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::rng::Rng;
use wavegen::train::Part;
use wavegen::train::adapt::{AdaptError, AdaptEvent, AdaptSettings, Adaptation, Verdict, adapt};
use wavegen::train::calibrate::Tried;
use wavegen::train::scene::Follow;
use wavegen::train::schedule::Budget;

const PROGRAM: &str = env!("CARGO_BIN_EXE_wavegen");
const RATE: usize = 16_000;

/// Plucked tones, four a second, out of five.
fn melody(seconds: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    let (mut hz, mut phase) = (300.0, 0.0f32);
    (0..seconds * RATE)
        .map(|i| {
            let age = i % (RATE / 4);
            if age == 0 {
                hz = [220.0, 277.0, 330.0, 415.0, 440.0][rng.below(5)];
            }
            phase = (phase + hz / RATE as f32).fract();
            let swell = (-(age as f32) / 3000.0).exp() * (age as f32 / 100.0).min(1.0);
            0.3 * swell * (std::f32::consts::TAU * phase).sin() + 0.002 * rng.normal()
        })
        .collect()
}

fn noise(seconds: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..seconds * RATE).map(|_| 0.1 * rng.normal()).collect()
}

/// Sawtooth blips of any pitch, thirteen a second: no piano.
fn blips(seconds: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    let mut blip = || {
        let (hz, decay) = (60.0 + 2400.0 * rng.uniform(), 5.0 + 35.0 * rng.uniform());
        (0..1200).map(move |i| {
            let t = i as f32 / RATE as f32;
            0.35 * (2.0 * (hz * t).fract() - 1.0) * (-decay * t).exp()
        })
    };
    (0..seconds * RATE / 1200).flat_map(|_| blip()).collect()
}

fn untrained() -> Checkpoint {
    Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap()
}

struct Scene {
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, samples: &[f32]) -> PathBuf {
        let spec = hound::WavSpec {
            channels: 1,
            sample_rate: RATE as u32,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        let path = self.path(name);
        let mut writer = hound::WavWriter::create(&path, spec).unwrap();
        samples.iter().for_each(|x| writer.write_sample((x * 32767.0) as i16).unwrap());
        writer.finalize().unwrap();
        path
    }

    fn wavegen(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.current_dir(self.directory.path()).args(args);
        command
    }
}

/// Larger rates than for trained models, so that few steps show.
fn settings(steps: usize, threads: usize) -> AdaptSettings {
    let settings = AdaptSettings::new(Budget::Steps(steps), threads);
    AdaptSettings { plan_learning_rate: 3e-3, wave_learning_rate: 3e-3, ..settings }
}

fn adapted(base: &Checkpoint, path: &Path, settings: &AdaptSettings) -> (Checkpoint, Adaptation) {
    let sound = AudioSource::open(path).unwrap();
    adapt(base, &[sound], settings, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn of_part<'a>(model: &'a Checkpoint, part: &'a str) -> impl PartialEq + 'a {
    model.weights.iter().filter(|(name, _)| name.starts_with(part)).collect::<Vec<_>>()
}

#[test]
fn the_end_of_a_recording_becomes_likelier_by_its_beginning() {
    let scene = Scene::new();
    let base = untrained();
    let path = scene.write("melody.wav", &melody(10, 1));
    let (model, adaptation) = adapted(&base, &path, &settings(24, 2));
    assert!((adaptation.head_s + adaptation.tail_s - 10.0).abs() < 0.1 && adaptation.tail_s >= 1.9, "{adaptation:?}");
    for (part, least_gain) in [(adaptation.plan, 1.0), (adaptation.wave, 0.05)] {
        assert_eq!(part.verdict, Verdict::Adapted, "{adaptation:?}");
        assert!(part.best_bits < part.before_bits - least_gain, "{adaptation:?}");
    }
    let free_run = adaptation.free_run.unwrap();
    assert!(free_run.after_db <= free_run.before_db + 0.5, "{free_run:?}");
    assert!(of_part(&model, "plan.") != of_part(&base, "plan.") && of_part(&model, "wave.") != of_part(&base, "wave."));
    assert_eq!((&model.quantizer, model.generation), (&base.quantizer, base.generation));
    // The adapted model, judged anew, needs what was reported.
    let (_, judged) = adapted(&model, &path, &settings(1, 1));
    assert!((judged.plan.before_bits - adaptation.plan.best_bits).abs() < 1e-6, "{judged:?} {adaptation:?}");
    assert!((judged.wave.before_bits - adaptation.wave.best_bits).abs() < 1e-6, "{judged:?} {adaptation:?}");
}

#[test]
fn a_model_stays_what_it_was_where_the_end_is_of_another_kind() {
    let scene = Scene::new();
    // One that knows noise.
    let (base, _) = adapted(&untrained(), &scene.write("noise.wav", &noise(8, 1)), &settings(24, 2));
    let two_kinds = [melody(8, 2), noise(2, 3)].concat();
    let (model, adaptation) = adapted(&base, &scene.write("two.wav", &two_kinds), &settings(40, 2));
    for part in [adaptation.plan, adaptation.wave] {
        assert_eq!((part.verdict, part.best_bits), (Verdict::NoGain, part.before_bits), "{adaptation:?}");
        assert!(part.steps < 40, "it ends early: {adaptation:?}");
    }
    assert!(adaptation.free_run.is_none());
    assert_eq!((model.weights, model.generation), (base.weights, base.generation));
}

#[test]
fn the_same_steps_make_the_same_model_whatever_the_threads() {
    let scene = Scene::new();
    let path = scene.write("melody.wav", &melody(5, 1));
    let weights = |threads| adapted(&untrained(), &path, &settings(5, threads)).0.weights;
    let one = weights(1);
    assert!([2, 5].into_iter().all(|threads| weights(threads) == one));
}

#[test]
fn steps_that_are_ended_early_leave_a_whole_model_and_are_told() {
    let scene = Scene::new();
    let sound = AudioSource::open(&scene.write("melody.wav", &melody(5, 1))).unwrap();
    let mut events = Vec::new();
    let (model, adaptation) = adapt(&untrained(), &[sound], &settings(50, 2), &mut |event| {
        events.push(event);
        match event {
            AdaptEvent::Step { part: Part::Plan, step: 6, .. } => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    })
    .unwrap();
    assert_eq!((adaptation.plan.steps, adaptation.wave.steps), (6, 0));
    assert_eq!((adaptation.plan.verdict, adaptation.wave.verdict), (Verdict::Adapted, Verdict::NoGain));
    model.model().unwrap();
    let judged = |event: &&AdaptEvent| matches!(event, AdaptEvent::Judged { .. });
    assert_eq!(
        events.iter().filter(judged).count(),
        4,
        "before, at 4, at 6, and the wave transformer before: {events:?}"
    );
}

#[test]
fn what_cannot_be_adapted_to_is_named_and_nothing_is_written() {
    let scene = Scene::new();
    scene.write("short.wav", &melody(3, 1));
    scene.write("silent.wav", &vec![0.0; 6 * RATE]);
    scene.write("good.wav", &melody(5, 1));
    std::fs::write(scene.path("text.wav"), "no audio").unwrap();
    std::fs::create_dir(scene.path("folder")).unwrap();
    untrained().save(&scene.path("tiny.safetensors"), Precision::F32).unwrap();
    let tiny = ["-m", "tiny.safetensors", "-o", "out.safetensors", "--steps", "1"];
    for (input, message) in [
        ("short.wav", "short.wav: 3.0 s of sound are too short to adapt to; at least 4"),
        ("silent.wav", "silent.wav: silent"),
        ("text.wav", "text.wav: not a readable audio file"),
        ("folder", "folder: is a directory"),
        ("missing.wav", "missing.wav"),
    ] {
        let args = [&["adapt", "good.wav", input], &tiny[..]].concat();
        scene.wavegen(&args).assert().code(1).stderr(contains(message));
        assert!(!scene.path("out.safetensors").exists(), "{input}");
    }
    let short = AudioSource::open(&scene.path("short.wav")).unwrap();
    let error = adapt(&untrained(), &[short], &settings(1, 1), &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, AdaptError::TooShort { least_s, .. } if (3.9..4.1).contains(&least_s)), "{error}");
    scene.wavegen(&["adapt", "-o", "out.safetensors"]).assert().code(2);
    let both = ["adapt", "good.wav", "-o", "out.safetensors", "--steps", "1", "--seconds-budget", "1"];
    scene.wavegen(&both).assert().code(2).stderr(contains("cannot be used with"));
    // What is there already stays, unless one insists.
    std::fs::write(scene.path("out.safetensors"), "mine").unwrap();
    let args = [&["adapt", "good.wav"], &tiny[..]].concat();
    scene.wavegen(&args).assert().code(1).stderr(contains("already exists"));
    assert_eq!(std::fs::read(scene.path("out.safetensors")).unwrap(), b"mine");
    scene.wavegen(&[&args[..], &["--force"]].concat()).assert().success();
    Checkpoint::load(&scene.path("out.safetensors")).unwrap();
}

#[test]
fn a_recording_is_continued_by_the_model_that_was_adapted_to_it() {
    let scene = Scene::new();
    scene.write("in.wav", &melody(6, 1));
    untrained().save(&scene.path("tiny.safetensors"), Precision::F32).unwrap();
    let args =
        ["adapt", "in.wav", "-m", "tiny.safetensors", "-o", "own.safetensors", "--steps", "8", "--store", "int8"];
    let run = scene.wavegen(&[&args[..], &["--json"]].concat()).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    for part in ["plan", "wave"] {
        let figure = |name: &str| report[part][name].as_f64().unwrap();
        assert_eq!((figure("steps"), figure("best_bits") < figure("before_bits")), (8.0, true), "{report}");
    }
    assert_eq!(report["plan"]["verdict"], "adapted");
    let own = Checkpoint::load(&scene.path("own.safetensors")).unwrap();
    assert_eq!((own.precision, own.notes["adapted-to"].as_str()), (Precision::Int8, "in.wav"));
    let play = ["continue", "in.wav", "--seconds", "0.3"];
    scene.wavegen(&[&play[..], &["-m", "own.safetensors", "-o", "out.wav"]].concat()).assert().success();
    assert_eq!(hound::WavReader::open(scene.path("out.wav")).unwrap().len() as usize, 6 * RATE + 3 * RATE / 10);
    // In one go, in memory.
    let at_once = [&play[..], &["-m", "tiny.safetensors", "--adapt", "0.5"]].concat();
    let told = contains("bits/frame on the tail").and(contains("bits/sample on the tail")).and(contains("s played"));
    scene.wavegen(&[&at_once[..], &["-o", "at-once.wav"]].concat()).assert().success().stderr(told);
    for session in ["--resume", "--save-session"] {
        let args = [&at_once[..], &["-o", "no.wav", session, "s.bin"]].concat();
        scene.wavegen(&args).assert().code(2).stderr(contains("wavegen adapt"));
        assert!(!scene.path("no.wav").exists() && !scene.path("s.bin").exists());
    }
}

#[test]
fn who_plays_on_what_the_model_does_not_know_is_told_of_adapting() {
    let scene = Scene::new();
    scene.write("blips.wav", &blips(5, 1));
    let prompt = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/prompt.wav");
    let play = |input: &str, args: &[&str]| {
        let all = ["continue", input, "-o", "out.wav", "--force", "--seconds", "0.1"];
        let all = [&all[..], args].concat();
        let run = scene.wavegen(&all).assert().success();
        String::from_utf8(run.get_output().stderr.clone()).unwrap()
    };
    let stream = ["stream", "blips.wav", "--no-audio", "--clock", "simulated", "--seconds", "5.2"];
    let streamed = scene.wavegen(&stream).assert().success();
    for told in [play("blips.wav", &[]), String::from_utf8_lossy(&streamed.get_output().stderr).into()] {
        assert!(
            told.contains("unlike what the model 'built-in' learned from") && told.contains("--adapt 30"),
            "{told}"
        );
    }
    assert!(!play(prompt, &[]).contains("--adapt"));
    assert!(!play("blips.wav", &["--quiet"]).contains("--adapt"));
    // Not where there is too little to adapt to, nor where it was done.
    scene.write("short.wav", &blips(3, 1));
    assert!(!play("short.wav", &[]).contains("--adapt"));
    assert!(!play("blips.wav", &["--adapt", "0.5"]).contains("unlike"));
    let stream = [&stream[..], &["--adapt", "0.5"]].concat();
    let told = contains("bits/frame on the tail").and(contains("s played in")).and(contains("unlike").not());
    scene.wavegen(&stream).assert().success().stderr(told);
}

#[test]
fn an_adapted_model_plays_with_the_settings_that_did_best() {
    let scene = Scene::new();
    let sound = AudioSource::open(&scene.write("melody.wav", &melody(8, 4))).unwrap();
    let settings = AdaptSettings { calibrate: true, ..settings(16, 2) };
    let mut tried = Vec::new();
    let (model, adaptation) = adapt(&untrained(), &[sound], &settings, &mut |event| {
        if let AdaptEvent::Calibration(setting) = event {
            tried.push(setting);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(adaptation.wave.verdict, Verdict::Adapted, "{adaptation:?}");
    // The level is that of the model's own plans, the rest is nearest to the recordings, each at its own level.
    let (own, theirs): (Vec<&Tried>, Vec<&Tried>) = tried.iter().partition(|t| t.plan == Follow::Own);
    assert_eq!(own.iter().map(|t| t.settings).collect::<Vec<_>>(), [model.generation]);
    let at = |settings| GenerationSettings { level_db: 0.0, ..settings };
    let chosen = theirs.iter().find(|t| at(t.settings) == at(model.generation)).unwrap();
    let grains = theirs
        .iter()
        .filter(|t| at(t.settings) == GenerationSettings { grain: t.settings.grain, ..at(chosen.settings) });
    assert!(grains.clone().count() > 5 && grains.clone().all(|t| t.error_db() >= chosen.error_db()), "{tried:?}");
}
