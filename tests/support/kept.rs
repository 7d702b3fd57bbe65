//! A log's directory, left for whoever looks into a failure.

use tempfile::TempDir;

/// A directory that goes with its test, unless that fails.
pub struct KeptOnPanic(pub TempDir);

impl Drop for KeptOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.disable_cleanup(true);
            eprintln!("the log is kept in {}", self.0.path().display());
        }
    }
}
