//! Turns a distribution, uniform numbers and settings into a token; pure functions, shared by all engines.

use serde::{Deserialize, Serialize};

use crate::codec::{Codec, Token};
use crate::forecast::MOST_SAMPLE;
use crate::model::config::N_FORECASTS;
use crate::simd::portable::{exp, tanh};

/// How plan tokens are drawn. `1.0` temperature, `0` top-k, `1.0` top-p and `0.0` min-p change nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanSampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens that hold this probability (Holtzman et al., 2020).
    pub top_p: f32,
    /// Drops tokens less likely than this share of the likeliest one (Nguyen et al., 2024).
    pub min_p: f32,
}

impl Default for PlanSampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

/// How samples are drawn: the generation settings of the checkpoint, or the user's.
pub type WaveSampling = crate::model::config::GenerationSettings;

/// How a drawn plan frame stood in the model's own distribution, before temperature and filters, in nats; sums over its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanDraw {
    /// -ln P of what was drawn.
    pub surprisal: f32,
    /// What that is on average.
    pub entropy: f32,
}

impl PlanDraw {
    /// Adds the token `drawn` from `logits`.
    pub fn add(&mut self, logits: &[f32], drawn: usize) {
        let finite = || logits.iter().map(|&l| f64::from(l)).filter(|l| l.is_finite());
        let most = finite().fold(f64::NEG_INFINITY, f64::max);
        let (total, weighted) = finite().fold((0.0, 0.0), |(total, weighted), l| {
            let weight = (l - most).exp();
            (total + weight, weighted + weight * (l - most))
        });
        let Some(&drawn) = logits.get(drawn).filter(|l| l.is_finite()) else { return };
        self.surprisal += (total.ln() - (f64::from(drawn) - most)) as f32;
        self.entropy += (total.ln() - weighted / total) as f32;
    }
}

/// Draws from logits; holds only room for it, so that a draw allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct LogitSampler {
    order: Vec<u64>,
    weights: Vec<f64>,
}

/// A logit's place in the order of a draw, as one number: the likelier the less, ties by index; what is not a number comes last.
fn place(index: usize, logit: f32) -> u64 {
    let bits = if logit.is_nan() { f32::NEG_INFINITY } else { logit }.to_bits();
    // Negative numbers fall where their bits rise.
    let rising = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!rising) << 32 | index as u64
}

/// Which logit a place is that of.
fn index(place: u64) -> usize {
    place as u32 as usize
}

impl LogitSampler {
    /// Draws an index from `logits` by inverse CDF over the kept tokens, in order of falling probability.
    ///
    /// `uniform` lies in (0, 1). Ties keep the lower index first, so that the result is the same everywhere. A logit
    /// that is not a number counts as impossible.
    pub fn sample(&mut self, logits: &[f32], uniform: f32, settings: &PlanSampling) -> usize {
        let value = |i: usize| if logits[i].is_nan() { f32::NEG_INFINITY } else { logits[i] };
        let Self { order, weights } = self;
        order.clear();
        order.extend(logits.iter().enumerate().map(|(i, &logit)| place(i, logit)));
        order.sort_unstable();
        let Some(&best) = order.first() else { return 0 };
        if settings.temperature <= 0.0 {
            return index(best);
        }
        let top = f64::from(value(index(best)));
        let temperature = f64::from(settings.temperature);
        weights.clear();
        weights.extend(order.iter().map(|&place| ((f64::from(value(index(place))) - top) / temperature).exp()));
        let total: f64 = weights.iter().sum();
        let limit = if settings.top_k == 0 { order.len() } else { settings.top_k.min(order.len()) };
        let (mut kept, mut mass) = (0, 0.0);
        while kept < limit
            && (kept == 0 || (mass < f64::from(settings.top_p) * total && weights[kept] >= f64::from(settings.min_p)))
        {
            mass += weights[kept];
            kept += 1;
        }
        let target = f64::from(uniform) * mass;
        let mut cumulative = 0.0;
        for (&place, weight) in order.iter().zip(&*weights).take(kept) {
            cumulative += weight;
            if target < cumulative {
                return index(place);
            }
        }
        index(order[kept - 1])
    }
}

/// Place of the logistic's uniform that is never passed: +-9.2 scales from the mean.
const TAIL: f64 = 1e-4;

