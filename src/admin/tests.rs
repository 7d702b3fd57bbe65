use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::{Request, header};
use axum::response::Response;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::config::{Config, FileText};
use crate::forward::parked_tests::{MemoryDb, about};
use crate::forward::{OfflineSpill, ParkedFilter, ParkedStore, Requeue};

const PATIENCE: Duration = Duration::from_secs(30);

struct Fake {
    phase: Phase,
    wal: Option<WalStatus>,
    forward_stands_still: Duration,
    parked: ParkedStore,
    /// What `parked` is in.
    db: Arc<MemoryDb>,
}

impl StatusSource for Fake {
    fn phase(&self) -> Phase {
        self.phase
    }
    fn connections(&self) -> Connections {
        Connections { websocket: 3, rest: 2, grpc: 1 }
    }
    fn limits(&self) -> Limits {
        Limits { connections_max: 100, free_bytes_min: 300 }
    }
    fn foretell_reload(&self, files: &FileTexts) -> Result<Changes, ConfigError> {
        let began = Config::default();
        Ok(began.changes(&Config::load_texts(files, [], &[])?.config, &began))
    }
    fn wal(&self) -> Option<WalStatus> {
        self.wal.clone()
    }
    fn forward(&self) -> Value {
        json!({"connected": false, "last_error": {"message": "<script>alert(1)</script>", "at_ms": 1, "topic": null}})
    }
    fn forward_stands_still(&self) -> Duration {
        self.forward_stands_still
    }
    fn parked_count(&self) -> u64 {
        self.parked.count()
    }
    fn parked_lost(&self) -> u64 {
        7
    }
    fn parked(&self) -> ParkedStore {
        self.parked.clone()
    }

    fn requeue(&self) -> Box<dyn Requeue> {
        Box::new(OfflineSpill::open(std::path::Path::new("/nonexistent")).unwrap())
    }
    fn parked_reasons(&self, from_id: u64) -> ParkedReasons {
        Box::new(self.parked.events(from_id).map(|event| (event.unwrap().id, "expired")))
    }
    fn backlog(&self, payloads: bool) -> Backlog {
        let line = move |number: u64| BatchLine {
            sequence: crate::batch::Sequence(number),
            received_at_ms: 1,
            group: "g".into(),
            connection_id: "c".into(),
            req_guid: "r".into(),
            request_bytes: 9,
            events: vec![EventLine {
                event_type: "t".into(),
                topic: "x-t".into(),
                payload_bytes: 5,
                payload: payloads.then(|| "aGVsbG8=".into()),
            }],
            request: None,
        };
        Box::new((1..=3).map(move |number| Ok(line(number))).chain([Err("the disk failed".into())]))
    }
}

fn fake() -> Fake {
    let wal = WalStatus { pending_events: 7, disk_limit_bytes: 1000, ..WalStatus::default() };
    let db = Arc::new(MemoryDb::default());
    let parked = ParkedStore::open(db.clone()).unwrap();
    Fake { db, phase: Phase::Serving, wal: Some(wal), forward_stands_still: Duration::ZERO, parked }
}

