//! Turns a function of whole numbers into its results in order, made by threads before anyone asks for them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// Pools of one thread each: what runs in one never leaves its thread.
pub(crate) fn lone_threads(n: usize) -> Result<Vec<ThreadPool>, ThreadPoolBuildError> {
    (0..n.max(1)).map(|_| ThreadPoolBuilder::new().num_threads(1).build()).collect()
}

/// Calls `make(i)` for every i of `items` on the threads of `threads`, and `consume` on this one with a function that gives
/// their results in order and `None` after the last one.
///
/// At most `most` results are made and not yet taken. The threads have ended when this returns; what was made in vain is lost.
pub(crate) fn ahead<T: Send, R>(
    threads: &[ThreadPool],
    most: usize,
    items: Range<usize>,
    make: impl Fn(usize) -> T + Sync,
    consume: impl FnOnce(&mut dyn FnMut() -> Option<T>) -> R,
) -> R {
    let belt = Belt {
        state: Mutex::new(State { next: items.start, taken: items.start, made: BTreeMap::new(), over: false }),
        changed: Condvar::new(),
        most: most.max(1),
        end: items.end,
    };
    std::thread::scope(|scope| {
        for pool in threads {
            scope.spawn(|| pool.install(|| belt.work(&make)));
        }
        // Ends the threads however `consume` ends.
        let _closing = Closing(&belt);
        consume(&mut || belt.take())
    })
}

struct State<T> {
    /// To be made next, and to be taken next.
    next: usize,
    taken: usize,
    made: BTreeMap<usize, T>,
    /// Nothing more is wanted, or a thread has panicked.
    over: bool,
}

struct Belt<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    most: usize,
    end: usize,
}

impl<T> Belt<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn work(&self, make: &impl Fn(usize) -> T) {
        loop {
            let mut state = self.lock();
            while !state.over && state.next < self.end && state.next - state.taken >= self.most {
                state = self.wait(state);
            }
            if state.over || state.next >= self.end {
                return;
            }
            let i = state.next;
            state.next += 1;
            drop(state);
            let closing = Closing(self);
            let made = make(i);
            std::mem::forget(closing);
            self.lock().made.insert(i, made);
            self.changed.notify_all();
        }
    }

    fn take(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            let wanted = state.taken;
            if let Some(made) = state.made.remove(&wanted) {
                state.taken += 1;
                self.changed.notify_all();
                return Some(made);
            }
            if state.over || wanted >= self.end {
                return None;
            }
            state = self.wait(state);
        }
    }
}

/// Ends the belt when it goes, also in a panic.
struct Closing<'a, T>(&'a Belt<T>);

impl<T> Drop for Closing<'_, T> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn results_come_in_order_and_no_more_than_asked_for_are_made_ahead() {
        for (threads, most) in [(1, 1), (3, 1), (3, 7)] {
            let (made, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let make = |i: usize| {
                // Later ones are ready sooner.
                std::thread::sleep(std::time::Duration::from_micros(200 * (i as u64 % 3)));
                let waiting = made.fetch_add(1, Ordering::SeqCst) + 1 - taken.load(Ordering::SeqCst);
                (i * i, waiting)
            };
            let all = ahead(&lone_threads(threads).unwrap(), most, 5..40, make, |next| {
                let mut all = Vec::new();
                while let Some((square, waiting)) = next() {
                    taken.fetch_add(1, Ordering::SeqCst);
                    // One has been handed over and is not counted yet.
                    assert!(waiting <= most + 1, "{waiting} of {most} with {threads} threads");
                    all.push(square);
                }
                all
            });
            assert_eq!(all, (5..40).map(|i| i * i).collect::<Vec<_>>());
        }
    }

    #[test]
    fn one_may_stop_before_the_end() {
        let first = ahead(&lone_threads(2).unwrap(), 4, 0..usize::MAX, |i| i, |next| [next(), next()]);
        assert_eq!(first, [Some(0), Some(1)]);
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_panic_in_a_thread_is_not_waited_for() {
        ahead(&lone_threads(1).unwrap(), 1, 0..3, |i| assert!(i < 1), |next| while next().is_some() {});
    }
}
