//! The parked store: events that Kafka can never take, kept with where they came from and why they are here.
//!
//! # Format
//! One event has one id, counted up; it is spread over as many parts as its size needs:
//!
//! ```text
//! key    id, u64 big-endian · part, u16 big-endian
//! value  the event's bytes from part × STATE_VALUE_BYTES_MAX on
//! bytes  version (1) · parts, u16 big-endian · length of about, u32 big-endian · about, as JSON · payload
//! ```
//!
//! Part 0 is written last and removed first, and sled recovers a prefix of what was written: an id without a part 0
//! was never finished, its event is still in the log, and it is passed over. An id that has a part 0 and lacks another is
//! reported as damaged, never passed over. Nothing is overwritten.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::ParkReason;
use crate::batch::Sequence;
use crate::wal::{STATE_VALUE_BYTES_MAX, Scan, StateDb, StoreError};

const VERSION: u8 = 1;
const HEAD_BYTES: usize = 7;
const KEY_BYTES: usize = 10;

/// A parked event. As JSON: one flat object, the payload in base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedEvent {
    /// Its name in the store; larger is later.
    pub id: u64,
    /// Why it is here and where it came from.
    #[serde(flatten)]
    pub about: ParkedAbout,
    /// The event's bytes, as the client sent them.
    #[serde(with = "base64_bytes")]
    pub payload: Bytes,
}

/// Everything about a parked event but its payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedAbout {
    /// The topic it was for; of [`ParkReason::InvalidTopic`], not one that Kafka takes.
    pub topic: String,
    /// The record's key; none when it had none.
    pub key: Option<String>,
    /// The event's `type`.
    pub event_type: String,
    /// Why it is here.
    pub reason: ParkReason,
    /// The same in Kafka's words.
    pub error: String,
    /// The client's group.
    pub group: String,
    /// The client's id; may be empty.
    pub connection_id: String,
    /// The batch's name; may be empty.
    pub req_guid: String,
    /// Where its batch was in the log.
    pub sequence: Sequence,
    /// When the batch was received, milliseconds since the Unix epoch.
    pub received_at_ms: u64,
    /// When the event was parked, milliseconds since the Unix epoch.
    pub parked_at_ms: u64,
}

