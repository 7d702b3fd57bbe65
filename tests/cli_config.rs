//! `ringtail config`: what it prints where, and with which exit code.

use std::process::{Command, Output};

use serde_json::{Value, json};

fn ringtail(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let ours = std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("RINGTAIL_"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    ours.for_each(|name| {
        command.env_remove(name);
    });
    command.args(arguments).envs(environment.iter().copied()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn init_check_and_show_agree() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ringtail.toml");
    let file = file.to_str().unwrap();

    assert_eq!(ringtail(&["config", "init", "--output", file], &[]).status.code(), Some(0));
    let again = ringtail(&["config", "init", "--output", file], &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("--force"), "{}", text(&again.stderr));
    assert_eq!(ringtail(&["config", "init", "--output", file, "--force"], &[]).status.code(), Some(0));
    let printed = ringtail(&["config", "init"], &[]);
    assert_eq!(text(&printed.stdout), std::fs::read_to_string(file).unwrap());

    let checked = ringtail(&["config", "check", "--config", file], &[]);
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked.stderr));
    assert!(checked.stdout.is_empty());
    let data = directory.path().join("data");
    let here = [("RINGTAIL_WAL__DIRECTORY", data.to_str().unwrap())];
    let checked = ringtail(&["config", "check", "--json", "--config", file], &here);
    assert_eq!((checked.status.code(), text(&checked.stderr)), (Some(0), String::new()));
    let verdict: Value = serde_json::from_slice(&checked.stdout).unwrap();
    let service = json!({"directory": data, "reload": "not_running"});
    let expected = json!({
        "valid": true, "error": null, "problems": [], "file": file, "without_effect": [], "service": service
    });
    assert_eq!(verdict, expected);

    let shown = ringtail(&["config", "show", "--config", file], &[("RINGTAIL_LOG__LEVEL", "debug")]);
    let shown = text(&shown.stdout);
    assert!(shown.contains("level = \"debug\"  # environment variable RINGTAIL_LOG__LEVEL"), "{shown}");
    assert!(shown.lines().any(|line| line.starts_with("segment_bytes") && line.contains(file)), "{shown}");

    let shown = ringtail(&["config", "show", "--json", "--config", file], &[("RINGTAIL_LOG__LEVEL", "debug")]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    let level = shown.as_array().unwrap().iter().find(|setting| setting["key"] == "log.level").unwrap();
    assert_eq!(level["value"], "debug");
    assert_eq!(level["source"]["variable"], "RINGTAIL_LOG__LEVEL");
}

#[test]
fn a_bad_configuration_exits_with_64_and_names_every_problem() {
    let environment = [("RINGTAIL_WAL__SEGMENT_BYTES", "1GiB"), ("RINGTAIL_WAL__DIRECTRY", "/x")];
    let checked = ringtail(&["config", "check"], &environment);
    assert_eq!(checked.status.code(), Some(64));
    assert!(checked.stdout.is_empty());
    let message = text(&checked.stderr);
    for expected in ["wal.segment_bytes", "256MiB", "RINGTAIL_WAL__DIRECTRY", "RINGTAIL_WAL__DIRECTORY"] {
        assert!(message.contains(expected), "{expected} in {message}");
    }
    let checked = ringtail(&["config", "check", "--json"], &environment);
    assert_eq!((checked.status.code(), text(&checked.stderr)), (Some(64), message));
    let verdict: Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!((&verdict["valid"], &verdict["service"]), (&json!(false), &Value::Null));
    let keys: Vec<&Value> = verdict["problems"].as_array().unwrap().iter().map(|problem| &problem["key"]).collect();
    assert_eq!(keys, ["RINGTAIL_WAL__DIRECTRY", "wal.segment_bytes"], "{verdict}");
    let both = [("RINGTAIL_FORWARD__DELIVERY", "exactly_once"), ("RINGTAIL_FORWARD__LIVE_FIRST", "true")];
    let checked = ringtail(&["config", "check"], &both);
    assert_eq!(checked.status.code(), Some(64));
    let message = text(&checked.stderr);
    assert!(message.contains("cannot be used with forward.delivery = \"exactly_once\""), "{message}");
    assert_eq!(ringtail(&["config", "check", "--config", "/nonexistent"], &[]).status.code(), Some(64));
    assert_eq!(ringtail(&["config", "nonsense"], &[]).status.code(), Some(64));
}
