//! The instance in the units and the variables of the relaxation.
//!
//! Variables are `s_l(e, e')` for `e < e'` (two experts of layer l share a device) and `z_l(e, f)` (expert e of
//! layer l and expert f of layer l + 1 do). They lie in one vector `s_0 z_0 s_1 z_1 .. s_M`, every block `[E, E]`, of
//! which an s block uses the part above its diagonal. The *slice* of pair l is `s_l z_l s_{l+1}`: every constraint
//! lives in one slice, and the slices of even pairs do not overlap.
//!
//! Counts are divided by a power of two near the mean, which is exact.

use super::Instance;
use super::contents::{Contents, are_few};
use super::eigen::power_of_two_near;

/// The load limit of a layer, in the layer's unit.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoadLimit {
    /// No device carries more, `k_l`.
    pub(super) upper: f64,
    /// No device carries less, `m_l`.
    pub(super) lower: f64,
    /// The load of all devices, `S_l`.
    pub(super) total: f64,
    /// The same limit in tokens.
    pub(super) cap: u64,
}

/// An instance, padded to full devices and scaled.
#[derive(Debug, Clone)]
pub(super) struct Relaxation {
    /// Layers, L.
    pub(super) layers: usize,
    /// Experts of a layer, E, with the dummies that fill up the devices.
    pub(super) experts: usize,
    /// Devices, G.
    pub(super) devices: usize,
    /// Experts of a device, C = E / G.
    pub(super) slots: usize,
    /// A cost of 1 is this many transitions: a power of two.
    pub(super) unit: f64,
    /// All transitions.
    pub(super) total: u128,
    /// `c_l(e, f)`, `[M, E, E]`: minus the transitions.
    pub(super) cost: Vec<f64>,
    /// `w_l(e)`, `[L, E]`.
    pub(super) weight: Vec<f64>,
    /// `[L, E]`, in tokens.
    pub(super) load: Vec<u64>,
    /// Per layer; `None` where no placement can break the cap.
    pub(super) limit: Vec<Option<LoadLimit>>,
    /// True if the contents of devices are few enough to be searched; see [`super::contents`].
    pub(super) has_contents: bool,
    /// Experts of each layer from light to heavy, `[L, E]`.
    by_load: Vec<u32>,
}

impl Relaxation {
    /// Builds the relaxation of a checked instance, padded and scaled.
    pub(super) fn new(instance: &Instance<'_>) -> Self {
        let Instance { layers, experts: real, devices, .. } = *instance;
        let slots = real.div_ceil(devices);
        let experts = slots * devices;
        let total: u128 = instance.transitions.iter().map(|&t| u128::from(t)).sum();
        let pairs = layers.saturating_sub(1);
        let cells = (pairs * experts * experts).max(1) as f64;
        let unit = power_of_two_near((total as f64 / cells).max(f64::MIN_POSITIVE));
        let mut cost = vec![0.0; pairs * experts * experts];
        let mut load = vec![0; layers * experts];
        for (row, counts) in instance.transitions.chunks_exact(real).enumerate() {
            let start = (row / real * experts + row % real) * experts;
            for (cost, &count) in cost[start..].iter_mut().zip(counts) {
                *cost = -(count as f64) / unit;
            }
        }
        for (padded, loads) in load.chunks_exact_mut(experts).zip(instance.load.chunks_exact(real)) {
            padded[..real].copy_from_slice(loads);
        }
        let mut this = Self {
            layers,
            experts,
            devices,
            slots,
            unit,
            total,
            cost,
            weight: vec![0.0; layers * experts],
            load,
            limit: vec![None; layers],
            has_contents: are_few(experts, slots),
            by_load: Vec::with_capacity(layers * experts),
        };
        for (l, &cap) in instance.cap.iter().enumerate() {
            this.scale_layer(l, cap);
        }
        this
    }

