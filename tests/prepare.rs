//! `wavegen prepare` and training on what it makes: only what is new is decoded, a kill costs nothing, and a corpus trains the
//! same model as the files that it was made of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, SystemTime};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use tempfile::TempDir;
use wavegen::corpus::{Corpus, PrepareEvent, PrepareSettings, prepare};
use wavegen::rng::Rng;

const PROGRAM: &str = env!("CARGO_BIN_EXE_wavegen");

struct Scene {
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { directory: tempfile::tempdir().unwrap() };
        std::fs::create_dir_all(scene.path("in/deeper")).unwrap();
        for (i, name) in ["a.wav", "b.wav", "deeper/c.wav", "d.wav"].into_iter().enumerate() {
            scene.write_melody(&format!("in/{name}"), 3.0 + i as f32, i as u64);
        }
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A wandering tone in stereo at 22,050 Hz.
    fn write_melody(&self, name: &str, seconds: f32, seed: u64) {
        let mut rng = Rng::new(seed);
        let (mut phase, mut hz) = (0.0f32, 300.0f32);
        let spec = hound::WavSpec {
            channels: 2,
            sample_rate: 22_050,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        let mut writer = hound::WavWriter::create(self.path(name), spec).unwrap();
        for i in 0..(seconds * 22_050.0) as usize {
            if i % 5000 == 0 {
                hz = 200.0 + 400.0 * rng.uniform();
            }
            phase = (phase + hz / 22_050.0).fract();
            let x = 0.2 * (std::f32::consts::TAU * phase).sin() + 0.01 * rng.normal();
            writer.write_sample((x * 32767.0) as i16).unwrap();
            writer.write_sample((x * 16000.0) as i16).unwrap();
        }
        writer.finalize().unwrap();
    }

    fn wavegen(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.current_dir(self.directory.path()).args(args);
        command
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        let run = self.wavegen(args).arg("--json").assert().success();
        serde_json::from_slice(&run.get_output().stdout).unwrap()
    }

    /// Names, contents and times of a folder's files, without locks.
    fn state(&self, folder: &str) -> Vec<(String, Vec<u8>, SystemTime)> {
        let mut files: Vec<_> = std::fs::read_dir(self.path(folder))
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|e| (e.file_name().into_string().unwrap(), e.path(), e.metadata().unwrap().modified().unwrap()))
            .filter(|(name, ..)| !name.starts_with('.'))
            .map(|(name, path, time)| (name, std::fs::read(path).unwrap(), time))
            .collect();
        files.sort();
        files
    }

    fn bytes(&self, folder: &str) -> Vec<(String, Vec<u8>)> {
        self.state(folder).into_iter().map(|(name, bytes, _)| (name, bytes)).collect()
    }

    fn settings(&self, output: &str) -> PrepareSettings {
        PrepareSettings {
            inputs: vec![self.path("in")],
            folder: self.path(output),
            sample_rate: 16_000,
            least_s: 2.0,
            part: (1, 1),
            threads: 2,
        }
    }

