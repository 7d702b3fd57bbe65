//! What the store needs of the file system.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::wal::error::StoreError;

pub(super) fn own_descriptor(path: &Path) -> Result<File, StoreError> {
    let file = File::options().read(true).write(true).open(path.join("db"));
    file.map_err(StoreError::io("open segment file"))
}

/// Longest wait for sled to let go of a file.
const UNLOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Waits until nobody has a Db locked. Nobody else may use this directory, but sled's own threads may hold a Db for a moment
/// after it was closed: opening it then fails, and they may still write to it. False: it takes too long.
pub(super) fn await_unlocked(path: &Path) -> Result<bool, StoreError> {
    let file = match File::open(path.join("db")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        file => file.map_err(StoreError::io("open segment file"))?,
    };
    let deadline = Instant::now() + UNLOCK_PATIENCE;
    loop {
        match file.try_lock_shared() {
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            locked => return Ok(locked.is_ok()),
        }
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(StoreError::io("sync directory"))
}

/// Makes a directory, and those above it that are missing. Their names are durable when this returns.
pub(in crate::wal) fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let Some(above) = path.parent() else { return Ok(()) };
    let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
    make_directory(above)?;
    fs::create_dir_all(path)?;
    File::open(above)?.sync_all()
}

/// Reserves disk without changing the file's size. A file system that cannot reserve is left to run full later.
pub(super) fn reserve(file: &File, bytes: u64) -> Result<(), StoreError> {
    let bytes = libc::off_t::try_from(bytes).expect("a segment is limited to 256 MiB");
    // SAFETY: the descriptor is open for as long as `file` lives, and fallocate touches no memory of ours.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, bytes) };
    let error = io::Error::last_os_error();
    if result == 0 || matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
        return Ok(());
    }
    Err(StoreError::io("reserve disk for segment")(error))
}

pub(super) fn remove_files(directory: &Path, matches: impl Fn(&str) -> bool) -> Result<(), StoreError> {
    for entry in fs::read_dir(directory).map_err(StoreError::io("list segment"))? {
        let entry = entry.map_err(StoreError::io("list segment"))?;
        if entry.file_name().to_str().is_some_and(&matches) {
            fs::remove_file(entry.path()).map_err(StoreError::io("remove segment file"))?;
        }
    }
    Ok(())
}

/// Disk taken by everything in `directory`.
pub(super) fn disk_bytes(directory: &Path) -> io::Result<u64> {
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

/// Disk taken by one file.
pub(super) fn blocks_bytes(metadata: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    metadata.blocks() * 512
}

/// What vanished while it was measured takes no space.
pub(super) fn absent_is_default<T: Default>(error: io::Error) -> io::Result<T> {
    if error.kind() == io::ErrorKind::NotFound { Ok(T::default()) } else { Err(error) }
}

pub(super) fn free_bytes(path: &Path) -> Result<u64, StoreError> {
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

/// Numbers that name directories in `directory`, ascending.
pub(super) fn list(directory: &Path) -> Result<Vec<u64>, StoreError> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(directory).map_err(StoreError::io("list segments"))? {
        let entry = entry.map_err(StoreError::io("list segments"))?;
        ids.extend(entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

/// What a disk may fail to read alone.
const BLOCK_BYTES: usize = 4 << 10;
/// How often a file is read at a start before what fails all the time counts as lost: over two seconds and a half.
const READ_TRIES: u32 = 10;

/// Waits before the next try, after `tries` that failed. False: there is no next one.
pub(in crate::wal) fn wait_to_read_again(tries: u32) -> bool {
    if tries >= READ_TRIES {
        return false;
    }
    std::thread::sleep(Duration::from_millis(5) * 2u32.pow(tries - 1));
    true
}

/// Reads a file through. sled takes a read error for the end of its log, and overwrites what it believes to be free: a disk
/// that fails for a moment must not come to that.
///
/// # Errors
/// [`StoreError::Io`]: damage if a part of it cannot be read, time and again, and the rest can.
pub(super) fn check_readable(path: &Path) -> Result<(), StoreError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(StoreError::io("open state file"))?,
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let bytes = file.metadata().map_err(StoreError::io("measure state file"))?.len();
        let (unread_bytes, Some(error)) = unread_bytes(&file, bytes) else { return Ok(()) };
        if wait_to_read_again(tries) {
            continue;
        }
        if unread_bytes >= bytes {
            return Err(StoreError::io("read state file")(error));
        }
        let what = format!("the disk does not read {unread_bytes} bytes of it: {error}");
        return Err(StoreError::io("read state file")(io::Error::new(io::ErrorKind::InvalidData, what)));
    }
}

/// How many bytes of a file are not read, and why.
fn unread_bytes(file: &File, bytes: u64) -> (u64, Option<io::Error>) {
    let (mut buffer, mut at, mut unread, mut failed) = (vec![0; BLOCK_BYTES], 0, 0, None);
    while at < bytes {
        let block = usize::try_from(bytes - at).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
        if let Err(error) = file.read_exact_at(&mut buffer[..block], at) {
            (unread, failed) = (unread + block as u64, Some(error));
        }
        at += block as u64;
    }
    (unread, failed)
}

/// Makes what the page cache holds of a file durable, and drops it from there, so that it is read from the disk: after a sync
/// that failed, the cache shows what the disk does not have. A file that is not there is fine.
pub(super) fn settle(path: &Path) -> Result<(), StoreError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(StoreError::io("open segment file"))?,
    };
    file.sync_data().map_err(StoreError::io("sync what the last process left"))?;
    // SAFETY: the descriptor is open, and the call touches no memory of ours. It is advice: if it fails, nothing is lost.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}

/// sled never syncs the `conf` that it writes, and does not open a Db with half of one.
pub(super) fn sync_conf(path: &Path) -> Result<(), StoreError> {
    File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(StoreError::io("sync conf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_locked_for_a_moment_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        await_unlocked(directory.path()).unwrap();
        let held = File::create(directory.path().join("db")).unwrap();
        held.lock().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| await_unlocked(directory.path()));
            drop(held);
            assert!(waiting.join().unwrap().unwrap());
        });
        File::open(directory.path().join("db")).unwrap().try_lock().unwrap();
    }
}
