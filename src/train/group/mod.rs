//! The processes that train one model together: each computes its share of every batch, and their gradients are summed.
//!
//! What is random in training belongs to an item and not to a process, so a group of any size computes what one process
//! does, up to the rounding of sums. Rank 0 alone writes, and its clock is everybody's.

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(test)]
mod threads;

use std::ops::Range;

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One process's place among those that train together.
///
/// All ranks must call the methods that exchange something in the same order; each returns when all have called it.
pub trait Group {
    /// This process's number, below [`Group::size`].
    fn rank(&self) -> usize;

    /// Number of processes.
    fn size(&self) -> usize;

    /// Replaces every value by its sum over all ranks, which is the same to the bit on all of them.
    fn sum_f32(&self, values: &mut [f32]);

    /// The sum over all ranks of a flat tensor on each one's GPU, without the way through the CPU's memory; `None` where there is no
    /// such way.
    ///
    /// # Errors
    /// When there is one and it fails.
    fn sum_on_gpus(&self, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(None)
    }

    /// As [`Group::sum_f32`].
    fn sum_f64(&self, values: &mut [f64]);

    /// Replaces the content by rank 0's, however long that takes to come.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// Ends all processes of the group, because this one cannot go on.
    fn abort(&self, code: i32) -> !;
}

impl dyn Group + '_ {
    /// Whether this is rank 0, which writes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The items that are dealt to this rank: every [`Group::size`]-th.
    pub fn mine(&self, items: Range<usize>) -> Vec<usize> {
        (self.next_mine(items.start)..items.end).step_by(self.size()).collect()
    }

    /// The first of this rank's items that is not below `item`.
    pub fn next_mine(&self, item: usize) -> usize {
        item + (self.rank() + self.size() - item % self.size()) % self.size()
    }

    /// Whether it is so on any rank.
    pub fn any(&self, so: bool) -> bool {
        let mut votes = [f64::from(u8::from(so))];
        self.sum_f64(&mut votes);
        votes[0] > 0.0
    }

    /// Rank 0's number.
    pub fn number_of_first(&self, number: f64) -> f64 {
        let mut sum = [if self.is_first() { number } else { 0.0 }];
        self.sum_f64(&mut sum);
        sum[0]
    }

    /// Rank 0's value.
    pub fn of_first<T: Serialize + DeserializeOwned>(&self, value: T) -> serde_json::Result<T> {
        if self.size() == 1 {
            return Ok(value);
        }
        let mut bytes = serde_json::to_vec(&value)?;
        self.broadcast(&mut bytes);
        serde_json::from_slice(&bytes)
    }
}

/// A group of one process.
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum_f32(&self, _: &mut [f32]) {}

    fn sum_f64(&self, _: &mut [f64]) {}

    fn broadcast(&self, _: &mut Vec<u8>) {}

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

/// Why a process could not join those that it was started with.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    #[error(
        "{started} processes were started together ({variable}) that cannot see each other; {remedy}, or unset {variable} \
             to train each by itself"
    )]
    Apart { started: usize, variable: &'static str, remedy: &'static str },
    #[error("MPI is already in use in this process")]
    InUse,
    #[error("this MPI library does not allow threads beside the one that calls it")]
    NoThreads,
}

/// How launchers tell a process with how many others it was started: OpenMPI, MPICH and its kin, Slurm.
const LAUNCHERS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

/// How launchers number the processes of one machine.
const LOCAL_RANKS: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];

/// This process's number among those that were started together on its machine; 0 where nobody says.
pub fn local_rank() -> usize {
    let number = |name| std::env::var(name).ok()?.parse().ok();
    LOCAL_RANKS.into_iter().find_map(number).unwrap_or(0)
}

/// The group that mpirun or srun started this process in (with the feature `mpi`), or the process alone.
///
/// # Errors
/// When it was started together with others that it cannot reach: they would all write the same files.
pub fn join() -> Result<Box<dyn Group>, GroupError> {
    #[cfg(feature = "mpi")]
    let (group, remedy) = (mpi::Mpi::join()?, "start them with the same MPI's mpirun, or with srun --mpi=pmix");
    #[cfg(not(feature = "mpi"))]
    let (group, remedy) = (Alone, "build wavegen with --features mpi");
    if group.size() == 1
        && let Some((variable, started)) = started(|name| std::env::var(name).ok())
    {
        return Err(GroupError::Apart { started, variable, remedy });
    }
    Ok(Box::new(group))
}

/// The variable by which a launcher says that it started more than one process, and how many.
fn started(variable: impl Fn(&str) -> Option<String>) -> Option<(&'static str, usize)> {
    LAUNCHERS.into_iter().find_map(|name| {
        let n = variable(name)?.parse().ok()?;
        (n > 1).then_some((name, n))
    })
}

#[cfg(test)]
mod tests {
    use super::threads::together;
    use super::*;

    #[test]
    fn every_item_is_dealt_to_one_rank() {
        for size in 1..5 {
            let mine = together(size, |group| group.mine(7..18));
            assert!(mine.iter().zip(0..).all(|(items, rank)| items.iter().all(|item| item % size == rank)), "{mine:?}");
            let mut dealt = mine.concat();
            dealt.sort();
            assert_eq!(dealt, (7..18).collect::<Vec<_>>(), "{size} ranks");
        }
    }

    #[test]
    fn all_ranks_hear_the_sum_the_first_and_any() {
        let heard = together(3, |group| {
            let rank = group.rank();
            let (mut small, mut large) = ([1.0, rank as f32], [2.0f64.powi(rank as i32)]);
            group.sum_f32(&mut small);
            group.sum_f64(&mut large);
            let word = group.of_first(format!("from {rank}")).unwrap();
            (small, large, word, group.number_of_first(rank as f64 + 0.5), group.any(rank == 2), group.any(false))
        });
        assert_eq!(heard, vec![([3.0, 3.0], [7.0], "from 0".to_owned(), 0.5, true, false); 3]);
    }

    #[test]
    fn processes_that_were_started_together_are_told_from_single_ones() {
        let of = |name: &'static str, n: &'static str| started(move |asked| (asked == name).then(|| n.to_owned()));
        assert_eq!(of("OMPI_COMM_WORLD_SIZE", "2"), Some(("OMPI_COMM_WORLD_SIZE", 2)));
        assert_eq!(of("SLURM_STEP_NUM_TASKS", "16"), Some(("SLURM_STEP_NUM_TASKS", 16)));
        assert_eq!((of("PMI_SIZE", "1"), of("PMI_SIZE", "many"), of("HOME", "2")), (None, None, None));
    }
}
