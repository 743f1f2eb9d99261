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
use crate::model::config::{PLAN_CONTEXT, PlanTransformerConfig};
use crate::model::plan_transformer::PlanTransformer;
use crate::plan::{DB_PER_UNIT, ResidualQuantizer};
use crate::rng::Rng;

/// Steps between validations, and most pieces that one listens to, at even distances.
const VALIDATE: usize = 100;
const JUDGES: usize = 48;

/// Share of the contexts that are heard with noise, where there is any.
const NOISY: f32 = 0.7;

/// Contexts of the same length, each tensor `[contexts, frames, ..]`, on the CPU.
pub(super) struct Context {
    /// Tokens of what is to be predicted.
    tokens: Tensor,
    /// Tokens and centred bands of what is heard.
    heard: Tensor,
    bands: Tensor,
    dropout: Option<Tensor>,
}

/// How contexts of training differ from pieces.
#[derive(Clone, Copy)]
pub(super) struct Variation {
    /// Share by which they are faster or slower at most.
    pub speed: f64,
    /// Most rms of the white noise on the bands that are heard, dB.
    pub noise_db: f32,
}

/// Trains until the budget is spent; the averages then hold the result.
pub fn train(run: &mut Run, optimizer: &mut AdamW) -> Result<ControlFlow<()>, TrainError> {
    let config = &run.settings.config().plan_transformer;
    let (data, quantizer, model) = (run.data, run.quantizer, &run.model.plan);
    let variation = Variation { speed: run.settings.speed_variation, noise_db: run.settings.plan_noise_db };
    let lesson = Lesson {
        part: Part::Plan,
        learning_rate: run.settings.plan_learning_rate,
        batch: run.settings.plan_batch,
        validate_every: VALIDATE,
        draw: &|rng| draw(data, quantizer, config, variation, rng),
        length: |context| context.tokens.dims()[1],
        join: &join,
        loss: &|context| nll(model, context)?.mean_all(),
        units: |Context { tokens, .. }| tokens.dims()[0] * tokens.dims()[1],
        validate: &|workers, group| validate(workers, group, data, quantizer, model),
    };
    lesson.teach(run, optimizer)
}

/// -ln P of the frames of contexts, `[contexts, frames - 1]`, in nats.
pub(super) fn nll(model: &PlanTransformer, context: &Context) -> candle_core::Result<Tensor> {
    let Context { tokens, heard, bands, dropout } = context;
    let device = model.device();
    let dropout = dropout.as_ref().map(|mask| mask.to_device(device)).transpose()?;
    model.nll_after(heard, &bands.to_device(device)?, tokens, dropout.as_ref())
}

/// Contexts of the same length as one.
fn join(contexts: Vec<Context>) -> Result<Context, TrainError> {
    let all = |of: &dyn Fn(&Context) -> Option<Tensor>| contexts.iter().filter_map(of).collect::<Vec<_>>();
    let dropout = all(&|context| context.dropout.clone());
    Ok(Context {
        tokens: Tensor::cat(&all(&|context| Some(context.tokens.clone())), 0)?,
        heard: Tensor::cat(&all(&|context| Some(context.heard.clone())), 0)?,
        bands: Tensor::cat(&all(&|context| Some(context.bands.clone())), 0)?,
        dropout: (!dropout.is_empty()).then(|| Tensor::cat(&dropout, 0)).transpose()?,
    })
}

/// A training context of any piece, speed and noise.
pub(super) fn draw(
    data: &Dataset,
    quantizer: &ResidualQuantizer,
    config: &PlanTransformerConfig,
    variation: Variation,
    rng: &mut Rng,
) -> Result<Context, TrainError> {
    let picked = data.pick(0, PLAN_CONTEXT, variation.speed, rng);
    let context = picked.frames;
    let codes = match picked.speed {
        1.0 => picked.recording.plan_tokens.slice(s![picked.first..picked.first + context, ..]).to_owned(),
        _ => heard_at(data, quantizer, &picked)?,
    };
    let (tokens, bands) = tensors(quantizer, codes.view())?;
    let (heard, bands) = match variation.noise_db {
        most if most > 0.0 && rng.uniform() < NOISY => {
            let noisy = with_noise(quantizer, codes.view(), most * rng.uniform(), rng)?;
            tensors(quantizer, noisy.view())?
        }
        _ => (tokens.clone(), bands),
    };
    Ok(Context { tokens, heard, bands, dropout: dropout(config.dropout, (1, context - 1, config.dim), rng)? })
}

