//! What moves change in windows: loads of devices, their powers, and exchanges that are tried on them.
//!
//! As in [`crate::layer::terms`], the norm of order P over devices stands for the maximum, and its tangent at the
//! present placement for the norm. What is given up for speed: sums are of floats, not of whole numbers, and an
//! expert's own variance is the same in every window. A trial reads two rows of devices and two of experts, and writes
//! nothing.

use super::columns::{Columns, LANES, Lanes};
use crate::layer::EMPTY;
use crate::layer::anneal::accepts;
use crate::layer::construct::draft::Draft;
use crate::random::{Random, scale};

/// Order of the norm.
const ORDER: f32 = 8.0;
/// Every so many proposals put another copy into a slot; the others exchange two.
const PUT: u64 = 16;
/// A load of more times the mean counts as this.
const MOST: f32 = 128.0;

/// Contents of slots, and the loads that follow.
#[derive(Debug)]
pub(super) struct State<'a> {
    pub(super) draft: Draft<'a>,
    columns: &'a Columns,
    device_of: Vec<u16>,
    /// Time of a device per token `[D]`.
    time: Vec<f32>,
    /// What a copy serves of its expert `[E + 1]`.
    part: Vec<f32>,
    /// Loads of devices, in time `[D, chunks]`.
    load: Vec<Lanes>,
    /// Own variances of devices, and their roots `[D]`.
    own: Vec<f32>,
    deviation: Vec<f32>,
    /// Powers of loads and deviations `[D, chunks]`.
    power: Vec<Lanes>,
    /// Slope of a window's norm in its powers, times the window's price `[chunks]`.
    slope: Vec<Lanes>,
    /// Where a copy costs `price`: where it was not at the start.
    held: Vec<bool>,
    price: f32,
    /// Devices that a copy touches, and their loads `[touched, chunks]`.
    touched: Vec<Touched>,
    rows: Vec<Lanes>,
}

#[derive(Debug, Clone, Copy)]
struct Touched {
    device: usize,
    own: f32,
    deviation: f32,
}

#[inline(always)]
fn raised(x: f32) -> f32 {
    let x = if x < MOST { x } else { MOST };
    let square = x * x;
    let fourth = square * square;
    fourth * fourth
}

/// Sum of lanes, in an order that no instruction set changes.
#[inline(always)]
fn total(lanes: Lanes) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Root of a variance, which rounding may have left below zero.
#[inline(always)]
fn root(own: f32) -> f32 {
    (if own > 0.0 { own } else { 0.0 }).sqrt()
}

impl<'a> State<'a> {
    pub(super) fn new(draft: Draft<'a>, columns: &'a Columns) -> Self {
        let (devices, chunks) = (draft.site.room.len(), columns.chunks);
        let device_of = (0..devices).flat_map(|g| draft.slots(g).map(move |_| g as u16)).collect();
        let rows = || vec![[0.0; LANES]; devices * chunks];
        let mut state = Self {
            columns,
            device_of,
            time: draft.site.time.iter().map(|&time| time as f32).collect(),
            part: vec![0.0; draft.load.len() + 1],
            load: rows(),
            own: vec![0.0; devices],
            deviation: vec![0.0; devices],
            power: rows(),
            slope: vec![[0.0; LANES]; chunks],
            held: vec![],
            price: 0.0,
            touched: vec![],
            rows: rows(),
            draft,
        };
        state.refresh();
        state
    }

    /// From here on a copy costs `price` on a device that does not hold its expert now.
    pub(super) fn hold(&mut self, price: f32) {
        let devices = self.time.len();
        self.held = vec![false; self.draft.load.len() * devices];
        self.price = price;
        for (&expert, &device) in self.draft.expert_in.iter().zip(&self.device_of) {
            if expert != EMPTY {
                self.held[usize::from(expert) * devices + usize::from(device)] = true;
            }
        }
    }

    /// Row of an expert's loads, or of nothing's.
    #[inline(always)]
    fn row(&self, expert: u16) -> usize {
        usize::from(expert).min(self.part.len() - 1)
    }

    /// Cost of a copy on a device.
    #[inline(always)]
    fn toll(&self, expert: u16, device: usize) -> f32 {
        let is_free = self.held.is_empty()
            || expert == EMPTY
            || self.held[usize::from(expert) * self.time.len() + device];
        if is_free { 0.0 } else { self.price }
    }

