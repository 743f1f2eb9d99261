//! wavegen: raw-audio waveform generation. A recording goes in, and it plays on.
//!
//! ```text
//! file --audio::decode--> samples --audio::resample--> samples at the model's rate --codec--> tokens, one a timestep
//! tokens --plan::Spectrum--> plan frames, one per 32 ms --plan::ResidualQuantizer--> plan tokens
//! plan tokens (past) --model::plan_transformer--> the next plan frame, sampled
//! tokens (past) + plan frame --forecast--> two linear forecasts
//!     --model::wave_transformer--> distribution of the next token --sampler--> token
//! tokens --codec--> samples --audio::resample--> sink (WAV file, pipe) or live (speakers)
//! train: recordings --corpus--> checkpoint    continue: prompt --> engine <-- checkpoint
//! ```
//!
//! | module | what it turns into what |
//! |---|---|
//! | [`audio`] | files into samples and samples into files; rates and levels |
//! | [`codec`] | samples into tokens and back |
//! | [`plan`] | samples into plan frames and plan tokens, and back |
//! | [`forecast`] | past samples, or a plan frame, into a linear forecast of the next sample |
//! | [`rng`] | seeds into uniforms |
//! | [`sampler`] | distribution, uniforms and settings into a token |
//! | [`model`] | the two transformers, in candle |
//! | [`checkpoint`] | a safetensors file into a model and back |
//! | [`engine`] | a prompt and uniforms into plan frames and tokens |
//! | [`simd`] | the inner loops, for the machine's instruction set |
//! | [`generate`] | a recording into its continuation: the loop, the prompt, the seam, treble and width, sessions |
//! | [`sink`] | where samples go: WAV file, pipe |
//! | [`live`] | an engine into endless sound on a device, steered while it plays; what a device hears into a clip |
//! | [`corpus`] | folders of recordings into samples at one rate and level, and a manifest |
//! | [`train`] | recordings, or a corpus, into a checkpoint |
//! | [`cuda`] | launches of the kernels in kernels/; with the feature `cuda`, tensors into tensors on a GPU |
//! | [`atomic`] | bytes into a file that is there when it is whole |
//! | [`plot`] | figures and plans into pictures |
//! | [`metrics`], [`baselines`] | samples and plans into figures; what a model must beat |
//!
//! What does not happen: the engines know nothing of audio files. Training and engines meet only through a checkpoint
//! (calibration, training's last step, listens to an engine). The codec knows nothing of models. Nothing in the
//! library prints, and nothing imports the command line.
//!
//! # Example
//!
//! Tokens of a sine, and back:
//!
//! ```
//! let codec = wavegen::codec::Codec::default();
//! let samples: Vec<f32> = (0..1600).map(|i| 0.5 * (i as f32 * 0.17).sin()).collect();
//! let back = codec.decode_all(&codec.encode_all(&samples));
//! assert!(samples.iter().zip(&back).all(|(a, b)| (a - b).abs() <= codec.bin_width(a.abs().max(b.abs()))));
//! ```
#![deny(unsafe_code)]
#![deny(unsafe_op_in_unsafe_fn)]

pub(crate) mod ahead;
pub mod atomic;
pub mod audio;
pub mod baselines;
pub mod checkpoint;
pub(crate) mod cholesky;
pub mod codec;
pub mod corpus;
pub mod cuda;
pub(crate) mod dot;
pub mod engine;
pub mod forecast;
pub mod generate;
pub mod live;
pub mod metrics;
pub mod model;
pub mod plan;
pub mod plot;
pub mod rng;
pub mod sampler;
pub mod simd;
pub mod sink;
pub mod train;
