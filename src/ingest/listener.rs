//! Accepts connections until told to stop, then waits for them to drain.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Ingest;
use crate::accept::accept;
use crate::config::IngestConfig;
use crate::descriptors;

/// Connections of a port on top of `connections_max`: REST, and WebSockets that are about to be refused.
const CONNECTIONS_HEADROOM: usize = 1024;
/// How long connections have to drain, on top of `write_timeout`.
const DRAIN_MIN: Duration = Duration::from_secs(5);

/// A connection's place among those that may be open; whoever holds its socket holds this.
pub(super) type Slot = Arc<OwnedSemaphorePermit>;

/// A port for clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    /// REST and WebSocket.
    Http,
    Grpc,
}

/// The places of connections on each port.
pub(super) struct Slots {
    /// By [`Port`].
    ports: [(usize, Arc<Semaphore>); 2],
}

impl Slots {
    pub fn new(config: &IngestConfig) -> Slots {
        Slots { ports: slots(config).map(|slots| (slots, Arc::new(Semaphore::new(slots)))) }
    }

    fn of(&self, port: Port) -> Arc<Semaphore> {
        self.ports[port as usize].1.clone()
    }

    /// More places, if the limit grew. If it shrank they stay: other limits refuse then.
    pub fn grow(&mut self, config: &IngestConfig) {
        for ((slots, port), wanted) in self.ports.iter_mut().zip(slots(config)) {
            port.add_permits(wanted.saturating_sub(*slots));
            *slots = wanted.max(*slots);
        }
    }
}

/// The places of each [`Port`]: as many as the configuration wants, or as there are descriptors for.
fn slots(config: &IngestConfig) -> [usize; 2] {
    let descriptors = descriptors::connections_max();
    let wanted = config.connections_max.saturating_add(CONNECTIONS_HEADROOM).min(Semaphore::MAX_PERMITS);
    let http = wanted.min(descriptors / 4 * 3);
    let grpc = wanted.min(descriptors - http);
    if config.connections_max > http {
        let (connections_max, open_files_max) = (config.connections_max, descriptors::limit());
        tracing::warn!(
            connections_max,
            open_files_max,
            http,
            grpc,
            "ingest.connections_max is more than the process may have open files for: each port takes no more than this"
        );
    }
    [http, grpc]
}

/// Accepts until `stop` fires. `connect` makes the task of one connection, which must end soon after
/// [`Ingest::stopping`] has fired.
pub(super) async fn serve<F>(
    ingest: Arc<Ingest>,
    port: Port,
    listener: TcpListener,
    stop: CancellationToken,
    connect: impl Fn(TcpStream, Slot, TaskTracker) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let tasks = TaskTracker::new();
    let slots = ingest.slots.lock().unwrap_or_else(PoisonError::into_inner).of(port);
    let connected = |stream, slot| {
        tasks.spawn(connect(stream, Arc::new(slot), tasks.clone()));
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept(&listener, &slots, connected) => {}
    }
    drop(listener);
    ingest.stopping.cancel();
    tasks.close();
    if timeout(ingest.config.write_timeout + DRAIN_MIN, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "connections did not drain in time");
    }
}
