//! Finds the inequalities that a point breaks most, pair by pair.

use rayon::prelude::*;

use super::cuts::{Cut, Kind, choice};
use super::relaxation::Relaxation;
use super::rows::Pool;

/// Violation from which a triangle counts.
const TRIANGLE: f64 = 0.005;
/// Violation from which another cut counts, loads in units of the mean device load.
const ROW: f64 = 0.003;
/// Triangles taken in one round, per pair of layers on average.
const TRIANGLES_PER_PAIR: usize = 4000;

/// Returns how many other cuts are taken in one round, likewise. Each has some 2E coefficients: more take too long.
fn rows_per_pair(experts: usize) -> usize {
    (20_000 / experts).clamp(50, 600)
}

/// A broken inequality; `depth` ranks it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Broken {
    depth: f32,
    pair: u32,
    kind: Kind,
    items: [u32; 3],
}

/// Orders cuts by falling depth, and equal depths in a fixed order.
fn rank(a: &Broken, b: &Broken) -> std::cmp::Ordering {
    b.depth.total_cmp(&a.depth).then_with(|| (a.pair, a.kind, a.items).cmp(&(b.pair, b.kind, b.items)))
}

/// Keeps the `limit` deepest.
fn keep_deepest(broken: &mut Vec<Broken>, limit: usize) {
    if broken.len() > limit {
        broken.select_nth_unstable_by(limit, rank);
        broken.truncate(limit);
    }
}

/// Adds to the pools what `y` (all slices, unscaled) breaks most.
pub(super) fn separate(relaxation: &Relaxation, y: &[f64], pools: &mut [Pool]) {
    let (square, pairs) = (relaxation.experts * relaxation.experts, relaxation.pairs());
    let broken: Vec<[Vec<Broken>; 2]> = (0..pairs)
        .into_par_iter()
        .map(|l| {
            let point = Point::new(relaxation, l, &y[2 * l * square..][..3 * square]);
            [point.triangles(), point.rows()]
        })
        .collect();
    let (mut triangles, mut rows): (Vec<Broken>, Vec<Broken>) = (Vec::new(), Vec::new());
    for [t, r] in broken {
        triangles.extend(t);
        rows.extend(r);
    }
    keep_deepest(&mut triangles, TRIANGLES_PER_PAIR * pairs);
    keep_deepest(&mut rows, rows_per_pair(relaxation.experts) * pairs);
    // The order in a pool matters to the sweeps: by place, which is also what caches like.
    let by_place = |a: &Broken, b: &Broken| (a.pair, a.items, a.kind).cmp(&(b.pair, b.items, b.kind));
    triangles.sort_unstable_by(by_place);
    rows.sort_unstable_by(by_place);
    pools.par_iter_mut().enumerate().for_each(|(l, pool)| {
        let violations = |broken: &'_ [Broken]| {
            let start = broken.partition_point(|f| (f.pair as usize) < l);
            start..broken.partition_point(|f| f.pair as usize <= l)
        };
        for f in &triangles[violations(&triangles)] {
            pool.add_triangle(relaxation, f.items);
        }
        if !rows[violations(&rows)].is_empty() {
            let point = Point::new(relaxation, l, &y[2 * l * square..][..3 * square]);
            for f in &rows[violations(&rows)] {
                pool.add_row(relaxation, point.cut(f));
            }
        }
    });
}

/// The matrix B of a pair, with what a separation needs to know about the pair.
struct Point<'a> {
    relaxation: &'a Relaxation,
    l: usize,
    /// `[2E, 2E]`, unit diagonal.
    b: Vec<f64>,
}

impl<'a> Point<'a> {
    fn new(relaxation: &'a Relaxation, l: usize, slice: &[f64]) -> Self {
        let mut b = vec![0.0; relaxation.order() * relaxation.order()];
        fill_matrix(relaxation.experts, slice, &mut b);
        Self { relaxation, l, b }
    }

    fn row(&self, item: usize) -> &[f64] {
        let n = self.relaxation.order();
        &self.b[item * n..][..n]
    }

    fn owns_right(&self) -> bool {
        self.l + 1 == self.relaxation.pairs()
    }

    fn broken(&self, depth: f64, kind: Kind, items: [usize; 3]) -> Broken {
        Broken { depth: depth as f32, pair: self.l as u32, kind, items: items.map(|i| i as u32) }
    }

