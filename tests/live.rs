//! Sound as it is made, without a device: what the callback gives is what the engine made, underruns are counted, requests act soon.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::checkpoint::Checkpoint;
use wavegen::codec::{Codec, Token};
use wavegen::engine::cpu::{CpuEngine, CpuOptions};
use wavegen::engine::{Engine, EngineError, PlanDraw};
use wavegen::generate::{Options, Path, Prompt, Seam};
use wavegen::live::clock::{RealClock, SimulatedClock};
use wavegen::live::ring::ring;
use wavegen::live::stream::Stats;
use wavegen::live::{Change, Conductor, Order, Recording, Report, Streamer, Voice};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::plan::PlanFrame;
use wavegen::sampler::{PlanSampling, WaveSampling};
use wavegen::sink::{Sink, WavFileSink};

type Outcome<T> = Result<T, EngineError>;

/// A model of one tone, whose pitch is the temperature in hundreds of Hz, times a third of the plan's bands, which takes its time.
struct Tone {
    config: ModelConfig,
    n: u64,
    temperature: f32,
    step: Duration,
}

impl Tone {
    fn new(step: Duration) -> Self {
        Self { config: ModelConfig::preset("tiny").unwrap(), n: 0, temperature: 4.0, step }
    }
}

impl Engine for Tone {
    fn config(&self) -> &ModelConfig {
        &self.config
    }
    fn generation(&self) -> GenerationSettings {
        GenerationSettings::default()
    }
    fn reset(&mut self) -> Outcome<()> {
        self.n = 0;
        Ok(())
    }
    fn set_sampling(&mut self, plan: PlanSampling, _: WaveSampling) {
        self.temperature = plan.temperature;
    }
    fn prefill(&mut self, _: &[Token]) -> Outcome<Vec<PlanFrame>> {
        self.reset()?;
        Ok(Vec::new())
    }
    fn heard_as(&mut self, _: &[PlanFrame]) -> Outcome<()> {
        Ok(())
    }
    fn plan_of(&self, _: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        Ok(Vec::new())
    }
    fn next_plan(&mut self, _: &[f32], out: &mut PlanFrame) -> Outcome<()> {
        *out = PlanFrame { tokens: vec![0], bands: vec![3.0; 148] };
        Ok(())
    }
    fn plan_draw(&self) -> PlanDraw {
        PlanDraw { surprisal: 8.0, entropy: 8.0 }
    }
    fn render(&mut self, plan: &PlanFrame, _: &[f32], out: &mut [Token]) -> Outcome<()> {
        std::thread::sleep(self.step);
        for token in out {
            let hz = 100.0 * f64::from(self.temperature * plan.bands[0] / 3.0);
            let turns = hz * self.n as f64 / 16_000.0;
            *token = self.config.codec.encode((0.3 * (std::f64::consts::TAU * turns).sin()) as f32);
            self.n += 1;
        }
        Ok(())
    }
    fn score(&mut self, _: &[Token], nll: &mut [f32]) -> Outcome<()> {
        nll.fill(1.0);
        Ok(())
    }
    fn score_plan(&mut self, tokens: &[Token]) -> Outcome<Vec<f32>> {
        Ok(vec![8.0; (tokens.len() / 512).saturating_sub(1)])
    }
    fn save(&self) -> Outcome<Vec<u8>> {
        Ok(self.n.to_le_bytes().to_vec())
    }
    fn restore(&mut self, state: &[u8]) -> Outcome<()> {
        self.n = u64::from_le_bytes(state.try_into().unwrap());
        Ok(())
    }
}

fn gains(channels: usize) -> Vec<f32> {
    (0..channels).map(|c| 1.0 / (c + 1) as f32).collect()
}

fn prompt(rate: u32, channels: usize) -> Prompt {
    Prompt::silence_at(&Codec::default(), rate, gains(channels))
}

fn options() -> Options {
    Options { plan: PlanSampling { temperature: 4.0, ..PlanSampling::default() }, ..Options::default() }
}

fn conductor(engine: Box<dyn Engine>, rate: u32, channels: usize) -> Conductor {
    Conductor::new(Voice::new(engine, &options(), &prompt(rate, channels), false).unwrap())
}

fn streamer(conductor: Conductor, buffer_s: f64, seconds: f64) -> Streamer {
    let (rate, channels) = conductor.shape();
    let frames = |s: f64| (s * f64::from(rate)) as u64;
    Streamer {
        conductor,
        prelude: vec![0.1; 1000 * channels],
        recording: None,
        target: frames(buffer_s) as usize,
        most_frames: Some(frames(seconds)),
        stats: Arc::new(Stats::default()),
    }
}

