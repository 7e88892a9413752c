//! A placement under search, with the tables that make a move cheap to evaluate and to apply.

use crate::chain::instance::{Instance, Sizes};

/// A placement, and the cost that every expert would have on every device.
#[derive(Debug, Clone)]
pub(crate) struct State<'a> {
    pub(crate) instance: &'a Instance,
    /// Expert in every slot `[L, P]`.
    pub(crate) expert_in: Vec<u16>,
    /// Slot of every expert `[L, P]`.
    slot_of: Vec<u16>,
    /// Device of every expert `[L, P]`.
    device_of: Vec<u16>,
    /// Device of every slot `[P]`.
    device_of_slot: Vec<u16>,
    /// Load of every device `[L, D]`.
    load: Vec<u64>,
    /// Cost of expert e on device d, with all its partners where they are `[L, D, P]`.
    ///
    /// Rows are of devices, because a move changes the rows of few devices, and all experts in them.
    price: Vec<i32>,
    /// Cost of the expert in a slot there `[L, P]`, a copy of what `price` has; empty unless layers are wide.
    cost_in: Vec<i32>,
    /// Load of the expert in a slot `[L, P]`; empty unless layers are wide.
    load_in: Vec<i64>,
    /// Scratch memory `[P]`: the cost change of the swap with every slot, that change with noise, and rows of counts.
    swap_change: Vec<i32>,
    score: Vec<f32>,
    next: Vec<i32>,
    previous: Vec<i32>,
    coactivations: Vec<i32>,
}

/// An exchange of the slots of two experts of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Swap {
    pub(crate) layer: usize,
    pub(crate) expert: usize,
    pub(crate) other: usize,
}

impl<'a> State<'a> {
    /// Builds the state from the expert in every slot `[L, P]`; every layer has each expert and placeholder exactly once.
    pub(crate) fn new(instance: &'a Instance, expert_in: Vec<u16>) -> Self {
        let sizes = instance.sizes;
        let (p, d) = (sizes.slots(), sizes.devices);
        let device_of_slot: Vec<u16> = (0..p).map(|slot| (slot / sizes.per_device) as u16).collect();
        let wide = sizes.is_wide();
        let mut state = Self {
            instance,
            slot_of: vec![0; expert_in.len()],
            device_of: vec![0; expert_in.len()],
            device_of_slot,
            load: vec![0; sizes.layers * d],
            price: vec![0; sizes.layers * d * p],
            cost_in: vec![0; if wide { sizes.layers * p } else { 0 }],
            load_in: vec![0; if wide { sizes.layers * p } else { 0 }],
            swap_change: vec![0; p],
            score: vec![0.0; p],
            next: vec![0; p],
            previous: vec![0; p],
            coactivations: vec![0; p],
            expert_in,
        };
        for l in 0..sizes.layers {
            for slot in 0..p {
                let e = usize::from(state.expert_in[l * p + slot]);
                state.slot_of[l * p + e] = slot as u16;
                if wide {
                    state.load_in[l * p + slot] = instance.load[l * p + e] as i64;
                }
                state.device_of[l * p + e] = state.device_of_slot[slot];
                state.load[l * d + usize::from(state.device_of_slot[slot])] += instance.load[l * p + e];
            }
        }
        (0..sizes.layers).for_each(|l| state.add_partner_prices(l));
        for l in (0..sizes.layers).filter(|_| wide) {
            (0..d).for_each(|g| state.refresh_costs(l, g));
        }
        state
    }

