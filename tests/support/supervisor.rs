//! systemd, as far as a service that notifies it can tell.

#![allow(dead_code, reason = "each test uses its own part")]

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// systemd's end of `NOTIFY_SOCKET`.
pub struct Supervisor {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Supervisor {
    /// Its socket is in `directory`.
    pub fn new(directory: &Path) -> Supervisor {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Supervisor { socket, path }
    }

    /// What makes a process notify it.
    pub fn environment(&self) -> (String, String) {
        ("NOTIFY_SOCKET".into(), self.path.display().to_string())
    }

    /// Reads messages until one holds `word`, and returns them all.
    pub fn wait_for(&self, word: &str) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let length = self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{error}; {messages:?}"));
            messages.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            if messages.last().is_some_and(|message| message.contains(word)) {
                return messages;
            }
        }
    }

    /// Forgets what was said so far.
    pub fn read_all(&self) {
        self.socket.set_nonblocking(true).unwrap();
        while self.socket.recv(&mut [0; 4096]).is_ok() {}
        self.socket.set_nonblocking(false).unwrap();
    }
}
