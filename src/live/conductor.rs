//! Turns a voice into frames for a device, one plan frame at a time, and requests into what they change.

use std::collections::VecDeque;
use std::sync::Arc;

use ndarray::Array2;

use crate::audio::Clip;
use crate::generate::{GenerateError, Guide, Intervention, Options};

use super::control::MOST_TAKE_S;
use super::voice::{CROSSFADE_S, Leaving, Voice};

/// What is to change, with all that has to be read or computed for it.
pub enum Change {
    /// Draw otherwise.
    Options(Options),
    /// Volume as a factor, reached in so many seconds.
    Volume { gain: f32, seconds: f32 },
    /// Freeze on the frame that plays, or go on.
    Hold(bool),
    /// Go back these seconds and take another way.
    Vary(f64),
    /// Play these plan frames, `[n_frames, n_bands]`; `None`: the model's own.
    Follow(Option<Arc<Array2<f32>>>),
    /// Play this instead, at the same rate and channels.
    Voice(Box<Voice>),
}

/// What plays.
pub struct Conductor {
    voice: Voice,
    /// Plan of the frame that was played last.
    bands: Vec<f32>,
    /// It is to hold its first frame, which has not been played yet.
    holds_first: bool,
    /// While it holds: where the plan came from before, and since which frame.
    held: Option<(Guide, u64)>,
    /// The end of the voice that was left.
    leaving: Leaving,
    volume: Volume,
    /// The last frames for the device, interleaved, and of all that there were those since the voice changed, in samples.
    played: VecDeque<f32>,
    most_played: usize,
    since_change: usize,
    made: Vec<f32>,
    surprisal: f32,
    interventions: Vec<Intervention>,
}

/// A gain on its way to another.
#[derive(Clone, Copy)]
struct Volume {
    gain: f64,
    target: f64,
    step: f64,
}

impl Conductor {
    /// Plays `voice`.
    pub fn new(voice: Voice) -> Self {
        let (sample_rate, channels) = voice.shape();
        let most_played = (MOST_TAKE_S * f64::from(sample_rate)) as usize * channels;
        Self {
            voice,
            bands: Vec::new(),
            holds_first: false,
            held: None,
            leaving: Leaving::default(),
            volume: Volume { gain: 1.0, target: 1.0, step: 1.0 },
            played: VecDeque::with_capacity(most_played),
            most_played,
            since_change: 0,
            made: Vec::new(),
            surprisal: 0.0,
            interventions: Vec::new(),
        }
    }

    /// Frames per second and channels of what is played.
    pub fn shape(&self) -> (u32, usize) {
        self.voice.shape()
    }

    /// Seconds of a plan frame: what a step makes.
    pub fn step_s(&self) -> f64 {
        self.voice.step_s()
    }

    /// How it draws.
    pub fn options(&self) -> &Options {
        self.voice.path.options()
    }

    /// -log2 P of the plan over the last frames, bits a frame.
    pub fn surprisal_bits(&self) -> f32 {
        self.surprisal / std::f32::consts::LN_2
    }

    /// What the governor did since this was last asked.
    pub fn interventions(&mut self) -> Vec<Intervention> {
        std::mem::take(&mut self.interventions)
    }

    /// Whether it has run as far ahead as its governor wants it to.
    pub fn is_ahead(&self) -> bool {
        self.voice.path.is_ahead()
    }

    /// Runs ahead, by a frame or by a look at what might come; says whether it was a frame.
    ///
    /// # Errors
    /// The engine's own.
    pub fn advance(&mut self) -> Result<bool, GenerateError> {
        Ok(self.voice.path.advance(self.voice.engine.as_mut())?)
    }

