//! `wavegen train`: turns recordings into a model.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde::Serialize;
use wavegen::checkpoint::{Checkpoint, Precision};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::model::ops::Inner;
use wavegen::train::group::{self, Group};
use wavegen::train::grow::{Fate, grow};
use wavegen::train::refine::Refined;
use wavegen::train::resume::StateFolder;
use wavegen::train::schedule::{Budget, Schedule};
use wavegen::train::{Part, Start, TrainError, TrainEvent, TrainSettings, train_in};

use super::common::{
    Refused, Talk, Usage, catch_interrupt, check_output, interrupted, number_in, one_line, say, start_threads,
};
use super::device::DeviceKind;
use super::prepare::check_inputs;
use super::{Outcome, dry_run, memory};

/// Train a model on recordings, from nothing or from another model
///
/// Files that are no audio are passed over with a warning. A share of the sound is held out to judge by; the model that
/// did best on it is kept. OUTPUT.loss.png and OUTPUT.sample.png show how it learns. Ctrl-C ends training early with a
/// whole model. Ended early, killed or switched off, the same command goes on from the state in OUTPUT.training as if
/// nothing had happened.
///
/// Built with the feature `mpi`, it can be started as several processes, on one machine or many: docs/mpi.md.
#[derive(clap::Args)]
#[command(
    override_usage = "wavegen train <DIR_OR_FILE>... --output <FILE> (--minutes <MINUTES> | --steps <STEPS>) [OPTIONS]"
)]
#[command(after_help = "\
Examples:
  wavegen train recordings/ -o my.safetensors --minutes 60
  wavegen train corpus/ --minutes 600 --preset base --dry-run
  wavegen train a.flac b.mp3 -o tiny.safetensors --preset tiny --steps 200
  wavegen train more/ -o tuned.safetensors --init my.safetensors --minutes 20
  wavegen train recordings/ -o longer.safetensors --init my.safetensors --part plan --minutes 10
  wavegen train recordings/ -o large.safetensors --init small.safetensors --preset base --minutes 600
  mpirun -np 2 wavegen train recordings/ -o my.safetensors --minutes 60 --wave-batch 8 --threads 4
  srun --mpi=pmix -n 16 -c 4 wavegen train recordings/ -o my.safetensors --minutes 60 --wave-batch 64 --threads 4
  wavegen continue song.wav --model my.safetensors")]
