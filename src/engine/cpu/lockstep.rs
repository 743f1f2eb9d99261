//! Streams that play together though each is driven from a thread of its own.

use std::sync::{Arc, Mutex, MutexGuard};

use super::plan::PlanTurn;
use super::stream::{Stream, Turn, Work};
use super::weights::Weights;
use crate::codec::Token;
use crate::engine::EngineError;
use crate::engine::meeting::{Meeting, lock};
use crate::plan::PlanFrame;
use crate::sampler::{PlanDraw, PlanSampling, WaveSampling};

/// Engines whose frames are drawn and rendered in lockstep.
struct Group {
    /// Locked by their members, and all of them by whoever plays.
    seats: Vec<Mutex<Seat>>,
    meeting: Meeting<Task>,
}

/// Plans come first: who has drawn one comes back to render with those who wait for that already.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
        let group = Arc::new(Group { seats: (0..n).map(|_| Mutex::new(seat())).collect(), meeting: Meeting::new(n) });
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

    fn wait_for(&self, task: Task, weights: &Weights, work: &mut Work) -> Result<(), EngineError> {
        let Group { seats, meeting } = &*self.group;
        meeting.wait_for(self.seat, task, |task, who| {
            let mut guards: Vec<_> = who.iter().map(|&seat| lock(&seats[seat])).collect();
            let seats = guards.iter_mut();
            match task {
                Task::Plan => weights.draw(&mut seats.map(|seat| seat.plan_turn()).collect::<Vec<_>>(), work),
                Task::Render => {
                    let (mut lanes, mut steps): (Vec<_>, Vec<_>) = seats.map(|seat| seat.turn().split()).unzip();
                    weights.render(&mut lanes, &mut steps, work);
                    Ok(())
                }
            }
        })
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
        self.group.meeting.leave();
    }
}
