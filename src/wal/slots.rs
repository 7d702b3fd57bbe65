//! What the slots of an open segment hold, every byte checked.

use bytes::Bytes;

use super::error::StoreError;
use super::record::{ChunkError, ChunkHeader, RawRecord, Totals, decode_chunk, split_record};
use super::store::SegmentFile;

/// What a slot holds.
pub(super) enum Slot {
    Empty,
    Chunk {
        header: ChunkHeader,
        body: Bytes,
        next_slot: u32,
    },
    /// The first parts of a chunk, and nothing after them: the process ended while it wrote. Nobody got an ack.
    Torn,
    /// A later part of a chunk, without the ones before it.
    Part,
    Damaged(String),
}

/// Reads the chunk that begins at `slot`, all parts of it.
pub(super) fn read_slot(file: &dyn SegmentFile, slot: u32, slots: u32) -> Result<Slot, StoreError> {
    let (header, first) = match read_part(file, slot)? {
        Ok(Some(part)) => part,
        Ok(None) => return Ok(Slot::Empty),
        Err(reason) => return Ok(Slot::Damaged(reason)),
    };
    let next_slot = slot + u32::from(header.parts);
    if header.part != 0 {
        return Ok(Slot::Part);
    }
    if next_slot > slots {
        return Ok(Slot::Damaged(ChunkError::Part.to_string()));
    }
    if header.parts == 1 {
        return Ok(Slot::Chunk { header, body: first, next_slot });
    }
    let mut body = first.to_vec();
    for part in 1..header.parts {
        match read_part(file, slot + u32::from(part))? {
            Ok(Some((other, piece))) if other == (ChunkHeader { part, ..header }) => body.extend_from_slice(&piece),
            Ok(None) if is_empty(file, slot + u32::from(part)..slots)? => return Ok(Slot::Torn),
            Ok(_) => return Ok(Slot::Damaged(ChunkError::Part.to_string())),
            Err(reason) => return Ok(Slot::Damaged(reason)),
        }
    }
    Ok(Slot::Chunk { header, body: body.into(), next_slot })
}

/// Whether nothing was written to any of `slots`.
fn is_empty(file: &dyn SegmentFile, slots: std::ops::Range<u32>) -> Result<bool, StoreError> {
    for slot in slots {
        if !matches!(read_part(file, slot)?, Ok(None)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The checked value of one slot; none if it is empty; the reason if it is damaged.
type Part = Result<Option<(ChunkHeader, Bytes)>, String>;

fn read_part(file: &dyn SegmentFile, slot: u32) -> Result<Part, StoreError> {
    match file.read(slot) {
        Ok(value) if value.is_empty() => Ok(Ok(None)),
        Ok(value) => Ok(decode_chunk(value).map(Some).map_err(|error| error.to_string())),
        Err(error) if !error.is_damage() => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// The first chunk of a segment at slot `from` or after it, for recovery: its totals and when its first record was received.
pub(super) fn first_chunk(file: &dyn SegmentFile, from: u32) -> Result<Option<(Totals, u64)>, StoreError> {
    let slots = file.slots();
    for slot in from..slots {
        if let Slot::Chunk { header, mut body, .. } = read_slot(file, slot, slots)? {
            let received_at_ms = split_record(&mut body).map_or(0, |record| record.received_at_ms);
            return Ok(Some((header.before, received_at_ms)));
        }
    }
    Ok(None)
}

/// Every record of a segment that can be read, in order, with its sequence; for recovery.
pub(super) fn for_each_record(file: &dyn SegmentFile, mut each: impl FnMut(u64, RawRecord)) -> Result<(), StoreError> {
    let (mut slot, slots) = (0, file.slots());
    while slot < slots {
        let Slot::Chunk { header, mut body, next_slot } = read_slot(file, slot, slots)? else {
            slot += 1;
            continue;
        };
        for sequence in header.before.sequence..header.before.sequence + u64::from(header.records) {
            let Ok(record) = split_record(&mut body) else { break };
            each(sequence, record);
        }
        slot = next_slot;
    }
    Ok(())
}

/// Where in the newest segment what a crash left unfinished begins, for recovery: the first slot behind which no chunk follows
/// the ones before, with all before it that is known to have been durable. Chunks behind it may be whole, if the disk wrote
/// them first; nobody got an ack for them, as acks come in order. `durable_sequence`: every record before it is known to have
/// been durable.
pub(super) fn unfinished_from(file: &dyn SegmentFile, durable_sequence: u64) -> Result<Option<u32>, StoreError> {
    let (mut chunks, mut slot, slots, mut durable) = (Vec::new(), 0, file.slots(), durable_sequence);
    // The first slot since the last good chunk that is not as it was written.
    let mut spoilt = None;
    while slot < slots {
        match read_slot(file, slot, slots)? {
            Slot::Empty => slot += 1,
            Slot::Torn | Slot::Part | Slot::Damaged(_) => {
                spoilt.get_or_insert(slot);
                slot += 1;
            }
            Slot::Chunk { header, next_slot, .. } => {
                durable = durable.max(header.durable_sequence());
                chunks.push((spoilt.take().unwrap_or(slot), header));
                slot = next_slot;
            }
        }
    }
    // A segment begins behind records that are durable.
    let mut end = chunks.first().map(|(_, header)| header.durable_sequence());
    for (slot, header) in chunks {
        if end.is_some_and(|end| header.before.sequence > end && end >= durable) {
            return Ok(Some(slot));
        }
        end = Some(header.end_sequence());
    }
    Ok(spoilt.filter(|_| end.is_some_and(|end| end >= durable)))
}

/// What a segment holds, for recovery.
pub(super) enum Content {
    /// Nothing was ever written to it.
    Nothing,
    /// Records, up to these totals.
    Records(Totals),
    /// The front of one chunk, and nothing else.
    Torn,
    /// Something, but no chunk that is whole.
    Damaged,
}

/// The totals after the last chunk of a segment, for recovery.
///
/// Looks at every slot from the last one down, because a disk that lost a write may have kept the one after it: new
/// sequences must come after both.
pub(super) fn last_totals(file: &dyn SegmentFile) -> Result<Content, StoreError> {
    let slots = file.slots();
    let mut content = Content::Nothing;
    for slot in (0..slots).rev() {
        let (header, mut body) = match read_slot(file, slot, slots)? {
            Slot::Chunk { header, body, .. } => (header, body),
            Slot::Torn if matches!(content, Content::Nothing) => {
                content = Content::Torn;
                continue;
            }
            Slot::Empty | Slot::Torn | Slot::Part => continue,
            Slot::Damaged(_) => {
                content = Content::Damaged;
                continue;
            }
        };
        let mut totals = header.before;
        for _ in 0..header.records {
            match split_record(&mut body) {
                Ok(record) => totals = record.after(totals),
                Err(_) => totals.sequence += 1,
            }
        }
        return Ok(Content::Records(totals));
    }
    Ok(content)
}
