//! The alternating direction method of multipliers (Boyd et al. 2011) on the doubly non-negative relaxation.
//!
//! `minimise sum <c_l, z_l>` over y, which obeys the linear inequalities, and `Q_l`, which obeys the spectral ones, with
//! `B_l(y) = Q_l`. The scaled multiplier `U_l` of that equation is what the bound is made of.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::certificate::{Dual, Hints, dual_value};
use super::eigen::Eigen;
use super::mixture::Mixture;
use super::relaxation::Relaxation;
use super::rows::{Pool, project};
use super::separation::{fill_matrix, separate};
use super::spectrum::centre;
use super::{GAP, ITERATIONS, Limits};

/// Over-relaxation.
const ALPHA: f64 = 1.7;
/// First penalty, in units of the mean cost.
const PENALTY: f64 = 2.0;
/// Sweeps over the inequalities in one iteration.
const SWEEPS: usize = 4;
/// Iterations between two looks at the bound, and between two separations.
const PERIOD: usize = 10;
/// Looks without progress after which the search ends, and iterations before which none is missed.
const STALLS: usize = 3;
const WARM_UP: usize = 50;
/// Progress that counts, as a share of the distance to the target.
const PROGRESS: f64 = 0.002;
/// The distance where no target is known, as a share of the bound.
const USUAL_GAP: f64 = 0.02;
/// Iterations before layers become mixtures of contents: without them an iteration takes a fraction of the time, and for
/// so long the bound rises as fast.
const UNMIXED: usize = 20;
/// Layers become mixtures only if the remaining time is so many times the past time: else more iterations prove more.
const WORTHWHILE: u32 = 5;
/// Fewest iterations: with less time the method proves nothing useful, and is not tried.
const FEWEST: u32 = 11;
/// Seconds of an eigenproblem, as a part of the cube of its order: no processor of today is faster.
const SHORTEST: f64 = 1e-9;

/// Q and U of one pair.
#[derive(Debug, Clone)]
struct Pair {
    q: Vec<f64>,
    u: Vec<f64>,
    /// Sum of the G - 1 largest eigenvalues of P U P.
    largest: f64,
    /// Squared distances of B from Q, and of Q from the Q before.
    residual: [f64; 2],
}

/// Memory of a thread.
struct Scratch {
    b: Vec<f64>,
    target: Vec<f64>,
    work: Vec<f64>,
    eigen: Eigen,
    weights: Vec<f64>,
}

impl Scratch {
    fn new(n: usize) -> Self {
        let matrix = || vec![0.0; n * n];
        Self { b: matrix(), target: matrix(), work: matrix(), eigen: Eigen::new(n), weights: vec![0.0; n] }
    }
}

/// The state of the method.
pub(super) struct Admm<'a> {
    relaxation: &'a Relaxation,
    pairs: Vec<Pair>,
    pools: Vec<Pool>,
    /// Per layer; empty before there are any.
    mixtures: Vec<Mixture>,
    y: Vec<f64>,
    sign: Vec<f64>,
    penalty: f64,
    /// Iterations done.
    pub(super) iterations: usize,
}

impl<'a> Admm<'a> {
    /// Builds the start: Q = J / G, U = 0.
    pub(super) fn new(relaxation: &'a Relaxation) -> Self {
        let n = relaxation.order();
        let pair = Pair {
            q: vec![1.0 / relaxation.devices as f64; n * n],
            u: vec![0.0; n * n],
            largest: 0.0,
            residual: [0.0; 2],
        };
        let square = relaxation.experts * relaxation.experts;
        let length = (2 * relaxation.pairs() + 1) * square;
        let mean = -relaxation.cost.iter().sum::<f64>() / relaxation.cost.len() as f64;
        Self {
            relaxation,
            mixtures: Vec::new(),
            pairs: vec![pair; relaxation.pairs()],
            pools: (0..relaxation.pairs()).into_par_iter().map(|l| Pool::new(relaxation, l)).collect(),
            y: vec![0.0; length],
            sign: vec![0.0; length],
            penalty: PENALTY * mean,
            iterations: 0,
        }
    }

    /// Returns the least time of an iteration: an eigenproblem of the experts of two layers for every pair.
    fn shortest(&self) -> Duration {
        let order = 2.0 * self.relaxation.experts as f64;
        let work = self.relaxation.pairs() as f64 * order.powi(3) / rayon::current_num_threads() as f64;
        Duration::from_secs_f64(work * SHORTEST)
    }

