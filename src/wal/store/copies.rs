//! For tools that look at a log without changing it: copies of small Dbs and segments, and where segments are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::list;
use super::state::SledState;
use super::{RESERVE, StateDb};
use crate::wal::error::StoreError;

/// Opens the map in `path`, which must be a copy.
pub fn open_state(path: &Path) -> Result<Arc<dyn StateDb>, StoreError> {
    Ok(Arc::new(SledState::open_whole(path, &path.join(RESERVE))?))
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

/// Numbers and paths of the segments in `directory`, ascending; marked or not. None if it is not there.
pub fn segment_directories(directory: &Path) -> Result<Vec<(u64, PathBuf)>, StoreError> {
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    Ok(list(directory)?.into_iter().map(|id| (id, directory.join(format!("{id:012}")))).collect())
}
