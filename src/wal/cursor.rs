//! The durable cursor: the first undelivered record, and how far the log reached when it was saved.
//!
//! It may be stale (up to a second, or more if the disk fails): delivered records are then delivered again. The saved
//! tail is a high-water mark: if the log ends before it, committed records are missing, and sequences go on after it.
//!
//! ```text
//! version u8 │ segment u64 │ slot u32 │ cursor: sequence, events, bytes u64 │ tail: sequence, events, bytes u64 │ crc32c u32
//! ```

use bytes::{Buf, BufMut};

use super::checksum::{append_checksum, strip_checksum};
use super::error::StoreError;
use super::log::Position;
use super::record::Totals;
use super::store::StateDb;
use crate::kill_point;

const KEY: &[u8] = b"cursor";
const LOG_ID_KEY: &[u8] = b"log_id";
const PARKED_BEFORE_KEY: &[u8] = b"parked_before";
const VERSION: u8 = 1;
const BYTES: usize = 1 + 8 + 4 + 24 + 24 + 4;

/// Saves the cursor and the tail. Durable on return.
pub(super) fn save(meta: &dyn StateDb, cursor: Position, tail: Totals) -> Result<(), StoreError> {
    let mut value = Vec::with_capacity(BYTES);
    value.put_u8(VERSION);
    put_position(&mut value, cursor);
    put_totals(&mut value, tail);
    append_checksum(&mut value);
    kill_point::pass("cursor.begin");
    meta.put(KEY, &value)?;
    kill_point::pass("cursor.written");
    meta.sync()?;
    kill_point::pass("cursor.synced");
    Ok(())
}

/// The log's id; a new one if there is none yet. Durable on return.
pub(super) fn load_or_make_log_id(meta: &dyn StateDb) -> Result<String, StoreError> {
    if let Some(id) = meta.get(LOG_ID_KEY)?.and_then(|id| String::from_utf8(id).ok()) {
        return Ok(id);
    }
    let id = uuid::Uuid::new_v4().to_string();
    meta.put(LOG_ID_KEY, id.as_bytes())?;
    meta.sync()?;
    Ok(id)
}

/// The newest parked event that was there before this log was: `last_id` if that is asked for the first time. Durable on return.
pub(super) fn load_or_make_parked_before(meta: &dyn StateDb, last_id: u64) -> Result<u64, StoreError> {
    if let Some(id) = meta.get(PARKED_BEFORE_KEY)?.and_then(|value| value.try_into().ok()) {
        return Ok(u64::from_le_bytes(id));
    }
    meta.put(PARKED_BEFORE_KEY, &last_id.to_le_bytes())?;
    meta.sync()?;
    Ok(last_id)
}

/// The saved cursor and tail; none in a new log, or when what is there is not right.
pub(super) fn load(meta: &dyn StateDb) -> Result<Option<(Position, Totals)>, StoreError> {
    let Some(value) = meta.get(KEY)? else { return Ok(None) };
    let decoded = decode(&value);
    if decoded.is_none() {
        tracing::warn!("the saved cursor is damaged; everything still in the log is delivered again");
    }
    Ok(decoded)
}

fn decode(value: &[u8]) -> Option<(Position, Totals)> {
    if value.len() != BYTES || value[0] != VERSION {
        return None;
    }
    let mut rest = &strip_checksum(value)?[1..];
    Some((get_position(&mut rest), get_totals(&mut rest)))
}

/// Appends the 36 bytes of a position.
pub(super) fn put_position(value: &mut Vec<u8>, position: Position) {
    value.put_u64_le(position.segment);
    value.put_u32_le(position.slot);
    put_totals(value, position.totals);
}

fn put_totals(value: &mut Vec<u8>, totals: Totals) {
    [totals.sequence, totals.events, totals.bytes].into_iter().for_each(|number| value.put_u64_le(number));
}

/// Takes a position off the front of bytes that hold one.
pub(super) fn get_position(rest: &mut &[u8]) -> Position {
    let (segment, slot) = (rest.get_u64_le(), rest.get_u32_le());
    Position { segment, slot, totals: get_totals(rest) }
}

fn get_totals(rest: &mut &[u8]) -> Totals {
    Totals { sequence: rest.get_u64_le(), events: rest.get_u64_le(), bytes: rest.get_u64_le() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::memory::{MemoryStore, for_each_flip};
    use crate::wal::store::Store;

    #[test]
    fn a_damaged_cursor_is_not_believed() {
        let meta = MemoryStore::default().state("meta").unwrap();
        let meta = &*meta;
        let cursor = Position { segment: 3, slot: 4, totals: Totals { sequence: 5, events: 6, bytes: 7 } };
        let tail = Totals { sequence: 8, events: 9, bytes: 10 };
        assert_eq!(load(meta).unwrap(), None);
        save(meta, cursor, tail).unwrap();
        assert_eq!(load(meta).unwrap(), Some((cursor, tail)));
        for_each_flip(meta, KEY, |at| assert_eq!(load(meta).unwrap(), None, "byte {at}"));
    }
}