    fn triangles(&self) -> Vec<Broken> {
        let (n, e) = (self.relaxation.order(), self.relaxation.experts);
        let limit = 2 * TRIANGLES_PER_PAIR;
        let mut broken = Vec::new();
        let mut floor = TRIANGLE;
        for apex in 0..n {
            let a = self.row(apex);
            // A triple within the right layer belongs to the next pair.
            let end = if apex >= e && !self.owns_right() { e } else { n };
            for j in 0..end {
                if j == apex || a[j] <= floor {
                    continue;
                }
                let b = self.row(j);
                for (c, (block_a, block_b)) in a[j + 1..].chunks(16).zip(b[j + 1..].chunks(16)).enumerate() {
                    if excess(block_a, block_b) + a[j] - 1.0 <= floor {
                        continue;
                    }
                    for (i, (x, z)) in block_a.iter().zip(block_b).enumerate() {
                        let (k, depth) = (j + 1 + 16 * c + i, a[j] + x - z - 1.0);
                        if depth > floor && k != apex {
                            broken.push(self.broken(depth, Kind::Triangle, [apex, j, k]));
                        }
                    }
                }
                if broken.len() > 4 * limit {
                    keep_deepest(&mut broken, limit);
                    // A cut that is not above the weakest of these cannot be among the deepest.
                    floor = broken.iter().fold(f64::MAX, |m, f| m.min(f64::from(f.depth))).max(floor);
                }
            }
        }
        keep_deepest(&mut broken, limit);
        broken
    }

    fn rows(&self) -> Vec<Broken> {
        let e = self.relaxation.experts;
        let mut broken = Vec::new();
        for side in 0..2 {
            if side == 0 || self.owns_right() {
                self.covers(side, &mut broken);
            }
            for i in 0..2 * e {
                for j in i + 1..2 * e {
                    let inner = i / e == side && j / e == side;
                    if inner && side == 1 && !self.owns_right() {
                        continue;
                    }
                    self.lifted(i, j, side, &mut broken);
                }
            }
            keep_deepest(&mut broken, 4 * rows_per_pair(e));
        }
        broken
    }

    fn covers(&self, side: usize, broken: &mut Vec<Broken>) {
        let e = self.relaxation.experts;
        if self.relaxation.limit[self.l + side].is_none() && self.relaxation.slots >= 3 {
            return;
        }
        let at = |i: usize| i + side * e;
        for i in 0..e {
            let a = &self.row(at(i))[side * e..][..e];
            for j in i + 1..e {
                let b = &self.row(at(j))[side * e..][..e];
                for k in j + 1..e {
                    let depth = a[j] + a[k] + b[k] - 1.0;
                    if depth > ROW && self.relaxation.is_cover(self.l + side, &[i, j, k]) {
                        // Over the norm of three ones.
                        broken.push(self.broken(depth / 1.732, Kind::CoverThree, [at(i), at(j), at(k)]));
                    }
                }
            }
        }
    }

    fn lifted(&self, i: usize, j: usize, side: usize, broken: &mut Vec<Broken>) {
        let e = self.relaxation.experts;
        let p = self.row(i)[j];
        let q = &self.row(i)[side * e..][..e];
        let r = &self.row(j)[side * e..][..e];
        let w = self.relaxation.weights(self.l + side);
        let [gather, together, apart_i, apart_j] = lifted_sums(p, q, r, w);
        let own_weight = |item: usize| if item / e == side { w[item % e] } else { 0.0 };
        let inside = [i, j].into_iter().filter(|&item| item / e == side).count() as f64;
        // The sums ran over i and j too.
        let mut push = |kind, excess: f64, unit: f64, items| {
            if excess > ROW * unit {
                let depth = self.depth(kind, excess, p, q, r, w, items);
                broken.push(self.broken(depth, kind, items));
            }
        };
        let slots = self.relaxation.slots as f64;
        push(Kind::Gather, (slots - inside) * p - (gather - inside * p), 1.0, [i, j, side]);
        if let Some(limit) = self.relaxation.limit[self.l + side] {
            let unit = limit.total / self.relaxation.devices as f64;
            let both = own_weight(i) + own_weight(j);
            push(Kind::Together, together - both * p - (limit.upper - both) * p, unit, [i, j, side]);
            for (i, j, sum) in [(i, j, apart_i), (j, i, apart_j)] {
                let excess = sum - own_weight(i) * (1.0 - p) - (limit.upper - own_weight(i)) * (1.0 - p);
                push(Kind::Apart, excess, unit, [i, j, side]);
            }
        }
    }

