//! Loads the compiled kernels into a device and launches them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, cuLaunchKernelEx,
};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use super::launch::{
    AdamwArgs, AddArgs, AttentionArgs, ColumnSumsArgs, CrossEntropyArgs, DecodeArgs, GatherArgs, Launch, LeftArgs,
    LevinsonArgs, MixtureNllArgs, PastAutocorrelationArgs, PlannedAutocorrelationArgs, PredictArgs, RmsNormArgs,
    SiluArgs, SplitHeadsArgs, SwigluArgs, TonesArgs,
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
    TonesArgs,
    LeftArgs,
    LevinsonArgs,
    PredictArgs,
    RmsNormArgs,
    ColumnSumsArgs,
    SwigluArgs,
    SiluArgs,
    CrossEntropyArgs,
    MixtureNllArgs,
    SplitHeadsArgs,
    GatherArgs,
    AddArgs,
    AdamwArgs,
    DecodeArgs
);

/// All kernels, loaded into one device.
pub struct Kernels {
    module: Arc<CudaModule>,
    stream: Arc<CudaStream>,
}

impl Kernels {
    /// The kernels in this stream's device, loaded at the first call.
    ///
    /// # Errors
    /// When the driver does not take them: a GPU older than sm_80, or a driver older than the compiler.
    pub fn on(stream: Arc<CudaStream>) -> Result<Self, DriverError> {
        static LOADED: Mutex<Vec<(usize, Arc<CudaModule>)>> = Mutex::new(Vec::new());
        let ordinal = stream.context().ordinal();
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = loaded.iter().find(|(device, _)| *device == ordinal) {
            return Ok(Self { module: module.clone(), stream });
        }
        let module = stream.context().load_module(Ptx::from_binary(IMAGE.to_vec()))?;
        loaded.push((ordinal, module.clone()));
        Ok(Self { module, stream })
    }

    /// [`on`](Self::on) the stream that this device's tensors are computed on.
    ///
    /// # Errors
    /// Likewise.
    pub fn of(device: &CudaDevice) -> candle_core::Result<Self> {
        Self::on(device.cuda_stream()).w()
    }

    /// The stream that everything is launched on, in order.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// A launch of `decode_persistent_*`, whose arguments `engine::cuda` makes; returns before it has run.
    ///
    /// # Errors
    /// When the driver refuses the launch.
    pub(super) fn launch_decode(&self, launch: &Launch, args: &DecodeArgs) -> Result<(), DriverError> {
        // SAFETY: `engine::cuda::Streams` makes every buffer by the sizes of the packed model that the kernel reads, and frees it
        // on this stream, after the launch.
        unsafe { self.launch(launch, args) }
    }

    /// Lets a function have as much shared memory as a launch wants. It is one for all threads, of which another may be about to launch
    /// it with more, so it is never let have less.
    fn allow(&self, function: &CudaFunction, launch: &Launch) -> Result<(), DriverError> {
        static MOST: Mutex<BTreeMap<(usize, String), u32>> = Mutex::new(BTreeMap::new());
        let mut most = MOST.lock().unwrap_or_else(PoisonError::into_inner);
        let most = most.entry((self.stream.context().ordinal(), launch.kernel.to_string())).or_default();
        if launch.shared_bytes > *most {
            let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(limit, launch.shared_bytes as i32)?;
            *most = launch.shared_bytes;
        }
        Ok(())
    }

    /// Launches one kernel; returns before it has run.
    ///
    /// # Safety
    /// The addresses in `args` are null where the kernel allows it, and else point to device memory of the sizes that
    /// kernels/args.cuh gives, which stays until the stream has passed the launch.
    ///
    /// # Errors
    /// When the driver refuses the launch.
    pub unsafe fn launch<A: DeviceRepr>(&self, launch: &Launch, args: &A) -> Result<(), DriverError> {
        self.stream.context().bind_to_thread()?;
        let function = self.module.load_function(&launch.kernel)?;
        if launch.shared_bytes > USUAL_SHARED_BYTES {
            self.allow(&function, launch)?;
        }
        let attribute = |id, value| CUlaunchAttribute { id, pad: [0; 4], value };
        let mut attributes = Vec::new();
        if launch.cluster > 0 {
            attributes.push(attribute(
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
                CUlaunchAttributeValue { cooperative: 1 },
            ));
        }
        if launch.cluster > 1 {
            let size = CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
            attributes.push(attribute(
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                CUlaunchAttributeValue { clusterDim: size },
            ));
        }
        let [x, y, z] = launch.grid;
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let mut pointer = std::ptr::from_ref(args).cast_mut().cast();
        // SAFETY: the caller's promise; the kernel takes this struct alone (KERNEL in kernels/common.cuh), which the driver copies
        // before it returns, and `config` points to attributes that live until then.
        unsafe { cuLaunchKernelEx(&config, function.cu_function(), &mut pointer, std::ptr::null_mut()) }.result()
    }
}
