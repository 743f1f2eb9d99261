//! Turns a prompt into more of it: context in, plan frames and tokens from an engine, audio out at the prompt's own rate.
//!
//! ```text
//! tail of a file --Prompt--> tokens --Generator(engine, uniforms)--> tokens --Seam--> frames --> sink
//! ```
//! Uniforms are drawn by (seed, stream, kind, t) with t counted from the join, so the same seed gives the same bytes.

mod extrapolate;
mod prompt;
mod seam;

use std::ops::ControlFlow;

use crate::audio::AudioError;
use crate::codec::Token;
use crate::engine::{Engine, EngineError, UNIFORMS_PER_SAMPLE};
use crate::plan::PlanFrame;
use crate::rng::{Kind, uniform};
use crate::sampler::{PlanSampling, WaveSampling};
use crate::sink::Sink;

pub use prompt::{CONTEXT_S, Prompt};
pub use seam::{Seam, SeamReport};

/// What can go wrong between a prompt and its continuation.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to play on.
    #[error("the prompt has no samples")]
    EmptyPrompt,
    /// A NaN or an infinity in the prompt.
    #[error("the prompt has samples that are not finite numbers")]
    NotFinite,
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Reading, resampling or writing failed.
    #[error(transparent)]
    Audio(#[from] AudioError),
}

/// How to draw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    /// The same seed gives the same bytes.
    pub seed: u64,
    /// Independent continuations under one seed.
    pub stream: u32,
    /// How plan tokens are drawn.
    pub plan: PlanSampling,
    /// How samples are drawn.
    pub wave: WaveSampling,
}

/// Draws uniforms and drives an engine, one plan frame at a time.
pub struct Generator<'e> {
    engine: &'e mut dyn Engine,
    options: Options,
    n_frames: u64,
    plan: PlanFrame,
    tokens: Vec<Token>,
}

impl<'e> Generator<'e> {
    /// Gives the engine the context to play on.
    ///
    /// # Errors
    /// The engine's own.
    pub fn new(engine: &'e mut dyn Engine, options: &Options, context: &[Token]) -> Result<Self, EngineError> {
        engine.prefill(context)?;
        let config = engine.config();
        let tokens = vec![0; config.plan.hop];
        Ok(Self { engine, options: *options, n_frames: 0, plan: PlanFrame::default(), tokens })
    }

    /// The next plan frame and its `hop` tokens. `given`: bands to play instead of the engine's own choice, `[n_bands]`.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next_frame(&mut self, given: Option<&[f32]>) -> Result<(&PlanFrame, &[Token]), EngineError> {
        let (Options { seed, stream, plan, wave }, frame) = (self.options, self.n_frames);
        let draws = |kind, n: usize| -> Vec<f32> {
            let first = frame * n as u64;
            (first..first + n as u64).map(|t| uniform(seed, stream, kind, t)).collect()
        };
        let plan_uniforms = draws(Kind::Plan, self.engine.config().plan.n_codebooks);
        let wave_uniforms = draws(Kind::Wave, self.tokens.len() * UNIFORMS_PER_SAMPLE);
        self.engine.set_sampling(plan, wave);
        match given {
            Some(bands) => self.plan = PlanFrame { tokens: Vec::new(), bands: bands.to_vec() },
            None => self.engine.next_plan(&plan_uniforms, &mut self.plan)?,
        }
        self.engine.render(&self.plan, &wave_uniforms, &mut self.tokens)?;
        self.n_frames += 1;
        Ok((&self.plan, &self.tokens))
    }
}

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
    /// The join; `None` without a prompt.
    pub seam: Option<SeamReport>,
}

/// Plays on after `prompt` for `seconds` (`round(seconds * rate)` frames) into a sink that has been started and given
/// the prompt. `progress` may end it after any plan frame; what exists then is still written up to its last sample.
///
/// # Errors
/// The engine's and the sink's own; the sink is left unfinished.
pub fn play_on(
    engine: &mut dyn Engine,
    prompt: &Prompt,
    seconds: f64,
    options: &Options,
    sink: &mut dyn Sink,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Played, GenerateError> {
    let codec = engine.config().codec.clone();
    let n_frames = (seconds * f64::from(prompt.sample_rate())).round() as u64;
    let mut seam = Seam::new(prompt, n_frames)?;
    let mut missing = seam.samples_needed();
    let total_s = missing as f64 / f64::from(codec.sample_rate);
    let mut generator = Generator::new(engine, options, prompt.tokens())?;
    let (mut out, mut written) = (Vec::new(), 0);
    let mut interrupted = false;
    while missing > 0 && !interrupted {
        let done_s = total_s - missing as f64 / f64::from(codec.sample_rate);
        interrupted = progress(Progress { done_s, total_s }).is_break();
        if !interrupted {
            let (_, tokens) = generator.next_frame(None)?;
            let n = tokens.len().min(missing as usize);
            missing -= n as u64;
            seam.push(&codec.decode_all(&tokens[..n]), &mut out)?;
            sink.write(&out)?;
            written += out.len();
            out.clear();
        }
    }
    let report = seam.finish(&mut out)?;
    sink.write(&out)?;
    written += out.len();
    Ok(Played { n_frames: (written / prompt.channels()) as u64, interrupted, seam: report })
}
