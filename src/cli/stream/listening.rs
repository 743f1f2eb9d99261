//! Hears a musician out, and prepares a voice that goes on from there, in time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use wavegen::live::control::MOST_LISTEN_S;
use wavegen::live::ear::ear;
use wavegen::live::{Direction, Heard, Running, device};

/// How much longer a device may take than what it hears.
const PATIENCE: Duration = Duration::from_secs(2);

/// An input that is being listened to.
pub struct Listening {
    /// Of the device.
    pub name: String,
    pub heard: Heard,
    pub input: Box<dyn Running>,
    until: Instant,
}

impl Listening {
    /// Listens from `deaf_s` seconds after now on, for so many seconds or as many as a model hears.
    pub fn start(source: Option<&str>, seconds: Option<f64>, deaf_s: f64) -> Result<Self> {
        let device = device::find(Direction::Input, source)?;
        let seconds = seconds.unwrap_or(MOST_LISTEN_S);
        let frames = |seconds: f64| (seconds * f64::from(device.sample_rate)) as usize;
        let (ear, heard) = ear(frames(deaf_s), frames(seconds), device.channels, device.sample_rate);
        let input = device::listen(&device, ear)?;
        let until = Instant::now() + Duration::from_secs_f64(deaf_s + seconds) + PATIENCE;
        Ok(Self { name: device.description, heard, input, until })
    }

    /// Whether all was heard that is to be heard; an error where the device gives out.
    pub fn is_done(&self) -> Result<bool> {
        if self.heard.is_full() {
            return Ok(true);
        }
        match self.input.error() {
            Some(error) => bail!("{}: {error}", self.name),
            None if Instant::now() > self.until => bail!("{}: gives no sound; is it the right --source?", self.name),
            None => Ok(false),
        }
    }
}
