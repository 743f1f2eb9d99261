//! Turns the arguments that several commands share into models, settings, progress bars and messages.

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use crossterm::terminal::disable_raw_mode;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use wavegen::atomic::{Part, remove_parts};
use wavegen::audio::{AudioError, AudioSource, Decoder, StreamResampler};
use wavegen::checkpoint::Checkpoint;
use wavegen::generate::{Options, Progress};
use wavegen::model::config::GenerationSettings;
use wavegen::sampler::PlanSampling;

/// The user asked for something that cannot be: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Most seconds that one command plays.
const MOST_SECONDS: f64 = 24.0 * 3600.0;

/// Parses seconds, or M:SS: more than 0, at most a day.
pub fn seconds(text: &str) -> Result<f64, String> {
    match clock(text).ok_or_else(|| format!("'{text}' is no number of seconds, nor M:SS such as 1:30"))? {
        value if value > 0.0 && value <= MOST_SECONDS => Ok(value),
        _ => Err(format!("must be more than 0 and at most {MOST_SECONDS} seconds (a day)")),
    }
}

/// Seconds, minutes and seconds, or hours too: `90`, `1:30`, `0:01:30.5`.
fn clock(text: &str) -> Option<f64> {
    let parts: Vec<&str> = text.split(':').collect();
    let value = |part: &str| part.parse::<f64>().ok().filter(|value| parts.len() == 1 || *value >= 0.0);
    let whole = parts.iter().rev().skip(1).all(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    let under_60 = parts.iter().skip(1).all(|part| value(part).is_some_and(|value| value < 60.0));
    let total = parts.iter().try_fold(0.0, |total, part| Some(60.0 * total + value(part)?));
    total.filter(|total| parts.len() <= 3 && whole && under_60 && !total.is_nan())
}

/// A moment of a recording, likewise.
pub fn moment(text: &str) -> Result<f64, String> {
    seconds(text).map_err(|_| {
        format!("'{text}' is no moment of a recording: give seconds or M:SS, more than 0, such as 90 or 1:30")
    })
}

pub fn number_in(text: &str, range: std::ops::RangeInclusive<f32>) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    if range.contains(&value) { Ok(value) } else { Err(format!("must lie in {} to {}", range.start(), range.end())) }
}

fn share(text: &str) -> Result<f32, String> {
    number_in(text, 0.0..=1.0)
}

fn level(text: &str) -> Result<f32, String> {
    number_in(text, -24.0..=24.0)
}

fn factor(text: &str) -> Result<f32, String> {
    number_in(text, 0.0..=10.0)
}

/// The model that plays where nobody says which.
pub const BUILT_IN: &str = Checkpoint::INSIDE[0];

#[derive(Args)]
pub struct ModelArgs {
    /// Model file (.safetensors); inside the program are `built-in` and `small` (for slow machines)
    #[arg(long, short, value_name = "FILE", default_value = BUILT_IN)]
    pub model: PathBuf,
}

impl ModelArgs {
    pub fn load(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::named(&self.model)?)
    }
}

#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    #[arg(long, help = format!("The same seed gives the same bytes [default: {}]", Options::default().seed))]
    pub seed: Option<u64>,
    #[arg(long, value_parser = factor, help = plan_help(
        "What is played: below 1 safer, above 1 bolder, 0 always the likeliest", |plan| plan.temperature))]
    pub temperature: Option<f32>,
    #[arg(long, value_name = "K", help = plan_help(
        "What is played: only the K likeliest choices; 0 for all", |plan| plan.top_k))]
    pub top_k: Option<usize>,
    #[arg(long, value_parser = share, help = plan_help(
        "What is played: only the likeliest choices that hold this probability", |plan| plan.top_p))]
    pub top_p: Option<f32>,
    #[arg(long, value_parser = share, help = plan_help(
        "What is played: no choice less likely than this share of the likeliest", |plan| plan.min_p))]
    pub min_p: Option<f32>,
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), help = format!(
        "What is played: every quarter of a second, the one of so many ways on that is most like the prompt; 1 for the first [default: {}]",
        Options::default().choices))]
    pub choices: Option<u32>,
    /// How it sounds: breath and noise, 0 for none, 1 as in the recordings [default: the model's]
    #[arg(long, value_parser = factor)]
    pub grain: Option<f32>,
    /// How it sounds: weight of the prediction from its own past, 0 to 1 [default: the model's]
    #[arg(long, value_parser = share)]
    pub past: Option<f32>,
    /// How it sounds: weight of the learned correction, 0 to 1 [default: the model's]
    #[arg(long, value_parser = share)]
    pub offset: Option<f32>,
    /// How it sounds: dB added to the planned level [default: the model's; 0 with plans that did not go through codebooks]
    #[arg(long, value_name = "DB", allow_negative_numbers = true, value_parser = level)]
    pub level: Option<f32>,
    /// Whether a governor watches silence, noise, stuck tones and level; a resumed session keeps its own
    #[arg(long, value_enum, default_value = "on")]
    pub governor: Switch,
}

