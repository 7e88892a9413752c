//! Placement of one layer: the expert of every slot, with copies, several windows of load, and devices that differ.
//!
//! Everything that concerns a layer alone is a *term* of its cost: [`terms::balance`] over windows, linear costs of
//! holding or serving an expert on a device, [`terms::fanout`], pairs [`terms::together`]. A start is built
//! ([`construct`]), then annealed ([`turns`]) or improved by few moves ([`mod@descend`], [`adapt`]). Searches know moves,
//! not terms. A term computes exactly what a move changes.

pub mod adapt;
mod anneal;
mod budget;
mod caps;
pub mod construct;
pub mod descend;
mod rules;
mod slots;
pub mod terms;
#[cfg(test)]
mod tests;
pub mod turns;

pub use crate::replay::Split;
pub use budget::{Choice, Spending, choose};
pub use rules::Rules;
use slots::Share;
pub use slots::{EMPTY, Move, Slots};
use terms::Costs;
use terms::windows::Windows;

/// Numbers in a vector of single precision.
pub const LANES: usize = 16;

/// Returns a number to the power 2^`doublings`.
#[inline(always)]
fn power(number: f64, doublings: u32) -> f64 {
    (0..doublings).fold(number, |power, _| power * power)
}

/// Returns the root of a number of order 2^`doublings`.
fn root(number: f64, doublings: u32) -> f64 {
    (0..doublings).fold(number, |root, _| root.sqrt())
}

/// The devices of a layer, and where experts may go.
#[derive(Debug, Clone)]
pub struct Site {
    /// Slots of every device `[D]`.
    pub capacity: Vec<usize>,
    /// Node of every device `[D]`.
    pub node: Vec<u16>,
    /// Time of every device per token, as a share of the slowest one's `[D]`.
    pub time: Vec<f64>,
    /// How copies share tokens; [`Split::RoundRobin`] is [`Split::Even`] here.
    pub split: Split,
    /// Rules of every placement.
    pub rules: Rules,
}

impl Site {
    /// Builds a site of devices in one node, without rules.
    #[must_use]
    pub fn plain(capacity: Vec<usize>, time: Vec<f64>) -> Self {
        let node = vec![0; capacity.len()];
        Self { capacity, node, time, split: Split::Even, rules: Rules::default() }
    }

    /// Returns the number of devices, D.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.capacity.len()
    }

    /// Returns whether all devices have the same time per token.
    pub(crate) fn has_equal_speeds(&self) -> bool {
        self.time.iter().all(|time| time.to_bits() == self.time[0].to_bits())
    }

    /// Returns the tokens that all devices together serve while the slowest serves one.
    pub(crate) fn rate(&self) -> f64 {
        let used = self.time.iter().zip(&self.capacity).filter(|(_, slots)| **slots > 0);
        used.map(|(time, _)| 1.0 / time).sum()
    }

    /// Returns the share of an expert's tokens that its copy on `device` serves, if its copies are on `devices`.
    pub(crate) fn share(&self, devices: &[u16], device: u16) -> f64 {
        let copies = devices.len();
        if copies == 1 || self.split != Split::Nearest {
            return 1.0 / copies as f64;
        }
        // The devices of a node with copies send to those, the others to all copies.
        let node_of = |device: u16| self.node[usize::from(device)];
        let node = node_of(device);
        let size = self.node.iter().filter(|&&other| other == node).count();
        let copies_here = devices.iter().filter(|&&copy| node_of(copy) == node).count();
        let has_none = |node: u16| devices.iter().all(|&copy| node_of(copy) != node);
        let unserved = self.node.iter().filter(|&&node| has_none(node)).count();
        let all = self.node.len() as f64;
        size as f64 / (all * copies_here as f64) + unserved as f64 / (all * copies as f64)
    }
}

/// A layer to place.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Experts, E.
    pub experts: usize,
    /// Devices and rules.
    pub site: Site,
    /// Load in windows.
    pub windows: Windows,
    /// Tokens of every expert over all windows `[E]`.
    pub load: Vec<f64>,
    /// Other prices.
    pub costs: Costs,
}

impl Layer {
    /// Builds a layer whose cost is that of its windows alone.
    #[must_use]
    pub fn plain(site: Site, load: Vec<f64>, windows: Windows) -> Self {
        Self { experts: load.len(), site, windows, load, costs: Costs::default() }
    }

    /// Returns the number of devices, D.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.site.devices()
    }

    /// Returns the number of slots, P.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.site.capacity.iter().sum()
    }

    /// Iterates over all copies in slots, each as if it had just come with the share that it serves.
    pub(crate) fn copies<'a>(&'a self, slots: &'a Slots) -> impl Iterator<Item = Share> + 'a {
        (0..self.experts as u16).flat_map(|expert| {
            let devices: Vec<u16> = slots.devices(expert).collect();
            let arrival = |&device: &u16| {
                let after = self.site.share(&devices, device);
                Share { expert, device, before: 0.0, after }
            };
            devices.iter().map(arrival).collect::<Vec<_>>()
        })
    }

    /// Returns whether there are spare slots, which may hold further copies.
    pub(crate) fn has_spare(&self) -> bool {
        self.site.rules.max_copies > 1 && self.slots() > self.experts
    }

    /// Returns whether a copy costs something, whatever it serves: its weights are read, or tokens visit one device more.
    pub(crate) fn charges_copies(&self) -> bool {
        let Costs { reading, sets, pairs, .. } = &self.costs;
        reading.is_some() || sets.is_some() || pairs.is_some()
    }
}
