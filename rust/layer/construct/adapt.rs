//! From running slots to better ones on a single load, by few copies that have to be brought.
//!
//! What a balancer does that is called again and again while it serves: it starts where it is, relieves the slowest
//! device by the step that gains most for a copy brought, and notes after every step what was brought and how slow the
//! slowest device still is. A budget is then spent on the steps of those layers where it gains most.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::draft::{Draft, Site};
use super::polish::may_exchange;
use super::squeeze::squeeze;
use super::{NoSlot, check, fill};
use crate::error::{Error, Result};
use crate::layer::EMPTY;

/// How far running slots are changed.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    /// Copies brought to a device at the most, in all layers.
    pub most: usize,
    /// A layer stays as it is unless the time of its slowest device falls by more than this part.
    pub dead_zone: f64,
    /// And by more than so many standard deviations of counts as large.
    pub deviations: f64,
    /// What a copy must gain, in time.
    pub price: f64,
    /// Steps of a layer at the most, for each of its devices.
    pub steps: usize,
    /// Trials of the polish where a layer is packed anew.
    pub trials: usize,
    /// Whether empty slots are filled, whatever that brings.
    pub full: bool,
}

/// What became of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    /// Time of the slowest device before and after.
    pub slowest: (f64, f64),
    /// Copies that had to be brought.
    pub brought: usize,
}

/// A step must gain more than sums of floats can be off.
const GAIN: f64 = 1e-12;
/// Copies that a step counts as which brings none.
const FREE: f64 = 1e-3;
/// Times count to the power of two to the power of this: what is slow counts most, and what is nearly as slow too, which
/// on the next load may be the slowest.
const DOUBLINGS: u32 = 3;
const NORM: f64 = (1 << DOUBLINGS) as f64;
/// What a slot's load varies from window to window, beyond what the others there make up for: this times its square, in
/// units of the mean slot's.
const UNSTEADY: f64 = 0.03;
/// A copy moves to an expert whose copies are heavier by this part than those that it leaves will be.
const HEAVIER: f64 = 0.05;
/// What a copy must relieve, as a part of the mean device's time: before the heaviest experts get more copies, and after.
const COARSE: f64 = 1e-3;
const FINE: f64 = 2e-6;
/// What a layer that is packed anew must gain over steps, as a part of its slowest device's time.
const ANEW: f64 = 0.05;
/// Devices that are looked at, the slowest first, until a step is found.
const SLOWEST: usize = 3;
/// The slowest exchange slots with the fastest, of all devices so many quarters.
const QUARTERS: usize = 3;

/// Changes running slots `[L, D, S]`, -1 where one is empty, on loads `[L, E]`; `all` is as of
/// [`super::fill_layers`]. Experts without a slot get one and empty slots are filled, whatever they bring.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn adapt_layers(
    load: &[f64],
    experts: usize,
    all: Site<'_>,
    slots: &mut [i32],
    reach: Reach,
) -> Result<Vec<Change>> {
    check(load, experts, all.time)?;
    let devices = all.time.len();
    let per_layer: usize = all.room.iter().sum();
    let mut paths = Vec::with_capacity(load.len() / experts);
    for (layer, (load, slots)) in load.chunks_exact(experts).zip(slots.chunks_exact(per_layer)).enumerate() {
        let cells = layer * experts * devices..(layer + 1) * experts * devices;
        let forbidden = if all.forbidden.is_empty() { all.forbidden } else { &all.forbidden[cells] };
        let site = Site { forbidden, pinned: &[], ..all };
        let path =
            walk(site, load, slots, reach).map_err(|NoSlot(expert)| Error::NoSlot { layer, expert })?;
        paths.push(path);
    }
    let chosen = choose(&paths, reach);
    let mut found = Vec::with_capacity(paths.len());
    for ((path, at), slots) in paths.iter().zip(chosen).zip(slots.chunks_exact_mut(per_layer)) {
        let now = keep(slots, &path.contents(at), all.room);
        slots.copy_from_slice(&now);
        found.push(Change {
            slowest: (path.stops[0].slowest, path.stops[at].slowest),
            brought: path.stops[at].brought,
        });
    }
    Ok(found)
}

/// A place on the way where one may stay.
#[derive(Debug, Clone, Copy)]
struct Stop {
    /// Copies brought so far.
    brought: usize,
    /// Time of the slowest device.
    slowest: f64,
    /// Time of all devices as it counts, as a norm: what steps lower.
    norm: f64,
    /// Edits made so far.
    edits: usize,
}