/// The last of many reports; fails on any failure.
fn reports(told: &mpsc::Receiver<Report>) -> Vec<Report> {
    let all: Vec<Report> = told.try_iter().collect();
    assert!(!all.iter().any(|report| matches!(report, Report::Failed(_))));
    all
}

#[test]
fn at_every_rate_and_channel_count_the_device_gets_what_the_engine_made() {
    for (rate, channels) in [(8000, 1), (16_000, 2), (44_100, 2), (48_000, 6), (96_000, 1)] {
        // What the engine makes, resampled at once.
        let mut engine = Tone::new(Duration::ZERO);
        let prompt = prompt(rate, channels);
        let mut path = Path::new(&mut engine, &options(), prompt.tokens(), false).unwrap();
        let mut seam = Seam::soon(&prompt).unwrap();
        let mut expected = vec![0.1; 1000 * channels];
        let n = rate as usize * channels;
        while expected.len() < n {
            let tokens = path.next(&mut engine).unwrap().tokens;
            seam.push(&Codec::default().decode_all(&tokens)).unwrap();
            seam.take(u64::MAX, &mut expected);
        }
        expected.truncate(n);
        // The same through ring and callback, taken in odd pieces.
        let streamer = streamer(conductor(Box::new(Tone::new(Duration::ZERO)), rate, channels), 0.05, 1.0);
        let (feed, mut pull) = ring(streamer.ring_frames(), channels, rate);
        let counters = feed.counters().clone();
        let stats = streamer.stats.clone();
        let (_order, orders) = mpsc::channel();
        let (report, told) = mpsc::channel();
        let thread = std::thread::spawn(move || streamer.run(feed, &orders, &report, None));
        let mut heard = Vec::new();
        let mut piece = vec![0.0; 97 * channels];
        while heard.len() < n {
            // A patient device: it takes only what is there.
            let left = (n - heard.len()).min(piece.len());
            if stats.waiting() * channels as u64 + counters.taken() * channels as u64 == 0 {
                std::thread::yield_now();
                continue;
            }
            let made = stats.frames() - counters.taken();
            if (made as usize) * channels < left {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            std::thread::sleep(Duration::from_micros(300));
            pull.fill(&mut piece[..left]);
            heard.extend_from_slice(&piece[..left]);
        }
        drop(pull);
        thread.join().unwrap();
        assert!(reports(&told).iter().any(|report| matches!(report, Report::Ended)));
        if counters.underruns() > 0 {
            // Made, but not yet pushed when it was taken: a slow machine. The frames are late, not wrong.
            println!("skipped: {rate} Hz, the device was faster than the engine");
            continue;
        }
        assert!(heard == expected, "{rate} Hz, {channels} channels");
    }
}

#[test]
fn a_throttled_engine_underruns_and_every_one_is_counted_and_soft() {
    // Half of real time.
    let engine = Tone::new(Duration::from_millis(64));
    let streamer = streamer(conductor(Box::new(engine), 48_000, 2), 0.05, 1.0);
    let (feed, pull) = ring(streamer.ring_frames(), 2, 48_000);
    let counters = feed.counters().clone();
    let (_order, orders) = mpsc::channel();
    let (report, told) = mpsc::channel();
    let clock = SimulatedClock::new(pull, 48_000, 1.0);
    streamer.run(feed, &orders, &report, Some(clock));
    reports(&told);
    let missing_s = counters.missing() as f64 / 48_000.0;
    assert!(counters.underruns() >= 5, "{} underruns", counters.underruns());
    assert!(missing_s > 0.5, "{missing_s} s missing of a stream at half speed");
}

#[test]
fn a_fast_engine_never_underruns_in_simulated_time_and_a_slow_clock_makes_it_slow() {
    let run = |slowness: f64| {
        let streamer = streamer(conductor(Box::new(Tone::new(Duration::from_millis(2))), 48_000, 1), 0.5, 5.0);
        let (feed, pull) = ring(streamer.ring_frames(), 1, 48_000);
        let (counters, stats) = (feed.counters().clone(), streamer.stats.clone());
        let (_order, orders) = mpsc::channel();
        let (report, told) = mpsc::channel();
        streamer.run(feed, &orders, &report, Some(SimulatedClock::new(pull, 48_000, slowness)));
        reports(&told);
        assert_eq!(stats.frames(), 5 * 48_000);
        counters.underruns()
    };
    assert_eq!(run(0.1), 0);
    assert!(run(40.0) > 0);
}

/// Plays through a real clock for a while after each order; gives the interleaved frames as they were recorded.
struct Player {
    order: Sender<Order>,
    told: mpsc::Receiver<Report>,
    stats: Arc<Stats>,
}

impl Player {
    fn start(conductor: Conductor, recording: Option<Recording>) -> (Self, std::thread::JoinHandle<()>, RealClock) {
        let mut streamer = streamer(conductor, 0.04, 3600.0);
        streamer.prelude.clear();
        streamer.recording = recording;
        Self::of(streamer)
    }

    fn of(streamer: Streamer) -> (Self, std::thread::JoinHandle<()>, RealClock) {
        let (rate, channels) = streamer.conductor.shape();
        let (feed, pull) = ring(streamer.ring_frames(), channels, rate);
        let (order, orders) = mpsc::channel();
        let (report, told) = mpsc::channel();
        let stats = streamer.stats.clone();
        let thread = std::thread::spawn(move || streamer.run(feed, &orders, &report, None));
        (Self { order, told, stats }, thread, RealClock::start(pull, rate))
    }

    /// Waits until an order was carried out; tells how many frames had been made before.
    fn change(&self, change: Change) -> u64 {
        let before = self.stats.frames();
        self.order.send(Order::Change(change)).unwrap();
        while !matches!(self.told.recv().unwrap(), Report::Changed(_)) {}
        before
    }

    fn play(&self, seconds: f64) {
        std::thread::sleep(Duration::from_secs_f64(seconds));
    }

    /// All that was played, and its first frame's number.
    fn take(&self) -> (Vec<f32>, u64) {
        self.order.send(Order::Take(60.0)).unwrap();
        loop {
            if let Report::Took(clip) = self.told.recv().unwrap() {
                return (clip.samples, 0);
            }
        }
    }
}

/// Pitch of `samples` at `rate`, by counting rising zeros.
fn pitch(samples: &[f32], rate: f64) -> f64 {
    let rising: Vec<usize> = (1..samples.len()).filter(|&i| samples[i - 1] < 0.0 && samples[i] >= 0.0).collect();
    match rising[..] {
        [first, .., last] => (rising.len() - 1) as f64 * rate / (last - first) as f64,
        _ => 0.0,
    }
}

#[test]
fn requests_act_within_100_ms_of_audio_and_without_a_click() {
    let rate = 48_000.0;
    let (player, thread, clock) =
        Player::start(conductor(Box::new(Tone::new(Duration::from_millis(1))), 48_000, 1), None);
    player.play(0.4);
    let mut options = options();
    options.plan.temperature = 8.0;
    let changed = player.change(Change::Options(options)) as usize;
    player.play(0.3);
    let muted = player.change(Change::Volume { gain: 0.0, seconds: 0.01 }) as usize;
    player.play(0.2);
    let unmuted = player.change(Change::Volume { gain: 1.0, seconds: 0.01 }) as usize;
    player.play(0.3);
    let varied = player.change(Change::Vary(0.2)) as usize;
    player.play(0.3);
    let (heard, _) = player.take();
    player.order.send(Order::Stop).unwrap();
    thread.join().unwrap();
    drop(clock);

    // Frames made before a change were on their way already: the ring holds at most 40 ms and a step of 32 ms more.
    let within = (0.1 * rate) as usize;
    let after = |at: usize, s: f64| &heard[at..at + (s * rate) as usize];
    assert!((pitch(&heard[changed - 4800..changed], rate) - 400.0).abs() < 15.0);
    let ring = (0.072 * rate) as usize;
    let soon = changed + within - ring;
    assert!((pitch(after(soon, 0.1), rate) - 800.0).abs() < 20.0, "{}", pitch(after(soon, 0.1), rate));
    assert!(after(muted + within - ring, 0.05).iter().all(|&x| x == 0.0), "mute comes late");
    assert!(pitch(after(unmuted + within - ring, 0.1), rate) > 700.0, "sound comes back late");
    // A sine of 800 Hz and 0.3 moves by 0.0314 a frame at most; another frequency or phase within 10 ms adds little.
    let edges = [muted, unmuted, varied];
    for at in edges {
        let window = &heard[at.saturating_sub(960)..at + 9600];
        let steepest = window.windows(2).map(|w| (w[1] - w[0]).abs()).fold(0.0, f32::max);
        assert!(steepest < 0.06, "a click of {steepest} after frame {at}");
    }
}

#[test]
fn a_recording_and_a_take_have_what_a_musician_played_where_it_was_heard() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("both.wav");
    let mut sink = WavFileSink::new(&path, false).unwrap();
    sink.start(&WavFormat::new(48_000, 2, SampleFormat::F32)).unwrap();
    let engine = || Box::new(Tone::new(Duration::ZERO));
    let (player, thread, clock) =
        Player::start(conductor(engine(), 48_000, 2), Some(Recording::new(Box::new(sink), false)));
    let volume = |gain| player.change(Change::Volume { gain, seconds: 0.01 });
    player.play(0.1);
    player.order.send(Order::Listen).unwrap();
    volume(0.0);
    player.play(0.4);
    let voice = Voice::new(engine(), &options(), &prompt(48_000, 2), false).unwrap();
    // As the program does it: one order right after the other.
    player.order.send(Order::Change(Change::Voice(Box::new(voice)))).unwrap();
    volume(1.0);
    player.play(0.1);
    // A tenth of a second, until a twentieth before the voice changed.
    let heard: Vec<f32> = [0.25, -0.5].repeat(4800);
    player.order.send(Order::Heard { samples: heard.clone(), ago_s: 0.05 }).unwrap();
    player.play(0.1);
    let (took, _) = player.take();
    player.order.send(Order::Stop).unwrap();
    thread.join().unwrap();
    drop(clock);

    let recorded = wavegen::audio::decode_file(&path).unwrap().samples;
    assert!(recorded.len() >= took.len() && recorded[..took.len()] == took);
    let frames: Vec<&[f32]> = recorded.chunks_exact(2).collect();
    let first = frames.iter().position(|frame| *frame == [0.25, -0.5]).unwrap();
    assert_eq!(recorded[2 * first..2 * first + 9600], heard);
    let gap = &recorded[2 * (first + 4800)..2 * (first + 7200)];
    assert!(gap.iter().all(|x| *x == 0.0) && recorded[2 * first - 2..2 * first] == [0.0; 2]);
    // A sine from nothing on, at once.
    let answer = &recorded[2 * (first + 7200)..2 * (first + 7300)];
    assert!(answer[..20].iter().any(|x| *x != 0.0), "{answer:?}");
    // Before, it played.
    assert!(pitch(&frames[..2000].iter().map(|frame| frame[0]).collect::<Vec<_>>(), 48_000.0) > 350.0);
}

