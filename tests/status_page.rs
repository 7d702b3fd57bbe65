//! The status page in a real browser: idle, in an outage, draining; with clients that mean ill. Pictures of it are left in
//! `target/status-page`.

#[path = "support/chromium.rs"]
mod chromium;
#[path = "support/http.rs"]
mod http;
#[path = "support/kafka.rs"]
mod kafka;
#[path = "support/service.rs"]
mod service;

use std::path::{Path, PathBuf};
use std::time::Duration;

use chromium::{Chromium, EDGE_HOST, Page};
use rdkafka::mocking::MockCluster;
use ringtail::client::{RetryPolicy, Sender, new_req_guid};
use ringtail::proto::{Event, SendEventRequest};
use service::turns;
use service::{Scheme, Service};
use tokio::task::JoinHandle;

const BROKER: i32 = 1;
const PATIENCE: Duration = Duration::from_secs(60);
const HOSTILE_ID: &str = "<img src=x onerror=window.harmed=1>";
const HOSTILE_TYPE: &str = "<script>window.harmed=1</script>";

fn picture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/status-page").join(format!("{name}.png"))
}

async fn photograph(page: &mut Page, name: &str) {
    for (look, width, height, scheme) in
        [("light", 1280, 900, "light"), ("dark", 1280, 900, "dark"), ("phone", 390, 844, "light")]
    {
        page.show_as(width, height, scheme).await;
        page.wait_for(
            "it is drawn anew",
            "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(true), 50)))",
        )
        .await;
        let sideways =
            page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth").await;
        assert_eq!(sideways, 0, "{name}, {look}: it scrolls sideways");
        page.photograph(&picture(&format!("{name}-{look}"))).await;
    }
    page.show_as(1280, 900, "light").await;
}

