//! Turns what an input device hears into a clip. The [`Ear`] half is what runs in the device's callback: it never locks, allocates or
//! logs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rtrb::{Consumer, Producer, RingBuffer};

use crate::audio::Clip;

/// The half that a device gives frames to.
pub struct Ear {
    producer: Producer<f32>,
    channels: usize,
    /// Frames that it does not hear yet.
    deaf: usize,
    given: Arc<AtomicU64>,
}

/// The half that keeps them.
pub struct Heard {
    consumer: Consumer<f32>,
    channels: usize,
    sample_rate: u32,
    /// Frames that the device gave, those among them for which there was no room, and frames that were handed out.
    given: Arc<AtomicU64>,
    handed_out: u64,
}

/// Room for `frames` frames of `channels` samples, at `sample_rate` Hz, that come after the first `deaf`.
///
/// # Panics
/// No channel.
pub fn ear(deaf: usize, frames: usize, channels: usize, sample_rate: u32) -> (Ear, Heard) {
    assert!(channels > 0, "no channel");
    let (producer, consumer) = RingBuffer::new(frames * channels);
    let given = Arc::new(AtomicU64::new(0));
    let heard = Heard { consumer, channels, sample_rate, given: given.clone(), handed_out: 0 };
    (Ear { producer, channels, deaf, given }, heard)
}

impl Ear {
    /// Samples per frame.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Takes whole frames, as many as there is room for.
    pub fn hear(&mut self, interleaved: &[f32]) {
        let deaf = self.deaf.min(interleaved.len() / self.channels);
        self.deaf -= deaf;
        let interleaved = &interleaved[deaf * self.channels..];
        let n = interleaved.len() / self.channels;
        let fits = n.min(self.producer.slots() / self.channels);
        // There is room: nobody else fills it.
        let _ = self.producer.push_entire_slice(&interleaved[..fits * self.channels]);
        self.given.fetch_add(n as u64, Relaxed);
    }
}

impl Heard {
    /// Seconds that are kept.
    pub fn seconds(&self) -> f64 {
        (self.consumer.slots() / self.channels) as f64 / f64::from(self.sample_rate)
    }

    /// Whether there is room for no more.
    pub fn is_full(&self) -> bool {
        self.consumer.slots() == self.consumer.buffer().capacity()
    }

    /// Hands out what was heard so far.
    pub fn clip(&mut self) -> Clip {
        let n = self.consumer.slots() / self.channels * self.channels;
        let samples: Vec<f32> = (0..n).map_while(|_| self.consumer.pop().ok()).collect();
        self.handed_out += (n / self.channels) as u64;
        Clip { samples, channels: self.channels, sample_rate: self.sample_rate }
    }

    /// Seconds that have passed since the end of what was handed out, by the device's clock.
    pub fn since_s(&self) -> f64 {
        self.given.load(Relaxed).saturating_sub(self.handed_out) as f64 / f64::from(self.sample_rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_frames_are_kept_until_it_is_full_and_time_goes_on() {
        let (mut ear, mut heard) = ear(30, 100, 2, 1000);
        ear.hear(&[1.0; 40]);
        assert_eq!((heard.seconds(), heard.since_s()), (0.0, 0.0));
        ear.hear(&[[1.0; 20].as_slice(), &[0.5; 60]].concat());
        ear.hear(&[0.25; 61]);
        assert_eq!((heard.seconds(), heard.is_full(), heard.since_s()), (0.06, false, 0.06));
        ear.hear(&[0.125; 120]);
        assert!(heard.is_full());
        let clip = heard.clip();
        assert_eq!((clip.n_frames(), clip.channels, clip.sample_rate), (100, 2, 1000));
        assert_eq!((clip.samples[59], clip.samples[60], clip.samples[199]), (0.5, 0.25, 0.125));
        // Twenty frames found no room; fifty come after.
        assert_eq!(heard.since_s(), 0.02);
        ear.hear(&[0.0; 100]);
        assert_eq!(heard.since_s(), 0.07);
    }
}
