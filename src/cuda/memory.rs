//! Tensors as the kernels see them: addresses, new memory, and operations whose results kernels have made.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape,
    Storage, Tensor, bail,
};
use half::bf16;

use super::kernels::Kernels;
use super::launch::{AddArgs, Element, Launch};
use crate::model::ops::stack;

/// What the elements of a tensor are to the kernels.
pub fn element(tensor: &Tensor) -> Result<Element> {
    dtype_element(tensor.dtype())
}

fn dtype_element(dtype: DType) -> Result<Element> {
    match dtype {
        DType::F32 => Ok(Element::F32),
        DType::BF16 => Ok(Element::Bf16),
        other => bail!("no kernel works on elements of type {other:?}"),
    }
}

/// The GPU that a tensor lies on.
pub fn gpu(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        other => bail!("the tensors are on the CPU, the kernel is the GPU's ({other:?})"),
    }
}

/// A tensor as kernels for f32 read it: contiguous.
pub fn f32(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F32 => tensor.contiguous(),
        other => bail!("the kernels work on f32, not on {other:?}"),
    }
}

/// Device memory that a kernel is about to write, every element of it.
pub struct Fresh {
    storage: CudaStorage,
    shape: Shape,
}

impl Fresh {
    /// Room for f32 or bf16.
    pub fn new(shape: impl Into<Shape>, element: Element, device: &CudaDevice) -> Result<Self> {
        let shape = shape.into();
        let n = shape.elem_count();
        // SAFETY: whatever bits are there are numbers, and the kernels write every element before it is read.
        let storage = unsafe {
            match element {
                Element::F32 => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(n)?, device.clone()),
                Element::Bf16 => CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(n)?, device.clone()),
            }
        };
        Ok(Self { storage, shape })
    }

    /// The values of a tensor in order, as another shape.
    pub fn copy(of: &Tensor, shape: impl Into<Shape>) -> Result<Self> {
        let mut copy = Self::new(shape, element(of)?, gpu(of)?)?;
        let (storage, layout) = of.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a tensor is not on the GPU: {of:?}") };
        storage.copy_strided_src(&mut copy.storage, 0, layout)?;
        Ok(copy)
    }

    /// `a [.., k]` times `b [k, n]`, both f32 or both bf16, as `shape`, which has as many values.
    pub fn product(a: &Tensor, b: &Tensor, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let (k, n) = b.dims2()?;
        let m = a.elem_count() / k.max(1);
        if a.dim(D::Minus1)? != k || shape.elem_count() != m * n {
            bail!("{:?} times {:?} is not {shape:?}", a.shape(), b.shape());
        }
        let a = if a.rank() == 2 { a.clone() } else { a.reshape((m, k))? };
        let ((a, a_layout), (b, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
        let (Storage::Cuda(a), Storage::Cuda(b)) = (&*a, &*b) else { bail!("a factor is not on the GPU") };
        Ok(Self { storage: a.matmul(b, (1, m, n, k), a_layout, b_layout)?, shape })
    }

    /// The sum with as many values of a tensor that [`f32`] gave, f32.
    pub fn add(self, x: &Tensor) -> Result<Self> {
        let n = self.shape.elem_count();
        if x.elem_count() != n {
            bail!("{:?} added to {:?}", x.shape(), self.shape);
        }
        let (element, z) = (dtype_element(self.storage.dtype())?, self.address()?);
        let (add, args) = super::launch::add(n, element).map_err(candle_core::Error::wrap)?;
        let y = match element {
            Element::F32 => None,
            Element::Bf16 => Some(Self::new(&self.shape, Element::F32, gpu(x)?)?),
        };
        let args = AddArgs { x: address(x)?, z, y: y.as_ref().map_or(Ok(z), Self::address)?, ..args };
        // SAFETY: each has `n` values; in place, a thread reads what it then writes.
        unsafe { launch(gpu(x)?, &add, &args) }?;
        Ok(y.unwrap_or(self))
    }

    pub fn address(&self) -> Result<u64> {
        Ok(base(&self.storage)?.0)
    }

    /// What was written, outside of any graph.
    pub fn tensor(self) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }
}

impl From<Fresh> for stack::Fresh {
    fn from(Fresh { storage, shape }: Fresh) -> Self {
        Self { storage: Storage::Cuda(storage), shape }
    }
}

/// `sum += x`, both contiguous and f32, as many values; nobody else reads `sum` meanwhile.
pub fn add_to(sum: &Tensor, x: &Tensor) -> Result<()> {
    let (sum, x, n) = (f32(sum)?, f32(x)?, sum.elem_count());
    if x.elem_count() != n {
        bail!("{:?} added to {:?}", x.shape(), sum.shape());
    }
    let (add, args) = super::launch::add(n, Element::F32).map_err(candle_core::Error::wrap)?;
    let args = AddArgs { x: address(&x)?, z: address(&sum)?, y: address(&sum)?, ..args };
    // SAFETY: each has `n` values; a thread reads what it then writes.
    unsafe { launch(gpu(&sum)?, &add, &args) }
}

