//! What the log's threads share: where it begins and ends, which segments there are, and which of them are open.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::abandoned::Abandoned;
use super::ahead::{Ahead, Received, Stretch};
use super::appender::{Queue, refuse_all};
use super::dedup::Window;
use super::error::StoreError;
use super::losses::Loss;
use super::parked_books::ParkedNotes;
use super::record::Totals;
use super::store::{ActiveSegment, SegmentFile, SegmentShape, Space, StateDb, Store};
use super::syncer::Pipeline;
use crate::batch::Sequence;
use crate::config::WalConfig;
use crate::metrics::Metrics;

/// A place in the log: what [`super::Wal::deliver`] takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The segment, or a later one if it is gone.
    pub(super) segment: u64,
    /// Slot of the chunk that holds the record at this place.
    pub(super) slot: u32,
    /// Totals before this place.
    pub(super) totals: Totals,
}

impl Position {
    /// Sequence of the record at this place.
    pub fn sequence(self) -> Sequence {
        Sequence(self.totals.sequence)
    }
}

/// One segment that holds records.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Segment {
    /// Totals after its last record, once known: a segment from before the last start is only known when read through.
    pub end: Option<Totals>,
    /// Disk it takes.
    pub disk_bytes: u64,
    /// A reader met damage in it: it is kept aside instead of removed.
    pub damaged: bool,
    /// It takes no more records, and the disk reserved for it was given back.
    pub sealed: bool,
}

/// The state of the log, under one lock that is never held across I/O.
pub(super) struct Log {
    /// Segments with records, by id.
    pub segments: BTreeMap<u64, Segment>,
    /// The one that is being filled, and how many of its slots are.
    pub active: Option<(u64, u32)>,
    /// Prepared segments, in the order of their ids.
    pub spares: VecDeque<(u64, Arc<dyn ActiveSegment>)>,
    /// Id of the next segment to prepare.
    pub next_segment: u64,
    /// Totals of everything committed.
    pub tail: Totals,
    /// The first record not yet delivered.
    pub cursor: Position,
    /// The cursor as it is on disk: segments before it may go.
    pub saved_cursor: Position,
    /// What is delivered ahead of the cursor.
    pub ahead: Option<Ahead>,
    /// The same as it is on disk, where it stays until there is another one.
    pub saved_ahead: Option<Stretch>,
    /// When chunks not yet delivered were received.
    pub received: Received,
    /// Committed records that are missing, by their first sequence.
    pub losses: BTreeMap<u64, Loss>,
    /// Losses that are not in the ledger yet.
    pub unsaved_losses: Vec<Loss>,
    /// Pending events that are not in the log any more.
    pub spilled_events: u64,
    /// No space to prepare another segment.
    pub space_short: bool,
    /// The segment that found no room in a commit, until it is cut.
    pub abandoned: Option<Abandoned>,
    /// Segments abandoned since a record was acked.
    pub abandoned_in_row: u32,
    /// When there may be another segment. None: at once.
    pub next_segment_at: Option<Instant>,
    /// Since when batches are refused for lack of space.
    pub full_since: Option<Instant>,
    /// Space as last measured.
    pub space: Space,
    /// A waiting reader shall return.
    pub reader_woken: bool,
    /// The keeper shall save the cursor and end.
    pub closing: bool,
}

impl Log {
    /// Events, bytes and records committed and not yet delivered.
    pub fn pending(&self) -> Totals {
        let (cursor, ahead) = (self.cursor.totals, self.delivered_ahead());
        Totals {
            sequence: self.tail.sequence.saturating_sub(cursor.sequence + ahead.sequence),
            events: self.tail.events.saturating_sub(cursor.events + ahead.events),
            bytes: self.tail.bytes.saturating_sub(cursor.bytes + ahead.bytes),
        }
    }

    /// Moves the cursor forward to `position`.
    pub fn deliver(&mut self, position: Position) {
        if position.totals.sequence < self.cursor.totals.sequence {
            return;
        }
        self.cursor = self.before_the_cut(position);
        self.pass_ahead();
        self.leave_delivered_segments();
        self.received.pass(self.cursor.totals.sequence);
    }

