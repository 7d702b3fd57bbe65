//! The segments on sled: one Db each. See `store/mod.rs` for the rules.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::files::{
    absent_is_default, blocks_bytes, disk_bytes, free_bytes, list, own_descriptor, reserve, settle, sync_conf,
    sync_directory,
};
use super::state::SledState;
use super::{
    DB_BEFORE, READY, RESERVE, SLOTS_MAX, STATE_SLED_SEGMENT_BYTES, SegmentFile, SegmentShape, Space, StateDb, Store,
    close, guard, open_by_ladder,
};
use crate::kill_point;
use crate::wal::checksum::crc32c;
use crate::wal::error::StoreError;
use crate::wal::salvage;

/// Disk taken by a segment's directories, marker, `conf` and snapshot.
const SMALL_FILES_BYTES: u64 = 20 << 10;

/// The store on sled, in one directory.
pub struct SledStore {
    directory: PathBuf,
    shape: SegmentShape,
}

/// The marker while it is written.
const READY_UNFINISHED: &str = "READY.new";

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

    /// Holds disk back: opening fills up the last sled segment of two small maps and of a segment.
    fn hold_reserve(&self) -> Result<(), StoreError> {
        let bytes = (2 * STATE_SLED_SEGMENT_BYTES + self.shape.sled_segment_bytes + (1 << 20)) as u64;
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
        ids.retain(|id| self.segment(*id).join(READY).exists());
        Ok(ids)
    }

    fn remove_unfinished(&self, first_needed: u64) -> Result<(), StoreError> {
        for id in list(&self.wal())? {
            let path = self.segment(id);
            if path.join(READY).exists() {
                continue;
            }
            // Delivered segments lose their marker before they go, new ones get it before they are used. One that is still
            // needed and holds chunks has lost it to damage.
            if id >= first_needed && salvage::holds_chunks(&path.join("db"))? {
                tracing::warn!(segment = id, "segment has lost its marker, marking it anew");
                write_marker(&path, "")?; // its shape is not known
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

    fn prepare(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
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

    fn is_blank(&self, id: u64) -> Result<bool, StoreError> {
        Ok(!salvage::holds_chunks(&self.segment(id).join("db"))?)
    }

    fn settle(&self, id: u64) -> Result<(), StoreError> {
        settle(&self.segment(id).join("db"))
    }

    fn open(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let path = self.segment(id);
        let (slots, sled_segment_bytes) = self.read_marker(&path)?;
        keep_damaged(&path)?;
        let open = || SledStore::open_db(&path, sled_segment_bytes);
        SledSegment::of(open_by_ladder(&path, &self.reserve(), open)?, &path, slots)
    }

    fn seal(&self, id: u64) -> Result<(), StoreError> {
        // Truncating to the present size frees the blocks that were reserved beyond it.
        let file = own_descriptor(&self.segment(id))?;
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
        fs::rename(self.segment(id), target).map_err(StoreError::io("quarantine segment"))?;
        kill_point::pass("quarantine.renamed");
        sync_directory(&self.directory.join("quarantine"))?;
        sync_directory(&self.wal())
    }

    fn segment_bytes(&self, id: u64) -> Result<u64, StoreError> {
        // Not the whole directory: at start there may be a thousand of them.
        let mut bytes = SMALL_FILES_BYTES;
        for name in ["db", DB_BEFORE] {
            let file = fs::metadata(self.segment(id).join(name)).map(|file| blocks_bytes(&file));
            bytes += file.or_else(absent_is_default).map_err(StoreError::io("measure segment"))?;
        }
        Ok(bytes)
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
        Ok(space)
    }

    fn state(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError> {
        Ok(Arc::new(SledState::open(&self.directory, name)?))
    }
}

impl SledStore {
    fn try_prepare(&self, path: &Path) -> Result<Arc<dyn SegmentFile>, StoreError> {
        fs::create_dir_all(path).map_err(StoreError::io("create segment"))?;
        kill_point::pass("prepare.directory");
        let SegmentShape { slots, sled_segment_bytes, .. } = self.shape;
        let db = SledStore::open_db(path, sled_segment_bytes)?;
        kill_point::pass("prepare.opened");
        let file = own_descriptor(path)?;
        reserve(&file, self.shape.reserved_bytes)?;
        guard("prepare slots", || {
            for slot in 0..slots {
                db.insert(key(slot), sled::IVec::default())?;
            }
            db.flush()
        })?;
        kill_point::pass("prepare.slots");
        file.sync_all().map_err(StoreError::io("sync segment"))?;
        kill_point::pass("prepare.synced");
        sync_conf(path)?;
        // Before there is a marker: it must not outlive a power loss that the names of the others do not.
        sync_directory(path)?;
        write_marker(path, &marker_line(slots, sled_segment_bytes))?;
        kill_point::pass("prepare.marked");
        sync_directory(path)?;
        sync_directory(&self.wal())?;
        Ok(Arc::new(SledSegment { slots, file, db: Some(db) }))
    }

    /// Slots and sled's `segment_size` of a segment, from its marker. If that is damaged: what sled's own note says.
    fn read_marker(&self, path: &Path) -> Result<(Option<u32>, usize), StoreError> {
        let marker = fs::read(path.join(READY)).map_err(StoreError::io("read segment marker"))?;
        let marked = parse_marker(&marker).map(|(slots, bytes)| (Some(slots), bytes));
        Ok(marked.unwrap_or_else(|| {
            tracing::warn!(segment = %path.display(), "segment marker is damaged");
            (None, conf_segment_bytes(path).unwrap_or(self.shape.sled_segment_bytes))
        }))
    }

    /// Where a segment is, or would be.
    pub fn segment_path(&self, id: u64) -> PathBuf {
        self.segment(id)
    }

    /// Opens a segment as it is, leaving nothing out.
    pub fn open_whole(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let path = self.segment(id);
        let (slots, sled_segment_bytes) = self.read_marker(&path)?;
        SledSegment::of(SledStore::open_db(&path, sled_segment_bytes)?, &path, slots)
    }
}

/// Copies the file of a segment that has lost a chunk: opening it may destroy the ones behind that.
fn keep_damaged(path: &Path) -> Result<(), StoreError> {
    let (db, copy) = (path.join("db"), path.join(DB_BEFORE));
    if copy.exists() || !salvage::has_gap(&db)? {
        return Ok(());
    }
    tracing::warn!(segment = %path.display(), "segment may be damaged, keeping a copy of it as it is");
    let unfinished = path.join(format!("{DB_BEFORE}.unfinished"));
    let keep = fs::copy(&db, &unfinished)
        .and_then(|_| File::open(&unfinished)?.sync_all())
        .and_then(|()| fs::rename(&unfinished, &copy));
    if keep.is_err() {
        // On a full disk half a copy would only take what is left.
        let _ = fs::remove_file(&unfinished);
    }
    keep.map_err(StoreError::io("keep a copy of a damaged segment"))?;
    sync_directory(path)
}

/// Of a segment's marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkerState {
    /// As it was written.
    Good,
    /// Not there: the segment was not completely prepared, or was being removed, or lost it.
    Missing,
    /// Not as it was written.
    Damaged,
}

impl MarkerState {
    /// Of the segment in `path`.
    pub fn of(path: &Path) -> Result<MarkerState, StoreError> {
        match fs::read(path.join(READY)) {
            Ok(marker) if parse_marker(&marker).is_some() => Ok(MarkerState::Good),
            Ok(_) => Ok(MarkerState::Damaged),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(MarkerState::Missing),
            Err(error) => Err(StoreError::io("read segment marker")(error)),
        }
    }
}

/// Slots, and sled's `segment_size`, of a marker that is as it was written.
fn parse_marker(marker: &[u8]) -> Option<(u32, usize)> {
    let marker = str::from_utf8(marker).ok()?;
    let mut words = marker.split_whitespace();
    let (slots, bytes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (marker == marker_line(slots, bytes)).then_some((slots, bytes))
}

/// There is never a part of it: a kill in between would look like damage.
fn write_marker(path: &Path, line: &str) -> Result<(), StoreError> {
    let unfinished = path.join(READY_UNFINISHED);
    let write = File::create(&unfinished).and_then(|mut ready| {
        ready.write_all(line.as_bytes())?;
        ready.sync_all()?;
        fs::rename(&unfinished, path.join(READY))
    });
    write.map_err(StoreError::io("mark segment ready"))
}

/// Slots, sled's `segment_size`, and a CRC-32C of both: the marker keeps the segment's shape, so that `wal.segment_bytes`
/// may change while there is a backlog.
fn marker_line(slots: u32, sled_segment_bytes: usize) -> String {
    let shape = format!("{slots} {sled_segment_bytes}");
    format!("{shape} {:08x}\n", crc32c(&[shape.as_bytes()]))
}

/// The `segment_size` that sled noted in its `conf`: with another one it would take the log for rubbish and empty it.
fn conf_segment_bytes(path: &Path) -> Option<usize> {
    let conf = fs::read(path.join("conf")).ok()?;
    let line = conf.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"segment_size: "))?;
    let bytes: usize = str::from_utf8(line).ok()?.parse().ok()?;
    SegmentShape::is_sled_segment_bytes(bytes).then_some(bytes)
}

/// What is gone already, because an earlier attempt was cut short, need not be removed.
fn remove_if_there(path: &Path) -> io::Result<()> {
    fs::remove_file(path).or_else(absent_is_default)
}

fn key(slot: u32) -> [u8; 8] {
    u64::from(slot).to_be_bytes()
}

/// The slot of a key; the last one there may be if it is none.
fn slot(key: &[u8]) -> u32 {
    let last = u64::from(SLOTS_MAX) - 1;
    key.try_into().map_or(last, u64::from_be_bytes).min(last) as u32
}

struct SledSegment {
    slots: u32,
    file: File,
    /// Always present; taken by `drop`, because sled may panic there too.
    db: Option<sled::Db>,
}

impl SledSegment {
    /// The open segment in `path`. If it is not known how many slots it has: all were inserted when it was prepared.
    fn of(db: sled::Db, path: &Path, slots: Option<u32>) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let count = || Ok(guard("count slots", || db.last())?.map_or(0, |(last, _)| slot(&last) + 1));
        let slots = slots.map_or_else(count, Ok)?;
        Ok(Arc::new(SledSegment { slots, file: own_descriptor(path)?, db: Some(db) }))
    }

    fn db(&self) -> &sled::Db {
        self.db.as_ref().expect("taken by drop only")
    }
}

impl SegmentFile for SledSegment {
    fn write(&self, slot: u32, value: &[u8]) -> Result<(), StoreError> {
        guard("write slot", || self.db().insert(key(slot), value)).map(|_| ())
    }

    fn flush(&self) -> Result<(), StoreError> {
        guard("flush segment", || self.db().flush()).map(|_| ())
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(StoreError::io("sync segment"))
    }

    fn read(&self, slot: u32) -> Result<Bytes, StoreError> {
        let operation = "read slot";
        let value = guard(operation, || self.db().get(key(slot)))?;
        // Every slot was there, empty, before the segment was ready.
        let missing = || StoreError::Sled { operation, message: "the slot is not there".to_owned() };
        value.map(Bytes::from_owner).ok_or_else(missing)
    }

    fn slots(&self) -> u32 {
        self.slots
    }
}

impl Drop for SledSegment {
    fn drop(&mut self) {
        if let Some(db) = self.db.take() {
            close(db);
        }
    }
}
