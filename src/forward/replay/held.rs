//! Rounds of held lanes: what waits is sent again, from memory or from the spill.

use std::time::Instant;

use super::super::discard::Verdict;
use super::super::in_flight::{EventRef, Walk};
use super::super::kafka::Failure;
use super::super::lanes::{Fate, LaneId};
use super::super::spill::SpillError;
use super::{ROUND_BYTES_MAX, Replay, charge};
use crate::batch::now_ms;

/// Most events that may wait to be parked before another round.
const TO_PARK_MAX: usize = 1024;

/// What of a round was sent, with what it is charged, and what was refused.
pub(super) type Sent = (Vec<(EventRef, u64)>, Option<(EventRef, Failure)>);

/// A round without what was too old.
pub(super) struct Aged {
    pub(super) rest: Vec<EventRef>,
    /// Some of it is being parked.
    pub(super) parked: bool,
}

impl Replay {
    /// Sends what held lanes want to try again now.
    pub(super) fn send_due_rounds(&mut self, now: Instant) -> bool {
        let mut sent = false;
        // What is refused on the spot must be parked before more of it is read.
        while self.may_send_rounds()
            && self.to_park.len() < TO_PARK_MAX
            && let Some((lane, round)) = self.lanes.next_round(now)
        {
            sent = true;
            let round = self.discard_aged(lane, round).rest;
            let refusal = self.send_round(lane, round, now);
            self.lanes.settle(lane, now, &mut self.to_park);
            if let Some(failure) = refusal {
                self.failures.count(lane, failure, &self.metrics);
            }
        }
        sent
    }

    pub(super) fn may_send_rounds(&self) -> bool {
        self.exactly_once.is_none() && !self.renewal.is_draining() && self.producer.is_some() && self.may_send_spilled()
    }

    /// There is room, and it is time.
    pub(super) fn may_send_spilled(&self) -> bool {
        self.is_time_for_held() && self.lanes.spilled_client_bytes() < self.in_flight_bytes_max / 2
    }

    /// Drops, or parks, what of a round waited in the spill for too long.
    pub(super) fn discard_aged(&mut self, lane: LaneId, round: Vec<EventRef>) -> Aged {
        let mut aged = Aged { rest: round, parked: false };
        if !self.discard.has_age() {
            return aged;
        }
        let now_ms = now_ms();
        aged.rest.retain(|event| {
            // What cannot be read now, or never, is found out when it is sent.
            let found = event.is_spilled().then(|| self.spilling.event(self.lanes.topic(lane), event.number()));
            let Some(Ok(found)) = found else { return true };
            match self.discard.verdict_on_spilled(&found, now_ms) {
                Verdict::Deliver => return true,
                Verdict::Drop(reason) => {
                    let dropped = self.discard.count_spilled(self.lanes.topic(lane), reason);
                    self.lanes.done(lane, *event, Fate::Dropped(dropped));
                }
                Verdict::Park => {
                    self.lanes.expired(lane, *event, &mut self.to_park);
                    aged.parked = true;
                }
            }
            false
        });
        aged
    }

    /// Whether events of the spill grow too old in the client, which does not get rid of them.
    pub(super) fn is_spilled_stuck(&mut self, now: Instant) -> bool {
        // With transactions, everything comes back by itself.
        if self.exactly_once.is_some() || !self.discard.may_look_at_spilled(now) {
            return false;
        }
        let Some((lane, event)) = self.lanes.stillest_spilled(now) else { return false };
        let found = self.spilling.event(self.lanes.topic(lane), event.number());
        found.is_ok_and(|found| self.discard.verdict_on_spilled(&found, now_ms()) != Verdict::Deliver)
    }

    /// Sends events of a held lane up to the first that the client refuses, and keeps the rest.
    fn send_round(&mut self, lane: LaneId, round: Vec<EventRef>, now: Instant) -> Option<Failure> {
        let (_, refusal) = self.send(lane, round, false, now);
        let (event, failure) = refusal?;
        self.lanes.refused(lane, event, failure, now, &mut self.to_park);
        Some(failure)
    }

    /// The same within a transaction.
    pub(super) fn send_side_round(&mut self, lane: LaneId, round: Vec<EventRef>, now: Instant) -> Sent {
        self.send(lane, round, true, now)
    }

    fn send(&mut self, lane: LaneId, round: Vec<EventRef>, by_side: bool, now: Instant) -> Sent {
        let side = self.exactly_once.as_ref().and_then(|once| once.side.producer());
        let producer = if by_side { side } else { self.producer.as_ref() };
        let mut walk = Walk::new(&self.in_flight);
        let (mut sent, mut refusal, mut bytes, mut is_over) = (Vec::new(), None, 0, false);
        let bytes_max = ROUND_BYTES_MAX.min(self.in_flight_bytes_max / 4);
        let in_time = self.pace.is_in_time();
        for event in round {
            let Some(producer) = producer.filter(|_| !is_over) else {
                self.lanes.hold(lane, event);
                continue;
            };
            let topic = self.lanes.topic(lane);
            let (result, payload_bytes) = if event.is_spilled() {
                let found = match self.spilling.event(topic, event.number()) {
                    Ok(found) => found,
                    Err(SpillError::Damaged { .. }) => {
                        self.spilling.report_lost(topic, now);
                        self.lanes.done(lane, event, Fate::Lost);
                        continue;
                    }
                    Err(error) => {
                        self.shared.set_last_error(error.to_string(), Some(topic));
                        (refusal, is_over) = (Some((event, Failure::unreadable())), true);
                        continue;
                    }
                };
                let (tag, key) = (event.spilled_tag(lane), found.key.as_deref());
                let headers = found.headers.iter().map(|header| (header.name.as_str(), header.value.as_str()));
                (producer.send_with_headers(topic, key, &found.payload, tag, headers), found.payload.len())
            } else {
                let (live, found) = walk.find(event);
                let key = self.router.key(&live.batch.client, &live.batch.request, found.event_type);
                (producer.send(topic, key, found.payload, self.in_flight.tag(event)), found.payload.len())
            };
            match result {
                Ok(()) => {
                    self.lanes.sent(lane, event, charge(payload_bytes), now);
                    sent.push((event, charge(payload_bytes)));
                    self.pace.spent(1, payload_bytes as u64, in_time);
                    bytes += charge(payload_bytes);
                    is_over = bytes >= bytes_max;
                }
                Err(failure) if !by_side && self.lanes.parks(lane, failure) => {
                    self.lanes.refused(lane, event, failure, now, &mut self.to_park);
                }
                Err(failure) => (refusal, is_over) = (Some((event, failure)), true),
            }
        }
        (sent, refusal)
    }
}
