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
use crate::engine::{Engine, EngineError, PlanDraw, UNIFORMS_PER_SAMPLE};
use crate::model::wave_transformer::PLAN_FRAMES;
use crate::plan::{PlanFrame, Spectrum};
use crate::rng::{Kind, uniform};
use crate::sampler::{PlanSampling, WaveSampling};

pub use colour::Colour;
pub use extrapolate::resample_end;
pub use governor::{Alarm, Governor, Intervention};
pub use join::SeamReport;
pub use manner::{Manner, telling};
pub use path::{Guide, Path};
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
}

/// One frame that is played.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// `[hop]`
    pub tokens: Vec<Token>,
    /// What they were rendered after.
    pub plan: PlanFrame,
    /// How surprising the plan was; zero where it was given.
    pub draw: PlanDraw,
}

/// A frame that the model has planned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Planned {
    /// Coloured.
    plan: PlanFrame,
    draw: PlanDraw,
}

/// A way on as it would be planned.
struct Way {
    /// What was chosen before it counted in.
    manner: Manner,
    offbeat: f32,
}

/// A [`Generator`] as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct GeneratorState {
    options: Options,
    /// Frames played.
    n_frames: u64,
    /// The frame that is played next, once one was planned: it is finished by what comes after it.
    next: Option<Planned>,
    /// The frame before that one, `[n_bands]`, where there is one.
    last: Option<Vec<f32>>,
    /// Which of a seed's many ways is taken from here on.
    branch: u64,
    /// Which of that way's own is taken, and the frame before which the next is chosen.
    choice: u64,
    due: u64,
    /// How the prompt is played, where that can be told.
    manner: Option<Manner>,
    /// How what was chosen before this stretch is played, the later the more; the prompt before it. And with this stretch, if it was chosen.
    played: Option<Manner>,
    playing: Option<Manner>,
    /// The prompt's, after all that was planned or given.
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
    /// The frame that is planned next.
    fn n_planned(&self) -> u64 {
        self.n_frames + u64::from(self.next.is_some())
    }

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
        // What comes next would otherwise begin with the colour as an attack.
        let mut end = plan[plan.len().saturating_sub(PLAN_FRAMES)..].to_vec();
        end.iter_mut().for_each(|frame| colour.feel(0, &mut frame.bands));
        engine.set_sampling(options.plan, options.wave);
        engine.heard_as(&end)?;
        let heard = telling(&plan, &spectrum);
        let frames = || heard.iter().copied().flatten().map(|frame| frame.bands.as_slice());
        let manner = heard.map(|_| Manner::of(frames(), &spectrum));
        let rhythm = Rhythm::of(frames());
        let state = GeneratorState {
            options: *options,
            n_frames: 0,
            next: None,
            last: end.pop().map(|frame| frame.bands),
            branch: 0,
            choice: 0,
            due: STRETCH,
            manner,
            played: manner,
            playing: None,
            rhythm,
            colour: colour.into(),
        };
        Ok(Self::from_state(spectrum, state))
    }

    fn from_state(spectrum: Spectrum, state: GeneratorState) -> Self {
        Self { state, spectrum, looked_at: Vec::new() }
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
        let first = state.n_planned();
        if first < state.due {
            return Ok(false);
        }
        state.played = state.playing.take().or(state.played);
        if let Some(manner) = manner {
            let n_codebooks = engine.config().plan.n_codebooks;
            let draws = |way: u64| {
                (first..first + STRETCH)
                    .flat_map(|k| state.draws(Kind::Plan, way, k, n_codebooks))
                    .collect::<Vec<f32>>()
            };
            let ways = looked_at.len() as u64..u64::from(choices);
            let ways: Vec<_> = ways.take(engine.ways_at_once()).map(draws).collect();
            engine.set_sampling(plan, wave);
            for mut plan in engine.plan_ahead(&ways)? {
                for (k, frame) in (first..).zip(&mut plan) {
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
                (state.choice, state.playing) = (nearest as u64, Some(looked_at[nearest].manner));
            }
            looked_at.clear();
        } else {
            state.choice = 0;
        }
        state.due = first + STRETCH;
        Ok(false)
    }

    /// Takes another way from the next frame on that is planned, a stretch of it at once: there may be little to play meanwhile.
    fn branch(&mut self, branch: u64) {
        (self.state.branch, self.state.due) = (branch, self.state.n_planned() + STRETCH);
        self.state.playing = None;
        self.looked_at.clear();
    }

    /// Goes on from a state; forgets what it has looked at.
    fn rewind(&mut self, state: GeneratorState) {
        self.state = state;
        self.looked_at.clear();
    }

    /// Plans one more frame.
    fn plan(&mut self, engine: &mut dyn Engine) -> Result<Planned, EngineError> {
        while self.consider(engine)? {}
        let (k, n_codebooks) = (self.state.n_planned(), engine.config().plan.n_codebooks);
        let uniforms: Vec<f32> = self.state.draws(Kind::Plan, self.state.choice, k, n_codebooks).collect();
        let mut plan = PlanFrame::default();
        engine.next_plan(&uniforms, &mut plan)?;
        self.state.colour.apply_after(k, &mut plan.bands);
        self.state.rhythm.hear(&plan.bands);
        Ok(Planned { plan, draw: engine.plan_draw() })
    }

    /// The frame that comes next in the plan, finished by the one after it, which is planned now.
    fn planned(&mut self, engine: &mut dyn Engine) -> Result<Planned, EngineError> {
        if self.state.next.is_none() {
            self.state.next = Some(self.plan(engine)?);
        }
        let after = self.plan(engine)?;
        let GeneratorState { next, last, colour, .. } = &mut self.state;
        let mut now = next.replace(after).unwrap_or_default();
        let unfinished = now.plan.bands.clone();
        let after = next.as_ref().map(|after| &after.plan.bands[..]);
        colour.finish(last.as_deref(), &mut now.plan.bands, after);
        *last = Some(unfinished);
        Ok(now)
    }

    /// The next frame. `given`: bands to play instead of the engine's own choice, `[n_bands]`.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next_frame(&mut self, engine: &mut dyn Engine, given: Option<&[f32]>) -> Result<Frame, EngineError> {
        engine.set_sampling(self.state.options.plan, self.state.options.wave);
        let Planned { plan, draw } = match given {
            Some(bands) => {
                self.state.rhythm.hear(bands);
                self.state.last = Some(bands.to_vec());
                Planned { plan: PlanFrame { tokens: Vec::new(), bands: bands.to_vec() }, draw: PlanDraw::default() }
            }
            None => self.planned(engine)?,
        };
        let mut tokens = vec![0; engine.config().plan.hop];
        let n_uniforms = tokens.len() * UNIFORMS_PER_SAMPLE;
        let uniforms: Vec<f32> = self.state.draws(Kind::Wave, 0, self.state.n_frames, n_uniforms).collect();
        engine.render(&plan, &uniforms, &mut tokens)?;
        self.state.n_frames += 1;
        Ok(Frame { tokens, plan, draw })
    }
}
