//! The order of what a run did to its segments: no dice, every step of the journal is looked at.
//!
//! - A marker is made when all that it stands for is durable.
//! - A segment is written to when its marker and its own name are durable.
//! - A segment is taken apart when it is durable that its marker is gone.

use std::collections::{HashMap, HashSet};

use crate::journal::Change;
use crate::model::Model;

/// What was looked at.
#[derive(Debug, Default)]
pub struct Order {
    /// Segments that got their marker.
    pub marked: usize,
    /// Writes to segments in the life that marked them.
    pub written: usize,
    /// Segments that were removed.
    pub removed: usize,
    /// Files that this life of the process has opened, and segments that it has marked.
    paths: HashMap<u32, String>,
    marked_now: HashSet<String>,
}

impl Order {
    /// Looks at a change of what `model` holds, before it is made.
    pub fn look(&mut self, model: &Model, change: &Change) {
        match change {
            Change::Start => {
                self.paths.clear();
                self.marked_now.clear();
            }
            Change::Open { handle, path, .. } => {
                self.paths.insert(*handle, (*path).to_owned());
                // Markers are made, and never looked into.
                let Some(segment) = segment_of(path, "READY") else { return };
                for file in ["db", "conf"] {
                    let file = format!("{segment}/{file}");
                    assert!(model.is_durable(&file), "{path} is made while {file} may be lost");
                }
                self.marked_now.insert(segment.to_owned());
                self.marked += 1;
            }
            Change::Write { handle, .. } => {
                let segment = self.paths.get(handle).and_then(|path| segment_of(path, "db"));
                let Some(segment) = segment.filter(|segment| self.marked_now.contains(*segment)) else { return };
                for path in [segment, &format!("{segment}/READY")] {
                    assert!(model.is_durable(path), "{segment} is written to while {path} may be lost");
                }
                self.written += 1;
            }
            Change::Remove { path } => {
                let Some(segment) = segment_of(path, "db") else { return };
                let marker = format!("{segment}/READY");
                assert!(!model.may_exist(&marker), "{path} is removed while {marker} may be there");
                self.removed += 1;
            }
            _ => {}
        }
    }
}

/// The segment that a path is in, if it is that of its file called `name`.
fn segment_of<'a>(path: &'a str, name: &str) -> Option<&'a str> {
    let (segment, file) = path.rsplit_once('/')?;
    (segment.starts_with("wal/") && file == name).then_some(segment)
}
