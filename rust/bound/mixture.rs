//! A layer's `s` as a mixture of contents.
//!
//! In a placement `s_l`, with a unit diagonal, is the sum of `x x'` over G contents. The relaxation allows any mixture of
//! contents of weight G. The one nearest to a given matrix is approached by moving weight from the worst content
//! in use to the best one known, and new contents come from climbing and from the search.

use super::contents::{Contents, Set, members};
use super::relaxation::Relaxation;

/// Approaches to the first mixture, which begins far away.
const APPROACHES: usize = 5;
/// Times that contents are improved by climbing, in one approach.
const ROUNDS: usize = 2;
/// Contents that start a climb.
const STARTS: usize = 30;
/// Moves of weight after each.
const MOVES: usize = 60;
/// Differences of value that count.
const TOLERANCE: f64 = 1e-7;
/// Approaches after which a content without weight is forgotten.
const PATIENCE: u8 = 10;

/// A content of a mixture.
#[derive(Debug, Clone, Copy)]
struct Component {
    set: Set,
    weight: f64,
    /// Sum of the residual over the content.
    value: f64,
    /// Approaches since the content had a weight.
    idle: u8,
}

/// A mixture of the contents of one layer, and the multiplier of `s = h`.
#[derive(Debug, Clone)]
pub(super) struct Mixture {
    contents: Contents,
    components: Vec<Component>,
    experts: usize,
    /// The mixture, `[E, E]`, symmetric, with its diagonal.
    pub(super) h: Vec<f64>,
    /// The scaled multiplier, alike.
    pub(super) u: Vec<f64>,
}

impl Mixture {
    /// Builds a mixture near `s`, `[E, E]` above the diagonal, with a multiplier of zero; `None` if no content is feasible.
    pub(super) fn new(relaxation: &Relaxation, l: usize, s: &[f64]) -> Option<Self> {
        let contents = relaxation.contents(l);
        let experts = relaxation.experts;
        let zero = vec![0.0; experts * experts];
        let set = contents.search(&zero, f64::NEG_INFINITY).sets.first()?.1;
        let component = Component { set, weight: relaxation.devices as f64, value: 0.0, idle: 0 };
        let mut this = Self { contents, components: vec![component], experts, h: zero.clone(), u: zero };
        for _ in 0..APPROACHES {
            this.u.fill(0.0);
            this.step(s, 1.0);
        }
        this.u.fill(0.0);
        Some(this)
    }

    /// Iterates once: over-relaxes `s`, `[E, E]` above the diagonal, projects, and stores the rest in u.
    pub(super) fn step(&mut self, s: &[f64], alpha: f64) {
        let e = self.experts;
        let mut target = vec![0.0; e * e];
        for i in 0..e {
            for j in i..e {
                let now = if i == j { 1.0 } else { s[i * e + j] };
                let x = alpha * now + (1.0 - alpha) * self.h[i * e + j] + self.u[i * e + j];
                target[i * e + j] = x;
                target[j * e + i] = x;
            }
        }
        self.subtract(&target);
        self.exchange();
        for _ in 0..ROUNDS {
            self.subtract(&target);
            if !self.climb() {
                break;
            }
            self.exchange();
        }
        self.subtract(&target);
        self.components.retain_mut(|component| {
            component.idle = if component.weight > 0.0 { 0 } else { component.idle + 1 };
            component.idle < PATIENCE
        });
    }

    /// Returns the largest sum of u over a content, proven. The contents that the search finds join the mixture.
    pub(super) fn largest(&mut self) -> f64 {
        let floor = self.top();
        let harvest = self.contents.search(&self.u, floor);
        for (value, set) in harvest.sets {
            self.join(set, value);
        }
        harvest.bound.max(floor)
    }

    /// Returns the largest value of a content of the mixture.
    fn top(&self) -> f64 {
        self.components.iter().fold(f64::NEG_INFINITY, |m, component| m.max(component.value))
    }

    /// Adds a content without weight unless the mixture has it; returns whether it was added.
    fn join(&mut self, set: Set, value: f64) -> bool {
        let is_new = self.components.iter().all(|component| component.set != set);
        if is_new {
            self.components.push(Component { set, weight: 0.0, value, idle: 0 });
        }
        is_new
    }

    /// Computes `u = target - h` with h computed anew, and the values of contents.
    fn subtract(&mut self, target: &[f64]) {
        self.rebuild();
        for (u, (t, h)) in self.u.iter_mut().zip(target.iter().zip(&self.h)) {
            *u = t - h;
        }
        let e = self.experts;
        for component in &mut self.components {
            let rows = members(component.set).map(|i| {
                let row = &self.u[i * e..][..e];
                members(component.set).take_while(|&j| j <= i).map(|j| row[j]).sum::<f64>()
            });
            component.value = rows.sum();
        }
    }

    /// Computes h from the weights of contents.
    fn rebuild(&mut self) {
        self.h.fill(0.0);
        for component in self.components.iter().filter(|component| component.weight > 0.0) {
            for i in members(component.set) {
                let row = &mut self.h[i * self.experts..][..self.experts];
                for j in members(component.set) {
                    row[j] += component.weight;
                }
            }
        }
    }

    /// Climbs from the contents of the largest values; returns whether there is a new content.
    fn climb(&mut self) -> bool {
        self.components.sort_unstable_by(|a, b| b.value.total_cmp(&a.value).then(a.set.cmp(&b.set)));
        let enough = self.top() + 10.0 * TOLERANCE;
        let mut new = false;
        for n in 0..STARTS.min(self.components.len()) {
            let component = self.components[n];
            let (gain, set) = self.contents.climb(&self.u, component.set);
            if component.value + gain > enough {
                new |= self.join(set, component.value + gain);
            }
        }
        new
    }

    /// Moves weight from the worst content to the best while it helps, each time as far as it helps.
    fn exchange(&mut self) {
        for _ in 0..MOVES {
            let (mut best, mut worst) = (0, None);
            for (n, component) in self.components.iter().enumerate() {
                if component.value > self.components[best].value {
                    best = n;
                }
                if component.weight > 0.0
                    && worst.is_none_or(|w: usize| component.value < self.components[w].value)
                {
                    worst = Some(n);
                }
            }
            let Some(worst) = worst else { return };
            let (to, from) = (self.components[best], self.components[worst]);
            let gain = to.value - from.value;
            if gain < TOLERANCE {
                return;
            }
            let norm =
                product(to.set, to.set) + product(from.set, from.set) - 2.0 * product(to.set, from.set);
            let moved = (gain / norm).min(from.weight);
            self.components[best].weight += moved;
            // Exactly zero if all of it went.
            self.components[worst].weight = from.weight - moved;
            for component in &mut self.components {
                component.value -=
                    moved * (product(component.set, to.set) - product(component.set, from.set));
            }
        }
    }
}

/// Returns the inner product of the `x x'` of two contents, with pairs counted once.
fn product(a: Set, b: Set) -> f64 {
    let common = f64::from((a & b).count_ones());
    0.5 * common * (common + 1.0)
}