/// The way of a layer.
struct Path {
    /// Expert of every slot at the start `[P]`.
    start: Vec<u16>,
    /// Slots and their new experts, one after the other.
    edits: Vec<(u32, u16)>,
    /// The start, and after every step.
    stops: Vec<Stop>,
}

impl Path {
    fn contents(&self, stop: usize) -> Vec<u16> {
        let mut now = self.start.clone();
        for &(slot, expert) in &self.edits[..self.stops[stop].edits] {
            now[slot as usize] = expert;
        }
        now
    }
}

/// Every slot with its device.
fn places(draft: &Draft<'_>) -> Vec<(usize, usize)> {
    (0..draft.site.room.len()).flat_map(|g| draft.slots(g).map(move |slot| (slot, g))).collect()
}

/// Goes from running slots as far as steps gain.
fn walk(site: Site<'_>, load: &[f64], slots: &[i32], reach: Reach) -> std::result::Result<Path, NoSlot> {
    let mut draft = Draft::new(site, load);
    if slots.iter().all(|&e| e < 0) {
        return packed(draft, reach);
    }
    let mut held = vec![false; load.len() * site.room.len()];
    for (slot, device) in places(&draft) {
        let expert = u16::try_from(slots[slot]).unwrap_or(EMPTY);
        if usize::from(expert) < load.len() {
            held[device * load.len() + usize::from(expert)] = true;
            if draft.takes(expert, device) {
                draft.put(slot, device, expert);
            }
        }
    }
    complete(&mut draft, reach.full)?;
    let mut walk = Walk::new(draft, &held);
    walk.note();
    let start = walk.draft.expert_in.clone();
    let mut steps = reach.steps * site.room.len();
    walk.relieve(COARSE, &mut steps);
    while steps > 0 && walk.copy_heaviest() {
        walk.note();
        steps -= 1;
    }
    walk.relieve(FINE, &mut steps);
    walk.anew(reach)?;
    Ok(Path { start, edits: walk.edits, stops: walk.stops })
}

/// Packs a layer where nothing is yet: there is nowhere to go from there.
fn packed(mut draft: Draft<'_>, reach: Reach) -> std::result::Result<Path, NoSlot> {
    let found = fill(draft.site, draft.load, reach.trials)?;
    for (slot, device) in places(&draft) {
        draft.put(slot, device, found[slot]);
    }
    complete(&mut draft, reach.full)?;
    let brought = draft.expert_in.iter().filter(|&&e| e != EMPTY).count();
    let slowest = draft.times_and_loads().0.into_iter().fold(0.0, f64::max);
    let stop = Stop { brought, slowest, norm: slowest, edits: 0 };
    Ok(Path { start: draft.expert_in, edits: vec![], stops: vec![stop] })
}

/// Gives experts that have no slot one, the heaviest first, and may fill empty slots with copies that take most.
pub(in crate::layer) fn complete(draft: &mut Draft<'_>, full: bool) -> std::result::Result<(), NoSlot> {
    let mut missing: Vec<u16> =
        (0..draft.load.len() as u16).filter(|&e| draft.copies[usize::from(e)] == 0).collect();
    missing.sort_by(|&a, &b| draft.load[usize::from(b)].total_cmp(&draft.load[usize::from(a)]));
    for e in missing {
        let times = draft.times_and_loads().0;
        let open = (0..times.len())
            .filter(|&g| draft.takes(e, g))
            .filter_map(|g| draft.slots(g).find(|&slot| draft.expert_in[slot] == EMPTY).map(|slot| (g, slot)))
            .min_by(|a, b| times[a.0].total_cmp(&times[b.0]));
        match open {
            Some((g, slot)) => draft.put(slot, g, e),
            None if squeeze(draft, e) => {}
            None => return Err(NoSlot(usize::from(e))),
        }
    }
    while full && draft.expert_in.contains(&EMPTY) {
        let times = draft.times_and_loads().0;
        let best = (0..times.len())
            .filter_map(|g| {
                let slot = draft.slots(g).find(|&slot| draft.expert_in[slot] == EMPTY)?;
                let copy = (0..draft.load.len() as u16).filter(|&e| draft.takes(e, g));
                // Of equal shares the expert with the fewest copies.
                let rank = |e: u16| (draft.share(e), std::cmp::Reverse(draft.copies[usize::from(e)]));
                let expert = copy.reduce(|a, b| if rank(b) > rank(a) { b } else { a })?;
                Some((g, slot, expert))
            })
            .min_by(|a, b| times[a.0].total_cmp(&times[b.0]));
        let Some((g, slot, expert)) = best else { break };
        draft.put(slot, g, expert);
    }
    Ok(())
}

