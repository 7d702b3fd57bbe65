//! Exactly-once delivery: everything read in one interval is one Kafka transaction, and the log's new cursor a record in it.
//!
//! ```text
//! starting ─▶ idle ─▶ open ─▶ closing ─▶ sealed ─▶ committing ─▶ idle
//!                       └────────┴──────────┴──────────┴─▶ aborting ─▶ idle, and everything is read again
//! ```
//!
//! - **starting**: the id is taken over from whoever had it, then the cursor is read. The one in Kafka counts.
//! - **open**: events are sent. When one fails, the transaction is aborted, and its topic is held. The client gives back the
//!   events of all topics then: that holds none of them.
//! - **closing**: nothing more is read. Once everything is reported, events of held topics are in the spill and what is to be
//!   parked is parked, nothing is open any more.
//! - **sealed**: the cursor record is sent. **committing**: the log's own cursor moves when that is done.
//!
//! Held topics are worked off by a second producer, one round a transaction ([`Side`]), whose record says how far the topic's
//! part of the spill is worked off. It only takes events that the log's cursor has passed, so that no event is in both. When all of
//! them are committed, what came meanwhile goes with the open transaction, and the topic is no longer held. The first
//! thing in such a transaction is a cursor as it was: one to which a topic is refused before anything else breaks the producer.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::super::backoff::{Backoff, LogLimit, Retry};
use super::super::in_flight::{EventRef, RECORDS_MAX, Walk};
use super::super::kafka::{
    Failure, Inbox, Producer, ProducerError, Properties, Reported, TransactionError, read_cursors,
};
use super::super::lanes::LaneId;
use super::super::spill::SpilledEvent;
use super::held::Aged;
use super::{LOG_INTERVAL, Replay, charge};
use crate::batch::Sequence;
use crate::config::ForwardConfig;
use crate::wal::Wal;

/// Longest that one step may keep the loop.
const STEP_TIMEOUT: Duration = Duration::from_secs(1);
/// The same for reading the cursors.
const READ_TIMEOUT: Duration = Duration::from_secs(20);
/// A step that has to be repeated for longer is told. Kafka makes the topic of the cursors, and loads what it knows of
/// transactions, when they are first asked for.
const WAIT_PATIENCE: Duration = Duration::from_secs(10);
/// A transaction that is younger was not given up by Kafka, which waits for a minute (`transaction.timeout.ms`).
const EXPIRY_MIN: Duration = Duration::from_secs(40);
/// Tag of a cursor record: one that no event has.
const CURSOR_TAG: usize = usize::MAX;
/// A transaction is closed when so many records are in it.
const TRANSACTION_RECORDS_MAX: usize = RECORDS_MAX / 2;
/// After so many aborted transactions without a topic to blame, every topic that had a part in the last one is held.
const BLAMELESS_MAX: u32 = 3;
/// Ends the transactional id of the producer for held topics.
const SIDE_SUFFIX: &str = "-held";

/// See the module.
pub(super) struct ExactlyOnce {
    names: Names,
    interval: Duration,
    state: State,
    begun: Instant,
    /// Something in this transaction failed.
    failed: bool,
    /// What was reported of the cursor record.
    cursor_reported: Option<bool>,
    /// Records before were delivered, by the cursor in Kafka.
    delivered_before: Sequence,
    /// The end of the log when the process began: no event after it can have been delivered before.
    tail_at_start: Sequence,
    /// Parked events up to this id belong to committed transactions, or to an earlier log.
    parked_before: u64,
    fenced: bool,
    /// No more transaction is begun.
    stopping: bool,
    /// Topics that were not let into the transaction.
    refused: Vec<(String, Failure)>,
    /// Transactions aborted in a row without a topic to blame.
    blameless: u32,
    steps: Retry,
    /// When a transaction may be begun after aborted ones.
    aborts: Retry,
    log_limit: LogLimit,
    side_steps: Retry,
    pub(super) side: Side,
}

