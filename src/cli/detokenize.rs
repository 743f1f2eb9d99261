//! `wavegen detokenize`: turns tokens into the audio that a model hears.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::sink;

use super::Outcome;
use super::common::{Talk, is_pipe, is_stdout, output_path};
use super::token_file::TokenFile;

/// Turn tokens back into audio: mono, at the rate of the tokens' codec and the recording's level
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen detokenize song.tokens.safetensors -o as-heard.wav
  wavegen tokenize song.flac -o - | wavegen detokenize - -o as-heard.wav")]
pub struct Args {
    /// Token file made by wavegen tokenize; - for standard input
    #[arg(value_name = "FILE")]
    input: PathBuf,
    /// Where the WAV goes, - for standard output [default: FILE.wav beside the input]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite an existing output
    #[arg(long)]
    force: bool,
    /// Sample format: u8, i16, i24, i32, f32 or f64
    #[arg(long, default_value = "i16")]
    format: SampleFormat,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct Report {
    output: String,
    n_tokens: usize,
    sample_rate: u32,
    seconds: f64,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let output = output_path(args.output.as_deref(), &args.input, "wav")?;
    let mut sink = sink::open(&output, args.force)?;
    let mut bytes = Vec::new();
    if is_pipe(&args.input) {
        std::io::stdin().read_to_end(&mut bytes).context("standard input")?;
    } else {
        let failed = || format!("{}: cannot be read", args.input.display());
        File::open(&args.input).and_then(|mut file| file.read_to_end(&mut bytes)).with_context(failed)?;
    }
    let file = TokenFile::from_bytes(&bytes, &args.input)?;
    if file.tokens.is_empty() {
        bail!("{}: holds no tokens", args.input.display());
    }
    sink.start(&WavFormat::new(file.codec.sample_rate, 1, args.format))?;
    for tokens in file.tokens.chunks(1 << 16) {
        let samples: Vec<f32> = file.codec.decode_all(tokens).iter().map(|x| x / file.gain).collect();
        sink.write(&samples)?;
    }
    sink.finish()?;
    let report = Report {
        output: output.display().to_string(),
        n_tokens: file.tokens.len(),
        sample_rate: file.codec.sample_rate,
        seconds: file.tokens.len() as f64 / f64::from(file.codec.sample_rate),
    };
    args.talk.note(&format!("{}: {:.2} s at {} Hz", report.output, report.seconds, report.sample_rate));
    args.talk.json(&report, is_stdout(&output))?;
    Ok(Outcome::Done)
}
