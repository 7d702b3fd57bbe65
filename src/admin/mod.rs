//! Admin: what operators and their tools see. Reads only; changes nothing.
//!
//! [`router`] serves metrics, health, status and a small page on `admin.listen`, where it may be scraped but is not
//! authenticated: it shows counts, never payloads. [`control`] serves the same, the parked events and the backlog on a Unix socket in
//! the log's directory, for the owner of the log alone.
//!
//! This stage knows the others only through [`StatusSource`], which [`crate::app`] implements.

pub mod backlog;
pub mod control;
pub mod parked;
mod status;

use std::future::IntoFuture;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::batch::now_ms;
use crate::metrics::Metrics;
use crate::wal::WalStatus;
pub use backlog::{Backlog, BatchLine, EventLine, PeekFilter};
pub use parked::{ParkedEvents, ParkedFilter, ParkedReadError};
pub use status::{Connections, Limits, NotReady, ParkedCount, Phase, Status};

/// How often histograms are folded into their buckets, so that samples do not pile up between scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What the admin endpoints ask the other stages. Called for every request: must not block.
pub trait StatusSource: Send + Sync + 'static {
    /// How far the process is in its life.
    fn phase(&self) -> Phase;

    /// Open client connections.
    fn connections(&self) -> Connections;

    /// What the configuration allows.
    fn limits(&self) -> Limits;

    /// The log; none while it is being opened.
    fn wal(&self) -> Option<WalStatus>;

    /// The forwarder's status as JSON; `null` when it does not run.
    fn forward(&self) -> serde_json::Value;

    /// Whether the forward loop makes progress or legitimately waits.
    fn is_forward_live(&self) -> bool;

    /// Number of parked events.
    fn parked_count(&self) -> u64;

    /// The parked events with ids not below `from_id`, oldest first, each as a JSON object. The iterator may block: it is
    /// used on a thread for that.
    fn parked_events(&self, from_id: u64) -> ParkedEvents;

    /// The pending batches, oldest first. The iterator may block: it is used on a thread for that.
    fn backlog(&self, payloads: bool) -> Backlog;
}

/// What the endpoints need. Clones share it.
#[derive(Clone)]
pub struct Admin {
    source: Arc<dyn StatusSource>,
    metrics: Arc<Metrics>,
    started_at_ms: u64,
}

impl Admin {
    /// The uptime that is shown counts from this call.
    pub fn new(source: Arc<dyn StatusSource>, metrics: Arc<Metrics>) -> Admin {
        Admin { source, metrics, started_at_ms: now_ms() }
    }

    /// Whether the service makes progress: what `/livez` says and systemd's watchdog is to be told.
    pub fn is_live(&self) -> bool {
        status::not_live(&*self.source).is_none()
    }
}

/// The endpoints of `admin.listen`.
pub fn router(admin: Admin) -> Router {
    routes().with_state(admin)
}

fn routes() -> Router<Admin> {
    Router::new()
        .route("/metrics", get(status::metrics))
        .route("/livez", get(status::livez))
        .route("/readyz", get(status::readyz))
        .route("/status", get(status::status))
        .route("/", get(|| page("text/html; charset=utf-8", include_str!("page/index.html"))))
        .route("/page.js", get(|| page("text/javascript; charset=utf-8", include_str!("page/page.js"))))
        .route("/page.css", get(|| page("text/css; charset=utf-8", include_str!("page/page.css"))))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found\n") })
}

/// A file of the status page. The page may run its own script, talk to its own server, and nothing else.
async fn page(content_type: &'static str, body: &'static str) -> Response {
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                          base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, body).into_response()
}

/// Serves `router` until `stop` is cancelled. Cancel it after everything else has stopped: `/readyz` says why until then.
///
/// # Errors
/// The listener fails for good.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) -> io::Result<()> {
    tokio::select! {
        result = axum::serve(listener, router).into_future() => result,
        () = stop.cancelled() => Ok(()),
    }
}

/// Keeps the memory of histograms bounded, until `stop` is cancelled.
pub async fn run_upkeep(metrics: Arc<Metrics>, stop: CancellationToken) {
    let handle = metrics.handle();
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        handle.run_upkeep();
    }
}

#[cfg(test)]
mod tests;
