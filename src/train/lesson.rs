//! The loop that both transformers are trained in: batch, loss, step, report, validation.

use std::f64::consts::LN_2;
use std::ops::ControlFlow;

use candle_core::Tensor;

use super::optimizer::AdamW;
use super::schedule::Clock;
use super::workers::Workers;
use super::{Observer, Part, TrainError, TrainEvent, TrainSettings};

/// Steps between reports.
const REPORT: usize = 10;

/// What one part of the model is taught, and how.
pub struct Lesson<'a, T> {
    pub part: Part,
    /// Share of a time budget.
    pub share: f64,
    pub learning_rate: f64,
    /// Steps between validations.
    pub validate_every: usize,
    /// The next batch.
    pub batch: &'a mut dyn FnMut() -> Result<Vec<T>, TrainError>,
    /// Mean loss of an item in nats per unit, a scalar.
    pub loss: &'a (dyn Fn(&T) -> candle_core::Result<Tensor> + Sync),
    /// Units (frames, samples) of an item.
    pub units: fn(&T) -> usize,
    /// Nats per unit on held-out pieces under the averaged weights; `None` without any.
    pub validate: &'a dyn Fn(&Workers) -> Result<Option<f64>, TrainError>,
    /// After every validation.
    pub save: &'a mut dyn FnMut(&AdamW) -> Result<(), TrainError>,
}

impl<T: Sync> Lesson<'_, T> {
    /// Trains until the budget is spent or the observer breaks; the optimizer's averages then hold the result.
    pub fn teach(
        self,
        settings: &TrainSettings,
        optimizer: &mut AdamW,
        observe: &mut Observer,
    ) -> Result<ControlFlow<()>, TrainError> {
        let workers = Workers::new(settings.threads)?;
        let mut clock = Clock::start(settings.budget, self.share);
        let (mut recent, mut units) = (Vec::new(), 0);
        while clock.done() < 1.0 {
            let batch = (self.batch)()?;
            let results = workers.map(&batch, |item| {
                let loss = (self.loss)(item)?;
                Ok((loss.to_scalar::<f32>()?, loss.backward()?))
            })?;
            units += batch.iter().map(self.units).sum::<usize>();
            let (losses, gradients): (Vec<f32>, Vec<_>) = results.into_iter().unzip();
            let norm = optimizer.step(&gradients, self.learning_rate * clock.rate())?;
            clock.advance();
            let step = clock.step();
            let bits = f64::from(losses.iter().sum::<f32>()) / losses.len() as f64 / LN_2;
            if !bits.is_finite() || !norm.is_finite() {
                return Err(TrainError::Diverged { step });
            }
            recent.push(bits);
            let over = clock.done() >= 1.0;
            if step.is_multiple_of(REPORT) || over {
                let event = TrainEvent::Step {
                    part: self.part,
                    step,
                    done: clock.done(),
                    bits: recent.iter().sum::<f64>() / recent.len() as f64,
                    units_per_s: units as f64 / clock.elapsed().as_secs_f64(),
                    elapsed: clock.elapsed(),
                };
                recent.clear();
                if observe(event).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            if step.is_multiple_of(self.validate_every) || over {
                optimizer.swap()?;
                let nats = (self.validate)(&workers);
                optimizer.swap()?;
                if let Some(nats) = nats? {
                    let event = TrainEvent::Validation { part: self.part, step, bits: nats / LN_2 };
                    if observe(event).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                (self.save)(optimizer)?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}
