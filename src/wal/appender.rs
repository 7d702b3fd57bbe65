//! The commit thread: takes every batch that waits, writes them as one group, and passes it on to be synced (`syncer.rs`).
//!
//! There is no timer and no artificial delay: while one group is being synced, the next one is written, and the one after
//! that gathers. Any error or panic refuses the whole group, because after a failed sync nobody knows what is on disk. If the
//! disk has no room, another segment takes the place of this one (`abandoned/mod.rs`); anything else fails the log for good.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::abandoned::{self, Abandoned};
use super::dedup::{Fingerprint, Known, Window};
use super::error::{AppendError, CommitError, StoreError};
use super::log::{Position, Segment, Shared};
use super::record::{ChunkHeader, HEADER_BYTES, Totals, encode_chunk, encode_record, record_bytes};
use super::store::ActiveSegment;
use super::syncer::{self, Group};
use crate::batch::{Batch, Sequence};
use crate::config::WhenFull;
use crate::kill_point;

/// Most bytes of one group commit, unless a single batch is larger.
const GROUP_BYTES_MAX: usize = 4 << 20;

/// How long commits wait for a segment to be prepared, or given up for another, before batches are refused as if the log
/// were full.
const SPARE_PATIENCE: Duration = Duration::from_secs(5);

/// Batches that wait for their commit, and those that had it.
pub(super) struct Queue {
    waiting: VecDeque<Waiting>,
    /// Request bytes waiting or being committed.
    pub bytes: u64,
    closing: bool,
    /// Under the same lock, so that of two equal batches one is always the first.
    pub window: Window,
}

pub(super) struct Waiting {
    pub batch: Batch,
    /// Bytes of its record.
    pub bytes: usize,
    pub fingerprint: Option<Fingerprint>,
    pub done: oneshot::Sender<Done>,
}

/// What came of a batch.
pub(super) type Done = Result<Sequence, CommitError>;

/// How a batch came to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Under this sequence.
    New(Sequence),
    /// It is a retry: an earlier call stored it.
    Before,
}

/// Resolves once the batch is durable, or will not be.
#[derive(Debug)]
pub struct Commit {
    /// None: it was durable before.
    done: Option<oneshot::Receiver<Done>>,
    /// The log has, or is just getting, this very batch from an earlier call.
    is_retry: bool,
}

impl Future for Commit {
    type Output = Result<Stored, CommitError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let is_retry = self.is_retry;
        let Some(done) = &mut self.done else { return Poll::Ready(Ok(Stored::Before)) };
        // The sender is only dropped unused when the commit thread panicked.
        let result = Pin::new(done).poll(context).map(|result| result.unwrap_or(Err(CommitError::Poisoned)));
        result.map_ok(|sequence| if is_retry { Stored::Before } else { Stored::New(sequence) })
    }
}

impl Queue {
    pub fn new(window: Window) -> Queue {
        Queue { waiting: VecDeque::new(), bytes: 0, closing: false, window }
    }
}

/// Queues a batch for the next commit, unless the log knows it already by its `fingerprint`.
pub(super) fn append(shared: &Shared, batch: Batch, fingerprint: Option<Fingerprint>) -> Result<Commit, AppendError> {
    let (bytes, request_bytes) = (record_bytes(&batch), batch.request.as_bytes().len() as u64);
    let full = shared.log().full_since.is_some();
    let mut queue = shared.queue();
    // Under the queue's lock, or the commit thread could have looked for the last time already.
    if shared.failed.is_cancelled() {
        return Err(AppendError::Poisoned);
    }
    // A retry needs no room: it is acked even when there is none.
    let known = fingerprint.map(|fingerprint| queue.window.look_up(&fingerprint, batch.received_at_ms));
    match known {
        Some(Known::Durable) => return Ok(Commit { done: None, is_retry: true }),
        Some(Known::Pending(done)) => return Ok(Commit { done: Some(done), is_retry: true }),
        Some(Known::New) | None => {}
    }
    if full {
        return Err(AppendError::Full);
    }
    if queue.closing {
        return Err(AppendError::Stopping);
    }
    if queue.bytes + request_bytes > shared.queue_bytes_max {
        return Err(AppendError::Overloaded { queued_bytes: queue.bytes, limit: shared.queue_bytes_max });
    }
    if let Some(fingerprint) = fingerprint {
        queue.window.begin(fingerprint);
    }
    let (done, commit) = oneshot::channel();
    queue.bytes += request_bytes;
    queue.waiting.push_back(Waiting { batch, bytes, fingerprint, done });
    if queue.waiting.len() == 1 {
        // From here on the commit thread is busy, even if it does not wake up.
        let _ = shared.commit_began.compare_exchange(0, shared.elapsed_ms() + 1, Ordering::Relaxed, Ordering::Relaxed);
        shared.queue_changed.notify_one();
    }
    Ok(Commit { done: Some(commit), is_retry: false })
}

