//! Lowers the longest device time of a layer, step by step, until no step does.

use super::draft::Draft;
use crate::layer::EMPTY;

/// The longest time is not lowered further when it is this close to the mean, as a share of it.
const CLOSE: f64 = 1.0 / 4096.0;
/// Where it is this far from it still, there are [`RESCUE`] times as many trials: few layers need them, and those much.
const FAR: f64 = 1.0 / 64.0;
/// See [`FAR`].
const RESCUE: usize = 24;
/// A step must gain more than sums of floats can be off.
const GAIN: f64 = 1e-12;

/// Tries `trials` pairs of devices, for steps that lower the time of the slowest and lift no other to it.
pub(in crate::layer) fn polish(draft: &mut Draft<'_>, trials: usize) {
    if trials == 0 {
        return;
    }
    let site = draft.site;
    let used = site.time.iter().zip(site.room).filter(|(_, room)| **room > 0);
    // Nothing is faster than loads that are parted at will.
    let mean = draft.load.iter().sum::<f64>() / used.map(|(time, _)| 1.0 / time).sum::<f64>();
    let mut polish = Polish::new(draft, trials);
    let mut more = trials * RESCUE;
    loop {
        let slow = extreme(&polish.times, |a, b| a > b);
        if polish.trials == 0 && polish.times[slow] > mean * (1.0 + FAR) {
            polish.trials = std::mem::take(&mut more);
        }
        let close = polish.times[slow] <= mean * (1.0 + CLOSE);
        let goal = polish.times[slow] * (1.0 - GAIN);
        if close || polish.trials == 0 {
            return;
        }
        let found =
            polish.exchange(slow, goal) || polish.drop(slow, goal) || site.copies && polish.copy(slow, goal);
        if !found && polish.trials > 0 {
            return;
        }
    }
}

/// The first device that no other beats.
fn extreme(times: &[f64], beats: impl Fn(f64, f64) -> bool) -> usize {
    (1..times.len()).fold(0, |best, g| if beats(times[g], times[best]) { g } else { best })
}

struct Polish<'a, 'b> {
    draft: &'a mut Draft<'b>,
    /// Of every device `[D]`.
    times: Vec<f64>,
    /// Load in every slot `[P]`.
    load_in: Vec<f64>,
    /// Trials left.
    trials: usize,
}

impl<'a, 'b> Polish<'a, 'b> {
    fn new(draft: &'a mut Draft<'b>, trials: usize) -> Self {
        let (times, load_in) = draft.times_and_loads();
        Self { draft, times, load_in, trials }
    }

    /// Exchanges the contents of two slots, one of them on `slow`, so that both devices are done before `goal`: with the
    /// first device that allows it, those that are done first before others.
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

    fn exchange_with(&mut self, slow: usize, other: usize, goal: f64) -> bool {
        if self.trials == 0 || slow == other {
            return false;
        }
        self.trials -= 1;
        let draft = &mut *self.draft;
        let [t, u] = [draft.site.time[slow], draft.site.time[other]];
        let (mine, theirs) = (draft.slots(slow), draft.slots(other));
        let loads = &self.load_in[theirs.clone()];
        let [before, beside] = [self.times[slow], self.times[other]];
        let (mut best, mut found) = (goal, None);
        for p in mine {
            let given = self.load_in[p];
            for (&taken, q) in loads.iter().zip(theirs.clone()) {
                let moved = given - taken;
                let longest = f64::max(before - moved * t, beside + moved * u);
                if longest < best && may_exchange(draft, (p, slow), (q, other)) {
                    (best, found) = (longest, Some((p, q)));
                }
            }
        }
        let Some((p, q)) = found else { return false };
        let (a, b) = (draft.expert_in[p], draft.expert_in[q]);
        draft.put(p, slow, EMPTY);
        draft.put(q, other, a);
        draft.put(p, slow, b);
        self.load_in.swap(p, q);
        self.times[slow] += (self.load_in[p] - self.load_in[q]) * t;
        self.times[other] += (self.load_in[q] - self.load_in[p]) * u;
        true
    }

