//! Turns model samples into frames at the prompt's own rate, channels and level, without a step at the join.

use std::f32::consts::FRAC_PI_2;

use serde::{Deserialize, Serialize};

use crate::audio::{Clip, ResamplerState, StreamResampler};

use super::GenerateError;
use super::extrapolate::extrapolate;
use super::join::{SeamReport, level_frames, own_frames};
use super::prompt::{Prompt, channel};
use super::rest::{Fit, Rest, RestState};

/// Frames before the join from which the rest that the model does not hear is carried over it.
const CARRIED: usize = 4096;
/// Seconds over which that gives way to what is made of the model's samples: noise does not ring on, and its place would be empty.
const FADE_S: f64 = 0.01;

/// The way from the model's samples to the recording's frames.
///
/// The resampler runs through the prompt first, so phase and level go on. The rest that the prompt has and the model does not
/// (treble above the model's band, the difference of the channels) rings on by linear prediction and gives way to a rest made of what the model plays, as
/// the prompt's own followed from what the model heard of it.
///
/// Every frame is settled by the samples around it, so frames come out a filter and a spectrum later (some 0.1 s at common rates)
/// after their samples, and are the same however many follow.
pub struct Seam {
    /// Factor from the recording's level to the model's.
    gain: f32,
    /// Factor from the downmix to each channel.
    channel_gains: Vec<f32>,
    /// What is constant in each channel.
    offsets: Vec<f32>,
    /// The prompt's end at its own rate and channels.
    tail: Clip,
    resampler: StreamResampler,
    /// Resampled and not yet taken, as on the downmix; before the join its last [`CARRIED`] frames stay.
    made: Vec<f32>,
    /// Frames from the join to the start of `made`: negative before it.
    made_start: i64,
    rest: Rest,
    /// The rests of all channels, interleaved, from the start of `made` as far as they are settled.
    rests: Vec<f32>,
    /// Per channel, what rings on after the join; known when the join is reached.
    carried: Option<Vec<Vec<f32>>>,
    /// The continuation's first frames, for the report.
    first_frames: Vec<f32>,
}

/// A [`Seam`] as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeamState {
    gain: f32,
    channel_gains: Vec<f32>,
    offsets: Vec<f32>,
    /// Empty once the join is made: what was before it is of no more use, and its report belongs to who made it.
    tail: Clip,
    resampler: ResamplerState,
    made: Vec<f32>,
    made_start: i64,
    rest: RestState,
    rests: Vec<f32>,
    carried: Option<Vec<Vec<f32>>>,
}

impl SeamState {
    fn holds_together(&self) -> bool {
        let channels = self.tail.channels;
        self.gain.is_normal()
            && channels > 0
            && self.channel_gains.len() == channels
            && self.offsets.len() == channels
            && self.tail.samples.len().is_multiple_of(channels)
            && self.rests.len().is_multiple_of(channels)
            && self.rests.len() <= self.made.len() * channels
            && match &self.carried {
                Some(carried) => carried.len() == channels && self.made_start >= 0,
                None => self.made_start <= 0 && self.made_start.unsigned_abs() <= self.tail.n_frames() as u64,
            }
    }
}

impl Seam {
    /// A seam after `prompt`.
    ///
    /// # Errors
    /// A rate that cannot be resampled.
    pub fn new(prompt: &Prompt) -> Result<Self, GenerateError> {
        Self::resampled(prompt, StreamResampler::new(prompt.model_rate, prompt.tail.sample_rate)?)
    }

    /// A seam that settles frames sooner, within 46 ms of their samples at 44.1 kHz and 38 ms at 48 kHz (75 ms at 22.05 kHz), for a little treble.
    ///
    /// # Errors
    /// A rate that cannot be resampled.
    pub fn soon(prompt: &Prompt) -> Result<Self, GenerateError> {
        const FILTER_LEN: usize = 256;
        Self::resampled(prompt, StreamResampler::with_filter(prompt.model_rate, prompt.tail.sample_rate, FILTER_LEN)?)
    }

