//! Simulated annealing: the cooling schedule of both searches, by trials or by the clock.
//!
//! The search of the chain and that of a layer define their own trials and how these are accepted. A trial of the chain takes
//! about ten nanoseconds: a single random number proposes a swap and chooses its threshold from a table. A trial of a layer
//! takes ten times as long. Its acceptance takes more random bits and, where it matters, a logarithm.

use std::time::{Duration, Instant};

use crate::control::Control;

/// Length of a run: a number of trials or, if it is over earlier, a time. A time ends no run before `least` trials. Only a
/// number of trials gives the same answer on every machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Length {
    pub(crate) trials: u64,
    pub(crate) least: u64,
    pub(crate) time: Option<Duration>,
}

impl Length {
    /// Returns the length of a run of so many trials, at least one.
    pub(crate) fn trials(trials: u64) -> Self {
        Self { trials: trials.max(1), least: 0, time: None }
    }

    /// Returns the length of a run that ends by the clock.
    pub(crate) fn time(time: Duration) -> Self {
        Self { trials: u64::MAX, least: 0, time: Some(time) }
    }

    /// Returns half of the length.
    pub(crate) fn half(self) -> Self {
        match self.time {
            Some(time) => Self { time: Some(time / 2), ..self },
            None => Self::trials(self.trials / 2),
        }
    }
}

/// Trials at one temperature, and the number of such blocks between two checks of the clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocks {
    pub(crate) trials: u64,
    pub(crate) check: u64,
}

/// A value that changes by equal factors during a run: the first value, and the last one as a multiple of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ramp {
    pub(crate) first: f64,
    pub(crate) change: f64,
}

impl Ramp {
    /// Returns the value after a share of the run.
    fn at(self, done: f64) -> f64 {
        self.first * libm::pow(self.change, done)
    }
}

/// Calls `block` with the current values of the ramps until the run is over or `control` is stopped.
///
/// A run that is short of time follows the ramps by the clock. If it were cut off before it is cold, its result would be
/// poor.
#[inline]
pub(crate) fn anneal<const N: usize>(
    length: Length,
    blocks: Blocks,
    ramps: [Ramp; N],
    control: &Control,
    block: impl FnMut([f64; N]),
) {
    let begin = Instant::now();
    anneal_by(|| begin.elapsed(), length, blocks, ramps, control, block);
}

/// Anneals as [`anneal`] does; `clock` returns the time since the run began.
#[inline]
fn anneal_by<const N: usize>(
    clock: impl Fn() -> Duration,
    length: Length,
    blocks: Blocks,
    ramps: [Ramp; N],
    control: &Control,
    mut block: impl FnMut([f64; N]),
) {
    let (n, least) = (length.trials.div_ceil(blocks.trials), length.least / blocks.trials);
    let factors = ramps.map(|ramp| libm::pow(ramp.change, 1.0 / n.max(1) as f64));
    let mut now = ramps.map(|ramp| ramp.first);
    for i in 0..n {
        if i % blocks.check == 0 {
            if control.stopped() {
                break;
            }
            control.count(blocks.check * blocks.trials);
            if let Some(time) = length.time {
                let by_clock = clock().as_secs_f64() / time.as_secs_f64().max(1e-9);
                let done = by_clock.min(i as f64 / least as f64);
                if done >= 1.0 {
                    break;
                }
                if done > i as f64 / n as f64 {
                    now = ramps.map(|ramp| ramp.at(done));
                }
            }
        }
        block(now);
        for (now, factor) in now.iter_mut().zip(factors) {
            *now *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A run reaches its last temperature, whether its trials, the least number of them or the clock ends it.
    #[test]
    fn a_run_ends_cold_however_long_it_is() {
        let limit = |millis| Some(Duration::from_millis(millis));
        // The clock advances by a millisecond with every block.
        for (trials, least, time, blocks) in [
            (1000, 0, None, 100),
            (1000, 0, limit(600_000), 100),
            (1 << 40, 0, limit(200), 200),
            (1000, 200, limit(0), 20),
            (u64::MAX, 0, limit(200), 200),
        ] {
            let (mut seen, ramp) = (Vec::new(), Ramp { first: 1.0, change: 1e-4 });
            let (length, tens) = (Length { trials, least, time }, Blocks { trials: 10, check: 1 });
            let now = Cell::new(0);
            let clock = || Duration::from_millis(now.get());
            anneal_by(clock, length, tens, [ramp], &Control::new(None), |[value]| {
                now.set(now.get() + 1);
                seen.push(value);
            });
            assert!(seen[0] > 0.5 && seen[seen.len() - 1] < 1e-2, "{length:?}: {seen:?}");
            assert_eq!(seen.len(), blocks, "{length:?}");
        }
    }
}
