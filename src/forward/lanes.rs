//! Lanes: what is known of each topic, and what becomes of the events that it refused.
//!
//! A lane normally just counts the events that the Kafka client holds for its topic. When one of them fails, the lane
//! is *held*: failed events and all that follow are kept in the order of the log, and nothing is sent until everything
//! that the client still holds has come back. Then the held events are sent again in rounds:
//!
//! | the last round | the next one |
//! |---|---|
//! | all delivered | at once, twice as large; with nothing left, the lane flows again |
//! | something too large, or invalid | at once, half as large: the broker judges whole batches. What fails alone is parked |
//! | the topic is unknown or forbidden | one event, after a backoff. After `topic_grace` everything held is parked, and the topic counts as *refused*: what fails is parked at once, until one event is delivered |
//! | anything else | one event, after a backoff, for ever |
//!
//! Invariant: while a lane is held, an event of it is either held or in the client, never both.
//!
//! Limits:
//! - Held events stay in memory and count as in flight; once they fill `in_flight_bytes_max`, the other topics wait as
//!   well. Spilling a stalled lane to disk is not implemented.
//! - Events that the client already holds when an earlier one is refused may be delivered before it. Everything read
//!   later keeps its place.
//! - Idle lanes are forgotten beyond [`LANES_MAX`]; more exist only while each has an event in flight.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tracing::{info, warn};

use super::backoff::{Backoff, LogLimit};
use super::in_flight::EventRef;
use super::kafka::Failure;
use super::router::{Router, is_topic_name};
use super::{FailureReason, ParkReason};

/// Idle lanes kept.
const LANES_MAX: usize = 4096;

/// Most events of one round.
const ROUND_EVENTS_MAX: usize = 4096;

/// One line about topics in so long: clients choose how many topics there are.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// A lane's place in [`Lanes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LaneId(u32);

/// When to try again, and when to give up.
#[derive(Debug, Clone, Copy)]
pub(super) struct RetryLimits {
    /// `forward.retry_delay_min`
    pub(super) delay_min: Duration,
    /// `forward.retry_delay_max`
    pub(super) delay_max: Duration,
    /// `forward.topic_grace`
    pub(super) topic_grace: Duration,
    /// How much of it the client has waited by the time that it calls a topic unknown.
    pub(super) topic_propagation: Duration,
}

/// An event to park.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ToPark {
    /// Which.
    pub(super) event: EventRef,
    /// Why.
    pub(super) reason: ParkReason,
    /// The same by Kafka; none if Kafka was not asked.
    pub(super) failure: Option<Failure>,
}

/// Every lane.
pub(super) struct Lanes {
    limits: RetryLimits,
    lanes: Vec<Lane>,
    free: Vec<LaneId>,
    /// By [`Router::lane_name`].
    by_name: HashMap<Box<str>, LaneId>,
    evict_at: usize,
    held: Vec<LaneId>,
    /// When the first held lane wants to send.
    due: Option<Instant>,
    in_client: u64,
    rng: SmallRng,
    log_limit: LogLimit,
}

struct Lane {
    topic: Box<str>,
    /// Events of it that the Kafka client holds.
    in_client: u32,
    /// Unknown or forbidden past its grace period: what fails is parked at once.
    refused: bool,
    hold: Option<Box<Hold>>,
}

struct Hold {
    events: BTreeSet<EventRef>,
    /// Events sent in this round; unknown, hence not 1, while what was sent before the hold comes back.
    round: usize,
    round_failed: usize,
    /// The worst failure of this round.
    failure: Option<(EventRef, Failure)>,
    round_open: bool,
    next_round: usize,
    retry_at: Instant,
    backoff: Backoff,
    since: Instant,
    topic_failing_since: Option<Instant>,
}

/// What a failure is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Blame {
    /// One event of the batch it was sent in.
    Event(ParkReason),
    /// Neither: it may succeed later.
    Circumstances,
    /// The topic.
    Topic(ParkReason),
}

