//! `wavegen adapt`: turns a model and recordings into a model that knows them.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use wavegen::audio::AudioSource;
use wavegen::checkpoint::Checkpoint;
use wavegen::train::Part;
use wavegen::train::adapt::{AdaptEvent, AdaptSettings, Adaptation, Adapted, Verdict, adapt};
use wavegen::train::schedule::Budget;

use super::Outcome;
use super::common::{Talk, catch_interrupt, check_output, interrupted, seconds, start_threads};
use super::train::Store;

/// The note of a checkpoint that names the recordings that it was fitted to.
pub const ADAPTED_TO: &str = "adapted-to";

/// Fit a model to recordings in seconds to minutes: a few small steps on their heads, judged by their tails
///
/// The last fifth of each recording (at least 1 s) trains nothing; the weights that find it likeliest are kept. Where it does
/// not become likelier, or where the adapted model plays it worse, the model's own weights are kept, part by part, and the
/// command says so. Ctrl-C ends the steps early with a whole model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen adapt song.wav -o mine.safetensors                        a minute of steps on the built-in model
  wavegen adapt a.flac b.mp3 -o mine.safetensors --seconds-budget 300
  wavegen adapt song.wav -o mine.safetensors --model my.safetensors --steps 40
  wavegen continue song.wav --model mine.safetensors")]
pub struct Args {
    /// Recordings of at least 4 s; - for standard input
    #[arg(required = true, value_name = "FILE")]
    inputs: Vec<PathBuf>,
    /// Where the adapted model goes
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Overwrite an existing model
    #[arg(long)]
    force: bool,
    /// The model to begin with; `built-in` for the one inside the program
    #[arg(long, short, value_name = "FILE", default_value = "built-in")]
    model: PathBuf,
    /// Seconds of steps, judgements included. How many steps that is depends on the machine and is reported. The settings of
    /// --no-calibration take about a minute more
    #[arg(long, value_name = "S", default_value = "60", value_parser = seconds)]
    seconds_budget: f64,
    /// Instead of a time: at most this many steps of each transformer, which give the same model whatever the threads
    #[arg(long, value_name = "N", conflicts_with = "seconds_budget", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Leave the generation settings as they are; else they are fitted in free run where the wave transformer was adapted
    #[arg(long)]
    no_calibration: bool,
    /// The same seed draws the same excerpts in the same order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Worker threads [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// How the model's matrices are stored
    #[arg(long, value_enum, default_value = "f32")]
    store: Store,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Serialize)]
struct Report {
    output: String,
    #[serde(flatten)]
    adaptation: Adaptation,
    elapsed_s: f64,
    interrupted: bool,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let (talk, begun) = (&args.talk, Instant::now());
    let threads = start_threads(args.threads)?;
    let checkpoint = Checkpoint::named(&args.model)?;
    check_output(&args.output, args.force)?;
    let sounds = args.inputs.iter().map(|path| AudioSource::open(path)).collect::<Result<Vec<_>, _>>()?;
    let budget = match args.steps {
        Some(steps) => Budget::Steps(steps as usize),
        None => Budget::Time(Duration::from_secs_f64(args.seconds_budget)),
    };
    let settings =
        AdaptSettings { seed: args.seed, calibrate: !args.no_calibration, ..AdaptSettings::new(budget, threads) };
    catch_interrupt();
    let (adapted, adaptation) = fit(&checkpoint, &sounds, &settings, talk)?;
    adapted.save(&args.output, args.store.into())?;
    let output = args.output.display().to_string();
    let how = if interrupted() { " (interrupted early, whole)" } else { "" };
    talk.note(&format!("{output}: model written{how}; try it: wavegen continue SONG --model {output}"));
    let elapsed_s = begun.elapsed().as_secs_f64();
    talk.json(&Report { output, adaptation, elapsed_s, interrupted: interrupted() }, false)?;
    Ok(if interrupted() { Outcome::Interrupted } else { Outcome::Done })
}

