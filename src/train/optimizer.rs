//! AdamW (Loshchilov and Hutter, 2019) with clipping by global norm and a moving average of the weights: on plain slices, or
//! where the weights are on a GPU, by its kernel.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, Var};
use ndarray::{ArrayD, IxDyn};
use rayon::prelude::*;

use super::group::Group;
use super::{Part, TrainError};
use crate::checkpoint::{Weight, Weights};
use crate::model::plan_transformer::is_fitted;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.95;
const EPSILON: f32 = 1e-8;
/// Decay of matrices; gains, biases and embeddings are left alone.
const WEIGHT_DECAY: f64 = 0.05;
/// Largest norm of all gradients together.
const MAX_NORM: f64 = 1.0;
/// Share of the average that a step keeps, once it has seen enough steps.
const AVERAGE: f64 = 0.998;

/// One tensor of weights and what the optimizer keeps of it, where they are.
struct Slot {
    var: Var,
    decays: bool,
    /// Sum over the items seen since the last step.
    gradient: Kept,
    mean: Kept,
    square: Kept,
    average: Kept,
}

/// As many values as a tensor of weights has, row-major.
enum Kept {
    Host(Vec<f32>),
    /// f32, contiguous.
    Gpu(Tensor),
}

impl Kept {
    /// The values of a tensor.
    fn of(tensor: &Tensor) -> Result<Self> {
        let flat = tensor.flatten_all()?;
        Ok(if tensor.device().is_cpu() { Self::Host(flat.to_vec1()?) } else { Self::Gpu(flat.copy()?) })
    }

    fn zeros(like: &Tensor) -> Result<Self> {
        Self::of(&Tensor::zeros(like.elem_count(), DType::F32, like.device())?)
    }

    fn len(&self) -> usize {
        match self {
            Self::Host(values) => values.len(),
            Self::Gpu(values) => values.elem_count(),
        }
    }

    fn to_vec(&self) -> Result<Vec<f32>> {
        match self {
            Self::Host(values) => Ok(values.clone()),
            Self::Gpu(values) => values.to_vec1(),
        }
    }

    /// Takes other values, as many.
    fn set(&mut self, to: Vec<f32>) -> Result<()> {
        match self {
            Self::Host(values) => *values = to,
            Self::Gpu(values) => *values = Tensor::from_vec(to, values.elem_count(), values.device())?,
        }
        Ok(())
    }
}

/// Weights with their optimizer state, by name.
pub struct AdamW {
    slots: BTreeMap<String, Slot>,
    /// Steps made.
    step: u64,
    /// Items added since the last step.
    items: usize,
}

/// What the optimizer keeps of each tensor, as stored: suffix of the name and content.
pub const STATE: [&str; 4] = ["weights", "mean", "square", "average"];

/// One entry of a saved state: name, shape, values.
pub type Entry = (String, Vec<usize>, Vec<f32>);

