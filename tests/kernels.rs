//! The CUDA kernels against plain oracles in f64: in the emulator of kernels/emulator, or on a GPU where there is one.

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/emulator.rs"]
mod emulator;
#[path = "kernels/forecast.rs"]
mod forecast;
#[cfg(feature = "cuda")]
#[path = "kernels/gpu.rs"]
mod gpu;
// Without the feature the library has no module `cuda`; how kernels are launched is tested all the same.
#[cfg(not(feature = "cuda"))]
#[path = "../src/cuda/launch/mod.rs"]
mod launch;
#[path = "kernels/training.rs"]
mod training;
#[cfg(feature = "cuda")]
use wavegen::cuda::launch;
