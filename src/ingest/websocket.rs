//! One WebSocket client.
//!
//! Between messages a connection holds a bare socket and a timer, and nothing else ([`WebSocket::idle`]): a few hundred
//! bytes. When bytes arrive, a [`Session`] decodes them; it is dropped again once no batch waits for its commit and the
//! decoder holds no bytes.
//!
//! Frames are read while earlier batches wait for their commit, up to `connection_in_flight_batches_max` and
//! `connection_in_flight_bytes_max`; past that the socket is not read, which slows the client down. Answers go out as
//! commits finish, all that are ready in one write.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::time::{sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use futures_util::SinkExt;
use prost::Message as _;

use super::connections::{ConnectionRefusal, LiveConnection};
use super::frames::WatchedStream;
use super::rejection::connection_refusal;
use super::session::{Session, SessionEnd};
use super::{CloseReason, Ingest};
use crate::config::IngestConfig;
use crate::proto::{Code, SendEventResponse};

/// An empty ping: the server's frames carry no mask.
const PING: [u8; 2] = [0x89, 0x00];
/// How long, and how many bytes, a closed connection is still read so that the client gets the last answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 64 << 20;

/// When the client is pinged, and when it was last heard.
pub(super) struct Liveness {
    heard: Instant,
    pub ping_at: Instant,
    /// When the first ping was sent since.
    pinged: Option<Instant>,
}

/// A connection between messages.
pub(super) struct WebSocket<'a> {
    pub ingest: &'a Ingest,
    pub connection: LiveConnection,
    pub liveness: Liveness,
}

enum Wake {
    Readable,
    PingDue,
    Stopping,
}

/// Serves a client until it goes, or must. `first`: bytes that came right behind the upgrade request.
pub(super) async fn serve(
    ingest: &Ingest,
    connection: LiveConnection,
    mut stream: TcpStream,
    mut first: bytes::Bytes,
) -> CloseReason {
    let now = Instant::now();
    let liveness = Liveness { heard: now, ping_at: now + ingest.config.ping_interval, pinged: None };
    let mut socket = WebSocket { ingest, connection, liveness };
    loop {
        if first.is_empty() {
            match socket.idle(&mut stream).await {
                Ok(()) => {}
                Err(CloseReason::Stopping) => {
                    let frame = close_frame(CloseCode::Away, "the server is stopping");
                    let end = SessionEnd::Close { reason: CloseReason::Stopping, answer: None, frame };
                    // Boxed, like everything rare here: an idle connection pays for the largest state it may be in.
                    return Box::pin(socket.end(stream, end)).await;
                }
                Err(reason) => return Box::pin(socket.end(stream, SessionEnd::Closed(reason))).await,
            }
        }
        let bytes = std::mem::take(&mut first);
        match Box::pin(socket.session(stream, bytes)).await {
            (SessionEnd::Idle, idle) => stream = idle,
            (end, stream) => return Box::pin(socket.end(stream, end)).await,
        }
    }
}

impl WebSocket<'_> {
    /// Waits for bytes, pinging meanwhile.
    async fn idle(&mut self, stream: &mut TcpStream) -> Result<(), CloseReason> {
        loop {
            let wake = tokio::select! {
                // In this order: what has come in is read before its sender is given up.
                biased;
                ready = stream.ready(Interest::READABLE) => ready.map(|_| Wake::Readable),
                () = sleep_until(self.liveness.ping_at.into()) => Ok(Wake::PingDue),
                () = self.ingest.stopping.cancelled() => Ok(Wake::Stopping),
            };
            match wake.map_err(|_| CloseReason::Error)? {
                Wake::Readable => return Ok(()),
                Wake::Stopping => return Err(CloseReason::Stopping),
                Wake::PingDue => {
                    self.liveness.ping_due(&self.ingest.config)?;
                    // All of it or nothing: a decoder would not know of the half that was written.
                    let written = timeout(self.ingest.config.write_timeout, stream.write_all(&PING)).await;
                    written.map_err(|_| CloseReason::WriteTimeout)?.map_err(|_| CloseReason::Error)?;
                }
            }
        }
    }

    /// Reads messages and answers them until there is nothing more to do.
    async fn session(&mut self, stream: TcpStream, first: bytes::Bytes) -> (SessionEnd, TcpStream) {
        let watched = WatchedStream::new(stream, first, self.ingest.read_budget.reservation());
        let websocket = WebSocketStream::from_raw_socket(watched, Role::Server, Some(self.config())).await;
        let mut session = Session::new(self, websocket);
        let end = session.run().await;
        (end, session.into_stream())
    }

    /// Closes the connection. Its id is free before the client can know: it may come back at once.
    async fn end(self, stream: TcpStream, end: SessionEnd) -> CloseReason {
        let WebSocket { ingest, connection, .. } = self;
        drop(connection);
        match end {
            SessionEnd::Idle => CloseReason::Client,
            SessionEnd::Closed(reason) => reason,
            SessionEnd::Close { reason, answer, frame } => {
                close(stream, answer, frame, ingest.config.write_timeout).await;
                reason
            }
        }
    }

    fn config(&self) -> WebSocketConfig {
        // A text frame holds JSON, where base64 takes a third more.
        let message_bytes_max = self.ingest.admission.limits.batch_bytes_max().saturating_mul(2);
        WebSocketConfig::default()
            .read_buffer_size(16 * 1024)
            .write_buffer_size(16 * 1024)
            .max_message_size(Some(message_bytes_max))
            .max_frame_size(Some(message_bytes_max))
    }
}

