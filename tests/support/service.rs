//! The service as a process of its own, for tests: started, killed, stopped, asked over HTTP.
//!
//! A [`Service`] keeps its ports and its directory over all its lives. `RINGTAIL_BINARY` names another binary to run.

#![allow(dead_code, reason = "each test uses its own part")]

#[path = "turns.rs"]
pub mod turns;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ringtail::client::ClientOptions;
use tempfile::TempDir;

use crate::http;
use crate::kafka::free_port;

/// Longest that the service may take to start or to stop.
const SERVICE_PATIENCE: Duration = Duration::from_secs(60);

/// Longest wait for deliveries: a broker may be away in between.
const DELIVERY_PATIENCE: Duration = Duration::from_secs(180);

/// Lines of a log that are shown when something failed.
const LOG_END_LINES: usize = 40;

/// A protocol's URL scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    WebSocket,
    Rest,
    Grpc,
}

impl Scheme {
    pub const ALL: [Scheme; 3] = [Scheme::WebSocket, Scheme::Rest, Scheme::Grpc];
}

/// Where the service listens.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    pub http: u16,
    pub grpc: u16,
    pub admin: u16,
}

impl Ports {
    /// How a client called `id` connects.
    pub fn options(&self, scheme: Scheme, id: &str) -> ClientOptions {
        let (scheme, port) = match scheme {
            Scheme::WebSocket => ("ws", self.http),
            Scheme::Rest => ("http", self.http),
            Scheme::Grpc => ("grpc", self.grpc),
        };
        let mut options = ClientOptions::new(format!("{scheme}://127.0.0.1:{port}").parse().expect("a URL"), id);
        // Slow is not gone: a batch whose answer was not awaited could be committed after its successor.
        options.answer_timeout = Duration::from_secs(120);
        options
    }
}

/// The names that a service can resolve: files of its own in place of `/etc/hosts` and `/etc/resolv.conf`. Needs root.
pub struct Hosts {
    directory: TempDir,
}

impl Hosts {
    /// No names yet.
    pub fn none() -> Hosts {
        let hosts = Hosts { directory: tempfile::tempdir().expect("make a directory") };
        hosts.set(&[]);
        // Nobody answers there.
        fs::write(hosts.path("resolv.conf"), "nameserver 127.0.0.1\n").expect("write");
        hosts
    }

    /// These names are loopback's from now on, and no others are known.
    pub fn set(&self, names: &[&str]) {
        let lines: String = names.iter().map(|name| format!("127.0.0.1 {name}\n")).collect();
        // In place: the file is mounted.
        fs::write(self.path("hosts"), lines).expect("write");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A command that runs `program` with them, in a mount namespace of its own and as the same process.
    fn command(&self, program: &OsStr) -> Command {
        const SCRIPT: &str =
            "mount --bind \"$1\" /etc/hosts && mount --bind \"$2\" /etc/resolv.conf && shift 2 && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", SCRIPT, "sh"]).args([self.path("hosts"), self.path("resolv.conf")]);
        command.arg(program);
        command
    }
}

/// The service, running or not.
pub struct Service {
    directory: TempDir,
    ports: Ports,
    /// It sees these hosts, and no name server.
    hosts: Option<Hosts>,
    child: Option<Child>,
    /// Where the log of this life begins.
    log_from: usize,
    peak_rss_kib: u64,
}

impl Service {
    /// Starts the service on an empty directory and waits until it is ready. `forward` is more lines for `[forward]`.
    pub fn start(brokers: &str, forward: &str) -> Service {
        Service::start_among(None, brokers, forward)
    }

    /// The same, which can resolve these names only.
    pub fn start_among(hosts: Option<Hosts>, brokers: &str, forward: &str) -> Service {
        let directory = tempfile::Builder::new().prefix("ringtail-service-").tempdir().expect("make a directory");
        let ports = Ports { http: free_port(), grpc: free_port(), admin: free_port() };
        let Ports { http, grpc, admin } = ports;
        let wal = directory.path().join("wal");
        let config = format!(
            "[ingest.http]\nlisten = \"127.0.0.1:{http}\"\n[ingest.grpc]\nlisten = \"127.0.0.1:{grpc}\"\n\
             [admin]\nlisten = \"127.0.0.1:{admin}\"\n[wal]\ndirectory = \"{}\"\n\
             [forward]\nbrokers = [\"{brokers}\"]\n{forward}\n",
            wal.display()
        );
        let mut service = Service { directory, ports, hosts, child: None, log_from: 0, peak_rss_kib: 0 };
        fs::write(service.config_path(), config).expect("write the configuration");
        service.restart();
        service
    }

