//! What `wavegen continue` does, by the library: a recording goes in, and it plays on.
//!
//! `cargo run --release --example continuation -- [IN.wav [OUT.wav [SECONDS]]]`

use std::ops::ControlFlow;
use std::path::PathBuf;

use wavegen::audio::decode::decode_tail;
use wavegen::audio::{AudioSource, Decoder, SampleFormat, WavFormat};
use wavegen::checkpoint::Checkpoint;
use wavegen::engine::cpu::{CpuEngine, CpuOptions};
use wavegen::generate::{CONTEXT_S, Options, Player, Prompt};
use wavegen::sink::{Sink, WavFileSink};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let input = PathBuf::from(args.next().unwrap_or_else(|| "examples/prompt.wav".to_owned()));
    let output = args.next().map_or_else(|| std::env::temp_dir().join("continuation.wav"), PathBuf::from);
    let seconds: f64 = args.next().map_or(Ok(5.0), |seconds| seconds.parse())?;

    // Any format, rate and channel count; the model hears the end of it.
    let source = AudioSource::open(&input)?;
    let end = decode_tail(&source, CONTEXT_S)?;
    let model = Checkpoint::built_in()?;
    let prompt = Prompt::new(&end.clip, end.total_frames, &model.config.codec)?;

    let mut engine = CpuEngine::new(&model, &CpuOptions::default())?;
    let options = Options { wave: model.generation, seed: 7, ..Options::default() };
    let mut player = Player::new(&mut engine, &prompt, &options, true)?;

    // The file is there when it is whole.
    let mut sink = WavFileSink::new(&output, true)?;
    sink.start(&WavFormat::new(prompt.sample_rate(), prompt.channels(), SampleFormat::I16))?;
    sink.copy_decoded(&mut Decoder::from_source(&source)?)?;
    let played = player.play(&mut engine, seconds, &mut sink, &mut |_| ControlFlow::Continue(()))?;
    sink.finish()?;

    println!("{}: {} frames more, {} interventions", output.display(), played.n_frames, played.interventions.len());
    Ok(())
}