    /// Counts everything anew, from what is in the slots.
    pub(super) fn refresh(&mut self) {
        for (part, &copies) in self.part.iter_mut().zip(&self.draft.copies) {
            *part = if copies > 0 { 1.0 / copies as f32 } else { 0.0 };
        }
        refreshed(self);
    }

    /// The mean over windows of the slowest device, in parts of the mean, and what copies cost that were brought.
    pub(super) fn cost(&self) -> f64 {
        let brought: f64 = (0..self.device_of.len())
            .map(|p| f64::from(self.toll(self.draft.expert_in[p], usize::from(self.device_of[p]))))
            .sum();
        slowest(self) + brought
    }

    /// What a device's cost rises by if a copy of an expert comes, of all devices that are open, the least and where:
    /// by powers, times the windows' prices; `part` is what the copy serves.
    pub(super) fn best_device(&self, expert: u16, part: f32, open: &[bool]) -> Option<usize> {
        entering(self, usize::from(expert), part, open)
    }

    /// Puts a copy where there was nothing.
    pub(super) fn enter(&mut self, slot: usize, device: usize, expert: u16, part: f32) {
        self.draft.put(slot, device, expert);
        entered(self, device, usize::from(expert), part);
    }

    /// The median of what exchanges change, up or down.
    pub(super) fn typical_change(&mut self, random: &mut Random) -> f64 {
        let mut changes = sampled(self, random);
        changes.retain(|change| *change != 0.0);
        changes.sort_by(f32::total_cmp);
        changes.get(changes.len() / 2).map_or(0.0, |&change| f64::from(change))
    }

    /// Makes trials at one temperature.
    pub(super) fn search(&mut self, trials: usize, temperature: f64, random: &mut Random) {
        tried(self, trials, temperature, random);
        self.refresh();
    }

    /// Whether two slots may exchange what they hold.
    #[inline(always)]
    fn may_swap(&self, [p, q]: [usize; 2], [g, h]: [usize; 2]) -> bool {
        let (a, b) = (self.draft.expert_in[p], self.draft.expert_in[q]);
        g != h
            && a != b
            && (a == EMPTY || self.draft.takes(a, h))
            && (b == EMPTY || self.draft.takes(b, g))
            && self.draft.releases(p, g)
            && self.draft.releases(q, h)
    }

    /// What an exchange of two slots changes, and what the devices' own variances then are.
    #[inline(always)]
    fn swap_change(&self, [p, q]: [usize; 2], [g, h]: [usize; 2]) -> (f32, [f32; 2]) {
        let (a, b) = (self.draft.expert_in[p], self.draft.expert_in[q]);
        let (row_a, row_b) = (self.row(a), self.row(b));
        let (part_a, part_b) = (self.part[row_a], self.part[row_b]);
        let (time_g, time_h) = (self.time[g], self.time[h]);
        let moved = self.columns.own[row_b] * (part_b * part_b) - self.columns.own[row_a] * (part_a * part_a);
        let own = [self.own[g] + moved * (time_g * time_g), self.own[h] - moved * (time_h * time_h)];
        let (deviation_g, deviation_h) = (root(own[0]), root(own[1]));
        let chunks = self.columns.chunks;
        let (load_g, load_h) = (&self.load[g * chunks..][..chunks], &self.load[h * chunks..][..chunks]);
        let (power_g, power_h) = (&self.power[g * chunks..][..chunks], &self.power[h * chunks..][..chunks]);
        let (of_a, of_b) = (self.columns.of(row_a), self.columns.of(row_b));
        let slope = &self.slope[..chunks];
        let mut sums = [0.0; LANES];
        for at in 0..chunks {
            for k in 0..LANES {
                let moved = of_b[at][k] * part_b - of_a[at][k] * part_a;
                let here = raised(load_g[at][k] + moved * time_g + deviation_g);
                let there = raised(load_h[at][k] - moved * time_h + deviation_h);
                sums[k] += ((here + there) - (power_g[at][k] + power_h[at][k])) * slope[at][k];
            }
        }
        let tolls = (self.toll(a, h) + self.toll(b, g)) - (self.toll(a, g) + self.toll(b, h));
        (total(sums) + tolls, own)
    }

