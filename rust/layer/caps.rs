//! The cap on a device's load over all windows: not a cost but a rule.

use super::{Contents, Layer, Move};

/// Loads of devices over all windows `[D]`, in time of the slowest.
#[derive(Debug, Clone)]
pub(crate) struct Caps {
    load: Vec<f64>,
}

/// Shares are rounded, loads are not: what is over the cap by less than this part of it keeps it.
const ROUNDING: f64 = 1e-9;

impl Caps {
    pub(crate) fn new(layer: &Layer, contents: &Contents) -> Self {
        let mut caps = Self { load: vec![0.0; layer.devices()] };
        for e in 0..layer.experts as u16 {
            let devices = contents.devices(e);
            for &device in devices {
                caps.load[usize::from(device)] += taken(layer, e, devices, device);
            }
        }
        caps
    }

    /// Whether every device that a move gives load to stays within the cap, or the worst of them gets less.
    pub(crate) fn allows(&self, layer: &Layer, contents: &Contents, step: Move) -> bool {
        if layer.cap == f64::INFINITY {
            return true;
        }
        let changes = changes(layer, contents, step);
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

    pub(crate) fn apply(&mut self, layer: &Layer, contents: &Contents, step: Move) {
        if layer.cap != f64::INFINITY {
            for (device, by) in changes(layer, contents, step) {
                self.load[usize::from(device)] += by;
            }
        }
    }
}

fn taken(layer: &Layer, expert: u16, devices: &[u16], device: u16) -> f64 {
    let share = if devices.len() == 1 { 1.0 } else { f64::from(layer.share(devices, device)) };
    layer.load[usize::from(expert)] * share * f64::from(layer.time[usize::from(device)])
}

/// What a move adds to the loads of devices; a device may occur more than once.
fn changes(layer: &Layer, contents: &Contents, step: Move) -> Vec<(u16, f64)> {
    let mut changes = Vec::with_capacity(4);
    for edit in contents.edits(step) {
        let before = contents.devices(edit.expert);
        let after: Vec<u16> = edit.after(before).collect();
        changes.extend(before.iter().map(|&device| (device, -taken(layer, edit.expert, before, device))));
        changes.extend(after.iter().map(|&device| (device, taken(layer, edit.expert, &after, device))));
    }
    changes
}
