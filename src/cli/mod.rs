//! Turns arguments into a command's run, and its outcome into messages and an exit code.
//!
//! Audio and data go to stdout, all else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (`stream` 0: it has no
//! other end).

mod adapt;
mod bench;
mod calibrate;
mod check;
mod common;
mod r#continue;
mod detokenize;
mod device;
mod dry_run;
mod engine;
mod eval;
mod familiar;
mod free_run;
mod generate;
mod info;
mod keys;
mod memory;
mod play;
mod prepare;
mod score;
mod selftest;
mod stream;
mod token_file;
mod tokenize;
mod train;

use std::process::ExitCode;

use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};

use common::Usage;

/// Raw-audio waveform generation: a recording goes in, and it plays on.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  wavegen continue song.flac                  write song.continued.wav with 10 more seconds
  wavegen generate -o music.wav               play from nothing
  wavegen stream song.flac                    play it, and then on and on
  wavegen info                                what the built-in model is
  wavegen prepare recordings/ -o corpus/      decode once, train often
  wavegen train recordings/ -o my.safetensors --minutes 60
  wavegen adapt song.flac -o mine.safetensors

Each command's --help shows more.";

#[derive(Subcommand)]
enum Command {
    Continue(r#continue::Args),
    Generate(generate::Args),
    Stream(stream::Args),
    Prepare(prepare::Args),
    Train(train::Args),
    Adapt(adapt::Args),
    Calibrate(calibrate::Args),
    Eval(eval::Args),
    Tokenize(tokenize::Args),
    Detokenize(detokenize::Args),
    Info(info::Args),
    Bench(bench::Args),
    Selftest(selftest::Args),
}

/// What a command ended with, short of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Ctrl-C: what was made up to then is whole.
    Interrupted,
    /// What was to be checked does not hold, which has been told.
    Failed,
}

impl Cli {
    /// What the process was started with; ends it where that is no command.
    pub fn of_process() -> Self {
        // A number below zero is a number, and is told what it may be.
        let numbers = |arg: Arg| match arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        };
        let command = Self::command()
            .mut_subcommands(|command| command.mut_args(numbers).mut_subcommands(|command| command.mut_args(numbers)));
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }

    /// Most threads that the engine may use, if the user said.
    pub fn threads(&self) -> Option<usize> {
        let engine = match &self.command {
            Command::Continue(args) => &args.play.engine,
            Command::Generate(args) => &args.play.engine,
            Command::Stream(args) => &args.engine,
            Command::Eval(args) => &args.engine,
            _ => return None,
        };
        engine.threads.map(usize::from)
    }
}

/// Runs the command.
pub fn run(cli: Cli) -> ExitCode {
    let ready = common::heed_interrupt().and_then(|()| engine::check_isa_variable());
    let result = ready.and_then(|()| match cli.command {
        Command::Continue(args) => r#continue::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Stream(args) => stream::run(&args),
        Command::Prepare(args) => prepare::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Adapt(args) => adapt::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Detokenize(args) => detokenize::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Selftest(args) => selftest::run(&args),
    });
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => {
            common::say("interrupted");
            ExitCode::from(130)
        }
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        // The reader of our pipe has gone; there is nobody to tell.
        Err(error) if common::is_broken_pipe(&error) => ExitCode::FAILURE,
        Err(error) => {
            common::say(&format!("error: {}", common::one_line(&error)));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn arguments_are_consistent_and_every_command_shows_examples() {
        let command = super::Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("wavegen "), "{} has no examples", sub.get_name());
        }
    }
}
