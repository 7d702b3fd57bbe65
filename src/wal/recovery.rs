//! Opens the log: finds where it begins and ends, whatever state the last process left it in.
//!
//! Only the newest segment with records is opened, and the oldest if the cursor is lost, so that the cost does not grow
//! with the backlog. The newest segment is never written again: a fresh one follows it.

use std::collections::{BTreeMap, VecDeque};

use super::ahead::{self, Ahead, Received, Stretch};
use super::dedup::{SavedWindow, Window, fingerprint};
use super::error::StoreError;
use super::keeper::SPARES;
use super::log::{Log, Pool, Position, Segment};
use super::record::{RECORD_HEADER_BYTES, Totals};
use super::slots::{Content, Slot, first_chunk, for_each_record, last_totals, read_slot, unfinished_from};
use super::store::{Readable, StateDb, wait_to_read_again};
use super::{cursor, losses};
use crate::kill_point;

/// Whether recovery may change what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Remove what is empty, set aside what does not open.
    Repair,
    /// Leave every segment where it is.
    Inspect,
}

/// Recovers the state of the log.
pub(super) fn recover(pool: &Pool, meta: &dyn StateDb, mode: Mode) -> Result<Log, StoreError> {
    let store = pool.store();
    let (saved, stretch) = (cursor::load(meta)?, ahead::load(meta)?);
    kill_point::pass("recover.cursor_loaded");
    if mode == Mode::Repair {
        store.remove_unfinished(saved.map_or(0, |(cursor, _)| cursor.segment))?;
        kill_point::pass("recover.unfinished_removed");
    }
    let ids = store.segments()?;
    // Not one that was used before, even if it is gone: the cursor, or what was delivered ahead of it, may still point into it.
    let used = ids.last().copied().max(store.quarantined()?.last().copied());
    let next_segment = used.map_or(1, |last| last + 1);
    let mut segments: BTreeMap<u64, Segment> = ids.into_iter().map(|id| (id, Segment::default())).collect();
    let (ahead_segment, ahead_to) = stretch.map_or((0, Totals::ZERO), |Stretch { to, .. }| (to.segment, to.totals));
    let durable = saved.map(|(_, tail)| tail.sequence.max(ahead_to.sequence));
    let delivered = saved.map_or(0, |(cursor, _)| cursor.totals.sequence.max(ahead_to.sequence));
    let (found_tail, passed_over) = find_tail(pool, &mut segments, mode, durable, delivered)?;
    kill_point::pass("recover.tail_found");
    let oldest = if saved.is_some() { None } else { find_head(pool, &segments)? };

    let (cursor, saved_tail) = saved.unwrap_or_else(|| {
        let (segment, totals) = oldest.unwrap_or((next_segment - 1, found_tail));
        (Position { segment, slot: 0, totals }, found_tail)
    });
    // Sequences are never reused, even if records at the end of the log are gone.
    let tail = [found_tail, saved_tail, ahead_to, cursor.totals].into_iter().max_by_key(|totals| totals.sequence);
    let mut tail = tail.expect("four are not none");
    tail.sequence += passed_over;
    if found_tail.sequence < saved_tail.sequence && !segments.is_empty() {
        let (first, last) = (found_tail.sequence, saved_tail.sequence - 1);
        tracing::error!(first_sequence = first, last_sequence = last, "the log ends early");
        // What is missing may still be in there.
        segments.values_mut().next_back().expect("it is not empty").damaged = true;
    }
    for (id, segment) in &mut segments {
        segment.disk_bytes = store.segment_bytes(*id)?;
        segment.sealed = true;
    }
    let losses = losses::load(meta)?;
    for loss in &losses {
        // The last process may not have come to set it aside.
        if let Some(segment) = segments.get_mut(&loss.segment) {
            segment.damaged = true;
        }
    }
    // The last process may not have come to seal the last ones, nor the spares of one that it abandoned.
    for segment in segments.values_mut().rev().take(2 + SPARES) {
        segment.sealed = false;
    }
    let mut log = Log {
        segments,
        active: None,
        spares: VecDeque::new(),
        next_segment: next_segment.max(cursor.segment + 1).max(ahead_segment + 1),
        tail,
        cursor,
        saved_cursor: cursor,
        ahead: stretch.map(|stretch| Ahead { stretch, received: Received::default() }),
        saved_ahead: stretch,
        received: Received::default(),
        losses: losses.into_iter().map(|loss| (loss.first_sequence, loss)).collect(),
        unsaved_losses: Vec::new(),
        spilled_events: 0,
        space_short: false,
        abandoned: None,
        abandoned_in_row: 0,
        next_segment_at: None,
        full_since: None,
        space: store.space()?,
        reader_woken: false,
        closing: false,
    };
    log.pass_ahead();
    log.leave_delivered_segments();
    note_oldest(pool, &mut log)?;
    if mode == Mode::Repair && saved.is_none() {
        // From now on a log without a cursor is one that has lost it. Should this fail, the keeper saves it.
        let begun = cursor::save(meta, log.cursor, log.tail);
        begun.unwrap_or_else(|error| tracing::warn!(%error, "the cursor cannot be saved yet"));
    }
    kill_point::pass("recover.end");
    Ok(log)
}

