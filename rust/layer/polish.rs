//! Lowers the longest device time of a layer, step by step, until no step does.

use super::EMPTY;
use super::draft::Draft;

/// The longest time is not lowered further when it is this close to the mean, as a share of it.
const CLOSE: f64 = 1.0 / 4096.0;
/// A step must gain more than sums of floats can be off.
const GAIN: f64 = 1e-12;

/// Makes `steps` at most, each of which lowers the time of the slowest device and lifts no other to it.
pub(super) fn polish(draft: &mut Draft<'_>, steps: usize) {
    if steps == 0 {
        return;
    }
    let mut times = draft.times();
    // Loads flow where they are served soonest, if they can be parted at will.
    let speed: f64 = draft
        .site
        .time
        .iter()
        .zip(draft.site.room)
        .filter(|(_, room)| **room > 0)
        .map(|(t, _)| 1.0 / t)
        .sum();
    let enough = draft.load.iter().sum::<f64>() / speed * (1.0 + CLOSE);
    for _ in 0..steps {
        let slowest = extreme(&times, |a, b| a > b);
        let goal = times[slowest] * (1.0 - GAIN);
        if times[slowest] <= enough
            || !(exchange(draft, &mut times, slowest, goal) || copy(draft, &mut times, slowest, goal))
        {
            return;
        }
    }
}

/// The first device that no other beats.
fn extreme(times: &[f64], beats: impl Fn(f64, f64) -> bool) -> usize {
    (1..times.len()).fold(0, |best, g| if beats(times[g], times[best]) { g } else { best })
}

/// Exchanges the contents of two slots, one of them on `slow`, so that both devices are done before `goal`; the first
/// device that this works with, the one that is done first before others.
fn exchange(draft: &mut Draft<'_>, times: &mut [f64], slow: usize, goal: f64) -> bool {
    let first = extreme(times, |a, b| a < b);
    if exchange_with(draft, times, slow, first, goal) {
        return true;
    }
    let mut others: Vec<usize> = (0..times.len()).filter(|&g| g != slow && g != first).collect();
    others.sort_by(|&g, &h| times[g].total_cmp(&times[h]));
    others.into_iter().any(|g| exchange_with(draft, times, slow, g, goal))
}

fn exchange_with(draft: &mut Draft<'_>, times: &mut [f64], slow: usize, other: usize, goal: f64) -> bool {
    let [t, u] = [draft.site.time[slow], draft.site.time[other]];
    let (mut best, mut found) = (goal, None);
    for p in draft.slots(slow) {
        let (a, given) = (draft.expert_in[p], draft.share(draft.expert_in[p]));
        for q in draft.slots(other) {
            let b = draft.expert_in[q];
            let moved = given - draft.share(b);
            let longest = (times[slow] - moved * t).max(times[other] + moved * u);
            if longest < best && may_exchange(draft, (p, slow), (q, other)) {
                (best, found) = (longest, Some((p, q, a, b, moved)));
            }
        }
    }
    let Some((p, q, a, b, moved)) = found else { return false };
    draft.put(p, slow, EMPTY);
    draft.put(q, other, a);
    draft.put(p, slow, b);
    times[slow] -= moved * t;
    times[other] += moved * u;
    true
}

fn may_exchange(draft: &Draft<'_>, (p, g): (usize, usize), (q, h): (usize, usize)) -> bool {
    let enters = |expert: u16, device: usize| expert == EMPTY || draft.takes(expert, device);
    let (a, b) = (draft.expert_in[p], draft.expert_in[q]);
    enters(a, h) && enters(b, g) && draft.releases(p, g) && draft.releases(q, h)
}

/// Puts a copy of one of the experts on `slow` into a slot elsewhere, over an expert that has others or over nothing, so that
/// all whose time changes are done before `goal`; the best of all such steps.
fn copy(draft: &mut Draft<'_>, times: &mut [f64], slow: usize, goal: f64) -> bool {
    let mut best = (goal, None);
    for p in draft.slots(slow) {
        let e = draft.expert_in[p];
        if e == EMPTY {
            continue;
        }
        for g in (0..times.len()).filter(|&g| draft.takes(e, g)) {
            for q in draft.slots(g) {
                let f = draft.expert_in[q];
                if (f == EMPTY || draft.copies[usize::from(f)] > 1) && draft.releases(q, g) {
                    let longest = changes(draft, e, (q, g))
                        .fold(0.0, |longest: f64, (h, by)| longest.max(times[h] + by));
                    if longest < best.0 {
                        best = (longest, Some((e, q, g)));
                    }
                }
            }
        }
    }
    let Some((e, q, g)) = best.1 else { return false };
    let changes: Vec<(usize, f64)> = changes(draft, e, (q, g)).collect();
    changes.into_iter().for_each(|(h, by)| times[h] += by);
    draft.put(q, g, e);
    true
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
