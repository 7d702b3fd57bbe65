//! Validated domain types: an event, a batch, who sent it, and its place in the log.
//!
//! A batch stays the protobuf bytes that the client sent, from the socket to the log and on to Kafka. [`Request::parse`]
//! walks those bytes once and proves that they are a well-formed `SendEventRequest`; [`Request::events`] walks them again
//! when they are forwarded. Nothing is copied or built on the way.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes};
use prost::encoding::{self, DecodeContext, WireType};

/// Longest accepted client id or group, in bytes.
pub const CLIENT_NAME_BYTES_MAX: usize = 1024;

/// Position of a record in the log: one per batch, starting at 1, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Sequence(pub u64);

impl Sequence {
    /// The first sequence of a new log.
    pub const FIRST: Sequence = Sequence(1);

    /// The sequence after this one.
    pub fn next(self) -> Sequence {
        Sequence(self.0 + 1)
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who sent a batch: the connection id, namespaced by the connection group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Client {
    /// Value of the group header, or the configured default group.
    pub group: Arc<str>,
    /// Value of the id header; empty when the client sent none.
    pub id: Arc<str>,
}

/// One request of one client, as admitted.
#[derive(Debug, Clone)]
pub struct Batch {
    /// When the request was read, milliseconds since the Unix epoch.
    pub received_at_ms: u64,
    /// Who sent it.
    pub client: Client,
    /// What was sent.
    pub request: Request,
}

/// Milliseconds since the Unix epoch, by the system clock.
pub fn now_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

/// One event, borrowed from its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'a> {
    /// `type` on the wire: picks the topic.
    pub event_type: &'a str,
    /// `event_bytes` on the wire: the Kafka record's value.
    pub payload: &'a [u8],
}

/// Why bytes are not a `SendEventRequest`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The protobuf encoding is broken.
    #[error("not a valid SendEventRequest: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A string field does not hold UTF-8.
    #[error("not a valid SendEventRequest: {field} is not UTF-8")]
    NotUtf8 {
        /// The field's name on the wire.
        field: &'static str,
    },
    /// The JSON form is broken (see `ingest/json.rs`).
    #[error("not a valid JSON request: {0}")]
    Json(String),
}

/// A proven `SendEventRequest`, kept as its protobuf bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    bytes: Bytes,
    req_guid: Range<usize>,
    event_count: u32,
}

impl Request {
    /// Proves that `bytes` are a well-formed request, without copying them. Accepts exactly what a proto3 decoder does:
    /// fields in any order, the last of a repeated scalar wins, unknown fields are skipped.
    ///
    /// # Errors
    /// [`DecodeError`] when a conforming decoder would refuse the bytes.
    pub fn parse(bytes: Bytes) -> Result<Request, DecodeError> {
        let mut req_guid = 0..0;
        let mut event_count = 0u32;
        let mut rest: &[u8] = &bytes;
        while rest.has_remaining() {
            match next_field(&mut rest)? {
                (1, Field::Bytes(value)) => {
                    utf8(value, "req_guid")?;
                    let start = value.as_ptr() as usize - bytes.as_ptr() as usize;
                    req_guid = start..start + value.len();
                }
                (2, Field::Bytes(value)) => check_timestamp(value)?,
                (3, Field::Bytes(value)) => {
                    parse_event(value)?;
                    event_count += 1;
                }
                (tag @ 1..=3, Field::Other(wire_type)) => return Err(wrong_wire_type(tag, wire_type).into()),
                _ => {}
            }
        }
        Ok(Request { bytes, req_guid, event_count })
    }

    /// The same request with those events only that `wanted` takes. Everything else stays as the client sent it.
    #[must_use]
    pub fn retain(&self, mut wanted: impl FnMut(Event<'_>) -> bool) -> Request {
        let mut kept = Vec::with_capacity(self.bytes.len());
        let mut rest: &[u8] = &self.bytes;
        while rest.has_remaining() {
            let before = rest;
            let (tag, field) = next_field(&mut rest).expect("parse checked every field");
            let keep = match (tag, field) {
                (3, Field::Bytes(value)) => wanted(parse_event(value).expect("parse checked every event")),
                _ => true,
            };
            if keep {
                kept.extend_from_slice(&before[..before.len() - rest.len()]);
            }
        }
        Request::parse(kept.into()).expect("whole fields of a request make a request")
    }

    /// The request as protobuf, as the client sent it.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The batch's name, given by the client; may be empty.
    pub fn req_guid(&self) -> &str {
        std::str::from_utf8(&self.bytes[self.req_guid.clone()]).expect("parse checked that req_guid is UTF-8")
    }

    /// Number of events.
    pub fn event_count(&self) -> u32 {
        self.event_count
    }

    /// The events, in the client's order.
    pub fn events(&self) -> Events<'_> {
        Events { rest: &self.bytes }
    }
}

/// Iterator over the events of a request.
#[derive(Debug, Clone)]
pub struct Events<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Events<'a> {
    type Item = Event<'a>;

    fn next(&mut self) -> Option<Event<'a>> {
        while self.rest.has_remaining() {
            let (tag, field) = next_field(&mut self.rest).expect("parse checked every field");
            if let (3, Field::Bytes(value)) = (tag, field) {
                return Some(parse_event(value).expect("parse checked every event"));
            }
        }
        None
    }
}

