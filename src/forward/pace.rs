//! `[forward.pace]`: how fast, and at what times of day, events go out.
//!
//! A budget for each limit fills with time, up to what one second gives; whatever is sent takes from it, also more than there
//! is, and nothing is sent while one is empty. So a record is never cut, and the limit holds on average. What does not wait
//! (`forward.live_first`) takes from it too, down to what one second gives below nothing: what waits goes on soon after it. So that
//! it goes on in any case, a tenth of each limit comes on top for it alone.

use std::time::{Duration, Instant};

use crate::config::{PaceConfig, TimeWindow};

/// How often the time of day is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Of each limit, what waits gets one such part also when what does not wait uses all of it.
const SHARE: f64 = 0.1;

/// See the module.
pub(super) struct Pace {
    limits: Limits,
    /// For what waits alone.
    share: Limits,
    windows: Vec<TimeWindow>,
    /// New events do not wait (`forward.live_first`).
    live_first: bool,
    looked_at: Option<Instant>,
    is_open: bool,
}

impl Pace {
    pub(super) fn new(config: &PaceConfig, live_first: bool, now: Instant) -> Pace {
        Pace {
            limits: Limits::new(config, 1.0, now),
            share: Limits::new(config, SHARE, now),
            windows: config.windows.clone(),
            live_first,
            looked_at: None,
            is_open: true,
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Instant) {
        self.limits.fill(now);
        self.share.fill(now);
        if self.windows.is_empty() || self.looked_at.is_some_and(|at| now < at + LOOK_INTERVAL) {
            return;
        }
        self.looked_at = Some(now);
        let time = jiff::Zoned::now().time();
        let is_open = self.windows.iter().any(|window| window.contains(time));
        if is_open != self.is_open {
            let what = match (is_open, self.live_first) {
                (true, _) => "begins",
                (false, true) => "ends, until the next one only new events are forwarded",
                (false, false) => "ends, until the next one nothing is forwarded",
            };
            tracing::info!(at = %time.strftime("%H:%M"), "a time window of forward.pace {what}");
        }
        self.is_open = is_open;
    }

    /// Whether what waits may be sent now.
    pub(super) fn may_send(&self) -> bool {
        self.is_in_time() || (self.is_open && self.live_first && self.share.left())
    }

    /// Whether anything may be sent now, if all of it waited.
    pub(super) fn is_in_time(&self) -> bool {
        self.is_open && self.limits.left()
    }

    /// When what waits may be sent; none if it may now.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        if self.may_send() {
            return None;
        }
        let closed = (!self.is_open).then(|| self.looked_at.map_or(now, |at| at + LOOK_INTERVAL));
        let share = self.live_first.then(|| self.share.due());
        let left = share.into_iter().chain([self.limits.due()]).min().flatten();
        closed.into_iter().chain(left).max()
    }

    /// So much was sent; `in_time`: when [`Pace::is_in_time`] let it.
    pub(super) fn spent(&mut self, events: u64, bytes: u64, in_time: bool) {
        self.limits.spend(events, bytes, in_time);
    }

    /// So much of what waits was sent, beside what does not.
    pub(super) fn spent_waiting(&mut self, events: u64, bytes: u64) {
        let in_time = self.is_in_time();
        self.limits.spend(events, bytes, in_time);
        self.share.spend(events, bytes, !in_time);
    }
}

/// The budgets of both limits.
struct Limits {
    events: Budget,
    bytes: Budget,
}

impl Limits {
    /// A `part` of what is allowed.
    fn new(config: &PaceConfig, part: f64, now: Instant) -> Limits {
        let budget = |per_second: u64| Budget::new(per_second as f64 * part, now);
        Limits { events: budget(config.events_per_second_max), bytes: budget(config.bytes_per_second_max.as_u64()) }
    }

    fn fill(&mut self, now: Instant) {
        self.events.fill(now);
        self.bytes.fill(now);
    }

    fn left(&self) -> bool {
        self.events.left() && self.bytes.left()
    }

    fn due(&self) -> Option<Instant> {
        [self.events.due(), self.bytes.due()].into_iter().flatten().max()
    }

