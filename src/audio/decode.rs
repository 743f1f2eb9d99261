//! Turns any audio file that symphonia reads into interleaved f32 samples, block by block.

use std::io;
use std::ops::Range;
use std::path::Path;

use symphonia::core::codecs::audio::AudioDecoder;
use symphonia::core::errors::Error;
use symphonia::core::formats::well_known::{FORMAT_ID_ADTS, FORMAT_ID_MP3};
use symphonia::core::formats::{FormatReader, Track, TrackType};
use symphonia::core::packet::Packet;

use super::container::{choose_track, guarded, probe, stated_gain, stated_range, stored_format};
use super::resample::{HIGHEST_RATE, LOWEST_RATE};
use super::trim::{self, Keep};
use super::{AudioError, AudioSource, Clip, Result, SampleFormat, WavPrompt};

/// No WAV with more channels can be read back.
const MOST_CHANNELS: usize = 26;

/// What a file says about its audio, checked against its first decoded samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Short name of the container: wave, flac, isomp4 ...
    pub container: String,
    /// Short name of the codec: pcm_s16le, flac, aac ...
    pub codec: String,
    /// Frames per second, Hz.
    pub sample_rate: u32,
    /// Samples per frame.
    pub channels: usize,
    /// The stored precision; None for lossy codecs, which have none.
    pub sample_format: Option<SampleFormat>,
    /// Frames that will be decoded, where the container states it exactly.
    pub n_frames: Option<u64>,
}

/// Decodes the default audio track of a file in blocks, in memory that does not grow with the file.
///
/// Damaged packets are skipped and counted; a truncated file yields what is there and a warning. Encoder delay and
/// padding are removed where the container states them.
pub struct Decoder {
    source: AudioSource,
    format: Box<dyn FormatReader>,
    decoder: Box<dyn AudioDecoder>,
    track_id: u32,
    // Of all samples.
    gain: f32,
    // Packet time to frames: numerator, denominator.
    frames_per_tick: (u64, u64),
    spec: Spec,
    float_pcm: bool,
    keep: Keep,
    // Frames out of the codec, kept or not; frames handed out.
    position: u64,
    n_frames: u64,
    block: Vec<f32>,
    // Whether `block` waits to be handed out.
    waiting: bool,
    ended: bool,
    damaged_packets: u64,
    warnings: Vec<String>,
}