struct Walk<'a, 'b> {
    draft: Draft<'b>,
    /// What was on a device at the start `[D, E]`.
    held: &'a [bool],
    /// Of every slot `[P]`.
    device_of: Vec<usize>,
    /// Of every device `[D]`, as it counts, in means of all.
    times: Vec<f64>,
    /// Of every device `[D]`, as it is.
    plain: Vec<f64>,
    /// The mean, and of every device the time per token `[D]`.
    mean: f64,
    per_token: Vec<f64>,
    /// Load in every slot `[P]`, as it counts.
    load_in: Vec<f64>,
    /// What a copy would get of every expert, were there one more `[E]`.
    with_one_more: Vec<f64>,
    /// Whether what is in a slot was brought, 0 or 1 `[P]`.
    is_brought: Vec<f64>,
    /// Devices that had an expert at the start `[E]`.
    had: Vec<Vec<usize>>,
    /// What the square of a slot's load counts.
    square: f64,
    scan: Scan,
    edits: Vec<(u32, u16)>,
    stops: Vec<Stop>,
}

/// A step of a [`Walk`].
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Exchange two slots.
    Swap(usize, usize),
    /// Put a copy of an expert into a slot.
    Put(u16, usize),
}

/// The best step so far.
struct Best {
    worth: f64,
    step: Option<Step>,
}

impl Best {
    fn take(&mut self, worth: f64, step: Step) {
        (self.worth, self.step) = (worth, Some(step));
    }
}

/// What a gain counts for each copy that it brings.
#[inline(always)]
fn each(brings: f64) -> f64 {
    if brings > 1.5 {
        0.5
    } else if brings > 0.5 {
        1.0
    } else {
        1.0 / FREE
    }
}

/// A time to the power of the norm.
#[inline(always)]
fn power(time: f64) -> f64 {
    (0..DOUBLINGS).fold(time, |power, _| power * power)
}

/// Slots side by side, for all exchanges of one slot with them at once.
struct Scan {
    /// The slots `[row]`, and rows of every device `[D]`.
    slot: Vec<usize>,
    rows: Vec<std::ops::Range<usize>>,
    /// Time of the slot's device, infinite where there is none, and its time per token `[row]`.
    time: Vec<f64>,
    per_token: Vec<f64>,
    /// The device's time to the power of the norm `[row]`.
    power: Vec<f64>,
    /// Load in the slot `[row]`.
    load: Vec<f64>,
    /// Copies brought by what comes from the slot, and by what goes there, less what these take back `[row]`.
    comes: Vec<f64>,
    goes: Vec<f64>,
    /// What each exchange is worth `[row]`.
    worth: Vec<f64>,
}

/// Slots that are looked at together.
const LANES: usize = 8;

impl Scan {
    fn new(slots: usize, devices: usize) -> Self {
        let row = slots.next_multiple_of(LANES);
        let [time, per_token, power, load, comes, goes, worth] = std::array::from_fn(|_| vec![0.0; row]);
        Self { slot: vec![], rows: vec![0..0; devices], time, per_token, power, load, comes, goes, worth }
    }

    /// Looks at exchanges of a slot of load `given` on a device of time `before`; the most that one is worth.
    fn look(&mut self, given: f64, before: f64, per_token: f64) -> f64 {
        look(self, given, before, per_token)
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn look(scan: &mut Scan, given: f64, before: f64, per_token: f64) -> f64 {
    // Rows beyond the slots are infinitely slow, as far as they are looked at.
    let row = scan.slot.len().next_multiple_of(LANES);
    scan.worth[row..].fill(0.0);
    let (time, per, load) = (&scan.time[..row], &scan.per_token[..row], &scan.load[..row]);
    let powers = &scan.power[..row];
    let (comes, goes, found) = (&scan.comes[..row], &scan.goes[..row], &mut scan.worth[..row]);
    let now = power(before);
    for q in 0..row {
        let moved = given - load[q];
        let (here, there) = (before - moved * per_token, time[q] + moved * per[q]);
        let gain = (now - power(here)) + (powers[q] - power(there));
        found[q] = gain * each(comes[q] + goes[q]);
    }
    let mut most = [0.0; LANES];
    for found in found.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            most[lane] = if found[lane] > most[lane] { found[lane] } else { most[lane] };
        }
    }
    most.into_iter().fold(0.0, f64::max)
}

