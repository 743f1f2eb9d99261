//! Turns a model into one that knows a recording: a few steps on its head, judged by its tail, which no step hears.
//!
//! Each part is judged before the first step and every few steps, and the weights that found the tails likeliest are kept.
//! Where no step found them likelier, or where the adapted wave transformer plays them worse, the model's own weights stay:
//! adapting may be of no use, but does no harm that the tails would show. Codebooks and generation settings stay in any case.

use std::f64::consts::LN_2;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use ndarray::s;
use serde::Serialize;

use super::dataset::{Dataset, Recording};
use super::hash::Hash;
use super::optimizer::AdamW;
use super::scene::{Follow, Scene};
use super::schedule::{Budget, PLAN_SHARE};
use super::workers::Workers;
use super::{Part, TrainError, TrainEvent, calibrate, plan, wave};
use crate::audio::AudioSource;
use crate::checkpoint::{Checkpoint, Weights};
use crate::codec::Codec;
use crate::corpus::piece;
use crate::forecast::CpuForecaster;
use crate::model::Model;
use crate::model::config::{ModelConfig, PLAN_CONTEXT};
use crate::model::excerpt::Excerpt;
use crate::model::params::Params;
use crate::plan::Spectrum;
use crate::rng::Rng;

/// Shorter recordings are refused, seconds.
const LEAST_S: f64 = 4.0;
/// A tail is the last n-th of a recording, and at least as many seconds.
const TAIL_SHARE: usize = 5;
const TAIL_LEAST_S: f64 = 1.0;
/// Contexts or excerpts per step.
const BATCH: usize = 2;
/// Steps over which the learning rate rises to what it stays at.
const WARM_UP: usize = 4;
/// Steps between judgements, and judgements without gain that end a part.
const JUDGE_EVERY: usize = 4;
const PATIENCE: usize = 4;
/// Most places of all tails that a judgement of the wave transformer listens to, and most tails that one of the plan
/// transformer does.
const PLACES: usize = 6;
const TAILS: usize = 8;
/// Free runs that compare what both models play, the plan frames of their prompts, and most frames played.
const SCENES: usize = 4;
const PROMPT: usize = 24;
const PLAYED: usize = 48;
/// How much further from the plan than the model's own weights adapted ones may play.
const MOST_WORSE_DB: f32 = 0.5;

/// Why a model was not adapted.
#[derive(Debug, thiserror::Error)]
pub enum AdaptError {
    /// No audio, or silence; the text names the file.
    #[error("{0}; a model can only be adapted to sound")]
    Unusable(String),
    #[error("{name}: {got_s:.1} s of sound are too short to adapt to; at least {least_s:.1} s")]
    TooShort { name: String, got_s: f64, least_s: f64 },
    #[error(transparent)]
    Train(Box<TrainError>),
}

impl From<TrainError> for AdaptError {
    fn from(error: TrainError) -> Self {
        Self::Train(Box::new(error))
    }
}

/// How long and how fast to adapt.
#[derive(Clone, Debug)]
pub struct AdaptSettings {
    /// Steps of each part, or time for both, judgements included; the free runs at the end take a few seconds more.
    pub budget: Budget,
    pub seed: u64,
    /// Worker threads; the result depends on them only where the budget is time.
    pub threads: usize,
    /// Fit the generation settings to an adapted wave transformer; takes as long again as the free runs.
    pub calibrate: bool,
    /// Constant after a few steps.
    pub plan_learning_rate: f64,
    pub wave_learning_rate: f64,
}

impl AdaptSettings {
    /// With the learning rates that did best (`docs/findings.md`).
    pub fn new(budget: Budget, threads: usize) -> Self {
        Self { budget, seed: 0, threads, calibrate: false, plan_learning_rate: 3e-4, wave_learning_rate: 1e-3 }
    }
}

