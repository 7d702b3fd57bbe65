//! WebSocket: every batch in flight shares one connection; answers come in any order and are matched by
//! `data["req_guid"]`.
//!
//! One task owns the socket and runs until it closes: it writes what is queued, several frames to a flush, and reads
//! answers meanwhile, so that neither side ever waits for the other to read. tungstenite answers pings. When the
//! connection ends, every batch in flight fails with the reason.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use prost::Message as _;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_util::sync::CancellationToken;

use super::{ANSWER_BYTES_MAX, ClientError, ClientOptions, Refusal};
use crate::proto;

/// Frames queued for the socket; a send waits for room.
const QUEUED_FRAMES_MAX: usize = 64;

/// How long the closing handshake may take, and how long a reason is awaited after a failed write.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

type Answer = Result<proto::SendEventResponse, ClientError>;

#[derive(Debug, Clone)]
pub(super) struct WebSocketClient {
    outgoing: mpsc::Sender<Bytes>,
    in_flight: Arc<InFlight>,
    /// Asks the task to close the connection.
    close: CancellationToken,
    /// The task has ended.
    ended: CancellationToken,
}

impl WebSocketClient {
    pub(super) async fn connect(options: &ClientOptions) -> Result<Self, ClientError> {
        let endpoint = &options.endpoint;
        let mut handshake =
            endpoint.to_string().into_client_request().map_err(|error| ClientError::connect(endpoint, error))?;
        handshake.headers_mut().extend(options.headers()?);
        let stream = TcpStream::connect(&endpoint.authority).await;
        let stream = stream.map_err(|error| ClientError::connect(endpoint, error))?;
        stream.set_nodelay(true).map_err(|error| ClientError::connect(endpoint, error))?;
        let config = WebSocketConfig::default().read_buffer_size(16 * 1024).max_message_size(Some(ANSWER_BYTES_MAX));
        let socket = match tokio_tungstenite::client_async_with_config(handshake, stream, Some(config)).await {
            Ok((socket, _)) => socket,
            Err(tungstenite::Error::Http(response)) => {
                return Err(ClientError::Refused(Refusal::from_http(response.status().as_u16(), None)));
            }
            Err(error) => return Err(ClientError::connect(endpoint, error)),
        };
        Ok(Self::start(socket))
    }

    fn start(socket: WebSocketStream<TcpStream>) -> Self {
        let (outgoing, queued) = mpsc::channel(QUEUED_FRAMES_MAX);
        let client = WebSocketClient {
            outgoing,
            in_flight: Arc::default(),
            close: CancellationToken::new(),
            ended: CancellationToken::new(),
        };
        let (in_flight, close) = (client.in_flight.clone(), client.close.clone());
        let ended = client.ended.clone().drop_guard();
        tokio::spawn(async move {
            run(socket, queued, &in_flight, close).await;
            drop(ended);
        });
        client
    }

    pub(super) async fn send(&self, request: proto::SendEventRequest) -> Answer {
        let Ok(room) = self.outgoing.reserve().await else {
            return Err(self.in_flight.ended().unwrap_or(ClientError::Disconnected { source: None }));
        };
        let waiting = self.in_flight.register(&request.req_guid)?;
        room.send(Bytes::from(request.encode_to_vec()));
        waiting.answer().await
    }

    pub(super) fn is_closed(&self) -> bool {
        self.in_flight.ended().is_some()
    }

    pub(super) async fn close(&self) {
        self.close.cancel();
        self.ended.cancelled().await;
    }
}

