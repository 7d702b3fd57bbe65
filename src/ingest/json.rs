//! The JSON form of a request, in every form that real clients send, and of an answer.
//!
//! Names are matched case-insensitively, in snake case or lowerCamel; unknown ones are ignored; `null` is an absent value.
//! A payload is base64 (standard or URL-safe, padded or not) or an array of numbers 0–255. `sent_time` is an object or an
//! RFC 3339 string. The request is re-encoded as protobuf, so that the log holds one form only.

use std::collections::HashMap;
use std::fmt;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use prost::Message;
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::batch::{DecodeError, Request};
use crate::proto::{Event, SendEventRequest, SendEventResponse};

const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&base64::alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&base64::alphabet::URL_SAFE, LENIENT);

/// Decodes a request.
///
/// # Errors
/// [`DecodeError::Json`] says what is wrong, and where.
pub(super) fn decode(text: &[u8]) -> Result<Request, DecodeError> {
    let request: JsonRequest = serde_json::from_slice(text).map_err(|error| DecodeError::Json(error.to_string()))?;
    Request::parse(Bytes::from(request.0.encode_to_vec()))
}

/// Encodes an answer as Go's `encoding/json` would: enums as numbers, zero fields omitted.
pub(super) fn encode(answer: &SendEventResponse) -> String {
    #[derive(serde::Serialize)]
    struct Answer<'a> {
        #[serde(skip_serializing_if = "is_zero")]
        status: i64,
        #[serde(skip_serializing_if = "is_zero")]
        code: i64,
        #[serde(skip_serializing_if = "is_zero")]
        sent_time: i64,
        #[serde(skip_serializing_if = "str::is_empty")]
        reason: &'a str,
        #[serde(skip_serializing_if = "HashMap::is_empty")]
        data: &'a HashMap<String, String>,
    }
    let answer = Answer {
        status: answer.status.into(),
        code: answer.code.into(),
        sent_time: answer.sent_time,
        reason: &answer.reason,
        data: &answer.data,
    };
    serde_json::to_string(&answer).expect("numbers and strings always encode")
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(value: &i64) -> bool {
    *value == 0
}

/// A field's name without case and underscores: `event_bytes`, `eventBytes` and `EventBytes` are one.
fn canonical(name: &str) -> String {
    name.chars().filter(|character| *character != '_').flat_map(char::to_lowercase).collect()
}

struct JsonRequest(SendEventRequest);

