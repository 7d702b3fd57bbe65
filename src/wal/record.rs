//! The log's format on disk.
//!
//! A **chunk** is the records of one write, and the value of one slot. Its header carries its own checksum, the sequence
//! of its first record and the totals of all events and bytes ever appended before it, so that a reader knows, without
//! trusting sled, that bytes are right, that no record is missing, and otherwise how many events are.
//!
//! ```text
//! chunk   magic u32 │ version u8 │ 0 u8 │ part u16 │ parts u16 │ unsynced u32 │ first sequence u64 │ records u32 │
//!         body bytes u32 │ events before u64 │ bytes before u64 │ mask u64 │ crc32c u32 │ body, masked
//! record  length u32 │ received at ms u64 │ events u32 │ group bytes u16 │ id bytes u16 │ group │ id │ request
//! ```
//!
//! Integers are little-endian. The checksum covers the header before it and the body. A batch larger than a slot may
//! hold makes a chunk of several **parts**, in consecutive slots, each with the same header but for `part` and the length
//! and checksum of its own piece of the body. The request is the client's `SendEventRequest`, as it came.
//!
//! A chunk is searched for by its magic (`search.rs`), also in what is left of a damaged one, and whoever sends a request could
//! put a chunk into it. So every 8 bytes of the body are XORed with the mask, a random number that no client knows: nothing
//! in a body looks like a chunk.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::checksum::crc32c;
use crate::batch::{Batch, Client, Request, Sequence};

/// The first bytes of a chunk.
pub(super) const MAGIC_BYTES: [u8; 4] = *b"RTC1";
const MAGIC: u32 = u32::from_le_bytes(MAGIC_BYTES);
const VERSION: u8 = 1;
/// Bytes of a chunk's header.
pub(super) const HEADER_BYTES: usize = 58;
const CRC_BYTES: usize = 4;
/// Where in a header the length of the body stands.
const BODY_BYTES_AT: usize = 26;
/// Most bytes of a slot's value.
pub(super) const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Bytes of a record before its group, id and request.
pub(super) const RECORD_HEADER_BYTES: usize = 20;

/// Totals of everything appended before a place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Sequence of the record at that place.
    pub sequence: u64,
    /// Events before it.
    pub events: u64,
    /// Request bytes before it.
    pub bytes: u64,
}

impl Totals {
    /// The totals of an empty log.
    pub(super) const ZERO: Totals = Totals { sequence: Sequence::FIRST.0, events: 0, bytes: 0 };

    /// The totals after `batch`.
    pub(super) fn after(self, batch: &Batch) -> Totals {
        Totals {
            sequence: self.sequence + 1,
            events: self.events + u64::from(batch.request.event_count()),
            bytes: self.bytes + batch.request.as_bytes().len() as u64,
        }
    }
}

/// Header of a chunk, or of one of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkHeader {
    /// Totals at the chunk's first record.
    pub before: Totals,
    /// Records in the whole chunk. At least 1.
    pub records: u32,
    /// This part's number, from 0.
    pub part: u16,
    /// Parts of the chunk. At least 1.
    pub parts: u16,
    /// How many records right before it were not durable yet when it was written: all others were.
    pub unsynced: u32,
}

impl ChunkHeader {
    /// The sequence after its last record.
    pub fn end_sequence(&self) -> u64 {
        self.before.sequence.saturating_add(u64::from(self.records))
    }

    /// Every record before this sequence was durable when the chunk was written.
    pub fn durable_sequence(&self) -> u64 {
        self.before.sequence.saturating_sub(u64::from(self.unsynced))
    }
}

/// Why a slot's value is not a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Shorter than its header says.
    #[error("the chunk is cut short")]
    Short,
    /// Not a chunk, or one of a newer version.
    #[error("not a chunk of a known version")]
    Unknown,
    /// The bytes are not those that were written.
    #[error("the checksum does not match")]
    Checksum,
    /// The bytes are those that were written, but make no sense.
    #[error("the chunk's content is malformed")]
    Malformed,
    /// It is not the part that must follow.
    #[error("a part of the chunk is missing")]
    Part,
}

/// Bytes that `batch` takes in a chunk's body.
pub(super) fn record_bytes(batch: &Batch) -> usize {
    RECORD_HEADER_BYTES + batch.client.group.len() + batch.client.id.len() + batch.request.as_bytes().len()
}

