//! Every file of the shared collection of formats decodes to what ffprobe says, or is refused in words.
//!
//! The collection lies outside the repository: `WAVEGEN_SHARED`, else `../shared` beside it. Its PROBE.tsv has one line
//! per file: path, bytes, container, codec, rate, channels, duration, remarks.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
#[cfg(feature = "opus")]
use wavegen::audio::resample;
use wavegen::audio::{AudioError, AudioSource, Result, Tail, decode_file, decode_tail};

fn formats() -> Option<PathBuf> {
    let shared = std::env::var_os("WAVEGEN_SHARED").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let formats = shared.join("formats");
    if !formats.is_dir() {
        println!("skipped: {} is absent (set WAVEGEN_SHARED)", formats.display());
        return None;
    }
    Some(formats)
}

/// One line of PROBE.tsv; empty fields are None.
struct Probe {
    path: String,
    container: String,
    codec: String,
    sample_rate: Option<u32>,
    channels: Option<usize>,
    duration_s: Option<f64>,
}

impl Probe {
    fn read(table: &Path) -> Vec<Self> {
        let lines = fs::read_to_string(table).unwrap();
        let parse = |line: &str| {
            let fields: Vec<&str> = line.split('\t').collect();
            Self {
                path: fields[0].into(),
                container: fields[2].into(),
                codec: fields[3].into(),
                sample_rate: fields[4].parse().ok(),
                channels: fields[5].parse().ok(),
                duration_s: fields[6].parse().ok(),
            }
        };
        lines.lines().skip(1).map(parse).collect()
    }

    fn is(&self, end: &str) -> bool {
        self.path.ends_with(end)
    }
}

/// Codecs that symphonia 0.6 does not decode.
const NO_DECODER: [&str; 7] = ["amr_nb", "amr_wb", "ac3", "dts", "truehd", "mpegh_3d_audio", "adpcm_ima_qt"];

/// Opus is decoded with the feature `opus`, but of more than two channels.
fn is_opus_without_decoder(probe: &Probe) -> bool {
    probe.codec == "opus" && (!cfg!(feature = "opus") || probe.channels.is_none_or(|channels| channels > 2))
}

/// Files that ffprobe reads and symphonia 0.6 does not, and why.
const REFUSED: [(&str, &str); 13] = [
    ("mkv/sample_with_chapters.mkv", "chapters without an edition uid"),
    ("mp4/sample_mdat_too_long.mp4", "media data longer than the file"),
    ("mp4/sample_mp2_audio.mp4", "declared MP2, holds MP3"),
    ("mp4/sample_fixed_rechunk_no_elst.mp4", "PCM sample entry not understood"),
    ("hls/multi-segment/init.mp4", "no media, and an hvcC box that is too long"),
    ("cmaf/multi-segment/audio_init.mp4", "no media"),
    ("10 - file starting at frame header.flac", "no fLaC marker"),
    ("11 - file starting with unparsable data.flac", "no fLaC marker"),
    ("crash-e5471f5b58397287b509db7d026e95f1724454f5.wav", "contradictory float format"),
    ("empty/empty.mp3", "two frames, all of them encoder delay and padding"),
    ("empty/empty.ogg", "no audio after the headers"),
    ("correct/mp3_in_wav.wav", "MP3 in WAV"),
    ("pcmwaveformat-24bit-4byte-48kHz-stereo.wav", "24 bits somewhere in 4 bytes"),
];

/// Files that ffprobe does not understand, or not as we do, with what we read: rate, channels, frames.
const READ_ANYWAY: [(&str, u32, usize, usize); 5] = [
    // A megabyte of noise before the MP3, which ffprobe takes for AMR.
    ("mp3/100kB-garbage-prefix.mp3", 44100, 1, 44100),
    // Its AC-3 track has no decoder, its AAC track has.
    ("mp4/sample_ac3_aac.mp4", 48000, 2, 14304),
    // Encrypted video beside plain audio.
    ("drm/sample_fragmented_clearkey.mp4", 44100, 1, 47104),
    // Encrypted audio, most of whose packets do not decode.
    ("drm/sample_fragmented_widevine.mp4", 44100, 1, 4096),
    ("mp4/sample_fragmented_uuid.mp4", 44100, 1, 10240),
];

