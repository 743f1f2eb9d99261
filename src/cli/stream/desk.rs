//! Turns requests from keys, lines and sockets into orders to the stream, and its reports into answers.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, Clip, SampleFormat, Tail, WavFormat};
use wavegen::checkpoint::Checkpoint;
use wavegen::generate::{CONTEXT_S, Intervention, Options, Prompt};
use wavegen::live::control::{FADE_S, HELP, MOST_LISTEN_S, RAMP_S};
use wavegen::live::stream::Stats;
use wavegen::live::{Change, Order, Report, Request, Voice};
use wavegen::plan::bands_of;
use wavegen::sink;

use super::super::common::{interrupted, is_pipe, one_line};
use super::super::engine::Loaded;
use super::super::keys::{Asked, CLOSED, KEYS};
use super::super::play::describe;
use super::listening::Listening;
use super::outlet::Outlet;
use super::screen::Screen;
use super::{Args, MOST_PRELUDE_S, song};

/// How often keys, messages and the status line are looked after.
const TICK: Duration = Duration::from_millis(20);
const STATUS: Duration = Duration::from_millis(500);
/// Seconds in which it falls silent to listen.
const HUSH_S: f32 = 0.2;
/// How much longer its own music may be heard: a plan frame on its way, and what a room gives back.
const ROOM_MS: f64 = 150.0;

/// What requests have set.
pub struct Settings {
    pub options: Options,
    pub held: bool,
    pub volume: f32,
    pub muted: bool,
}

/// Who waits for what.
#[derive(Default)]
pub struct Pending {
    pub answer: Option<Sender<String>>,
    /// What is said when it is done, if anything.
    pub said: Option<String>,
    /// Where a take goes.
    pub path: Option<PathBuf>,
}

/// Where requests come in and answers go out.
pub struct Desk<'a> {
    pub args: &'a Args,
    pub checkpoint: &'a Checkpoint,
    pub loaded: &'a Loaded<'a>,
    pub order: Sender<Order>,
    pub outlet: Outlet,
    pub screen: Screen,
    pub stats: Arc<Stats>,
    pub settings: Settings,
    pub listening: Option<Listening>,
    /// Whether there is anything to play yet; with --listen there is not until somebody was listened to.
    pub heard: bool,
    /// Whether all that was to be recorded was.
    pub recorded: bool,
    /// Orders that were not yet carried out.
    pub pending: VecDeque<Pending>,
    pub interventions: Vec<Intervention>,
    pub buffer_ms: f64,
    pub ended: bool,
    pub failed: Option<wavegen::generate::GenerateError>,
}

