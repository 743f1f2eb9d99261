//! `wavegen generate`: turns a seed into music that follows nothing.

use std::path::PathBuf;

use anyhow::Result;
use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::generate::{Prompt, Recording};

use super::Outcome;
use super::common::output_path;
use super::play::{Before, PlayArgs, Start};

/// Play from nothing: the plan transformer chooses what, beginning after silence
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen generate -o music.wav --seconds 20
  wavegen generate --takes 8 -o idea.wav             eight beginnings: idea.1.wav to idea.8.wav
  wavegen generate --seed 3 -o - | aplay             another piece, straight to the speakers
  wavegen generate --save-session s.bin              to be played on with `wavegen continue --resume s.bin`")]
pub struct Args {
    /// Where the WAV goes; - for standard output
    #[arg(long, short, value_name = "FILE", default_value = "generated.wav")]
    output: PathBuf,
    /// Sample format: u8, i16, i24, i32, f32 or f64
    #[arg(long, default_value = "i16")]
    format: SampleFormat,
    #[command(flatten)]
    pub play: PlayArgs,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let output = output_path(Some(&args.output), &args.output, "wav")?;
    let takes = args.play.outputs(&output)?;
    let checkpoint = args.play.model.load()?;
    let prompt = Prompt::silence(&checkpoint.config.codec);
    let format = WavFormat::new(prompt.sample_rate(), prompt.channels(), args.format);
    let recording = Recording { format, n_frames: 0 };
    args.play.play(&checkpoint, takes, Start::Prompt(prompt), &Before::Nothing, &recording)
}
