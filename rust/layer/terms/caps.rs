//! The cap on a device's load over all windows: not a cost but a rule.

use crate::layer::{EMPTY, Layer, Move, Placement};

/// Loads of devices over all windows `[D]`, in time of the slowest.
#[derive(Debug, Clone)]
pub(crate) struct Caps {
    load: Vec<f64>,
}

/// Shares are rounded, loads are not: what is over the cap by less than this part of it keeps it.
const ROUNDING: f64 = 1e-9;

impl Caps {
    pub(crate) fn new(layer: &Layer, placement: &Placement) -> Self {
        let mut caps = Self { load: vec![0.0; layer.devices()] };
        for e in 0..layer.experts as u16 {
            let devices = placement.devices(e);
            for &device in devices {
                caps.load[usize::from(device)] += taken(layer, e, devices, device);
            }
        }
        caps
    }

    /// Whether every device that a move gives load to stays within the cap, or the worst of them gets less.
    pub(crate) fn allows(&self, layer: &Layer, placement: &Placement, step: Move) -> bool {
        if layer.cap == f64::INFINITY {
            return true;
        }
        if let Some([(g, more), (h, less)]) = exchange(layer, placement, step) {
            let before = [g, h].map(|device| self.load[usize::from(device)]);
            let worst = (before[0] + more).max(before[1] + less);
            return worst <= layer.cap * (1.0 + ROUNDING) || worst < before[0].max(before[1]);
        }
        let changes = changes(layer, placement, step);
        let (mut worst, mut before) = (0.0f64, 0.0f64);
        for (i, &(device, _)) in changes.iter().enumerate() {
            if changes[..i].iter().all(|&(earlier, _)| earlier != device) {
                let load = self.load[usize::from(device)];
                let more: f64 = changes.iter().filter(|&&(d, _)| d == device).map(|&(_, by)| by).sum();
                worst = worst.max(load + more);
                before = before.max(load);
            }
        }
        worst <= layer.cap * (1.0 + ROUNDING) || worst < before
    }

    /// By what part the worst device exceeds the cap.
    pub(crate) fn peak_excess(&self, layer: &Layer) -> f64 {
        self.load.iter().map(|&load| above(layer, load)).fold(0.0, f64::max)
    }

    /// What a move adds to the parts of the cap that devices exceed it by, summed.
    pub(crate) fn rise(&self, layer: &Layer, placement: &Placement, step: Move) -> f64 {
        if layer.cap == f64::INFINITY {
            return 0.0;
        }
        if let Some(changes) = exchange(layer, placement, step) {
            return changes.iter().map(|&(device, by)| self.risen(layer, device, by)).sum();
        }
        let changes = changes(layer, placement, step);
        let mut rise = 0.0;
        for (i, &(device, _)) in changes.iter().enumerate() {
            if changes[..i].iter().all(|&(earlier, _)| earlier != device) {
                let more = changes.iter().filter(|&&(d, _)| d == device).map(|&(_, by)| by).sum();
                rise += self.risen(layer, device, more);
            }
        }
        rise
    }

    fn risen(&self, layer: &Layer, device: u16, by: f64) -> f64 {
        let load = self.load[usize::from(device)];
        above(layer, load + by) - above(layer, load)
    }

    pub(crate) fn apply(&mut self, layer: &Layer, placement: &Placement, step: Move) {
        if layer.cap != f64::INFINITY {
            for (device, by) in changes(layer, placement, step) {
                self.load[usize::from(device)] += by;
            }
        }
    }
}

/// By what part a load exceeds the cap, if by more than rounding.
fn above(layer: &Layer, load: f64) -> f64 {
    let excess = load / layer.cap.max(f64::MIN_POSITIVE) - 1.0;
    if excess > ROUNDING { excess } else { 0.0 }
}

fn taken(layer: &Layer, expert: u16, devices: &[u16], device: u16) -> f64 {
    let share = if devices.len() == 1 { 1.0 } else { f64::from(layer.share(devices, device)) };
    layer.load[usize::from(expert)] * share * f64::from(layer.time[usize::from(device)])
}

/// What an exchange of two experts without other copies adds to the loads of their devices: most moves are one.
fn exchange(layer: &Layer, placement: &Placement, step: Move) -> Option<[(u16, f64); 2]> {
    let Move::Swap(p, q) = step else { return None };
    let [a, b] = [p, q].map(|slot| placement.expert_in[slot]);
    let single = |e: u16| e == EMPTY || placement.devices(e).len() == 1;
    if !(single(a) && single(b)) {
        return None;
    }
    let load = |e: u16| if e == EMPTY { 0.0 } else { layer.load[usize::from(e)] };
    let more = load(b) - load(a);
    let by = |device: u16, more: f64| (device, more * f64::from(layer.time[usize::from(device)]));
    Some([by(placement.device_of(p), more), by(placement.device_of(q), -more)])
}

/// What a move adds to the loads of devices; a device may occur more than once.
fn changes(layer: &Layer, placement: &Placement, step: Move) -> Vec<(u16, f64)> {
    let mut changes = Vec::with_capacity(4);
    for edit in placement.edits(step) {
        let before = placement.devices(edit.expert);
        let after: Vec<u16> = edit.after(before).collect();
        changes.extend(before.iter().map(|&device| (device, -taken(layer, edit.expert, before, device))));
        changes.extend(after.iter().map(|&device| (device, taken(layer, edit.expert, &after, device))));
    }
    changes
}
