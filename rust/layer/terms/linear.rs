//! The linear term: what holding or serving an expert costs on a device, whoever else is there.
//!
//! Moved bytes are a cost of holding; traffic from neighbouring layers whose placement stands is a cost of serving.

use crate::layer::{Layer, Move, Placement};

/// What a move would add.
pub(crate) fn change(layer: &Layer, placement: &Placement, step: Move) -> f64 {
    if layer.hold.is_empty() && layer.serve.is_empty() {
        return 0.0;
    }
    let mut after = Vec::with_capacity(8);
    let mut change = 0.0;
    for edit in placement.edits(step) {
        let before = placement.devices(edit.expert);
        after.clear();
        after.extend(edit.after(before));
        change += of_expert(layer, edit.expert, &after) - of_expert(layer, edit.expert, before);
    }
    change
}

/// Of all experts.
pub(crate) fn cost(layer: &Layer, placement: &Placement) -> f64 {
    (0..layer.experts as u16).map(|e| of_expert(layer, e, placement.devices(e))).sum()
}

fn of_expert(layer: &Layer, expert: u16, devices: &[u16]) -> f64 {
    let at = |device: u16| usize::from(expert) * layer.devices() + usize::from(device);
    let mut cost = 0.0;
    for &device in devices {
        if let Some(hold) = layer.hold.get(at(device)) {
            cost += hold;
        }
        if let Some(serve) = layer.serve.get(at(device)) {
            cost += f64::from(layer.share(devices, device)) * serve;
        }
    }
    cost
}
