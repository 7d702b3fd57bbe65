//! The log against a simple model, on the store in memory (crashes, damage, full disks) and on sled (what it writes).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use prost::Message;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::memory::{Faults, MemoryStore, small_shape};
use super::store::{STATE_VALUE_BYTES_MAX, SegmentShape, SledStore, Store};
use super::{AppendError, Commit, CommitError, Reader, Stored, Wal};
use crate::batch::{Batch, Client, Request};
use crate::config::{DedupConfig, WalConfig};
use crate::metrics::Metrics;
use crate::proto;

/// A batch of one event that says its number, `bytes` long.
pub(super) fn batch(number: u64, bytes: usize) -> Batch {
    let mut payload = number.to_le_bytes().to_vec();
    payload.resize(bytes.max(8), number as u8);
    let event = proto::Event { event_bytes: payload.into(), r#type: "t".into() };
    let request = proto::SendEventRequest { req_guid: number.to_string(), sent_time: None, events: vec![event] };
    let request = Request::parse(request.encode_to_vec().into()).unwrap();
    Batch { received_at_ms: number, client: Client { group: "g".into(), id: "c".into() }, request }
}

pub(super) fn number(batch: &Batch) -> u64 {
    batch.request.req_guid().parse().unwrap()
}

pub(super) fn open_memory(store: &MemoryStore) -> Wal {
    Wal::open_in(&WalConfig::default(), 1 << 20, small_shape(), Arc::new(store.clone()), Metrics::new(), None).unwrap()
}

fn open_sled(directory: &Path, segment_bytes: u64) -> Wal {
    let config = WalConfig {
        directory: directory.into(),
        segment_bytes: bytesize::ByteSize(segment_bytes),
        free_bytes_min: bytesize::ByteSize(0),
        ..WalConfig::default()
    };
    Wal::open(&config, 64 << 20, Metrics::new()).unwrap()
}

/// Waits for a commit on a thread that no runtime owns.
pub(super) fn wait(commit: Commit) -> Result<u64, CommitError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(commit).map(|stored| match stored {
        Stored::New(sequence) => sequence.0,
        Stored::Before => panic!("the batch is not a retry"),
    })
}

/// Commits batches of so many bytes, one after the other.
pub(super) fn append_all(wal: &Wal, numbers: impl IntoIterator<Item = u64>, bytes: usize) {
    for number in numbers {
        wait(wal.append(batch(number, bytes)).unwrap()).unwrap();
    }
}

pub(super) fn drain(reader: &mut Reader) -> Vec<u64> {
    let mut numbers = Vec::new();
    while let Some(record) = reader.next_record().unwrap() {
        numbers.push(number(&record.batch));
    }
    numbers
}

pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// Until the keeper has prepared its segments: the next sync is a commit's.
pub(super) fn await_spares(wal: &Wal) {
    until("segments are prepared", || wal.shared.log().spares.len() >= super::keeper::SPARES);
}

#[test]
fn what_was_committed_is_read_in_order_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    for number in 1..=300 {
        // Every seventh is larger than a slot may hold.
        let bytes = if number % 7 == 0 { 150_000 } else { 1000 };
        assert_eq!(wait(wal.append(batch(number, bytes)).unwrap()), Ok(number));
    }
    assert_eq!(drain(&mut wal.reader()), (1..=300).collect::<Vec<_>>());
    wal.close();
    drop(wal);
    let wal = open_sled(directory.path(), 8 << 20);
    assert_eq!(wal.status().pending_batches, 300);
    assert_eq!(wait(wal.append(batch(301, 10)).unwrap()), Ok(301));
    assert_eq!(drain(&mut wal.reader()), (1..=301).collect::<Vec<_>>());
    wal.close();
}

#[test]
fn the_segment_size_may_change_while_there_is_a_backlog() {
    let directory = tempfile::tempdir().unwrap();
    let mut next = 1;
    for segment_bytes in [8 << 20, 64 << 20, 16 << 20] {
        let wal = open_sled(directory.path(), segment_bytes);
        for _ in 0..100 {
            assert_eq!(wait(wal.append(batch(next, 20_000)).unwrap()), Ok(next));
            next += 1;
        }
        assert_eq!(drain(&mut wal.reader()), (1..next).collect::<Vec<_>>());
        assert_eq!(wal.status().quarantined_segments, 0);
        wal.close();
    }
}