    /// A cursor at the end of a segment that takes no more records belongs to the next one.
    pub fn leave_delivered_segments(&mut self) {
        while let Some((id, segment)) = self.segments.range(self.cursor.segment..).next() {
            let is_open = self.open_end().is_some_and(|(open, _)| open == *id);
            let left = segment.end.is_some_and(|end| end.sequence <= self.cursor.totals.sequence);
            if is_open || !left {
                return;
            }
            (self.cursor.segment, self.cursor.slot) = (*id + 1, 0);
        }
    }

    /// Segment and slot where records may follow: in the active segment, or at the next start in one that is abandoned and not cut.
    pub fn open_end(&self) -> Option<(u64, u32)> {
        self.active.or_else(|| self.abandoned.as_ref().map(|abandoned| (abandoned.end.segment, abandoned.end.slot)))
    }

    /// Notes that committed records are missing, as far as the ledger does not say so already: a reader that goes back, or
    /// the next process, finds the same ones missing again, perhaps as one gap what was two.
    pub fn note_loss(&mut self, loss: Loss) {
        let (mut from, mut events) = (loss.first_sequence, loss.events);
        let known = self.losses.range(..loss.end_sequence).map(|(_, known)| *known);
        let known: Vec<Loss> = known.filter(|known| known.end_sequence > loss.first_sequence).collect();
        for known in &known {
            events = events.saturating_sub(known.events);
        }
        let mut new = Vec::new();
        for known in known {
            if known.first_sequence > from {
                new.push((from, known.first_sequence));
            }
            from = from.max(known.end_sequence);
        }
        if from < loss.end_sequence {
            new.push((from, loss.end_sequence));
        }
        for (first_sequence, end_sequence) in new {
            // How many events each piece held is not known, only how many all of them did.
            let piece = Loss { first_sequence, end_sequence, events: std::mem::take(&mut events), ..loss };
            self.losses.insert(first_sequence, piece);
            self.unsaved_losses.push(piece);
        }
    }

    /// When the oldest pending record was received, to within a chunk.
    pub fn oldest_received_at_ms(&self) -> Option<u64> {
        if self.pending().sequence == 0 { None } else { self.received.oldest() }
    }

    /// The segments that take no more records, oldest first.
    pub fn full_segments(&self) -> impl Iterator<Item = (&u64, &Segment)> {
        let open = self.open_end().map(|(id, _)| id);
        self.segments.iter().filter(move |(id, _)| Some(**id) != open)
    }

    /// Whether a batch would be refused for lack of space.
    pub fn is_full(&self) -> bool {
        self.full_since.is_some() || (self.space_short && self.active.is_none() && self.spares.is_empty())
    }

    /// Disk taken by the log: what is reserved counts as taken.
    pub fn disk_bytes(&self, shape: &SegmentShape) -> u64 {
        let segments: u64 = self.segments.values().map(|segment| segment.disk_bytes).sum();
        segments + self.spares.len() as u64 * shape.reserved_bytes + self.space.other_bytes
    }
}

/// Everything that the appender, the keeper and the reader share.
pub(super) struct Shared {
    pub config: WalConfig,
    pub queue_bytes_max: u64,
    pub shape: SegmentShape,
    pub store: Arc<dyn Store>,
    pub meta: Arc<dyn StateDb>,
    pub parked: Arc<dyn StateDb>,
    pub parked_notes: Arc<ParkedNotes>,
    pub metrics: Arc<Metrics>,
    pub pool: Pool,
    pub queue: Mutex<Queue>,
    /// Remembers batches, and knows retries.
    pub dedup: bool,
    pub queue_changed: Condvar,
    log: Mutex<Log>,
    /// Any change of [`Log`] that another thread may wait for.
    pub log_changed: Condvar,
    /// Cancelled when the log failed: nothing is acked any more, the process must end.
    pub failed: CancellationToken,
    /// Segments up to this id are given up: their records shall be dropped.
    pub given_up: AtomicU64,
    /// Groups written and not yet durable.
    pub pipeline: Pipeline,
    /// Since when batches wait for the commit thread, or the write of a group is under way: ms since [`Shared::started`],
    /// plus 1; 0 while neither is.
    pub commit_began: AtomicU64,
    /// The same of the sync under way.
    pub sync_began: AtomicU64,
    pub started: Instant,
}

