//! One error per operation of the log, one variant per decision its caller can take.

use std::path::PathBuf;

use crate::batch::Sequence;

/// A failed call of the store below the log.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("{operation} failed")]
    Io {
        /// What was tried: verb and object.
        operation: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// sled refused.
    #[error("{operation} failed: {message}")]
    Sled {
        /// What was tried: verb and object.
        operation: &'static str,
        /// sled's own words.
        message: String,
    },
    /// sled panicked.
    #[error("{operation} panicked: {message}")]
    Panicked {
        /// What was tried: verb and object.
        operation: &'static str,
        /// The panic's message.
        message: String,
    },
}

/// Why the log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("the log in {directory} is in use by another process")]
    InUse {
        /// `wal.directory`
        directory: PathBuf,
    },
    /// The directory cannot be made, read or locked.
    #[error("cannot use {directory} as the log's directory")]
    Directory {
        /// `wal.directory`
        directory: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The store failed.
    #[error("cannot open the log")]
    Store(#[from] StoreError),
}

/// Why a batch was not queued. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// No space: `wal.bytes_max` or `wal.free_bytes_min` is reached, or the file system is full.
    #[error("the log is full")]
    Full,
    /// Too many bytes wait for their commit.
    #[error("{queued_bytes} bytes wait for their commit, the limit is {limit}")]
    Overloaded {
        /// Bytes waiting.
        queued_bytes: u64,
        /// `ingest.in_flight_bytes_max`
        limit: u64,
    },
    /// The log is closing.
    #[error("the log is closing")]
    Stopping,
    /// A commit failed; nothing is acked any more.
    #[error("the log failed")]
    Poisoned,
}

/// Why a queued batch was not committed. It may still turn up after a restart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// There is no space for it, or none turned up.
    #[error("the log is full")]
    Full,
    /// The commit failed.
    #[error("the log failed")]
    Poisoned,
}

/// Why the log cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store failed in a way that a retry may mend.
    #[error("cannot read the log at sequence {at}")]
    Store {
        /// The record that was wanted.
        at: Sequence,
        /// Why not.
        #[source]
        source: StoreError,
    },
}

impl StoreError {
    /// Wraps an I/O error; for `map_err`.
    pub(super) fn io(operation: &'static str) -> impl FnOnce(std::io::Error) -> StoreError {
        move |source| StoreError::Io { operation, source }
    }

    /// What is on disk is wrong, and trying again will not mend it.
    pub fn is_damage(&self) -> bool {
        match self {
            StoreError::Io { source, .. } => {
                use std::io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, UnexpectedEof};
                matches!(source.kind(), UnexpectedEof | InvalidData | IsADirectory | NotADirectory)
            }
            StoreError::Sled { .. } | StoreError::Panicked { .. } => true,
        }
    }

    /// The disk does not read it.
    pub fn is_unreadable(&self) -> bool {
        matches!(self, StoreError::Io { source, .. } if source.raw_os_error() == Some(libc::EIO))
    }

    /// The process, or the host, has as many files open as it may: that passes.
    pub fn is_short_of_descriptors(&self) -> bool {
        matches!(self, StoreError::Io { source, .. } if matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)))
    }

    /// Somebody still holds what is asked for: that passes.
    pub fn is_held(&self) -> bool {
        matches!(self, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// The file system or a quota has no room: freeing some mends it.
    pub fn is_full(&self) -> bool {
        let StoreError::Io { source, .. } = self else { return false };
        matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
            || matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
    }
}
