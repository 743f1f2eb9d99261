//! `wavegen stream`: turns a recording, or nothing, into sound on a device for as long as anyone listens.

mod desk;
mod listening;
mod outlet;
mod screen;
mod song;

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Result, bail};
use serde::Serialize;
use wavegen::atomic::remove_parts;
use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, SampleFormat, WavFormat};
use wavegen::checkpoint::Checkpoint;
use wavegen::generate::{Intervention, Options, Prompt};
use wavegen::live::clock::SimulatedClock;
use wavegen::live::control::{LEAST_LISTEN_S, MOST_LISTEN_S};
use wavegen::live::ring::ring;
use wavegen::live::stream::Stats;
use wavegen::live::{Admission, Change, Conductor, Device, Direction, Recording, Speed, Streamer, Voice, device};
use wavegen::sink;

use self::desk::{Desk, Settings};
use self::outlet::Outlet;
use self::screen::Screen;
use super::Outcome;
use super::adapt::fitted;
use super::common::{
    ModelArgs, SamplingArgs, Talk, Usage, catch_interrupt, is_pipe, moment, print, report_damage, seconds,
};
use super::engine::EngineArgs;
use super::familiar::judge;
use super::keys::{KEYS, Keys, Socket, read_stdin};

/// Play a recording and then on and on: the model's music on the speakers, steered while it plays
///
/// Keys in the terminal, lines on standard input (--control -) or on a Unix socket (--control PATH) change what is
/// played. Ctrl-C ends.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen stream song.flac                           the song, and then what the model makes of it
  wavegen stream                                     from nothing
  wavegen stream --listen 8                          hears you play for eight seconds, and goes on
  while sleep 16; do echo listen 8; done | wavegen stream --listen 8 --control -    trading eights
  wavegen stream song.wav --device headphones --to session.wav
  wavegen stream song.wav --no-audio --to - --format s16le | aplay -f S16_LE -r 48000 -c 2
  echo 'temperature 0.9' | wavegen stream song.wav --control -
  wavegen stream song.wav --control /tmp/wavegen.sock
  wavegen stream --no-audio --clock simulated --seconds 86400    a day in a few hours: a soak")]
pub struct Args {
    /// Recording in any audio format, - for standard input; without one it begins from nothing
    #[arg(value_name = "FILE")]
    input: Option<PathBuf>,
    /// Play the recording up to this moment, seconds or M:SS, and then on [default: its end]
    #[arg(long, value_name = "MOMENT", value_parser = moment, requires = "input")]
    from: Option<f64>,
    /// Adapt the model to the recording for so many seconds, as `wavegen adapt` does, before it begins
    #[arg(long, value_name = "SECONDS", value_parser = seconds, requires = "input")]
    adapt: Option<f64>,
    /// Hear what is played to a microphone, and go on from there: for so many seconds [default: until `l` or `listen`, 40 s
    /// at most]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, value_parser = listened, conflicts_with = "input")]
    listen: Option<Option<f64>>,
    /// Listen to this device: its name, or a part of it that no other has [default: the system's choice]
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Name the sound devices and end
    #[arg(long)]
    list_devices: bool,
    /// Play on this device: its name, or a part of it that no other has [default: the system's choice]
    #[arg(long, value_name = "NAME", conflicts_with = "no_audio")]
    device: Option<String>,
    /// Sound that is kept ready, ms [default: what the machine needs]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(5..=600_000))]
    buffer: Option<u32>,
    /// Record what is played, and what was heard in between; - for standard output, what is played, as it is played
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Samples of --to: WAV with u8, i16, i24, i32, f32 or f64; bare s16le or f32le [default: i16]
    #[arg(long, value_name = "FORMAT", requires = "to")]
    format: Option<Recorded>,
    /// Overwrite an existing recording
    #[arg(long)]
    force: bool,
    /// Without a sound device
    #[arg(long)]
    no_audio: bool,
    /// Without a sound device: frames a second
    #[arg(long, value_name = "HZ", default_value = "48000", requires = "no_audio",
        value_parser = clap::value_parser!(u32).range(1000..=768_000))]
    rate: u32,
    /// Without a sound device: channels
    #[arg(long, value_name = "N", default_value = "2", requires = "no_audio",
        value_parser = clap::value_parser!(u8).range(1..=32))]
    channels: u8,
    /// Without a sound device: what paces it [default: simulated where --to is a pipe, which paces by itself; else real]
    #[arg(long, value_enum, requires = "no_audio")]
    clock: Option<Clock>,
    /// End after so long, the recording or the listening included [default: never]
    #[arg(long, short, value_parser = seconds)]
    seconds: Option<f64>,
    /// Take requests from lines on standard input (-) or on a Unix socket that is made at this path
    #[arg(long, value_name = "-|PATH")]
    control: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    talk: Talk,
}

