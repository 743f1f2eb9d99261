//! Turns an engine's frames into the frames that are played: runs ahead, and goes back where they lead nowhere.
//!
//! Frames are numbered from the join. Up to `released` they belong to whoever asked for them; those after it are held and
//! may still be replaced. Marks, snapshots every few frames, are what it goes back to.
//!
//! ```text
//!  marks:     |       |       |       |       |
//!  frames:    ..played..........| held and watched |
//!                               released           the generator
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use ndarray::Array2;

use super::governor::{Alarm, Governor, Intervention};
use super::{Frame, Generator, GeneratorState, Options};
use crate::codec::Token;
use crate::engine::{Engine, EngineError, Snapshot};
use crate::plan::{PlanError, Spectrum};

/// Frames between two marks.
const BLOCK: u64 = 8;
/// The same where nobody can wait until frames since the last mark are played again.
const LIVE_BLOCK: u64 = 2;
/// Held frames that the governor leaves alone where nobody can wait: they play while what follows is made anew.
const LIVE_FIRM: u64 = 4;
/// Frames that are held back for the governor, or for a choice: 2 s at 16 kHz.
const HOLD: usize = 64;
/// Of played marks that lie nearer together than this the middle ones go: two seconds.
const SPARSE: u64 = 64;
/// No continuation gets so far: 700,000 years.
const LAST_FRAME: u64 = 1 << 40;

/// Where the plan comes from.
#[derive(Clone, Debug, Default)]
pub enum Guide {
    /// The model's own choice.
    #[default]
    Own,
    /// One frame for ever: the sound stands still. `[n_bands]`
    Still(Vec<f32>),
    /// Another recording's frames, from frame `start` on; then the model's own choice again.
    Other {
        /// `[n_frames, n_bands]`
        bands: Arc<Array2<f32>>,
        /// Frame of the continuation that the first of them is for.
        start: u64,
    },
}

impl Guide {
    /// The same, so many frames later.
    #[must_use]
    pub fn later(self, frames: u64) -> Self {
        match self {
            Self::Other { bands, start } => Self::Other { bands, start: start + frames },
            guide => guide,
        }
    }

    fn at(&self, frame: u64) -> Option<Vec<f32>> {
        match self {
            Self::Own => None,
            Self::Still(bands) => Some(bands.clone()),
            Self::Other { bands, start } => {
                let k = usize::try_from(frame.checked_sub(*start)?).ok()?;
                (k < bands.nrows()).then(|| bands.row(k).to_vec())
            }
        }
    }
}

/// Where the path can go back to: everything as it was before frame `generator.n_frames`.
struct Mark {
    engine: Snapshot,
    generator: GeneratorState,
    governor: Option<Governor>,
    branches: u64,
}

impl Mark {
    fn frame(&self) -> u64 {
        self.generator.n_frames
    }
}

/// A [`Path`] as plain data, without its engine: as it was at a mark, and how many frames were released after it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct PathState {
    generator: GeneratorState,
    governor: Option<Governor>,
    branches: u64,
    released_since: u64,
    own_level_db: f32,
}

impl PathState {
    pub(super) fn options(&self) -> &Options {
        &self.generator.options
    }
}

/// A continuation under way, as tokens.
pub struct Path {
    generator: Generator,
    governor: Option<Governor>,
    guide: Guide,
    /// Oldest first; the first one lies at or before `released`.
    marks: VecDeque<Mark>,
    held: VecDeque<Frame>,
    released: u64,
    /// Frames before `released` that it can go back by.
    keep: u64,
    block: u64,
    /// Frames after `released` that the governor leaves alone.
    firm: u64,
    /// Branches taken so far, so that none is taken twice.
    branches: u64,
    /// The model's own level.
    own_level_db: f32,
    /// Interventions after `released`.
    pending: Vec<(u64, Intervention)>,
    done: Vec<Intervention>,
}

