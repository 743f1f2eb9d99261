//! Audio in and out: files to samples, one sample rate to another, samples to WAV.
//!
//! | module | turns | into |
//! |---|---|---|
//! | [`source`] | a path or `-` (standard input) | a seekable file with a name for messages |
//! | [`decode`] | any file symphonia reads | interleaved f32 blocks, a [`Clip`], or its [`decode::Tail`] |
//! | `container` | bytes | symphonia's demuxer and decoder |
//! | [`trim`] | encoder delay and padding, edit lists | the ranges of decoded frames to keep |
//! | [`mod@resample`] | mono samples at one rate | mono samples at another, delay compensated |
//! | [`speed`] | mono samples | the same faster or slower, pitch and all |
//! | [`level`] | samples | the gain to the level that models know |
//! | [`wav`] | a WAV header | format and the exact range of its data bytes |
//! | [`wav_writer`] | prompt bytes and f32 samples | a WAV file or stream |
//!
//! Nothing here knows about tokens, models or the command line.

mod container;
pub mod decode;
pub mod level;
pub mod resample;
pub mod source;
pub mod speed;
pub mod trim;
pub mod wav;
pub mod wav_writer;

use std::io;

use serde::{Deserialize, Serialize};

pub use decode::{Decoder, Tail, decode_file, decode_tail};
pub use resample::{ResamplerState, StreamResampler, resample};
pub use source::AudioSource;
pub use wav::{SampleFormat, WavFormat, WavPrompt};
pub use wav_writer::WavWriter;

/// Audio held in memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Clip {
    /// Interleaved samples, nominally in [-1, 1]: `[n_frames, channels]`.
    pub samples: Vec<f32>,
    /// Samples per frame, at least 1.
    pub channels: usize,
    /// Frames per second, Hz.
    pub sample_rate: u32,
}

impl Clip {
    /// Number of frames (one sample per channel each).
    pub fn n_frames(&self) -> usize {
        self.samples.len() / self.channels
    }

    /// Length in seconds.
    pub fn duration_s(&self) -> f64 {
        self.n_frames() as f64 / f64::from(self.sample_rate)
    }

    /// The mean of the channels: `[n_frames]`.
    pub fn downmix(&self) -> Vec<f32> {
        if self.channels == 1 {
            return self.samples.clone();
        }
        let scale = 1.0 / self.channels as f32;
        self.samples.chunks_exact(self.channels).map(|frame| frame.iter().sum::<f32>() * scale).collect()
    }
}

/// What can go wrong between a file and samples; every message names the file and the way out.
#[derive(Debug, thiserror::Error)]
pub enum AudioError {
    /// The operating system refused to open, read or write.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory was given where a file is needed.
    #[error("{path}: is a directory; give the name of a file")]
    Directory {
        /// The directory.
        path: String,
    },
    /// No container or codec recognised the bytes.
    #[error(
        "{path}: not a readable audio file ({reason}); if it is audio, convert it to WAV or FLAC first (ffmpeg -i INPUT output.wav)"
    )]
    NotAudio {
        /// The file.
        path: String,
        /// What the demuxer said.
        reason: String,
    },
    /// A rate or a number of channels that is none of music's.
    #[error("{path}: has {reason}; convert it (ffmpeg -i INPUT -ar 44100 -ac 2 output.wav), or repair its header")]
    Shape {
        /// The file.
        path: String,
        /// What it has, and what can be read.
        reason: String,
    },
    /// A container without an audio track.
    #[error(
        "{path}: has no audio track that can be read; extract the audio to WAV or FLAC first (ffmpeg -i INPUT output.wav)"
    )]
    NoAudioTrack {
        /// The file.
        path: String,
    },
    /// An audio track whose codec has no decoder.
    #[error("{path}: cannot decode {codec} audio; convert it to WAV or FLAC first (ffmpeg -i INPUT output.wav)")]
    UnsupportedCodec {
        /// The file.
        path: String,
        /// The codec's name.
        codec: String,
    },
    /// The file ends before the moment that was asked for.
    #[error("{path}: is {has_s:.2} s long and has nothing at {end_s:.2} s; give a moment before its end")]
    Shorter {
        /// The file.
        path: String,
        /// What it has, seconds.
        has_s: f64,
        /// The moment, seconds.
        end_s: f64,
    },
    /// Nothing in the file decodes to samples.
    #[error("{path}: contains no audio samples{detail}; give a file with at least one sample")]
    NoSamples {
        /// The file.
        path: String,
        /// Why, if known, with a leading space.
        detail: String,
    },
    /// A NaN or an infinity in floating-point samples.
    #[error("{path}: sample at frame {frame} is {value}, not a finite number; repair or re-export the file")]
    NotFinite {
        /// The file.
        path: String,
        /// Frame index from the start of the audio.
        frame: u64,
        /// The offending value.
        value: f32,
    },
    /// A sample rate that no resampler setting covers.
    #[error("sample rate {rate} Hz is outside {lowest} to {highest} Hz; check the file's header")]
    SampleRate {
        /// The rate, Hz.
        rate: u32,
        /// Lowest rate, Hz.
        lowest: u32,
        /// Highest rate, Hz.
        highest: u32,
    },
    /// The resampler's own refusal.
    #[error("resampling failed: {0}")]
    Resample(String),
    /// The output cannot be begun.
    #[error("{path}: cannot be written ({reason}); give a file in a folder that exists and may be written to")]
    Unwritable {
        /// The output file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// The output's name promises another format.
    #[error(
        "{path}: audio is written as WAV, not as {extension}; give a name that ends in .wav, and convert that (ffmpeg -i NAME.wav {path})"
    )]
    OtherFormat {
        /// The output file.
        path: String,
        /// The end of its name.
        extension: String,
    },
    /// The output exists.
    #[error("{path}: already exists; use --force to overwrite it, or give another name")]
    Exists {
        /// The output file.
        path: String,
    },
}

/// The module's result.
pub type Result<T> = std::result::Result<T, AudioError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downmix_is_the_mean_of_the_channels() {
        let clip = Clip { samples: vec![1.0, 0.0, -0.5, 0.5, 0.25, 0.75], channels: 2, sample_rate: 8000 };
        assert_eq!(clip.n_frames(), 3);
        assert_eq!(clip.downmix(), [0.5, 0.0, 0.5]);
        assert!((clip.duration_s() - 3.0 / 8000.0).abs() < 1e-12);
    }
}
