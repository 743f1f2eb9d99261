//! Recordings as training data: pieces of corpora, split by file, with the plan of every piece.

use std::collections::HashSet;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use ndarray::{Array2, Axis, Slice, concatenate};
use rayon::prelude::*;

use super::hash::Hash;
use super::resume::AUDIO;
use super::{Observer, Part, TrainError, TrainEvent};
use crate::audio::speed;
use crate::codec::{Codec, Token};
use crate::corpus::piece;
use crate::corpus::prepare::find;
use crate::corpus::{Corpus, CorpusError, Facts, Piece, PrepareEvent, PrepareSettings, Samples, Sound, prepare};
use crate::plan::{DB_PER_UNIT, PlanConfig, ResidualQuantizer, Spectrum};
use crate::rng::Rng;

/// Plan frames that a piece must have to be of use.
pub const LEAST_FRAMES: usize = 64;
/// Frames that codebooks are fitted to.
const CODEBOOK_FRAMES: usize = 60_000;
const KMEANS_ROUNDS: usize = 12;
/// Frames analysed in one go: memory does not grow with a piece.
const BLOCK: usize = 4096;
/// Samples that are read at a time to be checked.
const CHECKED: usize = 1 << 20;

/// One recording at the model's rate and level; samples of a corpus stay on disk.
pub struct Recording {
    pub facts: Facts,
    samples: Samples,
    /// Its plan's tokens, `[frames, n_codebooks]`; empty until the codebooks are fitted.
    pub plan_tokens: Array2<u16>,
}

impl Recording {
    /// Of samples in memory, each times 32767; `facts` but for their hash, which is theirs.
    pub fn in_memory(samples: Vec<i16>, facts: &Facts) -> Self {
        let facts = Facts { hash: piece::hash(&samples), ..facts.clone() };
        Self { facts, samples: Samples::in_memory(samples), plan_tokens: Array2::zeros((0, 0)) }
    }

    /// Whole plan frames.
    pub fn n_frames(&self, hop: usize) -> usize {
        self.samples.len() / hop
    }

    /// Tokens of the samples `range`, at `gain`.
    pub fn tokens(&self, range: Range<usize>, gain: f32, codec: &Codec) -> Result<Vec<Token>, CorpusError> {
        let scale = gain / 32767.0;
        Ok(self
            .samples
            .read(range)?
            .into_iter()
            .map(|x| codec.encode((f32::from(x) * scale).clamp(-1.0, 1.0)))
            .collect())
    }

    /// Tokens of `n` samples that begin at the sample `first`, played at `speed` times the speed and so the pitch.
    pub fn tokens_at(
        &self,
        first: usize,
        n: usize,
        speed: f64,
        gain: f32,
        codec: &Codec,
    ) -> Result<Vec<Token>, CorpusError> {
        if speed == 1.0 {
            return self.tokens(first..first + n, gain, codec);
        }
        let end = (first + speed::samples_needed(n, speed)).min(self.samples.len());
        let samples: Vec<f32> = self.samples.read(first..end)?.into_iter().map(|x| f32::from(x) / 32767.0).collect();
        let played = speed::play(&samples, speed, n);
        Ok(played.into_iter().map(|x| codec.encode((x * gain).clamp(-1.0, 1.0))).collect())
    }

    /// The plan frames `frames`.
    pub fn plan(&self, frames: Range<usize>, spectrum: &Spectrum, codec: &Codec) -> Result<Array2<f32>, CorpusError> {
        let hop = spectrum.hop();
        let before = spectrum.window_len().div_ceil(hop).min(frames.start);
        let tokens = self.tokens((frames.start - before) * hop..frames.end * hop, 1.0, codec)?;
        let plan = spectrum.analyse(&codec.decode_all(&tokens));
        Ok(plan.slice_axis(Axis(0), Slice::from(before..)).to_owned())
    }

    /// Encodes the whole plan; gives the squared error's sum and number of values.
    fn encode_plan(
        &mut self,
        quantizer: &ResidualQuantizer,
        spectrum: &Spectrum,
        codec: &Codec,
    ) -> Result<(f64, usize), TrainError> {
        let n_frames = self.n_frames(spectrum.hop());
        let (mut power, mut n, mut blocks) = (0.0, 0, Vec::new());
        for first in (0..n_frames).step_by(BLOCK) {
            let plan = self.plan(first..n_frames.min(first + BLOCK), spectrum, codec)?;
            let codes = quantizer.encode_all(plan.view())?;
            let rest = plan - quantizer.decode_all(codes.view())?;
            power += rest.iter().map(|&d| f64::from(d * d)).sum::<f64>();
            n += rest.len();
            blocks.push(codes);
        }
        let views: Vec<_> = blocks.iter().map(|block| block.view()).collect();
        self.plan_tokens = concatenate(Axis(0), &views).map_err(candle_core::Error::wrap)?;
        Ok((power, n))
    }

