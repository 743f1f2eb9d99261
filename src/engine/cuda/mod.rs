//! The CUDA engine: plan, forecasts, tiers and draws in one persistent kernel (kernels/decode_persistent.cu) that plays whole
//! plan frames without the host.
//!
//! [`Streams`] are any number of them in one launch, each the same as alone; [`CudaEngine`] is one of them as an engine, alone or in lockstep with
//! others. All run on whatever is a [`Machine`]: a GPU with the feature `cuda`, or the emulator of the kernels in tests.

mod group;
mod machine;
mod pack;
mod state;
mod streams;

use std::sync::Arc;

use ndarray::{Array2, s};

use super::state::SavedStream;
use super::{Engine, EngineError, PlanDraw, Snapshot, UNIFORMS_PER_SAMPLE, check_tokens, expect, hear_as};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::cuda::launch::{DecodeGeometry, Element};
use crate::model::config::{GenerationSettings, ModelConfig, WAVE_CONTEXT};
use crate::model::wave_transformer::PLAN_FRAMES;
use crate::plan::PlanFrame;
use crate::sampler::{PlanSampling, WaveSampling};
use group::{Member, Task, Turn};
use state::Kept;

pub use machine::{Machine, MachineError};
pub use streams::{Model, Plan, Played, Sampling, Streams, Wave};

/// Plan frames that are read in a launch, and that are played too: what plays meanwhile waits until the launches before its own have run.
const PLANNED: usize = 16;
const SCORED: usize = 4;
/// States that a machine is to have room for, of every stream that plays in lockstep: its own, one to look ahead with, and what it may go back to.
const STATES: usize = 14;

/// One stream on a machine.
pub struct CudaEngine<M: Machine> {
    member: Member<M>,
    sampling: Sampling,
    heard: bool,
    plan_draw: PlanDraw,
}

impl<M: Machine> CudaEngine<M> {
    /// Packs the weights of a checkpoint, large matrices in `element`, and sends them to the machine.
    ///
    /// # Errors
    /// When the kernel cannot play this model, or the machine has no room for it.
    pub fn new(machine: Arc<M>, checkpoint: &Checkpoint, element: Element) -> Result<Self, EngineError> {
        let model = Arc::new(Model::new(machine, checkpoint, element)?);
        let geometry = model.geometry(1);
        Self::over(model, geometry)
    }

    /// A stream over a model that is there already.
    ///
    /// # Errors
    /// When the machine has no room for it.
    pub fn over(model: Arc<Model<M>>, geometry: DecodeGeometry) -> Result<Self, EngineError> {
        Ok(Self::new_group(model, 1, geometry)?.swap_remove(0))
    }

    fn new_group(model: Arc<Model<M>>, n: usize, geometry: DecodeGeometry) -> Result<Vec<Self>, EngineError> {
        let sampling = Sampling { plan: PlanSampling::default(), wave: model.generation };
        let engine = |member| Self { member, sampling, heard: false, plan_draw: PlanDraw::default() };
        Ok(Member::group(model, n, geometry)?.into_iter().map(engine).collect())
    }

    /// Another stream over the same weights, at its beginning.
    ///
    /// # Errors
    /// When the machine has no room for it.
    pub fn fork(&self) -> Result<Self, EngineError> {
        Self::over(self.model().clone(), self.member.geometry())
    }

    /// `n` streams over the same weights that play in one launch: what asks for frames waits until every one of them that
    /// still exists wants something played too. Each is for a thread of its own, which drops it when it is done; what
    /// they play is what they would play alone.
    ///
    /// # Errors
    /// When the machine has no room for them.
    pub fn fork_in_lockstep(&self, n: usize) -> Result<Vec<Self>, EngineError> {
        self.fork_in_lockstep_by(n, self.model().geometry(n))
    }

    /// The same, the work shared by `geometry`.
    ///
    /// # Errors
    /// Likewise.
    pub fn fork_in_lockstep_by(&self, n: usize, geometry: DecodeGeometry) -> Result<Vec<Self>, EngineError> {
        Self::new_group(self.model().clone(), n, geometry)
    }

