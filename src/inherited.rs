//! Listening sockets that systemd holds, so that a restart refuses no connection: clients wait in the kernel's queue.
//!
//! They come from two places, and both hand them over in the same way (`LISTEN_FDS`): a socket unit, or the *file descriptor
//! store*, into which the service itself put them when it bound them. The configuration says where to listen: a
//! socket is used if its address is a configured one, and another one is put away.
//!
//! Outside systemd there are none, and nothing is kept.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use sd_notify::NotifyState;
use tracing::{debug, warn};

/// Names in the store.
const NAMES: [&str; 3] = ["http", "grpc", "admin"];

/// The sockets that this process was given.
#[derive(Debug, Default)]
pub struct Inherited(Vec<Socket>);

#[derive(Debug)]
struct Socket {
    name: String,
    address: SocketAddr,
    listener: TcpListener,
}

/// A listening socket, and whether systemd holds it already.
pub(crate) struct Listening {
    pub(crate) listener: TcpListener,
    kept_as: Option<String>,
}

impl Listening {
    /// A socket that this process has bound.
    pub(crate) fn bound(listener: TcpListener) -> Listening {
        Listening { listener, kept_as: None }
    }
}

impl Inherited {
    /// Takes what systemd passed to this process. What is no listening TCP socket is closed.
    ///
    /// # Safety
    /// To be called once in a process: afterwards the descriptors have other owners.
    pub unsafe fn take() -> Inherited {
        let passed: Vec<(RawFd, String)> = match sd_notify::listen_fds_with_names() {
            Ok(passed) => passed.collect(),
            Err(error) => {
                warn!(%error, "systemd's sockets are not used");
                return Inherited::default();
            }
        };
        let sockets = passed.into_iter().filter_map(|(fd, name)| {
            // SAFETY: systemd passed it to this process, and nobody else has taken it, says the caller.
            let listener = TcpListener::from(unsafe { OwnedFd::from_raw_fd(fd) });
            let listens = socket2::SockRef::from(&listener).is_listener().unwrap_or(false);
            let address = listener.local_addr().ok().filter(|_| listens);
            if address.is_none() {
                warn!(name, "systemd passed something that is no listening TCP socket");
            }
            Some(Socket { name, address: address?, listener })
        });
        Inherited(sockets.collect())
    }

    /// The socket that listens on `address`, if there is one.
    pub(crate) fn claim(&mut self, address: SocketAddr) -> Option<Listening> {
        let at = self.0.iter().position(|socket| is_same(socket.address, address))?;
        let Socket { name, listener, .. } = self.0.swap_remove(at);
        if let Err(error) = listener.set_nonblocking(true) {
            warn!(%error, name, "systemd's socket is not used");
            return None;
        }
        Some(Listening { listener, kept_as: Some(name) })
    }

    /// Leaves the rest. Says which socket units have addresses that the configuration has not.
    pub(crate) fn discard(self) {
        for Socket { name, address, .. } in self.0 {
            if !NAMES.contains(&name.as_str()) {
                warn!(unit = name, %address, "systemd listens on an address that the configuration has not, nobody answers there");
            }
        }
    }

    #[cfg(test)]
    fn of(sockets: Vec<(&str, TcpListener)>) -> Inherited {
        let socket = |(name, listener): (&str, TcpListener)| {
            let address = listener.local_addr().unwrap();
            Socket { name: name.into(), address, listener }
        };
        Inherited(sockets.into_iter().map(socket).collect())
    }
}

/// Hands the sockets to systemd's file descriptor store, for the next process of this service: HTTP, gRPC, admin. Those that it
/// has already stay; others that it has from this service go.
pub(crate) fn keep(sockets: [&Listening; 3]) {
    let as_wanted = |(name, socket): (&str, &&Listening)| {
        socket.kept_as.as_deref().is_some_and(|kept| kept == name || !NAMES.contains(&kept))
    };
    if NAMES.into_iter().zip(&sockets).all(as_wanted) {
        return;
    }
    for name in NAMES {
        notify(sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]));
    }
    for (name, socket) in NAMES.into_iter().zip(sockets) {
        // A socket unit keeps its own.
        if socket.kept_as.as_deref().is_none_or(|kept| NAMES.contains(&kept)) {
            let state = [NotifyState::FdStore, NotifyState::FdName(name)];
            notify(sd_notify::notify_with_fds(&state, &[socket.listener.as_fd()]));
        }
    }
}

fn notify(result: std::io::Result<()>) {
    if let Err(error) = result {
        debug!(%error, "systemd does not keep the sockets");
    }
}

/// Whether what listens on `found` serves those who come to `wanted`. systemd binds a bare port as `[::]`, for IPv4 as well.
fn is_same(found: SocketAddr, wanted: SocketAddr) -> bool {
    let any = found.ip().is_unspecified() && found.is_ipv6() && wanted.ip().is_unspecified();
    found.port() == wanted.port() && (found.ip() == wanted.ip() || any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_used_only_where_the_configuration_says() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut inherited = Inherited::of(vec![("http", listener)]);
        let other = SocketAddr::new([127, 0, 0, 2].into(), address.port());
        assert!(inherited.claim(other).is_none());
        let claimed = inherited.claim(address).unwrap();
        assert_eq!(claimed.listener.local_addr().unwrap(), address);
        assert_eq!(claimed.kept_as.as_deref(), Some("http"));
        assert!(inherited.claim(address).is_none());
    }

    #[test]
    fn a_bare_port_of_a_socket_unit_serves_both_families() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(is_same(address("[::]:8080"), address("0.0.0.0:8080")));
        assert!(!is_same(address("0.0.0.0:8080"), address("[::]:8080")));
        assert!(!is_same(address("[::]:8080"), address("127.0.0.1:8080")));
    }
}