impl Lanes {
    /// No lanes yet. `seed` fixes the jitter.
    pub(super) fn new(limits: RetryLimits, seed: u64) -> Lanes {
        Lanes {
            limits,
            lanes: Vec::new(),
            free: Vec::new(),
            by_name: HashMap::new(),
            evict_at: LANES_MAX,
            held: Vec::new(),
            due: None,
            in_client: 0,
            rng: SmallRng::seed_from_u64(seed),
            log_limit: LogLimit::new(LOG_INTERVAL),
        }
    }

    /// The lane of `event_type`; none when Kafka does not take its topic's name.
    pub(super) fn route(&mut self, router: &Router, event_type: &str) -> Option<LaneId> {
        let name = router.lane_name(event_type);
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        let topic = router.topic(event_type);
        if !is_topic_name(&topic) {
            return None;
        }
        if self.by_name.len() >= self.evict_at {
            self.evict();
        }
        let lane = Lane { topic: topic.into(), in_client: 0, refused: false, hold: None };
        let id = match self.free.pop() {
            Some(id) => {
                self.lanes[id.0 as usize] = lane;
                id
            }
            None => {
                self.lanes.push(lane);
                LaneId(u32::try_from(self.lanes.len() - 1).expect("each lane has an event in memory"))
            }
        };
        self.by_name.insert(name.into(), id);
        Some(id)
    }

    /// The lane's topic.
    pub(super) fn topic(&self, id: LaneId) -> &str {
        &self.lane(id).topic
    }

    /// Whether the lane's next event must go to [`Lanes::hold`] instead of the client.
    pub(super) fn is_held(&self, id: LaneId) -> bool {
        self.lane(id).hold.is_some()
    }

    /// Keeps the next event of a held lane.
    pub(super) fn hold(&mut self, id: LaneId, event: EventRef) {
        let hold = self.lane_mut(id).hold.as_mut().expect("the lane is held");
        hold.events.insert(event);
    }

    /// The client took an event.
    pub(super) fn sent(&mut self, id: LaneId) {
        self.in_client += 1;
        self.lane_mut(id).in_client += 1;
    }

    /// The client reports an event delivered.
    pub(super) fn delivered(&mut self, id: LaneId, now: Instant, to_park: &mut Vec<ToPark>) {
        self.in_client -= 1;
        let lane = self.lane_mut(id);
        lane.in_client -= 1;
        lane.refused = false;
        if let Some(hold) = &mut lane.hold {
            hold.topic_failing_since = None;
            self.settle(id, now, to_park);
        }
    }

    /// The client reports an event failed.
    pub(super) fn failed(
        &mut self,
        id: LaneId,
        event: EventRef,
        failure: Failure,
        now: Instant,
        to_park: &mut Vec<ToPark>,
    ) {
        self.in_client -= 1;
        self.lane_mut(id).in_client -= 1;
        self.refused(id, event, failure, now, to_park);
        self.settle(id, now, to_park);
    }

    /// The client did not even take an event. [`Lanes::settle`] must follow once the round is sent.
    pub(super) fn refused(
        &mut self,
        id: LaneId,
        event: EventRef,
        failure: Failure,
        now: Instant,
        to_park: &mut Vec<ToPark>,
    ) {
        let blame = blame(failure);
        let limits = self.limits;
        let lane = self.lane_mut(id);
        if let (true, Blame::Topic(reason)) = (lane.refused, blame) {
            to_park.push(ToPark { event, reason, failure: Some(failure) });
            return;
        }
        let newly_held = lane.hold.is_none();
        let hold = lane.hold.get_or_insert_with(|| Box::new(Hold::new(limits, now)));
        hold.events.insert(event);
        hold.round_failed += 1;
        if hold.failure.is_none_or(|(_, worst)| self::blame(worst) < blame) {
            hold.failure = Some((event, failure));
        }
        if newly_held {
            self.held.push(id);
            if let Some(suppressed) = self.log_limit.admit(now) {
                let topic = &self.lanes[id.0 as usize].topic;
                warn!(%topic, error = %failure, suppressed, "topic held: kafka refused an event");
            }
        }
    }