/// Told as it happens; returning `Break` ends the steps, and what was best so far is kept.
#[derive(Clone, Copy, Debug)]
pub enum AdaptEvent {
    /// Bits per unit of the step's batch.
    Step { part: Part, step: usize, bits: f64 },
    /// Bits per unit of the tails; of the model's own weights at step 0.
    Judged { part: Part, step: usize, bits: f64 },
    /// One setting of the adapted model tried in free run.
    Calibration(calibrate::Tried),
}

/// Receives [`AdaptEvent`]s.
pub type Observer<'a> = dyn FnMut(AdaptEvent) -> ControlFlow<()> + 'a;

/// What became of the model.
#[derive(Clone, Debug, Serialize)]
pub struct Adaptation {
    /// Seconds of sound that trained and that judged.
    pub head_s: f64,
    pub tail_s: f64,
    /// Bits per plan frame of the tails.
    pub plan: Adapted,
    /// Bits per sample of the tails.
    pub wave: Adapted,
    /// What the wave transformers play of the tails' plans; none where the model's own is kept for other reasons.
    pub free_run: Option<FreeRun>,
}

/// What became of a part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Adapted {
    pub steps: usize,
    /// By the model's own weights.
    pub before_bits: f64,
    /// By the best of the adapted ones, used or not; as before where no step found less.
    pub best_bits: f64,
    pub verdict: Verdict,
}

/// Which weights of a part are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Adapted,
    /// The model's own: the tails did not become likelier.
    NoGain,
    /// The model's own: adapted ones play further from the tails' plans.
    PlaysWorse,
}

/// Distance of what is played from its plan, dB rms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FreeRun {
    pub before_db: f32,
    pub after_db: f32,
}

impl FreeRun {
    /// Whether the weights are not worth their likelihood, because they play so much further from the plan, or no sound at all.
    fn is_worse(self) -> bool {
        !self.after_db.is_finite() || self.after_db > self.before_db + MOST_WORSE_DB
    }
}

/// Adapts a model to recordings. With a budget of steps the result is a pure function of its arguments but the threads.
///
/// # Errors
/// Recordings without sound or shorter than 4 s; what training fails of.
pub fn adapt(
    checkpoint: &Checkpoint,
    sounds: &[AudioSource],
    settings: &AdaptSettings,
    observe: &mut Observer,
) -> Result<(Checkpoint, Adaptation), AdaptError> {
    let config = &checkpoint.config;
    let spectrum = checkpoint.spectrum().map_err(TrainError::Plan)?;
    let mut data = listen(sounds, config, &spectrum)?;
    data.encode_plans(&checkpoint.quantizer)?;
    Ok(adapt_to(&data, checkpoint, settings, observe)?)
}

