//! Where a client connects: a URL whose scheme picks the protocol.

use std::fmt;
use std::str::FromStr;

/// Path of WebSocket and REST when the URL names none.
const DEFAULT_PATH: &str = "/api/v1/events";

/// A server's address: `ws://host:port[/path]`, `http://host:port[/path]` or `grpc://host:port`.
///
/// Without a port, `ws` and `http` mean 8080 and `grpc` 8081, the ports that Ringtail listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// How to talk to it.
    pub protocol: EndpointProtocol,
    /// `host:port`; an IPv6 address is in brackets.
    pub authority: String,
    /// Path and query, starting with `/`. Empty for gRPC.
    pub path: String,
}

/// How to talk to an [`Endpoint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointProtocol {
    /// `ws://`
    WebSocket,
    /// `http://`, with protobuf bodies.
    Rest,
    /// `grpc://`
    Grpc,
}

/// Why a URL is not an [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It is no URL, or has no host.
    #[error("not a URL such as ws://127.0.0.1:8080, http://127.0.0.1:8080 or grpc://127.0.0.1:8081")]
    Syntax,
    /// Another scheme.
    #[error("scheme {scheme:?} is not supported: use ws, http or grpc (TLS is not supported)")]
    Scheme {
        /// What was given.
        scheme: String,
    },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(url: &str) -> Result<Endpoint, EndpointError> {
        let uri: hyper::Uri = url.parse().map_err(|_| EndpointError::Syntax)?;
        let (protocol, default_port) = match uri.scheme_str() {
            Some("ws") => (EndpointProtocol::WebSocket, 8080),
            Some("http") => (EndpointProtocol::Rest, 8080),
            Some("grpc") => (EndpointProtocol::Grpc, 8081),
            Some(scheme) => return Err(EndpointError::Scheme { scheme: scheme.into() }),
            None => return Err(EndpointError::Syntax),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or(EndpointError::Syntax)?;
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(default_port));
        let path = match (protocol, uri.path_and_query().map(|path| path.as_str())) {
            (EndpointProtocol::Grpc, _) => "",
            (_, None | Some("/")) => DEFAULT_PATH,
            (_, Some(path)) => path,
        };
        Ok(Endpoint { protocol, authority, path: path.into() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.protocol {
            EndpointProtocol::WebSocket => "ws",
            EndpointProtocol::Rest => "http",
            EndpointProtocol::Grpc => "grpc",
        };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_urls() {
        for (url, expected) in [
            ("ws://edge:9000", "ws://edge:9000/api/v1/events"),
            ("ws://edge", "ws://edge:8080/api/v1/events"),
            ("ws://edge:9000/other?a=b", "ws://edge:9000/other?a=b"),
            ("http://[::1]:9000/", "http://[::1]:9000/api/v1/events"),
            ("grpc://edge", "grpc://edge:8081"),
        ] {
            assert_eq!(url.parse::<Endpoint>().unwrap().to_string(), expected);
        }
    }

    #[test]
    fn refuses_what_it_cannot_reach() {
        assert_eq!("edge:9000".parse::<Endpoint>(), Err(EndpointError::Syntax));
        assert_eq!("/api".parse::<Endpoint>(), Err(EndpointError::Syntax));
        assert_eq!("wss://edge".parse::<Endpoint>(), Err(EndpointError::Scheme { scheme: "wss".into() }));
    }
}
