//! Ingest: one protocol each → [`Batch`](crate::batch::Batch), through the one door, and the answer back.

mod rejection;

pub use rejection::RejectReason;

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
    /// Ringtail is stopping.
    Stopping,
}

impl CloseReason {
    /// Every reason.
    pub const ALL: [CloseReason; 9] = [
        CloseReason::Client,
        CloseReason::Error,
        CloseReason::PongTimeout,
        CloseReason::WriteTimeout,
        CloseReason::ReadTimeout,
        CloseReason::DuplicateId,
        CloseReason::ConnectionLimit,
        CloseReason::Protocol,
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
            CloseReason::Stopping => "stopping",
        }
    }
}