/// What tells one forwarder's transactions and cursors from another's.
#[derive(Debug, Clone)]
struct Names {
    id: String,
    cursor_topic: String,
    log_id: String,
    spill_id: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Idle,
    Open,
    Closing,
    Sealed,
    Committing,
    /// The commit is done, the watermark may move.
    Committed,
    Aborting,
}

/// A record in the cursor topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    /// The log that it is about: another one, in the same place, starts anew.
    log: String,
    /// Of a topic: the spill that it is about.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    spill: String,
    /// Of the log: the sequence of the first record not delivered. Of a topic in the spill: the number of the first event.
    next: u64,
}

/// The transactions for held topics.
#[derive(Default)]
pub(super) struct Side {
    producer: Option<Producer>,
    /// The cursors were read as well.
    started: bool,
    inbox: Inbox,
    /// Topics that were not let into the transaction.
    refused: Vec<(String, Failure)>,
    round: Option<SideRound>,
}

struct SideRound {
    lane: LaneId,
    begun: Instant,
    /// Sealed, while a cursor is on its way: the old one, as long as events are waiting, or the new one.
    state: State,
    /// Not sent yet.
    waiting: Vec<EventRef>,
    /// With what they are charged.
    sent: Vec<(EventRef, u64)>,
    outcomes: Vec<(EventRef, u64, Option<Failure>)>,
    /// The client did not even take this one.
    refused: Option<(EventRef, Failure)>,
    cursor_reported: Option<bool>,
}

impl ExactlyOnce {
    /// Parked events up to `parked_before` are those of an earlier log.
    pub(super) fn new(config: &ForwardConfig, wal: &Wal, parked_before: u64, spill_id: &str) -> ExactlyOnce {
        let (id, log_id) = (transactional_id(config, wal), wal.id().to_owned());
        let backoff = Backoff::new(config.retry_delay_min, config.retry_delay_max);
        ExactlyOnce {
            names: Names { id, cursor_topic: config.cursor_topic.clone(), log_id, spill_id: spill_id.to_owned() },
            interval: config.commit_interval,
            state: State::Starting,
            begun: Instant::now(),
            failed: false,
            cursor_reported: None,
            delivered_before: Sequence::FIRST,
            tail_at_start: Sequence(wal.status().next_sequence),
            parked_before,
            fenced: false,
            stopping: false,
            refused: Vec::new(),
            blameless: 0,
            steps: Retry::new(backoff.clone()),
            aborts: Retry::new(backoff.clone()),
            side_steps: Retry::new(backoff),
            log_limit: LogLimit::new(LOG_INTERVAL),
            side: Side::default(),
        }
    }

    /// Whether the watermark may move.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self.state, State::Committed | State::Idle)
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.fenced
    }

    /// Whether Kafka may have given up this transaction by itself: then it is no sign of another instance that this producer is
    /// powerless.
    pub(super) fn may_have_expired(&self, now: Instant) -> bool {
        let is_under_way = !matches!(self.state, State::Starting | State::Idle | State::Committed);
        is_under_way && may_have_expired(self.begun, now)
    }

    /// Whether the cursor is known.
    pub(super) fn is_started(&self) -> bool {
        self.state != State::Starting
    }

    /// No transaction is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// Records before are delivered.
    pub(super) fn delivered_before(&self) -> Sequence {
        self.delivered_before
    }

    /// See the field.
    pub(super) fn parked_before(&self) -> u64 {
        self.parked_before
    }

    /// An event or the cursor failed.
    pub(super) fn failed(&mut self) {
        self.failed = true;
    }

    /// `topic` was not let into the transaction.
    pub(super) fn refused(&mut self, topic: String, failure: Failure) {
        self.refused.push((topic, failure));
    }

    /// Whether `reported` is the cursor record; takes it in if so.
    pub(super) fn is_cursor(&mut self, reported: Reported, delivered: bool) -> bool {
        let is_cursor = reported.tag == CURSOR_TAG;
        if is_cursor {
            self.cursor_reported = Some(delivered);
        }
        is_cursor
    }

    /// The producer is gone.
    pub(super) fn start_again(&mut self) {
        self.state = State::Starting;
        (self.failed, self.stopping) = (false, false);
        self.side = Side::default();
    }
}