    /// Finds out whether the samples are those that the corpus was made with.
    fn check(&self) -> Result<(), TrainError> {
        let mut hasher = blake3::Hasher::new();
        for first in (0..self.samples.len()).step_by(CHECKED) {
            for sample in self.samples.read(first..self.samples.len().min(first + CHECKED))? {
                hasher.update(&sample.to_le_bytes());
            }
        }
        if hasher.finalize().to_hex().as_str() != self.facts.hash {
            let what = format!("the samples of {} have changed", self.facts.source);
            let path = self.samples.path().unwrap_or(Path::new(&self.facts.source)).to_owned();
            return Err(CorpusError::Damaged { path, what }.into());
        }
        Ok(())
    }
}

/// Where training data comes from and how it is split.
pub struct Sources<'a> {
    /// Audio files, folders of them, corpora.
    pub inputs: &'a [PathBuf],
    /// A folder in which files that are not in a corpus are prepared; what is there already is not prepared again. It may lie
    /// in one of the inputs, and is not searched.
    pub state: &'a Path,
    pub seed: u64,
    /// Share of the files that is held out, at least one when there are two or more; `None` for none.
    pub validation_share: Option<f64>,
    /// Use only so many pieces and look into only so many files, spread over all of them.
    pub most: Option<usize>,
    pub threads: usize,
}

/// Where an excerpt begins, and how fast it is played.
pub struct Pick<'a> {
    pub recording: &'a Recording,
    /// A plan frame.
    pub first: usize,
    pub speed: f64,
}

/// All recordings of a training run.
pub struct Dataset {
    pub train: Vec<Recording>,
    pub validation: Vec<Recording>,
    pub codec: Codec,
    pub spectrum: Spectrum,
}

impl Dataset {
    /// Prepares what is not prepared, on all cores, and opens it; files that cannot be used are reported and left out.
    ///
    /// Order and split depend on what is heard and on the seed, not on names, places or whether it came from a corpus.
    pub fn open(
        sources: &Sources,
        codec: &Codec,
        spectrum: &Spectrum,
        observe: &mut Observer,
    ) -> Result<Self, TrainError> {
        let mut found = find(sources.inputs, sources.state);
        found.files = spread(found.files, sources.most);
        let sample_rate = codec.sample_rate;
        let least_s = (LEAST_FRAMES * spectrum.hop()) as f64 / f64::from(sample_rate);
        let mut pieces = Vec::new();
        for folder in &found.corpora {
            let corpus = Corpus::open(folder)?;
            if corpus.sample_rate != sample_rate {
                let (folder, got) = (folder.clone(), corpus.sample_rate);
                return Err(CorpusError::SampleRate { folder, wanted: sample_rate, got }.into());
            }
            if !corpus.unfinished.is_empty() {
                let why = format!(
                    "{}: {} not finished; run its `wavegen prepare` again to train on all of it",
                    folder.display(),
                    corpus.unfinished.join(", ")
                );
                let _ = observe(TrainEvent::Skipped { path: folder.clone(), why });
            }
            pieces.extend(corpus.pieces);
        }
        if !found.files.is_empty() {
            let settings = PrepareSettings {
                inputs: found.files.clone(),
                folder: sources.state.join(AUDIO),
                sample_rate,
                least_s,
                part: (1, 1),
                threads: sources.threads,
            };
            pieces.extend(spool(&settings, observe)?);
        }
        for (path, why) in found.unreadable {
            let _ = observe(TrainEvent::Skipped { path, why });
        }
        let mut recordings = usable(spread(pieces, sources.most), spectrum.hop(), least_s, observe);
        if recordings.is_empty() {
            return Err(TrainError::NoData { n_files: found.files.len(), least_s });
        }
        recordings.sort_by(|a, b| a.facts.hash.cmp(&b.facts.hash));
        let held_out = match (sources.validation_share, recordings.len()) {
            (None, _) | (_, 1) => 0,
            (Some(share), n) => ((n as f64 * share).round() as usize).clamp(1, n - 1),
        };
        Rng::new(sources.seed ^ 0x5eed).shuffle(&mut recordings);
        let train = recordings.split_off(held_out);
        let data = Self { train, validation: recordings, codec: codec.clone(), spectrum: spectrum.clone() };
        data.report(observe);
        Ok(data)
    }