impl Desk<'_> {
    /// Looks after everything until the music ends; somebody can ask as long.
    pub fn attend(&mut self, asked: &Receiver<Asked>, reports: &Receiver<Report>) -> Result<()> {
        let (mut stopping, mut shown) = (false, Instant::now());
        while !self.ended {
            if let Ok(asked) = asked.recv_timeout(TICK) {
                stopping |= self.hear(asked);
            }
            loop {
                match reports.try_recv() {
                    Ok(report) => self.read(report)?,
                    Err(TryRecvError::Empty) => break,
                    // The thread ended badly.
                    Err(TryRecvError::Disconnected) => {
                        self.ended = true;
                        break;
                    }
                }
            }
            if interrupted() || stopping {
                stopping = true;
                let _ = self.order.send(Order::Stop);
            } else {
                self.look_after_device();
                self.look_after_listening();
            }
            if shown.elapsed() > STATUS {
                shown = Instant::now();
                let status = self.status();
                self.screen.line(&status);
            }
        }
        Ok(())
    }

    fn read(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Primed => self.outlet.begin()?,
            Report::Changed(back_s) => {
                if let Some(Pending { answer, said: Some(said), .. }) = self.pending.pop_front() {
                    let back = if back_s > 0.0 { format!(" (from {back_s:.1} s ago)") } else { String::new() };
                    self.reply(answer, &format!("{said}{back}"));
                }
            }
            Report::Took(clip) => {
                if let Some(Pending { answer, path, .. }) = self.pending.pop_front() {
                    match save_take(&clip, path) {
                        Ok(text) => self.reply(answer, &text),
                        Err(error) => self.refuse(answer, &error),
                    }
                }
            }
            Report::Intervened(intervention) => {
                self.screen.note(&describe(&intervention));
                self.interventions.push(intervention);
            }
            // Nobody hears what is neither played nor recorded.
            Report::NotRecorded(error) if self.outlet.device.is_none() => return Err(error.into()),
            Report::NotRecorded(error) => {
                self.recorded = false;
                self.screen.warn(&format!("warning: nothing more is recorded: {error}"));
            }
            Report::Failed(error) => self.failed = Some(error),
            Report::Ended => self.ended = true,
        }
        Ok(())
    }

    fn look_after_device(&mut self) {
        if let Some(reason) = self.outlet.loss() {
            self.screen.warn(&format!("warning: the sound device is lost ({reason}); looking for it every second"));
        }
        if let Some((name, feed)) = self.outlet.reopen(self.args.device.as_deref()) {
            self.screen.note(&format!("{name}: the music goes on"));
            let _ = self.order.send(Order::Feed(feed));
        }
    }

    fn look_after_listening(&mut self) {
        let Some(listening) = self.listening.take() else { return };
        let joined = match listening.is_done() {
            Ok(true) => self.join_in(listening, None),
            Ok(false) => {
                self.listening = Some(listening);
                Ok(())
            }
            Err(error) => self.speak_again(None).and(Err(error)),
        };
        if let Err(error) = joined {
            self.refuse(None, &error);
        }
    }

    fn reply(&self, answer: Option<Sender<String>>, text: &str) {
        match answer {
            // Who asked may have gone.
            Some(answer) => drop(answer.send(text.to_owned())),
            None => self.screen.note(text),
        }
    }

    /// Says why something cannot be, even where only errors are to be told.
    fn refuse(&self, answer: Option<Sender<String>>, error: &Error) {
        let text = format!("error: {}", one_line(error));
        match answer {
            None => self.screen.warn(&text),
            answer => self.reply(answer, &text),
        }
    }

    /// Hears one request; `true` to end.
    fn hear(&mut self, Asked { line, answer }: Asked) -> bool {
        if line == CLOSED {
            self.screen.note("control: standard input is closed, the music goes on; Ctrl-C ends it");
            return false;
        }
        let request = match line.strip_prefix("key ").filter(|_| answer.is_none()) {
            Some(key) => self.key(key),
            None => Request::parse(&line).map_err(Error::from),
        };
        request.and_then(|request| self.order(request, answer.clone())).unwrap_or_else(|error| {
            self.refuse(answer, &error);
            false
        })
    }

    /// Keys that step or switch.
    fn key(&self, key: &str) -> Result<Request> {
        let Settings { options, held, muted, .. } = &self.settings;
        let step = |value: f32, by: f32, most: f32| ((value + by).clamp(0.0, most) * 100.0).round() / 100.0;
        let by = if key.ends_with('+') { 0.05 } else { -0.05 };
        Ok(match key {
            "hold" => Request::Hold(!held),
            "mute" => Request::Mute { muted: !muted, seconds: RAMP_S },
            "fade" => Request::Mute { muted: !muted, seconds: FADE_S },
            "temperature +" | "temperature -" => Request::Temperature(step(options.plan.temperature, by, 10.0)),
            "top-p +" | "top-p -" => Request::TopP(step(options.plan.top_p, by, 1.0)),
            "grain +" | "grain -" => Request::Grain(step(options.wave.grain, by, 10.0)),
            "seed" => Request::Seed(options.seed.wrapping_add(1)),
            "help" => Request::Help,
            other => bail!("{other:?} is no key"),
        })
    }

    /// Has a request carried out; `true` to end.
    fn order(&mut self, request: Request, answer: Option<Sender<String>>) -> Result<bool> {
        let (order, said) = match request {
            Request::Quit => {
                self.reply(answer, "ending");
                return Ok(true);
            }
            Request::Status => {
                let status = self.status();
                self.reply(answer, &status);
                return Ok(false);
            }
            Request::Help => {
                let help = if answer.is_none() && self.screen.raw { KEYS } else { HELP };
                self.reply(answer, help);
                return Ok(false);
            }
            Request::Temperature(value) => {
                self.settings.options.plan.temperature = value;
                (self.change_options(), format!("temperature {value}"))
            }
            Request::TopP(value) => {
                self.settings.options.plan.top_p = value;
                (self.change_options(), format!("top-p {value}"))
            }
            Request::Grain(value) => {
                self.settings.options.wave.grain = value;
                (self.change_options(), format!("grain {value}"))
            }
            Request::Seed(seed) => {
                self.settings.options.seed = seed;
                (self.change_options(), format!("seed {seed}"))
            }
            Request::Volume(volume) => {
                (self.settings.volume, self.settings.muted) = (volume, false);
                self.heard |= self.listening.is_none();
                (self.change_volume(RAMP_S), format!("volume {volume}"))
            }
            Request::Mute { muted, seconds } => {
                self.settings.muted = muted;
                self.heard |= self.listening.is_none();
                let volume = if muted { 0.0 } else { self.settings.volume };
                (self.change_volume(seconds), format!("volume {volume}"))
            }
            Request::Hold(held) => {
                self.settings.held = held;
                (Order::Change(Change::Hold(held)), if held { "held" } else { "going on" }.to_owned())
            }
            Request::Vary(seconds) => (Order::Change(Change::Vary(seconds)), "another way".to_owned()),
            Request::Own => {
                self.settings.held = false;
                (Order::Change(Change::Follow(None)), "its own way".to_owned())
            }
            Request::Follow(file) => {
                let (name, Tail { clip, total_frames, .. }) = decode(&file, MOST_PRELUDE_S)?;
                let n_frames = clip.n_frames() as u64;
                let part =
                    if n_frames < total_frames { format!("the last {MOST_PRELUDE_S:.0} s of ") } else { String::new() };
                let prompt = Prompt::new(&clip, n_frames, &self.checkpoint.config.codec)?;
                if prompt.is_silent() {
                    bail!("{name}: is silent");
                }
                let bands = bands_of(&self.loaded.stream()?.plan_of(prompt.tokens())?);
                self.settings.held = false;
                (Order::Change(Change::Follow(Some(Arc::new(bands)))), format!("following {part}{name}"))
            }
            Request::Prompt(file) => {
                let (name, tail) = decode(&file, CONTEXT_S)?;
                let clip = song::reshaped(&tail.clip, self.outlet.shape)?;
                let prompt = song::prompt_after(&clip, &self.checkpoint.config.codec)?.without_offsets();
                if prompt.is_silent() {
                    bail!("{name}: its end is silent");
                }
                let voice = self.voice_after(&prompt)?;
                self.play(voice, format!("playing on after {name}"), answer)?;
                self.listening = None;
                self.heard = true;
                self.speak_again(None)?;
                return Ok(false);
            }
            Request::Listen(seconds) => {
                self.listen(seconds, answer)?;
                return Ok(false);
            }
            Request::Take { seconds, path } => {
                self.send(Order::Take(seconds), Pending { answer, said: None, path })?;
                return Ok(false);
            }
        };
        self.send(order, Pending { answer, said: Some(said), path: None })?;
        Ok(false)
    }

    fn send(&mut self, order: Order, pending: Pending) -> Result<()> {
        self.pending.push_back(pending);
        if self.order.send(order).is_err() {
            bail!("the music has ended");
        }
        Ok(())
    }

    /// Falls silent and listens; where it listens already, that was enough, and it plays on from there.
    pub fn listen(&mut self, seconds: Option<f64>, answer: Option<Sender<String>>) -> Result<()> {
        if let Some(listening) = self.listening.take() {
            return self.join_in(listening, answer);
        }
        // So long its own music is heard yet, if there was any.
        let own_ms = 1e3 * f64::from(HUSH_S) + self.buffer_ms + self.outlet.latency_ms() + ROOM_MS;
        let deaf_s = if self.heard { own_ms / 1e3 } else { 0.0 };
        let listening = Listening::start(self.args.source.as_deref(), seconds, deaf_s)?;
        let until = match seconds {
            Some(seconds) => format!("for {seconds} s"),
            None => format!("until `listen` is said again (key: l), {MOST_LISTEN_S} s at most"),
        };
        let said = Some(format!("listening to {} {until}", listening.name));
        self.listening = Some(listening);
        // Where the music has ended, the next order says so.
        let _ = self.order.send(Order::Listen);
        self.send(self.change_volume(HUSH_S), Pending { answer, said, path: None })
    }

    /// Plays on from what was heard, or where that was nothing as before.
    fn join_in(&mut self, mut listening: Listening, answer: Option<Sender<String>>) -> Result<()> {
        // The input is closed after the voice is on its way: that takes time.
        match self.answer_to(&mut listening) {
            Ok((voice, said, heard)) => {
                self.play(voice, said, answer)?;
                self.speak_again(Some(heard))
            }
            Err(error) => self.speak_again(None).and(Err(error)),
        }
    }

    /// A voice that goes on after what was heard, where that would be by the time that it is heard; what is said of it, and what was heard
    /// and how long before.
    fn answer_to(&self, listening: &mut Listening) -> Result<(Voice, String, (Clip, f64))> {
        let heard = listening.heard.clip();
        let (played, since_s) = song::played(&heard)?;
        let said = format!("playing on after {:.1} s of {}", played.duration_s(), listening.name);
        let played = song::reshaped(&played, self.outlet.shape)?;
        let prompt = song::prompt_after(&played, &self.checkpoint.config.codec)?.without_offsets();
        let mut voice = self.voice_after(&prompt)?;
        let on_the_way_ms = listening.input.latency_ms() + self.buffer_ms + self.outlet.latency_ms();
        let ago_s = || listening.heard.since_s() + on_the_way_ms / 1e3;
        voice.skip(|| since_s + ago_s())?;
        Ok((voice, said, (heard, ago_s())))
    }

    fn voice_after(&self, prompt: &Prompt) -> Result<Voice> {
        let governed = self.args.sampling.governor.is_on();
        Ok(Voice::new(self.loaded.stream()?, &self.settings.options, prompt, governed)?)
    }

    /// Changes to another voice.
    fn play(&mut self, voice: Voice, said: String, answer: Option<Sender<String>>) -> Result<()> {
        self.settings.held = false;
        let pending = Pending { answer, said: Some(said), path: None };
        self.send(Order::Change(Change::Voice(Box::new(voice))), pending)
    }

    /// Back to the volume that was set, after listening; what was heard, and how long before the voice changed, is recorded.
    fn speak_again(&mut self, heard: Option<(Clip, f64)>) -> Result<()> {
        self.heard |= heard.is_some();
        self.send(self.change_volume(RAMP_S), Pending::default())?;
        let (samples, ago_s) = match heard {
            Some((clip, ago_s)) => (song::reshaped(&clip, self.outlet.shape)?.samples, ago_s),
            None => (Vec::new(), 0.0),
        };
        let _ = self.order.send(Order::Heard { samples, ago_s });
        Ok(())
    }

    /// The volume as it is to be now: no music plays into what is listened to.
    fn gain(&self) -> f32 {
        let silent = self.settings.muted || !self.heard || self.listening.is_some();
        if silent { 0.0 } else { self.settings.volume }
    }

    fn change_volume(&self, seconds: f32) -> Order {
        Order::Change(Change::Volume { gain: self.gain(), seconds })
    }

    fn change_options(&self) -> Order {
        Order::Change(Change::Options(self.settings.options))
    }

    fn status(&self) -> String {
        let rate = f64::from(self.outlet.shape.0);
        let (underruns, _) = self.outlet.underruns();
        let latency_ms = self.outlet.latency_ms();
        let held = if self.settings.held { ", held" } else { "" };
        let muted = if self.settings.muted { ", muted" } else { "" };
        let listening = self.listening.as_ref();
        let listening = listening.map_or(String::new(), |of| format!(", listening {:.1} s", of.heard.seconds()));
        format!(
            "{:.1} s, {:.1} x real time, buffer {:.0} of {:.0} ms + {latency_ms:.0}, {underruns} underruns, surprisal {:.1} bits{held}{muted}{listening}",
            self.stats.frames() as f64 / rate,
            self.stats.x_real_time(),
            1e3 * self.stats.waiting() as f64 / rate,
            self.buffer_ms,
            self.stats.surprisal_bits()
        )
    }
}

/// A file's name and its last seconds.
fn decode(file: &Path, seconds: f64) -> Result<(String, Tail)> {
    if is_pipe(file) {
        bail!("-: give a file");
    }
    let source = AudioSource::open(file)?;
    Ok((source.name().to_owned(), decode_tail(&source, seconds)?))
}

/// Writes a take, without a name to `wavegen-take-N.wav`; tells where.
fn save_take(clip: &Clip, path: Option<PathBuf>) -> Result<String> {
    let name = |n: u32| PathBuf::from(format!("wavegen-take-{n}.wav"));
    let path = match path {
        Some(path) if is_pipe(&path) || sink::is_device(&path) => {
            bail!("{}: give a new file", path.display())
        }
        Some(path) => path,
        None => (1..10_000).map(name).find(|path| !path.exists()).context("there are 9,999 takes here already")?,
    };
    let mut sink = sink::open(&path, false)?;
    sink.start(&WavFormat::new(clip.sample_rate, clip.channels, SampleFormat::I16))?;
    sink.write(&clip.samples)?;
    sink.finish()?;
    Ok(format!("{:.1} s saved in {}", clip.duration_s(), path.display()))
}
