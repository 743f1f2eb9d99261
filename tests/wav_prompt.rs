//! A WAV prompt goes into the output byte for byte, whatever its format and however its header was written.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use wavegen::audio::{AudioError, AudioSource, SampleFormat, WavPrompt, decode_file};
use wavegen::sink;

const RATES: [u32; 9] = [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192000];

/// How a header may state the length of its data.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Length {
    Stated,
    Zero,
    AllOnes,
    Rf64,
}

#[derive(Clone, Debug)]
struct Case {
    format: SampleFormat,
    channels: usize,
    sample_rate: u32,
    /// Bytes of the `fmt ` chunk: 16, 18 or 40 (WAVE_FORMAT_EXTENSIBLE).
    fmt_bytes: usize,
    length: Length,
    /// An odd-sized chunk before the data, and one after it.
    extra_chunks: bool,
    data: Vec<u8>,
}

impl Case {
    fn new(format: SampleFormat, channels: usize, sample_rate: u32, n_frames: usize) -> Self {
        let n_samples = n_frames * channels;
        let data = (0..n_samples).flat_map(|i| sample_bytes(format, i)).collect();
        Self { format, channels, sample_rate, fmt_bytes: 16, length: Length::Stated, extra_chunks: false, data }
    }

    fn n_frames(&self) -> usize {
        self.data.len() / self.channels / self.format.bytes()
    }

    fn fmt(&self) -> Vec<u8> {
        let tag: u16 = if self.format.is_float() { 3 } else { 1 };
        let frame_bytes = self.channels * self.format.bytes();
        let mut fmt = Vec::new();
        fmt.extend(if self.fmt_bytes == 40 { 0xfffe } else { tag }.to_le_bytes());
        fmt.extend((self.channels as u16).to_le_bytes());
        fmt.extend(self.sample_rate.to_le_bytes());
        fmt.extend((self.sample_rate * frame_bytes as u32).to_le_bytes());
        fmt.extend((frame_bytes as u16).to_le_bytes());
        fmt.extend(self.format.bits().to_le_bytes());
        if self.fmt_bytes == 40 {
            fmt.extend(22u16.to_le_bytes());
            fmt.extend(self.format.bits().to_le_bytes());
            fmt.extend(((1u32 << self.channels) - 1).to_le_bytes());
            fmt.extend(tag.to_le_bytes());
            fmt.extend([0, 0, 0, 0, 0x10, 0, 0x80, 0, 0, 0xaa, 0, 0x38, 0x9b, 0x71]);
        }
        fmt.resize(self.fmt_bytes, 0);
        fmt
    }

    fn file(&self) -> Vec<u8> {
        let mut file = b"RIFF\0\0\0\0WAVE".to_vec();
        let chunk = |file: &mut Vec<u8>, name: &[u8; 4], stated: u32, body: &[u8]| {
            file.extend(name);
            file.extend(stated.to_le_bytes());
            file.extend(body);
            file.resize(file.len().next_multiple_of(2), 0);
        };
        if self.length == Length::Rf64 {
            let mut sizes = [0; 28];
            sizes[8..16].copy_from_slice(&(self.data.len() as u64).to_le_bytes());
            chunk(&mut file, b"ds64", 28, &sizes);
        }
        if self.extra_chunks {
            chunk(&mut file, b"note", 5, b"hello");
        }
        chunk(&mut file, b"fmt ", self.fmt_bytes as u32, &self.fmt());
        let stated = match self.length {
            Length::Stated => self.data.len() as u32,
            Length::Zero => 0,
            Length::AllOnes | Length::Rf64 => u32::MAX,
        };
        chunk(&mut file, b"data", stated, &self.data);
        if matches!(self.length, Length::Zero | Length::AllOnes) {
            // What a pipe's writer leaves: no padding and no lengths.
            file.truncate(file.len() - self.data.len() % 2);
        } else {
            if self.extra_chunks {
                chunk(&mut file, b"LIST", 4, b"INFO");
            }
            let riff = file.len() as u32 - 8;
            file[4..8].copy_from_slice(&riff.to_le_bytes());
        }
        if self.length == Length::Rf64 {
            file[..8].copy_from_slice(b"RF64\xff\xff\xff\xff");
        }
        file
    }
}

