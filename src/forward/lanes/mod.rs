//! Lanes: what is known of each topic, and what becomes of the events that it refused.
//!
//! A lane normally just counts the events that the Kafka client holds for its topic. When one of them fails, or none of them
//! comes back for long while there is a broker, the lane is *held*: failed events and all that follow are kept in the
//! order of the log, and nothing is sent until everything that the client still holds has come back. Then the held events
//! are sent again in rounds (`hold.rs`):
//!
//! | the last round | the next one |
//! |---|---|
//! | all delivered | at once, twice as large; with nothing left, the lane flows again |
//! | something too large, or invalid | at once, half as large: the broker judges whole batches. What fails alone is parked |
//! | the topic is unknown or forbidden | one event, after a backoff. After `topic_grace` everything held is parked, and the topic counts as *refused*: what fails is parked at once, until one event is delivered |
//! | anything else | one event, after a backoff, for ever |
//!
//! When held events take too much memory, or hold back the cursor for too long, they move to the spill (`spill/`), also
//! those that the client still has; from then on the log's cursor can pass them. What follows queues up behind them.
//!
//! Invariant: while a lane is held, an event of it is held, in the client, or waiting to be parked; never two of that.
//!
//! Limits:
//! - Events that the client already holds when an earlier one is refused may be delivered before it. Everything read
//!   later keeps its place.
//! - Idle lanes are forgotten beyond [`LANES_MAX`]; more exist only while each has an event in flight or in the spill.
//! - Beyond [`HELD_MAX`] held lanes, an unknown or forbidden topic has no grace period.

mod hold;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tracing::{info, warn};

use super::ParkReason;
use super::backoff::LogLimit;
use super::discard::Dropped;
use super::in_flight::{EVENT_OVERHEAD_BYTES, EventRef};
use super::kafka::Failure;
use super::router::{Router, is_topic_name};
use hold::{Blame, Hold, Next, blame};

/// Idle lanes kept.
const LANES_MAX: usize = 4096;

/// Held lanes that may wait for their topic.
const HELD_MAX: usize = 10_000;

/// One line about topics in so long: clients choose how many topics there are.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// A lane of which nothing came back for so long stands still.
const STILL_PATIENCE: Duration = Duration::from_secs(2);

/// A lane's place in [`Lanes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LaneId(pub(super) u32);

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
    /// Held events go through the spill, and only once the cursor has passed them.
    pub(super) exactly_once: bool,
}

/// An event to park.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ToPark {
    /// Which.
    pub(super) event: EventRef,
    /// Its lane; none when its topic's name is not one.
    pub(super) lane: Option<LaneId>,
    /// Why.
    pub(super) reason: ParkReason,
    /// The same by Kafka; none if Kafka was not asked.
    pub(super) failure: Option<Failure>,
}

/// What became of an event of the spill.
#[derive(Debug)]
pub(super) enum Fate {
    /// Kafka acked it.
    Delivered { payload_bytes: u64 },
    /// It is in the parked store.
    Parked(ParkReason),
    /// It is in the spill again, for the dead letter topic.
    Redirected,
    /// It was given up.
    Dropped(Dropped),
    /// Its block is damaged.
    Lost,
}

/// Every lane.
pub(super) struct Lanes {
    limits: RetryLimits,
    lanes: Vec<Lane>,
    free: Vec<LaneId>,
    /// By [`Router::lane_name`].
    by_name: HashMap<Box<str>, LaneId>,
    by_topic: HashMap<Box<str>, LaneId>,
    evict_at: usize,
    held: Vec<LaneId>,
    /// When held lanes want to send, the first one on top. What a lane does not name as [`Hold::due`] counts no more.
    due: BinaryHeap<Reverse<(Instant, LaneId)>>,
    in_client: u64,
    /// Bytes in the client of events that are in the spill.
    spilled_client_bytes: u64,
    /// Events that went to the spill while the client had them: their numbers there, by the tag that they were sent with.
    moved: HashMap<usize, (LaneId, EventRef)>,
    /// Events of the spill that are done for, each after all those before it in its topic.
    worked_off: Vec<(LaneId, u64, Fate)>,
    rng: SmallRng,
    log_limit: LogLimit,
}

