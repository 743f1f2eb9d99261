//! The transformer block: pre-norm attention (QK-norm, RoPE, causal sliding window) and SwiGLU, whole or step by step.
//!
//! Plain candle throughout: this is the readable truth that the fast engines are tested against. Both paths run the
//! same projections; only where keys and values come from differs.

use candle_core::{D, DType, Device, Result, Tensor};

use super::params::{Init, Params, ParamsError};

const NORM_EPS: f64 = 1e-6;
const ROPE_BASE: f64 = 10_000.0;

/// `x / rms(x)` over the last dimension (Zhang and Sennrich, 2019), without gain.
pub fn rms_normalize(x: &Tensor) -> Result<Tensor> {
    let power = (x.sqr()?.mean_keepdim(D::Minus1)? + NORM_EPS)?;
    x.broadcast_div(&power.sqrt()?)
}

/// RMSNorm with a learned gain.
pub struct RmsNorm {
    gain: Tensor, // (dim)
}

impl RmsNorm {
    pub fn new(params: &mut Params, name: &str, dim: usize) -> std::result::Result<Self, ParamsError> {
        Ok(Self { gain: params.get(name, &[dim], Init::Ones)? })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_normalize(x)?.broadcast_mul(&self.gain)
    }
}

/// A linear map stored as `[inputs, outputs]`, so that the product needs no transposition.
pub struct Linear {
    weight: Tensor,       // (inputs, outputs)
    bias: Option<Tensor>, // (outputs)
}

impl Linear {
    pub fn new(
        params: &mut Params,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ParamsError> {
        Ok(Self { weight: params.get(&format!("{name}.weight"), &[inputs, outputs], Init::Linear)?, bias: None })
    }

    /// With a bias; `weight` and `bias` begin as told.
    pub fn with_bias(
        params: &mut Params,
        name: &str,
        inputs: usize,
        outputs: usize,
        weight: Init,
        bias: Init,
    ) -> std::result::Result<Self, ParamsError> {
        Ok(Self {
            weight: params.get(&format!("{name}.weight"), &[inputs, outputs], weight)?,
            bias: Some(params.get(&format!("{name}.bias"), &[outputs], bias)?),
        })
    }

    /// `[..., inputs] -> [..., outputs]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims();
        let (inputs, outputs) = self.weight.dims2()?;
        let rows = x.elem_count() / inputs;
        let mut y = x.reshape((rows, inputs))?.matmul(&self.weight)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let mut shape = dims.to_vec();
        shape[dims.len() - 1] = outputs;
        y.reshape(shape)
    }
}

