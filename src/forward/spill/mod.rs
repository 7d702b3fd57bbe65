//! The spill: events of topics that do not flow, moved out of the log's way so that its cursor can pass them.
//!
//! # How
//! Blocks of events (`block.rs`) are appended to files of up to [`FILE_BYTES_MAX`] in `spill/`, those of all topics to the
//! same one, and one `fdatasync` makes many durable. Where each block stands is kept in memory, about 60 bytes a block;
//! a small last block of a topic is written again together with what follows, so that blocks do not stay small. How far
//! each topic is worked off is in a small state file. A file without a block that is still needed is removed; when too
//! little of the oldest one is needed, that is written again.
//!
//! Why not sled, as the log: topics are worked off one by one, in any order. In one tree that costs memory and restart
//! time that grow with what is spilled (see the design's figures); in slots, a segment would have to be opened for every look.
//!
//! # Invariants
//! - The events of a topic have consecutive numbers, in order. A number is used again only when its event was taken out, by
//!   [`Spill::settle`] or because the call that wrote it failed.
//! - Of two blocks with the same number, the one written later counts. One with new events ends its topic: what had numbers
//!   from there on does not count any more.
//! - The state is durable before a file that it makes superfluous goes.
//! - What a block copies stays where it was until the copy is durable, and counts there if a power cut tore the copy.
//!
//! # Failure
//! A failed write or sync: nothing of the call is in the spill, its files are cut back and take no more blocks, the caller
//! tries again. A process that ends before the log's cursor passed spilled events reads them from the log again:
//! [`Spill::settle`] takes them out, also those of blocks that a power cut tore.
//!
//! A damaged body costs the events of its block, a damaged header also those of the rest of its file, a lost file all of its
//! own; the numbers that are missing say how many. They are counted too many if the log's cursor stood among them and the
//! log shows some again. A lost state costs duplicates. What is not noticed: events that were spilled in the second before a
//! crash and damaged after it in their header, and a spill that is gone as a whole, its state included.

mod block;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) use block::{Header, SpilledEvent};
use prost::Message;
use state::{State, TopicState};

use crate::batch::Sequence;
use crate::kill_point;
use crate::wal::Undelivered;

/// Files are left when they are larger.
const FILE_BYTES_MAX: u64 = 32 << 20;
/// A block takes events until it is larger.
const BLOCK_BYTES: usize = 256 << 10;
/// A last block smaller than this is written again with what follows.
const SMALL_BLOCK_BYTES: u64 = 32 << 10;
/// So much more disk than needed is not worth writing anything again.
const SLACK_BYTES: u64 = 2 * FILE_BYTES_MAX;

/// Why the spill cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// The file system refused.
    #[error("{operation} failed")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A block is not as it was written. The numbers before `end` that it holds are lost.
    #[error("a block of the spill is damaged")]
    Damaged {
        /// The first number after it.
        end: u64,
    },
}

impl SpillError {
    fn io(operation: &'static str) -> impl FnOnce(io::Error) -> SpillError {
        move |source| SpillError::Io { operation, source }
    }
}

/// What a spill holds.
#[doc(hidden)]
#[derive(Debug, Default)]
pub struct SpillContents {
    /// Topic and payload of each event, each topic in order.
    pub events: Vec<(String, bytes::Bytes)>,
    /// Events that cannot be read.
    pub lost: u64,
}

/// See the module.
pub(super) struct Spill {
    directory: PathBuf,
    id: String,
    id_saved: bool,
    topics: HashMap<Box<str>, Topic>,
    files: BTreeMap<u64, FileUse>,
    current: Option<Current>,
    next_file: u64,
    next_number: u64,
    settled_file: u64,
    events: u64,
    changed: bool,
    /// The state could not be saved, or nobody knows whether it was.
    doubtful: bool,
    /// What was there before was durable when the log was last about to be read.
    durable_until: BlockPlace,
    /// The directory's own name is durable.
    directory_synced: bool,
    /// Files that the process before may not have made durable.
    unsynced: Vec<u64>,
    /// The block that was read last.
    cache: Option<(BlockPlace, Arc<[SpilledEvent]>)>,
}

