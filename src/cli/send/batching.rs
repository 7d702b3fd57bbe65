//! Lines into batches.

use std::collections::VecDeque;
use std::time::Duration;

use ringtail::client::{new_req_guid, sent_time_now};
use ringtail::proto;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::input::{Group, Line, ReadError};

/// When a batch is full.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most events.
    pub events: usize,
    /// Most bytes of events; one event always fits.
    pub bytes: u64,
    /// How long after its first event a batch is sent though it is not full.
    pub linger: Duration,
}

/// A request, and what it stands for.
#[derive(Debug)]
pub struct Batch {
    /// Ready to be sent, with its own guid.
    pub request: proto::SendEventRequest,
    /// Bytes of events.
    pub bytes: u64,
    /// Bytes of input.
    pub input_bytes: u64,
}

/// Takes lines from the reader and makes batches of them.
pub struct Batches {
    lines: mpsc::Receiver<Group>,
    limits: Limits,
    event_type: String,
    /// Read and not yet in a batch.
    pending: VecDeque<Line>,
    pending_error: Option<ReadError>,
    ended: bool,
    /// When the batch being filled is sent at the latest.
    deadline: Option<Instant>,
}

impl Batches {
    /// Batches of what comes out of `lines`.
    pub fn new(lines: mpsc::Receiver<Group>, limits: Limits, event_type: String) -> Self {
        Batches {
            lines,
            limits,
            event_type,
            pending: VecDeque::new(),
            pending_error: None,
            ended: false,
            deadline: None,
        }
    }

    /// The next batch; `None` at the end of the input. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// [`ReadError`], after the lines before it.
    pub async fn next(&mut self) -> Result<Option<Batch>, ReadError> {
        while !self.is_full() && !self.ended && self.pending_error.is_none() {
            let received = match self.deadline {
                None => self.lines.recv().await,
                Some(deadline) => match tokio::time::timeout_at(deadline, self.lines.recv()).await {
                    Ok(received) => received,
                    Err(_) => break,
                },
            };
            match received {
                Some(Ok(lines)) => self.pending.extend(lines),
                Some(Err(error)) => self.pending_error = Some(error),
                None => self.ended = true,
            }
            if self.deadline.is_none() && !self.pending.is_empty() {
                self.deadline = Some(Instant::now() + self.limits.linger);
            }
        }
        if self.pending.is_empty() {
            return self.pending_error.take().map_or(Ok(None), Err);
        }
        Ok(Some(self.take_batch()))
    }

    fn is_full(&self) -> bool {
        let mut bytes = 0;
        self.pending.len() >= self.limits.events
            || self.pending.iter().any(|line| {
                bytes += line.event.len() as u64;
                bytes >= self.limits.bytes
            })
    }

    fn take_batch(&mut self) -> Batch {
        let mut batch = Batch {
            request: proto::SendEventRequest {
                req_guid: new_req_guid(),
                sent_time: Some(sent_time_now()),
                events: Vec::new(),
            },
            bytes: 0,
            input_bytes: 0,
        };
        while batch.request.events.len() < self.limits.events {
            let Some(line) = self.pending.pop_front() else { break };
            let bytes = batch.bytes + line.event.len() as u64;
            if bytes > self.limits.bytes && !batch.request.events.is_empty() {
                self.pending.push_front(line);
                break;
            }
            batch.bytes = bytes;
            batch.input_bytes += line.input_bytes;
            batch.request.events.push(proto::Event { event_bytes: line.event, r#type: self.event_type.clone() });
        }
        // What is left over waits for more lines in its turn.
        self.deadline = (!self.pending.is_empty()).then(|| Instant::now() + self.limits.linger);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn line(event: &'static str) -> Line {
        Line { event: event.into(), input_bytes: event.len() as u64 + 1 }
    }

    fn batches(groups: Vec<Group>, events: usize, bytes: u64) -> (mpsc::Sender<Group>, Batches) {
        let (sender, lines) = mpsc::channel(groups.len() + 1);
        for group in groups {
            sender.try_send(group).unwrap();
        }
        let limits = Limits { events, bytes, linger: Duration::from_millis(100) };
        (sender, Batches::new(lines, limits, "t".into()))
    }

    fn events(batch: Option<Batch>) -> Vec<String> {
        let events = batch.expect("a batch").request.events;
        events.into_iter().map(|event| String::from_utf8(event.event_bytes.into()).unwrap()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn batches_are_filled_across_groups_and_keep_the_order() {
        let groups = vec![Ok(vec![line("a"), line("b")]), Ok(vec![line("c"), line("d"), line("e")])];
        let (sender, mut batches) = batches(groups, 3, 1000);
        drop(sender);
        assert_eq!(events(batches.next().await.unwrap()), ["a", "b", "c"]);
        assert_eq!(events(batches.next().await.unwrap()), ["d", "e"]);
        assert!(batches.next().await.unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_limit_a_batch_but_one_event_always_fits() {
        let (sender, mut batches) =
            batches(vec![Ok(vec![line("aa"), line("bbb"), line("cccccccc"), line("d")])], 100, 5);
        drop(sender);
        let first = batches.next().await.unwrap().unwrap();
        assert_eq!((first.bytes, first.input_bytes), (5, 7));
        assert_eq!(events(Some(first)), ["aa", "bbb"]);
        assert_eq!(events(batches.next().await.unwrap()), ["cccccccc"]);
        assert_eq!(events(batches.next().await.unwrap()), ["d"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_does_not_fill_lingers_and_goes() {
        let (sender, mut batches) = batches(vec![Ok(vec![line("a")])], 100, 1000);
        let started = Instant::now();
        assert_eq!(events(batches.next().await.unwrap()), ["a"]);
        assert_eq!(started.elapsed(), Duration::from_millis(100));
        // Without a line there is nothing to linger for.
        assert!(tokio::time::timeout(Duration::from_secs(60), batches.next()).await.is_err());
        drop(sender);
        assert!(batches.next().await.unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_comes_after_the_lines_before_it() {
        let error = ReadError::Io { source_name: "f".into(), source: io::Error::other("broken") };
        let (sender, mut batches) = batches(vec![Ok(vec![line("a")]), Err(error), Ok(vec![line("b")])], 100, 1000);
        drop(sender);
        assert_eq!(events(batches.next().await.unwrap()), ["a"]);
        assert!(matches!(batches.next().await, Err(ReadError::Io { .. })));
        assert_eq!(events(batches.next().await.unwrap()), ["b"]);
        assert!(batches.next().await.unwrap().is_none());
    }
}
