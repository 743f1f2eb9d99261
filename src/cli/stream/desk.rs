//! Turns requests from keys, lines and sockets into orders to the stream, and its reports into answers.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, Clip, SampleFormat, WavFormat};
use wavegen::checkpoint::Checkpoint;
use wavegen::generate::{Intervention, Options, Path as Continuation, Prompt};
use wavegen::live::control::{HELP, RAMP_S};
use wavegen::live::stream::Stats;
use wavegen::live::{Change, Order, Report, Request};
use wavegen::plan::bands_of;
use wavegen::sink;

use super::super::common::{interrupted, is_pipe, one_line};
use super::super::engine::Loaded;
use super::super::keys::{Asked, CLOSED, KEYS};
use super::super::play::describe;
use super::outlet::Outlet;
use super::screen::Screen;
use super::{Args, MOST_PRELUDE_S};

/// How often keys, messages and the status line are looked after.
const TICK: Duration = Duration::from_millis(20);
const STATUS: Duration = Duration::from_millis(500);

/// What requests have set.
pub struct Settings {
    pub options: Options,
    pub held: bool,
    pub volume: f32,
}

/// Who waits for what.
pub struct Pending {
    pub answer: Option<Sender<String>>,
    pub said: String,
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
    /// Orders that were not yet carried out.
    pub pending: VecDeque<Pending>,
    pub interventions: Vec<Intervention>,
    pub buffer_ms: f64,
    pub ended: bool,
    pub failed: Option<wavegen::generate::GenerateError>,
}

/// A song that was loaded for a change.
struct Song {
    name: String,
    prompt: Prompt,
}

