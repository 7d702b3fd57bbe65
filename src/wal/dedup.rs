//! The window of recent batches: a retry of one that is durable is acked again and not stored again.
//!
//! A client that saw no ack sends its batch once more, perhaps over another connection, after a restart or a crash of
//! either side. A batch is known again by its **fingerprint**: who sent it, its `req_guid`, and its events. The events are
//! part of it so that a client which reuses a `req_guid` for something else loses nothing. A batch without a `req_guid`,
//! or of a client without an id, has no fingerprint and is always stored.
//!
//! # What is durable
//! Batches in the segment that is being written are found there again by recovery. Those in older segments are saved as
//! **blocks** in `meta`, before their segment can be trimmed, so that delivered batches stay in the window.
//!
//! ```text
//! key    "dedup" │ number of the block u64, big-endian
//! value  version u8 │ the window is saved up to this sequence u64 │ (fingerprint 16 bytes │ received at s u32)… │ crc32c u32
//! ```
//!
//! # Limits
//! A batch that is lost to damage later is still known, and a retry of it acked: the ledger of losses says that it is gone.
//!
//! The newest `wal.dedup.entries_max` batches, none older than `wal.dedup.age_max`; at most 100 bytes of memory each, 60
//! as a rule.

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::{Buf, BufMut};
use tokio::sync::oneshot;

use super::appender::Done;
use super::checksum::{append_checksum, strip_checksum};
use super::error::{CommitError, StoreError};
use super::scan::for_each_with_prefix;
use super::store::{STATE_VALUE_BYTES_MAX, StateDb};
use crate::batch::Batch;
use crate::config::DedupConfig;

const PREFIX: &[u8] = b"dedup";
const VERSION: u8 = 1;
const ENTRY_BYTES: usize = 20;
/// Entries of one block.
const BLOCK_ENTRIES: usize = (STATE_VALUE_BYTES_MAX - 64) / ENTRY_BYTES;

/// What a batch is known again by: 128 bits that nobody can choose.
pub(super) type Fingerprint = [u8; 16];

/// The fingerprint of a batch; none if it has no `req_guid`, or its client no id.
pub(super) fn fingerprint(batch: &Batch) -> Option<Fingerprint> {
    let req_guid = batch.request.req_guid();
    if req_guid.is_empty() || batch.client.id.is_empty() {
        return None;
    }
    let mut hash = blake3::Hasher::new();
    for text in [&batch.client.group, &batch.client.id, req_guid] {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    // A checksum is enough for what guards a client against itself.
    let mut events = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    for event in batch.request.events() {
        events.update(&(event.event_type.len() as u64).to_le_bytes());
        events.update(event.event_type.as_bytes());
        events.update(&(event.payload.len() as u64).to_le_bytes());
        events.update(event.payload);
    }
    hash.update(&events.finalize().to_le_bytes());
    let hash = hash.finalize();
    hash.as_bytes().first_chunk().copied()
}

/// What the window knows of a batch.
pub(super) enum Known {
    /// It is durable.
    Durable,
    /// It is being committed; the answer comes when that is.
    Pending(oneshot::Receiver<Done>),
    /// It is new.
    New,
}

/// A committed batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    fingerprint: Fingerprint,
    received_at_s: u32,
}

/// See the module.
pub(super) struct Window {
    entries_max: usize,
    age_max_s: u64,
    /// Committed batches, oldest first.
    order: VecDeque<Entry>,
    /// The fingerprints in `order`.
    committed: HashSet<Fingerprint>,
    /// Batches being committed, and who else waits for them.
    pending: HashMap<Fingerprint, Vec<oneshot::Sender<Done>>>,
    /// Every committed batch before this sequence is in the window, if it belongs there.
    end_sequence: u64,
    /// The newest entries that are not saved.
    unsaved: usize,
}

impl Window {
    /// An empty window. It remembers nothing if it is switched off.
    pub fn new(config: &DedupConfig) -> Window {
        Window {
            entries_max: if config.enabled { config.entries_max } else { 0 },
            age_max_s: config.age_max.as_secs(),
            order: VecDeque::new(),
            committed: HashSet::new(),
            pending: HashMap::new(),
            end_sequence: 0,
            unsaved: 0,
        }
    }

