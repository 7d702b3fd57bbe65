//! The sync thread: makes written groups durable, in order, and tells everybody who waits for them.
//!
//! One `fdatasync` covers every group that was written before it began, so the slower the disk, the more share one.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::abandoned;
use super::appender::{FailOnPanic, Waiting, refuse};
use super::error::CommitError;
use super::log::Shared;
use super::record::Totals;
use super::store::ActiveSegment;
use crate::batch::Sequence;
use crate::kill_point;

/// Groups written ahead of the sync: more would only be smaller ones.
const GROUPS_MAX: usize = 2;

/// A group that is written and not yet durable.
pub(super) struct Group {
    /// Its batches, chunk by chunk.
    pub chunks: Vec<Vec<Waiting>>,
    /// Totals before and after it.
    pub before: Totals,
    pub tail: Totals,
    /// The segment it is in, and how many of its slots are used.
    pub segment: u64,
    pub slots_used: u32,
    pub file: Arc<dyn ActiveSegment>,
    /// When its commit began.
    pub began: Instant,
}

/// The groups between the two threads. They are all in one segment.
#[derive(Default)]
pub(super) struct Pipeline {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    groups: VecDeque<Group>,
    /// Groups taken and not yet published.
    syncing: bool,
    /// The segment found no room: none of its groups is synced any more.
    no_room: bool,
    closed: bool,
    ended: bool,
}

impl Pipeline {
    /// Passes a group on; waits while there are enough of them. Gives it back if nobody takes groups any more.
    pub fn push(&self, group: Group) -> Result<(), Group> {
        let mut state = self.wait_while(|state| state.groups.len() >= GROUPS_MAX && !state.ended);
        if state.ended {
            return Err(group);
        }
        state.groups.push_back(group);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether every group is published or refused.
    pub fn is_idle(&self) -> bool {
        let state = self.state();
        !state.syncing && state.groups.is_empty()
    }

    /// Waits until every group is published or refused.
    pub fn wait_until_empty(&self) {
        drop(self.wait_while(|state| (state.syncing || !state.groups.is_empty()) && !state.ended));
    }

    /// The disk has no room for the segment of these groups: what is not durable by now is refused.
    pub fn set_no_room(&self) {
        self.state().no_room = true;
    }

    /// Whether it has none, and the segment is still to be abandoned.
    pub fn found_no_room(&self) -> bool {
        self.state().no_room
    }

    /// The next group is in another segment.
    pub fn end_no_room(&self) {
        self.state().no_room = false;
    }

    /// There will be no more groups once the returned guard is dropped.
    pub fn close_on_drop(&self) -> impl Drop + '_ {
        OnDrop(self, |state| state.closed = true)
    }

    /// The groups that wait; empty at the end.
    fn take(&self) -> VecDeque<Group> {
        let mut state = self.wait_while(|state| state.groups.is_empty() && !state.closed);
        let groups = std::mem::take(&mut state.groups);
        state.syncing = !groups.is_empty();
        self.changed.notify_all();
        groups
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        self.changed.wait_while(self.state(), condition).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Changes the pipeline's state when it is dropped, by a panic as well, so that the other thread does not wait for ever.
struct OnDrop<'a>(&'a Pipeline, fn(&mut State));

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.1(&mut self.0.state());
        self.0.changed.notify_all();
    }
}

/// Syncs and publishes groups until there will be no more.
pub(super) fn run(shared: &Shared) {
    let _fail_on_panic = FailOnPanic(shared);
    let _ended = OnDrop(&shared.pipeline, |state| {
        state.ended = true;
        // After a panic: nobody else answers them.
        let left = state.groups.drain(..).flat_map(|group| group.chunks).flatten();
        refuse(left, &CommitError::Poisoned);
    });
    loop {
        let groups = shared.pipeline.take();
        if groups.is_empty() {
            return;
        }
        let _done = OnDrop(&shared.pipeline, |state| state.syncing = false);
        commit(shared, groups);
    }
}

