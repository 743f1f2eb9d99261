//! Turns a prompt into more of it: context in, plan frames and tokens from an engine, audio out at the prompt's own rate.
//!
//! ```text
//! tail of a file --Prompt--> tokens --Generator(engine, uniforms)--> tokens --Path(Governor)--> tokens --Seam--> frames --> sink
//! ```
//! Every quarter of a second a generator looks at several plans for the next and takes the one that, with what it took before, is played most like the prompt
//! ([`Manner`]) and keeps its beat best ([`Rhythm`]; [`Options::choices`]). Frames that the model plans get the prompt's [`Colour`].
//! A seam brings samples to the recording's rate, channels and level, and makes what the model lacks of them.
//! A path runs ahead and goes back where its [`Governor`] finds that the continuation fails. A [`Player`] is all of it in one; a [`Session`] is a player and its engine's state as plain data, for files and takes.
//! Uniforms are drawn by (seed, stream, kind, t) with t counted from the join, so the same seed gives the same bytes.

mod colour;
mod extrapolate;
pub mod governor;
mod habits;
mod join;
mod manner;
mod path;
mod player;
mod prompt;
mod rest;
mod rhythm;
mod seam;
mod session;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::audio::AudioError;
use crate::codec::Token;
use crate::engine::{Engine, EngineError, UNIFORMS_PER_SAMPLE};
use crate::plan::{PlanFrame, Spectrum};
use crate::rng::{Kind, uniform};
use crate::sampler::{PlanSampling, WaveSampling};

pub use colour::Colour;
pub use extrapolate::resample_end;
pub use governor::{Alarm, Governor, Intervention};
pub use join::SeamReport;
pub use manner::{Manner, telling};
pub use path::{Frame, Guide, Path};
pub use player::{Played, Player, Progress};
pub use prompt::{CONTEXT_S, Prompt, gain_to_model};
pub use rhythm::Rhythm;
pub use seam::{Seam, SeamState};
pub use session::{Recording, Session, SessionError};

/// What can go wrong between a prompt and its continuation.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to play on.
    #[error("the prompt has no samples")]
    EmptyPrompt,
    /// A NaN, an infinity or what can only be an error in the prompt.
    #[error(
        "the prompt has samples that are not finite numbers, or a million times as loud as full scale; export it again, at a lower level"
    )]
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// The same seed gives the same bytes.
    pub seed: u64,
    /// Independent continuations under one seed.
    pub stream: u32,
    /// Ways to go on of which, every quarter of a second, the one most like the prompt is taken; 1 or 0: whatever comes.
    pub choices: u32,
    /// How plan tokens are drawn.
    pub plan: PlanSampling,
    /// How samples are drawn.
    pub wave: WaveSampling,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, stream: 0, choices: 8, plan: PlanSampling::default(), wave: WaveSampling::default() }
    }
}

/// Draws uniforms and drives an engine, one plan frame at a time. The engine's state stays in the engine: every call is
/// to be given the same one, or one that was restored to its state.
pub struct Generator {
    state: GeneratorState,
    spectrum: Spectrum,
    /// The ways that it has looked at for the stretch that begins here.
    looked_at: Vec<Way>,
    plan: PlanFrame,
    tokens: Vec<Token>,
}

/// A way on as it would be played.
struct Way {
    /// What was chosen before it counted in.
    manner: Manner,
    offbeat: f32,
}

/// A [`Generator`] as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct GeneratorState {
    options: Options,
    n_frames: u64,
    /// Which of a seed's many ways is taken from here on.
    branch: u64,
    /// Which of that way's own is taken, and the frame before which the next is chosen.
    choice: u64,
    due: u64,
    /// How the prompt is played, where that can be told.
    manner: Option<Manner>,
    /// How what was chosen is played, the later the more; the prompt before it.
    played: Option<Manner>,
    /// The prompt's, after all that was played.
    rhythm: Rhythm,
    /// The prompt's, which frames that the model plans get.
    colour: Arc<Colour>,
}

/// What a branch and a choice add to the seed: apart from the seeds that people use, and from each other.
const BRANCH_STEP: u64 = 0x9E37_79B9_7F4A_7C15;
const CHOICE_STEP: u64 = 0xD1B5_4A32_D192_ED03;
/// Frames that are chosen together: a quarter of a second at 16 kHz.
const STRETCH: u64 = 8;
/// How far off the beat counts as much as what [`Manner`] calls 1.
const OFFBEAT: f32 = 0.67;

impl GeneratorState {
    /// The uniforms of a frame, `n` of them, on the way `choice`.
    fn draws(&self, kind: Kind, choice: u64, frame: u64, n: usize) -> impl Iterator<Item = f32> {
        let Options { seed, stream, .. } = self.options;
        let seed =
            seed.wrapping_add(self.branch.wrapping_mul(BRANCH_STEP)).wrapping_add(choice.wrapping_mul(CHOICE_STEP));
        let first = frame * n as u64;
        (first..first + n as u64).map(move |t| uniform(seed, stream, kind, t))
    }
}

