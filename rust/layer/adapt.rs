//! From running slots to better ones on a single load, by few copies that are brought.
//!
//! What a balancer does that is called again and again while it serves: it starts where it is, relieves the slowest
//! device by the step that gains most for a copy brought, and notes after every step what was brought and how slow the
//! slowest device still is. A [budget](super::budget) is then spent on the steps of those layers where it gains most.
//! Packing anew is one more way for every layer, and where no load has shaped what runs it is all that is looked at.
//! [`super::descend`] does the same by all terms of a cost; on one load, exchanges of a slot with all others at once
//! take microseconds.

use super::budget::{Spending, Way, choose, per_copy};
use super::construct::{LEAST, Placed, check, complete, fill};
use super::{EMPTY, Move, Site, Slots};
use crate::assignment::assign_max;
use crate::error::Result;

/// How far running slots are changed.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Which steps are taken in the end.
    pub spending: Spending,
    /// Steps of a layer at the most, for each of its devices.
    pub steps: usize,
    /// Trials of the polish where nothing runs yet.
    pub trials: usize,
    /// Whether empty slots are filled, whatever that brings.
    pub full: bool,
}

/// Times count to the power of two to the power of this: what is slow counts most, and what is nearly as slow too, which
/// on the next load may be the slowest.
const DOUBLINGS: u32 = 3;
const NORM: f64 = (1 << DOUBLINGS) as f64;
/// Largest variance that is expected of the next window.
const LARGEST_VARIANCE: f64 = 0.25;
/// Standard deviations of what counts differ by chance, within which loads are taken for what they were.
const SURE: f64 = 2.0;
/// Part of the differences that is no chance where no loads have shaped what runs: nothing tells.
const UNKNOWN: f64 = 0.5;
/// Part of a device's slots in which something else comes when its layer changes.
const REPLACED: f64 = 0.25;
/// A copy moves to an expert whose copies are heavier by this part than those that it leaves will be.
const HEAVIER: f64 = 0.05;
/// What a copy must relieve, as a part of the mean device's time: before the heaviest experts get more copies, and after.
const COARSE: f64 = 1e-3;
const FINE: f64 = 2e-6;
/// What packing anew must gain over steps, as a part of the cost, where loads have shaped what runs.
const ANEW: f64 = 0.01;
/// Devices that are looked at, the slowest first, until a step is found.
const SLOWEST: usize = 3;
/// The slowest exchange slots with the fastest, of all devices so many quarters.
const QUARTERS: usize = 3;

/// Goes from running slots `[L][P]` to better ones on loads `[L, E]`: of every layer what is then in its slots, and what
/// it was and became. Experts without a slot get one and empty slots are filled, whatever they bring; what stays on a
/// device keeps its slot. In a layer that is `fresh` `[L]` no load has shaped what runs.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn adapt_layers(
    load: &[f64],
    experts: usize,
    sites: &[Site],
    running: &[Vec<u16>],
    fresh: &[bool],
    effort: Effort,
) -> Result<Vec<(Vec<u16>, [Way; 2])>> {
    check(load, experts)?;
    let idle = vec![0.0; experts];
    let layers = || load.chunks_exact(experts).map(|load| if is_idle(load) { &idle[..] } else { load });
    let slots = running.iter().zip(sites).map(|(running, site)| Slots::new(&site.capacity, experts, running));
    let running: Vec<Slots> = slots.collect();
    let is_shaped: Vec<bool> = running
        .iter()
        .zip(fresh)
        .map(|(slots, fresh)| !fresh && slots.copies.iter().all(|&copies| copies > 0))
        .collect();
    let shaped = layers().zip(sites).zip(&running).zip(&is_shaped).filter(|(_, shaped)| **shaped);
    let change = Change::of(shaped.map(|(layer, _)| layer), effort.spending.deviations);
    let weighed = |(layer, shaped): (((&[f64], &Site), &Slots), &bool)| {
        let ((load, site), slots) = layer;
        if *shaped { change.weigh(load, site, slots) } else { load.to_vec() }
    };
    let tokens: Vec<Vec<f64>> = layers().zip(sites).zip(&running).zip(&is_shaped).map(weighed).collect();
    let all = layers().zip(tokens).zip(sites).zip(running).zip(fresh).enumerate();
    let improved = all.map(|(layer, ((((seen, tokens), site), running), &fresh))| {
        improve(site, seen, tokens, running, fresh, change.variance, effort).map_err(|fault| fault.of(layer))
    });
    let all: Vec<Steps<'_>> = improved.collect::<Result<_>>()?;
    let ways: Vec<&[Way]> = all.iter().map(|steps| &steps.ways[..]).collect();
    let chosen = choose(&ways, change.wary(effort.spending));
    let end = |(steps, at): (&Steps<'_>, usize)| {
        (steps.running.keep_slots(&steps.contents[at]), [steps.ways[0], steps.ways[at]])
    };
    Ok(all.iter().zip(chosen).map(end).collect())
}

