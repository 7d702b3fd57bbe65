//! The way into the spill and out of it: when events of held topics move there, and what becomes of them.
//!
//! They move when held topics keep much of what may be in flight, or when the cursor has been left far behind for their sake.
//! While no topic at all takes anything, the trouble may not be a topic's but the broker's; then they move at a slow pace, so
//! that a topic that does flow is still found, and the log is not copied for nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use tracing::{error, info, warn};

use super::backoff::{Every, LogLimit, Retry};
use super::in_flight::{EVENT_OVERHEAD_BYTES, EventRef, InFlight, Live, Passed, RECORDS_MAX, SPILLED_MAX, Walk};
use super::lanes::{LaneId, Lanes};
use super::parked::{ParkedAbout, ParkedEvent};
use super::router::Router;
use super::spill::{FoundEvent, Spill, SpillError, SpilledEvent};
use crate::batch::{Event, Sequence, now_ms};
use crate::wal::Wal;

/// Without a delivery of any topic for so long, topics are moved blindly.
pub(super) const STALL_PATIENCE: Duration = Duration::from_secs(5);

/// How fast then, in charged bytes.
const BLIND_BYTES_PER_SECOND: u64 = 4 << 20;

/// How often what was worked off is made durable.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// One line about lost events in so long.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Spilling {
    spill: Spill,
    /// What the log shows again has been taken out.
    settled: bool,
    /// It was done at least once.
    known: bool,
    storing: Retry,
    rng: SmallRng,
    in_flight_bytes_max: u64,
    delivered_at: Option<Instant>,
    blind_at: Option<Instant>,
    worked_off_at: Option<Instant>,
    saving: Every,
    lost: LogLimit,
}

impl Spilling {
    /// Opens the spill in `directory`; what fails later is tried again as `storing` says.
    ///
    /// # Errors
    /// [`SpillError::Io`]
    pub(super) fn open(
        directory: &Path,
        in_flight_bytes_max: u64,
        storing: Retry,
        rng: SmallRng,
    ) -> Result<Spilling, SpillError> {
        Ok(Spilling {
            spill: Spill::open(directory)?,
            settled: false,
            known: false,
            storing,
            rng,
            in_flight_bytes_max,
            delivered_at: None,
            blind_at: None,
            worked_off_at: None,
            saving: Every::new(SAVE_INTERVAL),
            lost: LogLimit::new(LOG_INTERVAL),
        })
    }

    /// What tells the spill from another one that was in its place.
    pub(super) fn id(&self) -> &str {
        self.spill.id()
    }

    /// Events in the spill.
    pub(super) fn count(&self) -> u64 {
        self.spill.count()
    }

    /// Bytes that they take there.
    pub(super) fn bytes(&self) -> u64 {
        self.spill.bytes()
    }

