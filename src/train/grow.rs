//! Turns a model into one of another preset: what can grow keeps computing what it computed, the rest begins anew.
//!
//! Function-preserving growth (Chen, Goodfellow and Shlens, 2016) of the plan transformer: its residual stream, heads,
//! SwiGLU and depth. Every new path begins with a zero at the end that writes and random weights at the end that reads,
//! so that nothing changes and gradients reach all of it within two steps. A root mean square over more features, the
//! new ones zero, is smaller by `sqrt(old / new)`, which the gains of the old features make up for (but for the norm's
//! epsilon). Heads keep their width, because the angles of their position embedding depend on it.

use ndarray::{ArrayD, Axis, s};

use super::Part;
use crate::checkpoint::{Checkpoint, Weight};
use crate::model::config::{ConfigError, ModelConfig, PlanTransformerConfig};
use crate::model::params::ParamsError;
use crate::plan::{PlanConfig, PlanError, ResidualQuantizer};

/// Why a model cannot begin from another.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    #[error(
        "the preset's {what} is another than the model's, and the model's codebooks would mean nothing; \
             give a preset with the same {what}, or train without --init"
    )]
    Codebooks { what: &'static str },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("building the larger model")]
    Params(#[from] ParamsError),
}

/// What becomes of one part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The same weights in the same places.
    Kept,
    /// The same weights, but what reaches them is computed otherwise: they want training.
    Moved,
    /// Larger, and computes what it did.
    Grown,
    /// New weights, for this reason.
    New(String),
}

/// The model in the sizes of `config`: codebooks of `old`, each part kept, grown or new. New weights are a pure
/// function of `seed`. Codebooks that `old` has not add nothing until they are [fitted](crate::plan::ResidualQuantizer::refined); entries
/// that it has not want to [`inherit`] as well then.
///
/// # Errors
/// When sample rate or plan differ in more than new codebooks and entries and when tokens stay, or the configuration does not hold together.
pub fn grow(old: &Checkpoint, config: &ModelConfig, seed: u64) -> Result<(Checkpoint, [(Part, Fate); 2]), GrowError> {
    config.validate()?;
    if config.codec.sample_rate != old.config.codec.sample_rate {
        return Err(GrowError::Codebooks { what: "sample rate" });
    }
    let PlanConfig { n_codebooks, n_entries, hysteresis, attack_db, .. } = old.config.plan;
    if (PlanConfig { n_codebooks, n_entries, hysteresis, attack_db, ..config.plan.clone() }) != old.config.plan
        || config.plan.n_codebooks < n_codebooks
        || config.plan.n_entries < n_entries
    {
        return Err(GrowError::Codebooks { what: "plan" });
    }
    let refined = (config.plan.n_codebooks, config.plan.n_entries) != (n_codebooks, n_entries);
    let mut model = Checkpoint::untrained(config.clone(), seed)?;
    model.quantizer =
        old.quantizer.padded(config.plan.n_codebooks, config.plan.n_entries)?.with_hysteresis(&config.plan);
    model.notes = old.notes.clone();
    let (from, to) = (&old.config.plan_transformer, &config.plan_transformer);
    let requantised = config.codec != old.config.codec;
    let kept_otherwise = (config.plan.hysteresis, config.plan.attack_db) != (hysteresis, attack_db);
    let same_sizes = PlanTransformerConfig { dropout: from.dropout, ..to.clone() } == *from && !refined;
    let plan = match obstacle(from, to) {
        Some(why) => Fate::New(why),
        None if same_sizes && (requantised || kept_otherwise) => Fate::Moved,
        None if same_sizes => Fate::Kept,
        None => Fate::Grown,
    };
    let wave = if config.wave_transformer != old.config.wave_transformer {
        Fate::New("its sizes differ".into())
    } else if requantised || config.forecast != old.config.forecast {
        Fate::Moved
    } else {
        Fate::Kept
    };
    for (name, new) in &mut model.weights {
        match (name.split('.').next(), &plan, &wave) {
            (Some("plan"), Fate::Kept | Fate::Moved | Fate::Grown, _) => {
                *new = larger(name, old.weights.get(name), new).into()
            }
            (Some("wave"), _, Fate::Kept | Fate::Moved) => new.clone_from(&old.weights[name]),
            _ => {}
        }
    }
    if matches!(wave, Fate::Kept | Fate::Moved) {
        model.generation = old.generation;
    }
    Ok((model, [(Part::Plan, plan), (Part::Wave, wave)]))
}

/// How much less likely a new entry is than the one that it takes after, in nats.
const YOUNGER: f32 = 2.0;

