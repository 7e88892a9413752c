//! One layer on a single load of every expert: copies by the largest load per copy, then the heaviest copy first to the
//! device that is done first, then [`polish`].
//!
//! Without the polish this is `DeepSeek`'s published balancer (github.com/deepseek-ai/EPLB, global policy), less its
//! second copies on one device, which serve nobody. It is the call that engines make while they serve, so it takes
//! microseconds.

mod adapt;
pub(super) mod draft;
mod polish;
mod squeeze;

use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::error::{Error, Result, SLOTS, room_for};
use crate::layer::{EMPTY, Layer};
use crate::tournament::Tournament;
pub(super) use adapt::complete;
pub use adapt::{Change, Reach, adapt_layers};
use draft::{Draft, Site};
use polish::polish;
pub(super) use squeeze::squeeze;

/// An expert for which the rules leave no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSlot(pub usize);

/// Trials of the polish that engines get.
pub const QUICK: usize = 14;

/// A load that stands for none.
const LEAST: f64 = 1e-200;

/// The expert of every slot of a layer `[P]`, for its load over all windows.
pub fn replicate(layer: &Layer, trials: usize, copies: bool) -> std::result::Result<Vec<u16>, NoSlot> {
    let time: Vec<f64> = layer.time.iter().map(|&time| f64::from(time)).collect();
    fill(layer.site(&time, copies), &layer.load, trials)
}

/// The expert of every slot `[P]`, for loads `[E]` that are finite and not negative; `trials` of polish at most.
///
/// Every expert gets a slot if the rules allow it, and none gets two on one device; a slot may stay empty.
pub fn fill(site: Site<'_>, load: &[f64], trials: usize) -> std::result::Result<Vec<u16>, NoSlot> {
    let mut draft = Draft::new(site, load);
    pin(&mut draft)?;
    let (order, copies) = copies(&draft)?;
    pack(&mut draft, &order, &copies)?;
    polish(&mut draft, trials);
    Ok(draft.expert_in)
}

/// Fills every layer: slots `[L, D, S]` with -1 for an empty one, for loads `[L, E]`, and in `all` the rooms `[L, D]` of
/// which the largest is S, the times `[D]`, and the rules of every layer one after the other.
pub fn fill_layers(load: &[f64], experts: usize, all: Site<'_>, trials: usize) -> Result<Vec<i32>> {
    check(load, experts, all.time)?;
    let devices = all.time.len();
    let widest = all.room.iter().copied().max().unwrap_or(0);
    // Before anything of the size is asked for: memory that is not there would end the process.
    if widest.saturating_mul(devices) > SLOTS {
        let rule = format!("at most {SLOTS} slots in a layer, all devices as wide as the widest");
        return Err(Error::Shape { what: "room", rule, found: format!("{devices} x {widest}") });
    }
    room_for("slots", &[all.room.len(), widest, size_of::<i32>()])?;
    let mut slots = Vec::with_capacity(all.room.len() * widest);
    for (layer, (load, room)) in load.chunks_exact(experts).zip(all.room.chunks_exact(devices)).enumerate() {
        let cells = layer * experts * devices..(layer + 1) * experts * devices;
        let of = |rules: &'_ [bool]| if rules.is_empty() { 0..0 } else { cells.clone() };
        let site = Site {
            room,
            forbidden: &all.forbidden[of(all.forbidden)],
            pinned: &all.pinned[of(all.pinned)],
            ..all
        };
        let filled = fill(site, load, trials).map_err(|NoSlot(expert)| Error::NoSlot { layer, expert })?;
        let mut rest = filled.as_slice();
        for &room in room {
            let (held, after) = rest.split_at(room);
            rest = after;
            slots.extend(held.iter().map(|&e| if e == EMPTY { -1 } else { i32::from(e) }));
            slots.extend(std::iter::repeat_n(-1, widest - room));
        }
    }
    Ok(slots)
}

