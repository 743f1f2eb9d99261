//! Turns a trained plan transformer and recordings into the map by which, having read a frame, it takes back some of what the codebooks
//! cost: the frame's bands by least squares from its decoded bands and the state after it.

use candle_core::Device;
use ndarray::{Array2, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::dataset::{Dataset, Recording};
use super::plan::tensors;
use super::workers::Workers;
use crate::checkpoint::{Checkpoint, Weights};
use crate::cholesky::solve;
use crate::model::config::PLAN_CONTEXT;
use crate::model::plan_transformer::REFINE;
use crate::plan::DB_PER_UNIT;

/// Frames that the map is fitted to, and that it is judged by, at most.
const FITTED: usize = 150_000;
const JUDGED: usize = 20_000;
/// Added to the squares of the inputs, as shares of their mean; the best is taken. Few frames want much, or they are learned by heart.
const RIDGES: [f64; 4] = [1e-4, 1e-3, 1e-2, 1e-1];
/// Contexts whose sums are in memory at a time.
const AT_ONCE: usize = 16;

/// How far frames lie from their recordings, dB rms over bands: decoded, and refined; the same where no map brings them nearer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refined {
    pub decoded_db: f32,
    pub refined_db: f32,
}

/// A map, and what it is worth on held-out pieces (on the training's last tenth where there are none).
#[derive(Serialize, Deserialize)]
pub struct Fitted {
    /// The bias, then a row of `n_bands` for every input.
    map: Vec<f32>,
    pub refined: Refined,
}

impl Fitted {
    /// The map as weights of a model of so many bands.
    pub fn weights(self, n_bands: usize) -> Result<Weights, TrainError> {
        let rows = self.map.len() / n_bands.max(1);
        let map = Array2::from_shape_vec((rows, n_bands), self.map).map_err(candle_core::Error::wrap)?;
        Ok([
            (name_of("weight"), map.slice(s![1.., ..]).to_owned().into_dyn().into()),
            (name_of("bias"), map.row(0).to_owned().into_dyn().into()),
        ]
        .into())
    }
}

/// Some contexts of recordings as pieces and their first frames, at most `frames` frames in all and evenly chosen.
fn contexts(recordings: &[Recording], frames: usize) -> Vec<(&Recording, usize)> {
    let firsts = |piece: &Recording| (0..piece.plan_tokens.nrows()).step_by(PLAN_CONTEXT);
    let all: Vec<_> = recordings.iter().flat_map(|piece| firsts(piece).map(move |first| (piece, first))).collect();
    let stride = all.len().div_ceil((frames / PLAN_CONTEXT).max(1)).max(1);
    all.into_iter().step_by(stride).collect()
}

/// What the map takes of a context, `[frames, 1 + n_bands + dim]` (the first is 1), and what the bands lack, `[frames, n_bands]`.
fn seen(
    model: &crate::model::Model,
    checkpoint: &Checkpoint,
    data: &Dataset,
    (piece, first): (&Recording, usize),
) -> Result<(Array2<f32>, Array2<f32>), TrainError> {
    let end = piece.plan_tokens.nrows().min(first + PLAN_CONTEXT);
    let quantizer = &checkpoint.quantizer;
    let codes = piece.plan_tokens.slice(s![first..end, ..]);
    let (tokens, bands) = tensors(quantizer, codes)?;
    let hidden = model.plan.forward(&tokens, &bands, None)?.to_device(&Device::Cpu)?;
    let dim = hidden.dim(2)?;
    let hidden = Array2::from_shape_vec((end - first, dim), hidden.flatten_all()?.to_vec1()?)
        .map_err(candle_core::Error::wrap)?;
    let decoded = quantizer.decode_all(codes)?;
    let lacks = piece.plan(first..end, &data.spectrum, &data.codec)? - &decoded;
    let inputs = [Array2::ones((end - first, 1)), decoded - &quantizer.mean, hidden];
    let inputs = concatenate(Axis(1), &inputs.each_ref().map(|part| part.view())).map_err(candle_core::Error::wrap)?;
    Ok((inputs, lacks))
}

/// A pure function of model and recordings, whose plan tokens are made.
///
/// # Errors
/// As training.
pub fn fit(checkpoint: &Checkpoint, data: &Dataset, workers: &Workers) -> Result<Fitted, TrainError> {
    let model = checkpoint.model()?;
    let (n_bands, dim) = (checkpoint.quantizer.mean.len(), checkpoint.config.plan_transformer.dim);
    let n = 1 + n_bands + dim;
    let (mut squares, mut products) = (Array2::<f64>::zeros((n, n)), Array2::<f64>::zeros((n, n_bands)));
    let mut fitted = contexts(&data.train, FITTED);
    let judging = match data.validation.is_empty() {
        true => fitted.split_off(fitted.len() - (fitted.len() / 10).max(1)),
        false => contexts(&data.validation, JUDGED),
    };
    for some in fitted.chunks(AT_ONCE) {
        let sums = workers.map(some, |&context| {
            let (inputs, lacks) = seen(&model, checkpoint, data, context)?;
            Ok((inputs.t().dot(&inputs), inputs.t().dot(&lacks)))
        })?;
        for (square, product) in sums {
            squares.zip_mut_with(&square, |sum, &x| *sum += f64::from(x));
            products.zip_mut_with(&product, |sum, &x| *sum += f64::from(x));
        }
    }
    let judges = workers.map(&judging, |&context| seen(&model, checkpoint, data, context))?;
    let n_values = judges.iter().map(|(_, lacks)| lacks.len()).sum::<usize>().max(1) as f64;
    let power = |values: &Array2<f32>| values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let mean = squares.diag().mean().unwrap_or(0.0);
    let decoded = judges.iter().map(|(_, lacks)| power(lacks)).sum::<f64>();
    let mut best = (decoded, Array2::zeros((n, n_bands)));
    let solved = RIDGES.iter().map(|ridge| {
        let mut squares = squares.clone();
        squares.diag_mut().iter_mut().for_each(|square| *square += ridge * mean);
        solve(squares, products.clone()).mapv(|x| x as f32)
    });
    // What there was before may be better than what these recordings teach.
    for map in std::iter::once(map_of(checkpoint, n, n_bands)?).chain(solved) {
        let left = judges.iter().map(|(inputs, lacks)| power(&(lacks - &inputs.dot(&map)))).sum::<f64>();
        if left < best.0 {
            best = (left, map);
        }
    }
    let (refined, map) = best;
    let db = |power: f64| (power / n_values).sqrt() as f32 * DB_PER_UNIT;
    let refined = Refined { decoded_db: db(decoded), refined_db: db(refined) };
    Ok(Fitted { map: map.into_iter().collect(), refined })
}

fn name_of(what: &str) -> String {
    format!("plan.{REFINE}.{what}")
}

/// The model's own map, `[n, n_bands]`: the bias, then a row for every input.
fn map_of(checkpoint: &Checkpoint, n: usize, n_bands: usize) -> Result<Array2<f32>, TrainError> {
    let values = |what| {
        let name = name_of(what);
        let weight = checkpoint.weights.get(&name).ok_or_else(|| TrainError::Best(name))?;
        Ok::<_, TrainError>(weight.values().into_owned())
    };
    let all = [values("bias")?, values("weight")?].concat();
    Ok(Array2::from_shape_vec((n, n_bands), all).map_err(candle_core::Error::wrap)?)
}
