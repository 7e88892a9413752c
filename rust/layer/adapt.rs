//! From running slots to better ones on a single load, by few copies that are brought.
//!
//! What a balancer does that is called again and again while it serves: it starts where it is, relieves the slowest
//! device by the step that gains most for a copy brought, and notes after every step what was brought and how slow the
//! slowest device still is. A [budget](super::budget) is then spent on the steps of those layers where it gains most.
//! [`super::descend`] does the same by all terms of a cost; on one load, exchanges of a slot with all others at once take
//! microseconds.

use super::budget::{Rules, Way, choose};
use super::construct::{NoSlot, check, complete, fill};
use super::{EMPTY, Move, Site, Slots};
use crate::error::{Error, Result};

/// How far running slots are changed.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Which steps are taken in the end.
    pub rules: Rules,
    /// Steps of a layer at the most, for each of its devices.
    pub steps: usize,
    /// Trials of the polish where nothing runs yet.
    pub trials: usize,
    /// Whether empty slots are filled, whatever that brings.
    pub full: bool,
}

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
/// Devices that are looked at, the slowest first, until a step is found.
const SLOWEST: usize = 3;
/// The slowest exchange slots with the fastest, of all devices so many quarters.
const QUARTERS: usize = 3;

/// Changes the contents of running slots `[L][P]` on loads `[L, E]`, and says what every layer was and became. Experts
/// without a slot get one and empty slots are
/// filled, whatever they bring; what stays on a device keeps its slot.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn adapt_layers(
    load: &[f64],
    experts: usize,
    sites: &[Site],
    contents: &mut [Vec<u16>],
    effort: Effort,
) -> Result<Vec<[Way; 2]>> {
    check(load, experts, sites)?;
    let mut paths = Vec::with_capacity(sites.len());
    for (layer, (site, load)) in sites.iter().zip(load.chunks_exact(experts)).enumerate() {
        let path = improve(site, load, &contents[layer], effort);
        paths.push(path.map_err(|NoSlot(expert)| Error::NoSlot { layer, expert })?);
    }
    let (ways, mut then): (Vec<Vec<Way>>, Vec<Vec<Vec<u16>>>) = paths.into_iter().unzip();
    let mut changes = Vec::with_capacity(sites.len());
    for (l, at) in choose(&ways, effort.rules).into_iter().enumerate() {
        contents[l] = keep_slots(&contents[l], &then[l].swap_remove(at), &sites[l].capacity);
        changes.push([ways[l][0], ways[l][at]]);
    }
    Ok(changes)
}

/// The ways of a layer: the start, and what is so after every step; and the contents of slots `[P]` then.
type Path = (Vec<Way>, Vec<Vec<u16>>);

/// Goes from running slots as far as steps gain.
fn improve(site: &Site, load: &[f64], contents: &[u16], effort: Effort) -> std::result::Result<Path, NoSlot> {
    let running = Slots::new(&site.capacity, load.len(), contents);
    if running.expert_in.iter().all(|&e| e == EMPTY) {
        return packed(site, load, effort);
    }
    let mut slots = running.clone();
    complete(&mut slots, site, load, effort.full)?;
    let mut steps = Steps::new(slots, running, site, load);
    steps.note();
    let mut left = effort.steps * site.devices();
    steps.relieve(COARSE, &mut left);
    while left > 0 && steps.copy_heaviest() {
        steps.note();
        left -= 1;
    }
    steps.relieve(FINE, &mut left);
    Ok((steps.ways, steps.contents))
}

/// Packs a layer where nothing is yet: there is nowhere to go from there.
fn packed(site: &Site, load: &[f64], effort: Effort) -> std::result::Result<Path, NoSlot> {
    let mut slots = fill(site, load, effort.trials)?;
    complete(&mut slots, site, load, effort.full)?;
    let moves = slots.expert_in.iter().filter(|&&e| e != EMPTY).count();
    let slowest = slots.times_and_loads(site, load).0.into_iter().fold(0.0, f64::max);
    let way = Way { moves, slowest, cost: slowest };
    Ok((vec![way], vec![slots.expert_in]))
}

/// A layer and the steps that were taken.
struct Steps<'a> {
    slots: Slots,
    /// What ran at the start.
    running: Slots,
    site: &'a Site,
    /// Tokens of every expert `[E]`.
    tokens: &'a [f64],
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
    is_moved: Vec<f64>,
    /// What the square of a slot's load counts.
    square: f64,
    scan: Scan,
    ways: Vec<Way>,
    contents: Vec<Vec<u16>>,
}

