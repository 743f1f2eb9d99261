//! `wavegen train`: turns recordings into a model.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde::Serialize;
use wavegen::audio::AudioError;
use wavegen::checkpoint::Precision;
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::train::schedule::Budget;
use wavegen::train::{Part, TrainEvent, TrainSettings, train};

use super::Outcome;
use super::common::{Talk, Usage, catch_interrupt, interrupted};

/// Train a model from nothing on recordings
///
/// Files that are no audio are passed over with a warning. A share of the files is held out to judge by. Ctrl-C ends
/// training early with a whole model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen train recordings/ -o my.safetensors --minutes 60
  wavegen train a.flac b.mp3 -o tiny.safetensors --preset tiny --steps 200
  wavegen continue song.wav --model my.safetensors")]
pub struct Args {
    /// Audio files, and directories to search for them
    #[arg(required = true, value_name = "DIR_OR_FILE")]
    inputs: Vec<PathBuf>,
    /// Where the model goes; rewritten as training goes on
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Overwrite an existing model
    #[arg(long)]
    force: bool,
    /// Size of the model: tiny, small, base, or a .toml file
    #[arg(long, default_value = "small")]
    preset: String,
    /// Train for this long
    #[arg(long, value_parser = minutes, required_unless_present = "steps", conflicts_with = "steps")]
    minutes: Option<f64>,
    /// Train for this many steps of each transformer
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// The same seed draws the same excerpts in the same order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Worker threads [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Peak learning rate of the plan transformer
    #[arg(long, default_value = "1e-3", value_parser = learning_rate)]
    plan_learning_rate: f64,
    /// Peak learning rate of the wave transformer
    #[arg(long, default_value = "2e-3", value_parser = learning_rate)]
    wave_learning_rate: f64,
    /// Share of the files that is held out
    #[arg(long, default_value = "0.03", value_parser = share)]
    validation_share: f64,
    /// Store matrices in half precision: half the size
    #[arg(long)]
    half: bool,
    /// Skip the last part, which fits the generation settings by playing held-out excerpts
    #[arg(long)]
    no_calibration: bool,
    /// A note kept in the model, such as licence=CC-BY-4.0; can be given again
    #[arg(long, value_name = "NAME=TEXT", value_parser = note)]
    note: Vec<(String, String)>,
    #[command(flatten)]
    talk: Talk,
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1e6 => Ok(value),
        _ => Err("must be a number of minutes, more than 0".into()),
    }
}

fn learning_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value < 1.0 => Ok(value),
        _ => Err("must lie between 0 and 1".into()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=0.5).contains(&value) => Ok(value),
        _ => Err("must lie in 0 to 0.5".into()),
    }
}

