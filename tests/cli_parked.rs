//! `ringtail parked` on a log that no service has open, and on a running service.

#[path = "support/http.rs"]
mod http;
#[path = "support/parked.rs"]
mod parked;
#[path = "support/process.rs"]
mod process;
#[path = "support/small_log.rs"]
mod small_log;

use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use parked::about;
use process::{Options, Process};
use ringtail::batch::Sequence;
use ringtail::config::WalConfig;
use ringtail::forward::{ParkReason, ParkedAbout, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::wal::Wal;
use serde_json::{Value, json};
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
    // What is set aside is such a part, or the whole store of an older version.
    let aside = tempfile::tempdir().unwrap();
    std::fs::create_dir(aside.path().join("wal")).unwrap();
    std::fs::create_dir(aside.path().join("parked")).unwrap();
    for file in
        std::fs::read_dir(directory.path().join("parked/000000000001")).unwrap().map(|file| file.unwrap().path())
    {
        if file.is_file() {
            std::fs::copy(&file, aside.path().join("parked").join(file.file_name().unwrap())).unwrap();
        }
    }
    assert_eq!(text(&parked(&["list"], aside.path().to_str().unwrap()).stdout), listed);
    let exported = parked(&["export", "--topic", "b"], path);
    assert_eq!(exported.status.code(), Some(0), "{}", text(&exported.stderr));
    let event: Value = serde_json::from_slice(&exported.stdout).unwrap();
    assert_eq!(event["topic"], "b");
    assert_eq!(event["payload"], "dGhlcmU=");
}

/// A log with six parked events, and its directory.
fn log_with_events() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap().to_owned();
    let config = WalConfig { directory: (&path).into(), free_bytes_min: ByteSize::b(0), ..WalConfig::default() };
    let wal = Wal::open(&config, 1 << 20, Metrics::new()).unwrap();
    let store = ParkedStore::open(wal.parked()).unwrap();
    let payloads: [&[u8]; 6] = [b"one", b"two\nlines", b"\xff\x00", b"{\"a\":1}", b"", b"\x1b[31mred"];
    for (number, payload) in payloads.iter().enumerate() {
        let number = number as u64;
        let topic = if number.is_multiple_of(2) { "even" } else { "odd" };
        let about = ParkedAbout {
            key: (number == 1).then(|| "the key".into()),
            group: "g".into(),
            connection_id: format!("device-{number}"),
            sequence: Sequence(number),
            received_at_ms: 1_700_000_000_000 + number * 1000,
            ..about(topic, if number < 3 { ParkReason::TooLarge } else { ParkReason::UnknownTopic })
        };
        store.park(&about, payload).unwrap();
    }
    store.sync().unwrap();
    wal.close();
    (directory, path)
}

fn ids(arguments: &[&str], directory: &str) -> Vec<u64> {
    let listed = parked(&[&["list", "--json"], arguments].concat(), directory);
    assert_eq!(listed.status.code(), Some(0), "{}", text(&listed.stderr));
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_u64().unwrap();
    text(&listed.stdout).lines().map(id).collect()
}

#[test]
fn filters_choose_events() {
    let (_directory, path) = log_with_events();
    let cases: [(&[&str], &[u64]); 12] = [
        (&[], &[1, 2, 3, 4, 5, 6]),
        (&["--topic", "odd"], &[2, 4, 6]),
        (&["--topic", "odd", "--reason", "unknown_topic"], &[4, 6]),
        (&["--topic", "odd", "--topic", "even", "--limit", "2"], &[1, 2]),
        (&["--type", "u"], &[]),
        (&["--group", "g", "--connection-id", "device-2"], &[3]),
        (&["--key", "the key"], &[2]),
        (&["--from-sequence", "2", "--until-sequence", "3"], &[3, 4]),
        (&["--from", "2023-11-14T22:13:22Z", "--until", "2023-11-14T22:13:24Z"], &[3, 4]),
        (&["--parked-until", "2h"], &[1, 2, 3, 4, 5, 6]),
        (&["--parked-from", "2h"], &[]),
        (&["--id", "5", "--id", "1", "--id", "77"], &[1, 5]),
    ];
    for (arguments, wanted) in cases {
        assert_eq!(ids(arguments, &path), wanted, "{arguments:?}");
    }
    let unknown = parked(&["list", "--reason", "bad_luck"], &path);
    assert_eq!(unknown.status.code(), Some(64));
    assert!(text(&unknown.stderr).contains("unknown_topic"), "{}", text(&unknown.stderr));
}

