//! The inequalities `a y <= b` that every feasible placement obeys, beyond the semidefinite part and the signs.
//!
//! Items i, j, k are experts of one pair of layers. `p = y_ij`, `q_k = y_ik`, `r_k = y_jk`, and `t_k = 1` if all three
//! share a device: `max(0, (p + q_k + r_k - 1) / 2) <= t_k <= min(p, q_k, r_k)`. The lifted cuts state a fact about the
//! `t_k` and then replace each by a bound that is linear once a member of the max or min is *chosen*; the choice is
//! part of the cut, and any choice is valid.

use super::relaxation::Relaxation;

/// The kinds of inequalities. Their numbers are part of the certificate's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// Items i, j, k: `y_ij + y_ik - y_jk <= 1`.
    Triangle = 0,
    /// Item i, side m: the device of i carries at most `k_m` of layer m.
    LoadAbove = 1,
    /// Item i, side m: the device of i carries at least `m_m` of layer m.
    LoadBelow = 2,
    /// Side m: `sum_g p_g^2 <= (k + m) S - G k m` for the device loads p, as `(k - p)(p - m) >= 0`.
    Spread = 3,
    /// Items i, j of one layer that never fit on a device: `s_ij <= 0`.
    CoverTwo = 4,
    /// Items i, j, k of one layer that never fit on a device: `s_ij + s_ik + s_jk <= 1` (it is 0, 1 or 3 otherwise).
    CoverThree = 5,
    /// Items i, j, side m: a device with i and j has C experts of m: `(C - #{i,j in m}) p <= sum_k min(p, q_k, r_k)`.
    Gather = 6,
    /// Items i, j, side m: a device with i and j carries at most `k_m` of m:
    /// `sum_k w_k max(0, (p + q_k + r_k - 1) / 2) <= (k_m - w_{i,j in m}) p`.
    Together = 7,
    /// Items i, j, side m: a device with i and without j carries at most `k_m` of m:
    /// `sum_k w_k (q_k - min(p, q_k, r_k)) <= (k_m - w_{i in m}) (1 - p)`.
    Apart = 8,
}

impl Kind {
    /// All kinds in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Triangle,
        Self::LoadAbove,
        Self::LoadBelow,
        Self::Spread,
        Self::CoverTwo,
        Self::CoverThree,
        Self::Gather,
        Self::Together,
        Self::Apart,
    ];

    /// Returns whether the cut has a choice for each expert of its side.
    #[must_use]
    pub fn is_lifted(self) -> bool {
        matches!(self, Self::Gather | Self::Together | Self::Apart)
    }

    /// Returns whether such cuts are added when they are violated; the others are there from the start.
    pub(super) fn is_separated(self) -> bool {
        self.is_lifted() || matches!(self, Self::Triangle | Self::CoverThree)
    }
}

/// The chosen member of `min(p, q_k, r_k)`.
pub(super) mod choice {
    /// The member p.
    pub(in super::super) const P: u8 = 0;
    /// The member `q_k`.
    pub(in super::super) const Q: u8 = 1;
    /// The member `r_k`.
    pub(in super::super) const R: u8 = 2;
    /// [`super::Kind::Together`]: the max is not zero.
    pub(in super::super) const USED: u8 = 1;
}

/// One inequality of the pair of layers `pair`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Cut {
    pub(super) kind: Kind,
    pub(super) pair: u32,
    /// Items (0..2E) and then, where the kind has one, the side (0 or 1); unused places are 0.
    pub(super) items: [u32; 3],
    /// A member for each expert of the side; empty where the kind is not lifted.
    pub(super) choice: Box<[u8]>,
}

/// A sum, and that of the absolute values it was made from: what its rounding error scales with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum {
    pub(super) value: f64,
    pub(super) magnitude: f64,
}

impl Cut {
    /// Builds a cut without choices.
    pub(super) fn plain(kind: Kind, pair: usize, items: [usize; 3]) -> Self {
        Self { kind, pair: pair as u32, items: items.map(|i| i as u32), choice: Box::default() }
    }

    /// Returns whether the cut is well formed and holds for every feasible placement of this instance.
    pub(super) fn is_valid(&self, relaxation: &Relaxation) -> bool {
        let e = relaxation.experts;
        let [i, j, k] = self.items.map(|i| i as usize);
        let pair = self.pair as usize;
        if pair >= relaxation.pairs() || self.choice.len() != if self.kind.is_lifted() { e } else { 0 } {
            return false;
        }
        let layer = |item: usize| pair + item / e;
        let item = |i: usize| i < 2 * e;
        let limited = |side: usize| side < 2 && relaxation.limit[pair + side].is_some();
        let two = item(i) && item(j) && i != j;
        let three = two && item(k) && k != i && k != j;
        match self.kind {
            Kind::Triangle => three,
            Kind::LoadAbove | Kind::LoadBelow => item(i) && limited(j),
            Kind::Spread => limited(i),
            Kind::CoverTwo => two && layer(i) == layer(j) && relaxation.is_cover(layer(i), &[i % e, j % e]),
            Kind::CoverThree => {
                let one_layer = three && layer(i) == layer(j) && layer(i) == layer(k);
                one_layer && relaxation.is_cover(layer(i), &[i % e, j % e, k % e])
            }
            Kind::Gather => two && k < 2,
            Kind::Together | Kind::Apart => two && limited(k),
        }
    }

