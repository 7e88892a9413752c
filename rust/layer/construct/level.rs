//! A start that sees every window: the heaviest copy first goes to the device where it adds least to the powers of loads
//! in all windows, which is where the other windows leave capacity for it.
//!
//! How heavy an expert is, and how many copies it gets, is its mean square over windows (bench/RESULTS.md).

use super::{NoSlot, Placed, QUICK, complete, copies, fill, pin, squeeze};
use crate::layer::terms::balance::Balance;
use crate::layer::{EMPTY, Layer, Slots};

/// Slots for the windows of a layer, whose measure is a norm: no worse than a packing on their sum, by the slowest devices.
pub fn by_windows(layer: &Layer) -> Placed<Slots> {
    let levelled = heaviest_first(layer)?;
    let mut packed = fill(&layer.site, &layer.load, QUICK)?;
    complete(&mut packed, &layer.site, &layer.windows.heaviness, true)?;
    let slowest = |slots: &Slots| Balance::new(layer, slots, &slots.copies).slowest(layer);
    Ok(if slowest(&levelled) <= slowest(&packed) { levelled } else { packed })
}

fn heaviest_first(layer: &Layer) -> Placed<Slots> {
    let (site, weight) = (&layer.site, &layer.windows.heaviness);
    let mut slots = Slots::empty(&site.capacity, layer.experts);
    pin(&mut slots, site)?;
    let (order, copies) = copies(&slots, site, weight)?;
    let mut balance = Balance::new(layer, &slots, &copies);
    let vacant = |slots: &Slots| -> Vec<Vec<usize>> {
        let empty_slots = |g| slots.of(g).rev().filter(|&slot| slots.expert_in[slot] == EMPTY).collect();
        (0..site.devices()).map(empty_slots).collect()
    };
    let mut empty = vacant(&slots);
    let mut may = vec![false; site.devices()];
    for item in order {
        let e = item.expert() as u16;
        while slots.copies(e) < copies[usize::from(e)] {
            for (g, may) in may.iter_mut().enumerate() {
                *may = !empty[g].is_empty() && slots.may_take(site, e, g);
            }
            let Some(device) = balance.best_device(layer, e, &may) else { break };
            slots.put(empty[device].pop().unwrap_or_default(), e);
            balance.enter(device, e);
        }
        while slots.is_short(site, e) {
            if squeeze(&mut slots, site, e).is_err() {
                return Err(NoSlot(usize::from(e)));
            }
            balance = Balance::new(layer, &slots, &copies);
            empty = vacant(&slots);
        }
    }
    complete(&mut slots, site, weight, true)?;
    Ok(slots)
}
