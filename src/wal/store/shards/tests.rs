use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

use tempfile::TempDir;

use super::super::files::disk_bytes;
use super::super::remove_files;
use super::*;

/// A shard holds so much, and five of the values.
const SMALL_SHARD_BYTES: u64 = 5000;
const VALUE: [u8; 1000] = [7; 1000];
const JOURNAL: &[u8] = &[0];

fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("quarantine")).unwrap();
    directory
}

/// As the service opens it: read through, until it is whole.
fn open(directory: &TempDir) -> ShardedState {
    let state = ShardedState::open(directory.path(), "parked", SMALL_SHARD_BYTES).unwrap();
    while !state.visit(&mut |_, _| {}).unwrap() {}
    state
}

fn key(id: u64, part: u16) -> Vec<u8> {
    [&id.to_be_bytes()[..], &part.to_be_bytes()].concat()
}

fn put(state: &dyn StateDb, ids: RangeInclusive<u64>) {
    for id in ids {
        state.put(&key(id, 0), &VALUE).unwrap();
    }
    state.sync().unwrap();
}

/// Ids 1 to 17, in four shards, and a journal.
fn filled(directory: &TempDir) -> ShardedState {
    let state = open(directory);
    put(&state, 1..=17);
    state.put(JOURNAL, b"first").unwrap();
    state.sync().unwrap();
    state
}

fn ids(state: &dyn StateDb) -> Vec<u64> {
    let entries = state.scan(&key(0, 0), usize::MAX).unwrap();
    entries.iter().map(|(key, value)| (assert_eq!(value, &VALUE), id_of(key)).1).collect()
}

fn names(directory: &TempDir, of: &str) -> Vec<String> {
    let entries = fs::read_dir(directory.path().join(of)).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn shard_names(firsts: &[u64]) -> Vec<String> {
    firsts.iter().map(|first| format!("{first:012}")).collect()
}

fn flip_first_byte(directory: &TempDir, first: u64) {
    let path = directory.path().join(format!("parked/{first:012}"));
    // Without its snapshot all is in the log, whose first byte decides.
    remove_files(&path, |name| name.starts_with("snap.")).unwrap();
    let mut bytes = fs::read(path.join("db")).unwrap();
    bytes[0] ^= 1;
    fs::write(path.join("db"), bytes).unwrap();
}

#[test]
fn entries_are_spread_over_shards_and_come_back_in_order() {
    let directory = directory();
    drop(filled(&directory));
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16]));
    let state = open(&directory);
    assert_eq!(ids(&state), (1..=17).collect::<Vec<_>>());
    assert_eq!(state.get(&key(7, 0)).unwrap().as_deref(), Some(&VALUE[..]));
    assert_eq!(state.get(&key(7, 1)).unwrap(), None);
    assert_eq!(state.get(JOURNAL).unwrap().as_deref(), Some(&b"first"[..]));
    assert_eq!(state.last_key().unwrap(), Some(key(17, 0)));
    let some = state.scan(&key(4, 1), 3).unwrap();
    assert_eq!(some.iter().map(|(key, _)| id_of(key)).collect::<Vec<_>>(), [5, 6, 7]);
    assert_eq!(state.scan(&[], 1).unwrap()[0].0, JOURNAL);
    let mut seen = Vec::new();
    assert!(state.visit(&mut |key, value| seen.push((id_of(key), value.len()))).unwrap());
    assert_eq!(seen, [(HEAD, 5)].into_iter().chain((1..=17).map(|id| (id, 1000))).collect::<Vec<_>>());
    // The newest one is known to hold two.
    put(&state, 18..=21);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16, 21]));
}

#[test]
fn few_are_open_and_all_parts_of_an_id_are_in_one() {
    let directory = directory();
    let state = filled(&directory);
    for id in [1, 9, 12, 3, 17] {
        state.get(&key(id, 0)).unwrap();
        let shards = state.shards();
        assert_eq!(shards.open.iter().filter(|(first, _)| *first != HEAD).count(), OPEN_MAX);
        assert!(shards.open.iter().any(|(first, _)| *first == 16), "the newest one stays open");
    }
    for part in (0..10).rev() {
        state.put(&key(18, part), &VALUE).unwrap();
    }
    // An id that is given out again goes where it was.
    state.put(&key(18, 0), &VALUE).unwrap();
    state.put(&key(4, 0), &VALUE).unwrap();
    put(&state, 19..=19);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16, 19]));
}

