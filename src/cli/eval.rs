//! `wavegen eval`: turns recordings into the figures that a model is judged by, beside those of no model at all.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use wavegen::audio::level;
use wavegen::checkpoint::Checkpoint;
use wavegen::codec::Token;
use wavegen::generate::Options;

use super::common::{ModelArgs, SamplingArgs, Talk, Usage, catch_interrupt, print, read_mono, seconds};
use super::engine::EngineArgs;
use super::free_run::{FreeRun, PlanFrom, Setup};
use super::score::{Scored, score_all};
use super::{Outcome, free_run};

/// Judge a model by recordings: bits per sample, baselines, and what it plays by itself
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen eval held-out.flac                               bits per sample: wave + plan / hop = total
  wavegen eval held-out/*.wav --baselines --max-seconds 60
  wavegen eval held-out.flac --free-run --plan true        play 10 s after each of 20 prompts and analyse it
  wavegen eval held-out.flac --free-run --spectrograms pictures/
  wavegen eval held-out.flac --free-run --prompts 4 --json > free-run.json")]
pub struct Args {
    /// Recordings in any audio format; - for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Use only this much of each file, from its beginning
    #[arg(long, value_name = "S", value_parser = seconds)]
    max_seconds: Option<f64>,
    /// Beside the model: order-0 tokens, order-0 residual of the backward prediction, both forecasts under a fixed mixture
    #[arg(long)]
    baselines: bool,
    /// Play after prompts from the files, analyse the result, and compare with noise through the plan and with the truth;
    /// bits per sample only with --baselines
    #[arg(long)]
    free_run: bool,
    /// Where the plan comes from in --free-run
    #[arg(long, value_enum, default_value_t = PlanFrom::Own, requires = "free_run")]
    plan: PlanFrom,
    /// Prompts, spread evenly over the files, in --free-run
    #[arg(long, default_value_t = 20, requires = "free_run", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    prompts: u32,
    /// Length of a prompt in --free-run
    #[arg(long, value_name = "S", default_value = "4", requires = "free_run", value_parser = seconds)]
    prompt_seconds: f64,
    /// How long to play after each prompt in --free-run
    #[arg(long, value_name = "S", default_value = "10", requires = "free_run", value_parser = seconds)]
    seconds: f64,
    /// Keep what --free-run plays: one WAV per prompt in this directory
    #[arg(long, value_name = "DIR", requires = "free_run")]
    keep: Option<PathBuf>,
    /// Draw recording, model and noise through the plan after each prompt of --free-run: one PNG per prompt in this directory
    #[arg(long, value_name = "DIR", requires = "free_run")]
    spectrograms: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    talk: Talk,
}

/// A file as the model knows it.
pub struct Piece {
    pub name: String,
    /// Whole plan frames, at the model's rate and level.
    pub tokens: Vec<Token>,
}

#[derive(Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<Scored>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<Scored>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_run: Option<FreeRun>,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let talk = &args.talk;
    if !args.free_run && args.sampling.is_given() {
        return Err(Usage("sampling options say how --free-run plays; give that too, or leave them out".into()).into());
    }
    let checkpoint = args.model.load()?;
    let spectrum = checkpoint.spectrum()?;
    let pieces = args
        .files
        .iter()
        .map(|path| read_piece(path, &checkpoint, args.max_seconds, talk))
        .collect::<Result<Vec<_>>>()?;
    let engine = args.engine.load(&checkpoint, talk)?;
    catch_interrupt();
    let mut report = Report { files: Vec::new(), total: None, free_run: None };
    // What cannot be played is told before hours of scores.
    let free_run = if args.free_run { Some(args.setup(&checkpoint, &pieces)?) } else { None };
    let mut is_whole = true;
    if !args.free_run || args.baselines {
        report.files = score_all(&checkpoint, &engine, &spectrum, &pieces, args.baselines, talk)?;
        is_whole = report.files.len() == pieces.len();
        if !report.files.is_empty() {
            let total = Scored::total(&report.files);
            if !talk.json {
                print_scores(&report.files, &total)?;
            }
            report.total = Some(total);
        }
    }
    if let (Some(setup), true) = (free_run, is_whole) {
        report.free_run = free_run::play_all(&checkpoint, &engine, &spectrum, &setup, talk)?;
        let n_done = report.free_run.as_ref().map_or(0, |result| result.continuations.len());
        is_whole = n_done == setup.places.len();
        if let (Some(result), false) = (&report.free_run, talk.json) {
            result.print()?;
        }
    }
    if report.total.is_some() || report.free_run.is_some() {
        talk.json(&report, false)?;
    }
    Ok(if is_whole { Outcome::Done } else { Outcome::Interrupted })
}

impl Args {
    /// How and where to play, in folders that are there.
    fn setup<'a>(&'a self, checkpoint: &Checkpoint, pieces: &'a [Piece]) -> Result<Setup<'a>> {
        let hop = checkpoint.config.plan.hop;
        let rate = f64::from(checkpoint.config.codec.sample_rate);
        let frames = |seconds: f64| ((seconds * rate / hop as f64).round() as usize).max(1);
        let (prompt_frames, frames) = (frames(self.prompt_seconds), frames(self.seconds));
        let mut wave = checkpoint.generation;
        if !self.plan.is_through_codebooks() {
            // The level makes up for what the codebooks do.
            wave.level_db = 0.0;
        }
        let setup = Setup {
            plan: self.plan,
            places: free_run::places(pieces, hop, self.prompts as usize, prompt_frames, frames)?,
            prompt_frames,
            frames,
            options: self.sampling.options(Options { wave, ..Options::default() }),
            governed: self.sampling.governor.is_on(),
            keep: self.keep.as_deref(),
            spectrograms: self.spectrograms.as_deref(),
        };
        setup.make_folders()?;
        Ok(setup)
    }
}

fn read_piece(path: &Path, checkpoint: &Checkpoint, max_s: Option<f64>, talk: &Talk) -> Result<Piece> {
    let codec = &checkpoint.config.codec;
    let hop = checkpoint.config.plan.hop;
    let mut samples = read_mono(path, codec.sample_rate, max_s, talk)?;
    samples.truncate(samples.len() / hop * hop);
    if samples.len() < 2 * hop {
        let least = 2.0 * hop as f64 / f64::from(codec.sample_rate);
        bail!("{}: shorter than {least:.3} s, the least that can be judged", path.display());
    }
    let gain =
        level::gain(&samples).with_context(|| format!("{}: silent, there is nothing to judge", path.display()))?;
    let tokens = samples.iter().map(|x| codec.encode(x * gain)).collect();
    Ok(Piece { name: path.display().to_string(), tokens })
}

fn print_scores(files: &[Scored], total: &Scored) -> Result<()> {
    let width = files.iter().map(|f| f.name.chars().count()).max().unwrap_or(0).max(12);
    print(&format!("{:width$} {:>8} {:>7} {:>7} {:>7}   bits per sample", "file", "seconds", "wave", "plan", "total"))?;
    let all = if files.len() > 1 { Some(total) } else { None };
    for file in files.iter().chain(all) {
        print(&format!(
            "{:width$} {:>8.1} {:>7.3} {:>7.3} {:>7.3}",
            file.name, file.seconds, file.wave_bits, file.plan_bits, file.total_bits
        ))?;
    }
    print(&format!("plan: {:.2} bits per frame", total.plan_bits_per_frame))?;
    if let Some(baselines) = &total.baselines {
        print("")?;
        print(&format!("{:42} {:>7} {:>7} {:>7}   bits per sample", "without a model", "wave", "plan", "total"))?;
        let rows = [
            ("order-0 tokens", baselines.token_bits, 0.0),
            ("order-0 residual of the backward prediction", baselines.residual_bits, 0.0),
            ("both forecasts, best fixed mixture (*)", baselines.mixture_bits, total.plan_bits),
        ];
        for (name, wave, plan) in rows {
            print(&format!("{name:42} {wave:>7.3} {plan:>7.3} {:>7.3}", wave + plan))?;
        }
        print("Each is fitted to the very file it is measured on. (*) with the model's plan, and what that costs.")?;
    }
    Ok(())
}
