//! What is missing of the parked store is said and counted, to the event, and nothing else is.

use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use ringtail::wal::open_parked;

use super::environment::number_from_environment;
use super::*;

const DAMAGED: &str = "ringtail_forward_parked_dropped_events_total{reason=\"damaged\"}";

impl Setup {
    /// Parks so many events, of which each is one of several bytes or of several parts, and ends the process cleanly.
    fn after_parking(self, events: u64) -> Setup {
        let forwarder = self.start();
        for at in 0..events {
            self.send("client", &[("not a topic", vec![at as u8; if at % 10 == 0 { 100_000 } else { 1000 }])]);
        }
        self.wait_for_empty_log(&forwarder);
        forwarder.stop(DEADLINE);
        drop(forwarder);
        self.reopened_after(|_| {})
    }

    /// What stands in the quarantine.
    fn set_aside(&self) -> usize {
        std::fs::read_dir(self._directory.path().join("quarantine")).unwrap().count()
    }

    /// What a start counts as lost of the parked store; the next one counts nothing more.
    fn lost_of_parked(&self) -> u64 {
        let forwarder = self.start();
        let lost = self.metric(DAMAGED);
        assert_eq!(forwarder.parked().lost(), lost);
        assert_eq!(self.metric("ringtail_forward_dropped_events_total"), 0, "it left the log's books");
        forwarder.stop(DEADLINE);
        drop(forwarder);
        let forwarder = self.start();
        assert_eq!((self.metric(DAMAGED), forwarder.parked().lost()), (lost, 0), "it is said twice");
        forwarder.stop(DEADLINE);
        lost
    }
}

fn shard(directory: &Path, first: u64) -> PathBuf {
    directory.join(format!("parked/{first:012}/db"))
}

