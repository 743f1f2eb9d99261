//! Turns an engine and a prompt into frames in a sink, for as long as asked, and then for longer.

use std::ops::ControlFlow;

use crate::engine::Engine;
use crate::sink::Sink;

use super::{GenerateError, Intervention, Options, Path, Prompt, Seam, SeamReport};

/// How far a continuation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Seconds played so far.
    pub done_s: f64,
    /// Seconds asked for.
    pub total_s: f64,
}

/// What was played.
#[derive(Clone, Debug, PartialEq)]
pub struct Played {
    /// Frames of continuation written.
    pub n_frames: u64,
    /// Whether it ended before the seconds asked for.
    pub interrupted: bool,
    /// The join; `None` without a prompt, and where a session goes on.
    pub seam: Option<SeamReport>,
    /// What the governor did about these frames.
    pub interventions: Vec<Intervention>,
}

/// One continuation under way: all of it that is not in the engine.
///
/// What is played depends on prompt, model and options, not on where it was cut: 10 s and then 10 s are 20 s.
pub struct Player {
    pub(super) path: Path,
    pub(super) seam: Seam,
}

impl Player {
    /// Gives the engine the prompt to play on; `governed`: whether a [`super::Governor`] watches.
    ///
    /// # Errors
    /// The engine's own, or a rate that cannot be resampled.
    pub fn new(
        engine: &mut dyn Engine,
        prompt: &Prompt,
        options: &Options,
        governed: bool,
    ) -> Result<Self, GenerateError> {
        std::thread::scope(|scope| {
            let seam = scope.spawn(|| Seam::new(prompt));
            let path = Path::new(engine, options, prompt.tokens(), governed)?;
            let seam = seam.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok(Self { path, seam })
        })
    }

    /// How surprising the context is, bits a plan frame: as the governor knows it.
    pub fn context_bits(&self) -> Option<f32> {
        self.path.context_bits()
    }

    /// How it draws.
    pub fn options(&self) -> &Options {
        self.path.options()
    }

    /// Draws sounds otherwise from here on, and plans 32 ms later.
    ///
    /// # Errors
    /// The engine's own.
    pub fn set_options(&mut self, engine: &mut dyn Engine, options: &Options) -> Result<(), GenerateError> {
        Ok(self.path.set_options(engine, options)?)
    }

    /// Frames per second and channels of what is played.
    pub fn shape(&self) -> (u32, usize) {
        (self.seam.sample_rate(), self.seam.channels())
    }

    /// Plays `seconds` more (`round(seconds * rate)` frames) into a sink that has been started and given what was before.
    /// `progress` may end it before any plan frame; the frames that are settled by then are written.
    ///
    /// # Errors
    /// The engine's and the sink's own; the sink is left unfinished.
    pub fn play(
        &mut self,
        engine: &mut dyn Engine,
        seconds: f64,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Played, GenerateError> {
        let rate = f64::from(self.seam.sample_rate());
        let total = (seconds * rate).round() as u64;
        let mut out = Vec::new();
        let mut done = self.seam.take(total, &mut out);
        sink.write(&out)?;
        let mut interrupted = false;
        while done < total && !interrupted {
            interrupted = progress(Progress { done_s: done as f64 / rate, total_s: total as f64 / rate }).is_break();
            if !interrupted {
                let frame = self.path.next(engine)?;
                self.seam.push(&engine.config().codec.decode_all(&frame.tokens))?;
                out.clear();
                done += self.seam.take(total - done, &mut out);
                sink.write(&out)?;
            }
        }
        let seam = if done > 0 { self.seam.report() } else { None };
        Ok(Played { n_frames: done, interrupted, seam, interventions: self.path.interventions() })
    }
}
