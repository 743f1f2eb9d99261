//! Turns audio into a WAV stream of unknown length, or bare samples, on standard output, a pipe or a device.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use super::Sink;
use crate::audio::{AudioError, Result, WavFormat, WavPrompt, WavWriter};

/// Writes a stream; every write is passed on at once.
pub struct PipeSink {
    name: String,
    state: State,
}

enum State {
    Opened(Box<dyn Write + Send>),
    Writing(WavWriter<Box<dyn Write + Send>>),
    Finished,
}

impl PipeSink {
    /// Writes to standard output.
    pub fn stdout() -> Self {
        Self { name: "standard output".into(), state: State::Opened(Box::new(io::stdout())) }
    }

    /// Writes to an existing pipe or device.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub fn device(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        match OpenOptions::new().write(true).open(path) {
            Ok(file) => Ok(Self { name, state: State::Opened(Box::new(file)) }),
            Err(source) => Err(AudioError::Io { path: name, source }),
        }
    }

    fn writer(&mut self) -> &mut WavWriter<Box<dyn Write + Send>> {
        match &mut self.state {
            State::Writing(writer) => writer,
            _ => panic!("a sink takes audio between its start and its finish"),
        }
    }
}

impl Sink for PipeSink {
    fn start(&mut self, format: &WavFormat) -> Result<()> {
        let State::Opened(out) = std::mem::replace(&mut self.state, State::Finished) else {
            panic!("a sink is started once");
        };
        self.state = State::Writing(WavWriter::new(out, &self.name, format.clone())?);
        Ok(())
    }

    fn copy_prompt(&mut self, prompt: &WavPrompt) -> Result<()> {
        self.writer().copy_prompt(prompt)?;
        self.writer().flush()
    }

    fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        self.writer().write(interleaved)?;
        self.writer().flush()
    }

    fn finish(&mut self) -> Result<()> {
        if let State::Writing(writer) = std::mem::replace(&mut self.state, State::Finished) {
            writer.finish()?;
        }
        Ok(())
    }
}
