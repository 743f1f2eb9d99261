//! What the sample tier is told about its two forecasts: pure functions of forecasts and planned scale.

use std::f32::consts::PI;

use super::config::N_FORECASTS;
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

/// The residual of a token's code around the code of its forecast, wrapped.
pub fn residual_code(token: Token, past_code: Token, codec: &Codec) -> Token {
    ((usize::from(codec.code(token)) + N_CODES - usize::from(past_code)) % N_CODES) as Token
}

/// What the tiers see of a token besides its code's vector: the companded and twice the linear value.
pub fn token_values(token: Token, codec: &Codec) -> [f32; N_TOKEN_VALUES] {
    [codec.companded(token), 2.0 * codec.decode(token)]
}
