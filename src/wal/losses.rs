//! The ledger of losses: which committed records a reader could not find, kept in `meta` until they are repaired or
//! struck off by the operator.
//!
//! ```text
//! key    "loss" │ first sequence u64, big-endian
//! value  version u8 │ end sequence u64 │ events u64 │ segment u64 │ found at ms u64 │ crc32c u32
//! ```

use bytes::{Buf, BufMut};
use serde::{Deserialize, Serialize};

use super::checksum::{append_checksum, strip_checksum};
use super::error::StoreError;
use super::scan::for_each_with_prefix;
use super::store::StateDb;
use crate::kill_point;

const PREFIX: &[u8] = b"loss";
const VERSION: u8 = 1;
const BYTES: usize = 1 + 4 * 8 + 4;

/// Committed records that are not in the log any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The first of them.
    pub first_sequence: u64,
    /// The one after the last.
    pub end_sequence: u64,
    /// How many events they held.
    pub events: u64,
    /// A segment that they were in; the one in which they were missed if theirs is gone.
    pub segment: u64,
    /// When they were missed, milliseconds since the Unix epoch.
    pub found_at_ms: u64,
}

/// Adds a loss to the ledger, or replaces the one that begins at the same record. Durable with the next sync of `meta`.
pub(super) fn put(meta: &dyn StateDb, loss: &Loss) -> Result<(), StoreError> {
    let mut value = Vec::with_capacity(BYTES);
    value.put_u8(VERSION);
    for number in [loss.end_sequence, loss.events, loss.segment, loss.found_at_ms] {
        value.put_u64_le(number);
    }
    append_checksum(&mut value);
    meta.put(&key(loss.first_sequence), &value)?;
    kill_point::pass("losses.written");
    Ok(())
}

/// Strikes a loss off the ledger. Durable with the next sync of `meta`.
pub(super) fn remove(meta: &dyn StateDb, loss: &Loss) -> Result<(), StoreError> {
    meta.remove(&key(loss.first_sequence))
}

/// The losses in the ledger, by sequence. One that does not decode is passed over with a warning.
pub(super) fn load(meta: &dyn StateDb) -> Result<Vec<Loss>, StoreError> {
    let mut losses = Vec::new();
    for_each_with_prefix(meta, PREFIX, |first_sequence, value| match decode(first_sequence, value) {
        Some(loss) => losses.push(loss),
        None => tracing::warn!("an entry in the ledger of losses is damaged"),
    })?;
    Ok(losses)
}

fn key(first_sequence: u64) -> Vec<u8> {
    [PREFIX, &first_sequence.to_be_bytes()].concat()
}

fn decode(first_sequence: &[u8], value: &[u8]) -> Option<Loss> {
    if value.len() != BYTES || value[0] != VERSION {
        return None;
    }
    let mut rest = &strip_checksum(value)?[1..];
    Some(Loss {
        first_sequence: u64::from_be_bytes(first_sequence.try_into().ok()?),
        end_sequence: rest.get_u64_le(),
        events: rest.get_u64_le(),
        segment: rest.get_u64_le(),
        found_at_ms: rest.get_u64_le(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::memory::MemoryStore;
    use crate::wal::store::Store;

    #[test]
    fn the_ledger_keeps_what_is_put_into_it() {
        let meta = MemoryStore::default().state("meta").unwrap();
        let loss =
            |first| Loss { first_sequence: first, end_sequence: first + 3, events: 9, segment: 2, found_at_ms: 7 };
        meta.put(b"cursor", b"x").unwrap();
        meta.put(b"lost and found", b"x").unwrap();
        for first in (0..600).rev() {
            put(&*meta, &loss(first)).unwrap();
        }
        remove(&*meta, &loss(300)).unwrap();
        meta.put(&key(301), b"damaged").unwrap();
        let expected: Vec<Loss> = (0..600).filter(|first| ![300, 301].contains(first)).map(loss).collect();
        assert_eq!(load(&*meta).unwrap(), expected);
    }
}
