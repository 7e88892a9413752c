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

#[derive(Debug, Clone, Copy)]
struct Part {
    set: Set,
    weight: f64,
    /// Sum of the residual over the content: how much it is missed.
    value: f64,
    idle: u8,
}

/// A mixture of the contents of one layer, and the multiplier of `s = h`.
#[derive(Debug, Clone)]
pub(super) struct Mixture {
    contents: Contents,
    parts: Vec<Part>,
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
        let part = Part { set, weight: relaxation.devices as f64, value: 0.0, idle: 0 };
        let mut this = Self { contents, parts: vec![part], experts, h: zero.clone(), u: zero };
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
        self.parts.retain_mut(|part| {
            part.idle = if part.weight > 0.0 { 0 } else { part.idle + 1 };
            part.idle < PATIENCE
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

    fn top(&self) -> f64 {
        self.parts.iter().fold(f64::NEG_INFINITY, |m, part| m.max(part.value))
    }

    fn join(&mut self, set: Set, value: f64) -> bool {
        let new = self.parts.iter().all(|part| part.set != set);
        if new {
            self.parts.push(Part { set, weight: 0.0, value, idle: 0 });
        }
        new
    }

    /// Computes `u = target - h` with h made anew, and the values of contents.
    fn subtract(&mut self, target: &[f64]) {
        self.rebuild();
        for (u, (t, h)) in self.u.iter_mut().zip(target.iter().zip(&self.h)) {
            *u = t - h;
        }
        let e = self.experts;
        for part in &mut self.parts {
            let rows = members(part.set).map(|i| {
                let row = &self.u[i * e..][..e];
                members(part.set).take_while(|&j| j <= i).map(|j| row[j]).sum::<f64>()
            });
            part.value = rows.sum();
        }
    }

    fn rebuild(&mut self) {
        self.h.fill(0.0);
        for part in self.parts.iter().filter(|part| part.weight > 0.0) {
            for i in members(part.set) {
                let row = &mut self.h[i * self.experts..][..self.experts];
                for j in members(part.set) {
                    row[j] += part.weight;
                }
            }
        }
    }

    /// Climbs from the contents of the largest values; returns whether there is a new content.
    fn climb(&mut self) -> bool {
        self.parts.sort_unstable_by(|a, b| b.value.total_cmp(&a.value).then(a.set.cmp(&b.set)));
        let enough = self.top() + 10.0 * TOLERANCE;
        let mut new = false;
        for n in 0..STARTS.min(self.parts.len()) {
            let part = self.parts[n];
            let (gain, set) = self.contents.climb(&self.u, part.set);
            if part.value + gain > enough {
                new |= self.join(set, part.value + gain);
            }
        }
        new
    }

    /// Moves weight from the worst content to the best while it helps, each time as far as it helps.
    fn exchange(&mut self) {
        for _ in 0..MOVES {
            let (mut best, mut worst) = (0, None);
            for (n, part) in self.parts.iter().enumerate() {
                if part.value > self.parts[best].value {
                    best = n;
                }
                if part.weight > 0.0 && worst.is_none_or(|w: usize| part.value < self.parts[w].value) {
                    worst = Some(n);
                }
            }
            let Some(worst) = worst else { return };
            let (to, from) = (self.parts[best], self.parts[worst]);
            let gain = to.value - from.value;
            if gain < TOLERANCE {
                return;
            }
            let norm =
                product(to.set, to.set) + product(from.set, from.set) - 2.0 * product(to.set, from.set);
            let moved = (gain / norm).min(from.weight);
            self.parts[best].weight += moved;
            // Exactly zero if all of it went.
            self.parts[worst].weight = from.weight - moved;
            for part in &mut self.parts {
                part.value -= moved * (product(part.set, to.set) - product(part.set, from.set));
            }
        }
    }
}

/// Returns the inner product of the `x x'` of two contents, with pairs counted once.
fn product(a: Set, b: Set) -> f64 {
    let common = f64::from((a & b).count_ones());
    0.5 * common * (common + 1.0)
}
