//! Turns frames that come in pieces into frames that a sound card takes when it likes: a lock-free ring with soft edges.
//!
//! The [`Pull`] half is what runs in the card's callback: it never locks, allocates or logs. Where the ring runs dry it lets the
//! last frame fade, counts an underrun, and fades in again when there is more. As long as it does not run dry, what comes out
//! is what went in, bit for bit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rtrb::{Consumer, Producer, RingBuffer};

/// Most channels of a device.
pub const MOST_CHANNELS: usize = 32;
/// Seconds of a fade around an underrun.
const FADE_S: f64 = 0.005;

/// What both halves know.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames that the device has taken, silence included.
    taken: AtomicU64,
    underruns: AtomicU64,
    /// Frames that were missing.
    missing: AtomicU64,
    /// Nothing more will come: running dry is no underrun.
    ended: AtomicBool,
    /// The device has dropped its half.
    gone: AtomicBool,
}

impl Counters {
    /// Frames that the device has taken, silence included.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Times that the device wanted more than there was, or had itself nothing left to play.
    pub fn underruns(&self) -> u64 {
        self.underruns.load(Relaxed)
    }

    /// The device itself came too late for its own buffer.
    pub fn count_underrun(&self) {
        self.underruns.fetch_add(1, Relaxed);
    }

    /// Whether the device has dropped its half.
    pub fn device_is_gone(&self) -> bool {
        self.gone.load(Relaxed)
    }

    /// Frames of silence instead of sound.
    pub fn missing(&self) -> u64 {
        self.missing.load(Relaxed)
    }
}

/// The half that frames go into.
pub struct Feed {
    producer: Producer<f32>,
    channels: usize,
    counters: Arc<Counters>,
}

/// The half that a device takes frames out of.
pub struct Pull {
    consumer: Consumer<f32>,
    channels: usize,
    counters: Arc<Counters>,
    /// The last frame before the ring ran dry, and how much of it is still heard.
    last: [f32; MOST_CHANNELS],
    last_gain: f32,
    /// How much of what comes is heard: 1 but after an underrun.
    gain: f32,
    /// Per frame.
    step: f32,
    dry: bool,
}

/// A ring of this many frames of `channels` samples, at `sample_rate` Hz.
///
/// # Panics
/// No channel, or more than [`MOST_CHANNELS`].
pub fn ring(frames: usize, channels: usize, sample_rate: u32) -> (Feed, Pull) {
    assert!((1..=MOST_CHANNELS).contains(&channels), "{channels} channels");
    let (producer, consumer) = RingBuffer::new(frames * channels);
    let counters = Arc::new(Counters::default());
    let step = 1.0 / (FADE_S * f64::from(sample_rate)).max(1.0) as f32;
    let last = [0.0; MOST_CHANNELS];
    let pull =
        Pull { consumer, channels, counters: counters.clone(), last, last_gain: 0.0, gain: 1.0, step, dry: false };
    (Feed { producer, channels, counters }, pull)
}

impl Feed {
    /// Frames that there is room for.
    pub fn room(&self) -> usize {
        self.producer.slots() / self.channels
    }

    /// Frames that wait to be taken.
    pub fn waiting(&self) -> usize {
        (self.producer.buffer().capacity() - self.producer.slots()) / self.channels
    }

    /// Takes as many whole frames as there is room for; gives their number.
    pub fn push(&mut self, interleaved: &[f32]) -> usize {
        let n = self.room().min(interleaved.len() / self.channels);
        let whole = self.producer.push_entire_slice(&interleaved[..n * self.channels]);
        if whole.is_ok() { n } else { 0 }
    }

    /// Says that nothing more will come.
    pub fn end(&self) {
        self.counters.ended.store(true, Relaxed);
    }

    /// Whether the device has dropped its half.
    pub fn is_abandoned(&self) -> bool {
        self.counters.device_is_gone()
    }

    /// What both halves know.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.counters.gone.store(true, Relaxed);
    }
}

impl Pull {
    /// Samples per frame.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// What both halves know.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Fills `out`, whole interleaved frames; what there is not is a fade and then silence.
    pub fn fill(&mut self, out: &mut [f32]) {
        let channels = self.channels;
        let frames = out.len() / channels;
        let n = frames.min(self.consumer.slots() / channels);
        let (heard, missing) = out.split_at_mut(n * channels);
        // There are as many slots, and only this half takes any.
        let _ = self.consumer.pop_entire_slice(heard);
        if n > 0 {
            self.dry = false;
            for frame in heard.chunks_exact_mut(channels) {
                if self.gain >= 1.0 && self.last_gain <= 0.0 {
                    break;
                }
                self.soften(frame);
            }
            self.last[..channels].copy_from_slice(&heard[(n - 1) * channels..]);
        }
        if n < frames {
            if !self.dry {
                (self.dry, self.last_gain, self.gain) = (true, 1.0, 0.0);
                if !self.counters.ended.load(Relaxed) {
                    self.counters.count_underrun();
                }
            }
            if !self.counters.ended.load(Relaxed) {
                self.counters.missing.fetch_add((frames - n) as u64, Relaxed);
            }
            for frame in missing.chunks_exact_mut(channels) {
                self.last_gain = (self.last_gain - self.step).max(0.0);
                for (x, last) in frame.iter_mut().zip(&self.last) {
                    *x = last * self.last_gain;
                }
            }
            missing.chunks_exact_mut(channels).into_remainder().fill(0.0);
        }
        self.counters.taken.fetch_add(frames as u64, Relaxed);
    }

