//! `ringtail parked list`: one line an event.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use ringtail::admin::{ParkedLine, ParkedList, ParkedSummary};

use super::super::config::LogArgs;
use super::filter::FilterArgs;
use super::perform;

/// Print one line for each parked event, oldest first
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail parked list --reason too_large --limit 20\n  \
    ringtail parked list --topic clickstream-page-log --parked-from 2h --json | jq .error\n\n\
    The columns: id, when it was parked, reason, bytes of the payload, topic, client's id, Kafka's words.")]
pub struct ListArgs {
    #[command(flatten)]
    log: LogArgs,
    /// JSON lines instead of columns
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: FilterArgs,
}

/// Runs the command.
pub async fn run(args: ListArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let mut output = BufWriter::new(io::stdout());
    let command = ParkedList { filter: args.filter.filter(), summary: true };
    let outcome = perform(&config, &command, &mut |line| {
        let ParkedLine::Summary(event) = line else { return Ok(()) };
        let line = if args.json { serde_json::to_string(&event)? } else { row(&event) };
        writeln!(output, "{line}").context("write to standard output")
    })
    .await?;
    output.flush().context("write to standard output")?;
    Ok(outcome.code())
}

fn row(event: &ParkedSummary) -> String {
    let about = &event.about;
    format!(
        "{:>8}  {}  {:<15}  {:>9} B  {}  {}  {}",
        event.id,
        time(about.parked_at_ms),
        about.reason.as_str(),
        event.payload_bytes,
        about.topic.escape_debug(),
        about.connection_id.escape_debug(),
        about.error.escape_debug(),
    )
}

/// A time as people read it.
pub(super) fn time(ms: u64) -> String {
    // The last that can be written.
    let ms = ms.min(253_402_300_799_999);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}
