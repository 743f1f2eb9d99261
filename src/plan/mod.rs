//! Turns sound into a plan, one frame per hop that says what these milliseconds sound like, and frames into tokens.

pub(crate) mod fourier;
pub(crate) mod response;
pub mod rvq;
pub mod spectrum;

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

pub use rvq::ResidualQuantizer;
pub(crate) use spectrum::Autocorrelation;
pub use spectrum::{DB_PER_UNIT, Spectrum};

/// What a plan frame is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanConfig {
    /// Samples per plan frame.
    pub hop: usize,
    /// Samples that a frame is computed from; they end with the frame's last sample. Even.
    pub window: usize,
    /// Centre of the lowest band, Hz.
    pub lowest_hz: f64,
    /// Centres of all bands lie below this, Hz.
    pub highest_hz: f64,
    /// Plan tokens per frame.
    pub n_codebooks: usize,
    /// Different values of a plan token.
    pub n_entries: usize,
    /// How much a frame's tokens stay those of the frame before: it keeps the first j of them, for the largest j that leaves no more
    /// than `1 + hysteresis j` times the power that the nearest entries leave. 0: each frame has the nearest. What hardly changes then
    /// has tokens that hardly change, which a language model finds much likelier.
    pub hysteresis: f32,
    /// A frame in which the mean of any 17 neighbouring bands has risen by so much since the frame before, dB, keeps none of its tokens:
    /// something begins there, however little that is beside what sounds on. 0: it may keep them whatever begins.
    pub attack_db: f32,
}

impl Default for PlanConfig {
    fn default() -> Self {
        Self {
            hop: 512,
            window: 2048,
            lowest_hz: 27.5,
            highest_hz: 7700.0,
            n_codebooks: 4,
            n_entries: 256,
            hysteresis: 0.0,
            attack_db: 0.0,
        }
    }
}

impl PlanConfig {
    /// Checks the settings against each other and the sample rate (Hz).
    ///
    /// # Errors
    /// Names the first setting that cannot be.
    pub fn validate(&self, sample_rate: u32) -> Result<(), PlanError> {
        let nyquist = f64::from(sample_rate) / 2.0;
        if self.hop == 0 || self.window < self.hop || !self.window.is_multiple_of(2) {
            return Err(PlanError::Window { hop: self.hop, window: self.window });
        }
        if !(self.lowest_hz > 0.0 && self.lowest_hz < self.highest_hz && self.highest_hz <= nyquist) {
            return Err(PlanError::Bands { lowest_hz: self.lowest_hz, highest_hz: self.highest_hz, nyquist });
        }
        if self.n_codebooks == 0 || self.n_entries == 0 || self.n_entries > MAX_ENTRIES {
            return Err(PlanError::Codebooks { n_codebooks: self.n_codebooks, n_entries: self.n_entries });
        }
        if !(0.0..=MAX_HYSTERESIS).contains(&self.hysteresis) {
            return Err(PlanError::Hysteresis(self.hysteresis));
        }
        if !(0.0..=MAX_ATTACK_DB).contains(&self.attack_db) {
            return Err(PlanError::Attack(self.attack_db));
        }
        Ok(())
    }
}

/// Plan tokens are u16.
const MAX_ENTRIES: usize = 1 << 16;

/// With more, plans would not move.
const MAX_HYSTERESIS: f32 = 10.0;

/// Nothing rises by more from one frame to the next.
const MAX_ATTACK_DB: f32 = 200.0;

/// Bands on either side of one that a neighbourhood has.
const REACH: usize = 8;

/// Means over each band's neighbourhood, the 8 bands on either side and itself, as far as there are.
pub(crate) fn neighbourhoods(bands: &[f32]) -> impl Iterator<Item = f32> + '_ {
    (0..bands.len()).map(|band| {
        let around = &bands[band.saturating_sub(REACH)..(band + REACH + 1).min(bands.len())];
        around.iter().sum::<f32>() / around.len() as f32
    })
}

/// What one hop sounds like.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanFrame {
    /// One token per codebook.
    pub tokens: Vec<u16>,
    /// `ln(power + 1e-4) / 4` per band: what the tokens decode to, as the model takes it.
    pub bands: Vec<f32>,
}

/// The bands of frames, `[frames, n_bands]`.
///
/// # Panics
/// When they are not of one plan.
pub fn bands_of(frames: &[PlanFrame]) -> Array2<f32> {
    let n_bands = frames.first().map_or(0, |frame| frame.bands.len());
    Array2::from_shape_fn((frames.len(), n_bands), |(frame, band)| frames[frame].bands[band])
}

