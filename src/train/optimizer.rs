//! AdamW (Loshchilov and Hutter, 2019) with clipping by global norm and a moving average of the weights.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.95;
const EPSILON: f64 = 1e-8;
/// Decay of matrices; gains, biases and embeddings are left alone.
const WEIGHT_DECAY: f64 = 0.05;
/// Largest norm of all gradients together.
const MAX_NORM: f64 = 1.0;
/// Share of the average that a step keeps, once it has seen enough steps.
const AVERAGE: f64 = 0.998;

struct Slot {
    var: Var,
    mean: Tensor,
    square: Tensor,
    average: Tensor,
    decays: bool,
}

/// Weights with their optimizer state, by name.
pub struct AdamW {
    slots: BTreeMap<String, Slot>,
    step: usize,
}

impl AdamW {
    pub fn new(vars: BTreeMap<String, Var>) -> Result<Self> {
        let slots = vars
            .into_iter()
            .map(|(name, var)| {
                let zeros = var.as_tensor().zeros_like()?.detach();
                let decays = var.rank() > 1 && name.ends_with(".weight");
                let average = var.as_tensor().detach().copy()?;
                Ok((name, Slot { var, mean: zeros.clone(), square: zeros, average, decays }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { slots, step: 0 })
    }

    /// The averaged weights, by name.
    pub fn averages(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.slots.iter().map(|(name, slot)| (name, &slot.average))
    }

    /// One step by the mean of the workers' gradients. Returns the gradients' norm before clipping; if that is not
    /// finite nothing changes.
    pub fn step(&mut self, gradients: &[GradStore], learning_rate: f64) -> Result<f64> {
        let mut total = 0.0;
        let mut means = Vec::with_capacity(self.slots.len());
        for slot in self.slots.values() {
            let mut parts = gradients.iter().filter_map(|store| store.get(slot.var.as_tensor()));
            let Some(first) = parts.next() else {
                means.push(None);
                continue;
            };
            let sum = parts.try_fold(first.clone(), |sum, part| sum + part)?;
            let mean = (sum / gradients.len() as f64)?.detach();
            total += f64::from(mean.sqr()?.sum_all()?.to_scalar::<f32>()?);
            means.push(Some(mean));
        }
        let norm = total.sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.step += 1;
        let clip = (MAX_NORM / norm.max(1e-12)).min(1.0);
        let corrections = [1.0 - BETA_1.powi(self.step as i32), 1.0 - BETA_2.powi(self.step as i32)];
        // The average follows quickly at first.
        let keep = AVERAGE.min((1.0 + self.step as f64) / (10.0 + self.step as f64));
        for (slot, gradient) in self.slots.values_mut().zip(means) {
            if let Some(gradient) = gradient {
                let gradient = (gradient * clip)?;
                slot.mean = ((&slot.mean * BETA_1)? + (&gradient * (1.0 - BETA_1))?)?;
                slot.square = ((&slot.square * BETA_2)? + (gradient.sqr()? * (1.0 - BETA_2))?)?;
                let direction =
                    ((&slot.mean / corrections[0])? / ((&slot.square / corrections[1])?.sqrt()? + EPSILON)?)?;
                let decay = if slot.decays { 1.0 - learning_rate * WEIGHT_DECAY } else { 1.0 };
                slot.var.set(&((slot.var.as_tensor().detach() * decay)? - (direction * learning_rate)?)?)?;
            }
            slot.average = ((&slot.average * keep)? + (slot.var.as_tensor().detach() * (1.0 - keep))?)?;
        }
        Ok(norm)
    }

    /// Exchanges the weights and their averages, for an evaluation of the averages.
    pub fn swap(&mut self) -> Result<()> {
        for slot in self.slots.values_mut() {
            let weights = slot.var.as_tensor().detach().copy()?;
            slot.var.set(&slot.average)?;
            slot.average = weights;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn it_finds_the_bottom_of_a_bowl() {
        let var = Var::from_tensor(&Tensor::new(&[3.0f32, -2.0], &Device::Cpu).unwrap()).unwrap();
        let goal = Tensor::new(&[1.0f32, 0.5], &Device::Cpu).unwrap();
        let mut optimizer = AdamW::new([("x".to_owned(), var.clone())].into()).unwrap();
        for _ in 0..500 {
            let loss = (var.as_tensor() - &goal).unwrap().sqr().unwrap().sum_all().unwrap();
            optimizer.step(&[loss.backward().unwrap()], 0.05).unwrap();
        }
        let found = var.as_tensor().to_vec1::<f32>().unwrap();
        assert!((found[0] - 1.0).abs() < 0.02 && (found[1] - 0.5).abs() < 0.02, "{found:?}");
    }

    #[test]
    fn a_gradient_that_is_not_a_number_changes_nothing() {
        let var = Var::from_tensor(&Tensor::new(&[1.0f32], &Device::Cpu).unwrap()).unwrap();
        let mut optimizer = AdamW::new([("x".to_owned(), var.clone())].into()).unwrap();
        let loss = (var.as_tensor() * f64::NAN).unwrap().sum_all().unwrap();
        assert!(optimizer.step(&[loss.backward().unwrap()], 0.1).unwrap().is_nan());
        assert_eq!(var.as_tensor().to_vec1::<f32>().unwrap(), [1.0]);
    }
}