/// Refuses sizes that ids cannot count, and numbers that sums cannot hold.
pub(super) fn check(load: &[f64], experts: usize, time: &[f64]) -> Result<()> {
    let fault = |what, rule: &str, found: String| Err(Error::Shape { what, rule: rule.to_owned(), found });
    if experts == 0 || experts >= usize::from(EMPTY) {
        return fault("load", "from 1 to 65534 experts", experts.to_string());
    }
    if time.is_empty() || time.len() > usize::from(u16::MAX) {
        return fault("time", "from 1 to 65535 devices", time.len().to_string());
    }
    if let Some((device, time)) = time.iter().enumerate().find(|(_, time)| !(**time > 0.0 && **time <= 1.0)) {
        return fault("time", "values above 0 and up to 1", format!("{time} on device {device}"));
    }
    for (layer, load) in load.chunks_exact(experts).enumerate() {
        if let Some((e, load)) =
            load.iter().enumerate().find(|(_, load)| !(**load >= 0.0 && load.is_finite()))
        {
            let found = format!("{load} in layer {layer}, expert {e}");
            return fault("load", "finite values of at least 0", found);
        }
        if !load.iter().sum::<f64>().is_finite() {
            return fault("load", "a finite sum in every layer", format!("an infinite one in layer {layer}"));
        }
    }
    Ok(())
}

/// Puts experts where they must be.
pub(super) fn pin(draft: &mut Draft<'_>) -> std::result::Result<(), NoSlot> {
    let d = draft.site.room.len();
    for at in (0..draft.site.pinned.len()).filter(|&at| draft.site.pinned[at]) {
        let (e, g) = (at / d, at % d);
        let slot = draft.slots(g).find(|&slot| draft.expert_in[slot] == EMPTY);
        match slot {
            Some(slot) if !draft.site.forbids(e as u16, g) => draft.put(slot, g, e as u16),
            _ => return Err(NoSlot(e)),
        }
    }
    Ok(())
}

/// An expert and its load per copy as one number: the load, and in its lowest 16 of 64 bits the expert, so that equal
/// loads sort by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Item(u64);

impl Item {
    fn new(load: f64, copies: u32, expert: usize) -> Self {
        // The bits of positive numbers rise as they do. Without load a second copy is worth less than a first one, still.
        let per_copy = load.max(LEAST) / f64::from(copies);
        Self(per_copy.to_bits() & !0xffff | u64::from(!(expert as u16)))
    }

    pub(super) fn expert(self) -> usize {
        usize::from(!(self.0 as u16))
    }
}

/// The experts, the heaviest copies first, and how many every expert is to have `[E]`.
pub(super) fn copies(draft: &Draft<'_>) -> std::result::Result<(Vec<Item>, Vec<u32>), NoSlot> {
    let (site, slots) = (draft.site, draft.expert_in.len());
    let filled = site.room.iter().filter(|&&room| room > 0).count() as u32;
    let most = |e: usize| -> u32 {
        if site.forbidden.is_empty() {
            return filled;
        }
        (0..site.room.len()).filter(|&g| site.room[g] > 0 && !site.forbids(e as u16, g)).count() as u32
    };
    let mut copies: Vec<u32> = draft.copies.iter().map(|&pinned| pinned.max(1)).collect();
    let taken: usize = copies.iter().map(|&copies| copies as usize).sum();
    let Some(mut spare) = slots.checked_sub(taken) else {
        return Err(NoSlot(draft.copies.iter().rposition(|&pinned| pinned == 0).unwrap_or(0)));
    };
    let items: Vec<Item> = (0..copies.len()).map(|e| Item::new(draft.load[e], copies[e], e)).collect();
    let mut full = Vec::with_capacity(items.len());
    let mut heap = BinaryHeap::from(items);
    while site.copies && spare > 0 {
        let Some(mut top) = heap.peek_mut() else { break };
        let e = top.expert();
        if copies[e] < most(e) {
            copies[e] += 1;
            spare -= 1;
            *top = Item::new(draft.load[e], copies[e], e);
        } else {
            full.push(PeekMut::pop(top));
        }
    }
    full.extend(heap.into_vec());
    full.sort_unstable_by_key(|item| !item.0);
    Ok((full, copies))
}

