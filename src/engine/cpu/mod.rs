//! The CPU engine: the whole step without tensors or allocations, on kernels chosen for the machine's instruction set.
//!
//! Weights are packed once and shared; every [`CpuEngine`] is one stream over them. Whole-number products are exact and
//! float sums have one order (see [`crate::simd`]), so the same seed gives the same bytes on every instruction set, and
//! streams that are rendered together give the same bytes as alone.

mod cache;
mod linear;
mod lockstep;
mod plan;
mod stack;
mod stream;
mod wave;
mod weights;

use std::sync::Arc;

use super::{Engine, EngineError, PlanDraw, Snapshot, UNIFORMS_PER_SAMPLE, check_tokens, expect, hear_as};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::model::config::{GenerationSettings, ModelConfig};
use crate::plan::{PlanFrame, frames_of};
use crate::sampler::{PlanSampling, WaveSampling};
use crate::simd::Isa;
use lockstep::Member;
use plan::{PlanTurn, PlanWork};
use stream::{Stream, Turn, Work};
use weights::Weights;

/// What the blocks' matrices are made of; small maps are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Whole numbers of 8 bits with a scale per output; inputs rounded to 8 bits with a scale per vector.
    #[default]
    Int8,
    F32,
}

/// How to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    pub isa: Isa,
    pub precision: Precision,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { isa: Isa::chosen(), precision: Precision::default() }
    }
}

/// One stream over shared weights.
pub struct CpuEngine {
    weights: Arc<Weights>,
    plan_sampling: PlanSampling,
    wave_sampling: WaveSampling,
    stream: Stream,
    /// Its place among streams that render together.
    member: Option<Member>,
    plan_draw: PlanDraw,
    work: Work,
}

impl CpuEngine {
    /// Packs the weights of a checkpoint.
    ///
    /// # Errors
    /// When this machine has not the instruction set asked for.
    pub fn new(checkpoint: &Checkpoint, options: &CpuOptions) -> Result<Self, EngineError> {
        let weights = Arc::new(Weights::new(checkpoint, options)?);
        Ok(Self {
            stream: Stream::new(&weights)?,
            plan_sampling: PlanSampling::default(),
            wave_sampling: weights.generation,
            member: None,
            plan_draw: PlanDraw::default(),
            work: Work::default(),
            weights,
        })
    }

    /// Another stream over the same weights, at its beginning.
    ///
    /// # Errors
    /// None that [`CpuEngine::new`] has not had.
    pub fn fork(&self) -> Result<Self, EngineError> {
        Ok(Self {
            weights: self.weights.clone(),
            plan_sampling: PlanSampling::default(),
            wave_sampling: self.weights.generation,
            stream: Stream::new(&self.weights)?,
            member: None,
            plan_draw: PlanDraw::default(),
            work: Work::default(),
        })
    }

    /// `n` streams over the same weights that read them once for all: [`Engine::render`] waits until every one of them that
    /// still exists renders too. Each is for a thread of its own, which drops it when it is done; what they play is what they
    /// would play alone.
    ///
    /// # Errors
    /// As [`CpuEngine::fork`].
    pub fn fork_in_lockstep(&self, n: usize) -> Result<Vec<Self>, EngineError> {
        let members = Member::group(Stream::new(&self.weights)?, self.weights.generation, n);
        members.into_iter().map(|member| Ok(Self { member: Some(member), ..self.fork()? })).collect()
    }

    /// Where nothing was heard yet, one frame of silence is.
    fn begin(&mut self) -> Result<(), EngineError> {
        if self.stream.plan.pos > 0 {
            return Ok(());
        }
        self.prefill(&vec![self.weights.config.codec.silence(); self.weights.config.plan.hop]).map(drop)
    }

    /// The instruction set that it runs on.
    pub fn isa(&self) -> Isa {
        self.weights.kernels.isa
    }

    /// The next samples lie in this plan frame, `[n_bands]`; [`Engine::render`] does this by itself.
    ///
    /// # Errors
    /// When `bands` is no frame of this model.
    pub fn begin_frame(&mut self, bands: &[f32]) -> Result<(), EngineError> {
        let Self { weights, wave_sampling, stream, work, .. } = self;
        let mut played = std::mem::take(&mut work.bands);
        played.clear();
        played.extend(bands.iter().map(|&band| wave_sampling.played(band)));
        let begun = weights.begin_frame(&mut stream.sound, &played, work);
        work.bands = played;
        begun
    }

    /// One step: the next token, at most `hop` of them after [`begin_frame`](Self::begin_frame).
    pub fn next_token(&mut self, uniforms: [f32; UNIFORMS_PER_SAMPLE]) -> Result<Token, EngineError> {
        let mut token = [0];
        self.render_samples(&uniforms, &mut token)?;
        Ok(token[0])
    }

    fn render_samples(&mut self, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        let Self { weights, wave_sampling: sampling, stream, member, work, .. } = self;
        let turn = Turn { sound: &mut stream.sound, sampling, uniforms, out };
        match member {
            Some(member) => member.render(weights, turn, work),
            None => {
                let (lane, step) = turn.split();
                weights.render(&mut [lane], &mut [step], work);
                Ok(())
            }
        }
    }
}

