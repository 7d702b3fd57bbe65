//! `ringtail backlog`: the log, as an operator sees it and looks after it. One file per command.
//!
//! `status` and `peek` ask a running service, or look themselves. The others need the log for themselves. `peek`, `check`
//! and `export` change nothing.

mod check;
mod drain;
pub(super) mod export;
pub(super) mod filter;
mod import;
mod peek;
mod repair;
mod restore;
mod status;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use ringtail::config::{LogConfig, WalConfig, WhenFull};
use ringtail::metrics::Metrics;
use ringtail::wal::{OpenError, Wal};

/// Exit code of a check that could not be made.
const EXIT_UNCHECKED: u8 = 2;

/// Look at the backlog and after it: what is durable and not yet delivered
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail backlog status\n\n\
    Exit codes: 0 if all is well or done, 1 if not, 64 for bad usage or configuration.")]
pub struct BacklogArgs {
    #[command(subcommand)]
    command: BacklogCommand,
}

#[derive(Debug, clap::Subcommand)]
enum BacklogCommand {
    Status(status::StatusArgs),
    Peek(peek::PeekArgs),
    Check(check::CheckArgs),
    Export(export::ExportArgs),
    Import(import::ImportArgs),
    Repair(repair::RepairArgs),
    Drain(drain::DrainArgs),
}

/// Runs `ringtail backlog`.
pub async fn run(args: BacklogArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        BacklogCommand::Status(args) => status::run(args).await,
        BacklogCommand::Peek(args) => peek::run(args).await,
        BacklogCommand::Check(args) => check::run(args),
        BacklogCommand::Export(args) => export::run(args),
        BacklogCommand::Import(args) => import::run(args).await,
        BacklogCommand::Repair(args) => repair::run(args).await,
        BacklogCommand::Drain(args) => drain::run(args).await,
    }
}

pub(super) fn require_log(directory: &Path) -> anyhow::Result<()> {
    if !directory.join("wal").is_dir() {
        bail!("there is no log in {}", directory.display());
    }
    Ok(())
}

/// Says what to do about a log that is in use.
pub(super) fn alone<T>(opened: Result<T, OpenError>) -> anyhow::Result<T> {
    opened.map_err(|error| match error {
        OpenError::InUse { .. } => anyhow::Error::from(error)
            .context("this needs the log for itself: stop the service first (systemctl stop ringtail)"),
        error => error.into(),
    })
}

/// Opens the log to put batches into it. Nothing makes room for them by dropping others.
fn open_wal(config: &WalConfig, queue_bytes_max: u64) -> anyhow::Result<Wal> {
    let config = WalConfig { when_full: WhenFull::Reject, ..config.clone() };
    super::logging::init(&LogConfig { level: "warn".into(), ..LogConfig::default() })?;
    ringtail::wal::exit_on_store_panic();
    alone(Wal::open(&config, queue_bytes_max, Metrics::new()))
}

/// A bar on a terminal, nothing elsewhere.
pub(super) fn progress_bar(total: u64, template: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    ProgressBar::new(total).with_style(ProgressStyle::with_template(template).expect("the template is valid"))
}

/// Writes to the standard output, whose reader may be gone.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()).context("write to standard output")
}

pub(super) fn count(number: u64, what: &str) -> String {
    let plural = match what {
        "batch" if number != 1 => "es",
        _ if number != 1 => "s",
        _ => "",
    };
    format!("{number} {what}{plural}")
}
