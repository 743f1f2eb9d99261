//! Turns mono samples into mu-law tokens, one per timestep, and back.

use std::f64::consts::LN_2;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// One quantised sample, `0..Codec::levels()`.
pub type Token = u16;

const LEVELS: usize = 256;
const MU: f64 = 255.0;
const LN_256: f64 = 8.0 * LN_2;

/// Where the outermost bins end: far beyond any density's reach, so their mass takes in both tails.
const OUTER_EDGE: f32 = 50.0;

/// How samples are cut into tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantizer {
    /// The continuous curve of ITU-T G.711 with mu = 255, cut into 256 equal bins over [-1, 1], mid-rise.
    #[default]
    Mulaw8,
}

/// What a token means: the rate and the quantisation, as kept in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Codec {
    /// Tokens per second, Hz.
    pub sample_rate: u32,
    /// How a sample becomes a token.
    pub quantizer: Quantizer,
}

impl Default for Codec {
    fn default() -> Self {
        Self { sample_rate: 16_000, quantizer: Quantizer::Mulaw8 }
    }
}

impl Codec {
    /// Number of different tokens.
    pub fn levels(&self) -> usize {
        match self.quantizer {
            Quantizer::Mulaw8 => LEVELS,
        }
    }

    /// The token whose bin holds `sample`: `edge(token) <= sample < edge(token + 1)`.
    ///
    /// Samples beyond [-1, 1] fall into the outermost bins; NaN becomes [`silence`](Self::silence).
    pub fn encode(&self, sample: f32) -> Token {
        if sample.is_nan() {
            return self.silence();
        }
        let inner = &self.table().edges[1..LEVELS];
        inner.partition_point(|&edge| edge <= sample) as Token
    }

    /// [`encode`](Self::encode) for each sample.
    pub fn encode_all(&self, samples: &[f32]) -> Vec<Token> {
        samples.iter().map(|&sample| self.encode(sample)).collect()
    }

    /// The sample in the (companded) middle of the token's bin. A token beyond the last counts as the last.
    pub fn decode(&self, token: Token) -> f32 {
        self.table().centres[usize::from(token).min(LEVELS - 1)]
    }

    /// [`decode`](Self::decode) for each token.
    pub fn decode_all(&self, tokens: &[Token]) -> Vec<f32> {
        tokens.iter().map(|&token| self.decode(token)).collect()
    }

    /// Lower edge of bin `i`, `i <= levels()`; `edge(0)` and `edge(levels())` lie far outside [-1, 1],
    /// so that the two outermost bins hold a density's tails.
    ///
    /// # Panics
    /// If `i > levels()`.
    pub fn edge(&self, i: usize) -> f32 {
        self.table().edges[i]
    }

    /// The token of a sample of 0.
    pub fn silence(&self) -> Token {
        (LEVELS / 2) as Token
    }

    /// The curve: [-1, 1] to [-1, 1], `sign(x) ln(1 + 255 |x|) / ln 256`.
    pub fn compand(&self, sample: f32) -> f32 {
        let companded = (MU as f32 * sample.abs()).ln_1p() / LN_256 as f32;
        companded.copysign(sample)
    }

    /// Width of a bin at `sample`: the quantiser's step there, in units of a sample.
    pub fn bin_width(&self, sample: f32) -> f32 {
        (sample.abs() + (1.0 / MU) as f32) * (LN_256 / (LEVELS / 2) as f64) as f32
    }

    fn table(&self) -> &'static Table {
        match self.quantizer {
            Quantizer::Mulaw8 => &MULAW8,
        }
    }
}

/// What the curve gives at every bin's middle and edges; looked up instead of computed.
struct Table {
    centres: [f32; LEVELS],
    edges: [f32; LEVELS + 1],
}

static MULAW8: LazyLock<Table> = LazyLock::new(|| {
    let half = (LEVELS / 2) as f64;
    let mut edges = std::array::from_fn(|i| expand(i as f64 / half - 1.0) as f32);
    edges[0] = -OUTER_EDGE;
    edges[LEVELS] = OUTER_EDGE;
    Table { centres: std::array::from_fn(|i| expand((i as f64 + 0.5) / half - 1.0) as f32), edges }
});

/// The curve backwards: companded [-1, 1] to samples [-1, 1].
fn expand(companded: f64) -> f64 {
    (companded.abs() * LN_256).exp_m1() / MU * companded.signum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The curve as the standard's formula, without a table.
    fn encode_by_formula(sample: f32) -> f64 {
        let x = f64::from(sample).clamp(-1.0, 1.0);
        ((x.signum() * (MU * x.abs()).ln_1p() / LN_256 + 1.0) * 128.0).floor().clamp(0.0, 255.0)
    }

    #[test]
    fn every_token_survives_a_round_trip() {
        let codec = Codec::default();
        for token in 0..LEVELS as Token {
            assert_eq!(codec.encode(codec.decode(token)), token);
        }
    }

    #[test]
    fn curve_meets_known_values() {
        let codec = Codec::default();
        // mu = 255: |x| = 1/255 is one 1/8 up the curve, |x| = 15/255 half of it.
        for (sample, companded) in [(0.0, 0.0), (1.0 / 255.0, 0.125), (-15.0 / 255.0, -0.5), (1.0, 1.0)] {
            assert!((codec.compand(sample) - companded).abs() < 1e-6, "{sample}");
        }
        assert_eq!((codec.encode(0.0), codec.encode(-1e-6)), (128, 127));
        assert_eq!((codec.encode(-1.0), codec.encode(1.0)), (0, 255));
        assert!((codec.decode(255) - (256f32.powf(255.0 / 256.0) - 1.0) / 255.0).abs() < 1e-6);
        assert!((codec.edge(192) - 15.0 / 255.0).abs() < 1e-7);
        assert_eq!((codec.edge(0), codec.edge(128), codec.edge(256)), (-50.0, 0.0, 50.0));
    }

    #[test]
    fn what_is_no_sample_still_has_a_token() {
        let codec = Codec::default();
        assert_eq!(codec.encode(f32::NAN), codec.silence());
        assert_eq!((codec.encode(f32::NEG_INFINITY), codec.encode(f32::INFINITY)), (0, 255));
        assert_eq!(codec.decode(Token::MAX), codec.decode(255));
    }

    #[test]
    fn settings_are_written_by_name() {
        let json = serde_json::to_string(&Codec::default()).unwrap();
        assert_eq!(json, r#"{"sample_rate":16000,"quantizer":"mulaw8"}"#);
        assert_eq!(serde_json::from_str::<Codec>(&json).unwrap(), Codec::default());
    }

    proptest! {
        #[test]
        fn mulaw_round_trip_stays_within_one_step(sample in -1f32..=1.0) {
            let codec = Codec::default();
            let heard = codec.decode(codec.encode(sample));
            let step = codec.bin_width(sample).max(codec.bin_width(heard));
            prop_assert!((heard - sample).abs() <= step, "{sample} came back as {heard}, step {step}");
        }

        #[test]
        fn a_token_is_the_bin_its_sample_lies_in(sample in -1.5f32..1.5) {
            let codec = Codec::default();
            let token = codec.encode(sample);
            prop_assert!(codec.edge(token.into()) <= sample && sample < codec.edge(usize::from(token) + 1));
            prop_assert!((f64::from(token) - encode_by_formula(sample)).abs() <= 1.0);
            let inside = codec.decode(token) * 0.5 + codec.edge(usize::from(token).clamp(1, 255)) * 0.5;
            prop_assert_eq!(f64::from(codec.encode(inside)), encode_by_formula(inside));
        }
    }
}
