//! Turns a prompt into more of it: context in, plan frames and tokens from an engine, audio out at the prompt's own rate.
//!
//! ```text
//! tail of a file --Prompt--> tokens --Generator(engine, uniforms)--> tokens --Path(Governor)--> tokens --Seam--> frames --> sink
//! ```
//! A path runs ahead and goes back where its [`Governor`] finds that the continuation fails. A [`Player`] is all of it in one; a [`Session`] is a player and its engine's state as plain data, for files and takes.
//! Uniforms are drawn by (seed, stream, kind, t) with t counted from the join, so the same seed gives the same bytes.

mod extrapolate;
pub mod governor;
mod habits;
mod path;
mod player;
mod prompt;
mod seam;
mod session;

use serde::{Deserialize, Serialize};

use crate::audio::AudioError;
use crate::codec::Token;
use crate::engine::{Engine, EngineError, UNIFORMS_PER_SAMPLE};
use crate::plan::PlanFrame;
use crate::rng::{Kind, uniform};
use crate::sampler::{PlanSampling, WaveSampling};

pub use governor::{Alarm, Governor, Intervention};
pub use path::{Guide, Path};
pub use player::{Played, Player, Progress};
pub use prompt::{CONTEXT_S, Prompt};
pub use seam::{Seam, SeamReport, SeamState};
pub use session::{Recording, Session, SessionError};

/// What can go wrong between a prompt and its continuation.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to play on.
    #[error("the prompt has no samples")]
    EmptyPrompt,
    /// A NaN or an infinity in the prompt.
    #[error("the prompt has samples that are not finite numbers")]
    NotFinite,
    /// A saved state that belongs to another model, or to none.
    #[error("the saved state of the continuation does not hold together")]
    State,
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Reading, resampling or writing failed.
    #[error(transparent)]
    Audio(#[from] AudioError),
}

/// How to draw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
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

/// Draws uniforms and drives an engine, one plan frame at a time. The engine's state stays in the engine: every call is
/// to be given the same one, or one that was restored to its state.
pub struct Generator {
    options: Options,
    n_frames: u64,
    branch: u64,
    plan: PlanFrame,
    tokens: Vec<Token>,
}

/// A [`Generator`] as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct GeneratorState {
    options: Options,
    n_frames: u64,
    /// Which of a seed's many ways is taken from here on.
    branch: u64,
}

/// What a branch adds to the seed: apart from the seeds that people use.
const BRANCH_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Generator {
    /// Gives the engine the context to play on.
    ///
    /// # Errors
    /// The engine's own.
    pub fn new(engine: &mut dyn Engine, options: &Options, context: &[Token]) -> Result<Self, EngineError> {
        engine.prefill(context)?;
        Ok(Self::from_state(engine, GeneratorState { options: *options, n_frames: 0, branch: 0 }))
    }

    fn state(&self) -> GeneratorState {
        GeneratorState { options: self.options, n_frames: self.n_frames, branch: self.branch }
    }

    fn from_state(engine: &dyn Engine, state: GeneratorState) -> Self {
        let GeneratorState { options, n_frames, branch } = state;
        Self { options, n_frames, branch, plan: PlanFrame::default(), tokens: vec![0; engine.config().plan.hop] }
    }

    /// The next plan frame and its `hop` tokens. `given`: bands to play instead of the engine's own choice, `[n_bands]`.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next_frame(
        &mut self,
        engine: &mut dyn Engine,
        given: Option<&[f32]>,
    ) -> Result<(&PlanFrame, &[Token]), EngineError> {
        let (Options { seed, stream, plan, wave }, frame) = (self.options, self.n_frames);
        let seed = seed.wrapping_add(self.branch.wrapping_mul(BRANCH_STEP));
        let draws = |kind, n: usize| -> Vec<f32> {
            let first = frame * n as u64;
            (first..first + n as u64).map(|t| uniform(seed, stream, kind, t)).collect()
        };
        let plan_uniforms = draws(Kind::Plan, engine.config().plan.n_codebooks);
        let wave_uniforms = draws(Kind::Wave, self.tokens.len() * UNIFORMS_PER_SAMPLE);
        engine.set_sampling(plan, wave);
        match given {
            Some(bands) => self.plan = PlanFrame { tokens: Vec::new(), bands: bands.to_vec() },
            None => engine.next_plan(&plan_uniforms, &mut self.plan)?,
        }
        engine.render(&self.plan, &wave_uniforms, &mut self.tokens)?;
        self.n_frames += 1;
        Ok((&self.plan, &self.tokens))
    }
}
