//! A real small file system: an ext4 of its own, filled by a neighbour and by the log itself.
//!
//! Needs root, to mount: part of the feature `real-kafka`, which `.ci/run` runs.

#[path = "disk/check.rs"]
mod check;
#[allow(dead_code, reason = "the disk is a real one here")]
#[path = "disk/disk.rs"]
mod disk;
#[path = "support/http.rs"]
mod http;
#[allow(dead_code, reason = "Kafka does not go away again here")]
#[path = "disk/kafka.rs"]
mod kafka;
#[allow(dead_code, reason = "one load is enough here")]
#[path = "disk/load.rs"]
mod load;
#[path = "support/process.rs"]
mod process;
#[path = "support/small_log.rs"]
mod small_log;

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use check::{Promise, check};
use disk::Disk;
use http::{get, wait_until};
use kafka::Kafka;
use load::{Clients, Load};
use process::{Addresses, Options, Process};
use rand::Rng;
use tempfile::TempDir;

const DISK_BYTES: u64 = 100 << 20;
/// More than the disk holds.
const TOO_MUCH: usize = 1 << 30;

/// A mounted ext4 of [`DISK_BYTES`].
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount() -> SmallDisk {
        let directory = tempfile::Builder::new().prefix("ringtail-small-").tempdir().expect("make a directory");
        let (image, target) = (directory.path().join("image"), directory.path().join("mount"));
        File::create(&image).expect("make the image").set_len(DISK_BYTES).expect("make the image");
        std::fs::create_dir(&target).expect("make the mount point");
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image));
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(&image).arg(&target));
        SmallDisk(directory)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mount")
    }

    /// A neighbour's file that takes all the space there is.
    fn fill(&self) -> Neighbour {
        let path = self.path().join("neighbour");
        let mut file = File::options().create(true).append(true).open(&path).expect("open the neighbour's file");
        // In ever smaller pieces, to the last block.
        for bytes in [1 << 20, 4096] {
            loop {
                match file.write_all(&vec![7; bytes]) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => panic!("fill the disk: {error}"),
                }
            }
        }
        Neighbour(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process of a failed test may still have files open.
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} is still mounted", self.path().display());
        }
    }
}

struct Neighbour(PathBuf);

impl Neighbour {
    fn leave(self) {
        std::fs::remove_file(self.0).expect("remove the neighbour's file");
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}; this test mounts, and must run as root");
}

fn is_ready(addresses: Addresses) -> bool {
    let (code, body) = get(addresses.admin, "/readyz");
    assert!((code, &*body) == (200, "ready\n") || (code, &*body) == (503, "full\n"), "{code} {body}");
    code == 200
}

/// Every acked batch is in the log, unless Kafka has it. Looks at a copy elsewhere, so that the full disk stays as it is.
fn assert_kept(directory: &Path, load: &Load, clients: &Clients, kafka: &Kafka) {
    let copy = tempfile::tempdir().expect("make a directory");
    run(Command::new("cp").arg("-r").arg(directory).arg(copy.path()));
    let acked: HashSet<_> = clients.acks().into_keys().collect();
    let delivered = kafka.deliveries().into_keys().collect();
    let found = check(&copy.path().join("data"), &Promise { load, acked: &acked, delivered: &delivered });
    println!("{:?}", found.unwrap_or_else(|error| panic!("{error}")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_file_system_is_a_state_that_ends() {
    let disk = SmallDisk::mount();
    let directory = disk.path().join("data");
    let load = Load::new(rand::rng().random(), 200 << 10);
    let unused = Arc::new(Disk::new());
    let mut clients = Clients::new(&load, &unused);
    let mut kafka = Kafka::start(&load, &unused);
    let options = kafka.forward(Options::small(&directory), "none");
    let (mut process, mut addresses) = Process::start(&options);
    clients.send(addresses, 2 << 20).await;

    println!("a neighbour fills the disk");
    let neighbour = disk.fill();
    clients.send(addresses, TOO_MUCH).await;
    assert!(!is_ready(addresses) && clients.send_one(addresses).await.is_err());
    neighbour.leave();
    wait_until("batches to be accepted", || is_ready(addresses)).await;

    println!("the log fills the disk");
    clients.send(addresses, TOO_MUCH).await;
    assert!(!is_ready(addresses));
    assert!(process.stop().success());
    let neighbour = disk.fill();

    println!("a start on the full disk");
    (process, addresses) = Process::start(&options);
    clients.send(addresses, TOO_MUCH).await;
    assert!(!is_ready(addresses));
    assert!(process.stop().success());
    neighbour.leave();
    assert_kept(&directory, &load, &clients, &kafka);

    println!("delivery frees the disk");
    (process, addresses) = Process::start(&options);
    clients.send(addresses, TOO_MUCH).await;
    assert!(!is_ready(addresses));
    kafka.up();
    wait_until("batches to be accepted", || is_ready(addresses)).await;
    clients.send(addresses, 2 << 20).await;
    kafka.wait_until_delivered(addresses, &clients).await;
    assert!(process.stop().success());
    assert_kept(&directory, &load, &clients, &kafka);
}
