//! Logs for the tests: built with the library, damaged on purpose, read back, and the real binary run on them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use memchr::memmem;
use prost::Message;
use ringtail::batch::{Batch, Client, Request};
use ringtail::config::{Config, WalConfig};
use ringtail::forward::{ParkReason, ParkedStore};
use ringtail::metrics::Metrics;
use ringtail::proto;
use ringtail::wal::Wal;
use serde_json::Value;
use tempfile::TempDir;

use super::chunks::unmasked;
use super::parked::about;

/// Bytes of a payload of which 136 fill a segment.
pub const LARGE: usize = 60_000;

/// A log in a directory of its own, and a configuration for it.
pub struct Log {
    directory: TempDir,
}

impl Log {
    /// No log yet.
    pub fn none() -> Log {
        let log = Log { directory: tempfile::tempdir().unwrap() };
        log.configure("");
        log
    }

    /// A log that holds `batches`, each in a chunk of its own, or in several if it is large.
    pub fn with(batches: &[Batch]) -> Log {
        let log = Log::none();
        let wal = log.open();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for batch in batches {
            runtime.block_on(wal.append(batch.clone()).unwrap()).unwrap();
        }
        wal.close();
        log
    }

    /// Writes the configuration, with `more` at its end.
    pub fn configure(&self, more: &str) {
        let text = format!(
            "wal.directory = {:?}\nwal.segment_bytes = \"8MiB\"\nwal.free_bytes_min = \"0B\"\n\
             ingest.http.listen = \"127.0.0.1:0\"\ningest.grpc.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n{more}\n",
            self.wal_directory().display().to_string()
        );
        fs::write(self.config(), text).unwrap();
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path().join("ringtail.toml")
    }

    pub fn wal_directory(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// A path for a file of the test's.
    pub fn file(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn wal_config(&self) -> WalConfig {
        Config::load(Some(&self.config()), &[]).unwrap().config.wal
    }

    pub fn open(&self) -> Wal {
        Wal::open(&self.wal_config(), 64 << 20, Metrics::new()).unwrap()
    }

    /// Reads and delivers everything that is pending, as the forwarder does.
    pub fn deliver_all(&self) -> Vec<Batch> {
        let wal = self.open();
        let (mut reader, mut read) = (wal.reader(), Vec::new());
        while let Some(record) = reader.next_record().unwrap() {
            wal.deliver(record.end);
            read.push(record.batch);
        }
        drop(reader);
        wal.close();
        read
    }

    /// Runs `ringtail backlog`.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The same with something on its standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(arguments);
        let file = self.directory.path().join("input");
        fs::write(&file, input).unwrap();
        command.stdin(fs::File::open(file).unwrap()).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringtail"));
        command.arg("backlog").args(arguments).arg("--config").arg(self.config()).stdin(Stdio::null());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RINGTAIL_")) {
            command.env_remove(name);
        }
        command
    }

    /// Runs `ringtail backlog check` and returns its exit code and report.
    pub fn check(&self) -> (i32, Value) {
        let output = self.run(&["check", "--json"]);
        let report = serde_json::from_slice(&output.stdout);
        (output.status.code().unwrap(), report.unwrap_or_else(|_| panic!("{}", text(&output.stderr))))
    }

    pub fn segment(&self, id: u64) -> PathBuf {
        self.wal_directory().join(format!("wal/{id:012}"))
    }

    /// Flips a byte in the chunk that holds batch `number`.
    pub fn flip(&self, segment: u64, number: u64) {
        self.flip_at(segment, number, 0);
    }

