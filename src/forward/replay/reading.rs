//! Reading: what of the log goes to the client now.

use std::time::Instant;

use tracing::{error, info};

use super::super::ParkReason;
use super::super::discard::Verdict;
use super::super::in_flight::{EventRef, InFlight, RECORDS_MAX, SPILLED_MAX, Side};
use super::super::lanes::{LaneId, ToPark};
use super::transaction::ExactlyOnce;
use super::{LANE_PART, READ_BYTES, Replay, charge};
use crate::batch::now_ms;
use crate::wal::{ReadError, Record};

impl Replay {
    pub(super) fn has_room(&self) -> bool {
        let taken = self.in_flight.bytes() + self.lanes.spilled_client_bytes();
        let lane_has_room =
            |lane: &LaneId| self.lanes.client_bytes(*lane) < self.lane_bytes_max() || self.lanes.is_held(*lane);
        taken < self.in_flight_bytes_max
            && self.in_flight.records() < RECORDS_MAX
            && self.in_flight.spilled_events() < SPILLED_MAX
            && self.full_lane.as_ref().is_none_or(lane_has_room)
    }

    /// The same for records of one side: a backlog leaves most of the room to new records that go ahead of it.
    pub(super) fn has_room_for(&self, side: Side) -> bool {
        self.has_room() && (side == Side::Live || !self.in_flight.is_backlog_full(self.in_flight_bytes_max))
    }

    /// What one lane may have in the client: never all that there may be.
    fn lane_bytes_max(&self) -> u64 {
        self.in_flight_bytes_max.saturating_sub(self.lanes.spilled_client_bytes()) / LANE_PART
    }

    /// Reads records while there is room, and sends their events. True: there may be more to read at once.
    pub(super) fn read_on(&mut self, now: Instant, worked: &mut bool) -> bool {
        let idle = if self.forwards { self.producer.is_none() } else { !self.has_discarded() };
        if idle || self.renewal.is_draining() || !self.may_read(now) || !self.spilling.is_settled() {
            return false;
        }
        self.begin_live(now);
        let mut more = false;
        for side in self.live_first.turn() {
            more |= self.reading[*side as usize].due(now).is_none() && self.read(*side, now, worked);
        }
        more
    }

    fn read(&mut self, side: Side, now: Instant, worked: &mut bool) -> bool {
        let (mut bytes, now_ms) = (0, now_ms());
        while bytes < READ_BYTES && self.may_read(now) {
            let next = match self.next_in_turn(side, now_ms) {
                Ok(next) => next,
                Err(error) => {
                    let reading = &mut self.reading[side as usize];
                    if !reading.is_failing() {
                        error!(error = &error as &dyn std::error::Error, "the log cannot be read on, retrying");
                    }
                    self.shared.set_last_error(error.to_string(), None);
                    reading.failed(now, &mut self.rng);
                    break;
                }
            };
            // Without room nothing may have been tried.
            if self.reading[side as usize].is_failing() && (next.is_some() || self.has_room_for(side)) {
                info!("the log can be read again");
                self.reading[side as usize].succeeded();
            }
            let Some(Some(record)) = next else { break };
            if !self.begin_transaction(now) {
                self.held_back = Some(record);
                break;
            }
            // An empty record counts too, so that a turn ends.
            bytes += 1 + record.batch.request.as_bytes().len() as u64;
            if self.exactly_once.as_ref().is_some_and(|once| record.sequence < once.delivered_before()) {
                self.in_flight.push_delivered(&record);
                continue;
            }
            match self.discard.verdict(&record, &self.wal, now_ms) {
                Verdict::Deliver if !self.forwards => {
                    self.held_back = Some(record);
                    return false;
                }
                Verdict::Deliver => self.send_record(side, &record, now),
                Verdict::Park => self.park_record(side, &record),
                Verdict::Drop(reason) => {
                    let dropped = self.discard.count(&record.batch, reason, &self.router);
                    self.in_flight.push_dropped(side, record.end, dropped);
                }
            }
        }
        *worked |= bytes > 0;
        bytes >= READ_BYTES
    }