impl Liveness {
    /// The client sent something.
    pub fn hear(&mut self, now: Instant) {
        self.heard = now;
        self.pinged = None;
    }

    /// A ping is due: so the client must not have been silent for too long. It had the chance to answer a ping meanwhile;
    /// a process that was stopped, or a machine that slept, gives it one before it gives it up.
    pub fn ping_due(&mut self, config: &IngestConfig) -> Result<(), CloseReason> {
        let now = Instant::now();
        let chance = config.pong_timeout.saturating_sub(config.ping_interval);
        let had_chance = self.pinged.is_some_and(|pinged| now >= pinged + chance);
        let expires = self.heard + config.pong_timeout;
        if now >= expires && had_chance {
            return Err(CloseReason::PongTimeout);
        }
        let pinged = *self.pinged.get_or_insert(now);
        // No later than the moment at which its silence is too long.
        let expires = expires.max(pinged + chance);
        let next = now + config.ping_interval;
        self.ping_at = if expires > now { next.min(expires) } else { next };
        Ok(())
    }
}

/// Refuses a connection that was upgraded, as the protocol has it: one binary answer, then a close.
pub(super) async fn refuse(stream: TcpStream, refusal: ConnectionRefusal, id: &str, write_timeout: Duration) {
    let (code, reason) = match refusal {
        ConnectionRefusal::Limit => (Code::MaxConnectionLimitReached, "Max connection reached".to_string()),
        ConnectionRefusal::Duplicate => (Code::MaxUserLimitReached, format!("duplicate connection: {id}")),
    };
    let answer = binary(&connection_refusal(code, &reason));
    close(stream, Some(answer), close_frame(CloseCode::Policy, &reason), write_timeout).await;
}

/// An answer as a binary message.
pub(super) fn binary(answer: &SendEventResponse) -> Message {
    Message::Binary(answer.encode_to_vec().into())
}

/// A close frame; its reason is cut to what a control frame holds.
pub(super) fn close_frame(code: CloseCode, reason: &str) -> CloseFrame {
    let end = reason.char_indices().map(|(at, _)| at).chain([reason.len()]).take_while(|at| *at <= 123).last();
    CloseFrame { code, reason: reason[..end.unwrap_or(0)].into() }
}

async fn close(stream: TcpStream, answer: Option<Message>, frame: CloseFrame, write_timeout: Duration) {
    let mut websocket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
    let send = async {
        if let Some(answer) = answer {
            websocket.feed(answer).await?;
        }
        websocket.send(Message::Close(Some(frame))).await
    };
    if !matches!(timeout(write_timeout, send).await, Ok(Ok(()))) {
        return;
    }
    // Closing with bytes unread would reset the connection, and the client would lose the answer.
    let mut stream = websocket.into_inner();
    let _ = stream.shutdown().await;
    let linger = async {
        let (mut buffer, mut left) = ([0; 4096], LINGER_BYTES_MAX);
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            left = left.saturating_sub(read);
            if left == 0 {
                return;
            }
        }
    };
    let _ = timeout(LINGER, linger).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that was stopped for long finds every client silent for long, though it asked none of them.
    #[test]
    fn nobody_is_given_up_without_the_chance_to_answer_a_ping() {
        let config = IngestConfig::default();
        let ago = |duration| Instant::now().checked_sub(duration).expect("the machine is up for a minute");
        let long_ago = ago(config.pong_timeout);
        let mut liveness = Liveness { heard: long_ago, ping_at: long_ago, pinged: None };
        assert_eq!(liveness.ping_due(&config), Ok(()));
        assert_eq!(liveness.ping_due(&config), Ok(()));
        assert!(liveness.ping_at > Instant::now());
        liveness.pinged = Some(ago(config.pong_timeout - config.ping_interval));
        assert_eq!(liveness.ping_due(&config), Err(CloseReason::PongTimeout));
        liveness.hear(Instant::now());
        assert_eq!(liveness.ping_due(&config), Ok(()));
    }

    #[test]
    fn a_close_frame_is_cut_between_characters() {
        let frame = close_frame(CloseCode::Policy, &"é".repeat(100));
        assert_eq!(frame.reason.len(), 122);
    }
}
