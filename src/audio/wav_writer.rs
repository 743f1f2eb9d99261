//! Turns a prompt's data bytes and f32 samples into a WAV, sample by sample as hound writes them, or into bare samples.

use std::io::{self, Seek, SeekFrom, Write};

use hound::Sample;

use super::{AudioError, Result, SampleFormat, WavFormat, WavPrompt};

/// The most data that the 32-bit lengths of a WAV file can state, with room for the header.
const MOST_STATED_BYTES: u32 = 0xffff_ffff - 0x1_0000;

/// Writes a WAV, or bare samples, all of one format. Whatever was written, it can be finished at any time.
pub struct WavWriter<W: Write> {
    out: W,
    // For messages.
    name: String,
    format: WavFormat,
    // Samples on their way to bytes.
    bytes: Vec<u8>,
}

impl<W: Write> WavWriter<W> {
    /// Starts a WAV of a length that is not known yet, which its header says by 0xFFFFFFFF bytes. `name` is for messages.
    ///
    /// # Errors
    /// `out` cannot be written.
    pub fn new(mut out: W, name: &str, format: WavFormat) -> Result<Self> {
        let written = out.write_all(&format.header(None));
        let name = name.to_string();
        let writer = Self { out, name, format, bytes: Vec::new() };
        writer.checked(written)?;
        Ok(writer)
    }

    /// Copies the data bytes of `prompt` as they are, in constant memory.
    ///
    /// # Errors
    /// The prompt has shrunk or cannot be read, or `out` cannot be written.
    ///
    /// # Panics
    /// The prompt's format is not this writer's.
    pub fn copy_prompt(&mut self, prompt: &WavPrompt) -> Result<()> {
        assert_eq!(prompt.format, self.format, "a prompt's bytes go into a WAV of its own format");
        let copied = io::copy(&mut prompt.data()?, &mut self.out);
        if self.checked(copied)? < prompt.data_bytes() {
            return Err(self.error(io::Error::other("the prompt became shorter while it was copied")));
        }
        Ok(())
    }

    /// Appends interleaved samples, whole frames of them; integers are rounded and clipped.
    ///
    /// # Errors
    /// `out` cannot be written.
    ///
    /// # Panics
    /// Not a whole number of frames.
    pub fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        assert_eq!(interleaved.len() % self.format.channels, 0, "samples come in whole frames");
        self.bytes.clear();
        for &sample in interleaved {
            let encoded = encode(sample, self.format.sample_format, &mut self.bytes);
            encoded.map_err(|error| self.error(io::Error::other(error)))?;
        }
        let written = self.out.write_all(&self.bytes);
        self.checked(written)
    }

    /// Passes buffered bytes on.
    ///
    /// # Errors
    /// `out` cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        let flushed = self.out.flush();
        self.checked(flushed)
    }

    /// Passes on what is left and gives `out` back.
    ///
    /// # Errors
    /// `out` cannot be written.
    pub fn finish(mut self) -> Result<W> {
        self.flush()?;
        Ok(self.out)
    }

    fn checked<T>(&self, result: io::Result<T>) -> Result<T> {
        result.map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> AudioError {
        AudioError::Io { path: self.name.clone(), source }
    }
}

impl<W: Write + Seek> WavWriter<W> {
    /// Ends the data, completes the header and gives `out` back. What is longer than a header can state (4 GiB) goes on to be of
    /// unknown length, which readers take as what lasts to the end of the file.
    ///
    /// # Errors
    /// `out` cannot be written.
    pub fn finish_file(mut self) -> Result<W> {
        let completed = self.complete();
        self.checked(completed)?;
        self.finish()
    }

    fn complete(&mut self) -> io::Result<()> {
        let start = self.format.header(None).len() as u64;
        // Where a disk is full, there may be a part of a frame: the file itself says how much data it has.
        let data_bytes = self.out.seek(SeekFrom::End(0))?.saturating_sub(start);
        let data_bytes = data_bytes - data_bytes % self.format.frame_bytes() as u64;
        let stated = stated(data_bytes);
        let header = self.format.header(stated);
        // Chunks are padded to an even length. Of one that lasts to the end of the file, it would be a sample.
        if start > 0 && stated.is_some_and(|bytes| bytes % 2 == 1) {
            self.out.seek(SeekFrom::Start(start + data_bytes))?;
            self.out.write_all(&[0])?;
        }
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&header)
    }
}

/// The length that a header states for so much data, if it can.
fn stated(data_bytes: u64) -> Option<u32> {
    u32::try_from(data_bytes).ok().filter(|&bytes| bytes <= MOST_STATED_BYTES)
}

