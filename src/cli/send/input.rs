//! Lines of files or stdin, read by a thread of their own into a short queue.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::Context;
use bytes::Bytes;
use tokio::sync::mpsc;

/// Longest line, in bytes: what the largest batch of any server can hold. A longer one is skipped and reported.
pub const LINE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Lines are handed over in groups of about so many bytes, which spares wake-ups.
const GROUP_BYTES: usize = 64 * 1024;

/// Groups that wait to be sent.
const QUEUED_GROUPS_MAX: usize = 2;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Without its end.
    pub event: Bytes,
    /// Bytes that it took in the input, its end and empty lines before it included.
    pub input_bytes: u64,
}

/// What was opened.
pub struct Input {
    sources: VecDeque<Source>,
    /// Size of it all; `None` if stdin or a pipe is among it.
    pub bytes_total: Option<u64>,
}

struct Source {
    name: String,
    reader: Box<dyn Read + Send>,
}

/// Why a line could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Longer than [`LINE_BYTES_MAX`]. The lines behind it can be read.
    #[error("{source_name}: line {line_number} is longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong {
        /// File.
        source_name: String,
        /// Counting from 1.
        line_number: u64,
    },
    /// Nothing behind it can be read.
    #[error("read {source_name}")]
    Io {
        /// File.
        source_name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ReadError {
    /// Whether it concerns one line only, so that reading goes on.
    pub fn is_one_line(&self) -> bool {
        matches!(self, ReadError::LineTooLong { .. })
    }
}

/// A group of lines, or why there is none.
pub type Group = Result<Vec<Line>, ReadError>;

impl Input {
    /// Opens every file before anything is sent. None: stdin.
    ///
    /// # Errors
    /// If one of them cannot be opened.
    pub fn open(files: &[PathBuf]) -> anyhow::Result<Input> {
        let mut input = Input { sources: VecDeque::new(), bytes_total: Some(0) };
        let stdin = [PathBuf::from("-")];
        for path in if files.is_empty() { &stdin } else { files } {
            input.add(path).with_context(|| format!("open {}", path.display()))?;
        }
        Ok(input)
    }

    fn add(&mut self, path: &Path) -> io::Result<()> {
        if path == Path::new("-") {
            self.bytes_total = None;
            self.sources.push_back(Source { name: "stdin".into(), reader: Box::new(io::stdin()) });
            return Ok(());
        }
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        self.bytes_total = self.bytes_total.filter(|_| metadata.is_file()).map(|total| total + metadata.len());
        self.sources.push_back(Source { name: path.display().to_string(), reader: Box::new(file) });
        Ok(())
    }
}

/// Starts the thread. It ends with the input, or once nobody takes its lines any more.
///
/// # Errors
/// If the thread cannot be started.
pub fn read_in_background(input: Input) -> anyhow::Result<mpsc::Receiver<Group>> {
    let (groups, lines) = mpsc::channel(QUEUED_GROUPS_MAX);
    std::thread::Builder::new()
        .name("read-input".into())
        .spawn(move || {
            for Source { name, reader } in input.sources {
                if read_source(&name, BufReader::with_capacity(GROUP_BYTES, reader), &groups).is_err() {
                    return;
                }
            }
        })
        .context("start reader thread")?;
    Ok(lines)
}

/// Reading is over: an error was handed over, or nobody takes any more lines.
struct Stopped;

fn read_source(name: &str, mut reader: impl BufferedRead, groups: &mpsc::Sender<Group>) -> Result<(), Stopped> {
    let hand_over = |group: Group| groups.blocking_send(group).map_err(|_| Stopped);
    let mut group = Vec::new();
    let (mut group_bytes, mut skipped_bytes) = (0, 0);
    let mut line_number = 0;
    loop {
        line_number += 1;
        let mut line = Vec::new();
        let read = read_line(&mut reader, &mut line);
        let input_bytes = match read {
            Ok(0) => return hand_over(Ok(group)),
            Ok(input_bytes) => input_bytes,
            Err(source) => {
                hand_over(Ok(group))?;
                hand_over(Err(ReadError::Io { source_name: name.into(), source }))?;
                return Err(Stopped);
            }
        };
        if line.len() > LINE_BYTES_MAX {
            hand_over(Ok(std::mem::take(&mut group)))?;
            hand_over(Err(ReadError::LineTooLong { source_name: name.into(), line_number }))?;
        } else if line.is_empty() {
            skipped_bytes += input_bytes;
        } else {
            group_bytes += line.len();
            group.push(Line { event: line.into(), input_bytes: input_bytes + std::mem::take(&mut skipped_bytes) });
        }
        // The next read may wait for a slow writer: nobody else must wait with it.
        if !group.is_empty() && (group_bytes >= GROUP_BYTES || !reader.buffered().contains(&b'\n')) {
            hand_over(Ok(std::mem::take(&mut group)))?;
            group_bytes = 0;
        }
    }
}

/// Reads one line without its end into `line` and returns the bytes it took, 0 at the end of the input. Of a line that is
/// too long one byte more than [`LINE_BYTES_MAX`] is kept and the rest skipped.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<u64> {
    let mut input_bytes = reader.by_ref().take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', line)? as u64;
    if line.ends_with(b"\n") {
        line.pop();
        if line.ends_with(b"\r") {
            line.pop();
        }
    } else if line.len() > LINE_BYTES_MAX {
        input_bytes += reader.skip_until(b'\n')? as u64;
    }
    Ok(input_bytes)
}

