//! How far each topic of the spill is worked off: one small file, replaced as a whole. And which spill it is.
//!
//! ```text
//! state   JSON │ crc32c of it, 8 hexadecimal digits │ newline
//! id      written once, before the first event
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::wal::crc32c;

const NAME: &str = "state";
const NEW_NAME: &str = "state.new";
const ID_NAME: &str = "id";
const CHECKSUM_BYTES: usize = 9;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct State {
    /// No event had this number or a greater one. Of topics that are not named, only such numbers count.
    pub(super) next_number: u64,
    /// Files with smaller ids were written before the log was last read from its cursor on.
    pub(super) settled_file: u64,
    /// Everything in files before this one was durable,
    pub(super) durable_file: u64,
    /// and so many bytes of it itself.
    pub(super) durable_bytes: u64,
    /// The topics that had events.
    pub(super) topics: Vec<TopicState>,
}

/// One topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TopicState {
    pub(super) topic: String,
    /// The first number that is not worked off.
    pub(super) consumed: u64,
    /// The first number that no event had: if events before it are not found, they are missing.
    pub(super) end: u64,
    /// The first number that counts for nothing in files before [`State::settled_file`].
    pub(super) settled_end: u64,
}

/// Reads it; none if there is none, or a damaged one.
pub(super) fn load(directory: &Path) -> io::Result<Option<State>> {
    let bytes = match fs::read(directory.join(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    let state = decode(&bytes);
    if state.is_none() {
        tracing::error!("the state of the spill is damaged: events may be delivered again");
    }
    Ok(state)
}

fn decode(bytes: &[u8]) -> Option<State> {
    let (json, checksum) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM_BYTES)?)?;
    (checksum == checksum_of(json).as_bytes()).then(|| serde_json::from_slice(json).ok()).flatten()
}

fn checksum_of(json: &[u8]) -> String {
    format!("{:08x}\n", crc32c(&[json]))
}

/// What tells this spill from one that was lost, whose numbers it gives out again. Empty if it has none.
pub(super) fn load_id(directory: &Path) -> io::Result<String> {
    match fs::read_to_string(directory.join(ID_NAME)) {
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::InvalidData].contains(&error.kind()) => {
            Ok(String::new())
        }
        id => id,
    }
}

/// Gives it one. Durable, but for the directory's own name, when this returns.
pub(super) fn save_id(directory: &Path, id: &str) -> io::Result<()> {
    replace(directory, ID_NAME, &[id.as_bytes()])
}

/// Replaces it. Durable when this returns.
pub(super) fn save(directory: &Path, state: &State) -> io::Result<()> {
    let json = serde_json::to_vec(state).expect("its fields are strings and numbers");
    replace(directory, NAME, &[&json, checksum_of(&json).as_bytes()])
}

fn replace(directory: &Path, name: &str, parts: &[&[u8]]) -> io::Result<()> {
    let new = directory.join(NEW_NAME);
    let mut file = File::create(&new)?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    file.sync_all()?;
    fs::rename(new, directory.join(name))?;
    File::open(directory)?.sync_all()
}