/// What is left of a batch that was durable is kept for whoever finds the rest.
#[test]
fn a_first_chunk_that_was_durable_and_lost_its_end_is_set_aside() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    assert_eq!(wait(wal.append(batch(1, 2000)).unwrap()), Ok(1));
    wal.close();
    drop(wal);
    (1..small_shape().slots).for_each(|slot| store.damage(1, slot, Vec::clear));
    let wal = open_memory(&store);
    assert_eq!(wal.status().quarantined_segments, 1);
    assert_eq!(wait(wal.append(batch(2, 8)).unwrap()), Ok(2));
    assert_eq!(drain(&mut wal.reader()), [2]);
    assert_eq!(wal.status().lost_batches, 1);
    wal.close();
}

/// A few bytes spoil a chunk of many records. Should the disk read them one day, they must not meet others of the same sequence.
#[test]
fn a_sequence_that_the_disk_may_hide_is_not_used_again() {
    for unreadable_from in [1, 0] {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        assert_eq!(wait(wal.append(batch(1, 8)).unwrap()), Ok(1));
        until("the tail is saved", || wal.status().next_sequence == 2);
        // The process is killed: what it saved of the tail is old.
        store.set_faults(Faults { put_fails: true, ..Faults::default() });
        let gate = store.sync_gate();
        let held = gate.lock().unwrap();
        let commits: Vec<_> = (2..=9).map(|number| wal.append(batch(number, 8)).unwrap()).collect();
        drop(held);
        assert_eq!(commits.into_iter().map(|commit| wait(commit).unwrap()).last(), Some(9));
        wal.close();
        drop(wal);

        store.set_faults(Faults { unreadable: Some((1, unreadable_from)), ..Faults::default() });
        let wal = open_memory(&store);
        let next = wait(wal.append(batch(10, 8)).unwrap()).unwrap();
        assert!(next > 9, "{next}, unreadable from slot {unreadable_from}");
        wal.close();
        drop(wal);
        // The disk reads again.
        store.set_faults(Faults::default());
        let wal = open_memory(&store);
        let expected: Vec<u64> = if unreadable_from > 0 { (1..=10).collect() } else { vec![10] };
        assert_eq!(drain(&mut wal.reader()), expected);
        wal.close();
    }
}

#[test]
fn damage_in_the_newest_segment_is_set_aside_and_books_balance() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append_all(&wal, 1..=3, 10);
    wal.close();
    for slot in 0..3 {
        store.damage(1, slot, |value| value[50] ^= 1);
    }
    let metrics = Metrics::new();
    let config = WalConfig::default();
    let wal = Wal::open_in(&config, 1 << 20, small_shape(), Arc::new(store.clone()), metrics.clone(), None).unwrap();
    assert_eq!(store.quarantined().unwrap(), [1]);
    let mut reader = wal.reader();
    assert!(drain(&mut reader).is_empty());
    reader.rewind();
    assert!(drain(&mut reader).is_empty());
    assert_eq!(wal.status().pending_events, 0);
    assert!(metrics.handle().render().contains("ringtail_forward_dropped_events_total{reason=\"damaged\"} 3"));
    // New batches follow: no sequence is used again, and none is passed over.
    assert_eq!(wait(wal.append(batch(4, 10)).unwrap()), Ok(4));
    assert_eq!(drain(&mut reader), [4]);
    wal.close();
}

#[test]
fn delivered_segments_go_and_the_cursor_survives() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    for number in 1..=400 {
        wait(wal.append(batch(number, 100_000)).unwrap()).unwrap();
    }
    let before = wal.status();
    assert!(before.segments >= 6, "{before:?}");
    let mut reader = wal.reader();
    for _ in 0..399 {
        let record = reader.next_record().unwrap().unwrap();
        wal.deliver(record.end);
    }
    drop(reader);
    until("delivered segments are gone", || wal.status().segments <= 4);
    assert_eq!(wal.status().pending_batches, 1);
    wal.close();
    drop(wal);
    let wal = open_sled(directory.path(), 8 << 20);
    assert_eq!(drain(&mut wal.reader()), [400]);
    wal.close();
}

