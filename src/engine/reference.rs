//! The reference engine: candle tensors, one step at a time, with no thought of speed. Other engines are tested
//! against it.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use ndarray::{Array2, ArrayView2};
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::state::{Counters, SavedCache, SavedStream, plan_cache, wave_cache};
use super::{Engine, EngineError, PlanDraw, UNIFORMS_PER_SAMPLE, check_tokens, expect, hear_as, state_error};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::forecast::{PAST, PastForecast, PlannedForecast};
use crate::model::Model;
use crate::model::block::KvCache;
use crate::model::config::{GenerationSettings, ModelConfig, WAVE_CONTEXT};
use crate::model::excerpt::{Excerpt, Piece};
use crate::model::features::{features, residual_code};
use crate::model::head;
use crate::model::wave_transformer::{PLAN_FRAMES, WaveState, WaveTransformer};
use crate::plan::{PlanFrame, ResidualQuantizer, Spectrum, frames_of};
use crate::sampler::{Drive, LogitSampler, Mixture, PlanSampling, WaveSampling};

/// Plan frames scored at a time, after [`SCORE_CONTEXT`] frames that are only read.
const SCORE_CHUNK: usize = 32;
const SCORE_CONTEXT: usize = 16;

/// Weights, settings and the state of one stream.
pub struct ReferenceEngine {
    config: ModelConfig,
    quantizer: ResidualQuantizer,
    spectrum: Spectrum,
    model: Model,
    plan_sampling: PlanSampling,
    wave_sampling: WaveSampling,
    stream: Stream,
    plan_draw: PlanDraw,
    /// One thread: candle's products of single rows are too small to share, and waking others costs more than they do.
    pool: ThreadPool,
}

/// What a stream remembers between frames.
struct Stream {
    plan_caches: Vec<KvCache>,
    plan_pos: u64,
    /// Hidden state after the last plan frame, `[1, 1, dim]`.
    plan_hidden: Option<Tensor>,
    wave: WaveState,
    past: PastForecast,
    planned: PlannedForecast,
    drive: Drive,
}

impl ReferenceEngine {
    pub fn new(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let model = checkpoint.model().map_err(|e| EngineError::State(e.to_string()))?;
        let spectrum = checkpoint.spectrum().map_err(|e| EngineError::State(e.to_string()))?;
        let config = checkpoint.config.clone();
        let stream = Stream::new(&model, &config, &spectrum.silent_frame())?;
        Ok(Self {
            quantizer: checkpoint.quantizer.clone(),
            spectrum,
            model,
            plan_sampling: PlanSampling::default(),
            wave_sampling: checkpoint.generation,
            stream,
            plan_draw: PlanDraw::default(),
            pool: ThreadPoolBuilder::new().num_threads(1).build().map_err(state_error)?,
            config,
        })
    }

    /// Tokens -> quantised plan: tokens `[frames, n_codebooks]` and decoded bands `[frames, n_bands]`.
    fn quantised(&self, tokens: &[Token]) -> Result<(Array2<u16>, Array2<f32>), EngineError> {
        let exact = self.spectrum.analyse(&self.config.codec.decode_all(tokens));
        let codes = self.quantizer.encode_all(exact.view()).map_err(state_error)?;
        let bands = self.quantizer.decode_all(codes.view()).map_err(state_error)?;
        Ok((codes, bands))
    }

    /// Plan tokens as a tensor `[1, frames, n_codebooks]` and centred bands `[1, frames, n_bands]`.
    fn plan_tensors(&self, codes: ArrayView2<u16>, bands: ArrayView2<f32>) -> Result<(Tensor, Tensor), EngineError> {
        let flat: Vec<u32> = codes.iter().map(|&c| c.into()).collect();
        let tokens = Tensor::from_vec(flat, (1, codes.nrows(), codes.ncols()), &Device::Cpu)?;
        let centred: Vec<f32> = (&bands - &self.quantizer.mean).into_iter().collect();
        let bands = Tensor::from_vec(centred, (1, bands.nrows(), bands.ncols()), &Device::Cpu)?;
        Ok((tokens, bands))
    }

