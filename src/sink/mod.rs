//! Where audio goes: a file or a pipe, behind one trait.
//!
//! A new sink is one new file here and one line in [`open`]. Sinks know nothing about models or tokens.

mod pipe;
mod wav_file;

use std::path::Path;

pub use pipe::PipeSink;
pub use wav_file::WavFileSink;

use crate::audio::{AudioError, Decoder, Result, WavFormat, WavPrompt};

/// Takes audio in one format, from start to finish; may be finished at any time after the start.
pub trait Sink: Send {
    /// Begins the audio; once, before everything else.
    ///
    /// # Errors
    /// The destination cannot be written.
    fn start(&mut self, format: &WavFormat) -> Result<()>;

    /// Appends a WAV prompt of the same format, unchanged to the last bit.
    ///
    /// # Errors
    /// The prompt cannot be read or the destination cannot be written.
    fn copy_prompt(&mut self, prompt: &WavPrompt) -> Result<()>;

    /// Appends interleaved samples.
    ///
    /// # Errors
    /// The destination cannot be written.
    fn write(&mut self, interleaved: &[f32]) -> Result<()>;

    /// Ends the audio: what was written is then complete and valid.
    ///
    /// # Errors
    /// The destination cannot be written.
    fn finish(&mut self) -> Result<()>;

    /// Appends all that `decoder` still decodes, block by block.
    ///
    /// # Errors
    /// What the decoder refuses, or the destination cannot be written.
    fn copy_decoded(&mut self, decoder: &mut Decoder) -> Result<()> {
        while let Some(block) = decoder.next_block()? {
            self.write(block)?;
        }
        Ok(())
    }
}

/// The sink for a path: `-` is standard output, a pipe or device is written as it goes, anything else becomes a file
/// that appears whole or not at all. An existing file is refused unless `force`.
///
/// # Errors
/// The path is a directory, exists, or is a pipe or device that cannot be written.
pub fn open(path: &Path, force: bool) -> Result<Box<dyn Sink>> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(PipeSink::stdout()));
    }
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(AudioError::Directory { path: path.display().to_string() }),
        _ if is_device(path) => Ok(Box::new(PipeSink::device(path)?)),
        _ => {
            check_name(path)?;
            Ok(Box::new(WavFileSink::new(path, force)?))
        }
    }
}

/// Whether a path is written as it goes: a pipe, a device, and what the process was given open (`/dev/stdout` may be a file).
pub fn is_device(path: &Path) -> bool {
    let given = ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc/self/fd"].iter().any(|open| path.starts_with(open));
    given || path.metadata().is_ok_and(|metadata| !metadata.is_file())
}

/// What other programs would take a file for that is a WAV under such a name.
const OTHER_FORMATS: [&str; 9] = ["aac", "aif", "aiff", "flac", "m4a", "mp3", "ogg", "opus", "wma"];

/// Refuses names that promise another format than WAV.
fn check_name(path: &Path) -> Result<()> {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default();
    match OTHER_FORMATS.contains(&extension.as_str()) {
        true => Err(AudioError::OtherFormat { path: path.display().to_string(), extension }),
        false => Ok(()),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::audio::SampleFormat;

    #[test]
    fn a_directory_is_refused_and_a_full_device_is_reported_by_name() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(open(folder.path(), true), Err(AudioError::Directory { .. })));
        if !Path::new("/dev/full").exists() {
            println!("skipped: this system has no /dev/full");
            return;
        }
        let mut sink = open(Path::new("/dev/full"), false).unwrap();
        let error = sink.start(&WavFormat::new(8000, 1, SampleFormat::I16)).unwrap_err();
        assert!(error.to_string().starts_with("/dev/full: "), "{error}");
    }

    #[test]
    fn a_stream_states_an_unknown_length_and_decodes_to_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let (file, stream) = (folder.path().join("file.wav"), folder.path().join("stream.wav"));
        let samples: Vec<f32> = (0..999).map(|i| (i as f32 * 0.01).sin()).collect();
        let mut to_file = open(&file, false).unwrap();
        std::fs::write(&stream, "").unwrap();
        let mut to_stream = PipeSink::device(&stream).unwrap();
        for sink in [to_file.as_mut(), &mut to_stream] {
            sink.start(&WavFormat::new(8000, 3, SampleFormat::F32)).unwrap();
            samples.chunks(300).for_each(|piece| sink.write(piece).unwrap());
            sink.finish().unwrap();
        }
        let header = std::fs::read(&stream).unwrap();
        assert_eq!(header[4..8], [0xff; 4]);
        let (file, stream) = (crate::audio::decode_file(&file).unwrap(), crate::audio::decode_file(&stream).unwrap());
        assert_eq!(file.samples, samples);
        assert_eq!(file, stream);
    }
}
