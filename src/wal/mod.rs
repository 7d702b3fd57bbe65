//! The write-ahead log: a batch in it survives `kill -9` and power loss.
//!
//! # How
//! The log is a row of **segments**, each a sled database of its own (see `store/mod.rs` for why, and how sled is kept
//! honest). `appender.rs` is the one thread that writes: it takes every batch that waits, unless `dedup.rs` knows it as a
//! retry, and writes them as **chunks** (`record.rs`). `syncer.rs` makes them durable and completes every waiter. `reader.rs`
//! reads in order, segments that are full without sled (`closed.rs`, `search.rs`); what it misses goes into the ledger of
//! `losses.rs`. [`Wal::deliver`] moves the **cursor**; `ahead/` keeps what is delivered ahead of it; `keeper.rs` saves it and
//! removes whole segments that it has left, and prepares spare ones ahead of need. `recovery.rs` finds the state again at
//! start. What is damaged is set aside; `offline.rs`, `carved.rs`, `check/` and `repair.rs` are for the tools that look after
//! it.
//!
//! # Invariants
//! - A [`Commit`] resolves to `Ok` only after the `fdatasync` that covers its batch has returned.
//! - Sequences are handed out in the order of [`Wal::append`], without gaps. One that was acked is never given out again.
//! - A segment is removed only when the durable cursor has left it, or when it is durable that all of it was delivered ahead of
//!   the cursor (`ahead/mod.rs`).
//! - After an error while committing nothing is acked any more: [`Wal::failed`] fires and the process must end. If there was no
//!   room, another segment takes over, and the process goes on (`abandoned/`). What was refused may turn up after a restart.
//!
//! # Limits
//! Waiting batches are bounded in bytes (`ingest.in_flight_bytes_max`), disk by `wal.bytes_max` and `wal.free_bytes_min`: a
//! new segment is only prepared within both, and when the last prepared one is used up, batches are refused as full until
//! a segment was delivered and trimmed, or, with `wal.when_full = "drop_oldest"`, until the forwarder has dropped what is in
//! the oldest one. Restart time and memory do not grow with the backlog.

mod abandoned;
mod ahead;
mod appender;
mod carved;
mod check;
mod checksum;
mod closed;
mod cursor;
mod dedup;
mod error;
mod keeper;
mod log;
mod losses;
#[cfg(test)]
mod memory;
mod offline;
mod parked_books;
#[cfg(test)]
mod power_cuts;
mod reader;
mod record;
mod recovery;
mod repair;
mod scan;
mod search;
mod slots;
mod store;
mod syncer;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tokio_util::sync::CancellationToken;

pub use ahead::{DeliveredAhead, Undelivered};
pub use appender::{Commit, Stored};
pub use carved::{CarvedRecord, CarvedRecords, Run};
pub use check::{CheckReport, LedgerEntry, Missing, Problem, ProblemKind, Quarantined};
pub(crate) use checksum::crc32c;
pub use error::{AppendError, CommitError, OpenError, ReadError, StoreError};
pub use log::Position;
pub use losses::Loss;
pub use offline::{OfflineLog, ParkedCopy, SegmentFiles};
pub use parked_books::{NotedParked, ParkedBooks, ParkedNotes};
pub use reader::{Reader, Record};
pub use scan::Scan;
pub use store::{STATE_VALUE_BYTES_MAX, StateDb};

use crate::batch::Batch;
use crate::config::{DedupConfig, WalConfig};
use crate::metrics::Metrics;
use dedup::Window;
use log::{Log, Pool, Shared};
use recovery::Mode;
use store::{SegmentShape, SledStore, Store};

/// Names of the maps beside the segments.
const META: &str = "meta";
const PARKED: &str = "parked";

/// The log. Clones share it.
#[derive(Clone)]
pub struct Wal {
    id: Arc<str>,
    shared: Arc<Shared>,
    threads: Arc<Mutex<Threads>>,
}

struct Threads {
    appender: Option<JoinHandle<()>>,
    syncer: Option<JoinHandle<()>>,
    keeper: Option<JoinHandle<()>>,
    /// Held for as long as the log is open; none for a store in memory.
    _lock: Option<File>,
}

/// See [`open_parked`].
pub struct OfflineParked {
    /// The store.
    pub state: Arc<dyn StateDb>,
    below: SledStore,
    /// Held for as long as the store is open.
    _lock: File,
}