/// The events of one topic.
#[derive(Debug, Default)]
struct Topic {
    /// By their first number.
    blocks: BTreeMap<u64, Block>,
    /// The first number that is not worked off.
    consumed: u64,
    /// The number that its next event gets.
    end: u64,
    /// See [`TopicState::settled_end`].
    settled_end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct BlockPlace {
    file: u64,
    offset: u64,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    place: BlockPlace,
    bytes: u64,
    /// The first of its events that count.
    events: u32,
}

#[derive(Debug, Default, Clone, Copy)]
struct FileUse {
    bytes: u64,
    needed_bytes: u64,
}

struct Current {
    id: u64,
    file: File,
    bytes: u64,
}

/// An event in the block that was read for it.
pub(super) struct FoundEvent {
    events: Arc<[SpilledEvent]>,
    at: usize,
}

impl std::ops::Deref for FoundEvent {
    type Target = SpilledEvent;

    fn deref(&self) -> &SpilledEvent {
        &self.events[self.at]
    }
}

/// Where a call begins to write: the file, with its length, and the next one.
struct Begin {
    current: Option<(u64, u64)>,
    next_file: u64,
}

/// What is written, and not yet durable.
struct Written {
    topic: Box<str>,
    first: u64,
    block: Block,
}

impl Spill {
    /// Opens the spill in `directory`, which is made when it is first needed. Reads the headers of its blocks.
    ///
    /// # Errors
    /// [`SpillError::Io`]
    pub(super) fn open(directory: &Path) -> Result<Spill, SpillError> {
        let state = if directory.exists() {
            state::load(directory).map_err(SpillError::io("read the spill's state"))?
        } else {
            None
        };
        let id_saved = directory.exists();
        let id = if id_saved {
            state::load_id(directory).map_err(SpillError::io("read the spill's id"))?
        } else {
            uuid::Uuid::new_v4().to_string()
        };
        let mut spill = Spill {
            directory: directory.to_owned(),
            id,
            id_saved,
            topics: HashMap::new(),
            files: BTreeMap::new(),
            current: None,
            next_file: 1,
            next_number: 0,
            settled_file: 0,
            events: 0,
            changed: false,
            doubtful: false,
            durable_until: BlockPlace { file: 0, offset: 0 },
            directory_synced: false,
            unsynced: Vec::new(),
            cache: None,
        };
        let known = state.as_ref().map(Known::new);
        for id in file_ids(directory).map_err(SpillError::io("list the spill"))? {
            spill.scan(id, known.as_ref()).map_err(SpillError::io("read the spill"))?;
            spill.next_file = id + 1;
            if state.as_ref().is_none_or(|state| id >= state.durable_file) {
                spill.unsynced.push(id);
            }
        }
        if let Some(state) = state {
            spill.next_number = spill.next_number.max(state.next_number);
            spill.settled_file = state.settled_file;
            spill.durable_until = BlockPlace { file: state.durable_file, offset: state.durable_bytes };
            spill.next_file = spill.next_file.max(state.settled_file);
            for known in state.topics {
                // All of it may be missing, or its begin, or its end.
                let topic = spill.topics.entry(known.topic.as_str().into()).or_default();
                topic.settled_end = known.settled_end;
                topic.consumed = known.consumed;
                topic.end = topic.end.max(known.end);
            }
        }
        spill.events = spill.topics.values().map(|topic| topic.end - topic.consumed).sum();
        let consumed: Vec<_> = spill.topics.iter().map(|(name, topic)| (name.clone(), topic.consumed)).collect();
        consumed.into_iter().for_each(|(name, consumed)| spill.consume(&name, consumed));
        Ok(spill)
    }

