//! A proven lower bound on the crossing count of every placement on interchangeable devices.
//!
//! # Relaxation
//!
//! Name no device. `s_l(e, e') = 1` if experts e, e' of layer l share a device, `z_l(e, f) = 1` if expert e of layer l and
//! expert f of layer l + 1 do. With G devices of C slots and `c_l = -transitions`, the crossing count is
//! `sum transitions + sum_l <c_l, z_l>`. For each pair of neighbouring layers the 2E x 2E matrix
//! `B_l = [[s_l, z_l], [z_l', s_{l+1}]]`, unit diagonal, is `sum_g x_g x_g'` with the 0/1 vectors of the devices' contents.
//! These are orthogonal, of square length 2C, and their sum is the vector of ones. So, with P the centring inside
//! each layer, `B_l = J / G + R` where `R = P R P` has G - 1 eigenvalues 2C and the rest 0, and we relax to
//! `0 <= R <= 2C I`, `tr R = 2C (G - 1)`, `B_l >= 0` (a doubly non-negative relaxation), and linear cuts `a_t y <= b_t` that
//! every feasible placement obeys, see [`Kind`].
//!
//! Load caps are what makes the relaxation weak: it mixes placements whose loads are off in both directions. Cuts help a
//! little. Where a layer has not too many sets of C experts they are taken at their word instead: `s_l`, with its unit
//! diagonal, is the sum of `x x'` over the contents of G devices, so it is a mixture `h_l`, of weight G, of the `x x'` of
//! feasible contents. On real traces this more than halves the gap.
//!
//! # Bound
//!
//! For any symmetric `Lambda_l` and `Gamma_l`, any `m_t >= 0` and any column numbers `v_l`, put
//!
//! ```text
//! r_z,l(e, f)  = c_l(e, f) + 2 Lambda_l[e, E + f] + sum_t m_t a_t(z_l(e, f))
//! r_s,l(e, e') = 2 Lambda_l[e, e'] + 2 Lambda_{l-1}[E + e, E + e'] + Gamma_l[e, e'] + sum_t m_t a_t(s_l(e, e'))
//! D = sum_l [ tr Lambda_l - 1' Lambda_l 1 / G - 2C (sum of the G - 1 largest eigenvalues of P Lambda_l P) ] - sum_t m_t b_t
//!   + sum_l [ sum_e (C smallest of r_z,l(e, f) - v_l(f)) + C sum_f v_l(f) ]
//!   + sum_l sum_e (C - 1 smallest of r_s,l(e, e'), e' != e) / 2
//!   + sum_l [ tr Gamma_l - G (largest sum of Gamma_l over the pairs and the diagonal of a feasible content) ]
//! ```
//!
//! Then `sum transitions + D` is a lower bound. For a placement take its y, `Q_l = B_l(y)` and `h_l = s_l`; then `<c, z>` is
//! at least `<c, z> + sum_l <Lambda_l, B_l(y) - Q_l> + sum_l <Gamma_l, s_l - h_l> + sum_t m_t (a_t y - b_t)` (with each pair of
//! `Gamma_l` counted once), as the last sum is not positive and the two before are 0. Collect terms. The part in h is at
//! least what the last line says, as G contents make it up. The part in y is
//! `sum r y + sum_l (tr Lambda_l + tr Gamma_l)`; in `z_l` every row and column holds C ones and in `s_l` every row C - 1
//! besides the diagonal, which gives the selections (a half, as each s lies in two rows; v is added and taken away again). The part in Q is `-<Lambda_l, J> / G - <P Lambda_l P, R>`, and by Ky Fan's theorem the last is at
//! least minus 2C times the sum of the G - 1 largest eigenvalues, R being what it is.
//!
//! The bound holds for any multipliers. They come from an ADMM that may be stopped at any time; stopped early it proves
//! less, never something false.
//!
//! # Rounding
//!
//! [`verify`] recomputes D from the instance and the [`Certificate`] alone, coefficients of the cuts included. Counts
//! are scaled by powers of two; every sum is accompanied by the sum of its absolute values, and the number of roundings
//! times that is subtracted. Eigenvalues are bounded by the residual of whatever the eigensolver returned; contents are
//! searched exhaustively, by branch and bound. The crossing count is an integer, so the result is rounded up.

// Kernels must end up inside their multiversioned callers, or they are compiled for the oldest machine.
#![allow(clippy::inline_always)]

mod branch;
mod certificate;
mod contents;
mod cuts;
mod eigen;
mod mixture;
mod relaxation;
mod rows;
mod semidefinite;
mod separation;
mod spectrum;
mod transport;
pub mod visits;

pub use certificate::{Certificate, verify};
pub use cuts::Kind;

use crate::control::Control;
use crate::error::{Result, room_for};
use certificate::{Dual, crossing, dual_value};
use relaxation::Relaxation;
use semidefinite::Admm;

/// Experts per layer beyond which only the transportation bound is tried: an iteration would take minutes.
const LARGEST: usize = 512;

/// Ends of a search: the gap is small enough, or there is nothing to prove; the iterations are spent.
const GAP: &str = "gap reached";
const ITERATIONS: &str = "iterations";

/// A joint placement problem on interchangeable devices: how few transitions can cross devices?
#[derive(Debug, Clone, Copy)]
pub struct Instance<'a> {
    /// Layers, L.
    pub layers: usize,
    /// Experts of a layer.
    pub experts: usize,
    /// Devices, G. Each has C = `ceil(experts / devices)` slots in every layer.
    pub devices: usize,
    /// `[L - 1, experts, experts]`.
    pub transitions: &'a [u64],
    /// `[L, experts]`.
    pub load: &'a [u64],
    /// `[L]`: the largest load that a device may carry; `u64::MAX` for none.
    pub cap: &'a [u64],
}

