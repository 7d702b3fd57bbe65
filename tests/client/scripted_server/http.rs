//! The scripted server over REST, and over gRPC: a message is five bytes of prefix and protobuf, the status a trailer.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use http_body_util::StreamBody;
use hyper::body::Frame;
use prost::Message;
use ringtail::proto::{Code, SendEventRequest};
use tokio::net::TcpListener;

use super::{Script, Seen, Step, ack, refusal};

pub async fn serve_rest(listener: TcpListener, script: Arc<Script>) {
    let router = Router::new().route("/api/v1/events", post(rest)).with_state(script);
    axum::serve(listener, router).await.unwrap();
}

async fn rest(State(script): State<Arc<Script>>, headers: HeaderMap, body: Bytes) -> Response {
    assert_eq!(headers["content-type"], "application/proto");
    let seen = seen(&headers, SendEventRequest::decode(body).unwrap());
    let req_guid = seen.request.req_guid.clone();
    let answer = |status, answer: ringtail::proto::SendEventResponse| {
        (status, [("content-type", "application/proto")], answer.encode_to_vec()).into_response()
    };
    match script.next(seen) {
        Step::Ack => answer(StatusCode::OK, ack(&req_guid)),
        Step::Refuse(Code::BadRequest) => answer(StatusCode::BAD_REQUEST, refusal(&req_guid, Code::BadRequest)),
        Step::Refuse(code) => answer(StatusCode::SERVICE_UNAVAILABLE, refusal(&req_guid, code)),
        Step::Status(status) => (StatusCode::from_u16(status).unwrap(), "<html>").into_response(),
        step => unreachable!("{step:?} is not for REST"),
    }
}

pub async fn serve_grpc(listener: TcpListener, script: Arc<Script>) {
    let path = "/raystack.raccoon.v1beta1.EventService/SendEvent";
    axum::serve(listener, Router::new().route(path, post(grpc)).with_state(script)).await.unwrap();
}

async fn grpc(State(script): State<Arc<Script>>, headers: HeaderMap, body: Bytes) -> Response {
    let seen = seen(&headers, SendEventRequest::decode(&body[5..]).unwrap());
    let req_guid = seen.request.req_guid.clone();
    let (answer, status) = match script.next(seen) {
        Step::Ack => (Some(ack(&req_guid)), 0),
        Step::Refuse(code) => (Some(refusal(&req_guid, code)), 0),
        Step::Status(status) => (None, status),
        step => unreachable!("{step:?} is not for gRPC"),
    };
    let message = answer.map(|answer| {
        let message = answer.encode_to_vec();
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend(message);
        Frame::data(Bytes::from(framed))
    });
    let trailers = Frame::trailers(HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from(status))]));
    let frames = message.into_iter().chain([trailers]).map(Ok::<_, Infallible>);
    let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
    ([("content-type", "application/grpc")], body).into_response()
}

fn seen(headers: &HeaderMap, request: SendEventRequest) -> Seen {
    let header = |name| headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    Seen { request, id: header("x-user-id"), group: header("x-user-group") }
}
