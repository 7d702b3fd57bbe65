//! A WebSocket connection while it has something to do: decodes messages, submits batches, writes answers.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_util::stream::FuturesUnordered;
use futures_util::{SinkExt, Stream};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::WaitForCancellationFuture;

use super::admission::Ticket;
use super::frames::WatchedStream;
use super::rejection::{RejectReason, Rejection, refusal, success};
use super::websocket::{WebSocket, binary, close_frame};
use super::{CloseReason, Protocol, json};
use crate::batch::{DecodeError, Request};

/// Messages handled before answers that became ready meanwhile are written.
const MESSAGES_PER_TURN: usize = 64;

/// How a session ended.
pub(super) enum SessionEnd {
    /// Nothing waits, nothing is buffered: back to the bare socket.
    Idle,
    /// The connection is gone, or of no more use.
    Closed(CloseReason),
    /// The connection must be closed in good order.
    Close { reason: CloseReason, answer: Option<Message>, frame: CloseFrame },
}

/// See the module.
pub(super) struct Session<'a, 'b> {
    socket: &'a mut WebSocket<'b>,
    websocket: WebSocketStream<WatchedStream>,
    waiting: FuturesUnordered<Waiting>,
    waiting_bytes: u64,
    answers: Vec<Message>,
    acks: Vec<Instant>,
    /// A pong is to be written: tungstenite has made it, but may not have got rid of it.
    pong_due: bool,
    /// The socket is not read, because too much waits.
    paused: bool,
    /// Set once: what is still waiting is answered, then the session ends so.
    ending: Option<SessionEnd>,
}

enum Wake {
    /// There is something to write, or nothing to do any more.
    Turn {
        idle: bool,
    },
    Stopping,
    Time,
}

/// A batch on its way to the disk.
struct Waiting {
    ticket: Ticket,
    req_guid: String,
    text: bool,
    bytes: u64,
    began: Instant,
}

struct Settled {
    result: Result<(), Rejection>,
    req_guid: String,
    text: bool,
    bytes: u64,
    began: Instant,
}

impl Future for Waiting {
    type Output = Settled;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Settled> {
        let result = ready!(Pin::new(&mut self.ticket).poll(context));
        let req_guid = std::mem::take(&mut self.req_guid);
        Poll::Ready(Settled { result, req_guid, text: self.text, bytes: self.bytes, began: self.began })
    }
}

impl<'a, 'b> Session<'a, 'b> {
    pub fn new(socket: &'a mut WebSocket<'b>, websocket: WebSocketStream<WatchedStream>) -> Session<'a, 'b> {
        Session {
            socket,
            websocket,
            waiting: FuturesUnordered::new(),
            waiting_bytes: 0,
            answers: Vec::new(),
            acks: Vec::new(),
            pong_due: false,
            paused: false,
            ending: None,
        }
    }

    pub fn into_stream(self) -> TcpStream {
        self.websocket.into_inner().into_inner()
    }

    pub async fn run(&mut self) -> SessionEnd {
        let stopping = self.socket.ingest.stopping.clone();
        let mut stopping = pin!(stopping.cancelled());
        let mut timer = pin!(sleep_until(self.deadline().into()));
        loop {
            match poll_fn(|context| self.next(context, stopping.as_mut(), timer.as_mut())).await {
                Wake::Turn { idle } => {
                    if let Err(reason) = self.write_answers().await {
                        return SessionEnd::Closed(reason);
                    }
                    if self.waiting.is_empty()
                        && let Some(end) = self.ending.take()
                    {
                        return end;
                    }
                    if idle {
                        return SessionEnd::Idle;
                    }
                }
                Wake::Stopping => self.end_when_settled(SessionEnd::Close {
                    reason: CloseReason::Stopping,
                    answer: None,
                    frame: close_frame(CloseCode::Away, "the server is stopping"),
                }),
                Wake::Time => {
                    if let Err(end) = self.time_is_up().await {
                        return end;
                    }
                }
            }
        }
    }

    /// What to do next. In this order: what is ready is handled before time is looked at, and a turn may set a deadline.
    fn next(
        &mut self,
        context: &mut Context<'_>,
        stopping: Pin<&mut WaitForCancellationFuture<'_>>,
        mut timer: Pin<&mut Sleep>,
    ) -> Poll<Wake> {
        if let Poll::Ready(idle) = self.turn(context) {
            return Poll::Ready(Wake::Turn { idle });
        }
        if self.ending.is_none() && stopping.poll(context).is_ready() {
            return Poll::Ready(Wake::Stopping);
        }
        // A deadline that moved back is looked at when the timer fires: most do, once a message.
        let deadline = self.deadline().into();
        if deadline < timer.deadline() || timer.is_elapsed() {
            timer.as_mut().reset(deadline);
        }
        timer.poll(context).map(|()| Wake::Time)
    }

