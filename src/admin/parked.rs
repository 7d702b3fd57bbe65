//! What can be done with parked events: the same through the control socket and on a store that is opened offline.
//!
//! A [`ParkedCommand`] is one path on the control socket, its arguments one JSON object. It answers with lines, each one
//! [`ParkedLine`] as JSON, the last of which is [`ParkedLine::Done`] or [`ParkedLine::Failed`]: without one the answer was
//! broken off.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::forward::{
    ParkedAbout, ParkedDropReason, ParkedError, ParkedEvent, ParkedFilter, ParkedStore, Requeue, RequeueError,
};

/// Ids and reasons of parked events, oldest first.
pub type ParkedReasons = Box<dyn Iterator<Item = (u64, &'static str)> + Send>;

/// Longest silence of a command that works, so that nobody takes it for dead.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Most events worked on between two lines.
const BATCH_EVENTS_MAX: usize = 1024;

/// Payload bytes after which a batch is worked on.
const BATCH_BYTES_MAX: u64 = 4 << 20;

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParkedLine {
    /// An event.
    Event(ParkedEvent),
    /// An event without its payload.
    Summary(ParkedSummary),
    /// An event that cannot be read.
    Damaged {
        /// The event.
        id: u64,
        /// What is wrong with it.
        message: String,
    },
    /// How far it is.
    Progress(ParkedProgress),
    /// All is done.
    Done(ParkedProgress),
    /// Why it ended early. What it says of progress is durable.
    Failed {
        /// The cause.
        message: String,
        /// How far it came.
        progress: ParkedProgress,
    },
}

/// A parked event without its payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedSummary {
    /// Its name in the store.
    pub id: u64,
    /// Why it is here and where it came from.
    #[serde(flatten)]
    pub about: ParkedAbout,
    /// Bytes of its payload.
    pub payload_bytes: u64,
}

/// How far a command is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedProgress {
    /// Events looked at.
    pub seen_events: u64,
    /// Events in the store when it began.
    pub total_events: u64,
    /// Events that it is done with: listed, or dropped.
    pub events: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// No event with a higher id was looked at.
    pub last_id: u64,
}

/// Takes the lines of an answer. [`ControlFlow::Break`] when nobody wants more: the command stops then.
pub type Take<'a> = &'a mut dyn FnMut(ParkedLine) -> ControlFlow<()>;

/// Something to do with parked events.
pub trait ParkedCommand: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// Its path on the control socket.
    const PATH: &str;

    /// Whether it removes events; otherwise it only looks.
    fn removes(&self) -> bool;

    /// Does it. May block.
    fn run(&self, store: &ParkedStore, requeue: &dyn Requeue, take: Take<'_>);
}

/// Shows events, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParkedList {
    /// Which.
    pub filter: ParkedFilter,
    /// Without their payloads.
    pub summary: bool,
}

/// Drops events for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParkedDrop {
    /// Which. An event that cannot be read is dropped if its id alone decides, else it stays.
    pub filter: ParkedFilter,
    /// Only count them.
    pub dry_run: bool,
}

impl ParkedCommand for ParkedList {
    const PATH: &str = "/parked/list";

    fn removes(&self) -> bool {
        false
    }

    fn run(&self, store: &ParkedStore, _: &dyn Requeue, take: Take<'_>) {
        let mut walk = Walk::new(store, &self.filter, take);
        while let Some(found) = walk.next() {
            let line = match found {
                Ok(event) => {
                    let payload_bytes = event.payload.len() as u64;
                    walk.progress.events += 1;
                    walk.progress.bytes += payload_bytes;
                    let ParkedEvent { id, about, .. } = &event;
                    if self.summary {
                        ParkedLine::Summary(ParkedSummary { id: *id, about: about.clone(), payload_bytes })
                    } else {
                        ParkedLine::Event(event)
                    }
                }
                Err((id, message)) => ParkedLine::Damaged { id, message },
            };
            walk.say(line);
        }
        walk.end();
    }
}

impl ParkedCommand for ParkedDrop {
    const PATH: &str = "/parked/drop";

    fn removes(&self) -> bool {
        !self.dry_run
    }

    fn run(&self, store: &ParkedStore, _: &dyn Requeue, take: Take<'_>) {
        let mut walk = Walk::new(store, &self.filter, take);
        walk.in_batches(self.dry_run, self.filter.is_by_id(), |batch| {
            Ok::<u64, ParkedError>(store.drop_events(&batch.ids, ParkedDropReason::Operator)?.events)
        });
        if !self.dry_run && walk.progress.events > 0 {
            let (events, bytes) = (walk.progress.events, walk.progress.bytes);
            tracing::info!(events, bytes, "parked events dropped by the operator");
        }
        walk.end();
    }
}

/// Puts events back into the backlog, at the end of what waits for their topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParkedRequeue {
    /// Which. An event that cannot be read stays.
    pub filter: ParkedFilter,
    /// Where to send them; none: each to its own topic.
    pub topic: Option<String>,
    /// Only count them.
    pub dry_run: bool,
}

impl ParkedCommand for ParkedRequeue {
    const PATH: &str = "/parked/requeue";

    fn removes(&self) -> bool {
        !self.dry_run
    }

