//! Forward: replays the log into Kafka, in order, for ever.
//!
//! One thread, `forward`, does all of it (`replay/mod.rs`): it reads a *record*, routes each of its events to the *lane* of
//! its topic, and hands it to the *producer*; delivery *reports* close events; closed records move the *watermark*, which
//! moves the log's cursor.
//!
//! # Invariants
//! - The cursor never passes an event that is neither acked by all in-sync replicas nor durably parked or spilled.
//! - Nothing is dropped but by a policy that the operator chose (`discard.rs`). What may succeed is retried for ever, what
//!   never can is parked.
//! - Events with the same key in the same topic keep the order of the log, with the exception that `lanes/mod.rs` states; with
//!   `forward.live_first` so do those of a backlog, and those that go ahead of it (`replay/live.rs`).
//! - What is parked has been counted as that. If it is dropped later, that is counted apart (`parked/removal.rs`).
//! - Every event is counted once, when the watermark passes it, however often it was sent; one of the spill when it and all
//!   before it in its topic are done for there, but not before the watermark has passed it.
//!
//! # Limits
//! - Delivery is at least once: after a crash, or when a producer breaks, what was in flight is sent, or parked, again. With
//!   `forward.delivery = "exactly_once"` it is once, by transactions (`replay/transaction.rs`).
//! - `forward.in_flight_bytes_max` bounds what is in flight over all topics, up to one record more. It counts the bytes
//!   of requests and 256 bytes an event; with the Kafka client's own copy, memory is about twice that.
//! - A topic that fails, or stands still, holds back the cursor and the others only until it takes much of that bound; then
//!   its events move out of the way, to disk (`spilling.rs`), and what follows queues up behind them.
//!
//! # Failure
//! An unreachable Kafka is normal: the log grows, the thread waits. A log that cannot be read, or a parked store that
//! cannot be written, is logged once and retried with backoff. A thread that ended shows as not live.

mod backoff;
mod discard;
mod in_flight;
mod kafka;
mod lanes;
mod pace;
mod parked;
mod parking;
mod properties;
mod replay;
mod requeue;
mod router;
mod spill;
mod spilling;
mod status;

use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tracing::warn;

pub use discard::DropReason;
pub use kafka::ProducerError;
pub use lanes::HeldTopic;
#[cfg(test)]
pub(crate) use parked::tests as parked_tests;
pub use parked::{
    ParkedAbout, ParkedDropReason, ParkedError, ParkedEvent, ParkedEvents, ParkedFilter, ParkedStore, Removed,
};
pub use properties::{ForwardConfigError, validate};
pub use requeue::{OfflineSpill, Requeue, RequeueError};
pub use router::Topics;
#[doc(hidden)]
pub use spill::SpillContents;
pub use spill::SpillError;
pub use status::{ForwardStatus, LastError};

use crate::config::{Delivery, ForwardConfig};
use crate::metrics::Metrics;
use crate::wal::Wal;
use backoff::{Backoff, Retry};
use kafka::Producer;
use replay::{Parts, Renewal, Replay};
use requeue::Requeuer;
use spilling::Spilling;
use status::Shared;

/// Where the spill is, in the log's directory.
const SPILL: &str = "spill";

/// Part of the time to stop that is kept for taking the producer down: a tenth of it, and no more than this.
const TEAR_DOWN_MAX: Duration = Duration::from_millis(500);

/// The running forwarder. Dropping it ends its thread soon, without waiting.
pub struct Forwarder {
    shared: Arc<Shared>,
    wal: Wal,
    parked: ParkedStore,
    requeuer: Requeuer,
    thread: Mutex<Option<ForwardThread>>,
}

struct ForwardThread {
    handle: JoinHandle<()>,
    /// Says twice that something is done: everything told to the log, and the producer gone.
    done: Receiver<()>,
}

