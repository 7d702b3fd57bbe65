//! A sharded map was one Db once, with its files where the shards are now. It becomes the first shard.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::files::{list, sync_directory};
use super::state::set_aside;
use crate::kill_point;
use crate::wal::error::StoreError;

/// What is in the place of the map called `name` while it is taken over.
pub fn old_name(name: &str) -> String {
    format!("{name}.old")
}

/// Makes a shard of the map called `name` if it is one Db. A crash at any moment is made up for by the next call.
pub(super) fn take_over(directory: &Path, name: &str) -> Result<(), StoreError> {
    let (path, old) = (directory.join(name), directory.join(old_name(name)));
    if !path.is_dir() && !old.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(&path).map_err(StoreError::io("create state directory"))?;
    let files = files_of_a_db(&path).map_err(StoreError::io("list state directory"))?;
    let is_beside_shards = old.is_dir() || !list(&path)?.is_empty();
    if is_beside_shards {
        set_files_aside(directory, name, files)?;
    } else if !files.is_empty() {
        fs::rename(&path, &old).map_err(StoreError::io("take over state"))?;
        kill_point::pass("take_over.moved");
    }
    if old.is_dir() {
        fs::create_dir_all(&path).map_err(StoreError::io("create state directory"))?;
        sync_directory(directory)?;
        kill_point::pass("take_over.made");
        let first = path.join("000000000001");
        if first.is_dir() {
            let aside = set_aside(directory, name, &old)?;
            tracing::error!(aside = %aside.display(), "{name} was taken over before, set aside");
        } else {
            fs::rename(&old, first).map_err(StoreError::io("take over state"))?;
            kill_point::pass("take_over.done");
        }
        sync_directory(&path)?;
        sync_directory(directory)?;
    }
    Ok(())
}

/// A Ringtail that knows no shards ran here after one that does: its events have ids that are given out already.
fn set_files_aside(directory: &Path, name: &str, files: Vec<PathBuf>) -> Result<(), StoreError> {
    let gathered = directory.join(format!("{name}.files"));
    for file in files {
        fs::create_dir_all(&gathered).map_err(StoreError::io("set state aside"))?;
        let target = gathered.join(file.file_name().expect("it was listed"));
        fs::rename(file, target).map_err(StoreError::io("set state aside"))?;
    }
    if gathered.is_dir() {
        sync_directory(&gathered)?;
        sync_directory(&directory.join(name))?;
        kill_point::pass("take_over.gathered");
        let aside = set_aside(directory, name, &gathered)?;
        tracing::error!(aside = %aside.display(), "an older version kept {name} beside this one's, set aside");
    }
    Ok(())
}

fn files_of_a_db(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || entry.file_name() == "blobs" {
            files.push(entry.path());
        }
    }
    Ok(files)
}
