//! Balance in windows within milliseconds: for engines that decide while they serve.
//!
//! Three steps. Every expert gets copies by its mean square over windows; the heaviest copy first goes to the device
//! where it adds least to the powers of loads in all windows, which is where the other windows leave room for it; then
//! exchanges are tried at low temperatures, as the start is good. No settings are chosen: the order of the norm and the
//! noise are what suits traffic of many kinds (bench/RESULTS.md).

mod columns;
mod state;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rayon::prelude::*;

use super::EMPTY;
use super::construct::draft::{Draft, Site};
use super::construct::{NoSlot, QUICK, check, complete, copies, fill, pin, squeeze};
use crate::anneal::{Blocks, Length, Ramp, anneal};
use crate::control::Control;
use crate::error::{Error, Result, SLOTS, room_for};
use crate::random::Random;
use columns::Columns;
use state::State;

/// How long to search, and what counts.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Trials of a layer.
    pub trials: u64,
    /// The part of an expert's variance among windows that is taken for noise.
    pub noise: f64,
    /// Cost of a copy that a device did not hold at the start, as a part of what devices do on average.
    pub price: f64,
}

/// Trials at one temperature.
const BLOCKS: Blocks = Blocks { trials: 256, check: 1 };
/// However short the time, a layer gets this part of its trials.
const LEAST: u64 = 50;
/// First and last temperature, in typical changes of the cost. A start by all windows is lost at higher ones.
const HOT: f64 = 0.03;
const COLD: f64 = 0.01;

/// Levels every layer: slots `[L, D, S]`, -1 where one is empty, for loads `[W, L, E]` in windows with weights `[W]`,
/// changed where they stand; `all` is as of [`super::construct::fill_layers`].
///
/// One seed gives one answer on any number of threads; without a control all work is done in this one. A layer that
/// begins when time is up is placed and hardly searched.
///
/// # Errors
/// If sizes or loads make no sense, or the rules leave an expert no slot.
pub fn level_layers(
    load: &[f64],
    weight: &[f64],
    experts: usize,
    all: Site<'_>,
    slots: &mut [i32],
    pace: Pace,
    seed: u64,
    control: Option<&Control>,
) -> Result<()> {
    check(load, experts, all.time)?;
    let devices = all.time.len();
    let layers = all.room.len() / devices;
    let widest = all.room.iter().copied().max().unwrap_or(0);
    if widest.saturating_mul(devices) > SLOTS {
        let rule = format!("at most {SLOTS} slots in a layer, all devices as wide as the widest");
        return Err(Error::Shape { what: "room", rule, found: format!("{devices} x {widest}") });
    }
    // Windows and devices of a layer in the form of the search.
    room_for("windows", &[weight.len() + 2 * columns::LANES, experts + 3 * devices, size_of::<f32>()])?;
    let (waiting, never) = (AtomicUsize::new(layers), Control::new(None));
    let one = |(layer, slots): (usize, &mut [i32])| {
        let cells = layer * experts * devices..(layer + 1) * experts * devices;
        let of = |rules: &'_ [bool]| if rules.is_empty() { 0..0 } else { cells.clone() };
        let room = &all.room[layer * devices..][..devices];
        let site = Site {
            room,
            forbidden: &all.forbidden[of(all.forbidden)],
            pinned: &all.pinned[of(all.pinned)],
            ..all
        };
        let rows = weight.iter().enumerate();
        let windows = rows.map(|(w, &weight)| (&load[(w * layers + layer) * experts..][..experts], weight));
        let start: Vec<i32> = slots
            .chunks_exact(widest)
            .zip(room)
            .flat_map(|(row, &room)| row[..room].iter().copied())
            .collect();
        // Layers that have not begun share the time with this one.
        let waiting = waiting.fetch_sub(1, Ordering::Relaxed);
        let time = control.and_then(Control::deadline).map(|end| {
            let waves = waiting.div_ceil(rayon::current_num_threads());
            end.saturating_duration_since(Instant::now()) / waves as u32
        });
        let length = Length { trials: pace.trials, least: pace.trials / LEAST, time };
        let mut random = Random::new(seed, layer as u64);
        let found =
            level(windows, experts, site, &start, pace, length, &mut random, control.unwrap_or(&never))
                .map_err(|NoSlot(expert)| Error::NoSlot { layer, expert })?;
        let mut rest = found.as_slice();
        for (row, &room) in slots.chunks_exact_mut(widest).zip(room) {
            let (held, after) = rest.split_at(room);
            rest = after;
            row.fill(-1);
            for (slot, &e) in row.iter_mut().zip(held).filter(|(_, e)| **e != EMPTY) {
                *slot = i32::from(e);
            }
        }
        Ok(())
    };
    let each = devices * widest;
    if each == 0 {
        return Err(Error::NoSlot { layer: 0, expert: 0 });
    }
    if control.is_some() {
        slots.par_chunks_exact_mut(each).enumerate().try_for_each(one)
    } else {
        slots.chunks_exact_mut(each).enumerate().try_for_each(one)
    }
}

