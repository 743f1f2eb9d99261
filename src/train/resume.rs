//! The state of a training run on disk, from which a killed run goes on as if nothing had happened.
//!
//! A folder beside the output: `run.json` says which run it belongs to, `codebooks.safetensors` holds the plan's,
//! `PART-STEP.safetensors` a transformer's weights and optimizer after a step, `PART-best.safetensors` the averaged
//! weights that did best on held-out pieces, `refined.json` the map that refines a finished plan transformer's frames. Every file is written under another name and renamed when it is whole.
//! Only rank 0 reads and writes them; what it reads goes to all ranks. `audio/` is a corpus of the recordings that came as
//! plain files, so that they are decoded once: rank 0 makes it, all ranks read it. What no run has written is never removed.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array3, ArrayD, IxDyn};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::group::Group;
use super::optimizer::{AdamW, Entry};
use super::refine::Fitted;
use super::watch::History;
use super::{Part, TrainError, beside};
use crate::atomic::{PREFIX, write_whole};
use crate::checkpoint::Weights;
use crate::plan::ResidualQuantizer;

/// States kept of each part: the newest, and one more should the newest be damaged.
const KEPT: usize = 2;
const RUN: &str = "run.json";
const CODEBOOKS: &str = "codebooks.safetensors";
const REFINED: &str = "refined.json";
/// Where the audio of plain files lies, prepared, while a run is under way.
pub(super) const AUDIO: &str = "audio";

/// What makes a run this run, by name; a state is only taken up by the same.
pub type Identity = BTreeMap<String, String>;

/// Where one part's training stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Steps made, with those that were skipped.
    pub step: usize,
    /// Steps that changed the weights.
    pub updates: u64,
    pub elapsed_s: f64,
    /// Frames or samples seen.
    pub units: u64,
    /// Least nats per unit on held-out pieces.
    pub best: Option<f64>,
    /// Validations since then.
    pub stale: usize,
    /// Skipped steps without a good one between them.
    pub skipped: usize,
    /// Bits of the steps since the last evaluation: sum and number.
    pub recent: (f64, u32),
    /// What evaluations found.
    pub history: History,
    pub finished: bool,
}

/// The folder of a run, as one rank of a group sees it.
pub struct StateFolder<'a> {
    path: PathBuf,
    group: &'a dyn Group,
    /// Of `run.json`, while the run is under way.
    lock: Option<File>,
}

impl<'a> StateFolder<'a> {
    /// Where the state of the run that makes `output` lies.
    pub fn beside(output: &Path) -> PathBuf {
        beside(output, "training")
    }

    /// Whether an unfinished run that makes `output` has left its state.
    pub fn holds_run(output: &Path) -> bool {
        Self::beside(output).join(RUN).exists()
    }

    /// Finds out before anything is written whether the folder is a run's, or may become one's.
    ///
    /// # Errors
    /// It holds no run, but what no run has written.
    pub fn check(output: &Path) -> Result<(), TrainError> {
        let folder = Self::beside(output);
        let audio = folder.join(AUDIO);
        let beside_audio = files(&folder).filter(|file| *file != audio && !is_state(file));
        let foreign = beside_audio.chain(files(&audio).filter(|file| !is_audio(file))).next();
        match foreign.filter(|_| !Self::holds_run(output)) {
            Some(file) => Err(TrainError::NoState { file }),
            None => Ok(()),
        }
    }

