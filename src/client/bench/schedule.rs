//! When load is made, when it is measured, and when each batch is due.

use std::time::{Duration, Instant};

use super::BenchOptions;

/// Timers fire up to so much late.
const TIMER_TICK: Duration = Duration::from_millis(2);

/// The times that all connections share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    /// First batch.
    pub(super) start: Instant,
    /// From here on answers count.
    pub(super) measure: Instant,
    /// No batch is sent, and no answer counts, from here on.
    pub(super) end: Instant,
    /// Batches unanswered by now are given up.
    pub(super) give_up: Instant,
}

impl Schedule {
    pub(super) fn starting_at(start: Instant, options: &BenchOptions) -> Self {
        let measure = start + options.warmup;
        let end = measure + options.duration;
        Schedule { start, measure, end, give_up: end + options.answer_timeout }
    }

    /// Whether a moment is measured.
    pub(super) fn measures(&self, at: Instant) -> bool {
        at >= self.measure && at < self.end
    }
}

/// When the batches of one sender are due.
#[derive(Debug)]
pub(super) struct Pace {
    due: Instant,
    /// Zero: always due.
    interval: Duration,
}

impl Pace {
    /// Pace of sender `number` of `senders`, which share the rate and take turns.
    pub(super) fn new(schedule: &Schedule, options: &BenchOptions, number: usize, senders: usize) -> Self {
        let Some(rate) = options.rate else { return Pace { due: schedule.start, interval: Duration::ZERO } };
        let batches_per_second = rate / options.events_per_batch as f64;
        let interval = Duration::from_secs_f64((senders as f64 / batches_per_second).clamp(1e-9, 1e9));
        let offset = interval.mul_f64(number as f64 / senders as f64);
        Pace { due: schedule.start + offset, interval }
    }

    /// Takes the next batch if it is due: when latency starts to run.
    pub(super) fn take(&mut self, now: Instant) -> Option<Instant> {
        if self.interval.is_zero() {
            return Some(now);
        }
        let due = self.due;
        if due > now {
            return None;
        }
        self.due += self.interval;
        Some(due)
    }

    /// When the next batch is due; `None`: at once.
    pub(super) fn next_due(&self) -> Option<Instant> {
        (!self.interval.is_zero()).then_some(self.due)
    }

    /// Batches that were due before `end` and never taken. What fell due within the last tick of the timer is let off.
    pub(super) fn missed(&self, end: Instant) -> u64 {
        let end = end - TIMER_TICK;
        if self.interval.is_zero() || self.due >= end {
            return 0;
        }
        ((end - self.due).as_nanos() / self.interval.as_nanos()) as u64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(options: &BenchOptions) -> Schedule {
        Schedule::starting_at(Instant::now(), options)
    }

    #[test]
    fn senders_share_the_rate_in_turns() {
        let options =
            BenchOptions { rate: Some(1000.0), events_per_batch: 10, ..BenchOptions::new("ws://a".parse().unwrap()) };
        let schedule = schedule(&options);
        let mut second = Pace::new(&schedule, &options, 1, 2);
        // 100 batches per second, every other one is this sender's: due at 10 ms, 30 ms, …
        let at = |ms| schedule.start + Duration::from_millis(ms);
        assert_eq!(second.take(at(9)), None);
        assert_eq!(second.take(at(35)), Some(at(10)));
        assert_eq!(second.take(at(35)), Some(at(30)));
        assert_eq!(second.take(at(35)), None);
        assert_eq!(second.next_due(), Some(at(50)));
        assert_eq!(second.missed(at(51)), 0);
        assert_eq!(second.missed(at(53)), 1);
        assert_eq!(second.missed(at(73)), 2);
    }

    #[test]
    fn without_a_rate_a_batch_is_always_due() {
        let options = BenchOptions::new("ws://a".parse().unwrap());
        let schedule = schedule(&options);
        let mut pace = Pace::new(&schedule, &options, 0, 1);
        let now = Instant::now();
        assert_eq!(pace.take(now), Some(now));
        assert_eq!(pace.next_due(), None);
        assert_eq!(pace.missed(schedule.end), 0);
    }
}
