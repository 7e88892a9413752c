//! A proven lower bound on the devices that tokens visit, where the contents of a device are few enough to try all.
//!
//! # Bound
//!
//! In one layer a token chooses a set of experts, and visits every device that holds one of them. A device that holds
//! the experts C is visited by `f(C)` tokens: those whose set meets C. A placement with one copy of each expert splits
//! the experts into the contents of the devices, so its visits are `sum_d f(C_d)`, and with any prices `p(e)`
//!
//! ```text
//! sum_d f(C_d) = sum_e p(e) + sum_d [f(C_d) - p(C_d)] >= sum_e p(e) + sum_d min { f(C) - p(C) : C fits on d }
//! ```
//!
//! where `p(C)` adds the prices of C's experts: each expert lies on one device, so all prices are taken off once and
//! given back once. C fits on a device if it has no more experts than slots, no fewer than the other devices leave over,
//! and a load between what the cap allows and what the other devices must leave. The best prices are the dual point of
//! the linear programme that covers every expert once with contents (Dantzig and Wolfe, 1960; of partitions of graphs,
//! Johnson, Mehrotra and Nemhauser, 1993). No pair stands for a set of experts here: f is exact.
//!
//! A token whose K experts do not fit on fewer than n devices visits n: that is the bound where it is higher.
//!
//! # Rounding
//!
//! Prices are whole multiples of [`UNIT`], counts are below 2^31, and all sums are whole numbers below 2^53 in `f64`: none
//! is rounded. So the search for good prices and the check of a certificate do the same, and prove the same.

mod contents;
mod prices;
mod programme;

use std::sync::atomic::Ordering;
use std::time::Instant;

use rayon::prelude::*;

use crate::control::Control;
use crate::error::{Error, Result};
use contents::Table;

/// Prices are whole multiples of a token by this.
const UNIT: f64 = 65_536.0;
/// No price is further from 0 than this many tokens, so that sums of [`MOST_SLOTS`] prices are exact.
const LARGEST_PRICE: f64 = (1u64 << 31) as f64;
/// More slots than any device has whose contents can be tried.
const MOST_SLOTS: usize = 32;
/// Contents of all sizes up to which those of a layer are tried.
const MOST_CONTENTS: f64 = 2.5e7;
/// Seconds that the table of a layer takes for each content and each expert of a token, on a slow core.
const TABLE_SECONDS: f64 = 5e-9;
/// Contents that are held at once, of all layers that are being worked on: four bytes each, and as many again for prices.
const MEMORY_CONTENTS: f64 = 1e8;

/// Which experts tokens choose in one layer, and what its devices can hold.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// Distinct sets `[N, top_k]`, ids rising.
    pub ids: &'a [u16],
    /// Tokens of each set, `[N]`.
    pub counts: &'a [u64],
    /// Experts of a set, K.
    pub top_k: usize,
    /// `[E]`.
    pub load: &'a [u64],
    /// The largest load that a device may carry; `u64::MAX` for none.
    pub cap: u64,
    /// Slots of every device, `[D]`.
    pub slots: &'a [usize],
}

impl Layer<'_> {
    /// Returns the number of experts, E.
    fn experts(&self) -> usize {
        self.load.len()
    }

    /// Returns the number of tokens.
    fn tokens(&self) -> u128 {
        self.counts.iter().map(|&count| u128::from(count)).sum()
    }

    /// Returns the fewest and the most experts of every device, `[D]`.
    fn sizes(&self) -> Vec<(usize, usize)> {
        let all: usize = self.slots.iter().sum();
        let experts = self.experts();
        self.slots.iter().map(|&slots| ((slots + experts).saturating_sub(all), slots.min(experts))).collect()
    }

    /// Returns the fewest and the most experts of any device.
    fn range(&self) -> (usize, usize) {
        let sizes = self.sizes();
        let least = sizes.iter().map(|size| size.0).min().unwrap_or(0);
        (least, sizes.iter().map(|size| size.1).max().unwrap_or(0))
    }

    /// Returns the number of contents.
    fn contents(&self) -> f64 {
        let (least, largest) = self.range();
        (least..=largest).map(|size| contents::binomial_f64(self.experts(), size)).sum()
    }

    /// Returns whether all contents can be tried: there are few of them, and few tokens.
    fn is_tractable(&self) -> bool {
        let (_, largest) = self.range();
        largest <= MOST_SLOTS && self.contents() <= MOST_CONTENTS && self.tokens() < 1 << 31
    }

    /// Returns a lower bound on visits from capacity alone.
    fn least(&self) -> u128 {
        let (_, largest) = self.range();
        self.tokens() * self.top_k.div_ceil(largest.max(1)) as u128
    }

    /// Returns the visits that prices prove; `least_of` has the least `f(C) - p(C)` by size of C, in units.
    fn proven(&self, prices: &[f64], least_of: &[f64]) -> u64 {
        let mut sum: i128 = prices.iter().map(|&price| price as i128).sum();
        let (first, _) = self.range();
        for (least, largest) in self.sizes() {
            let best =
                least_of[least - first..=largest - first].iter().copied().fold(f64::INFINITY, f64::min);
            if best == f64::INFINITY {
                return self.least() as u64; // no placement keeps the cap, so that any bound holds
            }
            sum += best as i128;
        }
        let visits = -(-sum).div_euclid(UNIT as i128);
        visits.max(self.least() as i128) as u64
    }
}

