//! The dual point that proves a bound, and the check that trusts nothing but it and the instance.

use rayon::prelude::*;

use super::Instance;
use super::cuts::{Cut, Kind, Sum};
use super::relaxation::Relaxation;
use super::spectrum::largest_sum;
use crate::error::{Error, Result};

/// A dual point of the relaxation as flat arrays. Any numbers in it give a valid bound; good ones a good bound.
///
/// E counts the dummies that fill up the devices: `devices * ceil(experts / devices)`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Certificate {
    /// Multipliers of `B_l(y) = Q_l`, `[M, 2E, 2E]`; empty for all zero.
    pub lambda: Vec<f64>,
    /// Multipliers of `s_l = h_l`, `[L, E, E]`; empty for all zero.
    pub contents: Vec<f64>,
    /// Multipliers of the column sums of `z_l`, `[M, E]`; empty for all zero.
    pub columns: Vec<f64>,
    /// `[n, 5]`: [`Kind`], pair, and three items or sides, by pair.
    pub cuts: Vec<i32>,
    /// `[n]`: what each cut is multiplied by.
    pub multipliers: Vec<f64>,
    /// The choices of the lifted cuts in their order, `[lifted, E]`.
    pub choices: Vec<u8>,
}

/// A dual point as the method leaves it.
#[derive(Debug, Clone, Default)]
pub(super) struct Dual {
    /// `[M, 2E, 2E]`.
    pub(super) lambda: Vec<f64>,
    /// Multipliers of `s_l = h_l`, `[L, E, E]`; empty where contents are too many.
    pub(super) contents: Vec<f64>,
    /// Multipliers of the column sums of z, `[M, E]`; empty for zeros.
    pub(super) columns: Vec<f64>,
    /// Cuts with their multipliers, by pair.
    pub(super) cuts: Vec<(Cut, f64)>,
    /// Value of the dual function, if the eigenvalues and the contents are right.
    pub(super) estimate: f64,
}

/// Results that the method has computed for a dual point, so that nobody computes them again.
#[derive(Debug, Clone)]
pub(super) struct Hints {
    /// Sums of the G - 1 largest eigenvalues, `[M]`.
    pub(super) spectrum: Vec<f64>,
    /// Sums of the best contents, `[L]`.
    pub(super) contents: Vec<f64>,
}

impl Sum {
    /// Adds a number.
    fn add(&mut self, x: f64) {
        self.value += x;
        self.magnitude += x.abs();
    }

    /// Adds another sum.
    fn join(&mut self, other: Self) {
        self.value += other.value;
        self.magnitude += other.magnitude;
    }
}

/// Recomputes the bound of a certificate from its numbers and the instance alone.
///
/// The result is a proven lower bound on the crossing count of every feasible placement, whatever the certificate
/// holds. An error says that its arrays do not fit the instance or that a cut is not a true statement about it.
pub fn verify(instance: &Instance<'_>, certificate: &Certificate) -> Result<u64> {
    instance.check()?;
    if instance.is_trivial() {
        return Ok(0);
    }
    let relaxation = Relaxation::new(instance);
    let dual = certificate.read(&relaxation)?;
    Ok(crossing(&relaxation, dual_value(&relaxation, &dual, None)))
}

impl Certificate {
    /// Writes a dual point as flat arrays.
    pub(super) fn write(dual: Dual) -> Self {
        let Dual { lambda, contents, columns, .. } = dual;
        let mut this = Self { lambda, contents, columns, ..Self::default() };
        for (cut, multiplier) in &dual.cuts {
            this.cuts.extend([cut.kind as i32, cut.pair as i32]);
            this.cuts.extend(cut.items.map(|i| i as i32));
            this.multipliers.push(*multiplier);
            this.choices.extend(&cut.choice);
        }
        this
    }