impl AdamW {
    pub fn new(vars: BTreeMap<String, Var>) -> Result<Self> {
        let slots = vars
            .into_iter()
            .map(|(name, var)| {
                let decays = var.rank() > 1 && name.ends_with(".weight");
                let average = Kept::of(&var)?;
                let [gradient, mean, square] = [Kept::zeros(&var)?, Kept::zeros(&var)?, Kept::zeros(&var)?];
                Ok((name, Slot { var, decays, gradient, mean, square, average }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { slots, step: 0, items: 0 })
    }

    /// Of what steps move of a part of a model, from `weights` on.
    pub fn of_part(
        part: Part,
        vars: &BTreeMap<String, Var>,
        weights: &Weights,
    ) -> std::result::Result<Self, TrainError> {
        let of_part = vars.iter().filter(|(name, _)| name.split('.').next() == Some(part.name()) && !is_fitted(name));
        let mut optimizer = Self::new(of_part.map(|(name, var)| (name.clone(), var.clone())).collect())?;
        optimizer.begin_from(weights).map_err(TrainError::Best)?;
        Ok(optimizer)
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The averaged weights, by name.
    pub fn averages(&self) -> Result<Vec<(String, Weight)>> {
        let average = |(name, slot): (&String, &Slot)| {
            let average = ArrayD::from_shape_vec(IxDyn(slot.var.dims()), slot.average.to_vec()?);
            Ok((name.clone(), average.map_err(candle_core::Error::wrap)?.into()))
        };
        self.slots.iter().map(average).collect()
    }

    /// Adds the gradients of the mean loss of `n` items to those of the coming step.
    pub fn add(&mut self, gradients: &GradStore, n: usize) -> Result<()> {
        self.items += n;
        self.slots.par_iter_mut().try_for_each(|(_, slot)| {
            let Some(gradient) = gradients.get(slot.var.as_tensor()) else { return Ok(()) };
            slot.add(&gradient.flatten_all()?.contiguous()?, n)
        })
    }

    /// Adds up what all ranks have added since the last step, all gradients in one exchange.
    pub fn all_sum(&mut self, group: &dyn Group) -> Result<()> {
        if group.size() == 1 {
            return Ok(());
        }
        if self.all_sum_on_gpus(group)? {
            return Ok(());
        }
        let gradients = self.slots.values().map(|slot| slot.gradient.to_vec()).collect::<Result<Vec<_>>>()?;
        let mut flat = gradients.concat();
        // Numbers of items are whole and far below 2^24.
        flat.push(self.items as f32);
        group.sum_f32(&mut flat);
        let mut rest = &flat[..];
        for slot in self.slots.values_mut() {
            let (sums, others) = rest.split_at(slot.gradient.len());
            slot.gradient.set(sums.to_vec())?;
            rest = others;
        }
        self.items = rest[0] as usize;
        Ok(())
    }

    /// The same where all gradients are on GPUs that can reach each other; else nothing, and false.
    fn all_sum_on_gpus(&mut self, group: &dyn Group) -> Result<bool> {
        let mut all = Vec::with_capacity(self.slots.len() + 1);
        for slot in self.slots.values() {
            let Kept::Gpu(gradient) = &slot.gradient else { return Ok(false) };
            all.push(gradient.clone());
        }
        let Some(first) = all.first() else { return Ok(false) };
        all.push(Tensor::new(&[self.items as f32], first.device())?);
        let Some(sums) = group.sum_on_gpus(&Tensor::cat(&all, 0)?)? else { return Ok(false) };
        let mut at = 0;
        for slot in self.slots.values_mut() {
            let n = slot.gradient.len();
            slot.gradient = Kept::Gpu(sums.narrow(0, at, n)?);
            at += n;
        }
        self.items = sums.narrow(0, at, 1)?.to_vec1::<f32>()?[0] as usize;
        Ok(true)
    }

    /// Sum of squares of all gradients.
    fn power(&self) -> Result<f64> {
        let (mut sum, mut on_gpu) = (0.0, Vec::new());
        for slot in self.slots.values() {
            match &slot.gradient {
                Kept::Host(gradient) => sum += power(gradient),
                Kept::Gpu(gradient) => on_gpu.push(gradient.sqr()?.sum_all()?),
            }
        }
        if !on_gpu.is_empty() {
            sum += Tensor::stack(&on_gpu, 0)?.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>();
        }
        Ok(sum)
    }

    /// One step by the mean of the gradients added since the last one. Returns their norm before clipping; if that is
    /// not finite, or `usable` is false, nothing changes but that they are forgotten.
    pub fn step(&mut self, learning_rate: f64, usable: bool) -> Result<f64> {
        let share = 1.0 / self.items.max(1) as f64;
        let norm = self.power()?.sqrt() * share;
        self.items = 0;
        if !usable || !norm.is_finite() {
            self.slots.values_mut().try_for_each(Slot::forget)?;
            return Ok(norm);
        }
        self.step += 1;
        // The average follows quickly at first.
        let kept = AVERAGE.min((1.0 + self.step as f64) / (10.0 + self.step as f64));
        let corrected = |beta: f32| 1.0 - f64::from(beta).powf(self.step as f64);
        let update = Update {
            gradient: (share * (MAX_NORM / norm.max(1e-12)).min(1.0)) as f32,
            rate: (learning_rate / corrected(BETA_1)) as f32,
            square: (1.0 / corrected(BETA_2)) as f32,
            decay: (1.0 - learning_rate * WEIGHT_DECAY) as f32,
            average: (1.0 - kept) as f32,
        };
        self.slots.par_iter_mut().try_for_each(|(_, slot)| slot.update(&update))?;
        Ok(norm)
    }

    /// Exchanges the weights and their averages, for an evaluation of the averages.
    pub fn swap(&mut self) -> Result<()> {
        self.slots.par_iter_mut().try_for_each(|(_, slot)| match &mut slot.average {
            Kept::Host(average) => in_place(&slot.var, |weights| weights.swap_with_slice(average)),
            Kept::Gpu(average) => {
                let weights = slot.var.flatten_all()?.copy()?;
                slot.var.set(&average.reshape(slot.var.shape())?)?;
                *average = weights;
                Ok(())
            }
        })
    }

    /// Everything that the next step depends on, to be restored by [`AdamW::restore`]; [`STATE`] says what is there.
    pub fn state(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(STATE.len() * self.slots.len());
        for (name, slot) in &self.slots {
            let weights = slot.var.flatten_all()?.to_vec1()?;
            let contents = [weights, slot.mean.to_vec()?, slot.square.to_vec()?, slot.average.to_vec()?];
            for (kind, values) in STATE.iter().zip(contents) {
                entries.push((format!("{name}.{kind}"), slot.var.dims().to_vec(), values));
            }
        }
        Ok(entries)
    }

    /// Goes on from a saved state after `steps` steps; `take` hands out its values by name.
    ///
    /// # Errors
    /// The name of an entry that is missing or of another length.
    pub fn restore(
        &mut self,
        steps: u64,
        mut take: impl FnMut(&str) -> Option<Vec<f32>>,
    ) -> std::result::Result<(), String> {
        let mut take_all = |(name, slot): (&String, &Slot)| {
            let contents = STATE.map(|kind| take(&format!("{name}.{kind}")).filter(|v| v.len() == slot.mean.len()));
            let [Some(weights), Some(mean), Some(square), Some(average)] = contents else {
                return Err(name.clone());
            };
            Ok([weights, mean, square, average])
        };
        // All of it, before anything changes.
        let contents = self.slots.iter().map(&mut take_all).collect::<std::result::Result<Vec<_>, _>>()?;
        for ((name, slot), [weights, mean, square, average]) in self.slots.iter_mut().zip(contents) {
            slot.set_weights(weights).map_err(|_| name.clone())?;
            for (kept, values) in [(&mut slot.mean, mean), (&mut slot.square, square), (&mut slot.average, average)] {
                kept.set(values).map_err(|_| name.clone())?;
            }
        }
        self.step = steps;
        Ok(())
    }

    /// Takes weights that were made before, and their average from there.
    ///
    /// # Errors
    /// The name of a tensor that is missing or of another shape.
    pub fn begin_from(&mut self, weights: &Weights) -> std::result::Result<(), String> {
        for (name, slot) in &mut self.slots {
            let given = weights.get(name).filter(|w| w.shape() == slot.var.dims()).ok_or_else(|| name.clone())?;
            let given = given.values().into_owned();
            slot.average.set(given.clone()).map_err(|_| name.clone())?;
            slot.set_weights(given).map_err(|_| name.clone())?;
        }
        Ok(())
    }
}

/// Factors of one step, the same for every weight.
#[derive(Clone, Copy)]
pub(crate) struct Update {
    /// On the summed gradient: mean over items, clipping.
    pub gradient: f32,
    /// Learning rate over the first moment's correction.
    pub rate: f32,
    /// Second moment's correction.
    pub square: f32,
    /// What decay leaves of a weight.
    pub decay: f32,
    /// Share of the new weight in the average.
    pub average: f32,
}

impl Slot {
    /// Adds `n` times a gradient, flat and contiguous.
    fn add(&mut self, gradient: &Tensor, n: usize) -> Result<()> {
        match &mut self.gradient {
            Kept::Gpu(sum) => *sum = (&*sum + (gradient * n as f64)?)?,
            Kept::Host(sum) => {
                let (storage, layout) = gradient.storage_and_layout();
                let candle_core::Storage::Cpu(storage) = &*storage else {
                    candle_core::bail!("a gradient is not on the CPU");
                };
                let values = &storage.as_slice::<f32>()?[layout.start_offset()..][..sum.len()];
                sum.iter_mut().zip(values).for_each(|(sum, g)| *sum += n as f32 * g);
            }
        }
        Ok(())
    }

    /// Leaves the gradient at zero.
    fn forget(&mut self) -> Result<()> {
        self.gradient.set(vec![0.0; self.gradient.len()])
    }

    fn set_weights(&self, to: Vec<f32>) -> Result<()> {
        self.var.set(&Tensor::from_vec(to, self.var.shape(), self.var.device())?)
    }

    /// One pass over weights, moments and average; leaves the gradient at zero.
    fn update(&mut self, factors: &Update) -> Result<()> {
        let by = Update { decay: if self.decays { factors.decay } else { 1.0 }, ..*factors };
        match (&mut self.gradient, &mut self.mean, &mut self.square, &mut self.average) {
            (Kept::Host(gradient), Kept::Host(mean), Kept::Host(square), Kept::Host(average)) => {
                let rest = gradient.iter_mut().zip(average).zip(mean.iter_mut().zip(square));
                in_place(&self.var, |weights| {
                    for (w, ((g, average), (mean, square))) in weights.iter_mut().zip(rest) {
                        let gradient = std::mem::take(g) * by.gradient;
                        *mean += (1.0 - BETA_1) * (gradient - *mean);
                        *square += (1.0 - BETA_2) * (gradient * gradient - *square);
                        *w = *w * by.decay - by.rate * *mean / ((*square * by.square).sqrt() + EPSILON);
                        *average += by.average * (*w - *average);
                    }
                })
            }
            #[cfg(feature = "cuda")]
            (Kept::Gpu(gradient), Kept::Gpu(mean), Kept::Gpu(square), Kept::Gpu(average)) => {
                crate::cuda::adamw(&self.var, gradient, [mean, square, average], &by)?;
                *gradient = gradient.zeros_like()?;
                Ok(())
            }
            _ => candle_core::bail!("the optimizer's state is not where the weights are"),
        }
    }
}

/// Sum of squares; in lanes, so that it is fast and the same everywhere.
fn power(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let chunks = x.chunks_exact(lanes.len());
    let rest: f64 = chunks.remainder().iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
    }
    lanes.iter().sum::<f64>() + rest
}

/// Lets `change` write to the values of a contiguous tensor on the CPU.
fn in_place(tensor: &Tensor, change: impl FnOnce(&mut [f32])) -> Result<()> {
    struct Change<F>(RefCell<Option<F>>);
    impl<F: FnOnce(&mut [f32])> InplaceOp1 for Change<F> {
        fn name(&self) -> &'static str {
            "in-place"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let (CpuStorage::F32(values), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
                candle_core::bail!("only contiguous f32 tensors can be changed in place");
            };
            if let Some(change) = self.0.take() {
                change(&mut values[from..to]);
            }
            Ok(())
        }
    }
    tensor.inplace_op1(&Change(RefCell::new(Some(change))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn var(values: &[f32]) -> Var {
        Var::from_tensor(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap()
    }

    fn values(var: &Var) -> Vec<f32> {
        var.as_tensor().to_vec1().unwrap()
    }

    /// Gradients of `|x - goal|^2`.
    fn bowl(var: &Var, goal: &[f32]) -> GradStore {
        let goal = Tensor::new(goal, &Device::Cpu).unwrap();
        (var.as_tensor() - &goal).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap()
    }

    #[test]
    fn it_finds_the_bottom_of_a_bowl_and_the_average_follows() {
        let x = var(&[3.0, -2.0]);
        let mut optimizer = AdamW::new([("x".to_owned(), x.clone())].into()).unwrap();
        for _ in 0..500 {
            optimizer.add(&bowl(&x, &[1.0, 0.5]), 1).unwrap();
            optimizer.step(0.05, true).unwrap();
        }
        let found = values(&x);
        assert!((found[0] - 1.0).abs() < 0.02 && (found[1] - 0.5).abs() < 0.02, "{found:?}");
        optimizer.swap().unwrap();
        let average = values(&x);
        assert!(average != found && (average[0] - 1.0).abs() < 0.3, "{average:?}");
        optimizer.swap().unwrap();
        assert_eq!(values(&x), found);
    }

    #[test]
    fn a_step_is_that_of_the_paper() {
        let x = var(&[1.0, -2.0]);
        let matrix = Var::from_tensor(&x.as_tensor().reshape((1, 2)).unwrap()).unwrap();
        let mut optimizer = AdamW::new([("m.weight".to_owned(), matrix.clone())].into()).unwrap();
        let (mut mean, mut square, mut average, mut w) = ([0.0f64; 2], [0.0f64; 2], [1.0, -2.0], [1.0f64, -2.0]);
        for step in 1..=5 {
            let loss = matrix.as_tensor().sqr().unwrap().sum_all().unwrap();
            optimizer.add(&loss.backward().unwrap(), 1).unwrap();
            let norm = optimizer.step(0.1, true).unwrap();
            let gradient = w.map(|w| 2.0 * w);
            let expected = (gradient[0].powi(2) + gradient[1].powi(2)).sqrt();
            assert!((norm - expected).abs() < 1e-5 * expected, "{norm} {expected}");
            for i in 0..2 {
                let g = gradient[i] * (MAX_NORM / expected).min(1.0);
                mean[i] = 0.9 * mean[i] + 0.1 * g;
                square[i] = 0.95 * square[i] + 0.05 * g * g;
                let hat = [mean[i] / (1.0 - 0.9f64.powi(step)), square[i] / (1.0 - 0.95f64.powi(step))];
                w[i] = w[i] * (1.0 - 0.1 * WEIGHT_DECAY) - 0.1 * hat[0] / (hat[1].sqrt() + 1e-8);
                let kept = AVERAGE.min((1.0 + f64::from(step)) / (10.0 + f64::from(step)));
                average[i] = kept * average[i] + (1.0 - kept) * w[i];
            }
        }
        let close = |got: f32, expected: f64| (f64::from(got) - expected).abs() < 1e-5;
        let got = matrix.as_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(close(got[0], w[0]) && close(got[1], w[1]), "{got:?} {w:?}");
        let (_, got) = optimizer.averages().unwrap().remove(0);
        let got = got.values();
        assert!(close(got[0], average[0]) && close(got[1], average[1]), "{got:?} {average:?}");
    }

    #[test]
    fn gradients_added_in_parts_make_the_step_of_their_mean() {
        let goals = [[1.0f32, 0.0], [0.0, 3.0], [-2.0, 1.0], [0.5, 0.5]];
        let (one, parts) = (var(&[0.2, 0.1]), var(&[0.2, 0.1]));
        let mut whole = AdamW::new([("x".to_owned(), one.clone())].into()).unwrap();
        let mut accumulated = AdamW::new([("x".to_owned(), parts.clone())].into()).unwrap();
        for _ in 0..3 {
            let mean = [0, 1].map(|i| goals.iter().map(|goal| goal[i]).sum::<f32>() / 4.0);
            whole.add(&bowl(&one, &mean), 1).unwrap();
            for goal in &goals {
                accumulated.add(&bowl(&parts, goal), 1).unwrap();
            }
            let norms = [whole.step(0.1, true).unwrap(), accumulated.step(0.1, true).unwrap()];
            assert!((norms[0] - norms[1]).abs() < 1e-5, "{norms:?}");
        }
        let (a, b) = (values(&one), values(&parts));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
    }

    #[test]
    fn the_gradient_of_a_mean_counts_for_all_of_its_items() {
        let goals = [[1.0f32, 0.0], [0.0, 3.0], [-2.0, 1.0]];
        let (alone, together) = (var(&[0.2, 0.1]), var(&[0.2, 0.1]));
        let mut one = AdamW::new([("x".to_owned(), alone.clone())].into()).unwrap();
        let mut three = AdamW::new([("x".to_owned(), together.clone())].into()).unwrap();
        for _ in 0..3 {
            goals.iter().for_each(|goal| one.add(&bowl(&alone, goal), 1).unwrap());
            let mean = [0, 1].map(|i| (goals[0][i] + goals[1][i]) / 2.0);
            three.add(&bowl(&together, &mean), 2).unwrap();
            three.add(&bowl(&together, &goals[2]), 1).unwrap();
            let norms = [one.step(0.1, true).unwrap(), three.step(0.1, true).unwrap()];
            assert!((norms[0] - norms[1]).abs() < 1e-5, "{norms:?}");
        }
        let (a, b) = (values(&alone), values(&together));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
    }

    #[test]
    fn a_gradient_that_is_not_a_number_changes_nothing() {
        let x = var(&[1.0]);
        let mut optimizer = AdamW::new([("x".to_owned(), x.clone())].into()).unwrap();
        let loss = (x.as_tensor() * f64::NAN).unwrap().sum_all().unwrap();
        optimizer.add(&loss.backward().unwrap(), 1).unwrap();
        assert!(optimizer.step(0.1, true).unwrap().is_nan());
        optimizer.add(&bowl(&x, &[0.0]), 1).unwrap();
        optimizer.step(0.1, false).unwrap();
        assert_eq!((values(&x), optimizer.steps()), (vec![1.0], 0));
        // And nothing of it is left in the next step.
        optimizer.add(&bowl(&x, &[0.0]), 1).unwrap();
        assert!((optimizer.step(0.1, true).unwrap() - 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_restored_optimizer_goes_on_as_the_saved_one() {
        let (a, b) = (var(&[3.0, -2.0]), var(&[0.0, 0.0]));
        let mut saved = AdamW::new([("x".to_owned(), a.clone())].into()).unwrap();
        let mut restored = AdamW::new([("x".to_owned(), b.clone())].into()).unwrap();
        let teach = |optimizer: &mut AdamW, x: &Var| {
            optimizer.add(&bowl(x, &[1.0, 0.5]), 1).unwrap();
            optimizer.step(0.05, true).unwrap();
        };
        (0..7).for_each(|_| teach(&mut saved, &a));
        let mut state: BTreeMap<String, Vec<f32>> =
            saved.state().unwrap().into_iter().map(|(name, _, values)| (name, values)).collect();
        restored.restore(saved.steps(), |name| state.remove(name)).unwrap();
        assert!(state.is_empty());
        for _ in 0..7 {
            teach(&mut saved, &a);
            teach(&mut restored, &b);
        }
        assert_eq!(values(&a), values(&b));
        // Half a state changes nothing.
        let half = |name: &str| (name != "x.average").then(|| vec![0.5; 2]);
        assert_eq!(restored.restore(0, half), Err("x".to_owned()));
        assert_eq!(values(&a), values(&b));
    }
}
