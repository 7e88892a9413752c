//! Eigenvalues and eigenvectors of one dense symmetric matrix, sized for tens to a few hundred rows.
//!
//! Householder reduction to tridiagonal form, then implicit QL. The rotations of QL are collected and applied
//! later, many at a time, to narrow panels of columns that stay in the first-level cache: this part would
//! otherwise be bound by memory. Sums run over eight lanes in a fixed order and no multiply-add is fused, so every x86-64
//! machine gives the same bits.
//!
//! No proof relies on this file: the certificate bounds the error of its results.

/// Columns of a panel: two AVX-512 or four AVX2 registers.
const PANEL: usize = 16;

/// Rotations that are collected before they are applied.
const BATCH: usize = 1024;

/// QL steps for one eigenvalue before it is taken as it is. Three is usual.
const PATIENCE: usize = 60;

/// An eigendecomposition, with its memory.
#[derive(Debug, Clone)]
pub(super) struct Eigen {
    n: usize,
    /// Eigenvalues, not sorted.
    pub(super) values: Vec<f64>,
    /// Row k of the panels is the eigenvector of value k: entry j is at `[j / PANEL * n + k][j % PANEL]`.
    panels: Vec<[f64; PANEL]>,
    off_diagonal: Vec<f64>,
    factors: Vec<f64>,
    vectors: Vec<f64>,
    scratch: Vec<f64>,
    rotations: Vec<[f64; 2]>,
    /// First row, one past the last row.
    sweeps: Vec<(usize, usize)>,
}

impl Eigen {
    /// Allocates memory for matrices of `n` rows.
    pub(super) fn new(n: usize) -> Self {
        Self {
            n,
            values: vec![0.0; n],
            panels: vec![[0.0; PANEL]; n.div_ceil(PANEL) * n],
            off_diagonal: vec![0.0; n],
            factors: vec![0.0; n],
            vectors: vec![0.0; n * n],
            scratch: vec![0.0; 2 * n],
            rotations: Vec::with_capacity(BATCH + n),
            sweeps: Vec::new(),
        }
    }

    /// Decomposes `a`, `[n, n]`. Only its lower triangle is read, and it is overwritten.
    pub(super) fn decompose(&mut self, a: &mut [f64]) {
        let n = self.n;
        assert_eq!(a.len(), n * n);
        // A power of two leaves the bits alone and keeps squares within range.
        let largest = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let scale = if largest > 0.0 && largest.is_finite() { power_of_two_near(largest) } else { 1.0 };
        for x in a.iter_mut() {
            *x /= scale;
        }
        tridiagonalise(a, n, &mut self.values, &mut self.off_diagonal, &mut self.factors, &mut self.scratch);
        accumulate(a, n, &self.factors, &mut self.vectors);
        for (b, panel) in self.panels.chunks_exact_mut(n).enumerate() {
            let width = PANEL.min(n - b * PANEL);
            for (k, row) in panel.iter_mut().enumerate() {
                *row = [0.0; PANEL];
                row[..width].copy_from_slice(&self.vectors[k * n + b * PANEL..][..width]);
            }
        }
        self.implicit_ql();
        for x in &mut self.values {
            *x *= scale;
        }
    }

    fn implicit_ql(&mut self) {
        let n = self.n;
        // e[i] couples i and i + 1.
        self.off_diagonal.rotate_left(1);
        self.off_diagonal[n - 1] = 0.0;
        let norm = (0..n).fold(0.0f64, |m, i| m.max(self.values[i].abs() + self.off_diagonal[i].abs()));
        let negligible = f64::EPSILON * norm;
        for l in 0..n {
            for _ in 0..PATIENCE {
                let e = &self.off_diagonal;
                // Not "above": a NaN must end the search too.
                let m = (l..n - 1).find(|&m| e[m].abs() <= negligible || e[m].is_nan()).unwrap_or(n - 1);
                if m == l {
                    break;
                }
                self.ql_step(l, m);
                if self.rotations.len() >= BATCH {
                    self.apply();
                }
            }
        }
        self.apply();
    }

    /// Makes an implicit QL step on rows l..=m; its rotations are appended from the last pair of rows to the first.
    fn ql_step(&mut self, l: usize, m: usize) {
        let (d, e) = (&mut self.values, &mut self.off_diagonal);
        let half = (d[l + 1] - d[l]) / (2.0 * e[l]);
        let root = (half * half + 1.0).sqrt();
        let mut g = d[m] - d[l] + e[l] / (half + root.copysign(half));
        let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
        for i in (l..m).rev() {
            let f = s * e[i];
            let b = c * e[i];
            let r2 = f * f + g * g;
            let (sine, cosine) = if r2 > 0.0 {
                let inverse = 1.0 / r2.sqrt();
                (f * inverse, g * inverse)
            } else {
                (0.0, 1.0)
            };
            e[i + 1] = r2.sqrt();
            (s, c) = (sine, cosine);
            g = d[i + 1] - p;
            let r = (d[i] - g) * s + 2.0 * c * b;
            p = s * r;
            d[i + 1] = g + p;
            g = c * r - b;
            self.rotations.push([s, c]);
        }
        d[l] -= p;
        e[l] = g;
        e[m] = 0.0;
        self.sweeps.push((l, m));
    }

    fn apply(&mut self) {
        for panel in self.panels.chunks_exact_mut(self.n) {
            rotate(panel, &self.sweeps, &self.rotations);
        }
        self.sweeps.clear();
        self.rotations.clear();
    }

    /// Adds `sum_k weights[k] v_k v_k'` to the symmetric `out`, `[n, n]`; zero weights cost nothing.
    pub(super) fn add_weighted(&self, weights: &[f64], out: &mut [f64]) {
        let used: Vec<(usize, f64)> =
            weights.iter().copied().enumerate().filter(|&(_, w)| w != 0.0).collect();
        add_outer(&self.panels, self.n, &used, out);
    }
}

