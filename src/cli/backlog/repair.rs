//! `ringtail backlog repair`: puts what quarantined segments still hold, and nobody has delivered, into the log again.

use std::process::ExitCode;

use anyhow::Context;
use ringtail::wal::{CarvedRecord, Loss, OfflineLog, Run, SegmentFiles, Wal};
use serde::Serialize;

use super::super::config::LogArgs;
use super::restore::{QUEUE_BYTES_MAX, RestoreError, Restorer};
use super::{alone, count, open_wal, print, progress_bar, require_log};

/// Put salvageable batches of quarantined segments into the log again
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail backlog repair --dry-run\n  ringtail backlog repair\n  \
    ringtail backlog repair --segment 42 --discard\n\n\
    The service sets aside what it finds damaged, and writes the batches that it misses into a ledger of losses. Those of\n\
    them that a quarantined segment still holds are appended to the log, with the time they were first received, and struck\n\
    off the ledger once they are durable. Interrupted, it can be run again; what it was doing may then be delivered twice.\n\n\
    --discard removes the segments afterwards, and strikes what stays lost in them off the ledger: without --segment\n\
    everything. Nothing is discarded while anything of it could not be put back.\n\n\
    Exit codes: 0 if nothing stays lost, 1 if something does or the log is full, 64 for bad usage.")]
pub struct RepairArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Only this segment
    #[arg(long, value_name = "ID")]
    segment: Option<u64>,
    /// Say what would be done, and do nothing
    #[arg(long, conflicts_with = "discard")]
    dry_run: bool,
    /// Remove the segments afterwards, and strike the rest of their losses off the ledger
    #[arg(long)]
    discard: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// What became of it all.
#[derive(Debug, Default, Serialize)]
struct Summary {
    segments: Vec<Segment>,
    /// What stays in the ledger.
    still_lost: Vec<Loss>,
    /// What the operator has given up.
    written_off: Vec<Loss>,
    dry_run: bool,
}

#[derive(Debug, Serialize)]
struct Segment {
    segment: u64,
    /// Batches and events put into the log again; or, in a dry run, that would be.
    recovered_batches: u64,
    recovered_events: u64,
    /// Batches that it holds and that were not lost.
    delivered_batches: u64,
    /// Why not all of it was read.
    error: Option<String>,
    discarded: bool,
}

