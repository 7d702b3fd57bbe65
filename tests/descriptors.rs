//! Clients cannot take the file descriptors that the log needs.

#[path = "support/http.rs"]
mod http;
#[path = "support/process.rs"]
mod process;

use std::net::{SocketAddr, TcpStream};

use process::{Options, Process};
use ringtail::client::{self, Client, ClientOptions};
use ringtail::proto::{Event, SendEventRequest, Status};

/// Open files that the process may have.
const LIMIT: usize = 400;

fn idle(address: SocketAddr, connections: usize) -> Vec<TcpStream> {
    (0..connections).map(|_| TcpStream::connect(address).unwrap()).collect()
}

fn request() -> SendEventRequest {
    let event = Event { event_bytes: vec![7; 1 << 20].into(), r#type: "page".into() };
    SendEventRequest { req_guid: client::new_req_guid(), sent_time: Some(client::sent_time_now()), events: vec![event] }
}

#[tokio::test]
async fn idle_connections_on_every_port_leave_the_log_its_files() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = Options::small(directory.path());
    options.wrapper = ["bash", "-c", &format!("ulimit -n {LIMIT}; exec \"$@\""), "bash"].map(String::from).into();
    let (mut process, addresses) = Process::start(&options);
    let url = format!("ws://{}", addresses.http);
    let client = Client::connect(&ClientOptions::new(url.parse().unwrap(), "busy")).await.unwrap();
    let idle = [(addresses.admin, LIMIT + 50), (addresses.http, LIMIT / 2), (addresses.grpc, LIMIT / 2)]
        .map(|(address, connections)| idle(address, connections));
    // Each segment takes files of its own; six are filled.
    for _ in 0..48 {
        let answer = client.send(request()).await.unwrap();
        assert_eq!(answer.status(), Status::Success, "{answer:?}");
    }
    drop(idle);
    http::wait_until("an answer", || http::get(addresses.admin, "/livez").0 == 200).await;
    client.close().await;
    assert!(process.stop().success());
    let complaints = process.complaints();
    assert!(complaints.iter().any(|line| line.contains("open_files_max=400")), "{complaints:?}");
    assert!(!complaints.iter().any(|line| line.contains("Too many open files")), "{complaints:?}");
}
