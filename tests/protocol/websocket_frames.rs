//! However bytes and messages are cut, none is lost.

use prost::Message as _;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::*;

const BINARY: u8 = 0x82;

fn message(name: &str, payload: &[u8]) -> Vec<u8> {
    frame(BINARY, &request(name, &[payload]).encode_to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_byte_at_a_time() {
    let server = Server::start().await;
    let mut stream = raw_websocket(&server, "a").await;
    for round in 0..3u8 {
        for byte in message("r", &[round; 150]) {
            stream.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(outcome(&read_answer(&mut stream).await), (1, 1, Some("r")));
    }
    assert_eq!(payloads(&server.records(3)), [[0; 150], [1; 150], [2; 150]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_messages_in_one_write() {
    let server = Server::start().await;
    let mut stream = raw_websocket(&server, "a").await;
    let count = 150u8;
    let bytes: Vec<u8> = (0..count).flat_map(|index| message(&index.to_string(), &[index; 300])).collect();
    stream.write_all(&bytes).await.unwrap();
    for _ in 0..count {
        assert_eq!(read_answer(&mut stream).await.status, 1);
    }
    assert_eq!(payloads(&server.records(count.into())), (0..count).map(|index| vec![index; 300]).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_in_the_same_write_as_the_handshake() {
    let server = Server::start().await;
    for cut in [0, 1, 7] {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        let (mut bytes, first) = (handshake(""), message("early", b"x"));
        bytes.extend(&first[..first.len() - cut]);
        stream.write_all(&bytes).await.unwrap();
        assert_eq!(read_reply(&mut stream, false).await.status, 101);
        stream.write_all(&first[first.len() - cut..]).await.unwrap();
        assert_eq!(outcome(&read_answer(&mut stream).await), (1, 1, Some("early")));
    }
    server.records(3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fragments_with_pings_between_them() {
    let server = Server::start().await;
    let mut stream = raw_websocket(&server, "a").await;
    let payload = vec![9; 70_000];
    let bytes = request("f", &[&payload]).encode_to_vec();
    let (head, rest) = bytes.split_at(10);
    let (middle, tail) = rest.split_at(40_000);
    stream.write_all(&frame(0x02, head)).await.unwrap();
    stream.write_all(&frame(0x89, b"between")).await.unwrap();
    assert_eq!(read_frame(&mut stream).await, (0x8a, b"between".to_vec()));
    stream.write_all(&frame(0x00, middle)).await.unwrap();
    stream.write_all(&frame(0x8a, b"")).await.unwrap();
    stream.write_all(&frame(0x00, b"")).await.unwrap();
    stream.write_all(&frame(0x80, tail)).await.unwrap();
    assert_eq!(outcome(&read_answer(&mut stream).await), (1, 1, Some("f")));
    assert_eq!(payloads(&server.records(1)), [payload]);
}

/// Between two requests the connection gives up everything but its socket. Its state cannot be seen from outside, but the
/// answer to a ping cannot come before what was sent earlier has been handled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_resting_nothing_is_lost() {
    let server = Server::start().await;
    let mut stream = raw_websocket(&server, "a").await;
    for (round, size) in [10usize, 100_000, 3, 20_000, 1].into_iter().enumerate() {
        let payload = vec![u8::try_from(round).unwrap(); size];
        let bytes = message("r", &payload);
        for piece in bytes.chunks(bytes.len().div_ceil(3)) {
            stream.write_all(piece).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(outcome(&read_answer(&mut stream).await), (1, 1, Some("r")));
        stream.write_all(&frame(0x89, &[7; 125])).await.unwrap();
        assert_eq!(read_frame(&mut stream).await, (0x8a, vec![7; 125]));
    }
    let sizes: Vec<_> = payloads(&server.records(5)).iter().map(Vec::len).collect();
    assert_eq!(sizes, [10, 100_000, 3, 20_000, 1]);
}

/// The end of one message and the beginning of the next in one write, over and over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_that_end_within_messages() {
    let server = Server::start().await;
    for step in [1usize, 13, 997, 16_384, 16_385] {
        let mut stream = raw_websocket(&server, "").await;
        let sizes: Vec<usize> = if step < 100 { vec![0, 60, 200] } else { vec![0, 120, 130, 16_370, 40_000, 5] };
        let bytes: Vec<u8> = sizes.iter().flat_map(|size| message("r", &vec![1; *size])).collect();
        for piece in bytes.chunks(step) {
            stream.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        for _ in &sizes {
            assert_eq!(outcome(&read_answer(&mut stream).await), (1, 1, Some("r")), "{step}");
        }
    }
    let sizes: Vec<_> = payloads(&server.records(24)).iter().map(Vec::len).collect();
    assert_eq!(sizes[..3], [0, 60, 200]);
    assert_eq!(sizes[18..], [0, 120, 130, 16_370, 40_000, 5]);
}
