use std::fs;

use serde_json::{Value, json};

use crate::chunks::unmasked;
use crate::log::{LARGE, Log, assert_code, batch, text};

/// Three segments of 136 batches each, or a little less, and one that is begun.
fn large_log() -> Log {
    Log::with(&(1..=300).map(|number| batch(number, LARGE)).collect::<Vec<_>>())
}

fn field(report: &Value, list: &str, field: &str) -> Vec<Value> {
    report[list].as_array().unwrap().iter().map(|item| item[field].clone()).collect()
}

/// The segment and slot of batch `number`, one chunk and slot each.
fn first_of(log: &Log, segment: u64) -> u64 {
    let bytes = unmasked(&fs::read(log.segment(segment).join("db")).unwrap());
    let at = memchr::memmem::find(&bytes, b"the batch number ").unwrap();
    text(&bytes[at + 17..at + 23]).parse().unwrap()
}

#[test]
fn a_log_in_order_is_found_in_order_and_left_alone() {
    let log = large_log();
    let before = log.image();
    let (code, report) = log.check();
    assert_eq!(code, 0, "{report:#}");
    assert_eq!((&report["batches"], &report["events"], &report["chunks"]), (&json!(300), &json!(300), &json!(300)));
    assert_eq!((&report["cursor_sequence"], &report["next_sequence"]), (&json!(1), &json!(301)));
    assert!(report["segments"].as_u64().unwrap() >= 3);
    let human = log.run(&["check"]);
    assert_code(&human, 0);
    assert!(text(&human.stdout).ends_with("nothing is wrong\n"), "{}", text(&human.stdout));
    assert!(log.image() == before, "the check changed a file");
}

#[test]
fn a_damaged_chunk_is_named_with_segment_slot_and_sequence_and_nothing_else_is() {
    let log = large_log();
    let second = first_of(&log, 2);
    for (segment, number) in [(1, 5), (1, 6), (1, 8), (2, second + 3)] {
        log.flip(segment, number);
    }
    let before = log.image();
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    let problem = |segment: u64, slot: u64, sequences: (u64, u64), detail: &str| {
        json!({"kind": "damaged_chunk", "segment": segment, "slot": slot, "first_sequence": sequences.0,
               "last_sequence": sequences.1, "detail": detail})
    };
    let checksum = "the checksum does not match";
    let expected = [
        problem(1, 4, (5, 6), checksum),
        problem(1, 5, (5, 6), checksum),
        problem(1, 7, (8, 8), checksum),
        problem(2, 3, (second + 3, second + 3), checksum),
    ];
    assert_eq!(report["problems"], json!(expected));
    let missing = |first: u64, last: u64| {
        json!({"first_sequence": first, "last_sequence": last, "events": last + 1 - first,
               "salvageable_batches": 0, "in_ledger": false})
    };
    assert_eq!(report["missing"], json!([missing(5, 6), missing(8, 8), missing(second + 3, second + 3)]));
    assert_eq!(report["batches"], 296);
    assert_eq!((&report["losses"], &report["quarantined"]), (&json!([]), &json!([])));
    let human = text(&log.run(&["check"]).stdout);
    for line in ["PROBLEM: segment 1, slot 4, is damaged", "MISSING: sequences 5 to 6, 2 events; 0 of 2 batches can be"]
    {
        assert!(human.contains(line), "{human}");
    }
    assert!(log.image() == before, "the check changed a file");
}

#[test]
fn a_batch_of_several_chunks_is_missing_as_a_whole() {
    let log = Log::with(&[batch(1, 10), batch(2, 300_000), batch(3, 10)]);
    log.flip_at(1, 2, 70_000);
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(field(&report, "problems", "slot"), [1, 2], "its first slot, and the damaged one");
    assert_eq!(field(&report, "missing", "first_sequence"), [2]);
    assert_eq!(field(&report, "missing", "last_sequence"), [2]);
}

#[test]
fn a_segment_without_its_file_does_not_open() {
    let log = large_log();
    let (second, third) = (first_of(&log, 2), first_of(&log, 3));
    log.lose_file(2);
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(field(&report, "problems", "kind"), ["does_not_open"], "{report:#}");
    assert_eq!(field(&report, "problems", "segment"), [2]);
    assert_eq!(field(&report, "problems", "first_sequence"), [second]);
    assert_eq!(field(&report, "missing", "last_sequence"), [third - 1]);
    assert_eq!(field(&report, "missing", "salvageable_batches"), [0]);
}