/// Files whose true length is known better than ffprobe's (an estimate by bit rate, or the length of a video beside the
/// audio, or encoder delay counted in): frames.
const LENGTHS: [(&str, usize); 37] = [
    // Encoder delay and padding removed: exactly what went into the encoder.
    ("audiowaveform/test/data/test_file_mono.mp3", 113_519),
    ("impulse/mp3/impulses_1second_22050.mp3", 220_500),
    ("impulse/mp3/impulses_1second_44100_st.mp3", 441_000),
    ("impulse/mp3/impulses_1second_48000.mp3", 480_000),
    ("correct/mono_sine_at_44100Hz.mp3", 220_500),
    ("correct/mono_sine_at_44100Hz.m4a", 220_500),
    ("correct/mono_sine_at_48000Hz.m4a", 240_000),
    ("correct/mono_sine_at_48000Hz.mp3", 240_000),
    ("audioformats/p001.mp4", 396_679),
    ("rodio/assets/RL.mp3", 1_208_256),
    ("rodio/assets/RL.m4a", 1_208_256),
    ("rodio/assets/music.mp3", 447_720),
    ("mp3/test-cbr-info-header.mp3", 44_100),
    ("mp4/bbb_1ch_16kHz_aac.mp4", 16_000),
    ("mp4/bbb_1ch_8kHz_aac_lc.m4a", 24_000),
    // Bit rates that vary.
    ("audioformats/p001.aac", 398_336),
    ("mp3/bear-id3.mp3", 133_632),
    ("mp3/bear-id3-numeric-genre.mp3", 133_632),
    ("mp3/bear-vbr-no-seek-table.mp3", 125_568),
    ("ts/sample.adts", 147_456),
    ("ts/sample_cbs_truncated.adts", 146_432),
    ("correct/mono_sine_at_44100Hz.adts", 222_208),
    // Longer video, or fragments without a true length.
    ("mp4/sample_shorter_audio.mp4", 33_792),
    ("mp4/sample_partially_fragmented.mp4", 46_080),
    ("mp4/sample_fragmented.mp4", 47_104),
    ("mp4/sample_fragmented_sei.mp4", 47_104),
    ("mp4/sample_fragmented_unsupported_brands.mp4", 47_104),
    ("mkv/sample_with_vorbis_audio.mkv", 44_608),
    // The last frame does not decode: its block size is not divisible as FLAC demands.
    ("audioformats/p001.flac", 396_288),
    // What `opusdec` makes of them: ffprobe counts the delay in.
    ("media/ogg/bear.opus", 131_520),
    ("ogg/bear_duplicate_header.opus", 131_520),
    ("audiowaveform/test/data/test_file_stereo.opus", 340_765),
    ("rodio/assets/music.opus", 487_315),
    // An edit list that begins at frame 21,912 of 70,080.
    ("mp4/sample_opus.mp4", 48_168),
    // 74 packets of 960 frames, and 51 without the delay.
    ("pydub/test/data/test5.webm", 71_040),
    ("multi-track-with-offset/sample.audio.mp4", 48_648),
    // Symphonia does not hand out the last packet.
    ("pydub/test/data/bach.ogg", 133_632),
];

/// Frames by which a decoded length may differ from ffprobe's duration.
fn tolerance(probe: &Probe) -> f64 {
    match (probe.codec.as_str(), probe.container.as_str()) {
        // One packet: container times are rounded, to milliseconds or worse, and end with the last packet.
        (_, "matroska,webm") => 1152.0,
        // A block that is not filled.
        ("adpcm_ima_wav" | "adpcm_ms", _) => 1024.0,
        // Encoder delay (up to 2 packets) and padding are counted in by ffprobe and not by us.
        ("aac", _) => 3.0 * 1024.0,
        ("mp3", _) => 2.0 * 1152.0,
        // A pause in the edit list.
        ("alac", _) => 4096.0,
        // Exact: durations are printed to the microsecond.
        _ => 0.5,
    }
}

