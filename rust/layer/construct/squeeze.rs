//! A slot for an expert that found all of its devices full: others make room, as along an augmenting path of a matching.

use std::collections::VecDeque;

use crate::layer::{EMPTY, Site, Slots};

/// Finds an expert a slot that it lacks, or returns the devices that it looked at: the rules leave it none.
///
/// Others move only to where they may be, and only copies that their expert can do without are given up; so these
/// devices are full of experts that may be nowhere else.
pub(in crate::layer) fn squeeze(slots: &mut Slots, site: &Site, expert: u16) -> Result<(), Vec<usize>> {
    let d = site.devices();
    // The slot whose expert would move to a device, with its own device; none for where `expert` itself would go.
    let mut mover: Vec<Option<(usize, usize)>> = vec![None; d];
    let mut queue: VecDeque<usize> = (0..d).filter(|&g| slots.may_take(site, expert, g)).collect();
    let mut seen = vec![false; d];
    for &g in &queue {
        seen[g] = true;
    }
    while let Some(g) = queue.pop_front() {
        let free = |slot: &usize| slots.expert_in[*slot] == EMPTY;
        let spare = |slot: &usize| slots.may_lose(site, *slot);
        // The first empty slot: filled ones come first on every device.
        let vacant = slots.of(g).find(free).or_else(|| slots.of(g).find(spare));
        if let Some(slot) = vacant {
            shift(slots, &mover, (slot, g), expert);
            return Ok(());
        }
        for slot in slots.of(g) {
            for h in (0..d).filter(|&h| slots.may_move(site, slot, h)) {
                if !seen[h] {
                    seen[h] = true;
                    mover[h] = Some((slot, g));
                    queue.push_back(h);
                }
            }
        }
    }
    Err((0..d).filter(|&g| seen[g]).collect())
}

/// Finds experts that have fewer slots than they are (Hall, 1935): how many they are, and the devices that they may be on.
#[must_use]
pub fn find_shortage(site: &Site, experts: usize) -> Option<(usize, Vec<usize>)> {
    let mut slots = Slots::empty(&site.capacity, experts);
    let devices = (0..experts as u16).find_map(|e| squeeze(&mut slots, site, e).err())?;
    let hosted = devices.iter().map(|&g| slots.of(g).len()).sum::<usize>();
    Some((hosted + 1, devices))
}

/// Moves every expert of a path one device on, from its end: the vacant slot.
fn shift(slots: &mut Slots, mover: &[Option<(usize, usize)>], end: (usize, usize), expert: u16) {
    let (mut slot, mut device) = end;
    slots.put(slot, EMPTY);
    while let Some((from, home)) = mover[device] {
        let moved = slots.expert_in[from];
        slots.put(from, EMPTY);
        slots.put(slot, moved);
        (slot, device) = (from, home);
    }
    slots.put(slot, expert);
}
