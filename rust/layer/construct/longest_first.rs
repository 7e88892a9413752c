//! Longest processing time first: places copies, the heaviest first, each on the device that it burdens least.

use super::squeeze::squeeze;
use super::{Item, NoSlot, Placed};
use crate::layer::{EMPTY, Site, Slots};

/// The burden of one more copy on a device, given the copies that devices hold.
pub(super) trait Burden {
    /// Returns the device, of those that may take it, that one more copy of an expert burdens least.
    fn lightest(&mut self, slots: &Slots, expert: u16, may_take: impl Fn(usize) -> bool) -> Option<usize>;

    /// Counts a copy that was put on the device that was found last; `is_full` if the device has no free slot now.
    fn add_copy(&mut self, slots: &Slots, expert: u16, device: usize, is_full: bool);

    /// Counts all slots again, after other experts have moved to make room.
    fn recount(&mut self, slots: &Slots);
}

/// Gives every expert its copies `[E]`, as far as rules and slots allow; `order` has the heaviest copies first.
pub(super) fn longest_first(
    slots: &mut Slots,
    site: &Site,
    order: &[Item],
    copies: &[u32],
    burden: &mut impl Burden,
) -> Placed<()> {
    // Slots of a device are filled from the first on.
    let count = |slots: &Slots, g| slots.of(g).take_while(|&slot| slots.expert_in[slot] != EMPTY).count();
    let count_filled = |slots: &Slots| (0..site.devices()).map(|g| count(slots, g)).collect();
    let mut filled: Vec<usize> = count_filled(slots);
    for e in order.iter().map(|item| item.expert()) {
        let expert = e as u16;
        while slots.copies[e] < copies[e] {
            let may_take = |g: usize| filled[g] < site.capacity[g] && slots.may_take(site, expert, g);
            let Some(device) = burden.lightest(slots, expert, may_take) else { break };
            slots.put(slots.of(device).start + filled[device], expert);
            filled[device] += 1;
            burden.add_copy(slots, expert, device, filled[device] == site.capacity[device]);
        }
        while slots.is_short(site, expert) {
            squeeze(slots, site, expert).map_err(|_| NoSlot(e))?;
            filled = count_filled(slots);
            burden.recount(slots);
        }
    }
    Ok(())
}
