//! The forward thread: record → lane → producer → report → watermark, in a loop.
//!
//! Each turn takes in what the client reports, sends what held lanes want to try again, parks, moves the watermark, and
//! reads on while there is room. With nothing to do it waits, for new records or for reports, never longer than
//! [`TURN_MAX`], so that a heartbeat that stands still means trouble.

mod held;
mod live;
mod reading;
mod renewal;
mod transaction;
mod watermark;

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tracing::{error, info, warn};

use super::FailureReason;
use super::backoff::{Backoff, Every, LogLimit, Retry};
use super::discard::Discard;
use super::in_flight::{EVENT_OVERHEAD_BYTES, EventRef, InFlight, Side};
use super::kafka::{Failure, Inbox, Producer, Properties, Reported};
use super::lanes::{LaneId, Lanes, RetryLimits, ToPark};
use super::pace::Pace;
use super::parked::{ParkedAbout, ParkedEvent, ParkedStore};
use super::parking::{Origin, Parking};
use super::requeue::Requested;
use super::router::Router;
use super::spilling::{STALL_PATIENCE, Spilling};
use super::status::{Connection, Drain, NO_BROKER, Shared};
use crate::batch::{Sequence, now_ms};
use crate::config::{Delivery, ForwardConfig};
use crate::kill_point;
use crate::metrics::Metrics;
use crate::wal::{Reader, Record, Wal};
use live::LiveFirst;
pub(super) use renewal::Renewal;
use transaction::ExactlyOnce;
pub(super) use transaction::transactional_id;

/// Longest turn of an idle loop.
const TURN_MAX: Duration = Duration::from_millis(500);

/// One lane may have this part of the bytes in flight, or a topic that stalls would keep the others from being sent. Less would
/// slow down a single topic: its records would go in smaller requests, and fewer of them at once.
const LANE_PART: u64 = 2;

/// Bytes read between two looks at the reports.
const READ_BYTES: u64 = 256 * 1024;

/// Shortest and longest wait for reports, when connected. The longest also delays a new record.
const POLL_MIN: Duration = Duration::from_millis(1);
const POLL_MAX: Duration = Duration::from_millis(10);

/// The same without a broker.
const POLL_DISCONNECTED: Duration = Duration::from_millis(100);

/// Most bytes of one round of a held lane, as long as that is not much of what may be in flight.
const ROUND_BYTES_MAX: u64 = 4 << 20;

/// How often lanes that stand still are looked for, while there is no room.
const STALL_LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// How long events of the spill may stand still in the client while they take much of it.
const CROWDED_PATIENCE: Duration = Duration::from_secs(20);

/// Held topics named in the status.
const HELD_TOPICS_SHOWN_MAX: usize = 20;

/// How often the drain estimate is brought up to date.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// One line about broken producers in so long.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What the loop is made from.
pub(super) struct Parts {
    pub(super) config: ForwardConfig,
    pub(super) properties: Properties,
    pub(super) renewal: Renewal,
    /// None: nothing is forwarded.
    pub(super) producer: Option<Producer>,
    pub(super) topic_propagation: Duration,
    pub(super) wal: Wal,
    pub(super) parked: ParkedStore,
    /// The newest of an earlier log.
    pub(super) parked_before: u64,
    pub(super) spilling: Spilling,
    pub(super) metrics: Arc<Metrics>,
    pub(super) shared: Arc<Shared>,
    pub(super) seed: u64,
}

/// The state of the loop.
pub(super) struct Replay {
    router: Router,
    in_flight_bytes_max: u64,
    properties: Properties,
    renewal: Renewal,
    wal: Wal,
    reader: Reader,
    live_first: LiveFirst,
    /// Read, and to be worked on later: if nothing is forwarded it is not to be discarded, or no transaction could be begun.
    held_back: Option<Record>,
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    rng: SmallRng,