impl Desk<'_> {
    /// Looks after everything until the music ends.
    pub fn attend(&mut self, asked: &Receiver<Asked>, reports: &Receiver<Report>) -> Result<()> {
        let (mut stopping, mut shown) = (false, Instant::now());
        while !self.ended {
            match asked.recv_timeout(TICK) {
                Ok(asked) => stopping |= self.hear(asked),
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody can ask.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            for report in reports.try_iter() {
                self.read(report)?;
            }
            if interrupted() || stopping {
                stopping = true;
                let _ = self.order.send(Order::Stop);
            }
            self.look_after_device();
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
                if let Some(Pending { answer, said, .. }) = self.pending.pop_front() {
                    let back = if back_s > 0.0 { format!(" (from {back_s:.1} s ago)") } else { String::new() };
                    self.reply(answer, &format!("{said}{back}"));
                }
            }
            Report::Took(clip) => {
                if let Some(Pending { answer, path, .. }) = self.pending.pop_front() {
                    let text = match save_take(&clip, path) {
                        Ok(text) => text,
                        Err(error) => format!("error: {}", one_line(&error)),
                    };
                    self.reply(answer, &text);
                }
            }
            Report::Intervened(intervention) => {
                self.screen.note(&describe(&intervention));
                self.interventions.push(intervention);
            }
            Report::NotRecorded(error) => {
                self.screen.warn(&format!("warning: recording ended, the music goes on: {error}"));
            }
            Report::Failed(error) => self.failed = Some(error),
            Report::Ended => self.ended = true,
        }
        Ok(())
    }

    fn look_after_device(&mut self) {
        if let Some(reason) = self.outlet.loss(self.stats.waiting()) {
            self.screen.warn(&format!("warning: the sound device is lost ({reason}); looking for it every second"));
        }
        if let Some((name, feed)) = self.outlet.reopen(self.args.device.as_deref()) {
            self.screen.note(&format!("{name}: the music goes on"));
            let _ = self.order.send(Order::Feed(feed));
        }
    }

    fn reply(&self, answer: Option<Sender<String>>, text: &str) {
        match answer {
            // Who asked may have gone.
            Some(answer) => drop(answer.send(text.to_owned())),
            None => self.screen.note(text),
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
            None => Request::parse(&line).map_err(|error| error.to_string()),
        };
        match request.map(|request| self.order(request, answer.clone())) {
            Ok(Ok(ends)) => ends,
            Ok(Err(error)) => {
                self.reply(answer, &format!("error: {}", one_line(&error)));
                false
            }
            Err(nonsense) => {
                self.reply(answer, &format!("error: {nonsense}"));
                false
            }
        }
    }

    /// Keys that step or switch.
    fn key(&self, key: &str) -> Result<Request, String> {
        let Settings { options, held, volume } = &self.settings;
        let step = |value: f32, by: f32, most: f32| ((value + by).clamp(0.0, most) * 100.0).round() / 100.0;
        let by = if key.ends_with('+') { 0.05 } else { -0.05 };
        Ok(match key {
            "hold" => Request::Hold(!held),
            "mute" => Request::Volume { gain: if *volume > 0.0 { 0.0 } else { 1.0 }, seconds: RAMP_S },
            "fade" => Request::Volume { gain: if *volume > 0.0 { 0.0 } else { 1.0 }, seconds: 2.0 },
            "temperature +" | "temperature -" => Request::Temperature(step(options.plan.temperature, by, 10.0)),
            "top-p +" | "top-p -" => Request::TopP(step(options.plan.top_p, by, 1.0)),
            "grain +" | "grain -" => Request::Grain(step(options.wave.grain, by, 10.0)),
            "seed" => Request::Seed(options.seed.wrapping_add(1)),
            "help" => Request::Help,
            other => return Err(format!("{other:?} is no key")),
        })
    }

    /// Has a request carried out; `true` to end.
    fn order(&mut self, request: Request, answer: Option<Sender<String>>) -> Result<bool> {
        let mut path = None;
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
            Request::Volume { gain, seconds } => {
                self.settings.volume = gain;
                (Order::Change(Change::Volume { gain, seconds }), format!("volume {gain}"))
            }
            Request::Hold(held) => {
                self.settings.held = held;
                (Order::Change(Change::Hold(held)), if held { "held" } else { "going on" }.to_owned())
            }
            Request::Vary(seconds) => (Order::Change(Change::Vary(seconds)), "another way".to_owned()),
            Request::Own => (Order::Change(Change::Follow(None)), "its own way".to_owned()),
            Request::Follow(file) => {
                let Song { name, prompt } = self.load(&file)?;
                let bands = bands_of(&self.loaded.stream()?.plan_of(prompt.tokens())?);
                (Order::Change(Change::Follow(Some(Arc::new(bands)))), format!("following {name}"))
            }
            Request::Prompt(file) => {
                let Song { name, prompt } = self.load(&file)?;
                let mut engine = self.loaded.stream()?;
                let governed = self.args.sampling.governor.is_on();
                let path = Continuation::new(engine.as_mut(), &self.settings.options, prompt.tokens(), governed)?;
                self.settings.held = false;
                (Order::Change(Change::Engine(engine, Box::new(path))), format!("playing on after {name}"))
            }
            Request::Take { seconds, path: to } => {
                path = to;
                (Order::Take(seconds), String::new())
            }
        };
        self.pending.push_back(Pending { answer, said, path });
        if self.order.send(order).is_err() {
            bail!("the music has ended");
        }
        Ok(false)
    }

    fn change_options(&self) -> Order {
        Order::Change(Change::Options(self.settings.options))
    }

    fn load(&self, file: &Path) -> Result<Song> {
        if is_pipe(file) {
            bail!("-: give a file");
        }
        let source = AudioSource::open(file)?;
        let tail = decode_tail(&source, MOST_PRELUDE_S)?;
        let prompt = Prompt::new(&tail, &self.checkpoint.config.codec)?;
        if prompt.is_silent() {
            bail!("{}: is silent", source.name());
        }
        Ok(Song { name: source.name().to_owned(), prompt })
    }

    fn status(&self) -> String {
        let rate = f64::from(self.outlet.shape.0);
        let (underruns, _) = self.outlet.underruns();
        let latency_ms = self.outlet.playing.as_ref().map_or(0.0, |playing| playing.latency_ms());
        let held = if self.settings.held { ", held" } else { "" };
        format!(
            "{:.1} s, {:.1} x real time, buffer {:.0} of {:.0} ms + {latency_ms:.0}, {underruns} underruns, surprisal {:.1} bits{held}",
            self.stats.frames() as f64 / rate,
            self.stats.x_real_time(),
            1e3 * self.stats.waiting() as f64 / rate,
            self.buffer_ms,
            self.stats.surprisal_bits()
        )
    }
}

/// Writes a take, without a name to `wavegen-take-N.wav`; tells where.
fn save_take(clip: &Clip, path: Option<PathBuf>) -> Result<String> {
    let name = |n: u32| PathBuf::from(format!("wavegen-take-{n}.wav"));
    let path = match path {
        Some(path) => path,
        None => (1..10_000).map(name).find(|path| !path.exists()).context("there are 9,999 takes here already")?,
    };
    let mut sink = sink::open(&path, false)?;
    sink.start(&WavFormat::new(clip.sample_rate, clip.channels, SampleFormat::I16))?;
    sink.write(&clip.samples)?;
    sink.finish()?;
    Ok(format!("{:.1} s saved in {}", clip.duration_s(), path.display()))
}
