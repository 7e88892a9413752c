//! A proven lower bound on the crossing count of every placement, by a doubly non-negative relaxation.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

mod certificate;
mod cuts;
mod eigen;
mod relaxation;
mod rows;
mod semidefinite;
mod separation;
mod spectrum;
mod transport;

pub use certificate::{Certificate, verify};
pub use cuts::Kind;

use crate::error::{Error, Result};
use certificate::{crossing, dual_value};
use relaxation::Relaxation;
use semidefinite::{Admm, Dual};

/// A joint placement problem on interchangeable devices: how few transitions can cross devices?
#[derive(Debug, Clone, Copy)]
pub struct Instance<'a> {
    /// Layers, L.
    pub layers: usize,
    /// Experts of a layer.
    pub experts: usize,
    /// Devices, G. Each has `ceil(experts / devices)` slots in every layer.
    pub devices: usize,
    /// `[L - 1, experts, experts]`.
    pub transitions: &'a [u64],
    /// `[L, experts]`.
    pub load: &'a [u64],
    /// `[L]`: the largest load that a device may carry; `u64::MAX` for none.
    pub cap: &'a [u64],
}

impl Instance<'_> {
    fn check(&self) -> Result<()> {
        let Self { layers, experts, devices, .. } = *self;
        let shape = |what, rule: String, found: usize| Err(Error::Shape { what, rule, found: found.to_string() });
        if layers == 0 || experts == 0 {
            return shape("load", "at least one layer and one expert".into(), 0);
        }
        if devices == 0 || devices > experts {
            return shape("devices", format!("a value from 1 to the number of experts ({experts})"), devices);
        }
        if self.transitions.len() != (layers - 1) * experts * experts {
            let rule = format!("shape [{}, {experts}, {experts}]", layers - 1);
            return shape("transitions", rule, self.transitions.len());
        }
        if self.load.len() != layers * experts {
            return shape("load", format!("shape [{layers}, {experts}]"), self.load.len());
        }
        if self.cap.len() != layers {
            return shape("cap", format!("shape [{layers}]"), self.cap.len());
        }
        Ok(())
    }

    /// Nothing can cross, or nothing is known to.
    fn is_trivial(&self) -> bool {
        self.layers < 2 || self.devices < 2 || self.transitions.iter().all(|&t| t == 0)
    }
}

/// When to stop, whatever comes first.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Iterations of the semidefinite method.
    pub iterations: usize,
    /// Crossing count of the best known placement; `None` where none is known.
    pub target: Option<u64>,
    /// Good enough: `(target - bound) / target`.
    pub gap: f64,
    /// Good enough whatever it is. Makes the result depend on the machine.
    pub deadline: Option<Instant>,
    /// Set from another thread to stop after the present iteration.
    pub stop: &'a AtomicBool,
}

/// Why the search for a better bound ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The gap is small enough.
    Gap,
    /// No progress to speak of.
    Stalled,
    /// The iterations are spent.
    Iterations,
    /// The time is spent.
    Deadline,
    /// The stop flag was set.
    Asked,
}

/// A bound with its proof.
#[derive(Debug, Clone)]
pub struct Bound {
    /// No feasible placement has fewer transitions between devices.
    pub cost: u64,
    /// Which bound it is.
    pub source: &'static str,
    /// Iterations done.
    pub iterations: usize,
    /// Why it ended.
    pub stop: Stop,
    /// Triangles and other inequalities in use at the end.
    pub cuts: [usize; 2],
    /// What [`verify`] needs.
    pub certificate: Certificate,
}

/// x
pub fn bound(instance: &Instance<'_>, limits: &Limits<'_>, mut report: impl FnMut(usize, u64)) -> Result<Bound> {
    instance.check()?;
    if instance.is_trivial() {
        let certificate = Certificate::default();
        return Ok(Bound { cost: 0, source: "none", iterations: 0, stop: Stop::Gap, cuts: [0; 2], certificate });
    }
    let relaxation = Relaxation::new(instance);
    let mut admm = Admm::new(&relaxation);
    let mut best = Dual::default();
    let target = (limits.target.map_or(0.0, |t| t as f64) - relaxation.total as f64) / relaxation.unit;
    let stop = admm.run(limits, target, |iteration, dual| {
        best = dual;
        report(iteration, crossing(&relaxation, best.estimate));
        false
    });
    let cost = crossing(&relaxation, dual_value(&relaxation, &best.lambda, &[], &best.cuts, None));
    let certificate = Certificate::write(best.lambda, Vec::new(), &best.cuts);
    Ok(Bound { cost, source: "semidefinite", iterations: admm.iterations, stop, cuts: admm.sizes(), certificate })
}

#[cfg(test)]
mod tests;
