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
mod wave;

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, s};

use super::state::{Counters, SavedStream, plan_cache, wave_cache};
use super::{Engine, EngineError, PlanDraw, Snapshot, UNIFORMS_PER_SAMPLE, check_tokens, expect, state_error};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::forecast::{PLANNED, PastForecast, PlannedForecast};
use crate::model::config::{GenerationSettings, ModelConfig};
use crate::model::features::{features, residual_code};
use crate::plan::{PlanFrame, ResidualQuantizer, Spectrum};
use crate::sampler::{Drive, Mixture, PlanSampling, WaveSampling};
use crate::simd::{Isa, Kernels};
use linear::Source;
use lockstep::Member;
use plan::{PlanState, PlanTransformer, PlanTurn, PlanWork};
use wave::{Step, WaveState, WaveTransformer, WaveWork};

/// Plan frames of the prompt that the wave transformer reads: more than its attention windows hold.
const WAVE_CONTEXT: usize = 32;

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

/// A packed model.
struct Weights {
    config: ModelConfig,
    quantizer: ResidualQuantizer,
    spectrum: Spectrum,
    generation: GenerationSettings,
    kernels: &'static Kernels,
    plan: PlanTransformer,
    wave: WaveTransformer,
}

/// What a stream remembers.
#[derive(Clone)]
struct Stream {
    plan: PlanState,
    wave: WaveState,
    past: PastForecast,
    planned: PlannedForecast,
    drive: Drive,
}

/// Room for a step, and nothing that lasts.
#[derive(Default)]
struct Work {
    plan: PlanWork,
    wave: WaveWork,
    head: Vec<f32>,
    mixture: Mixture,
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

/// A frame to render: whose, how, from which uniforms and where to; [`CpuEngine::begin_frame`] came first.
struct Turn<'a> {
    stream: &'a mut Stream,
    sampling: &'a WaveSampling,
    uniforms: &'a [f32],
    out: &'a mut [Token],
}

impl<'a> Turn<'a> {
    fn split(self) -> (Lane<'a>, Step<'a>) {
        let Turn { stream: Stream { wave, past, planned, drive, .. }, sampling, uniforms, out } = self;
        (Lane { past, planned, drive, sampling, uniforms, out }, Step::new(wave))
    }
}

/// A [`Turn`] but for the wave transformer's part of the stream.
struct Lane<'a> {
    past: &'a mut PastForecast,
    planned: &'a mut PlannedForecast,
    drive: &'a mut Drive,
    sampling: &'a WaveSampling,
    uniforms: &'a [f32],
    out: &'a mut [Token],
}

