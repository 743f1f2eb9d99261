//! Training by several processes, with the feature `mpi`: mpirun starts the program as its users do.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use wavegen::checkpoint::Checkpoint;
use wavegen::rng::Rng;
use wavegen::train::group;
use wavegen::train::resume::StateFolder;

/// Longest time that anything here may take.
const LIMIT: Duration = Duration::from_secs(300);
/// What a sum's rounding may change in a loss of a few steps, relative.
const ROUNDING: f64 = 1e-4;

/// Three files of wandering tones.
fn write_melodies(folder: &Path) {
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    for (name, seed) in [("a.wav", 1), ("b.wav", 2), ("c.wav", 3)] {
        let mut writer = hound::WavWriter::create(folder.join(name), spec).unwrap();
        let (mut rng, mut phase, mut hz) = (Rng::new(seed), 0.0f32, 300.0);
        for i in 0..4 * 16_000 {
            if i % 4000 == 0 {
                hz = 200.0 + 400.0 * rng.uniform();
            }
            phase = (phase + hz / 16_000.0).fract();
            let sample = 0.2 * (std::f32::consts::TAU * phase).sin() + 0.01 * rng.normal();
            writer.write_sample((sample * 32767.0) as i16).unwrap();
        }
        writer.finalize().unwrap();
    }
}

/// A program as two processes.
fn mpirun(program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["-np", "2"]).arg(program);
    // On a machine of few cores, and in a container.
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command
}

fn train(mut command: Command, folder: &Path, arguments: &str) -> Command {
    command.current_dir(folder).arg("train").args(arguments.split_whitespace());
    command
}

/// `wavegen train` as two processes.
fn train_as_two(folder: &Path, arguments: &str) -> Command {
    train(mpirun(assert_cmd::cargo::cargo_bin!("wavegen")), folder, arguments)
}

/// Settings of a short run that goes by `name`, with its log.
fn short(name: &str) -> String {
    format!(
        "a.wav b.wav c.wav --preset tiny --steps 6 --validate-every 3 --plan-batch 4 --wave-batch 4 --threads 1 \
         --save-every 0 --no-calibration -o {name}.safetensors --log {name}.jsonl"
    )
}