/// Makes groups durable, all in one segment, and answers whoever waits for them.
pub(super) fn commit(shared: &Shared, groups: VecDeque<Group>) {
    let Some(first) = groups.front() else { return };
    shared.sync_began.store(shared.elapsed_ms() + 1, Ordering::Relaxed);
    let synced = if shared.failed.is_cancelled() {
        Err(CommitError::Poisoned)
    } else if shared.pipeline.found_no_room() {
        // After a sync that failed, the next one may succeed without having written what that one could not.
        Err(CommitError::Full)
    } else {
        first.file.sync().map_err(|error| abandoned::fail(shared, &error))
    };
    shared.sync_began.store(0, Ordering::Relaxed);
    match synced {
        Ok(()) => {
            kill_point::pass("commit.synced");
            groups.into_iter().for_each(|group| publish(shared, group));
        }
        Err(error) => abandoned::refuse(shared, groups.into_iter().flat_map(|group| group.chunks).flatten(), &error),
    }
}

/// A group is durable: lets the reader see it, and tells who waits.
fn publish(shared: &Shared, group: Group) {
    let Group { chunks, before, tail, segment, slots_used, began, .. } = group;
    {
        let mut log = shared.log();
        log.note_committed(before.sequence, chunks[0][0].batch.received_at_ms);
        log.tail = tail;
        log.active = Some((segment, slots_used));
        log.abandoned_in_row = 0;
    }
    shared.log_changed.notify_all();
    let mut retries = Vec::new();
    {
        let mut queue = shared.queue();
        // Already 0 if the log failed meanwhile.
        queue.bytes = queue.bytes.saturating_sub(tail.bytes - before.bytes);
        for (sequence, waiting) in (before.sequence..).zip(chunks.iter().flatten()) {
            if let Some(fingerprint) = waiting.fingerprint {
                let waited = queue.window.commit(fingerprint, waiting.batch.received_at_ms);
                retries.extend(waited.into_iter().map(|done| (sequence, done)));
            }
        }
        queue.window.committed_until(tail.sequence);
    }
    kill_point::pass("commit.published");
    let firsts = (before.sequence..).zip(chunks.into_iter().flatten().map(|waiting| waiting.done));
    for (sequence, done) in firsts.chain(retries) {
        // The client may be gone; its batch is durable all the same.
        let _ = done.send(Ok(Sequence(sequence)));
    }
    let metrics = &shared.metrics.wal;
    metrics.committed_batches.increment(tail.sequence - before.sequence);
    metrics.committed_events.increment(tail.events - before.events);
    metrics.committed_bytes.increment(tail.bytes - before.bytes);
    metrics.commit_group_batches.record((tail.sequence - before.sequence) as f64);
    metrics.commit_duration.record(began.elapsed());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::memory::{Faults, MemoryStore};
    use crate::wal::tests::{await_spares, batch, open_memory, until, wait};

    /// What is written while a sync runs may not be in it.
    #[test]
    fn a_sync_acks_nothing_that_was_written_after_it_began() {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        wait(wal.append(batch(1, 10)).unwrap()).unwrap();
        await_spares(&wal);
        let is_syncing = || wal.shared.sync_began.load(Ordering::Relaxed) != 0;
        let hold_writes = |from| store.set_faults(Faults { writes_held_from: from, ..Faults::default() });
        let sync_gate = store.sync_gate();
        let sync_held = sync_gate.lock().unwrap();
        hold_writes(Some(2));
        let first = wal.append(batch(2, 10)).unwrap();
        until("it is being written", || store.writes() == 2);
        // As another one waits, the other thread syncs it.
        let second = wal.append(batch(3, 10)).unwrap();
        hold_writes(Some(3));
        until("the first is being synced", is_syncing);
        hold_writes(None);
        until("the second is written", || wal.shared.pipeline.state().groups.len() == 1);
        let log = wal.shared.log();
        drop(sync_held);
        until("the first is synced", || !is_syncing());
        store.set_faults(Faults { sync_fails: true, ..Faults::default() });
        drop(log);
        assert_eq!([wait(first), wait(second)], [Ok(2), Err(CommitError::Poisoned)]);
        wal.close();
    }
}
