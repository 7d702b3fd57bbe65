//! The control socket: the admin endpoints, the parked events, the backlog and what a reload would do on `<wal.directory>/control.sock`, for the commands that
//! work on a running service. Mode 0600: payloads are for the owner of the log.
//!
//! The socket is bound under another name and moved into place, so that it is never open to others, and a stale one is
//! replaced. Only the process that holds the log's lock may bind it.

use std::convert::Infallible;
use std::fs::{self, File, Permissions};
use std::future::IntoFuture;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Admin;
use super::backlog::PeekFilter;
use super::parked::{ParkedCommand, ParkedDrop, ParkedList, ParkedRequeue};
use crate::config::{Changes, FileTexts};

const SOCKET: &str = "control.sock";

/// Where is asked what a reload would do.
const FORETELL: &str = "/reload/foretell";

/// How long the service may take to answer, and between two pieces of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Lines of an answer made ahead of the client.
const LINES_AHEAD: usize = 4;

/// Largest arguments of a command.
const COMMAND_BYTES_MAX: usize = 16 << 20;

/// Why a running service gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket cannot be used.
    #[error("cannot talk to the service on {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The service broke off.
    #[error("the service broke off its answer")]
    Broken(#[from] hyper::Error),
    /// The service does not answer.
    #[error("the service did not answer within {} seconds", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// The service is of another version.
    #[error("the service's answer is not understood")]
    Meaningless(#[source] serde_json::Error),
    /// The service answered with an error.
    #[error("the service answered {status}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
}

/// The bound control socket. Its file is removed when this, or what serves it, is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A stale file costs nothing: clients find nobody behind it, the next start replaces it.
        let _ = fs::remove_file(&self.0);
    }
}

impl ControlSocket {
    /// Binds the socket in the log's directory, in place of one that a dead process left. Must be called inside a runtime,
    /// by the process that has the log open.
    ///
    /// # Errors
    /// The directory is not writable, or its file system has no sockets.
    pub fn bind(directory: &Path) -> io::Result<ControlSocket> {
        let workshop = directory.join(".control");
        remove_directory(&workshop)?;
        fs::DirBuilder::new().mode(0o700).create(&workshop)?;
        let open = File::open(&workshop)?;
        let listener = UnixListener::bind(short_path(&open))?;
        fs::set_permissions(workshop.join(SOCKET), Permissions::from_mode(0o600))?;
        let path = directory.join(SOCKET);
        fs::rename(workshop.join(SOCKET), &path)?;
        remove_directory(&workshop)?;
        Ok(ControlSocket { listener, file: SocketFile(path) })
    }

    /// Serves until `stop` is cancelled.
    ///
    /// # Errors
    /// The listener fails for good.
    pub async fn serve(self, admin: Admin, stop: CancellationToken) -> io::Result<()> {
        let ControlSocket { listener, file: _file } = self;
        let router = super::routes().route("/backlog", routing::get(backlog));
        let router = router.route(FORETELL, routing::post(foretell));
        let router = parked_command::<ParkedList>(router);
        let router = parked_command::<ParkedDrop>(router);
        let router = parked_command::<ParkedRequeue>(router);
        // Thousands of ids are a command too.
        let router = router.layer(DefaultBodyLimit::max(COMMAND_BYTES_MAX)).with_state(admin);
        tokio::select! {
            result = axum::serve(listener, router).into_future() => result,
            () = stop.cancelled() => Ok(()),
        }
    }
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Path of the socket in an open directory. Short, because the path of a socket may have 107 bytes only.
fn short_path(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))
}

/// Adds what is to be done with parked events. It stops when the client is gone.
fn parked_command<C: ParkedCommand>(router: Router<Admin>) -> Router<Admin> {
    router.route(
        C::PATH,
        routing::post(async |State(admin): State<Admin>, Json(command): Json<C>| {
            answer(move |send| {
                let (store, requeue) = (admin.source.parked(), admin.source.requeue());
                command.run(&store, &*requeue, &mut |line| {
                    let mut line = serde_json::to_vec(&line).expect("a line has only string keys");
                    line.push(b'\n');
                    send(line)
                });
            })
        }),
    )
}

/// The pending batches as JSON lines, read while the client takes them.
async fn backlog(State(admin): State<Admin>, Query(filter): Query<PeekFilter>) -> Response {
    answer(move |send| {
        let _ = filter.lines(admin.source.backlog(filter.payloads)).try_for_each(send);
    })
}

