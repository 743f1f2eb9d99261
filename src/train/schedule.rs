//! How long training lasts and how the learning rate moves meanwhile.

use std::time::{Duration, Instant};

use super::group::Group;
use super::resume::Progress;

/// End of training, by work or by the clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Optimizer steps of each transformer.
    Steps(usize),
    /// Time for both transformers together.
    Time(Duration),
}

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// Along a cosine from its peak to nearly zero.
    #[default]
    Cosine,
    /// At its peak, and over the last fifth as 1 - sqrt to nearly zero (warm-up, stable, decay; Hu et al., 2024, Haegele et
    /// al., 2024): what stands before the decay can be trained on.
    Wsd,
}

/// Part of a [`Budget::Time`] that the plan transformer gets.
pub const PLAN_SHARE: f64 = 0.25;
/// Steps over which the learning rate rises from zero.
const WARM_UP: f64 = 50.0;
/// What it falls to, as a share of the peak.
const FLOOR: f64 = 0.02;
/// Share of the budget in which [`Schedule::Wsd`] decays.
const DECAY: f64 = 0.2;

/// Follows one part's progress.
pub struct Clock {
    budget: Budget,
    schedule: Schedule,
    start: Instant,
    /// Time that earlier processes spent.
    before: Duration,
    /// What rank 0's clock said after the last step, s.
    read_s: f64,
    step: usize,
}

impl Clock {
    /// Goes on from where the part stands; `share` of a time budget is this part's.
    pub fn resume(budget: Budget, schedule: Schedule, share: f64, progress: &Progress) -> Self {
        let budget = match budget {
            Budget::Time(total) => Budget::Time(total.mul_f64(share)),
            steps => steps,
        };
        let before = Duration::try_from_secs_f64(progress.elapsed_s).unwrap_or_default();
        Self { budget, schedule, start: Instant::now(), before, read_s: before.as_secs_f64(), step: progress.step }
    }

    /// Steps made.
    pub fn step(&self) -> usize {
        self.step
    }

    pub fn elapsed(&self) -> Duration {
        self.before + self.start.elapsed()
    }

    /// Counts a step, and reads rank 0's clock: the ranks must agree on what it says.
    pub fn advance(&mut self, group: &dyn Group) {
        self.step += 1;
        self.read_s = group.number_of_first(self.elapsed().as_secs_f64());
    }

    /// Share of the budget that was used after the last step, 0 to 1.
    pub fn done(&self) -> f64 {
        match self.budget {
            Budget::Steps(steps) => self.step as f64 / steps.max(1) as f64,
            Budget::Time(time) => self.read_s / time.as_secs_f64().max(1e-9),
        }
        .min(1.0)
    }

    /// Factor on the peak learning rate: linear warm-up, then the schedule.
    pub fn rate(&self) -> f64 {
        rate(self.schedule, self.step, self.done())
    }
}

fn rate(schedule: Schedule, step: usize, done: f64) -> f64 {
    let warm = ((step + 1) as f64 / WARM_UP).min(1.0);
    let left = match schedule {
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        Schedule::Wsd => 1.0 - ((done - (1.0 - DECAY)) / DECAY).max(0.0).sqrt(),
    };
    warm * (FLOOR + (1.0 - FLOOR) * left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls_to_its_floor() {
        for schedule in [Schedule::Cosine, Schedule::Wsd] {
            assert!(rate(schedule, 0, 0.0) < 0.03 && (rate(schedule, 100, 0.0) - 1.0).abs() < 1e-9);
            assert!((rate(schedule, 1000, 1.0) - FLOOR).abs() < 1e-9);
            assert!(rate(schedule, 1000, 0.85) > rate(schedule, 1000, 0.95));
        }
        assert!(rate(Schedule::Cosine, 1000, 0.3) > rate(Schedule::Cosine, 1000, 0.6));
        assert_eq!(rate(Schedule::Wsd, 1000, 0.1), rate(Schedule::Wsd, 1000, 0.79));
    }
}