/// Lets the entries of known codebooks that `old` has not, once they are fitted, mean to the plan transformer what the nearest of the
/// old ones means.
pub fn inherit(model: &mut Checkpoint, old: &ResidualQuantizer) {
    let (n_codebooks, n_entries, _) = old.books.dim();
    for (q, parents) in model.quantizer.parents(n_entries).enumerate().take(n_codebooks) {
        let take_after = |axis: usize, less: f32| {
            let parents = &parents;
            move |all: &mut ArrayD<f32>| {
                for (i, &parent) in parents.iter().enumerate() {
                    let values = all.index_axis(Axis(axis), parent).mapv(|x| x - less);
                    all.index_axis_mut(Axis(axis), n_entries + i).assign(&values);
                }
            }
        };
        let tensors =
            [("embedding", 0, 0.0), ("given", 0, 0.0), ("head_out.weight", 1, 0.0), ("head_out.bias", 0, YOUNGER)];
        for (name, axis, less) in tensors {
            // No codebook comes after the last, so it has no table of what is given.
            if let Some(weight) = model.weights.get_mut(&format!("plan.{q}.{name}")) {
                weight.change(take_after(axis, less));
            }
        }
    }
}

/// Why a plan transformer cannot grow into another, if it cannot.
fn obstacle(from: &PlanTransformerConfig, to: &PlanTransformerConfig) -> Option<String> {
    let head_dim = |c: &PlanTransformerConfig| c.dim / c.n_heads;
    if head_dim(from) != head_dim(to) {
        return Some(format!("its heads are {} features wide instead of {}", head_dim(to), head_dim(from)));
    }
    let sizes = |c: &PlanTransformerConfig| {
        [("dim", c.dim), ("n_layers", c.n_layers), ("window", c.window), ("hidden width", c.hidden_multiple * c.dim)]
    };
    let shrunk = sizes(from).into_iter().zip(sizes(to)).find(|((_, from), (_, to))| to < from);
    shrunk.map(|((name, from), (_, to))| format!("its {name} is {to}, less than {from}"))
}

/// What a tensor of the plan transformer does to the features, heads and hidden units that are new.
enum Role {
    /// Writes them, or reads from the new ones what goes to the old: zero where it is new.
    Writes,
    /// Reads them into so many equal parts side by side: random where it is new.
    Reads { parts: usize },
    /// Norms them.
    Gain,
}

impl Role {
    fn of(name: &str) -> Self {
        match name.trim_end_matches(".weight").rsplit('.').next() {
            Some("qkv") => Self::Reads { parts: 3 },
            Some("up") => Self::Reads { parts: 2 },
            Some("head_in") => Self::Reads { parts: 1 },
            Some(norm) if norm.ends_with("norm") => Self::Gain,
            _ => Self::Writes,
        }
    }
}

