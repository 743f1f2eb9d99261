//! The transformer block: pre-norm attention (QK-norm, RoPE, causal sliding window) and SwiGLU, whole or step by step.
//!
//! Both paths run the same projections; only where keys and values come from differs.

use candle_core::{D, DType, Device, Result, Tensor};

use super::ops::stack::{Layer, stack};
use super::ops::{Ops, plain};
use super::params::{Init, Params, ParamsError};

/// RMSNorm with a learned gain.
pub struct RmsNorm {
    pub(super) gain: Tensor, // (dim)
    ops: &'static Ops,
}

impl RmsNorm {
    pub fn new(params: &mut Params, name: &str, dim: usize) -> std::result::Result<Self, ParamsError> {
        Ok(Self { gain: params.get(name, &[dim], Init::Ones)?, ops: params.ops() })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        (self.ops.rms_norm)(x, &self.gain)
    }
}

/// A linear map with a bias; the weight is stored as `[inputs, outputs]`, so that the product needs no transposition.
pub struct Linear {
    pub(super) weight: Tensor, // (inputs, outputs)
    pub(super) bias: Tensor,   // (outputs)
    ops: &'static Ops,
}

impl Linear {
    /// `weight` and `bias` begin as told.
    pub fn new(
        params: &mut Params,
        name: &str,
        inputs: usize,
        outputs: usize,
        weight: Init,
        bias: Init,
    ) -> std::result::Result<Self, ParamsError> {
        Ok(Self {
            weight: params.get(&format!("{name}.weight"), &[inputs, outputs], weight)?,
            bias: params.get(&format!("{name}.bias"), &[outputs], bias)?,
            ops: params.ops(),
        })
    }

    /// `[..., inputs] -> [..., outputs]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        (self.ops.linear)(x, &self.weight, &self.bias)
    }

    /// [`Linear::forward`] and SiLU.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        (self.ops.silu_linear)(x, &self.weight, &self.bias)
    }
}

/// The weight of a linear map without bias, `[inputs, outputs]`.
pub(super) fn matrix(
    params: &mut Params,
    name: &str,
    inputs: usize,
    outputs: usize,
) -> std::result::Result<Tensor, ParamsError> {
    params.get(&format!("{name}.weight"), &[inputs, outputs], Init::Linear)
}

/// Ring of the last `window` keys and values of one block.
pub struct KvCache {
    pub keys: Tensor,   // (n_heads, window, head_dim)
    pub values: Tensor, // (n_heads, window, head_dim)
}

impl KvCache {
    /// Overwrites one slot; `k` and `v` are `[1, n_heads, 1, head_dim]`.
    fn write(&self, k: &Tensor, v: &Tensor, slot: usize) -> Result<()> {
        self.keys.slice_set(&k.squeeze(0)?.contiguous()?, 1, slot)?;
        self.values.slice_set(&v.squeeze(0)?.contiguous()?, 1, slot)
    }

    /// A copy that shares nothing (tensors clone by reference, and slots are overwritten in place).
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { keys: self.keys.copy()?, values: self.values.copy()? })
    }
}

/// Pre-norm attention and feed-forward, each added to the residual stream.
pub struct Block {
    attention_norm: RmsNorm,
    qkv: Tensor, // (dim, 3 * dim)
    out: Tensor, // (dim, dim)
    feed_forward_norm: RmsNorm,
    up: Tensor,   // (dim, 2 * hidden): gate, value
    down: Tensor, // (hidden, dim)
    n_heads: usize,
    head_dim: usize,
    window: usize,
    ops: &'static Ops,
}

