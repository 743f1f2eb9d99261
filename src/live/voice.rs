//! What makes frames for a device: an engine, the way that it takes, and the seam from its samples to the device's frames.

use crate::codec::Codec;
use crate::engine::Engine;
use crate::generate::{Frame, GenerateError, Options, Path, Prompt, Seam};

use super::control::MOST_VARY_S;

/// Seconds over which one way of going on gives way to another.
pub(super) const CROSSFADE_S: f64 = 0.01;
/// Longest times that [`Voice::skip`] leaves out, seconds: what was due from the beginning on, for the beat is forgotten by then, and what
/// comes to be due while it works, for an engine that is too slow never catches up.
const MOST_DUE_S: f64 = 8.0;
const MOST_LATE_S: f64 = 4.0;

/// The music that goes on after one recording.
pub struct Voice {
    pub(super) engine: Box<dyn Engine>,
    pub(super) path: Path,
    seam: Seam,
    codec: Codec,
    /// The end of the way that was left, as samples of the model.
    leaving: Leaving,
}

impl Voice {
    /// Plays on after `prompt`, whose rate and channels are the device's; `governed`: whether a governor watches.
    ///
    /// # Errors
    /// The engine's own, or a rate that cannot be resampled.
    pub fn new(
        mut engine: Box<dyn Engine>,
        options: &Options,
        prompt: &Prompt,
        governed: bool,
    ) -> Result<Self, GenerateError> {
        let seam = Seam::soon(prompt)?;
        let path = Path::new(engine.as_mut(), options, prompt.tokens(), governed)?;
        let codec = engine.config().codec.clone();
        let mut voice = Self { engine, path, seam, codec, leaving: Leaving::default() };
        voice.path.keep(voice.plan_frames(MOST_VARY_S));
        Ok(voice)
    }

    /// Frames per second and channels of what is played.
    pub fn shape(&self) -> (u32, usize) {
        (self.seam.sample_rate(), self.seam.channels())
    }

    /// Seconds of a plan frame: what a step makes.
    pub fn step_s(&self) -> f64 {
        self.engine.config().plan.hop as f64 / f64::from(self.codec.sample_rate)
    }

    /// How surprising the prompt is, bits a plan frame: as the governor knows it.
    pub fn context_bits(&self) -> Option<f32> {
        self.path.context_bits()
    }

    /// Appends what the next plan frame settles to `out`, interleaved.
    ///
    /// # Errors
    /// The engine's own.
    pub fn next(&mut self, out: &mut Vec<f32>) -> Result<Frame, GenerateError> {
        let frame = self.path.release(self.engine.as_mut())?;
        let mut samples = self.codec.decode_all(&frame.tokens);
        self.leaving.fade_into(&mut samples, 1);
        self.seam.push(&samples)?;
        self.seam.take(u64::MAX, out);
        Ok(frame)
    }

    /// Goes back these seconds and takes another way; gives how far it went, seconds.
    ///
    /// # Errors
    /// The engine's own.
    pub fn vary(&mut self, seconds: f64) -> Result<f64, GenerateError> {
        if self.leaving.is_over() {
            let frame = self.path.release(self.engine.as_mut())?;
            let mut samples = self.codec.decode_all(&frame.tokens);
            samples.truncate((CROSSFADE_S * f64::from(self.codec.sample_rate)) as usize);
            self.leaving = Leaving::of(samples);
        }
        let wanted = self.plan_frames(seconds);
        let back = self.path.vary(self.engine.as_mut(), wanted)?;
        Ok(back as f64 * self.step_s())
    }

    /// Leaves out the first frames, up to `due` seconds after the prompt, which is asked again while they are made. Who was heard
    /// until a moment ago is so joined in time and not after the time that it took.
    ///
    /// # Errors
    /// The engine's own.
    pub fn skip(&mut self, due: impl Fn() -> f64) -> Result<(), GenerateError> {
        let (mut skipped, mut dropped) = (0, Vec::new());
        let most_s = due().min(MOST_DUE_S) + MOST_LATE_S;
        loop {
            let wanted = (due().min(most_s) * f64::from(self.seam.sample_rate())) as u64;
            skipped += self.seam.take(wanted.saturating_sub(skipped), &mut dropped);
            if skipped >= wanted {
                return Ok(());
            }
            let frame = self.path.release(self.engine.as_mut())?;
            self.seam.push(&self.codec.decode_all(&frame.tokens))?;
            dropped.clear();
        }
    }

    fn plan_frames(&self, seconds: f64) -> u64 {
        (seconds / self.step_s()).round() as u64
    }
}

/// The next moments of what is left behind, interleaved, which fade out under what comes instead.
#[derive(Default)]
pub(super) struct Leaving {
    samples: Vec<f32>,
    /// Of them those that have been heard.
    at: usize,
}

impl Leaving {
    pub fn of(samples: Vec<f32>) -> Self {
        Self { samples, at: 0 }
    }

    pub fn is_over(&self) -> bool {
        self.at >= self.samples.len()
    }

    /// Mixes the next of it into what comes, of as many channels.
    pub fn fade_into(&mut self, next: &mut [f32], channels: usize) {
        let n_frames = self.samples.len() / channels;
        let leaving = self.samples[self.at..].chunks_exact(channels);
        let at = self.at / channels;
        let mut mixed = 0;
        for (i, (next, leaving)) in (at + 1..).zip(next.chunks_exact_mut(channels).zip(leaving)) {
            let share = i as f32 / (n_frames + 1) as f32;
            next.iter_mut().zip(leaving).for_each(|(x, y)| *x = share * *x + (1.0 - share) * y);
            mixed += channels;
        }
        self.at += mixed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_fades_evenly_however_it_is_cut() {
        let of = |pieces: &[usize]| {
            let mut leaving = Leaving::of(vec![1.0; 9 * 2]);
            let mut all = vec![0.0; 12 * 2];
            let mut rest = &mut all[..];
            for &n in pieces {
                let (piece, after) = rest.split_at_mut(n * 2);
                leaving.fade_into(piece, 2);
                rest = after;
            }
            assert!(leaving.is_over());
            all
        };
        let whole = of(&[12]);
        for (i, frame) in whole.chunks(2).enumerate() {
            let expected = if i < 9 { 0.9 - 0.1 * i as f32 } else { 0.0 };
            assert!(frame.iter().all(|x| (x - expected).abs() < 1e-6), "frame {i}: {frame:?}");
        }
        assert_eq!(of(&[0, 1, 3, 8]), whole);
    }
}
