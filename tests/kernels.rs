//! The CUDA kernels against plain oracles in f64: in the emulator of kernels/emulator, or on a GPU where there is one.

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/decode.rs"]
mod decode;
#[path = "kernels/emulator.rs"]
mod emulator;
#[path = "kernels/forecast.rs"]
mod forecast;
#[cfg(feature = "cuda")]
#[path = "kernels/gpu.rs"]
mod gpu;
#[path = "kernels/training.rs"]
mod training;

use wavegen::cuda::launch;
