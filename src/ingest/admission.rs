//! The one door: whatever the protocol, a batch is checked here and handed to the log.
//!
//! [`Admission::submit`] does not wait, so that the order of its calls is the order of the log. The [`Ticket`] that it
//! returns resolves to success only once the batch is durable.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use metrics::Counter;
use tokio_util::sync::CancellationToken;

use super::Protocol;
use super::limits::Limits;
use super::rejection::{RejectReason, Rejection};
use crate::batch::{Batch, Client, Request, now_ms};
use crate::config::IngestConfig;
use crate::metrics::Metrics;
use crate::wal::{Commit, Stored, Wal};

/// Checks batches and appends them to the log.
pub(super) struct Admission {
    wal: Wal,
    metrics: Arc<Metrics>,
    pub limits: Limits,
    /// Fires when no new batch may come in.
    stopping: CancellationToken,
}

/// Resolves once the batch is durable, or will not be.
pub(super) enum Ticket {
    /// A batch without events: there is nothing to keep.
    Empty,
    /// On its way to the disk.
    Commit {
        /// Resolves once it is there.
        commit: Commit,
        /// Counts it, if it was there before.
        duplicates: Counter,
    },
}

impl Future for Ticket {
    type Output = Result<(), Rejection>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Ticket::Empty => Poll::Ready(Ok(())),
            Ticket::Commit { commit, duplicates } => Pin::new(commit).poll(context).map(|result| {
                if result? == Stored::Before {
                    duplicates.increment(1);
                }
                Ok(())
            }),
        }
    }
}

impl Admission {
    pub fn new(config: &IngestConfig, wal: Wal, metrics: Arc<Metrics>, stopping: CancellationToken) -> Admission {
        Admission { wal, metrics, limits: Limits::new(config), stopping }
    }

    /// Checks a decoded request and queues it for the log's next commit.
    pub fn submit(&self, protocol: Protocol, client: &Client, request: Request) -> Result<Ticket, Rejection> {
        let metrics = self.metrics.ingest(protocol);
        metrics.received_batches.increment(1);
        metrics.received_events.increment(u64::from(request.event_count()));
        metrics.received_bytes.increment(request.as_bytes().len() as u64);
        if self.stopping.is_cancelled() {
            return Err(Rejection::stopping());
        }
        let bytes_max = self.limits.batch_bytes_max();
        if request.as_bytes().len() > bytes_max {
            return Err(Rejection::too_large(bytes_max));
        }
        let (events, limit) = (request.event_count(), self.limits.batch_events_max());
        if events > limit {
            let message = format!("the request has {events} events, the limit is {limit}");
            return Err(Rejection::new(RejectReason::TooManyEvents, message));
        }
        if request.event_count() == 0 {
            return Ok(Ticket::Empty);
        }
        let batch = Batch { received_at_ms: now_ms(), client: client.clone(), request };
        let commit = self.wal.append(batch)?;
        Ok(Ticket::Commit { commit, duplicates: metrics.duplicate_batches.clone() })
    }

    /// Counts a refusal. Called once for each, by the protocol that sends it.
    pub fn count_rejection(&self, protocol: Protocol, rejection: &Rejection) {
        self.metrics.ingest(protocol).rejected_batches(rejection.reason).increment(1);
    }

    /// Notes how long an ack took.
    pub fn record_ack(&self, protocol: Protocol, began: std::time::Instant) {
        self.metrics.ingest(protocol).ack_duration.record(began.elapsed());
    }
}
