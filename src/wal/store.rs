//! The store below the log, and its implementation on sled: the only file that knows sled.
//!
//! # Layout
//! ```text
//! wal/000000000042/   one segment: a sled Db of its own (db, conf, snap.*, blobs/) and the marker READY
//! meta/               a small Db: the cursor
//! parked/             a small Db: dead letters
//! quarantine/         damaged segments, set aside
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
//! - Disk is reserved when a segment is prepared, so that a full disk shows there and not in a commit.
//! - sled needs free disk to open: on a full one it gets the `reserve`, or nothing could be delivered that would make room.
//! - Every call runs under `catch_unwind`: sled panics on some damage.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::error::StoreError;

const READY: &str = "READY";
const RESERVE: &str = "reserve";
/// sled's `segment_size` of a [`StateDb`].
const STATE_SLED_SEGMENT_BYTES: usize = 4 << 20;
/// Longest that sled's own threads may hold a closed Db.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);
/// Largest value of a [`StateDb`], in bytes; larger ones must be split by the caller.
pub const STATE_VALUE_BYTES_MAX: usize = 256 * 1024;

/// Sizes of a segment, all derived from `wal.segment_bytes`.
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
}

impl SegmentShape {
    /// The shape of segments of `segment_bytes`.
    pub fn new(segment_bytes: u64) -> SegmentShape {
        let sled_segment_bytes = (segment_bytes / 8).next_power_of_two().clamp(1 << 20, 8 << 20);
        SegmentShape {
            bytes_max: segment_bytes,
            slots: u32::try_from(segment_bytes / (16 << 10)).unwrap_or(u32::MAX).clamp(512, 4096),
            value_bytes_max: sled_segment_bytes as usize / 16,
            sled_segment_bytes: sled_segment_bytes as usize,
            reserved_bytes: segment_bytes + segment_bytes / 16 + sled_segment_bytes,
        }
    }
}

/// Where segments and small state live. Calls block.
pub trait Store: Send + Sync {
    /// Ids of the segments that were completely prepared, ascending.
    fn segments(&self) -> Result<Vec<u64>, StoreError>;
    /// Removes what is left of segments that were not completely prepared, or not completely removed.
    fn remove_unfinished(&self) -> Result<(), StoreError>;
    /// Ids of the segments set aside.
    fn quarantined(&self) -> Result<Vec<u64>, StoreError>;
    /// Makes a segment with empty slots. It is durable when this returns.
    fn prepare(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError>;
    /// Opens a segment, repairing what can be repaired without loss.
    fn open(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError>;
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
}

/// See [`Store::space`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Space {
    /// Disk taken by everything but segments, bytes.
    pub other_bytes: u64,
    /// Segments in quarantine.
    pub quarantined_segments: u64,
    /// Free on the file system, for an unprivileged process.
    pub free_bytes: u64,
}

/// One open segment. Slots are filled in order, once.
pub trait SegmentFile: Send + Sync {
    /// Fills a slot. Durable only after [`SegmentFile::sync`].
    fn write(&self, slot: u32, value: &[u8]) -> Result<(), StoreError>;
    /// Makes every write so far durable: it survives power loss once this has returned.
    fn sync(&self) -> Result<(), StoreError>;
    /// The value of a slot; empty if it was not filled.
    fn read(&self, slot: u32) -> Result<Bytes, StoreError>;
    /// Number of slots.
    fn slots(&self) -> u32;
}

/// Key and value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// A small durable map. Nothing is durable before [`StateDb::sync`] has returned.
pub trait StateDb: Send + Sync {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// Sets `key`. `value` holds at most [`STATE_VALUE_BYTES_MAX`] bytes.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;
    /// Removes `key`.
    fn remove(&self, key: &[u8]) -> Result<(), StoreError>;
    /// Up to `limit` entries with keys not below `from`, in the order of their keys.
    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<Entry>, StoreError>;
    /// The greatest key.
    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError>;
    /// Makes everything put and removed so far durable.
    fn sync(&self) -> Result<(), StoreError>;
}

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