/// No more batches: the commit thread ends once the queue is empty.
pub(super) fn close(shared: &Shared) {
    shared.queue().closing = true;
    shared.queue_changed.notify_all();
}

/// The segment that is being filled.
struct Active {
    id: u64,
    file: Arc<dyn ActiveSegment>,
    slots_used: u32,
    bytes_used: u64,
}

/// Refuses everything that waits; for when nothing is committed any more.
pub(super) fn refuse_all(queue: &mut Queue) {
    queue.bytes = 0;
    queue.window.refuse_all(&CommitError::Poisoned);
    refuse(queue.waiting.drain(..), &CommitError::Poisoned);
}

/// State of the commit thread.
pub(super) struct Appender {
    shared: Arc<Shared>,
    active: Option<Active>,
    tail: Totals,
    body: Vec<u8>,
    value: Vec<u8>,
}

impl Appender {
    pub fn new(shared: Arc<Shared>) -> Appender {
        let tail = shared.log().tail;
        Appender { shared, active: None, tail, body: Vec::new(), value: Vec::new() }
    }

    /// Commits until the log is closed and the queue empty, or the log fails.
    pub fn run(mut self) {
        let shared = self.shared.clone();
        // A panic here would leave waiters without an answer and the process without a log.
        let _fail_on_panic = FailOnPanic(&shared);
        let _close = shared.pipeline.close_on_drop();
        while self.wait() {
            kill_point::pass("commit.turn");
            shared.commit_began.store(shared.elapsed_ms() + 1, Ordering::Relaxed);
            if shared.pipeline.found_no_room() {
                self.abandon();
            } else {
                self.commit_group();
            }
            shared.commit_began.store(0, Ordering::Relaxed);
        }
    }

