//! The JSON form of a request → its protobuf bytes, and of an answer.
//!
//! Go's `encoding/json` on the generated structs is the de-facto schema, so names match case-insensitively and `null` leaves
//! a field at its default; lowerCamel names, base64 in any alphabet, arrays of numbers and RFC 3339 times are taken as
//! well. Unknown fields are ignored. A field given twice must say the same twice, so that no payload is dropped silently.

use std::collections::HashMap;
use std::fmt;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use prost::Message;
use prost_types::Timestamp;
use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::batch::{DecodeError, Request};
use crate::proto::{Event, SendEventRequest, SendEventResponse};

/// Go's decoder takes trailing bits that are not zero, so this does too.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// Bytes reserved for an array before any of its elements has been seen.
const PREALLOCATED_MAX: usize = 4096;

/// Longest error message: some quote what they found.
const MESSAGE_BYTES_MAX: usize = 300;

/// Number of `events` in the request message.
const EVENTS_TAG: u32 = 3;

/// Decodes a request.
///
/// # Errors
/// [`DecodeError::Json`] says what is wrong and where.
pub(super) fn decode(text: &[u8]) -> Result<Request, DecodeError> {
    let request: JsonRequest = serde_json::from_slice(text).map_err(|error| {
        let mut message = error.to_string();
        let end = message.char_indices().map(|(at, _)| at).find(|at| *at >= MESSAGE_BYTES_MAX);
        message.truncate(end.unwrap_or(message.len()));
        DecodeError::Json(message)
    })?;
    Request::parse(request.0.into())
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

/// The protobuf form. Events are encoded one by one as they are read: a list of small ones would take many times the
/// memory of its text.
struct JsonRequest(Vec<u8>);

impl<'de> Deserialize<'de> for JsonRequest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RequestVisitor).map(JsonRequest)
    }
}

struct RequestVisitor;

impl<'de> Visitor<'de> for RequestVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request object")
    }

    fn visit_unit<E>(self) -> Result<Vec<u8>, E> {
        Ok(Vec::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<u8>, A::Error> {
        let (mut req_guid, mut sent_time, mut events) = (None, None, None);
        while let Some(index) = map.next_key_seed(Name(&[&["req_guid", "reqguid"], SENT_TIME, &["events"]]))? {
            match index {
                Some(0) => set(&mut req_guid, "req_guid", map.next_value::<Option<String>>()?)?,
                Some(1) => set(&mut sent_time, "sent_time", map.next_value::<Option<Time>>()?)?,
                Some(2) => set(&mut events, "events", map.next_value::<Option<JsonEvents>>()?)?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let mut bytes = events.map(|events| events.0).unwrap_or_default();
        let rest = SendEventRequest {
            req_guid: req_guid.unwrap_or_default(),
            sent_time: sent_time.map(|time| time.0),
            events: Vec::new(),
        };
        rest.encode(&mut bytes).expect("a Vec grows");
        Ok(bytes)
    }
}

/// `events`, encoded as fields of the request.
#[derive(PartialEq)]
struct JsonEvents(Vec<u8>);

impl<'de> Deserialize<'de> for JsonEvents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(EventsVisitor).map(JsonEvents)
    }
}

struct EventsVisitor;

impl<'de> Visitor<'de> for EventsVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u8>, A::Error> {
        let mut bytes = Vec::new();
        while let Some(event) = seq.next_element::<JsonEvent>()? {
            prost::encoding::message::encode(EVENTS_TAG, &event.0, &mut bytes);
        }
        Ok(bytes)
    }
}

const SENT_TIME: &[&str] = &["sent_time", "senttime"];

/// Keeps the value of a field that may stand twice only if it says the same.
fn set<T: PartialEq, E: de::Error>(slot: &mut Option<T>, name: &'static str, value: Option<T>) -> Result<(), E> {
    match (slot.as_ref(), value) {
        (_, None) => {}
        (Some(known), Some(value)) if *known != value => {
            return Err(E::custom(format_args!("{name} is given twice with different values")));
        }
        (_, Some(value)) => *slot = Some(value),
    }
    Ok(())
}

