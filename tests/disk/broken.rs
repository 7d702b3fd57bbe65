//! The disk breaks: EIO from a write, a sync, a read. Nothing more is acked by a log that may have lost something, and the
//! next start recovers all that was acked.

use std::collections::HashSet;

use serde_json::json;

use crate::disk::{Call, Rule};
use crate::full::spilling_fails;
use crate::http::wait_until;
use crate::process::turns;
use crate::seed;
use crate::service::Service;

const MIB: usize = 1 << 20;

/// A rule for segments: EIO, after `skip` calls.
fn eio(call: Call, skip: u64, times: u64) -> Rule {
    Rule { call, error: libc::EIO, skip, times, byte: 0, prefix: "wal/", suffix: "/db" }
}

/// A few KiB of each segment that cannot be read any more.
fn bad_sector() -> Rule {
    Rule { byte: 600 << 10, ..eio(Call::Read, 0, u64::MAX) }
}

/// More batches than a chunk that a bad sector spoils can hold.
const SECTOR_BATCHES_MAX: u64 = 100;

/// Waits until the log is empty, and every acked batch has arrived but for as many as were reported lost. Returns those that
/// have not.
async fn wait_until_delivered_or_lost(service: &Service) -> HashSet<(u32, u64)> {
    let missing = || service.kafka.missing(&service.clients).into_iter().map(|(name, _)| name).collect::<HashSet<_>>();
    wait_until("every batch to be delivered or reported lost", || {
        service.wal("pending_events") == 0
            && missing().len() as u64 <= service.wal("lost_batches").min(SECTOR_BATCHES_MAX)
    })
    .await;
    missing()
}