#[test]
fn a_truncated_file_and_a_deleted_segment_leave_gaps() {
    let log = large_log();
    let third = first_of(&log, 3);
    log.truncate(2, first_of(&log, 2) + 9);
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(field(&report, "problems", "kind"), ["damaged_chunk"]);
    assert_eq!(field(&report, "problems", "detail"), ["the chunk is cut short"]);
    assert_eq!(field(&report, "problems", "segment"), [2]);
    assert_eq!(field(&report, "missing", "first_sequence"), [first_of(&log, 2) + 9]);
    assert_eq!(field(&report, "missing", "last_sequence"), [third - 1]);
    assert_eq!(field(&report, "missing", "salvageable_batches"), [0]);

    // Both ends: the first segment, and the last one.
    let log = large_log();
    let second = first_of(&log, 2);
    fs::remove_dir_all(log.segment(1)).unwrap();
    fs::remove_dir_all(log.segment(3)).unwrap();
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(field(&report, "problems", "kind"), ["segment_missing"; 2]);
    assert_eq!(field(&report, "problems", "segment"), [1, 3]);
    assert_eq!(field(&report, "missing", "first_sequence"), [1, third]);
    assert_eq!(field(&report, "missing", "last_sequence"), [second - 1, 300]);
    assert_eq!(field(&report, "missing", "events"), [second - 1, 301 - third]);
}

#[test]
fn markers_and_the_small_maps_are_looked_at() {
    let log = large_log();
    fs::remove_file(log.segment(1).join("READY")).unwrap();
    let before = log.image();
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(field(&report, "problems", "kind"), ["marker_missing"], "{report:#}");
    assert_eq!(field(&report, "problems", "segment"), [1]);
    assert_eq!((&report["missing"], &report["batches"]), (&json!([]), &json!(300)));
    assert!(log.image() == before, "the check changed a file");

    let log = Log::with(&[batch(1, 10)]);
    log.spoil(&log.wal_directory().join("meta"));
    let (code, report) = log.check();
    assert_eq!((code, field(&report, "problems", "kind")), (1, vec![json!("meta_damaged")]), "{report:#}");

    let log = Log::with(&[batch(1, 10)]);
    log.park_and_damage();
    let before = log.image();
    let (code, report) = log.check();
    assert_eq!((code, field(&report, "problems", "kind")), (1, vec![json!("parked_damaged")]), "{report:#}");
    assert_eq!(field(&report, "problems", "detail"), ["parked event 2 is damaged: a part is missing"]);
    assert!(log.image() == before, "the check changed a file");
    // As an older version left it.
    let (parked, old) = (log.wal_directory().join("parked"), log.wal_directory().join("old"));
    fs::rename(parked.join("000000000001"), &old).unwrap();
    fs::remove_dir_all(&parked).unwrap();
    for name in ["parked", "parked.old"] {
        let parked = log.wal_directory().join(name);
        fs::rename(&old, &parked).unwrap();
        let before = log.image();
        let (_, report) = log.check();
        assert_eq!(field(&report, "problems", "detail"), ["parked event 2 is damaged: a part is missing"]);
        assert!(log.image() == before, "the check changed a file");
        fs::rename(&parked, &old).unwrap();
    }

    let log = Log::with(&[batch(1, 10)]);
    log.park_and_damage();
    log.spoil(&log.wal_directory().join("parked/000000000001"));
    let before = log.image();
    let (code, report) = log.check();
    assert_eq!((code, field(&report, "problems", "kind")), (1, vec![json!("parked_damaged")]), "{report:#}");
    assert!(log.image() == before, "the check changed a file");
}

#[test]
fn a_check_that_cannot_be_made_is_another_thing_than_a_problem() {
    let log = Log::none();
    let output = log.run(&["check"]);
    assert_code(&output, 2);
    assert!(text(&output.stderr).contains("there is no log"), "{}", text(&output.stderr));
    assert!(!log.wal_directory().exists(), "looking made something");
    assert_code(&log.run(&["check", "--nonsense"]), 64);
}

#[test]
fn a_chunk_that_is_gone_without_a_trace_is_missed() {
    let log = large_log();
    log.zero(1, 5);
    let (code, report) = log.check();
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(field(&report, "problems", "kind"), ["chunks_missing"], "{report:#}");
    assert_eq!(field(&report, "problems", "segment"), [1]);
    assert_eq!(field(&report, "missing", "first_sequence"), [5]);
    assert_eq!(field(&report, "missing", "last_sequence"), [5]);
}
