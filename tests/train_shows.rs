//! What training tells before, while and after it runs: what it will take, pictures, and the settings that a model plays best
//! with. With the smallest model.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use tempfile::TempDir;
use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::model::config::{GenerationSettings, ModelConfig};

struct Scene {
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { directory: tempfile::tempdir().unwrap() };
        for (name, seconds) in [("a.wav", 6), ("b.wav", 7), ("c.wav", 8)] {
            scene.write(name, seconds * 16_000, seconds);
        }
        scene
    }

    /// So many tones in turn.
    fn write(&self, name: &str, n_samples: usize, n_tones: usize) {
        let spec = hound::WavSpec {
            channels: 1,
            sample_rate: 16_000,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        let mut writer = hound::WavWriter::create(self.path(name), spec).unwrap();
        for i in 0..n_samples {
            let hz = 200.0 + 50.0 * (i / 4000 % n_tones) as f32;
            let x = 0.2 * (std::f32::consts::TAU * hz * i as f32 / 16_000.0).sin();
            writer.write_sample((x * 32767.0) as i16).unwrap();
        }
        writer.finalize().unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn wavegen(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wavegen"));
        command.current_dir(self.directory.path()).args(args);
        command
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        let run = self.wavegen(args).args(["--json", "--quiet"]).assert().success();
        serde_json::from_slice(&run.get_output().stdout).unwrap()
    }
}

/// Width, height and number of colours.
fn picture(path: &Path) -> (u32, u32, usize) {
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut dots = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut dots).unwrap();
    let colors: HashSet<&[u8]> = dots.chunks_exact(3).collect();
    (info.width, info.height, colors.len())
}

const TINY: [&str; 3] = ["--preset", "tiny", "--no-calibration"];

#[test]
fn a_dry_run_predicts_the_memory_that_training_takes_and_leaves_nothing_behind() {
    let scene = Scene::new();
    let before = std::fs::read_dir(scene.directory.path()).unwrap().count();
    let run = |more: &[&str]| scene.json(&[&["train", ".", "--steps", "40"], &TINY[..], more].concat());
    let dry = run(&["--dry-run"]);
    assert_eq!(std::fs::read_dir(scene.directory.path()).unwrap().count(), before);
    let model = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 0).unwrap();
    assert_eq!(dry["parameters"], model.n_weights(""));
    let sum = |name: &str| dry[name].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).sum::<f64>();
    let wave = model.config.wave_transformer.multiply_adds_per_sample();
    assert!((sum("tier_multiply_adds_per_sample") - wave).abs() < 1e-6);
    let parts = sum("tier_parameters") + dry["shared_parameters"].as_f64().unwrap();
    assert_eq!(parts as usize, model.n_weights("wave."));
    assert_eq!((&dry["times"]["plan"]["steps"], &dry["times"]["wave"]["steps"]), (&40.into(), &40.into()));
    assert!((dry["hours"].as_f64().unwrap() - 21.0 / 3600.0).abs() < 1e-4, "{dry}");
    // What is beside the recordings is neither looked at alone nor taken for music.
    (0..40).for_each(|i| std::fs::write(scene.path(&format!("{i}.mid")), [i]).unwrap());
    let dry = run(&["--dry-run"]);
    assert!(dry["files"] == 43 && (dry["hours"].as_f64().unwrap() - 21.0 / 3600.0).abs() < 1e-4, "{dry}");
    if cfg!(target_os = "linux") {
        let real = run(&["-o", "m.safetensors"]);
        let bytes = |report: &serde_json::Value, name: &str| report[name].as_f64().unwrap();
        let ratio = bytes(&dry, "memory_bytes") / bytes(&real, "peak_memory_bytes");
        assert!((0.8..1.2).contains(&ratio), "predicted {ratio} of what it took");
    }
}

#[test]
fn losses_and_a_free_run_are_drawn_at_each_evaluation() {
    let scene = Scene::new();
    let args = ["train", ".", "-o", "m.safetensors", "--steps", "6", "--validate-every", "2", "--log", "log.jsonl"];
    scene.wavegen(&[&args[..], &TINY].concat()).assert().success().stderr(
        contains("without averaging").and(contains("dB from the recording's plan")).and(contains("most memory in use")),
    );
    let (width, height, colors) = picture(&scene.path("m.loss.png"));
    assert!(width > 900 && height > 600 && colors >= 5, "{width} x {height}, {colors} colours");
    let (width, height, colors) = picture(&scene.path("m.sample.png"));
    assert!(width > 900 && height > 900 && colors > 200, "{width} x {height}, {colors} colours");
    let log = std::fs::read_to_string(scene.path("log.jsonl")).unwrap();
    let events: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let count = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!((count("validation"), count("free_run")), (6, 6));
    let last = events.iter().rfind(|event| event["event"] == "step").unwrap();
    assert!((last["hours"].as_f64().unwrap() - last["units"].as_f64().unwrap() / 16_000.0 / 3600.0).abs() < 1e-12);
    let args = ["train", ".", "-o", "n.safetensors", "--steps", "1", "--no-pictures"];
    scene.wavegen(&[&args[..], &TINY].concat()).assert().success();
    assert!(!scene.path("n.loss.png").exists());
}

