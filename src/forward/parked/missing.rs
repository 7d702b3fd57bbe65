//! What is missing of the parked store, compared with what the log noted of it.
//!
//! Damage may leave no trace of its own: sled recovers a shorter log and calls it fine. So the books alone tell, and they
//! never say too much: what is parked is noted once it is durable, what is removed before it goes ([`ParkedNotes`]). Nothing that
//! was removed is ever called lost.
//!
//! [`ParkedNotes`]: crate::wal::ParkedNotes

use std::sync::atomic::Ordering;

use tracing::{error, info, warn};

use super::{Books, ParkedDropReason, ParkedStore};
use crate::wal::{NotedParked, StoreError};

/// Events that should be in the store and are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Nothing,
    /// There is no store any more, not even an empty shard: somebody removed it.
    Store(u64),
    /// So many.
    Exactly(u64),
    /// So many, and what was parked in about the last second before the process was killed.
    AtLeast(u64),
    /// An older version noted nothing of what was removed, and the store knows nothing of it either: perhaps none.
    AtMost(u64),
}

impl ParkedStore {
    /// Compares what is there with what was noted, says and counts what is missing, and begins to note anew.
    pub(super) fn look_after_missing(&self) {
        let Some(notes) = &self.0.notes else { return };
        let missing = self.missing(notes.noted());
        match missing {
            Missing::Nothing => {}
            Missing::Store(events) => info!(events, "the parked store was removed, it held events"),
            Missing::Exactly(events) => {
                error!(events, "parked events are missing: the parked store was damaged");
                self.count_missing(events);
            }
            Missing::AtLeast(at_least) => {
                error!(at_least, "parked events are missing: the parked store was damaged");
                self.count_missing(at_least);
            }
            Missing::AtMost(at_most) => {
                error!(at_most, "parked events are missing: the parked store was damaged, or they were removed");
            }
        }
        let mut books = self.books();
        books.leaving = !matches!(missing, Missing::Nothing | Missing::Store(_));
        // A full disk keeps nobody from starting. The first event to park tries again; without one, the next start misses them
        // again.
        if let Err(error) = self.begin_books(&mut books) {
            warn!(%error, "no new part of the parked store can be made yet");
        }
    }

    /// Begins the log's books. If something is missing, only once what is parked next cannot go the same way: as soon as the
    /// books agree, no later start knows of the damage.
    ///
    /// # Errors
    /// [`StoreError`]: nothing is begun, and nothing may be parked.
    pub(super) fn begin_books(&self, books: &mut Books) -> Result<(), StoreError> {
        if books.leaving {
            // All that was parked is durable: nothing was, since the store was opened.
            books.next = self.0.db.leave_newest(books.next)?;
            (books.synced, books.leaving) = (books.next, false);
        }
        if let Some(notes) = &self.0.notes {
            let begun = notes.begin(self.durable(books, 0));
            begun.unwrap_or_else(|error| warn!(%error, "the books of the parked events cannot be saved yet"));
        }
        Ok(())
    }

    pub(super) fn missing(&self, noted: NotedParked) -> Missing {
        let events = noted.books.ever.saturating_sub(self.ever());
        let knows_removed = noted.removed_is_known || self.ever() > self.count();
        match events {
            0 => Missing::Nothing,
            _ if self.0.is_new => Missing::Store(events),
            _ if !knows_removed => Missing::AtMost(events),
            _ if noted.is_exact => Missing::Exactly(events),
            _ => Missing::AtLeast(events),
        }
    }

    fn count_missing(&self, events: u64) {
        self.0.lost.store(events, Ordering::Relaxed);
        if let Some(metrics) = &self.0.metrics {
            metrics.forward.parked_dropped_events(ParkedDropReason::Damaged).increment(events);
        }
    }

    /// Events that were missing when the service opened the store, as far as the metrics count them: lost to damage.
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::super::format::{JOURNAL_KEY, key};
    use super::super::tests::{MemoryDb, about};
    use super::*;
    use crate::config::ParkedConfig;
    use crate::metrics::Metrics;
    use crate::wal::{ParkedBooks, ParkedNotes, StateDb, StoreError};

