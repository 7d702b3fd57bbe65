//! `ringtail backlog check`: verifies a stopped log.

use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use ringtail::config::Config;
use ringtail::forward::{ParkedError, ParkedStore};
use ringtail::wal::{CheckReport, OfflineLog, Problem, ProblemKind, SegmentFiles};

use super::super::config::LogArgs;
use super::{EXIT_UNCHECKED, alone, count, print, progress_bar, require_log};

/// Verify every chunk of a stopped log, and that nothing is missing
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ringtail backlog check\n  ringtail backlog check --json | jq .missing\n\n\
    Changes nothing: the cursor and the parked events are looked at in a copy, in the directory for temporary files (TMPDIR),\n\
    which needs room for them. Segments are read where they are.\n\n\
    Exit codes: 0 if nothing is wrong; 1 if something is, and every problem is named; 2 if the log could not be checked;\n\
    64 for bad usage.")]
pub struct CheckArgs {
    #[command(flatten)]
    log: LogArgs,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let config = match args.log.load() {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let report = match check(&config) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("ringtail: cannot check the log: {error:#}");
            return Ok(ExitCode::from(EXIT_UNCHECKED));
        }
    };
    print(&if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { describe(&report) })?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check(config: &Config) -> anyhow::Result<CheckReport> {
    require_log(&config.wal.directory)?;
    ringtail::wal::exit_on_store_panic();
    let log = alone(OfflineLog::open(&config.wal))?;
    let segments = [log.segments()?, log.quarantined()?].concat();
    let bytes = segments.iter().map(SegmentFiles::bytes).sum();
    let progress = progress_bar(bytes, "{wide_bar} {bytes}/{total_bytes} checked, {eta} left");
    let mut report = log.check(&mut |bytes| progress.inc(bytes))?;
    check_parked(&log, &mut report)?;
    progress.finish_and_clear();
    Ok(report)
}

fn check_parked(log: &OfflineLog, report: &mut CheckReport) -> anyhow::Result<()> {
    let mut damaged = |detail: String| report.problems.push(Problem::new(ProblemKind::ParkedDamaged, detail));
    let Some(copy) = log.parked()? else { return Ok(()) };
    let damage = copy.damage.into_iter().map(ParkedError::from);
    let parked = ParkedStore::open(copy.state)?;
    for error in damage.chain(parked.events(0).filter_map(Result::err)) {
        match error {
            ParkedError::Store(error) if !error.is_damage() => return Err(error.into()),
            error => damaged(format!("{:#}", anyhow::Error::from(error))),
        }
    }
    Ok(())
}

fn describe(report: &CheckReport) -> String {
    let mut text = format!(
        "{}: {} with {} and {}\n",
        count(report.segments, "segment"),
        count(report.chunks, "chunk"),
        count(report.batches, "batch"),
        count(report.events, "event"),
    );
    for problem in &report.problems {
        text += &describe_problem(problem);
    }
    for missing in &report.missing {
        let ledger = if missing.in_ledger { "; in the ledger of losses" } else { "" };
        text += &format!(
            "MISSING: sequences {} to {}, {}; {} of {} can be salvaged{ledger}\n",
            missing.first_sequence,
            missing.last_sequence,
            count(missing.events, "event"),
            missing.salvageable_batches,
            count(missing.last_sequence + 1 - missing.first_sequence, "batch"),
        );
    }
    for segment in &report.quarantined {
        let range = segment.first_sequence.zip(segment.last_sequence);
        let range = range.map_or(String::new(), |(first, last)| format!(", sequences {first} to {last}"));
        text += &format!(
            "QUARANTINED: segment {}: {} can be read{range}; {} of them lost to the log\n",
            segment.segment,
            count(segment.batches, "batch"),
            segment.lost_batches,
        );
    }
    for entry in &report.losses {
        let loss = &entry.loss;
        let found_at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(loss.found_at_ms));
        text += &format!(
            "LOST: sequences {} to {}, {}, missed in segment {} at {found_at}; {} of {} can be salvaged\n",
            loss.first_sequence,
            loss.end_sequence - 1,
            count(loss.events, "event"),
            loss.segment,
            entry.salvageable_batches,
            count(loss.end_sequence - loss.first_sequence, "batch"),
        );
    }
    text + advice(report)
}

fn describe_problem(problem: &Problem) -> String {
    let what = match problem.kind {
        ProblemKind::Unreadable => "cannot be read",
        ProblemKind::DoesNotOpen => "does not open",
        ProblemKind::MarkerMissing => "has lost its marker",
        ProblemKind::DamagedChunk => "is damaged",
        ProblemKind::ChunksMissing => "lacks chunks behind its last good one",
        ProblemKind::SegmentMissing => "is not there",
        ProblemKind::MetaDamaged => "cursor and ledger of losses are damaged: everything would be delivered again",
        ProblemKind::ParkedDamaged => "parked events are damaged",
        ProblemKind::StateQuarantined => "in quarantine",
    };
    let mut text = "PROBLEM: ".to_owned();
    if let Some(segment) = problem.segment {
        text += &format!("segment {segment}");
        text += &problem.slot.map_or(" ".into(), |slot| format!(", slot {slot}, "));
    }
    text += &format!("{what}: {}", problem.detail);
    if let Some((first, last)) = problem.first_sequence.zip(problem.last_sequence) {
        text += &format!(" (held some or all of sequences {first} to {last})");
    }
    text + "\n"
}

fn advice(report: &CheckReport) -> &'static str {
    let salvageable = report.losses.iter().any(|entry| entry.salvageable_batches > 0);
    if report.is_clean() {
        "nothing is wrong\n"
    } else if salvageable {
        "ringtail backlog repair puts what can be salvaged into the log again\n"
    } else if report.losses.is_empty() && !report.missing.is_empty() {
        "the service, or ringtail backlog drain, passes what is missing, sets it aside and notes it as lost; then ringtail \
         backlog repair can put back what can be salvaged\n"
    } else {
        ""
    }
}
