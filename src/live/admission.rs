//! Turns the times of a few steps into whether a machine is fast enough, and how much it has to buffer.

use std::time::Instant;

use serde::Serialize;

use super::{Change, Conductor};
use crate::generate::GenerateError;

/// Plan frames that are measured: 2 s of sound, which the governor wants made anyway.
const FRAMES: usize = 62;
/// Of them made before it is asked to turn.
const BEFORE_TURN: usize = 4;
/// Slower than this is too slow to play: what a machine does beside takes the rest.
const LEAST_X_REAL_TIME: f64 = 1.1;
/// Least and largest buffer that is chosen, ms. A request is heard a buffer, a step of 32 ms (two where it changes what is planned) and the resampler's and the treble's 46 ms later.
const BUFFER_MS: [f64; 2] = [40.0, 2000.0];

/// How long steps take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Speed {
    pub x_real_time: f64,
    /// Median and 99.9th percentile of the time that a step takes, a plan frame or a look at a way on, ms.
    pub p50_ms: f64,
    pub p999_ms: f64,
    /// How long a request takes until the first plan frame that follows it is there, ms.
    pub turn_ms: f64,
    /// What a plan frame lasts, ms.
    pub frame_ms: f64,
}

/// What follows from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Admission {
    /// It can play with this many ms of buffer.
    Play { buffer_ms: f64 },
    /// It cannot keep up.
    TooSlow,
}

impl Speed {
    /// Runs the conductor ahead and measures.
    ///
    /// # Errors
    /// The engine's own.
    pub fn measure(conductor: &mut Conductor) -> Result<Self, GenerateError> {
        let ms = |begun: Instant| 1e3 * begun.elapsed().as_secs_f64();
        let mut times_ms = Vec::with_capacity(2 * FRAMES);
        let (mut turn_ms, mut frames) = (0.0, 0);
        // Not every step makes a frame.
        while frames < FRAMES {
            let begun = Instant::now();
            if times_ms.len() == BEFORE_TURN && turn_ms == 0.0 {
                // Changes nothing, at the price of a change.
                conductor.apply(Change::Follow(None))?;
                conductor.advance()?;
                turn_ms = ms(begun);
            } else {
                frames += usize::from(conductor.advance()?);
                times_ms.push(ms(begun));
            }
        }
        Ok(Self::of(&mut times_ms, frames, turn_ms, 1e3 * conductor.step_s()))
    }

    fn of(times_ms: &mut [f64], frames: usize, turn_ms: f64, frame_ms: f64) -> Self {
        times_ms.sort_by(f64::total_cmp);
        let at = |share: f64| times_ms.get((share * times_ms.len() as f64) as usize).copied().unwrap_or_default();
        let mean = times_ms.iter().sum::<f64>() / frames.max(1) as f64;
        Self { x_real_time: frame_ms / mean.max(1e-6), p50_ms: at(0.5), p999_ms: at(0.999), turn_ms, frame_ms }
    }

    /// Whether to play, given the buffer that was asked for (ms) and how long it is to last (seconds; `None`: for ever).
    pub fn admit(&self, buffer_ms: Option<f64>, seconds: Option<f64>) -> Admission {
        if self.x_real_time >= LEAST_X_REAL_TIME {
            return Admission::Play { buffer_ms: buffer_ms.unwrap_or(self.needed_ms(0.0)).max(self.frame_ms) };
        }
        // Too slow for ever, but perhaps not for a while.
        match (buffer_ms, seconds) {
            (Some(buffer_ms), Some(seconds)) if self.needed_ms(seconds) <= buffer_ms => Admission::Play { buffer_ms },
            _ => Admission::TooSlow,
        }
    }

    /// The buffer that it takes to play for so many seconds, ms.
    pub fn needed_ms(&self, seconds: f64) -> f64 {
        // The slowest step that was ever seen, three times over, or a request, twice over, and the buffer still holds.
        let needed = (3.0 * self.p999_ms).max(2.0 * self.turn_ms).clamp(BUFFER_MS[0], BUFFER_MS[1]);
        1e3 * seconds * (1.0 - self.x_real_time).max(0.0) + needed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(step_ms: f64, slow_ms: f64, turn_ms: f64) -> Speed {
        let mut times = vec![step_ms; 61];
        times.push(slow_ms);
        Speed::of(&mut times, 62, turn_ms, 32.0)
    }

    #[test]
    fn buffers_grow_with_the_slowest_step_and_slow_machines_are_refused() {
        assert_eq!(speed(5.0, 6.0, 0.0).admit(None, None), Admission::Play { buffer_ms: 40.0 });
        assert_eq!(speed(5.0, 6.0, 35.0).admit(None, None), Admission::Play { buffer_ms: 70.0 });
        assert_eq!(speed(5.0, 80.0, 35.0).admit(None, None), Admission::Play { buffer_ms: 240.0 });
        assert_eq!(speed(5.0, 80.0, 0.0).admit(Some(500.0), None), Admission::Play { buffer_ms: 500.0 });
        assert_eq!(speed(31.0, 32.0, 0.0).admit(Some(500.0), None), Admission::TooSlow);
        // 10 s at half speed need 5 s ahead.
        assert_eq!(speed(64.0, 64.0, 0.0).admit(Some(4000.0), Some(10.0)), Admission::TooSlow);
        assert_eq!(speed(64.0, 64.0, 0.0).admit(Some(6000.0), Some(10.0)), Admission::Play { buffer_ms: 6000.0 });
        let (s, seconds) = (speed(64.0, 700.0, 900.0), 10.0);
        let buffer_ms = s.needed_ms(seconds);
        assert_eq!(s.admit(Some(buffer_ms), Some(seconds)), Admission::Play { buffer_ms });
        assert_eq!(s.admit(Some(buffer_ms - 1.0), Some(seconds)), Admission::TooSlow);
        let s = speed(5.0, 80.0, 0.0);
        assert_eq!((s.p50_ms, s.p999_ms), (5.0, 80.0));
        // Looks at ways on take as long again as the frames do.
        let s = Speed::of(&mut [20.0; 62], 31, 0.0, 32.0);
        assert_eq!((s.x_real_time, s.admit(None, None)), (0.8, Admission::TooSlow));
    }
}
