//! `/metrics`, `/livez`, `/readyz`, `/status` and `/history`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::Admin;
use super::watch::{Observation, Rates, Sample, SeenError};
use crate::batch::now_ms;
use crate::metrics::{Totals, WalMetrics};
use crate::wal::WalStatus;

/// How far the process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Opens the log, binds its ports.
    Starting,
    /// Takes batches.
    Serving,
    /// Drains.
    Stopping,
}

/// Why batches are not accepted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotReady {
    /// The service is starting.
    Starting,
    /// The service is stopping.
    Stopping,
    /// The log is full.
    Full,
    /// The log failed; the process is about to end.
    Poisoned,
}

impl NotReady {
    /// The reason in one word, as in `/readyz`.
    pub fn as_str(self) -> &'static str {
        match self {
            NotReady::Starting => "starting",
            NotReady::Stopping => "stopping",
            NotReady::Full => "full",
            NotReady::Poisoned => "poisoned",
        }
    }
}

/// Open client connections, by protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Upgraded WebSocket connections.
    pub websocket: u64,
    /// REST connections.
    pub rest: u64,
    /// gRPC connections.
    pub grpc: u64,
}

/// What the configuration allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `ingest.connections_max`
    pub connections_max: u64,
    /// `wal.free_bytes_min`
    pub free_bytes_min: u64,
}

impl Limits {
    /// Disk that the log may still take before it is full. What prepared segments have reserved counts as taken.
    pub fn headroom_bytes(&self, wal: &WalStatus) -> u64 {
        let of_budget = wal.disk_limit_bytes.saturating_sub(wal.disk_bytes);
        of_budget.min(wal.free_bytes.saturating_sub(self.free_bytes_min))
    }

    /// Disk that a backlog may take, the present one included. It shrinks when parked events grow, or others on the file
    /// system do, and not by the steps in which segments are made.
    pub fn capacity_bytes(&self, wal: &WalStatus) -> u64 {
        let of_file_system = (wal.free_bytes + wal.disk_bytes).saturating_sub(self.free_bytes_min);
        wal.disk_limit_bytes.min(of_file_system).saturating_sub(wal.other_bytes)
    }
}

/// The answer of `/status`.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Version of Ringtail.
    pub version: &'static str,
    /// The host's name.
    pub host: String,
    /// The clock of this answer, milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// When the process began, milliseconds since the Unix epoch.
    pub started_at_ms: u64,
    /// Seconds since then.
    pub uptime_seconds: u64,
    /// How far the process is in its life.
    pub phase: Phase,
    /// Whether batches are accepted.
    pub ready: bool,
    /// Why not.
    pub not_ready_reason: Option<NotReady>,
    /// Whether the loops make progress.
    pub live: bool,
    /// Open client connections.
    pub connections: Connections,
    /// What the configuration allows.
    pub limits: Limits,
    /// What became of the last reload; none if there was none.
    pub reload: Option<Reload>,
    /// The log; none while it is being opened.
    pub wal: Option<WalStatus>,
    /// The forwarder, last error included; `null` when it does not run.
    pub forward: serde_json::Value,
    /// The dead letters.
    pub parked: ParkedCount,
    /// What happened a second, over the last five.
    pub(super) rates: Rates,
    /// Sums since the start.
    pub totals: Totals,
    /// Where it leads if it goes on.
    pub forecast: Forecast,
    /// The last errors of the forwarder, newest first, each once.
    pub(super) errors: Vec<SeenError>,
    /// The last seconds, oldest first; more in `/history`.
    pub(super) recent: Vec<Sample>,
}

/// What became of a reload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Why the configuration was refused; nothing changed then.
    pub error: Option<String>,
    /// Keys that changed.
    pub changed: Vec<String>,
    /// Keys whose new values take effect at the next start.
    pub restart: Vec<String>,
}