/// `old` (none in a new layer) in the shape of `new`, which holds what a new model begins with.
fn larger(name: &str, old: Option<&Weight>, new: &Weight) -> ArrayD<f32> {
    let (old, new) = (old.map(Weight::floats), new.floats());
    let (mut grown, parts, scale) = match Role::of(name) {
        Role::Writes => (ArrayD::zeros(new.raw_dim()), 1, 1.0),
        Role::Reads { parts } => (new.into_owned(), parts, 1.0),
        Role::Gain => {
            let scale = old.as_ref().map_or(1.0, |old| (old.len() as f32 / new.len() as f32).sqrt());
            (new.into_owned(), 1, scale)
        }
    };
    let Some(old) = old else { return grown };
    for (mut to, from) in grown.rows_mut().into_iter().zip(old.rows()) {
        let (width, old_width) = (to.len() / parts, from.len() / parts);
        for part in 0..parts {
            let values = from.slice(s![part * old_width..(part + 1) * old_width]);
            to.slice_mut(s![part * width..part * width + old_width]).assign(&(&values * scale));
        }
    }
    grown
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::codec::Quantizer;
    use crate::model::Model;
    use crate::model::params::Params;
    use crate::rng::Rng;
    use crate::train::optimizer::AdamW;

    /// Plan tokens in which every entry occurs, also after the first frame, and bands; `[1, frames, ..]`.
    fn sequence(model: &Checkpoint, frames: usize) -> (Tensor, Tensor) {
        let plan = &model.config.plan;
        let mut rng = Rng::new(7);
        let code = |i: usize, rng: &mut Rng| if i <= plan.n_entries { i % plan.n_entries } else { rng.below(plan.n_entries) } as u32;
        let tokens: Vec<u32> = (0..frames * plan.n_codebooks).map(|i| code(i / plan.n_codebooks, &mut rng)).collect();
        let n_bands = model.quantizer.mean.len();
        let bands: Vec<f32> = (0..frames * n_bands).map(|_| rng.normal()).collect();
        let device = &Device::Cpu;
        (
            Tensor::from_vec(tokens, (1, frames, plan.n_codebooks), device).unwrap(),
            Tensor::from_vec(bands, (1, frames, n_bands), device).unwrap(),
        )
    }

    fn nll(model: &Checkpoint, (tokens, bands): &(Tensor, Tensor)) -> Vec<f32> {
        let nll = model.model().unwrap().plan.nll(tokens, bands, None).unwrap();
        nll.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// As if it had been trained: no gain is 1 and no bias 0.
    fn tiny() -> Checkpoint {
        let mut model = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 3).unwrap();
        let mut rng = Rng::new(11);
        model.weights.values_mut().for_each(|weight| weight.change(|all| all.mapv_inplace(|w| w + 0.2 * rng.normal())));
        model
    }

    fn larger_tiny() -> ModelConfig {
        let mut config = ModelConfig::preset("tiny").unwrap();
        let plan = &mut config.plan_transformer;
        (plan.dim, plan.n_layers, plan.n_heads, plan.hidden_multiple) = (80, 4, 5, 4);
        config
    }

    #[test]
    fn a_grown_plan_transformer_says_what_the_small_one_said() {
        let built_in = Checkpoint::built_in().unwrap();
        let mut large = built_in.config.clone();
        (large.plan_transformer.dim, large.plan_transformer.n_layers, large.plan_transformer.n_heads) = (448, 6, 7);
        for (old, config) in [(tiny(), larger_tiny()), (built_in, large)] {
            let (new, fates) = grow(&old, &config, 1).unwrap();
            assert_eq!(fates, [(Part::Plan, Fate::Grown), (Part::Wave, Fate::Kept)]);
            assert_eq!((&new.config, &new.quantizer), (&config, &old.quantizer));
            let sequence = sequence(&old, 64);
            let (before, after) = (nll(&old, &sequence), nll(&new, &sequence));
            for (frame, (a, b)) in before.iter().zip(&after).enumerate() {
                assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{}, frame {frame}: {a} {b}", config.name);
            }
        }
    }

    #[test]
    fn a_new_codebook_costs_what_chance_costs_and_changes_no_other() {
        let old = tiny();
        let mut config = old.config.clone();
        config.plan.n_codebooks += 1;
        let (new, fates) = grow(&old, &config, 1).unwrap();
        assert_eq!(fates, [(Part::Plan, Fate::Grown), (Part::Wave, Fate::Kept)]);
        let (tokens, bands) = sequence(&new, 64);
        let before = nll(&old, &(tokens.narrow(2, 0, old.config.plan.n_codebooks).unwrap(), bands.clone()));
        let chance = (config.plan.n_entries as f32).ln();
        for (frame, (a, b)) in before.iter().zip(&nll(&new, &(tokens, bands))).enumerate() {
            assert!((a + chance - b).abs() < 1e-4 * a.abs().max(1.0), "frame {frame}: {a} and {chance}, {b}");
        }
        let silent = new.quantizer.decode(&[3, 5, 7, 9, 11][..config.plan.n_codebooks]).unwrap();
        assert_eq!(silent, old.quantizer.decode(&[3, 5, 7, 9][..old.config.plan.n_codebooks]).unwrap());
        config.plan.n_codebooks = 1;
        assert!(matches!(grow(&new, &config, 1), Err(GrowError::Codebooks { what: "plan" })));
    }

    #[test]
    fn a_new_entry_means_what_the_nearest_old_one_means() {
        let old = tiny();
        let mut config = old.config.clone();
        let known = config.plan.n_entries;
        config.plan.n_entries += 5;
        let (mut new, fates) = grow(&old, &config, 1).unwrap();
        assert_eq!(fates, [(Part::Plan, Fate::Grown), (Part::Wave, Fate::Kept)]);
        // Each new entry lies beside an old one.
        let parent = |q: usize, i: usize| (7 * i + 3 * q + 1) % known;
        let mut books = new.quantizer.books.clone();
        for (q, mut book) in books.outer_iter_mut().enumerate() {
            for i in 0..5 {
                let beside = &book.row(parent(q, i)) + 1e-3;
                book.row_mut(known + i).assign(&beside);
            }
        }
        new.quantizer = ResidualQuantizer::new(new.quantizer.mean.clone(), books).unwrap();
        inherit(&mut new, &old.quantizer);

        let (tokens, bands) = sequence(&old, 64);
        let before = nll(&old, &(tokens.clone(), bands.clone()));
        // What the new entries take is at most five times e^-2 of what there was.
        let most = new.config.plan.n_codebooks as f32 * (1.0 + 5.0 * (-YOUNGER).exp()).ln();
        for (frame, (a, b)) in before.iter().zip(&nll(&new, &(tokens.clone(), bands.clone()))).enumerate() {
            assert!(*b >= a - 1e-4 && *b <= a + most, "frame {frame}: {a} and {b}");
        }
        // Heard and given, a new one does what its parent does; expected, it is less likely.
        let n = config.plan.n_codebooks;
        let elders: Vec<u32> = (0..64 * n).map(|i| parent(i % n, i / n % 5) as u32).collect();
        let children: Vec<u32> = (0..64 * n).map(|i| (known + i / n % 5) as u32).collect();
        let [a, b] = [elders, children].map(|all| {
            let tokens = Tensor::from_vec(all, (1, 64, n), &Device::Cpu).unwrap();
            nll(&new, &(tokens, bands.clone()))
        });
        for (frame, (a, b)) in a.iter().zip(&b).enumerate() {
            assert!((a + YOUNGER * n as f32 - b).abs() < 1e-3 * a.abs().max(1.0), "frame {frame}: {a} and {b}");
        }
    }

    #[test]
    fn every_new_weight_gets_a_gradient_within_two_steps() {
        let old = tiny();
        let mut config = larger_tiny();
        config.plan.n_codebooks += 1;
        let (new, _) = grow(&old, &config, 1).unwrap();
        let mut params = Params::new(0);
        let model = Model::new(&mut params, &new.config, new.quantizer.mean.len()).unwrap();
        let mut vars = params.into_vars();
        vars.retain(|name, _| name.starts_with("plan."));
        let mut optimizer = AdamW::new(vars.clone()).unwrap();
        optimizer.begin_from(&new.weights).unwrap();
        let (tokens, bands) = sequence(&new, 64);
        let mut sizes: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
        for _ in 0..2 {
            let loss = model.plan.nll(&tokens, &bands, None).unwrap().mean_all().unwrap();
            let gradients = loss.backward().unwrap();
            for (name, var) in &vars {
                let gradient = gradients.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let sums = sizes.entry(name).or_insert_with(|| vec![0.0; gradient.len()]);
                sums.iter_mut().zip(gradient).for_each(|(sum, g): (_, f32)| *sum += g.abs());
            }
            optimizer.add(&gradients, 1).unwrap();
            optimizer.step(1e-3, true).unwrap();
        }
        for (name, sizes) in sizes {
            let without = sizes.iter().filter(|&&size| size == 0.0).count();
            assert_eq!(without, 0, "{name}: {without} of {} weights have no gradient", sizes.len());
        }
    }

    #[test]
    fn what_cannot_grow_begins_anew_and_says_why() {
        let old = tiny();
        let fate = |change: &dyn Fn(&mut PlanTransformerConfig)| {
            let mut config = old.config.clone();
            change(&mut config.plan_transformer);
            grow(&old, &config, 1).unwrap()
        };
        assert_eq!(fate(&|c| c.dropout = 0.3).1, [(Part::Plan, Fate::Kept), (Part::Wave, Fate::Kept)]);
        let (new, [(_, plan), (_, wave)]) = fate(&|c| c.n_heads = 4);
        assert_eq!((plan, wave), (Fate::New("its heads are 8 features wide instead of 16".into()), Fate::Kept));
        for (name, weights) in &old.weights {
            assert_eq!(&new.weights[name] == weights, name.starts_with("wave."), "{name}");
        }
        let (_, [(_, plan), _]) = fate(&|c| c.n_layers = 1);
        assert_eq!(plan, Fate::New("its n_layers is 1, less than 2".into()));
        let mut config = old.config.clone();
        config.forecast.order += 1;
        assert_eq!(grow(&old, &config, 1).unwrap().1[1].1, Fate::Moved);
        config.codec.quantizer = Quantizer::Pcm16;
        let (new, fates) = grow(&old, &config, 1).unwrap();
        assert_eq!(fates, [(Part::Plan, Fate::Moved), (Part::Wave, Fate::Moved)]);
        assert_eq!(new.weights, old.weights);
        let mut config = old.config.clone();
        (config.plan.hysteresis, config.plan.attack_db) = (0.05, 3.0);
        let (new, fates) = grow(&old, &config, 1).unwrap();
        assert_eq!(fates, [(Part::Plan, Fate::Moved), (Part::Wave, Fate::Kept)]);
        assert_eq!(new.quantizer, old.quantizer.clone().with_hysteresis(&config.plan));
        config.plan.n_entries = 16;
        assert!(matches!(grow(&old, &config, 1), Err(GrowError::Codebooks { what: "plan" })));
    }
}