struct Lane {
    topic: Box<str>,
    /// Events of it that the Kafka client holds.
    in_client: u32,
    /// Their bytes.
    client_bytes: u64,
    /// When the last one came back, or the first one was sent.
    moved_at: Option<Instant>,
    /// Unknown or forbidden past its grace period: what fails is parked at once.
    refused: bool,
    hold: Option<Box<Hold>>,
}

/// A held lane, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct HeldTopic {
    /// The topic.
    pub topic: String,
    /// For how long it has been held, in seconds.
    pub held_seconds: u64,
    /// Events of it on disk, out of the log's way.
    pub spilled_events: u64,
    /// The newest failure; none if the topic just stands still.
    pub error: Option<String>,
}

impl Lanes {
    /// No lanes yet. `seed` fixes the jitter.
    pub(super) fn new(limits: RetryLimits, seed: u64) -> Lanes {
        Lanes {
            limits,
            lanes: Vec::new(),
            free: Vec::new(),
            by_name: HashMap::new(),
            by_topic: HashMap::new(),
            evict_at: LANES_MAX,
            held: Vec::new(),
            due: BinaryHeap::new(),
            in_client: 0,
            spilled_client_bytes: 0,
            moved: HashMap::new(),
            worked_off: Vec::new(),
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
        let id = self.lane_of(&topic);
        self.by_name.insert(name.into(), id);
        Some(id)
    }

    /// Types of events have other topics from now on. Lanes keep theirs, with what is in them.
    pub(super) fn forget_names(&mut self) {
        self.by_name.clear();
    }

    /// The lane of `topic`.
    fn lane_of(&mut self, topic: &str) -> LaneId {
        if let Some(id) = self.by_topic.get(topic) {
            return *id;
        }
        // What is to be noted of a lane is noted under its topic.
        if self.by_topic.len() >= self.evict_at && self.worked_off.is_empty() {
            self.evict();
        }
        let lane =
            Lane { topic: topic.into(), in_client: 0, client_bytes: 0, moved_at: None, refused: false, hold: None };
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
        self.by_topic.insert(topic.into(), id);
        id
    }

    /// The spill has events of `topic`, with those numbers, of which the log shows none again.
    pub(super) fn restore(&mut self, topic: &str, numbers: Range<u64>, now: Instant) {
        let id = self.lane_of(topic);
        // Whoever requeues them means that the topic takes them now.
        self.lane_mut(id).refused = false;
        let hold = self.hold_lane(id, now);
        hold.append(numbers);
        hold.commit();
        self.settle(id, now, &mut Vec::new());
    }

    /// Events of other topics are in the spill now as events of `topic`, with those numbers. Its lane.
    pub(super) fn redirected(&mut self, topic: &str, numbers: Range<u64>, now: Instant) -> LaneId {
        let id = self.lane_of(topic);
        self.hold_lane(id, now).append(numbers);
        self.settle(id, now, &mut Vec::new());
        id
    }

    /// The lane's topic.
    pub(super) fn topic(&self, id: LaneId) -> &str {
        &self.lane(id).topic
    }

    /// Bytes of the lane that the client holds.
    pub(super) fn client_bytes(&self, id: LaneId) -> u64 {
        self.lane(id).client_bytes
    }

    /// Bytes of events in the spill that the client holds.
    pub(super) fn spilled_client_bytes(&self) -> u64 {
        self.spilled_client_bytes
    }

    /// The first event in the spill of the held lane of which nothing came back for longest, while the client has some of it.
    pub(super) fn stillest_spilled(&self, now: Instant) -> Option<(LaneId, EventRef)> {
        let still = |id: &LaneId| {
            let lane = self.lane(*id);
            let hold = lane.hold.as_ref().filter(|hold| lane.in_client > 0 && hold.spilled.len() > 0)?;
            let at = lane.moved_at.filter(|at| now.saturating_duration_since(*at) >= STILL_PATIENCE)?;
            Some((at, *id, EventRef::spilled(hold.spilled.consumed)))
        };
        self.held.iter().filter_map(still).min().map(|(_, id, event)| (id, event))
    }

    /// Whether the lane's next event must go to [`Lanes::hold`] instead of the client.
    pub(super) fn is_held(&self, id: LaneId) -> bool {
        self.lane(id).hold.is_some()
    }

    /// Keeps the next event of a held lane.
    pub(super) fn hold(&mut self, id: LaneId, event: EventRef) {
        self.lane_mut(id).hold.as_mut().expect("the lane is held").insert(event);
    }

    /// The client took an event, of so many bytes.
    pub(super) fn sent(&mut self, id: LaneId, event: EventRef, bytes: u64, now: Instant) {
        self.in_client += 1;
        if event.is_spilled() {
            self.spilled_client_bytes += bytes;
        }
        let lane = self.lane_mut(id);
        if lane.in_client == 0 {
            lane.moved_at = Some(now);
        }
        lane.in_client += 1;
        lane.client_bytes += bytes;
    }

    /// The event in the spill that was sent with `tag`; none if it is one of the log.
    pub(super) fn spilled_by_tag(&mut self, tag: usize) -> Option<(LaneId, EventRef)> {
        if let Some((lane, low)) = EventRef::split_spilled_tag(tag) {
            let spilled = &self.lane(lane).hold.as_ref().expect("a lane with spilled events is held").spilled;
            return Some((lane, EventRef::spilled_near(spilled.consumed, low)));
        }
        if self.moved.is_empty() { None } else { self.moved.remove(&tag) }
    }

    fn came_back(&mut self, id: LaneId, event: EventRef, bytes: u64, now: Instant) {
        self.in_client -= 1;
        if event.is_spilled() {
            self.spilled_client_bytes -= bytes;
        }
        let lane = self.lane_mut(id);
        lane.in_client -= 1;
        lane.client_bytes -= bytes;
        lane.moved_at = Some(now);
    }

    /// The client reports an event delivered.
    pub(super) fn delivered(
        &mut self,
        id: LaneId,
        event: EventRef,
        bytes: u64,
        now: Instant,
        to_park: &mut Vec<ToPark>,
    ) {
        self.came_back(id, event, bytes, now);
        let lane = self.lane_mut(id);
        lane.refused = false;
        if let Some(hold) = &mut lane.hold {
            hold.delivered(event);
            if event.is_spilled() {
                self.done(id, event, Fate::Delivered { payload_bytes: bytes - EVENT_OVERHEAD_BYTES });
            }
            self.settle(id, now, to_park);
        }
    }

    /// An event of the spill that was to be sent in a round is too old, and to be parked. [`Lanes::settle`] must follow.
    pub(super) fn expired(&mut self, id: LaneId, event: EventRef, to_park: &mut Vec<ToPark>) {
        to_park.push(ToPark { event, lane: Some(id), reason: ParkReason::Expired, failure: None });
        self.lane_mut(id).hold.as_mut().expect("a lane with spilled events is held").spilled.parking(event);
    }

    /// An event of the spill that the client does not have is done for. [`Lanes::settle`] must follow, after the round if it was
    /// to be sent in one.
    pub(super) fn done(&mut self, id: LaneId, event: EventRef, fate: Fate) {
        let hold = self.lane_mut(id).hold.as_mut().expect("a lane with spilled events is held");
        let passed = hold.spilled.done(event.number(), fate);
        self.worked_off.extend(passed.into_iter().map(|(number, fate)| (id, number, fate)));
    }

    /// An event of `topic` in the spill was parked earlier.
    pub(super) fn parked_earlier(&mut self, topic: &str, number: u64, reason: ParkReason, now: Instant) {
        let Some(id) = self.by_topic.get(topic).copied() else { return };
        if self.lane(id).hold.as_ref().is_some_and(|hold| hold.spilled.holds(number)) {
            self.done(id, EventRef::spilled(number), Fate::Parked(reason));
            self.settle(id, now, &mut Vec::new());
        }
    }

    /// Events of the spill that are done for since the last call, with all those before them in their topics.
    pub(super) fn take_worked_off(&mut self) -> Vec<(LaneId, u64, Fate)> {
        std::mem::take(&mut self.worked_off)
    }

    /// The client reports an event failed.
    pub(super) fn failed(
        &mut self,
        id: LaneId,
        event: EventRef,
        bytes: u64,
        failure: Failure,
        now: Instant,
        to_park: &mut Vec<ToPark>,
    ) {
        self.came_back(id, event, bytes, now);
        self.refused(id, event, failure, now, to_park);
        self.settle(id, now, to_park);
    }

    /// Whether an event of the lane that fails so is parked at once.
    pub(super) fn parks(&self, id: LaneId, failure: Failure) -> bool {
        self.lane(id).refused && matches!(blame(failure), Blame::Topic(_))
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
        let lane = self.lane(id);
        if let (true, Blame::Topic(reason)) = (lane.refused, blame(failure)) {
            to_park.push(ToPark { event, lane: Some(id), reason, failure: Some(failure) });
            if let Some(hold) = &mut self.lane_mut(id).hold {
                hold.spilled.parking(event);
            }
            return;
        }
        if lane.hold.as_ref().is_none_or(|hold| hold.last_failure.is_none())
            && let Some(suppressed) = self.log_limit.admit(now)
        {
            let topic = &self.lanes[id.0 as usize].topic;
            warn!(%topic, error = %failure, suppressed, "topic held: kafka refused an event");
        }
        self.hold_lane(id, now).refused(event, failure);
    }

    /// The held lanes, and why.
    pub(super) fn failures(&self) -> Vec<(Box<str>, Failure)> {
        let held = self.held.iter().map(|id| self.lane(*id));
        let failed = held.filter_map(|lane| Some((lane.topic.clone(), lane.hold.as_ref()?.last_failure?)));
        failed.collect()
    }

    /// The client gave an event back, and it will be read from the log again.
    pub(super) fn taken_back(&mut self, id: LaneId, event: EventRef, bytes: u64, now: Instant) {
        self.came_back(id, event, bytes, now);
    }

    /// An event of `topic` failed, and will be read from the log again.
    pub(super) fn expect(&mut self, topic: &str, failure: Failure, now: Instant) {
        let id = self.lane_of(topic);
        if let Some(suppressed) = self.log_limit.admit(now) {
            warn!(topic, error = %failure, suppressed, "topic held: kafka refused an event");
        }
        self.hold_lane(id, now).expect(failure);
    }

    /// The log's cursor has passed everything in the spill, durably.
    pub(super) fn commit_spilled(&mut self, now: Instant) {
        for id in self.held.clone() {
            if let Some(hold) = &mut self.lane_mut(id).hold {
                hold.commit();
            }
            self.settle(id, now, &mut Vec::new());
        }
    }

    /// Everything of `topic` in the spill before `number` was delivered earlier.
    pub(super) fn skip_to(&mut self, topic: &str, number: u64, now: Instant) {
        let Some(id) = self.by_topic.get(topic).copied() else { return };
        let Some(hold) = &mut self.lane_mut(id).hold else { return };
        let skipped = hold.skip_to(number);
        if !skipped.is_empty() {
            self.worked_off.extend(skipped.into_iter().map(|(number, fate)| (id, number, fate)));
            self.settle(id, now, &mut Vec::new());
        }
    }

    /// An event of the spill came back and is to be sent again.
    pub(super) fn returned(&mut self, id: LaneId, event: EventRef, bytes: u64, now: Instant) {
        self.came_back(id, event, bytes, now);
        self.hold(id, event);
    }

    /// Up to which number the spill is worked off once `events`, which the client has, are delivered.
    pub(super) fn worked_off_with(&self, id: LaneId, events: &[EventRef]) -> u64 {
        let consumed = self.lane(id).hold.as_ref().map_or(0, |hold| hold.spilled.consumed);
        events.iter().map(|event| event.number() + 1).max().unwrap_or(consumed).max(consumed)
    }

    /// Holds the lanes of which nothing came back for so long, since `connected_since` at most.
    pub(super) fn hold_stalled(&mut self, now: Instant, patience: Duration, connected_since: Instant) {
        let is_stalled = |lane: &Lane| {
            let since = lane.moved_at.map(|at| at.max(connected_since));
            lane.in_client > 0
                && lane.hold.is_none()
                && since.is_some_and(|at| now.saturating_duration_since(at) >= patience)
        };
        let stalled = (0..self.lanes.len()).filter(|at| is_stalled(&self.lanes[*at]));
        for id in stalled.map(|at| LaneId(at as u32)).collect::<Vec<_>>() {
            self.hold_lane(id, now).stands_still();
            if let Some(suppressed) = self.log_limit.admit(now) {
                let Lane { topic, in_client, .. } = self.lane(id);
                warn!(%topic, in_client, suppressed, "topic held: kafka is there and takes none of its events");
            }
        }
    }

    fn hold_lane(&mut self, id: LaneId, now: Instant) -> &mut Hold {
        if self.lane(id).hold.is_none() {
            self.held.push(id);
        }
        let limits = self.limits;
        self.lane_mut(id).hold.get_or_insert_with(|| Box::new(Hold::new(limits, now)))
    }

    /// Decides what comes next for a held lane, if everything that the client had of it has come back.
    pub(super) fn settle(&mut self, id: LaneId, now: Instant, to_park: &mut Vec<ToPark>) {
        let mut limits = self.limits;
        if self.held.len() > HELD_MAX {
            limits.topic_grace = Duration::ZERO;
        }
        let lane = &mut self.lanes[id.0 as usize];
        let Some(hold) = &mut lane.hold else { return };
        let (was_refused, mut refused, parked_before) = (lane.refused, lane.refused, to_park.len());
        let park = |parked: ToPark| to_park.push(ToPark { lane: Some(id), ..parked });
        let next = hold.settle(lane.in_client, limits, now, &mut self.rng, &mut refused, park);
        lane.refused = refused;
        if refused
            && !was_refused
            && let Some(suppressed) = self.log_limit.admit(now)
        {
            let (topic, error) = (&lane.topic, to_park.get(parked_before).and_then(|parked| parked.failure));
            let error = error.map(|error| error.to_string()).unwrap_or_default();
            warn!(%topic, error, suppressed, "topic refused: its events are parked");
        }
        match next {
            Next::Release => self.release(id, now),
            Next::Round(at) => self.round_is_due(id, at),
            Next::Wait | Next::Parked => {}
        }
    }

    /// The next round of a held lane, if one is due: events to send, in order. For each, [`Lanes::sent`],
    /// [`Lanes::refused`] or [`Lanes::hold`] must follow, and then [`Lanes::settle`].
    pub(super) fn next_round(&mut self, now: Instant) -> Option<(LaneId, Vec<EventRef>)> {
        loop {
            let Reverse((at, id)) = *self.due.peek().filter(|Reverse((at, _))| *at <= now)?;
            self.due.pop();
            let Some(hold) = self.lane_mut(id).hold.as_mut().filter(|hold| hold.due == Some(at)) else { continue };
            hold.due = None;
            match hold.retry_at() {
                Some(retry_at) if retry_at <= now => return Some((id, hold.begin_round())),
                Some(retry_at) => self.round_is_due(id, retry_at),
                None => {}
            }
        }
    }

    fn round_is_due(&mut self, id: LaneId, at: Instant) {
        let Some(hold) = &mut self.lane_mut(id).hold else { return };
        if hold.due.replace(at) != Some(at) {
            self.due.push(Reverse((at, id)));
        }
    }

    /// Releases a held lane if it has caught up with the log: the events of the log that are to be sent now, in order.
    pub(super) fn release_caught_up(&mut self, id: LaneId, now: Instant) -> Vec<EventRef> {
        let Some(events) = self.lane(id).hold.as_ref().and_then(|hold| hold.caught_up()) else { return Vec::new() };
        self.release(id, now);
        events
    }

    /// When the next round is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.peek().map(|Reverse((at, _))| *at)
    }

