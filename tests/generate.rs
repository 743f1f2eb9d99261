//! Playing on through the library: exact lengths, same seed same samples, clean ends, at every rate.

mod memory;

use std::ops::ControlFlow;

use wavegen::audio::{Clip, SampleFormat, WavFormat};
use wavegen::checkpoint::Checkpoint;
use wavegen::engine::Engine;
use wavegen::engine::cpu::{CpuEngine, CpuOptions};
use wavegen::engine::reference::ReferenceEngine;
use wavegen::generate::{
    Colour, Manner, Options, Path, Played, Player, Prompt, Recording, Session, SessionError, telling,
};
use wavegen::model::config::ModelConfig;
use wavegen::plan::PlanFrame;
use wavegen::rng::{Kind, Rng, uniform};

use memory::Memory;

fn checkpoint() -> Checkpoint {
    Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap()
}

fn prompt(rate: u32, channels: usize, n_frames: usize) -> Prompt {
    let samples = (0..n_frames * channels).map(|i| 0.1 * (i as f32 * 0.03).sin()).collect();
    let clip = Clip { samples, channels, sample_rate: rate };
    Prompt::new(&clip, n_frames as u64, &checkpoint().config.codec).unwrap()
}

fn play(prompt: &Prompt, seconds: f64, seed: u64, frames: usize) -> (Played, Vec<f32>) {
    let mut engine = ReferenceEngine::new(&checkpoint()).unwrap();
    let mut sink = Memory::default();
    let options = Options { seed, ..Options::default() };
    let mut player = Player::new(&mut engine, prompt, &options, false).unwrap();
    let mut calls = 0;
    let played = player.play(&mut engine, seconds, &mut sink, &mut |_| {
        calls += 1;
        if calls > frames { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    (played.unwrap(), sink.0)
}

/// Plays `seconds` more.
fn play_more(player: &mut Player, engine: &mut dyn Engine, seconds: f64) -> Vec<f32> {
    let mut sink = Memory::default();
    player.play(engine, seconds, &mut sink, &mut |_| ControlFlow::Continue(())).unwrap();
    sink.0
}

/// A continuation of 0.05 s, saved.
fn session(prompt: &Prompt) -> (Vec<f32>, Session) {
    let mut engine = ReferenceEngine::new(&checkpoint()).unwrap();
    let mut player = Player::new(&mut engine, prompt, &Options::default(), false).unwrap();
    let samples = play_more(&mut player, &mut engine, 0.05);
    let format = WavFormat::new(prompt.sample_rate(), prompt.channels(), SampleFormat::I16);
    (samples, Session::of(&player, &mut engine, Recording { format, n_frames: 1 }).unwrap())
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
    for (rate, channels) in [(16_000, 1), (44_100, 2)] {
        let prompt = prompt(rate, channels, 4410);
        let (_, short) = play(&prompt, 0.05, 3, usize::MAX);
        let (_, long) = play(&prompt, 0.1, 3, usize::MAX);
        assert_eq!(short, long[..short.len()], "{rate} Hz");
        assert_ne!(short, play(&prompt, 0.05, 4, usize::MAX).1, "{rate} Hz");
    }
}

#[test]
fn a_session_in_a_file_goes_on_as_if_there_had_been_no_pause() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session.bin");
    for (rate, channels, n_frames) in [(16_000, 1, 2000), (44_100, 2, 4410), (8000, 6, 900)] {
        let prompt = prompt(rate, channels, n_frames);
        let (_, whole) = play(&prompt, 0.15, 0, usize::MAX);
        let (mut samples, session) = session(&prompt);
        session.save(&path, "the model").unwrap();
        for _ in 0..2 {
            let session = Session::load(&path, "the model").unwrap();
            let mut engine = ReferenceEngine::new(&checkpoint()).unwrap();
            let mut player = session.resume(&mut engine).unwrap();
            samples.extend(play_more(&mut player, &mut engine, 0.05));
            Session::of(&player, &mut engine, session.recording).unwrap().save(&path, "the model").unwrap();
        }
        assert!(samples == whole, "{rate} Hz, {channels} channels: the parts are not the whole");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "temporary files are left");
}

#[test]
fn second_after_second_the_way_most_like_the_prompt_is_taken() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let spectrum = checkpoint.spectrum().unwrap();
    let codec = &checkpoint.config.codec;
    // Notes that are struck and die away.
    let note = |i: usize| (i % 6000, [220.0, 277.2, 329.6, 440.0][i / 6000 % 4]);
    let sound = |i: usize| {
        let (t, hz): (usize, f32) = note(i);
        let t = t as f32 / 16_000.0;
        0.4 * (-4.0 * t).exp()
            * ((std::f32::consts::TAU * hz * t).sin() + 0.3 * (2.0 * std::f32::consts::TAU * hz * t).sin())
    };
    let prompt = codec.encode_all(&(0..48_000).map(sound).collect::<Vec<_>>());
    let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
    let plan = engine.plan_of(&prompt[prompt.len() % spectrum.hop()..]).unwrap();
    let (_, plan) = Colour::of_prompt(plan, &codec.decode_all(&prompt), &spectrum);
    assert!(telling(&plan[..30], &spectrum).is_none(), "too short to tell");
    let frames = telling(&plan, &spectrum).unwrap();
    let manner = Manner::of(frames.iter().map(|frame| frame.bands.as_slice()), &spectrum);
    let mut play = |choices, seed| {
        let options = Options { seed, choices, ..Options::default() };
        let mut path = Path::new(&mut engine, &options, &prompt, false).unwrap();
        (0..96).map(|_| path.next(&mut engine).unwrap().plan.bands).collect::<Vec<_>>()
    };
    let far = |plan: &[Vec<f32>]| manner.distance(&Manner::of(plan.iter().map(Vec::as_slice), &spectrum));
    let mut gained = [0.0; 2];
    for seed in 0..3 {
        let (first, chosen) = (play(1, seed), play(8, seed));
        // The last of these frames already knows what comes next.
        assert!(first[..7] == chosen[..7], "the first quarter of a second is played at once");
        // Both come from the same frames; what came first was one of the eight.
        let second = [far(&first[8..16]), far(&chosen[8..16])];
        assert!(second[1] <= second[0], "seed {seed}: {second:?}");
        gained[0] += second[0];
        gained[1] += second[1];
    }
    assert!(gained[1] < 0.8 * gained[0], "{gained:?}");
}

#[test]
fn what_is_played_is_what_the_model_plans_in_the_recordings_colour_and_steadied() {
    let checkpoint = Checkpoint::built_in().unwrap();
    let (spectrum, codec) = (checkpoint.spectrum().unwrap(), &checkpoint.config.codec);
    let mut rng = Rng::new(5);
    let sound = |i: usize| {
        let age = (i % 5000) as f32 / 16_000.0;
        0.3 * (-6.0 * age).exp() * (0.1 * [1.0, 1.26, 1.5][i / 5000 % 3] * i as f32).sin() + 0.01 * rng.normal()
    };
    let prompt = codec.encode_all(&(0..120 * 512 + 100).map(sound).collect::<Vec<_>>());
    let options = Options { seed: 3, choices: 1, ..Options::default() };
    let mut engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
    let mut path = Path::new(&mut engine, &options, &prompt, false).unwrap();
    let played: Vec<_> = (0..20).map(|_| path.next(&mut engine).unwrap().plan).collect();

    let plan = engine.prefill(&prompt).unwrap();
    let (colour, before) = Colour::of_prompt(plan, &codec.decode_all(&prompt), &spectrum);
    engine.set_sampling(options.plan, options.wave);
    let frame = |k: u64| {
        let n = checkpoint.config.plan.n_codebooks as u64;
        let uniforms: Vec<f32> = (k * n..(k + 1) * n).map(|t| uniform(3, 0, Kind::Plan, t)).collect();
        let mut frame = PlanFrame::default();
        engine.next_plan(&uniforms, &mut frame).unwrap();
        frame
    };
    let mut frames: Vec<_> = (0..21).map(frame).collect();
    let mut coloured = frames.clone();
    colour.follow(&before, &mut frames);
    (0..).zip(&mut coloured).for_each(|(k, frame)| colour.apply_after(k, &mut frame.bands));
    assert!(played == frames[..20] && frames != coloured);
}

#[test]
fn a_session_may_end_anywhere_between_two_choices() {
    let prompt = prompt(16_000, 1, 48_000);
    let engine = || CpuEngine::new(&checkpoint(), &CpuOptions::default()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session.bin");
    let play = |parts: &[f64], choices| {
        let options = Options { choices, ..Options::default() };
        let mut engine = engine();
        let mut player = Player::new(&mut engine, &prompt, &options, false).unwrap();
        let mut samples = Vec::new();
        for &seconds in parts {
            samples.extend(play_more(&mut player, &mut engine, seconds));
            let recording = Recording { format: WavFormat::new(16_000, 1, SampleFormat::I16), n_frames: 1 };
            Session::of(&player, &mut engine, recording).unwrap().save(&path, "the model").unwrap();
            player = Session::load(&path, "the model").unwrap().resume(&mut engine).unwrap();
        }
        samples
    };
    let whole = play(&[3.6], 4);
    assert!(play(&[0.9, 0.4, 0.748, 1.0, 0.552], 4) == whole);
    assert!(play(&[3.6], 1) != whole, "nothing was chosen");
}

#[test]
fn takes_from_one_prefill_are_those_of_separate_runs() {
    let prompt = prompt(44_100, 2, 4410);
    let mut engine = ReferenceEngine::new(&checkpoint()).unwrap();
    let player = Player::new(&mut engine, &prompt, &Options::default(), false).unwrap();
    let format = WavFormat::new(44_100, 2, SampleFormat::I16);
    let start = Session::of(&player, &mut engine, Recording { format, n_frames: 0 }).unwrap();
    let mut takes = Vec::new();
    for stream in 0..3 {
        let options = Options { stream, ..Options::default() };
        let mut player = start.resume(&mut engine).unwrap();
        player.set_options(&mut engine, &options).unwrap();
        let samples = play_more(&mut player, &mut engine, 0.05);
        let mut alone = ReferenceEngine::new(&checkpoint()).unwrap();
        let mut player = Player::new(&mut alone, &prompt, &options, false).unwrap();
        assert_eq!(samples, play_more(&mut player, &mut alone, 0.05), "stream {stream}");
        assert!(!takes.contains(&samples), "stream {stream} is as one before it");
        takes.push(samples);
    }
}

#[test]
fn another_model_a_damaged_file_and_no_session_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session.bin");
    session(&prompt(16_000, 1, 700)).1.save(&path, "the model").unwrap();
    let load = |bytes: &[u8], model: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = Session::load(&path, model).unwrap_err();
        assert!(error.to_string().contains("session.bin"), "{error}");
        error
    };
    let whole = std::fs::read(&path).unwrap();
    assert!(matches!(load(&whole, "another"), SessionError::Model { ref name, .. } if name == "tiny"));
    // A bit anywhere, be it in the header, the metadata or the state.
    for at in (8..whole.len()).step_by(whole.len() / 60) {
        let mut bent = whole.clone();
        bent[at] ^= 1;
        load(&bent, "the model");
    }
    for n in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        load(&whole[..n], "the model");
    }
    load(b"RIFF....WAVE", "the model");
    let model = directory.path().join("model.safetensors");
    checkpoint().save(&model, wavegen::checkpoint::Precision::F32).unwrap();
    assert!(matches!(load(&std::fs::read(model).unwrap(), "the model"), SessionError::Foreign { .. }));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(Session::load(&path, "the model"), Err(SessionError::Io { .. })));
}

#[test]
fn a_session_does_not_fit_an_engine_of_other_sizes() {
    let (_, session) = session(&prompt(16_000, 1, 700));
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.plan.window = 1024;
    let mut other = ReferenceEngine::new(&Checkpoint::untrained(config, 1).unwrap()).unwrap();
    assert!(session.resume(&mut other).is_err());
}

#[test]
fn an_interrupted_continuation_keeps_what_is_settled() {
    let prompt = prompt(44_100, 2, 4410);
    let (played, samples) = play(&prompt, 10.0, 0, 6);
    // Six plan frames of 512 samples at 16 kHz, less what the resampler still holds: a chunk and half a filter.
    assert!(played.interrupted);
    let all = 6 * 512 * 441 / 160;
    assert!((all - 1920 * 441 / 160..=all).contains(&played.n_frames), "{}", played.n_frames);
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
