//! REST and gRPC load: `window` senders share each connection's [`Client`].

use std::time::Instant;

use futures_util::future::join_all;

use super::Connection;
use super::schedule::{Pace, Schedule};
use super::websocket::random_request;
use crate::client::{Client, ClientError, new_req_guid};
use crate::proto;

pub(super) async fn run(connection: &Connection) {
    let options = &connection.options;
    let Some(client) = connection.open(Client::connect(&options.client(connection.number))).await else { return };
    let request = random_request(options.events_per_batch, options.event_bytes, options.types);
    let Some(schedule) = connection.schedule().await else { return };
    let senders = (0..options.window).map(|sender| send(connection, &client, &request, schedule, sender));
    join_all(senders).await;
    connection.stats.borrow_mut().record_open_at_end();
}

/// Sends one batch after the other until the end.
async fn send(
    connection: &Connection,
    client: &Client,
    request: &proto::SendEventRequest,
    schedule: Schedule,
    sender: usize,
) {
    let options = &connection.options;
    // Senders take turns over all connections, not connection by connection.
    let number = sender * options.connections + connection.number;
    let mut pace = Pace::new(&schedule, options, number, options.connections * options.window);
    let mut unanswered = 0;
    loop {
        let now = Instant::now();
        if now >= schedule.end {
            break;
        }
        let Some(since) = pace.take(now) else {
            let due = pace.next_due().unwrap_or(now).min(schedule.end);
            tokio::time::sleep_until(due.into()).await;
            continue;
        };
        let batch = proto::SendEventRequest { req_guid: new_req_guid(), ..request.clone() };
        let answer = tokio::time::timeout_at(schedule.give_up.into(), client.send(batch)).await;
        let mut stats = connection.stats.borrow_mut();
        match answer {
            Ok(Ok(_)) => stats.record_ack(since, Instant::now()),
            Ok(Err(error)) => {
                unanswered += u64::from(!matches!(error, ClientError::Refused(_)));
                stats.record_error(&error);
            }
            Err(_) => unanswered += 1,
        }
    }
    connection.stats.borrow_mut().record_leftovers(unanswered, pace.missed(schedule.end));
}