/// The end of the newest segment that holds records. Newer ones are spares and go; a damaged one is set aside.
/// `saved_tail`: the log reached that far. `delivered`: records before it may be gone because they were delivered. Also how many
/// sequences behind the end of the log may stand where the disk does not read, if no segment holds records.
fn find_tail(
    pool: &Pool,
    segments: &mut BTreeMap<u64, Segment>,
    mode: Mode,
    saved_tail: Option<u64>,
    delivered: u64,
) -> Result<(Totals, u64), StoreError> {
    let (mut tail, mut damaged, mut torn, mut unread) = (Totals::ZERO, Vec::new(), Vec::new(), Vec::new());
    // Sequences that may stand where the disk does not read: none of them is used again, should it read one day.
    let mut passed_over = 0;
    while let Some(id) = segments.last_key_value().map(|(id, _)| *id) {
        if mode == Mode::Repair {
            pool.store().settle(id)?;
            // A later segment was begun when all that is before it was durable.
            if damaged.is_empty() && torn.is_empty() && unread.is_empty() {
                cut_unfinished(pool, id, saved_tail)?;
            }
        }
        let (content, hidden_records) = match pool.get(id) {
            Ok(file) => (last_totals(&*file)?, 0),
            Err(error) if !error.is_damage() => readable_content(pool, id, &error)?,
            Err(error) => {
                tracing::error!(segment = id, %error, "segment does not open");
                (Content::Damaged, 0)
            }
        };
        passed_over += hidden_records;
        match content {
            Content::Records(totals) => {
                let end = |passed_over| Totals { sequence: totals.sequence + passed_over, ..totals };
                segments.get_mut(&id).expect("it is the last").end = Some(end(hidden_records));
                (tail, passed_over) = (end(passed_over), 0);
                break;
            }
            _ if hidden_records > 0 && mode == Mode::Repair => unread.push(id),
            Content::Damaged if mode == Mode::Repair => damaged.push(id),
            Content::Torn if mode == Mode::Repair => torn.push(id),
            Content::Nothing if mode == Mode::Repair => {
                pool.close_unused();
                pool.store().remove(id)?;
                kill_point::pass("recover.spare_removed");
            }
            Content::Damaged | Content::Nothing | Content::Torn => {}
        }
        segments.remove(&id);
    }
    pool.close_unused();
    // All that is known to have been durable stands before, or was delivered.
    let is_whole = saved_tail.is_some_and(|saved_tail| saved_tail <= tail.sequence.max(delivered));
    if is_whole && torn.len() + damaged.len() == 1 {
        torn.append(&mut damaged);
    }
    // A first batch that was cut short was never acked.
    let is_unfinished = is_whole || saved_tail.is_none();
    for id in torn {
        if is_unfinished {
            tracing::info!(segment = id, "unfinished chunk, never acked: the segment goes");
            pool.store().remove(id)?;
        } else {
            damaged.push(id);
        }
    }
    for id in damaged.into_iter().chain(unread) {
        pool.store().quarantine(id)?;
        tracing::error!(segment = id, "segment holds no readable record, set aside");
    }
    Ok((tail, passed_over))
}

/// What a segment holds that the disk does not read as a whole; and how many records may stand in what is missing, at most.
/// Fails if the disk reads nothing of it: one that is gone for a moment is more likely.
fn readable_content(pool: &Pool, id: u64, error: &StoreError) -> Result<(Content, u64), StoreError> {
    let mut tries = 0;
    let Readable { file, unread_bytes, hidden_bytes } = loop {
        tries += 1;
        let readable = pool.store().open_readable(id)?;
        if readable.unread_bytes == 0 || !wait_to_read_again(tries) {
            break readable;
        }
    };
    if unread_bytes == 0 {
        let content = last_totals(&*file)?;
        pool.insert(id, file);
        return Ok((content, 0));
    }
    let hidden_records = hidden_bytes.div_ceil(RECORD_HEADER_BYTES as u64);
    let content = last_totals(&*file)?;
    pool.insert(id, file);
    tracing::error!(
        segment = id,
        %error,
        unread_bytes,
        passed_over_sequences = hidden_records,
        "the disk does not read all of a segment, going on with the rest"
    );
    Ok((content, hidden_records))
}