    /// Returns the dual point; an error unless the arrays fit and the cuts are valid.
    fn read(&self, relaxation: &Relaxation) -> Result<Dual> {
        let Relaxation { experts, .. } = *relaxation;
        let (pairs, order) = (relaxation.pairs(), relaxation.order());
        let wrong = |rule: String, got: &dyn ToString| Error::shape("certificate", rule, got);
        let layers = if relaxation.has_contents { relaxation.layers } else { 0 };
        for (name, array, length) in [
            ("lambda", &self.lambda, pairs * order * order),
            ("contents", &self.contents, layers * experts * experts),
            ("columns", &self.columns, pairs * experts),
        ] {
            if !array.is_empty() && array.len() != length {
                return Err(wrong(format!("{length} numbers in {name}"), &array.len()));
            }
        }
        if self.cuts.len() != 5 * self.multipliers.len() {
            let rule = format!("five numbers for each of {} multipliers", self.multipliers.len());
            return Err(wrong(rule, &self.cuts.len()));
        }
        let mut choices = self.choices.chunks(experts);
        let mut cuts = Vec::with_capacity(self.multipliers.len());
        for (n, (row, &multiplier)) in self.cuts.chunks_exact(5).zip(&self.multipliers).enumerate() {
            let cut = usize::try_from(row[0]).ok().and_then(|k| Kind::ALL.get(k)).map(|&kind| Cut {
                kind,
                pair: row[1] as u32,
                items: [row[2], row[3], row[4]].map(|i| i as u32),
                choice: if kind.is_lifted() { choices.next().unwrap_or(&[]).into() } else { Box::default() },
            });
            match cut {
                Some(cut) if cut.is_valid(relaxation) => cuts.push((cut, multiplier)),
                _ => {
                    let rule = "cuts that hold for this instance".into();
                    return Err(wrong(rule, &format!("cut {n}: {row:?}")));
                }
            }
        }
        cuts.sort_by_key(|(cut, _)| cut.pair);
        Ok(Dual {
            lambda: self.lambda.clone(),
            contents: self.contents.clone(),
            columns: self.columns.clone(),
            cuts,
            estimate: f64::NEG_INFINITY,
        })
    }
}

/// Returns the number of transitions that a dual value proves.
pub(super) fn crossing(relaxation: &Relaxation, value: f64) -> u64 {
    // An upper bound on the transitions inside devices. The product with a power of two is exact.
    let inside = -value * relaxation.unit;
    if inside.is_nan() || inside >= relaxation.total as f64 {
        return 0;
    }
    let inside = inside.max(0.0).floor() as u128;
    u64::try_from(relaxation.total.saturating_sub(inside)).unwrap_or(u64::MAX)
}

/// Computes the dual function D, rounded down so far that it is proven; cuts must be valid and sorted by pair.
///
/// With hints it takes little time, but proves nothing.
pub(super) fn dual_value(relaxation: &Relaxation, dual: &Dual, hints: Option<&Hints>) -> f64 {
    let cuts = &dual.cuts;
    let pairs = relaxation.pairs();
    let by_pair: Vec<PairValue> = (0..pairs)
        .into_par_iter()
        .map(|l| {
            let start = cuts.partition_point(|(cut, _)| (cut.pair as usize) < l);
            let end = cuts.partition_point(|(cut, _)| cut.pair as usize <= l);
            PairValue::new(relaxation, l, dual, &cuts[start..end], hints.map(|h| h.spectrum[l]))
        })
        .collect();
    let layers: Vec<Sum> =
        (0..=pairs).into_par_iter().map(|l| layer_value(relaxation, l, dual, &by_pair, hints)).collect();
    let mut sum = Sum::default();
    for addend in by_pair.iter().map(|pair| pair.sum).chain(layers) {
        sum.join(addend);
    }
    // No number passes through more roundings than this: a coefficient, its multiplier, the cuts of its variable,
    // the longest sum of a pair, the sum over pairs.
    let e = relaxation.experts;
    let terms = by_pair.iter().map(|pair| pair.terms).max().unwrap_or(0) as usize;
    let roundings = (2 * terms + 4 * e * e + 2 * e + 8 * pairs + 64) as f64;
    sum.value - roundings * f64::EPSILON * sum.magnitude
}

/// The addend of pair l in D, and its reduced costs.
struct PairValue {
    sum: Sum,
    /// `r` of the slice; the z part is spent.
    reduced: Vec<f64>,
    /// Sum of absolute values of what `reduced` was made from, by block.
    magnitude: [f64; 3],
    /// Cuts of the busiest variable.
    terms: u32,
}

impl PairValue {
    fn new(
        relaxation: &Relaxation,
        l: usize,
        Dual { lambda, columns, .. }: &Dual,
        cuts: &[(Cut, f64)],
        spectrum: Option<f64>,
    ) -> Self {
        let Relaxation { experts: e, slots, devices, .. } = *relaxation;
        let n = relaxation.order();
        let mut sum = Sum::default();
        let mut reduced = vec![0.0; relaxation.slice()];
        let mut magnitudes = vec![0.0; relaxation.slice()];
        reduced[e * e..2 * e * e].copy_from_slice(&relaxation.cost[l * e * e..][..e * e]);
        if !lambda.is_empty() {
            let lambda = symmetric(&lambda[l * n * n..][..n * n], n);
            for i in 0..n {
                sum.add(lambda[i * n + i]);
                for j in i + 1..n {
                    reduced[relaxation.variable(i, j)] += 2.0 * lambda[i * n + j];
                }
            }
            let mut ones = Sum::default();
            for &x in &lambda {
                ones.add(x);
            }
            let g = devices as f64;
            sum.join(Sum { value: -ones.value / g, magnitude: ones.magnitude / g });
            let largest = spectrum.unwrap_or_else(|| largest_sum(&lambda, n, devices - 1));
            sum.add(-2.0 * slots as f64 * largest);
        }
        for (magnitude, x) in magnitudes.iter_mut().zip(&reduced) {
            *magnitude += x.abs();
        }
        let mut counts = vec![2u32; relaxation.slice()];
        for (cut, multiplier) in cuts {
            // Anything but a positive number is not a multiplier of an inequality.
            if multiplier.is_nan() || *multiplier <= 0.0 {
                continue;
            }
            let right = cut.expand(relaxation, |variable, coefficient| {
                let x = multiplier * coefficient;
                reduced[variable] += x;
                magnitudes[variable] += x.abs();
                counts[variable] += 1;
            });
            let (value, magnitude) = (-multiplier * right.value, multiplier * right.magnitude);
            sum.join(Sum { value, magnitude });
        }
        let block = |b: usize| magnitudes[b * e * e..][..e * e].iter().sum::<f64>();
        let magnitude = [block(0), block(1), block(2)];
        let columns = if columns.is_empty() { None } else { Some(&columns[l * e..][..e]) };
        sum.join(transport_value(&reduced[e * e..2 * e * e], e, slots, columns));
        sum.magnitude += magnitude[1];
        Self { sum, reduced, magnitude, terms: counts.iter().copied().max().unwrap_or(0) }
    }
}