fn adapt_to(
    data: &Dataset,
    checkpoint: &Checkpoint,
    settings: &AdaptSettings,
    observe: &mut Observer,
) -> Result<(Checkpoint, Adaptation), TrainError> {
    let (config, quantizer) = (&checkpoint.config, &checkpoint.quantizer);
    let tails: Vec<Tail> = data.validation.iter().map(|piece| Tail::of(piece, &data.codec, &data.spectrum)).collect();
    let mut params = Params::new(settings.seed);
    let model = Model::new(&mut params, config, data.spectrum.n_bands())?;
    let vars = params.into_vars();
    let weights_of = |part| AdamW::of_part(part, &vars, &checkpoint.weights);
    let workers = Workers::new(settings.threads)?;
    let begun = Instant::now();
    let mut adapted = checkpoint.clone();

    let as_it_is = plan::Variation { speed: 0.0, noise_db: 0.0 };
    let judged: Vec<&Tail> = tails.iter().step_by(tails.len().div_ceil(TAILS).max(1)).collect();
    let study = Study {
        part: Part::Plan,
        learning_rate: settings.plan_learning_rate,
        seed: settings.seed,
        end: End::of(settings.budget, begun, PLAN_SHARE),
        draw: &|rng| plan::draw(data, quantizer, &config.plan_transformer, as_it_is, rng),
        loss: &|context| plan::nll(&model.plan, context)?.mean_all(),
        judge: &|workers| {
            let scored = workers.map(&judged, |tail| {
                let frames = tail.first.saturating_sub(PLAN_CONTEXT)..tail.end().min(tail.first + PLAN_CONTEXT);
                let codes = tail.piece.plan_tokens.slice(s![frames.clone(), ..]);
                let (tokens, bands) = plan::tensors(quantizer, codes)?;
                let n = frames.end - tail.first;
                let nll = model.plan.nll(&tokens, &bands, None)?.narrow(1, frames.len() - 1 - n, n)?;
                Ok((f64::from(nll.sum_all()?.to_scalar::<f32>()?), n))
            })?;
            let (nats, n) = scored.iter().fold((0.0, 0), |(nats, frames), (x, n)| (nats + x, frames + n));
            Ok(nats / n.max(1) as f64)
        },
    };
    let (plan, best, going) = study.run(&workers, weights_of(Part::Plan)?, observe)?;
    adapted.weights.extend(best);

    let forecaster = CpuForecaster { spectrum: &data.spectrum, config: &config.forecast };
    let history = model.wave.history();
    let reader = adapted.model()?.plan;
    let maker = wave::Maker {
        config,
        data,
        quantizer,
        reader: &reader,
        forecaster: &forecaster,
        history,
        speed_variation: 0.0,
    };
    let places = places(&tails);
    let tail_excerpts =
        workers.map(&places, |(tail, first)| maker.clean(tail.piece, first - wave::WARM..first + wave::EXCERPT))?;
    let warm = wave::WARM * config.plan.hop;
    let study = Study {
        part: Part::Wave,
        learning_rate: settings.wave_learning_rate,
        seed: settings.seed,
        end: if going.is_break() { End::Steps(0) } else { End::of(settings.budget, begun, 1.0) },
        draw: &|rng| maker.draw(rng),
        loss: &|excerpt| wave::nll(&model.wave, excerpt)?.mean_all(),
        judge: &|workers| {
            let means = workers.map(&tail_excerpts, |excerpt: &Excerpt| {
                let scored = wave::nll(&model.wave, excerpt)?.narrow(0, warm, excerpt.n_samples() - warm)?;
                Ok(f64::from(scored.mean_all()?.to_scalar::<f32>()?))
            })?;
            Ok(means.iter().sum::<f64>() / means.len().max(1) as f64)
        },
    };
    let (mut wave, best, _) = study.run(&workers, weights_of(Part::Wave)?, observe)?;

    let mut free_run = None;
    if wave.verdict == Verdict::Adapted {
        let scenes = scenes(data, &tails)?;
        let mut candidate = adapted.clone();
        candidate.weights.extend(best);
        let play = |model: &Checkpoint| calibrate::play(model, data, &scenes, model.generation, Follow::Recording);
        let played =
            FreeRun { before_db: play(&adapted)?.adherence.rms_db, after_db: play(&candidate)?.adherence.rms_db };
        free_run = Some(played);
        if played.is_worse() {
            wave.verdict = Verdict::PlaysWorse;
        } else {
            adapted = candidate;
        }
    }
    if settings.calibrate && wave.verdict == Verdict::Adapted {
        let mut tell = |event| match event {
            TrainEvent::Calibration(tried) => observe(AdaptEvent::Calibration(tried)),
            _ => ControlFlow::Continue(()),
        };
        adapted.generation = calibrate::calibrate(&adapted, data, calibrate::EXCERPTS, &mut tell)?;
    }
    let seconds = |frames: usize| (frames * config.plan.hop) as f64 / f64::from(data.codec.sample_rate);
    let head_s = seconds(tails.iter().map(|tail| tail.first).sum());
    let tail_s = seconds(tails.iter().map(|tail| tail.end() - tail.first).sum());
    Ok((adapted, Adaptation { head_s, tail_s, plan, wave, free_run }))
}

