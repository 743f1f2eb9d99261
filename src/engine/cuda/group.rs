//! Streams that are played in one launch though each is driven from a thread of its own.

use std::sync::{Arc, Mutex, MutexGuard};

use super::machine::Machine;
use super::streams::{Model, Plan, Played, Sampling, Streams, Wave};
use crate::cuda::launch::DecodeGeometry;
use crate::engine::EngineError;
use crate::engine::meeting::{Meeting, lock};

/// What members wait for. Who has looked ahead comes back for a plan, and who has one to render it with those who wait for that already.
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
    /// Of the plan or, where frames are rendered, of the wave.
    pub uniforms: Vec<f32>,
    /// Where frames are rendered.
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
            let Turn { sampling, n_frames, .. } = first.0;
            let drawn_alike = |other: &Sampling| match task {
                Task::Ahead | Task::Plan => other.plan == sampling.plan,
                Task::Render => other.wave == sampling.wave,
            };
            let alike = |turn: &Turn| turn.n_frames == n_frames && drawn_alike(&turn.sampling);
            let (mut now, later): (Vec<_>, _) = seats.into_iter().partition(|(_, seat)| alike(&seat.0));
            seats = later;
            let together = |of: fn(&Turn) -> &[f32]| now.iter().flat_map(|(_, seat)| of(&seat.0)).copied().collect();
            let (uniforms, bands): (Vec<f32>, Vec<f32>) =
                (together(|turn| &turn.uniforms), together(|turn| &turn.bands));
            let who: Vec<usize> = now.iter().map(|(seat, _)| *seat).collect();
            let mut streams = lock(&self.streams);
            let played = match task {
                Task::Plan => streams.play_some(&who, n_frames, Plan::Draw(&uniforms), Wave::Silent, &sampling),
                Task::Render => {
                    streams.play_some(&who, n_frames, Plan::Given(&bands), Wave::Draw(&uniforms), &sampling)
                }
                Task::Ahead => self.look_ahead(&streams, &who, n_frames, &uniforms, &sampling),
            }?;
            for (i, (_, seat)) in now.iter_mut().enumerate() {
                seat.1 = played.of(i, who.len());
            }
        }
        Ok(())
    }

    fn look_ahead(
        &self,
        streams: &Streams<M>,
        who: &[usize],
        n_frames: usize,
        uniforms: &[f32],
        sampling: &Sampling,
    ) -> Result<Played, EngineError> {
        let mut ahead = lock(&self.ahead);
        let ahead = match &mut *ahead {
            Some(ahead) => ahead,
            none => none.insert(Streams::new(self.model.clone(), streams.count(), self.geometry)?),
        };
        ahead.follow(streams)?;
        ahead.play_some(who, n_frames, Plan::Draw(uniforms), Wave::Silent, sampling)
    }
}