impl Instance<'_> {
    /// Refuses what memory cannot hold: dummies fill up the devices, and a pair has a handful of tables.
    fn check(&self) -> Result<()> {
        let full = self.experts.next_multiple_of(self.devices);
        room_for("pairs of the bound", &[self.layers, full, full, 8 * size_of::<f64>()])
    }

    /// Returns whether nothing can cross, or no transition was counted.
    fn is_trivial(&self) -> bool {
        self.layers < 2 || self.devices < 2 || self.transitions.iter().all(|&t| t == 0)
    }
}

/// When to stop, whatever comes first.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Iterations of the semidefinite method: 50 for a quick answer, 150 for a good one, flat after 500.
    pub iterations: usize,
    /// Crossing count of the best known placement; `None` where none is known.
    pub target: Option<u64>,
    /// Good enough: `(target - bound) / target`.
    pub gap: f64,
    /// When to end whatever it is; the iteration in hand and the last proof are finished. With a deadline the result
    /// depends on the machine.
    pub control: &'a Control,
}

impl Limits<'_> {
    /// Returns whether the gap of a bound is small enough.
    fn is_reached(&self, cost: u64) -> bool {
        self.target.is_some_and(|target| (target as f64) - cost as f64 <= self.gap * target as f64)
    }
}

/// A bound with its proof.
#[derive(Debug, Clone)]
pub struct Bound {
    /// No feasible placement has fewer transitions between devices.
    pub cost: u64,
    /// Which bound it is: `trivial`, `transportation` or `semidefinite`.
    pub source: &'static str,
    /// Iterations done.
    pub iterations: usize,
    /// Why it ended.
    pub end: &'static str,
    /// The proof that [`verify`] checks.
    pub certificate: Certificate,
}

/// Bounds the crossing count from below.
///
/// Runs on the ambient rayon pool; without a deadline the result is a function of the instance and the limits alone,
/// whatever the number of threads. `report` gets the proven bound whenever it has risen.
///
/// If no placement is feasible, any bound is right, and what is returned means nothing.
pub fn bound(instance: &Instance<'_>, limits: &Limits<'_>, report: impl FnMut(u64)) -> Result<Bound> {
    instance.check()?;
    if instance.is_trivial() {
        let certificate = Certificate::default();
        return Ok(Bound { cost: 0, source: "trivial", iterations: 0, end: GAP, certificate });
    }
    Ok(search(&Relaxation::new(instance), limits, report))
}

/// Bounds the crossing count of a relaxation, as [`bound`] does.
fn search(relaxation: &Relaxation, limits: &Limits<'_>, report: impl FnMut(u64)) -> Bound {
    let mut best = Best::new(relaxation, limits, report);
    if best.is_reached() {
        return best.finish(GAP, 0);
    }
    if relaxation.experts > LARGEST {
        return best.finish("size", 0);
    }
    if limits.iterations == 0 {
        return best.finish(ITERATIONS, 0);
    }
    // Costs and D share their unit and their zero: all transitions inside devices.
    let target = limits.target.map(|target| (target as f64 - relaxation.total as f64) / relaxation.unit);
    let mut admm = Admm::new(relaxation);
    let end = admm.run(limits, target, |iterations, dual| best.offer(iterations, dual));
    best.finish(end, admm.iterations)
}

/// The best dual point: proven, and perhaps a better one whose proof waits.
struct Best<'a, F> {
    relaxation: &'a Relaxation,
    limits: &'a Limits<'a>,
    report: F,
    cost: u64,
    source: &'static str,
    proven: Dual,
    waiting: Option<Dual>,
    /// Iterations before which no proof is made: proofs cost as much as iterations, so they are spaced out.
    next: usize,
}

impl<'a, F: FnMut(u64)> Best<'a, F> {
    /// Proves the transportation bound, from which the search starts.
    fn new(relaxation: &'a Relaxation, limits: &'a Limits<'a>, report: F) -> Self {
        let proven =
            Dual { columns: transport::all_columns(relaxation, limits.control.deadline), ..Dual::default() };
        let source = "transportation";
        let mut this = Self { relaxation, limits, report, cost: 0, source, proven, waiting: None, next: 0 };
        this.cost = this.prove(&this.proven);
        (this.report)(this.cost);
        this
    }

    /// Computes the proven bound of a dual point.
    fn prove(&self, dual: &Dual) -> u64 {
        crossing(self.relaxation, dual_value(self.relaxation, dual, None))
    }

    /// Returns whether the proven bound is good enough.
    fn is_reached(&self) -> bool {
        self.limits.is_reached(self.cost)
    }

    /// Takes a better point; returns whether the bound is good enough to stop.
    fn offer(&mut self, iterations: usize, dual: Dual) -> bool {
        let is_promising = self.limits.is_reached(crossing(self.relaxation, dual.estimate));
        self.waiting = Some(dual);
        if is_promising || iterations >= self.next {
            self.prove_waiting();
            self.next = iterations + iterations.div_ceil(5);
        }
        is_promising && self.is_reached()
    }

    /// Proves the point that waits, and takes it if it is better.
    fn prove_waiting(&mut self) {
        let Some(dual) = self.waiting.take() else { return };
        let cost = self.prove(&dual);
        if cost > self.cost {
            (self.cost, self.source, self.proven) = (cost, "semidefinite", dual);
            (self.report)(cost);
        }
    }

    /// Returns the best bound.
    fn finish(mut self, end: &'static str, iterations: usize) -> Bound {
        self.prove_waiting();
        let certificate = Certificate::write(self.proven);
        Bound { cost: self.cost, source: self.source, iterations, end, certificate }
    }
}
