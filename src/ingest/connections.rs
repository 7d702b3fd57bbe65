//! Who is connected: one live WebSocket a client id, and no more than `connections_max`.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::HeaderMap;

use crate::batch::{CLIENT_NAME_BYTES_MAX, Client};
use crate::config::IngestConfig;

/// The live WebSocket connections.
#[derive(Clone)]
pub(super) struct Connections(Arc<Inner>);

struct Inner {
    limit: AtomicUsize,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    count: usize,
    clients: HashSet<Client>,
}

/// Why a connection is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ConnectionRefusal {
    /// `connections_max` are open.
    Limit,
    /// The client is connected already.
    Duplicate,
}

/// One live connection; its id is free again when this is dropped.
pub(super) struct LiveConnection {
    connections: Connections,
    client: Client,
}

impl Connections {
    pub fn new(limit: usize) -> Connections {
        Connections(Arc::new(Inner { limit: AtomicUsize::new(limit), live: Mutex::default() }))
    }

    /// Most connections that may be open.
    fn limit(&self) -> usize {
        self.0.limit.load(Ordering::Relaxed)
    }

    /// Changes that. Connections that are open stay so.
    pub fn set_limit(&self, limit: usize) {
        self.0.limit.store(limit, Ordering::Relaxed);
    }

    /// Registers a connection. Clients without an id do not collide with each other.
    pub fn open(&self, client: &Client) -> Result<LiveConnection, ConnectionRefusal> {
        let mut live = self.live();
        if live.count >= self.limit() {
            return Err(ConnectionRefusal::Limit);
        }
        if !client.id.is_empty() && !live.clients.insert(client.clone()) {
            return Err(ConnectionRefusal::Duplicate);
        }
        live.count += 1;
        Ok(LiveConnection { connections: self.clone(), client: client.clone() })
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LiveConnection {
    pub fn client(&self) -> &Client {
        &self.client
    }
}

impl Drop for LiveConnection {
    fn drop(&mut self) {
        let mut live = self.connections.live();
        live.count -= 1;
        live.clients.remove(&self.client);
    }
}

/// Why a request does not say who sends it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ClientError {
    /// The header is not text, or too long.
    #[error("header {header} is not UTF-8 of at most {CLIENT_NAME_BYTES_MAX} bytes")]
    Malformed {
        /// The header's name.
        header: String,
    },
}

/// Who sends, as the headers say; the id is empty without one.
pub(super) fn client(config: &IngestConfig, headers: &HeaderMap) -> Result<Client, ClientError> {
    let id = header(headers, &config.connection_id_header)?.unwrap_or_default();
    let group = match config.connection_group_header.as_str() {
        "" => None,
        name => header(headers, name)?.filter(|group| !group.is_empty()),
    };
    Ok(Client { group: group.unwrap_or(&config.connection_group_default).into(), id: id.into() })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, ClientError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    match std::str::from_utf8(value.as_bytes()) {
        Ok(value) if value.len() <= CLIENT_NAME_BYTES_MAX => Ok(Some(value)),
        _ => Err(ClientError::Malformed { header: name.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(id: &str) -> Client {
        Client { group: "g".into(), id: id.into() }
    }

    #[test]
    fn an_id_is_live_once_and_free_after() {
        let connections = Connections::new(3);
        let first = connections.open(&named("a")).ok().unwrap();
        assert_eq!(connections.open(&named("a")).err(), Some(ConnectionRefusal::Duplicate));
        let _second = connections.open(&named("")).ok().unwrap();
        let _third = connections.open(&named("")).ok().unwrap();
        assert_eq!(connections.open(&named("b")).err(), Some(ConnectionRefusal::Limit));
        drop(first);
        assert!(connections.open(&named("a")).is_ok());
    }

    #[test]
    fn headers_say_who_sends() {
        let config = IngestConfig { connection_group_header: "X-Group".into(), ..IngestConfig::default() };
        let mut headers = HeaderMap::new();
        assert_eq!(client(&config, &headers).unwrap(), Client { group: "--default--".into(), id: "".into() });
        headers.insert("x-user-id", "ü".parse().unwrap());
        headers.insert("x-group", "g".parse().unwrap());
        assert_eq!(client(&config, &headers).unwrap(), Client { group: "g".into(), id: "ü".into() });
        headers.insert("x-group", "g".repeat(CLIENT_NAME_BYTES_MAX + 1).parse().unwrap());
        assert!(client(&config, &headers).is_err());
    }
}
