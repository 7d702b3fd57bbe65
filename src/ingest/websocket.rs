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
use crate::proto::{Code, SendEventResponse};

/// An empty ping: the server's frames carry no mask.
const PING: [u8; 2] = [0x89, 0x00];
/// How long, and how many bytes, a closed connection is still read so that the client gets the last answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 8 << 20;

/// When the client is pinged, and when it was last heard.
pub(super) struct Liveness {
    pub heard: Instant,
    pub ping_at: Instant,
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
    let liveness = Liveness { heard: now, ping_at: now + ingest.config.ping_interval };
    let mut socket = WebSocket { ingest, connection, liveness };
    loop {
        if first.is_empty() {
            match socket.idle(&mut stream).await {
                Ok(()) => {}
                Err(CloseReason::Stopping) => {
                    let close = close_frame(CloseCode::Away, "the server is stopping");
                    // Boxed, like everything rare here: an idle connection pays for the largest state it may be in.
                    Box::pin(socket.close(stream, None, close)).await;
                    return CloseReason::Stopping;
                }
                Err(reason) => return reason,
            }
        }
        let bytes = std::mem::take(&mut first);
        match Box::pin(socket.session(stream, bytes)).await {
            Ok(idle) => stream = idle,
            Err(reason) => return reason,
        }
    }
}

impl WebSocket<'_> {
    /// Waits for bytes, pinging meanwhile.
    async fn idle(&mut self, stream: &mut TcpStream) -> Result<(), CloseReason> {
        loop {
            let wake = tokio::select! {
                ready = stream.ready(Interest::READABLE) => ready.map(|_| Wake::Readable),
                () = sleep_until(self.liveness.ping_at.into()) => Ok(Wake::PingDue),
                () = self.ingest.stopping.cancelled() => Ok(Wake::Stopping),
            };
            match wake.map_err(|_| CloseReason::Error)? {
                Wake::Readable => return Ok(()),
                Wake::Stopping => return Err(CloseReason::Stopping),
                Wake::PingDue => {
                    self.liveness.ping_due(self.ingest)?;
                    let written = timeout(self.ingest.config.write_timeout, stream.write_all(&PING)).await;
                    written.map_err(|_| CloseReason::WriteTimeout)?.map_err(|_| CloseReason::Error)?;
                }
            }
        }
    }

    /// Reads messages and answers them until there is nothing more to do.
    async fn session(&mut self, stream: TcpStream, first: bytes::Bytes) -> Result<TcpStream, CloseReason> {
        let watched = WatchedStream::new(stream, first, self.ingest.read_budget.reservation());
        let websocket = WebSocketStream::from_raw_socket(watched, Role::Server, Some(self.config())).await;
        let mut session = Session::new(self, websocket);
        let end = session.run().await;
        let stream = session.into_stream();
        match end {
            SessionEnd::Idle => Ok(stream),
            SessionEnd::Closed(reason) => Err(reason),
            SessionEnd::Close { reason, answer, frame } => {
                self.close(stream, answer, frame).await;
                Err(reason)
            }
        }
    }

    fn config(&self) -> WebSocketConfig {
        // A text frame holds JSON, where base64 takes a third more.
        let message_bytes_max = self.ingest.admission.batch_bytes_max.saturating_mul(2);
        WebSocketConfig::default()
            .read_buffer_size(16 * 1024)
            .write_buffer_size(16 * 1024)
            .max_message_size(Some(message_bytes_max))
            .max_frame_size(Some(message_bytes_max))
    }

    /// Sends a last answer and a close frame, and gives the client time to read them.
    async fn close(&self, stream: TcpStream, answer: Option<Message>, frame: CloseFrame) {
        close(stream, answer, frame, self.ingest.config.write_timeout).await;
    }
}

impl Liveness {
    /// A ping is due: so the client must have been heard since.
    pub fn ping_due(&mut self, ingest: &Ingest) -> Result<(), CloseReason> {
        if self.heard.elapsed() >= ingest.config.pong_timeout {
            return Err(CloseReason::PongTimeout);
        }
        // No later than the moment at which its silence is too long.
        let expires = self.heard + ingest.config.pong_timeout;
        let next = Instant::now() + ingest.config.ping_interval;
        self.ping_at = if expires > Instant::now() { next.min(expires) } else { next };
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
