//! The way into the parked store: events wait here until they are durable there, and stay open in flight until then, so
//! that the cursor cannot pass them. Many share one sync. When the store fails (a full disk), they wait and are tried
//! again.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use rand::rngs::SmallRng;
use tracing::{error, info};

use super::ParkReason;
use super::backoff::Retry;
use super::in_flight::{InFlight, Walk};
use super::lanes::{Fate, LaneId, Lanes, ToPark};
use super::parked::{Limits, ParkedAbout, ParkedError, ParkedEvent, ParkedStore};
use super::router::Router;
use super::spill::{Header, SpillError, SpilledEvent};
use super::spilling::Spilling;
use crate::batch::{Sequence, now_ms};
use crate::kill_point;
use crate::metrics::Metrics;
use crate::wal::Undelivered;

/// Most events parked with one sync.
const EVENTS_MAX: usize = 1024;

/// Events on their way into the parked store.
pub(super) struct Parking {
    store: ParkedStore,
    waiting: VecDeque<ToPark>,
    written: Vec<Written>,
    storing: Retry,
    limits: Limits,
    rng: SmallRng,
}

/// Where the events to park are.
pub(super) struct Origin<'a> {
    pub(super) in_flight: &'a mut InFlight,
    pub(super) lanes: &'a mut Lanes,
    pub(super) spilling: &'a mut Spilling,
    pub(super) router: &'a Router,
    pub(super) metrics: &'a Metrics,
    /// `forward.dead_letter_topic`
    pub(super) dead_letter_topic: Option<&'a str>,
}