#[test]
fn sled_writes_each_byte_about_once_and_makes_no_blob_files() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    let (mut appended, count, bytes) = (0, 1200, 65_536);
    for number in 0..count {
        let batch = batch(number, bytes);
        appended += batch.request.as_bytes().len() as u64;
        wait(wal.append(batch).unwrap()).unwrap();
    }
    // The file's own blocks: what sled wrote and did not write over. A leaf or a chunk written twice would show.
    let shape = SegmentShape::new(8 << 20);
    let mut written = 0;
    let mut segments = 0;
    for entry in std::fs::read_dir(directory.path().join("wal")).unwrap() {
        let segment = entry.unwrap().path();
        written += std::fs::metadata(segment.join("db")).unwrap().len();
        assert_eq!(std::fs::read_dir(segment.join("blobs")).map_or(0, Iterator::count), 0, "a blob file");
        segments += 1;
    }
    // Each segment ends in a piece of sled's own segment that was not filled.
    let slack = segments * shape.sled_segment_bytes as u64;
    assert!(written - slack <= appended * 13 / 10, "{written} bytes for {appended}");
    wal.close();
}

#[test]
fn a_batch_of_any_size_makes_no_blob_file() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    let sled_segment_bytes = SegmentShape::new(8 << 20).sled_segment_bytes;
    let sizes = [sled_segment_bytes / 4, sled_segment_bytes, 3 * sled_segment_bytes];
    for (number, bytes) in (1..).zip(sizes) {
        assert_eq!(wait(wal.append(batch(number, bytes)).unwrap()), Ok(number));
        let segment = directory.path().join("wal/000000000001");
        assert_eq!(std::fs::read_dir(segment.join("blobs")).map_or(0, Iterator::count), 0, "{bytes} bytes");
    }
    assert_eq!(drain(&mut wal.reader()), [1, 2, 3]);
    wal.close();
}

#[test]
fn a_segment_that_takes_no_more_records_takes_no_more_disk_than_it_holds() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    wait(wal.append(batch(1, 10)).unwrap()).unwrap();
    wal.close();
    drop(wal);
    let file = || std::fs::metadata(directory.path().join("wal/000000000001/db")).unwrap();
    let reserved_bytes = SegmentShape::new(8 << 20).reserved_bytes;
    assert!(file().blocks() * 512 >= reserved_bytes && file().len() < reserved_bytes / 2, "{:?}", file());
    let wal = open_sled(directory.path(), 8 << 20);
    until("what is not used is given back", || file().blocks() * 512 <= file().len().next_multiple_of(4096));
    wal.close();
}

#[test]
fn a_log_is_open_once() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    let config = WalConfig { directory: directory.path().into(), ..WalConfig::default() };
    assert!(matches!(Wal::open(&config, 1, Metrics::new()), Err(super::OpenError::InUse { .. })));
    wal.close();
}

/// Commits batches until there is no room. How many those were.
fn fill(wal: &Wal) -> u64 {
    let mut committed = 0;
    loop {
        match wait(wal.append(batch(committed + 1, 400)).unwrap()) {
            Ok(_) => committed += 1,
            Err(error) => {
                assert_eq!(error, CommitError::Full);
                return committed;
            }
        }
    }
}

#[test]
fn a_log_without_file_descriptors_says_to_try_again_and_goes_on_once_there_are_some() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    store.set_faults(Faults { descriptors_short: true, ..Faults::default() });
    let committed = fill(&wal);
    assert!(wal.status().full && !wal.status().failed);
    store.set_faults(Faults::default());
    until("there is room again", || !wal.status().full);
    assert_eq!(wait(wal.append(batch(committed + 1, 400)).unwrap()), Ok(committed + 1));
    wal.close();
}