impl Path {
    /// Gives the engine the context to play on; `governed`: whether a [`Governor`] watches.
    ///
    /// # Errors
    /// The engine's own.
    pub fn new(
        engine: &mut dyn Engine,
        options: &Options,
        context: &[Token],
        governed: bool,
    ) -> Result<Self, EngineError> {
        let spectrum = spectrum_of(engine)?;
        let own_level_db = engine.generation().level_db;
        let governor = if governed { Some(Governor::new(engine, &spectrum, context)?) } else { None };
        Ok(Self::at(Generator::new(engine, options, context)?, governor, own_level_db))
    }

    fn at(generator: Generator, governor: Option<Governor>, own_level_db: f32) -> Self {
        Self {
            released: generator.state.n_frames,
            branches: generator.state.branch,
            generator,
            governor,
            guide: Guide::Own,
            marks: VecDeque::new(),
            held: VecDeque::new(),
            keep: 0,
            block: BLOCK,
            firm: 0,
            own_level_db,
            pending: Vec::new(),
            done: Vec::new(),
        }
    }

    /// How surprising the context is, bits a plan frame: as the governor knows it.
    pub fn context_bits(&self) -> Option<f32> {
        Some(self.governor.as_ref()?.prompt_surprisal() / std::f32::consts::LN_2)
    }

    /// From now on it remembers how to go back by this many frames, can go back at any time without delay, and has frames to
    /// play while it does.
    pub fn keep(&mut self, frames: u64) {
        self.keep = frames;
        (self.block, self.firm) = (LIVE_BLOCK, LIVE_FIRM);
    }

    /// How it draws.
    pub fn options(&self) -> &Options {
        &self.generator.state.options
    }

    /// Frames played so far.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// Whether it has run ahead as far as it should.
    pub fn is_ahead(&self) -> bool {
        self.held.len() >= self.hold()
    }

    /// Whether there is a frame to play at once.
    pub fn has_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// What the governor did about the frames played since this was last asked.
    pub fn interventions(&mut self) -> Vec<Intervention> {
        std::mem::take(&mut self.done)
    }

    fn hold(&self) -> usize {
        // What is chosen live takes a while, for which something has to be there to play.
        if self.governor.is_some() || (self.keep > 0 && self.generator.manner().is_some()) { HOLD } else { 1 }
    }