    #[inline(always)]
    fn swap(&mut self, [p, q]: [usize; 2], [g, h]: [usize; 2], own: [f32; 2]) {
        let (a, b) = (self.draft.expert_in[p], self.draft.expert_in[q]);
        let (row_a, row_b) = (self.row(a), self.row(b));
        let (part_a, part_b) = (self.part[row_a], self.part[row_b]);
        let chunks = self.columns.chunks;
        for (device, own, sign) in [(g, own[0], 1.0), (h, own[1], -1.0)] {
            let time = sign * self.time[device];
            let (of_a, of_b) = (self.columns.of(row_a), self.columns.of(row_b));
            let load = &mut self.load[device * chunks..][..chunks];
            for at in 0..chunks {
                for k in 0..LANES {
                    load[at][k] += (of_b[at][k] * part_b - of_a[at][k] * part_a) * time;
                }
            }
            self.own[device] = own;
            self.deviation[device] = root(own);
            self.raise(device);
        }
        self.draft.put(p, g, EMPTY);
        self.draft.put(q, h, a);
        self.draft.put(p, g, b);
        self.slopes();
    }

    /// Whether a slot's content may make room for another copy of an expert.
    #[inline(always)]
    fn may_put(&self, p: usize, g: usize, expert: u16) -> bool {
        let a = self.draft.expert_in[p];
        self.draft.takes(expert, g)
            && self.draft.releases(p, g)
            && (a == EMPTY || self.draft.copies[usize::from(a)] > 1)
    }

    /// What another copy in a slot changes; loads of the devices that feel it are left in `rows`.
    #[inline(always)]
    fn put_change(&mut self, p: usize, g: usize, expert: u16) -> f32 {
        let a = self.draft.expert_in[p];
        let (row_a, row_b) = (self.row(a), self.row(expert));
        let copies = |row: usize, more: i32| match self.draft.copies.get(row) {
            Some(&copies) if copies as i32 + more > 0 => 1.0 / (copies as i32 + more) as f32,
            _ => 0.0,
        };
        let (before_a, before_b) = (self.part[row_a], self.part[row_b]);
        let (after_a, after_b) = (copies(row_a, -1), copies(row_b, 1));
        let (own_a, own_b) = (self.columns.own[row_a], self.columns.own[row_b]);
        let (of_a, of_b) = (self.columns.of(row_a), self.columns.of(row_b));
        let chunks = self.columns.chunks;
        self.touched.clear();
        let mut sums = [0.0; LANES];
        for device in 0..self.time.len() {
            let has_a = a != EMPTY && self.draft.holds(a, device);
            let has_b = self.draft.holds(expert, device);
            if !has_a && !has_b && device != g {
                continue;
            }
            let square = |before: f32, after: f32| after * after - before * before;
            let (mut less, mut more, mut own) = (0.0, 0.0, 0.0);
            if has_a {
                let after = if device == g { 0.0 } else { after_a };
                less = after - before_a;
                own += square(before_a, after) * own_a;
            }
            if has_b || device == g {
                let before = if device == g { 0.0 } else { before_b };
                more = after_b - before;
                own += square(before, after_b) * own_b;
            }
            let time = self.time[device];
            let own = self.own[device] + own * (time * time);
            let deviation = root(own);
            let to = &mut self.rows[self.touched.len() * chunks..][..chunks];
            let load = &self.load[device * chunks..][..chunks];
            let power = &self.power[device * chunks..][..chunks];
            let slope = &self.slope[..chunks];
            for at in 0..chunks {
                for k in 0..LANES {
                    let now = load[at][k] + (of_a[at][k] * less + of_b[at][k] * more) * time;
                    to[at][k] = now;
                    sums[k] += (raised(now + deviation) - power[at][k]) * slope[at][k];
                }
            }
            self.touched.push(Touched { device, own, deviation });
        }
        total(sums) + (self.toll(expert, g) - self.toll(a, g))
    }

    /// Makes the move that [`State::put_change`] was last asked about.
    #[inline(always)]
    fn put(&mut self, p: usize, g: usize, expert: u16) {
        let chunks = self.columns.chunks;
        for i in 0..self.touched.len() {
            let Touched { device, own, deviation } = self.touched[i];
            self.load[device * chunks..][..chunks].copy_from_slice(&self.rows[i * chunks..][..chunks]);
            (self.own[device], self.deviation[device]) = (own, deviation);
            self.raise(device);
        }
        let a = self.draft.expert_in[p];
        self.draft.put(p, g, expert);
        for e in [a, expert] {
            if e != EMPTY {
                self.part[usize::from(e)] = 1.0 / self.draft.copies[usize::from(e)].max(1) as f32;
            }
        }
        self.slopes();
    }