    /// Prepares; gives the names of what was decoded.
    fn decoded(&self, settings: &PrepareSettings) -> Vec<String> {
        let mut names = Vec::new();
        prepare(settings, &mut |event| {
            if let PrepareEvent::Piece { facts } = event {
                names.push(Path::new(&facts.source).file_name().unwrap().to_str().unwrap().to_owned());
            }
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        names
    }

    /// Content hashes of a corpus' pieces, by name.
    fn pieces(&self, folder: &str) -> BTreeMap<String, String> {
        let name = |source: &str| Path::new(source).file_name().unwrap().to_str().unwrap().to_owned();
        let corpus = Corpus::open(&self.path(folder)).unwrap();
        corpus.pieces.into_iter().map(|piece| (name(&piece.facts.source), piece.facts.hash)).collect()
    }
}

#[test]
fn only_what_is_new_or_has_changed_is_decoded_and_nothing_is_written_when_nothing_has() {
    let scene = Scene::new();
    let settings = scene.settings("corpus");
    assert_eq!(scene.decoded(&settings), ["a.wav", "b.wav", "d.wav", "c.wav"]);
    let before = scene.state("corpus");
    assert!(scene.decoded(&settings).is_empty());
    assert!(scene.state("corpus") == before, "written although nothing had changed");
    // Another folder, the same bytes, whatever the threads.
    scene.decoded(&PrepareSettings { threads: 1, ..scene.settings("again") });
    assert!(scene.bytes("again") == scene.bytes("corpus"));

    // Moved, copied and touched files are known by their content.
    std::fs::rename(scene.path("in/a.wav"), scene.path("in/moved.wav")).unwrap();
    std::fs::copy(scene.path("in/b.wav"), scene.path("in/copy.wav")).unwrap();
    std::fs::File::options()
        .append(true)
        .open(scene.path("in/d.wav"))
        .unwrap()
        .set_modified(SystemTime::UNIX_EPOCH)
        .unwrap();
    let pieces = scene.pieces("corpus");
    assert!(scene.decoded(&settings).is_empty());
    assert_eq!(scene.pieces("corpus"), pieces);
    let before = scene.state("corpus");
    assert!(scene.decoded(&settings).is_empty());
    assert!(scene.state("corpus") == before, "a touched file is looked into once");

    // One changes, one comes, one becomes garbage.
    scene.write_melody("in/b.wav", 4.0, 77);
    scene.write_melody("in/e.wav", 3.0, 78);
    std::fs::write(scene.path("in/d.wav"), "no sound").unwrap();
    assert_eq!(scene.decoded(&settings), ["b.wav", "e.wav"]);
    let now = scene.pieces("corpus");
    assert_eq!(
        now.keys().collect::<Vec<_>>(),
        ["a.wav", "b.wav", "c.wav", "e.wav"],
        "the copy keeps its source's name"
    );
    assert_ne!(now["b.wav"], pieces["b.wav"]);
    assert_eq!(now["c.wav"], pieces["c.wav"]);
    // The copy still has the old content of b.wav, so that is a piece yet.
    let hashes: Vec<_> = Corpus::open(&settings.folder).unwrap().pieces.into_iter().map(|p| p.facts.hash).collect();
    assert!(hashes.contains(&pieces["b.wav"]) && !hashes.contains(&pieces["d.wav"]));
}

#[test]
fn garbage_is_listed_and_left_out() {
    let scene = Scene::new();
    std::fs::write(scene.path("in/noise.txt"), "this is no audio").unwrap();
    let whole = std::fs::read(scene.path("in/a.wav")).unwrap();
    std::fs::write(scene.path("in/empty.wav"), &whole[..44]).unwrap();
    std::fs::write(scene.path("in/cut.wav"), &whole[..whole.len() - 1001]).unwrap();
    let mut rng = Rng::new(3);
    let noise: Vec<u8> = (0..50_000).map(|_| rng.next_u64() as u8).collect();
    std::fs::write(scene.path("in/noise.mp3"), noise).unwrap();
    scene.write_melody("in/short.wav", 0.1, 9);
    #[cfg(unix)]
    std::os::unix::fs::symlink("nowhere.wav", scene.path("in/gone.wav")).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("..", scene.path("in/loop")).unwrap();
    for run in 0..2 {
        let report = scene.json(&["prepare", "in", "-o", "corpus"]);
        let text = report["bad"].to_string();
        for name in ["noise.txt", "empty.wav", "noise.mp3", "short.wav: shorter than 2.048 s"] {
            assert!(text.contains(name), "run {run}: {name} is not in {text}");
        }
        assert_eq!(text.contains("gone.wav"), cfg!(unix));
        assert_eq!(report["bad"].as_array().unwrap().len(), if cfg!(unix) { 5 } else { 4 }, "{text}");
        // A file that was cut has a beginning.
        assert_eq!((&report["pieces"], &report["added"]), (&5.into(), &(if run == 0 { 5 } else { 0 }).into()));
    }
}

#[test]
fn what_an_earlier_version_refused_and_this_one_reads_is_a_piece() {
    let scene = Scene::new();
    std::fs::write(scene.path("in/noise.txt"), "this is no audio").unwrap();
    scene.json(&["prepare", "in", "-o", "corpus"]);
    let manifest = scene.path("corpus/part-1of1.jsonl");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let piece = lines.iter().find(|line| line.get("n_samples").is_some()).unwrap();
    let mut bad = lines.iter().find(|line| line.get("why").is_some()).unwrap().clone();
    (bad["content"], bad["program"]) = (piece["content"].clone(), "0".into());
    let (first, rest) = text.split_once('\n').unwrap();
    std::fs::write(&manifest, format!("{first}\n{bad}\n{rest}")).unwrap();
    let before = scene.state("corpus");
    let report = scene.json(&["prepare", "in", "-o", "corpus"]);
    assert_eq!((&report["unchanged"], &report["pieces"]), (&4.into(), &4.into()), "{report}");
    assert_eq!(report["bad"].as_array().unwrap().len(), 1, "{report}");
    assert!(scene.state("corpus") == before, "written although nothing had changed");
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let scene = Scene::new();
    for i in 0..8 {
        scene.write_melody(&format!("in/more{i}.wav"), 10.0, 100 + i);
    }
    scene.wavegen(&["prepare", "in", "-o", "whole"]).assert().success();
    let mut kills = 0;
    for wait in [1, 20, 60, 120, 60_000] {
        let mut command = Process::new(PROGRAM);
        command.current_dir(scene.directory.path()).args([
            "prepare",
            "in",
            "-o",
            "killed",
            "--threads",
            "1",
            "--quiet",
        ]);
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        let begun = SystemTime::now();
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if begun.elapsed().unwrap() > Duration::from_millis(wait) {
                break None;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        match ended {
            Some(status) => {
                assert!(status.success());
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    assert!(kills > 0);
    assert!(scene.bytes("killed") == scene.bytes("whole"));
}

#[test]
fn jobs_of_an_array_make_one_corpus_together() {
    let scene = Scene::new();
    scene.wavegen(&["prepare", "in", "-o", "one"]).assert().success();
    for part in ["2/3", "1/3"] {
        scene
            .wavegen(&["prepare", "in", "-o", "three", "--shard", part])
            .assert()
            .success()
            .stderr(contains("part-3of3"));
    }
    let train = ["train", "three", "-o", "m.safetensors", "--preset", "tiny", "--steps", "1", "--no-calibration"];
    if !scene.pieces("three").is_empty() {
        scene.wavegen(&train).assert().success().stderr(contains("part-3of3 not finished"));
    }
    scene.wavegen(&["prepare", "in", "-o", "three", "--shard", "3/3"]).assert().success();
    assert_eq!(scene.pieces("three"), scene.pieces("one"));
    // Another division finds everything done.
    let report = scene.json(&["prepare", "in", "-o", "three", "--shard", "1/1"]);
    assert_eq!((&report["added"], &report["unchanged"]), (&0.into(), &4.into()));
    scene.wavegen(&["prepare", "in", "-o", "x", "--shard", "4/3"]).assert().code(2).stderr(contains("I/N"));
}

/// `(part, step, bits)` of every step and validation in a log.
fn losses(log: &Path) -> Vec<(String, String, f64)> {
    std::fs::read_to_string(log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|event| event["event"] == "step" || event["event"] == "validation")
        .map(|e| (e["part"].to_string(), e["step"].to_string(), e["bits"].as_f64().unwrap()))
        .collect()
}

#[test]
fn a_corpus_and_the_files_that_it_was_made_of_train_the_same_model() {
    let scene = Scene::new();
    scene.wavegen(&["prepare", "in", "-o", "corpus"]).assert().success();
    scene.wavegen(&["prepare", "in/a.wav", "in/d.wav", "-o", "half"]).assert().success();
    std::fs::create_dir(scene.path("renamed")).unwrap();
    for (from, to) in [("a", "4"), ("b", "3"), ("deeper/c", "2"), ("d", "1")] {
        std::fs::copy(scene.path(&format!("in/{from}.wav")), scene.path(&format!("renamed/{to}.wav"))).unwrap();
    }
    let ways: [&[&str]; 5] =
        [&["corpus"], &["in"], &["in/d.wav", "in/deeper", "in/b.wav", "in/a.wav"], &["half", "in"], &["renamed"]];
    let all: Vec<_> = ways
        .into_iter()
        .enumerate()
        .map(|(i, inputs)| {
            let (output, log) = (format!("{i}.safetensors"), format!("{i}.jsonl"));
            let args =
                ["-o", &output, "--log", &log, "--preset", "tiny", "--steps", "4", "--no-calibration", "--quiet"];
            let varied = ["--validation-share", "0.25", "--speed-variation", "5"];
            scene.wavegen(&[&["train"], inputs, &args, &varied].concat()).assert().success();
            losses(&scene.path(&log))
        })
        .collect();
    assert_eq!(all[0].len(), 10);
    assert!(all.iter().all(|losses| losses == &all[0]), "{all:?}");
}

#[test]
fn what_cannot_be_prepared_or_trained_on_is_refused_with_a_way_out() {
    let scene = Scene::new();
    let refuses = |args: &[&str], what: &str| {
        let line = contains("error: ").and(contains(what));
        scene.wavegen(args).assert().code(1).stdout("").stderr(line);
    };
    std::fs::create_dir(scene.path("empty")).unwrap();
    refuses(&["prepare", "empty", "-o", "c"], "no usable audio");
    std::fs::write(scene.path("empty/notes.txt"), "no audio").unwrap();
    refuses(&["prepare", "empty", "-o", "c"], "no usable audio");
    refuses(&["prepare", "missing", "-o", "c"], "missing: cannot be read");
    refuses(&["prepare", "in", "-o", "in/a.wav"], "in/a.wav");
    let itself = scene.wavegen(&["prepare", "in", "-o", "./in"]).assert().code(2);
    itself.stderr(contains("./in: is what is read"));
    scene.wavegen(&["prepare", "in", "-o", "corpus"]).assert().success();
    let corpus = scene.wavegen(&["prepare", "in", "corpus", "-o", "more"]).assert().code(2);
    corpus.stderr(contains("corpus: is a corpus already"));
    assert!(!scene.path("more").exists());
    scene.wavegen(&["prepare", "in", "-o", "slow", "--sample-rate", "8000"]).assert().success();
    refuses(&["prepare", "in", "-o", "slow"], "made at 8000 Hz, 16000 Hz are needed");
    let train = ["train", "slow", "-o", "m.safetensors", "--preset", "tiny", "--steps", "1"];
    refuses(&train, "--sample-rate 16000");
    // Damage is noticed before anything is learnt from it.
    scene.wavegen(&["prepare", "in", "-o", "bent"]).assert().success();
    let shard = scene.path("bent/part-1of1-000.pcm");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    refuses(&["train", "bent", "-o", "m.safetensors", "--preset", "tiny", "--steps", "1"], "damaged");
    std::fs::write(&shard, &bytes[..1000]).unwrap();
    refuses(&["train", "bent", "-o", "m.safetensors", "--preset", "tiny", "--steps", "1"], "prepare it again");
    assert!(!scene.path("m.safetensors").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_loses_nothing_and_the_same_command_goes_on() {
    let scene = Scene::new();
    scene.wavegen(&["prepare", "in", "-o", "whole"]).assert().success();
    // No file may pass 200 KB; two pieces fit.
    let mut limited = Process::new("sh");
    limited.current_dir(scene.directory.path());
    limited.args(["-c", "trap '' XFSZ; ulimit -f 400; exec \"$0\" prepare in -o full", PROGRAM]);
    let output = limited.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: full/part-1of1-000.pcm: no space"), "{stderr}");
    scene.wavegen(&["prepare", "in", "-o", "full"]).assert().success();
    assert!(scene.bytes("full") == scene.bytes("whole"));
}

#[test]
fn silence_and_clipping_are_told_before_training() {
    let scene = Scene::new();
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut writer = hound::WavWriter::create(scene.path("loud.wav"), spec).unwrap();
    for i in 0..5 * 16_000 {
        let x = 1.5 * (i as f32 * 0.05).sin();
        let paused = i > 2 * 16_000;
        writer.write_sample(if paused { 0 } else { (x.clamp(-1.0, 1.0) * 32767.0) as i16 }).unwrap();
    }
    writer.finalize().unwrap();
    let told = || contains("silenceremove").and(contains("cut off at full scale"));
    scene.wavegen(&["prepare", "loud.wav", "-o", "loud"]).assert().success().stderr(told());
    let train = ["train", "loud.wav", "-o", "m.safetensors", "--preset", "tiny", "--steps", "1", "--no-calibration"];
    scene.wavegen(&train).assert().success().stderr(told());
}
