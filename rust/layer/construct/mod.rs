//! Constructs slots to start a search from: the expert with the largest load per copy gets the next copy, then copies are
//! placed, the heaviest first, each on the device that it burdens least ([`mod@longest_first`], [`burden`]).
//!
//! With one load for every expert, that is the device that is done first, and [`polish`] improves the slots. Without the
//! polish this is `DeepSeek`'s published balancer (github.com/deepseek-ai/EPLB, global policy), less its second copies on
//! one device, which serve no token. Engines call it while they serve, so it takes microseconds.

mod burden;
mod longest_first;
mod nearest;
mod polish;
mod repair;
mod squeeze;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::error::{Error, Result};
use crate::layer::terms::Term;
use crate::layer::terms::balance::Balance;
use crate::layer::{EMPTY, Layer, Site, Slots};
use burden::{LossBurden, NormBurden, PartnerBurden, TimeBurden};
use longest_first::longest_first;
pub use nearest::nearest;
use polish::polish;
use repair::{repair, vacant};
pub use squeeze::find_shortage;

/// An expert for which the rules leave no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSlot(pub usize);

/// A result for a layer, unless the rules leave an expert no slot.
pub type Placed<T> = std::result::Result<T, NoSlot>;

impl NoSlot {
    /// Returns the error for a layer.
    #[must_use]
    pub fn of(self, layer: usize) -> Error {
        Error::NoSlot { layer, expert: self.0 }
    }
}

/// Trials of the polish in an engine.
pub const QUICK: usize = 14;

/// The load that is taken in place of 0.
pub(super) const LEAST: f64 = 1e-200;

/// Constructs slots for loads `[E]`, which are finite and not negative, with at most so many `trials` of the polish.
///
/// Every expert gets a slot if the rules allow it, and none gets two on one device; a slot may stay empty.
pub fn fill(site: &Site, load: &[f64], trials: usize) -> Placed<Slots> {
    let mut slots = with_pins(site, load.len())?;
    if site.rules.min_copies > 1 {
        fill_for_losses(&mut slots, site, load)?;
        return Ok(slots);
    }
    let (order, copies) = count_copies(&slots, site, load, load_per_copy)?;
    let mut burden = TimeBurden::new(&slots, site, load, &copies);
    longest_first(&mut slots, site, &order, &copies, &mut burden)?;
    polish(&mut slots, site, load, trials);
    Ok(slots)
}

/// Constructs slots for the sum of a layer's windows.
pub fn fill_by_sum(layer: &Layer) -> Placed<Slots> {
    if layer.costs.lp_split.is_some() {
        let mut slots = fill_for_lp_split(&layer.site, &layer.load)?;
        complete(&mut slots, &layer.site, &layer.load, layer.has_spare())?;
        return Ok(slots);
    }
    fill(&layer.site, &layer.load, QUICK)
}

/// Constructs slots for the windows of a layer: no worse than those for their sum, by the slowest devices.
///
/// An expert's weight, which decides how many copies it gets, is its mean square over windows (bench/RESULTS.md).
pub fn fill_by_windows(layer: &Layer) -> Placed<Slots> {
    // Layers that have to survive a loss spread copies over partners, which powers of loads do not consider.
    let survives = layer.site.rules.min_copies > 1;
    let weight = &layer.windows.heaviness;
    let mut of_windows = if survives { fill(&layer.site, weight, QUICK)? } else { pack_windows(layer)? };
    complete(&mut of_windows, &layer.site, weight, true)?;
    let mut packed = fill(&layer.site, &layer.load, QUICK)?;
    complete(&mut packed, &layer.site, weight, true)?;
    let slowest = |slots: &Slots| Balance::new(layer, slots, &slots.copies).slowest();
    Ok(if slowest(&of_windows) <= slowest(&packed) { of_windows } else { packed })
}

/// Constructs slots by the norm of all windows alone.
fn pack_windows(layer: &Layer) -> Placed<Slots> {
    let site = &layer.site;
    let mut slots = with_pins(site, layer.experts)?;
    let (order, copies) = count_copies(&slots, site, &layer.windows.heaviness, load_per_copy)?;
    let mut burden = NormBurden::new(&slots, layer, &copies);
    longest_first(&mut slots, site, &order, &copies, &mut burden)?;
    Ok(slots)
}