/// Returns the mean of a matrix and its transpose.
fn symmetric(lambda: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            out[i * n + j] = 0.5 * (lambda[i * n + j] + lambda[j * n + i]);
        }
    }
    out
}

/// Computes a lower bound on `sum r z` over 0/1 matrices z with C ones in each row and column.
fn transport_value(r: &[f64], e: usize, slots: usize, columns: Option<&[f64]>) -> Sum {
    let mut scratch = vec![0.0; e];
    let mut rows = Sum::default();
    for row in r.chunks_exact(e) {
        scratch.copy_from_slice(row);
        if let Some(columns) = columns {
            scratch.iter_mut().zip(columns).for_each(|(r, v)| *r -= v);
        }
        for &x in smallest(&mut scratch, slots) {
            rows.add(x);
        }
    }
    if let Some(columns) = columns {
        for &v in columns {
            rows.add(slots as f64 * v);
            // Subtracting v rounded each r of its column.
            rows.magnitude += e as f64 * v.abs();
        }
        return rows;
    }
    let mut by_column = Sum::default();
    for f in 0..e {
        scratch.iter_mut().zip(r[f..].iter().step_by(e)).for_each(|(x, r)| *x = *r);
        for &x in smallest(&mut scratch, slots) {
            by_column.add(x);
        }
    }
    if by_column.value > rows.value { by_column } else { rows }
}

/// Computes a lower bound on `sum r s` over the partitions of layer l: each expert has C - 1 companions.
fn layer_value(
    relaxation: &Relaxation,
    l: usize,
    dual: &Dual,
    by_pair: &[PairValue],
    hints: Option<&Hints>,
) -> Sum {
    let Relaxation { experts: e, slots, .. } = *relaxation;
    let mut sum = Sum::default();
    if dual.lambda.is_empty() && dual.contents.is_empty() && dual.cuts.is_empty() {
        return sum; // the reduced costs of s are zeros, which takes long to find out where layers are large
    }
    let mut r = vec![0.0; e * e];
    let blocks = [(l.checked_sub(1), 2), (Some(l), 0)];
    for (side, block) in blocks {
        if let Some(side) = side.and_then(|l| by_pair.get(l)) {
            r.iter_mut().zip(&side.reduced[block * e * e..]).for_each(|(r, x)| *r += x);
            sum.magnitude += 2.0 * side.magnitude[block];
        }
    }
    if !dual.contents.is_empty() {
        let g = symmetric(&dual.contents[l * e * e..][..e * e], e);
        for (n, (r, &x)) in r.iter_mut().zip(&g).enumerate() {
            if n / e == n % e {
                sum.add(x);
            } else {
                *r += x;
                sum.magnitude += x.abs();
            }
        }
        let best = || relaxation.contents(l).search(&g, f64::NEG_INFINITY).bound;
        sum.add(-(relaxation.devices as f64) * hints.map_or_else(best, |h| h.contents[l]));
    }
    let mut scratch = Vec::with_capacity(e);
    for a in 0..e {
        scratch.clear();
        scratch.extend((0..e).filter(|&b| b != a).map(|b| r[a.min(b) * e + a.max(b)]));
        for &x in smallest(&mut scratch, slots - 1) {
            sum.add(0.5 * x);
        }
    }
    sum
}

/// Returns the `count` smallest numbers, in a fixed order that is not sorted.
fn smallest(numbers: &mut [f64], count: usize) -> &[f64] {
    if count == 0 || numbers.is_empty() {
        return &[];
    }
    let count = count.min(numbers.len());
    numbers.select_nth_unstable_by(count - 1, f64::total_cmp);
    &numbers[..count]
}
