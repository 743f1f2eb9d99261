//! NVIDIA GPUs: the launches of the kernels in kernels/ as plain data and, with the feature `cuda`, what runs them: tensor
//! operations with gradients and forecasts for training, and the machine that the CUDA engine plays on.
//!
//! A program built with the feature starts on machines without CUDA: `device` then says why there is none. The kernels are tested
//! in an emulator and, where there is one, on a GPU (tests/kernels.rs).

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod attention;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod forecast;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod gpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod kernels;
pub mod launch;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod memory;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod ops;

#[cfg(feature = "cuda")]
pub use attention::attention_window;
#[cfg(feature = "cuda")]
pub use forecast::GpuForecaster;
#[cfg(feature = "cuda")]
pub use gpu::{Gpu, NoDevice, device, training_device};
#[cfg(feature = "nccl")]
pub(crate) use nccl::{Nccl, invitation};
#[cfg(feature = "cuda")]
pub(crate) use ops::{OPS, OPS_BF16, adamw};
