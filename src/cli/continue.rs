//! `wavegen continue`: turns a recording into the same recording with more of it.

use std::path::PathBuf;

use anyhow::{Result, bail};
use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, Decoder, SampleFormat, WavFormat, WavPrompt};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::generate::{CONTEXT_S, Prompt, play_on};
use wavegen::sink;

use super::Outcome;
use super::common::{
    ModelArgs, PlayReport, SamplingArgs, Talk, Usage, catch_interrupt, output_path, report_damage, seconds,
};

/// Play a recording on: writes a WAV of the recording and what comes next
///
/// The recording's part of the output keeps its rate, channels and samples; of a WAV it keeps every byte.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen continue song.wav                          writes song.continued.wav with 10 more seconds
  wavegen continue song.mp3 --seconds 30 -o long.wav
  wavegen continue song.wav --seed 7 --temperature 0.8 --force
  cat song.flac | wavegen continue - | aplay         from pipe to pipe")]
pub struct Args {
    /// Recording in any audio format; - for standard input
    #[arg(value_name = "FILE")]
    input: PathBuf,
    /// How long to play on
    #[arg(long, short, default_value = "10", value_parser = seconds)]
    seconds: f64,
    /// Where the WAV goes, - for standard output [default: FILE.continued.wav beside the input]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite an existing output
    #[arg(long)]
    force: bool,
    /// Sample format for a compressed recording: u8, i16, i24, i32, f32 or f64 [default: its own, or i16]
    #[arg(long)]
    format: Option<SampleFormat>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    talk: Talk,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let talk = &args.talk;
    let output = output_path(args.output.as_deref(), &args.input, "continued.wav")?;
    let mut sink = sink::open(&output, args.force)?;
    let source = AudioSource::open(&args.input)?;
    let checkpoint = args.model.load()?;
    let wav = WavPrompt::open(&source)?;
    if let (Some(wav), Some(format)) = (&wav, args.format)
        && wav.format.sample_format != format
    {
        let own = wav.format.sample_format;
        return Err(Usage(format!("{}: a WAV keeps its own format, {own}; leave --format out", source.name())).into());
    }
    let tail = decode_tail(&source, CONTEXT_S)?;
    report_damage(source.name(), tail.damaged_packets, &tail.warnings, talk);
    let prompt = Prompt::new(&tail, &checkpoint.config.codec)?;
    if prompt.is_silent() {
        bail!(
            "{}: the last {:.1} s are silent, so there is nothing to play on; cut the silence off, or start from nothing \
             with `wavegen generate`",
            source.name(),
            tail.clip.duration_s()
        );
    }
    talk.detail(&format!(
        "context: {:.2} s at {:+.1} dB, {} Hz, {} channels",
        prompt.tokens().len() as f64 / f64::from(checkpoint.config.codec.sample_rate),
        20.0 * prompt.gain().log10(),
        prompt.sample_rate(),
        prompt.channels()
    ));
    let format = match &wav {
        Some(wav) => wav.format.clone(),
        None => {
            let own = tail.spec.sample_format.unwrap_or(SampleFormat::I16);
            WavFormat::new(prompt.sample_rate(), prompt.channels(), args.format.unwrap_or(own))
        }
    };
    let mut engine = ReferenceEngine::new(&checkpoint)?;
    let options = args.sampling.options(checkpoint.generation);
    catch_interrupt()?;
    sink.start(&format)?;
    match &wav {
        Some(wav) => sink.copy_prompt(wav)?,
        None => sink.copy_decoded(&mut Decoder::from_source(&source)?)?,
    }
    let bar = talk.play_bar();
    let played = play_on(&mut engine, &prompt, args.seconds, &options, sink.as_mut(), &mut |p| bar.update(p))?;
    sink.finish()?;
    let shape = (prompt.sample_rate(), prompt.channels());
    PlayReport::new(&output, shape, tail.total_frames, &played, bar.finish(), options.seed).tell(talk)?;
    Ok(if played.interrupted { Outcome::Interrupted } else { Outcome::Done })
}