/// The expert of every slot `[P]` of a layer, for windows of loads `[E]` with their weights, from the `start` `[P]`, -1
/// where a slot is empty, or anew where nothing is in it.
///
/// By the slowest devices of the windows given, no worse than the start; anew, no worse than a packing on their sum.
fn level<'a>(
    windows: impl ExactSizeIterator<Item = (&'a [f64], f64)> + Clone,
    experts: usize,
    site: Site<'_>,
    start: &[i32],
    pace: Pace,
    length: Length,
    random: &mut Random,
    control: &Control,
) -> std::result::Result<Vec<u16>, NoSlot> {
    let columns = Columns::new(windows.clone(), experts, site, pace.noise);
    let runs = start.iter().any(|&e| e >= 0);
    let mut state = if runs { from(start, site, &columns)? } else { anew(site, &columns)? };
    let mut best = None;
    if runs {
        state.hold(pace.price as f32);
        best = Some((state.cost(), state.draft.expert_in.clone()));
    } else {
        let mut load = vec![0.0; experts];
        for (tokens, weight) in windows {
            load.iter_mut().zip(tokens).for_each(|(load, tokens)| *load += tokens * weight);
        }
        let mut packed = Draft::new(site, &columns.weight);
        put_all(&mut packed, &fill(site, &load, QUICK)?);
        complete(&mut packed, site.copies)?;
        let packed = State::new(packed, &columns);
        let cost = packed.cost();
        if state.cost() <= cost {
            best = Some((cost, packed.draft.expert_in));
        } else {
            best.replace((cost, packed.draft.expert_in.clone()));
            state = packed;
        }
    }
    let typical = state.typical_change(random);
    let ramp = Ramp { first: HOT * typical, change: COLD / HOT };
    if length.trials > 0 {
        anneal(length, BLOCKS, [ramp], control, |[temperature]| {
            state.search(BLOCKS.trials as usize, temperature, random);
        });
    }
    match best {
        Some((cost, slots)) if cost < state.cost() => Ok(slots),
        _ => Ok(state.draft.expert_in),
    }
}

/// Puts experts into slots that may take them.
fn put_all(draft: &mut Draft<'_>, contents: &[u16]) {
    for g in 0..draft.site.room.len() {
        for slot in draft.slots(g) {
            let expert = contents[slot];
            if usize::from(expert) < draft.load.len() && draft.takes(expert, g) {
                draft.put(slot, g, expert);
            }
        }
    }
}

/// What runs, with what is missing.
fn from<'a>(start: &[i32], site: Site<'a>, columns: &'a Columns) -> std::result::Result<State<'a>, NoSlot> {
    let mut draft = Draft::new(site, &columns.weight);
    let contents: Vec<u16> = start.iter().map(|&e| u16::try_from(e).unwrap_or(EMPTY)).collect();
    put_all(&mut draft, &contents);
    complete(&mut draft, site.copies)?;
    Ok(State::new(draft, columns))
}

