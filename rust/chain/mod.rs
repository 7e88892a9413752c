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
use crate::packing::{ClusterSizes, Goal, Improve, pack};
use crate::random::Random;
use anneal::{Schedule, anneal};
use instance::{Instance, Sizes};
use partitions::recombine;
use state::State;

/// A placement with its rank: tokens above caps, then cost.
type Ranked = ((u128, i64), Vec<u16>);

/// Largest number of starts.
const STARTS: usize = 24;
/// Rounds of polishing, without and with a time limit, and runs per round. With a time limit the search then starts afresh,
/// without one it ends.
const ROUNDS: u64 = 12;
const TIMED_ROUNDS: u64 = 30;
const RUNS: u64 = 4;
/// Swaps of wide layers that all starts evaluate together; all rounds together evaluate twice as many.
const WORK: f64 = 4e8;
/// Share of a time limit for balancing the start, where nothing caps loads.
const BALANCED_SHARE: f64 = 0.05;
/// Share of a time limit for the first starts.
const START_SHARE: f64 = 0.4;
/// First and last temperature of a start and of a polishing run (measured: docs/experiments.md).
const START: (f64, f64) = (12.0, 0.35);
const WIDE_START: (f64, f64) = (4.0, 0.35);
const POLISH: (f64, f64) = (3.0, 0.2);
/// Where links differ, one in so many starts is annealed as if all links were alike first.
const UNIFORM_STARTS: u64 = 4;
/// All runs may exceed caps if less than this share of the swaps of a balanced placement keeps them.
const TIGHT: f64 = 0.1;
/// Every other run may exceed caps if the share is less than this: placements of lower cost have fewer swaps that keep them
/// (bench/RESULTS.md).
const LOOSE: f64 = 0.6;