/// Sends batches of 20 events until it is aborted; at most `pause` apart.
fn traffic(service: &Service, id: &str, pause: Duration) -> JoinHandle<()> {
    let sender = Sender::new(service.ports().options(Scheme::WebSocket, id), RetryPolicy::default());
    let event = Event { event_bytes: vec![7; 300].into(), r#type: "page".into() };
    tokio::spawn(async move {
        loop {
            let request =
                SendEventRequest { req_guid: new_req_guid(), sent_time: None, events: vec![event.clone(); 20] };
            sender.deliver(&request).await.unwrap();
            tokio::time::sleep(pause).await;
        }
    })
}

/// A number that the page shows as `1,234`.
async fn number(page: &mut Page, id: &str) -> u64 {
    page.text(id).await.replace(',', "").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_tells_of_an_outage_and_shows_nothing_but_text() {
    let cluster = MockCluster::new(1).unwrap();
    let settings = "in_flight_bytes_max = \"1MiB\"\nkafka.\"reconnect.backoff.max.ms\" = 250";
    let mut service = Service::start(&cluster.bootstrap_servers(), settings);
    let chromium = Chromium::start().await;
    let mut page = chromium.open().await;
    page.show_as(1280, 900, "light").await;

    // Idle, but for a few devices.
    let devices: Vec<_> =
        (0..5).map(|at| traffic(&service, &format!("device-{at}"), Duration::from_millis(250))).collect();
    page.go(&format!("http://{EDGE_HOST}:{}/", service.ports().admin)).await;
    page.wait_for("all to be well", "headline.innerText === 'All is well'").await;
    page.wait_for("some seconds of charts", "samples.length > 8").await;
    assert_eq!(number(&mut page, "connections").await, 5);
    assert!(page.text("rates-summary").await.starts_with("Now "));
    assert!(page.evaluate("document.querySelectorAll('svg path.in').length").await == 1);
    photograph(&mut page, "idle").await;
    assert_keyboard_and_names(&mut page).await;

    // The outage.
    turns::take_down(&cluster, BROKER);
    page.wait_for("the outage to be told", "headline.innerText.startsWith('Kafka is unreachable')").await;
    page.wait_for("the backlog to be there", "Number(pending.innerText.replaceAll(',', '')) > 0").await;
    let before = number(&mut page, "pending").await;
    page.wait_for("the backlog to grow", &format!("Number(pending.innerText.replaceAll(',', '')) > {before}")).await;
    page.wait_for("an error to be told", "errors.children.length > 0").await;
    assert!(page.text("explain").await.contains("At the present rate the disk is full in "));
    assert_eq!(page.evaluate("document.getElementById('pipe-out').dataset.flow").await, "blocked");
    page.wait_for("ten seconds of outage", "samples.length > 20").await;
    photograph(&mut page, "outage").await;

    // Back, but slowly.
    let burst: Vec<_> = (0..4).map(|at| traffic(&service, &format!("burst-{at}"), Duration::ZERO)).collect();
    page.wait_for("a large backlog", "Number(pending.innerText.replaceAll(',', '')) > 30000").await;
    burst.iter().chain(&devices).for_each(JoinHandle::abort);
    cluster.broker_round_trip_time(BROKER, Duration::from_millis(300)).unwrap();
    cluster.broker_up(BROKER).unwrap();
    page.wait_for("the draining to be told", "headline.innerText.startsWith('Catching up')").await;
    photograph(&mut page, "draining").await;
    cluster.broker_round_trip_time(BROKER, Duration::ZERO).unwrap();
    page.wait_for("the end of the backlog", "headline.innerText === 'All is well'").await;

    // Clients that mean ill.
    let hostile = Event { event_bytes: b"x".to_vec().into(), r#type: HOSTILE_TYPE.into() };
    let request = SendEventRequest { req_guid: HOSTILE_ID.into(), sent_time: None, events: vec![hostile; 3] };
    for scheme in Scheme::ALL {
        let sender =
            Sender::new(service.ports().options(scheme, &format!("{HOSTILE_ID}{scheme:?}")), RetryPolicy::default());
        sender.deliver(&request).await.unwrap();
        sender.close().await;
    }
    page.wait_for("the parked events", "headline.innerText.includes('9 events are parked')").await;
    page.wait_for("their reason", "parked.innerText.includes('No topic name')").await;
    photograph(&mut page, "parked").await;
    assert_eq!(page.evaluate("window.harmed === undefined && document.querySelectorAll('img').length").await, 0);

    // Gone.
    assert_eq!(page.complaints(), [] as [&str; 0], "the page complained");
    service.kill();
    page.wait_for("the end to be told", "headline.innerText === 'No answer from the service'").await;
    photograph(&mut page, "gone").await;
}

/// What the page makes of every state that a service can be in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_state_has_its_sentence() {
    let mut service = Service::start("127.0.0.1:1", "");
    let chromium = Chromium::start().await;
    let mut page = chromium.open().await;
    page.go(&format!("http://{EDGE_HOST}:{}/", service.ports().admin)).await;
    page.wait_for("the first answer", "life !== null").await;
    page.evaluate(
        "(async () => {
            clearTimeout(timer);
            window.base = await (await fetch('status')).json();
            base.uptime_seconds = 1000;
            Object.assign(base.forward, { connected: true, brokers: 1, disconnected_since_ms: null });
            window.show_state = (change) => {
              const status = structuredClone(base);
              change(status, status.wal, status.forward, status.forecast);
              showBanner(judge(status), status.host);
              showPath(status);
              showParked(status.parked);
              showReload(status);
              const state = (id, name) => document.getElementById(id).dataset[name];
              return [headline.innerText, state('banner', 'state'), state('pipe-in', 'flow'), state('pipe-out', 'flow')].join(' | ')
                .replaceAll('\\u00a0', ' ');
            };
        })()",
    )
    .await;
    let old =
        "wal.pending_events = 9; wal.oldest_pending_received_at_ms = s.now_ms - 100000; forecast.drain_seconds = null;";
    let cases = [
        ("", "All is well | ok | idle | idle"),
        ("s.rates.committed_events = 5; s.rates.delivered_events = 5", "All is well | ok | flows | flows"),
        (
            "forward.connected = false; forward.disconnected_since_ms = s.now_ms - 600000",
            "Kafka is unreachable for 10 min | warn | idle | blocked",
        ),
        ("forward.connected = false; s.uptime_seconds = 3", "Connecting to Kafka | wait | idle | idle"),
        ("s.forward = null", "Collecting only | ok | idle | idle"),
        ("wal.full = true; s.ready = false", "The log is full: batches are refused | bad | blocked | idle"),
        (
            "wal.full = true; forward.connected = false",
            "The log is full: batches are refused | bad | blocked | blocked",
        ),
        ("wal.failed = true", "The log has failed | bad | blocked | idle"),
        ("s.live = false", "No progress | bad | idle | idle"),
        ("s.phase = 'stopping'", "Stopping | wait | idle | idle"),
        ("s.phase = 'starting'; s.wal = null", "Starting | wait | idle | idle"),
        (
            &format!("{old} forecast.drain_seconds = 7300"),
            "Catching up: drained in about 2 h 2 min | busy | idle | idle",
        ),
        (&format!("{old} forecast.drain_seconds = 9e6"), "Kafka is reachable, but events wait | warn | idle | idle"),
        (&format!("{old} forward.live_first = true"), "New events go ahead of the backlog | busy | idle | idle"),
        (old, "Kafka is reachable, but events wait | warn | idle | idle"),
        ("wal.quarantined_segments = 2", "2 damaged parts of the log are set aside | warn | idle | idle"),
        ("wal.quarantined_stores = 1", "1 damaged part of the log is set aside | warn | idle | idle"),
        ("s.parked.events = 1", "1 event is parked | warn | idle | idle"),
    ];
    for (change, expected) in cases {
        let shown = page.evaluate(&format!("show_state((s, wal, forward, forecast) => {{ {change} }})")).await;
        assert_eq!(shown, expected, "{change}");
    }
    page.evaluate("show_state((s) => { s.parked.lost_events = 3 })").await;
    assert_eq!(page.text("parked-summary").await, "None. 3 others were lost to damage of the disk.");
    let full = "wal.full = true; wal.disk_bytes = wal.disk_limit_bytes; forecast.headroom_bytes = 0; s.totals.rejected_batches = 1234; \
                s.rates.rejected_batches = 12.5; wal.quarantined_segments = 1; s.connections.websocket = 9800; \
                wal.pending_events = 41234567; wal.pending_bytes = 8e9; wal.oldest_pending_received_at_ms = s.now_ms - 3e8; \
                forward.connected = false; forward.disconnected_since_ms = s.now_ms - 3e8; \
                s.parked = { events: 12345, by_reason: { too_large: 12000, unknown_topic: 345 } }";
    page.evaluate(&format!("show_state((s, wal, forward, forecast) => {{ {full} }})")).await;
    assert_eq!(page.text("disk").await.replace('\u{a0}', " "), "8.0 GiB of 8.0 GiB");
    assert_eq!(page.text("rejected").await, "1,234, 13/s");
    photograph(&mut page, "full").await;

    // The last reload.
    assert_eq!(page.evaluate("reload.hidden").await, true, "there was none");
    let reload = "s.reload = { at_ms: s.now_ms - 300000, error: null, changed: ['log.level', 'forward.topic'], \
                  restart: ['wal.bytes_max'] }";
    page.evaluate(&format!("show_state((s) => {{ {reload} }})")).await;
    assert!(page.text("reload-summary").await.replace('\u{a0}', " ").ends_with("5 min ago. Taken."));
    assert_eq!(page.text("reload").await.lines().last(), Some("wal.bytes_max"));
    assert!(page.text("reload").await.contains("log.level, forward.topic"));
    photograph(&mut page, "reload").await;
    let refused = "s.reload = { at_ms: s.now_ms, error: 'the configuration has a problem:\\n  x = 1: unknown key', changed: [], restart: [] }";
    page.evaluate(&format!("show_state((s) => {{ {refused} }})")).await;
    let shown = page.text("reload").await;
    assert!(shown.contains("Refused: nothing changed.") && shown.ends_with("unknown key"), "{shown}");

    // Nobody who asked for stillness sees anything move.
    let moving = "getComputedStyle(document.querySelector('#pipe-in .line')).animationName";
    page.evaluate("show_state((s) => { s.rates.committed_events = 5 })").await;
    assert_ne!(page.evaluate(moving).await, "none");
    let still = serde_json::json!({"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]});
    page.call("Emulation.setEmulatedMedia", still).await;
    assert_eq!(page.evaluate(moving).await, "none");
    assert_eq!(page.complaints(), [] as [&str; 0], "the page complained");
    assert!(service.stop().success());
}

/// Every string that can come from outside, made of markup: the page is given a status in which each is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_status_says_is_shown_as_text() {
    let mut service = Service::start("127.0.0.1:1", "");
    service.wait_for("the error", PATIENCE, |service| service.status()["errors"][0].is_object());
    let chromium = Chromium::start().await;
    let mut page = chromium.open().await;
    page.go(&format!("http://{EDGE_HOST}:{}/", service.ports().admin)).await;
    page.wait_for("the first answer", "life !== null").await;
    let show_hostile = format!(
        "(async () => {{
            clearTimeout(timer);
            const ill = {HOSTILE_ID:?} + {HOSTILE_TYPE:?};
            const taint = (value) => typeof value === 'string' ? ill : Array.isArray(value) ? value.map(taint)
              : value !== null && typeof value === 'object' ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, taint(v)]))
              : value;
            const status = taint(await (await fetch('status')).json());
            status.phase = 'serving';
            status.samples = [];
            status.parked = {{ events: 3, by_reason: {{ [ill]: 2, constructor: 1 }} }};
            status.reload = {{ at_ms: 1, error: ill, changed: [ill], restart: [ill] }};
            status.errors = [{{ message: ill, topic: ill, at_ms: 1, count: 2 }}];
            window.fetch = async () => new Response(JSON.stringify(status));
            life = null;
            await refresh();
            return true;
        }})()"
    );
    assert_eq!(page.evaluate(&show_hostile).await, true);
    for id in ["host", "about", "errors", "parked", "reload-error", "reload-changed", "reload-restart"] {
        let text = page.text(id).await;
        assert!(text.contains(HOSTILE_ID) && text.contains(HOSTILE_TYPE), "{id}: {text}");
    }
    photograph(&mut page, "hostile").await;
    let count = "document.querySelectorAll('img').length + document.querySelectorAll('script').length";
    assert_eq!(page.evaluate(count).await, 1, "the page's own script alone");
    assert_eq!(page.evaluate("window.harmed === undefined").await, true);
    assert_eq!(page.complaints(), [] as [&str; 0], "the page complained");

    // And if the script were wrong, the policy would hold.
    let refused = "(() => { try { document.body.innerHTML = '<b>'; return false; } catch (error) { return true; } })()";
    assert_eq!(page.evaluate(refused).await, true, "markup from a string is refused");
    let inline = "(() => { const made = document.createElement('style'); made.textContent = 'body { color: red }'; \
                  document.head.append(made); return getComputedStyle(document.body).color })()";
    assert_ne!(page.evaluate(inline).await, "rgb(255, 0, 0)", "a style without the nonce is refused");
}