    /// Calls `term` with each coefficient of the left side (a variable may come several times) and returns the
    /// right side. The cut must be valid.
    pub(super) fn expand(&self, relaxation: &Relaxation, mut term: impl FnMut(usize, f64)) -> Sum {
        let e = relaxation.experts;
        let [i, j, k] = self.items.map(|i| i as usize);
        let y = |a, b| relaxation.variable(a, b);
        let exact = |value: f64| Sum { value, magnitude: value.abs() };
        match self.kind {
            Kind::Triangle => {
                term(y(i, j), 1.0);
                term(y(i, k), 1.0);
                term(y(j, k), -1.0);
                exact(1.0)
            }
            Kind::LoadAbove | Kind::LoadBelow => {
                let (w, limit) = self.side(relaxation, j);
                let sign = if self.kind == Kind::LoadAbove { 1.0 } else { -1.0 };
                let own_weight = if i / e == j { w[i % e] } else { 0.0 };
                for k in (0..e).filter(|k| k + j * e != i) {
                    term(y(i, k + j * e), sign * w[k]);
                }
                let edge = if sign > 0.0 { limit.0 } else { limit.1 };
                Sum { value: sign * (edge - own_weight), magnitude: edge + own_weight }
            }
            Kind::Spread => {
                let (w, (upper, lower, total)) = self.side(relaxation, i);
                let mut diagonal = 0.0;
                for a in 0..e {
                    diagonal += w[a] * w[a];
                    for b in a + 1..e {
                        term(y(a + i * e, b + i * e), 2.0 * w[a] * w[b]);
                    }
                }
                let (bound, product) = ((upper + lower) * total, relaxation.devices as f64 * upper * lower);
                Sum { value: bound - product - diagonal, magnitude: bound + product + diagonal }
            }
            Kind::CoverTwo => {
                term(y(i, j), 1.0);
                exact(0.0)
            }
            Kind::CoverThree => {
                term(y(i, j), 1.0);
                term(y(i, k), 1.0);
                term(y(j, k), 1.0);
                exact(1.0)
            }
            Kind::Gather | Kind::Together | Kind::Apart => self.expand_lifted(relaxation, term),
        }
    }

    /// Expands a lifted cut, as [`Self::expand`] does.
    fn expand_lifted(&self, relaxation: &Relaxation, mut term: impl FnMut(usize, f64)) -> Sum {
        let e = relaxation.experts;
        let [i, j, m] = self.items.map(|i| i as usize);
        let p = relaxation.variable(i, j);
        let within = |item: usize| item / e == m;
        // (expert, q_k, r_k, choice) for every k of the side but i and j.
        let others = (0..e).map(|k| (k, k + m * e)).filter(|&(_, item)| item != i && item != j);
        let others = others
            .map(|(k, item)| (k, relaxation.variable(i, item), relaxation.variable(j, item), self.choice[k]));
        match self.kind {
            Kind::Gather => {
                let inside = usize::from(within(i)) + usize::from(within(j));
                term(p, relaxation.slots as f64 - inside as f64);
                for (_, q, r, choice) in others {
                    term(member(p, q, r, choice), -1.0);
                }
                Sum { value: 0.0, magnitude: 0.0 }
            }
            Kind::Together => {
                let (w, (upper, ..)) = self.side(relaxation, m);
                let mut right = 0.0;
                term(p, -upper);
                for item in [i, j].into_iter().filter(|&item| within(item)) {
                    term(p, w[item % e]);
                }
                for (k, q, r, _) in others.filter(|&(.., choice)| choice == choice::USED) {
                    let half = 0.5 * w[k];
                    term(p, half);
                    term(q, half);
                    term(r, half);
                    right += half;
                }
                Sum { value: right, magnitude: right }
            }
            _ => {
                let (w, (upper, ..)) = self.side(relaxation, m);
                let own_weight = if within(i) { w[i % e] } else { 0.0 };
                term(p, upper - own_weight);
                for (k, q, r, choice) in others.filter(|&(.., choice)| choice != choice::Q) {
                    term(q, w[k]);
                    term(member(p, q, r, choice), -w[k]);
                }
                Sum { value: upper - own_weight, magnitude: upper + own_weight }
            }
        }
    }

    /// Returns the weights and (upper, lower, total) of a side; zeros where the side has no limit.
    fn side<'a>(&self, relaxation: &'a Relaxation, side: usize) -> (&'a [f64], (f64, f64, f64)) {
        let layer = self.pair as usize + side;
        let limit = relaxation.limit[layer].map_or((0.0, 0.0, 0.0), |l| (l.upper, l.lower, l.total));
        (relaxation.weights(layer), limit)
    }
}

/// Returns the variable of a choice.
fn member(p: usize, q: usize, r: usize, choice: u8) -> usize {
    match choice {
        choice::Q => q,
        choice::R => r,
        _ => p,
    }
}
