//! A sink that keeps what is written in memory.

use wavegen::audio::{Result, WavFormat, WavPrompt};
use wavegen::sink::Sink;

/// Keeps what is written.
#[derive(Default)]
pub struct Memory(pub Vec<f32>);

impl Sink for Memory {
    fn start(&mut self, _: &WavFormat) -> Result<()> {
        Ok(())
    }
    fn copy_prompt(&mut self, _: &WavPrompt) -> Result<()> {
        Ok(())
    }
    fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        self.0.extend_from_slice(interleaved);
        Ok(())
    }
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