/// What is wrong with the outcome, if anything.
fn judge(probe: &Probe, outcome: &Result<Tail>) -> Option<String> {
    let no_audio = probe.codec.is_empty() || probe.sample_rate.is_none() || probe.channels.is_none();
    let exception = READ_ANYWAY.iter().find(|(end, ..)| probe.is(end));
    let refused = exception.is_none()
        && (no_audio
            || probe.duration_s.is_none() && probe.container != "flac"
            || NO_DECODER.contains(&probe.codec.as_str())
            || is_opus_without_decoder(probe)
            || REFUSED.iter().any(|(end, _)| probe.is(end)));
    let tail = match (outcome, refused) {
        (Ok(_), true) => return Some("decoded, though it is listed as unreadable".into()),
        (Err(error), true) => return judge_refusal(probe, error),
        (Err(error), false) => return Some(format!("refused: {error}")),
        (Ok(tail), false) => tail,
    };
    let clip = &tail.clip;
    let (rate, channels) = match exception {
        Some((_, rate, channels, _)) => (Some(*rate), Some(*channels)),
        None => (probe.sample_rate, probe.channels),
    };
    if (Some(clip.sample_rate), Some(clip.channels)) != (rate, channels) {
        return Some(format!("{} Hz, {} channels, not {rate:?}, {channels:?}", clip.sample_rate, clip.channels));
    }
    let length = LENGTHS.iter().find(|(end, _)| probe.is(end)).map(|(_, frames)| *frames);
    let (expected, tolerance) = match (length.or(exception.map(|exception| exception.3)), probe.duration_s) {
        (Some(frames), _) => (frames as f64, 0.0),
        (None, Some(duration_s)) => (duration_s * f64::from(clip.sample_rate), tolerance(probe)),
        (None, None) => return None,
    };
    let off = clip.n_frames() as f64 - expected;
    (off.abs() > tolerance).then(|| format!("{} frames, {off:+} from what they should be", clip.n_frames()))
}

fn judge_refusal(probe: &Probe, error: &AudioError) -> Option<String> {
    let message = error.to_string();
    let clear = match error {
        AudioError::UnsupportedCodec { codec, .. } => codec != "this codec's",
        AudioError::NotAudio { .. } | AudioError::NoAudioTrack { .. } | AudioError::NoSamples { .. } => true,
        _ => false,
    };
    let named = message.contains(Path::new(&probe.path).file_name().unwrap().to_str().unwrap());
    (!clear || !named || message.contains('\n')).then(|| format!("unclear refusal: {message}"))
}

#[test]
fn every_readable_file_decodes_and_every_other_is_refused_in_words() {
    let Some(formats) = formats() else { return };
    let probes = Probe::read(&formats.join("PROBE.tsv"));
    let read = |probe: &Probe| -> Result<Tail> { decode_tail(&AudioSource::open(&formats.join(&probe.path))?, 1e9) };
    let judged: Vec<(bool, Option<String>)> = probes
        .par_iter()
        .map(|probe| {
            let outcome = read(probe);
            (outcome.is_ok(), judge(probe, &outcome).map(|wrong| format!("{}: {wrong}", probe.path)))
        })
        .collect();
    let wrong: Vec<&str> = judged.iter().filter_map(|(_, wrong)| wrong.as_deref()).collect();
    let n_decoded = judged.iter().filter(|(decoded, _)| *decoded).count();
    println!("{n_decoded} files decoded, {} refused", judged.len() - n_decoded);
    assert!(wrong.is_empty(), "{} of {} files:\n{}", wrong.len(), judged.len(), wrong.join("\n"));
}

#[test]
fn every_listed_exception_exists() {
    let Some(formats) = formats() else { return };
    let probes = Probe::read(&formats.join("PROBE.tsv"));
    let ends = REFUSED.iter().map(|(end, _)| *end);
    let ends = ends.chain(READ_ANYWAY.iter().map(|(end, ..)| *end)).chain(LENGTHS.iter().map(|(end, _)| *end));
    for end in ends {
        assert!(probes.iter().any(|probe| probe.is(end)), "{end} is not in PROBE.tsv");
    }
}

