//! The wire protocol, over real sockets: what clients are promised, and what a hostile one cannot do.

#[path = "protocol/dedup.rs"]
mod dedup;
#[path = "protocol/grpc.rs"]
mod grpc;
#[path = "protocol/liveness.rs"]
mod liveness;
#[path = "protocol/rest.rs"]
mod rest;
#[path = "protocol/rest_limits.rs"]
mod rest_limits;
#[path = "support/small_log.rs"]
mod small_log;
#[path = "protocol/stopping.rs"]
mod stopping;
#[path = "protocol/support.rs"]
mod support;
#[path = "protocol/websocket.rs"]
mod websocket;
#[path = "protocol/websocket_frames.rs"]
mod websocket_frames;
#[path = "protocol/websocket_limits.rs"]
mod websocket_limits;
