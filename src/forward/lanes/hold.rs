//! A held lane: what of its topic waits to be sent, and when the next attempt is due.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use rand::Rng;

use super::super::backoff::Backoff;
use super::super::in_flight::EventRef;
use super::super::kafka::Failure;
use super::super::{FailureReason, ParkReason};
use super::{Fate, RetryLimits, ToPark};

/// Most events of one round.
pub(super) const ROUND_EVENTS_MAX: usize = 4096;

pub(super) struct Hold {
    /// Events in memory that are to be sent (again): of the spill those that failed, of the log all.
    events: BTreeSet<EventRef>,
    /// How many of them are of the log.
    log_events: usize,
    pub(super) spilled: Spilled,
    /// Events sent in this round; unknown, hence not 1, while what was sent before the hold comes back.
    round: usize,
    round_failed: usize,
    /// The worst failure of this round.
    failure: Option<(EventRef, Failure)>,
    round_open: bool,
    next_round: usize,
    retry_at: Instant,
    /// When the lane has its turn.
    pub(super) due: Option<Instant>,
    backoff: Backoff,
    pub(super) since: Instant,
    topic_failing_since: Option<Instant>,
    /// An event that failed will be read from the log again: the lane stays held until then.
    expecting: bool,
    /// Rounds take only events of the spill that are committed there.
    exactly_once: bool,
    /// Since the last failure, an event of the spill was delivered.
    recovered: bool,
    /// The newest failure, for people; none if the topic just stands still.
    pub(super) last_failure: Option<Failure>,
}

/// The events of the lane that are in the spill. They come before all those of the log.
#[derive(Debug, Default)]
pub(super) struct Spilled {
    /// All before are done for.
    pub(super) consumed: u64,
    /// The first one that no round had yet.
    next: u64,
    end: u64,
    /// With exactly-once delivery, those before are no longer the log's.
    committed: u64,
    /// Those beyond `consumed` that are, too.
    done: BTreeMap<u64, Fate>,
    /// Those that are being parked.
    parking: BTreeSet<u64>,
}

/// What a failure is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Blame {
    /// One event of the batch it was sent in.
    Event(ParkReason),
    /// Neither: it may succeed later.
    Circumstances,
    /// The topic.
    Topic(ParkReason),
}

/// What comes next for a held lane.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Something that the client has must come back first.
    Wait,
    /// A round, then.
    Round(Instant),
    /// What is left is being parked, or cannot go yet.
    Parked,
    /// Nothing is left.
    Release,
}

impl Hold {
    /// Of a lane that failed, or stands still.
    pub(super) fn new(limits: RetryLimits, now: Instant) -> Hold {
        Hold {
            events: BTreeSet::new(),
            log_events: 0,
            spilled: Spilled::default(),
            round: usize::MAX,
            round_failed: 0,
            failure: None,
            round_open: true,
            next_round: 1,
            retry_at: now,
            due: None,
            backoff: Backoff::new(limits.delay_min, limits.delay_max),
            since: now,
            topic_failing_since: None,
            expecting: false,
            exactly_once: limits.exactly_once,
            recovered: false,
            last_failure: None,
        }
    }

    /// Keeps an event.
    pub(super) fn insert(&mut self, event: EventRef) {
        self.expecting = false;
        if self.events.insert(event) && !event.is_spilled() {
            self.log_events += 1;
        }
    }

    fn remove(&mut self, event: EventRef) {
        if self.events.remove(&event) && !event.is_spilled() {
            self.log_events -= 1;
        }
    }

    /// Events of the log that are kept in memory.
    pub(super) fn log_events(&self) -> usize {
        self.log_events
    }

    /// Whether an event of the log is kept, and not in the client.
    pub(super) fn has(&self, event: EventRef) -> bool {
        self.events.contains(&event)
    }

    /// The lane stands still without a failure: when it moves again, it is not tried with a single event.
    pub(super) fn stands_still(&mut self) {
        self.next_round = ROUND_EVENTS_MAX;
    }

    /// `event` is held because of `failure`.
    pub(super) fn refused(&mut self, event: EventRef, failure: Failure) {
        self.insert(event);
        self.recovered = false;
        self.round_failed += 1;
        self.last_failure = Some(failure);
        if self.failure.is_none_or(|(_, worst)| blame(worst) < blame(failure)) {
            self.failure = Some((event, failure));
        }
    }

