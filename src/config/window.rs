//! Times of day between which something happens, such as `"22:00-06:00"`.

use std::fmt;
use std::str::FromStr;

use jiff::civil::Time;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// From a time of day to another one, by the host's clock and time zone. May go over midnight. The end is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeWindow {
    from: Time,
    until: Time,
}

/// A text is not a window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a time window such as \"22:00-06:00\", of two different times")]
pub struct TimeWindowError {
    text: String,
}

impl TimeWindow {
    /// Whether `time` is in it.
    pub fn contains(&self, time: Time) -> bool {
        if self.from < self.until {
            self.from <= time && time < self.until
        } else {
            self.from <= time || time < self.until
        }
    }
}

impl FromStr for TimeWindow {
    type Err = TimeWindowError;

    fn from_str(text: &str) -> Result<TimeWindow, TimeWindowError> {
        let time = |text: &str| Time::strptime("%H:%M", text.trim()).ok();
        let window = text.split_once('-').and_then(|(from, until)| Some((time(from)?, time(until)?)));
        let window = window.filter(|(from, until)| from != until);
        let (from, until) = window.ok_or_else(|| TimeWindowError { text: text.to_owned() })?;
        Ok(TimeWindow { from, until })
    }
}

impl fmt::Display for TimeWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.from.strftime("%H:%M"), self.until.strftime("%H:%M"))
    }
}

impl Serialize for TimeWindow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeWindow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TimeWindow, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_over_midnight_and_within_a_day() {
        let window = |text: &str| text.parse::<TimeWindow>().unwrap();
        let at = |hour, minute| Time::constant(hour, minute, 0, 0);
        let night = window("22:00-06:30");
        for (time, inside) in
            [(at(22, 0), true), (at(0, 0), true), (at(6, 29), true), (at(6, 30), false), (at(21, 59), false)]
        {
            assert_eq!(night.contains(time), inside, "{time}");
        }
        let day = window("09:00 - 17:00");
        assert!(
            day.contains(at(9, 0)) && day.contains(at(16, 59)) && !day.contains(at(17, 0)) && !day.contains(at(3, 0))
        );
        assert_eq!(day.to_string(), "09:00-17:00");
        for bad in ["", "9", "09:00", "09:00-", "09:00-25:00", "09:00-09:00", "nine-ten"] {
            assert!(bad.parse::<TimeWindow>().is_err(), "{bad}");
        }
    }
}
