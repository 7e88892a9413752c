//! Lowers the time of a layer's slowest device, step by step, until no step lowers it.

use crate::layer::{EMPTY, Move, Site, Slots};

/// The polish ends when the longest time is above the mean by no more than this share of it.
const CLOSE: f64 = 1.0 / 4096.0;
/// If the longest time is still above the mean by more than this share, there are [`RESCUE`] times as many trials: few
/// layers need them, but those need many.
const FAR: f64 = 1.0 / 64.0;
/// Factor of the trials beyond [`FAR`].
const RESCUE: usize = 24;
/// Smallest gain of a step, as a share of the longest time: sums of floats may be off by as much.
const GAIN: f64 = 1e-12;

/// Tries `trials` pairs of devices for steps that lower the time of the slowest device and raise no other's above it.
pub(super) fn polish(slots: &mut Slots, site: &Site, load: &[f64], trials: usize) {
    if trials == 0 {
        return;
    }
    // Loads that could be split at will would take the mean.
    let mean = load.iter().sum::<f64>() / site.rate();
    let (times, load_in) = slots.times_and_loads(site, load);
    let mut polish = Polish { slots, site, load, times, load_in, trials };
    let mut rescue_trials = trials * RESCUE;
    loop {
        let slow = extreme(&polish.times, |a, b| a > b);
        if polish.trials == 0 && polish.times[slow] > mean * (1.0 + FAR) {
            polish.trials = std::mem::take(&mut rescue_trials);
        }
        let close = polish.times[slow] <= mean * (1.0 + CLOSE);
        let goal = polish.times[slow] * (1.0 - GAIN);
        if close || polish.trials == 0 {
            return;
        }
        let gained = polish.exchange(slow, goal) || polish.drop(slow, goal) || polish.copy(slow, goal);
        if !gained && polish.trials > 0 {
            return;
        }
    }
}

/// Returns the first device that no other beats.
fn extreme(times: &[f64], beats: impl Fn(f64, f64) -> bool) -> usize {
    (1..times.len()).fold(0, |best, g| if beats(times[g], times[best]) { g } else { best })
}

/// The state of a polish.
struct Polish<'a> {
    slots: &'a mut Slots,
    site: &'a Site,
    load: &'a [f64],
    /// Time of every device `[D]`.
    times: Vec<f64>,
    /// Load in every slot `[P]`.
    load_in: Vec<f64>,
    /// Trials left.
    trials: usize,
}

