//! `ringtail top`, and what a package makes from the command line: completions and man pages.

#[path = "support/http.rs"]
mod http;
#[path = "support/process.rs"]
mod process;

use std::process::{Command, Output};

use process::{Options, Process};

fn ringtail(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringtail")).args(args).output().expect("run the binary")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the output is UTF-8")
}

#[tokio::test]
async fn one_frame_shows_the_path_of_a_batch() {
    let directory = tempfile::tempdir().unwrap();
    let (mut process, addresses) = Process::start(&Options::small(directory.path()));
    let sent =
        ringtail(&["bench", "--url", &format!("ws://{}", addresses.http), "--connections", "1", "--duration", "1s"]);
    assert!(sent.status.success(), "{}", text(&sent.stderr));

    let frame = ringtail(&["top", "--once", "--url", &format!("http://{}", addresses.admin)]);
    assert!(frame.status.success(), "{}", text(&frame.stderr));
    let frame = text(&frame.stdout);
    let lines: Vec<&str> = frame.lines().collect();
    assert_eq!(lines.len(), 24, "{frame}");
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{frame}");
    for word in ["Collecting only", "Clients", "Log", "Kafka", "not configured", "parked: none", "q ends"] {
        assert!(frame.contains(word), "no {word:?} in\n{frame}");
    }
    assert!(!frame.contains("waiting          0 events") && !frame.contains(" ago"), "{frame}");

    let json = ringtail(&["top", "--once", "--json", "--url", &format!("http://{}", addresses.admin)]);
    assert!(json.status.success(), "{}", text(&json.stderr));
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(json["wal"]["pending_events"].as_u64() > Some(0), "{json}");

    let changed = "log.level = \"debug\"\nwal.bytes_max = \"1GiB\"\n";
    let before = std::fs::read_to_string(process.configuration()).unwrap();
    std::fs::write(process.configuration(), before + changed).unwrap();
    process.hang_up();
    http::wait_until("the reload", || !http::status(addresses.admin)["reload"].is_null()).await;
    let frame = text(&ringtail(&["top", "--once", "--url", &format!("http://{}", addresses.admin)]).stdout);
    assert!(frame.contains("ago: changed log.level; restart for wal.bytes_max"), "{frame}");
    assert!(process.stop().success());

    let gone = ringtail(&["top", "--once", "--url", &format!("http://{}", addresses.admin)]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("no answer from"), "{}", text(&gone.stderr));
}

#[test]
fn without_a_terminal_or_an_address_it_is_bad_usage() {
    for args in [&["top"][..], &["top", "--json"], &["top", "--once", "--url", "https://x"]] {
        let output = ringtail(args);
        assert_eq!(output.status.code(), Some(64), "{args:?}: {}", text(&output.stderr));
    }
}

#[test]
fn completions_and_man_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = ringtail(&["completions", shell]);
        assert!(script.status.success());
        let script = text(&script.stdout);
        for command in ["serve", "backlog", "parked", "top", "--raccoon-env"] {
            assert!(script.contains(command.trim_start_matches('-')), "{shell}: no {command}");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man1");
    assert!(ringtail(&["man", pages.to_str().unwrap()]).status.success());
    let page = |name: &str| std::fs::read_to_string(pages.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(page("ringtail.1").contains("ringtail\\-serve(1)"));
    let status = page("ringtail-backlog-status.1");
    assert!(status.contains(".SH EXAMPLES") && !status.contains(".SH EXTRA"), "{status}");
    assert!(status.contains("ringtail\\-backlog\\-status"), "{status}");
}