    /// Holds disk back: opening fills up the last sled segment of two small maps and of a segment.
    fn hold_reserve(&self) -> Result<(), StoreError> {
        let bytes = (2 * STATE_SLED_SEGMENT_BYTES + self.shape.sled_segment_bytes + (1 << 20)) as u64;
        let file = File::options().create(true).truncate(false).write(true).open(self.directory.join(RESERVE));
        let file = file.map_err(StoreError::io("open reserve"))?;
        let missing = bytes.saturating_sub(blocks_bytes(&file.metadata().map_err(StoreError::io("measure reserve"))?));
        if missing > 0 && free_bytes(&self.directory)? < missing + self.shape.reserved_bytes {
            // What is free on a full disk is for those who have to write, and not to be taken by a reserve alone.
            return Err(StoreError::io("hold reserve")(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        reserve(&file, bytes)
    }

    fn open_db(path: &Path, sled_segment_bytes: usize) -> Result<sled::Db, StoreError> {
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

    fn remove_unfinished(&self) -> Result<(), StoreError> {
        for id in list(&self.wal())? {
            if !self.segment(id).join(READY).exists() {
                // Not only what is there: a marker whose removal was not durable could come back after a power loss.
                self.remove(id)?;
            }
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

    fn open(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        let path = self.segment(id);
        let (slots, sled_segment_bytes) = self.read_shape(&path)?;
        let db =
            open_by_ladder(&path, &self.directory.join(RESERVE), || SledStore::open_db(&path, sled_segment_bytes))?;
        Ok(Arc::new(SledSegment { slots, file: own_descriptor(&path)?, db: Some(db) }))
    }

    fn seal(&self, id: u64) -> Result<(), StoreError> {
        // Truncating to the present size frees the blocks that were reserved beyond it.
        let file = own_descriptor(&self.segment(id))?;
        let length = file.metadata().map_err(StoreError::io("measure segment"))?.len();
        file.set_len(length).map_err(StoreError::io("release reserved disk"))
    }

    fn remove(&self, id: u64) -> Result<(), StoreError> {
        let path = self.segment(id);
        // READY goes first and durably: a half-removed directory must not look like a segment.
        match fs::remove_file(path.join(READY)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove segment marker")(error));
            }
            _ => sync_directory(&path)?,
        }
        fs::remove_dir_all(&path).map_err(StoreError::io("remove segment"))
    }

    fn quarantine(&self, id: u64) -> Result<(), StoreError> {
        let target = self.directory.join("quarantine").join(format!("{id:012}"));
        fs::rename(self.segment(id), target).map_err(StoreError::io("quarantine segment"))?;
        sync_directory(&self.directory.join("quarantine"))?;
        sync_directory(&self.wal())
    }

    fn segment_bytes(&self, id: u64) -> Result<u64, StoreError> {
        disk_bytes(&self.segment(id)).map_err(StoreError::io("measure segment"))
    }

    fn space(&self) -> Result<Space, StoreError> {
        let mut space = Space { free_bytes: free_bytes(&self.directory)?, ..Space::default() };
        for name in ["meta", "parked", "quarantine"] {
            let used = disk_bytes(&self.directory.join(name));
            space.other_bytes += used.or_else(absent_is_default).map_err(StoreError::io("measure disk usage"))?;
        }
        let reserve = fs::metadata(self.directory.join(RESERVE)).map(|reserve| blocks_bytes(&reserve));
        space.other_bytes += reserve.or_else(absent_is_default).map_err(StoreError::io("measure disk usage"))?;
        space.quarantined_segments = self.quarantined()?.len() as u64;
        Ok(space)
    }

    fn state(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError> {
        Ok(Arc::new(SledState::open(self.directory.join(name), self.directory.join(RESERVE))?))
    }
}

impl SledStore {
    fn try_prepare(&self, path: &Path) -> Result<Arc<dyn SegmentFile>, StoreError> {
        fs::create_dir_all(path).map_err(StoreError::io("create segment"))?;
        let SegmentShape { slots, sled_segment_bytes, .. } = self.shape;
        let db = SledStore::open_db(path, sled_segment_bytes)?;
        let file = own_descriptor(path)?;
        reserve(&file, self.shape.reserved_bytes)?;
        guard("prepare slots", || {
            for slot in 0..slots {
                db.insert(key(slot), sled::IVec::default())?;
            }
            db.flush()
        })?;
        file.sync_all().map_err(StoreError::io("sync segment"))?;
        sync_conf(path)?;
        // Before there is a marker: it must not outlive a power loss that the names of the others do not.
        sync_directory(path)?;
        // The marker keeps the segment's shape, so that `wal.segment_bytes` may change while there is a backlog.
        let ready = File::create(path.join(READY)).and_then(|mut ready| {
            writeln!(ready, "{slots} {sled_segment_bytes}")?;
            ready.sync_all()
        });
        ready.map_err(StoreError::io("mark segment ready"))?;
        sync_directory(path)?;
        sync_directory(&self.wal())?;
        Ok(Arc::new(SledSegment { slots, file, db: Some(db) }))
    }

    /// Slots and sled's `segment_size` of a segment, from its marker; those of the configuration if that is damaged.
    fn read_shape(&self, path: &Path) -> Result<(u32, usize), StoreError> {
        let marker = fs::read_to_string(path.join(READY)).map_err(StoreError::io("read segment marker"))?;
        let mut numbers = marker.split_whitespace();
        let shape = (|| Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?)))();
        Ok(shape.unwrap_or((self.shape.slots, self.shape.sled_segment_bytes)))
    }
}

/// Numbers that name directories in `directory`, ascending.
fn list(directory: &Path) -> Result<Vec<u64>, StoreError> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(directory).map_err(StoreError::io("list segments"))? {
        let entry = entry.map_err(StoreError::io("list segments"))?;
        ids.extend(entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

struct SledSegment {
    slots: u32,
    file: File,
    /// Always present; taken by `drop`, because sled may panic there too.
    db: Option<sled::Db>,
}

impl SledSegment {
    fn db(&self) -> &sled::Db {
        self.db.as_ref().expect("taken by drop only")
    }
}

impl SegmentFile for SledSegment {
    fn write(&self, slot: u32, value: &[u8]) -> Result<(), StoreError> {
        guard("write slot", || self.db().insert(key(slot), value)).map(|_| ())
    }

    fn sync(&self) -> Result<(), StoreError> {
        guard("flush segment", || self.db().flush())?;
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
            close(db, &self.file);
        }
    }
}

/// A small map on sled. After an error its Db is opened anew, because sled keeps the error for good.
struct SledState {
    path: PathBuf,
    reserve: PathBuf,
    open: Mutex<Option<(sled::Db, File)>>,
}

impl SledState {
    fn open(path: PathBuf, reserve: PathBuf) -> Result<SledState, StoreError> {
        let existed = path.exists();
        fs::create_dir_all(&path).map_err(StoreError::io("create state directory"))?;
        let state = SledState { path, reserve, open: Mutex::new(None) };
        state.with("open state", |_| Ok(()))?;
        if !existed {
            state.sync()?;
            for synced in [state.path.as_path(), state.path.parent().expect("it is below wal.directory")] {
                sync_directory(synced)?;
            }
        }
        Ok(state)
    }

    fn with<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&(sled::Db, File)) -> sled::Result<T>,
    ) -> Result<T, StoreError> {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if open.is_none() {
            let try_open = || SledStore::open_db(&self.path, STATE_SLED_SEGMENT_BYTES);
            let db = open_by_ladder(&self.path, &self.reserve, try_open)?;
            sync_conf(&self.path)?;
            *open = Some((db, own_descriptor(&self.path)?));
        }
        let result = guard(operation, || call(open.as_ref().expect("opened above")));
        if result.is_err() {
            let (db, file) = open.take().expect("opened above");
            close(db, &file);
            if result.as_ref().is_err_and(StoreError::is_full) && fs::remove_file(&self.reserve).is_ok() {
                // The cursor must get on for segments to go.
                tracing::warn!("the disk is full, using up the reserve");
            }
        }
        result
    }
}

impl StateDb for SledState {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.with("read state", |(db, _)| Ok(db.get(key)?.map(|value| value.to_vec())))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        assert!(value.len() <= STATE_VALUE_BYTES_MAX, "a larger value would become an unsynced blob file");
        self.with("write state", |(db, _)| db.insert(key, value)).map(|_| ())
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.with("remove state", |(db, _)| db.remove(key)).map(|_| ())
    }

    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<Entry>, StoreError> {
        self.with("scan state", |(db, _)| {
            let entries = db.range(from.to_vec()..).take(limit);
            entries.map(|entry| entry.map(|(key, value)| (key.to_vec(), value.to_vec()))).collect()
        })
    }

    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.with("read state", |(db, _)| Ok(db.last()?.map(|(key, _)| key.to_vec())))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.with("sync state", |(db, file)| {
            db.flush()?;
            file.sync_data().map_err(sled::Error::from)
        })
    }
}

/// Opens a Db. The log in it is enough to recover everything: what else is damaged is removed, one after the other.
fn open_by_ladder(
    path: &Path,
    reserve: &Path,
    open: impl Fn() -> Result<sled::Db, StoreError>,
) -> Result<sled::Db, StoreError> {
    remove_files(path, |name| name.ends_with(".generating"))?;
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

/// Reads a file through. sled takes a read error for the end of its log, and overwrites what it believes to be free: a disk
/// that fails for a moment must not come to that.
fn check_readable(path: &Path) -> Result<(), StoreError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(StoreError::io("open segment file"))?,
    };
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).map_err(StoreError::io("read segment file"))? > 0 {}
    Ok(())
}

