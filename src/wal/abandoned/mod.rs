//! A commit that finds no room on the disk: its segment is **abandoned**, and a new one takes its place once there is room.
//!
//! # The rule
//! 1. From the first write, flush or sync on that found no room, nothing more of the segment is acked: groups that are not durable
//!    by then are refused as full, and the segment is not synced for them again, as that might succeed and mean nothing.
//! 2. The segment ends where the acked records do ([`super::log::Segment::end`]). The log is full.
//! 3. sled lets go of the segment's file; what stands in it behind that end is cut off, durably; a new segment is prepared. In
//!    this order, and then only does the log take batches again: the first one gets the first of the sequences refused.
//!
//! # Why nothing is lost, or there twice
//! - What was acked is not touched: it was durable by a sync that succeeded, and is before the end.
//! - Until the cut is durable, no later segment holds a record. Whatever ends the process meanwhile, recovery finds the abandoned
//!   segment to be the newest, as after any crash in a commit: refused records that follow the acked ones without a gap come
//!   back, once and in order, what stands behind a gap is cut off, and sequences go on behind it.
//! - Once it is durable, the new segment alone holds the sequences that are used again. On disk, an abandoned segment is like any
//!   other that took no more records: nobody who reads it later needs to know.
//! - The cut is behind sled's last write: `close` returns when nobody holds sled's lock on the file, its own threads included.
//!   They may write for a while what was refused.
//! - The cut does not hang on what a failed sync left in the page cache, that of an earlier try to cut included: what is there to
//!   be cut is read from the disk, and the cut's own sync says whether it is gone from there.
//! - This process reads the segment before it is cut, so that deliveries can make room: no further than to its end. But the cursor
//!   does not leave it before that: what comes back at the next start is behind the cursor's place, and read from there.
//!
//! Where there seems to be room and never is any, nothing is gained by one new segment after the other: the pause between them grows.
//!
//! Spares go as well, as segments without a record: they were prepared when there seemed to be room, too. That a new one can be
//! prepared shows that there is some again.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::appender::{self, Waiting};
use super::error::{CommitError, StoreError};
use super::log::{Log, Position, Segment, Shared};
use super::store::{ActiveSegment, SegmentShape};

/// After a segment in which nothing was acked before it was abandoned, the next is waited for: this, doubled for each more.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// A segment that is still to be cut.
#[derive(Clone)]
pub(super) struct Abandoned {
    /// Where its acked records end.
    pub end: Position,
    pub file: Arc<dyn ActiveSegment>,
}

/// A commit failed: whether that is for lack of room, or ends acking for good. Returns what to tell the batches in it.
pub(super) fn fail(shared: &Shared, error: &StoreError) -> CommitError {
    let error_value = error as &dyn std::error::Error;
    if error.is_full() {
        tracing::warn!(error = error_value, "no room for a commit, abandoning its segment");
        shared.pipeline.set_no_room();
        shared.log().begin_full(shared);
        return CommitError::Full;
    }
    tracing::error!(error = error_value, "commit failed, the log takes no more batches");
    shared.fail();
    CommitError::Poisoned
}

/// Refuses batches that were queued: they are not remembered, and take no room in the queue any more.
pub(super) fn refuse(shared: &Shared, waiting: impl IntoIterator<Item = Waiting>, error: &CommitError) {
    let waiting: Vec<_> = waiting.into_iter().collect();
    let bytes: u64 = waiting.iter().map(|waiting| waiting.batch.request.as_bytes().len() as u64).sum();
    let mut queue = shared.queue();
    queue.bytes = queue.bytes.saturating_sub(bytes);
    for fingerprint in waiting.iter().filter_map(|waiting| waiting.fingerprint) {
        queue.window.refuse(&fingerprint, error);
    }
    drop(queue);
    // The commit thread may have a segment to abandon.
    shared.queue_changed.notify_one();
    appender::refuse(waiting, error);
}

impl Log {
    /// The active segment takes no more records, and neither do the spares.
    pub fn abandon(&mut self, abandoned: Abandoned, shape: &SegmentShape) {
        let end = abandoned.end;
        let spares = self.spares.drain(..).map(|(id, _)| id);
        let whole = Segment { disk_bytes: shape.reserved_bytes, ..Segment::default() };
        for id in [end.segment].into_iter().chain(spares) {
            self.segments.entry(id).or_insert(whole).end = Some(end.totals);
        }
        self.active = None;
        self.abandoned = Some(abandoned);
        self.next_segment_at = (self.abandoned_in_row > 0)
            .then(|| Instant::now() + PAUSE_MAX.min(PAUSE_MIN * 2u32.saturating_pow(self.abandoned_in_row)));
        self.abandoned_in_row += 1;
    }

    /// Whether it is too early for another segment.
    pub fn is_pausing(&self) -> bool {
        self.next_segment_at.is_some_and(|at| Instant::now() < at)
    }

    /// Until an abandoned segment is cut, the cursor stays in it, also when the last of its records are lost: what comes back at
    /// the next start is behind the cursor's place.
    pub fn before_the_cut(&self, position: Position) -> Position {
        let end = self.abandoned.as_ref().map(|abandoned| abandoned.end);
        end.filter(|end| position.segment > end.segment).unwrap_or(position)
    }

    /// Batches are refused for lack of space from now on, if they are not yet.
    pub fn begin_full(&mut self, shared: &Shared) {
        if self.full_since.is_some() {
            return;
        }
        tracing::warn!(
            disk_bytes = self.disk_bytes(&shared.shape),
            bytes_max = shared.config.bytes_max.as_u64(),
            free_bytes = self.space.free_bytes,
            free_bytes_min = shared.config.free_bytes_min.as_u64(),
            "log full, refusing batches"
        );
        self.full_since = Some(Instant::now());
    }

    /// Batches are accepted again, if there is a segment for them.
    pub fn end_full(&mut self, shared: &Shared) {
        if self.abandoned.is_none()
            && !shared.pipeline.found_no_room()
            && !self.spares.is_empty()
            && let Some(since) = self.full_since.take()
        {
            tracing::info!(full_for = ?since.elapsed(), "log free again, accepting batches");
        }
    }
}

/// Cuts the abandoned segment, if there is one: nothing is left in it behind its end, durably. Whether there was one.
pub(super) fn cut(shared: &Shared) -> Result<bool, StoreError> {
    let Some(Abandoned { end, file }) = shared.log().abandoned.clone() else { return Ok(false) };
    let (store, id) = (&shared.store, end.segment);
    // Whoever reads it opens it anew, without sled.
    shared.pool.forget(id);
    file.close()?;
    // It may have been set aside.
    if shared.log().segments.contains_key(&id) {
        store.settle(id)?;
        let from = store.open(id)?.seek(end.slot, end.totals.sequence);
        store.cut(id, from)?;
    }
    let mut log = shared.log();
    log.abandoned = None;
    log.leave_delivered_segments();
    Ok(true)
}
