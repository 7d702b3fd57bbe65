//! `ringtail dev`: the first impression comes out as promised, and its numbers add up.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// The demonstration takes some 15 seconds; the rest is for a busy machine.
const DEMO_TIME_MAX: Duration = Duration::from_secs(120);
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// A running `ringtail dev`, killed when dropped.
struct Dev {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    deadline: Instant,
}

impl Dev {
    fn start(temporary: &Path) -> Dev {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
        let mut child = command.arg("dev").env("TMPDIR", temporary).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        Dev { child, lines, seen: Vec::new(), deadline: Instant::now() + DEMO_TIME_MAX }
    }

    /// Reads on until a line that holds `text`, and returns it.
    fn read_until(&mut self, text: &str) -> String {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no line with {text:?} came; what did:\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The status lines while the broker was in `state`: events acked, arrived, and waiting.
    fn status_lines(&self, state: &str) -> Vec<[u64; 3]> {
        let lines = self.seen.iter().filter(|line| line.ends_with(&format!("broker {state}")));
        lines.map(|line| ["acked", "arrived", "backlog"].map(|name| number_after(line, name))).collect()
    }

    /// Ctrl-C, and how it ended.
    fn interrupt(mut self) -> ExitStatus {
        // SAFETY: only sends a signal, to a child that was not waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGINT) }, 0);
        let deadline = Instant::now() + STOP_TIME_MAX;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end on SIGINT");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // It has ended already if all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number in the word after `name`.
fn number_after(line: &str, name: &str) -> u64 {
    let mut words = line.split_whitespace().skip_while(|word| *word != name).skip(1);
    words.next().and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no number after {name} in {line:?}"))
}

#[test]
fn the_demonstration_loses_nothing_in_an_outage_and_stays_up() {
    let temporary = tempfile::tempdir().unwrap();
    let mut dev = Dev::start(temporary.path());

    let sum = dev.read_until("── Backlog 0.");
    let words: Vec<&str> = sum.split_whitespace().collect();
    let before = |next: &[&str]| {
        let at = words.windows(next.len()).position(|window| window == next).unwrap_or_else(|| panic!("{sum}"));
        words[at - 1].parse::<u64>().unwrap()
    };
    let acked = before(&["events", "acked,"]);
    assert!(acked > 0, "{sum}");
    assert_eq!(before(&["different", "ones"]), acked, "{sum}");
    assert_eq!(before(&["missing,"]), 0, "{sum}");

    let outage = dev.status_lines("DOWN");
    let (first, last) = (outage.first().unwrap(), outage.last().unwrap());
    assert!(last[0] > first[0], "acks did not go on: {outage:?}");
    assert!(last[2] > first[2], "the backlog did not grow: {outage:?}");
    assert_eq!(*dev.status_lines("up").last().unwrap(), [acked, acked, 0]);

    // What it invites to do works.
    dev.read_until("curl http://");
    let send = dev.read_until("ringtail send --url ws://");
    let url = send.split_whitespace().find(|word| word.starts_with("ws://")).unwrap().to_owned();
    dev.read_until("/status");
    dev.read_until("/metrics");
    dev.read_until("Ctrl-C ends this");
    let mut sender = Command::new(env!("CARGO_BIN_EXE_ringtail"));
    let sender = sender.args(["send", "--url", &url, "--id", "me", "--type", "hello"]).stdin(Stdio::piped());
    let mut sender = sender.spawn().unwrap();
    sender.stdin.take().unwrap().write_all(b"hello from the test\n").unwrap();
    assert!(sender.wait().unwrap().success());
    let arrived = dev.read_until("hello from the test");
    assert!(arrived.contains("clickstream-hello-log") && arrived.contains("key me"), "{arrived}");

    assert_eq!(dev.interrupt().code(), Some(0));
    let left: Vec<_> = std::fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "it left {left:?} behind");
}