    /// What tells it from a spill that was in its place before and is lost.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Takes in the headers of one file.
    fn scan(&mut self, id: u64, known: Option<&Known<'_>>) -> io::Result<()> {
        let file = File::open(self.path(id))?;
        let bytes = file.metadata()?.len();
        self.files.insert(id, FileUse { bytes, needed_bytes: 0 });
        let mut offset = 0;
        while let Some(header) = block::read_header(&file, offset)? {
            let place = BlockPlace { file: id, offset };
            let block_bytes = header.block_bytes();
            self.next_number = self.next_number.max(header.first + u64::from(header.events));
            let is_durable = known.is_some_and(|known| known.is_durable(place));
            let events = known.map_or(header.events, |known| known.counting(id, &header));
            let mut block = Block { place, bytes: block_bytes, events };
            let mut first = header.first;
            if header.copied > 0 && !is_durable && block::read_events(&file, offset)?.is_none() {
                // It was cut off, probably. Nothing was removed that it copies.
                first += u64::from(header.copied);
                block.events = block.events.saturating_sub(header.copied);
            }
            if block.events > 0 {
                self.index(&header.topic, first, block, header.copied == header.events);
                let topic = self.topics.get_mut(header.topic.as_str()).expect("it was just put there");
                topic.consumed = topic.consumed.min(first);
            }
            offset += block_bytes;
        }
        if offset < bytes {
            // The end of a write that was cut off, or damage: what is missing of a topic is found when its turn comes.
            tracing::warn!(file = %self.path(id).display(), offset, bytes, "the rest of a spill file cannot be read");
        }
        Ok(())
    }

    /// Lets a block count, instead of what had its numbers before; `is_copy`: all of it is a copy.
    fn index(&mut self, topic: &str, first: u64, block: Block, is_copy: bool) {
        let end = first + u64::from(block.events);
        let topic = match self.topics.get_mut(topic) {
            Some(topic) => topic,
            None => self.topics.entry(topic.into()).or_insert_with(|| Topic {
                consumed: first,
                end: first,
                ..Topic::default()
            }),
        };
        let before = topic.blocks.range(..first).next_back().map(|(first, block)| (*first, *block));
        if let Some((before_first, before)) = before {
            let events = u64::from(before.events).min(first - before_first) as u32;
            topic.blocks.insert(before_first, Block { events, ..before });
        }
        let replaced_end = if is_copy { end } else { u64::MAX };
        let replaced: Vec<u64> = topic.blocks.range(first..replaced_end).map(|(first, _)| *first).collect();
        for replaced in replaced {
            if let Some(gone) = topic.blocks.remove(&replaced) {
                self.files.entry(gone.place.file).or_default().needed_bytes -= gone.bytes;
            }
        }
        topic.end = if is_copy { topic.end.max(end) } else { end };
        topic.blocks.insert(first, block);
        self.files.entry(block.place.file).or_default().needed_bytes += block.bytes;
    }

    /// Takes out what the log will show again: events of batches that are still in the log and not delivered. One that comes
    /// before another of its topic which is not shown again stays, and is delivered twice: that takes records that went ahead,
    /// and then a crash. To be called when the log is about to be read from its cursor on.
    ///
    /// # Errors
    /// [`SpillError::Io`]
    pub(super) fn settle(&mut self, log: &Undelivered) -> Result<(), SpillError> {
        if self.files.is_empty() && self.topics.is_empty() {
            return Ok(());
        }
        self.current = None;
        self.make_durable().map_err(SpillError::io("sync the spill"))?;
        let names: Vec<Box<str>> = self.topics.keys().cloned().collect();
        for name in names {
            while let Some(kept) = self.last_kept(&name, log)? {
                let topic = self.topics.get_mut(&name).expect("its name was just listed");
                let Some((first, block)) = topic.blocks.pop_last() else { break };
                let end = (first + u64::from(kept)).max(topic.consumed);
                self.events -= topic.end - end;
                topic.end = end;
                if kept > 0 {
                    topic.blocks.insert(first, Block { events: kept, ..block });
                    break;
                }
                self.files.entry(block.place.file).or_default().needed_bytes -= block.bytes;
            }
        }
        self.topics.retain(|_, topic| topic.end > topic.consumed);
        self.topics.values_mut().for_each(|topic| topic.settled_end = topic.end);
        self.settled_file = self.next_file;
        self.durable_until = BlockPlace { file: self.next_file, offset: 0 };
        self.changed = true;
        self.save()
    }