/// Closes a Db whose `db` file is `file`.
fn close(db: sled::Db, file: &File) {
    if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
        tracing::warn!("closing a database panicked");
    }
    // A thread of sled may hold the file, and the lock on it, for a moment longer: who opens it next must not meet that.
    let deadline = Instant::now() + CLOSE_TIME_MAX;
    while file.try_lock().is_err() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// sled never syncs the `conf` that it writes, and does not open a Db with half of one.
fn sync_conf(path: &Path) -> Result<(), StoreError> {
    File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(StoreError::io("sync conf"))
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

fn key(slot: u32) -> [u8; 8] {
    u64::from(slot).to_be_bytes()
}

fn own_descriptor(path: &Path) -> Result<File, StoreError> {
    let file = File::options().read(true).write(true).open(path.join("db"));
    file.map_err(StoreError::io("open segment file"))
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(StoreError::io("sync directory"))
}

/// Reserves disk without changing the file's size. A file system that cannot reserve is left to run full later.
fn reserve(file: &File, bytes: u64) -> Result<(), StoreError> {
    let bytes = libc::off_t::try_from(bytes).expect("a segment is limited to 256 MiB");
    // SAFETY: the descriptor is open for as long as `file` lives, and fallocate touches no memory of ours.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, bytes) };
    let error = io::Error::last_os_error();
    if result == 0 || matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
        return Ok(());
    }
    Err(StoreError::io("reserve disk for segment")(error))
}