pub struct Args {
    /// Corpora made by `wavegen prepare`, audio files, and folders to search for them
    #[arg(required = true, value_name = "DIR_OR_FILE")]
    inputs: Vec<PathBuf>,
    /// Where the model goes; rewritten as training goes on
    #[arg(long, short, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Say what it will take (parameters, work, memory, time) after a few steps in a temporary folder, and do nothing else
    #[arg(long)]
    dry_run: bool,
    /// Overwrite an existing model
    #[arg(long)]
    force: bool,
    /// Forget the unfinished run that would make this model, and begin anew
    #[arg(long)]
    afresh: bool,
    /// Size of the model: tiny, small, base, or a .toml file [default: base, or as --init]
    #[arg(long)]
    preset: Option<String>,
    /// Go on from this model: its weights, codebooks and sizes; `built-in` for the one inside the program. With
    /// --preset as well, what can grow to the preset's sizes keeps what it learned, the rest begins anew
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Which transformer to train
    #[arg(long, value_enum, default_value = "both")]
    part: Parts,
    /// Train for this long
    #[arg(long, value_parser = minutes, required_unless_present = "steps", conflicts_with = "steps")]
    minutes: Option<f64>,
    /// Train for this many steps of each transformer
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// The same seed draws the same excerpts in the same order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Worker threads of each process [default: one per core that it may use]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Peak learning rate of the plan transformer
    #[arg(long, default_value = "1e-3", value_parser = learning_rate)]
    plan_learning_rate: f64,
    /// Peak learning rate of the wave transformer
    #[arg(long, default_value = "2e-3", value_parser = learning_rate)]
    wave_learning_rate: f64,
    /// How the learning rates move after the warm-up
    #[arg(long, value_enum, default_value = "cosine")]
    schedule: Rates,
    /// What computes; `cuda` needs a program built for it and an NVIDIA GPU, and wants batches of 16 or more
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// With --device cuda: what lies between the maps of a block, and its products, in bf16; weights, residual stream and losses stay
    /// in f32
    #[arg(long)]
    bf16: bool,
    /// Contexts of 16 s per step of the plan transformer, dealt to the threads of all processes; memory depends on --threads
    /// only, on a GPU on the batch
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    plan_batch: u32,
    /// Excerpts of 1 s per step of the wave transformer, dealt likewise
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    wave_batch: u32,
    /// Steps between validations [default: 100 of the plan, 250 of the wave transformer]
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u32).range(1..))]
    validate_every: Option<u32>,
    /// Seconds between states on disk: what a kill costs at most
    #[arg(long, value_name = "SECONDS", default_value = "40", value_parser = save_seconds)]
    save_every: Duration,
    /// End a part after this many validations without gain
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    patience: Option<u32>,
    /// Append everything that happens to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Share of the sound that is held out, about: at least one of two or more files; 0 for none
    #[arg(long, default_value = "0.03", value_parser = share)]
    validation_share: f64,
    /// Play excerpts faster or slower by up to this much, pitch and all: more material from little
    #[arg(long, value_name = "PERCENT", default_value = "0", value_parser = percent)]
    speed_variation: f64,
    /// Let the plan transformer hear white noise of up to this much on the bands of most frames, as its own plans are never
    /// quite right; 4 took away most of the harm that a high learning rate did to a trained model
    #[arg(long, value_name = "DB", default_value = "0", value_parser = plan_noise)]
    plan_noise: f32,
    /// How the model's matrices are stored
    #[arg(long, value_enum, default_value = "f32")]
    store: Store,
    /// Skip the last part, which fits the generation settings by playing held-out excerpts
    #[arg(long)]
    no_calibration: bool,
    /// Draw no pictures (OUTPUT.loss.png, OUTPUT.sample.png) at evaluations
    #[arg(long)]
    no_pictures: bool,
    /// A note kept in the model, such as licence=CC-BY-4.0; can be given again
    #[arg(long, value_name = "NAME=TEXT", value_parser = note)]
    note: Vec<(String, String)>,
    #[command(flatten)]
    talk: Talk,
}

/// How matrices are stored.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Store {
    F32,
    /// Half the size
    F16,
    /// A quarter of the size: as the CPU engine rounds them, so that it plays the same; best for a model that is done
    Int8,
}

impl From<Store> for Precision {
    fn from(store: Store) -> Self {
        match store {
            Store::F32 => Self::F32,
            Store::F16 => Self::F16,
            Store::Int8 => Self::Int8,
        }
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Parts {
    Plan,
    Wave,
    Both,
}

impl Parts {
    fn list(self) -> Vec<Part> {
        match self {
            Self::Plan => vec![Part::Plan],
            Self::Wave => vec![Part::Wave],
            Self::Both => vec![Part::Plan, Part::Wave],
        }
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Rates {
    /// Down a cosine to nearly zero
    Cosine,
    /// At the peak, then down in the last fifth
    Wsd,
}

impl From<Rates> for Schedule {
    fn from(rates: Rates) -> Self {
        match rates {
            Rates::Cosine => Self::Cosine,
            Rates::Wsd => Self::Wsd,
        }
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1e6 => Ok(value),
        _ => Err("must be a number of minutes, more than 0 and at most 1000000".into()),
    }
}

fn save_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=86_400.0).contains(&value) => Ok(Duration::from_secs_f64(value)),
        _ => Err("must be a number of seconds, at most a day".into()),
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

fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=50.0).contains(&value) => Ok(value),
        _ => Err("must lie in 0 to 50 per cent".into()),
    }
}

fn plan_noise(text: &str) -> Result<f32, String> {
    number_in(text, 0.0..=24.0)
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
    /// On held-out pieces, by the weights that are kept.
    plan_bits_per_frame: Option<f64>,
    wave_bits_per_sample: Option<f64>,
    /// Of the last free run.
    adherence_db: Option<f32>,
    peak_memory_bytes: Option<u64>,
    generation: GenerationSettings,
}