#[test]
fn a_real_model_plays_through_the_same_path() {
    let checkpoint = Checkpoint::untrained(ModelConfig::preset("tiny").unwrap(), 1).unwrap();
    let engine = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
    let mut conductor = conductor(Box::new(engine), 44_100, 2);
    let mut out = Vec::new();
    for change in [
        Change::Hold(true),
        Change::Vary(1.0),
        Change::Hold(false),
        Change::Follow(Some(Arc::new(ndarray::Array2::from_elem((3, 148), -1.0)))),
        Change::Follow(None),
        Change::Vary(30.0),
    ] {
        (0..4).for_each(|_| conductor.next(&mut out).unwrap());
        conductor.apply(change).unwrap();
    }
    (0..4).for_each(|_| conductor.next(&mut out).unwrap());
    assert!(out.iter().all(|x| x.is_finite()) && out.len() > 2 * 20 * 1400);
    assert_eq!(conductor.take(0.1).n_frames(), 4410);
    let other = CpuEngine::new(&checkpoint, &CpuOptions::default()).unwrap();
    let other = Voice::new(Box::new(other), &Options::default(), &prompt(44_100, 2), true).unwrap();
    conductor.apply(Change::Voice(Box::new(other))).unwrap();
    conductor.next(&mut out).unwrap();
}