impl OfflineParked {
    /// Opens its books, which whoever removes events must keep. They are in `meta`: that is set aside if it is damaged, the cursor
    /// with it, as by the service; and on a full disk the reserve may be used up.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn notes(&self) -> Result<Arc<ParkedNotes>, StoreError> {
        Ok(Arc::new(ParkedNotes::load(self.below.state(META)?)?))
    }
}

/// What an operator sees of the log. Bytes are request bytes unless the name says disk.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct WalStatus {
    /// The next batch gets this sequence.
    pub next_sequence: u64,
    /// First record not yet delivered.
    pub cursor_sequence: u64,
    /// Records after the cursor that were delivered before those in between; none if there are none.
    #[serde(default)]
    pub delivered_ahead: Option<DeliveredAhead>,
    /// Backlog in batches.
    pub pending_batches: u64,
    /// Backlog in events.
    pub pending_events: u64,
    /// Backlog in request bytes.
    pub pending_bytes: u64,
    /// When the oldest pending batch was received, milliseconds since the Unix epoch; none without a backlog.
    pub oldest_pending_received_at_ms: Option<u64>,
    /// Disk used by the log, reserved space included.
    pub disk_bytes: u64,
    /// Of that, what is not segments in use: parked events, what was set aside, small maps.
    #[serde(default)]
    pub other_bytes: u64,
    /// `wal.bytes_max`
    pub disk_limit_bytes: u64,
    /// Free on the file system.
    pub free_bytes: u64,
    /// Batches are refused for lack of space.
    pub full: bool,
    /// The log failed, the process must end.
    pub failed: bool,
    /// Segments on disk, spares included.
    pub segments: u64,
    /// Damaged segments set aside.
    pub quarantined_segments: u64,
    /// Damaged small databases set aside: the cursor's, or a part of the parked events.
    #[serde(default)]
    pub quarantined_stores: u64,
    /// Batches that were committed and are missing, as long as they stand in the ledger.
    pub lost_batches: u64,
    /// The same in events.
    pub lost_events: u64,
    /// For how long the commit under way has run, in milliseconds.
    pub commit_busy_ms: u64,
}

impl WalStatus {
    /// Whether everything committed is delivered, parked or dropped.
    pub fn is_drained(&self) -> bool {
        self.pending_batches == 0 && self.pending_events == 0
    }
}

impl Wal {
    /// Opens the log in `config.directory`, or makes a new one, and starts its threads. `queue_bytes_max` bounds the bytes
    /// of batches that wait for their commit.
    ///
    /// # Errors
    /// [`OpenError`]. Nothing in the log was changed, but for segments that do not open, which are set aside.
    pub fn open(config: &WalConfig, queue_bytes_max: u64, metrics: Arc<Metrics>) -> Result<Wal, OpenError> {
        let lock = lock_directory(&config.directory)?;
        let shape = SegmentShape::new(config.segment_bytes.as_u64());
        let store = Arc::new(SledStore::new(&config.directory, shape)?);
        Wal::open_in(config, queue_bytes_max, shape, store, metrics, Some(lock))
    }

    fn open_in(
        config: &WalConfig,
        queue_bytes_max: u64,
        shape: SegmentShape,
        store: Arc<dyn Store>,
        metrics: Arc<Metrics>,
        lock: Option<File>,
    ) -> Result<Wal, OpenError> {
        let (meta, parked) = (store.state(META)?, store.shards(PARKED)?);
        let id = cursor::load_or_make_log_id(&*meta)?.into();
        let pool = Pool::new(store);
        let log = recovery::recover(&pool, &*meta, Mode::Repair)?;
        let mut window = Window::new(&config.dedup);
        let saved_window = recovery::recover_window(&pool, &*meta, &log, &mut window)?;
        let notes = ParkedNotes::load(meta.clone())?;
        let shared = Shared::new(config, queue_bytes_max, shape, pool, meta, parked, notes, metrics, log, window);
        let shared = Arc::new(shared);
        let appender = appender::Appender::new(shared.clone());
        let syncer = shared.clone();
        let keeper = keeper::Keeper::new(shared.clone(), saved_window);
        let threads = Threads {
            appender: Some(spawn("wal-commit", move || appender.run())),
            syncer: Some(spawn("wal-sync", move || syncer::run(&syncer))),
            keeper: Some(spawn("wal-keeper", move || keeper.run())),
            _lock: lock,
        };
        Ok(Wal { id, shared, threads: Arc::new(Mutex::new(threads)) })
    }

