//! For tools that look at a log without changing it: copies of small Dbs and segments, and where segments are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{absent_is_default, list};
use super::shards::ShardedState;
use super::state::SledState;
use super::{RESERVE, SHARD_BYTES_MAX, StateDb};
use crate::wal::error::StoreError;

/// Opens the map in `path`, which must be a copy.
pub fn open_state(path: &Path) -> Result<Arc<dyn StateDb>, StoreError> {
    Ok(Arc::new(SledState::open_whole(path, &path.join(RESERVE))?))
}

/// Opens the map called `name` in `directory`, which must be a copy. What is damaged in it is set aside there, and told.
pub fn open_shards(directory: &Path, name: &str) -> Result<(Arc<dyn StateDb>, Vec<StoreError>), StoreError> {
    fs::create_dir_all(directory.join("quarantine")).map_err(StoreError::io("create directory"))?;
    let (state, mut damage) = (ShardedState::open(directory, name, SHARD_BYTES_MAX)?, Vec::new());
    state.read_through(&mut |_, _| {}, &mut |error, _| damage.push(error))?;
    Ok((Arc::new(state), damage))
}

/// Copies a directory with all that is in it, to where nothing is.
pub fn copy_directory(from: &Path, to: &Path) -> Result<(), StoreError> {
    copy(from, to).map_err(StoreError::io("copy into the directory for temporary files"))
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Names of the small Dbs that were set aside in `directory`, the log's: `meta-1`, `parked-1`, ….
pub fn quarantined_states(directory: &Path) -> Result<Vec<String>, StoreError> {
    let error = StoreError::io("list quarantine");
    let names = fs::read_dir(directory.join("quarantine")).and_then(|entries| {
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()
    });
    let mut names = names.or_else(absent_is_default).map_err(error)?;
    names.retain(|name| name.parse::<u64>().is_err());
    names.sort();
    Ok(names)
}

/// Numbers and paths of the segments in `directory`, ascending; marked or not. None if it is not there.
pub fn segment_directories(directory: &Path) -> Result<Vec<(u64, PathBuf)>, StoreError> {
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    Ok(list(directory)?.into_iter().map(|id| (id, directory.join(format!("{id:012}")))).collect())
}