    /// Events that the client holds.
    pub(super) fn in_client(&self) -> u64 {
        self.in_client
    }

    /// Topics held now.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// The held topics, up to `limit`.
    pub(super) fn held_topics(&self, limit: usize, now: Instant) -> Vec<HeldTopic> {
        let describe = |id: &LaneId| {
            let lane = self.lane(*id);
            let hold = lane.hold.as_ref()?;
            Some(HeldTopic {
                topic: lane.topic.to_string(),
                held_seconds: now.saturating_duration_since(hold.since).as_secs(),
                spilled_events: hold.spilled.len(),
                error: hold.last_failure.map(|failure| failure.to_string()),
            })
        };
        self.held.iter().take(limit).filter_map(describe).collect()
    }

    /// Events of the log that held lanes keep from being closed, as far as they are in memory.
    pub(super) fn held_log_events(&self) -> u64 {
        let held = |id: &LaneId| {
            let lane = self.lane(*id);
            lane.hold.as_ref().map_or(0, |hold| hold.log_events() as u64) + u64::from(lane.in_client)
        };
        self.held.iter().map(held).sum()
    }

    /// Open events of a held lane, all of the log, in order, with their tags and bytes, are in the spill now: as `numbers`. The
    /// client still has some.
    pub(super) fn moved(&mut self, id: LaneId, events: &[(EventRef, usize, u64)], numbers: Range<u64>, now: Instant) {
        let lane = &mut self.lanes[id.0 as usize];
        let hold = lane.hold.as_mut().expect("only held lanes spill");
        for ((event, tag, bytes), number) in events.iter().zip(numbers.clone()) {
            if !hold.has(*event) {
                self.moved.insert(*tag, (id, EventRef::spilled(number)));
                self.spilled_client_bytes += bytes;
            }
        }
        hold.moved(numbers);
        self.settle(id, now, &mut Vec::new());
    }

