//! The cap on a device's load over all windows: not a cost but a rule.

use crate::layer::slots::Share;
use crate::layer::{Layer, Slots};

/// Loads of devices over all windows `[D]`, in time of the slowest.
#[derive(Debug, Clone)]
pub(crate) struct Caps {
    load: Vec<f64>,
}

/// What is over the cap by less than this part of it keeps it.
const ROUNDING: f64 = 1e-9;

impl Caps {
    pub(crate) fn new(layer: &Layer, slots: &Slots) -> Self {
        let mut load = vec![0.0; layer.devices()];
        let experts = if layer.site.rules.cap < f64::INFINITY { layer.experts as u16 } else { 0 };
        for e in 0..experts {
            let devices: Vec<u16> = slots.devices(e).collect();
            for &device in &devices {
                let share = layer.site.share(&devices, device) * layer.site.time[usize::from(device)];
                load[usize::from(device)] += layer.load[usize::from(e)] * share;
            }
        }
        Self { load }
    }

    /// Loads of the devices that a move touches, before and after it.
    fn changes<'a>(&'a self, layer: &'a Layer, shares: &'a [Share]) -> impl Iterator<Item = (f64, f64)> + 'a {
        let by = |share: &Share| {
            let part = (share.after - share.before) * layer.site.time[usize::from(share.device)];
            layer.load[usize::from(share.expert)] * part
        };
        let first = |(i, share): (usize, &'a Share)| {
            shares[..i].iter().all(|earlier| earlier.device != share.device).then_some(share.device)
        };
        shares.iter().enumerate().filter_map(first).map(move |device| {
            let more: f64 = shares.iter().filter(|share| share.device == device).map(by).sum();
            let load = self.load[usize::from(device)];
            (load, load + more)
        })
    }

    /// Whether every device that a move gives load to stays within the cap, or the worst of them gets less.
    pub(crate) fn allows(&self, layer: &Layer, shares: &[Share]) -> bool {
        if layer.site.rules.cap == f64::INFINITY {
            return true;
        }
        let (mut before, mut worst) = (0.0f64, 0.0f64);
        for (load, then) in self.changes(layer, shares) {
            (before, worst) = (before.max(load), worst.max(then));
        }
        worst <= layer.site.rules.cap * (1.0 + ROUNDING) || worst < before
    }

    /// By what part the worst device exceeds the cap.
    pub(crate) fn peak_excess(&self, layer: &Layer) -> f64 {
        self.load.iter().map(|&load| above(layer, load)).fold(0.0, f64::max)
    }

    /// What a move adds to the parts of the cap that devices exceed it by, summed.
    pub(crate) fn rise(&self, layer: &Layer, shares: &[Share]) -> f64 {
        if layer.site.rules.cap == f64::INFINITY {
            return 0.0;
        }
        self.changes(layer, shares).map(|(load, then)| above(layer, then) - above(layer, load)).sum()
    }

    pub(crate) fn apply(&mut self, layer: &Layer, shares: &[Share]) {
        for share in shares {
            let g = usize::from(share.device);
            self.load[g] +=
                layer.load[usize::from(share.expert)] * (share.after - share.before) * layer.site.time[g];
        }
    }
}

/// By what part a load exceeds the cap, if by more than rounding.
fn above(layer: &Layer, load: f64) -> f64 {
    let excess = load / layer.site.rules.cap.max(f64::MIN_POSITIVE) - 1.0;
    if excess > ROUNDING { excess } else { 0.0 }
}
