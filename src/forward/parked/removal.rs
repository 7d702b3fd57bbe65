//! Takes events out of the parked store, durably.
//!
//! First the log's books count what will be removed, durably, then the store's journal does, then it goes, then one sync makes
//! both durable. The store below lets nothing go before the journal is durable, so a crash in between never leaves events missing
//! that the journal does not know of; if that is lost to damage, the log's books still know. If any of it fails, nobody knows
//! what is still there until the store can be read again: until then these events are counted as held.

use std::sync::atomic::Ordering;

use super::format::{JOURNAL_KEY, Journal, key};
use super::reader::Entries;
use super::{Books, ParkedError, ParkedStore};
use crate::kill_point;

/// Most events removed with one sync, while nobody else can write.
pub(super) const EVENTS_MAX: usize = 1024;

/// Why parked events were dropped. Also the `reason` label of `ringtail_forward_parked_dropped_events_total`.
///
/// These are not [`super::super::DropReason`]s: an event that is parked has been counted as parked, and is out of the books
/// of the log (pending at start + committed = delivered + parked + dropped + pending now). To count it there as dropped too
/// would count it twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParkedDropReason {
    /// `ringtail parked drop`.
    Operator,
    /// Over `forward.parked.bytes_max`, and `forward.parked.when_full` is `drop_oldest`.
    ParkedFull,
    /// Parked longer than `forward.parked.age_max`.
    ParkedExpired,
    /// Lost to damage of the parked store.
    Damaged,
}

impl ParkedDropReason {
    /// Every reason.
    pub const ALL: [ParkedDropReason; 4] = [
        ParkedDropReason::Operator,
        ParkedDropReason::ParkedFull,
        ParkedDropReason::ParkedExpired,
        ParkedDropReason::Damaged,
    ];

    /// Its value as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ParkedDropReason::Operator => "operator",
            ParkedDropReason::ParkedFull => "parked_full",
            ParkedDropReason::ParkedExpired => "parked_expired",
            ParkedDropReason::Damaged => "damaged",
        }
    }
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Events.
    pub events: u64,
    /// Bytes that they took in the store.
    pub bytes: u64,
}

/// A removal that failed.
pub(super) struct Doubtful {
    events: Vec<Going>,
    /// Counted under it if they are gone.
    reason: Option<ParkedDropReason>,
}

impl Doubtful {
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }
}

/// An event that is being removed.
struct Going {
    id: u64,
    bytes: u64,
    parts: Vec<u16>,
}

impl ParkedStore {
    /// Removes events for good, and counts them; what is not there is passed over. The caller logs how many. Durable on
    /// return.
    ///
    /// # Errors
    /// [`ParkedError::Store`]: some may be removed, and nobody knows for good which. Try again.
    pub fn drop_events(&self, ids: &[u64], reason: ParkedDropReason) -> Result<Removed, ParkedError> {
        self.remove_for(ids, Some(reason))
    }

    /// Removes events that are kept elsewhere; what is not there is passed over. Nothing is counted. Durable on return.
    ///
    /// # Errors
    /// As of [`ParkedStore::drop_events`].
    pub fn remove(&self, ids: &[u64]) -> Result<Removed, ParkedError> {
        self.remove_for(ids, None)
    }

    fn remove_for(&self, ids: &[u64], reason: Option<ParkedDropReason>) -> Result<Removed, ParkedError> {
        let mut sum = Removed::default();
        for ids in ids.chunks(EVENTS_MAX) {
            let removed = self.remove_some(ids, reason)?;
            (sum.events, sum.bytes) = (sum.events + removed.events, sum.bytes + removed.bytes);
        }
        Ok(sum)
    }

    fn remove_some(&self, ids: &[u64], reason: Option<ParkedDropReason>) -> Result<Removed, ParkedError> {
        let mut books = self.books();
        self.settle(&mut books)?;
        let mut events = Vec::with_capacity(ids.len());
        for id in ids.iter().filter(|id| **id < books.synced) {
            events.extend(self.find(*id)?);
        }
        events.sort_by_key(|event| event.id);
        events.dedup_by_key(|event| event.id);
        if events.is_empty() {
            return Ok(Removed::default());
        }
        if let Some(notes) = &self.0.notes {
            // Nothing is removed yet if that fails.
            notes.save(self.durable(&books, events.len())).inspect_err(|_| self.note(&books))?;
            kill_point::pass("removal.noted");
        }
        if let Err(error) = self.write_removal(&books, &events) {
            books.forgotten |= books.next > books.synced;
            self.forget_unsynced(&mut books);
            books.doubtful.push(Doubtful { events, reason });
            // If it fails as well, the next one that writes tries again.
            let _ = self.settle(&mut books);
            return Err(error);
        }
        let removed = Removed { events: events.len() as u64, bytes: events.iter().map(|event| event.bytes).sum() };
        self.account(&mut books, removed, reason);
        Ok(removed)
    }

    /// An event as it lies in the store; none if it is not there.
    fn find(&self, id: u64) -> Result<Option<Going>, ParkedError> {
        let mut entries = Entries::new(self.0.db.clone(), id, id.saturating_add(1));
        let mut going = Going { id, bytes: 0, parts: Vec::new() };
        while let Some((_, part, value)) = entries.next_entry()? {
            going.bytes += value.len() as u64;
            going.parts.push(part);
        }
        Ok((going.parts.first() == Some(&0)).then_some(going))
    }

    fn write_removal(&self, books: &Books, events: &[Going]) -> Result<(), ParkedError> {
        let reopened = self.0.db.reopened();
        let journal = Journal { removed: books.removed + events.len() as u64, next_id: books.synced };
        self.0.db.put(JOURNAL_KEY, &journal.encode())?;
        for Going { id, parts, .. } in events {
            for part in parts {
                self.0.db.remove(&key(*id, *part))?;
            }
        }
        self.0.db.sync()?;
        // Another's use of the store may have failed in between, and taken this along.
        if self.0.db.reopened() == reopened { Ok(()) } else { Err(ParkedError::Forgotten) }
    }

    /// Finds out what became of removals that failed.
    pub(super) fn settle(&self, books: &mut Books) -> Result<(), ParkedError> {
        if !books.doubtful.is_empty() {
            // What is gone must be gone for good.
            self.0.db.sync()?;
        }
        while let Some(Doubtful { events, reason }) = books.doubtful.last() {
            let reason = *reason;
            let mut gone = Removed::default();
            for Going { id, bytes, parts } in events {
                if self.0.db.get(&key(*id, 0))?.is_none() {
                    (gone.events, gone.bytes) = (gone.events + 1, gone.bytes + bytes);
                    parts.iter().try_for_each(|part| self.0.db.remove(&key(*id, *part)))?;
                }
            }
            books.doubtful.pop();
            self.account(books, gone, reason);
        }
        Ok(())
    }

    fn account(&self, books: &mut Books, removed: Removed, reason: Option<ParkedDropReason>) {
        books.removed += removed.events;
        self.0.count.fetch_sub(removed.events, Ordering::Relaxed);
        self.0.bytes.fetch_sub(removed.bytes, Ordering::Relaxed);
        self.note(books);
        if let (Some(metrics), Some(reason)) = (&self.0.metrics, reason) {
            metrics.forward.parked_dropped_events(reason).increment(removed.events);
        }
        self.show();
    }
}