/// Angles of rotary position embedding (Su et al., 2021) for positions `start..start + len`: cosines and sines,
/// each `[len, head_dim / 2]`. Angles are reduced in f64, so that positions may grow without bound.
pub fn rope_table(start: u64, len: usize, head_dim: usize) -> Result<(Tensor, Tensor)> {
    let half = head_dim / 2;
    let (mut cos, mut sin) = (Vec::with_capacity(len * half), Vec::with_capacity(len * half));
    for pos in start..start + len as u64 {
        for i in 0..half {
            let angle = pos as f64 * ROPE_BASE.powf(-2.0 * i as f64 / head_dim as f64);
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
    }
    Ok((Tensor::from_vec(cos, (len, half), &Device::Cpu)?, Tensor::from_vec(sin, (len, half), &Device::Cpu)?))
}

/// Rotates the first half of the features against the second: `[batch, n_heads, len, head_dim]`.
fn rope(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let rotated_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let rotated_b = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Tensor::cat(&[rotated_a, rotated_b], D::Minus1)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    candle_nn::ops::softmax(x, D::Minus1)
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
    qkv: Linear, // dim -> 3 * dim
    out: Linear, // dim -> dim
    feed_forward_norm: RmsNorm,
    up: Linear,   // dim -> 2 * hidden: gate, value
    down: Linear, // hidden -> dim
    n_heads: usize,
    head_dim: usize,
    window: usize,
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
            qkv: Linear::new(params, "qkv", dim, 3 * dim)?,
            out: Linear::new(params, "out", dim, dim)?,
            feed_forward_norm: RmsNorm::new(params, "feed_forward_norm", dim)?,
            up: Linear::new(params, "up", dim, 2 * hidden)?,
            down: Linear::new(params, "down", hidden, dim)?,
            n_heads,
            head_dim: dim / n_heads,
            window,
        })
    }

    /// `[batch, len, dim]` -> queries, keys, values, each `[batch, n_heads, len, head_dim]`, rotated to `start..`.
    fn project(&self, x: &Tensor, rope_angles: &(Tensor, Tensor)) -> Result<[Tensor; 3]> {
        let (batch, len, dim) = x.dims3()?;
        let qkv = self.qkv.forward(&self.attention_norm.forward(x)?)?;
        let part = |i: usize| {
            qkv.narrow(2, i * dim, dim)?
                .reshape((batch, len, self.n_heads, self.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = rope(&rms_normalize(&part(0)?)?, rope_angles)?;
        let k = rope(&rms_normalize(&part(1)?)?, rope_angles)?;
        Ok([q, k, part(2)?])
    }

    /// Adds attention's result and the feed-forward to the residual stream.
    fn finish(&self, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let attended = attended.transpose(1, 2)?.contiguous()?.reshape(x.shape())?;
        let x = (x + self.out.forward(&attended)?)?;
        let up = self.up.forward(&self.feed_forward_norm.forward(&x)?)?;
        let hidden = up.dim(D::Minus1)? / 2;
        let gate = up.narrow(D::Minus1, 0, hidden)?;
        let value = up.narrow(D::Minus1, hidden, hidden)?;
        let gated = (gate.silu()? * value)?;
        &x + self.down.forward(&gated)?
    }

    /// The whole sequence from position 0: `[batch, len, dim]` -> same.
    ///
    /// A `cache` (batch 1) is left as `len` calls of [`Block::step`] would leave it.
    pub fn forward(&self, x: &Tensor, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        let [q, k, v] = self.project(x, &rope_table(0, len, self.head_dim)?)?;
        if let Some(cache) = cache {
            for pos in len.saturating_sub(self.window)..len {
                cache.write(&k.narrow(2, pos, 1)?, &v.narrow(2, pos, 1)?, pos % self.window)?;
            }
        }
        let window = self.window.min(len);
        let n_blocks = len.div_ceil(window);
        let padding = n_blocks * window - len;
        // Queries in blocks of `window`; each block sees its own keys and those of the block before it.
        let rows = batch * self.n_heads;
        let blocks = |t: &Tensor| -> Result<Tensor> {
            t.pad_with_zeros(2, 0, padding)?.reshape((rows, n_blocks, window, self.head_dim))
        };
        let (q, k, v) = (blocks(&q)?, blocks(&k)?, blocks(&v)?);
        let attended = if n_blocks == 1 {
            attend(&q, &k, &v, &mask(window, window, 0)?)?
        } else {
            let with_previous = |t: &Tensor| -> Result<Tensor> {
                let previous = t.narrow(1, 0, n_blocks - 1)?.pad_with_zeros(1, 1, 0)?;
                Tensor::cat(&[&previous, t], 2)
            };
            let first = mask(window, 2 * window, window)?;
            let later = mask_within(window)?;
            let masks = Tensor::cat(
                &[
                    first.unsqueeze(0)?,
                    later.unsqueeze(0)?.broadcast_as((n_blocks - 1, window, 2 * window))?.contiguous()?,
                ],
                0,
            )?;
            attend(&q, &with_previous(&k)?, &with_previous(&v)?, &masks)?
        };
        let attended = attended.reshape((batch, self.n_heads, n_blocks * window, self.head_dim))?.narrow(2, 0, len)?;
        self.finish(x, &attended)
    }

    /// One position: `[1, 1, dim]` -> same; `pos` counts from the stream's first step.
    pub fn step(&self, x: &Tensor, cache: &mut KvCache, pos: u64) -> Result<Tensor> {
        let [q, k, v] = self.project(x, &rope_table(pos, 1, self.head_dim)?)?;
        let slot = (pos % self.window as u64) as usize;
        cache.write(&k, &v, slot)?;
        let filled = (pos + 1).min(self.window as u64) as usize;
        let keys = cache.keys.narrow(1, 0, filled)?;
        let scores = (q.squeeze(0)?.matmul(&keys.t()?)? / (self.head_dim as f64).sqrt())?;
        let attended = softmax(&scores)?.matmul(&cache.values.narrow(1, 0, filled)?)?;
        self.finish(x, &attended.unsqueeze(0)?)
    }

    pub fn empty_cache(&self) -> Result<KvCache> {
        let shape = (self.n_heads, self.window, self.head_dim);
        Ok(KvCache {
            keys: Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
            values: Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
        })
    }
}

/// Softmax attention of blocks: q `[rows, n, i, d]`, k and v `[rows, n, j, d]`, mask `[i, j]` or `[n, i, j]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let head_dim = q.dim(D::Minus1)?;
    let scores = (q.contiguous()?.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
    softmax(&scores.broadcast_add(mask)?)?.matmul(&v.contiguous()?)
}

/// Additive causal mask: query i sees key j if `offset <= j <= i + offset`.
fn mask(queries: usize, keys: usize, offset: usize) -> Result<Tensor> {
    mask_from(queries, keys, |i, j| j >= offset && j <= i + offset)
}

/// Additive mask of a block after the first: query i of `window` sees the `window` keys that end with its own.
fn mask_within(window: usize) -> Result<Tensor> {
    mask_from(window, 2 * window, |i, j| j > i && j <= i + window)
}

fn mask_from(queries: usize, keys: usize, sees: impl Fn(usize, usize) -> bool) -> Result<Tensor> {
    let values = (0..queries * keys).map(|at| if sees(at / keys, at % keys) { 0.0f32 } else { -1e4 }).collect();
    Tensor::from_vec(values, (queries, keys), &Device::Cpu)
}
