//! What a device can hold of one layer, and the best of it.
//!
//! The contents of a device are C experts whose loads keep the cap, and which leave the other devices no more than
//! theirs. Where these sets are not too many the best one for given weights of experts and pairs is found by branch
//! and bound. A branch is bounded by giving half of each pair to either end, and by a price of load that makes up for
//! contents that are not feasible: the best completion is then a sum of the largest numbers of a list.

use super::relaxation::Relaxation;

/// A set of experts of a layer.
pub(super) type Set = u128;

/// Sets of C experts up to which a search costs no more than a few iterations of everything else.
const MOST: f64 = 1.5e7;

/// Contents that one search hands out.
const HARVEST: usize = 24;

/// More members than any content that can be searched: C of 2C experts are too many long before.
const DEEPEST: usize = 32;

/// Steps towards the best price of load.
const PRICE_STEPS: usize = 30;

/// Gains below this, in units of the weights, are rounding.
const TINY: f64 = 1e-9;

/// The members of a set.
pub(super) fn members(set: Set) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(set), |rest| Some(rest & rest.wrapping_sub(1)))
        .take_while(|&rest| rest != 0)
        .map(|rest| rest.trailing_zeros() as usize)
}

/// Whether all contents of a device can be searched.
pub(super) fn are_few(experts: usize, slots: usize) -> bool {
    let all: f64 = (0..slots).map(|i| (experts - i) as f64 / (i + 1) as f64).product();
    // Of two experts the pair itself says everything.
    slots > 2 && slots < DEEPEST && experts <= Set::BITS as usize && all <= MOST
}

/// The feasible contents of one layer.
#[derive(Debug, Clone)]
pub(super) struct Contents {
    experts: usize,
    slots: usize,
    load: Vec<u128>,
    lower: u128,
    upper: u128,
}

/// What a search found.
#[derive(Debug, Clone)]
pub(super) struct Harvest {
    /// No feasible content is above this or the floor. Proven, rounding included.
    pub(super) bound: f64,
    /// Some contents above the floor, the best among them, best first.
    pub(super) sets: Vec<(f64, Set)>,
}

impl Contents {
    /// The contents of layer l.
    pub(super) fn new(relaxation: &Relaxation, l: usize) -> Self {
        let Relaxation { experts, slots, .. } = *relaxation;
        let load: Vec<u128> = relaxation.load[l * experts..][..experts].iter().map(|&x| x.into()).collect();
        let total: u128 = load.iter().sum();
        let upper = relaxation.limit[l].map_or(total, |limit| limit.cap.into());
        let lower = total.saturating_sub(upper * (relaxation.devices as u128 - 1));
        Self { experts, slots, load, lower, upper }
    }

    /// Finds the content with the largest sum of the symmetric `g`, `[E, E]`, over its pairs (each once) and its
    /// diagonal, if that is above `floor`.
    pub(super) fn search(&self, g: &[f64], floor: f64) -> Harvest {
        let magnitude: f64 = g.iter().map(|x| x.abs()).sum();
        // Far from overflow, so that no comparison below meets a NaN.
        if magnitude.is_nan() || magnitude > 1e250 {
            return Harvest { bound: f64::INFINITY, sets: Vec::new() };
        }
        let mut search = Search::new(self, g, floor);
        search.descend(0, 0, 0, 0.0);
        let c = self.slots as f64;
        // Additions in any value or bound of a branch, times what their terms add up to at most.
        let error = (c * c + 8.0 * c + 64.0) * f64::EPSILON * (magnitude + (c + 2.0) * search.price.abs());
        sort(&mut search.found);
        Harvest { bound: search.best + error, sets: search.found }
    }

