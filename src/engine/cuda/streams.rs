//! One or many streams of a model on a machine: whole plan frames of all of them, or of some, in a launch.

use std::sync::Arc;

use super::machine::{Machine, MachineError};
use super::pack::Packed;
use super::state::{Kept, Laid, State, WORD, floats, words};
use crate::checkpoint::Checkpoint;
use crate::cuda::launch::{DecodeArgs, DecodeGeometry, DecodeLayout, DecodeModel, Element, N_FLAGS, Words};
use crate::engine::state::SavedStream;
use crate::engine::{EngineError, UNIFORMS_PER_SAMPLE, expect};
use crate::model::config::{GenerationSettings, ModelConfig};
use crate::plan::{ResidualQuantizer, Spectrum};
use crate::sampler::{PlanDraw, PlanSampling};

/// A model in a machine's memory, for any number of [`Streams`].
pub struct Model<M: Machine> {
    pub machine: Arc<M>,
    pub config: ModelConfig,
    pub quantizer: ResidualQuantizer,
    pub spectrum: Spectrum,
    pub generation: GenerationSettings,
    pub(super) packed: Packed,
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
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    pub plan: PlanSampling,
    pub wave: GenerationSettings,
}

/// What a launch leaves behind, stream after stream of those that it played; empty where nothing was asked for.
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

impl Played {
    /// What is the `i`th's of the `n` streams that it is of; empty where there are not so many.
    pub fn of(&self, i: usize, n: usize) -> Self {
        fn part<T: Clone>(all: &[T], i: usize, n: usize) -> Vec<T> {
            let each = all.len() / n.max(1);
            all.chunks_exact(each.max(1)).nth(i).map_or_else(Vec::new, <[T]>::to_vec)
        }
        let Self { plan_tokens, bands, plan_draws, tokens, nll } = self;
        Self {
            plan_tokens: part(plan_tokens, i, n),
            bands: part(bands, i, n),
            plan_draws: part(plan_draws, i, n),
            tokens: part(tokens, i, n),
            nll: part(nll, i, n),
        }
    }

    /// Joins what came after it.
    pub(super) fn extend(&mut self, after: Self) {
        let Self { plan_tokens, bands, plan_draws, tokens, nll } = after;
        self.plan_tokens.extend(plan_tokens);
        self.bands.extend(bands);
        self.plan_draws.extend(plan_draws);
        self.tokens.extend(tokens);
        self.nll.extend(nll);
    }
}

/// Streams that are played together.
pub struct Streams<M: Machine> {
    pub model: Arc<Model<M>>,
    playing: Shape<M::Buffer>,
    /// Of launches that make a plan only: there is nothing to run beside it.
    silent: Shape<M::Buffer>,
    state: State<M::Buffer>,
    /// What a launch makes for itself: frames as the wave transformer reads them, coefficients of the forecast from the past.
    frames: M::Buffer,
    past: M::Buffer,
}

/// How a launch shares the work, and the model's maps with their places in shared memory.
struct Shape<B> {
    geometry: DecodeGeometry,
    layout: DecodeLayout,
    linears: B,
    maps: B,
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

    pub(super) fn sizes(&self) -> &DecodeModel {
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

impl<M: Machine> Streams<M> {
    /// `n` streams at their beginning.
    ///
    /// # Errors
    /// When the machine has no room for them.
    pub fn new(model: Arc<Model<M>>, n: usize, geometry: DecodeGeometry) -> Result<Self, EngineError> {
        let DecodeModel { frame_stride, order, .. } = *model.sizes();
        let state = model.state(n)?;
        let frames = model.machine.zeros(n * 2 * WORD * frame_stride as usize)?;
        let past = model.machine.zeros(n * WORD * order as usize)?;
        let playing = model.shape(geometry)?;
        let silent = model.shape(DecodeGeometry { overlapped: false, group_size: 1, ..geometry })?;
        let mut streams = Self { playing, silent, state, frames, past, model };
        let fresh = streams.model.laid(&streams.model.fresh()?)?;
        (0..n).try_for_each(|stream| streams.put(stream, &fresh))?;
        Ok(streams)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.state.n
    }

    pub fn geometry(&self) -> DecodeGeometry {
        self.playing.geometry
    }

    /// Share of the wave transformer's weights that stay in shared memory.
    pub fn resident(&self) -> f64 {
        self.playing.layout.resident
    }

    /// One stream at its beginning.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn reset(&mut self, stream: usize) -> Result<(), EngineError> {
        self.load(stream, &self.model.fresh()?)
    }

    /// One stream goes on from a saved state.
    ///
    /// # Errors
    /// When the state is none between two plan frames, or the machine fails.
    pub fn load(&mut self, stream: usize, saved: &SavedStream) -> Result<(), EngineError> {
        let laid = self.model.laid(saved)?;
        self.put(stream, &laid)
    }

    /// One stream goes on from a state as it lies in memory.
    ///
    /// # Errors
    /// When the machine fails.
    pub(super) fn put(&mut self, stream: usize, laid: &Laid) -> Result<(), EngineError> {
        Ok(self.model.put(&mut self.state, stream, laid)?)
    }

    /// One stream's state.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn store(&self, stream: usize) -> Result<SavedStream, EngineError> {
        self.model.saved(&self.state, stream)
    }

