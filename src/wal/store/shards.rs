//! A map that may become large, as many small Dbs, of which few are open: sled needs memory in proportion to what a Db holds.
//!
//! # Layout
//! A key that begins with an id (u64 big-endian, from 1 on) belongs to a *shard*, each other one to the *head*.
//! ```text
//! parked/000000000000/          the head, made when something is put there
//! parked/000000000001/          a shard, named by the first id that it may hold; the next one's name ends it
//! parked/000000000742/          the newest shard; an id that is greater than all in it may begin another
//! parked/000000000001.removed/  a shard that is gone, but for its files
//! parked.old/                   a map of one Db, as it was before there were shards, on its way to parked/000000000001
//! ```
//!
//! # Order
//! sled recovers a prefix of what was written to one Db, and shards know nothing of each other. So the head is durable before
//! anything is removed from a shard, and a shard is closed only when it is durable. If that fails, whoever wrote to it learns
//! of it by [`StateDb::reopened`]. A shard that becomes empty is removed, by a sync, unless it is the newest. One that a start
//! finds empty stays: nobody knows then whether its entries were removed or are hidden by damage.
//!
//! # Damage
//! [`StateDb::visit`] finds it, and sets the shard aside alone. What shows later fails the call that met it. Where sled recovers
//! a shorter log and says nothing, it may do so again with what is written behind that: whoever finds something missing says so
//! by [`StateDb::leave_newest`], and the next shard begins at once, empty, so that a later start puts nothing there either.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::files::{await_unlocked, list, sync_directory};
use super::old_layout;
use super::state::{SledState, set_aside};
use super::{Entry, RESERVE, STATE_SLED_SEGMENT_BYTES, StateDb};
use crate::kill_point;
use crate::wal::error::StoreError;

/// Most shards open at a time, without the head.
const OPEN_MAX: usize = 2;
/// The name of the head. Its values are small.
const HEAD: u64 = 0;
/// sled's `segment_size` of the head.
const HEAD_SLED_SEGMENT_BYTES: usize = 256 << 10;
/// Ends the name of a shard that is gone, but for its files.
const REMOVED: &str = "removed";

/// A sharded map on sled.
pub(super) struct ShardedState {
    shards: Mutex<Shards>,
    reopened: Arc<AtomicU64>,
}

struct Shards {
    /// `wal.directory`
    directory: PathBuf,
    name: String,
    /// Another shard begins once so many bytes of values are in the newest one.
    shard_bytes: u64,
    reopened: Arc<AtomicU64>,
    /// All there are, and the head.
    firsts: BTreeSet<u64>,
    /// The open ones, and the head; the last one was used last.
    open: Vec<(u64, SledState)>,
    /// Bytes of values in the newest one, or put into it since.
    newest_bytes: u64,
    /// The last one that this process made.
    made: Option<u64>,
    /// Written since the last sync.
    unsynced: BTreeSet<u64>,
    /// Those that entries were removed from, and that may be empty.
    drained: BTreeSet<u64>,
    /// Those that failed to be closed: what the page cache shows of them may not be on the disk.
    failed: BTreeSet<u64>,
}

impl ShardedState {
    /// Opens the map called `name`, or makes a new one. Nothing is read before it is used.
    pub(super) fn open(directory: &Path, name: &str, shard_bytes: u64) -> Result<ShardedState, StoreError> {
        old_layout::take_over(directory, name)?;
        let path = directory.join(name);
        let mut firsts = BTreeSet::new();
        if path.is_dir() {
            remove_leftovers(&path).map_err(StoreError::io("remove what is left of a shard"))?;
            firsts.extend(list(&path)?);
        }
        let reopened = Arc::<AtomicU64>::default();
        let shards = Shards {
            directory: directory.to_path_buf(),
            name: name.to_owned(),
            shard_bytes,
            reopened: reopened.clone(),
            firsts,
            open: Vec::new(),
            newest_bytes: 0,
            made: None,
            unsynced: BTreeSet::new(),
            drained: BTreeSet::new(),
            failed: BTreeSet::new(),
        };
        Ok(ShardedState { shards: Mutex::new(shards), reopened })
    }

