//! The program `wavegen`: sets up candle's threads and hands over to the command line.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    set_threads();
    cli::main()
}

/// Tells candle how many threads there are, unless the user has.
///
/// It looks for these variables at every matrix product and else parses /proc/cpuinfo, which takes longer than a model
/// step. Its own pool for element-wise operations serves one caller at a time and spins; our threads are enough.
#[allow(unsafe_code)]
fn set_threads() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, threads) in [("RAYON_NUM_THREADS", cores), ("CANDLE_NUM_THREADS", 1)] {
        if std::env::var_os(name).is_none() {
            // SAFETY: nothing has run before this, so there is no other thread that could read the environment.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
}
