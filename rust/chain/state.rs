//! A placement under search, with the tables that make a move cheap to judge and to make.

use crate::chain::instance::{Instance, Sizes};

/// Who sits where, and what every expert would cost on every device.
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
    /// Cost of expert e with all its partners as they stand, were it on device d `[L, D, P]`.
    ///
    /// Device-major, because a move changes few devices' rows and all experts in them.
    price: Vec<i32>,
    /// What the expert in a slot costs there `[L, P]`, which is in `price`, too; of wide layers only.
    own: Vec<i32>,
    /// Load of the expert in a slot `[L, P]`, likewise.
    load_in: Vec<i64>,
    /// Scratch rows, `[P]` each.
    changed: Vec<i32>,
    score: Vec<f32>,
    next: Vec<i32>,
    previous: Vec<i32>,
    with: Vec<i32>,
}

/// Two experts of a layer that would change places.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Swap {
    pub(crate) layer: usize,
    pub(crate) expert: usize,
    pub(crate) other: usize,
}

impl<'a> State<'a> {
    /// Takes the expert in every slot `[L, P]`; each expert (empty ones included) exactly once per layer.
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
            own: vec![0; if wide { sizes.layers * p } else { 0 }],
            load_in: vec![0; if wide { sizes.layers * p } else { 0 }],
            changed: vec![0; p],
            score: vec![0.0; p],
            next: vec![0; p],
            previous: vec![0; p],
            with: vec![0; p],
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
            (0..d).for_each(|g| state.refresh_own(l, g));
        }
        state
    }

    /// Reads what the experts of a device cost there.
    fn refresh_own(&mut self, l: usize, g: usize) {
        let Sizes { devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        let row = &self.price[(l * d + g) * p..][..p];
        let at = l * p + g * s;
        for (own, &e) in self.own[at..][..s].iter_mut().zip(&self.expert_in[at..][..s]) {
            *own = row[usize::from(e)];
        }
    }

    /// Of all swaps of an expert, and of leaving it where it is, the one for which the change of the cost, less `heat`
    /// times its number in `noise` `[P + 1]`, is the least; the last number is that of leaving it.
    ///
    /// Swaps keep the caps, or do not rise where loads are above; with a `price` of tokens above caps they may cross them.
    pub(crate) fn choose(
        &mut self,
        l: usize,
        expert: usize,
        heat: f32,
        noise: &[f32],
        price: Option<f32>,
    ) -> Option<Swap> {
        let Sizes { devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        let here = usize::from(self.device_of[l * p + expert]);
        self.judge_swaps(l, expert, here);
        let own = self.instance.load[l * p + expert] as i64;
        let spare_load = |g: usize| self.instance.cap[l] as i64 - self.load[l * d + g] as i64;
        let free = spare_load(here);
        let room = free + own;
        let stay = -heat * noise[p];
        let mut best = stay;
        let loads = self.load_in[l * p..][..p].chunks_exact(s).zip(noise.chunks_exact(s));
        let devices = loads.zip(self.changed.chunks_exact(s)).zip(self.score.chunks_exact_mut(s));
        for (g, (((load, noise), changed), score)) in devices.enumerate() {
            if g == here {
                score.fill(f32::INFINITY);
                continue;
            }
            let space = spare_load(g);
            let entries = load.iter().zip(noise).zip(changed).zip(score);
            if let Some(price) = price {
                let above = (-free).max(0) + (-space).max(0);
                for (((&load, &noise), &changed), score) in entries {
                    let rise = (load - room).max(0) + (own - load - space).max(0) - above;
                    *score = changed as f32 + price * rise as f32 - heat * noise;
                    best = best.min(*score);
                }
            } else {
                let least = own - space;
                for (((&load, &noise), &changed), score) in entries {
                    let fits = (load > own || load >= least) && (load <= own || load <= room);
                    *score = if fits { changed as f32 - heat * noise } else { f32::INFINITY };
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

    /// What every swap of an expert on a device would change the cost by, into `changed` `[P]`.
    fn judge_swaps(&mut self, l: usize, expert: usize, here: usize) {
        let Sizes { devices: d, per_device: s, .. } = self.instance.sizes;
        let p = self.instance.sizes.slots();
        let row = &self.price[(l * d + here) * p..][..p];
        let (experts, own) = (&self.expert_in[l * p..][..p], &self.own[l * p..][..p]);
        let prices = self.price[l * d * p..][..d * p].chunks_exact(p);
        let devices = experts.chunks_exact(s).zip(own.chunks_exact(s)).zip(self.changed.chunks_exact_mut(s));
        if let Some(with) = self.instance.with(l, expert) {
            // As in [`State::change`]: their own pair changes nothing.
            let cost = &self.instance.cost[here * d..][..d];
            for ((((experts, own), changed), prices), &cost) in devices.zip(prices).zip(cost) {
                let (to, cost) = (prices[expert] - row[expert], 2 * cost as i32);
                for ((&f, &own), changed) in experts.iter().zip(own).zip(changed) {
                    *changed = to + row[usize::from(f)] - own + cost * with[usize::from(f)];
                }
            }
        } else {
            for (((experts, own), changed), prices) in devices.zip(prices) {
                let to = prices[expert] - row[expert];
                for ((&f, &own), changed) in experts.iter().zip(own).zip(changed) {
                    *changed = to + row[usize::from(f)] - own;
                }
            }
        }
    }

    /// Adds what the experts of layer `l` make their partners pay: the dearest cost, less what is nearer.
    fn add_partner_prices(&mut self, l: usize) {
        let Self { instance, price, expert_in, .. } = self;
        let Sizes { layers, devices: d, per_device, .. } = instance.sizes;
        let p = instance.sizes.slots();
        let mut add = |at: usize, counts: &dyn Fn(usize) -> &'a [i32]| {
            let (mut all, mut of_device) = (vec![0; p], vec![0; p]);
            for (home, experts) in expert_in[l * p..][..p].chunks_exact(per_device).enumerate() {
                of_device.fill(0);
                for &e in experts {
                    add_scaled(&mut of_device, counts(e.into()), 1);
                }
                add_scaled(&mut all, &of_device, instance.dearest);
                for &(device, by) in &instance.nearer[home] {
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
        if instance.with(l, 0).is_some() {
            add(l, &|e| instance.with(l, e).unwrap_or(&[]));
        }
    }

    /// The swap of an expert with whatever is in a slot, unless both are on one device.
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

    /// Whether the loads after a swap stay under their caps, or at least do not rise where they are above.
    #[inline]
    pub(crate) fn fits(&self, swap: Swap) -> bool {
        let (p, d) = (self.instance.sizes.slots(), self.instance.sizes.devices);
        let row = swap.layer * p;
        let (a, b) = (self.instance.load[row + swap.expert], self.instance.load[row + swap.other]);
        let (light, heavy, receiver) = if a >= b { (b, a, swap.other) } else { (a, b, swap.expert) };
        let device = swap.layer * d + usize::from(self.device_of[row + receiver]);
        self.load[device] - light + heavy <= self.instance.cap[swap.layer]
    }

    /// What a swap would add to the tokens that are above caps.
    #[inline]
    pub(crate) fn rise(&self, swap: Swap) -> i128 {
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

    /// Tokens above caps, in all layers.
    pub(crate) fn excess(&self) -> u128 {
        let layers = self.expert_in.chunks_exact(self.instance.sizes.slots()).enumerate();
        layers.map(|(l, layer)| self.instance.excess(l, layer)).sum()
    }

    /// Swaps tokens away from where they are above caps, while that is possible: always where it costs least, when a
    /// token above costs what its layer's `price` says.
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
                            let rise = self.rise(swap);
                            if rise < 0 {
                                let change = self.change(swap) as f64 + price * rise as f64;
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

    /// What a swap would add to the cost.
    #[inline]
    pub(crate) fn change(&self, swap: Swap) -> i64 {
        let Swap { layer, expert, other } = swap;
        let (p, d) = (self.instance.sizes.slots(), self.instance.sizes.devices);
        let here = usize::from(self.device_of[layer * p + expert]);
        let there = usize::from(self.device_of[layer * p + other]);
        let here_row = &self.price[(layer * d + here) * p..][..p];
        let there_row = &self.price[(layer * d + there) * p..][..p];
        let mut change = i64::from(there_row[expert]) - i64::from(here_row[expert])
            + i64::from(here_row[other])
            - i64::from(there_row[other]);
        if let Some(with) = self.instance.with(layer, expert) {
            // The two prices assume that the partner stays; both move, so that their own pair changes nothing.
            change += 2 * i64::from(with[other]) * self.instance.cost[here * d + there];
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

        let changes = instance.changes(here, there);
        let prices = &mut self.price;
        let (owns, experts_in) = (&mut self.own, &self.expert_in);
        let mut spread = |l: usize, of_expert: &[i32], of_other: &[i32], difference: &mut [i32]| {
            subtract(difference, of_expert, of_other);
            for &(device, by) in changes {
                add_scaled(&mut prices[(l * d + device as usize) * p..][..p], difference, by);
                if !wide {
                    continue;
                }
                let at = l * p + device as usize * s;
                for (own, &e) in owns[at..at + s].iter_mut().zip(&experts_in[at..at + s]) {
                    *own += difference[usize::from(e)] * by;
                }
            }
        };
        if instance.has_transitions() {
            if l + 1 < instance.sizes.layers {
                spread(l + 1, instance.to_next(l, expert), instance.to_next(l, other), &mut self.next);
            }
            if l > 0 {
                let previous = |e| instance.from_previous(l, e);
                spread(l - 1, previous(expert), previous(other), &mut self.previous);
            }
        }
        if let (Some(of_expert), Some(of_other)) = (instance.with(l, expert), instance.with(l, other)) {
            spread(l, of_expert, of_other, &mut self.with);
        }
        for e in [expert, other].into_iter().filter(|_| wide) {
            let slot = usize::from(self.slot_of[row + e]);
            self.own[row + slot] = self.price[(l * d + slot / s) * p + e];
            self.load_in[row + slot] = instance.load[row + e] as i64;
        }
    }

    /// What exchanging the labels of two twin devices on layers `l..` would add to the cost.
    ///
    /// Only the boundary between `l - 1` and `l` notices; `l` must be at least 1.
    pub(crate) fn relabel_change(&self, l: usize, g: usize, h: usize) -> i64 {
        if !self.instance.has_transitions() {
            return 0;
        }
        let mut change = 0;
        for &(device, by) in self.instance.changes(g, h) {
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

    /// Exchanges the labels of two twin devices on layers `l..`, `l >= 1`.
    pub(crate) fn relabel(&mut self, l: usize, g: usize, h: usize) {
        let instance = self.instance;
        let (p, d, s) = (instance.sizes.slots(), instance.sizes.devices, instance.sizes.per_device);
        if instance.has_transitions() {
            // Layer l is priced by l - 1, which keeps its labels: take that part out of the exchange of rows below.
            self.next.fill(0);
            self.previous.fill(0);
            for &(device, by) in instance.changes(g, h) {
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
            for &(device, by) in instance.changes(g, h) {
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
                    self.own.swap(l * p + at_g, l * p + at_h);
                }
                for (at, device) in [(at_g, g), (at_h, h)] {
                    let e = usize::from(self.expert_in[l * p + at]);
                    self.slot_of[l * p + e] = at as u16;
                    self.device_of[l * p + e] = device as u16;
                }
            }
        }
        if instance.sizes.is_wide() {
            for &(device, _) in instance.changes(g, h) {
                self.refresh_own(l - 1, device as usize);
            }
            self.refresh_own(l, g);
            self.refresh_own(l, h);
        }
    }

    fn members(&self, l: usize, device: usize) -> &[u16] {
        let s = self.instance.sizes.per_device;
        &self.expert_in[l * self.instance.sizes.slots() + device * s..][..s]
    }

    /// The cost of the placement as it stands, in the instance's (possibly shifted) counts.
    pub(crate) fn cost(&self) -> i64 {
        let sizes = self.instance.sizes;
        let (p, d) = (sizes.slots(), sizes.devices);
        // Every pair is in the price of both its experts.
        let paid = |at: usize| {
            let (l, e) = (at / p, at % p);
            i64::from(self.price[(l * d + usize::from(self.device_of[at])) * p + e])
        };
        (0..sizes.layers * p).map(paid).sum::<i64>() / 2
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add_scaled(to: &mut [i32], from: &[i32], by: i32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += from * by;
    }
}

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

    /// The cost of all pairs, and the tokens above caps, by definition.
    fn plain(state: &State<'_>) -> (i64, i128) {
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
                    if let (true, Some(with)) = (e < f, instance.with(l, e)) {
                        total += i64::from(with[f]) * instance.cost[on(l, e) * d + on(l, f)];
                    }
                }
            }
            above += load.iter().map(|&load| i128::from(load.saturating_sub(instance.cap[l]))).sum::<i128>();
        }
        (total, above)
    }

    /// Who changes places with an expert, when all swaps of a wide layer are judged one by one.
    fn best(
        state: &State<'_>,
        l: usize,
        e: usize,
        heat: f32,
        noise: &[f32],
        price: Option<f32>,
    ) -> Option<usize> {
        let mut best = (-heat * noise[noise.len() - 1], None);
        for (slot, noise) in noise[..noise.len() - 1].iter().enumerate() {
            let Some(swap) = state.swap_with_slot(l, e, slot) else { continue };
            let above = price.map_or(0.0, |price| price * state.rise(swap) as f32);
            let worth = state.change(swap) as f32 + above - heat * noise;
            if (price.is_some() || state.fits(swap)) && worth < best.0 {
                best = (worth, Some(swap.other));
            }
        }
        best.1
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Swaps and relabelling change cost and tokens above caps by what was judged; of a wide layer the best swap is
        /// chosen; and all tables stay as if they were made anew.
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
                let before = plain(&state);
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
                        let heat = [0.0, 1.0, 30.0][numbers.below(3)];
                        let price = [None, Some(0.5), Some(40.0)][numbers.below(3)];
                        let expected = best(&state, l, expert, heat, &noise, price);
                        let swap = state.choose(l, expert, heat, &noise, price);
                        prop_assert_eq!(swap.map(|swap| swap.other), expected);
                        swap
                    } else {
                        state.swap_with_slot(l, expert, numbers.below(p))
                    };
                    if let Some(swap) = swap {
                        change = (state.change(swap), state.rise(swap));
                        state.apply(swap);
                    }
                }
                let after = plain(&state);
                prop_assert_eq!((after.0 - before.0, after.1 - before.1), change);
            }
            let fresh = State::new(&instance, state.expert_in.clone());
            prop_assert_eq!((&fresh.price, &fresh.own, &fresh.load), (&state.price, &state.own, &state.load));
            prop_assert_eq!((&fresh.slot_of, &fresh.load_in), (&state.slot_of, &state.load_in));
        }
    }
}
