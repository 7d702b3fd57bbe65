//! Exponential backoff with jitter, what is tried again after it, and a limit on repeated log lines.

use std::time::{Duration, Instant};

use rand::Rng;

/// Delays that double from `min` to `max`. Each is spread over its upper half, so that what failed together does not
/// come back together.
#[derive(Debug, Clone)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `min`.
    pub(super) fn new(min: Duration, max: Duration) -> Backoff {
        Backoff { min, max, next: min }
    }

    /// How long to wait after one more failure.
    pub(super) fn next(&mut self, rng: &mut impl Rng) -> Duration {
        let longest = self.next;
        self.next = (longest * 2).min(self.max);
        rng.random_range(longest / 2..=longest)
    }

    /// Starts again at `min`, after a success.
    pub(super) fn reset(&mut self) {
        self.next = self.min;
    }
}

/// Something that is tried again after a backoff when it fails.
#[derive(Debug, Clone)]
pub(super) struct Retry {
    backoff: Backoff,
    /// None: it has not failed, or has succeeded since.
    failing: Option<Failing>,
}

#[derive(Debug, Clone, Copy)]
struct Failing {
    since: Instant,
    /// When it may be tried again.
    retry_at: Instant,
}

impl Retry {
    /// Has not failed yet.
    pub(super) fn new(backoff: Backoff) -> Retry {
        Retry { backoff, failing: None }
    }

    /// Whether it failed and has not succeeded since.
    pub(super) fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// Whether it has been failing for so long.
    pub(super) fn is_failing_for(&self, patience: Duration, now: Instant) -> bool {
        self.failing.is_some_and(|failing| now.saturating_duration_since(failing.since) >= patience)
    }

    /// When it may be tried again; none when it may be now.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        self.failing.map(|failing| failing.retry_at).filter(|at| *at > now)
    }

    /// It failed (again).
    pub(super) fn failed(&mut self, now: Instant, rng: &mut impl Rng) {
        let since = self.failing.map_or(now, |failing| failing.since);
        self.failing = Some(Failing { since, retry_at: now + self.backoff.next(rng) });
    }

    /// It succeeded.
    pub(super) fn succeeded(&mut self) {
        if self.failing.take().is_some() {
            self.backoff.reset();
        }
    }
}

/// Something that is done every so often.
#[derive(Debug)]
pub(super) struct Every {
    interval: Duration,
    next: Option<Instant>,
}

impl Every {
    /// Due at once, and then every `interval`.
    pub(super) fn new(interval: Duration) -> Every {
        Every { interval, next: None }
    }

    /// Whether it is time. If so, the next time is an interval away.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.next.is_none_or(|next| now >= next);
        if due {
            self.next = Some(now + self.interval);
        }
        due
    }
}

/// Lets one log line through per interval and counts the rest.
#[derive(Debug)]
pub(super) struct LogLimit {
    interval: Duration,
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// Lets one line through every `interval`.
    pub(super) fn new(interval: Duration) -> LogLimit {
        LogLimit { interval, last: None, suppressed: 0 }
    }

    /// Whether to write a line now: with how many were left out since the last one, or none to leave it out.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < self.interval) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    #[test]
    fn delays_double_up_to_the_limit_and_start_again() {
        let (min, max) = (Duration::from_millis(100), Duration::from_millis(700));
        let mut rng = SmallRng::seed_from_u64(7);
        let mut backoff = Backoff::new(min, max);
        for longest in [100, 200, 400, 700, 700].map(Duration::from_millis) {
            let delay = backoff.next(&mut rng);
            assert!((longest / 2..=longest).contains(&delay), "{delay:?} of {longest:?}");
        }
        backoff.reset();
        assert!(backoff.next(&mut rng) <= min);
    }

    #[test]
    fn what_fails_again_has_been_failing_since_the_first_time() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut rng = SmallRng::seed_from_u64(7);
        let mut retry = Retry::new(Backoff::new(second, second));
        assert!(!retry.is_failing_for(Duration::ZERO, start));
        retry.failed(start, &mut rng);
        retry.failed(start + second, &mut rng);
        assert!(retry.is_failing_for(second * 2, start + second * 2));
        assert!(!retry.is_failing_for(second * 2, start + second));
        retry.succeeded();
        retry.failed(start + second * 3, &mut rng);
        assert!(!retry.is_failing_for(second, start + second * 3));
    }

    #[test]
    fn one_line_an_interval() {
        let start = Instant::now();
        let mut limit = LogLimit::new(Duration::from_secs(60));
        assert_eq!(limit.admit(start), Some(0));
        assert_eq!(limit.admit(start + Duration::from_secs(1)), None);
        assert_eq!(limit.admit(start + Duration::from_secs(59)), None);
        assert_eq!(limit.admit(start + Duration::from_secs(60)), Some(2));
    }
}
