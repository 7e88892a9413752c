//! The search for a placement: construct, anneal from several starts, recombine, polish.
//!
//! One seed gives one answer, on any number of threads: every start has its own random stream, costs are integers,
//! and ties go to the start with the lower number.

mod anneal;
pub mod instance;
pub mod partitions;
mod state;

use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::anneal::Length;
use crate::control::Control;
use crate::error::Result;
use crate::packing::{Goal, Improve, Sizes, pack};
use crate::random::Random;
use anneal::{Schedule, anneal};
use instance::Instance;
use partitions::recombine;
use state::State;

/// A placement, and what it is compared by: tokens above caps, then its cost.
type Ranked = ((u128, i64), Vec<u16>);

/// Starts at the most.
const STARTS: usize = 24;
/// Rounds of polishing before starting afresh (with a time limit; without one the search ends), and runs per round.
const ROUNDS: u64 = 12;
const TIMED_ROUNDS: u64 = 30;
const RUNS: u64 = 4;
/// Of wide layers: swaps that all starts look at together, and half of those that rounds do.
const WORK: f64 = 4e8;
/// Share of a time limit for balancing the start, where nothing caps loads.
const BALANCED_SHARE: f64 = 0.05;
/// Share of a time limit for the first starts.
const START_SHARE: f64 = 0.4;
/// Temperatures between which a start cools, and a polishing run (measured: docs/experiments.md).
const START: (f64, f64) = (12.0, 0.35);
const WIDE_START: (f64, f64) = (4.0, 0.35);
const POLISH: (f64, f64) = (3.0, 0.2);
/// Of links that differ, one start of so many is annealed as if they did not.
const FLAT: u64 = 4;
/// Caps are tight if less than this share of the swaps from a balanced placement keeps them: all runs cross them. Up to
/// the other share every other run does, since a placement that costs less keeps them in fewer ways (bench/RESULTS.md).
const TIGHT: f64 = 0.1;
const LOOSE: f64 = 0.6;

/// The expert in every slot `[L, P]` of the best placement found, with so many `trials` of each start: by default as many
/// as the size of the problem, or the time that is left, allows.
///
/// Starts from the most balanced placement known, to which the caps are raised where they have to be; the answer respects
/// them. Where caps are tight, the search crosses them on the way.
pub fn search(
    instance: &mut Instance,
    seed: u64,
    trials: Option<u64>,
    control: &Control,
) -> Result<Vec<u16>> {
    let balanced: &[u16] = &balanced(instance, control)?;
    instance.allow(balanced);
    let instance = &*instance;
    let judged = |expert_in: Vec<u16>| {
        let state = State::new(instance, expert_in);
        ranked(&state, control)
    };
    let mut elite: Vec<Ranked> = vec![judged(balanced.to_vec())];
    if instance.sizes.devices < 2 || !instance.has_pairs() || control.stopped() {
        return Ok(best(elite));
    }
    let effort = Effort::new(instance, trials, balanced, control);
    // Of links that differ: who is together is easier to find where it does not matter yet whose node that is.
    let flat = (!instance.uniform()).then(|| instance.flat());
    let run = |schedule: Schedule, from: &[u16], stream: u64| {
        let mut state = State::new(instance, from.to_vec());
        let schedule = Schedule { crosses: effort.crosses(stream), ..schedule };
        anneal(&mut state, schedule, &mut Random::new(seed, stream), control);
        // A run that was cut short ends hot: it is compared like any other, and hardly ever wins.
        ranked(&state, control)
    };
    let mut stream = 0;
    let runs = |pool: &mut Vec<Ranked>, stream: &mut u64, n: u64, schedule: Schedule, from: &[u16]| {
        pool.par_extend((*stream..*stream + n).into_par_iter().map(|stream| run(schedule, from, stream)));
        *stream += n;
        if control.leaves(recombination(instance, pool.len())) {
            let placements: Vec<Vec<u16>> = pool.iter().map(|(_, placement)| placement.clone()).collect();
            pool.push(judged(recombine(instance, &placements)));
        }
        keep_best(pool, effort.pool);
    };
    loop {
        let mut pool = elite.clone();
        // What an earlier epoch found would drown the new starts.
        pool.truncate(1);
        let alike = flat.as_ref().map_or(0, |_| effort.starts.div_ceil(FLAT));
        if let Some(flat) = &flat {
            let streams = stream..stream + alike;
            pool.extend(lift(instance, flat, &effort, seed, streams, balanced, control));
        }
        stream += alike;
        let starts = effort.starts - alike;
        runs(&mut pool, &mut stream, starts, effort.start, balanced);
        for _ in 0..effort.rounds {
            // Nothing costs less than nothing.
            if control.stopped() || pool[0].0 == (0, 0) {
                break;
            }
            let from = pool[0].1.clone();
            runs(&mut pool, &mut stream, RUNS, effort.polish, &from);
        }
        elite.append(&mut pool);
        if control.deadline.is_none() || control.stopped() {
            return Ok(best(elite));
        }
    }
}

