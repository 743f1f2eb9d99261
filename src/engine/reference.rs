//! The reference engine: candle tensors, one step at a time, with no thought of speed. Other engines are tested
//! against it.

use std::collections::{BTreeMap, HashMap};

use candle_core::{D, Device, Tensor};
use ndarray::{Array2, ArrayView2};
use rayon::{ThreadPool, ThreadPoolBuilder};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::{Engine, EngineError, UNIFORMS_PER_SAMPLE};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::forecast::{PastForecast, PlannedForecast};
use crate::model::Model;
use crate::model::block::KvCache;
use crate::model::config::{GenerationSettings, ModelConfig};
use crate::model::excerpt::{Excerpt, Piece};
use crate::model::features::{features, residual_code};
use crate::model::head;
use crate::model::wave_transformer::{PLAN_FRAMES, WaveState, WaveTransformer};
use crate::plan::{PlanFrame, ResidualQuantizer, Spectrum};
use crate::sampler::{Mixture, PlanSampling, WaveSampling, sample_logits};

/// Plan frames of the prompt that the wave transformer reads: more than its attention windows hold.
const WAVE_CONTEXT: usize = 32;
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
}

/// The part of a [`Stream`] that is not tensors.
#[derive(Serialize, Deserialize)]
struct Counters {
    plan_pos: u64,
    n: u64,
    tokens: Vec<Token>,
    residual_code: Token,
    plan: Vec<Vec<f32>>,
    past: PastForecast,
    planned: PlannedForecast,
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
            pool: ThreadPoolBuilder::new().num_threads(1).build().map_err(state_error)?,
            config,
        })
    }

    /// Tokens -> quantised plan: tokens `[frames, n_codebooks]` and decoded bands `[frames, n_bands]`.
    fn plan_of(&self, tokens: &[Token]) -> Result<(Array2<u16>, Array2<f32>), EngineError> {
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

    fn check_tokens(&self, tokens: &[Token]) -> Result<(), EngineError> {
        let levels = self.config.codec.levels();
        match tokens.iter().position(|&t| usize::from(t) >= levels) {
            Some(position) => Err(EngineError::Token { token: tokens[position], position, levels }),
            None => Ok(()),
        }
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
        })
    }

    fn caches(&self) -> impl Iterator<Item = (String, &KvCache)> {
        let plan = self.plan_caches.iter().enumerate().map(|(i, cache)| (format!("plan.{i}"), cache));
        let wave = self
            .wave
            .caches
            .iter()
            .enumerate()
            .flat_map(|(i, tier)| tier.iter().enumerate().map(move |(j, cache)| (format!("wave.{i}.{j}"), cache)));
        plan.chain(wave)
    }
}

fn state_error(e: impl std::fmt::Display) -> EngineError {
    EngineError::State(e.to_string())
}

