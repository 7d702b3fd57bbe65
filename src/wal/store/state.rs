//! The small maps on sled.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::files::{own_descriptor, reserve, settle, sync_conf, sync_directory};
use super::segments::SledStore;
use super::{
    Entry, READY, RESERVE, STATE_SLED_SEGMENT_BYTES, STATE_VALUE_BYTES_MAX, StateDb, close, guard, open_by_ladder,
};
use crate::wal::error::StoreError;

/// Name of the tree, key and value that show that a Db was not emptied.
const MARK: &str = "mark";

/// What a map is like that has lost its mark.
fn emptied() -> StoreError {
    StoreError::Sled { operation: "read state", message: "sled shows none of what was in it".to_owned() }
}

/// A small map on sled. After an error its Db is opened anew, because sled keeps the error for good.
pub(super) struct SledState {
    path: PathBuf,
    reserve: PathBuf,
    sled_segment_bytes: usize,
    open: Mutex<Option<(sled::Db, File)>>,
    /// Shared by the shards of one map.
    reopened: Arc<AtomicU64>,
    /// Something failed: what the page cache shows may not be on the disk.
    distrusted: AtomicBool,
}

impl SledState {
    /// Opens the map called `name`, or makes a new one. One that cannot be read is set aside, and a new one made.
    pub(super) fn open(directory: &Path, name: &str) -> Result<SledState, StoreError> {
        let path = directory.join(name);
        let reserve = directory.join(RESERVE);
        match SledState::open_whole(&path, &reserve) {
            Err(error) if error.is_damage() => {
                let aside = set_aside(directory, name, &path)?;
                tracing::error!(%error, aside = %aside.display(), "{name} is damaged, set aside; it begins anew");
                SledState::open_whole(&path, &reserve)
            }
            state => state,
        }
    }

    pub(super) fn open_whole(path: &Path, reserve: &Path) -> Result<SledState, StoreError> {
        let state = SledState::new(path, reserve, STATE_SLED_SEGMENT_BYTES, Arc::default());
        // Damage shows now, while it can be set aside, and not when the service rests on it.
        state.read_through(&mut |_, _| {})?;
        Ok(state)
    }

    /// The map in `path`, which is opened when it is used first. `reopened` counts what [`StateDb::reopened`] says.
    pub(super) fn new(path: &Path, reserve: &Path, sled_segment_bytes: usize, reopened: Arc<AtomicU64>) -> SledState {
        let (path, reserve) = (path.to_path_buf(), reserve.to_path_buf());
        let (open, distrusted) = (Mutex::new(None), AtomicBool::new(false));
        SledState { path, reserve, sled_segment_bytes, open, reopened, distrusted }
    }

    /// Shows every entry of a map that the last process left, in the order of their keys, and makes a new one if there is
    /// none. Fails if anything in it is damaged.
    pub(super) fn read_through(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        let path = &self.path;
        fs::create_dir_all(path).map_err(StoreError::io("create state directory"))?;
        settle(&path.join("db"))?;
        self.visit(see)?;
        if path.join(READY).exists() {
            return self.check_marked();
        }
        self.with("mark state", |(db, _)| db.open_tree(MARK)?.insert(MARK, MARK))?;
        self.sync()?;
        sync_directory(path)?;
        sync_directory(path.parent().expect("it is below wal.directory"))?;
        let ready = File::create(path.join(READY)).and_then(|ready| ready.sync_all());
        ready.map_err(StoreError::io("mark state ready"))?;
        sync_directory(path)
    }

    /// Fails if the Db no longer holds what was put into it first of all. sled takes a log with a damaged beginning for an
    /// empty one, and says nothing.
    pub(super) fn check_marked(&self) -> Result<(), StoreError> {
        let is_marked = self.with("read state", |(db, _)| {
            Ok(db.tree_names().iter().any(|name| **name == *MARK.as_bytes())
                && db.open_tree(MARK)?.contains_key(MARK)?)
        })?;
        if is_marked { Ok(()) } else { Err(emptied()) }
    }

    /// Makes the next open go by what is on the disk. For one that is not open.
    pub(super) fn distrust(&self) {
        self.distrusted.store(true, Ordering::SeqCst);
    }

