//! Householder reduction of a symmetric matrix to tridiagonal form.
//!
//! Sums run over eight lanes in a fixed order and nothing is fused, so every x86-64 machine gives the same bits.

/// Reduces rows from the last to the first. Row k then holds the Householder vector of step k, `factors[k]` its
/// factor, `d` the diagonal and `e[k]` the entry that couples k - 1 and k.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
pub(super) fn tridiagonalise(
    a: &mut [f64],
    n: usize,
    d: &mut [f64],
    e: &mut [f64],
    factors: &mut [f64],
    scratch: &mut [f64],
) {
    let (u, rest) = scratch.split_at_mut(n);
    let (p, rest) = rest.split_at_mut(n);
    let (pending_u, pending_q) = rest.split_at_mut(n);
    pending_u.fill(0.0);
    pending_q.fill(0.0);
    factors[0] = 0.0;
    e[0] = 0.0;
    for k in (1..n).rev() {
        // The rank-two update of the step before is applied while this step reads the rows: one pass, not two.
        let row = &mut a[k * n..][..=k];
        update(row, pending_u[k], pending_q[k], pending_u, pending_q);
        d[k] = row[k];
        let x = &row[..k];
        let tail = dot(&x[..k - 1], &x[..k - 1]);
        let last = x[k - 1];
        if tail == 0.0 || !tail.is_finite() {
            factors[k] = 0.0;
            e[k] = last;
            for i in 0..k {
                update(&mut a[i * n..][..=i], pending_u[i], pending_q[i], pending_u, pending_q);
            }
            pending_u[..k].fill(0.0);
            pending_q[..k].fill(0.0);
            continue;
        }
        let norm = (tail + last * last).sqrt();
        let factor = 1.0 / (norm * (norm + last.abs()));
        u[..k].copy_from_slice(x);
        u[k - 1] = last + norm.copysign(last);
        e[k] = -norm.copysign(last);
        factors[k] = factor;
        for i in 0..k {
            let row = &mut a[i * n..][..=i];
            let sum = update_and_multiply(row, pending_u[i], pending_q[i], pending_u, pending_q, u[i], u, p);
            p[i] = sum + row[i] * u[i];
        }
        let half = 0.5 * factor * factor * dot(&p[..k], &u[..k]);
        for i in 0..k {
            pending_q[i] = factor * p[i] - half * u[i];
            pending_u[i] = u[i];
        }
        a[k * n..][..k].copy_from_slice(&u[..k]);
    }
    let (u, q) = (pending_u[0], pending_q[0]);
    d[0] = a[0] - 2.0 * u * q;
}

/// `row[j] -= ui q[j] + qi u[j]`.
#[inline(always)]
fn update(row: &mut [f64], ui: f64, qi: f64, u: &[f64], q: &[f64]) {
    let len = row.len();
    for ((x, u), q) in row.iter_mut().zip(&u[..len]).zip(&q[..len]) {
        *x -= ui * q + qi * u;
    }
}

/// The update above, then `p[j] += vi row[j]`; returns the product of row and `v`, both without the last entry.
#[inline(always)]
fn update_and_multiply(
    row: &mut [f64],
    ui: f64,
    qi: f64,
    u: &[f64],
    q: &[f64],
    vi: f64,
    v: &[f64],
    p: &mut [f64],
) -> f64 {
    const LANES: usize = 8;
    let i = row.len() - 1;
    let mut lanes = [0.0; LANES];
    let body = i / LANES * LANES;
    {
        let (rows, _) = row[..body].as_chunks_mut::<LANES>();
        let (us, _) = u[..body].as_chunks::<LANES>();
        let (qs, _) = q[..body].as_chunks::<LANES>();
        let (vs, _) = v[..body].as_chunks::<LANES>();
        let (ps, _) = p[..body].as_chunks_mut::<LANES>();
        for ((((x, u), q), v), p) in rows.iter_mut().zip(us).zip(qs).zip(vs).zip(ps) {
            for j in 0..LANES {
                let new = x[j] - (ui * q[j] + qi * u[j]);
                x[j] = new;
                lanes[j] += new * v[j];
                p[j] += vi * new;
            }
        }
    }
    let mut sum =
        ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    for j in body..i {
        let new = row[j] - (ui * q[j] + qi * u[j]);
        row[j] = new;
        sum += new * v[j];
        p[j] += vi * new;
    }
    row[i] -= ui * q[i] + qi * u[i];
    sum
}

/// The inner product, in a fixed order whatever the machine.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for j in 0..LANES {
            lanes[j] += a[j] * b[j];
        }
    }
    let mut sum =
        ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum += a * b;
    }
    sum
}

/// The product of the reflections, transposed: row k of `z` is column k of the orthogonal factor.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
pub(super) fn accumulate(a: &[f64], n: usize, factors: &[f64], z: &mut [f64]) {
    z.fill(0.0);
    for i in 0..n {
        z[i * n + i] = 1.0;
    }
    for k in 1..n {
        let factor = factors[k];
        if factor == 0.0 {
            continue;
        }
        let u = &a[k * n..][..k];
        for row in z.chunks_exact_mut(n).take(k) {
            let row = &mut row[..k];
            let along = factor * dot(row, u);
            for (x, u) in row.iter_mut().zip(u) {
                *x -= along * u;
            }
        }
    }
}