    /// [`quantised`](Self::quantised) with refined bands.
    fn refined(&self, tokens: &[Token]) -> Result<(Array2<u16>, Array2<f32>), EngineError> {
        let (codes, mut bands) = self.quantised(tokens)?;
        if codes.nrows() > 0 {
            let (tokens, centred) = self.plan_tensors(codes.view(), bands.view())?;
            self.model.plan.refine(&tokens, &centred, &mut bands)?;
        }
        Ok((codes, bands))
    }
}

impl Stream {
    fn new(model: &Model, config: &ModelConfig, silent_bands: &[f32]) -> Result<Self, EngineError> {
        Ok(Self {
            plan_caches: model.plan.empty_caches()?,
            plan_pos: 0,
            plan_hidden: None,
            wave: model.wave.new_state(silent_bands)?,
            past: PastForecast::new(&config.forecast).map_err(state_error)?,
            planned: PlannedForecast::new(&config.forecast).map_err(state_error)?,
            drive: Drive::default(),
        })
    }
}

impl Engine for ReferenceEngine {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn generation(&self) -> GenerationSettings {
        self.wave_sampling
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        self.stream = Stream::new(&self.model, &self.config, &self.spectrum.silent_frame())?;
        Ok(())
    }

    fn set_sampling(&mut self, plan: PlanSampling, wave: WaveSampling) {
        self.plan_sampling = plan;
        self.wave_sampling = wave;
    }

    fn prefill(&mut self, prompt: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        check_tokens(&self.config, prompt)?;
        self.reset()?;
        let hop = self.config.plan.hop;
        let n_frames = prompt.len().div_ceil(hop);
        if n_frames == 0 {
            return Ok(Vec::new());
        }
        let mut tokens = vec![self.config.codec.silence(); n_frames * hop - prompt.len()];
        tokens.extend_from_slice(prompt);
        let (codes, mut bands) = self.quantised(&tokens)?;
        let (plan_tokens, plan_bands) = self.plan_tensors(codes.view(), bands.view())?;
        self.model.plan.refine(&plan_tokens, &plan_bands, &mut bands)?;
        let stream = &mut self.stream;
        stream.plan_hidden = Some(self.model.plan.prefill(&plan_tokens, &plan_bands, &mut stream.plan_caches)?);
        stream.plan_pos = n_frames as u64;

        let first = n_frames.saturating_sub(WAVE_CONTEXT);
        let piece = Piece { tokens: &tokens, heard: &tokens, plan: bands.view(), spectrum: &self.spectrum };
        let history = self.model.wave.history();
        let excerpt =
            Excerpt::read(&self.config, history, &piece, first..n_frames, &mut stream.past, &mut stream.planned)
                .map_err(state_error)?;
        self.model.wave.prefill(&excerpt.inputs()?, &mut stream.wave)?;
        let mut seen = vec![self.config.codec.silence(); history];
        seen.extend_from_slice(&tokens);
        stream.wave.tokens = seen[seen.len() - history..].to_vec();
        stream.wave.residual_code = excerpt.last_residual();
        let before = stream.wave.plan.clone();
        let rows = bands.rows().into_iter().map(|row| row.to_vec());
        let frames: Vec<Vec<f32>> = before.into_iter().chain(rows).collect();
        stream.wave.plan = frames[frames.len() - PLAN_FRAMES..].to_vec();
        Ok(frames_of(&codes.into_iter().collect::<Vec<_>>(), bands.view()))
    }

    fn heard_as(&mut self, plan: &[PlanFrame]) -> Result<(), EngineError> {
        hear_as(&mut self.stream.wave.plan, plan, &self.wave_sampling)
    }

    fn plan_of(&self, tokens: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        check_tokens(&self.config, tokens)?;
        let (codes, bands) = self.refined(tokens)?;
        Ok(frames_of(&codes.into_iter().collect::<Vec<_>>(), bands.view()))
    }