impl Engine for CpuEngine {
    fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    fn generation(&self) -> GenerationSettings {
        self.wave_sampling
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.stream = Stream::new(&self.weights)?;
        Ok(())
    }

    fn set_sampling(&mut self, plan: PlanSampling, wave: WaveSampling) {
        self.plan_sampling = plan;
        self.wave_sampling = wave;
    }

    fn prefill(&mut self, prompt: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        check_tokens(&self.weights.config, prompt)?;
        self.reset()?;
        let Self { weights, stream, work, .. } = self;
        let hop = weights.config.plan.hop;
        let n_frames = prompt.len().div_ceil(hop);
        if n_frames == 0 {
            return Ok(Vec::new());
        }
        let mut tokens = vec![weights.config.codec.silence(); n_frames * hop - prompt.len()];
        tokens.extend_from_slice(prompt);
        let (codes, bands) = weights.read_plan(&mut stream.plan, &tokens, &mut work.plan)?;
        weights.read_end(&mut stream.sound, bands.view(), &tokens, work)?;
        Ok(frames_of(&codes, bands.view()))
    }

    fn heard_as(&mut self, plan: &[PlanFrame]) -> Result<(), EngineError> {
        hear_as(&mut self.stream.sound.wave.plan, plan, &self.wave_sampling)
    }

    fn plan_of(&self, tokens: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        check_tokens(&self.weights.config, tokens)?;
        let mut state = self.weights.plan.new_state();
        let (codes, bands) = self.weights.read_plan(&mut state, tokens, &mut PlanWork::default())?;
        Ok(frames_of(&codes, bands.view()))
    }

    fn next_plan(&mut self, uniforms: &[f32], out: &mut PlanFrame) -> Result<(), EngineError> {
        expect("uniforms", self.weights.config.plan.n_codebooks, uniforms.len())?;
        self.begin()?;
        let Self { weights, stream, work, plan_sampling: sampling, plan_draw: draw, member, .. } = self;
        let turn = PlanTurn { state: &mut stream.plan, sampling, uniforms, frame: out, draw };
        match member {
            Some(member) => member.plan(weights, turn, work),
            None => weights.draw(&mut [turn], work),
        }
    }

    fn plan_ahead(&mut self, ways: &[Vec<f32>]) -> Result<Vec<Vec<PlanFrame>>, EngineError> {
        self.begin()?;
        let Self { weights, stream, work, plan_sampling: sampling, .. } = self;
        let way = |uniforms: &Vec<f32>| {
            let mut state = stream.plan.clone();
            let mut plan = Vec::new();
            for uniforms in uniforms.chunks_exact(weights.config.plan.n_codebooks) {
                let (mut frame, mut draw) = <(PlanFrame, PlanDraw)>::default();
                let turn = PlanTurn { state: &mut state, sampling, uniforms, frame: &mut frame, draw: &mut draw };
                weights.draw(&mut [turn], work)?;
                plan.push(frame);
            }
            Ok(plan)
        };
        ways.iter().map(way).collect()
    }

    fn plan_draw(&self) -> PlanDraw {
        self.plan_draw
    }

    fn render(&mut self, plan: &PlanFrame, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        expect("tokens", self.weights.config.plan.hop, out.len())?;
        expect("uniforms", UNIFORMS_PER_SAMPLE * out.len(), uniforms.len())?;
        self.begin_frame(&plan.bands)?;
        self.render_samples(uniforms, out)
    }

    fn score(&mut self, tokens: &[Token], nll: &mut [f32]) -> Result<(), EngineError> {
        expect("values", tokens.len(), nll.len())?;
        check_tokens(&self.weights.config, tokens)?;
        self.reset()?;
        let Self { weights, stream, work, .. } = self;
        let hop = weights.config.plan.hop;
        let (_, bands) = weights.read_plan(&mut weights.plan.new_state(), tokens, &mut work.plan)?;
        expect("tokens (whole plan frames)", bands.nrows() * hop, tokens.len())?;
        let codec = &weights.config.codec;
        for (frame, (tokens, nll)) in tokens.chunks_exact(hop).zip(nll.chunks_exact_mut(hop)).enumerate() {
            weights.listen(&mut stream.sound, &bands.row(frame).to_vec(), tokens, work, |t, mixture| {
                nll[t] = -mixture.log_prob(tokens[t], codec) as f32;
            })?;
        }
        Ok(())
    }

    fn score_plan(&mut self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        let weights = &self.weights;
        check_tokens(&weights.config, tokens)?;
        let (codes, bands) = weights.quantised(tokens)?;
        Ok(weights.plan.nll(weights.kernels, &codes, &weights.centred(&bands), &mut self.work.plan))
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        self.stream.save()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError> {
        self.stream = Stream::restored(&self.weights, state)?;
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot, EngineError> {
        Ok(Snapshot(Box::new(self.stream.clone())))
    }

    fn rewind(&mut self, to: &Snapshot) -> Result<(), EngineError> {
        self.stream.clone_from(to.state()?);
        Ok(())
    }
}
