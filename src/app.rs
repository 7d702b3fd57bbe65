//! Wires the stages together, starts them, and drains them in order.
//!
//! Start: bind every port → serve the admin endpoints → open the log → start the forwarder → serve → ready.
//! Stop: accept no more → finish what was admitted → flush the producer, up to a deadline → save the cursor, close the log.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;

use crate::admin::control::ControlSocket;
use crate::admin::{self, Admin, Backlog, BatchLine, Connections, Limits, ParkedReasons, Phase, Reload, StatusSource};
use crate::batch::now_ms;
use crate::config::{Changes, Config, ConfigError, FileTexts};
use crate::forward::{ForwardError, Forwarder, ParkedError, ParkedStore, Requeue, Topics};
use crate::ingest::{Ingest, Protocol, serve_grpc, serve_http};
use crate::inherited::{self, Inherited, Listening};
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
    addresses: Addresses,
    endpoints: Admin,
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
    /// Empty while the log is being opened.
    opened: OnceLock<Opened>,
    /// There are brokers.
    forwards: bool,
    /// As it was at the start.
    began: Config,
    /// The file that it was read from; none if there was none.
    file: Option<PathBuf>,
    running: Mutex<Running>,
}

/// What there is once the log is open.
struct Opened {
    wal: Wal,
    ingest: Arc<Ingest>,
    forwarder: Forwarder,
}

/// What a reload changes.
struct Running {
    config: Config,
    topics: Topics,
    reload: Option<Reload>,
}

/// Gives a running service another configuration.
#[derive(Clone)]
pub struct Reloader(Arc<Stages>);

impl App {
    /// Binds the ports, opens the log, starts the forwarder. Clients that connect wait until [`App::run`].
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub async fn start(config: Config) -> Result<App, StartError> {
        App::start_on(config, None, Inherited::default()).await
    }

    /// The same, with a configuration that was read from `file`, if any, and on sockets that systemd holds, as far as they
    /// are those of the configuration. The others are handed to it.
    ///
    /// # Errors
    /// As [`App::start`].
    pub async fn start_on(config: Config, file: Option<PathBuf>, mut inherited: Inherited) -> Result<App, StartError> {
        let http = listen("ingest.http.listen", config.ingest.http.listen, &mut inherited)?;
        let grpc = listen("ingest.grpc.listen", config.ingest.grpc.listen, &mut inherited)?;
        let admin = listen("admin.listen", config.admin.listen, &mut inherited)?;
        inherited.discard();
        inherited::keep([&http, &grpc, &admin]);
        let http = tokio_listener("ingest.http.listen", config.ingest.http.listen, http)?;
        let grpc = tokio_listener("ingest.grpc.listen", config.ingest.grpc.listen, grpc)?;
        let admin = tokio_listener("admin.listen", config.admin.listen, admin)?;
        let local = |listener: &TcpListener| listener.local_addr().expect("a bound socket has an address");
        let addresses = Addresses { http: local(&http), grpc: local(&grpc), admin: local(&admin) };
        tracing::info!(http = %addresses.http, grpc = %addresses.grpc, admin = %addresses.admin, "listening");

        let metrics = Metrics::new();
        let phase = AtomicU8::new(Phase::Starting as u8);
        let forwards = !config.forward.brokers.is_empty();
        metrics.forward.enabled.set(f64::from(u8::from(forwards)));
        let topics = Topics::new(&config.forward.topic);
        let running = Mutex::new(Running { config: config.clone(), topics, reload: None });
        let opened = OnceLock::new();
        let stages = Arc::new(Stages { phase, opened, forwards, began: config, file, running });

        let stopped = CancellationToken::new();
        let unless_started = stopped.clone().drop_guard();
        let endpoints = Admin::new(stages.clone(), metrics.clone(), shutdown::progress_patience());
        tokio::spawn(admin::serve(admin, admin::router(endpoints.clone()), stopped.clone()));

        let (wal, forwarder) = shutdown::while_opening(open(&stages.began, &metrics)).await?;
        let control = ControlSocket::bind(&stages.began.wal.directory).map_err(StartError::Control)?;
        let ingest = Ingest::new(&stages.began.ingest, wal.clone(), metrics);
        let opened = Opened { wal, ingest: ingest.clone(), forwarder };
        assert!(stages.opened.set(opened).is_ok(), "the log is opened once");
        tokio::spawn(admin::run_upkeep(endpoints.clone(), stopped.clone()));
        tokio::spawn(report("control socket", control.serve(endpoints.clone(), stopped.clone())));
        let watched = endpoints.clone();
        tokio::spawn(async move { shutdown::feed_watchdog(|| watched.is_live()).await });
        unless_started.disarm();
        Ok(App { addresses, endpoints, stages, ingest, http, grpc, stopped })
    }

