//! Damaged files of every container end in samples or in an error, never in a panic.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use wavegen::audio::{AudioSource, SampleFormat, WavFormat, WavWriter, decode_tail};

/// Small files of the shared collection, one per container and codec.
const FILES: [&str; 12] = [
    "essentia/generated/silence/silence.flac",
    "essentia/generated/synthesised/impulse/flac/bad_stream_info/impulses_1second_22050_bad_stream_info.flac",
    "android/libraries/test_data/src/test/assets/media/mp3/test-cbr-info-header.mp3",
    "android/libraries/test_data/src/test/assets/media/mp3/sine-wave-cbr-trailing-id3v1.mp3",
    "essentia/generated/synthesised/impulse/ogg/impulses_1second_48000.ogg",
    "android/libraries/test_data/src/test/assets/media/mp4/bbb_1ch_16kHz_aac.mp4",
    "android/libraries/test_data/src/test/assets/media/mp4/sample_alac_20bit.mp4",
    "android/libraries/test_data/src/test/assets/media/dash/emsg/sample.audio.mp4",
    "android/libraries/test_data/src/test/assets/media/mkv/bbb_1ch_12kHz_q10_vorbis.webm",
    "android/libraries/test_data/src/test/assets/media/aac/sine.aac",
    "android/libraries/test_data/src/test/assets/media/wav/sample_ima_adpcm.wav",
    "essentia/generated/empty/empty.aiff",
];

/// The shared files that are there, and a WAV made here, which always is.
fn files() -> Vec<Vec<u8>> {
    let shared = std::env::var_os("WAVEGEN_SHARED").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let mut files: Vec<Vec<u8>> =
        FILES.iter().filter_map(|file| fs::read(shared.join("formats").join(file)).ok()).collect();
    if files.len() < FILES.len() {
        println!("skipped: {} of {} files are absent (set WAVEGEN_SHARED)", FILES.len() - files.len(), FILES.len());
    }
    for format in [SampleFormat::U8, SampleFormat::I24, SampleFormat::F32] {
        let out = std::io::Cursor::new(Vec::new());
        let mut writer = WavWriter::new(out, "memory", WavFormat::new(8000, 3, format)).unwrap();
        writer.write(&[0.25; 999]).unwrap();
        files.push(writer.finish_file().unwrap().into_inner());
    }
    files
}

/// One act of damage; places are fractions of the file.
#[derive(Clone, Debug)]
enum Damage {
    Overwrite {
        at: f64,
        with: u8,
    },
    /// Among the first 256 bytes, where headers are.
    OverwriteHead {
        at: usize,
        with: u8,
    },
    Remove {
        at: f64,
        bytes: usize,
    },
    Insert {
        at: f64,
        bytes: usize,
    },
    Truncate {
        at: f64,
    },
}

impl Damage {
    fn apply(&self, file: &mut Vec<u8>) {
        let place = |at: f64, len: usize| (at * len as f64) as usize;
        let len = file.len();
        match *self {
            _ if len == 0 => {}
            Self::Overwrite { at, with } => file[place(at, len)] = with,
            Self::OverwriteHead { at, with } => file[at.min(len - 1)] = with,
            Self::Remove { at, bytes } => {
                let at = place(at, len);
                file.drain(at..(at + bytes).min(len));
            }
            Self::Insert { at, bytes } => {
                let at = place(at, len);
                file.splice(at..at, (0..bytes).map(|i| i as u8));
            }
            Self::Truncate { at } => file.truncate(place(at, len)),
        }
    }
}

fn any_damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (0.0..1.0, any::<u8>()).prop_map(|(at, with)| Damage::Overwrite { at, with }),
        4 => (0usize..256, any::<u8>()).prop_map(|(at, with)| Damage::OverwriteHead { at, with }),
        1 => (0.0..1.0, 1usize..999).prop_map(|(at, bytes)| Damage::Remove { at, bytes }),
        1 => (0.0..1.0, 1usize..999).prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
        1 => (0.0..1.0f64).prop_map(|at| Damage::Truncate { at }),
    ]
}

fn decodes_or_is_refused(file: &[u8], path: &Path) {
    fs::write(path, file).unwrap();
    if let Ok(tail) = decode_tail(&AudioSource::open(path).unwrap(), 1.0) {
        assert!(tail.clip.n_frames() > 0);
        assert!(tail.clip.samples.iter().all(|sample| sample.is_finite()));
    }
}

#[test]
fn an_assertion_inside_the_decoder_becomes_an_error() {
    let folder = tempfile::tempdir().unwrap();
    // Found by the test below: puts an MP4 box beyond 2^63 bytes.
    let damage = Damage::Overwrite { at: 0.08247528049432193, with: 128 };
    for mut file in files() {
        damage.apply(&mut file);
        decodes_or_is_refused(&file, &folder.path().join("damaged"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_file_never_panics(damages in proptest::collection::vec(any_damage(), 1..8)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged");
        for mut file in files() {
            damages.iter().for_each(|damage| damage.apply(&mut file));
            decodes_or_is_refused(&file, &path);
        }
    }
}
