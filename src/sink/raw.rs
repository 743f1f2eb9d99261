//! Turns audio into bare little-endian samples without any header, for pipes and other programs.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::{Sink, is_device};
use crate::audio::{AudioError, Result, SampleFormat, WavFormat, WavPrompt};

/// Writes samples of one format; every write is passed on at once.
pub struct RawSink {
    name: String,
    sample_format: SampleFormat,
    out: BufWriter<Box<dyn Write + Send>>,
}

impl RawSink {
    /// Writes to standard output (`-`), or to a file; one that exists is refused unless `force`.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub fn open(path: &Path, sample_format: SampleFormat, force: bool) -> Result<Self> {
        let name = path.display().to_string();
        if path.as_os_str() == "-" {
            return Ok(Self { name, sample_format, out: BufWriter::new(Box::new(io::stdout())) });
        }
        let opened = match is_device(path) {
            true => OpenOptions::new().write(true).open(path),
            false if force => File::create(path),
            false => OpenOptions::new().write(true).create_new(true).open(path),
        };
        let file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => AudioError::Exists { path: name.clone() },
            _ => AudioError::Io { path: name.clone(), source },
        })?;
        Ok(Self { name, sample_format, out: BufWriter::new(Box::new(file)) })
    }

    fn checked<T>(&self, result: io::Result<T>) -> Result<T> {
        result.map_err(|source| AudioError::Io { path: self.name.clone(), source })
    }
}

impl Sink for RawSink {
    fn start(&mut self, _: &WavFormat) -> Result<()> {
        Ok(())
    }

    fn copy_prompt(&mut self, prompt: &WavPrompt) -> Result<()> {
        let copied = io::copy(&mut prompt.data()?, &mut self.out);
        self.checked(copied).map(drop)
    }

    fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(interleaved.len() * self.sample_format.bytes());
        for &sample in interleaved {
            let encoded = crate::audio::wav_writer::encode(sample, self.sample_format, &mut bytes);
            self.checked(encoded.map_err(io::Error::other))?;
        }
        let written = self.out.write_all(&bytes).and_then(|()| self.out.flush());
        self.checked(written)
    }

    fn finish(&mut self) -> Result<()> {
        let flushed = self.out.flush();
        self.checked(flushed)
    }
}
