//! Linear maps of a checkpoint, packed for the kernels: whole numbers of 8 bits, or f32.

use super::Precision;
use crate::checkpoint::{Weights, matrix, rounded};
use crate::engine::EngineError;
use crate::model::rounding::is_rounded;
use crate::simd::Kernels;
use crate::simd::panels::{PanelsF32, PanelsI8};

/// The weights of a checkpoint below a name.
#[derive(Clone)]
pub struct Source<'a> {
    weights: &'a Weights,
    prefix: String,
    pub precision: Precision,
}

impl<'a> Source<'a> {
    pub fn new(weights: &'a Weights, prefix: &str, precision: Precision) -> Self {
        Self { weights, prefix: prefix.to_owned(), precision }
    }

    pub fn under(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}.{name}", self.prefix), ..self.clone() }
    }

    /// Its values, row-major.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, EngineError> {
        let full = format!("{}.{name}", self.prefix);
        let weight = self.weights.get(&full).ok_or_else(|| EngineError::State(format!("the model has no '{full}'")))?;
        Ok(weight.values().into_owned())
    }

    /// The map of `name.weight` (and `name.bias` if there is one): in whole numbers if the engine is and
    /// [the matrix may be](is_rounded).
    pub fn linear(&self, name: &str) -> Result<Linear, EngineError> {
        let full = format!("{}.{name}.weight", self.prefix);
        let no_matrix = || EngineError::State(format!("the model has no matrix '{full}'"));
        let map = match self.precision {
            Precision::Int8 if is_rounded(&full) => Map::I8(rounded(self.weights, &full).ok_or_else(no_matrix)?.pack()),
            _ => {
                let (values, n_out) = matrix(self.weights, &full).ok_or_else(no_matrix)?;
                Map::F32(PanelsF32::pack(&values, n_out))
            }
        };
        let bias = match self.weights.contains_key(&format!("{}.{name}.bias", self.prefix)) {
            true => self.values(&format!("{name}.bias"))?,
            false => Vec::new(),
        };
        Ok(Linear { map, bias })
    }
}

enum Map {
    I8(PanelsI8),
    F32(PanelsF32),
}

/// `y = x W + b`.
pub struct Linear {
    map: Map,
    /// Empty where there is none.
    bias: Vec<f32>,
}

/// Room for one map's inputs.
#[derive(Default)]
pub struct LinearWork {
    quantized: Vec<i8>,
    scales: Vec<f32>,
}

impl Linear {
    pub fn n_in(&self) -> usize {
        match &self.map {
            Map::I8(w) => w.n_in,
            Map::F32(w) => w.n_in,
        }
    }

    pub fn n_out(&self) -> usize {
        match &self.map {
            Map::I8(w) => w.n_out,
            Map::F32(w) => w.n_out,
        }
    }

    /// x `[rows, n_in]` -> out `[rows, n_out]`; `normalize` divides each row by its root mean square first.
    pub fn forward(&self, kernels: &Kernels, x: &[f32], normalize: bool, work: &mut LinearWork, out: &mut [f32]) {
        let scale = |row: &[f32]| if normalize { (kernels.inverse_rms)(row) } else { 1.0 };
        let LinearWork { quantized, scales } = work;
        scales.clear();
        match &self.map {
            Map::I8(w) => {
                let depth = 4 * w.groups;
                quantized.resize(x.len() / w.n_in * depth, 0);
                for (row, q) in x.chunks_exact(w.n_in).zip(quantized.chunks_exact_mut(depth)) {
                    scales.push(scale(row) * (kernels.quantize)(row, q));
                }
                (kernels.gemm_i8)(w, quantized, scales, out);
            }
            Map::F32(w) => {
                scales.extend(x.chunks_exact(w.n_in).map(scale));
                (kernels.gemm_f32)(w, x, scales, out);
            }
        }
        if !self.bias.is_empty() {
            for row in out.chunks_exact_mut(self.bias.len()) {
                add(row, &self.bias);
            }
        }
    }
}

/// `x += y`
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Makes `buffer` n long; what it held is of no use.
pub fn sized(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    buffer.resize(n, 0.0);
    &mut buffer[..n]
}
