//! Parked events that go back into the backlog: they are put into the spill, at the end of their topic or of another one, and
//! are delivered from there like everything in it. And the spill as the tools see it.
//!
//! While the service runs, its forward thread does it; otherwise the spill is opened by itself.

use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use prost::Message;

use super::SPILL;
use super::parked::ParkedEvent;
use super::router::is_topic_name;
use super::spill::{Spill, SpillError, SpilledEvent};
use crate::batch::{Batch, Client, Request, Sequence};
use crate::proto::{Event, SendEventRequest};
use crate::wal::Undelivered;
use crate::wal::Wal;

/// Longest wait for the forward thread.
const PATIENCE: Duration = Duration::from_secs(60);

/// Requests that may wait for the forward thread.
const REQUESTS_MAX: usize = 4;

/// Why events were not requeued. They are still parked.
#[derive(Debug, thiserror::Error)]
pub enum RequeueError {
    /// The event's own topic, or the one that was given, has no name that Kafka takes.
    #[error("{topic:?} is not a topic's name: give another one to send to")]
    Topic {
        /// The name.
        topic: String,
    },
    /// The spill cannot be written.
    #[error("cannot write the spill")]
    Spill(#[from] SpillError),
    /// The forward thread does not take them.
    #[error("the forwarder does not take events now, try again")]
    Busy,
}

/// Something that takes events back into the backlog.
pub trait Requeue: Send + Sync {
    /// Puts `events` at the end of what waits for `topic`, or each for its own. Durable on return. They must not stay parked.
    /// May block.
    ///
    /// # Errors
    /// [`RequeueError`]: none of them is in the backlog, but for [`RequeueError::Busy`], which does not know.
    fn requeue(&self, events: &[ParkedEvent], topic: Option<&str>) -> Result<(), RequeueError>;
}

/// Events for the spill, by topic, in order.
pub(super) type ByTopic = Vec<(String, Vec<SpilledEvent>)>;

/// A request to the forward thread.
pub(super) struct Requested {
    pub(super) events: ByTopic,
    /// Nobody waits for the answer any more then.
    pub(super) until: Instant,
    pub(super) answer: SyncSender<Result<(), SpillError>>,
}

/// The forward thread, as seen by others.
#[derive(Clone)]
pub(super) struct Requeuer {
    requests: SyncSender<Requested>,
    wal: Wal,
}

/// Both ends of the way to the forward thread.
pub(super) fn channel(wal: Wal) -> (Requeuer, Receiver<Requested>) {
    let (requests, requested) = mpsc::sync_channel(REQUESTS_MAX);
    (Requeuer { requests, wal }, requested)
}

impl Requeue for Requeuer {
    fn requeue(&self, events: &[ParkedEvent], topic: Option<&str>) -> Result<(), RequeueError> {
        let (answer, answered) = mpsc::sync_channel(1);
        // A little earlier than the answer is given up: it must not be done after that.
        let until = Instant::now() + PATIENCE / 2;
        let requested = Requested { events: by_topic(events, topic)?, until, answer };
        self.requests.try_send(requested).map_err(|_| RequeueError::Busy)?;
        self.wal.wake_reader();
        match answered.recv_timeout(PATIENCE) {
            Ok(result) => Ok(result?),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(RequeueError::Busy),
        }
    }
}

/// The spill of a log that no process has open.
pub struct OfflineSpill(Mutex<Spill>);

impl OfflineSpill {
    /// Opens the spill of the log in `directory`, which the caller has locked.
    ///
    /// # Errors
    /// [`SpillError::Io`]
    pub fn open(directory: &Path) -> Result<OfflineSpill, SpillError> {
        Ok(OfflineSpill(Mutex::new(Spill::open(&directory.join(SPILL))?)))
    }

    /// Gives each event to `take`, topic by topic and in order, as a batch of its own with the sequence that its batch had in
    /// the log; but for those that the log shows as well. How many cannot be read.
    ///
    /// # Errors
    /// Those of `take`, and [`SpillError::Io`].
    pub fn read<E: From<SpillError>>(
        &self,
        undelivered: &Undelivered,
        mut take: impl FnMut(Sequence, Batch) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut spill = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spill.for_each(|_, event, is_settled| {
            // What a start has left is not in the log, whatever its sequence says: it may come from another log.
            let is_in_log = !is_settled && undelivered.contains(Sequence(event.log_sequence()));
            if is_in_log { Ok(()) } else { take(Sequence(event.sequence), batch(event.clone())) }
        })
    }
}

impl Requeue for OfflineSpill {
    fn requeue(&self, events: &[ParkedEvent], topic: Option<&str>) -> Result<(), RequeueError> {
        let events = by_topic(events, topic)?;
        let mut spill = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spill.put(events.iter().map(|(topic, events)| (topic.as_str(), events.clone())).collect())?;
        Ok(())
    }
}

/// A batch of one event.
fn batch(event: SpilledEvent) -> Batch {
    let request = SendEventRequest {
        req_guid: event.req_guid,
        events: vec![Event { event_bytes: event.payload, r#type: event.event_type }],
        ..SendEventRequest::default()
    };
    Batch {
        received_at_ms: event.received_at_ms,
        client: Client { group: event.group.into(), id: event.connection_id.into() },
        request: Request::parse(request.encode_to_vec().into()).expect("what prost encodes is well-formed"),
    }
}

fn by_topic(events: &[ParkedEvent], topic: Option<&str>) -> Result<ByTopic, RequeueError> {
    let mut topics: ByTopic = Vec::new();
    for event in events {
        let about = &event.about;
        let topic = topic.unwrap_or(&about.topic);
        if !is_topic_name(topic) {
            return Err(RequeueError::Topic { topic: topic.to_owned() });
        }
        let spilled = SpilledEvent {
            sequence: about.sequence.0,
            received_at_ms: about.received_at_ms,
            group: about.group.clone(),
            connection_id: about.connection_id.clone(),
            req_guid: about.req_guid.clone(),
            event_type: about.event_type.clone(),
            key: about.key.clone(),
            payload: event.payload.clone(),
            headers: Vec::new(),
            requeued: true,
        };
        match topics.iter_mut().find(|(known, _)| known == topic) {
            Some((_, events)) => events.push(spilled),
            None => topics.push((topic.to_owned(), vec![spilled])),
        }
    }
    Ok(topics)
}
