//! Turns a command line into calls of the library.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
