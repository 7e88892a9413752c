//! The term of lost devices: how busy the other devices are after a failure domain, a device or a node, is lost.
//!
//! An expert with `c` copies, `k` of them in a domain that is lost, brings each of the others
//! `load (1 / (c - k) - 1 / c)` more, if copies share tokens evenly. The objective is the slowest device after the worst
//! loss. Few moves change that maximum, so a search cannot follow it. A norm over all losses and devices stands for it: of
//! the load of each device above the mean of the devices that are left.
//!
//! An expert whose copies are all lost adds nothing to other devices; a rule forbids that (`super::super::rules`).

use super::{Candidate, Term, Visits};
use crate::arrays::count_groups;
use crate::layer::slots::Edit;
use crate::layer::{Layer, Move, Slots, power, root};

/// The norm is of order two to the power of this.
const DOUBLINGS: u32 = 4;
/// Losses that are computed together.
const WIDTH: usize = 8;

/// Failure domains, and the cost of their loss.
#[derive(Debug, Clone)]
pub struct Losses {
    /// Failure domain of every device `[D]`.
    pub domain: Vec<u16>,
    /// Cost of a device that has twice the mean of the devices left after the worst loss.
    pub cost: f64,
}

/// Loads of devices, and what the loss of every domain adds to them.
#[derive(Debug, Clone)]
pub(in crate::layer) struct AfterLosses {
    /// Failure domain of every device `[D]`.
    pub(in crate::layer) domain: Vec<usize>,
    /// Time of every device per token `[D]`.
    time: Vec<f64>,
    /// One over the mean time of the devices left after a loss, by domain, in full vectors `[width]`; 0 where none is left.
    per_mean: Vec<f64>,
    /// Load of every device `[D]`, and what the loss of a domain adds to it `[D, width]`: minus infinity for its own domain,
    /// so that a lost device is never the busiest.
    pub(in crate::layer) loads: Vec<f64>,
    added: Vec<f64>,
}

impl AfterLosses {
    /// Builds devices that hold nothing yet, from their times per token `[D]`, their domains `[D]`, and the load that is
    /// served after the loss of each domain `[F]`.
    pub(in crate::layer) fn new(time: &[f64], domain: &[u16], served: &[f64]) -> Self {
        let domain: Vec<usize> = domain.iter().map(|&domain| usize::from(domain)).collect();
        let width = served.len().next_multiple_of(WIDTH);
        let rate = |lost: usize| {
            let remaining = domain.iter().zip(time).filter(|(domain, _)| **domain != lost);
            remaining.map(|(_, time)| 1.0 / time).sum::<f64>()
        };
        let per_mean = |lost: usize| {
            let is_domain = domain.contains(&lost) && served[lost] > 0.0;
            if is_domain { rate(lost) / served[lost] } else { 0.0 }
        };
        let mut per_mean: Vec<f64> = (0..served.len()).map(per_mean).collect();
        per_mean.resize(width, 0.0);
        let mut added = vec![0.0; domain.len() * width];
        for (device, &own_domain) in domain.iter().enumerate() {
            added[device * width + own_domain] = f64::NEG_INFINITY;
        }
        Self { loads: vec![0.0; domain.len()], time: time.to_vec(), domain, per_mean, added }
    }

    /// Builds devices that hold nothing yet, with a total load that is still served after every loss.
    pub(in crate::layer) fn all_served(time: &[f64], domain: &[u16], total: f64) -> Self {
        let domains = count_groups(domain);
        Self::new(time, domain, &vec![total; domains])
    }

    /// Returns what the loss of every domain adds to a device `[width]`.
    pub(in crate::layer) fn added_to(&self, device: usize) -> &[f64] {
        &self.added[device * self.per_mean.len()..][..self.per_mean.len()]
    }

    /// Adds the load of an expert on `devices`, times a sign; `copies` is how many copies it has in the end.
    pub(in crate::layer) fn count(&mut self, load: f64, copies: usize, devices: &[usize], sign: f64) {
        let width = self.per_mean.len();
        for &device in devices {
            self.loads[device] += sign * load / copies as f64;
        }
        for (n, &gone) in devices.iter().enumerate() {
            let lost = self.domain[gone];
            if devices[..n].iter().any(|&other| self.domain[other] == lost) {
                continue;
            }
            let number = devices.iter().filter(|&&other| self.domain[other] == lost).count();
            let added = sign * added_by_loss(load, copies, number);
            for &device in devices.iter().filter(|&&device| self.domain[device] != lost) {
                self.added[device * width + lost] += added;
            }
        }
    }

