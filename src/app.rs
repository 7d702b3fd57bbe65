//! Wires the stages together, starts them, and drains them in order.
//!
//! Start: bind every port → open the log → start the forwarder → serve → ready.
//! Stop: accept no more → finish what was admitted → flush the producer, up to a deadline → save the cursor, close the log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;

use crate::admin::control::ControlSocket;
use crate::admin::{self, Admin, Backlog, BatchLine, Connections, Limits, ParkedReasons, Phase, StatusSource};
use crate::config::Config;
use crate::forward::{ForwardError, Forwarder, ParkedError, ParkedStore, Requeue, Topics};
use crate::ingest::{Ingest, Protocol, serve_grpc, serve_http};
use crate::metrics::Metrics;
use crate::shutdown;
use crate::wal::{OpenError, Wal, WalStatus};

/// Connections that may wait to be accepted. The kernel bounds it by `net.core.somaxconn`.
const BACKLOG: u32 = 4096;
/// How often the log is checked for a commit that hangs, and systemd's status line is renewed.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// A commit that takes longer ends the process: a restart may get through, waiting will not.
const COMMIT_TIME_MAX: Duration = Duration::from_secs(30);

/// Where the service listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// WebSocket and REST.
    pub http: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
    /// Metrics, health, status.
    pub admin: SocketAddr,
}

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port cannot be bound.
    #[error("cannot listen on {address} ({key})")]
    Listen {
        /// The configuration's key.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The log cannot be opened.
    #[error(transparent)]
    Wal(#[from] OpenError),
    /// The forwarder cannot be started.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The control socket cannot be bound.
    #[error("cannot bind the control socket")]
    Control(#[source] std::io::Error),
}

/// Why a running service ended by itself. The process must exit non-zero.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A commit failed.
    #[error("the log failed, ending the process: the next start recovers it")]
    LogFailed,
    /// A commit hangs.
    #[error("a commit has made no progress for {} seconds, ending the process", COMMIT_TIME_MAX.as_secs())]
    CommitHangs,
}

/// The service, started: its ports are bound and its log is open.
pub struct App {
    config: Config,
    addresses: Addresses,
    stages: Arc<Stages>,
    ingest: Arc<Ingest>,
    http: TcpListener,
    grpc: TcpListener,
    /// Fires at the very end.
    stopped: CancellationToken,
}

/// What the admin endpoints look at.
struct Stages {
    phase: AtomicU8,
    wal: Wal,
    ingest: Arc<Ingest>,
    forwarder: Forwarder,
    /// There are brokers.
    forwards: bool,
    limits: Limits,
    topics: Topics,
}

impl App {
    /// Binds the ports, opens the log, starts the forwarder. Clients that connect wait until [`App::run`].
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub async fn start(config: Config) -> Result<App, StartError> {
        let http = listen("ingest.http.listen", config.ingest.http.listen)?;
        let grpc = listen("ingest.grpc.listen", config.ingest.grpc.listen)?;
        let admin = listen("admin.listen", config.admin.listen)?;
        let local = |listener: &TcpListener| listener.local_addr().expect("a bound socket has an address");
        let addresses = Addresses { http: local(&http), grpc: local(&grpc), admin: local(&admin) };
        tracing::info!(http = %addresses.http, grpc = %addresses.grpc, admin = %addresses.admin, "listening");

        let metrics = Metrics::new();
        let (wal, forwarder) = open(&config, &metrics).await?;
        let ingest = Ingest::new(&config.ingest, wal.clone(), metrics.clone());
        let phase = AtomicU8::new(Phase::Starting as u8);
        let forwards = !config.forward.brokers.is_empty();
        metrics.forward.enabled.set(f64::from(u8::from(forwards)));
        let limits = Limits {
            connections_max: config.ingest.connections_max as u64,
            free_bytes_min: config.wal.free_bytes_min.as_u64(),
        };
        let topics = Topics::new(&config.forward.topic);
        let stages = Arc::new(Stages { phase, wal, ingest: ingest.clone(), forwarder, forwards, limits, topics });

        let stopped = CancellationToken::new();
        let control = ControlSocket::bind(&config.wal.directory).map_err(StartError::Control)?;
        let endpoints = Admin::new(stages.clone(), metrics);
        tokio::spawn(admin::run_upkeep(endpoints.clone(), stopped.clone()));
        tokio::spawn(report("control socket", control.serve(endpoints.clone(), stopped.clone())));
        let watched = endpoints.clone();
        tokio::spawn(async move { shutdown::feed_watchdog(|| watched.is_live()).await });
        tokio::spawn(report("admin endpoints", admin::serve(admin, admin::router(endpoints), stopped.clone())));
        Ok(App { config, addresses, stages, ingest, http, grpc, stopped })
    }

    /// Where it listens: tells the ports when the configuration says 0.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The log.
    pub fn wal(&self) -> Wal {
        self.stages.wal.clone()
    }

    /// Serves until `stop` fires, then drains.
    ///
    /// # Errors
    /// [`RunError`] when the log fails. Then nothing is drained: what was acked is durable, and nothing else can be kept.
    pub async fn run(self, stop: CancellationToken) -> Result<(), RunError> {
        let App { config, addresses, stages, ingest, http, grpc, stopped } = self;
        let stop_ingest = CancellationToken::new();
        let http = tokio::spawn(serve_http(ingest.clone(), http, stop_ingest.clone()));
        let grpc = tokio::spawn(serve_grpc(ingest, grpc, stop_ingest.clone()));
        stages.set_phase(Phase::Serving);
        let Addresses { http: http_address, grpc: grpc_address, admin } = addresses;
        tracing::info!(http = %http_address, grpc = %grpc_address, %admin, "ready");
        shutdown::notify_ready(&stages.summary());

        tokio::select! {
            () = stop.cancelled() => {}
            error = stages.watch() => return Err(error),
        }
        stages.set_phase(Phase::Stopping);
        shutdown::notify_stopping("finishing what was admitted");
        stop_ingest.cancel();
        let drained = async {
            // A panic in there was reported by its task; the rest still drains.
            let _ = tokio::join!(http, grpc);
        };
        tokio::select! {
            () = drained => {}
            error = stages.watch() => return Err(error),
        }
        let closing = stages.clone();
        let close = tokio::task::spawn_blocking(move || {
            closing.forwarder.stop(config.forward.stop_timeout);
            closing.wal.close();
        });
        tokio::select! {
            _ = close => {}
            error = stages.watch() => return Err(error),
        }
        let status = stages.wal.status();
        tracing::info!(pending_events = status.pending_events, "stopped");
        stopped.cancel();
        Ok(())
    }
}

/// Opens the log and starts the forwarder, on a thread that may block.
async fn open(config: &Config, metrics: &Arc<Metrics>) -> Result<(Wal, Forwarder), StartError> {
    let (config, metrics) = (config.clone(), metrics.clone());
    let open = move || {
        let began = Instant::now();
        let wal = Wal::open(&config.wal, config.ingest.in_flight_bytes_max.as_u64(), metrics.clone())?;
        let status = wal.status();
        let (directory, took) = (config.wal.directory.display(), began.elapsed());
        let (pending_events, pending_bytes) = (status.pending_events, status.pending_bytes);
        tracing::info!(%directory, pending_events, pending_bytes, ?took, "log opened");
        if config.forward.brokers.is_empty() {
            tracing::warn!("forward.brokers is empty: batches are collected and not forwarded");
        }
        let batch_bytes_max = config.ingest.batch_bytes_max.as_u64();
        match Forwarder::start(&config.forward, batch_bytes_max, wal.clone(), metrics) {
            Ok(forwarder) => Ok((wal, forwarder)),
            Err(error) => {
                wal.close();
                Err(error.into())
            }
        }
    };
    tokio::task::spawn_blocking(open).await.expect("opening the log does not panic")
}

impl Stages {
    fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Returns when the process must end.
    async fn watch(&self) -> RunError {
        let mut ticks = tokio::time::interval(WATCH_INTERVAL);
        loop {
            tokio::select! {
                () = self.wal.failed().cancelled() => return RunError::LogFailed,
                _ = ticks.tick() => {}
            }
            if Duration::from_millis(self.wal.status().commit_busy_ms) > COMMIT_TIME_MAX {
                return RunError::CommitHangs;
            }
            if self.phase() == Phase::Serving {
                shutdown::notify_status(&self.summary());
            }
        }
    }

    /// One line for `systemctl status`.
    fn summary(&self) -> String {
        let wal = self.wal.status();
        let kafka = match self.forwarder.status().connected {
            _ if !self.forwards => "not forwarding",
            true => "Kafka up",
            false => "Kafka down",
        };
        let state = if wal.full { "log full, refusing batches" } else { "accepting batches" };
        format!("{state}; {kafka}; backlog {} events, {} bytes", wal.pending_events, wal.pending_bytes)
    }
}

impl StatusSource for Stages {
    fn phase(&self) -> Phase {
        [Phase::Starting, Phase::Serving, Phase::Stopping][usize::from(self.phase.load(Ordering::Relaxed))]
    }

    fn connections(&self) -> Connections {
        let [websocket, rest, grpc] = Protocol::ALL.map(|protocol| self.ingest.connections(protocol));
        Connections { websocket, rest, grpc }
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn wal(&self) -> Option<WalStatus> {
        Some(self.wal.status())
    }

    fn forward(&self) -> serde_json::Value {
        let status = self.forwards.then(|| self.forwarder.status());
        serde_json::to_value(status).expect("a status has only string keys")
    }

    fn is_forward_live(&self) -> bool {
        self.forwarder.is_live()
    }

    fn parked_count(&self) -> u64 {
        self.forwarder.parked().count()
    }

    fn parked(&self) -> ParkedStore {
        self.forwarder.parked().clone()
    }

    fn requeue(&self) -> Box<dyn Requeue> {
        Box::new(self.forwarder.requeuer())
    }

    fn parked_reasons(&self, from_id: u64) -> ParkedReasons {
        // One that is damaged is held all the same. A store that fails ends them.
        Box::new(self.forwarder.parked().events(from_id).filter_map(|event| match event {
            Ok(event) => Some((event.id, event.about.reason.as_str())),
            Err(ParkedError::Damaged { id, .. }) => Some((id, "damaged")),
            Err(_) => None,
        }))
    }

    fn backlog(&self, payloads: bool) -> Backlog {
        let (reader, topics) = (self.wal.peek(), self.topics.clone());
        let mut reader = Some(reader);
        Box::new(std::iter::from_fn(move || match reader.as_mut()?.next_record() {
            Ok(record) => record.map(|record| Ok(BatchLine::new(record.sequence, &record.batch, &topics, payloads))),
            Err(error) => {
                reader = None;
                Some(Err(error.to_string()))
            }
        }))
    }
}

fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|source| StartError::Listen { key, address, source })
}

async fn report(what: &'static str, serve: impl Future<Output = std::io::Result<()>>) {
    if let Err(error) = serve.await {
        tracing::error!(%error, "{what} ended");
    }
}
