//! Threads that share the items of a batch, each computing whole items alone.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPool;

use super::TrainError;
use crate::ahead::lone_threads;

/// Threads that each compute a share of a batch; inside, matrix products stay on their thread.
pub struct Workers {
    pools: Vec<ThreadPool>,
}

impl Workers {
    pub fn new(threads: usize) -> Result<Self, TrainError> {
        Ok(Self { pools: lone_threads(threads)? })
    }

    /// `compute` of every item; the results' order does not depend on the threads.
    pub fn map<T: Sync, R: Send>(
        &self,
        items: &[T],
        compute: impl Fn(&T) -> Result<R, TrainError> + Sync,
    ) -> Result<Vec<R>, TrainError> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::with_capacity(items.len()));
        std::thread::scope(|scope| {
            for pool in &self.pools {
                scope.spawn(|| {
                    pool.install(|| {
                        loop {
                            let i = next.fetch_add(1, Ordering::Relaxed);
                            let Some(item) = items.get(i) else { break };
                            let result = compute(item);
                            results.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((i, result));
                        }
                    });
                });
            }
        });
        let mut results = results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        results.sort_by_key(|(i, _)| *i);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let items: Vec<usize> = (0..50).collect();
        for threads in [1, 3] {
            let squares = Workers::new(threads).unwrap().map(&items, |i| Ok(i * i)).unwrap();
            assert_eq!(squares, items.iter().map(|i| i * i).collect::<Vec<_>>());
        }
    }
}
