//! Segments of the store in memory.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::{MemoryStore, NoRoom, Slots};
use crate::wal::error::StoreError;
use crate::wal::store::{ActiveSegment, SegmentFile};

/// One that is read.
pub(super) struct MemorySegment {
    store: MemoryStore,
    id: u64,
    slots: u32,
    /// How often it had been cut when it was opened: what is cut afterwards is still looked for.
    cuts: u32,
    is_closed: AtomicBool,
}

/// One that is written.
pub(super) struct HeldSegment(pub MemorySegment);

impl MemorySegment {
    pub fn new(store: MemoryStore, id: u64, slots: u32, cuts: u32) -> MemorySegment {
        MemorySegment { store, id, slots, cuts, is_closed: AtomicBool::new(false) }
    }
}

impl SegmentFile for MemorySegment {
    fn read(&self, slot: u32) -> Result<Bytes, StoreError> {
        if self.is_closed() {
            return Err(StoreError::io("read slot")(std::io::Error::other("the segment is closed")));
        }
        let disk = self.store.disk();
        // A reader may still hold a segment that was delivered and removed, as it may a removed file.
        let Some(slots) = disk.segments.get(&self.id).filter(|_| slot < self.slots) else { return Ok(Bytes::new()) };
        if self.cuts < slots.cuts && slots.cut.contains(&slot) {
            return Ok(Bytes::from_static(b"cut"));
        }
        let Slots { synced, unsynced, unwritten, .. } = slots;
        let value = [unsynced, unwritten, synced].into_iter().find_map(|values| values.get(&slot));
        Ok(value.cloned().unwrap_or_default())
    }

    fn slots(&self) -> u32 {
        self.slots
    }

    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }
}

impl SegmentFile for HeldSegment {
    fn read(&self, slot: u32) -> Result<Bytes, StoreError> {
        self.0.read(slot)
    }

    fn slots(&self) -> u32 {
        self.0.slots()
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

impl HeldSegment {
    fn change(&self, change: impl FnOnce(&mut Slots)) {
        // It may have been delivered and removed.
        if let Some(slots) = self.0.store.disk().segments.get_mut(&self.0.id) {
            change(slots);
        }
    }
}

impl ActiveSegment for HeldSegment {
    fn write(&self, slot: u32, value: &[u8]) -> Result<(), StoreError> {
        let store = &self.0.store;
        assert!(!store.faults().write_panics, "as it was told");
        store.disk().writes += 1;
        let number = store.writes();
        while store.faults().writes_held_from.is_some_and(|held| number >= held) {
            std::thread::yield_now();
        }
        let (faults, value) = (self.0.store.faults(), Bytes::copy_from_slice(value));
        faults.check(false, "write slot")?;
        let has_room = faults.check_room(|call| call == NoRoom::Write, "write slot");
        has_room.is_err().then(|| self.0.store.no_room_found());
        self.change(|slots| {
            let values = if has_room.is_ok() { &mut slots.unsynced } else { &mut slots.late };
            values.insert(slot, value);
        });
        has_room
    }

    fn flush(&self) -> Result<(), StoreError> {
        let has_room = self.0.store.faults().check_room(|call| call == NoRoom::Flush, "flush segment");
        has_room.inspect_err(|_| self.0.store.no_room_found())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let (faults, gate) = (self.0.store.faults(), self.0.store.sync_gate());
        let _passed = gate.lock().unwrap();
        let has_room = faults.check_room(|call| matches!(call, NoRoom::Sync(_)), "sync segment");
        if let (Err(error), Some(NoRoom::Sync(on_disk))) = (has_room, faults.no_room) {
            self.0.store.no_room_found();
            self.change(|slots| {
                for (slot, value) in std::mem::take(&mut slots.unsynced) {
                    let is_on_disk = on_disk >> (slot % u32::BITS) & 1 == 1;
                    let values = if is_on_disk { &mut slots.synced } else { &mut slots.unwritten };
                    values.insert(slot, value);
                }
            });
            return Err(error);
        }
        self.0.store.sync("sync segment", |disk| {
            let slots = disk.segments.get_mut(&self.0.id).expect("an open segment exists");
            slots.synced.append(&mut slots.unsynced);
        })
    }

    fn close(&self) -> Result<(), StoreError> {
        self.0.is_closed.store(true, Ordering::Relaxed);
        self.change(|slots| slots.unsynced.append(&mut slots.late));
        self.0.store.disk().held.remove(&self.0.id);
        Ok(())
    }
}

impl Drop for HeldSegment {
    fn drop(&mut self) {
        let _ = self.close();
    }
}