impl Report {
    fn judged(&mut self, part: Part, bits: Option<f64>) {
        match part {
            Part::Plan => self.plan_bits_per_frame = bits,
            Part::Wave => self.wave_bits_per_sample = bits,
        }
    }
}

pub fn run(args: &Args) -> Result<Outcome> {
    let group = group::join().map_err(|error| Usage(error.to_string()))?;
    let result = run_in(&*group, args);
    if group.size() > 1
        && let Err(error) = &result
    {
        say(&format!("error: process {} of {}: {}", group.rank() + 1, group.size(), one_line(error)));
        group.abort(if error.is::<Usage>() { 2 } else { 1 });
    }
    result
}

/// Trains as one of a group of processes, of which the first talks to people and machines.
fn run_in(group: &dyn Group, args: &Args) -> Result<Outcome> {
    let talk = &args.talk;
    // Before anything else: whoever needs a pool first, such as a checkpoint being read, makes one.
    let threads = start_threads(args.threads)?;
    let silent = Talk { json: false, quiet: true, verbose: false };
    let start = start(args, if group.is_first() { talk } else { &silent })?;
    let output = args.output.clone().unwrap_or_default();
    if group.is_first() && !args.dry_run {
        // The run that would make it goes on.
        check_output(&output, args.force || StateFolder::holds_run(&output))?;
        refuse_same(args.init.as_deref(), &output)?;
    }
    check_inputs(&args.inputs)?;
    if args.bf16 && args.device == DeviceKind::Cpu {
        return Err(Usage("--bf16 is for --device cuda: the CPU trains in f32".into()).into());
    }
    let budget = match (args.minutes, args.steps) {
        (Some(minutes), _) => Budget::Time(Duration::from_secs_f64(60.0 * minutes)),
        (None, steps) => Budget::Steps(steps.unwrap_or(1) as usize),
    };
    let settings = TrainSettings {
        start,
        parts: args.part.list(),
        files: args.inputs.clone(),
        output: output.clone(),
        afresh: args.afresh,
        precision: args.store.into(),
        budget,
        seed: args.seed,
        device: args.device.open()?,
        inner: if args.bf16 { Inner::Bf16 } else { Inner::F32 },
        threads,
        plan_batch: args.plan_batch as usize,
        wave_batch: args.wave_batch as usize,
        schedule: args.schedule.into(),
        plan_learning_rate: args.plan_learning_rate,
        wave_learning_rate: args.wave_learning_rate,
        validation_share: args.validation_share,
        speed_variation: args.speed_variation / 100.0,
        plan_noise_db: args.plan_noise,
        validate_every: args.validate_every.map(|n| n as usize),
        save_every: args.save_every,
        patience: args.patience.map(|n| n as usize),
        calibrate: !args.no_calibration,
        pictures: !args.no_pictures,
        most_pieces: None,
        notes: args.note.iter().cloned().collect::<BTreeMap<_, _>>(),
    };
    catch_interrupt();
    if args.dry_run {
        let ended = if group.is_first() { dry_run::run(&settings, talk)? } else { Outcome::Done };
        return Ok(outcome(group.of_first(ended == Outcome::Interrupted)?));
    }
    if !group.is_first() {
        return match train_in(group, &settings, &mut |_| going()) {
            // On all ranks.
            Err(TrainError::Interrupted) => Ok(Outcome::Interrupted),
            trained => trained.map(|_| outcome(group.any(interrupted()))).map_err(Into::into),
        };
    }
    if group.size() > 1 {
        talk.note(&format!("{} processes of {threads} threads each", group.size()));
    }
    let mut log = args.log.as_deref().map(open_log).transpose()?;
    let bar = talk.bar(1000, "{bar:40} {msg}");
    let mut report = Report { output: output.display().to_string(), ..Report::default() };
    let mut shown = Shown::default();
    let trained = train_in(group, &settings, &mut |event| {
        tell(&event, talk, &bar, &mut shown);
        note_figures(&event, &mut report);
        if let Some(file) = &mut log
            && let Err(error) = write_line(file, &event)
        {
            talk.warn(&format!("the log cannot be written any more: {error}"));
            log = None;
        }
        going()
    });
    bar.finish_and_clear();
    let checkpoint = match trained {
        Err(TrainError::Interrupted) => {
            talk.note(&TrainError::Interrupted.to_string());
            return Ok(Outcome::Interrupted);
        }
        trained => trained?,
    };
    report.interrupted = group.any(interrupted());
    report.generation = checkpoint.generation;
    report.peak_memory_bytes = memory::peak();
    if let Some(peak) = report.peak_memory_bytes {
        talk.note(&format!("most memory in use: {}", memory::text(peak)));
    }
    let how = if report.interrupted { " (interrupted early, whole; the same command goes on)" } else { "" };
    talk.note(&format!("{}: model written{how}; try it: wavegen continue SONG --model {0}", report.output));
    talk.json(&report, false)?;
    Ok(outcome(report.interrupted))
}

