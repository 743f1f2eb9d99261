//! Causal sliding-window attention of tensors, with gradients, by kernels/attention_window.cu.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, DeviceLocation, Error, Result, Tensor, bail};

use super::launch::{AttentionShape, Element, HeadsShape};
use super::memory::{Fresh, address, element, gpu, launch, of_three};
use crate::model::ops::attention::rope_angles;
use crate::model::ops::stack::Backward;

const NAME: &str = "attention_window";

/// `softmax(q k^T / sqrt(head_dim)) v` where query i sees keys `i - window + 1 ..= i`: q `[batch, n_heads, len, head_dim]`, k
/// and v `[batch, n_kv_heads, len, head_dim]` -> as q. All f32 or all bf16, sums in f32. The same bits every time.
///
/// # Errors
/// When the tensors are not on a CUDA device, or no kernel serves their shapes or type.
pub fn attention_window(q: &Tensor, k: &Tensor, v: &Tensor, window: usize) -> Result<Tensor> {
    let heads = Heads { q: q.contiguous()?, k: k.contiguous()?, v: v.contiguous()?, window, joined: false };
    let (o, lse) = heads.forward()?;
    let [q, k, v] = [heads.q.clone(), heads.k.clone(), heads.v.clone()];
    of_three(NAME, [&q, &k, &v], o, move |o, d_o| Ok(heads.backward(o, &lse, d_o)?.map(Fresh::tensor)))
}

/// Queries, keys and values `[batch, len, 3 * dim]` of `n_heads`, heads side by side in each -> `[batch, len, dim]`: QK-norm, RoPE from
/// position 0, causal attention of each position to the last `window` with its own; f32 or bf16, sums in f32. With it, the gradient of
/// queries, keys and values by the result's.
///
/// # Errors
/// Likewise.
pub fn attention(qkv: &Tensor, n_heads: usize, window: usize) -> Result<(Fresh, Backward<1>)> {
    let (qkv, element) = (qkv.contiguous()?, element(qkv)?);
    let (batch, len, width) = qkv.dims3()?;
    if n_heads == 0 || !width.is_multiple_of(3 * n_heads) {
        bail!("attention: {:?} of {n_heads} heads", qkv.shape());
    }
    let device = gpu(&qkv)?.clone();
    let (dim, head_dim) = (width / 3, width / 3 / n_heads);
    let shape = HeadsShape { batch, len, n_heads, head_dim };
    let mut args = shape.args().map_err(Error::wrap)?;
    let turns = turns(len, head_dim, qkv.device())?;
    (args.qkv, args.turns) = (address(&qkv)?, address(&turns)?);
    let heads = || Fresh::new((batch, n_heads, len, head_dim), element, &device);
    let [q, k, v] = [heads()?, heads()?, heads()?];
    (args.q, args.k, args.v) = (q.address()?, k.address()?, v.address()?);
    // SAFETY: the sizes are those of `shape`.
    unsafe { launch(&device, &shape.forward(element), &args) }?;
    let heads = Heads { q: q.tensor(), k: k.tensor(), v: v.tensor(), window, joined: true };
    let (o, lse) = heads.forward()?;
    let o = o.tensor();
    let result = Fresh::copy(&o, (batch, len, dim))?;
    let back = move |d: &Tensor| {
        let [d_q, d_k, d_v] = heads.backward(&o, &lse, &d.contiguous()?)?;
        let d_qkv = Fresh::new((batch, len, width), element, &device)?;
        let mut args = args;
        (args.qkv, args.turns) = (address(&qkv)?, address(&turns)?);
        (args.d_q, args.d_k, args.d_v) = (d_q.address()?, d_k.address()?, d_v.address()?);
        args.d_qkv = d_qkv.address()?;
        // SAFETY: as above.
        unsafe { launch(&device, &shape.backward(element), &args) }?;
        Ok([d_qkv.tensor()])
    };
    Ok((result, Box::new(back)))
}