#[test]
fn a_full_log_says_so_and_goes_on_when_there_is_room() {
    let store = MemoryStore::default();
    store.set_faults(Faults { segments_max: Some(3), ..Faults::default() });
    let wal = open_memory(&store);
    let committed = fill(&wal);
    assert!(wal.status().full);
    assert_eq!(wal.append(batch(0, 400)).unwrap_err(), AppendError::Full);
    let mut reader = wal.reader();
    for number in 1..=committed {
        let record = reader.next_record().unwrap().unwrap();
        assert_eq!(super::tests::number(&record.batch), number);
        wal.deliver(record.end);
    }
    until("there is room again", || !wal.status().full);
    assert_eq!(wait(wal.append(batch(committed + 1, 400)).unwrap()), Ok(committed + 1));
    assert_eq!(drain(&mut reader), [committed + 1]);
    wal.close();
}

#[test]
fn a_failed_sync_ends_acking_for_good() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    wait(wal.append(batch(1, 10)).unwrap()).unwrap();
    await_spares(&wal);
    store.set_faults(Faults { sync_fails: true, ..Faults::default() });
    assert_eq!(wait(wal.append(batch(2, 10)).unwrap()), Err(CommitError::Poisoned));
    store.set_faults(Faults::default());
    assert_eq!(wal.append(batch(3, 10)).unwrap_err(), AppendError::Poisoned);
    assert!(wal.failed().is_cancelled());
    wal.close();
}

#[test]
fn a_panic_in_a_commit_ends_acking_for_good() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    wait(wal.append(batch(1, 10)).unwrap()).unwrap();
    store.set_faults(Faults { write_panics: true, ..Faults::default() });
    assert_eq!(wait(wal.append(batch(2, 10)).unwrap()), Err(CommitError::Poisoned));
    store.set_faults(Faults::default());
    until("the log has failed", || wal.failed().is_cancelled());
    assert_eq!(wal.append(batch(3, 10)).unwrap_err(), AppendError::Poisoned);
    wal.close();
}

/// Set in the process in which such a thread panics.
const IO_PANICS: &str = "RINGTAIL_TEST_IO_PANICS";

/// Whoever waits for it would wait for ever.
#[test]
fn a_panic_in_a_thread_of_sled_ends_the_process() {
    if std::env::var_os(IO_PANICS).is_some() {
        super::exit_on_store_panic();
        let thread = std::thread::Builder::new().name("sled-io-7".into());
        let _ = thread.spawn(|| panic!("as sled may")).unwrap().join();
        std::process::exit(7);
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "wal::tests::a_panic_in_a_thread_of_sled_ends_the_process", "--nocapture"]);
    let output = command.env(IO_PANICS, "1").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn too_many_waiting_bytes_are_refused() {
    let store = MemoryStore::default();
    let config = WalConfig::default();
    let wal = Wal::open_in(&config, 100, small_shape(), Arc::new(store), Metrics::new(), None).unwrap();
    assert!(matches!(wal.append(batch(1, 200)), Err(AppendError::Overloaded { limit: 100, .. })));
    wal.close();
    assert_eq!(wal.append(batch(1, 10)).unwrap_err(), AppendError::Stopping);
}

#[test]
fn damage_is_passed_and_counted() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append_all(&wal, 1..=40, 300);
    wal.close();
    store.damage(1, 3, |value| value[60] ^= 1);
    store.damage(2, 0, Vec::clear);
    store.forget_state("meta");
    let metrics = Metrics::new();
    let config = WalConfig::default();
    let wal = Wal::open_in(&config, 1 << 20, small_shape(), Arc::new(store.clone()), metrics.clone(), None).unwrap();
    let mut reader = wal.reader();
    let mut read = Vec::new();
    while let Some(record) = reader.next_record().unwrap() {
        read.push(number(&record.batch));
        wal.deliver(record.end);
    }
    assert_eq!(read.len(), 38, "{read:?}");
    assert!(read.is_sorted());
    assert!(!read.contains(&4));
    assert_eq!(wal.status().pending_events, 0);
    assert!(metrics.handle().render().contains("ringtail_forward_dropped_events_total{reason=\"damaged\"} 2"));
    wal.close();
    assert_eq!(store.quarantined().unwrap(), [1, 2]);
}

