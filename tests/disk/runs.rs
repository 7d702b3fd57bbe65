//! Runs of the service on a journalled disk: what a power cut may strike.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rand::Rng;
use rand::rngs::StdRng;

use crate::disk::{Call, Disk, Rule};
use crate::http::{get, wait_until};
use crate::image;
use crate::journal::records;
use crate::kafka::{Deliveries, Kafka};
use crate::load::{Clients, Load};
use crate::model::{Disbelief, Model};
use crate::order::Order;
use crate::process::{Addresses, Process};

/// A run of the service, in several lives, and what others saw of it.
pub struct Run {
    pub load: Arc<Load>,
    pub journal: Vec<u8>,
    pub clients: Clients,
    /// What Kafka was given.
    pub deliveries: Deliveries,
    /// Parts of the journal during which Kafka was away, and had been read to its end.
    pub outages: Vec<Range<usize>>,
    /// Parts during which it refused the held topic, which had been read to its end.
    pub closed: Vec<Range<usize>>,
    /// What was done to segments, each step in its place.
    pub order: Order,
}

/// Clients send to a service that forwards nothing. A life ends with SIGKILL at a random sync, the next one by SIGTERM.
pub async fn collect(rng: &mut StdRng) -> Run {
    let disk = Arc::new(Disk::new());
    let load = Load::new(rng.random(), 700 << 10);
    let mut clients = Clients::new(&load, &disk);
    let (mut process, addresses) = Process::start(&disk.options());
    kill_at_sync(&disk, rng.random_range(100..200), &mut clients, &mut process, addresses).await;
    let (mut process, addresses) = Process::start(&disk.options());
    clients.send(addresses, 12 << 20).await;
    assert!(process.stop().success());
    finish(&disk, load, clients, Deliveries::new(), [Vec::new(), Vec::new()])
}

/// Clients send to a service that forwards to Kafka, which goes away and comes back, and parks what Kafka does not take.
/// One life ends with SIGKILL at a random sync, while it delivers.
pub async fn forward(rng: &mut StdRng) -> Run {
    const ROUNDS: u32 = 6;
    const BYTES: usize = 2 << 20;
    let disk = Arc::new(Disk::new());
    let load = Load::new(rng.random(), 200 << 10);
    let mut clients = Clients::new(&load, &disk);
    let mut kafka = Kafka::start(&load, &disk);
    let options = kafka.forward(disk.options(), "connection_id");
    let (mut process, mut addresses) = Process::start(&options);
    let (mut outages, killed_in) = (Vec::new(), rng.random_range(2..ROUNDS - 1));
    for round in 0..ROUNDS {
        kafka.down();
        let began = disk.journal_bytes();
        clients.send(addresses, BYTES).await;
        outages.push(began..disk.journal_bytes());
        if round == ROUNDS - 1 {
            break;
        }
        kafka.up();
        if round == killed_in {
            kill_at_sync(&disk, rng.random_range(20..60), &mut clients, &mut process, addresses).await;
            (process, addresses) = Process::start(&options);
        } else {
            clients.send(addresses, BYTES).await;
        }
        kafka.wait_until_delivered(addresses, &clients).await;
    }
    // With Kafka away and a backlog.
    assert!(process.stop().success());
    let deliveries = kafka.deliveries();
    finish(&disk, load, clients, deliveries, [outages, Vec::new()])
}

/// Clients send to a service that forwards to a Kafka that refuses one topic for long, so that its events move to the
/// spill, and come back from there later. One life ends with SIGKILL at a random sync while they move.
pub async fn spill(rng: &mut StdRng) -> Run {
    const ROUNDS: u32 = 4;
    const BYTES: usize = 3 << 20;
    let disk = Arc::new(Disk::new());
    let load = Load::with_held(rng.random(), 100 << 10);
    let mut clients = Clients::new(&load, &disk);
    let mut kafka = Kafka::start_closed(&load, &disk);
    let options = kafka.forward_spilling(disk.options());
    let (mut process, mut addresses) = Process::start(&options);
    let (mut closed, killed_in) = (Vec::new(), rng.random_range(0..ROUNDS - 1));
    for round in 0..ROUNDS {
        let began = disk.journal_bytes();
        clients.send(addresses, BYTES).await;
        kafka.wait_until_spilled(addresses).await;
        if round == killed_in {
            kill_at_sync(&disk, rng.random_range(20..60), &mut clients, &mut process, addresses).await;
            (process, addresses) = Process::start(&options);
            clients.send(addresses, BYTES / 2).await;
            kafka.wait_until_spilled(addresses).await;
        }
        closed.push(began..disk.journal_bytes());
        if round < ROUNDS - 1 {
            kafka.set_closed(false);
            clients.send(addresses, BYTES / 4).await;
            kafka.wait_until_delivered(addresses, &clients).await;
            // A new process notices at once that the topic is closed again.
            assert!(process.stop().success());
            kafka.set_closed(true);
            (process, addresses) = Process::start(&options);
        }
    }
    assert!(process.stop().success());
    closed.last_mut().expect("there is one for each round").end = usize::MAX;
    let deliveries = kafka.deliveries();
    finish(&disk, load, clients, deliveries, [Vec::new(), closed])
}

