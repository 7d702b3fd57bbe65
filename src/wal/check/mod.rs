//! Verifies a log that no process has open: every segment, every chunk, and that nothing committed is missing.
//!
//! A *problem* is something wrong with a file. *Missing* records are those between two good chunks that do not meet, or
//! between the last one and the saved end of the log; they are *salvageable* if they can still be carved out of a file.

mod report;

use std::collections::BTreeSet;

pub use report::{CheckReport, LedgerEntry, Missing, Problem, ProblemKind, Quarantined};

use super::ahead::Stretch;
use super::carved::Runs;
use super::closed::ClosedSegment;
use super::error::StoreError;
use super::losses::Loss;
use super::offline::{OfflineLog, SegmentFiles};
use super::record::{ChunkHeader, Totals, split_record};
use super::search::Unreadable;
use super::slots::{Slot, read_slot};
use super::store::{SegmentFile, is_marked, quarantined_states};

impl OfflineLog {
    /// Verifies every segment. `progress` is told the bytes of each one that is done.
    ///
    /// # Errors
    /// [`StoreError`]: the log cannot be listed or read.
    pub fn check(&self, progress: &mut dyn FnMut(u64)) -> Result<CheckReport, StoreError> {
        let mut check = Check::new(self);
        if let Err(error) = &self.meta {
            check.report.problems.push(Problem::new(ProblemKind::MetaDamaged, error.to_string()));
        }
        for files in self.segments()? {
            check.segment(&files)?;
            progress(files.bytes());
        }
        check.end()?;
        for files in self.quarantined()? {
            check.quarantined(&files)?;
            progress(files.bytes());
        }
        check.quarantined_states()?;
        Ok(check.finish())
    }
}

/// A check under way.
struct Check<'a> {
    log: &'a OfflineLog,
    report: CheckReport,
    /// The end of the last good chunk.
    at: Option<Totals>,
    /// Its segment.
    at_segment: u64,
    /// The first problem since then.
    unplaced: usize,
    /// What can be carved out of any segment.
    carved: Runs,
}