#[test]
fn a_batch_cut_short_by_a_crash_is_not_damage() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append_all(&wal, 1..=3, 10);
    // Four slots, of which the process wrote two before it died.
    wait(wal.append(batch(4, 1500)).unwrap()).unwrap();
    wal.close();
    store.damage(1, 5, Vec::clear);
    store.damage(1, 6, Vec::clear);
    store.forget_state("meta");
    let wal = open_memory(&store);
    assert_eq!(wait(wal.append(batch(5, 10)).unwrap()), Ok(4));
    let mut reader = wal.reader();
    for expected in [1, 2, 3, 5] {
        let record = reader.next_record().unwrap().unwrap();
        assert_eq!(number(&record.batch), expected);
        wal.deliver(record.end);
    }
    until("the first segment is trimmed", || !store.segments().unwrap().contains(&1));
    wal.close();
    assert!(store.quarantined().unwrap().is_empty());
}

pub(super) fn stored(wal: &Wal, batch: Batch) -> Stored {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(wal.append(batch).unwrap()).unwrap()
}

#[test]
fn a_retry_is_acked_and_not_stored_again_also_after_restart_delivery_and_trim() {
    let directory = tempfile::tempdir().unwrap();
    let mut wal = open_sled(directory.path(), 8 << 20);
    // Enough to fill and trim segments.
    for number in 1..=400 {
        wait(wal.append(batch(number, 100_000)).unwrap()).unwrap();
    }
    assert_eq!(stored(&wal, batch(400, 100_000)), Stored::Before);
    let mut reader = wal.reader();
    for _ in 0..390 {
        wal.deliver(reader.next_record().unwrap().unwrap().end);
    }
    drop(reader);
    until("delivered segments are gone", || wal.status().segments <= 4);
    for _ in 0..2 {
        for number in [1, 200, 389, 390, 391, 400] {
            assert_eq!(stored(&wal, batch(number, 100_000)), Stored::Before, "{number}");
        }
        wal.close();
        drop(wal);
        wal = open_sled(directory.path(), 8 << 20);
    }
    // Another name, another client, other events, or no name: not a retry.
    assert_eq!(stored(&wal, batch(401, 100)), Stored::New(crate::batch::Sequence(401)));
    assert_eq!(stored(&wal, batch(401, 101)), Stored::New(crate::batch::Sequence(402)));
    let mut other = batch(401, 100);
    other.client.id = "other".into();
    assert_eq!(stored(&wal, other), Stored::New(crate::batch::Sequence(403)));
    let nameless =
        proto::SendEventRequest { req_guid: String::new(), sent_time: None, events: vec![Default::default()] };
    let nameless = Request::parse(nameless.encode_to_vec().into()).unwrap();
    for sequence in [404, 405] {
        let batch = Batch { request: nameless.clone(), ..batch(0, 8) };
        assert_eq!(stored(&wal, batch), Stored::New(crate::batch::Sequence(sequence)));
    }
    for sequence in [406, 407] {
        let mut anonymous = batch(401, 100);
        anonymous.client.id = "".into();
        assert_eq!(stored(&wal, anonymous), Stored::New(crate::batch::Sequence(sequence)));
    }
    // An operator who puts a batch back means it.
    wait(wal.restore(batch(401, 100)).unwrap()).unwrap();
    assert_eq!(wal.status().next_sequence, 409);
    wal.close();
}