/// Whether something watches over what is played.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// Go back and play otherwise where the music dies, bursts, sticks or drifts
    #[default]
    On,
    /// Play whatever comes
    Off,
}

impl Switch {
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// A line of help with the default of a plan setting, which stands only where no session has its own.
fn plan_help<T: std::fmt::Display>(text: &str, default: impl Fn(&PlanSampling) -> T) -> String {
    format!("{text} [default: {}]", default(&PlanSampling::default()))
}

impl SamplingArgs {
    /// Whether anything but the defaults was asked for.
    pub fn is_given(&self) -> bool {
        self.options(Options::default()) != Options::default() || !self.governor.is_on()
    }

    /// `own`: what stands where nothing else is asked for.
    pub fn options(&self, own: Options) -> Options {
        Options {
            seed: self.seed.unwrap_or(own.seed),
            stream: own.stream,
            choices: self.choices.unwrap_or(own.choices),
            plan: PlanSampling {
                temperature: self.temperature.unwrap_or(own.plan.temperature),
                top_k: self.top_k.unwrap_or(own.plan.top_k),
                top_p: self.top_p.unwrap_or(own.plan.top_p),
                min_p: self.min_p.unwrap_or(own.plan.min_p),
            },
            wave: GenerationSettings {
                grain: self.grain.unwrap_or(own.wave.grain),
                past: self.past.unwrap_or(own.wave.past),
                offset: self.offset.unwrap_or(own.wave.offset),
                level_db: self.level.unwrap_or(own.wave.level_db),
            },
        }
    }
}

#[derive(Args)]
#[command(next_help_heading = "Messages")]
pub struct Talk {
    /// Print the result as JSON on stdout (on stderr when stdout carries audio)
    #[arg(long)]
    pub json: bool,
    /// Only errors
    #[arg(long, short, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More about what happens
    #[arg(long, short)]
    pub verbose: bool,
}

impl Talk {
    /// A line for people on stderr.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }

    /// A line for people who asked for more.
    pub fn detail(&self, text: &str) {
        if self.verbose {
            say(text);
        }
    }

    pub fn warn(&self, text: &str) {
        self.note(&format!("warning: {text}"));
    }

    /// A result for machines.
    pub fn json(&self, value: &impl Serialize, stdout_is_audio: bool) -> Result<()> {
        if self.json {
            let text = serde_json::to_string_pretty(value)?;
            if stdout_is_audio { say(&text) } else { print(&text)? }
        }
        Ok(())
    }

    /// A bar on stderr if people look at it.
    pub fn bar(&self, total: u64, template: &str) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        if !self.quiet && io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar
    }

    /// Follows playing: seconds, x real time, time left.
    pub fn play_bar(&self) -> PlayBar {
        PlayBar { bar: self.bar(1000, "{bar:40} {msg}"), start: Instant::now() }
    }
}

/// Files that are left out: the first ones by name, the others by number.
#[derive(Default)]
pub struct Refused(usize);

impl Refused {
    const SHOWN: usize = 20;

    pub fn tell(&mut self, why: &str, talk: &Talk) {
        self.0 += 1;
        if self.0 <= Self::SHOWN || talk.verbose {
            talk.warn(&format!("left out: {why}"));
        }
    }

    pub fn summarise(&self, talk: &Talk) {
        if self.0 > Self::SHOWN && !talk.verbose {
            talk.warn(&format!("left out: {} more; --verbose names them all", self.0 - Self::SHOWN));
        }
    }
}

/// The progress of playing.
pub struct PlayBar {
    bar: ProgressBar,
    start: Instant,
}

