//! Where streams that play together meet, each driven from a thread of its own: who comes first waits for the others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::EngineError;

/// Tasks of one kind are done for all who wait for it, by whoever comes last; the least kind first.
pub struct Meeting<T> {
    state: Mutex<State<T>>,
    /// A round is over, or somebody left.
    changed: Condvar,
}

struct State<T> {
    n_members: usize,
    n_waiting: usize,
    /// Per seat: what it waits for.
    waiting: Vec<Option<T>>,
    /// Per seat: what became of it, where that went wrong.
    failed: Vec<Option<Arc<EngineError>>>,
}

impl<T: Copy + Ord> Meeting<T> {
    /// For members in seats 0 to `n` - 1.
    pub fn new(n: usize) -> Self {
        let state = State { n_members: n, n_waiting: 0, waiting: vec![None; n], failed: vec![None; n] };
        Self { state: Mutex::new(state), changed: Condvar::new() }
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
        state.waiting[seat] = Some(task);
        state.n_waiting += 1;
        while state.waiting[seat].is_some() {
            if state.n_waiting < state.n_members {
                state = self.changed.wait(state).expect(PANICKED);
                continue;
            }
            let least = state.waiting.iter().flatten().copied().min().unwrap_or(task);
            let who: Vec<usize> = (0..state.waiting.len()).filter(|&i| state.waiting[i] == Some(least)).collect();
            let failed = work(least, &who).err().map(Arc::new);
            state.n_waiting -= who.len();
            for i in who {
                (state.waiting[i], state.failed[i]) = (None, failed.clone());
            }
            self.changed.notify_all();
        }
        state.failed[seat].take().map_or(Ok(()), |error| Err(EngineError::Together(error)))
    }

    /// One member less to wait for.
    pub fn leave(&self) {
        // A meeting at which somebody panicked has nobody to tell.
        if let Ok(mut state) = self.state.lock() {
            state.n_members -= 1;
            self.changed.notify_all();
        }
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
