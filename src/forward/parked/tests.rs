use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::format::{decode, parts_of};
use super::*;
use crate::config::WhenParkedFull;
use crate::forward::backoff::{Backoff, Retry};

/// A map in memory that refuses to write on command.
#[derive(Default)]
pub(crate) struct MemoryDb {
    map: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
    synced: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
    pub(crate) full: AtomicBool,
    /// Syncs fail and lose what was not synced, as the real one does.
    pub(crate) sync_fails: AtomicBool,
    /// Syncs fail and lose nothing.
    sync_lies: AtomicBool,
    /// Before the next sync another's use fails, and takes along what was not synced.
    forgets: AtomicBool,
    reopened: AtomicU64,
    /// The first ids of parts that were begun because the one before was damaged.
    pub(crate) left: Mutex<Vec<u64>>,
    /// Everything put (with a value) and removed (without), in turn.
    history: Mutex<Vec<Entry>>,
}

type Entry = (Vec<u8>, Option<Vec<u8>>);

impl MemoryDb {
    fn check(&self, operation: &'static str) -> Result<(), StoreError> {
        let full = self.full.load(Ordering::SeqCst);
        let source = || std::io::ErrorKind::StorageFull.into();
        if full { Err(StoreError::Io { operation, source: source() }) } else { Ok(()) }
    }
}

impl StateDb for MemoryDb {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.map.lock().unwrap().get(key).cloned())
    }
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.check("put")?;
        assert!(value.len() <= STATE_VALUE_BYTES_MAX);
        self.history.lock().unwrap().push((key.to_vec(), Some(value.to_vec())));
        self.map.lock().unwrap().insert(key.to_vec(), value.to_vec());
        Ok(())
    }
    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.history.lock().unwrap().push((key.to_vec(), None));
        self.map.lock().unwrap().remove(key);
        Ok(())
    }
    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let map = self.map.lock().unwrap();
        Ok(map.range(from.to_vec()..).take(limit).map(|(key, value)| (key.clone(), value.clone())).collect())
    }
    fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<bool, StoreError> {
        self.map.lock().unwrap().iter().for_each(|(key, value)| see(key, value));
        Ok(true)
    }
    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.map.lock().unwrap().keys().next_back().cloned())
    }
    fn leave_newest(&self, next: u64) -> Result<u64, StoreError> {
        self.check("leave")?;
        self.left.lock().unwrap().push(next + 10);
        Ok(next + 10)
    }
    fn sync(&self) -> Result<(), StoreError> {
        self.check("sync")?;
        let (mut map, mut synced) = (self.map.lock().unwrap(), self.synced.lock().unwrap());
        if self.forgets.swap(false, Ordering::SeqCst) {
            *map = synced.clone();
            self.reopened.fetch_add(1, Ordering::SeqCst);
        }
        let (fails, lies) = (self.sync_fails.load(Ordering::SeqCst), self.sync_lies.load(Ordering::SeqCst));
        if fails || lies {
            if fails {
                *map = synced.clone();
            }
            self.reopened.fetch_add(1, Ordering::SeqCst);
            return Err(StoreError::Io { operation: "sync", source: std::io::Error::other("lost") });
        }
        *synced = map.clone();
        Ok(())
    }
    fn reopened(&self) -> u64 {
        self.reopened.load(Ordering::SeqCst)
    }
}

pub(crate) fn about(text: &str) -> ParkedAbout {
    ParkedAbout {
        topic: text.into(),
        key: Some(text.into()),
        event_type: text.into(),
        reason: ParkReason::TooLarge,
        error: text.into(),
        group: text.into(),
        connection_id: text.into(),
        req_guid: text.into(),
        sequence: Sequence(7),
        received_at_ms: 1,
        parked_at_ms: 2,
        spill_number: None,
    }
}

fn open() -> (Arc<MemoryDb>, ParkedStore) {
    let db = Arc::new(MemoryDb::default());
    (db.clone(), ParkedStore::open(db).unwrap())
}

fn read(store: &ParkedStore) -> Vec<ParkedEvent> {
    store.events(0).collect::<Result<_, _>>().unwrap()
}

