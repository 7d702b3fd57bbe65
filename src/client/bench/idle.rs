//! Connections that are only held open.

use std::convert::Infallible;
use std::time::Instant;

use super::frame::RequestFrame;
use super::websocket::{Socket, random_request};
use super::{Connection, IdleOptions};
use crate::client::ClientError;

pub(super) async fn run(connection: &Connection, idle: &IdleOptions) {
    let options = connection.options.client(connection.number);
    let open = async {
        let mut socket = Socket::open(&options).await?;
        if let Some(message_bytes) = idle.message_bytes {
            send_one(connection, &mut socket, message_bytes).await?;
        }
        Ok(socket)
    };
    let Some(mut socket) = connection.open(open).await else { return };

    let held = tokio::select! {
        error = hold(&mut socket) => Err(error),
        () = until_end(connection) => Ok(()),
    };
    let mut stats = connection.stats.borrow_mut();
    match held {
        Ok(()) => stats.record_open_at_end(),
        Err(error) => stats.record_error(&error),
    }
}

async fn until_end(connection: &Connection) {
    if let Some(schedule) = connection.schedule().await {
        tokio::time::sleep_until(schedule.end.into()).await;
    }
}

/// Sends one batch with one event and waits for its answer.
async fn send_one(connection: &Connection, socket: &mut Socket, message_bytes: usize) -> Result<(), ClientError> {
    let since = Instant::now();
    let mut out = Vec::new();
    RequestFrame::new(random_request(1, message_bytes, 1)).write(0, &mut out);
    loop {
        socket.write(&mut out).await?;
        socket.read().await?;
        if let Some(answer) = socket.next_answer(&mut out)? {
            let mut stats = connection.stats.borrow_mut();
            match answer.acked {
                true => stats.record_idle_ack(since, Instant::now()),
                false => stats.record_rejection(answer.code, &String::from_utf8_lossy(answer.reason)),
            }
            return Ok(());
        }
    }
}

/// Answers pings until the connection ends, and says why it ended.
async fn hold(socket: &mut Socket) -> ClientError {
    match serve(socket).await {
        Err(error) => error,
    }
}

async fn serve(socket: &mut Socket) -> Result<Infallible, ClientError> {
    let mut out = Vec::new();
    loop {
        socket.write(&mut out).await?;
        socket.read().await?;
        while socket.next_answer(&mut out)?.is_some() {}
    }
}