    fn report(&self, observe: &mut Observer) {
        let hours = |set: &[Recording]| {
            set.iter().map(|r| r.samples.len()).sum::<usize>() as f64 / f64::from(self.codec.sample_rate) / 3600.0
        };
        let mut sound = Sound::default();
        self.train.iter().chain(&self.validation).for_each(|r| sound.add(&r.facts.sound));
        let _ = observe(TrainEvent::Data {
            train_files: self.train.len(),
            train_hours: hours(&self.train),
            validation_files: self.validation.len(),
            validation_hours: hours(&self.validation),
            sound: sound.findings(),
        });
    }

    /// Hours of sound in `units` frames (plan) or samples (wave).
    pub fn hours(&self, units: u64, part: Part) -> f64 {
        let samples = match part {
            Part::Plan => units * self.spectrum.hop() as u64,
            Part::Wave => units,
        };
        samples as f64 / f64::from(self.codec.sample_rate) / 3600.0
    }

    /// Recordings to judge by: those held out, or the only one there is.
    pub fn judges(&self) -> &[Recording] {
        if self.validation.is_empty() { &self.train } else { &self.validation }
    }

    /// Fits the plan's codebooks to the training pieces.
    pub fn fit_codebooks(&self, config: &PlanConfig, seed: u64) -> Result<ResidualQuantizer, TrainError> {
        let frames = self.frames_to_fit(&self.codec)?;
        Ok(ResidualQuantizer::fit(frames.view(), config.n_codebooks, config.n_entries, KMEANS_ROUNDS, seed)?)
    }

    /// Codebooks of a model that heard the training pieces through the codec `was`, for what they sound like now, as many and as large
    /// as `config` says.
    pub fn refit_codebooks(
        &self,
        old: &ResidualQuantizer,
        was: &Codec,
        config: &PlanConfig,
        seed: u64,
    ) -> Result<ResidualQuantizer, TrainError> {
        let frames = self.frames_to_fit(&self.codec)?;
        let known = match *was == self.codec {
            true => old.clone(),
            false => old.translated(self.frames_to_fit(was)?.view(), frames.view())?,
        };
        Ok(known.refined(frames.view(), (config.n_codebooks, config.n_entries), KMEANS_ROUNDS, seed)?)
    }

    /// Exact plan frames of all training pieces as `codec` hears them, `[frames, n_bands]`.
    fn frames_to_fit(&self, codec: &Codec) -> Result<Array2<f32>, TrainError> {
        let (hop, window) = (self.spectrum.hop(), self.spectrum.window_len());
        let total: usize = self.train.iter().map(|r| r.n_frames(hop)).sum();
        let stride = total.div_ceil(CODEBOOK_FRAMES).max(1);
        let frames_of = |r: &Recording| {
            let frame = |i: usize| {
                let end = (i + 1) * hop;
                let heard = r.tokens(end.saturating_sub(window)..end, 1.0, codec)?;
                Ok(self.spectrum.analyse_last(&codec.decode_all(&heard)))
            };
            let frames = (0..r.n_frames(hop)).step_by(stride).map(frame).collect::<Result<Vec<_>, CorpusError>>()?;
            Ok(frames.concat())
        };
        let rows = self.train.par_iter().map(frames_of).collect::<Result<Vec<Vec<f32>>, CorpusError>>()?;
        let flat = rows.concat();
        drop(rows);
        let n_bands = self.spectrum.n_bands();
        Ok(Array2::from_shape_vec((flat.len() / n_bands, n_bands), flat).map_err(candle_core::Error::wrap)?)
    }

    /// Whether the samples of all pieces are what they were when they were prepared.
    pub fn check(&self) -> Result<(), TrainError> {
        self.train.par_iter().chain(&self.validation).try_for_each(Recording::check)
    }

