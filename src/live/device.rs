//! Turns a name into a device, its rate and channels, a [`Pull`] into sound on it, and what it hears into an [`Ear`].

use super::ring::MOST_CHANNELS;
use super::{Ear, Pull};

/// Why nothing is heard; every message says the way out.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// There is no way to any device.
    #[error("no way to any sound device: {reason}; {WAYS_OUT}")]
    NoHost { reason: String },
    /// There are ways, but no device.
    #[error("there is no sound device; connect one, or play without one (--no-audio)")]
    NoDevice,
    /// There are devices, but none that hears.
    #[error("there is nothing to listen to: no microphone and no other input; connect one (see --list-devices)")]
    NoInput,
    /// None has this name.
    #[error("no sound device is called '{name}'; there are: {names} (see --list-devices)")]
    Unknown { name: String, names: String },
    /// It is there and refuses.
    #[error("{name}: {reason}; another program may have it, so close that one or choose another (see --list-devices)")]
    Refused { name: String, reason: String },
}

#[cfg(all(target_os = "linux", not(feature = "live")))]
const WAYS_OUT: &str = "start PulseAudio or PipeWire (Debian, Ubuntu: apt-get install pulseaudio, or pipewire-pulse), or build \
with ALSA (apt-get install libasound2-dev, then cargo build --release --features live), or play without a device (--no-audio)";
#[cfg(not(all(target_os = "linux", not(feature = "live"))))]
const WAYS_OUT: &str = "check that a device is connected and not disabled, or play without a device (--no-audio)";

/// What leads to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Host {
    /// A PulseAudio or PipeWire server.
    Pulse,
    /// The system's own: ALSA, CoreAudio, WASAPI.
    Card,
}

/// What a device is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// It plays.
    Output,
    /// It hears: a microphone, an instrument's input, or what another device plays.
    Input,
}

/// Something that plays or hears.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Device {
    pub host: Host,
    pub direction: Direction,
    /// What `--device` or `--source` takes.
    pub name: String,
    /// For people.
    pub description: String,
    pub sample_rate: u32,
    pub channels: usize,
    pub is_default: bool,
}

/// A device that plays, or listens, until this is dropped.
pub trait Running: Send {
    /// Device's own delay, ms, as far as it is known.
    fn latency_ms(&self) -> f64;

    /// What went wrong since it began, if anything did.
    fn error(&self) -> Option<String> {
        None
    }
}

/// All devices of all hosts.
///
/// # Errors
/// No host answers.
pub fn list() -> Result<Vec<Device>, LiveError> {
    let (mut devices, mut reasons) = (Vec::new(), Vec::new());
    let mut answered = false;
    #[cfg(target_os = "linux")]
    match super::pulse::devices() {
        Ok(found) => (devices.extend(found), answered = true).0,
        Err(reason) => reasons.push(reason),
    }
    #[cfg(any(feature = "live", target_os = "macos", target_os = "windows"))]
    match super::card::devices() {
        Ok(found) => (devices.extend(found), answered = true).0,
        Err(reason) => reasons.push(reason),
    }
    devices.retain(|device| (1..=MOST_CHANNELS).contains(&device.channels));
    // Every host has its own; the first host's is the default.
    for direction in [Direction::Output, Direction::Input] {
        let defaults = devices.iter_mut().filter(|device| device.is_default && device.direction == direction);
        defaults.skip(1).for_each(|device| device.is_default = false);
    }
    if answered { Ok(devices) } else { Err(LiveError::NoHost { reason: reasons.join("; ") }) }
}

/// The device of this direction and name, or part of a name or description that only one has; without a name the default one.
///
/// # Errors
/// There is none, or no host.
pub fn find(direction: Direction, name: Option<&str>) -> Result<Device, LiveError> {
    let devices: Vec<Device> = list()?.into_iter().filter(|device| device.direction == direction).collect();
    match direction {
        Direction::Input if devices.is_empty() => Err(LiveError::NoInput),
        _ => choose(devices, name),
    }
}

fn choose(devices: Vec<Device>, name: Option<&str>) -> Result<Device, LiveError> {
    let names = devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
    let Some(name) = name else {
        let default = devices.iter().position(|device| device.is_default).unwrap_or(0);
        return devices.into_iter().nth(default).ok_or(LiveError::NoDevice);
    };
    if let Some(exact) = devices.iter().find(|device| device.name == name) {
        return Ok(exact.clone());
    }
    let part = name.to_lowercase();
    let has = |text: &str| text.to_lowercase().contains(&part);
    let mut alike = devices.into_iter().filter(|device| has(&device.name) || has(&device.description));
    match (alike.next(), alike.next()) {
        (Some(only), None) if !part.is_empty() => Ok(only),
        _ => Err(LiveError::Unknown { name: name.to_owned(), names }),
    }
}

/// Plays what `pull` gives, whose channels are the device's, at the device's rate.
///
/// # Errors
/// The device is gone or refuses.
pub fn play(device: &Device, pull: Pull) -> Result<Box<dyn Running>, LiveError> {
    let running = match device.host {
        #[cfg(target_os = "linux")]
        Host::Pulse => super::pulse::play(device, pull),
        #[cfg(any(feature = "live", target_os = "macos", target_os = "windows"))]
        Host::Card => super::card::play(device, pull),
        #[allow(unreachable_patterns)]
        _ => Err(NO_WAY.into()),
    };
    running.map_err(|reason| LiveError::Refused { name: device.name.clone(), reason })
}

/// Gives `ear`, whose channels are the device's, what the device hears, at its rate.
///
/// # Errors
/// The device is gone or refuses.
pub fn listen(device: &Device, ear: Ear) -> Result<Box<dyn Running>, LiveError> {
    let running = match device.host {
        #[cfg(target_os = "linux")]
        Host::Pulse => super::pulse::listen(device, ear),
        #[cfg(any(feature = "live", target_os = "macos", target_os = "windows"))]
        Host::Card => super::card::listen(device, ear),
        #[allow(unreachable_patterns)]
        _ => Err(NO_WAY.into()),
    };
    running.map_err(|reason| LiveError::Refused { name: device.name.clone(), reason })
}

const NO_WAY: &str = "this program was built without the way to it";

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, description: &str, is_default: bool) -> Device {
        let (name, description) = (name.into(), description.into());
        let (host, direction) = (Host::Pulse, Direction::Output);
        Device { host, direction, name, description, sample_rate: 48_000, channels: 2, is_default }
    }

    #[test]
    fn devices_are_found_by_name_and_by_an_unambiguous_part_of_it() {
        let all = || vec![device("hw.0", "Front Speakers", false), device("hw.1", "HDMI", true)];
        let name = |wanted| choose(all(), wanted).map(|device| device.name).map_err(|e| e.to_string());
        assert_eq!(name(None).unwrap(), "hw.1");
        assert_eq!(name(Some("hw.0")).unwrap(), "hw.0");
        assert_eq!(name(Some("speak")).unwrap(), "hw.0");
        for wrong in ["hw", "nothing", ""] {
            assert!(name(Some(wrong)).unwrap_err().contains("hw.0, hw.1"), "{wrong}");
        }
        assert!(matches!(choose(Vec::new(), None), Err(LiveError::NoDevice)));
    }
}
