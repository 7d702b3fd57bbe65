//! The spill's format on disk. A **block** holds consecutive events of one topic.
//!
//! ```text
//! block   magic u32 │ version u8 │ topic bytes u8 │ 0 u16 │ body bytes u32 │ events u32 │ copied events u32 │
//!         first number u64 │ first sequence u64 │ first new sequence u64 │
//!         crc32c of the body u32 │ crc32c of the header and the topic u32 │ topic │ body
//! body    protobuf: the events, in order
//! ```
//!
//! Integers are little-endian. Header and body are checked apart, so that a start can read the headers alone. Copied events,
//! the first ones of the block, were durable in another block when this one was written. The sequences say of a block whose
//! body cannot be read whether the log has its events still.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::{Buf, BufMut, Bytes};
use prost::Message;

use crate::wal::crc32c;

const MAGIC: u32 = u32::from_le_bytes(*b"RTS1");
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 52;
/// Where the checksum of the header stands.
const HEADER_CHECKSUM_AT: usize = 48;
/// Largest body that is believed. One event is at most a request, of 16 MiB.
const BODY_BYTES_MAX: u32 = 64 << 20;

/// One event, with all that it takes to send or park it.
#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::forward) struct SpilledEvent {
    /// Where its batch was in the log.
    #[prost(uint64, tag = "1")]
    pub(in crate::forward) sequence: u64,
    /// When the batch was received, milliseconds since the Unix epoch.
    #[prost(uint64, tag = "2")]
    pub(in crate::forward) received_at_ms: u64,
    /// The client's group.
    #[prost(string, tag = "3")]
    pub(in crate::forward) group: String,
    /// The client's id; may be empty.
    #[prost(string, tag = "4")]
    pub(in crate::forward) connection_id: String,
    /// The batch's name; may be empty.
    #[prost(string, tag = "5")]
    pub(in crate::forward) req_guid: String,
    /// The event's `type`.
    #[prost(string, tag = "6")]
    pub(in crate::forward) event_type: String,
    /// The record's key; none when it has none.
    #[prost(string, optional, tag = "7")]
    pub(in crate::forward) key: Option<String>,
    /// The event's bytes, as the client sent them.
    #[prost(bytes = "bytes", tag = "8")]
    pub(in crate::forward) payload: Bytes,
    /// What the record is to say besides, on a dead letter topic.
    #[prost(message, repeated, tag = "9")]
    pub(in crate::forward) headers: Vec<Header>,
    /// It comes from the parked store: the log does not show it again.
    #[prost(bool, tag = "10")]
    pub(in crate::forward) requeued: bool,
}

impl SpilledEvent {
    /// The sequence under which the log may show it again; 0 if under none.
    pub(in crate::forward) fn log_sequence(&self) -> u64 {
        if self.requeued { 0 } else { self.sequence }
    }
}

/// A header of a Kafka record.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(in crate::forward) struct Header {
    #[prost(string, tag = "1")]
    pub(in crate::forward) name: String,
    #[prost(string, tag = "2")]
    pub(in crate::forward) value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(message, repeated, tag = "1")]
    events: Vec<SpilledEvent>,
}

/// What a block's header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockHeader {
    pub(super) topic: String,
    /// Number of the first event in its topic.
    pub(super) first: u64,
    pub(super) events: u32,
    /// So many of them, the first ones, are copies.
    pub(super) copied: u32,
    /// Sequence of its first event.
    pub(super) first_sequence: u64,
    /// Sequence of its first event that is not a copy; 0 if all are.
    pub(super) new_sequence: u64,
    body_bytes: u32,
    body_checksum: u32,
}

impl BlockHeader {
    fn bytes(&self) -> u64 {
        (HEADER_BYTES + self.topic.len()) as u64
    }

    /// Bytes of the whole block.
    pub(super) fn block_bytes(&self) -> u64 {
        self.bytes() + u64::from(self.body_bytes)
    }
}

/// A block of `events`, which must not be empty. The first `copied` of them are durable elsewhere.
pub(super) fn encode(topic: &str, first: u64, events: Vec<SpilledEvent>, copied: u32) -> Vec<u8> {
    let first_sequence = events[0].log_sequence();
    let new_sequence = events.get(copied as usize).map_or(0, SpilledEvent::log_sequence);
    let count = u32::try_from(events.len()).expect("a block is bounded in bytes");
    let body = Body { events };
    let body_bytes = body.encoded_len();
    let mut block = Vec::with_capacity(HEADER_BYTES + topic.len() + body_bytes);
    block.put_u32_le(MAGIC);
    block.put_u8(VERSION);
    block.put_u8(u8::try_from(topic.len()).expect("a topic's name has at most 249 bytes"));
    block.put_u16_le(0);
    block.put_u32_le(u32::try_from(body_bytes).expect("a block is bounded in bytes"));
    block.put_u32_le(count);
    block.put_u32_le(copied);
    block.put_u64_le(first);
    block.put_u64_le(first_sequence);
    block.put_u64_le(new_sequence);
    let body = body.encode_to_vec();
    block.put_u32_le(crc32c(&[&body]));
    let checksum = crc32c(&[&block, topic.as_bytes()]);
    block.put_u32_le(checksum);
    block.put_slice(topic.as_bytes());
    block.put_slice(&body);
    block
}

/// The header at `offset`; none where there is no good one.
pub(super) fn read_header(file: &File, offset: u64) -> io::Result<Option<BlockHeader>> {
    let mut fixed = [0; HEADER_BYTES];
    if !read_exact(file, offset, &mut fixed)? {
        return Ok(None);
    }
    let mut rest = &fixed[..];
    let (magic, version, topic_bytes) = (rest.get_u32_le(), rest.get_u8(), rest.get_u8());
    rest.advance(2);
    let (body_bytes, events, copied) = (rest.get_u32_le(), rest.get_u32_le(), rest.get_u32_le());
    let (first, first_sequence, new_sequence) = (rest.get_u64_le(), rest.get_u64_le(), rest.get_u64_le());
    let (body_checksum, checksum) = (rest.get_u32_le(), rest.get_u32_le());
    if (magic, version) != (MAGIC, VERSION) || body_bytes > BODY_BYTES_MAX {
        return Ok(None);
    }
    let mut topic = vec![0; usize::from(topic_bytes)];
    if !read_exact(file, offset + HEADER_BYTES as u64, &mut topic)? {
        return Ok(None);
    }
    if crc32c(&[&fixed[..HEADER_CHECKSUM_AT], &topic]) != checksum {
        return Ok(None);
    }
    let Ok(topic) = String::from_utf8(topic) else { return Ok(None) };
    Ok(Some(BlockHeader { topic, first, events, copied, first_sequence, new_sequence, body_bytes, body_checksum }))
}

/// The events of the block at `offset`; none if it is damaged.
pub(super) fn read_events(file: &File, offset: u64) -> io::Result<Option<Vec<SpilledEvent>>> {
    let Some(header) = read_header(file, offset)? else { return Ok(None) };
    let mut body = vec![0; header.body_bytes as usize];
    if !read_exact(file, offset + header.bytes(), &mut body)? || crc32c(&[&body]) != header.body_checksum {
        return Ok(None);
    }
    // The events share the body's memory.
    let events = Body::decode(Bytes::from(body)).ok().map(|body| body.events);
    Ok(events.filter(|events| events.len() == header.events as usize))
}

/// Whether the file has so many bytes at `offset`.
fn read_exact(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact_at(buffer, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| true),
    }
}
