//! The order of system calls behind an ack: the request is read, written to a segment, synced, and only then acked.
//!
//! Runs the binary under `strace`, which must be installed: part of the feature `real-kafka`, whose tools `.ci/run` installs.

#[path = "support/chunks.rs"]
mod chunks;
#[path = "support/process.rs"]
mod process;
#[path = "support/trace.rs"]
mod trace;

use std::path::Path;
use std::time::{Duration, Instant};

use process::{Options, Process};
use ringtail::client::{Client, ClientOptions};
use ringtail::proto::{Event, SendEventRequest};
use trace::{Flaw, check, parse};

/// Batches sent over each protocol.
const BATCHES: u32 = 10;
/// Longest that strace may take to write the rest of the trace.
const PATIENCE: Duration = Duration::from_secs(30);

fn strace(output: &Path) -> Vec<String> {
    let calls = "trace=fdatasync,pwrite64,read,readv,recvfrom,recvmsg,write,writev,sendto,sendmsg";
    // -D: the traced process stays our child, with the id that we know.
    let arguments = ["strace", "-D", "-f", "-y", "-ttt", "-s", "1000000", "-e", "signal=none", "-e", calls, "-o"];
    arguments.into_iter().map(String::from).chain([output.display().to_string()]).collect()
}

/// The trace, once strace has seen the end of process `pid`.
async fn read_trace(output: &Path, pid: i32) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let trace = String::from_utf8_lossy(&std::fs::read(output).unwrap()).into_owned();
        let ended = |line: &str| line.starts_with(&format!("{pid} ")) && line.ends_with("+++ exited with 0 +++");
        if trace.lines().any(ended) {
            return trace;
        }
        assert!(Instant::now() < deadline, "strace does not end:\n{}", trace.lines().last().unwrap_or_default());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn every_ack_follows_the_sync_of_its_batch() {
    let found = std::process::Command::new("strace").arg("-V").output();
    assert!(found.is_ok_and(|output| output.status.success()), "strace is not installed: apt-get install strace");
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("trace");
    let options = Options { wrapper: strace(&output), ..Options::small(&directory.path().join("data")) };
    let (mut process, addresses) = Process::start(&options);
    let mut guids = Vec::new();
    for url in
        [format!("ws://{}", addresses.http), format!("http://{}", addresses.http), format!("grpc://{}", addresses.grpc)]
    {
        let options = ClientOptions::new(url.parse().unwrap(), "device-7");
        let client = Client::connect(&options).await.unwrap();
        for number in 0..BATCHES {
            let event = Event { event_bytes: "payload".into(), r#type: "click".into() };
            let req_guid = format!("batch-{}-{number}-end", url.split(':').next().unwrap());
            let request = SendEventRequest { req_guid: req_guid.clone(), sent_time: None, events: vec![event] };
            client.send(request).await.unwrap();
            guids.push(req_guid);
        }
        client.close().await;
    }
    let pid = process.pid();
    assert!(process.stop().success());
    let trace = read_trace(&output, pid).await;
    if let Ok(path) = std::env::var("TRACE_OUTPUT") {
        std::fs::write(path, &trace).unwrap();
    }
    let calls = parse(&trace);
    for req_guid in &guids {
        let proof = check(&calls, req_guid).unwrap_or_else(|flaw| panic!("{flaw}"));
        println!("{req_guid}: {proof:?}");
    }
}

const GOOD: &str = r#"10 1.0 recvfrom(11<socket:[7]>,  <unfinished ...>
12 1.1 fdatasync(9</d/wal/000000000001/db>) = 0
10 1.2 <... recvfrom resumed>"\n\3g-1", 8192, 0, NULL, NULL) = 5
13 1.3 pwrite64(8</d/wal/000000000001/db>, "\0\0g-1", 5, 0) = 5
12 1.4 fdatasync(9</d/wal/000000000001/db> <unfinished ...>
10 1.5 recvfrom(11<socket:[7]>, 0x7f, 8192, 0, NULL, NULL) = -1 EAGAIN (Resource temporarily unavailable)
12 1.6 <... fdatasync resumed>) = 0
10 1.7 sendto(11<socket:[7]>, "\202\5\10\1g-1", 7, MSG_NOSIGNAL, NULL, 0) = 7
"#;

/// [`GOOD`] with its lines in another order, by number from 1.
fn reordered(order: &[usize]) -> String {
    let lines: Vec<&str> = GOOD.lines().collect();
    order.iter().map(|number| format!("{}\n", lines[number - 1])).collect()
}

#[test]
fn the_checker_accepts_a_good_trace() {
    let proof = check(&parse(GOOD), "g-1").unwrap();
    assert_eq!((proof.read, proof.write, proof.sync_began, proof.sync_ended, proof.ack), (3, 4, 5, 7, 8));
}

#[test]
fn the_checker_refuses_an_ack_before_the_sync() {
    for (what, trace) in [
        ("acked while the sync runs", reordered(&[1, 2, 3, 4, 5, 6, 8, 7])),
        ("acked before the sync began", reordered(&[1, 2, 3, 4, 8, 5, 6, 7])),
        ("synced before the write", reordered(&[1, 2, 3, 5, 6, 7, 4, 8])),
        ("the write is not over when the sync begins", {
            let write = "13 1.3 pwrite64(8</d/wal/000000000001/db>, \"\\0\\0g-1\", 5, 0 <unfinished ...>\n";
            let lines = reordered(&[1, 2, 3]) + write + &reordered(&[5, 6, 7]);
            lines + "13 1.6 <... pwrite64 resumed>) = 5\n" + &reordered(&[8])
        }),
        ("only the sync before the request", reordered(&[1, 2, 3, 4, 6, 8])),
        ("the sync failed", GOOD.replace("resumed>) = 0", "resumed>) = -1 EIO (Input/output error)")),
        ("another file was synced", GOOD.replace("9</d/wal/000000000001/db> <", "9</d/wal/000000000002/db> <")),
    ] {
        let flaw = check(&parse(&trace), "g-1").unwrap_err();
        assert!(matches!(flaw, Flaw::AckBeforeSync { .. }), "{what}: {flaw}\n{trace}");
    }
}

#[test]
fn the_checker_refuses_a_trace_with_a_gap() {
    for without in [3, 4, 8] {
        let order: Vec<usize> = (1..=8).filter(|number| *number != without).collect();
        let flaw = check(&parse(&reordered(&order)), "g-1").unwrap_err();
        assert!(matches!(flaw, Flaw::Missing { .. }), "without line {without}: {flaw}");
    }
}

#[test]
fn the_checker_unmasks_websocket_frames() {
    let masked: String =
        b"\x0a\x03g-1".iter().zip([1, 2, 3, 4, 1]).map(|(byte, mask)| format!("\\{:03o}", byte ^ mask)).collect();
    let trace = GOOD.replace("\"\\n\\3g-1\"", &format!("\"\\202\\205\\1\\2\\3\\4{masked}\""));
    assert_ne!(trace, GOOD);
    check(&parse(&trace), "g-1").unwrap();
}
