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

impl Watched {
    fn start(point: &str) -> Watched {
        let directory = tempfile::tempdir().unwrap();
        let supervisor = Supervisor::new(directory.path());
        let mut options = Options::small(&directory.path().join("wal"));
        let freeze = directory.path().join("freeze");
        options.environment = vec![
            supervisor.environment(),
            ("WATCHDOG_USEC".into(), INTERVAL.as_micros().to_string()),
            ("FREEZE_POINT".into(), format!("{point}:{}", freeze.display())),
        ];
        let (process, addresses) = Process::start(&options);
        Watched { process, admin: addresses.admin, http: addresses.http, supervisor, directory }
    }

    fn freeze(&self) {
        fs::write(self.directory.path().join("freeze"), "").unwrap();
    }

    fn thaw(&self) {
        fs::remove_file(self.directory.path().join("freeze")).unwrap();
    }

    /// A client with one batch. It ends when the batch is acked.
    fn client(&self) -> Child {
        let lines = self.directory.path().join("lines");
        fs::write(&lines, "an event\n").unwrap();
        let mut send = Command::new(env!("CARGO_BIN_EXE_ringtail"));
        send.args(["send", "--id", "client", "--type", "t", "--url", &format!("http://{}", self.http)]).arg(lines);
        send.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
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
        let mut client = watched.client();
        watched.assert_watched("a commit makes no progress\n").await;
        assert!(client.wait().unwrap().success(), "its batch is acked once the thread goes on");
    }
}
