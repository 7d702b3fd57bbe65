//! The load generator behind `ringtail bench`.
//!
//! It shares a small machine with the server that it measures, so it must cost little. Over WebSocket it speaks raw
//! frames: a connection's request is encoded once, with an incompressible payload, and only the fixed-width `req_guid`
//! is patched for each batch; frames that are due together are one write; answers are scanned, not decoded. Each thread
//! runs its share of the connections on its own single-threaded runtime and keeps its own statistics. REST and gRPC use
//! [`Client`](super::Client), which costs more.
//!
//! **Closed loop** (no rate): each connection keeps `window` batches in flight, and latency runs from the write.
//! **Open loop** (a rate): batches are due on a fixed schedule, and latency runs from when a batch was *due*, so that a
//! stalled server is charged for the batches that it kept from being sent ("coordinated omission"). Timers tick in
//! milliseconds: at low rates up to 1 ms of that latency is the generator's.
//! **Idle**: connections are opened, optionally send one batch each, and are held open.
//!
//! A refused batch is counted and not sent again: the next one goes out in its place. A connection that is lost is
//! counted and not opened again.

mod client;
mod frame;
mod idle;
mod schedule;
mod stats;
mod websocket;

use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::LocalSet;

pub use stats::{BenchReport, LatencyReport};

use super::{ClientError, ClientOptions, Endpoint, EndpointProtocol};
use schedule::Schedule;
use stats::{SharedStats, Stats};

/// Connections of one thread that are being opened at once.
const OPENING_MAX: usize = 64;

/// Largest `window`: the slot is four hexadecimal digits of a guid.
pub const WINDOW_MAX: usize = 65_536;

/// What load to make.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Where to.
    pub endpoint: Endpoint,
    /// Ids are this, `-`, and a number. Several generators against one server need different ones.
    pub id_prefix: String,
    /// Name of the header that carries the id.
    pub id_header: String,
    /// Connections, at least 1.
    pub connections: usize,
    /// Batches in flight on each connection, 1 to [`WINDOW_MAX`]. REST opens as many sockets for each.
    pub window: usize,
    /// Events per second over all connections; `None`: as fast as they are acked.
    pub rate: Option<f64>,
    /// Events in a batch.
    pub events_per_batch: usize,
    /// Bytes of each event's payload, random.
    pub event_bytes: usize,
    /// Event types, `bench-0` and so on, in turn; at least 1.
    pub types: usize,
    /// How long is measured.
    pub duration: Duration,
    /// How long load is made before that.
    pub warmup: Duration,
    /// Threads, at least 1.
    pub threads: usize,
    /// How long connecting, and at the end the last answers, may take.
    pub answer_timeout: Duration,
    /// Only hold the connections open.
    pub idle: Option<IdleOptions>,
}

/// What idle connections do.
#[derive(Debug, Clone, Default)]
pub struct IdleOptions {
    /// Send one batch with one event of so many bytes after connecting, and wait for its ack.
    pub message_bytes: Option<usize>,
}

