//! Turns the end of a recording into the tokens that an engine reads, and keeps what the way back needs.

use crate::audio::{Clip, level};
use crate::codec::{Codec, Token};
use crate::metrics::rms;

use super::GenerateError;
use super::extrapolate::resample_end;

/// Seconds at the end of a recording that a model gets to hear.
pub const CONTEXT_S: f64 = 40.0;

/// Largest gain to the model's level; softer contexts stay below it.
const MOST_GAIN: f32 = 100.0;
/// No sample is so loud, however a recording is scaled.
const MOST: f32 = 1e6;
/// A context below this root mean square is silence and has no level.
const SILENT_RMS: f32 = 1e-5;
/// A downmix this much softer than the loudest channel has cancelled itself.
const CANCELLED: f32 = 0.1;
/// A constant offset below this share of a channel's root mean square is not heard where it ends; and in less than these seconds it
/// may be a low note.
const SMALL_OFFSET: f32 = 0.02;
const OFFSET_S: f64 = 1.0;
/// A channel is at most this much louder than the downmix.
const MOST_CHANNEL_GAIN: f32 = 4.0;

/// The end of a recording, ready to be played on.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The end at its own rate and channels, without its offsets; starts on a frame that is a whole number of model samples from the file's.
    pub(super) tail: Clip,
    /// The same end as the model hears it, not scaled: mono at the model's rate, on the grid of the whole file.
    pub(super) mono: Vec<f32>,
    /// What is constant in each channel (converters leave it): no model hears it, and it goes on.
    pub(super) offsets: Vec<f32>,
    /// Factor from the recording's level to the model's.
    pub(super) gain: f32,
    /// Factor from the downmix to each channel.
    pub(super) channel_gains: Vec<f32>,
    pub(super) model_rate: u32,
    tokens: Vec<Token>,
}

impl Prompt {
    /// From the end of a recording of `total_frames` frames. Model sample i lies at time `i / codec.sample_rate` of the whole.
    ///
    /// # Errors
    /// No samples, samples that are not finite, or a rate that cannot be resampled.
    pub fn new(end: &Clip, total_frames: u64, codec: &Codec) -> Result<Self, GenerateError> {
        let Clip { samples, channels, sample_rate } = end;
        if samples.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if samples.iter().any(|x| x.is_nan() || x.abs() > MOST) {
            return Err(GenerateError::NotFinite);
        }
        let (from, to) = (u64::from(*sample_rate), u64::from(codec.sample_rate));
        let grid = from / gcd(from, to);
        let first = total_frames - end.n_frames() as u64;
        // The tail is longer than a step of the grid unless it is the whole file, which starts on the grid.
        let start = first.next_multiple_of(grid);
        let skipped = (start - first) as usize * channels;
        let mut tail = Clip { samples: samples[skipped.min(samples.len())..].to_vec(), ..*end };
        let offsets: Vec<f32> = (0..*channels).map(|c| offset(&channel(&tail, c), *sample_rate)).collect();
        tail.samples.iter_mut().zip(offsets.iter().cycle()).for_each(|(x, offset)| *x -= offset);
        let native = mono_of(&tail);
        let channel_gains = channel_gains(&tail, &native);
        let mono = resample_end(&native, *sample_rate, codec.sample_rate)?;
        let gain = gain_to_model(&mono);
        let tokens = mono.iter().map(|x| codec.encode(x * gain)).collect();
        Ok(Self { tail, mono, offsets, gain, channel_gains, model_rate: codec.sample_rate, tokens })
    }

    /// Nothing was played yet: mono at the model's own rate and level, after silence.
    pub fn silence(codec: &Codec) -> Self {
        Self::silence_at(codec, codec.sample_rate, vec![1.0])
    }

    /// Nothing was played yet: at the model's level times `channel_gains`, at `sample_rate` Hz, after silence.
    pub fn silence_at(codec: &Codec, sample_rate: u32, channel_gains: Vec<f32>) -> Self {
        Self {
            tail: Clip { samples: Vec::new(), channels: channel_gains.len(), sample_rate },
            mono: Vec::new(),
            offsets: vec![0.0; channel_gains.len()],
            gain: 1.0,
            channel_gains,
            model_rate: codec.sample_rate,
            tokens: vec![codec.silence()],
        }
    }