    /// Whether it remembers anything.
    pub fn is_on(&self) -> bool {
        self.entries_max > 0
    }

    /// Looks a batch up, received at `now_ms`.
    pub fn look_up(&mut self, fingerprint: &Fingerprint, now_ms: u64) -> Known {
        self.expire(now_ms);
        if self.committed.contains(fingerprint) {
            return Known::Durable;
        }
        let Some(waiting) = self.pending.get_mut(fingerprint) else { return Known::New };
        let (done, answer) = oneshot::channel();
        waiting.push(done);
        Known::Pending(answer)
    }

    /// A new batch is on its way to the disk.
    pub fn begin(&mut self, fingerprint: Fingerprint) {
        if self.is_on() {
            self.pending.insert(fingerprint, Vec::new());
        }
    }

    /// A batch is durable. Returns who else waited for it.
    pub fn commit(&mut self, fingerprint: Fingerprint, received_at_ms: u64) -> Vec<oneshot::Sender<Done>> {
        self.remember(fingerprint, received_at_ms);
        self.pending.remove(&fingerprint).unwrap_or_default()
    }

    /// Every batch before `sequence` was committed and told of.
    pub fn committed_until(&mut self, sequence: u64) {
        self.end_sequence = sequence;
    }

    /// A batch was refused: so is everybody else who waited for it.
    pub fn refuse(&mut self, fingerprint: &Fingerprint, error: &CommitError) {
        for done in self.pending.remove(fingerprint).unwrap_or_default() {
            let _ = done.send(Err(error.clone()));
        }
    }

    /// No batch is committed any more.
    pub fn refuse_all(&mut self, error: &CommitError) {
        for done in self.pending.drain().flat_map(|(_, waiting)| waiting) {
            let _ = done.send(Err(error.clone()));
        }
    }

    /// Adds a committed batch.
    pub fn remember(&mut self, fingerprint: Fingerprint, received_at_ms: u64) {
        if !self.is_on() || !self.committed.insert(fingerprint) {
            return;
        }
        if self.order.len() == self.entries_max {
            self.forget_oldest();
        }
        let received_at_s = u32::try_from(received_at_ms / 1000).unwrap_or(u32::MAX);
        self.order.push_back(Entry { fingerprint, received_at_s });
        self.unsaved += 1;
    }

    fn expire(&mut self, now_ms: u64) {
        let now_s = now_ms / 1000;
        while self.order.front().is_some_and(|entry| u64::from(entry.received_at_s) + self.age_max_s < now_s) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(entry) = self.order.pop_front() {
            self.committed.remove(&entry.fingerprint);
            self.unsaved = self.unsaved.min(self.order.len());
        }
    }
}

/// What of a window is to be saved: a copy, so that nobody waits for the disk.
pub(super) struct Unsaved {
    entries: Vec<Entry>,
    /// The window's own end.
    end_sequence: u64,
    /// Entries in the whole window.
    len: usize,
}

impl Window {
    /// Takes what is not saved yet.
    pub fn take_unsaved(&mut self) -> Unsaved {
        let unsaved = std::mem::take(&mut self.unsaved);
        let entries = self.order.range(self.order.len() - unsaved..).copied().collect();
        Unsaved { entries, end_sequence: self.end_sequence, len: self.order.len() }
    }

    /// What was taken is still to be saved.
    pub fn not_saved(&mut self, unsaved: &Unsaved) {
        self.unsaved = (self.unsaved + unsaved.entries.len()).min(self.order.len());
    }
}

/// The window on disk.
#[derive(Default)]
pub(super) struct SavedWindow {
    /// Number and entries of each block, oldest first.
    blocks: VecDeque<(u64, usize)>,
    next_block: u64,
    /// Every committed batch before this sequence is saved, if it belongs into the window.
    pub end_sequence: u64,
}

