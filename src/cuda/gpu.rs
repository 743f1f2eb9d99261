//! The first GPU: as a device for tensors, and as the machine that the CUDA engine plays on.

use std::fmt::Display;
use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute_enum as Attribute, CUmemPool_attribute, cudaError_enum as Code,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result};

use super::kernels::Kernels;
use super::launch::{DecodeArgs, DecodeLimits, Launch, N_POINTERS};
use crate::engine::cuda::{Machine, MachineError};

/// Why there is no GPU to compute on.
#[derive(Debug, thiserror::Error)]
#[error("no CUDA device: {reason}")]
pub struct NoDevice {
    reason: String,
}

/// The first GPU, for tensors.
///
/// # Errors
/// Where there is none, no driver, or one too old.
pub fn device() -> Result<Device, NoDevice> {
    numbered(0)
}

/// A CUDA error carries a stack trace; its first line says it all.
fn first_line(error: &dyn Display) -> NoDevice {
    NoDevice { reason: error.to_string().lines().next().unwrap_or_default().to_string() }
}

fn numbered(ordinal: usize) -> Result<Device, NoDevice> {
    let device = Device::new_cuda_with_stream(ordinal).map_err(|e| first_line(&e))?;
    if let Device::Cuda(device) = &device {
        let stream = device.cuda_stream();
        let context = stream.context();
        // SAFETY: a tensor is used on this one stream only, in whose order everything happens to it. Events would tell other streams,
        // two for every tensor.
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(context).map_err(|e| first_line(&e))?;
    }
    Ok(device)
}

/// A GPU for training: products of f32 matrices may round their factors to 10 bits (TF32), ten times as fast. Processes of one machine,
/// numbered by `local_rank`, take its GPUs in turn.
///
/// # Errors
/// As [`device`].
pub fn training_device(local_rank: usize) -> Result<Device, NoDevice> {
    // Asked before the driver is asked for anything else.
    let first = device()?;
    let n_devices = CudaContext::device_count().map_err(|e| first_line(&e))?.max(1) as usize;
    let ordinal = local_rank % n_devices;
    let device = if ordinal == 0 { first } else { numbered(ordinal)? };
    candle_core::cuda::set_gemm_reduced_precision_f32(true);
    Ok(device)
}

/// Lets the device's pool keep what is freed. It would give all of it back whenever a thread has waited for anything, which
/// threads that draw excerpts do all the time, and tensors would have to be given new memory at every operation.
fn keep_freed_memory(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut most = u64::MAX;
    // SAFETY: the device is the context's, the pool the device's, and this attribute is a u64.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, std::ptr::from_mut(&mut most).cast())
    }
}

/// The first GPU, for the CUDA engine.
pub struct Gpu {
    kernels: Kernels,
    limits: DecodeLimits,
    name: String,
}

impl Gpu {
    /// # Errors
    /// Where there is no GPU, or the driver does not take the kernels.
    pub fn new() -> Result<Self, MachineError> {
        // Asked before anything that needs more of the driver than to be there.
        device().map_err(|e| MachineError::Other(e.to_string()))?;
        let context = CudaContext::new(0).map_err(named)?;
        let attribute = |which| context.attribute(which).map(|value| value.max(0) as usize).map_err(named);
        let capability = context.compute_capability().map_err(named)?;
        let limits = DecodeLimits {
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            // Others run what is compiled for sm_80, which knows no clusters.
            clusters: capability == (9, 0),
        };
        let name = context.name().map_err(named)?;
        let kernels = Kernels::on(context.new_stream().map_err(named)?).map_err(named)?;
        Ok(Self { kernels, limits, name })
    }

    /// The GPU's name as the driver gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until everything that was launched has run.
    ///
    /// # Errors
    /// When it failed.
    pub fn synchronize(&self) -> Result<(), MachineError> {
        self.stream().synchronize().map_err(named)
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.kernels.stream()
    }
}