/// `forward.transactional_id`, or one that no other log has.
pub(in crate::forward) fn transactional_id(config: &ForwardConfig, wal: &Wal) -> String {
    let id = &config.transactional_id;
    if id.is_empty() { format!("ringtail-{}", wal.id()) } else { id.clone() }
}

/// Whether Kafka may have given up a transaction that was begun then.
fn may_have_expired(begun: Instant, now: Instant) -> bool {
    now.saturating_duration_since(begun) >= EXPIRY_MIN
}

impl Names {
    fn properties(&self, base: &Properties, suffix: &str) -> Properties {
        let mut properties = base.clone();
        properties.push(("transactional.id".into(), format!("{}{suffix}", self.id)));
        properties
    }

    fn key(&self, topic: Option<&str>) -> String {
        topic.map_or_else(|| self.id.clone(), |topic| format!("{}/{topic}", self.id))
    }

    fn value(&self, topic: Option<&str>, next: u64) -> Vec<u8> {
        let spill = topic.map(|_| self.spill_id.clone()).unwrap_or_default();
        let cursor = Cursor { log: self.log_id.clone(), spill, next };
        serde_json::to_vec(&cursor).expect("its fields are strings and numbers")
    }

    fn is_ours(&self, name: &str, cursor: &Cursor) -> bool {
        cursor.log == self.log_id && (name.is_empty() || cursor.spill == self.spill_id)
    }

    /// The cursors of this log: of the log itself under an empty name, and of topics.
    fn read(&self, properties: &Properties) -> Result<HashMap<String, u64>, TransactionError> {
        let values = read_cursors(properties, &self.cursor_topic, &self.id, READ_TIMEOUT);
        let values = values.map_err(TransactionError::Retry)?;
        let mut cursors = HashMap::new();
        for (name, value) in values {
            match serde_json::from_slice::<Cursor>(&value) {
                Ok(cursor) if self.is_ours(&name, &cursor) => drop(cursors.insert(name, cursor.next)),
                Ok(_) => {}
                Err(error) => {
                    let what = format!("the cursor {name:?} in {} is not one: {error}", self.cursor_topic);
                    return Err(TransactionError::Retry(what));
                }
            }
        }
        Ok(cursors)
    }
}

impl Replay {
    /// Goes on with the transaction as far as it will. Whether anything was done.
    pub(super) fn drive_transaction(&mut self, now: Instant) -> bool {
        let mut worked = false;
        while self.step_transaction(now) {
            worked = true;
        }
        self.drive_side(now) | worked
    }

