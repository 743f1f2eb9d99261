//! Trains the plan transformer on the plan tokens of whole pieces: cross-entropy, bits per frame.

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use ndarray::{Array2, ArrayView2, s};

use super::dataset::{Dataset, Pick, Recording};
use super::group::Group;
use super::lesson::Lesson;
use super::optimizer::AdamW;
use super::workers::Workers;
use super::{Part, Run, TrainError};
use crate::model::config::PlanTransformerConfig;
use crate::model::plan_transformer::PlanTransformer;
use crate::plan::ResidualQuantizer;
use crate::rng::Rng;

/// Plan frames of a training context, where pieces are long enough.
pub(super) const CONTEXT: usize = 512;
/// Steps between validations, and most pieces that one listens to, at even distances.
const VALIDATE: usize = 100;
const JUDGES: usize = 48;

/// Tokens, centred bands and dropout of contexts, each `[contexts, frames, ..]`, on the CPU.
pub(super) type Context = (Tensor, Tensor, Option<Tensor>);

/// Trains until the budget is spent; the averages then hold the result.
pub fn train(run: &mut Run, optimizer: &mut AdamW) -> Result<ControlFlow<()>, TrainError> {
    let config = &run.settings.config().plan_transformer;
    let (data, quantizer, model) = (run.data, run.quantizer, &run.model.plan);
    let variation = run.settings.speed_variation;
    let lesson = Lesson {
        part: Part::Plan,
        learning_rate: run.settings.plan_learning_rate,
        batch: run.settings.plan_batch,
        validate_every: VALIDATE,
        draw: &|rng| draw(data, quantizer, config, variation, rng),
        join: &join,
        loss: &|context| nll(model, context)?.mean_all(),
        units: |(tokens, ..): &Context| tokens.dims()[0] * tokens.dims()[1],
        validate: &|workers, group| validate(workers, group, data, quantizer, model),
    };
    lesson.teach(run, optimizer)
}

/// -ln P of the frames of contexts, `[contexts, frames - 1]`, in nats.
pub(super) fn nll(model: &PlanTransformer, (tokens, bands, mask): &Context) -> candle_core::Result<Tensor> {
    let device = model.device();
    let mask = mask.as_ref().map(|mask| mask.to_device(device)).transpose()?;
    model.nll(tokens, &bands.to_device(device)?, mask.as_ref())
}

/// Contexts of the same length as one.
fn join(contexts: Vec<Context>) -> Result<Context, TrainError> {
    let tokens: Vec<&Tensor> = contexts.iter().map(|context| &context.0).collect();
    let bands: Vec<&Tensor> = contexts.iter().map(|context| &context.1).collect();
    let masks: Vec<&Tensor> = contexts.iter().filter_map(|context| context.2.as_ref()).collect();
    let mask = (!masks.is_empty()).then(|| Tensor::cat(&masks, 0)).transpose()?;
    Ok((Tensor::cat(&tokens, 0)?, Tensor::cat(&bands, 0)?, mask))
}

/// A training context of any piece and speed.
pub(super) fn draw(
    data: &Dataset,
    quantizer: &ResidualQuantizer,
    config: &PlanTransformerConfig,
    variation: f64,
    rng: &mut Rng,
) -> Result<Context, TrainError> {
    let context = CONTEXT.min(data.longest());
    let picked = data.pick(context, variation, rng);
    let (tokens, bands) = if picked.speed == 1.0 {
        tensors(quantizer, picked.recording.plan_tokens.slice(s![picked.first..picked.first + context, ..]))?
    } else {
        tensors(quantizer, heard_at(data, quantizer, &picked, context)?.view())?
    };
    Ok((tokens, bands, dropout(config.dropout, (1, context - 1, config.dim), rng)?))
}

/// Plan tokens of a context that is played at another speed; its first frames hear silence before it.
fn heard_at(
    data: &Dataset,
    quantizer: &ResidualQuantizer,
    picked: &Pick,
    context: usize,
) -> Result<Array2<u16>, TrainError> {
    let (hop, codec) = (data.spectrum.hop(), &data.codec);
    let tokens = picked.recording.tokens_at(picked.first * hop, context * hop, picked.speed, 1.0, codec)?;
    Ok(quantizer.encode_all(data.spectrum.analyse(&codec.decode_all(&tokens)).view())?)
}

/// Plan tokens -> tokens and centred bands, each `[1, frames, ..]`.
pub(super) fn tensors(quantizer: &ResidualQuantizer, codes: ArrayView2<u16>) -> Result<(Tensor, Tensor), TrainError> {
    let bands = quantizer.decode_all(codes)? - &quantizer.mean;
    let dims = (1, bands.nrows(), bands.ncols());
    let flat = codes.iter().map(|&c| u32::from(c)).collect::<Vec<_>>();
    Ok((
        Tensor::from_vec(flat, (1, codes.nrows(), codes.ncols()), &Device::Cpu)?,
        Tensor::from_iter(bands, &Device::Cpu)?.reshape(dims)?,
    ))
}

/// An exact plan `[frames, n_bands]` as a model on the CPU takes it once it has heard it: through the codebooks, and refined.
pub(super) fn as_read(
    model: &PlanTransformer,
    quantizer: &ResidualQuantizer,
    exact: ArrayView2<f32>,
) -> Result<Array2<f32>, TrainError> {
    let codes = quantizer.encode_all(exact)?;
    let mut bands = quantizer.decode_all(codes.view())?;
    let (tokens, centred) = tensors(quantizer, codes.view())?;
    model.refine(&tokens, &centred, &mut bands)?;
    Ok(bands)
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

/// Nats over the beginnings of this rank's held-out pieces, and their frames.
fn validate(
    workers: &Workers,
    group: &dyn Group,
    data: &Dataset,
    quantizer: &ResidualQuantizer,
    model: &PlanTransformer,
) -> Result<(f64, usize), TrainError> {
    let stride = data.validation.len().div_ceil(JUDGES).max(1);
    let judges: Vec<&Recording> = data.validation.iter().step_by(stride).collect();
    let scored = workers.map(&group.mine(0..judges.len()), |&i| {
        let recording = judges[i];
        let n = recording.plan_tokens.nrows().min(CONTEXT);
        let (tokens, bands) = tensors(quantizer, recording.plan_tokens.slice(s![..n, ..]))?;
        Ok((f64::from(nll(model, &(tokens, bands, None))?.sum_all()?.to_scalar::<f32>()?), n - 1))
    })?;
    Ok(scored.iter().fold((0.0, 0), |(nats, frames), (x, n)| (nats + x, frames + n)))
}