    /// Returns the violation over (about) the norm of the coefficients.
    fn depth(
        &self,
        kind: Kind,
        excess: f64,
        p: f64,
        q: &[f64],
        r: &[f64],
        w: &[f64],
        items: [usize; 3],
    ) -> f64 {
        let slots = self.relaxation.slots as f64;
        let mut norm = 0.0;
        let mut on_p = 0.0;
        for ((q, r), w) in q.iter().zip(r).zip(w) {
            match kind {
                Kind::Gather => {
                    let chosen = smallest_member(p, *q, *r);
                    if chosen == choice::P { on_p -= 1.0 } else { norm += 1.0 }
                }
                Kind::Together => {
                    if p + q + r > 1.0 {
                        on_p += 0.5 * w;
                        norm += 0.5 * w * w;
                    }
                }
                _ => match smallest_member(p, *q, *r) {
                    choice::Q => {}
                    choice::P => {
                        on_p -= w;
                        norm += w * w;
                    }
                    _ => norm += 2.0 * w * w,
                },
            }
        }
        let upper = self.relaxation.limit[self.l + items[2]].map_or(0.0, |l| l.upper);
        on_p += match kind {
            Kind::Gather => slots,
            Kind::Together => -upper,
            _ => upper,
        };
        excess / (norm + on_p * on_p).sqrt().max(1e-9)
    }

    /// Returns the inequality, with its choices made at this point.
    fn cut(&self, broken: &Broken) -> Cut {
        let mut cut = Cut::plain(broken.kind, self.l, broken.items.map(|i| i as usize));
        if broken.kind.is_lifted() {
            let e = self.relaxation.experts;
            let [i, j, side] = broken.items.map(|i| i as usize);
            let p = self.row(i)[j];
            let (q, r) = (&self.row(i)[side * e..][..e], &self.row(j)[side * e..][..e]);
            let members = q.iter().zip(r).map(|(&q, &r)| match broken.kind {
                Kind::Together => u8::from(p + q + r > 1.0) * choice::USED,
                _ => smallest_member(p, q, r),
            });
            cut.choice = members.collect();
        }
        cut
    }
}

fn smallest_member(p: f64, q: f64, r: f64) -> u8 {
    if q <= p && q <= r {
        choice::Q
    } else if r <= p {
        choice::R
    } else {
        choice::P
    }
}

/// Returns the largest difference of two short rows.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn excess(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).fold(f64::MIN, |m, (a, b)| if a - b > m { a - b } else { m })
}

/// Sums over k of `min(p, q, r)`, `w max(0, (p + q + r - 1) / 2)`, `w (q - min)` and `w (r - min)`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+bmi2", "x86_64+avx2+bmi2"))]
fn lifted_sums(p: f64, q: &[f64], r: &[f64], w: &[f64]) -> [f64; 4] {
    const LANES: usize = 8;
    let mut sums = [[0.0; LANES]; 4];
    let mut add = |lane: usize, q: f64, r: f64, w: f64| {
        let least = if q < r { q } else { r };
        let least = if least < p { least } else { p };
        let twice = p + q + r - 1.0;
        sums[0][lane] += least;
        sums[1][lane] += if twice > 0.0 { 0.5 * w * twice } else { 0.0 };
        sums[2][lane] += w * (q - least);
        sums[3][lane] += w * (r - least);
    };
    let (qs, q_rest) = q.as_chunks::<LANES>();
    let (rs, r_rest) = r.as_chunks::<LANES>();
    let (ws, w_rest) = w.as_chunks::<LANES>();
    for ((q, r), w) in qs.iter().zip(rs).zip(ws) {
        for lane in 0..LANES {
            add(lane, q[lane], r[lane], w[lane]);
        }
    }
    for (lane, ((q, r), w)) in q_rest.iter().zip(r_rest).zip(w_rest).enumerate() {
        add(lane, *q, *r, *w);
    }
    sums.map(|lanes| lanes.iter().sum())
}

/// Writes the symmetric matrix B of a slice, with its unit diagonal.
pub(super) fn fill_matrix(e: usize, slice: &[f64], b: &mut [f64]) {
    let (n, square) = (2 * e, e * e);
    for i in 0..e {
        let z = &slice[square + i * e..][..e];
        b[i * n + e..][..e].copy_from_slice(z);
        for (f, &z) in z.iter().enumerate() {
            b[(e + f) * n + i] = z;
        }
        for (block, at) in [(0, 0), (2 * square, e)] {
            b[(at + i) * n + at + i] = 1.0;
            for j in i + 1..e {
                let s = slice[block + i * e + j];
                b[(at + i) * n + at + j] = s;
                b[(at + j) * n + at + i] = s;
            }
        }
    }
}
