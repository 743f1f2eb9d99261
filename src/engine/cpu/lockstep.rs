//! Streams that play together though each is driven from a thread of its own: who comes first waits for the others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::plan::PlanTurn;
use super::stream::{Stream, Turn, Work};
use super::weights::Weights;
use crate::codec::Token;
use crate::engine::EngineError;
use crate::plan::PlanFrame;
use crate::sampler::{PlanDraw, PlanSampling, WaveSampling};

/// Engines whose frames are drawn and rendered in lockstep.
struct Group {
    /// Locked by their members, and all of them by whoever plays.
    seats: Vec<Mutex<Seat>>,
    state: Mutex<State>,
    /// A round is over, or somebody left.
    changed: Condvar,
}

struct State {
    n_members: usize,
    /// Per seat: what it waits for.
    waiting: Vec<Option<Task>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    Plan,
    Render,
}

/// Where a stream lies while it is played; between rounds an unused one.
struct Seat {
    stream: Stream,
    plan_sampling: PlanSampling,
    wave_sampling: WaveSampling,
    uniforms: Vec<f32>,
    frame: PlanFrame,
    draw: PlanDraw,
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
        let seat = || Seat {
            stream: unused.clone(),
            plan_sampling: PlanSampling::default(),
            wave_sampling: sampling,
            uniforms: Vec::new(),
            frame: PlanFrame::default(),
            draw: PlanDraw::default(),
            tokens: Vec::new(),
        };
        let group = Arc::new(Group {
            seats: (0..n).map(|_| Mutex::new(seat())).collect(),
            state: Mutex::new(State { n_members: n, waiting: vec![None; n] }),
            changed: Condvar::new(),
        });
        (0..n).map(|seat| Member { group: group.clone(), seat }).collect()
    }

    /// Draws the frame of `turn` together with those of all other members: returns when all have come and it is done.
    ///
    /// # Errors
    /// As [`PlanTransformer::draw`](super::plan::PlanTransformer::draw).
    pub fn plan(&self, weights: &Weights, turn: PlanTurn, work: &mut Work) -> Result<(), EngineError> {
        let PlanTurn { state, sampling, uniforms, frame, draw } = turn;
        {
            let mut seat = self.seat();
            std::mem::swap(&mut seat.stream.plan, state);
            seat.plan_sampling = *sampling;
            seat.uniforms.clear();
            seat.uniforms.extend_from_slice(uniforms);
        }
        let done = self.wait_for(Task::Plan, weights, work);
        let mut seat = self.seat();
        std::mem::swap(&mut seat.stream.plan, state);
        frame.clone_from(&seat.frame);
        *draw = seat.draw;
        done
    }

    /// Renders `turn` together with all other members: returns when all have come and the frame is done.
    ///
    /// # Errors
    /// None of its own.
    pub fn render(&self, weights: &Weights, turn: Turn, work: &mut Work) -> Result<(), EngineError> {
        let Turn { sound, sampling, uniforms, out } = turn;
        {
            let mut seat = self.seat();
            std::mem::swap(&mut seat.stream.sound, sound);
            seat.wave_sampling = *sampling;
            seat.uniforms.clear();
            seat.uniforms.extend_from_slice(uniforms);
            seat.tokens.resize(out.len(), 0);
        }
        let done = self.wait_for(Task::Render, weights, work);
        let mut seat = self.seat();
        std::mem::swap(&mut seat.stream.sound, sound);
        out.copy_from_slice(&seat.tokens);
        done
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        lock(&self.group.seats[self.seat])
    }

    /// Returns when `task` is done for this seat; the last one to come does it for all.
    fn wait_for(&self, task: Task, weights: &Weights, work: &mut Work) -> Result<(), EngineError> {
        let Group { seats, state, changed } = &*self.group;
        let mut result = Ok(());
        let mut state = lock(state);
        state.waiting[self.seat] = Some(task);
        while state.waiting[self.seat].is_some() {
            if state.waiting.iter().flatten().count() < state.n_members {
                state = changed.wait(state).expect(PANICKED);
                continue;
            }
            // Plans come first: who has drawn one comes back to render with those who wait for that already.
            let task = if state.waiting.contains(&Some(Task::Plan)) { Task::Plan } else { Task::Render };
            let taking_part = seats.iter().zip(&state.waiting).filter(|(_, waits)| **waits == Some(task));
            let mut guards: Vec<_> = taking_part.map(|(seat, _)| lock(seat)).collect();
            let seats = guards.iter_mut();
            result = match task {
                Task::Plan => weights.draw_all(seats.map(|seat| seat.plan_turn()), work),
                Task::Render => {
                    weights.render_all(seats.map(|seat| seat.turn()), work);
                    Ok(())
                }
            };
            drop(guards);
            state.waiting.iter_mut().filter(|waits| **waits == Some(task)).for_each(|waits| *waits = None);
            changed.notify_all();
        }
        result
    }
}

impl Seat {
    fn plan_turn(&mut self) -> PlanTurn<'_> {
        let Seat { stream, plan_sampling: sampling, uniforms, frame, draw, .. } = self;
        PlanTurn { state: &mut stream.plan, sampling, uniforms, frame, draw }
    }

    fn turn(&mut self) -> Turn<'_> {
        let Seat { stream, wave_sampling: sampling, uniforms, tokens, .. } = self;
        Turn { sound: &mut stream.sound, sampling, uniforms, out: tokens }
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
