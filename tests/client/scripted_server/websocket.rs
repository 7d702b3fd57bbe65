//! The scripted server over WebSocket.

use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use prost::Message as _;
use ringtail::proto::{SendEventRequest, SendEventResponse};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{Script, Seen, Step, ack, refusal};

pub async fn serve(listener: TcpListener, script: Arc<Script>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let script = script.clone();
        tokio::spawn(async move {
            script.state.send_modify(|state| state.opened += 1);
            // A client that goes away without a word is part of the tests.
            let _ = serve_connection(stream, &script).await;
            script.state.send_modify(|state| state.closed += 1);
        });
    }
}

async fn serve_connection(stream: TcpStream, script: &Script) -> Result<(), Error> {
    let (mut id, mut group) = (String::new(), String::new());
    #[allow(clippy::result_large_err, reason = "tungstenite's signature")]
    let read_headers = |request: &Request, response: Response| {
        let header = |name| request.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        assert_eq!(request.uri().path(), "/api/v1/events");
        (id, group) = (header("x-user-id"), header("x-user-group"));
        Ok(response)
    };
    let mut socket = tokio_tungstenite::accept_hdr_async(stream, read_headers).await?;
    let mut held = Vec::new();
    let mut hold = 0;
    while let Some(request) = next_request(&mut socket).await? {
        let req_guid = request.req_guid.clone();
        let seen = Seen { request, id: id.clone(), group: group.clone() };
        match script.next(seen) {
            Step::Ack if held.is_empty() => answer(&mut socket, ack(&req_guid)).await?,
            Step::Ack => held.push(req_guid),
            Step::Refuse(code) => answer(&mut socket, refusal(&req_guid, code)).await?,
            Step::RefuseNameless(code) => answer(&mut socket, refusal("", code)).await?,
            Step::Ignore => {}
            Step::AnswerInReverse(count) => {
                hold = count;
                held.push(req_guid);
            }
            Step::PingFirst => {
                socket.send(Message::Ping("are you there".into())).await?;
                assert_eq!(socket.next().await.unwrap()?, Message::Pong("are you there".into()));
                answer(&mut socket, ack(&req_guid)).await?;
            }
            Step::Close(code) => {
                let frame = CloseFrame { code: code.into(), reason: "scripted".into() };
                return socket.close(Some(frame)).await;
            }
            Step::Drop => return Ok(()),
            Step::Status(_) => unreachable!("not for WebSocket"),
        }
        if held.len() == hold {
            for req_guid in std::mem::take(&mut held).iter().rev() {
                answer(&mut socket, ack(req_guid)).await?;
            }
        }
    }
    Ok(())
}

/// The next request; `None` once the client has closed.
async fn next_request(socket: &mut WebSocketStream<TcpStream>) -> Result<Option<SendEventRequest>, Error> {
    while let Some(message) = socket.next().await {
        if let Message::Binary(bytes) = message? {
            return Ok(Some(SendEventRequest::decode(bytes).unwrap()));
        }
    }
    Ok(None)
}

async fn answer(socket: &mut WebSocketStream<TcpStream>, answer: SendEventResponse) -> Result<(), Error> {
    socket.send(Message::Binary(answer.encode_to_vec().into())).await
}
