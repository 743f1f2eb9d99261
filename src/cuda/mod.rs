//! NVIDIA GPUs: the launches of the kernels in kernels/ as plain data and, with the feature `cuda`, what runs them: tensor
//! operations with gradients and forecasts for training, and the machine that the CUDA engine plays on.
//!
//! A program built with the feature starts on machines without CUDA: `device` then says why there is none. Never run on a GPU
//! yet; the kernels themselves are tested in an emulator (tests/kernels.rs, tests/decode.rs).

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod attention;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod forecast;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod kernels;
pub mod launch;

#[cfg(feature = "cuda")]
pub use attention::attention_window;
#[cfg(feature = "cuda")]
pub use forecast::GpuForecaster;
#[cfg(feature = "cuda")]
pub use gpu::{Gpu, NoDevice, device};
