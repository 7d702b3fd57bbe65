//! `ringtail parked drop`: gives parked events up.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use ringtail::admin::{ParkedDrop, ParkedProgress};
use ringtail::config::Config;
use ringtail::forward::ParkedFilter;
use serde::Serialize;

use super::super::EXIT_USAGE;
use super::super::backlog::{count, print};
use super::super::config::LogArgs;
use super::filter::FilterArgs;
use super::{Outcome, perform};

/// Give parked events up for good
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail parked drop --topic clickstream-page-log --dry-run\n  \
    ringtail parked drop --reason too_large --parked-until 30days --yes\n  ringtail parked drop --all\n\n\
    Needs a filter, or --all. Asks before it drops anything; what is parked after that is not dropped. It says how many\n\
    events are gone once that is durable. A running service counts each in\n\
    ringtail_forward_parked_dropped_events_total{reason=\"operator\"} and logs their number. An event that is damaged is\n\
    dropped if it was chosen by its id alone (--id, --from-id, --until-id, --all).\n\n\
    Exit codes: 0; 1 if it failed, was not confirmed, or an event is damaged and stays; 64 for bad usage.")]
pub struct DropArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Every parked event
    #[arg(long)]
    all: bool,
    /// Say how many would be dropped, and drop nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Serialize)]
struct Summary {
    dropped_events: u64,
    /// Bytes of their payloads.
    dropped_bytes: u64,
    damaged_events: u64,
    dry_run: bool,
}

/// Runs the command.
pub async fn run(args: DropArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let mut filter = args.filter.filter();
    if filter.is_empty() && !args.all {
        return Ok(refuse("give a filter, or --all for every parked event"));
    }
    if !filter.is_empty() && args.all {
        return Ok(refuse("give either a filter or --all"));
    }
    if !args.dry_run && !args.yes {
        if !io::stdin().is_terminal() {
            return Ok(refuse("nobody can be asked here: give --yes, or --dry-run"));
        }
        let Outcome { progress, .. } = drop_events(&config, &filter, true).await?;
        if progress.events == 0 {
            eprintln!("there is nothing to drop");
            return Ok(ExitCode::SUCCESS);
        }
        if !confirm(progress)? {
            eprintln!("nothing is dropped");
            return Ok(ExitCode::FAILURE);
        }
        filter.until_id = Some(progress.last_id);
    }
    let outcome = drop_events(&config, &filter, args.dry_run).await?;
    let Outcome { progress, damaged } = outcome;
    let verb = if args.dry_run { "would be dropped" } else { "dropped" };
    eprintln!("{} {verb}, {}", count(progress.events, "event"), bytesize::ByteSize::b(progress.bytes));
    if args.json {
        let summary = Summary {
            dropped_events: progress.events,
            dropped_bytes: progress.bytes,
            damaged_events: damaged,
            dry_run: args.dry_run,
        };
        print(&(serde_json::to_string(&summary)? + "\n"))?;
    }
    Ok(outcome.code())
}

pub fn refuse(message: &str) -> ExitCode {
    eprintln!("ringtail: {message}");
    ExitCode::from(EXIT_USAGE)
}

async fn drop_events(config: &Config, filter: &ParkedFilter, dry_run: bool) -> anyhow::Result<Outcome> {
    let outcome = perform(config, &ParkedDrop { filter: filter.clone(), dry_run }, &mut |_| Ok(())).await?;
    if outcome.damaged > 0 {
        eprintln!("{} cannot be read and stay: choose them by their ids", count(outcome.damaged, "event"));
    }
    Ok(outcome)
}

fn confirm(progress: ParkedProgress) -> anyhow::Result<bool> {
    let (events, bytes) = (count(progress.events, "parked event"), bytesize::ByteSize::b(progress.bytes));
    eprint!("Drop {events}, {bytes}, for good? [y/N] ");
    io::stderr().flush().context("ask")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("read the answer")?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
