//! Renders pieces of invented sounds (test tones, synthesizers, plucked strings, drums): a model that has heard nothing but a piano takes
//! the rest of the world for a bad one. A share of a few percent of its training data is enough.
//!
//! ```text
//! cargo run --release --example render_synth -- synth/ --files 120 --seed 1
//! ```
//! Every file is a minute at 16 kHz, mono, 16 bits, and a pure function of the seed and its number. With `--instruments 24`, `--drums 6` it writes as
//! many folders of single notes and of single hits instead, which `render_piano --samples` plays music on.
mod instrument;

use std::f32::consts::TAU;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Parser;
use rayon::prelude::*;
use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::rng::Rng;
use wavegen::sink::{Sink, WavFileSink};

use instrument::{Instrument, KEY_STEP, KEYS, LAYERS};

const RATE: f32 = 16_000.0;
const LEN: usize = 60 * 16_000;

/// Renders pieces of invented sounds, or notes of invented instruments, to mono 16-bit WAV files
#[derive(Parser)]
struct Options {
    /// Folder for the WAV files
    output: PathBuf,
    #[arg(long, default_value_t = 120)]
    files: u64,
    /// Invent so many instruments, a folder of notes each, instead of pieces
    #[arg(long, conflicts_with = "files")]
    instruments: Option<u64>,
    /// Everything drawn depends on this number and the file's
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Invent so many sets of drums, a folder of hits each, instead of pieces
    #[arg(long, conflicts_with = "files")]
    drums: Option<u64>,
    /// Overwrite WAV files that are there
    #[arg(long)]
    force: bool,
}

/// Between `low` and `high`, every ratio equally likely.
fn ratio(rng: &mut Rng, low: f32, high: f32) -> f32 {
    low * (high / low).powf(rng.uniform())
}

fn decibels(rng: &mut Rng, low: f32, high: f32) -> f32 {
    10f32.powf((low + (high - low) * rng.uniform()) / 20.0)
}

/// How the notes of a voice sound.
struct Timbre {
    /// Amplitudes of the harmonics.
    harmonics: Vec<f32>,
    /// Seconds: until a note is there, in which it fades by a neper.
    attack: f32,
    decay: f32,
    /// Share of the frequency, at 5 Hz.
    vibrato: f32,
    /// Amplitude of breath beside the tone.
    noise: f32,
}

impl Timbre {
    fn draw(rng: &mut Rng) -> Self {
        let n = 1 + rng.below(30);
        let fall = 0.3 + 2.0 * rng.uniform();
        let odd_only = rng.below(4) == 0;
        let amplitude = |k: usize, rng: &mut Rng| match (odd_only && k.is_multiple_of(2), 0.3 + rng.uniform()) {
            (true, _) => 0.0,
            (false, by_chance) => by_chance / (k as f32).powf(fall),
        };
        Self {
            harmonics: (1..=n).map(|k| amplitude(k, rng)).collect(),
            attack: ratio(rng, 0.001, 0.1),
            decay: ratio(rng, 0.03, 5.0),
            vibrato: if rng.below(3) == 0 { ratio(rng, 0.001, 0.02) } else { 0.0 },
            noise: if rng.below(4) == 0 { ratio(rng, 0.003, 0.3) } else { 0.0 },
        }
    }

    fn play(&self, hz: f32, loudness: f32, seconds: f32, out: &mut [f32], rng: &mut Rng) {
        let phases: Vec<f32> = self.harmonics.iter().map(|_| rng.uniform()).collect();
        let (mut turns, held) = (0.0f32, (seconds * RATE) as usize);
        for (i, sample) in out.iter_mut().enumerate().take(held + 800) {
            let t = i as f32 / RATE;
            turns += hz / RATE * (1.0 + self.vibrato * (TAU * 5.0 * t).sin());
            turns = turns.fract() + (turns.floor() % 840.0);
            let release = 1.0 - (i.saturating_sub(held) as f32 / 800.0);
            let envelope = loudness * (t / self.attack).min(1.0) * (-t / self.decay).exp() * release;
            let audible = self.harmonics.iter().zip(&phases).zip(1..).take_while(|(_, k)| *k as f32 * hz < 7500.0);
            let tone: f32 = audible.map(|((a, phase), k)| a * (TAU * (turns * k as f32 + phase).fract()).sin()).sum();
            *sample += envelope * (tone + self.noise * rng.normal());
        }
    }
}