    /// Starts a killed or stopped service again, on the same directory and ports, and waits until it is ready.
    pub fn restart(&mut self) {
        let command = self.command();
        self.spawn(command);
        let ready = format!(" ready http=127.0.0.1:{} ", self.ports.http);
        self.wait_for("the service to be ready", SERVICE_PATIENCE, |service| {
            let ended = service.child.as_mut().and_then(|child| child.try_wait().expect("wait for the service"));
            assert!(ended.is_none(), "the service ended, {ended:?}");
            service.life_log().contains(&ready)
        });
    }

    /// Loses the spill of a stopped service.
    pub fn remove_spill(&self) {
        assert!(self.child.is_none(), "the service runs");
        fs::remove_dir_all(self.directory.path().join("wal/spill")).expect("remove the spill");
    }

    /// Changes the names that it can resolve.
    pub fn set_hosts(&self, names: &[&str]) {
        self.hosts.as_ref().expect("it has hosts of its own").set(names);
    }

    /// Starts it again, with a binary that has kill points, and returns when it is killed at `point`, as `name:passage`.
    pub fn restart_until_killed_at(&mut self, point: &str) {
        let mut command = self.command();
        command.env("KILL_POINT", point);
        self.spawn(command);
        self.wait_for("the service to be killed", SERVICE_PATIENCE, |service| {
            let child = service.child.as_mut().expect("it was just started");
            child.try_wait().expect("wait for the service").is_some_and(|status| status.signal() == Some(libc::SIGKILL))
        });
        self.child = None;
    }

    fn spawn(&mut self, mut command: Command) {
        assert!(self.child.is_none(), "the service runs");
        self.log_from = self.log().len();
        let log = OpenOptions::new().create(true).append(true).open(self.log_path()).expect("open the log");
        command.arg("serve").arg("--config").arg(self.config_path());
        command.stdin(Stdio::null()).stdout(File::open("/dev/null").expect("open /dev/null")).stderr(log);
        self.child = Some(turns::spawn(&mut command).expect("start the service"));
    }

    /// Where clients connect to.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// A number of the forwarder's status.
    pub fn forward_number(&self, name: &str) -> u64 {
        self.status()["forward"][name].as_u64().expect("a number")
    }

    /// Events that this life of it has delivered.
    pub fn delivered(&self) -> f64 {
        self.metric("ringtail_forward_delivered_events_total", "")
    }

    /// Waits until so many more events are delivered.
    pub fn wait_for_deliveries(&mut self, events: f64) {
        let goal = self.delivered() + events;
        self.wait_for("deliveries", DELIVERY_PATIENCE, |service| service.delivered() >= goal);
    }

    /// Ends the service with SIGKILL.
    pub fn kill(&mut self) {
        self.sample_memory();
        let mut child = self.child.take().expect("the service was stopped");
        child.kill().expect("kill the service");
        child.wait().expect("wait for the service");
    }

    /// Ends the service as systemd does, and gives back how it ended.
    pub fn stop(&mut self) -> ExitStatus {
        self.sample_memory();
        let child = self.child.as_mut().expect("the service was stopped");
        let pid = i32::try_from(child.id()).expect("a process id is an i32");
        // SAFETY: kill has no preconditions; the child has not been waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0, "signal the service");
        let mut status = None;
        self.wait_for("the service to stop", SERVICE_PATIENCE, |service| {
            let child = service.child.as_mut().expect("it was there above");
            status = child.try_wait().expect("wait for the service");
            status.is_some()
        });
        self.child = None;
        status.expect("it was waited for")
    }

