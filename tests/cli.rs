//! The program from outside: exit codes, streams, files written whole or not at all. With the smallest model, untrained.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use tempfile::TempDir;
use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::model::config::ModelConfig;

const PROGRAM: &str = env!("CARGO_BIN_EXE_wavegen");
const RATE: u32 = 16_000;

/// A directory with a model and a short stereo recording.
struct Scene {
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { directory: tempfile::tempdir().unwrap() };
        let config = ModelConfig::preset("tiny").unwrap();
        Checkpoint::untrained(config, 1).unwrap().save(&scene.path("tiny.safetensors"), Precision::F32).unwrap();
        scene.write_wav("in.wav", 2, &scene.chord(2 * 3200));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn chord(&self, n_samples: usize) -> Vec<f32> {
        (0..n_samples).map(|i| 0.2 * (i as f32 * 0.05).sin() + 0.1 * (i as f32 * 0.11).cos()).collect()
    }

    fn write_wav(&self, name: &str, channels: u16, samples: &[f32]) {
        self.write_wav_at(name, RATE, channels, samples);
    }

    fn write_wav_at(&self, name: &str, sample_rate: u32, channels: u16, samples: &[f32]) {
        let spec =
            hound::WavSpec { channels, sample_rate, bits_per_sample: 32, sample_format: hound::SampleFormat::Float };
        let mut writer = hound::WavWriter::create(self.path(name), spec).unwrap();
        samples.iter().for_each(|&x| writer.write_sample(x).unwrap());
        writer.finalize().unwrap();
    }

    /// `wavegen COMMAND ARGS...` in the directory.
    fn wavegen(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.current_dir(self.directory.path()).args(args);
        command
    }

    /// `wavegen continue ARGS... --model tiny --seconds 0.1`.
    fn play_on(&self, args: &[&str]) -> Command {
        let mut command = self.wavegen(&["continue", "--model", "tiny.safetensors", "--seconds", "0.1"]);
        command.args(args);
        command
    }

    /// The files that are there, without the model.
    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "tiny.safetensors");
        names.sort();
        names
    }

    /// Fails with `code` and one line on stderr that says `what`; writes nothing.
    fn refuses(&self, mut command: Command, code: i32, what: &str) {
        let before = self.files();
        let output = command.assert().code(code).stdout("").stderr(contains(what)).get_output().clone();
        let stderr = String::from_utf8(output.stderr).unwrap();
        if code == 1 {
            assert_eq!(stderr.lines().filter(|line| !line.starts_with("warning:")).count(), 1, "{stderr}");
        }
        assert!(stderr.lines().any(|line| line.starts_with("error: ")), "{stderr}");
        assert_eq!(self.files(), before, "something was left behind");
    }
}

fn wav_data(path: &Path) -> (hound::WavSpec, Vec<f32>) {
    let mut reader = hound::WavReader::open(path).unwrap();
    (reader.spec(), reader.samples::<f32>().map(Result::unwrap).collect())
}

#[test]
fn continue_writes_the_prompt_unchanged_and_then_more() {
    let scene = Scene::new();
    scene
        .play_on(&["in.wav", "--verbose"])
        .assert()
        .success()
        .stdout("")
        .stderr(contains("in.continued.wav").and(contains("join:")));
    let (spec, samples) = wav_data(&scene.path("in.continued.wav"));
    let (own_spec, prompt) = wav_data(&scene.path("in.wav"));
    assert_eq!((spec.channels, spec.sample_rate), (own_spec.channels, own_spec.sample_rate));
    assert_eq!(samples.len(), prompt.len() + 2 * 1600);
    assert_eq!(samples[..prompt.len()], prompt);
    assert_eq!(scene.files(), ["in.continued.wav", "in.wav"]);
}

#[test]
fn from_a_moment_is_what_a_recording_that_ends_there_gives() {
    let scene = Scene::new();
    let (_, samples) = wav_data(&scene.path("in.wav"));
    scene.write_wav("cut.wav", 2, &samples[..samples.len() / 2]);
    scene.play_on(&["in.wav", "--from", "0:00.1", "-o", "a.wav"]).assert().success();
    scene.play_on(&["cut.wav", "-o", "b.wav"]).assert().success();
    let [a, b] = ["a.wav", "b.wav"].map(|name| wav_data(&scene.path(name)));
    assert!(a == b && a.1.len() == samples.len() / 2 + 2 * 1600);
    scene.refuses(scene.play_on(&["in.wav", "--from", "3", "-o", "c.wav"]), 1, "in.wav: is 0.20 s long");
    scene.refuses(scene.play_on(&["in.wav", "--from", "1:75", "-o", "c.wav"]), 2, "such as 90 or 1:30");
}

