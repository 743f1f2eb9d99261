//! Turns the lines of a corpus' manifest into its pieces, and a place in a piece into samples.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::piece::Facts;
use super::{CorpusError, Sound};

/// Version of the layout; a corpus of another version is refused.
pub(super) const VERSION: u32 = 1;
/// Bytes of a stored sample.
pub(super) const BYTES: u64 = 2;

/// One line of a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub(super) enum Line {
    /// The first one.
    Corpus { version: u32, sample_rate: u32 },
    /// A file has been looked at; of several lines for one path the one with the highest `version` holds.
    File(Seen),
    /// The piece that files of this content are.
    Piece(Stored),
    /// Files of this content are no piece; another program may think otherwise.
    Bad { content: String, why: String, program: String },
    /// Everything before was all that was to be done.
    Done,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Seen {
    pub path: String,
    pub size: u64,
    pub modified_ns: u64,
    /// BLAKE3 of the file's bytes.
    pub content: String,
    pub version: u32,
}

/// A piece and where it lies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stored {
    pub content: String,
    pub shard: u32,
    /// Its first sample in the shard, and how many there are.
    pub at: u64,
    pub n_samples: u64,
    #[serde(flatten)]
    pub facts: Facts,
}

/// The whole lines of a part, and how many bytes they are; what comes after the last line break was being written.
pub(super) fn read_lines(path: &Path) -> Result<(Vec<Line>, u64), CorpusError> {
    let bytes = std::fs::read(path).map_err(CorpusError::io(path))?;
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    let damaged = |number: usize, what: String| CorpusError::Damaged {
        path: path.to_owned(),
        what: format!("line {}: {what}", number + 1),
    };
    let lines = bytes[..whole]
        .split_inclusive(|&b| b == b'\n')
        .enumerate()
        .map(|(number, line)| serde_json::from_slice(line).map_err(|e| damaged(number, e.to_string())))
        .collect::<Result<Vec<Line>, _>>()?;
    match lines.first() {
        Some(Line::Corpus { version: VERSION, .. }) | None => Ok((lines, whole as u64)),
        Some(&Line::Corpus { version: got, .. }) => {
            Err(CorpusError::Version { path: path.to_owned(), got, expected: VERSION })
        }
        Some(_) => Err(damaged(0, "does not say that it is a corpus".into())),
    }
}

/// Name of the i-th of n parts, i from 1.
pub(super) fn part_name((i, n): (usize, usize)) -> String {
    format!("part-{i}of{n}")
}

/// Where a part's manifest and its samples lie.
pub(super) fn manifest_path(folder: &Path, part: &str) -> PathBuf {
    folder.join(format!("{part}.jsonl"))
}

pub(super) fn shard_path(folder: &Path, part: &str, shard: u32) -> PathBuf {
    folder.join(format!("{part}-{shard:03}.pcm"))
}

/// The parts of a folder: `(n, i)` in order.
fn parts(folder: &Path) -> Vec<(usize, usize)> {
    let number = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let (i, n) = name.strip_prefix("part-")?.strip_suffix(".jsonl")?.split_once("of")?;
        Some((n.parse().ok()?, i.parse().ok()?))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut parts: Vec<_> = entries.filter_map(number).collect();
    parts.sort_unstable();
    parts
}

/// All that the manifest of a folder says.
#[derive(Default)]
pub(super) struct Index {
    pub sample_rate: Option<u32>,
    /// By path.
    pub files: BTreeMap<String, Seen>,
    /// By content: part and piece.
    pub pieces: HashMap<String, (String, Stored)>,
    /// By content: why, and which program said so.
    pub bad: HashMap<String, (String, String)>,
    /// Contents of all pieces in the order of the manifest.
    order: Vec<String>,
    /// Parts that were not brought to an end, or not begun.
    pub unfinished: Vec<String>,
}

impl Index {
    /// An empty one where there is no corpus yet.
    pub(super) fn read(folder: &Path) -> Result<Self, CorpusError> {
        let mut index = Self::default();
        let parts = parts(folder);
        for &(n, i) in &parts {
            let part = part_name((i, n));
            let path = manifest_path(folder, &part);
            let (lines, _) = read_lines(&path)?;
            if lines.last() != Some(&Line::Done) {
                index.unfinished.push(part.clone());
            }
            for line in lines {
                index.add(&path, &part, line)?;
            }
        }
        let counts: HashSet<usize> = parts.iter().map(|&(n, _)| n).collect();
        let all = counts.into_iter().flat_map(|n| (1..=n).map(move |i| (n, i)));
        index.unfinished.extend(all.filter(|part| !parts.contains(part)).map(|(n, i)| part_name((i, n))));
        index.unfinished.sort();
        Ok(index)
    }