#[test]
fn what_is_closed_holds_the_disk_that_opening_its_log_fills_up() {
    let directory = directory();
    let state = filled(&directory);
    let disk = |first: u64| disk_bytes(&directory.path().join(format!("parked/{first:012}"))).unwrap();
    let before = [1, 6].map(disk);
    assert!(before.iter().all(|bytes| *bytes >= STATE_SLED_SEGMENT_BYTES as u64), "{before:?}");
    assert!(disk(16) < STATE_SLED_SEGMENT_BYTES as u64, "it is open");
    drop(state);
    drop(open(&directory));
    // But for what is said of what was read.
    assert!(before.iter().zip([1, 6].map(disk)).all(|(before, after)| after <= before + (16 << 10)));
}

#[test]
fn what_becomes_empty_is_removed_and_no_id_is_given_out_again() {
    let directory = directory();
    let state = filled(&directory);
    let remove = |state: &ShardedState, ids: RangeInclusive<u64>| {
        ids.for_each(|id| state.remove(&key(id, 0)).unwrap());
        state.sync().unwrap();
    };
    remove(&state, 7..=10);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16]));
    remove(&state, 6..=6);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 11, 16]));
    assert_eq!(state.get(&key(7, 0)).unwrap(), None);
    // Also those that were closed before the sync.
    remove(&state, 1..=17);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 16]));
    drop(state);
    let state = open(&directory);
    assert_eq!(ids(&state), Vec::<u64>::new());
    assert_eq!(state.last_key().unwrap().map(|key| id_of(&key)), Some(15), "known by the name of the newest one");
    // The newest one goes when it is not the newest any more.
    put(&state, 18..=22);
    remove(&state, 18..=22);
    put(&state, 23..=23);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 23]));
}

#[test]
fn the_head_is_durable_before_anything_is_removed() {
    let directory = directory();
    let state = filled(&directory);
    state.put(JOURNAL, b"second").unwrap();
    assert!(state.shards().unsynced.contains(&HEAD));
    state.remove(&key(17, 0)).unwrap();
    assert_eq!(state.shards().unsynced, [16].into());
    // What is closed is durable.
    state.remove(&key(1, 0)).unwrap();
    state.remove(&key(6, 0)).unwrap();
    assert_eq!(state.shards().unsynced, [6, 16].into());
    state.sync().unwrap();
    assert_eq!(state.shards().unsynced, BTreeSet::new());
}

#[test]
fn what_is_put_after_something_was_missed_is_in_a_shard_of_its_own() {
    let directory = directory();
    drop(filled(&directory));
    let state = open(&directory);
    assert_eq!(state.leave_newest(18).unwrap(), 18);
    drop(state);
    // Also in a later life.
    let state = open(&directory);
    assert_eq!(state.last_key().unwrap().map(|key| id_of(&key)), Some(17));
    put(&state, 18..=18);
    state.put(&key(17, 1), &VALUE).unwrap();
    put(&state, 19..=20);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16, 18]));
    assert_eq!(state.shards().last_key_of(16).unwrap(), Some(key(17, 1)));
}

#[test]
fn an_id_is_not_put_into_a_shard_that_came_back_empty_and_has_its_name() {
    let directory = directory();
    let state = open(&directory);
    put(&state, 1..=1);
    state.remove(&key(1, 0)).unwrap();
    state.sync().unwrap();
    drop(state);
    let state = open(&directory);
    let first = 1 + SMALL_SHARD_BYTES;
    assert_eq!((state.leave_newest(1).unwrap(), state.leave_newest(first).unwrap()), (first, first));
    drop(state);
    let state = open(&directory);
    assert_eq!(state.last_key().unwrap().map(|key| id_of(&key)), Some(first - 1));
    put(&state, first..=first);
    assert_eq!(names(&directory, "parked"), shard_names(&[1, first]));
    assert_eq!(state.shards().last_key_of(1).unwrap(), None);
    drop(state);
    // One that took the place of a damaged one is left to nobody else.
    flip_first_byte(&directory, first);
    let (state, next) = (open(&directory), first + SMALL_SHARD_BYTES);
    assert_eq!(state.leave_newest(next).unwrap(), next);
    assert_eq!(names(&directory, "parked"), shard_names(&[1, next]));
}

#[test]
fn a_shard_that_cannot_be_left_stays_as_it_is() {
    let directory = directory();
    drop(filled(&directory));
    let state = open(&directory);
    // The next one's place is taken.
    let place = directory.path().join("parked/000000000018");
    fs::write(&place, b"").unwrap();
    assert!(state.leave_newest(18).is_err());
    fs::remove_file(&place).unwrap();
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16]));
    assert_eq!(state.leave_newest(18).unwrap(), 18);
    assert_eq!(ids(&state), (1..=17).collect::<Vec<_>>());
}

