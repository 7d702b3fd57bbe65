//! `ringtail backlog`: the log, as an operator sees it.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use ringtail::admin::control;
use ringtail::batch::now_ms;
use serde::Deserialize;

use super::config::DirectoryArgs;

/// Look at the backlog: what is durable and not yet delivered
#[derive(clap::Args)]
pub struct BacklogArgs {
    #[command(subcommand)]
    command: BacklogCommand,
}

#[derive(clap::Subcommand)]
enum BacklogCommand {
    /// Print the size and age of the backlog, and the disk it takes
    #[command(after_help = "Example:\n  ringtail backlog status --directory /var/lib/ringtail")]
    Status(StatusArgs),
}

#[derive(clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    directory: DirectoryArgs,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `ringtail backlog`.
pub async fn run(args: BacklogArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        BacklogCommand::Status(args) => status(args).await,
    }
}

#[derive(Deserialize)]
struct ServiceStatus {
    wal: serde_json::Value,
}

/// What is printed; the service may know more.
#[derive(Deserialize)]
struct Backlog {
    pending_batches: u64,
    pending_events: u64,
    pending_bytes: u64,
    oldest_pending_received_at_ms: Option<u64>,
    disk_bytes: u64,
    disk_limit_bytes: u64,
    free_bytes: u64,
    full: bool,
    segments: u64,
    quarantined_segments: u64,
}

async fn status(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let directory = match args.directory.find() {
        Ok(directory) => directory,
        Err(code) => return Ok(code),
    };
    let Some(answer) = control::get(&directory, "/status").await? else {
        bail!("no service runs on {}", directory.display());
    };
    let status: ServiceStatus = serde_json::from_slice(&answer.all().await?).context("read the service's status")?;
    if status.wal.is_null() {
        bail!("the service is still opening its log");
    }
    let text = if args.json {
        serde_json::to_string_pretty(&status.wal)? + "\n"
    } else {
        describe(&serde_json::from_value(status.wal).context("read the service's status")?)
    };
    io::stdout().write_all(text.as_bytes()).context("write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn describe(backlog: &Backlog) -> String {
    let size = |bytes: u64| bytesize::ByteSize::b(bytes).to_string();
    let age = |received_at_ms: u64| {
        let seconds = now_ms().saturating_sub(received_at_ms) / 1000;
        humantime::format_duration(Duration::from_secs(seconds)).to_string()
    };
    let full = if backlog.full { ", FULL: batches are refused" } else { "" };
    format!(
        "pending      {} events in {} batches, {}\n\
         oldest       {}\n\
         disk         {} of {}{full}\n\
         free         {}\n\
         segments     {}, {} quarantined\n",
        backlog.pending_events,
        backlog.pending_batches,
        size(backlog.pending_bytes),
        backlog.oldest_pending_received_at_ms.map_or_else(|| "none".into(), age),
        size(backlog.disk_bytes),
        size(backlog.disk_limit_bytes),
        size(backlog.free_bytes),
        backlog.segments,
        backlog.quarantined_segments,
    )
}
