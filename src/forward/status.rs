//! What the forwarder tells of itself: the connection's state, the estimate until the backlog is gone, the last error.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{info, warn};

use super::lanes::HeldTopic;
use crate::batch::now_ms;
use crate::config::ForwardConfig;
use crate::wal::WalStatus;

/// A first connection that takes longer is reported as lost.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Without a connection for so long by its statistics, and no word of it, the client has lost Kafka. A broker that starts drops
/// connections that it has just taken.
const LOSS_PATIENCE: Duration = Duration::from_millis(1500);

/// Time constant of the backlog's smoothed slope.
const DRAIN_SMOOTHING: Duration = Duration::from_secs(10);

/// The error when the client does not say why.
pub(super) const NO_BROKER: &str = "no broker is connected";

/// What an operator sees of the forwarder.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ForwardStatus {
    /// At least one broker is up.
    pub connected: bool,
    /// Brokers that are up.
    pub brokers: u32,
    /// Since when there is none, milliseconds since the Unix epoch; none while connected.
    pub disconnected_since_ms: Option<u64>,
    /// New events go ahead of a backlog (`forward.live_first`).
    pub live_first: bool,
    /// Events read from the log and neither delivered nor parked.
    pub in_flight_events: u64,
    /// What they count for against `forward.in_flight_bytes_max`.
    pub in_flight_bytes: u64,
    /// Topics that refused an event which is being retried, or stand still.
    pub held_topics: u64,
    /// Some of those topics, longest held first.
    pub held: Vec<HeldTopic>,
    /// Events of such topics that are on disk, out of the log's way.
    pub spilled_events: u64,
    /// Events acked by Kafka since the start.
    pub delivered_events: u64,
    /// Dead letters held now.
    pub parked_events: u64,
    /// Estimate until the backlog is empty; none while it is not shrinking.
    pub drain_seconds: Option<f64>,
    /// The newest failure.
    pub last_error: Option<LastError>,
}

/// The newest failure of the forwarder.
#[derive(Debug, Clone, Serialize)]
pub struct LastError {
    /// What Kafka, its client or the log said.
    pub message: String,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The topic it was about; none when about all.
    pub topic: Option<String>,
}

/// What the forward thread shares with the handle.
pub(super) struct Shared {
    status: Mutex<ForwardStatus>,
    started: Instant,
    beat_ms: AtomicU64,
    stopping: AtomicBool,
    stop_by: Mutex<Option<Instant>>,
    reload: Mutex<Option<ForwardConfig>>,
}

impl Shared {
    pub(super) fn new() -> Shared {
        let status = ForwardStatus { disconnected_since_ms: Some(now_ms()), ..ForwardStatus::default() };
        Shared {
            status: Mutex::new(status),
            started: Instant::now(),
            beat_ms: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            stop_by: Mutex::new(None),
            reload: Mutex::new(None),
        }
    }

