//! Invented instruments: what strings, bars, pipes, reeds, voices and synthesizers have in common, with sizes drawn anew for each.
use std::f32::consts::TAU;

use wavegen::rng::Rng;

use crate::{decibels, ratio};

/// Rate of their notes: above the models', since a note also serves keys below its own.
pub const RATE: u32 = 24_000;
/// Notes are this far apart, in semitones, from the lowest to the highest key of a piano ...
pub const KEYS: std::ops::RangeInclusive<u8> = 21..=108;
pub const KEY_STEP: usize = 4;
/// ... and played so loud, from the softest to the loudest.
pub const LAYERS: usize = 3;
/// Nothing is held longer, in seconds; the last second fades.
const LONGEST_S: f32 = 9.0;
/// Partials end below half of the models' rate and of this one's.
const HIGHEST_HZ: f32 = 10_000.0;

/// A partial of a note of 1 Hz.
struct Partial {
    ratio: f32,
    amplitude: f32,
    /// Seconds to fade by a neper in the middle of the keyboard.
    decay: f32,
}

/// Where a body, a tube or a mouth resounds.
struct Formant {
    hz: f32,
    width: f32,
    gain: f32,
}

enum Source {
    /// A delay line with losses (Karplus and Strong, 1983; Jaffe and Smith, 1983): plucked where, and seconds to fade.
    Plucked { place: f32, decay: f32, damping: f32 },
    /// Sums of sines: what is struck, blown, bowed or sung.
    Partials(Vec<Partial>),
    /// A sine that turns another's phase (Chowning, 1973): ratio and depth of the other, seconds to fade of both.
    Modulated { ratio: f32, depth: f32, decay: [f32; 2] },
}

pub struct Instrument {
    source: Source,
    attack: f32,
    /// How much softer notes are than loud ones, dB, and how much duller, dB an octave above 500 Hz.
    softer_db: f32,
    duller_db: f32,
    /// Share of the frequency, turns a second, seconds until it begins.
    vibrato: [f32; 3],
    tremolo: f32,
    /// How many play, and how far apart they are tuned (share of the frequency).
    players: usize,
    spread: f32,
    /// Amplitude of breath or bow beside the tone.
    noise: f32,
    formants: Vec<Formant>,
    seed: u64,
}

