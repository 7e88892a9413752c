//! The balance term: over windows, how long the slowest device takes, which all others wait for.
//!
//! Loads are whole numbers kept as `f32`, scaled so that a window's total stays below 2^22, where sums are exact. The
//! loads of devices are therefore a function of the placement alone, whatever moves led to it, on any machine. The scale is
//! the only loss: every part of a load is off by at most one unit, 2^-22 of the heaviest window's total.

use super::likely::Likely;
use super::measure::Measure;
use super::{Contents, EMPTY, Layer, Move, Split};

/// Vectors are whole.
pub(super) const LANES: usize = 16;
pub(super) const LARGEST_TOTAL: f64 = (1 << 22) as f64;

/// Loads of experts in windows, weighted and scaled.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Windows, rounded up to full vectors.
    pub(super) width: usize,
    /// `[E + 1, width]`, whole numbers; the last row is that of an empty slot.
    load: Vec<f32>,
    experts: usize,
    /// Units per weighted token.
    pub scale: f64,
    /// Order of the norm over devices that stands for the maximum: 4, 8, 16, or 0 for the maximum itself.
    pub norm: u32,
    /// What other windows may bring.
    pub(super) likely: Option<Likely>,
}

impl Windows {
    /// Takes loads `[W, E]`, the weight of every window `[W]`, and the share of the cost, below one, that a norm gives to
    /// what other windows may bring.
    #[must_use]
    pub fn new(load: &[f64], weight: &[f64], experts: usize, norm: u32, likely: f64) -> Self {
        let likely = if norm == 0 { None } else { Likely::new(load, weight, experts, likely) };
        let columns = weight.len() + usize::from(likely.is_some());
        let width = columns.next_multiple_of(LANES).max(LANES);
        let totals = load.chunks_exact(experts).zip(weight).map(|(row, w)| row.iter().sum::<f64>() * w);
        let heaviest = totals.fold(0.0, f64::max);
        let scale = if heaviest > 0.0 { (LARGEST_TOTAL - 1.0) / heaviest } else { 1.0 };
        let mut scaled = vec![0.0; (experts + 1) * width];
        for (w, (row, weight)) in load.chunks_exact(experts).zip(weight).enumerate() {
            for (e, &tokens) in row.iter().enumerate() {
                // Down, so that the total keeps its bound.
                scaled[e * width + w] = libm::floor(tokens * weight * scale) as f32;
            }
        }
        Self { width, load: scaled, experts, scale, norm, likely }
    }

    /// Load of an expert in all windows; none where a slot is empty.
    pub(super) fn of(&self, expert: u16) -> &[f32] {
        &self.load[usize::from(expert).min(self.experts) * self.width..][..self.width]
    }

    /// Adds `sign` times a part of an expert's load to a device's row.
    pub(super) fn add(&self, to: &mut [f32], expert: u16, part: f32, sign: f32) {
        add(to, self.of(expert), part, sign);
        self.add_own(to, expert, part, sign);
    }

    /// Adds the part's own variance, which is a square, in the column behind the windows.
    fn add_own(&self, to: &mut [f32], expert: u16, part: f32, sign: f32) {
        if let Some(likely) = &self.likely
            && expert != EMPTY
        {
            to[likely.column] += sign * whole(likely.own[usize::from(expert)] * part * part);
        }
    }

    /// Whether balance costs nothing.
    pub(super) fn is_weightless(&self) -> bool {
        self.load.iter().all(|&load| load == 0.0)
    }
}

/// Loads of devices, and what they cost.
#[derive(Debug, Clone)]
pub(crate) struct Balance {
    width: usize,
    /// `[D, width]`.
    load: Vec<f32>,
    measure: Measure,
    /// Loads of the devices that a move touches, `[touched, width]`.
    rows: Vec<f32>,
    touched: Vec<u16>,
    after: Vec<u16>,
}

impl Balance {
    pub(crate) fn new(layer: &Layer, contents: &Contents) -> Self {
        let (d, width) = (layer.devices(), layer.windows.width);
        let mut load = vec![0.0; d * width];
        for e in 0..layer.experts as u16 {
            let devices = contents.devices(e);
            for &device in devices {
                let row = &mut load[usize::from(device) * width..][..width];
                layer.windows.add(row, e, layer.part(devices, device), 1.0);
            }
        }
        let mut totals = vec![0.0; width];
        for e in 0..layer.experts as u16 {
            add(&mut totals, layer.windows.of(e), 1.0, 1.0);
        }
        let measure = Measure::new(layer.windows.norm, &load, &totals, layer.windows.likely.as_ref());
        let rows = vec![0.0; d * width];
        Self { width, load, measure, rows, touched: Vec::new(), after: Vec::new() }
    }