#[test]
fn a_damaged_shard_is_set_aside_alone() {
    let directory = directory();
    drop(filled(&directory));
    flip_first_byte(&directory, 6);
    let state = ShardedState::open(directory.path(), "parked", SMALL_SHARD_BYTES).unwrap();
    assert!(state.scan(&key(6, 0), 1).unwrap_err().is_damage(), "no one takes it for an empty one");
    assert!(!state.visit(&mut |_, _| {}).unwrap());
    assert!(state.visit(&mut |_, _| {}).unwrap());
    assert_eq!(ids(&state), (1..=5).chain(11..=17).collect::<Vec<_>>());
    assert_eq!(names(&directory, "quarantine"), ["parked-1"]);
    drop(state);
    // In the place of the newest one another begins, and so do the ids.
    flip_first_byte(&directory, 16);
    let state = open(&directory);
    assert_eq!(ids(&state), (1..=5).chain(11..=15).collect::<Vec<_>>());
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 11, 16 + SMALL_SHARD_BYTES]));
    drop(state);
    // All before it are gone as well.
    [1, 11].iter().for_each(|first| flip_first_byte(&directory, *first));
    let state = open(&directory);
    let next = state.last_key().unwrap().map_or(1, |key| id_of(&key) + 1);
    assert!(next > 17, "an id that the damaged one held comes again");
    assert_eq!(state.get(JOURNAL).unwrap().as_deref(), Some(&b"first"[..]));
    put(&state, next..=next);
    drop(state);
    // The head takes nothing with it.
    flip_first_byte(&directory, HEAD);
    let state = open(&directory);
    assert_eq!((state.get(JOURNAL).unwrap(), ids(&state)), (None, vec![next]));
    assert_eq!(names(&directory, "quarantine").len(), 5);
}

#[test]
fn a_shard_without_its_files_is_damaged_and_one_without_its_marker_is_not() {
    let directory = directory();
    drop(filled(&directory));
    fs::remove_file(directory.path().join("parked/000000000001/READY")).unwrap();
    fs::remove_file(directory.path().join("parked/000000000006/db")).unwrap();
    // Half made, and half removed.
    fs::create_dir(directory.path().join("parked/000000000018")).unwrap();
    fs::create_dir(directory.path().join("parked/000000000011.removed")).unwrap();
    fs::write(directory.path().join("parked/000000000011.removed/db"), b"rest").unwrap();
    let state = open(&directory);
    assert_eq!(ids(&state), (1..=5).chain(11..=17).collect::<Vec<_>>());
    assert_eq!(names(&directory, "quarantine"), ["parked-1"]);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 11, 16, 18]));
    put(&state, 18..=18);
    drop(state);
    assert_eq!(ids(&open(&directory)), (1..=5).chain(11..=18).collect::<Vec<_>>());
}

#[test]
fn an_error_in_one_shard_is_counted_and_keeps_nobody_from_the_others() {
    let directory = directory();
    let state = filled(&directory);
    let fail = |first| {
        let mut shards = state.shards();
        let failed =
            shards.shard(first).unwrap().with("fail", |_| Err::<(), _>(sled::Error::ReportableBug("x".into())));
        assert!(failed.is_err());
    };
    fail(1);
    assert_eq!(state.reopened(), 1);
    fail(16);
    assert_eq!((state.reopened(), ids(&state).len()), (2, 17));
    // It fails when it is to be closed.
    state.remove(&key(1, 0)).unwrap();
    fail(1);
    fs::write(directory.path().join("parked/000000000001/conf"), b"").unwrap();
    fs::remove_file(directory.path().join("parked/000000000001/db")).unwrap();
    fs::create_dir(directory.path().join("parked/000000000001/db")).unwrap();
    assert!(state.get(&key(6, 0)).is_err());
    assert!(state.get(&key(6, 0)).unwrap().is_some());
    put(&state, 18..=18);
    assert!(state.get(&key(1, 0)).is_err());
}