/// What the best step so far is worth, and the step.
type Best = (f64, Option<Move>);

/// What a gain counts for each copy that it brings.
#[inline(always)]
fn for_copies(brings: f64) -> f64 {
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
    let (comes, goes, worth) = (&scan.comes[..row], &scan.goes[..row], &mut scan.worth[..row]);
    let now = power(before);
    for q in 0..row {
        let moved = given - load[q];
        let (here, there) = (before - moved * per_token, time[q] + moved * per[q]);
        let gain = (now - power(here)) + (powers[q] - power(there));
        worth[q] = gain * for_copies(comes[q] + goes[q]);
    }
    let mut most = [0.0; LANES];
    for worth in worth.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            most[lane] = if worth[lane] > most[lane] { worth[lane] } else { most[lane] };
        }
    }
    most.into_iter().fold(0.0, f64::max)
}

impl<'a> Steps<'a> {
    fn new(slots: Slots, running: Slots, site: &'a Site, tokens: &'a [f64]) -> Self {
        let total: f64 = tokens.iter().sum();
        let (count, devices) = (slots.expert_in.len(), site.devices());
        let square = if total > 0.0 { UNSTEADY * count as f64 / total } else { 0.0 };
        let [times, plain, per_token, load_in, with_one_more] = std::array::from_fn(|_| vec![]);
        let (scan, is_moved) = (Scan::new(count, devices), vec![0.0; count]);
        let (ways, contents, mean) = (vec![], vec![], 0.0);
        let mut steps = Self {
            slots,
            running,
            site,
            tokens,
            times,
            plain,
            mean,
            per_token,
            load_in,
            with_one_more,
            is_moved,
            square,
            scan,
            ways,
            contents,
        };
        steps.times_and_loads();
        steps
    }

    /// Follows the slots, whatever has become of them.
    fn times_and_loads(&mut self) {
        let (slots, site, square) = (&self.slots, self.site, self.square);
        let counts = |load: f64| load + square * load * load;
        (self.plain, self.load_in) = slots.times_and_loads(site, self.tokens);
        self.load_in.iter_mut().for_each(|load| *load = counts(*load));
        self.mean = self.load_in.iter().sum::<f64>() / site.rate();
        let unit = if self.mean > 0.0 { 1.0 / self.mean } else { 0.0 };
        self.per_token = site.time.iter().map(|time| time * unit).collect();
        let load = |g: usize| self.load_in[slots.of(g)].iter().sum::<f64>();
        self.times = (0..site.devices()).map(|g| load(g) * self.per_token[g]).collect();
        let copies = slots.copies.iter().map(|&copies| f64::from(copies + 1));
        self.with_one_more =
            self.tokens.iter().zip(copies).map(|(load, copies)| counts(load / copies)).collect();
        for slot in 0..self.is_moved.len() {
            let is_new = self.is_new(self.slots.expert_in[slot], self.slots.device(slot));
            self.is_moved[slot] = f64::from(u8::from(is_new));
        }
    }

    fn is_new(&self, expert: u16, device: usize) -> bool {
        expert != EMPTY && !self.running.holds(expert, device)
    }

    fn note(&mut self) {
        let slowest = self.plain.iter().copied().fold(0.0, f64::max);
        let moves = self.is_moved.iter().sum::<f64>() as usize;
        let mut norm = self.total() / self.times.len() as f64;
        for _ in 0..DOUBLINGS {
            norm = norm.sqrt();
        }
        self.ways.push(Way { moves, slowest, cost: norm * self.mean });
        self.contents.push(self.slots.expert_in.clone());
    }