    fn resampled(prompt: &Prompt, mut resampler: StreamResampler) -> Result<Self, GenerateError> {
        let Clip { samples, channels, sample_rate } = &prompt.tail;
        let mut made = Vec::new();
        resampler.push(&prompt.mono, &mut made)?;
        let has_rest = *channels > 1 || *sample_rate > prompt.model_rate;
        let fit = has_rest.then(|| Fit::new(&prompt.tail, &made, &prompt.channel_gains, prompt.model_rate)).flatten();
        let mut seam = Self {
            resampler,
            made,
            made_start: -(prompt.tail.n_frames() as i64),
            rest: Rest::new(fit, *sample_rate, prompt.model_rate),
            rests: Vec::new(),
            carried: None,
            first_frames: Vec::new(),
            gain: prompt.gain,
            channel_gains: prompt.channel_gains.clone(),
            offsets: prompt.offsets.clone(),
            tail: Clip {
                samples: samples[samples.len().saturating_sub(own_frames(&prompt.tail) * channels)..].to_vec(),
                ..prompt.tail
            },
        };
        let distant = seam.before_join().saturating_sub(CARRIED);
        seam.made.drain(..distant);
        seam.made_start += distant as i64;
        seam.rest.push(&seam.made, seam.channel_gains.len(), &mut seam.rests);
        Ok(seam)
    }

    /// What [`Self::from_state`] goes on from, bit for bit.
    pub fn state(&self) -> SeamState {
        let tail = match self.carried {
            Some(_) => Clip { samples: Vec::new(), ..self.tail },
            None => self.tail.clone(),
        };
        SeamState {
            gain: self.gain,
            channel_gains: self.channel_gains.clone(),
            offsets: self.offsets.clone(),
            tail,
            resampler: self.resampler.state(),
            made: self.made.clone(),
            made_start: self.made_start,
            rest: self.rest.state(),
            rests: self.rests.clone(),
            carried: self.carried.clone(),
        }
    }

    /// The seam that a state was taken of; its report is left out where the join had been made before.
    ///
    /// # Errors
    /// A state that does not hold together.
    pub fn from_state(state: SeamState) -> Result<Self, GenerateError> {
        if !state.holds_together() {
            return Err(GenerateError::State);
        }
        let resampler = StreamResampler::from_state(&state.resampler)?;
        let SeamState { gain, channel_gains, offsets, tail, made, made_start, rest, rests, carried, .. } = state;
        let (model_rate, sample_rate) = resampler.rates();
        if sample_rate != tail.sample_rate {
            return Err(GenerateError::State);
        }
        let rest = Rest::from_state(rest, tail.channels, sample_rate, model_rate).ok_or(GenerateError::State)?;
        let first_frames = Vec::new();
        Ok(Self { gain, channel_gains, offsets, tail, resampler, made, made_start, rest, rests, carried, first_frames })
    }

    /// Frames per second of the recording and its continuation, Hz.
    pub fn sample_rate(&self) -> u32 {
        self.tail.sample_rate
    }

    /// Channels of the recording and its continuation.
    pub fn channels(&self) -> usize {
        self.tail.channels
    }

    /// Takes samples as the model made them.
    ///
    /// # Errors
    /// The resampler's own.
    pub fn push(&mut self, samples: &[f32]) -> Result<(), GenerateError> {
        let scaled: Vec<f32> = samples.iter().map(|x| x / self.gain).collect();
        let known = self.made.len();
        self.resampler.push(&scaled, &mut self.made)?;
        self.rest.push(&self.made[known..], self.channel_gains.len(), &mut self.rests);
        Ok(())
    }

    /// Appends the next settled frames, at most `most`, to `out`, interleaved; gives their number.
    pub fn take(&mut self, most: u64, out: &mut Vec<f32>) -> u64 {
        let channels = self.channel_gains.len();
        let settled = self.made.len().min(self.rests.len() / channels);
        let before = self.before_join();
        if settled <= before {
            return 0;
        }
        if self.carried.is_none() {
            let last: Vec<f32> = self.made.drain(..before).collect();
            self.rests.drain(..before * channels);
            self.made_start = 0;
            self.carried = Some(self.carried_after(&last));
        }
        let carried = self.carried.as_deref().unwrap_or_default();
        let n = (settled - before).min(usize::try_from(most).unwrap_or(usize::MAX));
        let first = out.len();
        let n_fade = fade_frames(&self.tail);
        for ((at, x), rests) in
            (self.made_start as usize..).zip(self.made.drain(..n)).zip(self.rests.chunks_exact(channels))
        {
            // Of two signals that go their own ways, one out and one in.
            let share = if at < n_fade { (FRAC_PI_2 * at as f32 / n_fade as f32).sin() } else { 1.0 };
            let channels = self.channel_gains.iter().zip(carried).zip(rests);
            out.extend(
                channels
                    .map(|((gain, carried), rest)| gain * x + carried.get(at).copied().unwrap_or(0.0) + share * rest),
            );
        }
        self.rests.drain(..n * channels);
        self.made_start += n as i64;
        let enough = 2 * level_frames(&self.tail) * self.tail.channels;
        let missing = enough.saturating_sub(self.first_frames.len());
        self.first_frames.extend(out[first..].iter().take(missing));
        out[first..].iter_mut().zip(self.offsets.iter().cycle()).for_each(|(x, offset)| *x += offset);
        n as u64
    }

