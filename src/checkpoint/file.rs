//! The layout of a model's file: what is written, read and checked.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayD, IxDyn};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::weight::{Weight, Weights, rounded};
use super::{Checkpoint, CheckpointError, Precision};
use crate::model::config::{GenerationSettings, ModelConfig, PLAN_CONTEXT};
use crate::model::params::ParamsError;
use crate::model::rounding::{gain_of, is_rounded};
use crate::plan::ResidualQuantizer;
use crate::simd::panels::Rounded;

/// Value of the metadata key `format`.
const FORMAT: &str = "wavegen";
/// Version of the file's layout; a file of another version is refused.
pub(super) const VERSION: &str = "1";
pub(super) const MEAN: &str = "codebooks.mean";
pub(super) const BOOKS: &str = "codebooks.books";
/// What the name of a rounded matrix's scales, `[n_out]`, has after the matrix's.
const SCALES: &str = ".scales";

/// A tensor as a file holds it.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A safetensors file of these tensors and this metadata, with the entries of its header in order: the library leaves those of the metadata
/// to chance, and the same content is to be the same bytes.
///
/// # Errors
/// The library's own.
pub fn safetensors_in_order<'a>(
    tensors: impl IntoIterator<Item = (&'a str, TensorView<'a>)>,
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes = safetensors::serialize(tensors, Some(metadata))?;
    let (len, rest) = bytes.split_at(size_of::<u64>());
    let (header, tensors) = rest.split_at(len.iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte)));
    let header: BTreeMap<String, BTreeMap<String, serde_json::Value>> = serde_json::from_slice(header)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, tensors].concat())
}

