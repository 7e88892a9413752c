//! Annealing of one layer by swaps and, where slots are to spare, by other copies.

use std::f64::consts::LN_2;
use std::time::{Duration, Instant};

use super::terms::Terms;
use super::{EMPTY, Layer, Move, Slots};
use crate::anneal::{self, Blocks, Length, Ramp};
use crate::control::Control;
use crate::random::{Random, scale};

/// The temperatures of a search, and its proposals.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    /// First and last temperature, in typical changes of the cost.
    first: f64,
    last: f64,
    /// One proposal in so many changes copies, where slots are to spare; the others exchange two slots.
    put: u64,
    /// The same where copies cost: which of them pay may decide more than where they are.
    put_charged: u64,
    /// Proposals that are priced to find the typical change.
    sample: usize,
}

/// The schedule that suits layers of 12 to 288 slots and of 1 to 400 windows (bench/RESULTS.md).
pub(super) const WARM: Schedule = Schedule { first: 0.3, last: 0.01, put: 8, put_charged: 8, sample: 255 };
/// Hot enough that copies of heavy experts are removed and added again, which layers of few slots may need.
pub(super) const HOT: Schedule = Schedule { first: 3.0, put_charged: 2, ..WARM };
/// Cool enough that few trials in many windows do not lose a good start.
pub(super) const COOL: Schedule = Schedule { first: 0.03, last: 0.01, put: 16, put_charged: 2, sample: 64 };

const BLOCKS: Blocks = Blocks { trials: 256, check: 1 };
/// Last temperature with few windows: devices become nearly even, so that the last gains are small.
const COLDEST: f64 = 1e-4;
const FEW_WINDOWS: usize = 3;
/// Last temperature where devices hold many slots in few windows: they become nearly even, too. With fewer slots, or more
/// windows, the last gains would be of the windows that were seen alone.
const COLD: f64 = 1e-3;
const COLD_WINDOWS: usize = 8;
const COLD_SLOTS: usize = 16;
/// Part of its trials that a layer gets however short the time: a start that was not annealed is of no use.
const LEAST: u64 = 50;
/// A typical change below this part of the cost is rounding.
const FLAT: f64 = 1e-7;
/// Trials between two looks at the clock where a trial counts thousands of expert sets.
const BETWEEN: u64 = 16;

/// Temperatures that no accepted change adds more than: no number of 24 bits between 0 and 1 has a larger logarithm.
const OUT_OF_QUESTION: f64 = 18.0;
/// The logarithm of 2 from below and from above.
const LOG_2: [f64; 2] = [LN_2 - 1e-7, LN_2 + 1e-7];

/// Bits of proposals that begin with the device that costs most, where losses count.
const AIMED: u64 = 1 << 16;

/// The temperatures that searches begin at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heat {
    /// Warm and hot, in turn.
    InTurn,
    /// A typical change of the cost is often accepted.
    Warm,
    /// Changes of several times that are accepted, too.
    Hot,
    /// So low that searches stay near their starts, which are better than what as many trials find from higher ones.
    Cool,
}

/// How much to search.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Trials of every search.
    pub trials: u64,
    /// True if a slot that holds an expert may be emptied.
    pub empties: bool,
    /// Searches from one start, the best of which is the answer.
    pub restarts: u64,
    /// Rounds over all layers, where neighbours count.
    pub rounds: u64,
    /// True if starts are so good, and trials so few, that a search is to stay near: its end is then the answer, if by the
    /// slowest devices of the windows it is no worse than the start; else the best on the way is.
    pub quick: bool,
    /// The temperatures that searches begin at.
    pub heat: Heat,
    /// True if layers are searched at once, or all in this thread.
    pub parallel: bool,
}