    /// An event failed, and will be read from the log again.
    pub(super) fn expect(&mut self, failure: Failure) {
        self.expecting = true;
        self.round_failed = 1;
        // Which one it was does not matter: it was not alone.
        self.failure = Some((EventRef::spilled(0), failure));
        self.last_failure = Some(failure);
    }

    /// The log's cursor has passed everything in the spill, durably.
    pub(super) fn commit(&mut self) {
        self.spilled.committed = self.spilled.end;
    }

    /// One event was delivered: the topic is there and may be written.
    pub(super) fn delivered(&mut self, event: EventRef) {
        self.topic_failing_since = None;
        self.recovered |= event.is_spilled();
    }

    /// With exactly-once delivery, if the topic takes events again and everything in the spill is delivered: the events of the
    /// log that came meanwhile.
    pub(super) fn caught_up(&self) -> Option<Vec<EventRef>> {
        let is_worked_off = self.spilled.consumed >= self.spilled.end && !self.expecting;
        let goes = self.exactly_once && self.recovered && is_worked_off && !self.events.is_empty();
        goes.then(|| self.events.iter().copied().collect())
    }

    /// Decides what comes next, `in_client` events of the lane being in the client. `refused` is set when the topic's grace
    /// period is over; what is to be parked for it goes to `to_park`.
    pub(super) fn settle(
        &mut self,
        in_client: u32,
        limits: RetryLimits,
        now: Instant,
        rng: &mut impl Rng,
        refused: &mut bool,
        mut park: impl FnMut(ToPark),
    ) -> Next {
        if !self.round_open || in_client > 0 {
            return if in_client > 0 { Next::Wait } else { self.next() };
        }
        self.round_open = false;
        match self.failure.take().map(|(event, failure)| (event, failure, blame(failure))) {
            None => {
                self.backoff.reset();
                self.next_round = (self.next_round * 2).min(ROUND_EVENTS_MAX);
                self.retry_at = now;
            }
            Some((event, failure, Blame::Event(reason))) => {
                if self.round == 1 {
                    self.remove(event);
                    self.spilled.parking(event);
                    park(ToPark { event, lane: None, reason, failure: Some(failure) });
                }
                self.next_round = (self.round.min(self.round_failed) / 2).max(1);
                self.retry_at = now;
            }
            Some((_, failure, Blame::Topic(reason))) => {
                let waited = if reason == ParkReason::UnknownTopic { limits.topic_propagation } else { Duration::ZERO };
                let since = *self.topic_failing_since.get_or_insert(now);
                self.next_round = 1;
                self.retry_at = now + self.backoff.next(rng);
                if now.saturating_duration_since(since) + waited >= limits.topic_grace {
                    *refused = true;
                    // What is in the spill is tried, refused and parked in rounds, and then what came later.
                    let rounds_follow = self.spilled.next < self.spilled.end;
                    let goes = |event: &EventRef| event.is_spilled() || !rounds_follow;
                    for event in self.events.iter().copied().filter(goes).collect::<Vec<_>>() {
                        self.remove(event);
                        self.spilled.parking(event);
                        park(ToPark { event, lane: None, reason, failure: Some(failure) });
                    }
                    (self.next_round, self.retry_at) = (ROUND_EVENTS_MAX, now);
                }
            }
            Some((_, _, Blame::Circumstances)) => {
                self.next_round = 1;
                self.retry_at = now + self.backoff.next(rng);
            }
        }
        self.next()
    }

    /// The same, when nothing came back.
    pub(super) fn next(&mut self) -> Next {
        self.spilled.skip_done();
        if self.first_event().is_some() {
            return Next::Round(self.retry_at);
        }
        let is_empty = self.events.is_empty() && self.spilled.consumed >= self.spilled.end && !self.expecting;
        if is_empty { Next::Release } else { Next::Parked }
    }

    /// When a round may start; none while one is open.
    pub(super) fn retry_at(&mut self) -> Option<Instant> {
        if self.round_open {
            return None;
        }
        match self.next() {
            Next::Round(at) => Some(at),
            _ => None,
        }
    }

