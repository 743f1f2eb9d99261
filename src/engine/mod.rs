//! Engines turn a prompt's tokens and uniform random numbers into plan frames and tokens, one model step at a time.
//!
//! The caller draws the uniforms (see [`crate::rng`]), so an engine is a deterministic function of its inputs and
//! two engines can be compared token by token. An engine knows nothing about audio files.

pub mod cpu;
pub mod cuda;
mod meeting;
pub mod reference;
mod state;

use std::any::Any;
use std::sync::Arc;

use crate::checkpoint::CheckpointError;
use crate::codec::Token;
use crate::model::config::{GenerationSettings, ModelConfig};
use crate::plan::{PlanError, PlanFrame};
pub use crate::sampler::PlanDraw;
use crate::sampler::{PlanSampling, WaveSampling};

/// Uniform numbers that [`Engine::render`] takes per sample: one chooses the component, one the place in it.
pub const UNIFORMS_PER_SAMPLE: usize = 2;

/// What can go wrong in an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("expected {expected} {what}, got {got}")]
    Length { what: &'static str, expected: usize, got: usize },
    #[error("token {token} at position {position} is outside the vocabulary of {levels}")]
    Token { token: Token, position: usize, levels: usize },
    #[error("the saved state does not fit this model: {0}")]
    State(String),
    #[error("the plan")]
    Plan(#[from] PlanError),
    #[error("the model")]
    Checkpoint(#[from] CheckpointError),
    #[error("computing a step")]
    Tensor(#[from] candle_core::Error),
    #[error("the GPU")]
    Machine(#[from] cuda::MachineError),
    #[error("the GPU")]
    Launch(#[from] crate::cuda::launch::LaunchError),
    /// What went wrong for all streams that were played together.
    #[error(transparent)]
    Together(Arc<EngineError>),
}

/// One stream of generation.
pub trait Engine: Send {
    /// The model's sizes, codec and frame grid.
    fn config(&self) -> &ModelConfig;

    /// How samples are drawn now; before [`Engine::set_sampling`], the checkpoint's own settings.
    fn generation(&self) -> GenerationSettings;

    /// Forgets prompt and output; weights and settings stay.
    fn reset(&mut self) -> Result<(), EngineError>;

    /// How plan tokens and samples are drawn from now on.
    fn set_sampling(&mut self, plan: PlanSampling, wave: WaveSampling);

    /// Resets, then reads `prompt` so that the next plan frame begins with the sample after it; gives the prompt's [plan](Engine::plan_of).
    ///
    /// The frame grid ends with the prompt's last token; a prompt that does not fill its first frame is padded in
    /// front with silence.
    fn prefill(&mut self, prompt: &[Token]) -> Result<Vec<PlanFrame>, EngineError>;

    /// Takes the last frames of what was heard for these from here on, oldest first, at the level that frames are played at: what comes next is told
    /// from them.
    ///
    /// # Errors
    /// When they are no plan frames of the model.
    fn heard_as(&mut self, plan: &[PlanFrame]) -> Result<(), EngineError>;

    /// The plan of `tokens` (whole frames) through the codebooks, as the model takes it: what sounds are scored and read under. The
    /// stream stays as it is.
    fn plan_of(&self, tokens: &[Token]) -> Result<Vec<PlanFrame>, EngineError>;

    /// Samples the next plan frame; `uniforms` holds one number in (0, 1) per codebook.
    fn next_plan(&mut self, uniforms: &[f32], out: &mut PlanFrame) -> Result<(), EngineError>;

    /// What [`Engine::next_plan`] would give from here on by each of these uniforms, `[frames * n_codebooks]`, as many of all ways. The stream stays
    /// where it is.
    fn plan_ahead(&mut self, ways: &[Vec<f32>]) -> Result<Vec<Vec<PlanFrame>>, EngineError> {
        let here = self.snapshot()?;
        let n_codebooks = self.config().plan.n_codebooks;
        let mut plans = Vec::new();
        for uniforms in ways {
            let mut plan = Vec::new();
            for uniforms in uniforms.chunks_exact(n_codebooks) {
                let mut frame = PlanFrame::default();
                self.next_plan(uniforms, &mut frame)?;
                plan.push(frame);
            }
            self.rewind(&here)?;
            plans.push(plan);
        }
        Ok(plans)
    }

    /// How many ways ahead are best asked for at a time.
    fn ways_at_once(&self) -> usize {
        1
    }

    /// How surprising the frame of the last [`Engine::next_plan`] was.
    fn plan_draw(&self) -> PlanDraw;

    /// Renders one plan frame into `out` (`hop` tokens); `uniforms` holds [`UNIFORMS_PER_SAMPLE`] numbers a token.
    ///
    /// Only `plan.bands` is read: a frame can come from [`Engine::next_plan`] or from elsewhere.
    fn render(&mut self, plan: &PlanFrame, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError>;

    /// Teacher-forced: resets, reads `tokens` (a multiple of `hop`) under their own quantised plan and writes
    /// -ln P(token) of each, in nats. The plan's own cost is not part of it; see [`Engine::score_plan`].
    fn score(&mut self, tokens: &[Token], nll: &mut [f32]) -> Result<(), EngineError>;

    /// Teacher-forced: -ln P of each plan frame of `tokens`, in nats per frame; the first frame is given.
    fn score_plan(&mut self, tokens: &[Token]) -> Result<Vec<f32>, EngineError>;

    /// The stream's whole state (caches, histories, positions), to be given to [`Engine::restore`].
    fn save(&self) -> Result<Vec<u8>, EngineError>;

    /// Continues from a saved state of the same model.
    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError>;

    /// The stream's whole state in memory, for [`Engine::rewind`] on this very engine: cheaper than [`Engine::save`] where
    /// the engine can do better.
    ///
    /// # Errors
    /// As `save`.
    fn snapshot(&self) -> Result<Snapshot, EngineError> {
        Ok(Snapshot(Box::new(self.save()?)))
    }

    /// Continues from a snapshot of this engine.
    ///
    /// # Errors
    /// A snapshot of another kind of engine.
    fn rewind(&mut self, to: &Snapshot) -> Result<(), EngineError> {
        self.restore(to.state::<Vec<u8>>()?)
    }
}

/// A stream's state in memory, in the form of the engine that it was taken of.
pub struct Snapshot(Box<dyn Any + Send>);

impl Snapshot {
    fn state<T: 'static>(&self) -> Result<&T, EngineError> {
        self.0.downcast_ref().ok_or_else(|| EngineError::State("it is a snapshot of another engine".into()))
    }
}

fn state_error(e: impl std::fmt::Display) -> EngineError {
    EngineError::State(e.to_string())
}

fn expect(what: &'static str, expected: usize, got: usize) -> Result<(), EngineError> {
    if expected == got { Ok(()) } else { Err(EngineError::Length { what, expected, got }) }
}

/// What [`Engine::heard_as`] does to the last frames that an engine remembers, oldest first, `[n_bands]` each.
fn hear_as(last: &mut [Vec<f32>], plan: &[PlanFrame], sampling: &WaveSampling) -> Result<(), EngineError> {
    for (was, is) in last.iter_mut().rev().zip(plan.iter().rev()) {
        expect("plan bands", was.len(), is.bands.len())?;
        was.clear();
        was.extend(is.bands.iter().map(|&band| sampling.played(band)));
    }
    Ok(())
}

fn check_tokens(config: &ModelConfig, tokens: &[Token]) -> Result<(), EngineError> {
    let levels = config.codec.levels();
    match tokens.iter().position(|&t| usize::from(t) >= levels) {
        Some(position) => Err(EngineError::Token { token: tokens[position], position, levels }),
        None => Ok(()),
    }
}
