//! wavegen: raw-audio waveform generation. A recording goes in, and it plays on.
#![deny(unsafe_code)]

pub mod audio;
pub mod baselines;
pub mod checkpoint;
pub mod codec;
pub(crate) mod dot;
pub mod engine;
pub mod forecast;
pub mod generate;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod rng;
pub mod sampler;
pub mod sink;
pub mod train;
