//! Admin: what operators and their tools see. Changes nothing, but for the parked events, which the operator may drop.
//!
//! [`router`] serves metrics, health, status and a small page on `admin.listen`, where it may be scraped but is not
//! authenticated: it shows counts, never payloads. [`control`] serves the same, the parked events and the backlog on a Unix socket in
//! the log's directory, for the owner of the log alone.
//!
//! This stage knows the others only through [`StatusSource`], which [`crate::app`] implements.

pub mod backlog;
pub mod control;
mod page;
pub mod parked;
mod status;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::accept::accept;
use crate::batch::now_ms;
use crate::config::{Changes, ConfigError, FileTexts};
use crate::forward::{ParkedStore, Requeue};
use crate::metrics::Metrics;
use crate::wal::WalStatus;
pub use backlog::{Backlog, BatchLine, EventLine, PeekFilter};
pub use parked::{
    ParkedCommand, ParkedDrop, ParkedLine, ParkedList, ParkedProgress, ParkedReasons, ParkedRequeue, ParkedSummary,
};
pub use status::{Connections, Forecast, Limits, NotReady, ParkedCount, Phase, Reload, Status};
use watch::Watch;

/// How often the stages are looked at, and histograms are folded into their buckets, so that samples do not pile up between
/// scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Connections to `admin.listen` at a time; more wait.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take in all, the answer included.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// What the admin endpoints ask the other stages. Called for every request: must not block.
pub trait StatusSource: Send + Sync + 'static {
    /// How far the process is in its life.
    fn phase(&self) -> Phase;

    /// Open client connections.
    fn connections(&self) -> Connections;

    /// What the configuration allows.
    fn limits(&self) -> Limits;

    /// What became of the last reload; none if there was none.
    fn reload(&self) -> Option<Reload> {
        None
    }

    /// What a reload would do, were these the files of the configuration. It may block for a moment: it reads credentials.
    ///
    /// # Errors
    /// The reload would be refused.
    fn foretell_reload(&self, files: &FileTexts) -> Result<Changes, ConfigError>;

    /// The log; none while it is being opened.
    fn wal(&self) -> Option<WalStatus>;

    /// The forwarder's status as JSON; `null` when it does not run.
    fn forward(&self) -> serde_json::Value;

    /// For how long the forward loop has not turned. One that legitimately waits turns every second.
    fn forward_stands_still(&self) -> Duration;

    /// Number of parked events.
    fn parked_count(&self) -> u64;

    /// Number of those that were missing at the start.
    fn parked_lost(&self) -> u64;

    /// The store of parked events. It may block: it is used on a thread for that.
    fn parked(&self) -> ParkedStore;
    /// Takes parked events back into the backlog.
    fn requeue(&self) -> Box<dyn Requeue>;

    /// Ids and reasons of the same. The iterator may block.
    fn parked_reasons(&self, from_id: u64) -> ParkedReasons;

    /// The pending batches, oldest first. The iterator may block: it is used on a thread for that.
    fn backlog(&self, payloads: bool) -> Backlog;
}

/// What the endpoints need. Clones share it.
#[derive(Clone)]
pub struct Admin {
    source: Arc<dyn StatusSource>,
    metrics: Arc<Metrics>,
    watch: Arc<Watch>,
    started_at_ms: u64,
    /// How long a loop may stand still.
    patience: Duration,
}

impl Admin {
    /// The uptime that is shown counts from this call. A commit that takes longer than `patience`, or a forward loop that does
    /// not turn for so long, makes the service not live.
    pub fn new(source: Arc<dyn StatusSource>, metrics: Arc<Metrics>, patience: Duration) -> Admin {
        Admin { source, metrics, watch: Arc::default(), started_at_ms: now_ms(), patience }
    }

    /// Whether the service makes progress: what `/livez` says and systemd's watchdog is to be told.
    pub fn is_live(&self) -> bool {
        self.not_live().is_none()
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
        .route("/history", get(status::history))
        .route("/", get(page::page))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found\n") })
        .layer(axum::middleware::map_response(page::no_sniffing))
}

/// Serves `router` until `stop` is cancelled, one request a connection. Cancel it after everything else has stopped:
/// `/readyz` says why until then.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connected = |stream, slot| {
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _slot: OwnedSemaphorePermit = slot;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // Who asked and went away, or reads slowly, is not waited for.
            let _ = timeout(CONNECTION_TIMEOUT, connection).await;
        });
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept(&listener, &slots, connected) => {}
    }
}

/// Looks at the stages, and keeps the memory of histograms bounded, until `stop` is cancelled.
pub async fn run_upkeep(admin: Admin, stop: CancellationToken) {
    let handle = admin.metrics.handle();
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut tally: Option<JoinHandle<()>> = None;
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        handle.run_upkeep();
        admin.observe();
        let idle = tally.as_ref().is_none_or(JoinHandle::is_finished);
        if idle && admin.watch.wants_tally(Instant::now(), admin.source.parked_count()) {
            let admin = admin.clone();
            tally = Some(tokio::task::spawn_blocking(move || {
                let source = &admin.source;
                admin.watch.tally(|| source.parked_count(), |from_id| source.parked_reasons(from_id));
            }));
        }
    }
}

#[cfg(test)]
mod tests;
