//! The program on a real sink: a PulseAudio server of its own with a null sink, whose monitor is recorded.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::model::config::ModelConfig;

const PATIENCE: Duration = Duration::from_secs(60);

/// A server, and a directory with a model.
struct Scene {
    directory: TempDir,
    server: Option<Child>,
    sink: String,
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn without_server() -> Self {
        let scene = Self { directory: tempfile::tempdir().unwrap(), server: None, sink: String::new() };
        let config = ModelConfig::preset("tiny").unwrap();
        Checkpoint::untrained(config, 1).unwrap().save(&scene.path("tiny.safetensors"), Precision::F32).unwrap();
        scene
    }

    /// A server with a sink of this shape; `None` where PulseAudio is not installed.
    fn with_sink(rate: u32, channels: usize) -> Option<Self> {
        let installed = |name: &str| Command::new(name).arg("--version").output().is_ok();
        if !installed("pulseaudio") || !installed("parec") {
            println!("skipped: PulseAudio is not installed (apt-get install pulseaudio pulseaudio-utils)");
            return None;
        }
        let mut scene = Self::without_server();
        scene.sink = format!("module-null-sink sink_name=null format=float32le rate={rate} channels={channels}");
        scene.start_server();
        Some(scene)
    }

    fn start_server(&mut self) {
        let mut server = self.command("pulseaudio");
        server.args([
            "-n",
            "--daemonize=no",
            "--exit-idle-time=-1",
            "--use-pid-file=no",
            "--disallow-exit",
            "-L",
            &self.sink,
        ]);
        server.args(["-L", "module-native-protocol-unix auth-anonymous=1"]);
        self.server = Some(server.stderr(Stdio::null()).spawn().unwrap());
        let begun = Instant::now();
        while !self.command("pactl").arg("info").output().is_ok_and(|output| output.status.success()) {
            assert!(begun.elapsed() < PATIENCE, "the server does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// A command that finds this server only.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.directory.path()).env("XDG_RUNTIME_DIR", self.directory.path());
        command.env("HOME", self.directory.path()).env_remove("PULSE_SERVER").env_remove("DBUS_SESSION_BUS_ADDRESS");
        command
    }

    /// `wavegen stream --model tiny ARGS...`
    fn stream(&self, args: &[&str]) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_wavegen"));
        command.args(["stream", "--model", "tiny.safetensors"]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn samples(&self, name: &str) -> Vec<f32> {
        let bytes = std::fs::read(self.path(name)).unwrap();
        bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.stop_server();
    }
}

/// A program that plays, and what it says.
struct Run {
    child: Child,
    said: mpsc::Receiver<String>,
}

impl Run {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (say, said) = mpsc::channel();
        let stderr = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).for_each(|line| drop(say.send(line)))
        });
        Self { child, said }
    }

    /// Waits for a line that has this in it.
    fn hears(&self, what: &str) -> String {
        let (begun, mut all) = (Instant::now(), Vec::new());
        while begun.elapsed() < PATIENCE {
            match self.said.recv_timeout(Duration::from_millis(100)) {
                Ok(line) if line.contains(what) => return line,
                Ok(line) => all.push(line),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        panic!("nobody said {what:?}; said was {all:#?}");
    }

    fn says(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn interrupt(&self) {
        assert!(Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap().success());
    }

    fn ends(&mut self) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn underruns(summary: &str) -> u64 {
    let before = summary.split(" underruns").next().unwrap();
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Plays two seconds to a sink of this shape, by `device` of the program; whether its monitor gives what was made.
fn same_at_the_sink(rate: u32, channels: usize, device: &str) -> bool {
    let Some(scene) = Scene::with_sink(rate, channels) else { return true };
    // Where ALSA plays through the server too.
    std::fs::write(scene.path(".asoundrc"), "pcm.!default { type pulse }\nctl.!default { type pulse }\n").unwrap();
    let listed = String::from_utf8(scene.stream(&["--list-devices"]).output().unwrap().stdout).unwrap();
    if !listed.contains(&format!(" {device}: ")) {
        println!("skipped: there is no {device} (apt-get install libasound2-plugins)");
        return true;
    }
    let mut recorder = scene.command("parec");
    recorder.args(["--device=null.monitor", "--format=float32le", "--raw", "--latency-msec=20"]);
    recorder.args([format!("--rate={rate}"), format!("--channels={channels}"), "heard.raw".into()]);
    let mut recorder = recorder.spawn().unwrap();
    // It records once silence comes in.
    let begun = Instant::now();
    while scene.path("heard.raw").metadata().map_or(0, |metadata| metadata.len()) == 0 {
        assert!(begun.elapsed() < PATIENCE, "{rate} Hz: the monitor gives nothing");
        std::thread::sleep(Duration::from_millis(50));
    }
    let play = ["--seconds", "2", "--to", "made.raw", "--format", "f32le", "--buffer", "1000", "--governor", "off"];
    let mut run = Run::start(scene.stream(&[&play[..], &["--device", device]].concat()));
    let summary = run.hears("s played in");
    assert_eq!(run.ends(), 0, "{summary}");
    std::thread::sleep(Duration::from_millis(2500));
    // Ends it as Ctrl-C would, so that it writes what it has.
    Command::new("kill").args(["-INT", &recorder.id().to_string()]).status().unwrap();
    recorder.wait().unwrap();
    let (made, heard) = (scene.samples("made.raw"), scene.samples("heard.raw"));
    assert_eq!(made.len(), 2 * rate as usize * channels, "{rate} Hz");
    if underruns(&summary) > 0 {
        println!("skipped: {rate} Hz, this machine is too busy to play a second ahead ({summary})");
        return true;
    }
    // The server's order of channels beyond the first two is its own; they are silent.
    let front = |all: &[f32]| -> Vec<f32> { all.chunks_exact(channels).map(|frame| frame[0]).collect() };
    let (made, heard) = (front(&made), front(&heard));
    // A sink that wakes up may lose the first milliseconds.
    let loud = rate as usize / 50;
    let key = &made[loud..loud + 200];
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-4);
    let at = heard.windows(200).position(|window| near(window, key));
    let at = at.unwrap_or_else(|| panic!("{rate} Hz, {channels} channels: nothing was heard"));
    let n = made.len() - loud;
    assert!(heard.len() >= at + n, "{rate} Hz: the end is missing");
    near(&heard[at..at + n], &made[loud..])
}

#[test]
fn what_is_recorded_at_the_sink_is_what_the_engine_made() {
    for (rate, channels) in [(8000, 1), (44_100, 2), (48_000, 6), (96_000, 2)] {
        assert!(same_at_the_sink(rate, channels, "null"), "{rate} Hz, {channels} channels: something else was heard");
    }
}

#[cfg(feature = "live")]
#[test]
fn what_is_recorded_behind_alsa_is_what_the_engine_made() {
    // On a busy machine ALSA's plugin may miss a period and tell nobody.
    assert!((0..3).any(|_| same_at_the_sink(48_000, 2, "alsa:default")), "something else was heard three times");
}

/// Plays a tone on the left for 1.5 s to who listens to `source`: it goes on on the left. Gives its level; `None` if it cannot be tried.
fn plays_on_after(source: &str, amplitude: f32) -> Option<f32> {
    let scene = Scene::with_sink(48_000, 2)?;
    std::fs::write(scene.path(".asoundrc"), "pcm.!default { type pulse }\nctl.!default { type pulse }\n").unwrap();
    let listed = String::from_utf8(scene.stream(&["--list-devices"]).output().unwrap().stdout).unwrap();
    if !listed.lines().any(|line| line.contains(&format!(" {source}: ")) && line.ends_with(", --source")) {
        println!("skipped: there is no {source} (apt-get install libasound2-plugins)");
        return None;
    }
    let tone = |i: u32| amplitude * (i as f32 / 48_000.0 * 440.0 * std::f32::consts::TAU).sin();
    let bytes: Vec<u8> = (0..72_000).flat_map(|i| [tone(i).to_le_bytes(), [0; 4]].concat()).collect();
    std::fs::write(scene.path("tone.raw"), bytes).unwrap();
    let record = ["--to", "made.raw", "--format", "f32le", "--governor", "off", "--control", "-"];
    let mut command = scene.stream(&[&record[..], &["--device", "null", "--source", source, "--listen"]].concat());
    command.stdin(Stdio::piped());
    let mut run = Run::start(command);
    run.hears("listening to");
    let mut player = scene.command("pacat");
    player.args(["--playback", "--device=null", "--format=float32le", "--rate=48000", "--channels=2", "tone.raw"]);
    assert!(player.status().unwrap().success());
    std::thread::sleep(Duration::from_millis(300));
    run.says("status");
    run.hears(", listening ");
    run.says("listen");
    let said = run.hears("playing on after ");
    let seconds: f32 = said.split("playing on after ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((1.4..=1.7).contains(&seconds), "{said}");
    std::thread::sleep(Duration::from_millis(1500));
    run.says("quit");
    run.hears("s played in");
    assert_eq!(run.ends(), 0);
    let made = scene.samples("made.raw");
    let level = |c: usize, frames: &[f32]| {
        let power: f32 = frames.iter().skip(c).step_by(2).map(|x| x * x).sum();
        (2.0 * power / frames.len() as f32).sqrt()
    };
    // The recording has both: silence, what was heard, silence until the request, and the answer.
    let half = 48_000;
    let begins = made.iter().step_by(2).position(|x| x.abs() > 0.5 * amplitude).unwrap();
    assert!(begins > 0 && made[..2 * begins.saturating_sub(2400)].iter().all(|x| x.abs() < 1e-3 * amplitude));
    let tone = &made[2 * (begins + 4800)..2 * (begins + 62_400)];
    let (left, right) = (level(0, tone), level(1, tone));
    let heard = amplitude / std::f32::consts::SQRT_2;
    assert!((left - heard).abs() < 0.02 * heard && right < 1e-3 * heard, "{source}: {left} and {right} of {heard}");
    assert!(level(0, &made[2 * (begins + 74_400)..2 * (begins + 81_600)]) < 1e-3 * amplitude, "nobody plays then");
    let last = &made[made.len() - half..];
    let (left, right) = (level(0, last), level(1, last));
    assert!(left > 0.0 && right < 1e-3 * left, "{source}: {right} on the right, {left} on the left");
    Some(left)
}

/// Untrained, it has a level of its own, but in proportion to what it heard.
fn plays_on_at_the_level_of(source: &str) {
    let (Some(loud), Some(soft)) = (plays_on_after(source, 0.3), plays_on_after(source, 0.01)) else { return };
    assert!((15.0..60.0).contains(&(loud / soft)), "{source}: {loud} after 0.3 and {soft} after 0.01");
}

#[test]
fn it_plays_on_from_what_a_source_heard() {
    plays_on_at_the_level_of("null.monitor");
}

#[cfg(feature = "live")]
#[test]
fn it_plays_on_from_what_alsa_heard() {
    plays_on_at_the_level_of("alsa:default");
}

#[test]
fn who_plays_nothing_is_told_and_the_music_stays_as_it_is() {
    let Some(scene) = Scene::with_sink(44_100, 2) else { return };
    let record = ["--to", "made.raw", "--format", "f32le", "--governor", "off", "--control", "-"];
    let mut command = scene.stream(&[&record[..], &["--listen", "0.5", "--source", "null.mon"]].concat());
    command.stdin(Stdio::piped());
    let mut run = Run::start(command);
    run.hears("listening to Monitor of Null Output for 0.5 s");
    run.hears("error: nothing was played in 0.5 s (-120 dBFS at most); is it the right --source");
    // However often it listens, no connection to the server stays behind.
    let open = |run: &Run| std::fs::read_dir(format!("/proc/{}/fd", run.child.id())).unwrap().count();
    let before = open(&run);
    for _ in 0..8 {
        run.says("listen 0.1");
        run.hears("listening to");
        run.hears("error: nothing was played");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(open(&run) <= before + 3, "{before} files open, then {}", open(&run));
    // What comes instead is heard.
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 32,
        sample_format: hound::SampleFormat::Float,
    };
    let mut song = hound::WavWriter::create(scene.path("song.wav"), spec).unwrap();
    (0..16_000u16).for_each(|i| song.write_sample(0.3 * (f32::from(i) / 8.0).sin()).unwrap());
    song.finalize().unwrap();
    run.says("prompt song.wav");
    run.hears("playing on after");
    std::thread::sleep(Duration::from_millis(700));
    run.says("take 1 -");
    run.hears("error: -: give a new file");
    run.says("quit");
    run.hears("s played in");
    assert_eq!(run.ends(), 0);
    let made = scene.samples("made.raw");
    let sounds: Vec<usize> = (0..made.len()).filter(|&i| made[i] != 0.0).collect();
    assert!(sounds.len() > 20_000 && sounds[0] > 2 * 44_100, "{} samples, from {:?} on", sounds.len(), sounds.first());
    for (args, reason) in [
        (&["--listen", "--source", "piano"][..], "no sound device is called 'piano'; there are: null.monitor"),
        (&["--listen", "41"], "must lie in 0.1 to 40 seconds"),
        (&["--listen", "4", "--no-audio", "--clock", "simulated"], "who is listened to takes real time"),
    ] {
        let refused = scene.stream(args).output().unwrap();
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains(reason) && !refused.status.success(), "{said}");
    }
}

#[test]
fn it_does_not_listen_to_itself() {
    let Some(scene) = Scene::with_sink(44_100, 2) else { return };
    let mut command = scene.stream(&["--source", "null.monitor", "--governor", "off", "--control", "-"]);
    command.stdin(Stdio::piped());
    let mut run = Run::start(command);
    run.hears("x real time");
    std::thread::sleep(Duration::from_millis(1000));
    run.says("listen 0.5");
    run.hears("listening to");
    // What it played last is on its way through the monitor meanwhile; and what is asked for now waits until it has listened.
    run.says("volume 0.9");
    run.hears("volume 0.9");
    run.hears("error: nothing was played in 0.5 s");
    run.says("quit");
    run.hears("s played in");
    assert_eq!(run.ends(), 0);
}

#[test]
fn a_device_that_refuses_leaves_nothing_behind() {
    let Some(mut scene) = Scene::with_sink(48_000, 2) else { return };
    // It is gone before the music is to begin: a minute of it is made first.
    let mut run = Run::start(scene.stream(&["--to", "made.wav", "--buffer", "60000"]));
    run.hears("x real time");
    scene.stop_server();
    run.hears("error: null: ");
    assert_eq!(run.ends(), 1);
    let names = std::fs::read_dir(scene.directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().contains("wav")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_server_that_goes_and_comes_back_is_told_and_the_music_goes_on() {
    let Some(mut scene) = Scene::with_sink(48_000, 2) else { return };
    let mut run = Run::start(scene.stream(&["--to", "made.wav"]));
    run.hears("x real time");
    std::thread::sleep(Duration::from_millis(2000));
    scene.stop_server();
    run.hears("the sound device is lost");
    scene.start_server();
    run.hears("the music goes on");
    std::thread::sleep(Duration::from_millis(2000));
    run.interrupt();
    run.hears("s played in");
    assert_eq!(run.ends(), 0);
    let wav = hound::WavReader::open(scene.path("made.wav")).unwrap();
    assert!(wav.duration() > 48_000 / 2, "{} frames", wav.duration());
}

#[test]
fn devices_are_listed_and_an_unknown_one_is_refused_by_name() {
    let Some(scene) = Scene::with_sink(44_100, 2) else { return };
    let listed = scene.stream(&["--list-devices"]).output().unwrap();
    assert!(String::from_utf8(listed.stdout).unwrap().contains("* null: Null Output, 44100 Hz, 2 channels"));
    let refused = scene.stream(&["--device", "no-such", "--seconds", "1"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("no sound device is called 'no-such'; there are: null"), "{said}");
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn without_a_server_it_says_what_to_install() {
    let scene = Scene::without_server();
    for args in [&["--seconds", "1"][..], &["--list-devices"]] {
        let refused = scene.stream(args).output().unwrap();
        let said = String::from_utf8(refused.stderr).unwrap();
        if cfg!(feature = "live") {
            println!("skipped: ALSA may have devices");
            return;
        }
        assert!(said.contains("apt-get install pulseaudio") && said.contains("--features live"), "{said}");
        assert_eq!(refused.status.code(), Some(1));
    }
}

#[test]
fn ctrl_c_leaves_a_whole_recording() {
    let scene = Scene::without_server();
    let mut run = Run::start(scene.stream(&["--no-audio", "--to", "made.wav", "--rate", "44100"]));
    run.hears("x real time");
    std::thread::sleep(Duration::from_millis(800));
    run.interrupt();
    run.hears("recorded in made.wav");
    assert_eq!(run.ends(), 0);
    let mut wav = hound::WavReader::open(scene.path("made.wav")).unwrap();
    let samples: Vec<i16> = wav.samples().map(Result::unwrap).collect();
    assert!(samples.len() > 2 * 44_100 / 4, "{} samples", samples.len());
    assert_eq!(samples[samples.len() - 1], 0, "it fades out");
}

#[test]
fn lines_on_standard_input_steer_and_nonsense_is_answered() {
    let scene = Scene::without_server();
    let mut command = scene.stream(&["--no-audio", "--control", "-"]);
    command.stdin(Stdio::piped());
    let mut run = Run::start(command);
    run.hears("x real time");
    std::thread::sleep(Duration::from_millis(500));
    for (line, answer) in [
        ("temperature 0.9", "temperature 0.9"),
        ("top-p 0.8", "top-p 0.8"),
        ("grain 0.5", "grain 0.5"),
        ("seed 12", "seed 12"),
        ("hold", "held"),
        ("go", "going on"),
        ("vary 0.3", "another way"),
        ("volume 0.3", "volume 0.3"),
        ("mute", "volume 0"),
        ("status", ", muted"),
        ("unmute", "volume 0.3"),
        ("take 0.2 take.wav", "saved in take.wav"),
        ("prompt take.wav", "playing on after take.wav"),
        ("follow take.wav", "following take.wav"),
        ("own", "its own way"),
        ("status", "underruns"),
        ("sing", "error: \"sing\": no such request"),
        ("temperature hot", "is no number"),
        ("follow nothing.wav", "error: nothing.wav"),
        ("take 1 take.wav", "error: take.wav: already exists"),
        ("help", "temperature X | top-p X"),
    ] {
        run.says(line);
        run.hears(answer);
    }
    assert!(hound::WavReader::open(scene.path("take.wav")).unwrap().duration() > 0);
    // Closed, and the music goes on until it is ended.
    drop(run.child.stdin.take());
    run.hears("the music goes on");
    run.interrupt();
    run.hears("s played in");
    assert_eq!(run.ends(), 0);
}

#[test]
fn a_socket_takes_requests_and_answers_each() {
    let scene = Scene::without_server();
    let mut run = Run::start(scene.stream(&["--no-audio", "--control", "s.sock"]));
    run.hears("x real time");
    let stream = UnixStream::connect(scene.path("s.sock")).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap()).lines();
    for (line, answer) in [("grain 0.8", "grain 0.8"), ("rubbish", "error: \"rubbish\""), ("quit", "ending")] {
        writeln!(&stream, "{line}").unwrap();
        let said = answers.next().unwrap().unwrap();
        assert!(said.contains(answer), "{line}: {said}");
    }
    assert_eq!(run.ends(), 0);
    assert!(!scene.path("s.sock").exists(), "the socket is left behind");
}

#[test]
fn where_nobody_hears_or_reads_any_more_it_ends() {
    let scene = Scene::without_server();
    let mut command = scene.stream(&["--no-audio", "--to", "-"]);
    let mut run = Run { said: mpsc::channel().1, child: command.spawn().unwrap() };
    let mut stdout = run.child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0; 100_000]).unwrap();
    drop(stdout);
    assert_eq!(run.ends(), 1);
    // Nor does it where there is no room.
    let full = scene.stream(&["--no-audio", "--to", "/dev/full"]).output().unwrap();
    let said = String::from_utf8(full.stderr).unwrap();
    assert!(said.contains("error: /dev/full: No space left on device"), "{said}");
    assert_eq!(full.status.code(), Some(1));
}

#[test]
fn bare_samples_appear_whole_and_replace_nothing_before() {
    let scene = Scene::without_server();
    std::fs::write(scene.path("made.raw"), "precious").unwrap();
    let to = ["--no-audio", "--clock", "simulated", "--seconds", "0.5", "--to", "made.raw", "--format", "s16le"];
    let refused = scene.stream(&to).output().unwrap();
    assert!(String::from_utf8(refused.stderr).unwrap().contains("made.raw: already exists"));
    let failed = scene.stream(&[&to[..], &["--force", "--control", "no/such/socket"]].concat()).output().unwrap();
    assert_eq!((failed.status.code(), std::fs::read(scene.path("made.raw")).unwrap()), (Some(1), b"precious".to_vec()));
    assert!(scene.stream(&[&to[..], &["--force"]].concat()).status().unwrap().success());
    assert_eq!(scene.path("made.raw").metadata().unwrap().len(), 4 * 24_000);
}

#[test]
fn errors_are_told_where_all_else_is_quiet_and_settings_without_use_are_refused() {
    let scene = Scene::without_server();
    let mut command = scene.stream(&["--no-audio", "--quiet", "--control", "-"]);
    command.stdin(Stdio::piped());
    let mut run = Run::start(command);
    run.says("sing");
    run.hears("error: \"sing\": no such request");
    run.says("quit");
    assert_eq!(run.ends(), 0);
    let refused = scene.stream(&["--rate", "44100"]).output().unwrap();
    assert!(String::from_utf8(refused.stderr).unwrap().contains("--no-audio"));
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn pipes_get_an_endless_wav_or_bare_samples() {
    let scene = Scene::without_server();
    let play = |format: &str| {
        let args =
            ["--no-audio", "--to", "-", "--seconds", "0.5", "--format", format, "--rate", "16000", "--channels", "1"];
        let output = scene.stream(&args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let (wav, bare) = (play("i16"), play("s16le"));
    assert_eq!((&wav[..4], &wav[4..8], bare.len()), (&b"RIFF"[..], &[0xff; 4][..], 2 * 8000));
    assert!(wav.ends_with(&bare), "the WAV's samples are not the bare ones");
    assert_eq!(play("f32le").len(), 4 * 8000);
}