/// A mixture of logistics over sample values, cut into tokens by the codec's bins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mixture {
    /// Normalised weights, `[n_components]`: first those around the forecast from the past, then the plan's.
    weights: Vec<f32>,
    /// Their logarithms.
    pub log_weights: Vec<f32>,
    /// Means as sample values, `[n_components]`.
    pub means: Vec<f32>,
    /// Scales, `[n_components]`.
    pub scales: Vec<f32>,
    /// The forecast that each half of the components stands around.
    pub forecasts: [f32; N_FORECASTS],
}

/// Half the planned residual scale plus a quarter of the quantiser's step: the unit of a component's offset and scale.
pub fn unit_scale(forecast: f32, log_scale: f32, codec: &Codec) -> f32 {
    0.5 * exp(log_scale) + 0.25 * codec.bin_width(forecast)
}

/// Means move by at most this many units.
pub const MAX_OFFSET: f32 = 4.0;
/// Scales lie within e^+-this of the unit.
pub const MAX_LOG_SCALE: f32 = 2.5;

impl Mixture {
    /// From the head's output: `head` = [weights | offsets | log scales], each `[n_components]`.
    pub fn from_head(head: &[f32], forecasts: [f32; N_FORECASTS], log_scale: f32, codec: &Codec) -> Self {
        let mut mixture = Self::default();
        mixture.set(head, forecasts, log_scale, codec);
        mixture
    }

    /// Becomes what [`from_head`](Self::from_head) gives, in place.
    pub fn set(&mut self, head: &[f32], forecasts: [f32; N_FORECASTS], log_scale: f32, codec: &Codec) {
        let n = head.len() / 3;
        let per_forecast = n / N_FORECASTS;
        let (logits, rest) = head.split_at(n);
        let (offsets, log_scales) = rest.split_at(n);
        let units = forecasts.map(|forecast| unit_scale(forecast, log_scale, codec));
        let Self { weights, log_weights, means, scales, .. } = self;
        self.forecasts = forecasts;
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.clear();
        weights.extend(logits.iter().map(|w| exp(w - top)));
        let total: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
        let log_total = top + total.ln();
        log_weights.clear();
        log_weights.extend(logits.iter().map(|w| w - log_total));
        means.clear();
        means.extend(offsets.iter().enumerate().map(|(k, offset)| {
            let of = k / per_forecast;
            forecasts[of] + units[of] * MAX_OFFSET * tanh(offset / MAX_OFFSET)
        }));
        scales.clear();
        scales.extend(
            log_scales
                .iter()
                .enumerate()
                .map(|(k, log_scale)| units[k / per_forecast] * exp(MAX_LOG_SCALE * tanh(log_scale / MAX_LOG_SCALE))),
        );
    }

    /// ln P(token): the mixture's mass in the token's bin.
    pub fn log_prob(&self, token: Token, codec: &Codec) -> f64 {
        let (low, high) = (f64::from(codec.edge(token.into())), f64::from(codec.edge(usize::from(token) + 1)));
        let terms: Vec<f64> = (0..self.means.len())
            .map(|k| {
                let (mean, scale) = (f64::from(self.means[k]), f64::from(self.scales[k]));
                let (a, b) = ((low - mean) / scale, (high - mean) / scale);
                f64::from(self.log_weights[k]) + log_sigmoid(b) + log_sigmoid(-a) + (-(a - b).min(-1e-12).exp_m1()).ln()
            })
            .collect();
        let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        top + terms.iter().map(|t| (t - top).exp()).sum::<f64>().ln()
    }

    /// Draws a value, not rounded to a token: `uniforms` choose the component and the place in its logistic, both in
    /// (0, 1). The settings' grain is [`Drive`]'s to apply.
    pub fn draw(&self, uniforms: [f32; 2], settings: &WaveSampling) -> f32 {
        let n = self.means.len();
        let per_forecast = n / N_FORECASTS;
        let weight = |k: usize| {
            let factor = if k < per_forecast { settings.past } else { 1.0 };
            f64::from(self.weights[k]) * f64::from(factor)
        };
        let target = f64::from(uniforms[0]) * (0..n).map(weight).sum::<f64>();
        let mut chosen = n - 1;
        let mut cumulative = 0.0;
        for k in 0..n {
            cumulative += weight(k);
            if target < cumulative {
                chosen = k;
                break;
            }
        }
        let forecast = f64::from(self.forecasts[chosen / per_forecast]);
        let mean = forecast + f64::from(settings.offset) * (f64::from(self.means[chosen]) - forecast);
        let u = f64::from(uniforms[1]).clamp(TAIL, 1.0 - TAIL);
        (mean + f64::from(self.scales[chosen]) * (u / (1.0 - u)).ln()) as f32
    }
}