/// Cosines and sines of at least `len` positions, `[positions, head_dim]`, which stay on the GPU.
fn turns(len: usize, head_dim: usize, device: &Device) -> Result<Tensor> {
    static KEPT: Mutex<BTreeMap<(usize, usize), Tensor>> = Mutex::new(BTreeMap::new());
    let DeviceLocation::Cuda { gpu_id } = device.location() else { bail!("attention: the tensors are not on a GPU") };
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let of = kept.get(&(gpu_id, head_dim)).filter(|turns| turns.dims()[0] >= len && turns.device().same_device(device));
    if let Some(turns) = of {
        return Ok(turns.clone());
    }
    let angles = rope_angles(len, head_dim);
    let turns = Tensor::from_slice(&angles[..len * head_dim], (len, head_dim), device)?;
    kept.insert((gpu_id, head_dim), turns.clone());
    Ok(turns)
}

/// What attention is computed of; contiguous.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: usize,
    /// As in [`AttentionShape`].
    joined: bool,
}

impl Heads {
    fn shape(&self) -> Result<AttentionShape> {
        let Self { q, k, v, window, joined } = self;
        let (batch, n_heads, len, head_dim) = q.dims4()?;
        let (k_batch, n_kv_heads, k_len, k_dim) = k.dims4()?;
        if k.dims() != v.dims()
            || (k_batch, k_len, k_dim) != (batch, len, head_dim)
            || [k.dtype(), v.dtype()] != [q.dtype(); 2]
        {
            bail!("{NAME}: queries {q:?}, keys {k:?} and values {v:?} do not go together");
        }
        Ok(AttentionShape { batch, n_heads, n_kv_heads, len, head_dim, window: *window, joined: *joined })
    }

    /// The output and the log-sum-exp of each query's scores, `[batch, n_heads, len]`.
    fn forward(&self) -> Result<(Fresh, Tensor)> {
        let shape = self.shape()?;
        let (device, element) = (gpu(&self.q)?, element(&self.q)?);
        let mut args = shape.args().map_err(Error::wrap)?;
        let o = Fresh::new(self.q.shape(), element, device)?;
        let lse = Fresh::new((shape.batch, shape.n_heads, shape.len), Element::F32, device)?;
        (args.q, args.k, args.v) = (address(&self.q)?, address(&self.k)?, address(&self.v)?);
        (args.o, args.lse) = (o.address()?, lse.address()?);
        // SAFETY: the sizes follow from `shape`, which the tensors have.
        unsafe { launch(device, &shape.forward(element), &args) }?;
        Ok((o, lse.tensor()))
    }

    /// Gradients of queries, keys and values from the output's.
    fn backward(&self, o: &Tensor, lse: &Tensor, d_o: &Tensor) -> Result<[Fresh; 3]> {
        let shape = self.shape()?;
        let (device, element) = (gpu(&self.q)?, element(&self.q)?);
        let mut args = shape.args().map_err(Error::wrap)?;
        let delta = Fresh::new(lse.shape(), Element::F32, device)?;
        let gradients = [&self.q, &self.k, &self.v].map(|x| Fresh::new(x.shape(), element, device));
        let [dq, dk, dv] = gradients;
        let (dq, dk, dv) = (dq?, dk?, dv?);
        (args.q, args.k, args.v) = (address(&self.q)?, address(&self.k)?, address(&self.v)?);
        (args.o, args.lse, args.d_o) = (address(o)?, address(lse)?, address(d_o)?);
        (args.delta, args.dq, args.dk, args.dv) = (delta.address()?, dq.address()?, dk.address()?, dv.address()?);
        for backward in [shape.backward_queries(element), shape.backward_keys(element)] {
            // SAFETY: as in forward.
            unsafe { launch(device, &backward, &args) }?;
        }
        Ok([dq, dk, dv])
    }
}
