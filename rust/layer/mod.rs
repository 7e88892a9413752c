//! One layer with copies: which expert sits in which slot when slots outnumber experts, windows of load differ, and
//! devices do too.
//!
//! Everything that concerns a layer alone is a *term* of its cost: [`terms::balance`] over windows, linear costs of
//! holding or serving an expert on a device, [`terms::fanout`], pairs [`terms::together`]. The search (`anneal`) knows moves, not terms; a term knows
//! what a move changes, exactly.

mod anneal;
pub mod construct;
mod moves;
mod placement;
pub mod terms;
mod turns;

pub use anneal::Effort;
pub use construct::draft::Site;
pub use moves::{Reach, Step, descend};
pub use placement::{EMPTY, Move, Placement};
pub use turns::{Links, place};

use terms::windows::Windows;

/// How the engine's dispatcher shares an expert's tokens among its copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Equal parts: vLLM's hash, TensorRT-LLM's round robin.
    Even,
    /// A token's own device if it has a copy, else its node, else equal parts, for homes spread evenly: `SGLang`'s
    /// static dispatch.
    Nearest,
}

/// A layer to place.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Experts, E.
    pub experts: usize,
    /// Slots of every device `[D]`.
    pub room: Vec<usize>,
    /// Node of every device `[D]`.
    pub node: Vec<u16>,
    /// Time of a device per token, as a share of the slowest one's `[D]`.
    pub time: Vec<f32>,
    /// How copies share tokens.
    pub split: Split,
    /// Load in windows.
    pub windows: Windows,
    /// Tokens of every expert over all windows `[E]`.
    pub load: Vec<f64>,
    /// Most of them on a device, in time of the slowest device; infinite for no cap.
    pub cap: f64,
    /// Cost of a copy of an expert on a device, whatever it serves `[E, D]`; empty for none.
    pub hold: Vec<f64>,
    /// Cost of serving all of an expert's tokens from a device; a copy pays its share `[E, D]`; empty for none.
    pub serve: Vec<f64>,
    /// Expert sets, where visits of devices and nodes cost.
    pub sets: Option<terms::fanout::Lazy>,
    /// Co-activated pairs, where those that are apart cost.
    pub pairs: Option<terms::together::Pairs>,
    /// Devices where an expert must not be `[E, D]`; empty for none.
    pub forbidden: Vec<bool>,
    /// Devices where an expert must have a copy `[E, D]`; empty for none.
    pub pinned: Vec<bool>,
}

impl Layer {
    /// For tests: devices that are alike, in one node; nothing but the windows costs, and nothing is forbidden.
    #[cfg(test)]
    pub(crate) fn plain(room: Vec<usize>, experts: usize, windows: Windows) -> Self {
        let devices = room.len();
        Self {
            experts,
            room,
            node: vec![0; devices],
            time: vec![1.0; devices],
            split: Split::Even,
            windows,
            load: vec![0.0; experts],
            cap: f64::INFINITY,
            hold: vec![],
            serve: vec![],
            sets: None,
            pairs: None,
            forbidden: vec![],
            pinned: vec![],
        }
    }

    /// Devices, D.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.room.len()
    }

    /// Slots, P.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.room.iter().sum()
    }

    /// The share of an expert's tokens that its copy on `device` serves, when its copies are on `devices`.
    fn share(&self, devices: &[u16], device: u16) -> f32 {
        let copies = devices.len();
        if copies == 1 {
            return 1.0;
        }
        if self.split == Split::Even {
            return 1.0 / copies as f32;
        }
        // The devices of a node with copies send to those, the others to all copies.
        let node_of = |device: u16| self.node[usize::from(device)];
        let here = node_of(device);
        let size = self.node.iter().filter(|&&node| node == here).count();
        let beside = devices.iter().filter(|&&copy| node_of(copy) == here).count();
        let far = |node: u16| devices.iter().all(|&copy| node_of(copy) != node);
        let unserved = self.node.iter().filter(|&&node| far(node)).count();
        let all = self.node.len() as f32;
        size as f32 / (all * beside as f32) + unserved as f32 / (all * copies as f32)
    }

    /// What a copy takes of its expert's load, in time of the slowest device.
    fn part(&self, devices: &[u16], device: u16) -> f32 {
        self.share(devices, device) * self.time[usize::from(device)]
    }
}