/// Heads to train on, and whole recordings, whose tails judge.
fn listen(sounds: &[AudioSource], config: &ModelConfig, spectrum: &Spectrum) -> Result<Dataset, AdaptError> {
    let codec = &config.codec;
    let mut data = Dataset { train: vec![], validation: vec![], codec: codec.clone(), spectrum: spectrum.clone() };
    let (hop, rate) = (spectrum.hop(), f64::from(codec.sample_rate));
    let run_up = config.run_up();
    let head = |n_frames: usize| n_frames.saturating_sub(tail_frames(n_frames, codec, hop));
    let shortest = (LEAST_S * rate) as usize / hop;
    let least = (shortest..).find(|&n| head(n) >= run_up + wave::EXCERPT).unwrap_or(shortest);
    if sounds.is_empty() {
        return Err(AdaptError::Unusable("no recording".into()));
    }
    for source in sounds {
        let (samples, facts) =
            piece::read(source, codec.sample_rate, 0.0).map_err(|refusal| AdaptError::Unusable(refusal.why))?;
        let n_frames = samples.len() / hop;
        if n_frames < least {
            let (got_s, least_s) = (samples.len() as f64 / rate, (least * hop) as f64 / rate);
            return Err(AdaptError::TooShort { name: facts.source, got_s, least_s });
        }
        data.train.push(Recording::in_memory(samples[..head(n_frames) * hop].to_vec(), &facts));
        data.validation.push(Recording::in_memory(samples, &facts));
    }
    Ok(data)
}

/// Plan frames of the tail of a recording of `n_frames`.
fn tail_frames(n_frames: usize, codec: &Codec, hop: usize) -> usize {
    let least = (TAIL_LEAST_S * f64::from(codec.sample_rate) / hop as f64).ceil() as usize;
    (n_frames / TAIL_SHARE).max(least).max(wave::EXCERPT)
}

/// The end of a recording that judges.
struct Tail<'a> {
    /// All of it.
    piece: &'a Recording,
    /// The tail's first plan frame.
    first: usize,
    n_frames: usize,
}

impl<'a> Tail<'a> {
    fn of(piece: &'a Recording, codec: &Codec, spectrum: &Spectrum) -> Self {
        let all = piece.n_frames(spectrum.hop());
        let n_frames = tail_frames(all, codec, spectrum.hop());
        Self { piece, first: all - n_frames, n_frames }
    }

    fn end(&self) -> usize {
        self.first + self.n_frames
    }
}

/// Where excerpts of tails are judged, after frames that are only read: at even distances.
fn places<'a, 'b>(tails: &'b [Tail<'a>]) -> Vec<(&'b Tail<'a>, usize)> {
    let firsts = |tail: &Tail| (tail.first..=tail.end() - wave::EXCERPT).step_by(wave::EXCERPT);
    let all: Vec<_> = tails.iter().flat_map(|tail| firsts(tail).map(move |first| (tail, first))).collect();
    let stride = all.len().div_ceil(PLACES).max(1);
    all.into_iter().step_by(stride).collect()
}

/// Beginnings in the tails, at even distances; the same place again is played with another seed.
fn scenes(data: &Dataset, tails: &[Tail]) -> Result<Vec<Scene>, TrainError> {
    (0..SCENES)
        .map(|i| {
            let tail = &tails[i * tails.len() / SCENES];
            let played = PLAYED.min(tail.n_frames);
            let begin = tail.first + (tail.n_frames - played) * i / (SCENES - 1);
            Scene::cut(data, tail.piece, begin - PROMPT, (PROMPT, played))
        })
        .collect()
}

/// When a part has had its steps.
#[derive(Clone, Copy)]
enum End {
    Steps(usize),
    At(Instant),
}

impl End {
    /// `share`: of a time budget, counted from the begin of the first part.
    fn of(budget: Budget, begun: Instant, share: f64) -> Self {
        match budget {
            Budget::Steps(steps) => Self::Steps(steps),
            Budget::Time(time) => {
                let time = time.mul_f64(share);
                Self::At(begun.checked_add(time).unwrap_or(begun + Duration::from_secs(86_400)))
            }
        }
    }

    fn is_past(self, steps: usize) -> bool {
        match self {
            Self::Steps(most) => steps >= most,
            Self::At(end) => Instant::now() >= end,
        }
    }
}

