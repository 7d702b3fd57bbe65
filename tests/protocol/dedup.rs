//! A retry of a batch that is durable is acked again and not stored again, whatever connection it comes over.

use prost::Message;
use ringtail::config::DedupConfig;

use crate::support::*;

async fn start() -> Server {
    Server::with_log(|_| {}, |log| log.dedup = DedupConfig::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_acked_over_every_protocol_and_stored_once() {
    let server = start().await;
    let batch = request("guid", &[b"one", b"two"]);
    for _ in 0..2 {
        // A new connection each time.
        let mut websocket = connect(&server, &[("x-user-id", "device")]).await;
        for _ in 0..2 {
            send(&mut websocket, &batch).await;
            assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("guid")));
        }
        close(websocket).await;
    }
    let reply = post(&server, "application/proto", &batch.encode_to_vec()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (200, (1, 1, Some("guid"))));
    // The same in JSON, and with another time of sending: still a retry.
    let json = br#"{"req_guid":"guid","sent_time":"2021-11-29T03:02:07Z","events":[{"event_bytes":"b25l","type":"click"},{"event_bytes":"dHdv","type":"click"}]}"#;
    assert_eq!(post(&server, "application/json", json).await.status, 200);

    assert_eq!(payloads(&server.records(1)), [b"one", b"two"]);
    let duplicates =
        |protocol| server.metric(&format!("ringtail_ingest_duplicate_batches_total{{protocol=\"{protocol}\"}}"));
    assert_eq!((duplicates("websocket"), duplicates("rest"), duplicates("grpc")), (3.0, 2.0, 0.0));
    assert_eq!(server.metric("ringtail_wal_committed_batches_total"), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipelined_retry_waits_for_the_commit_of_the_first() {
    let server = start().await;
    let mut websocket = connect(&server, &[("x-user-id", "device")]).await;
    for number in 0..50u8 {
        for _ in 0..3 {
            send(&mut websocket, &request(&number.to_string(), &[&[number]])).await;
        }
    }
    for _ in 0..150 {
        assert_eq!(answer(&mut websocket).await.status, 1);
    }
    assert_eq!(payloads(&server.records(50)), (0..50).map(|number| vec![number]).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_looks_like_a_retry_is_stored() {
    let server = start().await;
    let mut sent = 0;
    for headers in [[("x-user-id", "a")], [("x-user-id", "b")], [("x-other", "")], [("x-other", "")]] {
        let mut websocket = connect(&server, &headers).await;
        for batch in [request("1", &[b"x"]), request("1", &[b"y"]), request("1", &[b"x", b""]), request("2", &[b"x"])] {
            send(&mut websocket, &batch).await;
            assert_eq!(answer(&mut websocket).await.status, 1);
            sent += 1;
        }
        for _ in 0..2 {
            send(&mut websocket, &request("", &[b"x"])).await;
            assert_eq!(answer(&mut websocket).await.status, 1);
            sent += 1;
        }
        close(websocket).await;
    }
    server.records(sent);
}