    /// As [`StateDb::visit`]; gives what is set aside to `damaged`, with its new place.
    pub(super) fn read_through(
        &self,
        see: &mut dyn FnMut(&[u8], &[u8]),
        damaged: &mut dyn FnMut(StoreError, &Path),
    ) -> Result<bool, StoreError> {
        self.shards().read_through(see, damaged)
    }

    fn shards(&self) -> MutexGuard<'_, Shards> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateDb for ShardedState {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let mut shards = self.shards();
        shards.holder(id_of(key)).map_or(Ok(None), |first| shards.shard(first)?.get(key))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.shards().put(key, value)
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.shards().remove(key)
    }

    fn scan(&self, from: &[u8], limit: usize) -> Result<Vec<Entry>, StoreError> {
        self.shards().scan(from, limit)
    }

    fn visit(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<bool, StoreError> {
        let mut shards = self.shards();
        let name = shards.name.clone();
        shards.read_through(see, &mut |error, aside| {
            tracing::error!(%error, aside = %aside.display(), "a part of {name} is damaged, set aside; the rest stays");
        })
    }

    fn last_key(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.shards().last_key()
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.shards().sync()
    }

    fn reopened(&self) -> u64 {
        self.reopened.load(Ordering::SeqCst)
    }

    fn leave_newest(&self, next: u64) -> Result<u64, StoreError> {
        self.shards().leave_newest(next)
    }
}

impl Shards {
    fn path(&self, first: u64) -> PathBuf {
        self.directory.join(&self.name).join(format!("{first:012}"))
    }

    fn newest(&self) -> Option<u64> {
        self.firsts.last().copied().filter(|first| *first != HEAD)
    }

    /// The shard that entries of `id` are in, if they are anywhere.
    fn holder(&self, id: u64) -> Option<u64> {
        self.firsts.range(..=id).next_back().copied().filter(|first| (*first == HEAD) == (id == HEAD))
    }

    fn closed(&self, first: u64) -> SledState {
        let sled_segment_bytes = if first == HEAD { HEAD_SLED_SEGMENT_BYTES } else { STATE_SLED_SEGMENT_BYTES };
        let reserve = self.directory.join(RESERVE);
        SledState::new(&self.path(first), &reserve, sled_segment_bytes, self.reopened.clone())
    }

    /// A shard, opened if it is not.
    fn shard(&mut self, first: u64) -> Result<&SledState, StoreError> {
        if let Some(at) = self.open.iter().position(|(open, _)| *open == first) {
            let used = self.open.remove(at);
            self.open.push(used);
        } else {
            self.make_room_for(first)?;
            let state = self.closed(first);
            if self.failed.contains(&first) {
                state.distrust();
            }
            state.check_marked()?;
            self.failed.remove(&first);
            self.open.push((first, state));
        }
        Ok(&self.open.last().expect("pushed above").1)
    }

    /// Makes a shard. It is durable when this returns.
    fn add(&mut self, first: u64) -> Result<(), StoreError> {
        self.make_room_for(first)?;
        let path = self.path(first);
        fs::create_dir_all(&path).map_err(StoreError::io("create shard"))?;
        sync_directory(&self.directory)?;
        kill_point::pass("shard.begun");
        let state = self.closed(first);
        if let Err(error) = state.read_through(&mut |_, _| {}) {
            drop(state);
            // Nothing was put there; what stays behind now is an empty shard at the next start.
            let _ = fs::remove_dir_all(&path);
            return Err(error);
        }
        kill_point::pass("shard.made");
        self.firsts.insert(first);
        self.open.push((first, state));
        self.made = Some(first);
        if self.newest() == Some(first) {
            self.newest_bytes = 0;
        }
        Ok(())
    }

    fn leave_newest(&mut self, next: u64) -> Result<u64, StoreError> {
        let newest = self.newest();
        if newest.is_some() && newest == self.made {
            // It took the place of a damaged one that is set aside.
            return Ok(next);
        }
        // One that came back empty has that name itself; see `set_aside`.
        let first = if newest == Some(next) { next + self.shard_bytes } else { next };
        self.add(first)?;
        Ok(first)
    }