    /// None while it is being replaced, and always if `forwards` is not set.
    producer: Option<Producer>,
    /// There are brokers. Otherwise only what is to be discarded is read.
    forwards: bool,
    discard: Discard,
    inbox: Inbox,
    in_flight: InFlight,
    lanes: Lanes,
    to_park: Vec<ToPark>,
    parking: Parking,
    spilling: Spilling,
    pace: Pace,
    dead_letter_topic: Option<Box<str>>,
    requeued: Receiver<Requested>,
    /// A lane that has as much in the client as one may.
    full_lane: Option<LaneId>,
    stalled: Every,
    /// Since when events of the spill that do not move take much of the client.
    crowded_since: Option<Instant>,
    /// With exactly-once delivery.
    exactly_once: Option<ExactlyOnce>,
    failures: Failures,

    /// Of each side.
    reading: [Retry; 2],
    rebuilding: Retry,
    broken: LogLimit,
    /// How long the next poll may wait.
    poll_wait: Duration,
    idle_polls: u32,

    connection: Connection,
    client_error: String,
    drain: Drain,
    report_at: Instant,
}

/// Counts failed attempts, and keeps the newest for the status.
#[derive(Default)]
struct Failures {
    newest: Option<(LaneId, Failure)>,
}

impl Replay {
    /// Starts at the log's cursor.
    pub(super) fn new(parts: Parts, requeued: Receiver<Requested>) -> Replay {
        let Parts {
            config,
            properties,
            renewal,
            producer,
            topic_propagation,
            wal,
            parked,
            parked_before,
            spilling,
            metrics,
            shared,
            seed,
        } = parts;
        let limits = RetryLimits {
            delay_min: config.retry_delay_min,
            delay_max: config.retry_delay_max,
            topic_grace: config.topic_grace,
            topic_propagation,
            exactly_once: producer.is_some() && config.delivery == Delivery::ExactlyOnce,
        };
        let exactly_once = limits.exactly_once.then(|| ExactlyOnce::new(&config, &wal, parked_before, spilling.id()));
        let backoff = Backoff::new(config.retry_delay_min, config.retry_delay_max);
        let now = Instant::now();
        let live_first = LiveFirst::new(config.live_first && exactly_once.is_none() && producer.is_some(), &wal, now);
        let mut replay = Replay {
            router: Router::new(&config.topic, config.record_key),
            in_flight_bytes_max: config.in_flight_bytes_max.as_u64(),
            properties,
            renewal,
            reader: wal.reader(),
            live_first,
            held_back: None,
            metrics,
            shared,
            rng: SmallRng::seed_from_u64(seed),
            forwards: producer.is_some(),
            producer,
            discard: Discard::new(wal.config()),
            inbox: Inbox::default(),
            in_flight: InFlight::default(),
            lanes: Lanes::new(limits, seed),
            to_park: Vec::new(),
            parking: Parking::new(parked, Retry::new(backoff.clone()), SmallRng::seed_from_u64(seed)),
            spilling,
            pace: Pace::new(&config.pace, config.live_first, now),
            dead_letter_topic: (!config.dead_letter_topic.is_empty()).then(|| config.dead_letter_topic.as_str().into()),
            requeued,
            full_lane: None,
            stalled: Every::new(STALL_LOOK_INTERVAL),
            crowded_since: None,
            exactly_once,
            failures: Failures::default(),
            reading: [Retry::new(backoff.clone()), Retry::new(backoff.clone())],
            rebuilding: Retry::new(backoff),
            broken: LogLimit::new(LOG_INTERVAL),
            poll_wait: Duration::ZERO,
            idle_polls: 0,
            connection: Connection::new(now),
            client_error: String::new(),
            drain: Drain::default(),
            report_at: now,
            wal,
        };
        if replay.is_live() {
            replay.in_flight.begin_live();
            replay.shared.status().live_first = true;
        }
        replay
    }