    fn add(&mut self, path: &Path, part: &str, line: Line) -> Result<(), CorpusError> {
        match line {
            Line::Corpus { sample_rate, .. } => {
                if self.sample_rate.is_some_and(|rate| rate != sample_rate) {
                    let what = format!("{sample_rate} Hz, other parts have {:?} Hz", self.sample_rate);
                    return Err(CorpusError::Damaged { path: path.to_owned(), what });
                }
                self.sample_rate = Some(sample_rate);
            }
            Line::File(seen) => {
                if self.files.get(&seen.path).is_none_or(|known| known.version < seen.version) {
                    self.files.insert(seen.path.clone(), seen);
                }
            }
            Line::Piece(stored) => {
                // What a program before could not read.
                self.bad.remove(&stored.content);
                if !self.pieces.contains_key(&stored.content) {
                    self.order.push(stored.content.clone());
                    self.pieces.insert(stored.content.clone(), (part.to_owned(), stored));
                }
            }
            Line::Bad { content, why, program } => {
                if !self.pieces.contains_key(&content) {
                    self.bad.insert(content, (why, program));
                }
            }
            Line::Done => {}
        }
        Ok(())
    }
}

/// A corpus to read from.
pub struct Corpus {
    pub sample_rate: u32,
    /// What files of it are now, in the order of the manifest.
    pub pieces: Vec<Piece>,
    /// Parts that were not brought to an end: run their jobs again.
    pub unfinished: Vec<String>,
}

/// A recording in a corpus.
#[derive(Clone, Debug)]
pub struct Piece {
    pub facts: Facts,
    /// BLAKE3 of the file that it was read from.
    pub content: String,
    pub samples: Samples,
}

impl Corpus {
    /// Whether a folder holds one.
    pub fn is(folder: &Path) -> bool {
        folder.is_dir() && !parts(folder).is_empty()
    }

    /// Reads the manifest and opens the shards.
    ///
    /// # Errors
    /// No corpus, one of another version, or files that are shorter than the manifest says.
    pub fn open(folder: &Path) -> Result<Self, CorpusError> {
        let mut index = Index::read(folder)?;
        let Some(sample_rate) = index.sample_rate else {
            return Err(CorpusError::Foreign { folder: folder.to_owned() });
        };
        let live: HashSet<&str> = index.files.values().map(|seen| seen.content.as_str()).collect();
        let mut shards: HashMap<PathBuf, (Arc<File>, u64)> = HashMap::new();
        let mut pieces = Vec::new();
        for content in index.order.iter().filter(|content| live.contains(content.as_str())) {
            let Some((part, stored)) = index.pieces.remove(content) else { continue };
            let path = shard_path(folder, &part, stored.shard);
            if !shards.contains_key(&path) {
                let file = File::open(&path).map_err(CorpusError::io(&path))?;
                let length = file.metadata().map_err(CorpusError::io(&path))?.len();
                shards.insert(path.clone(), (Arc::new(file), length));
            }
            let (file, length) = &shards[&path];
            if (stored.at + stored.n_samples) * BYTES > *length {
                return Err(CorpusError::Damaged { path, what: format!("{length} bytes, the manifest says more") });
            }
            let n_samples = stored.n_samples as usize;
            let samples = Samples(Place::Disk { file: file.clone(), path: path.into(), at: stored.at, n_samples });
            pieces.push(Piece { facts: stored.facts, content: stored.content, samples });
        }
        Ok(Self { sample_rate, pieces, unfinished: index.unfinished })
    }

    /// How all of it sounds.
    pub fn sound(&self) -> Sound {
        let mut sum = Sound::default();
        self.pieces.iter().for_each(|piece| sum.add(&piece.facts.sound));
        sum
    }

    /// Hours of sound.
    pub fn hours(&self) -> f64 {
        let samples: usize = self.pieces.iter().map(|piece| piece.samples.len()).sum();
        samples as f64 / f64::from(self.sample_rate) / 3600.0
    }
}

/// A piece's samples; threads may share them.
#[derive(Clone, Debug)]
pub struct Samples(Place);

#[derive(Clone, Debug)]
enum Place {
    /// Reading does not move a common position.
    Disk {
        file: Arc<File>,
        path: Arc<Path>,
        at: u64,
        n_samples: usize,
    },
    Memory(Arc<[i16]>),
}

impl Samples {
    /// Samples that lie in no file, each times 32767.
    pub fn in_memory(samples: Vec<i16>) -> Self {
        Self(Place::Memory(samples.into()))
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Disk { n_samples, .. } => *n_samples,
            Place::Memory(samples) => samples.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file that they lie in, if they do.
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Place::Disk { path, .. } => Some(path),
            Place::Memory(_) => None,
        }
    }

    /// The samples `range`, each times 32767.
    ///
    /// # Errors
    /// The file has gone or become shorter.
    ///
    /// # Panics
    /// When the range passes the piece's end.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<i16>, CorpusError> {
        assert!(range.end <= self.len(), "{range:?} of {} samples", self.len());
        let (file, path, at) = match &self.0 {
            Place::Disk { file, path, at, .. } => (file, path, at),
            Place::Memory(samples) => return Ok(samples[range].to_vec()),
        };
        let mut bytes = vec![0; range.len() * BYTES as usize];
        read_at(file, &mut bytes, (at + range.start as u64) * BYTES).map_err(CorpusError::io(&**path))?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|&b| i16::from_le_bytes(b)).collect())
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match std::os::windows::fs::FileExt::seek_read(file, &mut bytes[done..], at + done as u64)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}
