//! A real Prometheus in front of the service. It needs Debian's package `prometheus`, which holds promtool as well.

#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/service.rs"]
mod service;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::mocking::MockCluster;
use ringtail::client::{RetryPolicy, Sender, new_req_guid};
use ringtail::proto::{Event, SendEventRequest};
use serde_json::Value;
use service::turns;
use service::{Scheme, Service};
use tempfile::TempDir;

const RULES: &str = include_str!("../config/prometheus/alerts.yml");
const DASHBOARD: &str = include_str!("../config/grafana/ringtail.json");

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

/// A running Prometheus, killed when dropped.
struct Prometheus {
    directory: TempDir,
    port: u16,
    child: Child,
}

impl Prometheus {
    /// Scrapes one target and evaluates `rules`, both every second.
    fn start(target: &str, rules: &str) -> Prometheus {
        let directory = tempfile::Builder::new().prefix("ringtail-prometheus-").tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [alerts.yml]\nscrape_configs:\n  \
             - job_name: ringtail\n    static_configs: [ {{ targets: [\"{target}\"] }} ]\n"
        );
        fs::write(path("prometheus.yml"), config).unwrap();
        fs::write(path("alerts.yml"), rules).unwrap();
        let port = kafka::free_port();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", path("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", path("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(path("log")).unwrap());
        let child = turns::spawn(&mut command).expect("start prometheus: is it installed?");
        let prometheus = Prometheus { directory, port, child };
        wait_for("Prometheus to be ready", || prometheus.try_get("/-/ready").filter(|answer| answer.contains("eady")));
        prometheus
    }

    fn try_get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer.split_once("\r\n\r\n")?.1.to_owned())
    }

    /// The data of an answer of the API; a refused question fails the test.
    fn ask(&self, path: &str) -> Value {
        let answer = self.try_get(path).expect("Prometheus answers");
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{path}: {answer}"));
        assert_eq!(answer["status"], "success", "{path}: {answer}");
        answer["data"].clone()
    }

    /// The value of the first series of a query, if there is one.
    fn query(&self, query: &str) -> Option<f64> {
        let data = self.ask(&format!("/api/v1/query?query={}", percent_encode(query)));
        data["result"][0]["value"][1].as_str().map(|value| value.parse().unwrap())
    }

    /// The firing alert called `name`.
    fn firing(&self, name: &str) -> Option<Value> {
        let alerts = self.ask("/api/v1/alerts")["alerts"].clone();
        let named = |alert: &&Value| alert["labels"]["alertname"] == name && alert["state"] == "firing";
        alerts.as_array().unwrap().iter().find(named).cloned()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "Prometheus said:\n{}",
                fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
            );
        }
    }
}

fn percent_encode(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(POLL);
    }
}

/// The rules with every `for:` cut to a second; nothing else is changed.
fn impatient(rules: &str) -> String {
    let shorten = |line: &str| match line.split_once("for: ") {
        Some((indent, _)) if indent.trim().is_empty() => format!("{indent}for: 1s\n"),
        _ => format!("{line}\n"),
    };
    rules.lines().map(shorten).collect()
}

fn send(service: &Service, count: usize) {
    let event = Event { event_bytes: vec![7; 100].into(), r#type: "page".into() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let sender = Sender::new(service.ports().options(Scheme::Rest, "prometheus"), RetryPolicy::default());
    runtime.block_on(async {
        for _ in 0..count {
            let request =
                SendEventRequest { req_guid: new_req_guid(), sent_time: None, events: vec![event.clone(); 10] };
            sender.deliver(&request).await.unwrap();
        }
        sender.close().await;
    });
}

#[test]
fn promtool_takes_the_rules_and_their_tests_pass() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/prometheus");
    for arguments in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]] {
        let output = turns::output(Command::new("promtool").args(arguments).current_dir(&directory));
        let output = output.expect("start promtool: is Prometheus installed?");
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "promtool {arguments:?}: {said}");
    }
}

