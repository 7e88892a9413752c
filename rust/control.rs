//! Control of a long computation from another thread: cancellation, deadline and progress.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

/// State that a search shares with the thread that watches it.
#[derive(Debug)]
pub struct Control {
    /// Whether the search is to stop; the best placement so far is then its answer.
    pub cancelled: AtomicBool,
    /// Trials made.
    pub trials: AtomicU64,
    /// Cost of the best finished placement, in the counts of the instance; `i64::MAX` before the first one.
    pub best: AtomicI64,
    /// Time at which the search is to end at the latest.
    pub deadline: Option<Instant>,
}

impl Control {
    /// Builds the control of a search that stops at `deadline` at the latest.
    #[must_use]
    pub fn new(deadline: Option<Instant>) -> Self {
        Self {
            cancelled: AtomicBool::new(false),
            trials: AtomicU64::new(0),
            best: AtomicI64::new(i64::MAX),
            deadline,
        }
    }

    /// Returns whether the search is cancelled or its deadline has passed.
    pub(crate) fn stopped(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Returns whether the deadline, if there is one, is more than so many seconds away, and the search is not cancelled.
    pub(crate) fn has_time_for(&self, seconds: f64) -> bool {
        let remaining = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        remaining.is_none_or(|time| time.as_secs_f64() > seconds) && !self.cancelled.load(Ordering::Relaxed)
    }

    /// Adds to the number of trials made.
    pub(crate) fn count(&self, trials: u64) {
        self.trials.fetch_add(trials, Ordering::Relaxed);
    }

    /// Reports a proven lower bound as progress, by its negative: bounds rise, and the best cost falls.
    #[cfg(feature = "python")]
    pub(crate) fn offer_bound(&self, bound: u64) {
        self.offer(-i64::try_from(bound).unwrap_or(i64::MAX));
    }

    /// Reports the cost of a finished placement as progress.
    pub(crate) fn offer(&self, cost: i64) {
        self.best.fetch_min(cost, Ordering::Relaxed);
    }
}