/// Any bit pattern that is a finite number.
fn sample_bytes(format: SampleFormat, i: usize) -> Vec<u8> {
    let noise = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    match format {
        SampleFormat::F32 => f32::from_bits(noise as u32 & 0xbfff_ffff).to_le_bytes().to_vec(),
        SampleFormat::F64 => f64::from_bits(noise & 0xbfff_ffff_ffff_ffff).to_le_bytes().to_vec(),
        integer => noise.to_le_bytes()[..integer.bytes()].to_vec(),
    }
}

/// Prompt and 100 frames more, through the sink for `output`.
fn continue_with_ramp(prompt: &WavPrompt, output: &Path) -> usize {
    let mut sink = sink::open(output, false).unwrap();
    sink.start(&prompt.format).unwrap();
    sink.copy_prompt(prompt).unwrap();
    let n_samples = 100 * prompt.format.channels;
    let ramp: Vec<f32> = (0..n_samples).map(|i| i as f32 / n_samples as f32).collect();
    sink.write(&ramp[..n_samples / 2]).unwrap();
    sink.write(&ramp[n_samples / 2..]).unwrap();
    sink.finish().unwrap();
    100
}

/// Body of the first chunk of that name and what its header states.
fn chunk_of<'a>(file: &'a [u8], name: &[u8; 4]) -> (&'a [u8], u32) {
    let mut at = 12;
    loop {
        let bytes = u32::from_le_bytes(file[at + 4..at + 8].try_into().unwrap());
        let end = (at + 8 + bytes as usize).min(file.len());
        if &file[at..at + 4] == name {
            return (&file[at + 8..end], bytes);
        }
        at = end.next_multiple_of(2);
    }
}

fn check(case: &Case, folder: &Path) {
    let (input, output): (PathBuf, PathBuf) = (folder.join("in.wav"), folder.join("out.wav"));
    fs::write(&input, case.file()).unwrap();
    let _ = fs::remove_file(&output);
    let what = format!("{:?}", Case { data: vec![], ..case.clone() });

    let prompt = WavPrompt::open(&AudioSource::open(&input).unwrap()).unwrap().unwrap_or_else(|| panic!("{what}"));
    assert_eq!(prompt.n_frames, case.n_frames() as u64, "{what}");
    assert_eq!(prompt.missing_frames, 0, "{what}");
    let added = continue_with_ramp(&prompt, &output);

    let written = fs::read(&output).unwrap();
    let (data, stated) = chunk_of(&written, b"data");
    let frame_bytes = case.channels * case.format.bytes();
    assert_eq!(stated as usize, case.data.len() + added * frame_bytes, "{what}");
    assert!(data.starts_with(&case.data), "{what}: prompt bytes differ");
    assert_eq!(chunk_of(&written, b"fmt ").0, case.fmt(), "{what}");
    assert_eq!(written.len() % 2, 0, "{what}");
    assert_eq!(u32::from_le_bytes(written[4..8].try_into().unwrap()) as usize, written.len() - 8, "{what}");

    let (before, after) = (decode_file(&input).unwrap(), decode_file(&output).unwrap());
    assert_eq!((after.sample_rate, after.channels), (case.sample_rate, case.channels), "{what}");
    assert_eq!(before.n_frames(), case.n_frames(), "{what}");
    assert_eq!(after.n_frames(), case.n_frames() + added, "{what}");
    assert!(after.samples.starts_with(&before.samples), "{what}: decoded prompts differ");
    let step = 1.0 / 127.0;
    for (i, sample) in after.samples[before.samples.len()..].iter().enumerate() {
        let ramp = i as f32 / (added * case.channels) as f32;
        assert!((sample - ramp).abs() < step, "{what}: sample {i} of the continuation is {sample}, not {ramp}");
    }
}

#[test]
fn prompt_bytes_are_identical_for_all_formats_channels_and_rates() {
    let folder = tempfile::tempdir().unwrap();
    for format in SampleFormat::ALL {
        for channels in 1..=6 {
            for sample_rate in RATES {
                check(&Case::new(format, channels, sample_rate, 333), folder.path());
            }
        }
    }
}

