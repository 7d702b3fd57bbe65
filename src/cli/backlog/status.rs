//! `ringtail backlog status`: how much waits, and in what state the log is.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use ringtail::admin::control;
use ringtail::batch::now_ms;
use ringtail::config::WalConfig;
use ringtail::forward::{OfflineSpill, SpillError};
use ringtail::wal::{self, WalStatus};
use serde::Deserialize;

use super::super::config::LogArgs;
use super::{count, print, require_log};

/// Print the size and age of the backlog, and the disk it takes
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail backlog status --directory /var/lib/ringtail")]
pub struct StatusArgs {
    #[command(flatten)]
    log: LogArgs,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct ServiceStatus {
    wal: Option<WalStatus>,
}

/// Runs the command.
pub async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config.wal,
        Err(code) => return Ok(code),
    };
    let backlog = read(&config).await?;
    print(&if args.json { serde_json::to_string_pretty(&backlog)? + "\n" } else { describe(&backlog) })?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the service that runs on the log; without one opens the log itself.
async fn read(config: &WalConfig) -> anyhow::Result<WalStatus> {
    let directory = &config.directory;
    require_log(directory)?;
    if let Some(answer) = control::get(directory, "/status").await? {
        let status = serde_json::from_slice(&answer.all().await?).context("read the service's status")?;
        let ServiceStatus { wal } = status;
        return wal.context("the service is still opening its log");
    }
    eprintln!("no service runs on {}, reading the log itself", directory.display());
    let mut status = wal::inspect(config).context("read the log")?;
    let spill = OfflineSpill::open(directory).context("open the spill")?;
    let mut spilled = 0;
    spill.read(&status.undelivered(), |_, _| {
        spilled += 1;
        Ok::<(), SpillError>(())
    })?;
    status.pending_events += spilled;
    Ok(status)
}

fn describe(backlog: &WalStatus) -> String {
    let size = |bytes: u64| bytesize::ByteSize::b(bytes).to_string();
    let age = |received_at_ms: u64| {
        let seconds = now_ms().saturating_sub(received_at_ms) / 1000;
        humantime::format_duration(Duration::from_secs(seconds)).to_string()
    };
    let full = if backlog.full { ", FULL: batches are refused" } else { "" };
    let mut text = format!(
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
    );
    if let Some(ahead) = backlog.delivered_ahead {
        text += &format!("ahead        {} delivered ahead of it\n", count(ahead.events, "event"));
    }
    if backlog.lost_batches > 0 {
        let (batches, events) = (count(backlog.lost_batches, "batch"), count(backlog.lost_events, "event"));
        text += &format!("LOST         {batches} with {events}, by damage\n");
    }
    if backlog.quarantined_stores > 0 {
        let stores = count(backlog.quarantined_stores, "small database");
        text += &format!("DAMAGED      {stores} set aside: the cursor's, or a part of the parked events\n");
    }
    if backlog.lost_batches > 0 || backlog.quarantined_segments > 0 {
        text += "what can be done: stop the service, then ringtail backlog check, ringtail backlog repair\n";
    }
    text
}
