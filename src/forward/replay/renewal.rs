//! Credentials that change while the service runs: the producer is replaced when a file that holds one does.
//!
//! librdkafka reads certificates, keys and passwords once. A file is looked at every [`LOOK_INTERVAL`]; when it has other contents
//! and a producer can be made with them, nothing more is sent, what the client holds is waited for, and then the producer is
//! replaced. With contents that do not do (a certificate whose key is not there yet) the old producer stays, and they are tried
//! again.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::super::backoff::Every;
use super::super::kafka::{self, Properties};
use super::super::properties::read_password;
use super::Replay;

/// How often files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Longest wait for what the client holds: what is not reported by then is sent again.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// Properties that name a file.
const FILES: &[&str] =
    &["ssl.ca.location", "ssl.certificate.location", "ssl.crl.location", "ssl.key.location", "ssl.keystore.location"];

const PASSWORD: &str = "sasl.password";

/// See the module.
pub(in crate::forward) struct Renewal {
    files: Vec<Watched>,
    password_file: Option<PathBuf>,
    look: Every,
    /// New contents were found, and did not do.
    told: bool,
    /// The producer is replaced when it holds nothing any more, or then.
    drain_until: Option<Instant>,
}

struct Watched {
    path: PathBuf,
    seen: Option<Stamp>,
    contents: Option<blake3::Hash>,
}

/// What changes when a file is written or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Renewal {
    /// Takes note of what the files hold now. To be made before the first producer.
    pub(in crate::forward) fn new(properties: &Properties, password_file: &Path) -> Renewal {
        let paths = properties.iter().filter(|(name, _)| FILES.contains(&name.as_str())).map(|(_, path)| path);
        let mut files: Vec<Watched> =
            paths.map(|path| Watched { path: path.into(), seen: None, contents: None }).collect();
        for file in &mut files {
            file.look();
        }
        let password_file = (!password_file.as_os_str().is_empty()).then(|| password_file.to_owned());
        Renewal { files, password_file, look: Every::new(LOOK_INTERVAL), told: false, drain_until: None }
    }

    /// Whether nothing more is to be sent with this producer.
    pub(super) fn is_draining(&self) -> bool {
        self.drain_until.is_some()
    }

    /// The names of the files with new contents. `properties` gets a new password.
    fn changed(&mut self, properties: &mut Properties) -> Vec<String> {
        let mut changed = Vec::new();
        for file in &mut self.files {
            if file.look() {
                changed.push(file.path.display().to_string());
            }
        }
        if let Some(path) = &self.password_file
            // Between two versions there may be none.
            && let Ok(password) = read_password(path)
            && let Some((_, known)) = properties.iter_mut().find(|(name, _)| name == PASSWORD)
            && *known != password
        {
            *known = password;
            changed.push(path.display().to_string());
        }
        changed
    }
}

impl Watched {
    /// Whether it has other contents than at the last call.
    fn look(&mut self) -> bool {
        let Ok(metadata) = fs::metadata(&self.path) else { return false };
        let stamp = Stamp::of(&metadata);
        if self.seen == Some(stamp) {
            return false;
        }
        let Ok(contents) = fs::read(&self.path) else { return false };
        self.seen = Some(stamp);
        let before = self.contents.replace(blake3::hash(&contents));
        before != self.contents
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Stamp {
        Stamp { inode: metadata.ino(), bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

impl Replay {
    /// Looks for new credentials, and replaces the producer when it holds nothing any more.
    pub(super) fn renew(&mut self, now: Instant) {
        if let Some(until) = self.renewal.drain_until {
            self.pause_transactions();
            let is_empty = self.lanes.in_client() == 0 && self.is_committed();
            if is_empty || now >= until || !self.connection.is_up() {
                self.renewal.drain_until = None;
                self.drop_producer(now);
            }
            return;
        }
        if !self.renewal.look.is_due(now) {
            return;
        }
        let mut properties = self.properties.clone();
        let changed = self.renewal.changed(&mut properties);
        if changed.is_empty() && !self.renewal.told {
            return;
        }
        if let Err(error) = kafka::try_properties(&properties) {
            if !changed.is_empty() {
                warn!(?changed, %error, "changed credentials cannot be used yet, kafka is used with the old ones");
                self.shared.set_last_error(error.to_string(), None);
            }
            self.renewal.told = true;
            return;
        }
        info!(?changed, "credentials have changed, replacing the kafka producer");
        self.properties = properties;
        self.renewal.told = false;
        self.renewal.drain_until = Some(now + DRAIN_PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_other_contents_are_a_change() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, password) = (directory.path().join("certificate"), directory.path().join("password"));
        fs::write(&certificate, "one").unwrap();
        fs::write(&password, "first\n").unwrap();
        let text = certificate.display().to_string();
        let mut properties = vec![("ssl.certificate.location".into(), text.clone()), (PASSWORD.into(), "first".into())];
        let mut renewal = Renewal::new(&properties, &password);
        assert!(renewal.changed(&mut properties).is_empty());
        // Written again, or replaced by its like.
        fs::write(directory.path().join("new"), "one").unwrap();
        fs::rename(directory.path().join("new"), &certificate).unwrap();
        assert!(renewal.changed(&mut properties).is_empty());
        fs::remove_file(&certificate).unwrap();
        assert!(renewal.changed(&mut properties).is_empty());
        fs::write(&certificate, "another").unwrap();
        assert_eq!(renewal.changed(&mut properties), [text]);
        assert!(renewal.changed(&mut properties).is_empty());
        fs::write(&password, "second").unwrap();
        assert_eq!(renewal.changed(&mut properties), [password.display().to_string()]);
        assert_eq!(properties[1].1, "second");
        assert!(renewal.changed(&mut properties).is_empty());
    }
}
