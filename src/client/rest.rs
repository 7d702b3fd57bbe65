//! REST: `POST` with a protobuf body, over a pool of keep-alive connections.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use prost::Message;

use super::{ANSWER_BYTES_MAX, ClientError, ClientOptions, Refusal};
use crate::proto;

/// Connections kept open while idle. More are opened while more batches are in flight.
const IDLE_CONNECTIONS_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct RestClient {
    http: hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
    headers: HeaderMap,
}

impl RestClient {
    pub(super) fn new(options: &ClientOptions) -> Result<Self, ClientError> {
        let endpoint = &options.endpoint;
        let uri = endpoint
            .to_string()
            .parse()
            .map_err(|error: hyper::http::uri::InvalidUri| ClientError::connect(endpoint, error))?;
        let mut headers = HeaderMap::from_iter(options.headers()?);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/proto"));
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(options.connect_timeout));
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        Ok(RestClient { http, uri, headers })
    }

    pub(super) async fn send(&self, request: proto::SendEventRequest) -> Result<proto::SendEventResponse, ClientError> {
        let mut post = Request::new(Full::new(Bytes::from(request.encode_to_vec())));
        *post.method_mut() = Method::POST;
        *post.uri_mut() = self.uri.clone();
        *post.headers_mut() = self.headers.clone();
        let response = self.http.request(post).await.map_err(ClientError::disconnected)?;

        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let answer = body
            .map_err(ClientError::bad_answer)
            .and_then(|body| proto::SendEventResponse::decode(body.to_bytes()).map_err(ClientError::bad_answer));
        if status == StatusCode::OK {
            return answer;
        }
        let refusal = Refusal::from_http(status.as_u16(), answer.as_ref().ok());
        Err(ClientError::Refused(Refusal { retry_after, ..refusal }))
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}
