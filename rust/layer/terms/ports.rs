//! The busiest port: over windows, the rows of the device that most tokens visit.
//!
//! Visits are known of all windows together, as [`fanout`](super::fanout) counts them. In every window a device is visited
//! by as many tokens for each of its load as in all: its rows are its load times what it is *met* by.

use super::loads::Loads;
use super::norm::Norm;
use super::peak::Peak;
use super::windows::deviation;
use crate::layer::Layer;

/// Rows of devices in windows, and what the busiest costs.
#[derive(Debug, Clone)]
pub(super) struct Ports {
    /// What a row costs, in tokens.
    row: f64,
    /// Visits for each token of load `[D]`.
    met: Vec<f32>,
    /// The same after the move that is looked at.
    met_then: Vec<f32>,
    peak: Option<Peak>,
    norm: Option<Norm>,
}

impl Ports {
    /// Of devices that are met so much `[D]`.
    pub(super) fn new(layer: &Layer, loads: &Loads, met: Vec<f32>, is_norm: bool) -> Self {
        let windows = &layer.windows;
        let mut ports = Self {
            row: layer.costs.row,
            met_then: met.clone(),
            met,
            peak: (!is_norm).then(|| Peak::new(windows.width)),
            norm: is_norm.then(|| Norm::new(layer.devices(), &windows.per_mean)),
        };
        ports.follow(layer, loads, 0..layer.devices());
        ports
    }

    pub(super) fn cost(&self) -> f64 {
        self.row * (self.peak.as_ref().map_or(0.0, Peak::cost) + self.norm.as_ref().map_or(0.0, Norm::cost))
    }

    /// What is added if devices have rows of tokens `[touched, width]`, and own variances, instead, and are met so much.
    pub(super) fn change(
        &mut self,
        loads: &Loads,
        (rows, touched): (&[f32], &[(u16, i64)]),
        met: &[(u16, f32)],
    ) -> f64 {
        for &(device, met) in met {
            self.met_then[usize::from(device)] = met;
        }
        let unit = |device: u16, own: i64| {
            let met = self.met_then[usize::from(device)];
            (met, deviation(own) * met)
        };
        let mut change = 0.0;
        if let Some(norm) = &self.norm {
            change += norm.change(rows, touched, unit);
        }
        if let Some(peak) = &self.peak {
            change += peak.cost_of(&loads.load, rows, touched, &self.met_then) - peak.cost();
        }
        for &(device, _) in met {
            self.met_then[usize::from(device)] = self.met[usize::from(device)];
        }
        self.row * change
    }

    /// Follows devices that have been given other tokens, and are met so much.
    pub(super) fn apply(&mut self, layer: &Layer, loads: &Loads, touched: &[(u16, i64)], met: &[(u16, f32)]) {
        for &(device, met) in met {
            self.met[usize::from(device)] = met;
            self.met_then[usize::from(device)] = met;
        }
        self.follow(layer, loads, touched.iter().map(|&(device, _)| usize::from(device)));
    }

    fn follow(&mut self, layer: &Layer, loads: &Loads, touched: impl IntoIterator<Item = usize>) {
        if let Some(peak) = &mut self.peak {
            peak.refresh(&loads.load, &self.met);
        }
        if let Some(norm) = &mut self.norm {
            for g in touched {
                let met = self.met[g];
                norm.raise(g, loads.rows(g, 0).0, (met, deviation(loads.own[g]) * met));
            }
            norm.refresh(&layer.windows.price);
        }
    }
}
