//! Turns recordings of any format into a corpus: a folder of samples at one rate and level, and a manifest that says what
//! they are.
//!
//! ```text
//! corpus/part-1of2.jsonl      the manifest: one JSON object a line, only ever appended to
//! corpus/part-1of2-000.pcm    the samples, i16, little-endian, one piece after the other; up to 1 GiB a file
//! corpus/part-2of2.jsonl ...  what the second of two jobs made
//! ```
//!
//! | module | what it turns into what |
//! |---|---|
//! | [`piece`] | an audio file into samples at the corpus' rate and level, and what is to be known of them |
//! | [`manifest`] | lines of the manifest into pieces |
//! | `part` | pieces into a part's files, so that a kill at any moment leaves whole pieces only |
//! | [`prepare`](mod@prepare) | folders into a corpus, on all cores, only what is new |
//! | [`sound`] | levels of all pieces into what is wrong with them |
//!
//! Pieces are known by the hash of their file's bytes: moved, touched and doubled files are not decoded again. Samples are
//! read by position, excerpt by excerpt: the system keeps in memory what it likes, and nothing here is unsafe.
//! Nothing here knows about models, codecs or plans: one corpus serves every model of its rate.

pub mod manifest;
mod part;
pub mod piece;
pub mod prepare;
pub mod sound;

use std::io::ErrorKind;
use std::path::PathBuf;

use crate::audio::AudioError;

pub use manifest::{Corpus, Piece, Samples};
pub use piece::Facts;
pub use prepare::{PrepareEvent, PrepareSettings, Prepared, prepare};
pub use sound::{Findings, Sound};

/// Why a corpus cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    #[error("{path}: cannot be read or written ({source})", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: no space for it ({source}); make some, or use another disk, and start the same command again",
            path = path.display())]
    Full { path: PathBuf, source: std::io::Error },
    #[error("{folder}: is no corpus; make one with `wavegen prepare RECORDINGS -o {folder}`", folder = folder.display())]
    Foreign { folder: PathBuf },
    #[error("{folder}: made at {got} Hz, {wanted} Hz are needed; prepare another folder with --sample-rate {wanted}",
            folder = folder.display())]
    SampleRate { folder: PathBuf, wanted: u32, got: u32 },
    #[error("{path}: written in layout version {got}, this program reads version {expected}; prepare another folder",
            path = path.display())]
    Version { path: PathBuf, got: u32, expected: u32 },
    #[error("{path}: damaged ({what}); remove the folder and prepare it again", path = path.display())]
    Damaged { path: PathBuf, what: String },
    #[error(transparent)]
    Audio(#[from] AudioError),
    #[error("starting threads")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

impl CorpusError {
    fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        |source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Self::Full { path, source },
            _ => Self::Io { path, source },
        }
    }
}
