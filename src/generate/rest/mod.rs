//! Turns what a model makes into what a recording has besides: treble above the model's band, and what its channels do not share.
//!
//! A model plays one channel of samples at its own rate. What else a recording has is learned from the recording itself ([`Fit`], by [`Bank`]'s bands) and made of
//! what the model plays: signals that go their own ways ([`Decorrelator`]) and the top of its band, moved up, as audio codecs send stereo and treble in a few
//! numbers (parametric stereo, Breebaart et al., 2005; spectral band replication, Dietz et al., 2002); only that here nothing is sent.

mod bank;
mod decorrelator;
mod fit;

use std::f32::consts::{SQRT_2, TAU};

use realfft::num_complex::Complex;
use serde::{Deserialize, Serialize};

use crate::rng::{Kind, uniform};
use bank::{Bank, Lines, power};
use decorrelator::Decorrelator;
pub use fit::Fit;

/// Makes the rest of a recording's continuation, frame by frame of the recording's rate.
pub struct Rest {
    bank: Bank,
    state: RestState,
}

/// A [`Rest`] as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestState {
    fit: Option<Fit>,
    decorrelators: Vec<Decorrelator>,
    /// Of each basis, the samples that the next spectrum has in common with the last, and those since.
    heard: Vec<Vec<f32>>,
    /// Of each channel, the second half of the last spectrum's frame.
    overlap: Vec<Vec<f32>>,
    n_spectra: u64,
}

impl Rest {
    /// For a model's samples, brought from `model_rate` to `sample_rate` Hz, by what was learned; `None`: there is no rest.
    pub fn new(fit: Option<Fit>, sample_rate: u32, model_rate: u32) -> Self {
        let bank = Bank::new(sample_rate, model_rate);
        let channels = fit.as_ref().map_or(0, |fit| fit.channels);
        let state = RestState {
            decorrelators: fit::decorrelators(channels, sample_rate),
            heard: vec![Vec::new(); channels + 1],
            overlap: vec![vec![0.0; bank.hop()]; channels],
            n_spectra: 0,
            fit,
        };
        Self { bank, state }
    }

    /// What [`Self::from_state`] goes on from, bit for bit.
    pub fn state(&self) -> RestState {
        self.state.clone()
    }

    /// What a state was taken of; `None` if it does not hold together, or belongs to other channels or rates.
    pub fn from_state(state: RestState, channels: usize, sample_rate: u32, model_rate: u32) -> Option<Self> {
        if state.fit.as_ref().is_some_and(|fit| !fit.fits(channels, &Bank::new(sample_rate, model_rate))) {
            return None;
        }
        let fresh = Self::new(state.fit.clone(), sample_rate, model_rate);
        let Self { bank, state: expected } = &fresh;
        let like = state.decorrelators.len() == expected.decorrelators.len()
            && state.decorrelators.iter().zip(&expected.decorrelators).all(|(a, b)| a.is_like(b))
            && state.heard.len() == expected.heard.len()
            && state.heard.iter().all(|heard| heard.len() < bank.n() && heard.len() == state.heard[0].len())
            && state.overlap.len() == expected.overlap.len()
            && state.overlap.iter().all(|overlap| overlap.len() == bank.hop());
        like.then_some(Self { state, ..fresh })
    }

    /// Takes samples of the model at the recording's rate, and appends the rest that goes with them to `out`, `[n, channels]`, interleaved: that of a
    /// sample comes 16 ms of samples later, if it is not zero, and is the same whatever follows.
    pub fn push(&mut self, samples: &[f32], channels: usize, out: &mut Vec<f32>) {
        if self.state.fit.is_none() {
            out.resize(out.len() + samples.len() * channels, 0.0);
            return;
        }
        for &x in samples {
            let RestState { decorrelators, heard, .. } = &mut self.state;
            heard.iter_mut().zip(fit::bases(decorrelators, x)).for_each(|(heard, x)| heard.push(x));
            if self.state.heard[0].len() == self.bank.n() {
                self.make(out);
            }
        }
    }

