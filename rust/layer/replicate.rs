//! One layer on a single load of every expert: copies by the largest load per copy, then the heaviest copy first to the
//! device that is done first, then [`polish`].
//!
//! Without the polish this is `DeepSeek`'s published balancer (github.com/deepseek-ai/EPLB, global policy), less its
//! second copies on one device, which serve nobody. It is the call that engines make while they serve, so it takes
//! microseconds.

use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use super::draft::{Draft, Site};
use super::polish::polish;
use super::squeeze::squeeze;
use super::{EMPTY, Layer};
use crate::error::{Error, Result};

/// An expert for which the rules leave no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSlot(pub usize);

/// Steps of the polish that engines get.
pub const QUICK: usize = 100;

/// Devices that are looked at together: [`Open::soonest`] keeps a minimum for each of as many lanes.
const LANES: usize = 8;

/// The expert of every slot of a layer `[P]`, for its load over all windows.
pub fn replicate(layer: &Layer, steps: usize) -> std::result::Result<Vec<u16>, NoSlot> {
    let time: Vec<f64> = layer.time.iter().map(|&time| f64::from(time)).collect();
    fill(layer.site(&time), &layer.load, steps)
}

/// The expert of every slot `[P]`, for loads `[E]` that are finite and not negative; `steps` of polish at most.
///
/// Every expert gets a slot if the rules allow it, and none gets two on one device; a slot may stay empty.
pub fn fill(site: Site<'_>, load: &[f64], steps: usize) -> std::result::Result<Vec<u16>, NoSlot> {
    let mut draft = Draft::new(site, load);
    pin(&mut draft)?;
    let order = copies(&draft)?;
    pack(&mut draft, &order)?;
    polish(&mut draft, steps);
    Ok(draft.expert_in)
}