    fn next_plan(&mut self, uniforms: &[f32], out: &mut PlanFrame) -> Result<(), EngineError> {
        expect("uniforms", self.config.plan.n_codebooks, uniforms.len())?;
        if self.stream.plan_hidden.is_none() {
            // Nothing was heard yet: begin after one frame of silence.
            let silence = vec![self.config.codec.silence(); self.config.plan.hop];
            self.prefill(&silence)?;
        }
        let Some(hidden) = &self.stream.plan_hidden else {
            return Err(EngineError::State("the plan transformer has no context".into()));
        };
        out.tokens.clear();
        self.plan_draw = PlanDraw::default();
        let mut given = Vec::new();
        let mut sampler = LogitSampler::default();
        for (q, &uniform) in uniforms.iter().enumerate() {
            let logits = self.model.plan.logits(hidden, &given, q)?.flatten_all()?.to_vec1::<f32>()?;
            let token = sampler.sample(&logits, uniform, &self.plan_sampling);
            self.plan_draw.add(&logits, token);
            out.tokens.push(token as u16);
            given.push(token as u32);
        }
        out.bands = self.quantizer.decode(&out.tokens).map_err(state_error)?;
        let bands = ArrayView2::from_shape((1, out.bands.len()), &out.bands).map_err(state_error)?;
        let codes = ArrayView2::from_shape((1, out.tokens.len()), &out.tokens).map_err(state_error)?;
        let (tokens, bands) = self.plan_tensors(codes, bands)?;
        let stream = &mut self.stream;
        let hidden = self.model.plan.step(&tokens, &bands, &mut stream.plan_caches, stream.plan_pos)?;
        self.model.plan.add_refinement(&bands, &hidden, &mut out.bands)?;
        stream.plan_hidden = Some(hidden);
        stream.plan_pos += 1;
        Ok(())
    }

    fn plan_draw(&self) -> PlanDraw {
        self.plan_draw
    }

    fn render(&mut self, plan: &PlanFrame, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        expect("tokens", self.config.plan.hop, out.len())?;
        expect("uniforms", UNIFORMS_PER_SAMPLE * out.len(), uniforms.len())?;
        expect("plan bands", self.quantizer.mean.len(), plan.bands.len())?;
        let Self { config, spectrum, model, wave_sampling, stream, pool, .. } = self;
        let codec = &config.codec;
        pool.install(|| {
            let bands: Vec<f32> = plan.bands.iter().map(|&band| wave_sampling.played(band)).collect();
            stream.planned.begin_frame(spectrum, stream.wave.last_frame(), &bands).map_err(state_error)?;
            model.wave.begin_frame(&mut stream.wave, &bands)?;
            let mut mixture = Mixture::default();
            for (token, uniforms) in out.iter_mut().zip(uniforms.chunks_exact(UNIFORMS_PER_SAMPLE)) {
                let expected = stream.planned.expected();
                let forecasts = [stream.past.forecast(), expected.clamp(-1.0, 1.0)];
                let log_scale = stream.planned.log_scale();
                let (features, past_code) = features(forecasts, log_scale, codec);
                let head = model.wave.step(&mut stream.wave, &features, past_code)?;
                mixture.set(&head, forecasts, log_scale, codec);
                let drawn = mixture.draw([uniforms[0], uniforms[1]], wave_sampling);
                let rms = stream.planned.residual_rms();
                let sample = stream.drive.hold(drawn, expected, rms, wave_sampling.grain);
                *token = codec.encode(sample);
                stream.past.push(codec.decode(*token));
                stream.planned.push(sample);
                let residual = residual_code(*token, forecasts[PAST], past_code, config);
                WaveTransformer::push(&mut stream.wave, *token, residual);
            }
            Ok(())
        })
    }

