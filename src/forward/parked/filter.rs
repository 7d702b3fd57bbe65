//! Which parked events are wanted.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::ParkedEvent;
use crate::forward::ParkReason;

/// A filter. Those of different kinds must all hold; of several of the same kind one must.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParkedFilter {
    /// Only for these topics.
    pub topics: Vec<String>,
    /// Only for these reasons.
    pub reasons: Vec<ParkReason>,
    /// Only events of these types.
    pub event_types: Vec<String>,
    /// Only of clients in these groups.
    pub groups: Vec<String>,
    /// Only of clients with these ids.
    pub connection_ids: Vec<String>,
    /// Only with these keys.
    pub keys: Vec<String>,
    /// Only of batches from this sequence on.
    pub from_sequence: Option<u64>,
    /// Only of batches up to this sequence.
    pub until_sequence: Option<u64>,
    /// Only received at this time or later, milliseconds since the Unix epoch.
    pub received_from_ms: Option<u64>,
    /// Only received before this time.
    pub received_until_ms: Option<u64>,
    /// Only parked at this time or later.
    pub parked_from_ms: Option<u64>,
    /// Only parked before this time.
    pub parked_until_ms: Option<u64>,
    /// Only these events.
    pub ids: BTreeSet<u64>,
    /// Only with ids from here on.
    pub from_id: Option<u64>,
    /// Only with ids up to here.
    pub until_id: Option<u64>,
    /// At most so many, the oldest ones.
    pub limit: Option<u64>,
}

impl ParkedFilter {
    /// Whether an event is wanted, but for the limit.
    pub fn matches(&self, event: &ParkedEvent) -> bool {
        let about = &event.about;
        self.matches_id(event.id)
            && is_one_of(&self.topics, &about.topic)
            && (self.reasons.is_empty() || self.reasons.contains(&about.reason))
            && is_one_of(&self.event_types, &about.event_type)
            && is_one_of(&self.groups, &about.group)
            && is_one_of(&self.connection_ids, &about.connection_id)
            && (self.keys.is_empty() || about.key.as_ref().is_some_and(|key| self.keys.contains(key)))
            && self.from_sequence.is_none_or(|from| about.sequence.0 >= from)
            && self.until_sequence.is_none_or(|until| about.sequence.0 <= until)
            && is_within(about.received_at_ms, self.received_from_ms, self.received_until_ms)
            && is_within(about.parked_at_ms, self.parked_from_ms, self.parked_until_ms)
    }

    /// Whether an event with this id may be wanted.
    pub fn matches_id(&self, id: u64) -> bool {
        (self.ids.is_empty() || self.ids.contains(&id))
            && self.from_id.is_none_or(|from| id >= from)
            && self.until_id.is_none_or(|until| id <= until)
    }

    /// Whether the id alone decides, so that an event that cannot be read can be wanted too.
    pub fn is_by_id(&self) -> bool {
        let ParkedFilter { ids, from_id, until_id, limit, .. } = self.clone();
        ParkedFilter { ids, from_id, until_id, limit, ..ParkedFilter::default() } == *self
    }

    /// Whether every event is wanted, but for the limit.
    pub fn is_empty(&self) -> bool {
        ParkedFilter { limit: self.limit, ..ParkedFilter::default() } == *self
    }

    /// No id below is wanted.
    pub fn first_id(&self) -> u64 {
        self.from_id.unwrap_or(0).max(self.ids.first().copied().unwrap_or(0))
    }

    /// No id above is wanted.
    pub fn last_id(&self) -> u64 {
        self.until_id.unwrap_or(u64::MAX).min(self.ids.last().copied().unwrap_or(u64::MAX))
    }
}

fn is_one_of(wanted: &[String], value: &str) -> bool {
    wanted.is_empty() || wanted.iter().any(|wanted| wanted == value)
}

fn is_within(value: u64, from: Option<u64>, until: Option<u64>) -> bool {
    from.is_none_or(|from| value >= from) && until.is_none_or(|until| value < until)
}
