//! Playing on through the library: exact lengths, same seed same samples, clean ends, at every rate.

use std::ops::ControlFlow;

use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, Result, SampleFormat, WavFormat, WavPrompt};
use wavegen::checkpoint::Checkpoint;
use wavegen::engine::reference::ReferenceEngine;
use wavegen::generate::{CONTEXT_S, Options, Played, Prompt, play_on};
use wavegen::model::config::ModelConfig;
use wavegen::sink::Sink;

/// Keeps what is written.
#[derive(Default)]
struct Memory(Vec<f32>);

impl Sink for Memory {
    fn start(&mut self, _: &WavFormat) -> Result<()> {
        Ok(())
    }
    fn copy_prompt(&mut self, _: &WavPrompt) -> Result<()> {
        Ok(())
    }
    fn write(&mut self, interleaved: &[f32]) -> Result<()> {
        self.0.extend_from_slice(interleaved);
        Ok(())
    }
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

fn checkpoint() -> Checkpoint {
    Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap()
}

fn prompt(rate: u32, channels: usize, n_frames: usize) -> Prompt {
    let file = tempfile::Builder::new().suffix(".wav").tempfile().unwrap();
    let mut sink = wavegen::sink::open(file.path(), true).unwrap();
    sink.start(&WavFormat::new(rate, channels, SampleFormat::F32)).unwrap();
    let samples: Vec<f32> = (0..n_frames * channels).map(|i| 0.1 * (i as f32 * 0.03).sin()).collect();
    sink.write(&samples).unwrap();
    sink.finish().unwrap();
    let tail = decode_tail(&AudioSource::open(file.path()).unwrap(), CONTEXT_S).unwrap();
    Prompt::new(&tail, &checkpoint().config.codec).unwrap()
}

fn play(prompt: &Prompt, seconds: f64, seed: u64, frames: usize) -> (Played, Vec<f32>) {
    let mut engine = ReferenceEngine::new(&checkpoint()).unwrap();
    let mut sink = Memory::default();
    let options = Options { seed, ..Options::default() };
    let mut calls = 0;
    let played = play_on(&mut engine, prompt, seconds, &options, &mut sink, &mut |_| {
        calls += 1;
        if calls > frames { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    (played.unwrap(), sink.0)
}

#[test]
fn every_rate_and_channel_count_gets_exactly_the_frames_asked_for() {
    for (rate, channels, n_frames) in [(16_000, 1, 700), (44_100, 2, 4001), (8000, 6, 900), (96_000, 1, 9000)] {
        let (played, samples) = play(&prompt(rate, channels, n_frames), 0.0501, 0, usize::MAX);
        let expected = (0.0501 * f64::from(rate)).round() as usize;
        assert_eq!(samples.len(), expected * channels, "{rate} Hz, {channels} channels");
        assert_eq!((played.n_frames, played.interrupted), (expected as u64, false));
        assert!(samples.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_longer_continuation_begins_as_the_shorter_one() {
    let prompt = prompt(16_000, 1, 2000);
    let (_, short) = play(&prompt, 0.05, 3, usize::MAX);
    let (_, long) = play(&prompt, 0.1, 3, usize::MAX);
    assert_eq!(short, long[..short.len()]);
    assert_ne!(short, play(&prompt, 0.05, 4, usize::MAX).1);
}

#[test]
fn an_interrupted_continuation_keeps_what_was_played() {
    let prompt = prompt(44_100, 2, 4410);
    let (played, samples) = play(&prompt, 10.0, 0, 2);
    // Two plan frames of 512 samples at 16 kHz.
    assert!(played.interrupted);
    assert_eq!(played.n_frames, 2 * 512 * 44_100 / 16_000);
    assert_eq!(samples.len() as u64, 2 * played.n_frames);
    let (played, samples) = play(&prompt, 10.0, 0, 0);
    assert!(samples.is_empty() && played.seam.is_none());
}

#[test]
fn playing_from_nothing_has_the_models_rate_and_no_seam() {
    let prompt = Prompt::silence(&checkpoint().config.codec);
    let (played, samples) = play(&prompt, 0.05, 0, usize::MAX);
    assert_eq!((samples.len(), played.seam), (800, None));
}