impl<'a, 'b> Walk<'a, 'b> {
    fn new(draft: Draft<'b>, held: &'a [bool]) -> Self {
        let total: f64 = draft.load.iter().sum();
        let square = if total > 0.0 { UNSTEADY * draft.expert_in.len() as f64 / total } else { 0.0 };
        let device_of: Vec<usize> = places(&draft).into_iter().map(|(_, device)| device).collect();
        let scan = Scan::new(device_of.len(), draft.site.room.len());
        let (experts, is_brought) = (draft.load.len(), vec![0.0; device_of.len()]);
        let mut had = vec![vec![]; experts];
        for (device, held) in held.chunks_exact(experts).enumerate() {
            held.iter().zip(&mut had).filter(|(held, _)| **held).for_each(|(_, had)| had.push(device));
        }
        let mut walk = Self {
            held,
            device_of,
            times: vec![],
            plain: vec![],
            mean: 0.0,
            per_token: vec![],
            load_in: vec![],
            with_one_more: vec![],
            is_brought,
            had,
            square,
            scan,
            edits: vec![],
            stops: vec![],
            draft,
        };
        walk.times_and_loads();
        walk
    }

    /// Follows the draft, whatever has become of it.
    fn times_and_loads(&mut self) {
        let (draft, square) = (&self.draft, self.square);
        let site = draft.site;
        let counts = |load: f64| load + square * load * load;
        (self.plain, self.load_in) = draft.times_and_loads();
        self.load_in.iter_mut().for_each(|load| *load = counts(*load));
        let used = site.time.iter().zip(site.room).filter(|(_, room)| **room > 0);
        let rate: f64 = used.map(|(time, _)| 1.0 / time).sum();
        self.mean = self.load_in.iter().sum::<f64>() / rate;
        let unit = if self.mean > 0.0 { 1.0 / self.mean } else { 0.0 };
        self.per_token = site.time.iter().map(|time| time * unit).collect();
        let load = |g: usize| self.load_in[draft.slots(g)].iter().sum::<f64>();
        self.times = (0..site.room.len()).map(|g| load(g) * self.per_token[g]).collect();
        let copies = draft.copies.iter().map(|&copies| f64::from(copies + 1));
        self.with_one_more =
            draft.load.iter().zip(copies).map(|(load, copies)| counts(load / copies)).collect();
        for slot in 0..self.device_of.len() {
            let is_new = self.is_new(self.draft.expert_in[slot], self.device_of[slot]);
            self.is_brought[slot] = f64::from(u8::from(is_new));
        }
    }

    fn is_new(&self, expert: u16, device: usize) -> bool {
        expert != EMPTY && !self.held[device * self.draft.load.len() + usize::from(expert)]
    }

    fn note(&mut self) {
        let slowest = self.plain.iter().copied().fold(0.0, f64::max);
        let brought = self.is_brought.iter().sum::<f64>() as usize;
        let mut norm = self.total() / self.times.len() as f64;
        for _ in 0..DOUBLINGS {
            norm = norm.sqrt();
        }
        self.stops.push(Stop { brought, slowest, norm: norm * self.mean, edits: self.edits.len() });
    }

    /// Gives the expert with the heaviest copies one more, in place of one whose expert has the lightest without it; false
    /// where none is heavier by enough.
    fn copy_heaviest(&mut self) -> bool {
        let draft = &self.draft;
        if !draft.site.copies {
            return false;
        }
        // Load of every copy, were there one less of its expert.
        let without: Vec<f64> = (0..draft.load.len())
            .map(|e| {
                if draft.copies[e] > 1 {
                    draft.load[e] / f64::from(draft.copies[e] - 1)
                } else {
                    f64::INFINITY
                }
            })
            .collect();
        let least = without.iter().copied().fold(f64::INFINITY, f64::min) * (1.0 + HEAVIER);
        let mut heavy: Vec<u16> = (0..draft.load.len() as u16).filter(|&e| draft.share(e) > least).collect();
        heavy.sort_by(|&e, &f| draft.share(f).total_cmp(&draft.share(e)));
        let best = heavy.into_iter().find_map(|e| {
            let most = draft.share(e) / (1.0 + HEAVIER);
            let open = |&q: &usize| {
                let (g, f) = (self.device_of[q], draft.expert_in[q]);
                f != EMPTY && without[usize::from(f)] < most && draft.takes(e, g) && draft.releases(q, g)
            };
            let key = |q: usize| {
                let (g, f) = (self.device_of[q], draft.expert_in[q]);
                let more = self.with_one_more[usize::from(e)] - self.load_in[q];
                (without[usize::from(f)], self.times[g] + more * self.per_token[g])
            };
            let slots = (0..self.device_of.len()).filter(open).map(|q| (key(q), q));
            let slot = slots.reduce(|a, b| if b.0 < a.0 { b } else { a });
            slot.map(|(_, q)| (e, q))
        });
        let Some((e, slot)) = best else { return false };
        self.draft.put(slot, self.device_of[slot], e);
        self.edits.push((slot as u32, e));
        self.times_and_loads();
        true
    }

