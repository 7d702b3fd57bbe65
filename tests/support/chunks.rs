//! What clients sent, in the file of a segment: each chunk masks it (`src/wal/record.rs`).

const HEADER_BYTES: usize = 58;

/// `bytes` of a segment's file, with the mask of each chunk's body taken off.
pub fn unmasked(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let chunks: Vec<usize> = memchr::memmem::find_iter(&bytes, b"RTC1").collect();
    for at in chunks {
        let Some((header, rest)) = bytes[at..].split_at_mut_checked(HEADER_BYTES) else { continue };
        let body_bytes = u32::from_le_bytes(header[26..30].try_into().expect("four bytes")) as usize;
        let body = rest.iter_mut().take(body_bytes);
        body.zip(header[46..54].iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    }
    bytes
}
