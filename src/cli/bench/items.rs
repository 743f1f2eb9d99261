//! Turns synthetic sound into what training draws: excerpts of the wave transformer, contexts of the plan transformer.
#![allow(clippy::result_large_err, reason = "training's error is the library's, and nothing here is called often")]

use candle_core::{Device, Tensor};
use ndarray::Array2;
use wavegen::codec::Token;
use wavegen::forecast::{PastForecast, PlannedForecast};
use wavegen::model::config::ModelConfig;
use wavegen::model::excerpt::{Excerpt, Piece};
use wavegen::plan::{ResidualQuantizer, Spectrum};
use wavegen::rng::Rng;
use wavegen::train::{Part, TrainError};

/// Plan frames of an item of each part.
#[derive(Clone, Copy)]
pub struct Frames {
    pub wave: usize,
    pub plan: usize,
}

/// What a thread learns from at a time.
pub enum Item {
    Wave(Box<Excerpt>),
    Plan { tokens: Tensor, bands: Tensor, dropout: Tensor },
}

/// Draws items.
pub struct Source<'a> {
    pub config: &'a ModelConfig,
    pub quantizer: &'a ResidualQuantizer,
    pub spectrum: Spectrum,
    pub sound: Vec<Token>,
    pub history: usize,
}

impl Source<'_> {
    pub fn draw(&self, part: Part, frames: Frames, rng: &mut Rng) -> Result<Item, TrainError> {
        match part {
            Part::Wave => self.excerpt(frames.wave, rng).map(|excerpt| Item::Wave(excerpt.into())),
            Part::Plan => self.context(frames.plan, rng),
        }
    }

    fn excerpt(&self, frames: usize, rng: &mut Rng) -> Result<Excerpt, TrainError> {
        let (hop, forecast) = (self.config.plan.hop, &self.config.forecast);
        let run_up = forecast.past_window.max(self.config.plan.window).div_ceil(hop);
        let n = run_up + frames;
        let first = rng.below(self.sound.len() / hop - n);
        let tokens = &self.sound[first * hop..(first + n) * hop];
        let plan = self.spectrum.analyse(&self.config.codec.decode_all(tokens));
        let piece = Piece { tokens, heard: tokens, plan: plan.view(), spectrum: &self.spectrum };
        let (mut past, mut planned) = (PastForecast::new(forecast)?, PlannedForecast::new(forecast)?);
        Ok(Excerpt::read(self.config, self.history, &piece, run_up..n, &mut past, &mut planned)?)
    }

    fn context(&self, frames: usize, rng: &mut Rng) -> Result<Item, TrainError> {
        let (plan, transformer) = (&self.config.plan, &self.config.plan_transformer);
        let codes = Array2::from_shape_simple_fn((frames, plan.n_codebooks), || rng.below(plan.n_entries) as u16);
        let bands = self.quantizer.decode_all(codes.view())? - &self.quantizer.mean;
        let (tokens, shape) = ((1, frames, plan.n_codebooks), (1, frames, bands.ncols()));
        let mask = (1, frames - 1, transformer.dim);
        let share = transformer.dropout;
        let keep = (0..mask.1 * mask.2).map(|_| if rng.uniform() < share { 0.0 } else { 1.0 / (1.0 - share) });
        Ok(Item::Plan {
            tokens: Tensor::from_iter(codes.iter().map(|&c| u32::from(c)), &Device::Cpu)?.reshape(tokens)?,
            bands: Tensor::from_iter(bands, &Device::Cpu)?.reshape(shape)?,
            dropout: Tensor::from_iter(keep, &Device::Cpu)?.reshape(mask)?,
        })
    }
}