/// What a reload would do, or why it would be refused.
async fn foretell(State(admin): State<Admin>, Json(files): Json<FileTexts>) -> Response {
    let foretold = tokio::task::spawn_blocking(move || admin.source.foretell_reload(&files)).await;
    match foretold.expect("loading a configuration does not panic") {
        Ok(changes) => Json(changes).into_response(),
        Err(error) => (StatusCode::UNPROCESSABLE_ENTITY, error.to_string()).into_response(),
    }
}

/// Makes lines on a thread that may block, as far ahead as the client lets it. One that takes nothing for long ends it: what
/// is being read is not held open for ever.
fn answer(work: impl FnOnce(&mut dyn FnMut(Vec<u8>) -> ControlFlow<()>) + Send + 'static) -> Response {
    let (lines, mut ahead) = mpsc::channel::<Vec<u8>>(LINES_AHEAD);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        work(&mut |line| match runtime.block_on(lines.send_timeout(line, ANSWER_TIMEOUT)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()), // the client is gone, or as good as gone
        });
    });
    let body = stream::poll_fn(move |context| ahead.poll_recv(context).map(|line| line.map(Ok::<_, Infallible>)));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(body)).into_response()
}

/// The service's answer, as it arrives.
#[derive(Debug)]
pub struct Answer(Incoming);

impl Answer {
    /// The next piece; none at the end.
    ///
    /// # Errors
    /// [`ControlError::Broken`], [`ControlError::Timeout`]
    pub async fn next(&mut self) -> Result<Option<Bytes>, ControlError> {
        loop {
            match in_time(self.0.frame()).await? {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`Answer::next`].
    pub async fn all(mut self) -> Result<Vec<u8>, ControlError> {
        let mut all = Vec::new();
        while let Some(piece) = self.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }
}

/// Asks the service that runs on `directory` (`wal.directory`), for example for `/status`. None if no service runs there.
///
/// # Errors
/// [`ControlError`]
pub async fn get(directory: &Path, path_and_query: &str) -> Result<Option<Answer>, ControlError> {
    let request = Request::get(path_and_query).body(Full::default());
    ask(directory, request.expect("the caller gives a valid path")).await
}

/// What a reload of a service would do.
#[derive(Debug)]
pub enum Foretold {
    /// It would be taken.
    Taken(Changes),
    /// It would be refused, for this reason.
    Refused(String),
}

/// Asks the service that runs on `directory` what a reload would do, were these the files of its configuration. It goes by its own
/// environment and credentials. None if no service runs there.
///
/// # Errors
/// [`ControlError`]
pub async fn foretell_reload(directory: &Path, files: &FileTexts) -> Result<Option<Foretold>, ControlError> {
    let answer = match post(directory, FORETELL, files).await {
        Ok(answer) => answer,
        Err(ControlError::Refused { status: 422, message }) => return Ok(Some(Foretold::Refused(message))),
        Err(error) => return Err(error),
    };
    let Some(answer) = answer else { return Ok(None) };
    let changes = serde_json::from_slice(&answer.all().await?).map_err(ControlError::Meaningless)?;
    Ok(Some(Foretold::Taken(changes)))
}

/// Tells the service that runs on `directory` to do something with parked events. None if no service runs there.
///
/// # Errors
/// [`ControlError`]
pub async fn command<C: ParkedCommand>(directory: &Path, command: &C) -> Result<Option<Answer>, ControlError> {
    post(directory, C::PATH, command).await
}

async fn post(directory: &Path, path: &str, body: &impl Serialize) -> Result<Option<Answer>, ControlError> {
    let body = serde_json::to_vec(body).expect("what is asked has only string keys");
    let request = Request::post(path).header(header::CONTENT_TYPE, "application/json").body(Full::from(body));
    ask(directory, request.expect("the path is valid")).await
}

async fn ask(directory: &Path, mut request: Request<Full<Bytes>>) -> Result<Option<Answer>, ControlError> {
    let socket = directory.join(SOCKET);
    let stream = match connect(directory).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(source) => return Err(ControlError::Connect { socket, source }),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    request.headers_mut().insert(header::HOST, HeaderValue::from_static("ringtail"));
    let response = in_time(sender.send_request(request)).await??;
    let status = response.status();
    let answer = Answer(response.into_body());
    if status == StatusCode::OK {
        return Ok(Some(answer));
    }
    let message = String::from_utf8_lossy(&answer.all().await?).trim_end().to_owned();
    Err(ControlError::Refused { status: status.as_u16(), message })
}

async fn connect(directory: &Path) -> io::Result<UnixStream> {
    let open = File::open(directory)?;
    UnixStream::connect(short_path(&open)).await
}

async fn in_time<T>(answer: impl Future<Output = T>) -> Result<T, ControlError> {
    tokio::time::timeout(ANSWER_TIMEOUT, answer).await.map_err(|_| ControlError::Timeout)
}
