//! The best content for given weights of experts and pairs, by branch and bound.
//!
//! Members are chosen in a fixed order, so a branch is a set of members and a first expert that may follow. It is
//! bounded by giving half of each pair to either end, and by a price of load that makes up for contents that are not
//! feasible: the best completion is then the sum of the largest numbers of a list.

use super::contents::{Contents, DEEPEST, Set};

/// Contents that one search hands out.
const HARVEST: usize = 24;

/// Steps towards the best price of load.
const PRICE_STEPS: usize = 30;

/// The result of a search.
#[derive(Debug, Clone)]
pub(super) struct Harvest {
    /// No feasible content is above this or the floor. Proven, rounding included.
    pub(super) bound: f64,
    /// Some contents above the floor, the best among them, best first.
    pub(super) sets: Vec<(f64, Set)>,
}

impl Contents {
    /// Finds the content with the largest sum of the symmetric `g`, `[E, E]`, over its pairs (each once) and its
    /// diagonal, if that is above `floor`.
    pub(super) fn search(&self, g: &[f64], floor: f64) -> Harvest {
        let magnitude: f64 = g.iter().map(|x| x.abs()).sum();
        // Far from overflow, so that no comparison below meets a NaN.
        if magnitude.is_nan() || magnitude > 1e250 {
            return Harvest { bound: f64::INFINITY, sets: Vec::new() };
        }
        DepthFirst::new(self, g, floor).run(magnitude)
    }
}

/// A depth-first search; experts are numbered from the most promising on.
struct DepthFirst<'a> {
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
    sets: Vec<(f64, Set)>,
}

impl<'a> DepthFirst<'a> {
    /// Builds a search for contents of at least three members whose sum of the symmetric `g` is above `floor`.
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
            sets: Vec::new(),
        };
        this.find_price([contents.lower as f64 / total, contents.upper as f64 / total]);
        this
    }

    /// Searches; returns the best contents and a proven bound. `magnitude` is the sum of the absolute weights.
    fn run(mut self, magnitude: f64) -> Harvest {
        self.descend(0, 0, 0, 0.0);
        let c = self.contents.slots as f64;
        // Additions in any value or bound of a branch, times what their terms add up to at most.
        let error = (c * c + 8.0 * c + 64.0) * f64::EPSILON * (magnitude + (c + 2.0) * self.price.abs());
        sort(&mut self.sets);
        Harvest { bound: self.best + error, sets: self.sets }
    }

    /// Finds the price with the least bound at the root, which is convex in the price.
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

    /// Returns an upper bound on what the missing members, from `start` on, add, and the least term of that bound.
    fn completion(&mut self, depth: usize, start: usize) -> (f64, f64) {
        let c = self.contents.slots;
        let missing = c - depth;
        let mut top = [f64::NEG_INFINITY; DEEPEST];
        let top = &mut top[..missing];
        let halves = &self.halves[(start * c + missing - 1) * self.e..][start..self.e];
        let gains = self.gains[depth][start..].iter().zip(halves);
        for ((gain, halves), hope) in gains.zip(&mut self.hopes[depth][start..]) {
            *hope = gain + halves;
        }
        for &hope in &self.hopes[depth][start..] {
            if hope > top[missing - 1] {
                insert(top, hope);
            }
        }
        (top.iter().sum(), top[missing - 1])
    }

    /// Searches the contents with the members chosen so far, `depth` of them, and further ones from `start` on.
    fn descend(&mut self, depth: usize, start: usize, load: u128, value: f64) {
        let missing = self.contents.slots - depth;
        if missing == 2 {
            self.finish(depth, start, load, value);
            return;
        }
        let base = value + self.refund;
        let (mut sum, mut least) = self.completion(depth, start);
        for a in start..=self.e - missing {
            if base + sum <= self.floor {
                return;
            }
            let hope = self.hopes[depth][a];
            // If a is a member, it takes the place of the least of the best.
            let hope_of_sum = base + if hope < least { sum - least + hope } else { sum };
            let load = load + self.load[a];
            if hope_of_sum > self.floor && load <= self.contents.upper {
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
                // The next contents leave a out.
                (sum, least) = self.completion(depth, a + 1);
            }
        }
    }

    /// Tries all pairs of members as the last two.
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
        let mut largest = f64::NEG_INFINITY;
        for a in (start..e).rev() {
            behind[a] = largest;
            largest = largest.max(gains[a]);
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
                self.sets.push((value, set));
                if self.sets.len() > 4 * HARVEST {
                    sort(&mut self.sets);
                }
            }
        }
    }
}

/// Returns the largest sum of two entries at one index.
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

/// Returns experts by falling weight, which includes half of their best C - 1 pairs.
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

/// Inserts a number into a falling list, of which it drops the last one; lower numbers change nothing.
#[inline(always)]
fn insert(top: &mut [f64], mut number: f64) {
    for other in top {
        if number > *other {
            std::mem::swap(other, &mut number);
        }
    }
}

/// Computes [`DepthFirst::halves`].
fn halves(g: &[f64], e: usize, c: usize) -> Vec<f64> {
    let mut halves = vec![0.0; (e + 1) * e * c];
    let mut tops = vec![f64::NEG_INFINITY; e * c];
    for start in (0..e).rev() {
        for (l, top) in tops.chunks_exact_mut(c).enumerate() {
            if l != start {
                insert(&mut top[..c - 1], 0.5 * g[l * e + start]);
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

/// Sorts sets by falling value, and drops all but the best.
fn sort(sets: &mut Vec<(f64, Set)>) {
    sets.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    sets.truncate(HARVEST);
}
