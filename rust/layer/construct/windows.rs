//! A start that sees every window: the heaviest copy first goes to the device where it adds least to the powers of loads
//! in all windows, which is where the other windows leave capacity for it.
//!
//! How heavy an expert is, and how many copies it gets, is its mean square over windows (bench/RESULTS.md).

use super::{Devices, Placed, QUICK, complete, copies, fill, longest_first, part, pin};
use crate::layer::terms::Term;
use crate::layer::terms::balance::Balance;
use crate::layer::{EMPTY, Layer, Slots};

/// Slots for the windows of a layer, whose measure is a norm: no worse than a packing on their sum, by the slowest devices.
pub fn by_windows(layer: &Layer) -> Placed<Slots> {
    // What has to survive a loss spreads copies over partners, which powers of loads know nothing of.
    let survives = layer.site.rules.min_copies > 1;
    let weight = &layer.windows.heaviness;
    let mut of_windows = if survives { fill(&layer.site, weight, QUICK)? } else { pack_windows(layer)? };
    complete(&mut of_windows, &layer.site, weight, true)?;
    let mut packed = fill(&layer.site, &layer.load, QUICK)?;
    complete(&mut packed, &layer.site, weight, true)?;
    let slowest = |slots: &Slots| Balance::new(layer, slots, &slots.copies).slowest();
    Ok(if slowest(&of_windows) <= slowest(&packed) { of_windows } else { packed })
}

fn pack_windows(layer: &Layer) -> Placed<Slots> {
    let (site, weight) = (&layer.site, &layer.windows.heaviness);
    let mut slots = Slots::empty(&site.capacity, layer.experts);
    pin(&mut slots, site)?;
    let (order, copies) = copies(&slots, site, weight, part)?;
    let mut devices = ByPowers::new(layer, &slots, &copies);
    longest_first(&mut slots, site, &order, &mut devices)?;
    Ok(slots)
}

/// Devices by the powers of their loads in all windows.
struct ByPowers<'a> {
    layer: &'a Layer,
    /// Copies that every expert is to have `[E]`.
    copies: &'a [u32],
    balance: Balance<'a>,
    /// Empty slots of every device, the first one last `[D]`.
    empty: Vec<Vec<usize>>,
    /// Devices that may take the expert at hand `[D]`.
    may: Vec<bool>,
}

impl<'a> ByPowers<'a> {
    fn new(layer: &'a Layer, slots: &Slots, copies: &'a [u32]) -> Self {
        let empty_slots = |g| slots.of(g).rev().filter(|&slot| slots.expert_in[slot] == EMPTY).collect();
        let empty: Vec<Vec<usize>> = (0..layer.devices()).map(empty_slots).collect();
        let may = vec![false; empty.len()];
        Self { layer, copies, balance: Balance::new(layer, slots, copies), empty, may }
    }
}

impl Devices for ByPowers<'_> {
    fn put(&mut self, slots: &mut Slots, expert: u16) {
        while slots.copies(expert) < self.copies[usize::from(expert)] {
            for (g, may) in self.may.iter_mut().enumerate() {
                *may = !self.empty[g].is_empty() && slots.may_take(&self.layer.site, expert, g);
            }
            let Some(device) = self.balance.best_device(expert, &self.may) else { break };
            slots.put(self.empty[device].pop().unwrap_or_default(), expert);
            self.balance.enter(device, expert);
        }
    }

    fn refresh(&mut self, slots: &Slots) {
        *self = Self::new(self.layer, slots, self.copies);
    }
}
