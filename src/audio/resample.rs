//! Turns mono samples at one rate into mono samples at another, with the filter's delay taken out.

use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler, WindowFunction};
use serde::{Deserialize, Serialize};

use super::{AudioError, Result};

/// Lowest sample rate, Hz.
pub const LOWEST_RATE: u32 = 1_000;
/// Highest sample rate, Hz.
pub const HIGHEST_RATE: u32 = 1_536_000;

/// Filter length in samples at the lower of the two rates: passes up to 0.97 of its half, stops from 1.0.
const FILTER_LEN: usize = 1024;

/// A windowed-sinc resampler (squared Blackman-Harris, by FFT) that can be fed in pieces of any size.
///
/// Output sample i is the band-limited signal at time i / `to`, whatever the pieces.
pub struct StreamResampler {
    // None when both rates are equal.
    fft: Option<Fft<f64>>,
    from: u64,
    to: u64,
    filter_len: usize,
    // f64, so that f32 samples come back as they were but for the last bit.
    pending: Vec<f64>,
    // The chunk that `fft` took last: all that its memory holds, for [`Self::state`].
    last: Vec<f64>,
    block: Vec<f64>,
    n_in: u64,
    n_out: u64,
    // Output samples still to be dropped: the filter's delay.
    skip: usize,
}

impl StreamResampler {
    /// A resampler from `from` Hz to `to` Hz.
    ///
    /// # Errors
    /// A rate outside [`LOWEST_RATE`]..=[`HIGHEST_RATE`].
    pub fn new(from: u32, to: u32) -> Result<Self> {
        Self::with_filter(from, to, FILTER_LEN)
    }

    /// A resampler whose filter has `filter_len` samples at the lower of the two rates: shorter is sooner, and passes less
    /// below half of that rate (256: up to 0.88 of it).
    ///
    /// # Errors
    /// A rate outside [`LOWEST_RATE`]..=[`HIGHEST_RATE`].
    pub fn with_filter(from: u32, to: u32, filter_len: usize) -> Result<Self> {
        for rate in [from, to] {
            if !(LOWEST_RATE..=HIGHEST_RATE).contains(&rate) {
                return Err(AudioError::SampleRate { rate, lowest: LOWEST_RATE, highest: HIGHEST_RATE });
            }
        }
        let fft = if from == to {
            None
        } else {
            Some(make_fft(from as usize, to as usize, filter_len.clamp(2, FILTER_LEN))?)
        };
        let skip = fft.as_ref().map_or(0, Resampler::output_delay);
        let block = vec![0.0; fft.as_ref().map_or(0, Resampler::output_frames_max)];
        Ok(Self {
            fft,
            from: from.into(),
            to: to.into(),
            filter_len,
            pending: Vec::new(),
            last: Vec::new(),
            block,
            n_in: 0,
            n_out: 0,
            skip,
        })
    }

    /// From which rate to which, Hz.
    pub fn rates(&self) -> (u32, u32) {
        (self.from as u32, self.to as u32)
    }

    /// What [`Self::from_state`] goes on from, bit for bit.
    pub fn state(&self) -> ResamplerState {
        // All input was f32.
        let samples = |values: &[f64]| values.iter().map(|&x| x as f32).collect();
        ResamplerState {
            from: self.from as u32,
            to: self.to as u32,
            filter_len: self.filter_len,
            last: samples(&self.last),
            pending: samples(&self.pending),
            n_in: self.n_in,
            n_out: self.n_out,
            skip: self.skip,
        }
    }

    /// The resampler that a state was taken of.
    ///
    /// # Errors
    /// A rate outside [`LOWEST_RATE`]..=[`HIGHEST_RATE`], or numbers that no resampler has.
    pub fn from_state(state: &ResamplerState) -> Result<Self> {
        let mut new = Self::with_filter(state.from, state.to, state.filter_len)?;
        let chunk = new.fft.as_ref().map_or(1, Resampler::input_frames_next);
        let last_fits = state.last.is_empty() || (new.fft.is_some() && state.last.len() == chunk);
        if !last_fits || state.pending.len() >= chunk || state.skip > new.skip {
            return Err(refused("its saved state does not hold together"));
        }
        // Overlap-add: the filter's tail over the last chunk is the whole memory.
        new.push(&state.last, &mut Vec::new())?;
        new.pending = state.pending.iter().map(|&x| f64::from(x)).collect();
        (new.n_in, new.n_out, new.skip) = (state.n_in, state.n_out, state.skip);
        Ok(new)
    }