#[test]
fn who_plays_on_from_the_end_of_a_fade_hears_of_it() {
    let scene = Scene::new();
    let mut samples = scene.chord(2 * 5 * RATE as usize);
    samples.iter_mut().skip(2 * 2 * RATE as usize).for_each(|x| *x *= 1e-3);
    scene.write_wav("faded.wav", 2, &samples);
    let softer = contains("faded.wav: its last 2 s are").and(contains("--from"));
    scene.play_on(&["faded.wav", "-o", "a.wav"]).assert().success().stderr(softer);
    for args in [&["faded.wav", "--from", "1.5", "-o", "b.wav"][..], &["in.wav", "-o", "c.wav"]] {
        scene.play_on(args).assert().success().stderr(contains("softer").not());
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let scene = Scene::new();
    for (seed, output) in [("7", "a.wav"), ("7", "b.wav"), ("8", "c.wav")] {
        let session = format!("{output}.bin");
        scene.play_on(&["in.wav", "--seed", seed, "-o", output, "--save-session", &session]).assert().success();
    }
    let read = |name: &str| std::fs::read(scene.path(name)).unwrap();
    let [a, b, c] = ["a.wav", "b.wav", "c.wav"].map(read);
    assert!(a == b, "the same seed gave other bytes");
    assert!(read("a.wav.bin") == read("b.wav.bin"), "the same seed gave another session");
    assert!(a != c, "another seed gave the same bytes");
}

#[test]
fn pipes_carry_audio_only_and_messages_go_to_stderr() {
    let scene = Scene::new();
    let prompt = std::fs::read(scene.path("in.wav")).unwrap();
    let output = scene.play_on(&["-"]).write_stdin(prompt).assert().success().get_output().clone();
    assert_eq!(&output.stdout[..4], b"RIFF");
    assert!(String::from_utf8(output.stderr).unwrap().contains("standard output: 0.20 s of prompt + 0.10 s played"));
    scene.play_on(&["in.wav", "-o", "file.wav"]).assert().success();
    let file = std::fs::read(scene.path("file.wav")).unwrap();
    let data_bytes = 2 * 4 * (3200 + 1600);
    assert!(output.stdout.ends_with(&file[file.len() - data_bytes..]), "the pipe's audio is not the file's");
}

#[test]
fn json_goes_to_stdout_and_to_stderr_beside_audio() {
    let scene = Scene::new();
    let output = scene.play_on(&["in.wav", "--json", "-q"]).assert().success().stderr("").get_output().clone();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["channels"], 2);
    assert!(report["seam"]["jump"].is_number(), "{report}");
    let output = scene.play_on(&["in.wav", "--json", "-q", "-o", "-"]).assert().success().get_output().clone();
    assert!(serde_json::from_slice::<serde_json::Value>(&output.stderr).is_ok());
}

#[test]
fn existing_output_is_kept_unless_forced() {
    let scene = Scene::new();
    std::fs::write(scene.path("in.continued.wav"), "precious").unwrap();
    scene.refuses(scene.play_on(&["in.wav"]), 1, "--force");
    assert_eq!(std::fs::read(scene.path("in.continued.wav")).unwrap(), b"precious");
    scene.play_on(&["in.wav", "--force"]).assert().success();
    assert_eq!(wav_data(&scene.path("in.continued.wav")).1.len(), 2 * 4800);
}

#[test]
fn bad_audio_is_refused_by_name() {
    let scene = Scene::new();
    std::fs::write(scene.path("text.wav"), "this is no audio at all, whatever its name").unwrap();
    std::fs::write(scene.path("empty.wav"), "").unwrap();
    std::fs::create_dir(scene.path("folder")).unwrap();
    scene.write_wav("zero.wav", 1, &[]);
    scene.write_wav("nan.wav", 1, &[0.1, f32::NAN, 0.1]);
    for name in ["text.wav", "empty.wav", "folder", "zero.wav", "nan.wav", "missing.wav"] {
        scene.refuses(scene.play_on(&[name, "-o", "out.wav"]), 1, name);
    }
    scene.refuses(scene.wavegen(&["info", "text.wav"]), 1, "text.wav");
}

#[test]
fn a_truncated_recording_is_played_on_with_a_warning() {
    let scene = Scene::new();
    let bytes = std::fs::read(scene.path("in.wav")).unwrap();
    std::fs::write(scene.path("cut.wav"), &bytes[..bytes.len() / 2]).unwrap();
    scene.play_on(&["cut.wav"]).assert().success().stderr(contains("warning: cut.wav"));
}

#[test]
fn bad_models_are_refused_by_name() {
    let scene = Scene::new();
    std::fs::write(scene.path("text.safetensors"), "no model").unwrap();
    let whole = std::fs::read(scene.path("tiny.safetensors")).unwrap();
    std::fs::write(scene.path("cut.safetensors"), &whole[..whole.len() / 2]).unwrap();
    // A part of a model.
    std::fs::write(scene.path("part.safetensors"), include_bytes!("../models/small.safetensors")).unwrap();
    for name in ["text.safetensors", "cut.safetensors", "missing.safetensors", "part.safetensors"] {
        let command = scene.wavegen(&["continue", "in.wav", "--model", name]);
        scene.refuses(command, 1, name);
        scene.refuses(scene.wavegen(&["info", name]), 1, name);
    }
}