    /// Flips a byte that stands `offset` bytes behind the beginning of batch `number`.
    pub fn flip_at(&self, segment: u64, number: u64, offset: usize) {
        let path = self.segment(segment).join("db");
        let mut bytes = fs::read(&path).unwrap();
        let at = position(&bytes, number) + offset;
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    /// Fills the chunk that holds batch `number` with zeroes.
    pub fn zero(&self, segment: u64, number: u64) {
        let path = self.segment(segment).join("db");
        let mut bytes = fs::read(&path).unwrap();
        let at = position(&bytes, number);
        let begin = memchr::memmem::rfind(&bytes[..at], b"RTC1").unwrap();
        bytes[begin..at].fill(0);
        fs::write(path, bytes).unwrap();
    }

    /// Takes a segment's file away, as a file system check does that moves it to `lost+found`.
    pub fn lose_file(&self, segment: u64) {
        fs::rename(self.segment(segment).join("db"), self.file("lost")).unwrap();
    }

    /// Puts the lost file back, into the segment that was set aside meanwhile.
    pub fn find_file(&self, segment: u64) {
        let aside = self.wal_directory().join(format!("quarantine/{segment:012}"));
        fs::rename(self.file("lost"), aside.join("db")).unwrap();
    }

    /// Cuts the segment's file off where batch `number` begins.
    pub fn truncate(&self, segment: u64, number: u64) {
        let path = self.segment(segment).join("db");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..position(&bytes, number)]).unwrap();
    }

    /// Makes a sled database (`meta`, `parked`) one that sled cannot open: its first bytes are wrong.
    pub fn spoil(&self, database: &Path) {
        let path = database.join("db");
        let mut bytes = fs::read(&path).unwrap();
        bytes[1] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    /// Parks two events and takes a part of the second away.
    pub fn park_and_damage(&self) {
        let wal = self.open();
        let parked = ParkedStore::open(wal.parked()).unwrap();
        let about = about("t", ParkReason::TooLarge);
        parked.park(&about, b"small").unwrap();
        parked.park(&about, &[7; 600_000]).unwrap();
        parked.sync().unwrap();
        wal.close();
        let part = [&2_u64.to_be_bytes()[..], &1_u16.to_be_bytes()].concat();
        wal.parked().remove(&part).unwrap();
        wal.parked().sync().unwrap();
    }

    /// Every file below the log's directory.
    pub fn image(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut image = BTreeMap::new();
        let mut directories = vec![self.wal_directory()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path)
                } else {
                    drop(image.insert(path.clone(), fs::read(path).unwrap()))
                }
            }
        }
        image
    }
}

/// Where the name of batch `number` stands: in its chunk, and nowhere else.
fn position(bytes: &[u8], number: u64) -> usize {
    let (bytes, name) = (unmasked(bytes), name(number));
    let mut found = memmem::find_iter(&bytes, &name);
    let at = found.next().expect("the batch is in the segment");
    assert!(found.next().is_none(), "{name} is there twice");
    at
}

fn name(number: u64) -> String {
    format!("the batch number {number:06}.")
}

/// A batch of one event of `bytes`.
pub fn batch(number: u64, bytes: usize) -> Batch {
    let mut payload = number.to_le_bytes().to_vec();
    payload.resize(bytes.max(8), number as u8);
    batch_of(number, &[("click", &payload)])
}

/// A batch of events: (type, payload).
pub fn batch_of(number: u64, events: &[(&str, &[u8])]) -> Batch {
    let events = events.iter().map(|(event_type, payload)| proto::Event {
        event_bytes: payload.to_vec().into(),
        r#type: (*event_type).into(),
    });
    let sent_time = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: number as i32 });
    let request = proto::SendEventRequest { req_guid: name(number), sent_time, events: events.collect() };
    let client = Client { group: format!("group-{}", number % 2).into(), id: format!("device-{}", number % 3).into() };
    let request = Request::parse(request.encode_to_vec().into()).unwrap();
    Batch { received_at_ms: 1_700_000_000_000 + number * 1000, client, request }
}

/// What must survive: everything.
pub fn content(batches: &[Batch]) -> Vec<(u64, Client, Vec<u8>)> {
    let content = |batch: &Batch| (batch.received_at_ms, batch.client.clone(), batch.request.as_bytes().to_vec());
    batches.iter().map(content).collect()
}

/// The numbers of batches.
pub fn numbers(batches: &[Batch]) -> Vec<u64> {
    let number = |batch: &Batch| batch.request.req_guid()[17..23].parse().unwrap();
    batches.iter().map(number).collect()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Asserts the exit code, and shows what was said if it is another.
#[track_caller]
pub fn assert_code(output: &Output, code: i32) {
    let said = || format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{}", said());
}

pub fn exists(path: &str) -> bool {
    Path::new(path).exists()
}
