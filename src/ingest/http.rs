//! REST, and the upgrade to WebSocket, on one port.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::connections::{self, ConnectionRefusal};
use super::listener::{self, Port, Slot};
use super::rejection::{RETRY_AFTER_SECONDS, RejectReason, Rejection, refusal, success};
use super::stream::BoundedStream;
use super::{CloseReason, Ingest, Protocol, json, websocket};
use crate::batch::Request;
use crate::config::HttpConfig;
use crate::proto::SendEventResponse;

/// Most bytes of a request's head.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Most bytes of a refused body that are still read, to be dropped.
const DISCARD_BYTES_MAX: usize = 64 << 20;

/// Form of a REST request, and so of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Protobuf,
}

/// What the requests of one connection share.
#[derive(Clone)]
struct Server {
    ingest: Arc<Ingest>,
    tasks: TaskTracker,
    slot: Slot,
    /// Why the connection ends, when it is a request that knows.
    closing: Arc<OnceLock<CloseReason>>,
}

/// See [`super::serve_http`].
pub(super) async fn serve(ingest: Arc<Ingest>, listener: TcpListener, stop: CancellationToken) {
    let shared = ingest.clone();
    listener::serve(ingest, Port::Http, listener, stop, move |stream, slot, tasks| {
        let closing = Arc::default();
        connection(Server { ingest: shared.clone(), tasks, slot, closing }, stream)
    })
    .await;
}

