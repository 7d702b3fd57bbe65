//! Batches of the log as JSON lines: what `/backlog` on the control socket and `ringtail backlog peek` show, and what
//! `ringtail backlog export` writes and `import` reads.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use crate::batch::{Batch, Sequence};
use crate::forward::Topics;

/// Pending batches, oldest first; why they end early, as the last.
pub type Backlog = Box<dyn Iterator<Item = Result<BatchLine, String>> + Send>;

/// One batch. As JSON: one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchLine {
    /// Its place in the log.
    pub sequence: Sequence,
    /// When it was received, milliseconds since the Unix epoch.
    pub received_at_ms: u64,
    /// The client's group.
    pub group: String,
    /// The client's id; may be empty.
    pub connection_id: String,
    /// The batch's name; may be empty.
    pub req_guid: String,
    /// Bytes of the request.
    pub request_bytes: u64,
    /// Its events, in the client's order.
    pub events: Vec<EventLine>,
    /// The request, a protobuf `SendEventRequest`, in base64. In an export only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

/// One event of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventLine {
    /// Its type.
    #[serde(rename = "type")]
    pub event_type: String,
    /// The topic that it is for.
    pub topic: String,
    /// Bytes of its payload.
    pub payload_bytes: u64,
    /// Its payload in base64, if wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
}

impl BatchLine {
    /// Describes a batch, with or without the payloads of its events.
    pub fn new(sequence: Sequence, batch: &Batch, topics: &Topics, payloads: bool) -> BatchLine {
        let events = batch.request.events().map(|event| EventLine {
            event_type: event.event_type.into(),
            topic: topics.topic(event.event_type),
            payload_bytes: event.payload.len() as u64,
            payload: payloads.then(|| BASE64_STANDARD.encode(event.payload)),
        });
        BatchLine {
            sequence,
            received_at_ms: batch.received_at_ms,
            group: batch.client.group.as_ref().into(),
            connection_id: batch.client.id.as_ref().into(),
            req_guid: batch.request.req_guid().into(),
            request_bytes: batch.request.as_bytes().len() as u64,
            events: events.collect(),
            request: None,
        }
    }

    /// The same with the request itself.
    #[must_use]
    pub fn with_request(self, batch: &Batch) -> BatchLine {
        BatchLine { request: Some(BASE64_STANDARD.encode(batch.request.as_bytes())), ..self }
    }
}

/// Which pending batches are wanted. Also the query of `/backlog`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeekFilter {
    /// At most so many.
    pub limit: usize,
    /// With the payloads of their events.
    pub payloads: bool,
}

impl Default for PeekFilter {
    fn default() -> PeekFilter {
        PeekFilter { limit: 20, payloads: false }
    }
}

impl PeekFilter {
    /// The query of `/backlog` that asks for this.
    pub fn to_query(self) -> String {
        format!("limit={}&payloads={}", self.limit, self.payloads)
    }

    /// The wanted ones of `batches`, each as one line of JSON with its line break. Why they end early is a line
    /// `{"error": "…"}`.
    pub fn lines(self, batches: Backlog) -> impl Iterator<Item = Vec<u8>> {
        batches.take(self.limit).map(|batch| {
            let line = match batch {
                Ok(batch) => serde_json::to_vec(&batch),
                Err(error) => serde_json::to_vec(&serde_json::json!({ "error": error })),
            };
            let mut line = line.expect("a batch has only string keys");
            line.push(b'\n');
            line
        })
    }
}
