//! Pings, pongs, and who is given up for dead.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ping_is_answered_with_its_payload() {
    let server = Server::start().await;
    let mut websocket = connect(&server, &[]).await;
    for payload in [&b""[..], b"abc", &[7; 125]] {
        websocket.send(Message::Ping(payload.to_vec().into())).await.unwrap();
        let Message::Pong(echo) = next(&mut websocket).await else { panic!("not a pong") };
        assert_eq!(echo, payload);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_answers_pings_stays() {
    let server = Server::with(|config| {
        config.ping_interval = Duration::from_millis(100);
        config.pong_timeout = Duration::from_millis(400);
    })
    .await;
    let mut websocket = connect(&server, &[]).await;
    let until = Instant::now() + Duration::from_millis(1200);
    let mut pings = 0;
    while let Ok(message) = tokio::time::timeout_at(until, websocket.next()).await {
        assert!(matches!(message, Some(Ok(Message::Ping(_)))), "{message:?}");
        pings += 1;
    }
    assert!((5..=13).contains(&pings), "{pings}");
    send(&mut websocket, &request("r", &[b"x"])).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("r")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_answers_nothing_is_given_up() {
    let server = Server::with(|config| {
        config.ping_interval = Duration::from_millis(100);
        config.pong_timeout = Duration::from_millis(400);
    })
    .await;
    let began = Instant::now();
    let mut stream = raw_websocket(&server, "a").await;
    assert_eq!(read_frame(&mut stream).await, (0x89, vec![]));
    until_closed(&mut stream).await;
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 0.0).await;
    let closed = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"pong_timeout\"}";
    assert_eq!(server.metric(closed), 1.0);
    let mut again = connect(&server, &[("x-user-id", "a")]).await;
    send(&mut again, &request("r", &[b"x"])).await;
    assert_eq!(outcome(&answer(&mut again).await), (1, 1, Some("r")));
}

/// It never answers a ping, but it does send: it is alive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_sends_is_alive() {
    let server = Server::with(|config| {
        config.ping_interval = Duration::from_millis(50);
        config.pong_timeout = Duration::from_millis(300);
    })
    .await;
    let mut stream = raw_websocket(&server, "a").await;
    for _ in 0..12 {
        stream.write_all(&frame(0x82, b"")).await.unwrap();
        while read_frame(&mut stream).await.0 != 0x82 {}
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A large message over a thin line takes longer than the pong timeout, and no pong can come in the middle of a frame.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_within_a_message_is_alive() {
    use prost::Message as _;
    let server = Server::with(|config| {
        config.ping_interval = Duration::from_millis(50);
        config.pong_timeout = Duration::from_millis(300);
        config.read_timeout = Duration::from_secs(10);
    })
    .await;
    let mut stream = raw_websocket(&server, "a").await;
    let bytes = frame(0x82, &request("slow", &[&[1; 1000]]).encode_to_vec());
    for piece in bytes.chunks(100) {
        stream.write_all(piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    loop {
        let (first, payload) = read_frame(&mut stream).await;
        if first == 0x82 {
            let answer = ringtail::proto::SendEventResponse::decode(&payload[..]).unwrap();
            assert_eq!(outcome(&answer), (1, 1, Some("slow")));
            break;
        }
    }
}