    /// When something is tried again; none if nothing failed.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        self.storing.due(now)
    }

    /// Whether an event of the spill was delivered a moment ago.
    pub(super) fn has_delivered_since(&self, now: Instant) -> bool {
        self.worked_off_at.is_some_and(|at| now.saturating_duration_since(at) < STALL_PATIENCE)
    }

    /// Something was delivered.
    pub(super) fn delivered(&mut self, now: Instant) {
        self.delivered_at = Some(now);
    }

    /// The log is about to be read from its cursor on, and every lane is empty.
    pub(super) fn unsettle(&mut self) {
        self.settled = false;
    }

    /// Whether the log may be read.
    pub(super) fn is_settled(&self) -> bool {
        self.settled
    }

    /// Takes out what the log will show again, and holds the lanes of the rest, if that is not done yet.
    /// `delivered_before`: what Kafka says of the cursor, which may be ahead of the log's.
    pub(super) fn settle(&mut self, wal: &Wal, delivered_before: Sequence, lanes: &mut Lanes, now: Instant) {
        if self.settled || self.storing.due(now).is_some() {
            return;
        }
        let result = self.spill.settle(&wal.undelivered().since(delivered_before));
        if !self.succeeded(result, now) {
            return;
        }
        for topic in self.spill.topics() {
            lanes.restore(topic, self.spill.numbers(topic), now);
        }
        if self.spill.count() > 0 && !self.known {
            info!(events = self.spill.count(), topics = self.spill.topics().count(), "topics go on from the spill");
        }
        (self.settled, self.known) = (true, true);
    }

    /// Whether it is time to move events of held topics.
    pub(super) fn is_time(&self, in_flight: &InFlight, lanes: &Lanes, now: Instant) -> bool {
        let taken = in_flight.bytes() + lanes.spilled_client_bytes();
        let is_backlog_full = in_flight.is_backlog_full(self.in_flight_bytes_max);
        let is_short = taken >= self.in_flight_bytes_max / 4 * 3 || is_backlog_full;
        let far_behind = in_flight.span_bytes() >= self.in_flight_bytes_max * 4
            || in_flight.records() >= RECORDS_MAX / 4
            || in_flight.spilled_events() >= SPILLED_MAX;
        if lanes.held() == 0 || !(far_behind || is_short) {
            return false;
        }
        let is_blind = self.delivered_at.is_none_or(|at| now.saturating_duration_since(at) >= STALL_PATIENCE);
        let pause = Duration::from_millis(in_flight.bytes() * 1000 / BLIND_BYTES_PER_SECOND);
        if is_blind && self.blind_at.is_some_and(|at| now.saturating_duration_since(at) < pause) {
            return false;
        }
        let held = lanes.held_log_events();
        let events = if is_backlog_full { in_flight.backlog_events() } else { in_flight.events() };
        held > 0 && (far_behind || held * 4 >= events)
    }

    /// Moves the open events of held topics into the spill. Whether any were.
    pub(super) fn relieve(
        &mut self,
        in_flight: &mut InFlight,
        lanes: &mut Lanes,
        router: &Router,
        now: Instant,
    ) -> bool {
        if self.storing.due(now).is_some() {
            return false;
        }
        let mut events: BTreeMap<LaneId, Moving> = BTreeMap::new();
        let mut walk = Walk::new(in_flight);
        for (lane, event) in in_flight.open_events(|lane| lanes.is_held(lane)) {
            let (live, found) = walk.find(event);
            let moving = events.entry(lane).or_default();
            let bytes = found.payload.len() as u64 + EVENT_OVERHEAD_BYTES;
            moving.refs.push((event, in_flight.tag(event), bytes));
            moving.events.push(SpilledEvent::of(live, found, router));
        }
        if events.is_empty() {
            return false;
        }
        let contents = events.iter_mut().map(|(lane, moving)| (lanes.topic(*lane), std::mem::take(&mut moving.events)));
        let numbers = match self.put(contents.collect()) {
            Ok(numbers) => numbers,
            Err(error) => {
                self.succeeded(Err(error), now);
                return true;
            }
        };
        self.succeeded(Ok(()), now);
        self.blind_at = Some(now);
        for ((lane, moving), numbers) in events.into_iter().zip(numbers) {
            lanes.moved(lane, &moving.refs, numbers.clone(), now);
            for ((event, _, bytes), number) in moving.refs.iter().zip(numbers) {
                in_flight.spilled(*event, (lane, number), *bytes - EVENT_OVERHEAD_BYTES, now_ms());
            }
        }
        true
    }

    /// Puts events into the spill, each under its topic. Durable on return: the numbers of each topic.
    ///
    /// # Errors
    /// [`SpillError::Io`]: none of them is there.
    pub(super) fn put(&mut self, topics: Vec<(&str, Vec<SpilledEvent>)>) -> Result<Vec<Range<u64>>, SpillError> {
        let counts: Vec<u64> = topics.iter().map(|(_, events)| events.len() as u64).collect();
        let firsts = self.spill.put(topics)?;
        Ok(firsts.into_iter().zip(counts).map(|(first, count)| first..first + count).collect())
    }

    /// An event of the spill.
    ///
    /// # Errors
    /// [`SpillError`], as [`Spill::event`]
    pub(super) fn event(&mut self, topic: &str, number: u64) -> Result<FoundEvent, SpillError> {
        self.spill.event(topic, number)
    }

    /// Whether a parked event is still in the spill as well.
    pub(super) fn has(&mut self, parked: &ParkedEvent) -> bool {
        let ParkedAbout { topic, sequence, spill_number, .. } = &parked.about;
        let number = spill_number.filter(|number| self.spill.numbers(topic).contains(number));
        let found = number.and_then(|number| self.spill.event(topic, number).ok());
        found.is_some_and(|found| found.sequence == sequence.0 && found.payload == parked.payload)
    }

    /// Tells that a damaged block has cost an event of `topic`.
    pub(super) fn report_lost(&mut self, topic: &str, now: Instant) {
        if let Some(suppressed) = self.lost.admit(now) {
            error!(%topic, suppressed, "an event is lost: the spill is damaged");
        }
    }

    /// Lets go of what the lanes have worked off, durably every so often. What of it is to be counted now.
    pub(super) fn work_off(&mut self, lanes: &mut Lanes, in_flight: &mut InFlight, now: Instant) -> Passed {
        let mut passed = Passed::default();
        for (lane, number, fate) in lanes.take_worked_off() {
            self.worked_off_at = Some(now);
            self.spill.consume(lanes.topic(lane), number + 1);
            in_flight.worked_off((lane, number), fate, &mut passed);
        }
        if self.settled && self.storing.due(now).is_none() && self.saving.is_due(now) {
            let result = self.spill.save();
            self.succeeded(result, now);
        }
        passed
    }

    /// Makes everything durable, before the end.
    pub(super) fn finish(&mut self) {
        if let Err(error) = self.spill.save() {
            warn!(error = &error as &dyn std::error::Error, "what was delivered from the spill may be delivered again");
        }
    }

    fn succeeded(&mut self, result: Result<(), SpillError>, now: Instant) -> bool {
        match result {
            Ok(()) => {
                if self.storing.is_failing() {
                    info!("the spill works again");
                }
                self.storing.succeeded();
                true
            }
            Err(error) => {
                if !self.storing.is_failing() {
                    error!(error = &error as &dyn std::error::Error, "the spill does not work, retrying");
                }
                self.storing.failed(now, &mut self.rng);
                false
            }
        }
    }
}

impl SpilledEvent {
    /// An event of the log.
    pub(super) fn of(live: &Live, event: Event<'_>, router: &Router) -> SpilledEvent {
        let batch = &live.batch;
        SpilledEvent {
            sequence: live.sequence.0,
            received_at_ms: batch.received_at_ms,
            group: batch.client.group.to_string(),
            connection_id: batch.client.id.to_string(),
            req_guid: batch.request.req_guid().to_owned(),
            event_type: event.event_type.to_owned(),
            key: router.key(&batch.client, &batch.request, event.event_type).map(str::to_owned),
            payload: batch.request.as_bytes().slice_ref(event.payload),
            headers: Vec::new(),
            requeued: false,
        }
    }
}

/// Events of one lane on their way into the spill.
#[derive(Default)]
struct Moving {
    /// With its tag, and what it is charged in the client.
    refs: Vec<(EventRef, usize, u64)>,
    events: Vec<SpilledEvent>,
}
