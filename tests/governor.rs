//! The governor on a model that fails on purpose: failures are replaced, nothing that was played changes, and the same seed
//! gives the same samples however playing is cut.

mod memory;

use std::ops::ControlFlow;

use wavegen::audio::{SampleFormat, WavFormat};
use wavegen::codec::{Codec, Token};
use wavegen::engine::{Engine, EngineError, PlanDraw};
use wavegen::generate::{Alarm, Guide, Options, Path, Played, Player, Prompt, Recording, Session};
use wavegen::model::config::{GenerationSettings, ModelConfig};
use wavegen::plan::{PlanFrame, Spectrum};
use wavegen::sampler::{PlanSampling, WaveSampling};

use memory::Memory;

const HOP: usize = 512;

/// A plan frame that asks for more than is ever played.
const LOUD: f32 = 3.0;

/// Plays notes. About once in eight seconds, as the uniforms will have it, it falls silent for good.
struct Failing {
    config: ModelConfig,
    n: u64,
    silent: bool,
    /// Falls silent whatever the uniforms say.
    doomed: bool,
    gain: f32,
}

impl Failing {
    fn new(doomed: bool) -> Self {
        Self { config: ModelConfig::preset("tiny").unwrap(), n: 0, silent: false, doomed, gain: 1.0 }
    }

    fn sample(n: u64) -> f32 {
        let note = [220.0, 330.0, 262.0, 392.0, 294.0][(n / 8000 % 5) as usize];
        let age = (n % 8000) as f32 / 16_000.0;
        0.3 * (-3.0 * age).exp() * (std::f32::consts::TAU * note * (n % 16_000) as f32 / 16_000.0).sin()
    }

    fn prompt(&self) -> Vec<Token> {
        (0..16_000 * 6).map(|n| self.config.codec.encode(Self::sample(n))).collect()
    }
}

impl Engine for Failing {
    fn config(&self) -> &ModelConfig {
        &self.config
    }
    fn generation(&self) -> GenerationSettings {
        GenerationSettings::default()
    }
    fn reset(&mut self) -> Result<(), EngineError> {
        (self.n, self.silent) = (0, false);
        Ok(())
    }
    fn set_sampling(&mut self, _: PlanSampling, wave: WaveSampling) {
        self.gain = 10.0f32.powf(wave.level_db / 20.0);
    }
    fn prefill(&mut self, prompt: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        self.reset()?;
        self.n = prompt.len() as u64;
        self.plan_of(prompt)
    }
    fn heard_as(&mut self, _: &[PlanFrame]) -> Result<(), EngineError> {
        Ok(())
    }
    fn plan_of(&self, tokens: &[Token]) -> Result<Vec<PlanFrame>, EngineError> {
        // As it is, so that there is nothing to be coloured.
        let spectrum = Spectrum::new(16_000, &self.config.plan)?;
        let plan = spectrum.analyse(&self.config.codec.decode_all(tokens));
        Ok(plan.outer_iter().map(|bands| PlanFrame { tokens: vec![0], bands: bands.to_vec() }).collect())
    }
    fn next_plan(&mut self, uniforms: &[f32], out: &mut PlanFrame) -> Result<(), EngineError> {
        self.silent |= uniforms[0] < 1.0 / 240.0 || (self.doomed && self.n > 16_000 * 9);
        *out = PlanFrame { tokens: vec![0], bands: vec![LOUD + uniforms[0]; 148] };
        Ok(())
    }
    fn plan_draw(&self) -> PlanDraw {
        PlanDraw { surprisal: 8.0, entropy: 8.0 }
    }
    fn render(&mut self, plan: &PlanFrame, _: &[f32], out: &mut [Token]) -> Result<(), EngineError> {
        for token in out {
            // The last bit of the plan is heard, so that every frame tells which uniform it had.
            let sample = if self.silent { 0.0 } else { Self::sample(self.n) * (1.0 + 0.1 * (plan.bands[0] - LOUD)) };
            *token = self.config.codec.encode(self.gain * sample);
            self.n += 1;
        }
        Ok(())
    }
    fn score(&mut self, _: &[Token], nll: &mut [f32]) -> Result<(), EngineError> {
        nll.fill(1.0);
        Ok(())
    }
    fn score_plan(&mut self, tokens: &[Token]) -> Result<Vec<f32>, EngineError> {
        Ok(vec![8.0; (tokens.len() / HOP).saturating_sub(1)])
    }
    fn save(&self) -> Result<Vec<u8>, EngineError> {
        Ok([&self.n.to_le_bytes()[..], &[u8::from(self.silent)]].concat())
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), EngineError> {
        self.n = u64::from_le_bytes(state[..8].try_into().unwrap());
        self.silent = state[8] == 1;
        Ok(())
    }
}

