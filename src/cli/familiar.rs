//! Turns a recording into the model that is to play it on, and tells how well that knows its music.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use wavegen::checkpoint::Checkpoint;
use wavegen::engine::cpu::{CpuEngine, CpuOptions};
use wavegen::generate::{Governor, Prompt, Session, SessionError};
use wavegen::plan::PlanConfig;

use super::adapt::ADAPTED_TO;
use super::common::Talk;

/// Recordings of what a model knows take a smaller share of what a plan frame would take by chance.
const UNFAMILIAR: f32 = 13.0 / 32.0;
/// The model inside the program for other music than a piano's.
const BROAD: &str = "broad";
/// Seconds of a recording that tell; less is too little to adapt to.
const TELLING_S: f64 = 4.0;

/// The model that plays a recording on.
#[derive(Args)]
pub struct PlayModelArgs {
    /// Model file (.safetensors); inside the program are `built-in` (piano), `small` (the same for slow machines) and
    /// `broad` (other music) [default: built-in, and broad where the recording is unlike a piano's]
    #[arg(long, short, value_name = "FILE")]
    pub model: Option<PathBuf>,
}

impl PlayModelArgs {
    /// The model that was asked for, or the built-in one.
    pub fn load(&self) -> Result<Checkpoint> {
        Ok(match &self.model {
            Some(name) => Checkpoint::named(name)?,
            None => Checkpoint::built_in()?,
        })
    }

    /// The same, or another where none was asked for and that one does not know the music of `prompt`.
    pub fn suited_to(&self, prompt: &Prompt, loaded: Checkpoint, talk: &Talk) -> Result<Checkpoint> {
        let codec = &loaded.config.codec;
        let heard_s = prompt.tokens().len() as f64 / f64::from(codec.sample_rate);
        if self.model.is_some() || heard_s < TELLING_S {
            return Ok(loaded);
        }
        let mut engine = CpuEngine::new(&loaded, &CpuOptions::default())?;
        let governor = Governor::new(&mut engine, &loaded.spectrum()?, prompt.tokens())?;
        let bits = governor.prompt_surprisal() / std::f32::consts::LN_2;
        if bits <= unfamiliar(&loaded) {
            return Ok(loaded);
        }
        talk.note(&format!(
            "the recording is unlike a piano's ({bits:.1} bits a plan frame, {:.1} at most where it is one): the model '{BROAD}' plays it \
             (--model built-in for the other)",
            unfamiliar(&loaded)
        ));
        Ok(Checkpoint::built_in_broad()?)
    }

    /// The session `path` and its model: the one that was asked for, or the one inside the program that it was saved with.
    pub fn session(&self, path: &Path) -> Result<(Box<Session>, Checkpoint)> {
        let read = |model: Checkpoint| Ok((Box::new(Session::load(path, &model.fingerprint())?), model));
        match read(self.load()?) {
            Err(SessionError::Model { name, .. }) if self.model.is_none() && name == BROAD => {
                Ok(read(Checkpoint::built_in_broad()?)?)
            }
            session => Ok(session?),
        }
    }
}

/// Bits of a plan frame above which a model does not know the music.
fn unfamiliar(checkpoint: &Checkpoint) -> f32 {
    let PlanConfig { n_codebooks, n_entries, .. } = checkpoint.config.plan;
    UNFAMILIAR * n_codebooks as f32 * (n_entries as f32).log2()
}

/// Says how well the model knows the music of a prompt, `bits` a plan frame, and what can be done where it does not; `at_once`: the
/// command takes `--adapt`.
pub fn judge(checkpoint: &Checkpoint, prompt: &Prompt, bits: Option<f32>, at_once: bool, talk: &Talk) {
    let heard_s = prompt.tokens().len() as f64 / f64::from(checkpoint.config.codec.sample_rate);
    let Some(bits) = bits.filter(|_| heard_s >= TELLING_S) else { return };
    talk.detail(&format!("the model finds {bits:.1} bits in a plan frame of the recording"));
    let most = unfamiliar(checkpoint);
    if bits > most && !checkpoint.notes.contains_key(ADAPTED_TO) {
        let name = &checkpoint.config.name;
        let other = if name == BROAD { "" } else { "--model broad has heard other instruments than a piano, and " };
        let fit = match at_once {
            true => "--adapt 30 fits the model to it for half a minute first",
            false => "`wavegen adapt` fits a model to it",
        };
        talk.note(&format!(
            "the recording is unlike what the model '{name}' learned from ({bits:.1} bits a plan frame, {most:.1} at most where it knows \
             the music); {other}{fit}"
        ));
    }
}