/// What `--adapt` does before a recording is played on; `None` where it was interrupted.
pub fn fitted(checkpoint: &Checkpoint, source: &AudioSource, adapt_s: f64, talk: &Talk) -> Result<Option<Checkpoint>> {
    catch_interrupt();
    let settings = AdaptSettings::new(Budget::Time(Duration::from_secs_f64(adapt_s)), rayon::current_num_threads());
    let (mut adapted, _) = fit(checkpoint, std::slice::from_ref(source), &settings, talk)?;
    // Even where nothing was gained: there is no more to be had.
    adapted.notes.entry(ADAPTED_TO.into()).or_insert_with(|| source.name().to_owned());
    Ok((!interrupted()).then_some(adapted))
}

/// Adapts a model, shows how it goes, and tells what became of it.
fn fit(
    checkpoint: &Checkpoint,
    sounds: &[AudioSource],
    settings: &AdaptSettings,
    talk: &Talk,
) -> Result<(Checkpoint, Adaptation)> {
    let bar = talk.bar(0, "{spinner} {msg}");
    let (mut first, mut last) = (0.0, 0.0);
    let adapted = adapt(checkpoint, sounds, settings, &mut |event| {
        let text = match event {
            AdaptEvent::Judged { part, step, bits } => {
                first = if step == 0 { bits } else { first };
                last = bits;
                format!("{}: {bits:.3} bits/{} on the tail at step {step}", part.name(), unit(part))
            }
            AdaptEvent::Step { part, step, .. } => {
                format!("{} step {step}: {last:.3} bits/{} on the tail, {first:.3} before", part.name(), unit(part))
            }
            AdaptEvent::Calibration(tried) => tried.to_string(),
        };
        match event {
            AdaptEvent::Judged { .. } | AdaptEvent::Calibration(_) => bar.suspend(|| talk.detail(&text)),
            AdaptEvent::Step { .. } => bar.set_message(text),
        }
        bar.tick();
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let (mut adapted, adaptation) = adapted?;
    let used = |part: &Adapted| part.verdict == Verdict::Adapted;
    if used(&adaptation.plan) || used(&adaptation.wave) {
        let name = |sound: &AudioSource| {
            Path::new(sound.name()).file_name().map_or(sound.name().into(), |name| name.to_string_lossy().into_owned())
        };
        let names = sounds.iter().map(name).collect::<Vec<_>>().join(", ");
        adapted.notes.insert(ADAPTED_TO.into(), names);
    }
    talk.note(&format!("{:.1} s to learn from, {:.1} s to judge by", adaptation.head_s, adaptation.tail_s));
    talk.note(&describe(Part::Plan, &adaptation.plan, &adaptation));
    talk.note(&describe(Part::Wave, &adaptation.wave, &adaptation));
    Ok((adapted, adaptation))
}

fn unit(part: Part) -> &'static str {
    match part {
        Part::Plan => "frame",
        Part::Wave => "sample",
    }
}

/// What became of a part, for people.
fn describe(part: Part, adapted: &Adapted, adaptation: &Adaptation) -> String {
    let Adapted { steps, before_bits, best_bits, verdict } = adapted;
    let (name, unit) = (part.name(), unit(part));
    let free_run = adaptation.free_run.filter(|_| part == Part::Wave);
    let played = free_run.map_or(String::new(), |run| {
        format!("; plays {:.2} dB from the tail's plan, {:.2} before", run.after_db, run.before_db)
    });
    let bits =
        format!("{name}: {best_bits:.3} bits/{unit} on the tail, {before_bits:.3} before ({steps} steps){played}");
    match verdict {
        Verdict::Adapted => bits,
        Verdict::NoGain => format!(
            "{name}: {before_bits:.3} bits/{unit} on the tail, no gain in {steps} steps: the model's own {name} transformer is kept"
        ),
        Verdict::PlaysWorse => format!("{bits}: the model's own {name} transformer is kept"),
    }
}
