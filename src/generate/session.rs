//! Turns a continuation under way into a file, and the file into a continuation that goes on bit for bit.
//!
//! One safetensors file: the engine's state as bytes (any engine's, for they all save the same), all else as JSON in
//! its metadata, with a hash of both and the fingerprint of the model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::path::PathState;
use super::{GenerateError, Options, Path as Continuation, Player, Seam, SeamState};
use crate::atomic::write_whole;
use crate::audio::WavFormat;
use crate::checkpoint::safetensors_in_order;
use crate::engine::{Engine, EngineError};

/// Value of the metadata key `format`.
const FORMAT: &str = "wavegen session";
/// Version of the file's layout; a file of another version is refused.
const VERSION: &str = "9";
/// The tensor that holds the engine's state.
const ENGINE: &str = "engine";
/// Characters of a fingerprint that messages show.
const SHOWN: usize = 12;

/// Why a file is no session that can be resumed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("{path}: cannot be read or written")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a saved session ({reason}); sessions are files made by --save-session")]
    Foreign { path: PathBuf, reason: String },
    #[error(
        "{path}: saved in layout version {got}, this program reads version {VERSION}; play on from the audio that it belongs to"
    )]
    Version { path: PathBuf, got: String },
    #[error("{path}: damaged or incomplete, {what}")]
    Damaged { path: PathBuf, what: String },
    #[error("{path}: saved with model '{name}' ({saved}), not with this one ({given}); give its model with --model")]
    Model { path: PathBuf, name: String, saved: String, given: String },
}

/// What a continuation belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recording {
    /// Of the recording and so of all that is played on.
    pub format: WavFormat,
    /// Frames so far: the prompt's and what was played.
    pub n_frames: u64,
}

/// A continuation between two frames: the player and its engine's state as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Session {
    /// What it belongs to.
    pub recording: Recording,
    model_name: String,
    path: PathState,
    seam: SeamState,
    #[serde(skip)]
    engine: Vec<u8>,
}

impl Session {
    /// Takes down where `player` and its engine are.
    ///
    /// # Errors
    /// The engine's own.
    pub fn of(player: &Player, engine: &mut dyn Engine, recording: Recording) -> Result<Self, EngineError> {
        let (path, state) = player.path.state(engine)?;
        let model_name = engine.config().name.clone();
        Ok(Self { recording, model_name, path, seam: player.seam.state(), engine: state })
    }

    /// How it draws.
    pub fn options(&self) -> &Options {
        self.path.options()
    }

    /// Brings an engine to the saved state and gives the player that goes on from it.
    ///
    /// # Errors
    /// A state that does not fit the engine's model.
    pub fn resume(&self, engine: &mut dyn Engine) -> Result<Player, GenerateError> {
        engine.restore(&self.engine)?;
        let path = Continuation::from_state(engine, &self.path)?;
        let seam = Seam::from_state(self.seam.clone())?;
        let WavFormat { sample_rate, channels, .. } = self.recording.format;
        if (sample_rate, channels) != (seam.sample_rate(), seam.channels()) {
            return Err(GenerateError::State);
        }
        Ok(Player { path, seam })
    }

    /// Writes the file under a temporary name and renames it when it is whole. `model`: the fingerprint of the engine's
    /// model ([`crate::checkpoint::Checkpoint::fingerprint`]).
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path, model: &str) -> Result<(), SessionError> {
        let io = |source| SessionError::Io { path: path.to_owned(), source };
        let bytes = self.to_bytes(model).map_err(|e| io(std::io::Error::other(e)))?;
        write_whole(path, &bytes, true).map_err(io)
    }

    fn to_bytes(&self, model: &str) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
        let host = serde_json::to_string(self)?;
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("version".to_owned(), VERSION.to_owned()),
            ("hash".to_owned(), hash(model, &host, &self.engine)),
            ("model".to_owned(), model.to_owned()),
            ("session".to_owned(), host),
        ]);
        let engine = TensorView::new(Dtype::U8, vec![self.engine.len()], &self.engine)?;
        Ok(safetensors_in_order([(ENGINE, engine)], metadata)?)
    }

    /// Reads a file that was saved with the model of the fingerprint `model`.
    ///
    /// # Errors
    /// A file that cannot be read, is no session, is damaged, or belongs to another model.
    pub fn load(path: &Path, model: &str) -> Result<Self, SessionError> {
        let bytes = std::fs::read(path).map_err(|source| SessionError::Io { path: path.to_owned(), source })?;
        Self::from_bytes(&bytes, path, model)
    }

    /// `path` is only what error messages call the bytes.
    fn from_bytes(bytes: &[u8], path: &Path, model: &str) -> Result<Self, SessionError> {
        let foreign = |reason: String| SessionError::Foreign { path: path.to_owned(), reason };
        let damaged = |what: String| SessionError::Damaged { path: path.to_owned(), what };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| foreign(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| metadata.get(name).map(String::as_str).unwrap_or_default();
        if field("format") != FORMAT {
            return Err(foreign("its metadata does not say so".into()));
        }
        if field("version") != VERSION {
            return Err(SessionError::Version { path: path.to_owned(), got: field("version").to_owned() });
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
        let engine = tensors.tensor(ENGINE).map_err(|e| damaged(e.to_string()))?;
        if hash(field("model"), field("session"), engine.data()) != field("hash") {
            return Err(damaged("its contents do not have the hash that it states".into()));
        }
        let mut session: Self = serde_json::from_str(field("session")).map_err(|e| damaged(e.to_string()))?;
        if field("model") != model {
            let shown = |fingerprint: &str| fingerprint.chars().take(SHOWN).collect();
            return Err(SessionError::Model {
                path: path.to_owned(),
                name: session.model_name,
                saved: shown(field("model")),
                given: shown(model),
            });
        }
        session.engine = engine.data().to_vec();
        Ok(session)
    }
}

/// BLAKE3 over all that a session is, in hexadecimal.
fn hash(model: &str, host: &str, engine: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [model.as_bytes(), host.as_bytes(), engine] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex().to_string()
}