    /// Decides what comes next for a held lane, if everything that the client had of it has come back.
    pub(super) fn settle(&mut self, id: LaneId, now: Instant, to_park: &mut Vec<ToPark>) {
        let limits = self.limits;
        let lane = &mut self.lanes[id.0 as usize];
        let Some(hold) = lane.hold.as_mut().filter(|hold| hold.round_open && lane.in_client == 0) else { return };
        hold.round_open = false;
        match hold.failure.take().map(|(event, failure)| (event, failure, blame(failure))) {
            None => {
                hold.backoff.reset();
                hold.next_round = (hold.next_round * 2).min(ROUND_EVENTS_MAX);
                hold.retry_at = now;
            }
            Some((event, failure, Blame::Event(reason))) => {
                if hold.round == 1 {
                    hold.events.remove(&event);
                    to_park.push(ToPark { event, reason, failure: Some(failure) });
                }
                hold.next_round = (hold.round.min(hold.round_failed) / 2).max(1);
                hold.retry_at = now;
            }
            Some((_, failure, Blame::Topic(reason))) => {
                let waited = if reason == ParkReason::UnknownTopic { limits.topic_propagation } else { Duration::ZERO };
                let since = *hold.topic_failing_since.get_or_insert(now);
                hold.next_round = 1;
                hold.retry_at = now + hold.backoff.next(&mut self.rng);
                if now.saturating_duration_since(since) + waited >= limits.topic_grace {
                    lane.refused = true;
                    let held = std::mem::take(&mut hold.events);
                    to_park.extend(held.into_iter().map(|event| ToPark { event, reason, failure: Some(failure) }));
                    if let Some(suppressed) = self.log_limit.admit(now) {
                        let topic = &lane.topic;
                        warn!(%topic, error = %failure, suppressed, "topic refused: its events are parked");
                    }
                }
            }
            Some((_, _, Blame::Circumstances)) => {
                hold.next_round = 1;
                hold.retry_at = now + hold.backoff.next(&mut self.rng);
            }
        }
        if hold.events.is_empty() {
            self.release(id, now);
        } else {
            let retry_at = hold.retry_at;
            self.due = Some(self.due.map_or(retry_at, |due| due.min(retry_at)));
        }
    }

    /// The next round of a held lane, if one is due: events to send, in order. For each, [`Lanes::sent`],
    /// [`Lanes::refused`] or [`Lanes::hold`] must follow, and then [`Lanes::settle`].
    pub(super) fn next_round(&mut self, now: Instant) -> Option<(LaneId, Vec<EventRef>)> {
        if self.due.is_none_or(|due| due > now) {
            return None;
        }
        let mut found = None;
        self.due = None;
        for id in &self.held {
            let hold = self.lanes[id.0 as usize].hold.as_ref().filter(|hold| !hold.round_open);
            let Some(retry_at) = hold.map(|hold| hold.retry_at) else { continue };
            if found.is_none() && retry_at <= now {
                found = Some(*id);
            } else {
                self.due = Some(self.due.map_or(retry_at, |due| due.min(retry_at)));
            }
        }
        let id = found?;
        let hold = self.lane_mut(id).hold.as_mut()?;
        hold.round = hold.next_round.min(hold.events.len());
        hold.round_failed = 0;
        hold.round_open = true;
        let events = (0..hold.round).map_while(|_| hold.events.pop_first()).collect();
        Some((id, events))
    }

    /// When the next round is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Events that the client holds.
    pub(super) fn in_client(&self) -> u64 {
        self.in_client
    }

    /// Topics held now.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Forgets every event. Lanes remain.
    pub(super) fn clear(&mut self) {
        for lane in &mut self.lanes {
            lane.in_client = 0;
            lane.hold = None;
        }
        self.held.clear();
        (self.due, self.in_client) = (None, 0);
    }

    fn release(&mut self, id: LaneId, now: Instant) {
        self.held.retain(|held| *held != id);
        let lane = self.lane_mut(id);
        let hold = lane.hold.take();
        if let (false, Some(hold)) = (lane.refused, hold)
            && let Some(suppressed) = self.log_limit.admit(now)
        {
            let held_seconds = now.saturating_duration_since(hold.since).as_secs();
            info!(topic = %self.lanes[id.0 as usize].topic, held_seconds, suppressed, "topic flows again");
        }
    }

