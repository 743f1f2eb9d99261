//! Keeps a ring full from a conductor, in a thread of its own: prompt first, then what the engine makes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use super::clock::SimulatedClock;
use super::{Change, Conductor, Feed};
use crate::audio::{AudioError, Clip};
use crate::generate::{GenerateError, Intervention};
use crate::sink::Sink;

/// How long it sleeps where the ring is full.
const NAP: Duration = Duration::from_millis(2);
/// How often it looks for orders, a new device among them, where the old one is gone.
const PATIENCE: Duration = Duration::from_millis(50);
/// Seconds of the fade at the end.
const END_FADE_S: f32 = 0.01;
/// How much longer than the rest takes it waits until the device has played that; where it was stopped, how long in all.
const DRAIN: Duration = Duration::from_secs(2);

/// What the thread is told.
pub enum Order {
    /// Change what is played.
    Change(Change),
    /// Hand out the last seconds.
    Take(f64),
    /// A new device was opened.
    Feed(Feed),
    /// A musician is listened to, whom the recording is to hear too: it waits for [`Order::Heard`].
    Listen,
    /// What was heard, interleaved, until so many seconds before the last change of voice; nothing if it was nothing.
    Heard { samples: Vec<f32>, ago_s: f64 },
    /// End.
    Stop,
}

/// What the thread tells, one for each [`Order::Change`] and [`Order::Take`], and more.
pub enum Report {
    /// The ring is full for the first time: the device may begin.
    Primed,
    /// A change was made; seconds that it went back.
    Changed(f64),
    /// What was asked for.
    Took(Clip),
    /// The governor did something.
    Intervened(Intervention),
    /// The recording cannot go on; the sound does.
    NotRecorded(AudioError),
    /// Playing cannot go on.
    Failed(GenerateError),
    /// All was played.
    Ended,
}

/// How things are, to be looked at while it plays.
#[derive(Debug, Default)]
pub struct Stats {
    /// Frames made, the prompt's included.
    frames: AtomicU64,
    /// Of them in the ring, and bits of f64: x real time of the last second of steps, bits a plan frame.
    waiting: AtomicU64,
    x_real_time: AtomicU64,
    surprisal: AtomicU64,
}

impl Stats {
    /// Frames made, the prompt's included.
    pub fn frames(&self) -> u64 {
        self.frames.load(Relaxed)
    }

    /// Frames in the ring.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Relaxed)
    }

    /// How fast steps are, over the last seconds.
    pub fn x_real_time(&self) -> f64 {
        f64::from_bits(self.x_real_time.load(Relaxed))
    }

    /// Surprisal of the plan, bits a frame.
    pub fn surprisal_bits(&self) -> f64 {
        f64::from_bits(self.surprisal.load(Relaxed))
    }
}

/// A copy of all that is played, and of what a musician played in between.
pub struct Recording {
    sink: Box<dyn Sink>,
    is_live: bool,
    /// What cannot be written before it is known what was heard meanwhile, interleaved.
    waiting: Option<Vec<f32>>,
}

impl Recording {
    /// Records to a sink that has been started; `is_live`: somebody hears it as it is written, so it waits for nothing and has only what
    /// is played.
    pub fn new(sink: Box<dyn Sink>, is_live: bool) -> Self {
        Self { sink, is_live, waiting: None }
    }

    fn write(&mut self, interleaved: &[f32]) -> Result<(), AudioError> {
        match &mut self.waiting {
            Some(waiting) => waiting.extend_from_slice(interleaved),
            None => self.sink.write(interleaved)?,
        }
        Ok(())
    }

    fn wait(&mut self) {
        if !self.is_live {
            self.waiting.get_or_insert_default();
        }
    }

    /// Adds to what waits so that it ends `before` samples before the end.
    fn add(&mut self, samples: &[f32], before: usize) {
        if let Some(waiting) = &mut self.waiting {
            let until = waiting.len().saturating_sub(before);
            waiting[..until].iter_mut().rev().zip(samples.iter().rev()).for_each(|(sum, x)| *sum += x);
        }
    }