/// Why the parked store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ParkedError {
    /// The store below failed; worth a retry once its cause is gone.
    #[error("the parked store failed")]
    Store(#[from] StoreError),
    /// An event is not as it was written. Others are unaffected.
    #[error("parked event {id} is damaged: {what}")]
    Damaged {
        /// The event.
        id: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The event needs more parts than an id has room for (3 GiB).
    #[error("an event of {bytes} bytes is too large to park")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// The parked events of one log. Clones share the store and its count. Safe to use while the service runs.
#[derive(Clone)]
pub struct ParkedStore(Arc<Inner>);

struct Inner {
    db: Arc<dyn StateDb>,
    ids: Mutex<Ids>,
    count: AtomicU64,
}

/// Ids that are given out.
struct Ids {
    next: u64,
    /// All below are durable.
    synced: u64,
}

impl ParkedStore {
    /// Opens the store in `db` ([`crate::wal::Wal::parked`] or [`crate::wal::open_parked`]). Reads it through once, to
    /// count.
    ///
    /// # Errors
    /// [`ParkedError::Store`]
    pub fn open(db: Arc<dyn StateDb>) -> Result<ParkedStore, ParkedError> {
        let last_id = db.last_key()?.and_then(|key| split_key(&key)).map_or(0, |(id, _)| id);
        let store = ParkedStore(Arc::new(Inner {
            db,
            ids: Mutex::new(Ids { next: last_id + 1, synced: last_id + 1 }),
            count: AtomicU64::new(0),
        }));
        let mut ids = store.entries(0);
        let mut count = 0;
        while let Some((_, part, _)) = ids.next_entry()? {
            count += u64::from(part == 0);
        }
        store.0.count.store(count, Ordering::Relaxed);
        Ok(store)
    }

    /// Adds an event, under the id it returns. Durable only once [`ParkedStore::sync`] has returned.
    ///
    /// # Errors
    /// [`ParkedError::TooLarge`]: the event is not in the store. [`ParkedError::Store`]: neither is anything that was parked
    /// since the last sync; park it again.
    pub fn park(&self, about: &ParkedAbout, payload: &[u8]) -> Result<u64, ParkedError> {
        let bytes = encode(about, payload)?;
        let mut ids = self.0.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ids.next;
        for (part, value) in bytes.chunks(STATE_VALUE_BYTES_MAX).enumerate().rev() {
            self.0.db.put(&key(id, part as u16), value).inspect_err(|_| self.forget_unsynced(&mut ids))?;
        }
        ids.next += 1;
        self.0.count.fetch_add(1, Ordering::Relaxed);
        Ok(id)
    }

    /// Makes everything parked and removed so far durable.
    ///
    /// # Errors
    /// [`ParkedError::Store`]; nothing that was parked since the last sync is in the store then: park it again.
    pub fn sync(&self) -> Result<(), ParkedError> {
        let mut ids = self.0.ids.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.db.sync().inspect_err(|_| self.forget_unsynced(&mut ids))?;
        ids.synced = ids.next;
        Ok(())
    }

    /// A store that failed may have lost all that was not synced. The ids are given out again, so that what it did keep
    /// is overwritten.
    fn forget_unsynced(&self, ids: &mut Ids) {
        self.0.count.fetch_sub(ids.next - ids.synced, Ordering::Relaxed);
        ids.next = ids.synced;
    }

    /// Events held now.
    pub fn count(&self) -> u64 {
        self.0.count.load(Ordering::Relaxed)
    }

    /// The events with ids not below `from_id`, oldest first. `take` and `filter` it; one event is in memory at a time.
    /// A damaged event is an error of its own and does not end it; a failing store does.
    pub fn events(&self, from_id: u64) -> ParkedEvents {
        ParkedEvents { entries: self.entries(from_id), ended: false }
    }

    /// The event called `id`, or none.
    ///
    /// # Errors
    /// [`ParkedError::Store`], [`ParkedError::Damaged`]
    pub fn get(&self, id: u64) -> Result<Option<ParkedEvent>, ParkedError> {
        self.events(id).next().transpose().map(|event| event.filter(|event| event.id == id))
    }

    /// Removes the event called `id`; whether there was one. Durable only once [`ParkedStore::sync`] has returned.
    ///
    /// # Errors
    /// [`ParkedError::Store`]
    pub fn remove(&self, id: u64) -> Result<bool, ParkedError> {
        let existed = self.0.db.get(&key(id, 0))?.is_some();
        let mut entries = self.entries(id);
        while let Some((entry_id, part, _)) = entries.next_entry()? {
            if entry_id != id {
                break;
            }
            self.0.db.remove(&key(id, part))?;
        }
        if existed {
            self.0.count.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(existed)
    }

    fn entries(&self, from_id: u64) -> Entries {
        Entries { store: self.clone(), scan: Scan::from(&key(from_id, 0)) }
    }
}

/// See [`ParkedStore::events`].
pub struct ParkedEvents {
    entries: Entries,
    ended: bool,
}

impl Iterator for ParkedEvents {
    type Item = Result<ParkedEvent, ParkedError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.next_event();
        self.ended = matches!(next, Err(ParkedError::Store(_)));
        next.transpose()
    }
}

impl ParkedEvents {
    fn next_event(&mut self) -> Result<Option<ParkedEvent>, ParkedError> {
        while let Some((id, part, first)) = self.entries.next_entry()? {
            if part != 0 {
                continue; // of an id without a part 0: never finished
            }
            let damaged = |what| ParkedError::Damaged { id, what };
            let parts = parts_of(&first).ok_or_else(|| damaged("its head is not one"))?;
            let mut bytes = first;
            for wanted in 1..parts {
                let more = self.entries.store.0.db.get(&key(id, wanted))?;
                bytes.extend(more.ok_or_else(|| damaged("a part is missing"))?);
            }
            self.entries.scan.skip_to(&key(id + 1, 0));
            let (about, payload) = decode(bytes).ok_or_else(|| damaged("it cannot be decoded"))?;
            return Ok(Some(ParkedEvent { id, about, payload }));
        }
        Ok(None)
    }
}

/// The raw entries of the store, in order.
struct Entries {
    store: ParkedStore,
    scan: Scan,
}

impl Entries {
    fn next_entry(&mut self) -> Result<Option<(u64, u16, Vec<u8>)>, ParkedError> {
        while let Some((name, value)) = self.scan.next_entry(&*self.store.0.db)? {
            if let Some((id, part)) = split_key(&name) {
                return Ok(Some((id, part, value)));
            }
        }
        Ok(None)
    }
}

fn key(id: u64, part: u16) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    key[..8].copy_from_slice(&id.to_be_bytes());
    key[8..].copy_from_slice(&part.to_be_bytes());
    key
}

fn split_key(key: &[u8]) -> Option<(u64, u16)> {
    let (id, part) = key.split_first_chunk()?;
    Some((u64::from_be_bytes(*id), u16::from_be_bytes(part.try_into().ok()?)))
}

fn encode(about: &ParkedAbout, payload: &[u8]) -> Result<Vec<u8>, ParkedError> {
    let about = serde_json::to_vec(about).expect("its fields are strings and numbers");
    let length = HEAD_BYTES + about.len() + payload.len();
    let parts = u16::try_from(length.div_ceil(STATE_VALUE_BYTES_MAX));
    let (Ok(parts), Ok(about_length)) = (parts, u32::try_from(about.len())) else {
        return Err(ParkedError::TooLarge { bytes: payload.len() });
    };
    let mut bytes = Vec::with_capacity(length);
    bytes.push(VERSION);
    bytes.extend(parts.to_be_bytes());
    bytes.extend(about_length.to_be_bytes());
    bytes.extend(about);
    bytes.extend(payload);
    Ok(bytes)
}

fn parts_of(first: &[u8]) -> Option<u16> {
    match *first {
        [VERSION, high, low, _, _, _, _, ..] => Some(u16::from_be_bytes([high, low])),
        _ => None,
    }
}

fn decode(bytes: Vec<u8>) -> Option<(ParkedAbout, Bytes)> {
    let mut payload = Bytes::from(bytes);
    let head = payload.split_to(HEAD_BYTES.min(payload.len()));
    let about_length = u32::from_be_bytes(head.get(3..HEAD_BYTES)?.try_into().ok()?) as usize;
    if about_length > payload.len() {
        return None;
    }
    let about = payload.split_to(about_length);
    Some((serde_json::from_slice(&about).ok()?, payload))
}

mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Bytes::from).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use proptest::prelude::*;

    /// A map in memory that refuses to write on command.
    #[derive(Default)]
    pub(in crate::forward) struct MemoryDb {
        map: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
        synced: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
        pub(in crate::forward) full: AtomicBool,
        /// Syncs fail and lose what was not synced, as the real one does.
        pub(in crate::forward) sync_fails: AtomicBool,
    }

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
            self.map.lock().unwrap().insert(key.to_vec(), value.to_vec());
            Ok(())
        }
        fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
            self.map.lock().unwrap().remove(key);
            Ok(())
        }
        fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
            let map = self.map.lock().unwrap();
            Ok(map.range(from.to_vec()..).take(limit).map(|(key, value)| (key.clone(), value.clone())).collect())
        }
        fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
            Ok(self.map.lock().unwrap().keys().next_back().cloned())
        }
        fn sync(&self) -> Result<(), StoreError> {
            self.check("sync")?;
            let (mut map, mut synced) = (self.map.lock().unwrap(), self.synced.lock().unwrap());
            if self.sync_fails.load(Ordering::SeqCst) {
                *map = synced.clone();
                return Err(StoreError::Io { operation: "sync", source: std::io::Error::other("lost") });
            }
            *synced = map.clone();
            Ok(())
        }
    }

    fn about(text: &str) -> ParkedAbout {
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
        }
    }

    fn open() -> (Arc<MemoryDb>, ParkedStore) {
        let db = Arc::new(MemoryDb::default());
        (db.clone(), ParkedStore::open(db).unwrap())
    }

    fn read(store: &ParkedStore) -> Vec<ParkedEvent> {
        store.events(0).collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn events_come_back_in_order_and_after_reopening() {
        let (db, store) = open();
        let sizes = [0, 1, STATE_VALUE_BYTES_MAX, STATE_VALUE_BYTES_MAX * 40, 3];
        let payloads: Vec<Vec<u8>> = sizes.iter().map(|size| (0..*size).map(|at| at as u8).collect()).collect();
        let ids: Vec<u64> = payloads.iter().map(|payload| store.park(&about("x"), payload).unwrap()).collect();
        assert_eq!(ids, [1, 2, 3, 4, 5]);
        let store = ParkedStore::open(db).unwrap();
        assert_eq!(store.count(), 5);
        let events = read(&store);
        assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), ids);
        assert!(events.iter().zip(&payloads).all(|(event, payload)| event.payload == payload));
        assert_eq!(store.events(4).next().unwrap().unwrap(), events[3]);
        assert_eq!(store.get(4).unwrap().as_ref(), Some(&events[3]));
        assert!(store.remove(4).unwrap());
        assert!(!store.remove(4).unwrap());
        assert_eq!((store.get(4).unwrap(), store.count()), (None, 4));
        assert_eq!(store.park(&about("y"), b"").unwrap(), 6);
        assert_eq!(read(&store).len(), 5);
    }

    #[test]
    fn unfinished_events_are_passed_over_and_damaged_ones_reported() {
        let (db, store) = open();
        let large = vec![7; STATE_VALUE_BYTES_MAX * 2];
        for _ in 0..3 {
            store.park(&about("x"), &large).unwrap();
        }
        db.remove(&key(1, 0)).unwrap();
        db.remove(&key(2, 1)).unwrap();
        let events: Vec<_> = store.events(0).collect();
        assert_eq!(events.len(), 2);
        assert!(matches!(events[0], Err(ParkedError::Damaged { id: 2, .. })), "{:?}", events[0]);
        assert_eq!(events[1].as_ref().unwrap().id, 3);
        assert_eq!(ParkedStore::open(db).unwrap().count(), 2);
    }

    #[test]
    fn what_could_not_be_parked_is_not_there() {
        let (db, store) = open();
        db.full.store(true, Ordering::SeqCst);
        assert!(store.park(&about("x"), b"1").is_err());
        assert!(store.sync().is_err());
        assert_eq!((store.count(), read(&store).len()), (0, 0));
        db.full.store(false, Ordering::SeqCst);
        assert_eq!(store.park(&about("x"), b"1").unwrap(), 1);
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
}
