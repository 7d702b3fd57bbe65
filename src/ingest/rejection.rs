//! Why a batch was refused, and what each protocol answers then: one table.
//!
//! Real clients take only a non-200 for a failure over REST, and panic on a gRPC error status, so a refusal is a non-200
//! over REST and an answer with `STATUS_ERROR` everywhere else; always a `SendEventResponse` that the client can parse.

use std::collections::HashMap;

use http::StatusCode;

use crate::batch::{DecodeError, now_ms};
use crate::proto::{Code, SendEventResponse, Status};
use crate::wal::{AppendError, CommitError};

/// Seconds after which a client may try again, as `Retry-After` says.
pub(super) const RETRY_AFTER_SECONDS: u64 = 1;

/// Why a batch was refused. Also the `reason` label of `ringtail_ingest_rejected_batches_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectReason {
    /// It does not decode.
    BadRequest,
    /// More bytes than `ingest.batch_bytes_max`.
    TooLarge,
    /// More events than `ingest.batch_events_max`.
    TooManyEvents,
    /// It was not finished within `ingest.read_timeout`.
    Slow,
    /// Too many bytes wait for their commit.
    Overloaded,
    /// The log is full.
    Full,
    /// Ringtail is stopping.
    Stopping,
    /// The log failed; the process is about to end.
    LogFailed,
}

impl RejectReason {
    /// Every reason.
    pub const ALL: [RejectReason; 8] = [
        RejectReason::BadRequest,
        RejectReason::TooLarge,
        RejectReason::TooManyEvents,
        RejectReason::Slow,
        RejectReason::Overloaded,
        RejectReason::Full,
        RejectReason::Stopping,
        RejectReason::LogFailed,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            RejectReason::BadRequest => "bad_request",
            RejectReason::TooLarge => "too_large",
            RejectReason::TooManyEvents => "too_many_events",
            RejectReason::Slow => "slow",
            RejectReason::Overloaded => "overloaded",
            RejectReason::Full => "full",
            RejectReason::Stopping => "stopping",
            RejectReason::LogFailed => "log_failed",
        }
    }

    /// The HTTP status and the protocol's own code that go with it.
    pub(super) fn answer(self) -> (StatusCode, Code) {
        match self {
            RejectReason::BadRequest => (StatusCode::BAD_REQUEST, Code::BadRequest),
            RejectReason::TooLarge | RejectReason::TooManyEvents => (StatusCode::PAYLOAD_TOO_LARGE, Code::BadRequest),
            RejectReason::Slow => (StatusCode::REQUEST_TIMEOUT, Code::BadRequest),
            RejectReason::Overloaded | RejectReason::Full | RejectReason::Stopping | RejectReason::LogFailed => {
                (StatusCode::SERVICE_UNAVAILABLE, Code::InternalError)
            }
        }
    }

    /// Whether the same batch may be taken a little later.
    pub(super) fn is_retryable(self) -> bool {
        self.answer().0 == StatusCode::SERVICE_UNAVAILABLE
    }
}

/// A refused batch: nothing of it was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rejection {
    pub reason: RejectReason,
    /// For the client: what is wrong, with the limit.
    pub message: String,
}

impl Rejection {
    pub fn new(reason: RejectReason, message: impl Into<String>) -> Rejection {
        Rejection { reason, message: message.into() }
    }

    pub fn too_large(bytes_max: usize) -> Rejection {
        Rejection::new(RejectReason::TooLarge, format!("the request is larger than the limit of {bytes_max} bytes"))
    }

    pub fn overloaded() -> Rejection {
        Rejection::new(RejectReason::Overloaded, "too many bytes are being read and committed, try again")
    }

    pub fn stopping() -> Rejection {
        Rejection::new(RejectReason::Stopping, "the server is stopping, try again")
    }
}

impl From<DecodeError> for Rejection {
    fn from(error: DecodeError) -> Rejection {
        Rejection::new(RejectReason::BadRequest, error.to_string())
    }
}

impl From<AppendError> for Rejection {
    fn from(error: AppendError) -> Rejection {
        match error {
            AppendError::Full => Rejection::new(RejectReason::Full, "the log is full, try again"),
            AppendError::Overloaded { .. } => Rejection::overloaded(),
            AppendError::Stopping => Rejection::stopping(),
            AppendError::Poisoned => Rejection::new(RejectReason::LogFailed, "the log failed, try again"),
        }
    }
}

impl From<CommitError> for Rejection {
    fn from(error: CommitError) -> Rejection {
        match error {
            CommitError::Full => AppendError::Full.into(),
            CommitError::Poisoned => AppendError::Poisoned.into(),
        }
    }
}

/// The answer to a batch that is durable.
pub(super) fn success(req_guid: &str) -> SendEventResponse {
    answer(Status::Success, Code::Ok, String::new(), Some(req_guid))
}

/// The answer to a refused batch. `req_guid`: as far as it is known; `None` leaves `data` empty.
pub(super) fn refusal(rejection: &Rejection, req_guid: Option<&str>) -> SendEventResponse {
    answer(Status::Error, rejection.reason.answer().1, rejection.message.clone(), req_guid)
}

/// The answer to a connection that is refused.
pub(super) fn connection_refusal(code: Code, reason: &str) -> SendEventResponse {
    answer(Status::Error, code, reason.into(), None)
}

fn answer(status: Status, code: Code, reason: String, req_guid: Option<&str>) -> SendEventResponse {
    let data = req_guid.map(|req_guid| HashMap::from([("req_guid".to_string(), req_guid.to_string())]));
    let sent_time = i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
    SendEventResponse { status: status.into(), code: code.into(), sent_time, reason, data: data.unwrap_or_default() }
}
