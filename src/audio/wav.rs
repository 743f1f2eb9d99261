//! Turns a WAV header into the format of its samples and the exact range of its data bytes.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Take};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{AudioError, AudioSource, Result};

/// How one sample is stored in a WAV file; all are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SampleFormat {
    /// Unsigned 8-bit, 128 is silence.
    U8,
    /// Signed 16-bit.
    I16,
    /// Signed 24-bit in 3 bytes.
    I24,
    /// Signed 32-bit.
    I32,
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
}

impl SampleFormat {
    /// All formats.
    pub const ALL: [Self; 6] = [Self::U8, Self::I16, Self::I24, Self::I32, Self::F32, Self::F64];

    /// Bytes per sample.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::I16 => 2,
            Self::I24 => 3,
            Self::I32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// Bits per sample.
    pub fn bits(self) -> u16 {
        8 * self.bytes() as u16
    }

    /// Whether samples are floating-point.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64)
    }

    /// The name people type: u8, i16, i24, i32, f32, f64.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I16 => "i16",
            Self::I24 => "i24",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::F64 => "f64",
        }
    }
}

impl fmt::Display for SampleFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SampleFormat {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("unknown sample format {name}; use one of u8, i16, i24, i32, f32, f64"))
    }
}

/// Rate, channels and sample format of a WAV, with the `fmt ` chunk that says so; saved as that chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct WavFormat {
    /// Frames per second, Hz.
    pub sample_rate: u32,
    /// Samples per frame, at least 1.
    pub channels: usize,
    /// How a sample is stored.
    pub sample_format: SampleFormat,
    // Body of the `fmt ` chunk: a prompt's own, so that channel masks and the like survive, or hound's. Empty: no header.
    chunk: Vec<u8>,
}

impl WavFormat {
    /// A new format; more than two channels or more than 16 bits are declared as WAVE_FORMAT_EXTENSIBLE.
    ///
    /// # Panics
    /// With no channel, or with more bytes per frame than the 65,535 that a WAV header can state.
    pub fn new(sample_rate: u32, channels: usize, sample_format: SampleFormat) -> Self {
        let frame_bytes = channels * sample_format.bytes();
        assert!((1..=0xffff).contains(&frame_bytes), "a WAV frame has 1 to 65,535 bytes, got {frame_bytes}");
        let chunk = if sample_format == SampleFormat::F64 {
            // Not among hound's formats.
            basic_chunk(sample_rate, channels, sample_format).to_vec()
        } else {
            let spec = hound::WavSpec {
                channels: channels as u16,
                sample_rate,
                bits_per_sample: sample_format.bits(),
                sample_format: match sample_format.is_float() {
                    true => hound::SampleFormat::Float,
                    false => hound::SampleFormat::Int,
                },
            };
            let header = spec.into_header_for_infinite_file();
            header[FMT_BODY..header.len() - CHUNK_HEAD].to_vec()
        };
        Self { sample_rate, channels, sample_format, chunk }
    }

    /// Samples without any header, for pipes and other programs.
    pub fn bare(sample_rate: u32, channels: usize, sample_format: SampleFormat) -> Self {
        Self { sample_rate, channels, sample_format, chunk: Vec::new() }
    }

    /// Bytes of one frame.
    pub fn frame_bytes(&self) -> usize {
        self.channels * self.sample_format.bytes()
    }

    /// Reads the body of a `fmt ` chunk; None if it is not linear PCM or float, samples side by side in whole bytes.
    fn parse(chunk: Vec<u8>) -> Option<Self> {
        const EXTENSIBLE: u16 = 0xfffe;
        // What follows the tag in KSDATAFORMAT_SUBTYPE_PCM and KSDATAFORMAT_SUBTYPE_IEEE_FLOAT.
        const SUBTYPE: [u8; 14] = [0, 0, 0, 0, 0x10, 0, 0x80, 0, 0, 0xaa, 0, 0x38, 0x9b, 0x71];
        let u16_at = |at: usize| Some(u16::from_le_bytes(chunk.get(at..at + 2)?.try_into().ok()?));
        let tag = match u16_at(0)? {
            EXTENSIBLE if chunk.get(26..40)? == SUBTYPE => u16_at(24)?,
            tag => tag,
        };
        let channels = usize::from(u16_at(2)?);
        let sample_rate = u32::from_le_bytes(chunk.get(4..8)?.try_into().ok()?);
        let (frame_bytes, bits) = (usize::from(u16_at(12)?), usize::from(u16_at(14)?));
        if channels == 0 || sample_rate == 0 || frame_bytes != channels * bits.div_ceil(8) {
            return None;
        }
        // 12 or 20 bits stand left-justified in 2 or 3 bytes (the standard's rule), so the container decides.
        let sample_format = match (tag, bits.div_ceil(8), bits) {
            (1, 1, _) => SampleFormat::U8,
            (1, 2, _) => SampleFormat::I16,
            (1, 3, _) => SampleFormat::I24,
            (1, 4, _) => SampleFormat::I32,
            (3, _, 32) => SampleFormat::F32,
            (3, _, 64) => SampleFormat::F64,
            _ => return None,
        };
        Some(Self { sample_rate, channels, sample_format, chunk })
    }