    /// The next record of a side, or that there is none yet; none at all if there is no room for it, or it is not its time.
    fn next_in_turn(&mut self, side: Side, now_ms: u64) -> Result<Option<Option<Record>>, ReadError> {
        let goes = if self.has_room_for(side) {
            self.is_time_for(side, now_ms)?
        } else {
            // New records may take all the room for long. What is given up takes next to none.
            let may_take = side == Side::Backlog && self.is_live() && self.in_flight.records() < RECORDS_MAX;
            may_take && self.wal.has_given_up() && self.is_next_given_up()?
        };
        if goes { self.next_record(side).map(Some) } else { Ok(None) }
    }

    fn next_record(&mut self, side: Side) -> Result<Option<Record>, ReadError> {
        if let (Side::Live, Some(reader)) = (side, self.live_first.reader()) {
            return reader.next_record();
        }
        self.held_back.take().map_or_else(|| self.reader.next_record(), |record| Ok(Some(record)))
    }

    /// Whether the oldest record may be one to be discarded.
    fn has_discarded(&self) -> bool {
        let status = self.wal.status();
        let aged = status.oldest_pending_received_at_ms.is_none_or(|at| self.discard.is_aged(at, now_ms()));
        self.wal.has_given_up() || (aged && status.pending_batches > 0)
    }

    fn park_record(&mut self, side: Side, record: &Record) {
        let slot = self.in_flight.push(side, record);
        let events = record.batch.request.event_count() as usize;
        self.in_flight.set_lanes(slot, vec![None; events]);
        let to_park = |index| ToPark {
            event: InFlight::event_ref(slot, index),
            lane: None,
            reason: ParkReason::Expired,
            failure: None,
        };
        self.to_park.extend((0..events).map(to_park));
    }

    fn send_record(&mut self, side: Side, record: &Record, now: Instant) {
        let slot = self.in_flight.push(side, record);
        let batch = &record.batch;
        let mut lanes = Vec::with_capacity(batch.request.event_count() as usize);
        let (events, bytes) = (u64::from(batch.request.event_count()), batch.request.as_bytes().len() as u64);
        if self.waits(side, batch.received_at_ms, now_ms()) {
            self.pace.spent_waiting(events, bytes);
        } else {
            let in_time = self.pace.is_in_time();
            self.pace.spent(events, bytes, in_time);
        }
        for (index, event) in batch.request.events().enumerate() {
            let event_ref = InFlight::event_ref(slot, index);
            let lane = self.lanes.route(&self.router, event.event_type);
            lanes.push(lane);
            let Some(lane) = lane else {
                let reason = ParkReason::InvalidTopic;
                self.to_park.push(ToPark { event: event_ref, lane: None, reason, failure: None });
                continue;
            };
            let key = self.router.key(&batch.client, &batch.request, event.event_type);
            self.send_event(lane, event_ref, key, event.payload, now);
        }
        self.in_flight.set_lanes(slot, lanes);
    }

    /// Sends an event of the log, or keeps it if its lane is held.
    pub(super) fn send_event(
        &mut self,
        lane: LaneId,
        event: EventRef,
        key: Option<&str>,
        payload: &[u8],
        now: Instant,
    ) {
        if self.lanes.is_held(lane) {
            self.lanes.hold(lane, event);
            return;
        }
        let Some(producer) = &self.producer else { return };
        match producer.send(self.lanes.topic(lane), key, payload, self.in_flight.tag(event)) {
            Ok(()) => {
                self.lanes.sent(lane, event, charge(payload.len()), now);
                if self.lanes.client_bytes(lane) >= self.lane_bytes_max() {
                    self.full_lane = Some(lane);
                }
            }
            Err(failure) if self.exactly_once.is_some() && failure.is_consequence() => {
                // The transaction is aborted, and the record read again.
                self.exactly_once.iter_mut().for_each(ExactlyOnce::failed);
            }
            Err(failure) => {
                self.lanes.refused(lane, event, failure, now, &mut self.to_park);
                self.lanes.settle(lane, now, &mut self.to_park);
                self.failures.count(lane, failure, &self.metrics);
            }
        }
    }
}