    /// Iterates until a limit is reached; `better` sees every dual point that is better than those before.
    ///
    /// `target` is the value of the best placement in units of the dual function.
    pub(super) fn run(
        &mut self,
        limits: &Limits<'_>,
        target: Option<f64>,
        mut better: impl FnMut(usize, Dual) -> bool,
    ) -> &'static str {
        let (start, deadline) = (Instant::now(), limits.control.deadline);
        let all = self.relaxation.total as f64 / self.relaxation.unit;
        let mut best = f64::NEG_INFINITY;
        // Looks in a row without progress, and the bound from which progress counts.
        let (mut stalls, mut mark) = (0, f64::NEG_INFINITY);
        // Time of computing the bound: the last one is computed before the time is over.
        let mut look = Duration::ZERO;
        loop {
            if limits.control.cancelled.load(Ordering::Relaxed) {
                return "interrupted";
            }
            if deadline.is_some_and(|deadline| Instant::now() + look >= deadline) {
                if look > Duration::ZERO && !self.iterations.is_multiple_of(PERIOD) {
                    let dual = self.dual();
                    if dual.estimate > best && better(self.iterations, dual) {
                        return GAP;
                    }
                }
                return "time limit";
            }
            if self.iterations >= limits.iterations {
                return ITERATIONS;
            }
            let worthwhile = |deadline: Instant| start + (1 + WORTHWHILE) * start.elapsed() < deadline;
            if self.iterations == UNMIXED && self.relaxation.has_contents && deadline.is_none_or(worthwhile) {
                self.mix();
            }
            // The time of an iteration is not known before the first one, which is not begun if its least time is too long.
            if self.iterations == 0 && deadline.is_some_and(|d| Instant::now() + self.shortest() > d) {
                return "time limit";
            }
            self.iterate();
            if self.iterations == 1 && deadline.is_some_and(|d| start + FEWEST * start.elapsed() > d) {
                return "time limit";
            }
            if !self.iterations.is_multiple_of(PERIOD) && self.iterations != limits.iterations {
                continue;
            }
            let begin = Instant::now();
            let dual = self.dual();
            if dual.estimate > best {
                best = dual.estimate;
                if better(self.iterations, dual) {
                    return GAP;
                }
            }
            look = look.max(begin.elapsed());
            let distance = target.map_or(USUAL_GAP * (all + best), |target| target - best);
            if best > mark + PROGRESS * distance.max(0.0) {
                (stalls, mark) = (0, best);
            } else if self.iterations > WARM_UP {
                stalls += 1;
            }
            if stalls >= STALLS {
                return "no further progress";
            }
            self.balance();
            if self.iterations.is_multiple_of(PERIOD) {
                self.separate();
            }
        }
    }

    /// Makes every layer a mixture of contents too, at first the nearest one to its current values.
    fn mix(&mut self) {
        let (relaxation, y) = (self.relaxation, &self.y);
        let square = relaxation.experts * relaxation.experts;
        let mixtures: Option<Vec<Mixture>> = (0..relaxation.layers)
            .into_par_iter()
            .map(|l| Mixture::new(relaxation, l, &y[2 * l * square..][..square]))
            .collect();
        let Some(mixtures) = mixtures else { return };
        self.mixtures = mixtures;
        self.pools.par_iter_mut().enumerate().for_each(|(l, pool)| pool.weigh(relaxation, l, true));
    }

    /// Makes one iteration of the method.
    fn iterate(&mut self) {
        self.set_target();
        let square = self.relaxation.experts * self.relaxation.experts;
        project(&mut self.pools, square, SWEEPS, &mut self.y, &mut self.sign);
        self.scale_layers(|v| 1.0 / v.sqrt());
        let (relaxation, y) = (self.relaxation, &self.y);
        self.pairs.par_iter_mut().enumerate().for_each_init(
            || Scratch::new(relaxation.order()),
            |scratch, (l, pair)| pair.step(relaxation, &y[2 * l * square..][..3 * square], scratch),
        );
        self.mixtures.par_iter_mut().enumerate().for_each(|(l, mixture)| {
            mixture.step(&y[2 * l * square..][..square], ALPHA);
        });
        self.iterations += 1;
    }

    /// Multiplies the s part of y by a function of its weight v.
    fn scale_layers(&mut self, factor: impl Fn(f64) -> f64) {
        let (relaxation, mixed) = (self.relaxation, !self.mixtures.is_empty());
        let square = relaxation.experts * relaxation.experts;
        for (l, block) in self.y.chunks_mut(2 * square).enumerate() {
            let factor = factor(relaxation.copies(l, mixed));
            block[..square].iter_mut().for_each(|s| *s *= factor);
        }
    }

    /// Computes the point to project: V, in scaled coordinates.
    fn set_target(&mut self) {
        let relaxation = self.relaxation;
        let (e, n) = (relaxation.experts, relaxation.order());
        let (pairs, mixtures, half) = (&self.pairs, &self.mixtures, 0.5 / self.penalty);
        self.y.par_chunks_mut(2 * e * e).enumerate().for_each(|(l, block)| {
            let (s, z) = block.split_at_mut(e * e);
            let share = 1.0 / relaxation.copies(l, !mixtures.is_empty()).sqrt();
            s.fill(0.0);
            for (pair, at) in [(l.checked_sub(1), e), (Some(l), 0)] {
                let Some(pair) = pair.and_then(|l| pairs.get(l)) else { continue };
                for i in 0..e {
                    let row = (at + i) * n + at;
                    for j in i + 1..e {
                        s[i * e + j] += share * (pair.q[row + j] - pair.u[row + j]);
                    }
                }
            }
            if let Some(mixture) = mixtures.get(l) {
                for ((s, h), u) in s.iter_mut().zip(&mixture.h).zip(&mixture.u) {
                    *s += share * (h - u);
                }
            }
            if let Some(pair) = pairs.get(l) {
                let cost = &relaxation.cost[l * e * e..][..e * e];
                for i in 0..e {
                    let row = i * n + e;
                    for f in 0..e {
                        z[i * e + f] = pair.q[row + f] - pair.u[row + f] - cost[i * e + f] * half;
                    }
                }
            }
        });
    }

    /// Adapts the penalty when one residual runs away from the other.
    fn balance(&mut self) {
        let sum = |k: usize| self.pairs.iter().map(|pair| pair.residual[k]).sum::<f64>().sqrt();
        let (primal, dual) = (sum(0), sum(1));
        let factor = if primal > 4.0 * dual {
            1.2
        } else if dual > 4.0 * primal {
            1.0 / 1.2
        } else {
            return;
        };
        self.penalty *= factor;
        let inverse = 1.0 / factor;
        self.pairs.par_iter_mut().for_each(|pair| pair.u.iter_mut().for_each(|u| *u *= inverse));
        self.mixtures.par_iter_mut().for_each(|mixture| mixture.u.iter_mut().for_each(|u| *u *= inverse));
        self.pools.par_iter_mut().for_each(|pool| pool.rescale(inverse));
    }

    /// Drops inequalities that are idle, and adds those that the point breaks most.
    fn separate(&mut self) {
        let relaxation = self.relaxation;
        self.pools.par_iter_mut().for_each(|pool| {
            pool.drop_idle();
            pool.index_triangles(relaxation);
        });
        separate(relaxation, &self.y, &mut self.pools);
    }

    /// Returns the dual point of the present iterate.
    fn dual(&mut self) -> Dual {
        let mut cuts = Vec::new();
        for (l, pool) in self.pools.iter().enumerate() {
            pool.export(self.relaxation, l, 2.0 * self.penalty, &mut cuts);
        }
        let mut lambda = Vec::with_capacity(self.pairs.len() * self.pairs[0].u.len());
        for pair in &self.pairs {
            lambda.extend(pair.u.iter().map(|u| self.penalty * u));
        }
        let twice = 2.0 * self.penalty;
        let contents = self.mixtures.iter().flat_map(|mixture| &mixture.u).map(|u| twice * u).collect();
        let largest = self.mixtures.par_iter_mut().map(|mixture| twice * mixture.largest()).collect();
        let spectrum = self.pairs.iter().map(|pair| self.penalty * pair.largest).collect();
        let mut dual = Dual { lambda, contents, cuts, ..Dual::default() };
        dual.estimate = dual_value(self.relaxation, &dual, Some(&Hints { spectrum, contents: largest }));
        dual
    }
}