#[test]
fn absurd_arguments_are_usage_errors() {
    let scene = Scene::new();
    for seconds in ["0", "-1", "nan", "inf", "100000", "ten"] {
        let why = format!("invalid value '{seconds}' for '--seconds");
        scene.refuses(scene.wavegen(&["continue", "in.wav", "--seconds", seconds]), 2, &why);
    }
    for args in [
        &["continue"][..],
        &["continue", "in.wav", "--format", "mp3"],
        &["continue", "in.wav", "--top-p", "2"],
        &["continue", "in.wav", "--no-such-flag"],
        &["eval"],
        &["train", "in.wav", "-o", "x.safetensors"],
        &["no-such-command"],
    ] {
        scene.refuses(scene.wavegen(args), 2, "--help");
    }
    scene.refuses(scene.play_on(&["in.wav", "--format", "i16"]), 2, "--format");
    scene.refuses(
        scene.wavegen(&["train", "in.wav", "-o", "x.safetensors", "--preset", "huge", "--steps", "1"]),
        2,
        "huge",
    );
}

#[test]
fn unwritable_output_is_refused_before_anything_is_read() {
    let scene = Scene::new();
    scene.refuses(scene.play_on(&["in.wav", "-o", "no/such/folder/out.wav"]), 1, "no/such/folder");
    std::fs::create_dir(scene.path("folder")).unwrap();
    scene.refuses(scene.play_on(&["in.wav", "-o", "folder"]), 1, "folder");
}

#[test]
fn silence_is_refused() {
    let scene = Scene::new();
    scene.write_wav("silence.wav", 1, &[0.0; 800]);
    scene.refuses(scene.play_on(&["silence.wav"]), 1, "silence.wav: the last 0.1 s are silent");
}

#[test]
fn a_name_that_promises_another_format_is_refused() {
    let scene = Scene::new();
    scene.refuses(scene.play_on(&["in.wav", "-o", "out.MP3"]), 1, "out.MP3: audio is written as WAV, not as mp3");
}

#[test]
fn what_is_constant_goes_on_and_no_model_hears_it() {
    let scene = Scene::new();
    let chord = scene.chord(2 * RATE as usize);
    scene.write_wav("offset.wav", 1, &chord.iter().map(|x| x + 0.25).collect::<Vec<_>>());
    let mean = |samples: &[f32]| samples.iter().sum::<f32>() / samples.len() as f32;
    scene.write_wav("none.wav", 1, &chord.iter().map(|x| x - mean(&chord)).collect::<Vec<_>>());
    let played = |name: &str| {
        scene.play_on(&[name, "-o", "out.wav", "--force"]).assert().success();
        wav_data(&scene.path("out.wav")).1[chord.len()..].to_vec()
    };
    let (offset, none) = (played("offset.wav"), played("none.wav"));
    let apart = offset.iter().zip(&none).map(|(x, y)| x - y).collect::<Vec<_>>();
    assert!((mean(&apart) - 0.25).abs() < 0.01, "{}", mean(&apart));
    assert!(offset.iter().any(|x| (x - offset[0]).abs() > 0.01), "nothing plays");
}

#[cfg(unix)]
#[test]
fn what_a_link_leads_to_is_written_and_a_device_is_no_place_for_a_file() {
    let scene = Scene::new();
    std::fs::create_dir(scene.path("far")).unwrap();
    std::os::unix::fs::symlink("far/out.wav", scene.path("link.wav")).unwrap();
    scene.play_on(&["in.wav", "-o", "link.wav"]).assert().success();
    assert!(scene.path("link.wav").is_symlink() && scene.path("far/out.wav").is_file());
    let mut tokenize = scene.wavegen(&["tokenize", "in.wav", "-m", "tiny.safetensors", "-o", "/dev/null", "--force"]);
    tokenize.assert().code(1).stderr(contains("/dev/null: cannot be written (it is no file)"));
}

#[test]
fn the_shortest_prompts_are_played_on() {
    let scene = Scene::new();
    for n in [1, 100, 513] {
        scene.write_wav("short.wav", 1, &scene.chord(n));
        scene.play_on(&["short.wav", "--force"]).assert().success();
        assert_eq!(wav_data(&scene.path("short.continued.wav")).1.len(), n + 1600, "prompt of {n}");
    }
}

#[test]
fn generate_plays_from_nothing() {
    let scene = Scene::new();
    let args = ["generate", "--model", "tiny.safetensors", "--seconds", "0.1", "--format", "f32"];
    scene.wavegen(&args).assert().success().stdout("");
    assert_eq!(wav_data(&scene.path("generated.wav")).1.len(), 1600);
    scene.refuses(scene.wavegen(&args), 1, "--force");
}

