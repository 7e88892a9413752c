//! A slot for an expert that found all of its devices full: others make room, as along an augmenting path of a matching.

use std::collections::VecDeque;

use super::draft::Draft;
use crate::layer::EMPTY;

/// Finds an expert its first slot, or says that the rules leave none.
///
/// Others move only to where they may be, and only copies that are not their expert's last are given up; so where this
/// fails, the devices that it looked at are full of experts that may be nowhere else.
pub(in crate::layer) fn squeeze(draft: &mut Draft<'_>, expert: u16) -> bool {
    let d = draft.site.room.len();
    // The slot whose expert would move to a device, with its own device; none for where `expert` itself would go.
    let mut mover: Vec<Option<(usize, usize)>> = vec![None; d];
    let mut queue: VecDeque<usize> = (0..d).filter(|&g| draft.takes(expert, g)).collect();
    let mut seen = vec![false; d];
    for &g in &queue {
        seen[g] = true;
    }
    while let Some(g) = queue.pop_front() {
        let free = |slot: &usize| draft.expert_in[*slot] == EMPTY;
        let spare =
            |slot: &usize| draft.releases(*slot, g) && draft.copies[usize::from(draft.expert_in[*slot])] > 1;
        // The first empty slot: filled ones come first on every device.
        let vacant = draft.slots(g).find(free).or_else(|| draft.slots(g).find(spare));
        if let Some(slot) = vacant {
            shift(draft, &mover, (slot, g), expert);
            return true;
        }
        for slot in draft.slots(g).filter(|&slot| draft.releases(slot, g)) {
            for h in (0..d).filter(|&h| draft.takes(draft.expert_in[slot], h)) {
                if !seen[h] {
                    seen[h] = true;
                    mover[h] = Some((slot, g));
                    queue.push_back(h);
                }
            }
        }
    }
    false
}

/// Moves every expert of a path one device on, from its end: the vacant slot.
fn shift(draft: &mut Draft<'_>, mover: &[Option<(usize, usize)>], end: (usize, usize), expert: u16) {
    let (mut slot, mut device) = end;
    draft.put(slot, device, EMPTY);
    while let Some((from, home)) = mover[device] {
        let moved = draft.expert_in[from];
        draft.put(from, home, EMPTY);
        draft.put(slot, device, moved);
        (slot, device) = (from, home);
    }
    draft.put(slot, device, expert);
}
