//! Turns tokens and a plan into what predictors without training achieve: the figures that a model has to beat.

use ndarray::ArrayView2;

use crate::codec::{Codec, Token};
use crate::forecast::{ForecastConfig, ForecastError, Forecasts, MOST_SAMPLE, PlannedForecast};
use crate::metrics::entropy_bits;
use crate::plan::Spectrum;
use crate::rng::{Kind, uniform};
use crate::sampler::unit_scale;

/// Scales of the fixed mixture, as powers of e^(1/2) of the unit: 0.14 to 7.4 times.
const SCALE_STEPS: std::ops::RangeInclusive<i32> = -4..=4;
/// Samples that the mixture's weights are fitted to.
const FIT_SAMPLES: usize = 20_000;
/// Rounds of expectation maximisation; the likelihood is concave in the weights.
const FIT_ROUNDS: usize = 200;

/// Bits per token of a memoryless code fitted to these very tokens.
pub fn token_entropy(tokens: &[Token], codec: &Codec) -> f64 {
    entropy_bits(&histogram(tokens.iter().map(|&token| usize::from(token)), codec.levels()))
}

/// Bits per token of a memoryless code, fitted to these very tokens, for their distance (modulo the number of levels)
/// from the token of the forecast from the past.
pub fn residual_entropy(tokens: &[Token], forecasts: &Forecasts, codec: &Codec) -> f64 {
    let levels = codec.levels();
    let codes = tokens
        .iter()
        .zip(&forecasts.past)
        .map(|(&token, &forecast)| (usize::from(token) + levels - usize::from(codec.encode(forecast))) % levels);
    entropy_bits(&histogram(codes, levels))
}

fn histogram(values: impl Iterator<Item = usize>, levels: usize) -> Vec<u64> {
    let mut counts = vec![0; levels];
    values.for_each(|value| counts[value] += 1);
    counts
}

/// Bits per token under the best fixed mixture: logistics around both forecasts with scales fixed relative to the planned
/// unit, their weights fitted to these very tokens. The plan that it stands on is not paid for here.
pub fn mixture_bits(tokens: &[Token], forecasts: &Forecasts, codec: &Codec) -> f64 {
    let stride = tokens.len().div_ceil(FIT_SAMPLES).max(1);
    let fitted: Vec<Vec<f64>> =
        (0..tokens.len()).step_by(stride).map(|t| masses(t, tokens, forecasts, codec)).collect();
    let weights = fit_weights(&fitted);
    let bits: f64 = (0..tokens.len())
        .map(|t| {
            let likelihood: f64 = masses(t, tokens, forecasts, codec).iter().zip(&weights).map(|(m, w)| m * w).sum();
            -likelihood.max(f64::MIN_POSITIVE).log2()
        })
        .sum();
    bits / tokens.len().max(1) as f64
}

