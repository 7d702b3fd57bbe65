use serde_json::{Value, json};

use crate::log::{Log, assert_code, batch, batch_of, text};
use crate::process::{Options, Process};

fn lines(log: &Log, arguments: &[&str]) -> Vec<Value> {
    let output = log.run(&[&["peek"], arguments].concat());
    assert_code(&output, 0);
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn status_and_peek_work_on_a_running_service_and_a_stopped_log_and_the_others_say_to_stop_it() {
    let mut batches: Vec<_> = (1..=30).map(|number| batch(number, 10)).collect();
    batches[0] = batch_of(1, &[("click", b"hello"), ("page", b"\xff")]);
    let log = Log::with(&batches);
    log.flip(1, 3);
    log.configure("forward.brokers = []");

    let looked_at = |log: &Log| {
        let all = lines(log, &["--json"]);
        assert_eq!(all.len(), 20);
        let sequences: Vec<u64> = all.iter().map(|line| line["sequence"].as_u64().unwrap()).take(4).collect();
        assert_eq!(sequences, [1, 2, 4, 5]);
        let first = &lines(log, &["--limit", "1", "--payload"])[0];
        let event = |event_type: &str, payload_bytes: u64, payload: &str| {
            let topic = format!("clickstream-{event_type}-log");
            json!({"type": event_type, "topic": topic, "payload_bytes": payload_bytes, "payload": payload})
        };
        assert_eq!(first["events"], json!([event("click", 5, "aGVsbG8="), event("page", 1, "/w==")]));
        assert_eq!(first["received_at_ms"], 1_700_000_001_000_u64);
        assert!(lines(log, &["--json", "--limit", "100"]).len() >= 29);
        let table = text(&log.run(&["peek", "--limit", "2"]).stdout);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(
            table.contains("2023-11-14T22:13:21Z") && table.contains("1 × click → clickstream-click-log"),
            "{table}"
        );
    };
    looked_at(&log);

    let mut options = Options::small(&log.wal_directory());
    options.settings.push("forward.topic = \"clickstream-%s-log\"".into());
    let (mut process, _) = Process::start(&options);
    looked_at(&log);
    let status: Value = serde_json::from_slice(&log.run(&["status", "--json"]).stdout).unwrap();
    // The peeks accounted for nothing.
    assert_eq!((&status["pending_batches"], &status["lost_batches"]), (&json!(30), &json!(0)));

    let file = log.file("lines.jsonl");
    std::fs::write(&file, "").unwrap();
    log.configure("");
    let output = log.file("export.jsonl");
    let commands: [(&[&str], i32); 6] = [
        (&["check"], 2),
        (&["export", "--output", &output], 1),
        (&["import", &file], 1),
        (&["repair"], 1),
        (&["repair", "--dry-run"], 1),
        (&["drain"], 1),
    ];
    for (arguments, code) in commands {
        let output = log.run(arguments);
        assert_code(&output, code);
        assert!(text(&output.stderr).contains("stop the service first"), "{}", text(&output.stderr));
    }
    assert_code(&log.run(&["import", "--dry-run", &file]), 0);
    assert!(process.stop().success());
    let expected = |line: &&String| line.contains("forward.brokers") || line.contains("keeping a copy");
    let complaints: Vec<String> = process.complaints().iter().filter(|line| !expected(line)).cloned().collect();
    assert!(complaints.is_empty(), "the peeks complained: {complaints:#?}");
    assert_code(&log.run(&["check"]), 1);
}
