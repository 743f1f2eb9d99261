//! `wavegen bench`: turns this machine's time into figures.

mod decode;
mod gpu;
mod items;
mod machine;
mod train;

use anyhow::Result;

use super::Outcome;

/// Measure how fast this machine is
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  wavegen bench decode                               how fast every engine plays
  wavegen bench decode --json > decode.json
  wavegen bench decode --engine cuda                 the same of a GPU, one stream to thousands
  wavegen bench train --threads 2                    steps of training, beside candle's own operations
  wavegen bench train --device cuda                  the same on a GPU
  wavegen bench kernels                              the training kernels on a GPU")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Decode(decode::Args),
    Kernels(gpu::Args),
    Train(train::Args),
}

pub fn run(args: &Args) -> Result<Outcome> {
    match &args.what {
        What::Decode(args) => decode::run(args),
        What::Kernels(args) => gpu::kernels(args),
        What::Train(args) => train::run(args),
    }
}
