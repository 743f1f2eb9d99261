//! Turns a path or `-` into a regular, seekable file with a name for messages.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::NamedTempFile;

use super::{AudioError, Result};
use crate::atomic::Listed;

/// An audio input: a regular file, or a pipe spooled to a temporary file that lives as long as the source.
#[derive(Clone, Debug)]
pub struct AudioSource {
    name: String,
    path: PathBuf,
    end_s: Option<f64>,
    _spooled: Option<Arc<(NamedTempFile, Listed)>>,
}

impl AudioSource {
    /// Opens `path`; `-` means standard input. Pipes and devices are read to their end into a temporary file, because
    /// containers need to be searched backwards and prompts are read twice.
    ///
    /// # Errors
    /// Missing or unreadable files, directories, and a full temporary directory.
    pub fn open(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            return Self::spool("standard input".into(), &mut io::stdin().lock());
        }
        let name = path.display().to_string();
        let failed = |source| AudioError::Io { path: name.clone(), source };
        let metadata = path.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Err(AudioError::Directory { path: name });
        }
        let mut file = File::open(path).map_err(failed)?;
        if metadata.is_file() {
            Ok(Self { name, path: path.to_path_buf(), end_s: None, _spooled: None })
        } else {
            Self::spool(name, &mut file)
        }
    }

    fn spool(name: String, from: &mut dyn io::Read) -> Result<Self> {
        let failed = |source| AudioError::Io { path: name.clone(), source };
        let mut file = NamedTempFile::with_prefix("wavegen-").map_err(failed)?;
        let listed = Listed::new(file.path());
        io::copy(from, &mut file).map_err(failed)?;
        let path = file.path().to_path_buf();
        Ok(Self { path, end_s: None, _spooled: Some(Arc::new((file, listed))), name })
    }

    /// The same without what comes after its first `seconds`.
    pub fn until(self, seconds: f64) -> Self {
        Self { end_s: Some(seconds), ..self }
    }

    /// Where it ends by [`Self::until`], seconds.
    pub(super) fn end_s(&self) -> Option<f64> {
        self.end_s
    }

    /// The same in frames at `sample_rate` Hz, at least one; the last there can be if it goes on to the file's end.
    pub(super) fn end_frame(&self, sample_rate: u32) -> u64 {
        self.end_s.map_or(u64::MAX, |end_s| ((end_s * f64::from(sample_rate)).round() as u64).max(1))
    }

    /// The name to show to people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the bytes are: the file itself or its spooled copy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the bytes for reading from the start.
    ///
    /// # Errors
    /// The file has become unreadable.
    pub fn file(&self) -> Result<File> {
        File::open(&self.path).map_err(|source| self.io_error(source))
    }

    /// An I/O error that names this source.
    pub fn io_error(&self, source: io::Error) -> AudioError {
        AudioError::Io { path: self.name.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_and_a_missing_file_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let error = AudioSource::open(folder.path()).unwrap_err();
        assert!(matches!(&error, AudioError::Directory { .. }), "{error}");
        let missing = folder.path().join("missing.wav");
        let error = AudioSource::open(&missing).unwrap_err();
        assert!(error.to_string().contains("missing.wav"), "{error}");
    }

    #[test]
    fn a_spooled_pipe_lives_as_long_as_its_last_clone() {
        let source = AudioSource::spool("pipe".into(), &mut &b"bytes"[..]).unwrap();
        let clone = source.clone();
        drop(source);
        assert_eq!(std::fs::read(clone.path()).unwrap(), b"bytes");
        let path = clone.path().to_path_buf();
        drop(clone);
        assert!(!path.exists());
    }
}
