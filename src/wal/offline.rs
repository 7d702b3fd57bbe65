//! A log that no process has open, for the tools that look at it: they change nothing, whatever state it is in.
//!
//! What sled opens it may also tidy up, on a damaged disk with a heavy hand. So what needs it (the cursor, the ledger of
//! losses, parked events) is looked at in a copy, in the directory for temporary files (`TMPDIR`). Segments do not need it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::ahead::{self, Stretch, Undelivered};
use super::carved::CarvedRecords;
use super::error::{OpenError, StoreError};
use super::log::Position;
use super::losses::{self, Loss};
use super::record::Totals;
use super::store::{StateDb, copy_directory, old_name, open_shards, open_state, segment_directories};
use super::{META, PARKED, cursor, lock_directory};
use crate::batch::Sequence;
use crate::config::WalConfig;

/// The files of one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentFiles {
    /// Its number.
    pub id: u64,
    /// It was set aside.
    pub quarantined: bool,
    pub(super) path: PathBuf,
}

impl SegmentFiles {
    /// The records in it, by sequence. Reads the segment's file without changing it.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn records(&self) -> Result<CarvedRecords, StoreError> {
        CarvedRecords::open(&self.path.join("db"))
    }

    /// Bytes of its file; 0 if that is not there.
    pub fn bytes(&self) -> u64 {
        fs::metadata(self.path.join("db")).map_or(0, |metadata| metadata.len())
    }
}

/// The segments set aside in `directory`, by number.
pub(super) fn quarantined(directory: &Path) -> Result<Vec<SegmentFiles>, StoreError> {
    list(&directory.join("quarantine"), true)
}

fn list(directory: &Path, quarantined: bool) -> Result<Vec<SegmentFiles>, StoreError> {
    let segments = segment_directories(directory)?.into_iter();
    Ok(segments.map(|(id, path)| SegmentFiles { id, quarantined, path }).collect())
}

/// A log that no process has open, and that none can open meanwhile.
pub struct OfflineLog {
    pub(super) directory: PathBuf,
    /// Copies are opened here.
    pub(super) scratch: TempDir,
    /// What `meta` says, or why it does not open.
    pub(super) meta: Result<Meta, StoreError>,
    _lock: File,
}

/// See [`OfflineLog::parked`].
pub struct ParkedCopy {
    /// What can be read of it.
    pub state: Arc<dyn StateDb>,
    /// Why the rest cannot, part by part.
    pub damage: Vec<StoreError>,
}

/// What `meta` says.
#[derive(Debug, Default)]
pub(super) struct Meta {
    /// The cursor and the tail as they were saved last; none in a new log.
    pub saved: Option<(Position, Totals)>,
    /// What was delivered ahead of a cursor, perhaps of an earlier one.
    pub ahead: Option<Stretch>,
    pub losses: Vec<Loss>,
}

impl OfflineLog {
    /// Locks the log and reads what it says of itself.
    ///
    /// # Errors
    /// [`OpenError::InUse`] while a process has it open. [`OpenError::Store`] also when there is no room for a copy.
    pub fn open(config: &WalConfig) -> Result<OfflineLog, OpenError> {
        let lock = lock_directory(&config.directory)?;
        let scratch = tempfile::Builder::new().prefix("ringtail-").tempdir();
        let scratch = scratch.map_err(StoreError::io("make a directory for copies"))?;
        let (directory, meta) = (config.directory.clone(), Ok(Meta::default()));
        let mut log = OfflineLog { directory, scratch, meta, _lock: lock };
        log.meta = match log.open_copy(META) {
            Ok(None) => Ok(Meta::default()),
            Ok(Some(meta)) => read_meta(&*meta),
            Err(error) if error.is_damage() || error.is_unreadable() => Err(error),
            Err(error) => return Err(error.into()),
        };
        Ok(log)
    }

    /// The segments that are in use, by number.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn segments(&self) -> Result<Vec<SegmentFiles>, StoreError> {
        list(&self.directory.join("wal"), false)
    }

    /// The segments that were set aside, by number.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn quarantined(&self) -> Result<Vec<SegmentFiles>, StoreError> {
        quarantined(&self.directory)
    }

    /// Where the backlog begins: the first sequence not yet delivered. 0 if that is not known.
    pub fn cursor_sequence(&self) -> u64 {
        self.meta.as_ref().ok().and_then(|meta| meta.saved).map_or(0, |(cursor, _)| cursor.totals.sequence)
    }

    /// Where the log ended when that was saved last: it may have gone on. 0 if that is not known.
    pub fn next_sequence(&self) -> u64 {
        self.meta.as_ref().ok().and_then(|meta| meta.saved).map_or(0, |(_, tail)| tail.sequence)
    }

    /// The records not yet delivered, as far as that is known.
    pub fn undelivered(&self) -> Undelivered {
        let stretch = self.meta.as_ref().ok().and_then(|meta| meta.ahead);
        Undelivered::new(Sequence(self.cursor_sequence()), Sequence(self.next_sequence()), stretch)
    }

    /// The same up to the end that the segments show.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn undelivered_to_end(&self) -> Result<Undelivered, StoreError> {
        Ok(Undelivered { tail: Sequence(self.end_sequence()?), ..self.undelivered() })
    }

    /// Where the log ends: behind the last record in its segments. Not before [`OfflineLog::next_sequence`].
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn end_sequence(&self) -> Result<u64, StoreError> {
        for segment in self.segments()?.iter().rev() {
            if let Some(last) = segment.records()?.filter_map(Result::ok).last() {
                return Ok(self.next_sequence().max(last.sequence.0 + 1));
            }
        }
        Ok(self.next_sequence())
    }

    /// The segment of the cursor: earlier ones are delivered. 0 if that is not known.
    pub fn cursor_segment(&self) -> u64 {
        self.meta.as_ref().ok().and_then(|meta| meta.saved).map_or(0, |(cursor, _)| cursor.segment)
    }

    /// The ledger of losses; empty if it cannot be read.
    pub fn losses(&self) -> &[Loss] {
        self.meta.as_ref().map_or(&[], |meta| &meta.losses)
    }

    /// A copy of the parked store; none if nothing was ever parked here. It is gone with this log.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn parked(&self) -> Result<Option<ParkedCopy>, StoreError> {
        let is_there = self.copy(PARKED)? | self.copy(&old_name(PARKED))?;
        let open = || open_shards(self.scratch.path(), PARKED).map(|(state, damage)| ParkedCopy { state, damage });
        is_there.then(open).transpose()
    }

    fn open_copy(&self, name: &str) -> Result<Option<Arc<dyn StateDb>>, StoreError> {
        self.copy(name)?.then(|| open_state(&self.scratch.path().join(name))).transpose()
    }

    /// Whether there is something to copy.
    fn copy(&self, name: &str) -> Result<bool, StoreError> {
        let original = self.directory.join(name);
        if original.is_dir() {
            copy_directory(&original, &self.scratch.path().join(name))?;
        }
        Ok(original.is_dir())
    }
}

fn read_meta(meta: &dyn StateDb) -> Result<Meta, StoreError> {
    Ok(Meta { saved: cursor::load(meta)?, ahead: ahead::load(meta)?, losses: losses::load(meta)? })
}
