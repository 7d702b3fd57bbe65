//! Accepts connections until told to stop, then waits for them to drain.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Ingest;
use crate::config::IngestConfig;

/// Connections of a port on top of `connections_max`: REST, and WebSockets that are about to be refused.
const CONNECTIONS_HEADROOM: usize = 1024;
/// How long to wait when a connection cannot be accepted, for lack of file descriptors say.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long connections have to drain, on top of `write_timeout`.
const DRAIN_MIN: Duration = Duration::from_secs(5);

/// A connection's place among those that may be open; whoever holds its socket holds this.
pub(super) type Slot = Arc<OwnedSemaphorePermit>;

/// The places of connections, for each port as many.
pub(super) struct Slots {
    each: usize,
    ports: Vec<Arc<Semaphore>>,
}

impl Slots {
    pub fn new(config: &IngestConfig) -> Slots {
        Slots { each: slots(config), ports: Vec::new() }
    }

    fn of_a_port(&mut self) -> Arc<Semaphore> {
        let port = Arc::new(Semaphore::new(self.each));
        self.ports.push(port.clone());
        port
    }

    /// More places, if the limit grew. If it shrank they stay: other limits refuse then.
    pub fn grow(&mut self, config: &IngestConfig) {
        let more = slots(config).saturating_sub(self.each);
        self.ports.iter().for_each(|port| port.add_permits(more));
        self.each += more;
    }
}

fn slots(config: &IngestConfig) -> usize {
    config.connections_max.saturating_add(CONNECTIONS_HEADROOM).min(Semaphore::MAX_PERMITS)
}

/// Accepts until `stop` fires. `connect` makes the task of one connection, which must end soon after
/// [`Ingest::stopping`] has fired.
pub(super) async fn serve<F>(
    ingest: Arc<Ingest>,
    listener: TcpListener,
    stop: CancellationToken,
    connect: impl Fn(TcpStream, Slot, TaskTracker) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let tasks = TaskTracker::new();
    let slots = ingest.slots.lock().unwrap_or_else(PoisonError::into_inner).of_a_port();
    let accept = async {
        let mut failing = false;
        loop {
            // A connection beyond the bound waits in the kernel's queue.
            let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    failing = false;
                    // Answers are small and written whole; a stream without NODELAY still works.
                    let _ = stream.set_nodelay(true);
                    tasks.spawn(connect(stream, Arc::new(slot), tasks.clone()));
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot accept connections, trying again");
                    }
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept => {}
    }
    drop(listener);
    ingest.stopping.cancel();
    tasks.close();
    if timeout(ingest.config.write_timeout + DRAIN_MIN, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "connections did not drain in time");
    }
}
