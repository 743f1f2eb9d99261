//! One or many streams of a model on a machine: their state in its memory, and whole plan frames of all of them in a launch.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::machine::{Machine, MachineError};
use super::pack::Packed;
use crate::checkpoint::Checkpoint;
use crate::codec::Token;
use crate::cuda::launch::{
    DecodeArgs, DecodeGeometry, DecodeLayout, DecodeModel, DecodeStack, Element, N_FLAGS, Words,
};
use crate::engine::state::{Counters, SavedCache, SavedStream, plan_cache, wave_cache};
use crate::engine::{EngineError, UNIFORMS_PER_SAMPLE, expect, state_error};
use crate::forecast::{PastForecast, PlannedForecast, PlannedPast};
use crate::model::config::{GenerationSettings, ModelConfig};
use crate::model::wave_transformer::PLAN_FRAMES;
use crate::plan::{ResidualQuantizer, Spectrum};
use crate::sampler::{Drive, PlanDraw, PlanSampling};

/// In a ring of tokens a token's code lies above its 16 bits.
const TOKEN_BITS: u32 = 16;

/// 64-bit counters of a stream.
const N_COUNTERS: usize = 4;
const WORD: usize = 4;

/// A model in a machine's memory, for any number of [`Streams`].
pub struct Model<M: Machine> {
    pub machine: Arc<M>,
    pub config: ModelConfig,
    pub quantizer: ResidualQuantizer,
    pub spectrum: Spectrum,
    pub generation: GenerationSettings,
    packed: Packed,
    /// Model, weights, exact, doubles, places.
    parts: [M::Buffer; 5],
}

