use super::*;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE, BASE64_URL_SAFE_NO_PAD};
use proptest::prelude::*;
use serde_json::{Value, json};

fn decoded(text: &str) -> SendEventRequest {
    let request = decode(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
    SendEventRequest::decode(request.as_bytes().clone()).unwrap()
}

fn error(text: &str) -> String {
    decode(text.as_bytes()).expect_err(text).to_string()
}

fn request() -> impl Strategy<Value = SendEventRequest> {
    let event = (proptest::collection::vec(any::<u8>(), 0..40), ".{0,8}")
        .prop_map(|(bytes, r#type)| Event { event_bytes: bytes.into(), r#type });
    let time = proptest::option::of((any::<i64>(), any::<i32>()))
        .prop_map(|time| time.map(|(seconds, nanos)| Timestamp { seconds, nanos }));
    (".{0,20}", time, proptest::collection::vec(event, 0..6))
        .prop_map(|(req_guid, sent_time, events)| SendEventRequest { req_guid, sent_time, events })
}

/// One of the ways in which clients write a payload.
fn payload(bytes: &[u8], form: u8) -> Value {
    match form % 5 {
        0 => BASE64_STANDARD.encode(bytes).into(),
        1 => BASE64_STANDARD_NO_PAD.encode(bytes).into(),
        2 => BASE64_URL_SAFE.encode(bytes).into(),
        3 => BASE64_URL_SAFE_NO_PAD.encode(bytes).into(),
        _ => bytes.into(),
    }
}

/// One of the ways in which clients write a name.
fn key(name: &str, form: u8) -> String {
    match form % 3 {
        0 => name.to_owned(),
        1 => name.to_uppercase(),
        _ => {
            let mut words = name.split('_');
            let first = words.next().unwrap_or_default().to_owned();
            words.fold(first, |name, word| name + &word[..1].to_uppercase() + &word[1..])
        }
    }
}

fn write(request: &SendEventRequest, form: u8) -> String {
    let mut value = json!({"unknown": [{"a": null}]});
    value[key("req_guid", form)] = request.req_guid.clone().into();
    if let Some(time) = request.sent_time {
        let seconds = if form.is_multiple_of(2) { json!(time.seconds) } else { json!(time.seconds.to_string()) };
        value[key("sent_time", form)] = json!({"seconds": seconds, "nanos": time.nanos});
    }
    let events = request.events.iter().enumerate().map(|(index, event)| {
        let form = form.wrapping_add(u8::try_from(index).unwrap());
        let payload = payload(&event.event_bytes, form);
        json!({key("event_bytes", form): payload, key("type", form): event.r#type, "more": {}})
    });
    value[key("events", form)] = events.collect();
    value.to_string()
}

proptest! {
    #[test]
    fn every_form_reads_as_the_same_request(request in request(), form in any::<u8>()) {
        assert_eq!(decoded(&write(&request, form)), request);
    }

    #[test]
    fn damaged_text_never_panics(request in request(), form in any::<u8>(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut text = write(&request, form).into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        let _ = decode(&text);
        text.truncate(at);
        assert!(decode(&text).is_err());
    }

    #[test]
    fn no_time_panics(text in "[0-9TZ:.+ -]{0,40}") {
        let _ = decode(json!({"sent_time": text}).to_string().as_bytes());
    }
}

#[test]
fn times() {
    let wanted = Some(Timestamp { seconds: 1_638_154_927, nanos: 376_499_000 });
    for time in [
        r#"{"seconds": 1638154927, "nanos": 376499000}"#,
        r#"{"Seconds": "1638154927", "NANOS": "376499000", "x": 1}"#,
        r#""2021-11-29T03:02:07.376499Z""#,
        r#""2021-11-29T10:02:07.376499+07:00""#,
    ] {
        assert_eq!(decoded(&format!(r#"{{"sent_time": {time}}}"#)).sent_time, wanted, "{time}");
    }
    assert_eq!(decoded(r#"{"sent_time": null}"#).sent_time, None);
    assert_eq!(decoded(r#"{"sent_time": {}}"#).sent_time, Some(Timestamp::default()));
    for time in [
        "1",
        "\"\"",
        "\"yesterday\"",
        "[]",
        r#"{"seconds": 1.5}"#,
        r#"{"seconds": 1e300}"#,
        r#"{"seconds": 9223372036854775808}"#,
    ] {
        assert!(!error(&format!(r#"{{"sent_time": {time}}}"#)).is_empty());
    }
    assert!(error(r#"{"sent_time": {"nanos": 3000000000}}"#).contains("nanos"));
}

#[test]
fn null_is_a_missing_value() {
    assert_eq!(decoded("null"), SendEventRequest::default());
    assert_eq!(decoded(r#"{"req_guid": null, "sent_time": null, "events": null}"#), SendEventRequest::default());
    let request = decoded(r#"{"events": [null, {"event_bytes": null, "type": null}]}"#);
    assert_eq!(request.events, [Event::default(), Event::default()]);
}

#[test]
fn payload_in_lines() {
    assert_eq!(decoded(r#"{"events": [{"event_bytes": "AQ\r\nID\n"}]}"#).events[0].event_bytes.as_ref(), [1, 2, 3]);
}

#[test]
fn no_payload_is_dropped_silently() {
    let both = decoded(r#"{"events": [{"event_bytes": "AQ==", "eventBytes": [1]}]}"#);
    assert_eq!(both.events[0].event_bytes.as_ref(), [1]);
    let null = decoded(r#"{"events": [{"event_bytes": "AQ==", "eventBytes": null}]}"#);
    assert_eq!(null.events[0].event_bytes.as_ref(), [1]);
    assert!(error(r#"{"events": [{"event_bytes": "AQ==", "eventBytes": "Ag=="}]}"#).contains("twice"));
    assert!(error(r#"{"events": [{"type": "a"}], "events": []}"#).contains("twice"));
    assert!(error(r#"{"req_guid": "a", "REQ_GUID": "b"}"#).contains("twice"));
}

#[test]
fn wrong_input_is_a_clear_error() {
    for (text, needle) in [
        ("", "EOF"),
        ("{} {}", "trailing"),
        ("[]", "a request object"),
        ("1", "a request object"),
        (r#"{"events": {}}"#, "an array of events"),
        (r#"{"events": [1]}"#, "an event object"),
        (r#"{"events": [{"event_bytes": 1}]}"#, "base64 or an array"),
        (r#"{"events": [{"event_bytes": "*"}]}"#, "not base64"),
        (r#"{"events": [{"event_bytes": "A-+A"}]}"#, "not base64"),
        (r#"{"events": [{"event_bytes": [256]}]}"#, "256"),
        (r#"{"events": [{"event_bytes": [-1]}]}"#, "-1"),
        (r#"{"events": [{"event_bytes": [1.5]}]}"#, "1.5"),
        (r#"{"events": [{"type": 1}]}"#, "string"),
        (r#"{"req_guid": 1e400}"#, "out of range"),
        ("{\"req_guid\": \"\u{1}\"}", "control character"),
    ] {
        let error = error(text);
        assert!(error.contains(needle), "{text}: {error}");
    }
    assert!(decode(b"{\"req_guid\": \"\xff\"}").is_err());
}

#[test]
fn errors_are_short() {
    let text = format!(r#"{{"events": "{}"}}"#, "é".repeat(100_000));
    assert!(error(&text).len() < 400);
}

#[test]
fn answers_are_what_strict_clients_parse() {
    let data = HashMap::from([("req_guid".to_string(), "r".to_string())]);
    let answer = SendEventResponse { status: 1, code: 1, sent_time: 5, reason: String::new(), data };
    assert_eq!(encode(&answer), r#"{"status":1,"code":1,"sent_time":5,"data":{"req_guid":"r"}}"#);
    assert_eq!(encode(&SendEventResponse::default()), "{}");
}

#[test]
fn depth_is_bounded() {
    let deep = |depth: usize| format!(r#"{{"x": {}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    for depth in [10, 100_000] {
        let _ = decode(deep(depth).as_bytes());
    }
    assert!(decode(format!("{{\"events\": {}", "[".repeat(1_000_000)).as_bytes()).is_err());
}