    /// Shows every entry, in the order of their keys.
    pub(super) fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        self.with("read state", |(db, _)| db.iter().try_for_each(|entry| entry.map(|(key, value)| see(&key, &value))))
    }

    /// Takes the disk that the next open fills up of the log. The snapshot that it may write is small.
    pub(super) fn provide_for_open(&self) -> Result<(), StoreError> {
        let file = own_descriptor(&self.path)?;
        let bytes = file.metadata().map_err(StoreError::io("measure state file"))?.len();
        reserve(&file, bytes.next_multiple_of(self.sled_segment_bytes as u64))
    }

    pub(super) fn with<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&(sled::Db, File)) -> sled::Result<T>,
    ) -> Result<T, StoreError> {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if open.is_none() {
            if self.distrusted.load(Ordering::SeqCst) {
                settle(&self.path.join("db"))?;
                self.distrusted.store(false, Ordering::SeqCst);
            }
            let try_open = || SledStore::open_db(&self.path, self.sled_segment_bytes);
            let db = open_by_ladder(&self.path, &self.reserve, try_open)?;
            sync_conf(&self.path)?;
            *open = Some((db, own_descriptor(&self.path)?));
        }
        let result = guard(operation, || call(open.as_ref().expect("opened above")));
        if result.is_err() {
            let (db, _) = open.take().expect("opened above");
            self.reopened.fetch_add(1, Ordering::SeqCst);
            self.distrust();
            close(db);
            if result.as_ref().is_err_and(StoreError::is_full) && fs::remove_file(&self.reserve).is_ok() {
                // The cursor must get on for segments to go.
                tracing::warn!("the disk is full, using up the reserve");
            }
        }
        result
    }
}

/// Moves what is in `path` into the quarantine of `directory`, as the map called `name`, under the first free number.
pub(super) fn set_aside(directory: &Path, name: &str, path: &Path) -> Result<PathBuf, StoreError> {
    let quarantine = directory.join("quarantine");
    let free = |number: &u32| !quarantine.join(format!("{name}-{number}")).exists();
    let target = quarantine.join(format!("{name}-{}", (1..).find(free).expect("there is always a next number")));
    fs::rename(path, &target).map_err(StoreError::io("set state aside"))?;
    sync_directory(&quarantine)?;
    sync_directory(path.parent().expect("it is below wal.directory"))?;
    Ok(target)
}

impl Drop for SledState {
    fn drop(&mut self) {
        let open = self.open.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((db, _)) = open.take() {
            close(db);
        }
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

    fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<bool, StoreError> {
        SledState::visit(self, see).map(|()| true)
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

    fn reopened(&self) -> u64 {
        self.reopened.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A closed map in which "key" has "value".
    fn with_one_entry(name: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("quarantine")).unwrap();
        let state = SledState::open(directory.path(), name).unwrap();
        state.put(b"key", b"value").unwrap();
        state.sync().unwrap();
        directory
    }

    /// sled's log alone recovers everything.
    #[test]
    fn a_damaged_snapshot_or_conf_costs_nothing() {
        let directory = with_one_entry("meta");
        let open = || SledState::open(directory.path(), "meta").unwrap();
        for damaged in ["snap.", "conf"] {
            // Whichever was removed is there again.
            drop(open());
            let files = fs::read_dir(directory.path().join("meta")).unwrap().map(|file| file.unwrap().path());
            let is_damaged = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(damaged);
            let files: Vec<PathBuf> = files.filter(is_damaged).collect();
            assert!(!files.is_empty(), "there is no {damaged}");
            for path in files {
                let mut bytes = fs::read(&path).unwrap();
                bytes[0] ^= 1;
                fs::write(path, bytes).unwrap();
            }
            assert_eq!(open().get(b"key").unwrap().as_deref(), Some(&b"value"[..]), "with a damaged {damaged}");
        }
        assert_eq!(fs::read_dir(directory.path().join("quarantine")).unwrap().count(), 0);
    }

    #[test]
    fn a_map_that_sled_shows_as_empty_is_set_aside() {
        let directory = with_one_entry("parked");
        let open = || SledState::open(directory.path(), "parked").unwrap();
        assert_eq!(open().get(b"key").unwrap().as_deref(), Some(&b"value"[..]));
        // Without its snapshot all is in the log, whose first byte decides.
        super::super::remove_files(&directory.path().join("parked"), |name| name.starts_with("snap.")).unwrap();
        let db = directory.path().join("parked/db");
        let mut bytes = fs::read(&db).unwrap();
        bytes[0] ^= 1;
        fs::write(&db, bytes).unwrap();
        let state = open();
        assert_eq!(state.get(b"key").unwrap(), None);
        assert!(directory.path().join("quarantine/parked-1").is_dir());
        state.put(b"key", b"again").unwrap();
        state.sync().unwrap();
        drop(state);
        assert_eq!(open().get(b"key").unwrap().as_deref(), Some(&b"again"[..]));
    }
}
