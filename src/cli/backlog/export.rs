//! `ringtail backlog export`: batches of a stopped log, or of quarantined segments, as JSON lines or raw payloads.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use ringtail::admin::BatchLine;
use ringtail::batch::{Batch, Sequence};
use ringtail::forward::{OfflineSpill, Topics};
use ringtail::wal::{CarvedRecord, OfflineLog, SegmentFiles};
use tempfile::NamedTempFile;

use super::super::config::LogArgs;
use super::filter::FilterArgs;
use super::{alone, count, progress_bar, require_log};

const HELP: &str = "\
Examples:
  ringtail backlog export --output backlog.jsonl
  ringtail backlog export --type click --from 2h | jq -r '.events[].payload' | base64 -d
  ringtail backlog export --quarantined --lost --output lost.jsonl

Writes one JSON object a batch and line:
  sequence         its place in the log
  received_at_ms   when it was received, milliseconds since the Unix epoch
  group, connection_id, req_guid
  request_bytes    bytes of the request
  events           type, topic, payload_bytes and payload (base64) of each event
  request          the request as the client sent it: a protobuf SendEventRequest, in base64
`ringtail backlog import` restores received_at_ms, group, connection_id and request, and looks at nothing else. With --type
or --topic, events and request hold the wanted events only; the rest of the request stays as it was.

--raw writes the payloads alone, each after its length as a protobuf varint: what protobuf libraries call delimited.

Events of held topics, which are on disk beside the log, come first, each as a batch of its own.

Only pending batches, unless --from-sequence or --quarantined is given. Records are found by their checksums, without opening
the segments: nothing is changed, and damaged ones give what they still hold.

Exit codes: 0; 1 if batches are missing or the log cannot be read; 64 for bad usage.";

/// Write batches of a stopped log as JSON lines, or the payloads alone
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub struct ExportArgs {
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    filter: FilterArgs,
    /// What the quarantined segments still hold, instead of the log
    #[arg(long)]
    quarantined: bool,
    /// Only batches that stand in the ledger of losses: those not delivered
    #[arg(long, requires = "quarantined")]
    lost: bool,
    /// Payloads alone, each after its length as a varint
    #[arg(long)]
    raw: bool,
    /// Leave the payloads out of `events`: half the size, and imports just the same
    #[arg(long, conflicts_with = "raw")]
    compact: bool,
    /// File to write, which must not exist; it appears when it is complete and durable. Without it the standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Default)]
struct Summary {
    batches: u64,
    events: u64,
    bytes: u64,
    missing: u64,
    unreadable: bool,
}

/// Runs the command.
pub fn run(args: ExportArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    require_log(&config.wal.directory)?;
    let log = alone(OfflineLog::open(&config.wal))?;
    let topics = Topics::new(&config.forward.topic);
    let export = |output: &mut dyn Write| {
        let mut export = Export { args: &args, log: &log, topics: &topics, output, summary: Summary::default() };
        if !args.quarantined {
            // They are older than what is in the log.
            export.spilled(&config.wal.directory)?;
        }
        export.segments()?;
        anyhow::Ok(export.summary)
    };
    let summary = match &args.output {
        None => {
            let mut output = BufWriter::new(io::stdout().lock());
            let summary = export(&mut output)?;
            output.flush().context("write to standard output")?;
            summary
        }
        Some(path) => write_file(path, export)?,
    };
    let (batches, events) = (count(summary.batches, "batch"), count(summary.events, "event"));
    eprintln!("exported {batches} with {events}, {}", bytesize::ByteSize::b(summary.bytes));
    if summary.missing > 0 {
        eprintln!("{} missing: ringtail backlog check tells more", count(summary.missing, "batch"));
    }
    let complete = summary.missing == 0 && !summary.unreadable;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes a file that appears under its name once all of it is durable.
pub(in crate::cli) fn write_file<T>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    if path.exists() {
        bail!("{} exists already", path.display());
    }
    let cannot = || format!("cannot write {}", path.display());
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut output = BufWriter::new(NamedTempFile::new_in(directory).with_context(cannot)?);
    let result = write(&mut output)?;
    let file = output.into_inner().map_err(io::IntoInnerError::into_error).with_context(cannot)?;
    file.as_file().sync_all().with_context(cannot)?;
    file.persist_noclobber(path).with_context(cannot)?;
    File::open(directory).and_then(|directory| directory.sync_all()).with_context(cannot)?;
    Ok(result)
}

/// One export under way.
struct Export<'a> {
    args: &'a ExportArgs,
    log: &'a OfflineLog,
    topics: &'a Topics,
    output: &'a mut dyn Write,
    summary: Summary,
}

