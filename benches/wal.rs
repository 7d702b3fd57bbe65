//! The log beside the least that an ack can cost: a file that is appended to, and `fdatasync`.
//!
//! ```text
//! cargo bench --bench wal                     # a few minutes
//! RINGTAIL_BENCH_SECONDS=5 cargo bench --bench wal -- groups
//! RINGTAIL_BENCH_DIRECTORY=/mnt/disk cargo bench --bench wal
//! ```
//!
//! Every case runs both in turn, on one file system, several times, and prints medians and their ratio: the figures of one
//! run can be compared, those of two runs cannot. Payloads are incompressible.
//!
//! There are two baselines: a file that just grows, and one that is reserved ahead in steps of 32 MiB, as the log is. The
//! second is faster, because an append that takes new blocks also waits for the file system's journal. Ratios are of the
//! log to each of them: throughput (more is better), median latency (less is better).
//!
//! - `groups`: one appender, so that each batch is a group commit of its own.
//! - `appenders`: many at once, with batches of 4 KB; the raw file gets the same bytes in groups of the same size.
//! - `slow`: the same with 5 ms more for every `fdatasync` (an interposed library, built with `cc`).
//! - `cold`: a backlog of 1 GiB read back after the page cache was dropped (as root; otherwise warm).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use prost::Message;
use ringtail::batch::{Batch, Client, Request, now_ms};
use ringtail::config::{DedupConfig, WalConfig};
use ringtail::metrics::Metrics;
use ringtail::proto;
use ringtail::wal::Wal;

/// Set in the process that the slow library was loaded into.
const SLOW: &str = "RINGTAIL_BENCH_SLOW";
const ROUNDS: usize = 3;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| word == name);
    let bench = Bench::new();
    if std::env::var_os(SLOW).is_some() {
        bench.appenders("slow");
        return;
    }
    println!(
        "| case | raw MB/s | log MB/s | ratio | raw p50 ms | log p50 ms | ratio | written per byte | kept per byte |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    if wanted("groups") {
        bench.groups();
    }
    if wanted("appenders") {
        bench.appenders("appenders");
    }
    if wanted("slow") {
        run_slow(&bench.directory);
    }
    if wanted("cold") {
        bench.cold();
    }
}

struct Bench {
    directory: PathBuf,
    round: Duration,
    runtime: tokio::runtime::Runtime,
    _temporary: tempfile::TempDir,
}

/// What one round showed.
#[derive(Clone, Copy)]
struct Shown {
    bytes_per_second: f64,
    p50_ms: f64,
    written_per_byte: f64,
    kept_per_byte: f64,
    /// Bytes of one group commit, on average.
    group_bytes: f64,
}

