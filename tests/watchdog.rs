//! One thread of the service is frozen, and nothing else: the watchdog is not fed until it goes on. A real systemd, which then
//! starts the service again, is in `systemd.rs`.

#[path = "support/http.rs"]
mod http;
#[path = "support/process.rs"]
mod process;
#[path = "support/supervisor.rs"]
mod supervisor;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use http::{get, wait_until};
use process::{Options, Process};
use supervisor::Supervisor;

const INTERVAL: Duration = Duration::from_secs(4);
const FED: &str = "WATCHDOG=1";

/// The service with a watchdog, and a file that freezes a thread.
struct Watched {
    process: Process,
    admin: SocketAddr,
    http: SocketAddr,
    supervisor: Supervisor,
    directory: tempfile::TempDir,
}

/// A service whose thread is frozen at `point` while there is a file `freeze`.
fn options(point: &str, directory: &Path, supervisor: &Supervisor) -> Options {
    let mut options = Options::small(&directory.join("wal"));
    options.environment = vec![
        supervisor.environment(),
        ("WATCHDOG_USEC".into(), INTERVAL.as_micros().to_string()),
        ("FREEZE_POINT".into(), format!("{point}:{}", directory.join("freeze").display())),
    ];
    options
}

/// A client with one batch. It ends when the batch is acked.
fn client(directory: &Path, http: SocketAddr) -> Child {
    let lines = directory.join("lines");
    fs::write(&lines, "an event\n").unwrap();
    let mut send = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    send.args(["send", "--id", "client", "--type", "t", "--url", &format!("http://{http}")]).arg(lines);
    send.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

impl Watched {
    fn start(point: &str) -> Watched {
        let directory = tempfile::tempdir().unwrap();
        let supervisor = Supervisor::new(directory.path());
        let options = options(point, directory.path(), &supervisor);
        let (process, addresses) = Process::start(&options);
        Watched { process, admin: addresses.admin, http: addresses.http, supervisor, directory }
    }

    fn freeze(&self) {
        fs::write(self.directory.path().join("freeze"), "").unwrap();
    }

    fn thaw(&self) {
        fs::remove_file(self.directory.path().join("freeze")).unwrap();
    }

    /// It is not fed while `reason` holds, and it is again afterwards.
    async fn assert_watched(mut self, reason: &str) {
        wait_until("it is not live", || get(self.admin, "/livez").1 == reason).await;
        self.supervisor.read_all();
        let until = Instant::now() + INTERVAL;
        while Instant::now() < until {
            // A line of status comes every second, so that this does not wait for long.
            let told = self.supervisor.wait_for("");
            assert!(!told.concat().contains(FED), "{told:?}");
        }
        assert_eq!(get(self.admin, "/livez").1, reason);
        self.thaw();
        self.supervisor.wait_for(FED);
        assert!(self.process.stop().success());
        let log = self.process.log_end();
        assert!(log.contains("no progress, the watchdog is not fed") && log.contains("making progress again"), "{log}");
    }
}

#[tokio::test]
async fn a_frozen_forward_thread_leaves_the_watchdog_hungry() {
    let watched = Watched::start("forward.turn");
    watched.supervisor.wait_for(FED);
    watched.freeze();
    watched.assert_watched("the forward loop makes no progress\n").await;
}

/// In the middle of a commit; and while it should begin one, which nothing but the batch that waits tells.
#[tokio::test]
async fn a_frozen_commit_thread_leaves_the_watchdog_hungry() {
    for point in ["commit.written", "commit.turn"] {
        let watched = Watched::start(point);
        watched.freeze();
        // Without batches it has nothing to do, and that is no standstill.
        watched.supervisor.wait_for(FED);
        let mut client = client(watched.directory.path(), watched.http);
        watched.assert_watched("a commit makes no progress\n").await;
        assert!(client.wait().unwrap().success(), "its batch is acked once the thread goes on");
    }
}

/// Also where nobody watches it.
#[tokio::test]
async fn a_commit_that_never_ends_ends_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let freeze = directory.path().join("freeze");
    fs::write(&freeze, "").unwrap();
    let mut options = Options::small(&directory.path().join("wal"));
    options.environment = vec![("FREEZE_POINT".into(), format!("commit.written:{}", freeze.display()))];
    let (mut process, addresses) = Process::start(&options);
    let mut client = client(directory.path(), addresses.http);
    assert_eq!(process.wait_for_end().code(), Some(1));
    let complaints = process.complaints();
    assert!(complaints.iter().any(|line| line.contains("a commit has made no progress")), "{complaints:?}");
    client.kill().unwrap();
    client.wait().unwrap();
}

#[tokio::test]
async fn a_log_that_takes_long_to_open_is_told_of_and_can_be_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let supervisor = Supervisor::new(directory.path());
    let options = options("recover.cursor_loaded", directory.path(), &supervisor);
    let freeze = directory.path().join("freeze");
    fs::write(&freeze, "").unwrap();
    let mut process = Process::spawn(&options);
    let told = supervisor.wait_for("EXTEND_TIMEOUT_USEC=60000000").concat();
    assert!(told.contains("STATUS=opening the log"), "{told}");
    wait_until("it listens", || process.log_end().contains("listening")).await;
    let log = process.log_end();
    let admin = log.split_whitespace().find_map(|word| word.strip_prefix("admin=")).unwrap().parse().unwrap();
    assert_eq!(get(admin, "/readyz"), (503, "starting\n".into()));
    assert_eq!(get(admin, "/livez").0, 200);
    assert_eq!(get(admin, "/metrics").0, 503);
    let status = http::status(admin);
    assert_eq!((&status["phase"], &status["wal"]), (&"starting".into(), &serde_json::Value::Null));
    assert!(get(admin, "/").1.contains("<html"));
    assert!(process.stop().success(), "it does not wait for the log");
    supervisor.wait_for("STOPPING=1");

    let mut process = Process::spawn(&options);
    supervisor.wait_for("STATUS=opening the log");
    fs::remove_file(freeze).unwrap();
    process.wait_until_ready();
    supervisor.wait_for("READY=1");
    assert!(process.stop().success());
}