/// A tone's level at 48 kHz, from its crests.
fn crest(samples: &[f32]) -> f32 {
    samples.iter().fold(0.0, |most, x| x.abs().max(most))
}

#[test]
fn another_voice_has_its_own_level_and_balance_and_comes_without_a_click() {
    let engine = || Box::new(Tone::new(Duration::ZERO));
    let mut conductor = conductor(engine(), 48_000, 2);
    let mut out = Vec::new();
    (0..20).for_each(|_| conductor.next(&mut out).unwrap());
    let before = out.len();
    let softer = Prompt::silence_at(&Codec::default(), 48_000, vec![0.1, 0.4]);
    let other = Voice::new(engine(), &options(), &softer, false).unwrap();
    conductor.apply(Change::Voice(Box::new(other))).unwrap();
    while out.len() < before + 2 * 9600 {
        conductor.next(&mut out).unwrap();
    }
    let channel = |c: usize| out.iter().skip(c).step_by(2).copied().collect::<Vec<f32>>();
    for (c, (first, then)) in [(0.3, 0.03), (0.15, 0.12)].into_iter().enumerate() {
        let x = channel(c);
        let (old, new) = (&x[before / 2 - 4800..before / 2], &x[before / 2 + 4800..]);
        assert!((crest(old) - first).abs() < 0.02 * first, "channel {c}: {}", crest(old));
        assert!((crest(new) - then).abs() < 0.02 * then, "channel {c}: {}", crest(new));
        // A sine of 400 Hz and 0.3 moves by 0.0157 a frame at most.
        let around = &x[before / 2 - 960..before / 2 + 4800];
        let steepest = around.windows(2).map(|w| (w[1] - w[0]).abs()).fold(0.0, f32::max);
        assert!(steepest < 0.02, "channel {c}: a click of {steepest}");
    }
}