impl Shared {
    #[allow(clippy::too_many_arguments, reason = "made once, by recovery")]
    pub fn new(
        config: &WalConfig,
        queue_bytes_max: u64,
        shape: SegmentShape,
        pool: Pool,
        meta: Arc<dyn StateDb>,
        parked: Arc<dyn StateDb>,
        parked_notes: ParkedNotes,
        metrics: Arc<Metrics>,
        log: Log,
        window: Window,
    ) -> Shared {
        Shared {
            config: config.clone(),
            queue_bytes_max,
            shape,
            store: pool.store.clone(),
            pool,
            meta,
            parked,
            parked_notes: Arc::new(parked_notes),
            metrics,
            dedup: window.is_on(),
            queue: Mutex::new(Queue::new(window)),
            queue_changed: Condvar::new(),
            log: Mutex::new(log),
            log_changed: Condvar::new(),
            failed: CancellationToken::new(),
            given_up: AtomicU64::new(0),
            pipeline: Pipeline::default(),
            commit_began: AtomicU64::new(0),
            sync_began: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    /// The log's state.
    pub fn log(&self) -> MutexGuard<'_, Log> {
        // A panic elsewhere fails the log as a whole (see `fail`), so the state itself stays usable for reading.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The batches that wait for their commit.
    pub fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends acking for good. Wakes everybody.
    pub fn fail(&self) {
        self.failed.cancel();
        refuse_all(&mut self.queue());
        // The lock is taken so that nobody is between its check and its wait.
        drop(self.log());
        self.queue_changed.notify_all();
        self.log_changed.notify_all();
    }

    /// For how long the commit under way has run.
    pub fn commit_busy_ms(&self) -> u64 {
        let busy = |began: &AtomicU64| match began.load(Ordering::Relaxed) {
            0 => 0,
            began => self.elapsed_ms().saturating_sub(began - 1),
        };
        busy(&self.commit_began).max(busy(&self.sync_began))
    }

    /// Milliseconds since the log was opened.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The open segments: at most one handle each, because sled locks its file.
pub(super) struct Pool {
    store: Arc<dyn Store>,
    open: Mutex<HashMap<u64, Arc<dyn SegmentFile>>>,
}

impl Pool {
    pub fn new(store: Arc<dyn Store>) -> Pool {
        Pool { store, open: Mutex::default() }
    }

    /// Where the segments are.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// The segment's handle, opened if it is not.
    pub fn get(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let mut open = self.open();
        if let Some(file) = open.get(&id) {
            return Ok(file.clone());
        }
        let file = self.store.open(id)?;
        open.insert(id, file.clone());
        Ok(file)
    }

    /// Adds a handle made elsewhere.
    pub fn insert(&self, id: u64, file: Arc<dyn SegmentFile>) {
        self.open().insert(id, file);
    }

    /// Whoever wants this segment next opens it anew.
    pub fn forget(&self, id: u64) {
        self.open().remove(&id);
    }

    /// Closes every segment that nobody holds. The lock is held meanwhile, so that nobody opens one half closed.
    pub fn close_unused(&self) {
        self.open().retain(|_, file| Arc::strong_count(file) > 1);
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<dyn SegmentFile>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::keeper::SPARES;
    use crate::wal::memory::MemoryStore;
    use crate::wal::tests::{append_all, open_memory};

    /// Each costs memory.
    #[test]
    fn only_the_segments_that_are_filled_prepared_and_read_are_open() {
        let wal = open_memory(&MemoryStore::default());
        append_all(&wal, 1..=200, 300);
        assert!(wal.status().segments > 10, "{:?}", wal.status());
        let mut reader = wal.reader();
        while reader.next_record().unwrap().is_some() {
            let open = wal.shared.pool.open().len();
            assert!(open <= 1 + SPARES + 1, "{open} are open");
        }
        drop(reader);
        wal.close();
    }

    #[test]
    fn a_loss_is_noted_once() {
        let wal = open_memory(&MemoryStore::default());
        let loss = |first_sequence, end_sequence, segment| Loss {
            first_sequence,
            end_sequence,
            events: 2 * (end_sequence - first_sequence),
            segment,
            found_at_ms: 0,
        };
        for noted in
            [loss(10, 15, 1), loss(15, 18, 2), loss(10, 18, 1), loss(10, 15, 3), loss(10, 20, 3), loss(8, 18, 4)]
        {
            wal.shared.log().note_loss(noted);
        }
        assert_eq!(wal.losses(), [loss(8, 10, 4), loss(10, 15, 1), loss(15, 18, 2), loss(18, 20, 3)]);
        wal.close();
    }
}