impl CpuEngine {
    /// Packs the weights of a checkpoint.
    ///
    /// # Errors
    /// When this machine has not the instruction set asked for.
    pub fn new(checkpoint: &Checkpoint, options: &CpuOptions) -> Result<Self, EngineError> {
        let isa = options.isa;
        let kernels = Kernels::of(isa)
            .ok_or_else(|| EngineError::State(format!("this machine has no instruction set '{}'", isa.name())))?;
        let source = |part: &str| Source::new(&checkpoint.weights, part, options.precision);
        let config = checkpoint.config.clone();
        let spectrum = checkpoint.spectrum()?;
        let (plan, wave) = rayon::join(
            || PlanTransformer::new(&source("plan"), &config),
            || WaveTransformer::new(&source("wave"), &config),
        );
        let weights = Arc::new(Weights {
            plan: plan?,
            wave: wave?,
            quantizer: checkpoint.quantizer.clone(),
            spectrum,
            generation: checkpoint.generation,
            kernels,
            config,
        });
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

    /// The instruction set that it runs on.
    pub fn isa(&self) -> Isa {
        self.weights.kernels.isa
    }

    /// The next samples lie in this plan frame, `[n_bands]`; [`Engine::render`] does this by itself.
    ///
    /// # Errors
    /// When `bands` is no frame of this model.
    pub fn begin_frame(&mut self, bands: &[f32]) -> Result<(), EngineError> {
        let Self { weights, stream, work, .. } = self;
        expect("plan bands", weights.spectrum.n_bands(), bands.len())?;
        stream.planned.begin_frame(&weights.spectrum, stream.wave.last_frame(), bands).map_err(state_error)?;
        weights.wave.begin_frame(weights.kernels, &mut stream.wave, bands, &mut work.wave);
        Ok(())
    }

    /// One step: the next token, at most `hop` of them after [`begin_frame`](Self::begin_frame).
    pub fn next_token(&mut self, uniforms: [f32; UNIFORMS_PER_SAMPLE]) -> Result<Token, EngineError> {
        let mut token = [0];
        self.render_samples(&uniforms, &mut token)?;
        Ok(token[0])
    }

    fn render_samples(&mut self, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        let Self { weights, wave_sampling: sampling, stream, member, work, .. } = self;
        let turn = Turn { stream, sampling, uniforms, out };
        match member {
            Some(member) => member.render(weights, turn, work),
            None => {
                let (lane, step) = turn.split();
                weights.render(&mut [lane], &mut [step], work);
                Ok(())
            }
        }
    }

    /// [`Engine::next_plan`] for several streams over the same weights, each weight read once for all of them; every stream has
    /// read a prompt.
    ///
    /// # Errors
    /// When numbers are missing, a stream is at its very beginning, or the engines do not share their weights.
    pub fn plan_together(
        engines: &mut [&mut CpuEngine],
        uniforms: &[Vec<f32>],
        out: &mut [PlanFrame],
    ) -> Result<(), EngineError> {
        for (what, got) in [("rows of uniforms", uniforms.len()), ("plans", out.len())] {
            expect(what, engines.len(), got)?;
        }
        let Some(weights) = Self::shared_weights(engines)? else { return Ok(()) };
        for (engine, uniforms) in engines.iter().zip(uniforms) {
            expect("uniforms", weights.config.plan.n_codebooks, uniforms.len())?;
            if engine.stream.plan.pos == 0 {
                return Err(EngineError::State("a stream that has heard nothing cannot be planned together".into()));
            }
        }
        let mut work = engines.first_mut().map(|first| std::mem::take(&mut first.work)).unwrap_or_default();
        let turns = engines.iter_mut().zip(uniforms).zip(out).map(|((engine, uniforms), frame)| {
            let CpuEngine { plan_sampling: sampling, stream, plan_draw: draw, .. } = &mut **engine;
            PlanTurn { state: &mut stream.plan, sampling, uniforms, frame, draw }
        });
        let drawn = weights.draw_all(turns, &mut work);
        if let Some(first) = engines.first_mut() {
            first.work = work;
        }
        drawn
    }

    /// The weights of all of `engines`; `None` if there are none.
    fn shared_weights(engines: &[&mut CpuEngine]) -> Result<Option<Arc<Weights>>, EngineError> {
        let Some(first) = engines.first() else { return Ok(None) };
        if engines.iter().any(|engine| !Arc::ptr_eq(&engine.weights, &first.weights)) {
            return Err(EngineError::State("streams of different models cannot be played together".into()));
        }
        Ok(Some(first.weights.clone()))
    }

    /// [`Engine::render`] for several streams over the same weights in lockstep, each weight read once for all of them.
    ///
    /// # Errors
    /// When numbers are missing, or the engines do not share their weights (see [`CpuEngine::fork`]).
    pub fn render_together(
        engines: &mut [&mut CpuEngine],
        plans: &[PlanFrame],
        uniforms: &[Vec<f32>],
        out: &mut [Vec<Token>],
    ) -> Result<(), EngineError> {
        for (what, got) in [("plans", plans.len()), ("rows of uniforms", uniforms.len()), ("rows of tokens", out.len())]
        {
            expect(what, engines.len(), got)?;
        }
        let Some(weights) = Self::shared_weights(engines)? else { return Ok(()) };
        for (i, (engine, plan)) in engines.iter_mut().zip(plans).enumerate() {
            expect("tokens", weights.config.plan.hop, out[i].len())?;
            expect("uniforms", UNIFORMS_PER_SAMPLE * out[i].len(), uniforms[i].len())?;
            engine.begin_frame(&plan.bands)?;
        }
        let mut work = engines.first_mut().map(|first| std::mem::take(&mut first.work)).unwrap_or_default();
        let turns = engines.iter_mut().zip(uniforms).zip(out).map(|((engine, uniforms), out)| {
            let CpuEngine { wave_sampling: sampling, stream, .. } = &mut **engine;
            Turn { stream, sampling, uniforms, out }
        });
        weights.render_all(turns, &mut work);
        if let Some(first) = engines.first_mut() {
            first.work = work;
        }
        Ok(())
    }
}

impl Stream {
    fn new(weights: &Weights) -> Result<Self, EngineError> {
        let forecast = &weights.config.forecast;
        Ok(Self {
            plan: weights.plan.new_state(),
            wave: weights.wave.new_state(&weights.spectrum.silent_frame()),
            past: PastForecast::new(forecast).map_err(state_error)?.with_kernels(weights.kernels),
            planned: PlannedForecast::new(forecast).map_err(state_error)?.with_kernels(weights.kernels),
            drive: Drive::default(),
        })
    }

