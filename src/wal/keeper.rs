//! The keeper thread: prepares spare segments, saves the cursor and the dedup window, removes what was delivered, watches the disk.
//!
//! All of it is off the commit path. A segment is removed as a whole, and only once the cursor that has left it is
//! durable: a stale cursor costs duplicates, never loss.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::appender::FailOnPanic;
use super::dedup::SavedWindow;
use super::error::StoreError;
use super::log::{Log, Segment, Shared};
use super::parked_books::SavedBooks;
use super::{abandoned, ahead, cursor, losses};
use crate::config::WhenFull;

/// Prepared segments to hold, so that the commit thread need not wait for one.
pub(super) const SPARES: usize = 2;
/// How often the cursor is saved while it moves, and the disk is measured.
const INTERVAL: Duration = Duration::from_secs(1);

/// State of the keeper thread.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    /// The tail as saved with the cursor.
    saved_tail: u64,
    /// The books of the parked store, as saved with it.
    saved_parked: SavedBooks,
    /// The dedup window as saved.
    saved_window: SavedWindow,
    /// What recovery found, or what a failed save may have lost, is saved.
    window_is_saved: bool,

    last_pass: Option<Instant>,
    last_error: Option<String>,
}

impl Keeper {
    pub fn new(shared: Arc<Shared>, saved_window: SavedWindow) -> Keeper {
        let saved_parked = shared.parked_notes.to_save();
        Keeper {
            shared,
            saved_tail: 0,
            saved_parked,
            saved_window,
            window_is_saved: false,
            last_pass: None,
            last_error: None,
        }
    }

    /// Keeps the log until it is closed.
    pub fn run(mut self) {
        let shared = self.shared.clone();
        let _fail_on_panic = FailOnPanic(&shared);
        while !self.wait() {
            let result = self.pass();
            self.report(result);
        }
        // What was refused need not come back.
        let result = abandoned::cut(&self.shared).map(drop);
        self.report(result);
        if shared.log().closing {
            shared.parked_notes.finish();
        }
        // The cursor is saved last: nothing moves it any more.
        let result = self.save_and_trim();
        self.report(result);
    }