    /// Forgets every event, also those in the spill. Lanes remain.
    pub(super) fn clear(&mut self) {
        for lane in &mut self.lanes {
            (lane.in_client, lane.client_bytes, lane.moved_at) = (0, 0, None);
            lane.hold = None;
        }
        self.held.clear();
        self.moved.clear();
        self.worked_off.clear();
        self.due.clear();
        (self.in_client, self.spilled_client_bytes) = (0, 0);
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
            let is_idle = |id: LaneId| {
                let lane = &lanes[id.0 as usize];
                lane.in_client == 0 && lane.hold.is_none() && (refused_too || !lane.refused)
            };
            self.by_name.retain(|_, id| !is_idle(*id));
            self.by_topic.retain(|_, id| {
                let idle = is_idle(*id);
                if idle {
                    free.push(*id);
                }
                !idle
            });
            if self.by_topic.len() <= LANES_MAX / 2 {
                break;
            }
        }
        // Not at every new lane, should all be busy.
        self.evict_at = LANES_MAX.max(self.by_topic.len() * 2);
    }

    fn lane(&self, id: LaneId) -> &Lane {
        &self.lanes[id.0 as usize]
    }

    fn lane_mut(&mut self, id: LaneId) -> &mut Lane {
        &mut self.lanes[id.0 as usize]
    }
}