enum Field<'a> {
    Bytes(&'a [u8]),
    Other(WireType),
}

/// Takes one field off the front: its tag and, for a length-delimited one, its bytes. Others are skipped.
fn next_field<'a>(rest: &mut &'a [u8]) -> Result<(u32, Field<'a>), prost::DecodeError> {
    let (tag, wire_type) = encoding::decode_key(rest)?;
    if wire_type == WireType::LengthDelimited {
        let length = encoding::decode_varint(rest)?;
        let length = usize::try_from(length).ok().filter(|length| *length <= rest.len());
        let length = length.ok_or_else(|| encoding_error("buffer underflow"))?;
        let (value, after) = rest.split_at(length);
        *rest = after;
        return Ok((tag, Field::Bytes(value)));
    }
    encoding::skip_field(wire_type, tag, rest, DecodeContext::default())?;
    Ok((tag, Field::Other(wire_type)))
}

fn parse_event(mut rest: &[u8]) -> Result<Event<'_>, DecodeError> {
    let mut event = Event { event_type: "", payload: &[] };
    while rest.has_remaining() {
        match next_field(&mut rest)? {
            (1, Field::Bytes(value)) => event.payload = value,
            (2, Field::Bytes(value)) => event.event_type = utf8(value, "type")?,
            (tag @ 1..=2, Field::Other(wire_type)) => return Err(wrong_wire_type(tag, wire_type).into()),
            _ => {}
        }
    }
    Ok(event)
}

/// `sent_time` is kept but never read by the server, so only its encoding is checked.
fn check_timestamp(value: &[u8]) -> Result<(), prost::DecodeError> {
    <prost_types::Timestamp as prost::Message>::decode(value).map(|_| ())
}

fn utf8<'a>(value: &'a [u8], field: &'static str) -> Result<&'a str, DecodeError> {
    std::str::from_utf8(value).map_err(|_| DecodeError::NotUtf8 { field })
}

fn wrong_wire_type(tag: u32, wire_type: WireType) -> prost::DecodeError {
    encoding_error(format!("field {tag} has wire type {wire_type:?}"))
}

fn encoding_error(description: impl Into<std::borrow::Cow<'static, str>>) -> prost::DecodeError {
    #[allow(deprecated, reason = "prost offers no other way to make a DecodeError")]
    prost::DecodeError::new(description)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;
    use proptest::prelude::*;
    use prost::Message;

    fn request() -> impl Strategy<Value = proto::SendEventRequest> {
        let event = (proptest::collection::vec(any::<u8>(), 0..40), ".{0,8}")
            .prop_map(|(bytes, r#type)| proto::Event { event_bytes: bytes.into(), r#type });
        let time = proptest::option::of((any::<i64>(), any::<i32>()))
            .prop_map(|time| time.map(|(seconds, nanos)| prost_types::Timestamp { seconds, nanos }));
        (".{0,20}", time, proptest::collection::vec(event, 0..8))
            .prop_map(|(req_guid, sent_time, events)| proto::SendEventRequest { req_guid, sent_time, events })
    }

    fn same_as_prost(bytes: &[u8]) {
        let expected = proto::SendEventRequest::decode(bytes);
        match (Request::parse(Bytes::copy_from_slice(bytes)), expected) {
            (Ok(parsed), Ok(expected)) => {
                assert_eq!(parsed.req_guid(), expected.req_guid);
                assert_eq!(parsed.event_count() as usize, expected.events.len());
                let events: Vec<_> = parsed.events().collect();
                let wanted: Vec<_> = expected
                    .events
                    .iter()
                    .map(|event| Event { event_type: &event.r#type, payload: &event.event_bytes })
                    .collect();
                assert_eq!(events, wanted);
            }
            (parsed, expected) => assert_eq!(parsed.is_err(), expected.is_err(), "{parsed:?} {expected:?}"),
        }
    }

    proptest! {
        #[test]
        fn reads_what_prost_reads(request in request()) {
            same_as_prost(&request.encode_to_vec());
        }

        #[test]
        fn what_is_retained_is_as_it_was(request in request(), unknown in proptest::collection::vec(any::<u8>(), 0..9)) {
            let mut bytes = request.encode_to_vec();
            encoding::bytes::encode(99, &unknown, &mut bytes);
            let parsed = Request::parse(bytes.into()).unwrap();
            prop_assert_eq!(&parsed.retain(|_| true), &parsed);
            let short = parsed.retain(|event| event.payload.len() % 2 == 0);
            let mut expected = request;
            expected.events.retain(|event| event.event_bytes.len() % 2 == 0);
            let mut bytes = expected.encode_to_vec();
            encoding::bytes::encode(99, &unknown, &mut bytes);
            prop_assert_eq!(short.as_bytes(), &Bytes::from(bytes));
        }

        #[test]
        fn refuses_what_prost_refuses(request in request(), at in any::<prop::sample::Index>(), flip in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = request.encode_to_vec();
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
                if cut { bytes.truncate(at); }
            }
            same_as_prost(&bytes);
        }
    }
}
