//! A bad network: a TCP proxy on loopback that can swallow everything, be slow, or break its connections.

#![allow(dead_code, reason = "each test uses its own part")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::kafka::free_port;

/// How soon a change is noticed.
const TURN: Duration = Duration::from_millis(20);

/// Listens until the test ends.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    target: AtomicU16,
    /// Nothing is taken from either side: as if packets were dropped.
    blackhole: AtomicBool,
    /// Bytes a second towards the broker, over all connections; 0: no limit.
    bytes_per_second: AtomicU64,
    forwarded: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
    /// When the next byte may go, with a limit.
    free_at: Mutex<Option<Instant>>,
}

impl Proxy {
    /// Begins to listen. [`Proxy::set_target`] must follow.
    pub fn start() -> Proxy {
        let port = free_port();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("listen");
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                of_thread.connect(client);
            }
        });
        Proxy { port, shared }
    }

    /// Where clients connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Forwards new connections to this port.
    pub fn set_target(&self, port: u16) {
        self.shared.target.store(port, Ordering::Relaxed);
    }

    /// From now on connections are made and stay, and no byte goes through; or all is well again.
    pub fn blackhole(&self, is_on: bool) {
        self.shared.blackhole.store(is_on, Ordering::Relaxed);
    }

    /// Lets so many bytes a second through towards the broker; 0: all.
    pub fn limit(&self, bytes_per_second: u64) {
        self.shared.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Breaks every connection.
    pub fn cut(&self) {
        for connection in self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Bytes that went towards the broker.
    pub fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn connect(self: &Arc<Shared>, client: TcpStream) {
        let Ok(broker) = TcpStream::connect((Ipv4Addr::LOCALHOST, self.target.load(Ordering::Relaxed))) else { return };
        let copy = |stream: &TcpStream| stream.try_clone().expect("a descriptor is free");
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).extend([copy(&client), copy(&broker)]);
        for (from, to, is_limited) in [(copy(&client), copy(&broker), true), (broker, client, false)] {
            let shared = self.clone();
            std::thread::spawn(move || shared.pump(from, to, is_limited));
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, is_limited: bool) {
        let mut buffer = [0; 16 * 1024];
        let _ = from.set_nodelay(true);
        let _ = to.set_nodelay(true);
        loop {
            while self.blackhole.load(Ordering::Relaxed) {
                std::thread::sleep(TURN);
            }
            let limit = if is_limited { self.bytes_per_second.load(Ordering::Relaxed) } else { 0 };
            let size = if limit > 0 { (limit / 50).clamp(1, buffer.len() as u64) as usize } else { buffer.len() };
            let read = match from.read(&mut buffer[..size]) {
                Ok(0) | Err(_) => break,
                Ok(read) => read,
            };
            if limit > 0 {
                self.wait_for_turn(Duration::from_secs_f64(read as f64 / limit as f64));
            }
            // What was read when the hole opened is not let through either.
            while self.blackhole.load(Ordering::Relaxed) {
                std::thread::sleep(TURN);
            }
            if to.write_all(&buffer[..read]).is_err() {
                break;
            }
            if is_limited {
                self.forwarded.fetch_add(read as u64, Ordering::Relaxed);
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    fn wait_for_turn(&self, takes: Duration) {
        let at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let at = free_at.unwrap_or_else(Instant::now).max(Instant::now()) + takes;
            *free_at = Some(at);
            at
        };
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
    }
}