    /// Returns the contents of layer l that a device may hold.
    pub(super) fn contents(&self, l: usize) -> Contents {
        let load: Vec<u128> =
            self.load[l * self.experts..][..self.experts].iter().map(|&x| x.into()).collect();
        let total: u128 = load.iter().sum();
        let upper = self.limit[l].map_or(total, |limit| limit.cap.into());
        let lower = total.saturating_sub(upper * (self.devices as u128 - 1));
        Contents { experts: self.experts, slots: self.slots, load, lower, upper }
    }

    /// Scales the loads of a layer and its cap.
    fn scale_layer(&mut self, l: usize, cap: u64) {
        let (e, g, c) = (self.experts, self.devices, self.slots);
        let load = &self.load[l * e..][..e];
        let mut order: Vec<u32> = (0..e as u32).collect();
        order.sort_by_key(|&i| (load[i as usize], i));
        let sum = |order: &[u32]| -> u128 { order.iter().map(|&i| u128::from(load[i as usize])).sum() };
        let (total, lightest, heaviest) = (sum(&order), sum(&order[..c]), sum(&order[e - c..]));
        self.by_load.extend(order);
        let unit = power_of_two_near((total as f64 / g as f64).max(1.0));
        for (w, &load) in self.weight[l * e..][..e].iter_mut().zip(load) {
            *w = load as f64 / unit;
        }
        if u128::from(cap) < heaviest {
            let lower = total.saturating_sub(u128::from(cap) * (g as u128 - 1)).max(lightest);
            let scaled = |tokens: u128| tokens as f64 / unit;
            self.limit[l] = Some(LoadLimit {
                upper: scaled(cap.into()),
                lower: scaled(lower),
                total: scaled(total),
                cap,
            });
        }
    }

    /// Returns the number of pairs of neighbouring layers, M.
    pub(super) fn pairs(&self) -> usize {
        self.layers - 1
    }

    /// Returns the number of rows of a pair's matrix, 2E.
    pub(super) fn order(&self) -> usize {
        2 * self.experts
    }

    /// Returns the length of a pair's slice.
    pub(super) fn slice(&self) -> usize {
        3 * self.experts * self.experts
    }

    /// Returns the place of the variable of two different items in the slice of a pair; items 0..E are the experts of the left
    /// layer, E..2E those of the right one.
    pub(super) fn variable(&self, a: usize, b: usize) -> usize {
        let e = self.experts;
        let (a, b) = (a.min(b), a.max(b));
        if b < e {
            a * e + b
        } else if a < e {
            (e + a) * e + b - e
        } else {
            (2 * e + a - e) * e + b - e
        }
    }

    /// Returns the two items of a variable.
    pub(super) fn items(&self, variable: usize) -> (usize, usize) {
        let e = self.experts;
        let (row, column) = (variable / e, variable % e);
        match row / e {
            0 => (row, column),
            // In z the row is on the left. In the right s both items are on the right, e rows further down.
            _ => (row - e, column + e),
        }
    }

    /// Returns the number of copies of the variables `s_l`, in pairs and, if `mixed`, in a mixture: their weight v in the augmented
    /// Lagrangian.
    pub(super) fn copies(&self, layer: usize, mixed: bool) -> f64 {
        let pairs = if layer == 0 || layer + 1 == self.layers { 1.0 } else { 2.0 };
        pairs + f64::from(u8::from(mixed))
    }

    /// Returns `w` of one layer.
    pub(super) fn weights(&self, layer: usize) -> &[f64] {
        &self.weight[layer * self.experts..][..self.experts]
    }

    /// Returns whether no device can hold these experts of a layer together: there are too many, or with the lightest
    /// others they are over the cap. Loads are whole tokens, so the comparison is exact.
    pub(super) fn is_cover(&self, layer: usize, members: &[usize]) -> bool {
        let Some(others) = self.slots.checked_sub(members.len()) else { return true };
        let Some(limit) = self.limit[layer] else { return false };
        let load = &self.load[layer * self.experts..][..self.experts];
        let lightest = self.by_load[layer * self.experts..][..self.experts].iter().map(|&i| i as usize);
        let fill = lightest.filter(|i| !members.contains(i)).take(others);
        let sum: u128 = members.iter().copied().chain(fill).map(|i| u128::from(load[i])).sum();
        sum > u128::from(limit.cap)
    }
}