#[test]
fn hound_reads_the_continued_file() {
    let folder = tempfile::tempdir().unwrap();
    for format in [SampleFormat::U8, SampleFormat::I16, SampleFormat::I24, SampleFormat::I32, SampleFormat::F32] {
        for (channels, fmt_bytes) in [(1, 16), (2, 40), (6, 40)] {
            check(&Case { fmt_bytes, ..Case::new(format, channels, 44100, 51) }, folder.path());
            let reader = hound::WavReader::open(folder.path().join("out.wav")).unwrap();
            assert_eq!(reader.duration(), 151, "{format} {channels}");
        }
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let format = proptest::sample::select(SampleFormat::ALL.to_vec());
    let length = proptest::sample::select(vec![Length::Stated, Length::Zero, Length::AllOnes, Length::Rf64]);
    let fmt_bytes = proptest::sample::select(vec![16usize, 18, 40]);
    (format, 1usize..=8, 1000u32..200_000, fmt_bytes, length, any::<bool>(), 1usize..5000).prop_map(
        |(format, channels, sample_rate, fmt_bytes, length, extra_chunks, n_frames)| Case {
            fmt_bytes,
            length,
            extra_chunks,
            ..Case::new(format, channels, sample_rate, n_frames)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn prompt_bytes_are_identical_however_the_header_was_written(case in any_case()) {
        check(&case, tempfile::tempdir().unwrap().path());
    }
}

#[test]
fn a_truncated_wav_yields_what_is_there_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.wav");
    let case = Case::new(SampleFormat::I16, 2, 8000, 8000);
    let file = case.file();
    fs::write(&path, &file[..file.len() - 16001]).unwrap();
    let source = AudioSource::open(&path).unwrap();
    let tail = wavegen::audio::decode_tail(&source, 0.25).unwrap();
    assert_eq!((tail.total_frames, tail.clip.n_frames()), (3999, 2000));
    assert!(tail.warnings.iter().any(|warning| warning.contains("truncated")), "{:?}", tail.warnings);
    let prompt = WavPrompt::open(&source).unwrap().unwrap();
    assert_eq!((prompt.n_frames, prompt.missing_frames), (3999, 4001));
}

#[test]
fn a_sample_that_is_not_finite_is_refused_with_its_frame() {
    let folder = tempfile::tempdir().unwrap();
    for format in [SampleFormat::F32, SampleFormat::F64] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut case = Case::new(format, 2, 44100, 20_000);
            let at = (12_345 * 2 + 1) * format.bytes();
            match format {
                SampleFormat::F32 => case.data[at..at + 4].copy_from_slice(&bad.to_le_bytes()),
                _ => case.data[at..at + 8].copy_from_slice(&f64::from(bad).to_le_bytes()),
            }
            let path = folder.path().join("bad.wav");
            fs::write(&path, case.file()).unwrap();
            let error = decode_file(&path).unwrap_err();
            assert!(matches!(error, AudioError::NotFinite { frame: 12_345, .. }), "{format} {bad}: {error}");
            assert!(error.to_string().contains("bad.wav"), "{error}");
        }
    }
}

#[test]
fn a_wav_without_samples_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.wav");
    fs::write(&path, Case::new(SampleFormat::I16, 1, 16000, 0).file()).unwrap();
    assert!(matches!(decode_file(&path), Err(AudioError::NoSamples { .. })));
}

#[test]
fn the_tail_is_the_end_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.wav");
    fs::write(&path, Case::new(SampleFormat::I24, 3, 8000, 100_000).file()).unwrap();
    let whole = decode_file(&path).unwrap();
    for seconds in [0.0, 0.5, 3.3, 12.5, 1e300, f64::INFINITY] {
        let tail = wavegen::audio::decode_tail(&AudioSource::open(&path).unwrap(), seconds).unwrap();
        let expected = ((seconds * 8000.0).ceil() as usize).clamp(1, 100_000);
        assert_eq!(tail.clip.n_frames(), expected, "{seconds} s");
        assert!(whole.samples.ends_with(&tail.clip.samples), "{seconds} s");
        assert_eq!(tail.total_frames, 100_000);
    }
}
