//! The binary as a child of the test: started on a directory, awaited by its `ready` line, killed or stopped.
//!
//! A process ends with its test: [`Process`] kills it when it is dropped, also by a panic, and then shows the end of its
//! log. Only the child's own process id is ever signalled.

#![allow(dead_code, reason = "each test uses its own part")]

#[path = "turns.rs"]
pub mod turns;

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest that the process may take to become ready, or to stop.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of its log that are kept.
const LOG_LINES_MAX: usize = 60;

/// How the binary is to be started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `wal.directory`
    pub directory: PathBuf,
    /// `forward.brokers`; empty: collect only.
    pub brokers: Vec<String>,
    /// More keys, as TOML with dotted keys: `wal.segment_bytes = "8MiB"`.
    pub settings: Vec<String>,
    /// A command, with its arguments, that runs the binary: it must become the binary's process, or keep its id.
    pub wrapper: Vec<String>,
    /// Environment variables for it.
    pub environment: Vec<(String, String)>,
}

/// Where a ready process listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// WebSocket and REST.
    pub http: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
    /// Metrics, health, status.
    pub admin: SocketAddr,
}

/// A running `ringtail serve`.
pub struct Process {
    child: Option<Child>,
    ready: Receiver<Addresses>,
    log: Arc<Mutex<VecDeque<String>>>,
    /// Reads the log to its end.
    drain: Option<JoinHandle<()>>,
    /// Holds the configuration.
    _directory: TempDir,
}

impl Process {
    /// Starts the process and waits until it is ready.
    pub fn start(options: &Options) -> (Process, Addresses) {
        let mut process = Process::spawn(options);
        let addresses = process.wait_until_ready();
        (process, addresses)
    }

    /// Starts the process and returns at once.
    pub fn spawn(options: &Options) -> Process {
        let directory = tempfile::Builder::new().prefix("ringtail-process-").tempdir().expect("make a directory");
        let config = directory.path().join("ringtail.toml");
        std::fs::write(&config, options.toml()).expect("write the configuration");
        let mut child = turns::spawn(&mut options.command(&config)).expect("start the binary");
        let stderr = child.stderr.take().expect("stderr is piped");
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let (ready_sender, ready) = channel();
        let lines = log.clone();
        let drain = move || {
            drain(stderr, &lines, &|addresses| {
                let _ = ready_sender.send(addresses);
            })
        };
        let thread = std::thread::Builder::new().name("ringtail-log".into());
        let drain = Some(thread.spawn(drain).expect("the system has room for a thread"));
        Process { child: Some(child), ready, log, drain, _directory: directory }
    }

    /// Waits for the `ready` line.
    pub fn wait_until_ready(&mut self) -> Addresses {
        // The sender goes when the process closes its stderr, so an early end is noticed at once.
        self.ready.recv_timeout(PATIENCE).expect("the process becomes ready")
    }

    /// Waits for the `ready` line, or the end of the process before that.
    pub fn wait_until_ready_or_ended(&mut self) -> Option<Addresses> {
        match self.ready.recv_timeout(PATIENCE) {
            Ok(addresses) => Some(addresses),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the process neither becomes ready nor ends"),
        }
    }

    /// Waits for an end by SIGKILL that nobody here has sent. False: it still runs after all patience.
    pub fn wait_for_own_kill(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        // The pipe of its log breaks when it ends.
        let deadline = Instant::now() + PATIENCE;
        while !self.drain.as_ref().expect("it is joined once").is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.child.as_mut().expect("the process was ended").wait().expect("wait for the process");
        assert_eq!(status.signal(), Some(libc::SIGKILL), "the process ended by itself: {status}");
        self.child = None;
        true
    }

    /// Its configuration file, which a reload reads again.
    pub fn configuration(&self) -> PathBuf {
        self._directory.path().join("ringtail.toml")
    }

    /// Tells it to read its configuration again.
    pub fn hang_up(&self) {
        // SAFETY: kill has no preconditions; the child has not been waited for, so the id is still its own.
        let result = unsafe { libc::kill(self.pid(), libc::SIGHUP) };
        assert_eq!(result, 0, "signal the process: {}", std::io::Error::last_os_error());
    }

