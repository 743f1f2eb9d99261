//! Trains the wave transformer on excerpts: negative log-likelihood of the next token, bits per sample.

use std::ops::ControlFlow;
use std::sync::mpsc::sync_channel;

use super::dataset::{Dataset, Recording};
use super::lesson::Lesson;
use super::optimizer::AdamW;
use super::schedule::PLAN_SHARE;
use super::{Part, Run, TrainError, TrainSettings};
use crate::forecast::{PastForecast, PlannedForecast};
use crate::model::excerpt::{Excerpt, Piece};
use crate::model::head;
use crate::plan::ResidualQuantizer;
use crate::rng::Rng;

/// Plan frames of an excerpt; about a second.
const EXCERPT: usize = 32;
/// Excerpts per step.
const BATCH: usize = 2;
/// Batches made ahead of the model.
const AHEAD: usize = 2;
/// Share of the excerpts whose history is noisy, and whose plan is quantised as in generation.
const NOISY: f32 = 0.5;
const QUANTISED: f32 = 0.7;
/// Gain of an excerpt, dB, drawn evenly.
const GAIN_DB: (f32, f32) = (-12.0, 2.0);
/// Places per validation, frames scored at each after [`WARM`] frames that are only read.
const PLACES: usize = 6;
const WARM: usize = 8;
/// Steps between validations.
const VALIDATE: usize = 250;

/// Draws training excerpts: a pure function of the seed.
struct Maker<'a> {
    settings: &'a TrainSettings,
    data: &'a Dataset,
    quantizer: &'a ResidualQuantizer,
    history: usize,
    rng: Rng,
}

impl Maker<'_> {
    fn batch(&mut self) -> Result<Vec<Excerpt>, TrainError> {
        (0..BATCH).map(|_| self.excerpt()).collect()
    }

    fn excerpt(&mut self) -> Result<Excerpt, TrainError> {
        let rng = &mut self.rng;
        let hop = self.data.spectrum.hop();
        let before = run_up(self.settings, hop);
        let longest = self.data.train.iter().map(|r| r.n_frames(hop)).max().unwrap_or(0);
        let frames = EXCERPT.min(longest.saturating_sub(before));
        let (recording, first) = self.data.pick(before + frames, rng);
        let gain = 10.0f32.powf((GAIN_DB.0 + (GAIN_DB.1 - GAIN_DB.0) * rng.uniform()) / 20.0);
        let quantised = rng.uniform() < QUANTISED;
        let noise = if rng.uniform() < NOISY { rng.uniform() } else { 0.0 };
        let codec = &self.data.codec;
        let tokens = recording.tokens(first * hop..(first + before + frames) * hop, gain, codec);
        let top = (codec.levels() - 1) as f32;
        let heard: Vec<_> = tokens
            .iter()
            .map(
                |&t| if noise > 0.0 { (f32::from(t) + noise * rng.normal()).round().clamp(0.0, top) as u16 } else { t },
            )
            .collect();
        excerpt(self.settings, self.data, quantised.then_some(self.quantizer), &tokens, &heard, before, self.history)
    }
}

/// Plan frames before an excerpt that the forecasts and the plan's window need.
fn run_up(settings: &TrainSettings, hop: usize) -> usize {
    settings.config.forecast.past_window.max(settings.config.plan.window).div_ceil(hop)
}

fn excerpt(
    settings: &TrainSettings,
    data: &Dataset,
    quantizer: Option<&ResidualQuantizer>,
    tokens: &[u16],
    heard: &[u16],
    before: usize,
    history: usize,
) -> Result<Excerpt, TrainError> {
    let mut plan = data.spectrum.analyse(&data.codec.decode_all(tokens));
    if let Some(quantizer) = quantizer {
        plan = quantizer.decode_all(quantizer.encode_all(plan.view())?.view())?;
    }
    let piece = Piece { tokens, heard, plan: plan.view(), spectrum: &data.spectrum };
    let forecast = &settings.config.forecast;
    let (mut past, mut planned) = (PastForecast::new(forecast)?, PlannedForecast::new(forecast)?);
    let frames = before..plan.nrows();
    Ok(Excerpt::read(&settings.config, history, &piece, frames, &mut past, &mut planned)?)
}

/// Trains until the budget is spent; the averages then hold the result. `save` is called after every validation.
pub fn train(
    run: &mut Run,
    optimizer: &mut AdamW,
    save: &mut dyn FnMut(&AdamW) -> Result<(), TrainError>,
) -> Result<ControlFlow<()>, TrainError> {
    let model = &run.model.wave;
    let history = model.history();
    let held_out = held_out(run, history)?;
    let warm = WARM * run.spectrum.hop();
    let nll = |excerpt: &Excerpt| head::nll(&model.forward(&excerpt.inputs()?)?, &excerpt.targets);
    let rng = Rng::new(run.settings.seed ^ 0x3a7e);
    let mut maker = Maker { settings: run.settings, data: run.data, quantizer: run.quantizer, history, rng };
    std::thread::scope(|scope| {
        let (sender, batches) = sync_channel(AHEAD);
        // Ends when the receiver is gone.
        scope.spawn(move || while sender.send(maker.batch()).is_ok() {});
        let lesson = Lesson {
            part: Part::Wave,
            share: 1.0 - PLAN_SHARE,
            learning_rate: run.settings.wave_learning_rate,
            validate_every: VALIDATE,
            batch: &mut || batches.recv().map_err(|_| TrainError::Thread)?,
            loss: &|excerpt| nll(excerpt)?.mean_all(),
            units: Excerpt::n_samples,
            validate: &|workers| {
                let means = workers.map(&held_out, |excerpt| {
                    let scored = nll(excerpt)?.narrow(0, warm, excerpt.n_samples() - warm)?;
                    Ok(f64::from(scored.mean_all()?.to_scalar::<f32>()?))
                })?;
                Ok((!means.is_empty()).then(|| means.iter().sum::<f64>() / means.len() as f64))
            },
            save,
        };
        lesson.teach(run.settings, optimizer, run.observe)
    })
}

/// Excerpts of held-out pieces, with clean history and the plan as in generation.
fn held_out(run: &Run, history: usize) -> Result<Vec<Excerpt>, TrainError> {
    let hop = run.spectrum.hop();
    let before = run_up(run.settings, hop);
    let fits = |r: &&Recording| r.n_frames(hop) >= before + EXCERPT;
    let pieces: Vec<&Recording> = run.data.validation.iter().filter(fits).collect();
    (0..if pieces.is_empty() { 0 } else { PLACES })
        .map(|i| {
            let piece = pieces[i % pieces.len()];
            let room = piece.n_frames(hop) - before - EXCERPT;
            let first = room * (2 * i + 1) / (2 * PLACES);
            let tokens = piece.tokens(first * hop..(first + before + EXCERPT) * hop, 1.0, &run.data.codec);
            excerpt(run.settings, run.data, Some(run.quantizer), &tokens, &tokens, before, history)
        })
        .collect()
}
