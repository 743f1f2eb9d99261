//! Turns bytes into symphonia's demuxer and decoder, and its statements into ours.

use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use symphonia::core::audio::GenericAudioBufferRef;
use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::{
    AudioCodecId, AudioCodecParameters, AudioDecoder, AudioDecoderOptions, well_known as codecs,
};
use symphonia::core::codecs::registry::CodecRegistry;
use symphonia::core::errors::{Error, Result as SymphoniaResult};
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::well_known::{FORMAT_ID_CAF, FORMAT_ID_ISOMP4};
use symphonia::core::formats::{FormatReader, Track, TrackType};
use symphonia::core::io::{MediaSource, MediaSourceStream, ReadOnlySource};

use super::trim::{self, EditList, Keep};
use super::{AudioError, AudioSource, Result, SampleFormat, WavPrompt};

/// Calls into symphonia. It asserts what some damaged files break (a box placed beyond 2^63 bytes, say): such a panic
/// becomes a decoding error here.
pub(super) fn guarded<T>(call: impl FnOnce() -> SymphoniaResult<T>) -> SymphoniaResult<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Error::DecodeError("an assertion in the decoder failed")))
}

/// Opens the container. A plain WAV is presented under a plain header, because of all the headers in the wild (RF64,
/// unknown or wrong lengths, odd `fmt ` chunks) our own reader accepts more; its last packet is filled up with zeros,
/// which [`Decoder`] does not hand out.
pub(super) fn probe(source: &AudioSource, prompt: Option<&WavPrompt>) -> Result<Box<dyn FormatReader>> {
    let media: Box<dyn MediaSource> = match prompt {
        Some(prompt) => {
            let header = io::Cursor::new(prompt.format.plain_header());
            let longest_packet = 1 << 20;
            Box::new(ReadOnlySource::new(header.chain(prompt.data()?).chain(io::repeat(0).take(longest_packet))))
        }
        None => Box::new(source.file()?),
    };
    let stream = MediaSourceStream::new(media, Default::default());
    let probe = symphonia::default::get_probe();
    guarded(|| probe.probe(&Hint::new(), stream, Default::default(), Default::default())).map_err(|error| match error {
        // The system's own have a number.
        Error::IoError(error) if error.raw_os_error().is_some() => source.io_error(error),
        error => AudioError::NotAudio {
            path: source.name().into(),
            reason: match error {
                Error::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => "it ends too soon".into(),
                Error::Unsupported(what) if what.contains("no suitable format") => "no known format".into(),
                Error::Unsupported(what) | Error::DecodeError(what) => what.into(),
                error => error.to_string(),
            },
        },
    })
}

/// What there are decoders for.
fn codec_registry() -> &'static CodecRegistry {
    static REGISTRY: LazyLock<CodecRegistry> = LazyLock::new(|| {
        let mut registry = CodecRegistry::new();
        symphonia::default::register_enabled_codecs(&mut registry);
        #[cfg(feature = "opus")]
        registry.register_audio_decoder::<symphonia_adapter_libopus::OpusDecoder>();
        registry
    });
    &REGISTRY
}

/// The decoder of Opus skips its delay by itself, as Ogg states it. MP4 states it in the other byte order, and mostly in the edit list
/// too: [`stated_range`] takes care of it.
fn with_readable_delay(format: &dyn FormatReader, params: AudioCodecParameters) -> AudioCodecParameters {
    let of_mp4 = params.codec == codecs::CODEC_ID_OPUS && format.format_info().format == FORMAT_ID_ISOMP4;
    if of_mp4 { AudioCodecParameters { extra_data: None, ..params } } else { params }
}

/// The default audio track, or where it has no decoder the first that has one.
pub(super) fn choose_track(source: &AudioSource, format: &dyn FormatReader) -> Result<(Track, Box<dyn AudioDecoder>)> {
    let registry = codec_registry();
    let default = format.default_track(TrackType::Audio).map(|track| track.id);
    let mut tracks: Vec<&Track> = format.tracks().iter().collect();
    tracks.sort_by_key(|track| Some(track.id) != default);
    let mut refusal = AudioError::NoAudioTrack { path: source.name().into() };
    for track in tracks {
        let Some(CodecParameters::Audio(params)) = &track.codec_params else {
            continue;
        };
        let params = &with_readable_delay(format, params.clone());
        match guarded(|| registry.make_audio_decoder(params, &AudioDecoderOptions::default())) {
            Ok(decoder) => return Ok((track.clone(), decoder)),
            Err(error) if matches!(refusal, AudioError::NoAudioTrack { .. }) => {
                let codec = match registry.get_audio_decoder(params.codec) {
                    Some(known) => {
                        format!("this kind of {} ({error})", known.codec.info.short_name)
                    }
                    None => unsupported_name(params.codec).to_string(),
                };
                refusal = AudioError::UnsupportedCodec { path: source.name().into(), codec };
            }
            Err(_) => {}
        }
    }
    Err(refusal)
}