#[test]
fn show_prints_everything_and_never_raw_bytes() {
    let (_directory, path) = log_with_events();
    let shown = parked(&["show", "2", "3", "6"], &path);
    assert_eq!(shown.status.code(), Some(0), "{}", text(&shown.stderr));
    let shown = text(&shown.stdout);
    for part in
        ["said Kafka", "the key", "(none)", "device-1", "2023-11-14T22:13:21Z", "two\nlines", "/wA=", "\\u{1b}[31mred"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(!shown.contains('\u{1b}'));
    let missing = parked(&["show", "--json", "77", "1"], &path);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("event 77 is not there"), "{}", text(&missing.stderr));
    let event: Value = serde_json::from_slice(&missing.stdout).unwrap();
    assert_eq!((&event["id"], &event["payload"]), (&json!(1), &json!("b25l")));
}

#[test]
fn exports_are_imported_and_raw_payloads_are_told_apart() {
    let (directory, path) = log_with_events();
    let delimited = parked(&["export", "--raw", "--id", "1", "--id", "2"], &path);
    assert_eq!(delimited.stdout, b"\x03one\x09two\nlines");
    let lines = parked(&["export", "--lines", "--topic", "odd"], &path);
    assert_eq!(lines.status.code(), Some(1));
    assert!(text(&lines.stderr).contains("parked event 2 holds a line break"), "{}", text(&lines.stderr));
    assert_eq!(lines.stdout, b"{\"a\":1}\n\x1b[31mred\n");

    let file = directory.path().join("parked.jsonl");
    let file = file.to_str().unwrap();
    let exported = parked(&["export", "--compact", "--output", file], &path);
    assert_eq!(exported.status.code(), Some(0), "{}", text(&exported.stderr));
    assert!(exported.stdout.is_empty());
    assert_eq!(parked(&["export", "--output", file], &path).status.code(), Some(1), "it exists");
    let ringtail = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_ringtail")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        output
    };
    ringtail(&["backlog", "import", "--directory", &path, file]);
    let batches = text(&ringtail(&["backlog", "peek", "--payload", "--directory", &path]).stdout);
    let batches: Vec<Value> = batches.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(batches.len(), 6);
    let batch = &batches[3];
    assert_eq!((&batch["connection_id"], &batch["group"]), (&json!("device-3"), &json!("g")));
    assert_eq!((&batch["received_at_ms"], &batch["req_guid"]), (&json!(1_700_000_003_000_u64), &json!("r")));
    assert_eq!(batch["events"][0]["payload"], "eyJhIjoxfQ==");
    assert_eq!(batch["events"][0]["type"], "t");
}

#[test]
fn drop_needs_to_be_told_what_and_is_durable() {
    let (_directory, path) = log_with_events();
    for (arguments, complaint) in [
        (&["drop", "--yes"][..], "give a filter, or --all"),
        (&["drop", "--yes", "--limit", "3"], "give a filter, or --all"),
        (&["drop", "--yes", "--all", "--topic", "odd"], "either a filter or --all"),
        (&["drop", "--all"], "give --yes, or --dry-run"),
    ] {
        let refused = parked(arguments, &path);
        assert_eq!(refused.status.code(), Some(64), "{arguments:?}");
        assert!(text(&refused.stderr).contains(complaint), "{}", text(&refused.stderr));
    }
    let would = parked(&["drop", "--topic", "odd", "--dry-run", "--json"], &path);
    let summary = |output: &Output| {
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        (summary["dropped_events"].as_u64().unwrap(), summary["dry_run"].as_bool().unwrap())
    };
    assert_eq!(summary(&would), (3, true));
    assert_eq!(ids(&[], &path), [1, 2, 3, 4, 5, 6]);
    let dropped = parked(&["drop", "--topic", "odd", "--limit", "2", "--yes", "--json"], &path);
    assert_eq!(summary(&dropped), (2, false));
    assert_eq!(ids(&[], &path), [1, 3, 5, 6]);
    assert_eq!(summary(&parked(&["drop", "--all", "--yes", "--json"], &path)), (4, false));
    assert!(ids(&[], &path).is_empty());
    // What the operator dropped is not taken for damage.
    let check = Command::new(env!("CARGO_BIN_EXE_ringtail")).args(["backlog", "check", "--directory", &path]).output();
    assert_eq!(check.unwrap().status.code(), Some(0));
}