/// Serves the socket until it ends, then closes it.
async fn run(
    socket: WebSocketStream<TcpStream>,
    queued: mpsc::Receiver<Bytes>,
    in_flight: &InFlight,
    close: CancellationToken,
) {
    let (mut sink, mut stream) = socket.split();
    let reason = {
        let mut read = std::pin::pin!(read(&mut stream, in_flight));
        tokio::select! {
            reason = &mut read => reason,
            written = write(&mut sink, queued) => match written {
                Ok(()) => ClientError::Disconnected { source: None },
                // The server may have said why it stopped reading: prefer that.
                Err(error) => match tokio::time::timeout(CLOSE_TIMEOUT, read).await {
                    Ok(reason @ (ClientError::Closed { .. } | ClientError::Refused(_))) => reason,
                    _ => ClientError::disconnected(error),
                },
            },
            () = close.cancelled() => ClientError::Disconnected { source: None },
        }
    };
    // Whoever waits must not wait for the closing handshake too. That it fails on a broken connection is expected.
    in_flight.end(reason);
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, sink.close()).await;
}

/// Writes what is queued until every client is dropped.
async fn write(
    sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
    mut queued: mpsc::Receiver<Bytes>,
) -> Result<(), tungstenite::Error> {
    while let Some(frame) = queued.recv().await {
        sink.feed(Message::Binary(frame)).await?;
        while let Ok(frame) = queued.try_recv() {
            sink.feed(Message::Binary(frame)).await?;
        }
        sink.flush().await?;
    }
    Ok(())
}

/// Hands out answers until the connection ends, and says why it ended.
async fn read(
    stream: &mut (impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
    in_flight: &InFlight,
) -> ClientError {
    loop {
        match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => {
                let answer = proto::SendEventResponse::decode(bytes).map_err(ClientError::bad_answer);
                if let Err(error) = answer.and_then(|answer| in_flight.answer(answer)) {
                    return error;
                }
            }
            Some(Ok(Message::Close(frame))) => {
                let (code, reason) = match frame {
                    Some(frame) => (frame.code.into(), frame.reason.to_string()),
                    None => (CloseCode::Status.into(), String::new()),
                };
                return ClientError::Closed { code, reason };
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return ClientError::disconnected(error),
            None => return ClientError::Disconnected { source: None },
        }
    }
}

/// The batches that wait for their answer, and why there will be no more.
#[derive(Debug, Default)]
struct InFlight(Mutex<InFlightState>);

#[derive(Debug, Default)]
struct InFlightState {
    waiting: HashMap<String, oneshot::Sender<Answer>>,
    ended: Option<ClientError>,
}

impl InFlight {
    fn state(&self) -> std::sync::MutexGuard<'_, InFlightState> {
        // Every change is one map operation, so a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> Option<ClientError> {
        self.state().ended.clone()
    }

    fn register<'a>(&'a self, req_guid: &str) -> Result<Waiting<'a>, ClientError> {
        let mut state = self.state();
        if let Some(reason) = &state.ended {
            return Err(reason.clone());
        }
        if req_guid.is_empty() || state.waiting.contains_key(req_guid) {
            return Err(ClientError::ReqGuidNotUnique { req_guid: req_guid.into() });
        }
        let (sender, answer) = oneshot::channel();
        state.waiting.insert(req_guid.into(), sender);
        Ok(Waiting { in_flight: self, req_guid: req_guid.into(), answer })
    }

    /// Gives an answer to the batch that it names. One that names none goes to the only batch in flight; one for a batch
    /// that nobody waits for any more is dropped.
    ///
    /// # Errors
    /// The connection's end: the answer refuses the connection, or nobody can tell which batch it refuses.
    fn answer(&self, answer: proto::SendEventResponse) -> Result<(), ClientError> {
        let mut state = self.state();
        let named = answer.data.get("req_guid").filter(|req_guid| !req_guid.is_empty());
        let sender = match named {
            Some(req_guid) => state.waiting.remove(req_guid),
            None if refuses_connection(&answer) => {
                return Err(ClientError::Refused(Refusal::from_answer(&answer)));
            }
            None if state.waiting.len() > 1 => {
                return Err(ClientError::Unattributed { outstanding: state.waiting.len() });
            }
            None => state.waiting.drain().next().map(|(_, sender)| sender),
        };
        if let Some(sender) = sender {
            // Fails only if the waiter has just given up.
            let _ = sender.send(Ok(answer));
        }
        Ok(())
    }

    /// Fails every batch in flight and every later one.
    fn end(&self, reason: ClientError) {
        let mut state = self.state();
        if state.ended.is_some() {
            return;
        }
        // With a single batch in flight it is certain which one was too large.
        let reason_for_waiting = match &reason {
            ClientError::Closed { code, reason }
                if CloseCode::from(*code) == CloseCode::Size && state.waiting.len() == 1 =>
            {
                ClientError::Refused(Refusal::too_large(reason.clone()))
            }
            other => other.clone(),
        };
        state.ended = Some(reason);
        for (_, sender) in state.waiting.drain() {
            let _ = sender.send(Err(reason_for_waiting.clone()));
        }
    }
}