/// What can be reached with the keyboard has a name and does what it says; what cannot be seen is written.
async fn assert_keyboard_and_names(page: &mut Page) {
    page.evaluate("document.getElementById('rates-chart').focus()").await;
    page.press("ArrowLeft").await;
    page.wait_for(
        "the values at the cursor",
        "/: in .*\\/s, out .*\\/s/.test(document.getElementById('rates-readout').innerText)",
    )
    .await;
    page.photograph(&picture("cursor")).await;
    page.press("Escape").await;
    page.wait_for("the cursor to go", "document.getElementById('rates-readout').innerText === ''").await;
    page.evaluate("document.activeElement.blur()").await;
    page.evaluate("document.getElementById('numbers').open = true").await;
    page.wait_for("the table", "document.querySelectorAll('#minutes tr').length > 0").await;
    page.evaluate("document.getElementById('numbers').open = false").await;

    let tree = page.call("Accessibility.getFullAXTree", serde_json::json!({})).await;
    for node in tree["nodes"].as_array().unwrap() {
        let role = node["role"]["value"].as_str().unwrap_or_default();
        let name = node["name"]["value"].as_str().unwrap_or_default();
        let needs_name = ["link", "meter", "heading", "button"].contains(&role);
        assert!(!needs_name || !name.is_empty(), "{node}");
    }
    // Contrast of every text with what is behind it, by WCAG's formula, in both schemes.
    for scheme in ["light", "dark"] {
        page.show_as(1280, 900, scheme).await;
        let low = page.evaluate(CONTRAST).await;
        assert_eq!(low, serde_json::json!([]), "{scheme}: contrast below 4.5");
    }
    page.show_as(1280, 900, "light").await;
}

/// The texts whose contrast is below 4.5 to 1.
const CONTRAST: &str = r#"(() => {
  const parse = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const light = (colour) => {
    const [r, g, b] = parse(colour).map((part) => part / 255).map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      const parts = parse(colour);
      if (parts.length === 3 || parts[3] === 1) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const low = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(element.tagName) || element.closest('svg, .skip, .unseen, [hidden]')) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push([element.tagName, element.id, element.textContent.trim().slice(0, 40), contrast.toFixed(2)]);
  }
  return low;
})()"#;
