//! The command line: one file for each command.

use std::process::ExitCode;

mod backlog;
mod config;
mod parked;

/// A durable store-and-forward event collector for edge hosts.
#[derive(clap::Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Backlog(backlog::BacklogArgs),
    Config(config::ConfigArgs),
    Parked(parked::ParkedArgs),
}

/// Runs the command.
pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Backlog(args) => backlog::run(args).await,
        Command::Config(args) => config::run(args).await,
        Command::Parked(args) => parked::run(args).await,
    }
}
