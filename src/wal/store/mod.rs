//! The store below the log, and its implementation on sled: the only folder that knows sled.
//!
//! # Layout
//! ```text
//! wal/000000000042/   one segment: a sled Db of its own (db, conf, snap.*, blobs/) and the marker READY
//! meta/               a small Db: the cursor, the ledger of losses, the dedup window
//! parked/000000000001/  dead letters: small Dbs, of which few are open (`shards.rs`)
//! quarantine/         what was damaged, set aside: segments under their number, small Dbs as meta-1, parked-1, …
//! reserve             disk held back for a start on a full disk
//! ```
//!
//! # Why sled is used this way (0.34.7, pinned: the rules rest on its internals)
//! - `flush()` hands bytes to the page cache only (`sync_file_range`), so [`SegmentFile::sync`] also calls `fdatasync` on a
//!   descriptor of our own.
//! - A segment's keys ("slots", 0, 1, 2, …) are inserted empty when it is prepared: sequential inserts leave 8 keys a leaf,
//!   below the 16 that split one, and filling 8 slots adds fewer than the 10 fragments that rewrite one. So each value is
//!   written once, inline in sled's log, and none becomes a blob file (whose durability sled does not order).
//! - A value above a quarter of sled's `segment_size` would become a blob file all the same: see [`SegmentShape`].
//! - Disk is reserved when a segment is prepared, so that a full disk shows there, and in a commit only where a file system
//!   or a quota does not keep to that (`wal/abandoned/`).
//! - Opening a Db changes it: behind a damaged message, or one that the disk failed to read for a moment, sled fills the file
//!   with zeroes, good messages included. So sled only writes segments; closed ones are read without it (`wal/closed.rs`).
//! - sled needs free disk to open the small Dbs: on a full one it gets the `reserve`, or nothing could be delivered that would
//!   make room.
//! - sled needs memory in proportion to what a Db holds: what may become large is spread over many.
//! - Every call runs under `catch_unwind`: sled panics on some damage.
//!
//! `segments.rs` holds the segments, `state.rs` the small Dbs, `shards.rs` maps of many of them and `old_layout.rs` what those
//! were before, `files.rs` what all need of the file system, `copies.rs` what looks at a log without changing it.

mod copies;
mod files;
mod old_layout;
mod segments;
mod shards;
mod state;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::error::StoreError;
pub(super) use copies::{copy_directory, open_shards, open_state, quarantined_states, segment_directories};
use files::{await_unlocked, check_readable, remove_files};
pub(super) use files::{make_directory, wait_to_read_again};
pub(super) use old_layout::old_name;
pub use segments::SledStore;
pub(super) use segments::is_marked;

/// Largest value of a [`StateDb`], in bytes; larger ones must be split by the caller. A leaf of sled's tree holds up to 17
/// and is now and then written as one piece, which must stay below a quarter of sled's `segment_size` (see `state.rs`).
pub const STATE_VALUE_BYTES_MAX: usize = 48 * 1024;
/// sled's `segment_size` of a [`StateDb`].
const STATE_SLED_SEGMENT_BYTES: usize = 4 << 20;
/// Marks what was made completely, and durably.
const READY: &str = "READY";
/// Disk held back for a start on a full disk.
const RESERVE: &str = "reserve";
/// Most slots of a segment.
const SLOTS_MAX: u32 = 4096;
/// Most bytes of values in a shard, but for those of its last id.
const SHARD_BYTES_MAX: u64 = 16 << 20;
/// Bounds of sled's `segment_size`.
const SLED_SEGMENT_BYTES_MIN: u64 = 1 << 20;
const SLED_SEGMENT_BYTES_MAX: u64 = 8 << 20;

/// Sizes of a segment and of a shard, all derived from `wal.segment_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentShape {
    /// Most bytes of values.
    pub bytes_max: u64,
    /// Number of slots.
    pub slots: u32,
    /// Largest value of one slot: a sixteenth of sled's segment, so that little of one is left over, and far below the
    /// quarter at which sled makes blob files.
    pub value_bytes_max: usize,
    /// sled's own `segment_size`.
    pub sled_segment_bytes: usize,
    /// Disk reserved for the segment: its values, and what sled writes around them.
    pub reserved_bytes: u64,
    /// A shard of a map that may become large is full with so many bytes of values (`shards.rs`).
    pub shard_bytes: u64,
}

