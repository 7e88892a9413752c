//! Watching and stopping a long computation from another thread: stop, deadline, progress.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

/// How a search is watched and stopped from another thread.
#[derive(Debug)]
pub struct Control {
    /// Set to stop: the best placement so far is the answer.
    pub cancelled: AtomicBool,
    /// Trials made.
    pub trials: AtomicU64,
    /// Cost of the best finished placement, in the instance's counts; `i64::MAX` before the first.
    pub best: AtomicI64,
    /// When the work is to end at the latest.
    pub deadline: Option<Instant>,
}

impl Control {
    /// A search that stops at `deadline` at the latest.
    #[must_use]
    pub fn new(deadline: Option<Instant>) -> Self {
        Self {
            cancelled: AtomicBool::new(false),
            trials: AtomicU64::new(0),
            best: AtomicI64::new(i64::MAX),
            deadline,
        }
    }

    pub(crate) fn stopped(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Whether there is time for something that takes so many seconds; always where time is not limited.
    pub(crate) fn leaves(&self, seconds: f64) -> bool {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        left.is_none_or(|left| left.as_secs_f64() > seconds) && !self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn count(&self, trials: u64) {
        self.trials.fetch_add(trials, Ordering::Relaxed);
    }

    /// Takes a proven bound: it rises, so the watched number is its negative.
    #[cfg(feature = "python")]
    pub(crate) fn proven(&self, bound: u64) {
        self.offer(-i64::try_from(bound).unwrap_or(i64::MAX));
    }

    pub(crate) fn offer(&self, cost: i64) {
        self.best.fetch_min(cost, Ordering::Relaxed);
    }
}