fn refuses_connection(answer: &proto::SendEventResponse) -> bool {
    matches!(answer.code(), proto::Code::MaxConnectionLimitReached | proto::Code::MaxUserLimitReached)
}

/// One batch's place among those in flight; given up on drop.
struct Waiting<'a> {
    in_flight: &'a InFlight,
    req_guid: String,
    answer: oneshot::Receiver<Answer>,
}

impl Waiting<'_> {
    async fn answer(mut self) -> Answer {
        let answer = (&mut self.answer).await;
        answer.unwrap_or(Err(ClientError::Disconnected { source: None }))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.in_flight.state().waiting.remove(&self.req_guid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(req_guid: &str, code: proto::Code) -> proto::SendEventResponse {
        let data = HashMap::from([("req_guid".into(), req_guid.into())]);
        proto::SendEventResponse { code: code as i32, data, ..Default::default() }
    }

    #[tokio::test]
    async fn an_answer_finds_its_batch() {
        let in_flight = InFlight::default();
        let first = in_flight.register("a").unwrap();
        let second = in_flight.register("b").unwrap();
        in_flight.answer(answer("b", proto::Code::Ok)).unwrap();
        in_flight.answer(answer("nobody", proto::Code::Ok)).unwrap();
        in_flight.answer(answer("a", proto::Code::BadRequest)).unwrap();
        assert_eq!(second.answer().await.unwrap().code(), proto::Code::Ok);
        assert_eq!(first.answer().await.unwrap().code(), proto::Code::BadRequest);
    }

    #[tokio::test]
    async fn a_nameless_answer_goes_to_the_only_batch_or_ends_the_connection() {
        let in_flight = InFlight::default();
        let only = in_flight.register("a").unwrap();
        in_flight.answer(answer("", proto::Code::BadRequest)).unwrap();
        assert_eq!(only.answer().await.unwrap().code(), proto::Code::BadRequest);

        let _two = (in_flight.register("a").unwrap(), in_flight.register("b").unwrap());
        let error = in_flight.answer(answer("", proto::Code::BadRequest)).unwrap_err();
        assert!(matches!(error, ClientError::Unattributed { outstanding: 2 }), "{error}");
    }

    #[tokio::test]
    async fn a_batch_that_was_too_large_is_not_retried() {
        let in_flight = InFlight::default();
        let only = in_flight.register("a").unwrap();
        in_flight.end(ClientError::Closed { code: 1009, reason: "too big".into() });
        assert!(!only.answer().await.unwrap_err().is_retryable());
        assert!(in_flight.register("b").is_err_and(|error| error.is_retryable()));
    }

    #[test]
    fn names_in_flight_are_unique_and_given_back() {
        let in_flight = InFlight::default();
        let first = in_flight.register("a").unwrap();
        assert!(matches!(in_flight.register("a"), Err(ClientError::ReqGuidNotUnique { .. })));
        assert!(matches!(in_flight.register(""), Err(ClientError::ReqGuidNotUnique { .. })));
        drop(first);
        assert!(in_flight.register("a").is_ok());
    }
}