/// The weight of a copy beyond the second, as a part of its load: with two, tokens can go elsewhere already.
///
/// On DeepSeek-V3's loads (288 slots on 32 devices, each of four profiles judged on the others) the slowest device has
/// 1.113 of the mean without further copies, 1.110 with this.
const WEIGHT_OF_FURTHER: f64 = 0.5;

/// Constructs slots for a dispatcher that divides loads `[E]` over copies by a linear programme.
fn fill_for_lp_split(site: &Site, load: &[f64]) -> Placed<Slots> {
    let mut slots = with_pins(site, load.len())?;
    let weight =
        |load, copies| load_per_copy(load, copies) * if copies > 1 { WEIGHT_OF_FURTHER } else { 1.0 };
    let (mut order, copies) = count_copies(&slots, site, load, weight)?;
    order.sort_by_key(|item| {
        let e = item.expert();
        (copies[e] == 1, Reverse(Item::new(load_per_copy(load[e], 1), e)))
    });
    let mut burden = PartnerBurden::new(&slots, site, load, &copies);
    longest_first(&mut slots, site, &order, &copies, &mut burden)?;
    Ok(slots)
}

/// Fills slots of a layer that has to survive a loss; some may be filled already.
fn fill_for_losses(slots: &mut Slots, site: &Site, load: &[f64]) -> Placed<()> {
    let mean = load.iter().sum::<f64>() / site.devices() as f64;
    // A device that holds a copy has the mean, or what the copy serves if that is more, and after a loss its part of the
    // copy that is gone. Copies that follow what they serve leave experts of middle loads with two, and all that is left
    // of one of these goes to one device.
    let weight = |load, copies| {
        let (per_copy, others) = (load_per_copy(load, copies), f64::from(copies.saturating_sub(1).max(1)));
        (per_copy - mean).max(0.0) + per_copy / others
    };
    let (mut order, copies) = count_copies(slots, site, load, weight)?;
    order.sort_by_key(|item| {
        let e = item.expert();
        Reverse(Item::new(load_per_copy(load[e], copies[e]), e))
    });
    let mut burden = LossBurden::new(slots, site, load, &copies);
    longest_first(slots, site, &order, &copies, &mut burden)
}

/// Constructs the slots of every layer, for loads `[L, E]`.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn fill_layers(load: &[f64], experts: usize, sites: &[Site], trials: usize) -> Result<Vec<Slots>> {
    check(load, experts)?;
    let all = load.chunks_exact(experts).zip(sites).enumerate();
    let fill_layer = |(layer, (load, site)): (usize, (&[f64], &Site))| {
        fill(site, load, trials).map_err(|fault| fault.of(layer))
    };
    all.map(fill_layer).collect()
}

/// Refuses sizes that ids cannot count, and numbers that sums cannot hold.
pub(super) fn check(load: &[f64], experts: usize) -> Result<()> {
    let fault = |rule: &str, got| Err(Error::Shape { what: "load", rule: rule.to_owned(), got });
    if !(1..usize::from(EMPTY)).contains(&experts) {
        return fault("from 1 to 65534 experts", experts.to_string());
    }
    for (layer, load) in load.chunks_exact(experts).enumerate() {
        if let Some(e) = load.iter().position(|load| !(*load >= 0.0 && load.is_finite())) {
            return fault("finite values of at least 0", format!("{} in layer {layer}, expert {e}", load[e]));
        }
        if !load.iter().sum::<f64>().is_finite() {
            return fault("a finite sum in every layer", format!("an infinite one in layer {layer}"));
        }
    }
    Ok(())
}

/// Returns slots with experts on the devices that they are pinned to, and no others.
fn with_pins(site: &Site, experts: usize) -> Placed<Slots> {
    let mut slots = Slots::empty(&site.capacity, experts);
    for (e, g) in site.rules.pins(site.devices()) {
        match slots.of(g).find(|&slot| slots.expert_in[slot] == EMPTY) {
            Some(slot) if slots.may_take(site, e, g) => slots.put(slot, e),
            _ => return Err(NoSlot(usize::from(e))),
        }
    }
    Ok(slots)
}

