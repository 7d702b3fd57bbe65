//! Reads parked events in the order of their ids, a page of entries at a time.

use std::sync::Arc;

use super::format::{decode, key, parts_of, split_key};
use super::{ParkedError, ParkedEvent};
use crate::wal::{Scan, StateDb};

/// See [`super::ParkedStore::events`].
pub struct ParkedEvents {
    entries: Entries,
    ended: bool,
}

/// An event and what it takes in the store.
pub(super) struct Found {
    pub(super) id: u64,
    /// Of a damaged one, those of its first part.
    pub(super) bytes: u64,
    /// Or why it cannot be read.
    pub(super) event: Result<ParkedEvent, ParkedError>,
}

impl Iterator for ParkedEvents {
    type Item = Result<ParkedEvent, ParkedError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.next_sized() {
            Ok(found) => found.map(|found| found.event),
            Err(error) => Some(Err(error)),
        }
    }
}

impl ParkedEvents {
    /// Events from `from_id` on, and below `end_id`.
    pub(super) fn new(db: Arc<dyn StateDb>, from_id: u64, end_id: u64) -> ParkedEvents {
        ParkedEvents { entries: Entries::new(db, from_id, end_id), ended: false }
    }

    /// The next event with its size. Fails only if the store does, and is at its end then.
    pub(super) fn next_sized(&mut self) -> Result<Option<Found>, ParkedError> {
        if self.ended {
            return Ok(None);
        }
        let next = self.read_on();
        self.ended = next.is_err();
        next
    }

    fn read_on(&mut self) -> Result<Option<Found>, ParkedError> {
        while let Some((id, part, first)) = self.entries.next_entry()? {
            if part != 0 {
                continue; // of an id without a part 0: never finished
            }
            self.entries.skip_below = id + 1;
            let damaged = |what| Err(ParkedError::Damaged { id, what });
            let db = &self.entries.db;
            let Some(parts) = parts_of(&first) else {
                return Ok(Some(Found { id, bytes: first.len() as u64, event: damaged("its head is not one") }));
            };
            let mut bytes = first;
            let mut is_whole = true;
            for wanted in 1..parts {
                match db.get(&key(id, wanted))? {
                    Some(more) => bytes.extend(more),
                    None => is_whole = false,
                }
            }
            if !is_whole && db.get(&key(id, 0))?.is_none() {
                continue; // removed in the meantime
            }
            let size = bytes.len() as u64;
            let event = match is_whole.then(|| decode(bytes)) {
                None => damaged("a part is missing"),
                Some(None) => damaged("it cannot be decoded"),
                Some(Some((about, payload))) => Ok(ParkedEvent { id, about, payload }),
            };
            return Ok(Some(Found { id, bytes: size, event }));
        }
        Ok(None)
    }
}

/// The raw entries of the store, in order.
pub(super) struct Entries {
    db: Arc<dyn StateDb>,
    scan: Scan,
    /// Ids below are passed over.
    skip_below: u64,
    end_id: u64,
}

impl Entries {
    pub(super) fn new(db: Arc<dyn StateDb>, from_id: u64, end_id: u64) -> Entries {
        Entries { db, scan: Scan::from(&key(from_id, 0)), skip_below: 0, end_id }
    }

    pub(super) fn next_entry(&mut self) -> Result<Option<(u64, u16, Vec<u8>)>, ParkedError> {
        self.scan.skip_to(&key(self.skip_below, 0));
        while let Some((name, value)) = self.scan.next_entry(&*self.db)? {
            match split_key(&name) {
                Some((id, _)) if id >= self.end_id => return Ok(None),
                Some((id, part)) if id >= self.skip_below => return Ok(Some((id, part, value))),
                _ => {}
            }
        }
        Ok(None)
    }
}
