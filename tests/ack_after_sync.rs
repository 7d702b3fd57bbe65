//! The order of system calls: the write that carries an ack begins after the `fdatasync` that covers its batch returned.
//!
//! Batches are sent one at a time under `strace`, so between two acks there must be an `fdatasync` of a segment of the log
//! that began after the first one's ack and returned before the second one's is written.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ringtail::client::{Client, ClientOptions};
use ringtail::proto::{Event, SendEventRequest};

const DEADLINE: Duration = Duration::from_secs(60);
const BATCHES: usize = 5;

#[test]
fn an_ack_is_written_after_its_sync() {
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("trace");
    let mut strace = start(directory.path(), &trace);
    let ready = wait_until_ready(&directory.path().join("log.txt"));
    let guids = tokio::runtime::Runtime::new().unwrap().block_on(send(&ready));
    // SAFETY: kill has no preconditions. strace ends when the service that it runs does, which is its child.
    unsafe { libc::kill(service_of(&strace), libc::SIGTERM) };
    strace.wait().unwrap();
    let trace = std::fs::read_to_string(trace).unwrap();
    check(&trace, &guids).unwrap_or_else(|guid| panic!("the ack of {guid} was written before its sync:\n{trace}"));
}

#[test]
fn a_trace_with_an_early_ack_is_recognised() {
    let sync = "7 fdatasync(9</d/wal/000000000001/db>) = 0\n";
    let ack = |guid: &str| format!("8 sendto(12<socket:[1]>, \"..{guid}..\", 30, MSG_NOSIGNAL, NULL, 0) = 30\n");
    let begun = "7 fdatasync(9</d/wal/000000000001/db> <unfinished ...>\n";
    let ended = "7 <... fdatasync resumed>) = 0\n";
    let failed = "7 fdatasync(9</d/wal/000000000001/db>) = -1 EIO (Input/output error)\n";
    let meta = "7 fdatasync(9</d/meta/db>) = 0\n";
    let guids = ["g1".to_string(), "g2".to_string()];
    let (g1, g2) = (ack("g1"), ack("g2"));
    assert_eq!(check(&[sync, &g1, sync, &g2].concat(), &guids), Ok(()));
    assert_eq!(check(&[begun, ended, &g1, begun, ended, &g2].concat(), &guids), Ok(()));
    for bad in [
        [sync, &g1, &g2, sync].concat(),
        [sync, &g1, failed, &g2].concat(),
        [sync, &g1, meta, &g2].concat(),
        [sync, &g1, begun, &g2, ended].concat(),
        [sync, begun, &g1, ended, &g2].concat(),
        [sync, &g1, sync].concat(),
    ] {
        assert_eq!(check(&bad, &guids), Err("g2".to_string()), "{bad}");
    }
}

/// Whether each ack, in the order of `guids`, has a sync of its own before it. The name of the first that has not.
fn check(trace: &str, guids: &[String]) -> Result<(), String> {
    let mut guids = guids.iter();
    let Some(mut wanted) = guids.next() else { return Ok(()) };
    let (mut synced, mut began_by) = (false, Vec::<&str>::new());
    for line in trace.lines() {
        let (thread, call) = line.split_once(' ').unwrap_or_default();
        let call = call.trim_start();
        if call.starts_with("fdatasync(") && call.contains("/wal/") && call.contains("/db>") {
            synced |= call.ends_with("= 0");
            if call.contains("<unfinished") {
                began_by.push(thread);
            }
        } else if call.starts_with("<... fdatasync resumed>") && began_by.contains(&thread) {
            began_by.retain(|other| *other != thread);
            synced |= call.ends_with("= 0");
        } else if call.contains(wanted.as_str()) {
            if !synced {
                return Err(wanted.clone());
            }
            // A sync that has begun by now does not count for the next one.
            (synced, began_by) = (false, Vec::new());
            match guids.next() {
                Some(next) => wanted = next,
                None => return Ok(()),
            }
        }
    }
    Err(wanted.clone())
}

fn start(directory: &Path, trace: &Path) -> Child {
    let config = directory.join("ringtail.toml");
    let wal = directory.join("log");
    let text = format!(
        "ingest.http.listen = \"127.0.0.1:0\"\ningest.grpc.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n\
         forward.brokers = []\nwal.directory = {wal:?}\nwal.free_bytes_min = \"0B\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let log = std::fs::File::create(directory.join("log.txt")).unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-s", "400", "-e", "trace=fdatasync,write,writev,sendto,sendmsg", "-o"]).arg(trace);
    command.arg(env!("CARGO_BIN_EXE_ringtail")).args(["serve", "--config"]).arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().expect("strace is installed")
}

fn wait_until_ready(log: &Path) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let text = std::fs::read_to_string(log).unwrap();
        if let Some(line) = text.lines().find(|line| line.contains(" ready ")) {
            return line.to_string();
        }
        assert!(Instant::now() < deadline, "the service is not ready in time:\n{text}");
        std::thread::yield_now();
    }
}

fn service_of(strace: &Child) -> i32 {
    let id = strace.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    children.split(' ').next().and_then(|child| child.parse().ok()).expect("strace runs the service")
}

/// Sends batches one at a time over each protocol. Returns their names, in the order of their acks.
async fn send(ready: &str) -> Vec<String> {
    let address =
        |name: &str| ready.split(&format!(" {name}=")).nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let urls = [
        format!("ws://{}", address("http")),
        format!("http://{}", address("http")),
        format!("grpc://{}", address("grpc")),
    ];
    let mut guids = Vec::new();
    for (url, protocol) in urls.iter().zip(["websocket", "rest", "grpc"]) {
        let client = Client::connect(&ClientOptions::new(url.parse().unwrap(), protocol)).await.unwrap();
        for number in 0..BATCHES {
            let req_guid = format!("guid-{protocol}-{number}-end");
            let event = Event { event_bytes: vec![7; 100].into(), r#type: "t".into() };
            let request = SendEventRequest { req_guid: req_guid.clone(), sent_time: None, events: vec![event] };
            client.send(request).await.unwrap();
            guids.push(req_guid);
        }
        client.close().await;
    }
    guids
}