/// A store that holds events 1 to `count`, of a kilobyte each, with the bytes of one.
fn filled(limits: ParkedConfig, count: u64) -> (Arc<MemoryDb>, ParkedStore, u64) {
    let db = Arc::new(MemoryDb::default());
    let store = ParkedStore::open_in(db.clone(), limits, None, None).unwrap();
    for number in 1..=count {
        let about = ParkedAbout { parked_at_ms: 1000 * number, ..about("x") };
        assert_eq!(store.park(&about, &[7; 1024]).unwrap(), number);
    }
    store.sync().unwrap();
    let bytes = store.bytes().checked_div(count).unwrap_or_default();
    (db, store, bytes)
}

fn ids(store: &ParkedStore) -> Vec<u64> {
    read(store).iter().map(|event| event.id).collect()
}

/// What a start finds in `db`.
fn reopened(db: &Arc<MemoryDb>) -> ParkedStore {
    ParkedStore::open(db.clone()).unwrap()
}

fn limits(store: &ParkedStore) -> Limits {
    let second = Duration::from_secs(1);
    Limits::new(store, Retry::new(Backoff::new(second, second)), SmallRng::seed_from_u64(1))
}

const NO_LIMITS: ParkedConfig =
    ParkedConfig { bytes_max: bytesize::ByteSize(0), when_full: WhenParkedFull::Keep, age_max: Duration::ZERO };

#[test]
fn events_come_back_in_order_and_after_reopening() {
    let (db, store) = open();
    let sizes = [0, 1, STATE_VALUE_BYTES_MAX, STATE_VALUE_BYTES_MAX * 40, 3];
    let payloads: Vec<Vec<u8>> = sizes.iter().map(|size| (0..*size).map(|at| at as u8).collect()).collect();
    let parked: Vec<u64> = payloads.iter().map(|payload| store.park(&about("x"), payload).unwrap()).collect();
    assert_eq!(parked, [1, 2, 3, 4, 5]);
    assert!(ids(&store).is_empty(), "nobody sees what is not durable");
    store.sync().unwrap();
    let bytes = store.bytes();
    let store = reopened(&db);
    assert_eq!((store.count(), store.bytes(), store.ever()), (5, bytes, 5));
    let events = read(&store);
    assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), parked);
    assert!(events.iter().zip(&payloads).all(|(event, payload)| event.payload == payload));
    assert_eq!(store.events(4).next().unwrap().unwrap(), events[3]);
    assert_eq!(store.get(4).unwrap().as_ref(), Some(&events[3]));
    assert_eq!(store.remove(&[4, 4, 77]).unwrap().events, 1);
    assert_eq!(store.remove(&[4]).unwrap(), Removed::default());
    assert_eq!((store.get(4).unwrap(), store.count(), store.ever()), (None, 4, 5));
    assert_eq!(store.park(&about("y"), b"").unwrap(), 6);
    store.sync().unwrap();
    assert_eq!(ids(&store), [1, 2, 3, 5, 6]);
}

#[test]
fn unfinished_events_are_passed_over_and_damaged_ones_reported() {
    let (db, store) = open();
    let large = vec![7; STATE_VALUE_BYTES_MAX * 2];
    for _ in 0..3 {
        store.park(&about("x"), &large).unwrap();
    }
    store.sync().unwrap();
    db.remove(&key(1, 0)).unwrap();
    db.remove(&key(2, 1)).unwrap();
    let events: Vec<_> = store.events(0).collect();
    assert_eq!(events.len(), 2);
    assert!(matches!(events[0], Err(ParkedError::Damaged { id: 2, .. })), "{:?}", events[0]);
    assert!(matches!(store.get(2), Err(ParkedError::Damaged { id: 2, .. })));
    assert_eq!(store.get(1).unwrap(), None);
    assert_eq!(events[1].as_ref().unwrap().id, 3);
    let store = reopened(&db);
    assert_eq!(store.count(), 2);
    assert_eq!(store.remove(&[1, 2]).unwrap().events, 1, "a damaged one can be removed");
    assert_eq!(ids(&store), [3]);
}

#[test]
fn what_could_not_be_parked_is_not_there() {
    let (db, store) = open();
    db.full.store(true, Ordering::SeqCst);
    assert!(store.park(&about("x"), b"1").is_err());
    assert!(store.sync().is_err());
    assert_eq!((store.count(), store.bytes(), store.ever(), read(&store).len()), (0, 0, 0, 0));
    db.full.store(false, Ordering::SeqCst);
    assert_eq!(store.park(&about("x"), b"1").unwrap(), 1);
}

