//! Sends batches until they are acknowledged: retries, backoff, reconnection.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::Rng;
use tokio::sync::{Mutex, RwLock};
use tokio::time::Instant;

use super::{Client, ClientError, ClientOptions};
use crate::proto;

/// How long, and how often, a batch is tried again.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Delay before the second try; it doubles from there. 100 ms by default.
    pub delay_min: Duration,
    /// Longest delay. 5 s by default. A longer `Retry-After` is obeyed.
    pub delay_max: Duration,
    /// How long after the first try the last one may start. 60 s by default; zero: one try.
    pub retry_for: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            delay_min: Duration::from_millis(100),
            delay_max: Duration::from_secs(5),
            retry_for: Duration::from_secs(60),
        }
    }
}

/// A batch's ack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// Tries that it took; at least 1.
    pub attempts: u32,
}

/// A batch that was not acknowledged. It may have been committed all the same, unless every try was refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("not acknowledged after {attempts} attempts")]
pub struct NotAcked {
    /// Tries that were made.
    pub attempts: u32,
    /// Why the last one failed. If it is retryable, time ran out.
    #[source]
    pub error: ClientError,
}

/// Sends batches, each until it is acknowledged, refused for good, or out of time.
///
/// Batches in flight at once may be committed in any order; send one at a time to keep it. A retry goes alone, so that
/// a server in trouble is not flooded and a nameless refusal finds its batch.
#[derive(Debug)]
pub struct Sender {
    options: ClientOptions,
    policy: RetryPolicy,
    client: Mutex<Option<Client>>,
    /// First tries share it, a retry has it alone.
    turn: RwLock<()>,
    retries: AtomicU64,
    connects: AtomicU64,
}

impl Sender {
    /// A sender that connects when the first batch is sent.
    pub fn new(options: ClientOptions, policy: RetryPolicy) -> Self {
        Sender {
            options,
            policy,
            client: Mutex::new(None),
            turn: RwLock::new(()),
            retries: AtomicU64::new(0),
            connects: AtomicU64::new(0),
        }
    }

    /// Sends `request` until it is acknowledged. Every try carries the same `req_guid`, which must not be empty.
    ///
    /// # Errors
    /// [`NotAcked`] if the server refuses it for good, or the policy's time is up.
    pub async fn deliver(&self, request: &proto::SendEventRequest) -> Result<Receipt, NotAcked> {
        let deadline = Instant::now() + self.policy.retry_for;
        let mut backoff = Backoff::new(&self.policy);
        let mut attempts = 1;
        let mut outcome = {
            let _shared = self.turn.read().await;
            self.attempt(request).await
        };
        loop {
            let Err(error) = outcome else { return Ok(Receipt { attempts }) };
            let remaining = deadline.saturating_duration_since(Instant::now());
            if !error.is_retryable() || remaining.is_zero() {
                return Err(NotAcked { attempts, error });
            }
            let delay = backoff.next_delay().max(error.retry_after().unwrap_or_default());
            tracing::debug!(%error, attempts, ?delay, "batch not acknowledged, will retry");
            tokio::time::sleep(delay.min(remaining)).await;
            let Ok(_alone) = tokio::time::timeout_at(deadline, self.turn.write()).await else {
                return Err(NotAcked { attempts, error });
            };
            self.retries.fetch_add(1, Ordering::Relaxed);
            attempts += 1;
            outcome = self.attempt(request).await;
        }
    }

    /// Tries beyond the first, over all batches.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    /// Connections made beyond the first. REST and gRPC reconnect uncounted.
    pub fn reconnects(&self) -> u64 {
        self.connects.load(Ordering::Relaxed).saturating_sub(1)
    }

    /// Closes the connection.
    pub async fn close(&self) {
        if let Some(client) = self.client.lock().await.take() {
            client.close().await;
        }
    }

    async fn attempt(&self, request: &proto::SendEventRequest) -> Result<proto::SendEventResponse, ClientError> {
        let client = self.client().await?;
        let outcome = client.send(request.clone()).await;
        if matches!(outcome, Err(ClientError::AnswerTimeout(_))) {
            // A connection whose other end is gone without a word looks like this for a quarter of an hour.
            client.close().await;
        }
        outcome
    }

    async fn client(&self) -> Result<Client, ClientError> {
        let mut current = self.client.lock().await;
        if let Some(client) = current.as_ref().filter(|client| !client.is_closed()) {
            return Ok(client.clone());
        }
        let client = Client::connect(&self.options).await?;
        self.connects.fetch_add(1, Ordering::Relaxed);
        *current = Some(client.clone());
        Ok(client)
    }
}

/// Doubling delays, each shortened by up to half at random so that clients do not come back in step.
#[derive(Debug)]
struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    fn new(policy: &RetryPolicy) -> Self {
        Backoff { next: policy.delay_min.min(policy.delay_max), max: policy.delay_max }
    }

    fn next_delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(self.max);
        delay.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit_with_jitter() {
        let policy = RetryPolicy { delay_max: Duration::from_millis(350), ..RetryPolicy::default() };
        let mut backoff = Backoff::new(&policy);
        for full_ms in [100, 200, 350, 350] {
            let delay = backoff.next_delay();
            let full = Duration::from_millis(full_ms);
            assert!(delay >= full / 2 && delay <= full, "{delay:?} for {full:?}");
        }
    }
}