#[test]
fn calibration_prints_what_it_tries_and_writes_what_was_best() {
    let scene = Scene::new();
    let mut model = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap();
    model.generation = GenerationSettings { grain: 0.33, past: 0.2, offset: 0.4, level_db: 0.0 };
    model.save(&scene.path("tiny.safetensors"), Precision::F32).unwrap();
    let report = scene.json(&["calibrate", "tiny.safetensors", "a.wav", "--excerpts", "2", "-o", "best.safetensors"]);
    let tried = report["tried"].as_array().unwrap();
    let error = |t: &serde_json::Value| {
        let off = [&t["recordings"]["distance_db"], &t["recordings"]["tonality_db"], &t["bias_db"]];
        off.map(|x| x.as_f64().unwrap()).into_iter().fold(0.0, f64::hypot)
    };
    let by = |plan: &'static str| tried.iter().filter(move |t| t["plan"] == plan);
    assert!(tried.len() >= 12 && (tried[0]["grain"].as_f64().unwrap() - 0.33).abs() < 1e-6, "{tried:?}");
    let best = by("recording").min_by(|a, b| error(a).total_cmp(&error(b))).unwrap();
    let written = Checkpoint::load(&scene.path("best.safetensors")).unwrap();
    let chosen: GenerationSettings = serde_json::from_value(report["best"].clone()).unwrap();
    assert_eq!((written.generation, &report["best"]["grain"]), (chosen, &best["grain"]));
    // The level is that of the model's own plans.
    let level = by("own").next().unwrap();
    assert_eq!((&level["level_db"], &level["recordings"]), (&report["best"]["level_db"], &serde_json::Value::Null));
    assert_eq!(written.weights, model.weights);
    // As a table, from a corpus, the same.
    scene.wavegen(&["prepare", "a.wav", "-o", "corpus"]).assert().success();
    let table = scene.wavegen(&["calibrate", "tiny.safetensors", "corpus", "--excerpts", "2"]).assert().success();
    let table = String::from_utf8(table.get_output().stdout.clone()).unwrap();
    assert_eq!(table.lines().count(), tried.len() + 1, "{table}");
    let marked = table.lines().find(|line| line.ends_with("best")).unwrap();
    assert!(
        marked.contains(" own ") && marked.contains(&format!("{:+.2} dB", level["bias_db"].as_f64().unwrap())),
        "{table}"
    );
    scene.wavegen(&["calibrate", "tiny.safetensors", "a.wav", "-o", "best.safetensors"]).assert().code(1);
    scene
        .wavegen(&["calibrate", "tiny.safetensors", "tiny.safetensors"])
        .assert()
        .code(1)
        .stderr(contains("no usable"));
    // Long enough to train on, too short to play.
    scene.write("short.wav", 34_000, 1);
    scene
        .wavegen(&["calibrate", "tiny.safetensors", "short.wav"])
        .assert()
        .code(1)
        .stderr(contains("none of 1 pieces"));
}

#[test]
fn the_figures_that_are_reported_are_those_of_the_model_that_is_kept() {
    let scene = Scene::new();
    let args = ["train", ".", "-o", "m.safetensors", "--steps", "6", "--validate-every", "1", "--log", "log.jsonl"];
    let fast = ["--plan-learning-rate", "0.9", "--wave-learning-rate", "0.9", "--no-pictures"];
    let report = scene.json(&[&args[..], &fast, &TINY].concat());
    let log = std::fs::read_to_string(scene.path("log.jsonl")).unwrap();
    let events: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (part, figure) in [("plan", "plan_bits_per_frame"), ("wave", "wave_bits_per_sample")] {
        let judged = events.iter().filter(|event| event["event"] == "validation" && event["part"] == part);
        let bits: Vec<f64> = judged.map(|event| event["bits"].as_f64().unwrap()).collect();
        let least = bits.iter().copied().fold(f64::INFINITY, f64::min);
        assert!((part == "plan" || bits[5] > least) && report[figure] == least, "{bits:?} {report}");
    }
}

#[test]
fn free_runs_are_drawn_beside_the_truth_and_noise() {
    let scene = Scene::new();
    let model = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap();
    model.save(&scene.path("tiny.safetensors"), Precision::F32).unwrap();
    let args =
        ["eval", "c.wav", "--model", "tiny.safetensors", "--free-run", "--prompts", "2", "--prompt-seconds", "1"];
    scene.wavegen(&[&args[..], &["--seconds", "1", "--spectrograms", "pictures"]].concat()).assert().success();
    for name in ["pictures/000.png", "pictures/001.png"] {
        let (width, height, colors) = picture(&scene.path(name));
        assert!(width > 400 && height > 900 && colors > 200, "{width} x {height}, {colors} colours");
    }
}
