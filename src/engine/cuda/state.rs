//! How the state of streams lies in a machine's memory (kernels/args.cuh): made, copied, and brought to and from states of other engines.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::machine::{Machine, MachineError};
use super::streams::Model;
use crate::codec::Token;
use crate::cuda::launch::{DecodeModel, DecodeStack, Element, Words};
use crate::engine::state::{Counters, SavedCache, SavedStream, plan_cache, wave_cache};
use crate::engine::{EngineError, state_error};
use crate::forecast::{PastForecast, PlannedForecast, PlannedPast};
use crate::model::wave_transformer::PLAN_FRAMES;
use crate::sampler::Drive;

/// In a ring of tokens a token's code lies above its 16 bits.
const TOKEN_BITS: u32 = 16;

/// 64-bit counters of a stream.
const N_COUNTERS: usize = 4;
pub(super) const WORD: usize = 4;

/// What lasts from launch to launch, of some number of streams.
pub(super) struct State<B> {
    pub n: usize,
    pub counters: B,
    pub ring_tokens: B,
    pub memory: B,
    pub caches: B,
}

/// One stream's state as bytes of the machine's memory.
pub(super) struct Laid {
    counters: Vec<u8>,
    ring_tokens: Vec<u8>,
    memory: Vec<u8>,
    /// Of each block of each stack; `None`: nothing was read yet.
    caches: Vec<Option<Vec<u8>>>,
}

/// One stream's state in the machine's memory.
pub(super) struct Kept<M: Machine> {
    pub(super) model: Arc<Model<M>>,
    pub(super) state: State<M::Buffer>,
}

impl<M: Machine> Model<M> {
    /// A stream at its beginning.
    pub(super) fn fresh(&self) -> Result<SavedStream, EngineError> {
        let Self { config, spectrum, .. } = self;
        let counters = Counters {
            plan_pos: 0,
            n: 0,
            tokens: vec![config.codec.silence(); config.wave_transformer.history()],
            residual_code: 0,
            plan: vec![spectrum.silent_frame(); PLAN_FRAMES],
            past: PastForecast::new(&config.forecast).map_err(state_error)?,
            planned: PlannedForecast::new(&config.forecast).map_err(state_error)?,
            drive: Drive::default(),
        };
        Ok(SavedStream { counters, hidden: None, caches: BTreeMap::new() })
    }

    /// Bytes of a stream's counters, ring of tokens, memory and caches.
    fn strides(&self) -> [usize; 4] {
        let DecodeModel { n_tokens, memory_stride, cache_stride, .. } = *self.sizes();
        let caches = self.packed.element.size() * cache_stride as usize;
        [8 * N_COUNTERS, WORD * n_tokens as usize, WORD * memory_stride as usize, caches]
    }

    /// Bytes of a stream's state.
    pub fn state_bytes(&self) -> usize {
        self.strides().iter().sum()
    }

    /// Room for the state of `n` streams.
    pub(super) fn state(&self, n: usize) -> Result<State<M::Buffer>, MachineError> {
        let [counters, ring_tokens, memory, caches] = self.strides().map(|stride| self.machine.zeros(n * stride));
        Ok(State { n, counters: counters?, ring_tokens: ring_tokens?, memory: memory?, caches: caches? })
    }

    /// A stream of `to` is where one of `from` is.
    pub(super) fn copy(
        &self,
        (from, of): (&State<M::Buffer>, usize),
        (to, into): (&mut State<M::Buffer>, usize),
    ) -> Result<(), MachineError> {
        let [counters, ring_tokens, memory, _] = self.strides();
        let copy = |from: &M::Buffer, to: &mut M::Buffer, stride: usize| {
            self.machine.copy((from, of * stride), (to, into * stride), stride)
        };
        copy(&from.counters, &mut to.counters, counters)?;
        copy(&from.ring_tokens, &mut to.ring_tokens, ring_tokens)?;
        copy(&from.memory, &mut to.memory, memory)?;
        let size = self.packed.element.size();
        self.stacks().try_for_each(|(stack, block, _)| {
            let (at, len) = cache_at(from.n, of, stack, block);
            let (there, _) = cache_at(to.n, into, stack, block);
            self.machine.copy((&from.caches, size * at), (&mut to.caches, size * there), size * len)
        })
    }

    /// The streams of `to` are where those of `from`, as many, are.
    pub(super) fn copy_all(&self, from: &State<M::Buffer>, to: &mut State<M::Buffer>) -> Result<(), MachineError> {
        let [counters, ring_tokens, memory, caches] = self.strides().map(|stride| from.n * stride);
        self.machine.copy((&from.counters, 0), (&mut to.counters, 0), counters)?;
        self.machine.copy((&from.ring_tokens, 0), (&mut to.ring_tokens, 0), ring_tokens)?;
        self.machine.copy((&from.memory, 0), (&mut to.memory, 0), memory)?;
        self.machine.copy((&from.caches, 0), (&mut to.caches, 0), caches)
    }