#[test]
fn a_source_that_ends_earlier_has_the_same_beginning() {
    let Some(formats) = formats() else { return };
    for file in
        ["rodio/assets/music.mp3", "rodio/assets/music.flac", "rodio/assets/music.m4a", "rodio/assets/lmms16bit.wav"]
    {
        let source = AudioSource::open(&formats.join(file)).unwrap();
        let whole = decode_tail(&source, 1e9).unwrap().clip;
        for seconds in [1e-6, 0.0311, 1.7] {
            let part = decode_tail(&source.clone().until(seconds), 1e9).unwrap();
            let n_frames = ((seconds * f64::from(whole.sample_rate)).round() as usize).max(1);
            assert_eq!((part.clip.n_frames(), part.total_frames), (n_frames, n_frames as u64), "{file}, {seconds} s");
            assert!(whole.samples.starts_with(&part.clip.samples), "{file}, {seconds} s");
        }
        let beyond = decode_tail(&source.until(whole.duration_s() + 1.0), 1.0).unwrap_err().to_string();
        assert!(beyond.contains(file) && beyond.contains("s long"), "{beyond}");
    }
}

#[test]
fn the_extension_does_not_matter() {
    let Some(formats) = formats() else { return };
    let folder = tempfile::tempdir().unwrap();
    for file in
        ["rodio/assets/music.mp3", "rodio/assets/RL.ogg", "rodio/assets/music.m4a", "rodio/assets/lmms16bit.wav"]
    {
        let expected = decode_file(&formats.join(file)).unwrap();
        for name in ["audio", "audio.wav", "audio.flac", "audio.mp3", "audio.txt"] {
            let copy = folder.path().join(name);
            fs::copy(formats.join(file), &copy).unwrap();
            assert!(decode_file(&copy).unwrap() == expected, "{file} as {name}");
        }
    }
}

#[test]
fn a_lossy_copy_starts_and_ends_with_its_original() {
    // The same recording as WAV, MP3 and Ogg Vorbis: with delay and padding removed, no shift between them fits better
    // than none.
    let Some(formats) = formats() else { return };
    let folder = formats.join("audiowaveform/test/data");
    let original = decode_file(&folder.join("test_file_stereo.wav")).unwrap().downmix();
    for file in ["test_file_stereo.flac", "test_file_stereo.oga", "test_file_stereo.mp3"] {
        let copy = decode_file(&folder.join(file)).unwrap().downmix();
        assert_eq!(shift(&original, &copy), 0, "{file}");
    }
}

/// Frames by which a copy comes later than its original.
fn shift(original: &[f32], copy: &[f32]) -> i64 {
    let likeness = |shift: i64| -> f64 {
        let pairs = (20_000..40_000i64).map(|i| (original[i as usize], copy[(i + shift) as usize]));
        pairs.map(|(a, b)| f64::from(a) * f64::from(b)).sum()
    };
    (-2500..2500).max_by(|&a, &b| likeness(a).total_cmp(&likeness(b))).unwrap_or(0)
}

/// Gives the first page of an Ogg stream the checksum that it should have.
#[cfg(feature = "opus")]
fn sign_first_page(ogg: &mut [u8]) {
    let n_segments = usize::from(ogg[26]);
    let end = 27 + n_segments + ogg[27..27 + n_segments].iter().map(|&n| usize::from(n)).sum::<usize>();
    ogg[22..26].fill(0);
    let sum = ogg[..end].iter().fold(0u32, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte) << 24, |sum, _| sum << 1 ^ if sum >> 31 == 1 { 0x04c1_1db7 } else { 0 })
    });
    ogg[22..26].copy_from_slice(&sum.to_le_bytes());
}

