//! The journal that `faultfs.c` writes: every change below its root, in order.
//!
//! ```text
//! change u32 │ handle u32 │ number u64 │ path bytes u32 │ data bytes u32 │ path │ data        (native byte order)
//! ```

use std::ops::Range;

const HEAD_BYTES: usize = 24;

/// One change. A handle is an open file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<'a> {
    /// A life of the process begins. No handle is open.
    Start,
    Open {
        handle: u32,
        path: &'a str,
        created: bool,
        truncated: bool,
    },
    /// The data is where it is in the journal.
    Write {
        handle: u32,
        offset: u64,
        data: Range<usize>,
    },
    Truncate {
        handle: u32,
        length: u64,
    },
    Rename {
        from: &'a str,
        to: &'a str,
    },
    Remove {
        path: &'a str,
    },
    MakeDirectory {
        path: &'a str,
    },
    /// A sync begins: it covers what was written before.
    SyncBegins {
        handle: u32,
        sync: u64,
    },
    /// It has succeeded.
    SyncEnds {
        sync: u64,
    },
}

/// A change, and the length of the journal with it.
pub struct Record<'a> {
    pub change: Change<'a>,
    pub end: usize,
}

/// Every change, in order.
pub fn records(journal: &[u8]) -> impl Iterator<Item = Record<'_>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let head = journal.get(at..at + HEAD_BYTES)?;
        let small = |from: usize| u32::from_ne_bytes(head[from..from + 4].try_into().expect("4 bytes"));
        let number = u64::from_ne_bytes(head[8..16].try_into().expect("8 bytes"));
        let (handle, path_bytes, data_bytes) = (small(4), small(16) as usize, small(20) as usize);
        let path_from = at + HEAD_BYTES;
        let data = path_from + path_bytes..path_from + path_bytes + data_bytes;
        let text = |range: Range<usize>| std::str::from_utf8(&journal[range]).expect("a path is text");
        let path = text(path_from..data.start);
        at = data.end;
        let change = match small(0) {
            1 => Change::Start,
            2 => Change::Open { handle, path, created: number & 1 != 0, truncated: number & 2 != 0 },
            3 => Change::Write { handle, offset: number, data },
            4 => Change::Truncate { handle, length: number },
            5 => Change::Rename { from: path, to: text(data) },
            6 | 8 => Change::Remove { path },
            7 => Change::MakeDirectory { path },
            9 => Change::SyncBegins { handle, sync: number },
            10 => Change::SyncEnds { sync: number },
            other => panic!("the journal has a change of kind {other}"),
        };
        Some(Record { change, end: at })
    })
}