/// The dead letters in `/status`.
#[derive(Debug, Clone, Serialize)]
pub struct ParkedCount {
    /// Events held now.
    pub events: u64,
    /// Events that were missing at the start: lost to damage.
    pub lost_events: u64,
    /// The same by reason, as last counted; none before they were.
    pub by_reason: Option<BTreeMap<&'static str, u64>>,
}

/// Where it leads if it goes on.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Forecast {
    /// Disk that the log may still take before it is full.
    pub headroom_bytes: u64,
    /// Seconds until that is used up, by the backlog, by parked events, or by others on the file system; none while they do
    /// not grow.
    pub full_seconds: Option<f64>,
    /// Seconds until the backlog is empty; none while it does not shrink.
    pub drain_seconds: Option<f64>,
}

impl Admin {
    fn status(&self) -> Status {
        let source = &*self.source;
        let wal = source.wal();
        let reason = not_ready(source.phase(), wal.as_ref());
        let forward = source.forward();
        let headroom_bytes = wal.as_ref().map_or(0, |wal| source.limits().headroom_bytes(wal));
        let drain_seconds = self.watch.drain_seconds();
        // The forwarder's own estimate is slower: within a moment of rest it still knows that the backlog shrinks.
        let shrinks = drain_seconds.is_some() || forward["drain_seconds"].is_number();
        let full_seconds = self.watch.full_seconds(headroom_bytes, !shrinks);
        let forecast = Forecast { headroom_bytes, full_seconds, drain_seconds };
        Status {
            version: env!("CARGO_PKG_VERSION"),
            host: host_name(),
            now_ms: now_ms(),
            started_at_ms: self.started_at_ms,
            uptime_seconds: now_ms().saturating_sub(self.started_at_ms) / 1000,
            phase: source.phase(),
            ready: reason.is_none(),
            not_ready_reason: reason,
            live: self.not_live().is_none(),
            connections: source.connections(),
            limits: source.limits(),
            reload: source.reload(),
            wal,
            forward,
            parked: ParkedCount {
                events: source.parked_count(),
                lost_events: source.parked_lost(),
                by_reason: self.watch.parked_by_reason(),
            },
            rates: self.watch.rates(),
            totals: self.metrics.totals(),
            forecast,
            errors: self.watch.errors(),
            recent: self.watch.recent(),
        }
    }

    /// Which loop makes no progress.
    pub(super) fn not_live(&self) -> Option<&'static str> {
        let wal = self.source.wal().unwrap_or_default();
        if wal.failed {
            Some("the log failed")
        } else if Duration::from_millis(wal.commit_busy_ms) > self.patience {
            Some("a commit makes no progress")
        } else if self.source.forward_stands_still() > self.patience {
            Some("the forward loop makes no progress")
        } else {
            None
        }
    }

    /// One line for `systemctl status`.
    pub fn summary(&self) -> String {
        let (source, rates) = (&*self.source, self.watch.rates());
        let (wal, forward) = (source.wal().unwrap_or_default(), source.forward());
        let state = if wal.full { "log full, refusing batches" } else { "accepting batches" };
        let kafka = match (forward["connected"].as_bool(), forward["disconnected_since_ms"].as_u64()) {
            (None, _) => "not forwarding".into(),
            (Some(true), _) => format!("Kafka up, {:.0} events/s", rates.delivered_events),
            (Some(false), since) => format!("Kafka down for {}", age(since)),
        };
        let backlog = match wal.pending_events {
            0 => "nothing waits".into(),
            events => {
                let bytes = bytesize::ByteSize::b(wal.pending_bytes);
                format!("backlog {events} events, {bytes}, the oldest {}", age(wal.oldest_pending_received_at_ms))
            }
        };
        let ahead = if forward["live_first"] == true { ", new events go ahead" } else { "" };
        let reload = source.reload();
        let refused =
            if reload.as_ref().is_some_and(|reload| reload.error.is_some()) { "; last reload refused" } else { "" };
        let restart = reload.filter(|reload| !reload.restart.is_empty());
        let restart = restart.map_or(String::new(), |reload| format!("; restart for {}", reload.restart.join(", ")));
        format!("{state}, {:.0} events/s; {kafka}; {backlog}{ahead}{refused}{restart}", rates.committed_events)
    }

    /// Takes note of how things are now.
    pub(super) fn observe(&self) {
        // While the log is being opened there is nothing to compare with.
        let Some(wal) = self.source.wal() else { return };
        let observation = Observation {
            at_ms: now_ms(),
            totals: self.metrics.totals(),
            pending_events: wal.pending_events,
            pending_bytes: wal.pending_bytes,
            capacity_bytes: self.source.limits().capacity_bytes(&wal),
            forward: self.source.forward(),
        };
        self.watch.observe(Instant::now(), observation);
    }
}