/// The heaviest copy first to where it adds least.
fn anew<'a>(site: Site<'a>, columns: &'a Columns) -> std::result::Result<State<'a>, NoSlot> {
    let mut draft = Draft::new(site, &columns.weight);
    pin(&mut draft)?;
    let (order, copies) = copies(&draft)?;
    let mut state = State::new(draft, columns);
    let room = |draft: &Draft<'_>| -> Vec<Vec<usize>> {
        let empty = |g| draft.slots(g).rev().filter(|&slot| draft.expert_in[slot] == EMPTY).collect();
        (0..site.room.len()).map(empty).collect()
    };
    let mut empty = room(&state.draft);
    let mut open: Vec<bool> = empty.iter().map(|slots| !slots.is_empty()).collect();
    for item in order {
        let e = item.expert();
        let part = 1.0 / copies[e] as f32;
        while state.draft.copies[e] < copies[e] {
            let Some(device) = state.best_device(e as u16, part, &open) else { break };
            let slot = empty[device].pop().unwrap_or_default();
            open[device] = !empty[device].is_empty();
            state.enter(slot, device, e as u16, part);
        }
        if state.draft.copies[e] == 0 {
            if !squeeze(&mut state.draft, e as u16) {
                return Err(NoSlot(e));
            }
            state.refresh();
            empty = room(&state.draft);
            open = empty.iter().map(|slots| !slots.is_empty()).collect();
        }
    }
    complete(&mut state.draft, site.copies)?;
    state.refresh();
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Instance {
        experts: usize,
        load: Vec<f64>,
        weight: Vec<f64>,
        room: Vec<usize>,
        time: Vec<f64>,
        forbidden: Vec<bool>,
    }

    impl Instance {
        fn random(experts: usize, devices: usize, windows: usize, more: usize, random: &mut Random) -> Self {
            let width = (experts.div_ceil(devices) + more).min(experts);
            let mut draw = |n: usize| random.below(n);
            let load =
                (0..windows * experts).map(|_| draw(1000) as f64 * f64::from(draw(4) as u32)).collect();
            let weight = (0..windows).map(|_| [0.0, 0.5, 1.0, 2.0][draw(4)]).collect();
            let time = (0..devices).map(|_| [0.5, 1.0][draw(2)]).collect();
            // Bans that leave every expert half of the devices or more.
            let banned = draw(2) == 1 && devices > 1;
            let half = |e: usize, g: usize| banned && e.is_multiple_of(2) && g == (e / 2) % devices;
            let cells = (0..experts).flat_map(|e| (0..devices).map(move |g| (e, g)));
            let forbidden = cells.map(|(e, g)| half(e, g)).collect();
            Self { experts, load, weight, room: vec![width; devices], time, forbidden }
        }

        fn site(&self) -> Site<'_> {
            Site { room: &self.room, time: &self.time, forbidden: &self.forbidden, pinned: &[], copies: true }
        }

        fn windows(&self) -> impl ExactSizeIterator<Item = (&[f64], f64)> + Clone {
            self.load.chunks_exact(self.experts).zip(self.weight.iter().copied())
        }

        fn level(
            &self,
            start: &[i32],
            pace: Pace,
            random: &mut Random,
        ) -> std::result::Result<Vec<u16>, NoSlot> {
            let (length, control) =
                (Length { trials: pace.trials, least: 0, time: None }, Control::new(None));
            level(self.windows(), self.experts, self.site(), start, pace, length, random, &control)
        }

        /// Times of devices in windows `[W, D]`, in double precision.
        fn times(&self, slots: &[u16]) -> Vec<Vec<f64>> {
            let copies = |e: u16| slots.iter().filter(|&&of| of == e).count() as f64;
            let time = |row: &[f64], g: usize| -> f64 {
                let first: usize = self.room[..g].iter().sum();
                let here = slots[first..first + self.room[g]].iter().filter(|&&e| e != EMPTY);
                here.map(|&e| row[usize::from(e)] / copies(e)).sum::<f64>() * self.time[g]
            };
            self.windows().map(|(row, _)| (0..self.room.len()).map(|g| time(row, g)).collect()).collect()
        }

        /// The slowest device's time over that of a perfect balance, weighted.
        fn imbalance(&self, slots: &[u16]) -> f64 {
            let rate: f64 = self.time.iter().map(|time| 1.0 / time).sum();
            let (mut slowest, mut all) = (0.0, 0.0);
            for ((row, weight), times) in self.windows().zip(self.times(slots)) {
                slowest += weight * times.into_iter().fold(0.0, f64::max) * rate;
                all += weight * row.iter().sum::<f64>();
            }
            if all > 0.0 { slowest / all } else { 0.0 }
        }

        fn brought(&self, before: &[i32], slots: &[u16]) -> f64 {
            let rows = before.chunks(self.room[0]).zip(slots.chunks(self.room[0]));
            rows.flat_map(|(old, new)| new.iter().filter(|&&e| e != EMPTY && !old.contains(&i32::from(e))))
                .count() as f64
        }
    }

    proptest! {
        /// Every expert has a slot where it may be, no device two copies; and no answer is worse than what it began
        /// with: a packing of the sum, or what runs, prices of copies included.
        #[test]
        fn keeps_its_promises(
            experts in 1usize..24, devices in 1usize..6, windows in 1usize..40, more in 0usize..3,
            trials in prop::sample::select(vec![0u64, 300, 3000]), seed: u64,
        ) {
            let mut random = Random::new(seed, 0);
            let given = Instance::random(experts, devices, windows, more, &mut random);
            let pace = Pace { trials, noise: 0.25, price: 0.01 };
            let nothing = vec![-1; devices * given.room[0]];
            let Ok(found) = given.level(&nothing, pace, &mut random) else {
                prop_assert!(fill(given.site(), &vec![1.0; experts], 0).is_err());
                return Ok(());
            };
            let is_fine = |slots: &[u16]| {
                (0..experts as u16).all(|e| slots.contains(&e))
                    && slots.chunks(given.room[0]).enumerate().all(|(g, row)| {
                        row.iter().filter(|&&e| e != EMPTY).all(|&e| {
                            row.iter().filter(|&&of| of == e).count() == 1 && !given.site().forbids(e, g)
                        })
                    })
            };
            prop_assert!(is_fine(&found));
            let load: Vec<f64> = (0..experts)
                .map(|e| given.windows().map(|(row, weight)| row[e] * weight).sum())
                .collect();
            let packed = fill(given.site(), &load, QUICK).expect("slots suffice");
            if !packed.contains(&EMPTY) {
                prop_assert!(given.imbalance(&found) <= given.imbalance(&packed) * (1.0 + 1e-5));
            }
            // From what some other load would want.
            let other: Vec<f64> = (0..experts).map(|_| random.below(100) as f64).collect();
            let runs = fill(given.site(), &other, QUICK).expect("slots suffice");
            let start: Vec<i32> = runs.iter().map(|&e| if e == EMPTY { -1 } else { i32::from(e) }).collect();
            let moved = given.level(&start, pace, &mut random).expect("they do");
            prop_assert!(is_fine(&moved));
            if !runs.contains(&EMPTY) {
                let now = given.imbalance(&moved) + pace.price * given.brought(&start, &moved);
                prop_assert!(now <= given.imbalance(&runs) * (1.0 + 1e-5));
            }
        }

        /// What the state says of loads, of the cost and of what a move changes is what a fresh count in double
        /// precision says, after any number of moves.
        #[test]
        fn follows_its_moves(
            experts in 2usize..16, devices in 2usize..6, windows in 1usize..40, more in 0usize..3, seed: u64,
        ) {
            let mut random = Random::new(seed, 1);
            let mut given = Instance::random(experts, devices, windows, more, &mut random);
            given.forbidden.fill(false);
            let columns = Columns::new(given.windows(), experts, given.site(), 0.25);
            let mut state = anew(given.site(), &columns).expect("slots suffice");
            let start: Vec<i32> = state.draft.expert_in.iter().map(|&e| i32::from(e)).collect();
            state.hold(0.01);
            for _ in 0..20 {
                state.check_changes(&mut random);
                state.search(5, 10.0, &mut random);
                let slots = state.draft.expert_in.clone();
                if !slots.contains(&EMPTY) {
                    let expected = given.imbalance(&slots) + 0.01 * given.brought(&start, &slots);
                    prop_assert!((state.cost() - expected).abs() <= 1e-4 * expected.max(1.0));
                }
            }
        }

        /// Layers are as each alone, on one thread or several.
        #[test]
        fn threads_change_nothing(seed: u64, layers in 1usize..5) {
            let mut random = Random::new(seed, 2);
            let (experts, devices, windows) = (12, 3, 20);
            let load: Vec<f64> = (0..windows * layers * experts).map(|_| random.below(500) as f64).collect();
            let (room, time, weight) = (vec![5; layers * devices], vec![1.0; devices], vec![1.0; windows]);
            let all = Site { room: &room, time: &time, forbidden: &[], pinned: &[], copies: true };
            let pace = Pace { trials: 600, noise: 0.25, price: 0.0 };
            let control = Control::new(None);
            let run = |control| {
                let mut slots = vec![-1; layers * devices * 5];
                level_layers(&load, &weight, experts, all, &mut slots, pace, 7, control).expect("slots suffice");
                slots
            };
            prop_assert_eq!(run(None), run(Some(&control)));
        }
    }
}
