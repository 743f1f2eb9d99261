//! One tensor of a model: floats, or the whole numbers that the CPU engine computes with, as its file holds them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::Tensor;
use ndarray::{ArrayD, IxDyn};

use crate::model::rounding::gain_of;
use crate::simd::panels::Rounded;

/// Weights by name, `plan.*` and `wave.*`.
pub type Weights = BTreeMap<String, Weight>;

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Weight {
    Floats(ArrayD<f32>),
    /// A matrix of a file stored as [`Int8`](super::Precision::Int8): four times smaller, and packed as it is.
    Rounded(Rounded),
}

impl From<ArrayD<f32>> for Weight {
    fn from(floats: ArrayD<f32>) -> Self {
        Self::Floats(floats)
    }
}

impl Weight {
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Floats(floats) => floats.shape().to_vec(),
            Self::Rounded(matrix) => vec![matrix.n_in(), matrix.n_out],
        }
    }

    pub fn n_weights(&self) -> usize {
        match self {
            Self::Floats(floats) => floats.len(),
            Self::Rounded(matrix) => matrix.whole.len(),
        }
    }

    /// Its values as an array; an error of the program if a rounded matrix was put together of rows that are not whole.
    pub fn floats(&self) -> Cow<'_, ArrayD<f32>> {
        match self {
            Self::Floats(floats) => Cow::Borrowed(floats),
            Self::Rounded(matrix) => {
                let floats = ArrayD::from_shape_vec(IxDyn(&self.shape()), matrix.values());
                Cow::Owned(floats.expect("a matrix has whole rows"))
            }
        }
    }

    /// Values in row-major order.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Floats(floats) => match floats.as_slice() {
                Some(values) => Cow::Borrowed(values),
                None => Cow::Owned(floats.iter().copied().collect()),
            },
            Self::Rounded(matrix) => Cow::Owned(matrix.values()),
        }
    }

    /// Changes it as floats, which it is from then on.
    pub fn change(&mut self, change: impl FnOnce(&mut ArrayD<f32>)) {
        let mut floats = self.floats().into_owned();
        change(&mut floats);
        *self = Self::Floats(floats);
    }
}

/// The matrix `name`, row-major, with [its gain](gain_of) multiplied into its rows, and its number of outputs.
pub fn matrix<'a>(weights: &'a Weights, name: &str) -> Option<(Cow<'a, [f32]>, usize)> {
    let weight = weights.get(name)?;
    let &[_, n_out] = &weight.shape()[..] else { return None };
    let mut values = weight.values();
    if let Some(gain) = gain(weights, name) {
        for (row, gain) in values.to_mut().chunks_exact_mut(n_out).zip(gain.iter()) {
            row.iter_mut().for_each(|w| *w *= gain);
        }
    }
    Some((values, n_out))
}

/// [`matrix`] in whole numbers.
pub fn rounded<'a>(weights: &'a Weights, name: &str) -> Option<Cow<'a, Rounded>> {
    match weights.get(name)? {
        Weight::Rounded(matrix) if gain(weights, name).is_none() => Some(Cow::Borrowed(matrix)),
        _ => matrix(weights, name).map(|(values, n_out)| Cow::Owned(Rounded::new(&values, n_out))),
    }
}

/// The gain that has yet to be multiplied into the matrix `name`: none where that was done before it was stored.
fn gain<'a>(weights: &'a Weights, name: &str) -> Option<Cow<'a, [f32]>> {
    let gain = weights.get(&gain_of(name)?)?.values();
    gain.iter().any(|&gain| gain != 1.0).then_some(gain)
}

/// Tensors as weights.
pub fn weights<'a>(tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) -> candle_core::Result<Weights> {
    tensors
        .map(|(name, tensor)| {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            let array = ArrayD::from_shape_vec(IxDyn(tensor.dims()), values).map_err(candle_core::Error::wrap)?;
            Ok((name.clone(), array.into()))
        })
        .collect()
}