/// What time is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Clock {
    /// As it is
    Real,
    /// Work counts, waiting takes none
    Simulated,
}

/// What a recording is made of.
#[derive(Clone, Copy, Debug)]
enum Recorded {
    Wav(SampleFormat),
    Raw(SampleFormat),
}

impl std::str::FromStr for Recorded {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "s16le" => Ok(Self::Raw(SampleFormat::I16)),
            "f32le" => Ok(Self::Raw(SampleFormat::F32)),
            wav => wav.parse().map(Self::Wav).map_err(|_| {
                format!("'{wav}' is none of u8, i16, i24, i32, f32, f64 (WAV), s16le and f32le (bare samples)")
            }),
        }
    }
}

/// Seconds at the end of a long recording that are played.
const MOST_PRELUDE_S: f64 = 600.0;

pub fn run(args: &Args) -> Result<Outcome> {
    if args.list_devices {
        return list_devices(&args.talk);
    }
    let to_stdout = args.to.as_deref().is_some_and(is_pipe);
    let from_stdin = args.input.as_deref().is_some_and(is_pipe);
    let control_stdin = args.control.as_deref().is_some_and(is_pipe);
    if from_stdin && control_stdin {
        return Err(Usage("standard input cannot be both the recording and the control; give one a file".into()).into());
    }
    if to_stdout && io::stdout().is_terminal() {
        return Err(Usage("standard output is a terminal; give --to a file, or redirect it".into()).into());
    }
    if args.listen.is_some() && args.clock == Some(Clock::Simulated) {
        return Err(Usage("who is listened to takes real time; leave --clock simulated out".into()).into());
    }
    // Refused before anything is loaded.
    if args.listen.is_some() {
        device::find(Direction::Input, args.source.as_deref())?;
    }
    let source = args.input.as_deref().map(AudioSource::open).transpose()?;
    let source = source.map(|source| args.from.into_iter().fold(source, AudioSource::until));
    let output = match args.no_audio {
        true => None,
        false => Some(device::find(Direction::Output, args.device.as_deref())?),
    };
    let (rate, channels) = output.as_ref().map_or((args.rate, args.channels.into()), |d| (d.sample_rate, d.channels));
    let recording = args.to.as_deref().map(|path| open_recording(args, path, rate, channels)).transpose()?;

    let mut checkpoint = args.model.load()?;
    let (prelude, prompt) = match &source {
        Some(source) => read(source, (rate, channels), &checkpoint, &args.talk)?,
        None => (Vec::new(), Prompt::silence_at(&checkpoint.config.codec, rate, song::fronts(channels))),
    };
    if let (Some(adapt_s), Some(source)) = (args.adapt, &source) {
        match fitted(&checkpoint, source, adapt_s, &args.talk)? {
            Some(adapted) => checkpoint = adapted,
            None => return Ok(Outcome::Interrupted),
        }
    }
    let loaded = args.engine.load(&checkpoint, &args.talk)?;
    let options = args.sampling.options(Options { wave: checkpoint.generation, ..Options::default() });
    // What plays until somebody was listened to is not heard.
    let governed = args.sampling.governor.is_on() && args.listen.is_none();
    let voice = Voice::new(loaded.stream()?, &options, &prompt, governed)?;
    judge(&checkpoint, &prompt, voice.context_bits(), true, &args.talk);
    let mut conductor = Conductor::new(voice);
    if args.listen.is_some() {
        conductor.apply(Change::Volume { gain: 0.0, seconds: 0.0 })?;
    }

    let paced_by_pipe = args.no_audio && to_stdout && args.listen.is_none();
    let simulated = args.no_audio && args.clock.map_or(paced_by_pipe, |clock| clock == Clock::Simulated);
    let speed = Speed::measure(&mut conductor)?;
    let buffer_ms = match speed.admit(args.buffer.map(f64::from), args.seconds) {
        Admission::Play { buffer_ms } => buffer_ms,
        // Nobody hears it late.
        Admission::TooSlow if simulated => f64::from(args.buffer.unwrap_or(100)),
        Admission::TooSlow => bail!(
            "this machine is too slow for the model '{}': {:.2} x real time (steps take {:.1} ms, {:.1} at worst); take \
             a smaller one with --model, fewer --choices, play for a while with --seconds and a --buffer of {:.0} ms for every 10 s, or write \
             to a file with --no-audio --clock simulated --to FILE --seconds N",
            checkpoint.config.name,
            speed.x_real_time,
            speed.p50_ms,
            speed.p999_ms,
            // The next measurement may find it a little slower.
            1.2 * speed.needed_ms(10.0)
        ),
    };
    let stats = Arc::new(Stats::default());
    let frames = |seconds: f64| (seconds * f64::from(rate)).round() as u64;
    let streamer = Streamer {
        conductor,
        prelude,
        recording,
        target: frames(buffer_ms / 1e3) as usize,
        most_frames: args.seconds.map(frames),
        stats: stats.clone(),
    };
    let ring_frames = streamer.ring_frames();
    let (feed, pull) = ring(ring_frames, channels, rate);
    let counters = feed.counters().clone();

    catch_interrupt();
    let (ask, asked) = mpsc::channel();
    let (order, orders) = mpsc::channel();
    let (report, reports) = mpsc::channel();
    let _socket = match &args.control {
        Some(path) if !control_stdin => Some(Socket::listen(path, ask.clone())?),
        _ => None,
    };
    if control_stdin {
        read_stdin(ask.clone());
    }
    let on_terminal = !args.talk.quiet && io::stderr().is_terminal();
    let wants_keys = !control_stdin && !from_stdin && on_terminal && io::stdin().is_terminal();
    let keys = wants_keys.then(|| Keys::listen(ask.clone())).transpose()?;
    let screen = Screen { quiet: args.talk.quiet, status: on_terminal, raw: keys.is_some(), shown: false };
    let name = output.as_ref().map_or("no sound device", |device| &device.description);
    screen.note(&format!(
        "{name}: {rate} Hz, {channels} channels, buffer {buffer_ms:.0} ms; {:.1} x real time (steps take {:.1} ms, {:.1} at \
         worst)",
        speed.x_real_time, speed.p50_ms, speed.p999_ms
    ));
    if keys.is_some() {
        screen.note(KEYS);
    }
    let (clock, pull) = match simulated {
        true => (Some(SimulatedClock::new(pull, rate, 1.0)), None),
        false => (None, Some(pull)),
    };
    let begun = Instant::now();
    let thread = std::thread::spawn(move || streamer.run(feed, &orders, &report, clock));
    let mut desk = Desk {
        args,
        checkpoint: &checkpoint,
        loaded: &loaded,
        order,
        outlet: Outlet {
            device: output,
            shape: (rate, channels),
            ring_frames,
            pull,
            playing: None,
            counters,
            before: [0; 2],
            taken: (0, Instant::now()),
            lost: None,
        },
        screen,
        stats,
        settings: Settings { options, held: false, volume: 1.0, muted: false },
        listening: None,
        heard: args.listen.is_none(),
        recorded: true,
        pending: VecDeque::new(),
        interventions: Vec::new(),
        buffer_ms,
        ended: false,
        failed: None,
    };
    let listening = args.listen.map_or(Ok(()), |seconds| desk.listen(seconds, None));
    let attended = listening.and_then(|()| desk.attend(&asked, &reports));
    desk.screen.clear();
    // Where nothing is to be heard, the thread's recording is of no use; it has that still.
    attended.inspect_err(|_| remove_parts())?;
    // Dropping orders ends the thread where it has not ended by itself.
    let Desk { outlet, stats, recorded, interventions, failed, order, .. } = desk;
    drop(order);
    if thread.join().is_err() {
        bail!("the engine's thread ended badly");
    }
    let (underruns, missing) = outlet.underruns();
    drop((outlet, keys));
    if let Some(error) = failed {
        return Err(error.into());
    }
    let played_s = stats.frames() as f64 / f64::from(rate);
    let elapsed_s = begun.elapsed().as_secs_f64();
    let summary = Summary {
        sample_rate: rate,
        channels,
        played_s,
        elapsed_s,
        x_real_time: stats.x_real_time(),
        buffer_ms,
        speed,
        underruns,
        missing_ms: 1e3 * missing as f64 / f64::from(rate),
        interventions,
        to: args.to.as_ref().filter(|_| recorded).map(|path| path.display().to_string()),
    };
    summary.tell(&args.talk);
    args.talk.json(&summary, to_stdout)?;
    Ok(if recorded { Outcome::Done } else { Outcome::Failed })
}