#[test]
fn an_outage_fires_with_the_time_that_is_left_and_resolves() {
    const ALERT: &str = "RingtailKafkaUnreachable";
    const BROKER: i32 = 1;
    let cluster = MockCluster::new(1).unwrap();
    turns::take_down(&cluster, BROKER);
    let quick = "kafka.\"reconnect.backoff.max.ms\" = 250";
    let mut service = Service::start(&cluster.bootstrap_servers(), quick);
    let target = format!("127.0.0.1:{}", service.ports().admin);
    let prometheus = Prometheus::start(&target, &impatient(RULES));

    wait_for("the target to be up", || prometheus.query("up{job=\"ringtail\"}").filter(|up| *up == 1.0));
    let targets = prometheus.ask("/api/v1/targets?state=active")["activeTargets"].clone();
    assert_eq!((targets.as_array().unwrap().len(), &targets[0]["health"]), (1, &"up".into()), "{targets}");

    let firing = wait_for("the alert to fire", || {
        send(&service, 20);
        let predicted = |alert: &Value| {
            let description = alert["annotations"]["description"].as_str().unwrap();
            description.starts_with("At the present rate the disk is full in ")
        };
        prometheus.firing(ALERT).filter(predicted)
    });
    eprintln!("fires: {}", firing["annotations"]);
    assert_eq!(firing["labels"]["severity"], "warning");
    assert_eq!(firing["labels"]["instance"], target.as_str());
    let left = prometheus.query("instance:ringtail_wal_full_seconds:prediction").unwrap();
    assert!(left > 60.0, "{left} seconds");
    // Nothing else is wrong.
    for other in ["RingtailLogFull", "RingtailEventsDropped", "RingtailEventsParked", "RingtailDown", "RingtailAbsent"]
    {
        assert_eq!(prometheus.firing(other), None);
    }

    cluster.broker_up(BROKER).unwrap();
    wait_for("the alert to resolve", || prometheus.firing(ALERT).is_none().then_some(()));
    service.wait_until_drained(PATIENCE);
    let fired = format!("max_over_time(ALERTS{{alertname=\"{ALERT}\", alertstate=\"firing\"}}[5m])");
    assert_eq!(prometheus.query(&fired), Some(1.0), "Prometheus remembers it");
    wait_for("Prometheus to see the empty backlog", || {
        prometheus.query("ringtail_wal_pending_events").filter(|pending| *pending == 0.0)
    });
    assert_dashboard_is_answered(&prometheus);
    assert!(service.stop().success());
}

#[test]
fn a_restart_loop_and_a_dead_service_fire() {
    let mut service = Service::start("127.0.0.1:1", "");
    let prometheus = Prometheus::start(&format!("127.0.0.1:{}", service.ports().admin), &impatient(RULES));
    let starts = || prometheus.query("process_start_time_seconds");
    let mut seen = wait_for("the first scrape", starts);
    for start in 1..=4 {
        assert_eq!(prometheus.firing("RingtailRestartLoop"), None, "after {start} starts");
        service.kill();
        service.restart();
        seen = wait_for("the new process", || starts().filter(|started| *started != seen));
    }
    let firing = wait_for("the alert of the loop", || prometheus.firing("RingtailRestartLoop"));
    let summary = firing["annotations"]["summary"].as_str().unwrap();
    assert!(summary.ends_with(": ringtail was started 4 times within 15 minutes"), "{summary}");
    service.kill();
    wait_for("the alert of the end", || prometheus.firing("RingtailDown"));
}

/// Every question of the dashboard is one that Prometheus takes, and those about a running service have an answer.
fn assert_dashboard_is_answered(prometheus: &Prometheus) {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut asked = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let query = target["expr"].as_str().unwrap();
            let query = query.replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "1m");
            let answer = prometheus.query(&query);
            // Refusals, failures, and the time until a disk that does not fill may be nothing.
            let may_be_none = query.contains("> 0") || query.contains(">= 0");
            assert!(answer.is_some() || may_be_none, "{}: {query} has no answer", panel["title"]);
            asked += 1;
        }
    }
    assert!(asked > 20);
}