    /// Powers of all times.
    fn total(&self) -> f64 {
        self.times.iter().map(|&time| power(time)).sum()
    }

    /// Makes steps that are worth the price, and notes each.
    fn relieve(&mut self, price: f64, steps: &mut usize) {
        while *steps > 0 && self.step(price) {
            self.note();
            *steps -= 1;
        }
    }

    /// Makes the step that relieves one of the slowest devices most for a copy that it brings; false where none is worth
    /// the price.
    fn step(&mut self, price: f64) -> bool {
        let mut order: Vec<usize> = (0..self.times.len()).collect();
        order.sort_by(|&g, &h| self.times[h].total_cmp(&self.times[g]));
        let fastest = &order[order.len() - (order.len() * QUARTERS).div_ceil(4)..];
        let mut best = Best { worth: self.total() * NORM * price, step: None };
        for &slow in order.iter().take(SLOWEST) {
            if self.times[slow] <= 1.0 {
                break;
            }
            if self.draft.site.copies {
                self.look_for_copies(slow, &mut best);
            }
            self.look_for_swaps(slow, fastest, &mut best);
            if best.step.is_some() {
                break;
            }
        }
        let Some(step) = best.step else { return false };
        let draft = &mut self.draft;
        match step {
            Step::Swap(p, q) => {
                let (g, h) = (self.device_of[p], self.device_of[q]);
                let (a, b) = (draft.expert_in[p], draft.expert_in[q]);
                draft.put(p, g, EMPTY);
                draft.put(q, h, a);
                draft.put(p, g, b);
                self.load_in.swap(p, q);
                let moved = self.load_in[q] - self.load_in[p];
                self.times[g] -= moved * self.per_token[g];
                self.times[h] += moved * self.per_token[h];
                for device in [g, h] {
                    let load: f64 = draft.slots(device).map(|slot| draft.share(draft.expert_in[slot])).sum();
                    self.plain[device] = load * draft.site.time[device];
                }
                self.edits.extend([(p as u32, b), (q as u32, a)]);
                for (slot, e, device) in [(p, b, g), (q, a, h)] {
                    self.is_brought[slot] = f64::from(u8::from(self.is_new(e, device)));
                }
            }
            Step::Put(e, q) => {
                draft.put(q, self.device_of[q], e);
                self.edits.push((q as u32, e));
                self.times_and_loads();
            }
        }
        true
    }

    fn look_for_swaps(&mut self, slow: usize, fastest: &[usize], best: &mut Best) {
        let (draft, experts) = (&self.draft, self.draft.load.len());
        let mine = &self.held[slow * experts..][..experts];
        let scan = &mut self.scan;
        scan.slot.clear();
        for &g in fastest.iter().filter(|&&g| g != slow) {
            let (begin, slots) = (scan.slot.len(), draft.slots(g));
            let rows = begin..begin + slots.len();
            scan.slot.extend(slots.clone());
            scan.time[rows.clone()].fill(self.times[g]);
            scan.power[rows.clone()].fill(power(self.times[g]));
            scan.per_token[rows.clone()].fill(self.per_token[g]);
            scan.load[rows.clone()].copy_from_slice(&self.load_in[slots.clone()]);
            for (row, q) in rows.clone().zip(slots) {
                let e = draft.expert_in[q];
                let new = e != EMPTY && !mine[usize::from(e)];
                scan.comes[row] = f64::from(u8::from(new)) - self.is_brought[q];
            }
            scan.rows[g] = rows;
        }
        let count = scan.slot.len();
        // Nothing goes where there is no device.
        scan.time[count..].fill(f64::INFINITY);
        let least = scan.load[..count].iter().copied().fold(f64::INFINITY, f64::min);
        let mut barred = vec![];
        for p in draft.slots(slow) {
            let a = draft.expert_in[p];
            // The least that an exchange can leave, if it brings one copy.
            let rest = self.times[slow] - (self.load_in[p] - least) * self.per_token[slow];
            if power(self.times[slow]) - power(rest) <= best.worth {
                continue;
            }
            scan.goes[..count].fill(f64::from(u8::from(a != EMPTY)) - self.is_brought[p]);
            for &g in self.had.get(usize::from(a)).into_iter().flatten() {
                if g != slow && fastest.contains(&g) {
                    scan.goes[scan.rows[g].clone()].fill(-self.is_brought[p]);
                }
            }
            loop {
                let worth = scan.look(self.load_in[p], self.times[slow], self.per_token[slow]);
                if worth <= best.worth {
                    break;
                }
                let row = scan.worth.iter().position(|&of| of >= worth).unwrap_or_default();
                let q = scan.slot[row];
                if may_exchange(draft, (p, slow), (q, self.device_of[q])) {
                    best.take(worth, Step::Swap(p, q));
                    break;
                }
                // What is not allowed for this one may be for the next.
                scan.time[row] = f64::INFINITY;
                barred.push(row);
            }
            for row in barred.drain(..) {
                scan.time[row] = self.times[self.device_of[scan.slot[row]]];
            }
        }
    }

