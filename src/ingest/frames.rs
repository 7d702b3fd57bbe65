//! Watches the bytes that a WebSocket client sends on their way to the frame decoder.
//!
//! It follows frame headers only. So the connection knows, without asking the decoder, whether a message has begun and is
//! not complete (its memory is reserved, its time limited), and, when the decoder wants more bytes while the last one seen
//! ended a message, that the decoder holds nothing and can be dropped.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::budget::Reservation;

/// A message takes its memory from the budget once it has so many bytes and is not complete.
const UNRESERVED_BYTES_MAX: u64 = 16 * 1024;

/// The client's socket, watched.
pub(super) struct WatchedStream {
    stream: TcpStream,
    /// Bytes that came with the upgrade request.
    first: bytes::Bytes,
    tracker: Tracker,
}

/// Where in the row of frames the bytes seen so far end.
struct Tracker {
    header: [u8; 10],
    header_bytes: usize,
    payload_left: u64,
    /// Payload of the message that is not complete, as far as it has come.
    held: u64,
    /// A frame of a message came without the one that ends it.
    fragmented: bool,
    text: bool,
    /// When the message that is not complete began.
    began: Option<Instant>,
    reservation: Reservation,
    over_budget: bool,
}

impl WatchedStream {
    pub fn new(stream: TcpStream, first: bytes::Bytes, reservation: Reservation) -> WatchedStream {
        WatchedStream { stream, first, tracker: Tracker::new(reservation) }
    }

    /// Every byte read so far belongs to a complete message.
    pub fn is_between_messages(&self) -> bool {
        self.tracker.began.is_none() && self.first.is_empty()
    }

    /// When the message began that is not complete.
    pub fn message_began(&self) -> Option<Instant> {
        self.tracker.began
    }

    /// Starts the clock of that message again: it was not read meanwhile.
    pub fn restart_clock(&mut self) {
        self.tracker.began = self.tracker.began.map(|_| Instant::now());
    }

    /// Whether the message that began last is text.
    pub fn is_text(&self) -> bool {
        self.tracker.text
    }

    /// A read failed, because a message needs more memory than there is for messages that are being read.
    pub fn is_over_budget(&self) -> bool {
        self.tracker.over_budget
    }

    /// The socket, for when nothing is being read.
    pub fn into_inner(self) -> TcpStream {
        self.stream
    }
}

impl Tracker {
    fn new(reservation: Reservation) -> Tracker {
        Tracker {
            header: [0; 10],
            header_bytes: 0,
            payload_left: 0,
            held: 0,
            fragmented: false,
            text: false,
            began: None,
            reservation,
            over_budget: false,
        }
    }

    fn see(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let seen = self.payload_left.min(bytes.len() as u64);
                self.payload_left -= seen;
                self.held += seen;
                bytes = &bytes[usize::try_from(seen).expect("no more than bytes.len()")..];
            } else {
                self.header[self.header_bytes] = bytes[0];
                self.header_bytes += 1;
                bytes = &bytes[1..];
                self.began.get_or_insert_with(Instant::now);
                let Some(payload) = self.complete_header() else { continue };
                self.payload_left = payload;
                // A frame of data that continues no other says what the message is.
                if let opcode @ 1..=7 = self.header[0] & 0x0f {
                    self.text = opcode == 1;
                }
            }
            if self.payload_left == 0 && self.header_bytes > 0 {
                self.end_frame();
            }
        }
    }

    /// The payload's length plus that of the mask, once the header up to the length is complete.
    fn complete_header(&self) -> Option<u64> {
        if self.header_bytes < 2 {
            return None;
        }
        let masked = if self.header[1] & 0x80 == 0 { 0 } else { 4 };
        let length = match (self.header[1] & 0x7f, self.header_bytes) {
            (length @ 0..=125, _) => u64::from(length),
            (126, 4..) => u64::from(u16::from_be_bytes([self.header[2], self.header[3]])),
            (127, 10..) => u64::from_be_bytes(self.header[2..10].try_into().expect("eight bytes")),
            _ => return None,
        };
        Some(length.saturating_add(masked))
    }

    /// Takes what is held of an incomplete message from the budget. False: it is not there.
    fn reserve(&mut self) -> bool {
        if self.held > UNRESERVED_BYTES_MAX {
            let missing = self.held.saturating_sub(self.reservation.bytes());
            self.over_budget |= !self.reservation.grow(missing);
        }
        !self.over_budget
    }

    fn end_frame(&mut self) {
        let (last, control) = (self.header[0] & 0x80 != 0, self.header[0] & 0x08 != 0);
        self.header_bytes = 0;
        if !control {
            self.fragmented = !last;
        }
        if !self.fragmented {
            self.began = None;
            self.held = 0;
            self.reservation.clear();
        }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if this.first.is_empty() {
            std::task::ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        } else {
            let taken = this.first.split_to(this.first.len().min(buffer.remaining()));
            buffer.put_slice(&taken);
        }
        this.tracker.see(&buffer.filled()[before..]);
        Poll::Ready(if this.tracker.reserve() { Ok(()) } else { Err(io::ErrorKind::OutOfMemory.into()) })
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::super::budget::ReadBudget;
    use super::*;
    use proptest::prelude::*;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
    use tokio_tungstenite::tungstenite::protocol::frame::{Frame, FrameHeader};

    fn tracker(limit: u64) -> Tracker {
        Tracker::new(ReadBudget::new(limit).reservation())
    }

    fn frame(payload: usize, last: bool) -> Vec<u8> {
        let mut frame = Frame::message(vec![7; payload], OpCode::Data(Data::Binary), last);
        *frame.header_mut() = FrameHeader { mask: Some([1, 2, 3, 4]), ..frame.header().clone() };
        let mut bytes = Vec::new();
        frame.format(&mut bytes).unwrap();
        bytes
    }

    proptest! {
        /// However the bytes are cut, the tracker is between messages exactly at the end of each.
        #[test]
        fn knows_where_a_message_ends(
            frames in proptest::collection::vec((prop_oneof![0..200usize, 65_500..65_600usize], any::<bool>()), 1..5),
            step in 1..5000usize,
        ) {
            let mut tracker = tracker(u64::MAX);
            let (mut ends, mut bytes) = (vec![0], Vec::new());
            for (payload, last) in frames {
                bytes.extend(frame(payload, last));
                if last {
                    ends.push(bytes.len());
                }
            }
            let mut seen = 0;
            for piece in bytes.chunks(step) {
                tracker.see(piece);
                seen += piece.len();
                prop_assert!(tracker.reserve());
                prop_assert!(tracker.reservation.bytes() <= tracker.held);
                prop_assert_eq!(tracker.began.is_none(), ends.contains(&seen));
            }
            prop_assert!(tracker.began.is_some() || tracker.reservation.bytes() == 0);
        }
    }

    #[test]
    fn a_message_takes_from_the_budget_what_has_come_of_it() {
        let mut tracker = tracker(100_000);
        let message = frame(1 << 20, true);
        tracker.see(&message[..14]);
        assert!(tracker.reserve());
        assert_eq!(tracker.reservation.bytes(), 0);
        tracker.see(&message[14..90_014]);
        assert!(tracker.reserve());
        assert_eq!(tracker.reservation.bytes(), tracker.held);
        tracker.see(&message[90_014..110_014]);
        assert!(!tracker.reserve());
    }
}
