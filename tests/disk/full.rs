//! The disk is full: by a neighbour, by the backlog, at any call that takes space. It is a state, and not a failure: what
//! was acked stays, what comes is refused and told so, and all of it ends by itself once there is room.

use std::process::Command;

use ringtail::forward::{ParkReason, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;
use serde_json::{Value, json};

use crate::disk::{Call, Rule};
use crate::http::{status, wait_until};
use crate::parked::about;
use crate::process::turns;
use crate::seed;
use crate::service::Service;
use crate::small_log::small_log;

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_and_delivery_makes_room() {
    let mut service = Service::start(seed());
    // Room for the first segment, its spares, and one more.
    service.disk.set_capacity(Some(48 << 20));
    service.send(100 * MIB).await;
    assert_eq!(service.readyz(), (503, "full\n".to_owned()));
    service.assert_refuses("full").await;
    assert!(service.clients.acks().len() > 1000);
    service.kafka.up();
    service.wait_until_delivered().await;
    service.wait_until_accepting().await;
    service.wait_until_delivered().await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_filled_by_a_neighbour_refuses_and_delivery_goes_on() {
    let mut service = Service::start(seed());
    service.send(4 * MIB).await;
    // Not a block is left, not even for the cursor.
    service.disk.fill();
    service.send(100 * MIB).await;
    assert_eq!(service.readyz(), (503, "full\n".to_owned()));
    service.assert_refuses("full").await;
    service.kafka.up();
    // Until nothing more can be parked, or the cursor be saved.
    wait_until("a delivery", || !service.kafka.deliveries().is_empty()).await;
    service.disk.set_capacity(None);
    service.wait_until_delivered().await;
    service.wait_until_accepting().await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_starts_on_a_full_disk() {
    let mut service = Service::start(seed());
    service.send(12 * MIB).await;
    service.stop();
    service.disk.fill();
    service.restart();
    // The spares that were not used made some room.
    service.send(100 * MIB).await;
    service.assert_refuses("full").await;
    assert_eq!(service.readyz(), (503, "full\n".to_owned()));
    service.kafka.up();
    service.wait_until_delivered().await;
    service.disk.set_capacity(None);
    service.wait_until_accepting().await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_has_parked_much_starts_on_a_full_disk() {
    const EVENTS: usize = 6000;
    let mut service = Service::start(seed());
    service.stop();
    let wal = Wal::open(&small_log(&service.disk.root()), 1 << 20, Metrics::new()).unwrap();
    let store = ParkedStore::open(wal.parked()).unwrap();
    for number in 0..EVENTS {
        store.park(&about("t", ParkReason::TooLarge), &vec![7; (number % 40) << 10]).unwrap();
        if number % 100 == 0 {
            store.sync().unwrap();
        }
    }
    store.sync().unwrap();
    wal.close();
    drop((store, wal));
    let shards = std::fs::read_dir(service.disk.root().join("parked")).unwrap().count();
    assert!(shards > 6, "{shards}");
    // Twice: what was parked since the last start takes more to open than what was there before.
    for _ in 0..2 {
        service.disk.fill();
        service.restart();
        assert_eq!(status(service.addresses.admin)["parked"]["events"], EVENTS);
        service.stop();
    }
}

/// Commits find no room from now on, after `skip` calls that do.
fn no_room(call: Call, error: i32, skip: u64) -> Rule {
    Rule { skip, ..Rule::always(call, error, "wal/", "/db") }
}

/// It refuses and delivers, and accepts again by itself: the same process, which never ends.
async fn assert_a_commit_without_room_is_refused(call: Call, error: i32) {
    let mut service = Service::start(seed());
    let pid = service.process.pid();
    for skip in [0, 7, 20] {
        service.send(MIB).await;
        service.disk.set_rule(0, no_room(call, error, skip));
        service.send(100 * MIB).await;
        assert!(service.disk.hits(0) > 0);
        assert_eq!(service.readyz(), (503, "full\n".to_owned()));
        service.assert_refuses("full").await;
        service.kafka.up();
        service.wait_until_delivered().await;
        assert_eq!(service.readyz(), (503, "full\n".to_owned()));
        service.kafka.down();
        service.disk.clear_rule(0);
        service.wait_until_accepting().await;
    }
    // Once, for a moment.
    service.disk.set_rule(0, Rule { times: 1, ..no_room(call, error, 3) });
    service.send(100 * MIB).await;
    service.wait_until_accepting().await;
    assert_eq!(service.disk.hits(0), 1);
    let loses_nothing = ["lost_batches", "quarantined_segments"].map(|name| service.wal(name));
    assert_eq!((service.process.pid(), loses_nothing), (pid, [0, 0]));
    // With a backlog on both sides of an abandoned segment's end.
    service.stop();
    assert_eq!(backlog(&service, "check")["problems"], json!([]));
    assert_eq!(backlog(&service, "repair")["segments"], json!([]));
    service.restart();
    service.kafka.up();
    service.wait_until_delivered().await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_writes_find_no_room_is_refused_and_the_service_goes_on() {
    assert_a_commit_without_room_is_refused(Call::Write, libc::ENOSPC).await;
    assert_a_commit_without_room_is_refused(Call::Write, libc::EDQUOT).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_sync_finds_no_room_is_refused_and_the_service_goes_on() {
    assert_a_commit_without_room_is_refused(Call::Sync, libc::ENOSPC).await;
    assert_a_commit_without_room_is_refused(Call::Sync, libc::EDQUOT).await;
}

/// What `ringtail backlog …` says of the log of the stopped service.
fn backlog(service: &Service, command: &str) -> Value {
    let mut ringtail = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    ringtail.args(["backlog", command, "--json", "--directory"]).arg(service.disk.root());
    let output = turns::output(ringtail.envs(service.disk.options().environment)).expect("run ringtail");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

/// Before what was refused is cut off: it may come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_killed_after_a_commit_without_room_goes_on() {
    for call in [Call::Write, Call::Sync] {
        let mut service = Service::start(seed());
        service.send(MIB).await;
        service.disk.set_rule(0, no_room(call, libc::ENOSPC, 10));
        service.send(100 * MIB).await;
        assert_eq!(service.readyz(), (503, "full\n".to_owned()));
        service.process.kill();
        service.disk.clear_rule(0);
        assert_eq!(backlog(&service, "check")["missing"], json!([]));
        service.restart();
        service.wait_until_accepting().await;
        service.stop();
        assert_eq!(backlog(&service, "check")["problems"], json!([]));
        service.check();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_that_cannot_be_saved_is_saved_later() {
    let mut service = Service::start(seed());
    service.send(12 * MIB).await;
    let segments = service.wal("segments");
    service.disk.set_rule(0, Rule { times: 2, ..Rule::always(Call::Write, libc::ENOSPC, "meta/", "") });
    service.disk.set_rule(1, Rule::always(Call::Write, libc::EDQUOT, "meta/", ""));
    service.kafka.up();
    service.wait_until_delivered().await;
    wait_until("the cursor to fail", || service.disk.hits(1) > 1).await;
    assert_eq!(service.wal("segments"), segments, "trimmed without a durable cursor");
    service.send(MIB).await;
    service.disk.clear_rule(1);
    wait_until("the log to be trimmed", || service.wal("segments") < segments).await;
    service.wait_until_accepting().await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_cannot_be_parked_wait() {
    let mut service = Service::start(seed());
    service.disk.set_rule(0, Rule { times: 2, ..Rule::always(Call::Write, libc::ENOSPC, "parked/", "") });
    service.disk.set_rule(1, Rule::always(Call::Write, libc::EDQUOT, "parked/", ""));
    service.send(2 * MIB).await;
    service.kafka.up();
    wait_until("parking to fail", || service.disk.hits(1) > 2).await;
    assert_eq!(service.disk.hits(0), 2);
    assert!(service.wal("pending_events") > 0);
    service.disk.clear_rule(1);
    service.wait_until_delivered().await;
    service.stop();
    assert!(service.check().parked > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_that_finds_no_space_is_prepared_later() {
    let mut service = Service::start(seed());
    // The file system's limit, or a quota's.
    for (call, error) in [
        (Call::Reserve, libc::ENOSPC),
        (Call::Create, libc::ENOSPC),
        (Call::Reserve, libc::EDQUOT),
        (Call::Create, libc::EDQUOT),
    ] {
        service.disk.set_rule(0, Rule::always(call, error, "wal/", ""));
        service.send(100 * MIB).await;
        service.assert_refuses("full").await;
        assert!(service.disk.hits(0) > 0);
        service.disk.clear_rule(0);
        // The keeper tries again by itself.
        service.wait_until_accepting().await;
    }
    service.stop();
    service.check();
}

/// The one that is to take the place of an abandoned one: its own sync finds no room, and so does sled's, which panics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_whose_sync_finds_no_space_is_prepared_later() {
    let mut service = Service::start(seed());
    let pid = service.process.pid();
    wait_until("two spares", || service.wal("segments") >= 2).await;
    service.send(MIB).await;
    service.disk.set_rule(0, Rule { prefix: "wal/000000000004/", ..no_room(Call::Sync, libc::ENOSPC, 0) });
    service.disk.set_rule(1, Rule { prefix: "wal/000000000001/", times: 1, ..no_room(Call::Sync, libc::ENOSPC, 0) });
    service.send(100 * MIB).await;
    // More than once each: the next try is the keeper's.
    wait_until("preparing to fail", || service.disk.hits(0) > 3).await;
    assert_eq!(service.readyz(), (503, "full\n".to_owned()));
    service.disk.clear_rule(0);
    service.wait_until_accepting().await;
    assert_eq!(service.process.pid(), pid);
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_cannot_be_spilled_waits() {
    spilling_fails(&[Rule::always(Call::Write, libc::ENOSPC, "spill/", "")]).await;
    spilling_fails(&[Rule::always(Call::Create, libc::ENOSPC, "spill", "")]).await;
}

/// The calls fail for a while: the cursor passes nothing, batches are still taken, and then it goes on by itself.
pub async fn spilling_fails(rules: &[Rule]) {
    let mut service = Service::start_closed(seed());
    for (number, rule) in (0..).zip(rules) {
        service.disk.set_rule(number, *rule);
    }
    service.send(4 * MIB).await;
    wait_until("spilling to fail", || service.disk.hits(0) > 2).await;
    assert_eq!(service.spilled(), 0);
    let pending = service.wal("pending_batches");
    assert!(pending > 0);
    // Batches are taken all the same, and nothing of them is passed.
    service.send(MIB).await;
    assert!(service.wal("pending_batches") > pending);
    for number in 0..rules.len() {
        service.disk.clear_rule(number);
    }
    wait_until("events to be spilled", || service.spilled() > 0).await;
    wait_until("the log to be empty", || service.wal("pending_batches") < pending).await;
    // Again, in the middle: with a file that has a good beginning.
    service.disk.set_rule(0, Rule { skip: 0, times: 3, ..rules[0] });
    service.send(4 * MIB).await;
    wait_until("spilling to go on", || service.disk.hits(0) == 3).await;
    // What is on disk is whole in every moment: also after a start.
    service.stop();
    assert!(service.check().spilled > 0);
    service.restart();
    service.kafka.set_closed(false);
    service.wait_until_delivered().await;
    service.wait_until_accepting().await;
    service.wait_until_delivered().await;
    service.stop();
    assert_eq!(service.check().spilled, 0);
}
