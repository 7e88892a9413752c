//! Simulated annealing: the schedule by which both engines cool, by trials or by the clock.
//!
//! What a trial is, and whether it is accepted, is the engine's own. One of the chain takes about ten nanoseconds: a
//! single draw proposes a swap and chooses its threshold from a table. One of a layer takes ten times as long, and is
//! judged with more bits and, where it matters, a logarithm.

use std::time::{Duration, Instant};

use crate::control::Control;

/// How long a run is: so many trials or, if it is over earlier, a time, but then so many trials at the `least`. Only a
/// number of trials gives the same answer on every machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Length {
    pub(crate) trials: u64,
    pub(crate) least: u64,
    pub(crate) time: Option<Duration>,
}

impl Length {
    pub(crate) fn trials(trials: u64) -> Self {
        Self { trials: trials.max(1), least: 0, time: None }
    }

    pub(crate) fn time(time: Duration) -> Self {
        Self { trials: u64::MAX, least: 0, time: Some(time) }
    }

    pub(crate) fn half(self) -> Self {
        match self.time {
            Some(time) => Self { time: Some(time / 2), ..self },
            None => Self::trials(self.trials / 2),
        }
    }
}

/// Trials at one temperature, and how many times as many there are between two looks at the clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocks {
    pub(crate) trials: u64,
    pub(crate) check: u64,
}

/// What changes by equal factors during a run: its first value, and the last as a multiple of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ramp {
    pub(crate) first: f64,
    pub(crate) change: f64,
}

impl Ramp {
    fn at(self, done: f64) -> f64 {
        self.first * libm::pow(self.change, done)
    }
}

/// Makes blocks of trials with the values of the ramps as they are by then; stops early when told to.
///
/// A run that is short of time goes down the ramps by the clock: cut off before it is cold, it would be worth little.
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

/// The same by a clock, which says how long the run has taken.
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

    #[test]
    fn a_run_ends_cold_however_long_it_is() {
        let limit = |millis| Some(Duration::from_millis(millis));
        // On a clock that goes on by a millisecond with every block.
        for (trials, least, time, blocks) in [
            (1000, 0, None, 100),
            (1000, 0, limit(600_000), 100),
            (1 << 40, 0, limit(200), 200),
            (1000, 200, limit(0), 20),
            (u64::MAX, 0, limit(200), 200),
        ] {
            let (mut seen, ramp) = (Vec::new(), Ramp { first: 1.0, change: 1e-4 });
            let (length, each) = (Length { trials, least, time }, Blocks { trials: 10, check: 1 });
            let now = Cell::new(0);
            let clock = || Duration::from_millis(now.get());
            anneal_by(clock, length, each, [ramp], &Control::new(None), |[value]| {
                now.set(now.get() + 1);
                seen.push(value);
            });
            assert!(seen[0] > 0.5 && seen[seen.len() - 1] < 1e-2, "{length:?}: {seen:?}");
            assert_eq!(seen.len(), blocks, "{length:?}");
        }
    }
}
