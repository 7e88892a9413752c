//! Good prices of experts, by a programme over some contents that grows by those that all of them show to be missing.
//!
//! The programme's own prices jump about while it knows few contents. So they are kept in a box around the best prices
//! known (Marsten, Hogan and Blankenship, 1975), which moves with them and shrinks where it misled.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::contents::{Table, spread};
use super::programme::Programme;
use super::{Layer, Limits, UNIT, rounded};

/// Contents that a look at all of them brings, and how many of them may hold an expert.
const HARVEST: usize = 600;
const PER_EXPERT: usize = 25;
/// Half of the first box, as a share of the mean price, and how it grows and shrinks.
const BOX: f64 = 0.15;
const GROWTH: f64 = 1.5;
const SHRINKAGE: f64 = 0.5;
/// Factor by which a box grows in which nothing better is left.
const WIDER: f64 = 8.0;
/// Gap between the programme's value and the proven one, as a share, at which the search ends.
const ENOUGH: f64 = 1e-4;

/// Limits of a search.
pub(super) struct Budget<'a> {
    pub(super) rounds: usize,
    pub(super) deadline: Option<Instant>,
    pub(super) limits: &'a Limits<'a>,
}

/// Searches for prices, starting from a placement; returns the visits that they prove, and the prices in units.
pub(super) fn search(
    layer: &Layer<'_>,
    table: &Table,
    start: &[u16],
    budget: &Budget<'_>,
) -> (u64, Vec<f64>) {
    let (experts, devices) = (layer.experts(), layer.slots.len());
    let placed: Vec<Vec<u16>> = (0..devices)
        .map(|d| (0..experts as u16).rev().filter(|&e| usize::from(start[usize::from(e)]) == d).collect())
        .collect();
    // A placement that breaks the cap has no visits in the table.
    let target: Option<u64> = placed.iter().map(|content| table.visits(content)).sum();
    let good = target.map_or(u64::MAX, |target| (target as f64 * (1.0 - budget.limits.gap)).ceil() as u64);

    // A visit is shared among the experts that it is for: the prices of what a device holds are its visits.
    let mut best: Vec<f64> = shares(layer, start).into_iter().map(|price| rounded(price * UNIT)).collect();
    let mut begin = Instant::now();
    let (least, mut new) = table.price(&best, HARVEST);
    let mut proven = layer.proven(&best, &least);
    let mut width = BOX * best.iter().sum::<f64>() / experts as f64 / UNIT;
    let mut programme = Programme::new(experts, devices);
    programme.add_contents(table, neighbours(&placed));
    let (mut rounds, mut stable) = (1, 0);
    // A round that takes as long as the longest one must end in time.
    let mut longest = begin.elapsed();
    let late = |longest| budget.deadline.is_some_and(|deadline| Instant::now() + longest >= deadline);
    while rounds < budget.rounds
        && proven < good
        && !budget.limits.control.cancelled.load(Ordering::Relaxed)
        && !late(longest)
    {
        begin = Instant::now();
        programme.add_contents(table, spread(new, experts, PER_EXPERT));
        let centre: Vec<f64> = best.iter().map(|price| price / UNIT).collect();
        let (hoped, prices, inside) = programme.solve(&centre, width);
        let prices: Vec<f64> = prices.iter().map(|price| rounded(price * UNIT)).collect();
        let (least, missing) = table.price(&prices, HARVEST);
        rounds += 1;
        let value = layer.proven(&prices, &least);
        stable = if hoped - value.max(proven) as f64 <= ENOUGH * hoped || missing.is_empty() {
            stable + 1
        } else {
            0
        };
        if value > proven {
            (proven, best, new) = (value, prices, missing);
            width *= GROWTH;
        } else {
            new = missing;
            width *= SHRINKAGE;
        }
        // Nothing better is left in the box. If its ends do not limit the prices, or a wider box has nothing better either,
        // nothing better is left at all.
        if stable > 1 || stable == 1 && inside {
            break;
        }
        if stable == 1 {
            width *= WIDER;
        }
        longest = longest.max(begin.elapsed());
    }
    (proven, best)
}

/// Returns the visits of a placement by expert `[E]`; a visit is shared among the experts that it is for.
fn shares(layer: &Layer<'_>, start: &[u16]) -> Vec<f64> {
    let mut share = vec![0.0; layer.experts()];
    for (set, &count) in layer.ids.chunks_exact(layer.top_k).zip(layer.counts) {
        for &e in set {
            let device = start[usize::from(e)];
            let together = set.iter().filter(|&&other| start[usize::from(other)] == device).count();
            share[usize::from(e)] += count as f64 / together as f64;
        }
    }
    share
}

/// Returns the contents of a placement, and those that differ by an exchange of one expert.
fn neighbours(placed: &[Vec<u16>]) -> Vec<Vec<u16>> {
    let mut all: Vec<Vec<u16>> = placed.to_vec();
    for content in placed {
        for at in 0..content.len() {
            for other in placed.iter().filter(|other| *other != content).flatten() {
                let mut next = content.clone();
                next[at] = *other;
                next.sort_unstable_by(|a, b| b.cmp(a));
                all.push(next);
            }
        }
    }
    all
}
