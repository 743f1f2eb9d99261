//! Turns mono samples into tokens, one per timestep, and back.

use std::f64::consts::LN_2;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// One quantised sample, `0..Codec::levels()`.
pub type Token = u16;

/// Different values of [`Codec::code`]: the bins of mu-law.
pub const N_CODES: usize = 256;
/// Bins of 16 bits, and the samples of one unit.
const PCM_LEVELS: usize = 1 << 16;
const PCM_UNIT: f32 = (PCM_LEVELS / 2) as f32;
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
    /// 65,536 equal bins, mid-tread: token t is the sample `(t - 32768) / 32768`, as in a WAV file of 16 bits.
    Pcm16,
}

/// What a token means: the rate and the quantisation, as kept in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
            Quantizer::Mulaw8 => N_CODES,
            Quantizer::Pcm16 => PCM_LEVELS,
        }
    }

    /// The token whose bin holds `sample`: `edge(token) <= sample < edge(token + 1)`.
    ///
    /// Samples beyond [-1, 1] fall into the outermost bins; NaN becomes [`silence`](Self::silence).
    pub fn encode(&self, sample: f32) -> Token {
        if sample.is_nan() {
            return self.silence();
        }
        match self.quantizer {
            Quantizer::Mulaw8 => mulaw_bin(sample),
            Quantizer::Pcm16 => pcm_bin(sample),
        }
    }

    /// [`encode`](Self::encode) for each sample.
    pub fn encode_all(&self, samples: &[f32]) -> Vec<Token> {
        samples.iter().map(|&sample| self.encode(sample)).collect()
    }

    /// The sample in the (companded) middle of the token's bin. A token beyond the last counts as the last.
    pub fn decode(&self, token: Token) -> f32 {
        match self.quantizer {
            Quantizer::Mulaw8 => MULAW8.centres[usize::from(token).min(N_CODES - 1)],
            Quantizer::Pcm16 => (f32::from(token) - PCM_UNIT) / PCM_UNIT,
        }
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
        match self.quantizer {
            Quantizer::Mulaw8 => MULAW8.edges[i],
            Quantizer::Pcm16 => match i {
                0 => -OUTER_EDGE,
                PCM_LEVELS => OUTER_EDGE,
                i if i < PCM_LEVELS => (i as f32 - 0.5 - PCM_UNIT) / PCM_UNIT,
                i => panic!("edge {i} of {PCM_LEVELS} bins"),
            },
        }
    }

    /// The token of a sample of 0.
    pub fn silence(&self) -> Token {
        (self.levels() / 2) as Token
    }

    /// The bin of mu-law that the token's sample lies in, `0..N_CODES`: what a model keeps a vector for, however fine its tokens.
    pub fn code(&self, token: Token) -> Token {
        match self.quantizer {
            Quantizer::Mulaw8 => token,
            Quantizer::Pcm16 => PCM16.codes[usize::from(token)].into(),
        }
    }

    /// [`compand`](Self::compand) of the token's sample, looked up.
    pub fn companded(&self, token: Token) -> f32 {
        match self.quantizer {
            Quantizer::Mulaw8 => (f32::from(token) + 0.5) / (N_CODES / 2) as f32 - 1.0,
            Quantizer::Pcm16 => PCM16.companded[usize::from(token)],
        }
    }

    /// The token of the token's sample moved by `codes` of the bins of [`code`](Self::code), which need not be whole.
    pub fn moved(&self, token: Token, codes: f32) -> Token {
        match self.quantizer {
            Quantizer::Mulaw8 => (f32::from(token) + codes).round().clamp(0.0, (N_CODES - 1) as f32) as Token,
            Quantizer::Pcm16 => {
                let companded = self.companded(token) + codes / (N_CODES / 2) as f32;
                self.encode(expand(companded.clamp(-1.0, 1.0).into()) as f32)
            }
        }
    }

    /// The curve: [-1, 1] to [-1, 1], `sign(x) ln(1 + 255 |x|) / ln 256`.
    pub fn compand(&self, sample: f32) -> f32 {
        let companded = (MU as f32 * sample.abs()).ln_1p() / LN_256 as f32;
        companded.copysign(sample)
    }

    /// Width of a bin at `sample`: the quantiser's step there, in units of a sample.
    pub fn bin_width(&self, sample: f32) -> f32 {
        match self.quantizer {
            Quantizer::Mulaw8 => (sample.abs() + (1.0 / MU) as f32) * (LN_256 / (N_CODES / 2) as f64) as f32,
            Quantizer::Pcm16 => 1.0 / PCM_UNIT,
        }
    }
}

fn mulaw_bin(sample: f32) -> Token {
    MULAW8.edges[1..N_CODES].partition_point(|&edge| edge <= sample) as Token
}

