//! The CUDA kernels against plain oracles in f64, in the emulator of kernels/emulator: no GPU needed.

#[path = "kernels/attention.rs"]
mod attention;
#[path = "kernels/emulator.rs"]
mod emulator;
#[path = "kernels/forecast.rs"]
mod forecast;
#[path = "../src/cuda/launch/mod.rs"]
mod launch;
#[path = "kernels/training.rs"]
mod training;