    /// Improves a content by exchanging one member at a time, best first; returns the gain too.
    pub(super) fn climb(&self, g: &[f64], mut set: Set) -> (f64, Set) {
        let e = self.experts;
        let mut sums = vec![0.0; e];
        let mut load = 0;
        for i in members(set) {
            load += self.load[i];
            sums.iter_mut().zip(&g[i * e..][..e]).for_each(|(sum, g)| *sum += g);
        }
        let mut gained = 0.0;
        loop {
            let (mut best, mut swap) = (TINY, None);
            for i in members(set) {
                let row = &g[i * e..][..e];
                for j in 0..e {
                    let gain = sums[j] - row[j] + g[j * e + j] - sums[i];
                    if gain > best
                        && set >> j & 1 == 0
                        && self.keeps_limits(load - self.load[i] + self.load[j])
                    {
                        (best, swap) = (gain, Some((i, j)));
                    }
                }
            }
            let Some((i, j)) = swap else { return (gained, set) };
            gained += best;
            load = load - self.load[i] + self.load[j];
            set = (set & !(1 << i)) | 1 << j;
            for (k, sum) in sums.iter_mut().enumerate() {
                *sum += g[j * e + k] - g[i * e + k];
            }
        }
    }

    fn keeps_limits(&self, load: u128) -> bool {
        self.lower <= load && load <= self.upper
    }
}

/// Best first, the best only.
fn sort(found: &mut Vec<(f64, Set)>) {
    found.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    found.truncate(HARVEST);
}

/// A depth-first search; experts are numbered from the most promising on.
struct Search<'a> {
    contents: &'a Contents,
    e: usize,
    order: Vec<usize>,
    g: Vec<f64>,
    load: Vec<u128>,
    /// `load` as shares of the total.
    share: Vec<f64>,
    /// Price of a share of load, taken off each expert; `refund` is what a content gets back at least.
    price: f64,
    refund: f64,
    /// `[start][t][expert]`: sum of the t largest halves of the expert's pairs with those from start on.
    halves: Vec<f64>,
    /// The largest pair of each expert with those behind it.
    best_pair: Vec<f64>,
    /// Per depth: what each expert would add to the members so far, less its price.
    gains: Vec<Vec<f64>>,
    /// Per depth: gains with half of the best pairs to come.
    hopes: Vec<Vec<f64>>,
    chosen: Vec<usize>,
    floor: f64,
    best: f64,
    found: Vec<(f64, Set)>,
}

impl<'a> Search<'a> {
    fn new(contents: &'a Contents, g: &[f64], floor: f64) -> Self {
        let (e, c) = (contents.experts, contents.slots);
        let order = by_promise(g, e, c);
        let load: Vec<u128> = order.iter().map(|&i| contents.load[i]).collect();
        let total = load.iter().sum::<u128>().max(1) as f64;
        let g: Vec<f64> = order.iter().flat_map(|&i| order.iter().map(move |&j| g[i * e + j])).collect();
        let mut this = Self {
            contents,
            e,
            halves: halves(&g, e, c),
            best_pair: (0..e)
                .map(|a| g[a * e + a + 1..(a + 1) * e].iter().copied().fold(f64::NEG_INFINITY, f64::max))
                .collect(),
            order,
            g,
            share: load.iter().map(|&x| x as f64 / total).collect(),
            load,
            price: 0.0,
            refund: 0.0,
            gains: vec![vec![0.0; e]; c],
            hopes: vec![vec![0.0; e]; c],
            chosen: vec![0; c],
            floor,
            best: f64::NEG_INFINITY,
            found: Vec::new(),
        };
        this.find_price([contents.lower as f64 / total, contents.upper as f64 / total]);
        this
    }

    /// The price with the least bound at the root, which is convex in it.
    fn find_price(&mut self, limits: [f64; 2]) {
        let widest = self.g.iter().fold(0.0f64, |m, g| m.max(g.abs())) * self.e as f64;
        let (mut low, mut high) = (-widest, widest);
        for _ in 0..PRICE_STEPS {
            let third = (high - low) / 3.0;
            if self.root(low + third, limits) < self.root(high - third, limits) {
                high -= third;
            } else {
                low += third;
            }
        }
        let price = 0.5 * (low + high);
        let better = self.root(price, limits) < self.root(0.0, limits);
        self.root(if better { price } else { 0.0 }, limits);
    }

    /// Sets a price; returns the bound at the root.
    fn root(&mut self, price: f64, [lower, upper]: [f64; 2]) -> f64 {
        self.price = price;
        self.refund = price * if price >= 0.0 { upper } else { lower };
        for (a, gain) in self.gains[0].iter_mut().enumerate() {
            *gain = self.g[a * self.e + a] - price * self.share[a];
        }
        self.refund + self.completion(0, 0).0
    }

