//! The balance term: over windows, how long the slowest device takes, which all others wait for.

use super::measure::{Measure, Peak};
use crate::layer::{EMPTY, Layer, Move, Placement, Split};

/// Loads of devices, and what they cost.
#[derive(Debug, Clone)]
pub(crate) struct Balance {
    /// Length of a row.
    row: usize,
    /// `[D, row]`.
    load: Vec<f32>,
    measure: Measure,
    /// Loads of the devices that a move touches, `[touched, row]`.
    rows: Vec<f32>,
    touched: Vec<u16>,
    after: Vec<u16>,
}

impl Balance {
    pub(crate) fn new(layer: &Layer, placement: &Placement) -> Self {
        let (d, windows) = (layer.devices(), &layer.windows);
        let row = windows.row;
        let mut load = vec![0.0; d * row];
        for e in 0..layer.experts as u16 {
            let devices = placement.devices(e);
            for &device in devices {
                let of_device = &mut load[usize::from(device) * row..][..row];
                windows.add(of_device, e, layer.part(devices, device), 1.0);
            }
        }
        let mut totals = vec![0.0; row];
        for e in 0..layer.experts as u16 {
            windows.add(&mut totals, e, 1.0, 1.0);
        }
        let measure = Measure::new(windows, &load, &totals[..windows.width]);
        let rows = vec![0.0; d * row];
        Self { row, load, measure, rows, touched: Vec::new(), after: Vec::new() }
    }

    /// The slowest devices, where they alone are what a window costs.
    pub(in crate::layer) fn peak(&self) -> Option<&Peak> {
        match &self.measure {
            Measure::Peak(peak) => Some(peak),
            Measure::Norm(_) => None,
        }
    }

    /// Of the placement as it stands.
    pub(crate) fn cost(&self) -> f64 {
        self.measure.cost()
    }

    /// What a move would add to the cost.
    pub(crate) fn change(&mut self, layer: &Layer, placement: &Placement, step: Move) -> f64 {
        self.stage(layer, placement, step);
        self.measure.change(&self.load, &self.rows, &self.touched)
    }

    /// Makes the move that [`Balance::change`] was last asked about.
    pub(crate) fn apply(&mut self) {
        let length = self.row;
        for (row, &device) in self.rows.chunks_exact(length).zip(&self.touched) {
            let device = usize::from(device);
            self.load[device * length..][..length].copy_from_slice(row);
        }
        self.measure.follow(&self.load, &self.touched);
    }

    /// Puts the loads of all devices that a move touches into `rows`.
    fn stage(&mut self, layer: &Layer, placement: &Placement, step: Move) {
        self.touched.clear();
        if let Move::Swap(p, q) = step
            && self.stage_swap(layer, placement, [p, q])
        {
            return;
        }
        let mut after = std::mem::take(&mut self.after);
        for edit in placement.edits(step) {
            let before = placement.devices(edit.expert);
            after.clear();
            after.extend(edit.after(before));
            for &device in before {
                let (old, new) =
                    (layer.part(before, device), after.contains(&device).then(|| layer.part(&after, device)));
                if new != Some(old) {
                    layer.windows.add(self.row(device), edit.expert, old, -1.0);
                    if let Some(new) = new {
                        layer.windows.add(self.row(device), edit.expert, new, 1.0);
                    }
                }
            }
            if let Some(to) = edit.to {
                layer.windows.add(self.row(to), edit.expert, layer.part(&after, to), 1.0);
            }
        }
        self.after = after;
    }

    /// Most moves are swaps in which copies keep their shares, so that only two devices feel them; whether this is one.
    fn stage_swap(&mut self, layer: &Layer, placement: &Placement, slots: [usize; 2]) -> bool {
        let experts = slots.map(|slot| placement.expert_in[slot]);
        let devices = slots.map(|slot| placement.device_of(slot));
        let mut share = [0.0; 2];
        for i in 0..2 {
            if experts[i] != EMPTY {
                let holders = placement.devices(experts[i]);
                if holders.len() > 1 && layer.split == Split::Nearest {
                    return false;
                }
                share[i] = layer.share(holders, devices[i]);
            }
        }
        self.touched.extend(devices);
        let length = self.row;
        let [a, b] = experts;
        let (here, there) = self.rows[..2 * length].split_at_mut(length);
        for (row, device, experts, shares) in
            [(here, devices[0], [a, b], share), (there, devices[1], [b, a], [share[1], share[0]])]
        {
            let device = usize::from(device);
            let load = &self.load[device * length..][..length];
            layer.windows.replace(row, load, experts, shares.map(|share| share * layer.time[device]));
        }
        true
    }

    /// The row of a touched device, begun with its load.
    fn row(&mut self, device: u16) -> &mut [f32] {
        let length = self.row;
        let at = self.touched.iter().position(|&touched| touched == device).unwrap_or_else(|| {
            let at = self.touched.len();
            self.touched.push(device);
            let load = &self.load[usize::from(device) * length..][..length];
            self.rows[at * length..][..length].copy_from_slice(load);
            at
        });
        &mut self.rows[at * length..][..length]
    }
}