fn note(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=TEXT")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// What training reports to machines.
#[derive(Default, Serialize)]
struct Report {
    output: String,
    interrupted: bool,
    train_hours: f64,
    validation_hours: f64,
    /// Last figures on held-out pieces.
    plan_bits_per_frame: Option<f64>,
    wave_bits_per_sample: Option<f64>,
    generation: GenerationSettings,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let talk = &args.talk;
    let config = ModelConfig::preset(&args.preset).map_err(|e| Usage(format!("--preset {}: {e}", args.preset)))?;
    check_output(&args.output, args.force)?;
    let mut files = Vec::new();
    for input in &args.inputs {
        collect(input, &mut files)?;
    }
    files.sort();
    files.dedup();
    let budget = match (args.minutes, args.steps) {
        (Some(minutes), _) => Budget::Time(Duration::from_secs_f64(60.0 * minutes)),
        (None, steps) => Budget::Steps(steps.unwrap_or(1) as usize),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = TrainSettings {
        config,
        files,
        output: args.output.clone(),
        precision: if args.half { Precision::F16 } else { Precision::F32 },
        budget,
        seed: args.seed,
        threads: args.threads.map_or(cores, usize::from),
        plan_learning_rate: args.plan_learning_rate,
        wave_learning_rate: args.wave_learning_rate,
        validation_share: args.validation_share,
        calibrate: !args.no_calibration,
        notes: args.note.iter().cloned().collect::<BTreeMap<_, _>>(),
    };
    catch_interrupt()?;
    let bar = talk.bar(1000, "{bar:40} {msg}");
    let mut report = Report { output: args.output.display().to_string(), ..Report::default() };
    let checkpoint = train(&settings, &mut |event| {
        tell(&event, talk, &bar);
        note_figures(&event, &mut report);
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    bar.finish_and_clear();
    report.interrupted = interrupted();
    report.generation = checkpoint.generation;
    let how = if report.interrupted { " (interrupted early, whole)" } else { "" };
    talk.note(&format!("{}: model written{how}; try it: wavegen continue SONG --model {0}", report.output));
    talk.json(&report, false)?;
    Ok(if report.interrupted { Outcome::Interrupted } else { Outcome::Done })
}

/// Finds out before training whether its result can be kept.
fn check_output(path: &Path, force: bool) -> Result<()> {
    if path.exists() && !force {
        return Err(AudioError::Exists { path: path.display().to_string() }.into());
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    tempfile::NamedTempFile::new_in(directory).with_context(|| format!("{}: cannot be written", path.display()))?;
    Ok(())
}

/// The files under a path, whatever they are.
fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let context = || format!("{}: cannot be read", path.display());
    if !path.metadata().with_context(context)?.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(path).with_context(context)? {
        let entry = entry.with_context(context)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            collect(&entry.path(), files)?;
        }
    }
    Ok(())
}

fn tell(event: &TrainEvent, talk: &Talk, bar: &ProgressBar) {
    let line = |text: String| bar.suspend(|| talk.note(&text));
    match event {
        TrainEvent::Skipped { why, .. } => bar.suspend(|| talk.warn(&format!("left out: {why}"))),
        TrainEvent::Data { train_files, train_hours, validation_files, validation_hours } => line(format!(
            "{train_files} files, {train_hours:.2} h to train on; {validation_files} files, {validation_hours:.2} h held out"
        )),
        TrainEvent::Codebooks { error_db } => line(format!("plan codebooks: {error_db:.2} dB rms")),
        TrainEvent::Step { part, step, done, bits, units_per_s, elapsed } => {
            bar.set_position((1000.0 * done) as u64);
            let (name, unit) = names(*part);
            let text = format!(
                "{name} step {step}: {bits:.3} bits/{unit}, {units_per_s:.0} {unit}s/s, {:.0} s",
                elapsed.as_secs_f64()
            );
            if bar.is_hidden() {
                talk.detail(&text);
            } else {
                bar.set_message(text);
            }
        }
        TrainEvent::Validation { part, step, bits } => {
            let (name, unit) = names(*part);
            line(format!("{name} step {step}: {bits:.3} bits/{unit} held out"));
        }
        TrainEvent::Calibration { settings, adherence_db, bias_db, chosen } => line(format!(
            "grain {:.2} past {:.2} offset {:.2}: adherence {adherence_db:.2} dB, bias {bias_db:+.2} dB{}",
            settings.grain,
            settings.past,
            settings.offset,
            if *chosen { ", best so far" } else { "" }
        )),
        TrainEvent::Saved { path } => talk.detail(&format!("{}: saved", path.display())),
    }
}

fn names(part: Part) -> (&'static str, &'static str) {
    match part {
        Part::Plan => ("plan", "frame"),
        Part::Wave => ("wave", "sample"),
    }
}

fn note_figures(event: &TrainEvent, report: &mut Report) {
    match event {
        TrainEvent::Data { train_hours, validation_hours, .. } => {
            (report.train_hours, report.validation_hours) = (*train_hours, *validation_hours);
        }
        TrainEvent::Validation { part: Part::Plan, bits, .. } => report.plan_bits_per_frame = Some(*bits),
        TrainEvent::Validation { part: Part::Wave, bits, .. } => report.wave_bits_per_sample = Some(*bits),
        _ => {}
    }
}
