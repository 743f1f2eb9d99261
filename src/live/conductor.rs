//! Turns an engine into frames for a device, one plan frame at a time, and requests into what they change.

use std::collections::VecDeque;
use std::sync::Arc;

use ndarray::Array2;

use crate::audio::Clip;
use crate::codec::Codec;
use crate::engine::Engine;
use crate::generate::{GenerateError, Guide, Intervention, Options, Path, Prompt, Seam};

use super::control::{MOST_TAKE_S, MOST_VARY_S};

/// Seconds over which one way of going on gives way to another.
const CROSSFADE_S: f64 = 0.01;

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
    /// Go on with this engine, which has been given its context.
    Engine(Box<dyn Engine>, Box<Path>),
}

/// What plays.
pub struct Conductor {
    engine: Box<dyn Engine>,
    path: Path,
    seam: Seam,
    codec: Codec,
    /// Plan of the frame that was played last.
    bands: Vec<f32>,
    /// The end of the way that was left, `crossfade` samples of the model.
    leaving: Vec<f32>,
    volume: Volume,
    /// The last frames for the device, interleaved.
    played: VecDeque<f32>,
    most_played: usize,
    made: Vec<f32>,
    surprisal: f32,
    interventions: Vec<Intervention>,
}

/// A gain on its way to another.
#[derive(Clone, Copy)]
struct Volume {
    gain: f32,
    target: f32,
    step: f32,
}

impl Conductor {
    /// Plays on after `prompt`, whose rate and channels are the device's. `path` has been given the prompt's tokens and must
    /// belong to `engine`.
    ///
    /// # Errors
    /// A rate that cannot be resampled.
    pub fn new(engine: Box<dyn Engine>, path: Path, prompt: &Prompt) -> Result<Self, GenerateError> {
        let seam = Seam::soon(prompt)?;
        let most_played = (MOST_TAKE_S * f64::from(seam.sample_rate())) as usize * seam.channels();
        let mut conductor = Self {
            codec: engine.config().codec.clone(),
            engine,
            path,
            seam,
            bands: Vec::new(),
            leaving: Vec::new(),
            volume: Volume { gain: 1.0, target: 1.0, step: 1.0 },
            played: VecDeque::with_capacity(most_played),
            most_played,
            made: Vec::new(),
            surprisal: 0.0,
            interventions: Vec::new(),
        };
        conductor.path.keep(conductor.frames(MOST_VARY_S));
        Ok(conductor)
    }

    /// Frames per second and channels of what is played.
    pub fn shape(&self) -> (u32, usize) {
        (self.seam.sample_rate(), self.seam.channels())
    }

    fn frames(&self, seconds: f64) -> u64 {
        let config = self.engine.config();
        (seconds * f64::from(config.codec.sample_rate) / config.plan.hop as f64).round() as u64
    }

    /// Seconds of a plan frame: what a step makes.
    pub fn step_s(&self) -> f64 {
        self.engine.config().plan.hop as f64 / f64::from(self.codec.sample_rate)
    }

    /// How it draws.
    pub fn options(&self) -> &Options {
        self.path.options()
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
        self.path.is_ahead()
    }

    /// Runs ahead, by a frame or by a look at what might come; says whether it was a frame.
    ///
    /// # Errors
    /// The engine's own.
    pub fn advance(&mut self) -> Result<bool, GenerateError> {
        Ok(self.path.advance(self.engine.as_mut())?)
    }

    /// Appends what the next plan frame settles to `out`, interleaved.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next(&mut self, out: &mut Vec<f32>) -> Result<(), GenerateError> {
        let frame = self.path.release(self.engine.as_mut())?;
        self.surprisal += 0.03 * (frame.draw.surprisal - self.surprisal);
        self.interventions.extend(self.path.interventions());
        let mut samples = self.codec.decode_all(&frame.tokens);
        self.bands = frame.plan.bands;
        let n = self.leaving.len();
        for (i, (x, leaving)) in samples.iter_mut().zip(self.leaving.drain(..)).enumerate() {
            let share = (i + 1) as f32 / (n + 1) as f32;
            *x = share * *x + (1.0 - share) * leaving;
        }
        self.seam.push(&samples)?;
        self.made.clear();
        self.seam.take(u64::MAX, &mut self.made);
        let made = std::mem::take(&mut self.made);
        self.send(&made, out);
        self.made = made;
        Ok(())
    }

    /// Appends frames that were there before, such as the prompt, at the present volume.
    pub fn send(&mut self, interleaved: &[f32], out: &mut Vec<f32>) {
        let (first, channels) = (out.len(), self.seam.channels());
        out.extend_from_slice(interleaved);
        self.volume.apply(&mut out[first..], channels);
        let surplus = (self.played.len() + interleaved.len()).saturating_sub(self.most_played);
        self.played.drain(..surplus.min(self.played.len()));
        self.played.extend(&out[first..]);
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
        let engine = self.engine.as_mut();
        match change {
            Change::Options(options) => self.path.set_options(engine, &options)?,
            Change::Volume { gain, seconds } => {
                let n = (seconds * self.seam.sample_rate() as f32).max(1.0);
                self.volume.target = gain;
                self.volume.step = (gain - self.volume.gain) / n;
            }
            Change::Hold(false) => self.path.set_guide(engine, Guide::Own)?,
            Change::Hold(true) if self.bands.is_empty() => {}
            Change::Hold(true) => self.path.set_guide(engine, Guide::Still(self.bands.clone()))?,
            Change::Follow(None) => self.path.set_guide(engine, Guide::Own)?,
            Change::Follow(Some(bands)) => {
                let start = self.path.released();
                self.path.set_guide(engine, Guide::Other { bands, start })?;
            }
            Change::Vary(seconds) => {
                self.leave()?;
                let frames = self.frames(seconds);
                let back = self.path.vary(self.engine.as_mut(), frames)?;
                return Ok(back as f64 * self.step_s());
            }
            Change::Engine(engine, path) => {
                self.leave()?;
                (self.engine, self.path) = (engine, *path);
                self.path.keep(self.frames(MOST_VARY_S));
            }
        }
        Ok(0.0)
    }

    /// Keeps the next samples of the way that is about to be left, to fade them out.
    fn leave(&mut self) -> Result<(), GenerateError> {
        let frame = self.path.release(self.engine.as_mut())?;
        self.leaving = self.codec.decode_all(&frame.tokens);
        self.leaving.truncate((CROSSFADE_S * f64::from(self.codec.sample_rate)) as usize);
        Ok(())
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
            frame.iter_mut().for_each(|x| *x *= self.gain);
        }
    }
}