    fn score(&mut self, tokens: &[Token], nll: &mut [f32]) -> Result<(), EngineError> {
        expect("values", tokens.len(), nll.len())?;
        check_tokens(&self.config, tokens)?;
        self.reset()?;
        let hop = self.config.plan.hop;
        let n_frames = tokens.len() / hop;
        expect("tokens (whole plan frames)", n_frames * hop, tokens.len())?;
        let (_, bands) = self.refined(tokens)?;
        let piece = Piece { tokens, heard: tokens, plan: bands.view(), spectrum: &self.spectrum };
        for begin in (0..n_frames).step_by(SCORE_CHUNK) {
            let end = (begin + SCORE_CHUNK).min(n_frames);
            let first = begin.saturating_sub(SCORE_CONTEXT);
            let mut past = PastForecast::new(&self.config.forecast).map_err(state_error)?;
            let mut planned = PlannedForecast::new(&self.config.forecast).map_err(state_error)?;
            let excerpt =
                Excerpt::read(&self.config, self.model.wave.history(), &piece, first..end, &mut past, &mut planned)
                    .map_err(state_error)?;
            let head = self.model.wave.forward(&excerpt.inputs()?)?;
            let values = head::nll(&head, &excerpt.targets)?.to_vec1::<f32>()?;
            nll[begin * hop..end * hop].copy_from_slice(&values[(begin - first) * hop..]);
        }
        Ok(())
    }

    fn score_plan(&mut self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        check_tokens(&self.config, tokens)?;
        let (codes, bands) = self.quantised(tokens)?;
        if codes.nrows() < 2 {
            return Ok(Vec::new());
        }
        let (tokens, bands) = self.plan_tensors(codes.view(), bands.view())?;
        Ok(self.model.plan.nll(&tokens, &bands, None)?.flatten_all()?.to_vec1()?)
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        let Stream { plan_caches, plan_pos, plan_hidden, wave, past, planned, drive } = &self.stream;
        let mut caches = BTreeMap::new();
        for (i, cache) in plan_caches.iter().enumerate() {
            caches.insert(plan_cache(i), saved_cache(cache)?);
        }
        for (i, tier) in wave.caches.iter().enumerate() {
            for (j, cache) in tier.iter().enumerate() {
                caches.insert(wave_cache(i, j), saved_cache(cache)?);
            }
        }
        let hidden = plan_hidden.as_ref().map(|hidden| hidden.flatten_all()?.to_vec1()).transpose()?;
        let counters = Counters {
            plan_pos: *plan_pos,
            n: wave.n,
            tokens: wave.tokens.clone(),
            residual_code: wave.residual_code,
            plan: wave.plan.clone(),
            past: past.clone(),
            planned: planned.clone(),
            drive: *drive,
        };
        SavedStream { counters, hidden, caches }.to_bytes()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError> {
        let saved = SavedStream::from_bytes(state, &self.config, self.spectrum.n_bands())?;
        let mut stream = Stream::new(&self.model, &self.config, &self.spectrum.silent_frame())?;
        let read = |name: &str, cache: &mut KvCache| -> Result<(), EngineError> {
            let Some(SavedCache { shape, keys, values }) = saved.caches.get(name) else { return Ok(()) };
            cache.keys = Tensor::from_slice(keys, &shape[..], &Device::Cpu)?;
            cache.values = Tensor::from_slice(values, &shape[..], &Device::Cpu)?;
            Ok(())
        };
        for (i, cache) in stream.plan_caches.iter_mut().enumerate() {
            read(&plan_cache(i), cache)?;
        }
        for (i, tier) in stream.wave.caches.iter_mut().enumerate() {
            for (j, cache) in tier.iter_mut().enumerate() {
                read(&wave_cache(i, j), cache)?;
            }
        }
        if let Some(hidden) = saved.hidden {
            let dim = hidden.len();
            stream.plan_hidden = Some(Tensor::from_vec(hidden, (1, 1, dim), &Device::Cpu)?);
        }
        let Counters { plan_pos, n, tokens, residual_code, plan, past, planned, drive } = saved.counters;
        stream.plan_pos = plan_pos;
        let wave = &mut stream.wave;
        (wave.n, wave.tokens, wave.residual_code, wave.plan) = (n, tokens, residual_code, plan);
        (stream.past, stream.planned, stream.drive) = (past, planned, drive);
        self.stream = stream;
        Ok(())
    }
}

fn saved_cache(cache: &KvCache) -> Result<SavedCache, EngineError> {
    let (n_heads, window, head_dim) = cache.keys.dims3()?;
    Ok(SavedCache {
        shape: [n_heads, window, head_dim],
        keys: cache.keys.flatten_all()?.to_vec1()?,
        values: cache.values.flatten_all()?.to_vec1()?,
    })
}
