//! Recordings as training data: decoded, levelled, split by file, with the plan of every piece.

use std::path::{Path, PathBuf};

use ndarray::Array2;
use rayon::prelude::*;

use super::hash::Hash;
use super::{Observer, TrainError, TrainEvent, TrainSettings};
use crate::audio::decode::decode_file;
use crate::audio::level;
use crate::audio::resample::resample;
use crate::codec::{Codec, Token};
use crate::plan::{DB_PER_UNIT, PlanConfig, ResidualQuantizer, Spectrum};
use crate::rng::Rng;

/// Plan frames that a piece must have to be of use.
const LEAST_FRAMES: usize = 64;
/// Frames that codebooks are fitted to.
const CODEBOOK_FRAMES: usize = 60_000;
const KMEANS_ROUNDS: usize = 12;

/// One recording at the model's rate and level.
pub struct Recording {
    pub path: PathBuf,
    /// Samples * 32767.
    samples: Vec<i16>,
    /// Its plan's tokens, `[frames, n_codebooks]`; empty until the codebooks are fitted.
    pub plan_tokens: Array2<u16>,
}

impl Recording {
    fn read(path: &Path, codec: &Codec, hop: usize) -> Result<Self, String> {
        let clip = decode_file(path).map_err(|e| e.to_string())?;
        let rate = clip.sample_rate;
        let samples = resample(&clip.downmix(), rate, codec.sample_rate).map_err(|e| e.to_string())?;
        let n_frames = samples.len() / hop;
        if n_frames < LEAST_FRAMES {
            let least = (LEAST_FRAMES * hop) as f64 / f64::from(codec.sample_rate);
            return Err(format!("{}: shorter than {least:.1} s", path.display()));
        }
        let Some(gain) = level::gain(&samples) else {
            return Err(format!("{}: silent", path.display()));
        };
        let to_i16 = |x: &f32| (x * gain * 32767.0).round().clamp(-32768.0, 32767.0) as i16;
        Ok(Self {
            path: path.to_owned(),
            samples: samples[..n_frames * hop].iter().map(to_i16).collect(),
            plan_tokens: Array2::zeros((0, 0)),
        })
    }

    /// Whole plan frames.
    pub fn n_frames(&self, hop: usize) -> usize {
        self.samples.len() / hop
    }

    /// Tokens of the samples `range`, at `gain`.
    pub fn tokens(&self, range: std::ops::Range<usize>, gain: f32, codec: &Codec) -> Vec<Token> {
        let scale = gain / 32767.0;
        self.samples[range].iter().map(|&x| codec.encode((f32::from(x) * scale).clamp(-1.0, 1.0))).collect()
    }

    fn plan(&self, spectrum: &Spectrum, codec: &Codec) -> Array2<f32> {
        spectrum.analyse(&codec.decode_all(&self.tokens(0..self.samples.len(), 1.0, codec)))
    }
}

/// All recordings of a training run.
pub struct Dataset {
    pub train: Vec<Recording>,
    pub validation: Vec<Recording>,
    pub codec: Codec,
    pub spectrum: Spectrum,
}

impl Dataset {
    /// Reads the files on all cores; those that cannot be used are reported and left out.
    pub fn read(settings: &TrainSettings, spectrum: &Spectrum, observe: &mut Observer) -> Result<Self, TrainError> {
        let codec = settings.config().codec.clone();
        let hop = spectrum.hop();
        let read: Vec<_> = settings.files.par_iter().map(|path| (path, Recording::read(path, &codec, hop))).collect();
        let mut recordings = Vec::new();
        for (path, result) in read {
            match result {
                Ok(recording) => recordings.push(recording),
                Err(why) => {
                    let _ = observe(TrainEvent::Skipped { path: path.clone(), why });
                }
            }
        }
        if recordings.is_empty() {
            let least_s = (LEAST_FRAMES * hop) as f64 / f64::from(codec.sample_rate);
            return Err(TrainError::NoData { n_files: settings.files.len(), least_s });
        }
        // Which files are held out depends on the seed and the order of the names only.
        recordings.sort_by(|a, b| a.path.cmp(&b.path));
        let held_out = match recordings.len() {
            1 => 0,
            n => ((n as f64 * settings.validation_share).round() as usize).clamp(1, n - 1),
        };
        let mut rng = Rng::new(settings.seed ^ 0x5eed);
        for i in (1..recordings.len()).rev() {
            recordings.swap(i, rng.below(i + 1));
        }
        let train = recordings.split_off(held_out);
        let data = Self { train, validation: recordings, codec, spectrum: spectrum.clone() };
        let hours = |set: &[Recording]| {
            set.iter().map(|r| r.samples.len()).sum::<usize>() as f64 / f64::from(data.codec.sample_rate) / 3600.0
        };
        let _ = observe(TrainEvent::Data {
            train_files: data.train.len(),
            train_hours: hours(&data.train),
            validation_files: data.validation.len(),
            validation_hours: hours(&data.validation),
        });
        Ok(data)
    }

