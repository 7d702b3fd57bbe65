//! WebSocket load: one lean task per connection.

use std::ops::Range;
use std::time::Instant;

use base64::Engine;
use rand::RngCore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::frame::{self, Answer, RequestFrame, ServerFrame, frame_header, next_frame, scan_answer};
use super::schedule::{Pace, Schedule};
use super::{Connection, SharedStats};
use crate::client::{ClientError, ClientOptions, Refusal};
use crate::proto;

/// First size of the buffer that answers are read into. It grows to the largest frame.
const READ_BYTES: usize = 2048;

/// Largest frame taken from the server. Answers are far below.
const FRAME_BYTES_MAX: usize = 1024 * 1024;

/// Largest header of a handshake's answer.
const HANDSHAKE_BYTES_MAX: usize = 16 * 1024;

pub(super) async fn run(connection: &Connection) {
    let options = &connection.options;
    let Some(socket) = connection.open(Socket::open(&options.client(connection.number))).await else { return };
    let frame = RequestFrame::new(random_request(options.events_per_batch, options.event_bytes, options.types));
    let Some(schedule) = connection.schedule().await else { return };
    let mut load = Load {
        socket,
        frame,
        pace: Pace::new(&schedule, options, connection.number, options.connections),
        schedule,
        window: Window::new(options.window),
        stats: connection.stats.clone(),
        out: Vec::new(),
    };
    let outcome = tokio::time::timeout_at(schedule.give_up.into(), load.run()).await;
    let unanswered = load.window.in_flight() as u64;
    let mut stats = load.stats.borrow_mut();
    stats.record_leftovers(unanswered, load.pace.missed(schedule.end));
    match outcome {
        Ok(Ok(())) | Err(_) => stats.record_open_at_end(),
        Ok(Err(error)) => stats.record_error(&error),
    }
}

/// A request with random, incompressible payloads.
pub(super) fn random_request(events: usize, event_bytes: usize, types: usize) -> proto::SendEventRequest {
    let event = |number: usize| {
        let mut payload = vec![0; event_bytes];
        rand::rng().fill_bytes(&mut payload);
        proto::Event { event_bytes: payload.into(), r#type: format!("bench-{}", number % types) }
    };
    proto::SendEventRequest {
        req_guid: String::new(),
        sent_time: Some(crate::client::sent_time_now()),
        events: (0..events).map(event).collect(),
    }
}

/// One connection that makes load.
struct Load {
    socket: Socket,
    frame: RequestFrame,
    pace: Pace,
    schedule: Schedule,
    window: Window,
    stats: SharedStats,
    out: Vec<u8>,
}

impl Load {
    /// Sends until the end, then waits for the last answers.
    async fn run(&mut self) -> Result<(), ClientError> {
        loop {
            let now = Instant::now();
            if now < self.schedule.end {
                self.queue_due(now);
            } else if self.window.in_flight() == 0 {
                return Ok(());
            }
            self.socket.write(&mut self.out).await?;
            self.read().await?;
            let now = Instant::now();
            while let Some(answer) = self.socket.next_answer(&mut self.out)? {
                self.window.complete(&answer, now, &self.stats);
            }
        }
    }

    fn queue_due(&mut self, now: Instant) {
        while let Some(&slot) = self.window.free.last() {
            let Some(since) = self.pace.take(now) else { return };
            self.window.occupy(slot, since);
            self.frame.write(slot, &mut self.out);
        }
    }

    /// Waits for answers, or until there is something to send.
    async fn read(&mut self) -> Result<(), ClientError> {
        let wake = match self.pace.next_due() {
            Some(due) if !self.window.free.is_empty() && Instant::now() < self.schedule.end => {
                due.min(self.schedule.end)
            }
            _ => return self.socket.read().await,
        };
        tokio::select! {
            read = self.socket.read() => read,
            () = tokio::time::sleep_until(wake.into()) => Ok(()),
        }
    }
}

/// The batches in flight on one connection, by slot.
struct Window {
    /// Since when the latency of the batch in the slot runs.
    since: Vec<Option<Instant>>,
    free: Vec<u16>,
}

impl Window {
    fn new(slots: usize) -> Self {
        Window { since: vec![None; slots], free: (0..=u16::MAX).take(slots).rev().collect() }
    }

    fn in_flight(&self) -> usize {
        self.since.len() - self.free.len()
    }

    /// Takes the last free slot.
    fn occupy(&mut self, slot: u16, since: Instant) {
        self.free.pop();
        self.since[usize::from(slot)] = Some(since);
    }

    /// Counts an answer and frees its slot. One that names no slot of ours is taken to be for the oldest batch.
    fn complete(&mut self, answer: &Answer<'_>, now: Instant, stats: &SharedStats) {
        let slot = answer.slot.map(usize::from).filter(|slot| self.since.get(*slot).is_some_and(Option::is_some));
        let slot = slot.or_else(|| {
            let taken = self.since.iter().enumerate().filter_map(|(slot, since)| Some((since.as_ref()?, slot)));
            taken.min().map(|(_, slot)| slot)
        });
        let Some((slot, since)) = slot.and_then(|slot| Some((slot, self.since[slot].take()?))) else { return };
        self.free.push(slot as u16);
        if answer.acked {
            stats.borrow_mut().record_ack(since, now);
        } else {
            stats.borrow_mut().record_rejection(answer.code, &String::from_utf8_lossy(answer.reason));
        }
    }
}

/// A WebSocket connection without the comforts.
#[derive(Debug)]
pub(super) struct Socket {
    stream: TcpStream,
    received: Vec<u8>,
    /// What of it is still to be parsed.
    unread: Range<usize>,
}

impl Socket {
    pub(super) async fn open(options: &ClientOptions) -> Result<Self, ClientError> {
        let failed = |error: std::io::Error| ClientError::connect(&options.endpoint, error);
        let stream = TcpStream::connect(&options.endpoint.authority).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let mut socket = Socket { stream, received: Vec::new(), unread: 0..0 };
        let mut handshake = handshake(options)?;
        socket.write(&mut handshake).await?;
        loop {
            socket.read().await?;
            let head = &socket.received[socket.unread.clone()];
            if let Some(end) = head.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                // "HTTP/1.1 101 Switching Protocols"
                let status = head.get(9..12).and_then(|status| std::str::from_utf8(status).ok()?.parse().ok());
                socket.unread.start += end + 4;
                return match status {
                    Some(101) => Ok(socket),
                    status => Err(ClientError::Refused(Refusal::from_http(status.unwrap_or(0), None))),
                };
            }
            if head.len() > HANDSHAKE_BYTES_MAX {
                return Err(ClientError::bad_answer("the handshake's answer has no end"));
            }
        }
    }

    /// Writes all of `out` and empties it.
    pub(super) async fn write(&mut self, out: &mut Vec<u8>) -> Result<(), ClientError> {
        if !out.is_empty() {
            self.stream.write_all(out).await.map_err(ClientError::disconnected)?;
            out.clear();
        }
        Ok(())
    }

    /// Waits for more bytes. Nothing is lost when the future is dropped.
    pub(super) async fn read(&mut self) -> Result<(), ClientError> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.unread.end == self.received.len() {
            self.received.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        if self.unread.end == self.received.len() {
            self.received.resize((2 * self.received.len()).max(READ_BYTES), 0);
        }
        match self.stream.read(&mut self.received[self.unread.end..]).await {
            Ok(0) => Err(ClientError::Disconnected { source: None }),
            Ok(bytes) => {
                self.unread.end += bytes;
                Ok(())
            }
            Err(error) => Err(ClientError::disconnected(error)),
        }
    }

    /// The next answer among what was read, if it is whole. Pongs that are due are appended to `out`.
    pub(super) fn next_answer(&mut self, out: &mut Vec<u8>) -> Result<Option<Answer<'_>>, ClientError> {
        loop {
            let received = &self.received[self.unread.clone()];
            let Some(ServerFrame { opcode, payload, bytes }) = next_frame(received) else {
                if received.len() > FRAME_BYTES_MAX {
                    return Err(ClientError::bad_answer("the server's frame is too large"));
                }
                return Ok(None);
            };
            let payload_end = self.unread.start + bytes;
            let payload_range = payload_end - payload.len()..payload_end;
            self.unread.start = payload_end;
            match opcode {
                frame::BINARY => {
                    let answer = scan_answer(&self.received[payload_range]).map_err(ClientError::bad_answer)?;
                    return Ok(Some(answer));
                }
                frame::PING => {
                    out.extend(frame_header(frame::PONG, payload_range.len()));
                    out.extend_from_slice(&self.received[payload_range]);
                }
                frame::CLOSE => return Err(closed(&self.received[payload_range])),
                frame::PONG => {}
                _ => return Err(ClientError::bad_answer("the server's frame is neither binary nor control")),
            }
        }
    }
}

