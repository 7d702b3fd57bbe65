//! `POST /api/v1/events` and `/ping`.

use prost::Message;
use serde_json::json;
use tokio::net::TcpStream;

use crate::support::*;

const PROTOBUF: [&str; 4] =
    ["application/proto", "application/protobuf", "application/x-protobuf", "Application/Proto; charset=utf-8"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_protobuf_content_type_is_answered_in_protobuf_and_stored_byte_for_byte() {
    let server = Server::start().await;
    let payload: Vec<u8> = (0..=255).collect();
    for content_type in PROTOBUF {
        let reply = post(&server, content_type, &request("r", &[&payload]).encode_to_vec()).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/proto")));
        let answer = reply.answer();
        assert_eq!(outcome(&answer), (1, 1, Some("r")));
        assert_eq!((answer.reason.as_str(), answer.data.len()), ("", 1));
        let now = i64::try_from(ringtail::batch::now_ms() / 1000).unwrap();
        assert!((now - 60..=now).contains(&answer.sent_time));
    }
    let records = server.records(PROTOBUF.len());
    assert_eq!(payloads(&records), vec![payload.clone(); PROTOBUF.len()]);
    let first = &records[0].batch;
    assert_eq!(first.request.as_bytes(), &request("r", &[&payload]).encode_to_vec());
    assert_eq!((&*first.client.group, &*first.client.id), ("--default--", "device"));
    assert_eq!(server.metric("ringtail_ingest_received_batches_total{protocol=\"rest\"}"), 4.0);
    assert_eq!(server.metric("ringtail_ingest_ack_duration_seconds_count{protocol=\"rest\"}"), 4.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_of_json_arrives_byte_for_byte() {
    let server = Server::start().await;
    let payload = [251u8, 255, 0, 1];
    let times = [
        json!({"seconds": 1638154927, "nanos": 376499000}),
        json!({"seconds": "1638154927", "nanos": 376499000}),
        json!("2021-11-29T03:02:07.376499Z"),
        json!(null),
    ];
    let forms = [json!("+/8AAQ=="), json!("-_8AAQ=="), json!("-_8AAQ"), json!("+/8AAQ"), json!(payload)];
    let names = [
        ["req_guid", "sent_time", "event_bytes"],
        ["reqGuid", "sentTime", "eventBytes"],
        ["REQ_GUID", "SentTime", "EVENTBYTES"],
    ];
    let mut sent = 0;
    for (index, form) in forms.iter().enumerate() {
        for [guid, time, bytes] in names {
            let sent_time = &times[index % times.len()];
            let event = json!({bytes: form, "type": "click", "unknown": {"a": [1]}});
            let body = json!({guid: "r", time: sent_time, "events": [event], "unknown": null}).to_string();
            let reply = post(&server, "application/json; charset=utf-8", body.as_bytes()).await;
            assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{body}");
            assert_eq!(outcome(&reply.answer()), (1, 1, Some("r")), "{body}");
            sent += 1;
        }
    }
    let records = server.records(sent);
    assert_eq!(payloads(&records), vec![payload.to_vec(); sent]);
    for record in &records {
        assert_eq!(record.batch.request.req_guid(), "r");
        assert_eq!(record.batch.request.events().next().unwrap().event_type, "click");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_decode_is_a_bad_request_without_data() {
    let server = Server::start().await;
    for content_type in PROTOBUF {
        let reply = post(&server, content_type, b"\xff\xff\xff").await;
        assert_eq!((reply.status, reply.header("content-type")), (400, Some("application/proto")));
        assert_eq!(outcome(&reply.answer()), (2, 2, None));
        assert!(!reply.answer().reason.is_empty());
    }
    for body in ["{", "", "[]", "{\"events\": 1}", "{} {}", "{\"events\":[{\"event_bytes\":\"*\"}]}"] {
        let reply = post(&server, "application/json", body.as_bytes()).await;
        assert_eq!((reply.status, reply.header("content-type")), (400, Some("application/json")), "{body}");
        assert_eq!(outcome(&reply.answer()), (2, 2, None), "{body}");
        assert!(!reply.answer().reason.is_empty());
    }
    for head in ["Content-Type: text/plain", "Content-Type: application/jsonx", "X-No: type"] {
        let reply = http(&server, &format!("POST /api/v1/events HTTP/1.1\r\n{head}"), b"{}").await;
        assert_eq!((reply.status, reply.header("content-type")), (400, Some("application/json")), "{head}");
        assert_eq!(outcome(&reply.answer()), (2, 2, None), "{head}");
    }
    server.records(0);
    assert_eq!(server.metric("ringtail_ingest_rejected_batches_total{protocol=\"rest\",reason=\"bad_request\"}"), 13.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_payload_is_dropped_silently() {
    let server = Server::start().await;
    let kept = r#"{"events": [{"event_bytes": "AQ==", "eventBytes": null}], "Events": null}"#;
    assert_eq!(post(&server, "application/json", kept.as_bytes()).await.status, 200);
    assert_eq!(payloads(&server.records(1)), [vec![1]]);
    for ambiguous in [
        r#"{"events": [{"event_bytes": "AQ==", "eventBytes": "Ag=="}]}"#,
        r#"{"events": [{"event_bytes": "AQ=="}], "events": []}"#,
    ] {
        assert_eq!(post(&server, "application/json", ambiguous.as_bytes()).await.status, 400, "{ambiguous}");
    }
    server.records(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_events_is_success_and_not_logged() {
    let server = Server::start().await;
    let reply = post(&server, "application/proto", &request("empty", &[]).encode_to_vec()).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (200, (1, 1, Some("empty"))));
    let reply = post(&server, "application/json", br#"{"req_guid": "empty", "events": null}"#).await;
    assert_eq!((reply.status, outcome(&reply.answer())), (200, (1, 1, Some("empty"))));
    let reply = post(&server, "application/proto", b"").await;
    assert_eq!((reply.status, outcome(&reply.answer())), (200, (1, 1, Some(""))));
    server.records(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_stands_in_the_configured_headers() {
    let server = Server::with(|config| {
        config.connection_id_header = "X-Device".into();
        config.connection_group_header = "X-Group".into();
        config.connection_group_default = "nobody".into();
    })
    .await;
    let long = "a".repeat(1024);
    let cases = [
        ("X-None: 1".to_string(), "nobody", ""),
        ("x-device: ü\r\nx-group: g".to_string(), "g", "ü"),
        (format!("X-Device: {long}\r\nX-Group: "), "nobody", long.as_str()),
    ];
    let body = request("r", &[b"x"]).encode_to_vec();
    for (headers, ..) in &cases {
        let head = format!("POST /api/v1/events HTTP/1.1\r\n{headers}\r\nContent-Type: application/proto");
        assert_eq!(http(&server, &head, &body).await.status, 200, "{headers}");
    }
    for headers in [format!("X-Device: {long}a"), format!("X-Group: {long}a")] {
        let head = format!("POST /api/v1/events HTTP/1.1\r\n{headers}\r\nContent-Type: application/proto");
        let reply = http(&server, &head, &body).await;
        assert_eq!((reply.status, outcome(&reply.answer())), (400, (2, 2, None)));
    }
    let records = server.records(cases.len());
    for (record, (_, group, id)) in records.iter().zip(&cases) {
        assert_eq!((&*record.batch.client.group, &*record.batch.client.id), (*group, *id));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ping_is_for_get_only() {
    let server = Server::start().await;
    let reply = http(&server, "GET /ping HTTP/1.1", b"").await;
    assert_eq!((reply.status, &reply.body[..]), (200, &b"pong"[..]));
    for method in ["HEAD", "OPTIONS", "POST"] {
        assert_eq!(http(&server, &format!("{method} /ping HTTP/1.1"), b"").await.status, 405, "{method}");
    }
    for (line, status) in [
        ("PUT /api/v1/events HTTP/1.1", 405),
        ("HEAD /api/v1/events HTTP/1.1", 405),
        ("GET /api/v1/events HTTP/1.1", 400),
        ("GET / HTTP/1.1", 404),
        ("POST /raystack.raccoon.v1beta1.EventService/SendEvent HTTP/1.1", 404),
    ] {
        assert_eq!(http(&server, line, b"").await.status, status, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_serves_many_requests_in_order() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    for index in 0..20u8 {
        let body = request(&index.to_string(), &[&[index]]).encode_to_vec();
        let reply = exchange(&mut stream, &post_head("application/proto"), &body).await;
        assert_eq!((reply.status, outcome(&reply.answer())), (200, (1, 1, Some(index.to_string().as_str()))));
    }
    assert_eq!(payloads(&server.records(20)), (0..20).map(|index| vec![index]).collect::<Vec<_>>());
    assert_eq!(server.metric("ringtail_ingest_connections{protocol=\"rest\"}"), 1.0);
    drop(stream);
    server.await_metric("ringtail_ingest_connections{protocol=\"rest\"}", 0.0).await;
    assert_eq!(server.metric("ringtail_ingest_connections_opened_total{protocol=\"rest\"}"), 1.0);
    let closed = "ringtail_ingest_connections_closed_total{protocol=\"rest\",reason=\"client\"}";
    assert_eq!(server.metric(closed), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cors_only_when_it_is_on() {
    let preflight = "OPTIONS /api/v1/events HTTP/1.1\r\nOrigin: https://a.example\r\n\
                     Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type";
    let off = Server::start().await;
    let reply = http(&off, preflight, b"").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (405, None));
    let on = Server::with(|config| {
        config.http.cors_enabled = true;
        config.http.cors_allowed_origins = vec!["https://a.example".into()];
        config.http.cors_max_age = std::time::Duration::from_secs(7);
    })
    .await;
    let reply = http(&on, preflight, b"").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("https://a.example")));
    assert_eq!(reply.header("access-control-max-age"), Some("7"));
    let reply = http(&on, &preflight.replace("a.example", "b.example"), b"").await;
    assert_eq!(reply.header("access-control-allow-origin"), None);
    let head = format!("{}\r\nOrigin: https://a.example", post_head("application/json"));
    let reply = http(&on, &head, b"{}").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("https://a.example")));
}

/// A list that may not be combined must not take the port down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cors_with_wildcards_and_credentials_still_serves() {
    let server = Server::with(|config| {
        config.http.cors_enabled = true;
        config.http.cors_allow_credentials = true;
        config.http.cors_allowed_origins = vec!["*".into()];
        config.http.cors_allowed_headers = vec!["*".into()];
        config.http.cors_allowed_methods = vec!["*".into()];
    })
    .await;
    let reply = http(&server, "GET /ping HTTP/1.1\r\nOrigin: https://a.example", b"").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("*")));
    assert_eq!(reply.header("access-control-allow-credentials"), None);
}