/// Whether a layer's loads are none, or too small to be divided by.
fn is_idle(load: &[f64]) -> bool {
    load.iter().sum::<f64>() < LEAST
}

/// How loads have changed since they shaped what runs.
///
/// What runs was even on the loads that it was chosen by. If each load has changed by a part of its own since, with a
/// variance, the time of a device has by the sum of the squares of what is in its slots; and besides it differs by
/// chance, as few tokens are counted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    /// Variance of an expert's load from window to window, as a part of its square.
    pub variance: f64,
    /// Part of the differences of devices that is no chance: about n / (n + m) of n tokens, where chance is half of the
    /// differences of m.
    pub part: f64,
}

impl Change {
    /// Estimates the change from all layers; counts scatter by so many standard deviations of their own.
    pub(super) fn of<'a>(
        layers: impl Iterator<Item = ((&'a [f64], &'a Site), &'a Slots)>,
        deviations: f64,
    ) -> Self {
        let (mut seen, mut squares, mut chance, mut freedom) = (0.0, 0.0, 0.0, 0.0);
        for ((load, site), slots) in layers {
            let (times, loads) = slots.times_and_loads(site, load);
            let devices = times.len() as f64;
            let mean = times.iter().sum::<f64>() / devices;
            if mean > 0.0 {
                let time = |slot: usize| site.time[slots.device(slot)] / mean;
                squares += (0..loads.len()).map(|slot| (loads[slot] * time(slot)).powi(2)).sum::<f64>();
                seen += times.iter().map(|time| (time / mean - 1.0).powi(2)).sum::<f64>();
                // Copies divide the counts of their expert, chance among them.
                let copies = |slot: usize| f64::from(slots.copies(slots.expert_in[slot]).max(1));
                let counted = |slot: usize| loads[slot] / copies(slot) * time(slot).powi(2);
                chance += (0..loads.len()).map(counted).sum::<f64>() * (devices - 1.0) / devices;
                freedom += devices - 1.0;
            }
        }
        let chance = chance * deviations * deviations;
        let variance = (seen - chance).max(0.0) / squares;
        let part = match (deviations > 0.0, freedom > 0.0) {
            (false, _) => 1.0,
            (_, false) => UNKNOWN,
            _ if seen > 0.0 => (1.0 - chance * (1.0 + SURE * (2.0 / freedom).sqrt()) / seen).max(0.0),
            _ => 0.0,
        };
        Self { variance: if squares > 0.0 { variance.min(LARGEST_VARIANCE) } else { 0.0 }, part }
    }

    /// Asks layers to gain more the more of it may be chance.
    ///
    /// Of a device that differs by x, the part p x is expected to stay if nothing moves, with a variance of p c, where c is
    /// that of counts. What comes in place of the part f of its slots brings f (1 - p) c with it. So the slowest is
    /// expected to gain where p x is more than sqrt(f (1 - p) c) times as many standard deviations as it has of many.
    fn wary(self, spending: Spending) -> Spending {
        let wary = if self.part < 1.0 { ((1.0 - self.part) * REPLACED).sqrt() / self.part } else { 0.0 };
        Spending { deviations: wary * spending.deviations, ..spending }
    }

