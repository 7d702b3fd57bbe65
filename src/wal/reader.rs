//! Reads the log in order, from the cursor.
//!
//! The reader trusts no byte: every chunk must match its checksum and begin where the one before it ended. Where one does
//! not, the totals in the next good chunk say exactly which sequences and how many events are missing; that is logged,
//! counted as dropped for damage, and reading goes on. A segment that will not open is set aside, one with damage when it
//! is trimmed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::ahead::Stretch;
use super::error::{ReadError, StoreError};
use super::log::{Log, Position, Shared};
use super::losses::Loss;
use super::record::{ChunkError, ChunkHeader, Totals, split_record};
use super::slots::{Slot, read_slot};
use super::store::{Readable, SegmentFile};
use crate::batch::{Batch, Sequence, now_ms};

/// One batch, read back from the log.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its place in the order of the log.
    pub sequence: Sequence,
    /// The batch, as it was admitted.
    pub batch: Batch,
    /// The place after it: what [`super::Wal::deliver`] takes once every event of it is delivered or parked.
    pub end: Position,
}

/// Reads the log in order. Blocks on the disk: for a thread of its own.
pub struct Reader {
    shared: Arc<Shared>,
    at: Position,
    open: Option<(u64, Arc<dyn SegmentFile>)>,
    chunk: Option<Chunk>,
    /// Segments read to their end since the last good chunk. Only the next one shows whether records are missing at theirs.
    left: Vec<u64>,
    /// First sequence and end of the newest run of losses without a good record between them.
    lost: (u64, Totals),
    /// Events before the end of the last loss that was counted: what is read again after a rewind is not counted again.
    counted_events: u64,
    /// It only looks: the log's state stays as it is, whatever is met.
    observer: bool,
    /// How often the disk has failed since it last did not.
    failures: u32,
    /// The segment that it does not read as a whole.
    unreadable: Option<u64>,
    /// It reads what is delivered ahead of the cursor.
    ahead: bool,
    /// Where it stops; none: at the end of the log.
    limit: Option<Totals>,
}

/// So often the disk may fail at one place before what it does not read is given up, so that the rest can be delivered.
const FAILURES_MAX: u32 = 10;