/// Appends one sample's little-endian bytes.
fn encode(sample: f32, format: SampleFormat, bytes: &mut Vec<u8>) -> hound::Result<()> {
    match format {
        SampleFormat::F32 => sample.write(bytes, 32),
        SampleFormat::F64 => {
            bytes.extend_from_slice(&f64::from(sample).to_le_bytes());
            Ok(())
        }
        integer => {
            let full_scale = f64::from(1u32 << (integer.bits() - 1));
            let level = (f64::from(sample) * full_scale).round().clamp(-full_scale, full_scale - 1.0);
            (level as i32).write(bytes, integer.bits())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn written(format: SampleFormat, samples: &[f32]) -> Vec<u8> {
        let format = WavFormat::new(16000, 1, format);
        let mut writer = WavWriter::new(Cursor::new(Vec::new()), "memory", format).unwrap();
        writer.write(samples).unwrap();
        writer.finish_file().unwrap().into_inner()
    }

    #[test]
    fn integers_are_rounded_and_clipped() {
        let samples = [0.0, 1.0, -1.0, 2.0, -2.0, 0.75 / 32768.0, -0.25 / 32768.0];
        let file = written(SampleFormat::I16, &samples);
        let values: Vec<i16> = file[44..].chunks(2).map(|b| i16::from_le_bytes([b[0], b[1]])).collect();
        assert_eq!(values, [0, 32767, -32768, 32767, -32768, 1, 0]);
        assert_eq!(written(SampleFormat::U8, &[0.0, 1.0, -1.0])[44..], [128, 255, 0, 0]);
    }

    #[test]
    fn a_file_is_what_hound_would_have_written() {
        let samples: Vec<f32> = (0..99).map(|i| (i as f32 * 0.37).sin()).collect();
        for format in [SampleFormat::U8, SampleFormat::I16, SampleFormat::I24, SampleFormat::I32, SampleFormat::F32] {
            let mut reader = hound::WavReader::new(Cursor::new(written(format, &samples))).unwrap();
            assert_eq!(reader.duration(), 99, "{format}");
            let mut rewritten = Cursor::new(Vec::new());
            let mut writer = hound::WavWriter::new(&mut rewritten, reader.spec()).unwrap();
            match format {
                SampleFormat::F32 => reader.samples::<f32>().for_each(|s| writer.write_sample(s.unwrap()).unwrap()),
                _ => reader.samples::<i32>().for_each(|s| writer.write_sample(s.unwrap()).unwrap()),
            }
            writer.finalize().unwrap();
            // Hound does not pad odd data.
            let mut rewritten = rewritten.into_inner();
            let data_bytes = 99 * format.bytes();
            if data_bytes % 2 == 1 {
                rewritten.push(0);
                let riff_bytes = rewritten.len() as u32 - 8;
                rewritten[4..8].copy_from_slice(&riff_bytes.to_le_bytes());
            }
            assert!(rewritten == written(format, &samples), "{format}");
        }
    }

    /// A disk with room for so many bytes.
    struct Disk(Cursor<Vec<u8>>, usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match bytes.len().min(self.1 - self.0.position() as usize) {
                0 => Err(io::ErrorKind::StorageFull.into()),
                n => self.0.write(&bytes[..n]),
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Disk {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn where_the_disk_is_full_the_file_has_what_there_was_room_for() {
        for (format, channels) in [(SampleFormat::I16, 2), (SampleFormat::U8, 1), (SampleFormat::F32, 2)] {
            let format = WavFormat::new(16_000, channels, format);
            let disk = Disk(Cursor::new(Vec::new()), 1000);
            let mut writer = WavWriter::new(disk, "disk", format.clone()).unwrap();
            writer.write(&vec![0.5; 90 * channels]).unwrap();
            assert!(writer.write(&vec![0.5; 1000 * channels]).unwrap_err().to_string().starts_with("disk: "));
            let file = writer.finish_file().unwrap().0.into_inner();
            let frames = (1000 - format.header(None).len()) / format.frame_bytes();
            let mut reader = hound::WavReader::new(Cursor::new(file)).unwrap();
            assert_eq!(reader.duration() as usize, frames);
            assert!(format.sample_format.is_float() || reader.samples::<i32>().all(|x| x.unwrap() > 0));
        }
    }

    #[test]
    fn bare_samples_have_no_header_and_no_padding() {
        let format = WavFormat::bare(16_000, 1, SampleFormat::U8);
        let mut writer = WavWriter::new(Cursor::new(Vec::new()), "memory", format).unwrap();
        writer.write(&[0.0, 1.0, -1.0]).unwrap();
        assert_eq!(writer.finish_file().unwrap().into_inner(), [128, 255, 0]);
    }

    #[test]
    fn what_is_too_long_for_the_lengths_of_a_header_is_of_unknown_length() {
        assert_eq!([0, 5 << 30, 3 << 30, u64::from(u32::MAX)].map(stated), [Some(0), None, Some(3 << 30), None]);
    }
}