impl PlayBar {
    /// Shows where playing is; breaks when it has been interrupted.
    pub fn update(&self, progress: Progress) -> ControlFlow<()> {
        let elapsed = self.start.elapsed().as_secs_f64();
        let speed = progress.done_s / elapsed.max(1e-9);
        self.bar.set_position((1000.0 * progress.done_s / progress.total_s.max(1e-9)) as u64);
        let left = if speed > 0.0 {
            Duration::from_secs_f64((progress.total_s - progress.done_s) / speed)
        } else {
            Duration::ZERO
        };
        let left = indicatif::HumanDuration(left);
        self.bar.set_message(format!(
            "{:.1} of {:.1} s, {speed:.2} x real time, {left} left",
            progress.done_s, progress.total_s
        ));
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Starts as many threads as asked for, else one per core; gives their number. To be called before anything runs in parallel.
pub fn start_threads(asked: Option<u16>) -> Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = asked.map_or(cores, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("starting threads")?;
    Ok(threads)
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C is to finish what exists.
static CAUGHT: AtomicBool = AtomicBool::new(false);

/// Ctrl-C is heeded from now on.
pub fn heed_interrupt() -> Result<()> {
    ctrlc::set_handler(interrupt).context("catching Ctrl-C")
}

/// What Ctrl-C does: it ends the program without leaving temporary files behind; once [`catch_interrupt`] was called, only the second one
/// does.
pub fn interrupt() {
    if INTERRUPTED.swap(true, Ordering::SeqCst) || !CAUGHT.load(Ordering::SeqCst) {
        // A terminal that gave keys is given back; one that is gone needs nothing.
        let _ = disable_raw_mode();
        say("interrupted");
        remove_parts();
        std::process::exit(130);
    }
}

/// From now on Ctrl-C asks to finish what exists; a second one ends the program at once.
pub fn catch_interrupt() {
    CAUGHT.store(true, Ordering::SeqCst);
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Writes a line to stderr; whether anyone reads it does not matter.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes a line to stdout.
pub fn print(text: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{text}")
}

/// Whether a path means standard input or output.
pub fn is_pipe(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Whether what is written there comes where this program's own words do.
pub fn is_stdout(path: &Path) -> bool {
    is_pipe(path) || ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

/// Where output goes that was not given a place: beside the input as `name.suffix`, or to stdout when it came from stdin.
///
/// Refuses to pour audio into a terminal.
pub fn output_path(given: Option<&Path>, input: &Path, suffix: &str) -> Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_owned(),
        None if is_pipe(input) => PathBuf::from("-"),
        None => input.with_extension(suffix),
    };
    if is_stdout(&path) && io::stdout().is_terminal() {
        return Err(Usage("standard output is a terminal; give a file with -o, or redirect it".into()).into());
    }
    Ok(path)
}

/// An error with its causes, in one line, without saying anything twice.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().replace('\n', " ");
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

/// Whether the reader of our output has gone.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Finds out before anything is computed whether its result can be kept in `path`.
pub fn check_output(path: &Path, force: bool) -> Result<()> {
    let name = path.as_os_str().to_string_lossy();
    if path.is_dir() || name.ends_with(std::path::is_separator) {
        return Err(Usage(format!("{name}: is the name of a folder; give that of a file")).into());
    }
    if path.exists() && !force {
        bail!("{name}: already exists; use --force to overwrite it, or give another name");
    }
    match Part::beside(path) {
        Ok(_) => Ok(()),
        Err(reason) => Err(AudioError::Unwritable { path: name.into_owned(), reason: reason.to_string() }.into()),
    }
}

/// A file's first `max_s` seconds in mono at `sample_rate`, in blocks: memory grows with what is kept only.
pub fn read_mono(path: &Path, sample_rate: u32, max_s: Option<f64>, talk: &Talk) -> Result<Vec<f32>> {
    let source = AudioSource::open(path)?;
    let mut decoder = Decoder::from_source(&source)?;
    let channels = decoder.spec().channels;
    let mut resampler = StreamResampler::new(decoder.spec().sample_rate, sample_rate)?;
    let most = max_s.map_or(usize::MAX, |s| (s * f64::from(sample_rate)).ceil() as usize);
    let mut mono = Vec::new();
    while mono.len() < most
        && let Some(block) = decoder.next_block()?
    {
        let downmix: Vec<f32> =
            block.chunks_exact(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32).collect();
        resampler.push(&downmix, &mut mono)?;
    }
    resampler.finish(&mut mono)?;
    mono.truncate(most);
    report_damage(source.name(), decoder.damaged_packets(), decoder.warnings(), talk);
    Ok(mono)
}

/// Tells what a decoder stumbled over.
pub fn report_damage(name: &str, damaged_packets: u64, warnings: &[String], talk: &Talk) {
    if damaged_packets > 0 {
        talk.warn(&format!("{name}: {damaged_packets} damaged packets were skipped"));
    }
    for warning in warnings {
        talk.warn(&format!("{name}: {warning}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_positive_and_at_most_a_day() {
        for bad in ["0", "-1", "nan", "inf", "1e9", "ten", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        assert_eq!(seconds("0.5"), Ok(0.5));
        assert_eq!(seconds("86400"), Ok(86_400.0));
    }

    #[test]
    fn moments_are_seconds_or_minutes_and_seconds() {
        for (text, seconds) in [("90", 90.0), ("1:30", 90.0), ("0:01:30.5", 90.5), ("90.25", 90.25), ("75:00", 4500.0)]
        {
            assert_eq!(moment(text), Ok(seconds), "{text}");
        }
        for bad in
            ["0", "-1", "1:60", "1:-3", "1.5:00", "1::2", "1:2:3:4", ":30", "nan", "1:nan", "inf", "99:00:00", "x", ""]
        {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_become_one_line_without_repetition() {
        let error = anyhow::anyhow!("a cause\nin two lines").context("what happened");
        assert_eq!(one_line(&error), "what happened: a cause in two lines");
        let twice = anyhow::anyhow!("inner").context("outer: inner");
        assert_eq!(one_line(&twice), "outer: inner");
    }

    #[test]
    fn output_goes_beside_the_input() {
        let path = output_path(None, Path::new("a/b.flac"), "continued.wav").unwrap();
        assert_eq!(path, Path::new("a/b.continued.wav"));
    }
}
