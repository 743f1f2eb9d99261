//! Tells how well a model knows the music of a recording.

use wavegen::checkpoint::Checkpoint;
use wavegen::generate::Prompt;
use wavegen::plan::PlanConfig;

use super::adapt::ADAPTED_TO;
use super::common::Talk;

/// Recordings of what a model knows take a smaller share of what a plan frame would take by chance.
const UNFAMILIAR: f32 = 11.0 / 36.0;
/// Seconds of a recording that tell; less is too little to adapt to.
const TELLING_S: f64 = 4.0;

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
        let fit = match at_once {
            true => "--adapt 30 fits the model to it for half a minute first",
            false => "`wavegen adapt` fits a model to it",
        };
        talk.note(&format!(
            "the recording is unlike what the model '{name}' learned from ({bits:.1} bits a plan frame, {most:.1} at most where it knows \
             the music); {fit}"
        ));
    }
}
