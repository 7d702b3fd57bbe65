//! gRPC: `SendEvent` under all three package names.
//!
//! The codec hands over the message's bytes undecoded, so that the log keeps what the client sent. Once a request is
//! decoded, a refusal is an answer with `STATUS_ERROR`, not a gRPC error, because the widely used Go client panics on those.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};

use super::budget::Reservation;
use super::rejection::{RejectReason, Rejection, refusal, success};
use super::{CloseReason, Ingest, Protocol, connections, listener};
use crate::batch;
use crate::proto::SendEventResponse;

/// The packages under which clients know the service.
const PACKAGES: [&str; 3] = ["raystack.raccoon.v1beta1", "gotocompany.raccoon.v1beta1", "odpf.raccoon.v1beta1"];
/// Requests of one connection that are served at the same time.
const STREAMS_MAX: u32 = 128;

/// See [`super::serve_grpc`].
pub(super) async fn serve(ingest: Arc<Ingest>, listener: TcpListener, stop: CancellationToken) {
    let shared = ingest.clone();
    let connect = move |stream, slot, _| connection(shared.clone(), stream, slot);
    listener::serve(ingest, listener::Port::Grpc, listener, stop, connect).await;
}

async fn connection(ingest: Arc<Ingest>, stream: TcpStream, _slot: listener::Slot) {
    ingest.opened(Protocol::Grpc);
    // HTTP/2's own keep-alive begins after the handshake: a client that never speaks is not waited for.
    let spoke = tokio::select! {
        readable = timeout(ingest.config.read_timeout, stream.readable()) => matches!(readable, Ok(Ok(()))),
        () = ingest.stopping.cancelled() => false,
    };
    if !spoke {
        let stopping = ingest.stopping.is_cancelled();
        return ingest.closed(Protocol::Grpc, if stopping { CloseReason::Stopping } else { CloseReason::ReadTimeout });
    }
    let service = hyper::service::service_fn(|request| {
        let ingest = ingest.clone();
        async move { Ok::<_, Infallible>(call(&ingest, request).await) }
    });
    let mut connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(ingest.config.ping_interval)
        .keep_alive_timeout(ingest.config.pong_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let mut stopping = false;
    let result = loop {
        tokio::select! {
            result = &mut connection => break result,
            () = ingest.stopping.cancelled(), if !stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    let reason = match result {
        _ if stopping => CloseReason::Stopping,
        Ok(()) => CloseReason::Client,
        Err(error) if error.is_timeout() => CloseReason::PongTimeout,
        Err(_) => CloseReason::Error,
    };
    ingest.closed(Protocol::Grpc, reason);
}

async fn call(ingest: &Arc<Ingest>, request: http::Request<Incoming>) -> http::Response<tonic::body::Body> {
    let known = request.uri().path().strip_prefix('/').and_then(|path| path.strip_suffix(".EventService/SendEvent"));
    if !known.is_some_and(|package| PACKAGES.contains(&package)) {
        return Status::unimplemented("the only method is EventService/SendEvent").into_http();
    }
    // A batch that is somewhat too large still gets a readable answer.
    let message_bytes_max = ingest.admission.limits.batch_bytes_max().saturating_mul(2);
    let mut grpc = Grpc::new(EventCodec).apply_max_message_size_config(Some(message_bytes_max), None);
    let reservation = ingest.read_budget.reservation();
    let request = request.map(|body| BudgetedBody { body, reservation });
    let deadline = ingest.config.read_timeout + ingest.config.write_timeout;
    match timeout(deadline, grpc.unary(SendEvent(ingest.clone()), request)).await {
        Ok(response) => response,
        Err(_) => Status::deadline_exceeded("the request took too long").into_http(),
    }
}

struct SendEvent(Arc<Ingest>);

impl UnaryService<Bytes> for SendEvent {
    type Response = SendEventResponse;
    type Future = Pin<Box<dyn Future<Output = Result<Response<SendEventResponse>, Status>> + Send>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let ingest = self.0.clone();
        Box::pin(async move { send_event(&ingest, request).await.map(Response::new) })
    }
}

async fn send_event(ingest: &Ingest, request: Request<Bytes>) -> Result<SendEventResponse, Status> {
    let began = Instant::now();
    let client = connections::client(&ingest.config, &request.metadata().clone().into_headers());
    let invalid = |message: String| {
        let rejection = Rejection::new(RejectReason::BadRequest, message);
        ingest.admission.count_rejection(Protocol::Grpc, &rejection);
        Status::invalid_argument(rejection.message)
    };
    let client = client.map_err(|error| invalid(error.to_string()))?;
    if client.id.is_empty() {
        return Err(invalid(format!("the metadata has no {}", ingest.config.connection_id_header)));
    }
    let decoded = batch::Request::parse(request.into_inner()).map_err(|error| invalid(error.to_string()))?;
    let req_guid = decoded.req_guid().to_string();
    let submitted = ingest.admission.submit(Protocol::Grpc, &client, decoded);
    let result = match submitted {
        Ok(ticket) => ticket.await,
        Err(rejection) => Err(rejection),
    };
    Ok(match result {
        Ok(()) => {
            ingest.admission.record_ack(Protocol::Grpc, began);
            success(&req_guid)
        }
        Err(rejection) => {
            ingest.admission.count_rejection(Protocol::Grpc, &rejection);
            refusal(&rejection, Some(&req_guid))
        }
    })
}

/// A request's body, within the read budget.
struct BudgetedBody {
    body: Incoming,
    reservation: Reservation,
}

impl Body for BudgetedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(Status::cancelled(error.to_string())))),
            None => return Poll::Ready(None),
        };
        let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
        if self.reservation.grow(bytes) {
            Poll::Ready(Some(Ok(frame)))
        } else {
            Poll::Ready(Some(Err(Status::resource_exhausted(Rejection::overloaded().message))))
        }
    }
}

/// Takes a request as its bytes, encodes an answer.
struct EventCodec;

impl Codec for EventCodec {
    type Encode = SendEventResponse;
    type Decode = Bytes;
    type Encoder = AnswerEncoder;
    type Decoder = BytesDecoder;

    fn encoder(&mut self) -> AnswerEncoder {
        AnswerEncoder
    }

    fn decoder(&mut self) -> BytesDecoder {
        BytesDecoder
    }
}

struct AnswerEncoder;

impl Encoder for AnswerEncoder {
    type Item = SendEventResponse;
    type Error = Status;

    fn encode(&mut self, answer: SendEventResponse, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        answer.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }
}

struct BytesDecoder;

impl Decoder for BytesDecoder {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