    /// Does all that can be done now. Ready when there is something to write, or nothing to do any more (true).
    fn turn(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        while let Poll::Ready(Some(settled)) = Pin::new(&mut self.waiting).poll_next(context) {
            self.settle(settled);
        }
        let mut blocked = false;
        for _ in 0..MESSAGES_PER_TURN {
            if self.ending.is_some() || !self.may_read() {
                self.paused = true;
                break;
            }
            if std::mem::take(&mut self.paused) {
                // Neither a pong nor the rest of a message could be seen meanwhile.
                self.socket.liveness.hear(Instant::now());
                self.websocket.get_mut().restart_clock();
            }
            match Pin::new(&mut self.websocket).poll_next(context) {
                Poll::Ready(message) => self.handle(message),
                Poll::Pending => {
                    blocked = true;
                    break;
                }
            }
        }
        // What was submitted in this turn must be polled once, to be told of its commit.
        while let Poll::Ready(Some(settled)) = Pin::new(&mut self.waiting).poll_next(context) {
            self.settle(settled);
        }
        let ended = self.ending.is_some() && self.waiting.is_empty();
        if !self.answers.is_empty() || self.pong_due || ended {
            return Poll::Ready(false);
        }
        if blocked && self.waiting.is_empty() && self.websocket.get_ref().is_between_messages() {
            return Poll::Ready(true);
        }
        if !blocked && self.ending.is_none() && self.may_read() {
            // More messages than one turn takes: go on after the others had theirs.
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn may_read(&self) -> bool {
        let limits = &self.socket.ingest.admission.limits;
        self.waiting.is_empty()
            || (self.waiting.len() < limits.connection_batches_max()
                && self.waiting_bytes < limits.connection_bytes_max())
    }

    fn handle(&mut self, message: Option<Result<Message, Error>>) {
        self.socket.liveness.hear(Instant::now());
        match message {
            Some(Ok(Message::Binary(bytes))) => self.submit(Request::parse(bytes), false),
            Some(Ok(Message::Text(text))) => self.submit(json::decode(text.as_bytes()), true),
            Some(Ok(Message::Ping(_))) => self.pong_due = true,
            // tungstenite answers a close by itself when it is polled next.
            Some(Ok(_)) => {}
            None | Some(Err(Error::ConnectionClosed)) => self.ending = Some(SessionEnd::Closed(CloseReason::Client)),
            Some(Err(Error::Capacity(_))) => {
                let rejection = Rejection::too_large(self.socket.ingest.admission.limits.batch_bytes_max());
                let text = self.websocket.get_ref().is_text();
                self.reject_and_close(&rejection, "", text, CloseCode::Size, CloseReason::Protocol);
            }
            Some(Err(Error::Protocol(error))) => {
                let reset =
                    matches!(error, tokio_tungstenite::tungstenite::error::ProtocolError::ResetWithoutClosingHandshake);
                self.end_when_settled(if reset {
                    SessionEnd::Closed(CloseReason::Client)
                } else {
                    let frame = close_frame(CloseCode::Protocol, &error.to_string());
                    SessionEnd::Close { reason: CloseReason::Protocol, answer: None, frame }
                });
            }
            Some(Err(Error::Utf8(_))) => {
                let frame = close_frame(CloseCode::Invalid, "text is not UTF-8");
                self.end_when_settled(SessionEnd::Close { reason: CloseReason::Protocol, answer: None, frame });
            }
            Some(Err(_)) if self.websocket.get_ref().is_over_budget() => {
                let text = self.websocket.get_ref().is_text();
                self.reject_and_close(&Rejection::overloaded(), "", text, CloseCode::Again, CloseReason::Overloaded);
            }
            Some(Err(_)) => self.ending = Some(SessionEnd::Closed(CloseReason::Error)),
        }
    }

    fn submit(&mut self, request: Result<Request, DecodeError>, text: bool) {
        let began = Instant::now();
        let admission = &self.socket.ingest.admission;
        let request = match request {
            Ok(request) => request,
            Err(error) => return self.reject(&error.into(), "", text),
        };
        let (req_guid, bytes) = (request.req_guid().to_string(), request.as_bytes().len() as u64);
        match admission.submit(Protocol::WebSocket, self.socket.connection.client(), request) {
            Ok(ticket) => {
                self.waiting_bytes += bytes;
                self.waiting.push(Waiting { ticket, req_guid, text, bytes, began });
            }
            Err(rejection) if rejection.reason == RejectReason::TooLarge => {
                self.reject_and_close(&rejection, &req_guid, text, CloseCode::Size, CloseReason::Protocol);
            }
            Err(rejection) => self.reject(&rejection, &req_guid, text),
        }
    }

    fn settle(&mut self, settled: Settled) {
        self.waiting_bytes -= settled.bytes;
        match settled.result {
            Ok(()) => {
                self.answer(&success(&settled.req_guid), settled.text);
                self.acks.push(settled.began);
            }
            Err(rejection) => self.reject(&rejection, &settled.req_guid, settled.text),
        }
    }

    fn reject(&mut self, rejection: &Rejection, req_guid: &str, text: bool) {
        self.socket.ingest.admission.count_rejection(Protocol::WebSocket, rejection);
        self.answer(&refusal(rejection, Some(req_guid)), text);
    }

    fn answer(&mut self, answer: &crate::proto::SendEventResponse, text: bool) {
        self.answers.push(message(answer, text));
    }

    fn reject_and_close(
        &mut self,
        rejection: &Rejection,
        req_guid: &str,
        text: bool,
        code: CloseCode,
        reason: CloseReason,
    ) {
        self.socket.ingest.admission.count_rejection(Protocol::WebSocket, rejection);
        let answer = Some(message(&refusal(rejection, Some(req_guid)), text));
        let frame = close_frame(code, &rejection.message);
        self.end_when_settled(SessionEnd::Close { reason, answer, frame });
    }

    /// Nothing more is read; what waits is answered first.
    fn end_when_settled(&mut self, end: SessionEnd) {
        self.ending.get_or_insert(end);
    }

    /// Writes every answer that is ready, at once.
    async fn write_answers(&mut self) -> Result<(), CloseReason> {
        if self.answers.is_empty() && !std::mem::take(&mut self.pong_due) {
            return Ok(());
        }
        self.pong_due = false;
        let write = async {
            for answer in self.answers.drain(..) {
                self.websocket.feed(answer).await?;
            }
            self.websocket.flush().await
        };
        match timeout(self.socket.ingest.config.write_timeout, write).await {
            Err(_) => return Err(CloseReason::WriteTimeout),
            Ok(Err(_)) => return Err(CloseReason::Client),
            Ok(Ok(())) => {}
        }
        for began in self.acks.drain(..) {
            self.socket.ingest.admission.record_ack(Protocol::WebSocket, began);
        }
        Ok(())
    }

    /// When to look at the time next: for a ping, or for a message that takes too long.
    fn deadline(&self) -> Instant {
        let message_due = self.websocket.get_ref().message_began().filter(|_| self.ending.is_none() && self.may_read());
        let message_due = message_due.map(|began| began + self.socket.ingest.config.read_timeout);
        message_due.map_or(self.socket.liveness.ping_at, |due| due.min(self.socket.liveness.ping_at))
    }

    async fn time_is_up(&mut self) -> Result<(), SessionEnd> {
        let now = Instant::now();
        let config = &self.socket.ingest.config;
        if self.ending.is_none()
            && self.may_read()
            && self.websocket.get_ref().message_began().is_some_and(|began| now >= began + config.read_timeout)
        {
            self.end_when_settled(SessionEnd::Closed(CloseReason::ReadTimeout));
        }
        if now < self.socket.liveness.ping_at {
            return Ok(());
        }
        if self.paused || self.websocket.get_ref().message_began().is_some() {
            // Its pong may wait in a socket that is not read, or behind the rest of a message, which has its own limit.
            self.socket.liveness.hear(now);
        }
        self.socket.liveness.ping_due(config).map_err(SessionEnd::Closed)?;
        let ping = self.websocket.send(Message::Ping(bytes::Bytes::new()));
        match timeout(config.write_timeout, ping).await {
            Err(_) => Err(SessionEnd::Closed(CloseReason::WriteTimeout)),
            Ok(Err(_)) => Err(SessionEnd::Closed(CloseReason::Client)),
            Ok(Ok(())) => Ok(()),
        }
    }
}

/// An answer in the form of its request.
fn message(answer: &crate::proto::SendEventResponse, text: bool) -> Message {
    if text { Message::Text(json::encode(answer).into()) } else { binary(answer) }
}