    /// Runs until the handle asks for the end. When it returns, the log knows of everything that was delivered.
    pub(super) fn run(&mut self) {
        let stop_by = loop {
            if let Some(stop_by) = self.shared.stop_by() {
                break stop_by;
            }
            kill_point::pass("forward.turn");
            self.poll();
            let now = Instant::now();
            self.shared.beat(now);
            self.reload(now);
            self.pace.tick(now);
            let mut worked = self.take_reports(now);
            worked |= self.drive_transaction(now);
            self.settle_spill(now);
            worked |= self.take_requeued(now);
            self.let_go_of_discarded(now);
            self.renew(now);
            worked |= self.mend_producer(now);
            worked |= self.send_due_rounds(now);
            worked |= self.park(now);
            worked |= self.spill(now);
            self.work_off(now);
            self.move_watermark(now);
            let more_to_read = self.read_on(now, &mut worked);
            self.report(now);
            self.rest(worked, more_to_read, now);
        };
        self.finish(stop_by);
    }

    /// Takes over what the handle was given.
    fn reload(&mut self, now: Instant) {
        let Some(config) = self.shared.take_reload() else { return };
        self.pace = Pace::new(&config.pace, config.live_first, now);
        self.router = Router::new(&config.topic, config.record_key);
        self.lanes.forget_names();
    }

    /// Waits for what the client holds and what is being parked, until `stop_by`. The rest stays in the log.
    fn finish(&mut self, stop_by: Instant) {
        loop {
            self.poll();
            let now = Instant::now();
            self.shared.beat(now);
            self.take_reports(now);
            self.park(now);
            self.close_transaction(now);
            self.move_watermark(now);
            // Without a broker nothing that the client holds gets anywhere.
            let settled = self.lanes.in_client() == 0 || !self.connection.is_up();
            if now >= stop_by || (settled && !self.is_parking(now) && self.is_committed()) {
                break;
            }
            self.poll_wait = POLL_MAX.min(stop_by - now);
        }
        self.work_off(Instant::now());
        self.spilling.finish();
        self.report(Instant::now());
        info!(undelivered_events = self.in_flight.events(), "forwarder stopped");
    }

    /// Waits for what the client reports.
    fn poll(&mut self) {
        match &self.producer {
            Some(producer) => producer.poll(self.poll_wait, &mut self.inbox),
            None => std::thread::sleep(self.poll_wait),
        }
    }

    /// Works on what the client reported.
    fn take_reports(&mut self, now: Instant) -> bool {
        let now_ms = now_ms();
        let mut inbox = std::mem::take(&mut self.inbox);
        let any = !inbox.delivered.is_empty() || !inbox.failed.is_empty();
        if !inbox.delivered.is_empty() {
            self.rebuilding.succeeded();
        }
        for reported in inbox.delivered.drain(..) {
            if self.exactly_once.as_mut().is_some_and(|once| once.is_cursor(reported, true)) {
                continue;
            }
            let (lane, event) = self.reported_event(reported);
            if !event.is_spilled() {
                self.in_flight.delivered(event, now_ms);
            }
            self.lanes.delivered(lane, event, charge(reported.payload_bytes as usize), now, &mut self.to_park);
            self.spilling.delivered(now);
        }
        for (reported, failure) in inbox.failed.drain(..) {
            if let Some(once) = &mut self.exactly_once {
                once.failed();
                if once.is_cursor(reported, false) {
                    continue;
                }
            }
            let (lane, event) = self.reported_event(reported);
            let bytes = charge(reported.payload_bytes as usize);
            if self.exactly_once.is_some() && failure.is_consequence() {
                self.metrics.forward.delivery_failures(failure.reason()).increment(1);
                self.lanes.taken_back(lane, event, bytes, now);
                continue;
            }
            self.lanes.failed(lane, event, bytes, failure, now, &mut self.to_park);
            self.failures.count(lane, failure, &self.metrics);
        }
        if let Some(once) = &mut self.exactly_once {
            for (topic, failure) in inbox.refused_topics.drain(..) {
                self.shared.set_last_error(failure.to_string(), Some(&topic));
                once.refused(topic, failure);
            }
        }
        if self.forwards {
            self.observe_connection(&inbox, now);
        }
        // Empty again, and its memory is kept.
        inbox.clear();
        self.inbox = inbox;
        any
    }

