//! The parked store: events that Kafka can never take, kept with where they came from and why they are here, until the
//! operator takes them out (`ringtail parked`), or a limit of `[forward.parked]` does (`limits.rs`).
//!
//! # Format
//! One event has one id, counted up and never given out again, unless damage that sled does not notice took the newest; it
//! is spread over as many parts as its size needs (`format.rs`), all in one of the Dbs below (`wal/store/shards.rs`). Part 0
//! is written last and removed first, and sled recovers a prefix of what was written to a Db: an id without a part 0 was
//! never finished, or is removed, and is passed over. An id that has a part 0 and lacks another is reported as damaged, never
//! passed over. Nothing is overwritten.
//!
//! # Books
//! What is removed is counted before it goes, in the store itself (`removal.rs`) and beside the log's cursor
//! ([`ParkedNotes`]). So [`ParkedStore::ever`], the number of events ever parked here, does not change when events are removed,
//! and is never too low after a crash: if it is below what the log noted, events were lost to damage, and not to the operator.
//! `missing.rs` looks after that at every start.
//!
//! # Sharing
//! One thread parks ([`ParkedStore::park`], [`ParkedStore::sync`]); any may read and remove. Readers see only what is
//! durable. When another's removal fails, the one that parks is told to park again what was not yet durable.

mod filter;
mod format;
mod limits;
mod missing;
mod reader;
mod removal;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use filter::ParkedFilter;
pub(super) use limits::Limits;
pub use reader::ParkedEvents;
pub use removal::{ParkedDropReason, Removed};

use super::ParkReason;
use crate::batch::Sequence;
use crate::config::ParkedConfig;
use crate::metrics::Metrics;
use crate::wal::{ParkedBooks, ParkedNotes, STATE_VALUE_BYTES_MAX, StateDb, StoreError, Wal};
use format::{JOURNAL_KEY, Journal, base64_bytes, encode, key, split_id, split_key};

/// A parked event. As JSON: one flat object, the payload in base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedEvent {
    /// Its name in the store; larger is later.
    pub id: u64,
    /// Why it is here and where it came from.
    #[serde(flatten)]
    pub about: ParkedAbout,
    /// The event's bytes, as the client sent them.
    #[serde(with = "base64_bytes")]
    pub payload: Bytes,
}

/// Everything about a parked event but its payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedAbout {
    /// The topic it was for; of [`ParkReason::InvalidTopic`], not one that Kafka takes.
    pub topic: String,
    /// The record's key; none when it had none.
    pub key: Option<String>,
    /// The event's `type`.
    pub event_type: String,
    /// Why it is here.
    pub reason: ParkReason,
    /// The same in Kafka's words.
    pub error: String,
    /// The client's group.
    pub group: String,
    /// The client's id; may be empty.
    pub connection_id: String,
    /// The batch's name; may be empty.
    pub req_guid: String,
    /// Where its batch was in the log.
    pub sequence: Sequence,
    /// When the batch was received, milliseconds since the Unix epoch.
    pub received_at_ms: u64,
    /// When the event was parked, milliseconds since the Unix epoch.
    pub parked_at_ms: u64,
    /// Its number among the events of its topic in the spill, if it came from there. With exactly-once delivery, the next start
    /// knows by it what it must not park again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_number: Option<u64>,
}