#[test]
fn another_voice_comes_instead_of_the_rest_of_the_recording_without_a_click() {
    let engine = || Box::new(Tone::new(Duration::ZERO));
    let mut streamer = streamer(conductor(engine(), 48_000, 1), 0.04, 3600.0);
    let hum = |i: u32| 0.3 * (f64::from(i) / 48_000.0 * 100.0 * std::f64::consts::TAU).sin();
    streamer.prelude = (0..480_000).map(|i| hum(i) as f32).collect();
    let (player, thread, clock) = Player::of(streamer);
    player.play(0.2);
    let voice = Voice::new(engine(), &options(), &prompt(48_000, 1), false).unwrap();
    let changed = player.change(Change::Voice(Box::new(voice))) as usize;
    player.play(0.3);
    let (heard, _) = player.take();
    player.order.send(Order::Stop).unwrap();
    thread.join().unwrap();
    drop(clock);
    assert!((pitch(&heard[..changed], 48_000.0) - 100.0).abs() < 15.0);
    assert!((pitch(&heard[changed + 2400..changed + 7200], 48_000.0) - 400.0).abs() < 15.0);
    // Both sines of 0.3, the faster moving by 0.0157 a frame at most.
    let around = &heard[changed - 960..changed + 4800];
    let steepest = around.windows(2).map(|w| (w[1] - w[0]).abs()).fold(0.0, f32::max);
    assert!(steepest < 0.02, "a click of {steepest}");
}

#[test]
fn stopped_while_the_recording_plays_it_fades_out_without_a_click() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hum.wav");
    let mut sink = WavFileSink::new(&path, false).unwrap();
    sink.start(&WavFormat::new(48_000, 1, SampleFormat::F32)).unwrap();
    let mut streamer = streamer(conductor(Box::new(Tone::new(Duration::ZERO)), 48_000, 1), 0.04, 3600.0);
    let hum = |i: u32| 0.3 * (f64::from(i) / 48_000.0 * 100.0 * std::f64::consts::TAU).sin();
    streamer.prelude = (0..480_000).map(|i| hum(i) as f32).collect();
    streamer.recording = Some(Recording::new(Box::new(sink), false));
    let (player, thread, clock) = Player::of(streamer);
    player.play(0.2);
    player.order.send(Order::Stop).unwrap();
    thread.join().unwrap();
    drop(clock);
    let recorded = wavegen::audio::decode_file(&path).unwrap().samples;
    assert!((4800..240_000).contains(&recorded.len()), "{} frames", recorded.len());
    // The hum moves by 0.004 a frame at most, the fade by 0.0007.
    let steepest = recorded.windows(2).map(|w| (w[1] - w[0]).abs()).fold(0.0, f32::max);
    assert!(steepest < 0.005, "a click of {steepest}");
    assert_eq!(recorded.last(), Some(&0.0));
}

/// Pitch of the last 64 ms of `frames` more frames of a conductor at 48 kHz in mono.
fn pitch_after(conductor: &mut Conductor, frames: usize) -> f64 {
    let mut out = Vec::new();
    (0..frames).for_each(|_| conductor.next(&mut out).unwrap());
    pitch(&out[out.len() - 3072..], 48_000.0)
}