/// What the control socket answers to a command.
async fn command<C: ParkedCommand>(directory: &std::path::Path, command: C) -> Vec<ParkedLine> {
    let answer = control::command(directory, &command).await.unwrap().unwrap().all().await.unwrap();
    String::from_utf8(answer).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn get(fake: Fake, path: &str) -> (StatusCode, Response, String) {
    let router = router(Admin::new(Arc::new(fake), Metrics::new(), PATIENCE));
    let response = router.oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    (parts.status, Response::from_parts(parts, Body::empty()), text)
}

#[tokio::test]
async fn readyz_names_the_reason() {
    let full = || WalStatus { full: true, ..WalStatus::default() };
    let poisoned = || WalStatus { failed: true, full: true, ..WalStatus::default() };
    let cases = [
        (fake(), 200, "ready\n"),
        (Fake { forward_stands_still: Duration::from_secs(31), ..fake() }, 200, "ready\n"),
        (Fake { phase: Phase::Starting, wal: None, ..fake() }, 503, "starting\n"),
        (Fake { wal: None, ..fake() }, 503, "starting\n"),
        (Fake { phase: Phase::Stopping, ..fake() }, 503, "stopping\n"),
        (Fake { wal: Some(full()), ..fake() }, 503, "full\n"),
        (Fake { wal: Some(poisoned()), phase: Phase::Stopping, ..fake() }, 503, "poisoned\n"),
    ];
    for (fake, status, text) in cases {
        let (got, _, body) = get(fake, "/readyz").await;
        assert_eq!((got.as_u16(), body.as_str()), (status, text));
    }
}

#[tokio::test]
async fn livez_asks_both_loops() {
    let slow = |ms| Some(WalStatus { commit_busy_ms: ms, ..WalStatus::default() });
    let cases = [
        (fake(), 200),
        (Fake { phase: Phase::Starting, wal: None, ..fake() }, 200),
        (Fake { wal: slow(30_000), ..fake() }, 200),
        (Fake { wal: slow(30_001), ..fake() }, 503),
        (Fake { forward_stands_still: Duration::from_secs(31), ..fake() }, 503),
    ];
    for (fake, status) in cases {
        assert_eq!(get(fake, "/livez").await.0.as_u16(), status);
    }
}

#[tokio::test]
async fn metrics_show_the_log_at_the_scrape() {
    let (status, response, text) = get(fake(), "/metrics").await;
    assert_eq!(status, 200);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/plain; version=0.0.4");
    assert!(text.contains("\nringtail_wal_pending_events 7\n"), "{text}");
    assert!(text.contains("\nringtail_wal_disk_limit_bytes 1000\n"), "{text}");
    assert!(text.contains("\nringtail_wal_headroom_bytes 0\n"), "{text}");
}

#[test]
fn the_headroom_is_what_both_limits_leave() {
    let limits = Limits { connections_max: 1, free_bytes_min: 300 };
    let headroom = |disk_bytes, free_bytes| {
        limits.headroom_bytes(&WalStatus { disk_limit_bytes: 1000, disk_bytes, free_bytes, ..WalStatus::default() })
    };
    assert_eq!([headroom(400, 5000), headroom(400, 500), headroom(400, 200), headroom(1100, 5000)], [600, 200, 0, 0]);
    let capacity = |disk_bytes, other_bytes, free_bytes| {
        let wal = WalStatus { disk_limit_bytes: 1000, disk_bytes, other_bytes, free_bytes, ..WalStatus::default() };
        limits.capacity_bytes(&wal)
    };
    // A segment that is made takes nothing away, a parked event does, and so do others.
    let found = [capacity(400, 100, 5000), capacity(500, 100, 4900), capacity(500, 150, 5000), capacity(400, 100, 500)];
    assert_eq!(found, [900, 900, 850, 500]);
}

#[tokio::test]
async fn status_is_json() {
    let (status, _, text) = get(fake(), "/status").await;
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(answer["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(answer["ready"], true);
    assert_eq!(answer["connections"], json!({"websocket": 3, "rest": 2, "grpc": 1}));
    assert_eq!(answer["wal"]["pending_events"], 7);
    assert_eq!(answer["parked"]["events"], 0);
    assert!(answer["forward"]["last_error"].is_object());
}

#[tokio::test]
async fn the_page_may_only_run_its_own_script() {
    let (status, response, text) = get(fake(), "/").await;
    assert_eq!(status, 200);
    let header = |name: &str| response.headers()[name].to_str().unwrap();
    let policy = header("content-security-policy");
    for part in
        ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    {
        assert!(policy.split("; ").any(|found| found == part), "{part} in {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    assert_eq!(header("x-content-type-options"), "nosniff");
    assert_eq!(header("referrer-policy"), "no-referrer");
    assert_eq!(header("cache-control"), "no-store");
    // The nonce in the policy is that of the two elements, and another every time.
    let nonce =
        |policy: &str| policy.split("script-src 'nonce-").nth(1).unwrap().split('\'').next().unwrap().to_owned();
    let first = nonce(policy);
    assert_eq!(text.matches(&format!("nonce=\"{first}\"")).count(), 2);
    assert!(policy.contains(&format!("style-src 'nonce-{first}'")));
    let (_, response, _) = get(fake(), "/").await;
    assert_ne!(nonce(response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap()), first);
}

#[tokio::test]
async fn no_answer_is_taken_for_something_else() {
    for path in ["/", "/status", "/history", "/metrics", "/readyz", "/nothing"] {
        let (_, response, _) = get(fake(), path).await;
        assert_eq!(response.headers()["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(response.headers()["cross-origin-resource-policy"], "same-origin", "{path}");
    }
}

#[tokio::test]
async fn the_status_remembers() {
    let metrics = Metrics::new();
    let source = fake();
    for _ in 0..2 {
        source.parked.park(&about("t"), b"hello").unwrap();
    }
    source.parked.sync().unwrap();
    let admin = Admin::new(Arc::new(source), metrics.clone(), PATIENCE);
    let stop = CancellationToken::new();
    let upkeep = tokio::spawn(run_upkeep(admin.clone(), stop.clone()));
    metrics.wal.committed_events.increment(3);
    let status = loop {
        let answer = router(admin.clone()).oneshot(Request::get("/status").body(Body::empty()).unwrap()).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap();
        if answer["parked"]["by_reason"].is_object() && answer["recent"][0].is_object() {
            break answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(status["parked"], json!({"events": 2, "lost_events": 7, "by_reason": {"expired": 2}}));
    assert_eq!(status["errors"][0]["message"], "<script>alert(1)</script>");
    assert_eq!(status["totals"]["committed_events"], 3);
    assert_eq!(status["recent"][0]["pending_events"], 7);
    assert_eq!(status["limits"], json!({"connections_max": 100, "free_bytes_min": 300}));
    assert!(status["forecast"]["full_seconds"].is_null());
    let history = router(admin).oneshot(Request::get("/history").body(Body::empty()).unwrap()).await.unwrap();
    let history: Value = serde_json::from_slice(&history.into_body().collect().await.unwrap().to_bytes()).unwrap();
    assert_eq!(history["samples"][0], status["recent"][0]);
    stop.cancel();
    upkeep.await.unwrap();
}

#[tokio::test]
async fn nothing_else_is_served() {
    assert_eq!(get(fake(), "/nothing").await.0, 404);
    // Payloads are for the control socket alone.
    assert_eq!(get(fake(), "/parked/list").await.0, 404);
    assert_eq!(get(fake(), "/backlog").await.0, 404);
    let router = router(Admin::new(Arc::new(fake()), Metrics::new(), PATIENCE));
    for (path, status) in [("/status", 405), ("/parked/list", 404), ("/parked/drop", 404)] {
        let post = Request::post(path).body(Body::from("{}")).unwrap();
        assert_eq!(router.clone().oneshot(post).await.unwrap().status(), status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_serves_its_owner() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("a-directory-whose-path-is-too-long-for-a-socket".repeat(3));
    std::fs::create_dir(&directory).unwrap();
    assert!(control::get(&directory, "/status").await.unwrap().is_none(), "nobody there");

    let stale = control::ControlSocket::bind(&directory).unwrap();
    let socket = control::ControlSocket::bind(&directory).unwrap();
    let mode = std::fs::metadata(directory.join("control.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    std::mem::forget(stale);

    let fake = fake();
    let (store, db) = (fake.parked.clone(), fake.db.clone());
    for number in 0..100 {
        store.park(&about(if number < 80 { "a" } else { "b" }), b"hello").unwrap();
    }
    store.sync().unwrap();
    let source = Arc::new(fake);
    let stop = CancellationToken::new();
    let serving = tokio::spawn(socket.serve(Admin::new(source, Metrics::new(), PATIENCE), stop.clone()));

    let status = control::get(&directory, "/status").await.unwrap().unwrap().all().await.unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&status).unwrap()["parked"]["events"], 100);

    let filter = ParkedFilter { from_id: Some(3), limit: Some(50), ..ParkedFilter::default() };
    let lines = command(&directory, ParkedList { filter: filter.clone(), summary: true }).await;
    assert_eq!(lines.len(), 51);
    assert!(matches!(&lines[0], ParkedLine::Summary(ParkedSummary { id: 3, payload_bytes: 5, .. })), "{:?}", lines[0]);
    let done = |events, bytes, seen_events, total_events| {
        ParkedLine::Done(ParkedProgress { seen_events, total_events, events, bytes, last_id: 100 })
    };
    assert_eq!(lines[50], done(50, 250, 50, 100));
    let lines = command(&directory, ParkedList { filter, summary: false }).await;
    assert!(matches!(&lines[1], ParkedLine::Event(event) if event.payload == b"hello"[..]), "{:?}", lines[1]);

    let filter = ParkedFilter { topics: vec!["b".into()], ..ParkedFilter::default() };
    let would = command(&directory, ParkedDrop { filter: filter.clone(), dry_run: true }).await;
    assert_eq!((would.as_slice(), store.count()), (&[done(20, 100, 100, 100)][..], 100));
    db.sync_fails.store(true, Ordering::SeqCst);
    let failed = command(&directory, ParkedDrop { filter: filter.clone(), dry_run: false }).await;
    let [ParkedLine::Failed { message, progress }] = &failed[..] else { panic!("{failed:?}") };
    assert!(message.starts_with("the parked store failed: ") && progress.events == 0, "{failed:?}");
    assert_eq!(store.count(), 100, "what is not durable is not dropped");
    db.sync_fails.store(false, Ordering::SeqCst);
    let dropped = command(&directory, ParkedDrop { filter: filter.clone(), dry_run: false }).await;
    assert!(
        matches!(&dropped[..], [ParkedLine::Progress(_), ParkedLine::Done(done)] if (done.events, done.bytes) == (20, 100)),
        "{dropped:?}"
    );
    assert_eq!((store.count(), store.ever()), (80, 100));
    assert_eq!(command(&directory, ParkedDrop { filter, dry_run: false }).await, [done(0, 0, 80, 80)]);

    for (limit, last) in [(2, "sequence"), (9, "error")] {
        let path = format!("/backlog?{}", PeekFilter { limit, payloads: true }.to_query());
        let lines = control::get(&directory, &path).await.unwrap().unwrap().all().await.unwrap();
        let lines = String::from_utf8(lines).unwrap();
        assert_eq!(lines.lines().count(), limit.min(4), "{lines}");
        let first: BatchLine = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        assert_eq!((first.sequence.0, first.events[0].payload.as_deref()), (1, Some("aGVsbG8=")));
        assert!(lines.lines().last().unwrap().contains(last), "{lines}");
    }
    let refused = control::get(&directory, "/backlog?nonsense=1").await.unwrap_err();
    assert!(matches!(refused, control::ControlError::Refused { status: 400, .. }), "{refused}");
    let refused = control::get(&directory, "/parked/drop").await.unwrap_err();
    assert!(matches!(refused, control::ControlError::Refused { status: 405, .. }), "{refused}");

    let text = |text: &str| FileTexts {
        config: Some(FileText { path: "new.toml".into(), text: text.into() }),
        ..FileTexts::default()
    };
    let foretold = control::foretell_reload(&directory, &text("log.level = \"debug\"")).await.unwrap().unwrap();
    assert!(matches!(foretold, control::Foretold::Taken(changes) if changes.live == ["log.level"]));
    let foretold = control::foretell_reload(&directory, &text("log.levl = 1")).await.unwrap().unwrap();
    assert!(matches!(foretold, control::Foretold::Refused(reason) if reason.contains("new.toml:1")));

    stop.cancel();
    serving.await.unwrap().unwrap();
    assert!(!directory.join("control.sock").exists());
    assert!(control::get(&directory, "/status").await.unwrap().is_none(), "stopped");
}
