//! How a client should behave: a complete, small program that collects events and delivers them over WebSocket.
//!
//! ```text
//! cargo run -- dev                                             # or any server
//! seq 1000 | cargo run --example client                        # one event per line of stdin
//! seq 1000 | cargo run --example client -- ws://127.0.0.1:8080/api/v1/events device-7
//! ```
//!
//! The rules, each marked below:
//!
//! 1. Say who you are: the id header. One live connection per id.
//! 2. Batch: one request with many events costs the server little more than one with a single event.
//! 3. Name every batch (`req_guid`), and retry it under the same name, so that its answer is known. The server does not
//!    deduplicate: a batch whose ack was lost may be stored and delivered twice. Who must not count twice puts an id
//!    into the event.
//! 4. An event is delivered when its batch is *acked*, not when it is written. Until then keep it.
//! 5. Match answers by `data["req_guid"]`, keep reading while waiting (pings are answered by reading), and bound the wait.
//! 6. After any failure retry with growing, random delays, except when the server says that the batch itself is bad.

use std::io::BufRead;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use rand::Rng;
use ringtail::proto::{Code, Event, SendEventRequest, SendEventResponse, Status};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

const BATCH_EVENTS: usize = 100;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or_else(|| "ws://127.0.0.1:8080/api/v1/events".into());
    let id = arguments.next().unwrap_or_else(|| format!("example-{}", std::process::id()));
    let mut client = Client { url, id, socket: None };

    // Rule 2. A real client also sends what it has after a while, full or not.
    let mut events = Vec::new();
    let (mut acked, mut refused) = (0, 0);
    let mut lines = std::io::stdin().lock().lines();
    loop {
        let line = lines.next().transpose()?;
        let ended = line.is_none();
        events.extend(line.map(|line| Event { event_bytes: line.into_bytes().into(), r#type: "example".into() }));
        if events.len() == BATCH_EVENTS || (ended && !events.is_empty()) {
            let count = events.len();
            match client.deliver(std::mem::take(&mut events)).await {
                Ok(()) => acked += count,
                Err(reason) => {
                    refused += count;
                    eprintln!("{count} events refused for good: {reason}");
                }
            }
        }
        if ended {
            break;
        }
    }
    client.close().await;
    println!("{acked} events acked, {refused} refused");
    anyhow::ensure!(refused == 0, "not every event was acked");
    Ok(())
}

/// Why one try failed.
enum Failure {
    /// The connection, or the server for now: the same batch may succeed later.
    Retry(String),
    /// The batch itself is bad and always will be.
    Refused(String),
}

impl From<tungstenite::Error> for Failure {
    fn from(error: tungstenite::Error) -> Self {
        Failure::Retry(error.to_string())
    }
}

struct Client {
    url: String,
    id: String,
    socket: Option<Socket>,
}

impl Client {
    /// Delivers one batch, however long that takes. An error means that the server will never take it.
    async fn deliver(&mut self, events: Vec<Event>) -> Result<(), String> {
        // Rule 3: the name is made once, outside the loop.
        let req_guid = uuid::Uuid::new_v4().to_string();
        let request = SendEventRequest { req_guid, sent_time: Some(now()), events };
        let mut delay = RETRY_DELAY_MIN;
        loop {
            let error = match tokio::time::timeout(ANSWER_TIMEOUT, self.try_once(&request)).await {
                Ok(Ok(())) => return Ok(()), // Rule 4: only now may the events be forgotten.
                Ok(Err(Failure::Refused(reason))) => return Err(reason),
                Ok(Err(Failure::Retry(error))) => error,
                Err(_) => format!("no answer within {ANSWER_TIMEOUT:?}"),
            };
            // Rule 6. The random part keeps a thousand clients from coming back in the same instant.
            let jittered = delay.mul_f64(rand::rng().random_range(0.5..=1.0));
            eprintln!("{error}; trying again in {jittered:?}");
            self.socket = None; // whatever state it is in: a new connection is certain
            tokio::time::sleep(jittered).await;
            delay = (delay * 2).min(RETRY_DELAY_MAX);
        }
    }

    async fn try_once(&mut self, request: &SendEventRequest) -> Result<(), Failure> {
        if self.socket.is_none() {
            self.socket = Some(connect(&self.url, &self.id).await?);
        }
        let socket = self.socket.as_mut().expect("it was just connected");
        socket.send(Message::Binary(request.encode_to_vec().into())).await?;
        // Rule 5: tungstenite answers pings, but only while somebody reads. A client that is idle for longer than the
        // server's pong timeout (60 s) must read then, too, or expect to reconnect.
        while let Some(message) = socket.next().await {
            match message? {
                Message::Binary(bytes) => {
                    let answer = SendEventResponse::decode(bytes).map_err(|error| Failure::Retry(error.to_string()))?;
                    if let Some(outcome) = outcome(&answer, &request.req_guid) {
                        return outcome;
                    }
                }
                Message::Close(frame) => {
                    return Err(Failure::Retry(format!("server closed the connection: {frame:?}")));
                }
                _ => {}
            }
        }
        Err(Failure::Retry("connection lost".into()))
    }

    async fn close(&mut self) {
        if let Some(socket) = &mut self.socket {
            // Everything is acked: a failure to say goodbye costs nothing.
            let _ = socket.close(None).await;
        }
    }
}

async fn connect(url: &str, id: &str) -> Result<Socket, Failure> {
    let mut handshake = url.into_client_request()?;
    // Rule 1. The server says under `ingest.connection_id_header` what the header is called.
    let id = HeaderValue::from_str(id).map_err(|error| Failure::Refused(error.to_string()))?;
    handshake.headers_mut().insert("X-User-ID", id);
    let (socket, _) = tokio_tungstenite::connect_async(handshake).await?;
    Ok(socket)
}

/// What an answer means for the request of that name; `None` if it belongs to another one.
fn outcome(answer: &SendEventResponse, req_guid: &str) -> Option<Result<(), Failure>> {
    // A server that could not read the request, or refuses the connection, cannot name the request. As this client has
    // only one in flight, it is that one.
    let named = answer.data.get("req_guid").map_or("", String::as_str);
    if !named.is_empty() && named != req_guid {
        return None;
    }
    Some(match (answer.status(), answer.code()) {
        (Status::Success, _) => Ok(()),
        (_, Code::BadRequest) => Err(Failure::Refused(answer.reason.clone())),
        // Full, stopping, too many connections, the id still connected: all of it passes.
        (_, code) => Err(Failure::Retry(format!("{}: {}", code.as_str_name(), answer.reason))),
    })
}

fn now() -> prost_types::Timestamp {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    prost_types::Timestamp { seconds: now.as_secs() as i64, nanos: now.subsec_nanos() as i32 }
}