    /// Closes a shard if one more would be too many: the one that was used longest ago, but not the newest.
    fn make_room_for(&mut self, first: u64) -> Result<(), StoreError> {
        let shards = self.open.iter().filter(|(open, _)| *open != HEAD).count();
        if first == HEAD || shards < OPEN_MAX {
            return Ok(());
        }
        let newest = self.newest();
        let unused = self.open.iter().map(|(open, _)| *open).find(|open| *open != HEAD && Some(*open) != newest);
        let unused = unused.expect("one of two is not the newest");
        let closed = self.settle(unused);
        if closed.is_err() {
            self.failed.insert(unused);
        }
        // Also after an error: that is counted, and the others stay within reach.
        self.forget(unused);
        closed
    }

    /// Leaves nothing to do for a shard that is about to be closed.
    fn settle(&mut self, first: u64) -> Result<(), StoreError> {
        self.sync_shard(first)?;
        kill_point::pass("shard.settled");
        match self.open.iter().find(|(open, _)| *open == first).map(|(_, state)| state.provide_for_open()) {
            // Then the reserve must do.
            Some(Err(error)) if !error.is_full() => Err(error),
            _ => Ok(()),
        }
    }

    /// Closes a shard.
    fn forget(&mut self, first: u64) {
        self.open.retain(|(open, _)| *open != first);
        self.unsynced.remove(&first);
    }

    fn sync_shard(&mut self, first: u64) -> Result<(), StoreError> {
        // Not again after an error: what was lost is counted then, and must be written again.
        if self.unsynced.remove(&first) { self.shard(first)?.sync() } else { Ok(()) }
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        // The head comes first.
        while let Some(first) = self.unsynced.first().copied() {
            self.sync_shard(first)?;
        }
        let newest = self.newest();
        for first in self.drained.clone().into_iter().filter(|first| Some(*first) != newest) {
            self.drained.remove(&first);
            self.remove_if_empty(first);
        }
        Ok(())
    }