fn flip(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

/// Drops events as `ringtail parked drop` does on a stopped log.
fn drop_offline(directory: &Path, ids: &[u64]) {
    let opened = open_parked(directory).unwrap();
    let store = ParkedStore::open_offline(opened.state.clone(), opened.notes().unwrap()).unwrap();
    assert_eq!(store.drop_events(ids, ParkedDropReason::Operator).unwrap().events, ids.len() as u64);
}

#[test]
fn parked_events_that_vanish_are_reported_and_counted() {
    let setup = Setup::new().after_parking(2);
    let store = ParkedStore::open(setup.wal.parked()).unwrap();
    assert_eq!((store.count(), setup.wal.parked_notes().noted().books.ever), (2, 2));
    // Taken out by the operator, and lost.
    store.drop_events(&[2], ParkedDropReason::Operator).unwrap();
    setup.wal.parked().remove(&[&1u64.to_be_bytes()[..], &[0, 0]].concat()).unwrap();
    assert_eq!(setup.lost_of_parked(), 1);
    assert_eq!(setup.wal.parked_notes().noted().books, ParkedBooks { ever: 1, removed: 1 });
}

#[test]
fn parked_events_that_are_set_aside_as_damaged_are_counted() {
    fn damage(directory: &Path) {
        std::fs::remove_file(shard(directory, 1)).unwrap();
    }
    /// It is set aside by a process that is killed before it counts.
    fn damage_and_kill(directory: &Path) {
        damage(directory);
        let wal = Wal::open(&small_log(directory), 64 << 20, Metrics::new()).unwrap();
        assert_eq!(ParkedStore::open(wal.parked()).unwrap().count(), 0);
        wal.close();
    }
    fn remove(directory: &Path) {
        std::fs::remove_dir_all(directory.join("parked")).unwrap();
    }
    type Between = fn(&Path);
    let cases: [(Between, u64); 3] = [(damage, 2), (damage_and_kill, 2), (remove, 0)];
    for (between, lost) in cases {
        let setup = Setup::new().after_parking(2).reopened_after(between);
        assert_eq!(setup.lost_of_parked(), lost);
        assert_eq!(setup.wal.parked_notes().noted().books, ParkedBooks::default());
        wait_until("it is seen", || setup.wal.status().quarantined_stores == u64::from(lost > 0));
    }
}

/// Nothing is left but the shard's mark, and nothing is set aside.
#[test]
fn a_shard_that_comes_back_empty_is_missed() {
    let setup = Setup::new();
    // The shard is made, and its mark stands in a snapshot, before anything is parked.
    let first = [&1u64.to_be_bytes()[..], &[0, 0]].concat();
    setup.wal.parked().put(&first, b"").unwrap();
    setup.wal.parked().remove(&first).unwrap();
    setup.wal.parked().sync().unwrap();
    let setup = setup.reopened_after(|_| {}).after_parking(0).after_parking(5);
    let setup = setup.reopened_after(|directory| flip(&shard(directory, 1), 0));
    assert_eq!((setup.lost_of_parked(), setup.parked().len()), (5, 0));
    assert_eq!(setup.set_aside(), 0);
    // The next one, in a later life, has the first id there was, if that is not left out.
    let setup = setup.reopened_after(|_| {}).after_parking(5);
    assert_eq!((setup.lost_of_parked(), setup.parked().len()), (0, 5));
    let names = std::fs::read_dir(setup._directory.path().join("parked")).unwrap();
    assert!(names.count() > 1, "it is where sled did not find what was there");
}

/// sled takes many a damaged log for a shorter one, and says nothing.
#[test]
fn a_shard_that_comes_back_shorter_is_missed() {
    const EVENTS: u64 = 40;
    let seed = number_from_environment("RINGTAIL_SEED").unwrap_or_else(|| rand::rng().random());
    println!("RINGTAIL_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    // Twice, so that some of them stand in a snapshot.
    let mut setup = Setup::new().after_parking(EVENTS / 2).after_parking(EVENTS / 2);
    let kept = tempfile::tempdir().unwrap();
    let mut shorter = 0;
    for round in 0..20 {
        setup = setup.reopened_after(|directory| {
            if round == 0 {
                copy_all(directory, &kept.path().join("log"));
            }
            std::fs::remove_dir_all(directory).unwrap();
            copy_all(&kept.path().join("log"), directory);
            let file = shard(directory, 1);
            let bytes = std::fs::metadata(&file).unwrap().len() as usize;
            // Most of it is not written yet.
            flip(&file, if round == 0 { 0 } else { rng.random_range(0..bytes / 4) });
        });
        let lost = setup.lost_of_parked();
        let held = ParkedStore::open(setup.wal.parked()).unwrap().count();
        assert_eq!(lost, EVENTS - held, "round {round}");
        shorter += u64::from(lost > 0 && setup.set_aside() == 0);
        println!("round {round}: {lost} lost");
        // What is parked from now on is not written where sled does not find it again; not in a later life either.
        if round % 2 == 0 {
            setup = setup.reopened_after(|_| {});
            assert_eq!(setup.lost_of_parked(), 0, "round {round}");
            setup = setup.reopened_after(|_| {});
        }
        setup = setup.after_parking(5);
        assert_eq!((setup.lost_of_parked(), setup.parked().len() as u64), (0, held + 5), "round {round}");
    }
    println!("{shorter} times it was shorter, and not set aside");
    assert!(shorter > 0, "at least when the first byte was flipped");
}

#[test]
fn what_was_removed_is_never_called_lost_when_the_head_is_damaged() {
    // The head alone knows what was removed, but for the log's books.
    let ways: [fn(&Path); 2] = [|file| std::fs::remove_file(file).unwrap(), |file| flip(file, 0)];
    for way in ways {
        let setup = Setup::new().after_parking(9);
        let forwarder = setup.start();
        forwarder.parked().drop_events(&[1, 2], ParkedDropReason::Operator).unwrap();
        forwarder.parked().remove(&[3]).unwrap();
        forwarder.stop(DEADLINE);
        drop(forwarder);
        let setup = setup.reopened_after(|directory| {
            drop_offline(directory, &[4]);
            way(&shard(directory, 0));
        });
        assert_eq!(setup.lost_of_parked(), 0);
        assert_eq!(setup.wal.parked_notes().noted().books, ParkedBooks { ever: 9, removed: 4 });
        let setup = setup.reopened_after(|directory| drop_offline(directory, &[5]));
        assert_eq!(setup.lost_of_parked(), 0);
        // Everything is gone at once.
        let setup = setup.reopened_after(|directory| [0, 1].iter().for_each(|first| way(&shard(directory, *first))));
        let lost = setup.lost_of_parked();
        assert_eq!(lost, 4 - setup.parked().len() as u64);
    }
}

/// The figures of an earlier log are none of this one's.
#[test]
fn a_new_log_beside_an_old_parked_store_misses_nothing() {
    for head_too in [false, true] {
        let setup = Setup::new().after_parking(5);
        let forwarder = setup.start();
        forwarder.parked().drop_events(&[1, 2], ParkedDropReason::Operator).unwrap();
        forwarder.stop(DEADLINE);
        drop(forwarder);
        let setup = setup.reopened_after(|directory| {
            std::fs::remove_dir_all(directory.join("meta")).unwrap();
            std::fs::remove_dir_all(directory.join("wal")).unwrap();
            if head_too {
                std::fs::remove_file(shard(directory, 0)).unwrap();
            }
        });
        assert_eq!(setup.lost_of_parked(), 0);
        let removed = if head_too { 0 } else { 2 };
        assert_eq!(setup.wal.parked_notes().noted().books, ParkedBooks { ever: 3 + removed, removed });
    }
}

/// They are no part of this version's books, and whole.
#[test]
fn what_an_older_version_parked_beside_the_shards_is_set_aside_and_not_lost() {
    let setup = Setup::new().after_parking(5).reopened_after(|directory| {
        // The shard once more, as the only Db of an older version.
        for file in std::fs::read_dir(directory.join("parked/000000000001")).unwrap().map(|file| file.unwrap().path()) {
            if file.is_file() {
                std::fs::copy(&file, directory.join("parked").join(file.file_name().unwrap())).unwrap();
            }
        }
    });
    assert_eq!(setup.lost_of_parked(), 0);
    let parked = setup.parked();
    assert_eq!(parked.len(), 5);
    // As the README says.
    let elsewhere = tempfile::tempdir().unwrap();
    copy_all(&setup._directory.path().join("quarantine/parked-1"), &elsewhere.path().join("parked"));
    let opened = open_parked(elsewhere.path()).unwrap();
    let store = ParkedStore::open_offline(opened.state.clone(), opened.notes().unwrap()).unwrap();
    assert_eq!(store.events(0).map(Result::unwrap).collect::<Vec<_>>(), parked);
}

fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, target) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy_all(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}
