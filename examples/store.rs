//! Stores a model in another precision: `cargo run --release --example store -- in.safetensors out.safetensors int8`.
//! `built-in` for the model inside the program; `f32`, `f16` or `int8`.

use std::path::Path;

use wavegen::checkpoint::{Checkpoint, CheckpointError, Precision};

const USAGE: &str = "usage: store built-in|IN.safetensors OUT.safetensors f32|f16|int8";

fn main() -> Result<(), CheckpointError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let precision =
        |name: &str| [Precision::F32, Precision::F16, Precision::Int8].into_iter().find(|p| p.name() == name);
    let Some((input, output, precision)) = (match &args[..] {
        [input, output, name] => precision(name).map(|precision| (input, output, precision)),
        _ => None,
    }) else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let checkpoint = match input.as_str() {
        "built-in" => Checkpoint::built_in()?,
        path => Checkpoint::load(Path::new(path))?,
    };
    checkpoint.save(Path::new(output), precision)
}