    /// Removes a shard that is durable, if it is empty. Everything is as durable if that fails.
    fn remove_if_empty(&mut self, first: u64) {
        let removed = match self.last_key_of(first) {
            Ok(None) => self.remove_shard(first),
            is_empty => is_empty.map(drop),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, shard = %self.path(first).display(), "an empty shard cannot be removed");
        }
    }

    fn remove_shard(&mut self, first: u64) -> Result<(), StoreError> {
        self.forget(first);
        self.firsts.remove(&first);
        let path = self.path(first);
        let removed = path.with_extension(REMOVED);
        await_unlocked(&path)?;
        kill_point::pass("shard.emptied");
        fs::rename(&path, &removed).map_err(StoreError::io("remove shard"))?;
        kill_point::pass("shard.removed");
        // A shard with a part of its files must not come back.
        sync_directory(&self.directory.join(&self.name))?;
        fs::remove_dir_all(&removed).map_err(StoreError::io("remove shard"))
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let first = self.place(id_of(key))?;
        self.unsynced.insert(first);
        self.shard(first)?.put(key, value)?;
        if self.newest() == Some(first) {
            self.newest_bytes += value.len() as u64;
        }
        Ok(())
    }

    /// The shard to put entries of `id` into. An id that a full one has not met begins the next.
    fn place(&mut self, id: u64) -> Result<u64, StoreError> {
        if let Some(first) = self.holder(id)
            && (self.newest() != Some(first)
                || self.newest_bytes < self.shard_bytes
                || self.last_key_of(first)?.map_or(first, |key| id_of(&key)) >= id)
        {
            return Ok(first);
        }
        self.add(id)?;
        Ok(id)
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        let Some(first) = self.holder(id_of(key)) else { return Ok(()) };
        if first != HEAD {
            self.sync_shard(HEAD)?;
            self.drained.insert(first);
        }
        self.unsynced.insert(first);
        self.shard(first)?.remove(key)
    }

    fn scan(&mut self, from: &[u8], limit: usize) -> Result<Vec<Entry>, StoreError> {
        let begin = self.holder(id_of(from)).unwrap_or(HEAD);
        let mut entries = Vec::new();
        for first in self.firsts.range(begin..).copied().collect::<Vec<_>>() {
            if entries.len() < limit {
                let lowest = lowest_key(first);
                entries.extend(self.shard(first)?.scan(from.max(&lowest), limit - entries.len())?);
            }
        }
        Ok(entries)
    }

    /// The greatest key. All ids below the name of the newest shard were given out, also if none of them is left.
    fn last_key(&mut self) -> Result<Option<Vec<u8>>, StoreError> {
        let below_newest = self.newest().map(|newest| lowest_key(newest - 1));
        for first in self.firsts.iter().rev().copied().collect::<Vec<_>>() {
            if let Some(last) = self.last_key_of(first)? {
                return Ok(Some(last).max(below_newest));
            }
        }
        Ok(below_newest)
    }

    fn last_key_of(&mut self, first: u64) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.shard(first)?.last_key()?.filter(|key| *key >= lowest_key(first)))
    }

    fn read_through(
        &mut self,
        see: &mut dyn FnMut(&[u8], &[u8]),
        damaged: &mut dyn FnMut(StoreError, &Path),
    ) -> Result<bool, StoreError> {
        let (mut is_whole, mut of_head) = (true, Vec::new());
        for first in self.firsts.clone() {
            let (lowest, mut bytes) = (lowest_key(first), 0);
            let mut see_one = |key: &[u8], value: &[u8]| {
                if *key < *lowest {
                    of_head.push((key.to_vec(), value.to_vec()));
                } else {
                    bytes += value.len() as u64;
                    see(key, value);
                }
            };
            let read = match self.open.iter().find(|(open, _)| *open == first) {
                Some((_, state)) => state.visit(&mut see_one),
                None => self.closed(first).read_through(&mut see_one),
            };
            match read {
                Ok(()) if self.newest() == Some(first) => self.newest_bytes = bytes,
                Ok(()) => {}
                Err(error) if error.is_damage() => {
                    is_whole = false;
                    damaged(error, &self.set_aside(first)?);
                }
                Err(error) => return Err(error),
            }
        }
        self.take_to_head(of_head)?;
        Ok(is_whole)
    }

    /// What a map of one Db held beside entries of ids belongs to the head, unless that has it already.
    fn take_to_head(&mut self, entries: Vec<Entry>) -> Result<(), StoreError> {
        for (key, value) in entries {
            if self.holder(HEAD).is_none() || self.shard(HEAD)?.get(&key)?.is_none() {
                self.put(&key, &value)?;
            }
        }
        self.sync_shard(HEAD)
    }

    /// If it is the newest one, another begins before: its name says which ids were given out. It has not met as many ids as
    /// it may hold bytes, unless it was emptied and filled again and again; the head knows the ids of what was removed.
    fn set_aside(&mut self, first: u64) -> Result<PathBuf, StoreError> {
        if self.newest() == Some(first) {
            self.add(first + self.shard_bytes)?;
        }
        self.forget(first);
        await_unlocked(&self.path(first))?;
        kill_point::pass("shard.damaged");
        let aside = set_aside(&self.directory, &self.name, &self.path(first))?;
        kill_point::pass("shard.set_aside");
        self.firsts.remove(&first);
        self.drained.remove(&first);
        self.failed.remove(&first);
        Ok(aside)
    }
}

/// The id that `key` begins with, or that of the head.
fn id_of(key: &[u8]) -> u64 {
    key.first_chunk().map_or(HEAD, |id| u64::from_be_bytes(*id))
}

/// No key in a shard is below.
fn lowest_key(first: u64) -> Vec<u8> {
    if first == HEAD { Vec::new() } else { first.to_be_bytes().to_vec() }
}

fn remove_leftovers(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?.path();
        if entry.extension().is_some_and(|extension| extension == REMOVED) {
            fs::remove_dir_all(entry)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