fn start(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn wait(child: Child) -> Output {
    let (id, begun) = (child.id(), Instant::now());
    let waiting = std::thread::spawn(move || child.wait_with_output().unwrap());
    while !waiting.is_finished() {
        if begun.elapsed() > LIMIT {
            signal("KILL", id);
            panic!("still not over after {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    waiting.join().unwrap()
}

fn run(command: Command) -> Output {
    wait(start(command))
}

fn succeed(command: Command) {
    let output = run(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn signal(name: &str, process: u32) {
    Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status().unwrap();
}

/// `(event, part, step) -> bits` of steps and validations in a log.
type Told = BTreeMap<(String, String, u64), f64>;

/// What a log tells, in the order of its lines; a line that is still being written is left out.
fn lines(folder: &Path, name: &str) -> Vec<((String, String, u64), f64)> {
    let text = std::fs::read_to_string(folder.join(format!("{name}.jsonl"))).unwrap_or_default();
    let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let told = events.filter(|event| event["event"] == "step" || event["event"] == "validation");
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    told.map(|e| ((word(&e["event"]), word(&e["part"]), e["step"].as_u64().unwrap()), e["bits"].as_f64().unwrap()))
        .collect()
}

fn assert_alike(a: &Told, b: &Told) {
    assert!(a.keys().eq(b.keys()), "{a:?} {b:?}");
    for (key, bits) in a {
        assert!((bits - b[key]).abs() < ROUNDING * bits, "{key:?}: {bits} and {}", b[key]);
    }
}

#[test]
fn two_processes_have_the_losses_of_one_and_only_one_of_them_writes() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path();
    write_melodies(folder);
    // Without mpirun the program is a group of one.
    succeed(train(Command::new(assert_cmd::cargo::cargo_bin!("wavegen")), folder, &short("one")));
    succeed(train_as_two(folder, &short("two")));
    let (one, two) = (lines(folder, "one"), lines(folder, "two"));
    assert_eq!(one.len(), 2 * (6 + 2));
    assert_eq!(two.len(), one.len(), "every event is logged once: {two:?}");
    assert_alike(&one.into_iter().collect(), &two.into_iter().collect());
    let weights = |name: &str| Checkpoint::load(&folder.join(name)).unwrap().weights;
    let (one, two) = (weights("one.safetensors"), weights("two.safetensors"));
    for (name, tensor) in &one {
        let far = (&*tensor.floats() - &*two[name].floats()).fold(0.0f32, |far, d| far.max(d.abs()));
        assert!(far < 2e-3, "{name} differs by {far}");
    }
    let entries = std::fs::read_dir(folder).unwrap();
    let mut left: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    let made = ["jsonl", "loss.png", "safetensors"];
    let mut expected: Vec<_> = ["a", "b", "c"].map(|name| format!("{name}.wav")).into();
    expected.extend(["one", "two"].iter().flat_map(|name| made.map(|kind| format!("{name}.{kind}"))));
    assert_eq!(left, expected);
}

/// The process among the children of mpirun that has this rank.
#[cfg(target_os = "linux")]
fn process_of_rank(mpirun: u32, rank: usize) -> Option<u32> {
    let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name in brackets: state, parent.
        let parent: u32 = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let has_rank = environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes());
        (parent == mpirun && has_rank).then_some(id)
    })
}

/// Waits until this step of the wave transformer is in the log.
#[cfg(target_os = "linux")]
fn wait_for_step(folder: &Path, name: &str, step: u64) {
    let (begun, reached) = (Instant::now(), ("step".to_owned(), "wave".to_owned(), step));
    while !lines(folder, name).iter().any(|(key, _)| *key == reached) {
        assert!(begun.elapsed() < LIMIT, "step {step} does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn an_interrupt_of_any_rank_ends_all_of_them_with_a_whole_model() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path();
    write_melodies(folder);
    let long = "a.wav b.wav -o long.safetensors --log long.jsonl --preset tiny --part wave --steps 100000 --threads 1";
    let child = start(train_as_two(folder, long));
    wait_for_step(folder, "long", 2);
    signal("INT", process_of_rank(child.id(), 1).expect("rank 1 runs"));
    let output = wait(child);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(130) && told.contains("interrupted early"), "{:?} {told}", output.status);
    Checkpoint::load(&folder.join("long.safetensors")).unwrap();
    assert!(StateFolder::beside(&folder.join("long.safetensors")).exists());
}

#[test]
#[cfg(target_os = "linux")]
fn a_killed_rank_ends_the_job_and_the_same_command_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path();
    write_melodies(folder);
    succeed(train_as_two(folder, &short("whole")));
    let child = start(train_as_two(folder, &short("killed")));
    // The model of the first validation is there, and a state beyond it.
    wait_for_step(folder, "killed", 4);
    signal("KILL", process_of_rank(child.id(), 1).expect("rank 1 runs"));
    assert!(!wait(child).status.success(), "mpirun ends as if nothing had happened");
    Checkpoint::load(&folder.join("killed.safetensors")).unwrap();
    assert!(StateFolder::beside(&folder.join("killed.safetensors")).exists());
    succeed(train_as_two(folder, &short("killed")));
    assert_alike(&lines(folder, "whole").into_iter().collect(), &lines(folder, "killed").into_iter().collect());
    assert!(!StateFolder::beside(&folder.join("killed.safetensors")).exists());
}

#[test]
fn an_error_ends_all_processes_with_its_message() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("noise.txt"), "this is no audio").unwrap();
    let output = run(train_as_two(directory.path(), "noise.txt -o model.safetensors --preset tiny --steps 2"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("no usable audio"), "{told}");
    assert!(!StateFolder::beside(&directory.path().join("model.safetensors")).exists());
    // An error of the first rank alone, for which the other waits.
    std::fs::write(directory.path().join("model.safetensors"), "a model").unwrap();
    write_melodies(directory.path());
    let output = run(train_as_two(directory.path(), "a.wav b.wav -o model.safetensors --preset tiny --steps 2"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("process 1 of 2") && told.contains("--force"), "{told}");
}

#[test]
fn a_panic_of_a_rank_ends_the_others_that_wait_for_it() {
    let mut command = mpirun(&std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "one_rank_panics_and_the_others_wait"]);
    assert!(!run(command).status.success());
}

#[test]
#[ignore = "what the ranks of the test above do"]
fn one_rank_panics_and_the_others_wait() {
    let group = group::join().unwrap();
    assert!(group.size() == 1 || group.rank() == 0, "on purpose");
    group.any(true);
}
