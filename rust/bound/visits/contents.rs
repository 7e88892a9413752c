//! Tokens that visit a device, for all contents that it can hold, and the least of these visits less prices.
//!
//! Contents of j experts are numbered by their members from the largest on: those whose largest member is x are
//! `C(x, j)` onwards, and there they stand in the order of what else they hold, j - 1 experts below x. So what is
//! computed from smaller contents is computed in long rows: `f(Y + x) = f(Y) + n(x) - f_x(Y)` for all Y below x at once,
//! with n(x) the tokens that choose x, and `f_x` the same function of only those tokens, less x.

use std::ops::Add;

use super::{Layer, UNIT};

/// Tokens of a content that a device cannot hold: more than there are.
const NEVER: i32 = i32::MAX;

/// Returns `C(n, k)`, for numbers of contents that memory can hold.
pub(super) fn binomial(n: usize, k: usize) -> usize {
    if k > n {
        return 0;
    }
    (0..k).fold(1, |all, i| all * (n - i) / (i + 1))
}

/// Returns `C(n, k)` of any size.
pub(super) fn binomial_f64(n: usize, k: usize) -> f64 {
    (0..k.min(n.saturating_sub(k))).map(|i| (n - i) as f64 / (i + 1) as f64).product()
}

/// Tokens that choose all of some experts, by how many these are.
type Counts<'a> = Vec<&'a [i32]>;

/// Visits of all contents of a layer, by size.
#[derive(Debug)]
pub(super) struct Table {
    experts: usize,
    /// The least size.
    first: usize,
    /// Visits of contents, by size, then by number.
    visits: Vec<Vec<i32>>,
}

/// A content with its visits less prices, in units.
pub(super) type Priced = (f64, Vec<u16>);

impl Table {
    /// Counts the visits of all contents of a layer.
    pub(super) fn new(layer: &Layer<'_>) -> Self {
        let experts = layer.experts();
        let (first, last) = layer.range();
        let tables: Vec<Vec<i32>> =
            (1..=last.min(layer.top_k)).map(|size| count_subsets(layer, size)).collect();
        let counts: Counts<'_> = tables.iter().map(Vec::as_slice).collect();
        let mut visits: Vec<Vec<i32>> = (first..=last).map(|size| cover(size, experts, &counts)).collect();
        let total: u128 = layer.load.iter().map(|&load| u128::from(load)).sum();
        if u128::from(layer.cap) < total {
            let others = layer.slots.len().saturating_sub(1) as u128;
            let lower = total.saturating_sub(others * u128::from(layer.cap));
            for (size, visits) in (first..).zip(&mut visits) {
                exclude(layer, size, lower, visits);
            }
        }
        Self { experts, first, visits }
    }

    /// Returns the visits of a content, whose members fall; None if no device can hold it.
    pub(super) fn visits(&self, content: &[u16]) -> Option<u64> {
        let size = content.len();
        let places = (1..=size).rev().zip(content).map(|(j, &e)| binomial(usize::from(e), j));
        let visits = *self.visits.get(size.checked_sub(self.first)?)?.get(places.sum::<usize>())?;
        (visits != NEVER).then_some(visits as u64)
    }

    /// Returns the least visits less prices of a content, by size, and up to `harvest` contents below 0, the least first.
    pub(super) fn price(&self, prices: &[f64], harvest: usize) -> (Vec<f64>, Vec<Priced>) {
        let mut harvest = Harvest { size: harvest, limit: 0.0, best: Vec::new() };
        let least = (self.first..)
            .zip(&self.visits)
            .map(|(size, visits)| self.price_size(size, visits, prices, &mut harvest))
            .collect();
        (least, harvest.finish())
    }