impl Polish<'_> {
    /// Exchanges the contents of a slot on `slow` and of one elsewhere, so that both devices are done before `goal`; returns
    /// whether it did. The fastest devices are tried first.
    fn exchange(&mut self, slow: usize, goal: f64) -> bool {
        let first = extreme(&self.times, |a, b| a < b);
        if self.exchange_with(slow, first, goal) {
            return true;
        }
        if self.trials == 0 {
            return false;
        }
        let mut others: Vec<usize> = (0..self.times.len()).filter(|&g| g != slow && g != first).collect();
        others.sort_by(|&g, &h| self.times[g].total_cmp(&self.times[h]));
        others.into_iter().any(|g| self.exchange_with(slow, g, goal))
    }

    /// Makes the exchange of two slots of these devices that ends first, if both are done before `goal`; returns whether there
    /// is one.
    fn exchange_with(&mut self, slow: usize, other: usize, goal: f64) -> bool {
        if self.trials == 0 || slow == other {
            return false;
        }
        self.trials -= 1;
        let slots = &mut *self.slots;
        let [t, u] = [self.site.time[slow], self.site.time[other]];
        let theirs = slots.of(other);
        let loads = &self.load_in[theirs.clone()];
        let [time_before, other_before] = [self.times[slow], self.times[other]];
        let (mut least, mut best) = (goal, None);
        for p in slots.of(slow) {
            let leaving = self.load_in[p];
            for (&taken, q) in loads.iter().zip(theirs.clone()) {
                let moved = leaving - taken;
                let longest = f64::max(time_before - moved * t, other_before + moved * u);
                if longest < least && slots.allows(self.site, Move::Swap(p, q)) {
                    (least, best) = (longest, Some((p, q)));
                }
            }
        }
        let Some((p, q)) = best else { return false };
        slots.apply(Move::Swap(p, q));
        self.load_in.swap(p, q);
        self.times[slow] += (self.load_in[p] - self.load_in[q]) * t;
        self.times[other] += (self.load_in[q] - self.load_in[p]) * u;
        true
    }

    /// Changes a slot's content, and computes times and loads again.
    fn put(&mut self, slot: usize, expert: u16) {
        self.slots.put(slot, expert);
        (self.times, self.load_in) = self.slots.times_and_loads(self.site, self.load);
    }

    /// Empties the best slot on `slow` whose expert's other copies can take over its load and are then done before `goal`;
    /// returns whether there is one.
    fn drop(&mut self, slow: usize, goal: f64) -> bool {
        let slots = &*self.slots;
        let mut best = (goal, None);
        for p in slots.of(slow).filter(|&p| slots.may_lose(self.site, p)) {
            let e = slots.expert_in[p];
            if e == EMPTY || self.trials == 0 {
                continue;
            }
            self.trials -= 1;
            let added = self.load_in[p] / f64::from(slots.copies(e) - 1);
            let others = slots.devices(e).map(usize::from).filter(|&g| g != slow);
            let longest = others.map(|g| self.times[g] + added * self.site.time[g]).fold(0.0, f64::max);
            if longest < best.0 {
                best = (longest, Some(p));
            }
        }
        let Some(p) = best.1 else { return false };
        self.put(p, EMPTY);
        true
    }

    /// Puts another copy of an expert on `slow` into a slot elsewhere, which is empty or whose expert has other copies, so
    /// that all devices whose time changes are done before `goal`; takes the best such step, and returns whether there is one.
    fn copy(&mut self, slow: usize, goal: f64) -> bool {
        let slots = &*self.slots;
        let mut best = (goal, None);
        for p in slots.of(slow) {
            let e = slots.expert_in[p];
            if e == EMPTY {
                continue;
            }
            for g in (0..self.times.len()).filter(|&g| slots.may_take(self.site, e, g)) {
                if self.trials == 0 {
                    break;
                }
                self.trials -= 1;
                for q in slots.of(g).filter(|&q| slots.may_lose(self.site, q)) {
                    let longest = self.changes(e, (q, g)).map(|(h, by)| self.times[h] + by);
                    let longest = longest.fold(0.0, f64::max);
                    if longest < best.0 {
                        best = (longest, Some((e, q)));
                    }
                }
            }
        }
        let Some((e, q)) = best.1 else { return false };
        self.put(q, e);
        true
    }

    /// Returns what a copy of expert `e` in slot `q` of device `g` adds to the time of every device that it changes.
    fn changes(&self, e: u16, (q, g): (usize, usize)) -> impl Iterator<Item = (usize, f64)> + use<'_> {
        let (slots, load, time) = (&*self.slots, self.load, &self.site.time);
        let f = slots.expert_in[q];
        // Load that each copy gains if its expert has so many copies more.
        let growth = |expert: u16, added: i64| {
            let copies = i64::from(slots.copies(expert)) + added;
            load[usize::from(expert)] / copies as f64 - slots.load_per_copy(load, expert)
        };
        let growth_of_e = growth(e, 1);
        let growth_of_f = if f == EMPTY { 0.0 } else { growth(f, -1) };
        let both = move |h: usize| f != EMPTY && slots.holds(f, h);
        let devices = move |expert: u16| slots.devices(expert).map(usize::from);
        let of_e =
            devices(e).map(move |h| (h, (growth_of_e + if both(h) { growth_of_f } else { 0.0 }) * time[h]));
        let of_f = (f != EMPTY).then(|| devices(f)).into_iter().flatten();
        let of_f =
            of_f.filter(move |&h| h != g && !slots.holds(e, h)).map(move |h| (h, growth_of_f * time[h]));
        let change = (slots.load_per_copy(load, e) + growth_of_e - slots.load_per_copy(load, f)) * time[g];
        of_e.chain(of_f).chain([(g, change)])
    }
}
