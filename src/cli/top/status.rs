//! What `top` knows of `/status` and `/history`. Everything may be missing.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Samples kept: ten minutes, one a second.
const SAMPLES_MAX: usize = 600;

/// What there is to show.
#[derive(Debug, Default)]
pub struct Answer {
    /// Whom it was asked.
    pub authority: String,
    /// The last answer.
    pub status: Option<Status>,
    pub history: History,
    /// Why there is none since.
    pub error: Option<String>,
}

impl Answer {
    pub fn new(authority: &str) -> Answer {
        Answer { authority: authority.to_owned(), ..Answer::default() }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: String,
    pub host: String,
    pub now_ms: u64,
    pub uptime_seconds: u64,
    pub phase: String,
    pub live: bool,
    pub connections: Connections,
    pub limits: Limits,
    pub reload: Option<Reload>,
    pub wal: Option<Log>,
    pub forward: Option<Forward>,
    pub parked: Parked,
    pub rates: Rates,
    pub totals: Totals,
    pub forecast: Forecast,
    pub errors: Vec<SeenError>,
    pub recent: Vec<Sample>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Connections {
    pub websocket: u64,
    pub rest: u64,
    pub grpc: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Limits {
    pub connections_max: u64,
}

/// What became of the last reload.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Reload {
    pub at_ms: u64,
    pub error: Option<String>,
    pub changed: Vec<String>,
    pub restart: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Log {
    pub pending_events: u64,
    pub pending_bytes: u64,
    pub oldest_pending_received_at_ms: Option<u64>,
    pub disk_bytes: u64,
    pub full: bool,
    pub failed: bool,
    pub quarantined_segments: u64,
    pub quarantined_stores: u64,
}

impl Log {
    /// What is set aside: segments, and small databases (the cursor's, or some of the parked events).
    pub fn damaged_parts(&self) -> u64 {
        self.quarantined_segments + self.quarantined_stores
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Forward {
    pub connected: bool,
    pub brokers: u64,
    pub disconnected_since_ms: Option<u64>,
    pub in_flight_events: u64,
    pub held_topics: u64,
    pub live_first: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Parked {
    pub events: u64,
    pub lost_events: u64,
    pub by_reason: Option<BTreeMap<String, u64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Rates {
    pub rejected_batches: f64,
    pub committed_events: f64,
    pub delivered_events: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Totals {
    pub rejected_batches: u64,
    pub delivered_events: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Forecast {
    pub headroom_bytes: u64,
    pub full_seconds: Option<f64>,
    pub drain_seconds: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct SeenError {
    pub message: String,
    pub topic: Option<String>,
    pub at_ms: u64,
    pub count: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct History {
    pub samples: Vec<Sample>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub struct Sample {
    pub at_ms: u64,
    pub committed_events: f64,
    pub delivered_events: f64,
    pub pending_events: u64,
}

impl History {
    /// Adds what is newer than what there is.
    pub fn extend(&mut self, recent: &[Sample]) {
        let newest = self.samples.last().map_or(0, |sample| sample.at_ms);
        self.samples.extend(recent.iter().filter(|sample| sample.at_ms > newest));
        let surplus = self.samples.len().saturating_sub(SAMPLES_MAX);
        self.samples.drain(..surplus);
    }
}

impl Status {
    /// Seconds for which the oldest event has waited; 0 if none waits.
    pub fn waited(&self) -> f64 {
        let oldest = self.wal.as_ref().and_then(|log| log.oldest_pending_received_at_ms);
        oldest.map_or(0.0, |at| self.since(at))
    }

    /// Seconds since something was.
    pub fn since(&self, at_ms: u64) -> f64 {
        self.now_ms.saturating_sub(at_ms) as f64 / 1000.0
    }

    /// A service that has just started is not yet cut off.
    pub fn is_connecting(&self) -> bool {
        self.forward.as_ref().is_some_and(|forward| !forward.connected) && self.uptime_seconds < 6
    }
}
