//! What whoever runs a test asks of it by environment variables.

/// The number in the variable called `name`, if it is set.
pub fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}