    /// Powers of a device's loads.
    #[inline(always)]
    fn raise(&mut self, device: usize) {
        let (chunks, deviation) = (self.columns.chunks, self.deviation[device]);
        let load = &self.load[device * chunks..][..chunks];
        let power = &mut self.power[device * chunks..][..chunks];
        for at in 0..chunks {
            for k in 0..LANES {
                power[at][k] = raised(load[at][k] + deviation);
            }
        }
    }

    /// Slopes of the windows' norms: with s the sum of powers, price * s^(1/p) / (p * s).
    #[inline(always)]
    fn slopes(&mut self) {
        let chunks = self.columns.chunks;
        for at in 0..chunks {
            let mut sums = [0.0; LANES];
            for power in self.power.chunks_exact(chunks) {
                for k in 0..LANES {
                    sums[k] += power[at][k];
                }
            }
            let price = &self.columns.price[at];
            for k in 0..LANES {
                let norm = sums[k].sqrt().sqrt().sqrt() * price[k];
                self.slope[at][k] = if sums[k] > 0.0 { norm / (ORDER * sums[k]) } else { 0.0 };
            }
        }
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn refreshed(state: &mut State<'_>) {
    let chunks = state.columns.chunks;
    state.load.fill([0.0; LANES]);
    state.own.fill(0.0);
    for p in 0..state.device_of.len() {
        let expert = state.draft.expert_in[p];
        if expert == EMPTY {
            continue;
        }
        let (row, device) = (usize::from(expert), usize::from(state.device_of[p]));
        let part = state.part[row] * state.time[device];
        state.own[device] += state.columns.own[row] * (part * part);
        let load = &mut state.load[device * chunks..][..chunks];
        let of = state.columns.of(row);
        for at in 0..chunks {
            for k in 0..LANES {
                load[at][k] += of[at][k] * part;
            }
        }
    }
    for device in 0..state.time.len() {
        state.deviation[device] = root(state.own[device]);
        state.raise(device);
    }
    state.slopes();
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn slowest(state: &State<'_>) -> f64 {
    let chunks = state.columns.chunks;
    let mut cost = 0.0;
    for at in 0..chunks {
        let mut most = [0.0f32; LANES];
        for load in state.load.chunks_exact(chunks) {
            for k in 0..LANES {
                most[k] = if load[at][k] > most[k] { load[at][k] } else { most[k] };
            }
        }
        for k in 0..LANES {
            cost += f64::from(most[k]) * f64::from(state.columns.price[at][k]);
        }
    }
    cost
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn entering(state: &State<'_>, expert: usize, part: f32, open: &[bool]) -> Option<usize> {
    let chunks = state.columns.chunks;
    let (of, price) = (state.columns.of(expert), &state.columns.price[..chunks]);
    let mut best = (f32::INFINITY, None);
    for device in 0..open.len() {
        if !open[device] || !state.draft.takes(expert as u16, device) {
            continue;
        }
        let part = part * state.time[device];
        let deviation = root(state.own[device] + state.columns.own[expert] * (part * part));
        let load = &state.load[device * chunks..][..chunks];
        let power = &state.power[device * chunks..][..chunks];
        let mut sums = [0.0; LANES];
        for at in 0..chunks {
            for k in 0..LANES {
                sums[k] += (raised(load[at][k] + of[at][k] * part + deviation) - power[at][k]) * price[at][k];
            }
        }
        let rise = total(sums);
        if rise < best.0 {
            best = (rise, Some(device));
        }
    }
    best.1
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn entered(state: &mut State<'_>, device: usize, expert: usize, part: f32) {
    let chunks = state.columns.chunks;
    let part = part * state.time[device];
    state.own[device] += state.columns.own[expert] * (part * part);
    state.deviation[device] = root(state.own[device]);
    let load = &mut state.load[device * chunks..][..chunks];
    let of = state.columns.of(expert);
    for at in 0..chunks {
        for k in 0..LANES {
            load[at][k] += of[at][k] * part;
        }
    }
    state.raise(device);
}

/// Proposals that are looked at to find the typical change.
const SAMPLE: usize = 64;

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn sampled(state: &mut State<'_>, random: &mut Random) -> Vec<f32> {
    let slots = state.device_of.len();
    let mut changes = Vec::with_capacity(SAMPLE);
    for _ in 0..SAMPLE {
        let bits = random.bits();
        let pair = [scale(bits >> 32, slots), scale(bits & 0xffff_ffff, slots)];
        let devices = pair.map(|slot| usize::from(state.device_of[slot]));
        if state.may_swap(pair, devices) {
            changes.push(state.swap_change(pair, devices).0.abs());
        }
    }
    changes
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn tried(state: &mut State<'_>, trials: usize, temperature: f64, random: &mut Random) {
    let slots = state.device_of.len();
    let experts = state.draft.load.len();
    let copies = state.draft.site.copies && slots > experts;
    for _ in 0..trials {
        let (bits, more) = (random.bits(), random.bits());
        let p = scale(bits >> 32, slots);
        let g = usize::from(state.device_of[p]);
        if copies && bits.is_multiple_of(PUT) {
            let expert = scale(more >> 32, experts) as u16;
            if state.may_put(p, g, expert) {
                let change = state.put_change(p, g, expert);
                if accepts(f64::from(change), temperature, random.bits()) {
                    state.put(p, g, expert);
                }
            }
            continue;
        }
        let q = scale(more >> 32, slots);
        let (pair, devices) = ([p, q], [g, usize::from(state.device_of[q])]);
        if state.may_swap(pair, devices) {
            let (change, own) = state.swap_change(pair, devices);
            // Most are out of the question, and need no draw.
            if accepts(f64::from(change), temperature, more << 32 | bits & 0xffff_ffff) {
                state.swap(pair, devices, own);
            }
        }
    }
}

#[cfg(test)]
impl State<'_> {
    /// Asks of random moves what they change, and holds it against a count in double precision of what would be.
    pub(super) fn check_changes(&mut self, random: &mut Random) {
        let (slots, experts) = (self.device_of.len(), self.draft.load.len());
        for _ in 0..10 {
            let [p, q] = [random.below(slots), random.below(slots)];
            let [g, h] = [p, q].map(|slot| usize::from(self.device_of[slot]));
            let mut then = self.draft.expert_in.clone();
            let change = if random.below(2) == 0 {
                if !self.may_swap([p, q], [g, h]) {
                    continue;
                }
                then.swap(p, q);
                self.swap_change([p, q], [g, h]).0
            } else {
                let expert = random.below(experts) as u16;
                if !self.may_put(p, g, expert) {
                    continue;
                }
                then[p] = expert;
                self.put_change(p, g, expert)
            };
            let expected = self.counted(&then) - self.counted(&self.draft.expert_in);
            let size = self.counted(&self.draft.expert_in).abs() + expected.abs();
            assert!((f64::from(change) - expected).abs() <= 1e-3 * size.max(1e-3), "{change} {expected}");
        }
    }

    /// Powers of slots `[P]` times the slopes that are now, and what their copies cost.
    fn counted(&self, slots: &[u16]) -> f64 {
        let mut sum = 0.0;
        for device in 0..self.time.len() {
            let here = |p: &usize| usize::from(self.device_of[*p]) == device && slots[*p] != EMPTY;
            let held: Vec<u16> = (0..slots.len()).filter(here).map(|p| slots[p]).collect();
            let part =
                |e: u16| f64::from(self.time[device]) / slots.iter().filter(|&&of| of == e).count() as f64;
            let own: f64 =
                held.iter().map(|&e| f64::from(self.columns.own[usize::from(e)]) * part(e).powi(2)).sum();
            for at in 0..self.columns.chunks {
                for k in 0..LANES {
                    let of = |e: u16| f64::from(self.columns.of(usize::from(e))[at][k]) * part(e);
                    let load: f64 = held.iter().map(|&e| of(e)).sum();
                    sum += (load + own.sqrt()).powi(8) * f64::from(self.slope[at][k]);
                }
            }
            sum += held.iter().map(|&e| f64::from(self.toll(e, device))).sum::<f64>();
        }
        sum
    }
}
