//! The promises of the client side, against a scripted server: batches are pipelined, retried under their own name and in
//! order, and never retried when refused for good; `ringtail send` and `ringtail bench` say by their exit code how it went.

mod bench;
mod scripted_server;
mod send;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use ringtail::client::{Client, ClientError, ClientOptions, RetryPolicy, Sender, new_req_guid};
use ringtail::proto::{Code, Event, SendEventRequest};
use scripted_server::{Protocol, ScriptedServer, Step};

fn request(payload: &str) -> SendEventRequest {
    let event = Event { event_bytes: payload.as_bytes().to_vec().into(), r#type: "t".into() };
    SendEventRequest { req_guid: new_req_guid(), sent_time: None, events: vec![event] }
}

fn options(url: &str) -> ClientOptions {
    ClientOptions::new(url.parse().unwrap(), "device-7")
}

fn sender(url: &str) -> Sender {
    let policy = RetryPolicy { delay_min: Duration::from_millis(1), ..RetryPolicy::default() };
    Sender::new(options(url), policy)
}

#[tokio::test]
async fn every_protocol_delivers_and_says_who_it_is() {
    for protocol in Protocol::ALL {
        let server = ScriptedServer::start(protocol, []).await;
        let options = ClientOptions { group: Some("fleet".into()), ..options(&server.url) };
        let client = Client::connect(&options).await.unwrap();
        let batch = request("hello");
        let answer = client.send(batch.clone()).await.unwrap();
        assert_eq!(answer.data["req_guid"], batch.req_guid, "{protocol:?}");
        let seen = server.seen();
        assert_eq!(seen[0].request, batch);
        assert_eq!((seen[0].id.as_str(), seen[0].group.as_str()), ("device-7", "fleet"), "{protocol:?}");
    }
}

#[tokio::test]
async fn websocket_pipelines_and_matches_answers_by_name() {
    // The server answers nothing until it has eight requests, and then the last one first.
    let server = ScriptedServer::start(Protocol::WebSocket, [Step::AnswerInReverse(8)]).await;
    let client = Client::connect(&options(&server.url)).await.unwrap();
    let batches: Vec<_> = (0..8).map(|number| request(&number.to_string())).collect();
    let answers = join_all(batches.iter().map(|batch| client.send(batch.clone()))).await;
    for (batch, answer) in batches.iter().zip(answers) {
        assert_eq!(answer.unwrap().data["req_guid"], batch.req_guid);
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn websocket_answers_pings() {
    // The server answers the batch only after the pong.
    let server = ScriptedServer::start(Protocol::WebSocket, [Step::PingFirst]).await;
    let client = Client::connect(&options(&server.url)).await.unwrap();
    client.send(request("a")).await.unwrap();
}

#[tokio::test]
async fn a_dropped_connection_fails_every_batch_in_flight() {
    let server = ScriptedServer::start(Protocol::WebSocket, [Step::Ignore, Step::Ignore, Step::Drop]).await;
    let client = Client::connect(&options(&server.url)).await.unwrap();
    let batches = ["a", "b", "c"].map(request);
    for answer in join_all(batches.into_iter().map(|batch| client.send(batch))).await {
        assert!(answer.unwrap_err().is_retryable());
    }
    assert!(client.is_closed());
    assert!(client.send(request("d")).await.unwrap_err().is_retryable());
}

#[tokio::test]
async fn closing_waits_until_the_server_has_seen_it() {
    let server = ScriptedServer::start(Protocol::WebSocket, []).await;
    let client = Client::connect(&options(&server.url)).await.unwrap();
    client.send(request("a")).await.unwrap();
    client.close().await;
    assert!(client.is_closed());
    server.all_closed().await;
}

#[tokio::test]
async fn a_retry_carries_the_same_name() {
    for (protocol, steps) in [
        (Protocol::WebSocket, vec![Step::Refuse(Code::InternalError), Step::Drop, Step::Close(1011)]),
        (Protocol::WebSocket, vec![Step::RefuseNameless(Code::MaxUserLimitReached)]),
        (Protocol::Rest, vec![Step::Refuse(Code::InternalError), Step::Status(503), Step::Status(429)]),
        (Protocol::Grpc, vec![Step::Refuse(Code::InternalError), Step::Status(14)]),
    ] {
        let tries = steps.len() + 1;
        let server = ScriptedServer::start(protocol, steps).await;
        let batch = request("a");
        let receipt = sender(&server.url).deliver(&batch).await.unwrap();
        assert_eq!(receipt.attempts as usize, tries, "{protocol:?}");
        let seen = server.seen();
        assert_eq!(seen.len(), tries, "{protocol:?}");
        assert!(seen.iter().all(|seen| seen.request == batch), "{protocol:?}");
    }
}

#[tokio::test]
async fn a_batch_without_an_answer_is_retried_on_a_new_connection() {
    let server = ScriptedServer::start(Protocol::WebSocket, [Step::Ignore]).await;
    let options = ClientOptions { answer_timeout: Duration::from_millis(50), ..options(&server.url) };
    let sender = Sender::new(options, RetryPolicy::default());
    assert_eq!(sender.deliver(&request("a")).await.unwrap().attempts, 2);
    assert_eq!((server.connections(), sender.reconnects(), sender.retries()), (2, 1, 1));
}

#[tokio::test]
async fn a_bad_batch_is_not_retried() {
    for (protocol, step) in [
        (Protocol::WebSocket, Step::Refuse(Code::BadRequest)),
        (Protocol::WebSocket, Step::RefuseNameless(Code::BadRequest)),
        (Protocol::WebSocket, Step::Close(1009)),
        (Protocol::Rest, Step::Refuse(Code::BadRequest)),
        (Protocol::Rest, Step::Status(413)),
        (Protocol::Grpc, Step::Refuse(Code::BadRequest)),
        (Protocol::Grpc, Step::Status(16)),
    ] {
        let server = ScriptedServer::start(protocol, [step.clone()]).await;
        let not_acked = sender(&server.url).deliver(&request("a")).await.unwrap_err();
        assert_eq!(not_acked.attempts, 1, "{protocol:?} {step:?}");
        assert!(matches!(not_acked.error, ClientError::Refused(_)), "{protocol:?} {step:?}: {}", not_acked.error);
        assert_eq!(server.seen().len(), 1);
    }
}

#[tokio::test]
async fn a_nameless_refusal_among_several_finds_its_batch() {
    // Two in flight, one refused without a name: both go again, each alone, and only the bad one is refused.
    let server = ScriptedServer::start(
        Protocol::WebSocket,
        [Step::Ignore, Step::RefuseNameless(Code::BadRequest), Step::RefuseNameless(Code::BadRequest)],
    )
    .await;
    let sender = sender(&server.url);
    let (first, second) = (request("a"), request("b"));
    let outcomes = [sender.deliver(&first), sender.deliver(&second)];
    let outcomes = join_all(outcomes).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn retries_end_when_time_is_up() {
    let policy = RetryPolicy { retry_for: Duration::ZERO, ..RetryPolicy::default() };
    let not_acked = Sender::new(options(&nobody()), policy).deliver(&request("a")).await.unwrap_err();
    assert_eq!(not_acked.attempts, 1);
    assert!(matches!(not_acked.error, ClientError::Connect { .. }), "{}", not_acked.error);
}

/// A URL where nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("ws://{}", listener.local_addr().unwrap())
}

/// Runs `ringtail` with `stdin`, away from the test's runtime.
async fn ringtail(arguments: &[&str], stdin: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    command.args(arguments);
    feed(command, stdin).await
}

async fn feed(mut command: Command, stdin: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let stdin = stdin.to_owned();
    let run = move || {
        let mut child = command.spawn().unwrap();
        // It may exit without reading.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[tokio::test]
async fn exit_codes_of_bad_usage_and_help() {
    for (arguments, exit_code) in [
        (&["send", "--help"][..], 0),
        (&["bench", "--help"], 0),
        (&["--version"], 0),
        (&["send", "--url", "wss://edge"], 64),
        (&["send", "--id", "bad\nid"], 64),
        (&["send", "--no-such-flag"], 64),
        (&["bench", "--connections", "0"], 64),
        (&["bench", "--url", "http://127.0.0.1:1", "--idle"], 64),
        (&["no-such-command"], 64),
        (&[], 64),
    ] {
        let output = ringtail(arguments, "").await;
        assert_eq!(output.status.code(), Some(exit_code), "{arguments:?} {output:?}");
        assert_eq!(output.stdout.is_empty(), exit_code != 0, "{arguments:?}");
    }
}

#[tokio::test]
async fn the_example_delivers_and_retries() {
    let example = Path::new(env!("CARGO_BIN_EXE_ringtail")).with_file_name("examples").join("client");
    if !example.exists() {
        // `cargo test` builds it, `cargo test --test client` does not.
        assert!(Command::new(env!("CARGO")).args(["build", "--example", "client"]).status().unwrap().success());
    }
    let steps = [Step::Refuse(Code::InternalError), Step::Drop, Step::PingFirst, Step::Refuse(Code::BadRequest)];
    let server = ScriptedServer::start(Protocol::WebSocket, steps).await;
    let lines: String = (0..250).map(|number| format!("{number}\n")).collect();
    let mut command = Command::new(example);
    command.args([&format!("{}/api/v1/events", server.url), "device-7"]);
    let output = feed(command, &lines).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "150 events acked, 100 refused\n");
    let seen = server.seen();
    assert_eq!(seen.iter().map(|seen| seen.request.events.len()).collect::<Vec<_>>(), [100, 100, 100, 100, 50]);
    let seen_first = seen[0].request.clone();
    assert!(seen[..3].iter().all(|seen| seen.request == seen_first && seen.id == "device-7"));
}