/// Anneals as if all links were alike, on `flat`, recombines that, and polishes it all with links as they are.
fn lift(
    instance: &Instance,
    flat: &Instance,
    effort: &Effort,
    seed: u64,
    streams: std::ops::Range<u64>,
    balanced: &[u16],
    control: &Control,
) -> Vec<Ranked> {
    let length = effort.start.length.half();
    let run = |instance, from: &[u16], stream, schedule| {
        let mut state = State::new(instance, from.to_vec());
        let schedule = Schedule { length, crosses: effort.crosses(stream), ..schedule };
        anneal(&mut state, schedule, &mut Random::new(seed, stream), control);
        state
    };
    let numbers: Vec<u64> = streams.collect();
    let start = |&stream: &u64| run(flat, balanced, stream, effort.start).expert_in;
    let mut alike: Vec<Vec<u16>> = numbers.par_iter().map(start).collect();
    if control.leaves(recombination(flat, alike.len())) {
        // The last makes room for what they are together.
        let together = recombine(flat, &alike);
        alike.insert(0, together);
        alike.truncate(numbers.len());
    }
    let polish = |(stream, from): (&u64, &Vec<u16>)| {
        // Streams of their own, which no start has.
        ranked(&run(instance, from, !stream, effort.polish), control)
    };
    numbers.par_iter().zip(&alike).map(polish).collect()
}

/// Where the search starts: loads as balanced as time allows, whatever the traffic `[L, P]`.
fn balanced(instance: &Instance, control: &Control) -> Result<Vec<u16>> {
    let sizes = instance.sizes;
    let (p, d) = (sizes.slots(), sizes.devices);
    let equal = Sizes { smallest: sizes.per_device, largest: sizes.per_device };
    let mut expert_in = Vec::with_capacity(sizes.layers * p);
    let loads = instance.load.chunks_exact(p).map(|load| load.iter().sum::<u64>());
    let is_free = loads.zip(&instance.cap).all(|(load, &cap)| load <= cap);
    let now = Instant::now();
    let end = control.deadline.filter(|_| is_free).map(|end| now + (end - now).mul_f64(BALANCED_SHARE));
    let is_over = || control.stopped() || end.is_some_and(|end| Instant::now() >= end);
    let improve = Improve { goal: Goal::Peak, is_over: &is_over };
    for packing in pack(&instance.load, p, d, equal, Some(improve))? {
        let mut layer: Vec<u16> = (0..p as u16).collect();
        layer.sort_by_key(|&e| packing.cluster[usize::from(e)]);
        expert_in.extend(layer);
    }
    Ok(expert_in)
}

fn ranked(state: &State<'_>, control: &Control) -> Ranked {
    let (excess, cost) = (state.excess(), state.cost());
    if excess == 0 {
        control.offer(cost);
    }
    ((excess, cost), state.expert_in.clone())
}

/// Keeps the `n` cheapest placements, cheapest first; equals stay in order.
fn keep_best(pool: &mut Vec<Ranked>, n: usize) {
    pool.sort_by_key(|&(rank, _)| rank);
    pool.dedup();
    pool.truncate(n.max(1));
}

fn best(mut pool: Vec<Ranked>) -> Vec<u16> {
    keep_best(&mut pool, 1);
    pool.swap_remove(0).1
}

/// Steps of a recombination per pair of members: an assignment problem per boundary.
fn per_pair(instance: &Instance) -> f64 {
    let (p, d) = (instance.sizes.slots(), instance.sizes.devices);
    (instance.sizes.layers * (d * p + d * d * d)) as f64
}

/// Seconds that a recombination takes, roughly: a step takes about a nanosecond.
fn recombination(instance: &Instance, members: usize) -> f64 {
    1e-9 * per_pair(instance) * (members * members) as f64 / rayon::current_num_threads() as f64
}

/// The sizes of a search.
#[derive(Debug)]
struct Effort {
    starts: u64,
    start: Schedule,
    rounds: u64,
    polish: Schedule,
    /// Placements that are recombined together at the most.
    pool: usize,
    /// Every how manieth run crosses caps; none of them for 0.
    crossing: u64,
}

