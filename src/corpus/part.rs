//! Turns pieces into a part's files so that whatever happens, the manifest names whole pieces only.
//!
//! Samples are appended to a shard and brought to the disk before the lines that name them are written. A kill leaves samples
//! that no line names and at most a torn last line; both are cut off when the part is opened again. So at most what was made
//! in the last two seconds is lost, and what is there does not depend on when the kill came.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::CorpusError;
use super::manifest::{BYTES, Line, VERSION, manifest_path, read_lines, shard_path};
use super::piece::to_bytes;

/// Most samples of a shard: 1 GiB, unless one piece alone is longer.
pub(super) const SHARD_SAMPLES: u64 = 1 << 29;
/// Lines wait this long for the samples that they name to be on the disk.
const COMMIT_EVERY: Duration = Duration::from_secs(2);

/// A part that is being written; one process at a time.
pub(super) struct Part {
    folder: PathBuf,
    name: String,
    manifest: File,
    /// Lines whose samples may not be on the disk yet.
    waiting: Vec<u8>,
    shard: File,
    number: u32,
    n_samples: u64,
    most: u64,
    committed: Instant,
    /// Whether there is nothing to be added since the last line that says so.
    finished: bool,
    _lock: File,
}

impl Part {
    /// Opens a part, or begins it; `wait` is called if another process has it open, before waiting for it.
    pub(super) fn open(
        folder: &Path,
        name: &str,
        sample_rate: u32,
        most: u64,
        wait: impl FnOnce(),
    ) -> Result<Self, CorpusError> {
        std::fs::create_dir_all(folder).map_err(CorpusError::io(folder))?;
        let lock = lock(&folder.join(format!(".{name}.lock")), wait)?;
        let path = manifest_path(folder, name);
        let mut manifest = open_file(&path)?;
        let (lines, whole) = read_lines(&path)?;
        cut(&mut manifest, whole).map_err(CorpusError::io(&path))?;
        // Where the last shard ends; those before it are full.
        let ends = lines.iter().filter_map(|line| match line {
            Line::Piece(stored) => Some((stored.shard, stored.at + stored.n_samples)),
            _ => None,
        });
        let (number, n_samples) = ends.max().unwrap_or((0, 0));
        let shard = cut_shard(&shard_path(folder, name, number), n_samples)?;
        // One more may have been begun.
        let next = shard_path(folder, name, number + 1);
        if next.exists() {
            std::fs::remove_file(&next).map_err(CorpusError::io(&next))?;
        }
        let mut part = Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            manifest,
            waiting: Vec::new(),
            shard,
            number,
            n_samples,
            most,
            committed: Instant::now(),
            finished: lines.last() == Some(&Line::Done),
            _lock: lock,
        };
        if lines.is_empty() {
            part.note(&Line::Corpus { version: VERSION, sample_rate })?;
            part.commit()?;
        }
        Ok(part)
    }

    /// Adds samples; gives their shard and place for the line that names them.
    pub(super) fn append(&mut self, samples: &[i16]) -> Result<(u32, u64), CorpusError> {
        if self.n_samples > 0 && self.n_samples + samples.len() as u64 > self.most {
            self.commit()?;
            (self.number, self.n_samples) = (self.number + 1, 0);
            self.shard = cut_shard(&self.shard_path(), 0)?;
        }
        let at = self.n_samples;
        self.shard.write_all(&to_bytes(samples)).map_err(CorpusError::io(self.shard_path()))?;
        self.n_samples += samples.len() as u64;
        Ok((self.number, at))
    }

    /// Adds a line to the manifest.
    pub(super) fn note(&mut self, line: &Line) -> Result<(), CorpusError> {
        let path = manifest_path(&self.folder, &self.name);
        serde_json::to_writer(&mut self.waiting, line).map_err(|e| CorpusError::io(path)(e.into()))?;
        self.waiting.push(b'\n');
        self.finished = *line == Line::Done;
        if self.committed.elapsed() >= COMMIT_EVERY { self.commit() } else { Ok(()) }
    }

    /// Brings samples to the disk, then the lines that name them.
    pub(super) fn commit(&mut self) -> Result<(), CorpusError> {
        self.shard.sync_data().map_err(CorpusError::io(self.shard_path()))?;
        let path = manifest_path(&self.folder, &self.name);
        let written = self.manifest.write_all(&self.waiting).and_then(|()| self.manifest.sync_data());
        written.map_err(CorpusError::io(path))?;
        self.waiting.clear();
        self.committed = Instant::now();
        Ok(())
    }

    /// Says that all is there, unless that is said already.
    pub(super) fn finish(mut self) -> Result<(), CorpusError> {
        if !self.finished {
            self.note(&Line::Done)?;
            self.commit()?;
        }
        Ok(())
    }

    fn shard_path(&self) -> PathBuf {
        shard_path(&self.folder, &self.name, self.number)
    }
}

fn open_file(path: &Path) -> Result<File, CorpusError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).open(path).map_err(CorpusError::io(path))
}