    /// How many streams in lockstep the machine has room for, each with states to go back to.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn room(&self) -> Result<usize, EngineError> {
        Ok(self.model().machine.free_bytes()? / (STATES * self.model().state_bytes()))
    }

    /// What streams are made of.
    pub fn model(&self) -> &Arc<Model<M>> {
        self.member.model()
    }

    /// Its state, for one of [`Streams`].
    ///
    /// # Errors
    /// When the machine fails.
    pub fn stream(&self) -> Result<SavedStream, EngineError> {
        self.member.streams().store(self.member.seat())
    }

    /// Plays by itself, whatever others wait for.
    fn play_alone(&mut self, n_frames: usize, plan: Plan, wave: Wave) -> Result<Played, EngineError> {
        self.member.streams().play_some(&[self.member.seat()], n_frames, plan, wave, &self.sampling)
    }

    /// Several plan frames by the stream's own plan, in one launch: plan uniforms `[n_frames, n_codebooks]`, wave uniforms `[n_frames,
    /// hop, 2]`. The same as as many calls of [`Engine::next_plan`] and [`Engine::render`].
    ///
    /// # Errors
    /// When numbers are missing, or the machine fails.
    pub fn play(
        &mut self,
        n_frames: usize,
        plan_uniforms: &[f32],
        wave_uniforms: &[f32],
    ) -> Result<(Vec<PlanFrame>, Vec<Token>), EngineError> {
        self.begin_with_silence()?;
        let played = self.play_alone(n_frames, Plan::Draw(plan_uniforms), Wave::Draw(wave_uniforms))?;
        let tokens = played.tokens.iter().map(|&token| token as Token).collect();
        Ok((self.frames(&played), tokens))
    }

    /// A turn of so many frames, with nothing in it yet.
    fn turn(&self, n_frames: usize) -> Turn {
        Turn { sampling: self.sampling, n_frames, ..Turn::default() }
    }

    fn frames(&self, played: &Played) -> Vec<PlanFrame> {
        let plan = &self.model().config.plan;
        let bands = played.bands.chunks_exact(self.model().spectrum.n_bands());
        let tokens = played.plan_tokens.chunks_exact(plan.n_codebooks);
        let frame = |(tokens, bands): (&[i32], &[f32])| PlanFrame {
            tokens: tokens.iter().map(|&token| token as u16).collect(),
            bands: bands.to_vec(),
        };
        tokens.zip(bands).map(frame).collect()
    }

    /// A stream that has heard nothing begins after one frame of silence.
    fn begin_with_silence(&mut self) -> Result<(), EngineError> {
        if self.heard {
            return Ok(());
        }
        let config = &self.model().config;
        let silence = vec![config.codec.silence(); config.plan.hop];
        self.prefill(&silence).map(drop)
    }

    /// The plan tokens of tokens, `[frames, n_codebooks]`.
    fn codes_of(&self, tokens: &[Token]) -> Result<Vec<i32>, EngineError> {
        let Model { config, spectrum, quantizer, .. } = &**self.model();
        let exact = spectrum.analyse(&config.codec.decode_all(tokens));
        Ok(quantizer.encode_all(exact.view())?.iter().map(|&code| code.into()).collect())
    }

    /// What becomes of the plan tokens of whole frames when they are read, beside the stream, which stays as it is.
    fn read_plan(&self, codes: &[i32]) -> Result<Played, EngineError> {
        let n_codebooks = self.model().config.plan.n_codebooks;
        let mut read = Played::default();
        if codes.is_empty() {
            return Ok(read);
        }
        let mut streams = Streams::new(self.model().clone(), 1, self.member.geometry())?;
        for codes in codes.chunks(PLANNED * n_codebooks) {
            read.extend(streams.play(codes.len() / n_codebooks, Plan::Read(codes), Wave::Silent, &self.sampling)?);
        }
        Ok(read)
    }

    /// Reads whole frames of tokens under their bands, `[frames, n_bands]`; nats of each token.
    fn read(&mut self, tokens: &[Token], bands: &[f32]) -> Result<Vec<f32>, EngineError> {
        let hop = self.model().config.plan.hop;
        let n_bands = self.model().spectrum.n_bands();
        let mut nats = Vec::with_capacity(tokens.len());
        for (tokens, bands) in tokens.chunks(SCORED * hop).zip(bands.chunks(SCORED * n_bands)) {
            let tokens: Vec<i32> = tokens.iter().map(|&token| token.into()).collect();
            let n_frames = tokens.len() / hop;
            let played = self.play_alone(n_frames, Plan::Given(bands), Wave::Read(&tokens))?;
            nats.extend(played.nll);
        }
        Ok(nats)
    }
}