    fn step_transaction(&mut self, now: Instant) -> bool {
        let idle = !self.is_parking(now) && self.main_in_client() == 0;
        let has_room = self.has_room();
        let Some(once) = &mut self.exactly_once else { return false };
        let Some(producer) = self.producer.as_ref().filter(|_| !once.fenced) else { return false };
        if once.steps.due(now).is_some() {
            return false;
        }
        let result = match once.state {
            State::Idle | State::Committed => return false,
            // What an earlier process has left open would hide cursors.
            State::Starting => producer
                .init_transactions(STEP_TIMEOUT)
                .and_then(|()| match self.spilling.count() {
                    0 => Ok(()),
                    _ => once.side.init(&once.names, &self.properties),
                })
                .and_then(|()| once.names.read(&self.properties))
                .map(|cursors| {
                    let cursor = Sequence(cursors.get("").copied().unwrap_or(Sequence::FIRST.0));
                    if cursor > once.tail_at_start {
                        let (tail, cursor) = (once.tail_at_start.0, cursor.0);
                        error!(tail, cursor, "the log is shorter than what kafka has of it: was it restored?");
                    }
                    once.delivered_before = cursor.min(once.tail_at_start).max(once.delivered_before);
                    // Later it is this process that moves it.
                    once.tail_at_start = Sequence(u64::MAX);
                    once.state = State::Idle;
                    info!(id = once.names.id, cursor = once.delivered_before.0, "exactly-once delivery goes on");
                }),
            State::Open if once.failed => {
                once.state = State::Aborting;
                return true;
            }
            State::Open => {
                let is_long = self.in_flight.records() >= TRANSACTION_RECORDS_MAX || (!has_room && idle);
                if now < once.begun + once.interval && !is_long {
                    return false;
                }
                once.state = State::Closing;
                return true;
            }
            State::Closing if once.failed => {
                once.state = State::Aborting;
                return true;
            }
            State::Closing if !idle => return false,
            State::Closing => return self.seal(now),
            State::Sealed => {
                match once.cursor_reported {
                    None => return false,
                    Some(true) => once.state = State::Committing,
                    Some(false) => once.state = State::Aborting,
                }
                return true;
            }
            State::Committing => match producer.commit(STEP_TIMEOUT) {
                Ok(()) => {
                    once.state = State::Committed;
                    once.steps.succeeded();
                    self.committed(now);
                    return true;
                }
                Err(TransactionError::Abort(message)) => {
                    self.shared.set_last_error(message, None);
                    once.state = State::Aborting;
                    return true;
                }
                Err(error) => Err(error),
            },
            State::Aborting if !idle => return false,
            State::Aborting => match producer.abort(STEP_TIMEOUT) {
                Ok(()) => {
                    once.state = State::Idle;
                    once.steps.succeeded();
                    self.aborted(now);
                    return true;
                }
                Err(error) => Err(error),
            },
        };
        self.judge(result, now)
    }

    /// What a step's failure means. Whether there is something to do at once.
    fn judge(&mut self, result: Result<(), TransactionError>, now: Instant) -> bool {
        let Some(once) = &mut self.exactly_once else { return false };
        let error = match result {
            Ok(()) => {
                once.steps.succeeded();
                return true;
            }
            Err(error) => error,
        };
        self.shared.set_last_error(error.to_string(), None);
        match error {
            TransactionError::Fenced(message) if !once.may_have_expired(now) => self.stop_fenced(&message, now),
            TransactionError::Fenced(message) | TransactionError::Fatal(message) => {
                if let Some(suppressed) = once.log_limit.admit(now) {
                    warn!(error = message, suppressed, "the transaction cannot go on, replacing the kafka producer");
                }
                self.drop_producer(now);
                self.rebuilding.failed(now, &mut self.rng);
            }
            TransactionError::Retry(message) | TransactionError::Abort(message) => {
                // An outage is told by itself.
                if self.connection.is_up()
                    && once.steps.is_failing_for(WAIT_PATIENCE, now)
                    && let Some(suppressed) = once.log_limit.admit(now)
                {
                    warn!(error = message, suppressed, "the transaction waits for kafka");
                }
                once.steps.failed(now, &mut self.rng);
            }
        }
        false
    }

    /// Another instance has taken over: nothing is forwarded any more.
    pub(super) fn stop_fenced(&mut self, message: &str, now: Instant) {
        let Some(once) = &mut self.exactly_once else { return };
        once.fenced = true;
        let id = once.names.id.clone();
        error!(
            id,
            error = message,
            "another instance with the same forward.transactional_id forwards now: this one has stopped to, and goes on \
             collecting; give each its own id and restart"
        );
        self.shared.set_last_error(format!("another instance uses the transactional id {id:?}"), None);
        self.drop_producer(now);
    }

    /// Events and cursors of the main transaction that the client has.
    fn main_in_client(&self) -> u64 {
        let side = self.exactly_once.as_ref().and_then(|once| once.side.round.as_ref());
        self.lanes.in_client() - side.map_or(0, |round| round.sent.len() as u64)
    }