/// Appends `batch` to a chunk's body.
pub(super) fn encode_record(batch: &Batch, body: &mut Vec<u8>) {
    let (group, id) = (batch.client.group.as_bytes(), batch.client.id.as_bytes());
    body.put_u32_le(u32::try_from(record_bytes(batch) - 4).expect("a batch is limited to 16 MiB"));
    body.put_u64_le(batch.received_at_ms);
    body.put_u32_le(batch.request.event_count());
    body.put_u16_le(u16::try_from(group.len()).expect("a group is limited to 1,024 bytes"));
    body.put_u16_le(u16::try_from(id.len()).expect("an id is limited to 1,024 bytes"));
    body.put_slice(group);
    body.put_slice(id);
    body.put_slice(batch.request.as_bytes());
}

/// One record of a chunk, taken off the front of its body and not yet decoded.
pub(super) struct RawRecord {
    /// When its request was read, milliseconds since the Unix epoch.
    pub received_at_ms: u64,
    /// Its events.
    pub events: u32,
    group_bytes: usize,
    id_bytes: usize,
    /// Group, id and request.
    rest: Bytes,
}

/// Takes one record off the front of a chunk's body. After an error nothing that follows can be found.
pub(super) fn split_record(body: &mut Bytes) -> Result<RawRecord, ChunkError> {
    let length = if body.len() < RECORD_HEADER_BYTES { 0 } else { body.get_u32_le() as usize };
    if length < RECORD_HEADER_BYTES - 4 || length > body.len() {
        return Err(ChunkError::Malformed);
    }
    let mut rest = body.split_to(length);
    let received_at_ms = rest.get_u64_le();
    let events = rest.get_u32_le();
    let (group_bytes, id_bytes) = (rest.get_u16_le() as usize, rest.get_u16_le() as usize);
    if group_bytes + id_bytes > rest.len() {
        return Err(ChunkError::Malformed);
    }
    Ok(RawRecord { received_at_ms, events, group_bytes, id_bytes, rest })
}

impl RawRecord {
    /// The totals after it, even if it does not decode.
    pub fn after(&self, before: Totals) -> Totals {
        Totals {
            sequence: before.sequence + 1,
            events: before.events + u64::from(self.events),
            bytes: before.bytes + (self.rest.len() - self.group_bytes - self.id_bytes) as u64,
        }
    }

    /// The batch in it.
    pub fn decode(mut self) -> Result<Batch, ChunkError> {
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).map(Into::into).map_err(|_| ChunkError::Malformed);
        let group = text(&self.rest.split_to(self.group_bytes))?;
        let id = text(&self.rest.split_to(self.id_bytes))?;
        let request = Request::parse(self.rest).map_err(|_| ChunkError::Malformed)?;
        if request.event_count() != self.events {
            return Err(ChunkError::Malformed);
        }
        Ok(Batch { received_at_ms: self.received_at_ms, client: Client { group, id }, request })
    }
}

/// Writes the slot value of one part into `value`, which is cleared first.
pub(super) fn encode_chunk(header: &ChunkHeader, body: &[u8], value: &mut Vec<u8>) {
    value.clear();
    value.put_u32_le(MAGIC);
    value.put_u8(VERSION);
    value.put_u8(0);
    value.put_u16_le(header.part);
    value.put_u16_le(header.parts);
    value.put_u32_le(header.unsynced);
    value.put_u64_le(header.before.sequence);
    value.put_u32_le(header.records);
    value.put_u32_le(u32::try_from(body.len()).expect("a slot's value is limited to 1 MiB"));
    value.put_u64_le(header.before.events);
    value.put_u64_le(header.before.bytes);
    let mask = rand::random::<u64>().to_le_bytes();
    value.put_slice(&mask);
    value.put_u32_le(0);
    value.put_slice(body);
    let (covered, masked) = value.split_at_mut(HEADER_BYTES);
    let (covered, crc) = covered.split_at_mut(HEADER_BYTES - CRC_BYTES);
    apply_mask(mask, masked);
    crc.copy_from_slice(&crc32c(&[covered, masked]).to_le_bytes());
}

/// Masks a body, or takes the mask off again.
fn apply_mask(mask: [u8; 8], body: &mut [u8]) {
    let (pieces, rest) = body.as_chunks_mut();
    for piece in pieces {
        *piece = (u64::from_ne_bytes(*piece) ^ u64::from_ne_bytes(mask)).to_ne_bytes();
    }
    rest.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
}