impl Checkpoint {
    /// The file.
    pub(super) fn to_bytes(&self, precision: Precision) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let json = |value: serde_json::Result<String>| value.unwrap_or_default();
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("version".to_owned(), VERSION.to_owned()),
            ("config".to_owned(), json(serde_json::to_string(&self.config))),
            ("generation".to_owned(), json(serde_json::to_string(&self.generation))),
            ("notes".to_owned(), json(serde_json::to_string(&self.notes))),
        ]);
        let stored = self.stored(precision);
        let views = stored
            .iter()
            .map(|t| Ok((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        safetensors_in_order(views, metadata)
    }

    fn stored(&self, precision: Precision) -> Vec<Stored> {
        let floats = |name: &str, shape: &[usize], values: &mut dyn Iterator<Item = f32>, half: bool| {
            let (dtype, bytes) = match half {
                true => (Dtype::F16, values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect()),
                false => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
            };
            Stored { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
        };
        let whole = |name: &str| precision == Precision::Int8 && is_rounded(name);
        let gains: Vec<String> = self.weights.keys().filter(|name| whole(name)).filter_map(|n| gain_of(n)).collect();
        let mut stored = Vec::new();
        for (name, weight) in &self.weights {
            let shape = weight.shape();
            if whole(name)
                && let Some(matrix) = rounded(&self.weights, name)
            {
                let bytes = matrix.whole.iter().map(|&q| q as u8).collect();
                stored.push(Stored { name: name.clone(), dtype: Dtype::I8, shape, bytes });
                let scales = &mut matrix.scales.iter().copied();
                stored.push(floats(&format!("{name}{SCALES}"), &[matrix.n_out], scales, false));
            } else if gains.contains(name) {
                stored.push(floats(name, &shape, &mut std::iter::repeat_n(1.0, weight.n_weights()), false));
            } else {
                let half = precision != Precision::F32 && shape.len() == 2;
                stored.push(floats(name, &shape, &mut weight.values().iter().copied(), half));
            }
        }
        let ResidualQuantizer { mean, books, .. } = &self.quantizer;
        stored.push(floats(MEAN, mean.shape(), &mut mean.iter().copied(), false));
        stored.push(floats(BOOKS, books.shape(), &mut books.iter().copied(), false));
        stored
    }
}

/// What a file holds, not yet looked at as a whole: codebooks are weights among the others.
pub(super) struct Parts {
    pub config: ModelConfig,
    generation: GenerationSettings,
    pub weights: Weights,
    notes: BTreeMap<String, String>,
    precision: Precision,
}

impl Parts {
    pub fn read(bytes: &[u8], path: &Path) -> Result<Self, CheckpointError> {
        let foreign = |reason: String| CheckpointError::Foreign { path: path.to_owned(), reason };
        let damaged = |what: String| CheckpointError::Damaged { path: path.to_owned(), what };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| foreign(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(foreign("its metadata does not say so".into()));
        }
        let version = metadata.get("version").cloned().unwrap_or_default();
        if version != VERSION {
            return Err(CheckpointError::Version { path: path.to_owned(), got: version });
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
        let field = |name: &str| metadata.get(name).map(String::as_str).unwrap_or_default();
        let mut config: ModelConfig =
            serde_json::from_str(field("config")).map_err(|e| damaged(format!("its configuration: {e}")))?;
        // Models of before 2026-11-27 say 1024, and were trained like all others.
        config.plan_transformer.window = config.plan_transformer.window.min(PLAN_CONTEXT);
        config.validate().map_err(|source| CheckpointError::Config { path: path.to_owned(), source })?;
        let generation =
            serde_json::from_str(field("generation")).map_err(|e| damaged(format!("its generation settings: {e}")))?;
        let notes = serde_json::from_str(field("notes")).map_err(|e| damaged(format!("its notes: {e}")))?;
        let read = |(name, view): &(&str, TensorView)| {
            let (weight, finite): (Weight, _) = match view.dtype() {
                Dtype::I8 => {
                    let odd =
                        || damaged(format!("tensor '{name}' is no matrix of -127 to 127 with a scale per output"));
                    let matrix = scaled(&tensors, name, view).ok_or_else(odd)?;
                    let finite = matrix.scales.iter().all(|scale| (127.0 * scale).is_finite());
                    (Weight::Rounded(matrix), finite)
                }
                _ => {
                    let values =
                        decode(view).ok_or_else(|| damaged(format!("tensor '{name}' is {:?}", view.dtype())))?;
                    let finite = values.iter().all(|v| v.is_finite());
                    let array = ArrayD::from_shape_vec(IxDyn(view.shape()), values)
                        .map_err(|e| damaged(format!("tensor '{name}': {e}")))?;
                    (array.into(), finite)
                }
            };
            if !finite {
                return Err(damaged(format!("tensor '{name}' holds values that are not finite")));
            }
            Ok(((*name).to_owned(), weight))
        };
        let all: Vec<_> = tensors.iter().filter(|(name, _)| !is_scales(&tensors, name)).collect();
        let weights: Weights = all.par_iter().map(read).collect::<Result<_, CheckpointError>>()?;
        let stored_as = |dtype| all.iter().any(|(_, view)| view.dtype() == dtype);
        let precision = match () {
            () if stored_as(Dtype::I8) => Precision::Int8,
            () if stored_as(Dtype::F16) => Precision::F16,
            () => Precision::F32,
        };
        Ok(Self { config, generation, weights, notes, precision })
    }

    /// Makes sure that they are one model.
    pub fn join(self, path: &Path) -> Result<Checkpoint, CheckpointError> {
        let damaged = |what: String| CheckpointError::Damaged { path: path.to_owned(), what };
        let Self { config, generation, mut weights, notes, precision } = self;
        let mut take =
            |name: &str| weights.remove(name).ok_or_else(|| damaged(ParamsError::Missing(name.into()).to_string()));
        let shape = |e: ndarray::ShapeError| damaged(format!("codebooks: {e}"));
        let mean = take(MEAN)?.floats().into_owned().into_dimensionality().map_err(shape)?;
        let books = take(BOOKS)?.floats().into_owned().into_dimensionality().map_err(shape)?;
        let expected = [config.plan.n_codebooks, config.plan.n_entries];
        let quantizer = ResidualQuantizer::new(mean, books).map_err(|e| damaged(e.to_string()))?;
        let quantizer = quantizer.with_hysteresis(&config.plan);
        let checkpoint = Checkpoint { config, generation, quantizer, weights, notes, precision };
        let n_bands = checkpoint.spectrum().map_err(|e| damaged(e.to_string()))?.n_bands();
        let got = checkpoint.quantizer.books.shape();
        if got != [expected[0], expected[1], n_bands] || checkpoint.quantizer.mean.len() != n_bands {
            return Err(damaged(format!(
                "codebooks of shape {got:?}, expected {:?}",
                [expected[0], expected[1], n_bands]
            )));
        }
        checkpoint.check_shapes().map_err(|e| damaged(e.to_string()))?;
        Ok(checkpoint)
    }
}

/// Whether `name` holds the scales of a rounded matrix.
fn is_scales(tensors: &SafeTensors, name: &str) -> bool {
    let matrix = name.strip_suffix(SCALES).and_then(|matrix| tensors.tensor(matrix).ok());
    matrix.is_some_and(|matrix| matrix.dtype() == Dtype::I8)
}

/// A rounded matrix, if it has its scales and no number that the kernels' sums have no room for.
fn scaled(tensors: &SafeTensors, name: &str, view: &TensorView) -> Option<Rounded> {
    let scales = decode(&tensors.tensor(&format!("{name}{SCALES}")).ok()?)?;
    let &[_, n_out] = view.shape() else { return None };
    let whole: Vec<i8> = view.data().iter().map(|&q| q as i8).collect();
    (scales.len() == n_out && n_out > 0 && !whole.contains(&i8::MIN)).then_some(Rounded { n_out, whole, scales })
}

fn decode(view: &TensorView) -> Option<Vec<f32>> {
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => Some(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
        Dtype::F16 => {
            let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
            let mut values = vec![0.0; halves.len()];
            halves.convert_to_f32_slice(&mut values);
            Some(values)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::ModelConfig;

    #[test]
    fn the_same_model_is_the_same_bytes() {
        let model = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap();
        let first = model.to_bytes(Precision::Int8).unwrap();
        for _ in 0..4 {
            assert!(model.to_bytes(Precision::Int8).unwrap() == first);
        }
        let read = Checkpoint::from_bytes(&first, std::path::Path::new("model")).unwrap();
        assert_eq!((read.config, read.quantizer), (model.config, model.quantizer));
    }

    #[test]
    fn rounded_matrices_without_their_scales_or_with_odd_numbers_are_refused() {
        let low = [-128i8 as u8; 8];
        for (shape, n_scales, bytes) in [
            (vec![2, 4], None, [0; 8]),
            (vec![2, 4], Some(2), [0; 8]),
            (vec![8], Some(1), [0; 8]),
            (vec![2, 2, 2], Some(2), [0; 8]),
            (vec![4, 2], Some(2), low),
        ] {
            let mut tensors = vec![("a.weight", TensorView::new(Dtype::I8, shape.clone(), &bytes).unwrap())];
            if let Some(n) = n_scales {
                tensors.push(("a.weight.scales", TensorView::new(Dtype::F32, vec![n], &bytes[..4 * n]).unwrap()));
            }
            let file = safetensors::serialize(tensors, None).unwrap();
            let file = SafeTensors::deserialize(&file).unwrap();
            let read = scaled(&file, "a.weight", &file.tensor("a.weight").unwrap());
            assert!(read.is_none(), "{shape:?} with {n_scales:?} scales of {bytes:?}");
        }
    }
}