fn path(engine: &mut Failing, seed: u64, governed: bool) -> Path {
    let prompt = engine.prompt();
    Path::new(engine, &Options { seed, ..Options::default() }, &prompt, governed).unwrap()
}

fn frames(path: &mut Path, engine: &mut dyn Engine, n: usize) -> Vec<Vec<Token>> {
    (0..n).map(|_| path.next(engine).unwrap().tokens).collect()
}

/// Longest silence, seconds.
fn silence_s(frames: &[Vec<Token>]) -> f64 {
    let silence = Codec::default().encode(0.0);
    let longest = frames.split(|frame| frame.iter().any(|&token| token != silence)).map(<[_]>::len).max();
    (longest.unwrap_or(0) * HOP) as f64 / 16_000.0
}

#[test]
fn a_model_that_falls_silent_plays_on_for_minutes() {
    let (mut fell_silent, mut interventions) = (0, 0);
    for seed in 0..10 {
        let mut engine = Failing::new(false);
        let mut bare = path(&mut engine, seed, false);
        fell_silent += u32::from(silence_s(&frames(&mut bare, &mut engine, 31 * 30)) > 1.0);
        let mut engine = Failing::new(false);
        let mut governed = path(&mut engine, seed, true);
        let heard = silence_s(&frames(&mut governed, &mut engine, 31 * 30));
        assert!(heard < 1.0, "seed {seed}: {heard} s of silence");
        let done = governed.interventions();
        assert!(done.iter().all(|i| i.alarm == Alarm::Silence && i.from_s < i.at_s), "{done:?}");
        interventions += done.len();
    }
    assert!(fell_silent >= 7 && interventions >= 20, "{fell_silent} of 10 fell silent, {interventions} interventions");
}

#[test]
fn what_cannot_be_helped_is_let_pass_after_a_few_tries() {
    let mut engine = Failing::new(true);
    let mut path = path(&mut engine, 1, true);
    frames(&mut path, &mut engine, 31 * 20);
    let done = path.interventions();
    assert!((1..=40).contains(&done.len()), "{} interventions in 20 s", done.len());
}

#[test]
fn a_path_without_failures_is_that_of_no_governor() {
    let play = |governed| {
        let mut engine = Failing::new(false);
        // A seed that lives for three seconds.
        let mut path = path(&mut engine, 5, governed);
        frames(&mut path, &mut engine, 60)
    };
    assert_eq!(play(true), play(false));
}

#[test]
fn going_back_takes_another_way_from_what_was_played() {
    let mut engine = Failing::new(false);
    let mut path = path(&mut engine, 3, true);
    path.keep(31 * 8);
    let first = frames(&mut path, &mut engine, 100);
    let back = path.vary(&mut engine, 50).unwrap();
    assert!((50..50 + 70).contains(&back), "{back}");
    assert_eq!(path.released(), 100 - back);
    let second = frames(&mut path, &mut engine, back as usize);
    assert_ne!(second, first[100 - back as usize..]);
    // Further than it remembers: as far as it does.
    let back = path.vary(&mut engine, 100_000).unwrap();
    assert!((1..=100).contains(&back), "{back}");
}

