//! Recordings as training data: pieces of corpora, split by file, with the plan of every piece.

use std::collections::HashSet;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2, Axis, Slice, concatenate};
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
        let before = spectrum.window_frames().min(frames.start);
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
        let (mut power, mut n) = (0.0, 0);
        let (mut blocks, mut end): (Vec<Array2<u16>>, Array1<f32>) = Default::default();
        for first in (0..n_frames).step_by(BLOCK) {
            let plan = self.plan(first..n_frames.min(first + BLOCK), spectrum, codec)?;
            let before = blocks.last().and_then(|codes| codes.outer_iter().last());
            let codes = quantizer.encode_after(before.map(|tokens| (tokens, end.view())), plan.view())?;
            end = plan.row(plan.nrows() - 1).to_owned();
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
    /// Share of the sound that is held out, about, up to 0.5: at least one of two or more pieces; 0 for none.
    pub validation_share: f64,
    /// Use only so many pieces, spread over all of them, and look into no more files than that takes.
    pub most: Option<usize>,
    pub threads: usize,
}

/// An excerpt of a recording, and how fast it is played.
pub struct Pick<'a> {
    pub recording: &'a Recording,
    /// Plan frame of the recording that it begins at, with what is heard before it.
    pub first: usize,
    /// Plan frames that it has, without those before it.
    pub frames: usize,
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
        let found = find(sources.inputs, sources.state);
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
        let mut spooled = Vec::new();
        for inputs in shares(&found.files, sources.most) {
            let settings = PrepareSettings {
                inputs,
                folder: sources.state.join(AUDIO),
                sample_rate,
                least_s,
                part: (1, 1),
                threads: sources.threads,
            };
            spooled.extend(spool(&settings, observe)?);
            if sources.most.is_some_and(|most| spooled.len() >= most) {
                break;
            }
        }
        pieces.extend(spooled);
        for (path, why) in found.unreadable {
            let _ = observe(TrainEvent::Skipped { path, why });
        }
        let pieces = shares(&pieces, sources.most).next().unwrap_or_default();
        let mut recordings = usable(pieces, spectrum.hop(), least_s, observe);
        if recordings.is_empty() {
            return Err(TrainError::NoData { n_files: found.files.len(), least_s });
        }
        recordings.sort_by(|a, b| a.facts.hash.cmp(&b.facts.hash));
        Rng::new(sources.seed ^ 0x5eed).shuffle(&mut recordings);
        let (validation, train) = split(recordings, sources.validation_share);
        let data = Self { train, validation, codec: codec.clone(), spectrum: spectrum.clone() };
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

    /// `n` first frames of `long` ones at even distances in those of the pieces that have so many.
    pub fn places<'a>(&self, pieces: &'a [Recording], long: usize, n: usize) -> Vec<(&'a Recording, usize)> {
        let n_frames = |piece: &Recording| piece.n_frames(self.spectrum.hop());
        let pieces = pieces.iter().filter(|piece| n_frames(piece) >= long).cycle();
        pieces.take(n).enumerate().map(|(i, piece)| (piece, (n_frames(piece) - long) * (2 * i + 1) / (2 * n))).collect()
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
        // Every so many frames of all pieces one after the other: not the beginnings of many short ones.
        let mut before = 0usize;
        let with_first = |r| {
            let first = before.next_multiple_of(stride) - before;
            before += Recording::n_frames(r, hop);
            (r, first)
        };
        let pieces: Vec<(&Recording, usize)> = self.train.iter().map(with_first).collect();
        let frames_of = |&(r, first): &(&Recording, usize)| {
            let frame = |i: usize| {
                let end = (i + 1) * hop;
                let heard = r.tokens(end.saturating_sub(window)..end, 1.0, codec)?;
                Ok(self.spectrum.analyse_last(&codec.decode_all(&heard)))
            };
            let frames =
                (first..r.n_frames(hop)).step_by(stride).map(frame).collect::<Result<Vec<_>, CorpusError>>()?;
            Ok(frames.concat())
        };
        let rows = pieces.par_iter().map(frames_of).collect::<Result<Vec<Vec<f32>>, CorpusError>>()?;
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

    /// A training piece chosen by the length of what is not the first `before` frames, a place in it for `most` frames after those, or
    /// for as many as it has, and a speed drawn evenly from 1 - `variation` to 1 + `variation`: 1 where another leaves nothing.
    ///
    /// Of short pieces whole sixteenths of `most` are taken, so that many excerpts are alike in length.
    ///
    /// # Panics
    /// When no piece has more than `before` frames.
    pub fn pick(&self, before: usize, most: usize, variation: f64, rng: &mut Rng) -> Pick<'_> {
        let hop = self.spectrum.hop();
        let of_use = |r: &Recording| r.n_frames(hop).saturating_sub(before);
        let mut at = rng.below(self.train.iter().map(of_use).sum());
        let is_here = |r: &&Recording| match at.checked_sub(of_use(r)) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        };
        let recording = self.train.iter().find(is_here).expect("a piece longer than what comes before its excerpts");
        let all = recording.n_frames(hop);
        let room = |speed: f64| ((all as f64 / speed) as usize).saturating_sub(before);
        let drawn = if variation > 0.0 { 1.0 + variation * (2.0 * f64::from(rng.uniform()) - 1.0) } else { 1.0 };
        let speed = if room(drawn) > 0 { drawn } else { 1.0 };
        let frames = most.min(room(speed));
        let frames = frames - frames % (most / 16).clamp(1, frames);
        let needed = ((before + frames) as f64 * speed).ceil() as usize;
        Pick { recording, first: rng.below(all + 1 - needed.min(all)), frames, speed }
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