    fn run(&self, store: &ParkedStore, requeue: &dyn Requeue, take: Take<'_>) {
        let mut walk = Walk::new(store, &self.filter, take);
        walk.in_batches(self.dry_run, false, |batch| {
            // In this order: a crash in between leaves an event in both places rather than in none.
            requeue.requeue(&batch.events, self.topic.as_deref())?;
            store.remove(&batch.ids)?;
            Ok::<u64, RequeueFailed>(batch.ids.len() as u64)
        });
        if !self.dry_run && walk.progress.events > 0 {
            tracing::info!(events = walk.progress.events, "parked events requeued by the operator");
        }
        walk.end();
    }
}

/// Why events were not requeued.
#[derive(Debug, thiserror::Error)]
enum RequeueFailed {
    #[error(transparent)]
    Requeue(#[from] RequeueError),
    #[error("the events are in the backlog, and stay parked as well")]
    Parked(#[from] ParkedError),
}

/// Goes through the wanted events, and shows from time to time how far it is.
struct Walk<'a> {
    events: crate::forward::ParkedEvents,
    filter: &'a ParkedFilter,
    left: u64,
    progress: ParkedProgress,
    take: Take<'a>,
    shown_at: Instant,
    ended: Option<End>,
}

/// Events to do something with at once.
#[derive(Default)]
struct Batch {
    /// Those that can be read.
    events: Vec<ParkedEvent>,
    /// All of them.
    ids: Vec<u64>,
    payload_bytes: u64,
}

enum End {
    /// Nobody takes the answer any more.
    Unwanted,
    Failed(String),
}

impl<'a> Walk<'a> {
    fn new(store: &ParkedStore, filter: &'a ParkedFilter, take: Take<'a>) -> Walk<'a> {
        let last_id = store.last_id().min(filter.last_id());
        let progress = ParkedProgress { total_events: store.count(), last_id, ..ParkedProgress::default() };
        let (events, left) = (store.events(filter.first_id()), filter.limit.unwrap_or(u64::MAX));
        Walk { events, filter, left, progress, take, shown_at: Instant::now(), ended: None }
    }

    /// The next wanted event, or one that cannot be read and why. None at the end.
    fn next(&mut self) -> Option<Result<ParkedEvent, (u64, String)>> {
        while self.ended.is_none() && self.left > 0 {
            if self.shown_at.elapsed() >= PROGRESS_INTERVAL {
                self.say(ParkedLine::Progress(self.progress));
            }
            let found = self.events.next()?;
            let id = match &found {
                Ok(event) => event.id,
                Err(ParkedError::Damaged { id, .. }) => *id,
                Err(_) => 0,
            };
            if id > self.progress.last_id {
                return None;
            }
            self.progress.seen_events += 1;
            match found {
                Ok(event) if self.filter.matches(&event) => {
                    self.left -= 1;
                    return Some(Ok(event));
                }
                Err(error @ ParkedError::Damaged { .. }) if self.filter.matches_id(id) => {
                    return Some(Err((id, message(error))));
                }
                Ok(_) | Err(ParkedError::Damaged { .. }) => {}
                Err(error) => self.ended = Some(End::Failed(message(error))),
            }
        }
        None
    }

    /// Gives the wanted events to `work`, which returns with how many it is done; with a dry run they are only counted.
    /// Without `damaged_too`, those that cannot be read stay, and are told.
    fn in_batches<E: std::error::Error>(
        &mut self,
        dry_run: bool,
        damaged_too: bool,
        mut work: impl FnMut(&Batch) -> Result<u64, E>,
    ) {
        loop {
            let mut batch = Batch::default();
            while batch.ids.len() < BATCH_EVENTS_MAX && batch.payload_bytes < BATCH_BYTES_MAX {
                match self.next() {
                    None => break,
                    Some(Ok(event)) => {
                        batch.ids.push(event.id);
                        batch.payload_bytes += event.payload.len() as u64;
                        batch.events.push(event);
                    }
                    Some(Err((id, _))) if damaged_too => batch.ids.push(id),
                    Some(Err((id, message))) => self.say(ParkedLine::Damaged { id, message }),
                }
            }
            if batch.ids.is_empty() || self.ended.is_some() {
                return;
            }
            let result = if dry_run { Ok(batch.ids.len() as u64) } else { work(&batch) };
            match result {
                Ok(events) => {
                    self.progress.events += events;
                    self.progress.bytes += batch.payload_bytes;
                }
                Err(error) => self.ended = Some(End::Failed(message(error))),
            }
            if !dry_run && self.ended.is_none() {
                self.say(ParkedLine::Progress(self.progress));
            }
        }
    }

    fn say(&mut self, line: ParkedLine) {
        self.shown_at = Instant::now();
        if (self.take)(line).is_break() {
            self.ended = Some(End::Unwanted);
        }
    }

    fn end(mut self) {
        let progress = self.progress;
        match self.ended.take() {
            None => self.say(ParkedLine::Done(progress)),
            Some(End::Failed(message)) => self.say(ParkedLine::Failed { message, progress }),
            Some(End::Unwanted) => {}
        }
    }
}

/// An error with its causes.
fn message(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
