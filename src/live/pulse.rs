//! Turns a [`Pull`] into sound on a PulseAudio or PipeWire server, without any library of the system's.

use std::ffi::CString;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::executor::block_on;
use pulseaudio::protocol::stream::BufferAttr;
use pulseaudio::protocol::{ChannelMap, ChannelVolume, PlaybackStreamParams, SampleFormat, SampleSpec, SinkInfo};
use pulseaudio::{Client, ClientError, PlaybackSource, PlaybackStream, protocol::ChannelPosition};

use super::device::Host;
use super::ring::MOST_CHANNELS;
use super::{Device, Playing, Pull};

/// What the server is asked to keep, ms.
const TARGET_MS: u32 = 30;
/// Frames that are converted at a time.
const BLOCK: usize = 1024;
const BYTES: usize = size_of::<f32>();

fn connect() -> Result<Client, String> {
    Client::from_env(c"wavegen").map_err(|error| match error {
        ClientError::ServerUnavailable => "no PulseAudio or PipeWire server runs".to_owned(),
        error => format!("the PulseAudio or PipeWire server does not answer ({})", with_cause(&error)),
    })
}

fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// The server's sinks.
pub fn devices() -> Result<Vec<Device>, String> {
    let client = connect()?;
    let ask = async { Ok::<_, ClientError>((client.server_info().await?, client.list_sinks().await?)) };
    let (server, sinks) = block_on(ask).map_err(|error| with_cause(&error))?;
    let device = |sink: SinkInfo| {
        let name = sink.name.to_string_lossy().into_owned();
        Device {
            host: Host::Pulse,
            description: sink.description.map_or(name.clone(), |text| text.to_string_lossy().into_owned()),
            is_default: server.default_sink_name.as_ref() == Some(&sink.name),
            sample_rate: sink.sample_spec.sample_rate,
            channels: sink.sample_spec.channels.into(),
            name,
        }
    };
    Ok(sinks.into_iter().map(device).collect())
}

/// Opens a stream on a sink.
pub fn play(device: &Device, pull: Pull) -> Result<Box<dyn Playing>, String> {
    let client = connect()?;
    let channels = device.channels as u8;
    let per_ms = device.sample_rate * u32::from(channels) * BYTES as u32 / 1000;
    let params = PlaybackStreamParams {
        sample_spec: SampleSpec { format: SampleFormat::Float32Le, channels, sample_rate: device.sample_rate },
        channel_map: channel_map(device.channels),
        sink_name: Some(CString::new(device.name.as_str()).map_err(|error| error.to_string())?),
        cvolume: Some(ChannelVolume::norm(channels)),
        buffer_attr: BufferAttr {
            target_length: TARGET_MS * per_ms,
            pre_buffering: TARGET_MS * per_ms,
            minimum_request_length: TARGET_MS * per_ms / 4,
            ..BufferAttr::default()
        },
        // The server is to keep no more than was asked for.
        flags: pulseaudio::protocol::stream::StreamFlags { adjust_latency: true, ..Default::default() },
        ..PlaybackStreamParams::default()
    };
    let source = Source { pull, block: [0.0; BLOCK] };
    let stream = block_on(client.create_playback_stream(params, source)).map_err(|error| with_cause(&error))?;
    let latency_ms = f64::from(stream.buffer_attr().target_length) / f64::from(per_ms.max(1));
    Ok(Box::new(Stream { latency_ms, stream: Some(stream), _client: client }))
}

fn channel_map(channels: usize) -> ChannelMap {
    use ChannelPosition::{FrontCenter, FrontLeft, FrontRight, Lfe, Mono, RearLeft, RearRight, SideLeft, SideRight};
    match channels {
        1 => ChannelMap::mono(),
        // Fronts first, as recordings have them; what has no usual place is front centre.
        _ => {
            let usual = [FrontLeft, FrontRight, FrontCenter, Lfe, RearLeft, RearRight, SideLeft, SideRight];
            ChannelMap::new((0..channels).map(|c| usual.get(c).copied().unwrap_or(Mono)))
        }
    }
}

/// What the server's requests are answered from.
struct Source {
    pull: Pull,
    block: [f32; BLOCK],
}

impl PlaybackSource for Source {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut [u8]) -> Poll<usize> {
        const { assert!(MOST_CHANNELS <= BLOCK) };
        let Self { pull, block } = &mut *self;
        let per_frame = pull.channels() * BYTES;
        let whole = buf.len() / per_frame * per_frame;
        let per_block = BLOCK / pull.channels() * pull.channels();
        for bytes in buf[..whole].chunks_mut(per_block * BYTES) {
            let samples = &mut block[..bytes.len() / BYTES];
            pull.fill(samples);
            for (bytes, sample) in bytes.as_chunks_mut::<BYTES>().0.iter_mut().zip(samples) {
                *bytes = sample.to_le_bytes();
            }
        }
        if whole == 0 { Poll::Pending } else { Poll::Ready(whole) }
    }
}

struct Stream {
    stream: Option<PlaybackStream>,
    latency_ms: f64,
    _client: Client,
}

impl Playing for Stream {
    fn latency_ms(&self) -> f64 {
        self.latency_ms
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            // What it was given last is still on its way.
            std::thread::sleep(Duration::from_secs_f64(2.0 * self.latency_ms / 1e3));
            // A server that is gone has nothing to delete.
            let _ = block_on(stream.delete());
        }
    }
}