    /// Weighs a layer's loads with what runs, on which devices are even: what a device has more than others counts as
    /// far as it is no chance.
    fn weigh(self, load: &[f64], site: &Site, running: &Slots) -> Vec<f64> {
        let (times, _) = running.times_and_loads(site, load);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let factor = |device: u16| {
            let time = times[usize::from(device)];
            if time > 0.0 { self.part + (1.0 - self.part) * mean / time } else { 1.0 }
        };
        let weigh = |(&load, e): (&f64, u16)| {
            let (sum, count) = running
                .devices(e)
                .map(factor)
                .fold((0.0, 0.0), |(sum, count), factor| (sum + factor, count + 1.0));
            if count > 0.0 { load * sum / count } else { load }
        };
        load.iter().zip(0..).map(weigh).collect()
    }
}

/// Goes from running slots as far as steps gain, and packs anew; where nothing runs yet, a packing is all there is.
fn improve<'a>(
    site: &'a Site,
    seen: &'a [f64],
    tokens: Vec<f64>,
    running: Slots,
    is_fresh: bool,
    variance: f64,
    effort: Effort,
) -> Placed<Steps<'a>> {
    let (slots, devices) = (running.expert_in.len(), site.devices());
    let is_new = running.expert_in.iter().all(|&e| e == EMPTY);
    let mut packed = None;
    if is_new || effort.steps > 0 && site.has_equal_devices() {
        packed = Some(fill(site, &tokens, effort.trials)?);
    }
    let mut first = packed.take_if(|_| is_new).unwrap_or_else(|| running.clone());
    complete(&mut first, site, &tokens, effort.full)?;
    // Of a time that varies, the power's mean is larger by n (n - 1) / 2 variances: as if it took (n - 1) / 2 longer.
    let unit = tokens.iter().sum::<f64>() / devices as f64;
    let square = if unit > 0.0 { (NORM - 1.0) / 2.0 * variance / unit } else { 0.0 };
    let loads = Loads::of(site, [seen, &tokens], &first, &running, square);
    let (ways, contents, scan) = (vec![], vec![], Scan::new(slots, devices));
    let mut steps = Steps { site, seen, tokens, running, slots: first, loads, scan, ways, contents };
    steps.note();
    // What no load has shaped is left at once: experts that are neighbours there are often busy together, which a single
    // load does not show.
    let is_left = is_fresh && packed.is_some();
    if !is_new && !is_left {
        steps.descend(effort.steps * devices);
    }
    if let Some(packed) = packed {
        steps.offer(&packed, if is_fresh { 0.0 } else { ANEW }, effort.full)?;
    }
    Ok(steps)
}

/// Gives what was packed for a device to one that holds much of it, of devices that are alike: fewest copies move.
#[must_use]
pub fn keep_devices(packed: &Slots, running: &Slots, capacity: &[usize]) -> Slots {
    let devices = capacity.len();
    let mut same = vec![0; devices * devices];
    for (slot, &e) in packed.expert_in.iter().enumerate().filter(|(_, e)| **e != EMPTY) {
        for device in running.devices(e) {
            same[packed.device(slot) * devices + usize::from(device)] += 1;
        }
    }
    let mut slots = Slots::empty(capacity, packed.copies.len());
    for (from, to) in assign_max(&same, devices).into_iter().enumerate() {
        for (slot, there) in packed.of(from).zip(slots.of(to)) {
            slots.put(there, packed.expert_in[slot]);
        }
    }
    slots
}

/// A layer and the steps that were taken: what is so after every one, and the contents of slots `[P]` then.
struct Steps<'a> {
    site: &'a Site,
    /// Tokens of every expert, as they were counted and as they count `[E]`.
    seen: &'a [f64],
    tokens: Vec<f64>,
    /// What ran at the start.
    running: Slots,
    slots: Slots,
    loads: Loads,
    scan: Scan,
    ways: Vec<Way>,
    contents: Vec<Vec<u16>>,
}