    /// Opens the folder of this run, or begins one; `afresh` forgets what is there.
    ///
    /// # Errors
    /// When the folder belongs to another run, or to one that is under way.
    pub fn open(group: &'a dyn Group, output: &Path, identity: &Identity, afresh: bool) -> Result<Self, TrainError> {
        let mut folder = Self { path: Self::beside(output), group, lock: None };
        if !group.is_first() {
            return Ok(folder);
        }
        folder.lock()?;
        if afresh {
            folder.forget()?;
        }
        let run = folder.path.join(RUN);
        match std::fs::read(&run) {
            Ok(bytes) => {
                let stored: Identity = serde_json::from_slice(&bytes).unwrap_or_default();
                let names = stored.keys().chain(identity.keys());
                let differing: std::collections::BTreeSet<&str> =
                    names.filter(|&name| stored.get(name) != identity.get(name)).map(String::as_str).collect();
                if !differing.is_empty() {
                    let what = differing.into_iter().collect::<Vec<_>>().join(", ");
                    return Err(TrainError::OtherRun { folder: folder.path, what });
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // What a run has left without saying which it was is of no use.
                folder.forget()?;
                std::fs::create_dir_all(&folder.path).map_err(|source| folder.io(source))?;
                let bytes = serde_json::to_vec_pretty(identity).map_err(|e| folder.io(e.into()))?;
                write_whole(&run, &bytes, false).map_err(|source| folder.io(source))?;
                folder.lock()?;
            }
            Err(source) => return Err(folder.io(source)),
        }
        Ok(folder)
    }

    /// Keeps other processes out; where the file system has no locks, that is the user's care.
    fn lock(&mut self) -> Result<(), TrainError> {
        self.lock = File::open(self.path.join(RUN)).ok();
        match self.lock.as_ref().map(File::try_lock) {
            Some(Err(TryLockError::WouldBlock)) => Err(TrainError::Busy { folder: self.path.clone() }),
            _ => Ok(()),
        }
    }

    fn io(&self, source: std::io::Error) -> TrainError {
        TrainError::State { folder: self.path.clone(), source }
    }

    /// Removes the audio from a run's folder, and the folder if there is nothing else; rank 0's work.
    pub fn remove_audio(folder: &Path) -> std::io::Result<()> {
        let audio = folder.join(AUDIO);
        files(&audio).filter(|file| is_audio(file)).try_for_each(std::fs::remove_file)?;
        // What is not empty is someone else's too.
        let _ = std::fs::remove_dir(audio);
        let _ = std::fs::remove_dir(folder);
        Ok(())
    }

    /// Removes the state, and keeps the audio: it is known by its content.
    fn forget(&self) -> Result<(), TrainError> {
        let mut state = files(&self.path).filter(|file| is_state(file));
        state.try_for_each(std::fs::remove_file).map_err(|source| self.io(source))
    }

    /// Removes the folder, with a run that is over.
    pub fn remove(&self) -> Result<(), TrainError> {
        if !self.group.is_first() {
            return Ok(());
        }
        self.forget()?;
        Self::remove_audio(&self.path).map_err(|source| self.io(source))
    }

    /// The plan's codebooks of this run, which rank 0 fits when that has not been done.
    pub fn codebooks(
        &self,
        fit: impl FnOnce() -> Result<ResidualQuantizer, TrainError>,
    ) -> Result<ResidualQuantizer, TrainError> {
        let path = self.path.join(CODEBOOKS);
        let stored = || std::fs::read(&path).ok().filter(|bytes| quantizer(bytes).is_some());
        let mut bytes = match self.group.is_first().then(stored) {
            None => Vec::new(),
            Some(Some(bytes)) => bytes,
            Some(None) => {
                let fitted = fit()?;
                let entry = |name: &str, shape: &[usize], values: Vec<f32>| (name.to_owned(), shape.to_vec(), values);
                let entries = [
                    entry("mean", fitted.mean.shape(), fitted.mean.iter().copied().collect()),
                    entry("books", fitted.books.shape(), fitted.books.iter().copied().collect()),
                ];
                let bytes = self.encode(&entries, "")?;
                write_whole(&path, &bytes, true).map_err(|source| self.io(source))?;
                bytes
            }
        };
        self.group.broadcast(&mut bytes);
        quantizer(&bytes).ok_or_else(|| self.io(ErrorKind::InvalidData.into()))
    }

    /// The map that refines the frames of the finished plan transformer, where it was fitted.
    pub fn refined(&self) -> Result<Option<Fitted>, TrainError> {
        let stored = || serde_json::from_slice(&std::fs::read(self.path.join(REFINED)).ok()?).ok();
        Ok(self.group.of_first(self.group.is_first().then(stored).flatten())?)
    }

    /// Keeps that map.
    pub fn save_refined(&self, fitted: &Fitted) -> Result<(), TrainError> {
        if !self.group.is_first() {
            return Ok(());
        }
        let bytes = serde_json::to_vec(fitted)?;
        write_whole(&self.path.join(REFINED), &bytes, true).map_err(|source| self.io(source))
    }

    /// Whether a part has had all its steps, by its newest whole state.
    pub fn is_finished(&self, part: Part) -> Result<bool, TrainError> {
        let progress = |path: PathBuf| serde_json::from_str::<Progress>(&decode(&std::fs::read(path).ok()?)?.0).ok();
        let finished = || self.states(part).into_iter().find_map(progress).is_some_and(|progress| progress.finished);
        Ok(self.group.of_first(self.group.is_first() && finished())?)
    }

    /// The newest whole state of a part goes into the optimizers of all ranks; without one, what rank 0 begins with.
    pub fn load(&self, part: Part, optimizer: &mut AdamW) -> Result<Progress, TrainError> {
        let stored = |path: PathBuf| restore(&std::fs::read(path).ok()?, optimizer);
        let states = if self.group.is_first() { self.states(part) } else { Vec::new() };
        let progress = states.into_iter().find_map(stored).unwrap_or_default();
        if self.group.size() == 1 {
            return Ok(progress);
        }
        let mut bytes = if self.group.is_first() { self.encode_state(optimizer, &progress)? } else { Vec::new() };
        self.group.broadcast(&mut bytes);
        restore(&bytes, optimizer).ok_or_else(|| self.io(ErrorKind::InvalidData.into()))
    }

    /// Writes a part's state, then removes the oldest ones.
    pub fn save(&self, part: Part, optimizer: &AdamW, progress: &Progress) -> Result<(), TrainError> {
        if !self.group.is_first() {
            return Ok(());
        }
        let name = format!("{}-{:08}.safetensors", part.name(), progress.step);
        let bytes = self.encode_state(optimizer, progress)?;
        let path = self.path.join(name);
        write_whole(&path, &bytes, true).map_err(|source| self.io(source))?;
        // Ones after it could not be read when the run went on.
        let states = self.states(part);
        let (damaged, whole) = states.split_at(states.iter().position(|state| *state == path).unwrap_or(0));
        let mut old = damaged.iter().chain(whole.iter().skip(KEPT));
        old.try_for_each(std::fs::remove_file).map_err(|source| self.io(source))
    }

    /// Keeps the averaged weights as the best so far.
    pub fn save_best(&self, part: Part, optimizer: &AdamW) -> Result<(), TrainError> {
        if !self.group.is_first() {
            return Ok(());
        }
        let entries: Vec<Entry> = optimizer
            .averages()?
            .into_iter()
            .map(|(name, weight)| (name, weight.shape(), weight.values().into_owned()))
            .collect();
        write_whole(&self.path.join(best_name(part)), &self.encode(&entries, "")?, true)
            .map_err(|source| self.io(source))
    }

    /// The averaged weights that were best, on all ranks.
    pub fn best(&self, part: Part) -> Option<Weights> {
        let stored = self.group.is_first().then(|| std::fs::read(self.path.join(best_name(part))).ok());
        let mut bytes = stored.flatten().unwrap_or_default();
        self.group.broadcast(&mut bytes);
        let (_, tensors) = decode(&bytes)?;
        Some(tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect())
    }

    /// A part's states, newest first.
    fn states(&self, part: Part) -> Vec<PathBuf> {
        let mut states: Vec<PathBuf> = files(&self.path).filter(|file| is_step(file, part)).collect();
        states.sort();
        states.reverse();
        states
    }

    fn encode_state(&self, optimizer: &AdamW, progress: &Progress) -> Result<Vec<u8>, TrainError> {
        let stated = serde_json::to_string(progress).map_err(|e| self.io(e.into()))?;
        self.encode(&optimizer.state()?, &stated)
    }

    /// The content of a file.
    fn encode(&self, entries: &[Entry], progress: &str) -> Result<Vec<u8>, TrainError> {
        let bytes: Vec<Vec<u8>> =
            entries.iter().map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        entries
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .and_then(|views| {
                safetensors::serialize(views, Some(HashMap::from([("progress".to_owned(), progress.to_owned())])))
            })
            .map_err(|e| self.io(std::io::Error::other(e)))
    }
}

/// What lies in a folder, if it is there.
fn files(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn name_of(file: &Path) -> &str {
    file.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Whether a file is one of a run's, or what a kill has left of one; the audio's have a folder of their own.
fn is_state(file: &Path) -> bool {
    let name = name_of(file);
    let of_part = |part| name == best_name(part) || is_step(file, part);
    [RUN, CODEBOOKS, REFINED].contains(&name)
        || [Part::Plan, Part::Wave].into_iter().any(of_part)
        || name.starts_with(PREFIX)
}

/// Whether a file is the state of a part after a step.
fn is_step(file: &Path, part: Part) -> bool {
    let step =
        name_of(file).strip_prefix(part.name()).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".safetensors"));
    step.is_some_and(|step| step.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a file is of the corpus that a run makes of plain files.
fn is_audio(file: &Path) -> bool {
    name_of(file).trim_start_matches('.').starts_with("part-1of1")
}

fn best_name(part: Part) -> String {
    format!("{}-best.safetensors", part.name())
}

/// The codebooks in a file's content.
fn quantizer(bytes: &[u8]) -> Option<ResidualQuantizer> {
    let (_, tensors) = decode(bytes)?;
    let take = |name: &str| tensors.get(name).cloned();
    let mean: Array1<f32> = take("mean")?.into_dimensionality().ok()?;
    let books: Array3<f32> = take("books")?.into_dimensionality().ok()?;
    ResidualQuantizer::new(mean, books).ok()
}

/// The state in a file's content goes into the optimizer.
fn restore(bytes: &[u8], optimizer: &mut AdamW) -> Option<Progress> {
    let (progress, mut tensors) = decode(bytes)?;
    let progress: Progress = serde_json::from_str(&progress).ok()?;
    let take = |name: &str| tensors.remove(name).map(|array| array.into_raw_vec_and_offset().0);
    optimizer.restore(progress.updates, take).ok()?;
    Some(progress)
}

/// Progress and tensors in a file's content; `None` when it is damaged.
fn decode(bytes: &[u8]) -> Option<(String, BTreeMap<String, ArrayD<f32>>)> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let progress = header.metadata().as_ref()?.get("progress")?.clone();
    let tensors = SafeTensors::deserialize(bytes).ok()?;
    let arrays = tensors.iter().map(|(name, view)| {
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Some((name.to_owned(), ArrayD::from_shape_vec(IxDyn(view.shape()), values).ok()?))
    });
    Some((progress, arrays.collect::<Option<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::group::Alone;
    use candle_core::{Device, Tensor, Var};

    fn identity(seed: &str) -> Identity {
        [("seed".to_owned(), seed.to_owned())].into()
    }

    fn optimizer(value: f32) -> AdamW {
        let var = Var::from_tensor(&Tensor::new(&[value, 2.0], &Device::Cpu).unwrap()).unwrap();
        AdamW::new([("x".to_owned(), var)].into()).unwrap()
    }

    #[test]
    fn the_newest_whole_state_is_taken_up_and_old_ones_go() {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("m.safetensors");
        let folder = StateFolder::open(&Alone, &output, &identity("1"), false).unwrap();
        for step in [3, 7, 12] {
            let progress = Progress { step, ..Progress::default() };
            folder.save(Part::Wave, &optimizer(step as f32), &progress).unwrap();
        }
        folder.save_best(Part::Wave, &optimizer(99.0)).unwrap();
        assert_eq!(folder.states(Part::Wave).len(), KEPT);
        let mut taken = optimizer(0.0);
        let busy = StateFolder::open(&Alone, &output, &identity("1"), true);
        assert!(matches!(busy, Err(TrainError::Busy { .. })));
        drop(folder);
        let folder = StateFolder::open(&Alone, &output, &identity("1"), false).unwrap();
        assert_eq!(folder.load(Part::Wave, &mut taken).unwrap().step, 12);
        assert_eq!(taken.averages().unwrap()[0].1.values()[0], 12.0);
        assert_eq!(folder.best(Part::Wave).unwrap()["x"].values()[0], 99.0);
        assert_eq!(folder.load(Part::Plan, &mut taken).unwrap(), Progress::default());
        // A damaged file costs the steps since the one before it.
        let newest = &folder.states(Part::Wave)[0];
        let bytes = std::fs::read(newest).unwrap();
        std::fs::write(newest, &bytes[..bytes.len() - 3]).unwrap();
        assert_eq!(folder.load(Part::Wave, &mut taken).unwrap().step, 7);
        folder.save(Part::Wave, &taken, &Progress { step: 9, ..Progress::default() }).unwrap();
        assert_eq!(folder.load(Part::Wave, &mut taken).unwrap().step, 9);
        assert_eq!(folder.states(Part::Wave).len(), KEPT);
        folder.remove().unwrap();
        assert!(!StateFolder::beside(&output).exists());
    }

    #[test]
    fn another_run_s_state_is_refused_by_the_name_of_what_differs() {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("m.safetensors");
        let folder = StateFolder::open(&Alone, &output, &identity("1"), false).unwrap();
        folder.save(Part::Plan, &optimizer(1.0), &Progress { step: 1, ..Progress::default() }).unwrap();
        drop(folder);
        let Err(error) = StateFolder::open(&Alone, &output, &identity("2"), false) else { panic!("taken up") };
        assert!(error.to_string().contains("seed"), "{error}");
        let folder = StateFolder::open(&Alone, &output, &identity("2"), true).unwrap();
        assert_eq!(folder.load(Part::Plan, &mut optimizer(1.0)).unwrap(), Progress::default());
    }
}
