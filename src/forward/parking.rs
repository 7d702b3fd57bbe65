//! The way into the parked store: events wait here until they are durable there, and stay open in flight until then, so
//! that the cursor cannot pass them. Many share one sync. When the store fails (a full disk), they wait and are tried
//! again.

use std::collections::VecDeque;
use std::time::Instant;

use rand::rngs::SmallRng;
use tracing::{error, info};

use super::ParkReason;
use super::backoff::Retry;
use super::in_flight::{InFlight, Walk};
use super::lanes::ToPark;
use super::parked::{Limits, ParkedAbout, ParkedError, ParkedStore};
use super::router::Router;
use crate::batch::now_ms;
use crate::kill_point;

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

    /// Parks up to [`EVENTS_MAX`] events durably and closes them in `in_flight`, after some of what is over the limits was
    /// dropped. Whether anything was done.
    pub(super) fn run(&mut self, in_flight: &mut InFlight, router: &Router, now: Instant) -> bool {
        let dropped = self.limits.run(&self.store, now, now_ms());
        self.park(in_flight, router, now) || dropped
    }

    fn park(&mut self, in_flight: &mut InFlight, router: &Router, now: Instant) -> bool {
        if self.due(now).is_none_or(|due| due > now) {
            return false;
        }
        if let Err(error) = self.write(in_flight, router).and_then(|()| self.store.sync()) {
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
        kill_point::pass("park.synced");
        for written in self.written.drain(..) {
            let ToPark { event, reason, .. } = written.to_park;
            in_flight.parked(event, reason, written.payload_bytes, now_ms());
        }
        true
    }

    fn write(&mut self, in_flight: &InFlight, router: &Router) -> Result<(), ParkedError> {
        let mut walk = Walk::new(in_flight);
        while self.written.len() < EVENTS_MAX {
            let Some(to_park) = self.waiting.front().copied() else { break };
            let ToPark { event, reason, failure } = to_park;
            let (live, found) = walk.find(event);
            let batch = &live.batch;
            let topic = router.topic(found.event_type);
            let about = ParkedAbout {
                topic,
                key: router.key(&batch.client, &batch.request, found.event_type).map(str::to_owned),
                event_type: found.event_type.to_owned(),
                reason,
                error: match (failure, reason) {
                    (Some(failure), _) => failure.to_string(),
                    (None, ParkReason::Expired) => "older than wal.age_max".to_owned(),
                    (None, _) => "kafka takes no such topic name".to_owned(),
                },
                group: batch.client.group.to_string(),
                connection_id: batch.client.id.to_string(),
                req_guid: batch.request.req_guid().to_owned(),
                sequence: live.sequence,
                received_at_ms: batch.received_at_ms,
                parked_at_ms: now_ms(),
            };
            self.store.park(&about, found.payload)?;
            self.waiting.pop_front();
            self.written.push(Written { to_park, payload_bytes: found.payload.len() as u64 });
        }
        kill_point::pass("park.written");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use rand::SeedableRng;

    use super::super::ParkReason;
    use super::super::backoff::Backoff;
    use super::super::in_flight::tests::{open_events, records};
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
        let record = &records(&[vec![7, 8]])[0];
        let mut in_flight = InFlight::default();
        let events = open_events(&mut in_flight, record);
        let reason = ParkReason::InvalidTopic;
        let mut to_park = events.iter().map(|event| ToPark { event: *event, reason, failure: None }).collect();
        parking.add(&mut to_park);

        let now = Instant::now();
        db.full.store(true, Ordering::SeqCst);
        assert!(parking.run(&mut in_flight, &router, now));
        assert!(!parking.run(&mut in_flight, &router, now), "the backoff is kept");
        assert_eq!((in_flight.events(), store.count()), (2, 0));
        db.full.store(false, Ordering::SeqCst);
        db.sync_fails.store(true, Ordering::SeqCst);
        assert!(parking.run(&mut in_flight, &router, now + second));
        assert_eq!((in_flight.events(), store.count()), (2, 0), "what the store lost is not parked");
        db.sync_fails.store(false, Ordering::SeqCst);
        assert!(parking.run(&mut in_flight, &router, now + second * 2));
        assert_eq!((in_flight.events(), store.count()), (0, 2));
        assert_eq!(in_flight.advance(|_| {}).parked[reason as usize], 2);
        assert_eq!(parking.due(now), None);
        let parked: Vec<_> = store.events(0).map(Result::unwrap).collect();
        assert_eq!(parked.iter().map(|event| event.about.topic.as_str()).collect::<Vec<_>>(), ["t-0", "t-1"]);
        assert_eq!(parked.iter().map(|event| event.payload.len()).collect::<Vec<_>>(), [7, 8]);
    }
}