impl Decoder {
    /// Opens a path, or standard input for `-`.
    ///
    /// # Errors
    /// As [`Self::from_source`], and what [`AudioSource::open`] refuses.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_source(&AudioSource::open(path)?)
    }

    /// Opens a source by its content, whatever its name, and decodes its first block.
    ///
    /// # Errors
    /// Not audio, no audio track, a codec without decoder, not a single sample, a sample that is not finite.
    pub fn from_source(source: &AudioSource) -> Result<Self> {
        let prompt = WavPrompt::open(source)?;
        let format = probe(source, prompt.as_ref())?;
        let (track, decoder) = choose_track(source, format.as_ref())?;
        let mut warnings = Vec::new();
        if format.default_track(TrackType::Audio).is_some_and(|default| default.id != track.id) {
            warnings.push("the default audio track has no decoder: another one is used".to_string());
        }
        let spec = Spec {
            container: format.format_info().short_name.to_string(),
            codec: decoder.codec_info().short_name.to_string(),
            sample_rate: 0,
            channels: 0,
            sample_format: None,
            n_frames: None,
        };
        let gain = stated_gain(format.as_ref(), &track);
        let mut opened = Self {
            source: source.clone(),
            format,
            decoder,
            track_id: track.id,
            gain,
            frames_per_tick: (1, 1),
            spec,
            float_pcm: false,
            keep: trim::only(0..u64::MAX),
            position: 0,
            n_frames: 0,
            block: Vec::new(),
            waiting: false,
            ended: false,
            damaged_packets: 0,
            warnings,
        };
        opened.settle(&track, prompt.as_ref())?;
        Ok(opened)
    }

    /// Decodes up to the first samples and settles what depends on them.
    fn settle(&mut self, track: &Track, prompt: Option<&WavPrompt>) -> Result<()> {
        if prompt.is_some_and(|prompt| prompt.n_frames == 0) {
            return Err(self.no_samples());
        }
        let Some(first) = self.decode_packet()? else {
            return Err(self.no_samples());
        };
        let (rate, channels) = (first.sample_rate, first.channels);
        let strange = match channels {
            1..=MOST_CHANNELS if (LOWEST_RATE..=HIGHEST_RATE).contains(&rate) => None,
            1..=MOST_CHANNELS => Some(format!("{rate} Hz, where {LOWEST_RATE} to {HIGHEST_RATE} Hz can be read")),
            _ => Some(format!("{channels} channels, where 1 to {MOST_CHANNELS} can be read")),
        };
        if let Some(reason) = strange {
            return Err(AudioError::Shape { path: self.source.name().to_owned(), reason });
        }
        self.spec.sample_rate = first.sample_rate;
        self.spec.channels = first.channels;
        self.spec.sample_format =
            prompt.map(|prompt| prompt.format.sample_format).or_else(|| stored_format(self.decoder.as_ref()));
        self.float_pcm = self.spec.sample_format.is_some_and(SampleFormat::is_float);
        if let Some(time_base) = track.time_base {
            let (numer, denom) = (time_base.numer.get(), time_base.denom.get());
            self.frames_per_tick = (u64::from(numer) * u64::from(first.sample_rate), denom.into());
        }
        let exact_frames = match self.format.format_info().format {
            FORMAT_ID_ADTS => None,
            FORMAT_ID_MP3 if track.delay.is_none() => None,
            _ => track.num_frames,
        };
        let kept = match prompt {
            Some(prompt) => Some(trim::only(0..prompt.n_frames)),
            None => stated_range(self.format.as_mut(), track, &self.source, first.sample_rate, &mut self.warnings),
        };
        self.spec.n_frames = match &kept {
            Some(keep) if keep.iter().all(|range| range.end < u64::MAX) => Some(n_kept(keep)),
            Some(_) => None,
            None => exact_frames.filter(|&n| n > 0),
        };
        self.spec.n_frames = self.spec.n_frames.map(|n| n.min(self.source.end_frame(first.sample_rate)));
        if let Some(prompt) = prompt.filter(|prompt| prompt.missing_frames > 0) {
            let missing_s = prompt.missing_frames as f64 / f64::from(first.sample_rate);
            self.warnings
                .push(format!("the file is truncated: {missing_s:.3} s of what its header states are missing"));
        }
        self.keep = kept.unwrap_or_else(|| trim::only(0..u64::MAX));
        self.take_block()?;
        self.waiting = !self.block.is_empty() || self.fill()?;
        if !self.waiting {
            return Err(self.no_samples());
        }
        Ok(())
    }

    fn no_samples(&self) -> AudioError {
        let detail = match (self.damaged_packets, self.warnings.first()) {
            (_, Some(warning)) => format!(" ({warning})"),
            (0, None) => String::new(),
            (n, None) => format!(" (all {n} packets are damaged)"),
        };
        AudioError::NoSamples { path: self.source.name().into(), detail }
    }

    /// What the file is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The next interleaved samples, never empty; None at the end.
    ///
    /// # Errors
    /// A floating-point sample that is not finite.
    pub fn next_block(&mut self) -> Result<Option<&[f32]>> {
        let left = self.source.end_frame(self.spec.sample_rate) - self.n_frames;
        if left == 0 || !std::mem::take(&mut self.waiting) && !self.fill()? {
            return Ok(None);
        }
        let most = usize::try_from(left).unwrap_or(usize::MAX).saturating_mul(self.spec.channels);
        self.block.truncate(most);
        self.n_frames += (self.block.len() / self.spec.channels) as u64;
        Ok(Some(&self.block))
    }

    /// Packets skipped so far because they could not be decoded.
    pub fn damaged_packets(&self) -> u64 {
        self.damaged_packets
    }

    /// What else was noticed so far, for people: truncation, changes of format.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Frames handed out so far.
    pub fn n_frames(&self) -> u64 {
        self.n_frames
    }

    /// Decodes until `block` holds kept samples; false at the end.
    fn fill(&mut self) -> Result<bool> {
        loop {
            let past_end = self.keep.last().is_none_or(|last| self.position >= last.end);
            if past_end || self.ended {
                return Ok(false);
            }
            let Some(decoded) = self.decode_packet()? else {
                self.note_shortfall();
                return Ok(false);
            };
            if (decoded.sample_rate, decoded.channels) != (self.spec.sample_rate, self.spec.channels) {
                self.warnings.push(format!(
                    "from {:.3} s on the audio changes from {} Hz, {} channels to {} Hz, {} channels: only what comes before is used",
                    self.n_frames as f64 / f64::from(self.spec.sample_rate),
                    self.spec.sample_rate,
                    self.spec.channels,
                    decoded.sample_rate,
                    decoded.channels
                ));
                self.ended = true;
                return Ok(false);
            }
            self.take_block()?;
            if !self.block.is_empty() {
                return Ok(true);
            }
        }
    }

    /// Trims the freshly decoded block and checks its samples.
    fn take_block(&mut self) -> Result<()> {
        let channels = self.spec.channels;
        let decoded = (self.block.len() / channels) as u64;
        trim::apply(&self.keep, self.position, channels, &mut self.block);
        self.position += decoded;
        let Some(bad) = self.block.iter().position(|sample| !sample.is_finite()) else {
            return Ok(());
        };
        if self.float_pcm {
            let frame = self.n_frames + (bad / channels) as u64;
            return Err(AudioError::NotFinite { path: self.source.name().into(), frame, value: self.block[bad] });
        }
        // No codec means to make these: the packet was damaged without its decoder noticing.
        self.damaged_packets += 1;
        self.block.clear();
        Ok(())
    }

    fn note_shortfall(&mut self) {
        // Lossy codecs' containers count the last packet's frames loosely.
        let slack_s = if self.spec.sample_format.is_some() { 0.0 } else { 0.1 };
        let missing = self.spec.n_frames.map_or(0, |expected| expected.saturating_sub(self.n_frames));
        let missing_s = missing as f64 / f64::from(self.spec.sample_rate);
        if missing_s > slack_s && self.warnings.is_empty() {
            self.warnings
                .push(format!("the file is truncated or damaged: {missing_s:.3} s of what it states are missing"));
        }
    }

    /// Decodes the next good packet of the track into `block`; None at the end.
    fn decode_packet(&mut self) -> Result<Option<Decoded>> {
        while !self.ended {
            let packet = match guarded(|| self.format.next_packet()) {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(Error::IoError(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                    return Err(self.source.io_error(error));
                }
                Err(Error::IoError(_)) => {
                    self.warnings.push("the file is truncated: what is there is used".into());
                    break;
                }
                Err(Error::ResetRequired) => {
                    self.warnings
                        .push("the file holds several streams one after the other: only the first is used".into());
                    break;
                }
                Err(error) => {
                    self.warnings.push(format!("the file is damaged, only what comes before is used ({error})"));
                    break;
                }
            };
            if packet.track_id != self.track_id {
                continue;
            }
            match guarded(|| self.decoder.decode(&packet)) {
                Ok(buffer) if buffer.is_empty() || buffer.num_planes() == 0 => {}
                Ok(buffer) => {
                    buffer.copy_to_vec_interleaved(&mut self.block);
                    if self.gain != 1.0 {
                        self.block.iter_mut().for_each(|sample| *sample *= self.gain);
                    }
                    let (sample_rate, channels) = (buffer.spec().rate(), buffer.spec().channels().count());
                    return Ok(Some(Decoded { sample_rate, channels }));
                }
                Err(_) => {
                    self.damaged_packets += 1;
                    self.position += frames_of(&packet, self.frames_per_tick);
                }
            }
        }
        self.ended = true;
        self.block.clear();
        Ok(None)
    }
}