/// An expert and its load per copy as one number: the load, and in its lowest 16 of 64 bits the expert, so that equal
/// loads sort by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Item(u64);

impl Item {
    fn new(per_copy: f64, expert: usize) -> Self {
        // The bits of positive numbers rise as they do.
        Self(per_copy.to_bits() & !0xffff | u64::from(!(expert as u16)))
    }

    fn expert(self) -> usize {
        usize::from(!(self.0 as u16))
    }
}

/// Returns the load of each of so many copies of an expert, which share its load evenly.
fn load_per_copy(load: f64, copies: u32) -> f64 {
    // A second copy weighs less than a first one also if its expert has no load.
    load.max(LEAST) / f64::from(copies)
}

/// Returns the experts, those with the heaviest copies first, and the number of copies of every expert `[E]`.
///
/// `weight` is that of one of so many copies of a load. The expert with the heaviest copies gets the next copy.
fn count_copies(
    slots: &Slots,
    site: &Site,
    load: &[f64],
    weight: impl Fn(f64, u32) -> f64,
) -> Placed<(Vec<Item>, Vec<u32>)> {
    let max_copies = site.rules.max_copies_of(&site.capacity);
    let mut copies: Vec<u32> = slots.copies.iter().map(|&placed| placed.max(site.rules.min_copies)).collect();
    let taken: usize = copies.iter().map(|&copies| copies as usize).sum();
    let Some(mut spare) = slots.expert_in.len().checked_sub(taken) else {
        return Err(NoSlot(slots.copies.iter().rposition(|&placed| placed == 0).unwrap_or(0)));
    };
    let items: Vec<Item> = (0..copies.len()).map(|e| Item::new(weight(load[e], copies[e]), e)).collect();
    let mut full = Vec::with_capacity(items.len());
    let mut heap = BinaryHeap::from(items);
    while spare > 0 {
        let Some(mut top) = heap.peek_mut() else { break };
        let e = top.expert();
        if copies[e] < max_copies(e) {
            copies[e] += 1;
            spare -= 1;
            *top = Item::new(weight(load[e], copies[e]), e);
        } else {
            full.push(PeekMut::pop(top));
        }
    }
    full.extend(heap.into_vec());
    full.sort_unstable_by_key(|item| !item.0);
    Ok((full, copies))
}

/// Returns a time and a device as one number, as [`Item`] has load and expert.
fn time_key(time: f64, device: usize) -> u64 {
    time.to_bits() & !0xffff | device as u64
}

/// Gives slots to experts that lack copies, and with `full` fills empty slots with the heaviest copies.
///
/// # Errors
/// If the rules leave an expert no slot.
pub fn complete(slots: &mut Slots, site: &Site, load: &[f64], full: bool) -> Placed<()> {
    repair(slots, site, load)?;
    while full && slots.expert_in.contains(&EMPTY) {
        let times = slots.times_and_loads(site, load).0;
        let mut open: Vec<usize> = (0..times.len()).filter(|&g| vacant(slots, g).is_some()).collect();
        open.sort_by(|&g, &h| times[g].total_cmp(&times[h]));
        let mut copies = open.into_iter().map(|g| vacant(slots, g).zip(heaviest_copy(slots, site, load, g)));
        let Some((slot, expert)) = copies.find_map(|copy| copy) else { break };
        slots.put(slot, expert);
    }
    Ok(())
}

/// Returns the expert with the heaviest copies of those that a device lacks; of equals the one with the fewest copies.
fn heaviest_copy(slots: &Slots, site: &Site, load: &[f64], device: usize) -> Option<u16> {
    let rank = |e: u16| (slots.load_per_copy(load, e), Reverse(slots.copies(e)));
    let lacking = (0..load.len() as u16).filter(|&e| slots.may_take(site, e, device));
    lacking.reduce(|a, b| if rank(b) > rank(a) { b } else { a })
}
