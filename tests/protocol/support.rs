//! A server on free ports with a log in a temporary directory, and clients that speak bytes.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use ringtail::config::{DedupConfig, IngestConfig, WalConfig};
use ringtail::ingest::{Ingest, serve_grpc, serve_http};
use ringtail::metrics::Metrics;
use ringtail::proto::{Event, SendEventRequest, SendEventResponse};
use ringtail::wal::{Record, Wal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_util::sync::CancellationToken;

use crate::small_log::small_log;

/// No wait in these tests is longer.
const PATIENCE: Duration = Duration::from_secs(20);

pub type WebSocket = WebSocketStream<TcpStream>;

/// Fails the test when `future` takes too long.
pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} took too long"))
}

pub struct Server {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub wal: Wal,
    pub metrics: Arc<Metrics>,
    pub stop: CancellationToken,
    serving: Vec<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Server {
    /// A server with the default limits.
    pub async fn start() -> Server {
        Server::with(|_| {}).await
    }

    /// A server whose limits were changed by `edit`.
    pub async fn with(edit: impl FnOnce(&mut IngestConfig)) -> Server {
        Server::with_log(edit, |_| {}).await
    }

    /// A server whose log was changed as well.
    pub async fn with_log(edit: impl FnOnce(&mut IngestConfig), edit_log: impl FnOnce(&mut WalConfig)) -> Server {
        let directory = tempfile::tempdir().unwrap();
        let mut wal_config = WalConfig {
            // Most tests send one batch in several ways and want to see each of them.
            dedup: DedupConfig { enabled: false, ..DedupConfig::default() },
            ..small_log(directory.path())
        };
        edit_log(&mut wal_config);
        let mut config = IngestConfig::default();
        edit(&mut config);
        let metrics = Metrics::new();
        let wal = Wal::open(&wal_config, config.in_flight_bytes_max.as_u64(), metrics.clone()).unwrap();
        let ingest = Ingest::new(&config, wal.clone(), metrics.clone());
        let stop = CancellationToken::new();
        let (http, grpc) = (listen().await, listen().await);
        let (http_addr, grpc_addr) = (http.local_addr().unwrap(), grpc.local_addr().unwrap());
        let serving = vec![
            tokio::spawn(serve_http(ingest.clone(), http, stop.clone())),
            tokio::spawn(serve_grpc(ingest, grpc, stop.clone())),
        ];
        Server { http: http_addr, grpc: grpc_addr, wal, metrics, stop, serving, _directory: directory }
    }

    /// Stops and waits until everything has drained.
    pub async fn drained(&mut self) {
        self.stop.cancel();
        for serving in self.serving.drain(..) {
            within("drain", serving).await.unwrap();
        }
    }

    /// Everything in the log, once there are `count` records.
    pub fn records(&self, count: usize) -> Vec<Record> {
        let mut reader = self.wal.reader();
        let mut records = Vec::new();
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            while let Some(record) = reader.next_record().unwrap() {
                records.push(record);
            }
            if records.len() >= count {
                assert_eq!(records.len(), count);
                return records;
            }
            assert!(std::time::Instant::now() < deadline, "{} of {count} records", records.len());
            reader.wait(Duration::from_millis(50));
        }
    }

    /// The value of one series, such as `ringtail_ingest_connections{protocol="rest"}`.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.metrics.handle().render();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
    }

    /// Waits until a series has a value.
    pub async fn await_metric(&self, series: &str, value: f64) {
        let reached = async {
            while self.metric(series) != value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("{series} is {}, not {value}", self.metric(series));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        self.wal.close();
    }
}

async fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// A request with one event for each payload.
pub fn request(req_guid: &str, payloads: &[&[u8]]) -> SendEventRequest {
    let event = |payload: &&[u8]| Event { event_bytes: payload.to_vec().into(), r#type: "click".into() };
    SendEventRequest { req_guid: req_guid.into(), sent_time: None, events: payloads.iter().map(event).collect() }
}

/// `(status, code, req_guid)` of an answer.
pub fn outcome(answer: &SendEventResponse) -> (i32, i32, Option<&str>) {
    (answer.status, answer.code, answer.data.get("req_guid").map(String::as_str))
}

/// The payloads of every record, in order.
pub fn payloads(records: &[Record]) -> Vec<Vec<u8>> {
    let events = records.iter().flat_map(|record| record.batch.request.events());
    events.map(|event| event.payload.to_vec()).collect()
}

// WebSocket

/// A WebSocket with these headers on its handshake.
pub async fn connect(server: &Server, headers: &[(&'static str, &str)]) -> WebSocket {
    try_connect(server, headers).await.unwrap()
}

pub async fn try_connect(
    server: &Server,
    headers: &[(&'static str, &str)],
) -> Result<WebSocket, tokio_tungstenite::tungstenite::Error> {
    let mut request = format!("ws://{}/api/v1/events", server.http).into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    let stream = TcpStream::connect(server.http).await.unwrap();
    let client = tokio_tungstenite::client_async(request, stream);
    within("handshake", client).await.map(|(websocket, _)| websocket)
}

pub async fn send(websocket: &mut WebSocket, request: &SendEventRequest) {
    websocket.send(Message::binary(request.encode_to_vec())).await.unwrap();
}

/// The next message that is no ping.
pub async fn next(websocket: &mut WebSocket) -> Message {
    loop {
        match within("answer", websocket.next()).await.expect("open").unwrap() {
            Message::Ping(_) => {}
            message => return message,
        }
    }
}

pub async fn answer(websocket: &mut WebSocket) -> SendEventResponse {
    match next(websocket).await {
        Message::Binary(bytes) => SendEventResponse::decode(bytes).unwrap(),
        other => panic!("not an answer: {other:?}"),
    }
}

/// The code and reason of the close frame that must come next; then the stream must end.
pub async fn closed(websocket: &mut WebSocket) -> (u16, String) {
    let Message::Close(Some(frame)) = next(websocket).await else { panic!("not a close frame") };
    if let Some(Ok(message)) = within("end", websocket.next()).await {
        panic!("after the close frame: {message:?}");
    }
    (frame.code.into(), frame.reason.as_str().into())
}

/// Closes a connection. Its id is free afterwards: the server has let go of it when the client sees the end of the stream.
pub async fn close(mut websocket: WebSocket) {
    websocket.close(None).await.unwrap();
    assert!(matches!(next(&mut websocket).await, Message::Close(_)));
    assert!(within("end", websocket.next()).await.is_none());
}

/// A connection that has done its handshake by hand.
pub async fn raw_websocket(server: &Server, id: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(&handshake(id)).await.unwrap();
    read_head(&mut stream).await;
    stream
}

pub fn handshake(id: &str) -> Vec<u8> {
    let head = format!(
        "GET /api/v1/events HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-User-ID: {id}\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    head.into_bytes()
}

/// A masked frame, as a client sends it. `first`: the FIN bit and the opcode.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x12, 0x34, 0x56, 0x78];
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | u8::try_from(length).unwrap()),
        length @ 126..=65_535 => {
            frame.push(0x80 | 126);
            frame.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// One unmasked frame from the server: its first byte and payload.
pub async fn read_frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    within("frame", async {
        let mut head = [0; 2];
        stream.read_exact(&mut head).await.unwrap();
        let length = match head[1] {
            126 => stream.read_u16().await.unwrap().into(),
            127 => stream.read_u64().await.unwrap(),
            length => length.into(),
        };
        let mut payload = vec![0; length.try_into().unwrap()];
        stream.read_exact(&mut payload).await.unwrap();
        (head[0], payload)
    })
    .await
}

pub async fn read_answer(stream: &mut TcpStream) -> SendEventResponse {
    let (first, payload) = read_frame(stream).await;
    assert_eq!(first, 0x82);
    SendEventResponse::decode(&payload[..]).unwrap()
}

// HTTP

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }

    /// The body as the type in its head says.
    pub fn answer(&self) -> SendEventResponse {
        match self.header("content-type") {
            Some("application/proto") => SendEventResponse::decode(&self.body[..]).unwrap(),
            Some("application/json") => json_answer(&self.body),
            other => panic!("content type {other:?}"),
        }
    }
}

/// Reads a JSON answer as the strict clients do: a field that is not in the message breaks them.
pub fn json_answer(text: &[u8]) -> SendEventResponse {
    let value: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(text).unwrap();
    let mut answer = SendEventResponse::default();
    for (name, value) in value {
        let number = || value.as_i64().filter(|number| *number != 0).expect("a number that is not zero");
        match name.as_str() {
            "status" => answer.status = number().try_into().unwrap(),
            "code" => answer.code = number().try_into().unwrap(),
            "sent_time" => answer.sent_time = number(),
            "reason" => answer.reason = value.as_str().unwrap().into(),
            "data" => answer.data = serde_json::from_value(value).unwrap(),
            _ => panic!("a strict client breaks on {name}"),
        }
    }
    answer
}

/// One request on a connection of its own.
pub async fn http(server: &Server, head: &str, body: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    exchange(&mut stream, head, body).await
}

pub async fn exchange(stream: &mut TcpStream, head: &str, body: &[u8]) -> Reply {
    let mut bytes = format!("{head}\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend(body);
    stream.write_all(&bytes).await.unwrap();
    read_reply(stream, !head.starts_with("HEAD")).await
}

/// `POST /api/v1/events`
pub async fn post(server: &Server, content_type: &str, body: &[u8]) -> Reply {
    http(server, &post_head(content_type), body).await
}

pub fn post_head(content_type: &str) -> String {
    format!("POST /api/v1/events HTTP/1.1\r\nX-User-ID: device\r\nContent-Type: {content_type}")
}

pub async fn read_reply(stream: &mut TcpStream, has_body: bool) -> Reply {
    let head = read_head(stream).await;
    let status = head[9..12].parse().unwrap();
    let mut reply = Reply { status, head, body: Vec::new() };
    if has_body {
        let length = reply.header("content-length").unwrap_or("0").parse().unwrap();
        reply.body.resize(length, 0);
        within("body", stream.read_exact(&mut reply.body)).await.unwrap();
    }
    reply
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    within("head", async {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("a whole head"));
        }
    })
    .await;
    String::from_utf8(head).unwrap()
}

/// Waits until the server has closed the connection.
pub async fn until_closed(stream: &mut TcpStream) {
    let mut sink = Vec::new();
    let _ = within("close", stream.read_to_end(&mut sink)).await;
}
