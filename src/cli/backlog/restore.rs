//! Puts batches into an open log and waits for their commits.

use std::collections::VecDeque;

use ringtail::batch::Batch;
use ringtail::wal::{AppendError, Commit, CommitError, Wal};

/// Request bytes that wait for their commit.
const IN_FLIGHT_BYTES_MAX: u64 = 8 << 20;
/// What the log must let wait: that, and one batch more, of the largest that there may be.
pub const QUEUE_BYTES_MAX: u64 = IN_FLIGHT_BYTES_MAX + (64 << 20);

/// Why a batch is not in the log.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Append(#[from] AppendError),
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// Puts batches into a log, in order. Remembers something about each one until it is durable.
pub struct Restorer<'a, T> {
    wal: &'a Wal,
    in_flight: VecDeque<(Commit, u64, T)>,
    in_flight_bytes: u64,
    failed: bool,
    /// What was remembered of those that are durable.
    pub committed: Vec<T>,
    /// The same of those that are durable behind one that is not.
    pub committed_behind: Vec<T>,
}

impl<'a, T> Restorer<'a, T> {
    pub fn new(wal: &'a Wal) -> Restorer<'a, T> {
        Restorer {
            wal,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            failed: false,
            committed: Vec::new(),
            committed_behind: Vec::new(),
        }
    }

    /// Puts a batch into the log, once there is room for it among those that wait. After an error only
    /// [`Restorer::finish`] may follow.
    pub async fn push(&mut self, batch: Batch, about: T) -> Result<(), RestoreError> {
        let bytes = batch.request.as_bytes().len() as u64;
        while self.in_flight_bytes + bytes > IN_FLIGHT_BYTES_MAX && !self.in_flight.is_empty() {
            self.settle_first().await?;
        }
        let commit = self.wal.restore(batch)?;
        self.in_flight.push_back((commit, bytes, about));
        self.in_flight_bytes += bytes;
        Ok(())
    }

    /// Waits for everything in flight. The first error, if any; what was committed nevertheless is noted.
    pub async fn finish(&mut self) -> Result<(), RestoreError> {
        let mut result = Ok(());
        while !self.in_flight.is_empty() {
            let settled = self.settle_first().await;
            result = result.and(settled);
        }
        result
    }

    async fn settle_first(&mut self) -> Result<(), RestoreError> {
        let Some((commit, bytes, about)) = self.in_flight.pop_front() else { return Ok(()) };
        self.in_flight_bytes -= bytes;
        let committed = commit.await;
        self.failed |= committed.is_err();
        committed?;
        if self.failed {
            self.committed_behind.push(about)
        } else {
            self.committed.push(about)
        }
        Ok(())
    }
}