#[test]
fn a_shard_that_cannot_be_made_durable_is_not_closed_in_silence() {
    let directory = directory();
    let state = filled(&directory);
    state.put(&key(1, 1), &VALUE).unwrap();
    let nowhere = fs::File::open("/dev/null").unwrap();
    let break_sync = |(_, file): &(sled::Db, fs::File)| {
        // SAFETY: both descriptors are open, and the file's own stays its own.
        unsafe { libc::dup2(nowhere.as_raw_fd(), file.as_raw_fd()) };
        Ok(())
    };
    state.shards().shard(1).unwrap().with("break", break_sync).unwrap();
    assert!(state.get(&key(6, 0)).is_err(), "it takes the place of the other one");
    assert_eq!(state.reopened(), 1);
    assert!(state.get(&key(6, 0)).unwrap().is_some());
}

/// A map of one Db, with ids 1 to 7.
fn old(directory: &TempDir) {
    let state = SledState::open(directory.path(), "parked").unwrap();
    put(&state, 1..=7);
    state.put(JOURNAL, b"old").unwrap();
    state.sync().unwrap();
}

fn check_taken_over(directory: &TempDir) {
    for _ in 0..2 {
        let state = open(directory);
        assert_eq!(ids(&state), (1..=7).collect::<Vec<_>>());
        assert_eq!(state.get(JOURNAL).unwrap().as_deref(), Some(&b"old"[..]));
        let keys: Vec<_> = state.scan(&[], 2).unwrap().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, [JOURNAL.to_vec(), key(1, 0)], "the journal shows once");
        assert_eq!(names(directory, ""), ["parked", "quarantine"]);
        assert_eq!(names(directory, "parked"), shard_names(&[0, 1]));
    }
    let state = open(directory);
    state.put(JOURNAL, b"new").unwrap();
    put(&state, 8..=8);
    (1..=7).for_each(|id| state.remove(&key(id, 0)).unwrap());
    state.sync().unwrap();
    assert_eq!(names(directory, "parked"), shard_names(&[0, 8]), "its journal does not keep it");
    drop(state);
    let state = open(directory);
    assert_eq!((ids(&state), state.get(JOURNAL).unwrap().unwrap()), (vec![8], b"new".to_vec()));
    assert_eq!(names(directory, "quarantine"), Vec::<String>::new());
}

#[test]
fn a_map_of_one_db_becomes_the_first_shard() {
    let whole = directory();
    old(&whole);
    check_taken_over(&whole);
    // After a crash in between.
    for is_made in [false, true] {
        let half = directory();
        old(&half);
        fs::rename(half.path().join("parked"), half.path().join("parked.old")).unwrap();
        if is_made {
            fs::create_dir(half.path().join("parked")).unwrap();
        }
        check_taken_over(&half);
    }
    // Its journal is not taken twice.
    let twice = directory();
    old(&twice);
    drop(open(&twice));
    let state = open(&twice);
    state.put(JOURNAL, b"new").unwrap();
    state.sync().unwrap();
    drop(state);
    assert_eq!(open(&twice).get(JOURNAL).unwrap().as_deref(), Some(&b"new"[..]));
}

#[test]
fn what_an_older_version_kept_beside_the_shards_is_set_aside() {
    let directory = directory();
    drop(filled(&directory));
    old(&directory);
    let state = open(&directory);
    assert_eq!(ids(&state), (1..=17).collect::<Vec<_>>());
    assert_eq!(names(&directory, "quarantine"), ["parked-1"]);
    assert_eq!(names(&directory, ""), ["parked", "quarantine"]);
    let aside = SledState::open(&directory.path().join("quarantine"), "parked-1").unwrap();
    assert_eq!(ids(&aside), (1..=7).collect::<Vec<_>>());
}

#[test]
fn a_read_removes_no_shard() {
    let directory = directory();
    let state = filled(&directory);
    put(&state, 18..=20);
    (16..=20).for_each(|id| state.remove(&key(id, 0)).unwrap());
    state.sync().unwrap();
    // The next one begins, and is not durable yet: the empty one may go from now on.
    state.put(&key(21, 0), &VALUE).unwrap();
    let expected: Vec<u64> = (1..=15).chain([21]).collect();
    assert_eq!(ids(&state), expected);
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 16, 21]));
    state.sync().unwrap();
    assert_eq!(names(&directory, "parked"), shard_names(&[0, 1, 6, 11, 21]));
    assert_eq!(ids(&state), expected);
}

#[test]
fn a_map_that_is_there_twice_is_taken_over_once() {
    let directory = directory();
    old(&directory);
    drop(open(&directory));
    fs::create_dir(directory.path().join("parked.old")).unwrap();
    fs::write(directory.path().join("parked.old/db"), b"again").unwrap();
    let state = open(&directory);
    assert_eq!(names(&directory, "quarantine"), ["parked-1"]);
    assert!(!ids(&state).is_empty());
}