    /// Returns the least visits less prices of the contents of one size, and adds the best contents to the harvest.
    fn price_size(&self, size: usize, visits: &[i32], prices: &[f64], harvest: &mut Harvest) -> f64 {
        if size == 0 {
            return if visits[0] == NEVER { f64::INFINITY } else { 0.0 };
        }
        let others = sums(size - 1, self.experts - 1, prices);
        let mut least = f64::INFINITY;
        for x in size - 1..self.experts {
            let (start, length) = (binomial(x, size), binomial(x, size - 1));
            let row = &visits[start..][..length];
            let chunks = row.chunks(CHUNK).zip(others[..length].chunks(CHUNK));
            for (chunk, (visits, others)) in chunks.enumerate() {
                let lowest = lowest(visits, others) - prices[x];
                least = least.min(lowest);
                if lowest < harvest.limit && harvest.size > 0 {
                    for (i, (&visits, &others)) in visits.iter().zip(others).enumerate() {
                        let value = f64::from(visits) * UNIT - others - prices[x];
                        if value < harvest.limit && visits != NEVER {
                            harvest.take(value, size, start + chunk * CHUNK + i);
                        }
                    }
                }
            }
        }
        // Contents that no device can hold have so many visits that no price lowers them enough.
        if least > f64::from(NEVER) * UNIT / 2.0 && visits.iter().all(|&visits| visits == NEVER) {
            return f64::INFINITY;
        }
        least
    }
}

/// Contents that are evaluated together.
const CHUNK: usize = 512;

/// Returns the least of visits less prices.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn lowest(visits: &[i32], prices: &[f64]) -> f64 {
    const LANES: usize = 8;
    let mut least = [f64::INFINITY; LANES];
    let (visits, rest) = visits.as_chunks::<LANES>();
    let (prices, others) = prices.as_chunks::<LANES>();
    for (visits, prices) in visits.iter().zip(prices) {
        for i in 0..LANES {
            let value = f64::from(visits[i]) * UNIT - prices[i];
            least[i] = if value < least[i] { value } else { least[i] };
        }
    }
    for (i, (&visits, &price)) in rest.iter().zip(others).enumerate() {
        least[i] = least[i].min(f64::from(visits) * UNIT - price);
    }
    least.into_iter().fold(f64::INFINITY, f64::min)
}

/// The best contents so far, at most twice as many as are returned.
struct Harvest {
    size: usize,
    /// Value below which a content may be among the best.
    limit: f64,
    /// Value, size and number of contents.
    best: Vec<(f64, usize, usize)>,
}

impl Harvest {
    /// Adds a content.
    fn take(&mut self, value: f64, size: usize, number: usize) {
        self.best.push((value, size, number));
        if self.best.len() >= 2 * self.size {
            self.cut();
            self.limit = self.best.last().map_or(0.0, |best| best.0);
        }
    }

    /// Drops all but the best contents.
    fn cut(&mut self) {
        self.best.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        self.best.truncate(self.size);
    }

    /// Returns the best contents, the least value first.
    fn finish(mut self) -> Vec<Priced> {
        self.cut();
        self.best.into_iter().map(|(value, size, number)| (value, members(size, number))).collect()
    }
}

/// Returns the members of a content, from the largest on.
fn members(size: usize, mut number: usize) -> Vec<u16> {
    let mut content = Vec::with_capacity(size);
    for missing in (1..=size).rev() {
        let mut x = missing - 1;
        while binomial(x + 1, missing) <= number {
            x += 1;
        }
        number -= binomial(x, missing);
        content.push(x as u16);
    }
    content
}

