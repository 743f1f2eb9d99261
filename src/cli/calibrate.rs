//! `wavegen calibrate`: turns a model and recordings into the settings that it plays best with.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use wavegen::atomic::Folder;
use wavegen::checkpoint::Checkpoint;
use wavegen::model::config::GenerationSettings;
use wavegen::train::calibrate::{EXCERPTS, Tried, calibrate};
use wavegen::train::dataset::{Dataset, Sources};
use wavegen::train::scene::Follow;
use wavegen::train::{TrainError, TrainEvent};

use super::Outcome;
use super::common::{Refused, Talk, catch_interrupt, check_output, interrupted, print, start_threads};
use super::prepare::check_inputs;

/// Fit a model's grain, past, offset and level by letting it play: nearest to the recordings, as tonal, at the right level
///
/// Excerpts of the recordings are played with their own plan by the CPU engine and analysed again, and in the end with plans of the
/// model's own for the level. Training ends with the same. Recordings that the model was not trained on judge best.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen calibrate my.safetensors held-out/*.flac                       print the table
  wavegen calibrate my.safetensors held-out/ -o tuned.safetensors        and write the model with the best settings
  wavegen calibrate built-in corpus/ --excerpts 16 --json")]
pub struct Args {
    /// The model; `built-in` for the one inside the program
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Audio files, folders to search for them, corpora
    #[arg(required = true, value_name = "DIR_OR_FILE")]
    inputs: Vec<PathBuf>,
    /// Write the model with the settings that were best, stored as it was
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite an existing model
    #[arg(long, requires = "output")]
    force: bool,
    /// Excerpts played per setting, each of 1.5 s after 0.8 s
    #[arg(long, value_name = "N", default_value_t = EXCERPTS as u32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    excerpts: u32,
    /// Worker threads [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct Report {
    /// In the order in which they were tried, each at its own level; the first is what the model had.
    tried: Vec<Tried>,
    best: GenerationSettings,
    interrupted: bool,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let talk = &args.talk;
    let threads = start_threads(args.threads)?;
    let mut checkpoint = Checkpoint::named(&args.model)?;
    check_inputs(&args.inputs)?;
    if let Some(output) = &args.output {
        check_output(output, args.force)?;
    }
    catch_interrupt();
    let folder = Folder::new().context("making a temporary folder")?;
    let excerpts = args.excerpts as usize;
    let sources = Sources {
        inputs: &args.inputs,
        state: folder.path(),
        seed: 0,
        validation_share: 0.0,
        most: Some(excerpts),
        threads,
    };
    let bar = talk.bar(0, "{bar:40} {msg}");
    let (mut tried, mut refused) = (Vec::new(), Refused::default());
    let mut observe = |event: TrainEvent| {
        match event {
            TrainEvent::Skipped { why, .. } => bar.suspend(|| refused.tell(&why, talk)),
            TrainEvent::Calibration(setting) => {
                bar.set_message(format!("{} settings tried", tried.len() + 1));
                tried.push(setting);
            }
            _ => {}
        }
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let spectrum = checkpoint.spectrum()?;
    let opened = Dataset::open(&sources, &checkpoint.config.codec, &spectrum, &mut observe);
    if let Err(TrainError::Interrupted) = opened {
        return Ok(Outcome::Interrupted);
    }
    let data = opened?;
    data.check()?;
    let best = calibrate(&checkpoint, &data, excerpts, &mut observe)?;
    bar.finish_and_clear();
    refused.summarise(talk);
    if tried.is_empty() && !interrupted() {
        bail!(
            "none of {} pieces is long enough for an excerpt of 1.5 s after 0.8 s; give longer ones",
            data.train.len()
        );
    }
    if !talk.json {
        print(&format!(
            "{:>6} {:>6} {:>6} {:>9} {:>9} {:>11} {:>9} {:>11} {:>9} {:>9}",
            "grain", "past", "offset", "level", "plan", "recording", "tonality", "adherence", "bias", "louder"
        ))?;
        let chosen = tried.iter().rposition(|tried| tried.settings == best);
        for (i, Tried { settings, plan, recordings, adherence_db, bias_db, louder_db, .. }) in tried.iter().enumerate()
        {
            let plan = if *plan == Follow::Own { "own" } else { "theirs" };
            let distance = recordings.map_or("-".to_owned(), |of| format!("{:.2} dB", of.distance_db));
            let tonality = recordings.map_or("-".to_owned(), |of| format!("{:+.2} dB", of.tonality_db));
            let note = match i {
                _ if Some(i) == chosen => "  best",
                0 => "  the model's",
                _ => "",
            };
            print(&format!(
                "{:>6.2} {:>6.2} {:>6.2} {:>+6.1} dB {plan:>9} {distance:>11} {tonality:>9} {adherence_db:>8.2} dB {bias_db:>+6.2} dB {louder_db:>+6.2} dB{note}",
                settings.grain, settings.past, settings.offset, settings.level_db
            ))?;
        }
    }
    talk.json(&Report { tried, best, interrupted: interrupted() }, false)?;
    if interrupted() {
        return Ok(Outcome::Interrupted);
    }
    if let Some(output) = &args.output {
        checkpoint.generation = best;
        checkpoint.save(output, checkpoint.precision)?;
        talk.note(&format!("{}: model written", output.display()));
    }
    Ok(Outcome::Done)
}