    /// Empties the slot on `slow` whose expert's other copies take its part best, all of them done before `goal`.
    fn drop(&mut self, slow: usize, goal: f64) -> bool {
        let draft = &mut *self.draft;
        let mut best = (goal, None);
        for p in draft.slots(slow).filter(|&p| draft.releases(p, slow)) {
            let e = draft.expert_in[p];
            if e == EMPTY || draft.copies[usize::from(e)] == 1 || self.trials == 0 {
                continue;
            }
            self.trials -= 1;
            let more = self.load_in[p] / f64::from(draft.copies[usize::from(e)] - 1);
            let others = draft.devices(e).filter(|&g| g != slow);
            let longest = others.map(|g| self.times[g] + more * draft.site.time[g]).fold(0.0, f64::max);
            if longest < best.0 {
                best = (longest, Some(p));
            }
        }
        let Some(p) = best.1 else { return false };
        draft.put(p, slow, EMPTY);
        (self.times, self.load_in) = draft.times_and_loads();
        true
    }

    /// Puts a copy of an expert on `slow` into a slot elsewhere, over an expert that has others or over nothing, so that
    /// all whose time changes are done before `goal`; the best of all such steps.
    fn copy(&mut self, slow: usize, goal: f64) -> bool {
        let draft = &mut *self.draft;
        let mut best = (goal, None);
        for p in draft.slots(slow) {
            let e = draft.expert_in[p];
            if e == EMPTY {
                continue;
            }
            for g in (0..self.times.len()).filter(|&g| draft.takes(e, g)) {
                if self.trials == 0 {
                    break;
                }
                self.trials -= 1;
                for q in draft.slots(g).filter(|&q| draft.releases(q, g)) {
                    let f = draft.expert_in[q];
                    if f == EMPTY || draft.copies[usize::from(f)] > 1 {
                        let longest = changes(draft, e, (q, g)).map(|(h, by)| self.times[h] + by);
                        let longest = longest.fold(0.0, f64::max);
                        if longest < best.0 {
                            best = (longest, Some((e, q, g)));
                        }
                    }
                }
            }
        }
        let Some((e, q, g)) = best.1 else { return false };
        draft.put(q, g, e);
        (self.times, self.load_in) = draft.times_and_loads();
        true
    }
}

pub(super) fn may_exchange(draft: &Draft<'_>, (p, g): (usize, usize), (q, h): (usize, usize)) -> bool {
    let enters = |expert: u16, device: usize| expert == EMPTY || draft.takes(expert, device);
    let (a, b) = (draft.expert_in[p], draft.expert_in[q]);
    enters(a, h) && enters(b, g) && draft.releases(p, g) && draft.releases(q, h)
}

/// What a copy of expert `e` in slot `q` of device `g` adds to the time of every device that feels it.
fn changes<'a>(
    draft: &'a Draft<'_>,
    e: u16,
    (q, g): (usize, usize),
) -> impl Iterator<Item = (usize, f64)> + use<'a> {
    let f = draft.expert_in[q];
    let time = draft.site.time;
    // What the copies of an expert gain, each, when there are `more` of them.
    let gain = move |expert: u16, more: i64| {
        let copies = i64::from(draft.copies[usize::from(expert)]) + more;
        draft.load[usize::from(expert)] / copies as f64 - draft.share(expert)
    };
    let less = gain(e, 1);
    let more = if f == EMPTY { 0.0 } else { gain(f, -1) };
    let both = move |h: usize| f != EMPTY && draft.holds(f, h);
    let of_e = draft.devices(e).map(move |h| (h, (less + if both(h) { more } else { 0.0 }) * time[h]));
    let of_f = (f != EMPTY).then(|| draft.devices(f)).into_iter().flatten();
    let of_f = of_f.filter(move |&h| h != g && !draft.holds(e, h)).map(move |h| (h, more * time[h]));
    of_e.chain(of_f).chain([(g, (draft.share(e) + less - draft.share(f)) * time[g])])
}