/// How long ago something was, in seconds and larger.
fn age(since_ms: Option<u64>) -> humantime::FormattedDuration {
    let seconds = since_ms.map_or(0, |since| now_ms().saturating_sub(since) / 1000);
    humantime::format_duration(Duration::from_secs(seconds))
}

fn host_name() -> String {
    let mut name = [0; 256];
    // SAFETY: the buffer is as long as is said.
    let result = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    let end = name.iter().position(|byte| *byte == 0).filter(|_| result == 0).unwrap_or(0);
    String::from_utf8_lossy(&name[..end]).into_owned()
}

pub(super) async fn status(State(admin): State<Admin>) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(admin.status())).into_response()
}

pub(super) async fn history(State(admin): State<Admin>) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(admin.watch.history())).into_response()
}

pub(super) async fn readyz(State(admin): State<Admin>) -> Response {
    match not_ready(admin.source.phase(), admin.source.wal().as_ref()) {
        None => "ready\n".into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", reason.as_str())).into_response(),
    }
}

pub(super) async fn livez(State(admin): State<Admin>) -> Response {
    match admin.not_live() {
        None => "live\n".into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

pub(super) async fn metrics(State(admin): State<Admin>) -> Response {
    let Some(wal) = admin.source.wal() else {
        // Zeroes would be taken for what the log holds.
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response();
    };
    record(&wal, &admin.source.limits(), &admin.metrics.wal);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], admin.metrics.handle().render()).into_response()
}

/// An unreachable Kafka is no reason: the log is there for that.
fn not_ready(phase: Phase, wal: Option<&WalStatus>) -> Option<NotReady> {
    match (phase, wal) {
        (_, Some(wal)) if wal.failed => Some(NotReady::Poisoned),
        (Phase::Stopping, _) => Some(NotReady::Stopping),
        (Phase::Starting, _) | (Phase::Serving, None) => Some(NotReady::Starting),
        (Phase::Serving, Some(wal)) => wal.full.then_some(NotReady::Full),
    }
}

/// Sets the gauges that describe the log's state.
fn record(wal: &WalStatus, limits: &Limits, metrics: &WalMetrics) {
    let oldest_age_ms = wal.oldest_pending_received_at_ms.map_or(0, |received| now_ms().saturating_sub(received));
    metrics.pending_batches.set(wal.pending_batches as f64);
    metrics.pending_events.set(wal.pending_events as f64);
    metrics.pending_bytes.set(wal.pending_bytes as f64);
    metrics.oldest_pending_age.set(oldest_age_ms as f64 / 1000.0);
    metrics.disk_bytes.set(wal.disk_bytes as f64);
    metrics.disk_limit_bytes.set(wal.disk_limit_bytes as f64);
    metrics.free_bytes.set(wal.free_bytes as f64);
    metrics.headroom_bytes.set(limits.headroom_bytes(wal) as f64);
    metrics.capacity_bytes.set(limits.capacity_bytes(wal) as f64);
    metrics.full.set(f64::from(u8::from(wal.full)));
    metrics.segments.set(wal.segments as f64);
    metrics.quarantined_segments.set(wal.quarantined_segments as f64);
    metrics.quarantined_stores.set(wal.quarantined_stores as f64);
}
