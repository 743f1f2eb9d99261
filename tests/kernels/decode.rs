//! decode_persistent.cu under the CUDA engine, against the CPU engine in f32: distributions, tokens, states, many streams.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use wavegen::checkpoint::Checkpoint;
use wavegen::codec::{Quantizer, Token};
#[cfg(feature = "cuda")]
use wavegen::cuda::Gpu;
use wavegen::cuda::launch::{DecodeArgs, DecodeGeometry, DecodeLimits, Element, Launch, N_POINTERS, SET};
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
use wavegen::engine::cuda::{CudaEngine, Machine, MachineError, Model, Plan, Sampling, Streams, Wave};
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::model::config::{GenerationSettings, ModelConfig, TierConfig};
use wavegen::plan::PlanFrame;
use wavegen::rng::{Kind, Rng, uniform};
use wavegen::sampler::PlanSampling;

use crate::emulator::{Emulator, Schedule, named};

const FILE: &str = "decode_persistent.cu";

/// The emulator as a machine: memory of this process, each launch a process of its own.
struct Emulated {
    emulator: Emulator,
    schedule: Mutex<Schedule>,
    launches: AtomicUsize,
    limits: DecodeLimits,
}

impl Machine for Emulated {
    type Buffer = Mutex<Vec<u8>>;

    fn limits(&self) -> DecodeLimits {
        self.limits
    }

    fn free_bytes(&self) -> Result<usize, MachineError> {
        Ok(1 << 30)
    }

    fn zeros(&self, bytes: usize) -> Result<Self::Buffer, MachineError> {
        Ok(Mutex::new(vec![0; bytes]))
    }

    fn write(&self, buffer: &mut Self::Buffer, at: usize, bytes: &[u8]) -> Result<(), MachineError> {
        buffer.get_mut().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy(
        &self,
        (from, from_at): (&Self::Buffer, usize),
        (to, to_at): (&mut Self::Buffer, usize),
        bytes: usize,
    ) -> Result<(), MachineError> {
        let from = &from.lock().unwrap()[from_at..from_at + bytes];
        to.get_mut().unwrap()[to_at..to_at + bytes].copy_from_slice(from);
        Ok(())
    }

    fn read(&self, buffer: &Self::Buffer, at: usize, bytes: &mut [u8]) -> Result<(), MachineError> {
        bytes.copy_from_slice(&buffer.lock().unwrap()[at..at + bytes.len()]);
        Ok(())
    }

    fn launch(
        &self,
        launch: &Launch,
        args: &DecodeArgs,
        buffers: [Option<&Self::Buffer>; N_POINTERS],
    ) -> Result<(), MachineError> {
        let number = |i: usize| buffers[i].map_or(0, |_| 1 + i as u64);
        let args = args.with_pointers(std::array::from_fn(number));
        let mut bytes: Vec<Vec<u8>> =
            buffers.iter().map(|buffer| buffer.map_or(Vec::new(), |buffer| buffer.lock().unwrap().clone())).collect();
        self.launches.fetch_add(1, Relaxed);
        let mut schedule = self.schedule.lock().unwrap();
        self.emulator.run(launch, &args, N_POINTERS as u32, &mut bytes, *schedule).map_err(MachineError::Other)?;
        schedule.seed = schedule.seed.wrapping_mul(5).wrapping_add(u64::from(schedule.seed > 0));
        for (buffer, bytes) in buffers.into_iter().zip(bytes) {
            if let Some(buffer) = buffer {
                *buffer.lock().unwrap() = bytes;
            }
        }
        Ok(())
    }
}

fn emulated(schedule: Schedule) -> Option<Arc<Emulated>> {
    let emulator = Emulator::program(FILE)?;
    Some(Arc::new(Emulated {
        emulator,
        schedule: Mutex::new(schedule),
        launches: AtomicUsize::new(0),
        limits: DecodeLimits::default(),
    }))
}

/// A GPU where there is one, else the emulator.
enum Place {
    Emulated(Arc<Emulated>),
    #[cfg(feature = "cuda")]
    Gpu(Gpu),
}

/// Memory of a [`Place`].
enum Memory {
    Emulated(<Emulated as Machine>::Buffer),
    #[cfg(feature = "cuda")]
    Gpu(<Gpu as Machine>::Buffer),
}

/// What a call does to the memory of the place that it is made at.
macro_rules! at_its_place {
    ($place:expr, $buffer:expr, |$machine:ident, $memory:ident| $call:expr) => {
        match ($place, $buffer) {
            (Place::Emulated($machine), Memory::Emulated($memory)) => $call,
            #[cfg(feature = "cuda")]
            (Place::Gpu($machine), Memory::Gpu($memory)) => $call,
            #[cfg(feature = "cuda")]
            _ => Err(MachineError::Other("memory of another place".into())),
        }
    };
}

impl Machine for Place {
    type Buffer = Memory;

    fn limits(&self) -> DecodeLimits {
        match self {
            Self::Emulated(machine) => machine.limits(),
            #[cfg(feature = "cuda")]
            Self::Gpu(machine) => machine.limits(),
        }
    }

    fn free_bytes(&self) -> Result<usize, MachineError> {
        match self {
            Self::Emulated(machine) => machine.free_bytes(),
            #[cfg(feature = "cuda")]
            Self::Gpu(machine) => machine.free_bytes(),
        }
    }