/// Plan tokens of the same frames under white noise of `rms_db`.
///
/// A model goes on from its own frames, which are never quite right; one that learned from right ones only may take their errors for
/// music (exposure bias; Bengio et al., 2015).
fn with_noise(
    quantizer: &ResidualQuantizer,
    codes: ArrayView2<u16>,
    rms_db: f32,
    rng: &mut Rng,
) -> Result<Array2<u16>, TrainError> {
    let rms = rms_db / DB_PER_UNIT;
    let noisy = quantizer.decode_all(codes)?.mapv_into(|band| band + rms * rng.normal());
    Ok(quantizer.encode_all(noisy.view())?)
}

/// Plan tokens of a context that is played at another speed; its first frames hear silence before it.
fn heard_at(data: &Dataset, quantizer: &ResidualQuantizer, picked: &Pick) -> Result<Array2<u16>, TrainError> {
    let (hop, codec) = (data.spectrum.hop(), &data.codec);
    let tokens = picked.recording.tokens_at(picked.first * hop, picked.frames * hop, picked.speed, 1.0, codec)?;
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
        let n = recording.plan_tokens.nrows().min(PLAN_CONTEXT);
        let (tokens, bands) = tensors(quantizer, recording.plan_tokens.slice(s![..n, ..]))?;
        let clean = Context { heard: tokens.clone(), tokens, bands, dropout: None };
        Ok((f64::from(nll(model, &clean)?.sum_all()?.to_scalar::<f32>()?), n - 1))
    })?;
    Ok(scored.iter().fold((0.0, 0), |(nats, frames), (x, n)| (nats + x, frames + n)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::corpus::Facts;
    use crate::model::config::ModelConfig;
    use crate::plan::Spectrum;

    #[test]
    fn noise_is_heard_in_most_contexts_and_never_predicted() {
        let config = ModelConfig::preset("tiny").unwrap();
        let quantizer = Checkpoint::untrained(config.clone(), 2).unwrap().quantizer;
        let mut rng = Rng::new(4);
        let samples = (0..64 * config.plan.hop).map(|_| (2000.0 * rng.normal()) as i16).collect();
        let spectrum = Spectrum::new(config.codec.sample_rate, &config.plan).unwrap();
        let train = vec![Recording::in_memory(samples, &Facts::default())];
        let mut data = Dataset { train, validation: vec![], codec: config.codec.clone(), spectrum };
        data.encode_plans(&quantizer).unwrap();
        // So long a context has one place.
        let codes = data.train[0].plan_tokens.clone();
        let (tokens, bands) = tensors(&quantizer, codes.view()).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let whole = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let contexts = |noise_db: f32, rng: &mut Rng| -> Vec<Context> {
            let variation = Variation { speed: 0.0, noise_db };
            (0..60).map(|_| draw(&data, &quantizer, &config.plan_transformer, variation, rng).unwrap()).collect()
        };
        let moved = |c: &Context| whole(&c.heard) != whole(&tokens);
        let noisy = contexts(48.0, &mut rng);
        assert!(
            noisy.iter().all(|c| whole(&c.tokens) == whole(&tokens) && moved(c) == (flat(&c.bands) != flat(&bands)))
        );
        let n = noisy.iter().filter(|c| moved(c)).count();
        assert!((30..54).contains(&n), "{n} of 60");
        assert!(contexts(0.0, &mut rng).iter().all(|c| !moved(c) && flat(&c.bands) == flat(&bands)));
    }
}
