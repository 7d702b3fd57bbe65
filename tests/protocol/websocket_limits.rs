//! What a WebSocket refuses, and what a client cannot make it do.

use std::time::Duration;

use bytesize::ByteSize;
use futures_util::SinkExt;
use prost::Message as _;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use crate::support::*;

/// Past the frame limit the name is unknown; below it the batch itself is measured. Either way: an answer, then 1009.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_is_answered_and_then_the_connection_closes() {
    let server = Server::with(|config| config.batch_bytes_max = ByteSize::kib(64)).await;
    for (size, name) in [(70_000, "large"), (200_000, ""), (3 << 20, "")] {
        let mut websocket = connect(&server, &[("x-user-id", "a")]).await;
        send(&mut websocket, &request("before", &[b"x"])).await;
        send(&mut websocket, &request("large", &[&vec![0; size]])).await;
        // Answers may come in any order.
        let mut answers = [answer(&mut websocket).await, answer(&mut websocket).await];
        answers.sort_by_key(|answer| answer.status);
        let [success, refusal] = answers;
        assert_eq!(outcome(&success), (1, 1, Some("before")));
        assert_eq!(outcome(&refusal), (2, 2, Some(name)), "{size}");
        assert!(refusal.reason.contains("65536"), "{}", refusal.reason);
        assert_eq!(closed(&mut websocket).await.0, 1009, "{size}");
    }
    server.records(3);
    let rejected = "ringtail_ingest_rejected_batches_total{protocol=\"websocket\",reason=\"too_large\"}";
    assert_eq!(server.metric(rejected), 3.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_text_is_answered_in_text() {
    let server = Server::with(|config| config.batch_bytes_max = ByteSize::kib(64)).await;
    let mut websocket = connect(&server, &[]).await;
    websocket.send(Message::text(" ".repeat(200_000))).await.unwrap();
    let Message::Text(text) = next(&mut websocket).await else { panic!("not text") };
    assert_eq!(outcome(&json_answer(text.as_bytes())), (2, 2, Some("")));
    assert_eq!(closed(&mut websocket).await.0, 1009);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_events_leave_the_connection_open() {
    let server = Server::with(|config| config.batch_events_max = 2).await;
    let mut websocket = connect(&server, &[]).await;
    send(&mut websocket, &request("many", &[b"", b"", b""])).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (2, 2, Some("many")));
    send(&mut websocket, &request("few", &[b"", b""])).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("few")));
}