/// What one part learns from the heads, and how the tails judge it.
struct Study<'a, T> {
    part: Part,
    learning_rate: f64,
    seed: u64,
    end: End,
    /// The item that a generator draws; every item has a generator of its own.
    draw: &'a (dyn Fn(&mut Rng) -> Result<T, TrainError> + Sync),
    /// Mean loss of an item in nats per unit, a scalar.
    loss: &'a (dyn Fn(&T) -> candle_core::Result<Tensor> + Sync),
    /// Nats per unit of the tails.
    judge: &'a (dyn Fn(&Workers) -> Result<f64, TrainError> + Sync),
}

impl<T> Study<'_, T> {
    /// Steps until the end, or until the tails have not become likelier for a while; the weights that were best, none where
    /// these are the model's own.
    fn run(
        &self,
        workers: &Workers,
        mut optimizer: AdamW,
        observe: &mut Observer,
    ) -> Result<(Adapted, Weights, ControlFlow<()>), TrainError> {
        let part = self.part;
        let before = (self.judge)(workers)?;
        let mut going = observe(AdaptEvent::Judged { part, step: 0, bits: before / LN_2 });
        let (mut steps, mut stale) = (0, 0);
        let (mut best, mut weights) = (before, Weights::new());
        while going.is_continue() && stale < PATIENCE && !self.end.is_past(steps) {
            let (nats, norm) = self.step(steps, workers, &mut optimizer)?;
            if !(nats.is_finite() && norm.is_finite()) {
                break;
            }
            steps += 1;
            going = observe(AdaptEvent::Step { part, step: steps, bits: nats / LN_2 });
            if steps.is_multiple_of(JUDGE_EVERY) || going.is_break() || self.end.is_past(steps) {
                optimizer.swap()?;
                let judged = (self.judge)(workers);
                optimizer.swap()?;
                let judged = judged?;
                stale += 1;
                if judged < best {
                    (best, stale) = (judged, 0);
                    weights = optimizer.averages()?.into_iter().collect();
                }
                if observe(AdaptEvent::Judged { part, step: steps, bits: judged / LN_2 }).is_break() {
                    going = ControlFlow::Break(());
                }
            }
        }
        let verdict = if weights.is_empty() { Verdict::NoGain } else { Verdict::Adapted };
        Ok((Adapted { steps, before_bits: before / LN_2, best_bits: best / LN_2, verdict }, weights, going))
    }

    /// One step by the mean gradient of a batch; gives its nats per unit and the gradient's norm.
    fn step(&self, steps: usize, workers: &Workers, optimizer: &mut AdamW) -> Result<(f64, f64), TrainError> {
        let items: Vec<u64> = (0..BATCH).map(|i| (steps * BATCH + i) as u64).collect();
        let results = workers.map(&items, |&item| {
            let name = self.part.name().as_bytes();
            let mut rng = Rng::new(Hash::new().bytes(b"adapt").bytes(name).words([self.seed, item]).value());
            let loss = (self.loss)(&(self.draw)(&mut rng)?)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
        })?;
        let mut nats = 0.0;
        for (loss, gradients) in results {
            nats += loss / BATCH as f64;
            optimizer.add(&gradients, 1)?;
        }
        let rate = self.learning_rate * ((steps + 1) as f64 / WARM_UP as f64).min(1.0);
        Ok((nats, optimizer.step(rate, nats.is_finite())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_a_fifth_but_never_less_than_a_second() {
        let codec = Codec::default();
        let second = codec.sample_rate as usize / 512 + 1;
        assert_eq!(tail_frames(5 * second - 1, &codec, 512), second);
        assert_eq!(tail_frames(1000, &codec, 512), 200);
    }

    #[test]
    fn weights_that_play_much_worse_or_nothing_are_not_kept() {
        let worse = |after_db| FreeRun { before_db: 5.0, after_db }.is_worse();
        assert!([4.0, 5.0, 5.5].map(worse).iter().all(|worse| !worse));
        assert!([5.6, 30.0, f32::INFINITY, f32::NAN].map(worse).iter().all(|worse| *worse));
    }
}