    /// Of the placement as it stands.
    pub(crate) fn cost(&self) -> f64 {
        self.measure.cost()
    }

    /// What a move would add to the cost.
    pub(crate) fn change(&mut self, layer: &Layer, contents: &Contents, step: Move) -> f64 {
        self.stage(layer, contents, step);
        self.measure.change(&self.load, &self.rows, &self.touched)
    }

    /// Makes the move that [`Balance::change`] was last asked about.
    pub(crate) fn apply(&mut self) {
        let width = self.width;
        for (row, &device) in self.rows.chunks_exact(width).zip(&self.touched) {
            let device = usize::from(device);
            self.load[device * width..][..width].copy_from_slice(row);
        }
        self.measure.follow(&self.load, &self.touched);
    }

    /// Puts the loads of all devices that a move touches into `rows`.
    fn stage(&mut self, layer: &Layer, contents: &Contents, step: Move) {
        self.touched.clear();
        if let Move::Swap(p, q) = step
            && self.stage_swap(layer, contents, [p, q])
        {
            return;
        }
        let mut after = std::mem::take(&mut self.after);
        for edit in contents.edits(step) {
            let before = contents.devices(edit.expert);
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
    fn stage_swap(&mut self, layer: &Layer, contents: &Contents, slots: [usize; 2]) -> bool {
        let experts = slots.map(|slot| contents.expert_in[slot]);
        let devices = slots.map(|slot| contents.device_of(slot));
        let mut share = [0.0; 2];
        for i in 0..2 {
            if experts[i] != EMPTY {
                let holders = contents.devices(experts[i]);
                if holders.len() > 1 && layer.split == Split::Nearest {
                    return false;
                }
                share[i] = layer.share(holders, devices[i]);
            }
        }
        self.touched.extend(devices);
        let width = self.width;
        let [a, b] = experts;
        let (here, there) = self.rows[..2 * width].split_at_mut(width);
        for (row, device, [leaves, enters]) in [
            (here, devices[0], [(a, share[0]), (b, share[1])]),
            (there, devices[1], [(b, share[1]), (a, share[0])]),
        ] {
            let device = usize::from(device);
            let load = &self.load[device * width..][..width];
            let parts = [leaves, enters].map(|(_, share)| share * layer.time[device]);
            let windows = &layer.windows;
            replace(row, load, windows.of(leaves.0), windows.of(enters.0), parts);
            windows.add_own(row, leaves.0, parts[0], -1.0);
            windows.add_own(row, enters.0, parts[1], 1.0);
        }
        true
    }

    /// The row of a touched device, begun with its load.
    fn row(&mut self, device: u16) -> &mut [f32] {
        let width = self.width;
        let at = self.touched.iter().position(|&touched| touched == device).unwrap_or_else(|| {
            let at = self.touched.len();
            self.touched.push(device);
            let load = &self.load[usize::from(device) * width..][..width];
            self.rows[at * width..][..width].copy_from_slice(load);
            at
        });
        &mut self.rows[at * width..][..width]
    }
}

/// Rounds to a whole number what is below 2^22: added to 1.5 * 2^23, nothing else fits the mantissa.
#[inline(always)]
fn whole(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn add(to: &mut [f32], load: &[f32], part: f32, sign: f32) {
    for (to, &load) in to.iter_mut().zip(load) {
        *to += sign * whole(load * part);
    }
}

/// Writes a device's `load` with one expert's part less and another's more.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
fn replace(to: &mut [f32], load: &[f32], leaves: &[f32], enters: &[f32], parts: [f32; 2]) {
    let width = to.len();
    let (load, leaves, enters) = (&load[..width], &leaves[..width], &enters[..width]);
    for w in 0..width {
        to[w] = load[w] - whole(leaves[w] * parts[0]) + whole(enters[w] * parts[1]);
    }
}

/// Sum in an order of additions that no instruction set changes; exact, as values are whole.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx2", "x86_64+avx2"))]
pub(super) fn sum(values: &[f32]) -> f64 {
    let mut sums = [0.0f64; LANES];
    for chunk in values.chunks_exact(LANES) {
        for lane in 0..LANES {
            sums[lane] += f64::from(chunk[lane]);
        }
    }
    total(sums)
}

/// Sum of lanes, halves added to halves: the processor need not wait for one addition after the other.
#[inline(always)]
pub(super) fn total(lanes: [f64; LANES]) -> f64 {
    let eight: [f64; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f64; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