    /// Gives the expert with the heaviest copies one more, in place of one whose expert has the lightest without it; false
    /// where none is heavier by enough.
    fn copy_heaviest(&mut self) -> bool {
        let (slots, site, tokens) = (&self.slots, self.site, self.tokens);
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
            let most = part(e) / (1.0 + HEAVIER);
            let open = |&q: &usize| {
                let f = slots.expert_in[q];
                f != EMPTY && without[usize::from(f)] < most && slots.takes(site, e, slots.device(q))
            };
            let key = |q: usize| {
                let (g, f) = (slots.device(q), slots.expert_in[q]);
                let more = self.with_one_more[usize::from(e)] - self.load_in[q];
                (without[usize::from(f)], self.times[g] + more * self.per_token[g])
            };
            let open = (0..slots.expert_in.len()).filter(open).map(|q| (key(q), q));
            let slot = open.reduce(|a, b| if b.0 < a.0 { b } else { a });
            slot.map(|(_, q)| (e, q))
        });
        let Some((e, slot)) = best else { return false };
        self.put(slot, e);
        true
    }

    fn put(&mut self, slot: usize, expert: u16) {
        self.slots.put(slot, expert);
        self.times_and_loads();
    }

    /// Powers of all times.
    fn total(&self) -> f64 {
        self.times.iter().map(|&time| power(time)).sum()
    }

    /// Makes steps that are worth the price, and notes each.
    fn relieve(&mut self, price: f64, left: &mut usize) {
        while *left > 0 && self.step(price) {
            self.note();
            *left -= 1;
        }
    }

    /// Makes the step that relieves one of the slowest devices most for a copy that it brings; false where none is worth
    /// the price.
    fn step(&mut self, price: f64) -> bool {
        let mut order: Vec<usize> = (0..self.times.len()).collect();
        order.sort_by(|&g, &h| self.times[h].total_cmp(&self.times[g]));
        let fastest = &order[order.len() - (order.len() * QUARTERS).div_ceil(4)..];
        let mut best: Best = (self.total() * NORM * price, None);
        for &slow in order.iter().take(SLOWEST) {
            if self.times[slow] <= 1.0 {
                break;
            }
            self.look_for_copies(slow, &mut best);
            self.look_for_swaps(slow, fastest, &mut best);
            if best.1.is_some() {
                break;
            }
        }
        match best.1 {
            Some(Move::Swap(p, q)) => self.swap(p, q),
            Some(Move::Put(q, e)) => self.put(q, e),
            None => return false,
        }
        true
    }

    fn swap(&mut self, p: usize, q: usize) {
        self.slots.apply(Move::Swap(p, q));
        let slots = &self.slots;
        let (g, h) = (slots.device(p), slots.device(q));
        self.load_in.swap(p, q);
        let moved = self.load_in[q] - self.load_in[p];
        self.times[g] -= moved * self.per_token[g];
        self.times[h] += moved * self.per_token[h];
        for (slot, device) in [(p, g), (q, h)] {
            let load: f64 = slots.of(device).map(|slot| slots.part(self.tokens, slots.expert_in[slot])).sum();
            self.plain[device] = load * self.site.time[device];
            self.is_moved[slot] = f64::from(u8::from(self.is_new(slots.expert_in[slot], device)));
        }
    }

    fn look_for_swaps(&mut self, slow: usize, fastest: &[usize], best: &mut Best) {
        let (slots, running) = (&self.slots, &self.running);
        let scan = &mut self.scan;
        scan.slot.clear();
        for &g in fastest.iter().filter(|&&g| g != slow) {
            let (begin, of) = (scan.slot.len(), slots.of(g));
            let rows = begin..begin + of.len();
            scan.slot.extend(of.clone());
            scan.time[rows.clone()].fill(self.times[g]);
            scan.power[rows.clone()].fill(power(self.times[g]));
            scan.per_token[rows.clone()].fill(self.per_token[g]);
            scan.load[rows.clone()].copy_from_slice(&self.load_in[of.clone()]);
            for (row, q) in rows.clone().zip(of) {
                let e = slots.expert_in[q];
                let new = e != EMPTY && !running.holds(e, slow);
                scan.comes[row] = f64::from(u8::from(new)) - self.is_moved[q];
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
            let rest = self.times[slow] - (self.load_in[p] - least) * self.per_token[slow];
            if power(self.times[slow]) - power(rest) <= best.0 {
                continue;
            }
            scan.goes[..count].fill(f64::from(u8::from(a != EMPTY)) - self.is_moved[p]);
            let had = (a != EMPTY).then(|| running.devices(a).map(usize::from)).into_iter().flatten();
            for g in had {
                if g != slow && fastest.contains(&g) {
                    scan.goes[scan.rows[g].clone()].fill(-self.is_moved[p]);
                }
            }
            loop {
                let worth = scan.look(self.load_in[p], self.times[slow], self.per_token[slow]);
                if worth <= best.0 {
                    break;
                }
                let row = scan.worth.iter().position(|&of| of >= worth).unwrap_or_default();
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
                scan.time[row] = self.times[slots.device(scan.slot[row])];
            }
        }
    }

    /// Looks at copies of what is on the slowest device in slots elsewhere, and of others there.
    ///
    /// That other copies of an expert get less when there is one more is left out, so that a step may turn out better.
    fn look_for_copies(&self, slow: usize, best: &mut Best) {
        let (slots, site, tokens) = (&self.slots, self.site, self.tokens);
        let is_moved = |e: u16, g: usize| f64::from(u8::from(self.is_new(e, g)));
        let (t, now) = (self.per_token[slow], self.times[slow]);
        let now_power = power(now);
        // Of everything on the slowest device: what one more copy would take of it, and relieve.
        let mut here: Vec<(u16, f64, f64)> = slots
            .of(slow)
            .map(|p| (slots.expert_in[p], self.load_in[p]))
            .filter(|&(e, _)| e != EMPTY)
            .map(|(e, load)| (e, self.with_one_more[usize::from(e)], load))
            .map(|(e, more, load)| (e, more, (load - more) * t))
            .collect();
        here.sort_by(|a, b| b.2.total_cmp(&a.2));
        for (q, &gone) in slots.expert_in.iter().enumerate().filter(|(_, gone)| slots.copies(**gone) != 1) {
            let g = slots.device(q);
            let (without, beside, also) = self.leaves(q, slow);
            if beside >= now_power {
                continue;
            }
            let less = is_moved(gone, g);
            let rest = self.times[g] - self.load_in[q] * self.per_token[g];
            // What is left of it gets no heavier than what comes.
            let offer = |e: u16, gain: f64, best: &mut Best| {
                if slots.takes(site, e, g) && slots.part(tokens, e) >= without {
                    let worth = gain * for_copies(is_moved(e, g) - less);
                    if worth > best.0 {
                        *best = (worth, Some(Move::Put(q, e)));
                    }
                }
            };
            if g == slow {
                for (e, &more) in (0..).zip(&self.with_one_more) {
                    let gain = now_power - power(rest + more * t) - beside;
                    if gain * for_copies(1.0 - less) > best.0 {
                        offer(e, gain, best);
                    }
                }
                continue;
            }
            let was = power(self.times[g]);
            for &(e, more, relief) in &here {
                let relieved = now_power - power(now - relief + also) - beside;
                // No step relieves more for a copy, nor do those behind.
                if less == 0.0 && relieved + was <= best.0 {
                    break;
                }
                let gain = relieved + was - power(rest + more * self.per_token[g]);
                if gain > 0.0 {
                    offer(e, gain, best);
                }
            }
        }
    }

    /// What each other copy serves when a slot's content leaves, what that adds to the powers of devices other than
    /// `slow`, and to the time of that one.
    fn leaves(&self, q: usize, slow: usize) -> (f64, f64, f64) {
        let (slots, gone) = (&self.slots, self.slots.expert_in[q]);
        if gone == EMPTY {
            return (0.0, 0.0, 0.0);
        }
        let without = self.tokens[usize::from(gone)] / f64::from(slots.copies(gone) - 1);
        let more = without + self.square * without * without - self.load_in[q];
        let (mut beside, mut also) = (0.0, 0.0);
        for h in slots.devices(gone).map(usize::from).filter(|&h| h != slots.device(q)) {
            if h == slow {
                also = more * self.per_token[slow];
            } else {
                beside += power(self.times[h] + more * self.per_token[h]) - power(self.times[h]);
            }
        }
        (without, beside, also)
    }
}

/// Orders new contents so that what stays on a device keeps its slot.
fn keep_slots(before: &[u16], now: &[u16], capacity: &[usize]) -> Vec<u16> {
    if before.iter().all(|&e| e == EMPTY) {
        return now.to_vec();
    }
    let mut ordered = vec![EMPTY; now.len()];
    let mut first = 0;
    for &slots in capacity {
        let of = first..first + slots;
        first += slots;
        let (old, ordered) = (&before[of.clone()], &mut ordered[of.clone()]);
        let mut come = Vec::new();
        for &e in now[of].iter().filter(|&&e| e != EMPTY) {
            match old.iter().position(|&of| of == e) {
                Some(slot) => ordered[slot] = e,
                None => come.push(e),
            }
        }
        let mut come = come.into_iter();
        for slot in ordered.iter_mut().filter(|slot| **slot == EMPTY) {
            *slot = come.next().unwrap_or(EMPTY);
        }
    }
    ordered
}