    fn zeros(&self, bytes: usize) -> Result<Memory, MachineError> {
        match self {
            Self::Emulated(machine) => machine.zeros(bytes).map(Memory::Emulated),
            #[cfg(feature = "cuda")]
            Self::Gpu(machine) => machine.zeros(bytes).map(Memory::Gpu),
        }
    }

    fn write(&self, buffer: &mut Memory, at: usize, bytes: &[u8]) -> Result<(), MachineError> {
        at_its_place!(self, buffer, |machine, memory| machine.write(memory, at, bytes))
    }

    fn copy(
        &self,
        (from, from_at): (&Memory, usize),
        (to, to_at): (&mut Memory, usize),
        bytes: usize,
    ) -> Result<(), MachineError> {
        match (self, from, to) {
            (Self::Emulated(machine), Memory::Emulated(from), Memory::Emulated(to)) => {
                machine.copy((from, from_at), (to, to_at), bytes)
            }
            #[cfg(feature = "cuda")]
            (Self::Gpu(machine), Memory::Gpu(from), Memory::Gpu(to)) => {
                machine.copy((from, from_at), (to, to_at), bytes)
            }
            #[cfg(feature = "cuda")]
            _ => Err(MachineError::Other("memory of another machine".into())),
        }
    }

    fn read(&self, buffer: &Memory, at: usize, bytes: &mut [u8]) -> Result<(), MachineError> {
        at_its_place!(self, buffer, |machine, memory| machine.read(memory, at, bytes))
    }

    fn launch(
        &self,
        launch: &Launch,
        args: &DecodeArgs,
        buffers: [Option<&Memory>; N_POINTERS],
    ) -> Result<(), MachineError> {
        match self {
            Self::Emulated(machine) => {
                let here = buffers.map(|buffer| match buffer? {
                    Memory::Emulated(memory) => Some(memory),
                    #[cfg(feature = "cuda")]
                    Memory::Gpu(_) => None,
                });
                machine.launch(launch, args, here)
            }
            #[cfg(feature = "cuda")]
            Self::Gpu(machine) => {
                let there = buffers.map(|buffer| match buffer? {
                    Memory::Gpu(memory) => Some(memory),
                    Memory::Emulated(_) => None,
                });
                machine.launch(launch, args, there)
            }
        }
    }
}

impl Place {
    /// How many launches there were, if they are counted.
    fn launches(&self) -> Option<usize> {
        match self {
            Self::Emulated(machine) => Some(machine.launches.load(Relaxed)),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => None,
        }
    }
}

fn machine(schedule: Schedule) -> Option<Arc<Place>> {
    #[cfg(feature = "cuda")]
    if crate::gpu::is_there() {
        return Some(Arc::new(Place::Gpu(Gpu::new().unwrap())));
    }
    emulated(schedule).map(|machine| Arc::new(Place::Emulated(machine)))
}

/// One block does everything.
const ALONE: DecodeGeometry = DecodeGeometry { rows: 1, groups: 1, group_size: 1, overlapped: false, threads: 64 };
/// Plan and forecast from the past have blocks of their own.
const OVERLAPPED: DecodeGeometry = DecodeGeometry { overlapped: true, ..ALONE };
/// And two blocks play.
const DIVIDED: DecodeGeometry = DecodeGeometry { group_size: 2, ..OVERLAPPED };

/// Random weights whose last layers are not zero, so that the history matters.
fn lively(config: ModelConfig, seed: u64) -> Checkpoint {
    let mut checkpoint = Checkpoint::untrained(config, seed).unwrap();
    let mut rng = Rng::new(seed);
    for weights in checkpoint.weights.values_mut() {
        weights.change(|all| all.mapv_inplace(|w| w + 0.05 * rng.normal()));
    }
    checkpoint.generation = GenerationSettings { grain: 0.9, past: 0.5, offset: 0.3, level_db: -1.5 };
    checkpoint
}

/// Preset `tiny` with a plan that is sharpened, tones, and frames of `hop` samples: emulated samples are dear.
fn framed(hop: usize) -> ModelConfig {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.forecast.deconvolution = 4;
    config.forecast.tones = true;
    config.plan_transformer.refine = true;
    config.plan.hop = hop;
    config.plan.window = 4 * hop;
    config
}

fn tiny(seed: u64) -> Checkpoint {
    lively(framed(128), seed)
}

fn music(checkpoint: &Checkpoint, n: usize) -> Vec<Token> {
    damped(checkpoint, n, n)
}

/// Music that is 26 dB softer from sample `end` on.
fn damped(checkpoint: &Checkpoint, n: usize, end: usize) -> Vec<Token> {
    let sample = |i: usize| 0.2 * (i as f32 * 0.11).sin() + 0.1 * (i as f32 * 0.273).sin();
    let samples: Vec<f32> = (0..n).map(|i| if i < end { sample(i) } else { 0.05 * sample(i) }).collect();
    checkpoint.config.codec.encode_all(&samples)
}

fn uniforms(stream: u32, kind: Kind, frame: usize, n: usize) -> Vec<f32> {
    (frame * n..(frame + 1) * n).map(|t| uniform(7, stream, kind, t as u64)).collect()
}

fn cpu(checkpoint: &Checkpoint) -> CpuEngine {
    CpuEngine::new(checkpoint, &CpuOptions { precision: Precision::F32, ..CpuOptions::default() }).unwrap()
}

fn cuda(
    machine: &Arc<Place>,
    checkpoint: &Checkpoint,
    element: Element,
    geometry: DecodeGeometry,
) -> CudaEngine<Place> {
    let model = Model::new(machine.clone(), checkpoint, element).unwrap();
    CudaEngine::over(Arc::new(model), geometry).unwrap()
}

fn play(engine: &mut dyn Engine, frame: usize) -> Result<(PlanFrame, Vec<Token>), String> {
    let (hop, books) = (engine.config().plan.hop, engine.config().plan.n_codebooks);
    let (mut plan, mut out) = (PlanFrame::default(), vec![0; hop]);
    engine.next_plan(&uniforms(0, Kind::Plan, frame, books), &mut plan).map_err(|e| format!("{e:?}"))?;
    engine
        .render(&plan, &uniforms(0, Kind::Wave, frame, UNIFORMS_PER_SAMPLE * hop), &mut out)
        .map_err(|e| format!("{e:?}"))?;
    Ok((plan, out))
}

/// Samples that are nearer than this are the same.
const SAMPLE_SLACK: f32 = 3e-4;

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| if a.is_finite() { worst.max((a - b).abs()) } else { f32::INFINITY })
}

