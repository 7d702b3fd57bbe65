//! What the parked store must hold, as the log remembers it: the store alone cannot tell what damage took from what was removed.
//!
//! # Books
//! Two figures stand in `meta`, each of which only grows: the events ever parked, and those ever removed. What is parked is
//! noted once it is durable, and saved with the cursor; what is removed is saved before it goes. So after a crash the first may
//! be too low and the second too high, and the store never holds less than the difference, unless it is damaged. A clean end
//! saves both as they are, and says that it did.
//!
//! ```text
//! "parked"        events ever parked, u64: all that older versions know, and read
//! "parked_books"  version u8 │ events ever parked u64 │ events ever removed u64 │ saved at a clean end u8 │ crc32c u32
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, BufMut};

use super::checksum::{append_checksum, strip_checksum};
use super::error::StoreError;
use super::store::StateDb;

const EVER_KEY: &[u8] = b"parked";
const BOOKS_KEY: &[u8] = b"parked_books";
const VERSION: u8 = 1;
const BYTES: usize = 1 + 8 + 8 + 1 + 4;

/// Events since the parked store was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParkedBooks {
    /// Ever parked.
    pub ever: u64,
    /// Of those, ever removed.
    pub removed: u64,
}

/// What is known of the parked store without looking into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotedParked {
    /// What it must agree with.
    pub books: ParkedBooks,
    /// Nothing was parked since, and no removal broke off.
    pub is_exact: bool,
    /// Whether it is known how many were removed: an older version did not note it.
    pub removed_is_known: bool,
}

/// Keeps the books in `meta`.
pub struct ParkedNotes {
    meta: Arc<dyn StateDb>,
    notes: Mutex<Notes>,
}

struct Notes {
    noted: NotedParked,
    /// They are those of a clean end.
    is_final: bool,
}

/// The books as they are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SavedBooks {
    books: ParkedBooks,
    is_final: bool,
}