/// A driver's error in terms of what to do about it.
fn named(error: DriverError) -> MachineError {
    let reason = error.to_string();
    match error.0 {
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU => MachineError::Architecture { reason },
        Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => MachineError::Driver { reason },
        _ => MachineError::Other(reason),
    }
}

fn memory(bytes: usize) -> impl Fn(DriverError) -> MachineError {
    move |error| match error.0 {
        Code::CUDA_ERROR_OUT_OF_MEMORY => MachineError::Memory { bytes },
        _ => named(error),
    }
}

fn beyond(at: usize, bytes: usize) -> MachineError {
    MachineError::Other(format!("{bytes} bytes at {at} lie beyond the end of a buffer"))
}

impl Machine for Gpu {
    type Buffer = CudaSlice<u8>;

    fn limits(&self) -> DecodeLimits {
        self.limits
    }

    fn free_bytes(&self) -> Result<usize, MachineError> {
        let context = self.stream().context();
        context.bind_to_thread().map_err(named)?;
        if context.has_async_alloc() {
            // What the pool keeps of what was freed counts as taken.
            self.synchronize()?;
            // SAFETY: the device is the context's and the pool the device's.
            unsafe {
                let pool = result::device::get_mem_pool(context.cu_device()).map_err(named)?;
                result::mem_pool::trim_to(pool, 0).map_err(named)?;
            }
        }
        result::mem_get_info().map(|(free, _)| free).map_err(named)
    }

    fn zeros(&self, bytes: usize) -> Result<Self::Buffer, MachineError> {
        // The driver makes no empty memory.
        self.stream().alloc_zeros(bytes.max(1)).map_err(memory(bytes))
    }

    fn write(&self, buffer: &mut Self::Buffer, at: usize, bytes: &[u8]) -> Result<(), MachineError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut part = buffer.try_slice_mut(at..at + bytes.len()).ok_or_else(|| beyond(at, bytes.len()))?;
        self.stream().memcpy_htod(bytes, &mut part).map_err(named)
    }

    fn clear(&self, buffer: &mut Self::Buffer, at: usize, bytes: usize) -> Result<(), MachineError> {
        if bytes == 0 {
            return Ok(());
        }
        let mut part = buffer.try_slice_mut(at..at + bytes).ok_or_else(|| beyond(at, bytes))?;
        self.stream().memset_zeros(&mut part).map_err(named)
    }

    fn copy(
        &self,
        (from, from_at): (&Self::Buffer, usize),
        (to, to_at): (&mut Self::Buffer, usize),
        bytes: usize,
    ) -> Result<(), MachineError> {
        if bytes == 0 {
            return Ok(());
        }
        let from = from.try_slice(from_at..from_at + bytes).ok_or_else(|| beyond(from_at, bytes))?;
        let mut to = to.try_slice_mut(to_at..to_at + bytes).ok_or_else(|| beyond(to_at, bytes))?;
        self.stream().memcpy_dtod(&from, &mut to).map_err(named)
    }

    fn read(&self, buffer: &Self::Buffer, at: usize, bytes: &mut [u8]) -> Result<(), MachineError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let part = buffer.try_slice(at..at + bytes.len()).ok_or_else(|| beyond(at, bytes.len()))?;
        self.stream().memcpy_dtoh(&part, bytes).map_err(named)?;
        self.synchronize()
    }

    fn launch(
        &self,
        launch: &Launch,
        args: &DecodeArgs,
        buffers: [Option<&Self::Buffer>; N_POINTERS],
    ) -> Result<(), MachineError> {
        // Everything runs on one stream, in order: no guard has to outlive the launch.
        let addresses = buffers.map(|buffer| buffer.map_or(0, |buffer| buffer.device_ptr(self.stream()).0));
        let args = args.with_pointers(addresses);
        self.kernels.launch_decode(launch, &args).map_err(|error| match error.0 {
            Code::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE | Code::CUDA_ERROR_INVALID_CLUSTER_SIZE => {
                MachineError::Blocks { blocks: launch.grid[0], reason: error.to_string() }
            }
            _ => named(error),
        })
    }
}