#[test]
fn live_there_is_something_to_play_while_another_way_is_taken() {
    let mut engine = Failing::new(true);
    let mut path = path(&mut engine, 1, true);
    path.keep(31 * 8);
    while !path.is_ahead() {
        path.advance(&mut engine).unwrap();
    }
    for i in 0..31 * 20 {
        path.release(&mut engine).unwrap();
        // As one who makes two frames while one plays.
        path.advance(&mut engine).unwrap();
        assert!(path.has_held(), "frame {i}");
        path.advance(&mut engine).unwrap();
    }
    assert!(!path.interventions().is_empty());
}

#[test]
fn a_level_that_was_asked_for_alarms_nobody() {
    let interventions = |level_db: f32| {
        let mut engine = Failing::new(false);
        let prompt = engine.prompt();
        let wave = WaveSampling { level_db, ..WaveSampling::default() };
        let mut path = Path::new(&mut engine, &Options { wave, ..Options::default() }, &prompt, true).unwrap();
        frames(&mut path, &mut engine, 1200);
        path.interventions().iter().map(|i| (i.alarm, i.from_s, i.attempt)).collect::<Vec<_>>()
    };
    let usual = interventions(0.0);
    assert!(!usual.is_empty());
    assert_eq!([interventions(9.0), interventions(-18.0)], [usual.clone(), usual]);
}

#[test]
fn sound_settings_and_guides_act_on_the_very_next_frame() {
    let mut engine = Failing::new(false);
    let mut path = path(&mut engine, 3, true);
    let before = frames(&mut path, &mut engine, 21);
    path.set_guide(&mut engine, Guide::Still(vec![0.5; 148])).unwrap();
    assert_eq!(path.next(&mut engine).unwrap().plan.bands, [0.5; 148]);
    path.set_guide(&mut engine, Guide::Own).unwrap();
    assert_ne!(path.next(&mut engine).unwrap().plan.bands, [0.5; 148]);
    let bands = ndarray::Array2::from_shape_fn((2, 148), |(frame, _)| [0.1, 0.2][frame]).into();
    path.set_guide(&mut engine, Guide::Other { bands, start: 23 }).unwrap();
    let plans: Vec<f32> = (0..3).map(|_| path.next(&mut engine).unwrap().plan.bands[0]).collect();
    assert_eq!(plans[..2], [0.1, 0.2]);
    assert_ne!(plans[2], 0.2);
    // Another seed and back again, with nothing played in between, changes nothing.
    let mut engine = Failing::new(false);
    let mut same = self::path(&mut engine, 3, true);
    let options = *same.options();
    let mut played = frames(&mut same, &mut engine, 10);
    same.set_options(&mut engine, &Options { seed: 9, ..options }).unwrap();
    same.set_options(&mut engine, &options).unwrap();
    played.extend(frames(&mut same, &mut engine, 11));
    assert_eq!(played, before);
}

fn play(player: &mut Player, engine: &mut dyn Engine, seconds: f64, out: &mut Memory) -> Played {
    player.play(engine, seconds, out, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_governed_session_is_the_same_however_it_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("s.bin");
    for seed in 0..4 {
        let options = Options { seed, ..Options::default() };
        let prompt = Prompt::silence(&Codec::default());
        let mut engine = Failing::new(false);
        let mut player = Player::new(&mut engine, &prompt, &options, true).unwrap();
        let mut whole = Memory::default();
        let all = play(&mut player, &mut engine, 40.0, &mut whole).interventions;
        assert!(!all.is_empty());

        let (mut parts, mut told) = (Memory::default(), Vec::new());
        let mut engine = Failing::new(false);
        let mut player = Player::new(&mut engine, &prompt, &options, true).unwrap();
        for i in 0..16 {
            told.extend(play(&mut player, &mut engine, 2.5, &mut parts).interventions);
            if i % 3 != 2 {
                let format = WavFormat::new(16_000, 1, SampleFormat::F32);
                let recording = Recording { format, n_frames: 0 };
                Session::of(&player, &mut engine, recording).unwrap().save(&file, "m").unwrap();
                engine = Failing::new(false);
                player = Session::load(&file, "m").unwrap().resume(&mut engine).unwrap();
            }
        }
        assert!(parts.0 == whole.0, "seed {seed}: the parts are not the whole");
        assert_eq!(told, all, "seed {seed}");
    }
}
