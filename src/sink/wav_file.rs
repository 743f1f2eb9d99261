//! Turns audio into a WAV file that appears under its name when it is whole, and not before.

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use super::Sink;
use crate::atomic::Part;
use crate::audio::{AudioError, Result, WavFormat, WavPrompt, WavWriter};

/// Writes to a temporary file beside the destination and renames it at the end; dropped unfinished, nothing remains.
pub struct WavFileSink {
    path: PathBuf,
    name: String,
    force: bool,
    writer: Option<WavWriter<BufWriter<Part>>>,
}

impl WavFileSink {
    /// A sink for the file `path`.
    ///
    /// # Errors
    /// The file exists and `force` is false.
    pub fn new(path: &Path, force: bool) -> Result<Self> {
        let name = path.display().to_string();
        if path.exists() && !force {
            return Err(AudioError::Exists { path: name });
        }
        Ok(Self { path: path.to_path_buf(), name, force, writer: None })
    }

    fn writer(&mut self) -> &mut WavWriter<BufWriter<Part>> {
        self.writer.as_mut().expect("a sink takes audio between its start and its finish")
    }

    fn error(&self, source: std::io::Error) -> AudioError {
        AudioError::Io { path: self.name.clone(), source }
    }
}

impl Sink for WavFileSink {
    fn start(&mut self, format: &WavFormat) -> Result<()> {
        let file = Part::beside(&self.path).map_err(|source| self.error(source))?;
        self.writer = Some(WavWriter::new(BufWriter::new(file), &self.name, format.clone())?);
        Ok(())
    }

    fn copy_prompt(&mut self, prompt: &WavPrompt) -> Result<()> {
        self.writer().copy_prompt(prompt)
    }

    fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        self.writer().write(interleaved)
    }

    fn finish(&mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let file = writer.finish_file()?.into_inner().map_err(|error| self.error(error.into_error()))?;
        file.finish(self.force).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => AudioError::Exists { path: self.name.clone() },
            _ => self.error(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::SampleFormat;

    fn format() -> WavFormat {
        WavFormat::new(8000, 1, SampleFormat::I16)
    }

    fn names(folder: &Path) -> Vec<String> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_only_when_finished_and_nothing_remains_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.wav");
        let mut sink = WavFileSink::new(&path, false).unwrap();
        sink.start(&format()).unwrap();
        sink.write(&[0.25; 100]).unwrap();
        assert!(!path.exists());
        drop(sink);
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));

        let mut sink = WavFileSink::new(&path, false).unwrap();
        sink.start(&format()).unwrap();
        sink.write(&[0.25; 100]).unwrap();
        sink.finish().unwrap();
        assert_eq!(names(folder.path()), ["out.wav"]);
        assert_eq!(hound::WavReader::open(&path).unwrap().duration(), 100);
    }

    #[test]
    fn an_existing_file_is_kept_unless_forced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.wav");
        let mut late = WavFileSink::new(&path, false).unwrap();
        late.start(&format()).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(WavFileSink::new(&path, false), Err(AudioError::Exists { .. })));
        // A file that came into being meanwhile is kept as well.
        assert!(matches!(late.finish(), Err(AudioError::Exists { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");

        let mut sink = WavFileSink::new(&path, true).unwrap();
        sink.start(&format()).unwrap();
        sink.finish().unwrap();
        assert_eq!(hound::WavReader::open(&path).unwrap().duration(), 0);
        assert_eq!(names(folder.path()), ["out.wav"]);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let mut sink = WavFileSink::new(Path::new("/no/such/folder/out.wav"), false).unwrap();
        let error = sink.start(&format()).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder/out.wav"), "{error}");
    }
}