    /// The next frame, once it has run far enough ahead of it.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next(&mut self, engine: &mut dyn Engine) -> Result<Frame, EngineError> {
        while !self.is_ahead() {
            self.advance(engine)?;
        }
        self.release(engine)
    }

    /// The next frame, however far it has run ahead.
    ///
    /// # Errors
    /// The engine's own.
    pub fn release(&mut self, engine: &mut dyn Engine) -> Result<Frame, EngineError> {
        let frame = loop {
            match self.held.pop_front() {
                Some(frame) => break frame,
                None => drop(self.advance(engine)?),
            }
        };
        self.released += 1;
        self.forget();
        let (past, pending) = self.pending.iter().partition(|(from, _)| *from < self.released);
        self.pending = pending;
        let past: Vec<(u64, Intervention)> = past;
        self.done.extend(past.into_iter().map(|(_, intervention)| intervention));
        Ok(frame)
    }

    /// Generates one frame, or goes back where that fails; or looks at a way on from here (at all of them where the engine likes that
    /// better), which takes no longer, so that what is held lasts. Says whether it was a frame.
    ///
    /// # Errors
    /// The engine's own.
    pub fn advance(&mut self, engine: &mut dyn Engine) -> Result<bool, EngineError> {
        let at = self.generator.state.n_frames;
        let is_marked = self.marks.back().is_some_and(|mark| mark.frame() == at);
        if self.remembers() && !is_marked && (at.is_multiple_of(self.block) || self.marks.is_empty()) {
            self.mark(engine)?;
        }
        let due = self.generator.state.due;
        if self.guide.at(at).is_none() && self.generator.consider(engine)? {
            return Ok(false);
        }
        if self.keep > 0 && self.generator.state.due != due {
            // Where nobody can wait, going back is not to choose once more.
            self.mark(engine)?;
        }
        let (frame, alarm) = self.generate(engine)?;
        self.held.push_back(frame);
        if let (Some(governor), Some(alarm)) = (&mut self.governor, alarm)
            && let Some((from, attempt)) = governor.decide(alarm)
        {
            let at_s = self.seconds(engine, at);
            let to = self.marks.iter().rev().find(|mark| mark.frame() <= from).or(self.marks.front());
            let to = to.map_or(0, Mark::frame).max((self.released + self.firm).min(at));
            self.go_to(engine, to)?;
            self.branch(engine)?;
            let intervention = Intervention { at_s, from_s: self.seconds(engine, to), alarm, attempt };
            self.pending.retain(|(from, _)| *from < to);
            self.pending.push((to, intervention));
        }
        Ok(true)
    }

    fn seconds(&self, engine: &dyn Engine, frame: u64) -> f64 {
        let config = engine.config();
        frame as f64 * config.plan.hop as f64 / f64::from(config.codec.sample_rate)
    }

    /// Whether there may be a reason to go back; if not, nothing is ever held and no marks are made.
    fn remembers(&self) -> bool {
        self.governor.is_some() || self.keep > 0
    }

    fn mark(&mut self, engine: &dyn Engine) -> Result<(), EngineError> {
        if self.remembers() {
            let generator = self.generator.state.clone();
            self.marks.retain(|mark| mark.frame() < generator.n_frames);
            let (governor, branches) = (self.governor.clone(), self.branches);
            self.marks.push_back(Mark { engine: engine.snapshot()?, generator, governor, branches });
        }
        Ok(())
    }

    /// Drops the marks that are of no more use.
    fn forget(&mut self) {
        let oldest = self.released.saturating_sub(self.keep);
        while self.marks.get(1).is_some_and(|second| second.frame() <= oldest) {
            self.marks.pop_front();
        }
        // Of what was played a few are enough; those at and after the last one before `released` all stay.
        let played = self.marks.iter().take_while(|mark| mark.frame() <= self.released).count();
        if played >= 3 {
            let (a, b) = (self.marks[played - 3].frame(), self.marks[played - 1].frame());
            if b - a <= SPARSE {
                self.marks.remove(played - 2);
            }
        }
    }

    /// The last mark at or before `frame`.
    fn mark_before(&self, frame: u64) -> Option<&Mark> {
        self.marks.iter().rev().find(|mark| mark.frame() <= frame)
    }

    /// Brings everything back to before `frame`, which lies at or after the oldest mark.
    fn go_to(&mut self, engine: &mut dyn Engine, frame: u64) -> Result<(), EngineError> {
        let Some(mark) = self.mark_before(frame) else {
            return Err(EngineError::State("there is no way back that far".into()));
        };
        engine.rewind(&mark.engine)?;
        let governor = mark.governor.clone();
        self.generator.rewind(mark.generator.clone());
        if let (Some(earlier), Some(now)) = (governor, &self.governor) {
            self.governor = Some(Governor::rewound(&earlier, now));
        }
        self.marks.retain(|mark| mark.frame() <= frame);
        self.held.truncate(frame.saturating_sub(self.released) as usize);
        while self.generator.state.n_frames < frame {
            self.generate(engine)?;
        }
        Ok(())
    }

    /// One frame, which the governor hears; and what it thinks of it.
    fn generate(&mut self, engine: &mut dyn Engine) -> Result<(Frame, Option<Alarm>), EngineError> {
        let given = self.guide.at(self.generator.state.n_frames);
        let frame = self.generator.next_frame(engine, given.as_deref())?;
        // As loud as the model would play it, whatever level was asked for.
        let gain = 10.0f32.powf((self.own_level_db - self.options().wave.level_db) / 20.0);
        let Some(governor) = &mut self.governor else { return Ok((frame, None)) };
        let samples: Vec<f32> = engine.config().codec.decode_all(&frame.tokens).iter().map(|x| gain * x).collect();
        let alarm = governor.hear(&samples, &frame.plan.bands, frame.draw, &self.generator.spectrum)?;
        if given.is_some() {
            // A plan that comes from elsewhere may ask for silence, or for one tone.
            governor.forget();
            return Ok((frame, None));
        }
        Ok((frame, alarm))
    }

    /// Takes another way after the next frame, which is planned already.
    fn branch(&mut self, engine: &dyn Engine) -> Result<(), EngineError> {
        self.branches += 1;
        self.generator.branch(self.branches);
        self.mark(engine)
    }

    /// Drops what is held, so that what changes takes effect with the next frame.
    fn drop_held(&mut self, engine: &mut dyn Engine) -> Result<(), EngineError> {
        if self.generator.state.n_frames > self.released {
            self.go_to(engine, self.released)?;
            self.pending.retain(|(from, _)| *from < self.released);
        }
        Ok(())
    }

    /// Draws sounds otherwise from the next frame on, and plans from the one after it.
    ///
    /// # Errors
    /// The engine's own.
    pub fn set_options(&mut self, engine: &mut dyn Engine, options: &Options) -> Result<(), EngineError> {
        if options != self.options() {
            self.drop_held(engine)?;
            self.generator.rewind(GeneratorState { options: *options, ..self.generator.state.clone() });
            self.mark(engine)?;
        }
        Ok(())
    }

    /// Plans come from elsewhere from the next frame on.
    ///
    /// # Errors
    /// The engine's own.
    pub fn set_guide(&mut self, engine: &mut dyn Engine, guide: Guide) -> Result<(), EngineError> {
        self.drop_held(engine)?;
        self.generator.rewind(self.generator.state.clone());
        self.guide = guide;
        self.mark(engine)
    }

    /// Where the plan comes from.
    pub fn guide(&self) -> &Guide {
        &self.guide
    }

    /// Goes back by `frames` of what was played, as far as it remembers, and takes another way from there, drawn as now; gives how far.
    ///
    /// # Errors
    /// The engine's own.
    pub fn vary(&mut self, engine: &mut dyn Engine, frames: u64) -> Result<u64, EngineError> {
        let wanted = self.released.saturating_sub(frames.min(self.keep));
        let to = self.mark_before(wanted).or(self.marks.front()).map_or(self.released, Mark::frame).min(self.released);
        let (back, options) = (self.released - to, *self.options());
        self.held.clear();
        self.released = to;
        self.go_to(engine, to)?;
        self.generator.state.options = options;
        self.governor.iter_mut().for_each(Governor::start_afresh);
        self.branch(engine)?;
        self.pending.clear();
        Ok(back)
    }

    /// What it goes on from bit for bit, and the engine's state that belongs to it.
    pub(super) fn state(&self, engine: &mut dyn Engine) -> Result<(PathState, Vec<u8>), EngineError> {
        let Some(mark) = self.mark_before(self.released).filter(|_| self.generator.state.n_frames > self.released)
        else {
            let state = PathState {
                generator: self.generator.state.clone(),
                governor: self.governor.clone(),
                branches: self.branches,
                released_since: 0,
                own_level_db: self.own_level_db,
            };
            return Ok((state, engine.save()?));
        };
        let now = engine.snapshot()?;
        engine.rewind(&mark.engine)?;
        let saved = engine.save();
        engine.rewind(&now)?;
        let state = PathState {
            generator: mark.generator.clone(),
            governor: mark.governor.clone(),
            branches: mark.branches,
            released_since: self.released - mark.frame(),
            own_level_db: self.own_level_db,
        };
        Ok((state, saved?))
    }

    /// The path that a state was taken of; the engine has been brought to where it belongs.
    pub(super) fn from_state(engine: &mut dyn Engine, state: &PathState) -> Result<Self, EngineError> {
        let PathState { generator, released_since, .. } = state;
        if generator.n_frames.max(state.branches) > LAST_FRAME || *released_since > SPARSE {
            return Err(EngineError::State(format!("{released_since} frames after frame {}", generator.n_frames)));
        }
        let generator = Generator::from_state(spectrum_of(engine)?, generator.clone());
        let mut path = Self::at(generator, state.governor.clone(), state.own_level_db);
        path.branches = state.branches;
        path.released += released_since;
        while path.generator.state.n_frames < path.released {
            // These frames were played, so whatever was thought of them, nothing was done.
            if let (_, Some(alarm)) = path.generate(engine)?
                && let Some(governor) = &mut path.governor
            {
                governor.decide(alarm);
            }
        }
        Ok(path)
    }
}

fn spectrum_of(engine: &dyn Engine) -> Result<Spectrum, PlanError> {
    Spectrum::new(engine.config().codec.sample_rate, &engine.config().plan)
}
