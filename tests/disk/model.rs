//! What is on the disk and what is only in the page cache, from the journal: what a power cut may leave.
//!
//! The rules are those of POSIX, and no file system's kindness beyond them:
//! - What was written to a file before its fsync or fdatasync began is certain once that has succeeded.
//! - What was done to a directory's names (create, rename, remove) is certain once that directory was synced.
//! - All else may be lost or kept, page by page and name by name. A page is written as a whole: it is as it was after one
//!   of the writes to it. Changes of one name, and truncations of one file, keep their order.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::journal::Change;

/// A name in a directory, which is a [`Node`].
pub type Name = (usize, String);
/// What names stand for.
pub type Names = BTreeMap<Name, usize>;

/// The root directory's number.
pub const ROOT: usize = 0;

/// What the model believes of the disk. Anything but the default is a disk on which the log must lose data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disbelief {
    /// Syncs of files called `db` do nothing: as if sled's `flush()` were all.
    pub of_db_syncs: bool,
    /// Syncs of files of the spill do nothing.
    pub of_spill_syncs: bool,
    /// Syncs of directories do nothing.
    pub of_directory_syncs: bool,
}

/// A file or directory.
#[derive(Debug, Default)]
pub struct Node {
    pub is_directory: bool,
    is_db: bool,
    is_spill: bool,
    /// A file's certain content.
    pub durable: Vec<u8>,
    /// What was done to it since, in order.
    pub pending: Vec<FileChange>,
}

/// What was done to a file.
#[derive(Debug, Clone)]
pub struct FileChange {
    at: u64,
    pub kind: FileChangeKind,
}

#[derive(Debug, Clone)]
pub enum FileChangeKind {
    /// Where, and where in the journal the bytes are.
    Write(u64, Range<usize>),
    Truncate(u64),
}

/// What was done to names: they all change together, or none does.
#[derive(Debug, Clone)]
pub struct NameChange {
    at: u64,
    pub names: Vec<(Name, Option<usize>)>,
}

/// The disk at one moment of the journal.
pub struct Model<'a> {
    pub journal: &'a [u8],
    disbelief: Disbelief,
    pub nodes: Vec<Node>,
    /// Names as the process sees them.
    names: Names,
    pub durable_names: Names,
    pub pending_names: Vec<NameChange>,
    handles: HashMap<u32, usize>,
    /// Syncs under way: of which node, and when they began.
    syncs: HashMap<u64, (usize, u64)>,
    clock: u64,
}

