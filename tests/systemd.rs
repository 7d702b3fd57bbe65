//! The Debian package on a real systemd, in a container made of this machine's own files: installed, restarted under load,
//! killed, frozen, crashing again and again, reloaded, upgraded with a backlog, rebooted, removed, purged.
//!
//! Needs root, systemd-nspawn, nsenter and dpkg-deb. The package is made from the metadata that `cargo deb` reads, around the
//! binary of the tests. `RINGTAIL_DEB` names one to take instead; what needs the points of a test build
//! (`src/kill_point.rs`) is then left out. Only processes that the test started are signalled.

#[path = "support/container.rs"]
mod container;
#[path = "support/deb.rs"]
mod deb;

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use container::Container;
use serde_json::{Value, json};

const README: &str = include_str!("../README.md");
const RESTARTS: usize = 10;
const LINES: usize = 2000;
/// Starts of a service that always crashes. systemd's own limit would be 5 in 10 seconds.
const CRASHES: u32 = 6;
/// `RestartSec=`
const PAUSE: Duration = Duration::from_secs(2);
/// Freezes a thread of a test build.
const FREEZE: &str = "/var/lib/ringtail/freeze";

/// Clients inside the container, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    connected: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// A client of each protocol that sends, by the binary itself; one that connects to every port all the time, and counts
    /// refusals.
    fn start(container: &Arc<Container>) -> Load {
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (refused, connected) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let senders = ["ws://127.0.0.1:8080", "http://127.0.0.1:8080", "grpc://127.0.0.1:8081"].map(|url| {
            let (container, stop, acked) = (container.clone(), stop.clone(), acked.clone());
            let send = format!("ringtail send --url {url} --id load-{} --type load /root/lines", &url[..2]);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Gone with the container, if the test failed meanwhile.
                    let (succeeded, output) = container.try_run(&send);
                    assert!(succeeded || stop.load(Ordering::Relaxed), "{output}");
                    acked.fetch_add(if succeeded { LINES as u64 } else { 0 }, Ordering::Relaxed);
                }
            })
        });
        let prober = {
            let (container, stop) = (container.clone(), stop.clone());
            let (refused, connected) = (refused.clone(), connected.clone());
            std::thread::spawn(move || {
                container.enter_network();
                while !stop.load(Ordering::Relaxed) {
                    for port in [8080, 8081, 9464] {
                        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                            Ok(_) => connected.fetch_add(1, Ordering::Relaxed),
                            Err(_) => refused.fetch_add(1, Ordering::Relaxed),
                        };
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
        };
        Load { stop, acked, refused, connected, threads: senders.into_iter().chain([prober]).collect() }
    }

    /// Ends it. Events acked, connections made, connections refused.
    fn stop(mut self) -> (u64, u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().expect("a client does not panic"));
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (count(&self.acked), count(&self.connected), count(&self.refused))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // They hold the container.
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// The package, installed in a container.
struct Host {
    container: Arc<Container>,
    began: Instant,
}

impl Host {
    fn say(&self, what: impl std::fmt::Display) {
        eprintln!("{:5.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    fn run(&self, command: &str) -> String {
        self.container.run(command)
    }

    fn property(&self, name: &str) -> String {
        self.run(&format!("systemctl show --value -p {name} ringtail.service")).trim().to_owned()
    }

    fn status(&self) -> Value {
        let answer = self.container.get(SocketAddr::from((Ipv4Addr::LOCALHOST, 9464)), "/status");
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    fn wait_for(&self, what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !holds() {
            if Instant::now() > deadline {
                eprintln!("{}", self.container.try_run("journalctl -u ringtail --no-pager -n 60").1);
                panic!("waited a minute for {what}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Restarts it with more in its unit.
    fn restart_with(&self, lines: &str) -> bool {
        self.run("mkdir -p /run/systemd/system/ringtail.service.d");
        self.run(&format!("printf '[Service]\\n{lines}' > /run/systemd/system/ringtail.service.d/test.conf"));
        self.run("systemctl daemon-reload");
        self.container.try_run("systemctl restart ringtail.service").0
    }

    /// The unit is as the package has it, from the next start on.
    fn restore_unit(&self) {
        self.run("rm -r /run/systemd/system/ringtail.service.d");
        self.run("systemctl daemon-reload");
    }

    /// Waits until systemd has started another process than `pid`.
    fn wait_for_another(&self, pid: &str) {
        self.wait_for("another process", || ![pid, "0"].contains(&self.property("MainPID").as_str()));
    }

    fn wait_until_active(&self) {
        self.wait_for("the service is active", || self.property("ActiveState") == "active");
    }

    fn pending(&self) -> u64 {
        self.status()["wal"]["pending_events"].as_u64().unwrap()
    }
}

#[test]
fn the_package_lives_on_a_real_systemd() {
    let work = tempfile::Builder::new().prefix("ringtail-systemd-").tempdir_in("/tmp").unwrap();
    let began = Instant::now();
    let given = std::env::var_os("RINGTAIL_DEB").map(PathBuf::from);
    let is_test_build = given.is_none();
    let [first, second] = ["0.1.0", "0.1.1"].map(|version| match &given {
        Some(package) => deb::renumber(package, work.path(), version),
        None => deb::build(work.path(), version),
    });
    let container = Arc::new(Container::boot(work.path(), |root| {
        for (from, to) in [(&first, "first.deb"), (&second, "second.deb")] {
            std::fs::copy(from, root.join("root").join(to)).unwrap();
        }
        let lines: String = (0..LINES).map(|number| format!("event {number}\n")).collect();
        std::fs::write(root.join("root/lines"), lines).unwrap();
        // Images for containers forbid packages to start services.
        let _ = std::fs::remove_file(root.join("usr/sbin/policy-rc.d"));
    }));
    let mut host = Host { container, began };
    host.say("systemd is up");

    install(&host);
    let load = Load::start(&host.container);
    restart_under_load(&host, &load);
    kill(&host);
    reload(&host);
    freeze(&host, is_test_build);
    if is_test_build {
        crash(&host);
    }
    upgrade(&host);
    let (acked, connected, refused) = load.stop();
    host.say(format!("{acked} events acked, {connected} connections made, {refused} refused"));
    assert_eq!(refused, 0, "of {connected} connections");
    // A frozen process is killed, and a batch that is sent again is known again: the books are exact.
    assert_eq!(host.pending(), acked, "events in the log");

    reboot(&mut host);
    stop(&host);
    upgrade_what_failed(&host);
    remove_and_purge(&host);
    install_by_hand(&host);
}

fn install(host: &Host) {
    host.run("dpkg --no-triggers -i /root/first.deb");
    host.wait_until_active();
    host.say(format!("installed, started: {}", host.property("StatusText")));
    assert_eq!(host.property("UnitFileState"), "enabled");
    host.run("systemctl stop ringtail.service");
    let before = Instant::now();
    host.run("systemctl start ringtail.service");
    host.say(format!("from `systemctl start` to ready: {:?}", before.elapsed()));
    assert!(host.property("StatusText").starts_with("accepting batches"), "{}", host.property("StatusText"));
    assert_eq!(host.run("stat -c '%U %a' /var/lib/ringtail").trim(), "ringtail 700");
    assert_eq!(host.run("stat -c '%U %a' /etc/ringtail/credentials").trim(), "root 700");
    let score = host.run("systemd-analyze security --no-pager ringtail.service");
    let score = score.lines().last().unwrap_or_default();
    host.say(score);
    host.run("systemd-analyze security --no-pager --threshold=15 ringtail.service");
    // Without a word: whatever systemd here does not know would be named in every journal.
    let verified = host.run("systemd-analyze verify --man=no ringtail.service ringtail.socket 2>&1");
    let about_it: Vec<&str> = verified.lines().filter(|line| line.contains("ringtail")).collect();
    assert!(about_it.is_empty(), "{verified}");
    for file in ["man/man1/ringtail-serve.1", "bash-completion/completions/ringtail", "doc/ringtail/copyright"] {
        host.run(&format!("ls /usr/share/{file}*"));
    }
    let top = host.run("ringtail top --once");
    assert!(top.contains("Kafka") && top.contains("q ends"), "{top}");
    let memory = host.run(&format!("grep -E 'VmRSS|RssAnon' /proc/{}/status", host.property("MainPID")));
    host.say(format!("a moment after the start: {}", memory.split_whitespace().collect::<Vec<_>>().join(" ")));
}

fn restart_under_load(host: &Host, load: &Load) {
    let mut ready = Vec::new();
    for _ in 0..RESTARTS {
        let before = Instant::now();
        host.run("systemctl restart ringtail.service");
        ready.push(before.elapsed());
        let pending = host.pending();
        host.wait_for("more events", || host.pending() > pending);
        host.say(format!("restarted in {:?}, took batches after {:?}", ready.last().unwrap(), before.elapsed()));
    }
    let longest = ready.iter().max().unwrap();
    let refused = load.refused.load(Ordering::Relaxed);
    host.say(format!("{RESTARTS} restarts, the longest {longest:?}, {refused} connections refused"));
    assert_eq!(refused, 0);
    // Lines have their priority: Kafka is not there, which is a warning.
    host.wait_for("a warning in the journal", || {
        host.run("journalctl -u ringtail -p warning --no-pager").contains("kafka lost")
    });
    assert!(!host.run("journalctl -u ringtail -p warning --no-pager").contains("INFO"));
}

fn kill(host: &Host) {
    let pid = host.property("MainPID");
    host.run(&format!("kill -9 {pid}"));
    host.wait_for_another(&pid);
    host.wait_until_active();
    assert_eq!(host.property("NRestarts"), "1");
    host.say("kill -9: restarted");
}

fn reload(host: &Host) {
    host.run("sed -i 's/^connections_max = .*/connections_max = 123/; s/^bytes_max = .8GiB./bytes_max = \"7GiB\"/' /etc/ringtail/ringtail.toml");
    host.run("sh -c 'printf wrong > /etc/ringtail/credentials/forward.kafka.client.id'");
    let foretold = host.run("ringtail config check 2>&1");
    let expected = "a reload changes ingest.connections_max; only its next start changes wal.bytes_max";
    assert!(foretold.contains(expected), "{foretold}");
    let foretold: Value = serde_json::from_str(&host.run("ringtail config check --json")).unwrap();
    let expected = json!({"reload": "taken", "live": ["ingest.connections_max"], "restart": ["wal.bytes_max"]});
    assert!(expected.as_object().unwrap().iter().all(|(key, value)| foretold["service"][key] == *value), "{foretold}");
    let pid = host.property("MainPID");
    let (succeeded, output) = host.container.try_run("systemctl reload ringtail.service");
    assert!(succeeded, "{output}{}", host.run("journalctl -u ringtail --no-pager -n 20"));
    host.wait_for("the reload", || !host.status()["reload"].is_null());
    let status = host.status();
    assert_eq!(status["reload"]["changed"][0], "ingest.connections_max", "{}", status["reload"]);
    assert_eq!(status["reload"]["restart"][0], "wal.bytes_max", "{}", status["reload"]);
    assert_eq!(status["limits"]["connections_max"], 123);
    let logged = host.run("journalctl -u ringtail --no-pager");
    assert!(logged.contains("a reload changes ingest.connections_max"), "{logged}");
    host.say(format!("reloaded: {}", status["reload"]));

    host.run("cp /etc/ringtail/ringtail.toml /root/good.toml");
    host.run("sh -c 'echo nonsense = 1 >> /etc/ringtail/ringtail.toml'");
    let (succeeded, _) = host.container.try_run("systemctl reload ringtail.service");
    assert!(!succeeded, "an invalid file is refused");
    host.run("rm /etc/ringtail/ringtail.toml");
    let (succeeded, _) = host.container.try_run("systemctl reload ringtail.service");
    assert!(!succeeded, "the built-in values do not take the place of a file that is gone");
    host.run("cp /root/good.toml /etc/ringtail/ringtail.toml");
    assert_eq!(host.property("ActiveState"), "active");
    assert_eq!(host.property("MainPID"), pid, "it is the same process all the time");
    // As the README has it, for a backlog that is to be drained without the service.
    let drain = README.split_once("systemd-run --pty ").and_then(|(_, rest)| rest.split_once("\\\n")).unwrap().0;
    let shown = host.run(&format!("systemd-run --quiet --pipe --wait {drain} ringtail config show"));
    assert!(shown.contains("credential /run/credentials/"), "{shown}");
    // The credential counts from the next start on.
    host.run("systemctl restart ringtail.service");
    let environment = host.run(&format!("cat /proc/{}/environ", host.property("MainPID")));
    assert!(environment.contains("CREDENTIALS_DIRECTORY="), "{environment}");
}

/// The whole process, and each thread whose progress feeds the watchdog alone.
fn freeze(host: &Host, is_test_build: bool) {
    assert!(host.restart_with("WatchdogSec=3\n"));
    let pid = host.property("MainPID");
    host.run(&format!("kill -STOP {pid}"));
    host.wait_for_another(&pid);
    host.say("process frozen: restarted by the watchdog");
    let points: &[&str] = if is_test_build { &["commit.written", "forward.turn"] } else { &[] };
    for point in points {
        assert!(host.restart_with(&format!("WatchdogSec=3\nEnvironment=FREEZE_POINT={point}:{FREEZE}\n")));
        let pid = host.property("MainPID");
        host.run(&format!("touch {FREEZE}"));
        host.wait_for_another(&pid);
        host.run(&format!("rm {FREEZE}"));
        host.wait_until_active();
        host.say(format!("thread frozen at {point}: restarted by the watchdog"));
    }
    let log = host.run("journalctl -u ringtail --no-pager");
    assert_eq!(log.matches("Watchdog timeout").count(), 1 + points.len(), "{log}");
    assert_eq!(log.matches("the watchdog is not fed").count(), points.len(), "{log}");
    host.restore_unit();
    host.run("systemctl restart ringtail.service");
}

/// A service that crashes at each start is started for ever, with a pause before each.
fn crash(host: &Host) {
    let began = Instant::now();
    assert!(!host.restart_with("Environment=KILL_POINT=recover.end:1\n"), "it does not get ready");
    let crashes = || host.property("NRestarts").parse::<u32>().unwrap();
    host.wait_for("crashes", || crashes() >= CRASHES);
    let took = began.elapsed();
    assert!(took >= PAUSE * CRASHES, "{CRASHES} crashes within {took:?}");
    assert_eq!(host.property("ActiveState"), "activating");
    host.say(format!("crashed {CRASHES} times in {took:?}, and is started again"));
    host.restore_unit();
    host.wait_until_active();
    host.say("mended: started without anybody's help");
}

fn upgrade(host: &Host) {
    let before = host.pending();
    assert!(before > 0);
    let pid = host.property("MainPID");
    host.run("dpkg --no-triggers -i /root/second.deb");
    host.wait_until_active();
    assert_ne!(host.property("MainPID"), pid, "it was restarted");
    assert!(host.run("dpkg -s ringtail").contains("Version: 0.1.1"));
    assert!(host.run("cat /etc/ringtail/ringtail.toml").contains("connections_max = 123"), "an edited file is kept");
    assert!(host.pending() >= before);
    host.say(format!("upgraded with a backlog of {before} events"));
}

/// What gave up on a bad configuration starts with the next package, if that is mended.
fn upgrade_what_failed(host: &Host) {
    host.run("mv /etc/ringtail/ringtail.toml /root/mended.toml");
    host.run("sh -c 'echo nonsense = 1 > /etc/ringtail/ringtail.toml'");
    assert!(!host.container.try_run("systemctl restart ringtail.service").0);
    host.wait_for("it to give up", || host.property("ActiveState") == "failed");
    assert_eq!(host.property("ExecMainStatus"), "64");
    host.run("mv /root/mended.toml /etc/ringtail/ringtail.toml");
    host.run("dpkg --no-triggers -i /root/first.deb");
    host.wait_until_active();
    host.say("gave up on a bad configuration, and started with the next package");
}

/// The whole host: the backlog is there again, and nobody had to start anything.
fn reboot(host: &mut Host) {
    let (pending, boot) = (host.pending(), host.run("cut -d' ' -f22 /proc/1/stat"));
    let before = Instant::now();
    Arc::get_mut(&mut host.container).expect("no client is left").reboot();
    let took = before.elapsed();
    host.wait_until_active();
    assert_ne!(host.run("cut -d' ' -f22 /proc/1/stat"), boot, "it is another process 1");
    assert_eq!(host.property("NRestarts"), "0");
    assert_eq!(host.pending(), pending, "events in the log");
    host.say(format!("rebooted in {took:?} with a backlog of {pending} events: {}", host.property("StatusText")));
}

fn stop(host: &Host) {
    host.run("systemctl stop ringtail.service");
    let refused = host.container.try_run("ringtail top --once");
    assert!(!refused.0, "a stop is a stop: {}", refused.1);
    host.run("systemctl start ringtail.service");
    host.say(format!("stopped and started: {}", host.property("StatusText")));
}

fn remove_and_purge(host: &Host) {
    let pending = host.pending();
    host.run("systemctl stop ringtail.service");
    host.run("dpkg --no-triggers -i /root/second.deb");
    assert_eq!(host.property("ActiveState"), "inactive", "one that was stopped stays stopped");
    host.run("dpkg --no-triggers -r ringtail");
    assert_eq!(host.container.try_run("systemctl is-active ringtail.service").1.trim(), "inactive");
    assert!(!host.container.root().join("usr/bin/ringtail").exists());
    host.run("ls /etc/ringtail/ringtail.toml /var/lib/ringtail/wal");
    host.run("dpkg --no-triggers -i /root/second.deb");
    host.wait_until_active();
    assert_eq!(host.pending(), pending, "what was not delivered survives a removal");
    host.run("dpkg --no-triggers --purge ringtail");
    for path in ["etc/ringtail", "var/lib/ringtail", "usr/lib/systemd/system/ringtail.service", "usr/bin/ringtail"] {
        assert!(!exists(&host.container, path), "/{path} is left");
    }
    let links = host.run("find /etc/systemd/system /var/lib/systemd/deb-systemd-helper-enabled -name 'ringtail*'");
    assert_eq!(links.trim(), "");
    assert_eq!(host.property("LoadState"), "not-found");
    host.say("removed, installed again, purged");
}

/// As the README has it for other distributions, with the package's binary as the one that was built.
fn install_by_hand(host: &Host) {
    let readme = include_str!("../README.md");
    let (_, elsewhere) = readme.split_once("**Elsewhere**").unwrap();
    let (_, block) = elsewhere.split_once("```sh\n").unwrap();
    let (script, _) = block.split_once("```").unwrap();
    let script = script.replace(
        "cargo build --release",
        "dpkg-deb -x /root/second.deb built && install -D built/usr/bin/ringtail target/release/ringtail",
    );
    let source = host.container.root().join("root/source");
    std::fs::create_dir_all(source.join("systemd")).unwrap();
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd")).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), source.join("systemd").join(file.file_name())).unwrap();
        }
    }
    std::fs::write(source.join("install.sh"), script).unwrap();
    host.run("cd /root/source && EDITOR=true bash -e install.sh");
    host.wait_until_active();
    assert_eq!(host.property("FragmentPath"), "/etc/systemd/system/ringtail.service");
    assert_eq!(host.property("UnitFileState"), "enabled");
    for file in ["local/share/man/man1/ringtail-serve.1", "share/bash-completion/completions/ringtail"] {
        host.run(&format!("ls /usr/{file}"));
    }
    host.say("installed by hand");
}

fn exists(container: &Container, path: &str) -> bool {
    Path::new(&container.root()).join(path).symlink_metadata().is_ok()
}