impl BenchOptions {
    /// The defaults of `ringtail bench`, against `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        BenchOptions {
            endpoint,
            id_prefix: format!("bench-{:08x}", rand::random::<u32>()),
            id_header: "X-User-ID".into(),
            connections: 100,
            window: 4,
            rate: None,
            events_per_batch: 20,
            event_bytes: 200,
            types: 1,
            duration: Duration::from_secs(10),
            warmup: Duration::from_secs(2),
            threads: 1,
            answer_timeout: Duration::from_secs(10),
            idle: None,
        }
    }

    fn check(&self) -> Result<(), BenchError> {
        let invalid = |option, limit| Err(BenchError::InvalidOption { option, limit });
        match self {
            _ if self.connections == 0 => invalid("connections", "at least 1"),
            _ if !(1..=WINDOW_MAX).contains(&self.window) => invalid("window", "1 to 65536"),
            _ if self.types == 0 => invalid("types", "at least 1"),
            _ if self.threads == 0 => invalid("threads", "at least 1"),
            _ if self.rate.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) => invalid("rate", "above 0"),
            _ if self.rate.is_some() && self.events_per_batch == 0 => {
                invalid("events", "at least 1 when a rate is given")
            }
            _ if self.idle.is_some() && self.endpoint.protocol != EndpointProtocol::WebSocket => {
                invalid("idle", "over WebSocket")
            }
            _ if self.client(0).check().is_err() => invalid("id prefix and id header", "fit for a header"),
            _ => Ok(()),
        }
    }

    fn client(&self, connection: usize) -> ClientOptions {
        let id = format!("{}-{connection}", self.id_prefix);
        ClientOptions {
            id_header: self.id_header.clone(),
            connect_timeout: self.answer_timeout,
            answer_timeout: self.answer_timeout,
            ..ClientOptions::new(self.endpoint.clone(), id)
        }
    }
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// An option is out of its limits.
    #[error("{option}: must be {limit}")]
    InvalidOption {
        /// Its name.
        option: &'static str,
        /// What it may be.
        limit: &'static str,
    },
    /// Not one connection could be opened.
    #[error("none of {connections} connections could be opened")]
    NoConnection {
        /// How many were tried.
        connections: usize,
        /// Why the first failed.
        #[source]
        source: ClientError,
    },
    /// A thread of the generator could not be started or failed.
    #[error("start load thread")]
    Thread {
        /// Why, if the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Makes load as told and reports what came of it. Takes warm-up and duration, plus the time to connect and to collect
/// the last answers.
///
/// # Errors
/// [`BenchError`] if an option is out of its limits or no connection could be opened. Connections that fail later, and
/// batches that are refused, are in the report.
pub async fn run(options: BenchOptions) -> Result<BenchReport, BenchError> {
    options.check()?;
    let (opened, mut opening) = mpsc::unbounded_channel();
    let (start, schedule) = watch::channel(None);
    let mut threads = Vec::new();
    for thread in 0..options.threads {
        let (finished, result) = oneshot::channel();
        let share = Share { options: options.clone(), thread, opened: opened.clone(), schedule: schedule.clone() };
        std::thread::Builder::new()
            .name(format!("bench-{thread}"))
            // Fails only if this run was abandoned.
            .spawn(move || drop(finished.send(share.run())))
            .map_err(|source| BenchError::Thread { source })?;
        threads.push(result);
    }
    drop((opened, schedule));

    let mut connected = 0;
    let mut first_error = None;
    for _ in 0..options.connections {
        match opening.recv().await {
            Some(Ok(())) => connected += 1,
            Some(Err(error)) => first_error = first_error.or(Some(error)),
            None => break,
        }
    }
    if let (0, Some(source)) = (connected, first_error) {
        return Err(BenchError::NoConnection { connections: options.connections, source });
    }
    let schedule = Schedule::starting_at(Instant::now(), &options);
    start.send_replace(Some(schedule));

    let mut total = Stats::new(schedule);
    for thread in threads {
        let stats = thread.await.unwrap_or_else(|_| Err(std::io::Error::other("load thread panicked")));
        total.add(&stats.map_err(|source| BenchError::Thread { source })?);
    }
    Ok(total.report(&options, connected))
}

/// One thread's part of the load.
struct Share {
    options: BenchOptions,
    thread: usize,
    opened: mpsc::UnboundedSender<Result<(), ClientError>>,
    schedule: watch::Receiver<Option<Schedule>>,
}

impl Share {
    fn run(self) -> std::io::Result<Stats> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let tasks = LocalSet::new();
        let stats = SharedStats::default();
        let opening = Rc::new(Semaphore::new(OPENING_MAX));
        for number in (self.thread..self.options.connections).step_by(self.options.threads) {
            let connection = Connection {
                options: self.options.clone(),
                number,
                opening: opening.clone(),
                opened: self.opened.clone(),
                schedule: self.schedule.clone(),
                stats: stats.clone(),
            };
            tasks.spawn_local(connection.run());
        }
        drop((self.opened, self.schedule));
        runtime.block_on(tasks);
        Ok(stats.take())
    }
}

/// What one connection's task needs.
struct Connection {
    options: BenchOptions,
    number: usize,
    opening: Rc<Semaphore>,
    opened: mpsc::UnboundedSender<Result<(), ClientError>>,
    schedule: watch::Receiver<Option<Schedule>>,
    stats: SharedStats,
}

impl Connection {
    async fn run(self) {
        match (self.options.endpoint.protocol, &self.options.idle) {
            (EndpointProtocol::WebSocket, Some(idle)) => idle::run(&self, idle).await,
            (EndpointProtocol::WebSocket, None) => websocket::run(&self).await,
            // Boxed, or every WebSocket connection's task would be as large as this one.
            (EndpointProtocol::Rest | EndpointProtocol::Grpc, _) => Box::pin(client::run(&self)).await,
        }
    }

    /// Opens the connection, when its turn has come, and reports how that went.
    async fn open<T>(&self, open: impl Future<Output = Result<T, ClientError>>) -> Option<T> {
        let _turn = self.opening.acquire().await.expect("the semaphore is never closed");
        let opened = tokio::time::timeout(self.options.answer_timeout, open).await;
        let opened = opened.unwrap_or_else(|elapsed| Err(ClientError::connect(&self.options.endpoint, elapsed)));
        let (outcome, connection) = match opened {
            Ok(connection) => (Ok(()), Some(connection)),
            Err(error) => {
                self.stats.borrow_mut().record_error(&error);
                (Err(error), None)
            }
        };
        // Nobody listens any more once the run has been abandoned.
        let _ = self.opened.send(outcome);
        connection
    }

    /// Waits until every connection is open; `None` if the run was abandoned.
    async fn schedule(&self) -> Option<Schedule> {
        let mut schedule = self.schedule.clone();
        let schedule = schedule.wait_for(Option::is_some).await.ok().and_then(|schedule| *schedule)?;
        self.stats.borrow_mut().start(schedule);
        Some(schedule)
    }
}