    /// Returns a device's time after a loss, over the mean of the devices that are left.
    fn imbalance(&self, device: usize, lost: usize) -> f64 {
        (self.loads[device] + self.added_to(device)[lost]) * self.time[device] * self.per_mean[lost]
    }

    /// Returns the busiest device's time after the loss of every domain, over the mean of the devices left `[width]`.
    fn worst(&self) -> Vec<f64> {
        let mut worst = vec![0.0; self.per_mean.len()];
        for device in 0..self.loads.len() {
            for (lost, worst) in worst.iter_mut().enumerate() {
                *worst = self.imbalance(device, lost).max(*worst);
            }
        }
        worst
    }
}

/// Imbalance of a layer after single losses, by the domain that is lost `[F]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SingleLosses {
    /// Time of the busiest device over the mean of those that are left; 1 where nothing is served.
    pub imbalance: Vec<f64>,
    /// Experts whose copies are all lost.
    pub experts_lost: Vec<i64>,
}

impl SingleLosses {
    /// Measures losses under loads `[E]`, by the domains of devices `[D]` and their times per token `[D]`.
    ///
    /// Copies share evenly.
    #[must_use]
    pub fn new(slots: &Slots, load: &[f64], domain: &[u16], time: &[f64]) -> Self {
        let domains = count_groups(domain);
        let holders: Vec<Vec<usize>> =
            (0..load.len()).map(|e| slots.devices(e as u16).map(usize::from).collect()).collect();
        let placed = load.iter().zip(&holders).filter(|(_, devices)| !devices.is_empty());
        let all: f64 = placed.map(|(load, _)| load).sum();
        let (mut served, mut experts_lost) = (vec![all; domains], vec![0; domains]);
        for (load, devices) in load.iter().zip(&holders) {
            if let Some((&first, others)) = devices.split_first()
                && others.iter().all(|&device| domain[device] == domain[first])
            {
                served[usize::from(domain[first])] -= load;
                experts_lost[usize::from(domain[first])] += 1;
            }
        }
        let mut after = AfterLosses::new(time, domain, &served);
        for (load, devices) in load.iter().zip(&holders) {
            after.count(*load, devices.len(), devices, 1.0);
        }
        let mut imbalance = after.worst();
        imbalance.truncate(domains);
        for (imbalance, _) in imbalance.iter_mut().zip(&served).filter(|(_, served)| **served <= 0.0) {
            *imbalance = 1.0;
        }
        Self { imbalance, experts_lost }
    }
}

/// Returns the load that each remaining copy of an expert gains if `gone` of its copies are lost.
fn added_by_loss(load: f64, copies: usize, gone: usize) -> f64 {
    if gone == 0 || gone >= copies {
        0.0
    } else {
        load * (1.0 / (copies - gone) as f64 - 1.0 / copies as f64)
    }
}

/// The term: a norm of how busy devices are after losses.
#[derive(Debug, Clone)]
pub(crate) struct LossNorm<'a> {
    layer: &'a Layer,
    /// Cost of a norm of one.
    price: f64,
    after: AfterLosses,
    /// Sum of every device's powers over losses `[D]`; the same after a candidate; sum of the former.
    powers: Vec<f64>,
    powers_then: Vec<f64>,
    total: f64,
    /// The device whose powers are the largest.
    busiest: usize,
    /// Devices that a candidate touches, with their loads and powers then, and what losses add to them then
    /// `[touched, width]`.
    touched: Vec<(usize, f64, f64)>,
    rows: Vec<f64>,
    /// Devices that hold an expert before or after a candidate, and what the loss of each of their domains adds before and
    /// after it.
    devices: Vec<usize>,
    added: Vec<(usize, [f64; 2])>,
}