/// Why the parked store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ParkedError {
    /// The store below failed; worth a retry once its cause is gone.
    #[error("the parked store failed")]
    Store(#[from] StoreError),
    /// What was parked since the last sync may be lost, because another use of the store failed: park it again.
    #[error("the parked store failed in between, and may have lost what was not durable")]
    Forgotten,
    /// An event is not as it was written. Others are unaffected.
    #[error("parked event {id} is damaged: {what}")]
    Damaged {
        /// The event.
        id: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The event needs more parts than an id has room for (3 GiB).
    #[error("an event of {bytes} bytes is too large to park")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// The parked events of one log. Clones share the store and its books.
#[derive(Clone)]
pub struct ParkedStore(Arc<Inner>);

struct Inner {
    db: Arc<dyn StateDb>,
    limits: ParkedConfig,
    /// None of a store without a log.
    notes: Option<Arc<ParkedNotes>>,
    /// None outside the service.
    metrics: Option<Arc<Metrics>>,
    /// It was never used, or somebody removed it as a whole.
    is_new: bool,
    /// Held by whoever writes.
    books: Mutex<Books>,
    count: AtomicU64,
    bytes: AtomicU64,
    ever: AtomicU64,
    lost: AtomicU64,
}

struct Books {
    /// The next id to give out.
    next: u64,
    /// All below are durable.
    synced: u64,
    /// Bytes of what is not.
    unsynced_bytes: u64,
    /// What [`StateDb::reopened`] said before the first of it was written.
    reopened: u64,
    /// The one that parks does not know yet that its unsynced events are forgotten.
    forgotten: bool,
    /// Something is missing, and nothing was found yet to park into that is not damaged; the log's books wait for that.
    leaving: bool,
    /// Events ever removed.
    removed: u64,
    /// Removals that failed: nobody knows what is still there.
    doubtful: Vec<removal::Doubtful>,
}

impl ParkedStore {
    /// Opens the store in `db` ([`Wal::parked`]), without limits, and without its books in the log: to look at. Reads it
    /// through once, to count, and to set aside what is damaged.
    ///
    /// # Errors
    /// [`ParkedError::Store`]
    pub fn open(db: Arc<dyn StateDb>) -> Result<ParkedStore, ParkedError> {
        ParkedStore::open_in(db, ParkedStore::no_limits(), None, None)
    }

    /// Opens the store of a stopped log ([`crate::wal::open_parked`]), without limits.
    ///
    /// # Errors
    /// [`ParkedError::Store`]
    pub fn open_offline(db: Arc<dyn StateDb>, notes: Arc<ParkedNotes>) -> Result<ParkedStore, ParkedError> {
        ParkedStore::open_in(db, ParkedStore::no_limits(), Some(notes), None)
    }

    fn no_limits() -> ParkedConfig {
        ParkedConfig { bytes_max: bytesize::ByteSize(0), ..ParkedConfig::default() }
    }

    /// Opens the store of a running service: it keeps to `limits` and counts in `metrics`, also what is missing of it.
    ///
    /// # Errors
    /// [`ParkedError::Store`]
    pub(super) fn open_for(
        limits: &ParkedConfig,
        wal: &Wal,
        metrics: &Arc<Metrics>,
    ) -> Result<ParkedStore, ParkedError> {
        let (notes, metrics) = (wal.parked_notes().clone(), metrics.clone());
        let store = ParkedStore::open_in(wal.parked(), limits.clone(), Some(notes), Some(metrics))?;
        store.look_after_missing();
        Ok(store)
    }

    fn open_in(
        db: Arc<dyn StateDb>,
        limits: ParkedConfig,
        notes: Option<Arc<ParkedNotes>>,
        metrics: Option<Arc<Metrics>>,
    ) -> Result<ParkedStore, ParkedError> {
        let (count, bytes) = measure(&*db)?;
        let journal = db.get(JOURNAL_KEY)?.and_then(|value| Journal::decode(&value)).unwrap_or_default();
        let last_key = db.last_key()?;
        let last_id = last_key.as_ref().and_then(|key| split_id(key).map(|(id, _)| id)).unwrap_or_default();
        let next = (last_id + 1).max(journal.next_id);
        // The journal may be lost to damage.
        let removed = journal.removed.max(notes.as_ref().map_or(0, |notes| notes.noted().books.removed));
        let books = Books {
            next,
            synced: next,
            unsynced_bytes: 0,
            reopened: 0,
            forgotten: false,
            leaving: false,
            removed,
            doubtful: Vec::new(),
        };
        let store = ParkedStore(Arc::new(Inner {
            db,
            limits,
            notes,
            metrics,
            is_new: last_key.is_none(),
            books: Mutex::new(books),
            count: AtomicU64::new(count),
            bytes: AtomicU64::new(bytes),
            ever: AtomicU64::new(count + removed),
            lost: AtomicU64::new(0),
        }));
        store.show();
        Ok(store)
    }

    /// Adds an event, under the id it returns. Durable, and to be seen by others, only once [`ParkedStore::sync`] has
    /// returned.
    ///
    /// # Errors
    /// [`ParkedError::TooLarge`]: the event is not in the store. [`ParkedError::Store`], [`ParkedError::Forgotten`]: neither
    /// is anything that was parked since the last sync; park it again.
    pub fn park(&self, about: &ParkedAbout, payload: &[u8]) -> Result<u64, ParkedError> {
        let bytes = encode(about, payload)?;
        let mut books = self.books();
        if let Err(error) = self.settle(&mut books) {
            self.forget_unsynced(&mut books);
            return Err(error);
        }
        if books.leaving {
            self.begin_books(&mut books)?;
        }
        if books.next == books.synced {
            books.reopened = self.0.db.reopened();
        }
        self.check_not_forgotten(&mut books)?;
        let id = books.next;
        for (part, value) in bytes.chunks(STATE_VALUE_BYTES_MAX).enumerate().rev() {
            self.0.db.put(&key(id, part as u16), value).inspect_err(|_| self.forget_unsynced(&mut books))?;
        }
        books.next += 1;
        books.unsynced_bytes += bytes.len() as u64;
        self.0.count.fetch_add(1, Ordering::Relaxed);
        self.0.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.0.ever.fetch_add(1, Ordering::Relaxed);
        Ok(id)
    }

    /// Makes everything parked so far durable.
    ///
    /// # Errors
    /// [`ParkedError::Store`], [`ParkedError::Forgotten`]; nothing that was parked since the last sync is in the store then:
    /// park it again.
    pub fn sync(&self) -> Result<(), ParkedError> {
        let mut books = self.books();
        self.check_not_forgotten(&mut books)?;
        self.0.db.sync().inspect_err(|_| self.forget_unsynced(&mut books))?;
        self.check_not_forgotten(&mut books)?;
        (books.synced, books.unsynced_bytes) = (books.next, 0);
        self.note(&books);
        self.show();
        Ok(())
    }

    /// Tells the log what is durable here. What is not known to be still there counts as removed: never is more noted than
    /// there is.
    fn note(&self, books: &Books) {
        if let Some(notes) = &self.0.notes {
            notes.note(self.durable(books, 0));
        }
    }

    /// The books without what is not durable, when `going` more are about to be removed.
    fn durable(&self, books: &Books, going: usize) -> ParkedBooks {
        let doubtful: usize = books.doubtful.iter().map(removal::Doubtful::len).sum();
        ParkedBooks {
            ever: self.ever() - (books.next - books.synced),
            removed: books.removed + (doubtful + going) as u64,
        }
    }

    /// Says so, once, if unsynced events may be lost for a reason that the one that parked them does not know.
    fn check_not_forgotten(&self, books: &mut Books) -> Result<(), ParkedError> {
        if books.next > books.synced && books.reopened != self.0.db.reopened() {
            self.forget_unsynced(books);
            books.forgotten = true;
        }
        if std::mem::take(&mut books.forgotten) { Err(ParkedError::Forgotten) } else { Ok(()) }
    }

    /// A store that failed may have lost all that was not synced. The ids are given out again, so that what it did keep
    /// is overwritten.
    fn forget_unsynced(&self, books: &mut Books) {
        let events = books.next - books.synced;
        self.0.count.fetch_sub(events, Ordering::Relaxed);
        self.0.ever.fetch_sub(events, Ordering::Relaxed);
        self.0.bytes.fetch_sub(books.unsynced_bytes, Ordering::Relaxed);
        (books.next, books.unsynced_bytes) = (books.synced, 0);
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Events held now.
    pub fn count(&self) -> u64 {
        self.0.count.load(Ordering::Relaxed)
    }

    /// Bytes that they take in the store, what is said about them included. On disk it is about three times that.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Events ever parked here: those held and those removed.
    pub fn ever(&self) -> u64 {
        self.0.ever.load(Ordering::Relaxed)
    }

    /// The id of the newest durable event, or of one that is removed; 0 in a new store.
    pub fn last_id(&self) -> u64 {
        self.books().synced - 1
    }

    /// The limits that it is to keep to.
    pub(super) fn limits(&self) -> &ParkedConfig {
        &self.0.limits
    }

    /// The durable events with ids not below `from_id`, oldest first. `take` and `filter` it; one event is in memory at a
    /// time. A damaged event is an error of its own and does not end it; a failing store does.
    pub fn events(&self, from_id: u64) -> ParkedEvents {
        ParkedEvents::new(self.0.db.clone(), from_id, self.books().synced)
    }

    /// The event called `id`, or none.
    ///
    /// # Errors
    /// [`ParkedError::Store`], [`ParkedError::Damaged`]
    pub fn get(&self, id: u64) -> Result<Option<ParkedEvent>, ParkedError> {
        let is_wanted = |found: &Result<ParkedEvent, ParkedError>| match found {
            Ok(event) => event.id == id,
            Err(ParkedError::Damaged { id: damaged, .. }) => *damaged == id,
            Err(_) => true,
        };
        self.events(id).next().filter(is_wanted).transpose()
    }

    /// Shows the books in the metrics.
    fn show(&self) {
        if let Some(metrics) = &self.0.metrics {
            metrics.forward.parked_events.set(self.count() as f64);
            metrics.forward.parked_bytes.set(self.bytes() as f64);
        }
    }
}

/// How many events there are, and their bytes. What is damaged is set aside.
fn measure(db: &dyn StateDb) -> Result<(u64, u64), StoreError> {
    loop {
        let (mut count, mut bytes, mut counted_id) = (0, 0, None);
        let is_whole = db.visit(&mut |name, value| {
            let Some((id, part)) = split_key(name) else { return };
            if part == 0 {
                (count, counted_id) = (count + 1, Some(id));
            }
            if counted_id == Some(id) {
                bytes += value.len() as u64;
            }
        })?;
        if is_whole {
            return Ok((count, bytes));
        }
    }
}
