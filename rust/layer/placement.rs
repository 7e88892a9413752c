//! Who is where in a layer, and the moves that change it.

use super::Layer;

/// What is in an empty slot.
pub const EMPTY: u16 = u16::MAX;

/// A change of one or two slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Two slots of different devices exchange what they hold.
    Swap(usize, usize),
    /// A slot's content makes room for another copy of an expert, or for nothing.
    Put(usize, u16),
}

/// What a move does to one expert: a copy leaves a device, appears on one, or both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Edit {
    pub(crate) expert: u16,
    pub(crate) from: Option<u16>,
    pub(crate) to: Option<u16>,
}

impl Edit {
    /// The devices that hold the expert afterwards, in no particular order.
    pub(crate) fn after<'a>(&self, before: &'a [u16]) -> impl Iterator<Item = u16> + use<'a> {
        let Self { from, to, .. } = *self;
        before.iter().copied().filter(move |&device| Some(device) != from).chain(to)
    }
}

/// What every slot of a layer holds, and where every expert is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Expert of every slot `[P]`; slots are numbered device by device.
    pub expert_in: Vec<u16>,
    /// Device of every slot `[P]`.
    device_of: Vec<u16>,
    /// Devices that hold an expert, by expert.
    devices: Vec<Vec<u16>>,
    /// Whether a device holds an expert `[E, D]`.
    holds: Vec<bool>,
}

impl Placement {
    /// Takes the expert of every slot `[P]`, none of them twice on a device.
    #[must_use]
    pub fn new(layer: &Layer, expert_in: Vec<u16>) -> Self {
        let d = layer.devices();
        let device_of: Vec<u16> =
            (0u16..).zip(&layer.room).flat_map(|(device, &slots)| vec![device; slots]).collect();
        let mut devices = vec![Vec::new(); layer.experts];
        let mut holds = vec![false; layer.experts * d];
        for (&expert, &device) in expert_in.iter().zip(&device_of) {
            if expert != EMPTY {
                devices[usize::from(expert)].push(device);
                holds[usize::from(expert) * d + usize::from(device)] = true;
            }
        }
        Self { expert_in, device_of, devices, holds }
    }

    /// Devices that hold an expert, each once.
    #[must_use]
    pub fn devices(&self, expert: u16) -> &[u16] {
        &self.devices[usize::from(expert)]
    }

    /// Device of a slot.
    #[must_use]
    pub fn device_of(&self, slot: usize) -> u16 {
        self.device_of[slot]
    }

    /// What a move does to the experts that it concerns; nothing, where a slot is empty.
    pub(crate) fn edits(&self, step: Move) -> impl Iterator<Item = Edit> + use<> {
        let (p, a) = match step {
            Move::Swap(p, _) | Move::Put(p, _) => (p, self.expert_in[p]),
        };
        let g = Some(self.device_of[p]);
        let edits = match step {
            Move::Swap(_, q) => {
                let h = Some(self.device_of[q]);
                [Edit { expert: a, from: g, to: h }, Edit { expert: self.expert_in[q], from: h, to: g }]
            }
            Move::Put(_, b) => [Edit { expert: a, from: g, to: None }, Edit { expert: b, from: None, to: g }],
        };
        edits.into_iter().filter(|edit| edit.expert != EMPTY)
    }

    /// Whether a move changes something and keeps the rules: a device holds an expert once, an expert is somewhere,
    /// pins and bans hold.
    #[must_use]
    pub fn allows(&self, layer: &Layer, step: Move) -> bool {
        let changes = match step {
            Move::Swap(p, q) => {
                self.expert_in[p] != self.expert_in[q] && self.device_of[p] != self.device_of[q]
            }
            Move::Put(p, b) => self.expert_in[p] != b,
        };
        changes
            && self.edits(step).all(|Edit { expert, from, to }| {
                let e = usize::from(expert);
                let at = |device: u16| e * layer.devices() + usize::from(device);
                let leaves = from.is_none_or(|from| !layer.pinned.get(at(from)).copied().unwrap_or(false));
                let enters = to.is_none_or(|to| {
                    !self.holds[at(to)] && !layer.forbidden.get(at(to)).copied().unwrap_or(false)
                });
                leaves && enters && (to.is_some() || self.devices[e].len() > 1)
            })
    }

    /// Makes a move that is allowed.
    pub(crate) fn apply(&mut self, layer: &Layer, step: Move) {
        for Edit { expert, from, to } in self.edits(step) {
            let e = usize::from(expert);
            let devices = &mut self.devices[e];
            if let Some(from) = from {
                devices.retain(|&device| device != from);
                self.holds[e * layer.devices() + usize::from(from)] = false;
            }
            if let Some(to) = to {
                devices.push(to);
                self.holds[e * layer.devices() + usize::from(to)] = true;
            }
        }
        match step {
            Move::Swap(p, q) => self.expert_in.swap(p, q),
            Move::Put(p, b) => self.expert_in[p] = b,
        }
    }
}