    /// Where it listens: tells the ports when the configuration says 0.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The log.
    pub fn wal(&self) -> Wal {
        self.stages.opened().wal.clone()
    }

    /// Gives it another configuration while it runs.
    pub fn reloader(&self) -> Reloader {
        Reloader(self.stages.clone())
    }

    /// Serves until `stop` fires, then drains.
    ///
    /// # Errors
    /// [`RunError`] when the log fails. Then nothing is drained: what was acked is durable, and nothing else can be kept.
    pub async fn run(self, stop: CancellationToken) -> Result<(), RunError> {
        let App { addresses, endpoints, stages, ingest, http, grpc, stopped } = self;
        let stop_ingest = CancellationToken::new();
        let http = tokio::spawn(serve_http(ingest.clone(), http, stop_ingest.clone()));
        let grpc = tokio::spawn(serve_grpc(ingest, grpc, stop_ingest.clone()));
        stages.set_phase(Phase::Serving);
        let Addresses { http: http_address, grpc: grpc_address, admin } = addresses;
        tracing::info!(http = %http_address, grpc = %grpc_address, %admin, "ready");
        shutdown::notify_ready(&endpoints.summary());

        tokio::select! {
            () = stop.cancelled() => {}
            error = stages.watch(&endpoints) => return Err(error),
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
            error = stages.watch(&endpoints) => return Err(error),
        }
        let closing = stages.clone();
        let close = tokio::task::spawn_blocking(move || {
            let timeout = closing.running().config.forward.stop_timeout;
            let Opened { wal, forwarder, .. } = closing.opened();
            forwarder.stop(timeout);
            wal.close();
        });
        tokio::select! {
            _ = close => {}
            error = stages.watch(&endpoints) => return Err(error),
        }
        let status = stages.opened().wal.status();
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

    /// For what is done only once the log is open.
    fn opened(&self) -> &Opened {
        self.opened.get().expect("the log is open")
    }

    /// Returns when the process must end.
    async fn watch(&self, endpoints: &Admin) -> RunError {
        let wal = &self.opened().wal;
        let mut ticks = tokio::time::interval(WATCH_INTERVAL);
        loop {
            tokio::select! {
                () = wal.failed().cancelled() => return RunError::LogFailed,
                _ = ticks.tick() => {}
            }
            if Duration::from_millis(wal.status().commit_busy_ms) > COMMIT_TIME_MAX {
                return RunError::CommitHangs;
            }
            if self.phase() == Phase::Serving {
                shutdown::notify_status(&endpoints.summary());
            }
        }
    }

    /// What a reload does to become `new`.
    fn changes(&self, running: &Running, new: &Config) -> Changes {
        running.config.changes(new, &self.began)
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reloader {
    /// Takes over what can change while the service runs, and says what that was and what takes a restart.
    pub fn apply(&self, new: &Config) -> Changes {
        let Reloader(stages) = self;
        let mut running = stages.running();
        let changes = stages.changes(&running, new);
        let config = running.config.reloaded(new, &stages.began);
        stages.opened().ingest.reload(&config.ingest);
        stages.opened().forwarder.reload(&config.forward);
        running.topics = Topics::new(&config.forward.topic);
        running.config = config;
        let Changes { live, restart } = changes.clone();
        running.reload = Some(Reload { at_ms: now_ms(), error: None, changed: live, restart });
        changes
    }

    /// Notes that a configuration was refused, for those who look at the status.
    pub fn refuse(&self, error: String) {
        let mut running = self.0.running();
        let restart = running.reload.take().map_or(Vec::new(), |reload| reload.restart);
        running.reload = Some(Reload { at_ms: now_ms(), error: Some(error), changed: Vec::new(), restart });
    }
}

impl StatusSource for Stages {
    fn phase(&self) -> Phase {
        [Phase::Starting, Phase::Serving, Phase::Stopping][usize::from(self.phase.load(Ordering::Relaxed))]
    }

    fn connections(&self) -> Connections {
        let open = |protocol| self.opened.get().map_or(0, |opened| opened.ingest.connections(protocol));
        let [websocket, rest, grpc] = Protocol::ALL.map(open);
        Connections { websocket, rest, grpc }
    }

    fn limits(&self) -> Limits {
        Limits {
            connections_max: self.running().config.ingest.connections_max as u64,
            free_bytes_min: self.began.wal.free_bytes_min.as_u64(),
        }
    }

    fn reload(&self) -> Option<Reload> {
        self.running().reload.clone()
    }

    fn foretell_reload(&self, files: &FileTexts) -> Result<Changes, ConfigError> {
        if let (Some(file), None) = (&self.file, &files.config) {
            return Err(ConfigError::Read { path: file.clone(), source: std::io::ErrorKind::NotFound.into() });
        }
        let loaded = Config::load_texts(files, std::env::vars_os(), &[])?;
        Ok(self.changes(&self.running(), &loaded.config))
    }

    fn wal(&self) -> Option<WalStatus> {
        self.opened.get().map(|opened| opened.wal.status())
    }

    fn forward(&self) -> serde_json::Value {
        let status = self.opened.get().filter(|_| self.forwards).map(|opened| opened.forwarder.status());
        serde_json::to_value(status).expect("a status has only string keys")
    }

    fn forward_stands_still(&self) -> Duration {
        self.opened.get().map_or(Duration::ZERO, |opened| opened.forwarder.heartbeat_age())
    }

    fn parked_count(&self) -> u64 {
        self.opened.get().map_or(0, |opened| opened.forwarder.parked().count())
    }

    fn parked_lost(&self) -> u64 {
        self.opened.get().map_or(0, |opened| opened.forwarder.parked().lost())
    }

    fn parked(&self) -> ParkedStore {
        self.opened().forwarder.parked().clone()
    }

    fn requeue(&self) -> Box<dyn Requeue> {
        Box::new(self.opened().forwarder.requeuer())
    }

    fn parked_reasons(&self, from_id: u64) -> ParkedReasons {
        // One that is damaged is held all the same. A store that fails ends them.
        Box::new(self.opened().forwarder.parked().events(from_id).filter_map(|event| match event {
            Ok(event) => Some((event.id, event.about.reason.as_str())),
            Err(ParkedError::Damaged { id, .. }) => Some((id, "damaged")),
            Err(_) => None,
        }))
    }

    fn backlog(&self, payloads: bool) -> Backlog {
        let (reader, topics) = (self.opened().wal.peek(), self.running().topics.clone());
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

/// The socket for `address`: one that systemd holds, or a new one.
fn listen(key: &'static str, address: SocketAddr, inherited: &mut Inherited) -> Result<Listening, StartError> {
    if let Some(listening) = inherited.claim(address) {
        return Ok(listening);
    }
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)?.into_std()
    };
    bind().map(Listening::bound).map_err(|source| StartError::Listen { key, address, source })
}

fn tokio_listener(key: &'static str, address: SocketAddr, listening: Listening) -> Result<TcpListener, StartError> {
    TcpListener::from_std(listening.listener).map_err(|source| StartError::Listen { key, address, source })
}

async fn report(what: &'static str, serve: impl Future<Output = std::io::Result<()>>) {
    if let Err(error) = serve.await {
        tracing::error!(%error, "{what} ended");
    }
}