/// The frames to keep that the container states and symphonia does not apply; None: all that it hands out.
pub(super) fn stated_range(
    format: &mut dyn FormatReader,
    track: &Track,
    source: &AudioSource,
    sample_rate: u32,
    warnings: &mut Vec<String>,
) -> Option<Keep> {
    match format.format_info().format {
        FORMAT_ID_ISOMP4 => {
            let edits = EditList::read(&mut io::BufReader::new(source.file().ok()?), track.id)?;
            // Fragments come on top of what the header counts.
            let media_frames = track.num_frames.filter(|&n| n > 0 && !edits.fragmented);
            let end = media_frames.unwrap_or(u64::MAX);
            let whole = trim::only(0..end);
            let keep = edits.keep(sample_rate, media_frames);
            if keep.is_none() {
                warnings.push("the file's edit list is not a plain excerpt: all of its audio is used".into());
            }
            if let Some(keep) = keep.filter(|keep| *keep != whole) {
                return Some(keep);
            }
            let metadata = format.metadata();
            let tags = metadata.current().map_or(&[][..], |revision| &revision.media.tags);
            let comment = tags.iter().find(|tag| tag.raw.key.contains("iTunSMPB"));
            let by_comment = comment.and_then(|tag| trim::keep_by_itunes_comment(&tag.raw.value.to_string()));
            Some(by_comment.unwrap_or_else(|| trim::only(opus_delay(track).min(end)..end)))
        }
        FORMAT_ID_CAF => {
            let delay = u64::from(track.delay?);
            let length = track.num_frames.unwrap_or(u64::MAX);
            Some(trim::only(delay..delay.saturating_add(length)))
        }
        _ => None,
    }
}

/// Two bytes of the header of Opus, or of the box `dOps` behind a name of its length: a name of 8 bytes, version, channels, delay, rate,
/// gain (RFC 7845, section 5.1).
fn opus_header(track: &Track, at: usize) -> Option<[u8; 2]> {
    let Some(CodecParameters::Audio(params)) = &track.codec_params else { return None };
    let data = params.extra_data.as_ref().filter(|_| params.codec == codecs::CODEC_ID_OPUS)?;
    data.get(at..at + 2)?.try_into().ok()
}

/// Frames before the first that is meant to be heard, by the box `dOps` of Opus in MP4.
fn opus_delay(track: &Track) -> u64 {
    opus_header(track, 10).map_or(0, u16::from_be_bytes).into()
}

/// What decoded samples are to be multiplied with: Opus states a gain, which its decoder leaves to others.
pub(super) fn stated_gain(format: &dyn FormatReader, track: &Track) -> f32 {
    let order = if format.format_info().format == FORMAT_ID_ISOMP4 { i16::from_be_bytes } else { i16::from_le_bytes };
    let steps_of_256th_db = opus_header(track, 16).map_or(0, order);
    10f32.powf(f32::from(steps_of_256th_db) / 256.0 / 20.0)
}

/// The precision that a lossless codec stores.
pub(super) fn stored_format(decoder: &dyn AudioDecoder) -> Option<SampleFormat> {
    let codec = decoder.codec_info().short_name;
    if !codec.starts_with("pcm_") && !matches!(codec, "flac" | "alac") {
        return None;
    }
    let params = decoder.codec_params();
    // ALAC's cookie states its bits after the packet length and a version byte.
    let alac_bits = || params.extra_data.as_ref().filter(|_| codec == "alac")?.get(5).map(|&bits| bits.into());
    let bits = params.bits_per_sample.or_else(alac_bits).unwrap_or(32);
    match (decoder.last_decoded(), bits) {
        (GenericAudioBufferRef::F32(_), _) => Some(SampleFormat::F32),
        (GenericAudioBufferRef::F64(_), _) => Some(SampleFormat::F64),
        (_, ..=8) => Some(SampleFormat::U8),
        (_, ..=16) => Some(SampleFormat::I16),
        (_, ..=24) => Some(SampleFormat::I24),
        _ => Some(SampleFormat::I32),
    }
}

/// Names of codecs that symphonia recognises in containers but does not decode.
fn unsupported_name(codec: AudioCodecId) -> &'static str {
    match codec {
        codecs::CODEC_ID_OPUS => "Opus",
        codecs::CODEC_ID_SPEEX => "Speex",
        codecs::CODEC_ID_AC3 => "AC-3",
        codecs::CODEC_ID_EAC3 => "E-AC-3",
        codecs::CODEC_ID_AC4 => "AC-4",
        codecs::CODEC_ID_DCA => "DTS",
        codecs::CODEC_ID_TRUEHD => "TrueHD",
        codecs::CODEC_ID_WAVPACK => "WavPack",
        codecs::CODEC_ID_WMA => "WMA",
        _ => "this codec's",
    }
}
