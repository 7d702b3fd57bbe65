//! Sizes in the configuration: `"64MiB"`, or a plain number of bytes. Written back without rounding.

use std::fmt;

use bytesize::ByteSize;
use serde::de::{Deserializer, Error, Unexpected, Visitor};
use serde::ser::Serializer;

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// The size in the largest unit that needs no fraction.
pub(super) fn exact(size: ByteSize) -> String {
    let bytes = size.as_u64();
    let unit = UNITS.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit));
    let (name, unit) = unit.unwrap_or(&("B", 1));
    format!("{}{name}", bytes / unit)
}

pub(super) fn serialize<S: Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&exact(*size))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
    deserializer.deserialize_any(SizeVisitor)
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as \"64MiB\", or a number of bytes")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<ByteSize, E> {
        let bytes = u64::try_from(value).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))?;
        Ok(ByteSize::b(bytes))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<ByteSize, E> {
        Ok(ByteSize::b(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<ByteSize, E> {
        value.trim().parse().map_err(|_| E::invalid_value(Unexpected::Str(value), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_sizes_are_exact() {
        for (bytes, text) in
            [(0, "0B"), (1023, "1023B"), (1 << 26, "64MiB"), (3 << 30, "3GiB"), (1_500_000, "1500000B")]
        {
            assert_eq!(exact(ByteSize::b(bytes)), text);
            assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize::b(bytes)));
        }
    }
}