/// What is left of the chunk that is being read.
struct Chunk {
    body: Bytes,
    records_left: u32,
    /// The slot after the chunk.
    next_slot: u32,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>) -> Reader {
        let at = shared.log().cursor;
        let (lost, left) = ((0, Totals::ZERO), Vec::new());
        Reader {
            shared,
            at,
            open: None,
            chunk: None,
            lost,
            counted_events: 0,
            left,
            observer: false,
            failures: 0,
            unreadable: None,
            ahead: false,
            limit: None,
        }
    }

    /// A reader of what is delivered ahead of the cursor; none if nothing is.
    pub(super) fn ahead(shared: Arc<Shared>) -> Option<Reader> {
        let at = shared.log().ahead.as_ref()?.stretch.to;
        Some(Reader { at, ahead: true, ..Reader::new(shared) })
    }

    /// A reader that sets nothing aside and accounts for no loss: another one does.
    pub(super) fn observer(shared: Arc<Shared>) -> Reader {
        Reader { observer: true, ..Reader::new(shared) }
    }

    /// The next committed record, or none at the end of the log.
    ///
    /// # Errors
    /// [`ReadError`] when the disk fails in a way that may pass. The reader stays where it is: call again later.
    pub fn next_record(&mut self) -> Result<Option<Record>, ReadError> {
        loop {
            if let Some(record) = self.next_in_chunk() {
                return Ok(Some(record));
            }
            if !self.try_chunk()? {
                return Ok(None);
            }
        }
    }

    /// When the next record was received, milliseconds since the Unix epoch; none at the end of the log.
    ///
    /// # Errors
    /// [`ReadError`], as [`Reader::next_record`]
    pub fn next_received_at_ms(&mut self) -> Result<Option<u64>, ReadError> {
        if self.chunk.is_none() {
            self.try_chunk()?;
        }
        let next = self.chunk.as_ref().and_then(|chunk| split_record(&mut chunk.body.clone()).ok());
        Ok(next.map(|record| record.received_at_ms))
    }

    /// Whether the next record, if its chunk is loaded ([`Reader::next_received_at_ms`]), is in a segment that is given up.
    pub fn is_given_up(&self) -> bool {
        self.chunk.is_some() && self.at.segment <= self.shared.given_up.load(Ordering::Relaxed)
    }

    /// Waits until there is a next record, [`super::Wal::wake_reader`] is called, or `timeout` has passed.
    pub fn wait(&self, timeout: Duration) {
        let log = self.shared.log();
        let idle = |log: &mut super::log::Log| log.tail.sequence <= self.at.totals.sequence && !log.reader_woken;
        let waited = self.shared.log_changed.wait_timeout_while(log, timeout, idle);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0.reader_woken = false;
    }

    /// Goes back to the cursor, to read again what was not delivered.
    pub fn rewind(&mut self) {
        (self.chunk, self.open) = (None, None);
        self.left.clear();
        let log = self.shared.log();
        self.at = log.ahead.as_ref().filter(|_| self.ahead).map_or(log.cursor, |ahead| ahead.stretch.to);
    }

    /// The cursor has come to what this one delivered ahead: from now on it reads from the cursor.
    pub fn join(&mut self) {
        self.ahead = false;
    }

    fn next_in_chunk(&mut self) -> Option<Record> {
        while let Some(chunk) = &mut self.chunk {
            let (sequence, before) = (Sequence(self.at.totals.sequence), self.at.totals);
            let record = split_record(&mut chunk.body);
            chunk.records_left -= 1;
            if chunk.records_left == 0 || record.is_err() {
                self.at.slot = chunk.next_slot;
                self.chunk = None;
            }
            let slot = self.at.slot;
            match record.map(|record| (record.after(before), record.decode())) {
                Ok((after, Ok(batch))) => {
                    self.at.totals = after;
                    return Some(Record { sequence, batch, end: self.at });
                }
                // The checksum was right, so this was written wrong; the records after it are whole.
                Ok((after, Err(error))) => {
                    self.report_damage(self.at.segment, slot, &error.to_string());
                    self.lose_until(after);
                }
                // What is left of the chunk shows as missing.
                Err(error) => self.report_damage(self.at.segment, slot - 1, &error.to_string()),
            }
        }
        None
    }

    /// As [`Reader::load_chunk`]. After too many failures the next call does without what cannot be read.
    fn try_chunk(&mut self) -> Result<bool, ReadError> {
        let found = self.load_chunk();
        self.failures = if found.is_ok() { 0 } else { self.failures + 1 };
        if self.failures >= FAILURES_MAX {
            (self.unreadable, self.open, self.failures) = (Some(self.at.segment), None, 0);
        }
        found.map_err(|source| ReadError::Store { at: Sequence(self.at.totals.sequence), source })
    }

    /// Finds the chunk that holds the record at `self.at`. False: there is none yet.
    fn load_chunk(&mut self) -> Result<bool, StoreError> {
        loop {
            let (tail, next, active) = {
                let log = self.shared.log();
                // The cursor has gone on behind what another reader delivered: nobody keeps what is before it.
                if !self.observer && !self.ahead && self.at.totals.sequence < log.cursor.totals.sequence {
                    self.at = log.cursor;
                    self.left.clear();
                }
                let stretch = log.ahead.as_ref().filter(|_| !self.ahead).map(|ahead| ahead.stretch);
                self.limit = stretch.map(|stretch| stretch.from.totals);
                // Whoever only looks goes on behind what was delivered ahead.
                if let Some(Stretch { from, to }) = stretch.filter(|_| self.observer)
                    && self.at.totals.sequence >= from.totals.sequence
                {
                    self.limit = None;
                    self.at = if self.at.totals.sequence < to.totals.sequence { to } else { self.at };
                }
                (
                    self.limit.unwrap_or(log.tail),
                    log.segments.range(self.at.segment..).next().map(|(id, segment)| (*id, *segment)),
                    log.active,
                )
            };
            if self.at.totals.sequence >= tail.sequence {
                self.settle();
                self.deliver_loss();
                if active.is_none() {
                    // Nothing follows for now, and what is held open takes space even when it is removed.
                    self.open = None;
                }
                return Ok(false);
            }
            let Some((id, segment)) = next else {
                // Everything that was committed and is not here is gone.
                self.lose_until(tail);
                continue;
            };
            if id != self.at.segment {
                (self.at.segment, self.at.slot) = (id, 0);
            }
            if segment.end.is_some_and(|end| end.sequence <= self.at.totals.sequence) {
                self.leave(id, segment.end);
                continue;
            }
            let Some(file) = self.open(id)? else { continue };
            let active_slots = active.filter(|(active, _)| *active == id).map(|(_, slots)| slots);
            let slots = active_slots.unwrap_or(file.slots());
            let found = match self.find_chunk(&*file, slots, segment.end) {
                Err(_) if file.is_closed() => {
                    self.open = None;
                    continue;
                }
                found => found?,
            };
            if found {
                self.settle();
                return Ok(true);
            }
            match active_slots {
                Some(_) => self.lose_until(tail),
                None => self.leave(id, segment.end),
            }
        }
    }

    /// The handle of segment `id`; none if it had to be set aside.
    fn open(&mut self, id: u64) -> Result<Option<Arc<dyn SegmentFile>>, StoreError> {
        if let Some((open, file)) = &self.open
            && *open == id
        {
            return Ok(Some(file.clone()));
        }
        self.open = None;
        self.shared.pool.close_unused();
        let file = if self.unreadable == Some(id) { self.open_readable(id) } else { self.shared.pool.get(id) };
        match file {
            Ok(file) => {
                self.at.slot = file.seek(self.at.slot, self.at.totals.sequence);
                self.open = Some((id, file.clone()));
                Ok(Some(file))
            }
            Err(error) if !error.is_damage() => Err(error),
            Err(_) if self.observer => {
                (self.at.segment, self.at.slot) = (id + 1, 0);
                Ok(None)
            }
            Err(error) => {
                self.shared.store.quarantine(id)?;
                tracing::error!(segment = id, %error, "segment does not open, set aside");
                self.left.push(id);
                let mut log = self.shared.log();
                log.segments.remove(&id);
                log.leave_delivered_segments();
                Ok(None)
            }
        }
    }

    fn open_readable(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let Readable { file, unread_bytes, .. } = self.shared.store.open_readable(id)?;
        if unread_bytes > 0 {
            tracing::error!(
                segment = id,
                unread_bytes,
                "the disk does not read all of a segment, going on with the rest"
            );
            self.mark_damaged(id);
        }
        Ok(file)
    }

    /// Goes through the slots from `self.at` on until one holds records not read yet. What stands behind `end` was never acked
    /// (`abandoned/mod.rs`).
    fn find_chunk(&mut self, file: &dyn SegmentFile, slots: u32, end: Option<Totals>) -> Result<bool, StoreError> {
        while self.at.slot < slots {
            match read_slot(file, self.at.slot, slots)? {
                Slot::Empty => self.at.slot += 1,
                Slot::Torn => {
                    tracing::info!(segment = self.at.segment, slot = self.at.slot, "unfinished chunk, never acked");
                    self.at.slot = slots;
                }
                Slot::Part => {
                    self.report_damage(self.at.segment, self.at.slot, &ChunkError::Part.to_string());
                    self.at.slot += 1;
                }
                Slot::Damaged(reason) => {
                    self.report_damage(self.at.segment, self.at.slot, &reason);
                    self.at.slot += 1;
                }
                Slot::Chunk { header, .. } if end.is_some_and(|end| end.sequence <= header.before.sequence) => break,
                Slot::Chunk { header, body, next_slot } => {
                    if header.end_sequence() <= self.at.totals.sequence {
                        self.at.slot = next_slot;
                        continue;
                    }
                    if header.before.sequence > self.at.totals.sequence {
                        self.lose_until(header.before);
                    }
                    return Ok(self.enter(header, body, next_slot));
                }
            }
        }
        Ok(false)
    }

    /// Begins a chunk, past the records in it that were read before.
    fn enter(&mut self, header: ChunkHeader, body: Bytes, next_slot: u32) -> bool {
        self.settle();
        if header.before.sequence > self.at.totals.sequence {
            // Another one reads from the limit on.
            return true;
        }
        let mut chunk = Chunk { body, records_left: header.records, next_slot };
        for _ in header.before.sequence..self.at.totals.sequence {
            if split_record(&mut chunk.body).is_err() {
                break;
            }
            chunk.records_left -= 1;
        }
        if !self.observer
            && let Ok(record) = split_record(&mut chunk.body.clone())
        {
            let mut log = self.shared.log();
            let Log { received, ahead, .. } = &mut *log;
            let received = ahead.as_mut().filter(|_| self.ahead).map_or(received, |ahead| &mut ahead.received);
            received.note(self.at.totals.sequence, record.received_at_ms);
        }
        self.chunk = Some(chunk);
        true
    }

    /// Goes on to the segment after `id`, which was read to its end.
    fn leave(&mut self, id: u64, end: Option<Totals>) {
        if let Some(end) = end
            && end.sequence > self.at.totals.sequence
        {
            self.lose_until(end);
        }
        self.open = None;
        self.left.push(id);
        (self.at.segment, self.at.slot) = (id + 1, 0);
    }

    /// It is known what is missing before `self.at`: the segments left before it may go once they are delivered. Not before
    /// it is known: one that shows less than it should is kept aside, not removed.
    fn settle(&mut self) {
        if self.observer || self.left.is_empty() {
            return self.left.clear();
        }
        let mut log = self.shared.log();
        for id in self.left.drain(..) {
            if let Some(segment) = log.segments.get_mut(&id) {
                segment.end.get_or_insert(self.at.totals);
            }
        }
        log.leave_delivered_segments();
        drop(log);
        self.shared.log_changed.notify_all();
    }

    /// The records from `self.at` up to `until` are not in the log any more.
    fn lose_until(&mut self, until: Totals) {
        let from = self.at.totals;
        let until = self.limit.filter(|limit| limit.sequence < until.sequence).unwrap_or(until);
        if self.observer {
            self.at.totals = until;
            return;
        }
        let segment = self.mark_incomplete();
        let first_sequence = if self.lost.1 == from { self.lost.0 } else { from.sequence };
        self.lost = (first_sequence, until);
        self.at.totals = until;
        if until.events <= self.counted_events {
            return;
        }
        let events = until.events.saturating_sub(from.events.max(self.counted_events));
        self.counted_events = until.events;
        tracing::error!(
            first_sequence = from.sequence,
            last_sequence = until.sequence - 1,
            events,
            segment,
            "committed records are missing from the log"
        );
        self.shared.metrics.forward.dropped_events_damaged.increment(events);
        let (first_sequence, end_sequence) = (from.sequence, until.sequence);
        self.shared.log().note_loss(Loss { first_sequence, end_sequence, events, segment, found_at_ms: now_ms() });
    }

    /// Keeps every segment aside that may hold what is missing here. Returns the one that most surely does.
    fn mark_incomplete(&self) -> u64 {
        let mut log = self.shared.log();
        // Of the present one, something was passed over.
        let here = (self.left.is_empty() || self.at.slot > 0).then_some(self.at.segment);
        for id in self.left.iter().copied().chain(here) {
            if let Some(segment) = log.segments.get_mut(&id) {
                segment.damaged = true;
            }
        }
        // The surest of them: one that did not open, the one whose slots were passed over, or the last that showed nothing.
        let unopened = self.left.iter().find(|id| !log.segments.contains_key(id));
        let last = self.left.last().filter(|_| self.at.slot == 0);
        unopened.or(last).copied().unwrap_or(self.at.segment)
    }

    /// At the end of the log no record follows a loss whose delivery would take the cursor past it.
    fn deliver_loss(&self) {
        let mut log = self.shared.log();
        if self.observer || self.lost.1 != self.at.totals {
            return;
        }
        let ahead = log.ahead.as_ref().filter(|_| self.ahead).map(|ahead| ahead.stretch.to.totals.sequence);
        match ahead {
            Some(to) if to == self.lost.0 => log.deliver_ahead(self.at),
            None if log.cursor.totals.sequence == self.lost.0 => log.deliver(self.at),
            _ => {}
        }
    }

    fn report_damage(&self, segment: u64, slot: u32, reason: &str) {
        if !self.observer {
            tracing::error!(segment, slot, reason, "damaged chunk, skipping it");
        }
        self.mark_damaged(segment);
    }

    /// Records that were in this segment are missing, or may have been in it: it is kept.
    fn mark_damaged(&self, id: u64) {
        if self.observer {
            return;
        }
        if let Some(segment) = self.shared.log().segments.get_mut(&id) {
            segment.damaged = true;
        }
    }
}
