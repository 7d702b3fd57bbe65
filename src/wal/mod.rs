//! STUB with the final API; replaced by the real log.

mod error;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

pub use error::{AppendError, CommitError, OpenError, ReadError, StoreError};

use crate::batch::{Batch, Sequence};
use crate::config::WalConfig;
use crate::metrics::Metrics;

/// The log. Clones share it.
#[derive(Clone)]
pub struct Wal(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    appended: Condvar,
    metrics: Arc<Metrics>,
    parked: Arc<dyn StateDb>,
}

#[derive(Default)]
struct State {
    records: Vec<Batch>,
    cursor: Position,
    woken: bool,
}

/// A place between two records of the log, with the totals of everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Sequence of the record after this place, counted from 0 in the stub.
    sequence: u64,
}

/// One batch, read back from the log.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its place in the order of the log.
    pub sequence: Sequence,
    /// The batch, as it was admitted.
    pub batch: Batch,
    /// The place after it: what [`Wal::deliver`] takes once every event of it is delivered or parked.
    pub end: Position,
}

/// Resolves once the batch is durable.
pub struct Commit(Option<Result<Sequence, CommitError>>);

impl Future for Commit {
    type Output = Result<Sequence, CommitError>;
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(self.0.take().expect("polled once"))
    }
}

/// What an operator sees of the log. Bytes are request bytes unless the name says disk.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct WalStatus {
    /// The next batch gets this sequence.
    pub next_sequence: u64,
    /// First record not yet delivered.
    pub cursor_sequence: u64,
    /// Backlog in batches.
    pub pending_batches: u64,
    /// Backlog in events.
    pub pending_events: u64,
    /// Backlog in request bytes.
    pub pending_bytes: u64,
    /// When the oldest pending batch was received, milliseconds since the Unix epoch; none without a backlog.
    pub oldest_pending_received_at_ms: Option<u64>,
    /// Disk used by the log.
    pub disk_bytes: u64,
    /// `wal.bytes_max`.
    pub disk_limit_bytes: u64,
    /// Free on the file system.
    pub free_bytes: u64,
    /// Batches are refused for lack of space.
    pub full: bool,
    /// The log failed, the process must end.
    pub poisoned: bool,
    /// Segments on disk, spares included.
    pub segments: u64,
    /// Damaged segments set aside.
    pub quarantined_segments: u64,
    /// For how long the commit under way has run.
    pub commit_busy_ms: u64,
}

impl Wal {
    /// Opens the log in `config.directory`, or makes a new one.
    pub fn open(config: &WalConfig, queue_bytes_max: u64, metrics: Arc<Metrics>) -> Result<Wal, OpenError> {
        let _ = (config, queue_bytes_max);
        Ok(Wal(Arc::new(Inner {
            state: Mutex::default(),
            appended: Condvar::new(),
            metrics,
            parked: Arc::new(MemoryDb::default()),
        })))
    }

    /// Queues a batch for the next commit. The order of calls is the order of the log.
    pub fn append(&self, batch: Batch) -> Result<Commit, AppendError> {
        let mut state = self.0.state.lock().unwrap();
        self.0.metrics.wal.committed_batches.increment(1);
        state.records.push(batch);
        self.0.appended.notify_all();
        Ok(Commit(Some(Ok(Sequence(state.records.len() as u64)))))
    }

    /// A reader that starts at the cursor.
    pub fn reader(&self) -> Reader {
        let at = self.0.state.lock().unwrap().cursor;
        Reader { wal: self.clone(), at }
    }

    /// Everything before `position` is delivered or parked: moves the cursor, which frees segments. Never moves back.
    pub fn deliver(&self, position: Position) {
        self.0.state.lock().unwrap().cursor = position;
    }

    /// The log as it is now.
    pub fn status(&self) -> WalStatus {
        let state = self.0.state.lock().unwrap();
        WalStatus { pending_batches: state.records.len() as u64 - state.cursor.sequence, ..WalStatus::default() }
    }

    /// The store of parked events.
    pub fn parked(&self) -> Arc<dyn StateDb> {
        self.0.parked.clone()
    }

    /// Wakes a reader that waits.
    pub fn wake_reader(&self) {
        self.0.state.lock().unwrap().woken = true;
        self.0.appended.notify_all();
    }

    /// Commits what is queued, saves the cursor, ends the threads. Blocks. Later appends are refused as stopping.
    pub fn close(&self) {}
}

/// Reads the log in order. Blocking: for a thread of its own.
pub struct Reader {
    wal: Wal,
    at: Position,
}

impl Reader {
    /// The next committed record, or none at the end of the log.
    pub fn next(&mut self) -> Result<Option<Record>, ReadError> {
        let state = self.wal.0.state.lock().unwrap();
        let Some(batch) = state.records.get(self.at.sequence as usize) else { return Ok(None) };
        self.at.sequence += 1;
        Ok(Some(Record { sequence: Sequence(self.at.sequence), batch: batch.clone(), end: self.at }))
    }

    /// Waits until there is a next record, [`Wal::wake_reader`] is called, or `timeout` has passed.
    pub fn wait(&self, timeout: Duration) {
        let mut state = self.wal.0.state.lock().unwrap();
        if state.records.len() as u64 == self.at.sequence && !state.woken {
            state = self.wal.0.appended.wait_timeout(state, timeout).unwrap().0;
        }
        state.woken = false;
    }

    /// Goes back to the cursor, to read again what was not delivered.
    pub fn rewind(&mut self) {
        self.at = self.wal.0.state.lock().unwrap().cursor;
    }
}

/// Largest value of a [`StateDb`]; larger ones must be split by the caller.
pub const STATE_VALUE_BYTES_MAX: usize = 256 * 1024;

/// A small durable map. Nothing is durable before [`StateDb::sync`] has returned.
pub trait StateDb: Send + Sync {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// Sets `key`. `value` holds at most [`STATE_VALUE_BYTES_MAX`] bytes.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;
    /// Removes `key`.
    fn remove(&self, key: &[u8]) -> Result<(), StoreError>;
    /// Up to `limit` entries with keys not below `from`, in the order of their keys.
    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError>;
    /// The greatest key.
    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError>;
    /// Makes everything put and removed so far durable.
    fn sync(&self) -> Result<(), StoreError>;
}

/// Opens the parked store of a log that no process has open.
pub fn open_parked(_directory: &Path) -> Result<Arc<dyn StateDb>, OpenError> {
    Ok(Arc::new(MemoryDb::default()))
}

#[derive(Default)]
struct MemoryDb(Mutex<BTreeMap<Vec<u8>, Vec<u8>>>);

impl StateDb for MemoryDb {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0.lock().unwrap().get(key).cloned())
    }
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.0.lock().unwrap().insert(key.to_vec(), value.to_vec());
        Ok(())
    }
    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.0.lock().unwrap().remove(key);
        Ok(())
    }
    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let map = self.0.lock().unwrap();
        Ok(map.range(from.to_vec()..).take(limit).map(|(k, v)| (k.clone(), v.clone())).collect())
    }
    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0.lock().unwrap().keys().next_back().cloned())
    }
    fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
