//! A proven upper bound on the sum of the largest eigenvalues of a centred symmetric matrix.
//!
//! The eigensolver is not trusted. For whatever V (square) and d it returned,
//! * `A = V' diag(d) V + F`, so by Weyl every eigenvalue of A is at most that of `V' diag(d) V` plus `|F|`;
//! * if `|V'V - I| = o < 1`, then by Ostrowski the i-th eigenvalue of `V' diag(d) V` is `t d_i` with `1 - o <= t <= 1 + o`.
//!
//! Both norms (Frobenius) are computed, and the rounding of the computation is bounded by the usual
//! `n u |x|'|y|` for inner products. If the solver failed, the Frobenius norm of A is a bound by itself.

use super::eigen::Eigen;

/// Computes `A = P lambda P`, with P the centring inside each half, and a bound on its rounding error (Frobenius norm).
fn centred(lambda: &[f64], n: usize) -> (Vec<f64>, f64) {
    let mut a = lambda.to_vec();
    centre(&mut a, n);
    // Rounding may have left a and its mirror image apart by a bit.
    for i in 0..n {
        for j in 0..i {
            a[j * n + i] = a[i * n + j];
        }
    }
    // Taking means does not raise the Frobenius norm, so each of the four terms is below that of lambda.
    let error = 8.0 * ((n / 2) as f64 + 8.0) * f64::EPSILON * frobenius(lambda);
    (a, error)
}

/// Computes an upper bound on the sum of the `count` largest eigenvalues of `P lambda P`, `[n, n]`.
pub(super) fn largest_sum(lambda: &[f64], n: usize, count: usize) -> f64 {
    let (a, mut error) = centred(lambda, n);
    let norm = frobenius(&a);
    let (size, wanted) = (n as f64, count as f64);
    if norm == 0.0 {
        return wanted * error;
    }
    let mut eigen = Eigen::new(n);
    let mut work = a.clone();
    eigen.decompose(&mut work);
    work.fill(0.0);
    eigen.add_weighted(&vec![1.0; n], &mut work);
    for i in 0..n {
        work[i * n + i] -= 1.0;
    }
    let defect = frobenius(&work) + (size + 4.0) * size * 2.0 * f64::EPSILON;
    let largest = eigen.values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (work, a) in work.iter_mut().zip(&a) {
        *work = -a;
    }
    eigen.add_weighted(&eigen.values, &mut work);
    error += frobenius(&work) + (size + 4.0) * size * 2.0 * f64::EPSILON * (largest + norm);
    if defect.is_nan() || defect >= 0.5 {
        return wanted.sqrt() * norm * (1.0 + 1e-9) + wanted * error;
    }
    eigen.values.sort_unstable_by(|a, b| b.total_cmp(a));
    let sum: f64 = eigen.values[..count.min(n)].iter().map(|x| x + defect * x.abs()).sum();
    sum + wanted * error
}

/// Centres rows and columns inside each half.
pub(super) fn centre(a: &mut [f64], n: usize) {
    let half = n / 2;
    let size = half as f64;
    let mut means = vec![[0.0; 2]; n];
    let mut grand = [[0.0; 2]; 2];
    for (i, (row, means)) in a.chunks_exact(n).zip(&mut means).enumerate() {
        for side in 0..2 {
            means[side] = row[side * half..][..half].iter().sum::<f64>() / size;
            grand[i / half][side] += means[side] / size;
        }
    }
    for (i, row) in a.chunks_exact_mut(n).enumerate() {
        for side in 0..2 {
            let shift = means[i][side] - grand[i / half][side];
            for (x, mean) in row[side * half..][..half].iter_mut().zip(&means[side * half..]) {
                *x -= mean[i / half] + shift;
            }
        }
    }
}

/// Returns an upper bound on the Frobenius norm.
fn frobenius(a: &[f64]) -> f64 {
    // The relative error of the sum of squares is far below the factor.
    a.iter().map(|x| x * x).sum::<f64>().sqrt() * (1.0 + 1e-9)
}
