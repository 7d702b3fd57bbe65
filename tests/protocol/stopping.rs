//! A stop loses no ack and leaves nobody hanging.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_get_their_acks_and_then_1001() {
    let mut server = Server::start().await;
    let mut idle = connect(&server, &[]).await;
    let mut used = connect(&server, &[]).await;
    send(&mut used, &request("r", &[b"x"])).await;
    assert_eq!(outcome(&answer(&mut used).await), (1, 1, Some("r")));
    let mut busy = connect(&server, &[]).await;
    for index in 0..100 {
        busy.feed(Message::binary(request(&index.to_string(), &[b"x"]).encode_to_vec())).await.unwrap();
    }
    busy.flush().await.unwrap();
    let reader = tokio::spawn(async move {
        let mut acked = 0;
        loop {
            match within("answer", busy.next()).await {
                Some(Ok(Message::Binary(bytes))) => {
                    let answer = ringtail::proto::SendEventResponse::decode(bytes).unwrap();
                    acked += usize::from(answer.status == 1);
                }
                Some(Ok(Message::Close(Some(frame)))) => break (acked, u16::from(frame.code)),
                other => panic!("{other:?}"),
            }
        }
    });
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 3.0).await;
    server.stop.cancel();
    let ((), idle, used, (acked, code)) =
        tokio::join!(server.drained(), closed(&mut idle), closed(&mut used), async { reader.await.unwrap() });
    assert_eq!((idle.0, used.0, code), (1001, 1001, 1001));
    // Every batch in the log was acked: nobody has to send one again.
    assert_eq!(server.records(acked + 1).len(), acked + 1);
    for protocol in ["websocket", "rest", "grpc"] {
        assert_eq!(server.metric(&format!("ringtail_ingest_connections{{protocol=\"{protocol}\"}}")), 0.0);
    }
    let stopped = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"stopping\"}";
    assert_eq!(server.metric(stopped), 3.0);
    assert!(TcpStream::connect(server.http).await.is_err());
    assert!(TcpStream::connect(server.grpc).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rest_connections_end_after_what_they_are_doing() {
    let mut server = Server::start().await;
    let mut idle = TcpStream::connect(server.http).await.unwrap();
    exchange(&mut idle, "GET /ping HTTP/1.1", b"").await;
    let mut sending = TcpStream::connect(server.http).await.unwrap();
    let body = request("late", &[b"x"]).encode_to_vec();
    let head = format!("{}\r\nHost: x\r\nContent-Length: {}\r\n\r\n", post_head("application/proto"), body.len());
    sending.write_all(head.as_bytes()).await.unwrap();
    sending.write_all(&body[..3]).await.unwrap();
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 2.0).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop.cancel();
    until_closed(&mut idle).await;
    sending.write_all(&body[3..]).await.unwrap();
    let reply = read_reply(&mut sending, true).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (503, (2, 3, Some("late"))));
    assert!(reply.header("retry-after").is_some());
    until_closed(&mut sending).await;
    server.drained().await;
    server.records(0);
}

/// Clients that do nothing, half a thing, or do not read cannot hold up a stop for longer than the drain deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_holds_up_a_stop() {
    let mut server = Server::with(|config| config.write_timeout = Duration::from_millis(100)).await;
    let mut half = raw_websocket(&server, "").await;
    half.write_all(&frame(0x82, &[0; 1000])[..50]).await.unwrap();
    let mut head = TcpStream::connect(server.http).await.unwrap();
    head.write_all(b"POST /api").await.unwrap();
    let mut body = TcpStream::connect(server.http).await.unwrap();
    let text = format!("{}\r\nHost: x\r\nContent-Length: 10\r\n\r\n1", post_head("application/proto"));
    body.write_all(text.as_bytes()).await.unwrap();
    let _silent = TcpStream::connect(server.http).await.unwrap();
    let _grpc = TcpStream::connect(server.grpc).await.unwrap();
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 3.0).await;
    server.await_metric("ringtail_ingest_connections{protocol=\"grpc\"}", 1.0).await;
    let began = std::time::Instant::now();
    server.drained().await;
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}