    /// Recordings to judge by: those held out, or the only one there is.
    pub fn judges(&self) -> &[Recording] {
        if self.validation.is_empty() { &self.train } else { &self.validation }
    }

    /// Fits the plan's codebooks to the training pieces.
    pub fn fit_codebooks(&self, config: &PlanConfig, seed: u64) -> Result<ResidualQuantizer, TrainError> {
        let hop = self.spectrum.hop();
        let total: usize = self.train.iter().map(|r| r.n_frames(hop)).sum();
        let stride = total.div_ceil(CODEBOOK_FRAMES).max(1);
        let rows: Vec<Vec<f32>> = self
            .train
            .par_iter()
            .map(|r| {
                r.plan(&self.spectrum, &self.codec).rows().into_iter().step_by(stride).flatten().copied().collect()
            })
            .collect();
        let flat = rows.concat();
        let n_bands = self.spectrum.n_bands();
        let frames = Array2::from_shape_vec((flat.len() / n_bands, n_bands), flat).map_err(candle_core::Error::wrap)?;
        Ok(ResidualQuantizer::fit(frames.view(), config.n_codebooks, config.n_entries, KMEANS_ROUNDS, seed)?)
    }

    /// Gives every piece its plan tokens; returns what quantising leaves, dB rms.
    pub fn encode_plans(&mut self, quantizer: &ResidualQuantizer) -> Result<f32, TrainError> {
        let (spectrum, codec) = (&self.spectrum, &self.codec);
        let errors: Vec<(f64, usize)> = self
            .train
            .par_iter_mut()
            .chain(&mut self.validation)
            .map(|recording| {
                let plan = recording.plan(spectrum, codec);
                recording.plan_tokens = quantizer.encode_all(plan.view())?;
                let rest = plan - quantizer.decode_all(recording.plan_tokens.view())?;
                Ok((rest.iter().map(|&d| f64::from(d * d)).sum(), rest.len()))
            })
            .collect::<Result<_, TrainError>>()?;
        let (power, n) = errors.iter().fold((0.0, 0), |(p, n), (q, m)| (p + q, n + m));
        Ok((power / n.max(1) as f64).sqrt() as f32 * DB_PER_UNIT)
    }

    /// Tells other data, another order or another split apart.
    pub fn hash(&self) -> u64 {
        let sets = [&self.train, &self.validation];
        let hashes: Vec<u64> = sets
            .par_iter()
            .flat_map(|set| set.par_iter().map(|r| Hash::new().words(r.samples.iter().map(|&x| x as u64)).value()))
            .collect();
        Hash::new().words([self.train.len() as u64]).words(hashes).value()
    }

    /// A training piece chosen by length, and the first of `n_frames` frames in it.
    pub fn pick(&self, n_frames: usize, rng: &mut Rng) -> (&Recording, usize) {
        let hop = self.spectrum.hop();
        let places = |r: &Recording| (r.n_frames(hop) + 1).saturating_sub(n_frames);
        let mut at = rng.below(self.train.iter().map(places).sum());
        for recording in &self.train {
            let n = places(recording);
            if at < n {
                return (recording, at);
            }
            at -= n;
        }
        (&self.train[0], 0)
    }
}
