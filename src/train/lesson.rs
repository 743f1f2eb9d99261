//! The loop that both transformers are trained in: items, loss, step, report, validation, state.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;
use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::Tensor;

use super::group::Group;
use super::hash::Hash;
use super::optimizer::AdamW;
use super::resume::Progress;
use super::schedule::Clock;
use super::watch::Judged;
use super::workers::Workers;
use super::{Observer, Part, Run, TrainError, TrainEvent};
use crate::ahead::{ahead, lone_threads};
use crate::metrics::Adherence;
use crate::rng::Rng;

/// Steps in a row that may fail before training is given up.
const MOST_SKIPPED: usize = 5;
/// Threads that compute on items for each one that draws them.
const FED_BY_ONE: usize = 4;

/// Items that one loss is computed of, and how many they are: one on the CPU, where every thread computes its own, and on a GPU all
/// of one length that this rank has in a step.
struct Bundle<B> {
    n: usize,
    items: B,
}

/// Hands out the bundles of the coming steps in order.
type Next<'a, B> = dyn FnMut() -> Option<Result<Bundle<B>, TrainError>> + 'a;

/// Scores one rank's share of held-out pieces: nats, and what their sum over all ranks is to be divided by.
pub type Validate<'a> = dyn Fn(&Workers, &dyn Group) -> Result<(f64, usize), TrainError> + Sync + 'a;

/// What one part of the model is taught, and how.
pub struct Lesson<'a, T, B> {
    pub part: Part,
    pub learning_rate: f64,
    /// Items per step, over all processes.
    pub batch: usize,
    /// Steps between validations, unless the settings say otherwise.
    pub validate_every: usize,
    /// The item that a generator draws; every item has a generator of its own.
    pub draw: &'a (dyn Fn(&mut Rng) -> Result<T, TrainError> + Sync),
    /// How long an item is; those of one length can be joined.
    pub length: fn(&T) -> usize,
    /// Items, one or more, as the loss wants them.
    pub join: &'a (dyn Fn(Vec<T>) -> Result<B, TrainError> + Sync),
    /// Mean loss of joined items in nats per unit, a scalar.
    pub loss: &'a (dyn Fn(&B) -> candle_core::Result<Tensor> + Sync),
    /// Units (frames, samples) of joined items.
    pub units: fn(&B) -> usize,
    /// On held-out pieces, under the averaged weights.
    pub validate: &'a Validate<'a>,
}

