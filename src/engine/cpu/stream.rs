//! What a stream remembers, how it is saved, and what a step works on.

use std::collections::BTreeMap;

use super::plan::{PlanState, PlanWork};
use super::wave::{Step, WaveState, WaveWork};
use super::weights::Weights;
use crate::codec::Token;
use crate::engine::state::{Counters, SavedStream, plan_cache, wave_cache};
use crate::engine::{EngineError, state_error};
use crate::forecast::{PastForecast, PlannedForecast};
use crate::sampler::{Drive, Mixture, WaveSampling};

/// What a stream remembers.
#[derive(Clone)]
pub struct Stream {
    pub plan: PlanState,
    pub sound: Sound,
}

/// What it remembers besides the plan transformer's part.
#[derive(Clone)]
pub struct Sound {
    pub wave: WaveState,
    pub past: PastForecast,
    pub planned: PlannedForecast,
    pub drive: Drive,
}

/// Room for a step, and nothing that lasts.
#[derive(Default)]
pub struct Work {
    pub plan: PlanWork,
    pub wave: WaveWork,
    pub head: Vec<f32>,
    /// A plan frame as it is played, `[n_bands]`.
    pub bands: Vec<f32>,
    pub mixture: Mixture,
}

/// A frame to render: whose, how, from which uniforms and where to; [`CpuEngine::begin_frame`] came first.
pub struct Turn<'a> {
    pub sound: &'a mut Sound,
    pub sampling: &'a WaveSampling,
    pub uniforms: &'a [f32],
    pub out: &'a mut [Token],
}

impl<'a> Turn<'a> {
    pub fn split(self) -> (Lane<'a>, Step<'a>) {
        let Turn { sound: Sound { wave, past, planned, drive }, sampling, uniforms, out } = self;
        (Lane { past, planned, expected: 0.0, drive, sampling, uniforms, out }, Step::new(wave))
    }
}

/// A [`Turn`] but for the wave transformer's part of the stream.
pub struct Lane<'a> {
    pub past: &'a mut PastForecast,
    pub planned: &'a mut PlannedForecast,
    /// Of the next sample, by plan.
    pub expected: f32,
    pub drive: &'a mut Drive,
    pub sampling: &'a WaveSampling,
    pub uniforms: &'a [f32],
    pub out: &'a mut [Token],
}

impl Stream {
    /// One that has heard nothing.
    pub fn new(weights: &Weights) -> Result<Self, EngineError> {
        let forecast = &weights.config.forecast;
        let sound = Sound {
            wave: weights.wave.new_state(&weights.spectrum.silent_frame()),
            past: PastForecast::new(forecast).map_err(state_error)?.with_kernels(weights.kernels),
            planned: PlannedForecast::new(forecast).map_err(state_error)?.with_kernels(weights.kernels),
            drive: Drive::default(),
        };
        Ok(Self { plan: weights.plan.new_state(), sound })
    }

    /// As bytes that every engine reads.
    pub fn save(&self) -> Result<Vec<u8>, EngineError> {
        let Stream { plan, sound: Sound { wave, past, planned, drive } } = self;
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

    /// As it was [saved](Self::save) by an engine of the same model.
    pub fn restored(weights: &Weights, state: &[u8]) -> Result<Self, EngineError> {
        let saved = SavedStream::from_bytes(state, &weights.config, weights.spectrum.n_bands())?;
        let mut stream = Stream::new(weights)?;
        let Counters { plan_pos, n, tokens, residual_code, plan, past, planned, drive } = saved.counters;
        let n_blocks = weights.config.plan_transformer.n_layers;
        stream.plan.stack.restore(weights.kernels, (0..n_blocks).filter_map(|i| saved.caches.get(&plan_cache(i))));
        for (i, (stack, tier)) in
            stream.sound.wave.stacks.iter_mut().zip(&weights.config.wave_transformer.tiers).enumerate()
        {
            stack.restore(weights.kernels, (0..tier.n_layers).filter_map(|j| saved.caches.get(&wave_cache(i, j))));
        }
        stream.plan.pos = plan_pos;
        if let Some(hidden) = saved.hidden {
            stream.plan.hidden = hidden;
        }
        let wave = &mut stream.sound.wave;
        (wave.n, wave.tokens, wave.residual_code, wave.plan) = (n, tokens, residual_code, plan);
        stream.sound.past = past.with_kernels(weights.kernels);
        stream.sound.planned = planned.with_kernels(weights.kernels);
        stream.sound.drive = drive;
        Ok(stream)
    }
}

impl Sound {
    /// Tells everything but the wave transformer's tiers of a sample.
    pub fn push(&mut self, sample: f32) {
        self.past.push(sample);
        self.planned.push(sample);
    }
}
