//! The operations that both transformers are made of, each with its gradient: fused on plain slices, and as they read.
//!
//! [`FUSED`] is what everything computes with on the CPU: one candle operation each, that works on rows while they lie in the cache
//! and leaves no more behind than its result; where gradients are wanted, a whole stack of blocks is one ([`stack`]). [`plain`] composes the same of candle's own operations, is their specification, and the
//! oracle of every test; [`PLAIN`] builds a whole model of it. Models on a GPU take the table of `cuda`.
//!
//! Training runs one excerpt per thread, so backward passes use one; forward passes share rows among a pool's threads. The
//! results are the same bits for any number of them.

pub(crate) mod attention;
mod bounds;
mod cross_entropy;
mod gather;
mod linear;
pub(crate) mod matmul;
mod mixture;
mod norm;
pub mod plain;
mod spread;
pub mod stack;
mod swiglu;

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, Layout, Result, Storage, StorageRef, Tensor, bail};
use rayon::prelude::*;

use super::head::Targets;

/// A table of operations; `[..]` stands for any leading dimensions.
pub struct Ops {
    /// x `[.., dim]`, gain `[dim]` -> `x / rms(x) * gain` (Zhang and Sennrich, 2019).
    pub rms_norm: fn(&Tensor, &Tensor) -> Result<Tensor>,
    /// x `[.., dim]`, gain `[dim]`, weight `[dim, outputs]` -> `rms_norm(x) weight`.
    pub norm_linear: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// The same where a block begins; on a GPU what it gives, and what follows from that until the residual stream is added to, may be
    /// of fewer bits.
    pub project: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// x `[.., inputs]`, weight `[inputs, outputs]`, bias `[outputs]` -> `x weight + bias`.
    pub linear: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// `silu(x weight + bias)`, shapes as for `linear`.
    pub silu_linear: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// residual (as many values as the product), x `[.., inputs]`, weight `[inputs, outputs]` -> `residual + x weight`, shaped
    /// as the residual.
    pub add_linear: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// residual `[.., dim]`, up `[.., 2 * hidden]` = gate and value, weight `[hidden, dim]` -> `residual + (silu(gate) value)
    /// weight` (SwiGLU: Shazeer, 2020).
    pub add_swiglu_linear: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// Queries, keys and values `[batch, len, 3 * dim]`, heads side by side in each, `n_heads`, `window` -> `[batch, len, dim]`:
    /// QK-norm, RoPE from position 0, causal attention of each position to the last `window` with its own.
    pub attention: fn(&Tensor, usize, usize) -> Result<Tensor>,
    /// table `[batch, frames, period, dim]`, `len` -> `[batch, len, dim]`: position i takes row `i % period` of its frame.
    pub spread: fn(&Tensor, usize) -> Result<Tensor>,
    /// x `[.., dim]`, table `[rows, dim]`, for every row of x equally many indices -> x plus the table's rows of these.
    pub gather_add: fn(&Tensor, &Tensor, &[u32]) -> Result<Tensor>,
    /// head `[batch, time, 3k]`, bias `[3k]`, planned log scales `[batch, frames, slices, k]`, limit -> `head + bias`, but the
    /// last third is `planned + limit tanh(.. / limit)`.
    pub bound_scales: fn(&Tensor, &Tensor, &Tensor, f32) -> Result<Tensor>,
    /// head `[.., 3k]` -> -ln P of the target of each row, `[n]`, in nats.
    pub nll: fn(&Tensor, &Targets) -> Result<Tensor>,
    /// logits `[.., n]`, a target for each row -> `-ln softmax(logits)[target]`, `[rows]`.
    pub cross_entropy: fn(&Tensor, &[u32]) -> Result<Tensor>,
    /// What stacks of blocks are trained by, as one operation; without it each operation is candle's to go back through.
    pub steps: Option<&'static stack::Steps>,
}

/// One candle operation each.
pub static FUSED: Ops = Ops {
    rms_norm: norm::rms_norm,
    norm_linear: norm::norm_linear,
    project: norm::norm_linear,
    linear: linear::linear,
    silu_linear: linear::silu_linear,
    add_linear: linear::add_linear,
    add_swiglu_linear: swiglu::add_swiglu_linear,
    attention: attention::attention,
    spread: spread::spread,
    gather_add: gather::gather_add,
    bound_scales: bounds::bound_scales,
    nll: mixture::nll,
    cross_entropy: cross_entropy::cross_entropy,
    steps: Some(&stack::STEPS),
};

/// Composed of candle's operations.
pub static PLAIN: Ops = Ops {
    rms_norm: plain::rms_norm,
    norm_linear: plain::norm_linear,
    project: plain::norm_linear,
    linear: plain::linear,
    silu_linear: plain::silu_linear,
    add_linear: plain::add_linear,
    add_swiglu_linear: plain::add_swiglu_linear,
    attention: plain::attention,
    spread: plain::spread,
    gather_add: plain::gather_add,
    bound_scales: plain::bound_scales,
    nll: plain::nll,
    cross_entropy: plain::cross_entropy,
    steps: None,
};

/// What lies between the maps of a block while a model is trained on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inner {
    #[default]
    F32,
    Bf16,
}

/// What a model on this device computes with; the CPU computes in f32.
pub fn of(device: &Device, inner: Inner) -> &'static Ops {
    match (device, inner) {
        (Device::Cpu, _) => &FUSED,
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), Inner::F32) => &crate::cuda::OPS,
        #[cfg(feature = "cuda")]
        (Device::Cuda(_), Inner::Bf16) => &crate::cuda::OPS_BF16,
        _ => &PLAIN,
    }
}