    /// Tells everything but the wave transformer's tiers of a sample.
    fn push(&mut self, sample: f32) {
        self.past.push(sample);
        self.planned.push(sample);
    }
}

impl Weights {
    /// Tokens -> quantised plan: tokens `[frames, n_codebooks]`, flat, and decoded bands `[frames, n_bands]`.
    fn plan_of(&self, tokens: &[Token]) -> Result<(Vec<u16>, Array2<f32>), EngineError> {
        let exact = self.spectrum.analyse(&self.config.codec.decode_all(tokens));
        let codes = self.quantizer.encode_all(exact.view())?;
        let bands = self.quantizer.decode_all(codes.view())?;
        Ok((codes.into_iter().collect(), bands))
    }

    /// Frames `[frames, n_bands]` as the plan transformer reads them.
    fn centred(&self, bands: &Array2<f32>) -> Vec<f32> {
        (bands - &self.quantizer.mean).into_iter().collect()
    }

    /// Draws the next plan frame of every stream.
    fn draw(&self, turns: &mut [PlanTurn], work: &mut Work) -> Result<(), EngineError> {
        Ok(self.plan.draw(self.kernels, &self.quantizer, turns, &mut work.plan)?)
    }

    /// As [`draw`](Self::draw).
    fn draw_all<'a>(&self, turns: impl IntoIterator<Item = PlanTurn<'a>>, work: &mut Work) -> Result<(), EngineError> {
        self.draw(&mut turns.into_iter().collect::<Vec<_>>(), work)
    }