/// Why events are not parked yet.
#[derive(Debug, thiserror::Error)]
enum ParkingError {
    #[error(transparent)]
    Parked(#[from] ParkedError),
    #[error("cannot read what is to be parked")]
    Spill(#[from] SpillError),
}

/// An event in the store, not yet durable.
struct Written {
    to_park: ToPark,
    payload_bytes: u64,
}

impl Parking {
    /// Parks into `store`; a failure is tried again as `storing` says.
    pub(super) fn new(store: ParkedStore, storing: Retry, rng: SmallRng) -> Parking {
        let limits = Limits::new(&store, storing.clone(), rng.clone());
        Parking { store, waiting: VecDeque::new(), written: Vec::new(), storing, limits, rng }
    }

    /// Takes over `events`, leaving it empty.
    pub(super) fn add(&mut self, events: &mut Vec<ToPark>) {
        self.waiting.extend(events.drain(..));
    }

    /// The newest event in the store; 0 if there is none.
    pub(super) fn last_id(&self) -> u64 {
        self.store.last_id()
    }

    /// Takes back what was parked after `id` of batches that the log shows again: it is parked again then. What came out of
    /// the spill is not: it was parked behind the cursor, and if it was requeued, its sequence may be another log's. Of that
    /// it tells what `is_spilled` finds in the spill: it is only not yet worked off there.
    ///
    /// # Errors
    /// [`ParkedError`]: worth a retry.
    pub(super) fn take_back(
        &self,
        id: u64,
        undelivered: &Undelivered,
        mut is_spilled: impl FnMut(&ParkedEvent) -> bool,
    ) -> Result<Vec<ParkedAbout>, ParkedError> {
        let shown_again =
            |event: &ParkedEvent| event.about.spill_number.is_none() && undelivered.contains(event.about.sequence);
        let (mut ids, mut spilled) = (Vec::new(), Vec::new());
        for event in self.store.events(id + 1) {
            match event {
                Ok(event) if shown_again(&event) => ids.push(event.id),
                Ok(event) if is_spilled(&event) => spilled.push(event.about),
                Ok(_) | Err(ParkedError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if !ids.is_empty() {
            self.store.remove(&ids)?;
        }
        Ok(spilled)
    }

    /// When [`Parking::run`] has something to do; none without events.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let idle = self.waiting.is_empty() && self.written.is_empty();
        (!idle).then(|| self.storing.due(now).unwrap_or(now))
    }

    /// Forgets every event. What is already written stays in the store.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.written.clear();
    }

    /// Events in the store.
    pub(super) fn count(&self) -> u64 {
        self.store.count()
    }

    /// Parks up to [`EVENTS_MAX`] events durably and closes them, in `of` they are, after some of what is over the limits was
    /// dropped. Whether anything was done.
    pub(super) fn run(&mut self, of: &mut Origin<'_>, now: Instant) -> bool {
        let dropped = self.limits.run(&self.store, now, now_ms());
        self.park(of, now) || dropped
    }

    fn park(&mut self, of: &mut Origin<'_>, now: Instant) -> bool {
        if self.due(now).is_none_or(|due| due > now) {
            return false;
        }
        if let Err(error) = self.store(of, now) {
            if !self.storing.is_failing() {
                error!(error = &error as &dyn std::error::Error, "events cannot be parked, retrying");
            }
            self.storing.failed(now, &mut self.rng);
            // The store forgets what was not durable, so all of it is written again.
            for written in self.written.drain(..).rev() {
                self.waiting.push_front(written.to_park);
            }
            return true;
        }
        if self.storing.is_failing() {
            self.storing.succeeded();
            info!("events can be parked again");
        }
        true
    }

    /// Makes the first of the waiting events durable and closes them: as dead letters in the spill, or in the parked store.
    fn store(&mut self, of: &mut Origin<'_>, now: Instant) -> Result<(), ParkingError> {
        let are_letters = self.waiting.front().is_some_and(|to_park| of.dead_letter_topic_of(to_park).is_some());
        let mut letters = Vec::new();
        let mut walk = Walk::new(of.in_flight);
        while self.written.len() < EVENTS_MAX {
            let Some(to_park) = self.waiting.front().copied() else { break };
            if of.dead_letter_topic_of(&to_park).is_some() != are_letters {
                break;
            }
            let (topic, found) = if let Some(lane) = to_park.spilled_of() {
                let topic = of.lanes.topic(lane);
                match of.spilling.event(topic, to_park.event.number()) {
                    Err(SpillError::Damaged { .. }) => {
                        of.spilling.report_lost(topic, now);
                        of.lanes.done(lane, to_park.event, Fate::Lost);
                        of.lanes.settle(lane, now, &mut Vec::new());
                        self.waiting.pop_front();
                        continue;
                    }
                    found => (topic.to_owned(), found?.clone()),
                }
            } else {
                let (live, found) = walk.find(to_park.event);
                (of.router.topic(found.event_type), SpilledEvent::of(live, found, of.router))
            };
            let payload_bytes = found.payload.len() as u64;
            if are_letters {
                letters.push(letter(&to_park, &topic, found));
            } else {
                let (about, payload) = about(&to_park, topic, found);
                self.store.park(&about, &payload)?;
            }
            self.waiting.pop_front();
            self.written.push(Written { to_park, payload_bytes });
        }
        kill_point::pass("park.written");
        // Where each of the letters is now.
        let mut places = Vec::new();
        match of.dead_letter_topic.filter(|_| !letters.is_empty()) {
            Some(topic) => {
                for numbers in of.spilling.put(vec![(topic, letters)])? {
                    let lane = of.lanes.redirected(topic, numbers.clone(), now);
                    places.extend(numbers.map(|number| (lane, number)));
                }
            }
            None => self.store.sync()?,
        }
        kill_point::pass("park.synced");
        let mut places = places.into_iter();
        for Written { to_park, payload_bytes } in self.written.drain(..) {
            let ToPark { event, reason, .. } = to_park;
            let place = places.next();
            if place.is_some() {
                of.metrics.forward.dead_letters(reason).increment(1);
            }
            match (to_park.spilled_of(), place) {
                (None, None) => of.in_flight.parked(event, reason, payload_bytes, now_ms()),
                (None, Some(place)) => of.in_flight.spilled(event, place, payload_bytes, now_ms()),
                (Some(lane), place) => {
                    if let Some(place) = place {
                        of.in_flight.redirected((lane, event.number()), place);
                    }
                    of.lanes.done(lane, event, place.map_or(Fate::Parked(reason), |_| Fate::Redirected));
                    of.lanes.settle(lane, now, &mut Vec::new());
                }
            }
        }
        Ok(())
    }
}

impl Origin<'_> {
    /// Where an event is to be sent instead of being parked; none if nowhere, or if that is where it failed.
    fn dead_letter_topic_of(&self, to_park: &ToPark) -> Option<&str> {
        let failed_in = to_park.lane.map(|lane| self.lanes.topic(lane));
        self.dead_letter_topic.filter(|topic| failed_in != Some(*topic))
    }
}

impl ToPark {
    /// Its lane, if it is in the spill.
    fn spilled_of(&self) -> Option<LaneId> {
        self.lane.filter(|_| self.event.is_spilled())
    }

    /// Why, in words.
    fn error(&self) -> String {
        match (self.failure, self.reason) {
            (Some(failure), _) => failure.to_string(),
            (None, ParkReason::Expired) => "older than wal.age_max".to_owned(),
            (None, _) => "kafka takes no such topic name".to_owned(),
        }
    }
}

/// An event as it is parked.
fn about(to_park: &ToPark, topic: String, found: SpilledEvent) -> (ParkedAbout, Bytes) {
    let about = ParkedAbout {
        topic,
        key: found.key,
        event_type: found.event_type,
        reason: to_park.reason,
        error: to_park.error(),
        group: found.group,
        connection_id: found.connection_id,
        req_guid: found.req_guid,
        sequence: Sequence(found.sequence),
        received_at_ms: found.received_at_ms,
        parked_at_ms: now_ms(),
        spill_number: to_park.spilled_of().map(|_| to_park.event.number()),
    };
    (about, found.payload)
}

/// An event as it goes to the dead letter topic: what is known of it is in the headers.
fn letter(to_park: &ToPark, topic: &str, found: SpilledEvent) -> SpilledEvent {
    let headers = [
        ("ringtail.reason", to_park.reason.as_str().to_owned()),
        ("ringtail.error", to_park.error()),
        ("ringtail.topic", topic.to_owned()),
        ("ringtail.event_type", found.event_type.clone()),
        ("ringtail.group", found.group.clone()),
        ("ringtail.connection_id", found.connection_id.clone()),
        ("ringtail.req_guid", found.req_guid.clone()),
        ("ringtail.sequence", found.sequence.to_string()),
        ("ringtail.received_at_ms", found.received_at_ms.to_string()),
    ];
    let headers = headers.into_iter().map(|(name, value)| Header { name: name.to_owned(), value }).collect();
    SpilledEvent { headers, ..found }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use rand::SeedableRng;

    use super::super::ParkReason;
    use super::super::backoff::Backoff;
    use super::super::in_flight::Side;
    use super::super::in_flight::tests::{open_events, records};
    use super::super::lanes::RetryLimits;
    use super::super::parked_tests::MemoryDb;
    use super::*;
    use crate::config::RecordKey;

    #[test]
    fn nothing_is_closed_before_it_is_durable() {
        let db = Arc::new(MemoryDb::default());
        let store = ParkedStore::open(db.clone()).unwrap();
        let second = Duration::from_secs(1);
        let mut parking =
            Parking::new(store.clone(), Retry::new(Backoff::new(second, second)), SmallRng::seed_from_u64(1));
        let router = Router::new("t-%s", RecordKey::None);
        let directory = tempfile::tempdir().unwrap();
        let retry = || Retry::new(Backoff::new(second, second));
        let rng = || SmallRng::seed_from_u64(1);
        let mut spilling = Spilling::open(&directory.path().join("spill"), 1 << 20, retry(), rng()).unwrap();
        let ms = Duration::from_millis(1);
        let limits =
            RetryLimits { delay_min: ms, delay_max: ms, topic_grace: ms, topic_propagation: ms, exactly_once: false };
        let mut lanes = Lanes::new(limits, 1);
        let metrics = Metrics::new();
        let record = &records(&[vec![7, 8]])[0];
        let mut in_flight = InFlight::default();
        let events = open_events(&mut in_flight, record);
        let reason = ParkReason::InvalidTopic;
        let mut to_park =
            events.iter().map(|event| ToPark { event: *event, lane: None, reason, failure: None }).collect();
        parking.add(&mut to_park);

        macro_rules! origin {
            () => {
                Origin {
                    in_flight: &mut in_flight,
                    lanes: &mut lanes,
                    spilling: &mut spilling,
                    router: &router,
                    metrics: &metrics,
                    dead_letter_topic: None,
                }
            };
        }
        let now = Instant::now();
        db.full.store(true, Ordering::SeqCst);
        assert!(parking.run(&mut origin!(), now));
        assert!(!parking.run(&mut origin!(), now), "the backoff is kept");
        assert_eq!((in_flight.events(), store.count()), (2, 0));
        db.full.store(false, Ordering::SeqCst);
        db.sync_fails.store(true, Ordering::SeqCst);
        assert!(parking.run(&mut origin!(), now + second));
        assert_eq!((in_flight.events(), store.count()), (2, 0), "what the store lost is not parked");
        db.sync_fails.store(false, Ordering::SeqCst);
        assert!(parking.run(&mut origin!(), now + second * 2));
        assert_eq!((in_flight.events(), store.count()), (0, 2));
        assert_eq!(in_flight.advance(Side::Backlog, |_| {}).parked[reason as usize], 2);
        assert_eq!(parking.due(now), None);
        let parked: Vec<_> = store.events(0).map(Result::unwrap).collect();
        assert_eq!(parked.iter().map(|event| event.about.topic.as_str()).collect::<Vec<_>>(), ["t-0", "t-1"]);
        assert_eq!(parked.iter().map(|event| event.payload.len()).collect::<Vec<_>>(), [7, 8]);
    }
}