#[test]
fn equal_batches_in_flight_are_stored_once_and_share_their_fate() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for number in 1..=200 {
        let commits = [0; 3].map(|_| wal.append(batch(number, 10)).unwrap());
        let stored = commits.map(|commit| runtime.block_on(commit).unwrap());
        assert_eq!(stored, [Stored::New(crate::batch::Sequence(number)), Stored::Before, Stored::Before]);
    }
    assert_eq!(drain(&mut wal.reader()), (1..=200).collect::<Vec<_>>());
    await_spares(&wal);
    store.set_faults(Faults { sync_fails: true, ..Faults::default() });
    let commits: Vec<_> = (0..3).filter_map(|_| wal.append(batch(201, 10)).ok()).collect();
    assert!(!commits.is_empty());
    for commit in commits {
        assert_eq!(runtime.block_on(commit), Err(CommitError::Poisoned));
    }
    wal.close();
}

#[test]
fn a_retry_is_not_acked_before_the_first_is_durable() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    wait(wal.append(batch(1, 10)).unwrap()).unwrap();
    await_spares(&wal);
    let gate = store.sync_gate();
    let held = gate.lock().unwrap();
    let mut commits = vec![wal.append(batch(2, 10)).unwrap()];
    until("it is written and being synced", || wal.shared.sync_began.load(Ordering::Relaxed) != 0);
    commits.extend([0; 2].map(|_| wal.append(batch(2, 10)).unwrap()));
    for commit in &mut commits {
        assert_eq!(commit.now_or_never(), None, "acked before the sync");
    }
    store.set_faults(Faults { sync_fails: true, ..Faults::default() });
    drop(held);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for commit in commits {
        assert_eq!(runtime.block_on(commit), Err(CommitError::Poisoned));
    }
    wal.close();
}

/// The disk may have kept a later write and lost an earlier one, both of which nobody had an ack for.
#[test]
fn what_a_power_cut_leaves_behind_a_hole_is_cut_off_and_no_loss() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    wait(wal.append(batch(1, 10)).unwrap()).unwrap();
    let is_syncing = |wal: &Wal| wal.shared.sync_began.load(Ordering::Relaxed) != 0;
    await_spares(&wal);
    let gate = store.sync_gate();
    let held = gate.lock().unwrap();
    let mut commits = vec![wal.append(batch(2, 10)).unwrap()];
    until("it is written and being synced", || is_syncing(&wal));
    // The others wait, and are written as one group of two chunks: after the first one is synced, and before it is published,
    // the next sync is held up.
    commits.extend([3, 4].map(|number| wal.append(batch(number, 300)).unwrap()));
    let log = wal.shared.log();
    drop(held);
    until("it is synced", || !is_syncing(&wal));
    let held = gate.lock().unwrap();
    drop(log);
    until("the others are written and being synced", || is_syncing(&wal));
    let mut holes = 0;
    for _ in 0..100 {
        let store = store.after_power_cut(&mut rng);
        let slots = store.open(1).unwrap();
        holes += u32::from(slots.read(2).unwrap().is_empty() && !slots.read(3).unwrap().is_empty());
        let wal = open_memory(&store);
        let read = drain(&mut wal.reader());
        assert!([2, 3, 4].contains(&read.len()) && read == [1, 2, 3, 4][..read.len()], "{read:?}");
        assert_eq!(wal.losses(), []);
        // What comes now takes the place of what was cut off.
        assert_eq!(wait(wal.append(batch(5, 10)).unwrap()), Ok(read.len() as u64 + 1));
        wal.close();
        let wal = open_memory(&store);
        assert_eq!(drain(&mut wal.reader()), [&read[..], &[5]].concat());
        assert_eq!((wal.losses(), wal.status().quarantined_segments), (Vec::new(), 0));
        wal.close();
    }
    assert!(holes > 0, "no cut left a hole");
    drop(held);
    assert_eq!(commits.into_iter().map(wait).collect::<Vec<_>>(), [Ok(2), Ok(3), Ok(4)]);
    wal.close();
}

