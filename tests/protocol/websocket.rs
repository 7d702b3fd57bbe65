//! `GET /api/v1/events`, upgraded: what clients are promised.

use futures_util::SinkExt;
use prost::Message as _;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn binary_is_answered_in_binary_and_text_in_text() {
    let server = Server::start().await;
    let mut websocket = connect(&server, &[("x-user-id", "device")]).await;
    let payload: Vec<u8> = (0..=255).collect();
    send(&mut websocket, &request("b", &[&payload])).await;
    let reply = answer(&mut websocket).await;
    assert_eq!((outcome(&reply), reply.reason.as_str(), reply.data.len()), ((1, 1, Some("b")), "", 1));
    websocket.send(Message::text(r#"{"reqGuid": "t", "events": [{"eventBytes": [0, 255]}]}"#)).await.unwrap();
    let Message::Text(text) = next(&mut websocket).await else { panic!("not text") };
    let reply = json_answer(text.as_bytes());
    assert_eq!(outcome(&reply), (1, 1, Some("t")));
    let records = server.records(2);
    assert_eq!(payloads(&records), [payload.clone(), vec![0, 255]]);
    assert_eq!(records[0].batch.request.as_bytes(), &request("b", &[&payload]).encode_to_vec());
    assert_eq!((&*records[0].batch.client.group, &*records[0].batch.client.id), ("--default--", "device"));
    server.await_metric("ringtail_ingest_ack_duration_seconds_count{protocol=\"websocket\"}", 2.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_frame_is_answered_and_the_connection_goes_on() {
    let server = Server::start().await;
    let mut websocket = connect(&server, &[]).await;
    for round in 0..3 {
        websocket.send(Message::binary(vec![0xff; 5])).await.unwrap();
        let bad = answer(&mut websocket).await;
        assert_eq!(outcome(&bad), (2, 2, Some("")));
        assert!(!bad.reason.is_empty());
        websocket.send(Message::text("{")).await.unwrap();
        let Message::Text(text) = next(&mut websocket).await else { panic!("not text") };
        assert_eq!(outcome(&json_answer(text.as_bytes())), (2, 2, Some("")));
        assert!(text.contains(r#""data":{"req_guid":""}"#), "{text}");
        send(&mut websocket, &request(&round.to_string(), &[&[round]])).await;
        assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some(round.to_string().as_str())));
    }
    assert_eq!(payloads(&server.records(3)), [[0], [1], [2]]);
    let rejected = "ringtail_ingest_rejected_batches_total{protocol=\"websocket\",reason=\"bad_request\"}";
    assert_eq!(server.metric(rejected), 6.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_events_is_success_and_not_logged() {
    let server = Server::start().await;
    let mut websocket = connect(&server, &[]).await;
    send(&mut websocket, &request("e", &[])).await;
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("e")));
    websocket.send(Message::binary(vec![])).await.unwrap();
    assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some("")));
    server.records(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_connection_with_the_same_id_is_refused() {
    let server = Server::with(|config| config.connection_group_header = "X-Group".into()).await;
    let mut first = connect(&server, &[("x-user-id", "device")]).await;
    let mut second = connect(&server, &[("x-user-id", "device")]).await;
    let refusal = answer(&mut second).await;
    assert_eq!(outcome(&refusal), (2, 5, None));
    assert!(!refusal.reason.is_empty());
    assert_eq!(closed(&mut second).await, (1008, "duplicate connection: device".into()));
    let mut other_group = connect(&server, &[("x-user-id", "device"), ("x-group", "other")]).await;
    for websocket in [&mut first, &mut other_group] {
        send(websocket, &request("r", &[b"x"])).await;
        assert_eq!(outcome(&answer(websocket).await), (1, 1, Some("r")));
    }
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 2.0).await;
    let reason = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"duplicate_id\"}";
    assert_eq!(server.metric(reason), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_id_is_cut_in_the_close_frame_and_one_too_long_is_refused() {
    let server = Server::start().await;
    let long = "é".repeat(512);
    let _first = connect(&server, &[("x-user-id", &long)]).await;
    let mut second = connect(&server, &[("x-user-id", &long)]).await;
    assert_eq!(outcome(&answer(&mut second).await), (2, 5, None));
    let (code, reason) = closed(&mut second).await;
    assert_eq!(code, 1008);
    assert!(reason.len() <= 123 && reason.starts_with("duplicate connection: éé"), "{reason}");
    let refused = try_connect(&server, &[("x-user-id", &"a".repeat(1025))]).await.map(drop);
    assert!(matches!(&refused, Err(Error::Http(response)) if response.status() == 400), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_without_an_id_do_not_collide() {
    let server = Server::start().await;
    let mut websockets =
        [connect(&server, &[]).await, connect(&server, &[]).await, connect(&server, &[("x-user-id", "")]).await];
    for websocket in &mut websockets {
        send(websocket, &request("r", &[b"x"])).await;
        assert_eq!(outcome(&answer(websocket).await), (1, 1, Some("r")));
    }
    assert!(server.records(3).iter().all(|record| record.batch.client.id.is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_the_limit_connections_are_refused_until_one_closes() {
    let server = Server::with(|config| config.connections_max = 2).await;
    let _first = connect(&server, &[]).await;
    let second = connect(&server, &[("x-user-id", "b")]).await;
    let mut third = connect(&server, &[("x-user-id", "c")]).await;
    assert_eq!(outcome(&answer(&mut third).await), (2, 4, None));
    assert_eq!(closed(&mut third).await, (1008, "Max connection reached".into()));
    drop(second);
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 1.0).await;
    let mut third = connect(&server, &[("x-user-id", "c")]).await;
    send(&mut third, &request("r", &[b"x"])).await;
    assert_eq!(outcome(&answer(&mut third).await), (1, 1, Some("r")));
    let reason = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"connection_limit\"}";
    assert_eq!(server.metric(reason), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_is_free_again_once_its_connection_has_closed() {
    let server = Server::start().await;
    for round in 0..20u8 {
        let mut websocket = connect(&server, &[("x-user-id", "device")]).await;
        send(&mut websocket, &request(&round.to_string(), &[&[round]])).await;
        assert_eq!(outcome(&answer(&mut websocket).await), (1, 1, Some(round.to_string().as_str())));
        close(websocket).await;
    }
    let gone = connect(&server, &[("x-user-id", "device")]).await;
    drop(gone);
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 0.0).await;
    let mut again = connect(&server, &[("x-user-id", "device")]).await;
    send(&mut again, &request("r", &[b"x"])).await;
    assert_eq!(outcome(&answer(&mut again).await), (1, 1, Some("r")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_carry_the_names_of_pipelined_requests_and_the_log_keeps_their_order() {
    let server = Server::with(|config| config.connection_in_flight_batches_max = 8).await;
    let mut websocket = connect(&server, &[("x-user-id", "device")]).await;
    let count = 200u8;
    for index in 0..count {
        websocket.feed(Message::binary(request(&index.to_string(), &[&[index]]).encode_to_vec())).await.unwrap();
    }
    websocket.flush().await.unwrap();
    let mut names = Vec::new();
    for _ in 0..count {
        let reply = answer(&mut websocket).await;
        assert_eq!((reply.status, reply.code), (1, 1));
        names.push(reply.data["req_guid"].parse::<u8>().unwrap());
    }
    names.sort_unstable();
    assert_eq!(names, (0..count).collect::<Vec<_>>());
    assert_eq!(payloads(&server.records(count.into())), (0..count).map(|index| vec![index]).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_moves_the_connection_from_rest_to_websocket() {
    let server = Server::start().await;
    let websocket = connect(&server, &[]).await;
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 1.0).await;
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 0.0).await;
    let reason = "ringtail_ingest_connections_closed_total{protocol=\"rest\",reason=\"upgraded\"}";
    assert_eq!(server.metric(reason), 1.0);
    drop(websocket);
    server.await_metric("ringtail_ingest_connections{protocol=\"websocket\"}", 0.0).await;
    let reason = "ringtail_ingest_connections_closed_total{protocol=\"websocket\",reason=\"client\"}";
    assert_eq!(server.metric(reason), 1.0);
    assert_eq!(server.metric("ringtail_ingest_connections_opened_total{protocol=\"websocket\"}"), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_origins_are_refused_when_origins_are_checked() {
    let server = Server::with(|config| {
        config.http.check_origin = true;
        config.http.cors_allowed_origins = vec!["https://a.example".into()];
    })
    .await;
    let own = format!("http://{}", server.http);
    for headers in [&[][..], &[("origin", own.as_str())], &[("origin", "https://a.example")]] {
        assert!(try_connect(&server, headers).await.is_ok(), "{headers:?}");
    }
    for origin in ["https://evil.example", "null", "http://127.0.0.1:1"] {
        let refused = try_connect(&server, &[("origin", origin)]).await.map(drop);
        assert!(matches!(&refused, Err(Error::Http(response)) if response.status() == 403), "{refused:?}");
    }
    let lax = Server::start().await;
    assert!(try_connect(&lax, &[("origin", "https://evil.example")]).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_handshake_is_a_bad_request() {
    let server = Server::start().await;
    let good = String::from_utf8(handshake("a")).unwrap();
    for (from, to) in
        [("Version: 13", "Version: 8"), ("Upgrade: websocket", "Upgrade: h2c"), ("Sec-WebSocket-Key", "X-Key")]
    {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        stream.write_all(good.replace(from, to).as_bytes()).await.unwrap();
        assert_eq!(read_reply(&mut stream, true).await.status, 400, "{to}");
    }
}
