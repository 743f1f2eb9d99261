//! Turns an audio file into samples at a corpus' rate and level, and into what is to be known of them.

use serde::{Deserialize, Serialize};

use super::CorpusError;
use super::sound::{Sound, levels};
use crate::audio::{AudioError, AudioSource, Decoder, StreamResampler, level};

/// This near to full scale for [`CLIPPED_RUN`] samples a recording was cut off.
const FULL_SCALE: f32 = 0.999;
const CLIPPED_RUN: usize = 3;

/// What a manifest says of a piece besides where it lies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The file that it was read from.
    pub source: String,
    /// Of the source: seconds, frames per second, channels.
    pub duration_s: f64,
    pub rate: u32,
    pub channels: usize,
    /// What the mean of its channels was multiplied with.
    pub gain: f32,
    /// BLAKE3 of the samples as stored, in hexadecimal.
    pub hash: String,
    /// What its decoder stumbled over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    #[serde(flatten)]
    pub sound: Sound,
}

/// Why a file makes no piece.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// For people: it names the file.
    pub why: String,
    /// Whether it always would be: the system may let it be read another time.
    pub lasts: bool,
}

impl From<AudioError> for Refusal {
    fn from(e: AudioError) -> Self {
        Self { why: e.to_string(), lasts: !matches!(e, AudioError::Io { .. }) }
    }
}

/// Decodes, mixes down, resamples and levels a whole file: samples * 32767, rounded, and its facts.
///
/// # Errors
/// Not audio, damaged from its beginning, shorter than `least_s`, silent.
pub fn read(source: &AudioSource, sample_rate: u32, least_s: f64) -> Result<(Vec<i16>, Facts), Refusal> {
    let refused = |why: &str| Refusal { why: format!("{}: {why}", source.name()), lasts: true };
    let mut decoder = Decoder::from_source(source)?;
    let (rate, channels) = (decoder.spec().sample_rate, decoder.spec().channels);
    let mut resampler = StreamResampler::new(rate, sample_rate)?;
    let mut clipping = Clipping { runs: vec![0; channels], clipped: 0 };
    let (mut mono, mut mixed) = (Vec::new(), Vec::new());
    while let Some(block) = decoder.next_block()? {
        clipping.hear(block);
        mixed.clear();
        let scale = 1.0 / channels as f32;
        mixed.extend(block.chunks_exact(channels).map(|frame| frame.iter().sum::<f32>() * scale));
        resampler.push(&mixed, &mut mono)?;
    }
    resampler.finish(&mut mono)?;
    if (mono.len() as f64) < least_s * f64::from(sample_rate) {
        return Err(refused(&format!("shorter than {least_s} s")));
    }
    let Some(gain) = level::gain(&mono) else {
        return Err(refused("silent"));
    };
    let samples: Vec<i16> = mono.iter().map(|x| (x * gain * 32767.0).round().clamp(-32768.0, 32767.0) as i16).collect();
    drop(mono);
    let mut warnings = decoder.warnings().to_vec();
    if decoder.damaged_packets() > 0 {
        warnings.push(format!("{} damaged packets were skipped", decoder.damaged_packets()));
    }
    let facts = Facts {
        source: source.name().to_owned(),
        duration_s: decoder.n_frames() as f64 / f64::from(rate),
        rate,
        channels,
        gain,
        hash: hash(&samples),
        warnings,
        sound: Sound {
            levels: levels(&samples, sample_rate),
            clipped: clipping.clipped,
            heard: decoder.n_frames() * channels as u64,
        },
    };
    Ok((samples, facts))
}

/// BLAKE3 of samples as they are stored, in hexadecimal.
pub fn hash(samples: &[i16]) -> String {
    const AT_ONCE: usize = 1 << 16;
    let mut hasher = blake3::Hasher::new();
    for some in samples.chunks(AT_ONCE) {
        hasher.update(&to_bytes(some));
    }
    hasher.finalize().to_hex().to_string()
}

/// BLAKE3 of a file's bytes, in hexadecimal.
pub(super) fn content_hash(path: &std::path::Path) -> Result<String, CorpusError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = std::fs::File::open(path).map_err(CorpusError::io(path))?;
    std::io::copy(&mut file, &mut hasher).map_err(CorpusError::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Samples as they are stored.
pub(super) fn to_bytes(samples: &[i16]) -> Vec<u8> {
    samples.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Counts samples in runs at full scale, channel by channel.
struct Clipping {
    /// Length of the run that each channel is in.
    runs: Vec<usize>,
    clipped: u64,
}

impl Clipping {
    /// Interleaved samples.
    fn hear(&mut self, block: &[f32]) {
        for frame in block.chunks_exact(self.runs.len()) {
            for (run, x) in self.runs.iter_mut().zip(frame) {
                *run = if x.abs() >= FULL_SCALE { *run + 1 } else { 0 };
                self.clipped += match *run {
                    CLIPPED_RUN => CLIPPED_RUN as u64,
                    n if n > CLIPPED_RUN => 1,
                    _ => 0,
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_at_full_scale_are_clipping_and_single_peaks_are_not() {
        let mut clipping = Clipping { runs: vec![0; 2], clipped: 0 };
        let left = [1.0, 0.2, 1.0, 1.0, -1.0, -1.0, 0.0, 1.0, 1.0];
        let right = [0.0f32; 9];
        let block: Vec<f32> = left.iter().zip(right).flat_map(|(&l, r)| [l, r]).collect();
        clipping.hear(&block[..8]);
        clipping.hear(&block[8..]);
        assert_eq!(clipping.clipped, 4);
    }
}
