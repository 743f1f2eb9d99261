//! Makes examples/prompt.wav: the opening of Beethoven's "Für Elise" (WoO 59) on a synthetic piano, without any recording.
//!
//! `cargo run --release --example make_prompt [FILE.wav]`
//!
//! Each note is a sum of stretched partials (stiff strings: f_k = k f_0 sqrt(1 + B k^2)) of two slightly mistuned
//! strings. Partials decay twice, first fast and then slowly, high ones sooner; a short burst of dark noise is the
//! hammer. See Fletcher and Rossing, "The Physics of Musical Instruments", chapter 12.
use std::f64::consts::{PI, TAU};
use std::path::Path;

use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::sink::{Sink, WavFileSink};

const SAMPLE_RATE: f64 = 44_100.0;
const DURATION_S: f64 = 4.7;
/// Length of a sixteenth note.
const STEP_S: f64 = 0.205;
const PEAK: f64 = 0.6;

/// The melody: (sixteenth, MIDI note, loudness); the pedal changes at the sixteenths in `PEDAL`.
#[rustfmt::skip]
const NOTES: [(f64, i32, f64); 26] = [
    (0.0, 76, 0.6), (1.0, 75, 0.5), (2.0, 76, 0.6), (3.0, 75, 0.5), (4.0, 76, 0.65), (5.0, 71, 0.6), (6.0, 74, 0.6),
    (7.0, 72, 0.6), (8.0, 69, 0.7), (8.0, 45, 0.6), (9.0, 52, 0.4), (10.0, 57, 0.4), (11.0, 60, 0.5), (12.0, 64, 0.55),
    (13.0, 69, 0.6), (14.0, 71, 0.75), (14.0, 40, 0.6), (15.0, 52, 0.4), (16.0, 56, 0.4), (17.0, 64, 0.5),
    (18.0, 68, 0.55), (19.0, 71, 0.6), (20.0, 72, 0.75), (20.0, 45, 0.55), (21.0, 52, 0.4), (22.0, 57, 0.4),
];
const PEDAL: [f64; 5] = [4.0, 8.0, 14.0, 20.0, 26.0];

/// Adds one note, struck at `on_s` and damped at `off_s`, to `output`.
fn strike(output: &mut [f64], on_s: f64, off_s: f64, key: i32, loudness: f64) {
    let pitch = f64::from(key - 69);
    let f0 = 440.0 * 2f64.powf(pitch / 12.0);
    let stiffness = 3.5e-4 * 2f64.powf(pitch / 10.0);
    let sustain_s = 2.2 * 2f64.powf(-pitch / 18.0);
    let start = (on_s * SAMPLE_RATE) as usize;
    let damper = |t: f64| (-(t - (off_s - on_s)).max(0.0) / 0.09).exp();
    let partials = (1..).map(|k| (k, f64::from(k) * f0 * (1.0 + stiffness * f64::from(k * k)).sqrt()));
    for (k, hz) in partials.take_while(|(_, hz)| *hz < 9000.0) {
        // A hammer at an eighth of the string leaves out every eighth partial; a harder blow sounds brighter.
        let position = 0.1 + (PI * f64::from(k) / 8.0).sin().abs();
        let level = (f0 / 440.0).powf(0.7) * loudness * position * (-hz / (200.0 + 400.0 * loudness)).exp()
            / f64::from(k).sqrt();
        let slow_s = sustain_s / (1.0 + hz / 2500.0);
        for (string, cents) in [-0.4, 0.5].into_iter().enumerate() {
            let omega = TAU * hz * 2f64.powf(cents / 1200.0);
            for (i, sample) in output[start..].iter_mut().enumerate() {
                let t = i as f64 / SAMPLE_RATE;
                let decay = 0.7 * (-5.0 * t / slow_s).exp() + 0.3 * (-t / slow_s).exp();
                let attack = 1.0 - (-t / 0.0012).exp();
                *sample += 0.5 * level * decay * attack * damper(t) * (omega * t + 0.6 * string as f64).sin();
            }
        }
    }
    let (mut state, mut dull, mut dark) = (key as u32, 0.0, 0.0);
    for (i, sample) in output[start..].iter_mut().take(4000).enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        dull += 0.06 * (f64::from(state >> 8) / f64::from(1 << 23) - 1.0 - dull);
        dark += 0.06 * (dull - dark);
        *sample += 0.3 * loudness * dark * (-(i as f64) / (0.012 * SAMPLE_RATE)).exp();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "examples/prompt.wav".to_owned());
    let mut output = vec![0.0; (DURATION_S * SAMPLE_RATE) as usize];
    for (at, key, loudness) in NOTES {
        let off = PEDAL.into_iter().find(|pedal| *pedal > at).unwrap_or(at);
        strike(&mut output, 0.05 + STEP_S * at, 0.07 + STEP_S * off, key, loudness);
    }
    let peak = output.iter().fold(0.0, |peak: f64, sample| peak.max(sample.abs()));
    let samples: Vec<f32> = output.iter().map(|sample| (PEAK / peak * sample) as f32).collect();
    let mut sink = WavFileSink::new(Path::new(&path), true)?;
    sink.start(&WavFormat::new(SAMPLE_RATE as u32, 1, SampleFormat::I16))?;
    sink.write(&samples)?;
    Ok(sink.finish()?)
}
