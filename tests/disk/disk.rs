//! The test's side of `faultfs.c`: builds it, gives it a directory, a journal and a page of commands.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::process::{Options, turns};

/// Rules that can be in force at a time.
pub const RULES: usize = 8;
const CONTROL_BYTES: u64 = 24 + RULES as u64 * RULE_BYTES;
const RULE_BYTES: u64 = 104;
const NAME_BYTES: usize = 32;

/// Kinds of calls that can fail; the numbers are those of `faultfs.c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Call {
    Create = 1,
    Write = 2,
    Sync = 3,
    Read = 4,
    Reserve = 5,
}

/// Calls that fail: of one kind, on files whose path below the root begins and ends so.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub call: Call,
    pub error: i32,
    /// So many succeed first.
    pub skip: u64,
    /// Then so many fail.
    pub times: u64,
    /// Only reads of this byte of a file; 0: all.
    pub byte: u64,
    pub prefix: &'static str,
    pub suffix: &'static str,
}

impl Rule {
    /// The next call and every one after it fails.
    pub fn always(call: Call, error: i32, prefix: &'static str, suffix: &'static str) -> Rule {
        Rule { call, error, skip: 0, times: u64::MAX, byte: 0, prefix, suffix }
    }
}

/// A directory on a disk that the test commands.
pub struct Disk {
    directory: TempDir,
    control: File,
}

impl Disk {
    /// An empty disk without faults.
    pub fn new() -> Disk {
        let directory = tempfile::Builder::new().prefix("ringtail-disk-").tempdir().expect("make a directory");
        std::fs::create_dir(directory.path().join("data")).expect("make a directory");
        File::create(directory.path().join("journal")).expect("make the journal");
        let control = File::options().read(true).write(true).create_new(true).open(directory.path().join("control"));
        let control = control.expect("make the page of commands");
        control.set_len(CONTROL_BYTES).expect("make the page of commands");
        Disk { directory, control }
    }

    /// The directory below which everything is journalled and may fail.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Options for the service on this disk: small segments, no brokers.
    pub fn options(&self) -> Options {
        let variable = |name: &str, value: &Path| (name.to_owned(), value.to_str().expect("plain paths").to_owned());
        let environment = vec![
            variable("LD_PRELOAD", library()),
            variable("FAULTFS_ROOT", &self.root()),
            variable("FAULTFS_JOURNAL", &self.directory.path().join("journal")),
            variable("FAULTFS_CONTROL", &self.directory.path().join("control")),
        ];
        Options { environment, ..Options::small(&self.root()) }
    }

    /// Length of the journal: a change that the process has seen to its end is within it.
    pub fn journal_bytes(&self) -> usize {
        let metadata = std::fs::metadata(self.directory.path().join("journal"));
        metadata.expect("the journal is there").len() as usize
    }

    /// The journal so far.
    pub fn journal(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("journal")).expect("read the journal")
    }

    /// Limits what all files together may take; none: no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.set(0, bytes.unwrap_or(0));
    }

    /// Leaves no room at all: what the files take now is all that they may take.
    pub fn fill(&self) {
        fn blocks(directory: &Path) -> u64 {
            use std::os::unix::fs::MetadataExt;
            let entries = std::fs::read_dir(directory).expect("list a directory").map(|entry| entry.expect("list it"));
            let bytes = entries.map(|entry| match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => blocks(&entry.path()) + metadata.blocks() * 512,
                Ok(metadata) => metadata.blocks() * 512,
                // Removed meanwhile.
                Err(_) => 0,
            });
            bytes.sum()
        }
        self.set_capacity(Some(blocks(&self.root())));
    }

    /// Ends the process with SIGKILL before its sync number `number`, counted over all its lives; 0: never.
    pub fn kill_at_sync(&self, number: u64) {
        self.set(8, number);
    }

    /// Syncs so far, over all lives of the process.
    pub fn syncs(&self) -> u64 {
        self.get(16)
    }

    /// Puts a rule into force, in place of the one with the same number.
    pub fn set_rule(&self, number: usize, rule: Rule) {
        let at = self.clear_rule(number);
        let mut bytes = [0; RULE_BYTES as usize];
        bytes[4..8].copy_from_slice(&rule.error.to_ne_bytes());
        bytes[8..16].copy_from_slice(&rule.skip.to_ne_bytes());
        bytes[16..24].copy_from_slice(&rule.times.to_ne_bytes());
        bytes[32..40].copy_from_slice(&rule.byte.to_ne_bytes());
        for (from, name) in [(40, rule.prefix), (40 + NAME_BYTES, rule.suffix)] {
            assert!(name.len() < NAME_BYTES);
            bytes[from..from + name.len()].copy_from_slice(name.as_bytes());
        }
        self.control.write_all_at(&bytes, at).expect("write the page of commands");
        // The kind comes last: the rule is complete once it is in force.
        self.control.write_all_at(&(rule.call as u32).to_ne_bytes(), at).expect("write the page of commands");
    }

    /// Takes a rule out of force. Returns where it is.
    pub fn clear_rule(&self, number: usize) -> u64 {
        assert!(number < RULES);
        let at = 24 + number as u64 * RULE_BYTES;
        self.control.write_all_at(&[0; 4], at).expect("write the page of commands");
        at
    }

    /// Calls that failed by a rule since it was set.
    pub fn hits(&self, number: usize) -> u64 {
        self.get(24 + number as u64 * RULE_BYTES + 24)
    }

    fn set(&self, at: u64, value: u64) {
        self.control.write_all_at(&value.to_ne_bytes(), at).expect("write the page of commands");
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, at).expect("read the page of commands");
        u64::from_ne_bytes(bytes)
    }
}

/// The built library.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let (built, unfinished) =
            (target.join("faultfs.so"), target.join(format!("faultfs-{}.so", std::process::id())));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/disk/faultfs.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&unfinished).arg(source).arg("-ldl");
        let cc = turns::output(&mut cc).expect("run cc, which building Ringtail needs too");
        assert!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
        // Another run of the tests may be using the one that is there.
        std::fs::rename(unfinished, &built).expect("put the library into its place");
        built
    })
}