    /// The stacks' names in a saved state.
    fn stacks(&self) -> impl Iterator<Item = (DecodeStack, usize, String)> + '_ {
        let sizes = self.sizes();
        let plan = (0..sizes.plan.n_layers as usize).map(|block| (sizes.plan, block, plan_cache(block)));
        let tiers = sizes.tiers[..sizes.n_tiers as usize].iter().enumerate();
        plan.chain(tiers.flat_map(|(i, tier)| {
            (0..tier.stack.n_layers as usize).map(move |block| (tier.stack, block, wave_cache(i, block)))
        }))
    }

    /// A saved state as a stream's lies in memory.
    ///
    /// # Errors
    /// When it is none between two plan frames.
    pub(super) fn laid(&self, saved: &SavedStream) -> Result<Laid, EngineError> {
        let sizes = self.sizes();
        let Counters { plan_pos, n, tokens, residual_code, plan, past, planned, drive } = &saved.counters;
        let Some(heard) = past.heard() else {
            return Err(EngineError::State("it was saved within a plan frame".into()));
        };
        let mut memory = vec![0.0f32; sizes.memory_stride as usize];
        for (place, sample) in places(sizes.n_samples, *n, heard.len()).zip(heard) {
            memory[sizes.samples as usize + place] = *sample;
        }
        let PlannedPast { left, heard, rest } = planned.heard();
        for (place, sample) in places(sizes.n_left, *n, left.len()).zip(left) {
            memory[sizes.left as usize + place] = sample;
        }
        if sizes.n_heard > 0 {
            for (place, sample) in places(sizes.n_heard, *n, heard.len()).zip(heard) {
                memory[sizes.heard as usize + place] = sample;
            }
            memory[sizes.rest as usize..][..sizes.plan_hop as usize].iter_mut().zip(rest).for_each(|(to, x)| *to = x);
        }
        let frames = memory[sizes.plan_frames as usize..].iter_mut();
        frames.zip(plan.iter().flatten()).for_each(|(to, band)| *to = *band);
        if let Some(hidden) = &saved.hidden {
            memory[sizes.hidden as usize..][..hidden.len()].copy_from_slice(hidden);
        }
        memory[sizes.drive as usize] = drive.mean_square;
        let codec = &self.config.codec;
        let coded = |token: Token| i32::from(token) | i32::from(codec.code(token)) << TOKEN_BITS;
        let mut ring = vec![coded(codec.silence()); sizes.n_tokens as usize];
        for (place, token) in places(sizes.n_tokens, *n, tokens.len()).zip(tokens) {
            ring[place] = coded(*token);
        }
        let counters = [*n as i64, *plan_pos as i64, i64::from(*residual_code), 0];
        let element = self.packed.element;
        let cache = |(stack, _, name): (DecodeStack, usize, String)| {
            let SavedCache { shape, keys, values } = saved.caches.get(&name)?;
            let mut laid = vec![0.0f32; stack.block_cache as usize];
            for (i, (key, value)) in keys.iter().zip(values).enumerate() {
                let (of_key, of_value) = place_of(i, *shape, element.vector());
                (laid[of_key], laid[of_value]) = (*key, *value);
            }
            Some(element.to_bytes(&laid))
        };
        Ok(Laid {
            counters: counters.to_bytes(),
            ring_tokens: ring.to_bytes(),
            memory: memory.to_bytes(),
            caches: self.stacks().map(cache).collect(),
        })
    }

    /// A stream goes on from a state.
    ///
    /// # Errors
    /// When the machine fails.
    pub(super) fn put(&self, state: &mut State<M::Buffer>, stream: usize, laid: &Laid) -> Result<(), MachineError> {
        let put = |buffer: &mut M::Buffer, bytes: &[u8]| self.machine.write(buffer, stream * bytes.len(), bytes);
        put(&mut state.counters, &laid.counters)?;
        put(&mut state.ring_tokens, &laid.ring_tokens)?;
        put(&mut state.memory, &laid.memory)?;
        let size = self.packed.element.size();
        for ((stack, block, _), cache) in self.stacks().zip(&laid.caches) {
            let (at, len) = cache_at(state.n, stream, stack, block);
            match cache {
                Some(cache) => self.machine.write(&mut state.caches, size * at, cache)?,
                None => self.machine.clear(&mut state.caches, size * at, size * len)?,
            }
        }
        Ok(())
    }

    /// A stream's state, for other engines.
    ///
    /// # Errors
    /// When the machine fails.
    pub(super) fn saved(&self, state: &State<M::Buffer>, stream: usize) -> Result<SavedStream, EngineError> {
        let (sizes, machine, config) = (self.sizes(), &*self.machine, &self.config);
        let read = |buffer: &M::Buffer, at: usize, len: usize| -> Result<Vec<u8>, MachineError> {
            let mut bytes = vec![0; len];
            machine.read(buffer, at, &mut bytes)?;
            Ok(bytes)
        };
        let get = |buffer: &M::Buffer, len: usize| read(buffer, stream * len, len);
        let counters = get(&state.counters, 8 * N_COUNTERS)?;
        let [n, plan_pos, residual_code] =
            [0, 1, 2].map(|i| counters.as_chunks().0.get(i).map_or(0, |&b| u64::from_le_bytes(b)));
        let memory = floats(&get(&state.memory, WORD * sizes.memory_stride as usize)?);
        let ring = words(&get(&state.ring_tokens, WORD * sizes.n_tokens as usize)?);
        let from_ring = |at: i32, ring: i32, len: usize| -> Vec<f32> {
            places(ring, n, len).map(|place| memory[at as usize + place]).collect()
        };
        let forecast = &config.forecast;
        let heard = from_ring(sizes.samples, sizes.n_samples, forecast.past_window + forecast.past_hop);
        let with_tones = |n: usize| if forecast.tones { n } else { 0 };
        let planned = PlannedPast {
            left: from_ring(sizes.left, sizes.n_left, forecast.planned_order),
            heard: from_ring(sizes.heard, sizes.n_heard, with_tones(forecast.past_window)),
            rest: memory[sizes.rest as usize..][..with_tones(config.plan.hop)].to_vec(),
        };
        let n_bands = sizes.n_bands as usize;
        let frames = &memory[sizes.plan_frames as usize..][..PLAN_FRAMES * n_bands];
        let saved_caches = self.stacks().map(|(stack, block, name)| {
            let (n_heads, window) = (stack.n_heads as usize, stack.window as usize);
            let head_dim = stack.dim as usize / n_heads;
            let (at, len) = cache_at(state.n, stream, stack, block);
            let element = self.packed.element;
            let cache = element.values(&read(&state.caches, element.size() * at, element.size() * len)?);
            let shape = [n_heads, window, head_dim];
            let at = |i| place_of(i, shape, element.vector());
            let (keys, values) = (0..n_heads * window * head_dim).map(|i| (cache[at(i).0], cache[at(i).1])).unzip();
            Ok((name, SavedCache { shape, keys, values }))
        });
        let saved_caches = saved_caches.collect::<Result<_, MachineError>>()?;
        let tokens = places(sizes.n_tokens, n, config.wave_transformer.history()).map(|place| ring[place] as u16);
        Ok(SavedStream {
            counters: Counters {
                plan_pos,
                n,
                tokens: tokens.collect(),
                residual_code: residual_code as u16,
                plan: frames.chunks_exact(n_bands).map(<[f32]>::to_vec).collect(),
                past: PastForecast::after(forecast, heard).map_err(state_error)?,
                planned: PlannedForecast::after(forecast, planned).map_err(state_error)?,
                drive: Drive { mean_square: memory[sizes.drive as usize] },
            },
            hidden: (plan_pos > 0).then(|| memory[sizes.hidden as usize..][..sizes.plan.dim as usize].to_vec()),
            caches: saved_caches,
        })
    }
}

