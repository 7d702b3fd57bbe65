//! `kill -9` between any two steps whose order a promise rests on: no acked event is lost.
//!
//! One log directory lives through many lives of the process. In each, clients of every protocol send, a forwarder
//! delivers into a mock Kafka and parks what that cannot take, and the process kills itself at one of the points in
//! `src/kill_point.rs`, the n-th time that it passes it. Every point has its turn: one that is not passed fails the test.
//! In some lives Kafka refuses one of the topics, whose events then move to the spill, and in others come back from there.
//! For the points around damage the test damages the log between two lives; then exactly what the ledger of losses names
//! may be missing. After every [`LIVES_BETWEEN_CHECKS`] lives the log, the parked store and what arrived are compared with
//! what was acked; every other time after a life that is not killed and delivers everything.
//!
//! `RINGTAIL_SEED` replays the choices of a run (not the timing of the machine), `RINGTAIL_KILLS` sets their number.

#[path = "../support/chunks.rs"]
mod chunks;
mod destination;
#[path = "../support/environment.rs"]
mod environment;
#[path = "../support/http.rs"]
mod http;
#[path = "../support/kept.rs"]
mod kept;
mod live_first;
#[path = "../kill/load.rs"]
mod load;
mod oracle;
#[path = "../support/process.rs"]
mod process;
mod shards;
#[path = "../support/small_log.rs"]
mod small_log;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use ringtail::kill_point;

use chunks::unmasked;
use destination::Destination;
use environment::number_from_environment;
use http::{get, wait_until};
use kept::KeptOnPanic;
use load::{Clients, Load};
use oracle::Oracle;
use process::{Options, Process};
use shards::needs_shards;

/// Lives after which everything is compared.
const LIVES_BETWEEN_CHECKS: u64 = 10;
/// One event in so many is parked.
const PARKED_ONE_IN: u32 = 16;
/// Largest payload: a few slots of a segment.
const PAYLOAD_BYTES_MAX: usize = 200 << 10;
/// Batches acked in a life that only collects, before it is damaged.
const BACKLOG_BATCHES: u64 = 100;

/// At which passage of a point the process may be killed: no more than some seconds under load away.
fn passages_max(point: &str) -> u64 {
    match point.split_once('.').expect("stage and step").0 {
        "commit" => 300,
        "park" => 20,
        "prepare" | "cursor" | "spill" => 3,
        "rotate" | "seal" => 2,
        _ => 1,
    }
}

/// Points that are only passed where there is damage.
fn needs_damage(point: &str) -> bool {
    point.starts_with("quarantine.") || point.starts_with("losses.")
}

