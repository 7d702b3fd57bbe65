//! The watermark: how far everything is delivered or parked.

use std::time::Instant;

use super::super::ParkReason;
use super::super::discard::Dropped;
use super::super::in_flight::{Passed, Side};
use super::Replay;
use super::transaction::ExactlyOnce;

impl Replay {
    /// Tells the log how far everything is delivered or parked, and counts what that passed.
    pub(super) fn move_watermark(&mut self, now: Instant) {
        let [backlog, live] = if self.exactly_once.as_ref().is_none_or(ExactlyOnce::may_pass) {
            let delay = |delay_ms| self.metrics.forward.delivery_delay.record(delay_ms as f64 / 1000.0);
            [Side::Backlog, Side::Live].map(|side| self.in_flight.advance(side, delay))
        } else {
            Default::default()
        };
        self.count(&backlog, now);
        self.count(&live, now);
        self.live_first.passed(&backlog, &live);
        let metrics = &self.metrics.forward;
        metrics.in_flight_events.set(self.in_flight.events() as f64);
        metrics.in_flight_bytes.set(self.in_flight.bytes() as f64);
        metrics.spilled_events.set(self.spilling.count() as f64);
        metrics.spilled_bytes.set(self.spilling.bytes() as f64);
        metrics.held_topics.set(self.lanes.held() as f64);
        let mut status = self.shared.status();
        status.in_flight_events = self.in_flight.events();
        status.in_flight_bytes = self.in_flight.bytes();
        status.parked_events = self.parking.count();
        status.held_topics = self.lanes.held() as u64;
        status.spilled_events = self.spilling.count();
        drop(status);
        self.note_spilled();
        // Last, so that whoever sees an empty backlog finds everything counted.
        if let Some(end) = live.end {
            self.wal.deliver_ahead(end);
        }
        if let Some(end) = backlog.end {
            self.wal.deliver(end);
        }
        self.join_live(now);
    }

    /// Lets go of what is done for in the spill, and counts it.
    pub(super) fn work_off(&mut self, now: Instant) {
        let passed = self.spilling.work_off(&mut self.lanes, &mut self.in_flight, now);
        self.count(&passed, now);
    }

    /// Tells the log how many events are in the spill and no longer in the log. Of those that are in both, the log is about to be
    /// read again: until the spill is settled, nothing changes.
    pub(super) fn note_spilled(&self) {
        if self.spilling.is_settled() {
            self.wal.note_spilled(self.spilling.count() - self.in_flight.spilled_events());
        }
    }

    fn count(&mut self, passed: &Passed, now: Instant) {
        self.shared.status().delivered_events += passed.delivered_events;
        let metrics = &self.metrics.forward;
        metrics.delivered_events.increment(passed.delivered_events);
        metrics.delivered_bytes.increment(passed.delivered_bytes);
        for (reason, count) in ParkReason::ALL.into_iter().zip(passed.parked) {
            metrics.parked_events_total(reason).increment(count);
        }
        metrics.dropped_events_damaged.increment(passed.lost);
        for Dropped { reason, topics } in &passed.dropped {
            for (topic, count) in topics {
                self.metrics.count_dropped_events(*reason, topic, *count);
            }
        }
        self.discard.report(&passed.dropped, now);
    }
}
