//! An exchange of two copies that keep their shares. Most moves are exchanges: what they add to norms is computed in one pass
//! over windows, and nothing is written.

use super::loads::Loads;
use super::norm::{Norm, power_of};
use super::reading::Busy;
use super::windows::{chunks, deviation, lanes, total};
use crate::layer::{LANES, Layer, Move, Slots, Split};

/// Two devices, and the rows of the experts that they give.
#[derive(Debug, Clone, Copy)]
pub(in crate::layer) struct Pair {
    pub(super) devices: [usize; 2],
    pub(super) rows: [usize; 2],
}

impl Pair {
    /// Returns the exchange that a move is, if copies keep their shares.
    #[inline(always)]
    pub(super) fn of(layer: &Layer, slots: &Slots, step: Move) -> Option<Self> {
        let Move::Swap(p, q) = step else { return None };
        let experts = [p, q].map(|slot| slots.expert_in[slot]);
        let pair = Self {
            devices: [p, q].map(|slot| slots.device(slot)),
            rows: experts.map(|expert| usize::from(expert).min(layer.experts)),
        };
        (layer.site.split != Split::Nearest || pair.is_single(slots)).then_some(pair)
    }

    /// Returns whether neither expert has another copy.
    #[inline(always)]
    pub(super) fn is_single(&self, slots: &Slots) -> bool {
        self.rows.iter().all(|&row| slots.copies.get(row).is_none_or(|&copies| copies < 2))
    }
}

/// Returns what an exchange adds to the norm of tokens.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
pub(super) fn change_of_tokens(norm: &Norm, loads: &Loads, pair: &Pair) -> f64 {
    let &Pair { devices: [g, h], rows: [a, b] } = pair;
    let ((load_g, of_a), (load_h, of_b)) = (loads.rows(g, a), loads.rows(h, b));
    let n = chunks(&norm.slope);
    let (load_g, load_h, of_a, of_b) = (lanes(load_g, n), lanes(load_h, n), lanes(of_a, n), lanes(of_b, n));
    let (power_g, power_h) = (lanes(norm.of(g), n), lanes(norm.of(h), n));
    let (per_mean, slope) = (lanes(&norm.per_mean, n), lanes(&norm.slope, n));
    let ((time_g, deviation_g), (time_h, deviation_h)) =
        (loads.unit(g, loads.variance_after(g, b, a)), loads.unit(h, loads.variance_after(h, a, b)));
    let mut sums = [0.0f32; LANES];
    for at in 0..n {
        for k in 0..LANES {
            let moved = of_b[at][k] - of_a[at][k];
            let then_g = power_of((load_g[at][k] + moved) * per_mean[at][k] * time_g + deviation_g);
            let then_h = power_of((load_h[at][k] - moved) * per_mean[at][k] * time_h + deviation_h);
            sums[k] += ((then_g + then_h) - (power_g[at][k] + power_h[at][k])) * slope[at][k];
        }
    }
    f64::from(total(sums))
}

/// Returns what an exchange of single copies adds to the norm of times, and to that of rows at ports, if there is one, where
/// its two devices then have so many visits per token of load.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
pub(super) fn change_of_times(
    norm: &Norm,
    ports: Option<(&Norm, [f32; 2])>,
    busy: &Busy<'_>,
    loads: &Loads,
    pair: &Pair,
) -> [f64; 2] {
    let n = chunks(&norm.slope);
    let (per_mean, slope) = (lanes(&norm.per_mean, n), lanes(&norm.slope, n));
    let (mut sums, mut rows) = ([0.0f32; LANES], [0.0f32; LANES]);
    for side in 0..2 {
        let (g, leaves, enters) = (pair.devices[side], pair.rows[side], pair.rows[1 - side]);
        let variance = loads.variance_after(g, enters, leaves);
        let ((load, leaves), (_, enters)) = (loads.rows(g, leaves), loads.rows(g, enters));
        let (load, leaves, enters) = (lanes(load, n), lanes(leaves, n), lanes(enters, n));
        let (power, device) = (lanes(norm.of(g), n), busy.device(g, n, loads.time[g], variance));
        for at in 0..n {
            let mut then = [0.0f32; LANES];
            for k in 0..LANES {
                then[k] = load[at][k] - leaves[at][k] + enters[at][k];
                let time = device.time_after([at, k], then[k], leaves[at][k], enters[at][k]);
                sums[k] += (power_of(time * per_mean[at][k]) - power[at][k]) * slope[at][k];
            }
            if let Some((norm, visits)) = ports {
                let deviation = deviation(variance) * visits[side];
                let (power, slope) = (lanes(norm.of(g), n), lanes(&norm.slope, n));
                let per_mean = lanes(&norm.per_mean, n);
                for k in 0..LANES {
                    let now = power_of(then[k] * per_mean[at][k] * visits[side] + deviation);
                    rows[k] += (now - power[at][k]) * slope[at][k];
                }
            }
        }
    }
    [f64::from(total(sums)), f64::from(total(rows))]
}
