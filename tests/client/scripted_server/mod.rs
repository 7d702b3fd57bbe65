//! A server that does as a script says: one step per request, and `Step::Ack` for every one after the last step.
//! gRPC is framed by hand, so that it needs no generated server.

mod http;
mod websocket;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use ringtail::proto::{Code, SendEventRequest, SendEventResponse, Status};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// What the server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    WebSocket,
    Rest,
    Grpc,
}

impl Protocol {
    pub const ALL: [Protocol; 3] = [Protocol::WebSocket, Protocol::Rest, Protocol::Grpc];
}

/// What the server does with a request.
#[derive(Debug, Clone)]
pub enum Step {
    Ack,
    /// An answer with this code; over REST with status 400 or 503.
    Refuse(Code),
    /// WebSocket: the same, without a name in it.
    RefuseNameless(Code),
    /// REST: an HTTP status with a body that is no answer. gRPC: a status code.
    Status(u16),
    /// WebSocket: no answer.
    Ignore,
    /// WebSocket: wait for so many requests, this one included, then ack them all, the last one first.
    AnswerInReverse(usize),
    /// WebSocket: ping, wait for the pong, ack.
    PingFirst,
    /// WebSocket: close with this code.
    Close(u16),
    /// WebSocket: drop the connection.
    Drop,
}

/// A request, and who sent it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub request: SendEventRequest,
    pub id: String,
    pub group: String,
}

/// A running server. Ends with the test's runtime.
pub struct ScriptedServer {
    pub url: String,
    script: Arc<Script>,
}

impl ScriptedServer {
    pub async fn start(protocol: Protocol, steps: impl IntoIterator<Item = Step>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Arc::new(Script::new(steps));
        let scheme = match protocol {
            Protocol::WebSocket => {
                tokio::spawn(websocket::serve(listener, script.clone()));
                "ws"
            }
            Protocol::Rest => {
                tokio::spawn(http::serve_rest(listener, script.clone()));
                "http"
            }
            Protocol::Grpc => {
                tokio::spawn(http::serve_grpc(listener, script.clone()));
                "grpc"
            }
        };
        ScriptedServer { url: format!("{scheme}://{address}"), script }
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.script.state.borrow().seen.clone()
    }

    /// Waits for so many requests.
    pub async fn seen_at_least(&self, count: usize) {
        self.script.state.subscribe().wait_for(|state| state.seen.len() >= count).await.unwrap();
    }

    /// WebSocket connections so far.
    pub fn connections(&self) -> usize {
        self.script.state.borrow().opened
    }

    /// Waits until no WebSocket connection is open.
    pub async fn all_closed(&self) {
        self.script.state.subscribe().wait_for(|state| state.opened == state.closed).await.unwrap();
    }
}

struct Script {
    steps: Mutex<VecDeque<Step>>,
    state: watch::Sender<State>,
}

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    opened: usize,
    closed: usize,
}

impl Script {
    fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Script { steps: Mutex::new(steps.into_iter().collect()), state: watch::Sender::default() }
    }

    /// Notes a request and says what to do with it.
    fn next(&self, seen: Seen) -> Step {
        self.state.send_modify(|state| state.seen.push(seen));
        self.steps.lock().unwrap().pop_front().unwrap_or(Step::Ack)
    }
}

fn ack(req_guid: &str) -> SendEventResponse {
    SendEventResponse {
        status: Status::Success as i32,
        code: Code::Ok as i32,
        sent_time: 1_700_000_000,
        reason: String::new(),
        data: HashMap::from([("req_guid".into(), req_guid.into())]),
    }
}

fn refusal(req_guid: &str, code: Code) -> SendEventResponse {
    let (status, code) = (Status::Error as i32, code as i32);
    SendEventResponse { status, code, reason: "scripted".into(), ..ack(req_guid) }
}