#[test]
fn a_refused_batch_is_not_a_known_one() {
    let store = MemoryStore::default();
    store.set_faults(Faults { segments_max: Some(0), ..Faults::default() });
    let wal = open_memory(&store);
    assert_eq!(wait(wal.append(batch(1, 10)).unwrap()), Err(CommitError::Full));
    assert_eq!(wal.append(batch(1, 10)).unwrap_err(), AppendError::Full);
    store.set_faults(Faults::default());
    until("there is room", || !wal.status().full);
    assert_eq!(wait(wal.append(batch(1, 10)).unwrap()), Ok(1));
    // Nor does a full log refuse a retry, which needs no room.
    store.set_faults(Faults { segments_max: Some(0), ..Faults::default() });
    let mut number = 1;
    while !wal.status().full {
        number += 1;
        let _ = wal.append(batch(number, 400)).map(wait);
    }
    assert_eq!(stored(&wal, batch(1, 10)), Stored::Before);
    wal.close();
}

#[test]
fn the_window_forgets_by_count_and_by_age() {
    let store = MemoryStore::default();
    let dedup = DedupConfig { entries_max: 10, age_max: Duration::from_secs(5), ..DedupConfig::default() };
    let config = WalConfig { dedup, ..WalConfig::default() };
    let open = || Wal::open_in(&config, 1 << 20, small_shape(), Arc::new(store.clone()), Metrics::new(), None).unwrap();
    let at = |number: u64, second: u64| Batch { received_at_ms: second * 1000, ..batch(number, 300) };
    let mut wal = open();
    for number in 1..=100 {
        assert_ne!(stored(&wal, at(number, 100)), Stored::Before);
    }
    for _ in 0..2 {
        for number in 91..=100 {
            assert_eq!(stored(&wal, at(number, 105)), Stored::Before, "{number}");
        }
        wal.close();
        wal = open();
    }
    assert_ne!(stored(&wal, at(90, 105)), Stored::Before);
    assert_eq!(stored(&wal, at(90, 110)), Stored::Before);
    assert_ne!(stored(&wal, at(100, 106)), Stored::Before);
    wal.close();
    let config = WalConfig { dedup: DedupConfig { enabled: false, ..config.dedup }, ..config };
    let wal = Wal::open_in(&config, 1 << 20, small_shape(), Arc::new(store), Metrics::new(), None).unwrap();
    for _ in 0..2 {
        assert_ne!(stored(&wal, at(1, 110)), Stored::Before);
    }
    wal.close();
}

/// A kill or a full disk while sled opens leaves such a file, and no later open would succeed.
#[test]
fn an_unfinished_snapshot_does_not_keep_the_log_shut() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    wait(wal.append(batch(1, 100)).unwrap()).unwrap();
    let id = 1u64.to_be_bytes();
    wal.parked().put(&id, b"parked").unwrap();
    wal.close();
    drop(wal);
    for database in ["wal/000000000001", "meta", "parked/000000000001"] {
        std::fs::write(directory.path().join(database).join("snap.7FFFFFFFFFFFFFFF.generating"), b"").unwrap();
    }
    let wal = open_sled(directory.path(), 8 << 20);
    assert_eq!(drain(&mut wal.reader()), [1]);
    assert!(wal.parked().visit(&mut |_, value| assert_eq!(value, b"parked")).unwrap());
    assert_eq!(wal.parked().last_key().unwrap().unwrap(), id);
    assert_eq!(std::fs::read_dir(directory.path().join("quarantine")).unwrap().count(), 0);
    wal.close();
}

#[test]
fn the_small_maps_make_no_blob_files() {
    let directory = tempfile::tempdir().unwrap();
    let store = SledStore::new(directory.path(), SegmentShape::new(8 << 20)).unwrap();
    let state = store.state("meta").unwrap();
    let value = vec![7; STATE_VALUE_BYTES_MAX];
    for number in 0..400u64 {
        state.put(&number.to_be_bytes(), &value).unwrap();
        if number >= 100 {
            state.remove(&(number - 100).to_be_bytes()).unwrap();
        }
        state.sync().unwrap();
        assert_eq!(std::fs::read_dir(directory.path().join("meta/blobs")).map_or(0, Iterator::count), 0, "{number}");
    }
    // What is removed is used again.
    let bytes = std::fs::metadata(directory.path().join("meta/db")).unwrap().len();
    assert!(bytes < 64 << 20, "{bytes}");
}

