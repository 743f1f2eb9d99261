//! Turns a [`Pull`] into sound through the system's own interface: ALSA, CoreAudio or WASAPI, by cpal.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cpal::traits::{DeviceTrait, HostTrait, StreamTrait};
use cpal::{BufferSize, FromSample, SampleFormat, SizedSample, StreamConfig, SupportedStreamConfig};

use super::device::Host;
use super::{Device, Playing, Pull};

/// Frames of a callback that are converted at a time.
const BLOCK: usize = 1024;
/// Longer than this nobody waits for the end.
const MOST_LATENCY_MS: f64 = 1000.0;

/// The outputs of the default host, but those that another program has: they cannot be asked what they take. If there are no
/// others, that is the error.
pub fn devices() -> Result<Vec<Device>, String> {
    hush();
    let host = cpal::default_host();
    let default = host.default_output_device().and_then(|device| device.id().ok());
    let outputs = host.output_devices().map_err(|error| error.to_string())?;
    let mut busy = Vec::new();
    let device = |device: cpal::Device| {
        let id = device.id().ok()?;
        let config = match device.default_output_config() {
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
            is_default: default.as_ref() == Some(&id),
            name: id.to_string(),
            description: device.to_string(),
            sample_rate: config.sample_rate(),
            channels: config.channels().into(),
        })
    };
    let devices: Vec<Device> = outputs.filter_map(device).collect();
    match devices.is_empty() && !busy.is_empty() {
        true => Err(format!("another program has {}: close it", busy.join(", "))),
        false => Ok(devices),
    }
}

/// Opens a stream on the output of this name.
pub fn play(device: &Device, pull: Pull) -> Result<Box<dyn Playing>, String> {
    hush();
    let mut outputs = cpal::default_host().output_devices().map_err(|error| error.to_string())?;
    let output = outputs
        .find(|output| output.id().is_ok_and(|id| id.to_string() == device.name))
        .ok_or_else(|| "it is gone".to_owned())?;
    let config = output.default_output_config().map_err(|error| error.to_string())?;
    if (config.sample_rate(), usize::from(config.channels())) != (device.sample_rate, device.channels) {
        return Err("its rate or channels have changed".into());
    }
    match config.sample_format() {
        SampleFormat::F32 => open::<f32>(&output, &config, pull),
        SampleFormat::I16 => open::<i16>(&output, &config, pull),
        SampleFormat::I32 => open::<i32>(&output, &config, pull),
        SampleFormat::U8 => open::<u8>(&output, &config, pull),
        SampleFormat::U16 => open::<u16>(&output, &config, pull),
        format => Err(format!("it takes {format} samples, which wavegen does not give")),
    }
}

/// Keeps ALSA from writing to the terminal what cpal reports as errors, or what is none: devices that it looked for in vain.
fn hush() {
    #[cfg(target_os = "linux")]
    // Without it the terminal is full and all else works.
    let _ = alsa::Output::local_error_handler();
}

fn open<T: SizedSample + FromSample<f32>>(
    output: &cpal::Device,
    config: &SupportedStreamConfig,
    mut pull: Pull,
) -> Result<Box<dyn Playing>, String> {
    let error = Arc::new(Mutex::new(None));
    let told = error.clone();
    let latency_us = Arc::new(AtomicU64::new(0));
    let measured_us = latency_us.clone();
    let (channels, counters) = (pull.channels(), pull.counters().clone());
    let mut block = vec![0.0f32; BLOCK * channels];
    let config = StreamConfig {
        channels: config.channels(),
        sample_rate: config.sample_rate(),
        buffer_size: BufferSize::Default,
    };
    let callback = move |out: &mut [T], info: &cpal::OutputCallbackInfo| {
        let at = info.timestamp();
        measured_us.store(at.playback.duration_since(at.callback).as_micros() as u64, Relaxed);
        for out in out.chunks_mut(BLOCK * channels) {
            let samples = &mut block[..out.len()];
            pull.fill(samples);
            out.iter_mut().zip(samples).for_each(|(y, x)| *y = T::from_sample(*x));
        }
    };
    let stream = output
        .build_output_stream(
            config,
            callback,
            move |error: cpal::Error| {
                use cpal::ErrorKind::{DeviceChanged, RealtimeDenied, Xrun};
                match error.kind() {
                    DeviceChanged | RealtimeDenied => {}
                    Xrun => counters.count_underrun(),
                    _ => *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string()),
                }
            },
            None,
        )
        .map_err(|error| error.to_string())?;
    stream.play().map_err(|error| error.to_string())?;
    Ok(Box::new(Card { _stream: stream, error, latency_us }))
}

struct Card {
    _stream: cpal::Stream,
    error: Arc<Mutex<Option<String>>>,
    /// From the last callback until what it gave is heard.
    latency_us: Arc<AtomicU64>,
}

impl Playing for Card {
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
        std::thread::sleep(Duration::from_secs_f64((2.0 * self.latency_ms()).min(MOST_LATENCY_MS) / 1e3));
    }
}
