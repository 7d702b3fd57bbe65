//! The disk breaks: EIO from a write, a sync, a read. Nothing more is acked by a log that may have lost something, and the
//! next start recovers all that was acked.

use crate::disk::{Call, Rule};
use crate::full::spilling_fails;
use crate::http::wait_until;
use crate::seed;
use crate::service::Service;

const MIB: usize = 1 << 20;

/// A rule for segments: EIO, after `skip` calls.
fn eio(call: Call, skip: u64, times: u64) -> Rule {
    Rule { call, error: libc::EIO, skip, times, prefix: "wal/", suffix: "/db" }
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_fails_is_tried_again() {
    let mut service = Service::start(seed());
    service.send(20 * MIB).await;
    service.stop();
    service.restart();
    service.disk.set_rule(0, eio(Call::Read, 30, 5));
    service.kafka.up();
    service.wait_until_delivered().await;
    assert_eq!(service.disk.hits(0), 5);
    assert_eq!(service.wal("quarantined_segments"), 0);
    service.stop();
    service.check();
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
async fn a_segment_that_sled_finds_empty_is_set_aside() {
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
    wait_until("the segment to be set aside", || service.wal("quarantined_segments") == 1).await;
    service.wait_until_accepting().await;
    service.stop();
}
