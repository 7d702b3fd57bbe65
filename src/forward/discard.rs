//! What the operator chose to give up: the oldest segments of a full log (`wal.when_full = "drop_oldest"`), and batches
//! older than `wal.age_max`. The forwarder does it, because it alone knows which events are delivered: a discarded record
//! goes through the watermark like any other, so that each of its events is counted once, as delivered, parked or dropped.
//! The age of an event in the spill is looked at when its turn comes to be sent.
//!
//! What the Kafka client holds of it is given a moment to arrive. If that does not move, or there is no broker, the
//! producer is replaced, and the records are read, and discarded, anew.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use super::backoff::{Every, LogLimit};
use super::router::Router;
use super::spill::SpilledEvent;
use crate::batch::Batch;
use crate::config::{WalConfig, WhenAged};
use crate::wal::{Position, Record, Wal};

/// How long the Kafka client may hold what is to be discarded, while there is a broker.
const PATIENCE: Duration = Duration::from_secs(2);

/// At most one replaced producer in so long for the sake of age: what is in flight grows old all the time.
const AGE_INTERVAL: Duration = Duration::from_secs(5);

/// The same for the sake of events in the spill: a tenth of `wal.age_max`, within these bounds.
const SPILLED_INTERVAL_MAX: Duration = Duration::from_secs(600);

/// One line about dropped events in so long.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Topics counted by name, those of events that are given up; the rest is counted under [`OTHER_TOPICS`]. Clients choose
/// how many there are.
const TOPICS_MAX: usize = 100;
const OTHER_TOPICS: &str = "(other)";

/// Why events were dropped. Also the `reason` label of `ringtail_forward_dropped_events_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The log was full, and `wal.when_full` is `drop_oldest`.
    Full,
    /// Older than `wal.age_max`.
    Expired,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [DropReason; 2] = [DropReason::Full, DropReason::Expired];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            DropReason::Full => "full",
            DropReason::Expired => "expired",
        }
    }
}

/// Events of one record, or one of the spill, that were given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) reason: DropReason,
    /// How many, by topic.
    pub(super) topics: Vec<(Arc<str>, u64)>,
}

/// What becomes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Deliver,
    Drop(DropReason),
    /// It is too old, and kept as dead letters.
    Park,
}

/// Decides what is given up.
pub(super) struct Discard {
    age_max_ms: Option<u64>,
    when_aged: WhenAged,
    topics: HashMap<Box<str>, Arc<str>>,
    /// The oldest record, and since when it has been that.
    stuck: Option<(Position, Instant)>,
    aged_at: Option<Instant>,
    spilled_looks: Every,
    log_limit: LogLimit,
    unlogged: u64,
}

impl Discard {
    pub(super) fn new(config: &WalConfig) -> Discard {
        let age_max_ms = u64::try_from(config.age_max.as_millis()).unwrap_or(u64::MAX);
        Discard {
            age_max_ms: (age_max_ms > 0).then_some(age_max_ms),
            when_aged: config.when_aged,
            topics: HashMap::new(),
            stuck: None,
            aged_at: None,
            spilled_looks: Every::new((config.age_max / 10).clamp(AGE_INTERVAL, SPILLED_INTERVAL_MAX)),
            log_limit: LogLimit::new(LOG_INTERVAL),
            unlogged: 0,
        }
    }

    /// What becomes of `record`, read now.
    pub(super) fn verdict(&self, record: &Record, wal: &Wal, now_ms: u64) -> Verdict {
        if wal.is_given_up(record.end) {
            return Verdict::Drop(DropReason::Full);
        }
        self.verdict_on_age(record.batch.received_at_ms, now_ms)
    }

    /// What becomes of an event in the spill. What an operator has put back has no age, nor has a dead letter.
    pub(super) fn verdict_on_spilled(&self, event: &SpilledEvent, now_ms: u64) -> Verdict {
        if event.requeued || !event.headers.is_empty() {
            return Verdict::Deliver;
        }
        self.verdict_on_age(event.received_at_ms, now_ms)
    }

