//! Turns a [`Pull`] into sound through the system's own interface, ALSA, CoreAudio or WASAPI, by cpal, and what that hears into an
//! [`Ear`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cpal::traits::{DeviceTrait, HostTrait, StreamTrait};
use cpal::{BufferSize, FromSample, Sample, SampleFormat, SizedSample, StreamConfig, SupportedStreamConfig};

use super::device::{Direction, Host};
use super::{Device, Ear, Pull, Running};

/// Frames of a callback that are converted at a time.
const BLOCK: usize = 1024;
/// Longer than this nobody waits for the end.
const MOST_LATENCY_MS: f64 = 1000.0;

/// The outputs and inputs of the default host, but those that another program has: they cannot be asked what they take. If there
/// are no others, that is the error.
pub fn devices() -> Result<Vec<Device>, String> {
    hush();
    let host = cpal::default_host();
    let mut busy = Vec::new();
    let mut device = |direction, device: cpal::Device, default: Option<&cpal::DeviceId>| {
        let id = device.id().ok()?;
        let config = match config_of(direction, &device) {
            Ok(config) => config,
            Err(error) => {
                if error.kind() == cpal::ErrorKind::DeviceBusy {
                    busy.push(id.to_string());
                }
                return None;
            }
        };
        Some(Device {
            host: Host::Card,
            direction,
            is_default: default == Some(&id),
            name: id.to_string(),
            description: device.to_string(),
            sample_rate: config.sample_rate(),
            channels: config.channels().into(),
        })
    };
    let mut found = Vec::new();
    for direction in [Direction::Output, Direction::Input] {
        let default = match direction {
            Direction::Output => host.default_output_device(),
            Direction::Input => host.default_input_device(),
        };
        let default = default.and_then(|device| device.id().ok());
        found.extend(all(direction)?.into_iter().filter_map(|one| device(direction, one, default.as_ref())));
    }
    match found.is_empty() && !busy.is_empty() {
        true => Err(format!("another program has {}: close it", busy.join(", "))),
        false => Ok(found),
    }
}

fn all(direction: Direction) -> Result<Vec<cpal::Device>, String> {
    let host = cpal::default_host();
    let devices: Result<Vec<_>, _> = match direction {
        Direction::Output => host.output_devices().map(Iterator::collect),
        Direction::Input => host.input_devices().map(Iterator::collect),
    };
    devices.map_err(|error| error.to_string())
}

fn config_of(direction: Direction, device: &cpal::Device) -> Result<SupportedStreamConfig, cpal::Error> {
    match direction {
        Direction::Output => device.default_output_config(),
        Direction::Input => device.default_input_config(),
    }
}

/// The device again, and its configuration, which must still be what it was.
fn again(device: &Device) -> Result<(cpal::Device, SupportedStreamConfig), String> {
    hush();
    let found = all(device.direction)?
        .into_iter()
        .find(|found| found.id().is_ok_and(|id| id.to_string() == device.name))
        .ok_or_else(|| "it is gone".to_owned())?;
    let config = config_of(device.direction, &found).map_err(|error| error.to_string())?;
    match (config.sample_rate(), usize::from(config.channels())) == (device.sample_rate, device.channels) {
        true => Ok((found, config)),
        false => Err("its rate or channels have changed".into()),
    }
}

/// Opens a stream on the output of this name.
pub fn play(device: &Device, pull: Pull) -> Result<Box<dyn Running>, String> {
    let (output, config) = again(device)?;
    match config.sample_format() {
        SampleFormat::F32 => play_as::<f32>(&output, &config, pull),
        SampleFormat::I16 => play_as::<i16>(&output, &config, pull),
        SampleFormat::I32 => play_as::<i32>(&output, &config, pull),
        SampleFormat::U8 => play_as::<u8>(&output, &config, pull),
        SampleFormat::U16 => play_as::<u16>(&output, &config, pull),
        format => Err(format!("it takes {format} samples, which wavegen does not give")),
    }
}

/// Opens a stream from the input of this name.
pub fn listen(device: &Device, ear: Ear) -> Result<Box<dyn Running>, String> {
    let (input, config) = again(device)?;
    match config.sample_format() {
        SampleFormat::F32 => hear_as::<f32>(&input, &config, ear),
        SampleFormat::I16 => hear_as::<i16>(&input, &config, ear),
        SampleFormat::I32 => hear_as::<i32>(&input, &config, ear),
        SampleFormat::U8 => hear_as::<u8>(&input, &config, ear),
        SampleFormat::U16 => hear_as::<u16>(&input, &config, ear),
        format => Err(format!("it gives {format} samples, which wavegen does not take")),
    }
}