impl<'a> Check<'a> {
    fn new(log: &'a OfflineLog) -> Check<'a> {
        let mut check = Check {
            log,
            report: CheckReport::default(),
            at: None,
            at_segment: log.cursor_segment().saturating_sub(1),
            unplaced: 0,
            carved: Runs::default(),
        };
        check.report.cursor_sequence = check.cursor().map(|cursor| cursor.sequence);
        check
    }

    fn cursor(&self) -> Option<Totals> {
        self.log.meta.as_ref().ok()?.saved.map(|(cursor, _)| cursor.totals)
    }

    fn problem(&mut self, kind: ProblemKind, segment: u64, slot: Option<u32>, detail: impl Into<String>) {
        self.report.problems.push(Problem { segment: Some(segment), slot, ..Problem::new(kind, detail) });
    }

    /// A segment of the log, in its turn.
    fn segment(&mut self, files: &SegmentFiles) -> Result<(), StoreError> {
        let id = files.id;
        let carved = self.carve(files)?;
        if !is_marked(&files.path) {
            if id < self.log.cursor_segment() || carved.iter().next().is_none() {
                // Never used, or delivered: the next start removes what is left of it.
                return Ok(());
            }
            self.problem(ProblemKind::MarkerMissing, id, None, "the next start marks the segment anew");
        }
        self.report.segments += 1;
        self.slots(files, true)
    }

    /// Notes what can be carved out of a segment.
    fn carve(&mut self, files: &SegmentFiles) -> Result<Runs, StoreError> {
        let mut runs = Runs::default();
        for record in files.records()? {
            match record {
                Ok(record) => {
                    runs.add(record.run);
                    self.carved.add(record.run);
                }
                Err(error) => self.problem(ProblemKind::Unreadable, files.id, None, describe(&error)),
            }
        }
        Ok(runs)
    }

    /// Goes through the slots of a segment.
    fn slots(&mut self, files: &SegmentFiles, in_log: bool) -> Result<(), StoreError> {
        match ClosedSegment::open(&files.path.join("db"), Unreadable::Zeroes) {
            Ok(file) => {
                self.walk(files.id, &file, in_log)?;
            }
            Err(error) if error.is_damage() => self.problem(ProblemKind::DoesNotOpen, files.id, None, describe(&error)),
            Err(error) => self.problem(ProblemKind::Unreadable, files.id, None, describe(&error)),
        }
        Ok(())
    }

    fn walk(&mut self, id: u64, file: &dyn SegmentFile, in_log: bool) -> Result<(), StoreError> {
        let (slots, mut slot, mut damaged) = (file.slots(), 0, false);
        while slot < slots {
            let at = slot;
            slot += 1;
            match read_slot(file, at, slots)? {
                Slot::Empty => {}
                // The process ended while it wrote them: nobody got an ack.
                Slot::Torn => break,
                // A rest of the damaged chunk before it.
                Slot::Part if damaged => {}
                Slot::Part => {
                    damaged = true;
                    self.problem(ProblemKind::DamagedChunk, id, Some(at), "the parts before it are missing");
                }
                Slot::Damaged(reason) => {
                    damaged = true;
                    self.problem(ProblemKind::DamagedChunk, id, Some(at), reason);
                }
                Slot::Chunk { header, body, next_slot } => {
                    (slot, damaged) = (next_slot, false);
                    match end_of(&header, body) {
                        Some(end) if in_log => self.chunk(id, header.before, end)?,
                        Some(_) => {}
                        None => self.problem(ProblemKind::DamagedChunk, id, Some(at), "its content is malformed"),
                    }
                }
            }
        }
        Ok(())
    }

    /// A good chunk of the log.
    fn chunk(&mut self, id: u64, before: Totals, end: Totals) -> Result<(), StoreError> {
        self.report.chunks += 1;
        self.report.batches += end.sequence - before.sequence;
        self.report.events += end.events - before.events;
        let at = self.at.or(self.cursor()).unwrap_or(before);
        if end.sequence > at.sequence || self.at.is_none() {
            self.gap(at, before, id)?;
            (self.at, self.at_segment) = (Some(end), id);
        }
        Ok(())
    }

    /// There is no good chunk between two places, the second one in segment `to_segment`.
    fn gap(&mut self, from: Totals, to: Totals, to_segment: u64) -> Result<(), StoreError> {
        let since = std::mem::replace(&mut self.unplaced, self.report.problems.len());
        let [before, after] = self.undelivered_parts(from, to);
        self.gap_part(before, to_segment, since)?;
        self.gap_part(after, to_segment, since)
    }

    /// What of it was not delivered ahead of the cursor, before and after what was.
    fn undelivered_parts(&self, from: Totals, to: Totals) -> [(Totals, Totals); 2] {
        let ahead = self.log.meta.as_ref().ok().and_then(|meta| meta.ahead);
        let Some(Stretch { from: begin, to: end }) = ahead else { return [(from, to), (to, to)] };
        let least = |one: Totals, other: Totals| if one.sequence <= other.sequence { one } else { other };
        let most = |one: Totals, other: Totals| if one.sequence >= other.sequence { one } else { other };
        [(from, least(to, begin.totals)), (most(from, end.totals), to)]
    }

    fn gap_part(&mut self, (from, to): (Totals, Totals), to_segment: u64, since: usize) -> Result<(), StoreError> {
        if to.sequence <= from.sequence {
            return Ok(());
        }
        let mut explained = false;
        for problem in &mut self.report.problems[since..] {
            if problem.kind.loses_records() {
                explained = true;
                (problem.first_sequence, problem.last_sequence) = (Some(from.sequence), Some(to.sequence - 1));
            }
        }
        if !explained {
            self.explain(to_segment, (from.sequence, to.sequence - 1))?;
        }
        // What was delivered is not missed.
        let from = self.cursor().filter(|cursor| cursor.sequence > from.sequence).unwrap_or(from);
        if to.sequence > from.sequence {
            self.report.missing.push(Missing {
                first_sequence: from.sequence,
                last_sequence: to.sequence - 1,
                events: to.events.saturating_sub(from.events),
                salvageable_batches: 0,
                in_ledger: false,
            });
        }
        Ok(())
    }

    /// Nothing wrong was met where records are missing: either a segment is not there, or chunks are gone without a trace.
    fn explain(&mut self, to_segment: u64, (first_sequence, last_sequence): (u64, u64)) -> Result<(), StoreError> {
        let there: BTreeSet<u64> =
            self.log.segments()?.iter().chain(&self.log.quarantined()?).map(|files| files.id).collect();
        let absent = (self.at_segment + 1..to_segment).filter(|id| !there.contains(id));
        let mut found: Vec<Problem> = absent
            .map(|id| Problem { segment: Some(id), ..Problem::new(ProblemKind::SegmentMissing, "it was deleted") })
            .collect();
        if found.is_empty() {
            let problem = Problem::new(ProblemKind::ChunksMissing, "nothing is where some were committed");
            found.push(Problem { segment: Some(self.at_segment), ..problem });
        }
        let (first_sequence, last_sequence) = (Some(first_sequence), Some(last_sequence));
        let placed = found.into_iter().map(|problem| Problem { first_sequence, last_sequence, ..problem });
        self.report.problems.extend(placed);
        self.unplaced = self.report.problems.len();
        Ok(())
    }

    /// The log ends here.
    fn end(&mut self) -> Result<(), StoreError> {
        let saved = self.log.meta.as_ref().ok().and_then(|meta| meta.saved);
        let at = self.at.or(self.cursor()).unwrap_or(Totals::ZERO);
        let end = saved.map(|(_, tail)| tail).filter(|tail| tail.sequence > at.sequence).unwrap_or(at);
        let last_segment = self.log.segments()?.last().map_or(0, |files| files.id);
        self.gap(at, end, last_segment)?;
        self.report.next_sequence = end.sequence;
        if self.log.meta.is_ok() && saved.is_none() && self.report.chunks > 0 {
            let detail = "there is no cursor, though there is a log";
            self.report.problems.push(Problem::new(ProblemKind::MetaDamaged, detail));
        }
        Ok(())
    }

    fn quarantined(&mut self, files: &SegmentFiles) -> Result<(), StoreError> {
        let carved = self.carve(files)?;
        let batches = |run: &super::carved::Run| run.end.sequence - run.first.sequence;
        let losses = self.log.losses().iter();
        let lost_batches = losses.map(|loss| carved.count(loss.first_sequence, loss.end_sequence)).sum();
        self.report.quarantined.push(Quarantined {
            segment: files.id,
            batches: carved.iter().map(batches).sum(),
            lost_batches,
            first_sequence: carved.iter().next().map(|run| run.first.sequence),
            last_sequence: carved.iter().last().map(|run| run.end.sequence - 1),
        });
        self.slots(files, false)
    }

    /// Small maps in quarantine: `meta-1`, `parked-1`, ….
    fn quarantined_states(&mut self) -> Result<(), StoreError> {
        let names = quarantined_states(&self.log.directory)?;
        let problems = names.into_iter().map(|name| Problem::new(ProblemKind::StateQuarantined, name));
        self.report.problems.extend(problems);
        Ok(())
    }

    fn finish(mut self) -> CheckReport {
        let losses = self.log.losses();
        for missing in &mut self.report.missing {
            let (first, end) = (missing.first_sequence, missing.last_sequence + 1);
            missing.salvageable_batches = self.carved.count(first, end);
            let covered = |loss: &Loss| loss.end_sequence.min(end).saturating_sub(loss.first_sequence.max(first));
            missing.in_ledger = losses.iter().map(covered).sum::<u64>() == end - first;
        }
        let entry = |loss: &Loss| LedgerEntry {
            loss: *loss,
            salvageable_batches: self.carved.count(loss.first_sequence, loss.end_sequence),
        };
        self.report.losses = losses.iter().map(entry).collect();
        self.report
    }
}

/// The totals after a chunk; none if a record of it does not decode.
fn end_of(header: &ChunkHeader, mut body: bytes::Bytes) -> Option<Totals> {
    let mut totals = header.before;
    for _ in 0..header.records {
        let record = split_record(&mut body).ok()?;
        totals = record.after(totals);
        record.decode().ok()?;
    }
    Some(totals)
}

/// An error and its causes.
fn describe(error: &StoreError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
