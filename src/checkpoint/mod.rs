//! One safetensors file that holds a whole model: configuration and notes in its metadata, codebooks and weights.

mod file;
mod weight;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use crate::atomic::write_whole;
use crate::model::Model;
use crate::model::config::{ConfigError, GenerationSettings, ModelConfig};
use crate::model::params::{Params, ParamsError};
use crate::plan::{PlanError, ResidualQuantizer, Spectrum};
pub use file::safetensors_in_order;
use file::{BOOKS, MEAN, Parts, VERSION};
use weight::weights;
pub use weight::{Weight, Weights};
pub(crate) use weight::{matrix, rounded};

const BUILT_IN: &[u8] = include_bytes!("../../models/built-in.safetensors");
/// A wave transformer alone, which plays the plans of the built-in model.
const SMALL: &[u8] = include_bytes!("../../models/small.safetensors");
/// What error messages call the models inside the program.
const BUILT_IN_NAME: &str = "(built-in model)";
const SMALL_NAME: &str = "(small built-in model)";
/// The models inside the program have this note, and so has what is trained on from them.
const LICENCE: &str = "CC BY 4.0; made with Salamander Grand Piano V3 by Alexander Holm (CC BY 3.0), GiantMIDI-Piano by ByteDance \
                       (CC BY 4.0), scores of the Mutopia Project (public domain) and recordings of Rusted Music Studio (CC BY 4.0)";

/// Why a file is no model that can be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{path}: cannot be read or written ({source})")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path}: there is no such model; give a .safetensors file, or one of those inside the program: built-in or small"
    )]
    Missing { path: PathBuf },
    #[error("{path}: not a wavegen model ({reason}); models are .safetensors files made by `wavegen train`")]
    Foreign { path: PathBuf, reason: String },
    #[error("{path}: made for layout version {got}, this program reads version {VERSION}")]
    Version { path: PathBuf, got: String },
    #[error("{path}: the configuration does not hold together")]
    Config { path: PathBuf, source: ConfigError },
    #[error("{path}: damaged or incomplete, {what}")]
    Damaged { path: PathBuf, what: String },
}

/// How the matrices of a file are stored; vectors and codebooks are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    /// Half the size: IEEE half precision for tensors of rank 2.
    F16,
    /// A quarter and a bit: matrices that the CPU engine [rounds](crate::model::rounding) to 8 bits are stored as the whole numbers
    /// that it computes with, so that it plays the same; the others as in `F16`. Gains that come before rounded matrices
    /// are multiplied into them, and 1 afterwards.
    Int8,
}

impl Precision {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// A model as plain data, for any engine.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub config: ModelConfig,
    pub generation: GenerationSettings,
    /// Codebooks of the plan.
    pub quantizer: ResidualQuantizer,
    pub weights: Weights,
    /// Free text for people: licence, data, training figures.
    pub notes: BTreeMap<String, String>,
    /// How the file that it was read from stores it.
    pub precision: Precision,
}

impl Checkpoint {
    /// The model inside the program.
    pub fn built_in() -> Result<Self, CheckpointError> {
        let path = Path::new(BUILT_IN_NAME);
        Ok(Self::from_bytes(BUILT_IN, path)?.licensed())
    }

    /// The built-in model's plan transformer with a smaller wave transformer, for slow machines.
    pub fn built_in_small() -> Result<Self, CheckpointError> {
        let path = Path::new(SMALL_NAME);
        let mut small = Parts::read(SMALL, path)?;
        let whole = Parts::read(BUILT_IN, Path::new(BUILT_IN_NAME))?;
        small.config.plan = whole.config.plan;
        small.config.plan_transformer = whole.config.plan_transformer;
        small.weights.extend(whole.weights.into_iter().filter(|(weight, _)| !weight.starts_with("wave.")));
        Ok(small.join(path)?.licensed())
    }

    fn licensed(mut self) -> Self {
        self.notes.entry("licence".into()).or_insert_with(|| LICENCE.into());
        self
    }

