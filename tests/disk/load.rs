//! The clients: each sends batches with increasing numbers, and notes how long the journal was when it saw an ack.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use ringtail::client::{Client, ClientError, ClientOptions};
use ringtail::proto::{Event, SendEventRequest};

use crate::disk::Disk;
use crate::process::Addresses;

/// An event type whose topic Kafka takes, under `forward.topic = "%s"`.
pub const GOOD_TYPE: &str = "click";
/// One whose topic it does not take: its events are parked.
pub const BAD_TYPE: &str = "bad topic!";
/// One whose topic it does not take at times, in some loads.
pub const HELD_TYPE: &str = "held";
/// Clients that send at the same time.
pub const CLIENTS: u32 = 8;

/// One that uses REST.
const REST_CLIENT: u32 = 2;

/// A batch: its client and number.
pub type Name = (u32, u64);
/// Acked batches, and the length of the journal when the ack was seen: every cut at that length or later must keep it.
pub type Acks = BTreeMap<Name, usize>;

/// What is sent: everything about a batch follows from its name.
pub struct Load {
    seed: u64,
    noise: Vec<u8>,
    /// Largest payload, bytes.
    payload_bytes_max: usize,
    with_held: bool,
}

impl Load {
    /// A load with random contents. Of [`BAD_TYPE`] is one event in eight.
    pub fn new(seed: u64, payload_bytes_max: usize) -> Arc<Load> {
        Load::make(seed, payload_bytes_max, false)
    }

    /// The same; half of the rest is of [`HELD_TYPE`].
    pub fn with_held(seed: u64, payload_bytes_max: usize) -> Arc<Load> {
        Load::make(seed, payload_bytes_max, true)
    }

    fn make(seed: u64, payload_bytes_max: usize, with_held: bool) -> Arc<Load> {
        let mut noise = vec![0; 2 * payload_bytes_max];
        StdRng::seed_from_u64(seed).fill_bytes(&mut noise);
        Arc::new(Load { seed, noise, payload_bytes_max, with_held })
    }

    /// Type and payload of each event: mostly small, a few as large as can be. A payload begins with `client-number-event `.
    pub fn events(&self, (client, number): Name) -> Vec<(&'static str, Bytes)> {
        let mut rng = StdRng::seed_from_u64(self.seed ^ (u64::from(client) << 48) ^ number);
        let events = rng.random_range(1..=3);
        let event = |event| {
            let length = match rng.random_range(0..100) {
                0 => rng.random_range(self.payload_bytes_max / 3..=self.payload_bytes_max),
                1..10 => rng.random_range(0..=self.payload_bytes_max / 8),
                _ => rng.random_range(0..1 << 10),
            };
            let from = rng.random_range(0..=self.noise.len() - length);
            let mut payload = format!("{client}-{number}-{event} ").into_bytes();
            payload.extend_from_slice(&self.noise[from..from + length]);
            let kind = match rng.random_ratio(1, 8) {
                true => BAD_TYPE,
                false if self.with_held && rng.random() => HELD_TYPE,
                false => GOOD_TYPE,
            };
            (kind, payload.into())
        };
        (0..events).map(event).collect()
    }

    /// The batch and the event of it that a payload names.
    pub fn parse_payload(payload: &[u8]) -> Option<(Name, usize)> {
        let name = payload.split(|byte| *byte == b' ').next()?;
        let mut numbers = std::str::from_utf8(name).ok()?.split('-');
        let name = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        Some((name, numbers.next()?.parse().ok()?))
    }

    /// The batch that a request's `req_guid` names.
    pub fn parse_guid(req_guid: &str) -> Option<Name> {
        let (client, number) = req_guid.split_once('-')?;
        Some((client.parse().ok()?, number.parse().ok()?))
    }

    /// The request of a batch.
    pub fn request(&self, name: Name) -> SendEventRequest {
        let events = self.events(name).into_iter();
        let events = events.map(|(kind, event_bytes)| Event { event_bytes, r#type: kind.into() }).collect();
        SendEventRequest { req_guid: format!("{}-{}", name.0, name.1), sent_time: None, events }
    }
}

/// All clients, over the lives of the process.
pub struct Clients {
    load: Arc<Load>,
    disk: Arc<Disk>,
    next: Vec<u64>,
    acks: Arc<Mutex<Acks>>,
}

impl Clients {
    /// Clients that have sent nothing.
    pub fn new(load: &Arc<Load>, disk: &Arc<Disk>) -> Clients {
        Clients { load: load.clone(), disk: disk.clone(), next: vec![1; CLIENTS as usize], acks: Arc::default() }
    }

    /// The same clients, who have seen no ack yet.
    pub fn anew(&self) -> Clients {
        let Clients { load, disk, next, .. } = self;
        Clients { load: load.clone(), disk: disk.clone(), next: next.clone(), acks: Arc::default() }
    }

    /// Lets every client send until they have sent `bytes` together, or its connection breaks. The next ones send other
    /// batches, whatever became of these.
    pub async fn send(&mut self, addresses: Addresses, bytes: usize) {
        let clients = (0..).zip(self.next.iter().copied()).map(|(client, first)| {
            let (load, disk, acks) = (self.load.clone(), self.disk.clone(), self.acks.clone());
            tokio::spawn(async move {
                let mut next = first;
                let Some(connection) = connect(addresses, client).await else { return next };
                let mut sent = 0;
                while sent < bytes / CLIENTS as usize {
                    let name = (client, next);
                    next += 1;
                    let request = load.request(name);
                    sent += request.encoded_len();
                    if connection.send(request).await.is_err() {
                        break;
                    }
                    // Measured after the ack: everything that it rests on is within.
                    let journal_bytes = disk.journal_bytes();
                    assert!(acks.lock().unwrap().insert(name, journal_bytes).is_none(), "{name:?} was acked twice");
                }
                next
            })
        });
        let mut next = Vec::new();
        for client in clients.collect::<Vec<_>>() {
            next.push(client.await.expect("a client does not panic"));
        }
        self.next = next;
    }

    /// One client sends one batch over REST.
    pub async fn send_one(&mut self, addresses: Addresses) -> Result<(), ClientError> {
        let name = (REST_CLIENT, self.next[REST_CLIENT as usize]);
        self.next[REST_CLIENT as usize] += 1;
        let client = connect(addresses, REST_CLIENT).await.expect("REST connects later");
        client.send(self.load.request(name)).await?;
        self.acks.lock().unwrap().insert(name, self.disk.journal_bytes());
        Ok(())
    }

    /// Every ack so far.
    pub fn acks(&self) -> Acks {
        self.acks.lock().unwrap().clone()
    }
}

async fn connect(addresses: Addresses, client: u32) -> Option<Client> {
    let url = match client % 3 {
        0 => format!("ws://{}", addresses.http),
        1 => format!("grpc://{}", addresses.grpc),
        _ => format!("http://{}", addresses.http),
    };
    Client::connect(&ClientOptions::new(url.parse().expect("a URL"), format!("client-{client}"))).await.ok()
}