#[cfg(feature = "opus")]
#[test]
fn the_gain_that_opus_states_is_applied() {
    let Some(formats) = formats() else { return };
    let folder = tempfile::tempdir().unwrap();
    // -6 dB in 256ths of one.
    let gain = -6i16 * 256;
    // What it lies behind, how far behind where that begins, in which order.
    let files = [
        ("rodio/assets/music.opus", &b"OpusHead"[..], 16, gain.to_le_bytes()),
        (
            "android/libraries/test_data/src/test/assets/media/mkv/bbb_1ch_48kHz_q10_opus.webm",
            b"OpusHead",
            16,
            gain.to_le_bytes(),
        ),
        ("android/libraries/test_data/src/test/assets/media/mp4/sample_opus.mp4", b"dOps", 12, gain.to_be_bytes()),
    ];
    for (file, name, place, gain) in files {
        let path = formats.join(file);
        let mut bytes = fs::read(&path).unwrap();
        let at = place + bytes.windows(name.len()).position(|window| window == name).unwrap();
        bytes[at..at + 2].copy_from_slice(&gain);
        if bytes.starts_with(b"OggS") {
            sign_first_page(&mut bytes);
        }
        let softer = folder.path().join(path.file_name().unwrap());
        fs::write(&softer, bytes).unwrap();
        let [original, softer] = [path, softer].map(|path| decode_file(&path).unwrap().downmix());
        assert_eq!(original.len(), softer.len(), "{file}");
        assert!(original.iter().any(|x| x.abs() > 0.01), "{file}");
        let factor = 10f32.powf(-6.0 / 20.0);
        assert!(original.iter().zip(&softer).all(|(x, y)| (x * factor - y).abs() < 1e-6), "{file}");
    }
}

#[cfg(feature = "opus")]
#[test]
fn an_opus_copy_starts_with_its_original() {
    let Some(formats) = formats() else { return };
    let folder = formats.join("rodio/assets");
    let [original, copy] = ["music.flac", "music.opus"].map(|file| decode_file(&folder.join(file)).unwrap());
    let original = resample(&original.downmix(), original.sample_rate, copy.sample_rate).unwrap();
    assert_eq!(shift(&original, &copy.downmix()), 0);
}

/// A WAV of one second of zeros: `fmt ` as given, and so many bytes of data.
fn wav(fmt: &[u8], data: usize) -> Vec<u8> {
    let chunk = |name: &[u8], body: &[u8]| [name, &(body.len() as u32).to_le_bytes(), body].concat();
    let chunks = [&b"WAVE"[..], &chunk(b"fmt ", fmt), &chunk(b"data", &vec![0; data])].concat();
    chunk(b"RIFF", &chunks)
}

/// The plain fields of a `fmt ` chunk.
fn fmt(tag: u16, channels: u16, rate: u32, frame_bytes: u16, bits: u16) -> Vec<u8> {
    let rest = [frame_bytes.to_le_bytes(), bits.to_le_bytes()].concat();
    let bytes_a_second = rate.wrapping_mul(frame_bytes.into());
    [&tag.to_le_bytes()[..], &channels.to_le_bytes(), &rate.to_le_bytes(), &bytes_a_second.to_le_bytes(), &rest]
        .concat()
}

#[test]
fn headers_of_what_cannot_be_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    // 24 bits in containers of 32 bits, in the extensible format: PCM is its sub-format.
    let pcm = [1, 0, 0, 0, 0, 0, 16, 0, 128, 0, 0, 170, 0, 56, 155, 113];
    let extensible = [&fmt(0xfffe, 2, 44_100, 8, 24)[..], &[22, 0, 24, 0, 3, 0, 0, 0], &pcm].concat();
    // 30 channels of 16 bits at 44.1 kHz in an AIFF.
    let rate = [0x40, 0x0e, 0xac, 0x44, 0, 0, 0, 0, 0, 0];
    let common = [&[0, 30, 0, 0, 0, 100, 0, 16][..], &rate].concat();
    let chunk = |name: &[u8], body: &[u8]| [name, &(body.len() as u32).to_be_bytes(), body].concat();
    let sound = chunk(b"SSND", &vec![0; 8 + 100 * 60]);
    let aiff = chunk(b"FORM", &[&b"AIFF"[..], &chunk(b"COMM", &common), &sound].concat());
    for (name, bytes, why) in [
        ("fast.wav", wav(&fmt(1, 1, u32::MAX, 2, 16), 2000), "4294967295 Hz, where 1000 to 1536000 Hz can be read"),
        ("slow.wav", wav(&fmt(1, 1, 999, 2, 16), 2000), "999 Hz, where"),
        ("wide.aiff", aiff, "30 channels, where 1 to 26 can be read"),
        ("gaps.wav", wav(&extensible, 800), "narrower than their containers"),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let said = decode_file(&path).unwrap_err().to_string();
        assert!(said.contains(name) && said.contains(why), "{said}");
    }
}
