//! Causal sliding-window attention of tensors, with gradients, by kernels/attention_window.cu.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor, bail,
};
use half::bf16;

use super::kernels::Kernels;
use super::launch::{AttentionShape, Element};

const NAME: &str = "attention_window";

/// `softmax(q k^T / sqrt(head_dim)) v` where query i sees keys `i - window + 1 ..= i`: q `[batch, n_heads, len, head_dim]`, k
/// and v `[batch, n_kv_heads, len, head_dim]` -> as q. All f32 or all bf16, sums in f32. The same bits every time.
///
/// # Errors
/// When the tensors are not on a CUDA device, or no kernel serves their shapes or type.
pub fn attention_window(q: &Tensor, k: &Tensor, v: &Tensor, window: usize) -> Result<Tensor> {
    let op = AttentionWindow { window, lse: Mutex::new(None) };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

struct AttentionWindow {
    window: usize,
    /// `[batch, n_heads, len]`, which forward leaves for backward.
    lse: Mutex<Option<CudaSlice<f32>>>,
}

/// What the kernels are compiled for.
trait KernelElement: CudaDType + DeviceRepr {
    const ELEMENT: Element;
}
impl KernelElement for f32 {
    const ELEMENT: Element = Element::F32;
}
impl KernelElement for bf16 {
    const ELEMENT: Element = Element::Bf16;
}

/// The part of a storage that a contiguous tensor is.
fn view<'a, T: KernelElement>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Some((begin, end)) = layout.contiguous_offsets() else { bail!("{NAME}: a tensor is not contiguous") };
    Ok(storage.as_cuda_slice::<T>()?.slice(begin..end))
}

/// Memory that a kernel is about to write.
fn room<T: KernelElement>(device: &CudaDevice, n: usize) -> Result<CudaSlice<T>> {
    // SAFETY: whatever bits are there are numbers, and the kernels write every element before it is read.
    unsafe { device.alloc::<T>(n) }
}

fn tensor<T: KernelElement>(values: CudaSlice<T>, shape: &Shape, device: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false)
}

impl AttentionWindow {
    fn shape(&self, q: &Shape, k: &Shape, v: &Shape) -> Result<AttentionShape> {
        let (batch, n_heads, len, head_dim) = q.dims4()?;
        let (k_batch, n_kv_heads, k_len, k_dim) = k.dims4()?;
        if k.dims() != v.dims() || (k_batch, k_len, k_dim) != (batch, len, head_dim) {
            bail!("{NAME}: queries {q:?}, keys {k:?} and values {v:?} do not go together");
        }
        Ok(AttentionShape { batch, n_heads, n_kv_heads, len, head_dim, window: self.window })
    }

    fn forward<T: KernelElement>(&self, q: Part, k: Part, v: Part) -> Result<(CudaStorage, Shape)> {
        let shape = self.shape(q.1.shape(), k.1.shape(), v.1.shape())?;
        let device = q.0.device();
        let kernels = Kernels::of(device)?;
        let stream = kernels.stream();
        let mut args = shape.args().map_err(Error::wrap)?;
        let (q_values, k, v) = (view::<T>(q.0, q.1)?, view::<T>(k.0, k.1)?, view::<T>(v.0, v.1)?);
        let mut o = room::<T>(device, q.1.shape().elem_count())?;
        let mut lse = room::<f32>(device, shape.batch * shape.n_heads * shape.len)?;
        {
            // Each guard tells the stream's order to whoever uses the memory from another stream.
            let (q, _q) = q_values.device_ptr(stream);
            let (k, _k) = k.device_ptr(stream);
            let (v, _v) = v.device_ptr(stream);
            let (o, _o) = o.device_ptr_mut(stream);
            let (lse, _lse) = lse.device_ptr_mut(stream);
            (args.q, args.k, args.v, args.o, args.lse) = (q, k, v, o, lse);
            // SAFETY: the sizes follow from `shape`, which the tensors have; freeing waits for the stream.
            unsafe { kernels.launch(&shape.forward(T::ELEMENT), &args) }.w()?;
        }
        *self.lse.lock().unwrap_or_else(PoisonError::into_inner) = Some(lse);
        Ok((CudaStorage::wrap_cuda_slice(o, device.clone()), q.1.shape().clone()))
    }

