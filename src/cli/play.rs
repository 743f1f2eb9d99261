//! Turns a prompt or a saved session into takes of what comes next: what `continue` and `generate` share.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use wavegen::atomic::is_same_file;
use wavegen::audio::{AudioSource, Decoder, WavPrompt};
use wavegen::checkpoint::Checkpoint;
use wavegen::engine::Engine;
use wavegen::generate::{Intervention, Options, Played, Player, Progress, Prompt, Recording, SeamReport, Session};
use wavegen::sink::{self, Sink};

use super::Outcome;
use super::common::{
    BUILT_IN, ModelArgs, SamplingArgs, Talk, Usage, catch_interrupt, check_output, interrupted, is_pipe, is_stdout,
    one_line, seconds,
};
use super::engine::EngineArgs;
use super::familiar::judge;

#[derive(Args)]
pub struct PlayArgs {
    /// How long to play
    #[arg(long, short, default_value = "10", value_parser = seconds)]
    pub seconds: f64,
    /// Overwrite existing outputs
    #[arg(long)]
    pub force: bool,
    /// Play N different continuations, NAME.1.wav to NAME.N.wav: streams 0 to N - 1 of the seed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub takes: u32,
    /// Which of the seed's continuations to play, or the first of them [default: 0]
    #[arg(long, value_name = "I")]
    pub stream: Option<u32>,
    /// Write down where playing ended, for --resume; with --takes, FILE.1 to FILE.N before the extension
    #[arg(long, value_name = "FILE")]
    pub save_session: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub talk: Talk,
}

/// What playing begins with.
pub enum Start {
    Prompt(Prompt),
    Session(Box<Session>),
}

/// What the output begins with.
pub enum Before {
    Nothing,
    Wav(WavPrompt),
    Decoded(AudioSource),
}

impl Before {
    fn copy(&self, sink: &mut dyn Sink) -> Result<()> {
        match self {
            Self::Nothing => {}
            Self::Wav(wav) => sink.copy_prompt(wav)?,
            Self::Decoded(source) => sink.copy_decoded(&mut Decoder::from_source(source)?)?,
        }
        Ok(())
    }
}

/// Where a take goes.
pub struct Take {
    output: PathBuf,
    session: Option<PathBuf>,
}

impl PlayArgs {
    /// What `output` means for each take; refuses what exists before anything is computed.
    pub fn outputs(&self, output: &Path) -> Result<Vec<Take>> {
        if self.takes > 1 && is_pipe(output) {
            return Err(Usage("several takes need files to go to; give one with -o".into()).into());
        }
        let take = |i: u32| {
            let output = numbered(output, i, self.takes);
            let session = self.save_session.as_ref().map(|path| numbered(path, i, self.takes));
            if let Some(path) = &session {
                check_output(path, self.force)?;
                if is_same_file(path, &output) {
                    let why = format!(
                        "{}: cannot be both the audio and the session; give another --save-session",
                        path.display()
                    );
                    return Err(Usage(why).into());
                }
            }
            if !is_pipe(&output) && !sink::is_device(&output) {
                sink::open(&output, self.force)?;
            }
            Ok(Take { output, session })
        };
        (0..self.takes).map(take).collect()
    }