/// Runs the command.
pub async fn run(args: RepairArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    require_log(&config.wal.directory)?;
    let summary = if args.dry_run {
        let log = alone(OfflineLog::open(&config.wal))?;
        let segments = chosen(&args, &log.quarantined()?)?;
        let planned = segments.iter().map(|files| plan(log.losses(), files)).collect::<Result<_, _>>()?;
        Summary { segments: planned, still_lost: log.losses().to_vec(), written_off: Vec::new(), dry_run: true }
    } else {
        let wal = open_wal(&config.wal, QUEUE_BYTES_MAX)?;
        let result = repair(&args, &wal).await;
        wal.close();
        result?
    };
    print(&if args.json { serde_json::to_string_pretty(&summary)? + "\n" } else { describe(&summary) })?;
    Ok(if summary.still_lost.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chosen(args: &RepairArgs, all: &[SegmentFiles]) -> anyhow::Result<Vec<SegmentFiles>> {
    let mut segments = all.to_vec();
    if let Some(id) = args.segment {
        segments.retain(|segment| segment.id == id);
        anyhow::ensure!(!segments.is_empty(), "there is no segment {id} in quarantine");
    }
    Ok(segments)
}

async fn repair(args: &RepairArgs, wal: &Wal) -> anyhow::Result<Summary> {
    let all = wal.quarantined()?;
    let segments = chosen(args, &all)?;
    let bytes = segments.iter().map(SegmentFiles::bytes).sum();
    let progress = progress_bar(bytes, "{wide_bar} {bytes}/{total_bytes} searched, {eta} left");
    let mut summary = Summary::default();
    for files in &segments {
        summary.segments.push(salvage(wal, files).await?);
        progress.inc(files.bytes());
    }
    progress.finish_and_clear();
    if args.discard {
        for (files, outcome) in
            segments.iter().zip(&mut summary.segments).filter(|(_, outcome)| outcome.error.is_none())
        {
            wal.discard(files).with_context(|| format!("cannot remove segment {}", files.id))?;
            outcome.discarded = true;
        }
        let discarded = |id: u64| summary.segments.iter().any(|segment| segment.segment == id && segment.discarded);
        let mut losses = wal.losses();
        // What is still in the log itself is set aside when it is delivered, and can be salvaged then.
        losses.retain(|loss| !wal.holds_segment(loss.segment));
        losses.retain(|loss| owner(loss, &all).map_or(args.segment.is_none(), discarded));
        wal.write_off(&losses)?;
        summary.written_off = losses;
    }
    summary.still_lost = wal.losses();
    Ok(summary)
}

/// The segment that held lost records: the one that the ledger names, or the last one before it that was set aside.
fn owner(loss: &Loss, quarantined: &[SegmentFiles]) -> Option<u64> {
    quarantined.iter().map(|segment| segment.id).filter(|id| *id <= loss.segment).max()
}

fn is_lost(losses: &[Loss], record: &CarvedRecord) -> bool {
    losses.iter().any(|loss| (loss.first_sequence..loss.end_sequence).contains(&record.sequence.0))
}

/// What a repair of one segment would do.
fn plan(losses: &[Loss], files: &SegmentFiles) -> anyhow::Result<Segment> {
    let mut segment = Segment::new(files.id);
    for record in files.records()? {
        match record {
            Ok(record) if is_lost(losses, &record) => {
                segment.recovered_batches += 1;
                segment.recovered_events += u64::from(record.batch.request.event_count());
            }
            Ok(_) => segment.delivered_batches += 1,
            Err(error) => segment.error = Some(format!("{:#}", anyhow::Error::from(error))),
        }
    }
    Ok(segment)
}

/// Appends the lost batches of one segment to the log, waits until they are durable, and strikes them off the ledger.
async fn salvage(wal: &Wal, files: &SegmentFiles) -> anyhow::Result<Segment> {
    let losses = wal.losses();
    let mut segment = Segment::new(files.id);
    let mut restorer = Restorer::new(wal);
    let mut pushed = Ok(());
    for record in files.records()? {
        match record {
            Ok(record) if is_lost(&losses, &record) => {
                let CarvedRecord { run, batch, .. } = record;
                let events = u64::from(batch.request.event_count());
                pushed = restorer.push(batch, (run, events)).await;
                if pushed.is_err() {
                    break;
                }
            }
            Ok(_) => segment.delivered_batches += 1,
            Err(error) => segment.error = Some(format!("{:#}", anyhow::Error::from(error))),
        }
    }
    let finished = restorer.finish().await;
    // Also after an error: what is in the log again must not come a second time.
    let committed = || restorer.committed.iter().chain(&restorer.committed_behind);
    let runs: Vec<Run> = committed().map(|(run, _)| *run).collect();
    wal.recovered(&runs).context("cannot strike what was recovered off the ledger of losses")?;
    segment.recovered_batches = runs.len() as u64;
    segment.recovered_events = committed().map(|(_, events)| events).sum();
    let stopped: Result<(), RestoreError> = pushed.and(finished);
    stopped.with_context(|| {
        let batches = count(segment.recovered_batches, "batch");
        format!("{batches} of segment {} are in the log again, the rest is not", files.id)
    })?;
    Ok(segment)
}

impl Segment {
    fn new(segment: u64) -> Segment {
        let (recovered_batches, recovered_events, delivered_batches) = (0, 0, 0);
        Segment { segment, recovered_batches, recovered_events, delivered_batches, error: None, discarded: false }
    }
}

fn describe(summary: &Summary) -> String {
    let mut text = String::new();
    let verb = if summary.dry_run { "would be put into the log again" } else { "put into the log again" };
    for segment in &summary.segments {
        let (batches, events) = (count(segment.recovered_batches, "batch"), count(segment.recovered_events, "event"));
        let delivered = segment.delivered_batches;
        text += &format!("segment {}: {batches} with {events} {verb}; {delivered} not lost", segment.segment);
        text += &segment.error.as_ref().map_or(String::new(), |error| format!("; NOT READ TO ITS END: {error}"));
        text += if segment.discarded { "; removed\n" } else { "\n" };
    }
    if summary.segments.is_empty() {
        text += "no segment is in quarantine\n";
    }
    for (what, losses) in [("written off", &summary.written_off), ("still lost", &summary.still_lost)] {
        for loss in losses {
            let (first, last) = (loss.first_sequence, loss.end_sequence - 1);
            text += &format!("{what}: sequences {first} to {last}, {}\n", count(loss.events, "event"));
        }
    }
    text
}