/// Samples over which a [`Drive`] measures: 16 ms at 16 kHz.
const DRIVE_SAMPLES: f32 = 256.0;
/// A single draw counts as at most this, so that no draw can be beyond repair.
const MOST_SQUARE: f32 = 1e4;
/// A [`Drive`] makes what is drawn louder by at most this.
const MOST_DRIVE: f32 = 1.5;
/// And softer by at most this.
const LEAST_DRIVE: f32 = 0.05;

/// Holds the power of what is drawn around the forecast from the plan to the power that the plan implies.
///
/// Samples follow `forecast + innovation`. A model may weigh its widest component for as long as it likes, and a forecast that
/// resonates turns that into bursts; with the innovations' mean square held to the planned one, the output has the planned
/// level whatever the model does. The measured power is that of the draws as they came, so nothing feeds back.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drive {
    /// Mean of (innovation / planned)^2 over the last samples.
    pub(crate) mean_square: f32,
}

impl Default for Drive {
    fn default() -> Self {
        Self { mean_square: 1.0 }
    }
}

impl Drive {
    /// The sample to play, [`MOST_SAMPLE`] at most, where `drawn` came from the mixture and the plan expected `expected`
    /// ([`PlannedForecast::expected`](crate::forecast::PlannedForecast)): `planned_rms` is the innovation's root mean square
    /// by plan, `grain` a factor on it.
    pub fn hold(&mut self, drawn: f32, expected: f32, planned_rms: f32, grain: f32) -> f32 {
        // The mixture stands around what a sample may be.
        let innovation = drawn - expected.clamp(-1.0, 1.0);
        let ratio = innovation / planned_rms;
        self.mean_square += ((ratio * ratio).min(MOST_SQUARE) - self.mean_square) / DRIVE_SAMPLES;
        let factor = (1.0 / self.mean_square.sqrt()).clamp(LEAST_DRIVE, MOST_DRIVE);
        (expected + innovation * factor * grain).clamp(-MOST_SAMPLE, MOST_SAMPLE)
    }
}

