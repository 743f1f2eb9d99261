//! Turns tokens and their plan into the wave transformer's inputs and targets: the same for training, scoring and
//! prefill.

use std::ops::Range;

use candle_core::{Device, Tensor};
use ndarray::ArrayView2;

use super::config::{ModelConfig, N_FORECASTS};
use super::features::{N_FEATURES, features, residual_code};
use super::head::Targets;
use super::wave_transformer::{PLAN_FRAMES, WaveInputs};
use crate::codec::Token;
use crate::forecast::{ForecastError, PastForecast, PlannedForecast};
use crate::plan::Spectrum;

/// A whole piece of music, as long as its plan.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// What comes.
    pub tokens: &'a [Token],
    /// What the model hears of it: the same, or with noise.
    pub heard: &'a [Token],
    /// `[frames, n_bands]`
    pub plan: ArrayView2<'a, f32>,
    pub spectrum: &'a Spectrum,
}

/// One excerpt of whole plan frames as plain data; several of the same length make a batch.
#[derive(Clone, Debug)]
pub struct Excerpt {
    hop: usize,
    tokens: Vec<u32>,         // [history + time]
    features: Vec<f32>,       // [time, N_FEATURES]
    past_codes: Vec<u32>,     // [time]
    residual_codes: Vec<u32>, // [time + 1]: of the sample before; the last one belongs to the sample after
    plan: Vec<f32>,           // [2 + frames, n_bands]
    pub targets: Targets,
}

impl Excerpt {
    /// Reads the plan frames `frames` of a piece; `history` is the wave transformer's.
    ///
    /// `past` and `planned` are new, and are left where the excerpt ends.
    pub fn read(
        config: &ModelConfig,
        history: usize,
        piece: &Piece,
        frames: Range<usize>,
        past: &mut PastForecast,
        planned: &mut PlannedForecast,
    ) -> Result<Self, ForecastError> {
        let codec = &config.codec;
        let hop = config.plan.hop;
        let heard = piece.heard;
        let time = frames.len() * hop;
        let begin = frames.start * hop;
        let silence = codec.silence();
        let before = (0..history).map(|i| (begin + i).checked_sub(history).map_or(silence, |at| heard[at]));
        let mut excerpt = Self {
            hop,
            tokens: before.chain(heard[begin..begin + time].iter().copied()).map(u32::from).collect(),
            features: Vec::with_capacity(time * N_FEATURES),
            past_codes: Vec::with_capacity(time),
            residual_codes: Vec::with_capacity(time + 1),
            plan: Vec::with_capacity((PLAN_FRAMES - 1 + frames.len()) * piece.plan.ncols()),
            targets: Targets::default(),
        };
        let silent_frame = piece.spectrum.silent_frame();
        for i in 0..PLAN_FRAMES - 1 + frames.len() {
            match (frames.start + i).checked_sub(PLAN_FRAMES - 1) {
                Some(frame) => excerpt.plan.extend(piece.plan.row(frame)),
                None => excerpt.plan.extend(&silent_frame),
            }
        }
        // Before the excerpt only the forecasts listen, until the past one has heard its window.
        let run_up = config.forecast.past_window.div_ceil(hop);
        let mut residual = 0;
        for frame in frames.start.saturating_sub(run_up)..frames.end {
            let inside = frames.contains(&frame);
            if inside {
                let before =
                    frame.checked_sub(1).map_or(silent_frame.clone(), |before| piece.plan.row(before).to_vec());
                planned.begin_frame(piece.spectrum, &before, &piece.plan.row(frame).to_vec())?;
            }
            let range = frame * hop..(frame + 1) * hop;
            for (&token, &heard) in piece.tokens[range.clone()].iter().zip(&heard[range]) {
                if inside {
                    let forecasts: [f32; N_FORECASTS] = [past.forecast(), planned.forecast()];
                    let log_scale = planned.log_scale();
                    let (values, past_code) = features(forecasts, log_scale, codec);
                    excerpt.features.extend(values);
                    excerpt.past_codes.push(past_code.into());
                    excerpt.residual_codes.push(u32::from(residual));
                    excerpt.targets.push(token, forecasts, log_scale, codec);
                    residual = residual_code(heard, past_code, codec);
                }
                let sample = codec.decode(heard);
                past.push(sample);
                planned.push(sample);
            }
        }
        excerpt.residual_codes.push(u32::from(residual));
        Ok(excerpt)
    }

    /// Residual code of the excerpt's last sample.
    pub fn last_residual(&self) -> Token {
        self.residual_codes.last().map_or(0, |&code| code as Token)
    }

    /// Samples.
    pub fn n_samples(&self) -> usize {
        self.past_codes.len()
    }

    /// As a batch of one, on the CPU.
    pub fn inputs(&self) -> candle_core::Result<WaveInputs> {
        Self::batch(std::slice::from_ref(self), &Device::Cpu)
    }

    /// Excerpts of the same length, for a model on `device`.
    pub fn batch(excerpts: &[Self], device: &Device) -> candle_core::Result<WaveInputs> {
        let n = excerpts.len();
        let joined = |part: fn(&Self) -> &[f32], dims: (usize, usize)| {
            let values: Vec<f32> = excerpts.iter().flat_map(part).copied().collect();
            Tensor::from_vec(values, (n, dims.0, dims.1), device)
        };
        let codes = |part: fn(&Self) -> &[u32]| {
            let codes: Vec<u32> = excerpts.iter().flat_map(part).copied().collect();
            Tensor::from_vec(codes, (n, ()), &Device::Cpu)
        };
        let (time, hop) = excerpts.first().map_or((0, 1), |first| (first.n_samples(), first.hop));
        if excerpts.iter().any(|excerpt| excerpt.n_samples() != time) {
            candle_core::bail!("a batch of excerpts that differ in length");
        }
        let frames = time / hop + PLAN_FRAMES - 1;
        let n_bands = excerpts.first().map_or(0, |first| first.plan.len()) / frames.max(1);
        Ok(WaveInputs {
            tokens: codes(|e| &e.tokens)?,
            features: joined(|e| &e.features, (time, N_FEATURES))?,
            past_codes: codes(|e| &e.past_codes)?,
            residual_codes: codes(|e| &e.residual_codes[..e.n_samples()])?,
            plan: joined(|e| &e.plan, (frames, n_bands))?,
        })
    }
}