    /// How many events of a topic's last block stay when those go, from the end on, that are in `log`; none: all that count,
    /// and what is missing after them.
    fn last_kept(&mut self, topic: &str, log: &Undelivered) -> Result<Option<u32>, SpillError> {
        let Some((first, block)) = self.topics[topic].blocks.last_key_value().map(|(first, block)| (*first, *block))
        else {
            return Ok(None);
        };
        let kept = match self.read(block.place) {
            Ok(events) => {
                let counting = &events[..block.events as usize];
                counting
                    .iter()
                    .rposition(|event| !log.contains(Sequence(event.log_sequence())))
                    .map_or(0, |at| at as u32 + 1)
            }
            Err(SpillError::Damaged { .. }) => match self.header(block.place)? {
                // Not torn by the last power cut, but damaged: not all of its events need be shown again.
                _ if log.ahead.is_some() && block.place < self.durable_until => block.events,
                Some(header) if log.contains(Sequence(header.first_sequence)) => 0,
                Some(header) if log.contains(Sequence(header.new_sequence)) => {
                    (header.first + u64::from(header.copied)).saturating_sub(first) as u32
                }
                _ => block.events,
            },
            Err(error) => return Err(error),
        };
        // What an earlier look at the log has left is not in it, whatever its sequence says: it may come from another log.
        let settled = self.topics[topic].settled_end.saturating_sub(first).min(u64::from(block.events)) as u32;
        let kept = kept.max(settled);
        Ok((kept < block.events).then_some(kept))
    }

    /// The header at `place`; none if it cannot be made out.
    fn header(&self, place: BlockPlace) -> Result<Option<block::BlockHeader>, SpillError> {
        match File::open(self.path(place.file)).and_then(|file| block::read_header(&file, place.offset)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            header => header.map_err(SpillError::io("read the spill")),
        }
    }

    /// Syncs what the process before may have left in the page cache: it counts now, and what it replaces may go.
    fn make_durable(&mut self) -> io::Result<()> {
        while let Some(id) = self.unsynced.last() {
            match File::open(self.path(*id)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                file => file?.sync_data()?,
            }
            self.unsynced.pop();
        }
        if self.directory.exists() {
            self.sync_directories()?;
        }
        Ok(())
    }

    fn sync_directories(&mut self) -> io::Result<()> {
        sync_directory(&self.directory)?;
        if !self.directory_synced {
            sync_directory(self.directory.parent().unwrap_or(Path::new(".")))?;
            self.directory_synced = true;
        }
        Ok(())
    }

    /// Adds events to the end of their topics, in order. Durable when this returns. For each topic the number of its first event.
    ///
    /// # Errors
    /// [`SpillError::Io`]: nothing of them is in the spill.
    pub(super) fn put(&mut self, topics: Vec<(&str, Vec<SpilledEvent>)>) -> Result<Vec<u64>, SpillError> {
        if self.doubtful {
            self.save()?;
        }
        let mut written = Vec::new();
        let begin = self.begin();
        let result = self.write(topics, &mut written).and_then(|firsts| {
            kill_point::pass("spill.written");
            self.sync()?;
            Ok(firsts)
        });
        let firsts = result.inspect_err(|_| self.abandon(begin))?;
        kill_point::pass("spill.synced");
        self.changed = true;
        for Written { topic, first, block } in written {
            let end = first + u64::from(block.events);
            self.next_number = self.next_number.max(end);
            let known = self.topics.get(&topic).map_or(first, |topic| topic.end);
            self.index(&topic, first, block, false);
            self.events += end - known;
        }
        Ok(firsts)
    }

    /// Where a call begins to write.
    fn begin(&self) -> Begin {
        let current = self.current.as_ref().map(|current| (current.id, current.bytes));
        Begin { current, next_file: self.next_file }
    }

    /// What was written since then must not be found again, as far as the file system lets it.
    fn abandon(&mut self, begin: Begin) {
        self.current = None;
        self.changed = true;
        if let Some((id, bytes)) = begin.current {
            let file = File::options().write(true).open(self.path(id));
            if let Err(error) = file.and_then(|file| file.set_len(bytes).and_then(|()| file.sync_data())) {
                tracing::warn!(%error, id, bytes, "a spill file cannot be cut back");
            }
            self.files.entry(id).or_default().bytes = bytes;
        }
        for id in begin.next_file..self.next_file {
            // If that fails, it is tried again when the state is saved.
            if fs::remove_file(self.path(id)).is_ok() {
                self.files.remove(&id);
            }
        }
    }

