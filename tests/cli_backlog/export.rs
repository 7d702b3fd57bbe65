use serde_json::Value;

use crate::log::{LARGE, Log, assert_code, batch, batch_of, content, exists, numbers, text};

fn export(log: &Log, arguments: &[&str]) -> Vec<Value> {
    let output = log.run(&[&["export"], arguments].concat());
    assert_code(&output, 0);
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn sequences(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["sequence"].as_u64().unwrap()).collect()
}

#[test]
fn what_is_exported_and_imported_is_the_same_byte_for_byte() {
    let mut batches: Vec<_> = (1..=150).map(|number| batch(number, LARGE)).collect();
    batches[3] = batch(4, 1_000_000);
    batches[4] = batch_of(5, &[("click", b"\xff\x00\n\"{"), ("", b""), ("page ü", b"text")]);
    // A field of a newer client, and nobody.
    let mut request = batches[5].request.as_bytes().to_vec();
    request.extend(b"\xfa\x06\x03new");
    batches[5].request = ringtail::batch::Request::parse(request.into()).unwrap();
    batches[5].client.id = "".into();
    let log = Log::with(&batches);
    let before = log.image();
    let file = log.file("export.jsonl");
    let exported = log.run(&["export", "--output", &file]);
    assert_code(&exported, 0);
    assert!(text(&exported.stderr).contains("exported 150 batches with 152 events"), "{}", text(&exported.stderr));
    assert!(log.image() == before, "the export changed a file");
    assert_code(&log.run(&["export", "--output", &file]), 1);

    for arguments in [&[] as &[&str], &["--compact"]] {
        let lines = log.run(&[&["export"], arguments].concat()).stdout;
        let copy = Log::none();
        let imported = copy.run_with_input(&["import", "-"], &lines);
        assert_code(&imported, 0);
        assert!(copy.run(&[&["export"], arguments].concat()).stdout == lines, "an export of the copy differs");
        assert!(content(&copy.deliver_all()) == content(&batches));
    }
    assert!(std::fs::read(file).unwrap() == log.run(&["export"]).stdout, "the file differs from the standard output");
}

#[test]
fn filters_choose_batches_and_events_and_only_those_are_imported() {
    let events: &[(&str, &[u8])] = &[("click", b"c1"), ("page", b"p"), ("click", b"c2")];
    let log =
        Log::with(&[batch_of(1, events), batch_of(2, &[("page", b"p")]), batch_of(3, events), batch_of(4, events)]);
    let types = |lines: &[Value]| -> Vec<String> {
        let events = lines.iter().flat_map(|line| line["events"].as_array().unwrap());
        events.map(|event| event["type"].as_str().unwrap().into()).collect()
    };
    assert_eq!(types(&export(&log, &["--type", "page"])), ["page"; 4]);
    let pages = export(&log, &["--topic", "clickstream-click-log"]);
    assert_eq!((sequences(&pages), types(&pages).len()), (vec![1, 3, 4], 6));
    assert!(export(&log, &["--type", "none"]).is_empty());
    assert_eq!(types(&export(&log, &["--type", "page", "--type", "click"])).len(), 10);
    assert_eq!(sequences(&export(&log, &["--group", "group-1"])), [1, 3]);
    assert_eq!(
        sequences(&export(&log, &["--from", "2023-11-14T22:13:22Z", "--until", "2023-11-14T22:13:24Z"])),
        [2, 3]
    );
    assert!(export(&log, &["--from", "1h"]).is_empty());
    assert_eq!(sequences(&export(&log, &["--from-sequence", "2", "--until-sequence", "3"])), [2, 3]);
    assert_eq!(sequences(&export(&log, &["--type", "click", "--group", "group-1", "--from-sequence", "2"])), [3]);

    let lines = log.run(&["export", "--type", "click", "--until-sequence", "2"]).stdout;
    let copy = Log::none();
    assert_code(&copy.run_with_input(&["import", "-"], &lines), 0);
    let expected = batch_of(1, &[("click", b"c1"), ("click", b"c2")]);
    assert!(content(&copy.deliver_all()) == content(&[expected]));
}

#[test]
fn what_is_delivered_is_exported_only_if_asked_for() {
    let log = Log::with(&(1..=5).map(|number| batch(number, 10)).collect::<Vec<_>>());
    let wal = log.open();
    let mut reader = wal.reader();
    let third = (0..3).map(|_| reader.next_record().unwrap().unwrap()).last().unwrap();
    wal.deliver(third.end);
    wal.close();
    drop((reader, wal));
    assert_eq!(sequences(&export(&log, &[])), [4, 5]);
    assert_eq!(sequences(&export(&log, &["--from-sequence", "2"])), [2, 3, 4, 5]);
}

#[test]
fn raw_payloads_are_delimited() {
    let long = vec![7; 300];
    let log = Log::with(&[batch_of(1, &[("click", b"one"), ("page", b"two")]), batch_of(2, &[("click", &long)])]);
    let output = log.run(&["export", "--raw", "--type", "click"]);
    assert_code(&output, 0);
    assert_eq!(output.stdout, [b"\x03one\xac\x02", &long[..]].concat());
}

#[test]
fn an_export_of_a_damaged_log_gives_the_rest_and_says_what_is_missing() {
    let log = Log::with(&(1..=10).map(|number| batch(number, 10)).collect::<Vec<_>>());
    log.flip(1, 4);
    log.flip(1, 5);
    log.flip(1, 10);
    let output = log.run(&["export"]);
    assert_code(&output, 1);
    assert!(text(&output.stderr).contains("3 batches missing"), "{}", text(&output.stderr));
    let copy = Log::none();
    assert_code(&copy.run_with_input(&["import", "-"], &output.stdout), 0);
    assert_eq!(numbers(&copy.deliver_all()), [1, 2, 3, 6, 7, 8, 9]);
    // What is not asked for is not missed.
    assert_code(&log.run(&["export", "--until-sequence", "3"]), 0);
    assert_code(&log.run(&["export", "--from-sequence", "6", "--until-sequence", "9"]), 0);
}

#[test]
fn an_export_that_fails_leaves_no_file() {
    let log = Log::none();
    let file = log.file("export.jsonl");
    let output = log.run(&["export", "--output", &file]);
    assert_code(&output, 1);
    assert!(!exists(&file));
    assert_code(&log.run(&["export", "--lost"]), 64);
    assert_code(&log.run(&["export", "--from", "yesterday"]), 64);
}
