//! A store in memory that loses what was not synced, fails and fills up on command: for tests of the log's logic.

mod segment;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use rand::Rng;
use rand::rngs::StdRng;

use segment::{HeldSegment, MemorySegment};

use super::error::StoreError;
use super::store::{ActiveSegment, Readable, SegmentFile, SegmentShape, Space, StateDb, Store};

/// What survives a crash, and what might.
#[derive(Default)]
struct Disk {
    segments: BTreeMap<u64, Slots>,
    /// Segments that were being prepared when the power went: there may be nothing of them, a part, or all.
    cut: BTreeSet<u64>,
    /// Segments of which a part is there, without its marker.
    unfinished: BTreeSet<u64>,
    failed_cuts: u32,
    /// Segments that are still held by whoever writes them.
    held: BTreeSet<u64>,
    quarantined: Vec<u64>,
    /// Segments that were opened to be read.
    opened: BTreeSet<u64>,
    states: BTreeMap<String, State>,
    faults: Faults,
    /// Writes to segments that have begun.
    writes: u64,
    /// Whoever syncs a segment takes it for that long.
    sync_gate: Arc<Mutex<()>>,
}

#[derive(Default)]
struct Slots {
    synced: BTreeMap<u32, Bytes>,
    unsynced: BTreeMap<u32, Bytes>,
    /// What a sync could not write, and no later one does: it is read all the same, as long as nobody looks at the disk.
    unwritten: BTreeMap<u32, Bytes>,
    /// What comes later, from a write that failed: at the latest when the segment is closed.
    late: BTreeMap<u32, Bytes>,
    /// How often it was cut, and which slots that emptied.
    cuts: u32,
    cut: BTreeSet<u32>,
}

impl Slots {
    /// The slots from `from` on in which there seems to be something.
    fn found_from(&self, from: u32) -> Vec<u32> {
        let found = |slot: &u32| self.unwritten.get(slot).is_none_or(|value| !value.is_empty());
        let slots = self.synced.range(from..).chain(self.unwritten.range(from..)).map(|(slot, _)| *slot);
        slots.filter(found).collect()
    }
}

/// Where a commit finds no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    Write,
    Flush,
    /// Of what it had to write, the slots of these bits are on disk.
    Sync(u32),
}

#[derive(Default, Clone)]
struct State {
    synced: BTreeMap<Vec<u8>, Vec<u8>>,
    now: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What goes wrong from now on.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Faults {
    /// Segments that the disk has room for.
    pub segments_max: Option<usize>,
    /// The disk has no room: this call of a commit fails, segments cannot be prepared, and nothing can be cut off.
    pub no_room: Option<NoRoom>,
    /// Once a commit has found that, there is some again.
    pub no_room_once: bool,
    /// Syncs of segments fail.
    pub sync_fails: bool,
    /// Writes to segments wait from that one on, counted from the first of all.
    pub writes_held_from: Option<u64>,
    /// Writes to segments panic.
    pub write_panics: bool,
    /// Segments cannot be prepared, and not for lack of space.
    pub prepare_fails: bool,
    /// The process has no file descriptors left to prepare segments with.
    pub descriptors_short: bool,
    /// Segments can neither be sealed, removed nor set aside.
    pub housekeeping_fails: bool,
    /// Small maps cannot be written.
    pub put_fails: bool,
    /// A few bytes of every chunk of that segment cannot be read, from that slot on.
    pub unreadable: Option<(u64, u32)>,
    /// Every sync from this count on never happened: the power went. Counts down.
    pub power_after_syncs: Option<u64>,
}

impl Faults {
    /// Nothing goes wrong.
    pub fn is_none(&self) -> bool {
        let Faults {
            segments_max,
            no_room,
            no_room_once: _,
            sync_fails,
            writes_held_from,
            write_panics,
            prepare_fails,
            descriptors_short,
            housekeeping_fails,
            put_fails,
            unreadable,
            power_after_syncs,
        } = *self;
        let fails = sync_fails || write_panics || prepare_fails || descriptors_short || housekeeping_fails || put_fails;
        let has_room = no_room.is_none() && segments_max.is_none();
        !fails && has_room && writes_held_from.is_none() && unreadable.is_none() && power_after_syncs.is_none()
    }