    /// What comes after an underrun begins softly, over what is left of the fade.
    fn soften(&mut self, frame: &mut [f32]) {
        self.gain = (self.gain + self.step).min(1.0);
        self.last_gain = (self.last_gain - self.step).max(0.0);
        for (x, last) in frame.iter_mut().zip(&self.last) {
            *x = *x * self.gain + last * self.last_gain;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However it is pushed and pulled, no frame is lost, doubled or changed, and silence is counted.
        #[test]
        fn what_comes_out_is_what_went_in(
            channels in 1usize..7,
            capacity in 1usize..300,
            moves in prop::collection::vec((any::<bool>(), 1usize..200), 1..200),
        ) {
            // A fade of one frame: what was played is either exact or counted as missing.
            let (mut feed, mut pull) = ring(capacity, channels, 1);
            let (mut next_in, mut next_out) = (0u32, 0u32);
            let mut fading = false;
            for (push, n) in moves {
                if push {
                    let frames: Vec<f32> =
                        (0..n as u32).flat_map(|i| (0..channels as u32).map(move |c| ((next_in + i) * 8 + c + 1) as f32)).collect();
                    let room = feed.room();
                    prop_assert_eq!(room + feed.waiting(), capacity);
                    let pushed = feed.push(&frames);
                    prop_assert_eq!(pushed, n.min(room));
                    next_in += pushed as u32;
                } else {
                    let waiting = feed.waiting();
                    let missing = feed.counters().missing();
                    let mut out = vec![f32::NAN; n * channels];
                    pull.fill(&mut out);
                    let whole = n.min(waiting);
                    prop_assert_eq!(feed.counters().missing() - missing, (n - whole) as u64);
                    for (i, frame) in out.chunks(channels).enumerate() {
                        for (c, &x) in frame.iter().enumerate() {
                            if i < whole && !fading {
                                prop_assert_eq!(x, (next_out * 8 + c as u32 + 1) as f32);
                            }
                            prop_assert!(x.is_finite());
                        }
                        if i < whole {
                            next_out += 1;
                            fading = false;
                        }
                    }
                    fading |= whole < n;
                }
            }
            prop_assert_eq!(feed.waiting() as u32, next_in - next_out);
        }
    }

    #[test]
    fn an_underrun_fades_out_and_in_without_a_step() {
        let (mut feed, mut pull) = ring(4800, 2, 48_000);
        let mut out = Vec::new();
        let take = |pull: &mut Pull, n: usize, out: &mut Vec<f32>| {
            let mut frames = vec![0.0; 2 * n];
            pull.fill(&mut frames);
            out.extend(frames);
        };
        assert_eq!(feed.push(&[0.5; 2 * 1000]), 1000);
        take(&mut pull, 1500, &mut out);
        feed.push(&[0.5; 2 * 1000]);
        take(&mut pull, 1000, &mut out);
        assert_eq!((feed.counters().underruns(), feed.counters().missing(), feed.counters().taken()), (1, 500, 2500));
        let steepest = out.chunks(2).zip(out.chunks(2).skip(1)).map(|(a, b)| (a[0] - b[0]).abs()).fold(0.0, f32::max);
        assert!(steepest < 0.5 / 200.0, "a step of {steepest}");
        assert_eq!(out[2 * 1400], 0.0);
        assert_eq!(out[2 * 2400], 0.5);
        feed.end();
        take(&mut pull, 300, &mut out);
        assert_eq!(feed.counters().underruns(), 1, "the end is no underrun");
    }

    #[test]
    fn a_device_that_is_gone_is_noticed() {
        let (feed, pull) = ring(10, 1, 8000);
        assert!(!feed.is_abandoned());
        drop(pull);
        assert!(feed.is_abandoned());
    }

    #[test]
    fn two_threads_lose_nothing() {
        let (mut feed, mut pull) = ring(256, 2, 48_000);
        let n = 200_000;
        let feeder = std::thread::spawn(move || {
            let mut at = 0;
            while at < n {
                let frames: Vec<f32> = (at..(at + 97).min(n)).flat_map(|i| [i as f32, -(i as f32)]).collect();
                at += feed.push(&frames);
            }
        });
        let (mut next, mut out) = (0usize, [0.0; 2 * 64]);
        while next < n {
            // Only what is there, so that nothing fades.
            let there = pull.consumer.slots() / 2;
            let part = &mut out[..2 * there.min(64)];
            pull.fill(part);
            for frame in part.chunks(2) {
                assert_eq!(frame, [next as f32, -(next as f32)]);
                next += 1;
            }
        }
        feeder.join().unwrap();
    }
}