impl<'a> LossNorm<'a> {
    /// Builds the term for slots.
    pub(crate) fn new(layer: &'a Layer, losses: &Losses, slots: &Slots) -> Self {
        let mut after = AfterLosses::all_served(&layer.site.time, &losses.domain, layer.load.iter().sum());
        for (expert, &load) in layer.load.iter().enumerate() {
            let devices: Vec<usize> = slots.devices(expert as u16).map(usize::from).collect();
            after.count(load, devices.len(), &devices, 1.0);
        }
        let (touched, rows, devices, added) = (vec![], vec![], vec![], vec![]);
        let (powers, powers_then, price) = (vec![0.0; layer.devices()], vec![], losses.cost);
        let mut term = Self {
            layer,
            price,
            after,
            powers,
            powers_then,
            total: 0.0,
            busiest: 0,
            touched,
            rows,
            devices,
            added,
        };
        for device in 0..layer.devices() {
            let added = term.after.added_to(device);
            term.powers[device] = powers_of(added, term.unit(device, term.after.loads[device]));
        }
        term.add_up();
        term
    }

    /// Returns the powers of every device over losses `[D]`.
    pub(super) fn powers(&self) -> &[f64] {
        &self.powers
    }

    /// Returns the device whose powers are the largest.
    pub(super) fn busiest(&self) -> usize {
        self.busiest
    }

    /// Returns an upper bound on what a candidate gains: what it would if the devices that it touches had nothing above the
    /// mean. It takes less time than what the candidate adds.
    pub(super) fn max_gain(&mut self, &Candidate { slots, step, .. }: &Candidate<'_>) -> f64 {
        self.powers_then.clone_from(&self.powers);
        for Edit { expert, to, .. } in slots.edits(step) {
            for device in slots.devices(expert).chain(to) {
                self.powers_then[usize::from(device)] = 0.0;
            }
        }
        (root(self.total, DOUBLINGS) - root(sum(&self.powers_then), DOUBLINGS)) * self.price
    }

    /// Sums the powers of all devices, and finds the busiest.
    fn add_up(&mut self) {
        self.total = sum(&self.powers);
        self.busiest =
            (0..self.powers.len()).max_by(|&a, &b| self.powers[a].total_cmp(&self.powers[b])).unwrap_or(0);
    }

    /// Returns a load, a device's time per token, and for every loss one over the mean of the devices left.
    fn unit(&self, device: usize, load: f64) -> (f64, f64, &[f64]) {
        (load, self.after.time[device], &self.after.per_mean)
    }

    /// Computes loads and powers of all devices that a move touches, as they are after it.
    fn stage(&mut self, slots: &Slots, step: Move) {
        self.touched.clear();
        self.rows.clear();
        for edit in slots.edits(step) {
            self.stage_edit(self.layer.load[usize::from(edit.expert)], slots, edit);
        }
        let width = self.after.per_mean.len();
        for at in 0..self.touched.len() {
            let (device, load, _) = self.touched[at];
            self.touched[at].2 = powers_of(&self.rows[at * width..][..width], self.unit(device, load));
        }
    }

    /// Adds the changes of one expert with its load.
    fn stage_edit(&mut self, load: f64, slots: &Slots, Edit { expert, from, to }: Edit) {
        let (from, to) = (from.map(usize::from), to.map(usize::from));
        let before = slots.copies(expert) as usize;
        let copies = [before, before + usize::from(to.is_some()) - usize::from(from.is_some())];
        let is_in = |device: usize| [Some(device) != to, Some(device) != from];
        self.devices.clear();
        self.devices.extend(slots.devices(expert).map(usize::from).chain(to));
        self.added.clear();
        for (n, &gone) in self.devices.iter().enumerate() {
            let is_in_domain = |other: &usize| self.after.domain[*other] == self.after.domain[gone];
            if !self.devices[..n].iter().any(is_in_domain) {
                let count = |when: usize| {
                    self.devices.iter().filter(|other| is_in_domain(other) && is_in(**other)[when]).count()
                };
                let added = [0, 1].map(|when| added_by_loss(load, copies[when], count(when)));
                self.added.push((self.after.domain[gone], added));
            }
        }
        let served = |when: usize, device: usize| {
            if is_in(device)[when] { load / copies[when] as f64 } else { 0.0 }
        };
        for n in 0..self.devices.len() {
            let device = self.devices[n];
            let at = self.touch(device);
            self.touched[at].1 += served(1, device) - served(0, device);
            let row = &mut self.rows[at * self.after.per_mean.len()..];
            for &(lost, added) in self.added.iter().filter(|(lost, _)| *lost != self.after.domain[device]) {
                let [was, is] = is_in(device);
                row[lost] += if is { added[1] } else { 0.0 } - if was { added[0] } else { 0.0 };
            }
        }
    }

