//! The dashboard and the alert rules speak of metrics that the binary really has, and the runbook of every alert.

#[path = "support/process.rs"]
mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use process::{Options, Process};
use serde_json::Value;

const DASHBOARD: &str = include_str!("../config/grafana/ringtail.json");
const ALERTS: &str = include_str!("../config/prometheus/alerts.yml");
const ALERTS_TEST: &str = include_str!("../config/prometheus/alerts_test.yml");
const README: &str = include_str!("../README.md");

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// The names of all samples that a service exposes that nobody has talked to yet: what is missing before the first event
/// could not be alerted on.
fn exposed() -> BTreeSet<String> {
    let directory = tempfile::tempdir().unwrap();
    let (process, addresses) = Process::start(&Options::small(directory.path()));
    let metrics = get(addresses.admin, "/metrics");
    drop(process);
    let samples = metrics.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    samples.map(|line| line.split(['{', ' ']).next().unwrap().to_owned()).collect()
}

/// Names in `text` that are ours, those of recording rules (`level:metric:operation`) included.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_' && letter != ':');
    let words = words.map(|word| word.trim_matches(':'));
    words.filter(|word| word.contains("ringtail_") || word.starts_with("process_")).collect()
}

fn panels(dashboard: &Value) -> &Vec<Value> {
    dashboard["panels"].as_array().unwrap()
}

fn queries(panel: &Value) -> Vec<&str> {
    let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
    targets.iter().map(|target| target["expr"].as_str().unwrap()).collect()
}

#[test]
fn every_metric_asked_for_is_exposed() {
    let exposed = exposed();
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let recorded: BTreeSet<&str> =
        ALERTS.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).map(str::trim).collect();

    let mut asked = BTreeMap::new();
    let everything = serde_json::to_string(&dashboard).unwrap();
    for (place, text) in
        [("ringtail.json", everything.as_str()), ("alerts.yml", ALERTS), ("alerts_test.yml", ALERTS_TEST)]
    {
        let rules: String =
            text.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n");
        for name in names(&rules) {
            asked.insert(name.to_owned(), place);
        }
    }
    assert!(asked.len() > 20, "{asked:?}");
    for (name, place) in &asked {
        assert!(exposed.contains(name) || recorded.contains(name.as_str()), "{place} asks for {name}: {exposed:#?}");
    }
    // A dashboard works without the rules.
    assert!(names(&everything).iter().all(|name| !name.contains(':')));
    // And every metric is on the dashboard.
    let base = |name: &str| {
        let name = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        name.to_owned()
    };
    let shown: BTreeSet<String> = names(&everything).into_iter().map(base).collect();
    let missing: Vec<_> = exposed.iter().map(|name| base(name)).filter(|name| !shown.contains(name)).collect();
    // In batches the same picture as in events.
    let passed_over = ["ringtail_ingest_received_batches_total", "ringtail_wal_pending_batches"];
    assert!(missing.iter().all(|name| passed_over.contains(&name.as_str())), "not on the dashboard: {missing:?}");
}

#[test]
fn the_dashboard_follows_a_batch() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    assert!(dashboard["id"].is_null() && dashboard["uid"] == "ringtail", "or it cannot be imported");
    let rows: Vec<_> = panels(&dashboard).iter().filter(|panel| panel["type"] == "row").collect();
    let titles: Vec<_> = rows.iter().map(|row| row["title"].as_str().unwrap()).collect();
    assert_eq!(titles, ["Now", "1 · Clients", "2 · Log", "3 · Kafka"]);

    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels(&dashboard) {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: the id is taken");
        let place = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{title}");
        for (x, y) in (0..place("w")).flat_map(|x| (0..place("h")).map(move |y| (x, y))) {
            assert!(taken.insert((place("x") + x, place("y") + y)), "{title} lies on another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(!queries(panel).is_empty(), "{title} asks nothing");
        assert!(!panel["description"].as_str().unwrap().is_empty(), "{title}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title}");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        for query in queries(panel) {
            // Each selector follows the variables.
            let selectors = query.matches("{job=~\"$job\",instance=~\"$instance\"").count();
            assert_eq!(selectors, query.matches("ringtail_").count() + query.matches("process_").count(), "{query}");
        }
    }
}

#[test]
fn every_alert_has_its_words_and_its_place_in_the_runbook() {
    let alerts: Vec<&str> = ALERTS.split("- alert: ").skip(1).collect();
    assert_eq!(alerts.len(), 12);
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        for part in ["severity: ", "summary: ", "description: "] {
            assert!(alert.contains(part), "{name} has no {part}");
        }
        let anchor = name.to_lowercase();
        assert!(alert.contains(&format!("runbook: \"README.md#{anchor}\"")), "{name}");
        assert!(README.contains(&format!("<a id=\"{anchor}\"></a>`{name}`")), "{name} is not in the runbook");
        assert!(ALERTS_TEST.contains(&format!("alertname: {name}\n")), "{name} is not tested");
    }
}
