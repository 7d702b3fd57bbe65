//! A headless Chromium for tests, driven by its own protocol: pages are opened, asked, photographed, and every complaint of
//! theirs is kept. It needs Debian's package `chromium`, and ends with the test.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::service::turns;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

const PATIENCE: Duration = Duration::from_secs(60);
/// How long its last helpers may keep its directory in use.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(5);
/// A host name that leads to loopback.
pub const EDGE_HOST: &str = "edge-17.test";

const POLL: Duration = Duration::from_millis(100);

/// A running browser.
pub struct Chromium {
    child: Child,
    directory: TempDir,
}

impl Chromium {
    /// Starts it and waits until it can be driven.
    pub async fn start() -> Chromium {
        let directory = tempfile::Builder::new().prefix("ringtail-chromium-").tempdir().unwrap();
        let flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update \
                     --disable-dev-shm-usage --disable-sync --no-first-run --hide-scrollbars --remote-debugging-port=0";
        // A name as it has on a network: what browsers allow to loopback alone must not be needed.
        let names = format!("--host-resolver-rules=MAP {EDGE_HOST} 127.0.0.1");
        let mut command = Command::new("chromium");
        command
            .args(flags.split_whitespace())
            .arg(format!("--user-data-dir={}", directory.path().display()))
            .arg(names)
            .arg("about:blank")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = turns::spawn(&mut command).expect("start chromium: is it installed?");
        let chromium = Chromium { child, directory };
        let deadline = Instant::now() + PATIENCE;
        while chromium.endpoint().is_none() {
            assert!(Instant::now() < deadline, "chromium does not start");
            tokio::time::sleep(POLL).await;
        }
        chromium
    }

    /// Port and path of its protocol.
    fn endpoint(&self) -> Option<(u16, String)> {
        let text = std::fs::read_to_string(self.directory.path().join("DevToolsActivePort")).ok()?;
        let (port, path) = text.split_once('\n')?;
        Some((port.parse().ok()?, path.trim().to_owned()))
    }

    /// A new tab, empty.
    pub async fn open(&self) -> Page {
        let (port, path) = self.endpoint().unwrap();
        let mut browser = Page::connect(&format!("ws://127.0.0.1:{port}{path}")).await;
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let id = target["targetId"].as_str().unwrap();
        let mut page = Page::connect(&format!("ws://127.0.0.1:{port}/devtools/page/{id}")).await;
        for domain in ["Page", "Runtime", "Log"] {
            page.call(&format!("{domain}.enable"), json!({})).await;
        }
        page
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // Its helpers, which are in its process group, would go on writing to the directory for a while.
        // SAFETY: kill has no preconditions; the child has not been waited for, so the group is its own.
        unsafe { libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL) };
        let _ = self.child.wait();
        let deadline = Instant::now() + REMOVAL_PATIENCE;
        while std::fs::remove_dir_all(self.directory.path()).is_err() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }
}

/// A tab.
pub struct Page {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    next_id: u64,
    complaints: Vec<String>,
}

impl Page {
    async fn connect(url: &str) -> Page {
        let (socket, _) = connect_async(url).await.expect("connect to chromium");
        Page { socket, next_id: 1, complaints: Vec::new() }
    }

    /// Calls a method of the protocol, and takes note of what the page complains about meanwhile.
    pub async fn call(&mut self, method: &str, parameters: Value) -> Value {
        let id = self.next_id;
        self.next_id += 1;
        let call = json!({"id": id, "method": method, "params": parameters});
        self.socket.send(Message::text(call.to_string())).await.expect("chromium listens");
        loop {
            let message = tokio::time::timeout(PATIENCE, self.socket.next()).await;
            let message = message.expect("chromium answers in time").expect("chromium is there").expect("a message");
            let Message::Text(text) = message else { continue };
            let answer: Value = serde_json::from_str(&text).unwrap();
            if answer["id"] == id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.take_event(&answer);
        }
    }

    fn take_event(&mut self, event: &Value) {
        let parameters = &event["params"];
        let complaint = match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => Some(&parameters["exceptionDetails"]),
            "Runtime.consoleAPICalled" => Some(&parameters["args"]),
            "Log.entryAdded" => Some(&parameters["entry"]),
            _ => None,
        };
        self.complaints.extend(complaint.map(Value::to_string));
    }

    /// Everything that was written to the console or thrown, and every load and style that was refused.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Loads an address.
    pub async fn go(&mut self, url: &str) {
        let answer = self.call("Page.navigate", json!({"url": url})).await;
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
        self.wait_for("the page to load", "document.readyState === 'complete'").await;
    }

    /// What a JavaScript expression is worth; an exception fails the test.
    pub async fn evaluate(&mut self, expression: &str) -> Value {
        let parameters = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", parameters).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// The text of an element.
    pub async fn text(&mut self, id: &str) -> String {
        let text = self.evaluate(&format!("document.getElementById('{id}').innerText")).await;
        text.as_str().unwrap_or_else(|| panic!("there is no {id}")).to_owned()
    }

    /// Waits until an expression is true.
    pub async fn wait_for(&mut self, what: &str, condition: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.evaluate(condition).await != true {
            assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}: {condition}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Size in CSS pixels, and the colour scheme.
    pub async fn show_as(&mut self, width: u32, height: u32, scheme: &str) {
        let mobile = width < 600;
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile});
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features})).await;
    }

    /// Writes a picture of the whole page.
    pub async fn photograph(&mut self, file: &Path) {
        let parameters = json!({"format": "png", "captureBeyondViewport": true});
        let picture = self.call("Page.captureScreenshot", parameters).await;
        let picture = BASE64_STANDARD.decode(picture["data"].as_str().unwrap()).unwrap();
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, picture).unwrap();
    }

    /// Presses a key.
    pub async fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({"type": kind, "key": key, "code": key})).await;
        }
    }
}