    /// Gives every piece the plan tokens that a plan transformer learns from. Returns what quantising leaves, dB rms.
    ///
    /// They stay in memory: two bytes a codebook for the 1024 of a frame's samples.
    pub fn encode_plans(&mut self, quantizer: &ResidualQuantizer) -> Result<f32, TrainError> {
        let (spectrum, codec) = (&self.spectrum, &self.codec);
        let errors: Vec<(f64, usize)> = self
            .train
            .par_iter_mut()
            .chain(&mut self.validation)
            .map(|recording| recording.encode_plan(quantizer, spectrum, codec))
            .collect::<Result<_, TrainError>>()?;
        let (power, n) = errors.iter().fold((0.0, 0), |(p, n), (q, m)| (p + q, n + m));
        Ok((power / n.max(1) as f64).sqrt() as f32 * DB_PER_UNIT)
    }

    /// Tells other data, another order or another split apart.
    pub fn hash(&self) -> u64 {
        let all = self.train.iter().chain(&self.validation);
        all.fold(Hash::new().words([self.train.len() as u64]), |hash, r| hash.bytes(r.facts.hash.as_bytes())).value()
    }

    /// Frames of the longest training piece.
    pub fn longest(&self) -> usize {
        self.train.iter().map(|r| r.n_frames(self.spectrum.hop())).max().unwrap_or(0)
    }

    /// A training piece chosen by length, a place in it that has room for `n_frames` frames, and a speed drawn evenly
    /// from 1 - `variation` to 1 + `variation`: 1 where no piece is long enough for another.
    pub fn pick(&self, n_frames: usize, variation: f64, rng: &mut Rng) -> Pick<'_> {
        let hop = self.spectrum.hop();
        let (mut speed, mut room) = (1.0, n_frames);
        if variation > 0.0 {
            let drawn = 1.0 + variation * (2.0 * f64::from(rng.uniform()) - 1.0);
            let needed = speed::samples_needed(n_frames * hop, drawn).div_ceil(hop);
            if needed <= self.longest() {
                (speed, room) = (drawn, needed);
            }
        }
        let places = |r: &Recording| (r.n_frames(hop) + 1).saturating_sub(room);
        let mut at = rng.below(self.train.iter().map(places).sum());
        for recording in &self.train {
            let n = places(recording);
            if at < n {
                return Pick { recording, first: at, speed };
            }
            at -= n;
        }
        Pick { recording: &self.train[0], first: 0, speed: 1.0 }
    }
}

/// The pieces of plain files.
fn spool(settings: &PrepareSettings, observe: &mut Observer) -> Result<Vec<Piece>, TrainError> {
    let (mut done, mut total) = (0, 0);
    let prepared = prepare(settings, &mut |event| {
        match event {
            PrepareEvent::Found { new, .. } => {
                total = new;
                return ControlFlow::Continue(());
            }
            PrepareEvent::Waiting => return ControlFlow::Continue(()),
            PrepareEvent::Bad { path, why } => {
                let _ = observe(TrainEvent::Skipped { path: path.to_owned(), why: why.to_owned() });
            }
            PrepareEvent::Piece { .. } | PrepareEvent::Same { .. } => {}
        }
        done += 1;
        observe(TrainEvent::Reading { done, total })
    })?;
    if prepared.interrupted {
        return Err(TrainError::Interrupted);
    }
    let mut pieces = Corpus::open(&settings.folder)?.pieces;
    // The folder may hold more, of an earlier start with other files.
    pieces.retain(|piece| prepared.contents.contains(&piece.content));
    Ok(pieces)
}

/// At most `most` of all, at even distances.
fn spread<T>(all: Vec<T>, most: Option<usize>) -> Vec<T> {
    let stride = most.map_or(1, |most| all.len().div_ceil(most.max(1)).max(1));
    all.into_iter().step_by(stride).collect()
}

/// Pieces that are long enough, each once: a copy on both sides of the split would judge a model by what it has seen.
fn usable(pieces: Vec<Piece>, hop: usize, least_s: f64, observe: &mut Observer) -> Vec<Recording> {
    let mut heard = HashSet::new();
    let mut recordings = Vec::with_capacity(pieces.len());
    for Piece { facts, samples, .. } in pieces {
        let mut skip = |what: String| {
            let why = format!("{}: {what}", facts.source);
            let _ = observe(TrainEvent::Skipped { path: PathBuf::from(&facts.source), why });
        };
        if samples.len() < LEAST_FRAMES * hop {
            skip(format!("shorter than {least_s:.1} s"));
        } else if !heard.insert(facts.hash.clone()) {
            skip("sounds the same as another file".into());
        } else {
            recordings.push(Recording { facts, samples, plan_tokens: Array2::zeros((0, 0)) });
        }
    }
    recordings
}
