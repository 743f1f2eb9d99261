//! Turns folders of recordings into a corpus, on all cores: only what is new or has changed, and what cannot be read is
//! listed.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::CorpusError;
use super::manifest::{Corpus, Index, Line, Seen, Stored, part_name};
use super::part::{Part, SHARD_SAMPLES};
use super::piece::{self, Facts, Refusal};
use crate::ahead::{ahead, lone_threads};
use crate::audio::AudioSource;

/// What another program may read although this one could not.
const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// What to prepare, and where.
#[derive(Clone, Debug)]
pub struct PrepareSettings {
    /// Audio files, and folders to search for them.
    pub inputs: Vec<PathBuf>,
    /// The corpus; made if it is not there.
    pub folder: PathBuf,
    /// Of the corpus, Hz.
    pub sample_rate: u32,
    /// Shorter files are left out.
    pub least_s: f64,
    /// `(i, n)`: only the i-th of n shares of the files, i from 1. Which share a file belongs to depends on its path alone.
    pub part: (usize, usize),
    pub threads: usize,
}

/// Progress, told as it happens; returning `Break` ends preparing with all that is done kept.
#[derive(Clone, Debug)]
pub enum PrepareEvent<'a> {
    /// Another process writes this part; this one waits.
    Waiting,
    /// So many files are to be looked into, and so many are known and unchanged.
    Found { new: usize, unchanged: usize },
    /// A file has been dealt with: now known as a piece.
    Piece { facts: &'a Facts },
    /// Known already under another name, or unchanged but for its date.
    Same { path: &'a Path },
    /// Left out, and why.
    Bad { path: &'a Path, why: &'a str },
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    /// Pieces decoded now, files that were known, files that were left out.
    pub added: usize,
    pub unchanged: usize,
    pub bad: usize,
    /// Files of earlier runs that are not there any more; their pieces stay.
    pub gone: usize,
    pub interrupted: bool,
    /// Content hashes of all files of `inputs` that are pieces.
    pub contents: HashSet<String>,
}

/// Receives [`PrepareEvent`]s.
pub type Observer<'a> = dyn FnMut(PrepareEvent) -> ControlFlow<()> + 'a;

/// Brings a corpus up to date with its recordings. The same files make the same bytes, whatever the threads.
///
/// # Errors
/// A folder that cannot be written or holds a corpus of another rate. Files that cannot be read are none.
pub fn prepare(settings: &PrepareSettings, observe: &mut Observer) -> Result<Prepared, CorpusError> {
    let mut prepared = Prepared::default();
    let found = find(&settings.inputs, &settings.folder);
    let name = part_name(settings.part);
    let check_rate = |index: &Index| match index.sample_rate {
        Some(got) if got != settings.sample_rate => {
            Err(CorpusError::SampleRate { folder: settings.folder.clone(), wanted: settings.sample_rate, got })
        }
        _ => Ok(()),
    };
    check_rate(&Index::read(&settings.folder)?)?;
    let mut part = Part::open(&settings.folder, &name, settings.sample_rate, SHARD_SAMPLES, || {
        let _ = observe(PrepareEvent::Waiting);
    })?;
    // Again, now that nobody else writes.
    let index = Index::read(&settings.folder)?;
    check_rate(&index)?;
    for (path, why) in &found.unreadable {
        prepared.bad += 1;
        let _ = observe(PrepareEvent::Bad { path, why });
    }
    let mut new = Vec::new();
    for path in found.files.into_iter().filter(|path| is_mine(path, settings.part)) {
        let known =
            index.files.get(&key(&path)).filter(|seen| stamp(&path).is_ok_and(|s| s == (seen.size, seen.modified_ns)));
        let Some(seen) = known else {
            new.push(path);
            continue;
        };
        match index.bad.get(&seen.content) {
            Some((why, program)) if program == PROGRAM => {
                prepared.bad += 1;
                let _ = observe(PrepareEvent::Bad { path: &path, why });
            }
            Some(_) => new.push(path),
            None => {
                prepared.unchanged += 1;
                prepared.contents.insert(seen.content.clone());
            }
        }
    }
    let mut going = observe(PrepareEvent::Found { new: new.len(), unchanged: prepared.unchanged });
    let pools = lone_threads(settings.threads)?;
    let look = |i: usize| look_into(&new[i], &index, settings);
    ahead(&pools, 2 * settings.threads, 0..new.len(), look, |next| {
        let mut writer = Writer { part: &mut part, index: &index, fresh: HashSet::new(), prepared: &mut prepared };
        for path in &new {
            let Some(looked) = (if going.is_continue() { next() } else { None }) else { break };
            going = writer.take(path, looked, observe)?;
        }
        Ok::<_, CorpusError>(())
    })?;
    part.commit()?;
    if going.is_continue() {
        part.finish()?;
    }
    prepared.interrupted = going.is_break();
    prepared.gone = index.files.values().filter(|seen| !Path::new(&seen.path).exists()).count();
    Ok(prepared)
}

/// What was found at a path.
struct Looked {
    seen: Seen,
    what: What,
}

enum What {
    /// A content that the corpus had before this run.
    Known,
    Piece(Vec<i16>, Facts),
    /// For good, and why.
    Bad(String),
}

/// Hashes a file, and decodes it if it is new; else says why that could not be done this time.
fn look_into(path: &Path, index: &Index, settings: &PrepareSettings) -> Result<Looked, String> {
    let gone = |e: std::io::Error| format!("{}: {e}", path.display());
    let (size, modified_ns) = stamp(path).map_err(gone)?;
    let content = piece::content_hash(path).map_err(|e| e.to_string())?;
    let known_bad = index.bad.get(&content).is_some_and(|(_, program)| program == PROGRAM);
    let what = if index.pieces.contains_key(&content) || known_bad {
        What::Known
    } else {
        let read = |source: AudioSource| piece::read(&source, settings.sample_rate, settings.least_s);
        match AudioSource::open(path).map_err(Refusal::from).and_then(read) {
            Ok((samples, facts)) => What::Piece(samples, facts),
            Err(Refusal { why, lasts: true }) => What::Bad(why),
            Err(Refusal { why, lasts: false }) => return Err(why),
        }
    };
    // What was decoded must be what was hashed.
    if stamp(path).map_err(gone)? != (size, modified_ns) {
        return Err(format!("{}: changed while it was read; prepare again", path.display()));
    }
    let path = key(path);
    let version = index.files.get(&path).map_or(0, |known| known.version + 1);
    Ok(Looked { seen: Seen { path, size, modified_ns, content, version }, what })
}

/// Takes down what was found, in order.
struct Writer<'a> {
    part: &'a mut Part,
    index: &'a Index,
    /// Contents of this run.
    fresh: HashSet<String>,
    prepared: &'a mut Prepared,
}