impl<M: Machine> Engine for CudaEngine<M> {
    fn config(&self) -> &ModelConfig {
        &self.model().config
    }

    fn generation(&self) -> GenerationSettings {
        self.sampling.wave
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.heard = false;
        self.member.streams().reset(self.member.seat())
    }

    fn set_sampling(&mut self, plan: PlanSampling, wave: WaveSampling) {
        self.sampling = Sampling { plan, wave };
    }

    fn prefill(&mut self, prompt: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        let model = self.model().clone();
        let config = &model.config;
        check_tokens(config, prompt)?;
        self.reset()?;
        let (hop, history) = (config.plan.hop, config.wave_transformer.history());
        let n_frames = prompt.len().div_ceil(hop);
        if n_frames == 0 {
            return Ok(Vec::new());
        }
        let mut tokens = vec![config.codec.silence(); n_frames * hop - prompt.len()];
        tokens.extend_from_slice(prompt);
        let codes = self.codes_of(&tokens)?;
        let mut bands = Vec::with_capacity(n_frames * model.spectrum.n_bands());
        for codes in codes.chunks(PLANNED * config.plan.n_codebooks) {
            let n_frames = codes.len() / config.plan.n_codebooks;
            bands.extend(self.play_alone(n_frames, Plan::Read(codes), Wave::Silent)?.bands);
        }
        let bands = Array2::from_shape_vec((n_frames, model.spectrum.n_bands()), bands).map_err(super::state_error)?;
        // Of the samples, what lies within reach of the wave transformer's windows, after what the forecasts hear before it.
        let first = n_frames.saturating_sub(WAVE_CONTEXT);
        if first > 0 {
            let mut state = self.stream()?;
            let counters = &mut state.counters;
            let seen = &tokens[(first * hop).saturating_sub(history)..first * hop];
            counters.tokens.splice(..seen.len(), []);
            counters.tokens.extend_from_slice(seen);
            // The wave is still at its beginning, and so are its forecasts.
            let heard = first.saturating_sub(config.forecast.frames_before(&config.plan));
            let samples = config.codec.decode_all(&tokens[heard * hop..first * hop]);
            samples.iter().for_each(|&sample| counters.past.push(sample));
            let frames = bands.slice(s![heard..first, ..]);
            counters.planned.hear(&model.spectrum, &samples, frames).map_err(super::state_error)?;
            for (i, frame) in counters.plan.iter_mut().enumerate() {
                if let Some(before) = (first + i).checked_sub(PLAN_FRAMES) {
                    *frame = bands.row(before).to_vec();
                }
            }
            self.member.streams().load(self.member.seat(), &state)?;
        }
        let rest: Vec<f32> = bands.rows().into_iter().skip(first).flatten().copied().collect();
        self.read(&tokens[first * hop..], &rest)?;
        self.heard = true;
        Ok(self.frames(&Played { plan_tokens: codes, bands: bands.into_iter().collect(), ..Played::default() }))
    }

    fn heard_as(&mut self, plan: &[PlanFrame]) -> Result<(), EngineError> {
        if plan.is_empty() {
            return Ok(());
        }
        let mut state = self.stream()?;
        hear_as(&mut state.counters.plan, plan, &self.sampling.wave)?;
        // Others of the group wait only while it is written.
        let laid = self.model().laid(&state)?;
        self.member.streams().put(self.member.seat(), &laid)
    }