/// Takes away what the last process, or the power, left unfinished in the newest segment. Without a saved tail, which is
/// lost then, nothing says what is unfinished and what is damaged: everything stays.
fn cut_unfinished(pool: &Pool, id: u64, saved_tail: Option<u64>) -> Result<(), StoreError> {
    let Some(saved_tail) = saved_tail else { return Ok(()) };
    let Ok(file) = pool.get(id) else { return Ok(()) };
    let Some(slot) = unfinished_from(&*file, saved_tail)? else { return Ok(()) };
    let mut whole = None;
    for at in slot..file.slots() {
        if let Slot::Chunk { header, .. } = read_slot(&*file, at, file.slots())? {
            let (first, _) = whole.unwrap_or((header.before.sequence, 0));
            whole = Some((first, header.end_sequence() - 1));
        }
    }
    drop(file);
    match whole {
        // Should it be damage that is before it, that is all that an operator gets to see.
        Some((first_sequence, last_sequence)) => tracing::warn!(
            segment = id,
            slot,
            first_sequence,
            last_sequence,
            "chunks behind one that was not written, never acked: they are cut off"
        ),
        None => tracing::info!(segment = id, slot, "unfinished chunk, never acked: it is cut off"),
    }
    pool.close_unused();
    pool.store().cut(id, slot)
}

/// The beginning of the oldest segment that opens: where to start without a cursor.
fn find_head(pool: &Pool, segments: &BTreeMap<u64, Segment>) -> Result<Option<(u64, Totals)>, StoreError> {
    for id in segments.keys() {
        let file = match pool.get(*id) {
            Err(error) if !error.is_damage() => pool.store().open_readable(*id)?.file,
            Ok(file) => file,
            // The reader will meet it again and set it aside.
            Err(_) => continue,
        };
        if let Some((totals, _)) = first_chunk(&*file, 0)? {
            return Ok(Some((*id, totals)));
        }
    }
    Ok(None)
}

/// Finds out how old the backlog is.
fn note_oldest(pool: &Pool, log: &mut Log) -> Result<(), StoreError> {
    if log.pending().sequence == 0 {
        return Ok(());
    }
    let Some(id) = log.segments.range(log.cursor.segment..).next().map(|(id, _)| *id) else { return Ok(()) };
    let from = if id == log.cursor.segment { log.cursor.slot } else { 0 };
    if let Ok(file) = pool.get(id)
        && let Some((_, received_at_ms)) = first_chunk(&*file, file.seek(from, log.cursor.totals.sequence))?
    {
        log.received.note(log.cursor.totals.sequence, received_at_ms);
    }
    Ok(())
}

/// Segments that are read to find batches which the saved window does not know. One is the rule; there are more only if the
/// keeper could not save for long.
const WINDOW_SEGMENTS_MAX: usize = 8;

/// Brings the window up to the end of the log: what was saved, and then the batches of the newest segments.
pub(super) fn recover_window(
    pool: &Pool,
    meta: &dyn StateDb,
    log: &Log,
    window: &mut Window,
) -> Result<SavedWindow, StoreError> {
    if !window.is_on() {
        return Ok(SavedWindow::default());
    }
    let saved = SavedWindow::load(meta, window)?;
    let mut unknown = Vec::new();
    for id in log.segments.keys().rev().take(WINDOW_SEGMENTS_MAX) {
        // One that does not open is the reader's business.
        let Ok(file) = pool.get(*id) else { continue };
        let first = first_chunk(&*file, 0)?;
        unknown.push(file);
        if first.is_some_and(|(totals, _)| totals.sequence <= saved.end_sequence) {
            break;
        }
    }
    for file in unknown.iter().rev() {
        for_each_record(&**file, |sequence, record| {
            if sequence >= saved.end_sequence
                && let Ok(batch) = record.decode()
                && let Some(fingerprint) = fingerprint(&batch)
            {
                window.remember(fingerprint, batch.received_at_ms);
            }
        })?;
    }
    window.committed_until(log.tail.sequence);
    Ok(saved)
}

#[cfg(test)]
mod tests {
    use crate::wal::memory::MemoryStore;
    use crate::wal::tests::{append_all, open_memory};

    /// However long the backlog is.
    #[test]
    fn a_start_opens_the_newest_segment_and_that_of_the_cursor() {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        append_all(&wal, 1..=200, 300);
        let mut reader = wal.reader();
        for _ in 0..50 {
            wal.deliver(reader.next_record().unwrap().unwrap().end);
        }
        drop(reader);
        wal.close();
        let log = wal.shared.log();
        let (cursor, newest) = (log.cursor.segment, log.active.unwrap().0);
        drop(log);
        assert!(cursor + 10 < newest, "the backlog is short: {cursor} to {newest}");
        drop(wal);
        store.forget_opened();
        let wal = open_memory(&store);
        // Newer ones are spares, which go.
        let opened: Vec<u64> = store.opened().into_iter().filter(|id| *id <= newest).collect();
        assert_eq!(opened, [cursor, newest]);
        wal.close();
    }
}