/// Slots that are filled, from the first on `[D]`, and devices with room by when they are done with what they have.
fn open(draft: &Draft<'_>) -> (Vec<usize>, Tournament<u64>) {
    let filled = |g| draft.slots(g).take_while(|&slot| draft.expert_in[slot] != EMPTY).count();
    let used: Vec<usize> = (0..draft.site.room.len()).map(filled).collect();
    let times = draft.times_and_loads().0;
    // Of idle devices, the fastest first.
    let key = |g: usize| {
        if used[g] < draft.site.room[g] { done(times[g] + LEAST * draft.site.time[g], g) } else { u64::MAX }
    };
    let open = Tournament::new((0..used.len()).map(key), u64::MAX);
    (used, open)
}

/// A time above a device, as in [`Item`].
fn done(time: f64, device: usize) -> u64 {
    time.to_bits() & !0xffff | device as u64
}

/// Gives every expert its copies, where the rules leave room for them.
fn pack(draft: &mut Draft<'_>, order: &[Item], copies: &[u32]) -> std::result::Result<(), NoSlot> {
    let site = draft.site;
    let (mut used, mut open_devices) = open(draft);
    // Devices that have the expert, or must not have it.
    let mut aside = Vec::new();
    for item in order {
        let e = item.expert();
        let weight = draft.load[e] / f64::from(copies[e]);
        while draft.copies[e] < copies[e] {
            let key = open_devices.get();
            if key == u64::MAX {
                break;
            }
            let g = (key & 0xffff) as usize;
            if !draft.takes(e as u16, g) {
                aside.push(key);
                open_devices.set(g, u64::MAX);
                continue;
            }
            draft.put(draft.slots(g).start + used[g], g, e as u16);
            used[g] += 1;
            let is_open = used[g] < site.room[g];
            let then = done(f64::from_bits(key) + weight * site.time[g], g);
            open_devices.set(g, if is_open { then } else { u64::MAX });
        }
        for key in aside.drain(..) {
            open_devices.set((key & 0xffff) as usize, key);
        }
        if draft.copies[e] == 0 {
            if !squeeze(draft, e as u16) {
                return Err(NoSlot(e));
            }
            (used, open_devices) = open(draft);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;

    /// Finds an expert a slot, moving those that are placed.
    fn augment(
        e: usize,
        site: Site<'_>,
        pins: &[usize],
        taken: &mut [Vec<usize>],
        seen: &mut [bool],
    ) -> bool {
        for g in 0..site.room.len() {
            if seen[g] || site.forbids(e as u16, g) {
                continue;
            }
            seen[g] = true;
            if pins[g] + taken[g].len() < site.room[g] {
                taken[g].push(e);
                return true;
            }
            for at in 0..taken[g].len() {
                if augment(taken[g][at], site, pins, taken, seen) {
                    taken[g][at] = e;
                    return true;
                }
            }
        }
        false
    }

    /// Whether every expert can be placed at once: a matching of experts, and before them of pins, with slots.
    fn feasible(site: Site<'_>, experts: usize) -> bool {
        let d = site.room.len();
        let mut taken: Vec<Vec<usize>> = vec![vec![]; d];
        let mut missing = vec![];
        let mut pins = vec![0; d];
        for e in 0..experts {
            let of = (0..d).filter(|&g| site.pins(e as u16, g)).collect::<Vec<_>>();
            if of.iter().any(|&g| site.forbids(e as u16, g)) {
                return false;
            }
            for &g in &of {
                pins[g] += 1;
            }
            if of.is_empty() {
                missing.push(e);
            }
        }
        (0..d).all(|g| pins[g] <= site.room[g])
            && missing.into_iter().all(|e| augment(e, site, &pins, &mut taken, &mut vec![false; d]))
    }

    proptest! {
        /// Experts are placed whenever the rules allow it, and what is placed keeps them.
        #[test]
        fn keeps_rules_and_fails_only_without_a_way(
            experts in 1usize..9, devices in 1usize..5, rules in 0u64..4, trials in 0usize..40,
            more in any::<bool>(), seed: u64,
        ) {
            let mut random = Random::new(seed, 0);
            let room: Vec<usize> = (0..devices).map(|_| random.below(2 * experts.div_ceil(devices) + 2)).collect();
            let time: Vec<f64> = (0..devices).map(|_| 1.0 / (1 + random.below(3)) as f64).collect();
            let load: Vec<f64> = (0..experts).map(|_| random.below(50) as f64).collect();
            let cells = experts * devices;
            let forbidden: Vec<bool> =
                if rules & 1 > 0 { (0..cells).map(|_| random.below(3) == 0).collect() } else { vec![] };
            let pinned: Vec<bool> =
                if rules & 2 > 0 { (0..cells).map(|_| random.below(12) == 0).collect() } else { vec![] };
            let site = Site { room: &room, time: &time, forbidden: &forbidden, pinned: &pinned, copies: more };
            let found = fill(site, &load, trials);
            prop_assert_eq!(found.is_ok(), feasible(site, experts));
            let Ok(slots) = found else { return Ok(()) };
            let mut at = 0;
            let mut copies = vec![0; experts];
            for g in 0..devices {
                let held = &slots[at..at + room[g]];
                at += room[g];
                for e in 0..experts {
                    let here = held.iter().filter(|&&of| usize::from(of) == e).count();
                    prop_assert!(here <= 1);
                    prop_assert!(here == 0 || !site.forbids(e as u16, g));
                    prop_assert!(here == 1 || !site.pins(e as u16, g));
                    copies[e] += here;
                }
            }
            let pins = |e| (0..devices).filter(|&g| site.pins(e as u16, g)).count();
            prop_assert!((0..experts).all(|e| copies[e] > 0 && (more || copies[e] <= pins(e).max(1))));
            prop_assert_eq!(fill(site, &load, trials), Ok(slots));
        }
    }

    /// The time of the slowest of devices with `slots` slots each.
    fn slowest(load: &[f64], slots: usize, filled: &[u16]) -> f64 {
        let copies = |e: u16| filled.iter().filter(|&&of| of == e).count() as f64;
        let held = filled.iter().map(|&e| if e == EMPTY { 0.0 } else { load[usize::from(e)] / copies(e) });
        held.collect::<Vec<_>>().chunks(slots).map(|device| device.iter().sum()).fold(0.0, f64::max)
    }

    #[test]
    fn polish_lowers_what_the_heaviest_copies_first_leave() {
        let mut random = Random::new(7, 0);
        for _ in 0..50 {
            let load: Vec<f64> = (0..16).map(|_| (random.below(1000) + 1) as f64).collect();
            let site = Site { room: &[5; 4], time: &[1.0; 4], forbidden: &[], pinned: &[], copies: true };
            let of = |trials| slowest(&load, 5, &fill(site, &load, trials).expect("slots suffice"));
            let (plain, quick, patient) = (of(0), of(QUICK), of(1000));
            assert!(quick <= plain && patient <= plain, "{plain} {quick} {patient}");
            assert!(patient <= 1.06 * load.iter().sum::<f64>() / 4.0, "{patient}");
        }
    }

    #[test]
    fn faulty_loads_are_named() {
        let all = Site { room: &[1; 4], time: &[1.0; 2], forbidden: &[], pinned: &[], copies: true };
        let message = |load: &[f64]| fill_layers(load, 2, all, 0).map_err(|e| e.to_string());
        let expected = "load must have finite values of at least 0, got NaN in layer 1, expert 0";
        assert_eq!(message(&[1.0, 1.0, f64::NAN, 1.0]), Err(expected.to_owned()));
        assert_eq!(message(&[1.0, -0.0, 0.0, 0.0]), Ok(vec![0, 1, 0, 1]));
    }
}