    /// The same for a continuation that does not come right after the recording: what is constant in that is no part of it.
    pub fn without_offsets(mut self) -> Self {
        self.offsets.fill(0.0);
        self
    }

    /// What an engine reads before it plays on.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// Whether there is nothing to hear in the context, so that it gives no level.
    pub fn is_silent(&self) -> bool {
        rms(&self.mono) < SILENT_RMS
    }

    /// Factor from the recording's level to the model's.
    pub fn gain(&self) -> f32 {
        self.gain
    }

    /// Frames per second of the recording and so of its continuation, Hz.
    pub fn sample_rate(&self) -> u32 {
        self.tail.sample_rate
    }

    /// Channels of the recording and so of its continuation.
    pub fn channels(&self) -> usize {
        self.tail.channels
    }
}

/// Factor that brings `samples` to the level that models are trained at, or as near as it may; 1 for silence.
pub fn gain_to_model(samples: &[f32]) -> f32 {
    if rms(samples) < SILENT_RMS { 1.0 } else { level::gain(samples).map_or(1.0, |gain| gain.min(MOST_GAIN)) }
}

/// What is constant in a channel, where that can be told and is more than a little.
fn offset(samples: &[f32], sample_rate: u32) -> f32 {
    let mean = (samples.iter().map(|&x| f64::from(x)).sum::<f64>() / samples.len().max(1) as f64) as f32;
    let known = samples.len() as f64 >= OFFSET_S * f64::from(sample_rate);
    if known && mean.abs() > SMALL_OFFSET * rms(samples) { mean } else { 0.0 }
}

/// The downmix, or the loudest channel where the channels cancel each other.
fn mono_of(clip: &Clip) -> Vec<f32> {
    let downmix = clip.downmix();
    let loudest =
        (0..clip.channels).map(|c| channel(clip, c)).max_by(|a, b| rms(a).total_cmp(&rms(b))).unwrap_or_default();
    if rms(&downmix) < CANCELLED * rms(&loudest) { loudest } else { downmix }
}

/// Level of each channel against `mono`, negative where it runs against it.
fn channel_gains(clip: &Clip, mono: &[f32]) -> Vec<f32> {
    let reference = rms(mono);
    if reference == 0.0 {
        return vec![1.0; clip.channels];
    }
    let gain_of = |c: usize| {
        let samples = channel(clip, c);
        let correlation: f64 = samples.iter().zip(mono).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
        let sign = if correlation < 0.0 { -1.0 } else { 1.0 };
        sign * (rms(&samples) / reference).min(MOST_CHANNEL_GAIN)
    };
    (0..clip.channels).map(gain_of).collect()
}