    fn reported_event(&mut self, reported: Reported) -> (LaneId, EventRef) {
        self.lanes.spilled_by_tag(reported.tag).unwrap_or_else(|| {
            let event = self.in_flight.by_tag(reported.tag);
            (self.in_flight.lane(event).expect("an event that was sent has a lane"), event)
        })
    }

    fn observe_connection(&mut self, inbox: &Inbox, now: Instant) {
        if let Some(error) = &inbox.error {
            self.shared.set_last_error(error.clone(), None);
            self.client_error.clone_from(error);
        }
        let backlog = || self.wal.status();
        let brokers_up = inbox.brokers_up;
        if self.connection.observe(brokers_up, inbox.all_brokers_down, &self.client_error, now, backlog) {
            let up = self.connection.is_up();
            if !up && self.client_error.is_empty() {
                self.shared.set_last_error(NO_BROKER.into(), None);
            }
            // The next outage has a cause of its own.
            self.client_error.clear();
            self.metrics.forward.connected.set(f64::from(u8::from(up)));
            let mut status = self.shared.status();
            status.connected = up;
            status.disconnected_since_ms = (!up).then(now_ms);
        }
        if let Some(brokers) = brokers_up {
            self.shared.status().brokers = brokers;
        }
    }

    /// Replaces a producer that broke. What it held is read again from the cursor on: events may be sent twice, none is
    /// lost, and none is counted twice.
    fn mend_producer(&mut self, now: Instant) -> bool {
        if let Some(producer) = &self.producer {
            let Some(error) = producer.fatal_error() else { return false };
            let has_expired = self.exactly_once.as_ref().is_some_and(|once| once.may_have_expired(now));
            if producer.is_fenced() && !has_expired {
                self.stop_fenced(&error, now);
                return true;
            }
            if let Some(suppressed) = self.broken.admit(now) {
                let in_flight_events = self.in_flight.events();
                error!(error, in_flight_events, suppressed, "kafka producer broke, replacing it");
            }
            self.shared.set_last_error(error, None);
            self.metrics.forward.delivery_failures(FailureReason::ProducerFatal).increment(1);
            self.drop_producer(now);
            self.rebuilding.failed(now, &mut self.rng);
        }
        if !self.forwards {
            return false;
        }
        let is_fenced = self.exactly_once.as_ref().is_some_and(ExactlyOnce::is_fenced);
        if is_fenced || self.rebuilding.due(now).is_some() {
            return false;
        }
        match Producer::new(&self.properties) {
            Ok(producer) => self.producer = Some(producer),
            Err(error) => {
                if let Some(suppressed) = self.broken.admit(now) {
                    error!(%error, suppressed, "kafka producer cannot be replaced, retrying");
                }
                self.rebuilding.failed(now, &mut self.rng);
            }
        }
        true
    }

    /// Forgets the producer and everything that it holds, back to the watermark.
    fn drop_producer(&mut self, now: Instant) {
        self.move_watermark(now);
        self.producer = None;
        if let Some(once) = &mut self.exactly_once {
            once.start_again();
        }
        self.rewind_transaction(now);
    }

    /// Forgets everything behind the watermark: it is read again.
    fn rewind(&mut self, now: Instant) {
        self.work_off(now);
        self.note_spilled();
        self.in_flight.clear();
        self.spilling.unsettle();
        self.lanes.clear();
        self.full_lane = None;
        self.to_park.clear();
        self.parking.clear();
        self.failures.newest = None;
        self.held_back = None;
        self.rewind_readers(now);
    }

