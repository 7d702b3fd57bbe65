//! The clients: each sends batches with increasing numbers and never sends one twice, and notes every ack.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use ringtail::client::{Client, ClientOptions};
use ringtail::proto::{Event, SendEventRequest, SendEventResponse, Status};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::oracle::Oracle;
use super::process::Addresses;

/// Clients that pipeline batches over WebSocket.
const WEBSOCKETS: u32 = 3;
/// Batches that such a client has in flight.
const WINDOW: usize = 16;
/// The type of most events.
pub const EVENT_TYPE: &str = "click";
/// The type of a few, on request: Kafka takes no such name for a topic, so they are parked.
pub const PARKED_TYPE: &str = "not a topic";
/// The type of some, on request: their topic is closed at times, and they are held.
pub const HELD_TYPE: &str = "held";
/// One event in so many has that type.
const HELD_ONE_IN: u32 = 3;

/// What is sent: everything about a batch follows from its client and number.
pub struct Load {
    seed: u64,
    noise: Vec<u8>,
    payload_bytes_max: usize,
    parked_one_in: Option<u32>,
}

impl Load {
    /// A load with random contents. A slot of a segment of 8 MiB holds 64 KiB: a few payloads are larger, up to
    /// `payload_bytes_max`. With `parked_one_in`, Kafka cannot take one event in so many, and does not always take some others.
    pub fn new(rng: &mut StdRng, payload_bytes_max: usize, parked_one_in: Option<u32>) -> Arc<Load> {
        let mut noise = vec![0; 2 * payload_bytes_max];
        rng.fill_bytes(&mut noise);
        Arc::new(Load { seed: rng.random(), noise, payload_bytes_max, parked_one_in })
    }

    /// Name of a batch; [`Load::parse_name`] is its inverse.
    pub fn name(client: u32, number: u64) -> String {
        format!("{client}-{number}")
    }

    /// Client and number of a name.
    pub fn parse_name(req_guid: &str) -> (u32, u64) {
        let (client, number) = req_guid.split_once('-').expect("a name is client-number");
        (client.parse().expect("a client's number"), number.parse().expect("a batch's number"))
    }

    /// The connection id of a client.
    pub fn id(client: u32) -> String {
        format!("client-{client}")
    }

    /// Type and payload of each event: mostly small, a few larger than a slot. A payload begins with the batch's name and
    /// the event's place in it, and a blank.
    pub fn events(&self, client: u32, number: u64) -> Vec<(&'static str, Bytes)> {
        let mut rng = StdRng::seed_from_u64(self.seed ^ (u64::from(client) << 48) ^ number);
        let events = rng.random_range(1..=3);
        let event = |place| {
            let length = match rng.random_range(0..200) {
                0 => rng.random_range(self.payload_bytes_max / 2..=self.payload_bytes_max),
                1..10 => rng.random_range(1 << 10..=80 << 10),
                _ => rng.random_range(0..1 << 10),
            };
            let from = rng.random_range(0..=self.noise.len() - length);
            let mut payload = format!("{}-{place} ", Load::name(client, number)).into_bytes();
            payload.extend_from_slice(&self.noise[from..from + length]);
            let event_type = match self.parked_one_in {
                Some(one_in) if rng.random_ratio(1, one_in) => PARKED_TYPE,
                Some(_) if rng.random_ratio(1, HELD_ONE_IN) => HELD_TYPE,
                _ => EVENT_TYPE,
            };
            (event_type, payload.into())
        };
        (0..events).map(event).collect()
    }

    /// Which event of `event_type` a payload belongs to, byte for byte: client, the batch's number, place in the batch.
    #[allow(dead_code, reason = "each test uses its own part")]
    pub fn identify(&self, event_type: &str, payload: &[u8]) -> (u32, (u64, usize)) {
        let name = payload.split(|byte| *byte == b' ').next().and_then(|name| str::from_utf8(name).ok());
        let numbers = name.and_then(|name| name.rsplit_once('-'));
        let (name, place) = numbers.unwrap_or_else(|| panic!("a foreign payload: {payload:?}"));
        let (client, number) = Load::parse_name(name);
        let place = place.parse().expect("a place");
        let (expected_type, expected) = &self.events(client, number)[place];
        assert!(expected == payload, "the payload of {client}-{number}-{place} is not the one that was sent");
        assert_eq!(*expected_type, event_type);
        (client, (number, place))
    }