/// Where the plan comes from.
#[derive(Clone, Copy, Debug)]
pub enum Plan<'a> {
    /// The plan transformer draws it: uniforms `[streams, n_frames, n_codebooks]`.
    Draw(&'a [f32]),
    /// The plan transformer reads these tokens, `[streams, n_frames, n_codebooks]`, and prices them.
    Read(&'a [i32]),
    /// Bands from elsewhere, `[streams, n_frames, n_bands]`.
    Given(&'a [f32]),
}

/// Where the samples come from.
#[derive(Clone, Copy, Debug)]
pub enum Wave<'a> {
    /// Drawn: uniforms `[streams, n_frames, hop, 2]`.
    Draw(&'a [f32]),
    /// Read, and priced: tokens `[streams, n_frames, hop]`.
    Read(&'a [i32]),
    /// Only the plan is of interest.
    Silent,
}

/// How samples and plan tokens are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    pub plan: PlanSampling,
    pub wave: GenerationSettings,
}

/// What a launch leaves behind, stream after stream; empty where nothing was asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Played {
    /// `[streams, n_frames, n_codebooks]`
    pub plan_tokens: Vec<i32>,
    /// `[streams, n_frames, n_bands]`
    pub bands: Vec<f32>,
    /// What the tokens of each frame cost, `[streams, n_frames]`; that of a stream's very first means nothing.
    pub plan_draws: Vec<PlanDraw>,
    /// `[streams, n_frames, hop]`
    pub tokens: Vec<i32>,
    /// Nats of samples that were read, `[streams, n_frames, hop]`.
    pub nll: Vec<f32>,
}

/// Streams that are played together.
pub struct Streams<M: Machine> {
    pub model: Arc<Model<M>>,
    n: usize,
    playing: Shape<M::Buffer>,
    /// Of launches that make a plan only: there is nothing to run beside it.
    silent: Shape<M::Buffer>,
    state: State<M::Buffer>,
}

/// How a launch shares the work, and the model's maps with their places in shared memory.
struct Shape<B> {
    geometry: DecodeGeometry,
    layout: DecodeLayout,
    linears: B,
    maps: B,
}

/// What lasts from launch to launch.
struct State<B> {
    counters: B,
    ring_tokens: B,
    memory: B,
    caches: B,
    frames: B,
    past: B,
}

impl<M: Machine> Model<M> {
    /// Packs a checkpoint and sends it to the machine.
    ///
    /// # Errors
    /// When the kernel cannot play this model, or the machine has no room for it.
    pub fn new(machine: Arc<M>, checkpoint: &Checkpoint, element: Element) -> Result<Self, EngineError> {
        let packed = Packed::new(checkpoint, element)?;
        let model = packed.model.to_bytes();
        let upload = |bytes: &[u8]| filled(&*machine, bytes);
        let parts = [
            upload(&model)?,
            upload(&packed.weights)?,
            upload(&packed.exact)?,
            upload(&packed.doubles)?,
            upload(&packed.places)?,
        ];
        Ok(Self {
            config: checkpoint.config.clone(),
            quantizer: checkpoint.quantizer.clone(),
            spectrum: checkpoint.spectrum()?,
            generation: checkpoint.generation,
            packed,
            parts,
            machine,
        })
    }

    fn sizes(&self) -> &DecodeModel {
        &self.packed.model
    }

    fn shape(&self, geometry: DecodeGeometry) -> Result<Shape<M::Buffer>, EngineError> {
        let Packed { model, linears, element, .. } = &self.packed;
        let layout = geometry.layout(model, linears, *element, &self.machine.limits())?;
        let upload = |bytes: &[u8]| filled(&*self.machine, bytes);
        let (linears, maps) = (upload(&layout.linears.to_bytes())?, upload(&layout.maps.to_bytes())?);
        Ok(Shape { geometry, linears, maps, layout })
    }

    /// How `streams` of it are played on this machine unless told otherwise.
    pub fn geometry(&self, streams: usize) -> DecodeGeometry {
        let Packed { model, linears, element, .. } = &self.packed;
        DecodeGeometry::of(streams, model, linears, *element, &self.machine.limits())
    }
}

/// New memory with these contents.
fn filled<M: Machine>(machine: &M, bytes: &[u8]) -> Result<M::Buffer, MachineError> {
    let mut buffer = machine.zeros(bytes.len())?;
    machine.write(&mut buffer, 0, bytes)?;
    Ok(buffer)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    Element::F32.values(bytes)
}

fn words(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect()
}

/// Where a cache of heads of `head_dim` values has key and value `i` of `[n_heads, window, head_dim]` (kernels/args.cuh).
fn place_of(i: usize, [n_heads, window, head_dim]: [usize; 3], vector: usize) -> (usize, usize) {
    let (head, slot, f) = (i / head_dim / window, i / head_dim % window, i % head_dim);
    let (vectors, padded) = (head_dim.div_ceil(vector), head_dim.next_multiple_of(vector));
    let key = ((head * vectors + f / vector) * window + slot) * vector + f % vector;
    (key, ((n_heads + head) * window + slot) * padded + f)
}

/// The places of a ring (a power of two) that the `n` samples before `end` lie in, oldest first.
fn places(ring: i32, end: u64, n: usize) -> impl Iterator<Item = usize> {
    let mask = ring as u64 - 1;
    (0..n as u64).map(move |i| (end.wrapping_sub(n as u64).wrapping_add(i) & mask) as usize)
}

impl<M: Machine> Streams<M> {
    /// `n` streams at their beginning.
    ///
    /// # Errors
    /// When the machine has no room for them.
    pub fn new(model: Arc<Model<M>>, n: usize, geometry: DecodeGeometry) -> Result<Self, EngineError> {
        let (sizes, machine) = (model.sizes(), &*model.machine);
        let of = |stride: i64, word: usize| machine.zeros(n * stride as usize * word);
        let state = State {
            counters: of(N_COUNTERS as i64, 8)?,
            ring_tokens: of(sizes.n_tokens.into(), WORD)?,
            memory: of(sizes.memory_stride.into(), WORD)?,
            caches: of(sizes.cache_stride, model.packed.element.size())?,
            frames: of(2 * i64::from(sizes.frame_stride), WORD)?,
            past: of(sizes.order.into(), WORD)?,
        };
        let playing = model.shape(geometry)?;
        let silent = model.shape(DecodeGeometry { overlapped: false, group_size: 1, ..geometry })?;
        let mut streams = Self { n, playing, silent, state, model };
        streams.reset()?;
        Ok(streams)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.n
    }

    pub fn geometry(&self) -> DecodeGeometry {
        self.playing.geometry
    }

    /// Share of the wave transformer's weights that stay in shared memory.
    pub fn resident(&self) -> f64 {
        self.playing.layout.resident
    }

    /// All streams at their beginning.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn reset(&mut self) -> Result<(), EngineError> {
        let fresh = self.fresh()?;
        (0..self.n).try_for_each(|stream| self.load(stream, &fresh))
    }

    fn fresh(&self) -> Result<SavedStream, EngineError> {
        let Model { config, spectrum, .. } = &*self.model;
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

    /// The stacks' names in a saved state.
    fn stacks(&self) -> impl Iterator<Item = (DecodeStack, usize, String)> + '_ {
        let sizes = self.model.sizes();
        let plan = (0..sizes.plan.n_layers as usize).map(|block| (sizes.plan, block, plan_cache(block)));
        let tiers = sizes.tiers[..sizes.n_tiers as usize].iter().enumerate();
        plan.chain(tiers.flat_map(|(i, tier)| {
            (0..tier.stack.n_layers as usize).map(move |block| (tier.stack, block, wave_cache(i, block)))
        }))
    }

    /// One stream goes on from a saved state.
    ///
    /// # Errors
    /// When the state is none between two plan frames, or the machine fails.
    pub fn load(&mut self, stream: usize, saved: &SavedStream) -> Result<(), EngineError> {
        let model = self.model.clone();
        let (sizes, machine) = (model.sizes(), &*model.machine);
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
        let codec = &model.config.codec;
        let coded = |token: Token| i32::from(token) | i32::from(codec.code(token)) << TOKEN_BITS;
        let mut ring = vec![coded(codec.silence()); sizes.n_tokens as usize];
        for (place, token) in places(sizes.n_tokens, *n, tokens.len()).zip(tokens) {
            ring[place] = coded(*token);
        }
        let counters = [*n as i64, *plan_pos as i64, i64::from(*residual_code), 0];
        let put = |buffer: &mut M::Buffer, bytes: Vec<u8>| machine.write(buffer, stream * bytes.len(), &bytes);
        put(&mut self.state.counters, counters.to_bytes())?;
        put(&mut self.state.ring_tokens, ring.to_bytes())?;
        put(&mut self.state.memory, memory.to_bytes())?;
        let places: Vec<_> =
            self.stacks().map(|(stack, block, name)| (self.cache_at(stream, stack, block), name)).collect();
        let element = model.packed.element;
        for ((at, len), name) in places {
            let caches = &mut self.state.caches;
            let Some(SavedCache { shape, keys, values }) = saved.caches.get(&name) else {
                machine.clear(caches, element.size() * at, element.size() * len)?;
                continue;
            };
            let mut laid = vec![0.0f32; len];
            for (i, (key, value)) in keys.iter().zip(values).enumerate() {
                let (of_key, of_value) = place_of(i, *shape, element.vector());
                (laid[of_key], laid[of_value]) = (*key, *value);
            }
            machine.write(caches, element.size() * at, &element.to_bytes(&laid))?;
        }
        Ok(())
    }

    /// Where a stream's cache of a block begins, and how long it is, in values: `cached` of kernels/decode_step.cuh.
    fn cache_at(&self, stream: usize, stack: DecodeStack, block: usize) -> (usize, usize) {
        let len = stack.block_cache as usize;
        ((stack.cache as usize + block * len) * self.n + stream * len, len)
    }

    /// All of them are where those of `other` are, as many of the same model.
    ///
    /// # Errors
    /// When there are not as many, or the machine fails.
    pub fn follow(&mut self, other: &Self) -> Result<(), EngineError> {
        expect("streams", self.n, other.n)?;
        let (machine, from, to) = (&*self.model.machine, &other.state, &mut self.state);
        machine.copy(&from.counters, &mut to.counters)?;
        machine.copy(&from.ring_tokens, &mut to.ring_tokens)?;
        machine.copy(&from.memory, &mut to.memory)?;
        machine.copy(&from.caches, &mut to.caches)?;
        machine.copy(&from.frames, &mut to.frames)?;
        machine.copy(&from.past, &mut to.past)?;
        Ok(())
    }

    /// One stream's state.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn store(&self, stream: usize) -> Result<SavedStream, EngineError> {
        let (sizes, machine, config) = (self.model.sizes(), &*self.model.machine, &self.model.config);
        let read = |buffer: &M::Buffer, at: usize, len: usize| -> Result<Vec<u8>, MachineError> {
            let mut bytes = vec![0; len];
            machine.read(buffer, at, &mut bytes)?;
            Ok(bytes)
        };
        let get = |buffer: &M::Buffer, len: usize| read(buffer, stream * len, len);
        let counters = get(&self.state.counters, 8 * N_COUNTERS)?;
        let [n, plan_pos, residual_code] =
            [0, 1, 2].map(|i| counters.as_chunks().0.get(i).map_or(0, |&b| u64::from_le_bytes(b)));
        let memory = floats(&get(&self.state.memory, WORD * sizes.memory_stride as usize)?);
        let ring = words(&get(&self.state.ring_tokens, WORD * sizes.n_tokens as usize)?);
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
            let (at, len) = self.cache_at(stream, stack, block);
            let element = self.model.packed.element;
            let cache = element.values(&read(&self.state.caches, element.size() * at, element.size() * len)?);
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

    /// `n_frames` plan frames of every stream.
    ///
    /// # Errors
    /// When numbers are missing, or the machine fails.
    pub fn play(
        &mut self,
        n_frames: usize,
        plan: Plan,
        wave: Wave,
        sampling: &Sampling,
    ) -> Result<Played, EngineError> {
        let (sizes, machine) = (self.model.sizes(), &*self.model.machine);
        let frames = self.n * n_frames;
        let (books, bands, hop) = (sizes.n_codebooks as usize, sizes.n_bands as usize, sizes.plan_hop as usize);
        let upload = |what, values: &[f32], each: usize| -> Result<M::Buffer, EngineError> {
            expect(what, frames * each, values.len())?;
            Ok(filled(machine, &values.to_bytes())?)
        };
        let make_plan = !matches!(plan, Plan::Given(_));
        let mut plan_uniforms = None;
        let plan_draws = if make_plan { Some(machine.zeros(2 * WORD * frames)?) } else { None };
        let (mut plan_tokens, mut band_values) = (None, None);
        match plan {
            Plan::Draw(uniforms) => plan_uniforms = Some(upload("uniforms", uniforms, books)?),
            Plan::Read(tokens) => {
                expect("plan tokens", frames * books, tokens.len())?;
                plan_tokens = Some(filled(machine, &tokens.to_bytes())?);
            }
            Plan::Given(values) => band_values = Some(upload("plan bands", values, bands)?),
        }
        let plan_tokens = match plan_tokens {
            Some(tokens) => tokens,
            None => machine.zeros(WORD * frames * books)?,
        };
        let band_values = match band_values {
            Some(values) => values,
            None => machine.zeros(WORD * frames * bands)?,
        };
        let (mut wave_uniforms, mut tokens, mut nll) = (None, None, None);
        match wave {
            Wave::Draw(uniforms) => {
                wave_uniforms = Some(upload("uniforms", uniforms, UNIFORMS_PER_SAMPLE * hop)?);
                tokens = Some(machine.zeros(WORD * frames * hop)?);
            }
            Wave::Read(values) => {
                expect("tokens", frames * hop, values.len())?;
                tokens = Some(filled(machine, &values.to_bytes())?);
                nll = Some(machine.zeros(WORD * frames * hop)?);
            }
            Wave::Silent => (),
        }
        let Shape { geometry, layout, linears, maps } = if tokens.is_some() { &self.playing } else { &self.silent };
        let flags = machine.zeros(WORD * N_FLAGS * self.n.div_ceil(geometry.rows))?;
        let PlanSampling { temperature, top_k, top_p, min_p } = sampling.plan;
        let GenerationSettings { grain, past, offset, .. } = sampling.wave;
        let args = DecodeArgs {
            streams: self.n as i32,
            n_frames: n_frames as i32,
            make_plan: make_plan.into(),
            make_wave: tokens.is_some().into(),
            top_k: top_k.min(i32::MAX as usize) as i32,
            temperature,
            top_p,
            min_p,
            grain,
            past_weight: past,
            offset,
            // What is read lies in frames as they are.
            level: if wave_uniforms.is_some() { sampling.wave.played(0.0) } else { 0.0 },
            ..geometry.args(layout)
        };
        let [model, weights, exact, doubles, places] = &self.model.parts;
        let State { counters, ring_tokens, memory, caches, frames: slots, past } = &self.state;
        let buffers = [
            Some(model),
            Some(linears),
            Some(maps),
            Some(weights),
            Some(exact),
            Some(doubles),
            Some(places),
            Some(counters),
            Some(ring_tokens),
            Some(memory),
            Some(caches),
            Some(slots),
            Some(past),
            Some(&flags),
            plan_uniforms.as_ref(),
            wave_uniforms.as_ref(),
            Some(&plan_tokens),
            Some(&band_values),
            tokens.as_ref(),
            nll.as_ref(),
            plan_draws.as_ref(),
        ];
        machine.launch(&layout.launch, &args, buffers)?;
        let read = |buffer: &M::Buffer, len: usize| -> Result<Vec<u8>, MachineError> {
            let mut bytes = vec![0; WORD * len];
            machine.read(buffer, 0, &mut bytes)?;
            Ok(bytes)
        };
        let optional = |buffer: &Option<M::Buffer>, len: usize| -> Result<Vec<u8>, MachineError> {
            buffer.as_ref().map_or(Ok(Vec::new()), |buffer| read(buffer, len))
        };
        let mut played = Played {
            plan_draws: floats(&optional(&plan_draws, 2 * frames)?)
                .as_chunks()
                .0
                .iter()
                .map(|&[surprisal, entropy]| PlanDraw { surprisal, entropy })
                .collect(),
            tokens: words(&optional(&tokens, frames * hop)?),
            nll: floats(&optional(&nll, frames * hop)?),
            ..Played::default()
        };
        if make_plan {
            played.plan_tokens = words(&read(&plan_tokens, frames * books)?);
            played.bands = floats(&read(&band_values, frames * bands)?);
        }
        Ok(played)
    }
}
