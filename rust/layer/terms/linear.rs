//! The linear term: what holding or serving an expert costs on a device, whoever else is there.
//!
//! Moved bytes are a cost of holding; traffic from neighbouring layers whose placement stands is a cost of serving.

use crate::layer::slots::{Looked, Share};
use crate::layer::{Layer, Slots};

/// What a move would add.
pub(crate) fn change(layer: &Layer, Looked { slots, step, shares }: Looked<'_>) -> f64 {
    let at = |expert: u16, device: u16| usize::from(expert) * layer.devices() + usize::from(device);
    let mut change = 0.0;
    if !layer.costs.copy_cost.is_empty() {
        for edit in slots.edits(step) {
            let cost = |device: Option<u16>| {
                device.map_or(0.0, |device| layer.costs.copy_cost[at(edit.expert, device)])
            };
            change += cost(edit.to) - cost(edit.from);
        }
    }
    if !layer.costs.serve_cost.is_empty() {
        let added = |share: &Share| {
            (share.after - share.before) * layer.costs.serve_cost[at(share.expert, share.device)]
        };
        change += shares.iter().map(added).sum::<f64>();
    }
    change
}

/// Of all experts.
pub(crate) fn cost(layer: &Layer, slots: &Slots) -> f64 {
    let mut cost = 0.0;
    if layer.costs.copy_cost.is_empty() && layer.costs.serve_cost.is_empty() {
        return cost;
    }
    for expert in 0..layer.experts as u16 {
        let devices: Vec<u16> = slots.devices(expert).collect();
        for &device in &devices {
            let at = usize::from(expert) * layer.devices() + usize::from(device);
            cost += layer.costs.copy_cost.get(at).copied().unwrap_or(0.0);
            cost += layer
                .costs
                .serve_cost
                .get(at)
                .map_or(0.0, |serve| layer.site.share(&devices, device) * serve);
        }
    }
    cost
}
