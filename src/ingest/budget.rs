//! Bounds the memory of requests that are still being read, over all connections.
//!
//! Bytes are taken as they arrive. Announcing them costs a client nothing, so an announcement takes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that may be read at the same time: `ingest.in_flight_bytes_max`.
#[derive(Debug, Clone)]
pub(super) struct ReadBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    used: AtomicU64,
    limit: u64,
}

/// Bytes taken from the budget; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    budget: ReadBudget,
    bytes: u64,
}

impl ReadBudget {
    pub fn new(limit: u64) -> ReadBudget {
        ReadBudget(Arc::new(Budget { used: AtomicU64::new(0), limit }))
    }

    /// Whether `bytes` are there now. They may be gone a moment later.
    pub fn has(&self, bytes: u64) -> bool {
        self.0.used.load(Ordering::Relaxed).saturating_add(bytes) <= self.0.limit
    }

    /// A reservation of nothing, to be grown.
    pub fn reservation(&self) -> Reservation {
        Reservation { budget: self.clone(), bytes: 0 }
    }
}

impl Reservation {
    /// Takes `bytes` more. False: they are not there, and nothing was taken.
    #[must_use]
    pub fn grow(&mut self, bytes: u64) -> bool {
        let Budget { used, limit } = &*self.budget.0;
        let fits = |now: u64| now.checked_add(bytes).filter(|after| after <= limit);
        let taken = used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if taken {
            self.bytes += bytes;
        }
        taken
    }

    /// Bytes taken.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives everything back.
    pub fn clear(&mut self) {
        self.budget.0.used.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_than_the_limit() {
        let budget = ReadBudget::new(10);
        let (mut first, mut second) = (budget.reservation(), budget.reservation());
        assert!(first.grow(6));
        assert!(!second.grow(5));
        assert!(second.grow(4));
        assert!(!second.grow(u64::MAX));
        drop(first);
        assert!(second.grow(6));
        assert_eq!(second.bytes(), 10);
    }
}