    /// Runs another command of the binary with the service's configuration, and gives back what it printed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = turns::output(self.command().args(arguments).arg("--config").arg(self.config_path()));
        let output = output.expect("run ringtail");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("it prints text")
    }

    /// Waits until `condition` holds, or fails with the end of the log.
    pub fn wait_for(&mut self, what: &str, patience: Duration, mut condition: impl FnMut(&mut Service) -> bool) {
        let deadline = Instant::now() + patience;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited {patience:?} for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until everything is delivered or parked.
    pub fn wait_until_drained(&mut self, patience: Duration) {
        self.wait_for("the backlog to drain", patience, |service| service.backlog().0 == 0);
    }

    /// The backlog in events and bytes, by `/status`.
    pub fn backlog(&self) -> (u64, u64) {
        let status = self.status();
        let number = |name: &str| status["wal"][name].as_u64().expect("the status has numbers");
        (number("pending_events"), number("pending_bytes"))
    }

    /// `/status`
    pub fn status(&self) -> serde_json::Value {
        let (code, body) = self.get("/status");
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).expect("the status is JSON")
    }

    /// `/metrics`
    pub fn metrics(&self) -> String {
        let (code, body) = self.get("/metrics");
        assert_eq!(code, 200, "{body}");
        body
    }

    /// The sum over all series of a metric whose labels contain `labels`.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let metrics = self.metrics();
        let series = metrics.lines().filter_map(|line| line.strip_prefix(name));
        let series = series.filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(labels));
        let values = series.map(|rest| rest.rsplit(' ').next().expect("a value").parse::<f64>().expect("a number"));
        let values: Vec<f64> = values.collect();
        assert!(!values.is_empty(), "{name}{{{labels}}} is not there:\n{metrics}");
        values.into_iter().sum()
    }

    /// pending at start + committed = delivered + parked + dropped + pending, in events. Gives back the sum.
    #[track_caller]
    pub fn assert_books_balance(&self) -> f64 {
        let metric = |name: &str| self.metric(name, "");
        let come = self.pending_at_start() + metric("ringtail_wal_committed_events_total");
        let gone = metric("ringtail_forward_delivered_events_total")
            + metric("ringtail_forward_parked_events_total")
            + metric("ringtail_forward_dropped_events_total")
            + metric("ringtail_wal_pending_events");
        assert_eq!(come, gone, "the books balance:\n{}", self.metrics());
        come
    }

    /// The backlog that this life has found, in the log and in the spill, by what it logged.
    fn pending_at_start(&self) -> f64 {
        let log = self.life_log();
        let number = |line: &str, name: &str| -> f64 {
            let line = log.lines().find(|found| found.contains(line)).unwrap_or_default();
            let number = line.split(name).nth(1).and_then(|rest| rest.split(' ').next());
            number.map_or(0.0, |number| number.parse().expect("a number"))
        };
        assert!(log.contains("log opened"), "the log tells");
        number("log opened", " pending_events=") + number("topics go on from the spill", " events=")
    }

    /// The parked events: topic, key and payload.
    pub fn parked(&self) -> Vec<(String, String, Vec<u8>)> {
        let text = self.run(&["parked", "export"]);
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("lines of JSON"));
        let events = lines.map(|event| {
            let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
            (text("topic"), text("key"), STANDARD.decode(text("payload")).expect("base64"))
        });
        events.collect()
    }

    /// A percentile of a histogram, interpolated in its bucket, by how its buckets have grown since `before`.
    pub fn percentile(&self, name: &str, fraction: f64, before: &[(f64, f64)]) -> f64 {
        let buckets = self.buckets(name);
        let grown = |at: usize| buckets[at].1 - before.get(at).map_or(0.0, |(_, count)| *count);
        let all = grown(buckets.len() - 1);
        let at = (0..buckets.len()).find(|at| grown(*at) >= all * fraction).expect("the last one has all");
        let (low, below) = if at == 0 { (0.0, 0.0) } else { (buckets[at - 1].0, grown(at - 1)) };
        let part = (all * fraction - below) / (grown(at) - below).max(1.0);
        low + (buckets[at].0 - low) * part
    }

    /// Upper bounds of a histogram's buckets, and how much was up to each.
    pub fn buckets(&self, name: &str) -> Vec<(f64, f64)> {
        let metrics = self.metrics();
        let lines = metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix("_bucket{le=\""));
        let bucket = |line: &str| {
            let (bound, rest) = line.split_once('"')?;
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
            Some((bound, rest.rsplit(' ').next()?.parse().ok()?))
        };
        lines.filter_map(bucket).collect()
    }

    /// Status code and body of an admin path.
    pub fn get(&self, path: &str) -> (u16, String) {
        http::get((Ipv4Addr::LOCALHOST, self.ports.admin).into(), path)
    }

    /// Takes note of the most memory that this life has used, by the kernel's count.
    pub fn sample_memory(&mut self) {
        let pid = self.child.as_ref().expect("the service was stopped").id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the service runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it uses memory");
        let peak = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        self.peak_rss_kib = self.peak_rss_kib.max(peak);
    }

    /// The most memory that any life has used.
    pub fn peak_rss_kib(&self) -> u64 {
        self.peak_rss_kib
    }

    /// What this life has logged.
    pub fn life_log(&self) -> String {
        self.log().split_off(self.log_from)
    }

    /// Lines that this life has logged and that contain `text`.
    pub fn logged(&self, text: &str) -> usize {
        self.life_log().lines().filter(|line| line.contains(text)).count()
    }

    /// What all lives have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn command(&self) -> Command {
        let binary = std::env::var_os("RINGTAIL_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_ringtail").into());
        let mut command = self.hosts.as_ref().map_or_else(|| Command::new(&binary), |hosts| hosts.command(&binary));
        // They would be taken for configuration.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"RINGTAIL_")) {
            command.env_remove(name);
        }
        command
    }

    fn config_path(&self) -> PathBuf {
        self.directory.path().join("ringtail.toml")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("ringtail.log")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(LOG_END_LINES)..].join("\n");
            eprintln!("the service's log ends with:\n{end}");
        }
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
