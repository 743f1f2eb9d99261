//! Turns frames of a ring into sound on a device that may be lost and come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use wavegen::live::clock::RealClock;
use wavegen::live::ring::{Counters, ring};
use wavegen::live::{Device, Direction, Feed, Pull, Running, device};

/// A device that took nothing for so long, not even silence, is lost.
const LOST: Duration = Duration::from_secs(2);
/// How often a lost device is looked for.
const RETRY: Duration = Duration::from_secs(1);

/// Where the sound goes.
pub struct Outlet {
    /// `None`: nowhere.
    pub device: Option<Device>,
    pub shape: (u32, usize),
    pub ring_frames: usize,
    /// For the device, until that begins.
    pub pull: Option<Pull>,
    pub playing: Option<Box<dyn Running>>,
    pub counters: Arc<Counters>,
    /// Underruns and missing frames of devices that are gone.
    pub before: [u64; 2],
    /// Frames taken when this was last looked at, and when that changed.
    pub taken: (u64, Instant),
    /// When a lost device was last looked for.
    pub lost: Option<Instant>,
}

impl Outlet {
    pub fn underruns(&self) -> (u64, u64) {
        (self.before[0] + self.counters.underruns(), self.before[1] + self.counters.missing())
    }

    /// Device's own delay, ms.
    pub fn latency_ms(&self) -> f64 {
        self.playing.as_ref().map_or(0.0, |playing| playing.latency_ms())
    }

    /// The device begins.
    pub fn begin(&mut self) -> Result<()> {
        let Some(pull) = self.pull.take() else { return Ok(()) };
        self.playing = Some(match &self.device {
            Some(device) => device::play(device, pull)?,
            None => Box::new(RealClock::start(pull, self.shape.0)),
        });
        self.taken = (0, Instant::now());
        Ok(())
    }

    /// Why the device is lost, if it just was.
    pub fn loss(&mut self) -> Option<String> {
        // A clock cannot be lost.
        let (Some(playing), Some(_)) = (&self.playing, &self.device) else { return None };
        let taken = self.counters.taken();
        if taken != self.taken.0 {
            self.taken = (taken, Instant::now());
        }
        let reason = match playing.error() {
            Some(error) => error,
            None if self.counters.device_is_gone() => "the connection is gone".to_owned(),
            None if self.taken.1.elapsed() > LOST => "it takes no more sound".to_owned(),
            None => return None,
        };
        self.playing = None;
        self.lost = Some(Instant::now());
        Some(reason)
    }

    /// Looks for a lost device, or another where none was asked for by name.
    pub fn reopen(&mut self, name: Option<&str>) -> Option<(String, Feed)> {
        if self.lost?.elapsed() < RETRY {
            return None;
        }
        let (sample_rate, channels) = self.shape;
        let found = device::find(Direction::Output, name);
        self.lost = Some(Instant::now());
        let found = found.ok()?;
        // A server takes any rate and channels; of others only the same will do.
        let device = if found.host == device::Host::Pulse { Device { sample_rate, channels, ..found } } else { found };
        if (device.sample_rate, device.channels) != self.shape {
            return None;
        }
        let (feed, pull) = ring(self.ring_frames, channels, sample_rate);
        self.playing = Some(device::play(&device, pull).ok()?);
        let (underruns, missing) = self.underruns();
        self.before = [underruns, missing];
        self.counters = feed.counters().clone();
        (self.lost, self.taken) = (None, (0, Instant::now()));
        Some((device.description, feed))
    }
}