/// Clients send to a service that forwards nothing; the next one parks at once what Kafka refuses of that, more than fits into
/// a shard of the parked store, and goes on for long. The first of them ends with SIGKILL at a random sync.
pub async fn park(rng: &mut StdRng) -> Run {
    const AT_ONCE_BYTES: usize = 20 << 20;
    const LATER_BYTES: usize = 6 << 20;
    let disk = Arc::new(Disk::new());
    let load = Load::with_held(rng.random(), 700 << 10);
    let mut clients = Clients::new(&load, &disk);
    let kafka = Kafka::start_closed(&load, &disk);
    let options = kafka.forward_parking(disk.options());
    for is_killed in [true, false] {
        let (mut process, addresses) = Process::start(&disk.options());
        clients.send(addresses, AT_ONCE_BYTES).await;
        assert!(process.stop().success());
        let (mut process, addresses) = Process::start(&options);
        kafka.wait_until_delivered(addresses, &clients).await;
        clients.send(addresses, LATER_BYTES).await;
        if is_killed {
            kill_at_sync(&disk, rng.random_range(20..60), &mut clients, &mut process, addresses).await;
        } else {
            kafka.wait_until_delivered(addresses, &clients).await;
            assert!(process.stop().success());
        }
    }
    let deliveries = kafka.deliveries();
    finish(&disk, load, clients, deliveries, [Vec::new(), Vec::new()])
}

/// Clients send to a service that forwards nothing, and whose commits find no room, for a moment, time and again. One life ends
/// with SIGKILL at a random sync soon after such a moment, and one before there is room.
pub async fn abandon(rng: &mut StdRng) -> Run {
    const ROUNDS: u32 = 8;
    let disk = Arc::new(Disk::new());
    let load = Load::new(rng.random(), 200 << 10);
    let mut clients = Clients::new(&load, &disk);
    let (mut process, mut addresses) = Process::start(&disk.options());
    let (killed_after, killed_before) = (rng.random_range(1..ROUNDS / 2), rng.random_range(ROUNDS / 2..ROUNDS));
    for round in 0..ROUNDS {
        clients.send(addresses, 1 << 20).await;
        let call = if rng.random() { Call::Write } else { Call::Sync };
        let times = if round == killed_before { u64::MAX } else { rng.random_range(1..4) };
        let rule = Rule { skip: rng.random_range(0..20), times, ..Rule::always(call, libc::ENOSPC, "wal/", "/db") };
        disk.set_rule(0, rule);
        // A refusal may still be that of the round before: what was left of its rule.
        for _ in 0..10 {
            clients.send(addresses, usize::MAX).await;
            if disk.hits(0) > 0 {
                break;
            }
            wait_until("batches to be accepted", || get(addresses.admin, "/readyz").0 == 200).await;
        }
        assert!(disk.hits(0) > 0, "no commit has found no room");
        if round == killed_after {
            kill_at_sync(&disk, rng.random_range(1..8), &mut clients, &mut process, addresses).await;
        } else if round == killed_before {
            process.kill();
            disk.clear_rule(0);
        }
        if round == killed_after || round == killed_before {
            (process, addresses) = Process::start(&disk.options());
        }
        wait_until("batches to be accepted", || get(addresses.admin, "/readyz").0 == 200).await;
    }
    clients.send(addresses, 1 << 20).await;
    assert!(process.stop().success());
    finish(&disk, load, clients, Deliveries::new(), [Vec::new(), Vec::new()])
}

/// Clients send until SIGKILL ends the service, so many syncs from now.
async fn kill_at_sync(disk: &Disk, syncs: u64, clients: &mut Clients, process: &mut Process, addresses: Addresses) {
    disk.kill_at_sync(disk.syncs() + syncs);
    clients.send(addresses, usize::MAX).await;
    process.wait_for_kill();
    disk.kill_at_sync(0);
}

/// Proves that the journal has every change, by making the directory from it; and looks at their order.
fn finish(
    disk: &Disk,
    load: Arc<Load>,
    clients: Clients,
    deliveries: Deliveries,
    [outages, closed]: [Vec<Range<usize>>; 2],
) -> Run {
    let journal = disk.journal();
    let mut model = Model::new(&journal, Disbelief::default());
    let mut order = Order::default();
    for record in records(&journal) {
        order.look(&model, &record.change);
        model.apply(&record.change);
    }
    let made = tempfile::tempdir().expect("make a directory");
    image::write_volatile(&model, made.path()).expect("write the image");
    assert_eq!(files(made.path()), files(&disk.root()), "the journal misses something");
    Run { load, journal, clients, deliveries, outages, closed, order }
}

/// Every file below `directory`, with its length and a checksum of its content.
fn files(directory: &Path) -> Vec<(String, usize, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).expect("list a directory") {
        let path = entry.expect("list a directory").path();
        let name = path.file_name().expect("it has a name").to_string_lossy().into_owned();
        if path.is_dir() {
            found.push((name.clone(), 0, 0));
            found.extend(files(&path).into_iter().map(|(inner, bytes, sum)| (format!("{name}/{inner}"), bytes, sum)));
        } else {
            let content = std::fs::read(&path).expect("read a file");
            let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &content) as u32;
            found.push((name, content.len(), sum));
        }
    }
    found.sort_unstable();
    found
}
