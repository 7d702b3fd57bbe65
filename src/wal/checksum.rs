//! CRC-32C, by which the log knows again whatever it has written.

use bytes::BufMut;

/// Of all `pieces`, one after the other.
pub(crate) fn crc32c(pieces: &[&[u8]]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    pieces.iter().for_each(|piece| digest.update(piece));
    u32::try_from(digest.finalize()).expect("CRC-32C has 32 bits")
}

/// Puts the checksum of `value` at its end, little-endian.
pub(super) fn append_checksum(value: &mut Vec<u8>) {
    value.put_u32_le(crc32c(&[value]));
}

/// What stands before the checksum at the end of `value`; none if they do not match.
pub(super) fn strip_checksum(value: &[u8]) -> Option<&[u8]> {
    let (covered, checksum) = value.split_last_chunk()?;
    (crc32c(&[covered]) == u32::from_le_bytes(*checksum)).then_some(covered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(crc32c(&[b"1234", b"56789"]), 0xe306_9283);
        let mut value = b"123456789".to_vec();
        append_checksum(&mut value);
        assert_eq!(value, b"123456789\x83\x92\x06\xe3");
        assert_eq!(strip_checksum(&value), Some(&b"123456789"[..]));
        value[3] ^= 1;
        assert_eq!(strip_checksum(&value), None);
        assert_eq!(strip_checksum(b"123"), None);
    }
}
