//! `[forward.parked]`: how much the parked store may hold, and for how long. The forward thread keeps to it between two
//! turns, a bounded number of events at a time, so that it is never held up for long.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use tracing::{error, info, warn};

use super::removal::EVENTS_MAX;
use super::{ParkedDropReason, ParkedError, ParkedStore, Removed};
use crate::config::WhenParkedFull;
use crate::forward::backoff::{LogLimit, Retry};

/// How often the ages are looked at, at most and at least.
const AGE_INTERVAL_MIN: Duration = Duration::from_secs(1);
const AGE_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// One line about dropped events in so long.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// One line in so long about a store that is over its limit and stays so.
const WARN_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// Drops what is over the limits.
pub(in crate::forward) struct Limits {
    bytes_max: u64,
    when_full: WhenParkedFull,
    /// 0: none.
    age_max_ms: u64,
    age_at: Option<Instant>,
    /// Where the look at the ages goes on.
    age_from_id: u64,
    dropping: Retry,
    rng: SmallRng,
    log_limit: LogLimit,
    warn_limit: LogLimit,
    unlogged: u64,
}

impl Limits {
    /// The limits of `store`. A failure is tried again as `dropping` says.
    pub(in crate::forward) fn new(store: &ParkedStore, dropping: Retry, rng: SmallRng) -> Limits {
        let config = store.limits();
        Limits {
            bytes_max: config.bytes_max.as_u64(),
            when_full: config.when_full,
            age_max_ms: u64::try_from(config.age_max.as_millis()).unwrap_or(u64::MAX),
            age_at: None,
            age_from_id: 0,
            dropping,
            rng,
            log_limit: LogLimit::new(LOG_INTERVAL),
            warn_limit: LogLimit::new(WARN_INTERVAL),
            unlogged: 0,
        }
    }

    /// Drops up to [`EVENTS_MAX`] events that are too old, and as many that are too much. Whether any was dropped.
    pub(in crate::forward) fn run(&mut self, store: &ParkedStore, now: Instant, now_ms: u64) -> bool {
        if self.dropping.due(now).is_some() {
            return false;
        }
        let dropped = self.drop_expired(store, now, now_ms).and_then(|expired| {
            self.report(expired, ParkedDropReason::ParkedExpired, now);
            let full = self.drop_oldest(store, now)?;
            self.report(full, ParkedDropReason::ParkedFull, now);
            Ok(expired.events + full.events > 0)
        });
        match dropped {
            Ok(any) => {
                if self.dropping.is_failing() {
                    self.dropping.succeeded();
                    info!("parked events can be dropped again");
                }
                any
            }
            Err(error) => {
                if !self.dropping.is_failing() {
                    error!(error = &error as &dyn std::error::Error, "parked events cannot be dropped, retrying");
                }
                self.dropping.failed(now, &mut self.rng);
                false
            }
        }
    }

    fn drop_oldest(&mut self, store: &ParkedStore, now: Instant) -> Result<Removed, ParkedError> {
        let excess = if self.bytes_max == 0 { 0 } else { store.bytes().saturating_sub(self.bytes_max) };
        if excess == 0 {
            return Ok(Removed::default());
        }
        if self.when_full == WhenParkedFull::Keep {
            if self.warn_limit.admit(now).is_some() {
                let (events, bytes, bytes_max) = (store.count(), store.bytes(), self.bytes_max);
                warn!(events, bytes, bytes_max, "more is parked than forward.parked.bytes_max, and kept");
            }
            return Ok(Removed::default());
        }
        let (mut ids, mut bytes) = (Vec::new(), 0);
        let mut events = store.events(0);
        while bytes < excess && ids.len() < EVENTS_MAX {
            let Some(found) = events.next_sized()? else { break };
            bytes += found.bytes;
            ids.push(found.id);
        }
        store.drop_events(&ids, ParkedDropReason::ParkedFull)
    }

    /// What was parked at a time that is still to come, by the clock of today, is passed over: the clock was wrong then.
    /// Behind everything else stand younger ones only.
    fn drop_expired(&mut self, store: &ParkedStore, now: Instant, now_ms: u64) -> Result<Removed, ParkedError> {
        if self.age_max_ms == 0 || self.age_at.is_some_and(|at| at > now) {
            return Ok(Removed::default());
        }
        let mut ids = Vec::new();
        let mut events = store.events(self.age_from_id);
        let mut is_at_end = false;
        for _ in 0..EVENTS_MAX {
            let Some(found) = events.next_sized()? else {
                is_at_end = true;
                break;
            };
            if let Ok(event) = found.event {
                let parked_at_ms = event.about.parked_at_ms;
                if parked_at_ms.saturating_add(self.age_max_ms) < now_ms {
                    ids.push(found.id);
                } else if parked_at_ms <= now_ms {
                    is_at_end = true;
                    break;
                }
            }
            self.age_from_id = found.id + 1;
        }
        if is_at_end {
            let interval = Duration::from_millis(self.age_max_ms / 10).clamp(AGE_INTERVAL_MIN, AGE_INTERVAL_MAX);
            (self.age_at, self.age_from_id) = (Some(now + interval), 0);
        }
        let removed = store.drop_events(&ids, ParkedDropReason::ParkedExpired);
        if removed.is_err() {
            (self.age_at, self.age_from_id) = (None, 0);
        }
        removed
    }

    fn report(&mut self, dropped: Removed, reason: ParkedDropReason, now: Instant) {
        self.unlogged += dropped.events;
        if dropped.events > 0 && self.log_limit.admit(now).is_some() {
            let (events, reason) = (std::mem::take(&mut self.unlogged), reason.as_str());
            warn!(events, reason, "parked events dropped, as the configuration says");
        }
    }
}