#[test]
fn ids_are_not_given_out_again() {
    let (db, store, _) = filled(NO_LIMITS, 5);
    store.remove(&[4, 5]).unwrap();
    let store = reopened(&db);
    assert_eq!((store.last_id(), store.park(&about("x"), b"").unwrap()), (5, 6));
    store.sync().unwrap();
    store.remove(&[1, 2, 3, 6]).unwrap();
    let store = reopened(&db);
    assert_eq!((store.count(), store.bytes(), store.ever(), store.last_id()), (0, 0, 6, 6));
}

#[test]
fn a_removal_that_fails_is_an_error_and_the_books_stay_right() {
    // What the failed sync lost is there again; what it did keep is gone.
    for (lies, left, removed_again) in [(false, vec![1, 2, 3], 2), (true, vec![3], 0)] {
        let (db, store, bytes) = filled(NO_LIMITS, 3);
        let switch = if lies { &db.sync_lies } else { &db.sync_fails };
        switch.store(true, Ordering::SeqCst);
        let error = store.drop_events(&[1, 2], ParkedDropReason::Operator).unwrap_err();
        assert!(matches!(error, ParkedError::Store(_)), "{error:?}");
        // As long as nothing can be made durable, what is gone may come back: it counts as held.
        assert_eq!((ids(&store), store.count(), store.bytes(), store.ever()), (left, 3, 3 * bytes, 3));
        switch.store(false, Ordering::SeqCst);
        assert_eq!(store.drop_events(&[1, 2], ParkedDropReason::Operator).unwrap().events, removed_again);
        assert_eq!((ids(&store), store.count(), store.bytes()), (vec![3], 1, bytes));
        store.sync().unwrap();
        let store = reopened(&db);
        assert_eq!((store.count(), store.bytes(), store.ever()), (1, bytes, 3));
    }
}

#[test]
fn the_one_that_parks_is_told_when_the_removal_of_another_lost_its_events() {
    let (db, store, _) = filled(NO_LIMITS, 2);
    assert_eq!(store.park(&about("new"), b"1").unwrap(), 3);
    db.sync_fails.store(true, Ordering::SeqCst);
    assert!(store.remove(&[1]).is_err());
    db.sync_fails.store(false, Ordering::SeqCst);
    assert!(matches!(store.sync(), Err(ParkedError::Forgotten)));
    assert_eq!((store.count(), store.ever()), (2, 2));
    // Also when a read failed, of which the store below alone knows.
    assert_eq!(store.park(&about("new"), b"1").unwrap(), 3);
    db.reopened.fetch_add(1, Ordering::SeqCst);
    assert!(matches!(store.park(&about("new"), b"2"), Err(ParkedError::Forgotten)));
    assert_eq!(store.park(&about("new"), b"1").unwrap(), 3);
    assert_eq!(store.park(&about("new"), b"2").unwrap(), 4);
    store.sync().unwrap();
    assert_eq!(ids(&store), [1, 2, 3, 4]);
}

#[test]
fn a_crash_amid_a_removal_never_looks_like_damage() {
    let (db, store, _) = filled(NO_LIMITS, 4);
    store.park(&about("x"), &vec![7; STATE_VALUE_BYTES_MAX * 3]).unwrap();
    store.sync().unwrap();
    let noted = store.ever();
    let before = db.synced.lock().unwrap().clone();
    db.history.lock().unwrap().clear();
    store.remove(&[1, 3, 5]).unwrap();
    store.park(&about("x"), b"").unwrap();
    let history = db.history.lock().unwrap().clone();
    assert!(history.len() > 7);
    for kept in 0..=history.len() {
        let after = Arc::new(MemoryDb::default());
        *after.map.lock().unwrap() = before.clone();
        for (key, value) in &history[..kept] {
            match value {
                Some(value) => after.put(key, value).unwrap(),
                None => after.remove(key).unwrap(),
            }
        }
        let store = reopened(&after);
        assert!(store.ever() >= noted, "{kept} of {} writes were kept", history.len());
        assert!(read(&store).iter().all(|event| event.id <= 6), "each is there as a whole, or not at all");
        assert_eq!(store.count(), ids(&store).len() as u64);
    }
    // Damage still shows.
    db.remove(&key(2, 0)).unwrap();
    assert_eq!(reopened(&db).ever(), noted);
    assert_eq!(store.ever(), noted + 1);
}