/// The cursor is in `meta`, and what is damaged there is set aside by whoever opens it.
#[test]
fn what_only_looks_leaves_the_cursor_alone() {
    let (directory, path) = log_with_events();
    std::fs::remove_file(directory.path().join("meta/db")).unwrap();
    let meta = || {
        let entries = std::fs::read_dir(directory.path().join("meta")).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> =
            entries.filter(|path| path.is_file()).map(|path| (std::fs::read(&path), path)).collect();
        files.sort_by(|(_, one), (_, other)| one.cmp(other));
        files.into_iter().map(|(bytes, path)| (path, bytes.unwrap())).collect::<Vec<_>>()
    };
    let quarantined = || std::fs::read_dir(directory.path().join("quarantine")).unwrap().count();
    let before = meta();
    let commands: [&[&str]; 5] =
        [&["list"], &["show", "2"], &["export"], &["drop", "--all", "--dry-run"], &["requeue", "--all", "--dry-run"]];
    for arguments in commands {
        let done = parked(arguments, &path);
        assert_eq!(done.status.code(), Some(0), "{arguments:?}: {}", text(&done.stderr));
        assert!(meta() == before && quarantined() == 0, "{arguments:?}");
    }
    // What is removed must be in the books.
    let dropped = parked(&["drop", "--id", "1", "--yes"], &path);
    assert_eq!(dropped.status.code(), Some(0), "{}", text(&dropped.stderr));
    assert_eq!((ids(&[], &path), quarantined()), (vec![2, 3, 4, 5, 6], 1));
}

fn metric(admin: SocketAddr, name: &str) -> f64 {
    let (_, answer) = http::get(admin, "/metrics");
    let samples = answer.lines().filter_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '{'])));
    samples.filter_map(|rest| rest.rsplit_once(' ')).map(|(_, value)| value.parse::<f64>().unwrap()).sum()
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_running_service_lists_and_drops_and_a_kill_right_after_raises_no_alarm() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let options = Options {
        directory: path.into(),
        // Nobody is there: what has an impossible topic is parked all the same.
        brokers: vec!["127.0.0.1:1".into()],
        settings: vec!["forward.topic = \"%s\"".into(), "wal.free_bytes_min = \"0B\"".into()],
        ..Options::default()
    };
    let (mut process, addresses) = Process::start(&options);
    let send = |events: &str, http: SocketAddr| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
        command.args(["send", "--url", &format!("http://{http}"), "--type", "not a topic", "--id", "device-1"]);
        let mut sender = command.stdin(Stdio::piped()).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        sender.stdin.take().unwrap().write_all(events.as_bytes()).unwrap();
        assert!(sender.wait().unwrap().success());
    };
    send("a\nb\nc\nd\ne\n", addresses.http);
    wait_for("all are parked", || metric(addresses.admin, "ringtail_forward_parked_events_total") == 5.0);
    // The log knows of five, durably.
    assert!(process.stop().success());
    let (mut process, addresses) = Process::start(&options);
    assert_eq!(ids(&["--connection-id", "device-1", "--reason", "invalid_topic"], path), [1, 2, 3, 4, 5]);
    let shown = parked(&["show", "2"], path);
    assert!(text(&shown.stdout).contains("\nb\n"), "{}", text(&shown.stdout));
    assert!(shown.stderr.is_empty(), "{}", text(&shown.stderr));
    let missing = parked(&["show", "22"], path);
    assert_eq!(missing.status.code(), Some(1));

    let dropped = parked(&["drop", "--id", "2", "--id", "4", "--yes"], path);
    assert_eq!((dropped.status.code(), dropped.stdout.len()), (Some(0), 0), "{}", text(&dropped.stderr));
    assert!(text(&dropped.stderr).contains("2 events dropped"), "{}", text(&dropped.stderr));
    let counted = "ringtail_forward_parked_dropped_events_total{reason=\"operator\"}";
    assert_eq!(metric(addresses.admin, counted), 2.0);
    assert_eq!(metric(addresses.admin, "ringtail_forward_dropped_events_total"), 0.0);
    assert_eq!(metric(addresses.admin, "ringtail_forward_parked_events"), 3.0);
    process.kill();

    let lost = "ringtail_forward_parked_dropped_events_total{reason=\"damaged\"}";
    let (mut process, addresses) = Process::start(&options);
    assert_eq!(metric(addresses.admin, lost), 0.0, "a false alarm");
    assert_eq!(ids(&[], path), [1, 3, 5]);
    assert_eq!(parked(&["drop", "--id", "1", "--yes"], path).status.code(), Some(0));
    assert!(process.stop().success());
    // Offline, and then the store itself forgets what was removed.
    assert_eq!(parked(&["drop", "--id", "3", "--yes"], path).status.code(), Some(0));
    std::fs::remove_file(directory.path().join("parked/000000000000/db")).unwrap();
    let (mut process, addresses) = Process::start(&options);
    assert_eq!(metric(addresses.admin, lost), 0.0, "what was removed is called lost");
    assert_eq!(http::status(addresses.admin)["parked"]["lost_events"], 0);
    assert_eq!(parked(&["drop", "--all", "--yes"], path).status.code(), Some(0));
    assert!(process.stop().success());
    let (mut process, addresses) = Process::start(&options);
    assert_eq!(metric(addresses.admin, lost), 0.0);
    assert!(process.stop().success());
    let complaints = process.complaints();
    assert!(!complaints.iter().any(|line| line.contains("missing")), "{complaints:#?}");
}
