//! Times of devices and loads of slots, as steps see them.

use super::super::{LANES, Site, Slots};

/// The norm of device times has order 2 to the power of this. The slowest device counts most, and so do those that are
/// nearly as slow, which may be the slowest under the next load.
pub(super) const DOUBLINGS: u32 = 3;
pub(super) const NORM: f64 = (1 << DOUBLINGS) as f64;

/// Returns a time to the power of the norm's order.
#[inline(always)]
pub(super) fn power(time: f64) -> f64 {
    super::super::power(time, DOUBLINGS)
}

/// Returns the largest of numbers, or `least` if none is larger.
#[inline(always)]
pub(super) fn largest(numbers: &[f64], least: f64) -> f64 {
    let (chunks, rest) = numbers.as_chunks::<LANES>();
    let mut largest = [least; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            largest[lane] = if chunk[lane] > largest[lane] { chunk[lane] } else { largest[lane] };
        }
    }
    largest.iter().chain(rest).copied().fold(least, f64::max)
}

/// Times of devices and loads of slots.
pub(super) struct Loads {
    /// Time of every device `[D]` under expected loads with their variance; 1 is the mean.
    pub(super) times: Vec<f64>,
    /// The times to the power of the norm's order `[D]`, and their sum.
    pub(super) powers: Vec<f64>,
    pub(super) total: f64,
    /// Time of every device `[D]` under measured loads.
    pub(super) measured_times: Vec<f64>,
    /// The mean time, and the time per token of every device in units of it `[D]`.
    pub(super) mean: f64,
    pub(super) per_token: Vec<f64>,
    /// Expected load in every slot `[P]`, with its variance.
    pub(super) load_in: Vec<f64>,
    /// Load of each copy of an expert if it had one copy more `[E]`.
    pub(super) with_one_more: Vec<f64>,
    /// Weight of the square of a slot's load: it stands for the load's variance in the next window.
    pub(super) square: f64,
}

impl Loads {
    /// Computes times and loads of slots under measured and expected loads `[E]`.
    pub(super) fn new(site: &Site, [measured, expected]: [&[f64]; 2], slots: &Slots, square: f64) -> Self {
        let with_variance = |load: f64| load + square * load * load;
        let (measured_times, _) = slots.times_and_loads(site, measured);
        let (_, mut load_in) = slots.times_and_loads(site, expected);
        for load in &mut load_in {
            *load = with_variance(*load);
        }
        let mean = load_in.iter().sum::<f64>() / site.rate();
        let unit = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        let per_token: Vec<f64> = site.time.iter().map(|time| time * unit).collect();
        let time = |g: usize| load_in[slots.of(g)].iter().sum::<f64>() * per_token[g];
        let times: Vec<f64> = (0..site.devices()).map(time).collect();
        let powers: Vec<f64> = times.iter().copied().map(power).collect();
        let copies = slots.copies.iter().map(|&copies| f64::from(copies + 1));
        let with_one_more =
            expected.iter().zip(copies).map(|(load, copies)| with_variance(load / copies)).collect();
        Self {
            total: powers.iter().sum(),
            times,
            powers,
            measured_times,
            mean,
            per_token,
            load_in,
            with_one_more,
            square,
        }
    }

    /// Returns a load with what its variance adds.
    pub(super) fn with_variance(&self, load: f64) -> f64 {
        load + self.square * load * load
    }

    /// Updates times and loads after an exchange of slots `p` and `q`, under measured loads `[E]`.
    pub(super) fn exchange(&mut self, [p, q]: [usize; 2], site: &Site, measured: &[f64], slots: &Slots) {
        let (g, h) = (slots.device(p), slots.device(q));
        self.load_in.swap(p, q);
        let moved = self.load_in[q] - self.load_in[p];
        self.times[g] -= moved * self.per_token[g];
        self.times[h] += moved * self.per_token[h];
        for device in [g, h] {
            let load: f64 =
                slots.of(device).map(|slot| slots.load_per_copy(measured, slots.expert_in[slot])).sum();
            self.measured_times[device] = load * site.time[device];
            self.powers[device] = power(self.times[device]);
        }
        self.total = self.powers.iter().sum();
    }
}

/// Returns 1 for yes, 0 for no.
pub(super) fn one_if(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}
