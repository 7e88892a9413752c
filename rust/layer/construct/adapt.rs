//! From running slots to better ones on a single load, by few copies that have to be brought.
//!
//! What a balancer does that is called again and again while it serves: it starts where it is, relieves the slowest
//! device by the step that gains most for a copy brought, and notes after every step what was brought and how slow the
//! slowest device still is. A budget is then spent on the steps of those layers where it gains most.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::draft::{Draft, Site};
use super::polish::{changes, may_exchange};
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
    /// A device this near to the mean is relieved no further, as a part of it.
    pub tolerance: f64,
    /// Steps of a layer at the most, for each of its devices.
    pub steps: usize,
    /// Trials of the polish where a layer is packed anew.
    pub trials: usize,
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
    let mut held = vec![false; load.len() * site.room.len()];
    for (slot, device) in places(&draft) {
        let expert = u16::try_from(slots[slot]).unwrap_or(EMPTY);
        if usize::from(expert) < load.len() {
            held[usize::from(expert) * site.room.len() + device] = true;
            if draft.takes(expert, device) {
                draft.put(slot, device, expert);
            }
        }
    }
    if !held.contains(&true) {
        let packed = fill(site, load, reach.trials)?;
        for (slot, device) in places(&draft) {
            draft.put(slot, device, packed[slot]);
        }
    }
    complete(&mut draft)?;
    let mut walk = Walk::new(draft, &held, reach.tolerance);
    walk.note();
    let start = walk.draft.expert_in.clone();
    for _ in 0..reach.steps * site.room.len() {
        if !walk.step() {
            break;
        }
        walk.note();
    }
    walk.anew(reach)?;
    Ok(Path { start, edits: walk.edits, stops: walk.stops })
}

/// Gives experts that have no slot one, the heaviest first, and fills empty slots with copies that take most.
fn complete(draft: &mut Draft<'_>) -> std::result::Result<(), NoSlot> {
    let empty = draft.expert_in.iter().any(|&e| e == EMPTY);
    let mut missing: Vec<u16> =
        (0..draft.load.len() as u16).filter(|&e| draft.copies[usize::from(e)] == 0).collect();
    if missing.is_empty() && !empty {
        return Ok(());
    }
    missing.sort_by(|&a, &b| draft.load[usize::from(b)].total_cmp(&draft.load[usize::from(a)]));
    for e in missing {
        let times = draft.measure().0;
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
    loop {
        let times = draft.measure().0;
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
        let Some((g, slot, expert)) = best else { return Ok(()) };
        draft.put(slot, g, expert);
    }
}

struct Walk<'a, 'b> {
    draft: Draft<'b>,
    /// What was on a device at the start `[E, D]`.
    held: &'a [bool],
    /// Of every device `[D]`.
    times: Vec<f64>,
    /// Load in every slot `[P]`.
    load_in: Vec<f64>,
    /// Where nothing is relieved any more.
    target: f64,
    edits: Vec<(u32, u16)>,
    stops: Vec<Stop>,
}

/// A step of a [`Walk`].
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Exchange slots of devices.
    Swap((usize, usize), (usize, usize)),
    /// Put a copy of an expert into a slot of a device.
    Put(u16, (usize, usize)),
}

/// The best step so far.
struct Best {
    /// Time of the slowest device, and below which all that a step touches must end.
    now: f64,
    goal: f64,
    target: f64,
    worth: f64,
    longest: f64,
    step: Option<Step>,
}

impl Best {
    /// What a step is worth after which the slowest of those it touches takes `longest`.
    fn worth(&self, longest: f64, brings: i64) -> f64 {
        (self.now - longest.max(self.target)) / if brings > 0 { brings as f64 } else { FREE }
    }

    fn beats(&self, worth: f64, longest: f64) -> bool {
        worth > self.worth || (worth == self.worth && longest < self.longest)
    }

    fn take(&mut self, worth: f64, longest: f64, step: Step) {
        (self.worth, self.longest, self.step) = (worth, longest, Some(step));
    }
}

