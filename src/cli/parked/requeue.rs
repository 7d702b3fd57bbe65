//! `ringtail parked requeue`: puts parked events back into the backlog.

use std::process::ExitCode;

use ringtail::admin::ParkedRequeue;
use serde::Serialize;

use super::super::backlog::{count, print};
use super::super::config::LogArgs;
use super::discard::refuse;
use super::filter::FilterArgs;
use super::perform;

/// Put parked events back into the backlog, to be delivered
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail parked requeue --topic clickstream-page-log\n  \
    ringtail parked requeue --reason invalid_topic --to clickstream-other-log\n  ringtail parked requeue --all --dry-run\n\n\
    They queue up, in the order in which they were parked, behind what already waits for their topic on disk, and before what\n\
    comes later. What Kafka refuses again is parked again. A crash in the middle may leave an event both in the backlog and\n\
    parked, never in neither. Counted in ringtail_forward_requeued_events_total.\n\n\
    Exit codes: 0; 1 if it failed, or an event is damaged and stays; 64 for bad usage.")]
pub struct RequeueArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Every parked event
    #[arg(long)]
    all: bool,
    /// Send them to this topic instead of their own
    #[arg(long, value_name = "TOPIC")]
    to: Option<String>,
    /// Say how many would be requeued, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Serialize)]
struct Summary {
    requeued_events: u64,
    /// Bytes of their payloads.
    requeued_bytes: u64,
    damaged_events: u64,
    dry_run: bool,
}

/// Runs the command.
pub async fn run(args: RequeueArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let filter = args.filter.filter();
    if filter.is_empty() != args.all {
        return Ok(refuse("give either a filter, or --all for every parked event"));
    }
    let command = ParkedRequeue { filter, topic: args.to, dry_run: args.dry_run };
    let outcome = perform(&config, &command, &mut |_| Ok(())).await?;
    let progress = outcome.progress;
    let verb = if args.dry_run { "would be requeued" } else { "requeued" };
    eprintln!("{} {verb}, {}", count(progress.events, "event"), bytesize::ByteSize::b(progress.bytes));
    if args.json {
        let summary = Summary {
            requeued_events: progress.events,
            requeued_bytes: progress.bytes,
            damaged_events: outcome.damaged,
            dry_run: args.dry_run,
        };
        print(&(serde_json::to_string(&summary)? + "\n"))?;
    }
    Ok(outcome.code())
}
