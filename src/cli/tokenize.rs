//! `wavegen tokenize`: turns a recording into the tokens that a model reads.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use wavegen::audio::{AudioError, level};

use super::Outcome;
use super::common::{ModelArgs, Talk, is_pipe, output_path, read_mono, seconds};
use super::token_file::TokenFile;

/// Turn a recording into a model's tokens
///
/// The file is safetensors: one tensor `tokens` (U16, one per sample at the model's rate) and the metadata format, version,
/// codec and gain.
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
    refuse_existing(&output, args.force)?;
    let codec = args.model.load()?.config.codec;
    let samples = read_mono(&args.input, codec.sample_rate, args.max_seconds, &args.talk)?;
    let gain = level::gain(&samples).unwrap_or(1.0);
    let tokens = samples.iter().map(|x| codec.encode(x * gain)).collect();
    let file = TokenFile { codec, gain, tokens };
    write_whole(&output, &file.to_bytes()?, args.force)?;
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
    args.talk.json(&report, is_pipe(&output))?;
    Ok(Outcome::Done)
}

fn refuse_existing(path: &Path, force: bool) -> Result<()> {
    if !is_pipe(path) && !force && path.exists() {
        return Err(AudioError::Exists { path: path.display().to_string() }.into());
    }
    Ok(())
}

/// Writes under a temporary name and renames, so that the file is whole or not there.
fn write_whole(path: &Path, bytes: &[u8], force: bool) -> Result<()> {
    if is_pipe(path) {
        return std::io::stdout().write_all(bytes).context("standard output");
    }
    let failed = || format!("{}: cannot be written", path.display());
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(directory).with_context(failed)?;
    file.write_all(bytes).with_context(failed)?;
    if force {
        file.persist(path).with_context(failed)?;
    } else {
        file.persist_noclobber(path).with_context(failed)?;
    }
    Ok(())
}
