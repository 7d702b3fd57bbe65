//! File descriptors: how many the process may have, and how many of them clients may take.
//!
//! What the log and the way to Kafka need is never left to clients: without it no segment could be made or read.

use rlimit::Resource;

/// For the log, Kafka's brokers and the admin endpoints.
const RESERVED: usize = 320;
/// Connections that there is always room for.
const CONNECTIONS_MIN: usize = 32;

/// Raises the limit of the process to the highest that it may have. If that fails, there are as many as before.
pub fn raise_limit() {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
}

/// How many the process may have open.
pub fn limit() -> usize {
    let soft = rlimit::getrlimit(Resource::NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    usize::try_from(soft).unwrap_or(usize::MAX)
}

/// How many connections of clients the limit has room for.
pub(crate) fn connections_max() -> usize {
    limit().saturating_sub(RESERVED).max(CONNECTIONS_MIN)
}