impl Block {
    pub fn new(
        params: &mut Params,
        dim: usize,
        n_heads: usize,
        window: usize,
        hidden_multiple: usize,
    ) -> std::result::Result<Self, ParamsError> {
        let hidden = hidden_multiple * dim;
        Ok(Self {
            attention_norm: RmsNorm::new(params, "attention_norm", dim)?,
            qkv: matrix(params, "qkv", dim, 3 * dim)?,
            out: matrix(params, "out", dim, dim)?,
            feed_forward_norm: RmsNorm::new(params, "feed_forward_norm", dim)?,
            up: matrix(params, "up", dim, 2 * hidden)?,
            down: matrix(params, "down", hidden, dim)?,
            n_heads,
            head_dim: dim / n_heads,
            window,
            ops: params.ops(),
        })
    }

    /// `[batch, len, dim]` -> queries, keys, values `[batch, len, 3 * dim]`.
    fn project(&self, x: &Tensor) -> Result<Tensor> {
        (self.ops.project)(x, &self.attention_norm.gain, &self.qkv)
    }

    /// Adds attention's result and the feed-forward to the residual stream; all `[batch, len, dim]`.
    fn finish(&self, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let x = (self.ops.add_linear)(x, attended, &self.out)?;
        let up = (self.ops.project)(&x, &self.feed_forward_norm.gain, &self.up)?;
        (self.ops.add_swiglu_linear)(&x, &up, &self.down)
    }

    /// The whole sequence from position 0 through several blocks: `[batch, len, dim]` -> same.
    pub fn forward_all(blocks: &[Self], x: &Tensor) -> Result<Tensor> {
        let tracked = |block: &Self| x.track_op() || block.qkv.track_op();
        match blocks.first().filter(|&block| tracked(block)).and_then(|block| block.ops.steps) {
            Some(steps) => stack(steps, x, &blocks.iter().map(Self::layer).collect::<Vec<_>>()),
            None => blocks.iter().try_fold(x.clone(), |x, block| block.forward(&x, None)),
        }
    }

    fn layer(&self) -> Layer<'_> {
        let Self { attention_norm, qkv, out, feed_forward_norm, up, down, n_heads, window, .. } = self;
        Layer {
            weights: [&attention_norm.gain, qkv, out, &feed_forward_norm.gain, up, down],
            n_heads: *n_heads,
            window: *window,
        }
    }

    /// The whole sequence from position 0: `[batch, len, dim]` -> same.
    ///
    /// A `cache` (batch 1) is left as `len` calls of [`Block::step`] would leave it.
    pub fn forward(&self, x: &Tensor, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let qkv = self.project(x)?;
        if let Some(cache) = cache {
            let len = x.dim(1)?;
            let first = len.saturating_sub(self.window);
            let [_, k, v] = plain::split_heads(&qkv.narrow(1, first, len - first)?, self.n_heads, first as u64)?;
            for pos in first..len {
                cache.write(&k.narrow(2, pos - first, 1)?, &v.narrow(2, pos - first, 1)?, pos % self.window)?;
            }
        }
        self.finish(x, &(self.ops.attention)(&qkv, self.n_heads, self.window)?)
    }

    /// One position: `[1, 1, dim]` -> same; `pos` counts from the stream's first step.
    pub fn step(&self, x: &Tensor, cache: &mut KvCache, pos: u64) -> Result<Tensor> {
        let [q, k, v] = plain::split_heads(&self.project(x)?, self.n_heads, pos)?;
        let slot = (pos % self.window as u64) as usize;
        cache.write(&k, &v, slot)?;
        let filled = (pos + 1).min(self.window as u64) as usize;
        let keys = cache.keys.narrow(1, 0, filled)?;
        let scores = (q.squeeze(0)?.matmul(&keys.t()?)? / (self.head_dim as f64).sqrt())?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let attended = weights.matmul(&cache.values.narrow(1, 0, filled)?)?;
        self.finish(x, &plain::join_heads(&attended.unsqueeze(0)?)?)
    }

    pub fn empty_cache(&self) -> Result<KvCache> {
        let shape = (self.n_heads, self.window, self.head_dim);
        Ok(KvCache {
            keys: Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
            values: Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
        })
    }
}
