//! What the service and its supervisor say to each other, with the test in systemd's place: listening sockets handed over
//! and kept, readiness, reloads, credentials. A real systemd is in `systemd.rs`.

#[path = "support/process.rs"]
mod process;
#[path = "support/supervisor.rs"]
mod supervisor;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use process::{Options, Process};
use serde_json::Value;
use supervisor::Supervisor;

/// Runs the binary as systemd does with `sockets`.
fn passing(sockets: &[(&str, &TcpListener)]) -> Vec<String> {
    let mut redirections = String::new();
    for (at, (_, socket)) in sockets.iter().enumerate() {
        // SAFETY: the descriptor is open; without the flag the child keeps it.
        assert_eq!(unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFD, 0) }, 0);
        redirections += &format!(" {}<&{}", 3 + at, socket.as_raw_fd());
    }
    let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
    let (count, names) = (sockets.len(), names.join(":"));
    let script = format!("LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={names} exec \"$@\"{redirections}");
    ["bash", "-c", &script, "bash"].map(String::from).into()
}

fn status(admin: std::net::SocketAddr) -> Value {
    let mut stream = TcpStream::connect(admin).unwrap();
    write!(stream, "GET /status HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn a_socket_that_the_supervisor_holds_is_used_and_outlives_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let supervisor = Supervisor::new(directory.path());
    // Fresh ports elsewhere, so that the numbers of the descriptors do not collide with the redirections.
    let spare: Vec<TcpListener> = (0..8).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stray = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut options = Options::small(&directory.path().join("wal"));
    options.wrapper = passing(&[("http", &listener), ("ringtail.socket", &stray)]);
    options.environment = vec![supervisor.environment()];
    // The last one wins in `Options`' own lines: the address is set through the environment.
    options.environment.push(("RINGTAIL_INGEST__HTTP__LISTEN".into(), address.to_string()));
    let (mut process, addresses) = Process::start(&options);
    drop(spare);
    assert_eq!(addresses.http, address);
    // gRPC and admin are new, so all three are handed over.
    let told = supervisor.wait_for("READY=1").concat();
    for name in ["http", "grpc", "admin"] {
        assert!(told.contains(&format!("FDSTORE=1\nFDNAME={name}")), "{told}");
    }
    assert!(told.contains("STATUS=accepting batches"), "{told}");
    assert!(process.stop().success());
    assert!(supervisor.wait_for("STOPPING=1").concat().contains("STOPPING=1"));
    assert!(process.log_end().contains("nobody answers there"), "{}", process.log_end());

    // Whoever comes while no process is there waits for the next one.
    let mut client = TcpStream::connect(address).expect("the socket still listens");
    write!(client, "GET /ping HTTP/1.0\r\n\r\n").unwrap();
    let (mut process, _) = Process::start(&options);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("pong"), "{answer}");
    assert!(process.stop().success());
}