impl Instrument {
    pub fn draw(rng: &mut Rng) -> Self {
        let mut drawn = Self {
            source: Source::Modulated { ratio: 1.0, depth: 1.0, decay: [1.0; 2] },
            attack: ratio(rng, 0.001, 0.006),
            softer_db: 12.0 + 18.0 * rng.uniform(),
            duller_db: 4.0 * rng.uniform(),
            vibrato: [0.0, ratio(rng, 4.0, 7.0), 0.4 * rng.uniform()],
            tremolo: 0.0,
            players: 1,
            spread: 0.0,
            noise: 0.0,
            formants: Vec::new(),
            seed: rng.next_u64(),
        };
        match rng.below(8) {
            // Guitars, harps, a bass, a harpsichord: half of them in a wooden body.
            0..=2 => {
                let (place, decay) = (0.06 + 0.4 * rng.uniform(), ratio(rng, 0.6, 5.0));
                drawn.source = Source::Plucked { place, decay, damping: ratio(rng, 0.05, 0.6) };
                drawn.attack = 0.0;
                if rng.below(2) == 0 {
                    drawn.formants = (0..2 + rng.below(3)).map(|_| Formant::draw(90.0, 1200.0, rng)).collect();
                }
            }
            // Bars, bells and plates.
            3 => {
                let bar: &[f32] = match rng.below(3) {
                    0 => &[1.0, 4.0, 10.0],
                    1 => &[1.0, 2.756, 5.404, 8.933],
                    _ => &[0.5, 1.0, 1.2, 1.5, 2.0, 2.7, 3.8, 5.1],
                };
                let (decay, fall) = (ratio(rng, 0.1, 3.0), 0.3 + rng.uniform());
                let partial = |r: &f32, rng: &mut Rng| Partial {
                    ratio: *r,
                    amplitude: (0.3 + rng.uniform()) / r.powf(fall),
                    decay: decay / r.powf(0.7),
                };
                drawn.source = Source::Partials(bar.iter().map(|r| partial(r, rng)).collect());
            }
            // Electric pianos and other keys.
            4 => {
                let decay = [ratio(rng, 0.8, 6.0), ratio(rng, 0.1, 2.0)];
                let of = [1.0, 1.0, 2.0, 3.0, 7.0, 14.0][rng.below(6)];
                drawn.source = Source::Modulated { ratio: of, depth: ratio(rng, 0.2, 4.0), decay };
                drawn.tremolo = if rng.below(3) == 0 { 0.3 * rng.uniform() } else { 0.0 };
            }
            // Organs.
            5 => {
                let drawbars = [0.5, 1.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0];
                let pipe = |r: f32, rng: &mut Rng| Partial {
                    ratio: r,
                    amplitude: rng.below(9) as f32 / 8.0 / r.sqrt(),
                    decay: 1e3,
                };
                let mut pipes: Vec<_> = drawbars.into_iter().map(|r| pipe(r, rng)).collect();
                pipes[2].amplitude += 0.5;
                drawn.source = Source::Partials(pipes);
                (drawn.attack, drawn.softer_db) = (ratio(rng, 0.005, 0.08), 6.0);
                drawn.tremolo = if rng.below(2) == 0 { 0.2 * rng.uniform() } else { 0.0 };
                drawn.noise = ratio(rng, 0.001, 0.02);
            }
            // Bowed, blown and sung: everything that is held alive.
            6 => {
                let (fall, odd) = (0.6 + 1.4 * rng.uniform(), if rng.below(3) == 0 { 0.1 } else { 1.0 });
                let amplitude = |k: usize| if k.is_multiple_of(2) { odd } else { 1.0 } / (k as f32).powf(fall);
                let partial = |k: usize| Partial { ratio: k as f32, amplitude: amplitude(k), decay: 1e3 };
                drawn.source = Source::Partials((1..=32).map(partial).collect());
                (drawn.attack, drawn.softer_db) = (ratio(rng, 0.02, 0.25), 10.0 + 8.0 * rng.uniform());
                drawn.vibrato[0] = ratio(rng, 0.002, 0.012);
                drawn.noise = ratio(rng, 0.003, 0.1);
                drawn.formants = (0..rng.below(4)).map(|_| Formant::draw(300.0, 3500.0, rng)).collect();
                drawn.players = [1, 1, 1, 3, 4][rng.below(5)];
                drawn.spread = ratio(rng, 0.001, 0.006);
            }
            // Synthesizers.
            _ => {
                let (fall, decay) = (0.7 + rng.uniform(), ratio(rng, 0.2, 20.0));
                let closes = rng.uniform();
                let partial = |k: usize| Partial {
                    ratio: k as f32,
                    amplitude: 1.0 / (k as f32).powf(fall),
                    decay: decay / (k as f32).powf(closes),
                };
                drawn.source = Source::Partials((1..=32).map(partial).collect());
                drawn.attack = ratio(rng, 0.002, 0.3);
                drawn.players = 1 + rng.below(3);
                drawn.spread = ratio(rng, 0.0005, 0.008);
            }
        }
        drawn
    }