    /// The status, to read or to change.
    pub(super) fn status(&self) -> MutexGuard<'_, ForwardStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop made a turn.
    pub(super) fn beat(&self, now: Instant) {
        let ms = now.saturating_duration_since(self.started).as_millis();
        self.beat_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long ago that was.
    pub(super) fn beat_age(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.beat_ms.load(Ordering::Relaxed)))
    }

    /// Asks the loop to end by `deadline`.
    pub(super) fn stop(&self, deadline: Instant) {
        *self.stop_by.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        self.stopping.store(true, Ordering::Release);
    }

    /// When the loop has to end, if it has to.
    pub(super) fn stop_by(&self) -> Option<Instant> {
        if !self.stopping.load(Ordering::Acquire) {
            return None;
        }
        *self.stop_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the loop to take over what it can of a configuration.
    pub(super) fn reload(&self, config: ForwardConfig) {
        *self.reload.lock().unwrap_or_else(PoisonError::into_inner) = Some(config);
    }

    /// What it is asked to take over.
    pub(super) fn take_reload(&self) -> Option<ForwardConfig> {
        self.reload.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Remembers a failure.
    pub(super) fn set_last_error(&self, message: String, topic: Option<&str>) {
        let topic = topic.map(str::to_owned);
        self.status().last_error = Some(LastError { message, at_ms: now_ms(), topic });
    }
}

/// Whether a broker is up, with one log line for each change.
#[derive(Debug)]
pub(super) struct Connection {
    /// None before the first connection is made or given up.
    up: Option<bool>,
    since: Instant,
    /// Since when the statistics show no broker that is up, while `up` still says so.
    none_since: Option<Instant>,
}

impl Connection {
    pub(super) fn new(now: Instant) -> Connection {
        Connection { up: None, since: now, none_since: None }
    }

    /// Whether a broker is up.
    pub(super) fn is_up(&self) -> bool {
        self.up == Some(true)
    }

    /// Since when a broker is up; none while there is none.
    pub(super) fn up_since(&self) -> Option<Instant> {
        self.is_up().then_some(self.since)
    }

    /// Takes in what the client reports: how many brokers are up, or that all are down. True when that is a change.
    pub(super) fn observe(
        &mut self,
        brokers_up: Option<u32>,
        all_down: bool,
        error: &str,
        now: Instant,
        backlog: impl FnOnce() -> WalStatus,
    ) -> bool {
        let waited = now.saturating_duration_since(self.since);
        match brokers_up {
            Some(0) if self.is_up() && !all_down => {
                let since = *self.none_since.get_or_insert(now);
                if now.saturating_duration_since(since) < LOSS_PATIENCE {
                    return false;
                }
            }
            Some(_) => self.none_since = None,
            None => {}
        }
        let up = match (brokers_up, self.up) {
            (Some(brokers), _) if brokers > 0 => true,
            (Some(_), None) if !all_down && waited < CONNECT_PATIENCE => return false,
            (Some(_), _) => false,
            (None, _) if all_down => false,
            (None, _) => return false,
        };
        if self.up == Some(up) {
            return false;
        }
        let pending_events = backlog().pending_events;
        match (self.up, up) {
            (_, false) => {
                let error = if error.is_empty() { NO_BROKER } else { error };
                warn!(error, pending_events, "kafka lost");
            }
            (None, true) => info!(pending_events, "kafka connected"),
            (Some(_), true) => info!(outage_seconds = waited.as_secs_f64(), pending_events, "kafka back"),
        }
        (self.up, self.since, self.none_since) = (Some(up), now, None);
        true
    }
}

/// Estimates when the backlog will be gone, from its smoothed slope.
#[derive(Debug, Default)]
pub(super) struct Drain {
    last: Option<(Instant, u64)>,
    trend: Option<Trend>,
}

#[derive(Debug, Clone, Copy)]
struct Trend {
    /// When it turned.
    began: Instant,
    /// Events a second by which the backlog shrinks; negative while it grows.
    rate: f64,
}

impl Drain {
    /// Takes in the backlog, every second or so. Seconds until it is empty; none while it is not shrinking.
    pub(super) fn observe(&mut self, pending_events: u64, now: Instant) -> Option<f64> {
        if let Some((at, before)) = self.last.replace((now, pending_events)) {
            let elapsed = now.saturating_duration_since(at).as_secs_f64();
            if elapsed > 0.0 {
                let rate = (before as f64 - pending_events as f64) / elapsed;
                // How it grew in an outage says nothing of how it drains afterwards.
                let trend = self.trend.filter(|trend| trend.rate > 0.0 || rate <= 0.0);
                let mut trend = trend.unwrap_or(Trend { began: at, rate });
                // The mean, until there is enough for a moving one.
                let age = now.saturating_duration_since(trend.began).as_secs_f64();
                let weight = (1.0 - (-elapsed / DRAIN_SMOOTHING.as_secs_f64()).exp()).max(elapsed / age);
                trend.rate += weight * (rate - trend.rate);
                self.trend = Some(trend);
            }
        }
        if pending_events == 0 {
            return Some(0.0);
        }
        self.trend.filter(|trend| trend.rate > 0.0).map(|trend| pending_events as f64 / trend.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_of_the_connection_is_reported_once() {
        let start = Instant::now();
        let mut connection = Connection::new(start);
        let mut observe = |brokers, all_down, seconds| {
            let now = start + Duration::from_secs(seconds);
            let changed = connection.observe(brokers, all_down, "refused", now, WalStatus::default);
            (changed, connection.is_up())
        };
        assert_eq!(observe(None, false, 0), (false, false));
        assert_eq!(observe(Some(0), false, 1), (false, false));
        assert_eq!(observe(Some(2), false, 2), (true, true));
        assert_eq!(observe(Some(1), false, 3), (false, true));
        assert_eq!(observe(None, true, 4), (true, false));
        assert_eq!(observe(Some(0), true, 5), (false, false));
        assert_eq!(observe(Some(1), false, 6), (true, true));
        assert_eq!(observe(Some(0), false, 7), (false, true));
        assert_eq!(observe(Some(1), false, 8), (false, true));
        assert_eq!(observe(Some(0), false, 9), (false, true));
        assert_eq!(observe(None, false, 10), (false, true));
        assert_eq!(observe(Some(0), false, 11), (true, false));
    }

    #[test]
    fn a_broker_that_is_never_there_is_lost_after_a_while() {
        let start = Instant::now();
        let mut connection = Connection::new(start);
        assert!(!connection.observe(Some(0), false, "", start + CONNECT_PATIENCE / 2, WalStatus::default));
        assert!(connection.observe(Some(0), false, "", start + CONNECT_PATIENCE, WalStatus::default));
    }

    #[test]
    fn the_drain_is_estimated_from_the_slope() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut drain = Drain::default();
        assert_eq!(drain.observe(0, at(0)), Some(0.0));
        assert_eq!(drain.observe(1000, at(1)), None);
        let mut drain = Drain::default();
        assert_eq!(drain.observe(1000, at(0)), None);
        assert_eq!(drain.observe(900, at(1)), Some(9.0));
        assert_eq!(drain.observe(800, at(2)), Some(8.0));
        assert_eq!(drain.observe(0, at(3)), Some(0.0));

        // Ten minutes of an outage, and then 1,000 a second; in the first of them, only for a part of it.
        let mut drain = Drain::default();
        for second in 1..600 {
            assert_eq!(drain.observe(second * 500, at(second)), None);
        }
        let left = |second: u64| 299_500 - 400 - (second - 600) * 1000;
        let estimates: Vec<f64> = (600..800)
            .map(|second| drain.observe(left(second), at(second)).unwrap() / (left(second) as f64 / 1e3))
            .collect();
        assert!(estimates[4..].iter().all(|ratio| (0.8..1.2).contains(ratio)), "{estimates:?}");
    }
}