#[test]
fn a_reload_changes_what_it_can_and_names_what_it_cannot() {
    let directory = tempfile::tempdir().unwrap();
    let supervisor = Supervisor::new(directory.path());
    let mut options = Options::small(&directory.path().join("wal"));
    options.environment = vec![supervisor.environment()];
    let (mut process, addresses) = Process::start(&options);
    supervisor.wait_for("READY=1");
    assert_eq!(status(addresses.admin)["reload"], Value::Null);
    let before = std::fs::read_to_string(process.configuration()).unwrap();

    let changed =
        "ingest.batch_events_max = 2\ningest.connections_max = 7\nlog.level = \"debug\"\nwal.bytes_max = \"1GiB\"\n";
    std::fs::write(process.configuration(), before.clone() + changed).unwrap();
    process.hang_up();
    let told = supervisor.wait_for("READY=1").concat();
    assert!(told.contains("RELOADING=1\nMONOTONIC_USEC="), "{told}");
    let now = status(addresses.admin);
    let keys =
        |list: &Value| list.as_array().unwrap().iter().map(|key| key.as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(keys(&now["reload"]["changed"]), ["ingest.batch_events_max", "ingest.connections_max", "log.level"]);
    assert_eq!(keys(&now["reload"]["restart"]), ["wal.bytes_max"]);
    assert_eq!(now["limits"]["connections_max"], 7);
    // Applied: three events are one too many now.
    let event = r#"{"type":"t","event_bytes":"YQ=="}"#;
    let body = format!(r#"{{"req_guid":"r","sent_time":{{"seconds":1}},"events":[{event},{event},{event}]}}"#);
    let mut client = TcpStream::connect(addresses.http).unwrap();
    let head = "POST /api/v1/events HTTP/1.0\r\nContent-Type: application/json\r\nX-User-ID: u\r\nContent-Length:";
    write!(client, "{head} {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("the limit is 2"), "{answer}");

    std::fs::write(process.configuration(), before + "wal.bytes_max = \"1KiB\"\n").unwrap();
    process.hang_up();
    let told = supervisor.wait_for("READY=1").concat();
    assert!(told.contains("STATUS=reload refused"), "{told}");
    supervisor.wait_for("; last reload refused; restart for");
    let now = status(addresses.admin);
    assert!(now["reload"]["error"].as_str().unwrap().contains("wal.bytes_max"), "{now}");
    assert_eq!(now["limits"]["connections_max"], 7, "nothing has changed");
    assert!(process.stop().success());
    let log = process.log_end();
    assert!(log.contains("takes effect at the next start") && log.contains("reload refused"), "{log}");
}

#[test]
fn config_check_says_beforehand_what_a_reload_does() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = Options::small(&directory.path().join("wal"));
    // What the service's own environment says is no business of the file, nor of whoever checks it.
    let own = [("RINGTAIL_LOG__LEVEL", "info"), ("RINGTAIL_WAL__SEGMENT_BYTES", "64MiB")];
    options.environment = own.map(|(name, value)| (name.into(), value.into())).into();
    let supervisor = Supervisor::new(directory.path());
    options.environment.push(supervisor.environment());
    let (mut process, addresses) = Process::start(&options);
    supervisor.wait_for("READY=1");
    let candidate = directory.path().join("candidate.toml");
    let before = std::fs::read_to_string(process.configuration()).unwrap();
    let check = |changed: &str| {
        std::fs::write(&candidate, before.clone() + changed).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ringtail"));
        let output = command.args(["config", "check", "--config"]).arg(&candidate).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), said.lines().last().unwrap().to_owned())
    };
    let service = format!("the service that runs on {}", options.directory.display());
    assert_eq!(check(""), (0, format!("{service}: has these settings already")));
    let changed = "ingest.connections_max = 7\nlog.level = \"debug\"\nwal.bytes_max = \"1GiB\"\n";
    let later = "only its next start changes wal.bytes_max";
    assert_eq!(check(changed), (0, format!("{service}: a reload changes ingest.connections_max; {later}")));

    // And so it is.
    std::fs::write(process.configuration(), before.clone() + changed).unwrap();
    process.hang_up();
    supervisor.wait_for("READY=1");
    let reload = &status(addresses.admin)["reload"];
    assert_eq!(reload["changed"], serde_json::json!(["ingest.connections_max"]));
    assert_eq!(reload["restart"], serde_json::json!(["wal.bytes_max"]));
    assert_eq!(check(changed), (0, format!("{service}: {later}")), "until it is restarted");

    let (code, said) = check("wal.bytes_max = \"100MiB\"\n");
    assert_eq!(code, 64, "too small for the segments of its own environment: {said}");
    assert!(said.contains("wal.bytes_max"), "{said}");
    assert!(process.stop().success());
    let nobody = format!("no service runs on {}: not compared with one", options.directory.display());
    assert_eq!(check(changed), (0, nobody));
}

#[test]
fn credentials_are_values_of_keys() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ringtail_forward.kafka.client.id");
    std::fs::write(&file, "secret-17\n").unwrap();
    std::fs::write(directory.path().join("other"), "for somebody else").unwrap();
    let show = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ringtail"));
        command.args(arguments).env("CREDENTIALS_DIRECTORY", directory.path());
        command.output().unwrap()
    };
    let shown = String::from_utf8(show(&["config", "show"]).stdout).unwrap();
    let line = shown.lines().find(|line| line.contains("client.id")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.contains("\"secret-17\"") && line.contains("# credential "), "{line}");
    std::fs::rename(&file, directory.path().join("ringtail_forward.broker")).unwrap();
    let check = show(&["config", "check"]);
    assert_eq!(check.status.code(), Some(64));
    let problem = String::from_utf8(check.stderr).unwrap();
    assert!(problem.contains("nearest known key is forward.brokers"), "{problem}");
}