/// Returns the best slots that annealing finds from `start`, and their cost.
///
/// If the time is over before it begins, returns the start at an infinite cost: even to price it takes time.
#[must_use]
pub(super) fn search(
    layer: &Layer,
    start: &Slots,
    effort: Effort,
    schedule: Schedule,
    time: Option<Duration>,
    random: &mut Random,
    control: &Control,
) -> (f64, Slots) {
    if control.stopped() {
        return (f64::INFINITY, start.clone());
    }
    let begin = Instant::now();
    let mut slots = start.clone();
    let mut terms = Terms::new(layer, &slots);
    let mut best = (if effort.quick { terms.slowest() } else { terms.cost() }, slots.expert_in.clone());
    let contents = Contents::new(layer, effort.empties);
    let put = if layer.charges_copies() { schedule.put_charged } else { schedule.put };
    let counts_sets = layer.costs.sets.is_some();
    let has_few_windows = layer.windows.count <= FEW_WINDOWS && terms.peak().is_some();
    let holds_many = slots.expert_in.len() >= COLD_SLOTS * layer.site.devices();
    let last = match layer.windows.count {
        _ if has_few_windows => COLDEST,
        ..=COLD_WINDOWS if holds_many => COLD,
        _ => schedule.last,
    };
    let typical =
        typical_change(layer, &mut terms, &slots, contents, (schedule.sample, put), random, control);
    let time = time.map(|time| time.saturating_sub(begin.elapsed()));
    // Where no proposal changes the cost by more than rounding, hardly any will.
    let is_flat = typical <= FLAT * terms.cost();
    let trials = if is_flat { effort.trials / LEAST } else { effort.trials };
    let length = Length { trials, least: effort.trials / LEAST, time };
    let ramp = Ramp { first: schedule.first * typical, change: last / schedule.first };
    anneal::anneal(length, BLOCKS, [ramp], control, |[temperature]| {
        for trial in 0..BLOCKS.trials {
            if trial % BETWEEN == BETWEEN - 1 && counts_sets && control.stopped() {
                break;
            }
            let step = proposal(&slots, &terms, contents, put, random);
            if !slots.allows(&layer.site, step) {
                continue;
            }
            let limit = temperature * OUT_OF_QUESTION;
            let Some(change) = terms.change(&slots, step, limit) else { continue };
            if accepts(change, temperature, random.bits()) {
                terms.apply(&mut slots, step);
                let cost = if effort.quick { f64::INFINITY } else { terms.cost() };
                if cost < best.0 {
                    best.0 = cost;
                    best.1.clone_from(&slots.expert_in);
                }
            }
        }
    });
    if effort.quick {
        let slowest = terms.slowest();
        if slowest <= best.0 {
            return (slowest, slots);
        }
    }
    (best.0, Slots::new(&layer.site.capacity, layer.experts, &best.1))
}

/// The contents that a slot may get where there are spare slots.
#[derive(Debug, Clone, Copy)]
struct Contents {
    /// Experts; 0 where all slots are needed.
    experts: usize,
    /// How often nothing is proposed, where an expert is proposed once.
    empties: usize,
}

impl Contents {
    /// Returns the contents of a layer whose slots may be emptied or not. Where a copy costs, copies are dropped as often
    /// as they are added: else a search fills its slots, and hardly ever finds out which copies do not pay.
    fn new(layer: &Layer, may_empty: bool) -> Self {
        let experts = if layer.has_spare() { layer.experts } else { 0 };
        let often = if layer.charges_copies() { experts } else { 1 };
        Self { experts, empties: if may_empty { often } else { 0 } }
    }

    /// Returns one of them.
    #[inline(always)]
    fn choose(self, bits: u64) -> u16 {
        let content = scale(bits, self.experts + self.empties);
        if content >= self.experts { EMPTY } else { content as u16 }
    }
}

/// Returns an exchange of two random slots or, where there are spare slots, one time in `put` another content of one.
#[inline(always)]
fn proposal(slots: &Slots, terms: &Terms<'_>, contents: Contents, put: u64, random: &mut Random) -> Move {
    let (bits, count) = (random.bits(), slots.expert_in.len());
    let (mut p, other) = (scale(bits >> 32, count), random.bits() >> 32);
    // If the cost depends on one device, few moves of others help.
    if bits & AIMED == AIMED
        && let Some(slots) = terms.costliest(random).map(|device| slots.of(device))
        && !slots.is_empty()
    {
        p = slots.start + scale(bits >> 32, slots.len());
    }
    if contents.experts > 0 && bits.is_multiple_of(put) {
        Move::Put(p, contents.choose(other))
    } else {
        Move::Swap(p, scale(other, count))
    }
}

/// Returns the median size of the changes of cost by proposals, without those that change nothing.
fn typical_change(
    layer: &Layer,
    terms: &mut Terms<'_>,
    slots: &Slots,
    contents: Contents,
    (sample, put): (usize, u64),
    random: &mut Random,
    control: &Control,
) -> f64 {
    let mut changes: Vec<f64> = (0..sample)
        .take_while(|_| !control.stopped())
        .filter_map(|_| {
            let step = proposal(slots, terms, contents, put, random);
            let change =
                slots.allows(&layer.site, step).then(|| terms.change(slots, step, f64::INFINITY))??;
            (change != 0.0).then_some(change.abs())
        })
        .collect();
    changes.sort_by(f64::total_cmp);
    changes.get(changes.len() / 2).copied().unwrap_or(0.0)
}

/// Returns whether a change is accepted: always if it adds no cost, else with probability exp(-change / temperature).
fn accepts(change: f64, temperature: f64, bits: u64) -> bool {
    if change <= 0.0 {
        return true;
    }
    let number = bits >> 40;
    // Leading zeros of 24 bits bound the logarithm from both sides, and seldom leave the question open.
    let zeros = f64::from(number.leading_zeros() - 40);
    if change > (zeros + 1.0) * LOG_2[1] * temperature {
        return false;
    }
    if change < zeros * LOG_2[0] * temperature {
        return true;
    }
    let uniform = (number as f64 + 0.5) / (1u64 << 24) as f64;
    change <= -temperature * libm::log(uniform)
}