impl Writer<'_> {
    fn take(
        &mut self,
        path: &Path,
        looked: Result<Looked, String>,
        observe: &mut Observer,
    ) -> Result<ControlFlow<()>, CorpusError> {
        let Looked { seen, what } = match looked {
            Ok(looked) => looked,
            Err(why) => {
                self.prepared.bad += 1;
                return Ok(observe(PrepareEvent::Bad { path, why: &why }));
            }
        };
        let content = seen.content.clone();
        let going = match what {
            // The bytes of a file of this very run.
            What::Piece(..) if self.fresh.contains(&content) => self.same(path, &content, observe),
            What::Known => match self.index.bad.get(&content) {
                Some((why, _)) => self.bad(path, why, observe),
                None => self.same(path, &content, observe),
            },
            What::Bad(why) => {
                let line = Line::Bad { content, why: why.clone(), program: PROGRAM.to_owned() };
                self.part.note(&line)?;
                self.bad(path, &why, observe)
            }
            What::Piece(samples, facts) => {
                let (shard, at) = self.part.append(&samples)?;
                let n_samples = samples.len() as u64;
                self.prepared.added += 1;
                self.prepared.contents.insert(content.clone());
                self.fresh.insert(content.clone());
                let going = observe(PrepareEvent::Piece { facts: &facts });
                self.part.note(&Line::Piece(Stored { content, shard, at, n_samples, facts }))?;
                going
            }
        };
        self.part.note(&Line::File(seen))?;
        Ok(going)
    }

    fn same(&mut self, path: &Path, content: &str, observe: &mut Observer) -> ControlFlow<()> {
        self.prepared.unchanged += 1;
        self.prepared.contents.insert(content.to_owned());
        observe(PrepareEvent::Same { path })
    }

    fn bad(&mut self, path: &Path, why: &str, observe: &mut Observer) -> ControlFlow<()> {
        self.prepared.bad += 1;
        observe(PrepareEvent::Bad { path, why })
    }
}

/// What a manifest calls a path: absolute, so that it does not depend on where the program was started.
fn key(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).to_string_lossy().into_owned()
}

/// Size and time of a file's last change.
fn stamp(path: &Path) -> std::io::Result<(u64, u64)> {
    let metadata = path.metadata()?;
    let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok((metadata.len(), modified.as_nanos() as u64))
}

fn is_mine(path: &Path, (i, n): (usize, usize)) -> bool {
    let hash = blake3::hash(key(path).as_bytes());
    let number = hash.as_bytes().first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes));
    n < 2 || number % n as u64 == i as u64 - 1
}

/// What lies under some paths.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Regular files of any kind, sorted, each once.
    pub files: Vec<PathBuf>,
    /// Folders that hold a corpus.
    pub corpora: Vec<PathBuf>,
    /// What could not be looked at, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// Searches folders, without what is hidden and without the folder `but`; a corpus is not searched.
pub fn find(inputs: &[PathBuf], but: &Path) -> Found {
    let mut found = Found::default();
    let mut visited = HashSet::from_iter(but.canonicalize());
    inputs.iter().for_each(|input| search(input, &mut visited, &mut found));
    found.files.sort();
    found.files.dedup_by_key(|path| key(path));
    found
}

fn search(path: &Path, visited: &mut HashSet<PathBuf>, found: &mut Found) {
    if let Err(why) = try_search(path, visited, found) {
        found.unreadable.push((path.to_owned(), format!("{}: {why}", path.display())));
    }
}

fn try_search(path: &Path, visited: &mut HashSet<PathBuf>, found: &mut Found) -> std::io::Result<()> {
    let metadata = path.metadata()?;
    if metadata.is_file() {
        found.files.push(path.to_owned());
    } else if !metadata.is_dir() {
        return Err(std::io::Error::other("is no regular file"));
    } else if Corpus::is(path) {
        found.corpora.push(path.to_owned());
    } else if visited.insert(path.canonicalize()?) {
        // A link may lead back up; every folder is searched once.
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with('.') {
                search(&entry.path(), visited, found);
            }
        }
    }
    Ok(())
}