#[test]
fn a_session_is_played_on_as_if_there_had_been_no_pause() {
    let scene = Scene::new();
    let play = |args: &[&str]| scene.play_on(args).assert().success().get_output().clone();
    // At the model's rate, and stereo at another one.
    for rate in [RATE, 44_100] {
        scene.write_wav_at("in.wav", rate, 2, &scene.chord(2 * 3200));
        let whole = ["continue", "in.wav", "--model", "tiny.safetensors", "--seconds", "0.2", "-o", "whole.wav"];
        scene.wavegen(&whole).args(["--seed", "5", "--temperature", "0.9"]).assert().success();
        play(&["in.wav", "-o", "a.wav", "--seed", "5", "--temperature", "0.9", "--save-session", "s.bin"]);
        // The session beside what it wrote gives the whole; alone, what is new. The prompt is not needed.
        std::fs::remove_file(scene.path("in.wav")).unwrap();
        play(&["a.wav", "--resume", "s.bin", "-o", "b.wav"]);
        play(&["--resume", "s.bin", "-o", "rest.wav"]);
        let bytes = |name: &str| std::fs::read(scene.path(name)).unwrap();
        assert!(bytes("whole.wav") == bytes("b.wav"), "{rate} Hz: the parts are not the whole");
        let (spec, whole) = wav_data(&scene.path("whole.wav"));
        let (rest_spec, rest) = wav_data(&scene.path("rest.wav"));
        assert_eq!((rest_spec.sample_rate, rest_spec.channels), (spec.sample_rate, spec.channels));
        assert_eq!(rest, whole[whole.len() - rest.len()..], "{rate} Hz");
        assert_eq!(rest.len(), 2 * rate as usize / 10);
        // Another seed from the same place; the default name lies beside the session.
        play(&["--resume", "s.bin", "--seed", "6"]);
        assert_ne!(wav_data(&scene.path("s.continued.wav")).1, rest);
        for name in ["whole.wav", "a.wav", "b.wav", "rest.wav", "s.bin", "s.continued.wav"] {
            std::fs::remove_file(scene.path(name)).unwrap();
        }
    }
}

#[test]
fn generated_music_is_played_on_from_its_session() {
    let scene = Scene::new();
    let generate = |args: &[&str]| {
        let mut command = scene.wavegen(&["generate", "--model", "tiny.safetensors"]);
        command.args(args).assert().success();
    };
    generate(&["--seconds", "0.2", "-o", "whole.wav"]);
    generate(&["--seconds", "0.1", "-o", "a.wav", "--save-session", "s.bin"]);
    scene
        .play_on(&["a.wav", "--resume", "s.bin", "-o", "b.wav"])
        .assert()
        .success()
        .stderr(contains("0.10 s of prompt"));
    assert!(std::fs::read(scene.path("whole.wav")).unwrap() == std::fs::read(scene.path("b.wav")).unwrap());
}

#[test]
fn sessions_that_do_not_fit_are_refused() {
    let scene = Scene::new();
    scene
        .play_on(&["in.wav", "--save-session", "s.bin"])
        .assert()
        .success()
        .stderr(contains("--resume s.bin --model tiny.safetensors"));
    let config = ModelConfig::preset("tiny").unwrap();
    Checkpoint::untrained(config, 2).unwrap().save(&scene.path("other.safetensors"), Precision::F32).unwrap();
    let other = ["continue", "--resume", "s.bin", "--model", "other.safetensors"];
    scene.refuses(scene.wavegen(&other), 1, "s.bin: saved with model 'tiny'");
    let whole = std::fs::read(scene.path("s.bin")).unwrap();
    std::fs::write(scene.path("cut.bin"), &whole[..whole.len() - 9]).unwrap();
    scene.refuses(scene.play_on(&["--resume", "cut.bin"]), 1, "cut.bin");
    let mut bent = whole.clone();
    bent[whole.len() - 9] ^= 4;
    std::fs::write(scene.path("bent.bin"), bent).unwrap();
    scene.refuses(scene.play_on(&["--resume", "bent.bin"]), 1, "bent.bin: damaged");
    for name in ["tiny.safetensors", "in.wav", "missing.bin"] {
        scene.refuses(scene.play_on(&["--resume", name, "-o", "out.wav"]), 1, name);
    }
    // Not the WAV that the session ended with.
    scene.refuses(scene.play_on(&["in.wav", "--resume", "s.bin", "-o", "out.wav"]), 1, "in.wav: not the WAV");
    scene.refuses(scene.play_on(&["--resume", "s.bin", "--format", "i16"]), 2, "--format");
    scene.refuses(scene.play_on(&["in.wav", "-o", "out.wav", "--save-session", "s.bin"]), 1, "s.bin: already exists");
    scene.refuses(scene.play_on(&["in.wav", "-o", "out.wav", "--save-session", "no/s.bin"]), 1, "no/s.bin");
    std::fs::create_dir(scene.path("sub")).unwrap();
    for same in ["./out.wav", "sub/../out.wav"] {
        let both = format!("{same}: cannot be both the audio and the session");
        scene.refuses(scene.play_on(&["in.wav", "-o", "out.wav", "--save-session", same]), 2, &both);
    }
}