    /// Plays all takes, several at a time. `recording` is what `before` brings into the output.
    pub fn play(
        &self,
        checkpoint: &Checkpoint,
        takes: Vec<Take>,
        start: Start,
        before: &Before,
        recording: &Recording,
    ) -> Result<Outcome> {
        let talk = &self.talk;
        let loaded = self.engine.load(checkpoint, talk)?;
        let model = self.save_session.as_ref().map(|_| checkpoint.fingerprint());
        let shared = Shared { seconds: self.seconds, force: self.force, before, recording, model };
        let own = match &start {
            Start::Prompt(_) => Options { wave: checkpoint.generation, ..Options::default() },
            Start::Session(session) => *session.options(),
        };
        let mut options = self.sampling.options(own);
        options.stream = self.stream.unwrap_or(options.stream);
        catch_interrupt();
        let governed = self.sampling.governor.is_on();
        let (n_takes, begun) = (takes.len(), Instant::now());
        let done = (0..n_takes).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let bar = talk.play_bar();
        let take = |i: usize, take: Take, mut engine: Box<dyn Engine>, mut player: Player| -> Result<PlayReport> {
            let options = Options { stream: options.stream.wrapping_add(i as u32), ..options };
            player.set_options(engine.as_mut(), &options)?;
            let mut follow = |p: Progress| {
                done[i].store(p.done_s.to_bits(), Relaxed);
                let done_s = done.iter().map(|done_s| f64::from_bits(done_s.load(Relaxed))).sum();
                bar.update(Progress { done_s, total_s: p.total_s * n_takes as f64 })
            };
            shared.play(take, engine.as_mut(), player, &mut follow)
        };
        let begin = |engine: &mut dyn Engine, prompt: &Prompt| -> Result<Player> {
            let player = Player::new(engine, prompt, &options, governed)?;
            judge(checkpoint, prompt, player.context_bits(), self.save_session.is_none(), talk);
            Ok(player)
        };
        let (mut reports, mut failed) = (Vec::new(), None);
        if n_takes == 1 {
            for one in takes {
                let mut engine = loaded.stream()?;
                let player = match &start {
                    Start::Prompt(prompt) => begin(engine.as_mut(), prompt)?,
                    Start::Session(session) => session.resume(engine.as_mut())?,
                };
                reports.push(take(0, one, engine, player)?);
            }
        } else {
            let session = match start {
                Start::Session(session) => session,
                Start::Prompt(prompt) => {
                    let mut engine = loaded.stream()?;
                    let player = begin(engine.as_mut(), &prompt)?;
                    Box::new(Session::of(&player, engine.as_mut(), recording.clone())?)
                }
            };
            let mut takes = takes.into_iter().enumerate();
            while reports.len() < n_takes && failed.is_none() && !interrupted() {
                let engines = loaded.streams(n_takes - reports.len())?;
                let some: Vec<_> = engines.into_iter().zip(&mut takes).collect();
                let played = std::thread::scope(|scope| {
                    let play = |(mut engine, (i, one)): (Box<dyn Engine>, (usize, Take))| {
                        let (session, take) = (&session, &take);
                        scope.spawn(move || {
                            let player = session.resume(engine.as_mut())?;
                            take(i, one, engine, player)
                        })
                    };
                    let threads: Vec<_> = some.into_iter().map(play).collect();
                    threads
                        .into_iter()
                        .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
                        .collect::<Vec<_>>()
                });
                for report in played {
                    match report {
                        Ok(report) => reports.push(report),
                        Err(error) if failed.is_none() => failed = Some(error),
                        Err(error) => talk.warn(&one_line(&error)),
                    }
                }
            }
        }
        bar.finish();
        reports.iter().for_each(|report| report.tell(talk, &self.model.model));
        if n_takes > 1 {
            let (played_s, elapsed_s): (f64, f64) =
                (reports.iter().map(|r| r.played_s).sum(), begun.elapsed().as_secs_f64());
            talk.note(&format!(
                "{} takes: {played_s:.2} s played in {elapsed_s:.1} s ({:.2} x real time)",
                reports.len(),
                played_s / elapsed_s.max(1e-9)
            ));
        }
        let to_stdout = reports.iter().any(|report| is_stdout(Path::new(&report.output)));
        match &reports[..] {
            [report] if n_takes == 1 => talk.json(report, to_stdout)?,
            reports => talk.json(&reports, to_stdout)?,
        }
        if let Some(error) = failed {
            return Err(error);
        }
        let whole = reports.len() == n_takes && reports.iter().all(|report| !report.interrupted);
        Ok(if whole { Outcome::Done } else { Outcome::Interrupted })
    }
}

/// What all takes share.
struct Shared<'a> {
    seconds: f64,
    force: bool,
    before: &'a Before,
    recording: &'a Recording,
    /// The model's fingerprint, for sessions.
    model: Option<String>,
}

impl Shared<'_> {
    /// Writes what was before, plays on, and takes down where that ended.
    fn play(
        &self,
        take: Take,
        engine: &mut dyn Engine,
        mut player: Player,
        follow: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<PlayReport> {
        let begun = Instant::now();
        let Self { seconds, force, before, recording, model } = self;
        let mut sink = sink::open(&take.output, *force)?;
        sink.start(&recording.format)?;
        before.copy(sink.as_mut())?;
        let played = player.play(engine, *seconds, sink.as_mut(), follow)?;
        sink.finish()?;
        if let (Some(path), Some(model)) = (&take.session, model) {
            let n_frames = recording.n_frames + played.n_frames;
            let recording = Recording { n_frames, ..(*recording).clone() };
            Session::of(&player, engine, recording)?.save(path, model)?;
        }
        let prompt_frames = if matches!(before, Before::Nothing) { 0 } else { recording.n_frames };
        Ok(PlayReport::new(&take, &player, prompt_frames, &played, begun.elapsed().as_secs_f64()))
    }
}

