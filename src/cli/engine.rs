//! Turns the choice of an engine into streams of it.

#[cfg(feature = "cuda")]
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use wavegen::checkpoint::Checkpoint;
#[cfg(feature = "cuda")]
use wavegen::cuda::{Gpu, launch::Element};
use wavegen::engine::Engine;
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
#[cfg(feature = "cuda")]
use wavegen::engine::cuda::CudaEngine;
use wavegen::engine::reference::ReferenceEngine;
use wavegen::simd::{ISA_VARIABLE, Isa};

use super::common::{Talk, Usage};

/// What computes a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineKind {
    /// The fast one, its large matrices in 8-bit whole numbers
    Cpu,
    /// The same in 32-bit floats
    CpuF32,
    /// An NVIDIA GPU, if this program was built for one and there is one; else as `cpu`
    Cuda,
    /// candle, one step at a time: slow, and what the others are tested against
    Reference,
}

#[derive(Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// What computes the model
    #[arg(long, value_enum, default_value = "cpu")]
    pub engine: EngineKind,
    /// Most threads [default: one per core]; the result does not depend on it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// A loaded model of which any number of streams can be had.
pub enum Loaded<'a> {
    Cpu(Box<CpuEngine>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaEngine<Gpu>>),
    Reference(&'a Checkpoint),
}

impl EngineArgs {
    /// Prepares the model for the engine that was asked for.
    pub fn load<'a>(&self, checkpoint: &'a Checkpoint, talk: &Talk) -> Result<Loaded<'a>> {
        let precision = match self.engine {
            EngineKind::Cpu => Precision::Int8,
            EngineKind::CpuF32 => Precision::F32,
            EngineKind::Cuda => match gpu() {
                #[cfg(feature = "cuda")]
                Ok(gpu) => {
                    let engine =
                        CudaEngine::new(gpu, checkpoint, Element::Bf16).context("preparing the CUDA engine")?;
                    return Ok(Loaded::Cuda(Box::new(engine)));
                }
                #[cfg(not(feature = "cuda"))]
                Ok(never) => match never {},
                Err(e) if cuda_is_required() => return Err(e),
                Err(e) => {
                    talk.warn(&format!("{e:#}; playing on the CPU"));
                    Precision::Int8
                }
            },
            EngineKind::Reference => return Ok(Loaded::Reference(checkpoint)),
        };
        let options = CpuOptions { precision, ..CpuOptions::default() };
        Ok(Loaded::Cpu(Box::new(CpuEngine::new(checkpoint, &options).context("preparing the CPU engine")?)))
    }
}

impl Loaded<'_> {
    /// A stream at its beginning.
    pub fn stream(&self) -> Result<Box<dyn Engine>> {
        Ok(match self {
            Self::Cpu(engine) => Box::new(engine.fork()?),
            #[cfg(feature = "cuda")]
            Self::Cuda(engine) => Box::new(engine.fork()?),
            Self::Reference(checkpoint) => Box::new(ReferenceEngine::new(checkpoint)?),
        })
    }

    /// Streams to be driven at the same time, each from a thread of its own: as many of `wanted` as keep all cores busy, or as a GPU has room for.
    pub fn streams(&self, wanted: usize) -> Result<Vec<Box<dyn Engine>>> {
        let threads = rayon::current_num_threads().min(wanted);
        match self {
            Self::Reference(_) => (0..threads).map(|_| self.stream()).collect(),
            #[cfg(feature = "cuda")]
            Self::Cuda(engine) => {
                let streams = engine.fork_in_lockstep(wanted.min(engine.room()?.max(1)))?;
                Ok(streams.into_iter().map(|e| Box::new(e) as Box<dyn Engine>).collect())
            }
            Self::Cpu(engine) => {
                let n = wanted.min(threads * STREAMS_PER_THREAD);
                let mut streams: Vec<Box<dyn Engine>> = Vec::new();
                for thread in 0..threads {
                    let group = (thread + 1) * n / threads - thread * n / threads;
                    streams.extend(engine.fork_in_lockstep(group)?.into_iter().map(|e| Box::new(e) as Box<dyn Engine>));
                }
                Ok(streams)
            }
        }
    }
}

/// With the value 1, what would do without a GPU fails instead.
const REQUIRE_CUDA: &str = "WAVEGEN_REQUIRE_CUDA";

pub fn cuda_is_required() -> bool {
    std::env::var_os(REQUIRE_CUDA).is_some_and(|value| value == "1")
}

/// The GPU, or why there is none.
#[cfg(feature = "cuda")]
pub fn gpu() -> Result<Arc<Gpu>> {
    Ok(Arc::new(Gpu::new()?))
}

/// The GPU, or why there is none.
#[cfg(not(feature = "cuda"))]
pub fn gpu() -> Result<std::convert::Infallible> {
    anyhow::bail!("this program was built without the feature `cuda`")
}

/// Streams that a thread renders in lockstep: more than these gain nothing.
const STREAMS_PER_THREAD: usize = 8;

/// Refuses a `WAVEGEN_ISA` that this machine cannot follow; the library would ignore it.
pub fn check_isa_variable() -> Result<()> {
    let Some(value) = std::env::var_os(ISA_VARIABLE) else { return Ok(()) };
    let available = Isa::available();
    if value.to_str().and_then(Isa::from_name).is_some_and(|isa| available.contains(&isa)) {
        return Ok(());
    }
    let names: Vec<&str> = available.into_iter().map(Isa::name).collect();
    let value = value.to_string_lossy();
    Err(Usage(format!("{ISA_VARIABLE}={value}: this machine has the instruction sets {}", names.join(", "))).into())
}