fn remove_files(directory: &Path, matches: impl Fn(&str) -> bool) -> Result<(), StoreError> {
    for entry in fs::read_dir(directory).map_err(StoreError::io("list segment"))? {
        let entry = entry.map_err(StoreError::io("list segment"))?;
        if entry.file_name().to_str().is_some_and(&matches) {
            fs::remove_file(entry.path()).map_err(StoreError::io("remove segment file"))?;
        }
    }
    Ok(())
}

/// Disk taken by everything in `directory`.
fn disk_bytes(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        bytes += if metadata.is_dir() {
            disk_bytes(&entry.path()).or_else(absent_is_default)?
        } else {
            blocks_bytes(&metadata)
        };
    }
    Ok(bytes)
}

fn blocks_bytes(metadata: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    metadata.blocks() * 512
}

/// What vanished while it was measured takes no space.
fn absent_is_default<T: Default>(error: io::Error) -> io::Result<T> {
    if error.kind() == io::ErrorKind::NotFound { Ok(T::default()) } else { Err(error) }
}

fn free_bytes(path: &Path) -> Result<u64, StoreError> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("a path holds no NUL");
    // SAFETY: all zeroes are a valid statvfs, which the call fills in; the path is NUL-terminated.
    let (result, stat) = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut stat), stat)
    };
    if result != 0 {
        return Err(StoreError::io("measure free space")(io::Error::last_os_error()));
    }
    Ok(stat.f_bavail * stat.f_frsize)
}
