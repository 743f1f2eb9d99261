//! Processes that mpirun or srun started together, through the system's MPI library.

use std::ffi::c_int;
use std::time::Duration;

#[cfg(feature = "nccl")]
use candle_core::{Device, Tensor};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::{Group, GroupError};

/// Values per call: MPI counts them in C's `int`.
const MOST: usize = 1 << 28;
/// Time between looks at whether a broadcast can begin.
const PATIENCE: Duration = Duration::from_millis(2);

/// All processes of an MPI job. MPI's own error handler ends the job when one of them can no longer be reached.
pub struct Mpi {
    world: SimpleCommunicator,
    /// The ranks' GPUs, once they have met; none where NCCL is not installed.
    #[cfg(feature = "nccl")]
    gpus: std::cell::OnceCell<Option<crate::cuda::Nccl>>,
    /// Ends MPI when dropped, once all ranks do so.
    _universe: Universe,
}

impl Mpi {
    /// Joins the job, or begins one of this process alone.
    pub fn join() -> Result<Self, GroupError> {
        // Only the thread that trains calls MPI; its workers do not.
        let (universe, threading) = mpi::initialize_with_threading(Threading::Funneled).ok_or(GroupError::InUse)?;
        match threading {
            Threading::Single => Err(GroupError::NoThreads),
            _ => Ok(Self {
                world: universe.world(),
                #[cfg(feature = "nccl")]
                gpus: Default::default(),
                _universe: universe,
            }),
        }
    }
}

#[cfg(feature = "nccl")]
impl Mpi {
    /// Joins the GPUs that the ranks' tensors are on; without NCCL on rank 0 nobody does.
    fn meet(&self, values: &Tensor) -> candle_core::Result<Option<crate::cuda::Nccl>> {
        let Device::Cuda(device) = values.device() else { return Ok(None) };
        let mut invitation = Vec::new();
        if self.rank() == 0 {
            match crate::cuda::invitation() {
                Ok(made) => invitation = made,
                Err(reason) => eprintln!("warning: {reason}; gradients are summed in the CPU's memory"),
            }
        }
        self.broadcast(&mut invitation);
        if invitation.is_empty() {
            return Ok(None);
        }
        crate::cuda::Nccl::join(device, self.rank(), self.size(), &invitation).map(Some)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The others would wait for this rank for ever.
        if std::thread::panicking() {
            self.abort(101);
        }
    }
}

impl Group for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn sum_f32(&self, values: &mut [f32]) {
        for chunk in values.chunks_mut(MOST) {
            self.world.all_reduce_into(&chunk.to_vec()[..], chunk, SystemOperation::sum());
        }
    }

    fn sum_f64(&self, values: &mut [f64]) {
        for chunk in values.chunks_mut(MOST) {
            self.world.all_reduce_into(&chunk.to_vec()[..], chunk, SystemOperation::sum());
        }
    }

    #[cfg(feature = "nccl")]
    fn sum_on_gpus(&self, values: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let gpus = match self.gpus.get() {
            Some(gpus) => gpus,
            None => {
                let gpus = self.meet(values)?;
                self.gpus.get_or_init(|| gpus)
            }
        };
        gpus.as_ref().map(|gpus| gpus.sum(values)).transpose()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        // MPI waits by spinning, which would slow rank 0 down where cores are shared; it may need minutes to get here.
        let mut waiting = self.world.immediate_barrier();
        while let Err(not_yet) = waiting.test() {
            waiting = not_yet;
            std::thread::sleep(PATIENCE);
        }
        let first = self.world.process_at_rank(0);
        let mut len = bytes.len() as u64;
        first.broadcast_into(&mut len);
        bytes.resize(len as usize, 0);
        bytes.chunks_mut(MOST).for_each(|chunk| first.broadcast_into(chunk));
    }

    fn abort(&self, code: i32) -> ! {
        self.world.abort(c_int::from(code))
    }
}