    fn write(
        &mut self,
        topics: Vec<(&str, Vec<SpilledEvent>)>,
        written: &mut Vec<Written>,
    ) -> Result<Vec<u64>, SpillError> {
        let mut firsts = Vec::with_capacity(topics.len());
        for (name, events) in topics {
            let known = self.topics.get(name);
            let mut first = known.map_or(self.next_number, |topic| topic.end);
            firsts.push(first);
            let last = known.and_then(|topic| topic.blocks.last_key_value()).map(|(first, block)| (*first, *block));
            let (mut block, mut copied) = (Vec::new(), 0);
            let is_small = |(last_first, last): &(u64, Block)| {
                last.bytes < SMALL_BLOCK_BYTES && last_first + u64::from(last.events) == first
            };
            if let Some((last_first, last)) = last.filter(is_small)
                && let Ok(known) = self.read(last.place)
            {
                block.extend_from_slice(&known[..last.events as usize]);
                (first, copied) = (last_first, last.events);
            }
            let mut bytes = 0;
            for event in events {
                bytes += event.encoded_len();
                block.push(event);
                if bytes >= BLOCK_BYTES {
                    let full = std::mem::take(&mut block);
                    let next = first + full.len() as u64;
                    written.push(self.append(name, first, full, copied)?);
                    (first, bytes, copied) = (next, 0, 0);
                }
            }
            if !block.is_empty() {
                written.push(self.append(name, first, block, copied)?);
            }
        }
        Ok(firsts)
    }

    fn append(
        &mut self,
        topic: &str,
        first: u64,
        events: Vec<SpilledEvent>,
        copied: u32,
    ) -> Result<Written, SpillError> {
        let count = events.len() as u32;
        let bytes = block::encode(topic, first, events, copied);
        if self.current.as_ref().is_some_and(|current| current.bytes >= FILE_BYTES_MAX) {
            self.sync()?;
            self.current = None;
        }
        let current = match &mut self.current {
            Some(current) => current,
            None => {
                let current = self.create().map_err(SpillError::io("make a spill file"))?;
                self.current.insert(current)
            }
        };
        current.file.write_all(&bytes).map_err(SpillError::io("write to the spill"))?;
        let block = Block {
            place: BlockPlace { file: current.id, offset: current.bytes },
            bytes: bytes.len() as u64,
            events: count,
        };
        current.bytes += block.bytes;
        self.files.entry(current.id).or_default().bytes = current.bytes;
        Ok(Written { topic: topic.into(), first, block })
    }

    fn create(&mut self) -> io::Result<Current> {
        if !self.id_saved {
            if !self.directory.exists() {
                fs::create_dir(&self.directory)?;
            }
            state::save_id(&self.directory, &self.id)?;
            self.id_saved = true;
        }
        let id = self.next_file;
        self.next_file += 1;
        let file = File::options().create_new(true).append(true).open(self.path(id))?;
        self.files.insert(id, FileUse::default());
        self.sync_directories()?;
        Ok(Current { id, file, bytes: 0 })
    }

    fn sync(&self) -> Result<(), SpillError> {
        let Some(current) = &self.current else { return Ok(()) };
        current.file.sync_data().map_err(SpillError::io("sync the spill"))
    }

    /// The event of `topic` with that number, which must be there.
    ///
    /// # Errors
    /// [`SpillError::Damaged`]: it is lost, and everything up to `end` with it. [`SpillError::Io`]: worth a retry.
    pub(super) fn event(&mut self, topic: &str, number: u64) -> Result<FoundEvent, SpillError> {
        let blocks = self.topics.get(topic).map(|topic| (&topic.blocks, topic.end));
        let (blocks, end) = blocks.ok_or(SpillError::Damaged { end: number + 1 })?;
        let found = blocks.range(..=number).next_back().map(|(first, block)| (*first, *block));
        let Some((first, block)) = found.filter(|(first, block)| number < first + u64::from(block.events)) else {
            // Nothing holds it: up to the next block all is gone.
            let end = blocks.range(number..).next().map_or(end, |(first, _)| *first);
            return Err(SpillError::Damaged { end });
        };
        let events = self.read(block.place).map_err(|error| match error {
            SpillError::Damaged { .. } => SpillError::Damaged { end: first + u64::from(block.events) },
            error => error,
        })?;
        Ok(FoundEvent { events, at: (number - first) as usize })
    }