impl<T, B: Send + Sync> Lesson<'_, T, B> {
    /// Trains until the budget is spent, validation has stopped to gain, or the observer breaks; the optimizer's averages
    /// then hold the result, the best one that was validated. Goes on from the folder's state.
    pub fn teach(self, run: &mut Run, optimizer: &mut AdamW) -> Result<ControlFlow<()>, TrainError> {
        let (part, settings, group) = (self.part, run.settings, run.group);
        let progress = run.folder.load(part, optimizer)?;
        if progress.step > 0 {
            let best_bits = progress.best.map(|nats| nats / LN_2);
            let (step, finished) = (progress.step, progress.finished);
            let _ = (run.observe)(TrainEvent::Resumed { part, step, finished, best_bits });
        }
        run.keeper.recall(part, &progress.history);
        if progress.finished {
            return Ok(ControlFlow::Continue(()));
        }
        // Drawn ahead on threads of their own; which item is which depends on the seed and its number alone. One of every
        // `size` items is this rank's.
        let (size, rank, batch) = (group.size(), group.rank(), self.batch);
        let (step, first) = (progress.step, group.next_mine(progress.step * batch));
        let (draw, length, join, seed) = (self.draw, self.length, self.join, settings.seed);
        let bundles = |numbers: &mut dyn Iterator<Item = usize>| {
            let mut alike = BTreeMap::<usize, Vec<T>>::new();
            for n in numbers {
                let item = draw(&mut generator(seed, part, n))?;
                alike.entry(length(&item)).or_default().push(item);
            }
            alike.into_values().map(|items| Ok(Bundle { n: items.len(), items: join(items)? })).collect()
        };
        let learn = |next: &mut dyn FnMut() -> Option<Result<Vec<Bundle<B>>, TrainError>>| {
            let mut drawn = Vec::new().into_iter();
            self.learn(run, optimizer, progress, &mut || loop {
                match drawn.next() {
                    Some(bundle) => break Some(Ok(bundle)),
                    None => match next()? {
                        Ok(more) => drawn = more.into_iter(),
                        Err(error) => break Some(Err(error)),
                    },
                }
            })
        };
        if settings.device.is_cpu() {
            let feeders = lone_threads(settings.threads.div_ceil(FED_BY_ONE))?;
            let most = 2 * batch.div_ceil(size).min(settings.threads.max(1));
            let one = |n| bundles(&mut std::iter::once(first + n * size));
            ahead(&feeders, most, 0..usize::MAX, one, learn)
        } else if batch < size {
            Err(TrainError::Batch { batch, size })
        } else {
            // A GPU computes, and all threads draw for it, each for a step of its own.
            let feeders = lone_threads(settings.threads)?;
            let all = |n| bundles(&mut ((step + n) * batch..(step + n + 1) * batch).filter(|item| item % size == rank));
            ahead(&feeders, settings.threads, 0..usize::MAX, all, learn)
        }
    }

    /// The steps that are left.
    fn learn(
        &self,
        run: &mut Run,
        optimizer: &mut AdamW,
        mut progress: Progress,
        next: &mut Next<B>,
    ) -> Result<ControlFlow<()>, TrainError> {
        let (part, settings, folder, group) = (self.part, run.settings, run.folder, run.group);
        // One thread tells a GPU what to do.
        let workers = Workers::new(if settings.device.is_cpu() { settings.threads } else { 1 })?;
        let mut clock = Clock::resume(settings.budget, settings.schedule, settings.share(part), &progress);
        let (mut saved, mut begun_at) = (Instant::now(), (progress.units, clock.elapsed()));
        let mut going = ControlFlow::Continue(());
        while clock.done() < 1.0 && going.is_continue() {
            let learning_rate = self.learning_rate * clock.rate();
            let (bits, norm) = self.step(run, &workers, optimizer, &mut progress, next, learning_rate)?;
            clock.advance(group);
            (progress.step, progress.elapsed_s) = (clock.step(), clock.elapsed().as_secs_f64());
            if progress.skipped > MOST_SKIPPED {
                return Err(TrainError::Diverged { step: progress.step });
            }
            going = (run.observe)(TrainEvent::Step {
                part,
                step: progress.step,
                done: clock.done(),
                bits,
                norm,
                learning_rate,
                skipped: progress.skipped > 0,
                units: progress.units,
                hours: run.data.hours(progress.units, part),
                units_per_s: (progress.units - begun_at.0) as f64
                    / (clock.elapsed() - begun_at.1).as_secs_f64().max(1e-9),
                elapsed_s: progress.elapsed_s,
            });
            let over = clock.done() >= 1.0;
            if progress.step.is_multiple_of(settings.validate_every.unwrap_or(self.validate_every)) || over {
                let before = clock.elapsed();
                if self.judge(&workers, run, optimizer, &mut progress)?.is_break() {
                    going = ControlFlow::Break(());
                }
                if settings.patience.is_some_and(|patience| progress.stale >= patience) {
                    progress.finished = true;
                }
                begun_at.1 += clock.elapsed() - before;
            }
            if group.any(going.is_break()) {
                going = ControlFlow::Break(());
            }
            progress.finished |= over;
            if progress.finished {
                break;
            }
            if saved.elapsed() >= settings.save_every {
                warn(folder.save(part, optimizer, &progress), run.observe);
                saved = Instant::now();
            }
        }
        // Whoever ended it gets the best model, and goes on from the last.
        if !progress.finished {
            warn(folder.save(part, optimizer, &progress), run.observe);
        }
        if (progress.stale > 0 || progress.recent.1 > 0)
            && let Some(best) = folder.best(part)
        {
            optimizer.begin_from(&best).map_err(TrainError::Best)?;
        }
        if progress.finished {
            warn(folder.save(part, optimizer, &progress), run.observe);
        }
        Ok(going)
    }

    /// One step by the mean gradient of a batch over all ranks; gives its bits per unit and the gradient's norm.
    ///
    /// Only as many bundles as there are threads are in memory at a time.
    fn step(
        &self,
        run: &Run,
        workers: &Workers,
        optimizer: &mut AdamW,
        progress: &mut Progress,
        next: &mut Next<B>,
        learning_rate: f64,
    ) -> Result<(f64, f64), TrainError> {
        let (group, threads) = (run.group, run.settings.threads.max(1));
        let first = progress.step * self.batch;
        let (mut nats, mut units) = (0.0, 0);
        let mut left = group.mine(first..first + self.batch).len();
        while left > 0 {
            let most = if run.settings.device.is_cpu() { left.min(threads) } else { 1 };
            let bundles: Vec<_> = std::iter::from_fn(&mut *next).take(most).collect::<Result<_, _>>()?;
            let n: usize = bundles.iter().map(|bundle| bundle.n).sum();
            if n == 0 {
                return Err(TrainError::NoItems);
            }
            left -= n.min(left);
            let results = workers.map(&bundles, |Bundle { n, items }| {
                let loss = (self.loss)(items)?;
                let gradients = loss.backward()?;
                Ok((*n, (self.units)(items), loss.to_scalar::<f32>()?, gradients))
            })?;
            for (n, n_units, loss, gradients) in results {
                units += n_units;
                nats += n as f64 * f64::from(loss);
                optimizer.add(&gradients, n)?;
            }
        }
        let mut sums = [nats, units as f64];
        group.sum_f64(&mut sums);
        optimizer.all_sum(group)?;
        progress.units += sums[1] as u64;
        let bits = sums[0] / self.batch as f64 / LN_2;
        let norm = optimizer.step(learning_rate, bits.is_finite())?;
        progress.skipped = if bits.is_finite() && norm.is_finite() { 0 } else { progress.skipped + 1 };
        progress.updates = optimizer.steps();
        if progress.skipped == 0 {
            progress.recent = (progress.recent.0 + bits, progress.recent.1 + 1);
        }
        Ok((bits, norm))
    }

    /// Validates the averaged weights, and those of the last step for comparison; keeps the averages if they are the best so
    /// far, or cannot be judged. Then shows what the model has become.
    fn judge(
        &self,
        workers: &Workers,
        run: &mut Run,
        optimizer: &mut AdamW,
        progress: &mut Progress,
    ) -> Result<ControlFlow<()>, TrainError> {
        let (part, step) = (self.part, progress.step);
        let raw = (self.validate)(workers, run.group);
        optimizer.swap()?;
        let averaged = (self.validate)(workers, run.group);
        optimizer.swap()?;
        let (nats, raw) = (of_all(run.group, averaged), of_all(run.group, raw));
        let (nats, raw) = (nats?, raw?);
        // What is no number is not the best.
        let best = nats.is_none_or(|nats| nats < progress.best.unwrap_or(f64::INFINITY));
        let mut going = ControlFlow::Continue(());
        if let (Some(nats), Some(raw)) = (nats, raw) {
            going = (run.observe)(TrainEvent::Validation { part, step, bits: nats / LN_2, raw_bits: raw / LN_2, best });
            if best {
                (progress.best, progress.stale) = (Some(nats), 0);
                warn(run.folder.save_best(part, optimizer), run.observe);
            } else {
                progress.stale += 1;
            }
        }
        if best {
            warn(run.keeper.keep(optimizer), run.observe);
        }
        let (sum, n) = std::mem::take(&mut progress.recent);
        let bits = |nats: Option<f64>| nats.map(|nats| nats / LN_2);
        let (held_out, held_out_raw) = (bits(nats), bits(raw));
        progress.history.push(Judged { step, train: sum / f64::from(n.max(1)), held_out, held_out_raw });
        run.keeper.recall(part, &progress.history);
        match run.keeper.show(part, step, optimizer) {
            Ok(Some(Adherence { rms_db, bias_db })) => {
                let event = TrainEvent::FreeRun { part, step, adherence_db: rms_db, bias_db };
                going = if (run.observe)(event).is_break() { ControlFlow::Break(()) } else { going };
            }
            Ok(None) => {}
            shown => warn(shown.map(drop), run.observe),
        }
        // The others sleep while rank 0 plays.
        run.group.of_first(())?;
        Ok(going)
    }
}

/// Mean nats per unit over all ranks; `None` without units. The ranks exchange what they have before one of them fails, and
/// then the others get no number.
fn of_all(group: &dyn Group, scored: Result<(f64, usize), TrainError>) -> Result<Option<f64>, TrainError> {
    let mut sums = scored.as_ref().map_or([f64::NAN; 2], |&(nats, units)| [nats, units as f64]);
    group.sum_f64(&mut sums);
    scored.map(|_| (sums[1] != 0.0).then(|| sums[0] / sums[1]))
}

/// The generator of a part's n-th item: whatever the batch, the threads and the interruptions, the same.
fn generator(seed: u64, part: Part, item: usize) -> Rng {
    Rng::new(Hash::new().bytes(part.name().as_bytes()).words([seed, item as u64]).value())
}

/// A file that cannot be written is no reason to stop: what was written before is still whole, and there may be space
/// the next time.
pub(super) fn warn(result: Result<(), TrainError>, observe: &mut Observer) {
    if let Err(error) = result {
        let _ = observe(TrainEvent::NotSaved { why: error.to_string() });
    }
}