    fn request(&self, client: u32, number: u64) -> SendEventRequest {
        let events = self.events(client, number).into_iter();
        let events = events.map(|(r#type, event_bytes)| Event { event_bytes, r#type: r#type.into() }).collect();
        SendEventRequest { req_guid: Load::name(client, number), sent_time: None, events }
    }
}

/// A client's part in all its lives: the next number, whatever became of the ones before.
#[derive(Clone)]
struct Sending {
    client: u32,
    next: u64,
    load: Arc<Load>,
    oracle: Arc<Mutex<Oracle>>,
}

impl Sending {
    fn next(&mut self) -> SendEventRequest {
        self.next += 1;
        self.load.request(self.client, self.next)
    }

    fn acked(&self, answer: &SendEventResponse) {
        if answer.status() == Status::Success {
            let (client, number) = Load::parse_name(&answer.data["req_guid"]);
            assert_eq!(client, self.client, "an ack for somebody else's batch");
            self.oracle.lock().unwrap().ack(client, number);
        }
    }
}

/// Every client, between two lives.
pub struct Clients(Vec<Sending>);

/// Every client, at work.
pub struct Running(Vec<JoinHandle<Sending>>);

impl Clients {
    /// Clients that have sent nothing.
    pub fn new(load: &Arc<Load>, oracle: &Arc<Mutex<Oracle>>) -> Clients {
        // The last two use REST and gRPC.
        let sending = |client| Sending { client, next: 0, load: load.clone(), oracle: oracle.clone() };
        Clients((0..WEBSOCKETS + 2).map(sending).collect())
    }

    /// Connects every client, which sends until its connection breaks.
    pub fn start(&mut self, addresses: Addresses) -> Running {
        let start = |sending: Sending| {
            let client = sending.client;
            tokio::spawn(async move {
                match client.checked_sub(WEBSOCKETS) {
                    None => websocket(sending, addresses).await,
                    Some(0) => one_by_one(sending, format!("http://{}", addresses.http)).await,
                    Some(_) => one_by_one(sending, format!("grpc://{}", addresses.grpc)).await,
                }
            })
        };
        Running(self.0.drain(..).map(start).collect())
    }

    /// Waits until every client has noticed that the process is gone, and has read every ack that it sent.
    pub async fn finish(&mut self, running: Running) {
        for client in running.0 {
            self.0.push(client.await.expect("a client does not panic"));
        }
    }
}

/// Sends one batch after the other until one fails.
async fn one_by_one(mut sending: Sending, url: String) -> Sending {
    let options = ClientOptions::new(url.parse().expect("a URL"), Load::id(sending.client));
    let Ok(client) = Client::connect(&options).await else { return sending };
    loop {
        match client.send(sending.next()).await {
            Ok(answer) => sending.acked(&answer),
            Err(_) => return sending,
        }
    }
}

/// Pipelines batches, in the order of their numbers, until the connection breaks.
async fn websocket(mut sending: Sending, addresses: Addresses) -> Sending {
    let mut handshake = format!("ws://{}/api/v1/events", addresses.http).into_client_request().expect("a URL");
    handshake.headers_mut().insert("X-User-ID", Load::id(sending.client).parse().expect("a header"));
    let Ok(stream) = TcpStream::connect(addresses.http).await else { return sending };
    let Ok((socket, _)) = tokio_tungstenite::client_async(handshake, stream).await else { return sending };
    let (mut sink, mut stream) = socket.split();
    let window = Arc::new(Semaphore::new(WINDOW));
    let reading = tokio::spawn({
        let (sending, window) = (sending.clone(), window.clone());
        async move {
            while let Some(Ok(message)) = stream.next().await {
                if let Message::Binary(bytes) = message {
                    sending.acked(&SendEventResponse::decode(bytes).expect("an answer"));
                    window.add_permits(1);
                }
            }
            // Ends the writer, which may be waiting for room.
            window.close();
        }
    });
    while let Ok(room) = window.acquire().await {
        room.forget();
        if sink.send(Message::Binary(sending.next().encode_to_vec().into())).await.is_err() {
            break;
        }
    }
    // What the process had sent before it died is read to its end.
    reading.await.expect("the reader does not panic");
    sending
}
