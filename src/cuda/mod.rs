//! Training operations on an NVIDIA GPU: tensors in, tensors out, with gradients, by the kernels in kernels/.
//!
//! Only with the feature `cuda`. A program built with it starts on machines without CUDA: [`device`] then says why there is
//! none. Never run on a GPU yet; the kernels themselves are tested in an emulator (tests/kernels.rs).

#[allow(unsafe_code)]
mod attention;
#[allow(unsafe_code)]
pub mod kernels;
pub mod launch;

use candle_core::Device;

pub use attention::attention_window;

/// Why there is no GPU to compute on.
#[derive(Debug, thiserror::Error)]
#[error("no CUDA device: {reason}")]
pub struct NoDevice {
    reason: String,
}

/// The first GPU.
///
/// # Errors
/// Where there is none, no driver, or one too old.
pub fn device() -> Result<Device, NoDevice> {
    // A CUDA error carries a stack trace; its first line says it all.
    Device::new_cuda(0).map_err(|e| NoDevice { reason: e.to_string().lines().next().unwrap_or_default().to_string() })
}