/// What devices and slots have to do.
struct Loads {
    /// Of every device `[D]`, as it counts, in means of all.
    times: Vec<f64>,
    /// Of every device `[D]`, of the tokens that were counted.
    plain: Vec<f64>,
    /// The mean, and of every device the time per token `[D]`.
    mean: f64,
    per_token: Vec<f64>,
    /// Load in every slot `[P]`, as it counts.
    load_in: Vec<f64>,
    /// What a copy would get of every expert, were there one more `[E]`.
    with_one_more: Vec<f64>,
    /// Whether what is in a slot was brought, 0 or 1 `[P]`.
    is_moved: Vec<f64>,
    /// What the square of a slot's load counts, as the next window's will differ.
    square: f64,
}

impl Loads {
    fn of(site: &Site, [seen, tokens]: [&[f64]; 2], slots: &Slots, running: &Slots, square: f64) -> Self {
        let counts = |load: f64| load + square * load * load;
        let (plain, _) = slots.times_and_loads(site, seen);
        let (_, mut load_in) = slots.times_and_loads(site, tokens);
        for load in &mut load_in {
            *load = counts(*load);
        }
        let mean = load_in.iter().sum::<f64>() / site.rate();
        let unit = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        let per_token: Vec<f64> = site.time.iter().map(|time| time * unit).collect();
        let time = |g: usize| load_in[slots.of(g)].iter().sum::<f64>() * per_token[g];
        let times = (0..site.devices()).map(time).collect();
        let copies = slots.copies.iter().map(|&copies| f64::from(copies + 1));
        let with_one_more = tokens.iter().zip(copies).map(|(load, copies)| counts(load / copies)).collect();
        let is_moved = (0..load_in.len()).map(|slot| one_if(slots.is_moved(slot, running))).collect();
        Self { times, plain, mean, per_token, load_in, with_one_more, is_moved, square }
    }
}

/// 1 for yes, 0 for no.
fn one_if(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

/// What the best step so far is worth, and the step.
type Best = (f64, Option<Move>);

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
}

/// Looks at exchanges of a slot of load `given` on a device of time `before`; the most that one is worth.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn look(scan: &mut Scan, load_here: f64, before: f64, per_token: f64) -> f64 {
    // Rows beyond the slots are infinitely slow, as far as they are looked at.
    let row = scan.slot.len().next_multiple_of(LANES);
    scan.worth[row..].fill(0.0);
    let (time, per, load) = (&scan.time[..row], &scan.per_token[..row], &scan.load[..row]);
    let powers = &scan.power[..row];
    let (comes, goes, worth) = (&scan.comes[..row], &scan.goes[..row], &mut scan.worth[..row]);
    let now = power(before);
    for q in 0..row {
        let moved = load_here - load[q];
        let (here, there) = (before - moved * per_token, time[q] + moved * per[q]);
        let gain = (now - power(here)) + (powers[q] - power(there));
        worth[q] = gain * per_copy(comes[q] + goes[q]);
    }
    let mut best = [0.0; LANES];
    for worth in worth.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            best[lane] = if worth[lane] > best[lane] { worth[lane] } else { best[lane] };
        }
    }
    best.into_iter().fold(0.0, f64::max)
}

