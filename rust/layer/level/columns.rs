//! Windows of a layer in the form of the quick search: side by side, in parts of what every device would take if all
//! took alike.

use crate::layer::construct::draft::Site;

/// Windows that are looked at together, in vectors of single precision.
pub(super) const LANES: usize = 16;
pub(super) type Lanes = [f32; LANES];

/// Loads of experts over what a device has to do in a window where all are done at once.
#[derive(Debug)]
pub(super) struct Columns {
    /// Vectors of a row: windows, rounded up.
    pub(super) chunks: usize,
    /// Loads `[E + 1, chunks]`; the last row is that of an empty slot.
    load: Vec<Lanes>,
    /// A window's part of all time `[chunks]`; zero where there is no window.
    pub(super) price: Vec<Lanes>,
    /// Variance among windows that counts as an expert's own, in every window alike `[E + 1]`.
    pub(super) own: Vec<f32>,
    /// How heavy an expert is: the root of its mean square, and its own deviation `[E]`.
    pub(super) weight: Vec<f64>,
}

impl Columns {
    /// Takes loads `[E]` in windows with their weights; `noise` is the part of an expert's variance that counts.
    pub(super) fn new<'a>(
        windows: impl ExactSizeIterator<Item = (&'a [f64], f64)>,
        experts: usize,
        site: Site<'_>,
        noise: f64,
    ) -> Self {
        let chunks = windows.len().div_ceil(LANES).max(1);
        let rate: f64 =
            site.time.iter().zip(site.room).filter(|(_, room)| **room > 0).map(|(t, _)| 1.0 / t).sum();
        let mut load = vec![[0.0; LANES]; (experts + 1) * chunks];
        let mut price = vec![[0.0f64; LANES]; chunks];
        let [mut mean, mut square] = [vec![0.0; experts], vec![0.0; experts]];
        let mut all = 0.0;
        for (w, (tokens, weight)) in windows.enumerate() {
            let total: f64 = tokens.iter().sum();
            let counts = total * weight;
            if counts <= 0.0 {
                continue;
            }
            let (chunk, lane, unit) = (w / LANES, w % LANES, rate / total);
            price[chunk][lane] = counts;
            all += counts;
            for (e, tokens) in tokens.iter().enumerate() {
                let part = tokens * unit;
                load[e * chunks + chunk][lane] = part as f32;
                mean[e] += counts * part;
                square[e] += counts * part * part;
            }
        }
        let unit = if all > 0.0 { 1.0 / all } else { 0.0 };
        let (mut own, mut weight) = (vec![0.0; experts + 1], vec![0.0; experts]);
        for e in 0..experts {
            let (mean, square) = (mean[e] * unit, square[e] * unit);
            let variance = noise * (square - mean * mean).max(0.0);
            own[e] = variance as f32;
            weight[e] = square.sqrt() + variance.sqrt();
        }
        let price = price.iter().map(|price| price.map(|price| (price * unit) as f32)).collect();
        Self { chunks, load, price, own, weight }
    }

    /// Loads of an expert, by its row.
    #[inline(always)]
    pub(super) fn of(&self, row: usize) -> &[Lanes] {
        &self.load[row * self.chunks..][..self.chunks]
    }
}