    /// Takes back what is to be discarded and does not get away.
    fn let_go_of_discarded(&mut self, now: Instant) {
        let oldest = self.in_flight.oldest();
        if self.discard.is_stuck(oldest, &self.wal, self.connection.is_up(), now, now_ms())
            || self.is_spilled_stuck(now)
        {
            self.drop_producer(now);
        }
    }

    fn park(&mut self, now: Instant) -> bool {
        self.parking.add(&mut self.to_park);
        let Replay { in_flight, lanes, spilling, router, metrics, dead_letter_topic, .. } = self;
        let dead_letter_topic = dead_letter_topic.as_deref();
        self.parking.run(&mut Origin { in_flight, lanes, spilling, router, metrics, dead_letter_topic }, now)
    }

    /// Puts what an operator wants back into the backlog.
    fn take_requeued(&mut self, now: Instant) -> bool {
        // In a transaction, what is in the spill and what the log still shows must not be mixed up.
        let waits = self.exactly_once.as_ref().is_some_and(|once| !once.is_idle()) || !self.spilling.is_settled();
        let Some(Requested { events, until, answer }) = (!waits).then(|| self.requeued.try_recv().ok()).flatten()
        else {
            return false;
        };
        if now >= until {
            // Whoever asked has been told that it was not done.
            return true;
        }
        let count: usize = events.iter().map(|(_, events)| events.len()).sum();
        let topics: Vec<String> = events.iter().map(|(topic, _)| topic.clone()).collect();
        let contents = topics.iter().map(String::as_str).zip(events.into_iter().map(|(_, events)| events));
        let result = self.spilling.put(contents.collect()).map(|numbers| {
            for (topic, numbers) in topics.iter().zip(numbers) {
                self.lanes.restore(topic, numbers, now);
            }
            self.metrics.forward.requeued_events.increment(count as u64);
        });
        // Whoever asked may have given up.
        let _ = answer.send(result);
        true
    }

    /// Holds the lanes that stand still when that keeps others from being read, and moves held ones out of the way.
    fn spill(&mut self, now: Instant) -> bool {
        let Some(connected_since) = self.connection.up_since() else { return false };
        if self.exactly_once.is_some() {
            // A transaction moves them when it ends.
            return false;
        }
        if !self.has_room_for(Side::Backlog) && self.stalled.is_due(now) {
            self.lanes.hold_stalled(now, STALL_PATIENCE, connected_since);
        }
        self.make_room_in_client(now);
        if !self.forwards || self.is_parking(now) || !self.spilling.is_time(&self.in_flight, &self.lanes, now) {
            return false;
        }
        self.spilling.relieve(&mut self.in_flight, &mut self.lanes, &self.router, now)
    }

    /// Events of the spill that Kafka does not take must not keep others out of the client for long: they are safe, and go back.
    fn make_room_in_client(&mut self, now: Instant) {
        if self.lanes.spilled_client_bytes() < self.in_flight_bytes_max / LANE_PART
            || self.spilling.has_delivered_since(now)
        {
            self.crowded_since = None;
            return;
        }
        if now < *self.crowded_since.get_or_insert(now) + CROWDED_PATIENCE {
            return;
        }
        self.crowded_since = None;
        let bytes = self.lanes.spilled_client_bytes();
        warn!(bytes, "topics that stand still take much of the kafka client, replacing it");
        self.drop_producer(now);
    }

    /// Events are on their way into the parked store.
    fn is_parking(&self, now: Instant) -> bool {
        self.parking.due(now).is_some() || !self.to_park.is_empty()
    }

