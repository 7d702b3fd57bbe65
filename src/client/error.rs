//! What can go wrong between a batch and its ack, and whether sending the batch again can help.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::Endpoint;
use crate::proto;

type Cause = Arc<dyn Error + Send + Sync>;

/// Why a batch was not acknowledged. Cloneable, because one lost connection fails every batch in flight on it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// Nobody answered at that address, or not in time.
    #[error("connect to {endpoint}")]
    Connect {
        /// Where to.
        endpoint: String,
        /// Why not.
        #[source]
        source: Cause,
    },
    /// The server closed the WebSocket connection.
    #[error("server closed the connection: {code} {reason}")]
    Closed {
        /// WebSocket close code; 1005 if the server sent none.
        code: u16,
        /// What the server said.
        reason: String,
    },
    /// The connection broke.
    #[error("connection lost")]
    Disconnected {
        /// How; `None` if it just ended.
        #[source]
        source: Option<Cause>,
    },
    /// No answer in time. The batch may have been committed.
    #[error("no answer within {0:?}")]
    AnswerTimeout(Duration),
    /// The server answered that it does not take the batch, or the connection.
    #[error("{0}")]
    Refused(Refusal),
    /// The answer is no `SendEventResponse`.
    #[error("answer is not a SendEventResponse")]
    BadAnswer {
        /// Why not.
        #[source]
        source: Cause,
    },
    /// A WebSocket answer names no request, and several wait for one: the connection is of no more use.
    #[error("server refused one of {outstanding} batches without saying which")]
    Unattributed {
        /// Batches that were in flight.
        outstanding: usize,
    },
    /// WebSocket answers are matched by `req_guid`: it must be given, and differ from those in flight.
    #[error("req_guid {req_guid:?} is empty or already in flight on this connection")]
    ReqGuidNotUnique {
        /// The batch's name.
        req_guid: String,
    },
    /// A header's name or value holds characters that no header can.
    #[error("header {name:?} cannot be sent: its name or value holds forbidden characters")]
    InvalidHeader {
        /// The header's name.
        name: String,
    },
}

impl ClientError {
    /// Whether the same batch, under the same `req_guid`, may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            ClientError::Refused(refusal) => refusal.retryable,
            ClientError::ReqGuidNotUnique { .. } | ClientError::InvalidHeader { .. } => false,
            _ => true,
        }
    }

    /// How long the server asks to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            ClientError::Refused(refusal) => refusal.retry_after,
            _ => None,
        }
    }

    pub(super) fn connect(endpoint: &Endpoint, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        ClientError::Connect { endpoint: endpoint.to_string(), source: Arc::from(source.into()) }
    }

    pub(super) fn disconnected(source: impl Error + Send + Sync + 'static) -> Self {
        ClientError::Disconnected { source: Some(Arc::new(source)) }
    }

    pub(super) fn bad_answer(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        ClientError::BadAnswer { source: Arc::from(source.into()) }
    }
}

/// A server's "no".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status, when it was not 200.
    pub http_status: Option<u16>,
    /// gRPC status code, when it was not OK.
    pub grpc_status: Option<i32>,
    /// Code of the answer; `CODE_UNSPECIFIED` if there was none.
    pub code: proto::Code,
    /// What the server said.
    pub reason: String,
    /// `Retry-After`, if the server sent it in seconds.
    pub retry_after: Option<Duration>,
    /// Whether the same batch may be accepted later.
    pub retryable: bool,
}

impl Refusal {
    /// An answer with `STATUS_ERROR`. Only a bad request is beyond retry: "full", "stopping" and "too many connections"
    /// all pass.
    pub(super) fn from_answer(answer: &proto::SendEventResponse) -> Self {
        Refusal {
            http_status: None,
            grpc_status: None,
            code: answer.code(),
            reason: answer.reason.clone(),
            retry_after: None,
            retryable: answer.code() != proto::Code::BadRequest,
        }
    }

    /// An HTTP status other than 200, with the answer in its body, if any.
    pub(super) fn from_http(status: u16, answer: Option<&proto::SendEventResponse>) -> Self {
        let answer = answer.map(Refusal::from_answer);
        Refusal {
            http_status: Some(status),
            grpc_status: None,
            code: answer.as_ref().map_or(proto::Code::Unspecified, |answer| answer.code),
            reason: answer.map(|answer| answer.reason).unwrap_or_default(),
            retry_after: None,
            retryable: status >= 500 || status == 408 || status == 429,
        }
    }

    /// The frame is larger than the server takes.
    pub(super) fn too_large(reason: String) -> Self {
        Refusal {
            http_status: None,
            grpc_status: None,
            code: proto::Code::BadRequest,
            reason,
            retry_after: None,
            retryable: false,
        }
    }

    /// A gRPC status other than OK.
    pub(super) fn from_grpc(status: &tonic::Status) -> Self {
        use tonic::Code;
        let retryable = matches!(
            status.code(),
            Code::Unavailable
                | Code::Unknown
                | Code::Internal
                | Code::Aborted
                | Code::Cancelled
                | Code::DeadlineExceeded
                | Code::ResourceExhausted
                | Code::DataLoss
        );
        Refusal {
            http_status: None,
            grpc_status: Some(status.code() as i32),
            code: proto::Code::Unspecified,
            reason: status.message().into(),
            retry_after: None,
            retryable,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused")?;
        if let Some(status) = self.http_status {
            write!(f, " with HTTP status {status}")?;
        }
        if let Some(status) = self.grpc_status {
            write!(f, " with gRPC status {}", tonic::Code::from(status))?;
        }
        if self.code != proto::Code::Unspecified {
            write!(f, " with {}", self.code.as_str_name())?;
        }
        if !self.reason.is_empty() {
            write!(f, ": {}", self.reason)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_pass_is_retried() {
        let answer = |code: proto::Code| {
            Refusal::from_answer(&proto::SendEventResponse { code: code as i32, ..Default::default() })
        };
        assert!(!answer(proto::Code::BadRequest).retryable);
        assert!(answer(proto::Code::InternalError).retryable);
        assert!(answer(proto::Code::MaxUserLimitReached).retryable);
        for (status, retryable) in [(400, false), (404, false), (408, true), (413, false), (429, true), (503, true)] {
            assert_eq!(Refusal::from_http(status, None).retryable, retryable, "{status}");
        }
        assert!(Refusal::from_grpc(&tonic::Status::unavailable("")).retryable);
        assert!(!Refusal::from_grpc(&tonic::Status::unauthenticated("")).retryable);
    }

    #[test]
    fn says_what_the_server_said() {
        let answer = proto::SendEventResponse {
            code: proto::Code::InternalError as i32,
            reason: "log is full".into(),
            ..Default::default()
        };
        let refusal = Refusal::from_http(503, Some(&answer));
        assert_eq!(refusal.to_string(), "refused with HTTP status 503 with CODE_INTERNAL_ERROR: log is full");
    }
}
