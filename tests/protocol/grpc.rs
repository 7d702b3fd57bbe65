//! `EventService/SendEvent`.

use bytesize::ByteSize;
use ringtail::proto::{SendEventRequest, SendEventResponse};
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::support::*;

const PATH: &str = "/raystack.raccoon.v1beta1.EventService/SendEvent";

async fn channel(server: &Server) -> Channel {
    Channel::from_shared(format!("http://{}", server.grpc)).unwrap().connect().await.unwrap()
}

async fn call(
    channel: &Channel,
    path: &'static str,
    headers: &[(&'static str, &str)],
    request: SendEventRequest,
) -> Result<SendEventResponse, Status> {
    let mut client = Grpc::new(channel.clone()).max_encoding_message_size(usize::MAX);
    within("ready", client.ready()).await.unwrap();
    let mut request = Request::new(request);
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    let codec: ProstCodec<SendEventRequest, SendEventResponse> = ProstCodec::default();
    let answer = client.unary(request, path.parse().unwrap(), codec);
    within("answer", answer).await.map(tonic::Response::into_inner)
}

const ID: &[(&str, &str)] = &[("x-user-id", "device")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_three_package_names_are_served() {
    let server = Server::with(|config| config.connection_group_header = "X-Group".into()).await;
    let channel = channel(&server).await;
    let payload: Vec<u8> = (0..=255).collect();
    for path in
        [PATH, "/gotocompany.raccoon.v1beta1.EventService/SendEvent", "/odpf.raccoon.v1beta1.EventService/SendEvent"]
    {
        let headers = [("x-user-id", "device"), ("x-group", "g")];
        let answer = call(&channel, path, &headers, request("r", &[&payload])).await.unwrap();
        assert_eq!((outcome(&answer), answer.data.len(), answer.reason.as_str()), ((1, 1, Some("r")), 1, ""));
    }
    for path in
        ["/raystack.raccoon.v1beta1.EventService/Other", "/other.raccoon.v1beta1.EventService/SendEvent", "/SendEvent"]
    {
        let status = call(&channel, path, ID, request("r", &[b"x"])).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
    }
    let records = server.records(3);
    assert_eq!(payloads(&records), vec![payload; 3]);
    assert_eq!((&*records[0].batch.client.group, &*records[0].batch.client.id), ("g", "device"));
    assert_eq!(server.metric("ringtail_ingest_connections{protocol=\"grpc\"}"), 1.0);
    assert_eq!(server.metric("ringtail_ingest_received_batches_total{protocol=\"grpc\"}"), 3.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_without_an_id_is_an_error() {
    let server = Server::start().await;
    let channel = channel(&server).await;
    for headers in [&[][..], &[("x-user-id", "")]] {
        let status = call(&channel, PATH, headers, request("r", &[b"x"])).await.unwrap_err();
        assert!(matches!(status.code(), Code::InvalidArgument | Code::Unauthenticated), "{status:?}");
        assert!(status.message().to_lowercase().contains("x-user-id"), "{status:?}");
    }
    let long = "a".repeat(1025);
    let status = call(&channel, PATH, &[("x-user-id", &long)], request("r", &[b"x"])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    server.records(0);
}

/// A string field with bytes that are no UTF-8: prost's client would not send it, so it is sent as a string of bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_is_an_error() {
    #[derive(Clone, PartialEq, prost::Message)]
    struct NotARequest {
        #[prost(bytes = "vec", tag = "1")]
        req_guid: Vec<u8>,
    }
    let server = Server::start().await;
    let mut client = Grpc::new(channel(&server).await);
    client.ready().await.unwrap();
    let mut request = Request::new(NotARequest { req_guid: vec![0xff] });
    request.metadata_mut().insert("x-user-id", "device".parse().unwrap());
    let codec: ProstCodec<NotARequest, SendEventResponse> = ProstCodec::default();
    let status = within("answer", client.unary(request, PATH.parse().unwrap(), codec)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("req_guid"), "{status:?}");
    assert_eq!(server.metric("ringtail_ingest_rejected_batches_total{protocol=\"grpc\",reason=\"bad_request\"}"), 1.0);
}

/// The Go client panics on an error status: what was decoded is refused with an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_answers() {
    let server = Server::with(|config| {
        config.batch_bytes_max = ByteSize::kib(64);
        config.batch_events_max = 2;
    })
    .await;
    let channel = channel(&server).await;
    let answer = call(&channel, PATH, ID, request("large", &[&[0; 70_000]])).await.unwrap();
    assert_eq!(outcome(&answer), (2, 2, Some("large")));
    assert!(answer.reason.contains("65536"), "{}", answer.reason);
    let answer = call(&channel, PATH, ID, request("many", &[b"", b"", b""])).await.unwrap();
    assert_eq!(outcome(&answer), (2, 2, Some("many")));
    assert!(call(&channel, PATH, ID, request("absurd", &[&vec![0; 1 << 20]])).await.is_err());
    let answer = call(&channel, PATH, ID, request("empty", &[])).await.unwrap();
    assert_eq!(outcome(&answer), (1, 1, Some("empty")));
    server.records(0);
    server.wal.close();
    let answer = call(&channel, PATH, ID, request("late", &[b"x"])).await.unwrap();
    assert_eq!(outcome(&answer), (2, 3, Some("late")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_is_an_answer() {
    let server = Server::with_log(|_| {}, |wal| wal.free_bytes_min = ByteSize::pib(1)).await;
    let channel = channel(&server).await;
    while !server.wal.status().full {
        call(&channel, PATH, ID, request("r", &[b"x"])).await.unwrap();
    }
    let answer = call(&channel, PATH, ID, request("r", &[b"x"])).await.unwrap();
    assert_eq!(outcome(&answer), (2, 3, Some("r")));
    assert!(!answer.reason.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_share_a_connection() {
    let server = Server::start().await;
    let channel = channel(&server).await;
    let calls = (0..200u32).map(|index| {
        let channel = channel.clone();
        tokio::spawn(async move {
            let name = index.to_string();
            let answer = call(&channel, PATH, ID, request(&name, &[&[1; 1000]])).await.unwrap();
            assert_eq!(outcome(&answer), (1, 1, Some(name.as_str())));
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    server.records(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_the_connection() {
    let mut server = Server::start().await;
    let channel = channel(&server).await;
    call(&channel, PATH, ID, request("r", &[b"x"])).await.unwrap();
    server.drained().await;
    assert!(call(&channel, PATH, ID, request("late", &[b"x"])).await.is_err());
    assert_eq!(server.metric("ringtail_ingest_connections{protocol=\"grpc\"}"), 0.0);
    server.records(1);
}