impl Effort {
    fn new(instance: &Instance, trials: Option<u64>, balanced: &[u16], control: &Control) -> Self {
        let sizes = instance.sizes;
        let (places, wide) = ((sizes.layers * sizes.slots()) as u64, sizes.is_wide());
        let pool = (5e8 / per_pair(instance)).sqrt().clamp(3.0, STARTS as f64) as usize;
        let (starts, start, rounds, polish) = match (trials, control.deadline) {
            (None, Some(deadline)) => {
                let threads = rayon::current_num_threads();
                let per_trial = seconds_per_trial(instance, balanced);
                let limit = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
                // A run is worth this long; where the time does not suffice for many, few take what there is.
                let seconds = if wide {
                    (places * 60).clamp(100_000, 1_600_000)
                } else {
                    (places * 5000).clamp(400_000, 32_000_000)
                };
                let seconds = seconds as f64 * per_trial;
                let starts =
                    (limit * START_SHARE * threads as f64 / seconds).clamp(threads as f64, STARTS as f64);
                let waves = (starts as usize).div_ceil(threads) as f64;
                let polish_waves = (ROUNDS * RUNS.div_ceil(threads as u64)) as f64;
                let time = |share: f64, waves: f64| {
                    Length::time(Duration::from_secs_f64(seconds.min(limit * share / waves)))
                };
                (
                    starts as u64,
                    time(START_SHARE, waves),
                    TIMED_ROUNDS,
                    time((1.0 - START_SHARE) * 0.95, polish_waves),
                )
            }
            (trials, _) if wide => {
                let trials = trials.unwrap_or((places * 30).clamp(50_000, 600_000));
                let work = trials.max(1) as f64 * sizes.slots() as f64;
                let starts = (WORK / work).clamp(2.0, STARTS as f64);
                let rounds = (2.0 * WORK / (RUNS as f64 * work)).min(ROUNDS as f64);
                (starts as u64, Length::trials(trials), rounds as u64, Length::trials(trials))
            }
            (trials, _) => {
                let trials = trials.unwrap_or((places * 2600).clamp(200_000, 16_000_000));
                let starts = (100_000_000 / trials.max(1)).clamp(4, STARTS as u64);
                (starts, Length::trials(trials), ROUNDS, Length::trials(trials))
            }
        };
        let schedule = |length, (hot, cold)| Schedule { length, hot, cold, crosses: false };
        Self {
            starts,
            start: schedule(start, if wide { WIDE_START } else { START }),
            rounds,
            polish: schedule(polish, POLISH),
            pool: pool.min(starts as usize + 1),
            crossing: match share_within_caps(instance, balanced) {
                share if share < TIGHT => 1,
                share if share < LOOSE => 2,
                _ => 0,
            },
        }
    }

    /// Whether the run with this stream may cross caps on its way.
    fn crosses(&self, stream: u64) -> bool {
        self.crossing > 0 && stream.is_multiple_of(self.crossing)
    }
}

/// The share of swaps from a balanced placement that keeps the caps; 1 where there is none.
fn share_within_caps(instance: &Instance, balanced: &[u16]) -> f64 {
    const SAMPLE: usize = 1 << 12;
    let (layers, slots) = (instance.sizes.layers, instance.sizes.slots());
    let (state, mut random) = (State::new(instance, balanced.to_vec()), Random::new(0, 0));
    let mut swap = || state.swap_with_slot(random.below(layers), random.below(slots), random.below(slots));
    let swaps: Vec<_> = (0..SAMPLE).filter_map(|_| swap()).collect();
    let fitting = swaps.iter().filter(|&&swap| state.fits(swap)).count();
    if swaps.is_empty() { 1.0 } else { fitting as f64 / swaps.len() as f64 }
}

/// Measured on a short run at the starting temperature.
fn seconds_per_trial(instance: &Instance, balanced: &[u16]) -> f64 {
    let sample = if instance.sizes.is_wide() { 1 << 11 } else { 1 << 15 };
    let mut state = State::new(instance, balanced.to_vec());
    let (length, hot) = (Length::trials(sample), START.0);
    let schedule = Schedule { length, hot, cold: hot, crosses: false };
    let begin = Instant::now();
    anneal(&mut state, schedule, &mut Random::new(0, 0), &Control::new(None));
    begin.elapsed().as_secs_f64() / sample as f64
}