impl<'de> Deserialize<'de> for JsonRequest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = JsonRequest;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with req_guid, sent_time and events")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<JsonRequest, M::Error> {
                let mut request = SendEventRequest::default();
                while let Some(name) = map.next_key::<String>()? {
                    match canonical(&name).as_str() {
                        "reqguid" => request.req_guid = map.next_value::<Option<String>>()?.unwrap_or_default(),
                        "senttime" => request.sent_time = map.next_value::<Option<JsonTime>>()?.map(|time| time.0),
                        "events" => {
                            let events = map.next_value::<Option<Vec<Option<JsonEvent>>>>()?.unwrap_or_default();
                            // Go turns null into an empty message.
                            let events = events.into_iter().map(|event| event.map(|event| event.0).unwrap_or_default());
                            request.events = events.collect();
                        }
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(JsonRequest(request))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

struct JsonEvent(Event);

impl<'de> Deserialize<'de> for JsonEvent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = JsonEvent;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with event_bytes and type")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<JsonEvent, M::Error> {
                let mut event = Event::default();
                while let Some(name) = map.next_key::<String>()? {
                    match canonical(&name).as_str() {
                        "eventbytes" => {
                            let payload = map.next_value::<Option<Payload>>()?;
                            event.event_bytes = payload.map(|payload| payload.0.into()).unwrap_or_default();
                        }
                        "type" => event.r#type = map.next_value::<Option<String>>()?.unwrap_or_default(),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(JsonEvent(event))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

struct Payload(Vec<u8>);

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Payload;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("event bytes as base64 or as an array of numbers from 0 to 255")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Payload, E> {
                let engine = if text.contains(['-', '_']) { URL_SAFE } else { STANDARD };
                engine.decode(text).map(Payload).map_err(|error| E::custom(format_args!("event bytes: {error}")))
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut numbers: S) -> Result<Payload, S::Error> {
                let mut payload = Vec::new();
                while let Some(byte) = numbers.next_element::<u8>()? {
                    payload.push(byte);
                }
                Ok(Payload(payload))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

struct JsonTime(prost_types::Timestamp);

impl<'de> Deserialize<'de> for JsonTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = JsonTime;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time as {\"seconds\", \"nanos\"} or as an RFC 3339 string")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<JsonTime, E> {
                text.parse().map(JsonTime).map_err(|error| E::custom(format_args!("sent_time: {error}")))
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<JsonTime, M::Error> {
                let mut time = prost_types::Timestamp::default();
                while let Some(name) = map.next_key::<String>()? {
                    match canonical(&name).as_str() {
                        "seconds" => time.seconds = map.next_value::<Option<Whole>>()?.map_or(0, |whole| whole.0),
                        "nanos" => {
                            let nanos = map.next_value::<Option<Whole>>()?.map_or(0, |whole| whole.0);
                            time.nanos = i32::try_from(nanos).map_err(|_| de::Error::custom("nanos out of range"))?;
                        }
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(JsonTime(time))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// A whole number, or a string that holds one.
struct Whole(i64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = Whole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Whole, E> {
                Ok(Whole(value))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Whole, E> {
                i64::try_from(value).map(Whole).map_err(|_| E::custom("number out of range"))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Whole, E> {
                // 2^53: beyond it a float no longer names one whole number.
                if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 {
                    Ok(Whole(value as i64))
                } else {
                    Err(E::custom("not a whole number"))
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Whole, E> {
                text.parse().map(Whole).map_err(|_| E::custom("not a whole number"))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(text: &str) -> SendEventRequest {
        let request = decode(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
        SendEventRequest::decode(request.as_bytes().clone()).unwrap()
    }

    fn expected() -> SendEventRequest {
        SendEventRequest {
            req_guid: "r1".into(),
            sent_time: Some(prost_types::Timestamp { seconds: 1_638_154_927, nanos: 376_499_000 }),
            events: vec![Event { event_bytes: vec![251, 255, 1, 2].into(), r#type: "click".into() }],
        }
    }

    #[test]
    fn every_form_that_clients_send() {
        let time = r#"{"seconds": 1638154927, "nanos": 376499000}"#;
        for payload in ["\"+/8BAg==\"", "\"-_8BAg==\"", "\"-_8BAg\"", "\"+/8BAg\"", "[251,255,1,2]"] {
            for (guid, sent, bytes) in [
                ("req_guid", "sent_time", "event_bytes"),
                ("reqGuid", "sentTime", "eventBytes"),
                ("REQ_GUID", "Sent_Time", "EVENTBYTES"),
            ] {
                let event = format!(r#"{{"{bytes}": {payload}, "type": "click", "more": [1, {{}}]}}"#);
                let text = format!(r#"{{"{guid}": "r1", "{sent}": {time}, "events": [{event}], "other": null}}"#);
                assert_eq!(decoded(&text), expected(), "{text}");
            }
        }
    }

    #[test]
    fn every_form_of_a_time() {
        for time in [
            r#"{"seconds": "1638154927", "nanos": 376499000}"#,
            r#""2021-11-29T03:02:07.376499Z""#,
            r#""2021-11-29T05:02:07.376499+02:00""#,
            r#"{"Seconds": 1638154927.0, "Nanos": 376499000}"#,
        ] {
            let text = format!(r#"{{"sent_time": {time}}}"#);
            assert_eq!(decoded(&text).sent_time, expected().sent_time, "{text}");
        }
        assert_eq!(decoded(r#"{"sent_time": null, "events": null, "req_guid": null}"#), SendEventRequest::default());
        assert_eq!(decoded("{}"), SendEventRequest::default());
    }

    #[test]
    fn bad_input_is_refused() {
        let deep = format!("{{\"x\":{}", "[".repeat(10_000));
        for text in [
            "",
            "null",
            "[]",
            "{",
            "{} {}",
            r#"{"events": {}}"#,
            r#"{"events": [{"event_bytes": "!"}]}"#,
            r#"{"events": [{"event_bytes": [256]}]}"#,
            r#"{"events": [{"event_bytes": [-1]}]}"#,
            r#"{"events": [{"event_bytes": 7}]}"#,
            r#"{"events": [{"type": 7}]}"#,
            r#"{"req_guid": 7}"#,
            r#"{"sent_time": "yesterday"}"#,
            r#"{"sent_time": {"nanos": 99999999999}}"#,
            r#"{"sent_time": {"seconds": 1e300}}"#,
            &deep,
        ] {
            assert!(decode(text.as_bytes()).is_err(), "{text}");
        }
        assert!(decode(b"{\"req_guid\": \"\xff\"}").is_err());
    }

    #[test]
    fn answers_are_what_strict_clients_parse() {
        let data = HashMap::from([("req_guid".to_string(), "r".to_string())]);
        let answer = SendEventResponse { status: 1, code: 1, sent_time: 5, reason: String::new(), data };
        assert_eq!(encode(&answer), r#"{"status":1,"code":1,"sent_time":5,"data":{"req_guid":"r"}}"#);
        assert_eq!(encode(&SendEventResponse::default()), "{}");
    }

    proptest! {
        #[test]
        fn payloads_arrive_byte_for_byte(payload in proptest::collection::vec(any::<u8>(), 0..64), url in any::<bool>(), pad in any::<bool>()) {
            let config = GeneralPurposeConfig::new().with_encode_padding(pad);
            let alphabet = if url { &base64::alphabet::URL_SAFE } else { &base64::alphabet::STANDARD };
            let text = GeneralPurpose::new(alphabet, config).encode(&payload);
            let request = decoded(&format!(r#"{{"events":[{{"event_bytes":"{text}"}}]}}"#));
            prop_assert_eq!(&request.events[0].event_bytes[..], &payload[..]);
        }

        #[test]
        fn noise_never_panics(noise in ".{0,60}") {
            let _ = decode(noise.as_bytes());
        }
    }
}
