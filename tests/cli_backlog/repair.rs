use serde_json::{Value, json};

use crate::log::{LARGE, Log, assert_code, batch, numbers, text};

/// A log of which the service did not find the file of the second segment, and one chunk of the third one damaged. Everything
/// else was delivered. Then the file turned up again, with one batch in it damaged.
struct Damaged {
    log: Log,
    delivered: Vec<u64>,
    unsalvageable: [u64; 2],
}

const BATCHES: u64 = 400;

fn damaged() -> Damaged {
    let log = Log::with(&(1..=BATCHES).map(|number| batch(number, LARGE)).collect::<Vec<_>>());
    let (second, third) = (150, 290);
    log.flip(2, second);
    log.lose_file(2);
    log.flip(3, third);
    let delivered = numbers(&log.deliver_all());
    log.find_file(2);
    Damaged { log, delivered, unsalvageable: [second, third] }
}

fn repair(log: &Log, arguments: &[&str], code: i32) -> Value {
    let output = log.run(&[&["repair", "--json"], arguments].concat());
    assert_code(&output, code);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn lost_sequences(report: &Value, list: &str) -> Vec<(u64, u64, u64)> {
    let loss = |loss: &Value| {
        let number = |field: &str| loss[field].as_u64().unwrap();
        (number("first_sequence"), number("end_sequence"), number("events"))
    };
    report[list].as_array().unwrap().iter().map(loss).collect()
}

/// Batches put back, or to be put back.
fn recovered(report: &Value) -> u64 {
    report["segments"].as_array().unwrap().iter().map(|segment| segment["recovered_batches"].as_u64().unwrap()).sum()
}

#[test]
fn what_can_be_salvaged_comes_back_once_and_the_rest_is_reported() {
    let Damaged { log, delivered, unsalvageable: [second, third] } = damaged();
    let missing: Vec<u64> = (1..=BATCHES).filter(|number| !delivered.contains(number)).collect();
    let wanted: Vec<u64> = missing.iter().copied().filter(|number| ![second, third].contains(number)).collect();
    assert!(wanted.len() > 100, "{wanted:?}");

    let status = text(&log.run(&["status"]).stdout);
    assert!(status.contains(&format!("LOST         {} batches", missing.len())), "{status}");
    assert!(status.contains("ringtail backlog check"), "{status}");
    let (code, report) = log.check();
    assert_eq!(code, 1);
    let salvageable: u64 =
        report["losses"].as_array().unwrap().iter().map(|loss| loss["salvageable_batches"].as_u64().unwrap()).sum();
    assert_eq!(salvageable, wanted.len() as u64, "{report:#}");
    let quarantined = report["quarantined"].as_array().unwrap();
    let lost: Vec<_> =
        quarantined.iter().map(|item| (&item["segment"], item["lost_batches"].as_u64() > Some(0))).collect();
    // The end of the first one might be what is missing; what the third one lost cannot be carved out of it.
    assert_eq!(lost, [(&json!(1), false), (&json!(2), true), (&json!(3), false)], "{report:#}");

    let plan = repair(&log, &["--dry-run"], 1);
    assert_eq!((&plan["dry_run"], recovered(&plan)), (&json!(true), wanted.len() as u64));
    assert_eq!(numbers(&log.deliver_all()), [0; 0], "a dry run put something back");

    let report = repair(&log, &[], 1);
    assert_eq!(recovered(&report), wanted.len() as u64, "{report:#}");
    let left = [(second, second + 1, 1), (third, third + 1, 1)];
    assert_eq!(lost_sequences(&report, "still_lost"), left);

    let again = repair(&log, &[], 1);
    assert_eq!(recovered(&again), 0, "{again:#}");
    assert_eq!(numbers(&log.deliver_all()), wanted);

    let discarded = repair(&log, &["--segment", "2", "--discard"], 1);
    assert_eq!(lost_sequences(&discarded, "written_off"), left[..1]);
    assert_eq!(lost_sequences(&discarded, "still_lost"), left[1..]);
    let discarded = repair(&log, &["--discard"], 0);
    assert_eq!(lost_sequences(&discarded, "written_off"), left[1..]);
    let (code, report) = log.check();
    assert_eq!(code, 0, "{report:#}");
    assert!(!text(&log.run(&["status"]).stdout).contains("LOST"));
    assert_code(&log.run(&["repair", "--segment", "2"]), 1);
}

#[test]
fn quarantined_batches_are_exported_and_imported() {
    let Damaged { log, delivered, unsalvageable } = damaged();
    let wanted: Vec<u64> =
        (1..=BATCHES).filter(|number| !delivered.contains(number) && !unsalvageable.contains(number)).collect();
    let lost = log.run(&["export", "--quarantined", "--lost"]);
    assert_code(&lost, 0);
    let copy = Log::none();
    assert_code(&copy.run_with_input(&["import", "-"], &lost.stdout), 0);
    assert_eq!(numbers(&copy.deliver_all()), wanted);
    let all = log.run(&["export", "--quarantined", "--compact"]);
    assert_code(&all, 0);
    assert!(text(&all.stdout).lines().count() > wanted.len() + 100, "{}", text(&all.stderr));
}

#[test]
fn a_repair_that_finds_the_log_full_keeps_the_rest_for_the_next_one() {
    let Damaged { log, delivered, unsalvageable } = damaged();
    let wanted: Vec<u64> =
        (1..=BATCHES).filter(|number| !delivered.contains(number) && !unsalvageable.contains(number)).collect();
    log.configure("wal.bytes_max = \"40MiB\"");
    let output = log.run(&["repair", "--discard"]);
    assert_code(&output, 1);
    assert!(text(&output.stderr).contains("the log is full"), "{}", text(&output.stderr));
    let first = numbers(&log.deliver_all());
    log.configure("");
    let report = repair(&log, &[], 1);
    assert_eq!(report["segments"].as_array().unwrap().len(), 3, "a segment was discarded that is still needed");
    let second = numbers(&log.deliver_all());
    assert_eq!([first, second].concat(), wanted, "each once");
}

#[test]
fn damage_in_the_newest_segment_and_damage_found_before_a_restart_are_set_aside() {
    let log = Log::with(&(1..=30).map(|number| batch(number, 10)).collect::<Vec<_>>());
    log.flip(1, 10);
    // Finds the loss, and ends before anything behind it is delivered.
    let wal = log.open();
    let mut reader = wal.reader();
    while reader.next_record().unwrap().is_some() {}
    assert_eq!(wal.status().lost_batches, 1);
    wal.close();
    drop((reader, wal));
    assert_eq!(numbers(&log.deliver_all()), (1..=30).filter(|number| *number != 10).collect::<Vec<_>>());
    let report = repair(&log, &[], 1);
    assert_eq!((recovered(&report), lost_sequences(&report, "still_lost")), (0, vec![(10, 11, 1)]));

    // The same with an older segment.
    let log = Log::with(&(1..=200).map(|number| batch(number, LARGE)).collect::<Vec<_>>());
    log.flip(1, 5);
    let wal = log.open();
    let (mut reader, mut delivered) = (wal.reader(), Vec::new());
    for _ in 0..40 {
        let record = reader.next_record().unwrap().unwrap();
        delivered.extend(numbers(&[record.batch]));
        wal.deliver(record.end);
    }
    assert_eq!(wal.status().lost_batches, 1);
    wal.close();
    drop((reader, wal));
    delivered.extend(numbers(&log.deliver_all()));
    assert_eq!(delivered, (1..=200).filter(|number| *number != 5).collect::<Vec<_>>());
    let report = repair(&log, &[], 1);
    assert_eq!((recovered(&report), lost_sequences(&report, "still_lost")), (0, vec![(5, 6, 1)]));
}
