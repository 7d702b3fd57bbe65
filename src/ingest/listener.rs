//! Accepts connections until told to stop, then waits for them to drain.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Ingest;

/// Connections of a port on top of `connections_max`: REST, and WebSockets that are about to be refused.
const CONNECTIONS_HEADROOM: usize = 1024;
/// How long to wait when a connection cannot be accepted, for lack of file descriptors say.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long connections have to drain, on top of `write_timeout`.
const DRAIN_MIN: Duration = Duration::from_secs(5);

/// A connection's place among those that may be open; whoever holds its socket holds this.
pub(super) type Slot = Arc<OwnedSemaphorePermit>;

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
    let slots = Arc::new(Semaphore::new(ingest.config.connections_max.saturating_add(CONNECTIONS_HEADROOM)));
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
