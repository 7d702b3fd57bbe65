//! Value of a librdkafka property: a string, a whole number or a boolean, as TOML has them.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};

/// Value of a librdkafka property.
#[derive(Debug, Clone, PartialEq)]
pub enum KafkaProperty {
    /// `true` or `false`
    Bool(bool),
    /// A whole number.
    Integer(i64),
    /// Anything else.
    Text(String),
}

impl fmt::Display for KafkaProperty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KafkaProperty::Bool(value) => value.fmt(f),
            KafkaProperty::Integer(value) => value.fmt(f),
            KafkaProperty::Text(value) => value.fmt(f),
        }
    }
}

impl Serialize for KafkaProperty {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KafkaProperty::Bool(value) => serializer.serialize_bool(*value),
            KafkaProperty::Integer(value) => serializer.serialize_i64(*value),
            KafkaProperty::Text(value) => serializer.serialize_str(value),
        }
    }
}

impl<'de> Deserialize<'de> for KafkaProperty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PropertyVisitor)
    }
}

struct PropertyVisitor;

impl Visitor<'_> for PropertyVisitor {
    type Value = KafkaProperty;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a whole number or a boolean")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<KafkaProperty, E> {
        Ok(KafkaProperty::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<KafkaProperty, E> {
        Ok(KafkaProperty::Integer(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<KafkaProperty, E> {
        let integer = i64::try_from(value);
        Ok(integer.map_or_else(|_| KafkaProperty::Text(value.to_string()), KafkaProperty::Integer))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<KafkaProperty, E> {
        Ok(KafkaProperty::Text(value.into()))
    }
}