impl SegmentShape {
    /// The shape of segments of `segment_bytes`.
    pub fn new(segment_bytes: u64) -> SegmentShape {
        let sled_segment_bytes =
            (segment_bytes / 8).next_power_of_two().clamp(SLED_SEGMENT_BYTES_MIN, SLED_SEGMENT_BYTES_MAX);
        SegmentShape {
            bytes_max: segment_bytes,
            slots: u32::try_from(segment_bytes / (16 << 10)).unwrap_or(u32::MAX).clamp(512, SLOTS_MAX),
            value_bytes_max: sled_segment_bytes as usize / 16,
            sled_segment_bytes: sled_segment_bytes as usize,
            reserved_bytes: segment_bytes + segment_bytes / 16 + sled_segment_bytes,
            shard_bytes: (segment_bytes / 2).min(SHARD_BYTES_MAX),
        }
    }
}

/// Where segments and small state live. Calls block.
pub trait Store: Send + Sync {
    /// Ids of the segments that were completely prepared, ascending.
    fn segments(&self) -> Result<Vec<u64>, StoreError>;
    /// Removes what is left of segments that were not completely prepared, or not completely removed. `first_needed` is
    /// the first one that the cursor has not left.
    fn remove_unfinished(&self, first_needed: u64) -> Result<(), StoreError>;
    /// Ids of the segments set aside.
    fn quarantined(&self) -> Result<Vec<u64>, StoreError>;
    /// Names of the small Dbs set aside: that of the map, and a number.
    fn quarantined_states(&self) -> Result<Vec<String>, StoreError>;
    /// Makes a segment with empty slots. It is durable when this returns.
    fn prepare(&self, id: u64) -> Result<Arc<dyn ActiveSegment>, StoreError>;
    /// Makes what the last process wrote to a segment durable, before it is believed. The segment is not open.
    fn settle(&self, id: u64) -> Result<(), StoreError>;
    /// Opens a segment that takes no more records. Changes nothing in it.
    fn open(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError>;
    /// The same, for what can be read of a segment that the disk does not read as a whole. Fails if that is nothing: then the
    /// disk is gone, perhaps for a moment.
    fn open_readable(&self, id: u64) -> Result<Readable, StoreError>;
    /// Takes away what the slots from `from` on hold, of a segment that is not open: nobody got an ack for it. Durable when
    /// this returns.
    fn cut(&self, id: u64, from: u32) -> Result<(), StoreError>;
    /// Gives back the disk that was reserved for a segment and not used. No write may follow.
    fn seal(&self, id: u64) -> Result<(), StoreError>;
    /// Removes a segment that is not open.
    fn remove(&self, id: u64) -> Result<(), StoreError>;
    /// Sets a segment that is not open aside.
    fn quarantine(&self, id: u64) -> Result<(), StoreError>;
    /// Disk taken by one segment, in bytes.
    fn segment_bytes(&self, id: u64) -> Result<u64, StoreError>;
    /// Disk taken by everything but segments, bytes; segments in quarantine; and bytes free on the file system.
    fn space(&self) -> Result<Space, StoreError>;
    /// Opens or makes a small map.
    fn state(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError>;
    /// Opens or makes a map that may become large. Keys begin with an id (u64 big-endian, from 1 on), or are shorter than one.
    /// Damage in it shows in [`StateDb::visit`].
    fn shards(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError>;
}

/// See [`Store::open_readable`].
pub struct Readable {
    /// The segment; what is not read counts as zeroes.
    pub file: Arc<dyn SegmentFile>,
    /// How many bytes are not read. 0: the disk is back.
    pub unread_bytes: u64,
    /// How many bytes may belong to chunks of which not all is read.
    pub hidden_bytes: u64,
}

/// See [`Store::space`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Space {
    /// Disk taken by everything but segments, bytes.
    pub other_bytes: u64,
    /// Segments in quarantine.
    pub quarantined_segments: u64,
    /// Small Dbs in quarantine.
    pub quarantined_stores: u64,
    /// Free on the file system, for an unprivileged process.
    pub free_bytes: u64,
}

/// An open segment, to read.
pub trait SegmentFile: Send + Sync {
    /// The value of a slot; empty if it was not filled.
    fn read(&self, slot: u32) -> Result<Bytes, StoreError>;
    /// Number of slots.
    fn slots(&self) -> u32;
    /// Whether it was closed ([`ActiveSegment::close`]) under its reader, who is to open it anew.
    fn is_closed(&self) -> bool {
        false
    }
    /// The slot to read on from: `slot`, unless the slots may have moved since that was noted. Then the one after all that end
    /// at or before `sequence`.
    fn seek(&self, slot: u32, _sequence: u64) -> u32 {
        slot
    }
}

/// A segment that takes records. Slots are filled in order, once.
pub trait ActiveSegment: SegmentFile {
    /// Fills a slot. Durable only after [`ActiveSegment::flush`] and [`ActiveSegment::sync`].
    fn write(&self, slot: u32, value: &[u8]) -> Result<(), StoreError>;
    /// Hands every write so far to the operating system. For a thread other than the one that syncs.
    fn flush(&self) -> Result<(), StoreError>;
    /// Makes everything flushed before the call durable: it survives power loss once this has returned.
    fn sync(&self) -> Result<(), StoreError>;
    /// Lets go of the segment: no write comes to it any more once this has returned, and every later call fails. Try again after
    /// an error.
    fn close(&self) -> Result<(), StoreError>;
}

/// Key and value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// A small durable map. Nothing is durable before [`StateDb::sync`] has returned.
pub trait StateDb: Send + Sync {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// Sets `key`. `value` holds at most [`STATE_VALUE_BYTES_MAX`] bytes.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;
    /// Removes `key`. Of a map that may become large: from an id's entries only once all that stands under no id is durable.
    fn remove(&self, key: &[u8]) -> Result<(), StoreError>;
    /// Up to `limit` entries with keys not below `from`, in the order of their keys.
    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<Entry>, StoreError>;
    /// Shows every entry, in the order of their keys. Nothing else gets at the map meanwhile. False: a part turned out to be
    /// damaged and is set aside now, and some of what was shown with it. Then visit what is left.
    fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<bool, StoreError>;
    /// The greatest key; or, if that is greater, the last id that is known to have been there.
    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError>;
    /// Makes everything put and removed so far durable.
    fn sync(&self) -> Result<(), StoreError>;
    /// How often something failed, a read included, so that what had not been synced before may be lost.
    fn reopened(&self) -> u64;
    /// Something is missing that sled does not miss, and what is put there next may go the same way, also in a later life: of a
    /// map that may become large, new ids have another part for good. `next` is above all ids that are known to have been there;
    /// gives the first id to give out now, which is not below. Durable on return. An error changes nothing.
    fn leave_newest(&self, next: u64) -> Result<u64, StoreError> {
        Ok(next)
    }
}

/// Opens a Db. sled's log alone recovers everything, so what else is damaged is left out, one after the other: an unfinished
/// snapshot (left by a kill or a full disk) and a damaged snapshot or `conf` would make every later open fail.
fn open_by_ladder(
    path: &Path,
    reserve: &Path,
    open: impl Fn() -> Result<sled::Db, StoreError>,
) -> Result<sled::Db, StoreError> {
    remove_files(path, |name| name.ends_with(".generating"))?;
    await_unlocked(path)?;
    check_readable(&path.join("db"))?;
    let mut db = open();
    if db.as_ref().is_err_and(StoreError::is_full) && fs::remove_file(reserve).is_ok() {
        tracing::warn!(path = %path.display(), "the disk is full, using up the reserve to open");
        remove_files(path, |name| name.ends_with(".generating"))?;
        db = open();
    }
    for (what, prefix) in [("snapshot", "snap."), ("conf", "conf")] {
        let Err(error) = &db else { break };
        if !error.is_damage() {
            break;
        }
        tracing::warn!(path = %path.display(), %error, "does not open, trying without its {what}");
        remove_files(path, |name| name.starts_with(prefix))?;
        db = open();
    }
    db
}

/// Closes a Db.
fn close(db: sled::Db) {
    if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
        tracing::warn!("closing a database panicked");
    }
}

/// Runs a call of sled, turning its errors and panics into ours.
fn guard<T>(operation: &'static str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(source))) => Err(StoreError::Io { operation, source }),
        Ok(Err(error)) => Err(StoreError::Sled { operation, message: error.to_string() }),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(StoreError::Panicked { operation, message: message.unwrap_or_default() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It may be that of a damaged file.
    #[test]
    fn a_panic_of_sled_is_an_error() {
        let error = guard("read state", || -> sled::Result<()> { panic!("as sled may") }).unwrap_err();
        assert!(error.is_damage(), "{error:?}");
        assert!(matches!(error, StoreError::Panicked { message, .. } if message == "as sled may"));
    }
}