    fn spend(&mut self, events: u64, bytes: u64, in_time: bool) {
        self.events.spend(events, in_time);
        self.bytes.spend(bytes, in_time);
    }
}

/// One limit. None: there is no such limit.
struct Budget {
    per_second: Option<f64>,
    left: f64,
    filled_at: Instant,
}

impl Budget {
    fn new(per_second: f64, now: Instant) -> Budget {
        let per_second = (per_second > 0.0).then_some(per_second);
        Budget { per_second, left: per_second.unwrap_or(0.0), filled_at: now }
    }

    fn fill(&mut self, now: Instant) {
        let Some(per_second) = self.per_second else { return };
        let elapsed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        self.left = (self.left + elapsed * per_second).min(per_second);
        self.filled_at = now;
    }

    fn spend(&mut self, amount: u64, in_time: bool) {
        let Some(per_second) = self.per_second else { return };
        let least = if in_time { f64::NEG_INFINITY } else { self.left.min(-per_second) };
        self.left = (self.left - amount as f64).max(least);
    }

    fn left(&self) -> bool {
        self.per_second.is_none() || self.left > 0.0
    }

    fn due(&self) -> Option<Instant> {
        let per_second = self.per_second.filter(|_| !self.left())?;
        Some(self.filled_at + Duration::from_secs_f64(-self.left / per_second) + Duration::from_millis(1))
    }
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;

    use super::*;

    #[test]
    fn over_time_no_more_is_sent_than_allowed() {
        let start = Instant::now();
        let config = PaceConfig {
            bytes_per_second_max: ByteSize::b(10_000),
            events_per_second_max: 1_000_000,
            windows: Vec::new(),
        };
        let mut pace = Pace::new(&config, false, start);
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(60) {
            pace.tick(now);
            while pace.may_send() {
                pace.spent(10, 3_000, true);
                sent += 3_000;
            }
            let due = pace.due(now).expect("the budget is used up");
            assert!(due > now && due <= now + Duration::from_secs(1), "{:?}", due - now);
            now = due;
        }
        // A minute, the second that was saved up, and the last record.
        assert!((600_000..=613_000).contains(&sent), "{sent}");
    }

    #[test]
    fn without_limits_nothing_is_held_back() {
        let now = Instant::now();
        let mut pace = Pace::new(&PaceConfig::default(), false, now);
        pace.spent(1 << 40, 1 << 50, true);
        pace.tick(now);
        assert!(pace.may_send() && pace.due(now).is_none());
    }

    #[test]
    fn what_does_not_wait_leaves_no_debt_for_what_does() {
        let start = Instant::now();
        let config =
            PaceConfig { events_per_second_max: 10, bytes_per_second_max: ByteSize::b(1000), windows: Vec::new() };
        let mut pace = Pace::new(&config, true, start);
        let mut now = start;
        // An hour of ten times as much.
        for _ in 0..3600 {
            now += Duration::from_secs(1);
            pace.tick(now);
            for _ in 0..10 {
                let in_time = pace.is_in_time();
                pace.spent(10, 1000, in_time);
            }
        }
        pace.spent_waiting(10, 1000);
        let due = pace.due(now).expect("both budgets are used up");
        assert!(due <= now + Duration::from_secs(2), "{:?}", due - now);
    }

    #[test]
    fn what_waits_gets_a_tenth_while_the_rest_uses_everything() {
        let start = Instant::now();
        let config =
            PaceConfig { events_per_second_max: 100, bytes_per_second_max: ByteSize::b(0), windows: Vec::new() };
        let mut pace = Pace::new(&config, true, start);
        let mut sent = 0;
        // It waits for a minute, and nothing else was there in the minute before.
        for tenths in 0..1200 {
            pace.tick(start + Duration::from_millis(100) * tenths);
            if tenths >= 600 {
                let in_time = pace.is_in_time();
                pace.spent(20, 0, in_time);
            }
            while pace.may_send() {
                pace.spent_waiting(1, 0);
                sent += u64::from(tenths >= 600);
            }
        }
        assert!((590..=720).contains(&sent), "{sent}");
    }
}