    /// Copies the costs of the experts of device `g` from `price` into `cost_in`.
    fn refresh_costs(&mut self, l: usize, g: usize) {
        let Sizes { devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        let row = &self.price[(l * d + g) * p..][..p];
        let at = l * p + g * s;
        for (cost, &e) in self.cost_in[at..][..s].iter_mut().zip(&self.expert_in[at..][..s]) {
            *cost = row[usize::from(e)];
        }
    }

    /// Returns the swap of an expert with the least score: the change of the cost, less `temperature` times the slot's number
    /// in `noise` `[P + 1]`. Returns None if no swap scores less than no swap at all, whose number is the last one.
    ///
    /// Swaps keep the caps, or do not increase loads above them; with a `price` of tokens above caps they may exceed caps.
    pub(crate) fn choose(
        &mut self,
        l: usize,
        expert: usize,
        temperature: f32,
        noise: &[f32],
        price: Option<f32>,
    ) -> Option<Swap> {
        let Sizes { devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        let here = usize::from(self.device_of[l * p + expert]);
        self.evaluate_swaps(l, expert, here);
        let expert_load = self.instance.load[l * p + expert] as i64;
        // Load that a device may still take under its cap, negative above it; and the same without the expert.
        let spare_load = |g: usize| self.instance.cap[l] as i64 - self.load[l * d + g] as i64;
        let spare_here = spare_load(here);
        let spare_without = spare_here + expert_load;
        let stay = -temperature * noise[p];
        let mut best = stay;
        let loads = self.load_in[l * p..][..p].chunks_exact(s).zip(noise.chunks_exact(s));
        let devices = loads.zip(self.swap_change.chunks_exact(s)).zip(self.score.chunks_exact_mut(s));
        for (g, (((load, noise), change), score)) in devices.enumerate() {
            if g == here {
                score.fill(f32::INFINITY);
                continue;
            }
            let spare_there = spare_load(g);
            let entries = load.iter().zip(noise).zip(change).zip(score);
            if let Some(price) = price {
                let excess = (-spare_here).max(0) + (-spare_there).max(0);
                for (((&load, &noise), &change), score) in entries {
                    let excess_then =
                        (load - spare_without).max(0) + (expert_load - load - spare_there).max(0);
                    *score = change as f32 + price * (excess_then - excess) as f32 - temperature * noise;
                    best = best.min(*score);
                }
            } else {
                let least = expert_load - spare_there;
                for (((&load, &noise), &change), score) in entries {
                    let fits = (load > expert_load || load >= least)
                        && (load <= expert_load || load <= spare_without);
                    *score = if fits { change as f32 - temperature * noise } else { f32::INFINITY };
                    best = best.min(*score);
                }
            }
        }
        if best >= stay {
            return None;
        }
        #[allow(clippy::float_cmp)] // one of them is the least
        let slot = self.score.iter().position(|&score| score == best)?;
        Some(Swap { layer: l, expert, other: usize::from(self.expert_in[l * p + slot]) })
    }

    /// Writes into `swap_change` `[P]` what the swap of an expert on device `here` with every slot changes the cost by.
    fn evaluate_swaps(&mut self, l: usize, expert: usize, here: usize) {
        let Sizes { devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        let row = &self.price[(l * d + here) * p..][..p];
        let (experts, costs) = (&self.expert_in[l * p..][..p], &self.cost_in[l * p..][..p]);
        let prices = self.price[l * d * p..][..d * p].chunks_exact(p);
        let changes = self.swap_change.chunks_exact_mut(s);
        let devices = experts.chunks_exact(s).zip(costs.chunks_exact(s)).zip(changes);
        if let Some(coactivations) = self.instance.coactivations_of(l, expert) {
            // The pair of the two experts keeps its cost, as in [`State::cost_change`].
            let cost = &self.instance.cost[here * d..][..d];
            for ((((experts, costs), changes), prices), &cost) in devices.zip(prices).zip(cost) {
                let (to, cost) = (prices[expert] - row[expert], 2 * cost as i32);
                for ((&f, &from), change) in experts.iter().zip(costs).zip(changes) {
                    *change = to + row[usize::from(f)] - from + cost * coactivations[usize::from(f)];
                }
            }
        } else {
            for (((experts, costs), changes), prices) in devices.zip(prices) {
                let to = prices[expert] - row[expert];
                for ((&f, &from), change) in experts.iter().zip(costs).zip(changes) {
                    *change = to + row[usize::from(f)] - from;
                }
            }
        }
    }

    /// Adds to the prices of all partners the costs of their pairs with the experts of layer `l`: the highest cost everywhere,
    /// and less on the devices that are cheaper.
    fn add_partner_prices(&mut self, l: usize) {
        let Self { instance, price, expert_in, .. } = self;
        let Sizes { layers, devices: d, per_device, .. } = instance.sizes;
        let p = instance.sizes.slots();
        let mut add = |at: usize, counts: &dyn Fn(usize) -> &'a [i32]| {
            // Pairs of every partner with the experts of all devices, and of one device `[P]`.
            let (mut all, mut of_device) = (vec![0; p], vec![0; p]);
            for (home, experts) in expert_in[l * p..][..p].chunks_exact(per_device).enumerate() {
                of_device.fill(0);
                for &e in experts {
                    add_scaled(&mut of_device, counts(e.into()), 1);
                }
                add_scaled(&mut all, &of_device, instance.max_cost);
                for &(device, by) in &instance.cheaper[home] {
                    add_scaled(&mut price[(at * d + device as usize) * p..][..p], &of_device, -by);
                }
            }
            price[at * d * p..][..d * p].chunks_exact_mut(p).for_each(|row| add_scaled(row, &all, 1));
        };
        if instance.has_transitions() {
            if l + 1 < layers {
                add(l + 1, &|e| instance.to_next(l, e));
            }
            if l > 0 {
                add(l - 1, &|e| instance.from_previous(l, e));
            }
        }
        if instance.coactivations_of(l, 0).is_some() {
            add(l, &|e| instance.coactivations_of(l, e).unwrap_or(&[]));
        }
    }

    /// Returns the swap of an expert with the content of a slot; None if both are on one device.
    #[inline]
    pub(crate) fn swap_with_slot(&self, layer: usize, expert: usize, slot: usize) -> Option<Swap> {
        let p = self.instance.sizes.slots();
        let other = usize::from(self.expert_in[layer * p + slot]);
        (self.device_of[layer * p + expert] != self.device_of_slot[slot]).then_some(Swap {
            layer,
            expert,
            other,
        })
    }

    /// Returns whether a swap keeps the caps: the device that gets the heavier expert stays under its cap, the other one loses
    /// load.
    #[inline]
    pub(crate) fn fits(&self, swap: Swap) -> bool {
        let (p, d) = (self.instance.sizes.slots(), self.instance.sizes.devices);
        let row = swap.layer * p;
        let (a, b) = (self.instance.load[row + swap.expert], self.instance.load[row + swap.other]);
        let (light, heavy, receiver) = if a >= b { (b, a, swap.other) } else { (a, b, swap.expert) };
        let device = swap.layer * d + usize::from(self.device_of[row + receiver]);
        self.load[device] - light + heavy <= self.instance.cap[swap.layer]
    }

    /// Returns what a swap adds to the tokens above caps.
    #[inline]
    pub(crate) fn excess_change(&self, swap: Swap) -> i128 {
        let (p, d) = (self.instance.sizes.slots(), self.instance.sizes.devices);
        let row = swap.layer * p;
        let (a, b) = (self.instance.load[row + swap.expert], self.instance.load[row + swap.other]);
        let change = |expert: usize, leaves: u64, enters: u64| {
            let device = swap.layer * d + usize::from(self.device_of[row + expert]);
            let (load, cap) = (self.load[device], self.instance.cap[swap.layer]);
            let above = |load: u64| i128::from(load.saturating_sub(cap));
            above(load - leaves + enters) - above(load)
        };
        change(swap.expert, a, b) + change(swap.other, b, a)
    }

    /// Returns the tokens above caps, summed over devices and layers.
    pub(crate) fn excess(&self) -> u128 {
        let layers = self.expert_in.chunks_exact(self.instance.sizes.slots()).enumerate();
        layers.map(|(l, layer)| self.instance.excess(l, layer)).sum()
    }

    /// Makes swaps that lower the tokens above caps, the best one first, until there is none.
    ///
    /// The best swap adds least to the cost, with the `price` of a token above the cap of every layer `[L]`.
    pub(crate) fn repair_caps(&mut self, price: &[f64]) {
        let Sizes { layers, devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        for (l, &price) in (0..layers).zip(price) {
            loop {
                let above = |g: &usize| self.load[l * d + g] > self.instance.cap[l];
                let mut best: Option<(f64, Swap)> = None;
                for g in (0..d).filter(above) {
                    for expert in self.members(l, g).iter().map(|&e| usize::from(e)) {
                        for slot in (0..p).filter(|slot| slot / s != g) {
                            let Some(swap) = self.swap_with_slot(l, expert, slot) else { continue };
                            let excess_change = self.excess_change(swap);
                            if excess_change < 0 {
                                let change = self.cost_change(swap) as f64 + price * excess_change as f64;
                                if best.is_none_or(|(least, _)| change < least) {
                                    best = Some((change, swap));
                                }
                            }
                        }
                    }
                }
                let Some((_, swap)) = best else { break };
                self.apply(swap);
            }
        }
    }

    /// Returns what a swap adds to the cost.
    #[inline]
    pub(crate) fn cost_change(&self, swap: Swap) -> i64 {
        let Swap { layer, expert, other } = swap;
        let (p, d) = (self.instance.sizes.slots(), self.instance.sizes.devices);
        let here = usize::from(self.device_of[layer * p + expert]);
        let there = usize::from(self.device_of[layer * p + other]);
        let here_row = &self.price[(layer * d + here) * p..][..p];
        let there_row = &self.price[(layer * d + there) * p..][..p];
        let mut change = i64::from(there_row[expert]) - i64::from(here_row[expert])
            + i64::from(here_row[other])
            - i64::from(there_row[other]);
        if let Some(coactivations) = self.instance.coactivations_of(layer, expert) {
            // Both prices assume that the other expert stays. Both move, so that the pair of the two keeps its cost.
            change += 2 * i64::from(coactivations[other]) * self.instance.cost[here * d + there];
        }
        change
    }

    /// Makes a swap.
    pub(crate) fn apply(&mut self, swap: Swap) {
        let Swap { layer: l, expert, other } = swap;
        let instance = self.instance;
        let (p, d) = (instance.sizes.slots(), instance.sizes.devices);
        let row = l * p;
        let (a, b) = (instance.load[row + expert], instance.load[row + other]);
        let (here, there) =
            (usize::from(self.device_of[row + expert]), usize::from(self.device_of[row + other]));
        self.load[l * d + here] = self.load[l * d + here] - a + b;
        self.load[l * d + there] = self.load[l * d + there] - b + a;
        self.device_of.swap(row + expert, row + other);
        self.slot_of.swap(row + expert, row + other);
        self.expert_in[row + usize::from(self.slot_of[row + expert])] = expert as u16;
        self.expert_in[row + usize::from(self.slot_of[row + other])] = other as u16;
        let (s, wide) = (instance.sizes.per_device, instance.sizes.is_wide());

        let differences = instance.differences(here, there);
        let prices = &mut self.price;
        let (costs_in, experts_in) = (&mut self.cost_in, &self.expert_in);
        // The partners of a layer have other prices on the devices whose cost differs.
        let mut update_prices = |l: usize, of_expert: &[i32], of_other: &[i32], difference: &mut [i32]| {
            subtract(difference, of_expert, of_other);
            for &(device, by) in differences {
                add_scaled(&mut prices[(l * d + device as usize) * p..][..p], difference, by);
                if !wide {
                    continue;
                }
                let at = l * p + device as usize * s;
                for (cost, &e) in costs_in[at..at + s].iter_mut().zip(&experts_in[at..at + s]) {
                    *cost += difference[usize::from(e)] * by;
                }
            }
        };
        if instance.has_transitions() {
            if l + 1 < instance.sizes.layers {
                let next = |e| instance.to_next(l, e);
                update_prices(l + 1, next(expert), next(other), &mut self.next);
            }
            if l > 0 {
                let previous = |e| instance.from_previous(l, e);
                update_prices(l - 1, previous(expert), previous(other), &mut self.previous);
            }
        }
        let coactivations = |e| instance.coactivations_of(l, e);
        if let (Some(of_expert), Some(of_other)) = (coactivations(expert), coactivations(other)) {
            update_prices(l, of_expert, of_other, &mut self.coactivations);
        }
        for e in [expert, other].into_iter().filter(|_| wide) {
            let slot = usize::from(self.slot_of[row + e]);
            self.cost_in[row + slot] = self.price[(l * d + slot / s) * p + e];
            self.load_in[row + slot] = instance.load[row + e] as i64;
        }
    }

    /// Returns what an exchange of the labels of two devices in layers `l..` adds to the cost, `l >= 1`.
    ///
    /// The exchange is one of [`Instance::exchanges`], so that only the cost between layers `l - 1` and `l` changes.
    pub(crate) fn relabel_change(&self, l: usize, g: usize, h: usize) -> i64 {
        if !self.instance.has_transitions() {
            return 0;
        }
        let mut change = 0;
        for &(device, by) in self.instance.differences(g, h) {
            for &y in self.members(l - 1, device as usize) {
                let counts = self.instance.to_next(l - 1, usize::from(y));
                let sum = |members: &[u16]| -> i64 {
                    members.iter().map(|&x| i64::from(counts[usize::from(x)])).sum()
                };
                change += i64::from(by) * (sum(self.members(l, g)) - sum(self.members(l, h)));
            }
        }
        change
    }

    /// Exchanges the labels of two devices in layers `l..`, `l >= 1`; the exchange is one of [`Instance::exchanges`].
    pub(crate) fn relabel(&mut self, l: usize, g: usize, h: usize) {
        let instance = self.instance;
        let (p, d, s) = (instance.sizes.slots(), instance.sizes.devices, instance.sizes.per_device);
        if instance.has_transitions() {
            // Layer l has prices from layer l - 1, which keeps its labels: these prices are not exchanged with the rows below.
            self.next.fill(0);
            self.previous.fill(0);
            for &(device, by) in instance.differences(g, h) {
                for slot in 0..s {
                    let y = usize::from(self.expert_in[(l - 1) * p + device as usize * s + slot]);
                    add_scaled(&mut self.next, instance.to_next(l - 1, y), by);
                }
            }
            for slot in 0..s {
                let x = usize::from(self.expert_in[l * p + g * s + slot]);
                add_scaled(&mut self.previous, instance.from_previous(l, x), 1);
                let x = usize::from(self.expert_in[l * p + h * s + slot]);
                add_scaled(&mut self.previous, instance.from_previous(l, x), -1);
            }
            for &(device, by) in instance.differences(g, h) {
                let row = &mut self.price[((l - 1) * d + device as usize) * p..][..p];
                add_scaled(row, &self.previous, by);
            }
            add_scaled(&mut self.price[(l * d + g) * p..][..p], &self.next, 1);
            add_scaled(&mut self.price[(l * d + h) * p..][..p], &self.next, -1);
        }
        for l in l..instance.sizes.layers {
            self.load.swap(l * d + g, l * d + h);
            let (low, high) = self.price.split_at_mut((l * d + h) * p);
            low[(l * d + g) * p..][..p].swap_with_slice(&mut high[..p]);
            for slot in 0..s {
                let (at_g, at_h) = (g * s + slot, h * s + slot);
                self.expert_in.swap(l * p + at_g, l * p + at_h);
                if instance.sizes.is_wide() {
                    self.load_in.swap(l * p + at_g, l * p + at_h);
                    self.cost_in.swap(l * p + at_g, l * p + at_h);
                }
                for (at, device) in [(at_g, g), (at_h, h)] {
                    let e = usize::from(self.expert_in[l * p + at]);
                    self.slot_of[l * p + e] = at as u16;
                    self.device_of[l * p + e] = device as u16;
                }
            }
        }
        if instance.sizes.is_wide() {
            for &(device, _) in instance.differences(g, h) {
                self.refresh_costs(l - 1, device as usize);
            }
            self.refresh_costs(l, g);
            self.refresh_costs(l, h);
        }
    }

    /// Returns the experts and placeholders on a device of layer `l` `[S]`.
    fn members(&self, l: usize, device: usize) -> &[u16] {
        let s = self.instance.sizes.per_device;
        &self.expert_in[l * self.instance.sizes.slots() + device * s..][..s]
    }

    /// Returns the cost of the placement, in the counts of the instance, which may be shifted.
    pub(crate) fn cost(&self) -> i64 {
        let sizes = self.instance.sizes;
        let (p, d) = (sizes.slots(), sizes.devices);
        // Every pair is in the prices of both its experts.
        let price = |at: usize| {
            let (l, e) = (at / p, at % p);
            i64::from(self.price[(l * d + usize::from(self.device_of[at])) * p + e])
        };
        (0..sizes.layers * p).map(price).sum::<i64>() / 2
    }
}

/// Adds `from`, times a factor, to a row.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_scaled(to: &mut [i32], from: &[i32], by: i32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += from * by;
    }
}

/// Writes the difference of two rows into a third.
fn subtract(to: &mut [i32], a: &[i32], b: &[i32]) {
    for ((to, &a), &b) in to.iter_mut().zip(a).zip(b) {
        *to = a - b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::instance::random;
    use crate::random::Random;
    use proptest::prelude::*;

    /// Computes the cost of all pairs, and the tokens above caps, by definition.
    fn cost_and_excess(state: &State<'_>) -> (i64, i128) {
        let (instance, sizes) = (state.instance, state.instance.sizes);
        let (p, d) = (sizes.slots(), sizes.devices);
        let on = |l: usize, e: usize| usize::from(state.device_of[l * p + e]);
        let (mut total, mut above) = (0, 0);
        for l in 0..sizes.layers {
            let mut load = vec![0; d];
            for e in 0..p {
                load[on(l, e)] += instance.load[l * p + e];
                for f in 0..p {
                    if l + 1 < sizes.layers {
                        let cost = instance.cost[on(l, e) * d + on(l + 1, f)];
                        total += i64::from(instance.to_next(l, e)[f]) * cost;
                    }
                    if let (true, Some(coactivations)) = (e < f, instance.coactivations_of(l, e)) {
                        total += i64::from(coactivations[f]) * instance.cost[on(l, e) * d + on(l, f)];
                    }
                }
            }
            above += load.iter().map(|&load| i128::from(load.saturating_sub(instance.cap[l]))).sum::<i128>();
        }
        (total, above)
    }

    /// Returns the expert that another one is swapped with, if all swaps of a wide layer are evaluated one by one.
    fn best_partner(
        state: &State<'_>,
        l: usize,
        e: usize,
        temperature: f32,
        noise: &[f32],
        price: Option<f32>,
    ) -> Option<usize> {
        let mut best = (-temperature * noise[noise.len() - 1], None);
        for (slot, noise) in noise[..noise.len() - 1].iter().enumerate() {
            let Some(swap) = state.swap_with_slot(l, e, slot) else { continue };
            let excess_cost = price.map_or(0.0, |price| price * state.excess_change(swap) as f32);
            let score = state.cost_change(swap) as f32 + excess_cost - temperature * noise;
            if (price.is_some() || state.fits(swap)) && score < best.0 {
                best = (score, Some(swap.other));
            }
        }
        best.1
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Swaps and relabelling change cost and tokens above caps by as much as was computed before; the best swap of a wide
        /// layer is chosen; and all tables stay as if they were built anew.
        #[test]
        fn changes_are_exact(
            layers in 1usize..4,
            (experts, devices, spare) in prop_oneof![4 => (1usize..7, 1usize..5, 0usize..2), 1 => Just((103, 26, 0))],
            tiers in any::<bool>(),
            dispatch in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut numbers = Random::new(seed, 0);
            let sizes = Sizes { layers, experts, devices, per_device: experts.div_ceil(devices) + spare };
            let mut instance = random(sizes, (if tiers { 2 } else { devices }, 1, 5), dispatch, 9, &mut numbers);
            // About half of all swaps keep these caps.
            instance.cap.fill(sizes.per_device as u64 * 3);
            let p = sizes.slots();
            let mut state = State::new(&instance, (0..layers * p).map(|at| (at % p) as u16).collect());
            for _ in 0..30 {
                let before = cost_and_excess(&state);
                prop_assert_eq!((state.cost(), state.excess() as i128), before);
                let (l, expert) = (numbers.below(layers), numbers.below(p));
                let mut change = (0, 0);
                if l > 0 && !instance.exchanges.is_empty() && numbers.below(3) == 0 {
                    for &(g, h) in &instance.exchanges[numbers.below(instance.exchanges.len())] {
                        change.0 += state.relabel_change(l, g.into(), h.into());
                        state.relabel(l, g.into(), h.into());
                    }
                } else {
                    let swap = if sizes.is_wide() {
                        let noise: Vec<f32> = (0..=p).map(|_| numbers.below(1000) as f32 / 100.0).collect();
                        let temperature = [0.0, 1.0, 30.0][numbers.below(3)];
                        let price = [None, Some(0.5), Some(40.0)][numbers.below(3)];
                        let expected = best_partner(&state, l, expert, temperature, &noise, price);
                        let swap = state.choose(l, expert, temperature, &noise, price);
                        prop_assert_eq!(swap.map(|swap| swap.other), expected);
                        swap
                    } else {
                        state.swap_with_slot(l, expert, numbers.below(p))
                    };
                    if let Some(swap) = swap {
                        change = (state.cost_change(swap), state.excess_change(swap));
                        state.apply(swap);
                    }
                }
                let after = cost_and_excess(&state);
                prop_assert_eq!((after.0 - before.0, after.1 - before.1), change);
            }
            let fresh = State::new(&instance, state.expert_in.clone());
            prop_assert_eq!((&fresh.price, &fresh.cost_in, &fresh.load), (&state.price, &state.cost_in, &state.load));
            prop_assert_eq!((&fresh.slot_of, &fresh.load_in), (&state.slot_of, &state.load_in));
        }
    }
}