    /// A note of a key of the piano in a layer, until it has faded or for [`LONGEST_S`].
    pub fn note(&self, key: u8, layer: usize) -> Vec<f32> {
        let rng = &mut Rng::new(self.seed ^ (u64::from(key) << 8 | layer as u64));
        let hz = 440.0 * ((f32::from(key) - 69.0) / 12.0).exp2();
        let softness = 1.0 - layer as f32 / (LAYERS - 1) as f32;
        let mut out = vec![0.0; (LONGEST_S * RATE as f32) as usize];
        for _ in 0..self.players {
            let tuned = hz * (1.0 + self.spread * (2.0 * rng.uniform() - 1.0));
            match &self.source {
                Source::Plucked { place, decay, damping } => pluck(tuned, [*place, *decay, *damping], &mut out, rng),
                Source::Partials(partials) => self.sum(partials, tuned, &mut out, rng),
                Source::Modulated { ratio, depth, decay } => {
                    self.modulate(tuned, *ratio, depth * (1.0 - 0.7 * softness), *decay, &mut out);
                }
            }
        }
        if self.noise > 0.0 {
            let mut low = 0.0;
            let colour = (6.0 * hz / RATE as f32).min(0.9);
            for sample in &mut out {
                low += colour * (rng.normal() - low);
                *sample += self.noise * low;
            }
        }
        for formant in &self.formants {
            formant.resound(&mut out);
        }
        self.soften(softness, &mut out);
        let highest = out.iter().fold(1e-9f32, |most, x| most.max(x.abs()));
        let loudness = 10f32.powf(-self.softer_db * softness / 20.0) * 0.5 / highest;
        let (len, rate) = (out.len() as f32, RATE as f32);
        for (i, sample) in out.iter_mut().enumerate() {
            let t = i as f32 / rate;
            let swell = if self.attack > 0.0 { (t / self.attack).min(1.0) } else { 1.0 };
            let shake = 1.0 + self.tremolo * (TAU * self.vibrato[1] * t).sin();
            *sample *= loudness * swell * shake * ((len - i as f32) / rate).min(1.0);
        }
        out
    }

    /// Turns of a tone after `t` seconds, its vibrato in them.
    fn turns(&self, hz: f32, t: f32) -> f64 {
        let [depth, rate, after] = self.vibrato;
        let swing = if t > after { depth / (TAU * rate) * (1.0 - (TAU * rate * (t - after)).cos()) } else { 0.0 };
        f64::from(hz) * f64::from(t + swing)
    }

    fn sum(&self, partials: &[Partial], hz: f32, out: &mut [f32], rng: &mut Rng) {
        let shorter = (200.0 / hz).sqrt().clamp(0.2, 2.0);
        let turns: Vec<f64> = (0..out.len()).map(|i| self.turns(hz, i as f32 / RATE as f32)).collect();
        for partial in partials.iter().filter(|p| p.ratio * hz < HIGHEST_HZ) {
            let phase = f64::from(rng.uniform());
            let fades = (-1.0 / (partial.decay * shorter * RATE as f32)).exp();
            let mut amplitude = partial.amplitude;
            for (sample, turns) in out.iter_mut().zip(&turns) {
                if amplitude < 1e-5 {
                    break;
                }
                let angle = (turns * f64::from(partial.ratio) + phase).fract() as f32;
                *sample += amplitude * (TAU * angle).sin();
                amplitude *= fades;
            }
        }
    }

    fn modulate(&self, hz: f32, ratio: f32, depth: f32, decay: [f32; 2], out: &mut [f32]) {
        // Sidebands stay below the highest frequency (Carson's rule).
        let depth = depth.min((HIGHEST_HZ - hz).max(0.0) / (ratio * hz) - 1.0).max(0.0);
        for (i, sample) in out.iter_mut().enumerate() {
            let t = i as f32 / RATE as f32;
            let turns = self.turns(hz, t);
            let other = depth * (-t / decay[1]).exp() * (TAU * (turns * f64::from(ratio)).fract() as f32).sin();
            *sample += (-t / decay[0]).exp() * (TAU * turns.fract() as f32 + other).sin();
        }
    }

    /// Soft notes are duller: one pole, lower the softer.
    fn soften(&self, softness: f32, out: &mut [f32]) {
        let pole = (softness * self.duller_db * 0.2).min(0.85);
        let mut low = 0.0;
        for sample in out {
            low = pole * low + (1.0 - pole) * *sample;
            *sample = low;
        }
    }
}

impl Formant {
    fn draw(lowest: f32, highest: f32, rng: &mut Rng) -> Self {
        Self { hz: ratio(rng, lowest, highest), width: 0.05 + 0.25 * rng.uniform(), gain: decibels(rng, 0.0, 16.0) }
    }