/// Returns the expert in every slot `[L, P]` of the best placement that the search finds.
///
/// Every start makes so many `trials`; by default their number follows from the size of the problem or from the time left.
/// The search starts from a placement with balanced loads. It raises the caps to the loads of that placement where these are
/// higher, and its answer keeps the raised caps. Where caps are tight, the search exceeds them on its way.
pub fn search(
    instance: &mut Instance,
    seed: u64,
    trials: Option<u64>,
    control: &Control,
) -> Result<Vec<u16>> {
    let balanced: &[u16] = &balance_loads(instance, control)?;
    instance.raise_caps(balanced);
    let instance = &*instance;
    let rank_placement = |expert_in: Vec<u16>| rank(&State::new(instance, expert_in), control);
    let mut elite: Vec<Ranked> = vec![rank_placement(balanced.to_vec())];
    if instance.sizes.devices < 2 || !instance.has_pairs() || control.stopped() {
        return Ok(best(elite));
    }
    let effort = Effort::new(instance, trials, balanced, control);
    // Where links differ, groups of experts are easier to find while it does not matter yet on which node they are.
    let uniform = (!instance.has_uniform_links()).then(|| instance.with_uniform_links());
    let run = |schedule: Schedule, from: &[u16], stream: u64| {
        let mut state = State::new(instance, from.to_vec());
        let schedule = Schedule { exceeds_caps: effort.exceeds_caps(stream), ..schedule };
        anneal(&mut state, schedule, &mut Random::new(seed, stream), control);
        // A run that was cut short ends hot: its result is compared like any other, and hardly ever wins.
        rank(&state, control)
    };
    let mut stream = 0;
    let runs = |pool: &mut Vec<Ranked>, stream: &mut u64, n: u64, schedule: Schedule, from: &[u16]| {
        pool.par_extend((*stream..*stream + n).into_par_iter().map(|stream| run(schedule, from, stream)));
        *stream += n;
        if control.has_time_for(recombination_seconds(instance, pool.len())) {
            let placements: Vec<Vec<u16>> = pool.iter().map(|(_, placement)| placement.clone()).collect();
            pool.push(rank_placement(recombine(instance, &placements)));
        }
        keep_best(pool, effort.pool);
    };
    loop {
        let mut pool = elite.clone();
        // Of earlier epochs only the best placement stays: more of them would crowd out the new starts.
        pool.truncate(1);
        let uniform_starts = uniform.as_ref().map_or(0, |_| effort.starts.div_ceil(UNIFORM_STARTS));
        if let Some(uniform) = &uniform {
            let streams = stream..stream + uniform_starts;
            pool.extend(start_uniform(instance, uniform, &effort, seed, streams, balanced, control));
        }
        stream += uniform_starts;
        let starts = effort.starts - uniform_starts;
        runs(&mut pool, &mut stream, starts, effort.start, balanced);
        for _ in 0..effort.rounds {
            // No placement has a lower rank than zero tokens above caps at zero cost.
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

/// Anneals as if all links were alike, on the instance `uniform`; recombines the results, and polishes them with the real
/// links.
fn start_uniform(
    instance: &Instance,
    uniform: &Instance,
    effort: &Effort,
    seed: u64,
    streams: std::ops::Range<u64>,
    balanced: &[u16],
    control: &Control,
) -> Vec<Ranked> {
    let length = effort.start.length.half();
    let run = |instance, from: &[u16], stream, schedule| {
        let mut state = State::new(instance, from.to_vec());
        let schedule = Schedule { length, exceeds_caps: effort.exceeds_caps(stream), ..schedule };
        anneal(&mut state, schedule, &mut Random::new(seed, stream), control);
        state
    };
    let numbers: Vec<u64> = streams.collect();
    let start = |&stream: &u64| run(uniform, balanced, stream, effort.start).expert_in;
    let mut placements: Vec<Vec<u16>> = numbers.par_iter().map(start).collect();
    if control.has_time_for(recombination_seconds(uniform, placements.len())) {
        // The recombined placement takes the place of the last one.
        let recombined = recombine(uniform, &placements);
        placements.insert(0, recombined);
        placements.truncate(numbers.len());
    }
    let polish = |(stream, from): (&u64, &Vec<u16>)| {
        // The complement is the number of no start's stream.
        rank(&run(instance, from, !stream, effort.polish), control)
    };
    numbers.par_iter().zip(&placements).map(polish).collect()
}

/// Returns the placement `[L, P]` from which the search starts: with loads as balanced as time allows, whatever it costs.
fn balance_loads(instance: &Instance, control: &Control) -> Result<Vec<u16>> {
    let sizes = instance.sizes;
    let (p, d) = (sizes.slots(), sizes.devices);
    let equal = ClusterSizes { smallest: sizes.per_device, largest: sizes.per_device };
    let mut expert_in = Vec::with_capacity(sizes.layers * p);
    let loads = instance.load.chunks_exact(p).map(|load| load.iter().sum::<u64>());
    let is_uncapped = loads.zip(&instance.cap).all(|(load, &cap)| load <= cap);
    let now = Instant::now();
    let end = control.deadline.filter(|_| is_uncapped).map(|end| now + (end - now).mul_f64(BALANCED_SHARE));
    let is_over = || control.stopped() || end.is_some_and(|end| Instant::now() >= end);
    let improve = Improve { goal: Goal::Peak, is_over: &is_over };
    for packing in pack(&instance.load, p, d, equal, Some(improve))? {
        let mut layer: Vec<u16> = (0..p as u16).collect();
        layer.sort_by_key(|&e| packing.cluster[usize::from(e)]);
        expert_in.extend(layer);
    }
    Ok(expert_in)
}

/// Returns the placement of a state with its rank; reports its cost as progress if it keeps the caps.
fn rank(state: &State<'_>, control: &Control) -> Ranked {
    let (excess, cost) = (state.excess(), state.cost());
    if excess == 0 {
        control.offer(cost);
    }
    ((excess, cost), state.expert_in.clone())
}

/// Keeps the `n` placements of lowest rank, in rising order; placements of equal rank stay in their order.
fn keep_best(pool: &mut Vec<Ranked>, n: usize) {
    pool.sort_by_key(|&(rank, _)| rank);
    pool.dedup();
    pool.truncate(n.max(1));
}

/// Returns the placement of lowest rank.
fn best(mut pool: Vec<Ranked>) -> Vec<u16> {
    keep_best(&mut pool, 1);
    pool.swap_remove(0).1
}

/// Estimates the steps of a recombination for each pair of placements: one assignment problem per boundary.
fn steps_per_pair(instance: &Instance) -> f64 {
    let (p, d) = (instance.sizes.slots(), instance.sizes.devices);
    (instance.sizes.layers * (d * p + d * d * d)) as f64
}

/// Estimates the seconds of a recombination of so many placements; a step takes about a nanosecond.
fn recombination_seconds(instance: &Instance, placements: usize) -> f64 {
    1e-9 * steps_per_pair(instance) * (placements * placements) as f64 / rayon::current_num_threads() as f64
}

/// How much to search: numbers of starts and rounds, and the schedules of their runs.
#[derive(Debug)]
struct Effort {
    starts: u64,
    start: Schedule,
    rounds: u64,
    polish: Schedule,
    /// Largest number of placements that are recombined together.
    pool: usize,
    /// One in so many runs may exceed caps; none if this is 0.
    exceeding_every: u64,
}

impl Effort {
    /// Chooses the amount of a search by its trials, its time limit or the size of the problem, and how often it may exceed
    /// caps.
    fn new(instance: &Instance, trials: Option<u64>, balanced: &[u16], control: &Control) -> Self {
        let sizes = instance.sizes;
        let amount = match (trials, control.deadline) {
            (None, Some(deadline)) => Amount::by_time(sizes, deadline, seconds_per_trial(instance, balanced)),
            (trials, _) => Amount::by_trials(sizes, trials),
        };
        let schedule = |length, (hot, cold)| Schedule { length, hot, cold, exceeds_caps: false };
        let pool = (5e8 / steps_per_pair(instance)).sqrt().clamp(3.0, STARTS as f64) as usize;
        Self {
            starts: amount.starts,
            start: schedule(amount.start, if sizes.is_wide() { WIDE_START } else { START }),
            rounds: amount.rounds,
            polish: schedule(amount.polish, POLISH),
            pool: pool.min(amount.starts as usize + 1),
            exceeding_every: match share_within_caps(instance, balanced) {
                share if share < TIGHT => 1,
                share if share < LOOSE => 2,
                _ => 0,
            },
        }
    }

    /// Returns whether the run with this stream may exceed caps on its way.
    fn exceeds_caps(&self, stream: u64) -> bool {
        self.exceeding_every > 0 && stream.is_multiple_of(self.exceeding_every)
    }
}

/// Numbers of starts and rounds, and the lengths of a start and of a polishing run.
struct Amount {
    starts: u64,
    start: Length,
    rounds: u64,
    polish: Length,
}

impl Amount {
    /// Returns the amount that fits into the time until a deadline.
    fn by_time(sizes: Sizes, deadline: Instant, seconds_per_trial: f64) -> Self {
        let places = (sizes.layers * sizes.slots()) as u64;
        let threads = rayon::current_num_threads();
        let limit = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        // A run longer than this gains little. Where time is too short for many such runs, a few shorter ones share it.
        let trials = if sizes.is_wide() {
            (places * 60).clamp(100_000, 1_600_000)
        } else {
            (places * 5000).clamp(400_000, 32_000_000)
        };
        let seconds = trials as f64 * seconds_per_trial;
        let starts = (limit * START_SHARE * threads as f64 / seconds).clamp(threads as f64, STARTS as f64);
        let waves = (starts as usize).div_ceil(threads) as f64;
        let polish_waves = (ROUNDS * RUNS.div_ceil(threads as u64)) as f64;
        let time = |share: f64, waves: f64| {
            Length::time(Duration::from_secs_f64(seconds.min(limit * share / waves)))
        };
        Self {
            starts: starts as u64,
            start: time(START_SHARE, waves),
            rounds: TIMED_ROUNDS,
            polish: time((1.0 - START_SHARE) * 0.95, polish_waves),
        }
    }

    /// Returns the amount for so many trials of each run or, by default, for the size of the problem.
    fn by_trials(sizes: Sizes, trials: Option<u64>) -> Self {
        let places = (sizes.layers * sizes.slots()) as u64;
        let (trials, starts, rounds) = if sizes.is_wide() {
            let trials = trials.unwrap_or((places * 30).clamp(50_000, 600_000));
            let work = trials.max(1) as f64 * sizes.slots() as f64;
            let starts = (WORK / work).clamp(2.0, STARTS as f64);
            let rounds = (2.0 * WORK / (RUNS as f64 * work)).min(ROUNDS as f64);
            (trials, starts as u64, rounds as u64)
        } else {
            let trials = trials.unwrap_or((places * 2600).clamp(200_000, 16_000_000));
            (trials, (100_000_000 / trials.max(1)).clamp(4, STARTS as u64), ROUNDS)
        };
        Self { starts, start: Length::trials(trials), rounds, polish: Length::trials(trials) }
    }
}

/// Estimates the share of the swaps of a balanced placement that keep the caps; 1 if there are no swaps.
fn share_within_caps(instance: &Instance, balanced: &[u16]) -> f64 {
    const SAMPLE: usize = 1 << 12;
    let (layers, slots) = (instance.sizes.layers, instance.sizes.slots());
    let (state, mut random) = (State::new(instance, balanced.to_vec()), Random::new(0, 0));
    let mut swap = || state.swap_with_slot(random.below(layers), random.below(slots), random.below(slots));
    let swaps: Vec<_> = (0..SAMPLE).filter_map(|_| swap()).collect();
    let fitting = swaps.iter().filter(|&&swap| state.fits(swap)).count();
    if swaps.is_empty() { 1.0 } else { fitting as f64 / swaps.len() as f64 }
}

/// Measures the seconds of a trial in a short run at the first temperature of a start.
fn seconds_per_trial(instance: &Instance, balanced: &[u16]) -> f64 {
    let sample = if instance.sizes.is_wide() { 1 << 11 } else { 1 << 15 };
    let mut state = State::new(instance, balanced.to_vec());
    let (length, hot) = (Length::trials(sample), START.0);
    let schedule = Schedule { length, hot, cold: hot, exceeds_caps: false };
    let begin = Instant::now();
    anneal(&mut state, schedule, &mut Random::new(0, 0), &Control::new(None));
    begin.elapsed().as_secs_f64() / sample as f64
}
