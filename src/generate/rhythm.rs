//! Turns plan frames into when things begin: how a prompt repeats itself in time, and how well what comes next keeps to it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::manner::rise;
use crate::metrics::correlation;
use crate::plan::PlanFrame;

/// Frames after which a rhythm may come again: 0.2 to 2 s at 16 kHz.
const LAGS: Range<usize> = 6..64;
/// Frames before those that come which are compared with what was expected, too: a stretch alone is short.
const BEFORE: usize = 8;
/// Rises that are remembered: as many as are compared and as lags reach before them.
const REMEMBERED: usize = BEFORE + LAGS.end - 1;
/// Fewest frames that tell of a rhythm: 2.6 s at 16 kHz.
const FEWEST: usize = 80;

/// A prompt's rhythm, and where in it the music is.
///
/// Something begins where bands rise. What begins now is expected from what began before: by the autocorrelation of the prompt's rises,
/// which is high at its beats, its bars and their halves, whatever they are (tempo by autocorrelation: Ellis, 2007).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rhythm {
    /// How much the prompt's rises are like those before them, for each of [`LAGS`]; what is unlike counts as nothing. Empty where that
    /// could not be told.
    pulse: Vec<f32>,
    /// What bands rose by in the last frames, oldest first.
    rises: Vec<f32>,
    /// The last frame, `[n_bands]`.
    last: Vec<f32>,
}

impl Rhythm {
    /// Of the frames of a prompt, `[n_bands]` each, and at their end.
    pub fn of<'a>(frames: impl Iterator<Item = &'a [f32]>) -> Self {
        let frames: Vec<&[f32]> = frames.collect();
        if frames.len() < FEWEST {
            return Self::default();
        }
        let rises: Vec<f32> = frames.windows(2).map(|pair| rise(pair[1], pair[0])).collect();
        Self {
            pulse: LAGS.map(|lag| correlation(&rises[lag..], &rises[..rises.len() - lag]).max(0.0)).collect(),
            last: frames.last().map_or(Vec::new(), |frame| frame.to_vec()),
            rises: rises[rises.len() - REMEMBERED..].to_vec(),
        }
    }

    /// Whether a rhythm could be told, and enough is remembered.
    fn is_known(&self) -> bool {
        !self.pulse.is_empty() && self.rises.len() >= REMEMBERED
    }

    /// Goes on by a frame that is planned, or given.
    pub fn hear(&mut self, bands: &[f32]) {
        if self.is_known() {
            self.rises.push(rise(bands, &self.last));
            self.rises.remove(0);
            self.last.clear();
            self.last.extend_from_slice(bands);
        }
    }

    /// How far off the beat things begin in the frames that come next: 0 where they rise as is expected, 1 where they have nothing to do
    /// with it, 2 where they rise when nothing should; 0 where nothing is known.
    pub fn offbeat(&self, frames: &[PlanFrame]) -> f32 {
        if !self.is_known() {
            return 0.0;
        }
        let mut rises = self.rises.clone();
        let mut before = &self.last;
        for frame in frames {
            rises.push(rise(&frame.bands, before));
            before = &frame.bands;
        }
        let expected = |t: usize| LAGS.zip(&self.pulse).map(|(lag, like)| like * rises[t - lag]).sum();
        let from = self.rises.len() - BEFORE;
        let expected: Vec<f32> = (from..rises.len()).map(expected).collect();
        1.0 - correlation(&expected, &rises[from..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of four bands in which a note begins every `period` frames, first at `first`, and dies away.
    fn struck(n: usize, period: usize, first: usize) -> Vec<Vec<f32>> {
        let since = |k: usize| (k + 10 * period - first) % period;
        (0..n).map(|k| vec![-1.0 - 0.2 * since(k) as f32; 4]).collect()
    }

    fn rhythm(frames: &[Vec<f32>]) -> Rhythm {
        Rhythm::of(frames.iter().map(Vec::as_slice))
    }

    fn plan(frames: &[Vec<f32>]) -> Vec<PlanFrame> {
        frames.iter().map(|bands| PlanFrame { tokens: Vec::new(), bands: bands.clone() }).collect()
    }

    #[test]
    fn what_keeps_the_beat_is_nearer_than_what_comes_late_or_at_another_pace() {
        let heard = rhythm(&struck(120, 10, 3));
        // The prompt ends with frame 119; its beats go on at 123, 133.
        let far = |period: usize, first: usize| heard.offbeat(&plan(&struck(16, period, first)));
        let (in_time, late, slower) = (far(10, 3), far(10, 8), far(13, 3));
        assert!(in_time < 0.1, "{in_time}");
        assert!(late > 0.5 && slower > in_time + 0.1, "{late} {slower}");
    }

    #[test]
    fn it_goes_on_with_what_is_heard() {
        let frames = struck(150, 10, 3);
        let mut heard = rhythm(&frames[..120]);
        frames[120..].iter().for_each(|frame| heard.hear(frame));
        let next = plan(&struck(166, 10, 3)[150..]);
        assert!(heard.offbeat(&next) < 0.1);
        assert!(rhythm(&frames[..120]).offbeat(&plan(&struck(171, 10, 3)[155..])) > 0.5);
    }

    #[test]
    fn nothing_is_expected_after_too_little_or_where_nothing_begins() {
        let mut short = rhythm(&struck(FEWEST - 1, 10, 3));
        short.hear(&[0.0; 4]);
        assert_eq!((short.offbeat(&plan(&struck(16, 10, 3))), &short), (0.0, &Rhythm::default()));
        let held = rhythm(&vec![vec![-1.0; 4]; 100]);
        assert_eq!(held.offbeat(&plan(&struck(16, 10, 3))), 1.0);
    }
}