/// Points that are only passed where new events go ahead of a backlog.
fn needs_live_first(point: &str) -> bool {
    point.starts_with("ahead.")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acked_event_survives_a_kill_at_every_point() {
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    let points: Vec<&str> =
        kill_point::ALL.iter().copied().filter(|point| !needs_live_first(point) && !needs_shards(point)).collect();
    let kills = number_from_environment("RINGTAIL_KILLS").unwrap_or(points.len() as u64);
    println!("RINGTAIL_SEED={seed} RINGTAIL_KILLS={kills}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut test = Test::new(&mut rng, false, PARKED_ONE_IN);
    let began = Instant::now();
    let mut hits: BTreeMap<&str, u64> = BTreeMap::new();
    let mut turns = Vec::new();
    for life in 1..=kills {
        if turns.is_empty() {
            turns = points.clone();
            turns.shuffle(&mut rng);
        }
        let point = turns.pop().expect("filled above");
        // What is in the ledger already is not written again; what is not yet set aside still will be.
        if needs_damage(point) && (point.starts_with("losses.") || !test.is_damaged()) {
            test.damage(&mut rng).await;
        }
        if point == "recover.spare_removed" {
            // The keeper's first pass makes the spares before it saves the cursor.
            test.live("cursor.synced", 1).await;
        }
        test.set_closed(point.starts_with("spill.") || rng.random());
        test.live(point, rng.random_range(1..=passages_max(point))).await;
        *hits.entry(point).or_default() += 1;
        if life % LIVES_BETWEEN_CHECKS == 0 || life == kills {
            let drained = life == kills || (life / LIVES_BETWEEN_CHECKS).is_multiple_of(2);
            if drained {
                test.drain().await;
            }
            let summary = test.check(rng.random(), drained);
            println!("after {life} kills, {:?}: {summary}", began.elapsed());
        }
    }
    println!("kills by point: {hits:?}");
    let oracle = test.oracle.lock().unwrap();
    let (acked, settled, lost, parked) = (oracle.acked, oracle.settled, oracle.lost, oracle.parked);
    println!(
        "{acked} batches acked, {settled} settled, {lost} lost by the test's own damage, {parked} parked events found"
    );
    println!("{} spilled events drained", test.spilled);
    println!("{}, in {:?}", test.arrived(life_count(kills)), began.elapsed());
    assert!(kills < points.len() as u64 || test.spilled > 0, "hardly anything was spilled");
    assert!(kills < points.len() as u64 || hits.len() == points.len(), "not every point had its turn");
    assert!(acked > kills && settled > 0 && parked > 0, "there was hardly any load");
}

/// Lives of the process, those that only collect or only deliver included.
fn life_count(kills: u64) -> u64 {
    4 * kills
}

struct Test {
    _directory: KeptOnPanic,
    options: Options,
    load: Arc<Load>,
    oracle: Arc<Mutex<Oracle>>,
    clients: Clients,
    destination: Destination,
    /// Segments that the test has damaged.
    damaged_segments: Vec<OsString>,
    /// Events that were in the spill when a life began that delivered everything.
    spilled: u64,
}

impl Test {
    fn new(rng: &mut StdRng, live_first: bool, parked_one_in: u32) -> Test {
        let directory = KeptOnPanic(tempfile::tempdir().unwrap());
        let load = Load::new(rng, PAYLOAD_BYTES_MAX, Some(parked_one_in));
        let oracle = Arc::new(Mutex::new(Oracle::default()));
        let destination = Destination::start(&load, live_first);
        let mut options = Options::small(&directory.0.path().join("wal"));
        options.brokers = destination.brokers();
        options.settings.extend(
            [
                "forward.topic = \"%s\"",
                "forward.in_flight_bytes_max = \"1MiB\"",
                // Nothing is parked because its topic is closed.
                "forward.topic_grace = \"1h\"",
            ]
            .map(String::from),
        );
        let clients = Clients::new(&load, &oracle);
        let (damaged_segments, spilled) = Default::default();
        let _directory = directory;
        Test { _directory, options, load, oracle, clients, destination, damaged_segments, spilled }
    }

    /// Whether Kafka refuses the topic that can be closed, from now on.
    fn set_closed(&mut self, closed: bool) {
        tokio::task::block_in_place(|| if closed { self.destination.close() } else { self.destination.open() });
    }

    /// A damaged segment is still where it was: the process will complain of it, and set it aside.
    fn is_damaged(&self) -> bool {
        let quarantine = self.options.directory.join("quarantine");
        self.damaged_segments.iter().any(|segment| !quarantine.join(segment).exists())
    }

    /// One life, which ends at the `passage`-th time that `point` is passed.
    async fn live(&mut self, point: &str, passage: u64) {
        let damaged = self.is_damaged();
        let mut options = self.options.clone();
        options.environment.push(("KILL_POINT".into(), format!("{point}:{passage}")));
        let mut process = Process::spawn(&options);
        let addresses = process.wait_until_ready_or_ended();
        let running = addresses.map(|addresses| self.clients.start(addresses));
        let killed = tokio::task::block_in_place(|| process.wait_for_own_kill());
        assert!(killed, "{point} was not passed {passage} times");
        let complaints = process.complaints();
        let expected = |line: &String| self.oracle.lock().unwrap().expects(line);
        assert!(damaged || complaints.iter().all(expected), "{point}:{passage} met damage: {complaints:#?}");
        if let Some(running) = running {
            self.clients.finish(running).await;
        }
    }

    /// A life killed under load, once there are some more batches.
    async fn collect(&mut self, options: &Options) {
        let (mut process, addresses) = Process::start(options);
        let enough = self.oracle.lock().unwrap().acked + BACKLOG_BATCHES;
        let running = self.clients.start(addresses);
        while self.oracle.lock().unwrap().acked < enough {
            tokio::task::yield_now().await;
        }
        process.kill();
        self.clients.finish(running).await;
    }

    /// A life that only collects, killed under load, and then a flipped bit in a batch that is pending.
    async fn damage(&mut self, rng: &mut StdRng) {
        self.collect(&Options { brokers: Vec::new(), ..self.options.clone() }).await;
        let directory = &self.options.directory;
        let pending = self.oracle.lock().unwrap().note_risk(directory, &self.load);
        let (client, number) = pending[rng.random_range(0..pending.len())];
        let (_, payload) = &self.load.events(client, number)[0];
        self.damaged_segments.extend(flip_bit_in(&directory.join("wal"), &payload[..payload.len().min(40)]));
    }

    /// Delivers everything, twice, in lives that nobody kills: what there is, damage or not, and then what was spilled and
    /// sent before three more kills. The books of the second one balance, and the spill shrinks to its state.
    async fn drain(&mut self) {
        self.set_closed(false);
        self.deliver_all().await;
        // Events that the cursor has passed are in the spill; then they come back from there, and files of it go; then anew.
        for (closed, passage) in [(true, 3), (false, 2), (true, 3)] {
            self.set_closed(closed);
            self.live("spill.saved", passage).await;
        }
        self.set_closed(false);
        // What is pending, with what is in the spill and not in the log, is known once the spill was compared with the log:
        // that saves its state.
        let spill = self.options.directory.join("spill");
        let state = spill_state(&spill);
        let (mut process, _) = Process::start(&Options { brokers: Vec::new(), ..self.options.clone() });
        wait_until("the spill to be settled", || spill_state(&spill) != state || is_bare(&spill)).await;
        assert!(process.stop().success());
        // Joins the reader of its log.
        process.complaints();
        let log = process.log_end();
        let pending = number_after(&log, "stopped pending_events=").expect("it says what is pending");
        self.spilled += number_after(&log, "topics go on from the spill events=").unwrap_or(0);
        let [delivered, parked, dropped] = self.deliver_all().await;
        println!("drained {pending} events: {delivered} delivered, {parked} parked, {dropped} dropped");
        assert_eq!((delivered + parked, dropped), (pending, 0));
        assert!(is_bare(&spill), "files are left in the spill");
    }

    /// Events delivered, parked and dropped until nothing was pending.
    async fn deliver_all(&self) -> [u64; 3] {
        let (mut process, addresses) = Process::start(&self.options);
        wait_until("everything to be delivered", || metric(addresses.admin, "wal_pending_events") == 0).await;
        wait_until("the spill to be empty", || metric(addresses.admin, "forward_spilled_events") == 0).await;
        let done = ["delivered", "parked", "dropped"];
        let done = done.map(|what| metric(addresses.admin, &format!("forward_{what}_events_total")));
        assert!(process.stop().success());
        done
    }

    fn check(&mut self, sweep: bool, drained: bool) -> String {
        tokio::task::block_in_place(|| {
            self.destination.look(|seen| {
                self.oracle.lock().unwrap().check(&self.options.directory, &self.load, seen, sweep, drained)
            })
        })
    }

    /// Checks the order of what arrived, and says how much.
    fn arrived(&self, lives: u64) -> String {
        self.destination.look(|seen| {
            let (mut events, mut duplicates, mut rewinds) = (0, 0, 0);
            for ((client, topic), arrived) in &seen.clients {
                assert!(arrived.rewinds <= lives, "client {client} went back in {topic} {} times", arrived.rewinds);
                events += arrived.events.len();
                duplicates += arrived.duplicates;
                rewinds = rewinds.max(arrived.rewinds);
            }
            format!("{events} events arrived, {duplicates} of them again, at most {rewinds} rewinds")
        })
    }
}

/// The number that follows `words`.
fn number_after(text: &str, words: &str) -> Option<u64> {
    let (_, rest) = text.split_once(words)?;
    rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// When the state of the spill was saved.
fn spill_state(spill: &Path) -> Option<SystemTime> {
    std::fs::metadata(spill.join("state")).and_then(|metadata| metadata.modified()).ok()
}

/// Nothing is in the spill but its state.
fn is_bare(spill: &Path) -> bool {
    let Ok(files) = std::fs::read_dir(spill) else { return true };
    files.map(|file| file.unwrap().file_name()).all(|name| name == "state" || name == "id")
}

/// The sum over all labels of a metric.
fn metric(admin: SocketAddr, name: &str) -> u64 {
    let (code, metrics) = get(admin, "/metrics");
    assert_eq!(code, 200);
    let name = format!("ringtail_{name}");
    let value = |line: &str| {
        let rest = line.strip_prefix(&name)?;
        if !rest.starts_with(['{', ' ']) {
            return None;
        }
        rest.rsplit(' ').next()?.parse::<f64>().ok()
    };
    metrics.lines().filter_map(value).sum::<f64>() as u64
}

/// Flips a bit wherever a segment's file holds `needle`. Returns the segments that do.
fn flip_bit_in(segments: &Path, needle: &[u8]) -> Vec<OsString> {
    let mut damaged = Vec::new();
    for segment in std::fs::read_dir(segments).unwrap() {
        let segment = segment.unwrap();
        let db = segment.path().join("db");
        let mut file = std::fs::File::options().read(true).write(true).open(db).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        let found: Vec<usize> = memchr::memmem::find_iter(&unmasked(&bytes), needle).collect();
        for at in &found {
            file.seek(SeekFrom::Start(*at as u64)).unwrap();
            file.write_all(&[bytes[*at] ^ 1]).unwrap();
        }
        if !found.is_empty() {
            damaged.push(segment.file_name());
        }
    }
    assert!(!damaged.is_empty(), "the batch to damage is nowhere");
    damaged
}
