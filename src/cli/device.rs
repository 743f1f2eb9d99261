//! Turns the choice of what trains into a device for tensors.

#[cfg(feature = "cuda")]
use anyhow::Context;
use anyhow::Result;
use candle_core::Device;

#[cfg(not(feature = "cuda"))]
use super::common::Usage;

/// What trains.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceKind {
    Cpu,
    /// An NVIDIA GPU, under mpirun or srun each process its own; --threads then draw excerpts for it
    Cuda,
}

impl DeviceKind {
    /// As benches name it.
    pub fn name(self, bf16: bool) -> &'static str {
        match (self, bf16) {
            (Self::Cpu, _) => "cpu",
            (Self::Cuda, false) => "cuda, TF32",
            (Self::Cuda, true) => "cuda, bf16",
        }
    }

    /// # Errors
    /// Where there is no GPU, or this program was not built for one.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda => wavegen::cuda::training_device(wavegen::train::group::local_rank())
                .context("--device cuda; without it the CPU trains"),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err(Usage("--device cuda: this program was built without the feature `cuda`".into()).into()),
        }
    }
}