impl<'a, 'b> Walk<'a, 'b> {
    fn new(draft: Draft<'b>, held: &'a [bool], tolerance: f64) -> Self {
        let (times, load_in) = draft.measure();
        let site = draft.site;
        let rate: f64 =
            site.time.iter().zip(site.room).filter(|(_, room)| **room > 0).map(|(time, _)| 1.0 / time).sum();
        let target = draft.load.iter().sum::<f64>() / rate * (1.0 + tolerance);
        Self { draft, held, times, load_in, target, edits: vec![], stops: vec![] }
    }

    fn is_new(&self, expert: u16, device: usize) -> bool {
        expert != EMPTY && !self.held[usize::from(expert) * self.times.len() + device]
    }

    fn note(&mut self) {
        let slots = places(&self.draft).into_iter();
        let brought = slots.filter(|&(slot, g)| self.is_new(self.draft.expert_in[slot], g)).count();
        let slowest = self.times.iter().copied().fold(0.0, f64::max);
        self.stops.push(Stop { brought, slowest, edits: self.edits.len() });
    }

    /// Makes the step that relieves the slowest device most for a copy that it brings; false where none does.
    fn step(&mut self) -> bool {
        let slow =
            (1..self.times.len()).fold(0, |best, g| if self.times[g] > self.times[best] { g } else { best });
        let now = self.times[slow];
        if now <= self.target {
            return false;
        }
        let goal = now * (1.0 - GAIN);
        let mut best =
            Best { now, goal, target: self.target, worth: 0.0, longest: f64::INFINITY, step: None };
        self.look_for_swaps(slow, &mut best);
        if self.draft.site.copies {
            self.look_for_copies(slow, &mut best);
        }
        let Some(step) = best.step else { return false };
        let draft = &mut self.draft;
        match step {
            Step::Swap((p, g), (q, h)) => {
                let (a, b) = (draft.expert_in[p], draft.expert_in[q]);
                draft.put(p, g, EMPTY);
                draft.put(q, h, a);
                draft.put(p, g, b);
                self.load_in.swap(p, q);
                let moved = self.load_in[q] - self.load_in[p];
                self.times[g] -= moved * draft.site.time[g];
                self.times[h] += moved * draft.site.time[h];
                self.edits.extend([(p as u32, b), (q as u32, a)]);
            }
            Step::Put(e, (q, g)) => {
                draft.put(q, g, e);
                (self.times, self.load_in) = draft.measure();
                self.edits.push((q as u32, e));
            }
        }
        true
    }

    fn look_for_swaps(&self, slow: usize, best: &mut Best) {
        let draft = &self.draft;
        let before = self.times[slow];
        for other in (0..self.times.len()).filter(|&g| g != slow) {
            let [t, u] = [draft.site.time[slow], draft.site.time[other]];
            let beside = self.times[other];
            for p in draft.slots(slow) {
                let given = self.load_in[p];
                let a = draft.expert_in[p];
                let goes = i64::from(self.is_new(a, other)) - i64::from(self.is_new(a, slow));
                for q in draft.slots(other) {
                    let moved = given - self.load_in[q];
                    let longest = f64::max(before - moved * t, beside + moved * u);
                    // Two copies at the most are brought.
                    if longest >= best.goal {
                        continue;
                    }
                    let b = draft.expert_in[q];
                    let brings = goes + i64::from(self.is_new(b, slow)) - i64::from(self.is_new(b, other));
                    let worth = best.worth(longest, brings);
                    if best.beats(worth, longest) && may_exchange(draft, (p, slow), (q, other)) {
                        best.take(worth, longest, Step::Swap((p, slow), (q, other)));
                    }
                }
            }
        }
    }

