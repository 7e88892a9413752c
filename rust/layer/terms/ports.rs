//! The busiest port: over windows, the rows of the device that most tokens visit.
//!
//! [`fanout`](super::fanout) counts visits over all windows together. Every window is taken to have the same visits per token
//! of a device's load, so the rows of a device are its load times that ratio.

use super::loads::Loads;
use super::norm::Norm;
use super::peak::Peak;
use super::windows::deviation;
use crate::layer::Layer;

/// Rows of devices in windows, and the cost of the busiest one.
#[derive(Debug, Clone)]
pub(super) struct Ports {
    /// Cost of a row, in tokens.
    row: f64,
    /// Visits per token of load `[D]`.
    visits: Vec<f32>,
    /// Visits per token of load after the candidate move `[D]`.
    visits_then: Vec<f32>,
    peak: Option<Peak>,
    norm: Option<Norm>,
}

impl Ports {
    /// Counts the rows of devices that have so many visits per token of load `[D]`.
    pub(super) fn new(layer: &Layer, loads: &Loads, visits: Vec<f32>, is_norm: bool) -> Self {
        let windows = &layer.windows;
        let mut ports = Self {
            row: layer.costs.row,
            visits_then: visits.clone(),
            visits,
            peak: (!is_norm).then(|| Peak::new(windows.width)),
            norm: is_norm.then(|| Norm::new(layer.devices(), &windows.per_mean)),
        };
        ports.refresh(layer, loads, 0..layer.devices());
        ports
    }

    /// Returns the cost of the rows at the busiest port, summed over windows.
    pub(super) fn cost(&self) -> f64 {
        self.row * (self.peak.as_ref().map_or(0.0, Peak::cost) + self.norm.as_ref().map_or(0.0, Norm::cost))
    }

    /// Returns the cost that is added if the touched devices have these tokens `[touched, width]` and own variances, and
    /// devices have these visits per token.
    pub(super) fn change(
        &mut self,
        loads: &Loads,
        (rows, touched): (&[f32], &[(u16, i64)]),
        visits: &[(u16, f32)],
    ) -> f64 {
        for &(device, visits) in visits {
            self.visits_then[usize::from(device)] = visits;
        }
        let unit = |device: u16, variance: i64| {
            let visits = self.visits_then[usize::from(device)];
            (visits, deviation(variance) * visits)
        };
        let mut change = 0.0;
        if let Some(norm) = &self.norm {
            change += norm.change(rows, touched, unit);
        }
        if let Some(peak) = &self.peak {
            change += peak.cost_of(&loads.load, rows, touched, &self.visits_then) - peak.cost();
        }
        for &(device, _) in visits {
            self.visits_then[usize::from(device)] = self.visits[usize::from(device)];
        }
        self.row * change
    }

    /// Returns the norm of rows, if it stands for the busiest port, and the visits per token that two devices then have.
    pub(super) fn norm_after(&self, visits: &[(u16, f32)], devices: [usize; 2]) -> Option<(&Norm, [f32; 2])> {
        let visits_of = |g: usize| {
            let changed = visits.iter().find(|&&(device, _)| usize::from(device) == g);
            changed.map_or(self.visits[g], |&(_, visits)| visits)
        };
        self.norm.as_ref().map(|norm| (norm, devices.map(visits_of)))
    }

    /// Returns the cost of so many rows at the busiest port.
    pub(super) fn price_of(&self, rows: f64) -> f64 {
        self.row * rows
    }

    /// Updates devices whose tokens or visits per token have changed.
    pub(super) fn apply(
        &mut self,
        layer: &Layer,
        loads: &Loads,
        touched: &[(u16, i64)],
        visits: &[(u16, f32)],
    ) {
        for &(device, visits) in visits {
            self.visits[usize::from(device)] = visits;
            self.visits_then[usize::from(device)] = visits;
        }
        self.refresh(layer, loads, touched.iter().map(|&(device, _)| usize::from(device)));
    }

    /// Recomputes the devices that a move has touched, and the cost of the busiest port.
    fn refresh(&mut self, layer: &Layer, loads: &Loads, touched: impl IntoIterator<Item = usize>) {
        if let Some(peak) = &mut self.peak {
            peak.refresh(&loads.load, &self.visits);
        }
        if let Some(norm) = &mut self.norm {
            for g in touched {
                let visits = self.visits[g];
                norm.set_load(g, loads.rows(g, 0).0, (visits, deviation(loads.variance[g]) * visits));
            }
            norm.refresh(&layer.windows.price);
        }
    }
}
