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
//! - The events of a topic have consecutive numbers, in order. Numbers are never used again.
//! - Of two blocks with the same number, the one written later counts.
//! - The state is durable before a file that it makes superfluous goes.
//!
//! # Failure
//! A failed write or sync: nothing of the call is in the spill, the file takes no more blocks, the caller tries again. A
//! process that ends before the log's cursor passed spilled events reads them from the log again: [`Spill::settle`] takes
//! them out. A damaged block costs its own events, and says how many.

mod block;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) use block::SpilledEvent;
use prost::Message;
use state::{State, TopicState};

use crate::batch::Sequence;
use crate::kill_point;

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

/// See the module.
pub(super) struct Spill {
    directory: PathBuf,
    topics: HashMap<Box<str>, Topic>,
    files: BTreeMap<u64, FileUse>,
    current: Option<Current>,
    next_file: u64,
    next_number: u64,
    settled_file: u64,
    events: u64,
    changed: bool,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        let mut spill = Spill {
            directory: directory.to_owned(),
            topics: HashMap::new(),
            files: BTreeMap::new(),
            current: None,
            next_file: 1,
            next_number: 0,
            settled_file: 0,
            events: 0,
            changed: false,
            cache: None,
        };
        for id in file_ids(directory).map_err(SpillError::io("list the spill"))? {
            spill.scan(id, state.as_ref()).map_err(SpillError::io("read the spill"))?;
            spill.next_file = id + 1;
        }
        if let Some(state) = state {
            spill.next_number = spill.next_number.max(state.next_number);
            spill.settled_file = state.settled_file;
            spill.next_file = spill.next_file.max(state.settled_file);
            for known in state.topics {
                let Some(topic) = spill.topics.get_mut(known.topic.as_str()) else { continue };
                topic.settled_end = known.settled_end;
                // If the first block that is left begins later, what was before it is missing.
                let missing = topic.consumed.saturating_sub(known.consumed);
                topic.consumed -= missing;
                spill.events += missing;
                spill.consume(&known.topic, known.consumed);
            }
        }
        Ok(spill)
    }

    /// Takes in the headers of one file.
    fn scan(&mut self, id: u64, state: Option<&State>) -> io::Result<()> {
        let file = File::open(self.path(id))?;
        let bytes = file.metadata()?.len();
        self.files.insert(id, FileUse { bytes, needed_bytes: 0 });
        let mut offset = 0;
        while let Some(header) = block::read_header(&file, offset)? {
            let end = header.first + u64::from(header.events);
            self.next_number = self.next_number.max(end);
            let events = counting(state, id, &header);
            if events > 0 {
                let place = BlockPlace { file: id, offset };
                self.index(&header.topic, header.first, Block { place, bytes: header.block_bytes(), events });
                let topic = self.topics.get_mut(header.topic.as_str()).expect("it was just put there");
                let missed = topic.consumed.saturating_sub(header.first);
                topic.consumed -= missed;
                self.events += missed;
            }
            offset += header.block_bytes();
        }
        if offset < bytes {
            // The end of a write that was cut off, or damage: what is missing of a topic is found when its turn comes.
            tracing::warn!(file = %self.path(id).display(), offset, bytes, "the rest of a spill file cannot be read");
        }
        Ok(())
    }

    /// Lets a block count, instead of what had its numbers before.
    fn index(&mut self, topic: &str, first: u64, block: Block) {
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
        let replaced: Vec<u64> = topic.blocks.range(first..end).map(|(first, _)| *first).collect();
        for replaced in replaced {
            if let Some(gone) = topic.blocks.remove(&replaced) {
                self.files.entry(gone.place.file).or_default().needed_bytes -= gone.bytes;
            }
        }
        self.events += end.saturating_sub(topic.end);
        topic.end = topic.end.max(end);
        topic.blocks.insert(first, block);
        self.files.entry(block.place.file).or_default().needed_bytes += block.bytes;
    }

    /// Takes out what the log will show again: events of batches from `cursor` on that are still in the log, which ends
    /// before `tail`. To be called when the log is about to be read from its cursor on.
    ///
    /// # Errors
    /// [`SpillError::Io`]
    pub(super) fn settle(&mut self, cursor: Sequence, tail: Sequence) -> Result<(), SpillError> {
        if self.files.is_empty() {
            return Ok(());
        }
        self.current = None;
        let is_in_log = |event: &SpilledEvent| (cursor.0..tail.0).contains(&event.sequence);
        let names: Vec<Box<str>> = self.topics.keys().cloned().collect();
        for name in names {
            loop {
                let topic = &self.topics[&name];
                let Some((first, block)) = topic.blocks.last_key_value().map(|(first, block)| (*first, *block)) else {
                    break;
                };
                let events = match self.read(block.place) {
                    Err(SpillError::Damaged { .. }) => break,
                    events => events?,
                };
                let counting = &events[..block.events as usize];
                let kept = counting.iter().rposition(|event| !is_in_log(event)).map_or(0, |at| at as u64 + 1);
                let topic = self.topics.get_mut(&name).expect("its name was just listed");
                let end = (first + kept).max(topic.consumed);
                self.events -= topic.end - end;
                topic.end = end;
                if kept > 0 {
                    topic.blocks.insert(first, Block { events: kept as u32, ..block });
                    break;
                }
                topic.blocks.remove(&first);
                self.files.entry(block.place.file).or_default().needed_bytes -= block.bytes;
            }
        }
        self.topics.retain(|_, topic| topic.end > topic.consumed);
        self.topics.values_mut().for_each(|topic| topic.settled_end = topic.end);
        self.settled_file = self.next_file;
        self.changed = true;
        self.save()
    }

    /// Adds events to the end of their topics, in order. Durable when this returns. For each topic the number of its first event.
    ///
    /// # Errors
    /// [`SpillError::Io`]: nothing of them is in the spill.
    pub(super) fn put(&mut self, topics: Vec<(&str, Vec<SpilledEvent>)>) -> Result<Vec<u64>, SpillError> {
        let mut written = Vec::new();
        let result = self.write(topics, &mut written).and_then(|firsts| {
            kill_point::pass("spill.written");
            self.sync()?;
            Ok(firsts)
        });
        let firsts = result.inspect_err(|_| self.current = None)?;
        kill_point::pass("spill.synced");
        for Written { topic, first, block } in written {
            self.next_number = self.next_number.max(first + u64::from(block.events));
            self.index(&topic, first, block);
        }
        Ok(firsts)
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
            let mut block = Vec::new();
            if let Some((last_first, last)) = last.filter(|(_, last)| last.bytes < SMALL_BLOCK_BYTES)
                && let Ok(known) = self.read(last.place)
            {
                block.extend_from_slice(&known[..last.events as usize]);
                first = last_first;
            }
            let mut bytes = 0;
            for event in events {
                bytes += event.encoded_len();
                block.push(event);
                if bytes >= BLOCK_BYTES {
                    let full = std::mem::take(&mut block);
                    let next = first + full.len() as u64;
                    written.push(self.append(name, first, full)?);
                    (first, bytes) = (next, 0);
                }
            }
            if !block.is_empty() {
                written.push(self.append(name, first, block)?);
            }
        }
        Ok(firsts)
    }

    fn append(&mut self, topic: &str, first: u64, events: Vec<SpilledEvent>) -> Result<Written, SpillError> {
        let count = events.len() as u32;
        let bytes = block::encode(topic, first, events);
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
        if !self.directory.exists() {
            fs::create_dir(&self.directory)?;
            sync_directory(self.directory.parent().unwrap_or(Path::new(".")))?;
        }
        let id = self.next_file;
        self.next_file += 1;
        let file = File::options().create_new(true).append(true).open(self.path(id))?;
        sync_directory(&self.directory)?;
        self.files.insert(id, FileUse::default());
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
    pub(super) fn event(&mut self, topic: &str, number: u64) -> Result<SpilledEvent, SpillError> {
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
        Ok(events[(number - first) as usize].clone())
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
        self.gather()?;
        let left = self.topics.iter().filter(|(_, topic)| topic.end > topic.consumed);
        let topics = left.map(|(name, topic)| TopicState {
            topic: name.to_string(),
            consumed: topic.consumed,
            settled_end: topic.settled_end,
        });
        let topics = topics.collect();
        let state = State { next_number: self.next_number, settled_file: self.settled_file, topics };
        state::save(&self.directory, &state).map_err(SpillError::io("save the spill's state"))?;
        kill_point::pass("spill.saved");
        self.changed = false;
        // Not before: with the old state, numbers that start anew would look like missing ones.
        self.topics.retain(|_, topic| topic.end > topic.consumed);
        let current = self.current.as_ref().map(|current| current.id);
        let unneeded = |(id, file): (&u64, &FileUse)| (file.needed_bytes == 0 && Some(*id) != current).then_some(*id);
        for id in self.files.iter().filter_map(unneeded).collect::<Vec<_>>() {
            fs::remove_file(self.path(id)).map_err(SpillError::io("remove a spill file"))?;
            self.files.remove(&id);
        }
        Ok(())
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
        let blocks = self.topics.iter().flat_map(|(name, topic)| topic.blocks.iter().map(move |block| (name, block)));
        let in_oldest = blocks.filter(|(_, (_, block))| block.place.file == oldest);
        let in_oldest: Vec<_> = in_oldest.map(|(name, (first, block))| (name.clone(), *first, *block)).collect();
        let mut written = Vec::new();
        for (name, first, block) in in_oldest {
            match self.read(block.place) {
                Ok(events) => written.push(self.append(&name, first, events[..block.events as usize].to_vec())?),
                // It stays where it is, and is reported when its turn comes.
                Err(SpillError::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.sync()?;
        for Written { topic, first, block } in written {
            self.index(&topic, first, block);
        }
        Ok(())
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

    fn path(&self, id: u64) -> PathBuf {
        self.directory.join(format!("{id:012}"))
    }
}

/// How many of the events of a block in file `id` count.
fn counting(state: Option<&State>, id: u64, header: &block::Header) -> u32 {
    let Some(state) = state else { return header.events };
    match state.topics.iter().find(|topic| topic.topic == header.topic) {
        Some(topic) if id < state.settled_file => {
            topic.settled_end.saturating_sub(header.first).min(u64::from(header.events)) as u32
        }
        Some(_) => header.events,
        // It had no events when the state was saved.
        None if header.first < state.next_number => 0,
        None => header.events,
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