    /// Looks at copies of what is on the slowest device in slots elsewhere, and of others there.
    ///
    /// That other copies of an expert get less when there is one more is left out, so that a step may turn out better.
    fn look_for_copies(&self, slow: usize, best: &mut Best) {
        let draft = &self.draft;
        let brought = |e: u16, g: usize| f64::from(u8::from(self.is_new(e, g)));
        let raised = |time: f64| power(time);
        let (t, now) = (self.per_token[slow], self.times[slow]);
        let now_raised = raised(now);
        // Of everything on the slowest device: what one more copy would take of it, and relieve.
        let mut here: Vec<(u16, f64, f64)> = draft
            .slots(slow)
            .map(|p| (draft.expert_in[p], self.load_in[p]))
            .filter(|&(e, _)| e != EMPTY)
            .map(|(e, load)| (e, self.with_one_more[usize::from(e)], load))
            .map(|(e, more, load)| (e, more, (load - more) * t))
            .collect();
        here.sort_by(|a, b| b.2.total_cmp(&a.2));
        for q in 0..self.device_of.len() {
            let (g, gone) = (self.device_of[q], draft.expert_in[q]);
            let copies = if gone == EMPTY { 2 } else { draft.copies[usize::from(gone)] };
            if copies < 2 || !draft.releases(q, g) {
                continue;
            }
            // What is left of it gets no heavier than what comes.
            let without =
                if gone == EMPTY { 0.0 } else { draft.load[usize::from(gone)] / f64::from(copies - 1) };
            // What other devices take that have what goes.
            let (mut beside, mut also) = (0.0, 0.0);
            if gone != EMPTY {
                let more = without + self.square * without * without - self.load_in[q];
                for h in draft.devices(gone).filter(|&h| h != g) {
                    if h == slow {
                        also = more * t;
                    } else {
                        beside += raised(self.times[h] + more * self.per_token[h]) - raised(self.times[h]);
                    }
                }
            }
            if beside >= now_raised {
                continue;
            }
            let less = brought(gone, g);
            let rest = self.times[g] - self.load_in[q] * self.per_token[g];
            if g == slow {
                for (e, &more) in (0..).zip(&self.with_one_more) {
                    let gain = now_raised - raised(rest + more * t) - beside;
                    if gain * each(1.0 - less) > best.worth && draft.takes(e, g) && draft.share(e) >= without
                    {
                        let worth = gain * each(brought(e, g) - less);
                        if worth > best.worth {
                            best.take(worth, Step::Put(e, q));
                        }
                    }
                }
                continue;
            }
            let was = raised(self.times[g]);
            for &(e, more, relief) in &here {
                let relieved = now_raised - raised(now - relief + also) - beside;
                // No step relieves more for a copy, nor do those behind.
                if less == 0.0 && relieved + was <= best.worth {
                    break;
                }
                let gain = relieved + was - raised(rest + more * self.per_token[g]);
                if gain > 0.0 && draft.takes(e, g) && draft.share(e) >= without {
                    let worth = gain * each(brought(e, g) - less);
                    if worth > best.worth {
                        best.take(worth, Step::Put(e, q));
                    }
                }
            }
        }
    }

    /// Packs the layer anew where steps end far behind that: a last stop on the way, if it is worth it.
    fn anew(&mut self, reach: Reach) -> std::result::Result<(), NoSlot> {
        let site = self.draft.site;
        let reached = self.times.iter().copied().fold(0.0, f64::max);
        let slowest = self.plain.iter().copied().fold(0.0, f64::max);
        let least = reach.dead_zone.max(ANEW);
        if reached <= 1.0 + least {
            return Ok(());
        }
        let mut packed = Draft::new(site, self.draft.load);
        let contents = fill(site, self.draft.load, reach.trials)?;
        let order = self.matching(&contents);
        for (from, to) in order.into_iter().enumerate() {
            for (p, q) in packed.slots(from).zip(packed.slots(to)) {
                if contents[p] != EMPTY {
                    packed.put(q, to, contents[p]);
                }
            }
        }
        complete(&mut packed, reach.full)?;
        if packed.times_and_loads().0.into_iter().fold(0.0, f64::max) >= slowest * (1.0 - least) {
            return Ok(());
        }
        self.edits.extend((0..).zip(packed.expert_in.iter().copied()));
        self.draft = packed;
        self.times_and_loads();
        self.note();
        Ok(())
    }

