//! The bytes of the WebSocket load: a request frame that is patched instead of encoded, and answers that are scanned
//! instead of decoded.
//!
//! Request frames carry the masking key zero, which the protocol allows and which makes the masked payload the payload
//! itself; the server unmasks it as it would any other.
//!
//! A guid is 32 hexadecimal digits: 16 that name the connection, 4 for the slot (its place in the connection's window),
//! 12 that count.

use std::ops::Range;

use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::proto;

const GUID_BYTES: usize = 32;
const SLOT: Range<usize> = 16..20;
const COUNT: Range<usize> = 20..32;

/// Opcodes of RFC 6455, section 5.2, together with the FIN bit.
pub(super) const BINARY: u8 = 0x82;
pub(super) const CLOSE: u8 = 0x88;
pub(super) const PING: u8 = 0x89;
pub(super) const PONG: u8 = 0x8a;

/// One connection's request frame.
#[derive(Debug)]
pub(super) struct RequestFrame {
    bytes: Vec<u8>,
    guid: Range<usize>,
    count: u64,
}

impl RequestFrame {
    /// A frame of `request`, whose guid is overwritten.
    pub(super) fn new(mut request: proto::SendEventRequest) -> Self {
        request.req_guid = format!("{:016x}{:016x}", rand::random::<u64>(), 0);
        let message = request.encode_to_vec();
        let mut bytes = frame_header(BINARY, message.len());
        // prost writes fields in the order of their tags: the guid is first, behind one byte of key and one of length.
        let guid_start = bytes.len() + 2;
        bytes.extend(message);
        let guid = guid_start..guid_start + GUID_BYTES;
        debug_assert_eq!(&bytes[guid.clone()], request.req_guid.as_bytes());
        RequestFrame { bytes, guid, count: 0 }
    }

    /// Appends the frame to `out`, under a guid that was not used before and names `slot`.
    pub(super) fn write(&mut self, slot: u16, out: &mut Vec<u8>) {
        let guid = &mut self.bytes[self.guid.clone()];
        write_hex(u64::from(slot), &mut guid[SLOT]);
        write_hex(self.count, &mut guid[COUNT]);
        self.count += 1;
        out.extend_from_slice(&self.bytes);
    }
}

/// A masked frame's header, masking key zero included.
pub(super) fn frame_header(opcode: u8, payload_bytes: usize) -> Vec<u8> {
    let mut header = vec![opcode];
    match payload_bytes {
        0..126 => header.push(0x80 | payload_bytes as u8),
        126..65_536 => {
            header.push(0x80 | 126);
            header.extend((payload_bytes as u16).to_be_bytes());
        }
        _ => {
            header.push(0x80 | 127);
            header.extend((payload_bytes as u64).to_be_bytes());
        }
    }
    header.extend([0; 4]);
    header
}

fn write_hex(mut number: u64, digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

/// A whole frame at the front of what was received.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ServerFrame<'a> {
    /// First byte: FIN and opcode.
    pub(super) opcode: u8,
    pub(super) payload: &'a [u8],
    /// Bytes of the frame, header included.
    pub(super) bytes: usize,
}

/// The frame at the front of `received`; `None` if it is not whole yet.
pub(super) fn next_frame(received: &[u8]) -> Option<ServerFrame<'_>> {
    let (&[opcode, short], rest) = received.split_first_chunk::<2>()?;
    let (header_bytes, payload_bytes) = match short & 0x7f {
        126 => (4, u64::from(u16::from_be_bytes(*rest.first_chunk()?))),
        127 => (10, u64::from_be_bytes(*rest.first_chunk()?)),
        length => (2, u64::from(length)),
    };
    let bytes = usize::try_from(payload_bytes).ok()?.checked_add(header_bytes)?;
    let payload = received.get(header_bytes..bytes)?;
    Some(ServerFrame { opcode, payload, bytes })
}

/// What the generator needs of a `SendEventResponse`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer<'a> {
    pub(super) acked: bool,
    pub(super) code: i32,
    pub(super) reason: &'a [u8],
    /// From the guid, if it is one of ours.
    pub(super) slot: Option<u16>,
}

/// Scans an answer without building it.
pub(super) fn scan_answer(mut message: &[u8]) -> Result<Answer<'_>, prost::DecodeError> {
    let mut answer = Answer::default();
    while !message.is_empty() {
        match decode_key(&mut message)? {
            (1, WireType::Varint) => answer.acked = decode_varint(&mut message)? == proto::Status::Success as u64,
            (2, WireType::Varint) => answer.code = decode_varint(&mut message)? as i32,
            (4, WireType::LengthDelimited) => answer.reason = take_bytes(&mut message)?,
            (5, WireType::LengthDelimited) => {
                if let Some(guid) = scan_guid(take_bytes(&mut message)?)? {
                    answer.slot = slot_of(guid);
                }
            }
            (tag, wire_type) => skip_field(wire_type, tag, &mut message, DecodeContext::default())?,
        }
    }
    Ok(answer)
}