fn log_sigmoid(x: f64) -> f64 {
    if x >= 0.0 { -(-x).exp().ln_1p() } else { x - x.exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mixture(head: &[f32]) -> Mixture {
        Mixture::from_head(head, [0.1, -0.05], -4.0, &Codec::default())
    }

    proptest! {
        // The outermost edges lie at +-50: infinite for any scale that sound can have.
        #[test]
        fn probabilities_of_all_tokens_sum_to_one(
            head in prop::collection::vec(-6.0f32..6.0, 18), p in -1.0f32..1.0, q in -1.0f32..1.0, s in -9.0f32..-2.0,
        ) {
            let codec = Codec::default();
            let m = Mixture::from_head(&head, [p, q], s, &codec);
            let total: f64 = (0..codec.levels() as Token).map(|t| m.log_prob(t, &codec).exp()).sum();
            prop_assert!((total - 1.0).abs() < 1e-6, "{total}");
        }

        #[test]
        fn draws_follow_the_distribution(head in prop::collection::vec(-2.0f32..2.0, 18)) {
            let codec = Codec::default();
            let m = mixture(&head);
            let all = WaveSampling { grain: 1.0, past: 1.0, offset: 1.0, level_db: 0.0 };
            let mut counts = vec![0.0; codec.levels()];
            let n = 150;
            for i in 0..n {
                for j in 0..n {
                    let u = [(i as f32 + 0.5) / n as f32, (j as f32 + 0.5) / n as f32];
                    counts[usize::from(codec.encode(m.draw(u, &all)))] += 1.0 / f64::from(n * n);
                }
            }
            let (mut drawn, mut expected, mut distance) = (0.0, 0.0, 0.0f64);
            for (t, count) in counts.iter().enumerate() {
                drawn += count;
                expected += m.log_prob(t as Token, &codec).exp();
                distance = distance.max(f64::abs(drawn - expected));
            }
            prop_assert!(distance < 0.02, "the cumulative distributions differ by {distance}");
        }

        #[test]
        fn places_are_those_of_a_stable_sort(
            logits in prop::collection::vec(
                prop_oneof![4 => -9.0f32..9.0, 1 => prop::sample::select(vec![0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN])],
                0..60,
            ),
        ) {
            let mut order: Vec<u64> = logits.iter().enumerate().map(|(i, &logit)| place(i, logit)).collect();
            order.sort_unstable();
            let value = |i: usize| if logits[i].is_nan() { f32::NEG_INFINITY } else { logits[i] };
            let mut expected: Vec<usize> = (0..logits.len()).collect();
            expected.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
            prop_assert_eq!(order.into_iter().map(index).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits = [0.0, 3.0, 2.0, f32::NAN, 1.0];
        let plain = PlanSampling { top_p: 1.0, ..PlanSampling::default() };
        let reachable = |s: &PlanSampling| {
            let mut seen: Vec<usize> =
                (0..1000).map(|i| LogitSampler::default().sample(&logits, (i as f32 + 0.5) / 1000.0, s)).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(reachable(&plain), [0, 1, 2, 4]);
        assert_eq!(reachable(&PlanSampling { top_k: 2, ..plain }), [1, 2]);
        assert_eq!(reachable(&PlanSampling { top_p: 0.6, ..plain }), [1]);
        assert_eq!(reachable(&PlanSampling { min_p: 0.3, ..plain }), [1, 2]);
        assert_eq!(reachable(&PlanSampling { temperature: 0.0, ..plain }), [1]);
    }

    #[test]
    fn the_entropy_is_the_mean_surprisal() {
        let logits = [0.3, -1.0, 2.0, f32::NAN, 0.0];
        let total: f32 = logits.iter().filter(|l| l.is_finite()).map(|l| l.exp()).sum();
        let mut mean = 0.0;
        let mut entropy = 0.0;
        for (i, l) in logits.iter().enumerate().filter(|(_, l)| l.is_finite()) {
            let mut draw = PlanDraw::default();
            draw.add(&logits, i);
            mean += l.exp() / total * draw.surprisal;
            entropy = draw.entropy;
        }
        assert!((mean - entropy).abs() < 1e-5, "{mean} and {entropy}");
        let mut certain = PlanDraw::default();
        certain.add(&[0.0, 90.0], 1);
        assert!(certain.surprisal.abs() < 1e-6 && certain.entropy.abs() < 1e-6, "{certain:?}");
    }

    #[test]
    fn past_zero_never_follows_the_forecast_from_the_past() {
        let mut head = [0.0f32; 18];
        head[..3].fill(5.0);
        let m = mixture(&head);
        let settings = WaveSampling { grain: 1.0, past: 0.0, offset: 1.0, level_db: 0.0 };
        for i in 0..100 {
            assert_eq!(m.draw([(i as f32 + 0.5) / 100.0, 0.5], &settings), -0.05);
        }
    }

    #[test]
    fn what_is_played_has_the_planned_power_whatever_is_drawn() {
        let mut rng = crate::rng::Rng::new(2);
        for loudness in [0.7, 1.0, 3.0, 15.0] {
            let mut drive = Drive::default();
            let mut power = 0.0;
            for i in 0..20_000 {
                let forecast = 0.3 * (i as f32 * 0.1).sin();
                let innovation = drive.hold(forecast + loudness * 0.01 * rng.normal(), forecast, 0.01, 0.5) - forecast;
                if i >= 1000 {
                    power += f64::from(innovation * innovation) / 19_000.0;
                }
            }
            assert!(
                (power.sqrt() / 0.005 - 1.0).abs() < 0.03,
                "draws of {loudness} times the plan's: {}",
                power.sqrt()
            );
        }
        let held = Drive::default().hold(f32::MAX, 0.5, 1e-4, 1.0);
        assert!((-MOST_SAMPLE..=MOST_SAMPLE).contains(&held), "{held}");
        // Beyond full scale, too, it is what is new that is held.
        let drawn = Drive::default().hold(0.99, 1.5, 0.01, 1.0);
        assert!((drawn - 1.49).abs() < 1e-3, "{drawn}");
    }
}