    /// Adds what a resonance of two poles makes of the sound.
    fn resound(&self, samples: &mut [f32]) {
        let (centre, radius) = (TAU * self.hz / RATE as f32, (-TAU * self.hz * self.width / 2.0 / RATE as f32).exp());
        let (a1, a2, scale) = (2.0 * radius * centre.cos(), -radius * radius, (1.0 - radius * radius) / 2.0);
        let (mut x2, mut x1, mut y1, mut y2) = (0.0, 0.0, 0.0, 0.0);
        for sample in samples {
            let x = *sample;
            let y = scale * (x - x2) + a1 * y1 + a2 * y2;
            (x2, x1, y2, y1) = (x1, x, y1, y);
            *sample += (self.gain - 1.0) * y;
        }
    }
}

/// A string plucked at a share of its length, seconds in which it fades, and how much faster its treble does.
fn pluck(hz: f32, [place, decay, damping]: [f32; 3], out: &mut [f32], rng: &mut Rng) {
    let period = RATE as f32 / hz;
    // The filter in the loop delays by `damping` / 2 and less at higher frequencies; the rest is interpolated.
    let whole = (period - damping / 2.0).max(2.0);
    let (n, share) = (whole as usize, whole.fract());
    let from_bridge = ((n as f32 * place) as usize).max(1);
    let noise: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
    let mut string: Vec<f32> = (0..n).map(|i| noise[i] - noise[(i + n - from_bridge) % n]).collect();
    string.push(string[0]);
    let kept = (-period / (decay * (200.0 / hz).sqrt().clamp(0.15, 2.0) * RATE as f32)).exp();
    let (mut at, mut before) = (0, 0.0);
    for sample in out {
        let next = (at + 1) % (n + 1);
        // The line holds n + 1 samples: the oldest, which comes back now, and the one after it.
        let delayed = share * string[at] + (1.0 - share) * string[next];
        let filtered = kept * ((1.0 - damping / 2.0) * delayed + damping / 2.0 * before);
        before = delayed;
        *sample += string[at];
        string[at] = filtered;
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Power of `samples` at a frequency.
    fn power_at(samples: &[f32], hz: f32) -> f32 {
        let turn = |i: usize| TAU * (f64::from(hz) * i as f64 / f64::from(RATE)).fract() as f32;
        let sum = |f: fn(f32) -> f32| samples.iter().enumerate().map(|(i, x)| x * f(turn(i))).sum::<f32>();
        (sum(f32::cos).powi(2) + sum(f32::sin).powi(2)) / samples.len() as f32
    }

    #[test]
    fn strings_are_in_tune() {
        for (hz, damping) in [(82.4, 0.5), (440.0, 0.1), (1046.5, 0.3)] {
            let mut out = vec![0.0; RATE as usize];
            pluck(hz, [0.2, 4.0, damping], &mut out, &mut Rng::new(3));
            let cents = |c: f32| power_at(&out[2000..], hz * (c / 1200.0).exp2());
            let best = (-40..=40).map(|c| c as f32).max_by(|a, b| cents(*a).total_cmp(&cents(*b))).unwrap();
            assert!(best.abs() <= 8.0, "{hz} Hz is off by {best} cents");
        }
    }

    #[test]
    fn all_notes_sound_and_louder_ones_louder() {
        for seed in 0..24 {
            let instrument = Instrument::draw(&mut Rng::new(seed));
            for key in [21, 60, 108] {
                let power = [0, LAYERS - 1].map(|layer| {
                    let note = instrument.note(key, layer);
                    assert!(note.iter().all(|x| x.is_finite() && x.abs() <= 1.0), "instrument {seed}, key {key}");
                    note.iter().map(|x| x * x).sum::<f32>()
                });
                assert!(power[1] > 1.5 * power[0] && power[0] > 1e-6, "instrument {seed}, key {key}: {power:?}");
            }
            assert_eq!(instrument.note(60, 1), Instrument::draw(&mut Rng::new(seed)).note(60, 1));
        }
    }
}
