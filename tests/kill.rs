//! Promise 1 under `kill -9`: the process is killed at random moments under load, before it is ready too, and every batch
//! that a client saw acked is in the log afterwards: once, byte for byte, in its client's order.
//!
//! `RINGTAIL_SEED` replays a run's choices, `RINGTAIL_KILLS` sets the number of kills.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytesize::ByteSize;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use ringtail::client::{Client, ClientOptions};
use ringtail::config::WalConfig;
use ringtail::metrics::Metrics;
use ringtail::proto::{Event, SendEventRequest};
use ringtail::wal::Wal;

const CLIENTS: [(&str, usize); 8] =
    [("ws", 8), ("ws", 8), ("ws", 8), ("ws", 8), ("ws", 1), ("http", 1), ("grpc", 1), ("grpc", 1)];
const READY_DEADLINE: Duration = Duration::from_secs(60);
/// Lives between two checks of the log.
const LIVES_PER_CHECK: u32 = 20;

/// A batch's name: client and number.
type Name = (usize, u64);

/// Batches that a client saw acked and that were not delivered yet.
type Acked = Arc<Mutex<BTreeSet<Name>>>;

/// The process, killed when dropped.
struct Life(Child);

impl Drop for Life {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Addresses {
    http: String,
    grpc: String,
}

#[test]
fn every_acked_batch_survives_every_kill() {
    let seed: u64 = env("RINGTAIL_SEED").unwrap_or_else(rand::random);
    let kills: u32 = env("RINGTAIL_KILLS").unwrap_or(100);
    println!("RINGTAIL_SEED={seed} RINGTAIL_KILLS={kills}");
    let mut rng = StdRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    let config = write_config(directory.path());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let acked = Acked::default();
    let mut numbers = [0; CLIENTS.len()];
    let (mut acked_total, mut early) = (0, 0);
    for life in 1..=kills {
        let before_ready = rng.random_bool(0.2);
        // The delay is the fault: it picks the moment of the kill.
        let delay = Duration::from_micros(rng.random_range(0..if before_ready { 200_000 } else { 250_000 }));
        let (process, ready) = start(&config);
        let held = acked.lock().unwrap().len();
        if before_ready {
            early += 1;
            std::thread::sleep(delay);
            drop(process);
        } else {
            let addresses = ready.recv_timeout(READY_DEADLINE).expect("the service is ready in time");
            numbers = runtime.block_on(load(process, delay, &addresses, numbers, &acked));
        }
        acked_total += acked.lock().unwrap().len() - held;
        if life % LIVES_PER_CHECK == 0 || life == kills {
            check(directory.path(), &acked, &mut rng, life == kills);
        }
    }
    println!("{kills} kills, {early} of them before ready; {acked_total} batches acked, 0 lost");
    assert!(acked_total > u64::from(kills) as usize, "there was no load to speak of");
}

fn env<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

fn write_config(directory: &Path) -> PathBuf {
    let path = directory.join("ringtail.toml");
    let wal = directory.join("log");
    let text = format!(
        "ingest.http.listen = \"127.0.0.1:0\"\ningest.grpc.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n\
         forward.brokers = []\nwal.directory = {wal:?}\nwal.segment_bytes = \"8MiB\"\nwal.free_bytes_min = \"0B\"\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

/// Starts the service. Its addresses come once it is ready.
fn start(config: &Path) -> (Life, mpsc::Receiver<Addresses>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.args(["serve", "--config"]).arg(config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    for name in ["RINGTAIL_SEED", "RINGTAIL_KILLS"] {
        command.env_remove(name);
    }
    let mut child = command.spawn().unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let (told, ready) = mpsc::channel();
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            let address = |name: &str| {
                let (_, rest) = line.split_once(&format!(" {name}="))?;
                Some(rest.split(' ').next().unwrap_or(rest).to_string())
            };
            if line.contains(" ready ") {
                let addresses = Addresses { http: address("http").unwrap(), grpc: address("grpc").unwrap() };
                // Nobody waits for a life that is killed early.
                let _ = told.send(addresses);
            } else if line.contains("ERROR") || line.contains("missing") {
                eprintln!("{line}");
            }
        }
    });
    (Life(child), ready)
}

/// Sends from every client until the process is killed, after `delay`. Returns the next numbers.
async fn load(
    process: Life,
    delay: Duration,
    addresses: &Addresses,
    numbers: [u64; CLIENTS.len()],
    acked: &Acked,
) -> [u64; CLIENTS.len()] {
    let mut senders = Vec::new();
    for (client, (scheme, window)) in CLIENTS.into_iter().enumerate() {
        let address = if scheme == "grpc" { &addresses.grpc } else { &addresses.http };
        let options = ClientOptions::new(format!("{scheme}://{address}").parse().unwrap(), client.to_string());
        senders.push(tokio::spawn(send(options, client, window, numbers[client], acked.clone())));
    }
    tokio::time::sleep(delay).await;
    tokio::task::spawn_blocking(move || drop(process)).await.unwrap();
    let mut next = numbers;
    for (client, sender) in senders.into_iter().enumerate() {
        next[client] = sender.await.unwrap();
    }
    next
}

/// One client: `window` batches in flight, until the connection breaks. Returns its next number.
async fn send(options: ClientOptions, client: usize, window: usize, mut number: u64, acked: Acked) -> u64 {
    let Ok(connection) = Client::connect(&options).await else { return number };
    let mut flying = FuturesOrdered::new();
    loop {
        while flying.len() < window {
            let (name, connection) = ((client, number), &connection);
            number += 1;
            flying.push_back(async move { (name, connection.send(request(name)).await) });
        }
        match flying.next().await {
            Some((name, Ok(_))) => drop(acked.lock().unwrap().insert(name)),
            _ => return number,
        }
    }
}

fn request(name: Name) -> SendEventRequest {
    let event = Event { event_bytes: payload(name).into(), r#type: "t".into() };
    SendEventRequest { req_guid: format!("{}-{}", name.0, name.1), sent_time: None, events: vec![event] }
}

/// The payload of a batch follows from its name. Some are larger than a slot of the log.
fn payload((client, number): Name) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(number << 8 | client as u64);
    let bytes = if rng.random_bool(0.02) { rng.random_range(100_000..600_000) } else { rng.random_range(0..3000) };
    let mut payload = vec![0; bytes];
    rng.fill_bytes(&mut payload);
    payload
}

/// Reads the whole log, compares it with what was acked, and delivers a part of it, so that segments go.
fn check(directory: &Path, acked: &Acked, rng: &mut StdRng, all: bool) {
    let config = WalConfig {
        directory: directory.join("log"),
        segment_bytes: ByteSize::mib(8),
        free_bytes_min: ByteSize::b(0),
        ..WalConfig::default()
    };
    let wal = Wal::open(&config, 1, Metrics::new()).unwrap();
    let mut reader = wal.reader();
    let (mut seen, mut last, mut last_sequence) = (BTreeSet::new(), HashMap::new(), None);
    let pending = wal.status().pending_batches;
    let deliver = if all { pending } else { rng.random_range(0..=pending) };
    let mut acked = acked.lock().unwrap();
    let mut delivered = Vec::new();
    while let Some(record) = reader.next_record().unwrap() {
        let (client, number) = record.batch.request.req_guid().split_once('-').unwrap();
        let name: Name = (client.parse().unwrap(), number.parse().unwrap());
        assert_eq!(&*record.batch.client.id, client);
        let events: Vec<_> = record.batch.request.events().collect();
        assert_eq!(events.len(), 1);
        assert!(events[0].payload == payload(name), "{name:?} has other bytes");
        assert!(seen.insert(name), "{name:?} is there twice");
        let before = last.insert(name.0, name.1);
        assert!(before.is_none_or(|before| before < name.1), "{name:?} comes after {before:?}");
        assert!(last_sequence.replace(record.sequence).is_none_or(|before| before < record.sequence));
        if (delivered.len() as u64) < deliver {
            wal.deliver(record.end);
            delivered.push(name);
        }
    }
    let lost: Vec<_> = acked.difference(&seen).collect();
    assert!(lost.is_empty(), "acked and lost: {lost:?}");
    for name in delivered {
        acked.remove(&name);
    }
    drop(reader);
    wal.close();
}