/// Each component's mass in the bin of token `t`.
fn masses(t: usize, tokens: &[Token], forecasts: &Forecasts, codec: &Codec) -> Vec<f64> {
    let (low, high) = (f64::from(codec.edge(tokens[t].into())), f64::from(codec.edge(usize::from(tokens[t]) + 1)));
    [forecasts.past[t], forecasts.planned[t]]
        .into_iter()
        .flat_map(|forecast| {
            let unit = f64::from(unit_scale(forecast, forecasts.log_scale[t], codec));
            SCALE_STEPS.map(move |step| {
                let scale = unit * (0.5 * f64::from(step)).exp();
                let (a, b) = ((low - f64::from(forecast)) / scale, (high - f64::from(forecast)) / scale);
                // Written so that neither tail cancels.
                let (near, far) = if a > 0.0 { (-a, -b) } else { (b, a) };
                sigmoid(near) - sigmoid(far)
            })
        })
        .collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Weights of the mixture that makes `likelihoods`, `[n_samples][n_components]`, most likely.
fn fit_weights(likelihoods: &[Vec<f64>]) -> Vec<f64> {
    let n = likelihoods.first().map_or(0, Vec::len);
    let mut weights = vec![1.0 / n.max(1) as f64; n];
    for _ in 0..FIT_ROUNDS {
        let mut next = vec![1e-9; n];
        for row in likelihoods {
            let total: f64 = row.iter().zip(&weights).map(|(l, w)| l * w).sum();
            if total > 0.0 {
                next.iter_mut().zip(row).zip(&weights).for_each(|((sum, l), w)| *sum += l * w / total);
            }
        }
        let sum: f64 = next.iter().sum();
        weights = next.into_iter().map(|w| w / sum).collect();
    }
    weights
}

/// White Gaussian noise around the forecast from each plan frame, after the samples `context`: what a plan
/// sounds like without any model. `plan` is `[n_frames, n_bands]`; gives `n_frames * hop` samples.
///
/// # Errors
/// When `plan` is no plan of `spectrum`.
pub fn noise_through_plan(
    context: &[f32],
    plan: ArrayView2<f32>,
    spectrum: &Spectrum,
    config: &ForecastConfig,
    seed: u64,
    stream: u32,
) -> Result<Vec<f32>, ForecastError> {
    let mut forecast = PlannedForecast::new(config)?;
    let context = &context[context.len() % spectrum.hop()..];
    let heard = spectrum.analyse(context);
    forecast.hear(spectrum, context, heard.view())?;
    let mut samples = Vec::with_capacity(plan.nrows() * spectrum.hop());
    let mut before =
        heard.rows().into_iter().next_back().map_or_else(|| spectrum.silent_frame(), |frame| frame.to_vec());
    for bands in plan.outer_iter() {
        let bands = bands.to_vec();
        forecast.begin_frame(spectrum, &before, &bands)?;
        before = bands;
        for _ in 0..spectrum.hop() {
            let noise = forecast.residual_rms() * normal(seed, stream, samples.len() as u64);
            let sample = (forecast.expected() + noise).clamp(-MOST_SAMPLE, MOST_SAMPLE);
            forecast.push(sample);
            samples.push(sample.clamp(-1.0, 1.0));
        }
    }
    Ok(samples)
}

/// Standard normal number `t` of a stream (Box-Muller).
fn normal(seed: u64, stream: u32, t: u64) -> f32 {
    let (a, b) = (uniform(seed, stream, Kind::Noise, 2 * t), uniform(seed, stream, Kind::Noise, 2 * t + 1));
    (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::forecasts;
    use crate::metrics::{Track, adherence, level_db};
    use crate::model::config::ModelConfig;
    use crate::plan::PlanConfig;
    use ndarray::{Axis, concatenate, s};

    fn music() -> Vec<f32> {
        let sample = |i: usize| {
            let t = i as f32 / 16_000.0;
            let fade = (-(t % 0.5) * 4.0).exp();
            fade * 0.2 * ((std::f32::consts::TAU * 330.0 * t).sin() + 0.5 * (std::f32::consts::TAU * 991.0 * t).sin())
        };
        (0..24_576).map(sample).collect()
    }

    fn spectrum() -> Spectrum {
        Spectrum::new(16_000, &PlanConfig::default()).unwrap()
    }

    #[test]
    fn forecasts_beat_memoryless_codes_on_music() {
        let (codec, spectrum, config) = (Codec::default(), spectrum(), ForecastConfig::default());
        let tokens = codec.encode_all(&music());
        let heard = codec.decode_all(&tokens);
        let plan = spectrum.analyse(&heard);
        let forecasts = forecasts(&heard, plan.view(), &spectrum, &config).unwrap();
        let plain = token_entropy(&tokens, &codec);
        let residual = residual_entropy(&tokens, &forecasts, &codec);
        let mixture = mixture_bits(&tokens, &forecasts, &codec);
        assert!(mixture < residual && residual < plain, "{plain} {residual} {mixture}");
    }

    #[test]
    fn components_masses_of_all_tokens_sum_to_one() {
        let codec = Codec::default();
        let tokens: Vec<Token> = (0..codec.levels() as Token).collect();
        let forecasts = Forecasts { past: vec![0.3; 256], planned: vec![-0.01; 256], log_scale: vec![-5.0; 256] };
        let all: Vec<Vec<f64>> = (0..tokens.len()).map(|t| masses(t, &tokens, &forecasts, &codec)).collect();
        for k in 0..all[0].len() {
            let total: f64 = all.iter().map(|row| row[k]).sum();
            assert!((total - 1.0).abs() < 1e-9, "component {k}: {total}");
        }
    }

    #[test]
    fn weights_find_the_component_that_is_right() {
        let weights = fit_weights(&vec![vec![0.1, 0.4, 0.2]; 10]);
        assert!(weights[1] > 0.99, "{weights:?}");
    }

    #[test]
    fn noise_through_a_plan_follows_it() {
        let spectrum = spectrum();
        let (context, after) = (&music()[..8192], &music()[8192..]);
        let planned = Track::analyse(context, after, &spectrum).unwrap();
        let made =
            noise_through_plan(context, planned.bands.view(), &spectrum, &ForecastConfig::default(), 1, 0).unwrap();
        assert_eq!(made.len(), after.len() / 512 * 512);
        let heard = Track::analyse(context, &made, &spectrum).unwrap();
        let result = adherence(heard.bands.view(), planned.bands.view());
        assert!(result.rms_db < 12.0 && result.bias_db.abs() < 6.0, "{result:?}");
    }

    /// A filter that heard clipped samples took them for new sound and kept itself at full scale.
    #[test]
    fn a_chord_beyond_full_scale_ends_where_the_plan_ends_it() {
        let (spectrum, config) = (spectrum(), ModelConfig::preset("base").unwrap().forecast);
        let hop = spectrum.hop();
        let chord = |t: usize, gain: f32| -> f32 {
            let partial = |k: usize| (std::f32::consts::TAU * 147.3 * k as f32 * t as f32 / 16_000.0).sin() / k as f32;
            gain * (1..20).map(partial).sum::<f32>()
        };
        let soft: Vec<f32> = (0..40 * hop).map(|t| chord(t, 0.02)).collect();
        let loud: Vec<f32> = (0..40 * hop).map(|t| chord(t, 0.8)).collect();
        let [soft, loud] = [soft, loud].map(|sound| (spectrum.analyse(&sound), sound));
        let plan = concatenate![Axis(0), loud.0.slice(s![..6, ..]), soft.0.slice(s![8..24, ..])];
        for seed in 0..8 {
            let made = noise_through_plan(&soft.1[..8 * hop], plan.view(), &spectrum, &config, seed, 0).unwrap();
            let levels: Vec<f32> = made.chunks(hop).map(level_db).collect();
            let loudest = levels.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(loudest < -2.0 && levels[7..].iter().all(|&level| level < -30.0), "{levels:.1?}");
        }
    }
}