/// Frame by frame from the same state: the same plan, and the same tokens until a draw falls on an edge, between two bins or two
/// components (from there on the streams are different ones). Bins of 16 bits are finer than engines can agree on: such tokens are
/// the same when their samples are.
fn plays_like(cuda: &mut dyn Engine, cpu: &mut dyn Engine, frames: usize) -> Result<(), String> {
    let hop = cpu.config().plan.hop;
    let (mut equal, mut jumps) = (0, 0);
    for frame in 0..frames {
        if frame > 0 {
            let state = cpu.save().map_err(|e| e.to_string())?;
            cuda.restore(&state).map_err(|e| e.to_string())?;
        }
        let (plan, tokens) = play(cuda, frame)?;
        let (expected_plan, expected) = play(cpu, frame)?;
        if plan.tokens != expected_plan.tokens || worst(&plan.bands, &expected_plan.bands) > 1e-5 {
            return Err(format!("frame {frame}: another plan"));
        }
        let (draw, drawn) = (cuda.plan_draw(), cpu.plan_draw());
        if worst(&[draw.surprisal, draw.entropy], &[drawn.surprisal, drawn.entropy]) > 1e-3 {
            return Err(format!("frame {frame}: {draw:?}, expected {drawn:?}"));
        }
        let codec = &cpu.config().codec;
        let slack = if codec.quantizer == Quantizer::Pcm16 { SAMPLE_SLACK } else { 0.0 };
        let other = |(&a, &b): (&Token, &Token)| (codec.decode(a) - codec.decode(b)).abs() > slack;
        let differ = tokens.iter().zip(&expected).position(other);
        equal += differ.unwrap_or(hop);
        // Between bins the other token is the neighbour; between components, which is rarer, it may be any.
        jumps += usize::from(differ.is_some_and(|at| codec.code(tokens[at]).abs_diff(codec.code(expected[at])) > 1));
    }
    if equal <= frames * hop / 4 || jumps > frames / 2 {
        return Err(format!("only {equal} of {} samples are equal, {jumps} frames jump", frames * hop));
    }
    Ok(())
}

#[test]
fn it_plays_the_cpu_engines_tokens_however_the_work_is_shared() {
    let checkpoint = tiny(1);
    for (seed, geometry) in [(0, ALONE), (1, OVERLAPPED), (2, DIVIDED)] {
        let Some(machine) = machine(Schedule::seeded(seed)) else { return };
        let mut cuda = cuda(&machine, &checkpoint, Element::F32, geometry);
        let mut cpu = cpu(&checkpoint);
        let prompt = music(&checkpoint, 1000);
        let mut plan = cpu.prefill(&prompt).unwrap();
        let read = cuda.prefill(&prompt).unwrap();
        for (read, expected) in read.iter().zip(&plan) {
            let far = read.bands.iter().zip(&expected.bands).any(|(a, b)| (a - b).abs() > 1e-3);
            assert!(read.tokens == expected.tokens && !far);
        }
        assert_eq!(read.len(), plan.len());
        plan.iter_mut().for_each(|frame| frame.bands[3] += 0.2);
        cpu.heard_as(&plan).unwrap();
        cuda.heard_as(&plan).unwrap();
        plays_like(&mut cuda, &mut cpu, 5).unwrap_or_else(|e| panic!("{geometry:?}: {e}"));
    }
}

/// Tokens are clipped; what the forecast from the plan hears is not.
#[test]
fn frames_beyond_full_scale_are_played_as_the_cpu_engine_plays_them() {
    let checkpoint = tiny(7);
    let Some(machine) = machine(Schedule::seeded(6)) else { return };
    let (mut cuda, mut cpu) = (cuda(&machine, &checkpoint, Element::F32, OVERLAPPED), cpu(&checkpoint));
    let prompt = music(&checkpoint, 1000);
    cpu.prefill(&prompt).unwrap();
    cuda.prefill(&prompt).unwrap();
    let loud = GenerationSettings { level_db: 40.0, ..cpu.generation() };
    cpu.set_sampling(PlanSampling::default(), loud);
    cuda.set_sampling(PlanSampling::default(), loud);
    plays_like(&mut cuda, &mut cpu, 4).unwrap();
    let (_, tokens) = play(&mut cpu, 4).unwrap();
    let codec = &cpu.config().codec;
    let [least, most] = [-1.0, 1.0].map(|sample| codec.encode(sample));
    let clipped = tokens.iter().filter(|&&token| token == least || token == most).count();
    assert!(clipped > tokens.len() / 10, "{clipped} of {} are clipped", tokens.len());
}

