//! The pools of active inequalities and the projection onto them.
//!
//! One step of the ADMM wants the point y >= 0 nearest to a given one that obeys all inequalities of the pools. It is
//! approached by sweeps of Hildreth's method (dual coordinate ascent, one inequality at a time), warm-started
//! with the multipliers of the step before. Coordinates are scaled by the root of their weight v, which makes the
//! weighted projection a plain one. Pools of even pairs share no variable, nor do those of odd pairs.

use rayon::prelude::*;
use std::collections::HashSet;

use super::cuts::{Cut, Kind};
use super::relaxation::Relaxation;

/// Separations in a row without a multiplier after which an inequality is dropped.
const PATIENCE: u8 = 3;

/// A triangle in the slice of its pair: the variables that count +1, +1, -1.
#[derive(Debug, Clone, Copy)]
struct Triangle {
    variables: [u32; 3],
    /// Index into the table of coefficients: the blocks of the three variables as digits to base 3.
    blocks: u8,
    idle: u8,
    multiplier: f64,
}

/// An inequality with normalised coefficients, which lie in `Pool::entries`.
#[derive(Debug, Clone)]
struct Row {
    cut: Cut,
    start: u32,
    end: u32,
    right: f64,
    multiplier: f64,
    /// Normalised = original * scale.
    scale: f64,
    idle: u8,
}

/// The active inequalities of one pair.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    triangles: Vec<Triangle>,
    triangle_keys: HashSet<[u32; 3]>,
    rows: Vec<Row>,
    row_keys: HashSet<Cut>,
    /// Variable and coefficient; 32 bits are enough for a step, the certificate recomputes them.
    entries: Vec<(u32, f32)>,
    /// `1 / sqrt(v)` of the three blocks of the slice.
    block_scale: [f64; 3],
    /// Per [`Triangle::blocks`]: the three coefficients and one over their norm squared.
    table: [[f64; 4]; 27],
}

impl Pool {
    /// Builds the pool of pair l with the inequalities that are always there, before there are mixtures.
    pub(super) fn new(relaxation: &Relaxation, l: usize) -> Self {
        let mut this = Self {
            triangles: Vec::new(),
            triangle_keys: HashSet::new(),
            rows: Vec::new(),
            row_keys: HashSet::new(),
            entries: Vec::new(),
            block_scale: [1.0; 3],
            table: [[0.0; 4]; 27],
        };
        this.weigh(relaxation, l, false);
        this.add_standing(relaxation, l);
        this
    }

    /// Scales coordinates by the root of the weights that variables have with or without mixtures. Rows stay, worth
    /// the same.
    pub(super) fn weigh(&mut self, relaxation: &Relaxation, l: usize, mixed: bool) {
        let weights = [relaxation.copies(l, mixed), 1.0, relaxation.copies(l + 1, mixed)];
        self.block_scale = weights.map(|v| 1.0 / v.sqrt());
        for (code, entry) in self.table.iter_mut().enumerate() {
            let c = [code / 9, code / 3 % 3, code % 3].map(|block| self.block_scale[block]);
            *entry = [c[0], c[1], -c[2], 1.0 / (c[0] * c[0] + c[1] * c[1] + c[2] * c[2])];
        }
        self.row_keys.clear();
        self.entries.clear();
        let rows = std::mem::take(&mut self.rows);
        for (at, old) in rows.into_iter().enumerate() {
            self.add_row(relaxation, old.cut);
            let row = &mut self.rows[at];
            (row.multiplier, row.idle) = (old.multiplier * old.scale / row.scale, old.idle);
        }
    }

    /// Adds rows of loads, the spread cut, and pairs of experts that never fit together.
    fn add_standing(&mut self, relaxation: &Relaxation, l: usize) {
        let e = relaxation.experts;
        // A layer between two pairs belongs to the pair on its right.
        let owns = |side: usize| side == 0 || l + 1 == relaxation.pairs();
        for side in (0..2).filter(|&side| relaxation.limit[l + side].is_some()) {
            for item in (0..2 * e).filter(|&item| item / e != side || owns(side)) {
                for kind in [Kind::LoadAbove, Kind::LoadBelow] {
                    self.add_row(relaxation, Cut::plain(kind, l, [item, side, 0]));
                }
            }
            if owns(side) {
                self.add_row(relaxation, Cut::plain(Kind::Spread, l, [side, 0, 0]));
            }
        }
        for side in (0..2).filter(|&side| owns(side)) {
            for i in 0..e {
                for j in i + 1..e {
                    if relaxation.is_cover(l + side, &[i, j]) {
                        let items = [i + side * e, j + side * e, 0];
                        self.add_row(relaxation, Cut::plain(Kind::CoverTwo, l, items));
                    }
                }
            }
        }
    }