    fn read(&mut self, place: BlockPlace) -> Result<Arc<[SpilledEvent]>, SpillError> {
        if let Some((cached, events)) = &self.cache
            && *cached == place
        {
            return Ok(events.clone());
        }
        let file = match File::open(self.path(place.file)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(SpillError::Damaged { end: 0 }),
            file => file.map_err(SpillError::io("open a spill file"))?,
        };
        let events = block::read_events(&file, place.offset).map_err(SpillError::io("read the spill"))?;
        let events: Arc<[SpilledEvent]> = events.ok_or(SpillError::Damaged { end: 0 })?.into();
        self.cache = Some((place, events.clone()));
        Ok(events)
    }

    /// Everything of `topic` before `number` is delivered or parked. Durable after [`Spill::save`].
    pub(super) fn consume(&mut self, topic: &str, number: u64) {
        let Some(known) = self.topics.get_mut(topic) else { return };
        let number = number.clamp(known.consumed, known.end);
        self.events -= number - known.consumed;
        known.consumed = number;
        while let Some((first, block)) = known.blocks.first_key_value().map(|(first, block)| (*first, *block)) {
            if first + u64::from(block.events) > number {
                break;
            }
            known.blocks.remove(&first);
            self.files.entry(block.place.file).or_default().needed_bytes -= block.bytes;
        }
        self.changed = true;
    }

    /// Makes what was consumed durable, and gives back the disk that it took. Does nothing when nothing was.
    ///
    /// # Errors
    /// [`SpillError::Io`]: worth a retry.
    pub(super) fn save(&mut self) -> Result<(), SpillError> {
        if !self.changed {
            return Ok(());
        }
        // On a full disk it fails, and what follows makes room.
        let gathered = self.gather();
        let topics = self.topics.iter().filter(|(_, topic)| topic.end > topic.consumed);
        let topics = topics.map(|(name, topic)| TopicState {
            topic: name.to_string(),
            consumed: topic.consumed,
            end: topic.end,
            settled_end: topic.settled_end,
        });
        let topics = topics.collect();
        // Whatever counts is durable.
        let durable = self.current.as_ref().map(|current| (current.id, current.bytes));
        let (durable_file, durable_bytes) = durable.unwrap_or((self.next_file, 0));
        let (next_number, settled_file) = (self.next_number, self.settled_file);
        let state = State { next_number, settled_file, durable_file, durable_bytes, topics };
        // If that fails, either state may be the one that counts: nothing new may rest on the old one.
        self.doubtful = true;
        state::save(&self.directory, &state).map_err(SpillError::io("save the spill's state"))?;
        self.doubtful = false;
        kill_point::pass("spill.saved");
        // Not before: with the old state, numbers that start anew would look like missing ones.
        self.topics.retain(|_, topic| topic.end > topic.consumed);
        let is_needed = |current: &mut Current| self.files.get(&current.id).is_some_and(|file| file.needed_bytes > 0);
        self.current.take_if(|current| !is_needed(current));
        let unneeded = |(id, file): (&u64, &FileUse)| (file.needed_bytes == 0).then_some(*id);
        for id in self.files.iter().filter_map(unneeded).collect::<Vec<_>>() {
            match fs::remove_file(self.path(id)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(SpillError::io("remove a spill file"))?,
            }
            self.files.remove(&id);
        }
        self.changed = gathered.is_err();
        gathered
    }