    /// The next half of a frame.
    fn make(&mut self, out: &mut Vec<f32>) {
        let Self { bank, state } = self;
        let RestState { fit: Some(fit), heard, overlap, n_spectra, .. } = state else { return };
        let mut bases: Vec<Lines> = heard.iter().map(|samples| bank.analyse(samples)).collect();
        let deviations = fit.deviations(&bank.features(&bases[0]));
        bases.iter_mut().for_each(|lines| bank.replicate(lines));
        let mut made: Vec<Lines> = vec![vec![Complex::default(); bank.hop() + 1]; fit.channels];
        for (band, (lines, filled)) in fit.bands.iter().zip(bank.bands()) {
            let powers: Vec<f64> = bases.iter().map(|basis| power(&basis[lines.clone()])).collect();
            // What the model fills has its own level already: beside it goes what goes its own way.
            let used = if filled { 1..fit.channels + 1 } else { 0..fit.channels };
            if band.noise > 0.0 {
                for j in used.clone() {
                    let rms = (powers[j] / lines.len() as f64).sqrt() as f32;
                    add_noise(
                        &mut bases[j][lines.clone()],
                        band.noise,
                        rms,
                        j as u32,
                        *n_spectra * (bank.hop() as u64 + 1) + lines.start as u64,
                    );
                }
            }
            let (along, gain) = band.gains(&deviations, powers[0], &powers[used.clone()]);
            for ((made, factor), row) in made.iter_mut().zip(&band.along).zip(band.mix.chunks_exact(fit.channels)) {
                for k in lines.clone() {
                    let mixed: Complex<f32> =
                        row.iter().zip(&bases[used.clone()]).map(|(a, basis)| basis[k] * *a).sum();
                    made[k] = bases[0][k] * (along * factor) + mixed * gain;
                }
            }
        }
        let first = out.len();
        out.resize(first + bank.hop() * fit.channels, 0.0);
        for (c, (lines, overlap)) in made.into_iter().zip(overlap).enumerate() {
            let frame = bank.synthesise(lines);
            let (now, later) = frame.split_at(bank.hop());
            let sums = overlap.iter().zip(now).map(|(a, b)| a + b);
            out[first + c..].iter_mut().step_by(fit.channels).zip(sums).for_each(|(out, sum)| *out = sum);
            overlap.copy_from_slice(later);
        }
        heard.iter_mut().for_each(|samples| drop(samples.drain(..bank.hop())));
        *n_spectra += 1;
    }
}

