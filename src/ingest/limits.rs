//! The limits that a reload may change while batches come in.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::config::IngestConfig;

/// See the module. Each is read where it is applied; none is about memory that was reserved before.
pub(super) struct Limits {
    batch_bytes_max: AtomicUsize,
    batch_events_max: AtomicU32,
    connection_batches_max: AtomicUsize,
    connection_bytes_max: AtomicU64,
}

impl Limits {
    pub fn new(config: &IngestConfig) -> Limits {
        let limits = Limits {
            batch_bytes_max: AtomicUsize::default(),
            batch_events_max: AtomicU32::default(),
            connection_batches_max: AtomicUsize::default(),
            connection_bytes_max: AtomicU64::default(),
        };
        limits.set(config);
        limits
    }

    pub fn set(&self, config: &IngestConfig) {
        let batch_bytes_max = usize::try_from(config.batch_bytes_max.as_u64()).unwrap_or(usize::MAX);
        self.batch_bytes_max.store(batch_bytes_max, Ordering::Relaxed);
        self.batch_events_max.store(config.batch_events_max, Ordering::Relaxed);
        self.connection_batches_max.store(config.connection_in_flight_batches_max, Ordering::Relaxed);
        self.connection_bytes_max.store(config.connection_in_flight_bytes_max.as_u64(), Ordering::Relaxed);
    }

    /// Largest batch, in bytes of protobuf.
    pub fn batch_bytes_max(&self) -> usize {
        self.batch_bytes_max.load(Ordering::Relaxed)
    }

    /// Most events of a batch.
    pub fn batch_events_max(&self) -> u32 {
        self.batch_events_max.load(Ordering::Relaxed)
    }

    /// Batches that a WebSocket connection may have waiting.
    pub fn connection_batches_max(&self) -> usize {
        self.connection_batches_max.load(Ordering::Relaxed)
    }

    /// Bytes of the same.
    pub fn connection_bytes_max(&self) -> u64 {
        self.connection_bytes_max.load(Ordering::Relaxed)
    }
}