/// Shares of all, at most `most` in each, at even distances.
fn shares<T: Clone>(all: &[T], most: Option<usize>) -> impl Iterator<Item = Vec<T>> {
    let stride = all.len().div_ceil(most.unwrap_or(all.len()).max(1));
    (0..stride).map(move |first| all.iter().skip(first).step_by(stride).cloned().collect())
}

/// What is held out, in the order given as long as that brings it nearer to its share of the sound, and what is not.
fn split(recordings: Vec<Recording>, share: f64) -> (Vec<Recording>, Vec<Recording>) {
    let all: usize = recordings.iter().map(|r| r.samples.len()).sum();
    let shortest = recordings.iter().map(|r| r.samples.len()).min().unwrap_or(0);
    // Enough for the shortest piece; none is more than half of all.
    let wanted = if share > 0.0 { (share * all as f64).max(0.6 * shortest as f64) } else { 0.0 };
    let mut held_out = 0;
    recordings.into_iter().partition(|r| {
        let n = r.samples.len();
        let takes = 2 * n <= all && (held_out as f64 + 0.5 * n as f64) < wanted;
        held_out += if takes { n } else { 0 };
        takes
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn recordings(seconds: &[usize]) -> Vec<Recording> {
        let piece = |(&n, i)| Recording::in_memory(vec![i; n * 16_000], &Facts::default());
        seconds.iter().zip(1..).map(piece).collect()
    }

    fn data(seconds: &[usize]) -> Dataset {
        let codec = Codec::default();
        let spectrum = Spectrum::new(codec.sample_rate, &PlanConfig::default()).unwrap();
        Dataset { train: recordings(seconds), validation: vec![], codec, spectrum }
    }

    #[test]
    fn every_piece_is_drawn_by_its_length_and_no_further_than_it_reaches() {
        let data = data(&[3, 9, 20, 3, 25]);
        let (hop, mut rng) = (data.spectrum.hop(), Rng::new(7));
        for (before, most, variation) in [(0, 512, 0.0), (0, 512, 0.3), (8, 32, 0.3), (80, 32, 0.1)] {
            let mut drawn = [0.0; 5];
            let (mut slower, mut faster) = (0, 0);
            for _ in 0..6000 {
                let Pick { recording, first, frames, speed } = data.pick(before, most, variation, &mut rng);
                let n = recording.n_frames(hop);
                let end = first as f64 + (before + frames) as f64 * speed;
                assert!(end <= n as f64 + 1e-6 && (1..=most).contains(&frames), "{end} of {n}, {frames} frames");
                assert!(frames < most / 16 || frames.is_multiple_of(most / 16), "{frames} frames");
                assert!(variation > 0.0 || frames > n.min(most) * 2 / 3, "{frames} of {n} frames");
                drawn[data.train.iter().position(|r| std::ptr::eq(r, recording)).unwrap()] += 1.0 / 6000.0;
                if before == 0 && n < most {
                    slower += usize::from(speed < 1.0);
                    faster += usize::from(speed > 1.0);
                }
            }
            let of_use = |r: &Recording| r.n_frames(hop) as f64 - before as f64;
            let all: f64 = data.train.iter().map(of_use).sum();
            for (share, r) in drawn.iter().zip(&data.train) {
                assert!((share - of_use(r) / all).abs() < 0.03, "{drawn:?}");
            }
            // Short pieces are played as often faster as slower.
            assert!(slower.abs_diff(faster) < 200, "{slower} slower, {faster} faster");
        }
    }

    #[test]
    fn what_is_held_out_is_a_share_of_the_sound() {
        let held_out = |seconds: &[usize], share: f64| {
            let (validation, train) = split(recordings(seconds), share);
            assert_eq!(validation.len() + train.len(), seconds.len());
            validation.iter().map(|r| r.samples.len() / 16_000).collect::<Vec<_>>()
        };
        for concert_and_jingle in [[90, 3], [3, 90]] {
            assert_eq!(held_out(&concert_and_jingle, 0.03), [3]);
            assert_eq!(held_out(&concert_and_jingle, 0.5), [3]);
        }
        assert_eq!(held_out(&[5; 20], 0.03), [5]);
        assert_eq!(held_out(&[5; 20], 0.2), [5; 4]);
        assert_eq!(held_out(&[5; 2], 0.5), [5]);
        assert_eq!(held_out(&[20, 3, 3, 9, 4], 0.2), [3, 3]);
        assert!(held_out(&[5], 0.5).is_empty() && held_out(&[5; 20], 0.0).is_empty());
    }
}