    /// At most what the missing members, from `start` on, add; and the least of the hopes that went into it.
    fn completion(&mut self, depth: usize, start: usize) -> (f64, f64) {
        let c = self.contents.slots;
        let left = c - depth;
        let mut top = [f64::NEG_INFINITY; DEEPEST];
        let top = &mut top[..left];
        let halves = &self.halves[(start * c + left - 1) * self.e..][start..self.e];
        let gains = self.gains[depth][start..].iter().zip(halves);
        for ((gain, halves), hope) in gains.zip(&mut self.hopes[depth][start..]) {
            *hope = gain + halves;
        }
        for &hope in &self.hopes[depth][start..] {
            let mut x = hope;
            if x > top[left - 1] {
                for t in top.iter_mut() {
                    if x > *t {
                        std::mem::swap(t, &mut x);
                    }
                }
            }
        }
        (top.iter().sum(), top[left - 1])
    }

    fn descend(&mut self, depth: usize, start: usize, load: u128, value: f64) {
        let left = self.contents.slots - depth;
        if left == 2 {
            self.finish(depth, start, load, value);
            return;
        }
        let base = value + self.refund;
        let (mut sum, mut least) = self.completion(depth, start);
        for a in start..=self.e - left {
            if base + sum <= self.floor {
                return;
            }
            let hope = self.hopes[depth][a];
            // With a, the best that is left out is the least.
            let most = base + if hope < least { sum - least + hope } else { sum };
            let load = load + self.load[a];
            if most > self.floor && load <= self.contents.upper {
                self.chosen[depth] = a;
                let (before, after) = self.gains.split_at_mut(depth + 1);
                let row = &self.g[a * self.e..][..self.e];
                for ((x, y), g) in
                    after[0][a + 1..].iter_mut().zip(&before[depth][a + 1..]).zip(&row[a + 1..])
                {
                    *x = y + g;
                }
                let value = value + before[depth][a];
                self.descend(depth + 1, a + 1, load, value);
            }
            if hope >= least {
                // From here on a is out.
                (sum, least) = self.completion(depth, a + 1);
            }
        }
    }

    /// The best last two members.
    fn finish(&mut self, depth: usize, start: usize, load: u128, value: f64) {
        let e = self.e;
        // The price is given back: true values are compared.
        let paid = self.price * self.chosen[..depth].iter().map(|&a| self.share[a]).sum::<f64>();
        let value = value + paid;
        let (gains, rest) = self.gains.split_at_mut(depth + 1);
        let gains = &mut gains[depth];
        for (gain, share) in gains[start..].iter_mut().zip(&self.share[start..]) {
            *gain += self.price * share;
        }
        // The largest gain behind each expert.
        let behind = &mut rest[0];
        let mut most = f64::NEG_INFINITY;
        for a in (start..e).rev() {
            behind[a] = most;
            most = most.max(gains[a]);
        }
        for a in start..e - 1 {
            let needed = self.floor - value - gains[a];
            if behind[a] + self.best_pair[a] <= needed || load + self.load[a] > self.contents.upper {
                continue;
            }
            let row = &self.g[a * e..][a + 1..e];
            if largest_sum(&gains[a + 1..], row) <= needed {
                continue;
            }
            let (mut top, mut at) = (needed, None);
            for (b, (gain, g)) in gains[a + 1..].iter().zip(row).enumerate() {
                let b = a + 1 + b;
                if gain + g > top && self.contents.keeps_limits(load + self.load[a] + self.load[b]) {
                    (top, at) = (gain + g, Some(b));
                }
            }
            if let Some(b) = at {
                (self.chosen[depth], self.chosen[depth + 1]) = (a, b);
                let value = value + gains[a] + top;
                self.best = self.best.max(value);
                self.floor = self.floor.max(value);
                let set = self.chosen.iter().fold(0, |set: Set, &a| set | 1 << self.order[a]);
                self.found.push((value, set));
                if self.found.len() > 4 * HARVEST {
                    sort(&mut self.found);
                }
            }
        }
    }
}

/// The largest sum of two entries at one place.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn largest_sum(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [f64::NEG_INFINITY; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            let x = a[i] + b[i];
            lanes[i] = if x > lanes[i] { x } else { lanes[i] };
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a + b);
    lanes.into_iter().chain(rest).fold(f64::NEG_INFINITY, |m, x| if x > m { x } else { m })
}