async fn connection(server: Server, stream: TcpStream) {
    let (ingest, closing) = (server.ingest.clone(), server.closing.clone());
    ingest.opened(Protocol::Rest);
    let stream = BoundedStream::new(stream, ingest.config.write_timeout);
    let service = TowerToHyperService::new(router(server));
    let mut connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(ingest.config.read_timeout)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut stopping = false;
    let result = loop {
        tokio::select! {
            result = &mut connection => break result,
            () = ingest.stopping.cancelled(), if !stopping => {
                stopping = true;
                std::pin::Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    let reason = match (closing.get(), result) {
        (Some(reason), _) => *reason,
        _ if stopping => CloseReason::Stopping,
        (None, Ok(())) => CloseReason::Client,
        (None, Err(error)) => close_reason(&error),
    };
    ingest.closed(Protocol::Rest, reason);
}

fn close_reason(error: &hyper::Error) -> CloseReason {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    if source.is_some_and(|source| source.kind() == std::io::ErrorKind::TimedOut) {
        CloseReason::WriteTimeout
    } else if error.is_timeout() {
        CloseReason::ReadTimeout
    } else if error.is_parse() {
        CloseReason::Protocol
    } else {
        CloseReason::Error
    }
}

fn router(server: Server) -> Router {
    let cors = cors(&server.ingest.config.http);
    let not_allowed = || async { StatusCode::METHOD_NOT_ALLOWED };
    let router = Router::new()
        .route("/ping", get(|| async { "pong" }).head(not_allowed))
        .route("/api/v1/events", post(rest).get(upgrade).head(not_allowed))
        .fallback(any(|| async { StatusCode::NOT_FOUND }))
        .with_state(server);
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

fn cors(config: &HttpConfig) -> Option<CorsLayer> {
    if !config.cors_enabled {
        return None;
    }
    let any = |list: &[String]| list.iter().any(|entry| entry == "*");
    let any_origin = any(&config.cors_allowed_origins);
    let origins = config.cors_allowed_origins.iter().filter_map(|origin| origin.parse().ok());
    let origins =
        if any_origin { AllowOrigin::any() } else { AllowOrigin::list(origins.collect::<Vec<HeaderValue>>()) };
    // Browsers take no wildcard together with credentials, and tower-http panics on it.
    let wildcard = any_origin || any(&config.cors_allowed_methods) || any(&config.cors_allowed_headers);
    let methods: Vec<Method> = config.cors_allowed_methods.iter().filter_map(|method| method.parse().ok()).collect();
    let headers: Vec<_> = config.cors_allowed_headers.iter().filter_map(|name| name.parse().ok()).collect();
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods(methods)
            .allow_headers(headers)
            .allow_credentials(config.cors_allow_credentials && !wildcard)
            .max_age(config.cors_max_age),
    )
}

/// `POST /api/v1/events`
async fn rest(State(server): State<Server>, request: HttpRequest) -> Response {
    let began = Instant::now();
    let ingest = &*server.ingest;
    let form = form(request.headers());
    let (form, result) = match form {
        Some(form) => (form, receive(ingest, request, form).await),
        None => {
            let message = "the content type must be application/json or application/proto";
            (Form::Json, Err((Rejection::new(RejectReason::BadRequest, message), None)))
        }
    };
    match result {
        Ok(req_guid) => {
            ingest.admission.record_ack(Protocol::Rest, began);
            respond(StatusCode::OK, form, &success(&req_guid))
        }
        Err((rejection, req_guid)) => {
            ingest.admission.count_rejection(Protocol::Rest, &rejection);
            if rejection.reason == RejectReason::Slow {
                let _ = server.closing.set(CloseReason::ReadTimeout);
            }
            let answer = refusal(&rejection, req_guid.as_deref());
            let mut response = respond(rejection.reason.answer().0, form, &answer);
            if matches!(rejection.reason, RejectReason::Slow | RejectReason::TooLarge) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            if rejection.reason.is_retryable() {
                response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_SECONDS.into());
            }
            response
        }
    }
}

/// Reads a batch and waits until it is durable. Returns its name.
async fn receive(ingest: &Ingest, request: HttpRequest, form: Form) -> Result<String, (Rejection, Option<String>)> {
    let client = connections::client(&ingest.config, request.headers());
    let client = client.map_err(|error| (Rejection::new(RejectReason::BadRequest, error.to_string()), None))?;
    // Base64 takes a third more than the bytes that it stands for.
    let bytes_max = ingest.admission.limits.batch_bytes_max();
    let body_bytes_max = if form == Form::Json { bytes_max.saturating_mul(2) } else { bytes_max };
    let asks_first = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    let read = timeout(ingest.config.read_timeout, read_body(ingest, &mut body, body_bytes_max)).await;
    let body = match read {
        Ok(Ok(body)) => body,
        Ok(Err(rejection)) => {
            if !asks_first {
                // A client that sends everything before it reads would find the connection reset, and no answer.
                let _ = timeout(ingest.config.read_timeout, discard(&mut body)).await;
            }
            return Err((rejection, None));
        }
        Err(_) => return Err((Rejection::new(RejectReason::Slow, "the request took too long to arrive"), None)),
    };
    let decoded = match form {
        Form::Json => json::decode(&body.0),
        Form::Protobuf => Request::parse(body.0),
    };
    let decoded = decoded.map_err(|error| (error.into(), None))?;
    let req_guid = decoded.req_guid().to_string();
    let named = |rejection| (rejection, Some(req_guid.clone()));
    let ticket = ingest.admission.submit(Protocol::Rest, &client, decoded).map_err(named)?;
    // From here on the log's own budget covers the batch.
    drop(body.1);
    ticket.await.map_err(named)?;
    Ok(req_guid)
}

/// Reads a whole body, within `bytes_max` and the read budget.
async fn read_body(
    ingest: &Ingest,
    body: &mut Body,
    bytes_max: usize,
) -> Result<(bytes::Bytes, super::budget::Reservation), Rejection> {
    let mut reservation = ingest.read_budget.reservation();
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > bytes_max {
        return Err(Rejection::too_large(ingest.admission.limits.batch_bytes_max()));
    }
    if !ingest.read_budget.has(announced as u64) {
        return Err(Rejection::overloaded());
    }
    let mut read = bytes::BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| Rejection::new(RejectReason::BadRequest, format!("the body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > bytes_max {
            return Err(Rejection::too_large(ingest.admission.limits.batch_bytes_max()));
        }
        let needed = ((read.len() + data.len()) as u64).saturating_sub(reservation.bytes());
        if !reservation.grow(needed) {
            return Err(Rejection::overloaded());
        }
        read.extend_from_slice(&data);
    }
    Ok((read.freeze(), reservation))
}

/// Reads what is left of a body and drops it.
async fn discard(body: &mut Body) {
    let mut left = DISCARD_BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, bytes::Bytes::len));
        if left == 0 {
            return;
        }
    }
}

