//! Accepts connections, within a bound.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long to wait when a connection cannot be accepted, for lack of file descriptors say.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Accepts for ever, one connection for each of `slots`: one beyond them waits in the kernel's queue. Whoever holds the
/// socket must hold its place as well.
pub(crate) async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    mut connected: impl FnMut(TcpStream, OwnedSemaphorePermit),
) {
    let mut failing = false;
    loop {
        let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                failing = false;
                // Answers are small and written whole; a stream without NODELAY still works.
                let _ = stream.set_nodelay(true);
                connected(stream, slot);
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept connections, trying again");
                }
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
