//! How a parked event is spread over the entries of the store, and what else stands there.
//!
//! ```text
//! key    id, u64 big-endian · part, u16 big-endian
//! value  the event's bytes from part × STATE_VALUE_BYTES_MAX on
//! bytes  version (1) · parts, u16 big-endian · length of about, u32 big-endian · about, as JSON · payload
//!
//! key    0, one byte: before every other
//! value  version (1) · events ever removed, u64 big-endian · no id below was not given out, u64 big-endian
//! ```

use bytes::Bytes;

use super::{ParkedAbout, ParkedError};
use crate::wal::STATE_VALUE_BYTES_MAX;

const VERSION: u8 = 1;
const HEAD_BYTES: usize = 7;
const KEY_BYTES: usize = 10;

/// Where the [`Journal`] stands.
pub(super) const JOURNAL_KEY: &[u8] = &[0];

/// What removal leaves behind. Written before anything is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Journal {
    /// Events ever removed; more by those that were about to be when a crash came between.
    pub(super) removed: u64,
    /// The next id, at least: ids are not given out again when the newest events are gone.
    pub(super) next_id: u64,
}

impl Journal {
    pub(super) fn encode(self) -> [u8; 17] {
        let mut value = [VERSION; 17];
        value[1..9].copy_from_slice(&self.removed.to_be_bytes());
        value[9..].copy_from_slice(&self.next_id.to_be_bytes());
        value
    }

    pub(super) fn decode(value: &[u8]) -> Option<Journal> {
        let (&VERSION, rest) = value.split_first()? else { return None };
        let (removed, next_id) = rest.split_first_chunk()?;
        Some(Journal { removed: u64::from_be_bytes(*removed), next_id: u64::from_be_bytes(next_id.try_into().ok()?) })
    }
}

pub(super) fn key(id: u64, part: u16) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    key[..8].copy_from_slice(&id.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

pub(super) fn split_key(key: &[u8]) -> Option<(u64, u16)> {
    let (id, part) = split_id(key)?;
    Some((id, u16::from_be_bytes(part.try_into().ok()?)))
}

pub(super) fn split_id(key: &[u8]) -> Option<(u64, &[u8])> {
    let (id, rest) = key.split_first_chunk()?;
    Some((u64::from_be_bytes(*id), rest))
}

pub(super) fn encode(about: &ParkedAbout, payload: &[u8]) -> Result<Vec<u8>, ParkedError> {
    let about = serde_json::to_vec(about).expect("its fields are strings and numbers");
    let length = HEAD_BYTES + about.len() + payload.len();
    let parts = u16::try_from(length.div_ceil(STATE_VALUE_BYTES_MAX));
    let (Ok(parts), Ok(about_length)) = (parts, u32::try_from(about.len())) else {
        return Err(ParkedError::TooLarge { bytes: payload.len() });
    };
    let mut bytes = Vec::with_capacity(length);
    bytes.push(VERSION);
    bytes.extend(parts.to_be_bytes());
    bytes.extend(about_length.to_be_bytes());
    bytes.extend(about);
    bytes.extend(payload);
    Ok(bytes)
}

pub(super) fn parts_of(first: &[u8]) -> Option<u16> {
    match *first {
        [VERSION, high, low, _, _, _, _, ..] => Some(u16::from_be_bytes([high, low])),
        _ => None,
    }
}

pub(super) fn decode(bytes: Vec<u8>) -> Option<(ParkedAbout, Bytes)> {
    let mut payload = Bytes::from(bytes);
    let head = payload.split_to(HEAD_BYTES.min(payload.len()));
    let about_length = u32::from_be_bytes(head.get(3..HEAD_BYTES)?.try_into().ok()?) as usize;
    if about_length > payload.len() {
        return None;
    }
    let about = payload.split_to(about_length);
    Some((serde_json::from_slice(&about).ok()?, payload))
}

/// Bytes as base64 in JSON.
pub(super) mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::forward::parked) fn serialize<S: Serializer>(
        bytes: &Bytes,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(in crate::forward::parked) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Bytes::from).map_err(serde::de::Error::custom)
    }
}
