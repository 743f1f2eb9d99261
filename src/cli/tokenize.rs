//! `wavegen tokenize`: turns a recording into the tokens that a model reads.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use wavegen::atomic::write_whole;
use wavegen::generate::gain_to_model;

use super::Outcome;
use super::common::{ModelArgs, Talk, check_output, is_pipe, is_stdout, output_path, read_mono, seconds};
use super::token_file::TokenFile;

/// Turn a recording into a model's tokens
///
/// The file is safetensors: one tensor `tokens` (U16, one per sample at the model's rate) and the metadata format, version,
/// codec and gain. They are of the mean of all channels; `continue` hears the last 40 s, without constant offsets, and of channels that
/// cancel each other the loudest.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen tokenize song.flac                         writes song.tokens.safetensors
  wavegen tokenize song.flac -o - | wavegen detokenize - -o as-heard.wav
  python -c \"from safetensors.numpy import load_file; print(load_file('song.tokens.safetensors')['tokens'])\"")]
pub struct Args {
    /// Recording in any audio format; - for standard input
    #[arg(value_name = "FILE")]
    input: PathBuf,
    /// Where the tokens go, - for standard output [default: FILE.tokens.safetensors beside the input]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite an existing output
    #[arg(long)]
    force: bool,
    /// Use only this much, from the beginning
    #[arg(long, value_name = "S", value_parser = seconds)]
    max_seconds: Option<f64>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct Report {
    output: String,
    n_tokens: usize,
    sample_rate: u32,
    seconds: f64,
    gain: f32,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let output = output_path(args.output.as_deref(), &args.input, "tokens.safetensors")?;
    if !is_pipe(&output) {
        check_output(&output, args.force)?;
    }
    let codec = args.model.load()?.config.codec;
    let samples = read_mono(&args.input, codec.sample_rate, args.max_seconds, &args.talk)?;
    let gain = gain_to_model(&samples);
    let tokens = samples.iter().map(|x| codec.encode(x * gain)).collect();
    let file = TokenFile { codec, gain, tokens };
    let bytes = file.to_bytes()?;
    match is_pipe(&output) {
        true => std::io::stdout().write_all(&bytes).context("standard output")?,
        false => write_whole(&output, &bytes, args.force)
            .with_context(|| format!("{}: cannot be written", output.display()))?,
    }
    let report = Report {
        output: output.display().to_string(),
        n_tokens: file.tokens.len(),
        sample_rate: file.codec.sample_rate,
        seconds: file.tokens.len() as f64 / f64::from(file.codec.sample_rate),
        gain,
    };
    args.talk.note(&format!(
        "{}: {} tokens, {:.2} s at {} Hz",
        report.output, report.n_tokens, report.seconds, report.sample_rate
    ));
    args.talk.json(&report, is_stdout(&output))?;
    Ok(Outcome::Done)
}
