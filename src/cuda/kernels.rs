//! Loads the compiled kernels into a device and launches them.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaModule, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg, sys::CUfunction_attribute,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, Result};

use super::launch::{
    AttentionArgs, ColumnSumsArgs, CrossEntropyArgs, Launch, LevinsonArgs, MixtureNllArgs, PastAutocorrelationArgs,
    PlannedAutocorrelationArgs, PredictArgs, RmsNormArgs, SwigluArgs,
};

/// Machine code for sm_90a and PTX, made by kernels/build.rs.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Shared memory that a block may have without asking.
const USUAL_SHARED_BYTES: u32 = 48 * 1024;

macro_rules! passed_by_value {
    ($($args:ty),*) => {
        // SAFETY: plain numbers, laid out as in kernels/args.cuh; sizes are asserted on both sides.
        $(unsafe impl DeviceRepr for $args {})*
    };
}
passed_by_value!(
    AttentionArgs,
    PastAutocorrelationArgs,
    PlannedAutocorrelationArgs,
    LevinsonArgs,
    PredictArgs,
    RmsNormArgs,
    ColumnSumsArgs,
    SwigluArgs,
    CrossEntropyArgs,
    MixtureNllArgs
);

/// All kernels, loaded into one device.
pub struct Kernels {
    module: Arc<CudaModule>,
    stream: Arc<CudaStream>,
}

impl Kernels {
    /// The kernels in this device's memory, loaded at the first call.
    ///
    /// # Errors
    /// When the driver does not take them: a GPU older than sm_80, or a driver older than the compiler.
    pub fn of(device: &CudaDevice) -> Result<Self> {
        static LOADED: Mutex<Vec<(usize, Arc<CudaModule>)>> = Mutex::new(Vec::new());
        let stream = device.cuda_stream();
        let ordinal = stream.context().ordinal();
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = loaded.iter().find(|(device, _)| *device == ordinal) {
            return Ok(Self { module: module.clone(), stream });
        }
        let module = stream.context().load_module(Ptx::from_binary(IMAGE.to_vec())).w()?;
        loaded.push((ordinal, module.clone()));
        Ok(Self { module, stream })
    }

    /// The stream that everything is launched on, in order.
    pub fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// Launches one kernel; returns before it has run.
    ///
    /// # Safety
    /// The addresses in `args` are null where the kernel allows it, and else point to device memory of the sizes that
    /// kernels/args.cuh gives, which stays until the stream has passed the launch.
    ///
    /// # Errors
    /// When the driver refuses the launch.
    pub unsafe fn launch<A: DeviceRepr>(&self, launch: &Launch, args: &A) -> Result<()> {
        let function = self.module.load_function(&launch.kernel).w()?;
        if launch.shared_bytes > USUAL_SHARED_BYTES {
            let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(limit, launch.shared_bytes as i32).w()?;
        }
        let [x, y, z] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        // SAFETY: the caller's promise; the kernel takes this struct alone (KERNEL in kernels/common.cuh).
        unsafe { self.stream.launch_builder(&function).arg(args).launch(config) }.w()?;
        Ok(())
    }
}
