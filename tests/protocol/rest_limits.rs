//! What REST refuses, and what a client cannot make it do.

use std::time::Duration;

use bytesize::ByteSize;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::*;

const TYPES: [&str; 2] = ["application/json", "application/proto"];

/// A client that sends everything before it reads must still see the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_is_answered_even_if_the_client_sends_all_of_it() {
    let server = Server::with(|config| config.batch_bytes_max = ByteSize::mib(1)).await;
    let body = vec![b' '; 12 << 20];
    for content_type in TYPES {
        let reply = post(&server, content_type, &body).await;
        assert_eq!((reply.status, reply.header("content-type")), (413, Some(content_type)));
        assert_eq!(outcome(&reply.answer()), (2, 2, None));
        assert!(reply.answer().reason.contains("1048576"), "{}", reply.answer().reason);
    }
    // The same without an announced length.
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let head = format!("{}\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", post_head("application/proto"));
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..12 {
        stream.write_all(b"100000\r\n").await.unwrap();
        stream.write_all(&vec![0; 0x10_0000]).await.unwrap();
        stream.write_all(b"\r\n").await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    assert_eq!(read_reply(&mut stream, true).await.status, 413);
    server.records(0);
    assert_eq!(server.metric("ringtail_ingest_rejected_batches_total{protocol=\"rest\",reason=\"too_large\"}"), 3.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_asks_first_is_told_at_once() {
    let server = Server::with(|config| config.batch_bytes_max = ByteSize::kib(64)).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let head = format!(
        "{}\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n\r\n",
        post_head("application/proto")
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(read_reply(&mut stream, true).await.status, 413);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_exact_and_count_protobuf_bytes() {
    let payload = vec![7; 10_000];
    let fits = request("r", &[&payload]);
    let bytes = fits.encoded_len();
    let server = Server::with(|config| {
        config.batch_bytes_max = ByteSize::b(bytes as u64);
        config.batch_events_max = 3;
    })
    .await;
    assert_eq!(post(&server, "application/proto", &fits.encode_to_vec()).await.status, 200);
    let mut larger = fits.clone();
    larger.events[0].event_bytes = vec![7; 10_001].into();
    assert_eq!(post(&server, "application/proto", &larger.encode_to_vec()).await.status, 413);
    // Its text is a third longer, and yet it fits.
    let json = |payload: &[u8]| {
        use base64::Engine;
        let payload = base64::prelude::BASE64_STANDARD.encode(payload);
        format!(r#"{{"req_guid": "r", "events": [{{"event_bytes": "{payload}", "type": "click"}}]}}"#)
    };
    assert_eq!(post(&server, "application/json", json(&payload).as_bytes()).await.status, 200);
    let reply = post(&server, "application/json", json(&larger.events[0].event_bytes).as_bytes()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (413, (2, 2, Some("r"))));
    assert_eq!(post(&server, "application/proto", &request("r", &[b"", b"", b""]).encode_to_vec()).await.status, 200);
    let reply = post(&server, "application/proto", &request("r", &[b"", b"", b"", b""]).encode_to_vec()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (413, (2, 2, Some("r"))));
    assert!(reply.answer().reason.contains('3'), "{}", reply.answer().reason);
    server.records(3);
}

/// A list of empty events must not take many times its own size in memory, nor may an error repeat what was sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_json_is_answered_briefly() {
    let server = Server::start().await;
    let long = format!(r#"{{"events": "{}"}}"#, "x".repeat(1 << 20));
    let reply = post(&server, "application/json", long.as_bytes()).await;
    assert_eq!(reply.status, 400);
    assert!(reply.body.len() < 1000, "{} bytes", reply.body.len());
    let many = format!(r#"{{"req_guid": "m", "events": [{}null]}}"#, "null,".repeat(1 << 20));
    let reply = post(&server, "application/json", many.as_bytes()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (413, (2, 2, Some("m"))));
    let deep = format!(r#"{{"x": {}"#, "[".repeat(1 << 20));
    assert_eq!(post(&server, "application/json", deep.as_bytes()).await.status, 400);
    server.records(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_means_try_again_later() {
    let server = Server::with_log(|_| {}, |wal| wal.free_bytes_min = ByteSize::pib(1)).await;
    while !server.wal.status().full {
        let _ = post(&server, "application/proto", &request("r", &[b"x"]).encode_to_vec()).await;
    }
    for (content_type, body) in [
        ("application/proto", request("r", &[b"x"]).encode_to_vec()),
        ("application/json", br#"{"req_guid": "r", "events": [{"event_bytes": "AQ=="}]}"#.to_vec()),
    ] {
        let reply = post(&server, content_type, &body).await;
        assert_eq!((reply.status, reply.header("content-type")), (503, Some(content_type)));
        assert!(reply.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
        assert_eq!(outcome(&reply.answer()), (2, 3, Some("r")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_without_room_in_its_queue_means_try_again() {
    let server = Server::with(|config| config.in_flight_bytes_max = ByteSize::b(50)).await;
    let reply = post(&server, "application/proto", &request("r", &[&[1; 100]]).encode_to_vec()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (503, (2, 3, Some("r"))));
    assert_eq!(server.metric("ringtail_ingest_rejected_batches_total{protocol=\"rest\",reason=\"overloaded\"}"), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_log_means_try_again() {
    let server = Server::start().await;
    server.wal.close();
    let reply = post(&server, "application/proto", &request("r", &[b"x"]).encode_to_vec()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (503, (2, 3, Some("r"))));
    assert!(reply.header("retry-after").is_some());
}

/// Announcing bytes is free: it must not keep those out who send some.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn announced_bodies_do_not_starve_others() {
    let server = Server::with(|config| config.in_flight_bytes_max = config.batch_bytes_max).await;
    let head = format!("{}\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n", post_head("application/proto"));
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        idle.push(stream);
    }
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 8.0).await;
    let reply = post(&server, "application/proto", &request("r", &[&[1; 100_000]]).encode_to_vec()).await;
    assert_eq!(reply.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_of_bodies_that_are_being_read_is_bounded() {
    let server = Server::with(|config| {
        config.batch_bytes_max = ByteSize::mib(1);
        config.in_flight_bytes_max = ByteSize::mib(1);
    })
    .await;
    let head = format!("{}\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", post_head("application/proto"));
    let mut held = Vec::new();
    // A body may be refused in favour of the one that probes, so more are held until there is no room for a probe.
    let refused = async {
        loop {
            let mut stream = TcpStream::connect(server.http).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            // All but the last byte.
            stream.write_all(&vec![0; 999_999]).await.unwrap();
            held.push(stream);
            let reply = post(&server, "application/proto", &vec![0; 1_000_000]).await;
            if reply.status != 400 {
                break reply;
            }
        }
    };
    let reply = within("refusal", refused).await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    assert_eq!(outcome(&reply.answer()), (2, 3, None));
    // Once they are gone there is room again.
    drop(held);
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 0.0).await;
    let reply = post(&server, "application/proto", &request("r", &[&[1; 900_000]]).encode_to_vec()).await;
    assert_eq!(reply.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_not_finished_in_time_ends_its_connection() {
    let server = Server::with(|config| config.read_timeout = Duration::from_millis(200)).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let head = format!("{}\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345", post_head("application/json"));
    stream.write_all(head.as_bytes()).await.unwrap();
    let reply = read_reply(&mut stream, true).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (408, (2, 2, None)));
    until_closed(&mut stream).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    stream.write_all(b"POST /api/v1/events HTTP/1.1\r\nHost: x").await.unwrap();
    until_closed(&mut stream).await;
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 0.0).await;
    let closed = "ringtail_ingest_connections_closed_total{protocol=\"rest\",reason=\"read_timeout\"}";
    assert_eq!(server.metric(closed), 2.0);
}

/// Requests without end whose answers are never read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_no_answers_is_disconnected() {
    let server = Server::with(|config| config.write_timeout = Duration::from_millis(200)).await;
    let stream = TcpStream::connect(server.http).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let flood = tokio::spawn(async move {
        let ping = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
        while write.write_all(&ping).await.is_ok() {}
    });
    let closed = "ringtail_ingest_connections_closed_total{protocol=\"rest\",reason=\"write_timeout\"}";
    server.await_metric(closed, 1.0).await;
    within("flood", flood).await.unwrap();
    let mut sink = Vec::new();
    let _ = within("rest", read.read_to_end(&mut sink)).await;
}