/// Pure tones that begin and end at once, between digital silence.
fn test_tones(rng: &mut Rng) -> Vec<f32> {
    let mut out = vec![0.0; LEN];
    let mut at = 0;
    while at < LEN {
        at += (ratio(rng, 0.02, 2.0) * RATE) as usize;
        let len = (ratio(rng, 0.05, 4.0) * RATE) as usize;
        for _ in 0..1 + rng.below(3) {
            let (hz, loudness, phase) = (ratio(rng, 40.0, 6000.0), decibels(rng, -40.0, -6.0), rng.uniform());
            for (i, sample) in out.iter_mut().skip(at).take(len).enumerate() {
                *sample += loudness * (TAU * (hz / RATE * i as f32 + phase).fract()).sin();
            }
        }
        at += len;
    }
    out
}

/// Noise through one pole that fades, or a tone that falls: a hit of a drum.
fn hit(loudness: f32, colour: f32, decay: f32, falls_from: f32, out: &mut [f32], rng: &mut Rng) {
    let (mut low, mut turns) = (0.0, 0.0);
    for (i, sample) in out.iter_mut().enumerate().take((6.0 * decay * RATE) as usize) {
        let t = i as f32 / RATE;
        low += colour * (rng.normal() - low);
        turns += (40.0 + falls_from * (-t / 0.03).exp()) / RATE;
        let tone = if falls_from > 0.0 { 2.0 * (TAU * turns).sin() } else { 0.0 };
        *sample += loudness * (-t / decay).exp() * (low + tone);
    }
}

/// Keys of a set's bass drum, snare drum, two cymbals and two drums that are anything.
const DRUM_KEYS: [u8; 6] = [BASS_DRUM, SNARE_DRUM, SHORT_CYMBAL, LONG_CYMBAL, 48, 50];
const BASS_DRUM: u8 = 36;
const SNARE_DRUM: u8 = 38;
const SHORT_CYMBAL: u8 = 42;
const LONG_CYMBAL: u8 = 46;

/// The drum of a key in the set that `seed` and `number` give, hit as hard as `layer` says.
fn drum(seed: u64, number: u64, key: u8, layer: usize) -> Vec<f32> {
    let rng = &mut draws(seed ^ 0xd7a5, 128 * number + u64::from(key));
    let (colour, decay, falls_from) = match key {
        BASS_DRUM => (ratio(rng, 0.02, 0.1), ratio(rng, 0.08, 0.3), ratio(rng, 60.0, 400.0)),
        SNARE_DRUM => (
            ratio(rng, 0.2, 1.0),
            ratio(rng, 0.04, 0.2),
            if rng.below(2) == 0 { ratio(rng, 100.0, 400.0) } else { 0.0 },
        ),
        SHORT_CYMBAL => (1.0, ratio(rng, 0.01, 0.05), 0.0),
        LONG_CYMBAL => (1.0, ratio(rng, 0.08, 0.4), 0.0),
        _ => (
            ratio(rng, 0.03, 1.0),
            ratio(rng, 0.02, 0.3),
            if rng.below(2) == 0 { ratio(rng, 50.0, 500.0) } else { 0.0 },
        ),
    };
    let mut out = vec![0.0; (6.0 * decay * RATE) as usize];
    hit(0.1 * 2f32.powi(layer as i32), colour, decay, falls_from, &mut out, rng);
    if matches!(key, SHORT_CYMBAL | LONG_CYMBAL) {
        // What cymbals do not have: lows.
        let mut before = 0.0;
        out.iter_mut().for_each(|x| *x = 0.5 * (*x - std::mem::replace(&mut before, *x)));
    }
    out
}

/// Voices of invented instruments, and drums, in a metre.
fn music(rng: &mut Rng) -> Vec<f32> {
    let mut out = vec![0.0; LEN];
    let beat = (ratio(rng, 0.1, 0.6) * RATE) as usize;
    for _ in 0..1 + rng.below(4) {
        let timbre = Timbre::draw(rng);
        let (lowest, density) = (28 + rng.below(48), 0.1 + 0.8 * rng.uniform());
        for at in (0..LEN).step_by(beat) {
            if rng.uniform() < density {
                let pitch = lowest + [0, 2, 3, 5, 7, 8, 10, 12, 14, 15][rng.below(10)];
                let hz = 440.0 * ((pitch as f32 - 69.0) / 12.0).exp2();
                let (loudness, held) = (decibels(rng, -20.0, 0.0), ratio(rng, 0.5, 4.0) * beat as f32 / RATE);
                timbre.play(hz, loudness, held, &mut out[at..], rng);
            }
        }
    }
    for _ in 0..rng.below(4) {
        let (colour, decay) = (ratio(rng, 0.03, 1.0), ratio(rng, 0.01, 0.2));
        let falls_from = if rng.below(3) == 0 { 200.0 * rng.uniform() } else { 0.0 };
        let density = 0.1 + 0.6 * rng.uniform();
        for at in (0..LEN).step_by(beat / 2) {
            if rng.uniform() < density {
                hit(decibels(rng, -15.0, 6.0), colour, decay, falls_from, &mut out[at..], rng);
            }
        }
    }
    out
}