    /// Forgets idle lanes: first those in good order, and if that is not enough also the refused ones.
    fn evict(&mut self) {
        for refused_too in [false, true] {
            let (lanes, free) = (&self.lanes, &mut self.free);
            self.by_name.retain(|_, id| {
                let lane = &lanes[id.0 as usize];
                let idle = lane.in_client == 0 && lane.hold.is_none() && (refused_too || !lane.refused);
                if idle {
                    free.push(*id);
                }
                !idle
            });
            if self.by_name.len() <= LANES_MAX / 2 {
                break;
            }
        }
        // Not at every new lane, should all be busy.
        self.evict_at = LANES_MAX.max(self.by_name.len() * 2);
    }

    fn lane(&self, id: LaneId) -> &Lane {
        &self.lanes[id.0 as usize]
    }

    fn lane_mut(&mut self, id: LaneId) -> &mut Lane {
        &mut self.lanes[id.0 as usize]
    }
}

impl Hold {
    fn new(limits: RetryLimits, now: Instant) -> Hold {
        Hold {
            events: BTreeSet::new(),
            round: usize::MAX,
            round_failed: 0,
            failure: None,
            round_open: true,
            next_round: 1,
            retry_at: now,
            backoff: Backoff::new(limits.delay_min, limits.delay_max),
            since: now,
            topic_failing_since: None,
        }
    }
}

