//! `wavegen generate`: turns a seed into music that follows nothing.

use std::path::PathBuf;

use anyhow::Result;
use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::generate::{Prompt, play_on};
use wavegen::sink;

use super::Outcome;
use super::common::{ModelArgs, PlayReport, SamplingArgs, Talk, catch_interrupt, output_path, seconds};

/// Play from nothing: the plan transformer chooses what, beginning after silence
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen generate -o music.wav --seconds 20
  wavegen generate --seed 3 -o - | aplay             another piece, straight to the speakers")]
pub struct Args {
    /// How long to play
    #[arg(long, short, default_value = "10", value_parser = seconds)]
    seconds: f64,
    /// Where the WAV goes; - for standard output
    #[arg(long, short, value_name = "FILE", default_value = "generated.wav")]
    output: PathBuf,
    /// Overwrite an existing output
    #[arg(long)]
    force: bool,
    /// Sample format: u8, i16, i24, i32, f32 or f64
    #[arg(long, default_value = "i16")]
    format: SampleFormat,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    talk: Talk,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let output = output_path(Some(&args.output), &args.output, "wav")?;
    let mut sink = sink::open(&output, args.force)?;
    let checkpoint = args.model.load()?;
    let prompt = Prompt::silence(&checkpoint.config.codec);
    let mut engine = ReferenceEngine::new(&checkpoint)?;
    let options = args.sampling.options(checkpoint.generation);
    catch_interrupt()?;
    let shape = (prompt.sample_rate(), prompt.channels());
    sink.start(&WavFormat::new(shape.0, shape.1, args.format))?;
    let bar = args.talk.play_bar();
    let played = play_on(&mut engine, &prompt, args.seconds, &options, sink.as_mut(), &mut |p| bar.update(p))?;
    sink.finish()?;
    PlayReport::new(&output, shape, 0, &played, bar.finish(), options.seed).tell(&args.talk)?;
    Ok(if played.interrupted { Outcome::Interrupted } else { Outcome::Done })
}