#[test]
fn several_frames_in_a_launch_are_those_of_one_launch_each() {
    let checkpoint = tiny(2);
    for (seed, geometry) in [(3, ALONE), (4, OVERLAPPED), (5, DIVIDED)] {
        let Some(machine) = machine(Schedule::seeded(seed)) else { return };
        let mut engine = cuda(&machine, &checkpoint, Element::F32, geometry);
        engine.prefill(&music(&checkpoint, 700)).unwrap();
        let mut other = engine.fork().unwrap();
        other.restore(&engine.save().unwrap()).unwrap();
        let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
        let draws = |kind, n| (0..4).flat_map(|frame| uniforms(0, kind, frame, n)).collect::<Vec<_>>();
        let (plan, tokens) =
            engine.play(4, &draws(Kind::Plan, books), &draws(Kind::Wave, UNIFORMS_PER_SAMPLE * hop)).unwrap();
        for (frame, plan) in plan.into_iter().enumerate() {
            let expected = play(&mut other, frame).unwrap();
            assert!((plan, tokens[frame * hop..][..hop].to_vec()) == expected, "{geometry:?}, frame {frame}");
        }
        assert!(engine.save().unwrap() == other.save().unwrap(), "{geometry:?}");
    }
}

/// Models of sizes that nothing divides.
fn odd() -> Vec<Checkpoint> {
    let tier = |hop, dim, n_layers, n_heads, window| TierConfig { hop, dim, n_layers, n_heads, window };
    let all = [
        vec![tier(32, 20, 2, 2, 5), tier(1, 36, 3, 3, 41)],
        vec![tier(128, 18, 1, 1, 33), tier(16, 68, 1, 2, 7), tier(4, 10, 1, 1, 3), tier(1, 12, 2, 2, 18)],
        vec![tier(1, 100, 1, 2, 70)],
    ];
    let model = |(seed, tiers)| {
        let mut config = framed(128);
        config.wave_transformer.tiers = tiers;
        config.wave_transformer.token_dim = 5;
        config.wave_transformer.taps = 3;
        config.wave_transformer.components = 2;
        config.wave_transformer.plan_dim = 27;
        config.wave_transformer.shortcut_dim = 7;
        config.plan_transformer.dim = 44;
        config.plan_transformer.n_heads = 1;
        config.plan_transformer.window = 9;
        config.plan.n_codebooks = 3;
        config.plan.n_entries = 11;
        config.forecast.past_window = 530;
        config.forecast.past_hop = 32;
        config.forecast.order = 37;
        config.forecast.deconvolution = [7, 1, 0][seed as usize % 3];
        config.forecast.tones = config.forecast.deconvolution > 0;
        config.codec.quantizer = if seed == 6 { Quantizer::Mulaw8 } else { Quantizer::Pcm16 };
        config.forecast.fine_residual = seed != 6;
        config.validate().unwrap();
        lively(config, seed)
    };
    (5..).zip(all).map(model).collect()
}

fn assert_scores_like(
    machine: &Arc<Place>,
    checkpoint: &Checkpoint,
    geometry: DecodeGeometry,
    frames: usize,
    what: &str,
) {
    // The last frame begins after sound that is louder than planned.
    let n = frames * checkpoint.config.plan.hop;
    let tokens = damped(checkpoint, n, n - checkpoint.config.plan.hop - 20);
    let (mut cuda, mut cpu) = (cuda(machine, checkpoint, Element::F32, geometry), cpu(checkpoint));
    let (mut nll, mut expected) = (vec![0.0; tokens.len()], vec![0.0; tokens.len()]);
    cuda.score(&tokens, &mut nll).unwrap();
    cpu.score(&tokens, &mut expected).unwrap();
    let wave = worst(&nll, &expected);
    let plan = worst(&cuda.score_plan(&tokens).unwrap(), &cpu.score_plan(&tokens).unwrap());
    assert!(wave < 2e-3 && plan < 1e-3, "{what}: samples differ by {wave} nats, plan frames by {plan}");
}

#[test]
fn odd_sizes_have_the_cpu_engines_distributions_over_many_ring_wraps() {
    let geometries =
        [ALONE, DIVIDED, DecodeGeometry { group_size: 4, ..OVERLAPPED }, DecodeGeometry { threads: 160, ..OVERLAPPED }];
    for (i, checkpoint) in odd().into_iter().enumerate() {
        let Some(machine) = machine(Schedule::seeded(i as u64)) else { return };
        assert_scores_like(&machine, &checkpoint, geometries[i], 3, &format!("sizes {i}"));
        let geometry = geometries[i + 1];
        let (mut cuda, mut cpu) = (cuda(&machine, &checkpoint, Element::F32, geometry), cpu(&checkpoint));
        cpu.prefill(&music(&checkpoint, 1300)).unwrap();
        cuda.restore(&cpu.save().unwrap()).unwrap();
        plays_like(&mut cuda, &mut cpu, 2).unwrap_or_else(|e| panic!("sizes {i}, {geometry:?}: {e}"));
    }
}