    /// Writes again what little is needed of the oldest file, when the files take much more than is needed.
    fn gather(&mut self) -> Result<(), SpillError> {
        let (bytes, needed) =
            self.files.values().fold((0, 0), |(bytes, needed), file| (bytes + file.bytes, needed + file.needed_bytes));
        let Some((&oldest, file)) = self.files.first_key_value() else { return Ok(()) };
        let is_current = self.current.as_ref().is_some_and(|current| current.id == oldest);
        if bytes <= 2 * needed + SLACK_BYTES || is_current || file.needed_bytes == 0 {
            return Ok(());
        }
        let blocks = self.topics.iter().flat_map(|(name, topic)| {
            let blocks = topic.blocks.iter().filter(|(_, block)| block.place.file == oldest);
            blocks.map(|(first, block)| (name.clone(), *first, *block))
        });
        let blocks = blocks.collect();
        let begin = self.begin();
        let written = self.copy(blocks).inspect_err(|_| self.abandon(begin))?;
        for Written { topic, first, block } in written {
            self.index(&topic, first, block, true);
        }
        Ok(())
    }

    /// Writes blocks again. Durable when this returns.
    fn copy(&mut self, blocks: Vec<(Box<str>, u64, Block)>) -> Result<Vec<Written>, SpillError> {
        let mut written = Vec::new();
        for (name, first, block) in blocks {
            match self.read(block.place) {
                Ok(events) => {
                    let events = events[..block.events as usize].to_vec();
                    written.push(self.append(&name, first, events, block.events)?);
                }
                // It stays where it is, and is reported when its turn comes.
                Err(SpillError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.sync()?;
        Ok(written)
    }

    /// The numbers of the events of `topic`; empty when there are none.
    pub(super) fn numbers(&self, topic: &str) -> std::ops::Range<u64> {
        self.topics.get(topic).map_or(0..0, |topic| topic.consumed..topic.end)
    }

    /// The topics that have events.
    pub(super) fn topics(&self) -> impl Iterator<Item = &str> {
        self.topics.iter().filter(|(_, topic)| topic.end > topic.consumed).map(|(name, _)| &**name)
    }

    /// Bytes of the blocks that are needed.
    pub(super) fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.needed_bytes).sum()
    }

    /// Events in it.
    pub(super) fn count(&self) -> u64 {
        self.events
    }

    /// Gives every event to `take`, with its topic: topic by topic, by name, each in order; and whether [`Spill::settle`] has
    /// looked at it. How many cannot be read.
    ///
    /// # Errors
    /// Those of `take`, and [`SpillError::Io`].
    pub(super) fn for_each<E: From<SpillError>>(
        &mut self,
        mut take: impl FnMut(&str, &SpilledEvent, bool) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut topics: Vec<String> = self.topics().map(str::to_owned).collect();
        topics.sort_unstable();
        let mut damaged = 0;
        for topic in topics {
            let settled_end = self.topics[&*topic].settled_end;
            for number in self.numbers(&topic) {
                match self.event(&topic, number) {
                    Err(SpillError::Damaged { .. }) => damaged += 1,
                    event => {
                        let event = event?;
                        take(&topic, &event, number < settled_end)?;
                    }
                }
            }
        }
        Ok(damaged)
    }

    fn path(&self, id: u64) -> PathBuf {
        self.directory.join(format!("{id:012}"))
    }
}

/// The state, while the files are taken in.
struct Known<'a> {
    state: &'a State,
    topics: HashMap<&'a str, &'a TopicState>,
}

impl<'a> Known<'a> {
    fn new(state: &'a State) -> Known<'a> {
        let topics = state.topics.iter().map(|topic| (topic.topic.as_str(), topic)).collect();
        Known { state, topics }
    }

    /// Whether what is there was durable when the state was saved.
    fn is_durable(&self, BlockPlace { file, offset }: BlockPlace) -> bool {
        (file, offset) < (self.state.durable_file, self.state.durable_bytes)
    }

    /// How many of the events of a block in file `id` count.
    fn counting(&self, id: u64, header: &block::BlockHeader) -> u32 {
        match self.topics.get(header.topic.as_str()) {
            Some(topic) if id < self.state.settled_file => {
                topic.settled_end.saturating_sub(header.first).min(u64::from(header.events)) as u32
            }
            Some(_) => header.events,
            // It had no events when the state was saved.
            None if header.first < self.state.next_number => 0,
            None => header.events,
        }
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The ids of the files in `directory`, ascending.
fn file_ids(directory: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        ids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}
