//! Streams that render together though each is driven from a thread of its own: who comes first waits for the others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::{Stream, Turn, Weights, Work};
use crate::codec::Token;
use crate::sampler::WaveSampling;

/// Engines whose frames are rendered in lockstep.
struct Group {
    /// Locked by their members, and all of them by whoever renders.
    seats: Vec<Mutex<Seat>>,
    state: Mutex<State>,
    /// A round is over, or somebody left.
    changed: Condvar,
}

struct State {
    n_members: usize,
    /// Per seat: it waits for this round.
    waiting: Vec<bool>,
}

/// Where a stream lies while it is rendered; between rounds an unused one.
struct Seat {
    stream: Stream,
    sampling: WaveSampling,
    uniforms: Vec<f32>,
    tokens: Vec<Token>,
}

/// An engine's place in a group; dropping it leaves the group.
pub struct Member {
    group: Arc<Group>,
    seat: usize,
}

impl Member {
    /// The members of a group of `n`; `unused` streams lie in the seats.
    pub fn group(unused: Stream, sampling: WaveSampling, n: usize) -> Vec<Member> {
        let seat = || Seat { stream: unused.clone(), sampling, uniforms: Vec::new(), tokens: Vec::new() };
        let group = Arc::new(Group {
            seats: (0..n).map(|_| Mutex::new(seat())).collect(),
            state: Mutex::new(State { n_members: n, waiting: vec![false; n] }),
            changed: Condvar::new(),
        });
        (0..n).map(|seat| Member { group: group.clone(), seat }).collect()
    }

    /// Renders `turn` together with all other members: returns when all have come and the frame is done.
    pub fn render(&self, weights: &Weights, turn: Turn, work: &mut Work) {
        let Turn { stream, sampling, uniforms, out } = turn;
        let Group { seats, state, changed } = &*self.group;
        {
            let mut seat = lock(&seats[self.seat]);
            std::mem::swap(&mut seat.stream, stream);
            seat.sampling = *sampling;
            seat.uniforms.clear();
            seat.uniforms.extend_from_slice(uniforms);
            seat.tokens.resize(out.len(), 0);
        }
        let mut state = lock(state);
        state.waiting[self.seat] = true;
        while state.waiting[self.seat] {
            if state.waiting.iter().filter(|&&waits| waits).count() == state.n_members {
                let waiting = seats.iter().zip(&state.waiting).filter(|(_, waits)| **waits);
                let mut guards: Vec<_> = waiting.map(|(seat, _)| lock(seat)).collect();
                weights.render_all(guards.iter_mut().map(|seat| seat.turn()), work);
                drop(guards);
                state.waiting.fill(false);
                changed.notify_all();
            } else {
                state = changed.wait(state).expect(PANICKED);
            }
        }
        drop(state);
        let mut seat = lock(&seats[self.seat]);
        std::mem::swap(&mut seat.stream, stream);
        out.copy_from_slice(&seat.tokens);
    }
}

impl Seat {
    fn turn(&mut self) -> Turn<'_> {
        let Seat { stream, sampling, uniforms, tokens } = self;
        Turn { stream, sampling, uniforms, out: tokens }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // A group in which somebody panicked has nobody to tell.
        if let Ok(mut state) = self.group.state.lock() {
            state.n_members -= 1;
            self.group.changed.notify_all();
        }
    }
}

const PANICKED: &str = "another stream of the group panicked";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect(PANICKED)
}
