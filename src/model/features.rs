//! What the sample tier is told about its two forecasts: pure functions of forecasts and planned scale.

use std::f32::consts::PI;

use super::config::{ModelConfig, N_FORECASTS};
use crate::codec::{Codec, N_CODES, Token};

/// Values of [`token_values`].
pub const N_TOKEN_VALUES: usize = 2;

/// Features per sample.
pub const N_FEATURES: usize = 5 * N_FORECASTS + 2;

/// Forecasts `[past, planned]` as sample values and the ln of the planned residual scale -> features for the sample
/// tier and the head's shortcut, and the code of the forecast from the past.
pub fn features(forecasts: [f32; N_FORECASTS], log_scale: f32, codec: &Codec) -> ([f32; N_FEATURES], Token) {
    let half = N_CODES as f32 / 2.0;
    let mut out = [0.0; N_FEATURES];
    let mut past_code = 0;
    let companded = forecasts.map(|forecast| codec.compand(forecast));
    for (i, (forecast, companded)) in forecasts.into_iter().zip(companded).enumerate() {
        let place = ((companded + 1.0) * half).clamp(0.0, N_CODES as f32 - 0.001);
        let code = place.floor();
        if i == 0 {
            past_code = code as Token;
        }
        let fraction = place - code;
        for (kind, value) in
            [fraction, (2.0 * PI * fraction).sin(), companded, 4.0 * forecast, (forecast.abs() + 1e-4).ln() / 4.0]
                .into_iter()
                .enumerate()
        {
            out[kind * N_FORECASTS + i] = value;
        }
    }
    out[5 * N_FORECASTS] = log_scale / 4.0 + 1.0;
    out[5 * N_FORECASTS + 1] = (companded[0] - companded[1]) * 32.0;
    (out, past_code)
}

/// Steps of 16 bits in a sample of 1.
const STEPS: f32 = 32_768.0;
/// ln(1 + the largest residual in steps).
const LN_MOST_STEPS: f32 = 11.090_37;

/// What is left of a token around its forecast `past`, in one of [`N_CODES`] codes: where `config.forecast.fine_residual`, the residual
/// itself companded, `sign(e) ln(1 + |e|)` in steps of 16 bits; else the distance of the token's code from the forecast's, `past_code`,
/// wrapped.
pub fn residual_code(token: Token, past: f32, past_code: Token, config: &ModelConfig) -> Token {
    let codec = &config.codec;
    if config.forecast.fine_residual {
        let steps = (codec.decode(token) - past) * STEPS;
        let companded = (steps.abs().ln_1p() / LN_MOST_STEPS).copysign(steps);
        let half = N_CODES as f32 / 2.0;
        return ((companded + 1.0) * half).min(N_CODES as f32 - 1.0) as Token;
    }
    ((usize::from(codec.code(token)) + N_CODES - usize::from(past_code)) % N_CODES) as Token
}

/// What the tiers see of a token besides its code's vector: the companded and twice the linear value.
pub fn token_values(token: Token, codec: &Codec) -> [f32; N_TOKEN_VALUES] {
    [codec.companded(token), 2.0 * codec.decode(token)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fine_residuals_tell_single_steps_apart_and_keep_their_sign() {
        let mut config = ModelConfig::preset("base").unwrap();
        let code = |config: &ModelConfig, sample: f32, past: f32| {
            let token = config.codec.encode(sample);
            let (_, past_code) = features([past, 0.0], -5.0, &config.codec);
            residual_code(token, past, past_code, config)
        };
        let steps = |n: f32| 0.25 + n / STEPS;
        let codes: Vec<Token> = [-3e4, -100.0, -2.0, -1.0, 0.0, 1.0, 2.0, 100.0, 2e4]
            .iter()
            .map(|&n| code(&config, steps(n), steps(0.0)))
            .collect();
        assert!(codes.is_sorted_by(|a, b| a < b), "{codes:?}");
        assert_eq!((codes[2], codes[6]), (115, 140));
        assert_eq!([code(&config, -1.0, 1.0), code(&config, 1.0, -1.0)], [0, 255]);
        config.forecast.fine_residual = false;
        assert_eq!([code(&config, steps(1.0), steps(0.0)), code(&config, 0.3, 0.31)], [0, 255]);
    }
}