    /// The device that takes what was packed for each, so that much of it is there: devices that are alike, as far as
    /// rules do not tell them apart.
    fn matching(&self, contents: &[u16]) -> Vec<usize> {
        let d = self.times.len();
        let site = self.draft.site;
        let alike = |g: usize, h: usize| {
            site.room[g] == site.room[h] && site.time[g].total_cmp(&site.time[h]).is_eq()
        };
        if !site.forbidden.is_empty() {
            return (0..d).collect();
        }
        let mut pairs = Vec::with_capacity(d * d);
        for g in 0..d {
            for h in (0..d).filter(|&h| alike(g, h)) {
                let there = self
                    .draft
                    .slots(g)
                    .filter(|&slot| contents[slot] != EMPTY && !self.is_new(contents[slot], h));
                pairs.push((std::cmp::Reverse(there.count()), g, h));
            }
        }
        pairs.sort_unstable();
        let (mut to, mut taken) = (vec![usize::MAX; d], vec![false; d]);
        for (_, g, h) in pairs {
            if to[g] == usize::MAX && !taken[h] {
                (to[g], taken[h]) = (h, true);
            }
        }
        to
    }
}

/// A way to go on from a stop, for the heap of all layers.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Offer {
    /// Time gained for a copy brought.
    slope: f64,
    layer: usize,
    /// Where on the layer's hull it leads.
    to: usize,
}

impl Eq for Offer {}

impl PartialOrd for Offer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Offer {
    fn cmp(&self, other: &Self) -> Ordering {
        self.slope.total_cmp(&other.slope).then(other.layer.cmp(&self.layer))
    }
}

/// The stop of every layer at which to stay, so that a budget gains most.
fn choose(paths: &[Path], reach: Reach) -> Vec<usize> {
    // Where a copy has a price, it is paid by what the slowest device gains.
    let time = |stop: &Stop| if reach.price > 0.0 { stop.slowest } else { stop.norm };
    let hulls: Vec<Vec<usize>> = paths.iter().map(|path| hull(&path.stops, time)).collect();
    let mut chosen = vec![0; paths.len()];
    let mut left = reach.most;
    for path in paths {
        left = left.saturating_sub(path.stops[0].brought);
    }
    let offer = |layer: usize, from: usize, to: usize| {
        let (stops, hull) = (&paths[layer].stops, &hulls[layer]);
        let (a, b) = (stops[hull[from]], stops[*hull.get(to)?]);
        let slope = (time(&a) - time(&b)) / (b.brought - a.brought).max(1) as f64;
        (slope > reach.price).then_some(Offer { slope, layer, to })
    };
    let mut heap: BinaryHeap<Offer> = (0..paths.len()).filter_map(|layer| offer(layer, 0, 1)).collect();
    while let Some(Offer { layer, to, .. }) = heap.pop() {
        let (stops, hull) = (&paths[layer].stops, &hulls[layer]);
        let (from, next) = (stops[chosen[layer]].brought, hull[to]);
        let needs = stops[next].brought.saturating_sub(from);
        if needs <= left {
            left -= needs;
            chosen[layer] = next;
            heap.extend(offer(layer, to, to + 1));
        }
    }
    for (path, at) in paths.iter().zip(&mut chosen) {
        let (before, after) = (path.stops[0].slowest, path.stops[*at].slowest);
        let gain = before - after;
        let noise = reach.deviations * (before + after).sqrt();
        if gain <= reach.dead_zone * before || gain <= noise {
            *at = 0;
        }
    }
    chosen
}

/// The stops where a line from the start bends that lies under all of them.
fn hull(stops: &[Stop], time: impl Fn(&Stop) -> f64) -> Vec<usize> {
    let most = stops[0].slowest * (1.0 + GAIN);
    let mut order: Vec<usize> = (0..stops.len()).filter(|&at| stops[at].slowest <= most).collect();
    // The start is first, whatever was taken back later.
    order[1..].sort_by(|&a, &b| {
        stops[a].brought.cmp(&stops[b].brought).then(time(&stops[a]).total_cmp(&time(&stops[b])))
    });
    let mut hull: Vec<usize> = vec![];
    for at in order {
        let b = stops[at];
        if hull.last().is_some_and(|&last| time(&stops[last]) <= time(&b)) {
            continue;
        }
        let slope = |a: usize, b: usize| {
            let brings = stops[b].brought.saturating_sub(stops[a].brought);
            (time(&stops[a]) - time(&stops[b])) / (brings as f64).max(FREE)
        };
        while hull.len() > 1
            && slope(hull[hull.len() - 2], hull[hull.len() - 1]) <= slope(hull[hull.len() - 1], at)
        {
            hull.pop();
        }
        hull.push(at);
    }
    hull
}