    /// Nothing is open but events of held topics: moves those, and sends the cursor.
    fn seal(&mut self, now: Instant) -> bool {
        if self.lanes.held() > 0
            && self.in_flight.events() > 0
            && !self.spilling.relieve(&mut self.in_flight, &mut self.lanes, &self.router, now)
        {
            return false;
        }
        if self.in_flight.events() > 0 {
            return false;
        }
        let Some(once) = &mut self.exactly_once else { return false };
        let (Some(producer), Some(end)) = (&self.producer, self.in_flight.end()) else { return false };
        // Of what was delivered before not everything need have been read again.
        let next = end.sequence().max(once.delivered_before);
        let (key, value) = (once.names.key(None), once.names.value(None, next.0));
        once.cursor_reported = None;
        match producer.send(&once.names.cursor_topic, Some(&key), &value, CURSOR_TAG) {
            Ok(()) => once.state = State::Sealed,
            Err(failure) => {
                self.shared.set_last_error(failure.to_string(), Some(&once.names.cursor_topic));
                once.state = State::Aborting;
            }
        }
        true
    }

    fn committed(&mut self, now: Instant) {
        self.move_watermark(now);
        self.lanes.commit_spilled(now);
        if let Some(once) = &mut self.exactly_once {
            (once.state, once.parked_before) = (State::Idle, self.parking.last_id());
            once.blameless = 0;
            once.refused.clear();
            once.aborts.succeeded();
        }
    }

    /// Everything is read again.
    fn aborted(&mut self, now: Instant) {
        let Some(once) = &mut self.exactly_once else { return };
        (once.failed, once.side) = (false, Side::default());
        once.aborts.failed(now, &mut self.rng);
        self.rewind_transaction(now);
    }

    /// Everything is read again; the topics that failed are held from the start.
    pub(super) fn rewind_transaction(&mut self, now: Instant) {
        let Some(once) = &mut self.exactly_once else {
            self.rewind(now);
            return;
        };
        let mut failures: Vec<(Box<str>, Failure)> = std::mem::take(&mut once.refused)
            .into_iter()
            .map(|(topic, failure)| (topic.into_boxed_str(), failure))
            .collect();
        let was_connected = self.connection.up_since().is_some_and(|since| since <= once.begun);
        // An outage is no topic's fault.
        let blamed = |(_, failure): &(Box<str>, Failure)| was_connected || !failure.is_circumstantial();
        failures.extend(self.lanes.failures().into_iter().filter(blamed));
        once.blameless = if failures.is_empty() { once.blameless + 1 } else { 0 };
        if was_connected && once.blameless >= BLAMELESS_MAX {
            once.blameless = 0;
            let topics = self.in_flight.open_events(|_| true).map(|(lane, _)| lane).collect::<BTreeSet<_>>();
            failures.extend(topics.into_iter().map(|lane| (self.lanes.topic(lane).into(), Failure::unreadable())));
        }
        self.rewind(now);
        for (topic, failure) in failures {
            self.lanes.expect(&topic, failure, now);
        }
    }

    /// Sends what came for a held topic while the last of its events in the spill were delivered: it flows again.
    fn send_caught_up(&mut self, lane: LaneId, now: Instant) {
        let is_open = |once: &ExactlyOnce| once.state == State::Open && !once.failed;
        if !self.exactly_once.as_ref().is_some_and(is_open) {
            return;
        }
        for event in self.lanes.release_caught_up(lane, now) {
            let (live, found) = Walk::new(&self.in_flight).find(event);
            let SpilledEvent { key, payload, .. } = SpilledEvent::of(live, found, &self.router);
            self.send_event(lane, event, key.as_deref(), &payload, now);
        }
    }

    /// Begins a transaction if none is open. Without exactly-once delivery there is nothing to begin.
    pub(super) fn begin_transaction(&mut self, now: Instant) -> bool {
        let Some(once) = &mut self.exactly_once else { return true };
        match once.state {
            State::Open => true,
            State::Idle if once.aborts.due(now).is_some() => false,
            State::Idle => {
                let Some(producer) = &self.producer else { return false };
                let result = producer.begin();
                if result.is_ok() {
                    (once.state, once.begun, once.failed) = (State::Open, now, false);
                }
                self.judge(result, now)
            }
            _ => false,
        }
    }