    fn verdict_on_age(&self, received_at_ms: u64, now_ms: u64) -> Verdict {
        match self.when_aged {
            _ if !self.is_aged(received_at_ms, now_ms) => Verdict::Deliver,
            WhenAged::Drop => Verdict::Drop(DropReason::Expired),
            WhenAged::Park => Verdict::Park,
        }
    }

    /// Whether events grow too old at all.
    pub(super) fn has_age(&self) -> bool {
        self.age_max_ms.is_some()
    }

    /// Whether it is time to look for events of the spill that grow old in the client.
    pub(super) fn may_look_at_spilled(&mut self, now: Instant) -> bool {
        self.has_age() && self.spilled_looks.is_due(now)
    }

    /// Whether a batch received then is too old now.
    pub(super) fn is_aged(&self, received_at_ms: u64, now_ms: u64) -> bool {
        self.age_max_ms.is_some_and(|age_max_ms| received_at_ms.saturating_add(age_max_ms) < now_ms)
    }

    /// Whether the producer must be replaced, because the oldest record in flight, as (end, received at), is to be
    /// discarded and does not move.
    pub(super) fn is_stuck(
        &mut self,
        oldest: Option<(Position, u64)>,
        wal: &Wal,
        connected: bool,
        now: Instant,
        now_ms: u64,
    ) -> bool {
        let Some((end, received_at_ms)) = oldest else { return false };
        let given_up = wal.is_given_up(end);
        let resting = self.aged_at.is_some_and(|aged_at| now < aged_at + AGE_INTERVAL);
        if !given_up && (resting || !self.is_aged(received_at_ms, now_ms)) {
            self.stuck = None;
            return false;
        }
        let since = self.stuck.filter(|(before, _)| *before == end).map_or(now, |(_, since)| since);
        self.stuck = Some((end, since));
        if connected && now < since + PATIENCE {
            return false;
        }
        self.stuck = None;
        self.aged_at = Some(now);
        true
    }

    /// Counts the events of a batch by topic.
    pub(super) fn count(&mut self, batch: &Batch, reason: DropReason, router: &Router) -> Dropped {
        let mut topics: Vec<(Arc<str>, u64)> = Vec::new();
        for event in batch.request.events() {
            let topic = self.topic(event.event_type, router);
            match topics.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &topic)) {
                Some((_, count)) => *count += 1,
                None => topics.push((topic, 1)),
            }
        }
        Dropped { reason, topics }
    }

    /// Counts an event of the spill.
    pub(super) fn count_spilled(&mut self, topic: &str, reason: DropReason) -> Dropped {
        Dropped { reason, topics: vec![(self.label(topic, || topic.into()), 1)] }
    }

    fn topic(&mut self, event_type: &str, router: &Router) -> Arc<str> {
        self.label(router.lane_name(event_type), || router.topic(event_type).into())
    }

    /// The topic of `name` as it is counted.
    fn label(&mut self, name: &str, topic: impl FnOnce() -> Arc<str>) -> Arc<str> {
        if let Some(topic) = self.topics.get(name) {
            return topic.clone();
        }
        let is_full = self.topics.len() >= TOPICS_MAX;
        let (name, topic) = if is_full { (OTHER_TOPICS, OTHER_TOPICS.into()) } else { (name, topic()) };
        self.topics.entry(name.into()).or_insert(topic).clone()
    }

    /// Logs what the watermark passed of dropped events.
    pub(super) fn report(&mut self, dropped: &[Dropped], now: Instant) {
        let Some(last) = dropped.last() else { return };
        self.unlogged += dropped.iter().flat_map(|dropped| &dropped.topics).map(|(_, count)| count).sum::<u64>();
        if self.log_limit.admit(now).is_some() {
            let (events, reason) = (std::mem::take(&mut self.unlogged), last.reason.as_str());
            warn!(events, reason, "events dropped, as the configuration says");
        }
    }
}