/// Keeps ALSA from writing to the terminal what cpal reports as errors, or what is none: devices that it looked for in vain.
fn hush() {
    #[cfg(target_os = "linux")]
    // Without it the terminal is full and all else works.
    let _ = alsa::Output::local_error_handler();
}

/// As it is, in pieces of whatever size the device likes.
fn plain(config: &SupportedStreamConfig) -> StreamConfig {
    StreamConfig { channels: config.channels(), sample_rate: config.sample_rate(), buffer_size: BufferSize::Default }
}

/// What to do about errors of a stream: count those that are gaps, remember the others.
fn errors(
    told: Arc<Mutex<Option<String>>>,
    gap: impl Fn() + Send + 'static,
) -> impl FnMut(cpal::Error) + Send + 'static {
    use cpal::ErrorKind::{DeviceChanged, RealtimeDenied, Xrun};
    move |error| match error.kind() {
        DeviceChanged | RealtimeDenied => {}
        Xrun => gap(),
        _ => *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string()),
    }
}

fn play_as<T: SizedSample + FromSample<f32>>(
    output: &cpal::Device,
    config: &SupportedStreamConfig,
    mut pull: Pull,
) -> Result<Box<dyn Running>, String> {
    let error = Arc::new(Mutex::new(None));
    let latency_us = Arc::new(AtomicU64::new(0));
    let measured_us = latency_us.clone();
    let (channels, counters) = (pull.channels(), pull.counters().clone());
    let mut block = vec![0.0f32; BLOCK * channels];
    let callback = move |out: &mut [T], info: &cpal::OutputCallbackInfo| {
        let at = info.timestamp();
        measured_us.store(at.playback.duration_since(at.callback).as_micros() as u64, Relaxed);
        for out in out.chunks_mut(BLOCK * channels) {
            let samples = &mut block[..out.len()];
            pull.fill(samples);
            out.iter_mut().zip(samples).for_each(|(y, x)| *y = T::from_sample(*x));
        }
    };
    let on_error = errors(error.clone(), move || counters.count_underrun());
    let stream = output.build_output_stream(plain(config), callback, on_error, None).map_err(|e| e.to_string())?;
    stream.play().map_err(|error| error.to_string())?;
    Ok(Box::new(Card { _stream: stream, error, latency_us, plays: true }))
}

fn hear_as<T: SizedSample>(
    input: &cpal::Device,
    config: &SupportedStreamConfig,
    mut ear: Ear,
) -> Result<Box<dyn Running>, String>
where
    f32: FromSample<T>,
{
    let error = Arc::new(Mutex::new(None));
    let latency_us = Arc::new(AtomicU64::new(0));
    let measured_us = latency_us.clone();
    let per_block = BLOCK * ear.channels();
    let mut block = vec![0.0f32; per_block];
    let callback = move |heard: &[T], info: &cpal::InputCallbackInfo| {
        let at = info.timestamp();
        measured_us.store(at.callback.duration_since(at.capture).as_micros() as u64, Relaxed);
        for heard in heard.chunks(per_block) {
            let samples = &mut block[..heard.len()];
            samples.iter_mut().zip(heard).for_each(|(y, x)| *y = f32::from_sample(*x));
            ear.hear(samples);
        }
    };
    // A gap in what was heard is heard; nothing is to be done about it.
    let on_error = errors(error.clone(), || {});
    let stream = input.build_input_stream(plain(config), callback, on_error, None).map_err(|e| e.to_string())?;
    stream.play().map_err(|error| error.to_string())?;
    Ok(Box::new(Card { _stream: stream, error, latency_us, plays: false }))
}

struct Card {
    _stream: cpal::Stream,
    error: Arc<Mutex<Option<String>>>,
    /// From the last callback until what it gave is heard, or from when it was heard until the callback.
    latency_us: Arc<AtomicU64>,
    plays: bool,
}

impl Running for Card {
    fn latency_ms(&self) -> f64 {
        self.latency_us.load(Relaxed) as f64 / 1e3
    }

    fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // What it was given last is still on its way.
        if self.plays {
            std::thread::sleep(Duration::from_secs_f64((2.0 * self.latency_ms()).min(MOST_LATENCY_MS) / 1e3));
        }
    }
}