    /// Whether records may be read now.
    pub(super) fn may_read(&self, now: Instant) -> bool {
        self.exactly_once.as_ref().is_none_or(|once| match once.state {
            State::Idle => !once.fenced && once.aborts.due(now).is_none(),
            State::Open => !once.failed && !once.fenced,
            _ => false,
        })
    }

    /// The forwarder stops: the transaction does not wait for its time.
    pub(super) fn close_transaction(&mut self, now: Instant) {
        self.pause_transactions();
        self.drive_transaction(now);
    }

    /// Nothing more goes into this transaction, and until [`ExactlyOnce::start_again`] no other is begun for held topics.
    pub(super) fn pause_transactions(&mut self) {
        let Some(once) = &mut self.exactly_once else { return };
        once.stopping = true;
        if once.state == State::Open {
            once.state = State::Closing;
        }
    }

    /// When there is something to do for a transaction; none while that depends on others.
    pub(super) fn transaction_due(&self, now: Instant) -> Option<Instant> {
        let once = self.exactly_once.as_ref()?;
        if once.fenced || self.producer.is_none() {
            return None;
        }
        let main = match once.state {
            State::Idle => once.aborts.due(now),
            State::Committed => None,
            State::Open => Some(once.begun + once.interval),
            _ => Some(now),
        };
        let side = match once.side.round {
            Some(_) => Some(now),
            None if once.side.started || self.spilling.count() == 0 => self.lanes.due(),
            None => Some(now),
        };
        let not_before = |at: Instant, steps: &Retry| steps.due(now).map_or(at, |due| due.max(at));
        let main = main.map(|at| not_before(at, &once.steps));
        main.into_iter().chain(side.map(|at| not_before(at, &once.side_steps))).min()
    }

    /// Whether no transaction is under way.
    pub(super) fn is_committed(&self) -> bool {
        let is_idle =
            |once: &ExactlyOnce| matches!(once.state, State::Idle | State::Starting) && once.side.round.is_none();
        self.exactly_once.as_ref().is_none_or(is_idle)
    }

    fn drive_side(&mut self, now: Instant) -> bool {
        let Some(once) = &mut self.exactly_once else { return false };
        if once.fenced || !once.is_started() || !self.spilling.is_settled() || self.spilling.count() == 0 {
            return false;
        }
        if let Some(producer) = &once.side.producer {
            producer.poll(Duration::ZERO, &mut once.side.inbox);
            once.side.take_reports(&mut self.lanes);
        }
        match self.step_side(now) {
            Ok(worked) => worked,
            Err(error) => {
                self.side_failed(&error, now);
                false
            }
        }
    }

    fn step_side(&mut self, now: Instant) -> Result<bool, TransactionError> {
        let Some(once) = &mut self.exactly_once else { return Ok(false) };
        if once.side_steps.due(now).is_some() {
            return Ok(false);
        }
        let side = &mut once.side;
        if !side.started {
            side.init(&once.names, &self.properties)?;
            let cursors = once.names.read(&self.properties)?;
            side.started = true;
            for (topic, next) in cursors.iter().filter(|(topic, _)| !topic.is_empty()) {
                self.lanes.skip_to(topic, *next, now);
            }
            return Ok(true);
        }
        let Some(producer) = &side.producer else { return Ok(false) };
        let Some(round) = &mut side.round else {
            let stays = once.stopping || once.state == State::Aborting || !self.pace.may_send();
            let next = if stays { None } else { self.lanes.next_round(now) };
            return next.map_or(Ok(false), |(lane, events)| self.begin_side(lane, events, now).map(|()| true));
        };
        match round.state {
            State::Sealed => match round.cursor_reported {
                None => Ok(false),
                Some(true) if round.waiting.is_empty() => {
                    round.state = State::Committing;
                    Ok(true)
                }
                Some(true) => {
                    round.state = State::Open;
                    let (lane, events) = (round.lane, std::mem::take(&mut round.waiting));
                    let (sent, refused) = self.send_side_round(lane, events, now);
                    if let Some(round) = self.exactly_once.as_mut().and_then(|once| once.side.round.as_mut()) {
                        (round.sent, round.refused) = (sent, refused);
                    }
                    Ok(true)
                }
                Some(false) => {
                    once.side_steps.failed(now, &mut self.rng);
                    self.abort_side(now)
                }
            },
            State::Open if round.outcomes.len() < round.sent.len() => Ok(false),
            State::Open if round.has_failed() => self.abort_side(now),
            State::Open => {
                let delivered: Vec<EventRef> = round.outcomes.iter().map(|(event, ..)| *event).collect();
                let next = self.lanes.worked_off_with(round.lane, &delivered);
                round.seal(producer, &once.names, self.lanes.topic(round.lane), next);
                Ok(true)
            }
            _ => match producer.commit(STEP_TIMEOUT) {
                Ok(()) => {
                    once.side_steps.succeeded();
                    self.finish_side(true, now);
                    Ok(true)
                }
                Err(TransactionError::Abort(_)) => self.abort_side(now),
                Err(error) => Err(error),
            },
        }
    }

