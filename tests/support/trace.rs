//! Reads the output of `strace -f -y` and proves from it that an ack was sent only after its batch was synced.
//!
//! strace writes a system call in one line, or, when another thread came between, in two: `call(… <unfinished ...>` and
//! `<... call resumed>…`. So the order of lines is the order in which calls began and ended: line numbers are the clock.

use std::collections::HashMap;

use super::chunks;

/// A finished system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Line where it began.
    pub began: usize,
    /// Line where it ended.
    pub ended: usize,
    /// Its name.
    pub name: String,
    /// What its first argument, a descriptor, stands for: a path, or `socket:[…]`.
    pub file: String,
    /// The contents of every string in its arguments, one after the other.
    pub data: Vec<u8>,
    /// What it returned; none unless it is a number.
    pub result: Option<i64>,
}

/// The proof for one ack: lines of the trace, each before the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// The request had been read.
    pub read: usize,
    /// The batch began to be written to a segment.
    pub write: usize,
    /// The segment began to be synced.
    pub sync_began: usize,
    /// The sync had returned 0.
    pub sync_ended: usize,
    /// The ack began to be written to the client's socket.
    pub ack: usize,
}

/// Why a trace does not prove that a batch was synced before its ack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// The trace is not understood, or misses a part.
    #[error("{req_guid}: the trace has no {what}")]
    Missing {
        /// The batch.
        req_guid: String,
        /// What was looked for.
        what: &'static str,
    },
    /// The promise is broken.
    #[error("{req_guid}: acked in line {ack}, without a sync that followed its write in line {write}")]
    AckBeforeSync {
        /// The batch.
        req_guid: String,
        /// Line where its ack began.
        ack: usize,
        /// Line where its write ended.
        write: usize,
    },
}

/// Every call of the trace that finished, in the order of their ends.
pub fn parse(trace: &str) -> Vec<Call> {
    let mut unfinished: HashMap<&str, (usize, &str)> = HashMap::new();
    let mut calls = Vec::new();
    for (number, line) in trace.lines().enumerate() {
        let number = number + 1;
        let Some((thread, rest)) = line.split_once(char::is_whitespace) else { continue };
        let Some((_time, text)) = rest.trim_start().split_once(' ') else { continue };
        if let Some(begin) = text.strip_suffix("<unfinished ...>") {
            unfinished.insert(thread, (number, begin.trim_end()));
        } else if let Some(resumed) = text.strip_prefix("<... ") {
            let end = resumed.split_once(" resumed>").map(|(_, end)| end);
            if let (Some((began, begin)), Some(end)) = (unfinished.remove(thread), end) {
                calls.extend(parse_call(&format!("{begin}{end}"), began, number));
            }
        } else {
            calls.extend(parse_call(text, number, number));
        }
    }
    calls
}

/// Proves that the batch's ack began after a sync that began after the batch, read from the client, was written.
///
/// # Errors
/// [`Flaw`] if the trace does not show it.
pub fn check(calls: &[Call], req_guid: &str) -> Result<Proof, Flaw> {
    let missing = |what| Flaw::Missing { req_guid: req_guid.into(), what };
    let succeeded = |call: &&Call| call.result.is_some_and(|result| result > 0);
    let read = calls.iter().filter(succeeded).find(|call| call.is_read() && unmasked(call).contains(req_guid));
    let read = read.ok_or_else(|| missing("read of the request"))?;
    let ack = calls.iter().filter(|call| call.is_send() && call.file == read.file);
    let ack = ack.filter(|call| contains(&call.data, req_guid)).min_by_key(|call| call.began);
    let ack = ack.ok_or_else(|| missing("ack"))?;
    let write = calls.iter().filter(succeeded).find(|call| {
        call.name == "pwrite64"
            && call.is_on_segment()
            && call.began > read.ended
            && contains(&chunks::unmasked(&call.data), req_guid)
    });
    let write = write.ok_or_else(|| missing("write of the batch to a segment"))?;
    let sync = calls.iter().find(|call| {
        let covers = call.file == write.file && call.began > write.ended;
        call.name == "fdatasync" && covers && call.result == Some(0) && call.ended < ack.began
    });
    let flaw = || Flaw::AckBeforeSync { req_guid: req_guid.into(), ack: ack.began, write: write.ended };
    let sync = sync.ok_or_else(flaw)?;
    Ok(Proof { read: read.ended, write: write.began, sync_began: sync.began, sync_ended: sync.ended, ack: ack.began })
}

impl Call {
    fn is_read(&self) -> bool {
        ["read", "readv", "recvfrom", "recvmsg"].contains(&&*self.name) && self.file.starts_with("socket:")
    }

    fn is_send(&self) -> bool {
        ["write", "writev", "sendto", "sendmsg"].contains(&&*self.name) && self.file.starts_with("socket:")
    }

    fn is_on_segment(&self) -> bool {
        self.file.contains("/wal/") && self.file.ends_with("/db")
    }
}

/// `name(fd<file>, …) = result`
fn parse_call(text: &str, began: usize, ended: usize) -> Option<Call> {
    let (name, arguments) = text.split_once('(')?;
    let (arguments, result) = arguments.rsplit_once(" = ")?;
    let result = result.split_whitespace().next().and_then(|number| number.parse().ok());
    let (_, file) = arguments.split_once('<')?;
    let (file, rest) = file.split_once('>')?;
    Some(Call { began, ended, name: name.into(), file: file.into(), data: strings(rest), result })
}

/// The contents of every string literal, one after the other.
fn strings(text: &str) -> Vec<u8> {
    let mut data = Vec::new();
    let mut rest = text.as_bytes();
    while let Some(start) = rest.iter().position(|byte| *byte == b'"') {
        rest = &rest[start + 1..];
        while let Some((first, after)) = rest.split_first() {
            rest = after;
            match first {
                b'"' => break,
                b'\\' => data.push(escape(&mut rest)),
                byte => data.push(*byte),
            }
        }
    }
    data
}

/// Takes what follows a backslash off the front: a letter, or up to three octal digits.
fn escape(rest: &mut &[u8]) -> u8 {
    let octal = rest.iter().take(3).take_while(|byte| (b'0'..=b'7').contains(byte)).count();
    let (taken, after) = rest.split_at(octal.max(1).min(rest.len()));
    *rest = after;
    match taken {
        b"n" => b'\n',
        b"r" => b'\r',
        b"t" => b'\t',
        b"v" => 0x0b,
        b"f" => 0x0c,
        [letter] if octal == 0 => *letter,
        digits => digits.iter().fold(0, |value: u8, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
    }
}

/// What a read brought: as it is, and as the payload of a small WebSocket frame, which a client must mask.
fn unmasked(call: &Call) -> String {
    let mut bytes = call.data.clone();
    if let [0x82, length @ 0x80..=0xfe, rest @ ..] = &call.data[..] {
        let extended = if *length == 0xfe { 2 } else { 0 };
        if let Some((mask, payload)) = rest.get(extended..).and_then(|rest| rest.split_first_chunk::<4>()) {
            bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn contains(data: &[u8], text: &str) -> bool {
    data.windows(text.len()).any(|window| window == text.as_bytes())
}