fn expect(what: &'static str, expected: usize, got: usize) -> Result<(), EngineError> {
    if expected == got { Ok(()) } else { Err(EngineError::Length { what, expected, got }) }
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

    fn prefill(&mut self, prompt: &[Token]) -> Result<(), EngineError> {
        self.check_tokens(prompt)?;
        self.reset()?;
        let hop = self.config.plan.hop;
        let n_frames = prompt.len().div_ceil(hop);
        if n_frames == 0 {
            return Ok(());
        }
        let mut tokens = vec![self.config.codec.silence(); n_frames * hop - prompt.len()];
        tokens.extend_from_slice(prompt);
        let (codes, bands) = self.plan_of(&tokens)?;
        let (plan_tokens, plan_bands) = self.plan_tensors(codes.view(), bands.view())?;
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
        Ok(())
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
        let mut given = Vec::new();
        for (q, &uniform) in uniforms.iter().enumerate() {
            let logits = self.model.plan.logits(hidden, &given, q)?.flatten_all()?.to_vec1::<f32>()?;
            let token = sample_logits(&logits, uniform, &self.plan_sampling);
            out.tokens.push(token as u16);
            given.push(Tensor::from_vec(vec![token as u32], (1, 1), &Device::Cpu)?);
        }
        out.bands = self.quantizer.decode(&out.tokens).map_err(state_error)?;
        let bands = ArrayView2::from_shape((1, out.bands.len()), &out.bands).map_err(state_error)?;
        let codes = ArrayView2::from_shape((1, out.tokens.len()), &out.tokens).map_err(state_error)?;
        let (tokens, bands) = self.plan_tensors(codes, bands)?;
        let stream = &mut self.stream;
        let hidden = self.model.plan.step(&tokens, &bands, &mut stream.plan_caches, stream.plan_pos)?;
        stream.plan_hidden = Some(hidden);
        stream.plan_pos += 1;
        Ok(())
    }

    fn render(&mut self, plan: &PlanFrame, uniforms: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        expect("tokens", self.config.plan.hop, out.len())?;
        expect("uniforms", UNIFORMS_PER_SAMPLE * out.len(), uniforms.len())?;
        expect("plan bands", self.quantizer.mean.len(), plan.bands.len())?;
        let Self { config, spectrum, model, wave_sampling, stream, pool, .. } = self;
        let codec = &config.codec;
        pool.install(|| {
            stream.planned.begin_frame(spectrum, &plan.bands).map_err(state_error)?;
            model.wave.begin_frame(&mut stream.wave, &plan.bands)?;
            for (token, uniforms) in out.iter_mut().zip(uniforms.chunks_exact(UNIFORMS_PER_SAMPLE)) {
                let forecasts = [stream.past.forecast(), stream.planned.forecast()];
                let log_scale = stream.planned.log_scale();
                let (features, past_code) = features(forecasts, log_scale, codec);
                let head = model.wave.step(&mut stream.wave, &features, past_code)?;
                let mixture = Mixture::from_head(&head, forecasts, log_scale, codec);
                *token = mixture.sample([uniforms[0], uniforms[1]], wave_sampling, codec);
                let sample = codec.decode(*token);
                stream.past.push(sample);
                stream.planned.push(sample);
                WaveTransformer::push(&mut stream.wave, *token, residual_code(*token, past_code, codec));
            }
            Ok(())
        })
    }

    fn score(&mut self, tokens: &[Token], nll: &mut [f32]) -> Result<(), EngineError> {
        expect("values", tokens.len(), nll.len())?;
        self.check_tokens(tokens)?;
        let hop = self.config.plan.hop;
        let n_frames = tokens.len() / hop;
        expect("tokens (whole plan frames)", n_frames * hop, tokens.len())?;
        let (_, bands) = self.plan_of(tokens)?;
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
        self.check_tokens(tokens)?;
        let (codes, bands) = self.plan_of(tokens)?;
        if codes.nrows() < 2 {
            return Ok(Vec::new());
        }
        let (tokens, bands) = self.plan_tensors(codes.view(), bands.view())?;
        Ok(self.model.plan.nll(&tokens, &bands, None)?.flatten_all()?.to_vec1()?)
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        let stream = &self.stream;
        let counters = Counters {
            plan_pos: stream.plan_pos,
            n: stream.wave.n,
            tokens: stream.wave.tokens.clone(),
            residual_code: stream.wave.residual_code,
            plan: stream.wave.plan.clone(),
            past: stream.past.clone(),
            planned: stream.planned.clone(),
        };
        let mut tensors: BTreeMap<String, &Tensor> = BTreeMap::new();
        for (name, cache) in stream.caches() {
            tensors.insert(format!("{name}.keys"), &cache.keys);
            tensors.insert(format!("{name}.values"), &cache.values);
        }
        if let Some(hidden) = &stream.plan_hidden {
            tensors.insert(HIDDEN.into(), hidden);
        }
        let bytes = tensors
            .into_iter()
            .map(|(name, tensor)| {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                Ok((name, tensor.dims().to_vec(), bytes))
            })
            .collect::<Result<Vec<_>, EngineError>>()?;
        let views = bytes
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(state_error)?;
        let counters = serde_json::to_string(&counters).map_err(state_error)?;
        safetensors::serialize(views, Some(HashMap::from([(COUNTERS.to_owned(), counters)]))).map_err(state_error)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError> {
        let (_, header) = SafeTensors::read_metadata(state).map_err(state_error)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let counters: Counters = serde_json::from_str(metadata.get(COUNTERS).map(String::as_str).unwrap_or_default())
            .map_err(state_error)?;
        let tensors = SafeTensors::deserialize(state).map_err(state_error)?;
        let tensor = |name: &str, like: Option<&Tensor>| -> Result<Tensor, EngineError> {
            let view = tensors.tensor(name).map_err(state_error)?;
            let values: Vec<f32> =
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            if like.is_some_and(|like| like.dims() != view.shape()) {
                return Err(EngineError::State(format!("'{name}' has shape {:?}", view.shape())));
            }
            Ok(Tensor::from_vec(values, view.shape(), &Device::Cpu)?)
        };
        let mut stream = Stream::new(&self.model, &self.config, &self.spectrum.silent_frame())?;
        let read = |name: &str, cache: &mut KvCache| -> Result<(), EngineError> {
            cache.keys = tensor(&format!("{name}.keys"), Some(&cache.keys))?;
            cache.values = tensor(&format!("{name}.values"), Some(&cache.values))?;
            Ok(())
        };
        for (i, cache) in stream.plan_caches.iter_mut().enumerate() {
            read(&format!("plan.{i}"), cache)?;
        }
        for (i, tier) in stream.wave.caches.iter_mut().enumerate() {
            for (j, cache) in tier.iter_mut().enumerate() {
                read(&format!("wave.{i}.{j}"), cache)?;
            }
        }
        expect("tokens of history", stream.wave.tokens.len(), counters.tokens.len())?;
        expect("plan frames", PLAN_FRAMES, counters.plan.len())?;
        for frame in &counters.plan {
            expect("plan bands", self.quantizer.mean.len(), frame.len())?;
        }
        if tensors.names().contains(&HIDDEN) {
            let hidden = tensor(HIDDEN, None)?;
            expect("hidden values", self.config.plan_transformer.dim, hidden.dim(D::Minus1)?)?;
            stream.plan_hidden = Some(hidden);
        }
        stream.plan_pos = counters.plan_pos;
        stream.wave.n = counters.n;
        stream.wave.tokens = counters.tokens;
        stream.wave.residual_code = counters.residual_code;
        stream.wave.plan = counters.plan;
        stream.past = counters.past;
        stream.planned = counters.planned;
        self.stream = stream;
        Ok(())
    }
}

/// Names inside a saved state.
const HIDDEN: &str = "plan.hidden";
const COUNTERS: &str = "counters";
