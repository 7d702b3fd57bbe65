//! `ringtail parked`: the dead letters.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, bail};
use ringtail::admin::{ParkedFilter, control};
use ringtail::app::parked_json;
use ringtail::forward::{ParkReason, ParkedStore};
use ringtail::wal;
use serde::Deserialize;

use super::config::LogArgs;

/// Look at the dead letters: events that Kafka can never take, kept with the reason
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ringtail parked list")]
pub struct ParkedArgs {
    #[command(subcommand)]
    command: ParkedCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ParkedCommand {
    /// Print one line for each parked event, oldest first
    #[command(after_help = "Example:\n  ringtail parked list --reason too_large --limit 20")]
    List(ListArgs),
    /// Print parked events with their payloads (base64), as JSON lines
    #[command(after_help = "Example:\n  ringtail parked export --topic clickstream-page-log --output parked.jsonl")]
    Export(ExportArgs),
}

#[derive(Debug, clap::Args)]
struct ListArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// JSON lines instead of columns
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// File to write, which must not exist; without it the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct FilterArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Only events for this topic
    #[arg(long)]
    topic: Option<String>,
    /// Only events parked for this reason
    #[arg(long, value_parser = parse_reason)]
    reason: Option<ParkReason>,
    /// Only events with ids from here on
    #[arg(long, value_name = "ID", default_value_t = 0)]
    from_id: u64,
    /// At most so many events
    #[arg(long)]
    limit: Option<usize>,
}

fn parse_reason(text: &str) -> Result<ParkReason, String> {
    let reason = ParkReason::ALL.into_iter().find(|reason| reason.as_str() == text);
    reason.ok_or_else(|| format!("one of {}", ParkReason::ALL.map(ParkReason::as_str).join(", ")))
}

/// What a column is made of.
#[derive(Deserialize)]
struct Row {
    id: u64,
    parked_at_ms: u64,
    reason: String,
    topic: String,
    connection_id: String,
    payload_bytes: u64,
    error: String,
}

/// A line for an event that cannot be read.
#[derive(Deserialize)]
struct Damaged {
    damaged: String,
}

/// Runs `ringtail parked`.
pub async fn run(args: ParkedArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ParkedCommand::List(args) => {
            let mut output = BufWriter::new(io::stdout());
            let print = if args.json { write } else { row };
            let code = read(&args.filter, true, &mut |line| print(&mut output, line)).await?;
            output.flush().context("write to standard output")?;
            Ok(code)
        }
        ParkedCommand::Export(args) => {
            let mut output: Box<dyn Write> = match &args.output {
                None => Box::new(BufWriter::new(io::stdout())),
                Some(path) => Box::new(create(path)?),
            };
            let code = read(&args.filter, false, &mut |line| write(&mut output, line)).await?;
            output.flush().context("write the export")?;
            Ok(code)
        }
    }
}

fn create(path: &Path) -> anyhow::Result<BufWriter<std::fs::File>> {
    let file = std::fs::File::create_new(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(BufWriter::new(file))
}

/// Gives every wanted event to `take`, as a line of JSON. Damaged ones are reported, and make the exit code 1.
async fn read(
    args: &FilterArgs,
    summary: bool,
    take: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let directory = match args.log.load() {
        Ok(config) => config.wal.directory,
        Err(code) => return Ok(code),
    };
    let filter = ParkedFilter {
        topic: args.topic.clone(),
        reason: args.reason,
        from_id: args.from_id,
        limit: args.limit,
        summary,
    };
    let answer = control::get(&directory, &format!("/parked?{}", filter.to_query())).await?;
    let mut code = ExitCode::SUCCESS;
    let mut take = |line: &[u8]| match serde_json::from_slice::<Damaged>(line) {
        Ok(Damaged { damaged }) => {
            eprintln!("ringtail: {damaged}");
            code = ExitCode::FAILURE;
            Ok(())
        }
        Err(_) => take(line),
    };
    let Some(mut answer) = answer else {
        read_offline(&directory, filter, &mut take)?;
        return Ok(code);
    };
    let mut partial = Vec::new();
    while let Some(piece) = answer.next().await? {
        partial.extend_from_slice(&piece);
        while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
            take(&partial[..=end])?;
            partial.drain(..=end);
        }
    }
    Ok(code)
}

/// Reads the store of a log that no service has open, and keeps it locked meanwhile.
fn read_offline(
    directory: &Path,
    filter: ParkedFilter,
    take: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if !directory.join("wal").is_dir() {
        bail!("there is no log in {}", directory.display());
    }
    eprintln!("no service runs on {}, reading the parked events themselves", directory.display());
    let (state, _lock) = wal::open_parked(directory).context("open the parked events")?;
    let parked = ParkedStore::open(state).context("open the parked events")?;
    let from_id = filter.from_id;
    filter.lines(parked_json(&parked, from_id)).try_for_each(|line| take(&line))
}

fn write(output: &mut dyn Write, line: &[u8]) -> anyhow::Result<()> {
    output.write_all(line).context("write a parked event")
}

fn row(output: &mut dyn Write, line: &[u8]) -> anyhow::Result<()> {
    let row: Row = serde_json::from_slice(line).context("read a parked event")?;
    let parked_at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(row.parked_at_ms));
    let error = row.error.escape_debug();
    let (topic, connection_id) = (row.topic.escape_debug(), row.connection_id.escape_debug());
    writeln!(
        output,
        "{:>8}  {parked_at}  {:<15}  {:>9} B  {topic}  {connection_id}  {error}",
        row.id, row.reason, row.payload_bytes,
    )
    .context("write a parked event")
}