/// Fills every layer: slots `[L, D, S]` with -1 for an empty one, for loads `[L, E]`, rooms `[L, D]` of which the
/// largest is S, and times `[D]`.
pub fn fill_layers(
    load: &[f64],
    experts: usize,
    room: &[usize],
    time: &[f64],
    steps: usize,
) -> Result<Vec<i32>> {
    check(load, experts, time)?;
    let widest = room.iter().copied().max().unwrap_or(0);
    let mut slots = Vec::with_capacity(room.len() * widest);
    for (layer, (load, room)) in load.chunks_exact(experts).zip(room.chunks_exact(time.len())).enumerate() {
        let site = Site { room, time, forbidden: &[], pinned: &[] };
        let filled = fill(site, load, steps).map_err(|NoSlot(expert)| Error::NoSlot { layer, expert })?;
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
fn check(load: &[f64], experts: usize, time: &[f64]) -> Result<()> {
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
fn pin(draft: &mut Draft<'_>) -> std::result::Result<(), NoSlot> {
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

/// An expert and its copies as one number that sorts by load per copy, then by fewer copies, then by lower index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Item(u128);

impl Item {
    fn new(load: f64, copies: u32, expert: u32) -> Self {
        // The bits of numbers that are not negative rise as they do; zero is added because it may have a sign.
        let per_copy = (load / f64::from(copies) + 0.0).to_bits();
        Self(u128::from(per_copy) << 64 | u128::from(!copies) << 32 | u128::from(!expert))
    }

    fn per_copy(self) -> f64 {
        f64::from_bits((self.0 >> 64) as u64)
    }

    fn copies(self) -> u32 {
        !((self.0 >> 32) as u32)
    }

    fn expert(self) -> usize {
        !(self.0 as u32) as usize
    }
}

/// How many copies every expert is to have, the heaviest copies first.
fn copies(draft: &Draft<'_>) -> std::result::Result<Vec<Item>, NoSlot> {
    let (site, slots) = (draft.site, draft.expert_in.len());
    let filled = site.room.iter().filter(|&&room| room > 0).count() as u32;
    let most = |e: usize| -> u32 {
        if site.forbidden.is_empty() {
            return filled;
        }
        (0..site.room.len()).filter(|&g| site.room[g] > 0 && !site.forbids(e as u16, g)).count() as u32
    };
    let item = |e: usize| Item::new(draft.load[e], draft.copies[e].max(1), e as u32);
    let items: Vec<Item> = (0..draft.load.len()).map(item).collect();
    let taken: usize = items.iter().map(|item| item.copies() as usize).sum();
    let Some(mut spare) = slots.checked_sub(taken) else {
        let unpinned = items.iter().rev().find(|item| draft.copies[item.expert()] == 0);
        return Err(NoSlot(unpinned.or(items.last()).map_or(0, |item| item.expert())));
    };
    let mut full = Vec::new();
    let mut heap = BinaryHeap::from(items);
    while spare > 0 {
        let Some(mut top) = heap.peek_mut() else { break };
        let (e, copies) = (top.expert(), top.copies());
        if copies < most(e) {
            *top = Item::new(draft.load[e], copies + 1, e as u32);
            spare -= 1;
        } else {
            full.push(PeekMut::pop(top));
        }
    }
    full.extend(heap.into_vec());
    full.sort_unstable_by(|a, b| b.cmp(a));
    Ok(full)
}

/// Devices with room, and when each is done with what it has; infinite for full ones.
struct Open {
    done: Vec<f64>,
    time: Vec<f64>,
    /// Slots that are filled, from the first on `[D]`.
    used: Vec<usize>,
}

impl Open {
    fn new(draft: &Draft<'_>) -> Self {
        let site = draft.site;
        let lanes = site.room.len().next_multiple_of(LANES);
        let filled = |g| draft.slots(g).take_while(|&slot| draft.expert_in[slot] != EMPTY).count();
        let used: Vec<usize> = (0..site.room.len()).map(filled).collect();
        let mut done = draft.times();
        for (g, done) in done.iter_mut().enumerate() {
            if used[g] == site.room[g] {
                *done = f64::INFINITY;
            }
        }
        done.resize(lanes, f64::INFINITY);
        let mut time = site.time.to_vec();
        time.resize(lanes, 0.0);
        Self { done, time, used }
    }

    /// The device that is done first with `more` tokens.
    #[inline(always)]
    fn soonest(&self, more: f64) -> Option<usize> {
        let mut least = [f64::INFINITY; LANES];
        let mut at = [0u64; LANES];
        for (i, (done, time)) in self.done.chunks_exact(LANES).zip(self.time.chunks_exact(LANES)).enumerate()
        {
            for lane in 0..LANES {
                let then = done[lane] + more * time[lane];
                at[lane] = if then < least[lane] { i as u64 } else { at[lane] };
                least[lane] = if then < least[lane] { then } else { least[lane] };
            }
        }
        let mut best = (f64::INFINITY, usize::MAX);
        for lane in 0..LANES {
            let found = (least[lane], at[lane] as usize * LANES + lane);
            if found < best {
                best = found;
            }
        }
        (best.0 < f64::INFINITY).then_some(best.1)
    }
}

/// Gives every expert its copies, where the rules leave room for them.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn pack(draft: &mut Draft<'_>, order: &[Item]) -> std::result::Result<(), NoSlot> {
    let site = draft.site;
    let mut open = Open::new(draft);
    let mut aside = Vec::new();
    for item in order {
        let (e, weight) = (item.expert(), item.per_copy());
        let held = draft.copies[e];
        for _ in held..item.copies() {
            let lightest = loop {
                let Some(g) = open.soonest(weight) else { break None };
                if draft.takes(e as u16, g) {
                    break Some(g);
                }
                aside.push((g, std::mem::replace(&mut open.done[g], f64::INFINITY)));
            };
            let Some(g) = lightest else { break };
            draft.put(draft.slots(g).start + open.used[g], g, e as u16);
            open.used[g] += 1;
            // The next copy goes elsewhere.
            aside.push((g, open.done[g] + weight * site.time[g]));
            open.done[g] = f64::INFINITY;
        }
        for (g, done) in aside.drain(..) {
            open.done[g] = if open.used[g] < site.room[g] { done } else { f64::INFINITY };
        }
        if draft.copies[e] == 0 {
            if !squeeze(draft, e as u16) {
                return Err(NoSlot(e));
            }
            open = Open::new(draft);
        }
    }
    Ok(())
}