/// Experts from the largest weight on, half of their best C - 1 pairs included.
fn by_promise(g: &[f64], e: usize, c: usize) -> Vec<usize> {
    let mut scratch = vec![0.0; e];
    let promise: Vec<f64> = (0..e)
        .map(|i| {
            scratch.copy_from_slice(&g[i * e..][..e]);
            scratch[i] = f64::NEG_INFINITY;
            scratch.sort_unstable_by(|a, b| b.total_cmp(a));
            g[i * e + i] + 0.5 * scratch[..c - 1].iter().sum::<f64>()
        })
        .collect();
    let mut order: Vec<usize> = (0..e).collect();
    order.sort_by(|&a, &b| promise[b].total_cmp(&promise[a]).then(a.cmp(&b)));
    order
}

/// See [`Search::halves`].
fn halves(g: &[f64], e: usize, c: usize) -> Vec<f64> {
    let mut halves = vec![0.0; (e + 1) * e * c];
    let mut tops = vec![f64::NEG_INFINITY; e * c];
    for start in (0..e).rev() {
        for (l, top) in tops.chunks_exact_mut(c).enumerate() {
            if l != start {
                let mut x = 0.5 * g[l * e + start];
                for t in &mut top[..c - 1] {
                    if x > *t {
                        std::mem::swap(t, &mut x);
                    }
                }
            }
            let mut sum = 0.0;
            for (t, x) in top.iter().enumerate() {
                halves[(start * c + t) * e + l] = sum;
                sum += x;
            }
        }
    }
    halves
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The best content by trying all.
    fn best(contents: &Contents, g: &[f64]) -> f64 {
        let e = contents.experts;
        let sets = (0..1u128 << e).filter(|s| s.count_ones() as usize == contents.slots);
        let feasible = sets.filter(|&s| contents.keeps_limits(members(s).map(|i| contents.load[i]).sum()));
        feasible.map(|s| value(g, e, s)).fold(f64::NEG_INFINITY, f64::max)
    }

    fn value(g: &[f64], e: usize, set: Set) -> f64 {
        members(set).map(|i| members(set).filter(|&j| j <= i).map(|j| g[i * e + j]).sum::<f64>()).sum()
    }

    proptest! {
        /// Branch and bound finds what trying all finds, and climbing never leaves what is feasible.
        #[test]
        fn finds_the_best(
            half in prop::collection::vec(-3.0f64..3.0, 100),
            load in prop::collection::vec(0u128..50, 10),
            slots in 3usize..6,
            width in 0u128..60,
            floor in prop_oneof![Just(f64::NEG_INFINITY), -5.0f64..5.0],
        ) {
            let e = 10;
            let g: Vec<f64> = (0..e * e).map(|x| half[(x / e).max(x % e) * e + (x / e).min(x % e)]).collect();
            let middle = load.iter().sum::<u128>() * slots as u128 / e as u128;
            let contents = Contents {
                experts: e,
                slots,
                load,
                lower: middle.saturating_sub(width),
                upper: middle + width,
            };
            let best = best(&contents, &g);
            let found = contents.search(&g, floor);
            prop_assert!(found.bound.max(floor) >= best);
            if best > floor + 1e-9 {
                prop_assert!((found.sets[0].0 - best).abs() < 1e-9 && found.bound - best < 1e-9);
                for &(claimed, set) in &found.sets {
                    prop_assert!((value(&g, e, set) - claimed).abs() < 1e-9);
                    let (gain, better) = contents.climb(&g, set);
                    prop_assert!((value(&g, e, better) - claimed - gain).abs() < 1e-9);
                    prop_assert!(contents.keeps_limits(members(better).map(|i| contents.load[i]).sum()));
                }
            }
        }
    }

    /// Weights that are no numbers bound nothing.
    #[test]
    fn wild_weights() {
        let contents = Contents { experts: 4, slots: 3, load: vec![1; 4], lower: 0, upper: 4 };
        for wild in [f64::NAN, f64::INFINITY, 1e300] {
            let mut g = vec![0.0; 16];
            g[5] = wild;
            assert!(contents.search(&g, f64::NEG_INFINITY).bound == f64::INFINITY);
        }
    }
}
