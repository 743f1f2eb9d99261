//! The program `wavegen`: sets up candle's threads and hands over to the command line.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::of_process();
    set_threads(cli.threads());
    cli::run(cli)
}

/// Tells candle and rayon how many threads there are: as many as asked for, or as there are cores, unless the environment
/// says it.
///
/// It looks for these variables at every matrix product and else parses /proc/cpuinfo, which takes longer than a model
/// step. Its own pool for element-wise operations serves one caller at a time and spins; our threads are enough.
#[allow(unsafe_code)]
fn set_threads(asked: Option<usize>) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, threads, asked) in
        [("RAYON_NUM_THREADS", asked.unwrap_or(cores), asked.is_some()), ("CANDLE_NUM_THREADS", 1, false)]
    {
        if asked || std::env::var_os(name).is_none() {
            // SAFETY: nothing but the reading of arguments has run before this, so there is no other thread that could read the environment.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
}
