//! The transportation bound: what the counts of one pair of layers prove without eigenvectors.
//!
//! In `z_l` every row and every column holds C ones, so `<r, z>` is at least the optimum of a transportation problem
//! with capacities of one. Its dual, for any numbers `v` of the columns, is
//! `sum_e (C smallest of r_ef - v_f) + C sum_f v_f`; with `v = 0` that is the degree bound. Ascent in u (of the rows) and
//! v in turn gives good v: each has its best value between the C-th and the next reduced cost of its line.

use std::time::Instant;

use rayon::prelude::*;

use super::relaxation::Relaxation;

/// Rounds of ascent: the value is flat after a dozen.
const ROUNDS: usize = 16;
/// Time of the proof, in evaluations of a pair.
const PROOF: u32 = 4;

/// Computes column multipliers for the costs of every pair, `[M, E]`; with less ascent where the time is over.
pub(super) fn all_columns(relaxation: &Relaxation, deadline: Option<Instant>) -> Vec<f64> {
    let e = relaxation.experts;
    let pairs: Vec<Vec<f64>> =
        relaxation.cost.par_chunks(e * e).map(|cost| columns(cost, e, relaxation.slots, deadline)).collect();
    pairs.concat()
}

/// Computes column multipliers for the table `r`, `[E, E]`, and `slots` ones in each line.
///
/// They are not worse than all zeros, up to rounding.
fn columns(r: &[f64], e: usize, slots: usize, deadline: Option<Instant>) -> Vec<f64> {
    let mut transposed = vec![0.0; e * e];
    for (i, row) in r.chunks_exact(e).enumerate() {
        for (f, &x) in row.iter().enumerate() {
            transposed[f * e + i] = x;
        }
    }
    let mut v = vec![0.0; e];
    if slots >= e {
        return v;
    }
    let begin = Instant::now();
    let (mut best, mut best_columns) = (value(r, &v, slots), v.clone());
    // The proof, after the deadline if need be, takes some times as long.
    let proof = PROOF * begin.elapsed();
    let (mut u, mut scratch) = (vec![0.0; e], vec![0.0; e]);
    for _ in 0..ROUNDS {
        if deadline.is_some_and(|deadline| Instant::now() + proof >= deadline) {
            break;
        }
        thresholds(r, &v, slots, &mut u, &mut scratch);
        thresholds(&transposed, &u, slots, &mut v, &mut scratch);
        let now = value(r, &v, slots);
        if now > best {
            best = now;
            best_columns.copy_from_slice(&v);
        }
    }
    best_columns
}

/// Returns for each line of `r` the middle between the C-th and the next smallest reduced cost.
fn thresholds(r: &[f64], other: &[f64], slots: usize, out: &mut [f64], scratch: &mut [f64]) {
    for (line, out) in r.chunks_exact(other.len()).zip(out) {
        scratch.iter_mut().zip(line).zip(other).for_each(|((x, r), v)| *x = r - v);
        let (low, &mut next, _) = scratch.select_nth_unstable_by(slots, f64::total_cmp);
        let last = low.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        *out = 0.5 * (last + next);
    }
}

/// Returns the dual value of `v`.
fn value(r: &[f64], v: &[f64], slots: usize) -> f64 {
    let mut scratch = vec![0.0; v.len()];
    let mut sum = slots as f64 * v.iter().sum::<f64>();
    for line in r.chunks_exact(v.len()) {
        scratch.iter_mut().zip(line).zip(v).for_each(|((x, r), v)| *x = r - v);
        scratch.select_nth_unstable_by(slots - 1, f64::total_cmp);
        sum += scratch[..slots].iter().sum::<f64>();
    }
    sum
}
