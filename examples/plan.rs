//! The model's two halves by hand: a plan that the plan transformer makes, rendered by the wave transformer.
//!
//! `cargo run --release --example plan -- [SECONDS]` writes nothing; it prints the level of each plan frame.

use wavegen::checkpoint::Checkpoint;
use wavegen::engine::reference::ReferenceEngine;
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::metrics::level_db;
use wavegen::plan::PlanFrame;
use wavegen::rng::Rng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let seconds: f64 = std::env::args().nth(1).map_or(Ok(0.3), |s| s.parse())?;
    let model = Checkpoint::built_in()?;
    let (hop, codec) = (model.config.plan.hop, &model.config.codec);
    let mut engine = ReferenceEngine::new(&model)?;
    let chord = |i: usize| [261.6, 329.6, 392.0].map(|hz: f32| (i as f32 * hz * 0.000_392_7).sin()).iter().sum::<f32>();
    engine.prefill(&codec.encode_all(&(0..16_000).map(|i| 0.08 * chord(i)).collect::<Vec<_>>()))?;

    let mut rng = Rng::new(7);
    let mut frame = PlanFrame::default();
    let mut tokens = vec![0; hop];
    for k in 0..(seconds * f64::from(codec.sample_rate) / hop as f64).ceil() as usize {
        let uniforms: Vec<f32> = (0..model.config.plan.n_codebooks).map(|_| rng.uniform()).collect();
        engine.next_plan(&uniforms, &mut frame)?;
        let uniforms: Vec<f32> = (0..UNIFORMS_PER_SAMPLE * hop).map(|_| rng.uniform()).collect();
        engine.render(&frame, &uniforms, &mut tokens)?;
        println!("frame {k}: plan tokens {:?}, {:.1} dBFS", frame.tokens, level_db(&codec.decode_all(&tokens)));
    }
    Ok(())
}
