//! Traffic whose every byte follows from a seed, and the oracle that says what must have become of it.
//!
//! A client numbers its events. Event type and payload follow from seed, client and number, so the oracle keeps nothing
//! but which numbers were acked, and still compares every byte. A client sends one batch at a time: what it sends again
//! is therefore never behind what it sent later, and the order of first occurrences is fixed.

#![allow(dead_code, reason = "each test uses its own part")]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use ringtail::client::{Client, ClientError, new_req_guid, sent_time_now};
use ringtail::proto::{Event, SendEventRequest};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::kafka::Kafka;
use crate::service::{Ports, Scheme, Service};

/// Event types, each its own topic.
pub const TYPES: [&str; 10] =
    ["click", "page", "search", "error", "login", "scroll", "share", "order", "crash", "sensor"];

/// Longest wait for acks: the service may be away in between.
const FLOW_PATIENCE: Duration = Duration::from_secs(180);

/// Client and number, at the start of every payload.
const HEAD_BYTES: usize = 12;
const RANDOM_BYTES_MAX: usize = 400;
const BATCH_EVENTS_MAX: u64 = 60;
/// A batch that was not acked is given up so often, and sent again otherwise.
const GIVE_UP: f64 = 0.25;
const RETRY_DELAY: Duration = Duration::from_millis(50);
const READ_PATIENCE: Duration = Duration::from_secs(600);

/// The topic of an event type under the default configuration.
pub fn topic(event_type: &str) -> String {
    format!("clickstream-{event_type}-log")
}

/// How much is sent.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub seed: u64,
    pub clients_per_protocol: u32,
    /// The protocols.
    pub schemes: &'static [Scheme],
    /// How many of [`TYPES`].
    pub types: usize,
    /// Each client has one type of its own. Otherwise a batch has all of them.
    pub apart: bool,
    /// Between one client's batches, of which each has 30 events on average.
    pub pause: Duration,
}

impl Default for Load {
    fn default() -> Load {
        let pause = Duration::from_millis(45);
        Load { seed: rand::random(), clients_per_protocol: 4, schemes: &Scheme::ALL, types: 4, apart: false, pause }
    }
}

/// Running clients.
pub struct Traffic {
    load: Load,
    runtime: Runtime,
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Sent>>,
}

/// What one client did.
#[derive(Debug, Default)]
struct Sent {
    id: String,
    /// By number: whether it was acked.
    acked: Vec<bool>,
    failures: u64,
    resent_batches: u64,
    given_up_batches: u64,
}

/// What all clients did.
#[derive(Debug)]
pub struct Ledger {
    load: Load,
    clients: Vec<Sent>,
}

/// What was found in Kafka.
#[derive(Debug, Default)]
pub struct Findings {
    pub sent: u64,
    pub acked: u64,
    /// Distinct events.
    pub delivered: u64,
    /// Further occurrences of delivered events.
    pub duplicates: u64,
    /// Distinct events that were parked.
    pub parked: u64,
    /// Acked, and neither delivered nor parked.
    pub lost: u64,
    pub out_of_order: u64,
    /// Attempts that were not acked.
    pub failures: u64,
    pub resent_batches: u64,
    pub given_up_batches: u64,
}

impl Traffic {
    /// Starts the clients.
    pub fn start(ports: Ports, load: Load) -> Traffic {
        let runtime = Runtime::new().expect("make a runtime");
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let numbered = (0..load.clients_per_protocol).flat_map(|_| load.schemes).zip(0..);
        let clients = numbered
            .map(|(scheme, number)| {
                let (stop, acked) = (stop.clone(), acked.clone());
                runtime.spawn(Sender { ports, scheme: *scheme, load, number, acked, stop }.run())
            })
            .collect();
        Traffic { load, runtime, stop, acked, clients }
    }

    /// Events acked so far.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    /// Waits until so many more events are acked.
    pub fn flow(&self, service: &mut Service, events: u64) {
        let goal = self.acked() + events;
        service.wait_for("traffic", FLOW_PATIENCE, |_| self.acked() >= goal);
    }

    /// Lets every client finish its batch, which needs a service that runs, and ends them.
    pub fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        let Traffic { load, runtime, clients, .. } = self;
        let clients = runtime.block_on(async {
            let mut all = Vec::new();
            for client in clients {
                all.push(client.await.expect("a client does not panic"));
            }
            all
        });
        Ledger { load, clients }
    }
}