    /// What tells this log from every other one, also from one that is in the same place later.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Queues a batch for the next commit. The order of calls is the order of the log. Does not block on the disk. A retry
    /// of a batch that the log knows (`dedup.rs`) is not stored again: its [`Commit`] resolves once the first one is durable.
    ///
    /// # Errors
    /// [`AppendError`]: nothing was changed.
    pub fn append(&self, batch: Batch) -> Result<Commit, AppendError> {
        let fingerprint = if self.shared.dedup { dedup::fingerprint(&batch) } else { None };
        appender::append(&self.shared, batch, fingerprint)
    }

    /// Queues a batch that was in the log before (an export, a salvaged segment), even if the log remembers it.
    ///
    /// # Errors
    /// [`AppendError`]: nothing was changed.
    pub fn restore(&self, batch: Batch) -> Result<Commit, AppendError> {
        appender::append(&self.shared, batch, None)
    }

    /// A reader that starts at the cursor.
    pub fn reader(&self) -> Reader {
        Reader::new(self.shared.clone())
    }

    /// A reader that starts at the cursor and only looks: the log's state and its other readers do not notice it. It keeps
    /// one segment open, so drop it soon.
    pub fn peek(&self) -> Reader {
        Reader::observer(self.shared.clone())
    }

    /// Everything before `position` is delivered or parked: moves the cursor, which frees segments. Never moves back.
    /// Durable within about a second; a stale cursor costs duplicates, never loss.
    pub fn deliver(&self, position: Position) {
        self.move_cursor(|log| log.deliver(position));
    }

    fn move_cursor(&self, deliver: impl FnOnce(&mut Log)) {
        let mut log = self.shared.log();
        let before = log.cursor.segment;
        deliver(&mut log);
        if log.cursor.segment != before {
            self.shared.log_changed.notify_all();
        }
    }

    /// Whether the record that ends at `position` is in a segment that is given up (`wal.when_full = "drop_oldest"`): whoever
    /// reads it shall drop it and deliver its position.
    pub fn is_given_up(&self, position: Position) -> bool {
        position.segment <= self.shared.given_up.load(Ordering::Relaxed)
    }

    /// Whether that is so for the first record not yet delivered.
    pub fn has_given_up(&self) -> bool {
        let cursor = self.shared.log().cursor;
        self.is_given_up(cursor)
    }

    /// `[wal]`
    pub fn config(&self) -> &WalConfig {
        &self.shared.config
    }

    /// The log as it is now.
    pub fn status(&self) -> WalStatus {
        let log = self.shared.log();
        let pending = log.pending();
        WalStatus {
            next_sequence: log.tail.sequence,
            cursor_sequence: log.cursor.totals.sequence,
            delivered_ahead: log.delivered_ahead_status(),
            pending_batches: pending.sequence,
            pending_events: pending.events + log.spilled_events,
            pending_bytes: pending.bytes,
            oldest_pending_received_at_ms: log.oldest_received_at_ms(),
            disk_bytes: log.disk_bytes(&self.shared.shape),
            other_bytes: log.space.other_bytes,
            disk_limit_bytes: self.shared.config.bytes_max.as_u64(),
            free_bytes: log.space.free_bytes,
            full: log.is_full(),
            failed: self.shared.failed.is_cancelled(),
            segments: (log.segments.len() + log.spares.len()) as u64,
            quarantined_segments: log.space.quarantined_segments,
            quarantined_stores: log.space.quarantined_stores,
            lost_batches: log.losses.values().map(|loss| loss.end_sequence - loss.first_sequence).sum(),
            lost_events: log.losses.values().map(|loss| loss.events).sum(),
            commit_busy_ms: self.shared.commit_busy_ms(),
        }
    }

    /// Fires when a commit failed, and not for lack of room: the process must end, recovery decides at the next start.
    pub fn failed(&self) -> &CancellationToken {
        &self.shared.failed
    }

    /// The store of parked events.
    pub fn parked(&self) -> Arc<dyn StateDb> {
        self.shared.parked.clone()
    }