/// Bytes of the chunk that begins with `header`, as far as that can be believed.
pub(super) fn chunk_bytes(header: &[u8]) -> Option<usize> {
    let body_bytes = header.get(BODY_BYTES_AT..)?.first_chunk()?;
    Some(HEADER_BYTES + u32::from_le_bytes(*body_bytes) as usize).filter(|bytes| *bytes <= CHUNK_BYTES_MAX)
}

/// Checks a slot's value and splits it into header and body.
pub(super) fn decode_chunk(mut value: Bytes) -> Result<(ChunkHeader, Bytes), ChunkError> {
    let (header, mask) = decode_header(&value)?;
    value.advance(HEADER_BYTES);
    // Copied only if sled or somebody else holds it.
    let mut body = BytesMut::from(value);
    apply_mask(mask, &mut body);
    Ok((header, body.freeze()))
}

/// Checks a slot's value. Gives its header and the mask of its body.
pub(super) fn decode_header(value: &[u8]) -> Result<(ChunkHeader, [u8; 8]), ChunkError> {
    let (mut header, body) = value.split_at_checked(HEADER_BYTES).ok_or(ChunkError::Short)?;
    let covered = &header[..HEADER_BYTES - CRC_BYTES];
    if header.get_u32_le() != MAGIC || header.get_u8() != VERSION {
        return Err(ChunkError::Unknown);
    }
    header.advance(1);
    let (part, parts, unsynced) = (header.get_u16_le(), header.get_u16_le(), header.get_u32_le());
    let sequence = header.get_u64_le();
    let records = header.get_u32_le();
    let body_bytes = header.get_u32_le() as usize;
    let (events, bytes) = (header.get_u64_le(), header.get_u64_le());
    let mask = header.get_u64_le().to_le_bytes();
    if body.len() != body_bytes {
        return Err(ChunkError::Short);
    }
    if crc32c(&[covered, body]) != header.get_u32_le() {
        return Err(ChunkError::Checksum);
    }
    if part >= parts || records == 0 {
        return Err(ChunkError::Malformed);
    }
    Ok((ChunkHeader { before: Totals { sequence, events, bytes }, records, part, parts, unsynced }, mask))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;
    use proptest::prelude::*;
    use prost::Message;

    pub(crate) fn batch(group: &str, id: &str, req_guid: &str, payload: Vec<u8>) -> Batch {
        let event = proto::Event { event_bytes: payload.into(), r#type: "click".into() };
        let request = proto::SendEventRequest { req_guid: req_guid.into(), sent_time: None, events: vec![event] };
        let request = Request::parse(request.encode_to_vec().into()).unwrap();
        Batch { received_at_ms: 17, client: Client { group: group.into(), id: id.into() }, request }
    }

    fn chunk(batch: &Batch) -> Bytes {
        let (mut body, mut value) = (Vec::new(), Vec::new());
        encode_record(batch, &mut body);
        assert_eq!(body.len(), record_bytes(batch));
        let before = Totals { sequence: 7, events: 8, bytes: 9 };
        encode_chunk(&ChunkHeader { before, records: 1, part: 0, parts: 1, unsynced: 3 }, &body, &mut value);
        value.into()
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(group in ".{0,9}", id in ".{0,9}", guid in ".{0,9}", payload in proptest::collection::vec(any::<u8>(), 0..99)) {
            let written = batch(&group, &id, &guid, payload);
            let (header, mut body) = decode_chunk(chunk(&written)).unwrap();
            let record = split_record(&mut body).unwrap();
            let after = record.after(Totals::ZERO);
            let read = record.decode().unwrap();
            prop_assert_eq!(after, Totals::ZERO.after(&read));
            prop_assert_eq!(header.before, Totals { sequence: 7, events: 8, bytes: 9 });
            prop_assert_eq!(read.client, written.client);
            prop_assert_eq!(read.request, written.request);
            prop_assert!(body.is_empty());
        }

        #[test]
        fn a_flipped_bit_or_a_cut_is_seen(payload in proptest::collection::vec(any::<u8>(), 0..99), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let good = chunk(&batch("g", "i", "r", payload));
            let mut bad = good.to_vec();
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
            prop_assert!(decode_chunk(bad.into()).is_err());
            prop_assert!(decode_chunk(good.slice(..at)).is_err());
        }

        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let noise = Bytes::from(noise);
            prop_assert!(decode_chunk(noise.clone()).is_err());
            let _ = split_record(&mut noise.clone()).and_then(RawRecord::decode);
        }
    }
}