#[test]
fn takes_are_the_streams_of_a_seed() {
    let scene = Scene::new();
    let args = ["in.wav", "--takes", "3", "--seed", "4", "--save-session", "s.bin"];
    scene.play_on(&args).assert().success().stderr(contains("in.continued.3.wav"));
    let names: Vec<String> = (1..=3).map(|i| format!("in.continued.{i}.wav")).collect();
    assert_eq!(scene.files(), [&names[..], &["in.wav", "s.1.bin", "s.2.bin", "s.3.bin"].map(String::from)].concat());
    for (stream, name) in ["0", "1", "2"].into_iter().zip(&names) {
        scene.play_on(&["in.wav", "--seed", "4", "--stream", stream, "--force", "-o", "one.wav"]).assert().success();
        assert!(std::fs::read(scene.path("one.wav")).unwrap() == std::fs::read(scene.path(name)).unwrap(), "{name}");
    }
    // Takes of a session, and their sessions.
    scene.play_on(&["--resume", "s.2.bin", "--takes", "2", "-o", "t.wav", "--force"]).assert().success();
    scene.play_on(&["--resume", "s.2.bin", "-o", "one.wav", "--force"]).assert().success();
    assert!(std::fs::read(scene.path("one.wav")).unwrap() == std::fs::read(scene.path("t.1.wav")).unwrap());
    assert!(std::fs::read(scene.path("t.2.wav")).unwrap() != std::fs::read(scene.path("t.1.wav")).unwrap());
    let output =
        scene.play_on(&["in.wav", "--takes", "2", "--json", "-q", "--force"]).assert().success().get_output().clone();
    let reports: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((reports[0]["stream"].as_u64(), reports[1]["stream"].as_u64()), (Some(0), Some(1)), "{reports}");
    scene.refuses(scene.play_on(&["in.wav", "--takes", "2", "-o", "-"]), 2, "files");
    scene.refuses(scene.play_on(&["in.wav", "--takes", "0"]), 2, "--takes");
    scene.refuses(scene.play_on(&["in.wav", "--takes", "3"]), 1, "in.continued.1.wav");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let scene = Scene::new();
    for engine in ["cpu", "cpu-f32", "reference"] {
        for (threads, output) in [("1", "a.wav"), ("3", "b.wav")] {
            let args = ["in.wav", "--engine", engine, "--threads", threads, "--force", "-o", output];
            scene.play_on(&args).assert().success();
        }
        assert!(std::fs::read(scene.path("a.wav")).unwrap() == std::fs::read(scene.path("b.wav")).unwrap(), "{engine}");
    }
}

