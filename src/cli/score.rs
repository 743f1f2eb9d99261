//! Turns a recording's tokens into bits per sample under a model, and under the baselines without one.

use anyhow::Result;
use indicatif::ProgressBar;
use rayon::prelude::*;
use serde::Serialize;
use wavegen::baselines::{mixture_bits, residual_entropy, token_entropy};
use wavegen::checkpoint::Checkpoint;
use wavegen::forecast::forecasts;
use wavegen::plan::{Spectrum, bands_of};

use super::common::{Talk, interrupted};
use super::engine::Loaded;
use super::eval::Piece;

/// Plan frames scored at a time; each after the frames that its transformers look back on.
const SEGMENT: usize = 512;
/// Frames before a segment that the wave transformer reads: as far as its slowest tier looks back through all blocks (64), after what forecasts hear.
const WAVE_RUN_UP: usize = 96;

/// Bits per sample of a file, or of all.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Scored {
    pub name: String,
    pub seconds: f64,
    /// Bits per sample of the tokens given the plan.
    pub wave_bits: f64,
    /// Bits per sample of the plan.
    pub plan_bits: f64,
    pub total_bits: f64,
    pub plan_bits_per_frame: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baselines: Option<Baselines>,
}

/// Bits per sample without a model, each fitted to the file itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Baselines {
    pub token_bits: f64,
    pub residual_bits: f64,
    /// Given the plan, which is not part of it.
    pub mixture_bits: f64,
}

impl Scored {
    /// All files together, each weighted by its length.
    pub fn total(files: &[Self]) -> Self {
        let seconds: f64 = files.iter().map(|f| f.seconds).sum();
        let mean = |of: &dyn Fn(&Self) -> f64| files.iter().map(|f| of(f) * f.seconds).sum::<f64>() / seconds.max(1e-9);
        let baseline = |of: &dyn Fn(&Baselines) -> f64| mean(&|f| f.baselines.as_ref().map_or(0.0, of));
        Self {
            name: "all".into(),
            seconds,
            wave_bits: mean(&|f| f.wave_bits),
            plan_bits: mean(&|f| f.plan_bits),
            total_bits: mean(&|f| f.total_bits),
            plan_bits_per_frame: mean(&|f| f.plan_bits_per_frame),
            baselines: files.iter().all(|f| f.baselines.is_some()).then(|| Baselines {
                token_bits: baseline(&|b| b.token_bits),
                residual_bits: baseline(&|b| b.residual_bits),
                mixture_bits: baseline(&|b| b.mixture_bits),
            }),
        }
    }
}

/// Scores pieces on all cores; when interrupted only those that are done.
pub fn score_all(
    checkpoint: &Checkpoint,
    engine: &Loaded,
    spectrum: &Spectrum,
    pieces: &[Piece],
    baselines: bool,
    talk: &Talk,
) -> Result<Vec<Scored>> {
    let n_frames: usize = pieces.iter().map(|p| p.tokens.len() / spectrum.hop()).sum();
    let bar = talk.bar(n_frames as u64, "{bar:40} {percent} %, {eta} left");
    let scored = pieces.par_iter().map(|piece| score(engine, spectrum, piece, &bar)).collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    let mut done = Vec::new();
    for (piece, scored) in pieces.iter().zip(scored) {
        let Some(mut scored) = scored else { continue };
        if baselines {
            // One after the other: the forecasts of an hour are a gigabyte.
            if interrupted() {
                break;
            }
            scored.baselines = Some(score_baselines(checkpoint, engine, spectrum, piece)?);
        }
        done.push(scored);
    }
    Ok(done)
}

/// `None` when interrupted.
fn score(engine: &Loaded, spectrum: &Spectrum, piece: &Piece, bar: &ProgressBar) -> Result<Option<Scored>> {
    let hop = spectrum.hop();
    let n_frames = piece.tokens.len() / hop;
    let starts: Vec<usize> = (0..n_frames).step_by(SEGMENT).collect();
    let segments = starts
        .par_iter()
        .map(|&start| {
            if interrupted() {
                return Ok(None);
            }
            let end = (start + SEGMENT).min(n_frames);
            let nats = score_segment(engine, piece, start..end, hop)?;
            bar.inc((end - start) as u64);
            Ok(Some(nats))
        })
        .collect::<Result<Option<Vec<Nats>>>>()?;
    let Some(segments) = segments else { return Ok(None) };
    let bits = std::f64::consts::LOG2_E;
    let wave_bits = segments.iter().map(|n| n.wave).sum::<f64>() * bits / piece.tokens.len() as f64;
    let plan_bits_per_frame = segments.iter().map(|n| n.plan).sum::<f64>() * bits / (n_frames - 1).max(1) as f64;
    let plan_bits = plan_bits_per_frame / hop as f64;
    Ok(Some(Scored {
        name: piece.name.clone(),
        seconds: piece.tokens.len() as f64 / f64::from(spectrum.sample_rate()),
        wave_bits,
        plan_bits,
        total_bits: wave_bits + plan_bits,
        plan_bits_per_frame,
        baselines: None,
    }))
}

struct Nats {
    wave: f64,
    plan: f64,
}

/// -ln P of the frames in `range`; of the plan without the piece's very first frame, which is given.
fn score_segment(engine: &Loaded, piece: &Piece, range: std::ops::Range<usize>, hop: usize) -> Result<Nats> {
    let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
    let mut engine = engine.stream()?;
    let first = range.start.saturating_sub(WAVE_RUN_UP);
    let tokens = &piece.tokens[first * hop..range.end * hop];
    let mut nll = vec![0.0; tokens.len()];
    engine.score(tokens, &mut nll)?;
    let wave = sum(&nll[(range.start - first) * hop..]);
    let first = range.start.saturating_sub(engine.config().plan_transformer.window);
    let plan = engine.score_plan(&piece.tokens[first * hop..range.end * hop])?;
    // `plan[i]` is frame `first + i + 1`.
    let plan = sum(&plan[(range.start.max(1) - first - 1).min(plan.len())..]);
    Ok(Nats { wave, plan })
}

fn score_baselines(checkpoint: &Checkpoint, engine: &Loaded, spectrum: &Spectrum, piece: &Piece) -> Result<Baselines> {
    let codec = &checkpoint.config.codec;
    let heard = codec.decode_all(&piece.tokens);
    let whole = piece.tokens.len() / spectrum.hop() * spectrum.hop();
    let plan = bands_of(&engine.stream()?.plan_of(&piece.tokens[..whole])?);
    let forecasts = forecasts(&heard, plan.view(), spectrum, &checkpoint.config.forecast)?;
    Ok(Baselines {
        token_bits: token_entropy(&piece.tokens, codec),
        residual_bits: residual_entropy(&piece.tokens, &forecasts, codec),
        mixture_bits: mixture_bits(&piece.tokens, &forecasts, codec),
    })
}