    /// Appends what the next plan frame settles to `out`, interleaved.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next(&mut self, out: &mut Vec<f32>) -> Result<(), GenerateError> {
        let mut made = std::mem::take(&mut self.made);
        made.clear();
        let frame = self.voice.next(&mut made)?;
        self.surprisal += 0.03 * (frame.draw.surprisal - self.surprisal);
        self.interventions.extend(self.voice.path.interventions());
        self.bands = frame.plan.bands;
        if std::mem::take(&mut self.holds_first) {
            self.apply(Change::Hold(true))?;
        }
        self.leaving.fade_into(&mut made, self.shape().1);
        self.send(&made, out);
        self.made = made;
        Ok(())
    }

    /// Appends frames that were there before, such as the prompt, at the present volume.
    pub fn send(&mut self, interleaved: &[f32], out: &mut Vec<f32>) {
        let (first, channels) = (out.len(), self.shape().1);
        out.extend_from_slice(interleaved);
        self.volume.apply(&mut out[first..], channels);
        let surplus = (self.played.len() + interleaved.len()).saturating_sub(self.most_played);
        self.played.drain(..surplus.min(self.played.len()));
        self.played.extend(&out[first..]);
        self.since_change += out.len() - first;
    }

    /// What would have come next, interleaved, will not: its beginning fades out under what comes instead.
    pub fn leave(&mut self, rest: &[f32]) {
        let (sample_rate, channels) = self.shape();
        let n = (CROSSFADE_S * f64::from(sample_rate)) as usize * channels;
        self.leaving = Leaving::of(rest[..n.min(rest.len())].to_vec());
    }

    /// Adds what a musician played, interleaved, to what was played, so that it ends `ago_s` before the voice changed. Gives how many
    /// samples have been sent since that end.
    pub fn add(&mut self, heard: &[f32], ago_s: f64) -> usize {
        let (sample_rate, channels) = self.shape();
        let before = self.since_change + (ago_s.max(0.0) * f64::from(sample_rate)) as usize * channels;
        let until = self.played.len().saturating_sub(before);
        self.played.range_mut(..until).rev().zip(heard.iter().rev()).for_each(|(sum, x)| *sum += x);
        before
    }

    /// What was played in the last `seconds`.
    pub fn take(&mut self, seconds: f64) -> Clip {
        let (sample_rate, channels) = self.shape();
        let wanted = (seconds * f64::from(sample_rate)) as usize * channels;
        let from = self.played.len().saturating_sub(wanted);
        Clip { samples: self.played.range(from..).copied().collect(), channels, sample_rate }
    }

    /// Changes what is played from the next frame on; gives how far it went back, seconds, if it did.
    ///
    /// # Errors
    /// The engine's own.
    pub fn apply(&mut self, change: Change) -> Result<f64, GenerateError> {
        let Voice { engine, path, .. } = &mut self.voice;
        let engine = engine.as_mut();
        match change {
            Change::Options(options) => path.set_options(engine, &options)?,
            Change::Volume { gain, seconds } => {
                let n = (f64::from(seconds) * f64::from(self.shape().0)).max(1.0);
                self.volume.target = gain.into();
                self.volume.step = (self.volume.target - self.volume.gain) / n;
            }
            Change::Hold(held) if self.bands.is_empty() => self.holds_first = held,
            Change::Hold(true) if self.held.is_none() => {
                self.held = Some((path.guide().clone(), path.released()));
                path.set_guide(engine, Guide::Still(self.bands.clone()))?;
            }
            Change::Hold(true) => {}
            Change::Hold(false) => {
                if let Some((guide, since)) = self.held.take() {
                    let frames = path.released().saturating_sub(since);
                    path.set_guide(engine, guide.later(frames))?;
                }
            }
            Change::Follow(bands) => {
                (self.holds_first, self.held) = (false, None);
                let start = path.released();
                path.set_guide(engine, bands.map_or(Guide::Own, |bands| Guide::Other { bands, start }))?;
            }
            Change::Vary(seconds) => return self.voice.vary(seconds),
            Change::Voice(voice) => {
                if self.leaving.is_over() {
                    let mut last = Vec::new();
                    self.voice.next(&mut last)?;
                    self.leave(&last);
                }
                self.voice = *voice;
                self.bands.clear();
                (self.holds_first, self.held, self.since_change) = (false, None, 0);
            }
        }
        Ok(0.0)
    }
}

impl Volume {
    fn apply(&mut self, interleaved: &mut [f32], channels: usize) {
        if self.gain == self.target && self.gain == 1.0 {
            return;
        }
        for frame in interleaved.chunks_exact_mut(channels) {
            let next = self.gain + self.step;
            // Past the target, or as near as floats come to it.
            let there = (self.target - next) * self.step <= 0.0;
            self.gain = if there { self.target } else { next };
            frame.iter_mut().for_each(|x| *x *= self.gain as f32);
        }
    }
}
