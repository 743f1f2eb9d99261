//! A packed model, and everything that streams over it are told, asked and played with.

use ndarray::{Array2, ArrayView2, s};

use super::CpuOptions;
use super::linear::Source;
use super::plan::{PlanState, PlanTransformer, PlanTurn, PlanWork};
use super::stream::{Lane, Sound, Work};
use super::wave::{Step, WaveTransformer};
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::engine::{EngineError, UNIFORMS_PER_SAMPLE, expect, state_error};
use crate::forecast::PAST;
use crate::model::config::{GenerationSettings, ModelConfig, WAVE_CONTEXT};
use crate::model::features::{features, residual_code};
use crate::plan::{ResidualQuantizer, Spectrum};
use crate::sampler::Mixture;
use crate::simd::Kernels;

/// A packed model.
pub struct Weights {
    pub config: ModelConfig,
    pub quantizer: ResidualQuantizer,
    pub spectrum: Spectrum,
    pub generation: GenerationSettings,
    pub kernels: &'static Kernels,
    pub plan: PlanTransformer,
    pub wave: WaveTransformer,
}

impl Weights {
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
        Ok(Self {
            plan: plan?,
            wave: wave?,
            quantizer: checkpoint.quantizer.clone(),
            spectrum,
            generation: checkpoint.generation,
            kernels,
            config,
        })
    }

    /// Tokens -> quantised plan: tokens `[frames, n_codebooks]`, flat, and decoded bands `[frames, n_bands]`.
    pub fn quantised(&self, tokens: &[Token]) -> Result<(Vec<u16>, Array2<f32>), EngineError> {
        let exact = self.spectrum.analyse(&self.config.codec.decode_all(tokens));
        let codes = self.quantizer.encode_all(exact.view())?;
        let bands = self.quantizer.decode_all(codes.view())?;
        Ok((codes.into_iter().collect(), bands))
    }

    /// Tokens -> quantised plan, which a stream's plan transformer has read: tokens likewise, and refined bands.
    pub fn read_plan(
        &self,
        state: &mut PlanState,
        tokens: &[Token],
        work: &mut PlanWork,
    ) -> Result<(Vec<u16>, Array2<f32>), EngineError> {
        let (codes, bands) = self.quantised(tokens)?;
        let (centred, shape) = (self.centred(&bands), bands.raw_dim());
        let mut refined: Vec<f32> = bands.into_iter().collect();
        self.plan.read_refined(self.kernels, state, &codes, &centred, &mut refined, work);
        Ok((codes, Array2::from_shape_vec(shape, refined).map_err(state_error)?))
    }

    /// Frames `[frames, n_bands]` as the plan transformer reads them.
    pub fn centred(&self, bands: &Array2<f32>) -> Vec<f32> {
        (bands - &self.quantizer.mean).into_iter().collect()
    }

    /// Draws the next plan frame of every stream.
    pub fn draw(&self, turns: &mut [PlanTurn], work: &mut Work) -> Result<(), EngineError> {
        Ok(self.plan.draw(self.kernels, &self.quantizer, turns, &mut work.plan)?)
    }

    /// As many samples as the lanes have room for, within one plan frame.
    pub fn render(&self, lanes: &mut [Lane], steps: &mut [Step], work: &mut Work) {
        let codec = &self.config.codec;
        let head_dim = self.config.wave_transformer.head_dim();
        work.head.resize(lanes.len() * head_dim, 0.0);
        let n = lanes.iter().map(|lane| lane.out.len()).min().unwrap_or(0);
        for t in 0..n {
            for (lane, step) in lanes.iter_mut().zip(&mut *steps) {
                lane.expected = lane.planned.expected();
                step.forecasts = [lane.past.forecast(), lane.expected.clamp(-1.0, 1.0)];
                (step.features, step.past_code) = features(step.forecasts, lane.planned.log_scale(), codec);
            }
            self.wave.step(self.kernels, steps, &mut work.wave, &mut work.head);
            for ((lane, step), head) in lanes.iter_mut().zip(&mut *steps).zip(work.head.chunks_exact(head_dim)) {
                work.mixture.set(head, step.forecasts, lane.planned.log_scale(), codec);
                let uniforms = [lane.uniforms[UNIFORMS_PER_SAMPLE * t], lane.uniforms[UNIFORMS_PER_SAMPLE * t + 1]];
                let drawn = work.mixture.draw(uniforms, lane.sampling);
                let (rms, grain) = (lane.planned.residual_rms(), lane.sampling.grain);
                let sample = lane.drive.hold(drawn, lane.expected, rms, grain);
                let token = codec.encode(sample);
                lane.past.push(codec.decode(token));
                lane.planned.push(sample);
                let residual = residual_code(token, step.forecasts[PAST], step.past_code, &self.config);
                step.state.push(token, residual);
                lane.out[t] = token;
            }
        }
    }

    /// The next samples lie in this plan frame, `[n_bands]`.
    pub fn begin_frame(&self, sound: &mut Sound, bands: &[f32], work: &mut Work) -> Result<(), EngineError> {
        expect("plan bands", self.spectrum.n_bands(), bands.len())?;
        sound.planned.begin_frame(&self.spectrum, sound.wave.last_frame(), bands).map_err(state_error)?;
        self.wave.begin_frame(self.kernels, &mut sound.wave, bands, &mut work.wave);
        Ok(())
    }

    /// Reads one plan frame of tokens sample by sample, without drawing; `each` gets the distribution of every sample.
    pub fn listen(
        &self,
        sound: &mut Sound,
        bands: &[f32],
        tokens: &[Token],
        work: &mut Work,
        mut each: impl FnMut(usize, &Mixture),
    ) -> Result<(), EngineError> {
        let codec = &self.config.codec;
        self.begin_frame(sound, bands, work)?;
        work.head.resize(self.config.wave_transformer.head_dim(), 0.0);
        for (t, &token) in tokens.iter().enumerate() {
            let forecasts = [sound.past.forecast(), sound.planned.forecast()];
            let log_scale = sound.planned.log_scale();
            let mut step = Step::new(&mut sound.wave);
            (step.features, step.past_code) = features(forecasts, log_scale, codec);
            let past_code = step.past_code;
            self.wave.step(self.kernels, &mut [step], &mut work.wave, &mut work.head);
            work.mixture.set(&work.head, forecasts, log_scale, codec);
            each(t, &work.mixture);
            sound.push(codec.decode(token));
            sound.wave.push(token, residual_code(token, forecasts[PAST], past_code, &self.config));
        }
        Ok(())
    }

    /// Reads the end of a prompt of whole frames: what lies within reach of the wave transformer's windows.
    pub fn read_end(
        &self,
        sound: &mut Sound,
        bands: ArrayView2<f32>,
        tokens: &[Token],
        work: &mut Work,
    ) -> Result<(), EngineError> {
        let (hop, history) = (self.config.plan.hop, self.config.wave_transformer.history());
        let n_frames = bands.nrows();
        let first = n_frames.saturating_sub(WAVE_CONTEXT);
        let first_frames = self.wave.first_frames(n_frames, first);
        let by_sample = first_frames.last().copied().unwrap_or(first);
        let n_plan = sound.wave.plan.len();
        for (i, frame) in sound.wave.plan.iter_mut().enumerate() {
            if let Some(before) = (first + i).checked_sub(n_plan) {
                *frame = bands.row(before).to_vec();
            }
        }
        let mut seen = vec![self.config.codec.silence(); history];
        seen.extend_from_slice(tokens);
        sound.wave.tokens.copy_from_slice(&seen[first * hop..first * hop + history]);
        for frame in first..by_sample {
            let wave = &mut sound.wave;
            self.wave.begin_frame(self.kernels, wave, &bands.row(frame).to_vec(), &mut work.wave);
            let n_tiers = first_frames.iter().filter(|&&first| first <= frame).count();
            let seen = &seen[frame * hop..history + (frame + 1) * hop];
            self.wave.read_frame(self.kernels, wave, seen, n_tiers, &mut work.wave);
        }
        // The forecasts listen from where all that they follow from begins.
        let heard = by_sample.saturating_sub(self.config.forecast.frames_before(&self.config.plan));
        let samples = self.config.codec.decode_all(&tokens[heard * hop..by_sample * hop]);
        samples.iter().for_each(|&sample| sound.past.push(sample));
        sound.planned.hear(&self.spectrum, &samples, bands.slice(s![heard..by_sample, ..])).map_err(state_error)?;
        for frame in by_sample..n_frames {
            let range = frame * hop..(frame + 1) * hop;
            self.listen(sound, &bands.row(frame).to_vec(), &tokens[range], work, |_, _| ())?;
        }
        Ok(())
    }
}