    /// Adds the triangle that `apex` has with `a` and `b`, unless it is there.
    pub(super) fn add_triangle(&mut self, relaxation: &Relaxation, [apex, a, b]: [u32; 3]) {
        let key = [apex, a.min(b), a.max(b)];
        if self.triangle_keys.insert(key) {
            let [apex, a, b] = key.map(|i| i as usize);
            let variables = [(apex, a), (apex, b), (a, b)].map(|(i, j)| relaxation.variable(i, j));
            let square = relaxation.experts * relaxation.experts;
            let blocks = variables.iter().fold(0, |code, v| 3 * code + v / square) as u8;
            let variables = variables.map(|v| v as u32);
            self.triangles.push(Triangle { variables, blocks, idle: 0, multiplier: 0.0 });
        }
    }

    /// Adds a row, unless it is there.
    pub(super) fn add_row(&mut self, relaxation: &Relaxation, cut: Cut) {
        if self.row_keys.contains(&cut) {
            return;
        }
        let square = relaxation.experts * relaxation.experts;
        let mut terms: Vec<(u32, f64)> = Vec::new();
        let right = cut.expand(relaxation, |variable, x| terms.push((variable as u32, x)));
        terms.sort_by_key(|&(variable, _)| variable);
        terms.dedup_by(|(b, y), (a, x)| {
            let is_same = a == b;
            if is_same {
                *x += *y;
            }
            is_same
        });
        if terms.iter().all(|(_, x)| x.abs() < 1e-9) {
            return;
        }
        for (variable, x) in &mut terms {
            *x *= self.block_scale[*variable as usize / square];
        }
        let norm = terms.iter().map(|(_, x)| x * x).sum::<f64>().sqrt();
        let scale = 1.0 / norm;
        let start = self.entries.len() as u32;
        self.entries.extend(
            terms.iter().filter(|&&(_, x)| x.abs() > 1e-12 * norm).map(|&(v, x)| (v, (x * scale) as f32)),
        );
        let (end, right) = (self.entries.len() as u32, right.value * scale);
        self.row_keys.insert(cut.clone());
        self.rows.push(Row { cut, start, end, right, multiplier: 0.0, scale, idle: 0 });
    }

    /// Subtracts `A' mu` from the slice, so that the sweeps go on from the multipliers of the last step.
    fn warm_start(&self, y: &mut [f64]) {
        for t in self.triangles.iter().filter(|t| t.multiplier > 0.0) {
            let c = &self.table[usize::from(t.blocks)];
            for (&variable, c) in t.variables.iter().zip(c) {
                y[variable as usize] -= c * t.multiplier;
            }
        }
        for row in self.rows.iter().filter(|row| row.multiplier > 0.0) {
            for &(variable, x) in &self.entries[row.start as usize..row.end as usize] {
                y[variable as usize] -= f64::from(x) * row.multiplier;
            }
        }
    }

    /// Makes an exact step in the multiplier of every inequality in turn.
    fn sweep(&mut self, y: &mut [f64]) {
        for t in &mut self.triangles {
            let [a, b, c] = t.variables.map(|v| v as usize);
            let &[x0, x1, x2, inverse] = &self.table[usize::from(t.blocks)];
            let excess = x0 * y[a] + x1 * y[b] + x2 * y[c] - 1.0;
            if excess > 0.0 || t.multiplier > 0.0 {
                let step = (excess * inverse).max(-t.multiplier);
                t.multiplier += step;
                y[a] -= x0 * step;
                y[b] -= x1 * step;
                y[c] -= x2 * step;
            }
        }
        for row in &mut self.rows {
            let entries = &self.entries[row.start as usize..row.end as usize];
            let excess = product(entries, y) - row.right;
            if excess > 0.0 || row.multiplier > 0.0 {
                let step = excess.max(-row.multiplier);
                row.multiplier += step;
                for &(variable, x) in entries {
                    y[variable as usize] -= f64::from(x) * step;
                }
            }
        }
    }

    /// Multiplies all multipliers, when the penalty changes.
    pub(super) fn rescale(&mut self, factor: f64) {
        self.triangles.iter_mut().for_each(|t| t.multiplier *= factor);
        self.rows.iter_mut().for_each(|row| row.multiplier *= factor);
    }

