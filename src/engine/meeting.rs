//! Where streams that play together meet, each driven from a thread of its own: who comes first waits for the others.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, Thread};

use super::EngineError;

/// Tasks of one kind are done for all who wait for it, by whoever comes last; the least kind first.
pub struct Meeting<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    n_members: usize,
    n_waiting: usize,
    /// Per seat: what it waits for, and who sits there.
    waiting: Vec<Option<(T, Thread)>>,
    /// Per seat: what became of it, where that went wrong.
    failed: Vec<Option<Arc<EngineError>>>,
}

impl<T: Copy + Ord> Meeting<T> {
    /// For members in seats 0 to `n` - 1.
    pub fn new(n: usize) -> Self {
        let state = State { n_members: n, n_waiting: 0, waiting: vec![None; n], failed: vec![None; n] };
        Self { state: Mutex::new(state) }
    }

    /// Returns when `task` is done for this seat; the last one to come does it, `work(task, seats)`, for all seats that wait for it, in their order.
    ///
    /// # Errors
    /// That of the work, for everybody whom it was done for.
    pub fn wait_for(
        &self,
        seat: usize,
        task: T,
        mut work: impl FnMut(T, &[usize]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let mut state = lock(&self.state);
        state.waiting[seat] = Some((task, thread::current()));
        state.n_waiting += 1;
        while state.waiting[seat].is_some() {
            if state.n_waiting < state.n_members {
                drop(state);
                // Each is woken by itself: woken all at once they would queue for the lock.
                thread::park();
                state = lock(&self.state);
                continue;
            }
            let least = state.waiting.iter().flatten().map(|(task, _)| *task).min().unwrap_or(task);
            let waits = |waiting: &Option<(T, Thread)>| waiting.as_ref().is_some_and(|(task, _)| *task == least);
            let who: Vec<usize> = (0..state.waiting.len()).filter(|&i| waits(&state.waiting[i])).collect();
            let failed = work(least, &who).err().map(Arc::new);
            state.n_waiting -= who.len();
            let mut done = Vec::new();
            for i in who {
                done.extend(state.waiting[i].take());
                state.failed[i].clone_from(&failed);
            }
            drop(state);
            done.iter().for_each(|(_, thread)| thread.unpark());
            state = lock(&self.state);
        }
        state.failed[seat].take().map_or(Ok(()), |error| Err(EngineError::Together(error)))
    }

    /// One member less to wait for. Who panicked leaves too: then all others hear of it.
    pub fn leave(&self) {
        let (mut state, n_woken) = match self.state.lock() {
            // Perhaps it was the one that all others waited for: any of them finds out.
            Ok(state) => (state, 1),
            Err(poisoned) => (poisoned.into_inner(), usize::MAX),
        };
        state.n_members -= 1;
        state.waiting.iter().flatten().take(n_woken).for_each(|(_, thread)| thread.unpark());
    }
}

const PANICKED: &str = "another stream of the group panicked";

/// Locks what members share.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect(PANICKED)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Leaves<'a>(&'a Meeting<u8>);

    impl Drop for Leaves<'_> {
        fn drop(&mut self) {
            self.0.leave();
        }
    }

    #[test]
    fn nobody_waits_for_somebody_who_panicked() {
        let meeting = &Meeting::new(4);
        let come = |seat| {
            let _leaves = Leaves(meeting);
            assert!(seat > 0, "before it came");
            meeting.wait_for(seat, 1, |_, _| panic!("at work"))
        };
        std::thread::scope(|scope| {
            let all = [0, 1, 2, 3].map(|seat| scope.spawn(move || come(seat).is_ok()));
            assert!(all.into_iter().all(|thread| thread.join().is_err()));
        });
    }

    #[test]
    fn rounds_go_on_while_members_leave() {
        let meeting = &Meeting::new(20);
        let done = &Mutex::new(vec![0; 20]);
        let come = |seat: usize| {
            let _leaves = Leaves(meeting);
            for _ in 0..50 * (seat + 1) {
                let work = |_, who: &[usize]| {
                    who.iter().for_each(|&seat| lock(done)[seat] += 1);
                    Ok(())
                };
                meeting.wait_for(seat, 1, work).unwrap();
            }
        };
        std::thread::scope(|scope| {
            (0..20).for_each(|seat| drop(scope.spawn(move || come(seat))));
        });
        assert!(lock(done).iter().enumerate().all(|(seat, &n)| n == 50 * (seat + 1)), "{done:?}");
    }

    #[test]
    fn everybody_whom_it_was_done_for_hears_what_went_wrong() {
        let meeting = &Meeting::new(3);
        let come = |(seat, task): (usize, u8)| {
            let done = meeting.wait_for(seat, task, |task, who| {
                if task == 1 { Err(EngineError::State(format!("{who:?}"))) } else { Ok(()) }
            });
            meeting.leave();
            done.map_err(|e| e.to_string())
        };
        std::thread::scope(|scope| {
            let all = [(0, 1), (1, 2), (2, 1)].map(|member| scope.spawn(move || come(member)));
            let done = all.map(|thread| thread.join().unwrap());
            assert!(done[1].is_ok());
            assert!(done[0].as_ref().is_err_and(|e| e.contains("[0, 2]")) && done[0] == done[2], "{done:?}");
        });
    }
}