    fn check(&self, fails: bool, operation: &'static str) -> Result<(), StoreError> {
        if fails || self.power_after_syncs == Some(0) {
            return Err(StoreError::io(operation)(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        Ok(())
    }

    fn check_room(&self, finds_none: impl FnOnce(NoRoom) -> bool, operation: &'static str) -> Result<(), StoreError> {
        if self.power_after_syncs != Some(0) && self.no_room.is_some_and(finds_none) {
            return Err(StoreError::io(operation)(std::io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        Ok(())
    }
}

/// Bytes that a disk writes as a whole: small, as everything in these tests.
const SECTOR_BYTES: usize = 64;

/// The store. Clones share one disk.
#[derive(Clone, Default)]
pub(super) struct MemoryStore(Arc<Mutex<Disk>>);

impl MemoryStore {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.disk().faults = faults;
    }

    /// Sets what goes wrong from now on, but for the power.
    pub fn change_faults(&self, faults: Faults) {
        let mut disk = self.disk();
        let power_after_syncs = disk.faults.power_after_syncs;
        disk.faults = Faults { power_after_syncs, ..faults };
    }

    /// What goes wrong.
    pub fn faults(&self) -> Faults {
        self.disk().faults
    }

    /// While it is locked, syncs of segments take their time.
    pub fn sync_gate(&self) -> Arc<Mutex<()>> {
        self.disk().sync_gate.clone()
    }

    /// Writes to segments that have begun.
    pub fn writes(&self) -> u64 {
        self.disk().writes
    }

    /// The power is off.
    pub fn is_off(&self) -> bool {
        self.disk().faults.power_after_syncs == Some(0)
    }

    /// The disk after a power cut now: of what was not synced, each write is kept or lost at random, and the last one may
    /// be torn.
    pub fn after_power_cut(&self, rng: &mut StdRng) -> MemoryStore {
        let disk = self.disk();
        let mut after = Disk { quarantined: disk.quarantined.clone(), ..Disk::default() };
        for (id, slots) in &disk.segments {
            let mut synced = slots.synced.clone();
            let last = slots.unsynced.keys().next_back();
            for (slot, value) in &slots.unsynced {
                if Some(slot) == last && rng.random() {
                    synced.insert(*slot, torn(value, rng));
                } else if rng.random() {
                    synced.insert(*slot, value.clone());
                }
            }
            after.segments.insert(*id, Slots { synced, ..Slots::default() });
        }
        after.unfinished.clone_from(&disk.unfinished);
        for id in &disk.cut {
            match rng.random_range(0..3) {
                0 => {}
                1 => drop(after.unfinished.insert(*id)),
                _ => drop(after.segments.insert(*id, Slots::default())),
            }
        }
        for (name, state) in &disk.states {
            let mut kept = state.synced.clone();
            for key in state.now.keys().chain(state.synced.keys()) {
                if rng.random() {
                    match state.now.get(key) {
                        Some(value) => drop(kept.insert(key.clone(), value.clone())),
                        None => drop(kept.remove(key)),
                    }
                }
            }
            after.states.insert(name.clone(), State { synced: kept.clone(), now: kept });
        }
        MemoryStore(Arc::new(Mutex::new(after)))
    }

    /// Changes the value of a slot behind the log's back.
    pub fn damage(&self, id: u64, slot: u32, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.disk();
        let synced = &mut disk.segments.get_mut(&id).unwrap().synced;
        let mut value = synced.get(&slot).map(|value| value.to_vec()).unwrap_or_default();
        change(&mut value);
        synced.insert(slot, value.into());
    }

    /// Segments that were opened to be read.
    pub fn opened(&self) -> BTreeSet<u64> {
        self.disk().opened.clone()
    }

    /// From now on only what is opened then counts as opened.
    pub fn forget_opened(&self) {
        self.disk().opened.clear();
    }

    /// Loses the content of a small map.
    pub fn forget_state(&self, name: &str) {
        self.disk().states.remove(name);
    }

    /// A commit has found no room.
    fn no_room_found(&self) {
        let mut disk = self.disk();
        if disk.faults.no_room_once {
            disk.faults.no_room = None;
        }
    }

    fn segment(&self, id: u64, slots: u32) -> MemorySegment {
        let cuts = self.disk().segments.get(&id).map_or(0, |segment| segment.cuts);
        MemorySegment::new(self.clone(), id, slots, cuts)
    }

    /// How often a segment could not be cut for lack of room.
    pub fn failed_cuts(&self) -> u32 {
        self.disk().failed_cuts
    }

    /// Whether whoever writes a segment still holds it.
    pub fn is_held(&self, id: u64) -> bool {
        self.disk().held.contains(&id)
    }

    /// Runs a sync, unless it fails or the power is off.
    fn sync(&self, operation: &'static str, sync: impl FnOnce(&mut Disk)) -> Result<(), StoreError> {
        let mut disk = self.disk();
        if disk.faults.sync_fails {
            return Err(StoreError::io(operation)(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        match &mut disk.faults.power_after_syncs {
            Some(0) => return Err(StoreError::io(operation)(std::io::Error::other("the power is off"))),
            Some(left) => *left -= 1,
            None => {}
        }
        sync(&mut disk);
        Ok(())
    }
}

impl Store for MemoryStore {
    fn segments(&self) -> Result<Vec<u64>, StoreError> {
        Ok(self.disk().segments.keys().copied().collect())
    }

    fn remove_unfinished(&self, _first_needed: u64) -> Result<(), StoreError> {
        self.disk().unfinished.clear();
        Ok(())
    }

    fn quarantined(&self) -> Result<Vec<u64>, StoreError> {
        Ok(self.disk().quarantined.clone())
    }

    fn quarantined_states(&self) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }

    fn prepare(&self, id: u64) -> Result<Arc<dyn ActiveSegment>, StoreError> {
        let mut disk = self.disk();
        disk.faults.check(disk.faults.prepare_fails, "prepare segment")?;
        disk.faults.check_room(|_| true, "prepare segment")?;
        if disk.faults.descriptors_short {
            return Err(StoreError::io("prepare segment")(std::io::Error::from_raw_os_error(libc::EMFILE)));
        }
        if disk.faults.segments_max.is_some_and(|max| disk.segments.len() >= max) {
            return Err(StoreError::io("prepare segment")(std::io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        assert!(!disk.segments.contains_key(&id) && !disk.quarantined.contains(&id), "segment {id} was there before");
        disk.cut.insert(id);
        drop(disk);
        self.sync("prepare segment", |disk| {
            disk.cut.remove(&id);
            disk.segments.insert(id, Slots::default());
            disk.held.insert(id);
        })?;
        Ok(Arc::new(HeldSegment(self.segment(id, small_shape().slots))))
    }

    fn settle(&self, id: u64) -> Result<(), StoreError> {
        self.sync("settle segment", |disk| {
            let slots = disk.segments.get_mut(&id).expect("it is there");
            slots.synced.append(&mut slots.unsynced);
            slots.unwritten.clear();
        })
    }

    fn open(&self, id: u64) -> Result<Arc<dyn SegmentFile>, StoreError> {
        if self.faults().unreadable.is_some_and(|(unreadable, _)| unreadable == id) {
            return Err(StoreError::io("open segment")(std::io::Error::from_raw_os_error(libc::EIO)));
        }
        self.disk().opened.insert(id);
        Ok(Arc::new(self.segment(id, small_shape().slots)))
    }

    fn open_readable(&self, id: u64) -> Result<Readable, StoreError> {
        let Some((_, slots)) = self.faults().unreadable.filter(|(unreadable, _)| *unreadable == id) else {
            return Ok(Readable { file: self.open(id)?, unread_bytes: 0, hidden_bytes: 0 });
        };
        let hidden_bytes = self.disk().segments[&id].synced.range(slots..).map(|(_, value)| value.len() as u64).sum();
        let file = Arc::new(self.segment(id, slots));
        Ok(Readable { file, unread_bytes: 1, hidden_bytes })
    }

    fn cut(&self, id: u64, from: u32) -> Result<(), StoreError> {
        assert!(!self.disk().held.contains(&id), "segment {id} may still be written");
        if let Err(error) = self.faults().check_room(|_| true, "cut segment") {
            // It looks as if it were done, as long as nobody looks at the disk.
            let mut disk = self.disk();
            disk.failed_cuts += 1;
            let slots = disk.segments.get_mut(&id).expect("it is there");
            for slot in slots.found_from(from) {
                slots.unwritten.insert(slot, Bytes::new());
                slots.cut.insert(slot);
            }
            slots.cuts += 1;
            return Err(error);
        }
        self.sync("cut segment", |disk| {
            let slots = disk.segments.get_mut(&id).expect("it is there");
            slots.synced.append(&mut slots.unsynced);
            for slot in slots.found_from(from) {
                slots.synced.remove(&slot);
                slots.unwritten.remove(&slot);
                slots.cut.insert(slot);
            }
            slots.cuts += 1;
        })
    }

    fn seal(&self, _id: u64) -> Result<(), StoreError> {
        let faults = self.faults();
        faults.check(faults.housekeeping_fails, "seal segment")
    }

    fn remove(&self, id: u64) -> Result<(), StoreError> {
        let faults = self.faults();
        faults.check(faults.housekeeping_fails, "remove segment")?;
        self.sync("remove segment", |disk| {
            disk.segments.remove(&id);
        })
    }

    fn quarantine(&self, id: u64) -> Result<(), StoreError> {
        let faults = self.faults();
        faults.check(faults.housekeeping_fails, "quarantine segment")?;
        self.sync("quarantine segment", |disk| {
            disk.segments.remove(&id);
            disk.quarantined.push(id);
        })
    }

    fn segment_bytes(&self, _id: u64) -> Result<u64, StoreError> {
        Ok(1)
    }

    fn space(&self) -> Result<Space, StoreError> {
        let quarantined_segments = self.disk().quarantined.len() as u64;
        Ok(Space { quarantined_segments, free_bytes: u64::MAX, ..Space::default() })
    }

    fn state(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError> {
        // As it was, and durable before it is believed.
        self.sync("settle state", |disk| {
            let state = disk.states.entry(name.into()).or_default();
            state.synced = state.now.clone();
        })?;
        Ok(Arc::new(MemoryState { store: self.clone(), name: name.into() }))
    }

    fn shards(&self, name: &str) -> Result<Arc<dyn StateDb>, StoreError> {
        self.state(name)
    }
}

struct MemoryState {
    store: MemoryStore,
    name: String,
}

impl MemoryState {
    fn with<T>(&self, call: impl FnOnce(&mut State) -> T) -> T {
        call(self.store.disk().states.entry(self.name.clone()).or_default())
    }
}

impl StateDb for MemoryState {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.with(|state| state.now.get(key).cloned()))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let faults = self.store.faults();
        faults.check(faults.put_fails, "write state")?;
        self.with(|state| state.now.insert(key.to_vec(), value.to_vec()));
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.with(|state| state.now.remove(key));
        Ok(())
    }

    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<super::store::Entry>, StoreError> {
        Ok(self.with(|state| {
            let range = state.now.range(from.to_vec()..).take(limit);
            range.map(|(key, value)| (key.clone(), value.clone())).collect()
        }))
    }

    fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<bool, StoreError> {
        self.with(|state| state.now.iter().for_each(|(key, value)| see(key, value)));
        Ok(true)
    }

    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.with(|state| state.now.keys().next_back().cloned()))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.store.sync("sync state", |disk| {
            let state = disk.states.get_mut(&self.name).expect("it was opened");
            state.synced = state.now.clone();
        })
    }

    fn reopened(&self) -> u64 {
        0
    }
}

/// Flips a bit of each byte of a value in turn, and shows which.
pub(super) fn for_each_flip(state: &dyn StateDb, key: &[u8], check: impl Fn(usize)) {
    let good = state.get(key).unwrap().unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        state.put(key, &bad).unwrap();
        check(at);
    }
}

/// What is left of a write that the power cut: the front of it, or some of its sectors.
fn torn(value: &Bytes, rng: &mut StdRng) -> Bytes {
    if rng.random() {
        return value.slice(..rng.random_range(0..=value.len()));
    }
    let mut torn = value.to_vec();
    for sector in torn.chunks_mut(SECTOR_BYTES) {
        if rng.random() {
            sector.fill(0);
        }
    }
    torn.into()
}

/// A small shape, so that tests meet every boundary.
pub(super) fn small_shape() -> SegmentShape {
    SegmentShape {
        bytes_max: 4096,
        slots: 12,
        value_bytes_max: 512,
        sled_segment_bytes: 1 << 20,
        reserved_bytes: 4096,
        shard_bytes: 2048,
    }
}
