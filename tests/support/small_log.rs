//! A log that takes little disk and reaches its boundaries soon.

use std::path::Path;

use bytesize::ByteSize;
use ringtail::config::WalConfig;

/// The smallest segments, on however full a disk.
pub fn small_log(directory: &Path) -> WalConfig {
    WalConfig {
        directory: directory.into(),
        segment_bytes: ByteSize::mib(8),
        free_bytes_min: ByteSize::b(0),
        ..WalConfig::default()
    }
}