fn blame(failure: Failure) -> Blame {
    match failure.reason() {
        FailureReason::TooLarge => Blame::Event(ParkReason::TooLarge),
        FailureReason::InvalidRecord => Blame::Event(ParkReason::InvalidRecord),
        FailureReason::UnknownTopic => Blame::Topic(ParkReason::UnknownTopic),
        FailureReason::NotAuthorised => Blame::Topic(ParkReason::NotAuthorised),
        FailureReason::ProducerFatal | FailureReason::Other => Blame::Circumstances,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RecordKey;

    const MS: Duration = Duration::from_millis(1);

    /// A lane, driven by hand. Its events are numbered.
    struct Driver {
        lanes: Lanes,
        lane: LaneId,
        now: Instant,
        parked: Vec<ToPark>,
    }

    impl Driver {
        fn new() -> Driver {
            let limits = RetryLimits {
                delay_min: 10 * MS,
                delay_max: 80 * MS,
                topic_grace: 1000 * MS,
                topic_propagation: 400 * MS,
            };
            let mut lanes = Lanes::new(limits, 1);
            let lane = lanes.route(&Router::new("%s", RecordKey::None), "t").unwrap();
            Driver { lanes, lane, now: Instant::now(), parked: Vec::new() }
        }

        fn send(&mut self, count: u32) {
            (0..count).for_each(|_| self.lanes.sent(self.lane));
        }

        fn delivered(&mut self) {
            self.lanes.delivered(self.lane, self.now, &mut self.parked);
        }

        fn failed(&mut self, number: u32, reason: FailureReason) {
            self.lanes.failed(self.lane, event(number), Failure::of(reason), self.now, &mut self.parked);
        }

        /// The numbers of the next round, which is sent; empty when none is due.
        fn round(&mut self) -> Vec<u32> {
            let Some((_, events)) = self.lanes.next_round(self.now) else { return Vec::new() };
            self.send(events.len() as u32);
            (0..u32::MAX).filter(|number| events.contains(&event(*number))).take(events.len()).collect()
        }

        /// Goes to the time of the next round.
        fn skip(&mut self) {
            let due = self.lanes.due().expect("a round is due");
            assert!(due <= self.now + 80 * MS);
            self.now = self.now.max(due);
        }

        fn parked(&mut self) -> Vec<(EventRef, ParkReason)> {
            self.parked.drain(..).map(|parked| (parked.event, parked.reason)).collect()
        }
    }

    fn event(number: u32) -> EventRef {
        EventRef::new(u64::from(number / 2), number % 2)
    }

    #[test]
    fn nothing_is_sent_again_before_everything_is_back_and_then_in_order() {
        let mut driver = Driver::new();
        driver.send(4);
        driver.failed(2, FailureReason::Other);
        assert!(driver.lanes.is_held(driver.lane));
        driver.lanes.hold(driver.lane, event(4));
        driver.failed(1, FailureReason::Other);
        driver.delivered();
        assert_eq!(driver.lanes.due(), None);
        driver.delivered();
        assert!(driver.round().is_empty(), "the backoff is kept");
        let mut order = Vec::new();
        while driver.lanes.is_held(driver.lane) {
            driver.skip();
            let round = driver.round();
            round.iter().for_each(|_| driver.delivered());
            order.push(round);
        }
        assert_eq!(order, [vec![1], vec![2, 4]]);
        assert_eq!((driver.lanes.held(), driver.lanes.in_client()), (0, 0));
    }

    #[test]
    fn too_large_is_halved_and_parked_only_alone() {
        let mut driver = Driver::new();
        driver.send(8);
        (0..8).for_each(|number| driver.failed(number, FailureReason::TooLarge));
        let mut rounds = Vec::new();
        while driver.lanes.is_held(driver.lane) {
            let round = driver.round();
            for number in &round {
                match round.contains(&3) {
                    true => driver.failed(*number, FailureReason::TooLarge),
                    false => driver.delivered(),
                }
            }
            rounds.push(round.len());
            assert!(rounds.len() < 20, "{rounds:?}");
        }
        assert_eq!(driver.parked(), [(event(3), ParkReason::TooLarge)]);
        assert_eq!(rounds[..2], [4, 2]);
    }

    #[test]
    fn other_failures_are_retried_for_ever() {
        let mut driver = Driver::new();
        driver.send(1);
        driver.failed(0, FailureReason::Other);
        for _ in 0..1000 {
            driver.skip();
            assert_eq!(driver.round(), [0]);
            driver.failed(0, FailureReason::Other);
        }
        assert_eq!(driver.parked(), []);
    }

    #[test]
    fn a_forbidden_topic_is_parked_after_its_grace_and_then_at_once() {
        let mut driver = Driver::new();
        let start = driver.now;
        driver.send(2);
        driver.failed(0, FailureReason::NotAuthorised);
        driver.failed(1, FailureReason::NotAuthorised);
        while driver.lanes.is_held(driver.lane) {
            driver.skip();
            assert_eq!(driver.round(), [0]);
            driver.failed(0, FailureReason::NotAuthorised);
        }
        assert!(driver.now - start >= 1000 * MS && driver.now - start <= 1100 * MS);
        let reason = ParkReason::NotAuthorised;
        assert_eq!(driver.parked(), [(event(0), reason), (event(1), reason)]);
        driver.send(3);
        driver.failed(2, FailureReason::NotAuthorised);
        assert_eq!(driver.parked(), [(event(2), reason)]);
        driver.delivered();
        driver.failed(4, FailureReason::NotAuthorised);
        assert_eq!(driver.parked(), []);
        assert!(driver.lanes.is_held(driver.lane), "one delivery earns a new grace period");
    }

    #[test]
    fn the_clients_own_wait_for_a_topic_counts() {
        let mut driver = Driver::new();
        let start = driver.now;
        driver.send(1);
        driver.failed(0, FailureReason::UnknownTopic);
        while driver.lanes.is_held(driver.lane) {
            driver.skip();
            driver.round();
            driver.failed(0, FailureReason::UnknownTopic);
        }
        assert!(driver.now - start >= 600 * MS && driver.now - start <= 700 * MS);
    }

    #[test]
    fn idle_lanes_are_forgotten_and_busy_ones_kept() {
        let router = Router::new("%s", RecordKey::None);
        let mut driver = Driver::new();
        driver.send(1);
        for number in 0..LANES_MAX * 3 {
            let lane = driver.lanes.route(&router, &number.to_string()).unwrap();
            assert_eq!(driver.lanes.topic(lane), number.to_string());
        }
        assert!(driver.lanes.lanes.len() <= LANES_MAX + 1);
        assert_eq!(driver.lanes.route(&router, "t"), Some(driver.lane));
        assert_eq!(driver.lanes.route(&router, "not a topic"), None);
    }
}