    /// A WAV header up to the first data byte, for `data_bytes` of data (and its padding); None: a stream of unknown
    /// length, declared as 0xFFFFFFFF bytes as other tools do. Of bare samples it is empty.
    pub(super) fn header(&self, data_bytes: Option<u32>) -> Vec<u8> {
        if self.chunk.is_empty() { Vec::new() } else { header(&self.chunk, data_bytes) }
    }

    /// A streaming header with the plainest `fmt ` chunk for these samples, which any reader understands.
    pub(super) fn plain_header(&self) -> Vec<u8> {
        header(&basic_chunk(self.sample_rate, self.channels, self.sample_format), None)
    }
}

impl From<WavFormat> for Vec<u8> {
    fn from(format: WavFormat) -> Self {
        format.chunk
    }
}

impl TryFrom<Vec<u8>> for WavFormat {
    type Error = String;

    fn try_from(chunk: Vec<u8>) -> std::result::Result<Self, String> {
        Self::parse(chunk).ok_or_else(|| "no WAV format of linear PCM or float samples".into())
    }
}

/// Bytes of a chunk's name and length.
const CHUNK_HEAD: usize = 8;
/// Where the body of the `fmt ` chunk starts in a header as written here and by hound.
const FMT_BODY: usize = 12 + CHUNK_HEAD;

fn header(chunk: &[u8], data_bytes: Option<u32>) -> Vec<u8> {
    let padded = chunk.len().next_multiple_of(2);
    let head_bytes = (FMT_BODY + padded + CHUNK_HEAD) as u32;
    let riff_bytes = data_bytes.map_or(u32::MAX, |data| (head_bytes - 8).saturating_add(data).saturating_add(data & 1));
    let mut header = Vec::with_capacity(head_bytes as usize);
    header.extend_from_slice(b"RIFF");
    header.extend_from_slice(&riff_bytes.to_le_bytes());
    header.extend_from_slice(b"WAVEfmt ");
    header.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
    header.extend_from_slice(chunk);
    header.resize(FMT_BODY + padded, 0);
    header.extend_from_slice(b"data");
    header.extend_from_slice(&data_bytes.unwrap_or(u32::MAX).to_le_bytes());
    header
}

/// The 16-byte `fmt ` body of the original standard.
fn basic_chunk(sample_rate: u32, channels: usize, format: SampleFormat) -> [u8; 16] {
    let frame_bytes = channels * format.bytes();
    let mut chunk = [0; 16];
    chunk[0..2].copy_from_slice(&if format.is_float() { 3u16 } else { 1 }.to_le_bytes());
    chunk[2..4].copy_from_slice(&(channels as u16).to_le_bytes());
    chunk[4..8].copy_from_slice(&sample_rate.to_le_bytes());
    chunk[8..12].copy_from_slice(&sample_rate.wrapping_mul(frame_bytes as u32).to_le_bytes());
    chunk[12..14].copy_from_slice(&(frame_bytes as u16).to_le_bytes());
    chunk[14..16].copy_from_slice(&format.bits().to_le_bytes());
    chunk
}

/// A WAV file of linear PCM or float samples whose data bytes can be copied as they are.
#[derive(Clone, Debug)]
pub struct WavPrompt {
    /// What the data bytes are.
    pub format: WavFormat,
    /// Frames in the data up to the source's end, an incomplete last one left out.
    pub n_frames: u64,
    /// Frames that the header promises and the file lacks.
    pub missing_frames: u64,
    source: AudioSource,
    data_start: u64,
}

