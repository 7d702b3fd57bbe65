use crate::log::{LARGE, Log, assert_code, batch, numbers, text};

#[test]
fn bad_lines_are_named_and_the_others_imported() {
    let log = Log::with(&[batch(1, 10), batch(2, 10), batch(3, 10)]);
    let exported = text(&log.run(&["export"]).stdout);
    let good: Vec<&str> = exported.lines().collect();
    let long_name = good[1].replace("group-0", &"x".repeat(1025));
    let bad_base64 = good[1].replace("\"request\":\"", "\"request\":\"!");
    let bad_request = good[1].replace("\"request\":\"", "\"request\":\"////");
    let lines = [good[0], "{", &long_name, good[1], &bad_base64, "", &bad_request, "{}", good[2]].join("\n");
    let copy = Log::none();
    let file = copy.file("lines.jsonl");
    std::fs::write(&file, lines).unwrap();

    let dry = copy.run(&["import", "--dry-run", &file]);
    assert_code(&dry, 1);
    assert!(!copy.wal_directory().exists(), "a dry run made a log");
    let output = copy.run(&["import", &file]);
    assert_code(&output, 1);
    for said in [text(&dry.stderr), text(&output.stderr)] {
        let named: Vec<u64> = said
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("{file}, line "))?.split(':').next()?.parse().ok())
            .collect();
        assert_eq!(named, [2, 3, 5, 7, 8], "{said}");
        assert!(said.contains("5 lines BAD") && said.contains("3 batches with 3 events"), "{said}");
    }
    assert_eq!(numbers(&copy.deliver_all()), [1, 2, 3]);
}

#[test]
fn a_full_log_says_how_far_it_came() {
    let log = Log::with(&(1..=300).map(|number| batch(number, LARGE * 2)).collect::<Vec<_>>());
    let file = log.file("export.jsonl");
    assert_code(&log.run(&["export", "--output", &file]), 0);
    let small = Log::none();
    small.configure("wal.bytes_max = \"40MiB\"");
    let output = small.run(&["import", &file]);
    assert_code(&output, 1);
    let said = text(&output.stderr);
    assert!(said.contains("the rest is not imported: the log is full"), "{said}");
    let (_, line) = said.split_once(&format!("everything up to {file}, line ")).unwrap();
    let line: u64 = line.split(',').next().unwrap().parse().unwrap();
    assert!((1..300).contains(&line), "{said}");
    assert_eq!(numbers(&small.deliver_all()), (1..=line).collect::<Vec<_>>());
}

#[test]
fn a_missing_file_is_said() {
    let log = Log::none();
    let output = log.run(&["import", "/nowhere/export.jsonl"]);
    assert_code(&output, 1);
    assert!(text(&output.stderr).contains("cannot read /nowhere/export.jsonl"), "{}", text(&output.stderr));
    assert_code(&log.run(&["import"]), 64);
}