#[test]
fn many_park_and_remove_at_once() {
    let (db, store, _) = filled(NO_LIMITS, 0);
    const EVENTS: u64 = 3000;
    let is_done = AtomicBool::new(false);
    let removed: u64 = std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..EVENTS {
                let size = if number % 100 == 0 { STATE_VALUE_BYTES_MAX * 2 } else { 10 };
                store.park(&about("x"), &vec![7; size]).unwrap();
                if number % 7 == 0 {
                    store.sync().unwrap();
                }
            }
            store.sync().unwrap();
            is_done.store(true, Ordering::SeqCst);
        });
        let remover = |remainder: u64| {
            let (store, is_done) = (&store, &is_done);
            move || {
                let mut removed = 0;
                loop {
                    let is_last = is_done.load(Ordering::SeqCst);
                    // Two after the same events: each goes once.
                    let chosen: Vec<u64> =
                        store.events(0).map(|event| event.unwrap().id).filter(|id| id % 3 == remainder).collect();
                    removed += store.remove(&chosen).unwrap().events;
                    if is_last {
                        return removed;
                    }
                }
            }
        };
        let removers = [1, 1, 2].map(|remainder| scope.spawn(remover(remainder)));
        removers.map(|remover| remover.join().unwrap()).iter().sum()
    });
    assert_eq!(removed, EVENTS / 3 * 2);
    assert_eq!(ids(&store), (1..=EVENTS).filter(|id| id % 3 == 0).collect::<Vec<_>>());
    let bytes = store.bytes();
    for store in [store, reopened(&db)] {
        assert_eq!((store.count(), store.bytes(), store.ever()), (EVENTS / 3, bytes, EVENTS));
    }
}

#[test]
fn the_oldest_go_when_there_are_too_many_bytes() {
    let (_, _, bytes) = filled(NO_LIMITS, 1);
    let mut config = ParkedConfig { bytes_max: bytesize::ByteSize(bytes * 3 + 1), ..NO_LIMITS };
    let now = Instant::now();
    let (_, store, _) = filled(config.clone(), 10);
    assert!(!limits(&store).run(&store, now, 0), "they are kept");
    assert_eq!(store.count(), 10);
    config.when_full = WhenParkedFull::DropOldest;
    let (db, store, _) = filled(config, 10);
    let mut limits = limits(&store);
    db.sync_fails.store(true, Ordering::SeqCst);
    assert!(!limits.run(&store, now, 0));
    assert_eq!(store.count(), 10);
    db.sync_fails.store(false, Ordering::SeqCst);
    assert!(!limits.run(&store, now, 0), "the backoff is kept");
    assert!(limits.run(&store, now + Duration::from_secs(1), 0));
    assert_eq!(ids(&store), [8, 9, 10]);
    assert!(!limits.run(&store, now + Duration::from_secs(1), 0));
}

#[test]
fn the_oldest_go_when_they_are_too_old() {
    // Event n was parked at n seconds.
    let (_, store, _) = filled(ParkedConfig { age_max: Duration::from_secs(5), ..NO_LIMITS }, 10);
    let (mut limits, now) = (limits(&store), Instant::now());
    assert!(!limits.run(&store, now, 6000));
    let looked_at = |limits: &mut Limits, seconds: u64, now_ms: u64| {
        limits.run(&store, now + Duration::from_secs(seconds), now_ms);
        ids(&store).len()
    };
    assert_eq!(looked_at(&mut limits, 0, 8000), 10, "not at every turn");
    assert_eq!(looked_at(&mut limits, 1, 8001), 7);
    // By the clock of today, 4 to 10 were parked in the future; one parked now is not kept for ever behind them.
    let old = ParkedAbout { parked_at_ms: 0, ..about("x") };
    store.park(&old, b"").unwrap();
    store.sync().unwrap();
    assert_eq!(looked_at(&mut limits, 2, 100), 8);
    assert_eq!(looked_at(&mut limits, 3, 5001), 8, "it stands behind one that is young");
    assert_eq!(looked_at(&mut limits, 4, 3999), 8);
    let (_, store, _) = filled(ParkedConfig { age_max: Duration::from_secs(5), ..NO_LIMITS }, 3000);
    let mut limits = self::limits(&store);
    let turns = (0..10).take_while(|_| limits.run(&store, now, 2_000_000 + 5000)).count();
    assert_eq!((turns, store.count()), (2, 1001), "a bounded number a turn");
}