/// One channel's samples.
pub(super) fn channel(clip: &Clip, c: usize) -> Vec<f32> {
    clip.samples.iter().skip(c).step_by(clip.channels).copied().collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chord(n: usize, rate: u32, channels: usize) -> Clip {
        let sample = |i: usize, c: usize| {
            let t = i as f32 / rate as f32;
            0.1 * (1.0 - 0.5 * c as f32)
                * ((440.0 * t * std::f32::consts::TAU).sin() + (1234.0 * t * std::f32::consts::TAU).cos())
        };
        let samples = (0..n).flat_map(|i| (0..channels).map(move |c| sample(i, c))).collect();
        Clip { samples, channels, sample_rate: rate }
    }

    /// The last `n_frames` frames of a clip as a prompt.
    fn prompt_of(clip: &Clip, n_frames: usize) -> Result<Prompt, GenerateError> {
        let kept = clip.samples[clip.samples.len() - n_frames * clip.channels..].to_vec();
        Prompt::new(&Clip { samples: kept, ..*clip }, clip.n_frames() as u64, &Codec::default())
    }

    #[test]
    fn an_offset_is_told_from_a_low_note_and_left_out_where_nothing_comes_before() {
        let clip = |seconds: f32, constant: f32| {
            let sample = |i: usize| 0.2 * (std::f32::consts::TAU * 110.0 * i as f32 / 16_000.0).sin() + constant;
            Clip { samples: (0..(16_000.0 * seconds) as usize).map(sample).collect(), channels: 1, sample_rate: 16_000 }
        };
        let prompt = |clip: &Clip| Prompt::new(clip, clip.n_frames() as u64, &Codec::default()).unwrap();
        let (with, without) = (prompt(&clip(2.0, 0.1)), prompt(&clip(2.0, 0.0)));
        assert!((with.offsets[0] - 0.1).abs() < 1e-4 && without.offsets == [0.0], "{:?}", with.offsets);
        assert!((with.gain() / without.gain() - 1.0).abs() < 1e-3, "its level is that of what is heard");
        assert_eq!(prompt(&clip(0.5, 0.1)).offsets, [0.0], "too short to tell");
        assert_eq!(with.without_offsets().offsets, [0.0]);
    }

    #[test]
    fn a_tail_lies_on_the_grid_of_the_whole_file() {
        for (rate, n) in [(44_100, 120_017), (16_000, 30_001), (8000, 20_003), (48_000, 100_001), (22_050, 50_001)] {
            let clip = chord(n, rate, 1);
            let whole = prompt_of(&clip, n).unwrap();
            assert_eq!(whole.mono.len(), (n * 16_000).div_ceil(rate as usize), "{rate} Hz");
            let tail = prompt_of(&clip, n / 2 + 13).unwrap();
            let (a, b) = (&whole.mono[whole.mono.len() - 4000..], &tail.mono[tail.mono.len() - 4000..]);
            for (i, (x, y)) in a.iter().zip(b).enumerate() {
                assert!((x - y).abs() < 1e-4, "{rate} Hz, sample {i}: {x} and {y}");
            }
        }
    }

    #[test]
    fn the_last_samples_before_the_join_are_not_bent_by_the_files_end() {
        for rate in [44_100, 8000, 96_000] {
            let clip = chord(rate as usize, rate, 1);
            let prompt = prompt_of(&clip, rate as usize).unwrap();
            let exact = chord(16_000, 16_000, 1).samples;
            for (i, (x, y)) in prompt.mono.iter().zip(&exact).enumerate().skip(15_900) {
                assert!((x - y).abs() < 2e-3, "{rate} Hz, sample {i}: {x} for {y}");
            }
        }
    }

    #[test]
    fn the_gain_is_bounded_and_silence_has_none() {
        assert!((gain_to_model(&[0.01, -0.01]) - 10.0).abs() < 1e-4);
        assert_eq!(gain_to_model(&[1e-4, -1e-4]), MOST_GAIN);
        assert_eq!(gain_to_model(&[0.0; 8]), 1.0);
    }

    #[test]
    fn channels_keep_their_level_and_sign() {
        let stereo = chord(16_000, 16_000, 2);
        let prompt = prompt_of(&stereo, 16_000).unwrap();
        assert!(
            (prompt.channel_gains[0] - 4.0 / 3.0).abs() < 1e-4 && (prompt.channel_gains[1] - 2.0 / 3.0).abs() < 1e-4
        );
        let mut opposed = stereo;
        opposed.samples.chunks_exact_mut(2).for_each(|frame| frame[1] = -frame[0]);
        let prompt = prompt_of(&opposed, 16_000).unwrap();
        assert!(!prompt.is_silent());
        assert_eq!(prompt.channel_gains.iter().sum::<f32>(), 0.0);
    }

    #[test]
    fn one_sample_is_a_prompt_and_none_is_not() {
        let one = Clip { samples: vec![0.1], channels: 1, sample_rate: 44_100 };
        assert_eq!(prompt_of(&one, 1).unwrap().tokens().len(), 1);
        let none = Clip { samples: vec![], channels: 1, sample_rate: 44_100 };
        assert!(matches!(prompt_of(&none, 0), Err(GenerateError::EmptyPrompt)));
    }
}