struct JsonEvent(Event);

impl<'de> Deserialize<'de> for JsonEvent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EventVisitor).map(JsonEvent)
    }
}

struct EventVisitor;

impl<'de> Visitor<'de> for EventVisitor {
    type Value = Event;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event object")
    }

    fn visit_unit<E>(self) -> Result<Event, E> {
        Ok(Event::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Event, A::Error> {
        let (mut payload, mut event_type) = (None, None);
        while let Some(index) = map.next_key_seed(Name(&[&["event_bytes", "eventbytes"], &["type"]]))? {
            match index {
                Some(0) => set(&mut payload, "event_bytes", map.next_value::<Option<Payload>>()?)?,
                Some(1) => set(&mut event_type, "type", map.next_value::<Option<String>>()?)?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Event {
            event_bytes: payload.map(|payload| payload.0).unwrap_or_default(),
            r#type: event_type.unwrap_or_default(),
        })
    }
}

/// `event_bytes`: base64 or an array of numbers.
#[derive(PartialEq)]
struct Payload(Bytes);

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PayloadVisitor).map(|bytes| Payload(bytes.into()))
    }
}

struct PayloadVisitor;

impl<'de> Visitor<'de> for PayloadVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("event_bytes as base64 or an array of numbers from 0 to 255")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
        let url_safe = text.bytes().any(|byte| matches!(byte, b'-' | b'_'));
        let engine = if url_safe { &URL_SAFE } else { &STANDARD };
        let decoded = if text.bytes().any(|byte| matches!(byte, b'\r' | b'\n')) {
            engine.decode(text.replace(['\r', '\n'], ""))
        } else {
            engine.decode(text)
        };
        decoded.map_err(|error| E::custom(format_args!("event_bytes is not base64: {error}")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u8>, A::Error> {
        let mut bytes = Vec::with_capacity(seq.size_hint().unwrap_or(0).min(PREALLOCATED_MAX));
        while let Some(byte) = seq.next_element::<u8>()? {
            bytes.push(byte);
        }
        Ok(bytes)
    }
}

/// `sent_time`: an object or an RFC 3339 string.
#[derive(PartialEq)]
struct Time(Timestamp);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TimeVisitor).map(Time)
    }
}

struct TimeVisitor;

impl<'de> Visitor<'de> for TimeVisitor {
    type Value = Timestamp;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sent_time as an object of seconds and nanos or an RFC 3339 string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Timestamp, E> {
        text.parse().map_err(|_| E::custom("sent_time is not an RFC 3339 time"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Timestamp, A::Error> {
        let (mut seconds, mut nanos) = (None, None);
        while let Some(index) = map.next_key_seed(Name(&[&["seconds"], &["nanos"]]))? {
            match index {
                Some(0) => set(&mut seconds, "seconds", map.next_value::<Option<Integer>>()?)?,
                Some(1) => set(&mut nanos, "nanos", map.next_value::<Option<Integer>>()?)?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let nanos = nanos.map_or(Ok(0), |nanos| i32::try_from(nanos.0));
        let nanos = nanos.map_err(|_| de::Error::custom("nanos does not fit 32 bits"))?;
        Ok(Timestamp { seconds: seconds.map_or(0, |seconds| seconds.0), nanos })
    }
}

/// A 64-bit number; canonical proto3 JSON writes it as a string.
#[derive(PartialEq)]
struct Integer(i64);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IntegerVisitor).map(Integer)
    }
}

struct IntegerVisitor;

impl Visitor<'_> for IntegerVisitor {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number of 64 bits")
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<i64, E> {
        Ok(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<i64, E> {
        i64::try_from(value).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<i64, E> {
        // 2^53: beyond it a float no longer names one whole number.
        if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 {
            Ok(value as i64)
        } else {
            Err(E::invalid_value(de::Unexpected::Float(value), &self))
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<i64, E> {
        text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

/// Finds a key, whatever its case, among the names of each field; none when it is unknown.
struct Name(&'static [&'static [&'static str]]);

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|names| names.iter().any(|name| name.eq_ignore_ascii_case(key))))
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