#[test]
fn filters_combine() {
    let (_, store) = open();
    for (topic, reason, client, sequence) in [
        ("a", ParkReason::TooLarge, "1", 5),
        ("b", ParkReason::TooLarge, "2", 6),
        ("a", ParkReason::InvalidTopic, "1", 7),
        ("a", ParkReason::TooLarge, "2", 8),
    ] {
        let about = ParkedAbout {
            topic: topic.into(),
            reason,
            connection_id: client.into(),
            event_type: format!("{topic}{client}"),
            group: "g".into(),
            key: (client == "1").then(|| client.into()),
            sequence: Sequence(sequence),
            received_at_ms: sequence * 10,
            parked_at_ms: sequence * 100,
            ..about("x")
        };
        store.park(&about, b"").unwrap();
    }
    store.sync().unwrap();
    let text = |text: &str| vec![text.to_owned()];
    let all = ParkedFilter::default;
    for (filter, wanted) in [
        (all(), vec![1, 2, 3, 4]),
        (ParkedFilter { topics: text("a"), ..all() }, vec![1, 3, 4]),
        (ParkedFilter { topics: vec!["a".into(), "b".into()], ..all() }, vec![1, 2, 3, 4]),
        (ParkedFilter { topics: text("a"), reasons: vec![ParkReason::TooLarge], ..all() }, vec![1, 4]),
        (ParkedFilter { connection_ids: text("2"), ..all() }, vec![2, 4]),
        (ParkedFilter { event_types: text("a2"), ..all() }, vec![4]),
        (ParkedFilter { groups: text("h"), ..all() }, vec![]),
        (ParkedFilter { keys: text("1"), ..all() }, vec![1, 3]),
        (ParkedFilter { from_sequence: Some(6), until_sequence: Some(7), ..all() }, vec![2, 3]),
        (ParkedFilter { received_from_ms: Some(60), received_until_ms: Some(80), ..all() }, vec![2, 3]),
        (ParkedFilter { parked_from_ms: Some(600), parked_until_ms: Some(700), ..all() }, vec![2]),
        (ParkedFilter { ids: [4, 1].into(), ..all() }, vec![1, 4]),
        (ParkedFilter { from_id: Some(2), until_id: Some(3), ..all() }, vec![2, 3]),
    ] {
        let matching: Vec<u64> =
            read(&store).iter().filter(|event| filter.matches(event)).map(|event| event.id).collect();
        assert_eq!(matching, wanted, "{filter:?}");
        assert!(matching.iter().all(|id| (filter.first_id()..=filter.last_id()).contains(id)), "{filter:?}");
        assert_eq!(filter.is_empty(), filter == all());
        let by_id = [&filter.ids.is_empty(), &filter.from_id.is_none()].contains(&&false);
        assert_eq!(filter.is_by_id(), by_id || filter == all(), "{filter:?}");
    }
    assert!(ParkedFilter { limit: Some(3), ..all() }.is_empty());
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(text in ".{0,20}", payload in proptest::collection::vec(any::<u8>(), 0..600)) {
        let about = ParkedAbout { key: (text.len() > 5).then(|| text.clone()), ..about(&text) };
        let (decoded, bytes) = decode(encode(&about, &payload).unwrap()).unwrap();
        prop_assert_eq!((&decoded, &bytes[..]), (&about, &payload[..]));
        let event = ParkedEvent { id: 3, about, payload: bytes };
        let line = serde_json::to_string(&event).unwrap();
        prop_assert!(!line.contains('\n'));
        prop_assert_eq!(serde_json::from_str::<ParkedEvent>(&line).unwrap(), event);
    }

    #[test]
    fn damage_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..60), at in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(), flip: u8) {
        let mut bytes = encode(&about("x"), &payload).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let cut = cut.index(bytes.len());
        parts_of(&bytes);
        decode(bytes[..cut].to_vec());
        decode(bytes);
    }
}

#[test]
fn a_removal_that_another_use_takes_along_is_no_removal() {
    let (db, store) = open();
    for _ in 0..3 {
        store.park(&about("t"), b"x").unwrap();
    }
    store.sync().unwrap();
    db.forgets.store(true, Ordering::SeqCst);
    let removed = store.drop_events(&[1, 2, 3], ParkedDropReason::Operator);
    assert!(matches!(removed, Err(ParkedError::Forgotten)), "{removed:?}");
    assert_eq!((read(&store).len(), store.count()), (3, 3));
    assert_eq!(store.drop_events(&[1, 2, 3], ParkedDropReason::Operator).unwrap().events, 3);
    assert_eq!((read(&store).len(), store.count(), store.bytes(), store.ever()), (0, 0, 0, 3));
}