/// Everything drawn for one file, or one instrument, follows from this.
fn draws(seed: u64, number: u64) -> Rng {
    Rng::new(seed.wrapping_mul(1_000_003).wrapping_add(number))
}

fn piece(seed: u64, number: u64) -> Vec<f32> {
    let mut rng = draws(seed, number);
    let rng = &mut rng;
    if rng.below(5) == 0 {
        return test_tones(rng);
    }
    let mut out = music(rng);
    let normalise = |out: &mut [f32], peak: f32| {
        let highest = out.iter().fold(1e-9f32, |most, x| most.max(x.abs()));
        out.iter_mut().for_each(|x| *x *= peak / highest);
    };
    if rng.below(3) == 0 {
        let drive = ratio(rng, 1.0, 20.0);
        normalise(&mut out, drive);
        out.iter_mut().for_each(|x| *x = x.tanh());
    }
    let peak = decibels(rng, -14.0, -1.0);
    normalise(&mut out, peak);
    if rng.below(2) == 0 {
        let floor = decibels(rng, -85.0, -45.0);
        out.iter_mut().for_each(|x| *x += floor * rng.normal());
    }
    out
}

fn write(path: &Path, rate: u32, samples: &[f32], force: bool) -> Result<()> {
    let mut sink = WavFileSink::new(path, force)?;
    sink.start(&WavFormat::new(rate, 1, SampleFormat::I16))?;
    sink.write(samples)?;
    sink.finish()?;
    Ok(())
}

/// Writes notes of keys in all layers, named as `render_piano` looks for them.
fn write_notes(
    folder: &Path,
    keys: impl Iterator<Item = u8>,
    rate: u32,
    note: impl Fn(u8, usize) -> Vec<f32>,
    force: bool,
) -> Result<()> {
    const NAMES: [&str; 12] = ["C", "Cs", "D", "Ds", "E", "F", "Fs", "G", "Gs", "A", "As", "B"];
    std::fs::create_dir_all(folder)?;
    for key in keys {
        for layer in 0..LAYERS {
            let (name, octave) = (NAMES[usize::from(key % 12)], key / 12 - 1);
            let path = folder.join(format!("{name}{octave}v{}.wav", layer + 1));
            write(&path, rate, &note(key, layer), force)?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let Options { output, files, instruments, seed, drums, force } = Options::parse();
    std::fs::create_dir_all(&output)?;
    let path = |what: &str, number: u64| output.join(format!("{what}-{seed}-{number:04}"));
    if instruments.is_none() && drums.is_none() {
        return (0..files).into_par_iter().try_for_each(|number| {
            write(&path("synth", number).with_extension("wav"), RATE as u32, &piece(seed, number), force)
        });
    }
    (0..instruments.unwrap_or(0)).into_par_iter().try_for_each(|number| {
        let instrument = Instrument::draw(&mut draws(seed, number));
        let note = |key, layer| instrument.note(key, layer);
        write_notes(&path("synth", number), KEYS.step_by(KEY_STEP), instrument::RATE, note, force)
    })?;
    (0..drums.unwrap_or(0)).into_par_iter().try_for_each(|number| {
        let note = |key, layer| drum(seed, number, key, layer);
        write_notes(&path("drums", number), DRUM_KEYS.into_iter(), RATE as u32, note, force)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drums_are_louder_when_hit_harder_and_differ_between_sets() {
        for key in DRUM_KEYS {
            let peak = |layer| drum(1, 2, key, layer).iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let peaks = [0, 1, 2].map(peak);
            assert!(peaks[0] > 0.01 && peaks[2] < 2.0 && peaks.is_sorted(), "{key}: {peaks:?}");
            assert!(drum(1, 2, key, 0) != drum(1, 3, key, 0) && drum(1, 2, key, 0) != drum(2, 2, key, 0), "{key}");
        }
    }

    #[test]
    fn pieces_follow_from_seed_and_number_and_can_be_heard() {
        for number in 0..4 {
            let samples = piece(1, number);
            assert_eq!(samples.len(), LEN);
            let peak = samples.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(
                samples.iter().all(|x| x.is_finite()) && (0.01..2.0).contains(&peak),
                "piece {number}: peak {peak}"
            );
            assert!(samples == piece(1, number), "piece {number}");
            assert!(samples != piece(1, number + 1) && samples != piece(2, number), "piece {number}");
        }
    }
}