    /// Takes more input and appends what output it settles to `out`.
    ///
    /// # Errors
    /// The resampler's own refusal.
    pub fn push(&mut self, samples: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.n_in += samples.len() as u64;
        let Some(fft) = &mut self.fft else {
            out.extend_from_slice(samples);
            self.n_out += samples.len() as u64;
            return Ok(());
        };
        self.pending.extend(samples.iter().map(|&sample| f64::from(sample)));
        let chunk = fft.input_frames_next();
        let mut done = 0;
        while self.pending.len() - done >= chunk {
            let input = InterleavedSlice::new(&self.pending[done..done + chunk], 1, chunk).map_err(refused)?;
            let capacity = self.block.len();
            let mut output = InterleavedSlice::new_mut(&mut self.block, 1, capacity).map_err(refused)?;
            let (used, made) = fft.process_into_buffer(&input, &mut output, None).map_err(refused)?;
            self.last.clear();
            self.last.extend_from_slice(&self.pending[done..done + used]);
            done += used;
            let dropped = self.skip.min(made);
            self.skip -= dropped;
            out.extend(self.block[dropped..made].iter().map(|&sample| sample as f32));
            self.n_out += (made - dropped) as u64;
        }
        self.pending.drain(..done);
        Ok(())
    }

    /// Ends the input and appends the rest: in all ceil(n * to / from) samples for n of input.
    ///
    /// # Errors
    /// The resampler's own refusal.
    pub fn finish(mut self, out: &mut Vec<f32>) -> Result<()> {
        let expected = (self.n_in * self.to).div_ceil(self.from);
        let Some(chunk) = self.fft.as_ref().map(Resampler::input_frames_next) else {
            return Ok(());
        };
        let silence = vec![0.0; chunk];
        while self.n_out < expected {
            self.push(&silence, out)?;
        }
        out.truncate(out.len() - (self.n_out - expected) as usize);
        Ok(())
    }
}

/// A [`StreamResampler`] as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResamplerState {
    from: u32,
    to: u32,
    filter_len: usize,
    last: Vec<f32>,
    pending: Vec<f32>,
    n_in: u64,
    n_out: u64,
    skip: usize,
}

fn make_fft(from: usize, to: usize, filter_len: usize) -> Result<Fft<f64>> {
    let (mut a, mut b) = (from, to);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let (block_in, block_out) = (from / a, to / a);
    // An even number of blocks makes both filter halves whole, so that the delay is a whole number of samples.
    let blocks = filter_len.div_ceil(block_in.min(block_out)).next_multiple_of(2);
    Fft::new_custom(from, to, blocks * block_in, 1, 1, WindowFunction::BlackmanHarris2, FixedSync::Both)
        .map_err(refused)
}

fn refused(error: impl std::fmt::Display) -> AudioError {
    AudioError::Resample(error.to_string())
}

