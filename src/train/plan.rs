//! Trains the plan transformer on the plan tokens of whole pieces: cross-entropy, bits per frame.

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use ndarray::{ArrayView2, s};

use super::optimizer::AdamW;
use super::schedule::{Clock, PLAN_SHARE};
use super::wave::Workers;
use super::{Part, Run, TrainError, TrainEvent};
use crate::rng::Rng;

/// Plan frames of a training context, where pieces are long enough.
const CONTEXT: usize = 512;
/// Contexts per step.
const BATCH: usize = 4;
/// Steps between reports and between validations.
const REPORT: usize = 10;
const VALIDATE: usize = 100;

/// Trains until the budget is spent; the averages then hold the result.
pub fn train(run: &mut Run, optimizer: &mut AdamW) -> Result<ControlFlow<()>, TrainError> {
    let config = &run.settings.config;
    let mut rng = Rng::new(run.settings.seed ^ 0x91a2);
    let hop = run.spectrum.hop();
    let longest = run.data.train.iter().map(|r| r.n_frames(hop)).max().unwrap_or(0);
    let context = CONTEXT.min(longest);
    let workers = Workers::new(run.settings.threads)?;
    let mut clock = Clock::start(run.settings.budget, PLAN_SHARE);
    let mut recent = Vec::new();
    while clock.done() < 1.0 {
        let batch: Vec<(Tensor, Tensor, Option<Tensor>)> = (0..BATCH)
            .map(|_| {
                let (recording, first) = run.data.pick(context, &mut rng);
                let (tokens, bands) = tensors(run, recording.plan_tokens.slice(s![first..first + context, ..]))?;
                let dims = (1, context - 1, config.plan_transformer.dim);
                Ok((tokens, bands, dropout(config.plan_transformer.dropout, dims, &mut rng)?))
            })
            .collect::<Result<_, TrainError>>()?;
        let results = workers.map(&batch, |(tokens, bands, mask)| {
            let loss = run.model.plan.nll(tokens, bands, mask.as_ref())?.mean_all()?;
            Ok((loss.to_scalar::<f32>()?, loss.backward()?))
        })?;
        let (losses, gradients): (Vec<f32>, Vec<_>) = results.into_iter().unzip();
        let norm = optimizer.step(&gradients, run.settings.plan_learning_rate * clock.rate())?;
        clock.advance();
        let bits = f64::from(losses.iter().sum::<f32>()) / losses.len() as f64 / std::f64::consts::LN_2;
        if !bits.is_finite() || !norm.is_finite() {
            return Err(TrainError::Diverged { step: clock.step() });
        }
        recent.push(bits);
        let step = clock.step();
        let over = clock.done() >= 1.0;
        if step % REPORT == 0 || over {
            let event = TrainEvent::Step {
                part: Part::Plan,
                step,
                done: clock.done(),
                bits: recent.iter().sum::<f64>() / recent.len() as f64,
                units_per_s: (step * BATCH * context) as f64 / clock.elapsed().as_secs_f64(),
                elapsed: clock.elapsed(),
            };
            recent.clear();
            if (run.observe)(event).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        if step % VALIDATE == 0 || over {
            optimizer.swap()?;
            let bits = validate(run);
            optimizer.swap()?;
            if let Some(bits) = bits? {
                let _ = (run.observe)(TrainEvent::Validation { part: Part::Plan, step, bits });
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Plan tokens -> tokens and centred bands, each `[1, frames, ..]`.
fn tensors(run: &Run, codes: ArrayView2<u16>) -> Result<(Tensor, Tensor), TrainError> {
    let bands = run.quantizer.decode_all(codes)? - &run.quantizer.mean;
    let dims = (1, bands.nrows(), bands.ncols());
    let flat = codes.iter().map(|&c| u32::from(c)).collect::<Vec<_>>();
    Ok((
        Tensor::from_vec(flat, (1, codes.nrows(), codes.ncols()), &Device::Cpu)?,
        Tensor::from_iter(bands, &Device::Cpu)?.reshape(dims)?,
    ))
}

/// Factors that drop a share of the features and keep the mean (candle's own draw from an unseeded generator).
fn dropout(share: f32, dims: (usize, usize, usize), rng: &mut Rng) -> Result<Option<Tensor>, TrainError> {
    if share == 0.0 {
        return Ok(None);
    }
    let n = dims.0 * dims.1 * dims.2;
    let keep = (0..n).map(|_| if rng.uniform() < share { 0.0 } else { 1.0 / (1.0 - share) }).collect();
    Ok(Some(Tensor::from_vec(keep, dims, &Device::Cpu)?))
}

/// Bits per frame over the beginnings of held-out pieces; `None` without any.
fn validate(run: &Run) -> Result<Option<f64>, TrainError> {
    let (mut nats, mut frames) = (0.0, 0);
    for recording in &run.data.validation {
        let n = recording.plan_tokens.nrows().min(CONTEXT);
        let (tokens, bands) = tensors(run, recording.plan_tokens.slice(s![..n, ..]))?;
        nats += f64::from(run.model.plan.nll(&tokens, &bands, None)?.sum_all()?.to_scalar::<f32>()?);
        frames += n - 1;
    }
    Ok((frames > 0).then(|| nats / frames as f64 / std::f64::consts::LN_2))
}