/// Where a cache of heads of `head_dim` values has key and value `i` of `[n_heads, window, head_dim]` (kernels/args.cuh).
fn place_of(i: usize, [n_heads, window, head_dim]: [usize; 3], vector: usize) -> (usize, usize) {
    let (head, slot, f) = (i / head_dim / window, i / head_dim % window, i % head_dim);
    let (vectors, padded) = (head_dim.div_ceil(vector), head_dim.next_multiple_of(vector));
    let key = ((head * vectors + f / vector) * window + slot) * vector + f % vector;
    (key, ((n_heads + head) * window + slot) * padded + f)
}

/// Where the cache of a block of one of `n` streams begins, and how long it is, in values: `cached` of kernels/decode_step.cuh.
fn cache_at(n: usize, stream: usize, stack: DecodeStack, block: usize) -> (usize, usize) {
    let len = stack.block_cache as usize;
    ((stack.cache as usize + block * len) * n + stream * len, len)
}

/// The places of a ring (a power of two) that the `n` samples before `end` lie in, oldest first.
fn places(ring: i32, end: u64, n: usize) -> impl Iterator<Item = usize> {
    let mask = ring as u64 - 1;
    (0..n as u64).map(move |i| (end.wrapping_sub(n as u64).wrapping_add(i) & mask) as usize)
}

pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    Element::F32.values(bytes)
}

pub(super) fn words(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect()
}