impl Export<'_> {
    /// What is in the log, or in the quarantined segments.
    fn segments(&mut self) -> anyhow::Result<()> {
        let Export { args, log, .. } = *self;
        let from_sequence = args.filter.from_sequence.unwrap_or(log.cursor_sequence());
        let segments = if args.quarantined { log.quarantined()? } else { log.segments()? };
        let wanted = |segment: &&SegmentFiles| {
            args.quarantined || args.filter.from_sequence.is_some() || segment.id >= log.cursor_segment()
        };
        // Whoever says where to begin wants all from there on.
        let ahead = log.undelivered().ahead.filter(|_| args.filter.from_sequence.is_none());
        let ahead = ahead.map_or(0..0, |ahead| ahead.start.0..ahead.end.0);
        let segments: Vec<&SegmentFiles> = segments.iter().filter(wanted).collect();
        let bytes = segments.iter().map(|segment| segment.bytes()).sum();
        let progress = progress_bar(bytes, "{wide_bar} {bytes}/{total_bytes} read, {eta} left");
        let mut next = args.filter.from_sequence.is_none().then_some(from_sequence).filter(|from| *from > 0);
        for segment in segments {
            for record in segment.records()? {
                let record = match record {
                    Ok(record) => record,
                    Err(error) => {
                        eprintln!("segment {}: {:#}", segment.id, anyhow::Error::from(error));
                        self.summary.unreadable = true;
                        continue;
                    }
                };
                if args.quarantined {
                    if args.lost && !is_lost(log, &record) {
                        continue;
                    }
                } else if record.sequence.0 < from_sequence || ahead.contains(&record.sequence.0) {
                    continue;
                } else {
                    self.summary.missing += pass_ahead(&args.filter, &mut next, &ahead, record.sequence.0);
                    self.summary.missing += gap(&args.filter, &mut next, record.sequence.0);
                }
                self.write(record.sequence, &record.batch)?;
            }
            progress.inc(segment.bytes());
        }
        if !args.quarantined {
            self.summary.missing += pass_ahead(&args.filter, &mut next, &ahead, log.next_sequence());
            self.summary.missing += gap(&args.filter, &mut next, log.next_sequence());
        }
        progress.finish_and_clear();
        Ok(())
    }

    /// The pending events that are not in the log any more, each as a batch of its own.
    fn spilled(&mut self, directory: &Path) -> anyhow::Result<()> {
        let spill = OfflineSpill::open(directory).context("open the spill")?;
        let damaged = spill.read(&self.log.undelivered_to_end()?, |sequence, batch| self.write(sequence, &batch))?;
        if damaged > 0 {
            eprintln!("{} of held topics cannot be read", count(damaged, "event"));
            self.summary.unreadable = true;
        }
        Ok(())
    }

    /// Writes what is wanted of a batch, and counts it.
    fn write(&mut self, sequence: Sequence, batch: &Batch) -> anyhow::Result<()> {
        let Some(batch) = self.args.filter.apply(sequence.0, batch, self.topics) else { return Ok(()) };
        write_batch(self.args, sequence, &batch, self.topics, self.output).context("write the export")?;
        self.summary.batches += 1;
        self.summary.events += u64::from(batch.request.event_count());
        self.summary.bytes += batch.request.as_bytes().len() as u64;
        Ok(())
    }
}

fn is_lost(log: &OfflineLog, record: &CarvedRecord) -> bool {
    log.losses().iter().any(|loss| (loss.first_sequence..loss.end_sequence).contains(&record.sequence.0))
}

/// Goes on behind what was delivered ahead, if `sequence` is there. How many wanted records are missing before that.
fn pass_ahead(filter: &FilterArgs, next: &mut Option<u64>, ahead: &Range<u64>, sequence: u64) -> u64 {
    if ahead.is_empty() || sequence < ahead.end || next.is_none_or(|next| next >= ahead.end) {
        return 0;
    }
    let missing = gap(filter, next, ahead.start);
    *next = Some(ahead.end);
    missing
}

/// How many wanted records are missing before `sequence`, after the one before it.
fn gap(filter: &FilterArgs, next: &mut Option<u64>, sequence: u64) -> u64 {
    let from = next.unwrap_or(sequence);
    *next = Some(from.max(sequence + 1));
    let end = sequence.min(filter.until_sequence.map_or(u64::MAX, |until| until.saturating_add(1)));
    end.saturating_sub(from)
}

fn write_batch(
    args: &ExportArgs,
    sequence: Sequence,
    batch: &Batch,
    topics: &Topics,
    output: &mut dyn Write,
) -> io::Result<()> {
    if args.raw {
        for event in batch.request.events() {
            let mut length = Vec::new();
            prost::encode_length_delimiter(event.payload.len(), &mut length).expect("a Vec has room");
            output.write_all(&length)?;
            output.write_all(event.payload)?;
        }
        return Ok(());
    }
    let line = BatchLine::new(sequence, batch, topics, !args.compact).with_request(batch);
    serde_json::to_writer(&mut *output, &line)?;
    output.write_all(b"\n")
}