    /// Aborts the round's transaction. What went wrong is remembered also if that breaks the producer.
    fn abort_side(&mut self, now: Instant) -> Result<bool, TransactionError> {
        let producer = self.exactly_once.as_ref().and_then(|once| once.side.producer.as_ref());
        let result = producer.map_or(Ok(()), |producer| producer.abort(STEP_TIMEOUT));
        if matches!(result, Ok(()) | Err(TransactionError::Fatal(_))) {
            self.finish_side(false, now);
        }
        result.map(|()| true)
    }

    fn begin_side(&mut self, lane: LaneId, events: Vec<EventRef>, now: Instant) -> Result<(), TransactionError> {
        let Aged { rest: events, parked } = self.discard_aged(lane, events);
        if parked || events.is_empty() {
            // A transaction says up to where everything is settled: not beyond what is not parked yet.
            events.into_iter().for_each(|event| self.lanes.hold(lane, event));
            self.lanes.settle(lane, now, &mut self.to_park);
            return Ok(());
        }
        let begun = self.exactly_once.as_ref().and_then(|once| once.side.producer.as_ref()).map(Producer::begin);
        if let Some(Err(error)) = begun {
            // As if none had been tried.
            events.into_iter().for_each(|event| self.lanes.hold(lane, event));
            self.lanes.settle(lane, now, &mut self.to_park);
            return Err(error);
        }
        let Some(once) = &mut self.exactly_once else { return Ok(()) };
        let Some(producer) = &once.side.producer else { return Ok(()) };
        let mut round = SideRound {
            lane,
            begun: now,
            state: State::Open,
            waiting: events,
            sent: Vec::new(),
            outcomes: Vec::new(),
            refused: None,
            cursor_reported: None,
        };
        round.seal(producer, &once.names, self.lanes.topic(lane), self.lanes.worked_off_with(lane, &[]));
        once.side.round = Some(round);
        Ok(())
    }

    /// Tells the lane what became of the round.
    fn finish_side(&mut self, committed: bool, now: Instant) {
        let Some(round) = self.exactly_once.as_mut().and_then(|once| once.side.round.take()) else { return };
        let lane = round.lane;
        let topic = self.lanes.topic(lane);
        let blamed = |(refused, failure): &(String, Failure)| (refused == topic).then_some(*failure);
        let blamed = self.exactly_once.as_ref().and_then(|once| once.side.refused.iter().find_map(blamed));
        if let Some(once) = &mut self.exactly_once {
            once.side.refused.clear();
        }
        let cause = |failure: Failure| blamed.filter(|_| failure.is_consequence()).unwrap_or(failure);
        for event in round.waiting {
            self.lanes.hold(lane, event);
        }
        for (event, bytes, failure) in round.outcomes {
            let failure = failure.map(cause);
            match failure {
                None if committed => self.lanes.delivered(lane, event, bytes, now, &mut self.to_park),
                None => self.lanes.returned(lane, event, bytes, now),
                Some(failure) => {
                    self.failures.count(lane, failure, &self.metrics);
                    self.lanes.failed(lane, event, bytes, failure, now, &mut self.to_park);
                }
            }
        }
        if let Some((event, failure)) = round.refused {
            let failure = cause(failure);
            self.failures.count(lane, failure, &self.metrics);
            self.lanes.refused(lane, event, failure, now, &mut self.to_park);
        }
        self.lanes.settle(lane, now, &mut self.to_park);
        self.send_caught_up(lane, now);
    }