    /// Looks at copies of what is on the slowest device in slots elsewhere, and of others there.
    fn look_for_copies(&self, slow: usize, best: &mut Best) {
        let draft = &self.draft;
        let spare = |slot: usize| {
            let e = draft.expert_in[slot];
            e == EMPTY || draft.copies[usize::from(e)] > 1
        };
        let mut look = |e: u16, (q, g): (usize, usize), relief: f64| {
            let gone = draft.expert_in[q];
            let brings = i64::from(self.is_new(e, g)) - i64::from(self.is_new(gone, g));
            // No more than the slowest device itself is relieved.
            if best.worth(best.now - relief, brings) < best.worth || relief <= 0.0 {
                return;
            }
            let after = changes(draft, e, (q, g)).map(|(h, by)| self.times[h] + by);
            let longest = after.fold(0.0, f64::max);
            let worth = best.worth(longest, brings);
            if longest < best.goal && best.beats(worth, longest) {
                best.take(worth, longest, Step::Put(e, (q, g)));
            }
        };
        let time = draft.site.time[slow];
        let more = |e: u16| draft.load[usize::from(e)] / f64::from(draft.copies[usize::from(e)] + 1);
        for g in 0..self.times.len() {
            for q in draft.slots(g).filter(|&q| spare(q) && draft.releases(q, g)) {
                if g == slow {
                    for e in (0..draft.load.len() as u16).filter(|&e| draft.takes(e, g)) {
                        look(e, (q, g), (self.load_in[q] - more(e)) * time);
                    }
                } else {
                    for p in draft.slots(slow) {
                        let e = draft.expert_in[p];
                        if e != EMPTY && draft.takes(e, g) {
                            look(e, (q, g), (self.load_in[p] - more(e)) * time);
                        }
                    }
                }
            }
        }
    }

    /// Packs the layer anew where steps end far behind that: a last stop on the way, if it is worth it.
    fn anew(&mut self, reach: Reach) -> std::result::Result<(), NoSlot> {
        let site = self.draft.site;
        let reached = self.times.iter().copied().fold(0.0, f64::max);
        if reached <= self.target * (1.0 + reach.dead_zone) {
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
        complete(&mut packed)?;
        let (times, load_in) = packed.measure();
        if times.iter().copied().fold(0.0, f64::max) >= reached * (1.0 - reach.dead_zone) {
            return Ok(());
        }
        self.edits.extend((0..).zip(packed.expert_in.iter().copied()));
        (self.draft, self.times, self.load_in) = (packed, times, load_in);
        self.note();
        Ok(())
    }

    /// The device that takes what was packed for each, so that much of it is there: devices that are alike, as far as
    /// rules do not tell them apart.
    fn matching(&self, contents: &[u16]) -> Vec<usize> {
        let d = self.times.len();
        let site = self.draft.site;
        let alike = |g: usize, h: usize| site.room[g] == site.room[h] && site.time[g] == site.time[h];
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
    let hulls: Vec<Vec<usize>> = paths.iter().map(|path| hull(&path.stops)).collect();
    let mut chosen = vec![0; paths.len()];
    let mut left = reach.most;
    for path in paths {
        left = left.saturating_sub(path.stops[0].brought);
    }
    let offer = |layer: usize, from: usize, to: usize| {
        let (stops, hull) = (&paths[layer].stops, &hulls[layer]);
        let (a, b) = (stops[hull[from]], stops[*hull.get(to)?]);
        let slope = (a.slowest - b.slowest) / (b.brought - a.brought).max(1) as f64;
        Some(Offer { slope, layer, to })
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
fn hull(stops: &[Stop]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..stops.len()).collect();
    // The start is first, whatever was taken back later.
    order[1..].sort_by(|&a, &b| {
        stops[a].brought.cmp(&stops[b].brought).then(stops[a].slowest.total_cmp(&stops[b].slowest))
    });
    let mut hull: Vec<usize> = vec![];
    for at in order {
        let b = stops[at];
        if hull.last().is_some_and(|&last| stops[last].slowest <= b.slowest) {
            continue;
        }
        let slope = |a: usize, b: usize| {
            let brings = stops[b].brought.saturating_sub(stops[a].brought);
            (stops[a].slowest - stops[b].slowest) / (brings as f64).max(FREE)
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