fn pcm_bin(sample: f32) -> Token {
    ((sample * PCM_UNIT + 0.5).floor().clamp(-PCM_UNIT, PCM_UNIT - 1.0) + PCM_UNIT) as Token
}

/// What the curve gives at every bin's middle and edges; looked up instead of computed.
struct Mulaw {
    centres: [f32; N_CODES],
    edges: [f32; N_CODES + 1],
}

/// What mu-law says of every sample of 16 bits.
struct Pcm {
    codes: Box<[u8]>,
    companded: Box<[f32]>,
}

static PCM16: LazyLock<Pcm> = LazyLock::new(|| {
    let codec = Codec { quantizer: Quantizer::Pcm16, ..Codec::default() };
    let samples = || (0..=Token::MAX).map(|token| codec.decode(token));
    Pcm {
        codes: samples().map(|sample| mulaw_bin(sample) as u8).collect(),
        companded: samples().map(|sample| codec.compand(sample)).collect(),
    }
});

static MULAW8: LazyLock<Mulaw> = LazyLock::new(|| {
    let half = (N_CODES / 2) as f64;
    let mut edges = std::array::from_fn(|i| expand(i as f64 / half - 1.0) as f32);
    edges[0] = -OUTER_EDGE;
    edges[N_CODES] = OUTER_EDGE;
    Mulaw { centres: std::array::from_fn(|i| expand((i as f64 + 0.5) / half - 1.0) as f32), edges }
});

/// The curve backwards: companded [-1, 1] to samples [-1, 1].
fn expand(companded: f64) -> f64 {
    (companded.abs() * LN_256).exp_m1() / MU * companded.signum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pcm() -> Codec {
        Codec { quantizer: Quantizer::Pcm16, ..Codec::default() }
    }

    /// The curve as the standard's formula, without a table.
    fn encode_by_formula(sample: f32) -> f64 {
        let x = f64::from(sample).clamp(-1.0, 1.0);
        ((x.signum() * (MU * x.abs()).ln_1p() / LN_256 + 1.0) * 128.0).floor().clamp(0.0, 255.0)
    }

    #[test]
    fn every_token_survives_a_round_trip() {
        for codec in [Codec::default(), pcm()] {
            for token in 0..codec.levels() {
                assert_eq!(codec.encode(codec.decode(token as Token)), token as Token);
            }
        }
    }

    #[test]
    fn sixteen_bits_are_those_of_a_wav_file() {
        let codec = pcm();
        for (sample, token) in [(0.0, 32_768), (-1.0, 0), (1.0, 65_535), (100.0 / 32_768.0, 32_868), (-0.5, 16_384)] {
            assert_eq!(codec.encode(sample), token, "{sample}");
        }
        assert_eq!(codec.decode(32_768 - 5), -5.0 / 32_768.0);
        assert_eq!((codec.edge(0), codec.edge(32_768), codec.edge(65_536)), (-50.0, -0.5 / 32_768.0, 50.0));
        assert_eq!((codec.encode(f32::NAN), codec.silence()), (32_768, 32_768));
    }

    #[test]
    fn a_code_is_the_bin_of_mulaw() {
        let (mulaw, pcm) = (Codec::default(), pcm());
        for token in 0..=Token::MAX {
            let sample = pcm.decode(token);
            assert_eq!(pcm.code(token), mulaw.encode(sample));
            assert_eq!(pcm.companded(token), mulaw.compand(sample));
        }
        for token in 0..N_CODES as Token {
            assert_eq!(mulaw.code(token), token);
            assert!((mulaw.companded(token) - mulaw.compand(mulaw.decode(token))).abs() < 1e-6, "{token}");
        }
    }

    #[test]
    fn tokens_move_by_codes() {
        let (mulaw, pcm) = (Codec::default(), pcm());
        assert_eq!([mulaw.moved(128, 2.4), mulaw.moved(1, -3.0), mulaw.moved(250, 9.0)], [130, 0, 255]);
        for sample in [-0.9f32, -0.02, 0.0, 1e-4, 0.3] {
            let moved = pcm.decode(pcm.moved(pcm.encode(sample), 3.0));
            assert!((pcm.compand(moved) - pcm.compand(sample) - 3.0 / 128.0).abs() < 0.003, "{sample} to {moved}");
        }
        assert_eq!((pcm.moved(0, -5.0), pcm.moved(65_000, 50.0)), (0, 65_535));
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
        fn a_sample_of_16_bits_lies_in_its_bin(sample in -1.5f32..1.5) {
            let codec = pcm();
            let token = codec.encode(sample);
            // Beyond 0.5 a sample in f32 and the edge between two bins are told apart to a 512th of a bin.
            let slack = 1e-7;
            prop_assert!(codec.edge(token.into()) - slack <= sample && sample < codec.edge(usize::from(token) + 1) + slack);
            prop_assert!((codec.decode(token) - sample.clamp(-1.0, 1.0)).abs() <= codec.bin_width(sample));
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