struct Sender {
    ports: Ports,
    scheme: Scheme,
    load: Load,
    number: u32,
    acked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Sender {
    async fn run(self) -> Sent {
        let id = format!("{:?}-{}", self.scheme, self.number).to_lowercase();
        let mut sent = Sent { id, ..Sent::default() };
        let mut random = SmallRng::seed_from_u64(self.load.seed ^ (u64::from(self.number) << 32));
        let mut connection = None;
        let mut ticks = tokio::time::interval(self.load.pause);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.stop.load(Ordering::Relaxed) {
            ticks.tick().await;
            let first = sent.acked.len() as u64;
            let numbers = first..first + random.random_range(1..=BATCH_EVENTS_MAX);
            let events = numbers.clone().map(|number| event(&self.load, self.number, number)).collect();
            let request = SendEventRequest { req_guid: new_req_guid(), sent_time: Some(sent_time_now()), events };
            let acked = self.send(&mut connection, &mut random, &mut sent, request).await;
            sent.acked.extend(numbers.clone().map(|_| acked));
            if acked {
                self.acked.fetch_add(numbers.end - numbers.start, Ordering::Relaxed);
            }
        }
        sent
    }

    /// Sends until the batch is acked or given up.
    async fn send(
        &self,
        connection: &mut Option<Client>,
        random: &mut SmallRng,
        sent: &mut Sent,
        request: SendEventRequest,
    ) -> bool {
        loop {
            let result = match connection.take() {
                Some(client) => attempt(client, request.clone()).await,
                None => match Client::connect(&self.ports.options(self.scheme, &sent.id)).await {
                    Ok(client) => attempt(client, request.clone()).await,
                    Err(error) => Err(error),
                },
            };
            let error = match result {
                Ok(client) => {
                    *connection = Some(client);
                    return true;
                }
                Err(error) => error,
            };
            assert!(error.is_retryable(), "{}: {error:?}", sent.id);
            sent.failures += 1;
            tokio::time::sleep(RETRY_DELAY).await;
            // Nothing was sent unless there was a connection: then there is nothing to give up.
            if !matches!(error, ClientError::Connect { .. }) {
                if random.random_bool(GIVE_UP) {
                    sent.given_up_batches += 1;
                    return false;
                }
                sent.resent_batches += 1;
            }
        }
    }
}

/// Gives the connection back on success: after any failure a new one is made.
async fn attempt(client: Client, request: SendEventRequest) -> Result<Client, ClientError> {
    match client.send(request).await {
        Ok(_) => Ok(client),
        Err(error) => {
            client.close().await;
            Err(error)
        }
    }
}

fn event(load: &Load, client: u32, number: u64) -> Event {
    let mut random = SmallRng::seed_from_u64(load.seed ^ (u64::from(client) << 40) ^ number.wrapping_mul(0x9E37_79B9));
    let event_type = if load.apart { client as usize % load.types } else { random.random_range(0..load.types) };
    let event_type = TYPES[event_type].to_owned();
    let mut event_bytes = [&client.to_be_bytes()[..], &number.to_be_bytes()].concat();
    event_bytes.resize(HEAD_BYTES + random.random_range(0..=RANDOM_BYTES_MAX), 0);
    random.fill_bytes(&mut event_bytes[HEAD_BYTES..]);
    Event { event_bytes: event_bytes.into(), r#type: event_type }
}

impl Ledger {
    /// Claims an ack that nobody got, for an event that nobody sent: the oracle must miss it.
    pub fn claim_one_more(&mut self) {
        self.clients[0].acked.push(true);
    }

    /// Reads everything back. Panics at a record that no client sent as it stands there.
    pub fn check(&self, kafka: &Kafka) -> Findings {
        self.check_with(kafka, false, &[])
    }

    /// The same for a reader that sees committed transactions only, and with events that were parked: topic, key, payload.
    pub fn check_with(&self, kafka: &Kafka, committed: bool, parked: &[(String, String, Vec<u8>)]) -> Findings {
        let mut findings = Findings::default();
        let mut seen: Vec<Vec<bool>> = self.clients.iter().map(|client| vec![false; client.acked.len()]).collect();
        for (found, key, value) in parked {
            let event_type = TYPES.into_iter().find(|event_type| topic(event_type) == *found).expect("a known topic");
            let (client, number) = self.identify(event_type, Some(key.as_bytes()), value);
            findings.parked += u64::from(!std::mem::replace(&mut seen[client as usize][number as usize], true));
        }
        for event_type in &TYPES[..self.load.types] {
            // By client: its partition, and the highest number that was seen.
            let mut newest: HashMap<u32, (i32, u64)> = HashMap::new();
            kafka.read_each(&topic(event_type), committed, READ_PATIENCE, |record| {
                let (client, number) = self.identify(event_type, record.key.as_deref(), &record.value);
                let known = newest.get(&client).copied();
                assert!(known.is_none_or(|(partition, _)| partition == record.partition), "one client, one partition");
                if std::mem::replace(&mut seen[client as usize][number as usize], true) {
                    findings.duplicates += 1;
                    return;
                }
                findings.delivered += 1;
                findings.out_of_order += u64::from(known.is_some_and(|(_, newest)| number < newest));
                newest.insert(client, (record.partition, known.map_or(0, |(_, newest)| newest).max(number)));
            });
        }
        for (client, seen) in self.clients.iter().zip(&seen) {
            findings.sent += client.acked.len() as u64;
            findings.acked += client.acked.iter().filter(|acked| **acked).count() as u64;
            findings.lost += client.acked.iter().zip(seen).filter(|(acked, seen)| **acked && !**seen).count() as u64;
            findings.failures += client.failures;
            findings.resent_batches += client.resent_batches;
            findings.given_up_batches += client.given_up_batches;
        }
        findings
    }

    /// Whose event a record is, and which, having compared topic, key and value with what was sent.
    fn identify(&self, event_type: &str, key: Option<&[u8]>, value: &[u8]) -> (u32, u64) {
        assert!(value.len() >= HEAD_BYTES, "a foreign record: {value:?}");
        let client = u32::from_be_bytes(value[..4].try_into().expect("4 bytes"));
        let number = u64::from_be_bytes(value[4..HEAD_BYTES].try_into().expect("8 bytes"));
        let sent = &self.clients[client as usize];
        assert!(number < sent.acked.len() as u64, "{} never sent number {number}", sent.id);
        let expected = event(&self.load, client, number);
        assert_eq!((&expected.r#type[..], &expected.event_bytes[..]), (event_type, value), "{} {number}", sent.id);
        assert_eq!(key, Some(sent.id.as_bytes()), "the key is the connection's id");
        (client, number)
    }
}