#[test]
fn the_models_inside_the_program_have_the_cpu_engines_distributions_and_tokens() {
    let geometry = DecodeGeometry { group_size: 2, threads: 256, ..OVERLAPPED };
    let Some(machine) = machine(Schedule::default()) else { return };
    for (checkpoint, name) in [(Checkpoint::built_in(), "built-in"), (Checkpoint::built_in_small(), "small")] {
        let checkpoint = checkpoint.unwrap();
        assert_scores_like(&machine, &checkpoint, geometry, 2, name);
        let (mut cuda, mut cpu) = (cuda(&machine, &checkpoint, Element::F32, geometry), cpu(&checkpoint));
        cpu.prefill(&music(&checkpoint, 20_000)).unwrap();
        cuda.restore(&cpu.save().unwrap()).unwrap();
        plays_like(&mut cuda, &mut cpu, 3).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn a_long_prompt_is_read_as_the_cpu_engine_reads_it() {
    let checkpoint = tiny(6);
    let Some(machine) = machine(Schedule::default()) else { return };
    let (mut cuda, mut cpu) = (cuda(&machine, &checkpoint, Element::F32, ALONE), cpu(&checkpoint));
    let prompt = music(&checkpoint, 40 * 128 + 77);
    cuda.prefill(&prompt).unwrap();
    cpu.prefill(&prompt).unwrap();
    plays_like(&mut cuda, &mut cpu, 1).unwrap();
}

#[test]
fn plans_ahead_are_those_that_come_and_change_nothing() {
    let checkpoint = tiny(5);
    let Some(machine) = machine(Schedule::default()) else { return };
    let mut cuda = cuda(&machine, &checkpoint, Element::F32, OVERLAPPED);
    cuda.prefill(&music(&checkpoint, 800)).unwrap();
    let (state, books) = (cuda.save().unwrap(), checkpoint.config.plan.n_codebooks);
    // More than a launch has room for.
    let ways: Vec<Vec<f32>> = (0..10).map(|way| uniforms(way, Kind::Plan, 0, 3 * books)).collect();
    let ahead = cuda.plan_ahead(&ways).unwrap();
    assert!(cuda.save().unwrap() == state && ahead.len() == ways.len());
    for way in [0, 1, 9] {
        let (draws, ahead) = (&ways[way], &ahead[way]);
        let plan = draws.chunks(books).map(|uniforms| {
            let mut frame = PlanFrame::default();
            cuda.next_plan(uniforms, &mut frame).unwrap();
            frame
        });
        assert!(plan.collect::<Vec<_>>() == *ahead, "way {way}");
        cuda.restore(&state).unwrap();
    }
}

#[test]
fn states_go_to_other_engines_and_back() {
    let checkpoint = tiny(4);
    let Some(machine) = machine(Schedule::default()) else { return };
    let (mut cuda, mut cpu) = (cuda(&machine, &checkpoint, Element::F32, OVERLAPPED), cpu(&checkpoint));
    cuda.prefill(&music(&checkpoint, 1000)).unwrap();
    play(&mut cuda, 0).unwrap();
    let state = cuda.save().unwrap();
    let expected = play(&mut cuda, 1).unwrap();
    cuda.restore(&state).unwrap();
    assert!(cuda.save().unwrap() == state, "a state is not what it was");
    let here = cuda.snapshot().unwrap();
    assert!(play(&mut cuda, 1).unwrap() == expected, "back in time");
    cuda.rewind(&here).unwrap();
    assert!(cuda.save().unwrap() == state, "a state that was kept in memory is not what it was");
    cpu.restore(&state).unwrap();
    cuda.restore(&state).unwrap();
    plays_like(&mut cuda, &mut cpu, 2).unwrap();
    assert!(cuda.restore(&state[..state.len() / 2]).is_err());
}

/// Every tier as in the preset `base`, for whose sizes the kernel is compiled, but shorter.
fn base_sized() -> Checkpoint {
    let mut config = framed(64);
    let tiers = ModelConfig::preset("base").unwrap().wave_transformer.tiers;
    let short = |tier: TierConfig| TierConfig { n_layers: 1, window: tier.window / 2 + 5, ..tier };
    config.wave_transformer.tiers = tiers.into_iter().map(short).collect();
    config.plan.window = 512;
    config.validate().unwrap();
    lively(config, 9)
}

#[test]
fn many_streams_play_what_they_play_alone() {
    let many = DecodeGeometry { rows: SET, ..ALONE };
    for (n, geometry) in [
        (3, many),
        (11, DecodeGeometry { groups: 2, threads: 96, ..many }),
        (17, DecodeGeometry { overlapped: true, groups: 2, group_size: 2, ..many }),
    ] {
        for element in [Element::F32, Element::Bf16] {
            assert_plays_as_alone(&tiny(3), element, n, geometry);
        }
    }
    for element in [Element::F32, Element::Bf16] {
        assert_plays_as_alone(&base_sized(), element, SET, DecodeGeometry { threads: 256, ..many });
    }
}

fn assert_plays_as_alone(checkpoint: &Checkpoint, element: Element, n: usize, geometry: DecodeGeometry) {
    let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
    let Some(machine) = machine(Schedule::seeded(n as u64)) else { return };
    let model = Arc::new(Model::new(machine, checkpoint, element).unwrap());
    let mut streams = Streams::new(model.clone(), n, geometry).unwrap();
    let sampling = Sampling { plan: PlanSampling::default(), wave: checkpoint.generation };
    let mut alone = CudaEngine::over(model, ALONE).unwrap();
    let states: Vec<Vec<u8>> = (0..n.min(4))
        .map(|i| {
            alone.prefill(&music(checkpoint, 100 + 200 * i)).unwrap();
            alone.save().unwrap()
        })
        .collect();
    for stream in 0..n {
        alone.restore(&states[stream % states.len()]).unwrap();
        streams.load(stream, &alone.stream().unwrap()).unwrap();
    }
    let all = |kind, per_frame: usize| -> Vec<f32> {
        (0..n as u32).flat_map(|stream| uniforms(stream, kind, 0, 2 * per_frame)).collect()
    };
    let (plan, wave) = (all(Kind::Plan, books), all(Kind::Wave, UNIFORMS_PER_SAMPLE * hop));
    let played = streams.play(2, Plan::Draw(&plan), Wave::Draw(&wave), &sampling).unwrap();
    for stream in [0, n / 2, n - 1] {
        alone.restore(&states[stream % states.len()]).unwrap();
        let (_, tokens) =
            alone.play(2, &plan[stream * 2 * books..][..2 * books], &wave[stream * 4 * hop..][..4 * hop]).unwrap();
        let together = played.tokens[stream * 2 * hop..][..2 * hop].iter().map(|&token| token as Token);
        assert!(together.eq(tokens), "stream {stream} of {n}, {element:?}, {geometry:?}");
    }
}

/// Those whose turn it is play what all would, and the others stay where they are.
#[test]
fn streams_whose_turn_it_is_play_what_they_play_alone() {
    let checkpoint = tiny(11);
    let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
    for geometry in [ALONE, OVERLAPPED, DecodeGeometry { rows: SET, ..ALONE }] {
        let Some(machine) = machine(Schedule::seeded(1)) else { return };
        let model = Arc::new(Model::new(machine, &checkpoint, Element::Bf16).unwrap());
        let mut streams = Streams::new(model.clone(), 10, geometry).unwrap();
        let mut alone: Vec<_> = (0..10).map(|_| Streams::new(model.clone(), 1, ALONE).unwrap()).collect();
        let sampling = Sampling { plan: PlanSampling::default(), wave: checkpoint.generation };
        for (turn, who) in [vec![7, 2, 9, 0], (0..10).rev().collect(), vec![9]].iter().enumerate() {
            let draws = |kind, n| who.iter().flat_map(|&s| uniforms(s as u32, kind, turn, n)).collect::<Vec<_>>();
            let (plan, wave) = (draws(Kind::Plan, books), draws(Kind::Wave, UNIFORMS_PER_SAMPLE * hop));
            let played = streams.play_some(who, 1, Plan::Draw(&plan), Wave::Draw(&wave), &sampling).unwrap();
            for (i, &stream) in who.iter().enumerate() {
                let (plan, wave) = (&plan[i * books..][..books], &wave[i * UNIFORMS_PER_SAMPLE * hop..]);
                let wave = Wave::Draw(&wave[..UNIFORMS_PER_SAMPLE * hop]);
                let expected = alone[stream].play(1, Plan::Draw(plan), wave, &sampling).unwrap();
                assert!(played.of(i, who.len()) == expected, "{geometry:?}, turn {turn}, stream {stream}");
            }
        }
        for (stream, alone) in alone.iter().enumerate() {
            let [state, expected] =
                [streams.store(stream), alone.store(0)].map(|state| state.unwrap().to_bytes().unwrap());
            assert!(state == expected, "{geometry:?}, stream {stream}");
        }
        for who in [vec![10], vec![3, 3]] {
            let refused =
                streams.play_some(&who, 1, Plan::Draw(&[0.5; 8][..who.len() * books]), Wave::Silent, &sampling);
            assert!(refused.is_err(), "{who:?}");
        }
    }
}

/// What a stream of its own plays: ways ahead now and then, a way back, and not all as long.
fn wander(engine: &mut CudaEngine<Place>, checkpoint: &Checkpoint, stream: u32) -> Vec<Token> {
    let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
    let sampling = PlanSampling { temperature: if stream == 0 { 0.8 } else { 1.0 }, ..PlanSampling::default() };
    engine.set_sampling(sampling, checkpoint.generation);
    engine.prefill(&music(checkpoint, 300 + 150 * stream as usize)).unwrap();
    let (mut played, mut plan, mut out) = (Vec::new(), PlanFrame::default(), vec![0; hop]);
    let mut frame = |engine: &mut CudaEngine<Place>, k: usize| {
        let (of_plan, of_wave) =
            (uniforms(stream, Kind::Plan, k, books), uniforms(stream, Kind::Wave, k, UNIFORMS_PER_SAMPLE * hop));
        engine.next_plan(&of_plan, &mut plan).unwrap();
        engine.render(&plan, &of_wave, &mut out).unwrap();
        assert!(engine.plan_draw().entropy > 0.0);
        out.clone()
    };
    let here = engine.snapshot().unwrap();
    for k in 0..2 + stream as usize {
        if k % 2 == 1 {
            let ways = [0, 1, 2].map(|way| uniforms(stream + 10 * way, Kind::Plan, k, 2 * books));
            let ahead = engine.plan_ahead(&ways).unwrap();
            played.extend(ahead.iter().flatten().flat_map(|frame| frame.tokens.clone()));
        }
        played.extend(frame(engine, k));
        if k == 1 && stream == 1 {
            engine.rewind(&here).unwrap();
        }
    }
    played
}

#[test]
fn engines_in_lockstep_play_what_they_play_alone_and_leave_when_they_like() {
    let checkpoint = tiny(12);
    let Some(machine) = machine(Schedule::seeded(2)) else { return };
    let mut alone = cuda(&machine, &checkpoint, Element::F32, OVERLAPPED);
    let launches = || machine.launches();
    let before = launches();
    let expected = [0, 1, 2].map(|stream| wander(&mut alone, &checkpoint, stream));
    let apart = launches().zip(before).map(|(now, before)| now - before);
    for geometry in [ALONE, DecodeGeometry { rows: SET, overlapped: true, ..ALONE }] {
        let before = launches();
        let engines = alone.fork_in_lockstep_by(3, geometry).unwrap();
        let played: Vec<_> = std::thread::scope(|scope| {
            let play = |(stream, mut engine): (usize, CudaEngine<Place>)| {
                let checkpoint = &checkpoint;
                scope.spawn(move || wander(&mut engine, checkpoint, stream as u32))
            };
            let threads: Vec<_> = engines.into_iter().enumerate().map(play).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (stream, (played, expected)) in played.iter().zip(&expected).enumerate() {
            assert!(played == expected, "{geometry:?}, stream {stream}");
        }
        let together = launches().zip(before).map(|(now, before)| now - before);
        // Prompts are read by each, and not all have as much to play.
        assert!(together.zip(apart).is_none_or(|(together, apart)| 4 * together < 3 * apart), "{together:?} {apart:?}");
    }
    let other = cuda(&machine, &checkpoint, Element::F32, ALONE).snapshot().unwrap();
    assert!(alone.rewind(&other).is_err(), "a state of another model's");
}

/// Tensor cores are no part of the emulator: on a GPU every geometry plays the same bits, in either precision.
#[cfg(feature = "cuda")]
#[test]
fn the_built_in_model_plays_the_same_however_the_work_is_shared() {
    if !crate::gpu::is_there() {
        return;
    }
    const N: usize = 11;
    let checkpoint = Checkpoint::built_in().unwrap();
    let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
    let machine = machine(Schedule::default()).unwrap();
    let frames = 4;
    let all = |kind, per_frame: usize| -> Vec<f32> {
        (0..N as u32).flat_map(|stream| uniforms(stream, kind, 0, frames * per_frame)).collect()
    };
    let (plan, wave) = (all(Kind::Plan, books), all(Kind::Wave, UNIFORMS_PER_SAMPLE * hop));
    let sampling = Sampling { plan: PlanSampling::default(), wave: checkpoint.generation };
    let one = DecodeGeometry { threads: 256, ..ALONE };
    let mut wrong = Vec::new();
    for element in [Element::F32, Element::Bf16] {
        let model = Arc::new(Model::new(machine.clone(), &checkpoint, element).unwrap());
        let play = |geometry| {
            let mut streams = Streams::new(model.clone(), N, geometry).unwrap();
            streams.play(frames, Plan::Draw(&plan), Wave::Draw(&wave), &sampling).unwrap()
        };
        let expected = play(one);
        let groups = [1, 2, 4, 8].map(|group_size| DecodeGeometry { group_size, overlapped: true, ..one });
        let together = [(false, 1), (true, 1), (true, 4)].map(|(overlapped, group_size)| DecodeGeometry {
            rows: SET,
            overlapped,
            group_size,
            ..one
        });
        for geometry in [one].into_iter().chain(groups).chain(together) {
            let played = play(geometry);
            let first = played.tokens.iter().zip(&expected.tokens).position(|(a, b)| a != b);
            let plans = played.plan_tokens.iter().zip(&expected.plan_tokens).position(|(a, b)| a != b);
            let bands = played.bands.iter().zip(&expected.bands).position(|(a, b)| a != b);
            if (first, plans, bands) != (None, None, None) {
                wrong.push(format!("{element:?} {geometry:?}: sample {first:?}, plan {plans:?}, band {bands:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn presets_fit_into_shared_memory_alone_and_together() {
    let Some(machine) = machine(Schedule::default()) else { return };
    for preset in ["tiny", "small", "base"] {
        let checkpoint = Checkpoint::untrained(ModelConfig::preset(preset).unwrap(), 1).unwrap();
        let model = Arc::new(Model::new(machine.clone(), &checkpoint, Element::F32).unwrap());
        for n in [1, 8, 4096] {
            let geometry = model.geometry(n);
            let error = Streams::new(model.clone(), n.min(SET), geometry).err();
            assert!(error.is_none(), "{preset}, {n} streams, {geometry:?}: {error:?}");
        }
    }
}

#[test]
fn any_number_of_streams_fits_any_gpu() {
    let hopper = DecodeLimits::default();
    let pcie = DecodeLimits { multiprocessors: 114, ..hopper };
    let a100 = DecodeLimits { multiprocessors: 108, shared_bytes: 166_912, clusters: false };
    let consumer = DecodeLimits { multiprocessors: 82, shared_bytes: 101_376, clusters: false };
    for limits in [hopper, pcie, a100, consumer] {
        let Some(machine) = emulated(Schedule::default()).and_then(Arc::into_inner) else { return };
        let machine = Arc::new(Emulated { limits, ..machine });
        let model = Arc::new(Model::new(machine, &Checkpoint::built_in().unwrap(), Element::Bf16).unwrap());
        for n in (1..=150).chain([512, 1056, 4096]) {
            let geometry = model.geometry(n);
            let of_a_set = if geometry.overlapped { 3 } else { 1 };
            let groups = of_a_set * geometry.groups;
            assert!(groups <= limits.groups_at_once(geometry.group_size), "{n} streams, {limits:?}: {geometry:?}");
            if [1, 8, 81, 512].contains(&n) {
                let error = Streams::new(model.clone(), 1, geometry).err();
                assert!(error.is_none(), "{n} streams, {limits:?}, {geometry:?}: {error:?}");
            }
        }
    }
}

#[test]
fn half_precision_weights_cost_little() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let Some(machine) = machine(Schedule::default()) else { return };
    let tokens = music(&checkpoint, 2 * checkpoint.config.plan.hop);
    let nats = |element| {
        let mut engine = cuda(&machine, &checkpoint, element, DecodeGeometry { threads: 256, ..ALONE });
        let mut nll = vec![0.0; tokens.len()];
        engine.score(&tokens, &mut nll).unwrap();
        nll
    };
    let (exact, rounded) = (nats(Element::F32), nats(Element::Bf16));
    let mean = exact.iter().zip(&rounded).map(|(a, b)| b - a).sum::<f32>() / tokens.len() as f32;
    assert!(exact != rounded && mean.abs() < 0.01 && worst(&exact, &rounded) < 0.5, "{mean}");
}

/// A model in which every loop runs more than once, with little of everything.
fn small() -> Checkpoint {
    let tier = |hop, dim, n_layers, n_heads, window| TierConfig { hop, dim, n_layers, n_heads, window };
    let mut config = framed(64);
    config.plan.window = 512;
    config.wave_transformer.tiers = vec![tier(16, 40, 1, 2, 70), tier(1, 24, 2, 2, 40)];
    config.plan_transformer.window = 3;
    config.forecast.past_window = 512;
    config.forecast.past_hop = 32;
    config.forecast.order = 40;
    config.wave_transformer.shortcut_dim = 40;
    config.validate().unwrap();
    lively(config, 8)
}

/// Frames of two or three streams, and the states that they leave.
fn outcome(machine: &Arc<Emulated>, checkpoint: &Checkpoint, geometry: DecodeGeometry) -> Result<Vec<Vec<u8>>, String> {
    let text = |e: &dyn std::fmt::Debug| format!("{e:?}");
    let (hop, books) = (checkpoint.config.plan.hop, checkpoint.config.plan.n_codebooks);
    let model = Arc::new(Model::new(machine.clone(), checkpoint, Element::F32).map_err(|e| text(&e))?);
    let n = if geometry.rows == 1 { 2 } else { SET };
    let mut streams = Streams::new(model, n, geometry).map_err(|e| text(&e))?;
    let sampling = Sampling { plan: PlanSampling::default(), wave: checkpoint.generation };
    let all = |kind, per_frame: usize| -> Vec<f32> {
        (0..n as u32).flat_map(|stream| uniforms(stream, kind, 0, 4 * per_frame)).collect()
    };
    let (plan, wave) = (all(Kind::Plan, books), all(Kind::Wave, UNIFORMS_PER_SAMPLE * hop));
    let played = streams.play(4, Plan::Draw(&plan), Wave::Draw(&wave), &sampling).map_err(|e| text(&e))?;
    let tokens = played.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    // What was played is priced as it was when it was drawn.
    let read = Plan::Read(&played.plan_tokens);
    let prices = streams.play(4, read, Wave::Silent, &sampling).map_err(|e| text(&e))?.plan_draws;
    let prices = played.plan_draws.iter().chain(&prices);
    let prices = prices.flat_map(|draw| [draw.surprisal, draw.entropy]).flat_map(f32::to_le_bytes).collect();
    let state = |stream| streams.store(stream).and_then(|state| state.to_bytes()).map_err(|e| text(&e));
    [Ok(tokens), Ok(prices)].into_iter().chain((0..n).map(state)).collect()
}

#[test]
fn a_barrier_or_a_flag_that_is_left_out_is_noticed() {
    let checkpoint = small();
    let Some(machine) = emulated(Schedule::default()) else { return };
    let geometries = [DIVIDED, ALONE, DecodeGeometry { rows: SET, ..ALONE }];
    let expected = geometries.map(|geometry| outcome(&machine, &checkpoint, geometry).unwrap());
    let passes = |left_out, geometry: usize, seed| {
        *machine.schedule.lock().unwrap() = Schedule { left_out, ..Schedule::seeded(seed) };
        outcome(&machine, &checkpoint, geometries[geometry]).is_ok_and(|got| got == expected[geometry])
    };
    let always = |left_out| (1..12).all(|seed| (0..3).all(|geometry| passes(left_out, geometry, seed)));
    assert!(always(0), "the schedule changes the result");
    let missed: Vec<String> =
        machine.emulator.barriers().into_iter().filter(|&left_out| always(left_out)).map(named).collect();
    assert!(missed.is_empty(), "nobody misses {missed:?}");
}

#[test]
fn too_little_shared_memory_is_noticed() {
    let checkpoint = tiny(3);
    let Some(machine) = emulated(Schedule { short_by: 64, ..Schedule::default() }) else { return };
    for geometry in [ALONE, DIVIDED] {
        let error = outcome(&machine, &checkpoint, geometry).unwrap_err();
        assert!(error.contains("shared memory"), "{error}");
    }
}

#[test]
fn heads_that_no_kernel_holds_are_refused() {
    let mut config = framed(128);
    let tier = config.wave_transformer.tiers.last_mut().unwrap();
    (tier.dim, tier.n_heads) = (136, 1);
    let Some(machine) = machine(Schedule::default()) else { return };
    let refused = Model::new(machine, &lively(config, 3), Element::Bf16).err().unwrap().to_string();
    assert!(refused.contains("heads of 136 values") && refused.contains("at most 128"), "{refused}");
}