/// Orders new contents so that what stays on a device keeps its slot, -1 where a slot is empty.
fn keep(before: &[i32], now: &[u16], room: &[usize]) -> Vec<i32> {
    if before.iter().all(|&e| e < 0) {
        return now.iter().map(|&e| if e == EMPTY { -1 } else { i32::from(e) }).collect();
    }
    let mut ordered = vec![-1; now.len()];
    let mut first = 0;
    for &room in room {
        let (old, new) = (&before[first..first + room], &now[first..first + room]);
        let kept = &mut ordered[first..first + room];
        first += room;
        let mut rest = Vec::new();
        for &e in new.iter().filter(|&&e| e != EMPTY) {
            match old.iter().position(|&of| of == i32::from(e)) {
                Some(slot) => kept[slot] = i32::from(e),
                None => rest.push(i32::from(e)),
            }
        }
        let mut rest = rest.into_iter();
        for slot in kept.iter_mut().filter(|slot| **slot < 0) {
            *slot = rest.next().unwrap_or(-1);
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;

    fn measured(load: &[f64], slots: &[i32], width: usize) -> f64 {
        let copies = |e: i32| slots.iter().filter(|&&of| of == e).count() as f64;
        let part = |&e: &i32| if e < 0 { 0.0 } else { load[e as usize] / copies(e) };
        slots.chunks(width).map(|row| row.iter().map(part).sum()).fold(0.0, f64::max)
    }

    proptest! {
        /// Every expert has a slot and no device two copies; what stays keeps its slot; and what is said of a layer is
        /// so: times, and copies within the budget, or those that had to be brought.
        #[test]
        fn keeps_its_promises(
            experts in 1usize..12, devices in 1usize..5, more in 0usize..3, most in 0usize..12, full: bool, seed: u64,
        ) {
            let mut random = Random::new(seed, 0);
            let width = (experts.div_ceil(devices) + more).min(experts);
            let load: Vec<f64> = (0..2 * experts).map(|_| random.below(1000) as f64).collect();
            let before: Vec<i32> =
                (0..2 * devices * width).map(|_| random.below(experts + 2) as i32 - 2).collect();
            let (room, time) = (vec![width; devices], vec![1.0; devices]);
            let all = Site { room: &room, time: &time, forbidden: &[], pinned: &[], copies: true };
            let reach = |most, steps| Reach {
                most, dead_zone: 0.0, deviations: 0.0, price: 0.0, steps, trials: super::super::QUICK, full,
            };
            let mut after = before.clone();
            let changes = adapt_layers(&load, experts, all, &mut after, reach(most, 8)).expect("slots suffice");
            let mut must = before.clone();
            let least = adapt_layers(&load, experts, all, &mut must, reach(0, 0)).expect("slots suffice");
            let per_layer = devices * width;
            let mut brought = 0;
            for (l, change) in changes.iter().enumerate() {
                let (old, new) = (&before[l * per_layer..][..per_layer], &after[l * per_layer..][..per_layer]);
                let load = &load[l * experts..][..experts];
                prop_assert!((0..experts as i32).all(|e| new.contains(&e)));
                let mut came = 0;
                for (old, new) in old.chunks(width).zip(new.chunks(width)) {
                    for (slot, &e) in new.iter().enumerate().filter(|(_, e)| **e >= 0) {
                        prop_assert_eq!(new.iter().filter(|&&of| of == e).count(), 1);
                        match old.iter().position(|&of| of == e) {
                            Some(at) => prop_assert_eq!(at, slot),
                            None => came += 1,
                        }
                    }
                    prop_assert!(!full || !new.contains(&-1));
                }
                prop_assert_eq!(came, change.brought);
                let slowest = measured(load, new, width);
                prop_assert!((slowest - change.slowest.1).abs() <= 1e-9 * slowest.max(1.0));
                prop_assert!(change.slowest.1 <= change.slowest.0 * (1.0 + 1e-9));
                brought += came;
            }
            let needed: usize = least.iter().map(|change| change.brought).sum();
            prop_assert!(brought <= needed.max(most));
        }
    }
}
