//! `wavegen prepare`: turns folders of recordings into a corpus that training reads from.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use wavegen::corpus::{Corpus, Findings, PrepareEvent, PrepareSettings, prepare};
use wavegen::plan::PlanConfig;
use wavegen::train::dataset::LEAST_FRAMES;

use super::Outcome;
use super::common::{Refused, Talk, Usage, catch_interrupt, interrupted};

/// Decode recordings once, into a corpus that `train` reads: one rate, one level, a manifest
///
/// Only what is new or has changed is decoded; what cannot be read is listed and left out. Interrupted, killed or out of
/// disk, the same command goes on. An hour of recordings takes 115 MB.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen prepare recordings/ -o corpus/                    all that symphonia reads, on all cores
  wavegen prepare recordings/ more/ -o corpus/              again: only what is new
  wavegen prepare recordings/ -o corpus/ --shard 3/16       one job of an array: a sixteenth of the files
  wavegen train corpus/ -o my.safetensors --minutes 60")]
pub struct Args {
    /// Folders to search for audio files, and audio files
    #[arg(required = true, value_name = "DIR_OR_FILE")]
    inputs: Vec<PathBuf>,
    /// The corpus: a folder, made if it is not there
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Rate of the models that will be trained on it
    #[arg(long, value_name = "HZ", default_value_t = 16_000, value_parser = clap::value_parser!(u32).range(1_000..=192_000))]
    sample_rate: u32,
    /// Only the I-th of N shares of the files, to be made by N jobs in any order, also at the same time
    #[arg(long, value_name = "I/N", default_value = "1/1", value_parser = part)]
    shard: (usize, usize),
    /// Worker threads [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    talk: Talk,
}

fn part(text: &str) -> Result<(usize, usize), String> {
    let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match numbers {
        Some((i, n)) if 1 <= i && i <= n && n <= 100_000 => Ok((i, n)),
        _ => Err("must be I/N, such as 3/16, with I from 1 to N".into()),
    }
}

/// What preparing reports to machines.
#[derive(Serialize)]
struct Report {
    output: String,
    interrupted: bool,
    /// Files: decoded now, known before, left out, not there any more.
    added: usize,
    unchanged: usize,
    bad: Vec<Bad>,
    gone: usize,
    /// The whole corpus.
    pieces: usize,
    hours: f64,
    unfinished: Vec<String>,
    sound: Findings,
}

#[derive(Serialize)]
struct Bad {
    path: String,
    why: String,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let talk = &args.talk;
    check_inputs(&args.inputs)?;
    if let Some(input) = args.inputs.iter().find(|input| Corpus::is(input)) {
        let why = format!("{}: is a corpus already; give it to `wavegen train` beside the new one", input.display());
        return Err(Usage(why).into());
    }
    let output = args.output.canonicalize().ok();
    if output.is_some() && args.inputs.iter().any(|input| input.canonicalize().ok() == output) {
        let why = format!("{}: is what is read; give another folder with -o", args.output.display());
        return Err(Usage(why).into());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = PrepareSettings {
        inputs: args.inputs.clone(),
        folder: args.output.clone(),
        sample_rate: args.sample_rate,
        least_s: (LEAST_FRAMES * PlanConfig::default().hop) as f64 / f64::from(args.sample_rate),
        part: args.shard,
        threads: args.threads.map_or(cores, usize::from),
    };
    catch_interrupt();
    let bar = talk.bar(0, "{bar:40} {pos} of {len} files, {eta} left");
    let (mut bad, mut refused) = (Vec::new(), Refused::default());
    let prepared = prepare(&settings, &mut |event| {
        match event {
            PrepareEvent::Waiting => bar.suspend(|| talk.note("another process prepares this part; waiting for it")),
            PrepareEvent::Found { new, unchanged } => {
                bar.set_length(new as u64);
                bar.set_position(0);
                bar.suspend(|| talk.note(&format!("{new} files to look into, {unchanged} known and unchanged")));
            }
            PrepareEvent::Piece { facts } => {
                bar.inc(1);
                for warning in &facts.warnings {
                    bar.suspend(|| talk.detail(&format!("{}: {warning}", facts.source)));
                }
            }
            PrepareEvent::Same { path } => {
                bar.inc(1);
                bar.suspend(|| talk.detail(&format!("{}: known already", path.display())));
            }
            PrepareEvent::Bad { path, why } => {
                bar.inc(1);
                bar.suspend(|| refused.tell(why, talk));
                bad.push(Bad { path: path.display().to_string(), why: why.to_owned() });
            }
        }
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    bar.finish_and_clear();
    refused.summarise(talk);
    let corpus = Corpus::open(&args.output)?;
    if corpus.pieces.is_empty() && args.shard.1 == 1 && !prepared.interrupted {
        bail!(
            "no usable audio among {} files: every piece needs at least {:.1} s of sound",
            prepared.bad,
            settings.least_s
        );
    }
    let sound = corpus.sound().findings();
    talk.note(&format!(
        "{}: {} files added, {} unchanged, {} left out; {} pieces, {:.2} h in all",
        args.output.display(),
        prepared.added,
        prepared.unchanged,
        prepared.bad,
        corpus.pieces.len(),
        corpus.hours()
    ));
    if prepared.gone > 0 {
        talk.note(&format!("{} files are not there any more; what was made of them is kept", prepared.gone));
    }
    talk.note(&sound.to_string());
    sound.warnings.iter().for_each(|warning| talk.warn(warning));
    let how = if prepared.interrupted { "interrupted, all that is done is kept; the same command goes on" } else { "" };
    if !how.is_empty() {
        talk.note(how);
    } else if corpus.unfinished.is_empty() {
        talk.note(&format!("train on it: wavegen train {} -o MODEL.safetensors --minutes 60", args.output.display()));
    } else {
        talk.note(&format!("not finished yet: {}", corpus.unfinished.join(", ")));
    }
    let report = Report {
        output: args.output.display().to_string(),
        interrupted: prepared.interrupted,
        added: prepared.added,
        unchanged: prepared.unchanged,
        bad,
        gone: prepared.gone,
        pieces: corpus.pieces.len(),
        hours: corpus.hours(),
        unfinished: corpus.unfinished,
        sound,
    };
    talk.json(&report, false)?;
    Ok(if prepared.interrupted { Outcome::Interrupted } else { Outcome::Done })
}

/// A path that the user wrote and that is not there is an error, not a file to be left out.
pub fn check_inputs(inputs: &[PathBuf]) -> Result<()> {
    let check = |path: &Path| path.metadata().map(drop).with_context(|| format!("{}: cannot be read", path.display()));
    inputs.iter().try_for_each(|path| check(path))
}