/// Counts the tokens that choose all of j experts, for all sets of j experts, by the number of the set.
fn count_subsets(layer: &Layer<'_>, size: usize) -> Vec<i32> {
    let mut counts = vec![0; binomial(layer.experts(), size)];
    let at: Vec<Vec<usize>> =
        (1..=size).map(|j| (0..layer.experts()).map(|x| binomial(x, j)).collect()).collect();
    let mut chosen: Vec<usize> = Vec::with_capacity(size);
    for (set, &count) in layer.ids.chunks_exact(layer.top_k).zip(layer.counts) {
        chosen.clear();
        chosen.extend(0..size);
        loop {
            let number: usize = chosen.iter().zip(&at).map(|(&i, at)| at[usize::from(set[i])]).sum();
            counts[number] += count as i32;
            // The next choice of positions, the lowest first.
            let next =
                (0..size).find(|&i| chosen[i] + 1 < if i + 1 < size { chosen[i + 1] } else { layer.top_k });
            let Some(next) = next else { break };
            chosen[next] += 1;
            for (i, low) in chosen[..next].iter_mut().enumerate() {
                *low = i;
            }
        }
    }
    counts
}

/// Counts the visits of all contents of `size` of the first `experts`, from the tokens that choose all of some experts.
fn cover(size: usize, experts: usize, counts: &[&[i32]]) -> Vec<i32> {
    let mut out = vec![0; binomial(experts, size)];
    cover_into(size, experts, counts, &mut out);
    out
}

/// Writes the visits as [`cover`] counts them.
fn cover_into(size: usize, experts: usize, counts: &[&[i32]], out: &mut [i32]) {
    if size == 0 || counts.is_empty() {
        out.fill(0);
        return;
    }
    if size == 1 {
        out.copy_from_slice(&counts[0][..experts]);
        return;
    }
    let smaller = cover(size - 1, experts - 1, counts);
    let mut common = vec![0; binomial(experts - 1, size - 1)];
    for x in size - 1..experts {
        let (start, length) = (binomial(x, size), binomial(x, size - 1));
        // Tokens that choose x as well: a row of each table.
        let with: Counts<'_> = (2..)
            .zip(&counts[1..])
            .map(|(order, table)| &table[binomial(x, order)..][..binomial(x, order - 1)])
            .collect();
        cover_into(size - 1, x, &with, &mut common[..length]);
        let tokens_of_x = counts[0][x];
        for ((out, smaller), common) in out[start..][..length].iter_mut().zip(&smaller).zip(&common) {
            *out = smaller + tokens_of_x - common;
        }
    }
}

/// Sums the numbers of members of all contents of `size` of the first `experts`.
fn sums<T: Copy + Default + Add<Output = T>>(size: usize, experts: usize, numbers: &[T]) -> Vec<T> {
    if size == 0 {
        return vec![T::default()];
    }
    let smaller = sums(size - 1, experts.saturating_sub(1), numbers);
    let mut out = Vec::with_capacity(binomial(experts, size));
    for x in size - 1..experts {
        out.extend(smaller[..binomial(x, size - 1)].iter().map(|&sum| sum + numbers[x]));
    }
    out
}

/// Marks contents whose load a device cannot have.
fn exclude(layer: &Layer<'_>, size: usize, lower: u128, visits: &mut [i32]) {
    if size == 0 {
        if lower > 0 {
            visits.fill(NEVER);
        }
        return;
    }
    let load: Vec<u128> = layer.load.iter().map(|&load| load.into()).collect();
    let others = sums(size - 1, layer.experts() - 1, &load);
    for (x, load_of_x) in load.iter().enumerate() {
        let row = binomial(x, size)..binomial(x + 1, size);
        for (visits, other) in visits[row].iter_mut().zip(&others) {
            if !(lower..=layer.cap.into()).contains(&(other + load_of_x)) {
                *visits = NEVER;
            }
        }
    }
}

/// Returns contents that are spread over all experts: the first ones, but at most `times` for the sake of one expert.
pub(super) fn spread(contents: Vec<Priced>, experts: usize, times: usize) -> Vec<Vec<u16>> {
    let mut taken = vec![0; experts];
    let mut chosen = Vec::new();
    for (_, content) in contents {
        if content.iter().any(|&e| taken[usize::from(e)] < times) {
            for &e in &content {
                taken[usize::from(e)] += 1;
            }
            chosen.push(content);
        }
    }
    chosen
}
