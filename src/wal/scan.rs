//! Going through the entries of a small map, page by page.

use std::vec::IntoIter;

use super::error::StoreError;
use super::store::{Entry, StateDb};

/// Entries read at a time: at most 768 KiB.
const PAGE_ENTRIES: usize = 16;

/// Goes through the entries of a [`StateDb`] in the order of their keys. Holds one page of them in memory.
pub struct Scan {
    page: IntoIter<Entry>,
    /// Keys below are passed over; the page after this one begins here.
    from: Vec<u8>,
    is_last: bool,
}

impl Scan {
    /// Begins at `key`, or at the first one after it.
    pub fn from(key: &[u8]) -> Scan {
        Scan { page: Vec::new().into_iter(), from: key.to_vec(), is_last: false }
    }

    /// Passes over what is left of the keys below `key`.
    pub fn skip_to(&mut self, key: &[u8]) {
        if *key > *self.from {
            self.from = key.to_vec();
        }
    }

    /// The next entry of `db`, or none.
    ///
    /// # Errors
    /// [`StoreError`]; a later call goes on from there.
    pub fn next_entry(&mut self, db: &dyn StateDb) -> Result<Option<Entry>, StoreError> {
        loop {
            if let Some((key, value)) = self.page.find(|(key, _)| *key >= self.from) {
                self.from = [&key[..], &[0]].concat(); // the smallest key after that one
                return Ok(Some((key, value)));
            }
            if self.is_last {
                return Ok(None);
            }
            let page = db.scan(&self.from, PAGE_ENTRIES)?;
            self.is_last = page.len() < PAGE_ENTRIES;
            self.page = page.into_iter();
        }
    }
}

/// Calls `each` with every entry of `db` whose key begins with `prefix`, in order: the rest of its key, and its value.
pub(super) fn for_each_with_prefix(
    db: &dyn StateDb,
    prefix: &[u8],
    mut each: impl FnMut(&[u8], &[u8]),
) -> Result<(), StoreError> {
    let mut scan = Scan::from(prefix);
    while let Some((key, value)) = scan.next_entry(db)? {
        let Some(rest) = key.strip_prefix(prefix) else { break };
        each(rest, &value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::memory::MemoryStore;
    use crate::wal::store::Store;

    #[test]
    fn every_entry_is_met_once_and_in_order() {
        let db = MemoryStore::default().state("meta").unwrap();
        for count in 0..3 * PAGE_ENTRIES as u8 {
            let mut found = Vec::new();
            for_each_with_prefix(&*db, b"p", |rest, value| found.push((rest.to_vec(), value.to_vec()))).unwrap();
            assert_eq!(found, (0..count).map(|number| (vec![number], vec![number])).collect::<Vec<_>>());
            db.put(&[b'p', count], &[count]).unwrap();
            db.put(&[b'o', count], b"other").unwrap();
            db.put(&[b'q', count], b"other").unwrap();
        }
    }

    #[test]
    fn what_is_skipped_is_not_met() {
        let db = MemoryStore::default().state("meta").unwrap();
        (0..100).for_each(|number| db.put(&[number], b"").unwrap());
        let mut scan = Scan::from(&[3]);
        let mut next = || scan.next_entry(&*db).unwrap().map(|(key, _)| key[0]);
        assert_eq!([next(), next()], [Some(3), Some(4)]);
        for (to, expected) in [(2, 5), (9, 9), (60, 60), (99, 99)] {
            scan.skip_to(&[to]);
            assert_eq!(scan.next_entry(&*db).unwrap(), Some((vec![expected], vec![])));
        }
        assert_eq!(scan.next_entry(&*db).unwrap(), None);
    }
}
