//! Turns a [`Pull`] into sound on a PulseAudio or PipeWire server, and what that hears into an [`Ear`], without any library of the
//! system's.

use std::ffi::CString;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use futures::executor::block_on;
use pulseaudio::protocol::stream::{BufferAttr, StreamFlags};
use pulseaudio::protocol::{
    ChannelMap, ChannelPosition, ChannelVolume, PlaybackStreamParams, RecordStreamParams, SampleFormat, SampleSpec,
};
use pulseaudio::{Client, ClientError, PlaybackSource, PlaybackStream, RecordStream};

use super::device::{Direction, Host};
use super::ring::MOST_CHANNELS;
use super::{Device, Ear, Pull, Running};

/// What the server is asked to keep, ms.
const TARGET_MS: u32 = 30;
/// What the server is to hand over at a time, ms.
const FRAGMENT_MS: u32 = 10;
/// Frames that are converted at a time.
const BLOCK: usize = 1024;
const BYTES: usize = size_of::<f32>();
/// Longer than this nobody waits for the server.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection that ends when it is dropped.
struct Connection(Client);

impl Drop for Connection {
    fn drop(&mut self) {
        // The client's thread sleeps until the server says something, and sees only then that nobody needs it any more. So the server is
        // asked something once more, and the answer wakes the thread.
        let _ = self.0.server_info().now_or_never();
    }
}

fn connect() -> Result<Connection, String> {
    Client::from_env(c"wavegen").map(Connection).map_err(|error| match error {
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

/// What the server is asked for, unless it hangs.
fn in_time<T: Send + 'static>(ask: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    let (tell, told) = mpsc::channel();
    // Where it comes too late, it is dropped.
    std::thread::spawn(move || drop(tell.send(ask())));
    told.recv_timeout(PATIENCE).map_err(|_| "the PulseAudio or PipeWire server hangs".to_owned())?
}

/// The server's sinks and sources.
pub fn devices() -> Result<Vec<Device>, String> {
    in_time(ask_devices)
}

fn ask_devices() -> Result<Vec<Device>, String> {
    let Connection(client) = &connect()?;
    let ask = async {
        Ok::<_, ClientError>((client.server_info().await?, client.list_sinks().await?, client.list_sources().await?))
    };
    let (server, sinks, sources) = block_on(ask).map_err(|error| with_cause(&error))?;
    let device =
        |direction, name: &CString, description: Option<CString>, spec: SampleSpec, default: Option<&CString>| {
            let is_default = default == Some(name);
            let name = name.to_string_lossy().into_owned();
            Device {
                host: Host::Pulse,
                direction,
                description: description.map_or(name.clone(), |text| text.to_string_lossy().into_owned()),
                is_default,
                sample_rate: spec.sample_rate,
                channels: spec.channels.into(),
                name,
            }
        };
    let default = server.default_sink_name.as_ref();
    let sinks = sinks.into_iter().map(|x| device(Direction::Output, &x.name, x.description, x.sample_spec, default));
    let default = server.default_source_name.as_ref();
    let sources = sources.into_iter().map(|x| device(Direction::Input, &x.name, x.description, x.sample_spec, default));
    Ok(sinks.chain(sources).collect())
}

fn spec_of(device: &Device) -> SampleSpec {
    SampleSpec { format: SampleFormat::Float32Le, channels: device.channels as u8, sample_rate: device.sample_rate }
}

fn bytes_per_ms(device: &Device) -> u32 {
    (device.sample_rate * (device.channels * BYTES) as u32 / 1000).max(1)
}

/// Opens a stream on a sink.
pub fn play(device: &Device, pull: Pull) -> Result<Box<dyn Running>, String> {
    let device = device.clone();
    in_time(move || open_sink(&device, pull))
}

fn open_sink(device: &Device, pull: Pull) -> Result<Box<dyn Running>, String> {
    let client = connect()?;
    let per_ms = bytes_per_ms(device);
    let params = PlaybackStreamParams {
        sample_spec: spec_of(device),
        channel_map: channel_map(device.channels),
        sink_name: Some(CString::new(device.name.as_str()).map_err(|error| error.to_string())?),
        cvolume: Some(ChannelVolume::norm(device.channels as u8)),
        buffer_attr: BufferAttr {
            target_length: TARGET_MS * per_ms,
            pre_buffering: TARGET_MS * per_ms,
            minimum_request_length: TARGET_MS * per_ms / 4,
            ..BufferAttr::default()
        },
        // The server is to keep no more than was asked for.
        flags: StreamFlags { adjust_latency: true, ..Default::default() },
        ..PlaybackStreamParams::default()
    };
    let source = Source { pull, block: [0.0; BLOCK] };
    let stream = block_on(client.0.create_playback_stream(params, source)).map_err(|error| with_cause(&error))?;
    let latency_ms = f64::from(stream.buffer_attr().target_length) / f64::from(per_ms);
    Ok(Box::new(Stream { latency_ms, _stream: stream, _client: client }))
}

/// Opens a stream from a source.
pub fn listen(device: &Device, ear: Ear) -> Result<Box<dyn Running>, String> {
    let device = device.clone();
    in_time(move || open_source(&device, ear))
}

fn open_source(device: &Device, mut ear: Ear) -> Result<Box<dyn Running>, String> {
    let client = connect()?;
    let params = RecordStreamParams {
        sample_spec: spec_of(device),
        channel_map: channel_map(device.channels),
        source_name: Some(CString::new(device.name.as_str()).map_err(|error| error.to_string())?),
        cvolume: Some(ChannelVolume::norm(device.channels as u8)),
        buffer_attr: BufferAttr { fragment_size: FRAGMENT_MS * bytes_per_ms(device), ..BufferAttr::default() },
        flags: StreamFlags { adjust_latency: true, ..Default::default() },
        ..RecordStreamParams::default()
    };
    // The server sends whole frames, if not always many.
    let per_block = BLOCK / ear.channels() * ear.channels();
    let mut block = [0.0; BLOCK];
    let hear = move |data: &[u8]| {
        for bytes in data.as_chunks::<BYTES>().0.chunks(per_block) {
            let samples = &mut block[..bytes.len()];
            samples.iter_mut().zip(bytes).for_each(|(sample, &bytes)| *sample = f32::from_le_bytes(bytes));
            ear.hear(samples);
        }
    };
    let stream = block_on(client.0.create_record_stream(params, hear)).map_err(|error| with_cause(&error))?;
    Ok(Box::new(Listening { _stream: stream, _client: client }))
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
    latency_ms: f64,
    /// Dropped before the connection: asks the server to delete it, and waits for no answer, for the server may hang.
    _stream: PlaybackStream,
    _client: Connection,
}

impl Running for Stream {
    fn latency_ms(&self) -> f64 {
        self.latency_ms
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // What it was given last is still on its way.
        std::thread::sleep(Duration::from_secs_f64(2.0 * self.latency_ms / 1e3));
    }
}

struct Listening {
    /// As of [`Stream`].
    _stream: RecordStream,
    _client: Connection,
}

impl Running for Listening {
    fn latency_ms(&self) -> f64 {
        FRAGMENT_MS.into()
    }
}