    /// Drops inequalities whose multiplier has been zero for several rounds.
    pub(super) fn drop_idle(&mut self) {
        self.triangles.retain_mut(|t| {
            t.idle = if t.multiplier > 0.0 { 0 } else { t.idle + 1 };
            t.idle < PATIENCE
        });
        let mut retained = Vec::with_capacity(self.entries.len());
        let entries = &self.entries;
        self.rows.retain_mut(|row| {
            row.idle = if row.multiplier > 0.0 || !row.cut.kind.is_separated() { 0 } else { row.idle + 1 };
            let is_active = row.idle < PATIENCE;
            if is_active {
                let start = retained.len() as u32;
                retained.extend_from_slice(&entries[row.start as usize..row.end as usize]);
                (row.start, row.end) = (start, retained.len() as u32);
            }
            is_active
        });
        self.entries = retained;
        self.row_keys = self.rows.iter().map(|row| row.cut.clone()).collect();
    }

    /// Indexes the triangles that [`Self::drop_idle`] leaves, so that dropped ones may come back.
    pub(super) fn index_triangles(&mut self, relaxation: &Relaxation) {
        self.triangle_keys = self.triangles.iter().map(|t| apex_first(relaxation, t)).collect();
    }

    /// Appends the inequalities with a multiplier, times `factor`, in terms of their original coefficients.
    pub(super) fn export(&self, relaxation: &Relaxation, l: usize, factor: f64, cuts: &mut Vec<(Cut, f64)>) {
        for t in self.triangles.iter().filter(|t| t.multiplier > 0.0) {
            let items = apex_first(relaxation, t).map(|i| i as usize);
            cuts.push((Cut::plain(Kind::Triangle, l, items), factor * t.multiplier));
        }
        for row in self.rows.iter().filter(|row| row.multiplier > 0.0) {
            cuts.push((row.cut.clone(), factor * row.multiplier * row.scale));
        }
    }
}

/// Returns the items of a triangle, that of the two positive variables first.
fn apex_first(relaxation: &Relaxation, t: &Triangle) -> [u32; 3] {
    let (a, b) = relaxation.items(t.variables[0] as usize);
    let (c, d) = relaxation.items(t.variables[1] as usize);
    let apex = if a == c || a == d { a } else { b };
    let (i, j) = (a + b - apex, c + d - apex);
    [apex as u32, i.min(j) as u32, i.max(j) as u32]
}

/// Computes the product of a row and the slice.
#[inline(always)]
fn product(entries: &[(u32, f32)], y: &[f64]) -> f64 {
    let (body, rest) = entries.as_chunks::<4>();
    let mut lanes = [0.0; 4];
    for entries in body {
        for (lane, &(variable, x)) in lanes.iter_mut().zip(entries) {
            *lane += f64::from(x) * y[variable as usize];
        }
    }
    let rest: f64 = rest.iter().map(|&(variable, x)| f64::from(x) * y[variable as usize]).sum();
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]) + rest
}

/// Moves scaled `y` (all slices) towards its projection. `sign` is scratch of the same length.
pub(super) fn project(pools: &mut [Pool], square: usize, sweeps: usize, y: &mut [f64], sign: &mut [f64]) {
    for_all_pools(pools, square, y, |pool, y| pool.warm_start(y));
    sign.fill(0.0);
    for _ in 0..sweeps {
        enforce_sign(y, sign);
        for_all_pools(pools, square, y, Pool::sweep);
    }
    enforce_sign(y, sign);
}

/// Makes the step for `y >= 0`: subtracts the multiplier in `sign`, and finds the new one.
fn enforce_sign(y: &mut [f64], sign: &mut [f64]) {
    const BLOCK: usize = 1 << 13;
    y.par_chunks_mut(BLOCK).zip(sign.par_chunks_mut(BLOCK)).for_each(|(y, sign)| {
        for (y, sign) in y.iter_mut().zip(sign) {
            let free = *y - *sign;
            *y = free.max(0.0);
            *sign = *y - free;
        }
    });
}

/// Runs `work` on all pools, even pairs first; within each half the slices are disjoint.
fn for_all_pools(
    pools: &mut [Pool],
    square: usize,
    y: &mut [f64],
    work: impl Fn(&mut Pool, &mut [f64]) + Sync,
) {
    for parity in 0..2.min(pools.len()) {
        let slices = y[parity * 2 * square..].par_chunks_mut(4 * square);
        slices.zip(pools.par_chunks_mut(2)).for_each(|(slice, pools)| {
            if let Some(pool) = pools.get_mut(parity) {
                work(pool, &mut slice[..3 * square]);
            }
        });
    }
}