impl Steps<'_> {
    fn note(&mut self) {
        let slowest = self.loads.plain.iter().copied().fold(0.0, f64::max);
        let moves = self.loads.is_moved.iter().sum::<f64>() as usize;
        let mut norm = self.total() / self.loads.times.len() as f64;
        for _ in 0..DOUBLINGS {
            norm = norm.sqrt();
        }
        self.ways.push(Way { moves, slowest, cost: norm * self.loads.mean });
        self.contents.push(self.slots.expert_in.clone());
    }

    /// Makes so many steps at the most, as long as they gain.
    fn descend(&mut self, mut left: usize) {
        let phases: [fn(&mut Self) -> bool; 3] =
            [|steps| steps.relieve(COARSE), Self::copy_heaviest, |steps| steps.relieve(FINE)];
        for phase in phases {
            while left > 0 && phase(self) {
                self.note();
                left -= 1;
            }
        }
    }

    /// Notes a packing as the last way, if it costs less than all others by more than a part.
    fn offer(&mut self, packed: &Slots, part: f64, full: bool) -> Placed<()> {
        let least = self.ways.iter().map(|way| way.cost).fold(f64::INFINITY, f64::min);
        self.slots = keep_devices(packed, &self.running, &self.site.capacity);
        complete(&mut self.slots, self.site, &self.tokens, full)?;
        let tokens = [self.seen, &self.tokens];
        self.loads = Loads::of(self.site, tokens, &self.slots, &self.running, self.loads.square);
        self.note();
        if self.ways.pop_if(|way| way.cost >= least * (1.0 - part)).is_some() {
            self.contents.pop();
        }
        Ok(())
    }

    /// Gives the expert with the heaviest copies one more, in place of one whose expert has the lightest without it; false
    /// where none is heavier by enough.
    fn copy_heaviest(&mut self) -> bool {
        let (slots, site, tokens) = (&self.slots, self.site, &self.tokens[..]);
        // Load of every copy, were there one less of its expert.
        let without = |(&tokens, &copies): (&f64, &u32)| {
            if copies > 1 { tokens / f64::from(copies - 1) } else { f64::INFINITY }
        };
        let without: Vec<f64> = tokens.iter().zip(&slots.copies).map(without).collect();
        let least = without.iter().copied().fold(f64::INFINITY, f64::min) * (1.0 + HEAVIER);
        let part = |e: u16| slots.part(tokens, e);
        let mut heavy: Vec<u16> = (0..tokens.len() as u16).filter(|&e| part(e) > least).collect();
        heavy.sort_by(|&e, &f| part(f).total_cmp(&part(e)));
        let best = heavy.into_iter().find_map(|e| {
            let limit = part(e) / (1.0 + HEAVIER);
            let open = |&q: &usize| {
                let f = slots.expert_in[q];
                let gives = f != EMPTY && without[usize::from(f)] < limit && slots.may_lose(site, q);
                gives && slots.may_take(site, e, slots.device(q))
            };
            let key = |q: usize| {
                let (g, f) = (slots.device(q), slots.expert_in[q]);
                let more = self.loads.with_one_more[usize::from(e)] - self.loads.load_in[q];
                (without[usize::from(f)], self.loads.times[g] + more * self.loads.per_token[g])
            };
            let open = (0..slots.expert_in.len()).filter(open).map(|q| (key(q), q));
            let slot = open.reduce(|a, b| if b.0 < a.0 { b } else { a });
            slot.map(|(_, q)| (e, q))
        });
        best.is_some_and(|(e, slot)| self.make(Move::Put(slot, e)))
    }

    /// Powers of all times.
    fn total(&self) -> f64 {
        self.loads.times.iter().map(|&time| power(time)).sum()
    }

    /// Makes the step that relieves one of the slowest devices most for a copy that it brings; false where none is worth
    /// as much.
    fn relieve(&mut self, min_gain: f64) -> bool {
        let mut order: Vec<usize> = (0..self.loads.times.len()).collect();
        order.sort_by(|&g, &h| self.loads.times[h].total_cmp(&self.loads.times[g]));
        let fastest = &order[order.len() - (order.len() * QUARTERS).div_ceil(4)..];
        let mut best: Best = (self.total() * NORM * min_gain, None);
        let leaving = Leaving::of(self);
        for &slow in order.iter().take(SLOWEST) {
            if self.loads.times[slow] <= 1.0 {
                break;
            }
            self.look_for_swaps(slow, fastest, &mut best);
            self.look_per_copy(slow, &leaving, &mut best);
            if best.1.is_some() {
                break;
            }
        }
        best.1.is_some_and(|step| self.make(step))
    }

    /// Makes a step that is allowed, and follows.
    fn make(&mut self, step: Move) -> bool {
        self.slots.apply(step);
        let (slots, loads) = (&self.slots, &mut self.loads);
        let Move::Swap(p, q) = step else {
            let tokens = [self.seen, &self.tokens];
            *loads = Loads::of(self.site, tokens, slots, &self.running, loads.square);
            return true;
        };
        let (g, h) = (slots.device(p), slots.device(q));
        loads.load_in.swap(p, q);
        let moved = loads.load_in[q] - loads.load_in[p];
        loads.times[g] -= moved * loads.per_token[g];
        loads.times[h] += moved * loads.per_token[h];
        for (slot, device) in [(p, g), (q, h)] {
            let load: f64 = slots.of(device).map(|slot| slots.part(self.seen, slots.expert_in[slot])).sum();
            loads.plain[device] = load * self.site.time[device];
            loads.is_moved[slot] = one_if(slots.is_moved(slot, &self.running));
        }
        true
    }

    fn look_for_swaps(&mut self, slow: usize, fastest: &[usize], best: &mut Best) {
        let (slots, running) = (&self.slots, &self.running);
        let scan = &mut self.scan;
        scan.slot.clear();
        for &g in fastest.iter().filter(|&&g| g != slow) {
            let (begin, from) = (scan.slot.len(), slots.of(g));
            let rows = begin..begin + from.len();
            scan.slot.extend(from.clone());
            scan.time[rows.clone()].fill(self.loads.times[g]);
            scan.power[rows.clone()].fill(power(self.loads.times[g]));
            scan.per_token[rows.clone()].fill(self.loads.per_token[g]);
            scan.load[rows.clone()].copy_from_slice(&self.loads.load_in[from.clone()]);
            for (row, q) in rows.clone().zip(from) {
                let e = slots.expert_in[q];
                let new = running.lacks(e, slow);
                scan.comes[row] = one_if(new) - self.loads.is_moved[q];
            }
            scan.rows[g] = rows;
        }
        let count = scan.slot.len();
        // Nothing goes where there is no device.
        scan.time[count..].fill(f64::INFINITY);
        let least = scan.load[..count].iter().copied().fold(f64::INFINITY, f64::min);
        let mut barred = vec![];
        for p in slots.of(slow) {
            let a = slots.expert_in[p];
            // The least that an exchange can leave, if it brings one copy.
            let rest = self.loads.times[slow] - (self.loads.load_in[p] - least) * self.loads.per_token[slow];
            if power(self.loads.times[slow]) - power(rest) <= best.0 {
                continue;
            }
            scan.goes[..count].fill(one_if(a != EMPTY) - self.loads.is_moved[p]);
            let had = (a != EMPTY).then(|| running.devices(a).map(usize::from)).into_iter().flatten();
            for g in had {
                if g != slow && fastest.contains(&g) {
                    scan.goes[scan.rows[g].clone()].fill(-self.loads.is_moved[p]);
                }
            }
            loop {
                let worth =
                    look(scan, self.loads.load_in[p], self.loads.times[slow], self.loads.per_token[slow]);
                if worth <= best.0 {
                    break;
                }
                let row = scan.worth.iter().position(|&each| each >= worth).unwrap_or_default();
                let q = scan.slot[row];
                if slots.allows(self.site, Move::Swap(p, q)) {
                    *best = (worth, Some(Move::Swap(p, q)));
                    break;
                }
                // What is not allowed for this one may be for the next.
                scan.time[row] = f64::INFINITY;
                barred.push(row);
            }
            for row in barred.drain(..) {
                scan.time[row] = self.loads.times[slots.device(scan.slot[row])];
            }
        }
    }

    /// Looks at copies of what is on the slowest device in slots elsewhere, and of others there.
    ///
    /// That other copies of an expert get less when there is one more is left out, so that a step may turn out better.
    fn look_per_copy(&self, slow: usize, leaving: &Leaving, best: &mut Best) {
        let (slots, site, tokens) = (&self.slots, self.site, &self.tokens[..]);
        let is_moved = |e: u16, g: usize| one_if(self.running.lacks(e, g));
        let (t, now) = (self.loads.per_token[slow], self.loads.times[slow]);
        let now_power = power(now);
        // Of everything on the slowest device: what one more copy would take of it, and relieve.
        let mut here: Vec<(u16, f64, f64)> = slots
            .of(slow)
            .map(|p| (slots.expert_in[p], self.loads.load_in[p]))
            .filter(|&(e, _)| e != EMPTY)
            .map(|(e, load)| (e, self.loads.with_one_more[usize::from(e)], load))
            .map(|(e, more, load)| (e, more, (load - more) * t))
            .collect();
        here.sort_by(|a, b| b.2.total_cmp(&a.2));
        for (q, &gone) in slots.expert_in.iter().enumerate().filter(|(q, _)| slots.may_lose(site, *q)) {
            let g = slots.device(q);
            let (beside, also) = leaving.to_others(self, q, slow);
            let less = is_moved(gone, g);
            let rest = self.loads.times[g] - self.loads.load_in[q] * self.loads.per_token[g];
            // What is left of it gets no heavier than what comes.
            let offer = |e: u16, gain: f64, best: &mut Best| {
                let worth = gain * per_copy(is_moved(e, g) - less);
                let fits = || slots.may_take(site, e, g) && slots.part(tokens, e) >= leaving.without[q];
                if worth > best.0 && fits() {
                    *best = (worth, Some(Move::Put(q, e)));
                }
            };
            // What is gained at the most, were what comes light.
            let (was, light) = (power(self.loads.times[g]), power(rest));
            if g == slow {
                if (now_power - light - beside) * per_copy(1.0 - less) <= best.0 {
                    continue;
                }
                for (e, &more) in (0..).zip(&self.loads.with_one_more) {
                    let gain = now_power - power(rest + more * t) - beside;
                    if gain * per_copy(1.0 - less) > best.0 {
                        offer(e, gain, best);
                    }
                }
                continue;
            }
            for &(e, more, relief) in &here {
                let relieved = now_power - power(now - relief + also) - beside + was;
                // No step relieves more for a copy, nor do those behind.
                if less == 0.0 && relieved - light <= best.0 {
                    break;
                }
                let gain = relieved - power(rest + more * self.loads.per_token[g]);
                if gain > 0.0 {
                    offer(e, gain, best);
                }
            }
        }
    }
}