/// Rows that are worked on at a time: their activations lie in the level-2 cache, and products of so many are efficient.
const ROWS: usize = 256;

/// The values of a contiguous f32 tensor on the CPU, which stay borrowed.
struct Values<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(_)) = &*storage else { bail!("f32 on the CPU expected, got {tensor:?}") };
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("a contiguous tensor expected") };
        Ok(Self { storage, range: from..to })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[],
        }
    }
}

/// What an operation is given of a contiguous f32 tensor.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("a contiguous tensor expected") };
    Ok(&storage.as_slice::<f32>()?[from..to])
}

/// A gradient, shaped as the tensor that it belongs to.
fn gradient(values: Vec<f32>, of: &Tensor) -> Result<Option<Tensor>> {
    Tensor::from_vec(values, of.shape(), of.device()).map(Some)
}

/// The size of the last dimension.
fn width(shape: &Layout) -> Result<usize> {
    match shape.dims().last() {
        Some(&width) if width > 0 => Ok(width),
        _ => bail!("rows without values: {:?}", shape.shape()),
    }
}

/// Calls `work(room, i, chunk)` for every `n` values of `out`; `room` is scratch of `n_room` values. The threads of the pool
/// share the work, if there are several.
fn in_chunks(out: &mut [f32], n: usize, n_room: usize, work: impl Fn(&mut [f32], usize, &mut [f32]) + Sync) {
    if out.len() <= n || rayon::current_num_threads() == 1 {
        let mut room = vec![0.0; n_room];
        out.chunks_mut(n).enumerate().for_each(|(i, chunk)| work(&mut room, i, chunk));
    } else {
        let chunks = out.par_chunks_mut(n).enumerate();
        chunks.for_each_init(|| vec![0.0; n_room], |room, (i, chunk)| work(room, i, chunk));
    }
}

/// Calls `work(room, first row, rows)` for [`ROWS`] rows of `out`, each of `width` values, at a time; as [`in_chunks`].
fn by_rows(out: &mut [f32], width: usize, n_room: usize, work: impl Fn(&mut [f32], usize, &mut [f32]) + Sync) {
    in_chunks(out, ROWS * width, n_room, |room, i, rows| work(room, i * ROWS, rows));
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::codec::N_CODES;
    use crate::model::Model;
    use crate::model::config::ModelConfig;
    use crate::model::features::{N_FEATURES, N_TOKEN_VALUES};
    use crate::model::params::Params;
    use crate::model::wave_transformer::{PLAN_FRAMES, WaveInputs};
    use crate::rng::Rng;
    use crate::simd::{Isa, with_loops_of};

    fn random(shape: &[usize], rng: &mut Rng) -> Tensor {
        let values = (0..shape.iter().product()).map(|_| 0.3 * rng.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn codes(shape: &[usize], below: usize, rng: &mut Rng) -> Tensor {
        let values = (0..shape.iter().product()).map(|_| rng.below(below) as u32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Bits of a loss and of the gradients of all parameters.
    fn bits(loss: &Tensor, vars: &[&Var]) -> Vec<u32> {
        let gradients = loss.mean_all().unwrap().backward().unwrap();
        let of = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let gradients = vars.iter().filter_map(|var| gradients.get(var)).flat_map(of);
        of(loss).into_iter().chain(gradients).map(f32::to_bits).collect()
    }

    #[test]
    fn losses_and_gradients_are_the_same_bits_on_every_instruction_set() {
        let mut rng = Rng::new(1);
        let config = ModelConfig::preset("tiny").unwrap();
        let (n_bands, frames) = (10, 2);
        let time = frames * config.plan.hop;
        let mut params = Params::new(1);
        let model = Model::new(&mut params, &config, n_bands).unwrap();
        let vars = params.into_vars();
        for var in vars.values() {
            // Heads begin at zero, and no gradient passes them.
            var.set(&(var.as_tensor() + random(var.dims(), &mut rng)).unwrap()).unwrap();
        }
        let inputs = WaveInputs {
            token_codes: codes(&[1, model.wave.history() + time], N_CODES, &mut rng),
            token_values: random(&[1, model.wave.history() + time, N_TOKEN_VALUES], &mut rng),
            features: random(&[1, time, N_FEATURES], &mut rng),
            past_codes: codes(&[1, time], N_CODES, &mut rng),
            residual_codes: codes(&[1, time], N_CODES, &mut rng),
            plan: random(&[1, PLAN_FRAMES - 1 + frames, n_bands], &mut rng),
        };
        let mut targets = Targets::default();
        for _ in 0..time {
            let forecasts = [0.3 * rng.uniform(), -0.2 * rng.uniform()];
            targets.push(rng.below(N_CODES) as u16, forecasts, -3.0, &config.codec);
        }
        let plan_tokens = codes(&[1, 70, config.plan.n_codebooks], config.plan.n_entries, &mut rng);
        let plan_bands = random(&[1, 70, n_bands], &mut rng);
        let vars: Vec<&Var> = vars.values().collect();
        let compute = || {
            let wave = (FUSED.nll)(&model.wave.forward(&inputs).unwrap(), &targets).unwrap();
            let plan = model.plan.nll(&plan_tokens, &plan_bands, None).unwrap();
            [bits(&wave, &vars), bits(&plan, &vars)]
        };
        // One thread, so that all loops run on the one that has chosen.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let on = |isa| pool.install(|| with_loops_of(isa, compute));
        let expected = on(Isa::Scalar);
        assert!(expected.iter().all(|bits| bits.iter().any(|&x| x != 0)));
        for isa in Isa::available() {
            assert!(on(isa) == expected, "{}", isa.name());
        }
    }
}