fn list_devices(talk: &Talk) -> Result<Outcome> {
    let devices = device::list()?;
    talk.json(&devices, false)?;
    if !talk.json {
        for Device { direction, name, description, sample_rate, channels, is_default, .. } in &devices {
            let mark = if *is_default { "*" } else { " " };
            let heard = if *direction == Direction::Input { ", --source" } else { "" };
            print(&format!("{mark} {name}: {description}, {sample_rate} Hz, {channels} channels{heard}"))?;
        }
    }
    if devices.is_empty() {
        talk.note("there are no sound devices; --no-audio plays without");
    }
    Ok(Outcome::Done)
}

fn open_recording(args: &Args, path: &Path, rate: u32, channels: usize) -> Result<Recording> {
    let mut sink = sink::open(path, args.force)?;
    sink.start(&match args.format.unwrap_or(Recorded::Wav(SampleFormat::I16)) {
        Recorded::Wav(format) => WavFormat::new(rate, channels, format),
        Recorded::Raw(format) => WavFormat::bare(rate, channels, format),
    })?;
    let is_live = is_pipe(path) || sink::is_device(path);
    Ok(Recording::new(sink, is_live))
}

/// No sample of silence is above this.
const SILENT: f32 = 1e-4;

/// The recording at the device's rate and channels, and its end as a prompt.
fn read(source: &AudioSource, shape: (u32, usize), checkpoint: &Checkpoint, talk: &Talk) -> Result<(Vec<f32>, Prompt)> {
    let tail = decode_tail(source, MOST_PRELUDE_S)?;
    report_damage(source.name(), tail.damaged_packets, &tail.warnings, talk);
    if tail.clip.n_frames() as u64 != tail.total_frames {
        talk.note(&format!("{}: only its last {MOST_PRELUDE_S:.0} s are played", source.name()));
    }
    let clip = song::reshaped(&tail.clip, shape)?;
    let prompt = song::prompt_after(&clip, &checkpoint.config.codec)?;
    if prompt.is_silent() {
        let earlier =
            if clip.samples.iter().any(|x| x.abs() > SILENT) { "play on from before with --from, or " } else { "" };
        bail!("{}: its end is silent, so there is nothing to play on; {earlier}give no file", source.name());
    }
    Ok((clip.samples, prompt))
}

/// Seconds of listening.
fn listened(text: &str) -> Result<f64, String> {
    let seconds = seconds(text)?;
    match (LEAST_LISTEN_S..=MOST_LISTEN_S).contains(&seconds) {
        true => Ok(seconds),
        false => Err(format!("must lie in {LEAST_LISTEN_S} to {MOST_LISTEN_S} seconds")),
    }
}

/// What is told at the end.
#[derive(Serialize)]
struct Summary {
    sample_rate: u32,
    channels: usize,
    played_s: f64,
    elapsed_s: f64,
    x_real_time: f64,
    buffer_ms: f64,
    speed: Speed,
    underruns: u64,
    missing_ms: f64,
    interventions: Vec<Intervention>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
}

impl Summary {
    fn tell(&self, talk: &Talk) {
        let to = self.to.as_ref().filter(|to| *to != "-").map_or(String::new(), |to| format!("; recorded in {to}"));
        talk.note(&format!(
            "{:.1} s played in {:.1} s, {:.1} x real time, {} underruns ({:.0} ms), {} interventions{to}",
            self.played_s,
            self.elapsed_s,
            self.x_real_time,
            self.underruns,
            self.missing_ms,
            self.interventions.len()
        ));
    }
}