fn closed(payload: &[u8]) -> ClientError {
    match payload.split_first_chunk() {
        Some((code, reason)) => ClientError::Closed {
            code: u16::from_be_bytes(*code),
            reason: String::from_utf8_lossy(reason).into_owned(),
        },
        None => ClientError::Closed { code: 1005, reason: String::new() },
    }
}

fn handshake(options: &ClientOptions) -> Result<Vec<u8>, ClientError> {
    let key = base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 16]>());
    let endpoint = &options.endpoint;
    let mut request = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n",
        endpoint.path, endpoint.authority
    )
    .into_bytes();
    for (name, value) in options.headers()? {
        request.extend_from_slice(name.as_str().as_bytes());
        request.extend_from_slice(b": ");
        request.extend_from_slice(value.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::bench::BenchOptions;

    fn answer(slot: Option<u16>, acked: bool) -> Answer<'static> {
        Answer { slot, acked, code: 3, reason: b"full" }
    }

    #[test]
    fn answers_free_their_slots_in_any_order() {
        let options = BenchOptions::new("ws://a".parse().unwrap());
        let now = Instant::now();
        let stats = SharedStats::default();
        let mut window = Window::new(3);
        for slot in 0..3 {
            assert_eq!(window.free.last(), Some(&slot));
            window.occupy(slot, now + std::time::Duration::from_millis(u64::from(slot)));
        }
        window.complete(&answer(Some(2), false), now, &stats);
        assert_eq!(window.free, [2]);
        // Twice the same, or one that is not ours: the oldest goes.
        window.complete(&answer(Some(2), false), now, &stats);
        assert_eq!(window.free, [2, 0]);
        window.complete(&answer(None, false), now, &stats);
        assert_eq!((window.free.as_slice(), window.in_flight()), ([2, 0, 1].as_slice(), 0));
        window.complete(&answer(None, false), now, &stats);
        let report = stats.take().report(&options, 1);
        assert_eq!(report.rejected_batches["CODE_INTERNAL_ERROR: full"], 3);
    }
}
