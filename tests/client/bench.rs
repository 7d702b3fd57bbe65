//! `ringtail bench`, as a library and as a command.

use std::time::Duration;

use ringtail::client::bench::{self, BenchError, BenchOptions, BenchReport, IdleOptions};
use ringtail::proto::Code;

use super::scripted_server::{Protocol, ScriptedServer, Step};
use super::{json, nobody, ringtail};

/// A short run, which ends by itself.
fn short_bench(url: &str) -> BenchOptions {
    BenchOptions {
        connections: 3,
        window: 2,
        warmup: Duration::ZERO,
        duration: Duration::from_millis(500),
        threads: 2,
        ..BenchOptions::new(url.parse().unwrap())
    }
}

#[tokio::test]
async fn bench_counts_what_the_server_acked() {
    for protocol in Protocol::ALL {
        let server = ScriptedServer::start(protocol, []).await;
        let report = bench::run(short_bench(&server.url)).await.unwrap();
        assert!(report.is_clean() && report.acked_batches > 0, "{report}");
        assert_eq!((report.connections, report.connections_open_at_end), (3, 3));
        assert_eq!(report.acked_events, report.acked_batches * 20);
        assert!(report.latency_ms.unwrap().max > 0.0);

        let seen = server.seen();
        assert!(seen.len() as u64 >= report.acked_batches, "{} seen, {report}", seen.len());
        let mut names: Vec<_> = seen.iter().map(|seen| &seen.request.req_guid).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), seen.len(), "every batch has its own name");
        assert!(seen.iter().all(|seen| {
            seen.request.events.len() == 20 && seen.request.events.iter().all(|event| event.event_bytes.len() == 200)
        }));
    }
}

#[tokio::test]
async fn bench_keeps_its_rate() {
    let server = ScriptedServer::start(Protocol::WebSocket, []).await;
    // 50 batches per second for a hair less than two seconds: even a very slow machine can keep that up.
    let rate = Some(1000.0);
    let options = BenchOptions { rate, duration: Duration::from_millis(1990), ..short_bench(&server.url) };
    let report = bench::run(options).await.unwrap();
    assert_eq!(server.seen().len() as u64 + report.unsent_batches, 100, "{report}");
    assert!(report.acked_batches <= 100, "{report}");
}

#[tokio::test]
async fn bench_reports_refusals_lost_connections_and_missing_answers() {
    let steps = [Step::Refuse(Code::InternalError), Step::PingFirst, Step::Drop];
    let server = ScriptedServer::start(Protocol::WebSocket, steps).await;
    // The run ends with its only connection, long before its time.
    let duration = Duration::from_secs(60);
    let options = BenchOptions { connections: 1, window: 1, threads: 1, duration, ..short_bench(&server.url) };
    let report = bench::run(options.clone()).await.unwrap();
    let BenchReport { rejected_batches, unanswered_batches, connections_open_at_end, .. } = &report;
    assert_eq!(rejected_batches["CODE_INTERNAL_ERROR: scripted"], 1, "{report}");
    assert_eq!((report.acked_batches, *unanswered_batches, *connections_open_at_end), (1, 1, 0), "{report}");
    assert_eq!(report.errors.values().sum::<u64>(), 1, "{report}");

    let server = ScriptedServer::start(Protocol::WebSocket, [Step::Ack, Step::Ignore]).await;
    let options = BenchOptions {
        endpoint: server.url.parse().unwrap(),
        duration: Duration::from_millis(500),
        answer_timeout: Duration::from_millis(50),
        ..options
    };
    let report = bench::run(options).await.unwrap();
    assert_eq!((report.acked_batches, report.unanswered_batches), (1, 1), "{report}");
}

#[tokio::test]
async fn bench_holds_idle_connections() {
    let server = ScriptedServer::start(Protocol::WebSocket, []).await;
    let idle = Some(IdleOptions { message_bytes: Some(100_000) });
    let report = bench::run(BenchOptions { idle, connections: 20, ..short_bench(&server.url) }).await.unwrap();
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.acked_batches, report.connections_open_at_end), (20, 20));
    assert!(server.seen().iter().all(|seen| seen.request.events[0].event_bytes.len() == 100_000));
}

#[tokio::test]
async fn bench_fails_when_nobody_listens() {
    let error = bench::run(short_bench(&nobody())).await.unwrap_err();
    assert!(matches!(error, BenchError::NoConnection { connections: 3, .. }), "{error}");
    let output = ringtail(&["bench", "--url", &nobody()], "").await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[tokio::test]
async fn bench_prints_json_for_scripts() {
    let server = ScriptedServer::start(Protocol::WebSocket, []).await;
    let arguments = ["bench", "--url", &server.url, "--connections", "2", "--warmup", "0s", "--duration", "200ms"];
    let output = ringtail(&[&arguments[..], &["--json"]].concat(), "").await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(json(&output)["acked_events_per_second"].as_f64().unwrap() > 0.0);
    assert!(output.stderr.is_empty(), "{output:?}");
}