#[test]
fn another_way_is_drawn_as_was_asked_for_last() {
    let mut conductor = conductor(Box::new(Tone::new(Duration::ZERO)), 48_000, 1);
    assert!((pitch_after(&mut conductor, 20) - 400.0).abs() < 15.0);
    let mut options = options();
    options.plan.temperature = 8.0;
    conductor.apply(Change::Options(options)).unwrap();
    assert!((pitch_after(&mut conductor, 10) - 800.0).abs() < 15.0);
    // To before that.
    assert!(conductor.apply(Change::Vary(0.6)).unwrap() > 0.5);
    assert_eq!(*conductor.options(), options);
    assert!((pitch_after(&mut conductor, 10) - 800.0).abs() < 15.0);
}

#[test]
fn a_hold_ends_with_what_it_held_and_leaves_what_comes_next_alone() {
    let tone = || Box::new(Tone::new(Duration::ZERO));
    // Ten frames of twice the pitch, and many of three times.
    let bands = || {
        let rows = ndarray::Array2::from_shape_fn((100, 148), |(frame, _)| if frame < 10 { 6.0 } else { 9.0 });
        Change::Follow(Some(Arc::new(rows)))
    };
    let mut held = conductor(tone(), 48_000, 1);
    let near = |conductor: &mut Conductor, frames: usize, hz: f64| {
        let heard = pitch_after(conductor, frames);
        assert!((heard - hz).abs() < 20.0, "{heard} Hz instead of {hz}");
    };
    near(&mut held, 10, 400.0);
    held.apply(bands()).unwrap();
    near(&mut held, 6, 800.0);
    held.apply(Change::Hold(true)).unwrap();
    near(&mut held, 20, 800.0);
    // It goes on to follow where it was.
    held.apply(Change::Hold(false)).unwrap();
    near(&mut held, 4, 800.0);
    near(&mut held, 6, 1200.0);
    // Another voice holds its own first frame.
    held.apply(Change::Voice(Box::new(Voice::new(tone(), &options(), &prompt(48_000, 1), false).unwrap()))).unwrap();
    held.apply(Change::Hold(true)).unwrap();
    near(&mut held, 10, 400.0);
    held.apply(bands()).unwrap();
    near(&mut held, 20, 1200.0);
    // Before the first frame, what is asked for after a hold ends it.
    let mut first = conductor(tone(), 48_000, 1);
    first.apply(Change::Hold(true)).unwrap();
    first.apply(bands()).unwrap();
    near(&mut first, 20, 1200.0);
}

#[test]
fn a_fade_of_ten_minutes_takes_ten_minutes() {
    let mut conductor = conductor(Box::new(Tone::new(Duration::ZERO)), 192_000, 1);
    conductor.apply(Change::Volume { gain: 0.0, seconds: 600.0 }).unwrap();
    let mut out = Vec::new();
    conductor.send(&vec![1.0; 60 * 192_000], &mut out);
    for (second, expected) in [(0, 1.0), (30, 0.95), (60, 0.9)] {
        let x = out[(second * 192_000usize).saturating_sub(1)];
        assert!((x - expected).abs() < 1e-4, "{x} after {second} s");
    }
}

#[test]
fn who_joins_in_later_plays_what_is_due_then() {
    let prompt = Prompt::silence_at(&Codec::default(), 48_000, vec![1.0]);
    let play = |voice: &mut Voice, n: usize| {
        let mut out = Vec::new();
        while out.len() < n {
            voice.next(&mut out).unwrap();
        }
        out.truncate(n);
        out
    };
    let voice = || Voice::new(Box::new(Tone::new(Duration::ZERO)), &options(), &prompt, false).unwrap();
    let whole = play(&mut voice(), 48_000);
    // Due 0.5 s after the prompt, when it began to prepare; 0.1 s pass meanwhile, by a clock that goes on with each look at it.
    let looks = std::cell::Cell::new(0);
    let due = || {
        looks.set(looks.get() + 1);
        (0.5 + 0.01 * f64::from(looks.get())).min(0.6)
    };
    let mut late = voice();
    late.skip(due).unwrap();
    assert_eq!(play(&mut late, 9600), whole[28_800..28_800 + 9600]);
    // What never catches up gives up after twelve seconds of music, four more than it knew of.
    let mut never = voice();
    never.skip(|| f64::INFINITY).unwrap();
    let longer = play(&mut voice(), 13 * 48_000);
    assert_eq!(play(&mut never, 4800), longer[12 * 48_000..12 * 48_000 + 4800]);
}