impl SavedWindow {
    /// Reads what was saved into `window`. What a damaged or missing block held is not known again, unless it is still in
    /// the log: the window counts as saved only up to there.
    pub fn load(meta: &dyn StateDb, window: &mut Window) -> Result<SavedWindow, StoreError> {
        let mut saved = SavedWindow::default();
        let mut whole = true;
        for_each_with_prefix(meta, PREFIX, |number, value| {
            let Ok(number) = number.try_into().map(u64::from_be_bytes) else { return };
            whole &= saved.blocks.is_empty() || number == saved.next_block;
            saved.next_block = number + 1;
            let Some((end_sequence, entries)) = decode(value) else {
                tracing::warn!("a block of the dedup window is damaged");
                saved.blocks.push_back((number, 0));
                whole = false;
                return;
            };
            saved.blocks.push_back((number, entries.len()));
            if whole {
                saved.end_sequence = end_sequence;
            }
            for entry in entries {
                window.remember(entry.fingerprint, u64::from(entry.received_at_s) * 1000);
            }
        })?;
        window.unsaved = 0;
        window.end_sequence = saved.end_sequence;
        Ok(saved)
    }

    /// Saves `unsaved`, and removes blocks that the window has left. Durable on return. After an error everything is as
    /// before, but for what `meta` kept of it, which the next try writes over.
    pub fn save(&mut self, meta: &dyn StateDb, unsaved: &Unsaved) -> Result<(), StoreError> {
        if unsaved.entries.is_empty() && unsaved.end_sequence == self.end_sequence {
            return Ok(());
        }
        self.remove_left(meta, unsaved.len - unsaved.entries.len())?;
        let before = self.blocks.len();
        let saved = self.put_all(meta, unsaved).and_then(|()| meta.sync());
        if saved.is_ok() {
            self.end_sequence = unsaved.end_sequence;
        } else {
            self.next_block -= (self.blocks.len() - before) as u64;
            self.blocks.truncate(before);
        }
        saved
    }

    fn put_all(&mut self, meta: &dyn StateDb, unsaved: &Unsaved) -> Result<(), StoreError> {
        let blocks = unsaved.entries.chunks(BLOCK_ENTRIES).collect::<Vec<_>>();
        // Nothing but the sequence may be new.
        let (last, others) = blocks.split_last().map_or((&[][..], &[][..]), |(last, others)| (*last, others));
        for block in others {
            // What they say holds even if the last one is lost.
            self.put(meta, self.end_sequence, block)?;
        }
        self.put(meta, unsaved.end_sequence, last)
    }

    fn put(&mut self, meta: &dyn StateDb, end_sequence: u64, entries: &[Entry]) -> Result<(), StoreError> {
        meta.put(&key(self.next_block), &encode(end_sequence, entries))?;
        self.blocks.push_back((self.next_block, entries.len()));
        self.next_block += 1;
        Ok(())
    }

    /// Removes blocks that are not needed for the newest `needed` entries. All of them are durable.
    fn remove_left(&mut self, meta: &dyn StateDb, needed: usize) -> Result<(), StoreError> {
        let mut entries: usize = self.blocks.iter().map(|(_, entries)| entries).sum();
        while self.blocks.len() > 1 {
            let (number, len) = self.blocks[0];
            if entries - len < needed {
                break;
            }
            meta.remove(&key(number))?;
            self.blocks.pop_front();
            entries -= len;
        }
        Ok(())
    }
}

fn key(block: u64) -> Vec<u8> {
    [PREFIX, &block.to_be_bytes()].concat()
}

fn encode(end_sequence: u64, entries: &[Entry]) -> Vec<u8> {
    let mut value = Vec::with_capacity(1 + 8 + entries.len() * ENTRY_BYTES + 4);
    value.put_u8(VERSION);
    value.put_u64_le(end_sequence);
    for entry in entries {
        value.put_slice(&entry.fingerprint);
        value.put_u32_le(entry.received_at_s);
    }
    append_checksum(&mut value);
    value
}

fn decode(value: &[u8]) -> Option<(u64, Vec<Entry>)> {
    let covered = strip_checksum(value)?;
    if covered.len() < 9 || covered[0] != VERSION {
        return None;
    }
    let mut rest = &covered[1..];
    let end_sequence = rest.get_u64_le();
    let entries = rest.chunks_exact(ENTRY_BYTES).map(|mut entry| {
        let mut fingerprint = Fingerprint::default();
        entry.copy_to_slice(&mut fingerprint);
        Entry { fingerprint, received_at_s: entry.get_u32_le() }
    });
    Some((end_sequence, entries.collect()))
}