/// `name.wav` of take `i` of several: `name.1.wav`.
fn numbered(path: &Path, i: u32, takes: u32) -> PathBuf {
    let number = (i + 1).to_string();
    match path.extension() {
        _ if takes == 1 => path.to_owned(),
        Some(extension) => path.with_extension(format!("{number}.{}", extension.to_string_lossy())),
        None => path.with_extension(number),
    }
}

/// What `continue` and `generate` report of a take.
#[derive(Serialize)]
struct PlayReport {
    output: String,
    sample_rate: u32,
    channels: usize,
    /// Seconds in the output before what was played.
    prompt_s: f64,
    /// Seconds played.
    played_s: f64,
    elapsed_s: f64,
    x_real_time: f64,
    interrupted: bool,
    seed: u64,
    stream: u32,
    /// Where the session was saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    seam: Option<SeamReport>,
    /// What the governor did.
    interventions: Vec<Intervention>,
}

impl PlayReport {
    fn new(take: &Take, player: &Player, prompt_frames: u64, played: &Played, elapsed_s: f64) -> Self {
        let (sample_rate, channels) = player.shape();
        let played_s = played.n_frames as f64 / f64::from(sample_rate);
        Self {
            output: take.output.display().to_string(),
            sample_rate,
            channels,
            prompt_s: prompt_frames as f64 / f64::from(sample_rate),
            played_s,
            elapsed_s,
            x_real_time: played_s / elapsed_s.max(1e-9),
            interrupted: played.interrupted,
            seed: player.options().seed,
            stream: player.options().stream,
            session: take.session.as_ref().map(|path| path.display().to_string()),
            seam: played.seam,
            interventions: played.interventions.clone(),
        }
    }

    /// Tells people.
    fn tell(&self, talk: &Talk, model: &Path) {
        let name = if is_pipe(Path::new(&self.output)) { "standard output" } else { &self.output };
        let before = if self.prompt_s > 0.0 { format!("{:.2} s of prompt + ", self.prompt_s) } else { String::new() };
        let how = if self.interrupted { ", interrupted" } else { "" };
        talk.note(&format!(
            "{name}: {before}{:.2} s played in {:.1} s ({:.2} x real time){how}",
            self.played_s, self.elapsed_s, self.x_real_time
        ));
        if let Some(seam) = &self.seam {
            talk.detail(&describe_seam(seam));
        }
        self.interventions.iter().for_each(|intervention| talk.note(&describe(intervention)));
        if let Some(session) = &self.session {
            let other = (model != Path::new(BUILT_IN)).then(|| format!(" --model {}", model.display()));
            let with = other.unwrap_or_default();
            talk.note(&format!("{session}: play on from here with `wavegen continue --resume {session}{with}`"));
        }
    }
}

/// What a governor did, for people.
pub fn describe(intervention: &Intervention) -> String {
    let Intervention { at_s, from_s, alarm, attempt } = intervention;
    format!("governor: {alarm} at {at_s:.1} s, another way from {from_s:.1} s (try {attempt})")
}

fn describe_seam(seam: &SeamReport) -> String {
    let pair = |value: Option<f32>, own: Option<f32>, sign: bool| match (value, own) {
        (Some(value), Some(own)) if sign => format!("{value:+.1} dB (inside the prompt {own:.1})"),
        (Some(value), Some(own)) => format!("{value:.1} dB (inside the prompt {own:.1})"),
        (Some(value), None) => format!("{value:.1} dB"),
        (None, _) => "too short to tell".into(),
    };
    format!(
        "join: step {:.1} x the prompt's rms step, level {}, spectrum {}",
        seam.jump,
        pair(seam.level_change_db, seam.own_level_change_db, true),
        pair(seam.spectral_distance_db, seam.own_spectral_distance_db, false)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_are_numbered_before_the_extension() {
        assert_eq!(numbered(Path::new("a/in.continued.wav"), 0, 1), Path::new("a/in.continued.wav"));
        assert_eq!(numbered(Path::new("a/in.continued.wav"), 0, 3), Path::new("a/in.continued.1.wav"));
        assert_eq!(numbered(Path::new("s"), 2, 3), Path::new("s.3"));
    }
}