/// When to stop, whatever comes first.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Times that all contents of a layer are looked at.
    pub rounds: usize,
    /// Contents that are looked at in all: every layer has its share, and is looked at once at least.
    pub work: f64,
    /// Gap at which the search ends: the visits that a better placement could save, as a share of the known placement's.
    pub gap: f64,
    /// Deadline and cancellation. With a deadline the result depends on the machine.
    pub control: &'a Control,
}

/// Returns whether the contents of every layer can be tried.
#[must_use]
pub fn is_tractable(layers: &[Layer<'_>]) -> bool {
    layers.iter().all(Layer::is_tractable)
}

/// Returns the number of layers that are worked on at once, so that their contents fit into memory.
fn at_once(layers: &[Layer<'_>]) -> usize {
    let largest = layers.iter().map(Layer::contents).fold(1.0, f64::max);
    ((MEMORY_CONTENTS / largest) as usize).clamp(1, rayon::current_num_threads())
}

/// Bounds the visits of every layer from below, all of which are tractable; `start` is a placement to start from, the device of
/// every expert `[L, E]`.
///
/// Returns the proven visits of every layer `[L]`, and the prices `[L, E]`, in tokens, that prove them: zeros where nothing
/// is better than capacity. Runs on the ambient rayon pool; without a deadline the result is a function of the arguments
/// alone. `report` is called with the visits proven so far, of all layers.
pub fn bound(
    layers: &[Layer<'_>],
    start: &[u16],
    limits: &Limits<'_>,
    mut report: impl FnMut(u64),
) -> (Vec<u64>, Vec<f64>) {
    let experts = layers.first().map_or(0, Layer::experts);
    let (mut visits_of, mut prices_of) = (Vec::new(), Vec::new());
    let together = at_once(layers);
    let total = layers.len();
    let mut proven: u64 = layers.iter().map(|layer| layer.least() as u64).sum();
    for (number, wave) in layers.chunks(together).enumerate() {
        let done = number * together;
        // The remaining time is shared among the remaining layers.
        let begin = Instant::now();
        let share = limits.control.deadline.map(|deadline| {
            deadline
                .saturating_duration_since(begin)
                .div_f64(total.saturating_sub(done).div_ceil(wave.len()) as f64)
        });
        let bounds: Vec<_> = wave
            .par_iter()
            .enumerate()
            .with_max_len(1)
            .map(|(at, layer)| {
                let start = &start[(done + at) * experts..][..experts];
                bound_layer(layer, start, limits, total, share.map(|share| begin + share))
            })
            .collect();
        for (layer, (visits, prices)) in wave.iter().zip(bounds) {
            proven += visits - layer.least() as u64;
            visits_of.push(visits);
            prices_of.extend(prices.iter().map(|price| price / UNIT));
        }
        report(proven);
    }
    (visits_of, prices_of)
}

/// Recomputes the visits of every layer that prices `[L, E]` prove. Any numbers prove something true.
pub fn verify(layers: &[Layer<'_>], prices: &[f64]) -> Result<Vec<u64>> {
    if !is_tractable(layers) {
        return Err(Error::shape("certificate", "contents that can be tried", &"more"));
    }
    let experts: usize = layers.iter().map(Layer::experts).sum();
    if prices.len() != experts {
        return Err(Error::shape("certificate", format!("{experts} prices"), &prices.len()));
    }
    let proven = |(prices, layer): (&[f64], &Layer<'_>)| {
        let prices: Vec<f64> = prices.iter().map(|&price| rounded(price * UNIT)).collect();
        if prices.iter().all(|&price| price == 0.0) {
            return layer.least() as u64;
        }
        layer.proven(&prices, &Table::new(layer).price(&prices, 0).0)
    };
    let (together, of_layer) = (at_once(layers), layers.first().map_or(1, Layer::experts));
    let waves = layers.chunks(together).zip(prices.chunks(together * of_layer));
    let wave = |(wave, prices): (&[Layer<'_>], &[f64])| -> Vec<u64> {
        prices.par_chunks(of_layer).zip(wave).map(proven).collect()
    };
    Ok(waves.flat_map(wave).collect())
}

/// Returns a price in units: a whole number, and near enough to 0.
fn rounded(price: f64) -> f64 {
    if price.is_nan() { 0.0 } else { price.clamp(-LARGEST_PRICE * UNIT, LARGEST_PRICE * UNIT).floor() }
}

/// Bounds the visits of one of so many layers; returns them with the prices in units that prove them.
fn bound_layer(
    layer: &Layer<'_>,
    start: &[u16],
    limits: &Limits<'_>,
    layers: usize,
    deadline: Option<Instant>,
) -> (u64, Vec<f64>) {
    let orders = layer.top_k.min(layer.range().1);
    let seconds = TABLE_SECONDS * layer.contents() * orders as f64;
    let is_late = deadline
        .is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()).as_secs_f64() < seconds);
    if is_late || limits.control.cancelled.load(Ordering::Relaxed) || layer.counts.is_empty() {
        return (layer.least() as u64, vec![0.0; layer.experts()]);
    }
    let affordable = limits.work / layers.max(1) as f64 / layer.contents().max(1.0);
    let rounds = limits.rounds.min((affordable as usize).max(1));
    let (visits, prices) =
        prices::search(layer, &Table::new(layer), start, &prices::Budget { rounds, deadline, limits });
    // A certificate of no prices is read as that of capacity, without a look at the contents.
    let is_priced = prices.iter().any(|&price| price != 0.0);
    (if is_priced { visits } else { layer.least() as u64 }, prices)
}