fn outcome(interrupted: bool) -> Outcome {
    if interrupted { Outcome::Interrupted } else { Outcome::Done }
}

fn going() -> ControlFlow<()> {
    if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// What training begins with.
fn start(args: &Args, talk: &Talk) -> Result<Start> {
    let preset = |name: &str| ModelConfig::preset(name).map_err(|e| Usage(format!("--preset {name}: {e}")));
    let Some(path) = args.init.as_deref() else {
        return Ok(Start::New(preset(args.preset.as_deref().unwrap_or("base"))?.into()));
    };
    let init = Checkpoint::named(path)?;
    let Some(name) = &args.preset else { return Ok(Start::From(init.into())) };
    let (model, fates) = grow(&init, &preset(name)?, args.seed).map_err(|e| Usage(format!("--preset {name}: {e}")))?;
    for (part, fate) in fates {
        talk.note(&match fate {
            Fate::Kept => format!("{} transformer: as in {}", part.name(), path.display()),
            Fate::Moved if args.part.list().contains(&part) => format!(
                "{} transformer: goes on from {}, which was trained for other forecasts or tokens",
                part.name(),
                path.display()
            ),
            Fate::Moved => format!(
                "warning: the {0} transformer was trained for other forecasts or tokens, and --part leaves it so; train it next: --init {1} --part {0}",
                part.name(),
                args.output.as_deref().unwrap_or(Path::new("OUTPUT")).display()
            ),
            Fate::Grown if !args.part.list().contains(&part) => format!(
                "warning: the {0} transformer grows, and --part leaves what is new in it untrained; train it next: --init {1} --part {0}",
                part.name(),
                args.output.as_deref().unwrap_or(Path::new("OUTPUT")).display()
            ),
            Fate::Grown => format!("{} transformer: grows, and goes on from {}", part.name(), path.display()),
            Fate::New(why) if args.part.list().contains(&part) => {
                format!("{} transformer: begins anew ({why})", part.name())
            }
            Fate::New(why) => format!(
                "warning: the {0} transformer begins anew ({why}) and --part leaves it so; train it next: --init {1} --part {0}",
                part.name(),
                args.output.as_deref().unwrap_or(Path::new("OUTPUT")).display()
            ),
        });
    }
    let as_it_was = init.config.codec == model.config.codec && init.quantizer.books == model.quantizer.books;
    Ok(match as_it_was {
        true => Start::From(model.into()),
        false => Start::Refitted { model: model.into(), books: init.quantizer.into(), was: init.config.codec },
    })
}

fn open_log(path: &Path) -> Result<File> {
    let open = OpenOptions::new().create(true).append(true).open(path);
    open.with_context(|| format!("{}: cannot be written", path.display()))
}

fn write_line(file: &mut File, event: &TrainEvent) -> Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    Ok(file.write_all(&line)?)
}

/// A run goes on only from what it began with, and the best model so far is written over its output.
fn refuse_same(init: Option<&Path>, output: &Path) -> Result<()> {
    match (init.map(Path::canonicalize), output.canonicalize()) {
        (Some(Ok(init)), Ok(output)) if init == output => {
            Err(Usage(format!("{}: is --init too; give another file with -o", output.display())).into())
        }
        _ => Ok(()),
    }
}

/// What lines on a terminal depend on besides the event.
#[derive(Default)]
struct Shown {
    recent: Recent,
    refused: Refused,
}