impl ParkedNotes {
    /// Those in `meta`; new ones if there are none.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn load(meta: Arc<dyn StateDb>) -> Result<ParkedNotes, StoreError> {
        let ever = meta.get(EVER_KEY)?.and_then(|value| value.try_into().ok()).map_or(0, u64::from_le_bytes);
        let notes = match meta.get(BOOKS_KEY)?.and_then(|value| decode(&value)) {
            Some(SavedBooks { books, is_final }) => {
                // An older version, if one came after that, moved the first figure alone.
                let is_exact = is_final && books.ever == ever;
                Notes { noted: NotedParked { books, is_exact, removed_is_known: true }, is_final }
            }
            None => {
                let books = ParkedBooks { ever, removed: 0 };
                Notes { noted: NotedParked { books, is_exact: false, removed_is_known: false }, is_final: false }
            }
        };
        Ok(ParkedNotes { meta, notes: Mutex::new(notes) })
    }

    /// What is noted.
    pub fn noted(&self) -> NotedParked {
        self.notes().noted
    }

    /// Begins with what is there now, once that was compared with what was noted. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`]: it is saved with the cursor.
    pub fn begin(&self, books: ParkedBooks) -> Result<(), StoreError> {
        let mut notes = self.notes();
        notes.noted = NotedParked { books, is_exact: true, removed_is_known: true };
        self.save_now(&mut notes)
    }

    /// Takes over the books; all they say is durable in the parked store. Fewer events than before change nothing. Saved with
    /// the cursor, within about a second.
    pub fn note(&self, books: ParkedBooks) {
        self.notes().take(books);
    }

    /// The same, before events are removed. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`]: nobody knows what is saved.
    pub fn save(&self, books: ParkedBooks) -> Result<(), StoreError> {
        let mut notes = self.notes();
        notes.take(books);
        self.save_now(&mut notes)
    }

    fn save_now(&self, notes: &mut Notes) -> Result<(), StoreError> {
        notes.is_final = false;
        self.put(notes.to_save())?;
        self.meta.sync()
    }

    /// The process ends: nothing is parked or removed any more.
    pub(super) fn finish(&self) {
        let mut notes = self.notes();
        notes.is_final = notes.noted.is_exact;
    }

    /// What is to be saved.
    pub(super) fn to_save(&self) -> SavedBooks {
        self.notes().to_save()
    }

    /// Puts it into `meta`, and tells what; durable with the next sync of that. In turn with [`ParkedNotes::save`], so that
    /// nothing older follows what that saved.
    pub(super) fn put_noted(&self) -> Result<SavedBooks, StoreError> {
        let notes = self.notes();
        self.put(notes.to_save())?;
        Ok(notes.to_save())
    }

    fn put(&self, SavedBooks { books, is_final }: SavedBooks) -> Result<(), StoreError> {
        let mut value = Vec::with_capacity(BYTES);
        value.put_u8(VERSION);
        value.put_u64_le(books.ever);
        value.put_u64_le(books.removed);
        value.put_u8(u8::from(is_final));
        append_checksum(&mut value);
        self.meta.put(EVER_KEY, &books.ever.to_le_bytes())?;
        self.meta.put(BOOKS_KEY, &value)
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notes {
    fn take(&mut self, books: ParkedBooks) {
        let ever = books.ever.max(self.noted.books.ever);
        self.noted.books = ParkedBooks { ever, ..books };
        self.noted.removed_is_known = true;
        self.is_final = false;
    }

    fn to_save(&self) -> SavedBooks {
        SavedBooks { books: self.noted.books, is_final: self.is_final }
    }
}

fn decode(value: &[u8]) -> Option<SavedBooks> {
    if value.len() != BYTES || value[0] != VERSION {
        return None;
    }
    let mut rest = &strip_checksum(value)?[1..];
    let books = ParkedBooks { ever: rest.get_u64_le(), removed: rest.get_u64_le() };
    Some(SavedBooks { books, is_final: rest.get_u8() == 1 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::memory::{MemoryStore, for_each_flip};
    use crate::wal::store::Store;

    const BOOKS: ParkedBooks = ParkedBooks { ever: 7, removed: 3 };

    fn noted(books: ParkedBooks, is_exact: bool) -> NotedParked {
        NotedParked { books, is_exact, removed_is_known: true }
    }

    #[test]
    fn the_books_are_exact_after_a_clean_end_alone() {
        let meta = MemoryStore::default().state("meta").unwrap();
        let load = || ParkedNotes::load(meta.clone()).unwrap();
        let unknown = NotedParked { books: ParkedBooks::default(), is_exact: false, removed_is_known: false };
        assert_eq!(load().noted(), unknown);
        // A process that did not look into the store knows no better at its end.
        let notes = load();
        notes.finish();
        notes.put_noted().unwrap();
        assert!(!load().noted().is_exact);
        let notes = load();
        notes.begin(BOOKS).unwrap();
        assert_eq!((notes.noted(), load().noted()), (noted(BOOKS, true), noted(BOOKS, false)));
        let before = notes.to_save();
        notes.finish();
        assert_ne!(notes.to_save(), before, "the keeper would not save it");
        notes.put_noted().unwrap();
        assert_eq!(load().noted(), noted(BOOKS, true));
        // It ends again without having looked.
        let notes = load();
        notes.finish();
        notes.put_noted().unwrap();
        assert_eq!(load().noted(), noted(BOOKS, true));
        // What is removed offline is saved at once, and a removal may break off.
        let removed = ParkedBooks { ever: 4, removed: 4 };
        load().save(removed).unwrap();
        assert_eq!(load().noted(), noted(ParkedBooks { ever: 7, removed: 4 }, false));
        // An older version parked something, and kept its books.
        let notes = load();
        notes.begin(BOOKS).unwrap();
        notes.finish();
        notes.put_noted().unwrap();
        meta.put(EVER_KEY, &9u64.to_le_bytes()).unwrap();
        assert_eq!(load().noted(), noted(BOOKS, false));
    }

    #[test]
    fn books_that_are_damaged_are_not_believed() {
        let meta = MemoryStore::default().state("meta").unwrap();
        let notes = ParkedNotes::load(meta.clone()).unwrap();
        notes.begin(BOOKS).unwrap();
        let of_an_older_version =
            NotedParked { books: ParkedBooks { removed: 0, ..BOOKS }, is_exact: false, removed_is_known: false };
        for_each_flip(&*meta, BOOKS_KEY, |at| {
            assert_eq!(ParkedNotes::load(meta.clone()).unwrap().noted(), of_an_older_version, "byte {at}");
        });
    }
}
