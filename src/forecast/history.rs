//! Keeps the last samples of a stream as one slice, in bounded memory.

use serde::{Deserialize, Serialize};

/// The last `keep` samples pushed, before the first of which there is silence. Saved as just these.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Vec<f32>", into = "Vec<f32>")]
pub(super) struct History {
    keep: usize,
    /// At least `keep` samples; twice as many make it full, and the older half is dropped.
    samples: Vec<f32>,
}

impl History {
    /// `keep` samples of silence.
    pub fn new(keep: usize) -> Self {
        vec![0.0; keep].into()
    }

    /// The next sample.
    pub fn push(&mut self, sample: f32) {
        if self.samples.len() == self.keep + self.keep.max(MIN_SPARE) {
            let oldest_kept = self.samples.len() - self.keep;
            self.samples.copy_within(oldest_kept.., 0);
            self.samples.truncate(self.keep);
        }
        self.samples.push(sample);
    }

    /// How many samples are kept.
    pub fn keep(&self) -> usize {
        self.keep
    }

    /// The `n <= keep` samples that end `back` samples ago, `n + back <= keep`.
    pub fn recent(&self, n: usize, back: usize) -> &[f32] {
        let end = self.samples.len() - back;
        &self.samples[end - n..end]
    }
}

impl From<Vec<f32>> for History {
    fn from(samples: Vec<f32>) -> Self {
        Self { keep: samples.len(), samples }
    }
}

impl From<History> for Vec<f32> {
    fn from(history: History) -> Self {
        history.recent(history.keep, 0).to_vec()
    }
}

/// So that short histories are not moved all the time.
const MIN_SPARE: usize = 1024;
