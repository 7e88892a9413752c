//! The heaviest copy first goes to the device that it burdens least.

use super::squeeze::squeeze;
use super::{Item, NoSlot, Placed};
use crate::layer::{EMPTY, Site, Slots};

/// How much one more copy burdens devices, given what they have.
pub(super) trait Burden {
    /// The device that one more copy of an expert burdens least, of those that may take it.
    fn lightest(&mut self, slots: &Slots, expert: u16, may_take: impl Fn(usize) -> bool) -> Option<usize>;

    /// Follows a copy that has come to a device, the one that was found last, which may be full now.
    fn enter(&mut self, slots: &Slots, expert: u16, device: usize, is_full: bool);

    /// Looks at the slots anew, after experts have made room.
    fn refresh(&mut self, slots: &Slots);
}

/// Gives every expert its copies `[E]`, in an order that has the heaviest first, as far as rules and slots allow.
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
            burden.enter(slots, expert, device, filled[device] == site.capacity[device]);
        }
        while slots.is_short(site, expert) {
            squeeze(slots, site, expert).map_err(|_| NoSlot(e))?;
            filled = count_filled(slots);
            burden.refresh(slots);
        }
    }
    Ok(())
}