    /// Waits for a batch, or for a segment to abandon. False: there will be none.
    fn wait(&self) -> bool {
        let mut queue = self.shared.queue();
        loop {
            if self.shared.failed.is_cancelled() {
                return false;
            }
            if !queue.waiting.is_empty() || self.shared.pipeline.found_no_room() {
                return true;
            }
            if queue.closing {
                return false;
            }
            queue = self.shared.queue_changed.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn commit_group(&mut self) {
        let began = Instant::now();
        let mut chunks = self.take_group();
        if chunks.is_empty() {
            // What waits does not fit into the active segment.
            if let Err(error) = self.rotate() {
                self.refuse_waiting(&error);
                return;
            }
            chunks = self.take_group();
        }
        if chunks.is_empty() {
            // The log failed meanwhile, and whoever waited was refused.
            return;
        }
        match self.write(&chunks) {
            Ok(tail) => {
                let before = std::mem::replace(&mut self.tail, tail);
                let active = self.active.as_ref().expect("it was just written");
                let (segment, slots_used, file) = (active.id, active.slots_used, active.file.clone());
                let group = Group { chunks, before, tail, segment, slots_used, file, began };
                // While more waits, another thread syncs. Otherwise handing it over would only cost time.
                if self.shared.pipeline.is_idle() && self.shared.queue().waiting.is_empty() {
                    syncer::commit(&self.shared, [group].into());
                } else if let Err(group) = self.shared.pipeline.push(group) {
                    refuse(group.chunks.into_iter().flatten(), &CommitError::Poisoned);
                }
            }
            Err(error) => {
                let error = abandoned::fail(&self.shared, &error);
                abandoned::refuse(&self.shared, chunks.into_iter().flatten(), &error);
            }
        }
    }

    /// Abandons the active segment, which found no room (`abandoned/mod.rs`).
    fn abandon(&mut self) {
        self.shared.pipeline.wait_until_empty();
        let Active { id, file, .. } = self.active.take().expect("what found no room was written to it");
        let mut log = self.shared.log();
        self.tail = log.tail;
        let slot = log.active.take().map_or(0, |(_, slots)| slots);
        let end = Position { segment: id, slot, totals: self.tail };
        log.abandon(Abandoned { end, file }, &self.shared.shape);
        drop(log);
        self.refuse_waiting(&CommitError::Full);
        // From here on the keeper may end the full state.
        self.shared.pipeline.end_no_room();
        self.shared.log_changed.notify_all();
    }

    /// Takes what waits, as chunks, as far as it fits into the active segment.
    fn take_group(&mut self) -> Vec<Vec<Waiting>> {
        let shape = &self.shared.shape;
        let Some(active) = &self.active else { return Vec::new() };
        let mut slots_left = shape.slots - active.slots_used;
        let mut bytes_left = shape.bytes_max.saturating_sub(active.bytes_used);
        let body_bytes_max = shape.value_bytes_max - HEADER_BYTES;
        let (mut chunks, mut group_bytes, mut body_bytes) = (Vec::<Vec<Waiting>>::new(), 0, usize::MAX);
        let mut queue = self.shared.queue();
        while let Some(waiting) = queue.waiting.front() {
            let bytes = waiting.bytes;
            let joins = body_bytes.saturating_add(bytes) <= body_bytes_max;
            let slots = if joins { 0 } else { parts(bytes, body_bytes_max) };
            let disk_bytes = (bytes + slots as usize * HEADER_BYTES) as u64;
            let too_much = group_bytes > 0 && group_bytes + bytes > GROUP_BYTES_MAX;
            if too_much || slots > slots_left || disk_bytes > bytes_left {
                break;
            }
            (slots_left, bytes_left, group_bytes) = (slots_left - slots, bytes_left - disk_bytes, group_bytes + bytes);
            let waiting = queue.waiting.pop_front().expect("it was at the front");
            if joins {
                body_bytes += bytes;
                chunks.last_mut().expect("a chunk was begun").push(waiting);
            } else {
                body_bytes = if slots == 1 { bytes } else { usize::MAX };
                chunks.push(vec![waiting]);
            }
        }
        chunks
    }

    /// Writes the chunks and hands them to the system. Returns the totals after them.
    fn write(&mut self, chunks: &[Vec<Waiting>]) -> Result<Totals, StoreError> {
        let active = self.active.as_mut().expect("take_group found room in it");
        let body_bytes_max = self.shared.shape.value_bytes_max - HEADER_BYTES;
        let durable = self.shared.log().tail.sequence;
        let mut tail = self.tail;
        for chunk in chunks {
            let before = tail;
            let unsynced = u32::try_from(before.sequence - durable).expect("waiting batches are limited in bytes");
            self.body.clear();
            for waiting in chunk {
                encode_record(&waiting.batch, &mut self.body);
                tail = tail.after(&waiting.batch);
            }
            let parts = parts(self.body.len(), body_bytes_max) as u16;
            let records = chunk.len() as u32;
            for (part, body) in (0..parts).zip(self.body.chunks(body_bytes_max)) {
                encode_chunk(&ChunkHeader { before, records, part, parts, unsynced }, body, &mut self.value);
                active.file.write(active.slots_used, &self.value)?;
                active.slots_used += 1;
                active.bytes_used += self.value.len() as u64;
                kill_point::pass("commit.slot_written");
            }
        }
        kill_point::pass("commit.written");
        active.file.flush()?;
        kill_point::pass("commit.flushed");
        self.body.shrink_to(1 << 20);
        Ok(tail)
    }

    /// Seals the active segment and takes a prepared one, waiting for it if need be.
    fn rotate(&mut self) -> Result<(), CommitError> {
        // A segment is left when everything in it is durable: the reader goes by that.
        self.shared.pipeline.wait_until_empty();
        if self.shared.pipeline.found_no_room() {
            return Err(CommitError::Full);
        }
        let began = Instant::now();
        let mut log = self.shared.log();
        if let Some(sealed) = self.active.take() {
            log.active = None;
            log.segments.entry(sealed.id).or_default().end = Some(self.tail);
            log.leave_delivered_segments();
            kill_point::pass("rotate.left");
        }
        loop {
            if self.shared.failed.is_cancelled() {
                return Err(CommitError::Poisoned);
            }
            let is_cut = log.abandoned.is_none();
            if is_cut && let Some((id, file)) = log.spares.pop_front() {
                // Whether another can be made is decided anew.
                log.space_short &= !log.spares.is_empty() || self.shared.config.when_full == WhenFull::Reject;
                let disk_bytes = self.shared.shape.reserved_bytes;
                log.segments.insert(id, Segment { disk_bytes, ..Segment::default() });
                log.active = Some((id, 0));
                self.active = Some(Active { id, file, slots_used: 0, bytes_used: 0 });
                kill_point::pass("rotate.taken");
                self.shared.log_changed.notify_all();
                return Ok(());
            }
            if log.space_short || !is_cut || began.elapsed() >= SPARE_PATIENCE {
                log.begin_full(&self.shared);
                return Err(CommitError::Full);
            }
            let waited = self.shared.log_changed.wait_timeout(log, SPARE_PATIENCE);
            log = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }

    fn refuse_waiting(&self, error: &CommitError) {
        let waiting: Vec<_> = self.shared.queue().waiting.drain(..).collect();
        abandoned::refuse(&self.shared, waiting, error);
    }
}

pub(super) fn refuse(waiting: impl IntoIterator<Item = Waiting>, error: &CommitError) {
    for waiting in waiting {
        let _ = waiting.done.send(Err(error.clone()));
    }
}

/// Slots that a body of `bytes` takes.
fn parts(bytes: usize, body_bytes_max: usize) -> u32 {
    u32::try_from(bytes.div_ceil(body_bytes_max)).expect("a batch is limited to 16 MiB")
}

/// Fails the log when the thread that holds it panics: others would wait for it for ever.
pub(super) struct FailOnPanic<'a>(pub &'a Shared);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail();
        }
    }
}
