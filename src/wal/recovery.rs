//! Opens the log: finds where it begins and ends, whatever state the last process left it in.
//!
//! Only the newest segment with records is opened, and the oldest if the cursor is lost, so that the cost does not grow
//! with the backlog. The newest segment is never written again: a fresh one follows it.

use std::collections::{BTreeMap, VecDeque};

use super::ahead::{self, Ahead, Received, Stretch};
use super::dedup::{SavedWindow, Window, fingerprint};
use super::error::StoreError;
use super::log::{Log, Pool, Position, Segment};
use super::record::{RECORD_HEADER_BYTES, Totals};
use super::slots::{Content, first_chunk, for_each_record, last_totals, unfinished_from};
use super::store::StateDb;
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
    let found_tail = find_tail(pool, &mut segments, mode, durable, delivered)?;
    kill_point::pass("recover.tail_found");
    let oldest = if saved.is_some() { None } else { find_head(pool, &segments)? };

    let (cursor, saved_tail) = saved.unwrap_or_else(|| {
        let (segment, totals) = oldest.unwrap_or((next_segment - 1, found_tail));
        (Position { segment, slot: 0, totals }, found_tail)
    });
    // Sequences are never reused, even if records at the end of the log are gone.
    let tail = [found_tail, saved_tail, ahead_to, cursor.totals].into_iter().max_by_key(|totals| totals.sequence);
    let tail = tail.expect("four are not none");
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
    // The last process may not have come to seal the last ones.
    for segment in segments.values_mut().rev().take(2) {
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
        parked_events: cursor::load_parked(meta)?,
        spilled_events: 0,
        space_short: false,
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
/// `saved_tail`: the log reached that far. `delivered`: records before it may be gone because they were delivered.
fn find_tail(
    pool: &Pool,
    segments: &mut BTreeMap<u64, Segment>,
    mode: Mode,
    saved_tail: Option<u64>,
    delivered: u64,
) -> Result<Totals, StoreError> {
    let (mut tail, mut damaged) = (Totals::ZERO, Vec::new());
    while let Some(id) = segments.last_key_value().map(|(id, _)| *id) {
        if mode == Mode::Repair {
            pool.store().settle(id)?;
            cut_unfinished(pool, id, saved_tail)?;
        }
        let content = match pool.get(id) {
            Ok(file) => last_totals(&*file)?,
            Err(error) if !error.is_damage() => totals_of_readable(pool, id, error)?,
            Err(error) => {
                tracing::error!(segment = id, %error, "segment does not open");
                Content::Damaged
            }
        };
        match content {
            Content::Records(totals) => {
                segments.get_mut(&id).expect("it is the last").end = Some(totals);
                tail = totals;
                break;
            }
            Content::Damaged if mode == Mode::Repair => damaged.push(id),
            // A first batch that was cut short was never acked.
            Content::Torn if mode == Mode::Repair => {
                pool.close_unused();
                pool.store().remove(id)?;
            }
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
    if let [id] = damaged[..]
        && saved_tail.is_some_and(|saved_tail| saved_tail <= tail.sequence.max(delivered))
    {
        // All that is known to have been durable stands before it, or was delivered.
        tracing::info!(segment = id, "unfinished chunk, never acked: the segment goes");
        pool.store().remove(id)?;
        return Ok(tail);
    }
    for id in damaged {
        pool.store().quarantine(id)?;
        tracing::error!(segment = id, "segment holds no readable record, set aside");
    }
    Ok(tail)
}

/// The end of a segment that the disk does not read as a whole. The sequences of all that may stand in the rest are passed over:
/// none is used again should the disk read it one day. One without a single record fails: a disk that is gone for a moment is
/// more likely.
fn totals_of_readable(pool: &Pool, id: u64, error: StoreError) -> Result<Content, StoreError> {
    let (file, unread_bytes) = pool.store().open_readable(id)?;
    let Content::Records(totals) = last_totals(&*file)? else { return Err(error) };
    pool.insert(id, file);
    let passed_over = unread_bytes / RECORD_HEADER_BYTES as u64;
    let what = "the disk does not read all of the newest segment, going on with the rest";
    tracing::error!(segment = id, %error, unread_bytes, passed_over_sequences = passed_over, what);
    let sequence = totals.sequence + passed_over;
    Ok(Content::Records(Totals { sequence, ..totals }))
}

/// Takes away what the last process, or the power, left unfinished in the newest segment. Without a saved tail, which is
/// lost then, nothing says what is unfinished and what is damaged: everything stays.
fn cut_unfinished(pool: &Pool, id: u64, saved_tail: Option<u64>) -> Result<(), StoreError> {
    let Some(saved_tail) = saved_tail else { return Ok(()) };
    let Ok(file) = pool.get(id) else { return Ok(()) };
    let Some(slot) = unfinished_from(&*file, saved_tail)? else { return Ok(()) };
    drop(file);
    tracing::info!(segment = id, slot, "unfinished chunks, never acked: they are cut off");
    pool.close_unused();
    pool.store().cut(id, slot)
}

/// The beginning of the oldest segment that opens: where to start without a cursor.
fn find_head(pool: &Pool, segments: &BTreeMap<u64, Segment>) -> Result<Option<(u64, Totals)>, StoreError> {
    for id in segments.keys() {
        match pool.get(*id) {
            Ok(file) => {
                if let Some((totals, _)) = first_chunk(&*file, 0)? {
                    return Ok(Some((*id, totals)));
                }
            }
            Err(error) if !error.is_damage() => return Err(error),
            // The reader will meet it again and set it aside.
            Err(_) => {}
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