    /// Process id; the process must be running.
    pub fn pid(&self) -> i32 {
        let child = self.child.as_ref().expect("the process was ended");
        i32::try_from(child.id()).expect("a process id is an i32")
    }

    /// Ends the process with SIGKILL and waits for its end, which must be by that signal.
    pub fn kill(&mut self) {
        let child = self.child.as_mut().expect("the process was ended");
        child.kill().expect("kill the process");
        self.wait_for_kill();
    }

    /// Ends the process with SIGTERM and waits for its end.
    pub fn stop(&mut self) -> ExitStatus {
        // SAFETY: kill has no preconditions; the child has not been waited for, so the id is still its own.
        let result = unsafe { libc::kill(self.pid(), libc::SIGTERM) };
        assert_eq!(result, 0, "signal the process: {}", std::io::Error::last_os_error());
        self.wait_for_end()
    }

    /// Waits until the process ends by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let child = self.child.as_mut().expect("the process was ended");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("wait for the process") {
                self.child = None;
                return status;
            }
            assert!(Instant::now() < deadline, "the process does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until SIGKILL, sent by somebody else, has ended the process.
    pub fn wait_for_kill(&mut self) {
        use std::os::unix::process::ExitStatusExt;
        let status = self.wait_for_end();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "the process ended by itself: {status}");
    }

    /// Lines of the log of an ended process that say WARN or ERROR, among its last ones.
    pub fn complaints(&mut self) -> Vec<String> {
        assert!(self.child.is_none(), "the process runs");
        if let Some(drain) = self.drain.take() {
            drain.join().expect("reading the log does not panic");
        }
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let complains = |line: &&String| line.contains(" WARN ") || line.contains(" ERROR ");
        lines.iter().filter(complains).cloned().collect()
    }

    /// The last lines of its log.
    pub fn log_end(&self) -> String {
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the log of ringtail ends with:\n{}", self.log_end());
        }
    }
}

impl Options {
    /// Options for a log in `directory` that takes little disk, and no brokers.
    pub fn small(directory: &Path) -> Options {
        let settings = ["wal.segment_bytes = \"8MiB\"", "wal.free_bytes_min = \"0B\""];
        Options { directory: directory.into(), settings: settings.map(String::from).into(), ..Options::default() }
    }

    fn toml(&self) -> String {
        let mut lines = vec![
            // A debug string of plain ASCII is a TOML string.
            format!("wal.directory = {:?}", self.directory.display().to_string()),
            format!("forward.brokers = {:?}", self.brokers),
        ];
        for key in ["ingest.http.listen", "ingest.grpc.listen", "admin.listen"] {
            lines.push(format!("{key} = \"127.0.0.1:0\""));
        }
        lines.extend(self.settings.iter().cloned());
        lines.join("\n") + "\n"
    }

    fn command(&self, config: &Path) -> Command {
        let binary = std::env::var("RINGTAIL_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_ringtail").to_owned());
        let mut words = self.wrapper.iter().chain([&binary]);
        let mut command = Command::new(words.next().expect("there is at least the binary"));
        command.args(words).args(["serve", "--config"]).arg(config);
        // The configuration of whoever runs the tests, and the seed of a test, are none of its business.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RINGTAIL_")) {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }
}

/// Keeps the end of the log, and reports the `ready` line.
fn drain(stderr: ChildStderr, log: &Mutex<VecDeque<String>>, ready: &dyn Fn(Addresses)) {
    for line in BufReader::new(stderr).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line).into_owned();
        if let Some(addresses) = parse_ready(&line) {
            ready(addresses);
        }
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() == LOG_LINES_MAX {
            log.pop_front();
        }
        log.push_back(line);
    }
}

/// `… ready http=127.0.0.1:1 grpc=127.0.0.1:2 admin=127.0.0.1:3`
fn parse_ready(line: &str) -> Option<Addresses> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ready = words.iter().position(|word| *word == "ready")?;
    let address = |name: &str| {
        let value = words[ready..].iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value?.parse().ok()
    };
    Some(Addresses { http: address("http")?, grpc: address("grpc")?, admin: address("admin")? })
}