/// sled may recover a log that is shorter than it was: only the next segment shows it, when this one is read and delivered.
#[test]
fn a_segment_that_lost_its_end_is_kept_also_after_a_restart() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    append_all(&wal, 1..=40, 300);
    wal.close();
    (4..12).for_each(|slot| store.damage(1, slot, Vec::clear));
    // The process ends after the cursor was saved, and before the segment was set aside.
    let wal = open_memory(&store);
    store.set_faults(Faults { housekeeping_fails: true, ..Faults::default() });
    let mut reader = wal.reader();
    while let Some(record) = reader.next_record().unwrap() {
        wal.deliver(record.end);
    }
    let losses = wal.losses();
    assert_eq!((losses.len(), losses[0].first_sequence, losses[0].segment), (1, 5, 1), "{losses:?}");
    drop(reader);
    wal.close();
    store.set_faults(Faults::default());
    assert!(store.quarantined().unwrap().is_empty());
    let wal = open_memory(&store);
    assert_eq!((wal.status().pending_batches, wal.losses()), (0, losses));
    wal.close();
    assert_eq!(store.quarantined().unwrap(), [1]);
}

#[test]
fn what_sled_would_take_for_an_empty_log_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    append_all(&wal, 1..=3, 10);
    wal.close();
    drop(wal);
    let db = directory.path().join("wal/000000000001/db");
    let mut bytes = std::fs::read(&db).unwrap();
    // The header of sled's first segment: sled takes it for free space, and the log for empty.
    bytes[..20].fill(0);
    std::fs::write(&db, bytes).unwrap();
    let wal = open_sled(directory.path(), 8 << 20);
    assert_eq!(drain(&mut wal.reader()), [1, 2, 3]);
    assert_eq!((wal.status().quarantined_segments, wal.status().lost_batches), (0, 0));
    wal.close();
}

#[test]
fn a_first_chunk_that_the_power_tore_is_no_damage() {
    let torn = || *b"RTC1 and no more";
    for (begun, saved) in [(false, false), (true, false), (true, true)] {
        let store = MemoryStore::default();
        let wal = open_memory(&store);
        if begun {
            wait(wal.append(batch(1, 10)).unwrap()).unwrap();
        }
        wal.close();
        let wal = open_memory(&store);
        store.set_faults(Faults { put_fails: !saved, ..Faults::default() });
        let sequence = wait(wal.append(batch(2, 10)).unwrap()).unwrap();
        let segment = wal.shared.log().active.unwrap().0;
        wal.close();
        store.set_faults(Faults::default());
        store.damage(segment, 0, |value| *value = torn().into());
        let wal = open_memory(&store);
        // What was saved as durable is damaged; what was not was never acked, as far as anybody knows.
        assert_eq!(store.quarantined().unwrap().len(), usize::from(saved), "begun: {begun}");
        assert_eq!(wait(wal.append(batch(3, 10)).unwrap()), Ok(sequence + u64::from(saved)));
        wal.close();
    }
}

/// No older segment is left that shows where the log ends: only the cursor does.
#[test]
fn a_first_chunk_that_the_power_tore_behind_delivered_records_is_no_damage() {
    let store = MemoryStore::default();
    let wal = open_memory(&store);
    wait(wal.append(batch(1, 10)).unwrap()).unwrap();
    wal.close();
    let wal = open_memory(&store);
    let record = wal.reader().next_record().unwrap().unwrap();
    wal.deliver(record.end);
    until("it is trimmed", || !store.segments().unwrap().contains(&1));
    store.set_faults(Faults { put_fails: true, ..Faults::default() });
    assert_eq!(wait(wal.append(batch(2, 10)).unwrap()), Ok(2));
    let segment = wal.shared.log().active.unwrap().0;
    wal.close();
    store.set_faults(Faults::default());
    store.damage(segment, 0, |value| *value = b"RTC1 and no more".into());
    let wal = open_memory(&store);
    assert_eq!((store.quarantined().unwrap(), wal.losses()), (Vec::new(), Vec::new()));
    assert_eq!(wait(wal.append(batch(3, 10)).unwrap()), Ok(2));
    wal.close();
}