    /// Renders several streams in lockstep.
    fn render_all<'a>(&self, turns: impl IntoIterator<Item = Turn<'a>>, work: &mut Work) {
        let (mut lanes, mut steps): (Vec<_>, Vec<_>) = turns.into_iter().map(Turn::split).unzip();
        self.render(&mut lanes, &mut steps, work);
    }

    /// As many samples as the lanes have room for, within one plan frame.
    fn render(&self, lanes: &mut [Lane], steps: &mut [Step], work: &mut Work) {
        let codec = &self.config.codec;
        let head_dim = self.config.wave_transformer.head_dim();
        work.head.resize(lanes.len() * head_dim, 0.0);
        let n = lanes.iter().map(|lane| lane.out.len()).min().unwrap_or(0);
        for t in 0..n {
            for (lane, step) in lanes.iter_mut().zip(&mut *steps) {
                let forecasts = [lane.past.forecast(), lane.planned.forecast()];
                (step.features, step.past_code) = features(forecasts, lane.planned.log_scale(), codec);
                step.forecasts = forecasts;
            }
            self.wave.step(self.kernels, steps, &mut work.wave, &mut work.head);
            for ((lane, step), head) in lanes.iter_mut().zip(&mut *steps).zip(work.head.chunks_exact(head_dim)) {
                work.mixture.set(head, step.forecasts, lane.planned.log_scale(), codec);
                let uniforms = [lane.uniforms[UNIFORMS_PER_SAMPLE * t], lane.uniforms[UNIFORMS_PER_SAMPLE * t + 1]];
                let drawn = work.mixture.draw(uniforms, lane.sampling);
                let (rms, grain) = (lane.planned.residual_rms(), lane.sampling.grain);
                let sample = lane.drive.hold(drawn, step.forecasts[PLANNED], rms, grain);
                let token = codec.encode(sample);
                lane.past.push(codec.decode(token));
                lane.planned.push(sample);
                step.state.push(token, residual_code(token, step.past_code, codec));
                lane.out[t] = token;
            }
        }
    }

    /// Reads one plan frame of tokens sample by sample, without drawing; `each` gets the distribution of every sample.
    fn listen(
        &self,
        stream: &mut Stream,
        bands: &[f32],
        tokens: &[Token],
        work: &mut Work,
        mut each: impl FnMut(usize, &Mixture),
    ) -> Result<(), EngineError> {
        let codec = &self.config.codec;
        stream.planned.begin_frame(&self.spectrum, stream.wave.last_frame(), bands).map_err(state_error)?;
        self.wave.begin_frame(self.kernels, &mut stream.wave, bands, &mut work.wave);
        work.head.resize(self.config.wave_transformer.head_dim(), 0.0);
        for (t, &token) in tokens.iter().enumerate() {
            let forecasts = [stream.past.forecast(), stream.planned.forecast()];
            let log_scale = stream.planned.log_scale();
            let mut step = Step::new(&mut stream.wave);
            (step.features, step.past_code) = features(forecasts, log_scale, codec);
            let past_code = step.past_code;
            self.wave.step(self.kernels, &mut [step], &mut work.wave, &mut work.head);
            work.mixture.set(&work.head, forecasts, log_scale, codec);
            each(t, &work.mixture);
            stream.push(codec.decode(token));
            stream.wave.push(token, residual_code(token, past_code, codec));
        }
        Ok(())
    }

    /// Reads the end of a prompt of whole frames: what lies within reach of the wave transformer's windows.
    fn read_end(
        &self,
        stream: &mut Stream,
        bands: ArrayView2<f32>,
        tokens: &[Token],
        work: &mut Work,
    ) -> Result<(), EngineError> {
        let (hop, history) = (self.config.plan.hop, self.config.wave_transformer.history());
        let n_frames = bands.nrows();
        let first = n_frames.saturating_sub(WAVE_CONTEXT);
        let first_frames = self.wave.first_frames(n_frames, first);
        let by_sample = first_frames.last().copied().unwrap_or(first);
        let n_plan = stream.wave.plan.len();
        for (i, frame) in stream.wave.plan.iter_mut().enumerate() {
            if let Some(before) = (first + i).checked_sub(n_plan) {
                *frame = bands.row(before).to_vec();
            }
        }
        let mut seen = vec![self.config.codec.silence(); history];
        seen.extend_from_slice(tokens);
        stream.wave.tokens.copy_from_slice(&seen[first * hop..first * hop + history]);
        for frame in first..by_sample {
            let wave = &mut stream.wave;
            self.wave.begin_frame(self.kernels, wave, &bands.row(frame).to_vec(), &mut work.wave);
            let n_tiers = first_frames.iter().filter(|&&first| first <= frame).count();
            let seen = &seen[frame * hop..history + (frame + 1) * hop];
            self.wave.read_frame(self.kernels, wave, seen, n_tiers, &mut work.wave);
        }
        // The forecasts listen from where all that they follow from begins.
        let heard = by_sample.saturating_sub(self.config.forecast.frames_before(&self.config.plan));
        let samples = self.config.codec.decode_all(&tokens[heard * hop..by_sample * hop]);
        samples.iter().for_each(|&sample| stream.past.push(sample));
        stream.planned.hear(&self.spectrum, &samples, bands.slice(s![heard..by_sample, ..])).map_err(state_error)?;
        for frame in by_sample..n_frames {
            let range = frame * hop..(frame + 1) * hop;
            self.listen(stream, &bands.row(frame).to_vec(), &tokens[range], work, |_, _| ())?;
        }
        Ok(())
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

    fn prefill(&mut self, prompt: &[Token]) -> Result<(), EngineError> {
        check_tokens(&self.weights.config, prompt)?;
        self.reset()?;
        let Self { weights, stream, work, .. } = self;
        let hop = weights.config.plan.hop;
        let n_frames = prompt.len().div_ceil(hop);
        if n_frames == 0 {
            return Ok(());
        }
        let mut tokens = vec![weights.config.codec.silence(); n_frames * hop - prompt.len()];
        tokens.extend_from_slice(prompt);
        let (codes, bands) = weights.plan_of(&tokens)?;
        let centred = weights.centred(&bands);
        let mut plan = stream.plan.clone();
        let mut plan_work = std::mem::take(&mut work.plan);
        let (_, read) = rayon::join(
            || weights.plan.read(weights.kernels, &mut plan, &codes, &centred, &mut plan_work, |_, _, _| ()),
            || weights.read_end(stream, bands.view(), &tokens, work),
        );
        stream.plan = plan;
        work.plan = plan_work;
        read
    }

    fn next_plan(&mut self, uniforms: &[f32], out: &mut PlanFrame) -> Result<(), EngineError> {
        expect("uniforms", self.weights.config.plan.n_codebooks, uniforms.len())?;
        if self.stream.plan.pos == 0 {
            // Nothing was heard yet: begin after one frame of silence.
            let silence = vec![self.weights.config.codec.silence(); self.weights.config.plan.hop];
            self.prefill(&silence)?;
        }
        let Self { weights, stream, work, plan_sampling: sampling, plan_draw: draw, member, .. } = self;
        let turn = PlanTurn { state: &mut stream.plan, sampling, uniforms, frame: out, draw };
        match member {
            Some(member) => member.plan(weights, turn, work),
            None => weights.draw(&mut [turn], work),
        }
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
        let (_, bands) = weights.plan_of(tokens)?;
        expect("tokens (whole plan frames)", bands.nrows() * hop, tokens.len())?;
        let codec = &weights.config.codec;
        for (frame, (tokens, nll)) in tokens.chunks_exact(hop).zip(nll.chunks_exact_mut(hop)).enumerate() {
            weights.listen(stream, &bands.row(frame).to_vec(), tokens, work, |t, mixture| {
                nll[t] = -mixture.log_prob(tokens[t], codec) as f32;
            })?;
        }
        Ok(())
    }

    fn score_plan(&mut self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        let weights = &self.weights;
        check_tokens(&weights.config, tokens)?;
        let (codes, bands) = weights.plan_of(tokens)?;
        Ok(weights.plan.nll(weights.kernels, &codes, &weights.centred(&bands), &mut self.work.plan))
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        let Stream { plan, wave, past, planned, drive } = &self.stream;
        let mut caches: BTreeMap<_, _> = plan.stack.save().enumerate().map(|(i, c)| (plan_cache(i), c)).collect();
        for (i, stack) in wave.stacks.iter().enumerate() {
            caches.extend(stack.save().enumerate().map(|(j, c)| (wave_cache(i, j), c)));
        }
        let counters = Counters {
            plan_pos: plan.pos,
            n: wave.n,
            tokens: wave.tokens.clone(),
            residual_code: wave.residual_code,
            plan: wave.plan.clone(),
            past: past.clone(),
            planned: planned.clone(),
            drive: *drive,
        };
        SavedStream { counters, hidden: (plan.pos > 0).then(|| plan.hidden.clone()), caches }.to_bytes()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError> {
        let Self { weights, .. } = &*self;
        let saved = SavedStream::from_bytes(state, &weights.config, weights.spectrum.n_bands())?;
        let mut stream = Stream::new(weights)?;
        let Counters { plan_pos, n, tokens, residual_code, plan, past, planned, drive } = saved.counters;
        let n_blocks = weights.config.plan_transformer.n_layers;
        stream.plan.stack.restore(weights.kernels, (0..n_blocks).filter_map(|i| saved.caches.get(&plan_cache(i))));
        for (i, (stack, tier)) in stream.wave.stacks.iter_mut().zip(&weights.config.wave_transformer.tiers).enumerate()
        {
            stack.restore(weights.kernels, (0..tier.n_layers).filter_map(|j| saved.caches.get(&wave_cache(i, j))));
        }
        stream.plan.pos = plan_pos;
        if let Some(hidden) = saved.hidden {
            stream.plan.hidden = hidden;
        }
        let wave = &mut stream.wave;
        (wave.n, wave.tokens, wave.residual_code, wave.plan) = (n, tokens, residual_code, plan);
        stream.past = past.with_kernels(weights.kernels);
        stream.planned = planned.with_kernels(weights.kernels);
        stream.drive = drive;
        self.stream = stream;
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
