//! `ringtail backlog peek`: the first pending batches.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, bail};
use ringtail::admin::{BatchLine, PeekFilter, control};
use ringtail::config::Config;
use ringtail::forward::Topics;
use ringtail::wal::OfflineLog;
use serde::Deserialize;

use super::super::config::LogArgs;
use super::{alone, require_log};

/// Print the first pending batches, oldest first: of a running service, or of a stopped log
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail backlog peek --limit 5\n  \
    ringtail backlog peek --limit 1 --payload | jq -r '.events[].payload' | base64 -d\n\n\
    Exit codes: 0, 1 if the log cannot be read.")]
pub struct PeekArgs {
    #[command(flatten)]
    log: LogArgs,
    /// At most so many batches
    #[arg(long, default_value_t = PeekFilter::default().limit)]
    limit: usize,
    /// JSON lines instead of columns
    #[arg(long)]
    json: bool,
    /// JSON lines with the payloads of the events (base64)
    #[arg(long)]
    payload: bool,
}

/// A line that says why there are no more.
#[derive(Deserialize)]
struct Broken {
    error: String,
}

/// Runs the command.
pub async fn run(args: PeekArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    require_log(&config.wal.directory)?;
    let mut output = BufWriter::new(io::stdout());
    let show = if args.json || args.payload { write } else { row };
    let filter = PeekFilter { limit: args.limit, payloads: args.payload };
    let path = format!("/backlog?{}", filter.to_query());
    let Some(mut answer) = control::get(&config.wal.directory, &path).await? else {
        eprintln!("no service runs on {}, reading the log itself", config.wal.directory.display());
        offline(&config, filter, |line| show(&mut output, line))?;
        output.flush().context("write to standard output")?;
        return Ok(ExitCode::SUCCESS);
    };
    let mut partial = Vec::new();
    while let Some(piece) = answer.next().await? {
        partial.extend_from_slice(&piece);
        let Some(end) = partial.iter().rposition(|byte| *byte == b'\n') else { continue };
        for line in partial[..=end].split_inclusive(|byte| *byte == b'\n') {
            if let Ok(Broken { error }) = serde_json::from_slice(line) {
                output.flush().context("write to standard output")?;
                bail!("the service cannot read on: {error}");
            }
            show(&mut output, line)?;
        }
        partial.drain(..=end);
    }
    output.flush().context("write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn offline(
    config: &Config,
    filter: PeekFilter,
    mut show: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let log = alone(OfflineLog::open(&config.wal))?;
    let topics = Topics::new(&config.forward.topic);
    let undelivered = log.undelivered();
    let mut left = filter.limit;
    for segment in log.segments()?.iter().filter(|segment| segment.id >= log.cursor_segment()) {
        for record in segment.records()? {
            let record = record?;
            if record.sequence < undelivered.cursor || undelivered.is_ahead(record.sequence) {
                continue;
            }
            if left == 0 {
                return Ok(());
            }
            left -= 1;
            let line = BatchLine::new(record.sequence, &record.batch, &topics, filter.payloads);
            show(&[&serde_json::to_vec(&line)?[..], b"\n"].concat())?;
        }
    }
    Ok(())
}

fn write(output: &mut dyn Write, line: &[u8]) -> anyhow::Result<()> {
    output.write_all(line).context("write to standard output")
}

fn row(output: &mut dyn Write, line: &[u8]) -> anyhow::Result<()> {
    let batch: BatchLine = serde_json::from_slice(line).context("read a batch")?;
    let received_at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(batch.received_at_ms));
    let mut topics: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for event in &batch.events {
        *topics.entry((&event.event_type, &event.topic)).or_default() += 1;
    }
    let topics = topics.iter().map(|((event_type, topic), events)| {
        format!("{events} × {} → {}", event_type.escape_debug(), topic.escape_debug())
    });
    writeln!(
        output,
        "{:>10}  {received_at}  {:>9} B  {}  {}  {}  {}",
        batch.sequence.0,
        batch.request_bytes,
        batch.group.escape_debug(),
        batch.connection_id.escape_debug(),
        batch.req_guid.escape_debug(),
        topics.collect::<Vec<_>>().join(", "),
    )
    .context("write to standard output")
}
