//! Tokens and the plan of a recording: what the models see of it.
//!
//! `cargo run --release --example tokens -- [FILE]`

use std::path::PathBuf;

use wavegen::audio::{decode::decode_file, level, resample::resample};
use wavegen::checkpoint::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("examples/prompt.wav"), PathBuf::from);
    let model = Checkpoint::built_in()?;
    let codec = &model.config.codec;

    let clip = decode_file(&file)?;
    let mut samples = resample(&clip.downmix(), clip.sample_rate, codec.sample_rate)?;
    let gain = level::gain(&samples).ok_or("the file is silent")?;
    samples.iter_mut().for_each(|x| *x *= gain);

    let tokens = codec.encode_all(&samples);
    let plan = model.spectrum()?.analyse(&codec.decode_all(&tokens));
    let plan_tokens = model.quantizer.encode_all(plan.view())?;
    println!("{}: {:.2} s at {} Hz", file.display(), clip.duration_s(), clip.sample_rate);
    println!("{} tokens, the first of them {:?}", tokens.len(), &tokens[..tokens.len().min(12)]);
    println!("{} plan frames of {} bands", plan.nrows(), plan.ncols());
    for (k, frame) in plan_tokens.rows().into_iter().enumerate().take(5) {
        println!("frame {k}: plan tokens {frame}");
    }
    Ok(())
}
