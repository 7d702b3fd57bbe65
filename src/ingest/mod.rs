//! Ingest: one protocol each → [`Batch`](crate::batch::Batch), through the one door, and the answer back.
//!
//! `http.rs` (REST, and the upgrade to `websocket.rs` and `session.rs`) and `grpc.rs` speak a protocol each; `json.rs` is
//! the text form of a request. All of them hand batches to `admission.rs`, which checks them and appends them to the log,
//! and answer by the table in `rejection.rs`.
//!
//! # Limits
//! Memory is bounded by bytes, not by requests: `ingest.in_flight_bytes_max`, or one message if that is more, for requests
//! that are being read (`budget.rs`), and the same again for batches that wait for their commit (in the log). Connections are bounded by
//! `ingest.connections_max`.

mod admission;
mod budget;
mod connections;
mod frames;
mod grpc;
mod http;
mod json;
mod limits;
mod listener;
mod rejection;
mod session;
mod stream;
mod websocket;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use rejection::RejectReason;

use crate::config::IngestConfig;
use crate::metrics::Metrics;
use crate::wal::Wal;
use admission::Admission;
use budget::ReadBudget;
use connections::Connections;
use listener::Slots;

/// What every connection shares.
pub struct Ingest {
    config: IngestConfig,
    admission: Admission,
    connections: Connections,
    read_budget: ReadBudget,
    metrics: Arc<Metrics>,
    open: [AtomicU64; 3],
    slots: Mutex<Slots>,
    /// Fires when connections must drain.
    stopping: CancellationToken,
}

impl Ingest {
    /// Hands what comes in to `wal`.
    pub fn new(config: &IngestConfig, wal: Wal, metrics: Arc<Metrics>) -> Arc<Ingest> {
        let stopping = CancellationToken::new();
        metrics.connections_limit.set(config.connections_max as f64);
        Arc::new(Ingest {
            config: config.clone(),
            admission: Admission::new(config, wal, metrics.clone(), stopping.clone()),
            connections: Connections::new(config.connections_max),
            read_budget: ReadBudget::new(config.in_flight_bytes_max.as_u64().max(longest_message(config))),
            metrics,
            open: Default::default(),
            slots: Mutex::new(Slots::new(config)),
            stopping,
        })
    }

    /// Takes over the limits of `config` that can change while batches come in: `ingest.connections_max`, `batch_…_max`,
    /// `connection_in_flight_…_max`. What is open stays open.
    pub fn reload(&self, config: &IngestConfig) {
        self.admission.limits.set(config);
        self.connections.set_limit(config.connections_max);
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).grow(config);
        self.metrics.connections_limit.set(config.connections_max as f64);
    }

    /// Open connections of one protocol.
    pub fn connections(&self, protocol: Protocol) -> u64 {
        self.open[protocol as usize].load(Ordering::Relaxed)
    }

    fn opened(&self, protocol: Protocol) {
        self.open[protocol as usize].fetch_add(1, Ordering::Relaxed);
        let metrics = self.metrics.ingest(protocol);
        metrics.connections.increment(1.0);
        metrics.connections_opened.increment(1);
    }

    fn closed(&self, protocol: Protocol, reason: CloseReason) {
        self.open[protocol as usize].fetch_sub(1, Ordering::Relaxed);
        let metrics = self.metrics.ingest(protocol);
        metrics.connections.decrement(1.0);
        metrics.connections_closed(reason).increment(1);
        tracing::debug!(protocol = protocol.as_str(), reason = reason.as_str(), "connection closed");
    }
}

/// The longest message must fit when nothing else is read, or "try again" would never end: JSON text may be twice the
/// limit of a batch, and its frames have headers.
fn longest_message(config: &IngestConfig) -> u64 {
    config.batch_bytes_max.as_u64().saturating_mul(2).saturating_add(64 * 1024)
}

/// Serves WebSocket and REST until `stop` fires and every connection has drained: batches that were admitted get their
/// answer, new ones are refused as stopping.
pub async fn serve_http(ingest: Arc<Ingest>, listener: TcpListener, stop: CancellationToken) {
    http::serve(ingest, listener, stop).await;
}

/// Serves gRPC until `stop` fires and every connection has drained.
pub async fn serve_grpc(ingest: Arc<Ingest>, listener: TcpListener, stop: CancellationToken) {
    grpc::serve(ingest, listener, stop).await;
}

/// How a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `GET /api/v1/events`, upgraded.
    WebSocket,
    /// `POST /api/v1/events`.
    Rest,
    /// `EventService/SendEvent`.
    Grpc,
}

impl Protocol {
    /// Every protocol, in the order of their discriminants.
    pub const ALL: [Protocol; 3] = [Protocol::WebSocket, Protocol::Rest, Protocol::Grpc];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::WebSocket => "websocket",
            Protocol::Rest => "rest",
            Protocol::Grpc => "grpc",
        }
    }
}

/// Why a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// The client closed it.
    Client,
    /// Its network failed.
    Error,
    /// No pong in time.
    PongTimeout,
    /// It did not take its answers in time.
    WriteTimeout,
    /// It did not finish a request in time.
    ReadTimeout,
    /// The id was already connected.
    DuplicateId,
    /// Too many connections.
    ConnectionLimit,
    /// It sent what the protocol forbids, or more than is allowed.
    Protocol,
    /// There was no memory left for what it was sending.
    Overloaded,
    /// It went on as a WebSocket.
    Upgraded,
    /// Ringtail is stopping.
    Stopping,
}

impl CloseReason {
    /// Every reason.
    pub const ALL: [CloseReason; 11] = [
        CloseReason::Client,
        CloseReason::Error,
        CloseReason::PongTimeout,
        CloseReason::WriteTimeout,
        CloseReason::ReadTimeout,
        CloseReason::DuplicateId,
        CloseReason::ConnectionLimit,
        CloseReason::Protocol,
        CloseReason::Overloaded,
        CloseReason::Upgraded,
        CloseReason::Stopping,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            CloseReason::Client => "client",
            CloseReason::Error => "error",
            CloseReason::PongTimeout => "pong_timeout",
            CloseReason::WriteTimeout => "write_timeout",
            CloseReason::ReadTimeout => "read_timeout",
            CloseReason::DuplicateId => "duplicate_id",
            CloseReason::ConnectionLimit => "connection_limit",
            CloseReason::Protocol => "protocol",
            CloseReason::Overloaded => "overloaded",
            CloseReason::Upgraded => "upgraded",
            CloseReason::Stopping => "stopping",
        }
    }
}