    /// The first of them, one after the other, are where the streams `who` of others of the same model are.
    ///
    /// # Errors
    /// When the machine fails, or one of these is not there.
    pub(super) fn follow(&mut self, other: &Self, who: &[usize]) -> Result<(), EngineError> {
        let Self { model, state, .. } = self;
        // All at once are less to copy than one by one.
        if state.n == other.state.n && who.iter().copied().eq(0..state.n) {
            return Ok(model.copy_all(&other.state, state)?);
        }
        Ok(who.iter().enumerate().try_for_each(|(i, &seat)| model.copy((&other.state, seat), (state, i)))?)
    }

    /// Keeps a stream's state where it is: cheaper than [`Self::store`].
    ///
    /// # Errors
    /// When the machine has no room for it.
    pub(super) fn keep(&self, stream: usize) -> Result<Kept<M>, EngineError> {
        let mut state = self.model.state(1)?;
        self.model.copy((&self.state, stream), (&mut state, 0))?;
        Ok(Kept { model: self.model.clone(), state })
    }

    /// One stream goes on from a state that was kept.
    ///
    /// # Errors
    /// When it was of another model, or the machine fails.
    pub(super) fn go_back(&mut self, stream: usize, kept: &Kept<M>) -> Result<(), EngineError> {
        if !Arc::ptr_eq(&self.model, &kept.model) {
            return Err(EngineError::State("it was kept of another model".into()));
        }
        Ok(self.model.copy((&kept.state, 0), (&mut self.state, stream))?)
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
        self.play_some(&(0..self.state.n).collect::<Vec<_>>(), n_frames, plan, wave, sampling)
    }

    /// `n_frames` plan frames of the streams `who`, each of them there and named once; the others stay where they are. What is given and comes
    /// back is theirs alone, in their order.
    ///
    /// # Errors
    /// When numbers are missing, `who` is not as above, or the machine fails.
    pub fn play_some(
        &mut self,
        who: &[usize],
        n_frames: usize,
        plan: Plan,
        wave: Wave,
        sampling: &Sampling,
    ) -> Result<Played, EngineError> {
        let (sizes, machine) = (self.model.sizes(), &*self.model.machine);
        let mut named = vec![false; self.state.n];
        for &stream in who {
            if named.get(stream) != Some(&false) {
                return Err(EngineError::State(format!("of {} streams these cannot be played: {who:?}", self.state.n)));
            }
            named[stream] = true;
        }
        if who.is_empty() || n_frames == 0 {
            return Ok(Played::default());
        }
        let turns = filled(machine, &who.iter().map(|&stream| stream as i32).collect::<Vec<_>>().to_bytes())?;
        let frames = who.len() * n_frames;
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
        let flags = machine.zeros(WORD * N_FLAGS * who.len().div_ceil(geometry.rows))?;
        let PlanSampling { temperature, top_k, top_p, min_p } = sampling.plan;
        let GenerationSettings { grain, past, offset, .. } = sampling.wave;
        let args = DecodeArgs {
            streams: who.len() as i32,
            capacity: self.state.n as i32,
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
        let State { counters, ring_tokens, memory, caches, .. } = &self.state;
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
            Some(&self.frames),
            Some(&self.past),
            Some(&flags),
            Some(&turns),
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