impl<'a> Model<'a> {
    /// An empty root.
    pub fn new(journal: &'a [u8], disbelief: Disbelief) -> Model<'a> {
        Model {
            journal,
            disbelief,
            nodes: vec![Node { is_directory: true, ..Node::default() }],
            names: Names::new(),
            durable_names: Names::new(),
            pending_names: Vec::new(),
            handles: HashMap::new(),
            syncs: HashMap::new(),
            clock: 0,
        }
    }

    /// Makes one change.
    pub fn apply(&mut self, change: &Change) {
        self.clock += 1;
        match change {
            Change::Start => {
                self.handles.clear();
                self.syncs.clear();
            }
            Change::Open { handle, path, created, truncated } => {
                let node = if *created { self.make(path, false) } else { self.find(path) };
                let node = node.unwrap_or_else(|| panic!("{path} was opened and is not there"));
                if *truncated && !created {
                    self.change_file(node, FileChangeKind::Truncate(0));
                }
                self.handles.insert(*handle, node);
            }
            Change::Write { handle, offset, data } => {
                self.change_file(self.handles[handle], FileChangeKind::Write(*offset, data.clone()));
            }
            Change::Truncate { handle, length } => {
                self.change_file(self.handles[handle], FileChangeKind::Truncate(*length));
            }
            Change::Rename { from, to } => {
                let (from, to) = (self.name(from), self.name(to));
                // What is not there was not made by a call that is journalled: the control socket.
                if let Some(node) = self.names.get(&from).copied() {
                    self.change_names(vec![(from, None), (to, Some(node))]);
                }
            }
            Change::Remove { path } => {
                let name = self.name(path);
                if self.names.contains_key(&name) {
                    self.change_names(vec![(name, None)]);
                }
            }
            Change::MakeDirectory { path } => {
                self.make(path, true);
            }
            Change::SyncBegins { handle, sync } => {
                self.syncs.insert(*sync, (self.handles[handle], self.clock));
            }
            Change::SyncEnds { sync } => {
                let (node, began) = self.syncs.remove(sync).expect("a sync ends that has begun");
                self.sync(node, began);
            }
        }
    }

    /// Whether a file or directory is there for certain, with all that was done to it.
    pub fn is_durable(&self, path: &str) -> bool {
        let is_certain = |node: &usize| self.nodes[*node].pending.is_empty();
        self.find(path).filter(is_certain).is_some_and(|node| self.durable_names.get(&self.name(path)) == Some(&node))
    }

    /// Whether there may be something of this name after a power cut.
    pub fn may_exist(&self, path: &str) -> bool {
        let name = self.name(path);
        let makes = |change: &NameChange| change.names.iter().any(|(made, node)| *made == name && node.is_some());
        self.durable_names.contains_key(&name) || self.pending_names.iter().any(makes)
    }

    fn sync(&mut self, node: usize, began: u64) {
        if self.nodes[node].is_directory {
            if !self.disbelief.of_directory_syncs {
                self.sync_names(node, began);
            }
        } else if !(self.nodes[node].is_db && self.disbelief.of_db_syncs
            || self.nodes[node].is_spill && self.disbelief.of_spill_syncs)
        {
            let Node { durable, pending, .. } = &mut self.nodes[node];
            let covered = pending.partition_point(|change| change.at < began);
            for change in pending.drain(..covered) {
                change.kind.apply(durable, self.journal);
            }
        }
    }

    /// Makes every change of a name in `directory` durable, and those it rests on: earlier ones of the same names.
    fn sync_names(&mut self, directory: usize, began: u64) {
        let mut covered: Vec<Name> = Vec::new();
        let mut durable = Vec::new();
        for change in self.pending_names.iter().rev() {
            let is_in = |name: &Name| (change.at < began && name.0 == directory) || covered.contains(name);
            let is_durable = change.names.iter().any(|(name, _)| is_in(name));
            if is_durable {
                covered.extend(change.names.iter().map(|(name, _)| name.clone()));
            }
            durable.push(is_durable);
        }
        let mut durable = durable.into_iter().rev();
        let names = &mut self.durable_names;
        self.pending_names.retain(|change| {
            let is_durable = durable.next().expect("one for each");
            if is_durable {
                change.apply(names);
            }
            !is_durable
        });
    }

    fn make(&mut self, path: &str, is_directory: bool) -> Option<usize> {
        let name = self.name(path);
        let node = self.nodes.len();
        let is_spill = path.strip_prefix("spill/").is_some_and(|name| name.parse::<u64>().is_ok());
        self.nodes.push(Node { is_directory, is_db: name.1 == "db", is_spill, ..Node::default() });
        self.change_names(vec![(name, Some(node))]);
        Some(node)
    }

    fn change_file(&mut self, node: usize, kind: FileChangeKind) {
        self.nodes[node].pending.push(FileChange { at: self.clock, kind });
    }

    fn change_names(&mut self, names: Vec<(Name, Option<usize>)>) {
        let change = NameChange { at: self.clock, names };
        change.apply(&mut self.names);
        self.pending_names.push(change);
    }

    fn find(&self, path: &str) -> Option<usize> {
        if path.is_empty() { Some(ROOT) } else { self.names.get(&self.name(path)).copied() }
    }

    fn name(&self, path: &str) -> Name {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let directory = self.find(directory).unwrap_or_else(|| panic!("the directory of {path} is not there"));
        (directory, name.to_owned())
    }
}

impl NameChange {
    /// Makes the change in `names`.
    pub fn apply(&self, names: &mut Names) {
        for (name, node) in &self.names {
            match node {
                Some(node) => names.insert(name.clone(), *node),
                None => names.remove(name),
            };
        }
    }
}

impl FileChangeKind {
    /// Makes the change in a file's content.
    pub fn apply(&self, content: &mut Vec<u8>, journal: &[u8]) {
        match self {
            FileChangeKind::Truncate(length) => content.resize(*length as usize, 0),
            FileChangeKind::Write(offset, data) => {
                let from = *offset as usize;
                let until = from + data.len();
                if content.len() < until {
                    content.resize(until, 0);
                }
                content[from..until].copy_from_slice(&journal[data.clone()]);
            }
        }
    }
}