    /// Takes out of the spill what the log shows again, once it is known from where on. With exactly-once delivery also out of
    /// the parked store; and what is parked and, as it was not noted in time, in the spill as well is done for there.
    fn settle_spill(&mut self, now: Instant) {
        if self.spilling.is_settled() {
            return;
        }
        let mut parked_earlier = Vec::new();
        let delivered_before = match &self.exactly_once {
            None => Sequence::FIRST,
            Some(once) if !once.is_started() => return,
            Some(once) => {
                let undelivered = self.wal.undelivered().since(once.delivered_before());
                let is_spilled = |event: &ParkedEvent| self.spilling.has(event);
                match self.parking.take_back(once.parked_before(), &undelivered, is_spilled) {
                    Ok(spilled) => parked_earlier = spilled,
                    Err(error) => {
                        self.shared.set_last_error(error.to_string(), None);
                        return;
                    }
                }
                once.delivered_before()
            }
        };
        self.spilling.settle(&self.wal, delivered_before, &mut self.lanes, now);
        if self.spilling.is_settled() {
            for ParkedAbout { topic, spill_number, reason, .. } in &parked_earlier {
                spill_number.iter().for_each(|number| self.lanes.parked_earlier(topic, *number, *reason, now));
            }
        }
    }

    /// Brings up to date what is only for people.
    fn report(&mut self, now: Instant) {
        if let Some((lane, failure)) = self.failures.newest.take() {
            self.shared.set_last_error(failure.to_string(), Some(self.lanes.topic(lane)));
        }
        if now < self.report_at {
            return;
        }
        self.report_at = now + REPORT_INTERVAL;
        let drain_seconds = self.drain.observe(self.wal.status().pending_events, now);
        self.metrics.forward.drain_seconds.set(drain_seconds.unwrap_or(f64::NAN));
        let held = self.lanes.held_topics(HELD_TOPICS_SHOWN_MAX, now);
        let mut status = self.shared.status();
        status.drain_seconds = drain_seconds;
        status.held = held;
    }

    /// Waits until there may be something to do, if nothing was done.
    fn rest(&mut self, worked: bool, more_to_read: bool, now: Instant) {
        self.poll_wait = Duration::ZERO;
        if more_to_read {
            return;
        }
        if worked {
            // A turn for every few events would cost more than the events.
            self.poll_wait = POLL_MIN;
            self.idle_polls = 0;
            return;
        }
        let round_due = self.lanes.due().filter(|_| self.may_send_rounds());
        let dues = [
            round_due,
            self.transaction_due(now),
            self.parking.due(now),
            self.reading[Side::Backlog as usize].due(now),
            self.reading[Side::Live as usize].due(now),
            self.rebuilding.due(now),
            self.spilling.due(now),
            self.pace.due(now),
        ];
        let due = dues.into_iter().flatten().min().map(|due| due.saturating_duration_since(now));
        let wait = due.unwrap_or(TURN_MAX).clamp(POLL_MIN, TURN_MAX);
        let newest = if self.is_live() { Side::Live } else { Side::Backlog };
        let can_read = self.producer.is_some() && self.reading[newest as usize].due(now).is_none() && self.has_room();
        let can_read = can_read && !self.renewal.is_draining() && self.may_read(now);
        let can_read = can_read && self.spilling.is_settled() && (self.is_live() || self.pace.may_send());
        if can_read
            && self.lanes.in_client() == 0
            && let Some(reader) = self.live_first.newest_reader(&self.reader)
        {
            reader.wait(wait);
            return;
        }
        let longest = if self.connection.is_up() { POLL_MAX } else { POLL_DISCONNECTED };
        self.poll_wait = wait.min(POLL_MIN * 2u32.saturating_pow(self.idle_polls)).min(longest);
        self.idle_polls = (self.idle_polls + 1).min(10);
    }
}

/// What an event counts for in the client.
fn charge(payload_bytes: usize) -> u64 {
    payload_bytes as u64 + EVENT_OVERHEAD_BYTES
}

impl Failures {
    fn count(&mut self, lane: LaneId, failure: Failure, metrics: &Metrics) {
        metrics.forward.delivery_failures(failure.reason()).increment(1);
        self.newest = Some((lane, failure));
    }
}