/// Why the forwarder did not start.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The configuration is wrong.
    #[error("cannot forward with this configuration")]
    Config(#[from] ForwardConfigError),
    /// The parked store cannot be read.
    #[error("cannot open the parked store")]
    Parked(#[from] ParkedError),
    /// The spill cannot be read.
    #[error("cannot open the spill")]
    Spill(#[from] SpillError),
    /// librdkafka does not start.
    #[error("cannot start the kafka producer")]
    Producer(#[from] ProducerError),
    /// The thread does not start.
    #[error("cannot start the forward thread")]
    Thread(#[from] std::io::Error),
}

impl Forwarder {
    /// Starts to forward from the log's cursor. Does not wait for a broker. With `brokers = []` nothing is forwarded, and only
    /// what the operator chose to give up is discarded.
    ///
    /// `batch_bytes_max` is the largest request that the log may hold.
    ///
    /// # Errors
    /// See [`ForwardError`]; nothing runs then.
    pub fn start(
        config: &ForwardConfig,
        batch_bytes_max: u64,
        wal: Wal,
        metrics: Arc<Metrics>,
    ) -> Result<Forwarder, ForwardError> {
        validate(config)?;
        let parked = ParkedStore::open_for(&config.parked, &wal, &metrics)?;
        let parked_before = wal.parked_before(parked.last_id()).map_err(ParkedError::from)?;
        let seed = rand::random();
        let spilling = Spilling::open(
            &wal.config().directory.join(SPILL),
            config.in_flight_bytes_max.as_u64(),
            Retry::new(Backoff::new(config.retry_delay_min, config.retry_delay_max)),
            SmallRng::seed_from_u64(seed),
        )?;
        wal.note_spilled(spilling.count());
        let mut properties = properties::properties(config, batch_bytes_max);
        properties.extend(properties::password(config)?);
        if config.delivery == Delivery::ExactlyOnce {
            properties.push(("transactional.id".into(), replay::transactional_id(config, &wal)));
        }
        let shared = Arc::new(Shared::new());
        let renewal = Renewal::new(&properties, &config.kafka_password_file);
        let producer = if config.brokers.is_empty() { None } else { Some(Producer::new(&properties)?) };
        let parts = Parts {
            config: config.clone(),
            producer,
            properties,
            renewal,
            topic_propagation: properties::topic_propagation(config),
            wal: wal.clone(),
            parked: parked.clone(),
            parked_before,
            spilling,
            metrics,
            shared: shared.clone(),
            seed,
        };
        let (requeuer, requeued) = requeue::channel(wal.clone());
        let (told, done) = mpsc::channel();
        let handle = std::thread::Builder::new().name("forward".into()).spawn(move || {
            let mut replay = Replay::new(parts, requeued);
            replay.run();
            // The handle may be gone.
            let _ = told.send(());
            drop(replay);
            let _ = told.send(());
        })?;
        Ok(Forwarder { shared, wal, parked, requeuer, thread: Mutex::new(Some(ForwardThread { handle, done })) })
    }

    /// Takes over `forward.pace` and `forward.topic`, within a second. What is in flight, held or spilled keeps its topic.
    pub fn reload(&self, config: &ForwardConfig) {
        self.shared.reload(config.clone());
        self.wal.wake_reader();
    }

    /// The forwarder as it is now.
    pub fn status(&self) -> ForwardStatus {
        self.shared.status().clone()
    }

    /// The parked events of this log.
    pub fn parked(&self) -> &ParkedStore {
        &self.parked
    }

    /// Takes events back into the backlog.
    pub fn requeuer(&self) -> impl Requeue + use<> {
        self.requeuer.clone()
    }

    /// How long ago the loop last turned. An idle one turns at least every second.
    pub fn heartbeat_age(&self) -> Duration {
        self.shared.beat_age()
    }

    /// Stops reading, waits for what Kafka holds, tells the log what was delivered, ends the thread; all of it within
    /// `timeout`. What is not delivered by then stays in the log. Later calls do nothing.
    pub fn stop(&self, timeout: Duration) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(ForwardThread { handle, done }) = thread else { return };
        let deadline = Instant::now() + timeout;
        self.shared.stop(deadline - (timeout / 10).min(TEAR_DOWN_MAX));
        self.wal.wake_reader();
        for _ in 0..2 {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Err(mpsc::RecvTimeoutError::Timeout) = done.recv_timeout(left) {
                warn!("forward thread did not end in time, leaving it behind");
                return;
            }
        }
        if handle.join().is_err() {
            warn!("forward thread had panicked");
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.shared.stop(Instant::now());
        self.wal.wake_reader();
    }
}

/// What the spill of this log holds, for tests. Settles it, as a start does.
///
/// # Errors
/// [`SpillError::Io`]
#[doc(hidden)]
pub fn spill_contents(wal: &Wal) -> Result<SpillContents, SpillError> {
    let mut spill = spill::Spill::open(&wal.config().directory.join(SPILL))?;
    spill.settle(&wal.undelivered())?;
    let mut events = Vec::new();
    let lost = spill.for_each(|topic, event, _| {
        events.push((topic.to_owned(), event.payload.clone()));
        Ok::<(), SpillError>(())
    })?;
    Ok(SpillContents { events, lost })
}

/// Why a delivery attempt failed. Also the `reason` label of `ringtail_forward_delivery_failures_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureReason {
    /// The broker refused the size.
    TooLarge,
    /// The topic does not exist, or not yet.
    UnknownTopic,
    /// The topic may not be written.
    NotAuthorised,
    /// The broker refused the record.
    InvalidRecord,
    /// The producer itself broke and was rebuilt.
    ProducerFatal,
    /// Anything else.
    Other,
}

impl FailureReason {
    /// Every reason.
    pub const ALL: [FailureReason; 6] = [
        FailureReason::TooLarge,
        FailureReason::UnknownTopic,
        FailureReason::NotAuthorised,
        FailureReason::InvalidRecord,
        FailureReason::ProducerFatal,
        FailureReason::Other,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            FailureReason::TooLarge => "too_large",
            FailureReason::UnknownTopic => "unknown_topic",
            FailureReason::NotAuthorised => "not_authorised",
            FailureReason::InvalidRecord => "invalid_record",
            FailureReason::ProducerFatal => "producer_fatal",
            FailureReason::Other => "other",
        }
    }
}

/// Why an event was parked. Also the `reason` label of `ringtail_forward_parked_events_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParkReason {
    /// Too large for the broker even alone.
    TooLarge,
    /// The topic's name is not one that Kafka takes.
    InvalidTopic,
    /// The topic did not appear within `forward.topic_grace`.
    UnknownTopic,
    /// Writing the topic was not allowed within `forward.topic_grace`.
    NotAuthorised,
    /// The broker refused the record itself.
    InvalidRecord,
    /// Older than `wal.age_max`, and `wal.when_aged` is `park`.
    Expired,
}

impl ParkReason {
    /// Every reason.
    pub const ALL: [ParkReason; 6] = [
        ParkReason::TooLarge,
        ParkReason::InvalidTopic,
        ParkReason::UnknownTopic,
        ParkReason::NotAuthorised,
        ParkReason::InvalidRecord,
        ParkReason::Expired,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ParkReason::TooLarge => "too_large",
            ParkReason::InvalidTopic => "invalid_topic",
            ParkReason::UnknownTopic => "unknown_topic",
            ParkReason::NotAuthorised => "not_authorised",
            ParkReason::InvalidRecord => "invalid_record",
            ParkReason::Expired => "expired",
        }
    }
}