/// Frames of tokens `[frames, n_codebooks]`, flat, and bands `[frames, n_bands]`.
pub(crate) fn frames_of(tokens: &[u16], bands: ArrayView2<f32>) -> Vec<PlanFrame> {
    let frames = tokens.chunks_exact(tokens.len() / bands.nrows().max(1)).zip(bands.rows());
    frames.map(|(tokens, bands)| PlanFrame { tokens: tokens.to_vec(), bands: bands.to_vec() }).collect()
}

/// Why a plan could not be made or read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The analysis window cannot hold a hop, or has no middle bin.
    #[error("plan hop {hop} and window {window}: expected a hop of at least 1 and an even window no shorter than it")]
    Window {
        /// Samples per frame.
        hop: usize,
        /// Samples per analysis.
        window: usize,
    },
    /// The bands do not fit between 0 Hz and half the sample rate.
    #[error("plan bands from {lowest_hz} to {highest_hz} Hz: expected 0 < lowest < highest <= {nyquist} Hz")]
    Bands {
        /// Centre of the lowest band.
        lowest_hz: f64,
        /// Limit of the highest.
        highest_hz: f64,
        /// Half the sample rate.
        nyquist: f64,
    },
    /// Plan tokens are u16 and there is at least one.
    #[error(
        "{n_codebooks} plan codebooks of {n_entries} entries: expected at least one of each and at most 65536 entries"
    )]
    Codebooks {
        /// Tokens per frame.
        n_codebooks: usize,
        /// Values per token.
        n_entries: usize,
    },
    /// A share of power, and not many times it.
    #[error("a plan hysteresis of {0}: expected 0 to {MAX_HYSTERESIS}")]
    Hysteresis(f32),
    /// A rise, and not a fall.
    #[error("a plan attack of {0} dB: expected 0 to {MAX_ATTACK_DB}")]
    Attack(f32),
    /// A frame of another plan.
    #[error("plan frame of {got} bands, expected {expected}")]
    BandCount {
        /// Bands of this plan.
        expected: usize,
        /// Bands given.
        got: usize,
    },
    /// Two analyses of the same sound have as many frames.
    #[error("a plan of {got} frames, expected {expected}")]
    FrameCount {
        /// Frames of the other plan.
        expected: usize,
        /// Frames given.
        got: usize,
    },
    /// Mean and codebooks are of different plans.
    #[error("plan codebooks of shape {got:?} do not go with a mean of {n_bands} bands")]
    BookShape {
        /// Length of the mean.
        n_bands: usize,
        /// Shape of the codebooks.
        got: Vec<usize>,
    },
    /// A frame of another quantiser.
    #[error("plan frame of {got} tokens, expected {expected}")]
    TokenCount {
        /// Codebooks of this quantiser.
        expected: usize,
        /// Tokens given.
        got: usize,
    },
    /// A token that no entry belongs to.
    #[error("plan token {token} of codebook {codebook}, which has {n_entries} entries")]
    Token {
        /// The token.
        token: u16,
        /// Its codebook.
        codebook: usize,
        /// Entries of it.
        n_entries: usize,
    },
    /// Nothing to learn codebooks from.
    #[error("no finite plan frames to fit codebooks to")]
    NoFrames,
    /// More lags than the analysis window determines.
    #[error("linear prediction of order {order} from a plan needs an analysis window of {} samples, got {window}", 2 * order)]
    Order {
        /// Coefficients asked for.
        order: usize,
        /// Samples per analysis.
        window: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_are_refused_with_their_values() {
        let config = PlanConfig::default();
        assert_eq!(config.validate(16_000), Ok(()));
        for (bad, said) in [
            (PlanConfig { hop: 0, ..config.clone() }, "hop 0"),
            (PlanConfig { window: 500, ..config.clone() }, "window 500"),
            (PlanConfig { window: 2047, ..config.clone() }, "window 2047"),
            (PlanConfig { lowest_hz: f64::NAN, ..config.clone() }, "NaN"),
            (PlanConfig { highest_hz: 9000.0, ..config.clone() }, "9000"),
            (PlanConfig { n_entries: 70_000, ..config.clone() }, "70000"),
            (PlanConfig { n_codebooks: 0, ..config.clone() }, "0 plan codebooks"),
            (PlanConfig { hysteresis: -0.1, ..config.clone() }, "hysteresis of -0.1"),
            (PlanConfig { hysteresis: f32::NAN, ..config.clone() }, "hysteresis of NaN"),
            (PlanConfig { attack_db: -3.0, ..config.clone() }, "attack of -3 dB"),
        ] {
            let message = bad.validate(16_000).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
    }
}