impl Generator {
    /// Gives the engine the context to play on.
    ///
    /// # Errors
    /// The engine's own.
    pub fn new(engine: &mut dyn Engine, options: &Options, context: &[Token]) -> Result<Self, EngineError> {
        let spectrum = Spectrum::new(engine.config().codec.sample_rate, &engine.config().plan)?;
        let plan = engine.prefill(context)?;
        let (colour, plan) = Colour::of_prompt(plan, &engine.config().codec.decode_all(context), &spectrum);
        let heard = telling(&plan, &spectrum);
        let frames = || heard.iter().copied().flatten().map(|frame| frame.bands.as_slice());
        let manner = heard.map(|_| Manner::of(frames(), &spectrum));
        let rhythm = Rhythm::of(frames());
        let state = GeneratorState {
            options: *options,
            n_frames: 0,
            branch: 0,
            choice: 0,
            due: STRETCH,
            manner,
            played: manner,
            rhythm,
            colour: colour.into(),
        };
        Ok(Self::from_state(engine, spectrum, state))
    }

    fn from_state(engine: &dyn Engine, spectrum: Spectrum, state: GeneratorState) -> Self {
        Self {
            state,
            spectrum,
            looked_at: Vec::new(),
            plan: PlanFrame::default(),
            tokens: vec![0; engine.config().plan.hop],
        }
    }

    /// What ways are chosen by, if they are.
    fn manner(&self) -> Option<Manner> {
        self.state.manner.filter(|_| self.state.options.choices > 1)
    }

    /// Looks at one of the ways through the next stretch, or at as many as the engine likes to at once, if it is time to choose one; says whether there
    /// is more to look at. The first stretch is played at once.
    fn consider(&mut self, engine: &mut dyn Engine) -> Result<bool, EngineError> {
        let manner = self.manner();
        let Self { state, spectrum, looked_at, .. } = self;
        let Options { choices, plan, wave, .. } = state.options;
        if state.n_frames < state.due {
            return Ok(false);
        }
        if let Some(manner) = manner {
            let n_codebooks = engine.config().plan.n_codebooks;
            let draws = |way: u64| {
                let frames = state.n_frames..state.n_frames + STRETCH;
                frames.flat_map(|k| state.draws(Kind::Plan, way, k, n_codebooks)).collect::<Vec<f32>>()
            };
            let ways = looked_at.len() as u64..u64::from(choices);
            let ways: Vec<_> = ways.take(engine.ways_at_once()).map(draws).collect();
            engine.set_sampling(plan, wave);
            for mut plan in engine.plan_ahead(&ways)? {
                for (k, frame) in (state.n_frames..).zip(&mut plan) {
                    state.colour.apply_after(k, &mut frame.bands);
                }
                let of = Manner::of(plan.iter().map(|frame| frame.bands.as_slice()), spectrum);
                looked_at.push(Way {
                    manner: of.after(state.played.as_ref().unwrap_or(&manner)),
                    offbeat: state.rhythm.offbeat(&plan),
                });
            }
            if looked_at.len() < choices as usize {
                return Ok(true);
            }
            let distances = looked_at.iter().map(|way| manner.distance(&way.manner).hypot(way.offbeat / OFFBEAT));
            if let Some((nearest, _)) = distances.enumerate().min_by(|(_, a), (_, b)| a.total_cmp(b)) {
                (state.choice, state.played) = (nearest as u64, Some(looked_at[nearest].manner));
            }
            looked_at.clear();
        } else {
            state.choice = 0;
        }
        state.due = state.n_frames + STRETCH;
        Ok(false)
    }

    /// Takes another way from here on, a stretch of it at once: there may be little to play meanwhile.
    fn branch(&mut self, branch: u64) {
        (self.state.branch, self.state.due) = (branch, self.state.n_frames + STRETCH);
        self.looked_at.clear();
    }

    /// Goes on from a state; forgets what it has looked at.
    fn rewind(&mut self, state: GeneratorState) {
        self.state = state;
        self.looked_at.clear();
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
        let (Options { plan, wave, .. }, frame) = (self.state.options, self.state.n_frames);
        while given.is_none() && self.consider(engine)? {}
        engine.set_sampling(plan, wave);
        let draws = |kind, n| self.state.draws(kind, self.state.choice, frame, n).collect::<Vec<f32>>();
        let plan_uniforms = draws(Kind::Plan, engine.config().plan.n_codebooks);
        let wave_uniforms = draws(Kind::Wave, self.tokens.len() * UNIFORMS_PER_SAMPLE);
        match given {
            Some(bands) => {
                self.plan = PlanFrame { tokens: Vec::new(), bands: bands.to_vec() };
                engine.render(&self.plan, &wave_uniforms, &mut self.tokens)?;
            }
            None => {
                engine.next_plan(&plan_uniforms, &mut self.plan)?;
                self.state.colour.apply_after(frame, &mut self.plan.bands);
                engine.render(&self.plan, &wave_uniforms, &mut self.tokens)?;
            }
        }
        self.state.rhythm.hear(&self.plan.bands);
        self.state.n_frames += 1;
        Ok((&self.plan, &self.tokens))
    }
}