    fn plan_of(&self, tokens: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        check_tokens(&self.model().config, tokens)?;
        let codes = self.codes_of(tokens)?;
        let bands = self.read_plan(&codes)?.bands;
        Ok(self.frames(&Played { plan_tokens: codes, bands, ..Played::default() }))
    }

    fn next_plan(&mut self, uniforms: &[f32], out: &mut PlanFrame) -> Result<(), EngineError> {
        expect("uniforms", self.model().config.plan.n_codebooks, uniforms.len())?;
        self.begin_with_silence()?;
        let played = self.member.play(Task::Plan, Turn { plan: uniforms.to_vec(), ..self.turn(1) })?;
        *out = self.frames(&played).swap_remove(0);
        self.plan_draw = played.plan_draws.first().copied().unwrap_or_default();
        Ok(())
    }

    fn plan_ahead(&mut self, ways: &[Vec<f32>]) -> Result<Vec<Vec<PlanFrame>>, EngineError> {
        let Some(first) = ways.first() else { return Ok(Vec::new()) };
        ways.iter().try_for_each(|way| expect("uniforms", first.len(), way.len()))?;
        self.begin_with_silence()?;
        let turn = self.turn(first.len() / self.model().config.plan.n_codebooks);
        let played = self.member.play(Task::Ahead, Turn { plan: ways.concat(), ..turn })?;
        Ok((0..ways.len()).map(|way| self.frames(&played.of(way, ways.len()))).collect())
    }

    fn ways_at_once(&self) -> usize {
        usize::MAX
    }

    fn plan_draw(&self) -> PlanDraw {
        self.plan_draw
    }

    fn render(&mut self, plan: &PlanFrame, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        expect("tokens", self.model().config.plan.hop, out.len())?;
        expect("uniforms", UNIFORMS_PER_SAMPLE * out.len(), uniforms.len())?;
        expect("plan bands", self.model().spectrum.n_bands(), plan.bands.len())?;
        let turn = Turn { wave: uniforms.to_vec(), bands: plan.bands.clone(), ..self.turn(1) };
        let played = self.member.play(Task::Render, turn)?;
        out.iter_mut().zip(played.tokens).for_each(|(out, token)| *out = token as Token);
        Ok(())
    }

    fn score(&mut self, tokens: &[Token], nll: &mut [f32]) -> Result<(), EngineError> {
        expect("values", tokens.len(), nll.len())?;
        check_tokens(&self.model().config, tokens)?;
        self.reset()?;
        let codes = self.codes_of(tokens)?;
        let config = &self.model().config.plan;
        expect("tokens (whole plan frames)", codes.len() / config.n_codebooks * config.hop, tokens.len())?;
        let bands = self.read_plan(&codes)?.bands;
        nll.copy_from_slice(&self.read(tokens, &bands)?);
        Ok(())
    }

    fn score_plan(&mut self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        check_tokens(&self.model().config, tokens)?;
        let played = self.read_plan(&self.codes_of(tokens)?)?;
        Ok(played.plan_draws.iter().skip(1).map(|draw| draw.surprisal).collect())
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        self.stream()?.to_bytes()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError> {
        let Model { config, spectrum, .. } = &**self.model();
        // Some megabytes of numbers at a time, of no more streams at once than there are cores, however many are restored.
        let (laid, heard) = rayon::scope(|_| -> Result<_, EngineError> {
            let saved = SavedStream::from_bytes(state, config, spectrum.n_bands())?;
            Ok((self.model().laid(&saved)?, saved.counters.plan_pos > 0))
        })?;
        self.heard = heard;
        self.member.streams().put(self.member.seat(), &laid)
    }

    fn snapshot(&self) -> Result<Snapshot, EngineError> {
        Ok(Snapshot(Box::new((self.member.streams().keep(self.member.seat())?, self.heard))))
    }

    fn rewind(&mut self, to: &Snapshot) -> Result<(), EngineError> {
        let (kept, heard) = to.state::<(Kept<M>, bool)>()?;
        self.heard = *heard;
        self.member.streams().go_back(self.member.seat(), kept)
    }
}
