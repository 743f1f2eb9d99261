//! Named tensors of a model: made new from a seed, or taken from a checkpoint with every shape checked.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

use super::ops::{self, FUSED, Inner, Ops, PLAIN};
use crate::rng::Rng;

/// How a new tensor begins.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    Zeros,
    Ones,
    /// Uniform in +-1/sqrt(rows): the usual start of a linear map of `rows` inputs.
    Linear,
    /// Normal with this standard deviation.
    Normal(f32),
    /// The given value for column c of n: evenly spaced from `from` to `to`, repeated every `period` columns.
    Ramp {
        from: f32,
        to: f32,
        period: usize,
    },
}

/// Why stored tensors do not make the model.
#[derive(Debug, thiserror::Error)]
pub enum ParamsError {
    #[error("tensor '{0}' is missing")]
    Missing(String),
    #[error("tensor '{name}' has shape {got:?}, the configuration wants {expected:?}")]
    Shape { name: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("tensor '{0}' belongs to no part of the model")]
    Unknown(String),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

enum Source {
    New { rng: Rng, vars: BTreeMap<String, Var> },
    Stored { tensors: BTreeMap<String, Tensor> },
    Shapes { shapes: BTreeMap<String, Vec<usize>> },
}

/// Hands out the tensors of a model while it is built; a prefix grows with [`Params::under`].
pub struct Params {
    source: Source,
    prefix: Vec<String>,
    ops: &'static Ops,
    device: Device,
}

impl Params {
    /// New trainable tensors, a pure function of `seed`.
    pub fn new(seed: u64) -> Self {
        Self::from(Source::New { rng: Rng::new(seed), vars: BTreeMap::new() })
    }

    /// The tensors of a checkpoint.
    pub fn stored(tensors: BTreeMap<String, Tensor>) -> Self {
        Self::from(Source::Stored { tensors })
    }

    fn from(source: Source) -> Self {
        Self { source, prefix: Vec::new(), ops: &FUSED, device: Device::Cpu }
    }

    /// New tensors lie on this device, and the model that is built computes there.
    pub fn on(self, device: &Device, inner: Inner) -> Self {
        Self { ops: ops::of(device, inner), device: device.clone(), ..self }
    }

    /// Where the model that is built computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The model that is built computes by [`PLAIN`], for comparisons.
    pub fn plain(self) -> Self {
        Self { ops: &PLAIN, ..self }
    }

    /// What the model that is built computes with.
    pub fn ops(&self) -> &'static Ops {
        self.ops
    }

    /// No tensors, only a check that those of a checkpoint have the model's names and `shapes`.
    pub fn check(shapes: BTreeMap<String, Vec<usize>>) -> Self {
        Self::from(Source::Shapes { shapes })
    }

    /// Runs `build` with `name` added to the prefix.
    pub fn under<T>(&mut self, name: impl ToString, build: impl FnOnce(&mut Self) -> T) -> T {
        self.prefix.push(name.to_string());
        let built = build(self);
        self.prefix.pop();
        built
    }

    /// The tensor `prefix.name` of this shape.
    pub fn get(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor, ParamsError> {
        let mut path = self.prefix.join(".");
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(name);
        match &mut self.source {
            Source::New { rng, vars } => {
                let var = Var::from_tensor(&Tensor::from_vec(initial(init, shape, rng), shape, &self.device)?)?;
                let tensor = var.as_tensor().clone();
                vars.insert(path, var);
                Ok(tensor)
            }
            Source::Stored { tensors } => {
                let tensor = tensors.remove(&path).ok_or_else(|| ParamsError::Missing(path.clone()))?;
                expect(path, shape, tensor.dims())?;
                Ok(tensor)
            }
            Source::Shapes { shapes } => {
                let got = shapes.remove(&path).ok_or_else(|| ParamsError::Missing(path.clone()))?;
                expect(path, shape, &got)?;
                Ok(Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
            }
        }
    }

    /// The trainable tensors made so far, by name (none for a stored model).
    pub fn into_vars(self) -> BTreeMap<String, Var> {
        match self.source {
            Source::New { vars, .. } => vars,
            Source::Stored { .. } | Source::Shapes { .. } => BTreeMap::new(),
        }
    }

    /// Checks that no stored tensor was left over.
    pub fn finish(self) -> Result<(), ParamsError> {
        let left = match self.source {
            Source::New { .. } => None,
            Source::Stored { tensors } => tensors.into_keys().next(),
            Source::Shapes { shapes } => shapes.into_keys().next(),
        };
        left.map_or(Ok(()), |name| Err(ParamsError::Unknown(name)))
    }
}

fn expect(name: String, expected: &[usize], got: &[usize]) -> Result<(), ParamsError> {
    if got == expected {
        Ok(())
    } else {
        Err(ParamsError::Shape { name, expected: expected.to_vec(), got: got.to_vec() })
    }
}

fn initial(init: Init, shape: &[usize], rng: &mut Rng) -> Vec<f32> {
    let n = shape.iter().product();
    match init {
        Init::Zeros => vec![0.0; n],
        Init::Ones => vec![1.0; n],
        Init::Linear => {
            let bound = 1.0 / (shape[0] as f32).sqrt();
            (0..n).map(|_| (2.0 * rng.uniform() - 1.0) * bound).collect()
        }
        Init::Normal(deviation) => (0..n).map(|_| deviation * rng.normal()).collect(),
        Init::Ramp { from, to, period } => {
            let steps = (period.max(2) - 1) as f32;
            (0..n)
                .map(|i| if period < 2 { 0.5 * (from + to) } else { from + (to - from) * (i % period) as f32 / steps })
                .collect()
        }
    }
}