    fn backward<T: KernelElement>(&self, [q, k, v, o, d_o]: [Part; 5]) -> Result<[Tensor; 3]> {
        let (q_shape, k_shape) = (q.1.shape(), k.1.shape());
        let shape = self.shape(q_shape, k_shape, v.1.shape())?;
        let device = q.0.device();
        let kernels = Kernels::of(device)?;
        let stream = kernels.stream();
        let mut args = shape.args().map_err(Error::wrap)?;
        let lse = self.lse.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lse) = lse.as_ref() else { bail!("{NAME}: backward before forward") };
        let [q, k, v, o, d_o] =
            [view::<T>(q.0, q.1)?, view(k.0, k.1)?, view(v.0, v.1)?, view(o.0, o.1)?, view(d_o.0, d_o.1)?];
        let mut delta = room::<f32>(device, lse.len())?;
        let mut dq = room::<T>(device, q_shape.elem_count())?;
        let mut dk = room::<T>(device, k_shape.elem_count())?;
        let mut dv = room::<T>(device, k_shape.elem_count())?;
        {
            let (q, _q) = q.device_ptr(stream);
            let (k, _k) = k.device_ptr(stream);
            let (v, _v) = v.device_ptr(stream);
            let (o, _o) = o.device_ptr(stream);
            let (lse, _lse) = lse.device_ptr(stream);
            let (d_o, _d_o) = d_o.device_ptr(stream);
            let (delta, _delta) = delta.device_ptr_mut(stream);
            let (dq, _dq) = dq.device_ptr_mut(stream);
            let (dk, _dk) = dk.device_ptr_mut(stream);
            let (dv, _dv) = dv.device_ptr_mut(stream);
            (args.q, args.k, args.v, args.o, args.lse, args.d_o) = (q, k, v, o, lse, d_o);
            (args.delta, args.dq, args.dk, args.dv) = (delta, dq, dk, dv);
            for launch in [shape.backward_queries(T::ELEMENT), shape.backward_keys(T::ELEMENT)] {
                // SAFETY: as in forward.
                unsafe { kernels.launch(&launch, &args) }.w()?;
            }
        }
        Ok([tensor(dq, q_shape, device), tensor(dk, k_shape, device), tensor(dv, k_shape, device)])
    }
}

/// A tensor on the GPU.
type Part<'a> = (&'a CudaStorage, &'a Layout);

fn no_kernel(dtype: DType) -> Error {
    Error::UnsupportedDTypeForOp(dtype, NAME).bt()
}

impl CustomOp3 for AttentionWindow {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{NAME}: the tensors are on the CPU, the kernel is the GPU's")
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (q, k, v) = ((q, q_layout), (k, k_layout), (v, v_layout));
        match q.0.dtype() {
            DType::F32 => self.forward::<f32>(q, k, v),
            DType::BF16 => self.forward::<bf16>(q, k, v),
            other => Err(no_kernel(other)),
        }
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        d_o: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d_o = d_o.contiguous()?;
        let parts = [q, k, v, o, &d_o].map(Tensor::storage_and_layout);
        let mut on_gpu = Vec::with_capacity(5);
        for (storage, layout) in &parts {
            let Storage::Cuda(storage) = &**storage else { bail!("{NAME}: a tensor is not on the GPU") };
            on_gpu.push((storage, *layout));
        }
        let Ok(on_gpu) = <[Part; 5]>::try_from(on_gpu) else { bail!("{NAME}: five tensors expected") };
        let [dq, dk, dv] = match q.dtype() {
            DType::F32 => self.backward::<f32>(on_gpu)?,
            DType::BF16 => self.backward::<bf16>(on_gpu)?,
            other => return Err(no_kernel(other)),
        };
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}
