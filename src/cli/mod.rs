//! The command line: one file per command. Data goes to stdout, messages for people to stderr.

mod backlog;
mod bench;
mod config;
mod dev;
mod logging;
mod parked;
mod send;
mod serve;
mod shell;
mod top;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit code of bad usage or config (`EX_USAGE` of sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// Durable store-and-forward event collector for edge hosts.
#[derive(Debug, Parser)]
#[command(name = "ringtail", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    Dev(dev::DevArgs),
    Send(send::SendArgs),
    Bench(bench::BenchArgs),
    Backlog(backlog::BacklogArgs),
    Parked(parked::ParkedArgs),
    Config(config::ConfigArgs),
    Top(top::TopArgs),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
}

impl Cli {
    /// Reads the command line, or says what to exit with: bad usage is explained on stderr.
    pub fn from_args() -> Result<Cli, ExitCode> {
        Cli::try_parse().map_err(|error| {
            // Nobody is left to tell if this fails.
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS }
        })
    }

    /// Runs the command until it is done.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Serve(args) => serve::run(args).await,
            Command::Dev(args) => dev::run(args).await,
            Command::Send(args) => send::run(args).await,
            Command::Bench(args) => bench::run(args).await,
            Command::Backlog(args) => backlog::run(args).await,
            Command::Parked(args) => parked::run(args).await,
            Command::Config(args) => config::run(args).await,
            Command::Top(args) => top::run(args).await,
            Command::Completions(args) => shell::completions(&args),
            Command::Man(args) => shell::man(&args),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_is_well_formed_and_shows_an_example() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        command.get_subcommands().for_each(|command| check_example(command, "ringtail"));
    }

    fn check_example(command: &clap::Command, parent: &str) {
        if command.get_name() == "help" {
            return;
        }
        let path = format!("{parent} {}", command.get_name());
        let example = command.get_after_help().map(|help| help.to_string()).unwrap_or_default();
        assert!(example.contains(&path), "{path} has no example");
        command.get_subcommands().for_each(|command| check_example(command, &path));
    }
}
