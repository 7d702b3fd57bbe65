//! The segments on sled: one Db each. See `store/mod.rs` for the rules.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;

use super::copies::quarantined_states;
use super::files::{
    absent_is_default, await_unlocked, blocks_bytes, disk_bytes, free_bytes, list, own_descriptor, reserve, settle,
    sync_conf, sync_directory,
};
use super::shards::ShardedState;
use super::state::SledState;
use super::{
    ActiveSegment, READY, RESERVE, Readable, STATE_SLED_SEGMENT_BYTES, SegmentFile, SegmentShape, Space, StateDb,
    Store, close, guard,
};
use crate::kill_point;
use crate::wal::closed::ClosedSegment;
use crate::wal::error::StoreError;
use crate::wal::search::{self, Unreadable};

/// Disk taken by a segment's directories, marker, `conf` and snapshot.
const SMALL_FILES_BYTES: u64 = 20 << 10;

/// The store on sled, in one directory.
pub struct SledStore {
    directory: PathBuf,
    shape: SegmentShape,
}

impl SledStore {
    /// Makes the directories that are missing, durably.
    pub fn new(directory: &Path, shape: SegmentShape) -> Result<SledStore, StoreError> {
        for name in ["wal", "quarantine"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(StoreError::io("create directory"))?;
        }
        sync_directory(directory)?;
        if let Some(parent) = directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_directory(parent)?;
        }
        Ok(SledStore { directory: directory.to_path_buf(), shape })
    }

    fn wal(&self) -> PathBuf {
        self.directory.join("wal")
    }

    fn segment(&self, id: u64) -> PathBuf {
        self.wal().join(format!("{id:012}"))
    }

    fn reserve(&self) -> PathBuf {
        self.directory.join(RESERVE)
    }

    fn file(&self, id: u64) -> PathBuf {
        self.segment(id).join("db")
    }

    /// Holds disk back: opening fills up the last sled segment of `meta`, and of two shards and the head of a larger map.
    fn hold_reserve(&self) -> Result<(), StoreError> {
        let bytes = (3 * STATE_SLED_SEGMENT_BYTES + (1 << 20)) as u64;
        let file = File::options().create(true).truncate(false).write(true).open(self.reserve());
        let file = file.map_err(StoreError::io("open reserve"))?;
        let held = blocks_bytes(&file.metadata().map_err(StoreError::io("measure reserve"))?);
        let missing = bytes.saturating_sub(held);
        if missing == 0 {
            return Ok(());
        }
        if free_bytes(&self.directory)? < missing + self.shape.reserved_bytes {
            // What is free on a full disk is for those who have to write, and not to be taken by a reserve alone.
            return Err(StoreError::io("hold reserve")(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        reserve(&file, bytes)
    }

    pub(super) fn open_db(path: &Path, sled_segment_bytes: usize) -> Result<sled::Db, StoreError> {
        let config = sled::Config::new()
            .path(path)
            .segment_size(sled_segment_bytes)
            .cache_capacity(2 * sled_segment_bytes as u64)
            .flush_every_ms(None);
        guard("open segment", || config.open())
    }
}

impl Store for SledStore {
    fn segments(&self) -> Result<Vec<u64>, StoreError> {
        let mut ids = list(&self.wal())?;
        ids.retain(|id| is_marked(&self.segment(*id)));
        Ok(ids)
    }

    fn remove_unfinished(&self, first_needed: u64) -> Result<(), StoreError> {
        for id in list(&self.wal())? {
            let path = self.segment(id);
            if is_marked(&path) {
                continue;
            }
            // Delivered segments lose their marker before they go, new ones get it before they are used. One that is still
            // needed and holds chunks has lost it to damage.
            if id >= first_needed && search::holds_chunks(&path.join("db"))? {
                tracing::warn!(segment = id, "segment has lost its marker, marking it anew");
                write_marker(&path)?;
                sync_directory(&path)?;
                continue;
            }
            // Not only what is there: a marker whose removal was not durable could come back after a power loss.
            self.remove(id)?;
        }
        Ok(())
    }

    fn quarantined(&self) -> Result<Vec<u64>, StoreError> {
        list(&self.directory.join("quarantine"))
    }

    fn quarantined_states(&self) -> Result<Vec<String>, StoreError> {
        quarantined_states(&self.directory)
    }

    fn prepare(&self, id: u64) -> Result<Arc<dyn ActiveSegment>, StoreError> {
        // No new segment before the next start is provided for.
        self.hold_reserve()?;
        let path = self.segment(id);
        let prepared = self.try_prepare(&path);
        if prepared.is_err() {
            // Without READY it is nothing; what stays behind now is removed at the next start.
            let _ = fs::remove_dir_all(&path);
        }
        prepared
    }

    fn settle(&self, id: u64) -> Result<(), StoreError> {
        settle(&self.file(id))
    }

    fn open(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        Ok(Arc::new(ClosedSegment::open(&self.file(id), Unreadable::Fails)?))
    }

    fn open_readable(&self, id: u64) -> Result<Readable, StoreError> {
        let path = self.file(id);
        let segment = ClosedSegment::open(&path, Unreadable::Zeroes)?;
        let (unread_bytes, hidden_bytes) = (segment.unread_bytes(), segment.hidden_bytes());
        let bytes = fs::metadata(path).map_err(StoreError::io("measure segment"))?.len();
        // The disk may be back by now.
        match self.open(id) {
            Ok(file) => Ok(Readable { file, unread_bytes: 0, hidden_bytes: 0 }),
            Err(error) if unread_bytes >= bytes => Err(error),
            Err(_) => Ok(Readable { file: Arc::new(segment), unread_bytes, hidden_bytes }),
        }
    }

    fn cut(&self, id: u64, from: u32) -> Result<(), StoreError> {
        ClosedSegment::cut(&self.file(id), from)
    }

    fn seal(&self, id: u64) -> Result<(), StoreError> {
        // Truncating to the present size frees the blocks that were reserved beyond it.
        let file = match own_descriptor(&self.segment(id)) {
            // One whose file is gone has nothing to give back. The reader sets it aside.
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let length = file.metadata().map_err(StoreError::io("measure segment"))?.len();
        kill_point::pass("seal.begin");
        file.set_len(length).map_err(StoreError::io("release reserved disk"))?;
        kill_point::pass("seal.end");
        Ok(())
    }

    fn remove(&self, id: u64) -> Result<(), StoreError> {
        let path = self.segment(id);
        if !path.exists() {
            return Ok(());
        }
        // READY goes first and durably: a half-removed directory must not look like a segment.
        kill_point::pass("trim.begin");
        remove_if_there(&path.join(READY)).map_err(StoreError::io("remove segment marker"))?;
        sync_directory(&path)?;
        kill_point::pass("trim.unmarked");
        remove_if_there(&path.join("db")).map_err(StoreError::io("remove segment"))?;
        kill_point::pass("trim.half_removed");
        fs::remove_dir_all(&path).map_err(StoreError::io("remove segment"))?;
        kill_point::pass("trim.end");
        Ok(())
    }

    fn quarantine(&self, id: u64) -> Result<(), StoreError> {
        let target = self.directory.join("quarantine").join(format!("{id:012}"));
        kill_point::pass("quarantine.begin");
        // It is there already if an earlier attempt could not be made durable.
        if self.segment(id).exists() || !target.exists() {
            fs::rename(self.segment(id), target).map_err(StoreError::io("quarantine segment"))?;
        }
        kill_point::pass("quarantine.renamed");
        sync_directory(&self.directory.join("quarantine"))?;
        sync_directory(&self.wal())
    }

    fn segment_bytes(&self, id: u64) -> Result<u64, StoreError> {
        // Not the whole directory: at start there may be a thousand of them.
        let file = fs::metadata(self.file(id)).map(|file| blocks_bytes(&file));
        Ok(SMALL_FILES_BYTES + file.or_else(absent_is_default).map_err(StoreError::io("measure segment"))?)
    }

    fn space(&self) -> Result<Space, StoreError> {
        let mut space = Space { free_bytes: free_bytes(&self.directory)?, ..Space::default() };
        for name in ["meta", "parked", "spill", "quarantine"] {
            let used = disk_bytes(&self.directory.join(name));
            space.other_bytes += used.or_else(absent_is_default).map_err(StoreError::io("measure disk usage"))?;
        }
        let reserve = fs::metadata(self.reserve()).map(|reserve| blocks_bytes(&reserve));
        space.other_bytes += reserve.or_else(absent_is_default).map_err(StoreError::io("measure disk usage"))?;
        space.quarantined_segments = self.quarantined()?.len() as u64;
        space.quarantined_stores = self.quarantined_states()?.len() as u64;
        Ok(space)
    }

    fn state(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError> {
        Ok(Arc::new(SledState::open(&self.directory, name)?))
    }

    fn shards(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError> {
        Ok(Arc::new(ShardedState::open(&self.directory, name, self.shape.shard_bytes)?))
    }
}

impl SledStore {
    fn try_prepare(&self, path: &Path) -> Result<Arc<dyn ActiveSegment>, StoreError> {
        fs::create_dir_all(path).map_err(StoreError::io("create segment"))?;
        kill_point::pass("prepare.directory");
        let SegmentShape { slots, sled_segment_bytes, .. } = self.shape;
        let db = SledStore::open_db(path, sled_segment_bytes)?;
        kill_point::pass("prepare.opened");
        let file = match own_descriptor(path) {
            Ok(file) => file,
            Err(error) => {
                close(db);
                return Err(error);
            }
        };
        // From here on it is closed by its own drop: sled's panics where it finds no room.
        let segment = SledSegment::new(path, slots, file, db);
        segment.with("prepare slots", |db, file| {
            reserve(file, self.shape.reserved_bytes)?;
            guard("prepare slots", || {
                for slot in 0..slots {
                    db.insert(key(slot), sled::IVec::default())?;
                }
                db.flush()
            })?;
            kill_point::pass("prepare.slots");
            file.sync_all().map_err(StoreError::io("sync segment"))
        })?;
        kill_point::pass("prepare.synced");
        sync_conf(path)?;
        // Before there is a marker: it must not outlive a power loss that the names of the others do not.
        sync_directory(path)?;
        write_marker(path)?;
        kill_point::pass("prepare.marked");
        sync_directory(path)?;
        sync_directory(&self.wal())?;
        Ok(Arc::new(segment))
    }
}

/// A marker holds nothing, so that there is never a part of it.
fn write_marker(path: &Path) -> Result<(), StoreError> {
    File::create(path.join(READY)).and_then(|ready| ready.sync_all()).map_err(StoreError::io("mark segment ready"))
}

/// Whether the segment in `path` was completely prepared, and not yet removed.
pub fn is_marked(path: &Path) -> bool {
    path.join(READY).exists()
}

/// What is gone already, because an earlier attempt was cut short, need not be removed.
fn remove_if_there(path: &Path) -> io::Result<()> {
    fs::remove_file(path).or_else(absent_is_default)
}

fn key(slot: u32) -> [u8; 8] {
    u64::from(slot).to_be_bytes()
}

/// The segment that takes records.
struct SledSegment {
    path: PathBuf,
    slots: u32,
    /// None: it is closed.
    open: RwLock<Option<(sled::Db, File)>>,
}

impl SledSegment {
    fn new(path: &Path, slots: u32, file: File, db: sled::Db) -> SledSegment {
        SledSegment { path: path.to_path_buf(), slots, open: RwLock::new(Some((db, file))) }
    }

    /// Does something with the Db and the descriptor of our own, unless they are closed.
    fn with<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&sled::Db, &File) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match &*self.open.read().unwrap_or_else(PoisonError::into_inner) {
            Some((db, file)) => call(db, file),
            None => Err(StoreError::io(operation)(io::Error::other("the segment is closed"))),
        }
    }

    fn drop_db(&self) {
        // Readers do not wait while sled tidies up.
        let open = self.open.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((db, _)) = open {
            close(db);
        }
    }
}

impl SegmentFile for SledSegment {
    fn read(&self, slot: u32) -> Result<Bytes, StoreError> {
        let operation = "read slot";
        let value = self.with(operation, |db, _| guard(operation, || db.get(key(slot))))?;
        // Every slot was there, empty, before the segment was ready.
        let missing = || StoreError::Sled { operation, message: "the slot is not there".to_owned() };
        value.map(Bytes::from_owner).ok_or_else(missing)
    }

    fn slots(&self) -> u32 {
        self.slots
    }

    fn is_closed(&self) -> bool {
        self.open.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

impl ActiveSegment for SledSegment {
    fn write(&self, slot: u32, value: &[u8]) -> Result<(), StoreError> {
        let operation = "write slot";
        self.with(operation, |db, _| guard(operation, || db.insert(key(slot), value))).map(|_| ())
    }

    fn flush(&self) -> Result<(), StoreError> {
        let operation = "flush segment";
        self.with(operation, |db, _| guard(operation, || db.flush())).map(|_| ())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let operation = "sync segment";
        self.with(operation, |_, file| file.sync_data().map_err(StoreError::io(operation)))
    }

    fn close(&self) -> Result<(), StoreError> {
        self.drop_db();
        if await_unlocked(&self.path)? {
            return Ok(());
        }
        Err(StoreError::io("close segment")(io::Error::new(io::ErrorKind::WouldBlock, "sled still holds its file")))
    }
}

impl Drop for SledSegment {
    fn drop(&mut self) {
        self.drop_db();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::{ChunkHeader, Totals, encode_chunk};

    #[test]
    fn a_closed_segment_can_be_cut_and_takes_nothing_more() {
        let directory = tempfile::tempdir().unwrap();
        let store = SledStore::new(directory.path(), SegmentShape::new(8 << 20)).unwrap();
        let segment = store.prepare(1).unwrap();
        let mut value = Vec::new();
        for slot in 0..3 {
            let sequence = 7 + u64::from(slot);
            let before = Totals { sequence, ..Totals::ZERO };
            encode_chunk(&ChunkHeader { before, records: 1, part: 0, parts: 1, unsynced: 0 }, b"body", &mut value);
            segment.write(slot, &value).unwrap();
        }
        assert!(!segment.is_closed());
        segment.close().unwrap();
        segment.close().unwrap();
        assert!(segment.is_closed());
        // Dropping it has handed all of it to the system, as sled may have done after a failure.
        let file = store.open(1).unwrap();
        assert_eq!((file.slots(), file.seek(0, 8)), (3, 1));
        store.cut(1, 1).unwrap();
        assert_eq!(store.open(1).unwrap().slots(), 1);
        assert!(segment.write(3, &value).is_err() && segment.flush().is_err());
        assert!(segment.sync().is_err() && segment.read(0).is_err());
        drop(segment);
        assert_eq!(store.open(1).unwrap().slots(), 1);
    }

    #[test]
    fn a_slot_that_is_not_there_is_not_an_empty_one() {
        let directory = tempfile::tempdir().unwrap();
        let store = SledStore::new(directory.path(), SegmentShape::new(8 << 20)).unwrap();
        drop(store.prepare(1).unwrap());
        let path = store.segment(1);
        super::super::await_unlocked(&path).unwrap();
        let db = SledStore::open_db(&path, store.shape.sled_segment_bytes).unwrap();
        db.remove(key(5)).unwrap();
        let segment = SledSegment::new(&path, store.shape.slots, own_descriptor(&path).unwrap(), db);
        assert!(segment.read(4).unwrap().is_empty());
        let missing = segment.read(5).expect_err("it was read as empty");
        assert!(missing.is_damage(), "{missing}");
    }
}