    /// The side's producer is of no more use, or the broker does not answer.
    fn side_failed(&mut self, error: &TransactionError, now: Instant) {
        self.shared.set_last_error(error.to_string(), None);
        let Some(once) = &mut self.exactly_once else { return };
        let is_usual =
            matches!(error, TransactionError::Retry(_)) && !once.side_steps.is_failing_for(WAIT_PATIENCE, now);
        if !is_usual && let Some(suppressed) = once.log_limit.admit(now) {
            warn!(%error, suppressed, "the transactions of held topics wait for kafka");
        }
        once.side_steps.failed(now, &mut self.rng);
        if let TransactionError::Fenced(message) = error
            && !once.side.round.as_ref().is_some_and(|round| may_have_expired(round.begun, now))
        {
            let message = message.clone();
            self.stop_fenced(&message, now);
        } else if !matches!(error, TransactionError::Retry(_)) {
            // What it had is unknown until the cursors are read again.
            let round = once.side.round.take();
            once.side = Side::default();
            if let Some(SideRound { lane, waiting, sent, refused, .. }) = round {
                waiting.into_iter().for_each(|event| self.lanes.hold(lane, event));
                sent.into_iter().for_each(|(event, bytes)| self.lanes.returned(lane, event, bytes, now));
                refused.into_iter().for_each(|(event, _)| self.lanes.hold(lane, event));
                self.lanes.settle(lane, now, &mut self.to_park);
            }
        }
    }
}

impl Side {
    pub(super) fn producer(&self) -> Option<&Producer> {
        self.producer.as_ref()
    }

    /// Makes every earlier producer for held topics powerless.
    fn init(&mut self, names: &Names, properties: &Properties) -> Result<(), TransactionError> {
        let producer = match &mut self.producer {
            Some(producer) => &*producer,
            None => {
                let made = Producer::new(&names.properties(properties, SIDE_SUFFIX))
                    .map_err(|error: ProducerError| TransactionError::Retry(error.to_string()))?;
                &*self.producer.insert(made)
            }
        };
        producer.init_transactions(STEP_TIMEOUT)
    }

    fn take_reports(&mut self, lanes: &mut super::super::lanes::Lanes) {
        self.refused.append(&mut self.inbox.refused_topics);
        let reports = self.inbox.delivered.drain(..).map(|reported| (reported, None));
        let failed = self.inbox.failed.drain(..).map(|(reported, failure)| (reported, Some(failure)));
        for (reported, failure) in reports.chain(failed) {
            let Some(round) = &mut self.round else { continue };
            if reported.tag == CURSOR_TAG {
                round.cursor_reported = Some(failure.is_none());
            } else if let Some((_, event)) = lanes.spilled_by_tag(reported.tag) {
                round.outcomes.push((event, charge(reported.payload_bytes as usize), failure));
            }
        }
        self.inbox.clear();
    }
}

impl SideRound {
    /// Sends a cursor of the topic.
    fn seal(&mut self, producer: &Producer, names: &Names, topic: &str, next: u64) {
        let (key, value) = (names.key(Some(topic)), names.value(Some(topic), next));
        let sent = producer.send(&names.cursor_topic, Some(&key), &value, CURSOR_TAG);
        (self.state, self.cursor_reported) = (State::Sealed, sent.is_err().then_some(false));
    }

    fn has_failed(&self) -> bool {
        self.refused.is_some() || self.outcomes.iter().any(|(.., failure)| failure.is_some())
    }
}