/// Gives a share of the power of `lines` to lines of even power, `rms` squared, and any phase; numbers of these phases begin at `t`.
fn add_noise(lines: &mut [Complex<f32>], share: f32, rms: f32, stream: u32, t: u64) {
    // Spectra that know nothing of each other lose half of their power where their frames overlap.
    let (kept, noise) = ((1.0 - share).sqrt(), rms * share.sqrt() * SQRT_2);
    for (line, t) in lines.iter_mut().zip(t..) {
        *line = *line * kept + Complex::from_polar(noise, TAU * uniform(0, stream, Kind::Treble, t));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::{Clip, resample};
    use crate::metrics::{correlation, level_db};
    use crate::rng::Rng;

    const RATE: u32 = 44_100;
    /// Frames that are loud, and then as many that are soft.
    const TURN: usize = 22_050;

    /// What a model hears of a signal, and the rest of it.
    fn parts(samples: &[f32]) -> [Vec<f32>; 2] {
        let heard = resample(&resample(samples, RATE, 16_000).unwrap(), 16_000, RATE).unwrap();
        let treble = samples.iter().zip(&heard).map(|(x, y)| x - y).collect();
        [heard, treble]
    }

    /// Noise by turns loud and soft, what is soft with less width and less treble; correlation of the channels' treble 0.6.
    fn recording(n: usize) -> Clip {
        let mut rng = Rng::new(8);
        let mut noise = || parts(&(0..n).map(|_| 0.1 * rng.normal()).collect::<Vec<f32>>());
        let [[middle, treble], [side, other]] = [noise(), noise()];
        let frame = |i: usize| {
            let [m, s, t] = if (i / TURN).is_multiple_of(2) { [1.0, 0.5, 0.3] } else { [0.1, 0.02, 0.01] };
            let (middle, side) = (m * middle[i], s * side[i]);
            [middle + side + t * treble[i], middle - side + t * (0.6 * treble[i] + 0.8 * other[i])]
        };
        Clip { samples: (0..n).flat_map(frame).collect(), channels: 2, sample_rate: RATE }
    }

    #[test]
    fn what_is_made_has_the_recordings_levels_and_widths_as_loud_and_as_soft_as_it_is() {
        let (n, learned) = (20 * TURN, 12 * TURN);
        let clip = recording(n);
        let [heard, _] = parts(&clip.downmix());
        let begin = Clip { samples: clip.samples[..2 * learned].to_vec(), ..clip };
        let fit = Fit::new(&begin, &heard, &[1.0, 1.0], 16_000).unwrap();
        let mut rest = Rest::new(Some(fit), RATE, 16_000);
        let mut made = Vec::new();
        rest.push(&heard, 2, &mut made);
        let channels =
            |interleaved: &[f32]| [0, 1].map(|c| interleaved.iter().skip(c).step_by(2).copied().collect::<Vec<f32>>());
        let truth: Vec<f32> =
            clip.samples.chunks_exact(2).zip(&heard).flat_map(|(x, y)| [x[0] - y, x[1] - y]).collect();
        let [truth, made] = [truth, made].map(|all| channels(&all).map(|channel| parts(&channel)));
        for turn in learned / TURN..n / TURN - 1 {
            // What the turn before left in the decorrelators has rung off.
            let range = turn * TURN + 5000..(turn + 1) * TURN - 1000;
            for (part, what) in ["side", "treble"].into_iter().enumerate() {
                for c in 0..2 {
                    let [expected, got] = [&truth, &made].map(|channels| level_db(&channels[c][part][range.clone()]));
                    assert!((got - expected).abs() < 1.5, "{what}, turn {turn}, channel {c}: {got} for {expected} dB");
                }
                let width = |channels: &[[Vec<f32>; 2]; 2]| {
                    correlation(&channels[0][part][range.clone()], &channels[1][part][range.clone()])
                };
                assert!(
                    (width(&made) - width(&truth)).abs() < 0.15,
                    "{what}, turn {turn}: {} for {}",
                    width(&made),
                    width(&truth)
                );
            }
            // What goes its own way has nothing of what the model plays.
            let own = correlation(&made[0][0][range.clone()], &heard[range]);
            assert!(own.abs() < 0.15, "turn {turn}: {own}");
        }
    }

    #[test]
    fn noisy_treble_over_clean_tones_is_noise() {
        // Tones 441 Hz apart come again every 100 samples, and so they would moved up.
        let n = 6 * TURN;
        let mut rng = Rng::new(3);
        let [_, noise] = parts(&(0..n).map(|_| 0.02 * rng.normal()).collect::<Vec<f32>>());
        let tone = |i: usize, k: i32| 0.02 * (TAU * (441 * k) as f32 * (i % 100) as f32 / RATE as f32).sin();
        let heard: Vec<f32> = (0..n).map(|i| (6..16).map(|k| tone(i, k)).sum()).collect();
        let samples = heard.iter().zip(&noise).map(|(x, y)| x + y).collect();
        let fit = Fit::new(&Clip { samples, channels: 1, sample_rate: RATE }, &heard, &[1.0], 16_000);
        let mut rest = Rest::new(fit, RATE, 16_000);
        let mut made = Vec::new();
        rest.push(&heard, 1, &mut made);
        let [_, treble] = parts(&made);
        let treble = &treble[TURN..];
        let again =
            |x: &[f32]| (90..111).map(|lag| correlation(&x[lag..], &x[..x.len() - lag]).abs()).fold(0.0, f32::max);
        assert!(again(&heard) > 0.99 && again(treble) < 0.3, "{}", again(treble));
        assert!((level_db(treble) - level_db(&noise)).abs() < 1.5, "{} for {}", level_db(treble), level_db(&noise));
    }

    #[test]
    fn channels_of_nothing_stay_silent() {
        let Clip { samples, .. } = recording(4 * TURN);
        let samples = samples.chunks_exact(2).flat_map(|frame| [frame[0], frame[1], 0.0]).collect();
        let clip = Clip { samples, channels: 3, sample_rate: RATE };
        let [heard, _] = parts(&clip.downmix());
        let mut rest = Rest::new(Fit::new(&clip, &heard, &[1.5, 1.5, 0.0], 16_000), RATE, 16_000);
        let mut made = Vec::new();
        rest.push(&heard, 3, &mut made);
        let level = |c: usize| level_db(&made.iter().skip(c).step_by(3).copied().collect::<Vec<f32>>());
        assert!(level(0) > -40.0 && level(1) > -40.0 && level(2) < -100.0, "{} {} {}", level(0), level(1), level(2));
    }

    #[test]
    fn a_bent_state_is_refused() {
        let clip = recording(2 * TURN);
        let [heard, _] = parts(&clip.downmix());
        let mut rest = Rest::new(Fit::new(&clip, &heard, &[1.0, 1.0], 16_000), RATE, 16_000);
        rest.push(&heard[..1000], 2, &mut Vec::new());
        let state = rest.state();
        for (channels, sample_rate, holds) in [(2, RATE, true), (3, RATE, false), (2, 48_000, false)] {
            assert_eq!(Rest::from_state(state.clone(), channels, sample_rate, 16_000).is_some(), holds);
        }
        let bends: [fn(&mut RestState); 6] = [
            |state| state.decorrelators.truncate(1),
            |state| state.heard[1].truncate(1),
            |state| state.heard.truncate(0),
            |state| state.heard.iter_mut().for_each(|heard| heard.resize(704, 0.0)),
            |state| state.overlap[0].truncate(1),
            |state| drop(state.fit.take()),
        ];
        for bend in bends {
            let mut bent = state.clone();
            bend(&mut bent);
            assert!(Rest::from_state(bent, 2, RATE, 16_000).is_none());
        }
    }

    #[test]
    fn a_louder_model_than_was_ever_heard_is_held() {
        // All that the recording has above 5 kHz is in its sides.
        let n = 4 * TURN;
        let mut clip = recording(n);
        let tone = |i: usize| 0.1 * (0.1 * i as f32).sin();
        for (i, frame) in clip.samples.chunks_exact_mut(2).enumerate() {
            let side = 0.01 * (TAU * 6000.0 * i as f32 / RATE as f32).sin();
            frame.copy_from_slice(&[tone(i) + side, tone(i) - side]);
        }
        let heard: Vec<f32> = (0..n).map(tone).collect();
        let mut rest = Rest::new(Fit::new(&clip, &heard, &[1.0, 1.0], 16_000), RATE, 16_000);
        let mut rng = Rng::new(1);
        let noise: Vec<f32> = (0..n).map(|_| 0.1 * rng.normal()).collect();
        let mut made = Vec::new();
        rest.push(&noise, 2, &mut made);
        assert!(level_db(&made) < level_db(&[0.01 * 0.7]) + 10.0, "{} dB", level_db(&made));
    }

    #[test]
    fn silence_and_moments_have_nothing_to_learn_from() {
        let clip = recording(TURN);
        let [heard, _] = parts(&clip.downmix());
        assert!(Fit::new(&clip, &heard[..2000], &[1.0, 1.0], 16_000).is_none());
        assert!(Fit::new(&clip, &vec![0.0; TURN], &[1.0, 1.0], 16_000).is_none());
        let fit = Fit::new(&clip, &heard, &[1.0, 1.0], 16_000);
        let mut rest = Rest::new(fit, RATE, 16_000);
        let mut made = Vec::new();
        rest.push(&[0.0; 5000], 2, &mut made);
        assert!(made.len() > 2 * 4000 && made.iter().all(|x| x.abs() < 1e-5), "{made:?}");
        let mut none = Vec::new();
        Rest::new(None, RATE, 16_000).push(&heard[..100], 2, &mut none);
        assert_eq!(none, [0.0; 200]);
    }
}
