//! `ringtail send`.

use std::io::Write;
use std::process::{Command, Stdio};

use ringtail::proto::Code;

use super::scripted_server::{Protocol, ScriptedServer, Step};
use super::{json, nobody, ringtail};

#[tokio::test]
async fn send_keeps_the_order_through_retries() {
    for protocol in Protocol::ALL {
        let steps = [Step::Ack, Step::Refuse(Code::InternalError), Step::Refuse(Code::InternalError), Step::Ack];
        let server = ScriptedServer::start(protocol, steps).await;
        let lines: String = (0..10).map(|number| format!("line {number}\n")).collect();
        let arguments =
            ["send", "--url", &server.url, "--id", "device-7", "--type", "click", "--batch-events", "4", "--json"];
        let output = ringtail(&[&arguments[..], &["--linger", "60s"]].concat(), &lines).await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let summary = json(&output);
        assert_eq!(
            (&summary["events_acked"], &summary["batches_acked"], &summary["retries"]),
            (&10.into(), &3.into(), &2.into())
        );

        let seen = server.seen();
        let names: Vec<_> = seen.iter().map(|seen| &seen.request.req_guid).collect();
        assert_eq!(names.len(), 5);
        assert!(names[1] == names[2] && names[2] == names[3] && names[0] != names[1] && names[3] != names[4]);
        let acked = [0, 3, 4].iter().flat_map(|at| &seen[*at].request.events);
        let payloads: String = acked
            .map(|event| {
                assert_eq!(event.r#type, "click");
                format!("{}\n", std::str::from_utf8(&event.event_bytes).unwrap())
            })
            .collect();
        assert_eq!(payloads, lines);
        assert!(seen.iter().all(|seen| seen.id == "device-7" && seen.request.sent_time.is_some()));
    }
}

#[tokio::test]
async fn send_goes_on_after_a_bad_batch_but_fails() {
    let server = ScriptedServer::start(Protocol::WebSocket, [Step::Refuse(Code::BadRequest)]).await;
    let output = ringtail(&["send", "--url", &server.url, "--batch-events", "1"], "bad\ngood\n").await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("1 events acked in 1 batches") && text.contains("1 events NOT acked"), "{text}");
    assert!(text.contains("CODE_BAD_REQUEST"), "{text}");
}

#[tokio::test]
async fn send_stops_when_the_server_stays_out_of_reach() {
    let arguments = ["send", "--url", &nobody(), "--retry-for", "0s", "--batch-events", "1", "--json"];
    let output = ringtail(&arguments, "a\nb\n").await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let summary = json(&output);
    assert_eq!((&summary["events_acked"], &summary["events_not_acked"]), (&0.into(), &1.into()));
    assert_eq!(summary["incomplete"], true);
}

#[tokio::test]
async fn send_does_not_wait_for_the_end_of_its_input() {
    let server = ScriptedServer::start(Protocol::WebSocket, []).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.args(["send", "--url", &server.url, "--linger", "1ms"]).stdin(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for count in 1..=3 {
        stdin.write_all(b"line\n").unwrap();
        server.seen_at_least(count).await;
    }
    drop(stdin);
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn send_sums_up_when_interrupted() {
    // The first line is acked; the second is in flight when the signal comes.
    let server = ScriptedServer::start(Protocol::WebSocket, [Step::Ack, Step::Ignore]).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.args(["send", "--url", &server.url, "--linger", "1ms", "--json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for count in 1..=2 {
        stdin.write_all(b"line\n").unwrap();
        server.seen_at_least(count).await;
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    drop(stdin);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let summary = json(&output);
    assert_eq!((&summary["events_acked"], &summary["events_not_acked"]), (&1.into(), &1.into()));
    assert_eq!(summary["interrupted"], true);
}

#[tokio::test]
async fn send_reads_files_in_turn() {
    let server = ScriptedServer::start(Protocol::Rest, []).await;
    let directory = tempfile::tempdir().unwrap();
    let files = ["first", "second"].map(|name| directory.path().join(name));
    for file in &files {
        std::fs::write(file, format!("{}\n", file.file_name().unwrap().display())).unwrap();
    }
    let [first, second] = files.each_ref().map(|file| file.to_str().unwrap());
    let output = ringtail(&["send", "--url", &server.url, "--linger", "60s", first, second], "").await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let events: Vec<_> = server.seen()[0].request.events.iter().map(|event| event.event_bytes.clone()).collect();
    assert_eq!(events, ["first", "second"]);

    let output = ringtail(&["send", "--url", &server.url, first, "/no/such/file"], "").await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("open /no/such/file"), "{output:?}");
    assert_eq!(server.seen().len(), 1, "nothing is sent when a file is missing");
}
