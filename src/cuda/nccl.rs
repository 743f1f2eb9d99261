//! Sums tensors over the GPUs of several processes by NCCL, which they join with an identifier that the first one made.

use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp, result::NcclError};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Error, Result, Storage, Tensor, bail};

/// Bytes of an identifier.
const ID_BYTES: usize = 128;

/// The GPUs of a group of processes, one each.
pub(crate) struct Nccl {
    comm: Comm,
}

/// NCCL's errors have no text of their own.
fn named(error: NcclError) -> Error {
    Error::Msg(format!("NCCL: {:?}", error.0))
}

/// What the first process of a group sends to the others.
///
/// # Errors
/// Where NCCL is not installed, or finds no way to be reached.
pub(crate) fn invitation() -> Result<Vec<u8>> {
    Ok(Id::new().map_err(named)?.internal().iter().map(|&byte| byte as u8).collect())
}

impl Nccl {
    /// Returns when all `size` processes have called it with the same invitation; sums will happen in the order of `device`'s stream.
    ///
    /// # Errors
    /// When they cannot reach each other, or two of them have the same GPU.
    pub(crate) fn join(device: &CudaDevice, rank: usize, size: usize, invitation: &[u8]) -> Result<Self> {
        let Ok(bytes) = <[u8; ID_BYTES]>::try_from(invitation) else {
            bail!("NCCL: an identifier of {} bytes, expected {ID_BYTES}", invitation.len());
        };
        let id = Id::uninit(bytes.map(|byte| byte as _));
        Ok(Self { comm: Comm::from_rank(device.cuda_stream(), rank, size, id).map_err(named)? })
    }

    /// The sum of every process's `values`, f32 and contiguous, which are as many on all of them.
    ///
    /// # Errors
    /// What NCCL reports; tensors that are not on the GPU that joined.
    pub(crate) fn sum(&self, values: &Tensor) -> Result<Tensor> {
        let n = values.elem_count();
        let (storage, layout) = values.storage_and_layout();
        let (Storage::Cuda(storage), Some((0, _))) = (&*storage, layout.contiguous_offsets()) else {
            bail!("NCCL: a contiguous tensor on a GPU expected, got {values:?}");
        };
        let device = storage.device.clone();
        let mut sums = device.alloc_zeros::<f32>(n)?;
        self.comm.all_reduce(storage.as_cuda_slice::<f32>()?, &mut sums, &ReduceOp::Sum).map_err(named)?;
        let sums = Storage::Cuda(CudaStorage::wrap_cuda_slice(sums, device));
        Ok(Tensor::from_storage(sums, n, BackpropOp::none(), false))
    }
}