/// Bits per unit over the last steps, for people: single batches jump.
#[derive(Default)]
struct Recent(Option<(Part, f64)>);

impl Recent {
    fn add(&mut self, part: Part, bits: f64) -> f64 {
        let mean = match self.0 {
            Some((same, mean)) if same == part && bits.is_finite() => mean + 0.1 * (bits - mean),
            Some((same, mean)) if same == part => mean,
            _ => bits,
        };
        self.0 = Some((part, mean));
        mean
    }
}

fn tell(event: &TrainEvent, talk: &Talk, bar: &ProgressBar, shown: &mut Shown) {
    let line = |text: String| bar.suspend(|| talk.note(&text));
    match event {
        TrainEvent::Skipped { why, .. } => bar.suspend(|| shown.refused.tell(why, talk)),
        TrainEvent::Reading { done, total } => {
            bar.set_position((1000 * done / (*total).max(1)) as u64);
            bar.set_message(format!("reading file {done} of {total}"));
        }
        TrainEvent::Doing { what } if bar.is_hidden() => talk.detail(what),
        TrainEvent::Doing { what } => bar.set_message(*what),
        TrainEvent::Data { train_files, train_hours, validation_files, validation_hours, sound } => {
            bar.suspend(|| shown.refused.summarise(talk));
            line(format!(
                "{train_files} files, {train_hours:.2} h to train on; {validation_files} files, {validation_hours:.2} h held out"
            ));
            line(sound.to_string());
            sound.warnings.iter().for_each(|warning| bar.suspend(|| talk.warn(warning)));
        }
        TrainEvent::Refined(Refined { decoded_db, refined_db }) => line(format!(
            "plan frames, held out: {decoded_db:.2} dB rms through the codebooks, {refined_db:.2} dB refined"
        )),
        TrainEvent::Codebooks { error_db } => line(format!("plan codebooks: {error_db:.2} dB rms")),
        TrainEvent::Resumed { part, step, finished, .. } => {
            let state = if *finished { "is finished" } else { "goes on" };
            line(format!("{} {state} at step {step}", names(*part).0));
        }
        TrainEvent::Step { part, step, done, bits, skipped, hours, units_per_s, elapsed_s, .. } => {
            let mean = shown.recent.add(*part, *bits);
            bar.set_position((1000.0 * done) as u64);
            let (name, unit) = names(*part);
            if *skipped {
                bar.suspend(|| talk.warn(&format!("{name} step {step}: {bits} bits/{unit}, step skipped")));
            }
            let left = Duration::from_secs_f64((elapsed_s / done.max(1e-6) * (1.0 - done)).clamp(0.0, 1e9));
            let text = format!(
                "{name} step {step}: {mean:.3} bits/{unit}, {units_per_s:.0} {unit}s/s, {hours:.2} h heard, {elapsed_s:.0} s, \
                 {} left",
                indicatif::HumanDuration(left)
            );
            if bar.is_hidden() {
                talk.detail(&text);
            } else {
                bar.set_message(text);
            }
        }
        TrainEvent::Validation { part, step, bits, raw_bits, best } => {
            let (name, unit) = names(*part);
            let best = if *best { ", best so far" } else { "" };
            line(format!("{name} step {step}: {bits:.3} bits/{unit} held out ({raw_bits:.3} without averaging){best}"));
        }
        TrainEvent::FreeRun { part, step, adherence_db, bias_db } => line(format!(
            "{} step {step}: plays {adherence_db:.2} dB from the recording's plan, bias {bias_db:+.2} dB",
            names(*part).0
        )),
        TrainEvent::NotSaved { why } => bar.suspend(|| talk.warn(&format!("{why}; training goes on"))),
        TrainEvent::Calibration(tried) => line(tried.to_string()),
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
        TrainEvent::Validation { part, bits, best: true, .. } => report.judged(*part, Some(*bits)),
        TrainEvent::Resumed { part, best_bits, .. } => report.judged(*part, *best_bits),
        TrainEvent::FreeRun { adherence_db, .. } => report.adherence_db = Some(*adherence_db),
        _ => {}
    }
}
