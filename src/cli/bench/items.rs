//! Turns synthetic sound into what training draws: excerpts of the wave transformer, contexts of the plan transformer.
#![allow(clippy::result_large_err, reason = "training's error is the library's, and nothing here is called often")]

use candle_core::{Device, Tensor};
use ndarray::Array2;
use wavegen::codec::Token;
use wavegen::forecast::{PastForecast, PlannedForecast};
use wavegen::model::config::ModelConfig;
use wavegen::model::excerpt::{Batch, Excerpt, Piece};
use wavegen::model::wave_transformer::WaveTransformer;
use wavegen::plan::{ResidualQuantizer, Spectrum};
use wavegen::rng::Rng;
use wavegen::train::{Part, TrainError};

/// Plan frames of an item of each part.
#[derive(Clone, Copy)]
pub struct Frames {
    pub wave: usize,
    pub plan: usize,
}

/// What one loss is computed of: one excerpt or context, or several.
pub enum Items {
    Wave(Box<Batch>),
    Plan { tokens: Tensor, bands: Tensor, dropout: Tensor },
}

/// Draws items.
pub struct Source<'a> {
    pub config: &'a ModelConfig,
    pub quantizer: &'a ResidualQuantizer,
    pub spectrum: Spectrum,
    pub sound: Vec<Token>,
    pub wave: &'a WaveTransformer,
}

impl Source<'_> {
    /// Items by their numbers; which is which depends on nothing else.
    pub fn draw(&self, part: Part, frames: Frames, numbers: &[usize]) -> Result<Items, TrainError> {
        let rngs = numbers.iter().map(|&n| Rng::new(n as u64));
        match part {
            Part::Wave => {
                let excerpts =
                    rngs.map(|mut rng| self.excerpt(frames.wave, &mut rng)).collect::<Result<Vec<_>, _>>()?;
                Ok(Items::Wave(Batch::of(&excerpts, self.wave)?.into()))
            }
            Part::Plan => {
                let contexts =
                    rngs.map(|mut rng| self.context(frames.plan, &mut rng)).collect::<Result<Vec<_>, _>>()?;
                let joined = |i: usize| Tensor::cat(&contexts.iter().map(|context| &context[i]).collect::<Vec<_>>(), 0);
                Ok(Items::Plan { tokens: joined(0)?, bands: joined(1)?, dropout: joined(2)? })
            }
        }
    }

    fn excerpt(&self, frames: usize, rng: &mut Rng) -> Result<Excerpt, TrainError> {
        let (hop, forecast, run_up) = (self.config.plan.hop, &self.config.forecast, self.config.run_up());
        let n = run_up + frames;
        let first = rng.below(self.sound.len() / hop - n);
        let tokens = &self.sound[first * hop..(first + n) * hop];
        let plan = self.spectrum.analyse(&self.config.codec.decode_all(tokens));
        let piece = Piece { tokens, heard: tokens, plan: plan.view(), spectrum: &self.spectrum };
        let (mut past, mut planned) = (PastForecast::new(forecast)?, PlannedForecast::new(forecast)?);
        Ok(Excerpt::read(self.config, self.wave.history(), &piece, run_up..n, &mut past, &mut planned)?)
    }

    /// Tokens, bands, dropout, each `[1, frames, ..]`.
    fn context(&self, frames: usize, rng: &mut Rng) -> Result<[Tensor; 3], TrainError> {
        let (plan, transformer) = (&self.config.plan, &self.config.plan_transformer);
        let codes = Array2::from_shape_simple_fn((frames, plan.n_codebooks), || rng.below(plan.n_entries) as u16);
        let bands = self.quantizer.decode_all(codes.view())? - &self.quantizer.mean;
        let (tokens, shape) = ((1, frames, plan.n_codebooks), (1, frames, bands.ncols()));
        let mask = (1, frames - 1, transformer.dim);
        let share = transformer.dropout;
        let keep = (0..mask.1 * mask.2).map(|_| if rng.uniform() < share { 0.0 } else { 1.0 / (1.0 - share) });
        Ok([
            Tensor::from_iter(codes.iter().map(|&c| u32::from(c)), &Device::Cpu)?.reshape(tokens)?,
            Tensor::from_iter(bands, &Device::Cpu)?.reshape(shape)?,
            Tensor::from_iter(keep, &Device::Cpu)?.reshape(mask)?,
        ])
    }
}