/// What happens to others when the content of a slot leaves it.
struct Leaving {
    /// Tokens of every other copy then `[P]`.
    without: Vec<f64>,
    /// What each of them has to do more `[P]`.
    more: Vec<f64>,
    /// What that adds to the power of the slot's own device, were it another's `[P]`, and to those of all `[E]`.
    lifted: Vec<f64>,
    all: Vec<f64>,
}

impl Leaving {
    fn of(steps: &Steps<'_>) -> Self {
        let (slots, loads) = (&steps.slots, &steps.loads);
        let [mut without, mut more, mut lifted] = std::array::from_fn(|_| vec![0.0; slots.expert_in.len()]);
        let mut all = vec![0.0; steps.tokens.len()];
        for (slot, &e) in slots.expert_in.iter().enumerate().filter(|(_, e)| slots.copies(**e) > 1) {
            let (tokens, g) =
                (steps.tokens[usize::from(e)] / f64::from(slots.copies(e) - 1), slots.device(slot));
            without[slot] = tokens;
            more[slot] = tokens + loads.square * tokens * tokens - loads.load_in[slot];
            lifted[slot] = power(loads.times[g] + more[slot] * loads.per_token[g]) - power(loads.times[g]);
            all[usize::from(e)] += lifted[slot];
        }
        Self { without, more, lifted, all }
    }

    /// What the leave of a slot's content adds to the powers of devices other than `slow`, and to the time of that one.
    fn to_others(&self, steps: &Steps<'_>, slot: usize, slow: usize) -> (f64, f64) {
        let (slots, gone) = (&steps.slots, steps.slots.expert_in[slot]);
        if gone == EMPTY {
            return (0.0, 0.0);
        }
        let beside = self.all[usize::from(gone)] - self.lifted[slot];
        let other = (slots.device(slot) != slow && slots.holds(gone, slow))
            .then(|| slots.of(slow).find(|&p| slots.expert_in[p] == gone))
            .flatten();
        match other {
            Some(p) => (beside - self.lifted[p], self.more[slot] * steps.loads.per_token[slow]),
            None => (beside, 0.0),
        }
    }
}