/// A shard with everything after `n_samples` cut off, ready for more.
fn cut_shard(path: &Path, n_samples: u64) -> Result<File, CorpusError> {
    let mut file = open_file(path)?;
    let length = file.metadata().map_err(CorpusError::io(path))?.len();
    if length < n_samples * BYTES {
        let what = format!("{length} bytes, the manifest says {}", n_samples * BYTES);
        return Err(CorpusError::Damaged { path: path.to_owned(), what });
    }
    cut(&mut file, n_samples * BYTES).map_err(CorpusError::io(path))?;
    Ok(file)
}

/// Cuts a file to a length, and goes to its end. Where there is nothing to cut off, nothing is written.
fn cut(file: &mut File, length: u64) -> std::io::Result<()> {
    if file.metadata()?.len() != length {
        file.set_len(length)?;
    }
    file.seek(SeekFrom::End(0)).map(drop)
}

/// Takes the lock of a part. Where the file system has none, one writer at a time is the user's care.
fn lock(path: &Path, wait: impl FnOnce()) -> Result<File, CorpusError> {
    let file = open_file(path)?;
    if let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
        wait();
        file.lock().map_err(CorpusError::io(path))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::manifest::{Corpus, Seen, Stored};
    use super::super::{Facts, Sound};
    use super::*;

    fn add(part: &mut Part, name: &str, samples: &[i16]) {
        let (shard, at) = part.append(samples).unwrap();
        let facts = Facts {
            source: name.into(),
            duration_s: 1.0,
            rate: 8000,
            channels: 1,
            gain: 0.1,
            hash: String::new(),
            warnings: vec![],
            sound: Sound::default(),
        };
        let (content, n_samples) = (name.to_owned(), samples.len() as u64);
        part.note(&Line::Piece(Stored { content: content.clone(), shard, at, n_samples, facts })).unwrap();
        part.note(&Line::File(Seen { path: name.into(), size: 1, modified_ns: 2, content, version: 0 })).unwrap();
    }

    fn open(folder: &Path) -> Part {
        Part::open(folder, "part-1of1", 8000, 100, || panic!("locked")).unwrap()
    }

    fn bytes(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }

    #[test]
    fn what_was_being_written_at_a_kill_is_cut_off_and_the_rest_goes_on_as_if_nothing_had_happened() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let pieces: Vec<(String, Vec<i16>)> =
            (0..9).map(|i| (format!("p{i}"), (0..30 + i).map(|x| 100 * i + x).collect())).collect();
        let mut whole = open(folders[0].path());
        pieces.iter().for_each(|(name, samples)| add(&mut whole, name, samples));
        whole.finish().unwrap();

        for (i, (name, samples)) in pieces.iter().enumerate() {
            let mut part = open(folders[1].path());
            // Killed after samples, but before the lines: nothing names them.
            part.append(&[7; 90]).unwrap();
            drop(part);
            let mut part = open(folders[1].path());
            add(&mut part, name, samples);
            if i + 1 < pieces.len() {
                part.commit().unwrap();
                // A line torn in its middle.
                part.manifest.write_all(b"{\"line\":\"pie").unwrap();
            } else {
                part.finish().unwrap();
            }
        }
        let [a, b] = [&folders[0], &folders[1]].map(|folder| bytes(folder.path()).into_iter().map(|(_, bytes)| bytes));
        assert!(a.eq(b));
        // Nothing to add, nothing written.
        let before = bytes(folders[1].path());
        open(folders[1].path()).finish().unwrap();
        assert_eq!(bytes(folders[1].path()), before);
        let corpus = Corpus::open(folders[1].path()).unwrap();
        assert_eq!((corpus.pieces.len(), corpus.unfinished.len()), (9, 0));
        for (piece, (name, samples)) in corpus.pieces.iter().zip(&pieces) {
            assert_eq!(&piece.facts.source, name);
            assert_eq!(piece.samples.read(2..samples.len()).unwrap(), samples[2..]);
        }
    }

    #[test]
    fn a_shard_that_lost_samples_and_a_bent_manifest_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut part = open(folder.path());
        add(&mut part, "a", &[1; 50]);
        part.finish().unwrap();
        let shard = shard_path(folder.path(), "part-1of1", 0);
        File::options().write(true).open(&shard).unwrap().set_len(99).unwrap();
        let message = |e: CorpusError| e.to_string();
        let open = || Part::open(folder.path(), "part-1of1", 8000, 100, || ());
        for error in [open().err().map(message), Corpus::open(folder.path()).err().map(message)] {
            let error = error.unwrap();
            assert!(error.contains("part-1of1-000.pcm") && error.contains("99 bytes"), "{error}");
        }
        let manifest = manifest_path(folder.path(), "part-1of1");
        std::fs::write(&manifest, "{\"line\":\"corpus\",\"version\":9,\"sample_rate\":1}\n").unwrap();
        assert!(matches!(open().err(), Some(CorpusError::Version { got: 9, .. })));
        std::fs::write(&manifest, "what\n").unwrap();
        assert!(matches!(open().err(), Some(CorpusError::Damaged { .. })));
    }
}
