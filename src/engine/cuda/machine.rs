//! What the CUDA engine needs of a machine: memory, and launches of kernels/decode_persistent.cu.

use crate::cuda::launch::{DecodeArgs, DecodeLimits, Launch, N_POINTERS};

/// What a machine can refuse.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("out of device memory: {bytes} bytes more do not fit; play fewer streams at once")]
    Memory { bytes: usize },
    #[error("the driver refuses the kernels: the GPU is older than compute capability 8.0 ({reason})")]
    Architecture { reason: String },
    #[error("the driver refuses the kernels: it is older than CUDA 13.0 ({reason}); update it")]
    Driver { reason: String },
    #[error("the launch does not fit: {blocks} blocks cannot run at once on this GPU ({reason})")]
    Blocks { blocks: u32, reason: String },
    #[error("{0}")]
    Other(String),
}

/// Device memory and launches: a GPU, or in tests the emulator of kernels/emulator.
pub trait Machine: Send + Sync + 'static {
    /// Memory that is freed when it is dropped.
    type Buffer: Send + Sync + 'static;

    fn limits(&self) -> DecodeLimits;

    /// How much memory there still is, in bytes.
    ///
    /// # Errors
    /// When the machine fails.
    fn free_bytes(&self) -> Result<usize, MachineError>;

    /// New memory, all zeros.
    ///
    /// # Errors
    /// When there is not so much.
    fn zeros(&self, bytes: usize) -> Result<Self::Buffer, MachineError>;

    /// Writes `bytes` into a buffer, from byte `at` on, after whatever was launched.
    ///
    /// # Errors
    /// When the machine fails, or the buffer ends before.
    fn write(&self, buffer: &mut Self::Buffer, at: usize, bytes: &[u8]) -> Result<(), MachineError>;

    /// Writes zeros.
    ///
    /// # Errors
    /// When the machine fails, or the buffer ends before.
    fn clear(&self, buffer: &mut Self::Buffer, at: usize, bytes: usize) -> Result<(), MachineError> {
        self.write(buffer, at, &vec![0; bytes])
    }

    /// Copies `bytes` from byte `from.1` of a buffer on into another one, from its byte `to.1` on, after whatever was launched.
    ///
    /// # Errors
    /// When the machine fails, or a buffer ends before.
    fn copy(
        &self,
        from: (&Self::Buffer, usize),
        to: (&mut Self::Buffer, usize),
        bytes: usize,
    ) -> Result<(), MachineError>;

    /// Reads `bytes` from byte `at` of a buffer on, after whatever was launched.
    ///
    /// # Errors
    /// When the machine fails, or the buffer ends before.
    fn read(&self, buffer: &Self::Buffer, at: usize, bytes: &mut [u8]) -> Result<(), MachineError>;

    /// Queues a launch. Pointer i of `args` is that of `buffers[i]`, null for `None`; the sizes are those of kernels/args.cuh.
    ///
    /// # Errors
    /// When the machine refuses it.
    fn launch(
        &self,
        launch: &Launch,
        args: &DecodeArgs,
        buffers: [Option<&Self::Buffer>; N_POINTERS],
    ) -> Result<(), MachineError>;
}