    /// Returns the position of a device among those that are touched; adds it if it is new.
    fn touch(&mut self, device: usize) -> usize {
        self.touched.iter().position(|touched| touched.0 == device).unwrap_or_else(|| {
            self.touched.push((device, self.after.loads[device], 0.0));
            self.rows.extend_from_slice(self.after.added_to(device));
            self.touched.len() - 1
        })
    }
}

impl Term for LossNorm<'_> {
    fn cost(&self) -> f64 {
        root(self.total, DOUBLINGS) * self.price
    }

    fn change(&mut self, &Candidate { slots, step, .. }: &Candidate<'_>, _: &mut Visits) -> f64 {
        self.stage(slots, step);
        self.powers_then.clone_from(&self.powers);
        for &(device, _, powers) in &self.touched {
            self.powers_then[device] = powers;
        }
        (root(sum(&self.powers_then), DOUBLINGS) - root(self.total, DOUBLINGS)) * self.price
    }

    fn apply(&mut self, &Candidate { slots, step, .. }: &Candidate<'_>, _: &mut Visits) {
        self.stage(slots, step);
        let width = self.after.per_mean.len();
        for (row, &(device, load, powers)) in self.rows.chunks_exact(width.max(1)).zip(&self.touched) {
            self.after.added[device * width..][..width].copy_from_slice(row);
            self.after.loads[device] = load;
            self.powers[device] = powers;
        }
        self.add_up();
    }

    fn slowest(&self) -> f64 {
        let above = self.after.worst().into_iter().map(|imbalance| imbalance - 1.0);
        above.fold(0.0, f64::max) * self.price
    }

    fn needs_shares(&self, _: bool) -> bool {
        false
    }
}

/// Sums the powers of a device's load above the mean over the losses that add `added` to it.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn powers_of(added: &[f64], (load, time, per_mean): (f64, f64, &[f64])) -> f64 {
    let mut sums = [0.0; WIDTH];
    for (added, per_mean) in added.as_chunks::<WIDTH>().0.iter().zip(per_mean.as_chunks::<WIDTH>().0) {
        for k in 0..WIDTH {
            let above = (load + added[k]) * time * per_mean[k] - 1.0;
            // After the loss of its own domain the device has no load.
            sums[k] += power(if above > 0.0 { above } else { 0.0 }, DOUBLINGS);
        }
    }
    sums.iter().sum()
}

/// Sums values in an order that vector instructions can follow.
fn sum(values: &[f64]) -> f64 {
    let (full, rest) = values.as_chunks::<WIDTH>();
    let mut sums = [0.0; WIDTH];
    for values in full {
        for k in 0..WIDTH {
            sums[k] += values[k];
        }
    }
    sums.iter().sum::<f64>() + rest.iter().sum::<f64>()
}

/// The norm of what devices have after losses above the mean of those that are left.
#[cfg(test)]
pub(super) const DEFINITION: super::Definition = super::Definition {
    price: |random, layer, _| {
        let (devices, nodes) = ((0..layer.devices() as u16).collect(), layer.site.node.clone());
        layer.costs.losses = Some(Losses { domain: [devices, nodes][random.below(2)].clone(), cost: 1000.0 });
    },
    cost: |layer, slots| {
        let losses = layer.costs.losses.as_ref().expect("losses are priced");
        let (total, order) = (layer.load.iter().sum::<f64>(), f64::from(2u32.pow(DOUBLINGS)));
        let (mut powers, time) = (0.0, |g: usize| layer.site.time[g]);
        let domains: std::collections::BTreeSet<u16> = losses.domain.iter().copied().collect();
        for lost in domains {
            let remaining: Vec<usize> = (0..layer.devices()).filter(|&g| losses.domain[g] != lost).collect();
            let mean = total / remaining.iter().map(|&g| 1.0 / time(g)).sum::<f64>();
            for &device in remaining.iter().filter(|_| total > 0.0) {
                let served = |e: u16| {
                    let alive = slots.devices(e).filter(|&g| losses.domain[usize::from(g)] != lost).count();
                    if slots.holds(e, device) { layer.load[usize::from(e)] / alive as f64 } else { 0.0 }
                };
                let load: f64 = (0..layer.experts as u16).map(served).sum();
                powers += (load * time(device) / mean - 1.0).max(0.0).powf(order);
            }
        }
        powers.powf(1.0 / order) * losses.cost
    },
};