/// A `BufRead` that shows what it holds without reading.
trait BufferedRead: BufRead {
    fn buffered(&self) -> &[u8];
}

impl<R: Read> BufferedRead for BufReader<R> {
    fn buffered(&self) -> &[u8] {
        self.buffer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(text: &'static [u8]) -> Vec<Group> {
        let source = Source { name: "test".into(), reader: Box::new(text) };
        let input = Input { sources: [source].into(), bytes_total: None };
        let mut lines = read_in_background(input).unwrap();
        let mut groups = Vec::new();
        while let Some(group) = lines.recv().await {
            groups.push(group);
        }
        groups
    }

    #[tokio::test]
    async fn lines_lose_their_ends_and_empty_ones_are_skipped() {
        let groups = read(b"\none\r\n\n two \n\nthree").await;
        let lines: Vec<Line> = groups.into_iter().flat_map(Result::unwrap).collect();
        let line = |event: &'static str, input_bytes| Line { event: event.into(), input_bytes };
        assert_eq!(lines, [line("one", 6), line(" two ", 7), line("three", 6)]);
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_is_skipped_and_reported() {
        let mut text = b"before\n".to_vec();
        text.extend(vec![b'x'; LINE_BYTES_MAX + 1]);
        text.extend(b"\nafter\n");
        let groups = read(text.leak()).await;
        let mut events = Vec::new();
        let mut errors = Vec::new();
        for group in groups {
            match group {
                Ok(lines) => events.extend(lines.into_iter().map(|line| line.event)),
                Err(error) => errors.push(error.to_string()),
            }
        }
        assert_eq!(events, ["before", "after"]);
        assert_eq!(errors, [format!("test: line 2 is longer than {LINE_BYTES_MAX} bytes")]);
    }

    #[tokio::test]
    async fn a_line_of_the_longest_length_is_taken() {
        let mut text = vec![b'x'; LINE_BYTES_MAX];
        text.extend(b"\nafter");
        let lines: Vec<Line> = read(text.leak()).await.into_iter().flat_map(Result::unwrap).collect();
        assert_eq!(lines.iter().map(|line| line.event.len()).collect::<Vec<_>>(), [LINE_BYTES_MAX, 5]);
    }

    #[tokio::test]
    async fn many_lines_come_in_groups() {
        let text = "0123456789\n".repeat(20_000);
        let groups = read(text.leak().as_bytes()).await;
        assert!(groups.len() < 10, "{}", groups.len());
        assert_eq!(groups.into_iter().map(|group| group.unwrap().len()).sum::<usize>(), 20_000);
    }
}