    /// A model by what users call it: one of [`Checkpoint::INSIDE`] or a file.
    pub fn named(name: &Path) -> Result<Self, CheckpointError> {
        match name.to_str() {
            Some("built-in") => Self::built_in(),
            Some("small") => Self::built_in_small(),
            _ => Self::load(name),
        }
    }

    /// What users call the models inside the program.
    pub const INSIDE: [&str; 2] = ["built-in", "small"];

    /// Whether `name` is that of a model inside the program.
    pub fn is_inside(name: &Path) -> bool {
        Self::INSIDE.iter().any(|inside| name.as_os_str() == *inside)
    }

    /// Reads a file and checks that its tensors make the model that it describes.
    pub fn load(path: &Path) -> Result<Self, CheckpointError> {
        let named = path.to_owned();
        let bytes = std::fs::read(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => CheckpointError::Missing { path: named },
            _ => CheckpointError::Io { path: named, source },
        })?;
        Self::from_bytes(&bytes, path)
    }

    /// `path` is only what error messages call the bytes.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, CheckpointError> {
        let parts = Parts::read(bytes, path)?;
        let lacks = |part: &str| !parts.weights.keys().any(|weight| weight.starts_with(part));
        if lacks("plan.") || lacks("wave.") {
            let what = "it is a part of a model, which the others are to be added to by examples/store; that of the program is \
                        --model small";
            return Err(CheckpointError::Damaged { path: path.to_owned(), what: what.into() });
        }
        parts.join(path)
    }

    /// Whether the weights are those of the model that the configuration describes.
    fn check_shapes(&self) -> Result<(), ParamsError> {
        let shapes = self.weights.iter().map(|(name, weight)| (name.clone(), weight.shape())).collect();
        let mut params = Params::check(shapes);
        Model::new(&mut params, &self.config, self.quantizer.mean.len())?;
        params.finish()
    }

    /// The analysis that the plan is made with.
    pub fn spectrum(&self) -> Result<Spectrum, PlanError> {
        Spectrum::new(self.config.codec.sample_rate, &self.config.plan)
    }

    /// Both transformers in candle, on the CPU.
    pub fn model(&self) -> Result<Model, ParamsError> {
        let mut tensors = BTreeMap::new();
        for (name, weight) in &self.weights {
            tensors.insert(name.clone(), Tensor::from_vec(weight.values().into_owned(), weight.shape(), &Device::Cpu)?);
        }
        let mut params = Params::stored(tensors);
        let model = Model::new(&mut params, &self.config, self.quantizer.mean.len())?;
        params.finish()?;
        Ok(model)
    }

    /// An untrained model: random codebooks and weights, a pure function of `seed`. For tests and sizes.
    pub fn untrained(config: ModelConfig, seed: u64) -> Result<Self, ParamsError> {
        let n_bands = Spectrum::new(config.codec.sample_rate, &config.plan)
            .map_err(|e| ParamsError::Tensor(candle_core::Error::wrap(e)))?
            .n_bands();
        let mut rng = crate::rng::Rng::new(seed);
        let shape = (config.plan.n_codebooks, config.plan.n_entries, n_bands);
        let mean = ndarray::Array1::from_elem(n_bands, -1.0);
        let books = ndarray::Array3::from_shape_simple_fn(shape, || 0.3 * rng.normal());
        let quantizer =
            ResidualQuantizer::new(mean, books).map_err(|e| ParamsError::Tensor(candle_core::Error::wrap(e)))?;
        let quantizer = quantizer.with_hysteresis(&config.plan);
        let mut params = Params::new(seed);
        Model::new(&mut params, &config, n_bands)?;
        let weights = weights(params.into_vars().iter().map(|(name, var)| (name, var.as_tensor())))?;
        Ok(Self {
            config,
            generation: GenerationSettings::default(),
            quantizer,
            weights,
            notes: BTreeMap::new(),
            precision: Precision::F32,
        })
    }

    /// Number of weights whose names begin with `prefix`.
    pub fn n_weights(&self, prefix: &str) -> usize {
        self.weights.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, weight)| weight.n_weights()).sum()
    }

    /// Writes the file under a temporary name and renames it when it is whole.
    pub fn save(&self, path: &Path, precision: Precision) -> Result<(), CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let bytes = self.to_bytes(precision).map_err(|e| io(std::io::Error::other(e)))?;
        write_whole(path, &bytes, true).map_err(io)
    }

    /// What tells this model from every other: BLAKE3 over its configuration, codebooks and weights, in hexadecimal.
    ///
    /// Notes and generation settings are not part of it: they change nothing that a saved state depends on.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(serde_json::to_string(&self.config).unwrap_or_default().as_bytes());
        let mean = self.quantizer.mean.clone().into_dyn().into();
        let books = self.quantizer.books.clone().into_dyn().into();
        let all = self.weights.iter().map(|(name, weight)| (name.as_str(), weight));
        for (name, weight) in all.chain([(MEAN, &mean), (BOOKS, &books)]) {
            add(name.as_bytes());
            add(format!("{:?}", weight.shape()).as_bytes());
            let bytes: Vec<u8> = weight.values().iter().flat_map(|v| v.to_le_bytes()).collect();
            add(&bytes);
        }
        hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{ArrayD, IxDyn};
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::model::config::PLAN_CONTEXT;
    use crate::model::rounding::is_rounded;
    use crate::simd::panels::Rounded;

    fn tiny() -> Checkpoint {
        Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap()
    }

    fn message(e: &dyn std::error::Error) -> String {
        e.to_string()
    }

    #[test]
    fn a_saved_model_loads_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let mut model = tiny();
        model.notes.insert("licence".into(), "CC0".into());
        model.save(&path, Precision::F32).unwrap();
        let back = Checkpoint::load(&path).unwrap();
        assert_eq!((back.config, back.generation, back.notes), (model.config, model.generation, model.notes));
        assert_eq!(back.weights, model.weights);
        assert_eq!(back.quantizer.books, model.quantizer.books);
    }

    #[test]
    fn half_precision_stays_within_its_rounding() {
        let model = tiny();
        let back = Checkpoint::from_bytes(&model.to_bytes(Precision::F16).unwrap(), Path::new("half")).unwrap();
        for (name, array) in &model.weights {
            for (a, b) in array.values().iter().zip(back.weights[name].values().iter()) {
                assert!((a - b).abs() <= a.abs() * 1e-3 + 1e-7, "{name}: {a} {b}");
            }
        }
    }

    #[test]
    fn rounded_matrices_come_back_as_the_cpu_engine_rounds_them() {
        let mut model = tiny();
        let gains = model.weights.get_mut("plan.blocks.1.attention_norm").unwrap();
        gains.change(|gains| gains.iter_mut().step_by(2).for_each(|gain| *gain = 1.7));
        let load = |model: &Checkpoint, precision| {
            Checkpoint::from_bytes(&model.to_bytes(precision).unwrap(), Path::new("int8")).unwrap()
        };
        let back = load(&model, Precision::Int8);
        assert_eq!((back.precision, load(&model, Precision::F16).precision), (Precision::Int8, Precision::F16));
        assert!(back.weights["plan.blocks.1.attention_norm"].values().iter().all(|&gain| gain == 1.0));
        for name in model.weights.keys().filter(|name| is_rounded(name)) {
            let matrix = rounded(&model.weights, name).unwrap().into_owned();
            let (values, n_out) = super::matrix(&back.weights, name).unwrap();
            assert_eq!(Rounded::new(&values, n_out), matrix, "{name}");
            assert_eq!(back.weights[name], Weight::Rounded(matrix), "{name}");
        }
        assert_eq!(load(&back, Precision::Int8).weights, back.weights);
        let sizes = [Precision::Int8, Precision::F32].map(|precision| model.to_bytes(precision).unwrap().len());
        assert!(3 * sizes[0] < 2 * sizes[1], "{sizes:?}: the codebooks of so small a model are most of it");
    }

    #[test]
    fn what_is_no_model_is_refused_with_its_name() {
        let path = Path::new("song.safetensors");
        for bytes in [&b""[..], b"RIFF....WAVE", &[0xff; 64]] {
            let error = Checkpoint::from_bytes(bytes, path).unwrap_err();
            assert!(matches!(error, CheckpointError::Foreign { .. }) && message(&error).contains("song"), "{error}");
        }
        let foreign = safetensors::serialize(Vec::<(&str, TensorView)>::new(), None).unwrap();
        assert!(matches!(Checkpoint::from_bytes(&foreign, path), Err(CheckpointError::Foreign { .. })));
        assert!(matches!(Checkpoint::load(Path::new("/no/such/model")), Err(CheckpointError::Missing { .. })));
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let path = Path::new("bent");
        let missing = |change: &dyn Fn(&mut Checkpoint)| {
            let mut model = tiny();
            change(&mut model);
            message(&Checkpoint::from_bytes(&model.to_bytes(Precision::F32).unwrap(), path).unwrap_err())
        };
        let text = missing(&|m| drop(m.weights.remove("wave.head.bias")));
        assert!(text.contains("'wave.head.bias' is missing"), "{text}");
        let text = missing(&|m| m.config.wave_transformer.tiers[0].dim = 64);
        assert!(text.contains("the configuration wants"), "{text}");
        let text = missing(&|m| drop(m.weights.insert("wave.extra".into(), ArrayD::zeros(IxDyn(&[1])).into())));
        assert!(text.contains("'wave.extra' belongs to no part"), "{text}");
        let text = missing(&|m| m.weights.get_mut("wave.head.bias").unwrap().change(|bias| bias.fill(f32::NAN)));
        assert!(text.contains("not finite"), "{text}");
        let bytes = tiny().to_bytes(Precision::F32).unwrap();
        let cut = Checkpoint::from_bytes(&bytes[..bytes.len() - 100], path).unwrap_err();
        assert!(message(&cut).starts_with("bent"), "{cut}");
    }

    #[test]
    fn a_fingerprint_is_the_models_own_whatever_is_noted() {
        let model = tiny();
        let bytes = model.to_bytes(Precision::F32).unwrap();
        let mut back = Checkpoint::from_bytes(&bytes, Path::new("same")).unwrap();
        back.notes.insert("licence".into(), "CC0".into());
        back.generation.grain = 0.5;
        assert_eq!(back.fingerprint(), model.fingerprint());
        let other = |change: &dyn Fn(&mut Checkpoint)| {
            let mut model = tiny();
            change(&mut model);
            model.fingerprint()
        };
        assert_ne!(other(&|m| m.config.plan_transformer.n_heads = 1), model.fingerprint());
        assert_ne!(other(&|m| m.quantizer.mean[3] += 1e-6), model.fingerprint());
        assert_ne!(
            other(&|m| m.weights.get_mut("wave.head.bias").unwrap().change(|bias| bias[0] += 1e-6)),
            model.fingerprint()
        );
    }

    #[test]
    fn plans_attend_no_further_back_than_they_learned_to() {
        let mut model = tiny();
        model.config.plan_transformer.window = 2 * PLAN_CONTEXT;
        assert!(message(&model.config.validate().unwrap_err()).contains("1024 frames is more than the 512"));
        let bytes = model.to_bytes(Precision::F32).unwrap();
        let back = Checkpoint::from_bytes(&bytes, Path::new("older")).unwrap();
        assert_eq!(back.config.plan_transformer.window, PLAN_CONTEXT);
    }

    #[test]
    fn another_version_is_refused() {
        let bytes = tiny().to_bytes(Precision::F32).unwrap();
        let field = b"\"version\":\"1\"";
        let at = bytes.windows(field.len()).position(|window| window == field).unwrap();
        let mut other = bytes.clone();
        other[at + field.len() - 2] = b'9';
        let error = Checkpoint::from_bytes(&other, Path::new("future")).unwrap_err();
        assert!(matches!(error, CheckpointError::Version { ref got, .. } if got == "9"), "{error}");
    }
}