/// Where a storage begins in device memory, and the size of its elements.
///
/// It stays there as long as it lives and, as memory is freed in the order of its stream, until what was launched before that has
/// run.
fn base(storage: &CudaStorage) -> Result<(u64, usize)> {
    let stream = storage.device().cuda_stream();
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(&stream).0, size_of::<f32>()),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(&stream).0, size_of::<bf16>()),
        CudaStorageSlice::U32(slice) => (slice.device_ptr(&stream).0, size_of::<u32>()),
        _ => bail!("no kernel reads elements of type {:?}", storage.dtype()),
    })
}

/// Where a contiguous tensor begins in device memory.
pub fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("a tensor is not on the GPU: {tensor:?}") };
    let Some((begin, _)) = layout.contiguous_offsets() else { bail!("a contiguous tensor expected: {tensor:?}") };
    let (base, size) = base(storage)?;
    Ok(base + (begin * size) as u64)
}

/// Launches a kernel on the stream of the tensors of a device.
///
/// # Safety
/// As for [`Kernels::launch`].
pub unsafe fn launch<A: DeviceRepr>(device: &CudaDevice, launch: &Launch, args: &A) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { Kernels::of(device)?.launch(launch, args) }.w()
}

/// Gives a result that a kernel has made to candle; `backward` makes the gradients of the inputs from the result and its own.
struct Made<B> {
    name: &'static str,
    result: Mutex<Option<Fresh>>,
    backward: B,
}

impl<B> Made<B> {
    fn new(name: &'static str, result: Fresh, backward: B) -> Self {
        Self { name, result: Mutex::new(Some(result)), backward }
    }

    fn take(&self) -> Result<(CudaStorage, Shape)> {
        match self.result.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Fresh { storage, shape }) => Ok((storage, shape)),
            None => bail!("{}: forward twice", self.name),
        }
    }
}

/// `result` as an operation on its input.
pub fn of_one<B>(name: &'static str, input: &Tensor, result: Fresh, backward: B) -> Result<Tensor>
where
    B: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    input.apply_op1(Made::new(name, result, backward))
}

/// `result` as an operation on two inputs.
pub fn of_two<B>(name: &'static str, inputs: [&Tensor; 2], result: Fresh, backward: B) -> Result<Tensor>
where
    B: Fn(&Tensor, &Tensor) -> Result<[Tensor; 2]> + Send + Sync + 'static,
{
    inputs[0].apply_op2(inputs[1], Made::new(name, result, backward))
}

/// `result` as an operation on three inputs.
pub fn of_three<B>(name: &'static str, inputs: [&Tensor; 3], result: Fresh, backward: B) -> Result<Tensor>
where
    B: Fn(&Tensor, &Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
{
    inputs[0].apply_op3(inputs[1], inputs[2], Made::new(name, result, backward))
}

type Cpu<'a> = &'a CpuStorage;
type Cuda<'a> = &'a CudaStorage;
type At<'a> = &'a Layout;
type Gradient = Option<Tensor>;

impl<B: Fn(&Tensor, &Tensor) -> Result<Tensor>> CustomOp1 for Made<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: Cpu, _: At) -> Result<(CpuStorage, Shape)> {
        bail!("{}: an input is on the CPU", self.name)
    }

    fn cuda_fwd(&self, _: Cuda, _: At) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, _: &Tensor, result: &Tensor, d: &Tensor) -> Result<Gradient> {
        (self.backward)(result, &d.contiguous()?).map(Some)
    }
}

impl<B: Fn(&Tensor, &Tensor) -> Result<[Tensor; 2]>> CustomOp2 for Made<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: Cpu, _: At, _: Cpu, _: At) -> Result<(CpuStorage, Shape)> {
        bail!("{}: an input is on the CPU", self.name)
    }

    fn cuda_fwd(&self, _: Cuda, _: At, _: Cuda, _: At) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, result: &Tensor, d: &Tensor) -> Result<(Gradient, Gradient)> {
        let [a, b] = (self.backward)(result, &d.contiguous()?)?;
        Ok((Some(a), Some(b)))
    }
}

impl<B: Fn(&Tensor, &Tensor) -> Result<[Tensor; 3]>> CustomOp3 for Made<B> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: Cpu, _: At, _: Cpu, _: At, _: Cpu, _: At) -> Result<(CpuStorage, Shape)> {
        bail!("{}: an input is on the CPU", self.name)
    }

    fn cuda_fwd(&self, _: Cuda, _: At, _: Cuda, _: At, _: Cuda, _: At) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        result: &Tensor,
        d: &Tensor,
    ) -> Result<(Gradient, Gradient, Gradient)> {
        let [a, b, c] = (self.backward)(result, &d.contiguous()?)?;
        Ok((Some(a), Some(b), Some(c)))
    }
}