    /// Something done to one of two Dbs: a key with its value, or without one if it is removed; none of a sync.
    #[derive(Clone)]
    struct Step {
        is_meta: bool,
        write: Option<(Vec<u8>, Option<Vec<u8>>)>,
    }

    /// A map that takes down what is done to it.
    struct Recorded {
        db: MemoryDb,
        is_meta: bool,
        steps: Arc<Mutex<Vec<Step>>>,
    }

    impl Recorded {
        fn step(&self, write: Option<(Vec<u8>, Option<Vec<u8>>)>) {
            self.steps.lock().unwrap().push(Step { is_meta: self.is_meta, write });
        }
    }

    impl StateDb for Recorded {
        fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
            self.db.get(key)
        }
        fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
            self.step(Some((key.to_vec(), Some(value.to_vec()))));
            self.db.put(key, value)
        }
        fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
            self.step(Some((key.to_vec(), None)));
            self.db.remove(key)
        }
        fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
            self.db.scan(from, limit)
        }
        fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<bool, StoreError> {
            self.db.visit(see)
        }
        fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
            self.db.last_key()
        }
        fn sync(&self) -> Result<(), StoreError> {
            self.step(None);
            self.db.sync()
        }
        fn reopened(&self) -> u64 {
            self.db.reopened()
        }
    }

    /// What a crash behind `steps` leaves of one of the Dbs: what was synced, and some of what was written after that.
    fn left(steps: &[Step], is_meta: bool, rng: &mut StdRng) -> Arc<MemoryDb> {
        let steps: Vec<&Step> = steps.iter().filter(|step| step.is_meta == is_meta).collect();
        let synced = steps.iter().rposition(|step| step.write.is_none()).map_or(0, |at| at + 1);
        let kept = match rng.random_range(0..3) {
            0 => synced,
            1 => steps.len(),
            _ => rng.random_range(synced..=steps.len()),
        };
        let db = Arc::new(MemoryDb::default());
        for (key, value) in steps[..kept].iter().filter_map(|step| step.write.as_ref()) {
            match value {
                Some(value) => db.put(key, value).unwrap(),
                None => db.remove(key).unwrap(),
            }
        }
        db
    }

    fn open(db: Arc<dyn StateDb>, meta: Arc<dyn StateDb>) -> (ParkedStore, Arc<ParkedNotes>) {
        let notes = Arc::new(ParkedNotes::load(meta).unwrap());
        (ParkedStore::open_offline(db, notes.clone()).unwrap(), notes)
    }

    fn park(store: &ParkedStore, events: u64) {
        for _ in 0..events {
            store.park(&about("x"), b"1").unwrap();
        }
    }

    #[test]
    fn a_crash_between_the_store_and_its_books_never_looks_like_damage() {
        let seed = rand::rng().random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let steps = Arc::<Mutex<Vec<Step>>>::default();
        let record = |is_meta| Arc::new(Recorded { db: MemoryDb::default(), is_meta, steps: steps.clone() });
        let (store, notes) = open(record(false), record(true));
        store.look_after_missing();
        for _ in 0..100 {
            match rng.random_range(0..4) {
                0 => park(&store, rng.random_range(1..4)),
                1 => store.sync().unwrap(),
                // The keeper comes by.
                2 => notes.save(notes.noted().books).unwrap(),
                _ => {
                    let ids: Vec<u64> = store.events(0).map(|event| event.unwrap().id).collect();
                    let chosen: Vec<u64> = ids.into_iter().filter(|_| rng.random_ratio(1, 3)).collect();
                    store.remove(&chosen).unwrap();
                }
            }
        }
        let steps = steps.lock().unwrap();
        for end in 0..=steps.len() {
            for is_head_lost in [false, true] {
                let (db, meta) = (left(&steps[..end], false, &mut rng), left(&steps[..end], true, &mut rng));
                if is_head_lost {
                    db.remove(JOURNAL_KEY).unwrap();
                }
                let (store, notes) = open(db, meta);
                let missing = store.missing(notes.noted());
                assert_eq!(missing, Missing::Nothing, "after {end} steps, head lost: {is_head_lost}");
                // Nor does the next start miss anything.
                store.look_after_missing();
                assert_eq!(store.missing(notes.noted()), Missing::Nothing);
            }
        }
    }

    /// A store of which 1 to 5 were parked, 1 was removed, and 2 is lost; perhaps with the head.
    fn damaged(is_head_lost: bool) -> (Arc<MemoryDb>, Arc<MemoryDb>) {
        let (db, meta) = (Arc::new(MemoryDb::default()), Arc::new(MemoryDb::default()));
        let (store, _) = open(db.clone(), meta.clone());
        park(&store, 5);
        store.sync().unwrap();
        store.remove(&[1]).unwrap();
        db.remove(&key(2, 0)).unwrap();
        if is_head_lost {
            db.remove(JOURNAL_KEY).unwrap();
        }
        (db, meta)
    }

    #[test]
    fn what_is_missing_is_told_as_well_as_it_is_known() {
        for is_head_lost in [false, true] {
            let (db, meta) = damaged(is_head_lost);
            let (store, notes) = open(db, meta);
            let noted = notes.noted();
            assert_eq!(noted.books, ParkedBooks { ever: 5, removed: 1 });
            assert_eq!(store.missing(NotedParked { is_exact: true, ..noted }), Missing::Exactly(1));
            assert_eq!(store.missing(NotedParked { is_exact: false, ..noted }), Missing::AtLeast(1));
        }
        let (_, meta) = damaged(false);
        let (store, notes) = open(Arc::new(MemoryDb::default()), meta);
        assert_eq!(store.missing(notes.noted()), Missing::Store(4));
    }

    #[test]
    fn nothing_is_parked_and_no_books_begin_before_what_is_damaged_is_left() {
        let (db, meta) = damaged(false);
        let noted = || ParkedNotes::load(meta.clone()).unwrap().noted();
        let before = noted();
        let (store, _) = open(db.clone(), meta.clone());
        db.full.store(true, Ordering::SeqCst);
        store.look_after_missing();
        assert!(store.park(&about("x"), b"1").is_err());
        drop(store);
        // The process ended; the next one misses it again.
        assert_eq!((noted(), db.left.lock().unwrap().len()), (before, 0));
        let (store, _) = open(db.clone(), meta.clone());
        store.look_after_missing();
        assert_eq!(store.lost(), 1);
        db.full.store(false, Ordering::SeqCst);
        assert_eq!(store.park(&about("x"), b"1").unwrap(), 16);
        store.sync().unwrap();
        assert_eq!((store.last_id(), store.park(&about("x"), b"1").unwrap()), (16, 17));
        assert_eq!(*db.left.lock().unwrap(), [16], "once");
        assert_eq!(noted().books, ParkedBooks { ever: 4, removed: 1 });
        // Where nothing is missing nothing is left.
        let (store, _) = open(db.clone(), meta.clone());
        store.look_after_missing();
        assert_eq!((store.lost(), db.left.lock().unwrap().len()), (0, 1));
    }

    #[test]
    fn the_books_of_an_older_version_call_nothing_lost_that_may_have_been_removed() {
        for (is_head_lost, missing, counted) in [(false, Missing::AtLeast(1), 1), (true, Missing::AtMost(2), 0)] {
            let (db, _) = damaged(is_head_lost);
            let meta = Arc::new(MemoryDb::default());
            meta.put(b"parked", &5u64.to_le_bytes()).unwrap();
            let notes = Arc::new(ParkedNotes::load(meta.clone()).unwrap());
            let metrics = Metrics::new();
            let limits = ParkedConfig::default();
            let store = ParkedStore::open_in(db.clone(), limits, Some(notes.clone()), Some(metrics.clone())).unwrap();
            assert_eq!(store.missing(notes.noted()), missing);
            store.look_after_missing();
            assert_eq!((store.lost(), store.missing(notes.noted())), (counted, Missing::Nothing));
            // Perhaps nothing is damaged; perhaps it is.
            assert_eq!(*db.left.lock().unwrap(), [16]);
            let series = format!("ringtail_forward_parked_dropped_events_total{{reason=\"damaged\"}} {counted}\n");
            assert!(metrics.handle().render().contains(&series));
        }
    }
}