    /// What the join sounds like, as far as it has been taken.
    pub fn report(&self) -> Option<SeamReport> {
        SeamReport::measure(&self.tail, &self.first_frames)
    }

    /// Frames of `made` that lie before the join.
    fn before_join(&self) -> usize {
        self.made.len().min(self.made_start.min(0).unsigned_abs() as usize)
    }

    /// Per channel: what the prompt's last frames have beyond the resampled downmix `before`, continued and faded out.
    fn carried_after(&self, before: &[f32]) -> Vec<Vec<f32>> {
        let tail = &self.tail;
        let n_fade = fade_frames(tail);
        let rest_of = |(c, gain): (usize, &f32)| {
            let samples = channel(tail, c);
            let last = &samples[samples.len() - before.len()..];
            let rest: Vec<f32> = last.iter().zip(before).map(|(x, y)| x - gain * y).collect();
            let mut carried = extrapolate(&rest, n_fade);
            for (i, x) in carried.iter_mut().enumerate() {
                *x *= (FRAC_PI_2 * i as f32 / n_fade as f32).cos();
            }
            carried
        };
        self.channel_gains.iter().enumerate().map(rest_of).collect()
    }
}

fn fade_frames(clip: &Clip) -> usize {
    (FADE_S * f64::from(clip.sample_rate)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::resample;
    use crate::codec::Codec;
    use crate::metrics::{level_db, rms};

    /// A chord at any rate, per channel at its own level, with treble that no model at 16 kHz hears where the rate allows.
    fn clip(seconds: f64, rate: u32, channels: usize) -> Clip {
        let n = (seconds * f64::from(rate)) as usize;
        let tone = |hz: f64, t: f64| (std::f64::consts::TAU * hz * t).sin();
        let sample = |i: usize, c: usize| {
            let t = i as f64 / f64::from(rate);
            let treble = if rate > 32_000 { 0.01 * tone(11_000.0, t) } else { 0.0 };
            ((0.2 * tone(440.0, t) + 0.1 * tone(1320.5, t)) / (c + 1) as f64 + treble) as f32
        };
        Clip {
            samples: (0..n).flat_map(|i| (0..channels).map(move |c| sample(i, c))).collect(),
            channels,
            sample_rate: rate,
        }
    }

    fn prompt_of(clip: Clip) -> Prompt {
        Prompt::new(&clip, clip.n_frames() as u64, &Codec::default()).unwrap()
    }

    /// Plays on with what a perfect model would: the same chord.
    fn play_on(prompt: &Prompt, n_frames: u64, pushed: usize) -> (Vec<f32>, Option<SeamReport>) {
        let mut seam = Seam::new(prompt).unwrap();
        let known = prompt.mono.len();
        // The mono chord of one channel's level, scaled as the prompt's downmix is.
        let mono = clip(30.0, 16_000, 1).samples;
        let scale = rms(&prompt.mono) / rms(&mono[..known]) * prompt.gain;
        let model: Vec<f32> = mono[known..].iter().take(pushed).map(|x| x * scale).collect();
        let (mut out, mut taken) = (Vec::new(), 0);
        for (n_pieces, piece) in model.chunks(512).enumerate() {
            seam.push(piece).unwrap();
            taken += seam.take(n_frames - taken, &mut out);
            if taken == n_frames {
                break;
            }
            // Saved and restored before the join and after it, it goes on as if nothing had been.
            if taken == 0 || n_pieces % 8 == 0 {
                seam = Seam { first_frames: seam.first_frames.clone(), tail: seam.tail.clone(), ..restored(&seam) };
            }
        }
        (out, seam.report())
    }

    fn restored(seam: &Seam) -> Seam {
        Seam::from_state(serde_json::from_str(&serde_json::to_string(&seam.state()).unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn a_perfect_continuation_is_seamless_at_every_rate_and_channel_count() {
        for rate in [8000, 16_000, 22_050, 44_100, 48_000, 96_000] {
            for channels in [1, 2, 6] {
                let all = clip(3.0, rate, channels);
                let n = 2 * rate as usize;
                let prompt = prompt_of(Clip { samples: all.samples[..n * channels].to_vec(), ..all });
                let (out, report) = play_on(&prompt, u64::from(rate) / 2, usize::MAX);
                assert_eq!(out.len(), rate as usize / 2 * channels, "{rate} Hz, {channels} channels");
                let report = report.unwrap();
                assert!(report.jump < 3.0, "{rate} Hz, {channels} channels: {report:?}");
                assert!(report.level_change_db.unwrap().abs() < 0.5, "{rate} Hz, {channels} channels: {report:?}");
                // After the fade the treble is another.
                for (i, (x, y)) in out.iter().zip(&all.samples[n * channels..]).enumerate() {
                    assert!((x - y).abs() < 0.02, "{rate} Hz, {channels} channels, sample {i}: {x} for {y}");
                }
            }
        }
    }

    #[test]
    fn treble_and_width_of_noise_go_on_without_a_gap() {
        let mut rng = crate::rng::Rng::new(6);
        let (rate, n) = (44_100u32, 2 * 44_100);
        let samples: Vec<f32> = (0..2 * n).map(|_| 0.1 * rng.normal()).collect();
        let all = Clip { samples, channels: 2, sample_rate: rate };
        let known = n / 2;
        let prompt = prompt_of(Clip { samples: all.samples[..2 * known].to_vec(), ..all });
        let mut seam = Seam::new(&prompt).unwrap();
        let heard = resample(&all.downmix(), rate, 16_000).unwrap();
        let played: Vec<f32> = heard[prompt.mono.len()..].iter().map(|x| x * prompt.gain).collect();
        let mut out = all.samples[..2 * known].to_vec();
        seam.push(&played).unwrap();
        seam.take(u64::MAX, &mut out);
        let out = Clip { samples: out, ..all };
        let first = channel(&out, 0);
        let low = resample(&resample(&first, rate, 16_000).unwrap(), 16_000, rate).unwrap();
        let treble: Vec<f32> = first.iter().zip(low).map(|(x, y)| x - y).collect();
        let side: Vec<f32> = first.iter().zip(channel(&out, 1)).map(|(x, y)| x - y).collect();
        let window = rate as usize / 50;
        for (what, signal) in [("treble", treble), ("side", side)] {
            let expected = level_db(&signal[..known]);
            for (k, piece) in signal[known..].chunks_exact(window).take(20).enumerate() {
                assert!((level_db(piece) - expected).abs() < 3.0, "{what}, {k}: {} dB", level_db(piece) - expected);
            }
        }
    }

    #[test]
    fn what_is_to_come_soon_comes_soon() {
        let most_ms = [(8000, 2, 56.0), (16_000, 1, 0.0), (22_050, 2, 75.0), (44_100, 2, 46.0), (48_000, 6, 38.0)];
        for (rate, channels, most_ms) in most_ms {
            for length in 0..10 {
                let prompt = prompt_of(clip(0.3 + 0.0137 * f64::from(length), rate, channels));
                let mut seam = Seam::soon(&prompt).unwrap();
                let (mut out, mut taken) = (Vec::new(), 0);
                for pushed in (512..16_000).step_by(512) {
                    seam.push(&[0.01; 512]).unwrap();
                    taken += seam.take(u64::MAX, &mut out);
                    let behind_ms = f64::from(pushed) / 16.0 - 1e3 * taken as f64 / f64::from(rate);
                    assert!(behind_ms <= most_ms, "{rate} Hz, {channels} channels: {behind_ms} ms");
                }
            }
        }
    }

    #[test]
    fn what_is_taken_does_not_depend_on_what_follows() {
        let prompt = prompt_of(clip(1.0, 44_100, 2));
        let (long, _) = play_on(&prompt, 44_100, usize::MAX);
        let (short, _) = play_on(&prompt, 44_100, 8000);
        // A chunk of the resampler (8 blocks of 160 samples) and half of its filter may still be missing.
        assert!(short.len() / 2 > (8000 - 1280 - 640) * 441 / 160, "{}", short.len());
        assert_eq!(short, long[..short.len()]);
        let (out, report) = play_on(&prompt, 44_100, 0);
        assert!(out.is_empty() && report.is_none());
    }

    #[test]
    fn a_bent_state_is_refused() {
        let state = Seam::new(&prompt_of(clip(0.2, 44_100, 2))).unwrap().state();
        for bent in [
            SeamState { gain: 0.0, ..state.clone() },
            SeamState { channel_gains: vec![1.0], ..state.clone() },
            SeamState { made_start: 1, ..state.clone() },
            SeamState { made_start: -100_000, ..state.clone() },
            SeamState { carried: Some(vec![]), ..state.clone() },
            SeamState { rests: vec![0.0], ..state.clone() },
            SeamState { tail: Clip { sample_rate: 48_000, ..state.tail.clone() }, ..state },
        ] {
            assert!(matches!(Seam::from_state(bent), Err(GenerateError::State)));
        }
    }
}