    /// Waits until there is something to do. True: the log is closed.
    fn wait(&self) -> bool {
        let mut log = self.shared.log();
        loop {
            if log.closing || self.shared.failed.is_cancelled() {
                return true;
            }
            let due = self.last_pass.map_or(Duration::ZERO, |last| INTERVAL.saturating_sub(last.elapsed()));
            let wanted = if log.space_short { self.can_give_up(&log) } else { log.spares.len() < SPARES };
            let urgent = (wanted && !self.is_giving_up(&log) && !log.is_pausing())
                || (log.cursor.segment > log.saved_cursor.segment
                    && log.segments.range(..log.cursor.segment).next().is_some());
            // After an error the next try waits for its time.
            if due.is_zero() || (urgent && self.last_error.is_none()) {
                return false;
            }
            let waited = self.shared.log_changed.wait_timeout(log, due);
            log = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    fn pass(&mut self) -> Result<(), StoreError> {
        self.last_pass = Some(Instant::now());
        // The active segment's successor comes first: commits may wait for it.
        let prepared = self.prepare_spares();
        let sealed = self.seal();
        let trimmed = self.save_and_trim();
        self.shared.pool.close_unused();
        self.measure_space()?;
        // One that fails does not keep the others from their work.
        prepared.and(sealed).and(trimmed)
    }

    fn save_and_trim(&mut self) -> Result<(), StoreError> {
        let window = self.save_window();
        self.save_cursor()?;
        match window {
            // On a full disk a batch that is not known again costs less than a segment that stays.
            Err(error) if error.is_full() => self.trim(u64::MAX).and(Err(error)),
            window => window.and_then(|()| self.trim(self.saved_window.end_sequence)),
        }
    }

    fn prepare_spares(&self) -> Result<(), StoreError> {
        loop {
            match abandoned::cut(&self.shared) {
                Ok(false) => {}
                Ok(true) => {
                    // What it and its spares had reserved is free again, before anything is given up for lack of room.
                    self.seal()?;
                    self.measure_space()?;
                }
                Err(error) => {
                    let is_full = error.is_full() || error.is_held();
                    return self.no_spare(error, is_full);
                }
            }
            let (id, enough) = {
                let mut log = self.shared.log();
                log.end_full(&self.shared);
                if log.is_pausing() {
                    log.space_short = true;
                    self.shared.log_changed.notify_all();
                    return Ok(());
                }
                if log.spares.len() >= SPARES {
                    return Ok(());
                }
                let needed = self.shared.shape.reserved_bytes;
                let within_budget =
                    log.disk_bytes(&self.shared.shape) + needed <= self.shared.config.bytes_max.as_u64();
                let free = log.space.free_bytes.saturating_sub(needed) >= self.shared.config.free_bytes_min.as_u64();
                (log.next_segment, within_budget && free)
            };
            if !enough {
                self.space_is_short();
                return Ok(());
            }
            match self.shared.store.prepare(id) {
                Ok(file) => {
                    self.shared.pool.insert(id, file.clone());
                    let mut log = self.shared.log();
                    log.next_segment = id + 1;
                    log.spares.push_back((id, file));
                    log.space_short = false;
                    log.end_full(&self.shared);
                }
                Err(error) => {
                    let is_full = error.is_full() || self.is_disk_full();
                    return self.no_spare(error, is_full);
                }
            }
            self.shared.log_changed.notify_all();
            self.measure_space()?;
        }
    }

    fn measure_space(&self) -> Result<(), StoreError> {
        let space = self.shared.store.space()?;
        self.shared.log().space = space;
        Ok(())
    }

    /// There is no next segment: for now, or for good.
    fn no_spare(&self, error: StoreError, is_full: bool) -> Result<(), StoreError> {
        if is_full {
            self.space_is_short();
            return Ok(());
        }
        if error.is_short_of_descriptors() {
            self.shared.log().space_short = true;
            self.shared.log_changed.notify_all();
        } else {
            // Commits would soon wait for a segment that never comes.
            self.shared.fail();
        }
        Err(error)
    }

    /// sled does not always say that it failed for lack of space.
    fn is_disk_full(&self) -> bool {
        self.shared.store.space().is_ok_and(|space| space.free_bytes < self.shared.shape.reserved_bytes)
    }

    /// Says so, unless the oldest segment is to make room.
    fn space_is_short(&self) {
        let mut log = self.shared.log();
        if self.can_give_up(&log) {
            self.give_up_oldest(&mut log);
        }
        log.space_short = !self.is_giving_up(&log);
        drop(log);
        self.shared.log_changed.notify_all();
    }

    /// Whether a segment is given up and not gone yet.
    fn is_giving_up(&self, log: &Log) -> bool {
        let oldest = log.full_segments().next();
        oldest.is_some_and(|(id, _)| *id <= self.shared.given_up.load(Ordering::Relaxed))
    }

    /// Whether giving up the oldest segment is what the operator chose, the last spare is in use, and it would help: space
    /// that others take cannot be had this way.
    fn can_give_up(&self, log: &Log) -> bool {
        if self.shared.config.when_full != WhenFull::DropOldest || !log.spares.is_empty() || self.is_giving_up(log) {
            return false;
        }
        let Some((_, oldest)) = log.full_segments().next() else { return false };
        let (config, needed) = (&self.shared.config, self.shared.shape.reserved_bytes);
        let gained: u64 = log.full_segments().map(|(_, segment)| segment.disk_bytes).sum();
        let within_budget = log.disk_bytes(&self.shared.shape) - gained + needed <= config.bytes_max.as_u64();
        oldest.disk_bytes > 0
            && within_budget
            && log.space.free_bytes + gained >= needed + config.free_bytes_min.as_u64()
    }

    fn give_up_oldest(&self, log: &mut Log) {
        let Some((id, segment)) = log.full_segments().next().map(|(id, segment)| (*id, *segment)) else { return };
        self.shared.given_up.fetch_max(id, Ordering::Relaxed);
        log.reader_woken = true;
        let free_bytes = log.space.free_bytes;
        tracing::warn!(
            segment = id,
            disk_bytes = segment.disk_bytes,
            free_bytes,
            "log full, giving up its oldest segment"
        );
    }

    /// Gives back the disk reserved for segments that take no more records.
    fn seal(&self) -> Result<(), StoreError> {
        let unsealed: Vec<u64> = {
            let log = self.shared.log();
            let active = log.active.map(|(id, _)| id);
            let unsealed = log.segments.iter().filter(|(id, segment)| !segment.sealed && Some(**id) != active);
            unsealed.map(|(id, _)| *id).collect()
        };
        for id in unsealed {
            self.shared.store.seal(id)?;
            let disk_bytes = self.shared.store.segment_bytes(id)?;
            if let Some(segment) = self.shared.log().segments.get_mut(&id) {
                (segment.disk_bytes, segment.sealed) = (disk_bytes, true);
            }
        }
        Ok(())
    }

    /// Saves the dedup window when a segment is full: what is in the segment that is being filled is found there again.
    fn save_window(&mut self) -> Result<(), StoreError> {
        let saved = self.saved_window.end_sequence;
        let is_full = |segment: &Segment| segment.end.is_some_and(|end| end.sequence > saved);
        if !self.shared.dedup || (self.window_is_saved && !self.shared.log().segments.values().any(is_full)) {
            return Ok(());
        }
        let unsaved = self.shared.queue().window.take_unsaved();
        let saved = self.saved_window.save(&*self.shared.meta, &unsaved);
        self.window_is_saved = saved.is_ok();
        if saved.is_err() {
            self.shared.queue().window.not_saved(&unsaved);
        }
        saved
    }

    fn save_cursor(&mut self) -> Result<(), StoreError> {
        let (cursor, tail, saved, losses, stretch) = {
            let log = self.shared.log();
            let stretch = log.ahead.as_ref().map(|ahead| ahead.stretch).filter(|ahead| log.saved_ahead != Some(*ahead));
            (log.cursor, log.tail, log.saved_cursor, log.unsaved_losses.clone(), stretch)
        };
        let is_saved = cursor == saved && tail.sequence == self.saved_tail && stretch.is_none();
        if is_saved && losses.is_empty() && self.shared.parked_notes.to_save() == self.saved_parked {
            return Ok(());
        }
        let meta = &*self.shared.meta;
        // Before the cursor, which may pass them: a loss that nobody can look up later would be a silent one.
        losses.iter().try_for_each(|loss| losses::put(meta, loss))?;
        let parked = self.shared.parked_notes.put_noted()?;
        stretch.map_or(Ok(()), |stretch| ahead::put(meta, stretch))?;
        cursor::save(meta, cursor, tail)?;
        self.saved_parked = parked;
        self.saved_tail = tail.sequence;
        let mut log = self.shared.log();
        log.saved_cursor = cursor;
        log.saved_ahead = stretch.or(log.saved_ahead);
        log.unsaved_losses.drain(..losses.len());
        Ok(())
    }

    /// Removes the segments that nobody needs, and that are before `window_end`.
    fn trim(&self, window_end: u64) -> Result<(), StoreError> {
        loop {
            let first = self.shared.log().first_delivered_segment();
            let Some((id, segment)) = first else { return Ok(()) };
            // Its batches are not known again before they are saved. Segments from before the start were saved first of all.
            if self.shared.dedup && segment.end.is_some_and(|end| end.sequence > window_end) {
                return Ok(());
            }
            self.shared.pool.close_unused();
            if segment.damaged {
                self.shared.store.quarantine(id)?;
                tracing::error!(segment = id, "damaged segment set aside");
            } else {
                self.shared.store.remove(id)?;
                tracing::debug!(segment = id, disk_bytes = segment.disk_bytes, "segment trimmed");
            }
            let mut log = self.shared.log();
            log.segments.remove(&id);
            // There may be room for another spare now.
            log.space_short = false;
            drop(log);
            self.measure_space()?;
        }
    }

    /// Logs a failure once, and its end. A failing keeper costs disk and, in the end, refused batches.
    fn report(&mut self, result: Result<(), StoreError>) {
        let error = result.err().map(|error| {
            let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            format!("{error}{cause}")
        });
        match (&error, &self.last_error) {
            (Some(error), last) if last.as_ref() != Some(error) => {
                tracing::error!(%error, "log housekeeping failed, trying again");
            }
            (None, Some(_)) => tracing::info!("log housekeeping works again"),
            _ => {}
        }
        self.last_error = error;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::memory::{Faults, MemoryStore};
    use crate::wal::store::Store;
    use crate::wal::tests::{append_all, batch, open_memory, wait};

    #[test]
    fn no_segment_goes_before_the_cursor_that_left_it_is_durable() {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        append_all(&wal, 1..=40, 300);
        // A save under way may not see the faults yet: none is after this.
        wal.close();
        let wal = open_memory(&store);
        store.set_faults(Faults { put_fails: true, ..Faults::default() });
        let before = store.segments().unwrap();
        let mut reader = wal.reader();
        while let Some(record) = reader.next_record().unwrap() {
            wal.deliver(record.end);
        }
        let mut keeper = Keeper::new(wal.shared.clone(), SavedWindow::default());
        assert!(keeper.save_and_trim().is_err(), "the cursor was saved");
        keeper.trim(u64::MAX).unwrap();
        assert!(store.segments().unwrap().starts_with(&before[..2]), "trimmed, and the cursor is not saved");
        store.set_faults(Faults::default());
        keeper.save_cursor().unwrap();
        keeper.trim(u64::MAX).unwrap();
        assert!(!store.segments().unwrap().contains(&before[0]));
        drop(reader);
        wal.close();
    }

    #[test]
    fn no_segment_goes_before_it_is_durable_that_it_was_delivered_ahead() {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        wait(wal.append(batch(1, 300)).unwrap()).unwrap();
        assert!(wal.begin_ahead());
        append_all(&wal, 2..=80, 300);
        wal.close();
        let wal = open_memory(&store);
        store.set_faults(Faults { put_fails: true, ..Faults::default() });
        let before = store.segments().unwrap();
        let mut reader = wal.ahead_reader().unwrap();
        while let Some(record) = reader.next_record().unwrap() {
            wal.deliver_ahead(record.end);
        }
        let mut keeper = Keeper::new(wal.shared.clone(), SavedWindow::default());
        assert!(keeper.save_and_trim().is_err(), "it was saved");
        keeper.trim(u64::MAX).unwrap();
        assert!(store.segments().unwrap().starts_with(&before[..3]), "trimmed, and it is not saved");
        store.set_faults(Faults::default());
        keeper.save_cursor().unwrap();
        keeper.trim(u64::MAX).unwrap();
        assert_eq!(store.segments().unwrap()[0], before[0], "the backlog is in it");
        assert!(!store.segments().unwrap().contains(&before[1]));
        drop(reader);
        wal.close();
    }
}