    /// Writes what waits.
    fn go_on(&mut self) -> Result<(), AudioError> {
        match self.waiting.take() {
            Some(waiting) => self.sink.write(&waiting),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Result<(), AudioError> {
        let written = self.go_on();
        self.sink.finish().and(written)
    }
}

/// All that the thread needs.
pub struct Streamer {
    pub conductor: Conductor,
    /// Played first, at the conductor's rate and channels.
    pub prelude: Vec<f32>,
    /// Where a copy of all that is played goes; has been started.
    pub recording: Option<Recording>,
    /// Frames that the ring is kept filled with.
    pub target: usize,
    /// Ends by itself after so many frames.
    pub most_frames: Option<u64>,
    pub stats: Arc<Stats>,
}

impl Streamer {
    /// Frames that a ring has to hold: the target and what one step may add to it.
    pub fn ring_frames(&self) -> usize {
        let (sample_rate, _) = self.conductor.shape();
        self.target + (4.0 * self.conductor.step_s() * f64::from(sample_rate)) as usize
    }

    /// Plays until it is stopped or done. With a `clock`, time is simulated.
    pub fn run(
        mut self,
        feed: Feed,
        orders: &Receiver<Order>,
        reports: &Sender<Report>,
        mut clock: Option<SimulatedClock>,
    ) {
        // Whoever listens may have gone; the music does not stop for that.
        let tell = |report| drop(reports.send(report));
        let mut state = State { feed, at: 0, out: Vec::new(), pushed: 0, spent_s: 0.0, frame_s: 0.0, primed: false };
        let result = loop {
            match self.obey(&mut state, orders, &tell) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
            if state.feed.is_abandoned() {
                std::thread::sleep(PATIENCE);
                continue;
            }
            let begun = Instant::now();
            match self.step(&mut state, &tell) {
                Ok(Did::Everything) => break Ok(()),
                Ok(Did::Work) => {
                    if let Some(clock) = &mut clock
                        && state.primed
                    {
                        clock.work(begun.elapsed().as_secs_f64());
                    }
                }
                Ok(Did::Nothing) => {
                    if !state.primed {
                        state.primed = true;
                        tell(Report::Primed);
                    }
                    match &mut clock {
                        Some(clock) => clock.wait(),
                        None => std::thread::sleep(NAP),
                    }
                }
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = result {
            tell(Report::Failed(error));
        }
        self.end(&mut state, &tell, clock);
        tell(Report::Ended);
    }

    /// Does what was ordered; `false` to end.
    fn obey(
        &mut self,
        state: &mut State,
        orders: &Receiver<Order>,
        tell: &dyn Fn(Report),
    ) -> Result<bool, GenerateError> {
        loop {
            match orders.try_recv() {
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
                Err(TryRecvError::Empty) => return Ok(true),
                Ok(Order::Feed(feed)) => state.feed = feed,
                // Another voice is not to be heard after the rest of the recording, but instead of it.
                Ok(Order::Change(change @ Change::Voice(_))) if state.at < self.prelude.len() => {
                    self.conductor.leave(&self.prelude.split_off(state.at));
                    tell(Report::Changed(self.conductor.apply(change)?));
                }
                Ok(Order::Change(change)) => tell(Report::Changed(self.conductor.apply(change)?)),
                Ok(Order::Take(seconds)) => tell(Report::Took(self.conductor.take(seconds))),
                Ok(Order::Listen) => {
                    if let Some(recording) = &mut self.recording {
                        recording.wait();
                    }
                }
                Ok(Order::Heard { samples, ago_s }) => {
                    let before = self.conductor.add(&samples, ago_s);
                    if let Some(recording) = &mut self.recording {
                        recording.add(&samples, before);
                        self.keep(Recording::go_on, tell);
                    }
                }
            }
        }
    }

    /// One piece of work, whichever is the most urgent.
    fn step(&mut self, state: &mut State, tell: &dyn Fn(Report)) -> Result<Did, GenerateError> {
        let (_, channels) = self.conductor.shape();
        if state.pushed < state.out.len() {
            let n = state.feed.push(&state.out[state.pushed..]) * channels;
            state.pushed += n;
            self.stats.waiting.store(state.feed.waiting() as u64, Relaxed);
            return Ok(if n > 0 { Did::Work } else { Did::Nothing });
        }
        if self.most_frames.is_some_and(|most| self.stats.frames() >= most) {
            return Ok(Did::Everything);
        }
        let begun = Instant::now();
        if state.feed.waiting() < self.target {
            state.out.clear();
            state.pushed = 0;
            self.make(&mut state.at, &mut state.out)?;
            if let Some(most) = self.most_frames {
                let left = usize::try_from(most - self.stats.frames()).unwrap_or(usize::MAX);
                state.out.truncate(left.saturating_mul(channels));
            }
            self.record(&state.out, tell);
            self.stats.frames.fetch_add((state.out.len() / channels) as u64, Relaxed);
            self.conductor.interventions().into_iter().for_each(|done| tell(Report::Intervened(done)));
        } else if !self.conductor.is_ahead() {
            let made = self.conductor.advance()?;
            state.spent_s += begun.elapsed().as_secs_f64();
            if made {
                let frame_s = std::mem::take(&mut state.spent_s);
                state.frame_s += if state.frame_s == 0.0 { frame_s } else { 0.05 * (frame_s - state.frame_s) };
                self.stats.x_real_time.store((self.conductor.step_s() / state.frame_s.max(1e-9)).to_bits(), Relaxed);
            }
            self.stats.surprisal.store(f64::from(self.conductor.surprisal_bits()).to_bits(), Relaxed);
        } else {
            return Ok(Did::Nothing);
        }
        Ok(Did::Work)
    }

    /// Appends to `out` what comes next: the recording, from `at` on, and then what the conductor makes.
    fn make(&mut self, at: &mut usize, out: &mut Vec<f32>) -> Result<(), GenerateError> {
        let (sample_rate, channels) = self.conductor.shape();
        let step = (self.conductor.step_s() * f64::from(sample_rate)) as usize * channels;
        let prelude = &self.prelude[*at..self.prelude.len().min(*at + step)];
        *at += prelude.len();
        match prelude.is_empty() {
            true => self.conductor.next(out),
            false => {
                self.conductor.send(prelude, out);
                Ok(())
            }
        }
    }

    fn record(&mut self, interleaved: &[f32], tell: &dyn Fn(Report)) {
        self.keep(|recording| recording.write(interleaved), tell);
    }

    /// Does something to the recording, which ends where it cannot be done.
    fn keep(&mut self, write: impl FnOnce(&mut Recording) -> Result<(), AudioError>, tell: &dyn Fn(Report)) {
        if let Some(recording) = &mut self.recording
            && let Err(error) = write(recording)
        {
            // What there is stays readable.
            let finished = self.recording.take().map_or(Ok(()), Recording::finish);
            [Err(error), finished].into_iter().filter_map(Result::err).for_each(|e| tell(Report::NotRecorded(e)));
        }
    }

    /// Fades out, lets the device play the rest, and completes the recording.
    fn end(mut self, state: &mut State, tell: &dyn Fn(Report), mut clock: Option<SimulatedClock>) {
        let stopped = self.most_frames.is_none_or(|most| self.stats.frames() < most);
        let (sample_rate, channels) = self.conductor.shape();
        let mut rest = state.out.split_off(state.pushed);
        if stopped {
            let fade = Change::Volume { gain: 0.0, seconds: END_FADE_S };
            let fade_samples = (END_FADE_S * sample_rate as f32) as usize * channels;
            let mut last = Vec::new();
            if self.conductor.apply(fade).is_ok() {
                while last.len() <= fade_samples && self.make(&mut state.at, &mut last).is_ok() {}
                self.record(&last, tell);
                rest.extend(last);
            }
        }
        let begun = Instant::now();
        let waiting = (state.feed.waiting() + rest.len() / channels) as f64 / f64::from(sample_rate);
        let patience = DRAIN + Duration::from_secs_f64(if stopped { 0.0 } else { waiting });
        let mut pushed = 0;
        if !state.primed {
            tell(Report::Primed);
        }
        while begun.elapsed() < patience
            && !state.feed.is_abandoned()
            && (pushed < rest.len() || state.feed.waiting() > 0)
        {
            pushed += state.feed.push(&rest[pushed..]) * channels;
            if pushed == rest.len() {
                state.feed.end();
            }
            match &mut clock {
                Some(clock) => clock.wait(),
                None => std::thread::sleep(NAP),
            }
        }
        state.feed.end();
        if let Some(Err(error)) = self.recording.take().map(Recording::finish) {
            tell(Report::NotRecorded(error));
        }
    }
}

struct State {
    feed: Feed,
    /// Samples of the prelude that were played.
    at: usize,
    /// Made and on its way into the ring.
    out: Vec<f32>,
    pushed: usize,
    /// What the next frame has taken so far, looks at ways among it, and what frames take on the average.
    spent_s: f64,
    frame_s: f64,
    primed: bool,
}

enum Did {
    Work,
    Nothing,
    Everything,
}