impl Bench {
    fn new() -> Bench {
        let root = std::env::var_os("RINGTAIL_BENCH_DIRECTORY").map_or_else(|| PathBuf::from("."), PathBuf::from);
        let temporary = tempfile::Builder::new().prefix(".bench-").tempdir_in(root).expect("make a directory");
        let seconds = std::env::var("RINGTAIL_BENCH_SECONDS").map_or(2.0, |text| text.parse().expect("seconds"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        Bench {
            directory: temporary.path().into(),
            round: Duration::from_secs_f64(seconds),
            runtime: runtime.expect("start a runtime"),
            _temporary: temporary,
        }
    }

    fn groups(&self) {
        for bytes in [4 << 10, 32 << 10, 256 << 10, 1 << 20] {
            let round = |_| [self.raw(bytes, false), self.raw(bytes, true), self.log(bytes, 1)];
            let rounds: Vec<_> = (0..ROUNDS).map(round).collect();
            print_row(&format!("groups of {}", ByteSize::b(bytes as u64)), &rounds);
        }
    }

    fn appenders(&self, name: &str) {
        for appenders in [16, 256, 2000] {
            let rounds = (0..ROUNDS).map(|_| {
                let log = self.log(4 << 10, appenders);
                let group = log.group_bytes as usize;
                [self.raw(group, false), self.raw(group, true), log]
            });
            let rounds: Vec<_> = rounds.collect();
            let group = ByteSize::b(median(rounds.iter().map(|[.., log]| log.group_bytes)) as u64);
            print_row(&format!("{name}: {appenders} × 4 KiB (groups of {group})"), &rounds);
        }
    }

    /// Appends groups of `bytes` to a file and syncs each.
    fn raw(&self, bytes: usize, reserved_ahead: bool) -> Shown {
        let path = self.directory.join("raw");
        let mut file = File::create(&path).expect("make the raw file");
        let payload = noise(bytes);
        let (mut latencies, mut total, mut reserved, written) = (Vec::new(), 0, 0, written_bytes());
        let began = Instant::now();
        while began.elapsed() < self.round {
            if reserved_ahead && total >= reserved {
                reserve(&file, reserved);
                reserved += RESERVE_STEP;
            }
            let group_began = Instant::now();
            file.write_all(&payload).expect("write");
            file.sync_data().expect("sync");
            latencies.push(group_began.elapsed().as_secs_f64() * 1000.0);
            total += bytes;
        }
        let seconds = began.elapsed().as_secs_f64();
        let shown = Shown {
            bytes_per_second: total as f64 / seconds,
            p50_ms: median(latencies.into_iter()),
            written_per_byte: (written_bytes() - written) as f64 / total as f64,
            kept_per_byte: 1.0,
            group_bytes: bytes as f64,
        };
        fs::remove_file(path).expect("remove the raw file");
        shown
    }

    /// Appends batches of `bytes` to a log, `appenders` at a time.
    fn log(&self, bytes: usize, appenders: usize) -> Shown {
        let directory = self.directory.join("log");
        let metrics = Metrics::new();
        let wal = Wal::open(&config(&directory), 256 << 20, metrics.clone()).expect("open the log");
        let batch = batch(bytes);
        // The spares are made before the clock runs, as they are in a service that was started a moment ago.
        while wal.status().segments < 2 {
            std::thread::yield_now();
        }
        self.runtime.block_on(async { wal.append(batch.clone()).expect("room").await.expect("commit") });
        let (total, latencies) = (Arc::new(AtomicU64::new(0)), Arc::new(std::sync::Mutex::new(Vec::new())));
        let (written, began) = (written_bytes(), Instant::now());
        let until = began + self.round;
        self.runtime.block_on(async {
            let tasks = (0..appenders).map(|_| {
                let (wal, batch, total, latencies) = (wal.clone(), batch.clone(), total.clone(), latencies.clone());
                tokio::spawn(async move {
                    let mut own = Vec::new();
                    while Instant::now() < until {
                        let group_began = Instant::now();
                        wal.append(batch.clone()).expect("room").await.expect("commit");
                        own.push(group_began.elapsed().as_secs_f64() * 1000.0);
                        total.fetch_add(batch.request.as_bytes().len() as u64, Ordering::Relaxed);
                    }
                    latencies.lock().expect("no panic").extend(own);
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.expect("no panic");
            }
        });
        let seconds = began.elapsed().as_secs_f64();
        let written = (written_bytes() - written) as f64;
        let total = total.load(Ordering::Relaxed) as f64;
        let spares = 3 * SEGMENT_RESERVE;
        wal.close();
        drop(wal);
        let kept = disk_bytes(&directory).saturating_sub(spares) as f64;
        let text = metrics.handle().render();
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.expect("a known metric").parse::<f64>().expect("a number")
        };
        let groups = value("ringtail_wal_commit_group_batches_count");
        fs::remove_dir_all(directory).expect("remove the log");
        let latencies = std::mem::take(&mut *latencies.lock().expect("no panic"));
        Shown {
            bytes_per_second: total / seconds,
            p50_ms: median(latencies.into_iter()),
            written_per_byte: written / total,
            kept_per_byte: kept / total,
            group_bytes: total / groups,
        }
    }

    /// Reads a backlog back, beside reading the same bytes from a file.
    fn cold(&self) {
        let (bytes, count) = (256 << 10, 4096);
        let directory = self.directory.join("log");
        let wal = Wal::open(&config(&directory), 256 << 20, Metrics::new()).expect("open the log");
        let batch = batch(bytes);
        self.runtime.block_on(async {
            for _ in 0..count {
                wal.append(batch.clone()).expect("room").await.expect("commit");
            }
        });
        wal.close();
        drop(wal);
        let raw = self.directory.join("raw");
        let mut file = File::create(&raw).expect("make the raw file");
        for _ in 0..count {
            file.write_all(batch.request.as_bytes()).expect("write");
        }
        file.sync_all().expect("sync");
        let total = (bytes * count) as f64 / 1e6;
        for _ in 0..ROUNDS {
            let dropped = fs::write("/proc/sys/vm/drop_caches", "3").is_ok();
            let began = Instant::now();
            let mut file = File::open(&raw).expect("open the raw file");
            let mut buffer = vec![0; 1 << 20];
            while file.read(&mut buffer).expect("read") > 0 {}
            let raw_rate = total / began.elapsed().as_secs_f64();
            let _ = fs::write("/proc/sys/vm/drop_caches", "3");
            let began = Instant::now();
            let wal = Wal::open(&config(&directory), 256 << 20, Metrics::new()).expect("open the log");
            let mut reader = wal.reader();
            let mut records = 0;
            while reader.next_record().expect("read").is_some() {
                records += 1;
            }
            assert_eq!(records, count);
            let log_rate = total / began.elapsed().as_secs_f64();
            wal.close();
            let ratio = log_rate / raw_rate;
            println!(
                "cold read (cache dropped: {dropped}): raw {raw_rate:.0} MB/s, log {log_rate:.0} MB/s, ratio {ratio:.2}"
            );
        }
    }
}

const RESERVE_STEP: usize = 32 << 20;

/// Reserves the next step of `file`, which keeps its length.
fn reserve(file: &File, from: usize) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open, and fallocate touches no memory of ours.
    let done = unsafe {
        libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, from as libc::off_t, RESERVE_STEP as libc::off_t)
    };
    assert_eq!(done, 0, "reserve");
}

/// Disk that a prepared segment takes.
const SEGMENT_RESERVE: u64 = (32 << 20) + (2 << 20) + (4 << 20);

fn config(directory: &Path) -> WalConfig {
    WalConfig {
        directory: directory.into(),
        bytes_max: ByteSize::gib(64),
        free_bytes_min: ByteSize::b(0),
        // The batches of the bench are equal.
        dedup: DedupConfig { enabled: false, ..DedupConfig::default() },
        ..WalConfig::default()
    }
}

fn batch(bytes: usize) -> Batch {
    let event = proto::Event { event_bytes: noise(bytes - 64).into(), r#type: "bench".into() };
    let request = proto::SendEventRequest { req_guid: "bench".into(), sent_time: None, events: vec![event] };
    let request = Request::parse(Bytes::from(request.encode_to_vec())).expect("a request");
    Batch { received_at_ms: now_ms(), client: Client { group: "bench".into(), id: "bench".into() }, request }
}

fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|_| rand::random()).collect()
}

/// Bytes that this process has sent to the disk.
fn written_bytes() -> u64 {
    let io = fs::read_to_string("/proc/self/io").expect("read /proc/self/io");
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.expect("write_bytes").parse().expect("a number")
}

fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(path).expect("list").map(|entry| entry.expect("list"));
    let bytes = entries.map(|entry| {
        let metadata = entry.metadata().expect("measure");
        if metadata.is_dir() { disk_bytes(&entry.path()) } else { metadata.blocks() * 512 }
    });
    bytes.sum()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print_row(name: &str, rounds: &[[Shown; 3]]) {
    let medians = |of: fn(&Shown) -> f64| [0, 1, 2].map(|which| median(rounds.iter().map(|round| of(&round[which]))));
    let [grown_rate, reserved_rate, log_rate] = medians(|shown| shown.bytes_per_second / 1e6);
    let [grown_p50, reserved_p50, log_p50] = medians(|shown| shown.p50_ms);
    println!(
        "| {name} | {grown_rate:.0}, {reserved_rate:.0}, {log_rate:.0} | {:.2}, {:.2} \
         | {grown_p50:.2}, {reserved_p50:.2}, {log_p50:.2} | {:.2}, {:.2} | {:.2} | {:.2} |",
        log_rate / grown_rate,
        log_rate / reserved_rate,
        log_p50 / grown_p50,
        log_p50 / reserved_p50,
        medians(|shown| shown.written_per_byte)[2],
        medians(|shown| shown.kept_per_byte)[2],
    );
}

/// Runs this program once more, with an `fdatasync` that takes 5 ms more.
fn run_slow(directory: &Path) {
    let (source, library) = (directory.join("slow.c"), directory.join("slow.so"));
    fs::write(&source, SLOW_SOURCE).expect("write the library's source");
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl").status();
    assert!(built.expect("run cc").success(), "cc failed");
    let itself = std::env::current_exe().expect("the path of this program");
    let status = Command::new(itself).env("LD_PRELOAD", library).env(SLOW, "1").status();
    assert!(status.expect("run the slow cases").success());
}

const SLOW_SOURCE: &str = "
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, \"fdatasync\");
    usleep(5000);
    return real(fd);
}
";