/// What the last decoded packet held.
struct Decoded {
    sample_rate: u32,
    channels: usize,
}

fn n_kept(keep: &[Range<u64>]) -> u64 {
    keep.iter().map(|range| range.end - range.start).sum()
}

fn frames_of(packet: &Packet, (numer, denom): (u64, u64)) -> u64 {
    let frames = u128::from(packet.block_dur().get()) * u128::from(numer) / u128::from(denom);
    u64::try_from(frames).unwrap_or(u64::MAX)
}

/// Decodes a whole file (`-`: standard input) into memory.
///
/// # Errors
/// As [`Decoder::open`] and [`Decoder::next_block`].
pub fn decode_file(path: &Path) -> Result<Clip> {
    Ok(decode_tail(&AudioSource::open(path)?, f64::INFINITY)?.clip)
}

/// The end of a file, and what was noticed on the way there.
#[derive(Clone, Debug)]
pub struct Tail {
    /// At most the seconds asked for, ending with the file's last frame.
    pub clip: Clip,
    /// Frames in the whole file.
    pub total_frames: u64,
    /// Packets skipped because they could not be decoded.
    pub damaged_packets: u64,
    /// Warnings for people.
    pub warnings: Vec<String>,
    /// What the file is.
    pub spec: Spec,
}

/// Decodes a file and keeps its last `max_s` seconds (at least one frame); holds at most twice that in memory.
///
/// # Errors
/// As [`Decoder::from_source`] and [`Decoder::next_block`], and a source that is to end after the file does.
pub fn decode_tail(source: &AudioSource, max_s: f64) -> Result<Tail> {
    let mut decoder = Decoder::from_source(source)?;
    let Spec { channels, sample_rate, .. } = *decoder.spec();
    // Saturates for an infinite tail.
    let max_frames = (max_s * f64::from(sample_rate)).ceil().max(1.0) as usize;
    let max_samples = max_frames.saturating_mul(channels);
    let mut samples = Vec::new();
    while let Some(block) = decoder.next_block()? {
        samples.extend_from_slice(block);
        if samples.len() > max_samples.saturating_mul(2) {
            samples.drain(..samples.len() - max_samples);
        }
    }
    samples.drain(..samples.len().saturating_sub(max_samples));
    if let Some(end_s) = source.end_s()
        && decoder.n_frames < source.end_frame(sample_rate)
    {
        let has_s = decoder.n_frames as f64 / f64::from(sample_rate);
        return Err(AudioError::Shorter { path: source.name().into(), has_s, end_s });
    }
    Ok(Tail {
        clip: Clip { samples, channels, sample_rate },
        total_frames: decoder.n_frames,
        damaged_packets: decoder.damaged_packets,
        warnings: decoder.warnings,
        spec: decoder.spec,
    })
}
