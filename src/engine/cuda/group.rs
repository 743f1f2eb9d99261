//! Streams that are played in one launch though each is driven from a thread of its own.

use std::sync::{Arc, Mutex, MutexGuard};

use super::machine::Machine;
use super::streams::{Model, Plan, Played, Sampling, Streams, Wave};
use crate::cuda::launch::{DecodeGeometry, SET};
use crate::engine::EngineError;
use crate::engine::meeting::{Meeting, lock};

/// What members wait for. Who has looked ahead comes back to go on with those who wait for that already, and who has a plan to render it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// Plan frames, by which nothing moves on.
    Ahead,
    Plan,
    /// Frames under bands that are given.
    Render,
}

/// What a member wants played.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    pub sampling: Sampling,
    pub n_frames: usize,
    /// Uniforms of the plan, as far as it is drawn; those of one way after the other where several are looked at.
    pub plan: Vec<f32>,
    /// Uniforms of the wave, as far as it is.
    pub wave: Vec<f32>,
    /// Where the plan is given.
    pub bands: Vec<f32>,
}

struct Group<M: Machine> {
    model: Arc<Model<M>>,
    geometry: DecodeGeometry,
    streams: Mutex<Streams<M>>,
    /// What looks ahead, once somebody asked for it.
    ahead: Mutex<Option<Streams<M>>>,
    /// What each member wants, then what it gets.
    seats: Vec<Mutex<(Turn, Played)>>,
    meeting: Meeting<Task>,
}

/// A stream's place in a group, of one perhaps; dropping it leaves the group.
pub struct Member<M: Machine> {
    group: Arc<Group<M>>,
    seat: usize,
}

impl<M: Machine> Member<M> {
    /// The members of a group of `n`.
    ///
    /// # Errors
    /// When the machine has no room for as many streams.
    pub fn group(model: Arc<Model<M>>, n: usize, geometry: DecodeGeometry) -> Result<Vec<Self>, EngineError> {
        let group = Arc::new(Group {
            streams: Mutex::new(Streams::new(model.clone(), n, geometry)?),
            ahead: Mutex::new(None),
            seats: (0..n).map(|_| Mutex::default()).collect(),
            meeting: Meeting::new(n),
            model,
            geometry,
        });
        Ok((0..n).map(|seat| Self { group: group.clone(), seat }).collect())
    }

    pub fn model(&self) -> &Arc<Model<M>> {
        &self.group.model
    }

    pub fn geometry(&self) -> DecodeGeometry {
        self.group.geometry
    }

    /// The group's streams, of which the member's is [`Self::seat`].
    pub fn streams(&self) -> MutexGuard<'_, Streams<M>> {
        lock(&self.group.streams)
    }

    /// Which of the streams is its.
    pub fn seat(&self) -> usize {
        self.seat
    }

    /// Plays its turn together with all other members: returns when all have come and it is done.
    ///
    /// # Errors
    /// As [`Streams::play_some`].
    pub fn play(&self, task: Task, turn: Turn) -> Result<Played, EngineError> {
        let Group { seats, meeting, .. } = &*self.group;
        lock(&seats[self.seat]).0 = turn;
        meeting.wait_for(self.seat, task, |task, who| self.group.play(task, who))?;
        Ok(std::mem::take(&mut lock(&seats[self.seat]).1))
    }
}

impl<M: Machine> Drop for Member<M> {
    fn drop(&mut self) {
        self.group.meeting.leave();
    }
}

impl<M: Machine> Group<M> {
    /// A task of the members `who`, those together that want as many frames, drawn alike.
    fn play(&self, task: Task, who: &[usize]) -> Result<(), EngineError> {
        let mut seats: Vec<_> = who.iter().map(|&seat| (seat, lock(&self.seats[seat]))).collect();
        while let Some((_, first)) = seats.first() {
            let Turn { sampling, n_frames, ref plan, .. } = first.0;
            let n_plan = plan.len();
            let drawn_alike = |other: &Sampling| match task {
                Task::Ahead | Task::Plan => other.plan == sampling.plan,
                Task::Render => other.wave == sampling.wave,
            };
            let alike =
                |turn: &Turn| turn.n_frames == n_frames && turn.plan.len() == n_plan && drawn_alike(&turn.sampling);
            let (mut now, later): (Vec<_>, _) = seats.into_iter().partition(|(_, seat)| alike(&seat.0));
            seats = later;
            let (who, turns): (Vec<_>, Vec<_>) = now.iter().map(|(seat, guard)| (*seat, &guard.0)).unzip();
            let played = if task == Task::Ahead {
                self.look_ahead(&who, &turns)?
            } else {
                let all = |of: fn(&Turn) -> &[f32]| turns.iter().flat_map(|turn| of(turn)).copied().collect::<Vec<_>>();
                let (plan, wave, bands) = (all(|turn| &turn.plan), all(|turn| &turn.wave), all(|turn| &turn.bands));
                let plan = if task == Task::Render { Plan::Given(&bands) } else { Plan::Draw(&plan) };
                let wave = if task == Task::Plan { Wave::Silent } else { Wave::Draw(&wave) };
                let played = lock(&self.streams).play_some(&who, n_frames, plan, wave, &sampling)?;
                (0..who.len()).map(|i| played.of(i, who.len())).collect()
            };
            for ((_, seat), played) in now.iter_mut().zip(played) {
                seat.1 = played;
            }
        }
        Ok(())
    }

    /// The ways of streams whose turns are alike, as many of each in a launch as there is room for.
    fn look_ahead(&self, who: &[usize], turns: &[&Turn]) -> Result<Vec<Played>, EngineError> {
        let mut played = vec![Played::default(); who.len()];
        let Some(Turn { n_frames, sampling, plan, .. }) = turns.first() else { return Ok(played) };
        let n_way = n_frames * self.model.config.plan.n_codebooks;
        let streams = lock(&self.streams);
        let mut ahead = lock(&self.ahead);
        let ahead = match &mut *ahead {
            Some(ahead) => ahead,
            none => {
                let n = streams.count();
                let geometry = if n < SET { self.model.geometry(SET) } else { self.geometry };
                none.insert(Streams::new(self.model.clone(), n.max(SET), geometry)?)
            }
        };
        let at_once = (n_way * (ahead.count() / who.len()).max(1)).max(1);
        for from in (0..plan.len()).step_by(at_once) {
            let ways = from..plan.len().min(from + at_once);
            let rows: Vec<usize> = who.iter().flat_map(|&seat| std::iter::repeat_n(seat, ways.len() / n_way)).collect();
            ahead.follow(&streams, &rows)?;
            let uniforms: Vec<f32> = turns.iter().flat_map(|turn| &turn.plan[ways.clone()]).copied().collect();
            let turns: Vec<usize> = (0..rows.len()).collect();
            let of_all = ahead.play_some(&turns, *n_frames, Plan::Draw(&uniforms), Wave::Silent, sampling)?;
            for (i, played) in played.iter_mut().enumerate() {
                played.extend(of_all.of(i, who.len()));
            }
        }
        Ok(played)
    }
}