/// Resamples mono `samples` from `from` Hz to `to` Hz: output i is the signal at time i / `to`, length
/// ceil(n * to / from); beyond its ends the signal is taken as zero.
///
/// # Errors
/// A rate outside [`LOWEST_RATE`]..=[`HIGHEST_RATE`].
pub fn resample(samples: &[f32], from: u32, to: u32) -> Result<Vec<f32>> {
    let mut resampler = StreamResampler::new(from, to)?;
    let mut out = Vec::with_capacity((samples.len() as u64 * u64::from(to)).div_ceil(u64::from(from)) as usize);
    resampler.push(samples, &mut out)?;
    resampler.finish(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::TAU;

    const RATES: [u32; 12] = [8000, 11025, 12000, 16000, 22050, 32000, 39000, 44100, 48000, 88200, 96000, 192000];

    /// Sines under a smooth envelope that is silent at both ends, so that edges play no part.
    fn sines(rate: u32, seconds: f64, hz: &[f64]) -> Vec<f32> {
        let n = (seconds * f64::from(rate)) as usize;
        (0..n)
            .map(|i| {
                let t = i as f64 / f64::from(rate);
                let envelope = (TAU * t / seconds / 2.0).sin().powi(4);
                let sum: f64 = hz.iter().enumerate().map(|(k, f)| (TAU * f * t + k as f64).sin()).sum();
                (envelope * sum / hz.len() as f64) as f32
            })
            .collect()
    }

    fn worst(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn sines_keep_their_phase_and_level_between_all_rates() {
        for from in RATES {
            for to in RATES {
                let band = f64::from(from.min(to)) / 2.0;
                let hz = [0.013 * band, 0.3 * band, 0.9 * band];
                let out = resample(&sines(from, 0.7, &hz), from, to).unwrap();
                let error = worst(&out, &sines(to, 0.7, &hz));
                assert!(error < 1e-6, "{from} -> {to} Hz: worst sample off by {error}");
            }
        }
    }

    #[test]
    fn there_and_back_is_the_same_signal() {
        for rate in RATES {
            let samples = sines(rate, 0.5, &[110.0, 1234.5, 3500.0]);
            let there = resample(&samples, rate, 16000).unwrap();
            let back = resample(&there, 16000, rate).unwrap();
            let error = worst(&samples, &back);
            assert!(error < 1e-6, "{rate} Hz and back: {error}");
        }
    }

    #[test]
    fn an_impulse_stays_where_it_was() {
        for (from, to) in [(44100, 16000), (16000, 44100), (48000, 16000), (16000, 48000), (22050, 44100)] {
            // A whole second is a sample at every rate.
            let mut samples = vec![0.0; 2 * from as usize];
            samples[from as usize] = 1.0;
            let out = resample(&samples, from, to).unwrap();
            let at = to as usize;
            let peak = (0..out.len()).max_by(|&a, &b| out[a].abs().total_cmp(&out[b].abs())).unwrap();
            assert_eq!(peak, at, "{from} -> {to}");
            for lag in 1..200 {
                let skew = (out[at - lag] - out[at + lag]).abs();
                assert!(skew < 1e-7, "{from} -> {to}: not symmetric at lag {lag}: {skew}");
            }
        }
    }

    #[test]
    fn what_the_lower_rate_cannot_hold_is_removed() {
        let out = resample(&sines(48000, 0.5, &[8100.0, 11000.0, 20000.0]), 48000, 16000).unwrap();
        let loudest = out.iter().fold(0.0f32, |a, &b| a.max(b.abs()));
        assert!(loudest < 1e-5, "aliases at {loudest}");
    }

    #[test]
    fn length_is_the_ceiling_and_pieces_do_not_matter() {
        for (from, to) in [(44100, 16000), (16000, 44100), (8000, 44100), (44101, 16000), (16000, 16000)] {
            for n in [0usize, 1, 2, 7, 441, 1000, 5003] {
                let samples: Vec<f32> = (0..n).map(|i| (i as f32 * 0.1).sin()).collect();
                let whole = resample(&samples, from, to).unwrap();
                assert_eq!(whole.len(), (n * to as usize).div_ceil(from as usize), "{n} samples, {from} -> {to}");
                let mut pieces = Vec::new();
                let mut stream = StreamResampler::new(from, to).unwrap();
                for piece in samples.chunks(97) {
                    stream.push(piece, &mut pieces).unwrap();
                }
                stream.finish(&mut pieces).unwrap();
                assert_eq!(whole, pieces, "{n} samples, {from} -> {to}");
            }
        }
    }

    #[test]
    fn a_restored_stream_goes_on_bit_for_bit_and_a_bent_state_is_refused() {
        let samples: Vec<f32> = (0..9000).map(|i| (i as f32 * 0.1).sin()).collect();
        for (from, to) in [(16000, 44100), (44100, 16000), (16000, 16000), (16000, 8000)] {
            let whole = resample(&samples, from, to).unwrap();
            for at in [0, 1, 1500, 5003] {
                let mut out = Vec::new();
                let mut stream = StreamResampler::new(from, to).unwrap();
                stream.push(&samples[..at], &mut out).unwrap();
                let state = stream.state();
                let mut stream = StreamResampler::from_state(&state).unwrap();
                assert_eq!(stream.state(), state, "{from} -> {to}, after {at}");
                stream.push(&samples[at..], &mut out).unwrap();
                stream.finish(&mut out).unwrap();
                assert_eq!(out, whole, "{from} -> {to}, after {at}");
                let bent = ResamplerState { pending: vec![0.0; 100_000], ..state.clone() };
                assert!(StreamResampler::from_state(&bent).is_err());
                let bent = ResamplerState { last: vec![0.0; 7], ..state };
                assert!(StreamResampler::from_state(&bent).is_err());
            }
        }
    }

    #[test]
    fn absurd_rates_are_refused() {
        assert!(resample(&[0.0], 0, 16000).is_err());
        assert!(resample(&[0.0], 16000, u32::MAX).is_err());
    }
}