impl WavPrompt {
    /// Reads the header of a RIFF or RF64 WAV. None: not a WAV, or one whose samples are coded (ADPCM, mu-law, MP3 ...).
    ///
    /// Data of declared size 0 or 0xFFFFFFFF (a pipe's WAV) goes to the end of the file.
    ///
    /// # Errors
    /// The file cannot be read, or its PCM samples are narrower than their containers.
    pub fn open(source: &AudioSource) -> Result<Option<Self>> {
        let file = source.file()?;
        let file_bytes = file.metadata().map_err(|error| source.io_error(error))?.len();
        match find_data(&mut BufReader::new(file), file_bytes) {
            Ok(Some((format, data_start, data))) => {
                let frame_bytes = format.frame_bytes() as u64;
                let end = source.end_frame(format.sample_rate);
                let n_frames = (data.present / frame_bytes).min(end);
                let missing_frames = (data.declared / frame_bytes).min(end).saturating_sub(n_frames);
                Ok(Some(Self { format, n_frames, missing_frames, source: source.clone(), data_start }))
            }
            Ok(None) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(AudioError::NotAudio { path: source.name().into(), reason: error.to_string() })
            }
            Err(error) => Err(source.io_error(error)),
        }
    }

    /// Length of the data in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.n_frames * self.format.frame_bytes() as u64
    }

    /// Reads the data bytes, exactly [`Self::data_bytes`] of them.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn data(&self) -> Result<Take<File>> {
        let mut file = self.source.file()?;
        file.seek(SeekFrom::Start(self.data_start)).map_err(|error| self.source.io_error(error))?;
        Ok(file.take(self.data_bytes()))
    }
}

/// Sizes of a `data` chunk in bytes.
struct DataBytes {
    declared: u64,
    present: u64,
}

fn find_data(file: &mut (impl Read + Seek), file_bytes: u64) -> io::Result<Option<(WavFormat, u64, DataBytes)>> {
    let mut riff = [0; 12];
    file.read_exact(&mut riff)?;
    if !matches!(&riff[..4], b"RIFF" | b"RF64") || &riff[8..] != b"WAVE" {
        return Ok(None);
    }
    let riff_bytes = u64::from(u32_of(&riff[4..8]));
    let mut long_data_bytes = None;
    let mut format = None;
    loop {
        let mut head = [0; CHUNK_HEAD];
        file.read_exact(&mut head)?;
        let start = file.stream_position()?;
        let bytes = u64::from(u32_of(&head[4..]));
        match &head[..4] {
            // What nobody ever wrote; no chunk has that name.
            b"\0\0\0\0" => return Ok(None),
            b"fmt " => {
                let mut chunk = Vec::new();
                file.take(bytes.min(0xffff)).read_to_end(&mut chunk)?;
                if has_gaps(&chunk) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "samples narrower than their containers"));
                }
                format = WavFormat::parse(chunk);
            }
            b"ds64" => {
                let mut sizes = [0; 16];
                file.read_exact(&mut sizes)?;
                long_data_bytes = Some(u64::from(u32_of(&sizes[8..])) | u64::from(u32_of(&sizes[12..])) << 32);
            }
            b"data" => {
                let Some(format) = format else {
                    return Ok(None);
                };
                let rest = file_bytes.saturating_sub(start);
                let declared = match bytes {
                    0xffff_ffff => long_data_bytes.unwrap_or(rest),
                    // A header that was never completed does not count what follows; an empty chunk's does.
                    0 if riff_bytes + 8 < start + rest => rest,
                    // Other tools' "unknown": just under 2 GiB or 4 GiB.
                    0x7fff_0000..0x8000_0000 | 0xffff_0000.. if bytes > rest => rest,
                    bytes => bytes,
                };
                return Ok(Some((format, start, DataBytes { declared, present: declared.min(rest) })));
            }
            _ => {}
        }
        file.seek(SeekFrom::Start(start + bytes.next_multiple_of(2)))?;
    }
}

/// Whether a `fmt ` chunk of PCM samples declares containers wider than they need, as in 24 bits in 4 bytes: where in
/// them the bits are, no standard says.
fn has_gaps(chunk: &[u8]) -> bool {
    let u16_at =
        |at: usize| chunk.get(at..at + 2).map_or(0, |bytes| usize::from(bytes[0]) | usize::from(bytes[1]) << 8);
    let (tag, channels, frame_bytes, bits) = (u16_at(0), u16_at(2), u16_at(12), u16_at(14));
    // Of an extensible format the tag begins the sub-format.
    let tag = if tag == 0xfffe { u16_at(24) } else { tag };
    tag == 1 && channels > 0 && frame_bytes > channels * bits.div_ceil(8)
}

fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