/// The largest batch must fit however small the budget is: "try again" would never end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_batch_can_be_read_with_the_smallest_budget() {
    let payload = vec![7; 200_000];
    let largest = request("max", &[&payload]);
    let server = Server::with(|config| {
        config.batch_bytes_max = ByteSize::b(largest.encoded_len() as u64);
        // The log needs a little more than the batch; ingest must not need more than that.
        config.in_flight_bytes_max = ByteSize::b(largest.encoded_len() as u64 + 200);
    })
    .await;
    let mut websocket = connect(&server, &[]).await;
    send(&mut websocket, &largest).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("max")));
    let numbers = serde_json::to_string(&vec![7; 180_000]).unwrap();
    websocket.send(Message::text(format!(r#"{{"events": [{{"event_bytes": {numbers}}}]}}"#))).await.unwrap();
    let Message::Text(text) = next(&mut websocket).await else { panic!("not text") };
    assert_eq!(outcome(&json_answer(text.as_bytes())), (1, 1, Some("")));
}

/// Announcing bytes is free: it must not keep those out who send some.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn announced_messages_do_not_starve_others() {
    let server = Server::with(|config| config.in_flight_bytes_max = config.batch_bytes_max).await;
    let announcement = &frame(0x82, &vec![0; 4_000_000])[..14];
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut stream = raw_websocket(&server, "").await;
        stream.write_all(announcement).await.unwrap();
        stream.write_all(&[0]).await.unwrap();
        idle.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut websocket = connect(&server, &[]).await;
    send(&mut websocket, &request("r", &[&[1; 100_000]])).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("r")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_of_messages_that_are_being_read_is_bounded() {
    let server = Server::with(|config| {
        config.batch_bytes_max = ByteSize::mib(1);
        config.in_flight_bytes_max = ByteSize::mib(1);
    })
    .await;
    let bytes = frame(0x82, &vec![0; 1_000_000]);
    let rejected = "ringtail_ingest_rejected_batches_total{protocol=\"websocket\",reason=\"overloaded\"}";
    let mut held = Vec::new();
    while server.metric(rejected) == 0.0 {
        assert!(held.len() < 10, "nothing bounds it");
        let mut stream = raw_websocket(&server, "").await;
        stream.write_all(&bytes[..bytes.len() - 1]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        held.push(stream);
    }
    // Only the one that was refused has anything to read.
    let readable = futures_util::future::select_all(
        held.iter().map(|stream| Box::pin(async move { stream.peek(&mut [0]).await })),
    );
    let (_, refused, _) = within("refusal", readable).await;
    let last = &mut held[refused];
    assert_eq!(outcome(&read_answer(last).await), (2, 3, Some("")));
    let (first, close) = read_frame(last).await;
    assert_eq!((first, u16::from_be_bytes([close[0], close[1]])), (0x88, 1013));
    drop(held);
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 0.0).await;
    let mut websocket = connect(&server, &[]).await;
    send(&mut websocket, &request("r", &[&[1; 900_000]])).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("r")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_means_try_again_and_the_connection_stays() {
    let server = Server::with_log(|_| {}, |wal| wal.free_bytes_min = ByteSize::pib(1)).await;
    let mut websocket = connect(&server, &[]).await;
    while !server.wal.status().full {
        send(&mut websocket, &request("r", &[b"x"])).await;
        answer(&mut websocket).await;
    }
    for _ in 0..2 {
        send(&mut websocket, &request("r", &[b"x"])).await;
        let refusal = answer(&mut websocket).await;
        assert_eq!(outcome(&refusal), (2, 3, Some("r")));
        assert!(!refusal.reason.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_framing_forbids_closes_the_connection() {
    let server = Server::start().await;
    let unmasked = [0x82, 0x01, 0x00];
    for bytes in
        [&unmasked[..], &frame(0xc2, b"")[..], &frame(0x80, b"x")[..], &frame(0x83, b"")[..], &frame(0x09, b"")[..]]
    {
        let mut stream = raw_websocket(&server, "a").await;
        stream.write_all(bytes).await.unwrap();
        let (first, close) = read_frame(&mut stream).await;
        assert_eq!((first, u16::from_be_bytes([close[0], close[1]])), (0x88, 1002), "{bytes:?}");
        until_closed(&mut stream).await;
        drop(stream);
        server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 0.0).await;
    }
    let mut stream = raw_websocket(&server, "a").await;
    stream.write_all(&frame(0x81, b"\xff")).await.unwrap();
    let (first, close) = read_frame(&mut stream).await;
    assert_eq!((first, u16::from_be_bytes([close[0], close[1]])), (0x88, 1007));
}

/// One client that does not read its answers, however much it sends, holds up nobody and is disconnected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_no_answers_is_disconnected() {
    let server = Server::with(|config| config.write_timeout = Duration::from_millis(300)).await;
    let stream = raw_websocket(&server, "slow").await;
    let (read, mut write) = stream.into_split();
    let flood = tokio::spawn(async move {
        let bytes = frame(0x82, &[0xff; 20]).repeat(1000);
        while write.write_all(&bytes).await.is_ok() {}
    });
    let mut other = connect(&server, &[]).await;
    let closed = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"write_timeout\"}";
    while server.metric(closed) == 0.0 {
        send(&mut other, &request("r", &[b"x"])).await;
        assert_eq!(outcome(&answer(&mut other).await), (1, 1, Some("r")));
    }
    within("flood", flood).await.unwrap();
    drop(read);
}

/// The same with pings only: their pongs are answers, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_no_pongs_gets_no_broken_ones() {
    let server = Server::with(|config| config.write_timeout = Duration::from_millis(500)).await;
    let stream = raw_websocket(&server, "slow").await;
    let (mut read, mut write) = stream.into_split();
    let flood = tokio::spawn(async move {
        let bytes = frame(0x89, &[5; 100]).repeat(500);
        let deadline = tokio::time::Instant::now() + Duration::from_millis(400);
        while tokio::time::Instant::now() < deadline {
            let written = tokio::time::timeout(Duration::from_millis(50), write.write_all(&bytes)).await;
            if !matches!(written, Ok(Ok(()))) {
                break;
            }
        }
        write
    });
    let _write = within("flood", flood).await.unwrap();
    // Whatever of them comes is whole.
    use tokio::io::AsyncReadExt;
    let mut seen = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(2), read.read_to_end(&mut seen)).await;
    let mut pong = vec![0x8a, 100];
    pong.extend([5; 100]);
    let whole = seen.len() / pong.len() * pong.len();
    assert!(whole > 0);
    assert_eq!(&seen[..whole], pong.repeat(whole / pong.len()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_not_finished_in_time_ends_its_connection() {
    let server = Server::with(|config| config.read_timeout = Duration::from_millis(200)).await;
    for bytes in [&frame(0x82, b"abc")[..4], &frame(0x02, b"abc")[..], &[0x82]] {
        let mut stream = raw_websocket(&server, "a").await;
        stream.write_all(bytes).await.unwrap();
        until_closed(&mut stream).await;
        drop(stream);
        server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 0.0).await;
    }
    let closed = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"read_timeout\"}";
    assert_eq!(server.metric(closed), 3.0);
}