/// The value of a map entry whose key is `req_guid`.
fn scan_guid(mut entry: &[u8]) -> Result<Option<&[u8]>, prost::DecodeError> {
    let (mut key, mut value): (&[u8], &[u8]) = (&[], &[]);
    while !entry.is_empty() {
        match decode_key(&mut entry)? {
            (1, WireType::LengthDelimited) => key = take_bytes(&mut entry)?,
            (2, WireType::LengthDelimited) => value = take_bytes(&mut entry)?,
            (tag, wire_type) => skip_field(wire_type, tag, &mut entry, DecodeContext::default())?,
        }
    }
    Ok((key == b"req_guid").then_some(value))
}

fn slot_of(guid: &[u8]) -> Option<u16> {
    if guid.len() != GUID_BYTES {
        return None;
    }
    u16::from_str_radix(std::str::from_utf8(&guid[SLOT]).ok()?, 16).ok()
}

fn take_bytes<'a>(message: &mut &'a [u8]) -> Result<&'a [u8], prost::DecodeError> {
    let length = decode_varint(message)?;
    let length = usize::try_from(length).ok().filter(|length| *length <= message.len());
    #[allow(deprecated, reason = "prost offers no other way to make a DecodeError")]
    let length = length.ok_or_else(|| prost::DecodeError::new("buffer underflow"))?;
    let (taken, rest) = message.split_at(length);
    *message = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn request(event_bytes: usize) -> proto::SendEventRequest {
        let event = proto::Event { event_bytes: vec![7; event_bytes].into(), r#type: "t".into() };
        proto::SendEventRequest { events: vec![event], ..Default::default() }
    }

    /// The frame's payload, by the generator's own parser: the masking key (zero) stands before it.
    fn decode(frame: &[u8]) -> proto::SendEventRequest {
        let header_bytes = match frame[1] & 0x7f {
            126 => 8,
            127 => 14,
            _ => 6,
        };
        assert_eq!((frame[0], frame[1] & 0x80), (BINARY, 0x80));
        proto::SendEventRequest::decode(&frame[header_bytes..]).unwrap()
    }

    #[test]
    fn patching_changes_the_guid_and_nothing_else() {
        for event_bytes in [10, 1000, 100_000] {
            let mut frame = RequestFrame::new(request(event_bytes));
            let mut guids = Vec::new();
            for slot in [0, 0xabc, u16::MAX] {
                let mut out = Vec::new();
                frame.write(slot, &mut out);
                let decoded = decode(&out);
                assert_eq!(decoded.events, request(event_bytes).events);
                assert_eq!(slot_of(decoded.req_guid.as_bytes()), Some(slot));
                guids.push(decoded.req_guid);
            }
            guids.dedup();
            assert_eq!(guids.len(), 3);
        }
    }

    #[test]
    fn the_guid_is_unique_even_in_one_slot() {
        let mut frame = RequestFrame::new(request(1));
        let (mut first, mut second) = (Vec::new(), Vec::new());
        frame.write(3, &mut first);
        frame.write(3, &mut second);
        assert_ne!(decode(&first).req_guid, decode(&second).req_guid);
    }

    #[test]
    fn frames_are_found_only_when_whole() {
        for payload_bytes in [0usize, 125, 126, 65_535, 65_536] {
            let mut frame = frame_header(BINARY, payload_bytes);
            frame.truncate(frame.len() - 4);
            frame[1] &= 0x7f; // servers do not mask
            frame.extend(vec![1; payload_bytes]);
            let whole = frame.len();
            for cut in [0, 1, whole - 1] {
                assert_eq!(next_frame(&frame[..cut]), None);
            }
            frame.push(BINARY);
            let found = next_frame(&frame).unwrap();
            assert_eq!((found.opcode, found.payload.len(), found.bytes), (BINARY, payload_bytes, whole));
        }
    }

    #[test]
    fn scans_what_prost_encodes() {
        let guid = format!("{:016x}{:04x}{:012x}", 1, 0x1f, 2);
        let answer = proto::SendEventResponse {
            status: proto::Status::Error as i32,
            code: proto::Code::InternalError as i32,
            sent_time: 1_700_000_000,
            reason: "full".into(),
            data: HashMap::from([("req_guid".into(), guid), ("other".into(), "x".into())]),
        };
        let bytes = answer.encode_to_vec();
        let expected = Answer { acked: false, code: 3, reason: b"full", slot: Some(0x1f) };
        assert_eq!(scan_answer(&bytes).unwrap(), expected);
        assert!(scan_answer(&bytes[..bytes.len() - 1]).is_err());

        let acked = proto::SendEventResponse { status: proto::Status::Success as i32, ..Default::default() };
        assert_eq!(scan_answer(&acked.encode_to_vec()).unwrap(), Answer { acked: true, ..Answer::default() });
    }
}
