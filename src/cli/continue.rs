//! `wavegen continue`: turns a recording into the same recording with more of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, Clip, SampleFormat, WavFormat, WavPrompt};
use wavegen::checkpoint::Checkpoint;
use wavegen::generate::{CONTEXT_S, Prompt, Recording, Session};
use wavegen::metrics::level_db;

use super::Outcome;
use super::adapt::fitted;
use super::common::{Usage, moment, output_path, report_damage, seconds};
use super::play::{Before, PlayArgs, Start};

/// Seconds at the end of a recording that tell whether it has faded out, and by how much they are softer then than what it ends with, dB.
const END_S: f64 = 2.0;
const FADED_DB: f32 = 25.0;

/// Play a recording on: writes a WAV of the recording and what comes next
///
/// The recording's part of the output keeps its rate, channels and samples (all bits of a WAV's, 24 of others'); tags and
/// markers are left out. A session that --save-session wrote is played on with --resume, bit for bit as if there had been no
/// pause: alone it gives only what is new; beside the WAV that was written up to there, that WAV with what is new.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen continue song.wav                          writes song.continued.wav with 10 more seconds
  wavegen continue song.mp3 --seconds 30 -o long.wav
  wavegen continue song.wav --seed 7 --temperature 0.8 --force
  wavegen continue song.mp3 --from 1:30              the first minute and a half, and then another way
  wavegen continue song.wav --takes 4                four ways to go on: song.continued.1.wav and so on
  wavegen continue song.wav -o a.wav --save-session s.bin
  wavegen continue a.wav --resume s.bin -o b.wav     10 s more, as if a.wav had been 10 s longer
  wavegen continue --resume s.bin -o rest.wav        only these 10 s
  wavegen continue song.wav --adapt 30               fit the model to the song for 30 s first
  cat song.flac | wavegen continue - | aplay         from pipe to pipe")]
pub struct Args {
    /// Recording in any audio format; - for standard input
    #[arg(value_name = "FILE", required_unless_present = "resume")]
    input: Option<PathBuf>,
    /// Play on from a session; its sampling settings stand where no others are given
    #[arg(long, value_name = "SESSION")]
    resume: Option<PathBuf>,
    /// Play on from this moment of the recording, seconds or M:SS, and leave out what comes after it [default: its end]
    #[arg(long, value_name = "MOMENT", value_parser = moment, conflicts_with = "resume")]
    from: Option<f64>,
    /// Where the WAV goes, - for standard output [default: FILE.continued.wav beside the input]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Sample format for a compressed recording: u8, i16, i24, i32, f32 or f64 [default: its own, or i16]
    #[arg(long, conflicts_with = "resume")]
    format: Option<SampleFormat>,
    /// Adapt the model to the recording for so many seconds, as `wavegen adapt` does, and play on with that
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    adapt: Option<f64>,
    #[command(flatten)]
    pub play: PlayArgs,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let named = args.input.as_deref().or(args.resume.as_deref()).unwrap_or(Path::new("-"));
    let output = output_path(args.output.as_deref(), named, "continued.wav")?;
    if args.adapt.is_some() && (args.resume.is_some() || args.play.save_session.is_some()) {
        let why = "--adapt makes a model that is not kept, and a session plays on with its own model only; make the model \
                   with `wavegen adapt` and give it with --model";
        return Err(Usage(why.into()).into());
    }
    let takes = args.play.outputs(&output)?;
    let source = args.input.as_deref().map(AudioSource::open).transpose()?;
    let source = source.map(|source| args.from.into_iter().fold(source, AudioSource::until));
    let model = &args.play.model;
    let (mut checkpoint, start, before, recording) = match (&args.resume, source.clone()) {
        (Some(path), source) => {
            let checkpoint = model.load()?;
            let session = Box::new(Session::load(path, &checkpoint.fingerprint())?);
            let (before, recording) = resumed(path, &session, source)?;
            (checkpoint, Start::Session(session), before, recording)
        }
        (None, Some(source)) => {
            let checkpoint = model.load()?;
            let (prompt, before, recording) = listen(args, source, &checkpoint)?;
            (checkpoint, Start::Prompt(prompt), before, recording)
        }
        (None, None) => return Err(Usage("give a recording, or a session with --resume; see --help".into()).into()),
    };
    if let (Some(adapt_s), Some(source)) = (args.adapt, &source) {
        match fitted(&checkpoint, source, adapt_s, &args.play.talk)? {
            Some(adapted) => checkpoint = adapted,
            None => return Ok(Outcome::Interrupted),
        }
    }
    args.play.play(&checkpoint, takes, start, &before, &recording)
}

/// The recording's end as a prompt.
fn listen(args: &Args, source: AudioSource, checkpoint: &Checkpoint) -> Result<(Prompt, Before, Recording)> {
    let talk = &args.play.talk;
    let wav = WavPrompt::open(&source)?;
    if let (Some(wav), Some(format)) = (&wav, args.format)
        && wav.format.sample_format != format
    {
        let own = wav.format.sample_format;
        return Err(Usage(format!("{}: a WAV keeps its own format, {own}; leave --format out", source.name())).into());
    }
    let tail = decode_tail(&source, CONTEXT_S)?;
    report_damage(source.name(), tail.damaged_packets, &tail.warnings, talk);
    let prompt = Prompt::new(&tail.clip, tail.total_frames, &checkpoint.config.codec);
    let prompt = prompt.with_context(|| source.name().to_owned())?;
    if prompt.is_silent() {
        let earlier = match tail.total_frames > tail.clip.n_frames() as u64 {
            true => "play on from before with --from, or ",
            false => "",
        };
        bail!(
            "{}: the last {:.1} s are silent, so there is nothing to play on; {earlier}start from nothing with `wavegen generate`",
            source.name(),
            tail.clip.duration_s()
        );
    }
    let Clip { samples, channels, sample_rate } = &tail.clip;
    let end = &samples[samples.len().saturating_sub((END_S * f64::from(*sample_rate)) as usize * channels)..];
    let softer_db = level_db(samples) - level_db(end);
    if softer_db > FADED_DB && args.from.is_none() {
        talk.note(&format!(
            "{}: its last {END_S:.0} s are {softer_db:.0} dB softer than what is before them, and it is played on from there; --from \
             MOMENT plays on from before",
            source.name()
        ));
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
    let before = wav.map_or(Before::Decoded(source), Before::Wav);
    Ok((prompt, before, Recording { format, n_frames: tail.total_frames }))
}

/// What a saved session goes on after: nothing, or the WAV that it ended with if that is given.
fn resumed(path: &Path, session: &Session, source: Option<AudioSource>) -> Result<(Before, Recording)> {
    let mut recording = session.recording.clone();
    let Some(source) = source else {
        return Ok((Before::Nothing, recording));
    };
    let shape = |format: &WavFormat| (format.sample_rate, format.channels, format.sample_format);
    match WavPrompt::open(&source)? {
        Some(wav) if (wav.n_frames, shape(&wav.format)) == (recording.n_frames, shape(&recording.format)) => {
            recording.format = wav.format.clone();
            Ok((Before::Wav(wav), recording))
        }
        _ => {
            let (rate, channels, format) = shape(&recording.format);
            bail!(
                "{}: not the WAV that the session {} goes on after, which has {} frames of {channels} {format} samples at \
                 {rate} Hz; give that one, or leave it out to write only what is new",
                source.name(),
                path.display(),
                recording.n_frames
            )
        }
    }
}
