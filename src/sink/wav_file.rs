//! Turns audio into a file, of WAV or bare samples, that appears under its name when it is whole, and not before.

use std::path::Path;

use super::Sink;
use crate::atomic::Part;
use crate::audio::{AudioError, Result, WavFormat, WavPrompt, WavWriter};

/// Writes to a temporary file beside the destination and renames it at the end; dropped unfinished, nothing remains.
pub struct WavFileSink {
    name: String,
    force: bool,
    state: State,
}

enum State {
    Opened(Part),
    Writing(WavWriter<Part>),
    Finished,
}

impl WavFileSink {
    /// A sink for the file `path`.
    ///
    /// # Errors
    /// The file exists and `force` is false, or nothing can be written there.
    pub fn new(path: &Path, force: bool) -> Result<Self> {
        let name = path.display().to_string();
        if path.exists() && !force {
            return Err(AudioError::Exists { path: name });
        }
        match Part::beside(path) {
            Ok(part) => Ok(Self { name, force, state: State::Opened(part) }),
            Err(reason) => Err(AudioError::Unwritable { path: name, reason: reason.to_string() }),
        }
    }

    fn writer(&mut self) -> &mut WavWriter<Part> {
        match &mut self.state {
            State::Writing(writer) => writer,
            _ => panic!("a sink takes audio between its start and its finish"),
        }
    }
}

impl Sink for WavFileSink {
    fn start(&mut self, format: &WavFormat) -> Result<()> {
        let State::Opened(part) = std::mem::replace(&mut self.state, State::Finished) else {
            panic!("a sink is started once");
        };
        self.state = State::Writing(WavWriter::new(part, &self.name, format.clone())?);
        Ok(())
    }

    fn copy_prompt(&mut self, prompt: &WavPrompt) -> Result<()> {
        self.writer().copy_prompt(prompt)
    }

    fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        self.writer().write(interleaved)
    }

    fn finish(&mut self) -> Result<()> {
        let State::Writing(writer) = std::mem::replace(&mut self.state, State::Finished) else {
            return Ok(());
        };
        let named = writer.finish_file()?.finish(self.force);
        named.map_err(|source| AudioError::Io { path: self.name.clone(), source })
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
        // A file that came into being meanwhile is kept as well, and so is what was written.
        late.write(&[0.25; 100]).unwrap();
        let error = late.finish().unwrap_err().to_string();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        let part = names(folder.path()).into_iter().find(|name| name != "out.wav").unwrap();
        assert!(error.contains("out.wav: already exists") && error.contains(&part), "{error}");
        assert_eq!(hound::WavReader::open(folder.path().join(&part)).unwrap().duration(), 100);
        std::fs::remove_file(folder.path().join(&part)).unwrap();

        let mut sink = WavFileSink::new(&path, true).unwrap();
        sink.start(&format()).unwrap();
        sink.finish().unwrap();
        assert_eq!(hound::WavReader::open(&path).unwrap().duration(), 0);
        assert_eq!(names(folder.path()), ["out.wav"]);
    }

    #[test]
    fn a_missing_folder_is_told_at_once() {
        let error = WavFileSink::new(Path::new("/no/such/folder/out.wav"), false).err().unwrap();
        assert!(matches!(error, AudioError::Unwritable { .. }));
        assert!(error.to_string().starts_with("/no/such/folder/out.wav: cannot be written"), "{error}");
    }
}
