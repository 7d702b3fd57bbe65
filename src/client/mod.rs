//! A well-behaved client of the wire protocol, over WebSocket, REST or gRPC.
//!
//! [`Client`] is one connection (or a pool, for REST): it sends a batch and gives back the server's answer, and says of
//! every failure whether the same batch may be sent again ([`ClientError::is_retryable`]). [`Sender`] adds what makes a
//! client safe: retries with the same `req_guid`, backoff with jitter, and reconnection. [`mod@bench`] is the load generator.
//!
//! A batch is acknowledged only by an answer with `STATUS_SUCCESS`; everything else is an error, and after an error
//! nobody knows whether the batch was committed. Sending it again under the same `req_guid` loses nothing, but
//! the server does not deduplicate: a batch whose ack was lost may be stored and delivered twice.

pub mod bench;
mod endpoint;
mod error;
mod grpc;
mod rest;
mod sender;
mod websocket;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::{HeaderName, HeaderValue};

pub use endpoint::{Endpoint, EndpointError, EndpointProtocol};
pub use error::{ClientError, Refusal};
pub use sender::{NotAcked, Receipt, RetryPolicy, Sender};

use crate::proto;

/// Largest answer that is read, in bytes. Real ones are below 1 KiB.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Where and as whom to connect.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Where to.
    pub endpoint: Endpoint,
    /// The connection's id. Empty: none is sent, which gRPC refuses.
    pub id: String,
    /// Name of the header that carries the id; `X-User-ID` by default.
    pub id_header: String,
    /// The connection's group, if any.
    pub group: Option<String>,
    /// Name of the header that carries the group; `X-User-Group` by default. The server's
    /// `ingest.connection_group_header` must say the same.
    pub group_header: String,
    /// How long connecting may take, the WebSocket handshake included; 10 s by default.
    pub connect_timeout: Duration,
    /// How long an answer may take; 10 s by default.
    pub answer_timeout: Duration,
}

impl ClientOptions {
    /// Options with every default.
    pub fn new(endpoint: Endpoint, id: impl Into<String>) -> Self {
        ClientOptions {
            endpoint,
            id: id.into(),
            id_header: "X-User-ID".into(),
            group: None,
            group_header: "X-User-Group".into(),
            connect_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(10),
        }
    }

    /// Checks what a type cannot say.
    ///
    /// # Errors
    /// [`ClientError::InvalidHeader`] if the id, the group or the name of their header cannot stand in a header.
    pub fn check(&self) -> Result<(), ClientError> {
        self.headers().map(|_| ())
    }

    /// The headers that say who this is.
    fn headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, ClientError> {
        let mut headers = Vec::new();
        if !self.id.is_empty() {
            headers.push(header(&self.id_header, &self.id)?);
        }
        if let Some(group) = &self.group {
            headers.push(header(&self.group_header, group)?);
        }
        Ok(headers)
    }
}

fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), ClientError> {
    let invalid = || ClientError::InvalidHeader { name: name.into() };
    let header_name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
    let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| invalid())?;
    Ok((header_name, value))
}

/// A connected client. Cheap to clone; clones share the connection, which closes with the last of them.
#[derive(Debug, Clone)]
pub struct Client {
    transport: Transport,
    answer_timeout: Duration,
}

#[derive(Debug, Clone)]
enum Transport {
    WebSocket(websocket::WebSocketClient),
    Rest(Arc<rest::RestClient>),
    Grpc(grpc::GrpcClient),
}

impl Client {
    /// Connects. REST connects only when the first batch is sent.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if nobody answers there in time, [`ClientError::Refused`] if the handshake is refused,
    /// [`ClientError::InvalidHeader`] if the id or group cannot stand in a header.
    pub async fn connect(options: &ClientOptions) -> Result<Client, ClientError> {
        let connect = async {
            Ok(match options.endpoint.protocol {
                EndpointProtocol::WebSocket => {
                    Transport::WebSocket(websocket::WebSocketClient::connect(options).await?)
                }
                EndpointProtocol::Rest => Transport::Rest(Arc::new(rest::RestClient::new(options)?)),
                EndpointProtocol::Grpc => Transport::Grpc(grpc::GrpcClient::connect(options).await?),
            })
        };
        let transport = tokio::time::timeout(options.connect_timeout, connect)
            .await
            .map_err(|elapsed| ClientError::connect(&options.endpoint, elapsed))??;
        Ok(Client { transport, answer_timeout: options.answer_timeout })
    }

    /// Sends one batch and waits for its answer. Any number may be in flight; over WebSocket they share one connection
    /// and are answered in any order. Dropping the future abandons the answer, not the batch.
    ///
    /// On `Ok` the server has acknowledged the batch.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the server refuses the batch, [`ClientError::AnswerTimeout`] if it does not answer in
    /// time, and whatever else befalls the connection. See [`ClientError::is_retryable`].
    pub async fn send(&self, request: proto::SendEventRequest) -> Result<proto::SendEventResponse, ClientError> {
        let answer = async {
            match &self.transport {
                Transport::WebSocket(client) => client.send(request).await,
                Transport::Rest(client) => client.send(request).await,
                Transport::Grpc(client) => client.send(request).await,
            }
        };
        let answer = tokio::time::timeout(self.answer_timeout, answer).await;
        let answer = answer.map_err(|_| ClientError::AnswerTimeout(self.answer_timeout))??;
        if answer.status() == proto::Status::Success {
            return Ok(answer);
        }
        Err(ClientError::Refused(Refusal::from_answer(&answer)))
    }

    /// Whether the connection has ended, so that nothing can be sent any more. REST and gRPC reconnect by themselves.
    pub fn is_closed(&self) -> bool {
        match &self.transport {
            Transport::WebSocket(client) => client.is_closed(),
            Transport::Rest(_) | Transport::Grpc(_) => false,
        }
    }

    /// Closes a WebSocket connection and waits until it is closed; what is in flight fails. REST and gRPC connections
    /// close when the last clone is dropped.
    pub async fn close(&self) {
        if let Transport::WebSocket(client) = &self.transport {
            client.close().await;
        }
    }
}

/// A new, unique `req_guid`.
pub fn new_req_guid() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The current time, as `sent_time` wants it.
pub fn sent_time_now() -> prost_types::Timestamp {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    prost_types::Timestamp {
        seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(now.subsec_nanos()).unwrap_or(0),
    }
}