#[test]
fn every_instruction_set_gives_the_same_bytes_and_unknown_ones_are_refused() {
    let scene = Scene::new();
    scene.play_on(&["in.wav", "-o", "default.wav"]).assert().success();
    for isa in wavegen::simd::Isa::available() {
        let mut command = scene.play_on(&["in.wav", "--force", "-o", "isa.wav"]);
        command.env("WAVEGEN_ISA", isa.name()).assert().success();
        let same = std::fs::read(scene.path("isa.wav")).unwrap() == std::fs::read(scene.path("default.wav")).unwrap();
        assert!(same, "{isa:?}");
    }
    let mut command = scene.play_on(&["in.wav", "-o", "mmx.wav"]);
    command.env("WAVEGEN_ISA", "mmx");
    scene.refuses(command, 2, "mmx");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn training_on_a_gpu_wants_a_program_that_was_built_for_it() {
    let scene = Scene::new();
    let args = ["train", "in.wav", "-o", "x.safetensors", "--steps", "1", "--device", "cuda"];
    scene.refuses(scene.wavegen(&args), 2, "--device cuda: this program was built without the feature `cuda`");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_a_gpu_the_cpu_plays_and_says_so() {
    let scene = Scene::new();
    scene
        .play_on(&["in.wav", "--engine", "cuda", "-o", "a.wav"])
        .assert()
        .success()
        .stderr(contains("playing on the CPU"));
    scene.play_on(&["in.wav", "--engine", "cpu", "-o", "b.wav"]).assert().success();
    assert!(std::fs::read(scene.path("a.wav")).unwrap() == std::fs::read(scene.path("b.wav")).unwrap());
    let mut required = scene.play_on(&["in.wav", "--engine", "cuda", "-o", "c.wav"]);
    required.env("WAVEGEN_REQUIRE_CUDA", "1").assert().failure().stderr(contains("feature `cuda`"));
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_bench_without_a_gpu_says_so() {
    let scene = Scene::new();
    let (decode, train) = (["bench", "decode", "--engine", "cuda"], ["bench", "train", "--device", "cuda"]);
    for args in [&["bench", "kernels"][..], &decode, &train] {
        scene.wavegen(args).assert().success().stderr(contains("nothing measured"));
        scene.wavegen(args).arg("--json").assert().success().stdout(contains("\"measured\": false"));
        scene.wavegen(args).env("WAVEGEN_REQUIRE_CUDA", "1").assert().failure();
    }
}

#[test]
fn a_session_may_change_engines() {
    let scene = Scene::new();
    for (from, to) in [("reference", "cpu-f32"), ("cpu-f32", "reference"), ("cpu", "reference"), ("reference", "cpu")] {
        let save = ["in.wav", "--engine", from, "--force", "-o", "a.wav", "--save-session", "s.bin"];
        scene.play_on(&save).assert().success();
        scene.play_on(&["a.wav", "--engine", to, "--resume", "s.bin", "--force", "-o", "b.wav"]).assert().success();
        assert_eq!(wav_data(&scene.path("b.wav")).1.len(), 2 * (3200 + 2 * 1600), "{from} to {to}");
    }
}

#[test]
fn tokens_go_to_a_file_and_come_back_as_audio() {
    let scene = Scene::new();
    let model = ["--model", "tiny.safetensors"];
    scene.wavegen(&["tokenize", "in.wav"]).args(model).assert().success().stdout("");
    scene.wavegen(&["detokenize", "in.tokens.safetensors", "-o", "back.wav", "--format", "f32"]).assert().success();
    let (_, back) = wav_data(&scene.path("back.wav"));
    let (_, samples) = wav_data(&scene.path("in.wav"));
    assert_eq!(back.len(), samples.len() / 2);
    for (i, (x, frame)) in back.iter().zip(samples.chunks_exact(2)).enumerate() {
        let mono = 0.5 * (frame[0] + frame[1]);
        assert!((x - mono).abs() < 0.03, "sample {i}: {x} for {mono}");
    }
    scene.refuses(scene.wavegen(&["tokenize", "in.wav"]), 1, "--force");
    scene.refuses(scene.wavegen(&["detokenize", "in.wav", "-o", "no.wav"]), 1, "in.wav");
}

#[test]
fn info_describes_audio_and_models() {
    let scene = Scene::new();
    scene.wavegen(&["info", "in.wav"]).assert().success().stdout(contains("16000 Hz, 2 channels, 0.200 s"));
    scene.wavegen(&["info", "small"]).assert().success().stdout(contains("small"));
    scene
        .wavegen(&["info", "tiny.safetensors"])
        .assert()
        .success()
        .stdout(contains("tiny").and(contains("parameters")));
    let output = scene.wavegen(&["info", "tiny.safetensors", "--json"]).assert().success().get_output().clone();
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(info["parameters"].as_u64().unwrap() > 10_000, "{info}");
}

#[test]
fn eval_prints_bits_and_baselines_as_text_and_json() {
    let scene = Scene::new();
    let args = ["eval", "in.wav", "--model", "tiny.safetensors", "--baselines"];
    scene.wavegen(&args).assert().success().stdout(contains("bits per sample").and(contains("order-0 tokens")));
    let output = scene.wavegen(&args).arg("--json").assert().success().get_output().clone();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |name: &str| report["total"][name].as_f64().unwrap();
    assert!((number("wave_bits") + number("plan_bits") - number("total_bits")).abs() < 1e-9, "{report}");
    scene.write_wav("silence.wav", 1, &[0.0; 4000]);
    scene.refuses(scene.wavegen(&["eval", "silence.wav", "--model", "tiny.safetensors"]), 1, "silence.wav");
}

#[test]
fn a_free_run_is_set_beside_noise_and_the_truth() {
    let scene = Scene::new();
    let times = ["--prompts", "2", "--prompt-seconds", "0.06", "--seconds", "0.06"];
    for plan in ["own", "true", "quantized"] {
        let mut command = scene.wavegen(&["eval", "in.wav", "--model", "tiny.safetensors", "--free-run", "--json"]);
        let output = command.args(times).args(["--plan", plan]).assert().success().get_output().clone();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let run = &report["free_run"];
        assert_eq!(run["continuations"].as_array().unwrap().len(), 2, "{plan}: {run}");
        let truth = run["truth"]["adherence_db"].as_f64().unwrap();
        assert!(plan == "quantized" || truth < 1e-3, "{plan}: {run}");
    }
    scene.refuses(scene.wavegen(&["eval", "in.wav", "--model", "tiny.safetensors", "--free-run"]), 1, "--seconds");
}

#[test]
fn help_shows_examples() {
    for command in ["continue", "generate", "train", "eval", "tokenize", "detokenize", "info"] {
        Command::new(PROGRAM).args([command, "--help"]).assert().success().stdout(contains("Examples:"));
    }
    Command::new(PROGRAM).assert().code(2);
}

#[cfg(unix)]
#[test]
fn an_interrupt_among_takes_leaves_whole_files_only() {
    let scene = Scene::new();
    let mut child = Process::new(PROGRAM)
        .current_dir(scene.directory.path())
        .args([
            "continue",
            "in.wav",
            "--model",
            "tiny.safetensors",
            "--seconds",
            "3600",
            "--takes",
            "3",
            "-o",
            "out.wav",
        ])
        .args(["--save-session", "s.bin"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for_output(&scene);
    Process::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(scene.files(), ["in.wav", "out.1.wav", "out.2.wav", "out.3.wav", "s.1.bin", "s.2.bin", "s.3.bin"]);
    let before = wav_data(&scene.path("out.1.wav")).1;
    // What was interrupted can be played on without a gap.
    scene.play_on(&["out.1.wav", "--resume", "s.1.bin", "-o", "more.wav"]).assert().success();
    let after = wav_data(&scene.path("more.wav")).1;
    assert_eq!((after.len(), &after[..before.len()]), (before.len() + 2 * 1600, &before[..]));
}

/// Waits until something is in the output's temporary file: Ctrl-C is being listened to.
#[cfg(unix)]
fn wait_for_output(scene: &Scene) {
    let start = Instant::now();
    let has_begun = |name: &String| name.ends_with(".part") && scene.path(name).metadata().is_ok_and(|m| m.len() > 0);
    while !scene.files().iter().any(has_begun) && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_before_there_is_anything_leaves_nothing() {
    let scene = Scene::new();
    let temporary = scene.path("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let mut child = Process::new(PROGRAM)
        .current_dir(scene.directory.path())
        .env("TMPDIR", &temporary)
        .args(["continue", "-", "--model", "tiny.safetensors", "-o", "out.wav"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Waiting would close it, and what then comes first is chance.
    let stdin = child.stdin.take();
    let spooled = || std::fs::read_dir(&temporary).unwrap().count();
    let start = Instant::now();
    while spooled() == 0 && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    Process::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(stdin);
    assert_eq!((spooled(), scene.files()), (0, vec!["in.wav".into(), "temporary".into()]));
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_a_finished_wav_of_what_exists() {
    let scene = Scene::new();
    let mut child = Process::new(PROGRAM)
        .current_dir(scene.directory.path())
        .args(["continue", "in.wav", "--model", "tiny.safetensors", "--seconds", "3600", "-o", "out.wav"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_output(&scene);
    Process::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let status = child.wait().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("interrupted"), "{stderr}");
    let (_, samples) = wav_data(&scene.path("out.wav"));
    assert_eq!(samples[..6400], wav_data(&scene.path("in.wav")).1[..]);
    assert_eq!(scene.files(), ["in.wav", "out.wav"]);
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let scene = Scene::new();
    let mut child = Process::new(PROGRAM)
        .current_dir(scene.directory.path())
        .args(["continue", "in.wav", "--model", "tiny.safetensors", "--seconds", "3600", "-o", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut head = [0; 44];
    child.stdout.as_mut().unwrap().read_exact(&mut head).unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(stderr, "");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_reported() {
    let scene = Scene::new();
    let command = scene.play_on(&["in.wav", "-q", "-o", "/dev/full"]);
    scene.refuses(command, 1, "/dev/full");
}

#[test]
fn bf16_is_for_gpus() {
    let scene = Scene::new();
    let args = ["train", "in.wav", "-o", "x.safetensors", "--preset", "tiny", "--steps", "1", "--bf16"];
    scene.refuses(scene.wavegen(&args), 2, "--device cuda");
}

#[test]
fn training_writes_a_model_that_plays() {
    let scene = Scene::new();
    scene.write_wav("long.wav", 1, &scene.chord(40_000));
    std::fs::write(scene.path("notes.txt"), "no audio").unwrap();
    let args = ["train", ".", "-o", "own.safetensors", "--preset", "tiny", "--steps", "1", "--no-calibration"];
    scene.wavegen(&args).assert().success().stderr(contains("notes.txt").and(contains("model written")));
    scene.refuses(scene.wavegen(&args), 1, "--force");
    scene.wavegen(&["continue", "in.wav", "--model", "own.safetensors", "--seconds", "0.05"]).assert().success();
    let nothing = ["train", "notes.txt", "-o", "none.safetensors", "--preset", "tiny", "--steps", "1"];
    scene.wavegen(&nothing).assert().code(1).stderr(contains("error: no usable audio"));
}

#[test]
fn training_grows_a_model_and_says_what_begins_anew() {
    let scene = Scene::new();
    scene.write_wav("long.wav", 1, &scene.chord(40_000));
    let tiny = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny.toml")).unwrap();
    let larger = tiny.replacen("dim = 32", "dim = 48", 1).replacen("n_heads = 2", "n_heads = 3", 1);
    std::fs::write(scene.path("plan.toml"), &larger).unwrap();
    std::fs::write(scene.path("both.toml"), larger.replace("slice_dim = 16", "slice_dim = 24")).unwrap();
    std::fs::write(scene.path("other.toml"), tiny.replace("n_entries = 32", "n_entries = 16")).unwrap();
    let train = |output: &str, preset: &str| {
        let mut command = scene.wavegen(&["train", "long.wav", "--init", "tiny.safetensors", "-o", output]);
        command.args(["--preset", preset, "--steps", "1", "--part", "plan", "--no-calibration"]);
        command
    };
    let grows = contains("plan transformer: grows");
    train("a.safetensors", "plan.toml")
        .assert()
        .success()
        .stderr(grows.clone().and(contains("wave transformer: as in")));
    scene.wavegen(&["continue", "in.wav", "--model", "a.safetensors", "--seconds", "0.05"]).assert().success();
    let anew = contains("warning: the wave transformer begins anew").and(contains("--part wave"));
    train("b.safetensors", "both.toml").assert().success().stderr(grows.and(anew));
    scene.refuses(train("c.safetensors", "other.toml"), 2, "codebooks");
    // A folder of that name is no unfinished run, whose model may be written over.
    std::fs::create_dir(scene.path("b.training")).unwrap();
    let again = ["train", "long.wav", "-o", "b.safetensors", "--preset", "tiny", "--steps", "1"];
    scene.refuses(scene.wavegen(&again), 1, "b.safetensors: already exists");
    // Nothing is trained for hours that cannot be kept, and a run goes on only from what it began with.
    scene.refuses(train("new/", "plan.toml"), 2, "new/: is the name of a folder");
    scene.refuses(train(".", "plan.toml"), 2, ".: is the name of a folder");
    let mut same = train("tiny.safetensors", "plan.toml");
    same.arg("--force");
    scene.refuses(same, 2, "tiny.safetensors: is --init too");
    // An unfinished run beside a model is no leave to write over that.
    std::fs::create_dir(scene.path("a.training")).unwrap();
    let adapt = ["adapt", "in.wav", "-o", "a.safetensors", "--model", "tiny.safetensors", "--steps", "1"];
    scene.refuses(scene.wavegen(&adapt), 1, "a.safetensors: already exists");
}

#[test]
#[cfg(not(feature = "mpi"))]
fn processes_started_together_do_not_all_write_one_model() {
    let scene = Scene::new();
    for variable in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let train = ["train", "in.wav", "-o", "own.safetensors", "--preset", "tiny", "--steps", "1"];
        let mut together = scene.wavegen(&train);
        together.env(variable, "2");
        scene.refuses(together, 2, "--features mpi");
        assert!(!scene.path("own.training").exists());
    }
}

#[test]
fn a_machine_tests_itself() {
    let scene = Scene::new();
    let run = scene.wavegen(&["selftest", "--model", "tiny.safetensors", "--json"]).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    assert_eq!(report["passed"], true);
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 10 && checks.iter().all(|check| check["passed"] == true), "{checks:?}");
}

#[test]
fn a_benchmark_checks_what_it_measures() {
    let scene = Scene::new();
    let few = ["--presets", "none", "--batches", "1,2", "--seconds", "0.1", "--rounds", "1", "--json"];
    let bench = ["bench", "decode", "--model", "tiny.safetensors"];
    let run = scene.wavegen(&[&bench[..], &few[..]].concat()).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    let cases = report["models"][0]["cases"].as_array().unwrap();
    assert!(cases.iter().all(|case| case["passed"] == true && case["samples_per_s"].as_f64() > Some(0.0)), "{cases:?}");
    assert!(cases.iter().any(|case| case["engine"] == "reference") && cases.iter().any(|case| case["batch"] == 2));
    let unknown = scene.wavegen(&[&bench[..], &["--isas", "mmx"]].concat());
    scene.refuses(unknown, 2, "this machine has");
    for unused in [&["--seconds", "1"][..], &["--presets", "none"], &["--isas", "scalar"], &["--no-reference"]] {
        let on_a_gpu = scene.wavegen(&[&bench[..], &["--engine", "cuda"], unused].concat());
        scene.refuses(on_a_gpu, 2, unused[0]);
    }
}

#[test]
fn a_training_benchmark_compares_what_it_measures() {
    let scene = Scene::new();
    let bench = ["bench", "train", "--preset", "tiny", "--rounds", "1", "--threads", "2", "--json"];
    let run = scene.wavegen(&bench).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&run.get_output().stdout).unwrap();
    let parts = report["parts"].as_array().unwrap();
    assert_eq!(parts.len(), 2);
    for part in parts {
        assert_eq!(part["passed"], true, "{part}");
        assert!(part["fused"]["units_per_s"]["median"].as_f64() > Some(0.0), "{part}");
    }
    scene.refuses(scene.wavegen(&["bench", "train", "--preset", "huge"]), 2, "unknown preset");
    scene.refuses(scene.wavegen(&["bench", "train", "--bf16"]), 2, "--device cuda");
}