/// The commit fails: the process ends, and the next one goes on.
async fn assert_a_failed_commit_ends_the_process(call: Call, skip: u64) {
    let mut service = Service::start(seed());
    service.send(MIB).await;
    service.disk.set_rule(0, eio(call, skip, 1));
    service.send(100 * MIB).await;
    assert_eq!(service.process.wait_for_end().code(), Some(1));
    assert_eq!(service.disk.hits(0), 1);
    service.restart();
    service.wait_until_accepting().await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_fails_ends_the_process() {
    assert_a_failed_commit_ends_the_process(Call::Write, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_ends_the_process() {
    assert_a_failed_commit_ends_the_process(Call::Sync, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spill_that_fails_is_tried_again() {
    spilling_fails(&[Rule::always(Call::Sync, libc::EIO, "spill/", "")]).await;
    spilling_fails(&[Rule::always(Call::Write, libc::EIO, "spill/0", "")]).await;
}

/// Reads fail for a moment, after `skip` that do not.
async fn assert_a_failed_read_is_tried_again(skip: u64) {
    let mut service = Service::start(seed());
    service.send(20 * MIB).await;
    service.stop();
    service.restart();
    service.disk.set_rule(0, eio(Call::Read, skip, 5));
    service.kafka.up();
    service.wait_until_delivered().await;
    assert_eq!(service.disk.hits(0), 5);
    assert_eq!(service.wal("quarantined_segments"), 0);
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_fails_is_tried_again() {
    // While a segment is searched, and while chunks are read.
    for skip in [1, 40] {
        assert_a_failed_read_is_tried_again(skip).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_reads_nothing_is_waited_for() {
    let mut service = Service::start(seed());
    service.send(20 * MIB).await;
    service.stop();
    service.restart();
    service.disk.set_rule(0, eio(Call::Read, 0, u64::MAX));
    service.kafka.up();
    // More than the log has blocks: every try to do without those that cannot be read fails as well.
    wait_until("many reads to fail", || service.disk.hits(0) > 6_000 || service.wal("lost_batches") > 0).await;
    assert_eq!(service.wal("lost_batches"), 0);
    service.disk.clear_rule(0);
    service.wait_until_delivered().await;
    assert_eq!((service.wal("lost_batches"), service.wal("quarantined_segments")), (0, 0));
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sector_that_is_never_read_costs_what_is_in_it() {
    let mut service = Service::start(seed());
    service.send(20 * MIB).await;
    service.stop();
    service.disk.set_rule(0, Rule { prefix: "wal/000000000002/", ..bad_sector() });
    service.restart();
    service.kafka.up();
    let missing = wait_until_delivered_or_lost(&service).await.len() as u64;
    let lost = service.wal("lost_batches");
    assert!(missing <= lost && (1..=SECTOR_BATCHES_MAX).contains(&lost), "{missing} missing, {lost} reported lost");
    assert_eq!(service.wal("quarantined_segments"), 1);
    service.stop();

    // As long as the disk does not read it, it is not thrown away; when it does, nothing is lost.
    service.disk.set_rule(0, Rule { prefix: "quarantine/", ..bad_sector() });
    let repaired = repair(&service);
    let segment = &repaired["segments"][0];
    assert!(segment["error"].as_str().is_some_and(|error| error.contains("does not read")), "{repaired:#}");
    assert_eq!((&segment["recovered_batches"], &segment["discarded"]), (&json!(0), &json!(false)), "{repaired:#}");
    service.disk.clear_rule(0);
    let repaired = repair(&service);
    let segment = &repaired["segments"][0];
    assert_eq!((&segment["recovered_batches"], &segment["discarded"]), (&json!(lost), &json!(true)), "{repaired:#}");
    assert_eq!(repaired["still_lost"], json!([]));
    service.restart();
    service.wait_until_delivered().await;
    service.stop();
    service.check();
}

/// Runs `ringtail backlog repair --discard` on the log of the stopped service.
fn repair(service: &Service) -> serde_json::Value {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.args(["backlog", "repair", "--json", "--discard", "--directory"]).arg(service.disk.root());
    let output = turns::output(command.envs(service.disk.options().environment)).expect("run ringtail");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sector_that_is_never_read_does_not_keep_the_service_from_starting() {
    let mut service = Service::start(seed());
    service.send(4 * MIB).await;
    service.stop();
    let before: HashSet<_> = service.clients.acks().into_keys().collect();
    // Of the newest segment too, which says where the log ends.
    service.disk.set_rule(0, bad_sector());
    service.restart();
    service.wait_until_accepting().await;
    service.kafka.up();
    wait_until_delivered_or_lost(&service).await;
    // What might have stood in the sector is reported lost as well: what came later is delivered, and only takes its time.
    let missing = || service.kafka.missing(&service.clients);
    wait_until("what was acked after the start to arrive", || missing().iter().all(|(name, _)| before.contains(name)))
        .await;
    service.stop();
}

/// A few KiB of a file that holds nothing that was acked are never read again. What might have stood in a segment is reported lost
/// all the same: nobody can tell.
async fn assert_a_start_does_without(prefix: &'static str, aside: &str) {
    let mut service = Service::start(seed());
    service.send(MIB).await;
    service.process.kill();
    service.disk.set_rule(0, Rule { byte: 8192, prefix, suffix: "db", ..eio(Call::Read, 0, u64::MAX) });
    service.restart();
    assert!(service.disk.hits(0) > 0);
    service.wait_until_accepting().await;
    service.send(MIB).await;
    service.kafka.up();
    service.wait_until_delivered().await;
    assert!(service.disk.root().join("quarantine").join(aside).exists(), "nothing is thrown away");
    service.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_that_is_never_read_does_not_keep_the_service_from_starting() {
    assert_a_start_does_without("wal/000000000002/", "000000000002").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_that_is_never_read_does_not_keep_the_service_from_starting() {
    assert_a_start_does_without("meta/", "meta-1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_that_is_not_set_aside_durably_does_not_hold_up_the_rest() {
    let mut service = Service::start(seed());
    service.send(20 * MIB).await;
    service.stop();
    std::fs::remove_file(service.disk.root().join("wal/000000000001/db")).unwrap();
    service.disk.set_rule(0, Rule { times: 1, ..Rule::always(Call::Sync, libc::EIO, "quarantine", "") });
    service.restart();
    service.kafka.up();
    wait_until("the rest to be delivered", || {
        let missing: HashSet<_> = service.kafka.missing(&service.clients).into_iter().map(|(name, _)| name).collect();
        service.wal("pending_events") == 0 && (1..=service.wal("lost_batches")).contains(&(missing.len() as u64))
    })
    .await;
    assert_eq!(service.disk.hits(0), 1);
    assert_eq!(service.wal("quarantined_segments"), 1);
    service.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_cannot_read_fails_and_the_next_goes_on() {
    let mut service = Service::start(seed());
    service.send(4 * MIB).await;
    service.stop();
    service.disk.set_rule(0, Rule { prefix: "wal/000000000001/", ..eio(Call::Read, 2, u64::MAX) });
    service.spawn();
    assert_eq!(service.process.wait_for_end().code(), Some(1));
    assert!(service.disk.hits(0) > 0);
    service.disk.clear_rule(0);
    service.restart();
    service.wait_until_accepting().await;
    service.kafka.up();
    service.wait_until_delivered().await;
    wait_until("the books to balance", || service.wal("pending_events") == 0).await;
    service.stop();
    service.check();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_that_sled_would_find_empty_is_delivered() {
    use std::os::unix::fs::FileExt;
    let mut service = Service::start(seed());
    service.send(MIB).await;
    service.stop();
    // The first page of the segment: sled ends its log there, and opens without a word.
    let segment = service.disk.root().join("wal/000000000001");
    for entry in std::fs::read_dir(&segment).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("snap.") {
            std::fs::remove_file(path).unwrap();
        }
    }
    let db = std::fs::File::options().write(true).open(segment.join("db")).unwrap();
    db.write_all_at(&[0xff; 64], 0).unwrap();
    service.restart();
    service.wait_until_accepting().await;
    service.kafka.up();
    service.wait_until_delivered().await;
    assert_eq!(service.wal("quarantined_segments"), 0);
    service.stop();
    service.check();
}