    /// The events of the next round, in order.
    pub(super) fn begin_round(&mut self) -> Vec<EventRef> {
        let mut round = Vec::new();
        while round.len() < self.next_round {
            self.spilled.skip_done();
            let Some(event) = self.first_event() else { break };
            if event.is_spilled() && event.number() == self.spilled.next {
                self.spilled.next += 1;
            }
            self.remove(event);
            round.push(event);
        }
        (self.round, self.round_failed, self.round_open) = (round.len(), 0, true);
        round
    }

    /// Events in the spill before `number` were delivered earlier, and none of them is in the client. What became of them all. A
    /// number that was never given out is not believed.
    pub(super) fn skip_to(&mut self, number: u64) -> Vec<(u64, Fate)> {
        let spilled = &mut self.spilled;
        if number > spilled.end {
            return Vec::new();
        }
        for skipped in spilled.consumed..number {
            spilled.done.entry(skipped).or_insert(Fate::Delivered { payload_bytes: 0 });
        }
        spilled.parking.retain(|parking| *parking >= number);
        self.events.retain(|event| !event.is_spilled() || event.number() >= number);
        self.spilled.consume()
    }

    /// The first event that may go.
    fn first_event(&self) -> Option<EventRef> {
        let end = if self.exactly_once { self.spilled.committed } else { self.spilled.end };
        // What is delivered of a transaction must be a range of numbers.
        if self.exactly_once && !self.spilled.parking.is_empty() {
            return None;
        }
        let walked = (self.spilled.next < end).then(|| EventRef::spilled(self.spilled.next));
        let kept = self.events.first().copied().filter(|event| event.is_spilled() || !self.exactly_once);
        kept.into_iter().chain(walked).min()
    }

    /// Its events in memory are in the spill now, as the last ones of the topic.
    pub(super) fn moved(&mut self, numbers: Range<u64>) {
        self.append(numbers);
        self.events.retain(|event| event.is_spilled());
        self.log_events = 0;
    }

    /// The spill has more events of the topic now.
    pub(super) fn append(&mut self, numbers: Range<u64>) {
        let spilled = &mut self.spilled;
        if spilled.consumed == spilled.end {
            *spilled =
                Spilled { consumed: numbers.start, next: numbers.start, end: numbers.start, ..Spilled::default() };
        }
        spilled.end = numbers.end;
        self.expecting = false;
    }
}

impl Spilled {
    /// One event is done for. Those that `consumed` passed for that.
    pub(super) fn done(&mut self, number: u64, fate: Fate) -> Vec<(u64, Fate)> {
        self.parking.remove(&number);
        self.done.insert(number, fate);
        self.consume()
    }

    fn consume(&mut self) -> Vec<(u64, Fate)> {
        let mut passed = Vec::new();
        while let Some(fate) = self.done.remove(&self.consumed) {
            passed.push((self.consumed, fate));
            self.consumed += 1;
        }
        passed
    }

    /// `event` is being parked: no round gets it.
    pub(super) fn parking(&mut self, event: EventRef) {
        if event.is_spilled() {
            self.parking.insert(event.number());
        }
    }

    /// Whether the event with that number is not done for.
    pub(super) fn holds(&self, number: u64) -> bool {
        (self.consumed..self.end).contains(&number) && !self.done.contains_key(&number)
    }

    /// Events that are not done for.
    pub(super) fn len(&self) -> u64 {
        self.end - self.consumed - self.done.len() as u64
    }

    fn skip_done(&mut self) {
        self.next = self.next.max(self.consumed);
        while self.done.contains_key(&self.next) || self.parking.contains(&self.next) {
            self.next += 1;
        }
    }
}

pub(super) fn blame(failure: Failure) -> Blame {
    match failure.reason() {
        FailureReason::TooLarge => Blame::Event(ParkReason::TooLarge),
        FailureReason::InvalidRecord => Blame::Event(ParkReason::InvalidRecord),
        FailureReason::UnknownTopic => Blame::Topic(ParkReason::UnknownTopic),
        FailureReason::NotAuthorised => Blame::Topic(ParkReason::NotAuthorised),
        FailureReason::ProducerFatal | FailureReason::Other => Blame::Circumstances,
    }
}
