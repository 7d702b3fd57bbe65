//! `ringtail parked` on a log that no service has open.

#[path = "support/parked.rs"]
mod parked;
#[path = "support/small_log.rs"]
mod small_log;

use std::process::{Command, Output};

use parked::about;
use ringtail::forward::{ParkReason, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;
use small_log::small_log;

fn parked(arguments: &[&str], directory: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.arg("parked").args(arguments).args(["--directory", directory]).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn what_was_parked_is_listed_and_exported_offline() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let missing = parked(&["list"], path);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("there is no log"), "{}", text(&missing.stderr));
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 0, "looking made something");

    let wal = Wal::open(&small_log(directory.path()), 1 << 20, Metrics::new()).unwrap();
    let store = ParkedStore::open(wal.parked()).unwrap();
    store.park(&about("a", ParkReason::TooLarge), b"hello").unwrap();
    store.park(&about("b", ParkReason::TooLarge), b"there").unwrap();
    store.sync().unwrap();
    let in_use = parked(&["list"], path);
    assert_eq!(in_use.status.code(), Some(1), "{}", text(&in_use.stdout));
    wal.close();
    drop((store, wal));

    let listed = text(&parked(&["list"], path).stdout);
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(listed.contains("too_large") && listed.contains("device-7"), "{listed}");
    let exported = parked(&["export", "--topic", "b"], path);
    assert_eq!(exported.status.code(), Some(0), "{}", text(&exported.stderr));
    let event: serde_json::Value = serde_json::from_slice(&exported.stdout).unwrap();
    assert_eq!(event["topic"], "b");
    assert_eq!(event["payload"], "dGhlcmU=");
}