impl Pair {
    /// Computes Q and U of the next iteration.
    fn step(&mut self, relaxation: &Relaxation, slice: &[f64], scratch: &mut Scratch) {
        let Relaxation { experts: e, devices, slots, .. } = *relaxation;
        let n = 2 * e;
        let Scratch { b, target, work, eigen, weights } = scratch;
        fill_matrix(e, slice, b);
        for (((u, b), q), target) in self.u.iter_mut().zip(&*b).zip(&self.q).zip(&mut *target) {
            // U keeps the point that is projected; what the projection leaves of it is the new U.
            *u += ALPHA * b + (1.0 - ALPHA) * q;
            *target = *u;
        }
        centre(target, n);
        work.copy_from_slice(target);
        eigen.decompose(work);
        let largest = 2.0 * slots as f64;
        let inside = eigen.values.iter().filter(|&&x| x > 0.0).count();
        let outside = eigen.values.iter().filter(|&&x| !(0.0..=largest).contains(&x)).count();
        // R is the part inside, or the whole less the part outside: whichever needs fewer vectors.
        if inside <= outside {
            weights.iter_mut().zip(&eigen.values).for_each(|(w, x)| *w = x.clamp(0.0, largest));
            target.fill(0.0);
        } else {
            weights.iter_mut().zip(&eigen.values).for_each(|(w, x)| *w = x.clamp(0.0, largest) - x);
        }
        eigen.add_weighted(weights, target);
        let share = 1.0 / devices as f64;
        let mut residual = [0.0; 2];
        for (((u, b), q), r) in self.u.iter_mut().zip(&*b).zip(&mut self.q).zip(&*target) {
            let new = share + r;
            residual[0] += (b - new) * (b - new);
            residual[1] += (new - *q) * (new - *q);
            *u -= new;
            *q = new;
        }
        self.residual = residual;
        weights.iter_mut().zip(&eigen.values).for_each(|(w, x)| *w = x - x.clamp(0.0, largest));
        weights.sort_unstable_by(|a, b| b.total_cmp(a));
        self.largest = weights[..devices - 1].iter().sum();
    }
}
