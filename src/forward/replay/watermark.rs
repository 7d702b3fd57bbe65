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
        status.delivered_events += backlog.delivered_events + live.delivered_events;
        status.in_flight_events = self.in_flight.events();
        status.in_flight_bytes = self.in_flight.bytes();
        status.parked_events = self.parking.count();
        status.held_topics = self.lanes.held() as u64;
        status.spilled_events = self.spilling.count();
        drop(status);
        // Until the watermark passes them, the log counts them.
        self.wal.note_spilled(self.spilling.count() as i64 - self.in_flight.spilled_events() as i64);
        // Last, so that whoever sees an empty backlog finds everything counted.
        if let Some(end) = live.end {
            self.wal.deliver_ahead(end);
        }
        if let Some(end) = backlog.end {
            self.wal.deliver(end);
        }
        self.join_live(now);
    }

    fn count(&mut self, passed: &Passed, now: Instant) {
        if passed.end.is_none() {
            return;
        }
        let metrics = &self.metrics.forward;
        metrics.delivered_events.increment(passed.delivered_events);
        metrics.delivered_bytes.increment(passed.delivered_bytes);
        for (reason, count) in ParkReason::ALL.into_iter().zip(passed.parked) {
            metrics.parked_events_total(reason).increment(count);
        }
        self.count_dropped(&passed.dropped, now);
    }

    /// Counts what is given up.
    pub(super) fn count_dropped(&mut self, dropped: &[Dropped], now: Instant) {
        for Dropped { reason, topics } in dropped {
            for (topic, count) in topics {
                self.metrics.count_dropped_events(*reason, topic, *count);
            }
        }
        self.discard.report(dropped, now);
    }
}