/// Returns the power of two at or below a positive finite number (subnormals: the smallest normal one).
pub(super) fn power_of_two_near(x: f64) -> f64 {
    f64::from_bits((x.to_bits() >> 52).max(1) << 52)
}

/// Reduces rows from the last to the first. Row k then holds the Householder vector of step k, `factors[k]` its
/// factor, `d` the diagonal and `e[k]` the entry that couples k - 1 and k.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn tridiagonalise(
    a: &mut [f64],
    n: usize,
    d: &mut [f64],
    e: &mut [f64],
    factors: &mut [f64],
    scratch: &mut [f64],
) {
    let (u, p) = scratch.split_at_mut(n);
    factors[0] = 0.0;
    e[0] = 0.0;
    for k in (1..n).rev() {
        let (rows, row) = a.split_at_mut(k * n);
        d[k] = row[k];
        let x = &mut row[..k];
        let (tail, last) = (dot(&x[..k - 1], &x[..k - 1]), x[k - 1]);
        if tail == 0.0 || !tail.is_finite() {
            factors[k] = 0.0;
            e[k] = last;
            continue;
        }
        let norm = (tail + last * last).sqrt();
        let factor = 1.0 / (norm * (norm + last.abs()));
        x[k - 1] = last + norm.copysign(last);
        e[k] = -norm.copysign(last);
        factors[k] = factor;
        u[..k].copy_from_slice(x);
        for (i, row) in rows.chunks_exact(n).enumerate() {
            let (ui, row) = (u[i], &row[..=i]);
            p[i] = dot(&row[..i], &u[..i]) + row[i] * ui;
            p[..i].iter_mut().zip(row).for_each(|(p, x)| *p += ui * x);
        }
        let half = 0.5 * factor * factor * dot(&p[..k], &u[..k]);
        p[..k].iter_mut().zip(&*u).for_each(|(p, u)| *p = factor * *p - half * u);
        for (i, row) in rows.chunks_exact_mut(n).enumerate() {
            let (ui, qi) = (u[i], p[i]);
            for ((x, u), q) in row[..=i].iter_mut().zip(&*u).zip(&*p) {
                *x -= ui * q + qi * u;
            }
        }
    }
    d[0] = a[0];
}

/// Computes the inner product, in an order that is the same on all machines.
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

/// Computes the transposed product of the reflections: row k of `z` is column k of the orthogonal factor.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn accumulate(a: &[f64], n: usize, factors: &[f64], z: &mut [f64]) {
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

/// Applies sweeps of rotations to neighbouring rows of a panel.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn rotate(panel: &mut [[f64; PANEL]], sweeps: &[(usize, usize)], rotations: &[[f64; 2]]) {
    let mut rotations = rotations;
    for &(l, m) in sweeps {
        let (now, rest) = rotations.split_at(m - l);
        rotations = rest;
        let rows = &mut panel[l..=m];
        let mut carried = rows[m - l];
        for (i, &[s, c]) in (0..m - l).rev().zip(now) {
            let row = rows[i];
            let mut above = [0.0; PANEL];
            for j in 0..PANEL {
                above[j] = s * row[j] + c * carried[j];
                carried[j] = c * row[j] - s * carried[j];
            }
            rows[i + 1] = above;
        }
        rows[0] = carried;
    }
}

/// Rows of the result that share each load of an eigenvector.
const ROWS: usize = 4;

/// Does the work of [`Eigen::add_weighted`].
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn add_outer(panels: &[[f64; PANEL]], n: usize, used: &[(usize, f64)], out: &mut [f64]) {
    let mut left = vec![[0.0; ROWS]; used.len()];
    let mut right = vec![[0.0; PANEL]; used.len() * n.div_ceil(PANEL)];
    for (right, panel) in right.chunks_exact_mut(used.len().max(1)).zip(panels.chunks_exact(n)) {
        for (right, &(k, _)) in right.iter_mut().zip(used) {
            *right = panel[k];
        }
    }
    for top in (0..n).step_by(ROWS) {
        let lane = top % PANEL;
        let scaled = &right[top / PANEL * used.len()..][..used.len()];
        for ((left, v), &(_, w)) in left.iter_mut().zip(scaled).zip(used) {
            for r in 0..ROWS {
                left[r] = w * v[lane + r];
            }
        }
        for b in 0..=top / PANEL {
            // Named one by one: an array of arrays would live in memory, not in registers.
            let [mut s0, mut s1, mut s2, mut s3] = [[0.0; PANEL]; ROWS];
            for (left, v) in left.iter().zip(&right[b * used.len()..][..used.len()]) {
                for j in 0..PANEL {
                    s0[j] += left[0] * v[j];
                    s1[j] += left[1] * v[j];
                    s2[j] += left[2] * v[j];
                    s3[j] += left[3] * v[j];
                }
            }
            let sums = [s0, s1, s2, s3];
            let width = PANEL.min(n - b * PANEL);
            for (sums, row) in sums.iter().zip(out[top * n..].chunks_exact_mut(n)) {
                for (x, sum) in row[b * PANEL..][..width].iter_mut().zip(sums) {
                    *x += sum;
                }
            }
        }
    }
    // The blocks above the diagonal blocks are mirrored; within a diagonal block both halves were computed.
    for i in 0..n {
        for j in i / PANEL * PANEL + PANEL..n {
            out[i * n + j] = out[j * n + i];
        }
    }
    for top in (0..n).step_by(PANEL) {
        for i in top..(top + PANEL).min(n) {
            for j in top..i {
                out[j * n + i] = out[i * n + j];
            }
        }
    }
}