fn form(headers: &HeaderMap) -> Option<Form> {
    let content_type = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match media_type.as_str() {
        "application/json" => Some(Form::Json),
        "application/proto" | "application/protobuf" | "application/x-protobuf" => Some(Form::Protobuf),
        _ => None,
    }
}

fn respond(status: StatusCode, form: Form, answer: &SendEventResponse) -> Response {
    match form {
        Form::Json => (status, [(header::CONTENT_TYPE, "application/json")], json::encode(answer)).into_response(),
        Form::Protobuf => {
            (status, [(header::CONTENT_TYPE, "application/proto")], answer.encode_to_vec()).into_response()
        }
    }
}

/// `GET /api/v1/events`: goes on as a WebSocket.
async fn upgrade(State(server): State<Server>, mut request: HttpRequest) -> Response {
    let headers = request.headers();
    let Some(key) = handshake_key(headers) else {
        return (StatusCode::BAD_REQUEST, "this path takes POST, or GET with a WebSocket handshake").into_response();
    };
    let accept = derive_accept_key(key.as_bytes());
    if server.ingest.config.http.check_origin && !same_or_allowed_origin(&server.ingest.config.http, headers) {
        return (StatusCode::FORBIDDEN, "this origin is not allowed").into_response();
    }
    let client = match connections::client(&server.ingest.config, headers) {
        Ok(client) => client,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    if server.ingest.stopping.is_cancelled() {
        let retry_after = [(header::RETRY_AFTER, RETRY_AFTER_SECONDS.to_string())];
        return (StatusCode::SERVICE_UNAVAILABLE, retry_after, "the server is stopping").into_response();
    }
    let connection = server.ingest.connections.open(&client);
    let on_upgrade = hyper::upgrade::on(&mut request);
    let _ = server.closing.set(CloseReason::Upgraded);
    let (ingest, slot) = (server.ingest.clone(), server.slot.clone());
    server.tasks.spawn(async move {
        let _slot = slot;
        let Ok(upgraded) = on_upgrade.await else { return };
        let parts = upgraded.downcast::<TokioIo<BoundedStream>>().expect("connections are served on a BoundedStream");
        let stream = parts.io.into_inner().into_inner();
        ingest.opened(Protocol::WebSocket);
        let reason = match connection {
            Ok(connection) => websocket::serve(&ingest, connection, stream, parts.read_buf).await,
            Err(refused) => {
                let reason = match refused {
                    ConnectionRefusal::Limit => CloseReason::ConnectionLimit,
                    ConnectionRefusal::Duplicate => CloseReason::DuplicateId,
                };
                Box::pin(websocket::refuse(stream, refused, &client.id, ingest.config.write_timeout)).await;
                reason
            }
        };
        ingest.closed(Protocol::WebSocket, reason);
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_ACCEPT, accept.parse().expect("base64 is a header value")),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// The key of a WebSocket handshake, if the request is one.
fn handshake_key(headers: &HeaderMap) -> Option<&HeaderValue> {
    let has = |name, token: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(token))
    };
    let is_handshake = has(header::CONNECTION, "upgrade")
        && has(header::UPGRADE, "websocket")
        && has(header::SEC_WEBSOCKET_VERSION, "13");
    headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_handshake)
}

/// Browsers always send an origin; other clients send none and are let in.
fn same_or_allowed_origin(config: &HttpConfig, headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let origin_host = origin.split_once("://").map(|(_, host)| host);
    host.zip(origin_host).is_some_and(|(host, origin)| host.eq_ignore_ascii_case(origin))
        || config.cors_allowed_origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin))
}