    /// The id of the newest parked event that may be of an earlier log, whose sequences this one has given out again; 0 if there
    /// is none. `last_id` is the newest now, and all up to it may be, if this is asked for the first time.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn parked_before(&self, last_id: u64) -> Result<u64, StoreError> {
        cursor::load_or_make_parked_before(&*self.shared.meta, last_id)
    }

    /// The books of that store.
    pub fn parked_notes(&self) -> &Arc<ParkedNotes> {
        &self.shared.parked_notes
    }

    /// How many events the forwarder keeps beside the log, which no longer counts them: they belong to the backlog.
    pub fn note_spilled(&self, events: u64) {
        self.shared.log().spilled_events = events;
    }

    /// Wakes a reader that waits.
    pub fn wake_reader(&self) {
        self.shared.log().reader_woken = true;
        self.shared.log_changed.notify_all();
    }

    /// Commits what is queued, saves the cursor, ends the threads. Blocks. Appends are refused as stopping from the
    /// first moment on. The directory is free again once the last clone is gone.
    pub fn close(&self) {
        appender::close(&self.shared);
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        join(threads.appender.take());
        join(threads.syncer.take());
        self.shared.log().closing = true;
        self.shared.log_changed.notify_all();
        join(threads.keeper.take());
        self.shared.pool.close_unused();
    }
}

/// Reads the log's state from a directory that no process has open. Segments stay where they are; sled may tidy the files
/// inside those that it opens, and a small Db that is damaged is set aside, as by the service. Run it as their owner.
///
/// # Errors
/// [`OpenError::InUse`] while a process has it open.
pub fn inspect(config: &WalConfig) -> Result<WalStatus, OpenError> {
    let lock = lock_directory(&config.directory)?;
    let shape = SegmentShape::new(config.segment_bytes.as_u64());
    let store = Arc::new(SledStore::new(&config.directory, shape)?);
    let (meta, parked) = (store.state(META)?, store.shards(PARKED)?);
    let pool = Pool::new(store);
    let log = recovery::recover(&pool, &*meta, Mode::Inspect)?;
    let window = Window::new(&DedupConfig { enabled: false, ..DedupConfig::default() });
    let notes = ParkedNotes::load(meta.clone())?;
    let shared = Arc::new(Shared::new(config, 0, shape, pool, meta, parked, notes, Metrics::new(), log, window));
    let threads = Threads { appender: None, syncer: None, keeper: None, _lock: Some(lock) };
    Ok(Wal { id: "".into(), shared, threads: Arc::new(Mutex::new(threads)) }.status())
}

/// Opens the parked store of a log that no process has open. Whoever reads it lets sled tidy the files of its parts, which on a
/// full disk may use up the reserve, and sets aside parts that are damaged; one that an older version left is taken over.
/// Nothing else of the log is opened before [`OfflineParked::notes`].
///
/// # Errors
/// [`OpenError::InUse`] while a process has it open.
pub fn open_parked(directory: &Path) -> Result<OfflineParked, OpenError> {
    let lock = lock_directory(directory)?;
    let below = SledStore::new(directory, SegmentShape::new(8 << 20))?;
    Ok(OfflineParked { state: below.shards(PARKED)?, below, _lock: lock })
}

/// Ends the process when a panic strikes one of sled's own threads: their callers would wait for ever.
pub fn exit_on_store_panic() {
    let inner = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let is_io = std::thread::current().name().is_some_and(|name| name.starts_with("sled-io"));
        // Everywhere else it is caught, and reported as an error.
        if !is_io && info.location().is_some_and(|at| at.file().contains("/sled-0.34.7/")) {
            return;
        }
        inner(info);
        if is_io {
            tracing::error!("the log's I/O thread panicked, ending the process");
            std::process::exit(1);
        }
    }));
}

fn lock_directory(directory: &Path) -> Result<File, OpenError> {
    let error = |source| OpenError::Directory { directory: directory.to_path_buf(), source };
    store::make_directory(directory).map_err(error)?;
    let lock = File::options().create(true).truncate(false).write(true).open(directory.join("lock")).map_err(error)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(OpenError::InUse { directory: directory.to_path_buf() }),
        Err(std::fs::TryLockError::Error(source)) => Err(error(source)),
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).expect("the system has room for a thread")
}

fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread
        && thread.join().is_err()
    {
        tracing::error!("a thread of the log panicked");
    }
}
